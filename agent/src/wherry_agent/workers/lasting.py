"""What outlives one publication of a model: its counters, its sequences, and the shadow of a trial.

A desired state that changes only the terms of a trial makes a new `Published`; the counts go on, sequences stay where
they were, and a shadow keeps its debts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from wherry_agent.answering.arms import Counter, Loaded, key_of
from wherry_agent.answering.published import Published
from wherry_agent.answering.registry import Registry
from wherry_agent.answering.sequences import Sequences
from wherry_agent.answering.shadow import Shadow, ShadowRunner
from wherry_agent.children import ArmName, Loadable, ServeModel, arm_of


class Lasting:
    """By model, written by the loader's thread; counters are read by others."""

    def __init__(self, registry: Registry, on_candidate_error: Callable[[], None]) -> None:
        self._registry = registry
        self._on_candidate_error = on_candidate_error
        self._sequences: dict[str, Sequences] = {}
        """Of models with state, as long as they are served."""
        self._shadows: dict[str, Shadow] = {}
        self._runner = ShadowRunner()
        self._counters: dict[tuple[tuple[str, str, str], ArmName, str], Counter] = {}
        self._counters_lock = threading.Lock()

    def published(self, model: ServeModel, active: Loaded, incumbent: Loaded | None, generation: int) -> Published:
        """Return what a desired state makes of loaded versions, with what lasts of the model."""
        return Published.of(
            model,
            active,
            incumbent,
            self._counter,
            on_candidate_error=self._on_candidate_error,
            generation=generation,
            shadow=self._shadow(model, active) if arm_of(model) == "shadow" else None,
            sequences=self._sequences_of(model.name, active, incumbent),
        )

    def counters(self) -> list[Counter]:
        """Return the counters of every arm, those of arms that left the stage included until `settle` drops them."""
        with self._counters_lock:
            return list(self._counters.values())

    def settle(self) -> None:
        """Let go of what nobody needs any more: idle sequences, counters of arms that left and have told everything."""
        models = self._registry.snapshot()
        live = {id(counter) for one in models.values() for counter in (one.counter, one.incumbent_counter)}
        for name, sequences in list(self._sequences.items()):
            published = models.get(name)
            if published is not None:
                published.settle()
            live |= {id(counter) for counter in sequences.counters()}
        with self._counters_lock:
            self._counters = {
                key: counter
                for key, counter in self._counters.items()
                if id(counter) in live or not counter.told_everything()
            }

    def held(self, name: str) -> list[Loaded]:
        """Return the versions that a model's sequences hold on to."""
        sequences = self._sequences.get(name)
        return sequences.loaded() if sequences is not None else []

    def end_shadow(self, name: str) -> None:
        """Let a model's shadow run no more."""
        shadow = self._shadows.pop(name, None)
        if shadow is not None:
            shadow.end()

    def release(self, name: str, wanted: Collection[Loadable]) -> None:
        """Let go of every version of a model, memory being short; states that one of `wanted` understands stay."""
        self.end_shadow(name)
        sequences = self._sequences.get(name)
        if sequences is not None:
            sequences.release(wanted)

    def withdraw(self, name: str) -> None:
        """Forget a model that is not served any more, except what its counters have not told."""
        self._sequences.pop(name, None)
        self.end_shadow(name)

    def close(self) -> None:
        """Run no more shadows."""
        self._runner.close()

    # -- inside ----------------------------------------------------------------------------------

    def _counter(self, loadable: Loadable, arm: ArmName, trial: str) -> Counter:
        with self._counters_lock:
            key = (key_of(loadable), arm, trial)
            counter = self._counters.get(key)
            if counter is None:
                counter = self._counters[key] = Counter(loadable, arm, trial)
            return counter

    def _shadow(self, model: ServeModel, active: Loaded) -> Shadow:
        """Return the shadow of a trial: the one there is, if only its terms changed."""
        counter = self._counter(active.loadable, "shadow", model.trial)
        shadow = self._shadows.get(model.name)
        if shadow is not None and shadow.loaded is active and shadow.counter is counter:
            shadow.retune(model.shadow_cpu_share_max, model.deadline_ms / 1000)
            return shadow
        self.end_shadow(model.name)
        shadow = self._shadows[model.name] = Shadow(
            active,
            counter,
            self._runner,
            model.shadow_cpu_share_max,
            model.deadline_ms / 1000,
            self._on_candidate_error,
        )
        return shadow

    def _sequences_of(self, name: str, active: Loaded, incumbent: Loaded | None) -> Sequences | None:
        """Return the model's sequences, if a version of it has state or had it a moment ago."""
        versions = [active] if incumbent is None else [active, incumbent]
        if name not in self._sequences and any(loaded.loadable.interface.state for loaded in versions):
            self._sequences[name] = Sequences()
        return self._sequences.get(name)
