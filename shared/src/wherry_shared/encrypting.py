"""Encrypting a built bundle: a new folder in which weights and golden vectors are ciphertext, before anybody signs it.

The config stays byte for byte: it names plaintexts. The manifest names the bytes at rest and says in annotations what is in
them. Beside the bundle, in `.wherry/keys/`, is one sealed content key per blob, for the `keys` role and nobody else; `wherry
bundle push` hands them in. Used by `wherry-optimizer encrypt`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import msgspec
import zstandard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from wherry_shared import content_keys, limits, tiles, wire
from wherry_shared.bundle import (
    ANNOTATION_ENCRYPTION,
    ANNOTATION_PLAIN_DIGEST,
    CONFIG_TYPE,
    ENCRYPTION,
    GOLDEN_TYPE,
    WEIGHT_TYPE,
    Descriptor,
)
from wherry_shared.digest import hex_of
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import SEALED, Layout, LayoutWriter
from wherry_shared.key_ring import KeyRing

ZSTD_LEVEL = 19
ZSTD_GAIN_MIN = 0.03
"""Below this share a frame saves less than decoding it in memory costs."""


@dataclass(frozen=True)
class Encrypted:
    """What `encrypt` made."""

    manifest: str
    blobs: int
    """Encrypted ones."""
    reused: int
    """Of them, those whose content key was in the key ring already."""
    bytes: int
    """Of the encrypted blobs at rest."""
    plain_bytes: int


def encrypt(bundle: Path, target: Path, role: X25519PublicKey, ring: KeyRing, *, fresh: bool = False) -> Encrypted:
    """Write to `target` what `bundle` is, with weights and golden vectors encrypted.

    Args:
        bundle: a built bundle, not encrypted yet; it stays as it is.
        target: a folder that is not there yet.
        role: for whom content keys are sealed: the `keys` role of the server.
        ring: where the publisher keeps them; a plaintext that was encrypted for this model before gets the same key.
        fresh: make new keys instead, so that who has the old ones opens nothing of it.

    Raises:
        RefusedError: `target_exists`, `encrypted_already`, `key_absent`, or what reading the bundle refused.
    """
    layout = Layout(bundle)
    _, manifest, config = layout.bundle()
    layout.verify_all()
    if any(ANNOTATION_ENCRYPTION in layer.annotations for layer in manifest.layers):
        raise RefusedError(
            "encrypted_already",
            f"{bundle} is encrypted already",
            consequence="nothing was written",
            next_step="encrypt the bundle that wherry-optimizer build or pack wrote",
        )
    if target.exists():
        raise RefusedError("target_exists", f"{target} is there already", next_step="name another folder, or remove it")
    writer = LayoutWriter(target)
    layers: list[Descriptor] = []
    made: dict[str, Descriptor] = {}
    reused = plain_bytes = 0
    for layer in manifest.layers:
        if layer.media_type not in (WEIGHT_TYPE, GOLDEN_TYPE):
            layers.append(writer.add_file(layout.path(layer.digest), layer.media_type, layer.annotations))
            continue
        if layer.digest not in made:
            known = None if fresh else ring.content_key(config.model, layer.digest)
            key = known or content_keys.new_key()
            reused += known is not None
            plain_bytes += layer.size
            made[layer.digest] = _encrypt_layer(layout, layer, key, writer)
            blob = made[layer.digest].digest
            ring.keep(key, config.model, layer.digest, blob)
            record = content_keys.seal(key, role, model=config.model, plain=layer.digest, blob=blob)
            (target / SEALED).mkdir(parents=True, exist_ok=True)
            (target / SEALED / f"{hex_of(blob)}.json").write_bytes(wire.encode(record))
        notes = {**layer.annotations, ANNOTATION_ENCRYPTION: ENCRYPTION, ANNOTATION_PLAIN_DIGEST: layer.digest}
        layers.append(msgspec.structs.replace(made[layer.digest], media_type=layer.media_type, annotations=notes))
    config_layer = writer.add_file(layout.path(manifest.config.digest), CONFIG_TYPE, manifest.config.annotations)
    found = writer.finish(msgspec.structs.replace(manifest, config=config_layer, layers=layers), config.version)
    return Encrypted(
        manifest=found.digest,
        blobs=len(made),
        reused=reused,
        bytes=sum(blob.size for blob in made.values()),
        plain_bytes=plain_bytes,
    )


def _encrypt_layer(layout: Layout, layer: Descriptor, key: bytes, writer: LayoutWriter) -> Descriptor:
    """Store a layer encrypted: as one zstd frame where that is smaller, since ciphertext cannot be made smaller later."""
    with layout.path(layer.digest).open("rb") as plain, tempfile.TemporaryFile(dir=layout.root) as scratch:
        header = tiles.Header(
            content_bytes=layer.size,
            content_digest=layer.digest,
            plain_bytes=layer.size,
            plain_digest=layer.digest,
        )
        source: BinaryIO = plain
        if layer.media_type == WEIGHT_TYPE:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                ZSTD_LEVEL, source_size=layer.size, window_log=limits.ZSTD_WINDOW_BYTES_MAX.bit_length() - 1
            )
            zstandard.ZstdCompressor(compression_params=parameters).copy_stream(plain, scratch, size=layer.size)
            size = scratch.tell()
            scratch.seek(0)
            if size <= layer.size * (1 - ZSTD_GAIN_MIN):
                count, digest = tiles.describe(scratch)
                header = replace(header, content_bytes=count, content_digest=digest, encoding="zstd")
                source = scratch
        source.seek(0)
        return writer.add_chunks(tiles.seal(source, header, key), layer.media_type, layer.annotations)
