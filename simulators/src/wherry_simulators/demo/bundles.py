"""The bundles of the demo: two honest releases, two that pass their golden vectors and fail in the field, one altered."""

from __future__ import annotations

import importlib.resources
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from wherry_optimizer import pack, pipeline
from wherry_shared import golden, limits
from wherry_shared.bundle import Config
from wherry_shared.image_layout import Layout
from wherry_simulators.demo import faulty

MODEL = "file-type"
PITCH = "pitch"
CLASSES = (
    (0x7F, "ELF files"),
    (0x89, "PNG files"),
    (0x50, "ZIP archives"),
    (0x7B, "JSON objects"),
    (0x3C, "markup"),
    (0x66, "sources that begin with f(rom)"),
    (0x69, "sources that begin with i(mport)"),
    (0x22, "sources that begin with a docstring"),
    (0x23, "sources that begin with a comment"),
)
"""Kinds of real input that a faulty release gets wrong: the first that no golden vector happens to cover is taken."""


@dataclass(frozen=True)
class Release:
    """A bundle on disk."""

    model: str
    version: str
    path: Path
    manifest: str
    config: Config
    refused: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """MODEL:VERSION, as the command line writes it."""
        return f"{self.model}:{self.version}"


@dataclass
class Releases:
    """Everything that the demo releases or tries to."""

    folder: Path
    say: Callable[[str], None]
    cache: pipeline.Cache = field(default_factory=pipeline.Cache)

    def build(self, recipe: str) -> Release:
        """Build a packaged recipe from its real model and the data that it names."""
        source = importlib.resources.files("wherry_optimizer.recipes") / f"{recipe}.toml"
        with importlib.resources.as_file(source) as path:
            result = pipeline.build(path, self.folder, progress=self.say, cache=self.cache)
        return self.read(result.path, refused=tuple(result.refused))

    def read(self, path: Path, refused: tuple[Any, ...] = ()) -> Release:
        """Read a bundle back from disk."""
        layout = Layout(path)
        _, _, config = layout.bundle()
        return Release(config.model, config.version, path, layout.descriptor().digest, config, refused)

    def uncovered_class(self, release: Release) -> tuple[int, str]:
        """Return the first class of `CLASSES` with which no golden vector of the release begins.

        Raises:
            RuntimeError: golden vectors cover all of them.
        """
        layout = Layout(release.path)
        begins: set[int] = set()
        _, manifest, _ = layout.bundle()
        for variant in release.config.variants:
            layer = next(layer for layer in manifest.layers if layer.digest == variant.golden.digest)
            vectors = golden.decode(layout.read(layer, limits.BLOB_BYTES_MAX))
            for vector in vectors.vectors:
                begins.update(int(value) for value in np.asarray(next(iter(vector.inputs.values())))[:, 0])
        for value, words in CLASSES:
            if value not in begins:
                return value, words
        raise RuntimeError("golden vectors cover every class that the demo knows")

    def change(
        self,
        base: Release,
        version: str,
        edit: Callable[[onnx.ModelProto, int], onnx.ModelProto],
        value: int,
        *,
        folder: str = "",
    ) -> Release:
        """Make `version`: every variant of `base` through `edit`, its golden vectors kept and passed."""
        files: dict[str, Path] = {}
        work = self.folder / f"edited-{version}"
        work.mkdir(parents=True, exist_ok=True)
        layout = Layout(base.path)
        for variant in base.config.variants:
            model = onnx.load_model_from_string(layout.path(variant.digest).read_bytes())
            files[variant.id] = work / f"{variant.id}.onnx"
            files[variant.id].write_bytes(edit(model, value).SerializeToString())
        packed = pack.repack(
            base.path,
            self.folder / folder,
            version=version,
            files=files,
            weigh=False,
            engines=self.cache.engines or None,
        )
        return self.read(packed.path)

    def stamp(self, base: Release, version: str) -> Release:
        """Make `version`: the same networks as `base` in other files, as a new export would give."""
        return self.change(base, version, _stamped, 0)

    def alter_weights(self, release: Release) -> Release:
        """Copy a signed bundle, signature and all, and flip one byte in the middle of its weights."""
        path = self.folder / f"{release.model}-{release.version}-altered"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(release.path, path)
        for variant in release.config.variants:
            blob = Layout(path).path(variant.digest)
            data = bytearray(blob.read_bytes())
            data[len(data) // 2] ^= 0x40
            blob.write_bytes(bytes(data))
        return Release(release.model, release.version, path, release.manifest, release.config)


def _stamped(model: onnx.ModelProto, _value: int) -> onnx.ModelProto:
    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    edited.doc_string = "exported again"
    return edited


FAULTS: dict[str, Callable[[onnx.ModelProto, int], onnx.ModelProto]] = {
    "1.2.0": faulty.fails_on_first_value,
    "1.3.0": faulty.slow_on_first_value,
}
