"""The seam for durable steps: what is on disk after a cut at every step, and what a full disk becomes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wherry_agent.disk import STEPS, Disk, Step, disk_of
from wherry_shared.errors import DeviceError


class PowerCut(BaseException):
    """Ends a run at a durable step, past every handler of errors."""


class Cutter:
    """Counts steps, and cuts at one of them."""

    def __init__(self, at: int = -1) -> None:
        self.at = at
        self.steps: list[tuple[Step, str]] = []

    def __call__(self, step: Step, path: Path) -> None:
        if len(self.steps) == self.at:
            raise PowerCut
        self.steps.append((step, path.name))


def full(step: Step, path: Path) -> None:
    if step == "write":
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_replaced_by_write_sync_rename_and_sync_of_the_folder(tmp_path: Path) -> None:
    cutter = Cutter()
    Disk(cutter).write_atomic(tmp_path / "a", b"new")
    assert [step for step, _ in cutter.steps] == ["create", "write", "fsync", "rename", "fsync_folder"]
    assert (tmp_path / "a").read_bytes() == b"new"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("at", range(5))
def test_a_cut_at_any_step_leaves_the_old_bytes_or_all_of_the_new(tmp_path: Path, at: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(PowerCut):
        Disk(Cutter(at)).write_atomic(path, b"new")
    assert path.read_bytes() == (b"new" if at == 4 else b"old")
    Disk().sweep(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(DeviceError) as caught:
        Disk(full).write_atomic(path, b"new")
    assert caught.value.code == "disk_full"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_other_trouble_of_the_disk_has_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DeviceError) as caught:
        Disk().read(tmp_path / "folder")
    assert caught.value.code == "disk"


def test_absent_files_are_read_as_nothing_and_removed_without_complaint(tmp_path: Path) -> None:
    disk = Disk()
    assert disk.read(tmp_path / "none") is None
    disk.unlink(tmp_path / "none")
    disk.remove_tree(tmp_path / "none")
    disk.keep(tmp_path / "none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_part_grows_and_is_cut_back_to_what_is_known(tmp_path: Path) -> None:
    disk = Disk()
    with disk.open_part(tmp_path / "p") as part:
        part.write(b"12345")
        part.sync()
        part.write(b"torn")
        assert part.size == 9
    with disk.open_part(tmp_path / "p", keep_bytes=5) as part:
        assert part.size == 5
        part.write(b"678")
        part.sync()
    assert (tmp_path / "p").read_bytes() == b"12345678"


def test_a_copy_outlives_the_next_replacement(tmp_path: Path) -> None:
    disk = Disk()
    disk.write_atomic(tmp_path / "a", b"one")
    disk.keep(tmp_path / "a", tmp_path / "b")
    disk.write_atomic(tmp_path / "a", b"two")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"two", b"one")


def test_folders_are_made_durable_one_by_one(tmp_path: Path) -> None:
    cutter = Cutter()
    Disk(cutter).mkdir(tmp_path / "x" / "y")
    assert cutter.steps == [("mkdir", "x"), ("fsync_folder", tmp_path.name), ("mkdir", "y"), ("fsync_folder", "x")]
    Disk(cutter).mkdir(tmp_path / "x" / "y")
    assert len(cutter.steps) == 4


def test_a_move_between_folders_syncs_both(tmp_path: Path) -> None:
    cutter = Cutter()
    disk = Disk(cutter)
    (tmp_path / "to").mkdir()
    (tmp_path / "a").write_bytes(b"x")
    disk.rename(tmp_path / "a", tmp_path / "to" / "b")
    assert cutter.steps == [("rename", "b"), ("fsync_folder", "to"), ("fsync_folder", tmp_path.name)]


def test_a_disk_that_takes_no_writes_has_its_own_code(tmp_path: Path) -> None:
    def read_only(step: Step, path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    disk = Disk(read_only)
    for write in (
        lambda: disk.write_atomic(tmp_path / "a", b"new"),
        lambda: disk.open_part(tmp_path / "p"),
        lambda: disk.mkdir(tmp_path / "folder"),
    ):
        with pytest.raises(DeviceError) as caught:
            write()
        assert caught.value.code == "read_only"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_named_whole(tmp_path: Path) -> None:
    def forbid(step: Step, path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.raises(DeviceError) as caught:
        Disk(forbid).mkdir(tmp_path / "folder")
    assert (caught.value.code, caught.value.message) == ("disk", f"{tmp_path / 'folder'}: Permission denied")
    assert "--home" in caught.value.next_step


def test_a_tree_is_removed_entry_by_entry(tmp_path: Path) -> None:
    cutter = Cutter()
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    for name in ("b", "sub/a"):
        (root / name).write_bytes(b"x")
    (root / "z").symlink_to("sub/a")
    Disk(cutter).remove_tree(root)
    steps = [("unlink", "b"), ("unlink", "a"), ("rmdir", "sub"), ("unlink", "z"), ("rmdir", "tree")]
    assert cutter.steps == steps
    assert not root.exists()


def test_steps_are_recorded_only_when_a_test_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "steps"
    disk_of("courier").write_atomic(tmp_path / "a", b"x")
    assert not record.exists()
    monkeypatch.setenv(STEPS, f"record:{record}")
    disk_of("courier").unlink(tmp_path / "a")
    assert record.read_text() == f"courier unlink {tmp_path / 'a'}\n"


@pytest.mark.parametrize(("role", "code"), [("courier", -signal.SIGKILL), ("supervisor", 0)])
def test_a_process_of_the_named_role_ends_before_the_named_step(tmp_path: Path, role: str, code: int) -> None:
    script = "import sys, pathlib; from wherry_agent.disk import disk_of\n"
    script += f"disk_of({role!r}).write_atomic(pathlib.Path(sys.argv[1]), b'new')"
    path = tmp_path / "a"
    environment = {**os.environ, STEPS: "kill:courier:3"}
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, timeout=60)
    assert done.returncode == code
    assert path.exists() == (code == 0)


@pytest.mark.parametrize("wish", ["record:", "kill:courier", "kill::3", "nonsense"])
def test_a_wish_that_means_nothing_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv(STEPS, wish)
    with pytest.raises(RuntimeError, match=STEPS):
        disk_of("courier")
