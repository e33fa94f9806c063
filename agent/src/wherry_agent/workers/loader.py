"""From a desired serving set to what is loaded: load, warm, publish by reference, let go of the rest.

Level-triggered: only the newest `Serve` counts, and repeating one changes nothing but is answered again. A model that
cannot be loaded leaves in service what was there. All loading happens in one thread, so that memory for at most one
version more than what serves is needed at a time.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable

from wherry_agent.answering import memory
from wherry_agent.answering.arms import ArmName, Counter, Loaded, key_of, load_variant, reason_of
from wherry_agent.answering.published import Published
from wherry_agent.answering.registry import Registry
from wherry_agent.answering.route import Route
from wherry_agent.children import Loadable, Serve, ServeModel, Serving
from wherry_shared.errors import WherryError

log = logging.getLogger(__name__)

FREE_SECONDS_MAX = 10.0
"""How long a cold swap waits for callers of the old version to leave before it loads the new one anyway."""

Key = tuple[str, str, str]


class Loader:
    """Brings the registry to what the supervisor wants."""

    def __init__(
        self,
        registry: Registry,
        say: Callable[[Serving], None],
        *,
        on_candidate_error: Callable[[], None],
        on_first: Callable[[], None],
        reserve_bytes: int = memory.RESERVE_BYTES_DEFAULT,
        available_bytes: Callable[[], int] = memory.available_bytes,
    ) -> None:
        self._registry = registry
        self._say = say
        self._on_candidate_error = on_candidate_error
        self._on_first = on_first
        """Called once, after the first desired state was reached as far as it can be."""
        self._began = False
        self._reserve_bytes = reserve_bytes
        self._available_bytes = available_bytes
        self._changed = threading.Condition()
        self._wanted: Serve | None = None
        self._stopped = False
        self._counters: dict[tuple[Key, ArmName, str], Counter] = {}
        self._counters_lock = threading.Lock()
        self.freed = threading.Event()
        """Set when a version's last caller has left: its memory may be given back."""
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def want(self, serve: Serve) -> None:
        """Make `serve` the desired state; an older one that is not finished is abandoned between two models."""
        with self._changed:
            if self._wanted is None or serve.revision >= self._wanted.revision:
                self._wanted = serve
                self._changed.notify()

    def stop(self) -> None:
        """End after the model that is being loaded."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def counters(self) -> list[Counter]:
        """Return the counters of every arm, those of arms that left the stage included until `settle` drops them."""
        with self._counters_lock:
            return list(self._counters.values())

    def settle(self) -> None:
        """Drop the counters of arms that are not in service and have told everything."""
        live = {
            id(counter)
            for published in self._registry.all()
            for counter in (published.counter, published.incumbent_counter)
        }
        with self._counters_lock:
            self._counters = {
                key: counter
                for key, counter in self._counters.items()
                if id(counter) in live or not counter.told_everything()
            }

    # -- inside ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._wanted is None and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                serve, self._wanted = self._wanted, None
            if serve is not None:
                self._apply(serve)

    def _apply(self, serve: Serve) -> None:
        wanted = {model.name for model in serve.models}
        for name in self._registry.names():
            if name not in wanted:
                self._registry.withdraw(name)
        for model in serve.models:
            if self._wanted is not None or self._stopped:
                return
            try:
                self._say(self._bring(serve.revision, model))
            except Exception as error:  # a border: whatever a runtime raises becomes an answer, never a dead loader
                log.exception("model %s", model.name)
                self._say(_refused(serve.revision, model, error))
        if not self._began:
            self._began = True
            self._on_first()

    def _bring(self, revision: int, model: ServeModel) -> Serving:
        current = self._registry.peek(model.name)
        have = {key_of(loaded.loadable): loaded for loaded in current.loaded()} if current is not None else {}
        active = have.get(key_of(model.active))
        load_ms = 0.0
        cold = False
        if active is None:
            cold = current is not None and not self._fits(model.active)
            if cold:
                log.info("model %s: memory for one version only, swapping cold", model.name)
                have = {}
                previous = current.active.loadable if current is not None else None
                current = None
                self._free(model.name)
            try:
                active = self._load(model.active)
            except (WherryError, MemoryError) as error:
                if cold and previous is not None:
                    self._restore(model, previous)
                return _refused(revision, model, error)
            load_ms = active.load_ms
        incumbent = None
        detail = ""
        if model.incumbent is not None and not cold:
            incumbent = have.get(key_of(model.incumbent))
            if incumbent is None and self._fits(model.incumbent):
                try:
                    incumbent = self._load(model.incumbent)
                except (WherryError, MemoryError) as error:
                    detail = f"the incumbent is not loaded: {error}"
        if model.incumbent is not None and incumbent is None and not detail:
            detail = "the incumbent is not loaded: memory for one version only"
        self._publish(model, active, incumbent)
        return Serving(
            revision=revision,
            model=model.name,
            digest=model.active.digest,
            ok=True,
            detail=detail,
            incumbent_loaded=incumbent is not None,
            load_ms=load_ms,
        )

    def _publish(self, model: ServeModel, active: Loaded, incumbent: Loaded | None) -> None:
        arm: ArmName = "candidate" if model.trial else "incumbent"
        self._registry.publish(
            model.name,
            Published(
                active=active,
                counter=self._counter(active.loadable, arm, model.trial),
                incumbent=incumbent,
                incumbent_counter=self._counter(incumbent.loadable, "incumbent", "") if incumbent else None,
                trial=model.trial,
                deadline_s=model.deadline_ms / 1000,
                on_candidate_error=self._on_candidate_error,
                route=Route(model.mode, model.share, model.salt),
            ),
        )

    def _counter(self, loadable: Loadable, arm: ArmName, trial: str) -> Counter:
        with self._counters_lock:
            key = (key_of(loadable), arm, trial)
            counter = self._counters.get(key)
            if counter is None:
                counter = self._counters[key] = Counter(loadable, arm, trial)
            return counter

    def _fits(self, loadable: Loadable) -> bool:
        return memory.fits_beside(loadable.peak_memory_bytes, self._reserve_bytes, self._available_bytes())

    def _load(self, loadable: Loadable) -> Loaded:
        loaded = load_variant(loadable)
        weakref.finalize(loaded, self.freed.set)
        return loaded

    def _free(self, name: str) -> None:
        """Take a model out of service and wait until the last caller has left it."""
        published = self._registry.peek(name)
        left = [weakref.ref(loaded) for loaded in published.loaded()] if published is not None else []
        del published
        self._registry.go_cold(name)
        deadline = time.monotonic() + FREE_SECONDS_MAX
        while any(reference() is not None for reference in left) and time.monotonic() < deadline:
            time.sleep(0.005)
        memory.trim()

    def _restore(self, model: ServeModel, previous: Loadable) -> None:
        """Load again what a cold swap had to let go."""
        try:
            loaded = self._load(previous)
        except (WherryError, MemoryError) as error:
            log.error("model %s: the version that served before does not load again: %s", model.name, error)
            self._registry.withdraw(model.name)
            return
        restored = ServeModel(name=model.name, active=previous, deadline_ms=model.deadline_ms)
        self._publish(restored, loaded, None)


def _refused(revision: int, model: ServeModel, error: BaseException) -> Serving:
    return Serving(
        revision=revision,
        model=model.name,
        digest=model.active.digest,
        ok=False,
        reason=reason_of(error),
        detail=str(error)[:500],
    )
