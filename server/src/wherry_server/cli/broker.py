"""`wherry broker`: a mosquitto that lets each device read its own offers and write its own reports, and nothing else."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from wherry_server.cli.common import AsJson, show
from wherry_server.settings import Settings
from wherry_shared.access import DEFAULT_DATA

if TYPE_CHECKING:
    from wherry_server.identity import DeviceAuthority

app = typer.Typer(name="broker", help="The MQTT broker in production form.", no_args_is_help=True)

Data = Annotated[
    Path | None, typer.Option(help="Data folder (WHERRY_DATA).", envvar="WHERRY_DATA", show_default=str(DEFAULT_DATA))
]


@app.command("config")
def write_config(
    data: Data = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the files, which the director keeps up to date.",
            show_default="as before, or broker in the data folder",
        ),
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address under which devices find the broker; may be repeated.")
    ] = None,
    listen: Annotated[str, typer.Option(help="Address on which devices are heard.", show_default="all")] = "",
    user: Annotated[str, typer.Option(help="User as whom mosquitto runs when root starts it.")] = "mosquitto",
    port: Annotated[int | None, typer.Option(help="Port for devices.", min=1, max=65535)] = None,
    server_host: Annotated[str | None, typer.Option(help="Where director and ingest find the broker.")] = None,
    server_port: Annotated[int | None, typer.Option(help="Port for director and ingest.", min=1, max=65535)] = None,
    as_json: AsJson = False,
) -> None:
    """Write configuration, access rules, certificates and revoked certificates of a mosquitto, and use it from now on."""
    from wherry_server import broker_config

    settings = Settings.load(
        data,
        broker_tls=True,
        broker_host=host[0] if host else None,
        broker_port=port,
        broker_server_host=server_host,
        broker_server_port=server_port,
        broker_files=str(output.absolute()) if output is not None else None,
    )
    authority, revoked = _revoked(settings)
    written = broker_config.write(settings, authority, revoked, hosts=host or [], user=user, listen=listen)
    settings.save()
    given = broker_config.to_be_given(written.parent, user)
    chown = f"chown -R {user} {shlex.join(map(str, given))}" if given else ""

    def render(console: Console) -> None:
        console.print(f"Written: {written}", soft_wrap=True)
        if chown:
            console.print(f"Where root starts it, before: {chown}", soft_wrap=True)
        console.print(f"Start: mosquitto -c {written}", soft_wrap=True)
        console.print(
            "Devices that enrol from now on come to it with their certificates; start api and director again."
        )

    show({"configuration": str(written), "chown": chown}, as_json, render)


@app.command("revoked")
def write_revoked(
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="the one that config wrote")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the list of revoked certificates again, for a broker on another machine; then have the broker read it (SIGHUP)."""
    from wherry_server import broker_config

    settings = Settings.load(data)
    _, revoked = _revoked(settings)
    file = output or settings.broker_folder / broker_config.REVOKED
    broker_config.replace(file, revoked)
    show({"revoked": str(file)}, as_json, lambda console: console.print(f"Written: {file}", soft_wrap=True))


def _revoked(settings: Settings) -> tuple[DeviceAuthority, bytes]:
    from wherry_server.revocation import revoked
    from wherry_server.services import open_services

    async def read() -> tuple[DeviceAuthority, bytes]:
        services = open_services(settings)
        try:
            async with services.database.read() as connection:
                return services.authority, services.authority.revocations(await revoked(connection))
        finally:
            await services.close()

    return asyncio.run(read())
