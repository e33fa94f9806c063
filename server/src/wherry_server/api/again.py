"""A create that is repeated is answered and not done twice; a request that lost against another transaction is run again.

PostgreSQL asks whoever uses `REPEATABLE READ` to run what it could not serialize again. Nothing of a lost transaction was kept, so
the request happens once. Only where its body is read whole: FastAPI keeps that, and what was streamed into a file is gone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from sqlalchemy.exc import DBAPIError

from wherry_server import idempotency
from wherry_server.db.database import lost

TRIES_MAX = 8
"""Of one request; then it is told that the database is busy."""
PAUSE_S_MAX = 0.05
"""Longest pause before the second try, at random so that the losers do not meet again; it doubles with every try."""


class Again(APIRoute):
    """A route whose handler runs again if its transaction lost."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler that FastAPI calls."""
        once = super().get_route_handler()

        async def again(request: Request) -> Response:
            for number in range(1, TRIES_MAX):
                try:
                    return await once(request)
                except DBAPIError as error:
                    if not lost(error):
                        raise
                await asyncio.sleep(random.uniform(0, PAUSE_S_MAX * 2 ** (number - 1)))  # noqa: S311 - no secret
            return await once(request)

        async def handle(request: Request) -> Response:
            if request.method == "POST" and idempotency.HEADER in request.headers:
                return await idempotency.keep(request, again)
            return await again(request)

        return handle
