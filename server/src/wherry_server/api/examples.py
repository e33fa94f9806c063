"""Examples of answers, made from their own description: a value for each field by its name, else one of its type.

They cannot fall behind: a field that is added has an example at once, and a test holds each one to the schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEPTH_MAX = 12
"""Answers within answers; the deepest there is has five."""
_DIGEST = "sha256:" + "0" * 64
_AT = 1_795_788_705_000_000
NAMED: dict[str, Any] = {
    "action": "rollout.stage",
    "actor": "person:ann",
    "agent": "0.1.0",
    "arch": "aarch64",
    "by": "person:ann",
    "code": "sample",
    "cohort": "berlin",
    "created_by": "person:ann",
    "description": "score from which a part is thrown out",
    "device": "Jtph3nP1aV0bXy7QkD2rGA",
    "digest": _DIGEST,
    "engine": "onnxruntime 1.32.0",
    "flag": "new-threshold",
    "gate": "failure",
    "hardware_class": "aarch64/none/onnxruntime-1.32",
    "hash": "0" * 64,
    "id": "59shNmvqwU53M28o",
    "incumbent": _DIGEST,
    "kept_from": "",
    "licence": "Apache-2.0",
    "manifest": _DIGEST,
    "metric": "errors",
    "model": "file-type",
    "name": "berlin",
    "outcome": "confirmed",
    "previous_hash": "0" * 64,
    "project": "default",
    "reason": "",
    "role": "operator",
    "running": _DIGEST,
    "seal": "0" * 64,
    "selector": "label.site = berlin",
    "share": 0.25,
    "share_key": "1f3c9a2b00000000",
    "state": "running",
    "strategy": "canary",
    "subject": "1",
    "target": "file-type/1.1.0",
    "timezone": "Europe/Berlin",
    "unit": "devices",
    "url": "https://chat.example/hook",
    "variant": "float",
    "version": "1.1.0",
}
"""Values of fields, by name; a time is told by the end of its name."""
OWN: dict[str, Any] = {
    "DeviceDetail.id": "Jtph3nP1aV0bXy7QkD2rGA",
    "DeviceDetail.name": "bench-1",
    "DeviceDetail.state": "active",
    "DeviceSummary.id": "Jtph3nP1aV0bXy7QkD2rGA",
    "DeviceSummary.name": "bench-1",
    "DeviceSummary.state": "active",
    "FlagShown.name": "new-threshold",
    "RolloutDetail.models": [{"model": "file-type", "version": "1.1.0"}],
    "RolloutSummary.models": [{"model": "file-type", "version": "1.1.0"}],
    "TokenSummary.name": "ci",
    "WebhookShown.name": "chat",
}
"""The same of a field of one answer, where its name alone says something else."""
_OF_TYPE: Mapping[str, Any] = {"string": "", "integer": 1, "number": 0.5, "boolean": False, "null": None}
_PYTHON: Mapping[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float)}


def example_of(schema: Mapping[str, Any], parts: Mapping[str, Any], name: str = "", depth: int = 0) -> Any:
    """Return an example of what a schema describes.

    Args:
        schema: of a field, or of a whole answer.
        parts: the schemas that it may refer to, by name.
        name: of the field.
        depth: how far inside of the answer it is.

    Raises:
        RecursionError: the schema describes itself.
    """
    if depth > DEPTH_MAX:
        raise RecursionError(f"{name} has no end")
    if "$ref" in schema:
        owner = schema["$ref"].rsplit("/", 1)[-1]
        found = example_of(parts[owner], parts, name, depth + 1)
        own = (
            {field: OWN[f"{owner}.{field}"] for field in found if f"{owner}.{field}" in OWN}
            if isinstance(found, dict)
            else {}
        )
        return {**found, **own} if own else found
    if "const" in schema or "enum" in schema:
        allowed = schema.get("enum") or [schema["const"]]
        return NAMED[name] if NAMED.get(name) in allowed else allowed[0]
    either = schema.get("anyOf") or schema.get("oneOf")
    if either:
        told = [one for one in either if one.get("type") != "null"]
        return example_of(told[0], parts, name, depth + 1)
    kind = schema.get("type")
    if kind == "array":
        return [example_of(schema.get("items", {}), parts, name.removesuffix("s"), depth + 1)]
    if kind == "object" or "properties" in schema:
        fields = schema.get("properties", {})
        return {field: example_of(one, parts, field, depth + 1) for field, one in fields.items()}
    if kind == "integer" and (name == "at" or name.endswith("_at")):
        return _AT
    if name in NAMED and isinstance(NAMED[name], _PYTHON.get(str(kind), ())):
        return NAMED[name]
    return {} if kind is None else max(_OF_TYPE[kind], schema["minimum"]) if "minimum" in schema else _OF_TYPE[kind]
