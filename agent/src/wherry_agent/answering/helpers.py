"""Threads that run a candidate, so that one which overruns can be left behind.

A native call can't be stopped from outside; some engines can be asked to stop between two operators. What can always be
done is to stop waiting: the caller gets its answer elsewhere, and the late result is dropped when it comes. At most `STUCK_MAX` calls are left behind at once; beyond that a candidate gets no more
threads, which counts as its failure.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

STUCK_MAX = 8
NICE_MAX = 19

T = TypeVar("T")


class Overrun(Exception):  # noqa: N818 - what happened, not an error of ours
    """The call did not end in time, or there is no thread left to begin it."""


class _Call(Generic[T]):
    """A call on its way through a helper thread."""

    __slots__ = ("done", "error", "function", "result")

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.done = threading.Event()
        self.result: T
        self.error: BaseException | None = None


class Helpers:
    """Reusable threads; one is made only when none is idle."""

    def __init__(self, stuck_max: int = STUCK_MAX, *, nice: int = 0) -> None:
        """Make no thread yet; those that come are nicer than the process by `nice`, for good."""
        self._stuck_max = stuck_max
        self._nice = nice
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[_Call[object] | None]] = []
        self._stuck = 0
        self._closed = False

    def run(self, function: Callable[[], T], timeout_s: float, on_overrun: Callable[[], None] | None = None) -> T:
        """Run `function` in a helper and wait for it; `on_overrun` may try to end it when nobody waits any more.

        Raises:
            Overrun: it did not end within `timeout_s`; its result is dropped when it comes.
            Exception: whatever `function` raised.
        """
        call: _Call[T] = _Call(function)
        with self._lock:
            if self._stuck >= self._stuck_max:
                raise Overrun(f"{self._stuck} calls are still running beyond their deadline")
            queue = self._idle.pop() if self._idle else None
        if queue is None:
            queue = SimpleQueue()
            threading.Thread(target=self._work, args=(queue,), name="candidate", daemon=True).start()
        queue.put(call)  # type: ignore[arg-type]
        if not call.done.wait(timeout_s):
            with self._lock:
                overrun = not call.done.is_set()
                if overrun:
                    call.error = Overrun()  # tells the helper that nobody waits any more
                    self._stuck += 1
            if overrun:
                if on_overrun is not None:
                    on_overrun()
                raise Overrun(f"no answer within {timeout_s:.3f} s")
        if call.error is not None:
            raise call.error
        return call.result

    @property
    def stuck(self) -> int:
        """How many calls still run that nobody waits for."""
        return self._stuck

    def close(self) -> None:
        """Let idle helpers end; busy ones end after their call."""
        with self._lock:
            self._closed = True
            for queue in self._idle:
                queue.put(None)
            self._idle.clear()

    def _work(self, queue: SimpleQueue[_Call[object] | None]) -> None:
        if self._nice:
            _step_back(self._nice)
        while (call := queue.get()) is not None:
            result: object = None
            error: BaseException | None = None
            try:
                result = call.function()
            except BaseException as raised:  # whatever it is, it belongs to the caller
                error = raised
            with self._lock:
                if isinstance(call.error, Overrun):
                    self._stuck -= 1
                else:
                    call.result, call.error = result, error
                    call.done.set()
                if self._closed:
                    return
                self._idle.append(queue)
            # hold nothing of the last call while idle: it may be the last reference to a model
            del call, result, error


def _step_back(nice: int) -> None:
    """Lower the priority of this thread: where the system counts niceness by thread, as Linux does, of it alone."""
    try:
        os.setpriority(
            os.PRIO_PROCESS, threading.get_native_id(), min(os.getpriority(os.PRIO_PROCESS, 0) + nice, NICE_MAX)
        )
    except OSError as error:
        log.warning("a helper keeps its priority: %s", error)
