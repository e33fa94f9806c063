"""`wherry apply`: bring the server to what files say, so that a fleet can live in git."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from wherry_server import calls, desired
from wherry_server.answers import RolloutSummary, flag_tag
from wherry_server.cli.common import GLOBALS, AsJson, client, console, show
from wherry_shared.errors import RefusedError, WherryError

if TYPE_CHECKING:
    from wherry_server.client import Client

commands = typer.Typer()
EXIT_DIFFERENT = 2
"""Exit status of `--dry-run` where something would be done."""
SIGN = {"create": "+", "change": "~", "delete": "-", "start": ">"}
STYLE = {"create": "green", "change": "yellow", "delete": "red", "start": "cyan"}


@commands.command()
def apply(
    folder: Annotated[
        Path, typer.Option("--file", "-f", help="Folder of TOML, YAML or JSON files, or one file.", exists=True)
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show only; exits with 2 if something would be done.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Forget cohorts and delete flags that no file names.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring cohorts, flags and rollouts to what files say, after showing what would be done.

    Doing it again changes nothing; nothing is deleted without --prune.
    """
    wanted = desired.read(folder)
    machine = as_json or GLOBALS.as_json
    with client() as server:
        flags = {one["name"]: one for one in server.plain(calls.list_flags())}
        todo = desired.changes(wanted, *_there(server, wanted), flags=flags, prune=prune)
        asked = bool(todo) and not dry_run and not yes
        if asked and (machine or not sys.stdin.isatty()):
            raise RefusedError(
                "confirmation_missing",
                f"{len(todo)} changes, and nobody to ask",
                consequence="nothing was changed",
                next_step="look at them with --dry-run, then say --yes",
            )
        if asked:
            _render(console(), todo)
            typer.confirm("do that?", abort=True)
        if not dry_run:
            _do_all(server, todo, flags)
    found = {"changes": msgspec.to_builtins(todo), "applied": not dry_run}
    show(found, as_json, lambda out: _render(out, todo) if not asked else out.print("done"))
    if dry_run and todo:
        raise typer.Exit(EXIT_DIFFERENT)


def _there(server: Client, wanted: desired.Desired) -> tuple[dict[str, desired.Cohort], list[dict[str, object]]]:
    """Return the cohorts that are there, and the rollouts that files speak of with their plans, newest first."""
    cohorts = {
        one.name: desired.Cohort(one.name, one.kept_from or one.selector, static=bool(one.kept))
        for one in server.each(calls.list_cohorts())
    }
    bundles = {desired.key(wish)[0] for wish in wanted.rollouts}
    rollouts: list[dict[str, object]] = [
        server.plain(calls.show_rollout(one.number))
        for model in sorted({bundle.split("+")[0].rpartition(":")[0] for bundle in bundles})
        for one in server.each(calls.list_rollouts(model))
        if _rolled_out(one) in bundles
    ]
    return cohorts, rollouts


def _rolled_out(one: RolloutSummary) -> str:
    """Return what a rollout brings, as `desired.key` has it."""
    parts = one.models or [{"model": one.model, "version": one.version}]
    return "+".join(f"{part['model']}:{part['version']}" for part in parts)


def _do_all(server: Client, todo: Sequence[desired.Change], flags: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the changes in their order; whoever is refused in the middle is told what was done before.

    Raises:
        WherryError: what the server refused.
    """
    for done, change in enumerate(todo):
        try:
            _do(server, change, flags)
        except WherryError as error:
            error.message = f"{change.do} {change.kind} {change.name}: {error.message}"
            if done:
                error.consequence = (
                    f"of {len(todo)} changes {done} were made before this one, which was not, nor what follows it"
                )
                error.next_step = (
                    f"{error.next_step or 'mend the files'}; then apply them again: what was done stays done"
                )
            raise


def _do(server: Client, change: desired.Change, flags: Mapping[str, Mapping[str, Any]]) -> None:
    selector, static = (change.after or {}).get("selector", ""), bool((change.after or {}).get("static"))
    match (change.kind, change.do):
        case ("cohort", "create"):
            server.send(calls.create_cohort(change.name, selector, static=static))
        case ("cohort", "change"):
            server.send(calls.change_cohort(change.name, selector, static=static))
        case ("cohort", "delete"):
            server.send(calls.delete_cohort(change.name))
        case ("flag", "create"):
            server.send(calls.create_flag({"name": change.name, **(change.after or {})}))
        case ("flag", "change"):
            known = flags[change.name]
            wish = {field: known[field] for field in ("type", "description", "variants", "default", "rules")}
            wish |= change.after or {}
            server.send(calls.change_flag(change.name, wish, if_match=flag_tag(known)))
        case ("flag", "delete"):
            server.send(calls.delete_flag(change.name, if_match=flag_tag(flags[change.name])))
        case ("rollout", "create"):
            server.send(calls.create_rollout(change.after or {}))
        case _:
            server.send(calls.command_rollout(change.number, "start"))


def _render(out: Console, todo: list[desired.Change]) -> None:
    if not todo:
        out.print("everything is as the files say")
    for change in todo:
        out.print(Text(f"{SIGN[change.do]} {change.do} {change.kind} {change.name}", style=STYLE[change.do]))
        for sign, side, style in (("-", change.before, "red"), ("+", change.after, "green")):
            for name, value in sorted((side or {}).items()):
                out.print(Text(f"    {sign} {name} = {json.dumps(value, ensure_ascii=False)}", style=style))
