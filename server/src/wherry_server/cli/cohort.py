"""`wherry cohort`: saved selectors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, client, show, table, when

app = typer.Typer(name="cohort", help="Saved selectors: who a rollout is for.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the cohort.")]
Selector = Annotated[str, typer.Argument(help='Such as: label.site = berlin and not name = lab-*; or "all".')]

Static = Annotated[bool, typer.Option("--static", help="Keep whom it takes now, whatever becomes of them.")]


@app.command("list")
def list_cohorts(name: Annotated[str, typer.Option(help="Part of the name.")] = "", as_json: AsJson = False) -> None:
    """List the saved cohorts."""
    found = client().plain(calls.list_cohorts(name))

    def render(console: Console) -> None:
        rows = [(one["name"], _of(one), when(one["created_at"]), one["created_by"]) for one in found]
        console.print(table(["COHORT", "SELECTOR", "CREATED", "BY"], rows))

    show(found, as_json, render)


@app.command()
def create(
    name: Name,
    selector: Selector,
    static: Static = False,
    as_json: AsJson = False,
) -> None:
    """Save a selector under a name."""
    made = client().plain(calls.create_cohort(name, selector, static=static))
    show(made, as_json, lambda console: console.print(f"saved cohort {made['name']}: {_of(made)}"))


@app.command()
def change(name: Name, selector: Selector, static: Static = False, as_json: AsJson = False) -> None:
    """Give a cohort another selector; rollouts that are there keep theirs."""
    made = client().plain(calls.change_cohort(name, selector, static=static))
    show(made, as_json, lambda console: console.print(f"changed cohort {made['name']}: {_of(made)}"))


@app.command("show")
def show_cohort(name: Name, as_json: AsJson = False) -> None:
    """Show a cohort and whom it takes now."""
    found = client().plain(calls.show_cohort(name))
    show(found, as_json, lambda console: _whom(console, found))


@app.command()
def preview(selector: Selector, as_json: AsJson = False) -> None:
    """Say whom a selector takes now, without saving it."""
    found = client().plain(calls.preview_cohort(selector))
    show(found, as_json, lambda console: _whom(console, found))


@app.command()
def delete(name: Name, as_json: AsJson = False) -> None:
    """Forget a cohort; rollouts that are there keep its selector."""
    client().send(calls.delete_cohort(name))
    show({"name": name, "deleted": True}, as_json, lambda console: console.print(f"cohort {name} is forgotten"))


def _of(cohort: dict[str, Any]) -> str:
    """Say whom a cohort takes."""
    return f"the {cohort['kept']} that were {cohort['kept_from']}" if cohort["kept"] else str(cohort["selector"])


def _whom(console: Console, found: dict[str, Any]) -> None:
    console.print(f"selector  {found['selector']}")
    if found.get("kept"):
        console.print(f"static    {_of(found)}")
    console.print(f"devices   {found['devices']} now, {found['simulated']} of them simulated")
    if found["names"]:
        rest = found["devices"] - len(found["names"])
        console.print(f"          {', '.join(found['names'])}{f' and {rest} more' if rest > 0 else ''}")
