"""What a disk may keep when the power goes: a model of files and folders that forgets what was not synced.

`Recorder` is a `Disk` that works on real files and takes down every step. `Loss` replays the steps of a run up to a cut and
knows for each file what was synced and what was only written, for each folder which names were synced and which changes
were not; `variants` are the ways to come out of that: everything unsynced lost or kept, names kept without the bytes,
bytes as zeros, torn in the middle, or full of something else, changes of names in any subset (a disk reorders). A rename
within a folder is one change: half of it is never seen.

Files that others write (python-tuf in its scratch folder) are taken over as they are when a step first names them or
the folder they are in; nothing of them counts as synced before a step says so.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wherry_agent.disk import Disk, Step

Noise = Callable[[random.Random, bytes, bytes], bytes]


@dataclass(frozen=True, slots=True)
class Taken:
    """One step as it was taken."""

    step: Step
    path: Path
    source: Path | None = None
    data: bytes = b""
    size: int = 0
    found: dict[Path, bytes | None] = field(default_factory=dict)
    """What others had written there by then: path → bytes, None for a folder."""


class Recorder(Disk):
    """Works like a disk below `root` and takes down every step."""

    def __init__(self, root: Path, mark: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self._root = root
        self._known: set[Path] = {root, *root.rglob("*")}
        self._mark = mark
        self.steps: list[Taken] = []
        self.marks: list[int] = []
        """For each step, what `mark` said before it: how much the world outside knew by then."""

    def step(
        self, step: Step, path: Path, *, source: Path | None = None, data: bytes | None = None, size: int = 0
    ) -> None:
        """Take down a step that is about to be done."""
        found: dict[Path, bytes | None] = {}
        for named in (source, path) if step in ("rename", "link") else (path,):
            if named is not None and step not in ("create", "mkdir"):
                self._look(named, found)
        self._follow(step, path, source, found)
        self.steps.append(Taken(step, path, source, data or b"", size, found))
        self.marks.append(self._mark())

    def _follow(self, step: Step, path: Path, source: Path | None, found: dict[Path, bytes | None]) -> None:
        """Keep in mind which names the steps account for: what is gone and comes back is of others again."""
        self._known |= set(found)
        if step in ("unlink", "rmdir"):
            self._known.discard(path)
            return
        self._known.add(path)
        if step == "rename" and source is not None:
            moved = {known for known in self._known if known == source or source in known.parents}
            self._known = (self._known - moved) | {path / known.relative_to(source) for known in moved}

    def _look(self, path: Path, found: dict[Path, bytes | None]) -> None:
        """Find what others wrote at and below a path that exists."""
        if not path.exists() or path.is_symlink():
            return
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        for item in (*reversed([p for p in path.parents if p.is_relative_to(self._root)]), path, *inside):
            if item not in self._known and not item.is_symlink():
                found[item] = None if item.is_dir() else item.read_bytes()


@dataclass(eq=False, slots=True)
class _File:
    synced: bytes = b""
    now: bytes = b""


@dataclass(eq=False, slots=True)
class _Folder:
    synced: dict[str, _Node] = field(default_factory=dict)
    now: dict[str, _Node] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)


_Node = _File | _Folder


@dataclass(frozen=True, slots=True)
class _Change:
    """Names that appear (or disappear: None) together in a folder."""

    names: dict[str, _Node | None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a disk comes out of a power cut."""

    name: str
    names: Callable[[random.Random], bool]
    """Whether a change of names that was not synced is kept."""
    data: Noise
    """What a file holds of which more was written than synced: from (chance, synced, written)."""


def _torn(chance: random.Random, synced: bytes, now: bytes) -> bytes:
    """Keep some of what was written: up to a point, with a hole of zeros, or with old blocks of the disk in it."""
    if now.startswith(synced):
        end = chance.randint(len(synced), len(now))
        tail = len(now) - end
        return now[:end] + chance.choice((b"", bytes(tail), chance.randbytes(tail)))
    return chance.choice((synced, now, now[: chance.randint(0, len(now))], bytes(len(now))))


VARIANTS: tuple[Variant, ...] = (
    Variant("nothing unsynced is kept", lambda _: False, lambda _c, synced, _n: synced),
    Variant("everything is kept", lambda _: True, lambda _c, _s, now: now),
    Variant("names are kept without their bytes", lambda _: True, lambda _c, synced, _n: synced),
    Variant(
        "names and lengths are kept, the bytes are zeros",
        lambda _: True,
        lambda _c, synced, now: now if now == synced else synced + bytes(max(0, len(now) - len(synced))),
    ),
    Variant("anything may be kept, torn", lambda chance: chance.random() < 0.5, _torn),
    Variant("names are kept, bytes are torn", lambda _: True, _torn),
)


class Loss:
    """The disk of a run, at the moment before step `cut` (or in the middle of it, if that is a write)."""

    def __init__(self, before: Path, root: Path, steps: list[Taken], cut: int) -> None:
        """`before`: a copy of `root` as it was, all of it synced; `root`: where the steps were taken."""
        self._root = root
        self._tree = _Folder()
        _take_over(self._tree, before)
        for taken in steps[:cut]:
            self._apply(taken)
        if cut < len(steps) and steps[cut].step == "write":
            self._apply(steps[cut])

    def materialise(self, target: Path, variant: Variant, chance: random.Random) -> None:
        """Write what is left into `target`, which is made anew."""
        shutil.rmtree(target, ignore_errors=True)
        _write(self._tree, target, variant, chance)

    def _apply(self, taken: Taken) -> None:
        for path, data in taken.found.items():
            parent = self._folder(path.parent)
            if path.name not in parent.now:
                _change(parent, {path.name: _Folder() if data is None else _File(now=data)})
        if taken.step == "fsync_folder":
            folder = self._folder(taken.path)
            folder.synced = dict(folder.now)
            folder.pending.clear()
            return
        path, parent = taken.path, self._folder(taken.path.parent)
        match taken.step:
            case "create":
                if path.name not in parent.now:
                    _change(parent, {path.name: _File()})
                elif isinstance(known := parent.now[path.name], _File):
                    known.now = b""
            case "mkdir":
                if path.name not in parent.now:
                    _change(parent, {path.name: _Folder()})
            case "write":
                self._file(path).now += taken.data
            case "truncate":
                file = self._file(path)
                file.now = file.now[: taken.size]
            case "fsync":
                file = self._file(path)
                file.synced = file.now
            case "rename" | "link":
                assert taken.source is not None
                origin = self._folder(taken.source.parent)
                node = origin.now[taken.source.name]
                if taken.step == "link":
                    _change(parent, {path.name: node})
                elif origin is parent:
                    _change(parent, {taken.source.name: None, path.name: node})
                else:
                    _change(parent, {path.name: node})
                    _change(origin, {taken.source.name: None})
            case "unlink" | "rmdir":
                if path.name in parent.now:
                    _change(parent, {path.name: None})

    def _folder(self, path: Path) -> _Folder:
        node: _Node = self._tree
        for name in path.relative_to(self._root).parts:
            assert isinstance(node, _Folder)
            if name not in node.now:  # of others, and gone before a step named it
                _change(node, {name: _Folder()})
            node = node.now[name]
        assert isinstance(node, _Folder)
        return node

    def _file(self, path: Path) -> _File:
        node = self._folder(path.parent).now[path.name]
        assert isinstance(node, _File)
        return node


def tries(steps: list[Taken], cut: int, *, torn: int, seed: str) -> Iterator[tuple[Variant, random.Random]]:
    """Yield the variants to try at a cut: each once, those that leave something to chance `torn` times."""
    del steps
    for variant in VARIANTS:
        by_chance = variant.data is _torn
        for number in range(torn if by_chance else 1):
            yield variant, random.Random(f"{seed}/{cut}/{variant.name}/{number}")


def _change(folder: _Folder, names: dict[str, _Node | None]) -> None:
    folder.pending.append(_Change(names))
    _follow(folder.now, names)


def _follow(entries: dict[str, _Node], names: dict[str, _Node | None]) -> None:
    for name, node in names.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _take_over(folder: _Folder, before: Path) -> None:
    for item in sorted(before.iterdir()):
        if item.is_symlink():
            continue
        node: _Node
        if item.is_dir():
            node = _Folder()
            _take_over(node, item)
        else:
            data = item.read_bytes()
            node = _File(data, data)
        folder.synced[item.name] = folder.now[item.name] = node


def _write(folder: _Folder, target: Path, variant: Variant, chance: random.Random) -> None:
    target.mkdir(mode=0o700)
    entries = dict(folder.synced)
    for change in folder.pending:
        if variant.names(chance):
            _follow(entries, change.names)
    for name, node in entries.items():
        if isinstance(node, _Folder):
            _write(node, target / name, variant, chance)
        else:
            same = node.now == node.synced
            (target / name).write_bytes(node.now if same else variant.data(chance, node.synced, node.now))
