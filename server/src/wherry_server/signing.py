"""Signs offers by the thousand in a process beside the director's, which goes on publishing meanwhile.

An Ed25519 signature takes as long as everything else about an offer together, and holds the interpreter's lock: in a thread
it would stand in the way of everything else. The process starts with the first large batch, reads the key for itself, and
ends with its director, however that ends. Where there is only one core, or the process cannot be had, the director signs.

Over its pipes go messages of MessagePack, four bytes of length before each: a list of payloads, then a list of envelopes.
"""

from __future__ import annotations

import logging
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import msgspec

from wherry_shared import dsse, key_files

log = logging.getLogger(__name__)

APART_MIN = 500
"""Envelopes from which on another process is worth its messages."""
BATCH_MAX = 5_000
"""Envelopes of one message, so that neither side holds more than some megabytes."""
_HEAD = struct.Struct("!I")


class Signer:
    """Makes envelopes with the key in a file; may be called from any thread, one call at a time is carried out."""

    def __init__(
        self, payload_type: str, keyid: str, sign: Callable[[bytes], bytes], key_file: Path | None = None
    ) -> None:
        self._payload_type = payload_type
        self.keyid = keyid
        self._sign = sign
        self._key_file = key_file if (os.cpu_count() or 1) > 1 else None
        """None: everything is signed in this process."""
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def envelopes(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Return the signed envelope of each payload."""
        with self._lock:
            if self._key_file is not None and len(payloads) >= APART_MIN:
                try:
                    made: list[bytes] = []
                    for at in range(0, len(payloads), BATCH_MAX):
                        made += self._apart(self._key_file, payloads[at : at + BATCH_MAX])
                except (OSError, EOFError) as error:
                    log.warning("no signing process, so offers are signed in this one: %s", error)
                    self._end()
                    self._key_file = None
                else:
                    return made
        return [dsse.sign(self._payload_type, one, self.keyid, self._sign) for one in payloads]

    def close(self) -> None:
        """End the process if there is one."""
        with self._lock:
            self._end()

    def _apart(self, key_file: Path, payloads: Sequence[bytes]) -> list[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "wherry_server.signing", self._payload_type, self.keyid, str(key_file)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _send(self._process.stdin, payloads)
        made = _receive(self._process.stdout)
        if made is None or len(made) != len(payloads):
            raise EOFError("it ended without an answer")
        return made

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()


def _send(pipe: IO[bytes], parts: Sequence[bytes]) -> None:
    data = msgspec.msgpack.encode(parts)
    pipe.write(_HEAD.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[bytes] | None:
    """Return the next message, None at the end."""
    head = pipe.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    (size,) = _HEAD.unpack(head)
    data = pipe.read(size)
    return msgspec.msgpack.decode(data, type=list[bytes]) if len(data) == size else None


def main(payload_type: str, keyid: str, key_file: str) -> None:
    """Sign what comes in until there is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is at the terminal ends the director, which ends this
    signer = key_files.load(Path(key_file))
    if signer.public_key.keyid != keyid:  # replaced meanwhile: the director signs by itself until it knows
        return

    def sign(data: bytes) -> bytes:
        return bytes.fromhex(signer.sign(data).signature)

    while (payloads := _receive(sys.stdin.buffer)) is not None:
        _send(sys.stdout.buffer, [dsse.sign(payload_type, one, keyid, sign) for one in payloads])


if __name__ == "__main__":
    main(*sys.argv[1:])
