"""Shared memory of clients: what a region lets its user do, and what it keeps from others."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from tests.agent.serving_kit import until
from wherry_agent.serving import peers
from wherry_agent.serving import regions as module
from wherry_agent.serving.buffers import Buffers, aligned_start, fresh
from wherry_agent.serving.inference import MESSAGE_CHARS_MAX
from wherry_agent.serving.ledger import Entry, Ledger
from wherry_agent.serving.peers import user_of
from wherry_agent.serving.regions import Regions
from wherry_shared.engines import BadInput

ME = os.geteuid()
STRANGER = 12345


@pytest.fixture
def shared(tmp_path: Path) -> Regions:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    (tmp_path / "a").chmod(0o600)
    return Regions(folder=str(tmp_path))


def test_what_was_registered_is_read_described_and_forgotten(shared: Regions):
    shared.register("r", "/a", 16, 64, ME)
    assert shared.status("", ME) == [{"name": "r", "key": "/a", "offset": 16, "byte_size": 64}]
    region = shared.get("r", ME)
    data, shares = region.read(4, 3, fresh)
    assert (bytes(data), shares) == (bytes([20, 21, 22]), True)
    with pytest.raises(BadInput, match="already"):
        shared.register("r", "a", 0, 1, ME)
    shared.unregister("r", ME)
    with pytest.raises(BadInput, match="not registered"):
        shared.get("r", ME)
    assert bytes(region.read(0, 1, fresh)[0]) == b"\x10", "a request in flight keeps what it uses"
    shared.register("r", "a", 0, 1, ME)
    shared.unregister("", ME)
    assert shared.status("", ME) == []


def test_outputs_are_written_within_their_room(shared: Regions, tmp_path: Path):
    shared.register("r", "a", 16, 64, ME)
    shared.get("r", ME).write(8, 4, b"wxyz")
    assert (tmp_path / "a").read_bytes()[24:28] == b"wxyz"
    with pytest.raises(BadInput, match="does not fit"):
        shared.get("r", ME).write(8, 3, b"wxyz")


@pytest.mark.parametrize(
    "key", ["", "/", "..", "/.", "a/b", "/../a", "a\0b", "x" * 300, "nothing", "link", "folder", "pipe", "\udc80"]
)
def test_a_key_is_one_name_of_a_plain_file(shared: Regions, tmp_path: Path, key: str):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput):
        shared.register("r", key, 0, 1, ME)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 0), (0, -1), (0, 257), (250, 7), (1 << 40, 1), (0, 1 << 40)])
def test_a_region_lies_within_its_file(shared: Regions, offset: int, size: int):
    with pytest.raises(BadInput):
        shared.register("r", "a", offset, size, ME)


def test_a_file_that_cannot_be_mapped_is_refused_with_the_reason(shared: Regions, tmp_path: Path):
    (tmp_path / "big").touch(0o600)
    os.truncate(tmp_path / "big", 1 << 30)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (256 << 20), before[1]))
    try:
        with pytest.raises(BadInput, match="cannot be mapped: Cannot allocate memory") as refused:
            shared.register("r", "big", 0, 1 << 30, ME)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "send the tensor in the request" in refused.value.next_step
    shared.register("r", "big", 0, 1 << 30, ME)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, 65), (64, 1), (1 << 62, 1)])
def test_a_tensor_lies_within_its_region(shared: Regions, offset: int, size: int):
    shared.register("r", "a", 16, 64, ME)
    with pytest.raises(BadInput, match="not within"):
        shared.get("r", ME).read(offset, size, fresh)


@pytest.mark.parametrize("others_may_write", [False, True])
def test_a_file_that_was_shortened_is_refused_and_does_no_harm(shared: Regions, tmp_path: Path, others_may_write: bool):
    if others_may_write:  # then it is copied instead of mapped: somebody else can shorten it at any time
        (tmp_path / "a").chmod(0o666)
    shared.register("r", "a", 0, 256, ME)
    region = shared.get("r", ME)
    assert region.read(0, 256, fresh)[1] is not others_may_write
    os.truncate(tmp_path / "a", 10)
    for use in (lambda: region.read(100, 10, fresh), lambda: region.write(100, 10, b"abc")):
        with pytest.raises(BadInput, match="shorter"):
            use()


def test_a_copy_survives_a_file_that_shrinks_under_the_read(shared: Regions, tmp_path: Path, monkeypatch):
    (tmp_path / "a").chmod(0o666)
    shared.register("r", "a", 0, 256, ME)
    region = shared.get("r", ME)
    start = module.Region._start

    def shrink(self, offset, size):
        found = start(self, offset, size)
        os.truncate(tmp_path / "a", 10)
        return found

    monkeypatch.setattr(module.Region, "_start", shrink)
    with pytest.raises(BadInput, match="shorter while"):
        region.read(0, 256, fresh)


def test_nobody_borrows_the_rights_of_the_agent_or_uses_what_another_user_registered(shared: Regions, tmp_path: Path):
    for user in (STRANGER, None):
        with pytest.raises(BadInput):
            shared.register("r", "a", 0, 1, user)
    (tmp_path / "a").chmod(0o666)
    shared.register("r", "a", 0, 1, STRANGER)
    with pytest.raises(BadInput, match="not registered"):
        shared.get("r", STRANGER + 1)
    assert shared.status("", STRANGER + 1) == []
    shared.unregister("", STRANGER + 1)
    assert shared.get("r", STRANGER)


def test_a_file_that_the_agent_may_not_open_is_refused_with_what_to_do(
    shared: Regions, monkeypatch: pytest.MonkeyPatch
):
    def denied(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "open", denied)
        with pytest.raises(BadInput, match=r"Permission denied; .*setfacl") as refused:
            shared.register("r", "/a", 0, 1, ME)
    assert len(refused.value.message) < MESSAGE_CHARS_MAX, "nothing of it is cut off on its way"
    with pytest.raises(BadInput) as other:
        shared.register("r", "/nothing", 0, 1, ME)
    assert "setfacl" not in other.value.message


def test_regions_are_bounded_in_number_and_bytes(shared: Regions, monkeypatch):
    monkeypatch.setattr(module, "REGIONS_MAX", 2)
    shared.register("r1", "a", 0, 1, ME)
    shared.register("r2", "a", 0, 1, ME)
    with pytest.raises(BadInput, match="no more than"):
        shared.register("r3", "a", 0, 1, ME)
    monkeypatch.setattr(module, "REGIONS_MAX", 9)
    monkeypatch.setattr(module, "ALL_REGIONS_BYTES_MAX", 3)
    with pytest.raises(BadInput, match="no more than"):
        shared.register("r3", "a", 0, 2, ME)
    shared.register("r3", "a", 0, 1, ME)
    for name in ("", "x" * 300):
        with pytest.raises(BadInput, match="name"):
            shared.register(name, "a", 0, 1, ME)


def test_one_user_leaves_room_for_others(shared: Regions, tmp_path: Path, monkeypatch):
    (tmp_path / "a").chmod(0o666)
    monkeypatch.setattr(module, "USER_REGIONS_MAX", 2)
    monkeypatch.setattr(module, "USER_REGIONS_BYTES_MAX", 9)
    shared.register("r1", "a", 0, 1, STRANGER)
    with pytest.raises(BadInput, match="9 bytes of one user"):
        shared.register("r2", "a", 1, 8, STRANGER)
    shared.register("r2", "a", 0, 8, STRANGER)
    with pytest.raises(BadInput, match="2 regions"):
        shared.register("r3", "a", 0, 1, STRANGER)
    shared.register("r3", "a", 0, 9, ME)


def test_a_region_ends_with_its_file(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "REGIONS_MAX", 2)
    descriptor = os.memfd_create("test")
    try:
        ledger = Ledger(descriptor)
        shared = Regions(ledger, str(tmp_path))
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(name.encode() * 9)
            shared.register(name, name, 0, 9, ME)
        used = shared.get("a", ME)
        (tmp_path / "a").unlink()
        with pytest.raises(BadInput, match="not registered"):
            shared.get("a", ME)
        assert bytes(used.read(0, 1, fresh)[0]) == b"a", "a request in flight keeps what it uses"
        kept = weakref.ref(shared.get("b", ME).file)
        (tmp_path / "b").unlink()
        (tmp_path / "b").write_bytes(b"again")
        shared.register("b", "b", 0, 5, ME)  # neither its old file nor the table is in the way
        shared.register("c", "b", 0, 5, ME)
        assert [entry.name for entry in ledger.read()] == ["b", "c"]
        assert kept() is None, "its memory is given back"
        (tmp_path / "b").unlink()
        assert Regions(ledger, str(tmp_path)).status("", ME) == []
        assert ledger.read() == [], "what is gone is not looked for again"
    finally:
        os.close(descriptor)


def test_the_worker_that_follows_knows_what_was_registered(shared: Regions, tmp_path: Path):
    descriptor = os.memfd_create("test")
    try:
        first, second = (Regions(Ledger(descriptor), str(tmp_path)) for _ in range(2))
        first.register("r", "a", 16, 64, ME)
        first.register("s", "a", 0, 1, ME)
        assert bytes(second.get("r", ME).read(0, 1, fresh)[0]) == b"\x10"
        with pytest.raises(BadInput, match="already"):
            second.register("s", "a", 0, 1, ME)
        second.register("t", "a", 0, 2, ME)
        assert [row["name"] for row in first.status("", ME)] == ["r", "s", "t"], "both have it during a hand-over"
        second.unregister("r", ME)
        third = Regions(Ledger(descriptor), str(tmp_path))
        assert [row["name"] for row in third.status("", ME)] == ["s", "t"]
        os.truncate(tmp_path / "a", 1)
        fourth = Regions(Ledger(descriptor), str(tmp_path))
        assert [row["name"] for row in fourth.status("", ME)] == ["s"], "what is no longer as it was is left out"
        os.ftruncate(descriptor, 5)
        assert Regions(Ledger(descriptor), str(tmp_path)).status("", ME) == [], "half a ledger is none"
    finally:
        os.close(descriptor)


def test_registrations_of_two_threads_are_both_kept():
    descriptor = os.memfd_create("test")
    try:
        ledger = Ledger(descriptor)
        one, two = (Entry(name, name, 0, 1, ME) for name in "ab")
        other = threading.Thread(target=lambda: ledger.change(lambda entries: [*entries, two]))

        def change(entries: list[Entry]) -> list[Entry]:
            other.start()
            other.join(0.3)  # it waits for this change; if it did not, it would be over by now, and be overwritten
            return [*entries, one]

        ledger.change(change)
        other.join(20)
        assert ledger.read() == [one, two]
    finally:
        os.close(descriptor)


def test_the_system_says_who_is_on_the_other_end():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            assert user_of(accepted) == ME
            assert peers.user_of_tcp(client.getsockname(), ("127.0.0.1", 1)) is None
            ends = client.getsockname(), client.getpeername()
            until(lambda: peers._listed(*ends) == ME, "the table has it too")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert user_of(ours) == ME


def test_the_table_is_read_where_the_kernel_cannot_be_asked(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(peers, "_asked", lambda *_: None)
    monkeypatch.setattr(peers, "_TABLE", tmp_path / "tcp")
    assert peers.user_of_tcp(("127.0.0.1", 1), ("127.0.0.1", 2)) is None
    (tmp_path / "tcp").write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        f"   0: {peers._entry(('127.0.0.1', 1))} {peers._entry(('127.0.0.1', 2))} 01 00000000:00000000 00:00000000 "
        "00000000  1000        0 4026\n"
    )
    assert peers.user_of_tcp(("127.0.0.1", 1), ("127.0.0.1", 2)) == 1000


def test_a_buffer_is_used_again_only_when_nobody_holds_a_part_of_it():
    stock = Buffers(kept_bytes_max=300_000)
    address = []

    def use(hold: bool) -> np.ndarray | None:
        held = [stock.take(100_000)]
        address.append(held[0].ctypes.data)
        part = np.frombuffer(held[0].data[100:200], np.float32)
        if not hold:
            del part
        stock.give(held.pop())
        return part if hold else None

    use(hold=False)
    assert stock.kept_bytes == 100_000
    part = use(hold=True)
    assert (stock.kept_bytes, address[0]) == (0, address[1])
    del part
    for _ in range(5):
        stock.give(fresh(100_000))
    assert stock.kept_bytes == 300_000, "the stock is bounded"
    assert stock.take(10_000).size == 10_000, "a small request does not hold a large buffer"


def test_a_tensor_is_received_aligned():
    for before in (0, 1, 63, 64, 1000):
        buffer = fresh(5000)
        start = aligned_start(buffer, before)
        assert 0 <= start < 64
        assert (buffer.ctypes.data + start + before) % 64 == 0
