"""Which download may run now: conditions hold, and with a bounded rate one at a time.

Lives on the supervisor's loop. `conditions.decide` decides; here is read what it decides from, and downloads are let
go, held back, or interrupted when the conditions end under them (what came so far stays, and the next one resumes).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

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
    ) -> None:
        self._settings = settings
        self._alone = one_at_a_time
        self._start = start
        self._stop = stop
        self._refuse = refuse
        self._clock_set = clock_set
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
        wait = self.wait()
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
        if self._queue and not self._running:
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
        """Look at the conditions again, and interrupt what may not go on."""
        wait = self.wait()
        if wait is not None:
            for model, effect in tuple(self._running.items()):
                log.info("the download for %s is interrupted: %s", model, wait.detail)
                self._stop(model)
                self._running.pop(model, None)
                self._progress.pop(model, None)
                self._refuse(effect, _failed(wait))
            while self._queue:
                self._refuse(self._queue.popleft(), _failed(wait))
        return wait

    def wait(self) -> Wait | None:
        """Return why nothing may be downloaded now, None if it may."""
        if not self.conditional:
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
        return conditions.decide(self._settings, found, time.time(), running=bool(self._running))


def _failed(wait: Wait) -> Failed:
    return Failed(reason=reasons.CONDITIONS, detail=wait.detail, retry_after_s=wait.retry_after_s)
