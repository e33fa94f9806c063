"""Confirmed versions that stop to work: files that rot, workers that die of them, versions that do not load any more."""

from __future__ import annotations

from dataclasses import replace

from wherry_shared import reasons
from wherry_simulators.faults import Faults
from wherry_simulators.models import Behaviour, VariantBehaviour
from wherry_simulators.scenario import HOUR_MS, Release, Scenario

FIRST, SECOND, NOTHING = frozenset({"1.0.0"}), frozenset({"1.1.0"}), frozenset({""})
MINUTE_MS = 60_000
SPOILT_MS = 90 * MINUTE_MS
"""When what was confirmed begins to fail."""
_ALTERED = f"returned {reasons.DIGEST_MISMATCH}"
_UNLOADABLE = Behaviour(variants=[VariantBehaviour(load=reasons.LOAD_FAILED)])
_DEADLY = Behaviour(variants=[VariantBehaviour(dies_ms=4_000)])
_KILLS = tuple(SPOILT_MS + number * MINUTE_MS for number in range(4))
_ONE_PER_BOOT = tuple(SPOILT_MS + number * 12_000 for number in range(1, 9))


def _row(
    name: str,
    ends_on: frozenset[str],
    *releases: Release,
    said: tuple[str, ...] = (),
    unsaid: tuple[str, ...] = (),
    worker_ends: tuple[int, ...] = (SPOILT_MS,),
    rot_at_ms: int = 0,
    power_cuts: tuple[int, ...] = (),
    settle_ms: int = 15 * MINUTE_MS,
) -> Scenario:
    return Scenario(
        name,
        releases,
        ends_on=ends_on,
        said=frozenset(said),
        unsaid=frozenset(unsaid),
        worker_ends=worker_ends,
        rot_at_ms=rot_at_ms,
        power_cuts=power_cuts,
        devices=4,
        settle_ms=settle_ms,
    )


def _good() -> tuple[Release, Release]:
    return Release("1.0.0"), Release("1.1.0", at_ms=HOUR_MS)


def _spoilt(first: Behaviour | None, second: Behaviour) -> tuple[Release, Release]:
    """Return two releases that are confirmed one after the other and turn bad at once."""
    one, two = _good()
    return replace(one, later=first, later_ms=SPOILT_MS), replace(two, later=second, later_ms=SPOILT_MS)


TABLE = (
    _row(
        "a file that rots is found by the scrub and fetched again, and its version serves on",
        SECOND,
        *_good(),
        said=(f"confirmed {reasons.DIGEST_MISMATCH}",),
        unsaid=(_ALTERED,),
        worker_ends=(),
        rot_at_ms=SPOILT_MS,
        settle_ms=HOUR_MS,
    ),
    replace(
        _row(
            "a file that rots is fetched again in the end, however bad the network is",
            SECOND,
            *_good(),
            said=(f"confirmed {reasons.DIGEST_MISMATCH}",),
            unsaid=(_ALTERED,),
            worker_ends=(),
            rot_at_ms=SPOILT_MS,
            settle_ms=2 * HOUR_MS,
        ),
        faults=Faults(from_ms=SPOILT_MS, until_ms=SPOILT_MS + HOUR_MS, fetch_trouble=0.7),
    ),
    _row(
        "a file that rotted and has to be loaded gives way, and comes again",
        SECOND,
        *_good(),
        said=(_ALTERED,),
        unsaid=(f"refused {reasons.KNOWN_BAD}",),
        worker_ends=(SPOILT_MS + 1,),
        rot_at_ms=SPOILT_MS,
        settle_ms=HOUR_MS,
    ),
    _row(
        "a confirmed version that does not load any more gives way to the one before",
        FIRST,
        *_spoilt(None, _UNLOADABLE),
        said=(f"returned {reasons.LOAD_FAILED}",),
        unsaid=(f"safe {reasons.LOAD_FAILED}",),
    ),
    _row(
        "a device on which no version loads any more is safe, and says so",
        NOTHING,
        *_spoilt(_UNLOADABLE, _UNLOADABLE),
        said=(f"returned {reasons.LOAD_FAILED}", f"safe {reasons.LOAD_FAILED}"),
    ),
    _row(
        "a confirmed version of which the worker dies again and again gives way to the one before",
        FIRST,
        *_spoilt(None, _DEADLY),
        said=(f"returned {reasons.CRASH}",),
        unsaid=(f"safe {reasons.CRASH}",),
    ),
    _row(
        "a device on which the worker dies of every version is safe, and says so",
        NOTHING,
        *_spoilt(_DEADLY, _DEADLY),
        said=(f"returned {reasons.CRASH}", f"safe {reasons.CRASH}"),
    ),
    _row(
        "a version of which the worker dies once in every boot gives way all the same",
        FIRST,
        *_spoilt(None, _DEADLY),
        said=(f"returned {reasons.CRASH}",),
        power_cuts=_ONE_PER_BOOT,
        settle_ms=15_000,
    ),
    _row(
        "a worker that dies now and then costs no version its place",
        SECOND,
        *_good(),
        unsaid=(f"returned {reasons.CRASH}",),
        worker_ends=tuple(SPOILT_MS + number * 15 * MINUTE_MS for number in range(8)),
    ),
    _row(
        "a version that is offered leads out of the safe state",
        frozenset({"1.2.0"}),
        *_spoilt(_DEADLY, _DEADLY),
        Release("1.2.0", at_ms=2 * HOUR_MS),
        said=(f"safe {reasons.CRASH}",),
    ),
    _row(
        "a version that was killed until nothing served comes back without anybody's help",
        FIRST,
        Release("1.0.0"),
        said=(f"safe {reasons.CRASH}",),
        worker_ends=_KILLS,
        settle_ms=HOUR_MS,
    ),
)
FILES, LOADS, DEATHS, SAFE, HELD = TABLE[:3], TABLE[3:5], TABLE[5:8], TABLE[-2:-1], TABLE[-1:]
