"""The doctor on a home where all is well, and on the same home with one thing broken at a time."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization

from tests.agent.builders import MODEL, confirmed, digest_of, fetched, judged, offer, offered, resolved, run
from tests.agent.daemon_kit import write_bundle
from tests.shared.engines import models
from tests.tls_front import TlsFront, server_certificate
from tests.trust_kit import Answer, little_server
from wherry_agent import cli, courier, doctor, identity, status, timestamp
from wherry_agent import state as s
from wherry_agent.children import Failed, Renew, Trust
from wherry_agent.courier_enrol import bring_in_line
from wherry_agent.disk import Disk
from wherry_agent.doctor import Patient, examine
from wherry_agent.identity import Identity
from wherry_agent.journal import Journal
from wherry_agent.link import Callbacks, Link
from wherry_agent.mirrors import Mirrors
from wherry_agent.sealing import Seal
from wherry_agent.settings import Settings
from wherry_agent.store import Store
from wherry_agent.telemetry import Buffer
from wherry_server.identity import DeviceAuthority
from wherry_shared.bundle import parse_manifest
from wherry_shared.errors import UnreachableError

DEVICE = "d" * 22
REFUSED = 5


class Broker:
    """Says one thing to whoever connects."""

    def __init__(self) -> None:
        self.code = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            with line:
                line.settimeout(20)
                if line.recv(4096):
                    line.sendall(bytes([0x20, 2, 0, self.code]))
                    line.recv(4096)


class Home:
    """A device's home where all is well."""

    def __init__(self, folder: Path, server: str, broker: Broker) -> None:
        self.path = folder / "home"
        self.broker = broker
        disk = Disk()
        keys = folder / "keys"
        keys.mkdir()
        DeviceAuthority.create(keys, "default")
        certificate, key = server_certificate(keys, folder, days=90)
        self.front = TlsFront(broker.port, certificate, key, ca=keys / "devices-ca.pem")
        mine = identity.folder(self.path)
        disk.mkdir(mine)
        for source, name in ((certificate, "certificate.pem"), (key, "key.pem"), (keys / "devices-ca.pem", "ca.pem")):
            disk.write_atomic(mine / name, source.read_bytes())
        self.keys = keys
        self.identity = Identity(
            format=1,
            device=DEVICE,
            project="default",
            name="bench",
            server=server,
            root_digest="0" * 64,
            tuf_path="/tuf/default",
            bearer="secret",
            mac_key="a2V5" * 10 + "a2U=",
            broker_host="127.0.0.1",
            broker_port=self.front.port,
            broker_tls=True,
        )
        disk.write_atomic(mine / identity.DEVICE_FILE, identity.encode(self.identity))
        self._install(folder, disk)
        self.now_us = int(time.time() * 1e6)
        self.note_trust(self.now_us - 10**9, self.now_us + 10**12)
        (self.path / "trust" / "1").mkdir(parents=True)

    def _install(self, folder: Path, disk: Disk) -> None:
        weights = models.scale(folder / "one.onnx", 2.0)
        digest = write_bundle(folder / "bundle", "1.0.0", weights)
        store = Store(self.path, disk)
        for blob in (folder / "bundle/blobs/sha256").iterdir():
            store.add(f"sha256:{blob.name}", blob.read_bytes())
        manifest = parse_manifest((folder / "bundle/blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
        weight, golden = manifest.layers
        self.weights = store.path_of(weight.digest)
        state = replace(confirmed(), device=DEVICE, project="default")
        ((name, slot),) = state.models.items()
        assert slot.incumbent is not None
        loadable = msgspec.structs.replace(
            slot.incumbent.loadable,
            manifest=digest,
            digest=weight.digest,
            path=str(self.weights),
            golden_path=str(store.path_of(golden.digest)),
            config_path=str(store.path_of(manifest.config.digest)),
        )
        installed = replace(slot, incumbent=replace(slot.incumbent, loadable=loadable), last_good=None)
        self.state = replace(state, models={name: installed})

    def note_trust(self, floor_us: int, expires_us: int, current: int = 1) -> None:
        trust = Trust(current=current, floors={}, time_floor_us=floor_us, expires_at=expires_us)
        self.state = replace(self.state, trust=trust)
        Journal(Disk(), self.path / "journal.json").write(self.state)

    def settings(self, **more: object) -> Settings:
        return msgspec.structs.replace(Settings(home=str(self.path), http_port=0, engines=["onnxruntime"]), **more)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with little_server(lambda path, _: Answer(200 if path == "/tuf/default/timestamp.json" else 404)) as running:
        yield running.url


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory, server: str) -> Iterator[Home]:
    broker = Broker()
    made = Home(tmp_path_factory.mktemp("doctor"), server, broker)
    yield made
    made.front.close()
    broker.listener.close()


@pytest.fixture
def home(well: Home, tmp_path: Path) -> Iterator[Home]:
    """The home again for each test: what one breaks is put back."""
    shutil.copytree(well.path, tmp_path / "copy")
    state = well.state
    yield well
    shutil.rmtree(well.path)
    shutil.copytree(tmp_path / "copy", well.path)
    well.state, well.broker.code = state, 0


def found(device: Home, check: str, /, *, scrub: bool = False, **more: object) -> tuple[str, str]:
    patient = Patient(device.settings(**more), scrub=scrub)
    finding = doctor.QUESTIONS[check](patient)
    if finding.level == "bad":
        assert finding.next_step, "what is bad has a next step"
    return finding.level, finding.detail


def test_where_all_is_well_nothing_is_bad(home: Home) -> None:
    findings = dict(examine(Patient(home.settings(), scrub=True)))
    assert {name: finding for name, finding in findings.items() if finding.level == "bad"} == {}
    assert findings["broker"].detail.endswith("with TLS lets it in")
    assert findings["store"].detail == "4 files read and compared with their digests"
    assert home.front.clients


@pytest.fixture
def guarded(home: Home, server: str, tmp_path: Path) -> Iterator[str]:
    """The server's address where nobody is let in without a certificate of a device."""
    port = int(server.rpartition(":")[2])
    front = TlsFront(port, *server_certificate(home.keys, tmp_path, days=90), ca=home.keys / "devices-ca.pem")
    home.identity = msgspec.structs.replace(home.identity, server=f"https://127.0.0.1:{front.port}")
    (home.path / "identity" / identity.DEVICE_FILE).write_bytes(identity.encode(home.identity))
    yield home.identity.server
    front.close()
    home.identity = msgspec.structs.replace(home.identity, server=server)


@pytest.mark.parametrize("password", ["", "of the disk"])
def test_a_server_that_wants_a_certificate_sees_it(home: Home, guarded: str, password: str) -> None:
    key = home.path / "identity" / identity.KEY_FILE
    if password:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        how = serialization.BestAvailableEncryption(password.encode())
        key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    else:
        assert found(home, "server")[0] == "ok"
    asked = timestamp.question(home.path, home.identity, guarded, "", password)
    assert timestamp.ask_by_child(asked).trouble == ""
    key.with_name(identity.CERTIFICATE_FILE).unlink()
    asked = timestamp.question(home.path, home.identity, guarded, "", password)
    assert timestamp.ask_by_child(asked).trouble != ""
    assert found(home, "server")[0] == "bad"


def test_an_authority_that_is_empty_is_found_damaged_by_whoever_asks(home: Home, guarded: str) -> None:
    (identity.folder(home.path) / identity.CA_FILE).write_bytes(b"")
    assert "ca.pem is no certificate authority" in found(home, "server")[1]
    asked = timestamp.question(home.path, home.identity, guarded, "", "")
    assert "ca.pem is no certificate authority" in timestamp.ask_by_child(asked).trouble
    answer = courier.run(Renew(home=str(home.path), server=guarded), print)
    assert isinstance(answer, Failed)
    assert "ca.pem is no certificate authority" in answer.detail
    link = Link(home.path, home.identity, guarded, Callbacks(*[lambda *_: None] * 5, lambda _kind: []))
    with pytest.raises(UnreachableError, match=r"ca\.pem is no certificate authority"):
        link.post_logs(b"[]")


def write(name: str, data: bytes) -> Callable[[Home], None]:
    return lambda home: (home.path / name).write_bytes(data) and None


def expire(home: Home) -> None:
    home.note_trust(home.now_us - 10**9, home.now_us - 1)


def certificate(days: float) -> Callable[[Home], None]:
    def change(home: Home) -> None:
        folder = home.path / "run"
        folder.mkdir(exist_ok=True)
        made, _ = server_certificate(home.keys, folder, days=days)
        (identity.folder(home.path) / identity.CERTIFICATE_FILE).write_bytes(made.read_bytes())

    return change


def trust_itself(home: Home) -> None:
    folder = identity.folder(home.path)
    shutil.copy(folder / identity.CERTIFICATE_FILE, folder / identity.CA_FILE)


BROKEN: dict[str, tuple[str, Callable[[Home], object], str, str]] = {
    "key read by others": ("identity", lambda h: (h.path / "identity/key.pem").chmod(0o644), "bad", "may be read by"),
    "key gone": ("identity", lambda h: (h.path / "identity/key.pem").unlink(), "bad", "No such file"),
    "identity torn": ("identity", write("identity/device.json", b"{"), "bad", "not an identity"),
    "not enrolled": ("identity", lambda h: (h.path / "identity/device.json").unlink(), "note", "not enrolled"),
    "certificate expired": ("certificate", certificate(-0.001), "bad", "it expired"),
    "certificate soon": ("certificate", certificate(0.001), "note", "to be renewed"),
    "certificate torn": ("certificate", write("identity/certificate.pem", b"no"), "bad", "certificate.pem"),
    "clock behind": ("clock", lambda h: h.note_trust(h.now_us + 10**15, h.now_us + 10**16), "bad", "set the clock"),
    "trust expired": ("trust", expire, "bad", "it expired"),
    "trust lost": ("trust", lambda h: h.note_trust(0, h.now_us + 10**12, current=9), "bad", "not on the disk"),
    "journal torn": ("journal", write("journal.json", b"wherry-journal 1 00\n{}"), "bad", "not those"),
    "journal of another": (
        "journal",
        lambda h: Journal(Disk(), h.path / "journal.json").write(replace(h.state, device="e" * 22)),
        "bad",
        "of device",
    ),
    "weights gone": ("store", lambda h: h.weights.unlink(), "bad", "missing"),
    "weights short": ("store", lambda h: os.truncate(h.weights, 10), "bad", "10 bytes instead of"),
    "telemetry torn": ("telemetry", write("telemetry.db", b"x" * 5000), "bad", "telemetry.db"),
    "broker refuses": ("broker", lambda h: setattr(h.broker, "code", REFUSED), "bad", "refuses this device"),
    "broker of another CA": ("broker", trust_itself, "bad", "certificate verify failed"),
    "mirror lied": (
        "mirrors",
        lambda h: Mirrors(h.path, Disk(), [h.identity.server], time.time()).lied(h.identity.server),
        "note",
        "wrong bytes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_is_broken(home: Home, name: str) -> None:
    check, change, level, part = BROKEN[name]
    before = found(home, check, mirrors=[home.identity.server])
    assert before[0] != level or (check == "mirrors" and before[0] == "ok")
    change(home)
    said = found(home, check, mirrors=[home.identity.server])
    assert said[0] == level, said
    assert part in said[1]


def test_only_reading_finds_bytes_that_were_altered(home: Home) -> None:
    data = bytearray(home.weights.read_bytes())
    data[len(data) // 2] ^= 1
    home.weights.write_bytes(data)
    assert found(home, "store")[0] == "ok"
    assert found(home, "store", scrub=True) == ("bad", found(home, "store", scrub=True)[1])
    assert "altered" in found(home, "store", scrub=True)[1]


@pytest.mark.parametrize(
    ("check", "settings", "part"),
    [
        ("server", {"server": "http://127.0.0.1:1"}, "refused"),
        ("mirrors", {"mirrors": ["http://127.0.0.1:1"]}, "http://127.0.0.1:1: [Errno 111] Connection refused"),
        ("disk", {"disk_reserve_mb": 1 << 30}, "kept free"),
        ("memory", {"memory_reserve_mb": 1 << 30}, "less than"),
        ("sockets", {"home": "/tmp/" + "long/" * 30}, "too long"),
        ("home", {"home": "/etc/passwd/wherry"}, "cannot be made"),
        ("engines", {"engines": ["tensorrt"]}, "none works"),
    ],
)
def test_one_setting_asks_too_much(home: Home, check: str, settings: dict, part: str) -> None:
    level, detail = found(home, check, **settings)
    assert level == "bad", detail
    assert part in detail


def test_a_port_that_somebody_has_is_named(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        level, detail = found(home, "sockets", http_port=port)
    assert (level, "in use" in detail) == ("bad", True)
    assert found(home, "sockets", http_port=port)[0] == "ok"


@contextlib.contextmanager
def running(home: Home, **shown: object) -> Iterator[None]:
    """An agent that runs on the home, and says so."""
    (home.path / "run").mkdir(exist_ok=True)
    asked = status.Server(home.path / "run" / status.SOCKET, {"status": lambda: {"pid": 1, "models": {}, **shown}})
    try:
        yield
    finally:
        asked.close()


def test_what_is_asked_for_and_what_is_given_is_said(home: Home) -> None:
    assert found(home, "samples") == ("ok", "no inputs are asked for, and none are sent")
    level, detail = found(home, "samples", samples_consent=["scale"])
    assert (level, detail.endswith("there is consent for scale")) == ("ok", True)
    assert home.state.offer is not None
    home.state = replace(home.state, offer=replace(home.state.offer, flags={"wherry.samples": {"scale": 0.01}}))
    Journal(Disk(), home.path / "journal.json").write(home.state)
    level, detail = found(home, "samples")
    assert (level, "not sent" in detail) == ("note", True)
    assert found(home, "samples", samples_consent=["scale"]) == (
        "note",
        "scale: inputs of 1.00% of the requests are sent, a few in each window",
    )


def test_a_worker_that_does_not_answer_for_its_models_is_bad(home: Home) -> None:
    installed = {"scale": {"doing": "idle", "serves": {"target": "scale/1.0.0"}}}
    codes = {"/v2/health/ready": 200, "/v2/models/scale/ready": 200}
    assert found(home, "worker")[0] == "note", "no agent runs"
    with little_server(lambda path, _: Answer(codes[path])) as worker:
        with running(home, http=worker.url, models=installed):
            assert found(home, "worker") == ("ok", f"{worker.url} is ready with scale")
            codes["/v2/models/scale/ready"] = 404
            assert found(home, "worker") == ("bad", "scale answers 404 when asked whether it is ready")
        hangs = {"http": worker.url, "models": installed, "worker_running": ["scale float"]}
        with running(home, **hangs):
            assert found(home, "worker")[1].endswith("whether it is ready; it is loading or running scale float")
            codes["/v2/models/scale/ready"] = 200
        deaths = {"count": 2, "at_most": 3, "while_running": {"scale": 1}}
        with running(home, http=worker.url, models=installed, worker_deaths=deaths):
            level, detail = found(home, "worker")
            assert level == "note", "it serves, and somebody should know"
            assert detail.endswith("it died 2 times of late, while it ran scale in 1 of them; 3 are allowed")
        with running(home, http=worker.url):
            assert found(home, "worker")[0] == "note", "nothing is installed that could answer"
    with running(home, http="http://127.0.0.1:1", models=installed):
        level, detail = found(home, "worker")
    assert (level, "does not answer" in detail) == ("bad", True)


def test_an_offer_that_is_not_acted_on_is_bad(home: Home) -> None:
    offer = home.state.offer
    assert offer is not None
    for refused, level in (("", "ok"), ("flags: too many", "bad")):
        state = replace(home.state, offer=replace(offer, unsupported=refused))
        Journal(Disk(), home.path / "journal.json").write(state)
        said = found(home, "offer")
        assert said[0] == level
        assert refused in said[1]
    with running(home, offers_not_verified=["1.9: no space left (disk_full)"]):
        assert found(home, "offer") == ("bad", "1.9: no space left (disk_full), not verified yet")


def test_a_handle_group_that_is_not_there_is_bad(home: Home) -> None:
    assert found(home, "handles")[0] == "ok"
    assert found(home, "handles", handle_group="no-such-group") == ("bad", "there is no group 'no-such-group'")
    mine = grp.getgrgid(home.path.stat().st_gid).gr_name
    assert found(home, "handles", handle_group=mine) == ("ok", f"for group {mine}")


def test_an_engine_is_not_there_because_another_begins_with_its_name(home: Home) -> None:
    level, detail = found(home, "engines", engines=["onnxruntime", "onnx"])
    assert (level, detail.endswith("the settings also name onnx")) == ("bad", True)


def test_grpc_on_a_port_that_somebody_has_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        level, detail = found(home, "grpc", grpc_port=port)
    assert (level, "in use" in detail) == ("bad", True)
    assert found(home, "grpc", grpc_port=port)[0] == "note"
    for doing, expected in (("waiting for the port", "bad"), ("served", "note")):
        monkeypatch.setattr(doctor.status, "question", lambda *_, doing=doing: {"grpc_doing": doing})
        level, detail = found(home, "grpc", grpc_port=port)
        assert (level, doing in detail) == (expected, doing != "served")
    shown = {
        "grpc": "127.0.0.1:7",
        "grpc_doing": "served",
        "grpc_socket": "/r/g.sock",
        "grpc_socket_doing": "not served: x",
    }
    monkeypatch.setattr(doctor.status, "question", lambda *_: shown)
    assert found(home, "grpc") == ("bad", "unix:/r/g.sock: not served: x")
    monkeypatch.setattr(doctor.status, "question", lambda *_: {**shown, "grpc_socket_doing": "served"})
    level, detail = found(home, "grpc")
    assert (level, detail.startswith("127.0.0.1:7 and unix:/r/g.sock;")) == ("note", True)


def test_downloads_that_wait_are_no_illness(home: Home) -> None:
    asked = msgspec.structs.replace(Settings().conditions, metered="yes", allow_metered=False)
    assert found(home, "conditions", conditions=asked) == ("note", "downloads wait: the network is metered")


def test_models_beyond_their_budget_are_told(home: Home) -> None:
    assert found(home, "disk", disk_budget_mb=1)[0] == "ok"
    (home.path / "store/blobs/sha256" / ("f" * 64)).write_bytes(bytes(2 * doctor.MIB))
    level, detail = found(home, "disk", disk_budget_mb=1)
    assert (level, "models take 2 MiB of 1" in detail) == ("note", True)


def test_too_few_descriptors_are_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _which: (64, 64))
    level, detail = found(home, "descriptors")
    assert (level, "256" in detail) == ("bad", True)


def test_what_an_engine_lets_the_device_wait_for_is_a_note(home: Home) -> None:
    waits = [{"what": "another worker is to take over", "troubles": 2, "again_in_s": 10}]
    with running(home, engine_waits=waits):
        level, detail = found(home, "engines")
    assert (level, detail.endswith("; another worker is to take over in 10 s, after 2 times in vain")) == ("note", True)


def test_why_a_model_is_not_where_the_offer_wants_it_is_said(home: Home) -> None:
    assert found(home, "models") == ("ok", "1 as they should be")
    name, version = MODEL, digest_of(f"{MODEL}/1.1.0")
    coming, _ = run(home.state, offer(9, {name: offered("1.1.0")}), resolved("1.1.0"))
    waits, _ = run(coming, s.TaskFailed(name, version, 1, "fetch", "disk_full", "4 MB are missing", 60.0))
    missed, _ = run(coming, fetched("1.1.0"), judged("1.1.0", passed=False, reason="golden_miss"))
    held = replace(home.state.models[name], phase=s.Safe("load_failed", "not a model"))
    for state, level, *parts in (
        (waits, "note", f"{name} waits: disk_full 4 MB are missing"),
        (missed, "note", f"{name}: {name}/1.1.0 failed, golden_miss", "known bad: ", "(golden_miss)"),
        (replace(home.state, models={name: held}), "bad", f"{name} serves nothing: load_failed not a model"),
    ):
        Journal(Disk(), home.path / "journal.json").write(state)
        said = found(home, "models")
        assert said[0] == level, said
        assert all(part in said[1] for part in parts), said


@pytest.mark.parametrize(
    ("off_s", "level", "part"), [(60, "ok", ""), (-600, "bad", "s behind the"), (600, "bad", "s ahead of the")]
)
def test_a_clock_that_is_not_the_servers_is_bad(home: Home, off_s: int, level: str, part: str) -> None:
    home.note_trust(home.now_us - 10**13, home.now_us + 10**13)
    patient = Patient(home.settings())
    patient.wall_s += off_s
    finding = doctor.QUESTIONS["clock"](patient)
    assert (finding.level, part in finding.detail) == (level, True), finding
    assert found(home, "clock", server="http://127.0.0.1:1")[0] == "ok", "who does not answer is another question"


def test_windows_that_were_lost_are_told(home: Home) -> None:
    buffer = Buffer(home.path / "telemetry.db", 1 << 20)
    buffer.close()
    assert found(home, "telemetry") == ("ok", "0 messages wait")
    with sqlite3.connect(home.path / "telemetry.db") as database:
        database.execute("UPDATE stream SET dropped = 7")
    assert found(home, "telemetry") == ("note", "0 messages wait; 7 windows had to make room and are lost")


def test_heat_is_a_note(home: Home, tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    asked = msgspec.structs.replace(Settings().conditions, sys=str(tmp_path / "sys"))
    assert found(home, "temperature", conditions=asked) == ("ok", "no sensor tells it")
    zone.mkdir(parents=True)
    for celsius, level in ((84, "ok"), (85, "note")):
        (zone / "temp").write_text(f"{celsius}000\n")
        said = found(home, "temperature", conditions=asked)
        assert (said[0], said[1].startswith(f"{celsius} °C")) == (level, True)


def test_looking_changes_nothing(home: Home) -> None:
    (home.path / "journal.json").write_bytes(b"torn")
    before = {path.relative_to(home.path) for path in home.path.rglob("*")}
    for name, question in doctor.QUESTIONS.items():
        if name != "engines":  # seconds, and in a process of its own
            question(Patient(home.settings()))
    assert {path.relative_to(home.path) for path in home.path.rglob("*")} == before


def test_the_command_says_it_to_programs_and_by_its_exit_code(home: Home, capsys) -> None:
    config = home.path / "agent.toml"
    config.write_text('engines = ["onnxruntime"]\nhttp_port = 0\n')
    assert cli.main(["doctor", "--home", str(home.path), "--json"]) == 0
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(doctor.QUESTIONS)
    assert all(row["ok"] for row in rows.values())
    home.weights.unlink()
    assert cli.main(["doctor", "--home", str(home.path)]) == 1
    text = capsys.readouterr().out
    assert "BAD  store" in text
    assert "→ the agent fetches it again" in text


def test_the_doctor_says_how_the_disk_is_sealed_and_what_is_next(home: Home, tmp_path: Path) -> None:
    key = tmp_path / "key"
    source = f"file:{key}"
    assert found(home, "at_rest") == ("ok", "not encrypted")
    level, detail = found(home, "at_rest", at_rest_key=source, at_rest="migrate")
    assert (level, "at_rest_key_unavailable" in detail) == ("bad", True)
    key.write_bytes(bytes(32))
    key.chmod(0o644)
    assert "at_rest_key_open" in found(home, "at_rest", at_rest_key=source, at_rest="migrate")[1]
    key.chmod(0o600)
    level, detail = found(home, "at_rest", at_rest_key=source, at_rest="migrate")
    assert (level, "not sealed yet: journal.json" in detail) == ("note", True)
    assert found(home, "at_rest", at_rest_key=source, at_rest="on")[0] == "bad", "what is clear is refused there"

    disk = Disk(seal=Seal(bytes(32), "migrate"))
    bring_in_line(home.path, disk)
    Journal(disk, home.path / "journal.json").write(home.state)
    level, detail = found(home, "at_rest", at_rest_key=source, at_rest="migrate")
    assert (level, 'set at_rest = "on"' in detail) == ("note", True)
    assert found(home, "at_rest", at_rest_key=source, at_rest="on")[0] == "ok"
    for check in ("identity", "journal", "broker"):
        assert found(home, check, at_rest_key=source, at_rest="on")[0] == "ok", f"{check}: it opens all that is sealed"
    level, detail = found(home, "at_rest")
    assert (level, "at_rest_key_missing" in detail) == ("bad", True)
    key.write_bytes(bytes(31) + b"x")
    assert found(home, "at_rest", at_rest_key=source, at_rest="on")[0] == "bad"
