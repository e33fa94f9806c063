"""Feature flags over HTTP: the OpenFeature Remote Evaluation Protocol (OFREP), from request to response.

    POST /ofrep/v1/evaluate/flags/KEY   one flag
    POST /ofrep/v1/evaluate/flags       all of them; with an ETag, and 304 while nothing changed
    GET  /ofrep/v1/configuration        what a provider may expect

Targeting is done by the server: what this device was given is its answer for every evaluation context, so the reason is
always STATIC. Contexts are checked as the protocol asks and otherwise ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from wherry_agent.serving.http import Request, Response
from wherry_shared import flags as device_flags

VARIANT = "assigned"
"""The one variant that a device has of each flag; clients expect the field."""
POLL_MIN_MS = 1000

_encoder = msgspec.json.Encoder(order="deterministic")
_CONFIGURATION = {
    "name": "wherry",
    "capabilities": {
        "cacheInvalidation": {"polling": {"enabled": True, "minPollingIntervalMs": POLL_MIN_MS}},
        "flagEvaluation": {"supportedTypes": ["boolean", "int", "float", "string", "object"]},
    },
}


class Flags:
    """The flags that this worker was told last; requests read one reference and no lock."""

    def __init__(self) -> None:
        self._all: Mapping[str, Any] = {}
        self._tag = _tag(b"{}")

    def set(self, flags: Mapping[str, Any]) -> None:
        """Replace all flags."""
        self._all, self._tag = dict(flags), _tag(device_flags.encode(flags))

    def respond(self, path: tuple[str, ...], request: Request) -> Response:
        """Answer a request for `/ofrep/` + `path`; every refusal is a response with an `errorCode`."""
        match path:
            case ("v1", "evaluate", "flags", key) if key:
                return _wrong_method(request, "POST") or self._one(key, request)
            case ("v1", "evaluate", "flags"):
                return _wrong_method(request, "POST") or self._bulk(request)
            case ("v1", "configuration"):
                return _wrong_method(request, "GET") or _tagged(request, _CONFIGURATION, _tag(b"configuration 1"))
        return _json(404, {"errorDetails": "no such path; see /ofrep/v1/evaluate/flags and /ofrep/v1/configuration"})

    def _one(self, key: str, request: Request) -> Response:
        trouble = _trouble(bytes(request.body))
        if trouble is not None:
            return _json(400, {"key": key, **trouble})
        flags = self._all
        if key not in flags:
            details = f"this device has no flag {key[:80]!r}"
            return _json(404, {"key": key, "errorCode": "FLAG_NOT_FOUND", "errorDetails": details})
        return _json(200, _evaluated(key, flags[key]))

    def _bulk(self, request: Request) -> Response:
        trouble = _trouble(bytes(request.body))
        if trouble is not None:
            return _json(400, trouble)
        flags, tag = self._all, self._tag
        return _tagged(request, {"flags": [_evaluated(key, flags[key]) for key in sorted(flags)]}, tag)


def _evaluated(key: str, value: Any) -> dict[str, Any]:
    return {"key": key, "value": value, "reason": "STATIC", "variant": VARIANT, "metadata": {}}


def _trouble(body: bytes) -> dict[str, str] | None:
    """Say what is wrong with an evaluation request; an empty body asks without a context."""
    if not body.strip():
        return None
    try:
        asked = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return {"errorCode": "PARSE_ERROR", "errorDetails": f"not JSON: {error}"}
    if not isinstance(asked, dict):
        return {"errorCode": "PARSE_ERROR", "errorDetails": "an evaluation request is an object with a context"}
    context = asked.get("context")
    if context is not None and not isinstance(context, dict):
        return {"errorCode": "INVALID_CONTEXT", "errorDetails": "context is an object"}
    return None


def _tag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _tagged(request: Request, value: Any, tag: str) -> Response:
    known = [item.strip().removeprefix("W/") for item in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(304, b"", {"ETag": tag})
    return _json(200, value, {"ETag": tag})


def _wrong_method(request: Request, allowed: str) -> Response | None:
    if request.method == allowed or (request.method, allowed) == ("HEAD", "GET"):
        return None
    return _json(405, {"errorCode": "GENERAL", "errorDetails": f"use {allowed}"}, {"Allow": allowed})


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(status, _encoder.encode(value), headers or {})
