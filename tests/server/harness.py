"""A real server for tests: a prepared data folder, uvicorn in a thread on a free port, bundles, devices."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import api_tokens
from wherry_server.app import create_app
from wherry_server.db.database import Database
from wherry_server.grants import Role
from wherry_server.heads import HeadLimit
from wherry_server.services import open_services, prepare
from wherry_server.settings import Settings
from wherry_shared import wire
from wherry_shared.bundle import (
    ANNOTATION_VARIANT,
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    GOLDEN_TYPE,
    MANIFEST_TYPE,
    WEIGHT_TYPE,
    Config,
    EngineRange,
    GoldenIndex,
    Interface,
    Licence,
    Manifest,
    Provenance,
    TensorSpec,
    Variant,
    encode_config,
)
from wherry_shared.image_layout import LayoutWriter
from wherry_shared.publishing import PublisherKey, Remote, push, sign

T = TypeVar("T")
DEADLINE_S = 20.0
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For plain HTTP: it trusts nobody, and reading the system's certificates takes longer than most requests."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of `condition`, asked again and again until the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, "the deadline passed"
        time.sleep(0.02)


def in_database(settings: Settings, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    """Run `work` in one writing transaction of a connection of its own."""

    async def run() -> T:
        database = Database.open(settings.database_url)
        try:
            async with database.write() as connection:
                return await work(connection)
        finally:
            await database.close()

    return asyncio.run(run())


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    settings: Settings
    admin: str
    url: str

    def http(self, token: str | None = None) -> httpx.Client:
        """Return a client with a token, the admin's by default."""
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.admin if token is None else token}"},
            trust_env=False,
            timeout=20,
            verify=NO_TLS,
        )

    def remote(self) -> Remote:
        """Return what publishes."""
        return Remote(self.url, self.admin)

    def token(self, role: Role, *, days: int = 1) -> str:
        """Make an API token."""
        return in_database(
            self.settings, lambda c: api_tokens.create(c, self.settings.project, f"a-{role}", role, days)
        )

    def enrolment_token(self, **wanted: Any) -> str:
        """Make an enrolment token."""
        with self.http() as http:
            answer = http.post("/api/v1/enrolment-tokens", json=wanted)
        assert answer.status_code == 201, answer.text
        token: str = answer.json()["token"]
        return token

    def device(self, name: str, **labels: str) -> wire.EnrolAnswer:
        """Enrol a device."""
        answer = enrol(self, self.enrolment_token(), name, labels=labels)
        assert answer.status_code == 200, answer.text
        return wire.parse(wire.EnrolAnswer, answer.content)

    def as_device(self, device: wire.EnrolAnswer) -> httpx.Client:
        """Return a client that speaks as a device."""
        return self.http(f"{device.device}:{device.bearer}")


@contextmanager
def running(folder: Path, **overrides: Any) -> Iterator[Running]:
    """Run a server over a new or used data folder."""
    settings = Settings.load(folder, port=free_port(), **{"refused_per_s": 0, **overrides})
    prepare(settings)
    admin = in_database(settings, lambda c: api_tokens.create(c, settings.project, "admin", "admin", 1))
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(open_services(settings)), port=settings.port, log_level="warning", ws="none", http=HeadLimit
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(settings, admin, settings.url)
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def csr(key: ec.EllipticCurvePrivateKey | None = None, *names: str) -> str:
    """Return a certificate request."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in names or ("whoever",)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def enrol(server: Running, token: str, name: str, **fields: Any) -> httpx.Response:
    """Ask for enrolment."""
    request = wire.EnrolRequest(**{"format": 1, "token": token, "csr_pem": csr(), "name": name, **fields})
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as http:
        return http.post("/device/v1/enrol", content=wire.encode(request))


def write_bundle(
    root: Path, model: str = "thing", version: str = "1.0.0", *, weights: bytes = b"weights" * 2000
) -> tuple[Manifest, str]:
    """Write a small bundle, whose weights are no model, and return its manifest and the manifest's digest."""
    writer = LayoutWriter(root)
    layer = writer.add_bytes(weights, WEIGHT_TYPE, {ANNOTATION_VARIANT: "float"})
    golden = writer.add_bytes(b"golden of " + model.encode(), GOLDEN_TYPE, {ANNOTATION_VARIANT: "float"})
    tensor = TensorSpec(name="x", datatype="FP32", shape=[1])
    config = Config(
        format=1,
        model=model,
        version=version,
        interface=Interface(inputs=[tensor], outputs=[tensor]),
        variants=[
            Variant(
                id="float",
                digest=layer.digest,
                bytes=layer.size,
                format="onnx",
                precision="float32",
                engines=[EngineRange(name="onnxruntime", minimum="1.20")],
                golden=GoldenIndex(digest=golden.digest, bytes=golden.size, vectors=1),
            )
        ],
        licence=Licence(expression="MIT", source="here", attribution="us"),
        provenance=Provenance(source_digests={}),
    )
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=writer.add_bytes(encode_config(config), CONFIG_TYPE),
        layers=[layer, golden],
    )
    return manifest, writer.finish(manifest, version).digest


def release(server: Running, folder: Path, model: str, version: str = "1.0.0", **fields: Any) -> tuple[Manifest, str]:
    """Write, sign and push a bundle."""
    written = write_bundle(folder / f"{model}-{version}", model, version, **fields)
    key = PublisherKey.open(server.settings.data.parent / f"{server.settings.data.name}-publisher.pem")
    with server.remote() as remote:
        sign(folder / f"{model}-{version}", remote, key, publisher="lab")
        push(folder / f"{model}-{version}", remote, key)
    return written
