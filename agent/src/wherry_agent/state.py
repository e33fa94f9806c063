"""The values that the update machine moves between: the device's state, what can happen to it, what it may ask for.

All frozen. `machine.step` is the only place that makes a new state out of an old one; `journal` writes one to disk
under names of its own. An event that speaks of a model also names which manifest and attempt (or which trial, digest or
revision) it speaks of, so that a late or repeated one can be told apart and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from wherry_agent.children import ArmStats, Candidate, Judged, Loadable, Ran, ServeModel, Trust
from wherry_shared.bundle import Contract, Interface
from wherry_shared.clock import Since
from wherry_shared.wire import Mode, Offer, OfferedModel, Report, VariantTried

Task = Literal["resolve", "fetch", "judge"]
"""What a courier or a canary does for a slot."""

Passed = Literal["", "requests", "idle"]
"""By what a candidate passed its trial: by its requests, or without enough of them by its golden vectors."""

# --- what a slot is made of ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Installed:
    """A version that ended its trial well here; its files stay on disk."""

    offered: OfferedModel
    """Under which terms it came, without the fleet's figures."""
    loadable: Loadable
    order: int = 0
    """Device-wide count of confirmations: the highest is the first suspect when the worker crashes in a loop."""
    idle: bool = False
    """Confirmed by golden vectors only, without enough requests."""
    tried: tuple[VariantTried, ...] = ()
    """Which variants were weighed, and why this one was taken."""
    generation: int = 0
    """The same for all that were confirmed together as a group; 0: confirmed alone."""

    @property
    def manifest(self) -> str:
        """Manifest digest of the bundle."""
        return self.loadable.manifest


@dataclass(frozen=True, slots=True)
class Counts:
    """What the candidate did in its trial; `earlier_*` are those of worker processes that died in it."""

    requests: int = 0
    errors: int = 0
    fallbacks: int = 0
    latency_ratio: float = 0.0
    compared: int = 0
    agreed: int = 0
    skipped: int = 0
    """Of a shadow: its answers that were compared, those that agreed, requests that its CPU budget did not allow."""
    earlier_requests: int = 0
    earlier_errors: int = 0
    earlier_fallbacks: int = 0
    earlier_compared: int = 0
    earlier_agreed: int = 0
    earlier_skipped: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """The way of one offered bundle to this device; `candidates[0]` is the variant in hand."""

    offered: OfferedModel
    serial: int
    candidates: tuple[Candidate, ...] = ()
    tried: tuple[VariantTried, ...] = ()
    canaries: int = 0
    """Variants given to the canary so far, at most `trial.variant_tries`."""
    troubles: int = 0
    """Troubles (network, disk, trust) in a row; sets the back-off."""
    restarts: int = 0
    """Restarts of the supervisor or the machine while this candidate was tried."""
    downs: int = 0
    """Of these, the ones that nobody had ordered."""
    downs_shared: bool = False
    """In one of them something else was tried as well: who took the machine down, nobody knows."""
    preprocess_id: str = ""
    reported: str = ""
    """Reason of the last trouble that was reported: the same one is not reported again."""
    proved: Candidate | None = None
    """The variant that passed its canary here under an earlier offer of this bundle; its files are still here."""
    again: bool = False
    """What served last is tried again because nothing serves (`Held`): no offer has to ask for it."""

    @property
    def loadable(self) -> Loadable:
        """The variant in hand."""
        return self.candidates[0].loadable


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is under way; the incumbent serves, if there is one. Left by a newer offer."""


@dataclass(frozen=True, slots=True)
class Resolving:
    """The courier goes from target to a ranked list of variants."""

    job: Job
    since: Since


@dataclass(frozen=True, slots=True)
class Fetching:
    """The courier downloads the variant in hand."""

    job: Job
    since: Since


@dataclass(frozen=True, slots=True)
class Judging:
    """The canary runs the golden vectors of the variant in hand."""

    job: Job
    since: Since


@dataclass(frozen=True, slots=True)
class Queued:
    """Judged good; waits until no other model of this device is being swapped or tried, and for all of its group."""

    job: Job
    since: Since


@dataclass(frozen=True, slots=True)
class Swapping:
    """The worker was told to serve the candidate and has not said yet that it does."""

    job: Job
    since: Since
    trial: str
    crashes: int = 0
    began: Since | None = None
    """When the trial began, if it already had."""
    counts: Counts = Counts()


@dataclass(frozen=True, slots=True)
class OnTrial:
    """The candidate does what its mode says: answers, answers a share, runs beside the incumbent, or stands by."""

    job: Job
    since: Since
    trial: str
    crashes: int = 0
    counts: Counts = Counts()
    passed: Passed = ""
    """By what it passed, while it waits for the others of its group."""


@dataclass(frozen=True, slots=True)
class Proving:
    """The trial's time is over without enough evidence: the worker runs the golden vectors again, in place."""

    job: Job
    since: Since
    trial: str
    began: Since
    """When the trial began."""
    crashes: int = 0
    counts: Counts = Counts()
    enough: bool = False
    """There were enough requests and nothing spoke against it; only latency could not be compared."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The time of a shadow, a split or a standby is over: the incumbent serves alone, the candidate's files stay.

    Left by a newer offer; one that names the same bundle needs no download and no canary.
    """

    job: Job
    counts: Counts = Counts()


@dataclass(frozen=True, slots=True)
class Returning:
    """The worker was told to serve the incumbent again and has not said yet that it does."""

    job: Job
    since: Since
    reason: str
    detail: str
    tries: int = 0
    counts: Counts = Counts()


@dataclass(frozen=True, slots=True)
class Waiting:
    """Trouble around the model (never evidence against it): the same work is tried again after `wait_ms`."""

    job: Job
    since: Since
    reason: str
    detail: str
    wait_ms: int
    then: Task


@dataclass(frozen=True, slots=True)
class Safe:
    """Nothing that this device has of the model can serve: it answers no requests, and says so. Left by an offer.

    What served last leads out as well, when it is due to be tried again (`Held`).
    """

    reason: str
    detail: str


Phase = (
    Idle
    | Resolving
    | Fetching
    | Judging
    | Queued
    | Swapping
    | OnTrial
    | Proving
    | Compared
    | Returning
    | Waiting
    | Safe
)


@dataclass(frozen=True, slots=True)
class End:
    """What names one attempt to bring a bundle here; one that came to nothing is not made again."""

    manifest: str
    rollout: str
    attempt: int
    mode: Mode = "replace"


@dataclass(frozen=True, slots=True)
class Held:
    """The version that served last, where nothing does any more: its files stay, and `wait_ms` after `since` it may try again."""

    version: Installed
    since: Since
    wait_ms: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One model on this device."""

    incumbent: Installed | None = None
    """The version trusted now."""
    last_good: Installed | None = None
    """The one trusted before it: where a crash loop leads back to."""
    phase: Phase = Idle()
    contract: Interface | None = None
    """What applications rely on: the interface of the first confirmed bundle."""
    contract_preprocess: str = ""
    ends: tuple[End, ...] = ()
    unfit: tuple[End, ...] = ()
    """Those of `ends` that came to nothing for want of an engine: other engines on this device reopen them."""
    settled: End | None = None
    """The offer under which the incumbent (or its absence) was last reported."""
    faults: int = 0
    """Failures in a row to bring the incumbent into service."""
    told: Report | None = None
    """The last report about it, also after the server has it."""
    rejudging: Rejudging | None = None
    held: Held | None = None


# --- the device ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KnownBad:
    """A variant that failed on this device with this engine; `attempt` is the highest that did."""

    digest: str
    engine: str
    engine_version: str
    reason: str
    attempt: int
    manifest: str = ""
    """The only bundle of which this is said, by a verdict (`reasons.OF_THE_BUNDLE`) that another may not deserve with the same file."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The newest offer that was verified: what the device should have."""

    epoch: int
    serial: int
    digest: str
    expires_at: int
    models: Mapping[str, OfferedModel] = field(default_factory=dict)
    unsupported: str = ""
    """Why nothing of it is acted on; empty if it is."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Group → its models, which come all or none."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Feature flags of this device: those of the newest offer that is acted on."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What applications rely on, in somebody's own words; wins over the interface of the first confirmed version."""

    contract: Contract
    by: Literal["settings", "application"]


@dataclass(frozen=True, slots=True)
class TrustWatch:
    """When trust is refreshed next: after `wait_ms` since `since`, or it is under way since then."""

    since: Since
    wait_ms: int = 0
    running: bool = False
    troubles: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Crashes:
    """Deaths of the worker that no trial caused, counted in a window, and on over boots until one passes without any."""

    since: Since
    count: int
    rebooted: bool = False
    """The machine was started since the last of them."""
    running: Mapping[str, int] = field(default_factory=dict)
    """Model → in how many of them its confirmed version was being loaded or run."""


@dataclass(frozen=True, slots=True)
class Downs:
    """Ends of the agent that nobody had ordered, with nothing on trial, in a row; a life that lasts ends the row."""

    since: Since
    """When this life of the agent began."""
    count: int


@dataclass(frozen=True, slots=True)
class Falls:
    """Short lives of the agent in a row that nobody ended, since a version was confirmed on a device that was calm."""

    model: str
    """Whose version was confirmed last: what gives way."""
    since: Since
    """When this life began, or the version was confirmed in it."""
    count: int = 0
    lasted: bool = False
    """This life is not a short one any more."""


@dataclass(frozen=True, slots=True)
class Told:
    """A serving set that the worker was told, as long as it has not answered for all of it."""

    since: Since
    waiting: tuple[str, ...]
    """Models that it did not answer for yet, in its order: it is stuck at the first."""


@dataclass(frozen=True, slots=True)
class Again:
    """Work that came to nothing, done again `wait_ms` after `since`; it did `troubles` times in a row."""

    since: Since
    wait_ms: int
    troubles: int


@dataclass(frozen=True, slots=True)
class Rejudging:
    """The canary runs a confirmed version with a new engine; counted over boots, since it may take the machine down."""

    digest: str
    engine_version: str
    running: bool = True
    downs: int = 0
    """Ends of the machine meanwhile that nobody had ordered."""
    shared: bool = False
    """In one of them something else was tried or judged, too."""


@dataclass(frozen=True, slots=True)
class Denied:
    """An engine that the worker cannot load; a probe that finds the same version is not believed before the wait is over."""

    version: str
    digest: str
    """Of the variant for which the worker missed it."""
    since: Since
    wait_ms: int
    troubles: int
    found: bool = False
    """A probe found it meanwhile."""


@dataclass(frozen=True, slots=True)
class Engines:
    """Which engines are on disk, which ones the worker has in memory, and what is done where they differ."""

    installed: Mapping[str, str] = field(default_factory=dict)
    """Engine → version, as a probe found it last."""
    loaded: Mapping[str, str] = field(default_factory=dict)
    """Engine → version, as the worker that answers said."""
    judging: Mapping[str, Since] = field(default_factory=dict)
    """Models whose confirmed version the canary runs with an engine that it was not proved with."""
    handing_over: Since | None = None
    wanted: str = ""
    """Why another worker is to take over, beside what the versions say."""
    barred: bool = False
    """Since the last probe a hand-over was made or came to nothing; the next probe, or its time, allows another."""
    again: Mapping[str, Again] = field(default_factory=dict)
    """Models whose canary with a new engine came to no verdict."""
    hand_over_again: Again | None = None
    """The last hand-over came to nothing."""
    denied: Mapping[str, Denied] = field(default_factory=dict)
    """Engines of which the worker said that they are missing, until it serves with them what it missed them for."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a device must not forget; one journal record."""

    device: str
    project: str
    stream: str
    """Epoch of the report stream: random, made with the journal."""
    models: Mapping[str, Slot] = field(default_factory=dict)
    known_bad: tuple[KnownBad, ...] = ()
    owed: tuple[Report, ...] = ()
    """Reports that the server did not acknowledge yet, in order, gapless; `first` is filled in when sent."""
    seq: int = 1
    """Number of the next report."""
    offer: Accepted | None = None
    trust: Trust | None = None
    watch: TrustWatch | None = None
    revision: int = 0
    """Of the desired serving set; grows with every change of it."""
    confirmations: int = 0
    crashes: Crashes | None = None
    downs: Downs | None = None
    falls: Falls | None = None
    """None: how the machine ends is held against nothing that is confirmed here."""
    stopped: bool = False
    """The agent was told to end: what is tried has not taken it down."""
    told: Told | None = None
    contracts: Mapping[str, Declared] = field(default_factory=dict)
    """Declared contracts by model, also of models that are not here yet."""
    engines: Engines = Engines()


def renumbered(state: State, stream: str) -> State:
    """Begin a new report stream with the reports still owed."""
    owed = tuple(
        msgspec.structs.replace(report, epoch=stream, seq=number) for number, report in enumerate(state.owed, start=1)
    )
    return replace(state, stream=stream, owed=owed, seq=len(owed) + 1)


# --- events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; sent at `machine.next_deadline_ms` or later."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The server can be reached again, or may be downloaded from again: the conditions of the settings hold."""


@dataclass(frozen=True, slots=True)
class Offered:
    """The courier verified an offer for this device; `digest` is that of the payload."""

    offer: Offer
    digest: str
    trust: Trust


@dataclass(frozen=True, slots=True)
class Revocation:
    """A publisher's word about a version that this device has."""

    model: str
    manifest: str
    effect: Literal["replace", "stop"]


@dataclass(frozen=True, slots=True)
class Refreshed:
    """Trust is up to date; `revoked` is what publishers say of versions that are here."""

    trust: Trust
    revoked: tuple[Revocation, ...] = ()


@dataclass(frozen=True, slots=True)
class RefreshFailed:
    """Trust could not be refreshed."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """The courier verified the bundle and ranked its variants."""

    model: str
    manifest: str
    attempt: int
    candidates: tuple[Candidate, ...]
    passed_over: tuple[VariantTried, ...] = ()
    preprocess_id: str = ""
    trust: Trust | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """Everything that the variant needs is on disk, verified."""

    model: str
    manifest: str
    attempt: int
    variant: str


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A courier or canary could not do its task; not a verdict. `task` says which."""

    model: str
    manifest: str
    attempt: int
    task: Task
    reason: str
    detail: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class CanaryDone:
    """The canary's verdict on the variant whose file has `digest`."""

    model: str
    manifest: str
    attempt: int
    digest: str
    result: Judged


@dataclass(frozen=True, slots=True)
class EnginesProbed:
    """These engines ran a model on this device just now: engine → version."""

    installed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rejudged:
    """The canary's verdict on a confirmed version, run with an engine that was installed after it was confirmed."""

    model: str
    digest: str
    engine_version: str
    result: Judged


@dataclass(frozen=True, slots=True)
class HandOverAsked:
    """The operator wants another worker process."""

    why: str


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Another worker answers now; or, where `trouble` says why, the same one as before."""

    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The agent was told to end, or cannot start for a reason of its own: the last event of a life that ends in order."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A new worker process listens and serves nothing yet."""


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The worker process is gone; the daemon starts another at once. `ordered`: it was ended by `RestartWorker`."""

    detail: str
    ordered: bool = False
    ran: tuple[Ran, ...] = ()
    """What it was loading or running; empty: nothing, or nobody knows, and then it may have been anybody's doing."""


@dataclass(frozen=True, slots=True)
class Served:
    """The worker serves (or could not) `digest` for a model, in answer to a `Serve` of that revision."""

    model: str
    digest: str
    revision: int
    ok: bool
    reason: str = ""
    detail: str = ""
    incumbent_loaded: bool = True
    """Whether the incumbent of a trial is in memory beside the candidate."""
    engine_version: str = ""
    """Of the engine that the worker runs it with."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Counts of a candidate in its trial, and those of the incumbent in this boot, if there are any."""

    model: str
    trial: str
    candidate: ArmStats
    baseline: ArmStats | None = None


@dataclass(frozen=True, slots=True)
class Condemned:
    """An application's process crashed on a candidate (`crash`), or the application called it wrong (`application`)."""

    model: str
    digest: str
    trial: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class GoldenChecked:
    """The worker ran the golden vectors of a loaded variant again."""

    model: str
    digest: str
    trial: str
    passed: bool
    detail: str = ""
    reason: str = ""
    """Why not; empty: the variant missed them."""


@dataclass(frozen=True, slots=True)
class Declares:
    """Settings or an application say what is relied on of a model; None: the settings say nothing any more."""

    model: str
    contract: Contract | None
    by: Literal["settings", "application"]


@dataclass(frozen=True, slots=True)
class Acked:
    """The server stored every report of the stream up to and including `seq`."""

    stream: str
    seq: int
    fresh: str = ""
    """What to call the next stream, should this one turn out to be further than this device knows; empty: it is not looked at."""


@dataclass(frozen=True, slots=True)
class Altered:
    """A scrub found files of a trusted version altered or missing."""

    model: str
    manifest: str
    variant: str
    detail: str


@dataclass(frozen=True, slots=True)
class Mended:
    """The files of a version are whole again, or (with a reason) are not yet."""

    model: str
    manifest: str
    variant: str
    reason: str = ""
    detail: str = ""


DeviceEvent = (
    Offered
    | Refreshed
    | RefreshFailed
    | WorkerReady
    | Acked
    | Declares
    | EnginesProbed
    | Rejudged
    | HandOverAsked
    | HandedOver
    | Altered
    | Mended
    | Stopping
)
SlotEvent = (
    Resolved
    | Fetched
    | TaskFailed
    | CanaryDone
    | Served
    | Measured
    | Condemned
    | GoldenChecked
    | WorkerDied
    | Tick
    | Connected
)
Event = DeviceEvent | SlotEvent


# --- effects: every one may be repeated ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolve:
    """Start the courier: target → manifest → config → ranked variants. Answers: `Resolved`, `TaskFailed`."""

    model: str
    offered: OfferedModel
    contract: Interface | None
    """A `Contract` if somebody declared it."""
    contract_preprocess: str | None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Start the courier: download a variant. Answers: `Fetched`, `TaskFailed`."""

    model: str
    manifest: str
    attempt: int
    variant: str


@dataclass(frozen=True, slots=True)
class Judge:
    """Start the canary. Answers: `CanaryDone`, `TaskFailed`."""

    model: str
    attempt: int
    candidate: Loadable
    incumbent: Loadable | None
    memory_bytes_max: int
    seconds_max: int
    latency_ratio_max: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the courier or canary that works for a model; its answer is not wanted any more."""

    model: str


@dataclass(frozen=True, slots=True)
class Serve:
    """Tell the worker the whole desired serving set. Answers: one `Served` per model."""

    revision: int
    models: tuple[ServeModel, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunGolden:
    """Let the worker run the golden vectors of a loaded variant. Answer: `GoldenChecked`."""

    model: str
    digest: str
    trial: str


@dataclass(frozen=True, slots=True)
class RestartWorker:
    """End the worker process; it does not do what it was told. Answers: `WorkerDied`, `WorkerReady`."""

    why: str


@dataclass(frozen=True, slots=True)
class Rejudge:
    """Start a canary for a confirmed version, with the engine that is on disk now. Answer: `Rejudged`."""

    model: str
    candidate: Loadable
    seconds_max: int


@dataclass(frozen=True, slots=True)
class HandOver:
    """Start another worker process, and let it take over when it serves everything. Answer: `HandedOver`."""

    why: str


@dataclass(frozen=True, slots=True)
class Refresh:
    """Start the courier: refresh trust. Answers: `Refreshed`, `RefreshFailed`."""


@dataclass(frozen=True, slots=True)
class SendReports:
    """There are reports to send: `machine.outgoing(state)`."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Blobs that belong to none of these may be deleted; whoever does it later asks `machine.kept` again."""

    keep: tuple[Loadable, ...]


@dataclass(frozen=True, slots=True)
class Mend:
    """Start the courier: bring again what is altered or missing of a version. Answer: `Mended`."""

    model: str
    manifest: str
    variant: str


Effect = (
    Resolve
    | Fetch
    | Judge
    | Rejudge
    | Cancel
    | Serve
    | RunGolden
    | RestartWorker
    | HandOver
    | Refresh
    | SendReports
    | Collect
    | Mend
)
