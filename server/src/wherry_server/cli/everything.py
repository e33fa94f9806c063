"""The whole tree of commands, for whoever reads or tests all of it."""

from __future__ import annotations

from wherry_server.cli import tree

app = tree()
