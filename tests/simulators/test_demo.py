"""What the demo says of itself: where its data come from, how long it took, what fails it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.optimizer.models import INT8, workshop
from wherry_optimizer import pipeline
from wherry_shared.image_layout import Layout
from wherry_simulators.demo.bundles import Release, Releases
from wherry_simulators.demo.outcome import TOTAL_S, Outcome, data_lines


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("demo")
    built = pipeline.build(workshop(folder / "in", INT8), folder / "out")
    return Releases(folder, print).read(built.path)


def test_the_report_says_of_each_variant_on_what_data_it_was_judged(release: Release) -> None:
    outcome = Outcome(releases=[release], seconds={"build": 20.0, "end": 1.5})
    report = outcome.as_dict()
    said = {variant["id"]: variant["data"] for variant in report["variants"]}
    assert said == {variant.id: variant.accuracy.data for variant in release.config.variants if variant.accuracy}
    assert all(said.values())
    assert data_lines([release]) == [f"{release.name}: accuracy on {said['float']}"]
    assert report["seconds"] == {"build": 20.0, "end": 1.5, "total": 21.5}


def test_a_slow_machine_is_told_and_fails_nothing() -> None:
    outcome = Outcome(seconds={"build": TOTAL_S})
    outcome.check("all is well", good=True)
    quick = Console(file=io.StringIO(), width=200)
    outcome.show(quick)
    assert "need less than" not in quick.file.getvalue()  # type: ignore[attr-defined]
    outcome.seconds["end"] = 1.0
    slow = Console(file=io.StringIO(), width=200)
    outcome.show(slow)
    assert "121 s in all" in slow.file.getvalue()  # type: ignore[attr-defined]
    assert "need less than 120" in slow.file.getvalue()  # type: ignore[attr-defined]
    assert outcome.good


def test_a_changed_release_keeps_its_vectors_and_is_not_weighed(release: Release, tmp_path: Path) -> None:
    changed = Releases(tmp_path, print).stamp(release, "1.1.0")
    before = {variant.id: variant for variant in release.config.variants}
    Layout(changed.path).verify_all()
    for variant in changed.config.variants:
        assert variant.golden.digest == before[variant.id].golden.digest
        assert variant.digest != before[variant.id].digest
        assert variant.download_bytes == 0
