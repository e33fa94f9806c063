"""How simulated devices become devices: enrolment over HTTP and one TUF refresh, both the real protocols.

One economy, named wherever counts are printed: the metadata are refreshed once per swarm instead of once per device. Keys are
derived, one for each device, since a server takes a key for one device only.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.ngclient.updater import Updater

from wherry_shared import frames, limits, wire
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.facts import DeviceFacts

ENROL_TRIES_MAX = 5
ENROL_AT_ONCE = 8
"""Enrolments on the way at one time: a swarm must not be a denial of service."""
_TIMEOUT_S = 30.0
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

Verifier = Callable[[bytes, bytes], bool]


@dataclass(frozen=True, slots=True)
class Identity:
    """What one enrolled device keeps."""

    device: str
    project: str
    bearer: str
    mac_key: bytes
    broker_host: str
    broker_port: int
    tuf_path: str


class Enroller:
    """Enrols devices of one swarm, each with a key of its own."""

    def __init__(self, client: httpx.AsyncClient, token: str, swarm: str) -> None:
        self._client = client
        self._token = token
        self._swarm = swarm
        self._slots = asyncio.Semaphore(ENROL_AT_ONCE)

    def _csr(self, name: str) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(subject)
            .sign(_key(self._token, self._swarm, name), hashes.SHA256())
        )
        return request.public_bytes(serialization.Encoding.PEM).decode()

    async def enrol(self, name: str, labels: dict[str, str], facts: DeviceFacts) -> Identity:
        """Enrol one device.

        Raises:
            RefusedError: the server's own code (a bad or used-up token), or `answer_invalid`.
            UnreachableError: `server_unreachable` after `ENROL_TRIES_MAX` tries.
        """
        request = wire.EnrolRequest(
            format=wire.FORMAT, token=self._token, csr_pem=self._csr(name), name=name, labels=labels, facts=facts
        )
        body = wire.encode(request)
        trouble = ""
        async with self._slots:
            for attempt in range(ENROL_TRIES_MAX):
                try:
                    answer = await self._client.post("/device/v1/enrol", content=body, timeout=_TIMEOUT_S)
                except httpx.HTTPError as error:
                    trouble = f"{type(error).__name__}: {error}"
                else:
                    if answer.status_code == httpx.codes.OK:
                        return _identity(answer.content)
                    if answer.status_code < 500:
                        raise _refusal(answer)
                    trouble = f"HTTP {answer.status_code}"
                await asyncio.sleep(0.5 * 2**attempt)
        raise UnreachableError(
            "server_unreachable",
            f"{self._client.base_url} did not enrol {name}: {trouble}",
            consequence="the swarm did not start",
            next_step="check the address, and that wherry dev is running",
        )


def _key(token: str, swarm: str, name: str) -> ec.EllipticCurvePrivateKey:
    """Derive the key of a device, so that the same swarm started again is the same devices to the server."""
    digest = hmac.digest(token.encode(), f"wherry swarm key v2/{swarm}/{name}".encode(), hashlib.sha256)
    return ec.derive_private_key(1 + int.from_bytes(digest, "big") % (_P256_ORDER - 1), ec.SECP256R1())


def _identity(body: bytes) -> Identity:
    answer = wire.parse(wire.EnrolAnswer, body)
    key = base64.b64decode(answer.mac_key)
    if len(key) != frames.KEY_BYTES:
        raise RefusedError("answer_invalid", f"the frame key has {len(key)} bytes, not {frames.KEY_BYTES}")
    if answer.broker_tls:
        raise RefusedError(
            "unsupported",
            "this server wants MQTT over TLS, which the swarm does not speak",
            next_step="use the swarm against wherry dev",
        )
    return Identity(
        device=answer.device,
        project=answer.project,
        bearer=answer.bearer,
        mac_key=key,
        broker_host=answer.broker_host,
        broker_port=answer.broker_port,
        tuf_path=answer.tuf_path or f"/tuf/{answer.project}",
    )


class _Problem(msgspec.Struct):
    code: str = "http_error"
    title: str = ""
    detail: str = ""
    consequence: str = ""
    next_step: str = ""


def _refusal(answer: httpx.Response) -> RefusedError:
    try:
        problem = msgspec.json.decode(answer.content, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem(detail=answer.text[:200])
    message = problem.detail or problem.title or f"HTTP {answer.status_code}"
    return RefusedError(problem.code, message, consequence=problem.consequence, next_step=problem.next_step)


class _DirectorCustom(msgspec.Struct):
    format: int
    keys: dict[str, str]


def director_keys(server: str, tuf_path: str, token: str) -> dict[str, Verifier]:
    """Fetch the director's public keys as an agent does: root v1 by the token's digest, then TUF to `director.json`.

    Blocking: call it in a thread. Returns key id → function of (message, signature).

    Raises:
        RefusedError: `token_invalid`, `trust_invalid`.
        UnreachableError: `trust_unreachable`.
    """
    parts = token.split(".")
    if len(parts) != 3 or parts[0] != "wherry1":
        raise RefusedError("token_invalid", "an enrolment token is wherry1.SECRET.ROOT-DIGEST")
    base = server.rstrip("/") + tuf_path + "/"
    try:
        answer = httpx.get(base + "1.root.json", timeout=_TIMEOUT_S)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise UnreachableError("trust_unreachable", f"cannot fetch {base}1.root.json: {error}") from error
    root = answer.content
    if len(root) > limits.TUF_ROOT_BYTES_MAX or hashlib.sha256(root).hexdigest() != parts[2]:
        raise RefusedError(
            "trust_invalid",
            "root version 1 is not the one that the token names",
            consequence="nothing that this server says is believed",
            next_step="ask for a token of this server",
        )
    with tempfile.TemporaryDirectory(prefix="wherry-swarm-") as folder:
        try:
            updater = Updater(metadata_dir=str(Path(folder)), metadata_base_url=base, bootstrap=root)
            updater.refresh()
            target = updater.get_targetinfo("director.json")
        except DownloadError as error:
            raise UnreachableError("trust_unreachable", f"cannot refresh {base}: {error}") from error
        except RepositoryError as error:
            raise RefusedError("trust_invalid", f"the metadata at {base} do not verify: {error}") from error
    if target is None:
        raise RefusedError("trust_invalid", "no target director.json: this server has no director")
    try:
        custom = msgspec.convert((target.custom or {}).get("wherry"), _DirectorCustom)
    except msgspec.ValidationError as error:
        raise RefusedError("trust_invalid", f"director.json is not as expected: {error}") from error
    return {keyid: _verifier(pem) for keyid, pem in custom.keys.items()}


def _verifier(pem: str) -> Verifier:
    key = serialization.load_pem_public_key(pem.encode())
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise RefusedError("trust_invalid", "a director key is Ed25519")

    def good(message: bytes, signature: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return good
