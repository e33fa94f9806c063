"""`wherry fleet`: how many devices run what."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, client, show, table

commands = typer.Typer()


@commands.command()
def fleet(as_json: AsJson = False) -> None:
    """Count devices by model, version and state; simulated ones apart."""
    with client() as server:
        found = server.plain(calls.fleet_state())
    show(found, as_json, lambda console: _render(console, found))


def _render(console: Console, fleet: dict[str, Any]) -> None:
    kinds = fleet["devices"]
    for kind in ("real", "simulated"):
        counts = kinds[kind]
        others = ", ".join(
            f"{count} {state}" for state, count in counts.items() if state not in ("active", "seen_recently")
        )
        console.print(
            f"{kind:<10} {counts['active']} active, {counts['seen_recently']} seen in the last 15 minutes"
            + (f", {others}" if others else "")
        )
    rows = []
    for name, model in sorted(fleet["models"].items()):
        for label, key in (("version", "versions"), ("state", "states")):
            for value, counts in sorted(model[key].items()):
                rows.append((name, f"{label} {value}", counts["real"], counts["simulated"]))
                name = ""  # noqa: PLW2901  # said once
    if rows:
        console.print(table(("model", "what", "#real", "#simulated"), rows))
