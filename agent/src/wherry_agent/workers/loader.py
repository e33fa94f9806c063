"""From a desired serving set to what is loaded: load, warm, publish by reference, let go of the rest.

Level-triggered: only the newest `Serve` counts, and repeating one changes nothing but is answered again. What is
published together is a unit: one model, or all models of a group, which are swapped by one write or not at all. A unit
of which one model cannot be loaded leaves in service what was there. All loading happens in one thread, so that memory
for at most one version more than what serves is needed at a time.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from wherry_agent.answering import memory
from wherry_agent.answering.arms import Counter, Loaded, key_of, load_variant, reason_of
from wherry_agent.answering.published import Published
from wherry_agent.answering.registry import Registry
from wherry_agent.answering.route import route_of
from wherry_agent.children import Loadable, Serve, ServeModel, Serving
from wherry_agent.in_flight import UNREAD, Page
from wherry_agent.workers.lasting import Lasting
from wherry_shared import reasons
from wherry_shared.errors import WherryError

log = logging.getLogger(__name__)

FREE_SECONDS_MAX = 10.0
"""How long a cold swap waits for callers of the old version to leave before it loads the new one anyway."""
FREE_POLL_SECONDS = 0.005
GENERATIONS_MAX = 1 << 20
"""Generations that one process numbers before its numbers could meet those of another."""

ONE_ONLY = "the incumbent is not loaded: memory for one version only"

Key = tuple[str, str, str]


class _Unprepared(Exception):  # noqa: N818 - what happened to a unit, not an error of ours
    """A model cannot be brought into service now, and so neither can those of its group."""

    def __init__(self, model: ServeModel, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.model = model
        self.reason = reason
        self.detail = detail[:500]


class _Overtaken(Exception):  # noqa: N818 - the same
    """A newer desired state came before anything of this unit was changed."""


@dataclass(eq=False)
class _Ready:
    """One model of a unit, loaded and not yet published."""

    model: ServeModel
    active: Loaded
    incumbent: Loaded | None
    detail: str = ""
    load_ms: float = 0.0


@dataclass(eq=False)
class _Unit:
    """Models that are published together, and what of them is in memory."""

    models: list[ServeModel]
    have: dict[Key, Loaded]
    ready: list[_Ready] = field(default_factory=list)
    previous: dict[str, list[Loadable]] = field(default_factory=dict)
    """Once it went cold: what served each model, the most trusted first."""

    @property
    def cold(self) -> bool:
        """Whether the old versions were let go because two do not fit."""
        return bool(self.previous)


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
        page: Page = UNREAD,
    ) -> None:
        self._registry = registry
        self._page = page
        self._say = say
        self._on_first = on_first
        """Called once, after the first desired state was reached as far as it can be."""
        self._began = False
        self._reserve_bytes = reserve_bytes
        self._available_bytes = available_bytes
        self._changed = threading.Condition()
        self._wanted: Serve | None = None
        self._stopped = False
        self._published: dict[str, ServeModel] = {}
        """What each model in service was published from."""
        self._lasting = Lasting(registry, on_candidate_error)
        self._generations = itertools.count(secrets.randbits(32) * GENERATIONS_MAX)
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
        self._lasting.close()

    def counters(self) -> list[Counter]:
        """Return the counters of every arm, those of arms that left the stage included until `settle` drops them."""
        return self._lasting.counters()

    def settle(self) -> None:
        """Let go of what nobody needs any more; called once a second."""
        self._lasting.settle()

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
                self._withdraw(name)
        for models in _units(serve.models):
            if self._overtaken():
                return
            for answer in self._answers(serve.revision, models):
                self._say(answer)
        if not self._began:
            self._began = True
            self._on_first()

    def _overtaken(self) -> bool:
        return self._wanted is not None or self._stopped

    def _answers(self, revision: int, models: list[ServeModel]) -> list[Serving]:
        """Bring a unit into service as far as it can be; say so for each of its models."""
        try:
            return self._bring(revision, models)
        except _Overtaken:
            return []
        except Exception as error:  # the thread's border: it answers, and lives on
            log.exception("models %s", ", ".join(model.name for model in models))
            return [_refused(revision, model, reasons.CHILD_FAILED, str(error)) for model in models]

    def _bring(self, revision: int, models: list[ServeModel]) -> list[Serving]:
        unit = _Unit(models, self._in_memory(models))
        try:
            for model in models:
                if unit.ready and not unit.cold and self._overtaken():
                    raise _Overtaken
                self._ready(unit, model)
        except _Unprepared as trouble:
            unit.ready.clear()
            self._go_on_without(unit)
            blame = f"{trouble.model.name}: {trouble.detail}"
            return [
                _refused(revision, model, trouble.reason, trouble.detail)
                if model is trouble.model
                else _refused(revision, model, reasons.GROUP, blame)
                for model in models
            ]
        self._publish(unit.ready)
        return [
            Serving(
                revision=revision,
                model=one.model.name,
                digest=one.model.active.digest,
                ok=True,
                detail=one.detail,
                incumbent_loaded=one.incumbent is not None,
                load_ms=one.load_ms,
                engine_version=one.active.bound.session.engine_version,
            )
            for one in unit.ready
        ]

    def _in_memory(self, models: list[ServeModel]) -> dict[Key, Loaded]:
        """Return the versions that are published, and those that sequences hold on to."""
        found: list[Loaded] = []
        for model in models:
            published = self._registry.peek(model.name)
            found += self._lasting.held(model.name)
            found += published.loaded() if published is not None else []
        return {key_of(loaded.loadable): loaded for loaded in found}

    def _ready(self, unit: _Unit, model: ServeModel) -> None:
        """Load what a model needs that is not in memory yet.

        Raises:
            _Unprepared: it cannot be served as it should be.
        """
        try:
            unit.ready.append(self._both(unit, model) if _leans(model) else self._one(unit, model))
        except _Unprepared:
            raise
        except Exception as error:  # a border: whatever a runtime raises becomes an answer, never a dead loader
            if not isinstance(error, WherryError | MemoryError):
                log.exception("model %s", model.name)
            raise _Unprepared(model, reason_of(error), str(error)) from error

    def _one(self, unit: _Unit, model: ServeModel) -> _Ready:
        """Load the active version, and beside it the incumbent where it fits."""
        active, load_ms = self._needed(unit, model, model.active)
        incumbent = None
        detail = ""
        if model.incumbent is not None:
            detail = ONE_ONLY
            incumbent = unit.have.get(key_of(model.incumbent))
            if incumbent is None and not unit.cold and self._fits(model.incumbent):
                try:
                    incumbent = self._load(model.incumbent)
                except (WherryError, MemoryError) as error:
                    detail = f"the incumbent is not loaded: {error}"
        return _Ready(model, active, incumbent, "" if incumbent is not None else detail, load_ms)

    def _both(self, unit: _Unit, model: ServeModel) -> _Ready:
        """Load incumbent and candidate, in this order: the one answers requests that the other must not answer."""
        if model.incumbent is None:
            raise _Unprepared(model, reasons.UNSUPPORTED, f"{model.mode} needs an incumbent to answer, there is none")
        try:
            incumbent, _ = self._needed(unit, model, model.incumbent)
        except Exception as error:  # whatever a runtime raises, it is no word about the candidate
            raise _Unprepared(model, reasons.CHILD_FAILED, f"the incumbent does not load: {error}") from error
        active = unit.have.get(key_of(model.active))
        if active is not None:
            return _Ready(model, active, incumbent)
        unit.have[key_of(model.incumbent)] = incumbent
        if not self._fits(model.active):
            raise _Unprepared(model, reasons.MEMORY_SHORT, f"memory for one version only, {model.mode} needs both")
        active = self._load(model.active)
        return _Ready(model, active, incumbent, "", active.load_ms)

    def _needed(self, unit: _Unit, model: ServeModel, loadable: Loadable) -> tuple[Loaded, float]:
        """Return a version without which the model cannot be served, and how long it took to load."""
        loaded = unit.have.get(key_of(loadable))
        if loaded is not None:
            return loaded, 0.0
        if unit.have and not unit.cold and not self._fits(loadable):
            log.info("model %s: memory for one version only, swapping cold", model.name)
            self._let_go(unit)
        loaded = self._load(loadable)
        return loaded, loaded.load_ms

    def _publish(self, ready: list[_Ready]) -> None:
        """Swap all models of a unit by one write; what is published as it should be stays, with its counts."""
        if all(self._stands(one) for one in ready):
            return
        generation = next(self._generations)
        made = {
            one.model.name: self._lasting.published(one.model, one.active, one.incumbent, generation) for one in ready
        }
        self._registry.publish_together(made)
        self._published.update({one.model.name: one.model for one in ready})
        for name, published in made.items():
            if published.shadow is None:
                self._lasting.end_shadow(name)
            published.settle()

    def _stands(self, one: _Ready) -> bool:
        current = self._registry.peek(one.model.name)
        return (
            current is not None
            and current.active is one.active
            and current.incumbent is one.incumbent
            and self._published.get(one.model.name) == one.model
        )

    def _fits(self, loadable: Loadable) -> bool:
        return memory.fits_beside(loadable.peak_memory_bytes, self._reserve_bytes, self._available_bytes())

    def _load(self, loadable: Loadable) -> Loaded:
        loaded = load_variant(loadable, page=self._page)
        weakref.finalize(loaded, self.freed.set)
        return loaded

    def _withdraw(self, name: str) -> None:
        self._registry.withdraw(name)
        self._published.pop(name, None)
        self._lasting.withdraw(name)

    def _let_go(self, unit: _Unit) -> None:
        """Take a unit out of service, callers wait; free what is not wanted, once its last caller has left."""
        for one in unit.ready:
            if one.incumbent is not None and not _leans(one.model):
                one.incumbent, one.detail = None, ONE_ONLY
        wanted = {
            key_of(model.incumbent if _leans(model) and model.incumbent else model.active) for model in unit.models
        }
        left = [weakref.ref(loaded) for key, loaded in unit.have.items() if key not in wanted]
        unit.have = {key: loaded for key, loaded in unit.have.items() if key in wanted}
        for model in unit.models:
            published = self._registry.peek(model.name)
            unit.previous[model.name] = _trusted_first(published) if published is not None else []
            del published
            self._registry.go_cold(model.name)
            self._published.pop(model.name, None)
        deadline = time.monotonic() + FREE_SECONDS_MAX
        while True:
            for model in unit.models:
                self._lasting.release(model.name, [model.active])
            if all(reference() is None for reference in left) or time.monotonic() > deadline:
                break
            time.sleep(FREE_POLL_SECONDS)
        memory.trim()

    def _go_on_without(self, unit: _Unit) -> None:
        """A unit could not be brought into service: what serves goes on; what does not is the incumbent's again."""
        again: list[_Ready] = []
        for model in unit.models:
            if self._registry.peek(model.name) is not None:
                continue
            trusted = [model.incumbent] if model.incumbent is not None else []
            for loadable in [*trusted, *unit.previous.get(model.name, [])]:
                try:
                    loaded = unit.have.get(key_of(loadable)) or self._load(loadable)
                except (WherryError, MemoryError) as error:
                    log.error("model %s: %s does not load again: %s", model.name, loadable.target, error)
                    continue
                plain = ServeModel(name=model.name, active=loadable, deadline_ms=model.deadline_ms)
                again.append(_Ready(plain, loaded, None))
                break
            else:
                self._withdraw(model.name)  # who waits for it learns that there is none
        if again:
            self._publish(again)


def _units(models: list[ServeModel]) -> list[list[ServeModel]]:
    """Return what is published together, in the order in which it was asked for."""
    units: dict[tuple[str, str], list[ServeModel]] = {}
    for model in models:
        units.setdefault((model.group, "" if model.group else model.name), []).append(model)
    return list(units.values())


def _leans(model: ServeModel) -> bool:
    return route_of(model).leans_on_incumbent


def _trusted_first(published: Published) -> list[Loadable]:
    """Return what answered, the incumbent before a candidate on trial."""
    found = [loaded.loadable for loaded in published.loaded()]
    return found[::-1] if published.trial else found


def _refused(revision: int, model: ServeModel, reason: str, detail: str) -> Serving:
    return Serving(
        revision=revision,
        model=model.name,
        digest=model.active.digest,
        ok=False,
        reason=reason,
        detail=detail[:500],
    )
