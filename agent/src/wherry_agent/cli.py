"""`wherry-agent`: run the agent, see what it does, check that it can."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from wherry_agent import __version__, settings
from wherry_agent.sealing import Seal
from wherry_shared.errors import RefusedError, WherryError

TOKEN_CHARS_MAX = 4096
"""Of a token that is read from standard input."""


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
    server.add_argument("--token", metavar="TOKEN", help="enrolment token, needed once; - reads it from standard input")
    server.add_argument("--ca", metavar="FILE", help="authority of the server's certificate, needed once")
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

    key = commands.add_parser("key", parents=[common], help="print the public key with which this device enrols")
    key.set_defaults(run=_key)

    status = commands.add_parser("status", parents=[common], help="what runs here, and why")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)

    unit = commands.add_parser("unit", parents=[common], help="print a systemd unit for this machine")
    unit.set_defaults(run=_unit)

    doctor = commands.add_parser("doctor", parents=[common], help="check what an agent needs here, and say what to do")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.add_argument(
        "--scrub", action="store_true", help="read all installed files and compare them with their digests"
    )
    doctor.set_defaults(run=_doctor)
    _add_tuf(commands)
    return parser


def _add_tuf(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the three commands of the conformance protocol; options come before the command there."""
    parser = commands.add_parser("tuf", help="the TUF client alone, as the public tuf-conformance suite calls it")
    parser.add_argument("--metadata-dir", metavar="DIR", type=Path, required=True, help="where trusted metadata are")
    parser.add_argument("--metadata-url", metavar="URL", default="", help="the repository's metadata")
    parser.add_argument("--target-name", metavar="PATH", default="", help="target to download")
    parser.add_argument("--target-base-url", metavar="URL", default="", help="the repository's targets")
    parser.add_argument("--target-dir", metavar="DIR", type=Path, help="where downloads go")
    verbs = parser.add_subparsers(required=True, metavar="init|refresh|download")
    first = verbs.add_parser("init", help="trust a root; asks nobody")
    first.add_argument("trusted_root", type=Path, metavar="ROOT.json")
    first.set_defaults(run=_tuf_init)
    verbs.add_parser("refresh", help="update the top-level metadata").set_defaults(run=_tuf_refresh)
    verbs.add_parser("download", help="have a target, verified").set_defaults(run=_tuf_download)


def _settings(arguments: argparse.Namespace) -> settings.Settings:
    flags: dict[str, Any] = {
        name: value
        for name in ("home", "server", "token", "ca", "name", "http_port", "grpc_port", "log_level")
        if (value := getattr(arguments, name, None)) is not None
    }
    if flags.get("token") == "-":  # so that no list of processes shows it
        flags["token"] = arguments.token = sys.stdin.readline(TOKEN_CHARS_MAX).strip()
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


def _seal(chosen: settings.Settings) -> Seal | None:
    """Return what opens the records of this home, if a key is set."""
    from wherry_agent.platform_key import seal_of

    return seal_of(chosen.at_rest_key, chosen.at_rest)


def _log(level: str) -> None:
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=getattr(logging, level.upper(), logging.INFO), format=form, stream=sys.stderr)


def _run(arguments: argparse.Namespace) -> int:
    from wherry_agent import identity, supervisor

    chosen = _settings(arguments)
    if arguments.token == "" and identity.load(Path(chosen.home), _seal(chosen)) is None:
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
    seal = _seal(chosen)
    known = identity.load(home, seal)
    if known is None:
        if not chosen.server or not chosen.token:
            raise RefusedError(
                "not_enrolled", "a server and a token are needed", next_step="give --server URL and --token TOKEN"
            )
        Disk().mkdir(home)
        box: queue.SimpleQueue[children.CourierAnswer] = queue.SimpleQueue()
        name = chosen.name or socket.gethostname()
        task = children.Enrol(
            home=chosen.home,
            server=chosen.server,
            token=chosen.token,
            name=name,
            labels=chosen.labels,
            ca=chosen.ca,
        )
        processes.courier(task, box.put, seal=seal)
        answer = box.get()
        if isinstance(answer, children.Failed):
            raise RefusedError(
                "enrol_refused",
                answer.detail,
                next_step="do as the server says; check the address, or make a new token",
            )
        known = identity.load(home, seal)
    assert known is not None
    print(f"{known.device} in project {known.project} of {known.server}")
    return 0


def _key(arguments: argparse.Namespace) -> int:
    from wherry_agent.courier_enrol import public_key
    from wherry_agent.disk import Disk

    chosen = _settings(arguments)
    pem, digest = public_key(Path(chosen.home), Disk(seal=_seal(chosen)))
    print(pem.decode(), end="")
    print(digest.removeprefix("sha256:"), file=sys.stderr)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from wherry_agent import status

    chosen = _settings(arguments)
    shown = status.ask(Path(chosen.home), lambda: _seal(chosen))
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
    """Say what would keep an agent from working here; 1 if something does."""
    from wherry_agent import doctor

    patient = doctor.Patient(_settings(arguments), scrub=arguments.scrub)
    _log("error")
    worst = 0
    rows = []
    for check, finding in doctor.examine(patient):
        worst |= finding.level == "bad"
        rows.append({"check": check, "ok": finding.level != "bad", **msgspec.to_builtins(finding)})
        if not arguments.json:
            mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[finding.level]
            print(
                f"{mark} {check:<12} {finding.detail}"
                + (f"\n{'':<18}→ {finding.next_step}" if finding.next_step else "")
            )
    if arguments.json:
        print(msgspec.json.encode(rows).decode())
    return worst


def _tuf_init(arguments: argparse.Namespace) -> int:
    from wherry_agent import tuf_commands

    tuf_commands.init(arguments.metadata_dir, arguments.trusted_root)
    return 0


def _tuf_refresh(arguments: argparse.Namespace) -> int:
    from wherry_agent import tuf_commands

    _need(arguments, "metadata_url")
    tuf_commands.refresh(arguments.metadata_dir, arguments.metadata_url)
    return 0


def _tuf_download(arguments: argparse.Namespace) -> int:
    from wherry_agent import tuf_commands

    _need(arguments, "metadata_url", "target_name", "target_base_url", "target_dir")
    tuf_commands.download(
        arguments.metadata_dir,
        arguments.metadata_url,
        arguments.target_name,
        arguments.target_base_url,
        arguments.target_dir,
    )
    return 0


def _need(arguments: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in names if not getattr(arguments, name)]
    if missing:
        raise RefusedError(
            "argument_missing", f"{', '.join(missing)} must be given", next_step="see wherry-agent tuf --help"
        )


if __name__ == "__main__":
    sys.exit(main())
