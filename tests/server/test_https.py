"""The same identity over HTTPS: mutual TLS that uvicorn ends, or nginx, which hands the certificate on so that nobody else can."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec

from tests.broker_kit import Guarded, Member
from tests.server.harness import DEADLINE_S, Running, csr, free_port, in_database, running, until
from tests.services import needs
from wherry_server import peer, proxy_config
from wherry_server.app import create_app
from wherry_server.identity import DeviceAuthority
from wherry_server.secret_files import write_secret
from wherry_server.services import open_services
from wherry_shared import wire

OFFER = "/device/v1/offer"


@dataclass
class Front:
    """An HTTPS endpoint before a server."""

    server: Running
    members: Guarded
    port: int

    def client(self, pair: Path | None = None, bearer: Member | None = None, **headers: str) -> httpx.Client:
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer.id}:{bearer.answer.bearer}"
        context = self.members.context(pair)
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}", verify=context, trust_env=False, headers=headers, timeout=20
        )

    def ask(self, pair: Path | None = None, bearer: Member | None = None, **headers: str) -> str:
        """Return what becomes of a device's question: the status, or the problem's code."""
        with self.client(pair, bearer, **headers) as http:
            answer = http.get(OFFER)
        problem = answer.headers.get("content-type") == "application/problem+json"
        return str(answer.json()["code"] if problem else answer.status_code)


@contextmanager
def uvicorn_ends_tls(server: Running, folder: Path) -> Iterator[int]:
    settings = server.settings
    services = open_services(settings)
    pair = services.authority.issue_server(["127.0.0.1"], days=1)
    for path, data in zip(settings.https_pair, (pair.certificate, pair.key), strict=True):
        write_secret(path, data)
    port = free_port()
    options = peer.tls_options(settings.keys_folder, settings.https_pair)
    front = uvicorn.Server(uvicorn.Config(create_app(services), port=port, log_level="error", ws="none", **options))
    thread = threading.Thread(target=front.run, daemon=True)
    thread.start()
    try:
        until(lambda: front.started)
        yield port
    finally:
        front.should_exit = True
        thread.join(DEADLINE_S)


@contextmanager
def nginx_ends_tls(server: Running, folder: Path) -> Iterator[int]:
    needs("nginx")
    port, settings = free_port(), server.settings
    services = open_services(settings)
    asyncio.run(services.close())
    block = proxy_config.write(
        settings, services.authority, folder=folder / "proxy", name="127.0.0.1", listen=f"127.0.0.1:{port}"
    )
    whole = folder / "whole.conf"
    temporary = "".join(
        f"{name}_temp_path {folder}/t-{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;"
        f"events {{}} http {{ access_log off; {temporary} include {block}; }}"
    )
    process = subprocess.Popen([str(shutil.which("nginx")), "-p", str(folder), "-c", str(whole)])

    def listens() -> bool:
        assert process.poll() is None, (folder / "errors").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(listens)
        yield port
    finally:
        process.kill()
        process.wait()


FRONTS = {"uvicorn": uvicorn_ends_tls, "nginx": nginx_ends_tls}


@pytest.fixture(params=FRONTS, scope="module")
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp(request.param)
    data = folder / "data"
    (data / "keys").mkdir(parents=True)
    write_secret(data / "keys" / "proxy.secret", b"between-nginx-and-us\n")
    with running(data, device_certificates="required") as server, FRONTS[request.param](server, folder) as port:
        yield Front(server, Guarded(server, folder, None), port)  # type: ignore[arg-type]  # without a broker


@pytest.mark.services
def test_a_device_proves_itself_by_its_certificate_and_nobody_else_can(front: Front, tmp_path: Path) -> None:
    site = front.members
    mine, other = site.device("mine"), site.device("other")
    assert front.ask(mine.pair) == "204"
    assert front.ask(mine.pair, mine) == "204"
    assert front.ask(None, mine) == "certificate_missing", "the secret alone, as a thief may have it"
    assert front.ask(other.pair, mine) == "unauthenticated", "another device's certificate"
    assert front.ask() == "unauthenticated"
    with front.client(mine.pair) as http:
        assert http.get("/api/v1/devices").status_code == 401, "a device does not operate"
    # headers that only the proxy may set, from a client: through the front, and around it
    pem = quote(mine.answer.certificate_pem)
    for secret in ("", "guessed"):
        forged = {peer.CERTIFICATE_HEADER: pem, peer.SECRET_HEADER: secret}
        assert front.ask(None, None, **forged) == "unauthenticated"
        assert front.ask(other.pair, None, **forged) == "204", "as itself"
        with httpx.Client(base_url=front.server.url, trust_env=False, headers=forged) as http:
            assert http.get(OFFER).json()["code"] == "unauthenticated"
    DeviceAuthority.create(tmp_path, "elsewhere")
    stranger = DeviceAuthority.open(tmp_path, days=1).issue_double(mine.id, timedelta(hours=1))
    file = tmp_path / "pair.pem"
    file.write_bytes(stranger.certificate + stranger.key)
    try:
        answer = front.ask(file, mine)
    except httpx.TransportError:
        answer = "refused"
    assert answer in ("refused", "400"), "an authority of the thief's own"
    with front.server.http() as http:
        assert http.post("/api/v1/devices/mine/revoke").status_code == 200
    assert front.ask(mine.pair, mine) == "device_revoked"


@pytest.mark.services
def test_who_was_away_renews_by_the_secret_only_once_the_certificate_has_expired(front: Front) -> None:
    late = front.members.device("late")
    key = ec.generate_private_key(ec.SECP256R1())
    body = wire.encode(wire.RenewRequest(format=1, csr_pem=csr(key, late.id)))
    with front.client(None, late) as http:
        assert http.post("/device/v1/renew", content=body).json()["code"] == "certificate_missing"
        sql = "UPDATE device SET certificate_expires_at = certificate_expires_at - 31 * 86400000000 WHERE name = 'late'"
        in_database(front.server.settings, lambda c: c.exec_driver_sql(sql))
        answer = http.post("/device/v1/renew", content=body)
        assert answer.status_code == 200, answer.text
        assert http.post("/device/v1/renew", content=body).json()["code"] == "certificate_missing"
