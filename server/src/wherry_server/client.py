"""The operator's client: HTTP calls in, values out, and problems come back as the errors that the server raised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from wherry_shared.access import LOOPBACK, Access, problem, unreachable

TIMEOUT_S = 30.0


class Client:
    """A synchronous client of the API."""

    def __init__(self, access: Access, *, http: httpx.Client | None = None) -> None:
        self.server = access.server
        here = httpx.URL(access.server).host in LOOPBACK
        self.http = http or httpx.Client(base_url=access.server, timeout=TIMEOUT_S, trust_env=not here)  # no proxy
        self.http.headers["Authorization"] = f"Bearer {access.token}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """GET and return the decoded JSON; parameters that are None are left out."""
        found = {name: value for name, value in parameters.items() if value is not None}
        return self.call("GET", path, params=found).json()

    def post(self, path: str, body: Any = None) -> Any:
        """POST JSON and return the decoded answer, None if it is empty."""
        answer = self.call("POST", path, json={} if body is None else body)
        return answer.json() if answer.content else None

    def put(self, path: str, body: Any) -> Any:
        """PUT JSON and return the decoded answer, None if it is empty."""
        answer = self.call("PUT", path, json=body)
        return answer.json() if answer.content else None

    def delete(self, path: str) -> None:
        """DELETE."""
        self.call("DELETE", path)

    def has(self, path: str) -> bool:
        """HEAD: tell whether something is there."""
        answer = self._send("HEAD", path)
        if answer.status_code == 404:
            return False
        return check(answer).is_success

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        content: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Make one call and return its answer.

        Raises:
            WherryError: what the server refused, with its code; `server_unreachable` if it did not answer.
        """
        return check(self._send(method, path, params=params, json=json, content=content, headers=headers))

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self.http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise unreachable(self.server, error) from error


def check(answer: httpx.Response) -> httpx.Response:
    """Return a good answer; raise what a problem says.

    Raises:
        WherryError: of the family that fits the status, with the server's own code.
    """
    if answer.is_success or answer.status_code == 304:
        return answer
    answer.read()
    raise problem(answer.status_code, answer.reason_phrase, answer.content)
