"""`wherry trust`: who may say what a bundle is, and how fresh that word is."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from wherry_server.cli.common import AsJson, client, date, show, table

app = typer.Typer(name="trust", help="The signing keys that devices trust.", no_args_is_help=True)


@app.callback()
def trust() -> None:
    """The signing keys that devices trust."""


@app.command("status")
def trust_status(as_json: AsJson = False) -> None:
    """Show roles with version and expiry, publishers with their models."""
    with client() as server:
        found = server.get("/api/v1/trust")
    show(found, as_json, lambda console: _render(console, found))


def _render(console: Console, state: dict[str, Any]) -> None:
    console.print(f"root v1      sha256 {state['root_digest']} (what enrolment tokens carry)", soft_wrap=True)
    console.print(f"director     {', '.join(state['director_keyids'])}", soft_wrap=True)
    if state["development"]:
        console.print("development  root and targets keys are on the server: no offline ceremony protects them")
    rows = [
        (name, role["version"], role["threshold"], date(role["expires_at"])) for name, role in state["roles"].items()
    ]
    console.print(table(("role", "#version", "#threshold", "expires"), rows))
    publishers = [
        (publisher["name"], ", ".join(publisher["models"]), publisher["threshold"], len(publisher["bins"]))
        for publisher in state["publishers"]
    ]
    if publishers:
        console.print(table(("publisher", "models", "#threshold", "#bins in use"), publishers))
    else:
        console.print("no publishers yet; the first wherry-optimizer sign registers one (in development)")
