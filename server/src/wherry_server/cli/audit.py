"""`wherry audit` and `wherry health`: who did what, and whether the server answers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.answers import ExportedEntry
from wherry_server.cli.common import AsJson, client, show, table, when
from wherry_shared.errors import RefusedError

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
    before: Annotated[int | None, typer.Option(help="Older than the entry of this number.", min=1)] = None,
    count: Annotated[int, typer.Option(help="How many of the newest.", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """List the newest entries."""
    with client() as server:
        entries = server.each(calls.list_audit(actor, action, subject, before, limit=min(count, 1000)))
        found = msgspec.to_builtins(list(itertools.islice(entries, count)))

    def render(console: Console) -> None:
        rows = [(one["id"], when(one["at"]), one["actor"], one["action"], one["subject"]) for one in found]
        console.print(table(("#id", "when", "who", "what", "of"), rows))

    show(found, as_json, render)


@app.command("export")
def export_audit(
    file: Annotated[Path, typer.Argument(help="Written to; what it holds already is gone on with.")],
    as_json: AsJson = False,
) -> None:
    """Write the log to a file, an entry on each line, or add what came since: to keep elsewhere and to verify against."""
    kept = _read(file) if file.exists() else []
    _check(kept, file)
    with client() as server:
        more = server.send(calls.export_audit(kept[-1].id if kept else 0))
    added = [_entry(line, file) for line in more.splitlines()]
    _check([*kept, *added], file)
    with file.open("ab") as to:
        to.write(more)
    done = {"file": str(file), "entries": len(kept) + len(added), "added": len(added)}
    show(
        done, as_json, lambda console: console.print(f"{file}: {done['entries']} entries, {done['added']} of them new")
    )


@app.command("verify")
def verify_audit(
    against: Annotated[
        Path | None, typer.Option(help="A file of wherry audit export that the log has to go on from.")
    ] = None,
    unsealed: Annotated[
        int,
        typer.Option(
            min=0, help="How many entries at the beginning may have no seal: written before there were seals."
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compute the whole log again; exits with 1 and names the entry if one was changed, removed or made up."""
    kept = _read(against) if against is not None else []
    if against is not None:
        _check(kept, against)
    with client() as server:
        found = server.plain(calls.verify_audit(unsealed))
        if found["whole"] and kept:
            there = server.send(calls.export_audit(kept[-1].id - 1)).splitlines()
            if not there or _entry(there[0], Path("the server's log")).hash != kept[-1].hash:
                found |= {"whole": False, "broken_at": kept[-1].id, "why": f"it is not what {against} has"}
    old = f", {found['unsealed']} of them from before there were seals" if found["unsealed"] else ""
    whole = f"{found['entries']} entries, each follows from the one before{old}; last hash {found['head']}"
    text = whole if found["whole"] else f"broken at entry {found['broken_at']}: {found['why']}"
    show(found, as_json, lambda console: console.print(text))
    if not found["whole"]:
        raise typer.Exit(EXIT_BROKEN)


def _entry(line: bytes, file: Path) -> ExportedEntry:
    try:
        return msgspec.json.decode(line, type=ExportedEntry)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(
            "audit_file", f"{file}: not an exported entry: {error}", next_step="export into a new file"
        ) from error


def _read(file: Path) -> list[ExportedEntry]:
    try:
        return [_entry(line, file) for line in file.read_bytes().splitlines()]
    except OSError as error:
        raise RefusedError(
            "audit_file", f"{file}: {error.strerror}", next_step="name a file that can be read"
        ) from error


def _check(entries: list[ExportedEntry], file: Path) -> None:
    """Check that exported entries follow from each other.

    Raises:
        RefusedError: `audit_broken`.
    """
    from wherry_server import audit  # brings the database along, for which other commands need not wait

    at = audit.first_broken(entries)
    if at is not None:
        raise RefusedError(
            "audit_broken",
            f"{file}: entry {at} does not follow from the one before it",
            consequence="nothing was written",
            next_step="compare with another copy: somebody changed this file, or the log before it was exported",
        )


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
