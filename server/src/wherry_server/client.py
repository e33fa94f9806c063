"""Clients of the API: calls in, typed values out, and problems come back as the errors that the server raised.

`Client` and `AsyncClient` send the calls of `wherry_server.calls`. What failed on the way is tried again: every POST carries an
idempotency key, so that a repetition is never done twice.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from wherry_server import calls
from wherry_server.calls import Call
from wherry_shared.access import LOOPBACK, Access, problem, tls_context, unreachable
from wherry_shared.errors import RefusedError, UnreachableError

T = TypeVar("T")
TIMEOUT_S = 30.0
TRIES_MAX = 4
"""Of one call, the first included."""
PAUSE_S = 0.2
"""Mean pause before the second try; it doubles with every try, and a server's `Retry-After` is kept to instead."""
RETRY_AFTER_S_MAX = 30.0
AGAIN = frozenset({429, 502, 503, 504})
"""Answers after which the same call can succeed."""


class Event(msgspec.Struct, frozen=True):
    """An event of a stream: `decision`, `progress` or `end`."""

    kind: str
    id: str
    data: Any


def _pause_s(tries: int, answer: httpx.Response | None) -> float:
    asked = "" if answer is None else answer.headers.get("retry-after", "")
    if asked.isascii() and asked.isdigit():
        return min(float(asked), RETRY_AFTER_S_MAX)
    return float(PAUSE_S * 2 ** (tries - 1) * random.uniform(0.5, 1.5))  # noqa: S311  # no secret


def _arguments(call: Call[Any]) -> dict[str, Any]:
    headers = {"Idempotency-Key": secrets.token_urlsafe(16)} if call.method == "POST" else {}
    if call.if_match:
        headers["If-Match"] = call.if_match
    found: dict[str, Any] = {"params": dict(call.params) or None, "headers": headers}
    if call.content is not None:
        found["content"] = call.content
    elif call.body is not None:
        found["content"] = _json(call.body)
        headers["Content-Type"] = "application/json"
    return found


def _json(body: Any) -> bytes:
    """Encode what is asked.

    Raises:
        RefusedError: `request_invalid`, for what is no JSON: a number that is none, a lone half of a character.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RefusedError(
            "request_invalid",
            f"what is asked cannot be said in JSON: {error}",
            consequence="nothing was sent",
            next_step="look for numbers that are none (nan, inf)",
        ) from error


def _result(call: Call[Any], answer: httpx.Response) -> Any:
    if call.method == "HEAD":
        return answer.status_code != 404 and check(answer).is_success
    check(answer)
    if call.result is None:
        return None
    return answer.content if call.result is bytes else msgspec.json.decode(answer.content, type=call.result)


def _following(call: Call[T], answer: httpx.Response) -> Call[T] | None:
    url = answer.links.get("next", {}).get("url")
    return None if url is None else msgspec.structs.replace(call, path=url, params={})


def _entries(page: Any) -> Iterable[Any]:
    return page if isinstance(page, list) else page.devices


class _Stream:
    """Puts the lines of a stream together."""

    def __init__(self) -> None:
        self.last = ""
        self._fields: dict[str, str] = {}

    def line(self, line: str) -> Event | None:
        """Take a line and return the event that it ends."""
        if line:
            name, _, value = line.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        self.last = fields.get("id", self.last)
        return Event(fields.get("event", "message"), self.last, msgspec.json.decode(fields["data"]))

    @property
    def headers(self) -> dict[str, str]:
        """What goes on where the stream was cut."""
        self._fields = {}
        return {"Accept": "text/event-stream", **({"Last-Event-ID": self.last} if self.last else {})}


def _options(access: Access) -> dict[str, Any]:
    url = httpx.URL(access.server)
    here = url.host in LOOPBACK  # before which no proxy stands
    options: dict[str, Any] = {"base_url": access.server, "timeout": TIMEOUT_S, "trust_env": not here}
    if url.scheme == "http":  # reading the system's certificates takes longer than most calls; this context trusts none
        options["verify"] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    elif (context := tls_context(access)) is not None:
        options["verify"] = context
    return options


class Client:
    """A synchronous client of the API."""

    def __init__(self, access: Access, *, http: httpx.Client | None = None) -> None:
        self.server = access.server
        self.http = http or httpx.Client(**_options(access))
        self.http.headers["Authorization"] = f"Bearer {access.token}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()

    def send(self, call: Call[T]) -> T:
        """Make a call and return its typed answer.

        Raises:
            WherryError: what the server refused, with its code; `server_unreachable` if it did not answer.
        """
        found: T = _result(call, self._answer(call))
        return found

    def tagged(self, call: Call[T]) -> tuple[T, str]:
        """Make a call and return its typed answer with its entity tag, for a change that holds only while it is still that."""
        answer = self._answer(call)
        found: T = _result(call, answer)
        return found, answer.headers.get("etag", "")

    def plain(self, call: Call[Any]) -> Any:
        """Make a call and return its answer as plain JSON values, with whatever a newer server adds; lists are whole."""
        if call.method == "GET" and call.result not in (None, bytes):
            pages = list(self._pages(call))
            found = pages[0].json()
            for page in pages[1:]:
                more = page.json()
                if isinstance(found, list):
                    found += more
                else:
                    found = {**more, "devices": found["devices"] + more["devices"]}
            return found
        answer = check(self._answer(call))
        return answer.json() if answer.content else None

    def plain_tagged(self, call: Call[Any]) -> tuple[Any, str]:
        """Make a call whose answer has a tag, and return both, the answer as plain JSON values."""
        answer = check(self._answer(call))
        return answer.json(), answer.headers.get("etag", "")

    def pages(self, call: Call[T]) -> Iterator[T]:
        """Yield a list page by page."""
        for answer in self._pages(call):
            yield _result(call, answer)

    def each(self, call: Call[Any]) -> Iterator[Any]:
        """Yield the entries of a list, over all its pages."""
        for page in self.pages(call):
            yield from _entries(page)

    def follow(self, number: int) -> Iterator[Event]:
        """Follow a rollout until it ends, and over lost connections; no decision is missed or told twice."""
        stream, tries = _Stream(), 0
        call = calls.follow_rollout(number)
        while True:
            try:
                with self.http.stream("GET", call.path, headers=stream.headers) as answer:
                    check(answer)
                    for line in answer.iter_lines():
                        event = stream.line(line)
                        if event is not None:
                            tries = 0
                            yield event
                            if event.kind == "end":
                                return
                    if answer.status_code == 204:
                        return
            except (httpx.HTTPError, UnreachableError) as error:
                tries += 1
                if tries >= TRIES_MAX:
                    raise (unreachable(self.server, error) if isinstance(error, httpx.HTTPError) else error) from error
                time.sleep(_pause_s(tries, None))

    def _pages(self, call: Call[Any]) -> Iterator[httpx.Response]:
        following: Call[Any] | None = call
        while following is not None:
            answer = check(self._answer(following))
            yield answer
            following = _following(following, answer)

    def _answer(self, call: Call[Any]) -> httpx.Response:
        arguments = _arguments(call)
        for tries in range(1, TRIES_MAX + 1):
            answer = None
            try:
                answer = self.http.request(call.method, call.path, **arguments)
                if answer.status_code not in AGAIN or tries == TRIES_MAX:
                    return answer
            except httpx.HTTPError as error:
                if tries == TRIES_MAX or isinstance(error, httpx.UnsupportedProtocol):
                    raise unreachable(self.server, error) from error
            time.sleep(_pause_s(tries, answer))
        raise AssertionError

    def get(self, path: str, **parameters: Any) -> Any:
        """GET a path of any server and return plain JSON values; parameters that are None are left out."""
        given = {name: value for name, value in parameters.items() if value is not None}
        return self.plain(Call(method="GET", path=path, result=Any, params=given))

    def post(self, path: str, body: Any = None) -> Any:
        """POST JSON to a path of any server and return plain JSON values, None if the answer is empty."""
        return self.plain(Call(method="POST", path=path, result=Any, body={} if body is None else body))


class AsyncClient:
    """The same for event loops."""

    def __init__(self, access: Access, *, http: httpx.AsyncClient | None = None) -> None:
        self.server = access.server
        self.http = http or httpx.AsyncClient(**_options(access))
        self.http.headers["Authorization"] = f"Bearer {access.token}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Make a call and return its typed answer.

        Raises:
            WherryError: what the server refused, with its code; `server_unreachable` if it did not answer.
        """
        found: T = _result(call, await self._answer(call))
        return found

    async def tagged(self, call: Call[T]) -> tuple[T, str]:
        """Make a call and return its typed answer with its entity tag, for a change that holds only while it is still that."""
        answer = await self._answer(call)
        found: T = _result(call, answer)
        return found, answer.headers.get("etag", "")

    async def pages(self, call: Call[T]) -> AsyncIterator[T]:
        """Yield a list page by page."""
        following: Call[T] | None = call
        while following is not None:
            answer = check(await self._answer(following))
            yield _result(call, answer)
            following = _following(following, answer)

    async def each(self, call: Call[Any]) -> AsyncIterator[Any]:
        """Yield the entries of a list, over all its pages."""
        async for page in self.pages(call):
            for entry in _entries(page):
                yield entry

    async def follow(self, number: int) -> AsyncIterator[Event]:
        """Follow a rollout until it ends, and over lost connections; no decision is missed or told twice."""
        stream, tries = _Stream(), 0
        call = calls.follow_rollout(number)
        while True:
            try:
                async with self.http.stream("GET", call.path, headers=stream.headers) as answer:
                    if not answer.is_success:
                        await answer.aread()
                    check(answer)
                    async for line in answer.aiter_lines():
                        event = stream.line(line)
                        if event is not None:
                            tries = 0
                            yield event
                            if event.kind == "end":
                                return
                    if answer.status_code == 204:
                        return
            except (httpx.HTTPError, UnreachableError) as error:
                tries += 1
                if tries >= TRIES_MAX:
                    raise (unreachable(self.server, error) if isinstance(error, httpx.HTTPError) else error) from error
                await asyncio.sleep(_pause_s(tries, None))

    async def _answer(self, call: Call[Any]) -> httpx.Response:
        arguments = _arguments(call)
        for tries in range(1, TRIES_MAX + 1):
            answer = None
            try:
                answer = await self.http.request(call.method, call.path, **arguments)
                if answer.status_code not in AGAIN or tries == TRIES_MAX:
                    return answer
            except httpx.HTTPError as error:
                if tries == TRIES_MAX or isinstance(error, httpx.UnsupportedProtocol):
                    raise unreachable(self.server, error) from error
            await asyncio.sleep(_pause_s(tries, answer))
        raise AssertionError


def check(answer: httpx.Response) -> httpx.Response:
    """Return a good answer; raise what a problem says.

    Raises:
        WherryError: of the family that fits the status, with the server's own code.
    """
    if answer.is_success or answer.status_code == 304:
        return answer
    if not answer.is_stream_consumed:
        answer.read()
    raise problem(answer.status_code, answer.reason_phrase, answer.content)
