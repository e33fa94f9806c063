"""The operator's client: HTTP calls in, values out, and problems come back as the errors that the server raised."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from wherry_server.settings import DEFAULT_DATA
from wherry_shared.errors import DeviceError, RefusedError, UnreachableError, WherryError
from wherry_shared.publishing_remote import LOOPBACK

TIMEOUT_S = 30.0
CLIENT_FILE = "client.json"


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server is and how to be let in: the content of `client.json`."""

    server: str
    token: str


def find_access(server: str | None = None, token: str | None = None, data: Path | None = None) -> Access:
    """Put together address and token: arguments, then WHERRY_SERVER and WHERRY_TOKEN, then `client.json`.

    The file is read from `data`, from WHERRY_DATA or from the default data folder, whichever is named first.

    Raises:
        RefusedError: `access_missing` or `client_file_invalid`.
    """
    server = server or os.environ.get("WHERRY_SERVER")
    token = token or os.environ.get("WHERRY_TOKEN")
    if server is None or token is None:
        folder = data or Path(os.environ.get("WHERRY_DATA") or DEFAULT_DATA)
        file = folder.expanduser() / CLIENT_FILE
        if file.exists():
            try:
                saved = msgspec.json.decode(file.read_bytes(), type=Access)
            except msgspec.DecodeError as error:
                raise RefusedError(
                    "client_file_invalid", f"{file}: {error}", next_step="start wherry dev again, it writes the file"
                ) from error
            if server is None or server.rstrip("/") == saved.server.rstrip("/"):  # its token is for its server only
                server, token = saved.server, token or saved.token
    if server is None or token is None:
        raise RefusedError(
            "access_missing",
            f"no {'server' if server is None else 'token'} given",
            consequence="nothing was asked",
            next_step="start wherry dev on this machine, or give --server and --token (WHERRY_SERVER, WHERRY_TOKEN)",
        )
    return Access(server=server.rstrip("/"), token=token)


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
            raise UnreachableError(
                "server_unreachable",
                f"{self.server} does not answer: {error or type(error).__name__}",
                consequence="nothing is known about this request",
                next_step="start the server (wherry dev), or check --server",
            ) from error


def check(answer: httpx.Response) -> httpx.Response:
    """Return a good answer; raise what a problem says.

    Raises:
        WherryError: of the family that fits the status, with the server's own code.
    """
    if answer.is_success or answer.status_code == 304:
        return answer
    answer.read()
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    status = answer.status_code
    kind: type[WherryError] = RefusedError
    if status in (429, 500, 502, 503, 504):
        kind = UnreachableError
    elif status == 507:
        kind = DeviceError
    raise kind(
        str(problem.get("code") or f"http_{status}"),
        str(problem.get("detail") or f"the server answered {status} {answer.reason_phrase}"),
        consequence=str(problem.get("consequence") or ""),
        next_step=str(problem.get("next_step") or ""),
    )
