"""A create that is sent again with its key is answered as the first time, and not done again.

The key is reserved before the work and the answer stored after it. What is stored opens nothing: the key is kept as a hash,
and the answer, which may hold a new token, is sealed with a secret of the server and the key itself. If the server went down
in between, the reservation stands and says so: nobody can know whether the work was done.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from wherry_server.auth import get_services, identify
from wherry_server.db.tables import Idempotency, table
from wherry_server.times import now_us
from wherry_shared.errors import RefusedError, WherryError

HEADER = "idempotency-key"
KEPT_US = 24 * 3_600 * 1_000_000
"""How long an answer can be had again."""
NONCE_BYTES = 12
_KEY = re.compile(r"[\x21-\x7e]{1,128}")
_ROWS = table(Idempotency)


async def keep(request: Request, work: Callable[[Request], Awaitable[Response]]) -> Response:
    """Do `work` once for the key of a request, and return the answer of that time whenever it is sent again.

    Raises:
        RefusedError: `idempotency_key_invalid`; `idempotency_conflict`, if the key came with another request;
            `idempotency_pending`, if the first request has not ended, or its end was lost.
    """
    services = get_services(request)
    identity = await identify(request, services)
    key = request.headers[HEADER]
    if _KEY.fullmatch(key) is None:
        raise RefusedError(
            "idempotency_key_invalid",
            "an Idempotency-Key is 1 to 128 visible ASCII characters",
            consequence="nothing was done",
        )
    asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode() + await request.body()
    fingerprint = hashlib.sha256(asked).hexdigest()
    name = hashlib.sha256(f"{identity.id}\n{key}".encode()).hexdigest()
    seal = AESGCM(hmac.digest(services.master_key, b"idempotency\n" + name.encode() + key.encode(), "sha256"))
    now = now_us()
    here = (_ROWS.c.project_id == services.project, _ROWS.c.key_hash == name)
    try:
        async with services.database.write() as connection:
            await connection.execute(delete(_ROWS).where(_ROWS.c.created_at < now - KEPT_US))
            await connection.execute(
                insert(_ROWS).values(
                    project_id=services.project,
                    key_hash=name,
                    fingerprint=fingerprint,
                    status=0,
                    answer=b"",
                    created_at=now,
                )
            )
    except IntegrityError:
        async with services.database.read() as connection:
            row = (await connection.execute(select(_ROWS).where(*here))).one_or_none()
        return _replay(row, fingerprint, seal)
    try:
        answer = await work(request)
    except (WherryError, HTTPException, RequestValidationError):  # refused: the key is free for a better request
        async with services.database.write() as connection:
            await connection.execute(delete(_ROWS).where(*here))
        raise
    nonce = secrets.token_bytes(NONCE_BYTES)
    async with services.database.write() as connection:
        await connection.execute(
            update(_ROWS)
            .where(*here)
            .values(status=answer.status_code, answer=nonce + seal.encrypt(nonce, bytes(answer.body), None))
        )
    return answer


def _replay(row: object, fingerprint: str, seal: AESGCM) -> Response:
    if row is not None and getattr(row, "fingerprint", "") != fingerprint:
        raise RefusedError(
            "idempotency_conflict",
            "this Idempotency-Key came with another request",
            consequence="nothing was done",
            next_step="use a new key for a new request",
        )
    status = int(getattr(row, "status", 0))
    if not status:
        raise RefusedError(
            "idempotency_pending",
            "the first request with this Idempotency-Key has not ended, or its end was lost",
            consequence="nothing was done now",
            next_step="look whether it was done; after that, use a new key",
        )
    sealed: bytes = getattr(row, "answer", b"")
    body = seal.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
    return Response(body, status, media_type="application/json", headers={"Idempotent-Replayed": "true"})
