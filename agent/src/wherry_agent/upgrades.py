"""What follows from an engine that was replaced on disk while a worker runs with the one before. Pure.

    probed ─▶ each confirmed version that the new engine has not proved yet goes to the canary
                 │ all of them passed                      │ one misses its golden vectors
                 ▼                                         ▼
              another worker takes over              known bad with that engine; the old process serves on
                                                           │ a worker is started all the same (crash, restart)
                                                           ▼
                                              another variant, the last good version, or the safe state

Level-triggered like the rest of the machine: the versions found by a probe are compared with what the worker says it
has in memory (`Served.engine_version`) and with what each version was proved with (`Loadable.engine_version`). The same
probe twice changes nothing. A canary without a verdict and a hand-over that failed are tried again after a back-off, and at
once after a probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from wherry_agent.children import Loadable
from wherry_agent.state import (
    Again,
    Cancel,
    Compared,
    Denied,
    Engines,
    EnginesProbed,
    Fetching,
    HandedOver,
    HandOver,
    HandOverAsked,
    Idle,
    Judging,
    OnTrial,
    Proving,
    Queued,
    Rejudge,
    Rejudged,
    Rejudging,
    Resolving,
    Returning,
    Served,
    Slot,
    State,
    Swapping,
    Waiting,
)
from wherry_agent.turn import JUDGE_GRACE_MS, REJUDGE_DOWNS_MAX, STEADY_MS, Turn, retry_ms, serving
from wherry_shared import reasons
from wherry_shared.clock import Now, Since

HAND_OVER_MS = 300_000
"""Longer than the daemon lets a hand-over take."""
REJUDGE_S = 120


def probed(turn: Turn, event: EnginesProbed) -> None:
    """These engines work on this device now."""
    before = turn.state.engines.installed
    installed = _believed(turn, event.installed)
    engines = replace(turn.state.engines, installed=installed, barred=False)
    turn.state = replace(turn.state, engines=engines)
    fresh = any(before.get(engine) != version for engine, version in installed.items())
    if fresh:
        turn.reopen()
    for name, slot in tuple(turn.state.models.items()):
        phase = slot.phase
        if isinstance(phase, Compared) and _changed(turn, phase.job.loadable):
            turn.put(name, replace(slot, phase=Idle()))  # it was judged with an engine that is gone
        if fresh and isinstance(phase, Resolving):  # it is being resolved with the engines before
            turn.effects.append(Cancel(name))
            turn.resolve(name, slot, phase.job)
        if not isinstance(phase, Fetching | Judging | Queued | Waiting) or not phase.job.candidates:
            continue
        if _changed(turn, phase.job.loadable):  # chosen, or judged, for an engine that is gone
            turn.effects.append(Cancel(name))
            turn.resolve(name, slot, phase.job)
    for name in tuple(turn.state.models):
        _rejudge(turn, name)


def rejudged(turn: Turn, event: Rejudged) -> None:
    """The canary ran a confirmed version with an engine that is new here."""
    engines = turn.state.engines
    judging = {name: since for name, since in engines.judging.items() if name != event.model}
    if len(judging) == len(engines.judging):
        return  # late: nobody waits for it any more
    turn.state = replace(turn.state, engines=replace(engines, judging=judging))
    slot = turn.state.models.get(event.model)
    incumbent = slot.incumbent if slot is not None else None
    if slot is None or incumbent is None:
        return
    slot = _pause(turn, event.model, slot)
    if incumbent.loadable.digest != event.digest:
        _rejudge(turn, event.model)  # another version was confirmed meanwhile
        return
    loadable = incumbent.loadable
    if engines.installed.get(loadable.engine) != event.engine_version:
        _rejudge(turn, event.model)  # replaced once more meanwhile
        return
    new = msgspec.structs.replace(loadable, engine_version=event.engine_version)
    words = f"{loadable.engine} {event.engine_version} instead of {loadable.engine_version}"
    result = event.result
    if not result.passed and result.reason not in reasons.VERDICTS:
        _judge_later(turn, event.model)
        return
    again = {name: one for name, one in engines.again.items() if name != event.model}
    turn.state = replace(turn.state, engines=replace(turn.state.engines, again=again))
    slot = replace(slot, rejudging=None)
    turn.put(event.model, slot)
    if result.passed:
        new = msgspec.structs.replace(new, peak_memory_bytes=result.peak_memory_bytes or loadable.peak_memory_bytes)
        turn.put(event.model, replace(slot, incumbent=replace(incumbent, loadable=new)))
        _report(turn, event.model, f"proved again with {words}")
    else:
        turn.remember(new, result.reason, incumbent.offered.attempt)
        _report(turn, event.model, f"not good with {words}: {result.reason} {result.detail}")


def served(turn: Turn, event: Served) -> None:
    """The worker says which engine it has in memory, or that one is gone from the disk: found again, it is a new one."""
    model = next((one for one in serving(turn.state) if one.name == event.model), None)
    if model is not None and model.active.digest == event.digest and event.reason == reasons.ENGINE_MISSING:
        _deny(turn, model.active)
    if not event.ok or not event.engine_version or model is None or model.active.digest != event.digest:
        return
    engines, name = turn.state.engines, model.active.engine
    if name in engines.denied and engines.denied[name].digest == event.digest:
        denied = {other: one for other, one in engines.denied.items() if other != name}
        engines = replace(engines, denied=denied)
        turn.state = replace(turn.state, engines=engines)
    if engines.loaded.get(name) != event.engine_version:
        # a worker that has just started has what is on disk: then it is the probe that is old
        barred = engines.barred or (name not in engines.loaded and engines.installed.get(name) != event.engine_version)
        loaded = {**engines.loaded, name: event.engine_version}
        turn.state = replace(turn.state, engines=replace(engines, loaded=loaded, barred=barred))


def started(turn: Turn) -> None:
    """A new worker process will use what is on disk: what is known to fail with that gives way before it serves."""
    turn.state = replace(turn.state, engines=replace(turn.state.engines, loaded={}, hand_over_again=None))
    _give_way(turn, turn.state.engines.installed)


def handed_over(turn: Turn, event: HandedOver) -> None:
    """Another worker answers, or the old one goes on."""
    engines = turn.state.engines
    if engines.handing_over is None:
        return
    again = _again(turn, engines.hand_over_again) if event.trouble else None
    engines = replace(engines, handing_over=None, wanted="", barred=True, hand_over_again=again)
    turn.state = replace(turn.state, engines=engines)
    if event.trouble:
        for name in tuple(turn.state.models):
            _report(turn, name, f"no other worker took over: {event.trouble}")


def watch(turn: Turn) -> None:
    """What does not end is not waited for, and what came to nothing is done again after a while."""
    limit_ms = REJUDGE_S * 1000 + JUDGE_GRACE_MS
    for name, asked_at in turn.state.engines.judging.items():
        if asked_at.elapsed_ms(turn.now) >= limit_ms:
            _judge_later(turn, name)
    since = turn.state.engines.handing_over
    if since is not None and since.elapsed_ms(turn.now) >= HAND_OVER_MS:
        handed_over(turn, HandedOver("it did not end in time"))
    for name, again in turn.state.engines.again.items():
        if name not in turn.state.engines.judging and _due(turn, again):
            _judge_again(turn, name)
    later = turn.state.engines.hand_over_again
    if later is not None and _due(turn, later):
        turn.state = replace(turn.state, engines=replace(turn.state.engines, barred=False))
    believed = {name: one for name, one in turn.state.engines.denied.items() if one.found and _over(turn, one)}
    if believed:
        installed = {**turn.state.engines.installed, **{name: one.version for name, one in believed.items()}}
        probed(turn, EnginesProbed(installed))


def settle(turn: Turn) -> None:
    """Let another worker take over when there is a reason, and all that it will serve was proved with its engines."""
    _give_way(turn, turn.state.engines.loaded)
    for name, slot in tuple(turn.state.models.items()):
        before = turn.before.models.get(name)
        if before is not None and before.incumbent is not slot.incumbent:
            _rejudge(turn, name)
    engines, slots = turn.state.engines, turn.state.models.values()
    if engines.handing_over is not None or turn.state.told is not None:
        return
    if any(isinstance(slot.phase, Swapping | OnTrial | Proving | Returning) for slot in slots):
        return  # a crash or a figure of a trial must have one suspect
    why = engines.wanted or ("" if engines.barred else _replaced(turn))
    if why:
        turn.state = replace(turn.state, engines=replace(engines, handing_over=Since.at(turn.now)))
        turn.effects.append(HandOver(why))


def deadlines_ms(engines: Engines, now: Now) -> list[int]:
    """Return in how many milliseconds `watch` has something to do."""
    limit_ms = REJUDGE_S * 1000 + JUDGE_GRACE_MS
    left = [limit_ms - since.elapsed_ms(now) for since in engines.judging.values()]
    if engines.handing_over is not None:
        left.append(HAND_OVER_MS - engines.handing_over.elapsed_ms(now))
    later = [again for name, again in engines.again.items() if name not in engines.judging]
    if engines.hand_over_again is not None and engines.barred and engines.handing_over is None:
        later.append(engines.hand_over_again)
    left += [one.wait_ms - one.since.elapsed_ms(now) for one in engines.denied.values() if one.found]
    return left + [again.wait_ms - again.since.elapsed_ms(now) for again in later]


def being_judged(state: State) -> tuple[str, ...]:
    """Return the models whose confirmed version the canary runs with a new engine."""
    return tuple(name for name, slot in state.models.items() if slot.rejudging is not None and slot.rejudging.running)


def resume(turn: Turn, *, tried: bool) -> None:
    """The worker, the canaries and what was under way are gone; what is installed may have changed meanwhile.

    A canary that does not outlive the machine as often as it may is run no more with that engine. `tried`: something was
    on trial besides.
    """
    going = being_judged(turn.before)
    turn.state = replace(turn.state, engines=Engines(installed=turn.state.engines.installed, barred=True))
    for name in going:
        slot = _pause(turn, name, turn.state.models[name])
        one = slot.rejudging
        if turn.before.stopped or one is None:
            continue
        one = replace(one, downs=one.downs + 1, shared=one.shared or tried or len(going) > 1)
        turn.put(name, replace(slot, rejudging=one))
        if one.downs >= REJUDGE_DOWNS_MAX:
            _judged_enough(turn, name, one)


def asked(turn: Turn, event: HandOverAsked) -> None:
    """Somebody wants another worker process, whatever engines there are."""
    turn.state = replace(turn.state, engines=replace(turn.state.engines, wanted=event.why))


# --- what these share ----------------------------------------------------------------------------


def _changed(turn: Turn, loadable: Loadable) -> bool:
    installed = turn.state.engines.installed.get(loadable.engine)
    return installed is not None and installed != loadable.engine_version


def _rejudge(turn: Turn, name: str) -> None:
    """Ask the canary about a confirmed version, unless it was proved with the engine that is there, or failed with it."""
    slot, engines = turn.state.models[name], turn.state.engines
    if slot.incumbent is None or name in engines.judging or not _changed(turn, slot.incumbent.loadable):
        return
    loadable = slot.incumbent.loadable
    new = msgspec.structs.replace(loadable, engine_version=engines.installed[loadable.engine])
    if _known_bad(turn, slot, new.engine_version):
        return
    mark = slot.rejudging
    if mark is None or (mark.digest, mark.engine_version) != (new.digest, new.engine_version):
        mark = Rejudging(new.digest, new.engine_version)
    if mark.downs >= REJUDGE_DOWNS_MAX:
        return
    turn.put(name, replace(slot, rejudging=replace(mark, running=True)))
    judging = {**engines.judging, name: Since.at(turn.now)}
    turn.state = replace(turn.state, engines=replace(engines, judging=judging))
    turn.effects.append(Rejudge(name, new, REJUDGE_S))


def _judge_later(turn: Turn, name: str) -> None:
    """The canary came to no verdict on a confirmed version."""
    engines, slot = turn.state.engines, turn.state.models.get(name)
    if slot is not None:
        _pause(turn, name, slot)
    judging = {other: since for other, since in engines.judging.items() if other != name}
    again = {**engines.again, name: _again(turn, engines.again.get(name))}
    turn.state = replace(turn.state, engines=replace(engines, judging=judging, again=again))


def _judge_again(turn: Turn, name: str) -> None:
    """The wait is over: ask the canary again, or forget it where there is nothing to ask any more."""
    if name in turn.state.models:
        _rejudge(turn, name)
    engines = turn.state.engines
    if name not in engines.judging:
        again = {other: one for other, one in engines.again.items() if other != name}
        turn.state = replace(turn.state, engines=replace(engines, again=again))


def _pause(turn: Turn, name: str, slot: Slot) -> Slot:
    """Note that no canary runs the confirmed version of a model any more."""
    if slot.rejudging is not None and slot.rejudging.running:
        slot = replace(slot, rejudging=replace(slot.rejudging, running=False))
        turn.put(name, slot)
    return slot


def _judged_enough(turn: Turn, name: str, one: Rejudging) -> None:
    """The machine went down with each canary: a verdict, unless it goes down anyway or for something else."""
    incumbent = turn.state.models[name].incumbent
    if incumbent is None or incumbent.loadable.digest != one.digest:
        return
    new = msgspec.structs.replace(incumbent.loadable, engine_version=one.engine_version)
    words = f"with {new.engine} {one.engine_version}: the device went down {one.downs} times while it was judged"
    if one.shared or not turn.calm():
        _report(turn, name, f"judged no more {words}, and not only then")
        return
    turn.remember(new, reasons.DEVICE_DOWN, incumbent.offered.attempt)
    _report(turn, name, f"not good {words}")


def _deny(turn: Turn, loadable: Loadable) -> None:
    """The worker cannot load an engine that is installed: the first time the next probe is believed, then after a wait."""
    engines, engine = turn.state.engines, loadable.engine
    version = engines.installed.get(engine)
    if version is None:
        return  # said already since the last probe
    before = engines.denied.get(engine)
    lately = before is not None and before.since.elapsed_ms(turn.now) < STEADY_MS
    troubles = before.troubles + 1 if before is not None and lately else 0
    one = Denied(version, loadable.digest, Since.at(turn.now), retry_ms(troubles) if troubles else 0, troubles)
    here = {name: installed for name, installed in engines.installed.items() if name != engine}
    turn.state = replace(turn.state, engines=replace(engines, installed=here, denied={**engines.denied, engine: one}))


def _believed(turn: Turn, installed: Mapping[str, str]) -> dict[str, str]:
    """Return what a probe found but for engines that the worker could not load just now; another version is another try."""
    engines = turn.state.engines
    denied = {
        name: replace(one, found=installed.get(name) == one.version and not _over(turn, one))
        for name, one in engines.denied.items()
    }
    turn.state = replace(turn.state, engines=replace(engines, denied=denied))
    return {name: version for name, version in installed.items() if name not in denied or not denied[name].found}


def _over(turn: Turn, one: Denied) -> bool:
    return one.since.elapsed_ms(turn.now) >= one.wait_ms


def _again(turn: Turn, before: Again | None) -> Again:
    troubles = (before.troubles if before is not None else 0) + 1
    return Again(Since.at(turn.now), retry_ms(troubles), troubles)


def _due(turn: Turn, again: Again) -> bool:
    return again.since.elapsed_ms(turn.now) >= again.wait_ms


def _known_bad(turn: Turn, slot: Slot, engine_version: str) -> str:
    """Return the reason for which a confirmed version does not work with an engine that it was not proved with."""
    incumbent = slot.incumbent
    if incumbent is None or incumbent.loadable.engine_version == engine_version:
        return ""
    bad = turn.known_bad(msgspec.structs.replace(incumbent.loadable, engine_version=engine_version))
    return bad.reason if bad is not None and bad.attempt >= incumbent.offered.attempt else ""


def _give_way(turn: Turn, engines: Mapping[str, str]) -> None:
    """Take out of service what is known to fail with these engines; an offer that names it brings another variant."""
    for name in tuple(turn.state.models):
        while (slot := turn.state.models[name]).incumbent is not None and isinstance(
            slot.phase, Idle | Compared | Fetching | Judging | Queued | Waiting
        ):
            loadable = slot.incumbent.loadable
            version = engines.get(loadable.engine, loadable.engine_version)
            reason = _known_bad(turn, slot, version)
            if not reason:
                break
            detail = f"{reason} with {loadable.engine} {version}, proved with {loadable.engine_version}"
            turn.give_up(name, slot, reasons.ENGINE_CHANGED, detail)


def _replaced(turn: Turn) -> str:
    """Say which engine of the worker was replaced, if everything that it serves was proved with the new one."""
    engines = turn.state.engines
    found = ""
    for slot in turn.state.models.values():
        if slot.incumbent is None:
            continue
        loadable = slot.incumbent.loadable
        installed, loaded = engines.installed.get(loadable.engine), engines.loaded.get(loadable.engine)
        if installed is None or loaded is None or installed == loaded:
            continue
        if loadable.engine_version != installed:
            return ""
        found = f"{loadable.engine} {installed} instead of {loaded}"
    return found


def _report(turn: Turn, name: str, detail: str) -> None:
    """Tell the server about the confirmed version of a model, unless it is about to hear of another one."""
    slot = turn.state.models[name]
    if slot.incumbent is None or not isinstance(slot.phase, Idle | Compared):
        return
    serial = turn.state.offer.serial if turn.state.offer is not None else 0
    turn.report(
        name,
        "confirmed_idle" if slot.incumbent.idle else "confirmed",
        offered=slot.incumbent.offered,
        serial=serial,
        reason=reasons.ENGINE_CHANGED,
        detail=detail,
    )
