"""The server as a publisher sees it: one method per call of `docs/formats/protocol.md`, section Publishing.

The server is not trusted here: what it says about bins is checked by `publishing` with the publisher's own key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import httpx
import msgspec

from wherry_shared.access import LOOPBACK, Access, find_access, problem, tls_context, unreachable
from wherry_shared.errors import RefusedError
from wherry_shared.wire import SealedKey

TIMEOUT_S = 60.0
ANSWER_BYTES_MAX = 16 * 1024 * 1024


class _PublisherState(msgspec.Struct, frozen=True):
    """What the server says about a publisher: a hint where to look, checked against signatures."""

    name: str
    models: list[str]
    threshold: int
    keyids: list[str]
    bits: int
    version: int
    bins: dict[str, int]
    unsigned: list[str] = []
    """Roles that its present keys have not signed, since former ones did."""
    proposed: list[str] = []
    """Roles for which something waits for signatures."""


class State(msgspec.Struct, frozen=True):
    """The public state of a project's trust, as far as publishers need it."""

    root_digest: str
    publishers: list[_PublisherState]
    development: bool = False
    """Whether root or targets are signed on the server's own machine."""


class _Offline(msgspec.Struct, frozen=True):
    roots: list[str]
    targets: str


class _Answer(NamedTuple):
    """An answer, read whole within bounds."""

    status: int
    reason: str
    headers: httpx.Headers
    body: bytes


class Remote:
    """Calls on one server with one token."""

    def __init__(self, server: str, token: str, *, ca: str = "", http: httpx.Client | None = None) -> None:
        self.server = server.rstrip("/")
        here = httpx.URL(self.server).host in LOOPBACK
        context = tls_context(Access(server=server, token=token, ca=ca))
        self._http = http or httpx.Client(
            base_url=self.server, timeout=TIMEOUT_S, trust_env=not here, verify=True if context is None else context
        )  # no proxy before a loopback address
        self._headers = {"Authorization": f"Bearer {token}"}

    @classmethod
    def find(cls, server: str | None = None, token: str | None = None, data: Path | None = None) -> Remote:
        """Connect with what is given, else WHERRY_SERVER and WHERRY_TOKEN, else the `client.json` of `wherry dev`.

        Raises:
            RefusedError: `access_missing` or `client_file_invalid`.
        """
        access = find_access(server, token, data)
        return cls(access.server, access.token, ca=access.ca)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def state(self) -> State:
        """Return the public state of trust."""
        answer = self._call("GET", "/api/v1/trust")
        try:
            return msgspec.json.decode(answer.body, type=State)
        except msgspec.DecodeError as error:
            raise RefusedError(
                "answer_invalid",
                f"{self.server} does not speak this protocol: {error}",
                consequence="nothing was sent",
                next_step="check that --server is the address of a Wherry server of this release, with no proxy that changes answers",
            ) from error

    def register(self, name: str, public_key_pem: str, models: list[str]) -> None:
        """Have a publisher delegated, where the server can do it at once.

        Raises:
            RefusedError: `ceremony_needed`, `publisher_taken`, `model_taken`, …
        """
        body = {"name": name, "public_key_pem": public_key_pem, "models": models}
        self._call("POST", "/api/v1/trust/publishers", json=body)

    def bin(self, target: str) -> tuple[str, int, bytes]:
        """Return (role, version, bytes) of the bin of a target."""
        return self._role(self._call("GET", "/api/v1/trust/bins", params={"target": target}))

    def role(self, role: str) -> tuple[str, int, bytes]:
        """Return (role, version, bytes) of a bin or publisher role."""
        return self._role(self._call("GET", f"/api/v1/trust/bins/{quote(role, safe='')}"))

    def put(self, role: str, data: bytes, replaces: int) -> str:
        """Submit the next version of a role; `accepted` or `proposed`.

        Raises:
            RefusedError: `bin_changed`, if the server is at another version than `replaces`, and other refusals.
        """
        headers = {"If-Match": f'"{replaces}"', "Content-Type": "application/json"}
        answer = self._call("PUT", f"/api/v1/trust/bins/{quote(role, safe='')}", content=data, headers=headers)
        return "proposed" if answer.status == 202 else "accepted"

    def proposal(self, role: str) -> bytes | None:
        """Return what stands as proposed for a role, if anything does."""
        try:
            return self._call("GET", f"/api/v1/trust/proposals/{quote(role, safe='')}").body
        except RefusedError as error:
            if error.code == "proposal_unknown":
                return None
            raise

    def offline(self) -> tuple[list[bytes], bytes]:
        """Return every root from the first, and the targets metadata."""
        answer = self._call("GET", "/api/v1/trust/offline")
        try:
            found = msgspec.json.decode(answer.body, type=_Offline)
        except msgspec.DecodeError as error:
            raise RefusedError("answer_invalid", f"{self.server} does not speak this protocol: {error}") from error
        return [root.encode() for root in found.roots], found.targets.encode()

    def has_blob(self, digest: str) -> bool:
        """Tell whether the server holds a blob."""
        answer = self._send("HEAD", f"/api/v1/blobs/{digest}")
        if answer.status == 404:
            return False
        self._check(answer)
        return True

    def put_blob(self, digest: str, chunks: Iterator[bytes], length: int) -> None:
        """Upload a blob.

        Raises:
            RefusedError: `digest_mismatch`, `length_mismatch`, …; then the server kept nothing.
        """
        headers = {"Content-Length": str(length), "Content-Type": "application/octet-stream"}
        self._call("PUT", f"/api/v1/blobs/{digest}", content=chunks, headers=headers)

    def add_bundle(self, model: str, version: str, manifest: str, keys: Sequence[SealedKey] = ()) -> Any:
        """Have the server take a bundle whose blobs and signed bin it holds, with the sealed content keys of what is encrypted.

        Raises:
            RefusedError: `unsigned`, `blob_missing`, `version_taken`, `content_keys_missing`, …
        """
        body: dict[str, Any] = {"model": model, "version": version, "manifest": manifest}
        if keys:  # which an older server does not know
            body["keys"] = [msgspec.to_builtins(key) for key in keys]
        return msgspec.json.decode(self._call("POST", "/api/v1/bundles", json=body).body)

    def _role(self, answer: _Answer) -> tuple[str, int, bytes]:
        version = answer.headers.get("ETag", "").strip('"')
        role = answer.headers.get("Wherry-Role", "")
        if not version.isdigit() or not role:
            raise RefusedError(
                "answer_invalid",
                f"{self.server} did not say which version of which role it sent",
                consequence="nothing was sent",
                next_step="check that --server is the address of a Wherry server of this release, with no proxy that changes answers",
            )
        return role, int(version), answer.body

    def _call(self, method: str, path: str, **arguments: Any) -> _Answer:
        return self._check(self._send(method, path, **arguments))

    def _send(self, method: str, path: str, **arguments: Any) -> _Answer:
        headers = {**self._headers, **arguments.pop("headers", {})}
        try:
            with self._http.stream(method, path, headers=headers, **arguments) as answer:
                body = bytearray()
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > ANSWER_BYTES_MAX:
                        raise RefusedError(
                            "answer_invalid",
                            f"{self.server} answered more than {ANSWER_BYTES_MAX} bytes",
                            consequence="nothing was sent",
                            next_step="check that --server is the address of a Wherry server of this release, with no proxy that changes answers",
                        )
                return _Answer(answer.status_code, answer.reason_phrase, answer.headers, bytes(body))
        except httpx.HTTPError as error:
            raise unreachable(self.server, error) from error

    @staticmethod
    def _check(answer: _Answer) -> _Answer:
        if answer.status < 300:
            return answer
        raise problem(answer.status, answer.reason, answer.body)
