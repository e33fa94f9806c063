"""One release on top of a good one, nothing around it goes wrong: what each way of being a model must come to."""

from __future__ import annotations

from wherry_shared import reasons
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, Release, Scenario

OLD, NEW = frozenset({"1.0.0"}), frozenset({"1.1.0"})


def _row(name: str, behaviour: Behaviour, ends_on: frozenset[str], requests_per_s: float = 2.0) -> Scenario:
    releases = (Release("1.0.0"), Release("1.1.0", behaviour, at_ms=HOUR_MS))
    return Scenario(name, releases, ends_on=ends_on, devices=6, requests_per_s=requests_per_s, settle_ms=HOUR_MS)


def _one(**how: object) -> Behaviour:
    return Behaviour(variants=[VariantBehaviour(**how)])  # type: ignore[arg-type]


TABLE = (
    _row("a good candidate is confirmed by its requests", Behaviour(), NEW),
    _row("a candidate that nobody asks is confirmed idle, by its golden vectors", Behaviour(), NEW, 0.0),
    _row("a candidate that misses its golden vectors never serves", _one(canary=reasons.GOLDEN_MISS), OLD),
    _row("a candidate that takes the canary down never serves", _one(canary=reasons.CRASH), OLD),
    _row("a candidate that needs too much memory never serves", _one(canary=reasons.OVER_MEMORY), OLD),
    _row("a candidate that the worker cannot load leaves the old one", _one(load=reasons.LOAD_FAILED), OLD),
    _row("a candidate that fails four requests in five goes back", _one(error_rate=0.8), OLD),
    _row("a candidate that is five times slower goes back or is stopped by its canary", _one(latency_us=10_000.0), OLD),
    _row("a candidate that is twice and a half slower goes back", _one(latency_us=5_400.0), OLD, 20.0),
    _row(
        "a candidate that is slow on every third request goes back", _one(tail_share=0.33, tail_us=80_000.0), OLD, 20.0
    ),
    _row("a candidate that crashes under traffic goes back", _one(crash_per_request=0.3), OLD),
    _row("an idle candidate that fails its golden vectors in place goes back", _one(golden=False), OLD, 0.0),
    _row(
        "the second variant serves where the first misses its golden vectors",
        Behaviour(variants=[VariantBehaviour(id="int8", canary=reasons.GOLDEN_MISS), VariantBehaviour(id="float")]),
        NEW,
    ),
    _row("a bundle without a fitting variant is refused", Behaviour(resolve=reasons.NO_VARIANT), OLD),
    _row("a bundle that breaks the contract is refused", Behaviour(resolve=reasons.CONTRACT_BROKEN), OLD),
    Scenario(
        "a bundle that failed is tried again only under a new attempt",
        (
            Release("1.0.0"),
            Release("1.1.0", _one(canary=reasons.GOLDEN_MISS), at_ms=HOUR_MS),
            Release("1.1.0", _one(canary=reasons.GOLDEN_MISS), at_ms=2 * HOUR_MS, attempt=2),
        ),
        ends_on=OLD,
        devices=6,
    ),
    Scenario(
        "two models on one device are tried one after the other",
        (
            Release("1.0.0"),
            Release("1.0.0", model="pitch"),
            Release("1.1.0", at_ms=HOUR_MS),
            Release("1.1.0", _one(error_rate=0.3), model="pitch", at_ms=HOUR_MS),
        ),
        ends_on=NEW,
        devices=6,
    ),
    Scenario(
        "a first version that fails its golden vectors leaves a device without any, and says so",
        (Release("1.0.0", _one(canary=reasons.GOLDEN_MISS)),),
        ends_on=frozenset({""}),
        devices=6,
    ),
)
