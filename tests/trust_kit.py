"""What tests of trust share: small bundles, publishers, a repository and mirrors over real HTTP, a whole server."""

from __future__ import annotations

import contextlib
import io
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import uvicorn
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Delegations, Metadata, SuccinctRoles, TargetFile, Targets

from wherry_server import api_tokens, enrolment
from wherry_server.app import create_app
from wherry_server.services import Services, open_services, prepare
from wherry_server.settings import Settings
from wherry_server.trust import Trust
from wherry_shared import key_files, statements
from wherry_shared.bundle import (
    ANNOTATION_VARIANT,
    ARTIFACT_TYPE,
    ASSETS_TYPE,
    CONFIG_TYPE,
    DOC_TYPE,
    GOLDEN_TYPE,
    MANIFEST_TYPE,
    WEIGHT_TYPE,
    Asset,
    Assets,
    Config,
    EngineRange,
    GoldenIndex,
    Interface,
    Licence,
    Manifest,
    Needs,
    Provenance,
    TensorSpec,
    Variant,
    encode_config,
)
from wherry_shared.digest import of_bytes
from wherry_shared.facts import DeviceFacts, EngineFacts
from wherry_shared.image_layout import Layout, LayoutWriter
from wherry_shared.publishing_remote import Remote

MODEL = "thing"
FACTS = DeviceFacts(arch="x86_64", engines=[EngineFacts(name="onnxruntime", version="1.32.0", formats=["onnx"])])


# --- bundles ------------------------------------------------------------------------------------


def tar_of(files: dict[str, bytes], *, extra: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if extra is not None:
            extra(tar)
    return out.getvalue()


def assets_of(files: dict[str, bytes], tar: bytes | None = None) -> tuple[Assets, bytes]:
    data = tar if tar is not None else tar_of(files)
    listed = [Asset(path=path, digest=of_bytes(content), bytes=len(content)) for path, content in files.items()]
    return Assets(digest=of_bytes(data), bytes=len(data), files=listed), data


def write_bundle(
    root: Path,
    version: str = "1.0.0",
    *,
    model: str = MODEL,
    weights: bytes = b"weights" * 5000,
    claims: str | None = None,
    assets: tuple[Assets, bytes] | None = None,
    shape: int = 4,
    arch: tuple[str, ...] = (),
) -> str:
    """Write a bundle whose weights are no model, which nothing here looks into; return its manifest digest."""
    writer = LayoutWriter(root)
    layer = writer.add_bytes(weights, WEIGHT_TYPE, {ANNOTATION_VARIANT: "float"})
    golden = writer.add_bytes(b"golden" + weights[:32], GOLDEN_TYPE, {ANNOTATION_VARIANT: "float"})
    layers = [layer, golden, writer.add_bytes(b"do as you like", DOC_TYPE)]
    if assets is not None:
        layers.append(writer.add_bytes(assets[1], ASSETS_TYPE))
    tensor = TensorSpec(name="x", datatype="FP32", shape=[shape])
    config = Config(
        format=1,
        model=model,
        version=claims or version,
        interface=Interface(inputs=[tensor], outputs=[tensor]),
        variants=[
            Variant(
                id="float",
                digest=layer.digest,
                bytes=layer.size,
                format="onnx",
                precision="float32",
                engines=[EngineRange(name="onnxruntime", minimum="1.20")],
                needs=Needs(arch=list(arch)),
                golden=GoldenIndex(digest=golden.digest, bytes=golden.size, vectors=1),
            )
        ],
        licence=Licence(expression="MIT", source="here", attribution="us"),
        provenance=Provenance(source_digests={}),
        assets=assets[0] if assets else None,
    )
    layers.append(writer.add_bytes(statements.provenance_statement(config), statements.IN_TOTO_TYPE))
    layers.append(writer.add_bytes(statements.bill_of_materials(config), statements.CYCLONEDX_TYPE))
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=writer.add_bytes(encode_config(config), CONFIG_TYPE),
        layers=layers,
    )
    return writer.finish(manifest, version).digest


# --- publishers ---------------------------------------------------------------------------------


class Workstation:
    """Keys that sign one publisher's roles by hand, also in ways that the publishing code never would."""

    def __init__(self, name: str = "acme", keys: int = 1, threshold: int = 1) -> None:
        self.name = name
        self.threshold = threshold
        self.signers = [CryptoSigner.generate_ed25519() for _ in range(keys)]

    def pems(self) -> list[str]:
        return [key_files.public_pem(signer) for signer in self.signers]

    def role(self, version: int = 1, *, bits: int = 5, policy: dict | None = None, life: int = 90) -> bytes:
        keys = {signer.public_key.keyid: signer.public_key for signer in self.signers}
        bins = SuccinctRoles(list(keys), self.threshold, bits, self.name)
        targets = {}
        for model, own in (policy or {}).items():
            target = TargetFile.from_data(f"{model}/policy", b"policy", ["sha256"])
            target.unrecognized_fields["custom"] = {"wherry": {"format": 1, **own}}
            targets[target.path] = target
        return self.sign(Targets(version, None, expires(life), targets, Delegations(keys, succinct_roles=bins)))

    def bin(self, version: int, releases: dict[str, str], *, signers: list[CryptoSigner] | None = None) -> bytes:
        targets = {path: release(path, digest) for path, digest in releases.items()}
        return self.sign(Targets(version, None, expires(90), targets), signers)

    def sign(self, content: Targets, signers: list[CryptoSigner] | None = None) -> bytes:
        metadata = Metadata(content)
        for signer in self.signers if signers is None else signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def publish(self, trust: Trust, target: str, digest: str, *, length: int = 1000) -> None:
        role, version, data = trust.bin_for(target)
        targets = dict(Metadata[Targets].from_bytes(data).signed.targets) if data else {}
        targets[target] = release(target, digest, length)
        content = Targets(version + 1, None, expires(90), targets)
        assert trust.accept_bin(role, self.sign(content), version) == "accepted"


def expires(days: float) -> datetime:
    return (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)


def release(path: str, digest: str, length: int = 1000) -> TargetFile:
    custom = {"wherry": {"format": 1, "manifest": digest}}
    return TargetFile(length, {"sha256": digest[7:]}, path, {"custom": custom})


def digest(text: str) -> str:
    return of_bytes(text.encode())


def with_publisher(trust: Trust, workstation: Workstation, models: list[str] | None = None) -> Workstation:
    trust.add_publisher(workstation.name, workstation.pems(), models or [MODEL], threshold=workstation.threshold)
    assert trust.accept_bin(workstation.name, workstation.role(), 0) == "accepted"
    return workstation


# --- HTTP ---------------------------------------------------------------------------------------


class Answer:
    """What a little server says to one GET."""

    def __init__(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers or {}
        self.cut = cut
        """Send only so many bytes of the body, then hang up."""


class LittleServer:
    """A real HTTP server on a free port; `asked` lists (path, headers) of every GET."""

    def __init__(self, answer: Callable[[str, dict[str, str]], Answer]) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.asked.append((self.path, headers))
                said = answer(self.path, headers)
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                if said.status != 304:
                    self.send_header("Content-Length", str(len(said.body)))
                self.end_headers()
                if said.status != 304:
                    self.wfile.write(said.body if said.cut is None else said.body[: said.cut])

            def log_message(self, *_args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)


@contextlib.contextmanager
def little_server(answer: Callable[[str, dict[str, str]], Answer]) -> Iterator[LittleServer]:
    server = LittleServer(answer)
    try:
        yield server
    finally:
        server.close()


def blob_answer(data: bytes, etag: str, headers: dict[str, str], *, cut: int | None = None) -> Answer:
    """Serve a blob with ranges, as the real server does."""
    tags = {"ETag": etag, "Accept-Ranges": "bytes"}
    wanted = headers.get("range")
    if wanted and headers.get("if-range", etag) == etag:
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        tags["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return Answer(206, data[start:], tags, cut)
    return Answer(200, data, tags, cut)


# --- the whole server ---------------------------------------------------------------------------


class RunningServer:
    """The real application on a free port in a thread of its own."""

    def __init__(self, data: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.settings = Settings(data=data, port=port)
        prepare(self.settings)
        self.services: Services = open_services(self.settings)
        self.trust = self.services.trust
        self.url = self.settings.url
        self._server = uvicorn.Server(
            uvicorn.Config(create_app(self.services), host="127.0.0.1", port=port, log_level="warning", ws="none")
        )
        self.token, self.viewer_token, self.enrolment_token = anyio.run(self._tokens)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            assert self._thread.is_alive(), "the server ended"
            time.sleep(0.01)

    async def _tokens(self) -> tuple[str, str, str]:
        async with self.services.database.write() as connection:
            admin = await api_tokens.create(connection, self.services.project, "test", "admin", 1)
            viewer = await api_tokens.create(connection, self.services.project, "viewer", "viewer", 1)
            device = await enrolment.create_token(
                connection, self.services, "test", uses=1000, days=1, labels={"site": "bench"}
            )
        await self.services.database.close()  # the pool belongs to this loop; the server's makes its own
        return admin, viewer, device

    def remote(self) -> Remote:
        return Remote(self.url, self.token)

    def blob(self, digest: str) -> bytes:
        return self.services.blobs.path(digest).read_bytes()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)


@contextlib.contextmanager
def running_server(data: Path) -> Iterator[RunningServer]:
    server = RunningServer(data)
    try:
        yield server
    finally:
        server.close()


def manifest_bytes(bundle: Path) -> bytes:
    return Layout(bundle).manifest_bytes()
