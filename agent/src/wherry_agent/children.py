"""What the supervisor and its children say to each other.

Courier and canary are short-lived: one task as JSON on standard input, then end of file; zero or more `Progress` lines
and one result line on standard output; logs on standard error; exit. A child that dies without a result is a failure
with reason `child_failed` (courier) or a verdict (canary). Workers live: commands and events are JSON lines over the
socket pair whose descriptor is in `WHERRY_CONTROL_FD`; listening sockets are inherited by descriptor.

Everything is level-triggered: a worker is told what it should serve, not what to change.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from wherry_shared.bundle import Interface, Processing
from wherry_shared.wire import Mode, Offer, OfferedModel, Sample, Sum, VariantTried


class _Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Base of messages between processes of one agent; tagged by `kind`."""


# --- a thing that can be loaded -----------------------------------------------------------------


class Loadable(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A verified variant on this device's disk, with all that an engine needs to run it."""

    model: str
    target: str
    """MODEL/VERSION"""
    manifest: str
    variant: str
    digest: str
    """Of the variant's plaintext."""
    engine: str
    """Engine name as in `facts.EngineFacts`."""
    engine_version: str
    format: str
    path: str
    """The verified blob."""
    at_rest: str = ""
    """Digest of the file at `path` where that is encrypted."""
    golden_path: str
    golden_plain: str = ""
    """Digest of the golden vectors where their file is encrypted."""
    config_path: str
    """The verified bundle config (for assets, labels, processing)."""
    interface: Interface
    assets_path: str = ""
    tensors: dict[str, str] = {}
    options: dict[str, str | int | float | bool] = {}
    batch: int = 0
    preprocess: Processing = Processing()
    postprocess: Processing = Processing()
    peak_memory_bytes: int = 0
    """As the canary measured it here; 0 if not yet."""

    @property
    def stored(self) -> str:
        """Digest of the file at `path`."""
        return self.at_rest or self.digest

    @property
    def encrypted(self) -> bool:
        """Whether only processes that have this device's keys can read it."""
        return bool(self.at_rest or self.golden_plain)

    @property
    def digests(self) -> frozenset[str]:
        """The blobs that it needs."""
        names = (path.rpartition("/")[2] for path in (self.golden_path, self.config_path, self.assets_path) if path)
        return frozenset({self.stored, self.manifest, *(f"sha256:{name}" for name in names)})

    @property
    def leased(self) -> frozenset[str]:
        """The blobs that an application which has it in memory may still read: weights, and assets that answers lead to."""
        assets = self.assets_path.rpartition("/")[2]
        return frozenset({self.stored, f"sha256:{assets}"}) if assets else frozenset({self.stored})


class Ran(msgspec.Struct, frozen=True, order=True):
    """A version that the worker was loading or running when it died."""

    model: str
    manifest: str
    variant: str


# --- courier ------------------------------------------------------------------------------------


class Enrol(_Message, tag="enrol", frozen=True, kw_only=True):
    """Make a P-256 key and a CSR, enrol with the token, store identity under `home`/identity (0600, fsynced)."""

    home: str
    server: str
    token: str
    name: str
    labels: dict[str, str] = {}
    ca: str = ""
    """File with the authority of the server's certificate; empty: those of the system."""


class Renew(_Message, tag="renew", frozen=True, kw_only=True):
    """Make a new key, have a certificate issued for it, and put both in the place of those in use."""

    home: str
    server: str
    only_look: bool = False
    """Change nothing; say how long the certificate in use is valid."""


class Refresh(_Message, tag="refresh", frozen=True, kw_only=True):
    """Bring TUF metadata up to date on a scratch copy and rename it to `trust/N`."""

    home: str
    server: str
    time_floor_us: int
    floors: dict[str, int] = {}
    """Role → version below which a set is refused."""
    current: int = 0
    """The `trust/N` to start from; 0: only the immutable root v1."""
    watched: dict[str, list[str]] = {}
    """Model → manifests that are here: whether their publishers revoked them."""


class Verify(_Message, tag="verify", frozen=True, kw_only=True):
    """Verify an offer (base64 of the envelope bytes) with the director key that TUF names; refresh once if unknown."""

    home: str
    server: str
    device: str
    project: str
    envelope: str
    time_floor_us: int
    floors: dict[str, int] = {}
    current: int = 0


class Resolve(_Message, tag="resolve", frozen=True, kw_only=True):
    """From an offered model to a ranked list of variants: target → manifest → config, all verified, no weights."""

    home: str
    server: str
    mirrors: list[str] = []
    model: str
    offered: OfferedModel
    time_floor_us: int
    floors: dict[str, int] = {}
    current: int = 0
    contract: Interface | None = None
    contract_preprocess: str | None = ""
    contract_declared: bool = False
    """The contract is somebody's word, not the interface of a version that was confirmed here."""
    facts: dict[str, Any] = {}
    """`DeviceFacts` as builtins."""


class Fetch(_Message, tag="fetch", frozen=True, kw_only=True):
    """Download what a variant needs into the store, resuming, bounded, verified."""

    home: str
    server: str
    mirrors: list[str] = []
    manifest: str
    variant: str
    tries_max: int = 5
    bytes_per_s_max: int = 0
    """How fast to download; 0 for as fast as it goes."""
    reserve_bytes: int = 0
    """What the download leaves free on the disk, beyond what the courier leaves in any case."""


class Scrub(_Message, tag="scrub", frozen=True, kw_only=True):
    """Read the files of versions again at a bounded rate; set aside what is not what was verified."""

    home: str
    versions: list[Loadable]


class Progress(_Message, tag="progress", frozen=True, kw_only=True):
    """How far a courier is."""

    done_bytes: int
    total_bytes: int


class Failed(_Message, tag="failed", frozen=True, kw_only=True):
    """The task did not come out; `reason` is a code of `wherry_shared.reasons`."""

    reason: str
    detail: str
    retry_after_s: float | None = None
    """None: trying again changes nothing by itself."""


class Reseal(_Message, tag="reseal", frozen=True, kw_only=True):
    """Write identity and private key again as the settings wish: sealed with the key at rest, or clear."""

    home: str


class Resealed(_Message, tag="resealed", frozen=True, kw_only=True):
    """They are."""


class Enrolled(_Message, tag="enrolled", frozen=True, kw_only=True):
    """Identity is on disk."""

    device: str
    project: str


class Renewed(_Message, tag="renewed", frozen=True, kw_only=True):
    """How long the certificate in use is valid (µs)."""

    not_before: int
    not_after: int


class Trust(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The trusted set after a refresh: journaled by the supervisor."""

    current: int
    floors: dict[str, int]
    time_floor_us: int
    expires_at: int
    """Earliest expiry (µs) of the online roles: refresh before half of it."""
    changed: bool = False


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """A publisher's word about a version that is here."""

    model: str
    manifest: str
    effect: Literal["replace", "stop"]


class Refreshed(_Message, tag="refreshed", frozen=True, kw_only=True):
    """Metadata are up to date."""

    trust: Trust
    revoked: list[Revoked] = []


class Verified(_Message, tag="verified", frozen=True, kw_only=True):
    """The offer is the director's, for this device, and not expired."""

    offer: Offer
    digest: str
    """Digest of the payload bytes: the same serial must carry the same bytes."""
    trust: Trust


class Candidate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One variant of a resolved bundle, in the order in which to try."""

    loadable: Loadable
    """Paths are where the blobs will be once fetched."""
    bytes: int
    """Bytes still to be fetched for it, at most."""
    why: str


class Resolved(_Message, tag="resolved", frozen=True, kw_only=True):
    """The bundle is signed, its manifest and config are here, and at least one variant fits."""

    manifest: str
    candidates: list[Candidate]
    passed_over: list[VariantTried] = []
    preprocess_id: str = ""
    trust: Trust | None = None


class Fetched(_Message, tag="fetched", frozen=True, kw_only=True):
    """Everything that the variant needs is in the store, verified and fsynced."""

    manifest: str
    variant: str
    bytes: int
    """Bytes that went over the wire."""


class ScrubbedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version of which files were altered or are missing."""

    model: str
    manifest: str
    variant: str
    detail: str


class Scrubbed(_Message, tag="scrubbed", frozen=True, kw_only=True):
    """Everything was read; `altered` lists what has to be fetched again."""

    bytes: int
    altered: list[ScrubbedVersion] = []


CourierTask = Enrol | Renew | Reseal | Refresh | Verify | Resolve | Fetch | Scrub
CourierAnswer = Progress | Failed | Enrolled | Renewed | Resealed | Refreshed | Verified | Resolved | Fetched | Scrubbed


# --- canary -------------------------------------------------------------------------------------


class Judge(_Message, tag="judge", frozen=True, kw_only=True):
    """Load the candidate under limits, run its golden vectors, measure against the incumbent if there is one."""

    candidate: Loadable
    incumbent: Loadable | None = None
    memory_bytes_max: int = 0
    """Budget above what the process needs with the engine imported; 0: none."""
    seconds_max: int = 120
    latency_ratio_max: float = 3.0
    unlock: str = ""
    """Opens this device's own keys, where they are encrypted with a key at rest."""


class Judged(_Message, tag="judged", frozen=True, kw_only=True):
    """What the canary found; `passed` false has a verdict in `reason`."""

    passed: bool
    reason: str = ""
    detail: str = ""
    vectors: int = 0
    peak_memory_bytes: int = 0
    load_ms: float = 0.0
    latency_p50_us: float = 0.0
    latency_p99_us: float = 0.0
    latency_ratio: float = 0.0
    incumbent_p50_us: float = 0.0
    """Of the incumbent, measured in turn with the candidate on the same inputs; 0 if it was not compared."""
    incumbent_p99_us: float = 0.0


# --- worker -------------------------------------------------------------------------------------


class ServeModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model should be in the worker."""

    name: str
    active: Loadable
    incumbent: Loadable | None = None
    """Kept loaded while a trial runs; answers what the candidate fails."""
    trial: str = ""
    """Trial id; empty when `active` is trusted."""
    deadline_ms: int = 10_000
    mode: Mode = "replace"
    """How a trial goes: `replace` and `blue_green` let `active` answer (with share 0: stand by, loaded and warm, while the
    incumbent answers), `split` lets it answer a stable `share` of requests, `shadow` runs it beside the incumbent, which
    answers, on a `share` of requests."""
    share: float = 1.0
    salt: str = ""
    """Of the stable hash that picks requests for a share."""
    shadow_cpu_share_max: float = 0.25
    """Share of one core that shadow runs may use; runs beyond it are skipped and counted."""
    group: str = ""
    """Models of one group are published together, as one generation; empty: alone."""


class Serve(_Message, tag="serve", frozen=True, kw_only=True):
    """The whole desired serving set. The worker loads what is missing, warms it, swaps by reference, frees the rest."""

    revision: int
    models: list[ServeModel]
    flags: dict[str, Any] = {}
    """Feature flags of this device, by key: bool, int, float, str, or an object."""
    unlock: str = ""
    """Opens this device's own keys, where they are encrypted with a key at rest."""
    samples: dict[str, float] = {}
    """Model → share of its requests whose inputs may leave the device; only where offer and settings both say so."""


class RunGolden(_Message, tag="run_golden", frozen=True, kw_only=True):
    """Run the golden vectors of a loaded variant in place."""

    model: str
    digest: str
    trial: str


class Stop(_Message, tag="stop", frozen=True, kw_only=True):
    """Answer what is in flight and exit."""

    hand_over: bool = False
    """Another worker follows: open connections are passed on to it instead of being closed."""


class Ready(_Message, tag="ready", frozen=True, kw_only=True):
    """The worker listens."""

    pid: int


class Serving(_Message, tag="serving", frozen=True, kw_only=True):
    """One model of a `Serve` is (or could not be) in service.

    Every `Serve` is answered for every model in it, also for those that it did not change: an answer is told from a
    late one by its revision.
    """

    revision: int
    model: str
    digest: str
    """Of the active variant."""
    ok: bool
    reason: str = ""
    detail: str = ""
    incumbent_loaded: bool = False
    load_ms: float = 0.0
    engine_version: str = ""
    """Of the engine as this process has it in memory."""


class GoldenDone(_Message, tag="golden_done", frozen=True, kw_only=True):
    """Result of `RunGolden`."""

    model: str
    digest: str
    trial: str
    passed: bool
    reason: str = ""
    """Why not; a verdict only if the variant itself missed them."""
    detail: str = ""


ArmName: TypeAlias = Literal["candidate", "incumbent", "shadow"]


def arm_of(model: ServeModel) -> ArmName:
    """Return under which name the active version of a desired state is counted."""
    if not model.trial:
        return "incumbent"
    return "shadow" if model.mode == "shadow" else "candidate"


class ArmStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counts of one (model, variant) since it was published or since the trial began, never reset while loaded.

    Latency is engine time in µs by shape bucket (log2 of total input elements), first 10 runs after a load left out; of a
    shadow it is CPU time, since what waits for a core as a guest is not slow.
    """

    model: str
    manifest: str
    variant: str
    digest: str
    arm: str
    """`candidate`, `incumbent` or `shadow`"""
    trial: str = ""
    requests: int = 0
    errors: int = 0
    fallbacks: int = 0
    rejected: int = 0
    """Answers that the application itself called wrong."""
    latency_us: dict[str, dict[str, int]] = {}
    wait_us: dict[str, int] = {}
    classes: dict[str, int] = {}
    confidence: dict[str, int] = {}
    """Sketch of the top class's value, where the interface has labels."""
    compared: int = 0
    """Shadow runs that were compared with the incumbent's answer to the same request."""
    agreed: int = 0
    """Those that gave the same answer: the same top class, or every output within the comparison's tolerance."""
    skipped: int = 0
    """Requests of the share that were not run: the CPU budget was used up, the queue full, or callers needed the cores."""
    distance: dict[str, int] = {}
    """Sketch of the distance between the two answers: largest difference over the range of the incumbent's output."""
    metrics: dict[str, Sum] = {}
    """What the application told of the answers, by name."""
    last_error: str = ""
    life: int = 0
    """Changes when the counts begin from nothing, as they do when a version comes back: whoever takes differences must know."""


class Stats(_Message, tag="stats", frozen=True, kw_only=True):
    """Sent once a second when something changed, and at once after a candidate error."""

    arms: list[ArmStats]


class Sampled(_Message, tag="sampled", frozen=True, kw_only=True):
    """Inputs of a few requests that one (model, variant) answered since the last of these; sent after the counts."""

    model: str
    digest: str
    arm: str
    trial: str
    samples: list[Sample]
    left_out: int = 0
    """Requests of the share that were too large, or too many."""


GrpcDoing = Literal["served", "waiting for the port", "not served: its packages are missing"]


class Grpc(_Message, tag="grpc", frozen=True, kw_only=True):
    """What has become of the port and the unix socket for gRPC, which the worker opens itself; said when it changes."""

    doing: GrpcDoing
    """Of the port."""
    socket: str = ""
    """Why there is no unix socket; empty if it is open, under the name that the worker was started with."""


WorkerCommand = Serve | RunGolden | Stop
WorkerEvent = Ready | Serving | GoldenDone | Stats | Sampled | Grpc


_encoder = msgspec.json.Encoder()


def encode_line(message: msgspec.Struct) -> bytes:
    """Encode a message as one JSON line."""
    return _encoder.encode(message) + b"\n"
