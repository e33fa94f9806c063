"""What a row of a scenario table says: releases, how they behave, what goes wrong, and what must come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from wherry_server.forecast import Member
from wherry_server.gates import Bound, Gate
from wherry_server.plan import Plan, Stage, Strategy
from wherry_shared.wire import Mode, Trial
from wherry_simulators import models
from wherry_simulators.faults import NONE, Faults
from wherry_simulators.models import Behaviour

MODEL = "detector"
HOUR_MS = 3_600_000
TRIAL = Trial(min_requests=20, max_s=300, canary_s=60)
FAILURE = Bound(share=0.1, sample_min=5)


def manifest_of(version: str, model: str = MODEL) -> str:
    """Return the manifest digest that stands for a version."""
    return models.digest_of(f"{model}/{version}")


@dataclass(frozen=True, slots=True)
class Release:
    """A bundle that is to come to the devices at some time: to all at once, or by a rollout in stages."""

    version: str
    behaviour: Behaviour = field(default_factory=Behaviour)
    at_ms: int = 0
    model: str = MODEL
    attempt: int = 1
    mode: Mode = "replace"
    share: float = 1.0
    group: str = ""
    """Releases at the same time and of the same group are offered together, all or none."""
    rollout: str = ""
    """Empty: one of its own, by version. The same for releases that promote or withdraw each other."""
    stages: tuple[Stage, ...] = ()
    """Empty: offered to every device at once, without a rollout."""
    failure: Bound = FAILURE
    plan: Plan | None = None
    """The whole plan of its rollout; None: one of its stages, with wide bounds on silence."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """Strata and time zones of devices, where a plan asks for them."""
    gates: tuple[Gate, ...] = ()
    """Gates of its rollout, of metrics without a control."""
    strategy: Strategy = "canary"
    trial: Trial = TRIAL
    ends: frozenset[str] = frozenset()
    """States in which its rollout may end; empty: any final one."""
    later: Behaviour | None = None
    """How it behaves from `later_ms` on; None: as before."""
    later_ms: int = 0

    @property
    def target(self) -> str:
        """The TUF target path, MODEL/VERSION."""
        return f"{self.model}/{self.version}"

    @property
    def manifest(self) -> str:
        """The digest that stands for its manifest."""
        return manifest_of(self.version, self.model)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row. Its name is a sentence that the run has to make true."""

    name: str
    releases: tuple[Release, ...]
    faults: Faults = NONE
    ends_on: frozenset[str] = frozenset()
    """Versions of `MODEL` that a device may run at the end; empty: any that was released."""
    said: frozenset[str] = frozenset()
    """What devices must have reported: `STATE`, `STATE REASON` or `STATE MODE`, each by at least one of them."""
    devices: int = 20
    requests_per_s: float = 2.0
    offer_life_s: int = 7 * 86_400
    silent: frozenset[str] = frozenset()
    """Devices that hear and say nothing from `silent_from_ms` on, until every rollout has ended."""
    silent_from_ms: int = 0
    settle_ms: int = 12 * HOUR_MS
    """How long after the last fault and release everything may take to settle, without anybody's help."""
    unsaid: frozenset[str] = frozenset()
    """What no device may have reported, in the same words."""
    engines: tuple[tuple[int, str], ...] = ()
    """(when, version): what the engine on every device is replaced by; `models.NO_ENGINE` takes it away."""
    power_cuts: tuple[int, ...] = ()
    """When every device loses its power, for as long as a boot takes."""
    rot_at_ms: int = 0
    """When the disk of every device alters the file that serves; 0: never."""
    worker_ends: tuple[int, ...] = ()
    """When the worker on every device ends, for a reason of its own."""
    restore_at_ms: int = 0
    """When the server is restored from a backup that is two offers old; 0: never."""
