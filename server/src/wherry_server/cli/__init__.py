"""`wherry`: serve and manage. One module per noun: its `app` is a group here, its `commands` stand alone."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from wherry_server import __version__
from wherry_server.cli import (
    apply,
    audit,
    blobs,
    broker,
    bundle,
    cohort,
    deploy,
    device,
    doctor,
    flag,
    fleet,
    keys,
    login,
    model,
    proxy,
    quarantine,
    rollout,
    serve,
    token,
    trust,
    webhook,
)
from wherry_server.cli.common import GLOBALS, AsJson
from wherry_shared.errors import WherryError

EXIT_REFUSED = 1

app = typer.Typer(
    name="wherry",
    help="Carry machine-learning models to fleets of edge devices: small, signed, staged, reversible.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wherry {__version__}")
        raise typer.Exit


@app.callback()
def root(
    server: Annotated[str | None, typer.Option(help="Address of the API (WHERRY_SERVER).")] = None,
    token: Annotated[str | None, typer.Option(help="API token (WHERRY_TOKEN).")] = None,
    as_json: AsJson = False,
    version: Annotated[  # noqa: ARG001  # acts in its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Remember the options that hold for every command."""
    GLOBALS.server, GLOBALS.token, GLOBALS.as_json = server, token, as_json


for alone in (
    serve.commands,
    doctor.commands,
    deploy.commands,
    fleet.commands,
    audit.commands,
    apply.commands,
    login.commands,
):
    app.registered_commands.extend(alone.registered_commands)
for group in (
    bundle,
    blobs,
    model,
    device,
    cohort,
    rollout,
    flag,
    quarantine,
    token,
    trust,
    audit,
    broker,
    keys,
    proxy,
    webhook,
    login,
):
    app.add_typer(group.app)


def main() -> None:
    """Run the command line; errors come as cause, consequence and next step, and exit with 1."""
    try:
        app()
    except WherryError as error:
        if GLOBALS.as_json or "--json" in sys.argv:
            problem = {
                "code": error.code,
                "detail": error.message,
                "consequence": error.consequence,
                "next_step": error.next_step,
            }
            sys.stderr.write(json.dumps(problem) + "\n")
        else:
            sys.stderr.write(error.diagnostics() + "\n")
        sys.exit(EXIT_REFUSED)
