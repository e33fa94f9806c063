"""`wherry`: serve and manage. One module per noun: its `app` is a group here, its `commands` stand alone.

A call imports the module of the command that it names and no other, which is most of what a small command takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from wherry_server import __version__
from wherry_server.cli.common import GLOBALS, AsJson
from wherry_shared import unwanted
from wherry_shared.errors import WherryError

EXIT_REFUSED = 1

ALONE = {
    "serve": ("dev", "init", "serve"),
    "doctor": ("doctor",),
    "deploy": ("deploy", "rollback"),
    "fleet": ("fleet",),
    "audit": ("health",),
    "apply": ("apply",),
    "login": ("login", "logout", "whoami"),
}
"""Module → commands that it has beside its group, in the order of the help."""
GROUPS = {
    "bundle": "bundle",
    "blobs": "blobs",
    "model": "model",
    "device": "device",
    "cohort": "cohort",
    "rollout": "rollout",
    "flag": "flag",
    "quarantine": "quarantine",
    "token": "token",
    "trust": "trust",
    "audit": "audit",
    "broker": "broker",
    "keys": "keys",
    "proxy": "proxy",
    "webhook": "webhook",
    "login": "session",
}
"""Module → its group."""
WITH_VALUE = ("--server", "--token")
"""Options before a command that another word follows."""


def tree(command: str = "") -> typer.Typer:
    """Return the command line; with the name of a command or group only that, if there is such a one."""
    known = {*GROUPS.values(), *(name for names in ALONE.values() for name in names)}
    app = typer.Typer(
        name="wherry",
        help="Carry machine-learning models to fleets of edge devices: small, signed, staged, reversible.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(root)
    for module, names in ALONE.items():
        if command in names or command not in known:
            app.registered_commands.extend(_module(module).commands.registered_commands)
    for module, name in GROUPS.items():
        if command == name or command not in known:
            app.add_typer(_module(module).app)
    return app


def _module(name: str) -> Any:
    return import_module(f"wherry_server.cli.{name}")


def named(arguments: Sequence[str]) -> str:
    """Return the command or group that arguments name, empty if they name none."""
    words = iter(arguments)
    for word in words:
        if word in WITH_VALUE:
            next(words, "")
        elif not word.startswith("-"):
            return word
    return ""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wherry {__version__}")
        raise typer.Exit


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


def main() -> None:
    """Run the command line; errors come as cause, consequence and next step, and exit with 1."""
    unwanted.keep_out()
    try:
        tree(named(sys.argv[1:]))()
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
