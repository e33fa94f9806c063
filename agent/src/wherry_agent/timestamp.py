"""Asks the server whether trust metadata changed: a child so light that the supervisor need not hold an HTTP client.

`python -m wherry_agent.timestamp` reads a `Question` from its standard input, where no list of processes shows the key's
password, and writes one JSON line, `Answer`. Nothing is believed: where something changed, the courier finds out what.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec

from wherry_agent import identity, processes
from wherry_agent.identity import Identity
from wherry_shared.errors import WherryError

SECONDS_MAX = 60.0


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask, and what to show there."""

    ca: str = ""
    pair: tuple[str, str] | None = None
    """Files of the certificate and its key, for a server that lets nobody in without."""
    password: str = ""
    """Of the key's file."""
    server: str
    tuf_path: str
    etag: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the server said of timestamp.json."""

    unchanged: bool = False
    etag: str = ""
    trouble: str = ""
    """Why there is no answer."""


def question(home: Path, known: Identity, server: str, etag: str, password: str) -> Question:
    """Return what an enrolled device asks."""
    ca = identity.authority(home) if server.startswith("https:") else None
    pair = identity.shown_pair(home, known, time.time())
    return Question(
        ca=str(ca) if ca is not None else "",
        pair=(str(pair[0]), str(pair[1])) if pair else None,
        password=password,
        server=server,
        tuf_path=known.tuf_path,
        etag=etag,
    )


def ask(asked: Question) -> Answer:
    """Ask; trouble is an answer too."""
    from wherry_agent.courier_http import Http

    try:
        pair = (Path(asked.pair[0]), Path(asked.pair[1])) if asked.pair else None
        ca = Path(asked.ca) if asked.ca else None
        http = Http(ca=ca, server=asked.server, pair=pair, password=asked.password)
        headers = {"If-None-Match": asked.etag} if asked.etag else {}
        with http.request("GET", f"{asked.server}{asked.tuf_path}/timestamp.json", headers=headers) as answer:
            return Answer(unchanged=answer.status == 304, etag=answer.header("ETag"))
    except WherryError as error:
        return Answer(trouble=error.message)


def ask_by_child(asked: Question) -> Answer:
    """Let a child ask; trouble is an answer too."""
    argv = processes.command("wherry_agent.timestamp")
    sent = msgspec.json.encode(asked)
    try:
        run = subprocess.run(
            argv, input=sent, stdout=subprocess.PIPE, env=processes.environment(), timeout=SECONDS_MAX, check=True
        )
        return msgspec.json.decode(run.stdout, type=Answer)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as error:
        return Answer(trouble=f"the server could not be asked: {error}")


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(ask(msgspec.json.decode(sys.stdin.buffer.read(), type=Question))))
