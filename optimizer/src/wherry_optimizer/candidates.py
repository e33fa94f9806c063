"""Which sequences of passes to try, and which of the results to keep. Pure.

`propose` is asked in rounds: it sees what was tried and how it fared and names what to try next, cheap and promising
first, so that a search that ends early has the best of it. `pareto` and `choose` look at measured rows only.

Why these (measured on five networks, see docs/optimizer.md): no single recipe is safe, so every family is tried; static
int8 of Conv, MatMul and Gemm is fast where calibration fits and is given operators back one by one where it does not;
dynamic int8 pays for MatMul only; what is left float is stored as integers that fold while loading; and pruning comes
before quantization, since quantized weights cannot be moved. Weights on a coarser grid cost less to download at the
speed of int8, so that ladder is climbed as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite, log
from typing import Literal, get_args

from wherry_optimizer.attempt import Step
from wherry_shared.bundle import Format

Options = Mapping[str, str | int | float | bool]
Prefer = Literal["balanced", "size", "latency", "memory", "accuracy"]
PREFERENCES: tuple[Prefer, ...] = get_args(Prefer)

SOURCE = "float"
"""Id of the source as it is."""
ROLLBACKS = (1, 2, 4, 8, 16)
"""So many operators are given back to float, one try after another, until the gate lets one pass."""
CHANNELS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
SPARSITIES = (0.3, 0.5, 0.7, 0.8)
STARTED_AT = 0.5
"""A pruning ladder begins with this share, and goes up while the gate lets it pass, else down until it does."""
LEVELS = (63, 31, 15, 11, 7)
"""Steps on either side of zero that weights are rounded to before they become int8; fewer compress better."""
LEVELS_STARTED_AT = 15
ODDS_MIN = 0.01
LITTLE = 0.25
"""Who prefers accuracy gets the best by size and latency of those that lose at most this share of the budget."""
SAFER = 0.75
"""What is confirmed next moves the outputs by at most this share of what the one before did: one that is contradicted tells
against all that are like it."""
FOLD = Step(use="quantize-weights", parameters={"form": "fold"}, optional=True)
"""What is still float after other quantizers: recurrent weights, embedding tables, excluded layers."""

REWRITE = Step(use="rewrite", optional=True)
"""Comes first wherever there is something that an exporter spelled out: all that follows has less to compute."""
REWRITTEN = "rewritten"
WHOLE = "-all"
"""Ends the names of recipes that quantize every operator, the usual default elsewhere."""
SMOOTH = Step(use="smooth")
SMOOTHED = "smooth+int8-dynamic"
PATTERN = Step(use="prune-obs", parameters={"pattern": "2:4"})
PATTERNED = "zeros-2of4"
"""Two zeros in every four weights of a row: no CPU here is faster for it, but it compresses, and hardware that knows it gains."""
RECURRENT = "int8-recurrent"
"""Static int8 with recurrent layers in int8 as well; simplified first, which folds what exporters make their weights from."""


@dataclass(frozen=True, slots=True)
class Target:
    """A class of hardware that a variant is chosen for."""

    name: str
    format: Format
    arch: str
    """`platform.machine()` of such devices."""
    signed: bool
    """int8 activations are at least as fast as uint8 ones: on Arm, and on x86 not."""
    about: str


TARGETS = {
    target.name: target
    for target in (
        Target("x86-vnni", "onnx", "x86_64", signed=False, about="x86-64 with AVX-512 VNNI or AVX-VNNI"),
        Target(
            "x86", "onnx", "x86_64", signed=False, about="x86-64 with AVX2; 8-bit products saturate, so 7-bit weights"
        ),
        Target("arm-dotprod", "onnx", "aarch64", signed=True, about="64-bit Arm with dot product instructions"),
        Target("jetson", "onnx", "aarch64", signed=True, about="NVIDIA Jetson, on its CPU"),
        Target("phone", "onnx", "aarch64", signed=True, about="Arm phones and tablets"),
        Target("tflite", "tflite", "", signed=True, about="TensorFlow Lite runtimes, any CPU"),
    )
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence of passes under a name that says what it does."""

    id: str
    steps: tuple[Step, ...]
    options: Options = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fared:
    """What became of a candidate that was tried."""

    passed: bool
    code: str = ""
    """Of its refusal, where there was no file to judge."""
    by: str = ""
    """What the gate kept it out by."""
    error: float = 0.0
    """How far its outputs moved."""


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate that passed, with its figures; NaN where nobody measured."""

    id: str
    download_bytes: int
    latency_ratio: float
    peak_bytes: float
    value: float
    odds: float = 1.0
    """How probable it is that fresh samples confirm it."""
    error: float = 0.0
    """How far its outputs moved."""
    lost: float = 0.0
    """Share of the budget that its drop takes."""


def propose(
    tried: Mapping[str, Fared],
    format_: Format,
    target: Target,
    *,
    prune: bool = True,
    others: Sequence[str] = (),
) -> list[Candidate]:
    """Return what to try next, best guess first; empty when there is nothing left to try.

    Args:
        tried: what was, and how it fared.
        format_: of the model.
        target: what for.
        prune: also try to prune.
        others: passes of other distributions for this format, each of which is tried as it comes.
    """
    if format_ == "tflite":
        planned = [*_tflite(), *(Candidate(name, (Step(use=name),)) for name in others)]
    else:
        added = [Candidate(name, (Step(use=name), FOLD)) for name in others]
        planned = [_first_rewritten(one) for one in (*_onnx(tried, target, prune=prune), *added)]
    return [candidate for candidate in planned if candidate.id not in tried]


def _first_rewritten(candidate: Candidate) -> Candidate:
    """Put what costs no accuracy first; recipes that quantize whatever there is take the graph as it is."""
    if candidate.id.endswith(WHOLE) or candidate.id == REWRITTEN:
        return candidate
    return replace(candidate, steps=(REWRITE, *candidate.steps))


def _tflite() -> list[Candidate]:
    return [
        Candidate("int8-dynamic", (Step(use="quantize-tflite", parameters={"mode": "dynamic"}),)),
        Candidate("int8-weights", (Step(use="quantize-tflite", parameters={"mode": "weights"}),)),
        Candidate("int8-static", (Step(use="quantize-tflite", parameters={"mode": "static"}),)),
        Candidate("int4-dynamic", (Step(use="quantize-tflite", parameters={"mode": "dynamic4"}),)),
    ]


def _onnx(tried: Mapping[str, Fared], target: Target, *, prune: bool) -> list[Candidate]:
    activations = {"symmetric_activations": True} if target.signed else {}
    range_ = {"reduce_range": True} if target.name == "x86" else {}
    static = Step(use="quantize-static", parameters={**activations, **range_})
    other = Step(use="quantize-static", parameters={} if target.signed else {"symmetric_activations": True})
    dynamic = Step(use="quantize-dynamic", parameters=dict(range_))
    all_static = Step(use="quantize-static", parameters={**static.parameters, "operators": ["*"]})
    all_dynamic = Step(use="quantize-dynamic", parameters={**range_, "operators": ["*"], "per_channel": False})
    recurrent = (Step(use="simplify", optional=True), Step(use="quantize-recurrent"), static, FOLD)
    singles = [
        Candidate("int8-weights", (FOLD,)),
        Candidate("int8-static", (static, FOLD)),
        Candidate("int8-dynamic", (dynamic, FOLD)),
        Candidate(SMOOTHED, (SMOOTH, dynamic, FOLD)),
        Candidate(RECURRENT, recurrent),
        Candidate("half", (Step(use="half"),)),
        Candidate("int8-static-all", (all_static, FOLD)),
        Candidate("int8-dynamic-all", (all_dynamic, FOLD)),
        Candidate("int8-static-other", (other, FOLD)),
        Candidate("int4-weights", (Step(use="quantize-weights", parameters={"form": "fold", "bits": 4}),)),
        Candidate(REWRITTEN, (Step(use="rewrite"),)),
    ]
    if not all(candidate.id in tried for candidate in singles):
        return singles
    more: list[Candidate] = []
    head: tuple[Step, ...] = ()
    """Of the quantizer that passed, what has to come before its weights are rounded."""
    found = (recurrent, RECURRENT) if tried[RECURRENT].passed else _give_back(tried, "int8-static", static, more)
    plain, smoothed = tried["int8-dynamic"], tried[SMOOTHED]
    if smoothed.passed and not (plain.passed and plain.error <= smoothed.error):
        found = found or ((dynamic, FOLD), SMOOTHED)
        head = (SMOOTH,) if found[1] == SMOOTHED else ()
    else:
        other_found = _give_back(tried, "int8-dynamic", dynamic, more)
        found = found or other_found
    tail, name = found or ((FOLD,), "int8-weights")
    if prune and (found or not more):  # what pruning ends in is known: a quantizer passed, or none is left to try
        ladders = len(more)
        whole = (*head, *tail)
        more += _ladder(tried, "channels", CHANNELS, ("prune-channels", "ratio"), (), whole, name)
        more += _ladder(tried, "levels", LEVELS, ("round-obs", "levels"), head, tail, name, start=LEVELS_STARTED_AT)
        shares = [share for share in CHANNELS if _passed(tried, f"channels-{share:g}+{name}")]
        levels = [count for count in LEVELS if _passed(tried, f"levels-{count}+{name}")]
        if shares and levels and len(more) == ladders:  # they have ended
            last = CHANNELS.index(shares[-1])
            # a milder one as well, in case the other is contradicted
            for share in CHANNELS[max(last - 1, 0) : last + 1]:
                more += _both(tried, share, levels, head, tail, name)
        if len(more) < 2:  # seldom the best, so when the others leave room
            zeros = _ladder(tried, "zeros", SPARSITIES, ("prune-obs", "sparsity"), (), whole, name)
            more += zeros or [Candidate(f"{PATTERNED}+{name}", (PATTERN, *whole))]
    return more


def _give_back(
    tried: Mapping[str, Fared], key: str, step: Step, more: list[Candidate]
) -> tuple[tuple[Step, ...], str] | None:
    """Return the steps and name of the quantizer that passed, whole or less some operators; add the next try otherwise."""
    if tried[key].passed:
        return (step, FOLD), key
    if tried[key].code:
        return None
    for count in ROLLBACKS:
        less = f"{key}-less-{count}"
        steps = (Step(use=step.use, parameters={**step.parameters, "rollback": count}), FOLD)
        if less not in tried:
            more.append(Candidate(less, steps))
            return None
        if tried[less].passed:
            return steps, less
        if tried[less].code:
            return None
    return None


def _ladder(
    tried: Mapping[str, Fared],
    word: str,
    shares: Sequence[float],
    use: tuple[str, str],
    head: tuple[Step, ...],
    tail: tuple[Step, ...],
    name: str,
    *,
    start: float = STARTED_AT,
) -> list[Candidate]:
    """Return the next rung of a ladder, mildest first: up from where it starts while it passes, else down until it does.

    Args:
        tried: see `propose`.
        word: names the ladder.
        shares: its rungs.
        use: pass and parameter.
        head: what comes before.
        tail: what comes after, of this `name`.
        name: of the quantizer.
        start: where to begin.
    """
    middle = shares.index(start)
    up, down = shares[middle:], shares[:middle][::-1]
    first = tried.get(f"{word}-{start:g}+{name}")
    if first is not None and first.code:
        return []  # it could not be made at all
    for share in up if first is None or first.passed else down:
        key = f"{word}-{share:g}+{name}"
        if key not in tried:
            step = Step(use=use[0], parameters={use[1]: share})
            return [Candidate(key, (*head, step, *tail))]
        if tried[key].passed != (share in up):
            return []
    return []


def _both(
    tried: Mapping[str, Fared],
    share: float,
    levels: Sequence[int],
    head: tuple[Step, ...],
    tail: tuple[Step, ...],
    name: str,
) -> list[Candidate]:
    """Return the next try of fewer channels on fewer values: the fewest that passed by themselves, more where the two are too much."""
    for count in levels[::-1]:
        key = f"channels-{share:g}+levels-{count}+{name}"
        if key not in tried:
            first = Step(use="prune-channels", parameters={"ratio": share})
            then = Step(use="round-obs", parameters={"levels": count})
            return [Candidate(key, (first, *head, then, *tail))]
        if tried[key].passed or tried[key].code:
            break
    return []


def _passed(tried: Mapping[str, Fared], key: str) -> bool:
    return key in tried and tried[key].passed


def pareto(rows: Sequence[Row]) -> list[str]:
    """Return the ids that no other row beats: nobody is at least as good in everything and better in something."""
    return [row.id for row in rows if not any(_dominates(other, row) for other in rows if other.id != row.id)]


def _dominates(one: Row, other: Row) -> bool:
    pairs = [
        (one.download_bytes, other.download_bytes),
        (one.latency_ratio, other.latency_ratio),
        (one.peak_bytes, other.peak_bytes),
        (-one.value, -other.value),
    ]
    known = [(a, b) for a, b in pairs if isfinite(a) and isfinite(b)]
    return all(a <= b for a, b in known) and any(a < b for a, b in known)


def rank(rows: Sequence[Row], source: Row, prefer: Prefer) -> list[Row]:
    """Return rows best first: by the product of download and latency ratios, weighted by what is preferred, over the odds.

    The best of many is the luckiest of them too, so what a variant is expected to gain is what it gains if it is confirmed,
    times the probability that it is. Equals go by how far their outputs moved. Who prefers accuracy has what loses least first,
    where `LITTLE` of the budget counts as nothing, and then the same.
    """
    weights = {"size": (1.0, 0.0, 0.0), "latency": (0.0, 1.0, 0.0), "memory": (0.0, 0.0, 1.0)}
    size_weight, time_weight, memory_weight = weights.get(prefer, (1.0, 1.0, 0.0))

    def cost(row: Row) -> tuple[float, float, float, float]:
        size = log(row.download_bytes / source.download_bytes) if row.download_bytes else inf
        time = log(row.latency_ratio) if isfinite(row.latency_ratio) and row.latency_ratio > 0 else 0.0
        known = (
            isfinite(row.peak_bytes) and isfinite(source.peak_bytes) and row.peak_bytes > 0 and source.peak_bytes > 0
        )
        memory = log(row.peak_bytes / source.peak_bytes) if known else 0.0
        gained = size_weight * size + time_weight * time + memory_weight * memory - log(max(row.odds, ODDS_MIN))
        lost = 1.0 if row.id == SOURCE else max(row.lost, LITTLE)  # whoever searches wants another than the source
        return (lost if prefer == "accuracy" else 0.0, gained, size + time, row.error)

    return sorted(rows, key=cost)


def shortlist(best: Sequence[Row], others: Sequence[Row], count: int) -> list[Row]:
    """Return what is to be confirmed, one after another until one is: the best, then each time the best that is safer.

    Args:
        best: ranked, what no other beats.
        others: ranked, all that may be taken where the first is contradicted, `best` among them.
        count: at most so many.
    """
    found = list(best[:1])
    for row in others:
        if len(found) < count and row.id != SOURCE and found[-1].id != SOURCE and row.error <= SAFER * found[-1].error:
            found.append(row)
    return found


def reason(row: Row, source: Row, prefer: Prefer, count: int, *, measured: str) -> str:
    """Say why a row was chosen."""
    size = row.download_bytes / source.download_bytes
    speed = f"{row.latency_ratio:.2f} of its latency" if isfinite(row.latency_ratio) else "latency not measured"
    words = {
        "balanced": "size and latency together",
        "accuracy": "size and latency together, of what loses least",
    }.get(prefer, prefer)
    return f"best by {words} of {count} that passed: {size:.2f} of the float download, {speed} ({measured})"
