"""The device's side of TUF: sets of verified metadata that survive power loss and never go backwards.

    HOME/trust/root.json   root v1, immutable, pinned by the digest in the enrolment token: the only trust anchor
    HOME/trust/N/          a whole verified set, as python-tuf left it; the journal names the N in use
    HOME/trust/roots/      newer roots that were verified before a refresh failed

python-tuf writes without fsync and believes what it finds, so it works on a scratch copy; the result is checked against
the journal's floors (a set whose snapshot was zeroed by a power cut would let an older repository in), synced, and
renamed to the next number. Bytes on the way come from HTTP (`online`) or from the set itself (`offline`: python-tuf has
no mode for that, but a fetcher that answers from the folder is one). Only the courier imports this.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from wherry_agent import canonical_json
from wherry_agent.children import Trust
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk, device_error
from wherry_shared import limits, reasons
from wherry_shared.bundle import FORMAT
from wherry_shared.digest import is_digest
from wherry_shared.errors import RefusedError, UnreachableError

log = logging.getLogger(__name__)
canonical_json.use()

ROOT_FILE = "root.json"
SIGNED_AT = "x-wherry-signed-at"
"""Field of the signed timestamp: when the server signed it, µs UTC."""
DIRECTOR_TARGET = "director.json"
SCRATCH = ".scratch"
ROOTS = "roots"
CONFIG = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=8,
    root_max_length=limits.TUF_ROOT_BYTES_MAX,
    timestamp_max_length=16 * limits.KIB,
    snapshot_max_length=limits.TUF_METADATA_BYTES_MAX,
    targets_max_length=limits.TUF_METADATA_BYTES_MAX,
)
GZIP = 31
"""What zlib calls gzip's frame."""
PIECE_BYTES = 64 * limits.KIB
KEYS_MAX = 16
WORDS_CHARS_MAX = 500
VERSION_MAX = (1 << 53) - 1
"""No role gets there by counting, nor by seconds since 1970."""
MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""python-tuf looks at few types of what is signed, so these may come from it when it reads a role that says numbers for names."""
SECOND_US = 1_000_000


@dataclass(frozen=True)
class Policy:
    """What a publisher says about its model's versions."""

    floor: str = ""
    revoked: frozenset[str] = frozenset()
    """Manifests that nobody is to install."""
    stop: frozenset[str] = frozenset()
    """Those of them that are not to serve any more either."""


@dataclass(frozen=True)
class Known:
    """What the journal knows: the set in use, floors of role versions, the time below which no clock may fall."""

    current: int
    floors: dict[str, int]
    time_floor_us: int


class VerifyingUpdater(Updater):
    """python-tuf's client with a clock of ours, and with what it verified to be looked at."""

    def set_reference_time(self, moment: datetime) -> None:
        """Judge expiry at `moment`; python-tuf takes the wall clock and has no argument for it."""
        self._trusted_set.reference_time = moment

    def verified(self) -> dict[str, Signed]:
        """Return every role that was verified, by name."""
        return dict(self._trusted_set._trusted_set)  # noqa: SLF001 - its own iteration gives values without names


class Online(FetcherInterface):
    """Fetches from a server; an unchanged timestamp costs a 304, and the rest may come compressed: names and hex say little.

    Whoever asks counts what it gets, so a body that grows without end is left at its bound.
    """

    def __init__(self, http: Http, folder: Path) -> None:
        self._http = http
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "gzip"}
        cached = b""
        if url.endswith("/timestamp.json"):
            with contextlib.suppress(FileNotFoundError):
                cached = (self._folder / "timestamp.json").read_bytes()
                headers["If-None-Match"] = f'"{hashlib.sha256(cached).hexdigest()}"'
        with self._http.request("GET", url, headers=headers) as answer:
            if answer.status == 304 and cached:
                yield cached
                return
            if answer.status != 200:
                raise exceptions.DownloadHTTPError(f"{url}: {answer.status}", answer.status)
            if answer.header("Content-Encoding").lower() == "gzip":
                yield from _unpacked(url, answer.chunks())
            else:
                yield from answer.chunks()


def _unpacked(url: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress as it comes, a bounded piece at a time."""
    decoder = zlib.decompressobj(wbits=GZIP)
    try:
        for chunk in chunks:
            data, piece = chunk, b""
            while data or len(piece) == PIECE_BYTES:
                piece = decoder.decompress(data, PIECE_BYTES)
                data = decoder.unconsumed_tail
                if piece:
                    yield piece
    except zlib.error as error:
        raise exceptions.DownloadError(f"{url}: not what gzip makes") from error
    if not decoder.eof:
        raise exceptions.DownloadError(f"{url}: its compressed body ends early")


class _Offline(FetcherInterface):
    """Answers from the set itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = urlsplit(url).path.rpartition("/")[2]
        if name.endswith(".snapshot.json"):  # asked for only if the set's own was found expired or wrong: say so again
            name = "snapshot.json"
        path = self._folder / name
        if name not in ("timestamp.json", "snapshot.json") or not path.is_file():  # newer roots, roles never fetched
            raise exceptions.DownloadHTTPError(f"{name} is not on this device", 404)
        yield path.read_bytes()


class Session:
    """A verified repository state to ask questions of; what they fetch is kept by `commit`."""

    def __init__(self, updater: VerifyingUpdater, folder: Path, known: Known, reference_us: int) -> None:
        self._updater = updater
        self._folder = folder
        self._known = known
        self.reference_us = reference_us
        """The instant at which expiry is judged."""

    def target(self, path: str) -> TargetFile | None:
        """Return what a target is, None if nobody at threshold says so.

        Raises:
            RefusedError: `trust_expired`, `trust_rollback` or `trust_invalid`.
            UnreachableError: `network`.
        """
        with border():
            try:
                found = self._updater.get_targetinfo(path)
            except exceptions.RepositoryError:
                if self._delegated_to_nobody(path):
                    return None
                raise
        self.check_floors()
        return found

    def manifest_of(self, path: str) -> tuple[str, int] | None:
        """Return (digest, length) of the manifest of a release, None if it is not signed.

        Raises:
            RefusedError: as `target`, `trust_invalid` too if the target names no manifest.
        """
        target = self.target(path)
        if target is None:
            return None
        manifest = _own(target).get("manifest")
        if (
            not isinstance(manifest, str)
            or not is_digest(manifest)
            or target.hashes.get("sha256") != manifest[7:]
            or not 0 < target.length <= limits.MANIFEST_BYTES_MAX
        ):
            raise RefusedError(reasons.TRUST_INVALID, f"target {path} names no manifest")
        return manifest, target.length

    def policy(self, model: str) -> Policy:
        """Return the publisher's policy for a model.

        Raises:
            RefusedError: as `target`; `trust_invalid` if it cannot be read: a policy that is not understood is obeyed
                by doing nothing.
        """
        target = self.target(f"{model}/policy")
        if target is None:
            return Policy()
        own = _own(target)
        floor, revoked = own.get("floor", ""), own.get("revoked", [])
        if not isinstance(floor, str) or not isinstance(revoked, list):
            raise RefusedError(reasons.TRUST_INVALID, f"the policy of {model} cannot be read")
        digests = [entry.get("digest") if isinstance(entry, dict) else None for entry in revoked]
        if not all(isinstance(digest, str) and is_digest(digest) for digest in digests):
            raise RefusedError(reasons.TRUST_INVALID, f"the policy of {model} revokes something unreadable")
        stop = frozenset(str(entry["digest"]) for entry in revoked if entry.get("effect") == "stop")
        return Policy(floor, frozenset(str(digest) for digest in digests), stop)

    def director_keys(self) -> dict[str, str]:
        """Return key id → PEM of the keys that may sign offers.

        Raises:
            RefusedError: as `target`; `trust_invalid` if the targets role names none.
        """
        target = self.target(DIRECTOR_TARGET)
        keys = _own(target).get("keys") if target is not None else None
        if not isinstance(keys, dict) or not 1 <= len(keys) <= KEYS_MAX:
            raise RefusedError(reasons.TRUST_INVALID, "the repository names no director key")
        return {str(keyid): str(pem) for keyid, pem in keys.items()}

    def check_floors(self) -> None:
        """Refuse a state in which any role is older than this device has seen it.

        Raises:
            RefusedError: `trust_rollback`; `trust_invalid`, a version that none can reach.
        """
        verified = self._updater.verified()
        snapshot = verified.get(Snapshot.type)
        listed = snapshot.meta if isinstance(snapshot, Snapshot) else {}
        for role, found in verified.items():
            if not 0 < found.version <= VERSION_MAX or isinstance(found.version, bool):
                raise RefusedError(reasons.TRUST_INVALID, f"{role} is at version {found.version}, which none can reach")
        for role, floor in self._known.floors.items():
            signed = verified.get(role)
            if role in (Timestamp.type, Snapshot.type) and self._rotated(role):
                continue  # versions begin anew with new online keys: TUF's recovery from a fast-forward
            if signed is not None:
                version = signed.version
            else:
                meta = listed.get(f"{role}.json")
                version = meta.version if meta is not None else 0
            if version < floor:
                raise RefusedError(
                    reasons.TRUST_ROLLBACK,
                    f"{role} is at version {version}, this device has seen {floor}",
                    consequence="nothing is installed; what serves goes on",
                    next_step="the repository went back: wherry trust repair, or somebody replays old metadata",
                )

    def trust(self, current: int, *, changed: bool, signed_us: int = 0) -> Trust:
        """Return what the journal should know of this state; `signed_us` is another verified signed time."""
        verified = self._updater.verified()
        floors = dict(self._known.floors)
        for role, signed in verified.items():
            if role in (Timestamp.type, Snapshot.type) and self._rotated(role):
                floors[role] = signed.version
            else:
                floors[role] = max(floors.get(role, 0), signed.version)
        online = [verified[Timestamp.type].expires, verified[Snapshot.type].expires]
        offline = [signed.expires for role, signed in verified.items() if role not in (Timestamp.type, Snapshot.type)]
        stamp = verified[Timestamp.type].unrecognized_fields.get(SIGNED_AT, 0)
        seen = max(stamp if type(stamp) is int else 0, signed_us)
        floor = max(self._known.time_floor_us, min(seen, _us(min(offline))))
        return Trust(current=current, floors=floors, time_floor_us=floor, expires_at=_us(min(online)), changed=changed)

    def _rotated(self, role: str) -> bool:
        """Tell whether root gave `role` other keys since the journal's root."""
        before_version = self._known.floors.get(Root.type, 0)
        root = self._updater.verified()[Root.type]
        assert isinstance(root, Root)
        if before_version in (0, root.version):
            return False
        try:
            before = Metadata[Root].from_file(str(self._folder / "root_history" / f"{before_version}.root.json")).signed
        except (exceptions.RepositoryError, OSError, exceptions.StorageError):
            return False
        return not set(before.roles[role].keyids) & set(root.roles[role].keyids)

    def _delegated_to_nobody(self, path: str) -> bool:
        """Tell whether the signed snapshot says that the role which would name `path` does not exist (yet)."""
        verified = self._updater.verified()
        snapshot, role = verified.get(Snapshot.type), verified.get(Targets.type)
        for _ in range(CONFIG.max_delegations):
            if not isinstance(snapshot, Snapshot) or not isinstance(role, Targets) or role.delegations is None:
                return False
            following = next(iter(role.delegations.get_roles_for_target(path)), None)
            if following is None:
                return False
            if f"{following[0]}.json" not in snapshot.meta:
                return True
            role = verified.get(following[0])
        return False


class Keeper:
    """The sets of one device. Couriers that run at the same time wait for each other."""

    def __init__(
        self, home: Path, disk: Disk, *, root_digest: str, metadata_url: str, http: Http, known: Known, wall_us: int
    ) -> None:
        self._folder = home / "trust"
        self._disk = disk
        self._root_digest = root_digest
        self._url = metadata_url
        self._http = http
        self._known = known
        self._reference_us = max(wall_us, known.time_floor_us)

    @contextlib.contextmanager
    def online(self) -> Iterator[Session]:
        """Refresh over the network and yield the newest state.

        Raises:
            RefusedError: `trust_expired`, `trust_rollback` or `trust_invalid`.
            UnreachableError: `network`.
        """
        with self._session(online=True) as session:
            yield session

    @contextlib.contextmanager
    def offline(self) -> Iterator[Session]:
        """Yield the state of the set in use, if it has not expired.

        Raises:
            RefusedError: `trust_expired`, `trust_rollback` or `trust_invalid`.
            UnreachableError: `network`, if there is no set yet, or a question needs what the set does not hold.
        """
        with self._session(online=False) as session:
            yield session

    def commit(self, session: Session, *, signed_us: int = 0) -> Trust:
        """Keep what a session fetched: sync it and give it the next number; remove sets that nobody names any more.

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        scratch = self._folder / SCRATCH
        source = self._folder / str(self._known.current)
        changed = not _same(scratch, source)
        number = max([self._known.current, *self._numbers()]) + 1 if changed else self._known.current
        trust = session.trust(number, changed=changed, signed_us=signed_us)
        if changed:
            self._disk.unlink(scratch / ROOT_FILE)  # python-tuf's symlink; the anchor is ours, above
            for path in sorted(scratch.rglob("*")):
                if path.is_file():
                    self._disk.sync_file(path)
            self._disk.sync_folder(scratch / "root_history")
            self._disk.sync_folder(scratch)
            self._disk.rename(scratch, self._folder / str(number))
        for old in self._numbers():
            if old < self._known.current:
                self._disk.remove_tree(self._folder / str(old))
        return trust

    @contextlib.contextmanager
    def _session(self, *, online: bool) -> Iterator[Session]:
        scratch = self._folder / SCRATCH
        with self._locked():
            self._disk.remove_tree(scratch)
            self._disk.sweep(self._folder)
            source = self._folder / str(self._known.current)
            try:
                if self._known.current and source.is_dir():
                    _copy(source, scratch)
                else:
                    self._disk.mkdir(scratch)
                    if not online:
                        raise UnreachableError(reasons.NETWORK, "no trusted metadata on this device yet")
                self._add_roots(scratch)
                fetcher = Online(self._http, scratch) if online else _Offline(scratch)
                yield self._open(scratch, fetcher)
            except OSError as error:
                raise device_error(error, "trust") from error
            finally:
                self._disk.remove_tree(scratch)

    def _open(self, scratch: Path, fetcher: FetcherInterface) -> Session:
        with border():
            updater = open_updater(scratch, self._url, fetcher, self._root(), CONFIG)
            updater.set_reference_time(datetime.fromtimestamp(self._reference_us / SECOND_US, UTC))
            try:
                updater.refresh()
            except BaseException:
                self._keep_roots(updater.verified()[Root.type].version, scratch)
                raise
        session = Session(updater, scratch, self._known, self._reference_us)
        session.check_floors()
        return session

    def _keep_roots(self, newest: int, scratch: Path) -> None:
        """Keep verified roots of a refresh that failed after them, as TUF asks (5.3.8).

        Who holds revoked online keys must not be believed again because somebody hides the root that revoked them.
        """
        for version in range(max(self._known.floors.get(Root.type, 1), 1) + 1, newest + 1):
            kept = self._folder / ROOTS / f"{version}.root.json"
            if not kept.exists():
                self._disk.mkdir(kept.parent)
                self._disk.write_atomic(kept, (scratch / "root_history" / kept.name).read_bytes())

    def _add_roots(self, scratch: Path) -> None:
        """Give python-tuf the roots that `_keep_roots` kept; it verifies them again."""
        kept = self._folder / ROOTS
        if not kept.is_dir():
            return
        history = scratch / "root_history"
        history.mkdir(mode=0o700, exist_ok=True)
        for path in kept.glob("*.root.json"):
            if not (history / path.name).exists():
                shutil.copyfile(path, history / path.name)

    def _root(self) -> bytes:
        """Return the first root; one that the disk altered is asked for again, since its digest proves it whoever gives it."""
        data = self._disk.read(self._folder / ROOT_FILE)
        if data is not None and self._is_root(data):
            return data
        try:
            with self._http.request("GET", f"{self._url}/1.root.json") as answer:
                data = answer.read(limits.TUF_ROOT_BYTES_MAX) if answer.status == 200 else b""
        except (RefusedError, UnreachableError) as error:
            log.warning("the first root cannot be asked for again: %s", error)
            data = b""
        if not self._is_root(data):
            raise RefusedError(
                reasons.TRUST_INVALID,
                "the root of trust on this device is missing or altered, and nobody has it",
                consequence="nothing is installed; what serves goes on",
                next_step="let the device reach its server, or enrol it again",
            )
        self._disk.write_atomic(self._folder / ROOT_FILE, data)
        log.warning("the root of trust on this device was altered, and is here again")
        return data

    def _is_root(self, data: bytes) -> bool:
        return hashlib.sha256(data).hexdigest() == self._root_digest

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._disk.mkdir(self._folder)
        try:
            descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise device_error(error, "trust") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def open_updater(
    folder: Path, url: str, fetcher: FetcherInterface, root: bytes, config: UpdaterConfig
) -> VerifyingUpdater:
    """Open a folder of metadata under the anchor `root`; nothing is fetched yet. Call it inside `border`."""
    return VerifyingUpdater(str(folder), url, fetcher=fetcher, config=config, bootstrap=root)


@contextlib.contextmanager
def border() -> Iterator[None]:
    """Turn python-tuf's exceptions into ours."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise RefusedError(
            reasons.TRUST_EXPIRED,
            _words(error),
            consequence="nothing is installed; what serves goes on",
            next_step="see that the server signs its timestamp, and that the device's clock is right",
        ) from error
    except exceptions.BadVersionNumberError as error:
        raise RefusedError(reasons.TRUST_ROLLBACK, _words(error)) from error
    except exceptions.RepositoryError as error:
        raise RefusedError(reasons.TRUST_INVALID, _words(error)) from error
    except exceptions.DownloadLengthMismatchError as error:
        raise RefusedError(reasons.TRUST_INVALID, _words(error)) from error
    except MALFORMED as error:
        log.warning("metadata hold what python-tuf does not expect: %r", error)
        raise RefusedError(
            reasons.TRUST_INVALID,
            f"metadata are signed and make no sense: {type(error).__name__}: {str(error)[:WORDS_CHARS_MAX]}",
            consequence="nothing is installed; what serves goes on",
            next_step="see what was signed last at a ceremony or by the publisher",
        ) from error
    except exceptions.DownloadError as error:
        cause = error.__cause__ if isinstance(error.__cause__, UnreachableError) else error
        raise UnreachableError(reasons.NETWORK, str(cause)) from error


def _words(error: exceptions.RepositoryError | exceptions.DownloadError) -> str:
    """Return what an error says; some say nothing, and some hold all that was read."""
    return str(error)[:WORDS_CHARS_MAX] or type(error).__name__


def _own(target: TargetFile) -> dict[str, Any]:
    custom = target.unrecognized_fields.get("custom")
    own = custom.get("wherry") if isinstance(custom, dict) else None
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        raise RefusedError(reasons.TRUST_INVALID, f"target {target.path} says nothing of format {FORMAT}")
    return own


def _us(moment: datetime) -> int:
    return int(moment.timestamp()) * SECOND_US


def _copy(source: Path, scratch: Path) -> None:
    """Copy a set; `shutil.copytree` gathers errors into one without the number by which a full disk is told.

    Not through the seam: the scratch folder is removed before it is used, and synced through the seam before it counts.
    """
    scratch.mkdir(mode=0o700)
    for path in sorted(source.rglob("*")):
        copy = scratch / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(mode=0o700)
        else:
            shutil.copyfile(path, copy, follow_symlinks=False)


def _same(scratch: Path, source: Path) -> bool:
    """Tell whether two sets hold the same files."""
    if not source.is_dir():
        return False

    def content(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path != folder / ROOT_FILE
        }

    return content(scratch) == content(source)
