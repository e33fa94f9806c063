"""`wherry model`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, client, show, table, when

app = typer.Typer(name="model", help="Models and their versions.", no_args_is_help=True)


@app.command("list")
def list_models(name: Annotated[str, typer.Option(help="Part of the name.")] = "", as_json: AsJson = False) -> None:
    """List models with their versions, the newest first."""
    with client() as server:
        found = server.plain(calls.list_models(name))

    def render(console: Console) -> None:
        rows = [
            (model["name"], ", ".join(model["versions"]), model["devices"], when(model["published_at"]))
            for model in found
        ]
        console.print(table(("model", "versions", "#devices", "last published"), rows))
        if not rows:
            console.print("no models yet; push a bundle: wherry bundle push PATH")

    show(found, as_json, render)


@app.callback()
def models() -> None:
    """Models and their versions."""
