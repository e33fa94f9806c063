"""What the operator's API answers with: the shapes in OpenAPI. Times are integer microseconds UTC."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class VariantSummary(BaseModel):
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


class BundleSummary(BaseModel):
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


class BundleDetail(BundleSummary):
    """A bundle with its signed config."""

    config: dict[str, Any]


class ModelSummary(BaseModel):
    """A model, its versions from the newest, and how many devices run one of them."""

    name: str
    versions: list[str]
    devices: int
    published_at: int


class RunningModel(BaseModel):
    """What a device runs of one model."""

    model: str
    version: str
    variant: str
    state: str
    reason: str


class DeviceSummary(BaseModel):
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


class DeviceList(BaseModel):
    """A page of devices by name; `next` is empty on the last page, else what to give as `after`."""

    devices: list[DeviceSummary]
    next: str


class Latency(BaseModel):
    """Engine time over the newest telemetry windows of what runs."""

    requests: int
    errors: int
    since: int
    p50_us: float | None
    p99_us: float | None


class ModelOnDevice(BaseModel):
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


class OfferState(BaseModel):
    """What the device should have; `known_serial` is what it said it knows."""

    epoch: int
    serial: int
    known_serial: int
    published: bool
    expires_at: int
    models: dict[str, Any]


class DeviceLogs(BaseModel):
    """The last log lines that the device sent, and when an operator last asked for them."""

    requested_at: int
    received_at: int
    lines: list[str]


class DeviceDetail(BaseModel):
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
    """The trust set that the device uses; 0 before it has one."""
    trust_state: str
    """Empty, or `trust_stale` / `clock_unset`: why it changes nothing now."""
    facts: dict[str, Any]
    offer: OfferState | None
    models: list[ModelOnDevice]
    logs: DeviceLogs | None


class FleetModel(BaseModel):
    """Devices by version that answers (`none`: nothing does) and by state; each as {real, simulated}."""

    versions: dict[str, dict[str, int]]
    states: dict[str, dict[str, int]]


class FleetState(BaseModel):
    """Counts over all devices, real and simulated apart."""

    devices: dict[str, dict[str, int]]
    models: dict[str, FleetModel]
