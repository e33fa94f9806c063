"""A bundle on disk: an OCI image layout, so that skopeo, oras and every registry can copy and inspect it.

The folder holds `oci-layout`, `index.json` and `blobs/sha256/<hex>`; the index names the manifest with the bundle's
version as `org.opencontainers.image.ref.name`, so `oci:PATH:VERSION` addresses it. Reading trusts nothing: `Layout`
parses the index, and every blob is counted and hashed on its way out. Blobs can be verified one by one, which is how
the server checks an upload. Only `msgspec` beyond the standard library, since devices and servers import this.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from wherry_shared import limits
from wherry_shared.bundle import (
    ANNOTATION_PATH,
    ANNOTATION_VARIANT,
    MANIFEST_TYPE,
    Config,
    Descriptor,
    Manifest,
    encrypted_layers,
    parse_config,
    parse_manifest,
)
from wherry_shared.digest import CHUNK_BYTES, Verifier, check_digest, checked, hex_of, of_bytes
from wherry_shared.errors import RefusedError

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ANNOTATION_REF = "org.opencontainers.image.ref.name"
LAYOUT_VERSION = "1.0.0"
SIGNED = Path(".wherry") / "signed"
"""Where a bundle keeps the bins in which it was signed, below its folder."""
SEALED = Path(".wherry") / "keys"
"""Where it keeps the content keys of what is encrypted in it, sealed for the `keys` role."""
INDEX_BYTES_MAX = limits.MANIFEST_BYTES_MAX


class Index(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """The content of `index.json`."""

    schema_version: int
    media_type: str = ""
    manifests: list[Descriptor]
    annotations: dict[str, str] = {}


class _Marker(msgspec.Struct, frozen=True):
    """The content of `oci-layout`."""

    version: str = msgspec.field(name="imageLayoutVersion")


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode a manifest; the same value always gives the same bytes."""
    return msgspec.json.encode(manifest, order="deterministic")


class Layout:
    """An existing OCI image layout, opened for reading.

    Raises:
        RefusedError: `layout_invalid` if the folder is not a layout that this release can read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        marker = self._read_small("oci-layout", 4096)
        try:
            version = msgspec.json.decode(marker, type=_Marker).version
            self.index = msgspec.json.decode(self._read_small("index.json", INDEX_BYTES_MAX), type=Index)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _invalid(root, str(error)) from error
        if version.split(".")[0] != "1" or self.index.schema_version != 2:
            raise _invalid(root, f"layout version {version[:20]!r}, index schema {self.index.schema_version}")
        for descriptor in self.index.manifests:
            check_digest(descriptor.digest)

    def descriptor(self, ref: str | None = None) -> Descriptor:
        """Return the descriptor of the manifest that `ref` (a version) names; without `ref` there must be exactly one.

        Raises:
            RefusedError: `layout_invalid`.
        """
        found = [
            item for item in self.index.manifests if ref is None or (item.annotations or {}).get(ANNOTATION_REF) == ref
        ]
        if len(found) != 1:
            names = ", ".join(item.annotations.get(ANNOTATION_REF, "?")[:64] for item in self.index.manifests) or "none"
            raise _invalid(self.root, f"expected one manifest{f' {ref}' if ref else ''}, the index has: {names}")
        if found[0].media_type != MANIFEST_TYPE:
            raise _invalid(self.root, f"{found[0].media_type[:80]!r} is not an image manifest")
        return found[0]

    def manifest_bytes(self, ref: str | None = None) -> bytes:
        """Return the verified bytes of the manifest that `ref` names."""
        return self.read(self.descriptor(ref), limits.MANIFEST_BYTES_MAX)

    def bundle(self, ref: str | None = None) -> tuple[bytes, Manifest, Config]:
        """Return (manifest bytes, manifest, config) of a bundle, verified and cross-checked, without its layers.

        Raises:
            RefusedError: `layout_invalid`, `blob_missing`, `digest_mismatch`, `length_mismatch`, `manifest_*`,
                `config_*`, or `config_invalid` if config and manifest name different blobs.
        """
        data = self.manifest_bytes(ref)
        manifest = parse_manifest(data)
        config = parse_config(self.read(manifest.config, limits.CONFIG_BYTES_MAX))
        check_layers(manifest, config)
        return data, manifest, config

    def path(self, digest: str) -> Path:
        """Return where the blob of that digest stands (it may be missing)."""
        return blob_path(self.root, digest)

    def chunks(self, descriptor: Descriptor) -> Iterator[bytes]:
        """Pass on the bytes of a blob, checked on their way; the error comes before the end of iteration.

        Raises:
            RefusedError: `blob_missing`, `digest_mismatch`, `length_mismatch`.
        """
        try:
            yield from checked(_file_chunks(self.path(descriptor.digest)), descriptor.digest, descriptor.size)
        except RefusedError as error:
            notes = descriptor.annotations
            what = notes.get(ANNOTATION_PATH) or notes.get(ANNOTATION_VARIANT) or descriptor.media_type
            raise RefusedError(
                error.code,
                f"{what[:120]} of {self.root}: {error.message}",
                consequence="the bundle is not whole as it was made, so it is neither signed nor sent",
                next_step="copy the bundle again, whole, or build it again",
            ) from error

    def read(self, descriptor: Descriptor, bytes_max: int) -> bytes:
        """Return a small blob whole and verified.

        Raises:
            RefusedError: `blob_too_large` beyond `bytes_max`; otherwise as `chunks`.
        """
        if descriptor.size > bytes_max:
            raise RefusedError(
                "blob_too_large",
                f"{descriptor.digest} claims {descriptor.size} bytes, at most {bytes_max}",
                consequence="it is not read",
                next_step="build the bundle again within the limits of docs/formats/bundle.md",
            )
        return b"".join(self.chunks(descriptor))

    def verify(self, descriptor: Descriptor) -> None:
        """Check one blob against its descriptor, streaming.

        Raises:
            RefusedError: `blob_missing`, `digest_mismatch`, `length_mismatch`.
        """
        for _ in self.chunks(descriptor):
            pass

    def verify_all(self, ref: str | None = None) -> Manifest:
        """Check manifest, config and every layer of a bundle.

        Raises:
            RefusedError: as `bundle` and `verify`.
        """
        _, manifest, _ = self.bundle(ref)
        for descriptor in manifest.layers:
            self.verify(descriptor)
        return manifest

    def _read_small(self, name: str, bytes_max: int) -> bytes:
        path = self.root / name
        try:
            with path.open("rb") as file:
                data = file.read(bytes_max + 1)
        except OSError as error:
            raise _invalid(self.root, f"{name}: {error.strerror}") from error
        if len(data) > bytes_max:
            raise _invalid(self.root, f"{name} has more than {bytes_max} bytes")
        return data


class LayoutWriter:
    """Writes an OCI image layout; every file appears whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        _replace(root / "oci-layout", msgspec.json.encode(_Marker(LAYOUT_VERSION)))

    def add_bytes(self, data: bytes, media_type: str, annotations: dict[str, str] | None = None) -> Descriptor:
        """Store `data` as a blob and return its descriptor."""
        digest = of_bytes(data)
        path = blob_path(self.root, digest)
        if not path.exists():
            _replace(path, data)
        return Descriptor(media_type=media_type, digest=digest, size=len(data), annotations=annotations or {})

    def add_file(self, source: Path, media_type: str, annotations: dict[str, str] | None = None) -> Descriptor:
        """Copy a file into a blob, hashed on its way, and return its descriptor."""
        return self.add_chunks(_file_chunks(source), media_type, annotations)

    def add_chunks(
        self, chunks: Iterator[bytes], media_type: str, annotations: dict[str, str] | None = None
    ) -> Descriptor:
        """Store what comes in pieces as a blob, hashed on its way, and return its descriptor."""
        partial = self.root / "blobs" / "sha256" / f".{secrets.token_hex(8)}"
        sha, size = hashlib.sha256(), 0
        try:
            with partial.open("xb") as file:
                for chunk in chunks:
                    sha.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
            digest = "sha256:" + sha.hexdigest()
            partial.replace(blob_path(self.root, digest))
        finally:
            partial.unlink(missing_ok=True)
        return Descriptor(media_type=media_type, digest=digest, size=size, annotations=annotations or {})

    def finish(self, manifest: Manifest, ref: str) -> Descriptor:
        """Store the manifest and name it `ref` in the index; a manifest of that name is replaced there."""
        descriptor = self.add_bytes(encode_manifest(manifest), MANIFEST_TYPE, {ANNOTATION_REF: ref})
        kept: list[Descriptor] = []
        if (self.root / "index.json").exists():
            kept = [m for m in Layout(self.root).index.manifests if m.annotations.get(ANNOTATION_REF) != ref]
        index = Index(schema_version=2, media_type=INDEX_TYPE, manifests=[*kept, descriptor])
        _replace(self.root / "index.json", msgspec.json.encode(index, order="deterministic"))
        return descriptor


def blob_path(root: Path, digest: str) -> Path:
    """Return where a layout at `root` keeps the blob of `digest`.

    Raises:
        RefusedError: `bad_digest`, so that no digest can name a path outside.
    """
    return root / "blobs" / "sha256" / hex_of(digest)


def verify_blob(path: Path, digest: str, size: int) -> None:
    """Check one file against a digest and a length, streaming.

    Raises:
        RefusedError: `blob_missing`, `digest_mismatch`, `length_mismatch`.
    """
    verifier = Verifier(digest, size)
    for chunk in _file_chunks(path):
        verifier.update(chunk)
    verifier.finish()


def check_layers(manifest: Manifest, config: Config) -> None:
    """Check that every blob that the config names is a layer of the manifest, with the same length unless it is encrypted.

    Raises:
        RefusedError: `config_invalid`.
    """
    sizes = {layer.digest: layer.size for layer in manifest.layers}
    encrypted = encrypted_layers(manifest)
    named = [(variant.digest, variant.bytes) for variant in config.variants]
    named += [(variant.golden.digest, variant.golden.bytes) for variant in config.variants]
    named = [(digest, size) for digest, size in named if digest not in encrypted]
    if config.assets is not None:
        named.append((config.assets.digest, config.assets.bytes))
    for digest, size in named:
        if sizes.get(digest) != size:
            raise RefusedError(
                "config_invalid",
                f"config names {digest} with {size} bytes, the manifest has {sizes.get(digest, 'no such layer')}",
                consequence="the bundle is neither signed nor sent",
                next_step="build it again",
            )


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RefusedError(
            "blob_missing",
            f"blob {path.name[:80]} is not there",
            consequence="the bundle is not whole, so it is neither signed nor sent",
            next_step="copy the whole folder again, or build it again",
        ) from error
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)  # noqa: PTH105 - the name says what matters: old or new, never half
    finally:
        partial.unlink(missing_ok=True)


def _invalid(root: Path, why: str) -> RefusedError:
    return RefusedError(
        "layout_invalid",
        f"{root} is not a bundle in an OCI image layout: {why}",
        next_step="name the folder that wherry-optimizer build or pack wrote",
    )
