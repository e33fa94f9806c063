"""Work of a process that goes on: after a fault it begins again, and none waits for another."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from wherry_server.db.database import DATABASE_ERRORS
from wherry_shared.errors import WherryError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
GC_AFTER = (50_000, 20, 100)
"""Thresholds of Python's collector: a batch or a stage makes tens of thousands of objects at once, none of them in a circle."""
FAULT_MIN_S = 0.5
FAULT_MAX_S = 10.0


def collect_rarely() -> None:
    """Have Python look for unreachable circles seldom; what is loaded already is looked through no more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_AFTER)


async def for_ever(work: Callable[[], Awaitable[None]]) -> None:
    """Run `work`, which does not end; if it fails, say so and begin again with back-off."""
    wait = FAULT_MIN_S
    while True:
        started = time.monotonic()
        try:
            await work()
        except (WherryError, *DATABASE_ERRORS) as error:
            log.warning("going on after: %s", error)
        except Exception:
            log.exception("going on after a fault")
        wait = FAULT_MIN_S if time.monotonic() - started > FAULT_MAX_S else min(wait * 2, FAULT_MAX_S)
        await asyncio.sleep(wait)


async def every(seconds: float, work: Callable[[], Awaitable[None]], *, once: bool = False) -> None:
    """Do `work` now and every so often; one failure is logged and does not end it."""
    while True:
        try:
            await work()
        except (WherryError, *DATABASE_ERRORS) as error:
            log.warning("going on after: %s", error)
            await asyncio.sleep(FAULT_MIN_S)
        except Exception:
            log.exception("going on after a fault")
            await asyncio.sleep(FAULT_MIN_S)
        if once:
            return
        await asyncio.sleep(seconds)


async def until_stopped(jobs: Mapping[str, Coroutine[Any, Any, None]], stopping: asyncio.Event) -> None:
    """Run jobs side by side until `stopping` is set, and cancel them then."""
    tasks = [asyncio.create_task(work, name=name) for name, work in jobs.items()]
    try:
        await stopping.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def begun(work: Coroutine[Any, Any, Result], name: str) -> asyncio.Task[Result]:
    """Begin work whose result may never be asked for; its failure is then nobody's."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_seen)
    return task


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def stop_on_signals(stopping: asyncio.Event) -> None:
    """Have SIGTERM and SIGINT set `stopping`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
