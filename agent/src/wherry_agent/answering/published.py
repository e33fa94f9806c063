"""What a model is right now: one immutable value behind one reference. Answering reads the reference once.

A request is answered by the active variant. While that is a candidate on trial and the incumbent is in memory, the
caller is safe: where the candidate raises, overruns its deadline, or gives NaN or Inf that the interface forbids, the
incumbent answers (contracts.md §4). `BadInput` is the caller's fault and counted nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from wherry_agent.answering.arms import Counter, Loaded
from wherry_agent.answering.ask import PLAIN, Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers, Overrun
from wherry_agent.answering.route import WHOLE, Route
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import Array, Interrupt


@dataclass(frozen=True, slots=True)
class Answer:
    """Outputs under canonical names, and who gave them."""

    outputs: dict[str, Array]
    loaded: Loaded
    fallback: bool = False


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class Published:
    """One model in service."""

    active: Loaded
    counter: Counter
    incumbent: Loaded | None = None
    incumbent_counter: Counter | None = None
    trial: str = ""
    deadline_s: float = 10.0
    on_candidate_error: Callable[[], None] = field(default=_nothing)
    route: Route = WHOLE
    generation: int = 0
    """The same for models that were published together, and for no others of any process of this device."""

    def loaded(self) -> list[Loaded]:
        """Return what can answer, the active one first."""
        return [self.active, *([self.incumbent] if self.incumbent is not None else [])]

    def answer(
        self,
        gate: RunGate,
        helpers: Helpers,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        ask: Ask = PLAIN,
    ) -> Answer:
        """Answer one request as the trial routes it.

        Raises:
            BadInput: the caller's fault.
            EngineFault: the model failed and nobody else could answer.
        """
        if not self.trial:
            return Answer(_counted(self.active, self.counter, gate, inputs, outputs), self.active)
        route, incumbent, counter = self.route, self.incumbent, self.incumbent_counter
        if incumbent is not None and counter is not None and (route.mode == "shadow" or not route.picks(ask)):
            return Answer(_counted(incumbent, counter, gate, inputs, outputs), incumbent)
        return self._on_trial(gate, helpers, inputs, outputs)

    def answer_by(
        self,
        loaded: Loaded,
        gate: RunGate,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
    ) -> Answer:
        """Answer by an explicitly named version: no evidence for a trial, so on a trial it is not counted.

        Raises:
            BadInput: the caller's fault.
            EngineFault: the model failed.
        """
        if not self.trial:
            return Answer(_counted(loaded, self.counter, gate, inputs, outputs), loaded)
        with gate:
            return Answer(loaded.bound.run(inputs, outputs), loaded)

    def _on_trial(
        self,
        gate: RunGate,
        helpers: Helpers,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
    ) -> Answer:
        active = self.active
        bucket = active.bound.check(inputs)
        wait_ns = gate.enter()
        # the permit stays with this thread: a candidate that overran must not keep the incumbent from answering
        try:
            try:
                interrupt = Interrupt()
                results, engine_ns = helpers.run(
                    lambda: _timed(active, inputs, outputs, interrupt), self.deadline_s, interrupt.interrupt
                )
            except (EngineFault, Overrun) as fault:
                return self._fall_back(fault, inputs, outputs)
        finally:
            gate.leave()
        self.counter.answered(active, bucket, engine_ns, wait_ns, results)
        return Answer(results, active)

    def _fall_back(
        self, fault: EngineFault | Overrun, inputs: Mapping[str, Array], outputs: Sequence[str] | None
    ) -> Answer:
        incumbent, counter = self.incumbent, self.incumbent_counter
        what = str(fault) if isinstance(fault, EngineFault) else f"{fault} [deadline]"
        try:
            if incumbent is None or counter is None:
                self.counter.failed(what, fallback=False)
                raise _as_fault(fault) from fault
            try:
                bucket = incumbent.bound.check(inputs)
                results, engine_ns = _timed(incumbent, inputs, outputs)
            except BadInput:  # only the candidate's wider interface allows this request: there is no other answer
                self.counter.failed(what, fallback=False)
                raise _as_fault(fault) from fault
            except EngineFault as error:
                self.counter.failed(what, fallback=False)
                counter.failed(str(error), fallback=False)
                raise
            self.counter.failed(what, fallback=True)
            counter.answered(incumbent, bucket, engine_ns, 0, results)
            return Answer(results, incumbent, fallback=True)
        finally:
            self.on_candidate_error()


def _as_fault(fault: EngineFault | Overrun) -> EngineFault:
    return fault if isinstance(fault, EngineFault) else EngineFault("deadline", str(fault))


def _timed(
    loaded: Loaded,
    inputs: Mapping[str, Array],
    outputs: Sequence[str] | None,
    interrupt: Interrupt | None = None,
) -> tuple[dict[str, Array], int]:
    results: dict[str, Array] = {}
    started = time.perf_counter_ns()
    loaded.bound.run_into(results, inputs, outputs, interrupt)
    return results, time.perf_counter_ns() - started


def _counted(
    loaded: Loaded, counter: Counter, gate: RunGate, inputs: Mapping[str, Array], outputs: Sequence[str] | None
) -> dict[str, Array]:
    bucket = loaded.bound.check(inputs)
    try:
        with gate as wait_ns:
            results, engine_ns = _timed(loaded, inputs, outputs)
    except EngineFault as fault:
        counter.failed(str(fault), fallback=False)
        raise
    counter.answered(loaded, bucket, engine_ns, wait_ns, results)
    return results
