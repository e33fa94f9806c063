"""A candidate beside the incumbent: it runs on a share of the requests after they were answered, and is compared.

A shadow is a guest on the device. The caller's thread does no more than copy arrays into a short queue; when the queue is
full, callers wait for a core, or the CPU budget is used up, the run is skipped and counted. One thread takes from the
queue, one run at a time over all models, outside the run gate; the engine itself runs in a helper of low priority that
can be left behind. A run that overran because the device had no time for it says nothing about the candidate: only what
it used of a core counts.

Where the model has state, the candidate keeps its own, per sequence, step by step: a step that was skipped ends what it
can say about that sequence, unless the two versions share their `state_id` and it may go on from the incumbent's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from wherry_agent.answering.arms import Counter, Loaded
from wherry_agent.answering.budget import CpuBudget
from wherry_agent.answering.comparison import compare
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers, Overrun
from wherry_agent.answering.sequences import State, same_state, state_of, with_state
from wherry_agent.children import Loadable
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import Array, Interrupt

log = logging.getLogger(__name__)

SHADOW_NICE = 10
"""As low as the canary's. Lower would be unkind to callers: a thread that gets no core may hold the interpreter's lock."""
SHADOW_QUEUE_MAX = 8
SHADOW_QUEUE_BYTES_MAX = 16 * 1024 * 1024
"""Beyond this only a single case is taken, as large as a request may be."""
SHADOW_PATIENCE_SECONDS = 1.0
"""How long a run waits for a moment in which no caller waits for a core."""
SHADOW_POLL_SECONDS = 0.002
SHADOW_STATES_MAX = 64
"""Sequences of which a shadow keeps the state."""
SHADOW_STATE_BYTES_MAX = 16 * 1024 * 1024
STARVED_BELOW = 0.5
"""A run that overran its deadline and got less than this share of it on a core was starved, not slow."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The clocks that a shadow looks at."""

    now_s: Callable[[], float] = time.monotonic
    thread_cpu_ns: Callable[[], int] = time.thread_time_ns


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One request that the incumbent answered."""

    incumbent: Loadable
    inputs: Mapping[str, Array]
    outputs: Sequence[str] | None
    answer: Mapping[str, Array]
    sequence_id: str = ""
    step: int = 0
    """Of its sequence, from 1 on."""
    last: bool = False
    """Whether the sequence ends with it."""

    @property
    def bytes(self) -> int:
        """Return the size of its arrays."""
        return sum(value.nbytes for values in (self.inputs, self.answer) for value in values.values())

    def copied(self) -> Case:
        """Return the case with arrays of its own."""
        return Case(
            self.incumbent,
            {name: value.copy() for name, value in self.inputs.items()},
            self.outputs,
            {name: value.copy() for name, value in self.answer.items()},
            self.sequence_id,
            self.step,
            self.last,
        )


class ShadowRunner:
    """The thread that runs shadows, of all models of this process; it is made with the first case."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.helpers = Helpers(1, nice=SHADOW_NICE)
        self._changed = threading.Condition()
        self._queue: deque[tuple[Shadow, Case, RunGate, float]] = deque()
        self._bytes = 0
        self._busy = False
        self._stopped = False
        self._thread: threading.Thread | None = None

    def room_for(self, case: Case) -> bool:
        """Tell whether the queue would take the case now."""
        if not self._queue:
            return True
        return len(self._queue) < SHADOW_QUEUE_MAX and self._bytes + case.bytes <= SHADOW_QUEUE_BYTES_MAX

    def take(self, shadow: Shadow, case: Case, gate: RunGate) -> bool:
        """Put a case into the queue, never waiting; false if there is no room."""
        with self._changed:
            if self._stopped or not self.room_for(case):
                return False
            self._queue.append((shadow, case, gate, self.clock.now_s()))
            self._bytes += case.bytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def forget(self, shadow: Shadow) -> None:
        """Drop the cases of a shadow that ended."""
        with self._changed:
            self._queue = deque(item for item in self._queue if item[0] is not shadow)
            self._bytes = sum(case.bytes for _, case, _, _ in self._queue)

    def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; tell whether that came to be."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout_s)

    def close(self) -> None:
        """End after the run that is under way."""
        with self._changed:
            self._stopped = True
            self._queue.clear()
            self._changed.notify_all()
        self.helpers.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                shadow, case, gate, since_s = self._queue.popleft()
                self._bytes -= case.bytes
                self._busy = True
            try:
                if self._calm(gate, since_s):
                    shadow.run(case)
                else:
                    shadow.skip()
            except Exception:  # a border: what a comparison stumbles over must not end all others
                log.exception("shadow of %s", shadow.loaded.loadable.target)
                shadow.skip()
            # hold nothing while idle: it may be the last reference to a model
            del shadow, case, gate

    def _calm(self, gate: RunGate, since_s: float) -> bool:
        while gate.waiting:
            if self.clock.now_s() - since_s > SHADOW_PATIENCE_SECONDS:
                return False
            time.sleep(SHADOW_POLL_SECONDS)
        return True


@dataclass(eq=False)
class _Meter:
    """What one run used, read by who waits for it and by who does not any more."""

    clock_id: int = 0
    began_ns: int = 0

    def used_s(self) -> float:
        """Return the CPU seconds of a run that is still under way."""
        try:
            return (time.clock_gettime_ns(self.clock_id) - self.began_ns) / 1e9 if self.clock_id else 0.0
        except OSError:  # its thread ended in this moment
            return 0.0


@dataclass(eq=False)
class Shadow:
    """A candidate that runs beside an incumbent."""

    loaded: Loaded
    counter: Counter
    runner: ShadowRunner
    cpu_share_max: float
    deadline_s: float
    on_error: Callable[[], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: bool = False
    _states: OrderedDict[str, tuple[int, State]] = field(default_factory=OrderedDict)
    """Sequence → (steps done, state after them); of the runner's thread alone."""

    def __post_init__(self) -> None:
        self._budget = CpuBudget(self.cpu_share_max, self.runner.clock.now_s())
        threads = self.loaded.loadable.options.get("threads", 1)
        self._threads = threads if isinstance(threads, int) else 1

    def retune(self, cpu_share_max: float, deadline_s: float) -> None:
        """Go on under other terms: debts, states and counts stay."""
        with self._lock:
            self.cpu_share_max, self.deadline_s = cpu_share_max, deadline_s
            self._budget.retune(cpu_share_max, self.runner.clock.now_s())

    def end(self) -> None:
        """Run no more."""
        self._ended = True
        self.runner.forget(self)

    def beside(self, case: Case, gate: RunGate, *, unshared: bool) -> None:
        """Run on a case soon, or skip it; called by the thread of a caller whose answer is ready."""
        if self._ended or not self._allowed() or not self.runner.room_for(case):
            self.skip()
            return
        if not self.runner.take(self, case if unshared else case.copied(), gate):
            self.skip()

    def skip(self) -> None:
        """Count a case that was not run."""
        self.counter.skipped()

    def run(self, case: Case) -> None:
        """Run on a case and compare; called by the runner's thread."""
        fed = None if self._ended or not self._allowed() or self.runner.helpers.stuck else self._fed(case)
        if fed is None:
            self.skip()
            return
        outputs = with_state(self.loaded.loadable, case.outputs) if case.sequence_id else case.outputs
        meter, interrupt = _Meter(), Interrupt()
        try:
            bucket, engine_ns, results = self.runner.helpers.run(
                lambda: self._measured(fed, outputs, meter, interrupt), self.deadline_s, interrupt.interrupt
            )
        except BadInput:  # no evidence: the incumbent's interface is wider
            self.skip()
        except Overrun as overrun:
            if meter.used_s() < STARVED_BELOW * self.deadline_s:
                self.skip()
            else:
                self._failed(f"{overrun} [deadline]")
        except EngineFault as fault:
            self._failed(str(fault))
        else:
            self.counter.answered(self.loaded, bucket, engine_ns, 0, results)
            self._compare(case, results)

    # -- inside ----------------------------------------------------------------------------------

    def _allowed(self) -> bool:
        with self._lock:
            return self._budget.allows(self.runner.clock.now_s())

    def _pay(self, cpu_s: float) -> None:
        with self._lock:
            self._budget.pay(cpu_s, self.runner.clock.now_s())

    def _failed(self, what: str) -> None:
        self.counter.failed(what, fallback=False)
        self.on_error()

    def _fed(self, case: Case) -> dict[str, Array] | None:
        """Return what to run on; None if the state that belongs to this step is not there."""
        inputs = dict(case.inputs)
        if not case.sequence_id or not self.loaded.loadable.interface.state:
            return inputs
        steps, state = self._states.pop(case.sequence_id, (0, {}))
        if case.step > 1:
            if steps == case.step - 1:
                inputs.update(state)
            elif not same_state(case.incumbent, self.loaded.loadable):
                return None
        return inputs

    def _measured(
        self, inputs: dict[str, Array], outputs: Sequence[str] | None, meter: _Meter, interrupt: Interrupt
    ) -> tuple[int, int, dict[str, Array]]:
        """Run in a helper: whether anybody still waits or not, what was used is paid."""
        clock = self.runner.clock
        meter.clock_id = time.pthread_getcpuclockid(threading.get_ident())
        meter.began_ns = time.clock_gettime_ns(meter.clock_id)
        wall, cpu = clock.now_s(), clock.thread_cpu_ns()
        engine_ns = 0
        slot = self.loaded.page.begin(self.loaded.mark)
        try:
            bound = self.loaded.bound
            bucket = bound.check(inputs)
            results: dict[str, Array] = {}
            bound.run_into(results, inputs, outputs, interrupt)
        finally:
            self.loaded.page.end(slot)
            engine_ns = clock.thread_cpu_ns() - cpu
            if self._threads > 1:  # what the engine's own threads used is not ours to see: no more than all the time
                engine_ns = round((clock.now_s() - wall) * 1e9)
            self._pay(engine_ns * self._threads / 1e9)
        return bucket, engine_ns, results

    def _compare(self, case: Case, results: dict[str, Array]) -> None:
        began_ns = self.runner.clock.thread_cpu_ns()
        if case.sequence_id and not case.last and self.loaded.loadable.interface.state:
            self._states[case.sequence_id] = (case.step, state_of(self.loaded.loadable, results, None))
            self._forget_states()
        found = compare(case.incumbent.interface, case.answer, results)
        self.counter.compared(agreed=found.agreed, distance=found.distance)
        self._pay((self.runner.clock.thread_cpu_ns() - began_ns) / 1e9)

    def _forget_states(self) -> None:
        while len(self._states) > 1 and (
            len(self._states) > SHADOW_STATES_MAX
            or sum(value.nbytes for _, state in self._states.values() for value in state.values())
            > SHADOW_STATE_BYTES_MAX
        ):
            self._states.popitem(last=False)
