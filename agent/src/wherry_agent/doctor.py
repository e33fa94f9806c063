"""`wherry-agent doctor`: what a support engineer would ask, asked of this machine.

One function per question; each says `ok`, `note` (worth knowing, nothing is broken) or `bad` (an agent does not work here
as it should), and for what is bad the next step. Reads only, apart from one small file that proves that the disk takes
writes: it may run beside the agent, and on a device whose agent does not start.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import os
import platform
import pwd
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from wherry_agent import conditions, identity, journal, machine, readings, sampling, status, turn
from wherry_agent import state as s
from wherry_agent.courier_http import Http, of_device
from wherry_agent.courier_scrub import altered_assets
from wherry_agent.disk import Disk
from wherry_agent.handle_server import group_id
from wherry_agent.identity import Identity
from wherry_agent.mirrors import Mirrors
from wherry_agent.platform_key import seal_of
from wherry_agent.renewal import due_s
from wherry_agent.sealing import is_sealed, opened
from wherry_agent.settings import MIB, Settings
from wherry_agent.store import Store, is_whole
from wherry_shared import limits
from wherry_shared.bundle import parse_manifest
from wherry_shared.clock import MICROSECONDS
from wherry_shared.digest import hex_of
from wherry_shared.errors import DeviceError, WherryError
from wherry_shared.facts import DeviceFacts

Level = Literal["ok", "note", "bad"]

CONNECT_S = 10.0
SOCKET_PATH_CHARS_MAX = 107
DESCRIPTORS_MIN = 256
DESCRIPTORS_MAX = 1000
"""Above 1023, select() ends, and with it the connection to the broker."""
MEMORY_MIN_MB = 64
UNIT = "wherry-agent.service"
CHUNK_BYTES = 1024 * 1024
CLOCK_OFF_S = 120.0
"""A clock that differs by more from the server's is wrong: signed times and maintenance windows need less."""
HOT_C = 85.0
"""Where boards begin to slow down."""
_IN_VAIN = ("failed", "refused", "returned")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one question found."""

    level: Level
    detail: str
    next_step: str = ""


def ok(detail: str) -> Finding:
    """All is well."""
    return Finding("ok", detail)


def note(detail: str) -> Finding:
    """Worth knowing."""
    return Finding("note", detail)


def bad(detail: str, next_step: str) -> Finding:
    """An agent does not work here as it should."""
    return Finding("bad", detail, next_step)


@dataclass
class Patient:
    """One home and its settings, and what is read of them once."""

    settings: Settings
    scrub: bool = False
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        self.home = Path(self.settings.home)
        self.wall_s = time.time()
        self.running: dict[str, Any] | None = status.question(self.home, "status")
        self.key_trouble: WherryError | None = None
        try:
            self.disk.seal = seal_of(self.settings.at_rest_key, self.settings.at_rest)
        except WherryError as error:
            self.key_trouble = error
        self.identity: Identity | None = None
        self.identity_trouble = ""
        try:
            self.identity = identity.load(self.home, self.disk.seal)
        except (WherryError, OSError) as error:
            self.identity_trouble = str(error)
        self.state: s.State | None = None
        self.journal_trouble = ""
        try:
            record = self.disk.read(self.home / "journal.json")
            # not Journal.read, which sets a record aside that it cannot read: that is the agent's business
            if record is not None:
                self.state = journal.decode(opened(self.disk.seal, journal.PLACE, record).data)
        except WherryError as error:
            self.journal_trouble = error.message

    @property
    def server(self) -> str:
        """Address of the API, empty if nobody says it."""
        return (self.settings.server or (self.identity.server if self.identity is not None else "")).rstrip("/")

    @functools.cached_property
    def server_s(self) -> float | None:
        """What time the server's answers say that it is; None if it does not answer."""
        if self.identity is None or not self.server:
            return None
        try:
            with self.http().request("GET", f"{self.server}{self.identity.tuf_path}/timestamp.json") as answer:
                return parsedate_to_datetime(answer.header("Date")).timestamp()
        except (WherryError, ValueError):
            return None  # `server` says what is wrong there

    def http(self) -> Http:
        """Return a client that trusts what the device trusts."""
        password = identity.password(self.disk.seal)
        return of_device(self.home, self.identity, self.server, password=password, wall_s=self.wall_s, says=False)


Question = Callable[[Patient], Finding]


def examine(patient: Patient) -> Iterator[tuple[str, Finding]]:
    """Ask everything, in an order in which a person would."""
    for name, question in QUESTIONS.items():
        yield name, question(patient)


def _system(_patient: Patient) -> Finding:
    words = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    if sys.platform != "linux":
        return bad(words, "run it on Linux: it needs /proc, flock and unix sockets")
    return ok(words)


def _packages(_patient: Patient) -> Finding:
    names = ("wherry-agent", "msgspec", "paho-mqtt", "tuf", "cryptography")
    found = {name: metadata.version(name) for name in names if _installed(name)}
    missing = [name for name in names if name not in found]
    if missing:
        return bad(f"not installed: {', '.join(missing)}", "install wherry-agent again")
    return ok(", ".join(f"{name} {version}" for name, version in found.items()))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _engines(patient: Patient) -> Finding:
    try:
        found: DeviceFacts = readings.ask_facts(patient.home, patient.settings.engines, patient.settings.labels)
    except DeviceError as error:
        return bad(error.message, error.next_step or "see what python -m wherry_agent.facts says")
    words = ", ".join(f"{engine.name} {engine.version}" for engine in found.engines)
    if not words:
        return bad("none works", "install wherry-agent[onnx] or wherry-agent[litert]")
    absent = sorted({*patient.settings.engines} - {engine.name for engine in found.engines})
    if absent:
        return bad(f"{words}; the settings also name {', '.join(absent)}", "install it, or correct engines")
    waits = patient.running.get("engine_waits", []) if patient.running is not None else []
    return note("; ".join((words, *map(status.wait_words, waits)))) if waits else ok(words)


def _home(patient: Patient) -> Finding:
    home = patient.home
    folder = next(path for path in (home, *home.parents) if path.exists())
    if folder != home:
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return note(f"{home} is new")
        return bad(f"{home} cannot be made in {folder}", "make it, owned by the agent's user")
    probe = home / "doctor.probe"
    try:
        patient.disk.write_atomic(probe, b"written and synced by wherry-agent doctor\n")
        patient.disk.unlink(probe)
    except DeviceError as error:
        return bad(f"{home} takes no writes: {error.message}", "give it to the agent's user; look at mount and dmesg")
    return ok(f"{home} takes writes and syncs them")


def _disk(patient: Patient) -> Finding:
    folder = next(path for path in (patient.home, *patient.home.parents) if path.exists())
    try:
        free = patient.disk.free_bytes(folder)
    except DeviceError as error:
        return bad(error.message, "look at mount and dmesg")
    kept = patient.settings.disk_reserve_mb
    words = f"{free // MIB} MiB free, {kept} of them kept free by downloads"
    inodes = os.statvfs(folder)
    if inodes.f_files and not inodes.f_favail:
        return bad(f"{words}; no file can be made any more (inodes)", "remove files")
    if free <= kept * MIB:
        return bad(words, "free space, or lower disk_reserve_mb")
    used = sum(path.stat().st_size for path in (patient.home / "store").rglob("*") if path.is_file())
    budget = patient.settings.disk_budget_mb
    words += f"; models take {used // MIB} MiB" + (f" of {budget}" if budget else "")
    if budget and used > budget * MIB:
        return note(f"{words}: only what is needed now is kept, and nothing larger may come")
    return ok(words)


def _memory(patient: Patient) -> Finding:
    available = readings.memory_bytes("MemAvailable") // MIB
    wanted = patient.settings.memory_reserve_mb + MEMORY_MIN_MB
    words = f"{available} MiB available of {readings.memory_bytes('MemTotal') // MIB}"
    if available < wanted:
        return bad(f"{words}, less than {wanted}", "stop what else runs, or lower memory_reserve_mb")
    return ok(words)


def _descriptors(patient: Patient) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = int((patient.running or {}).get("process", {}).get("descriptors", 0))
    words = f"{soft} may be open" + (f", the agent has {used}" if used else "")
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS_MIN:
        return bad(f"{words}; {DESCRIPTORS_MIN} are needed", "raise LimitNOFILE of the unit, or ulimit -n")
    if used > DESCRIPTORS_MAX:
        return bad(f"{words}, more than its connection to the broker bears", "restart it, and report this")
    return ok(words)


def _clock(patient: Patient) -> Finding:
    """Compare the clock with what was verified here: a signed time that is past, and metadata that expire."""
    now_us = int(patient.wall_s * MICROSECONDS)
    said = _day(now_us)
    trust = patient.state.trust if patient.state is not None else None
    if trust is None:
        return ok(f"{said}; nothing was verified here yet to compare it with")
    floor = _day(trust.time_floor_us)
    if now_us < trust.time_floor_us:
        return bad(
            f"{said} is before {floor}, a time that was verified: set the clock", "start NTP, or set_clock = true"
        )
    words = f"{said}, after {floor}, which was verified"
    off_s = patient.wall_s - patient.server_s if patient.server_s is not None else 0.0
    if abs(off_s) > CLOCK_OFF_S:
        way = "ahead of" if off_s > 0 else "behind"
        return bad(
            f"{words}, but {abs(off_s):.0f} s {way} the server's clock", "start NTP on the device, or on the server"
        )
    return ok(words)


def _trust(patient: Patient) -> Finding:
    trust = patient.state.trust if patient.state is not None else None
    if trust is None:
        return note("nothing was verified here yet")
    now_us = int(patient.wall_s * MICROSECONDS)
    words = f"set {trust.current}, good until {_day(trust.expires_at)}"
    if now_us >= trust.expires_at:
        return bad(f"{words}: it expired", "let the device reach its server; is the clock ahead?")
    if not (patient.home / "trust" / str(trust.current)).is_dir():
        return bad(f"{words}, but it is not on the disk", "the next refresh fetches it; look at the disk")
    return ok(words)


def _identity(patient: Patient) -> Finding:
    if patient.identity_trouble:
        return bad(patient.identity_trouble, "remove the identity folder and enrol again")
    known = patient.identity
    if known is None:
        return note("not enrolled yet: wherry-agent enrol --server URL --token TOKEN")
    folder = identity.folder(patient.home)
    pair = identity.pair_folder(patient.home, known)
    for path in (pair / identity.KEY_FILE, folder / identity.DEVICE_FILE):
        try:
            found = path.stat()
        except OSError as error:
            return bad(f"{path}: {error.strerror}", "run doctor as the agent's user, or enrol again")
        if found.st_mode & 0o077:
            return bad(f"{path} may be read by others (mode {found.st_mode & 0o777:03o})", f"chmod 600 {path}")
    return ok(f"{known.device} in project {known.project}, private to user {folder.stat().st_uid}")


def _certificate(patient: Patient) -> Finding:
    if patient.identity is None:
        return note("none yet")
    path = identity.pair_folder(patient.home, patient.identity) / identity.CERTIFICATE_FILE
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        return bad(f"{path}: {error}", "enrol again")
    until_s = certificate.not_valid_after_utc.timestamp()
    words = f"good until {_day(int(until_s * MICROSECONDS))}"
    renewed_s = due_s(
        *(
            int(t.timestamp()) * MICROSECONDS
            for t in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        )
    )
    trouble = ((patient.running or {}).get("certificate") or {}).get("trouble", "")
    if until_s <= patient.wall_s:
        step = "the agent renews it when its server answers over HTTP; is the clock ahead?"
        return bad(f"{words}: it expired{trouble and f' ({trouble})'}", step)
    if renewed_s <= patient.wall_s:
        return note(f"{words}, to be renewed by now{trouble and f': {trouble}'}")
    return ok(f"{words}, renewed from {_day(int(renewed_s * MICROSECONDS))}")


def _server(patient: Patient) -> Finding:
    """Ask the server over HTTP for what every device needs of it: the newest trust metadata."""
    if not patient.server:
        return note("not known yet")
    path = patient.identity.tuf_path if patient.identity is not None else "/api/v1/health"
    url = f"{patient.server}{path}/timestamp.json" if patient.identity is not None else f"{patient.server}{path}"
    try:
        with patient.http().request("GET", url) as answer:
            answer.read(limits.TUF_METADATA_BYTES_MAX)
    except WherryError as error:
        return bad(error.message, error.next_step or "check the address and the network")
    words = f"{patient.server} answers {answer.status} for trust metadata"
    return ok(words) if answer.status == 200 else bad(words, "is this the server that the device enrolled at?")


def _broker(patient: Patient) -> Finding:
    known = patient.identity
    if known is None:
        return note("not known yet")
    where = f"{known.broker_host}:{known.broker_port}{' with TLS' if known.broker_tls else ''}"
    if patient.running is not None:  # with the same name on the broker, we would throw the agent off
        way = patient.running.get("connected")
        if way == "mqtt":
            return ok(f"the agent is connected to {where}")
        return bad(f"the agent is not connected to {where}, its way is: {way}", "look at the agent's log")
    trouble = _try_broker(patient.home, known, identity.password(patient.disk.seal))
    return (
        bad(f"{where}: {trouble}", "check address, firewall and certificate") if trouble else ok(f"{where} lets it in")
    )


def _try_broker(home: Path, known: Identity, password: str) -> str:
    """Connect as the agent would; what went wrong, empty if nothing did."""
    import paho.mqtt.client as mqtt

    from wherry_agent.link import new_client

    told = threading.Event()
    said: list[str] = []

    def connected(_client: Any, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        said.append(str(code) if code.is_failure else "")
        told.set()

    client: mqtt.Client | None = None
    try:
        client = new_client(home, known, password)
        client.on_connect = connected
        client.connect(known.broker_host, known.broker_port)
        client.loop_start()
        if not told.wait(CONNECT_S):
            return f"no answer within {CONNECT_S:.0f} s"
        return said[0] and f"it refuses this device: {said[0]}"
    except (OSError, ValueError) as error:
        return str(error)
    finally:
        if client is not None:
            client.disconnect()
            client.loop_stop()


def _mirrors(patient: Patient) -> Finding:
    bases = patient.settings.mirrors
    if not bases:
        return ok("none are set")
    silent = {}
    for base in bases:
        try:
            with Http().request("GET", f"{base.rstrip('/')}/device/v1/blobs/sha256:{'0' * 64}") as answer:
                if answer.status >= 500:
                    silent[base] = f"answered {answer.status}"
        except WherryError as error:
            silent[base] = error.message
    if silent:
        words = "; ".join(f"{base}: {trouble.removeprefix(base + ': ')}" for base, trouble in silent.items())
        return bad(words, "downloads come from the others and the server meanwhile; correct mirrors")
    lied = Mirrors(patient.home, patient.disk, list(bases), patient.wall_s).left_out()
    if lied:
        words = ", ".join(f"{base} until {_day(int(until * MICROSECONDS))}" for base, until in lied.items())
        return note(f"left out because they sent wrong bytes: {words}")
    return ok(f"{len(bases)} answer")


def _samples(patient: Patient) -> Finding:
    flags = turn.flags_of(patient.state) if patient.state is not None else {}
    asked = sampling.words(flags, patient.settings.samples_consent)
    if asked:
        return note("; ".join(asked))
    consent = ", ".join(patient.settings.samples_consent)
    return ok(f"no inputs are asked for, and none are sent{f'; there is consent for {consent}' if consent else ''}")


def _conditions(patient: Patient) -> Finding:
    asked = patient.settings.conditions
    power = readings.power(asked.sys)
    metered = None if asked.allow_metered else readings.Metered(asked).known
    found = conditions.Readings(
        local=readings.local,
        metered=metered,
        mains=power.mains,
        battery=power.battery,
        battery_percent=power.percent,
        temperature_c=readings.temperature_c(asked.sys),
    )
    wait = conditions.decide(asked, found, patient.wall_s, running=False)
    if wait is not None:
        return note(f"downloads wait: {wait.detail}")
    return ok("downloads may run now")


def _journal(patient: Patient) -> Finding:
    if patient.journal_trouble:
        return bad(patient.journal_trouble, "keep a copy for a report; the agent goes on with the record before it")
    if patient.state is None:
        return note("none yet")
    known = patient.identity
    if known is not None and (patient.state.device, patient.state.project) != (known.device, known.project):
        return bad(f"it is of device {patient.state.device}", "is this the home of another device?")
    waiting = len(patient.state.owed)
    return ok(f"{len(patient.state.models)} models, {waiting} reports owed")


def _store(patient: Patient) -> Finding:
    if patient.state is None:
        return note("nothing is installed")
    store = Store(patient.home, patient.disk)
    counted, broken = 0, []
    for loadable in machine.kept(patient.state):
        sizes = _sizes(store, loadable.manifest)
        coming = isinstance(patient.state.models[loadable.model].phase, s.Fetching)
        for digest in sorted(loadable.digests):
            path = store.path_of(digest)
            if coming and not path.exists():
                continue
            counted += 1
            trouble = _damage(path, digest, sizes.get(digest), scrub=patient.scrub)
            if trouble:
                broken.append(f"{loadable.target} {path.name[:12]}: {trouble}")
        if patient.scrub and loadable.assets_path and not coming:
            broken += [f"{loadable.target} {trouble}" for trouble in altered_assets(store, loadable)[1]]
    if broken:
        return bad("; ".join(broken), "the agent fetches it again by itself; look at the disk")
    words = "read and compared with their digests" if patient.scrub else "whole by size (--scrub reads them)"
    return ok(f"{counted} files {words}")


def _sizes(store: Store, manifest: str) -> dict[str, int]:
    try:
        data = store.read(manifest, limits.MANIFEST_BYTES_MAX)
        parsed = parse_manifest(data) if data is not None else None
    except WherryError:
        return {}
    return {part.digest: part.size for part in (parsed.config, *parsed.layers)} if parsed is not None else {}


def _damage(path: Path, digest: str, length: int | None, *, scrub: bool) -> str:
    if not path.is_file():
        return "missing"
    if length is not None and not is_whole(path, length):
        return f"{path.stat().st_size} bytes instead of {length}"
    if not scrub:
        return ""
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                sha.update(chunk)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if sha.hexdigest() == hex_of(digest) else "altered"


def _at_rest(patient: Patient) -> Finding:
    """Say whether what lies on the disk is sealed as the settings wish, and what of it is not."""
    running, error = patient.running, patient.key_trouble
    if error is not None:
        if running is not None and running.get("at_rest"):
            return note(f"{error.message}; the agent that runs has key {running['at_rest']['key']}")
        return bad(f"{error.message} [{error.code}]", error.next_step)
    sealed: list[str] = []
    clear: list[str] = []
    for name in _RECORDS:
        try:
            record = patient.disk.read(patient.home / name)
        except DeviceError:
            continue  # `home` says so
        if record is not None:
            (sealed if is_sealed(record) or record.startswith(identity.ENCRYPTED_KEY) else clear).append(name)
    if patient.identity is not None and patient.identity.pair:
        pair = identity.pair_folder(patient.home, patient.identity) / identity.KEY_FILE
        if pair.is_file():
            (sealed if pair.read_bytes().startswith(identity.ENCRYPTED_KEY) else clear).append(pair.parent.name)
    seal = patient.disk.seal
    if seal is None:
        if sealed:
            return bad(
                f"no key is set, and sealed are: {', '.join(sealed)} [at_rest_key_missing]", "set at_rest_key again"
            )
        return ok("not encrypted")
    if (patient.state is None and patient.journal_trouble) or patient.identity_trouble:
        return bad(patient.identity_trouble or patient.journal_trouble, "see Encryption at rest in docs/device.md")
    words = f"key {seal.id} of {seal.source}"
    if seal.writes:
        if clear:
            return note(f"{words}; not sealed yet: {', '.join(clear)}; the agent seals them when it starts")
        step = '; set at_rest = "on", so that nothing clear is taken any more' if seal.mode == "migrate" else ""
        return note(f"{words}; all is sealed{step}") if step else ok(f"{words}; all is sealed")
    if sealed:
        return note(f"{words}; still sealed: {', '.join(sealed)}; the agent opens them when it starts")
    return note(f"{words}; nothing is sealed any more: at_rest_key can go")


_RECORDS = (
    "journal.json",
    *(f"{identity.FOLDER}/{name}" for name in (identity.DEVICE_FILE, identity.COPY_FILE, identity.KEY_FILE)),
)


def _telemetry(patient: Patient) -> Finding:
    path = patient.home / "telemetry.db"
    if not path.exists():
        return note("none yet")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0) as database:
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            (count,) = database.execute("SELECT count(*) FROM message").fetchone()
            (dropped,) = database.execute("SELECT dropped FROM stream").fetchone()
    except sqlite3.Error as error:
        return bad(f"{path}: {error}", "the agent begins a new one by itself at its next start")
    if verdict != "ok":
        return bad(f"{path}: {verdict}", "remove it")
    words = f"{count} messages wait"
    return note(f"{words}; {dropped} windows had to make room and are lost") if dropped else ok(words)


def _temperature(patient: Patient) -> Finding:
    hottest = readings.temperature_c(patient.settings.conditions.sys)
    if hottest is None:
        return ok("no sensor tells it")
    words = f"{hottest:.0f} °C at the hottest sensor"
    return note(f"{words}: boards slow down there, and latencies grow") if hottest >= HOT_C else ok(words)


def _sockets(patient: Patient) -> Finding:
    path = patient.home / "run" / "handle.sock"
    if len(str(path)) > SOCKET_PATH_CHARS_MAX:
        return bad(f"{path} is too long for a unix socket", "choose a --home with a shorter path")
    port = patient.settings.http_port
    if patient.running is not None:
        return ok(f"the agent serves on {patient.running.get('http')}")
    if trouble := _taken(port):
        return bad(f"port {port} of 127.0.0.1: {trouble}", "stop who has it (ss -ltnp), or set http_port")
    return ok(f"port {port or 'of any number'} is free")


def _taken(port: int) -> str:
    """Return why a loopback port cannot be had, empty if it can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return str(error.strerror)
    return ""


def _grpc(patient: Patient) -> Finding:
    """Say whether gRPC can be served, and what it cannot do: the one interface that a new worker process interrupts."""
    port, running = patient.settings.grpc_port, patient.running
    address = f"127.0.0.1:{port}" if port else ""
    path: object = patient.home / "run" / "grpc.sock"
    if running is not None:  # what a flag said counts
        address, path = str(running.get("grpc") or address), running.get("grpc_socket") or path
    if not address:
        return ok("off")
    if any(find_spec(name) is None for name in ("grpc", "google.protobuf")):
        return bad("its packages are missing", "install wherry-agent[grpc]")
    fine = ("", "served", "not served yet")
    doing = str(running.get("grpc_doing", "")) if running is not None else _taken(port)
    if doing not in fine:
        return bad(f"{address}: {doing}", "stop who has the port (ss -ltnp), or set grpc_port")
    doing = str(running.get("grpc_socket_doing", "")) if running is not None else ""
    if doing not in fine:
        return bad(f"unix:{path}: {doing}", "choose a --home with a shorter path that this user may write")
    return note(
        f"{address} and unix:{path}; swaps fail no call, but a change of the worker process (engine change, crash) breaks"
        " its connections: clients try again"
    )


def _agent(patient: Patient) -> Finding:
    if patient.running is None:
        return note("it does not run")
    process = patient.running.get("process", {})
    safe = [name for name, model in patient.running.get("models", {}).items() if model["doing"].startswith("safe")]
    words = (
        f"runs as process {patient.running['pid']} for {patient.running['uptime_s']:.0f} s,"
        f" {process.get('resident_bytes', 0) // MIB} MiB resident"
    )
    if safe:
        return bad(f"{words}; {', '.join(safe)} serves nothing", "see wherry-agent status; offer another version")
    return ok(words)


def _worker(patient: Patient) -> Finding:
    """Ask the worker, as a client would, whether what the agent says it serves is ready."""
    if patient.running is None:
        return note("no agent runs")
    serve = [name for name, model in patient.running.get("models", {}).items() if "serves" in model]
    if not serve:
        return note("no model is installed, so nothing is asked")
    where = urlsplit(str(patient.running.get("http")))
    silent = {}
    for name in ("", *serve):
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=CONNECT_S)
        try:
            connection.request("GET", f"/v2/models/{quote(name)}/ready" if name else "/v2/health/ready")
            code = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            next_step = "wherry-agent status shows worker_pid; the log says why no worker follows"
            return bad(f"{where.geturl()} does not answer: {error}", next_step)
        finally:
            connection.close()
        if code != HTTPStatus.OK:
            silent[name or "the worker"] = code
    if silent:
        words = ", ".join(f"{name} answers {code}" for name, code in silent.items())
        running = ", ".join(patient.running.get("worker_running", []))
        words += " when asked whether it is ready" + (f"; it is loading or running {running}" if running else "")
        return bad(words, "look at the agent's log, and at wherry-agent status")
    words = f"{where.geturl()} is ready with {', '.join(serve)}"
    deaths = patient.running.get("worker_deaths")
    if deaths:
        return note(f"{words}; it {status.deaths_words(deaths)}")
    return ok(words)


def _offer(patient: Patient) -> Finding:
    offer = patient.state.offer if patient.state is not None else None
    waiting = (patient.running or {}).get("offers_not_verified", [])
    if waiting:
        return bad(
            "; ".join(f"{words}, not verified yet" for words in waiting), "see to the reason; the agent tries again"
        )
    if offer is None:
        return note("none was accepted yet")
    words = f"epoch {offer.epoch}, serial {offer.serial}"
    if offer.unsupported:
        next_step = "offer what this agent knows, or update it; what is installed serves meanwhile"
        return bad(f"{words} is not acted on: {offer.unsupported}", next_step)
    return ok(f"{words} is acted on")


def _models(patient: Patient) -> Finding:
    """Say of each model why it is not where the offer wants it, and what is held against variants here."""
    if patient.state is None:
        return note("none yet")
    words, safe = [], []
    for name, slot in sorted(patient.state.models.items()):
        phase, told = slot.phase, slot.told
        if isinstance(phase, s.Safe):
            safe.append(f"{name} serves nothing: {phase.reason} {phase.detail}".rstrip())
        elif isinstance(phase, s.Waiting):
            words.append(f"{name} waits: {phase.reason} {phase.detail}".rstrip())
        elif isinstance(phase, s.Idle) and told is not None and (told.reason or told.state in _IN_VAIN):
            words.append(f"{name}: {told.target} {told.state}, {told.reason} {told.detail}".rstrip(" ,"))
    words += [
        f"known bad: {bad.digest.partition(':')[2][:12]} with {bad.engine} {bad.engine_version} ({bad.reason})"
        for bad in patient.state.known_bad
    ]
    if safe:
        return bad("; ".join([*safe, *words]), "offer another version, or the same with a new attempt")
    if words:
        return note("; ".join(words))
    return ok(f"{len(patient.state.models)} as they should be")


def _handles(patient: Patient) -> Finding:
    """Say whether applications of other users can reach their models: the group is there, and the agent may give to it."""
    name = patient.settings.handle_group
    if not name:
        return ok("only for root and the agent's user (no handle_group)")
    try:
        group = group_id(name)
    except DeviceError as error:
        return bad(error.message, error.next_step)
    try:
        owner = patient.home.stat().st_uid
        member = owner == 0 or group in os.getgrouplist(pwd.getpwuid(owner).pw_name, pwd.getpwuid(owner).pw_gid)
    except (OSError, KeyError):  # no home yet, or its user has no name, as in a container
        return note(f"group {name} exists; whether the agent's user is in it is not known")
    if not member:
        next_step = f"usermod --append --groups {name} the agent's user, or SupplementaryGroups={name} in its unit"
        return note(f"the group file does not have user {owner}, who owns {patient.home}, in group {name}: {next_step}")
    return ok(f"for group {name}")


def _systemd(_patient: Patient) -> Finding:
    if shutil.which("systemctl") is None:
        return note("there is none here")
    argv = ["systemctl", "show", UNIT, "--property=LoadState,ActiveState,SubState,WatchdogUSec,NRestarts"]
    try:
        shown = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=CONNECT_S)
    except (OSError, subprocess.SubprocessError) as error:
        return note(f"it does not answer: {error}")
    found = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    if found.get("LoadState") != "loaded":
        return note(f"{UNIT} is not installed (wherry-agent unit prints it)")
    words = f"{UNIT} is {found.get('ActiveState')} ({found.get('SubState')}), restarted {found.get('NRestarts')} times"
    if found.get("ActiveState") == "failed":
        return bad(words, f"journalctl -u {UNIT}")
    if found.get("WatchdogUSec", "0") in ("0", "infinity"):
        return note(f"{words}; its watchdog is off")
    return ok(f"{words}, watchdog {found['WatchdogUSec']}")


def _day(us: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(us // MICROSECONDS))


QUESTIONS: dict[str, Question] = {
    "system": _system,
    "packages": _packages,
    "agent": _agent,
    "worker": _worker,
    "models": _models,
    "systemd": _systemd,
    "engines": _engines,
    "home": _home,
    "disk": _disk,
    "memory": _memory,
    "descriptors": _descriptors,
    "temperature": _temperature,
    "at_rest": _at_rest,
    "identity": _identity,
    "certificate": _certificate,
    "clock": _clock,
    "trust": _trust,
    "offer": _offer,
    "server": _server,
    "broker": _broker,
    "mirrors": _mirrors,
    "conditions": _conditions,
    "journal": _journal,
    "store": _store,
    "telemetry": _telemetry,
    "samples": _samples,
    "sockets": _sockets,
    "handles": _handles,
    "grpc": _grpc,
}
