"""Who answers a request while a candidate is on trial: a stable share of requests, by the hash that picks devices too.

A request's unit is its sequence id, else its own id, else a number of this process that no other request has
(contracts.md §8). One unit is always on the same side of one share, and the units of 5 % are among those of 25 %.
"""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass

from wherry_agent.answering.ask import Ask
from wherry_agent.children import ServeModel
from wherry_shared.ids import in_share
from wherry_shared.wire import Mode

_process = secrets.token_hex(8)
_numbers = itertools.count()


def unit_of(ask: Ask) -> str:
    """Return what the request is told apart by."""
    return ask.sequence_id or ask.request_id or f"{_process}/{next(_numbers)}"


@dataclass(frozen=True, slots=True)
class Route:
    """How a trial divides requests; as `children.ServeModel` says."""

    mode: Mode = "replace"
    share: float = 1.0
    salt: str = ""

    @property
    def leans_on_incumbent(self) -> bool:
        """Whether there are requests that only the incumbent may answer: without it this route cannot be served."""
        return self.mode == "shadow" or (self.mode != "replace" and self.share < 1)

    def picks(self, ask: Ask) -> bool:
        """Tell whether the candidate runs on this request: answers it, or (shadow) runs beside."""
        return self.mode == "replace" or self.share >= 1 or in_share(self.salt, unit_of(ask), self.share)


WHOLE = Route()
"""The candidate answers everything."""


def route_of(model: ServeModel) -> Route:
    """Return how a desired state wants requests divided; outside a trial the active version answers all of them."""
    return Route(model.mode, model.share, model.salt) if model.trial else WHOLE
