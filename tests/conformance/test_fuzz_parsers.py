"""Foreign bytes: every parser refuses cleanly or returns the exact result, whatever comes; how many inputs were tried is printed.

`make test` tries a sample with Hypothesis, `make soak` a hundred thousand of a seeded mutator, and as many again guided by coverage where
atheris installs. Both write `build/bench/fuzz.json` (`fuzz_inputs`, `fuzz_failures`).
"""

from __future__ import annotations

import importlib.util
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzz_kit
from tests.conftest import NOTE
from tests.fuzz_kit import Parser, Tally
from tests.services import lacks

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "bench" / "fuzz.json"
EXAMPLES = 25
"""Of Hypothesis, for each parser."""
MUTATIONS = 100_000
GUIDED = 100_000
GUIDED_S_MAX = 1800
GROWTH_KB_MAX = 300_000
"""Of the process over all mutations, so that what C libraries take counts as well."""


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> list[Parser]:
    return fuzz_kit.parsers(tmp_path_factory.mktemp("fuzz"))


def write(how: str, tally: Tally) -> None:
    """Add what was tried to what other ways tried before."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    try:
        before = json.loads(OUT.read_text())["ways"]
    except (OSError, ValueError, KeyError):
        before = {}
    ways = {**before, how: {"inputs": tally.inputs, "accepted": tally.accepted, "failures": tally.failures}}
    found = {
        "fuzz_inputs": sum(way["inputs"] for way in ways.values()),
        "fuzz_failures": sum(len(way["failures"]) for way in ways.values()),
        "ways": ways,
    }
    OUT.write_text(json.dumps(found, indent=2) + "\n")


def test_the_examples_are_good_and_the_judge_notices_what_is_wrong(parsers: list[Parser]):
    for parser in parsers:
        for seed in parser.seeds:
            parser.parse(seed)

    def careless(data: bytes) -> int:
        return len(json.loads(data))

    tally = Tally()
    tally.judge(Parser("careless", careless, [b"{}"]), b"\xff")
    tally.judge(Parser("fickle", lambda _data: object(), [b"{}"]), b"{}")
    tally.judge(Parser("lossy", bytes, [b"{}"], lambda _found: b"other"), b"{}")
    assert [failure.split(":")[0] for failure in tally.failures] == ["careless", "fickle", "lossy"]


def bad(seeds: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """Good bytes made bad in one place, or nothing but noise."""
    seed, at = st.sampled_from(seeds), st.integers(0, 1 << 20)
    values = st.sampled_from(fuzz_kit.VALUES) | st.integers() | st.text(max_size=30) | st.lists(st.none(), max_size=3)
    return st.one_of(
        st.binary(max_size=200),
        st.builds(fuzz_kit.splice, seed, at, st.integers(0, 12), st.binary(max_size=12)),
        st.builds(fuzz_kit.graft, seed, at, values),
        st.builds(fuzz_kit.nest, seed, at, st.sampled_from((2, 70, 2_000))),
        st.builds(fuzz_kit.prune, seed, at),
    )


def sampled(parser: Parser, tally: Tally) -> None:
    """Let Hypothesis try one parser."""

    @settings(max_examples=EXAMPLES, derandomize=True, database=None)
    @given(bad(tuple(parser.seeds)))
    def run(data: bytes) -> None:
        tally.judge(parser, data)

    run()


def test_a_sample_of_bad_bytes(parsers: list[Parser], record_property: Callable[[str, object], None]):
    tally = Tally()
    for parser in parsers:
        sampled(parser, tally)
    record_property(
        NOTE, f"fuzz_inputs {tally.inputs} ({tally.accepted} accepted), fuzz_failures {len(tally.failures)}"
    )
    write("hypothesis", tally)
    assert tally.failures == []
    assert tally.inputs >= EXAMPLES * len(parsers) // 2
    assert 0 < tally.accepted < tally.inputs


@pytest.mark.soak
def test_many_mutations(parsers: list[Parser], record_property: Callable[[str, object], None]):
    chance, tally = random.Random(20_261_127), Tally()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS):
        parser = parsers[number % len(parsers)]
        tally.judge(parser, fuzz_kit.mutate(chance, parser.seeds))
    record_property(
        NOTE, f"fuzz_inputs {tally.inputs} ({tally.accepted} accepted), fuzz_failures {len(tally.failures)}"
    )
    write("mutations", tally)
    assert tally.failures == []
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert grown_kb < GROWTH_KB_MAX, "one of them takes memory without bound"


@pytest.mark.soak
def test_inputs_guided_by_coverage(tmp_path: Path, record_property: Callable[[str, object], None]):
    if importlib.util.find_spec("atheris") is None:
        lacks("atheris does not install on this Python and machine; `make soak` tried")
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "tests.fuzz_guided",
        str(out),
        f"-runs={GUIDED}",
        "-max_len=20000",
        "-rss_limit_mb=2048",
    ]
    run = subprocess.run(command, cwd=ROOT, timeout=GUIDED_S_MAX, check=False, capture_output=True, text=True)
    assert out.exists(), run.stderr[-2000:]
    found = json.loads(out.read_text())
    tally = Tally(found["inputs"], found["accepted"], found["failures"])
    record_property(
        NOTE, f"fuzz_inputs {tally.inputs} ({tally.accepted} accepted), fuzz_failures {len(tally.failures)}"
    )
    write("atheris", tally)
    assert tally.failures == []
    assert tally.inputs >= GUIDED
