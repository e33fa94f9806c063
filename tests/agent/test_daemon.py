"""The supervisor among real processes: server, broker, courier, canary, worker, and kills at bad moments."""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as mqtt
import pytest
import tritonclient.grpc as triton

from tests.agent.daemon_kit import MODEL, Agent, Site, agent, alive, children_of, free_ports, site
from tests.agent.serving_kit import until
from tests.shared.engines import models
from wherry_agent import identity
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk
from wherry_agent.envelopes import MINUTE_S, STARTS_PER_MINUTE_MAX
from wherry_agent.handle import Model
from wherry_agent.journal import Journal
from wherry_shared import dsse, topics, wire
from wherry_shared.digest import hex_of, of_file

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with site(folder) as made:
        made.release("1.0.0", models.scale(folder / "one.onnx", 2.0))
        made.release("1.1.0", models.scale(folder / "two.onnx", 3.0))
        made.release("1.2.0", models.choosy(folder / "choosy.onnx", 3.0))
        made.release("1.3.0", models.scale(folder / "four.onnx", 4.0), spoil=True)
        made.release("1.4.0", models.scale(folder / "five.onnx", 5.0))
        yield made


@pytest.fixture(scope="module")
def device(server: Site) -> Iterator[Agent]:
    with agent(server, "bench-1", "--label", "site=lab", "--grpc-port", str(free_ports(1)[0])) as made:
        made.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        server.deploy("1.0.0", "bench-1", trial_s=2)
        made.until_serves("1.0.0")
        yield made


def test_a_first_model_is_enrolled_verified_proved_and_served(device: Agent) -> None:
    model = device.until_serves("1.0.0")
    assert model["last_report"]["state"] == "confirmed_idle"
    assert model["serves"]["engine"].startswith("onnxruntime ")
    assert model["serves"]["why"]
    code, body = device.infer()
    assert (code, body["outputs"][0]["data"]) == (200, [2.0, 2.0, 4.0, 6.0])


def test_grpc_is_served_beside_http_on_a_port_and_a_unix_socket(device: Agent) -> None:
    shown = device.until("gRPC is served", lambda shown: shown["grpc_doing"] == shown["grpc_socket_doing"] == "served")
    path = device.home / "run" / "grpc.sock"
    assert shown["grpc_socket"] == str(path)
    assert path.stat().st_mode == (device.home / "run" / "worker.sock").stat().st_mode
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 1, 2, 3]], np.float32))
    for address in (shown["grpc"], f"unix:{path}"):
        with triton.InferenceServerClient(address) as client:
            answer = client.infer(MODEL, [tensor], client_timeout=20)
        assert (answer.get_response().model_version, answer.as_numpy("y").tolist()) == ("1.0.0", [[2, 2, 4, 6]])
    argv = [sys.executable, "-m", "wherry_agent.cli"]
    said = [
        subprocess.run([*argv, word, "--home", str(device.home)], capture_output=True, text=True, timeout=60).stdout
        for word in ("status", "doctor")
    ]
    assert all(f"unix:{path}" in text and shown["grpc"] in text for text in said), said


def test_reports_reach_the_server_and_are_owed_no_more(device: Agent, server: Site) -> None:
    device.until_serves("1.0.0")
    device.until("every report is acknowledged", lambda shown: shown["reports_owed"] == 0)

    def known() -> bool:
        _, shown = server.call("GET", "/api/v1/devices/bench-1")
        return "confirmed_idle" in msgspec.json.encode(shown).decode()

    until(known, "the server knows that it is confirmed", 20)


def test_an_operator_who_asks_gets_the_last_log_lines(device: Agent, server: Site) -> None:
    device.until("it is connected", lambda shown: shown["connected"] == "mqtt")
    assert server.call("POST", "/api/v1/devices/bench-1/logs")[0] == 202

    def lines() -> list[str]:
        return list(server.call("GET", "/api/v1/devices/bench-1/logs")[1]["lines"])

    until(lambda: any("is the director's" in line for line in lines()), "the lines are there", 30)


def test_status_says_what_runs_and_why_in_words(device: Agent) -> None:
    device.until_serves("1.0.0")
    argv = [sys.executable, "-m", "wherry_agent.cli", "status", "--home", str(device.home)]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
    assert f"{MODEL}/1.0.0 variant float" in said
    assert "because " in said


def test_a_reader_that_has_seen_enough_is_no_error(device: Agent) -> None:
    argv = [sys.executable, "-m", "wherry_agent.cli", "status", "--home", str(device.home)]
    nobody_reads, written = os.pipe()
    os.close(nobody_reads)
    try:
        said = subprocess.run(argv, stdout=written, stderr=subprocess.PIPE, text=True, timeout=30)
    finally:
        os.close(written)
    assert said.stderr == ""


def test_a_second_agent_on_the_same_home_refuses_to_start(device: Agent) -> None:
    argv = [sys.executable, "-m", "wherry_agent.cli", "run", "--home", str(device.home), "--http-port", "0"]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert said.returncode == 1
    assert "already_running" in said.stderr
    assert "next:" in said.stderr


def test_the_log_tells_the_way_of_a_version_one_line_a_step(device: Agent) -> None:
    device.until_serves("1.0.0")
    story = device.log.read_text()
    steps = ["idle → choosing a variant", "downloading → in the canary", "being swapped in → on trial"]
    assert [step for step in steps if f"{MODEL}: {step} · {MODEL}/1.0.0" in story] == steps
    assert " requests, 0 failed, 0 answered by the incumbent, latency ratio " in story
    assert f"worker serves {MODEL}: sha256:" in story


def doctor(home: Path, *flags: str) -> dict[str, tuple[bool, str]]:
    argv = [sys.executable, "-m", "wherry_agent.cli", "doctor", "--json", "--home", str(home), *flags]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    return {item["check"]: (item["ok"], item["detail"]) for item in msgspec.json.decode(said.stdout)}


def test_the_doctor_looks_at_clock_and_server(device: Agent, tmp_path: Path) -> None:
    device.until_serves("1.0.0")
    found = doctor(device.home)
    assert found["server"] == (True, f"{device.site.url} answers 200 for trust metadata")
    assert found["clock"][0]
    assert "which was verified" in found["clock"][1]
    (tmp_path / "dead.toml").write_text('server = "http://127.0.0.1:1"\n')
    dead = doctor(device.home, "--config", str(tmp_path / "dead.toml"))
    assert not dead["server"][0]
    journal = Journal(Disk(), device.home / "journal.json")
    state = journal.read(lambda: "")[0]
    assert state is not None
    assert state.trust is not None
    (tmp_path / "run").mkdir()
    ahead = msgspec.structs.replace(state.trust, time_floor_us=state.trust.time_floor_us + 10**15)
    Journal(Disk(), tmp_path / "journal.json").write(replace(state, trust=ahead))
    clock = doctor(tmp_path)["clock"]
    assert not clock[0]
    assert "set the clock" in clock[1]


def test_a_killed_worker_refuses_nobody_and_is_followed_by_the_next(device: Agent, server: Site) -> None:
    with Model(MODEL, socket=device.home / "run" / "handle.sock", timeout_s=20) as handle:
        handle.tell("agreed", 0.5, handle.run({"x": np.ones((1, 4), np.float32)}))
    shown = device.until("the worker runs, and no handle", lambda shown: shown["worker_pid"] and not shown["handles"])
    os.kill(shown["worker_pid"], signal.SIGKILL)
    assert set(device.ask(20)) == {"1.0.0"}
    again = device.until("another worker runs", lambda now: now["worker_pid"] not in (0, shown["worker_pid"]))
    assert again["pid"] == shown["pid"]

    def told(query: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(f"file:{server.data / 'wherry.sqlite'}?mode=ro", uri=True)) as database:
            return database.execute(query).fetchall()

    crashes = "SELECT arm, requests, crashes FROM telemetry_window WHERE crashes > 0"
    until(lambda: told(crashes) == [("incumbent", 0, 1)], "the server knows of the death")
    metrics = "SELECT name, arm, count, total FROM telemetry_metric"
    until(lambda: told(metrics) == [("agreed", "incumbent", 1, 0.5)], "and of what the application told")


def test_messages_that_are_no_offers_change_nothing(device: Agent) -> None:
    known = identity.load(device.home)
    assert known is not None
    before = device.status()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect(known.broker_host, known.broker_port)
    client.loop_start()
    for payload in (b"{}", b"not json", b"\xff\xfe", b"x" * 90_000, b'{"payload":"e30=","keyid":"a","sig":"AAAA"}'):
        client.publish(topics.down(known.device, "offer"), payload, qos=1).wait_for_publish(5)
        client.publish(topics.down(known.device, "ack"), payload, qos=1).wait_for_publish(5)
    client.disconnect()
    client.loop_stop()
    until(lambda: device.log.read_text().count("an offer is ignored") >= 5, "each was looked at")
    after = device.status()
    assert (after["offer"], after["models"]) == (before["offer"], before["models"])
    assert after["pid"] == before["pid"]


def forged(real: bytes, more: int) -> bytes:
    """Return an offer of a higher serial under the director's key id, signed by nobody."""
    envelope, payload, _ = dsse.open_envelope(real)
    offer = wire.parse(wire.Offer, payload)
    claimed = msgspec.structs.replace(offer, serial=offer.serial + 1000 + more)
    return dsse.sign(dsse.OFFER_TYPE, wire.encode(claimed), envelope.keyid, lambda _message: bytes(64))


@pytest.mark.slow
def test_a_stream_of_forged_offers_keeps_no_real_one_away(device: Agent, server: Site) -> None:
    known = identity.load(device.home)
    assert known is not None
    topic = topics.down(known.device, "offer")
    with Http(server=server.url, authorization=known.authorization).request(
        "GET", f"{server.url}/device/v1/offer"
    ) as answer:
        real = answer.read(1 << 20)
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.connect(known.broker_host, known.broker_port)
    client.loop_start()
    began = time.monotonic()
    looked = device.log.read_text().count("an offer is not acted on")
    for serial in range(200):
        client.publish(topic, forged(real, serial), qos=1, retain=serial % 2 == 0).wait_for_publish(5)
    server.deploy("1.1.0", "bench-1", trial_s=2)
    for serial in range(200, 400):
        client.publish(topic, forged(real, serial), qos=1, retain=serial % 2 == 0).wait_for_publish(5)
    device.until_serves("1.1.0", deadline_s=120)
    looked = device.log.read_text().count("an offer is not acted on") - looked
    minutes = (time.monotonic() - began) / MINUTE_S
    assert looked <= STARTS_PER_MINUTE_MAX * (int(minutes) + 1)
    client.publish(topic, b"", qos=1, retain=True).wait_for_publish(5)
    client.disconnect()
    client.loop_stop()
    server.deploy("1.0.0", "bench-1", trial_s=2, attempt=2)
    device.until_serves("1.0.0", deadline_s=120)


def test_a_bundle_that_misses_its_golden_vectors_never_serves(device: Agent, server: Site) -> None:
    server.deploy("1.3.0", "bench-1")
    shown = device.until("it failed", lambda s: s["models"][MODEL].get("last_report", {}).get("state") == "failed")
    assert shown["models"][MODEL]["last_report"]["reason"] == "golden_miss"
    assert set(device.ask(3)) == {"1.0.0"}
    assert shown["known_bad"]


def test_a_candidate_that_fails_on_some_input_goes_back_and_callers_do_not_notice(device: Agent, server: Site) -> None:
    device.ask(20)
    server.deploy("1.2.0", "bench-1")
    device.until_doing("on trial")
    for _ in range(200):
        assert device.infer(7.0)[0] == 200
        if device.model()["doing"] != "on trial":
            break
    model = device.until_serves("1.0.0")
    assert (model["last_report"]["state"], model["last_report"]["reason"]) in {
        ("returned", "health_errors"),
        ("confirmed", ""),  # when the halted rollout's offer came after it
    }
    assert "health_errors" in device.log.read_text()
    assert set(device.ask(3)) == {"1.0.0"}


def test_an_agent_killed_in_a_trial_goes_on_with_it(device: Agent, server: Site) -> None:
    server.deploy("1.1.0", "bench-1")
    device.until_doing("on trial")
    orphans = children_of(device.child.pid)
    device.kill()
    until(lambda: not any(alive(pid) for pid in orphans), "its children died with it")
    device.start()
    model = device.until_doing("on trial")
    assert model["trial"]["restarts"] == 1
    versions = device.ask(60)
    assert set(versions) == {"1.1.0"}
    device.until_serves("1.1.0")


def test_a_candidate_under_which_the_agent_goes_down_each_time_is_bad_and_one_that_is_stopped_is_not(
    device: Agent, server: Site
) -> None:
    if device.model()["serves"]["target"] != f"{MODEL}/1.1.0":
        server.deploy("1.1.0", "bench-1", trial_s=2)  # where no test before this one has brought it
        device.until_serves("1.1.0")
    server.deploy("1.4.0", "bench-1")
    device.until_doing("on trial")
    assert device.stop() == 0
    device.start()
    trial = device.until_doing("on trial")["trial"]
    assert (trial["restarts"], trial["downs"]) == (1, 0)
    for downs in (1, 2, 3):
        orphans = children_of(device.child.pid)
        device.kill()
        until(lambda left=orphans: not any(alive(pid) for pid in left), "its children died with it")
        device.start()
        if downs < 3:
            assert device.until_doing("on trial")["trial"]["downs"] == downs
    model = device.until_serves("1.1.0")
    assert (model["last_report"]["state"], model["last_report"]["reason"]) in {
        ("returned", "device_down"),
        ("confirmed", ""),  # when the halted rollout's offer came after it
    }
    assert set(device.ask(3)) == {"1.1.0"}
    state, _ = Journal(Disk(), device.home / "journal.json").read(lambda: "new")
    assert state is not None
    assert "device_down" in {bad.reason for bad in state.known_bad}


def test_a_server_that_was_away_and_whose_broker_forgot_everything_is_caught_up_with(
    device: Agent, server: Site
) -> None:
    device.until("nothing is owed", lambda shown: shown["reports_owed"] == 0)
    server.stop()
    device.until("the broker is missed", lambda shown: shown["connected"] != "mqtt")
    assert set(device.ask(3)) == {"1.1.0"}
    server.start_again()
    device.until("it is connected again", lambda shown: shown["connected"] == "mqtt", deadline_s=90)
    server.deploy("1.0.0", "bench-1", trial_s=2, attempt=2)
    device.until_serves("1.0.0")
    device.until("nothing is owed", lambda shown: shown["reports_owed"] == 0)


def test_a_file_altered_on_the_device_serves_nobody_is_reported_and_fetched_again(device: Agent, server: Site) -> None:
    device.until_serves("1.0.0")
    weights = server.folder / "one.onnx"
    blob = device.home / "store" / "blobs" / "sha256" / hex_of(of_file(weights))
    assert blob.read_bytes() == weights.read_bytes()
    models.scale(blob, 9.0)  # a model that works, and is not the one that was signed
    device.ask(1)
    os.kill(device.status()["worker_pid"], signal.SIGKILL)

    def story() -> str:
        return device.log.read_text()

    until(lambda: "returned · scale/1.0.0 · digest_mismatch" in story(), "it is reported")
    device.until_serves("1.0.0")
    code, body = device.infer()
    assert (code, body["outputs"][0]["data"]) == (200, [2.0, 2.0, 4.0, 6.0])
    assert blob.read_bytes() == weights.read_bytes()
    assert story().count("returned · scale/1.0.0 · digest_mismatch") == 1, "once, not in a loop"


def test_sigterm_ends_it_in_order_and_the_journal_answers_then(device: Agent) -> None:
    served = device.until_serves("1.0.0")["serves"]
    assert device.stop() == 0
    shown = device.status()
    assert shown["running"] is False
    assert shown["models"][MODEL]["serves"] == served
    assert not (device.home / "run" / "agent.sock").exists()


@pytest.mark.slow
def test_without_a_broker_offers_and_reports_go_over_http(server: Site) -> None:
    with agent(server, "bench-2") as lonely:
        lonely.until("it is enrolled", lambda shown: shown["connected"] == "mqtt")
        assert lonely.stop() == 0
        path = lonely.home / "identity" / "device.json"
        known = msgspec.json.decode(path.read_bytes())
        path.write_bytes(msgspec.json.encode({**known, "broker_port": 1}))
        server.deploy("1.0.0", "bench-2", trial_s=2)
        lonely.start()
        lonely.until_serves("1.0.0")
        shown = lonely.until("nothing is owed", lambda shown: shown["reports_owed"] == 0)
        assert shown["connected"] == "http"


GROUP_APPLICATION = """
import os, sys
home, group = sys.argv[1], int(sys.argv[2])
import numpy as np
from pathlib import Path
from typing import Any
from wherry_agent.handle import Model
from wherry_shared.engines.tiny import run_tiny
run_tiny("onnxruntime")  # the interpreter itself may belong to root alone: all imports come first
os.setgroups([]); os.setgid(group); os.setuid(54321)
with Model("scale", socket=Path(home) / "run" / "handle.sock", timeout_s=float(sys.argv[3])) as model:
    print(model.run({"x": np.ones((1, 4), np.float32)})["y"].ravel().tolist())
for name in ("identity/device.json", "journal.json", "telemetry.db"):
    try:
        (Path(home) / name).read_bytes()
        print("could read", name)
    except PermissionError:
        pass
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_application_of_the_handle_group_uses_models_and_reads_nothing_else(server: Site) -> None:
    group = grp.getgrnam("games").gr_gid
    home = server.folder / "bench-3"
    home.mkdir(mode=0o700)
    (home / "agent.toml").write_text(f'handle_group = "games"\ngrpc_port = {free_ports(1)[0]}\n')
    for folder in (server.folder, *server.folder.parents):
        if "pytest" in str(folder):
            folder.chmod(0o711)
    with agent(server, "bench-3") as shared:
        shared.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        server.deploy("1.0.0", "bench-3", trial_s=2)
        shared.until_serves("1.0.0")

        def use(gid: int, timeout_s: str = "20") -> subprocess.CompletedProcess[str]:
            argv = [sys.executable, "-c", GROUP_APPLICATION, str(home), str(gid), timeout_s]
            return subprocess.run(argv, capture_output=True, text=True, timeout=60)

        done = use(group)
        assert (done.returncode, done.stdout.strip()) == (0, "[2.0, 2.0, 2.0, 2.0]"), done.stderr
        for name in ("worker.sock", "grpc.sock"):
            found = (home / "run" / name).stat()
            assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (group, 0o660), name
        stranger = use(group + 54321, "1")
        assert stranger.returncode != 0
        assert "supervisor_unreachable" in stranger.stderr


def test_a_device_without_identity_or_token_says_what_to_do(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "wherry_agent.cli", "run", "--home", str(tmp_path / "none"), "--http-port", "0"]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert said.returncode == 1
    assert "not_enrolled" in said.stderr
    assert "--token" in said.stderr


def test_a_busy_port_is_found_before_the_token_is_used(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as server:
        port, url = taken.getsockname()[1], f"http://127.0.0.1:{server.getsockname()[1]}"
        argv = [sys.executable, "-m", "wherry_agent.cli", "run", "--home", str(tmp_path / "home")]
        argv += ["--server", url, "--token", "once", "--http-port", str(port)]
        said = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert said.returncode == 1
    assert "port_busy" in said.stderr
