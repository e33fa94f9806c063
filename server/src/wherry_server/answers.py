"""What the API answers, as values: the shapes of `wherry_server.api`, for whoever calls it.

Fields that a newer server adds are ignored. Times are integer microseconds UTC.
"""

from __future__ import annotations

from typing import Any

import msgspec


class VariantSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A variant of a bundle; `download_bytes` is the best encoding served now."""

    id: str
    digest: str
    format: str
    precision: str
    engines: list[str]
    bytes: int
    download_bytes: int
    accuracy: dict[str, Any] | None
    figures: dict[str, dict[str, Any]]


class BundleSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that the server accepted."""

    model: str
    version: str
    manifest: str
    total_bytes: int
    created_at: int
    created_by: str
    description: str
    licence: str
    variants: list[VariantSummary]


class BundleDetail(BundleSummary, frozen=True, kw_only=True):
    """A bundle with its signed config."""

    config: dict[str, Any]


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A model, its versions from the newest, and how many devices run one of them."""

    name: str
    versions: list[str]
    devices: int
    published_at: int


class Uploaded(msgspec.Struct, frozen=True, kw_only=True):
    """A blob that is here."""

    digest: str
    bytes: int


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a device runs of one model."""

    model: str
    version: str
    variant: str
    state: str
    reason: str


class DeviceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A device in a list."""

    id: str
    name: str
    state: str
    simulated: bool
    labels: dict[str, str]
    arch: str
    agent: str
    engines: list[str]
    enrolled_at: int
    last_seen_at: int
    models: list[RunningModel]


class DeviceList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of devices by name; `next` is empty on the last page, else what to give as `after`."""

    devices: list[DeviceSummary]
    next: str


class OfferState(msgspec.Struct, frozen=True, kw_only=True):
    """What the device should have; `known_serial` is what it said it knows."""

    epoch: int
    serial: int
    known_serial: int
    published: bool
    expires_at: int
    models: dict[str, Any]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Engine time over the newest telemetry windows of what runs."""

    requests: int
    errors: int
    since: int
    p50_us: float | None
    p99_us: float | None


class ModelOnDevice(msgspec.Struct, frozen=True, kw_only=True):
    """The newest word of a device about one model; `why` says why this variant serves."""

    model: str
    state: str
    target: str
    manifest: str
    running: str
    version: str
    variant: str
    why: str
    engine: str
    peak_memory_bytes: int
    canary_p50_us: float
    latency: Latency | None
    latency_ratio: float
    reason: str
    detail: str
    trial_end: str
    attempt: int
    rollout: str
    requests: int
    errors: int
    variants: list[dict[str, Any]]
    updated_at: int


class DeviceLogs(msgspec.Struct, frozen=True, kw_only=True):
    """The last log lines that the device sent, and when an operator last asked for them."""

    requested_at: int
    received_at: int
    lines: list[str]


class DeviceDetail(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known about a device."""

    id: str
    name: str
    state: str
    simulated: bool
    labels: dict[str, str]
    arch: str
    agent: str
    engines: list[str]
    enrolled_at: int
    last_seen_at: int
    certificate_expires_at: int
    trust_version: int
    trust_state: str
    facts: dict[str, Any]
    offer: OfferState | None
    models: list[ModelOnDevice]
    logs: DeviceLogs | None


class LogsRequested(msgspec.Struct, frozen=True, kw_only=True):
    """The request stands; the device sends its lines with its next acknowledgement."""

    device: str
    requested_at: int


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A device that gets nothing more from this server."""

    device: str
    state: str


class FleetModel(msgspec.Struct, frozen=True, kw_only=True):
    """Devices by version that answers (`none`: nothing does) and by state; each as {real, simulated}."""

    versions: dict[str, dict[str, int]]
    states: dict[str, dict[str, int]]


class FleetState(msgspec.Struct, frozen=True, kw_only=True):
    """Counts over all devices, real and simulated apart."""

    devices: dict[str, dict[str, int]]
    models: dict[str, FleetModel]


class CohortShown(msgspec.Struct, frozen=True, kw_only=True):
    """A saved selector."""

    name: str
    selector: str
    created_at: int
    created_by: str


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a selector takes now; the first names only."""

    selector: str
    devices: int
    simulated: int
    names: list[str]


class CohortDetail(CohortShown, frozen=True, kw_only=True):
    """A cohort and whom it takes now."""

    devices: int
    simulated: int
    names: list[str]


class RolloutSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout in a list; `stage` is an index, −1 before the first."""

    number: int
    id: str
    model: str
    version: str
    models: list[dict[str, Any]]
    cohort: str
    selector: str
    state: str
    reason: str
    wanted: str
    stage: int
    stages_total: int
    priority: int
    revision: int
    created_at: int
    created_by: str
    updated_at: int


class StageState(msgspec.Struct, frozen=True, kw_only=True):
    """A stage, and the devices that it exposed by what became of them."""

    share: float
    count: int = 0
    soak_s: int
    confirmed_min: int
    state: str
    counts: dict[str, int]


class Outcomes(msgspec.Struct, frozen=True, kw_only=True):
    """Devices of a stage with one outcome for one reason."""

    stage: int
    outcome: str
    reason: str
    simulated: bool
    devices: int


class GateNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """What the evidence of a gate with stated errors says: a share, between `low` and `high` but for those errors."""

    outcome: str
    estimate: float
    low: float
    high: float
    e_halt: float
    e_pass: float
    sample: int
    needed: int


class GateState(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate says: `pass`, `breach` or `unknown`; `needed` is the sample that it waits for."""

    gate: str
    outcome: str
    bad: int
    judged: int
    needed: int
    numbers: GateNumbers | None = None


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout waits for."""

    code: str
    have: int = 0
    need: int = 0
    unit: str = "devices"


class RolloutDetail(RolloutSummary, frozen=True, kw_only=True):
    """A rollout with counts per stage; `counts` has `real` and `simulated` devices apart, by outcome."""

    plan: dict[str, Any]
    stages: list[StageState]
    members: int
    unexposed: int
    held: int
    closed: int = 0
    counts: dict[str, dict[str, int]]
    outcomes: list[Outcomes]
    gates: list[GateState]
    why_not_yet: list[Why]


class DecisionShown(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided at a revision, and on what evidence."""

    revision: int
    at: int
    decisions: list[dict[str, Any]]
    evidence: dict[str, Any]
    progress_before: dict[str, Any]


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rollout is where it is; `differing` names decisions that do not follow from their evidence: there are none."""

    number: int
    state: str
    reason: str
    why_not_yet: list[Why]
    gates: list[GateState]
    decided: list[dict[str, Any]]
    replayed: int
    differing: list[int]
    device: dict[str, Any] | None


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan would do; a spread has the values that a tenth, half and nine tenths of the runs stayed below."""

    devices: int
    runs: int
    outcomes: dict[str, Any]
    ends: dict[str, int]
    duration_s: dict[str, int]
    exposed: dict[str, int]
    failed: dict[str, int]
    detected_s: dict[str, int] | None
    stages_s: list[int]


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """A device on which a bundle failed."""

    device: str
    name: str
    model: str
    target: str
    manifest: str
    attempt: int
    outcome: str
    reason: str
    settled_at: int
    rollout: int


class KnownBad(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that failed on a hardware class beyond the bound."""

    manifest: str
    hardware_class: str
    reason: str
    devices: int
    updated_at: int
    target: str


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """How many failures stand in the way no more."""

    device: str
    name: str
    model: str
    released: int


class TokenMade(msgspec.Struct, frozen=True, kw_only=True):
    """A token, this once in clear."""

    token: str


class TokenSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A token without its secret; `id` is the beginning of its hash."""

    id: str
    name: str
    role: str
    created_at: int
    expires_at: int


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry, with the hash that the next one repeats."""

    id: int
    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    previous_hash: str
    hash: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether every entry follows from the one before it; else the first that does not."""

    whole: bool
    broken_at: int | None


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """A server that answers, and its database with it."""

    status: str
    version: str
    project: str


class WebhookShown(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook, and how many events have not arrived."""

    name: str
    url: str
    types: list[str]
    created_at: int
    created_by: str
    waiting: int = 0
    dead: int = 0


class WebhookMade(WebhookShown, frozen=True, kw_only=True):
    """A new webhook with the secret of its signatures."""

    secret: str


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """An event that has not arrived."""

    event: int
    state: str
    tries: int
    next_at: int
    error: str
    created_at: int


class Redelivered(msgspec.Struct, frozen=True, kw_only=True):
    """An event that will be sent again now."""

    webhook: str
    event: int
