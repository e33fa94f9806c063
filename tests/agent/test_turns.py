"""State first, then effects: what the supervisor does when the journal cannot be written."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.agent.builders import (
    DEVICE,
    MODEL,
    candidates,
    confirmed,
    fresh,
    last_serve,
    loadable,
    offer,
    offered,
    on_trial,
    resolved,
)
from wherry_agent import journal, machine
from wherry_agent import state as s
from wherry_agent.children import CourierAnswer, CourierTask, Failed
from wherry_agent.daemon import Daemon
from wherry_agent.disk import Disk, Step
from wherry_agent.envelopes import Envelopes
from wherry_agent.identity import Identity
from wherry_agent.settings import Settings
from wherry_agent.telemetry import Buffer
from wherry_shared.errors import DeviceError
from wherry_shared.wire import Hello, Trial


class Full:
    """A disk that is full until it is told otherwise; removing the ballast makes room once."""

    def __init__(self, *, after_unlink: bool = False) -> None:
        self.full = False
        self.after_unlink = after_unlink

    def __call__(self, step: Step, path: Path) -> None:
        if step == "unlink" and path.name == "ballast" and self.after_unlink:
            self.full = False
        if step == "write" and self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


class Recorder(Daemon):
    """A supervisor that writes down effects instead of starting children; the journal is real."""

    def __init__(self, home: Path, hook: Full, **settings: int) -> None:
        super().__init__(Settings(home=str(home), **settings), disk=Disk(hook))
        self._server = "http://127.0.0.1:1"
        self.effects: list[s.Effect] = []
        self.written_at_effect: list[s.State] = []
        self._state = fresh()
        self._journal.write(self._state)

    def _run(self, effect: s.Effect) -> None:
        self.effects.append(effect)
        self.written_at_effect.append(journal.decode((self._home / "journal.json").read_bytes()))


def test_effects_run_only_when_their_state_is_on_disk(tmp_path: Path) -> None:
    daemon = Recorder(tmp_path, Full())
    daemon._turn(offer(1, {MODEL: offered()}))
    daemon._turn(resolved())
    assert [type(effect).__name__ for effect in daemon.effects] == ["Resolve", "SendReports", "Fetch"]
    phases = [type(state.models[MODEL].phase).__name__ for state in daemon.written_at_effect]
    assert phases == ["Resolving", "Resolving", "Fetching"]


def test_with_a_full_disk_nothing_happens_until_there_is_room(tmp_path: Path) -> None:
    full = Full()
    daemon = Recorder(tmp_path, full)
    full.full = True
    before = daemon._state
    daemon._turn(offer(1, {MODEL: offered()}))
    assert daemon.effects == []
    assert daemon._state == before == journal.decode((tmp_path / "journal.json").read_bytes())
    assert "journal" in daemon._timers

    full.full = False
    daemon._write_again()
    assert [type(effect).__name__ for effect in daemon.effects] == ["Resolve", "SendReports"]


def test_the_ballast_gives_way_so_that_the_journal_can_be_written(tmp_path: Path) -> None:
    full = Full(after_unlink=True)
    daemon = Recorder(tmp_path, full)
    daemon._add_ballast()
    assert (tmp_path / "ballast").stat().st_size > 0
    full.full = True
    daemon._turn(offer(1, {MODEL: offered()}))
    assert [type(effect).__name__ for effect in daemon.effects] == ["Resolve", "SendReports"]
    assert not (tmp_path / "ballast").exists()


def test_without_ballast_a_full_disk_is_an_error_with_its_code(tmp_path: Path) -> None:
    full = Full()
    daemon = Recorder(tmp_path, full)
    full.full = True
    changed, _ = machine.step(daemon._state, offer(1, {MODEL: offered()}), daemon._now())
    with pytest.raises(DeviceError) as caught:
        daemon._commit(changed)
    assert caught.value.code == "disk_full"


def test_a_download_that_would_fill_the_disk_is_not_begun(tmp_path: Path) -> None:
    daemon = Recorder(tmp_path, Full(), disk_reserve_mb=1 << 30)
    daemon._turn(offer(1, {MODEL: offered()}))
    daemon._turn(resolved())
    fetch = daemon.effects[-1]
    assert isinstance(fetch, s.Fetch)
    daemon._fetch(fetch)
    answer = daemon._queue.get(timeout=5)
    assert callable(answer)
    answer()
    phase = daemon._state.models[MODEL].phase
    assert isinstance(phase, s.Waiting)
    assert phase.reason == "disk_full"


class Leases:
    """Handles that hold nothing."""

    def leases(self) -> set[str]:
        return set()


def test_tidying_that_had_to_wait_keeps_what_came_in_between(tmp_path: Path) -> None:
    daemon = Recorder(tmp_path, Full())
    daemon._handles = Leases()  # type: ignore[assignment]
    blobs = tmp_path / "store" / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    needed = blobs / candidates()[0].loadable.digest.removeprefix("sha256:")
    stray = blobs / ("f" * 64)
    for path in (needed, stray):
        path.write_bytes(b"x")
    daemon._trust_busy = MODEL
    Daemon._run(daemon, s.Collect(()))
    assert stray.exists()
    daemon._turn(offer(1, {MODEL: offered()}))
    daemon._turn(resolved())
    daemon._trust_busy = ""
    daemon._collect_now()
    assert needed.exists()
    assert not stray.exists()


def test_a_courier_that_mends_holds_tidying_off(tmp_path: Path) -> None:
    daemon = Recorder(tmp_path, Full())
    daemon._handles = Leases()  # type: ignore[assignment]
    stray = tmp_path / "store" / "blobs" / "sha256" / ("f" * 64)
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"x")
    daemon._shorts["!mend"] = Running()  # type: ignore[assignment]
    Daemon._run(daemon, s.Collect(()))
    assert stray.exists()
    del daemon._shorts["!mend"]
    daemon._shorts["!scrub"] = Running()  # type: ignore[assignment]
    daemon._collect_now()
    assert not stray.exists()


class Running:
    """Stands for a child."""


class ReadOnly:
    """A disk that takes no writes until it is told otherwise."""

    def __init__(self) -> None:
        self.on = True
        self.writes = 0

    def __call__(self, step: Step, path: Path) -> None:
        if self.on:
            self.writes += 1
            raise OSError(errno.EROFS, "Read-only file system")


class Booted(Daemon):
    """A supervisor that is started on a home, with children that are only written down."""

    def __init__(self, home: Path, hook: ReadOnly) -> None:
        super().__init__(Settings(home=str(home)), disk=Disk(hook))
        self.effects: list[s.Effect] = []
        self.hellos = 0

    def _enrolled(self) -> Identity:
        return IDENTITY

    def _run(self, effect: s.Effect) -> None:
        self.effects.append(effect)

    def _say_hello(self) -> None:
        self.hellos += 1

    def served(self) -> list[str]:
        return [model.active.target for model in last_serve(self.effects).models]


IDENTITY = Identity(
    format=1,
    device=DEVICE,
    project="default",
    name="lamp",
    server="http://127.0.0.1:1",
    root_digest="0" * 64,
    tuf_path="/tuf/default",
    bearer="b",
    mac_key="",
    broker_host="127.0.0.1",
    broker_port=1,
)


@pytest.mark.parametrize("start", [confirmed("1.0.0"), on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)])
def test_an_agent_that_starts_on_a_disk_without_writes_serves_what_is_trusted(tmp_path: Path, start: s.State) -> None:
    (tmp_path / "run").mkdir()
    journal.Journal(Disk(), tmp_path / "journal.json").write(start)
    disk = ReadOnly()
    daemon = Booted(tmp_path, disk)
    assert daemon._take_up() == ()
    assert daemon._stuck == "read_only"
    daemon._turn(s.WorkerReady())
    assert daemon.served() == [f"{MODEL}/1.0.0"]
    daemon._turn(s.Served(MODEL, loadable("1.0.0").digest, daemon._state.revision, ok=True))
    assert daemon._state.told is None

    # nothing is begun, whatever is offered, and the journal stays what it was
    effects = len(daemon.effects)
    daemon._turn(offer(3, {MODEL: offered("1.2.0")}))
    daemon._write_again()
    assert len(daemon.effects) == effects
    assert journal.decode((tmp_path / "journal.json").read_bytes()) == start


def test_once_the_disk_takes_writes_again_a_trial_goes_on_where_the_journal_stood(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    start = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    journal.Journal(Disk(), tmp_path / "journal.json").write(start)
    disk = ReadOnly()
    daemon = Booted(tmp_path, disk)
    daemon._take_up()
    daemon._turn(s.WorkerReady())
    daemon._turn(offer(3, {MODEL: offered("1.2.0")}))
    disk.on = False
    daemon._write_again()
    assert daemon._stuck == ""
    daemon._run_timers()
    assert daemon.hellos
    assert daemon.served() == [f"{MODEL}/1.1.0"]
    written = journal.decode((tmp_path / "journal.json").read_bytes())
    phase = written.models[MODEL].phase
    assert isinstance(phase, s.Swapping)
    assert phase.job.restarts == 1
    assert written.offer is not None
    assert written.offer.serial == 3  # what came meanwhile was taken after it
    assert {report.seq for report in start.owed} <= {report.seq for report in written.owed}


def test_a_stuck_agent_does_not_try_to_write_all_the_time(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    journal.Journal(Disk(), tmp_path / "journal.json").write(confirmed("1.0.0"))
    disk = ReadOnly()
    daemon = Booted(tmp_path, disk)
    daemon._take_up()
    daemon._run_timers()
    assert daemon.hellos == 1
    assert daemon._wait_s() > 1.0
    assert daemon._tick_in_s() <= 0  # trust is due, and waits for the disk


def test_deaths_of_the_worker_are_not_saved_up_into_a_loop(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    journal.Journal(Disk(), tmp_path / "journal.json").write(confirmed("1.0.0"))
    disk = ReadOnly()
    daemon = Booted(tmp_path, disk)
    daemon._take_up()
    for _ in range(10):
        daemon._turn(s.WorkerDied("signal 9"))
    disk.on = False
    daemon._write_again()
    assert daemon._state.models[MODEL].incumbent is not None
    assert not isinstance(daemon._state.models[MODEL].phase, s.Safe)


def trial_on(folder: Path, full: Full, crashes_max: int = 0) -> tuple[Recorder, s.State]:
    daemon = Recorder(folder, full)
    terms = Trial(min_requests=5, max_s=60, crashes_max=crashes_max)
    daemon._state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2, trial=terms)
    daemon._commit(daemon._state, always=True)
    return daemon, daemon._state


def served(daemon: Recorder) -> list[str]:
    return [model.active.target for model in last_serve(daemon.effects).models]


def condemned(state: s.State) -> s.Event:
    phase = state.models[MODEL].phase
    assert isinstance(phase, s.OnTrial)
    return s.Condemned(MODEL, phase.job.loadable.digest, phase.trial, "application", "it is no good")


def crashed(_: s.State) -> s.Event:
    return s.WorkerDied("the worker ended with signal 11")


@pytest.mark.parametrize(
    ("event", "crashes_max", "goes_on"), [(condemned, 0, False), (crashed, 0, False), (crashed, 1, True)]
)
def test_a_candidate_does_not_serve_on_while_its_verdict_cannot_be_written(
    tmp_path: Path, event: Callable[[s.State], s.Event], crashes_max: int, *, goes_on: bool
) -> None:
    full = Full()
    daemon, before = trial_on(tmp_path, full, crashes_max)
    full.full = True
    daemon._turn(event(before))
    assert daemon._state == before
    assert served(daemon) == [f"{MODEL}/1.0.0"]

    # neither does it in a worker that comes anew, whose deaths are not the candidate's
    for _ in range(3):
        daemon.effects.clear()
        daemon._turn(crashed(before))
        daemon._turn(s.WorkerReady())
        assert served(daemon) == [f"{MODEL}/1.0.0"]
    daemon._write_again()
    assert served(daemon) == [f"{MODEL}/1.0.0"]
    assert "journal" in daemon._timers

    full.full = False
    daemon._write_again()
    phase = daemon._state.models[MODEL].phase
    assert daemon._stuck == ""
    if goes_on:
        assert isinstance(phase, s.Swapping)
        assert phase.crashes == 1
        assert served(daemon) == [f"{MODEL}/1.1.0"]
    else:
        assert isinstance(phase, s.Returning)
        assert daemon._state.known_bad
        assert served(daemon) == [f"{MODEL}/1.0.0"]


def test_a_trial_that_nothing_happened_to_goes_on_when_there_is_room(tmp_path: Path) -> None:
    full = Full()
    daemon, _ = trial_on(tmp_path, full)
    full.full = True
    daemon._turn(s.Declares(MODEL, None, "settings"))
    daemon._turn(offer(3, {MODEL: offered("1.1.0")}))
    assert served(daemon) == [f"{MODEL}/1.0.0"]
    full.full = False
    daemon._write_again()
    phase = daemon._state.models[MODEL].phase
    assert isinstance(phase, s.Swapping)
    assert (phase.crashes, phase.job.restarts) == (0, 0)
    assert served(daemon) == [f"{MODEL}/1.1.0"]


def written(home: Path) -> s.State:
    return journal.decode((home / "journal.json").read_bytes())


def test_an_agent_that_is_told_to_end_writes_that_down_first(tmp_path: Path) -> None:
    daemon = Recorder(tmp_path, Full())
    daemon._state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    daemon._stop()
    assert written(tmp_path).stopped
    assert written(tmp_path).models == daemon._state.models
    assert daemon.effects == []


class PortTaken(Recorder):
    """A supervisor that goes on where its journal stands, and then finds its port taken."""

    def _take_up(self) -> tuple[s.Effect, ...]:
        return self._resume(written(self._home))

    def _begin(self, effects: tuple[s.Effect, ...]) -> None:
        raise DeviceError("port_busy", f"somebody else has the port, {len(effects)} effects wait")


def test_starts_that_fail_for_a_reason_of_the_agents_own_are_counted_against_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wherry_agent.daemon.signal.signal", lambda *_: None)
    monkeypatch.setattr("wherry_agent.daemon.os.umask", lambda _: None)
    state = on_trial("1.1.0", state=confirmed("1.0.0"), serial=2)
    for _ in range(5):
        daemon = PortTaken(tmp_path, Full())
        daemon._journal.write(state)
        with pytest.raises(DeviceError, match="port_busy"):
            daemon.run()
        logging.getLogger().removeHandler(daemon._ring)
        state = written(tmp_path)
    phase = state.models[MODEL].phase
    assert isinstance(phase, s.Swapping)
    assert (phase.job.restarts, phase.job.downs) == (5, 1)  # the first of them followed an end that nobody ordered


class Answered(Recorder):
    """Its couriers answer at once."""

    answer: CourierAnswer

    def _courier(
        self, key: str, task: CourierTask, done: Callable[[CourierAnswer], None], on_progress: object = None
    ) -> None:
        done(self.answer)


def verifies(daemon: Daemon) -> None:
    daemon._envelopes = Envelopes()
    daemon._envelopes.add(b"an offer", (1, 1), 0.5, from_server=True)
    daemon._trust_task("!verify", daemon._verify)


def refreshes(daemon: Daemon) -> None:
    daemon._trust_task("!refresh", lambda: daemon._refresh_by_courier(""))


@pytest.mark.parametrize("ask", [verifies, refreshes])
def test_a_disk_that_keeps_an_offer_from_being_verified_is_told_in_a_hello(
    tmp_path: Path, ask: Callable[[Daemon], None]
) -> None:
    daemon = Answered(tmp_path, Full())
    daemon._identity = IDENTITY
    daemon._buffer = Buffer(tmp_path / "telemetry.db", 2**20)

    def told() -> str:
        return msgspec.json.decode(daemon._hello(), type=Hello).trust_state

    before = told()
    for answer, wanted, said in (
        (Failed(reason="disk_full", detail="no space left", retry_after_s=60.0), "disk_full", True),
        (Failed(reason="disk_full", detail="no space left", retry_after_s=60.0), "disk_full", False),
        (Failed(reason="network", detail="nobody answers", retry_after_s=60.0), before, True),
    ):
        daemon._timers.pop("hello", None)
        daemon.answer = answer
        ask(daemon)
        assert told() == wanted
        assert ("hello" in daemon._timers) is said, "without being asked, and once"
