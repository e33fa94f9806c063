"""A network that loses, delays, repeats and reorders, all from one seed.

It carries nothing: it only answers *when, and how often,* a message sent now arrives. Reordering needs no rule of its
own, because delays differ; what arrives "late" may arrive after a reboot of the receiver, which is what an agent has to
bear with MQTT QoS 1 and a broker that keeps messages.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad the network is; probabilities per message, delays in milliseconds."""

    lost: float = 0.0
    repeated: float = 0.0
    late: float = 0.0
    """Share of messages that take up to `late_ms` instead of up to `delay_ms`."""
    delay_ms: int = 200
    late_ms: int = 120_000


CALM = Weather()
ROUGH = Weather(lost=0.2, repeated=0.15, late=0.1)
STORM = Weather(lost=0.45, repeated=0.3, late=0.3, late_ms=600_000)


class Network:
    """Draws arrivals. `weather` may be changed while messages are on their way; those keep their fate."""

    __slots__ = ("_random", "lost", "repeated", "sent", "weather")

    def __init__(self, source: random.Random, weather: Weather = CALM) -> None:
        self._random = source
        self.weather = weather
        self.sent = 0
        self.lost = 0
        self.repeated = 0

    def arrivals(self) -> tuple[int, ...]:
        """Return the delays (ms) after which one message arrives: none if it is lost, several if it is repeated."""
        weather = self.weather
        draw = self._random.random
        self.sent += 1
        if draw() < weather.lost:
            self.lost += 1
            return ()
        if draw() < weather.repeated:
            self.repeated += 1
            return (self._delay(), self._delay())
        return (self._delay(),)

    def _delay(self) -> int:
        weather = self.weather
        longest = weather.late_ms if self._random.random() < weather.late else weather.delay_ms
        return 1 + int(self._random.random() * longest)
