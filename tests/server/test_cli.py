"""The operator's commands against a real server, as a person or a script runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.harness import Running, enrol, release, write_bundle
from wherry_server import calls
from wherry_server.client import Client
from wherry_shared.access import Access, find_access
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.publishing import PublisherKey, sign


def wherry(server: Running | None, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command with access to `server` by the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WHERRY_")}
    if server is not None:
        kept |= {"WHERRY_SERVER": server.url, "WHERRY_TOKEN": server.admin}
    return subprocess.run(
        [sys.executable, "-m", "wherry_server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, "COLUMNS": "160", **environment},
        check=False,
    )


def said(server: Running, *arguments: str) -> object:
    """Return what a command says with `--json`."""
    done = wherry(server, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_names_every_command() -> None:
    done = wherry(None, "--help")
    assert done.returncode == 0
    for command in ("dev", "bundle", "model", "device", "fleet", "token", "trust"):
        assert command in done.stdout


def test_a_bundle_is_pushed_listed_and_shown(server: Running, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "pushed", "2.1.0")
    key = tmp_path / "key.pem"
    refused = wherry(server, "bundle", "push", str(tmp_path / "bundle"), HOME=str(tmp_path))
    assert (refused.returncode, "[unsigned]" in refused.stderr) == (1, True), refused.stderr
    assert "next:" in refused.stderr
    with server.remote() as remote:
        sign(tmp_path / "bundle", remote, PublisherKey.open(key), publisher="pusher")
    done = wherry(server, "bundle", "push", str(tmp_path / "bundle"), "--key", str(key))
    assert done.returncode == 0, done.stderr
    assert "pushed/2.1.0  released" in done.stdout
    listed = said(server, "bundle", "list", "--model", "pushed")
    assert [bundle["version"] for bundle in listed] == ["2.1.0"]  # type: ignore[attr-defined]
    shown = wherry(server, "bundle", "show", "pushed:2.1.0")
    assert "float" in shown.stdout
    assert "MIT" in shown.stdout
    assert "pushed" in wherry(server, "model", "list").stdout
    status = wherry(server, "trust", "status")
    assert "pusher" in status.stdout
    assert "timestamp" in status.stdout


def test_a_device_is_enrolled_by_a_token_from_the_command_and_shown(server: Running, tmp_path: Path) -> None:
    release(server, tmp_path, "carried")
    token = wherry(server, "token", "create", "--quiet", "--label", "site=north").stdout.strip()
    assert token.startswith("wherry1.")
    assert "\n" not in token
    assert enrol(server, token, "cli-1").status_code == 200
    assert enrol(server, token, "cli-2").status_code == 403
    listed = said(server, "device", "list", "--name", "cli-")
    assert [(device["name"], device["labels"]) for device in listed] == [("cli-1", {"site": "north"})]  # type: ignore[attr-defined]
    shown = wherry(server, "device", "show", "cli-1")
    assert "cli-1  device" in shown.stdout
    assert "nothing reported yet" in shown.stdout
    assert "site=north" in wherry(server, "device", "list").stdout
    assert "1 active" in wherry(server, "fleet").stdout


def test_log_lines_that_do_not_come_are_said_to_be_late(server: Running) -> None:
    server.device("silent")
    done = wherry(server, "device", "logs", "silent", "--wait", "0")
    assert (done.returncode, "[logs_late]" in done.stderr) == (1, True)


def test_a_token_for_a_person_works_until_it_is_revoked(server: Running) -> None:
    made = said(server, "token", "api", "ci", "--role", "viewer")
    token = made["token"]  # type: ignore[index]
    assert wherry(server, "model", "list", WHERRY_TOKEN=token).returncode == 0
    refused = wherry(server, "token", "list", WHERRY_TOKEN=token)
    assert (refused.returncode, "[role_missing]" in refused.stderr) == (1, True)
    listed = {row["name"]: row["id"] for row in said(server, "token", "list")}  # type: ignore[attr-defined]
    assert wherry(server, "token", "revoke", listed["ci"]).returncode == 0
    refused = wherry(server, "model", "list", WHERRY_TOKEN=token)
    assert (refused.returncode, "[unauthenticated]" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("device", "show", "nobody"), "device_unknown"),
        (("bundle", "show", "nothing"), "bundle_name_invalid"),
        (("bundle", "show", "nothing:1.0.0"), "bundle_unknown"),
        (("token", "create", "--label", "x"), "labels_invalid"),
        (("token", "api", "x", "--role", "king"), "request_invalid"),
    ],
)
def test_errors_are_said_with_code_and_next_step_or_as_json(
    server: Running, arguments: tuple[str, ...], code: str
) -> None:
    done = wherry(server, *arguments)
    assert done.returncode == 1
    assert f"[{code}]" in done.stderr
    assert "Traceback" not in done.stderr
    machine = wherry(server, *arguments, "--json")
    assert machine.stdout == ""
    assert json.loads(machine.stderr)["code"] == code


def test_without_a_server_the_command_says_what_to_start(tmp_path: Path) -> None:
    done = wherry(None, "fleet", HOME=str(tmp_path))
    assert (done.returncode, "[access_missing]" in done.stderr) == (1, True)
    assert "wherry dev" in done.stderr
    done = wherry(None, "fleet", WHERRY_SERVER="http://127.0.0.1:9", WHERRY_TOKEN="x")
    assert (done.returncode, "[server_unreachable]" in done.stderr) == (1, True)


# --- access -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_environment")
def test_access_comes_from_arguments_then_environment_then_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RefusedError) as caught:
        find_access()
    assert caught.value.code == "access_missing"
    (tmp_path / "client.json").write_text('{"server": "http://saved:1", "token": "saved"}')
    monkeypatch.setenv("WHERRY_DATA", str(tmp_path))
    assert find_access() == Access(server="http://saved:1", token="saved")
    assert find_access(token="mine") == Access(server="http://saved:1", token="mine")
    monkeypatch.setenv("WHERRY_SERVER", "http://other:2/")
    with pytest.raises(RefusedError):
        find_access()  # the saved token is for its own server only
    monkeypatch.setenv("WHERRY_TOKEN", "theirs")
    assert find_access() == Access(server="http://other:2", token="theirs")
    assert find_access("http://third:3", "t") == Access(server="http://third:3", token="t")


@pytest.mark.usefixtures("no_environment")
def test_a_damaged_file_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "client.json").write_text("{")
    with pytest.raises(RefusedError) as caught:
        find_access(data=tmp_path)
    assert caught.value.code == "client_file_invalid"


def test_problems_come_back_as_the_errors_that_were_raised(server: Running) -> None:
    with Client(Access(server=server.url, token=server.admin)) as client:
        with pytest.raises(RefusedError) as refused:
            client.send(calls.show_device("nobody"))
        assert refused.value.code == "device_unknown"
        assert refused.value.next_step
        assert client.send(calls.has_blob(f"sha256:{'0' * 64}")) is False
    with Client(Access(server="http://127.0.0.1:9", token="x")) as client:
        with pytest.raises(UnreachableError) as unreachable:
            client.send(calls.fleet_state())
        assert unreachable.value.code == "server_unreachable"


def test_a_forecast_says_what_sample_each_gate_needs(server: Running, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'stages = [{share = 1.0}]\ngates = [{metric = "crash_rate", harm = 0.5}, {metric = "app:agreed", better = "higher",'
        ' harm = 0.1}, {metric = "crashed", tolerated = 0.02, harm = 0.1}]\n'
    )
    done = wherry(server, "rollout", "simulate", str(plan), "--devices", "200", "--silent", "0", "--runs", "1")
    assert done.returncode == 0, done.stderr
    assert "gate crash_rate needs about 205 devices 0.5 h after they have it (51.2 device-hours) or 76 " in done.stdout
    assert "gate app:agreed needs about " in done.stdout
    assert "gate crashed needs about " in done.stdout
    assert " devices that settled" in done.stdout
    again = said(server, "rollout", "simulate", str(plan), "--devices", "50", "--worse", "3", "--runs", "1")
    assert isinstance(again, dict)
    assert [one["gate"] for one in again["needs"]] == ["crash_rate", "app:agreed", "crashed"]
