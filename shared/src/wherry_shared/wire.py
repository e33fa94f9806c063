"""What agents in the field speak: offers, reports, telemetry, hello and acknowledgements, format 1.

JSON, frozen, strict. Unknown fields are ignored, an unknown format is refused, signed bytes are kept verbatim and never
encoded again. These types are not database tables: they change on the calendar of devices that cannot be updated at
will. Times are integer microseconds UTC. Framing with the per-device key is in `frames`; signing of offers in `dsse`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from wherry_shared import limits
from wherry_shared.bundle import Figures
from wherry_shared.errors import RefusedError
from wherry_shared.facts import DeviceFacts

FORMAT = 1
Mode = Literal["replace", "shadow", "split", "blue_green", "none"]
Arm = Literal["candidate", "incumbent", "shadow"]
StreamName = Literal["report", "telemetry"]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number or a time (µs) that fits a 64-bit column; JSON alone would allow any."""


class _Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of wire types."""


class Trial(_Wire, frozen=True, kw_only=True):
    """Terms under which a device decides by itself; every wait has its unit in its name."""

    min_requests: int = 20
    """Answers by the candidate before a verdict may confirm it."""
    max_s: int = 600
    """After this many seconds with fewer requests the golden vectors are run again in place."""
    error_rate_max: float = 0.02
    """Share of candidate requests that may fail before it goes back."""
    errors_min: int = 3
    """Fewer failures than this never condemn by rate."""
    latency_ratio_max: float = 2.0
    """Median engine time over the incumbent's in the same shape bucket."""
    latency_tail_ratio_max: float = 5.0
    """The same for the 90th percentile, so that a model which is slow on one kind of input is noticed."""
    latency_tail_min_ms: int = 20
    """A tail that grew by less than this is no evidence: a busy device is not a slow model."""
    restarts_max: int = 3
    """As often as this the device may go down, without having been told to, while the candidate is tried; then it goes back."""
    crashes_max: int = 0
    """Worker crashes in the trial beyond this go back; 0: the first crash does."""
    deadline_ms: int = 10_000
    """A request that takes longer than this on the candidate counts as its error; the incumbent answers."""
    canary_s: int = 120
    canary_latency_ratio_max: float = 3.0
    canary_memory_bytes_max: int = 0
    """0: the device's own budget."""
    variant_tries: int = 2
    shadow_cpu_share_max: float = 0.25
    """Share of one core that runs of a shadow may use on the device."""
    agreement_min: float = 0.0
    """Share of shadow runs that have to agree with the incumbent; 0: it is only reported."""


class OfferedModel(_Wire, frozen=True, kw_only=True):
    """What one model on one device should be."""

    target: str
    """TUF target path MODEL/VERSION; empty with mode `none`."""
    manifest: str
    """Digest of the bundle's manifest; empty with mode `none`."""
    mode: Mode = "replace"
    share: float = 1.0
    attempt: Count = 1
    rollout: str = ""
    group: str = ""
    trial: Trial = Trial()
    windows: list[str] = []
    """Hours of the device's own time in which the bundle may be brought, as `DAYS HH:MM-HH:MM`; empty: at any time."""
    figures: dict[str, Figures] = {}
    """Newer measurements of the fleet for this device's hardware class, by variant id."""


class Offer(_Wire, frozen=True, kw_only=True):
    """The desired state of one device, composed from all its rollouts. A model that is absent is left alone."""

    format: int
    device: str
    project: str
    epoch: Count
    serial: Count
    issued_at: Count
    expires_at: Count
    critical: list[str] = []
    """Names of features without which this offer must not be acted on."""
    models: dict[str, OfferedModel] = {}
    groups: dict[str, list[str]] = {}
    flags: dict[str, Any] = {}


class Envelope(_Wire, frozen=True, kw_only=True):
    """Signed bytes: `payload` is base64 of the exact bytes signed, over the DSSE pre-authentication encoding."""

    payload: str
    keyid: str
    sig: str


class VariantTried(_Wire, frozen=True, kw_only=True):
    """A variant that this device tried or passed over, and why."""

    id: str
    digest: str
    outcome: Literal["serving", "candidate", "failed", "misfit", "not_tried"]
    engine: str = ""
    """`NAME VERSION` of the engine."""
    reason: str = ""
    """Reason code; empty unless it failed."""
    why: str = ""
    peak_memory_bytes: Count = 0
    latency_p50_us: float = 0.0
    latency_p99_us: float = 0.0
    latency_ratio: float = 0.0
    """Median over the incumbent's, interleaved in the canary; 0 if it was not compared."""
    incumbent_p50_us: float = 0.0
    """Of the incumbent in that comparison."""
    incumbent_p99_us: float = 0.0


ModelState = Literal[
    "empty",
    "confirmed",
    "confirmed_idle",
    "fetching",
    "judging",
    "trial",
    "standby",
    "compared",
    "returned",
    "failed",
    "refused",
    "waiting",
    "removed",
    "safe",
]


class Report(_Wire, frozen=True, kw_only=True):
    """The device's durable word about one model.

    `state` says where it stands: `fetching`, `judging` (canary), `trial` and `waiting` (trouble around the model, will
    try again) are under way, and so is `standby` (blue-green: loaded and proved, the incumbent answers); `compared` (the time
    of a shadow or split is over, the incumbent answers alone), `confirmed`, `confirmed_idle`, `returned` (went back from a trial), `failed` (never served:
    no variant left), `refused` (will not try: contract, unsupported, known bad, trust), `removed` and `safe` are ends.
    """

    format: int
    device: str
    epoch: str
    seq: Count
    first: Count
    """Oldest sequence number that the device still holds; the server counts everything below as lost."""
    at: Count
    model: str
    state: ModelState
    target: str = ""
    """The target that this report speaks of (the candidate's where there is one)."""
    manifest: str = ""
    running: str = ""
    """Manifest digest of what answers requests now; empty if nothing does."""
    running_variant: str = ""
    incumbent: str = ""
    rollout: str = ""
    attempt: Count = 0
    serial: Count = 0
    """Serial of the offer that led here."""
    reason: str = ""
    detail: str = ""
    variants: list[VariantTried] = []
    serving: VariantTried | None = None
    """What answers requests, where it is not of the bundle that the report is about: chosen in its own trial, and why."""
    requests: Count = 0
    errors: Count = 0
    fallbacks: Count = 0
    trial_end: str = ""
    """`requests`, `idle`, `time` (compared), `returned:REASON`, `withdrawn`: by which rule the trial ended."""
    latency_ratio: float = 0.0
    mode: Mode = "replace"
    """How the candidate was tried."""
    share: float = 1.0
    group: str = ""
    compared: Count = 0
    agreed: Count = 0
    skipped: Count = 0
    """Shadow runs compared with the incumbent's answers, those that agreed, and those the CPU budget did not allow."""


class SampleTensor(_Wire, frozen=True, kw_only=True):
    """One input of a sample, as the interface names it."""

    name: str
    datatype: str
    shape: list[Count]
    data: bytes
    """Raw, as the Open Inference Protocol's binary extension has it; base64 in JSON."""


class Sample(_Wire, frozen=True, kw_only=True):
    """What one request asked: sent only where the offer asks for samples and the device's owner consented."""

    inputs: list[SampleTensor]

    @property
    def bytes(self) -> int:
        """Raw size of all inputs."""
        return sum(len(tensor.data) for tensor in self.inputs)


class Sum(_Wire, frozen=True, kw_only=True):
    """Numbers that an application told under one name: how many, and what they come to together."""

    count: Count
    total: float


IN_PROCESS = "h"
"""Before a shape bucket: of runs in the process of an application, through a handle."""


class Window(_Wire, frozen=True, kw_only=True):
    """Measurements of one (model, bundle, variant, arm) over one stretch of time that never straddles a swap."""

    model: str
    manifest: str
    variant: str
    arm: Arm
    start: Count
    duration_us: Count
    rollout: str = ""
    attempt: Count = 0
    requests: Count = 0
    errors: Count = 0
    fallbacks: Count = 0
    latency_us: dict[str, dict[str, int]] = {}
    """Engine time by shape bucket (log2 of total input elements): a `sketch.Sketch` each. `IN_PROCESS` stands before the
    bucket of runs in an application's own process, which never compare with those of a worker."""
    wait_us: dict[str, int] = {}
    """Time spent waiting for the run gate, a `sketch.Sketch`; never evidence."""
    classes: dict[str, int] = {}
    """Histogram of the top class, where the interface has labels."""
    confidence: dict[str, int] = {}
    """Sketch of the top class's value, where the interface has labels: its drift is visible without a label."""
    compared: Count = 0
    agreed: Count = 0
    skipped: Count = 0
    """Of a shadow: runs compared with the incumbent's answers, those that agreed, those the CPU budget did not allow."""
    distance: dict[str, int] = {}
    """Of a shadow: sketch of the largest difference over the range of the incumbent's output."""
    crashes: Count = 0
    """How often the worker died while it ran, or held, this bundle. Such a window has no requests and no duration."""
    metrics: dict[str, Sum] = {}
    """What the application told of this bundle's answers, by name: at most `limits.METRICS_PER_WINDOW_MAX`."""
    samples: list[Sample] = []
    """At most `limits.SAMPLES_PER_WINDOW_MAX` of `limits.SAMPLE_BYTES_MAX` each."""
    samples_left_out: Count = 0
    """Requests of the share that was asked for which were too large, or too many."""


class Telemetry(_Wire, frozen=True, kw_only=True):
    """A batch of windows and the state of the device."""

    format: int
    device: str
    epoch: str
    seq: Count
    first: Count
    at: Count
    windows: list[Window] = []
    memory_available_bytes: Count = 0
    disk_free_bytes: Count = 0
    temperature_c: float | None = None
    load_1m: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Processes that ran or wanted to, as the kernel averages them over a minute."""
    downloaded_bytes: Count = 0
    """What downloads of bundles took over the wire since the message before."""
    dropped: Count = 0
    """Windows that the bounded buffer had to drop since the last message."""


class Hello(_Wire, frozen=True, kw_only=True):
    """What a device says on every connect: what it has, which offer it knows, where its streams stand."""

    format: int
    device: str
    at: Count
    boot: str
    agent: str
    offer_epoch: Count = 0
    offer_serial: Count = 0
    facts: DeviceFacts | None = None
    running: dict[str, str] = {}
    """Model → manifest digest that answers requests now."""
    streams: dict[StreamName, tuple[str, Count, Count]] = {}
    """Stream → (epoch, first held, next seq)."""
    trust_version: Count = 0
    trust_state: str = ""
    """Empty, or why trust is not kept up to date: `trust_stale`, `clock_unset`, or what keeps this device from remembering
    anything (`read_only`, `disk_full`, `disk`)."""


class Ack(_Wire, frozen=True, kw_only=True):
    """End-to-end acknowledgement, sent after commit: everything up to and including `seq` is stored."""

    format: int
    device: str
    stream: StreamName
    epoch: str
    seq: Count
    logs: Count = 0
    """When not 0: an operator asked (at this time, µs) for the last log lines; send them once, `POST /device/v1/logs`."""


class EnrolRequest(_Wire, frozen=True, kw_only=True):
    """`POST /device/v1/enrol`: a token and a certificate request made on the device."""

    format: int
    token: str
    csr_pem: str
    name: str
    labels: dict[str, str] = {}
    facts: DeviceFacts | None = None
    content_key: str = ""
    """Base64 of the X25519 public key for which content keys are wrapped."""


class EnrolAnswer(_Wire, frozen=True, kw_only=True):
    """What an enrolled device keeps."""

    format: int
    device: str
    project: str
    certificate_pem: str
    ca_pem: str
    bearer: str
    """Secret for HTTP: `Authorization: Bearer DEVICE:SECRET` (mutual TLS where it is set up)."""
    mac_key: str
    """Base64 of the 32-byte key that authenticates frames."""
    broker_host: str
    broker_port: int
    broker_tls: bool = False
    broker_tokens: bool = False
    """Whether the broker wants a token as the password, which `POST /device/v1/broker-token` gives."""
    tuf_path: str = ""
    """Path of this project's TUF metadata below the server's address, `/tuf/PROJECT`."""


class SealedKey(_Wire, frozen=True, kw_only=True):
    """The content key of one encrypted blob, for the owner of one X25519 key: docs/formats/encryption.md."""

    format: int
    model: str
    plain: str
    """Digest of the plaintext."""
    blob: str
    """Digest of the bytes at rest: which blob it opens."""
    device: str = ""
    """Whom it is for; empty: the keys role or a publisher."""
    recipient: str
    """Digest of the X25519 public key that opens it."""
    sealed: str
    """Base64 of HPKE's encapsulated key and ciphertext."""


class SealedKeys(_Wire, frozen=True, kw_only=True):
    """`GET /device/v1/keys/{manifest}`: the content keys of a bundle, for the device that asks."""

    format: int
    keys: list[SealedKey]
    missing: int = 0
    """Encrypted blobs of the bundle for which there is none yet."""


class Retire(_Wire, frozen=True, kw_only=True):
    """`GET /device/v1/retirement`: the device has left the fleet; in a frame of kind `retire`."""

    format: int
    device: str
    wipe: Literal["nothing", "models", "all"]


class BrokerToken(_Wire, frozen=True, kw_only=True):
    """`POST /device/v1/broker-token`: the password of the device that asked, for a broker that checks tokens."""

    format: int
    token: str
    expires_at: int


class RenewRequest(_Wire, frozen=True, kw_only=True):
    """`POST /device/v1/renew`: a certificate request over a new key, made on the device; its subject is the device id."""

    format: int
    csr_pem: str
    content_key: str = ""
    """The next X25519 public key of the device; empty leaves the one on record."""


class RenewAnswer(_Wire, frozen=True, kw_only=True):
    """The next certificate of the device that asked; everything else that enrolment gave stays as it is."""

    format: int
    certificate_pem: str


class Encoding(_Wire, frozen=True, kw_only=True):
    """Another way to fetch a blob: a separate immutable object, trusted only through the raw digest."""

    encoding: str
    """`zstd`; later releases have others, which a reader that does not know them passes over."""
    digest: str
    bytes: int


class BlobInfo(_Wire, frozen=True, kw_only=True):
    """`GET /device/v1/blobs/{digest}/info`: a raw blob and the encodings in which it may be fetched."""

    digest: str
    bytes: int
    encodings: list[Encoding] = []


T = TypeVar("T", bound=msgspec.Struct)
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def parse(kind: type[T], data: bytes | bytearray | memoryview, *, bytes_max: int = limits.MQTT_PAYLOAD_BYTES_MAX) -> T:
    """Parse a message of `kind`.

    Raises:
        RefusedError: `message_too_large`, `message_invalid` or `message_format`.
    """
    if len(data) > bytes_max:
        raise RefusedError("message_too_large", f"{kind.__name__} of {len(data)} bytes, at most {bytes_max}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        message: T = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError("message_invalid", f"not a {kind.__name__}: {error}") from error
    if getattr(message, "format", FORMAT) != FORMAT:
        raise RefusedError(
            "message_format",
            f"{kind.__name__} of a format that this release does not read",
            consequence="it is not read",
            next_step="update whichever side is older",
        )
    return message


_encoder = msgspec.json.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as JSON."""
    return _encoder.encode(message)
