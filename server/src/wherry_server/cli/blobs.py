"""`wherry blobs`: look after what keeps blobs, on a machine that has the server's data folder."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from wherry_server.cli.common import AsJson, show, size
from wherry_server.cli.serve import Data
from wherry_server.settings import Settings

app = typer.Typer(name="blobs", help="Look after uploaded blobs, beside the server.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keep `collect` a command of its own."""


@app.command()
def collect(
    data: Data = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; else only count.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find uploads older than `uploads_days` that are in no bundle of this server's database, and delete them if asked to."""
    from wherry_server import uploads
    from wherry_server.services import open_services

    services = open_services(Settings.load(data))
    days = services.settings.uploads_days

    async def run() -> uploads.Collected:
        try:
            return await uploads.collect(services.database, services.blobs, days, delete=delete, now_s=time.time())
        finally:
            await services.close()

    found = asyncio.run(run())

    def render(console: Console) -> None:
        console.print(
            f"{found.blobs} blobs ({size(found.bytes)}) in {services.blobs.where} are in no bundle since {days} days"
        )
        if delete:
            console.print(f"Deleted, and {found.leftovers} leftovers of killed uploads.")
        elif found.blobs:
            console.print(
                "Nothing was deleted; with --delete they are. See first that this is the database of that store."
            )

    show({**asdict(found), "days": days, "deleted": delete}, as_json, render)
