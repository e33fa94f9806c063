"""The description of the API, with what holds for many operations said once: keys of creates, limits, examples."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from wherry_server.api.examples import example_of
from wherry_server.idempotency import HEADER
from wherry_server.problems import MEDIA_TYPE

_PROBLEM = {
    "type": "about:blank",
    "title": "Not Found",
    "status": 404,
    "detail": "there is no cohort 'berlin'",
    "code": "cohort_unknown",
    "consequence": "",
    "next_step": "see them with: wherry cohort list",
}
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Sent again with the same key within 24 hours, the request is answered as the first time.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[!-~]+$"},
}
_LIMITED = {
    "description": "This token asked too much.",
    "headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}},
}
_FLAG: dict[str, Any] = {
    "type": "number",
    "description": "score from which a part is thrown out",
    "variants": {"old": 0.8, "new": 0.65},
    "default": "old",
    "rules": [{"when": "label.site = berlin", "share": 0.25, "variant": "new"}],
}
BODIES: dict[str, dict[str, Any]] = {
    "create_rollout": {
        "models": [{"model": "file-type", "version": "1.1.0"}],
        "cohort": "berlin",
        "stages": [{"share": 0.05}, {"share": 0.25}, {"share": 1.0}],
        "start": True,
    },
    "roll_back": {"model": "file-type", "device": "bench-1"},
    "simulate_rollout": {
        "plan": {"selector": "all", "stages": [{"share": 0.05}, {"share": 1.0}]},
        "devices": 1000,
        "outcomes": {"failed": 0.05, "settle_s": 120},
    },
    "approve_rollout": {"stage": 2, "round": 1},
    "release_device": {"device": "bench-1", "model": "file-type"},
    "clear_hardware": {"manifest": "sha256:" + "0" * 64, "hardware_class": "x86_64/onnxruntime"},
    "create_cohort": {"name": "berlin", "selector": "label.site = berlin"},
    "change_cohort": {"selector": "label.site = berlin and not name = lab-*"},
    "preview_cohort": {"selector": "arch = aarch64"},
    "create_flag": {"name": "new-threshold", **_FLAG},
    "preview_flag": {"name": "new-threshold", **_FLAG},
    "change_flag": _FLAG,
    "create_token": {"name": "ci", "role": "publisher", "days": 30},
    "create_enrolment_token": {"uses": 10, "days": 7, "labels": {"site": "north"}},
    "expect_device": {"public_key": "sha256:" + "0" * 64, "name": "press-07", "labels": {"site": "north"}},
    "create_webhook": {"name": "chat", "url": "https://chat.example/hook", "types": ["rollout.*"]},
    "change_webhook": {"url": "https://chat.example/hook", "types": ["rollout.*", "device.*"]},
    "publish_bundle": {"model": "file-type", "version": "1.1.0", "manifest": "sha256:" + "0" * 64},
    "add_publisher": {"name": "lab", "public_key_pem": "-----BEGIN PUBLIC KEY-----…", "models": ["file-type"]},
    "put_offline": {"roots": ["{…}"], "targets": "{…}"},
}
"""An example of each body, by operation."""
PARAMETERS: dict[str, Any] = {
    "model": "file-type",
    "version": "1.1.0",
    "device": "bench-1",
    "key": "sha256:" + "0" * 64,
    "number": 1,
    "name": "berlin",
    "flag": "new-threshold",
    "digest": "sha256:" + "0" * 64,
}
"""An example of each parameter in a path."""
OPERATIONS = frozenset({"get", "put", "post", "delete", "patch", "head"})


def install(app: FastAPI) -> None:
    """Have `app` describe itself so."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(
                get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            )
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # the way that FastAPI documents


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """Add to a description what is common to its operations."""
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            if method not in OPERATIONS:
                continue
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path" and parameter["name"] in PARAMETERS:
                    parameter.setdefault("example", PARAMETERS[parameter["name"]])
            for status, answer in operation["responses"].items():
                if status == "4XX":
                    answer["content"][MEDIA_TYPE]["example"] = _PROBLEM
                told = answer.get("content", {}).get("application/json", {})
                if status.startswith("2") and told.get("schema"):
                    told.setdefault("example", example_of(told["schema"], schema["components"]["schemas"]))
            operation["responses"].pop("422", None)  # FastAPI's own words for what a problem says here
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None and operation["operationId"] in BODIES:
                body["example"] = BODIES[operation["operationId"]]
            if not path.startswith("/api/v1/") or path == "/api/v1/health":
                continue
            problem = operation["responses"]["4XX"]["content"]
            operation["responses"]["429"] = {**_LIMITED, "content": problem}
            if method == "post":
                assert str(_KEY["name"]).lower() == HEADER
                operation.setdefault("parameters", []).append(_KEY)
    return schema
