"""A rollout as it happens, as Server-Sent Events.

`decision` events come from the log of decisions, each with its revision as id: whoever comes back with `Last-Event-ID` gets
every decision since, none twice. `progress` events show the rollout as it is whenever that changed; `end` says that nothing more
will come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from wherry_server import rollouts
from wherry_server.api.rollouts import Number
from wherry_server.auth import Identity, ServicesDep, Viewer, still_good
from wherry_server.rollout import FINAL
from wherry_server.services import Services
from wherry_shared.errors import RefusedError, UnreachableError

router = APIRouter(prefix="/api/v1", tags=["rollouts"])

LOOK_S = 0.5
"""A rollout that somebody follows is looked at this often."""
BEAT_S = 15.0
"""A comment at least this often, so that a dead connection shows."""
STAY_S_MAX = 3_600
STREAMS_MAX = 64
"""Streams of one process at a time: each costs a look at the database every LOOK_S."""
STREAMS_OF_ONE_MAX = 16
"""Of them, those of one token or session: whoever may look keeps nobody else from looking."""
ID_DIGITS_MAX = 15


@router.get(
    "/rollouts/{number}/events",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {}}},
        204: {"description": "Nothing more will come: do not connect again"},
        503: {"description": "Too many follow already", "content": {"application/problem+json": {}}},
    },
)
async def follow_rollout(
    number: Number,
    request: Request,
    services: ServicesDep,
    viewer: Viewer,
    last_event_id: Annotated[str, Header(max_length=40, description="id of the last event that arrived")] = "",
    seconds: Annotated[int, Query(ge=1, le=STAY_S_MAX, description="how long the stream stays open")] = STAY_S_MAX,
) -> Response:
    """Follow a rollout: its decisions and its progress as they happen, until it ends."""
    if last_event_id == "end":
        return Response(status_code=204)
    if last_event_id and not (
        last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) <= ID_DIGITS_MAX
    ):
        raise RefusedError("event_id_invalid", "Last-Event-ID is no id of this stream", next_step="connect without it")
    async with services.database.read() as connection:
        await rollouts.find(connection, services.project, number)
    open_now: list[str] = request.app.state.streams
    for count, most, whose in (
        (len(open_now), STREAMS_MAX, "here"),
        (open_now.count(viewer.id), STREAMS_OF_ONE_MAX, "by this token"),
    ):
        if count >= most:
            raise UnreachableError(
                "streams_full",
                f"{most} streams are open {whose}",
                consequence="nothing was opened",
                next_step="end one, or try again later",
            )
    return _Stream(_events(request, services, viewer, number, int(last_event_id or 0), seconds), viewer, open_now)


class _Stream(StreamingResponse):
    """A stream that counts as open while it is answered, also if who asked is gone before its first event."""

    def __init__(self, events: AsyncIterator[bytes], viewer: Identity, open_now: list[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._whose, self._open_now = viewer.id, open_now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._open_now.append(self._whose)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._open_now.remove(self._whose)


async def _events(
    request: Request, services: Services, viewer: Identity, number: int, seen: int, seconds: int
) -> AsyncIterator[bytes]:
    ends = time.monotonic() + seconds
    spoke = time.monotonic()
    last: Any = None
    yield b"retry: 1000\n\n"
    while time.monotonic() < ends and not await request.is_disconnected():
        async with services.database.read() as connection:
            if not await still_good(connection, viewer):
                return  # whoever connects again is told why
            made = await rollouts.decisions(connection, services.project, number, seen)
            found = await rollouts.show(connection, services.project, number)
        for one in made:
            seen = one["revision"]
            yield _event("decision", seen, one)
        if made:
            spoke = time.monotonic()
        if found != last:
            last, spoke = found, time.monotonic()
            yield _event("progress", seen, found)
        if found["state"] in FINAL and not found["wanted"] and not made:
            yield _event("end", "end", {"state": found["state"], "reason": found["reason"]})
            return
        if time.monotonic() - spoke > BEAT_S:
            spoke = time.monotonic()
            yield b": still here\n\n"
        await asyncio.sleep(LOOK_S)


def _event(kind: str, number: int | str, data: Any) -> bytes:
    return f"event: {kind}\nid: {number}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"
