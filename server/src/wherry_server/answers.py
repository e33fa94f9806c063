"""What the API answers, as values: what `wherry_server.api` answers with and describes, and what its callers get.

Plain dataclasses, so that FastAPI knows them, and a client decodes them without it. Fields that a newer server adds are
ignored. Times are integer microseconds UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def shaped(kind: type[T], found: Any) -> T:
    """Return what was read, a mapping or a row, as an answer."""
    return msgspec.convert(found, kind, strict=False, from_attributes=True)


@dataclass(frozen=True, kw_only=True)
class VariantSummary:
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


@dataclass(frozen=True, kw_only=True)
class BundleSummary:
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


@dataclass(frozen=True, kw_only=True)
class BundleDetail(BundleSummary):
    """A bundle with its signed config."""

    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A model, its versions from the newest, and how many devices run one of them."""

    name: str
    versions: list[str]
    devices: int
    published_at: int


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """A blob that is here."""

    digest: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RunningModel:
    """What a device runs of one model."""

    model: str
    version: str
    variant: str
    state: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class DeviceSummary:
    """A device in a list."""

    id: str
    name: str
    state: str
    state_reason: str
    """Why it is in quarantine: `cloned`, `flooding`; else empty."""
    simulated: bool
    labels: dict[str, str]
    arch: str
    agent: str
    engines: list[str]
    enrolled_at: int
    last_seen_at: int
    models: list[RunningModel]


@dataclass(frozen=True, kw_only=True)
class DeviceList:
    """A page of devices by name; `next` is empty on the last page, else what to give as `after`."""

    devices: list[DeviceSummary]
    next: str


@dataclass(frozen=True, kw_only=True)
class OfferState:
    """What the device should have; `known_serial` is what it said it knows."""

    epoch: int
    serial: int
    known_serial: int
    published: bool
    expires_at: int
    models: dict[str, Any]
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Engine time over the newest telemetry windows of what runs."""

    requests: int
    errors: int
    since: int
    p50_us: float | None
    p99_us: float | None


@dataclass(frozen=True, kw_only=True)
class ModelOnDevice:
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
    canary_p99_us: float
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


@dataclass(frozen=True, kw_only=True)
class DeviceLogs:
    """The last log lines that the device sent, and when an operator last asked for them."""

    requested_at: int
    received_at: int
    lines: list[str]


@dataclass(frozen=True, kw_only=True)
class DeviceDetail:
    """All that is known about a device."""

    id: str
    name: str
    state: str
    state_reason: str
    """Why it is in quarantine: `cloned`, `flooding`; else empty."""
    simulated: bool
    labels: dict[str, str]
    arch: str
    agent: str
    engines: list[str]
    enrolled_at: int
    last_seen_at: int
    certificate_expires_at: int
    trust_version: int
    """The trust set that the device uses; 0 before it has one."""
    trust_state: str
    """Empty, or `trust_stale` / `clock_unset`: why it changes nothing now."""
    facts: dict[str, Any]
    offer: OfferState | None
    models: list[ModelOnDevice]
    logs: DeviceLogs | None


@dataclass(frozen=True, kw_only=True)
class LogsRequested:
    """The request stands; the device sends its lines with its next acknowledgement."""

    device: str
    requested_at: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A device that gets nothing more from this server."""

    device: str
    state: str


@dataclass(frozen=True, kw_only=True)
class Readmitted:
    """A device that is let in again."""

    device: str
    state: str


@dataclass(frozen=True, kw_only=True)
class EnrolmentShown:
    """A key that waits for a person (`pending`), may enrol (`expected`) or may not (`refused`)."""

    key: str
    name: str
    state: str
    labels: dict[str, str]
    facts: dict[str, Any]
    created_at: int
    expires_at: int
    created_by: str


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A key that may enrol, and the token that its device is given: no secret, it names this server's root of trust."""

    key: str
    token: str


@dataclass(frozen=True, kw_only=True)
class FleetModel:
    """Devices by version that answers (`none`: nothing does) and by state; each as {real, simulated}."""

    versions: dict[str, dict[str, int]]
    states: dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class FleetState:
    """Counts over all devices, real and simulated apart."""

    devices: dict[str, dict[str, int]]
    models: dict[str, FleetModel]


@dataclass(frozen=True, kw_only=True)
class CohortShown:
    """A saved selector. A static one keeps `kept` devices, whom `kept_from` took when it was saved."""

    name: str
    selector: str
    kept: int = 0
    kept_from: str = ""
    created_at: int
    created_by: str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Whom a selector takes now; the first names only."""

    selector: str
    devices: int
    simulated: int
    names: list[str]


@dataclass(frozen=True, kw_only=True)
class CohortDetail(CohortShown):
    """A cohort and whom it takes now."""

    devices: int
    simulated: int
    names: list[str]


@dataclass(frozen=True, kw_only=True)
class FlagRule:
    """Who gets a variant by a flag's definition."""

    when: str = "all"
    share: float = 1.0
    variant: str = ""


@dataclass(frozen=True, kw_only=True)
class FlagShown:
    """A feature flag."""

    name: str
    type: str
    description: str
    variants: dict[str, Any]
    default: str
    rules: list[FlagRule]
    revision: int
    created_at: int
    created_by: str
    updated_at: int
    updated_by: str


def flag_tag(flag: Mapping[str, Any]) -> str:
    """Return the entity tag of a flag as it was read, for `If-Match`; one that was deleted and made again has another."""
    return f'"{flag["created_at"]}-{flag["revision"]}"'


@dataclass(frozen=True, kw_only=True)
class FlagSpread:
    """Devices that should have a variant now, by what gives it: `default`, `rule` or `rollout`, with its number."""

    variant: str
    by: str
    number: int
    devices: int


@dataclass(frozen=True, kw_only=True)
class FlagDetail(FlagShown):
    """A feature flag and who should have what."""

    spread: list[FlagSpread]


@dataclass(frozen=True, kw_only=True)
class FlagPreview:
    """What a definition would do; `changed` devices would get another value."""

    name: str
    devices: int
    changed: int
    spread: list[FlagSpread]


@dataclass(frozen=True, kw_only=True)
class FlagExplained:
    """A flag on one device: what it should have and why, what its offer says, whether it knows that offer."""

    device: str
    name: str
    flag: str
    variant: str
    value: Any
    by: str
    number: int
    offered: bool
    offered_value: Any
    known: bool


@dataclass(frozen=True, kw_only=True)
class RolloutSummary:
    """A rollout in a list; `stage` is an index, −1 before the first."""

    number: int
    id: str
    model: str
    version: str
    models: list[dict[str, Any]]
    flag: str
    """Of a flag's rollout; then `models` is empty, `model` is `flag:NAME`, and `version` the variant."""
    variant: str
    cohort: str
    selector: str
    state: str
    reason: str
    wanted: str
    stage: int
    stages_total: int
    round: int = 1
    """Of `rounds_total`: in the second one what was proved beside the incumbent is promoted, stage by stage."""
    rounds_total: int = 1
    priority: int
    revision: int
    created_at: int
    created_by: str
    updated_at: int


@dataclass(frozen=True, kw_only=True)
class StageState:
    """A stage, and the devices that it exposed by what became of them."""

    share: float
    count: int = 0
    soak_s: int
    confirmed_min: int
    state: str
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Devices of a stage with one outcome for one reason."""

    stage: int
    outcome: str
    reason: str
    simulated: bool
    devices: int


@dataclass(frozen=True, kw_only=True)
class GateNumbers:
    """What the evidence of a gate with stated errors says: a share, between `low` and `high` but for those errors."""

    outcome: str
    estimate: float
    low: float
    high: float
    e_halt: float
    e_pass: float
    sample: int
    needed: int


@dataclass(frozen=True, kw_only=True)
class GateState:
    """What a gate says: `pass`, `breach` or `unknown`; `needed` is the sample that it waits for."""

    gate: str
    outcome: str
    bad: int
    judged: int
    needed: int
    numbers: GateNumbers | None = None


@dataclass(frozen=True, kw_only=True)
class Why:
    """What a rollout waits for."""

    code: str
    have: int = 0
    need: int = 0
    unit: str = "devices"


@dataclass(frozen=True, kw_only=True)
class Following:
    """What begins when the current stage has proved itself: a stage, from 1, and how many people have to agree to it."""

    stage: int
    round: int
    approvers: int


@dataclass(frozen=True, kw_only=True)
class RolloutDetail(RolloutSummary):
    """A rollout with counts per stage; `counts` has `real` and `simulated` devices apart, by outcome."""

    plan: dict[str, Any]
    stages: list[StageState]
    members: int
    unexposed: int
    held: int
    closed: int = 0
    following: Following | None = None
    counts: dict[str, dict[str, int]]
    outcomes: list[Outcomes]
    gates: list[GateState]
    why_not_yet: list[Why]


@dataclass(frozen=True, kw_only=True)
class DecisionShown:
    """What was decided at a revision, and on what evidence."""

    revision: int
    at: int
    decisions: list[dict[str, Any]]
    evidence: dict[str, Any]
    progress_before: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Needed:
    """With how many devices a gate is expected to decide: `after_s` from the exposure of the last one, at most."""

    devices: int
    after_s: int
    device_hours: float


@dataclass(frozen=True, kw_only=True)
class GateNeeds:
    """By what samples a gate is expected to decide, those that are watched for longer last."""

    gate: str
    samples: list[Needed]


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Why a rollout is where it is; `differing` names decisions that do not follow from their evidence: there are none."""

    number: int
    state: str
    reason: str
    stage: int = -1
    stages_total: int = 1
    round: int = 1
    rounds_total: int = 1
    following: Following | None = None
    why_not_yet: list[Why]
    gates: list[GateState]
    needs: list[GateNeeds]
    decided: list[dict[str, Any]]
    replayed: int
    differing: list[int]
    device: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class RolloutDevice:
    """A device that a rollout exposed; its state is an outcome, or `pending`, `silent` or `late` until there is one."""

    device: str
    name: str
    state: str
    stage: int
    reason: str
    attempt: int
    exposed_at: int
    noticed_at: int
    settled_at: int
    last_seen_at: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
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
    needs: list[GateNeeds]


@dataclass(frozen=True, kw_only=True)
class Quarantined:
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


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """A bundle that failed on a hardware class beyond the bound."""

    manifest: str
    hardware_class: str
    reason: str
    devices: int
    updated_at: int
    target: str


@dataclass(frozen=True, kw_only=True)
class Released:
    """How many failures stand in the way no more."""

    device: str
    name: str
    model: str
    released: int


@dataclass(frozen=True, kw_only=True)
class TokenMade:
    """A token, this once in clear."""

    token: str


@dataclass(frozen=True, kw_only=True)
class TokenSummary:
    """A token without its secret; `id` is the beginning of its hash."""

    id: str
    name: str
    role: str
    models: list[str]
    """To which its changes are narrowed; empty: to none."""
    cohorts: list[str]
    created_at: int
    expires_at: int


@dataclass(frozen=True, kw_only=True)
class GrantShown:
    """A role, narrowed where models or cohorts are named."""

    role: str
    models: list[str]
    cohorts: list[str]


@dataclass(frozen=True, kw_only=True)
class Me:
    """Who asks."""

    name: str
    kind: str
    """`token` or `person`"""
    project: str
    grants: list[GrantShown]
    csrf_token: str
    """What a browser sends along with a change, as X-CSRF-Token."""


@dataclass(frozen=True, kw_only=True)
class LoggedIn:
    """A session of the command line, shown this once."""

    token: str
    name: str
    expires_at: int


@dataclass(frozen=True, kw_only=True)
class SessionShown:
    """Somebody who is logged in; `id` is the beginning of a hash."""

    id: str
    name: str
    subject: str
    kind: str
    groups: list[str]
    created_at: int
    expires_at: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry, with the hash that the next one repeats."""

    id: int
    at: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    previous_hash: str
    hash: str
    seal: str


@dataclass(frozen=True, kw_only=True)
class ExportedEntry(Entry):
    """An entry with all that its hash is over, so that it can be verified alone."""

    project: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the audit log is what was written; else the first entry that is not, and why."""

    whole: bool
    broken_at: int | None
    why: str
    entries: int
    """That follow from each other, from the first on."""
    unsealed: int
    """Of those, written before there were seals."""
    head: str
    """Hash of the last of them."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """A server that answers, and its database with it."""

    status: str
    """`ok`, or `degraded`: devices are served, but blobs cannot be fetched or uploaded"""
    version: str
    project: str
    blobs: str = "ok"
    """`ok`, or the code of what is wrong with what keeps blobs, not older than 10 s"""


@dataclass(frozen=True, kw_only=True)
class WebhookShown:
    """A webhook, how many events have not arrived, how often it failed in a row, and until when it is left alone for that."""

    name: str
    url: str
    types: list[str]
    created_at: int
    created_by: str
    failures: int = 0
    open_at: int = 0
    waiting: int = 0
    dead: int = 0


@dataclass(frozen=True, kw_only=True)
class WebhookMade(WebhookShown):
    """A new webhook with the secret of its signatures, this once in clear."""

    secret: str


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """An event that has not arrived: `waiting` for its next try, or `dead`."""

    event: int
    state: str
    tries: int
    next_at: int
    error: str
    created_at: int


@dataclass(frozen=True, kw_only=True)
class Redelivered:
    """An event that will be sent again now."""

    webhook: str
    event: int
