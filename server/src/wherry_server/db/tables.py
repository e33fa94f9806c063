"""Every table, as SQLModel classes. Times are integer microseconds UTC; every table has `project_id`.

These are not wire types: devices never see a row. JSON columns hold values whose types live elsewhere (plans in
`rollout`, facts in `wherry_shared.facts`); they are parsed where they are used.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import JSON
from sqlmodel import Field, SQLModel


def _json(nullable: bool = False) -> Any:
    return Field(default_factory=dict, sa_column=Column(JSON, nullable=nullable))


def _searched() -> Any:
    """JSON that selectors look into."""
    return Field(default_factory=dict, sa_column=Column(JSON().with_variant(JSONB(), "postgresql"), nullable=False))


def _time(**kwargs: Any) -> Any:
    return Field(sa_type=BigInteger, **kwargs)


def table(model: type[SQLModel]) -> Table:
    """Return the table of a class, for statements that make no ORM objects: `table(Device).c.name`."""
    found: Table = model.__table__  # type: ignore[attr-defined]  # SQLModel adds it to classes with table=True
    return found


class Project(SQLModel, table=True):
    """A tenant: its models, fleets, keys and people are its own. `project_id` is its own id."""

    __tablename__ = "project"
    project_id: str = Field(primary_key=True)
    created_at: int = _time()


class Bundle(SQLModel, table=True):
    """A signed release that the server accepted: (model, version) is bound to one manifest digest for ever."""

    __tablename__ = "bundle"
    __table_args__ = (UniqueConstraint("project_id", "model", "version"), UniqueConstraint("project_id", "manifest"))
    id: int | None = Field(default=None, primary_key=True)
    project_id: str = Field(index=True)
    model: str = Field(index=True)
    version: str
    manifest: str
    manifest_bytes: int = _time()
    config: dict[str, Any] = _json()
    """The parsed signed config, for listing; devices get the signed bytes from the blob store."""
    total_bytes: int = _time()
    created_at: int = _time()
    created_by: str


class BlobEncoding(SQLModel, table=True):
    """Another way to fetch a raw blob: a separate immutable object."""

    __tablename__ = "blob_encoding"
    digest: str = Field(primary_key=True)
    encoding: str = Field(primary_key=True)
    project_id: str = Field(primary_key=True)
    encoded_digest: str = Field(index=True)
    bytes: int = _time()


class BlobOwner(SQLModel, table=True):
    """Which project may read which blob (raw or encoded): blobs themselves are shared by digest."""

    __tablename__ = "blob_owner"
    project_id: str = Field(primary_key=True)
    digest: str = Field(primary_key=True)
    bytes: int = _time()
    created_at: int = _time()
    kind: str = "other"
    """`manifest`, `weights` (also assets: what is worth encoding), `encoding`, `other`"""


class Device(SQLModel, table=True):
    """An enrolled agent."""

    __tablename__ = "device"
    __table_args__ = (
        UniqueConstraint("project_id", "name"),
        Index("ix_device_seen", "project_id", "last_seen_at"),
        Index("ix_device_key", "project_id", "key_digest"),
    )
    id: str = Field(primary_key=True)
    project_id: str = Field(index=True)
    name: str
    state: str = "active"
    """`active`, `revoked`, `quarantined`, `decommissioned`"""
    state_reason: str = ""
    """Why it is in quarantine: `cloned`, `flooding`."""
    labels: dict[str, Any] = _searched()
    facts: dict[str, Any] = _searched()
    bearer_hash: str
    key_digest: str = ""
    """Of the public key in its certificate: an enrolment that is repeated is told by it, and a key that somebody has."""
    certificate_serial: str = ""
    certificate_expires_at: int = _time(default=0)
    enrolled_at: int = _time()
    last_seen_at: int = _time(default=0)
    offer_epoch: int = _time(default=0)
    """What the device last said it knows (hello)."""
    offer_serial: int = _time(default=0)
    boot: str = ""
    hello_at: int = _time(default=0)
    """When the last accepted hello was said, by the device's clock."""
    hello_streams: dict[str, Any] = _json(nullable=True)
    """Stream → [epoch, next number] of that hello."""
    wipe: str = ""
    """Of a decommissioned device: what it was asked to remove."""
    places: dict[str, Any] = _json(nullable=True)
    """From where it spoke: `clones.Places`."""
    trust_version: int = _time(default=0)
    """The number of the trust set that the device uses."""
    trust_state: str = ""
    """Empty, or `trust_stale` / `clock_unset`."""
    simulated: bool = False
    """Label `simulated=true` at enrolment: counted apart everywhere."""
    content_key: str = ""
    """Its X25519 public key, for which content keys are wrapped; empty: it has none, and gets nothing that is encrypted."""


class ContentKey(SQLModel, table=True):
    """The content key of one encrypted blob of a bundle, sealed for the `keys` role: ciphertext to everybody else."""

    __tablename__ = "content_key"
    project_id: str = Field(primary_key=True)
    manifest: str = Field(primary_key=True)
    blob: str = Field(primary_key=True)
    model: str
    plain: str
    recipient: str = Field(index=True)
    """Digest of the public key of the `keys` role that opens it."""
    sealed: str
    created_at: int = _time()


class WrappedKey(SQLModel, table=True):
    """The same key, wrapped for one device: it alone gets the row, and it alone opens it."""

    __tablename__ = "wrapped_key"
    device_id: str = Field(primary_key=True)
    blob: str = Field(primary_key=True)
    project_id: str
    model: str
    plain: str
    public: str
    """The public key of the device that opens it."""
    recipient: str
    """Its digest."""
    sealed: str
    created_at: int = _time()


class DeviceCertificate(SQLModel, table=True):
    """A certificate that was issued to a device, until it expires."""

    __tablename__ = "device_certificate"
    serial: str = Field(primary_key=True)
    """In hex."""
    project_id: str
    device_id: str = Field(index=True)
    issued_at: int = _time()
    expires_at: int = _time()
    revoked_at: int = _time(default=0)


class SessionCut(SQLModel, table=True):
    """A device whose session at the broker is to be ended."""

    __tablename__ = "session_cut"
    device_id: str = Field(primary_key=True)
    project_id: str
    asked_at: int = _time()


class DeviceModel(SQLModel, table=True):
    """The current word of a device about one model: the newest report by (epoch known, seq)."""

    __tablename__ = "device_model"
    __table_args__ = (Index("ix_device_model_running", "project_id", "model", "running"),)
    device_id: str = Field(primary_key=True)
    model: str = Field(primary_key=True)
    project_id: str = Field(index=True)
    state: str
    target: str = ""
    manifest: str = ""
    running: str = ""
    running_variant: str = ""
    rollout_id: str = ""
    attempt: int = 0
    reason: str = ""
    detail: str = ""
    requests: int = _time(default=0)
    errors: int = _time(default=0)
    latency_ratio: float = 0.0
    trial_end: str = ""
    body: dict[str, Any] = _json()
    """The whole report."""
    stream_epoch: str = ""
    seq: int = _time(default=0)
    updated_at: int = _time()


class Stream(SQLModel, table=True):
    """How far a stream of a device is stored, without gaps; what fell below `first` is counted as lost."""

    __tablename__ = "stream"
    device_id: str = Field(primary_key=True)
    stream: str = Field(primary_key=True)
    epoch: str = Field(primary_key=True)
    project_id: str
    contiguous: int = _time(default=0)
    highest: int = _time(default=0)
    """The highest sequence number stored; above `contiguous` while messages in between are on their way."""
    lost: int = _time(default=0)
    opened_at: int = _time(default=0)
    """When the first message of this epoch came: of two epochs the later one speaks for the device."""
    updated_at: int = _time()


class ReportLog(SQLModel, table=True):
    """Every report once."""

    __tablename__ = "report_log"
    __table_args__ = (Index("ix_report_log_time", "project_id", "received_at"),)
    device_id: str = Field(primary_key=True)
    epoch: str = Field(primary_key=True)
    seq: int = Field(primary_key=True, sa_type=BigInteger)
    project_id: str
    model: str
    state: str
    reason: str = ""
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    received_at: int = _time()


class TelemetryLog(SQLModel, table=True):
    """Every telemetry message once; its windows are in `telemetry_window`."""

    __tablename__ = "telemetry_log"
    __table_args__ = (Index("ix_telemetry_log_time", "project_id", "received_at"),)
    device_id: str = Field(primary_key=True)
    epoch: str = Field(primary_key=True)
    seq: int = Field(primary_key=True, sa_type=BigInteger)
    project_id: str
    at: int = _time()
    memory_available_bytes: int = _time(default=0)
    disk_free_bytes: int = _time(default=0)
    dropped: int = _time(default=0)
    received_at: int = _time()


class TelemetryWindow(SQLModel, table=True):
    """Measurements of one (model, bundle, variant, arm) over one stretch of time."""

    __tablename__ = "telemetry_window"
    __table_args__ = (Index("ix_window_model", "project_id", "model", "start"),)
    device_id: str = Field(primary_key=True)
    epoch: str = Field(primary_key=True)
    seq: int = Field(primary_key=True, sa_type=BigInteger)
    position: int = Field(primary_key=True)
    project_id: str
    model: str
    manifest: str
    variant: str
    arm: str
    rollout_id: str = ""
    attempt: int = 0
    start: int = _time()
    duration_us: int = _time()
    requests: int = _time(default=0)
    errors: int = _time(default=0)
    fallbacks: int = _time(default=0)
    crashes: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
    body: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """The window as JSON: sketches and histograms."""


class TelemetryMetric(SQLModel, table=True):
    """What an application told in a window, by name; `position` is the window's."""

    __tablename__ = "telemetry_metric"
    __table_args__ = (Index("ix_metric_model", "project_id", "model", "name", "start"),)
    device_id: str = Field(primary_key=True)
    epoch: str = Field(primary_key=True)
    seq: int = Field(primary_key=True, sa_type=BigInteger)
    position: int = Field(primary_key=True)
    name: str = Field(primary_key=True)
    project_id: str
    model: str
    manifest: str
    arm: str
    start: int = _time()
    count: int = _time()
    total: float


class Offer(SQLModel, table=True):
    """The current signed offer of a device. Publishing is an outbox drained from this row."""

    __tablename__ = "offer"
    device_id: str = Field(primary_key=True)
    project_id: str
    epoch: int = _time()
    serial: int = _time()
    envelope: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    models: dict[str, Any] = _json()
    """Offered models as builtins, to compose the next offer from."""
    flags: dict[str, Any] = Field(
        default_factory=dict, sa_column=Column("flags", JSON, nullable=False, server_default=text("'{}'"))
    )
    """Offered flags, as `wherry_shared.flags.encode` has them."""
    issued_at: int = _time()
    expires_at: int = _time()


class Unpublished(SQLModel, table=True):
    """A device whose current offer the broker has not acknowledged: a small row, so that many are written and gone quickly."""

    __tablename__ = "unpublished"
    device_id: str = Field(primary_key=True)
    project_id: str
    epoch: int = _time()
    serial: int = _time()


class Cohort(SQLModel, table=True):
    """A saved selector over facts and labels."""

    __tablename__ = "cohort"
    __table_args__ = (UniqueConstraint("project_id", "name"),)
    id: int | None = Field(default=None, primary_key=True)
    project_id: str = Field(index=True)
    name: str
    selector: str
    created_at: int = _time()
    created_by: str
    kept: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """Devices of a static cohort, when it was made; 0 of a live one."""
    kept_from: str = Field(default="", sa_column=Column(String, nullable=False, server_default=""))
    """The selector that took them."""


class KeptMember(SQLModel, table=True):
    """A device of a static cohort. A list never changes, and outlives its cohort: rollouts have its selector (`kept_lists`)."""

    __tablename__ = "kept_member"
    list_id: str = Field(primary_key=True)
    device_id: str = Field(primary_key=True)
    project_id: str


class Flag(SQLModel, table=True):
    """A feature flag as an operator defined it."""

    __tablename__ = "flag"
    project_id: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    definition: dict[str, Any] = _json()
    salt: str
    revision: int = _time(default=1)
    created_at: int = _time()
    created_by: str
    updated_at: int = _time()
    updated_by: str


class Rollout(SQLModel, table=True):
    """A plan under way. `revision` guards every change (compare-and-set)."""

    __tablename__ = "rollout"
    id: str = Field(primary_key=True)
    project_id: str = Field(index=True)
    number: int = _time()
    """Small per-project number that people type."""
    model: str = Field(index=True)
    plan: dict[str, Any] = _json()
    """A parsed and validated plan; holds a list of (model, bundle)."""
    progress: dict[str, Any] = _json()
    state: str = Field(index=True)
    reason: str = ""
    salt: str
    priority: int = 0
    revision: int = _time(default=1)
    lease_epoch: int = _time(default=0)
    wanted: str = ""
    """What an operator asked for and the director has not yet applied: start, pause, resume, abort, revert."""
    created_at: int = _time()
    created_by: str
    updated_at: int = _time()


class RolloutStatus(SQLModel, table=True):
    """What the director last saw of a rollout under way: who asks how it stands need not count a fleet."""

    __tablename__ = "rollout_status"
    rollout_id: str = Field(primary_key=True)
    project_id: str
    evidence: dict[str, Any] = _json()
    outcomes: list[Any] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    at: int = _time()


class Assignment(SQLModel, table=True):
    """A device exposed to a rollout: what it came from, what it should have, what became of it."""

    __tablename__ = "assignment"
    __table_args__ = (
        Index("ix_assignment_rollout", "rollout_id", "outcome"),
        Index("ix_assignment_device", "device_id", "model"),
        Index("ix_assignment_manifest", "to_manifest"),
    )
    rollout_id: str = Field(primary_key=True)
    device_id: str = Field(primary_key=True)
    model: str = Field(primary_key=True)
    project_id: str
    stage: int
    stratum: str = ""
    share_key: int = Field(sa_column=Column("share_key", BigInteger, nullable=False))
    """64-bit key minus 2**63, so that it fits a signed column."""
    from_manifest: str = ""
    from_target: str = ""
    to_manifest: str
    to_target: str
    attempt: int = 1
    exposed_at: int = _time()
    noticed_at: int = _time(default=0)
    """When the device first spoke of it; 0 while it has not."""
    outcome: str = "exposed"
    """`exposed`, `proved`, `confirmed`, `confirmed_idle`, `returned`, `failed`, `refused`, `excused`, `withdrawn`,
    `revert_pending`, `reverted`, `superseded`"""
    reason: str = ""
    detail: str = ""
    settled_at: int = _time(default=0)
    requests: int = _time(default=0)
    errors: int = _time(default=0)
    latency_ratio: float = 0.0
    released_at: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    """When an operator let the device out of the quarantine that its failure put it in."""
    simulated: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    """Whether the device is."""
    tried: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    """Whether the candidate is to run beside the incumbent, or to stand by."""
    compared: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    agreed: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    skipped: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    """Runs of a shadow that were compared, that agreed, and that the device's CPU budget did not allow."""


class Approval(SQLModel, table=True):
    """Somebody agreed that a stage begins."""

    __tablename__ = "approval"
    rollout_id: str = Field(primary_key=True)
    stage: int = Field(primary_key=True)
    round: int = Field(default=1, sa_column=Column(Integer, primary_key=True, server_default="1"))
    actor: str = Field(primary_key=True)
    project_id: str
    at: int = _time()


class Decision(SQLModel, table=True):
    """What the rollout engine decided, and on what evidence: append-only, replayable."""

    __tablename__ = "decision"
    rollout_id: str = Field(primary_key=True)
    revision: int = Field(primary_key=True, sa_type=BigInteger)
    project_id: str
    at: int = _time()
    decisions: list[Any] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    evidence: dict[str, Any] = _json()
    progress_before: dict[str, Any] = _json()


class KnownBad(SQLModel, table=True):
    """A bundle that failed on a hardware class beyond the bound: not offered there again."""

    __tablename__ = "known_bad"
    project_id: str = Field(primary_key=True)
    manifest: str = Field(primary_key=True)
    hardware_class: str = Field(primary_key=True)
    reason: str
    devices: int = 1
    updated_at: int = _time()


class EnrolmentToken(SQLModel, table=True):
    """A token by which devices enrol: stored as a hash, with a count and an expiry."""

    __tablename__ = "enrolment_token"
    token_hash: str = Field(primary_key=True)
    project_id: str
    uses_left: int
    expires_at: int = _time()
    labels: dict[str, Any] = _json()
    hold: bool = False
    """Whether a person has to accept each device that comes with it."""
    created_at: int = _time()
    created_by: str


class EnrolmentRequest(SQLModel, table=True):
    """A key that waits for a person, or that a person let in before it came."""

    __tablename__ = "enrolment_request"
    project_id: str = Field(primary_key=True)
    key_digest: str = Field(primary_key=True)
    state: str
    """`pending`: a person has to say; `expected`: it may enrol; `refused`."""
    name: str
    """Under which it asks, or has to come; empty: any."""
    labels: dict[str, Any] = _json()
    facts: dict[str, Any] = _json()
    created_at: int = _time()
    expires_at: int = _time()
    created_by: str


class ApiToken(SQLModel, table=True):
    """A token of a person or machine that operates: stored as a hash."""

    __tablename__ = "api_token"
    token_hash: str = Field(primary_key=True)
    project_id: str
    name: str
    role: str
    models: list[Any] = Field(default_factory=list, sa_column=Column(JSON, nullable=False, server_default=text("'[]'")))
    cohorts: list[Any] = Field(
        default_factory=list, sa_column=Column(JSON, nullable=False, server_default=text("'[]'"))
    )
    """What narrows the role; empty: nothing does."""
    expires_at: int = _time()
    created_at: int = _time()


class Session(SQLModel, table=True):
    """A person who is logged in: stored as a hash, with the groups that the provider named."""

    __tablename__ = "session"
    session_hash: str = Field(primary_key=True)
    project_id: str = Field(index=True)
    kind: str
    """`browser`, `cli`, or `code`: what the command line fetches its session with, once"""
    subject: str
    name: str
    groups: list[Any] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    challenge: str = ""
    created_at: int = _time()
    expires_at: int = _time()


class Idempotency(SQLModel, table=True):
    """The answer to a create, for whoever sends it again with the same key."""

    __tablename__ = "idempotency"
    project_id: str = Field(primary_key=True)
    key_hash: str = Field(primary_key=True)
    """Of the token's hash and the key."""
    fingerprint: str
    """Of method, path and body."""
    status: int = 0
    """0 until the answer is here."""
    answer: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """Sealed: it may hold a secret that is shown once."""
    created_at: int = _time(index=True)


class Webhook(SQLModel, table=True):
    """Another system that is told what the audit log says."""

    __tablename__ = "webhook"
    __table_args__ = (UniqueConstraint("project_id", "name"),)
    id: str = Field(primary_key=True)
    project_id: str
    name: str
    url: str
    types: list[Any] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    """Patterns of actions."""
    position: int = _time(default=0)
    """The last entry of the audit log that was taken up."""
    created_at: int = _time()
    created_by: str
    failures: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """In a row."""
    open_at: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    """It is left alone until then."""


class WebhookDelivery(SQLModel, table=True):
    """An entry that has not arrived at a webhook."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (Index("ix_webhook_delivery_due", "webhook_id", "state", "next_at"),)
    webhook_id: str = Field(primary_key=True)
    event: int = Field(primary_key=True)
    """Id of the entry."""
    project_id: str
    state: str
    """`waiting` or `dead`"""
    tries: int = 0
    next_at: int = _time(default=0)
    error: str = ""
    created_at: int = _time()


class Lease(SQLModel, table=True):
    """Who does a job now: saves work; correctness is compare-and-set on revisions and `epoch`."""

    __tablename__ = "lease"
    role: str = Field(primary_key=True)
    project_id: str
    holder: str
    epoch: int = _time()
    expires_at: int = _time()


class AuditEntry(SQLModel, table=True):
    """Append-only and hash-chained: who did what, before and after."""

    __tablename__ = "audit_entry"
    __table_args__ = (UniqueConstraint("project_id", "previous_hash"),)
    id: int | None = Field(default=None, primary_key=True)
    project_id: str = Field(index=True)
    at: int = _time()
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] = _json()
    previous_hash: str
    hash: str
    seal: str = Field(default="", sa_column=Column(String, nullable=False, server_default=""))
    """By the server's key over the hash: who can only write to the database makes none."""


class AuditHead(SQLModel, table=True):
    """How long the log of a project is and what its last entry is, so that a missing end shows."""

    __tablename__ = "audit_head"
    project_id: str = Field(primary_key=True)
    entries: int = _time(default=0)
    entry_id: int = _time(default=0)
    hash: str
    seal: str = ""


class LogRequest(SQLModel, table=True):
    """Log lines of a device, fetched when an operator asks."""

    __tablename__ = "device_log"
    device_id: str = Field(primary_key=True)
    project_id: str
    lines: list[Any] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    requested_at: int = _time(default=0)
    received_at: int = _time(default=0)
