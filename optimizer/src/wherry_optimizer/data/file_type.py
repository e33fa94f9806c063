"""Files of the Python environment, labelled by extension: real data for the `file-type` model (magika).

`features` is what an application has to do before it asks the model: at most 4096 bytes from each end of a file,
white space stripped at the outer sides, 1024 from the beginning and 1024 from the end, padded with 256.

The label of a file is what `LABELS` says about its extension. Extensions that do not name one type are left out: `.h` (C or
C++), `.dat`, `.txt` (in this environment mostly INI, CSV and lists), and `.wav`, since all of those here are a parser's tests
of malformed files. So is what the installation writes and not the package: `.pyc` (times, and paths of this machine) and
`direct_url.json`. Nothing else is curated, so accuracy is below that of a cleaned set. At most 40 files per label, none
twice (by features), labels with fewer than 8 files dropped.

Files are split by package: packages come in the order of a hash, and each goes whole, with its files of every label, to
calibration or selection, whichever has more room left of its share of all files, if it fits there and leaves the test most files
of each of its labels; else to the test files that the gate judges by. So near-copies within a package do not sit on both sides, every label
is tested, and no split was picked by hand: the salt is `SALT` with the recipe's seed, which packaged recipes leave at 0.
Parameters are chosen on selection files, never on test files.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_optimizer import metrics
from wherry_optimizer.data import Dataset, Sample, Specification
from wherry_optimizer.sources import locate
from wherry_shared.bundle import Interface
from wherry_shared.errors import RefusedError

BLOCK_BYTES = 4096
SIDE = 1024
PADDING = 256
FILES_PER_LABEL_MAX = 40
FILES_PER_LABEL_MIN = 8
FILE_BYTES_MIN = 16
"""Shorter files say nothing about their type."""
CALIBRATION_SHARE = 0.25
SELECTION_SHARE = 0.15
"""Shares of all files that calibration and selection get at most; together they leave the rest of each label for the test."""
SALT = "wherry/file-type"
LABELS: dict[str, str] = {
    ".bat": "batch",
    ".bz2": "bzip",
    ".c": "c",
    ".cc": "cpp",
    ".cpp": "cpp",
    ".css": "css",
    ".csv": "csv",
    ".exe": "pebin",
    ".f": "fortran",
    ".f90": "fortran",
    ".gif": "gif",
    ".gz": "gzip",
    ".hpp": "cpp",
    ".html": "html",
    ".ini": "ini",
    ".js": "javascript",
    ".json": "json",
    ".md": "markdown",
    ".npy": "npy",
    ".npz": "npz",
    ".onnx": "onnx",
    ".pem": "pem",
    ".pkl": "pickle",
    ".png": "png",
    ".proto": "proto",
    ".py": "python",
    ".pyi": "python",
    ".rst": "rst",
    ".sh": "shell",
    ".so": "elf",
    ".svg": "svg",
    ".toml": "toml",
    ".xml": "xml",
    ".xsl": "xml",
    ".xz": "xz",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".zip": "zip",
}
"""Extension → content type in the model's own words."""
INSTALLER_FILES = frozenset({"direct_url.json"})
"""Written while installing; `.json` by name, and different in every folder."""


def features(source: str | os.PathLike[str] | bytes) -> npt.NDArray[np.int32]:
    """Return what the model takes for one file, given as a path or as its bytes: int32, (1, 2048), in [0, 256]."""
    if isinstance(source, bytes):
        begin, end = source[:BLOCK_BYTES], source[-BLOCK_BYTES:]
    else:
        with open(source, "rb") as file:  # noqa: PTH123 - takes what os.fspath takes
            begin = file.read(BLOCK_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - BLOCK_BYTES))
            end = file.read(BLOCK_BYTES)
    head, tail = begin.lstrip()[:SIDE], end.rstrip()[-SIDE:]
    values = np.full((1, 2 * SIDE), PADDING, dtype=np.int32)
    values[0, : len(head)] = np.frombuffer(head, dtype=np.uint8)
    values[0, 2 * SIDE - len(tail) :] = np.frombuffer(tail, dtype=np.uint8)
    return values


def labels() -> list[str]:
    """Return the model's class names, in the order of its output.

    Raises:
        RefusedError: `source_missing` or `data_invalid`.
    """
    path = locate(
        "magika/models/standard_v3_3/config.min.json",
        distribution="magika",
        version="",
        folder=Path(),
        what="the list of content types",
    )
    names: Any = json.loads(path.read_bytes()).get("target_labels_space")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RefusedError("data_invalid", f"{path.name} of magika lists no content types")
    return names


def load(spec: Specification, interface: Interface, folder: Path) -> Dataset:
    """Collect, label and split the files of this environment; see the module's text."""
    del folder  # the data are where the environment is
    names = labels()
    index = {name: position for position, name in enumerate(names)}
    input_name, output_name = interface.inputs[0].name, interface.outputs[0].name
    found: list[tuple[str, str, Sample]] = []
    """(label, package, sample)"""
    counts: dict[str, int] = {}
    seen: set[bytes] = set()
    for label, paths in sorted(_by_label(Path(sysconfig.get_paths()["purelib"])).items()):
        if label not in index:
            continue
        rows: list[tuple[str, str, Sample]] = []
        for package, path in paths:
            values = features(path)
            key = values.tobytes()
            if key in seen:
                continue
            seen.add(key)
            rows.append((label, package, Sample({input_name: values}, index[label])))
            if len(rows) == FILES_PER_LABEL_MAX:
                break
        if len(rows) < FILES_PER_LABEL_MIN:
            continue
        counts[label] = len(rows)
        found += rows
    parts = split([(label, package) for label, package, _ in found], f"{SALT}/{spec.seed}")
    calibration, selection, evaluation = (
        [sample for _, package, sample in found if parts[package] == part]
        for part in ("calibration", "selection", "test")
    )
    rng = np.random.default_rng(spec.seed)
    calibration = [calibration[position] for position in rng.permutation(len(calibration))][: spec.calibration]
    evaluation = [evaluation[position] for position in rng.permutation(len(evaluation))][: spec.evaluation]
    return Dataset(
        metric="accuracy",
        description="files of the Python environment, labelled by extension, split by package",
        calibration=tuple(calibration),
        evaluation=tuple(evaluation),
        measure=metrics.make(metrics.MetricOf(name="accuracy", outputs=(output_name,))),
        labels={output_name: names},
        notes={"files_per_label": counts, "selection_files": len(selection)},
        selection=tuple(selection),
    )


def split(files: Sequence[tuple[str, str]], salt: str) -> dict[str, str]:
    """Return package → `calibration`, `selection` or `test`.

    Args:
        files: (label, package) of every file, so with repetitions.
        salt: decides the order; nothing else does.
    """
    sizes: dict[str, Counter[str]] = {}
    for label, package in files:
        sizes.setdefault(package, Counter())[label] += 1
    room = {"calibration": round(CALIBRATION_SHARE * len(files)), "selection": round(SELECTION_SHARE * len(files))}
    spare = {
        label: round((CALIBRATION_SHARE + SELECTION_SHARE) * count)
        for label, count in Counter(label for label, _ in files).items()
    }
    found: dict[str, str] = {}
    for package in sorted(sizes, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest()):
        own = sizes[package]
        spared = all(count <= spare[label] for label, count in own.items())
        part = max(room, key=lambda name: room[name])
        if not spared or own.total() > room[part]:
            part = "test"
        else:
            room[part] -= own.total()
            for label, count in own.items():
                spare[label] -= count
        found[package] = part
    return found


def _by_label(root: Path) -> dict[str, list[tuple[str, Path]]]:
    """Return label → (package, file), in an order that depends on names only and mixes packages."""
    found: dict[str, list[tuple[bytes, str, Path]]] = {}
    for path in _files(root):
        label = LABELS.get(path.suffix.lower())
        if label is None or path.name in INSTALLER_FILES:
            continue
        relative = path.relative_to(root).as_posix()
        package = relative.partition("/")[0].partition("-")[0].removesuffix(".libs").lower()
        order = hashlib.sha256(relative.encode()).digest()
        found.setdefault(label, []).append((order, package, path))
    return {
        label: [(package, path) for _, package, path in sorted(rows) if path.stat().st_size >= FILE_BYTES_MIN]
        for label, rows in found.items()
    }


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if not path.is_symlink():
                yield path
