"""`wherry doctor`: ask of this machine what a server needs."""

from __future__ import annotations

import asyncio

import typer
from rich.console import Console

from wherry_server.cli.common import AsJson, show, table
from wherry_server.cli.serve import Data
from wherry_server.settings import Settings

commands = typer.Typer()
EXIT_BAD = 1


@commands.command()
def doctor(data: Data = None, as_json: AsJson = False) -> None:
    """Ask data folder, database, blobs, broker and API of this machine what would keep a server from working."""
    from wherry_server import doctor as questions

    settings = Settings.load(data)

    async def run() -> list[tuple[str, questions.Finding]]:
        return [found async for found in questions.examine(settings)]

    findings = asyncio.run(run())

    def render(console: Console) -> None:
        console.print(table(["", "asked", "found"], [(one.level, name, one.detail) for name, one in findings]))
        for name, one in findings:
            if one.level == "bad" and one.next_step:
                console.print(f"{name}: next: {one.next_step}")

    rows = [
        {"asked": name, "level": one.level, "detail": one.detail, "next_step": one.next_step} for name, one in findings
    ]
    show(rows, as_json, render)
    if any(one.level == "bad" for _, one in findings):
        raise typer.Exit(EXIT_BAD)
