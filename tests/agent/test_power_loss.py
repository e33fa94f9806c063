"""What a disk may keep after a power cut: unsynced bytes lost, torn or replaced, names reordered. Whatever it keeps will do.

Every step of a run is a place to cut, and at every cut each variant of `wherry_simulators.disk` is written out and taken up
again. The last tests leave out a sync on purpose: a model that did not notice would prove nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent import cuts
from tests.agent.builders import confirmed
from tests.conftest import NOTE
from tests.trust_kit import MODEL, Answer, LittleServer, Workstation, assets_of, digest, with_publisher
from wherry_agent.children import Trust as Word
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk, Step
from wherry_agent.journal import Journal
from wherry_agent.state import State
from wherry_agent.store import Store
from wherry_agent.trust import Keeper, Known
from wherry_server.trust import Trust
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_simulators.disk import Loss, Recorder, Taken, Variant, tries

TORN = 2
"""How often a variant that leaves something to chance is tried at each cut."""
DATA = os.urandom(40_000)
DIGEST = of_bytes(DATA)


class Careless(Recorder):
    """Says that it synced, and did not: as if the call were missing."""

    forgets: Step = "fsync"

    def step(self, step: Step, path: Path, **more) -> None:
        if step != self.forgets:
            super().step(step, path, **more)


class CarelessWithNames(Careless):
    forgets: Step = "fsync_folder"


class Bench:
    """Runs something on a recorder, and gives what is left after every cut."""

    def __init__(self, folder: Path, recorder: type[Recorder] = Recorder) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.before = folder / "before"
        self.after = folder / "after"
        self.home.mkdir(parents=True)
        self._recorder = recorder
        self.points = 0

    def record(self, run: Callable[[Disk], None]) -> list[Taken]:
        shutil.rmtree(self.before, ignore_errors=True)
        shutil.copytree(self.home, self.before)
        disk = self._recorder(self.home)
        run(disk)
        return disk.steps

    def losses(self, steps: list[Taken], *, every: int = 1) -> Iterator[tuple[int, Variant, Path]]:
        """Yield (cut, variant, home) for every point; with `every`, at each so-manieth cut and at the last."""
        for cut in sorted({*range(0, len(steps) + 1, every), len(steps)}):
            loss = Loss(self.before, self.home, steps, cut)
            for variant, chance in tries(steps, cut, torn=TORN, seed="unit"):
                loss.materialise(self.after, variant, chance)
                self.points += 1
                yield cut, variant, self.after


# --- the journal ------------------------------------------------------------------------------------


def states() -> list[State]:
    first = confirmed("1.0.0")
    return [replace(first, revision=number) for number in range(4)]


def journal_after_cuts(bench: Bench) -> None:
    ends: list[int] = []
    disks: list[Recorder] = []

    def run(disk: Disk) -> None:
        assert isinstance(disk, Recorder)
        disks.append(disk)
        kept = Journal(disk, bench.home / "journal.json")
        for state in states()[1:]:
            kept.write(state)
            ends.append(len(disk.steps))

    Journal(Disk(), bench.home / "journal.json").write(states()[0])
    steps = bench.record(run)
    for cut, variant, home in bench.losses(steps):
        written = sum(end <= cut for end in ends)
        state, problems = Journal(Disk(), home / "journal.json").read(lambda: "other")
        where = f"cut before step {cut}, {variant.name}"
        assert state is not None, where
        assert written <= state.revision <= written + 1, where
        assert not problems, where


def test_the_journal_is_the_old_or_the_new_one(tmp_path: Path, record_property) -> None:
    bench = Bench(tmp_path)
    journal_after_cuts(bench)
    record_property(NOTE, f"power loss, journal: {bench.points} points")


# --- the store --------------------------------------------------------------------------------------


def download(store: Store, *, sync_at: tuple[int, ...] = (), data: bytes = DATA) -> None:
    with store.part(DIGEST, len(DATA)) as part:
        while part.size < len(DATA):
            part.write(data[part.size : part.size + 7000], "server")
            if part.size in sync_at:
                part.sync()
        part.commit()


def liar_first(store: Store) -> None:
    """Bytes of a liar are synced, found wrong, and made good."""
    wrong = os.urandom(len(DATA))
    try:
        download(store, data=wrong, sync_at=(14_000, 28_000))
    except RefusedError:
        with store.part(DIGEST, len(DATA)) as part:
            part.reset()
            while part.size < len(DATA):
                part.write(DATA[part.size : part.size + 7000], "server")
            part.commit()


@pytest.mark.parametrize("how", [lambda store: download(store, sync_at=(14_000, 28_000)), liar_first])
def test_a_blob_is_whole_or_its_download_goes_on(tmp_path: Path, record_property, how) -> None:
    bench = Bench(tmp_path)
    Store(bench.home, Disk())
    steps = bench.record(lambda disk: how(Store(bench.home, disk)))
    wrong = 0
    for cut, variant, home in bench.losses(steps):
        store = Store(home, Disk())
        where = f"cut before step {cut}, {variant.name}"
        if store.has(DIGEST, len(DATA)):
            assert store.read(DIGEST, len(DATA)) == DATA, where
        else:
            try:
                download(store)
            except RefusedError:  # only where a liar's bytes had been synced
                assert how is liar_first, where
                wrong += 1
                with store.part(DIGEST, len(DATA)) as part:
                    part.reset()
                download(store)
        assert store.read(DIGEST, len(DATA)) == DATA, where
    assert how is not liar_first or wrong
    record_property(NOTE, f"power loss, download: {bench.points} points")


# --- assets -----------------------------------------------------------------------------------------

FILES = {"labels.txt": b"cat\ndog\n", "tables/mel.bin": os.urandom(3000)}
ASSETS, TAR = assets_of(FILES)


def assets_after_cuts(bench: Bench, run: Callable[[Store], None]) -> None:
    steps = bench.record(lambda disk: run(Store(bench.home, disk)))
    for cut, variant, home in bench.losses(steps):
        where = f"cut before step {cut}, {variant.name}"
        store = Store(home, Disk())
        if not store.has(ASSETS.digest, len(TAR)):
            store.add(ASSETS.digest, TAR)
        folder = store.unpack(ASSETS.digest, ASSETS.files)  # believes what says that it is complete
        assert {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()} == FILES, where


def test_assets_that_say_they_are_complete_are(tmp_path: Path, record_property) -> None:
    bench = Bench(tmp_path)
    Store(bench.home, Disk()).add(ASSETS.digest, TAR)
    assets_after_cuts(bench, lambda store: store.unpack(ASSETS.digest, ASSETS.files))
    record_property(NOTE, f"power loss, assets unpacked: {bench.points} points")


def test_assets_that_are_being_removed_are_not_taken_for_complete(tmp_path: Path, record_property) -> None:
    bench = Bench(tmp_path)
    store = Store(bench.home, Disk())
    store.add(ASSETS.digest, TAR)
    store.unpack(ASSETS.digest, ASSETS.files)
    assets_after_cuts(bench, lambda one: one.collect(set()))
    record_property(NOTE, f"power loss, assets removed: {bench.points} points")


# --- trust ------------------------------------------------------------------------------------------


def test_the_trusted_set_that_the_journal_names_answers_without_a_network(tmp_path: Path, record_property) -> None:
    # each point takes a few signatures
    points, cuts_tried, cuts_possible = trust_after_cuts(tmp_path, every=3)
    assert points >= cuts_tried > cuts_possible // 3
    record_property(NOTE, f"power loss, trust: {points} points at {cuts_tried} of {cuts_possible} cuts")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_trusted_set_answers_after_a_cut_at_every_step(tmp_path: Path, record_property) -> None:
    points, cuts_tried, cuts_possible = trust_after_cuts(tmp_path, every=1)
    assert cuts_tried == cuts_possible
    record_property(NOTE, f"power loss, trust at every cut: {points} points")


def trust_after_cuts(tmp_path: Path, *, every: int) -> tuple[int, int, int]:
    """Return how many points and cuts were tried, and how many cuts there are."""
    trust = Trust.create_dev(tmp_path / "server")
    acme = with_publisher(trust, Workstation())

    def answer(path: str, headers: dict[str, str]) -> Answer:
        try:
            data = trust.metadata(path.rpartition("/")[2])
        except RefusedError:
            return Answer(404)
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        return Answer(304 if headers.get("if-none-match") == tag else 200, data, {"ETag": tag})

    web = LittleServer(answer)
    bench = Bench(tmp_path / "device")
    (bench.home / "trust").mkdir()
    (bench.home / "trust" / "root.json").write_bytes(trust.metadata("1.root.json"))

    def keeper(home: Path, disk: Disk, word: Word) -> Keeper:
        return Keeper(
            home,
            disk,
            root_digest=trust.root_digest,
            metadata_url=f"{web.url}/tuf/default",
            http=Http(),
            known=Known(word.current, dict(word.floors), word.time_floor_us),
            wall_us=int(time.time() * 1e6),
        )

    def refresh(home: Path, disk: Disk, word: Word, target: str) -> Word:
        kept = keeper(home, disk, word)
        with kept.online() as session:
            assert session.manifest_of(target)
            return kept.commit(session)

    words = [Word(current=0, floors={}, time_floor_us=0, expires_at=0)]
    acme.publish(trust, f"{MODEL}/1.0.0", digest("one"))
    words.append(refresh(bench.home, Disk(), words[0], f"{MODEL}/1.0.0"))
    words.append(refresh(bench.home, Disk(), words[1], f"{MODEL}/1.0.0"))
    acme.publish(trust, f"{MODEL}/1.1.0", digest("two"))
    steps = bench.record(lambda disk: words.append(refresh(bench.home, disk, words[2], f"{MODEL}/1.1.0")))
    before, after = words[2], words[3]
    assert after.current > before.current
    try:
        tried: set[int] = set()
        for cut, variant, home in bench.losses(steps, every=every):
            tried.add(cut)
            where = f"cut before step {cut}, {variant.name}"
            word = after if cut == len(steps) else before
            with keeper(home, Disk(), word).offline() as session:
                assert session.manifest_of(f"{MODEL}/1.0.0"), where
            found = refresh(home, Disk(), word, f"{MODEL}/1.1.0")
            assert all(found.floors[role] >= floor for role, floor in word.floors.items()), where
            left = {path.name for path in (home / "trust").iterdir()}
            assert not {name for name in left if name.endswith(".tmp") or name == ".scratch"}, where
    except (RefusedError, UnreachableError) as error:
        raise AssertionError(f"{where}: {error}") from error
    finally:
        web.close()
    return bench.points, len(tried), len(steps) + 1


# --- the whole agent --------------------------------------------------------------------------------


def test_a_whole_agent_takes_up_what_a_disk_kept(tmp_path: Path, record_property) -> None:
    losses(tmp_path, "1", record_property)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_whole_agent_takes_up_whatever_a_disk_kept(tmp_path: Path, record_property) -> None:
    losses(tmp_path, "whole", record_property)


def losses(folder: Path, extent: str, note: Callable[[str, object], None]) -> None:
    outcomes = list(cuts.run_points(folder, extent, losses=True))
    found = cuts.summary(outcomes)
    note(NOTE, f"power loss, whole agent: {found['points']} points, {found['failed']} failed")
    failed = [
        f"{one.scenario}, {one.mode}, before step {one.at}, {one.cut}: {one.error}" for one in outcomes if one.error
    ]
    assert not failed, "\n".join(failed[:5])
    assert set(found["by_scenario"]) == {scenario.name for scenario in cuts.SCENARIOS}


# --- a model that notices ---------------------------------------------------------------------------


@pytest.mark.parametrize("recorder", [Careless, CarelessWithNames])
def test_a_journal_that_is_not_synced_does_not_pass(tmp_path: Path, recorder: type[Recorder]) -> None:
    with pytest.raises(AssertionError, match="cut before step"):
        journal_after_cuts(Bench(tmp_path, recorder))


def test_assets_whose_marker_is_removed_without_a_sync_do_not_pass(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CarelessWithNames)
    store = Store(bench.home, Disk())
    store.add(ASSETS.digest, TAR)
    store.unpack(ASSETS.digest, ASSETS.files)
    with pytest.raises(AssertionError, match="cut before step"):
        assets_after_cuts(bench, lambda one: one.collect(set()))


def test_an_interrupted_removal_that_came_back_is_noticed(tmp_path: Path) -> None:
    """The steps of a rename within a folder are one change: a name is never gone from both places."""
    bench = Bench(tmp_path)
    (bench.home / "a").write_bytes(b"x")
    steps = bench.record(lambda disk: disk.rename(bench.home / "a", bench.home / "b"))
    seen = {tuple(sorted(path.name for path in home.iterdir())) for _, _, home in bench.losses(steps)}
    assert seen == {("a",), ("b",)}
