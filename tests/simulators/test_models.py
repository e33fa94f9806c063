from __future__ import annotations

import random

import pytest

from wherry_shared import reasons
from wherry_shared.errors import RefusedError
from wherry_simulators import models
from wherry_simulators.models import Behaviour, Behaviours, VariantBehaviour


def test_a_behaviour_is_found_by_manifest_then_by_target_then_by_default():
    by_manifest, by_target = Behaviour(bytes=1), Behaviour(bytes=2)
    table = Behaviours({models.digest_of("a"): by_manifest, "m/2.0.0": by_target})
    assert table.find(models.digest_of("a"), "m/2.0.0") is by_manifest
    assert table.find(models.digest_of("b"), "m/2.0.0") is by_target
    assert table.find(models.digest_of("b"), "m/3.0.0") is table.default


def test_affected_picks_about_that_share_of_devices_and_always_the_same_ones():
    bad = Behaviour(affected=0.3, variants=[VariantBehaviour(canary=reasons.GOLDEN_MISS)])
    table = Behaviours({models.digest_of("a"): bad})
    hit = [d for d in range(2000) if table.on(f"device-{d}", models.digest_of("a")).variants[0].canary]
    assert abs(len(hit) / 2000 - 0.3) < 0.04
    assert hit == [d for d in range(2000) if table.on(f"device-{d}", models.digest_of("a")).variants[0].canary]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not a table"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1, "models": {"m/1.0.0": {"resolve": "tired"}}}', "no reason code"),
        ('{"format": 1, "models": {"m/1.0.0": {"variants": [{"error_rate": 2}]}}}', "outside 0 to 1"),
        ('{"format": 1, "models": {"m/1.0.0": {"speed": 3}}}', "unknown field `speed`"),
        ('{"format": 1, "default": {"variants": []}}', "needs a variant"),
    ],
)
def test_a_bad_table_is_refused_and_says_where(tmp_path, text, word):
    path = tmp_path / "behaviours.json"
    path.write_text(text)
    with pytest.raises(RefusedError, match=word) as caught:
        models.read(path)
    assert caught.value.code == "behaviours_invalid"


def test_a_missing_table_is_refused_by_name(tmp_path):
    with pytest.raises(RefusedError) as caught:
        models.read(tmp_path / "none.json")
    assert caught.value.code == "behaviours_unreadable"


def test_a_table_is_read_as_written(tmp_path):
    path = tmp_path / "behaviours.json"
    path.write_text('{"format": 1, "models": {"m/1.2.0": {"variants": [{"id": "int8", "error_rate": 0.25}]}}}')
    assert models.read(path).find("sha256:x", "m/1.2.0").variants == [VariantBehaviour(id="int8", error_rate=0.25)]


def test_traffic_has_the_errors_and_the_tail_that_the_table_names():
    source = random.Random(5)
    behaviour = VariantBehaviour(error_rate=0.1, tail_share=0.2, tail_us=90_000.0, latency_us=1_000.0)
    drawn = [models.traffic(source, behaviour, 20) for _ in range(500)]
    answers = [(value, times) for one in drawn for _, value, times in one.latencies]
    assert abs(sum(one.errors for one in drawn) / 10_000 - 0.1) < 0.02
    assert sum(times for _, times in answers) == sum(one.requests - one.errors for one in drawn)
    slow = sum(times for value, times in answers if value > 30_000)
    assert abs(slow / sum(times for _, times in answers) - 0.2) < 0.05


def test_a_crash_ends_the_stretch_early():
    drawn = models.traffic(random.Random(6), VariantBehaviour(crash_per_request=1.0), 50)
    assert drawn.crashed
    assert drawn.requests < 50


def test_candidates_come_in_the_order_of_the_table_with_digests_of_their_own():
    behaviour = Behaviour(variants=[VariantBehaviour(id="int8"), VariantBehaviour(id="float")])
    found = models.candidates(behaviour, "m", "m/1.0.0", models.digest_of("a"))
    assert [candidate.loadable.variant for candidate in found] == ["int8", "float"]
    assert len({candidate.loadable.digest for candidate in found}) == 2
