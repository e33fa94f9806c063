"""`wherry proxy`: nginx in front of the API, with the certificates of devices."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from wherry_server.cli.common import AsJson, show
from wherry_server.cli.serve import Data
from wherry_server.settings import Settings

app = typer.Typer(name="proxy", help="nginx in front of the API.", no_args_is_help=True)


@app.command("config")
def write_config(
    name: Annotated[str, typer.Argument(help="Host name or address under which devices find nginx.")],
    data: Data = None,
    listen: Annotated[str, typer.Option(help="Address and port, as nginx writes them.")] = "443",
    output: Annotated[
        Path | None, typer.Option(help="Folder for the files.", show_default="proxy in the data folder")
    ] = None,
    required: Annotated[
        bool, typer.Option(help="Whether devices have to show their certificate, beside their secret.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write a server block of nginx that ends TLS and hands certificates of devices on, and believe it from now on."""
    from wherry_server import proxy_config
    from wherry_server.services import open_services

    settings = Settings.load(data, device_certificates="required" if required else "optional")
    services = open_services(settings)
    asyncio.run(services.close())
    folder = output or settings.data / "proxy"
    written = proxy_config.write(settings, services.authority, folder=folder, name=name, listen=listen)
    settings.save()
    show(
        {"configuration": str(written)},
        as_json,
        lambda console: console.print(
            f"Written: {written}\nInclude it in nginx, and start the API again.", soft_wrap=True
        ),
    )
