"""`wherry dev` as real processes: first start, a child killed, second start, no parent without its children's end."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx
import paho.mqtt.client as mqtt
import pytest

from tests.server.harness import csr, free_port, until
from wherry_server.forked import Forked, Gate
from wherry_server.supervision import BACK_OFF_MAX_S, Child, Supervisor, back_off_s
from wherry_shared import wire
from wherry_shared.limits import MQTT_PAYLOAD_BYTES_MAX

WHERRY = [sys.executable, "-m", "wherry_server.cli"]


@contextmanager
def dev(data: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run `wherry dev` until the block ends, if it did not end before."""
    process = subprocess.Popen(
        [*WHERRY, "dev", "--data", str(data), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/v1/health", trust_env=False, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def children_of(parent: int) -> list[int]:
    """Return the process ids of the living children."""
    return [
        int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split() if not gone([int(pid)])
    ]


def child(parent: int, role: str) -> int | None:
    """Return the process id of the child with a role."""
    for pid in children_of(parent):
        if Path(f"/proc/{pid}/comm").read_text().strip() == f"wherry {role}":
            return pid
    return None


def gone(pids: list[int]) -> bool:
    """Tell whether none of the processes runs any more (a zombie does not)."""
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            return False
    return True


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[str, str]:
    process.send_signal(number)
    return process.communicate(timeout=30)


def test_what_roles_are_forked_from_has_no_threads() -> None:
    seen = "import os, wherry_server.dev; print(len(os.listdir('/proc/self/task')))"
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout == "1\n"


def test_those_who_wait_at_a_gate_end_with_whoever_holds_it(tmp_path: Path) -> None:
    passed = tmp_path / "passed"

    def body(gate: Gate) -> None:
        gate.wait()
        passed.touch()

    held, opened = Gate(), Gate()
    for gate in (held, opened):
        gate.expect()
    left, went = Forked(lambda: body(held)), Forked(lambda: body(opened))
    opened.open()
    assert (went.wait(20), passed.exists()) == (0, True)
    assert left.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        left.wait(0.05)
    held.close()
    assert left.wait(20) == 1
    opened.close()
    ended = Forked(lambda: time.sleep(60))
    ended.kill()
    assert (ended.wait(20), ended.returncode) == (-signal.SIGKILL, -signal.SIGKILL)


@pytest.mark.services
def test_a_development_server_starts_survives_the_death_of_a_child_and_goes_on_with_its_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    port, broker_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    with dev(data, "--port", str(port), "--broker-port", str(broker_port)) as process:
        until(lambda: answers(url) or process.poll() is not None, 60)
        client = json.loads((data / "client.json").read_text())
        assert client["server"] == url
        assert stat.S_IMODE((data / "client.json").stat().st_mode) == 0o600
        until(lambda: child(process.pid, "director"))

        before = child(process.pid, "api")
        assert before is not None
        os.kill(before, signal.SIGKILL)
        after = until(lambda: next((pid for pid in [child(process.pid, "api")] if pid and pid != before), None))
        until(lambda: answers(url), 60)
        until(lambda: len(children_of(process.pid)) == 3)
        children = children_of(process.pid)
        assert after in children

        big = _through_broker(broker_port, b"x" * MQTT_PAYLOAD_BYTES_MAX)
        assert len(big) == MQTT_PAYLOAD_BYTES_MAX

        with dev(data) as second:
            _, err = second.communicate(timeout=30)
            assert (second.returncode, "[already_running]" in err) == (1, True)

        out, err = end(process)
        assert process.returncode == 0
        assert "api ended (signal 9)" in err
        assert "restart 1" in err
        assert client["token"] in out
        assert "no access control, no TLS" in out
        enrolment = next(word for word in out.split() if word.startswith("wherry1."))
        until(lambda: gone(children))

    with dev(data) as process:
        until(lambda: answers(url) or process.poll() is not None, 60)
        with httpx.Client(base_url=url, trust_env=False) as http:
            http.headers["Authorization"] = f"Bearer {client['token']}"
            assert http.get("/api/v1/tokens").status_code == 200, "the second start knows the first token"
            made = http.get("/api/v1/audit", params={"action": "token.create"}).json()
            assert [(one["actor"], one["subject"], one["detail"]["role"]) for one in made] == [
                ("server:dev", "dev", "admin")
            ]
        request = wire.EnrolRequest(format=1, token=enrolment, csr_pem=csr(), name="first")
        enrolled = httpx.post(f"{url}/device/v1/enrol", content=wire.encode(request), trust_env=False)
        assert wire.parse(wire.EnrolAnswer, enrolled.content).broker_port == broker_port
        out, _ = end(process, signal.SIGINT)
        assert process.returncode == 0
        assert client["token"] not in out, "the token is shown once"


@pytest.mark.services
def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    port = free_port()
    with dev(tmp_path, "--port", str(port), "--broker-port", str(free_port()), "--quiet") as process:
        until(lambda: answers(f"http://127.0.0.1:{port}") or process.poll() is not None, 60)
        children = children_of(process.pid)
        assert len(children) >= 2
        process.kill()
        process.wait(10)
        until(lambda: gone(children))


def test_a_port_in_use_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option, other in (("--port", "--broker-port"), ("--broker-port", "--port")):
            with dev(tmp_path / "data", option, str(port), other, str(free_port())) as process:
                _, err = process.communicate(timeout=30)
            assert process.returncode == 1
            assert "[port_in_use]" in err
            assert f"wherry dev {option} PORT" in err
            assert not (tmp_path / "data" / "wherry.sqlite").exists()


def test_the_wait_before_a_restart_grows_and_is_bounded() -> None:
    waits = [back_off_s(failures) for failures in range(40)]
    assert waits == sorted(waits)
    assert waits[0] == 0
    assert waits[-1] == BACK_OFF_MAX_S


def test_a_child_that_keeps_ending_is_counted_and_not_started_in_a_hurry(tmp_path: Path) -> None:
    said: list[str] = []
    failing = Child(
        name="failing", command=[sys.executable, "-c", "print('why'); raise SystemExit(3)"], log=tmp_path / "l"
    )
    steady = Child(name="steady", command=[sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "s")
    supervisor = Supervisor([failing, steady], said.append)
    supervisor.start()

    def turned() -> bool:
        supervisor.turn()
        return failing.failures >= 3

    until(turned)
    assert steady.running
    assert steady.restarts == 0
    assert failing.restarts == 3
    assert "failing ended (code 3)" in said[0]
    assert "why" in failing.tail()
    supervisor.stop()
    assert not steady.running


def _through_broker(port: int, payload: bytes) -> bytes:
    """Publish and receive one message."""
    ready, received = Event(), Event()
    found: list[bytes] = []
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="round-trip", protocol=mqtt.MQTTv311)
    client.on_connect = lambda *_: client.subscribe("w1/round/trip", qos=1)
    client.on_subscribe = lambda *_: ready.set()

    def arrived(_client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        found.append(message.payload)
        received.set()

    client.on_message = arrived
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        assert ready.wait(10)
        client.publish("w1/round/trip", payload, qos=1)
        assert received.wait(10)
    finally:
        client.disconnect()
        client.loop_stop()
    return found[0]
