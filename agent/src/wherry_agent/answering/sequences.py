"""Requests that belong together: the state a model gives back is fed to the next request of the same sequence.

Where an interface declares `state` pairs, a sequence is kept by the version that began it, also while another one takes
over, since a state means nothing to another model; only bundles that declare the same `state_id` hand over in the
middle, and what a candidate began ends when it is taken back. Everything kept has a limit: how many sequences, how many bytes, how long one may be idle, and how long one may
hold on to a version that left service. A sequence that had to be let go is told so once, instead of going on from
nothing in silence; the request after that begins it anew. A new process knows no sequence.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from wherry_agent.answering.arms import Counter, Loaded, key_of
from wherry_agent.answering.ask import Ask
from wherry_agent.children import Loadable
from wherry_shared.bundle import TensorSpec, axis_bounds
from wherry_shared.engines.errors import BadInput
from wherry_shared.engines.session import DTYPES, Array

SEQUENCES_MAX = 256
"""Sequences of one model; the one that was idle longest makes room."""
SEQUENCE_BYTES_MAX = 64 * 1024 * 1024
"""State of all sequences of one model, beyond that of a single one."""
SEQUENCE_SECONDS = 600.0
"""How long a sequence may be idle, and how long it may go on with a version that left service."""
SEQUENCE_ID_CHARS_MAX = 256
LET_GO_REMEMBERED_MAX = 1024
"""Sequences that are still to be told that they were let go."""

State = dict[str, Array]
"""By the name of the input that takes it."""


class Ongoing:
    """One sequence: what it was told last, and by whom. Used by one request at a time."""

    __slots__ = ("busy", "bytes", "counter", "leave_by_s", "loadable", "loaded", "over", "state", "steps", "used_s")

    def __init__(self, now_s: float) -> None:
        self.busy = threading.Lock()
        self.loadable: Loadable | None = None
        """Who answered last."""
        self.loaded: Loaded | None = None
        """The same in memory; None if it had to leave, and its successor understands the state."""
        self.counter: Counter | None = None
        self.state: State = {}
        self.bytes = 0
        """Of the state, as the limit counts it."""
        self.steps = 0
        """Requests answered; 0: it is about to begin."""
        self.used_s = now_s
        self.leave_by_s: float | None = None
        self.over = False

    def fits(self, loaded: Loaded) -> bool:
        """Tell whether `loaded` can go on from here."""
        return self.loadable is None or same_state(self.loadable, loaded.loadable)

    def choose(self, target: Loaded, live: Sequence[Loaded]) -> Loaded:
        """Return who goes on: `target` if it understands the state, else the version that the sequence began with.

        Raises:
            BadInput: nobody can; the sequence has to begin again.
        """
        if self.fits(target):
            return target
        heir = self.loaded or next((loaded for loaded in live if self.fits(loaded)), None)
        if heir is None:
            raise BadInput("the version that began this sequence left service", next_step="begin it again")
        return heir

    def feed(self, loaded: Loaded, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs with the state that the caller left out: that of the last answer, or the initial one."""
        fed = {**self.state, **inputs}
        for pair in loaded.loadable.interface.state:
            if pair.input not in fed:
                fed[pair.input] = _initial(loaded.loadable, pair.input, inputs)
        return fed

    def give_up(self) -> None:
        """Forget everything: the version that alone understands the state failed, and is not in service any more."""
        self.state = {}

    def keep(self, loaded: Loaded, counter: Counter | None, results: State, asked: Sequence[str] | None) -> State:
        """Take the state out of an answer; return what of it the caller asked for."""
        self.loadable, self.loaded, self.counter = loaded.loadable, loaded, counter
        self.state = state_of(loaded.loadable, results, asked)
        self.steps += 1
        if asked is not None:
            return {name: results[name] for name in asked}
        outputs = {pair.output for pair in loaded.loadable.interface.state}
        return {name: value for name, value in results.items() if name not in outputs}


class Sequences:
    """The sequences of one model, over all its versions."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._ongoing: OrderedDict[str, Ongoing] = OrderedDict()
        """The one that was used last is last."""
        self._let_go: OrderedDict[str, str] = OrderedDict()
        """Key → why."""
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._ongoing)

    @contextmanager
    def step(self, ask: Ask, version: str = "") -> Iterator[Ongoing]:
        """Hold the sequence of a request, which it has for itself; `version`: of those asked of this version by name.

        Raises:
            BadInput: it had to be let go since its last request.
        """
        if len(ask.sequence_id) > SEQUENCE_ID_CHARS_MAX:
            raise BadInput(f"sequence_id has more than {SEQUENCE_ID_CHARS_MAX} characters")
        key = f"{version}/{ask.sequence_id}"
        one = self._enter(key, start=ask.sequence_start)
        try:
            yield one
        finally:
            with self._lock:
                one.used_s = self._now()
                if self._ongoing.get(key) is one:
                    if ask.sequence_end or not one.state:  # it ended, never began, or has nothing to remember
                        self._forget(key, one)
                    else:
                        self._bytes -= one.bytes
                        one.bytes = sum(value.nbytes for value in one.state.values())
                        self._bytes += one.bytes
                        self._make_room(one)
            one.busy.release()

    def holder(self, sequence_id: str) -> Loadable | None:
        """Return the version that answered a sequence last; None if there is none, or it is about to begin."""
        with self._lock:
            one = self._ongoing.get(f"/{sequence_id}")
            return one.loadable if one is not None else None

    def settle(self, live: Collection[Loaded], *, on_trial: bool) -> None:
        """Let go of what is idle or held on too long to a version that is not among `live`; called once a second.

        `on_trial`: one of `live` is a candidate; otherwise those that sequences began with are confirmed or taken back.
        """
        now_s = self._now()
        with self._lock:
            for key, one in list(self._ongoing.items()):
                if not one.busy.acquire(blocking=False):
                    continue
                try:
                    self._settle(key, one, live, now_s)
                    if not on_trial and one.counter is not None and one.counter.arm == "candidate":
                        one.counter = None
                finally:
                    one.busy.release()

    def release(self, wanted: Collection[Loadable]) -> None:
        """Let go of every version at once, memory being short; keep the states that one of `wanted` understands."""
        with self._lock:
            for key, one in list(self._ongoing.items()):
                if one.loadable is None:
                    continue
                if any(same_state(one.loadable, loadable) for loadable in wanted):
                    one.loaded = one.counter = None
                else:
                    self._drop(key, one, "memory was short for the version that began it")

    def counters(self) -> list[Counter]:
        """Return the counters into which sequences count."""
        with self._lock:
            return [one.counter for one in self._ongoing.values() if one.counter is not None]

    def loaded(self) -> list[Loaded]:
        """Return the versions that sequences hold on to."""
        with self._lock:
            return list({one.loaded for one in self._ongoing.values() if one.loaded is not None})

    # -- inside ----------------------------------------------------------------------------------

    def _enter(self, key: str, *, start: bool) -> Ongoing:
        while True:
            with self._lock:
                one = self._ongoing.get(key)
                if start and one is not None:
                    self._forget(key, one)
                    one = None
                why = self._let_go.pop(key, None)
                if one is None:
                    if why is not None and not start:
                        raise BadInput(
                            f"the sequence {key.partition('/')[2]!r} was let go: {why}",
                            next_step="begin it again: the next request of that sequence starts from nothing",
                        )
                    one = self._ongoing[key] = Ongoing(self._now())
                self._ongoing.move_to_end(key)
                if start:
                    one.busy.acquire()  # nobody else has seen it
                    return one
            one.busy.acquire()
            if not one.over:
                return one
            one.busy.release()

    def _settle(self, key: str, one: Ongoing, live: Collection[Loaded], now_s: float) -> None:
        if now_s - one.used_s > SEQUENCE_SECONDS:
            self._drop(key, one, f"it was idle for {SEQUENCE_SECONDS:.0f} s")
        elif any(one.loaded is loaded for loaded in live):
            one.leave_by_s = None
        elif (heir := next((loaded for loaded in live if one.fits(loaded)), None)) is not None:
            one.loaded, one.counter, one.leave_by_s = heir, None, None
        elif one.counter is not None and one.counter.arm == "candidate":
            self._drop(key, one, "the version that began it was taken back")
        elif one.leave_by_s is None:
            one.leave_by_s = now_s + SEQUENCE_SECONDS
        elif now_s > one.leave_by_s:
            self._drop(key, one, "the version that began it left service")

    def _make_room(self, current: Ongoing) -> None:
        if len(self._ongoing) <= SEQUENCES_MAX and self._bytes <= SEQUENCE_BYTES_MAX:
            return
        for key, one in list(self._ongoing.items()):
            if len(self._ongoing) <= SEQUENCES_MAX and self._bytes <= SEQUENCE_BYTES_MAX:
                return
            if one is not current:
                self._drop(key, one, "others needed its room")

    def _drop(self, key: str, one: Ongoing, why: str) -> None:
        """Let go of a sequence that did not end; a request that is under way still gets its answer."""
        self._forget(key, one)
        self._let_go[key] = why
        while len(self._let_go) > LET_GO_REMEMBERED_MAX:
            self._let_go.popitem(last=False)

    def _forget(self, key: str, one: Ongoing) -> None:
        one.over = True
        self._bytes -= one.bytes
        del self._ongoing[key]


def same_state(one: Loadable, other: Loadable) -> bool:
    """Tell whether a sequence that one version began may be continued by the other."""
    if key_of(one) == key_of(other):
        return True
    ours, theirs = one.interface, other.interface
    return bool(ours.state_id) and ours.state_id == theirs.state_id and ours.state == theirs.state


def with_state(loadable: Loadable, outputs: Sequence[str] | None) -> Sequence[str] | None:
    """Return the outputs to run for, so that the state is among them."""
    if outputs is None:
        return None
    return list(dict.fromkeys([*outputs, *(pair.output for pair in loadable.interface.state)]))


def state_of(loadable: Loadable, results: Mapping[str, Array], asked: Sequence[str] | None) -> State:
    """Return the state among outputs, by the inputs that take it; what the caller gets as well is copied."""
    return {
        pair.input: results[pair.output].copy() if asked and pair.output in asked else results[pair.output]
        for pair in loadable.interface.state
    }


def _initial(loadable: Loadable, name: str, inputs: Mapping[str, Array]) -> Array:
    """Return the state before the first request: zeros, in the shape that the other inputs ask for."""
    interface = loadable.interface
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in interface.inputs}
    lengths: dict[str, int] = {}
    for given, value in inputs.items():
        spec = specs.get(given)
        if spec is not None and isinstance(value, np.ndarray) and value.ndim == len(spec.shape):
            lengths.update(
                (axis, length) for axis, length in zip(spec.shape, value.shape, strict=True) if axis in interface.dims
            )
    shape = [
        axis if isinstance(axis, int) else lengths.get(axis, axis_bounds(axis, interface)[0])
        for axis in specs[name].shape
    ]
    if specs[name].datatype == "BYTES":
        return np.full(shape, b"", DTYPES["BYTES"])
    return np.zeros(shape, DTYPES[specs[name].datatype])
