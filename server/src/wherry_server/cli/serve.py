"""`wherry dev` and `wherry serve`: start a development server, or one role of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wherry_server.settings import Settings
from wherry_shared.access import DEFAULT_DATA
from wherry_shared.errors import RefusedError

commands = typer.Typer()

Data = Annotated[
    Path | None, typer.Option(help="Data folder (WHERRY_DATA).", envvar="WHERRY_DATA", show_default=str(DEFAULT_DATA))
]
Port = Annotated[int | None, typer.Option(help="Port of the API.", min=1, max=65535, show_default="8400, or as before")]
BrokerPort = Annotated[
    int | None, typer.Option(help="Port of the MQTT broker.", min=1, max=65535, show_default="8401, or as before")
]


@commands.command()
def dev(
    data: Data = None,
    port: Port = None,
    broker_port: BrokerPort = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Start everything on this machine: API, director, MQTT broker, SQLite, generated keys. For development."""
    from wherry_server import dev as development

    development.run(Settings.load(data, port=port, broker_port=broker_port), quiet=quiet)


@commands.command()
def serve(
    role: Annotated[str, typer.Argument(help="api, director or broker")],
    data: Data = None,
) -> None:
    """Run one role of a server on a data folder that `wherry dev` made ready."""
    from wherry_server import roles

    settings = Settings.load(data)
    match role:
        case "api" | "director" | "broker":
            roles.run(role, settings)
        case _:
            raise RefusedError(
                "role_unknown_here", f"there is no role {role[:40]!r}", next_step="say api, director or broker"
            )
