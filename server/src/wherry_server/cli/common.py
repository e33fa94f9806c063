"""What every command shares: access to the server, `--json`, tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from wherry_shared.access import find_access
from wherry_shared.errors import RefusedError

if TYPE_CHECKING:
    from wherry_server.client import Client

IfMatch = Annotated[
    str,
    typer.Option("--if-match", help="Only while it is still what was shown with this tag; else nothing is changed."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]


@dataclass(slots=True)
class Globals:
    """Options given before the command."""

    server: str | None = None
    token: str | None = None
    as_json: bool = False


GLOBALS = Globals()
"""Set by the callback of the root command, once per process."""


def client() -> Client:
    """Return a client for the server that the options, the environment or `client.json` name."""
    from wherry_server.client import Client  # brings httpx along

    return Client(find_access(GLOBALS.server, GLOBALS.token))


def console() -> Console:
    """Return the console for people; width follows the terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def show(data: Any, as_json: bool, render: Callable[[Console], None]) -> None:
    """Print `data` as JSON if that was asked for, else let `render` print it for people."""
    if as_json or GLOBALS.as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    else:
        render(console())


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a plain table; a column whose name begins with `#` holds numbers and is aligned right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left", overflow="fold")
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


def among(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what completes an option whose value is one of these, for a shell."""

    def begun(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return begun


def labels_of(items: Sequence[str] | None) -> dict[str, str]:
    """Read labels written as KEY=VALUE.

    Raises:
        RefusedError: `labels_invalid`.
    """
    labels: dict[str, str] = {}
    for item in items or []:
        key, mark, value = item.partition("=")
        if not mark:
            raise RefusedError("labels_invalid", f"label {item[:80]!r} is not KEY=VALUE", next_step="write site=north")
        labels[key] = value
    return labels


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def soon(time_us: int) -> str:
    """Write a time to come for people."""
    left = max(0.0, time_us / 1_000_000 - datetime.now(UTC).timestamp())
    return f"in {left:.0f} s" if left < 120 else f"in {left / 60:.0f} min"


def when(time_us: int) -> str:
    """Write a time of the past for people: how long ago, or the date."""
    if not time_us:
        return "never"
    moment = datetime.fromtimestamp(time_us / 1_000_000, UTC)
    ago = (datetime.now(UTC) - moment).total_seconds()
    if ago < 120:
        return f"{max(0, ago):.0f} s ago"
    if ago < 7200:
        return f"{ago / 60:.0f} min ago"
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def date(time_us: int) -> str:
    """Write a time, past or future, as a date."""
    return datetime.fromtimestamp(time_us / 1_000_000, UTC).strftime("%Y-%m-%d %H:%M UTC")
