"""Asks the server whether trust metadata changed: a child so light that the supervisor need not hold an HTTP client.

`python -m wherry_agent.timestamp HOME SERVER TUF_PATH ETAG` writes one JSON line, `Answer`. Nothing is believed: where
something changed, the courier finds out what.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from wherry_agent import identity, processes
from wherry_shared.errors import WherryError

SECONDS_MAX = 60.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the server said of timestamp.json."""

    unchanged: bool = False
    etag: str = ""
    trouble: str = ""
    """Why there is no answer."""


def ask(home: Path, server: str, tuf_path: str, etag: str) -> Answer:
    """Ask; trouble is an answer too."""
    from wherry_agent.courier_http import Http

    try:
        ca = identity.folder(home) / identity.CA_FILE
        http = Http(ca=ca if ca.exists() else None, server=server)
        headers = {"If-None-Match": etag} if etag else {}
        with http.request("GET", f"{server}{tuf_path}/timestamp.json", headers=headers) as answer:
            return Answer(unchanged=answer.status == 304, etag=answer.header("ETag"))
    except WherryError as error:
        return Answer(trouble=error.message)


def ask_by_child(home: Path, server: str, tuf_path: str, etag: str) -> Answer:
    """Let a child ask; trouble is an answer too."""
    argv = processes.command("wherry_agent.timestamp", str(home), server, tuf_path, etag)
    try:
        run = subprocess.run(argv, stdout=subprocess.PIPE, env=processes.environment(), timeout=SECONDS_MAX, check=True)
        return msgspec.json.decode(run.stdout, type=Answer)
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as error:
        return Answer(trouble=f"the server could not be asked: {error}")


if __name__ == "__main__":
    home, server, tuf_path, etag = sys.argv[1:5]
    sys.stdout.buffer.write(msgspec.json.encode(ask(Path(home), server, tuf_path, etag)))
