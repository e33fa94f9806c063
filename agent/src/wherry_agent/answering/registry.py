"""Which models are in service. Readers take one reference and never a lock; only the loader writes.

What is published together is seen together: who asks several models takes one `snapshot` and asks that.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from wherry_agent.answering.published import Published

COLD_SECONDS_MAX = 60.0
"""How long a request waits while its model is swapped cold (memory for one version only)."""


class Registry:
    """Name → what is published, replaced as a whole."""

    def __init__(self) -> None:
        self._models: dict[str, Published] = {}
        self._cold: dict[str, threading.Event] = {}

    def get(self, name: str) -> Published | None:
        """Return what answers for `name`; None if nothing does. While it is swapped cold, wait for the new one."""
        published = self._models.get(name)
        if published is None:
            cold = self._cold.get(name)
            if cold is not None:
                cold.wait(COLD_SECONDS_MAX)
            published = self._models.get(name)  # the new one may have come between the two looks
        return published

    @property
    def cold(self) -> bool:
        """Whether a model is being swapped cold, so that who asks for it waits."""
        return bool(self._cold)

    def peek(self, name: str) -> Published | None:
        """Return what answers for `name` without waiting."""
        return self._models.get(name)

    def names(self) -> list[str]:
        """Return the names of models in service, in order, those that are being swapped cold included."""
        # a model moves from the first to the second and back: who looks at the first twice misses none
        return sorted({*self._models, *self._cold, *self._models})

    def all(self) -> list[Published]:
        """Return everything in service."""
        return list(self._models.values())

    def snapshot(self) -> Mapping[str, Published]:
        """Return everything in service in this instant; it never changes, and keeps its versions in memory."""
        return self._models

    def publish(self, name: str, published: Published) -> None:
        """Swap the reference: every request that begins from now on sees the new value."""
        self.publish_together({name: published})

    def publish_together(self, models: Mapping[str, Published]) -> None:
        """Swap several references by one write: nobody sees some of them new and some of them old."""
        self._models = {**self._models, **models}
        for name in models:
            cold = self._cold.pop(name, None)
            if cold is not None:
                cold.set()

    def withdraw(self, name: str) -> None:
        """Take a model out of service."""
        self._models = {key: value for key, value in self._models.items() if key != name}
        cold = self._cold.pop(name, None)
        if cold is not None:
            cold.set()

    def go_cold(self, name: str) -> None:
        """Take the old version out while the new one loads: requests wait instead of failing."""
        self._cold[name] = threading.Event()
        self._models = {key: value for key, value in self._models.items() if key != name}
