"""`wherry-agent`: run the agent, see what it does, check that it can."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from wherry_agent import __version__, settings
from wherry_shared.clock import MICROSECONDS
from wherry_shared.errors import RefusedError, WherryError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; errors say cause, consequence and next step, and end with 1."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except WherryError as error:
        print(error.diagnostics(), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wherry-agent", description="Verifies, swaps and serves models on this device."
    )
    parser.add_argument("--version", action="version", version=f"wherry-agent {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", metavar="DIR", help="folder for identity, store and journal (/var/lib/wherry)")
    common.add_argument("--config", metavar="FILE", type=Path, help="settings in TOML (HOME/agent.toml)")
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--server", metavar="URL", help="address of the Wherry server")
    server.add_argument("--token", metavar="TOKEN", help="enrolment token, needed once")
    server.add_argument("--name", help="name of the device (its host name)")
    server.add_argument("--label", metavar="K=V", action="append", default=[], help="label for cohorts; repeatable")

    run = commands.add_parser("run", parents=[common, server], help="run the agent, enrolling first if needed")
    run.add_argument("--http-port", metavar="P", type=int, help="loopback port for inference (8500; 0: any free one)")
    run.add_argument("--grpc-port", metavar="P", type=int, help="loopback port for gRPC (0: off); needs the extra")
    run.add_argument("--engines", metavar="A,B", help="use only these engines")
    run.add_argument("--mirror", metavar="URL", action="append", default=[], help="try blobs here first; repeatable")
    run.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    run.set_defaults(run=_run)

    enrol = commands.add_parser("enrol", parents=[common, server], help="enrol this device and exit")
    enrol.set_defaults(run=_enrol)

    status = commands.add_parser("status", parents=[common], help="what runs here, and why")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)

    unit = commands.add_parser("unit", parents=[common], help="print a systemd unit for this machine")
    unit.set_defaults(run=_unit)

    doctor = commands.add_parser("doctor", parents=[common], help="check engines, disk, clock and server")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)
    return parser


def _settings(arguments: argparse.Namespace) -> settings.Settings:
    flags: dict[str, Any] = {
        name: value
        for name in ("home", "server", "token", "name", "http_port", "grpc_port", "log_level")
        if (value := getattr(arguments, name, None)) is not None
    }
    if getattr(arguments, "label", None):
        flags["labels"] = dict(_label(text) for text in arguments.label)
    if getattr(arguments, "engines", None):
        flags["engines"] = arguments.engines.split(",")
    if getattr(arguments, "mirror", None):
        flags["mirrors"] = arguments.mirror
    return settings.load(arguments.config, flags)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RefusedError("bad_label", f"label {text!r} is not KEY=VALUE", next_step="write --label site=berlin")
    return key, value


def _log(level: str) -> None:
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=getattr(logging, level.upper(), logging.INFO), format=form, stream=sys.stderr)


def _run(arguments: argparse.Namespace) -> int:
    from wherry_agent import identity, supervisor

    chosen = _settings(arguments)
    if arguments.token == "" and identity.load(Path(chosen.home)) is None:
        raise RefusedError(
            "token_empty",
            "--token is empty: the command that was to make a token printed none",
            consequence="the agent does not start",
            next_step="when wherry dev says that it runs, see what wherry token create --quiet prints",
        )
    supervisor.become(msgspec.json.encode(chosen))


def _enrol(arguments: argparse.Namespace) -> int:
    import queue

    from wherry_agent import children, identity, processes
    from wherry_agent.disk import Disk

    chosen = _settings(arguments)
    _log("warning")
    home = Path(chosen.home)
    known = identity.load(home)
    if known is None:
        if not chosen.server or not chosen.token:
            raise RefusedError(
                "not_enrolled", "a server and a token are needed", next_step="give --server URL and --token TOKEN"
            )
        Disk().mkdir(home)
        box: queue.SimpleQueue[children.CourierAnswer] = queue.SimpleQueue()
        name = chosen.name or socket.gethostname()
        task = children.Enrol(
            home=chosen.home, server=chosen.server, token=chosen.token, name=name, labels=chosen.labels
        )
        processes.courier(task, box.put)
        answer = box.get()
        if isinstance(answer, children.Failed):
            raise RefusedError("enrol_refused", answer.detail, next_step="check the address, or make a new token")
        known = identity.load(home)
    assert known is not None
    print(f"{known.device} in project {known.project} of {known.server}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from wherry_agent import status

    shown = status.ask(Path(_settings(arguments).home))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(shown)).decode())
    else:
        print(status.render(shown))
    return 0


def _unit(arguments: argparse.Namespace) -> int:
    """Print the unit with the paths of this install and this home."""
    from importlib.resources import files

    text = files("wherry_agent").joinpath("systemd/wherry-agent.service").read_text(encoding="utf-8")
    program = Path(sys.prefix) / "bin" / "wherry-agent"
    home = Path(arguments.home or settings.Settings().home).absolute()
    start = f"ExecStart={program} run --home {home}"
    if arguments.config is not None:
        start += f" --config {arguments.config.absolute()}"
    text = text.replace("ExecStart=/usr/local/bin/wherry-agent run --home /var/lib/wherry", start)
    if home.parent == Path("/var/lib"):
        text = text.replace("StateDirectory=wherry\n", f"StateDirectory={home.name}\n")
    else:
        text = text.replace("StateDirectory=wherry\nStateDirectoryMode=0710\n", f"ReadWritePaths={home}\n")
    print(text.replace("/var/lib/wherry/agent.toml", str(home / settings.FILE)), end="")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    """Say what would keep an agent from working here."""
    from wherry_agent import identity, readings

    chosen = _settings(arguments)
    _log("error")
    home = Path(chosen.home)
    found = readings.ask_facts(home, chosen.engines, chosen.labels)
    checks: list[tuple[str, bool, str]] = []
    engines = ", ".join(f"{engine.name} {engine.version}" for engine in found.engines)
    checks.append(("engines", bool(found.engines), engines or "none works: install onnxruntime or ai-edge-litert"))
    reserve = chosen.disk_reserve_mb * settings.MIB
    free = f"{found.disk_free_bytes // settings.MIB} MiB free, {chosen.disk_reserve_mb} are kept"
    checks.append(("disk", found.disk_free_bytes > reserve, free))
    folder = next(path for path in (home, *home.parents) if path.exists())
    checks.append(("home", os.access(folder, os.W_OK), f"{home} can be written" if home.exists() else f"{home} is new"))
    path_fits = len(str(home / "run" / "handle.sock")) < 108
    checks.append(("sockets", path_fits, "paths fit" if path_fits else "the home's path is too long for unix sockets"))
    checks.append(("system", sys.platform == "linux", sys.platform))
    if chosen.grpc_port:
        checks.append(("grpc", *_grpc(chosen.grpc_port)))
    known = identity.load(home)
    checks.append(("identity", known is not None, known.device if known is not None else "not enrolled yet"))
    if known is not None:
        checks.append(("broker", *_reachable(known.broker_host, known.broker_port)))
        server = (chosen.server or known.server).rstrip("/")
        checks.append(("server", *_answers(home, server, known.tuf_path)))
    checks.append(("clock", *_clock(home)))
    if arguments.json:
        print(msgspec.json.encode([{"check": c, "ok": ok, "detail": d} for c, ok, d in checks]).decode())
    else:
        for check, ok, detail in checks:
            print(f"{'ok ' if ok else 'BAD'} {check:<9} {detail}")
    return 0 if all(ok for check, ok, _ in checks if check != "identity") else 1


def _grpc(port: int) -> tuple[bool, str]:
    """Say whether gRPC can be served, and what it cannot do: the one interface that a new worker process interrupts."""
    if any(find_spec(name) is None for name in ("grpc", "google.protobuf")):
        return False, "its packages are missing: install wherry-agent[grpc]"
    return True, (
        f"127.0.0.1:{port}; swaps fail no call, but a change of the worker process (engine change, crash) breaks its"
        " connections: clients try again"
    )


def _answers(home: Path, server: str, tuf_path: str) -> tuple[bool, str]:
    """Ask the server over HTTP for what every device needs of it: the newest trust metadata."""
    from wherry_agent import identity
    from wherry_agent.courier_http import Http
    from wherry_shared.limits import TUF_METADATA_BYTES_MAX

    ca = identity.folder(home) / identity.CA_FILE
    try:
        with Http(ca=ca if ca.exists() else None).request("GET", f"{server}{tuf_path}/timestamp.json") as answer:
            answer.read(TUF_METADATA_BYTES_MAX)
            return answer.status == 200, f"{server} answers {answer.status} for trust metadata"
    except WherryError as error:
        return False, f"{server}: {error.message}"


def _clock(home: Path) -> tuple[bool, str]:
    """Compare the clock with what was verified here: a signed time that is past, and metadata that expire."""
    from wherry_agent.disk import Disk
    from wherry_agent.journal import Journal

    journal = home / "journal.json"
    state = Journal(Disk(), journal).read(lambda: "")[0] if journal.exists() else None
    now_us = int(time.time() * MICROSECONDS)
    said = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if state is None or state.trust is None:
        return True, f"{said}; nothing was verified here yet to compare it with"
    floor = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(state.trust.time_floor_us // MICROSECONDS))
    if now_us < state.trust.time_floor_us:
        return False, f"{said} is before {floor}, a time that was verified: set the clock"
    if now_us >= state.trust.expires_at:
        return False, f"{said}; trust metadata expired: the clock runs ahead, or the server was long away"
    return True, f"{said}, after {floor}, which was verified"


def _reachable(host: str, port: int) -> tuple[bool, str]:
    try:
        with socket.create_connection((host, port), timeout=5.0):
            return True, f"{host}:{port} answers"
    except OSError as error:
        return False, f"{host}:{port}: {error}"


if __name__ == "__main__":
    sys.exit(main())
