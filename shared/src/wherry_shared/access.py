"""How commands on a workstation reach a server: where it is, how to be let in, and what its refusals mean.

One home for the operator's client and the publisher's, so that `wherry` and `wherry-optimizer sign` find the same server
and understand the same answers.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import msgspec

from wherry_shared.errors import DeviceError, RefusedError, UnreachableError, WherryError

DEFAULT_DATA = Path("~/.local/share/wherry/dev")
"""Where `wherry dev` keeps its data unless told otherwise."""
CLIENT_FILE = "client.json"
LOGIN_FILE = Path("~/.config/wherry/login.json")
"""What `wherry login` keeps: as `client.json`, of the person who logged in."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
"""Hosts before which no proxy stands, whatever the environment says."""


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server is and how to be let in: the content of `client.json`, which `wherry dev` writes."""

    server: str
    token: str
    ca: str = ""
    """Certificate (PEM) of the authority that signed for the server; empty: those of the system."""


def tls_context(access: Access) -> ssl.SSLContext | None:
    """Return what to check the server's certificate with, None for the system's own way."""
    return ssl.create_default_context(cadata=access.ca) if access.ca else None


def find_access(server: str | None = None, token: str | None = None, data: Path | None = None) -> Access:
    """Put together address and token: arguments, then WHERRY_SERVER, WHERRY_TOKEN and WHERRY_CA, then a file.

    The file is the `client.json` of `data` or of WHERRY_DATA where one of them is named; else what `wherry login` kept, else the
    `client.json` of the default data folder.

    Raises:
        RefusedError: `access_missing` or `client_file_invalid`.
    """
    server = server or os.environ.get("WHERRY_SERVER")
    token = token or os.environ.get("WHERRY_TOKEN")
    ca = _read_ca(os.environ.get("WHERRY_CA", ""))
    if not server or not token:
        file = _saved(data)
        if file.exists():
            try:
                saved = msgspec.json.decode(file.read_bytes(), type=Access)
            except msgspec.DecodeError as error:
                raise RefusedError(
                    "client_file_invalid", f"{file}: {error}", next_step="start wherry dev again, it writes the file"
                ) from error
            if not server or server.rstrip("/") == saved.server.rstrip("/"):  # its token is for its server only
                server, token, ca = saved.server, token or saved.token, ca or saved.ca
    if not server or not token:
        raise RefusedError(
            "access_missing",
            f"no {'token' if server else 'server'} given",
            consequence="nothing was asked",
            next_step="start wherry dev on this machine, or give --server and --token (WHERRY_SERVER, WHERRY_TOKEN)",
        )
    return Access(server=server.rstrip("/"), token=token, ca=ca)


def _read_ca(name: str) -> str:
    try:
        return Path(name).expanduser().read_text() if name else ""
    except OSError as error:
        raise RefusedError(
            "access_missing", f"WHERRY_CA: {error}", next_step="name a file with a certificate"
        ) from error


def _saved(data: Path | None) -> Path:
    named = data or os.environ.get("WHERRY_DATA")
    login = LOGIN_FILE.expanduser()
    if not named and login.exists():
        return login
    return Path(named or DEFAULT_DATA).expanduser() / CLIENT_FILE


def unreachable(server: str, error: Exception) -> UnreachableError:
    """Return what it means that a server did not answer."""
    return UnreachableError(
        "server_unreachable",
        f"{server} does not answer: {error or type(error).__name__}",
        consequence="nothing is known about this request",
        next_step="start the server (wherry dev), or check --server",
    )


def problem(status: int, phrase: str, body: bytes) -> WherryError:
    """Return the error that a refusal stands for: of the family that fits the status, with the server's own code.

    Args:
        status: of the answer.
        phrase: its reason phrase, said where the body says nothing.
        body: RFC 9457 problem details; anything else (a proxy's page, perhaps) leaves only the status to go by.
    """
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = None
    if not isinstance(said, dict):
        said = {}
    kind: type[WherryError] = RefusedError
    if status in (429, 500, 502, 503, 504):
        kind = UnreachableError
    elif status == 507:
        kind = DeviceError
    return kind(
        str(said.get("code") or f"http_{status}"),
        str(said.get("detail") or f"the server answered {status} {phrase}"),
        consequence=str(said.get("consequence") or ""),
        next_step=str(said.get("next_step") or ""),
    )
