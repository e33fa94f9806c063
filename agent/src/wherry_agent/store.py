"""Blobs on the device, named by the digest of their bytes: what has its name was verified and synced before it got it.

    HOME/store/blobs/sha256/HEX          verified
    HOME/store/blobs/sha256/HEX.part     growing; HEX.part.json says how much of it was synced, and who sent it
    HOME/store/blobs/sha256/HEX.ENCODED  an encoded object of which HEX is being made; it may have a .part too
    HOME/store/assets/HEX/               an unpacked assets layer
    HOME/store/keys/HEX.json             the sealed content key of an encrypted blob (`device_keys`)

After a power cut the tail of a partial file may be torn, so only what its record calls synced is kept. Every durable
step goes through `Disk`.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from wherry_agent.disk import Disk, Part, is_being_written
from wherry_shared.bundle import Asset
from wherry_shared.digest import CHUNK_BYTES, check_digest, hex_of, of_bytes
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.limits import ASSET_PATH_CHARS_MAX, ASSETS_BYTES_MAX, ASSETS_FILES_MAX, MIB
from wherry_shared.reasons import DIGEST_MISMATCH, DISK

SYNC_BYTES = 4 * MIB
"""A kill costs at most this much of a download."""
_COMPLETE = ".complete"
"""Stands in an assets folder when all of it is synced."""


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What `HEX.part.json` holds."""

    length: int
    synced: int
    sources: list[str] = []


class Partial:
    """A blob on its way: append what arrives, then `commit`. What was synced is there again after any end."""

    def __init__(self, final: Path, digest: str, length: int, disk: Disk) -> None:
        self._final = final
        self._disk = disk
        self.digest = check_digest(digest)
        self.length = length
        self._path = final.with_name(final.name + ".part")
        self._record_path = final.with_name(final.name + ".part.json")
        record = self._read_record()
        self.sources: list[str] = list(record.sources)
        """Everybody whose bytes are in it."""
        self._sha = hashlib.sha256()
        self.size = self._hash_existing(record.synced)
        self.resumed = self.size
        """Bytes that were here before: if they are wrong, it may have been this disk and not who sent them."""
        self._synced = self.size
        self._file: Part = disk.open_part(self._path, keep_bytes=self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, value, trace)

    def write(self, chunk: bytes, source: str) -> None:
        """Append bytes that `source` sent.

        Raises:
            RefusedError: `digest_mismatch`, as soon as there are more bytes than the blob has.
            DeviceError: `disk_full` or `disk`.
        """
        if self.size + len(chunk) > self.length:
            raise RefusedError(DIGEST_MISMATCH, f"{self.digest} is longer than its {self.length} bytes")
        if source not in self.sources:
            self.sources.append(source)
        self._file.write(chunk)
        self._sha.update(chunk)
        self.size += len(chunk)
        if self.size - self._synced >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Make everything so far durable, so that a restart resumes here.

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        if self._synced == self.size:
            return
        self._file.sync()
        record = _Record(length=self.length, synced=self.size, sources=self.sources)
        self._disk.write_atomic(self._record_path, msgspec.json.encode(record))
        self._synced = self.size

    def reset(self) -> None:
        """Start again from nothing, since what is there is wrong.

        Raises:
            DeviceError: `disk`.
        """
        self._file.__exit__(None, None, None)
        if self._disk.read(self._record_path) is not None:
            self._disk.unlink(self._record_path)
            self._disk.sync_folder(self._record_path.parent)  # else it may come back and speak of other bytes
        self._sha = hashlib.sha256()
        self.size = self._synced = self.resumed = 0
        self.sources = []
        self._file = self._disk.open_part(self._path, keep_bytes=0)

    def commit(self) -> None:
        """Verify the whole, sync it and give it its name.

        Raises:
            RefusedError: `digest_mismatch`; the partial file is left to `reset`.
            DeviceError: `disk_full` or `disk`.
        """
        found = "sha256:" + self._sha.hexdigest()
        if self.size != self.length or found != self.digest:
            raise RefusedError(DIGEST_MISMATCH, f"expected {self.digest}, found {found} in {self.size} bytes")
        self._file.sync()
        self._file.__exit__(None, None, None)
        self._disk.rename(self._path, self._final)
        self._disk.unlink(self._record_path)

    def discard(self) -> None:
        """Remove what is there.

        Raises:
            DeviceError: `disk`.
        """
        self._file.__exit__(None, None, None)
        self._disk.unlink(self._record_path)
        self._disk.unlink(self._path)

    def _read_record(self) -> _Record:
        empty = _Record(length=self.length, synced=0)
        data = self._disk.read(self._record_path)
        if data is None:
            return empty
        try:
            record = msgspec.json.decode(data, type=_Record)
        except msgspec.DecodeError:  # torn or older: the download starts again, which is always right
            return empty
        return record if record.length == self.length and 0 < record.synced <= self.length else empty

    def _hash_existing(self, keep: int) -> int:
        """Hash the first `keep` bytes on disk; 0 if there are fewer."""
        if not keep or not self._path.exists() or self._path.stat().st_size < keep:
            return 0
        left = keep
        with self._path.open("rb") as file:
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                self._sha.update(chunk)
                left -= len(chunk)
        return keep


class Store:
    """The content-addressed store of one device."""

    def __init__(self, home: Path, disk: Disk) -> None:
        self._disk = disk
        self._blobs = home / "store" / "blobs" / "sha256"
        self._assets = home / "store" / "assets"
        self._keys = home / "store" / "keys"
        for path in (self._blobs, self._assets):
            disk.mkdir(path)

    def path_of(self, digest: str) -> Path:
        """Return where the blob is, or will be."""
        return self._blobs / hex_of(digest)

    def assets_of(self, digest: str) -> Path:
        """Return the folder into which an assets layer is, or will be, unpacked."""
        return self._assets / hex_of(digest)

    def encoded_path(self, digest: str, encoded: str) -> Path:
        """Return where the object `encoded` is while the blob `digest` is made of it; it is kept or goes with the blob."""
        return self._blobs / f"{hex_of(digest)}.{hex_of(encoded)}"

    def has(self, digest: str, length: int) -> bool:
        """Tell whether the verified blob is here, whole."""
        return is_whole(self.path_of(digest), length)

    def intact(self, digest: str, length: int) -> bool:
        """Tell whether the blob is here and still what it was when it was verified: reads all of it.

        Raises:
            DeviceError: `disk`.
        """
        if not self.has(digest, length):
            return False
        sha = hashlib.sha256()
        try:
            with self.path_of(digest).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    sha.update(chunk)
        except OSError as error:
            raise DeviceError(DISK, f"{digest}: {error.strerror or error}", next_step="check the disk") from error
        return sha.hexdigest() == hex_of(digest)

    def part(self, digest: str, length: int, *, final: Path | None = None) -> Partial:
        """Begin or resume a blob, which gets the name `final` in the end (its own by default).

        Raises:
            DeviceError: `disk_full` or `disk`.
        """
        return Partial(final or self.path_of(digest), digest, length, self._disk)

    def forget(self, final: Path) -> None:
        """Remove a blob of this store and what was on the way to it.

        Raises:
            DeviceError: `disk`.
        """
        for suffix in (".part.json", ".part", ""):
            self._disk.unlink(final.with_name(final.name + suffix))

    def set_aside(self, digest: str) -> None:
        """Take its name from a blob that is not what it was; the bytes stay until the right ones are here.

        Raises:
            DeviceError: `disk` or `read_only`.
        """
        path = self.path_of(digest)
        self._disk.rename(path, path.with_name(path.name + ".altered"))

    def spoil_assets(self, digest: str) -> None:
        """Remove an assets folder that is not what it was; it is unpacked again.

        Raises:
            DeviceError: `disk` or `read_only`.
        """
        self._remove_assets(self.assets_of(digest))

    def add(self, digest: str, data: bytes) -> None:
        """Keep small bytes that are at hand.

        Raises:
            RefusedError: `digest_mismatch`.
            DeviceError: `disk_full` or `disk`.
        """
        if of_bytes(data) != check_digest(digest):
            raise RefusedError(DIGEST_MISMATCH, f"expected {digest}, found {of_bytes(data)}")
        self._disk.write_atomic(self.path_of(digest), data)

    def read(self, digest: str, bytes_max: int) -> bytes | None:
        """Return a small blob, verified again; None if it is not here or no longer what it was.

        Raises:
            DeviceError: `disk`.
        """
        path = self.path_of(digest)
        if not path.is_file() or path.stat().st_size > bytes_max:
            return None
        data = self._disk.read(path)
        if data is None or of_bytes(data) != digest:
            return None
        return data

    def used(self) -> int:
        """Return the bytes of all verified blobs and unpacked assets.

        Raises:
            DeviceError: `disk`.
        """
        return sum(_size(path) for path in (*self._finished(self._blobs), *self._finished(self._assets)))

    def collect(self, keep: set[str], *, bytes_max: int = 0) -> int:
        """Remove blobs, partial files and assets folders whose digest is not in `keep`; return the bytes freed.

        What is on the way to a blob that is here goes too: a power cut left it; not so what a living process writes.

        Args:
            keep: digests that stay in any case.
            bytes_max: what may stay of the others, the newest first, as long as all of the store is no more than that.

        Raises:
            DeviceError: `disk` or `read_only`.
        """
        names = {hex_of(digest) for digest in keep}
        freed = 0
        here = {path.name for path in self._finished(self._blobs)}
        others: list[Path] = []
        for folder in (self._blobs, self._assets):
            for path in sorted(folder.iterdir()):
                name, _, on_the_way = path.name.partition(".")
                if on_the_way and is_being_written(path):
                    continue
                if on_the_way and (name not in names or name in here):
                    freed += self._remove(path)
                elif name not in names:
                    others.append(path)
        used = self.used() if others and bytes_max else 0
        for path in sorted(others, key=lambda item: (item.stat().st_mtime_ns, item.name)):
            if bytes_max and used <= bytes_max:
                break
            size = self._remove(path)
            used -= size
            freed += size
        here = {path.name for path in self._finished(self._blobs)} | names
        for path in self._keys.glob("*.json"):
            if path.stem not in here:
                freed += self._remove(path)
        return freed

    @staticmethod
    def _finished(folder: Path) -> list[Path]:
        return [path for path in folder.iterdir() if "." not in path.name]

    def _remove(self, path: Path) -> int:
        size = _size(path)
        if path.is_dir():
            self._remove_assets(path)
        else:
            self._disk.unlink(path)
        return size

    def _remove_assets(self, folder: Path) -> None:
        """Remove an assets folder; what says that it is complete goes first, for a power cut may keep any of the rest."""
        if (folder / _COMPLETE).exists():
            self._disk.unlink(folder / _COMPLETE)
            self._disk.sync_folder(folder)
        self._disk.remove_tree(folder)

    def unpack(self, digest: str, files: Iterable[Asset]) -> Path:
        """Unpack a verified assets layer, exactly the declared files, each verified; return its folder.

        Raises:
            RefusedError: `assets_invalid` (links, escapes, strays, too much) or `digest_mismatch`.
            DeviceError: `disk_full` or `disk`.
        """
        folder = self.assets_of(digest)
        if (folder / _COMPLETE).exists():
            return folder
        declared = {asset.path: asset for asset in files}
        if len(declared) > ASSETS_FILES_MAX or sum(asset.bytes for asset in declared.values()) > ASSETS_BYTES_MAX:
            raise RefusedError("assets_invalid", f"{len(declared)} files, or too large when unpacked")
        self._disk.remove_tree(folder)
        self._disk.mkdir(folder)
        seen: set[str] = set()
        for path, data in asset_members(self.path_of(digest), declared):
            if of_bytes(data) != declared[path].digest:
                raise RefusedError(DIGEST_MISMATCH, f"asset {path!r} is not {declared[path].digest}")
            target = folder / path
            self._disk.mkdir(target.parent)
            self._disk.write_atomic(target, data)
            seen.add(path)
        missing = sorted(set(declared) - seen)
        if missing:
            raise RefusedError("assets_invalid", f"the assets layer lacks {', '.join(missing)[:200]}")
        self._disk.write_atomic(folder / _COMPLETE, b"")
        return folder


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def is_whole(path: Path, length: int) -> bool:
    """Tell whether a file has its length; whoever gave it its name verified it."""
    return path.is_file() and path.stat().st_size == length


def asset_members(path: Path, declared: dict[str, Asset]) -> Iterator[tuple[str, bytes]]:
    """Pass on the regular files of a tar; anything that a folder of plain files does not need is refused."""
    seen: set[str] = set()
    with path.open("rb") as raw:
        head = raw.read(2)
        raw.seek(0)
        if head in (b"\x1f\x8b", b"BZ", b"\xfd7"):
            raise RefusedError("assets_invalid", "the assets layer is compressed")
        try:
            with tarfile.open(fileobj=io.BufferedReader(raw), mode="r:") as tar:
                for count, member in enumerate(tar):
                    if count > 2 * ASSETS_FILES_MAX:
                        raise RefusedError("assets_invalid", "too many members in the assets layer")
                    name = member.name.removeprefix("./")
                    if member.isdir():
                        continue
                    asset = declared.get(name)
                    parts = name.split("/")
                    if (
                        not member.isreg()
                        or asset is None
                        or name in seen
                        or len(name) > ASSET_PATH_CHARS_MAX
                        or name.startswith("/")
                        or any(part in ("", ".", "..") for part in parts)
                        or parts[0] == _COMPLETE
                        or "\\" in name
                        or "\0" in name
                    ):
                        raise RefusedError("assets_invalid", f"member {member.name[:200]!r} of the assets layer")
                    if member.size != asset.bytes:
                        raise RefusedError("assets_invalid", f"member {name!r} has {member.size} bytes")
                    file = tar.extractfile(member)
                    assert file is not None
                    seen.add(name)
                    yield name, file.read(asset.bytes)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise RefusedError("assets_invalid", f"the assets layer is not a tar: {error}") from error
