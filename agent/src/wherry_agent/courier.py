"""The courier: a short-lived child that does for the supervisor what needs trust, keys or a long download.

`python -m wherry_agent.courier` reads one task (`children.CourierTask`) from standard input, writes answers as JSON
lines and exits. A second line of input is the seal for what lies on the disk (`sealing.Seal.line`). It may be killed at any time: what it finished is durable, what it began resumes or starts again. It
exits 0 whenever it could say how the task went.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from wherry_agent import courier_resolve, identity
from wherry_agent.children import (
    CourierAnswer,
    CourierTask,
    Enrol,
    Enrolled,
    Failed,
    Fetch,
    Fetched,
    Progress,
    Refresh,
    Refreshed,
    Renew,
    Reseal,
    Resealed,
    Resolve,
    Resolved,
    Revoked,
    Scrub,
    Verified,
    Verify,
    encode_line,
)
from wherry_agent.courier_blobs import INFO_BYTES_MAX, PATH, Blobs
from wherry_agent.courier_enrol import bring_in_line, enrol
from wherry_agent.courier_http import Http, of_device
from wherry_agent.courier_keys import bring_keys
from wherry_agent.courier_renew import renew
from wherry_agent.courier_scrub import scrub
from wherry_agent.disk import Disk, disk_of
from wherry_agent.identity import Identity
from wherry_agent.mirrors import Mirrors
from wherry_agent.rate import Bucket
from wherry_agent.sealing import STOPS, Seal
from wherry_agent.store import Store
from wherry_agent.trust import SECOND_US, Keeper, Known, Session
from wherry_shared import dsse, limits, reasons, wire
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError, UnreachableError, WherryError

log = logging.getLogger("wherry.courier")

TASK_BYTES_MAX = 4 * limits.MIB
PROGRESS_EVERY_S = 1.0
NICENESS = 10
"""Of a scrub, which nobody waits for."""
DETAIL_CHARS_MAX = limits.REPORT_DETAIL_CHARS_MAX
UNKNOWN_KEY_REFRESH_S = 60.0
"""Offers with unknown keys cause a refresh at most this often: anybody at the broker could send them."""

Emit = Callable[[CourierAnswer], None]

RETRY_AFTER_S = {
    reasons.NETWORK: 10.0,
    reasons.TRUST_UNSIGNED: 60.0,
    reasons.TRUST_EXPIRED: 120.0,
    reasons.TRUST_ROLLBACK: 300.0,
    reasons.TRUST_INVALID: 300.0,
    reasons.DIGEST_MISMATCH: 300.0,
    reasons.DISK: 60.0,
    reasons.DISK_FULL: 60.0,
    reasons.READ_ONLY: 300.0,
    reasons.CHILD_FAILED: 60.0,
    reasons.KEY_MISSING: 2.0,
}
"""When to try again, by reason; what is not listed does not change by itself."""
_REASONS = frozenset(value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str))
_BY_CODE = {
    "config_format": reasons.UNSUPPORTED,
    "config_requires": reasons.UNSUPPORTED,
    "layer_encrypted": reasons.UNSUPPORTED,
    "answer_too_large": reasons.NETWORK,
    "bad_url": reasons.NETWORK,
    "identity_invalid": reasons.TRUST_INVALID,
    **dict.fromkeys((*STOPS, "record_altered", "cipher_missing"), reasons.DISK),
}
_BY_TASK: dict[type, str] = {
    Enrol: reasons.ENROL_REFUSED,
    Renew: reasons.ENROL_REFUSED,
    Reseal: reasons.DISK,
    Refresh: reasons.TRUST_INVALID,
    Verify: reasons.OFFER_INVALID,
    Resolve: reasons.BUNDLE_INVALID,
    Fetch: reasons.BUNDLE_INVALID,
    Scrub: reasons.DISK,
}


def run(task: CourierTask, emit: Emit, *, disk: Disk | None = None, wall_s: float | None = None) -> CourierAnswer:
    """Do a task; every refusal and failure becomes `Failed`.

    Args:
        task: what to do.
        emit: takes `Progress` on the way.
        disk: the seam for durable writes.
        wall_s: wall time, seconds since 1970; the system's by default.
    """
    disk = disk or disk_of("courier")
    wall_us = int((time.time() if wall_s is None else wall_s) * SECOND_US)
    try:
        match task:
            case Enrol():
                known = enrol(task, disk)
                return Enrolled(device=known.device, project=known.project)
            case Renew():
                known = _identity(task.home, disk)
                server = (task.server or known.server).rstrip("/")
                return renew(task, known, _http(task.home, known, server, disk), server, disk)
            case Reseal():
                bring_in_line(Path(task.home), disk)
                return Resealed()
            case Refresh():
                return _refresh(task, disk, wall_us)
            case Verify():
                return _verify(task, disk, wall_us)
            case Resolve():
                return _resolve(task, disk, wall_us)
            case Fetch():
                return _fetch(task, emit, disk)
            case Scrub():
                return scrub(task, disk)
    except WherryError as error:
        log.info("%s: %s", type(task).__name__, error)
        return _failed(_reason(task, error), error.message)
    except Exception as error:
        log.exception("%s", type(task).__name__)
        return _failed(reasons.CHILD_FAILED, f"{type(error).__name__}: {error}")


def _refresh(task: Refresh, disk: Disk, wall_us: int) -> Refreshed:
    keeper = _keeper(task, disk, wall_us)
    with keeper.online() as session:
        session.director_keys()
        said = [found for model, manifests in task.watched.items() for found in _revoked(session, model, manifests)]
        return Refreshed(trust=keeper.commit(session), revoked=said)


def _revoked(session: Session, model: str, manifests: list[str]) -> Iterator[Revoked]:
    """Ask the policy of a model about versions; one that cannot be had says nothing, and installs nothing either."""
    try:
        policy = session.policy(model)
    except RefusedError as error:
        log.warning("the policy of %s cannot be read: %s", model, error)
        return
    for manifest in manifests:
        if manifest in policy.revoked:
            yield Revoked(model=model, manifest=manifest, effect="stop" if manifest in policy.stop else "replace")


def _verify(task: Verify, disk: Disk, wall_us: int) -> Verified:
    try:
        data = base64.b64decode(task.envelope, validate=True)
    except binascii.Error as error:
        raise RefusedError(reasons.OFFER_INVALID, "the supervisor sent no envelope") from error
    keyid = dsse.open_envelope(data)[0].keyid
    keeper = _keeper(task, disk, wall_us)
    try:
        with keeper.offline() as session:
            if keyid in session.director_keys():
                return _judge(task, data, keeper, session)
    except UnreachableError:
        pass  # nothing here yet: the network decides
    except RefusedError as error:
        if error.code not in (reasons.TRUST_EXPIRED, reasons.TRUST_INVALID):
            raise  # what is here expired or was damaged: newer metadata may still be good
    else:
        _limit_unknown_keys(Path(task.home), disk, wall_us)
    with keeper.online() as session:
        return _judge(task, data, keeper, session)


def _judge(task: Verify, data: bytes, keeper: Keeper, session: Session) -> Verified:
    """Check an offer against the director keys of a verified state."""
    verifiers = {keyid: _verifier(pem) for keyid, pem in session.director_keys().items()}
    payload = dsse.verify(dsse.OFFER_TYPE, data, verifiers)
    offer = wire.parse(wire.Offer, payload)
    if offer.device != task.device or offer.project != task.project:
        raise RefusedError(
            reasons.OFFER_FOREIGN, f"an offer for {offer.device[:22]} in {offer.project[:64]} came to this device"
        )
    if offer.expires_at <= session.reference_us:
        raise RefusedError(reasons.OFFER_EXPIRED, f"offer {offer.serial} expired")
    trust = keeper.commit(session, signed_us=offer.issued_at)
    return Verified(offer=offer, digest=of_bytes(payload), trust=trust)


def _resolve(task: Resolve, disk: Disk, wall_us: int) -> Resolved:
    courier_resolve.check_offered(task)
    length, trust = courier_resolve.release(task, _keeper(task, disk, wall_us))
    blobs = _blobs(task, disk, tries_max=3)
    manifest, config = courier_resolve.config_of(blobs, task.offered.manifest, length)
    found, passed_over = courier_resolve.candidates(task, manifest, config, blobs.store, note=log.info)
    needed = {digest for one in found for digest in one.loadable.digests}
    known = _identity(task.home, disk)
    bring_keys(Path(task.home), known, blobs.http, blobs.server, disk, task.offered.manifest, manifest, needed)
    return Resolved(
        manifest=task.offered.manifest,
        candidates=found,
        passed_over=passed_over,
        preprocess_id=config.preprocess.id,
        trust=trust,
    )


def _fetch(task: Fetch, emit: Emit, disk: Disk) -> Fetched:
    blobs = _blobs(task, disk, tries_max=max(1, task.tries_max))
    manifest, config = courier_resolve.config_of(blobs, task.manifest, _manifest_bytes(task.manifest, blobs))
    variant = next((item for item in config.variants if item.id == task.variant), None)
    if variant is None:
        raise RefusedError(reasons.NO_VARIANT, f"{task.manifest} has no variant {task.variant[:64]}")
    wanted = courier_resolve.wanted_blobs(manifest, config, variant)
    bring_keys(
        Path(task.home), _identity(task.home, disk), blobs.http, blobs.server, disk, task.manifest, manifest, wanted
    )
    total = sum(length for digest, length in wanted.items() if not blobs.store.has(digest, length))
    last = time.monotonic()

    def report(_count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S:
            last = now
            emit(Progress(done_bytes=min(blobs.wire_bytes, total), total_bytes=total))

    blobs.report = report
    for digest, length in wanted.items():
        blobs.bring(digest, length)
    if config.assets is not None:
        blobs.store.unpack(config.assets.digest, config.assets.files)
    return Fetched(manifest=task.manifest, variant=task.variant, bytes=blobs.wire_bytes)


def _manifest_bytes(digest: str, blobs: Blobs) -> int:
    """Return the length of a manifest: from the store, where resolving left it, else as the server says it."""
    data = blobs.store.read(digest, limits.MANIFEST_BYTES_MAX)
    if data is not None:
        return len(data)
    with blobs.http.request("GET", f"{blobs.server}{PATH}{digest}/info") as answer:
        if answer.status != 200:
            raise UnreachableError(reasons.NETWORK, f"the server answered {answer.status} for {digest}")
        info = wire.parse(wire.BlobInfo, answer.read(INFO_BYTES_MAX), bytes_max=INFO_BYTES_MAX)
    if not 0 < info.bytes <= limits.MANIFEST_BYTES_MAX:
        raise RefusedError(reasons.BUNDLE_INVALID, f"{digest} is too large for a manifest")
    return info.bytes


# --- parts --------------------------------------------------------------------------------------


def _identity(home: str, disk: Disk) -> Identity:
    known = identity.load(Path(home), disk.seal)
    if known is None:
        raise RefusedError("identity_invalid", "this device is not enrolled", next_step="enrol it with a token")
    return known


def _http(home: str, known: Identity, server: str, disk: Disk) -> Http:
    return of_device(Path(home), known, server, password=identity.password(disk.seal), wall_s=time.time())


def _keeper(task: Refresh | Verify | Resolve, disk: Disk, wall_us: int) -> Keeper:
    known = _identity(task.home, disk)
    server = (task.server or known.server).rstrip("/")
    return Keeper(
        Path(task.home),
        disk,
        root_digest=known.root_digest,
        metadata_url=server + known.tuf_path,
        http=_http(task.home, known, server, disk),
        known=Known(task.current, task.floors, task.time_floor_us),
        wall_us=wall_us,
    )


def _blobs(task: Resolve | Fetch, disk: Disk, *, tries_max: int) -> Blobs:
    known = _identity(task.home, disk)
    server = (task.server or known.server).rstrip("/")
    mirrors = Mirrors(Path(task.home), disk, list(task.mirrors), time.time())
    return Blobs(
        store=Store(Path(task.home), disk),
        disk=disk,
        http=_http(task.home, known, server, disk),
        server=server,
        mirrors=mirrors.usable(),
        tries_max=tries_max,
        bucket=Bucket(task.bytes_per_s_max if isinstance(task, Fetch) else 0, time.monotonic()),
        reserve_bytes=task.reserve_bytes if isinstance(task, Fetch) else 0,
        on_lie=mirrors.lied,
    )


def _verifier(pem: str) -> Callable[[bytes, bytes], bool]:
    try:
        key = load_pem_public_key(pem.encode())
    except ValueError as error:
        raise RefusedError(reasons.TRUST_INVALID, "director.json holds something that is no key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise RefusedError(reasons.TRUST_INVALID, "director.json holds a key that is not Ed25519")

    def verify(message: bytes, signature: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return verify


def _limit_unknown_keys(home: Path, disk: Disk, wall_us: int) -> None:
    """Let an offer with an unknown key cause a refresh only now and then."""
    stamp = home / "trust" / "unknown-key"
    data = disk.read(stamp) or b"0"
    since_s = (wall_us - int(data)) / SECOND_US if data.isdigit() else UNKNOWN_KEY_REFRESH_S
    if 0 <= since_s < UNKNOWN_KEY_REFRESH_S:
        raise RefusedError("key_unknown", "an offer was signed with a key that nobody names; asked a moment ago")
    disk.write_atomic(stamp, str(wall_us).encode())


def _reason(task: CourierTask, error: WherryError) -> str:
    if error.code in _REASONS:
        return error.code
    if isinstance(error, UnreachableError):
        return reasons.NETWORK
    return _BY_CODE.get(error.code, _BY_TASK[type(task)])


def _failed(reason: str, detail: str) -> Failed:
    return Failed(reason=reason, detail=detail[:DETAIL_CHARS_MAX], retry_after_s=RETRY_AFTER_S.get(reason))


def main() -> int:
    """Read a task, do it, say how it went."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    os.umask(0o077)
    data = sys.stdin.buffer.read(TASK_BYTES_MAX + 1)

    def emit(answer: CourierAnswer) -> None:
        sys.stdout.buffer.write(encode_line(answer))
        sys.stdout.buffer.flush()

    asked, _, line = data.partition(b"\n")
    try:
        task: CourierTask = msgspec.json.decode(asked, type=CourierTask)
        seal = Seal.of_line(line) if line else None
    except (msgspec.DecodeError, ValueError) as error:
        emit(_failed(reasons.CHILD_FAILED, f"not a task: {error}"))
        return 0
    if isinstance(task, Scrub):
        os.nice(NICENESS)
    emit(run(task, emit, disk=disk_of("courier", seal)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
