"""What a model is right now: one immutable value behind one reference. Answering reads the reference once.

A request is answered by the active variant. While that is a candidate on trial and the incumbent is in memory, the
caller is safe: where the candidate raises, overruns its deadline, or gives NaN or Inf that the interface forbids, the
incumbent answers (contracts.md §4). `BadInput` is the caller's fault and counted nowhere. How a trial divides requests
is the `route`'s business; what belongs to a sequence stays with the version that began it (`sequences`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from wherry_agent.answering.arms import Counter, Loaded
from wherry_agent.answering.ask import PLAIN, Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers, Overrun
from wherry_agent.answering.route import WHOLE, Route, route_of
from wherry_agent.answering.sequences import Ongoing, Sequences, with_state
from wherry_agent.answering.shadow import Case, Shadow
from wherry_agent.children import ArmName, Loadable, ServeModel, arm_of
from wherry_shared.engines.canonical import BUCKET_BITS, BUCKET_MASK
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import Array, Interrupt


@dataclass(frozen=True, slots=True)
class Answer:
    """Outputs under canonical names, and who gave them."""

    outputs: dict[str, Array]
    loaded: Loaded
    fallback: bool = False
    generation: int = 0
    """Of the group, where the model is one of several that are swapped together."""


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
    group: str = ""
    shadow: Shadow | None = None
    """Runs `active` beside the incumbent, where the route says so."""
    sequences: Sequences | None = None
    """Of a model with state; shared by all that is published of it."""

    @classmethod
    def of(
        cls,
        model: ServeModel,
        active: Loaded,
        incumbent: Loaded | None,
        counter: Callable[[Loadable, ArmName, str], Counter],
        *,
        on_candidate_error: Callable[[], None],
        generation: int = 0,
        shadow: Shadow | None = None,
        sequences: Sequences | None = None,
    ) -> Published:
        """Return what a desired state makes of loaded versions; `counter` gives the counter of an arm of a trial."""
        return cls(
            active=active,
            counter=counter(active.loadable, arm_of(model), model.trial),
            incumbent=incumbent,
            incumbent_counter=counter(incumbent.loadable, "incumbent", "") if incumbent is not None else None,
            trial=model.trial,
            deadline_s=model.deadline_ms / 1000,
            on_candidate_error=on_candidate_error,
            route=route_of(model),
            generation=generation,
            group=model.group,
            shadow=shadow,
            sequences=sequences,
        )

    @property
    def first(self) -> Loaded:
        """Who answers requests, or most of them where they are divided."""
        return self._target(picked=self.route.mode == "replace" or self.route.share > 1 / 2)

    def loaded(self) -> list[Loaded]:
        """Return what can answer, the active one first."""
        return [self.active, *([self.incumbent] if self.incumbent is not None else [])]

    def settle(self) -> None:
        """Let go of sequences that nobody goes on with; called at once, and then once a second."""
        if self.sequences is not None:
            shadowed = self.shadowed
            self.sequences.settle(
                [self.incumbent] if shadowed and self.incumbent is not None else self.loaded(),
                on_trial=bool(self.trial) and not shadowed,
            )

    @property
    def shadowed(self) -> bool:
        """Whether the active version only runs beside the incumbent."""
        return bool(self.trial) and self.route.mode == "shadow"

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
        if self.sequences is not None and ask.sequence_id:
            return self._in_sequence(self.sequences, gate, helpers, inputs, outputs, ask)
        if not self.trial:
            return Answer(_counted(self.active, self.counter, gate, inputs, outputs), self.active)
        picked = self.route.picks(ask)
        loaded = self._target(picked=picked)
        if loaded is self.active:
            return self._on_trial(gate, helpers, inputs, outputs, inputs)
        answer = Answer(_counted(loaded, self._counter(loaded), gate, inputs, outputs), loaded)
        if picked and self.shadow is not None:
            case = Case(loaded.loadable, inputs, outputs, answer.outputs)
            self.shadow.beside(case, gate, unshared=ask.unshared)
        return answer

    def answer_by(
        self,
        loaded: Loaded,
        gate: RunGate,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        ask: Ask = PLAIN,
    ) -> Answer:
        """Answer by an explicitly named version: no evidence for a trial, so on a trial it is not counted.

        Raises:
            BadInput: the caller's fault.
            EngineFault: the model failed.
        """
        counter = None if self.trial else self.counter
        if self.sequences is None or not ask.sequence_id:
            return Answer(_counted(loaded, counter, gate, inputs, outputs), loaded)
        with self.sequences.step(ask, loaded.version) as ongoing:
            wanted = with_state(loaded.loadable, outputs)
            results = _counted(loaded, counter, gate, ongoing.feed(loaded, inputs), wanted)
            return Answer(ongoing.keep(loaded, counter, results, outputs), loaded)

    # -- inside ----------------------------------------------------------------------------------

    def _target(self, *, picked: bool) -> Loaded:
        """Return who is asked first; `picked`: the request is of the candidate's share."""
        if self.incumbent is None or not self.trial or (picked and self.route.mode != "shadow"):
            return self.active
        return self.incumbent

    def _counter(self, loaded: Loaded) -> Counter | None:
        """Return where answers of `loaded` count; None for one that answers only what it began before."""
        if loaded is self.active:
            return None if self.shadowed else self.counter
        return self.incumbent_counter if loaded is self.incumbent else None

    def _in_sequence(
        self,
        sequences: Sequences,
        gate: RunGate,
        helpers: Helpers,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        ask: Ask,
    ) -> Answer:
        picked = self.route.picks(ask)
        with sequences.step(ask) as ongoing:
            loaded = ongoing.choose(self._target(picked=picked), self.loaded())
            fed = ongoing.feed(loaded, inputs)
            wanted = with_state(loaded.loadable, outputs)
            if self.trial and loaded is self.active and not self.shadowed:
                answer = self._on_trial(gate, helpers, fed, wanted, self._instead(ongoing, inputs))
            else:
                try:
                    results = _counted(loaded, self._counter(loaded) or ongoing.counter, gate, fed, wanted)
                except EngineFault:
                    if self._counter(loaded) is None:
                        ongoing.give_up()
                    raise
                answer = Answer(results, loaded)
            counter = self._counter(answer.loaded) or ongoing.counter
            kept = Answer(ongoing.keep(answer.loaded, counter, answer.outputs, outputs), answer.loaded, answer.fallback)
            if picked and self.shadow is not None and loaded is self.incumbent:
                case = Case(
                    loaded.loadable, fed, outputs, kept.outputs, ask.sequence_id, ongoing.steps, ask.sequence_end
                )
                self.shadow.beside(case, gate, unshared=ask.unshared)
            return kept

    def _instead(self, ongoing: Ongoing, inputs: Mapping[str, Array]) -> Mapping[str, Array] | None:
        """Return what the incumbent would go on with; None if it does not understand the sequence's state."""
        if self.incumbent is None or not ongoing.fits(self.incumbent):
            return None
        return ongoing.feed(self.incumbent, inputs)

    def _on_trial(
        self,
        gate: RunGate,
        helpers: Helpers,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        instead: Mapping[str, Array] | None,
    ) -> Answer:
        """Ask the candidate; `instead`: what the incumbent is asked with if it fails, None if it cannot be asked."""
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
                return self._fall_back(fault, instead, outputs)
        finally:
            gate.leave()
        self.counter.answered(active, bucket, engine_ns, wait_ns, results)
        return Answer(results, active)

    def _fall_back(
        self, fault: EngineFault | Overrun, inputs: Mapping[str, Array] | None, outputs: Sequence[str] | None
    ) -> Answer:
        incumbent, counter = self.incumbent, self.incumbent_counter
        what = str(fault) if isinstance(fault, EngineFault) else f"{fault} [deadline]"
        try:
            if incumbent is None or counter is None or inputs is None:
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
    slot = loaded.page.begin(loaded.mark)
    try:
        started = time.perf_counter_ns()
        loaded.bound.run_into(results, inputs, outputs, interrupt)
        return results, time.perf_counter_ns() - started
    finally:
        loaded.page.end(slot)


def _counted(
    loaded: Loaded, counter: Counter | None, gate: RunGate, inputs: Mapping[str, Array], outputs: Sequence[str] | None
) -> dict[str, Array]:
    results: dict[str, Array] = {}
    page = loaded.page
    wait_ns = gate.enter()
    try:
        slot = page.begin(loaded.mark)
        try:
            took = loaded.short_way(results, inputs, outputs)
        finally:
            page.end(slot)
    except EngineFault as fault:
        if counter is not None:
            counter.failed(str(fault), fallback=False)
        raise
    finally:
        gate.leave()
    if counter is not None:
        counter.answered(loaded, took & BUCKET_MASK, took >> BUCKET_BITS, wait_ns, results)
    return results
