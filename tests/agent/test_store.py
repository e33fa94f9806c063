"""The store: nothing has a blob's name that is not the blob, whatever ended the download."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import tarfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trust_kit import assets_of, tar_of
from wherry_agent.disk import Disk
from wherry_agent.store import SYNC_BYTES, Store
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError, RefusedError

DATA = os.urandom(100_000)
DIGEST = of_bytes(DATA)


class PowerCutError(BaseException):
    """The power went; nobody may catch this."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, Disk())


def refused(call) -> str:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


def download(store: Store, data: bytes = DATA, digest: str = DIGEST, source: str = "server") -> None:
    with store.part(digest, len(data)) as part:
        for start in range(part.size, len(data), 7000):
            part.write(data[start : start + 7000], source)
        part.commit()


def test_a_blob_gets_its_name_when_it_is_whole_and_right(store: Store):
    with store.part(DIGEST, len(DATA)) as part:
        part.write(DATA[:50_000], "server")
        assert not store.has(DIGEST, len(DATA))
        part.write(DATA[50_000:], "server")
        part.commit()
    assert store.has(DIGEST, len(DATA))
    assert store.read(DIGEST, len(DATA)) == DATA
    assert [path.name for path in store.path_of(DIGEST).parent.iterdir()] == [DIGEST[7:]]


def test_what_was_synced_is_there_after_a_restart(store: Store):
    with store.part(DIGEST, len(DATA)) as part:
        part.write(DATA[:60_000], "mirror")
        part.sync()
        part.write(DATA[60_000:70_000], "server")  # never synced: a power cut may tear it
    with store.part(DIGEST, len(DATA)) as part:
        assert (part.size, part.sources) == (60_000, ["mirror"])
        part.write(DATA[60_000:], "server")
        part.commit()
    assert store.read(DIGEST, len(DATA)) == DATA


def test_a_long_download_is_synced_on_its_way(store: Store):
    data = os.urandom(SYNC_BYTES + 100)
    with store.part(of_bytes(data), len(data)) as part:
        part.write(data[:SYNC_BYTES], "server")
    with store.part(of_bytes(data), len(data)) as part:
        assert part.size == SYNC_BYTES


@pytest.mark.parametrize(
    "record", [b"", b"{", b'{"length": 5, "synced": 60000}', b'{"length": 100000, "synced": 999999}']
)
def test_a_record_that_does_not_fit_starts_the_download_again(store: Store, record: bytes):
    with store.part(DIGEST, len(DATA)) as part:
        part.write(DATA[:60_000], "server")
        part.sync()
    store.path_of(DIGEST).with_name(DIGEST[7:] + ".part.json").write_bytes(record)
    with store.part(DIGEST, len(DATA)) as part:
        assert part.size == 0
    download(store)


def test_wrong_bytes_never_get_the_name(store: Store):
    wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with store.part(DIGEST, len(DATA)) as part:
        part.write(wrong, "liar")
        assert refused(part.commit) == "digest_mismatch"
        part.reset()
        assert (part.size, part.sources) == (0, [])
        part.write(DATA, "server")
        part.commit()
    assert store.read(DIGEST, len(DATA)) == DATA


def test_one_byte_too_many_is_refused_before_it_is_written(store: Store):
    with store.part(DIGEST, len(DATA)) as part:
        part.write(DATA, "server")
        assert refused(lambda: part.write(b"x", "server")) == "digest_mismatch"


def test_a_file_that_changed_on_disk_is_not_believed(store: Store):
    download(store)
    store.path_of(DIGEST).write_bytes(DATA[:-1] + b"!")
    assert store.read(DIGEST, len(DATA)) is None


def test_power_cuts_at_every_step_never_leave_a_wrong_blob(tmp_path: Path):
    steps: list[str] = []
    download(Store(tmp_path / "count", Disk(lambda step, _path: steps.append(step))))
    assert len(steps) > 10
    for cut in range(len(steps)):
        home = tmp_path / str(cut)
        left = iter(range(cut + 1))

        def hook(_step, _path, left=left, cut=cut):
            if next(left, cut) == cut:
                raise PowerCutError

        with pytest.raises(PowerCutError):
            download(Store(home, Disk(hook)))
        after = Store(home, Disk())
        assert after.read(DIGEST, len(DATA)) in (None, DATA)
        if after.has(DIGEST, len(DATA)):
            assert after.read(DIGEST, len(DATA)) == DATA
        else:
            download(after)
            assert after.read(DIGEST, len(DATA)) == DATA


def test_a_full_disk_is_said_so_and_the_rest_resumes(tmp_path: Path):
    written = 0

    def hook(step, path):
        nonlocal written
        written += step == "write" and path.suffix == ".part"
        if written == 5:
            raise DeviceError("disk_full", "no space left") from OSError(errno.ENOSPC, "full")

    with pytest.raises(DeviceError) as caught:
        download(Store(tmp_path, Disk(hook)))
    assert caught.value.code == "disk_full"
    download(Store(tmp_path, Disk()))


def test_collecting_removes_what_nobody_keeps_with_all_that_belongs_to_it(store: Store):
    other = os.urandom(500)
    download(store)
    download(store, other, of_bytes(other))
    third = os.urandom(900)
    for data in (third, os.urandom(900)):
        with store.part(of_bytes(data), 900) as part:
            part.write(data[:400], "server")
            part.sync()
    assets, tar = assets_of({"labels.txt": b"a\nb\n"})
    store.add(assets.digest, tar)
    store.unpack(assets.digest, assets.files)
    freed = store.collect({DIGEST, of_bytes(third)})
    names = sorted(path.name for path in store.path_of(DIGEST).parent.iterdir())
    assert names == sorted([DIGEST[7:], of_bytes(third)[7:] + ".part", of_bytes(third)[7:] + ".part.json"])
    assert not store.assets_of(assets.digest).exists()
    assert freed >= 500 + 400 + len(tar)


def test_collecting_spares_what_a_living_process_is_writing(store: Store):
    blobs = store.path_of(DIGEST).parent
    ended = subprocess.Popen(["true"])
    ended.wait(10)
    unwaited = subprocess.Popen(["true"])
    os.waitid(os.P_PID, unwaited.pid, os.WEXITED | os.WNOWAIT)
    living = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    began = Path(f"/proc/{living.pid}/stat").read_text().split()[21]
    owners = [f"{ended.pid}-{began}", f"{unwaited.pid}-{began}", f"{os.getpid()}-{began}"]
    owners.append(f"{living.pid}-{int(began) - 1}")  # of a process that had its number before
    left = [blobs / f".{DIGEST[7:]}.{owner}.tmp" for owner in owners]
    written = blobs / f".{DIGEST[7:]}.{living.pid}-{began}.tmp"
    for path in (*left, written):
        path.write_bytes(b"x")
    store.collect({DIGEST})
    assert list(blobs.iterdir()) == [written]
    unwaited.wait(10)
    living.communicate(timeout=10)


def test_an_encoded_object_on_its_way_is_kept_with_its_blob(store: Store):
    encoded = os.urandom(300)
    with store.part(of_bytes(encoded), 300, final=store.encoded_path(DIGEST, of_bytes(encoded))) as part:
        part.write(encoded[:100], "server")
        part.sync()
    store.collect({DIGEST})
    with store.part(of_bytes(encoded), 300, final=store.encoded_path(DIGEST, of_bytes(encoded))) as part:
        assert part.size == 100


def test_assets_are_unpacked_exactly_as_declared(store: Store):
    files = {"labels.txt": b"cat\ndog\n", "tables/mel.bin": os.urandom(2000)}
    assets, tar = assets_of(files)
    store.add(assets.digest, tar)
    folder = store.unpack(assets.digest, assets.files)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert store.unpack(assets.digest, assets.files) == folder


def test_unpacking_that_was_cut_short_starts_again(tmp_path: Path):
    assets, tar = assets_of({"a": b"a" * 100, "b": b"b" * 100})
    Store(tmp_path, Disk()).add(assets.digest, tar)

    def hook(step, path):
        if step == "rename" and path.name == "b":
            raise PowerCutError

    with pytest.raises(PowerCutError):
        Store(tmp_path, Disk(hook)).unpack(assets.digest, assets.files)
    store = Store(tmp_path, Disk())
    (store.assets_of(assets.digest) / "a").write_bytes(b"torn")
    folder = store.unpack(assets.digest, assets.files)
    assert (folder / "a").read_bytes() == b"a" * 100


def member(name: str, **fields):
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(b"x" * info.size) if info.isreg() else None)

    return add


@pytest.mark.parametrize(
    "extra",
    [
        member("../../escape", size=1),
        member("/etc/escape", size=1),
        member("stray.txt", size=1),
        member("good.txt", size=4),
        member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("good2", type=tarfile.LNKTYPE, linkname="good.txt"),
        member("device", type=tarfile.CHRTYPE),
        member("fifo", type=tarfile.FIFOTYPE),
        member(".complete", size=1),
    ],
    ids=["parent", "absolute", "stray", "twice", "symlink", "hardlink", "device", "fifo", "marker"],
)
def test_a_tar_that_holds_more_than_declared_files_is_refused(tmp_path: Path, extra):
    store = Store(tmp_path / "home", Disk())
    files = {"good.txt": b"good"}
    assets, tar = assets_of(files, tar_of(files, extra=extra))
    store.add(assets.digest, tar)
    assert refused(lambda: store.unpack(assets.digest, assets.files)) == "assets_invalid"
    assert not (tmp_path / "escape").exists()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_symlink()) == []


@pytest.mark.parametrize(
    ("files", "tar", "code"),
    [
        ({"a": b"one"}, tar_of({"a": b"two"}), "digest_mismatch"),
        ({"a": b"one"}, tar_of({"a": b"longer"}), "assets_invalid"),
        ({"a": b"one", "b": b"two"}, tar_of({"a": b"one"}), "assets_invalid"),
        ({"a": b"one"}, b"\x1f\x8b" + b"0" * 600, "assets_invalid"),
        ({"a": b"one"}, b"not a tar" * 200, "assets_invalid"),
        ({"a": b"one" * 1000}, tar_of({"a": b"one" * 1000})[:900], "assets_invalid"),
    ],
)
def test_assets_that_are_not_what_the_config_says_are_refused(store: Store, files, tar, code):
    assets, _ = assets_of(files, tar)
    store.add(assets.digest, tar)
    assert refused(lambda: store.unpack(assets.digest, assets.files)) == code


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=3000), st.booleans(), st.booleans()), max_size=12))
def test_any_mixture_of_writes_syncs_and_restarts_ends_in_the_same_blob(tmp_path_factory, pieces):
    store = Store(tmp_path_factory.mktemp("store"), Disk())
    data = b"".join(piece for piece, _, _ in pieces) or b"empty"
    digest = of_bytes(data)
    part = store.part(digest, len(data))
    while part.size < len(data):
        for piece, sync, restart in pieces or [(b"empty", True, False)]:
            take = data[part.size : part.size + len(piece)]
            part.write(take, "server")
            if sync:
                part.sync()
            if restart and sync:
                part.__exit__(None, None, None)
                part = store.part(digest, len(data))
    part.commit()
    assert store.read(digest, len(data)) == data


def test_the_record_has_only_what_resuming_needs(store: Store):
    with store.part(DIGEST, len(DATA)) as part:
        part.write(DATA[:10], "http://mirror")
        part.sync()
    record = msgspec.json.decode(store.path_of(DIGEST).with_name(DIGEST[7:] + ".part.json").read_bytes())
    assert record == {"length": len(DATA), "synced": 10, "sources": ["http://mirror"]}


def test_an_assets_folder_stops_being_complete_before_anything_else_of_it_goes(tmp_path: Path):
    assets, tar = assets_of({"a": b"a" * 100, "b": b"b" * 100})
    steps: list[tuple[str, str]] = []
    store = Store(tmp_path, Disk(lambda step, path: steps.append((step, path.name))))
    store.add(assets.digest, tar)
    folder = store.unpack(assets.digest, assets.files)
    steps.clear()
    store.collect(set())
    assert not folder.exists()
    of_folder = steps[steps.index(("unlink", ".complete")) :]
    assert of_folder == [
        ("unlink", ".complete"),
        ("fsync_folder", folder.name),
        ("unlink", "a"),
        ("unlink", "b"),
        ("rmdir", folder.name),
    ]


sizes = st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(blobs=sizes, budget=st.integers(0, 2500), data=st.data())
def test_a_budget_costs_the_oldest_of_what_nobody_needs_and_nothing_else(tmp_path_factory, blobs, budget, data):
    store = Store(tmp_path_factory.mktemp("store"), Disk())
    made: list[tuple[str, int, bool]] = []
    for number, (size, needed) in enumerate(blobs):
        content = bytes([number]) * size
        store.add(of_bytes(content), content)
        os.utime(store.path_of(of_bytes(content)), (number, number))  # in this order they were fetched
        made.append((of_bytes(content), size, needed))
    keep = {digest for digest, _, needed in made if needed}
    before = store.used()
    freed = store.collect(keep, bytes_max=budget)
    left = [digest for digest, size, _ in made if store.has(digest, size)]
    assert keep <= set(left)
    assert store.used() == before - freed
    assert store.used() <= budget or set(left) == keep
    cached = [digest for digest, _, needed in made if not needed]
    kept = [digest for digest in cached if digest in left]
    assert kept == cached[len(cached) - len(kept) :]  # the newest stay
    if budget and before <= budget:
        assert freed == 0
    if kept != cached:  # not one more went than had to
        last = cached[len(cached) - len(kept) - 1]
        assert not budget or store.used() + next(size for digest, size, _ in made if digest == last) > budget
