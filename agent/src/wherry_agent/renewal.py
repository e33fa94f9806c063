"""When the device's certificate is renewed: after two thirds of its life, and later and later while that fails.

Knows the validity only from what the courier noted in `device.json`, so the supervisor holds no cryptography. Wall time
decides, and it is looked at again now and then, because clocks of devices jump.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from wherry_agent.children import CourierAnswer, Failed, Renewed
from wherry_shared.clock import MICROSECONDS

log = logging.getLogger(__name__)

RENEW_AT_SHARE = 2 / 3
"""Of a certificate's life: the last third is for troubles."""
LOOK_EVERY_S = 3600.0
LOOK_FIRST_S = 60.0
"""After a start, where `device.json` does not say how long the certificate is valid: the courier is asked."""
WAIT_MIN_S = 5.0
"""Between two renewals, and after the first that failed."""
WAIT_MAX_S = 6 * 3600.0
JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Around:
    """What a renewal needs of the supervisor."""

    wall_s: Callable[[], float]
    later: Callable[[float, Callable[[], None]], None]
    courier: Callable[[bool, Callable[[CourierAnswer], None]], None]
    """Start the courier (true: only to look) and call back; when it renewed, the new pair is in use by then."""


def due_s(not_before: int, not_after: int) -> float:
    """Return the wall time at which a certificate is to be renewed."""
    return (not_before + (not_after - not_before) * RENEW_AT_SHARE) / MICROSECONDS


class Renewal:
    """The one plan of an agent; every method is called by its loop."""

    def __init__(self, around: Around, not_before: int, not_after: int) -> None:
        self._around = around
        self._not_before = not_before
        self._not_after = not_after
        self._failed = 0
        self._trouble = ""

    def start(self) -> None:
        """Begin to watch the certificate."""
        self._around.later(LOOK_FIRST_S if not self._not_after else self._wait_s(), self._look)

    def describe(self) -> dict[str, str]:
        """Say how long the certificate is valid, when it is renewed, and why it was not."""
        if not self._not_after:
            return {}
        shown = {
            "until": _time(self._not_after / MICROSECONDS),
            "renewed_from": _time(due_s(self._not_before, self._not_after)),
        }
        return {**shown, "trouble": self._trouble} if self._trouble else shown

    def _wait_s(self) -> float:
        left_s = due_s(self._not_before, self._not_after) - self._around.wall_s()
        jitter = random.random() * JITTER  # noqa: S311 - spreads a fleet that was enrolled at once
        life_s = (self._not_after - self._not_before) / MICROSECONDS
        return min(LOOK_EVERY_S, max(WAIT_MIN_S, left_s + life_s * (1 - RENEW_AT_SHARE) * jitter))

    def _look(self) -> None:
        if not self._not_after:
            self._around.courier(True, self._looked)
        elif self._around.wall_s() < due_s(self._not_before, self._not_after):
            self._around.later(self._wait_s(), self._look)
        else:
            self._around.courier(False, self._answered)

    def _looked(self, answer: CourierAnswer) -> None:
        if isinstance(answer, Renewed):
            self._not_before, self._not_after = answer.not_before, answer.not_after
            self._around.later(self._wait_s(), self._look)
        else:
            self._again(_detail(answer))

    def _answered(self, answer: CourierAnswer) -> None:
        if not isinstance(answer, Renewed):
            self._again(_detail(answer))
            return
        self._not_before, self._not_after = answer.not_before, answer.not_after
        log.info("the certificate is renewed, good until %s", _time(answer.not_after / MICROSECONDS))
        if self._around.wall_s() >= due_s(answer.not_before, answer.not_after):
            self._again("the new certificate is as good as over: the clocks of device and server differ")
            return
        self._failed, self._trouble = 0, ""
        self._around.later(self._wait_s(), self._look)

    def _again(self, trouble: str) -> None:
        """Try later, each time twice as late and spread over a fleet."""
        wait_s = min(WAIT_MAX_S, WAIT_MIN_S * 2**self._failed) * (0.5 + random.random())  # noqa: S311 - jitter
        self._failed = min(self._failed + 1, 32)
        self._trouble = trouble
        log.warning("the certificate is not renewed: %s; trying again in %.0f s", trouble, wait_s)
        self._around.later(wait_s, self._look)


def _detail(answer: CourierAnswer) -> str:
    return answer.detail if isinstance(answer, Failed) else f"the courier answered {type(answer).__name__}"


def _time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "a time beyond the calendar"
