"""The scrub: what the disk altered is found, set aside, brought again, and said so, while it serves on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.agent.builders import MODEL, confirmed, digest_of, offer, offered, resolved, run
from tests.trust_kit import assets_of
from wherry_agent import courier_scrub, doctor, machine
from wherry_agent import state as s
from wherry_agent.children import Loadable, Scrub
from wherry_agent.disk import Disk
from wherry_agent.journal import Journal
from wherry_agent.settings import Settings
from wherry_agent.store import Store
from wherry_shared.bundle import (
    Config,
    EngineRange,
    GoldenIndex,
    Interface,
    Licence,
    Provenance,
    TensorSpec,
    Variant,
    encode_config,
)
from wherry_shared.digest import of_bytes

WEIGHTS, GOLDEN, MANIFEST = b"weights" * 1000, b"golden" * 10, b"manifest"
ASSETS, TAR = assets_of({"labels.txt": b"cat\ndog\n"})
TENSOR = TensorSpec(name="x", datatype="FP32", shape=[4])
CONFIG = encode_config(
    Config(
        format=1,
        model=MODEL,
        version="1.0.0",
        interface=Interface(inputs=[TENSOR], outputs=[TENSOR]),
        variants=[
            Variant(
                id="float",
                digest=of_bytes(WEIGHTS),
                bytes=len(WEIGHTS),
                format="onnx",
                precision="float32",
                engines=[EngineRange(name="onnxruntime", minimum="1.20")],
                golden=GoldenIndex(digest=of_bytes(GOLDEN), bytes=len(GOLDEN), vectors=1),
            )
        ],
        licence=Licence(expression="MIT", source="here", attribution="us"),
        provenance=Provenance(source_digests={}),
        assets=ASSETS,
    )
)


class Kept:
    """A store with all files of a version."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = Store(home, Disk())
        for data in (WEIGHTS, GOLDEN, MANIFEST, CONFIG, TAR):
            self.store.add(of_bytes(data), data)
        self.store.unpack(ASSETS.digest, ASSETS.files)
        self.version = Loadable(
            model=MODEL,
            target=f"{MODEL}/1.0.0",
            manifest=of_bytes(MANIFEST),
            variant="float",
            digest=of_bytes(WEIGHTS),
            engine="onnxruntime",
            engine_version="1.32.0",
            format="onnx",
            path=str(self.store.path_of(of_bytes(WEIGHTS))),
            golden_path=str(self.store.path_of(of_bytes(GOLDEN))),
            config_path=str(self.store.path_of(of_bytes(CONFIG))),
            assets_path=str(self.store.assets_of(ASSETS.digest)),
            interface=Interface(inputs=[TENSOR], outputs=[TENSOR]),
        )

    def scrub(self, **more) -> list[str]:
        task = Scrub(home=str(self.home), versions=[self.version])
        return [one.detail for one in courier_scrub.scrub(task, Disk(), **more).altered]


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_what_is_as_it_was_is_left_alone(kept: Kept) -> None:
    assert kept.scrub() == []


@pytest.mark.parametrize(
    "data", [WEIGHTS, GOLDEN, MANIFEST, CONFIG, TAR], ids=["weights", "golden", "manifest", "config", "assets"]
)
def test_an_altered_file_is_set_aside_and_named(kept: Kept, data: bytes) -> None:
    path = kept.store.path_of(of_bytes(data))
    path.write_bytes(data[:-1] + b"?")
    (detail,) = kept.scrub()
    assert of_bytes(data) in detail
    assert "other bytes" in detail
    assert not path.exists()
    assert path.with_name(path.name + ".altered").read_bytes() == data[:-1] + b"?"
    (again,) = kept.scrub()  # until it is brought again
    assert "missing" in again
    kept.store.add(of_bytes(data), data)
    assert kept.scrub() == []
    kept.store.collect(set(kept.version.digests))
    assert not path.with_name(path.name + ".altered").exists()


def test_an_altered_asset_costs_its_folder_which_is_unpacked_again(kept: Kept) -> None:
    folder = Path(kept.version.assets_path)
    (folder / "labels.txt").write_bytes(b"dog\ncat\n")
    (detail,) = kept.scrub()
    assert "labels.txt" in detail
    assert not folder.exists()
    kept.store.unpack(ASSETS.digest, ASSETS.files)
    assert kept.scrub() == []


@pytest.mark.parametrize("what", ["manifest", "asset", "archive"])
def test_the_doctor_reads_all_of_them_as_well_and_sets_nothing_aside(kept: Kept, what: str) -> None:
    state = confirmed("1.0.0")
    installed = state.models[MODEL].incumbent
    assert installed is not None
    slot = replace(state.models[MODEL], incumbent=replace(installed, loadable=kept.version), last_good=None)
    Journal(Disk(), kept.home / "journal.json").write(replace(state, models={MODEL: slot}))

    def look(*, scrub: bool = True) -> doctor.Finding:
        return doctor.QUESTIONS["store"](doctor.Patient(Settings(home=str(kept.home)), scrub=scrub))

    assert look() == doctor.Finding("ok", "5 files read and compared with their digests")
    path = {
        "manifest": kept.store.path_of(of_bytes(MANIFEST)),
        "asset": Path(kept.version.assets_path) / "labels.txt",
        "archive": kept.store.path_of(of_bytes(TAR)),
    }[what]
    path.write_bytes(bytes(len(path.read_bytes())))
    assert look(scrub=False).level == "ok"
    assert look().level == "bad"
    assert path.exists()


def test_files_are_read_no_faster_than_allowed(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_scrub, "SCRUB_BYTES_PER_S", 1000)
    pauses: list[float] = []
    assert kept.scrub(sleep=pauses.append) == []
    assert sum(pauses) > len(WEIGHTS) / 1000 - 2


# --- what the machine makes of it -------------------------------------------------------------------


def found(version: str = "1.0.0") -> s.Altered:
    return s.Altered(MODEL, digest_of(f"{MODEL}/{version}"), "float", "weights have other bytes")


def test_an_altered_version_serves_on_is_reported_and_brought_again() -> None:
    state = confirmed("1.0.0")
    since = state.seq
    state, effects = run(state, found())
    assert [effect for effect in effects if isinstance(effect, s.Mend)] == [
        s.Mend(MODEL, digest_of(f"{MODEL}/1.0.0"), "float")
    ]
    assert not [effect for effect in effects if isinstance(effect, s.Serve | s.RestartWorker)]
    report = state.owed[-1]
    assert (report.state, report.reason, report.running) == ("confirmed", "digest_mismatch", report.manifest)
    state, _ = run(state, s.Mended(MODEL, digest_of(f"{MODEL}/1.0.0"), "float"))
    assert [(one.state, one.reason) for one in state.owed if one.seq > since] == [("confirmed", "")]


def test_a_version_that_cannot_be_brought_again_says_why() -> None:
    state, _ = run(confirmed("1.0.0"), found())
    state, _ = run(state, s.Mended(MODEL, digest_of(f"{MODEL}/1.0.0"), "float", "network", "nobody has it"))
    assert (state.owed[-1].state, state.owed[-1].reason) == ("confirmed", "network")


def test_an_altered_last_good_version_is_brought_again_too() -> None:
    state, effects = run(confirmed("1.1.0", state=confirmed("1.0.0"), serial=2), found("1.0.0"))
    assert [type(effect) for effect in effects if isinstance(effect, s.Mend)] == [s.Mend]
    assert "last good" in state.owed[-1].detail


def test_while_another_version_is_on_its_way_it_is_mended_without_a_word() -> None:
    state, _ = run(confirmed("1.0.0"), offer(2, {MODEL: offered("1.1.0")}), resolved("1.1.0"))
    since = state.seq
    state, effects = run(state, found())
    assert state.seq == since
    assert [effect for effect in effects if isinstance(effect, s.Mend)]


def test_what_is_not_trusted_any_more_is_not_mended() -> None:
    state, effects = run(confirmed("1.0.0"), found("0.9.0"))
    assert effects == []
    assert machine.running(state) == {MODEL: digest_of(f"{MODEL}/1.0.0")}
