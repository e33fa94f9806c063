"""A device says no secret: not in what its programs print and log, not in what they say when they fail, not in what is told.

What is sent and what the supervisor logs over a whole first day is looked at in `test_privacy`; what the server says in
`tests/server/test_secrets.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.trust_kit import RunningServer, running_server
from wherry_agent import identity, timestamp
from wherry_agent.children import CourierTask, Enrol, Refresh, Renew, Reseal
from wherry_agent.sealing import Seal

KEY = bytes(range(7, 39))
PLANTED = "planted-password-4711"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def run(*argv: str, stdin: bytes = b"", **more: str) -> tuple[int, str]:
    """Run a program of the agent; return its end and everything that it said."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", *argv],
        input=stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **more},
    )
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def courier(task: CourierTask, seal: Seal | None) -> str:
    stdin = msgspec.json.encode(task) + b"\n" + (seal.line() if seal is not None else b"")
    return run("wherry_agent.courier", stdin=stdin)[1]


def secrets_of(home: Path, seal: Seal | None, token: str) -> dict[str, str]:
    """Return what may not be said, each in a form in which it would be."""
    known = identity.load(home, seal)
    assert known is not None
    folder = identity.pair_folder(home, known)
    found = {
        "enrolment token": token.split(".")[1],
        "bearer": known.bearer,
        "frame key": known.mac_key,
        "key at rest": KEY.hex(),
        "key at rest, raw": KEY.decode("latin-1"),
        "password of the private key": identity.password(Seal(KEY, "on")),
        "private key": (folder / identity.KEY_FILE).read_text().splitlines()[2],
    }
    contents = sorted(identity.folder(home).glob("content-*.pem"))
    found |= {f"content key {number}": path.read_text().splitlines()[1] for number, path in enumerate(contents)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "sealed"])
def test_no_program_of_the_agent_says_a_secret(server: RunningServer, tmp_path: Path, sealed: bool) -> None:
    home = tmp_path / "home"
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    at_rest = f'at_rest_key = "file:{key}"\nat_rest = "on"\n' if sealed else ""
    seal = Seal(KEY, "on") if sealed else None
    config = tmp_path / "agent.toml"
    config.write_text(
        f'server = "{server.url}"\ntoken = "{server.enrolment_token}"\nname = "{tmp_path.name[-30:].replace("_", "-")}"\n'
        f'log_level = "debug"\n{at_rest}',
        encoding="utf-8",
    )
    common = ["--home", str(home), "--config", str(config)]
    away = "http://127.0.0.1:9"
    said: dict[str, str] = {}
    code, said["enrol"] = run("wherry_agent.cli", "enrol", *common)
    assert code == 0, said["enrol"]
    secrets = secrets_of(home, seal, server.enrolment_token)
    task = {"home": str(home), "server": server.url}
    said["enrol, refused"] = courier(
        Enrol(home=str(tmp_path / "other"), server=away, token=server.enrolment_token, name="x", labels={}), seal
    )
    said["renew"] = courier(Renew(**task), seal)
    secrets |= {f"{name}, renewed": text for name, text in secrets_of(home, seal, server.enrolment_token).items()}
    said["renew, nobody there"] = courier(Renew(home=str(home), server=away), seal)
    said["refresh"] = courier(Refresh(**task, current=0, floors={}, time_floor_us=0, watched={}), seal)
    said["reseal"] = courier(Reseal(home=str(home)), seal)
    said["no task"] = run("wherry_agent.courier", stdin=b"{\n" + (seal.line() if seal else b""))[1]
    said["no seal"] = run(
        "wherry_agent.courier", stdin=msgspec.json.encode(Reseal(home=str(home))) + b"\n" + b'["zz"]'
    )[1]
    for words in (("status",), ("status", "--json"), ("doctor",), ("doctor", "--json"), ("key",)):
        said[" ".join(words)] = run("wherry_agent.cli", *words, *common)[1]
    known = identity.load(home, seal)
    assert known is not None
    asked = timestamp.question(home, known, server.url, "", identity.password(seal))
    said["timestamp"] = run("wherry_agent.timestamp", stdin=msgspec.json.encode(asked))[1]
    said["timestamp, half a question"] = run("wherry_agent.timestamp", stdin=msgspec.json.encode(asked)[:-9])[1]

    # and when they fail, traceback and all
    broken = tmp_path / "broken"
    shutil.copytree(home, broken)
    document = identity.folder(broken) / identity.DEVICE_FILE
    for file in (document, document.with_name(identity.COPY_FILE)):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    (broken / "journal.json").write_bytes(b"wherry-journal 1 0\n" + secrets["bearer"].encode())
    mixed = ["--home", str(broken), "--config", str(config)]
    for words in (("status",), ("doctor",), ("enrol",), ("run", "--http-port", "0")):
        said[f"{words[0]}, broken"] = run("wherry_agent.cli", *words, *mixed)[1]
    config.write_text(config.read_text() + f'\npassword = "{PLANTED}"\n', encoding="utf-8")
    said["settings"] = run("wherry_agent.cli", "status", *common)[1]
    if sealed:
        other = tmp_path / "other-key"
        other.write_bytes(bytes(32))
        other.chmod(0o600)
        config.write_text(f'at_rest_key = "file:{other}"\nat_rest = "on"\n', encoding="utf-8")
        said["another key"] = run("wherry_agent.cli", "run", *common)[1] + run("wherry_agent.cli", "doctor", *common)[1]
        assert "at_rest_key_other" in said["another key"]

    assert "enrolled" in said["enrol"] or "in project" in said["enrol"]
    assert '"renewed"' in said["renew"]
    assert all(said[name] for name in said if name != "reseal"), "each of them said something"
    assert json.loads(said["doctor --json"].strip().splitlines()[-1])
    for place, text in said.items():
        found = [name for name, secret in secrets.items() if secret in text]
        assert not found, f"{found} in {place}: {text[:400]}"


@pytest.mark.slow
def test_the_operators_command_line_says_no_secret(server: RunningServer, tmp_path: Path) -> None:
    """Whatever fails: a wrong token, a server that is away, a file that is none, also with a traceback asked for."""
    secret = server.token
    more = {"WHERRY_TOKEN": secret, "WHERRY_SERVER": server.url, "HOME": str(tmp_path)}
    bad = tmp_path / "bad.json"
    bad.write_text('{"token": "' + PLANTED + '"')
    commands = [
        ["device", "list"],
        ["--server", "http://127.0.0.1:9", "--token", secret, "device", "list"],
        ["--token", secret + "x", "device", "list"],
        ["apply", str(bad)],
        ["webhook", "add", "hook", "http://user:" + PLANTED + "@127.0.0.1:9/x"],
        ["trust", "publisher", "add", "x", "--key", str(bad)],
        ["bundle", "verify", str(tmp_path)],
        ["no-such-command", "--token", secret],
    ]
    for words in commands:
        code, text = run("wherry_server.cli", *words, **more)
        assert text
        assert (secret + "x") not in text
        assert secret not in text, f"{words[0]}: {text[:300]}"
        assert PLANTED not in text, f"{words}: {text[:300]}"
        assert code or words == ["device", "list"]
