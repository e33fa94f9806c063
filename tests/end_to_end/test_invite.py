"""A device on another machine of the network, by one pasted line: `wherry dev --lan`, `wherry device invite`, and nothing else.

The other machine is a network namespace with an address of its own, and folders of its own in the place of a disk. What the line
installs from a package index, the server gives here as wheels of what is installed in this environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.end_to_end.test_wheels import declared
from tests.server.harness import free_port, until
from tests.server.test_dev import dev
from tests.services import needs, needs_network_namespaces
from wherry_server import wheels
from wherry_server.install import join

pytestmark = pytest.mark.services
START_S = 120.0


@contextlib.contextmanager
def other_machine() -> Iterator[tuple[str, str]]:
    """Make a namespace that is joined to this one by a cable; gives its name and this side's address."""
    needs_network_namespaces()
    name, number = f"wherry-{secrets.token_hex(3)}", secrets.randbelow(200) + 20
    near, far = f"10.213.{number}.1", f"10.213.{number}.2"
    cable = name[-6:]
    try:
        for words in (
            f"ip netns add {name}",
            f"ip link add wa{cable} type veth peer name wb{cable} netns {name}",
            f"ip addr add {near}/30 dev wa{cable}",
            f"ip link set wa{cable} up",
            f"ip -n {name} addr add {far}/30 dev wb{cable}",
            f"ip -n {name} link set wb{cable} up",
            f"ip -n {name} link set lo up",
        ):
            subprocess.run(words.split(), check=True, timeout=30)
        yield name, near
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


def give_wheels(folder: Path) -> None:
    """Make wheels of everything that the agent needs, out of this environment."""
    folder.mkdir(parents=True)
    needed: dict[str, metadata.Distribution] = {}
    declared(metadata.distribution("wherry-agent"), frozenset(), needed)
    for distribution in needed.values():
        info = next(file.parts[0] for file in distribution.files or [] if file.parts[0].endswith(".dist-info"))
        inside = [
            file
            for file in distribution.files or []
            if ".." not in file.parts and "__pycache__" not in file.parts and file.name != "RECORD"
        ]
        files = {file.as_posix(): Path(str(distribution.locate_file(file))).read_bytes() for file in inside}
        tag = next(line for line in (distribution.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: "))
        name = f"{info.removesuffix('.dist-info')}-{tag.removeprefix('Tag: ')}.whl"
        (folder / name).write_bytes(wheels.pack(files, info))


def wherry(data: Path, *words: str) -> str:
    command = [sys.executable, "-m", "wherry_server.cli", *words]
    env = {**os.environ, "WHERRY_DATA": str(data)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_one_line_makes_a_machine_of_the_network_a_device(tmp_path: Path) -> None:
    needs("mosquitto", "curl", "sha256sum")
    data, folder = tmp_path / "data", tmp_path / "device"
    folder.mkdir()
    give_wheels(data / "wheels")
    with other_machine() as (machine, address):
        ports = ["--port", str(free_port()), "--broker-port", str(free_port())]
        with dev(data, "--lan", address, *ports) as process:
            assert process.stdout is not None
            assert any("Ctrl-C" in said for said in iter(process.stdout.readline, "")), process.stderr
            line = wherry(data, "device", "invite", "--count", "2", "--label", "site=desk").strip()
            assert len(line.splitlines()) == 1
            inside = ["ip", "netns", "exec", machine]
            env = {
                "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin",
                "HOME": str(folder),
                "TMPDIR": "/tmp",
            }
            options = f" --no-service --no-index --engine none --prefix {folder}/env --home {folder}/home"

            forged = line.replace(line.split("--ca ")[1][:8], "00000000")
            done = subprocess.run(
                [*inside, "bash", "-c", forged + options], env=env, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 1
            assert "somebody may be in between" in done.stderr
            assert not (folder / "env").exists()

            done = subprocess.run(
                [*inside, "bash", "-c", line + options], env=env, capture_output=True, text=True, timeout=180
            )
            assert done.returncode == 0, done.stdout + done.stderr
            agent = subprocess.Popen(
                [
                    *inside,
                    str(folder / "env/bin/wherry-agent"),
                    "run",
                    "--home",
                    str(folder / "home"),
                    "--http-port",
                    "0",
                ],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=(folder / "log").open("wb"),
            )
            try:
                ask = [
                    *inside,
                    str(folder / "env/bin/wherry-agent"),
                    "status",
                    "--json",
                    "--home",
                    str(folder / "home"),
                ]

                def connected() -> bool:
                    assert agent.poll() is None, (folder / "log").read_text()
                    found = subprocess.run(ask, env=env, capture_output=True, text=True, timeout=60)
                    return found.returncode == 0 and json.loads(found.stdout).get("connected") == "mqtt"

                until(connected, START_S)
                (device,) = json.loads(wherry(data, "device", "list", "--json"))
                assert device["labels"] == {"site": "desk"}
                until(lambda: json.loads(wherry(data, "device", "show", device["name"], "--json"))["agent"], START_S)
                wherry(data, "device", "revoke", device["name"])
                until(lambda: not connected(), START_S)
            finally:
                agent.terminate()
                agent.wait(60)


def test_the_unit_of_an_invited_device_is_written_for_its_user_and_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the line, with the agent's own unit and a systemd that only writes down what it was asked."""
    asked: list[list[str]] = []
    monkeypatch.setattr(join, "run", lambda command, _consequence: asked.append(command))
    monkeypatch.setattr(join, "SYSTEMD", tmp_path)
    me = pwd.getpwuid(os.getuid()).pw_name
    words = ["join", "https://a:1", "--ca", "c", "--token", "t", "--units", str(tmp_path), "--user", me, "--many"]
    monkeypatch.setattr(sys, "argv", words)
    chosen = join.arguments()
    assert re.fullmatch(r"[A-Za-z0-9-]+-[0-9a-f]{6}", chosen.name)
    home = tmp_path / "home"
    join.prepare(home, chosen)
    assert stat.S_IMODE(home.stat().st_mode) == 0o710
    join.unit(chosen, Path(sys.executable).parent / "wherry-agent", home)
    text = (tmp_path / "wherry-agent.service").read_text()
    assert f"User={me}\nGroup={me}\n" in text
    assert f"run --home {home}\n" in text
    assert asked == [["systemctl", "daemon-reload"], ["systemctl", "enable", "--now", "wherry-agent"]]
