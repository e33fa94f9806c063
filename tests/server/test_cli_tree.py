"""Every command speaks to machines too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer
from rich.text import Text

from wherry_optimizer.cli import app as optimizer
from wherry_server.cli import named, tree
from wherry_server.cli.everything import app

HEAVY = ("alembic", "cryptography", "fastapi", "pydantic", "sqlalchemy")
WITHOUT = {
    "dev": "a screen that stays",
    "serve": "a process that stays",
}


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


ALL = dict(commands(typer.main.get_command(app)))


def test_the_tree_was_walked() -> None:
    assert {"rollout create", "token revoke", "cohort delete", "device show", "deploy"} <= set(ALL)


def test_a_call_imports_what_it_names() -> None:
    whole = typer.main.get_command(app).commands
    for name, one in whole.items():
        part = typer.main.get_command(tree(name)).commands
        assert getattr(part[name], "commands", {}).keys() == getattr(one, "commands", {}).keys()
        assert len(part) < 5
    assert list(typer.main.get_command(tree("nothing")).commands) == list(whole)
    assert named(["--server", "device", "--json", "token", "list"]) == "token"
    assert named(["--server=device", "--help"]) == named(["--token"]) == ""


@pytest.mark.parametrize("name", sorted(set(ALL) - set(WITHOUT)))
def test_a_command_takes_json_and_says_what_it_is_for(name: str) -> None:
    options = {option for parameter in ALL[name].params for option in parameter.opts}
    assert "--json" in options
    assert ALL[name].help


OPTIMIZER = {f"optimizer {name}": command for name, command in commands(typer.main.get_command(optimizer))}


@pytest.mark.parametrize("name", sorted(ALL | OPTIMIZER))
def test_no_help_loses_words_as_markup(name: str) -> None:
    command = (ALL | OPTIMIZER)[name]
    for text in [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]:
        assert Text.from_markup(text).plain == text


def test_a_command_does_not_wait_for_what_only_a_server_needs() -> None:
    seen = f"import sys, wherry_server.cli; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout == "[]\n"
