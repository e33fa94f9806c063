"""`wherry audit` and `wherry health`: who did what, and whether the server answers."""

from __future__ import annotations

import itertools
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, client, show, table, when

app = typer.Typer(
    name="audit", help="Who did what: append-only, each entry holding the one before.", no_args_is_help=True
)
commands = typer.Typer()
EXIT_BROKEN = 1
"""Exit status of `verify` for a log that was tampered with."""


@app.command("list")
def list_audit(
    actor: Annotated[str, typer.Option(help="Whose entries, such as token:admin.")] = "",
    action: Annotated[str, typer.Option(help="Such as rollout.create.")] = "",
    subject: Annotated[str, typer.Option(help="Of what.")] = "",
    count: Annotated[int, typer.Option(help="How many of the newest.", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """List the newest entries."""
    with client() as server:
        entries = server.each(calls.list_audit(actor, action, subject, limit=min(count, 1000)))
        found = msgspec.to_builtins(list(itertools.islice(entries, count)))

    def render(console: Console) -> None:
        rows = [(one["id"], when(one["at"]), one["actor"], one["action"], one["subject"]) for one in found]
        console.print(table(("#id", "when", "who", "what", "of"), rows))

    show(found, as_json, render)


@app.command("verify")
def verify_audit(as_json: AsJson = False) -> None:
    """Compute the whole chain again; exits with 1 if an entry was changed or removed."""
    with client() as server:
        found = server.plain(calls.verify_audit())
    text = "every entry follows from the one before" if found["whole"] else f"broken at entry {found['broken_at']}"
    show(found, as_json, lambda console: console.print(text))
    if not found["whole"]:
        raise typer.Exit(EXIT_BROKEN)


@commands.command()
def health(as_json: AsJson = False) -> None:
    """Tell whether the server, its database and what keeps its blobs answer."""
    with client() as server:
        found = server.plain(calls.health())
        where = server.server
    show(
        found,
        as_json,
        lambda console: console.print(
            f"{where} answers: {found['version']}, project {found['project']}"
            + ("" if found["blobs"] == "ok" else f"; blobs cannot be fetched or uploaded: {found['blobs']}")
        ),
    )
