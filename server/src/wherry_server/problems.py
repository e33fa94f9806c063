"""The border between `WherryError` and HTTP: RFC 9457 problem details, with one status for each code.

A module that raises a new code which is not plain 422 adds its row to `STATUS`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from wherry_server.db.database import DATABASE_ERRORS, transient
from wherry_server.rates import TooManyError
from wherry_shared.errors import RefusedError, UnreachableError, WherryError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

STATUS: dict[str, int] = {
    # who asks
    "unauthenticated": 401,
    "token_expired": 401,
    "role_missing": 403,
    "scope_missing": 403,
    "csrf_missing": 403,
    "login_refused": 403,
    "login_without_role": 403,
    "login_insecure": 403,
    "device_revoked": 403,
    "enrolment_refused": 403,
    "certificate_lapsed": 403,
    "certificate_invalid": 401,
    "certificate_missing": 401,
    # what is asked for
    "blob_unknown": 404,
    "bundle_unknown": 404,
    "model_unknown": 404,
    "device_unknown": 404,
    "cohort_unknown": 404,
    "rollout_unknown": 404,
    "flag_unknown": 404,
    "metadata_unknown": 404,
    "role_unknown": 404,
    "publisher_unknown": 404,
    "proposal_unknown": 404,
    "token_unknown": 404,
    "wheel_unknown": 404,
    "retirement_unknown": 404,
    "request_unknown": 404,
    "session_unknown": 404,
    "login_off": 404,
    "webhook_unknown": 404,
    "delivery_unknown": 404,
    # what stands against it
    "version_taken": 409,
    "name_taken": 409,
    "key_taken": 409,
    "device_cloned": 409,
    "requests_full": 409,
    "name_ambiguous": 409,
    "bin_proposed": 409,
    "publisher_taken": 409,
    "publisher_unsigned": 409,
    "model_taken": 409,
    "bins_exhausted": 409,
    "ceremony_needed": 409,
    "rollout_state": 409,
    "rollout_conflict": 409,
    "flag_in_use": 409,
    "conflict": 409,
    "idempotency_conflict": 409,
    "idempotency_pending": 409,
    "bin_changed": 412,
    "cohort_changed": 412,
    "device_changed": 412,
    "token_changed": 412,
    "webhook_changed": 412,
    "flag_changed": 412,
    "rollout_changed": 412,
    "body_too_large": 413,
    "range_invalid": 416,
    "precondition_missing": 428,
    "rate_limited": 429,
    "certificates_too_many": 429,
    # shapes
    "request_invalid": 422,
}
"""HTTP status by code. What is not listed: 422 refused, 503 unreachable, 507 this machine cannot."""


HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""What every answer says to browsers, unless it says otherwise itself."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "stable; compare this"},
        "consequence": {"type": "string"},
        "next_step": {"type": "string"},
    },
}


def status_of(error: WherryError) -> int:
    """Return the HTTP status under which an error travels."""
    found = STATUS.get(error.code)
    if found is not None:
        return found
    if isinstance(error, RefusedError):
        return 422
    return 503 if isinstance(error, UnreachableError) else 507


def problem(error: WherryError) -> Response:
    """Return the answer for an error."""
    status = status_of(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(error, TooManyError):
        headers["Retry-After"] = str(error.retry_after_s)
    return _answer(
        status, error.code, error.message, consequence=error.consequence, next_step=error.next_step, headers=headers
    )


def _answer(
    status: int,
    code: str,
    detail: str,
    *,
    consequence: str = "",
    next_step: str = "",
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "consequence": consequence,
        "next_step": next_step,
    }
    return JSONResponse(body, status, headers=headers, media_type=MEDIA_TYPE)


async def _wherry(_request: Request, error: Exception) -> Response:
    assert isinstance(error, WherryError)
    return problem(error)


async def _http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, WherryError):  # FastAPI wraps what reading a body raises
        return problem(error.__cause__)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "request_invalid")
    return _answer(error.status_code, code, str(error.detail), headers=error.headers)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    places = [f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}" for found in error.errors()]
    return _answer(
        422,
        "request_invalid",
        "; ".join(places[:10]),
        consequence="nothing was changed",
        next_step="see /docs for the shapes",
    )


async def _collided(_request: Request, error: Exception) -> Response:
    log.info("two changes collided: %s", error)
    return _answer(
        409,
        "conflict",
        "another change of the same thing came first",
        consequence="nothing was changed",
        next_step="look at what is there now, then try again",
    )


async def _busy(_request: Request, error: Exception) -> Response:
    log.warning("the database did not answer: %s", error)
    return _answer(
        503,
        "database_busy",
        "the database did not answer in time",
        consequence="nothing was changed",
        next_step="try again",
        headers={"Retry-After": "5"},
    )


async def _database(request: Request, error: Exception) -> Response:
    """The database could not, or it was asked what it cannot do."""
    return await (_busy if transient(error) else _failed)(request, error)


async def _failed(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(
        500,
        "server_failed",
        "the server failed at this request",
        consequence="it may or may not have been carried out",
        next_step="look into the server's log",
        headers=HEADERS,  # beyond all layers: nothing else adds them
    )


Handler = Callable[[Request, Exception], Awaitable[Response]]


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem."""
    handlers: dict[type[Exception], Handler] = {
        WherryError: _wherry,
        HTTPException: _http,
        RequestValidationError: _invalid,
        IntegrityError: _collided,
        **{kind: _database for kind in DATABASE_ERRORS if kind is not OSError},
        ConnectionError: _database,  # other OSErrors are of the disk under the blobs
        Exception: _failed,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
