"""Inputs of a few answered requests, kept until the supervisor hears of them: only of models that it named.

Nothing is looked at while it named none, which is the rule. What is taken is copied at once, and bounded in number and
size; of the share that was asked for, what is beyond the bounds is counted.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from wherry_agent.answering.arms import Counter
from wherry_agent.answering.published import Answer, Published
from wherry_agent.children import Sampled
from wherry_agent.serving import tensors
from wherry_shared.engines.session import Array
from wherry_shared.limits import SAMPLE_BYTES_MAX, SAMPLES_PER_WINDOW_MAX
from wherry_shared.wire import Sample, SampleTensor


@dataclass(eq=False)
class _Taken:
    samples: list[Sample] = field(default_factory=list)
    left_out: int = 0


class Samples:
    """What was taken since the supervisor heard of it last."""

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self.shares: Mapping[str, float] = {}
        """Model → share of its requests; empty: none is looked at."""
        self._chance = chance
        self._lock = threading.Lock()
        self._taken: dict[Counter, _Taken] = {}

    def want(self, shares: Mapping[str, float]) -> None:
        """Take from these models from now on, and forget what was taken of others."""
        with self._lock:
            self.shares = dict(shares)
            self._taken = {one: taken for one, taken in self._taken.items() if one.loadable.model in shares}

    def look(self, published: Published, answer: Answer, inputs: Mapping[str, Array]) -> None:
        """Take the inputs of an answered request, if it falls into the share and within the bounds."""
        model = answer.loaded.loadable.model
        share = self.shares.get(model, 0.0)
        if not share or self._chance() >= share:
            return
        counter = published.counter if answer.loaded is published.active else published.incumbent_counter
        if counter is None:
            return
        with self._lock:
            if model not in self.shares:
                return
            taken = self._taken.setdefault(counter, _Taken())
            if len(taken.samples) < SAMPLES_PER_WINDOW_MAX and (sample := _sample(answer, inputs)) is not None:
                taken.samples.append(sample)
            else:
                taken.left_out += 1

    def drain(self) -> list[Sampled]:
        """Return what was taken, and forget it."""
        with self._lock:
            taken, self._taken = self._taken, {}
        return [
            Sampled(
                model=counter.loadable.model,
                digest=counter.loadable.digest,
                arm=counter.arm,
                trial=counter.trial,
                samples=one.samples,
                left_out=one.left_out,
            )
            for counter, one in taken.items()
        ]


def _sample(answer: Answer, inputs: Mapping[str, Array]) -> Sample | None:
    """Copy the inputs of a request; None if they are more than a sample may hold."""
    if sum(array.nbytes for array in inputs.values()) > SAMPLE_BYTES_MAX:
        return None
    datatypes = {spec.name: spec.datatype for spec in answer.loaded.loadable.interface.inputs}
    copied = [
        SampleTensor(
            name=name, datatype=datatypes.get(name, ""), shape=list(array.shape), data=bytes(tensors.to_bytes(array))
        )
        for name, array in inputs.items()
    ]
    return Sample(inputs=copied) if sum(len(one.data) for one in copied) <= SAMPLE_BYTES_MAX else None
