"""Windows cut from counters, and the buffer that keeps them until the server has them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agent.builders import MODEL, arm, latencies, loadable
from wherry_agent import telemetry
from wherry_agent.children import ArmStats
from wherry_agent.telemetry import ARMS_MAX, HANDLES, Buffer, Context, Windows
from wherry_shared.sketch import Sketch
from wherry_shared.wire import Sum, Telemetry, Window

SECOND = 1_000_000


def context(_: ArmStats) -> Context:
    return Context("r1", 1)


def counted(requests: int, **more: Any) -> ArmStats:
    return arm(requests=requests, latency_us=latencies(4, 1000, requests), classes={"cat": requests}, **more)


def test_a_window_is_what_was_counted_since_the_last_cut() -> None:
    windows = Windows()
    windows.look("worker", [counted(10, errors=1)], SECOND)
    (first,) = windows.cut(3 * SECOND, context)
    windows.look("worker", [counted(25, errors=1)], 4 * SECOND)
    (second,) = windows.cut(9 * SECOND, context)
    assert (first.requests, first.errors, first.start, first.duration_us) == (10, 1, SECOND, 2 * SECOND)
    assert (second.requests, second.errors, second.start, second.duration_us) == (15, 0, 3 * SECOND, 6 * SECOND)
    assert Sketch.from_wire(second.latency_us["4"]).count == 15
    assert second.classes == {"cat": 15}
    assert (second.rollout, second.attempt, second.arm) == ("r1", 1, "candidate")
    assert windows.cut(10 * SECOND, context) == []


def test_a_window_of_a_shadow_says_how_it_compared() -> None:
    def shadow(runs: int, **more: Any) -> ArmStats:
        sketches = {"confidence": latencies(0, 0.9, runs)["0"], "distance": latencies(0, 0.1, runs)["0"]}
        return arm(arm="shadow", requests=runs, compared=runs, agreed=runs - 1, skipped=runs * 3, **sketches, **more)

    windows = Windows()
    windows.look("worker", [shadow(10)], 0)
    windows.cut(SECOND, context)
    windows.look("worker", [shadow(25)], 2 * SECOND)
    (window,) = windows.cut(3 * SECOND, context)
    assert (window.arm, window.requests, window.compared, window.agreed, window.skipped) == ("shadow", 15, 15, 15, 45)
    assert Sketch.from_wire(window.confidence).count == Sketch.from_wire(window.distance).count == 15


def test_a_shadow_that_its_budget_never_lets_run_is_seen_too() -> None:
    windows = Windows()
    windows.look("worker", [arm(arm="shadow", skipped=9)], 0)
    (window,) = windows.cut(SECOND, context)
    assert (window.requests, window.skipped) == (0, 9)


def test_what_an_application_told_is_told_once_also_without_requests() -> None:
    def told(count: int, total: float) -> ArmStats:
        return arm(metrics={"agreed": Sum(count=count, total=total)})

    windows = Windows()
    windows.look(HANDLES, [told(4, 3.0)], 0)
    (first,) = windows.cut(SECOND, context)
    windows.look(HANDLES, [told(10, 4.5)], 2 * SECOND)
    (second,) = windows.cut(3 * SECOND, context)
    windows.look(HANDLES, [told(10, 4.5)], 4 * SECOND)
    assert first.metrics == {"agreed": Sum(count=4, total=3.0)}
    assert second.metrics == {"agreed": Sum(count=6, total=1.5)}
    assert windows.cut(5 * SECOND, context) == []


def test_deaths_of_a_worker_are_windows_of_their_own() -> None:
    windows = Windows()
    for at in (SECOND, 2 * SECOND):
        windows.crashed(telemetry.crash_window(arm(), at, context(arm())))
    windows.crashed(telemetry.crash_window(arm("0.9.0", arm="incumbent"), 2 * SECOND, context(arm())))
    found = windows.cut(3 * SECOND, context)
    assert [(one.arm, one.start, one.requests, one.crashes) for one in found] == [
        ("candidate", SECOND, 0, 2),
        ("incumbent", 2 * SECOND, 0, 1),
    ]
    assert windows.cut(4 * SECOND, context) == []


def test_counts_of_a_new_process_begin_at_nothing() -> None:
    windows = Windows()
    windows.look("worker", [counted(100)], 0)
    windows.cut(SECOND, context)
    windows.restart("worker")
    windows.look("worker", [counted(7)], 2 * SECOND)
    (window,) = windows.cut(3 * SECOND, context)
    assert window.requests == 7


def test_counts_that_fell_without_notice_begin_at_nothing_too() -> None:
    windows = Windows()
    windows.look("worker", [counted(100)], 0)
    windows.cut(SECOND, context)
    windows.look("worker", [counted(7)], 2 * SECOND)
    assert [window.requests for window in windows.cut(3 * SECOND, context)] == [7]


def test_another_life_begins_at_nothing_also_when_it_counts_more_at_once() -> None:
    windows = Windows()
    windows.look("handle", [counted(8, life=1)], 1)
    assert [window.requests for window in windows.cut(2, context)] == [8]
    windows.keep_only(set())
    windows.look("handle", [counted(10, life=2)], 3)
    assert [window.requests for window in windows.cut(4, context)] == [10]
    windows.look("handle", [counted(13, life=2)], 5)
    assert [window.requests for window in windows.cut(6, context)] == [3]


def test_the_worker_and_a_handle_are_counted_apart_and_judged_together() -> None:
    windows = Windows()
    windows.look("worker", [counted(10, trial="t")], 0)
    windows.look(HANDLES, [counted(5, trial="t", errors=2)], 0)
    total = windows.total(MODEL, loadable().digest, "candidate", "t")
    assert total is not None
    assert (total.requests, total.errors) == (15, 2)
    assert sorted(window.requests for window in windows.cut(SECOND, context)) == [5, 10]
    assert windows.total(MODEL, loadable().digest, "candidate", "another") is None


def test_the_baseline_is_the_fullest_that_the_incumbent_had() -> None:
    windows = Windows()
    windows.look("worker", [counted(80, arm="incumbent")], 0)
    windows.look("worker", [counted(3, arm="incumbent", trial="t")], 1)
    baseline = windows.baseline(MODEL, loadable().digest)
    assert baseline is not None
    assert baseline.requests == 80
    windows.keep_only(set())
    assert windows.baseline(MODEL, loadable().digest) is None


def test_what_applications_run_themselves_is_kept_apart_by_its_buckets() -> None:
    windows = Windows()
    told = msgspec.structs.replace(counted(80, arm="incumbent"), latency_us={"4": {"1": 80}})
    windows.look(HANDLES, [told], 0)
    windows.look("worker 7", [msgspec.structs.replace(told, requests=40, latency_us={"4": {"2": 40}})], 1)
    baseline = windows.baseline(MODEL, loadable().digest)
    assert baseline is not None
    assert (baseline.requests, baseline.latency_us) == (120, {"h4": {"1": 80}, "4": {"2": 40}})
    assert [set(window.latency_us) for window in windows.cut(9, lambda _: Context("", 0))] == [{"h4"}, {"4"}]


def test_what_is_told_late_of_a_version_that_left_is_not_counted_again() -> None:
    windows = Windows()

    def cut() -> list[int]:
        return [window.requests for window in windows.cut(9, lambda _: Context("", 0))]

    windows.look(HANDLES, [counted(100)], 1)
    assert cut() == [100]
    windows.keep_only(set())
    windows.look(HANDLES, [counted(103)], 2)
    assert cut() == [3], "a handle says its last counts after the swap, and they are cumulative"
    windows.keep_only(set())
    windows.look(HANDLES, [counted(5)], 3)
    assert cut() == [5], "it came back, and is counted anew"
    windows.keep_only(set())
    windows.restart("handle")
    windows.look(HANDLES, [counted(7)], 4)
    assert cut() == [7], "another process counted"


def test_counts_that_were_cut_of_versions_that_left_are_remembered_in_bounds() -> None:
    windows = Windows()
    for number in range(2 * ARMS_MAX):
        windows.look(HANDLES, [counted(5, trial=str(number))], 1)
        windows.cut(2, lambda _: Context("", 0))
        windows.keep_only(set())
    assert len(windows._cut) == ARMS_MAX


@pytest.fixture
def buffers(tmp_path: Path) -> Iterator[Callable[..., Buffer]]:
    opened: list[Buffer] = []

    def make(bytes_max: int = 1 << 20) -> Buffer:
        opened.append(Buffer(tmp_path / "telemetry.db", bytes_max))
        return opened[-1]

    yield make
    for buffer in opened:
        buffer.close()


def message(count: int = 1, **window: Any) -> Telemetry:
    item = Window(model=MODEL, manifest="m", variant="float", arm="candidate", start=1, duration_us=2, **window)
    return Telemetry(format=1, device="d", epoch="", seq=0, first=0, at=5, windows=[item] * count)


def test_messages_are_numbered_without_gaps_over_restarts_until_acknowledged(buffers: Callable[..., Buffer]) -> None:
    buffer = buffers()
    for _ in range(3):
        buffer.add(message())
    buffer.close()
    buffer = buffers()
    assert buffer.held(10) == [1, 2, 3]
    buffer.acknowledge(buffer.epoch, 2)
    buffer.acknowledge("another", 3)
    buffer.add(message())
    assert buffer.held(10) == [3, 4]
    sent = buffer.message(4)
    assert sent is not None
    assert (sent.epoch, sent.seq, sent.first) == (buffer.epoch, 4, 3)
    assert buffer.message(1) is None


def test_a_buffer_that_is_older_than_what_the_server_has_begins_anew(buffers: Callable[..., Buffer]) -> None:
    """It was put back with the home: the server would take the next messages for known."""
    buffer = buffers()
    buffer.add(message(2))
    epoch = buffer.epoch
    buffer.acknowledge(epoch, 7)
    assert buffer.epoch != epoch
    assert (buffer.held(10), buffer.untold) == ([], 2)
    buffer.add(message())
    sent = buffer.message(1)
    assert sent is not None
    assert (sent.epoch, sent.dropped) == (buffer.epoch, 2)


def test_beyond_its_bound_the_oldest_give_way_and_the_loss_is_told(buffers: Callable[..., Buffer]) -> None:
    buffer = buffers(3000)
    for _ in range(40):
        buffer.add(message(2))
    held = buffer.held(100)
    assert 1 < len(held) < 40
    assert held[-1] == 40
    told = [buffer.message(seq) for seq in held]
    # every loss is told exactly once, by what is still held
    assert sum(one.dropped for one in told if one is not None) == 2 * (40 - len(held)) - buffer.untold
    assert all(one is not None and one.first == held[0] for one in told)


def test_many_windows_are_split_into_messages_that_fit(buffers: Callable[..., Buffer]) -> None:
    buffer = buffers()
    buffer.add(message(telemetry.WINDOWS_MAX * 2 + 1))
    sizes = [len(one.windows) for seq in buffer.held(9) if (one := buffer.message(seq)) is not None]
    assert sizes == [telemetry.WINDOWS_MAX, telemetry.WINDOWS_MAX, 1]


def test_a_window_too_large_for_a_message_goes_without_its_sketches(buffers: Callable[..., Buffer]) -> None:
    buffer = buffers()
    huge = {str(number): 1 for number in range(20_000)}
    buffer.add(message(latency_us={"4": huge}, requests=20_000))
    sent = buffer.message(1)
    assert sent is not None
    assert (sent.windows[0].requests, sent.windows[0].latency_us) == (20_000, {})


def test_a_buffer_that_cannot_be_read_begins_anew_with_another_epoch(
    tmp_path: Path, buffers: Callable[..., Buffer]
) -> None:
    buffer = buffers()
    buffer.add(message())
    epoch = buffer.epoch
    buffer.close()
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"telemetry.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "telemetry.db").write_bytes(b"this is no database" * 500)
    again = buffers()
    assert again.epoch != epoch
    assert again.held(9) == []


def spoil(path: Path, start: int = 3 * 4096) -> None:
    """Alter pages behind the first ones, so that opening finds nothing wrong."""
    data = bytearray(path.read_bytes())
    assert len(data) > start
    data[start:] = b"\xff" * (len(data) - start)
    path.write_bytes(data)


@pytest.mark.parametrize("first", ["held", "first", "message", "add", "acknowledge"])
def test_a_buffer_that_the_disk_altered_begins_anew_whatever_is_asked_of_it(
    tmp_path: Path, buffers: Callable[..., Buffer], first: str
) -> None:
    buffer = buffers()
    for _ in range(100):
        buffer.add(message(3))
    buffer.close()
    spoil(tmp_path / "telemetry.db")
    again = buffers()
    assert again.epoch == buffer.epoch, "nothing is noticed when it is opened"
    ask: dict[str, Callable[[], object]] = {
        "held": lambda: again.held(20),
        "first": lambda: again.first,
        "message": lambda: again.message(1),
        "add": lambda: again.add(message(2)),
        "acknowledge": lambda: again.acknowledge(again.epoch, 1),
    }
    ask[first]()
    assert again.epoch != buffer.epoch
    again.add(message(1))
    sent = again.message(again.held(1)[0])
    assert sent is not None
    assert sent.windows
    assert (sent.epoch, sent.first) == (again.epoch, again.first)


def test_windows_that_went_with_an_altered_buffer_are_counted(tmp_path: Path, buffers: Callable[..., Buffer]) -> None:
    buffer = buffers()
    for _ in range(100):
        buffer.add(message(3))
    buffer.acknowledge(buffer.epoch, 10)
    buffer._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    spoil(tmp_path / "telemetry.db")
    buffer._database.execute("PRAGMA shrink_memory")
    assert buffer.held(20) == []
    buffer.add(message(1))
    sent = buffer.message(1)
    assert sent is not None
    assert sent.dropped == 90 * 3


def test_a_message_that_the_disk_altered_is_lost_alone_and_counted(buffers: Callable[..., Buffer]) -> None:
    buffer = buffers()
    buffer.add(message(2))
    buffer.add(message(3))
    with buffer._database:
        buffer._database.execute("UPDATE message SET body = ? WHERE seq = 1", (b"no message",))
    assert buffer.message(1) is None
    assert buffer.held(9) == [2]
    buffer.add(message(1))
    sent = buffer.message(3)
    assert sent is not None
    assert sent.dropped == 2


def test_what_cannot_be_kept_is_dropped_and_counted(buffers: Callable[..., Buffer]) -> None:
    buffer = buffers()
    blocker = sqlite3.connect(buffer._path)
    buffer._database.execute("PRAGMA busy_timeout = 0")
    blocker.execute("BEGIN IMMEDIATE")
    buffer.add(message(3))
    blocker.rollback()
    blocker.close()
    buffer.add(message())
    sent = buffer.message(1)
    assert sent is not None
    assert sent.dropped == 3


def test_a_buffer_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "telemetry.db").mkdir()  # as little of a file that can be written as on a full or read-only disk
    buffer = Buffer(tmp_path / "telemetry.db", 1 << 20)
    first = buffer.next
    buffer.add(Telemetry(format=1, device="d" * 22, epoch="", seq=0, first=0, at=SECOND))
    assert buffer.held(5) == [first]
    buffer.close()
    assert (tmp_path / "telemetry.db").is_dir()


def test_a_download_is_told_once_in_however_many_messages(buffers: Callable[..., Buffer]) -> None:
    buffer = buffers()
    buffer.add(msgspec.structs.replace(message(3 * telemetry.WINDOWS_MAX), downloaded_bytes=7))
    told = [buffer.message(seq) for seq in buffer.held(10)]
    assert [one.downloaded_bytes for one in told if one is not None] == [7, 0, 0]


steps = st.lists(st.one_of(st.integers(1, 4), st.just("acknowledge"), st.just("restart"), st.just("fail")), max_size=40)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(800, 4000))
def test_every_window_is_delivered_held_or_counted_as_dropped(steps: list[int | str], bytes_max: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "telemetry.db")
        buffer = Buffer(path, bytes_max)
        added = delivered = told = 0
        for step in steps:
            if isinstance(step, int):
                buffer.add(message(step))
                added += step
            elif step == "acknowledge":
                for seq in buffer.held(2):
                    sent = buffer.message(seq)
                    assert sent is not None
                    assert sent.first <= seq
                    delivered += len(sent.windows)
                    told += sent.dropped
                    buffer.acknowledge(buffer.epoch, seq)
            elif step == "restart":
                if buffer.untold:
                    continue  # losses of a disk that takes nothing are known to this process only
                buffer.close()
                buffer = Buffer(path, bytes_max)
            else:
                buffer._database.execute("PRAGMA busy_timeout = 0")
                with locked(path):
                    buffer.add(message(1))
                added += 1
        held = [buffer.message(seq) for seq in buffer.held(1000)]
        waiting = sum(len(one.windows) + one.dropped for one in held if one is not None)
        assert added == delivered + told + waiting + buffer.untold
        numbers = buffer.held(1000)
        assert numbers == list(range(buffer.first, buffer.next)), "no gap"
        buffer.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let writing fail."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


def test_a_number_that_was_given_is_on_the_disk(buffers: Callable[..., Buffer]) -> None:
    """2 is FULL: what was committed survives a power cut, or a number would mean two messages."""
    assert buffers()._database.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_log_that_ends_anywhere_loses_whole_messages_and_tears_none(tmp_path: Path) -> None:
    buffer = Buffer(tmp_path / "telemetry.db", 1 << 20)
    for _ in range(6):
        buffer.add(message(2))
    whole = (tmp_path / "telemetry.db-wal").read_bytes()
    base = (tmp_path / "telemetry.db").read_bytes()
    counts = set()
    for number in range(40):
        copy = tmp_path / f"cut-{number}"
        copy.mkdir()
        (copy / "telemetry.db").write_bytes(base)
        (copy / "telemetry.db-wal").write_bytes(whole[: len(whole) * number // 39])
        after = Buffer(copy / "telemetry.db", 1 << 20)
        held = after.held(100)
        assert held == list(range(1, len(held) + 1))
        assert all(after.message(seq) is not None for seq in held)
        assert after.next == len(held) + 1
        counts.add(len(held))
        after.close()
    buffer.close()
    assert counts >= {0, 3, 6}


@pytest.mark.parametrize(
    "tear",
    [lambda block: bytes(len(block)), lambda block: os.urandom(len(block)), lambda block: block[: len(block) // 2]],
)
def test_a_log_with_a_torn_block_loses_whole_messages_and_tears_none(
    tmp_path: Path, tear: Callable[[bytes], bytes]
) -> None:
    buffer = Buffer(tmp_path / "telemetry.db", 1 << 20)
    for _ in range(6):
        buffer.add(message(2))
    whole = (tmp_path / "telemetry.db-wal").read_bytes()
    base = (tmp_path / "telemetry.db").read_bytes()
    buffer.close()
    counts = set()
    for begin in range(0, len(whole), BLOCK_BYTES):
        block = whole[begin : begin + BLOCK_BYTES]
        copy = tmp_path / f"torn-{begin}"
        copy.mkdir()
        (copy / "telemetry.db").write_bytes(base)
        kept = tear(block).ljust(len(block), b"\xff")
        (copy / "telemetry.db-wal").write_bytes(whole[:begin] + kept + whole[begin + BLOCK_BYTES :])
        after = Buffer(copy / "telemetry.db", 1 << 20)
        held = after.held(100)
        assert held == list(range(1, len(held) + 1))
        assert all(one is not None and len(one.windows) == 2 for one in map(after.message, held))
        assert after.next == len(held) + 1
        counts.add(len(held))
        after.close()
    assert counts >= {0, 3, 5}


BLOCK_BYTES = 4096
KILLS = ((1, 7), (40, 60), (3, 90))
"""By process that is killed: messages added before one is acknowledged, and lines said before it is killed."""
BUSY = """\
import sys
from pathlib import Path
from wherry_agent.telemetry import Buffer
from wherry_shared.wire import Telemetry, Window
window = Window(model="m", manifest="m", variant="v", arm="candidate", start=1, duration_us=2)
two = Telemetry(format=1, device="d", epoch="", seq=0, first=0, at=5, windows=[window] * 2)
buffer = Buffer(Path(sys.argv[1]), 3000)
while True:
    for _ in range(int(sys.argv[2])):
        buffer.add(two)
        print("added", buffer.next - 1, flush=True)
    seq = buffer.held(1)[0]
    print("sent", seq, buffer.message(seq).dropped, flush=True)
    buffer.acknowledge(buffer.epoch, seq)
    print("acknowledged", seq, flush=True)
"""


def test_a_kill_at_any_moment_loses_no_number_and_no_window_without_a_count(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.db"
    buffer = Buffer(path, 3000)
    epoch = buffer.epoch
    buffer.close()
    delivered = numbered = dropped = 0
    for adds, after in KILLS:
        lines = killed(path, adds=adds, after=after)
        numbered = max([numbered, *(int(line[1]) for line in lines if line[0] == "added")])
        buffer = Buffer(path, 3000)
        held = buffer.held(1000)
        assert buffer.epoch == epoch
        assert numbered <= buffer.next - 1 <= numbered + 1, "what was given is there, and at most the one under way"
        assert held == list(range(buffer.first, buffer.next))
        for sent in (line for line in lines if line[0] == "sent"):
            noted = ["acknowledged", sent[1]] in lines
            assert not (noted and int(sent[1]) in held), "what was acknowledged does not come back"
            if noted or int(sent[1]) < buffer.first:
                delivered += 2 + int(sent[2])
        there = [one for one in map(buffer.message, held) if one is not None]
        waiting = sum(len(one.windows) + one.dropped for one in there)
        dropped += sum(one.dropped for one in there)
        assert 2 * (buffer.next - 1) == delivered + waiting + buffer.untold
        numbered = buffer.next - 1
        buffer.close()
    assert numbered > 60
    assert delivered
    assert dropped, "the bound was reached"


def killed(path: Path, *, adds: int, after: int) -> list[list[str]]:
    """Let a process fill and empty a buffer and kill it; return all that it said that it did."""
    argv = [sys.executable, "-c", BUSY, str(path), str(adds)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child, child.stdout:
        lines = [child.stdout.readline() for _ in range(after)]
        child.kill()
        lines += child.stdout.readlines()
    return [line.split() for line in lines if line.endswith("\n")]
