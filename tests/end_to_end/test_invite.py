"""A device on another machine of the network, by one pasted line: `wherry dev --lan`, `wherry device invite`, and nothing else.

The other machine is a network namespace with an address of its own, and folders of its own in the place of a disk. What the line
installs from a package index, the server gives here as wheels of what is installed in this environment.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.server
import itertools
import json
import os
import pwd
import re
import secrets
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.end_to_end.test_wheels import declared
from tests.server.harness import free_port, until
from tests.server.test_dev import dev
from tests.services import needs, needs_network_namespaces
from wherry_server import wheels
from wherry_server.identity import DeviceAuthority
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


@contextlib.contextmanager
def shown_in_lists_of_processes(secret: str) -> Iterator[set[str]]:
    """Look again and again which commands have a secret in their arguments, until the block ends."""
    found: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    words = path.read_bytes()
                    if secret.encode() in words:
                        found.add(words.replace(b"\0", b" ").decode(errors="replace"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join(20)


@contextlib.contextmanager
def in_between(authority: DeviceAuthority, answers: dict[str, bytes]) -> Iterator[str]:
    """Be a server with a certificate of an authority of its own, on loopback; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path])

        def log_message(self, *_words: object) -> None:
            pass

    pair = authority.issue_server(["127.0.0.1"], days=1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pair.certificate + pair.key)
        file.flush()
        context.load_cert_chain(file.name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(20)


def make_authority(folder: Path, *, padded: bool) -> DeviceAuthority:
    """Make authorities until the base64 of one's certificate ends in padding, where decoders stop to read, or does not."""
    for number in itertools.count():
        here = folder / str(number)
        here.mkdir(parents=True)
        DeviceAuthority.create(here, "somebody")
        made = DeviceAuthority.open(here, days=1)
        if ("=" in made.ca_pem) is padded:
            return made
    raise AssertionError


def first_contact(address: str, digest: str, folder: Path) -> list[str]:
    authority = join.fetch_authority(address, digest)
    return join.wheels(address, ssl.create_default_context(cadata=authority), folder)


@pytest.mark.parametrize("padded", [True, False])
def test_what_somebody_in_between_puts_beside_the_right_authority_is_not_believed(tmp_path: Path, padded: bool) -> None:
    right = make_authority(tmp_path / "right", padded=padded)
    thief = make_authority(tmp_path / "thief", padded=True)
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(right.ca_pem)).hexdigest()
    for shown in (right.ca_pem + thief.ca_pem, thief.ca_pem + right.ca_pem, thief.ca_pem):
        answers = {"/install/ca.pem": shown.encode(), "/install/wheels.json": b"{}"}
        with in_between(thief, answers) as address, pytest.raises(SystemExit):
            first_contact(address, digest, tmp_path)
    answers = {"/install/ca.pem": right.ca_pem.encode(), "/install/wheels.json": b"{}"}
    with in_between(right, answers) as address:
        assert first_contact(address, digest, tmp_path) == []


@pytest.mark.slow
def test_the_servers_agent_is_installed_whatever_the_index_has_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, index = tmp_path / "wheels", tmp_path / "simple"
    give_wheels(folder)
    own = wheels.own()
    for name, data in own.items():
        (folder / name).write_bytes(data)
    for member in ("wherry-agent", "wherry-shared"):
        module = member.replace("-", "_")
        info = f"{module}-999.0.dist-info"
        files = {
            f"{module}/__init__.py": b"raise SystemExit('of a thief')",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {member}\nVersion: 999.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: thief\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": b"[console_scripts]\nwherry-agent = wherry_agent.cli:main\n",
        }
        shelf = index / member
        shelf.mkdir(parents=True)
        (shelf / f"{module}-999.0-py3-none-any.whl").write_bytes(wheels.pack(files, info))
        link = f'<a href="{module}-999.0-py3-none-any.whl">{module}-999.0-py3-none-any.whl</a>'
        (shelf / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    monkeypatch.setenv("PIP_INDEX_URL", index.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    prefix = tmp_path / "env"
    chosen = argparse.Namespace(prefix=str(prefix), engine="none", no_index=False, server="https://here:1")
    agent = join.install(chosen, folder, list(own))
    said = subprocess.run([agent, "--version"], capture_output=True, text=True, timeout=60)
    assert said.stdout.split() == ["wherry-agent", metadata.version("wherry-agent")], said.stderr
    listed = subprocess.run(
        [prefix / "bin" / "python", "-m", "pip", "list", "--format", "json"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    versions = {one["name"].replace("_", "-"): one["version"] for one in json.loads(listed.stdout)}
    assert versions["wherry-shared"] == metadata.version("wherry-shared")
    # and the index is one that pip takes from, if it is asked by name
    named = [prefix / "bin" / "python", "-m", "pip", "download", "--no-deps", "--find-links", folder, "wherry-agent"]
    done = subprocess.run(named, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (tmp_path / "wherry_agent-999.0-py3-none-any.whl").exists(), done.stderr


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
                "TMPDIR": str(folder / "tmp"),
            }
            (folder / "tmp").mkdir()  # where anybody may put something beside the program
            (folder / "tmp" / "argparse.py").write_text("raise SystemExit('of a thief')")
            options = f" --no-service --no-index --engine none --prefix {folder}/env --home {folder}/home"

            forged = line.replace(line.split("--ca ")[1][:8], "00000000")
            done = subprocess.run(
                [*inside, "bash", "-c", forged + options], env=env, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 1
            assert "somebody may be in between" in done.stderr
            assert not (folder / "env").exists()

            with shown_in_lists_of_processes(line.split("echo wherry1.")[1].split(".")[0]) as shown:
                done = subprocess.run(  # the shell reads the line, as where it is pasted
                    [*inside, "bash"], input=line + options, env=env, capture_output=True, text=True, timeout=180
                )
            assert done.returncode == 0, done.stdout + done.stderr
            assert shown == set(), "anybody on that machine could read the token"
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
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 56 + "-" * 3 + "x")
    assert re.fullmatch(r"h{56}-[0-9a-f]{6}", join.arguments().name), "no longer than a name may be"
    assert re.fullmatch(r"[A-Za-z0-9-]+-[0-9a-f]{6}", chosen.name)
    home = tmp_path / "home"
    join.prepare(home, chosen)
    assert stat.S_IMODE(home.stat().st_mode) == 0o710
    join.unit(chosen, Path(sys.executable).parent / "wherry-agent", home)
    text = (tmp_path / "wherry-agent.service").read_text()
    assert f"User={me}\nGroup={me}\n" in text
    assert f"run --home {home}\n" in text
    assert asked == [["systemctl", "daemon-reload"], ["systemctl", "enable", "--now", "wherry-agent"]]
