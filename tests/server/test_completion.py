"""Completion in a shell, as a person has it: the script that the command gives, sourced, and a line that is begun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WHERRY = Path(sys.executable).with_name("wherry")
PRESS_TAB = """
source "$1"; shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
[[ $(complete -p wherry) =~ -F\\ ([^ ]+) ]]
"${BASH_REMATCH[1]}" wherry "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""What bash does at the key, with the function that `complete` names."""


def run(*command: str | Path, **environment: str) -> str:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PATH": f"{WHERRY.parent}:{os.environ['PATH']}", **environment},
    ).stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `wherry --install-completion` writes for bash, installed at a home of its own."""
    home = tmp_path_factory.mktemp("home")
    run(WHERRY, "--install-completion", "bash", HOME=str(home), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "wherry" in (home / ".bashrc").read_text()
    return home / ".bash_completions" / "wherry.sh"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["rollout", "re"], {"retry", "retry-failed", "resume", "revert"}),
        (["rollout", "create", "m:1.0.0", "--st"], {"--stages", "--strategy", "--start"}),
        (["rollout", "create", "m:1.0.0", "--strategy", "s"], {"shadow", "split"}),
        (["rollout", "devices", "1", "--state", "re"], {"reverted", "returned", "refused", "revert_pending"}),
    ],
)
def test_bash_completes_commands_options_and_their_values(script: Path, words: list[str], offered: set[str]) -> None:
    assert set(run("bash", "--norc", "-c", PRESS_TAB, "bash", script, "wherry", *words).split()) == offered
