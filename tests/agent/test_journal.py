"""The journal: what comes back, what a cut or rot does to it, and recordings of every release."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import msgspec
import pytest

from tests.agent.builders import MODEL, confirmed, fresh, judged, now, offer, offered, on_trial, resolved, run
from tests.agent.test_disk import Cutter, PowerCut
from wherry_agent import journal, machine
from wherry_agent import state as s
from wherry_agent.disk import Disk
from wherry_agent.journal import Journal
from wherry_shared.errors import RefusedError

RECORDINGS = Path(__file__).parent / "journals"


def busy() -> s.State:
    """A state in which nearly everything is set."""
    state = confirmed("1.0.0", state=confirmed("0.9.0"), serial=2)
    models = {MODEL: offered("1.1.0"), "pitch": offered(model="pitch"), "waiting": offered(model="waiting")}
    state, _ = run(state, offer(3, models), resolved("1.1.0", "int8", "float"))
    state, _ = run(state, s.Fetched(MODEL, offered("1.1.0").manifest, 1, "int8"))
    state, _ = run(state, judged("1.1.0", "int8", passed=False, reason="golden_miss"))
    failed = s.TaskFailed("waiting", offered(model="waiting").manifest, 1, "resolve", "network", "down", 30.0)
    state, _ = run(state, failed, s.WorkerDied("signal 11"), s.Tick(), s.RefreshFailed("network", "down"))
    return state


def test_every_field_has_a_name_on_disk() -> None:
    for kind, names in journal.NAMES.items():
        fields = (
            {field.name for field in dataclasses.fields(kind)}
            if dataclasses.is_dataclass(kind)
            else set(kind.__struct_fields__)
        )
        assert set(names) == fields, kind
        assert len(set(names.values())) == len(names), kind


@pytest.mark.parametrize("state", [fresh(), confirmed(), on_trial("1.1.0", state=confirmed(), serial=2), busy()])
def test_a_state_comes_back_as_it_was(state: s.State) -> None:
    assert journal.decode(journal.encode(state)) == state


def altered(data: bytes, change: dict[str, object] | None = None, head: bytes = b"") -> bytes:
    first, _, body = data.partition(b"\n")
    if change is not None:
        body = msgspec.json.encode({**msgspec.json.decode(body), **change})
        first = b"wherry-journal 1 " + hashlib.sha256(body).hexdigest().encode()
    return (head or first) + b"\n" + body


GOOD = journal.encode(busy())
BAD = [
    ("empty", b"", "journal_foreign"),
    ("another file", b"{}\n", "journal_foreign"),
    ("cut short", GOOD[:-10], "journal_torn"),
    ("zeros after a power cut", bytes(len(GOOD)), "journal_foreign"),
    ("a bit that rotted", GOOD[:-20] + bytes([GOOD[-20] ^ 1]) + GOOD[-19:], "journal_torn"),
    ("of a newer agent", altered(GOOD, head=b"wherry-journal 2 " + b"0" * 64), "journal_format"),
    ("whole but no state", altered(GOOD, {"models": 7}), "journal_invalid"),
    (
        "with a phase that nobody knows",
        altered(GOOD, {"models": {"x": {"phase": {"at": "dancing"}}}}),
        "journal_invalid",
    ),
]


@pytest.mark.parametrize(("sentence", "data", "code"), BAD, ids=[row[0].replace(" ", "_") for row in BAD])
def test_a_bad_record_is_refused_and_the_one_before_serves(
    tmp_path: Path, sentence: str, data: bytes, code: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        journal.decode(data)
    assert caught.value.code == code
    assert caught.value.consequence

    path = tmp_path / "journal.json"
    kept = Journal(Disk(), path)
    older = confirmed()
    kept.write(older)
    kept.write(busy())
    path.write_bytes(data)
    state, problems = kept.read(lambda: "new-stream")
    assert [problem.code for problem in problems] == [code]
    assert state is not None
    assert state.models == older.models
    assert (state.stream, [report.seq for report in state.owed]) == ("new-stream", [1, 2, 3, 4])
    assert {report.epoch for report in state.owed} == {"new-stream"}
    assert path.with_name("journal.json.bad").read_bytes() == data


def test_with_both_records_bad_the_device_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    kept = Journal(Disk(), path)
    kept.write(confirmed())
    kept.write(confirmed())
    path.write_bytes(b"x")
    path.with_name("journal.json.before").write_bytes(b"y")
    state, problems = kept.read(lambda: "new")
    assert state is None
    assert len(problems) == 2


def test_unknown_names_are_ignored_and_absent_ones_take_their_default() -> None:
    body = msgspec.json.decode(GOOD.partition(b"\n")[2])
    body["from_the_future"] = 1
    del body["worker_crashes"]
    raw = msgspec.json.encode(body)
    head = b"wherry-journal 1 " + hashlib.sha256(raw).hexdigest().encode()
    assert journal.decode(head + b"\n" + raw) == dataclasses.replace(busy(), crashes=None)


def test_a_cut_at_every_step_of_a_write_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    old, new = confirmed(), busy()
    counter = Cutter()
    path = tmp_path / "count" / "journal.json"
    path.parent.mkdir()
    Journal(Disk(), path).write(old)
    Journal(Disk(counter), path).write(new)
    assert len(counter.steps) >= 5
    for at in range(len(counter.steps)):
        folder = tmp_path / str(at)
        folder.mkdir()
        kept = Journal(Disk(), folder / "journal.json")
        kept.write(old)
        with pytest.raises(PowerCut):
            Journal(Disk(Cutter(at)), folder / "journal.json").write(new)
        state, problems = kept.read(lambda: "new")
        assert problems == []
        assert state in (old, new)


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.journal")), ids=lambda path: path.stem)
def test_recordings_of_older_releases_are_read_and_resumed(path: Path) -> None:
    state = journal.decode(path.read_bytes())
    resumed, effects = machine.resume(state, now(0, "another boot"))
    assert effects
    assert [report.seq for report in resumed.owed][: len(state.owed)] == [report.seq for report in state.owed]
    names = {MODEL, "pitch"} if "group" in path.stem else {MODEL}
    assert {model.name for model in machine.serving(resumed)} == names


def test_there_is_a_recording_of_this_format() -> None:
    heads = {path.read_bytes().split(b" ", 2)[1] for path in RECORDINGS.glob("*.journal")}
    assert b"%d" % journal.FORMAT in heads
