"""Use a model of this device inside an application's own process, while the supervisor swaps it underneath.

    with Model("file-type") as model:
        answer = model.run({"bytes": numpy_array})
        label = answer.by.labels["target_label"][answer["target_label"].argmax()]

A call reads one reference and runs the engine in the caller's thread; its overhead is the target of
`benchmarks/handle_overhead.py`. Loading, warming, swapping, counting and talking to the supervisor happen in two threads
of the handle's own. While a candidate is on trial, `isolation="worker"` (the default) sends calls to the worker process
and keeps the incumbent here, so that a candidate which crashes can't take the application with it; `"inline"` runs the
candidate here as well. If the supervisor goes away, the last verified version goes on serving.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket as sockets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wherry_agent import handle_messages as messages
from wherry_agent import shelter
from wherry_agent.answering.arms import (
    RUNS_LEFT_OUT,
    Counter,
    Loaded,
    check_told,
    key_of,
    load_variant,
    reason_of,
)
from wherry_agent.answering.ask import Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.published import Published
from wherry_agent.answering.sequences import Sequences, same_state
from wherry_agent.children import ArmName, Loadable, ServeModel
from wherry_agent.handle_remote import RemoteAnswer, WorkerClient
from wherry_agent.lines import LineWriter, read_lines
from wherry_shared import reasons
from wherry_shared.bundle import Contract, Interface, incompatibilities
from wherry_shared.engines.canonical import ShortWay
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import Array
from wherry_shared.errors import RefusedError, UnreachableError, WherryError
from wherry_shared.processing import Chain, Raw

log = logging.getLogger(__name__)

COUNT_SECONDS = 1.0
DRAIN_SECONDS = 0.2
"""How often timings of calls are folded into sketches, outside the calls."""
RECONNECT_SECONDS_MIN = 0.1
RECONNECT_SECONDS_MAX = 5.0
COUNTERS_MAX = 8
"""Arms that one handle keeps counters of: those in use and the last few before them."""
INLINE_PERMITS = 1024
"""The application's threads are its own business: no run gate in its process."""


@dataclass(frozen=True)
class Served:
    """The version that gave an answer, with the assets of exactly that version."""

    model: str
    version: str
    variant: str
    digest: str
    trial: str
    interface: Interface
    assets_path: str
    processing: Chain = field(repr=False, compare=False)
    """Its declared pre- and post-processing; `Model.predict` runs it."""

    @property
    def labels(self) -> dict[str, list[str]]:
        """Class names along the last axis, for each output that has them."""
        return {spec.name: spec.labels for spec in self.interface.outputs if spec.labels}

    def asset(self, path: str) -> Path:
        """Return the file of that path among the bundle's assets.

        Raises:
            RefusedError: `asset_missing`.
        """
        root = Path(self.assets_path).resolve() if self.assets_path else None
        file = (root / path).resolve() if root is not None else None
        if root is None or file is None or not file.is_relative_to(root) or not file.is_file():
            raise RefusedError("asset_missing", f"{self.model} {self.version} has no asset {path[:200]!r}")
        return file


class Answer(dict[str, Array]):
    """Outputs under canonical names; `by` is the version that gave them, `fallback` whether it stood in for another."""

    __slots__ = ("_stood_in", "by")

    by: Served
    _stood_in: bool
    """Only set where an answer is not the plain one: the short way of `Model.run` has no time for it."""

    @property
    def fallback(self) -> bool:
        """Whether the version stood in for another one, which failed."""
        return getattr(self, "_stood_in", False)

    @classmethod
    def of(cls, outputs: dict[str, Array], by: Served, *, fallback: bool) -> Answer:
        """Return `outputs` as the answer of a version."""
        answer = cls(outputs)
        answer.by = by
        answer._stood_in = fallback
        return answer


class Prediction(dict[str, Any]):
    """Outputs after the bundle's post-processing: arrays, or `Choices` where an operation chooses."""

    __slots__ = ("answer",)

    answer: Answer
    """The outputs as the model gave them."""

    @property
    def by(self) -> Served:
        """The version that gave them, whose processing was applied."""
        return self.answer.by

    @property
    def fallback(self) -> bool:
        """Whether it stood in for another version."""
        return self.answer.fallback


@dataclass(frozen=True, slots=True)
class _InProcess:
    """A trusted version in this process: the short way."""

    loaded: Loaded
    run_timed: ShortWay
    """`short_way` of `loaded`."""
    counter: Counter
    served: Served
    left_behind: Callable[[int], None]
    """`append` of the counter's pending runs."""

    def answer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Answer:
        """Run; fold the counts later."""
        answer = Answer()
        answer.by = self.served
        try:
            self.left_behind(self.run_timed(answer, inputs, outputs))
        except EngineFault as fault:
            self.counter.failed(str(fault), fallback=False)
            raise
        self.counter.seen = answer
        return answer


@dataclass(frozen=True, slots=True)
class _Inline:
    """A candidate on trial in this process, its incumbent beside it."""

    published: Published
    served: dict[int, Served]
    """By identity of the loaded variant."""


@dataclass(frozen=True, slots=True)
class _Remote:
    """A candidate on trial in the worker, its incumbent here; or what is encrypted, with its incumbent, both in the worker."""

    client: WorkerClient
    candidate: Served
    counter: Counter
    incumbent: _InProcess | None
    there: Served | None = None
    """The incumbent that is in the worker too."""


_Engaged = _InProcess | _Inline | _Remote


class Model:
    """A model by name. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        name: str,
        *,
        socket: str | Path | None = None,
        isolation: messages.Isolation = "worker",
        contract: Interface | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Connect to the supervisor and wait until a version is ready.

        Args:
            name: the model's name.
            socket: the supervisor's unix socket; default `$WHERRY_HANDLE_SOCKET`, then `/var/lib/wherry/run/handle.sock`.
            isolation: where a candidate on trial runs, `worker` or `inline`.
            contract: what the application relies on: a `Contract`, or a whole interface. It becomes the device's: a bundle
                that breaks it is refused before its weights are downloaded, and never runs here.
            timeout_s: how long to wait.

        Raises:
            UnreachableError: `supervisor_unreachable`, or `no_model`: nothing to serve within `timeout_s`.
            RefusedError: the supervisor does not talk to this process, or `contract_broken`: what serves now is not what
                the application relies on.
        """
        self.name = name
        self._path = messages.socket_path(socket)
        self._isolation: messages.Isolation = isolation
        self._contract = _declared(contract)
        self._engaged: _Engaged | None = None
        self._helpers = Helpers()
        self._gate = RunGate(INLINE_PERMITS)
        self._sequences = Sequences()
        self._counters: dict[tuple[tuple[str, str, str], ArmName, str], Counter] = {}
        self._counters_lock = threading.Lock()
        self._writer: LineWriter | None = None
        self._connection: sockets.socket | None = None
        self._revision = -1
        self._closed = threading.Event()
        self._first = threading.Event()
        self._trouble: WherryError = UnreachableError(
            "supervisor_unreachable",
            f"no supervisor answers on {self._path}",
            consequence="there is no verified version to run",
            next_step="start wherry-agent, or name its socket",
        )
        self._hurry = threading.Event()
        self._threads = [
            threading.Thread(target=self._listen, name=f"handle-{name}", daemon=True),
            threading.Thread(target=self._count, name=f"handle-{name}-counts", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)
        if not self._first.wait(timeout_s) or self._engaged is None:
            self.close()
            raise self._trouble

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        sequence: str = "",
        sequence_start: bool = False,
        sequence_end: bool = False,
    ) -> Answer:
        """Run the model on arrays under canonical names.

        Args:
            inputs: arrays by name; in a sequence, those that take state may be left out.
            outputs: names of those to return; by default all, in a sequence all but state.
            sequence: for a model with state, which sequence this call belongs to: it goes on from the last answer, by
                the version that began it. In the worker's trials such calls are the incumbent's.
            sequence_start: begin the sequence with this call, whatever is known of it.
            sequence_end: forget the sequence after this call.

        Raises:
            BadInput: the interface does not allow this input.
            EngineFault: the model failed on it, and no incumbent could answer.
            UnreachableError: `no_model`, the device has no version any more, or `worker_gone`.
        """
        # the last three are not keyword-only, since CPython looks up each default of those in every call
        engaged = self._engaged
        if sequence:
            return self._run_in_sequence(engaged, inputs, outputs, Ask("", sequence, sequence_start, sequence_end))
        if engaged.__class__ is _InProcess:
            return engaged.answer(inputs, outputs)
        return self._run_on_trial(engaged, inputs, outputs)

    def predict(
        self, raw: Raw, *, sequence: str = "", sequence_start: bool = False, sequence_end: bool = False
    ) -> Prediction:
        """Pre-process, run, and post-process as the bundle declares: all three by the version that answers.

        Args:
            raw: what the declared pre-processing begins with, such as a camera frame (H, W, C); without declared
                pre-processing the input itself. One array where the interface has one input, else arrays by input name.
            sequence: as `run`.
            sequence_start: as `run`.
            sequence_end: as `run`.

        Raises:
            BadInput: an operation, or the interface, does not allow it; or the version of a sequence changed in the middle
                to one that pre-processes otherwise, and it has to begin again.
            EngineFault: as `run`.
            UnreachableError: as `run`.
        """
        engaged = self._engaged  # read once: a swap in the middle changes nothing
        first = self._asked_first(engaged)
        if sequence:
            ask = Ask("", sequence, sequence_start, sequence_end)
            chain = self._processing_of(ask, engaged, first)
            answer = self._run_in_sequence(engaged, chain.before(raw), None, ask)
            if not answer.by.processing.begins_like(chain):
                raise BadInput("the sequence went on by another version in this moment", next_step="begin it again")
        else:
            answer = self._answer(engaged, first.processing.before(raw), None)
            if not answer.by.processing.begins_like(first.processing):
                # another version stood in, or has this share of the requests: its inputs are made otherwise
                answer = self._again(engaged, raw, answer)
        prediction = Prediction(answer.by.processing.after(answer))
        prediction.answer = answer
        return prediction

    @property
    def served(self) -> Served:
        """The version that the next call asks first.

        Raises:
            UnreachableError: `no_model`.
        """
        return self._asked_first(self._engaged)

    def _asked_first(self, engaged: _Engaged | None) -> Served:
        match engaged:
            case _InProcess():
                return engaged.served
            case _Inline():
                return engaged.served[id(engaged.published.first)]
            case _Remote():
                return engaged.candidate
        raise self._no_model()

    def report_bad(self, reason: str, answer: Answer | None = None, *, severe: bool = False) -> None:
        """Say that what a version answers is wrong: the version that gave `answer`, or the one that serves now.

        Each call counts as one bad answer. A version on trial is taken back when there are as many as the trial's terms
        say of failed requests (`errors_min`, `error_rate_max`); outside a trial they are only counted.

        Args:
            reason: what is wrong, for the people who made it.
            answer: the answer in question.
            severe: one answer like this is enough: a version on trial is taken back at once.

        Raises:
            UnreachableError: `supervisor_unreachable`, nobody heard it.
            RefusedError: `version_gone`, the version of that answer left long ago.
        """
        by = answer.by if answer is not None else self.served
        if self._writer is None:
            raise _unheard()
        counter = self._counter_of(by)
        if counter is None:
            raise RefusedError("version_gone", f"{by.model} {by.version} is not counted here any more")
        counter.rejected(reason)
        self._hurry.set()
        if severe and not self._say(messages.BadReport(digest=by.digest, trial=by.trial, reason=reason[:500])):
            raise _unheard()

    def tell(self, name: str, value: float, answer: Answer | Prediction | None = None) -> bool:
        """Tell a number about what a version answers: the version that gave `answer`, or the one that serves now.

        It may be a measure (millimetres that a part was off) or a verdict (1 if a person agreed, else 0), at once or as soon
        as it is known. Counts and sums go to the server with the telemetry, where the gate `app:NAME` of a rollout compares
        their mean on devices that have the candidate with that on devices that do not. The number itself is not kept.

        Args:
            name: at most 40 characters: a letter, then letters, digits, `_`, `.` and `-`, all small.
            value: a finite number.
            answer: the answer that it is about.

        Returns:
            Whether it counts; not, if the version of that answer left long ago.

        Raises:
            UnreachableError: `no_model`, without an `answer`.
            RefusedError: `metric_name`, `metric_value`, or `metrics_too_many` names for one version.
        """
        check_told(name, value)
        counter = self._counter_of(answer.by if answer is not None else self.served)
        if counter is None:
            return False
        counter.told(name, float(value))
        return True

    def close(self) -> None:
        """Say goodbye and let go of the model."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._hurry.set()
        self._send_counts()
        self._say(messages.Bye())
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(sockets.SHUT_RDWR)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(COUNT_SECONDS)
        self._helpers.close()
        self._engaged = None
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- calls on trial ----------------------------------------------------------------------------

    def _run_on_trial(
        self, engaged: _Engaged | None, inputs: Mapping[str, Array], outputs: Sequence[str] | None
    ) -> Answer:
        match engaged:
            case _Inline():
                answer = engaged.published.answer(self._gate, self._helpers, inputs, outputs)
                return Answer.of(answer.outputs, engaged.served[id(answer.loaded)], fallback=answer.fallback)
            case _Remote():
                return self._ask_worker(engaged, inputs, outputs)
        raise self._no_model()

    def _answer(self, engaged: _Engaged | None, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Answer:
        """What `run` does, on a reference that was read before."""
        if not isinstance(engaged, _InProcess):
            return self._run_on_trial(engaged, inputs, outputs)
        return engaged.answer(inputs, outputs)

    def _again(self, engaged: _Engaged | None, raw: Raw, answer: Answer) -> Answer:
        """Run once more by the version that answered, on what its own pre-processing makes of `raw`."""
        inputs = answer.by.processing.before(raw)
        match engaged:
            case _Inline():
                loaded = next(one for one in engaged.published.loaded() if engaged.served[id(one)] is answer.by)
                return Answer.of(loaded.bound.run(inputs), answer.by, fallback=answer.fallback)
            case _Remote(incumbent=_InProcess() as incumbent):
                again = self._by_incumbent(incumbent, inputs, None)
                return Answer.of(again, answer.by, fallback=answer.fallback)
        raise self._no_model()

    def _processing_of(self, ask: Ask, engaged: _Engaged | None, first: Served) -> Chain:
        """Return the processing of the version that a sequence goes on with."""
        match engaged:
            case (_InProcess() as here) | _Remote(incumbent=_InProcess() as here):
                target, chain = here.loaded.loadable, here.served.processing
            case _Inline():
                target, chain = engaged.published.first.loadable, first.processing
            case _:
                return first.processing
        holder = None if ask.sequence_start else self._sequences.holder(ask.sequence_id)
        if holder is None or same_state(holder, target):
            return chain
        return _served(holder, "").processing

    def _run_in_sequence(
        self, engaged: _Engaged | None, inputs: Mapping[str, Array], outputs: Sequence[str] | None, ask: Ask
    ) -> Answer:
        match engaged:
            case (_InProcess() as here) | _Remote(incumbent=_InProcess() as here):
                # a state in the worker would be lost with the trial: sequences stay in this process
                served = {id(here.loaded): here.served}
                published = Published(active=here.loaded, counter=here.counter, sequences=self._sequences)
            case _Inline(published=published, served=served):
                pass
            case _Remote():
                raise UnreachableError(
                    "sequence_in_trial",
                    f"{self.name!r} answers from the worker, where it is on trial or encrypted; it keeps no sequences of this process",
                    next_step='wait until it is confirmed, or use isolation="inline"; encrypted, ask over HTTP with a sequence_id',
                )
            case None:
                raise self._no_model()
        answer = published.answer(self._gate, self._helpers, inputs, outputs, ask=ask)
        by = served.get(id(answer.loaded)) or _served(answer.loaded.loadable, "")  # a version that left, and goes on
        return Answer.of(answer.outputs, by, fallback=answer.fallback)

    def _ask_worker(self, engaged: _Remote, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Answer:
        incumbent = engaged.incumbent
        try:
            answer = engaged.client.ask(inputs, outputs)
        except UnreachableError as error:
            if error.code == "worker_died":  # with this request, so nobody else has counted it
                engaged.counter.failed(str(error), fallback=incumbent is not None)
                self._hurry.set()
            if incumbent is None:
                raise
            return self._by_incumbent(incumbent, inputs, outputs)
        except EngineFault:
            if incumbent is None:  # counted by the worker, which had no incumbent in memory either
                raise
            return self._by_incumbent(incumbent, inputs, outputs)
        return _from_worker(answer, engaged)

    @staticmethod
    def _by_incumbent(incumbent: _InProcess, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Answer:
        return Answer.of(incumbent.answer(inputs, outputs), incumbent.served, fallback=True)

    def _no_model(self) -> WherryError:
        return UnreachableError(
            "no_model",
            f"this device has no version of {self.name!r} to run",
            next_step="wait for a rollout, or ask wherry-agent status",
        )

    # -- the supervisor ----------------------------------------------------------------------------

    def _listen(self) -> None:
        """Stay connected; act on every assignment. Ends only with the handle, or when it is refused."""
        wait_s = RECONNECT_SECONDS_MIN
        while not self._closed.is_set():
            connection = sockets.socket(sockets.AF_UNIX)
            try:
                shelter.connect(connection, Path(self._path))
                self._connection, self._writer = connection, LineWriter(connection)
                self._revision = -1
                self._say(
                    messages.Hi(
                        format=messages.FORMAT,
                        model=self.name,
                        pid=os.getpid(),
                        isolation=self._isolation,
                        contract=self._contract,
                    )
                )
                for line in read_lines(connection, line_bytes_max=messages.LINE_BYTES_MAX):
                    wait_s = RECONNECT_SECONDS_MIN
                    message = messages.parse_to_handle(line)
                    if isinstance(message, messages.Refusal):
                        self._trouble = RefusedError(message.code, message.message)
                        self._first.set()
                        return
                    if isinstance(message, messages.Assign):
                        self._act(message)
            except (OSError, RefusedError) as error:
                log.debug("handle of %s: %s", self.name, error)
            finally:
                self._writer = None
                connection.close()
            self._orphaned()
            self._closed.wait(wait_s)
            wait_s = min(2 * wait_s, RECONNECT_SECONDS_MAX)

    def _act(self, assign: messages.Assign) -> None:
        if assign.revision < self._revision:
            return  # overtaken on its way by a newer one
        self._revision = assign.revision
        try:
            self._engaged = self._made(assign)
        except (WherryError, MemoryError) as error:
            log.warning("model %s: %s", self.name, error)
            reason = reason_of(error)
            if isinstance(error, RefusedError) and error.code == reasons.CONTRACT_BROKEN:
                reason = error.code
                if self._engaged is None:  # nothing to wait for: what serves is known, and is not it
                    self._trouble = error
                    self._first.set()
            self._say(self._state(assign.revision, ok=False, reason=reason, detail=str(error)[:500]))
            return
        if self._engaged is None:
            self._trouble = self._no_model()
        else:
            self._first.set()
        self._say(self._state(assign.revision))

    def _made(self, assign: messages.Assign) -> _Engaged | None:
        """Load what `assign` asks for, beside what serves meanwhile; loaded variants are used again."""
        serve = assign.serve
        if serve is None:
            return None
        self._check_contract(serve.active)
        have = {key_of(loaded.loadable): loaded for loaded in self._loaded()}
        if serve.active.encrypted or (serve.incumbent is not None and serve.incumbent.encrypted):
            return self._remote(assign, serve, None)  # this device's keys are the agent's alone
        if not serve.trial:
            return self._in_process(serve.active, have)
        if self._isolation == "inline":
            return self._inline(serve, have)
        incumbent = self._in_process(serve.incumbent, have) if serve.incumbent is not None else None
        return self._remote(assign, serve, incumbent)

    def _remote(self, assign: messages.Assign, serve: ServeModel, incumbent: _InProcess | None) -> _Remote:
        client = WorkerClient(assign.worker_socket, serve.name, serve.active.interface, serve.deadline_ms / 1000)
        counter = self._counter(serve.active, "candidate" if serve.trial else "incumbent", serve.trial)
        there = _served(serve.incumbent, "") if serve.incumbent is not None and incumbent is None else None
        return _Remote(client, _served(serve.active, serve.trial), counter, incumbent, there)

    def _check_contract(self, loadable: Loadable) -> None:
        contract = self._contract
        if contract is None:
            return
        broken = incompatibilities(
            contract,
            loadable.interface,
            contract_preprocess=contract.preprocess,
            offered_preprocess=loadable.preprocess.id,
            declared=True,
        )
        if broken:
            raise RefusedError(
                reasons.CONTRACT_BROKEN,
                f"{loadable.target} is not what this application relies on: {'; '.join(broken)}",
                consequence="it does not run in this application",
                next_step="release a version that keeps the contract, or change the contract",
            )

    def _in_process(self, loadable: Loadable, have: dict[tuple[str, str, str], Loaded]) -> _InProcess:
        counter = self._counter(loadable, "incumbent", "")
        loaded = have.get(key_of(loadable))
        if loaded is None:
            loaded = load_variant(loadable)
            counter.leave_out(RUNS_LEFT_OUT)
        return _InProcess(loaded, loaded.short_way, counter, _served(loadable, ""), counter.pending.append)

    def _inline(self, serve: ServeModel, have: dict[tuple[str, str, str], Loaded]) -> _Inline:
        active = have.get(key_of(serve.active)) or load_variant(serve.active)
        incumbent = None
        if serve.incumbent is not None:
            incumbent = have.get(key_of(serve.incumbent)) or load_variant(serve.incumbent)
        published = Published.of(
            serve,
            active,
            incumbent,
            self._counter,
            on_candidate_error=self._hurry.set,
            sequences=self._sequences,
        )
        served = {id(active): _served(serve.active, serve.trial)}
        if incumbent is not None:
            served[id(incumbent)] = _served(incumbent.loadable, "")
        return _Inline(published, served)

    def _orphaned(self) -> None:
        """The supervisor is gone: a candidate is not verified by anybody now, so the incumbent takes over."""
        match self._engaged:
            case _Remote(incumbent=_InProcess() as incumbent):
                self._engaged = incumbent
            case _Inline(published=Published(incumbent=Loaded() as loaded)):
                self._engaged = self._in_process(loaded.loadable, {key_of(loaded.loadable): loaded})

    def _loaded(self) -> list[Loaded]:
        match self._engaged:
            case _InProcess() as engaged:
                return [engaged.loaded]
            case _Inline() as engaged:
                return engaged.published.loaded()
            case _Remote(incumbent=_InProcess() as incumbent):
                return [incumbent.loaded]
        return []

    def _state(self, revision: int, *, ok: bool = True, reason: str = "", detail: str = "") -> messages.Engaged:
        engaged = self._engaged
        self._sequences.settle(self._loaded(), on_trial=isinstance(self._engaged, _Inline))
        holds = {digest for one in (*self._loaded(), *self._sequences.loaded()) for digest in one.loadable.leased}
        if isinstance(engaged, _Remote):
            holds |= engaged.counter.loadable.leased  # its assets are read here
        digest = self.served.digest if engaged is not None else ""
        if isinstance(engaged, _Inline):
            digest = engaged.published.active.loadable.digest  # it runs in this process, whoever answers
        return messages.Engaged(
            revision=revision,
            digest=digest,
            in_process=isinstance(engaged, _InProcess | _Inline),
            holds=sorted(holds),
            ok=ok,
            reason=reason,
            detail=detail,
        )

    # -- counting ----------------------------------------------------------------------------------

    def _counter(self, loadable: Loadable, arm: ArmName, trial: str) -> Counter:
        held = {key_of(one.loadable) for one in self._loaded()}
        with self._counters_lock:
            key = (key_of(loadable), arm, trial)
            counter = self._counters.pop(key, None)
            if counter is None or (not trial and key[0] not in held and counter.told_everything()):
                counter = Counter(
                    loadable, arm, trial
                )  # of one that comes back, the supervisor knows no counts any more
            self._counters[key] = counter  # the newest last: the oldest is forgotten first
            while len(self._counters) > COUNTERS_MAX:
                del self._counters[next(iter(self._counters))]
            return counter

    def _counter_of(self, by: Served) -> Counter | None:
        """Return what counts the answers of a version, None if it left long ago."""
        with self._counters_lock:
            counters = [
                counter
                for counter in self._counters.values()
                if (counter.loadable.digest, counter.trial) == (by.digest, by.trial)
            ]
        return counters[-1] if counters else None

    def _count(self) -> None:
        due = time.monotonic() + COUNT_SECONDS
        while not self._closed.is_set():
            urgent = self._hurry.wait(DRAIN_SECONDS)
            self._drain()
            if urgent or time.monotonic() >= due:
                self._hurry.clear()
                self._send_counts()
                self._sequences.settle(self._loaded(), on_trial=isinstance(self._engaged, _Inline))
                due = time.monotonic() + COUNT_SECONDS

    def _drain(self) -> list[Counter]:
        with self._counters_lock:
            counters = list(self._counters.values())
        for counter in counters:
            counter.fold()
        return counters

    def _send_counts(self) -> None:
        arms = [stats for counter in self._drain() if (stats := counter.news()) is not None]
        if arms:
            self._say(messages.Counts(arms=arms))

    def _say(self, message: Any) -> bool:
        writer = self._writer
        if writer is None:
            return False
        try:
            writer.write(messages.encode(message))
        except OSError as error:
            log.debug("handle of %s: the supervisor did not hear: %s", self.name, error)
            return False
        return True


def _declared(contract: Interface | None) -> Contract | None:
    if contract is None or isinstance(contract, Contract):
        return contract
    fields = {name: getattr(contract, name) for name in Interface.__struct_fields__}
    return Contract(**fields)


def _unheard() -> UnreachableError:
    return UnreachableError("supervisor_unreachable", "the supervisor is gone: nobody heard the report")


def _served(loadable: Loadable, trial: str) -> Served:
    return Served(
        model=loadable.model,
        version=loadable.target.rpartition("/")[2],
        variant=loadable.variant,
        digest=loadable.digest,
        trial=trial,
        interface=loadable.interface,
        assets_path=loadable.assets_path,
        processing=Chain(loadable.interface, loadable.preprocess, loadable.postprocess),
    )


def _from_worker(answer: RemoteAnswer, engaged: _Remote) -> Answer:
    fallback = bool(answer.parameters.get("wherry_fallback"))
    incumbent = engaged.incumbent.served if engaged.incumbent is not None else engaged.there
    for served in (engaged.candidate, incumbent):
        if served is not None and served.version == answer.model_version:
            return Answer.of(answer.tensors, served, fallback=fallback)
    raise EngineFault("foreign_version", f"the worker answered with version {answer.model_version}")
