"""`wherry dev`: a whole server on loopback with one command, on SQLite, a blob folder and keys that it makes itself.

The parent only makes the data folder ready and looks after three children (broker, api, director), which the kernel
ends with it. A second start goes on with the data of the first.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import getpass
import http.client
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec
from sqlalchemy import select

from wherry_server import api_tokens, audit, broker, broker_config, enrolment, forked, revocation
from wherry_server.blob_folder import FolderBlobs
from wherry_server.db.database import DATABASE_ERRORS, transient
from wherry_server.db.tables import ApiToken, EnrolmentToken, table
from wherry_server.forked import Gate
from wherry_server.identity import CERTIFICATE_FILE
from wherry_server.secret_files import write_secret
from wherry_server.secrets_kept import hash_secret
from wherry_server.services import Services, open_blobs, open_services, prepare
from wherry_server.settings import Role, Settings
from wherry_server.supervision import Child, Supervisor
from wherry_server.times import now_us
from wherry_shared.access import DEFAULT_DATA, Access
from wherry_shared.errors import RefusedError, UnreachableError

READY_S = 180.0
"""How long api and broker may take until they answer, on a machine that has much else to do; one that fails is not waited for."""
TURN_S = 0.2
READY_TURN_S = 0.02
"""While nothing answers yet."""
HEALTH_S = 2.0
"""How long the API may take to say that it is well."""
TOKEN_DAYS = 365
ENROLMENT_USES = 100_000
NO_ENTRY = ("28000", "28P01", "3D000")
"""SQLSTATE of PostgreSQL: no such user, wrong password, no such database."""

_tokens = table(ApiToken)
_enrolments = table(EnrolmentToken)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the first screen says."""

    admin: str
    fresh: bool
    """Whether the admin token was made just now."""
    enrolment: str


def run(settings: Settings, *, quiet: bool) -> None:
    """Run a development server until SIGINT or SIGTERM.

    Raises:
        RefusedError: `already_running`, `port_in_use`.
        UnreachableError: `not_ready`, if a child does not come up.
    """

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)  # noqa: T201  # this is a command's screen

    settings.data.mkdir(parents=True, exist_ok=True)
    with _alone(settings.data) as lock:
        for name, host, port, option in (
            ("API", settings.host, settings.port, "--port"),
            ("broker", settings.broker_host, settings.broker_port, "--broker-port"),
        ):
            _check_free(name, host, port, option)
        if settings.broker_tls:
            _check_free("broker", settings.broker_server_host, settings.broker_server_port, "--broker-port")
            broker_config.program()
        say(f"Starting the Wherry development server on {settings.data} …")
        settings.save()
        gate = Gate()
        children = _children(settings, gate, lock)
        supervisor = Supervisor(children, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
        try:
            if forked.POSSIBLE:
                supervisor.start()  # they import while everything is made ready
            shown = _make_ready(settings)
            stop = _stop_on_signals()
            if forked.POSSIBLE:
                gate.open()
            else:
                supervisor.start()
            _wait_ready(settings, supervisor, stop)
            if not stop.is_set():
                say(screen(settings, shown))
            while not stop.wait(TURN_S):
                supervisor.turn()
        finally:
            gate.close()
            supervisor.stop()
        say("stopped; the data stay in " + str(settings.data))


def _children(settings: Settings, gate: Gate, lock: IO[str]) -> list[Child]:
    logs = settings.data / "logs"
    logs.mkdir(exist_ok=True)
    roles: tuple[Role, ...] = ("broker", *settings.roles)
    return [
        Child(
            name=role,
            command=[sys.executable, "-m", "wherry_server.cli", "serve", role, "--data", str(settings.data)],
            log=logs / f"{role}.log",
            fork=partial(forked.start, role, settings, logs / f"{role}.log", gate, lock) if forked.POSSIBLE else None,
        )
        for role in roles
    ]


def _make_ready(settings: Settings) -> Shown:
    """Make keys, schema, certificates and access."""
    prepare(settings)
    services = open_services(settings)
    if settings.broker_tls:
        asyncio.run(_write_certificates(services))
    asyncio.run(services.blobs.check())
    if isinstance(services.blobs, FolderBlobs):
        services.blobs.sweep()
    return asyncio.run(_ensure_access(services))


async def _write_certificates(services: Services) -> None:
    """Make what API and broker show in the network, and the broker's configuration."""
    settings = services.settings
    async with services.database.read() as connection:
        revoked = services.authority.revocations(await revocation.revoked(connection))
    await services.database.close()
    broker_config.write(settings, services.authority, revoked, user=getpass.getuser(), listen=settings.broker_host)
    pair = services.authority.issue_server([settings.host, "localhost"], days=broker_config.CERTIFICATE_DAYS)
    for path, data in zip(settings.https_pair, (pair.certificate, pair.key), strict=True):
        write_secret(path, data)


def init(settings: Settings) -> Shown:
    """Make a data folder and its database ready.

    Raises:
        RefusedError: `already_running`.
        UnreachableError: `database_unreachable`, `blobs_unreachable` or `blobs_forbidden`.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    with _alone(settings.data):
        asyncio.run(open_blobs(settings).check())
        try:
            prepare(settings)
            shown = asyncio.run(_ensure_access(open_services(settings)))
        except DATABASE_ERRORS as error:
            if not transient(error) and getattr(error, "sqlstate", "") not in NO_ENTRY:
                raise
            raise UnreachableError(
                "database_unreachable",
                f"the database does not let us in: {error}",
                consequence="nothing was made ready",
                next_step="see that it runs and that user, password and name of the database are right",
            ) from error
        settings.save()
    return shown


@contextmanager
def _alone(data: Path) -> Iterator[IO[str]]:
    with (data / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusedError(
                "already_running",
                f"a server runs on {data} already",
                consequence="nothing was started",
                next_step="use that one, or give another folder: wherry dev --data DIR",
            ) from error
        yield lock


def _check_free(name: str, host: str, port: int, option: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise RefusedError(
                "port_in_use" if taken else "address_unusable",
                f"{name} cannot listen on {host}:{port}: {error.strerror}",
                consequence="nothing was started",
                next_step=f"end what listens there, or choose another port: wherry dev {option} PORT",
            ) from error


async def _ensure_access(services: Services) -> Shown:
    """Make sure that `client.json` opens the API and that there is an enrolment token to show."""
    settings = services.settings
    saved = _read_client(settings)
    enrolment_file = settings.keys_folder / "enrolment.token"
    pasted = enrolment_file.read_text().strip() if enrolment_file.exists() else ""
    try:
        async with services.database.write() as connection:
            now = now_us()
            fresh = saved is None or not await connection.scalar(
                select(_tokens.c.name).where(
                    _tokens.c.token_hash == hash_secret(saved.token), _tokens.c.expires_at > now
                )
            )
            if saved is None or fresh:
                token = await api_tokens.create(connection, services.project, "dev", "admin", TOKEN_DAYS)
                await audit.append(
                    connection,
                    services.project,
                    "server:dev",
                    "token.create",
                    "dev",
                    id=hash_secret(token)[:12],
                    role="admin",
                    days=TOKEN_DAYS,
                )
            else:
                token = saved.token
            good = pasted.count(".") == 2 and await connection.scalar(
                select(_enrolments.c.uses_left).where(
                    _enrolments.c.token_hash == hash_secret(pasted.split(".")[1]), _enrolments.c.expires_at > now
                )
            )
            if not good:
                pasted = await enrolment.create_token(
                    connection, services, "server:dev", uses=ENROLMENT_USES, days=TOKEN_DAYS, labels={}
                )
    finally:
        await services.close()
    write_secret(enrolment_file, pasted.encode() + b"\n")
    access = Access(server=settings.url, token=token, ca=services.authority.ca_pem if settings.https else "")
    write_secret(settings.client_file, msgspec.json.encode(access) + b"\n")
    return Shown(admin=token, fresh=bool(fresh), enrolment=pasted)


def _read_client(settings: Settings) -> Access | None:
    try:
        return msgspec.json.decode(settings.client_file.read_bytes(), type=Access)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def handler(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return stop


def _wait_ready(settings: Settings, supervisor: Supervisor, stop: threading.Event) -> None:
    deadline = time.monotonic() + READY_S
    tls: ssl.SSLContext | None = None
    if settings.https:
        tls = ssl.create_default_context(cafile=str(settings.keys_folder / CERTIFICATE_FILE))
    while not stop.wait(READY_TURN_S):
        supervisor.turn()
        if broker.answers(settings) and _healthy(settings, tls):
            return
        failing = next((child for child in supervisor.children if child.failures >= 3), None)
        if failing is not None or time.monotonic() > deadline:
            late = failing or supervisor.children[1]
            raise UnreachableError(
                "not_ready",
                f"{late.name} does not come up; the end of {late.log}:\n{late.tail()}",
                consequence="the server was stopped again",
                next_step="see the log above; the data are untouched",
            )


def _healthy(settings: Settings, tls: ssl.SSLContext | None) -> bool:
    """Ask the API whether it is well. Not by a library that takes longer to import than the API to answer."""
    connection = (
        http.client.HTTPSConnection(settings.host, settings.port, timeout=HEALTH_S, context=tls)
        if tls is not None
        else http.client.HTTPConnection(settings.host, settings.port, timeout=HEALTH_S)
    )
    try:
        connection.request("GET", "/api/v1/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):  # not listening yet
        return False
    finally:
        connection.close()


def screen(settings: Settings, shown: Shown) -> str:
    """Return what `wherry dev` prints when everything answers."""
    standard = settings.data == DEFAULT_DATA.expanduser().absolute()
    lines = [
        f"Wherry development server, project {settings.project}, data in {settings.data}",
        f"  API     {settings.url}   (shapes: {settings.url}/docs)",
        f"  broker  {'mqtts' if settings.broker_tls else 'mqtt'}://{settings.broker_host}:{settings.broker_port}   (MQTT 3.1.1)",
        "  devices prove themselves by certificates, at the broker and at the API;"
        if settings.broker_tls
        else f"  {broker.WARNING};",
        "  all signing keys but publishers' are on this machine.",
        "",
    ]
    if shown.fresh:
        lines += [
            f"Admin token, shown this once: {shown.admin}",
            f"  (kept in {settings.client_file}, mode 0600, where the wherry command finds it)",
            "",
        ]
    lines.append("Next, in other terminals:")
    if not standard:
        lines.append(f"  export WHERRY_DATA={settings.data}")
    if settings.https:
        lines.append("  wherry device invite                 # prints one line to paste on a Raspberry Pi")
    lines += [
        f"  wherry-agent run --server {settings.url} --home ~/wherry-device --name bench-1 \\",
        f"      --token {shown.enrolment}"
        + (f" --ca {settings.keys_folder / CERTIFICATE_FILE}" if settings.https else ""),
        "  wherry-optimizer pack model.onnx --name my-model --version 1.0.0 --licence Apache-2.0 \\",
        '      --attribution "me" --output my-model-1.0.0',
        "  wherry-optimizer sign my-model-1.0.0",
        "  wherry bundle push my-model-1.0.0",
        "  wherry deploy my-model:1.0.0 --device bench-1 --watch",
        "",
        "Ctrl-C ends it; the next start goes on with the same data.",
    ]
    return "\n".join(lines)
