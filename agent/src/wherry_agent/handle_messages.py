"""What an application's handle and the supervisor say to each other: JSON lines over the supervisor's unix socket.

Level-triggered like everything else: an `Assign` is the whole state of one model, and a handle that missed ten of them
is right after the eleventh.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from wherry_agent.children import ArmStats, ServeModel
from wherry_shared.bundle import Contract
from wherry_shared.errors import RefusedError

FORMAT = 1
LINE_BYTES_MAX = 1 << 20
"""One message; interfaces with label lists are the bulk of it."""

SOCKET_VARIABLE = "WHERRY_HANDLE_SOCKET"
SOCKET_DEFAULT = "/var/lib/wherry/run/handle.sock"

Isolation = Literal["worker", "inline"]


def socket_path(given: str | Path | None) -> str:
    """Return the supervisor's socket: the one given, else `$WHERRY_HANDLE_SOCKET`, else that of the default home."""
    return str(given or os.environ.get(SOCKET_VARIABLE) or SOCKET_DEFAULT)


class _Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base, tagged by `kind`."""


class Hi(_Message, tag="hi", frozen=True, kw_only=True):
    """The first line of a handle."""

    format: int
    model: str
    pid: int
    isolation: Isolation = "worker"
    contract: Contract | None = None
    """What the application relies on of the model."""


class WatchFlags(_Message, tag="watch_flags", frozen=True, kw_only=True):
    """The first line of a process that wants the device's feature flags, now and whenever they change."""

    format: int
    pid: int


class Flags(_Message, tag="flags", frozen=True, kw_only=True):
    """All feature flags of this device."""

    revision: int
    flags: dict[str, Any] = {}


class Assign(_Message, tag="assign", frozen=True, kw_only=True):
    """What the handle should serve; `serve` None: this device has no such model (yet)."""

    revision: int
    serve: ServeModel | None = None
    worker_socket: str = ""
    """Unix socket on which the worker answers, for candidates that are kept out of the application."""


class Engaged(_Message, tag="engaged", frozen=True, kw_only=True):
    """The handle acted on an `Assign`: this is what it holds in memory now, and whether it is what was asked for."""

    revision: int
    digest: str = ""
    """Of the variant that answers."""
    in_process: bool = False
    holds: list[str] = []
    """Digests whose files must stay on disk."""
    ok: bool = True
    reason: str = ""
    detail: str = ""


class Counts(_Message, tag="counts", frozen=True, kw_only=True):
    """Counters of this handle, cumulative since it connected; once a second when something changed."""

    arms: list[ArmStats]


class BadReport(_Message, tag="bad", frozen=True, kw_only=True):
    """The application's own verdict: one answer of this version is so wrong that it has to go.

    Lesser ones are counted in `ArmStats.rejected`.
    """

    digest: str
    trial: str = ""
    reason: str = ""


class Bye(_Message, tag="bye", frozen=True, kw_only=True):
    """Said before closing: an end of file without it, while on a candidate, is a crash."""


class Refusal(_Message, tag="refusal", frozen=True, kw_only=True):
    """The supervisor does not talk to this peer."""

    code: str
    message: str


FromHandle = Hi | WatchFlags | Engaged | Counts | BadReport | Bye
ToHandle = Assign | Flags | Refusal

_encoder = msgspec.json.Encoder()
_from_handle: msgspec.json.Decoder[FromHandle] = msgspec.json.Decoder(FromHandle)
_to_handle: msgspec.json.Decoder[ToHandle] = msgspec.json.Decoder(ToHandle)


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as one line."""
    return _encoder.encode(message) + b"\n"


def parse_from_handle(line: bytes) -> FromHandle:
    """Parse a line that an application sent.

    Raises:
        RefusedError: `message_invalid`.
    """
    try:
        return _from_handle.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(error) from error


def parse_to_handle(line: bytes) -> ToHandle:
    """Parse a line that the supervisor sent.

    Raises:
        RefusedError: `message_invalid`.
    """
    try:
        return _to_handle.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(error) from error


def _invalid(error: Exception) -> RefusedError:
    return RefusedError("message_invalid", f"not a handle message: {error}")
