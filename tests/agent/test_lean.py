"""What the supervisor does without: modules that wait for their first use, and questions that a child asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.trust_kit import Answer, little_server
from wherry_agent import lean, timestamp


def say(code: str) -> list[str]:
    head = "import sys; from wherry_agent import lean; lean.keep_out(); "
    return subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()


@pytest.mark.parametrize(
    ("code", "module"),
    [
        ("import shutil; print(shutil.which('sh'))", "shutil"),
        ("from shutil import which; print(which('sh'))", "shutil"),
        ("import urllib.request; print(urllib.request.Request('http://a/b').selector)", "urllib.request"),
        ("import inspect; print(inspect.isclass(int))", "inspect"),
        ("import tempfile; print(tempfile.gettempdir())", "tempfile"),
    ],
)
def test_a_deferred_module_is_there_when_it_is_used(code: str, module: str) -> None:
    first, *still = say(f"{code}; print(*lean.deferred())")
    assert first
    assert module not in still
    assert module in say("print(*lean.deferred())")


def test_what_uses_none_of_them_imports_none() -> None:
    assert say("import wherry_agent.daemon; print(*lean.deferred())") == list(lean.DEFERRED)


def test_a_deferred_module_that_is_asked_for_nothing_stays_out() -> None:
    code = "import tarfile, shutil; print(hasattr(tarfile, '__path__'), *lean.deferred())"
    assert say(code) == ["False", *lean.DEFERRED]


def test_a_child_asks_whether_trust_changed() -> None:
    def answer(path: str, headers: dict[str, str]) -> Answer:
        assert path == "/tuf/default/timestamp.json"
        return Answer(304 if headers.get("if-none-match") == '"2"' else 200, b"{}", {"ETag": '"2"'})

    with little_server(answer) as server:
        asked = timestamp.Question(server=server.url, tuf_path="/tuf/default", etag="")
        again = msgspec.structs.replace(asked, etag='"2"')
        assert timestamp.ask_by_child(asked) == timestamp.Answer(etag='"2"')
        assert timestamp.ask_by_child(again) == timestamp.Answer(unchanged=True, etag='"2"')
    away = timestamp.ask_by_child(asked)
    assert "refused" in away.trouble


def test_a_child_that_cannot_be_started_is_trouble_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    asked = timestamp.Question(server="http://127.0.0.1:1", tuf_path="/tuf/x", etag="")
    assert "could not be asked" in timestamp.ask_by_child(asked).trouble
