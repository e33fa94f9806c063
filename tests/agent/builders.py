"""Values for tests of the machine: offers, candidates, counts; the defaults make the shortest happy path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from wherry_agent import machine
from wherry_agent.children import ArmStats, Candidate, Judged, Loadable, Trust
from wherry_agent.state import (
    CanaryDone,
    Effect,
    Event,
    Fetched,
    GoldenChecked,
    Measured,
    Offered,
    Resolved,
    Serve,
    Served,
    State,
    Swapping,
    TrustWatch,
)
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.clock import MICROSECONDS, Now, Since
from wherry_shared.sketch import Sketch
from wherry_shared.wire import Mode, Offer, OfferedModel, Trial

DEVICE = "d" * 22
MODEL = "file-type"
T0_S = 1_800_000_000.0
DAY_US = 86_400 * MICROSECONDS


def now(ms: int = 0, boot: str = "boot-1") -> Now:
    return Now(boot, 1_000_000 + ms, T0_S + ms / 1000)


def digest_of(text: str) -> str:
    return "sha256:" + (text.encode().hex() + "0" * 64)[:64]


INTERFACE = Interface(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=[1, 4])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=[1, 2])],
)


def loadable(version: str = "1.0.0", variant: str = "float", model: str = MODEL) -> Loadable:
    return Loadable(
        model=model,
        target=f"{model}/{version}",
        manifest=digest_of(f"{model}/{version}"),
        variant=variant,
        digest=digest_of(f"{model}/{version}/{variant}"),
        engine="onnxruntime",
        engine_version="1.32.0",
        format="onnx",
        path=f"/store/{model}-{version}-{variant}",
        golden_path="/store/" + "a" * 64,
        config_path="/store/" + "b" * 64,
        interface=INTERFACE,
    )


def candidates(version: str = "1.0.0", *variants: str, model: str = MODEL) -> tuple[Candidate, ...]:
    names = variants or ("float",)
    return tuple(Candidate(loadable=loadable(version, name, model), bytes=1000, why="fastest here") for name in names)


def offered(version: str = "1.0.0", *, model: str = MODEL, mode: Mode = "replace", **terms: Any) -> OfferedModel:
    trial = terms.pop("trial", Trial(min_requests=5, max_s=60))
    if mode == "none":
        return OfferedModel(target="", manifest="", mode="none", rollout=terms.pop("rollout", "r1"), **terms)
    target = f"{model}/{version}"
    return OfferedModel(
        target=target,
        manifest=digest_of(target),
        mode=mode,
        trial=trial,
        rollout=terms.pop("rollout", "r1"),
        **terms,
    )


def trust(current: int = 1, **fields: Any) -> Trust:
    return Trust(
        current=current,
        floors=fields.get("floors", {"root": 1, "timestamp": current}),
        time_floor_us=fields.get("time_floor_us", 0),
        expires_at=fields.get("expires_at", round(T0_S * MICROSECONDS) + DAY_US),
    )


def offer(serial: int, models: dict[str, OfferedModel], **fields: Any) -> Offered:
    at = round(T0_S * MICROSECONDS)
    value = Offer(
        format=1,
        device=fields.pop("device", DEVICE),
        project="default",
        epoch=fields.pop("epoch", 1),
        serial=serial,
        issued_at=at,
        expires_at=fields.pop("expires_at", at + 7 * DAY_US),
        models=models,
        **fields,
    )
    return Offered(offer=value, digest=digest_of(f"offer-{serial}"), trust=trust())


def blank() -> State:
    """A device that was just enrolled."""
    return machine.initial(device=DEVICE, project="default", stream="stream-1")


def fresh() -> State:
    """The same, with trust refreshed so that it is not due in a test."""
    return replace(blank(), watch=TrustWatch(Since.at(now()), 10**9))


def resolved(version: str = "1.0.0", *variants: str, model: str = MODEL, attempt: int = 1) -> Resolved:
    return Resolved(model, digest_of(f"{model}/{version}"), attempt, candidates(version, *variants, model=model))


def fetched(version: str = "1.0.0", variant: str = "float", *, model: str = MODEL, attempt: int = 1) -> Fetched:
    return Fetched(model, digest_of(f"{model}/{version}"), attempt, variant)


def judged(
    version: str = "1.0.0", variant: str = "float", *, model: str = MODEL, attempt: int = 1, **result: Any
) -> CanaryDone:
    result = {"passed": True, "vectors": 4, **result}
    item = loadable(version, variant, model)
    return CanaryDone(model, item.manifest, attempt, item.digest, Judged(**result))


def served(state: State, version: str = "1.0.0", variant: str = "float", *, model: str = MODEL, **how: Any) -> Served:
    how = {"ok": True, "revision": state.revision, **how}
    return Served(model, loadable(version, variant, model).digest, **how)


def latencies(bucket: int, microseconds: float, count: int) -> dict[str, dict[str, int]]:
    sketch = Sketch()
    sketch.add(microseconds, count)
    return {str(bucket): sketch.to_wire()}


def arm(version: str = "1.0.0", variant: str = "float", *, model: str = MODEL, **counts: Any) -> ArmStats:
    item = loadable(version, variant, model)
    return ArmStats(
        model=model,
        manifest=item.manifest,
        variant=variant,
        digest=item.digest,
        arm=counts.pop("arm", "candidate"),
        **counts,
    )


def trial_of(state: State, model: str = MODEL) -> str:
    phase = state.models[model].phase
    assert hasattr(phase, "trial"), phase
    return str(phase.trial)


def measured(
    state: State,
    version: str = "1.0.0",
    variant: str = "float",
    *,
    model: str = MODEL,
    baseline: Any = None,
    **counts: Any,
) -> Measured:
    return Measured(model, trial_of(state, model), arm(version, variant, model=model, **counts), baseline)


def golden(state: State, version: str = "1.0.0", *, passed: bool = True, model: str = MODEL) -> GoldenChecked:
    return GoldenChecked(model, loadable(version, model=model).digest, trial_of(state, model), passed)


def run(state: State, *events: Event, ms: int = 0) -> tuple[State, list[Effect]]:
    """Apply events at one instant; return the state and all effects."""
    effects: list[Effect] = []
    for event in events:
        state, more = machine.step(state, event, now(ms))
        effects += more
    return state, effects


def on_trial(version: str = "1.0.0", *, state: State | None = None, serial: int = 1, **terms: Any) -> State:
    """Bring a version up to its trial."""
    state = state or fresh()
    attempt = terms.get("attempt", 1)
    state, _ = run(
        state,
        offer(serial, {MODEL: offered(version, **terms)}),
        resolved(version, attempt=attempt),
        fetched(version, attempt=attempt),
        judged(version, attempt=attempt),
    )
    assert isinstance(state.models[MODEL].phase, Swapping), state.models[MODEL].phase
    state, _ = run(state, served(state, version))
    return state


def confirmed(version: str = "1.0.0", *, state: State | None = None, serial: int = 1, **terms: Any) -> State:
    """Bring a version through its trial."""
    state = on_trial(version, state=state, serial=serial, **terms)
    baseline = None
    if state.models[MODEL].incumbent is not None:
        state, _ = run(state, measured(state, version, requests=10), golden(state, version))
    else:
        state, _ = run(state, measured(state, version, requests=10, baseline=baseline))
    assert state.models[MODEL].incumbent is not None
    state, _ = run(state, served(state, version))
    return state


def last_serve(effects: list[Effect]) -> Serve:
    return [effect for effect in effects if isinstance(effect, Serve)][-1]
