"""Which download may run now: conditions hold, and with a bounded rate one at a time.

Lives on the supervisor's loop. `conditions.decide` decides; here is read what it decides from, and downloads are let
go, held back, or interrupted when the conditions end under them (what came so far stays, and the next one resumes).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from wherry_agent import conditions, readings
from wherry_agent import state as s
from wherry_agent.children import Failed, Progress
from wherry_agent.conditions import Conditions, Wait
from wherry_shared import reasons

log = logging.getLogger(__name__)


class Downloads:
    """The downloads of one device."""

    def __init__(
        self,
        settings: Conditions,
        *,
        one_at_a_time: bool,
        start: Callable[[s.Fetch], None],
        stop: Callable[[str], None],
        refuse: Callable[[s.Fetch, Failed], None],
        clock_set: Callable[[], bool],
        windows: Callable[[str], Sequence[str]] = lambda _: (),
    ) -> None:
        """Begin with none.

        Args:
            settings: what the device's owner asks for.
            one_at_a_time: whether downloads take turns.
            start: begins one.
            stop: interrupts that of a model.
            refuse: says that one may not run now.
            clock_set: tells whether the time is known.
            windows: of a model, the hours in which the rollout that is under way for it may bring it.
        """
        self._settings = settings
        self._alone = one_at_a_time
        self._start = start
        self._stop = stop
        self._refuse = refuse
        self._clock_set = clock_set
        self._windows = windows
        self._running: dict[str, s.Fetch] = {}
        self._queue: deque[s.Fetch] = deque()
        self._progress: dict[str, Progress] = {}
        self._bytes = 0
        self._metered = readings.Metered(settings) if not settings.allow_metered else None

    @property
    def conditional(self) -> bool:
        """Whether the settings ask for anything."""
        asked = self._settings
        return bool(
            not asked.allow_metered
            or asked.mains
            or asked.battery_percent_min
            or asked.temperature_c_max
            or asked.windows
        )

    def wanted(self, effect: s.Fetch) -> None:
        """Begin a download, or say why not now."""
        wait = self.wait(effect.model)
        if wait is not None:
            self._refuse(effect, _failed(wait))
        elif self._alone and self._running and effect.model not in self._running:
            self._queue.append(effect)
        else:
            self._running[effect.model] = effect
            self._start(effect)

    def ended(self, model: str) -> None:
        """A download came to its end, or is not wanted any more."""
        self._running.pop(model, None)
        self._progress.pop(model, None)
        self._queue = deque(effect for effect in self._queue if effect.model != model)
        while self._queue and not self._running:
            self.wanted(self._queue.popleft())

    def progressed(self, model: str, progress: Progress) -> None:
        """A courier says how far it is."""
        if model in self._running:
            before = self._progress.get(model)
            self._bytes += max(0, progress.done_bytes - (before.done_bytes if before is not None else 0))
            self._progress[model] = progress

    def drain_bytes(self) -> int:
        """Return what came over the wire since the last call."""
        found, self._bytes = self._bytes, 0
        return found

    def describe(self) -> dict[str, object]:
        """Return what is downloaded now, for a person."""
        progress = {model: self._progress.get(model, Progress(done_bytes=0, total_bytes=0)) for model in self._running}
        return {
            "running": {model: [one.done_bytes, one.total_bytes] for model, one in progress.items()},
            "queued": [effect.model for effect in self._queue],
        }

    def check(self) -> Wait | None:
        """Look at the conditions again, and interrupt what may not go on; return why nothing at all may."""
        everybody = self.wait()
        for model, effect in tuple(self._running.items()):
            wait = everybody or self.wait(model)
            if wait is not None:
                log.info("the download for %s is interrupted: %s", model, wait.detail)
                self._stop(model)
                self._refuse(effect, _failed(wait))
                self.ended(model)
        while self._queue and everybody is not None:
            self._refuse(self._queue.popleft(), _failed(everybody))
        return everybody

    def wait(self, model: str = "") -> Wait | None:
        """Return why nothing, or nothing of a model, may be downloaded now, None if it may."""
        windows = self._windows(model) if model else ()
        if not self.conditional and not windows:
            return None
        power = readings.power(self._settings.sys)
        found = conditions.Readings(
            local=readings.local,
            metered=self._metered.known if self._metered is not None else None,
            mains=power.mains,
            battery=power.battery,
            battery_percent=power.percent,
            temperature_c=readings.temperature_c(self._settings.sys),
            clock_set=self._clock_set(),
        )
        now_s = time.time()
        wait = conditions.decide(self._settings, found, now_s, running=bool(self._running))
        try:
            return wait or conditions.hours(windows, found, now_s)
        except ValueError as error:  # of a later release: rather not at all than in the wrong hour
            return Wait(f"the rollout's window cannot be read: {error}", conditions.AGAIN_S)


def _failed(wait: Wait) -> Failed:
    return Failed(reason=reasons.CONDITIONS, detail=wait.detail, retry_after_s=wait.retry_after_s)
