"""How simulated models behave: a table keyed by manifest digest (or target), read by the world and by the swarm.

A simulated device runs no network. What a model *does* there (resolve, fetch, pass its canary, answer, fail, crash, be
slow) is looked up here, so that the machine has something to judge. Nothing else is simulated by this table: offers,
signatures, journals, reports and decisions are the real ones of whoever uses it.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import msgspec

from wherry_agent.children import Candidate, Loadable
from wherry_shared import ids, reasons
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.errors import RefusedError

BUCKETS = ("10", "10", "12", "10")
"""Shape buckets (log2 of total input elements) that simulated requests fall into, in turn."""
DRAWS_MAX = 64
"""Latencies drawn per call of `traffic`; each stands for an equal part of the requests."""
_INTERFACE = Interface(
    inputs=[TensorSpec(name="x", datatype="FP32", shape=["batch", 16])],
    outputs=[TensorSpec(name="y", datatype="FP32", shape=["batch", 4])],
)


class VariantBehaviour(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one variant does on a simulated device. Reasons are codes of `wherry_shared.reasons`; empty means well."""

    id: str = "float"
    canary: str = ""
    """Verdict of the canary."""
    canary_newer: str = ""
    """Verdict of the canary with the newer engine, where a scenario replaces it."""
    load: str = ""
    """Reason for which the worker cannot load it although the canary could."""
    golden: bool = True
    """Whether the golden vectors pass again in place, inside the worker."""
    error_rate: float = 0.0
    agreement: float = 1.0
    """Share of a shadow's runs that agree with the incumbent's answers."""
    latency_us: float = 2_000.0
    tail_share: float = 0.0
    """Share of requests that take `tail_us` instead."""
    tail_us: float = 0.0
    crash_per_request: float = 0.0
    down_per_request: float = 0.0
    """Share of requests that take the whole machine down."""
    canary_down: bool = False
    """Its canary takes the whole machine down."""
    canary_newer_down: bool = False
    """Its canary with the newer engine takes the whole machine down."""
    down_ms: int = 0
    """The whole machine goes down so long after it was loaded as what is trusted; 0: it does not."""
    dies_ms: int = 0
    """The worker dies so long after it loaded it, whatever is asked; 0: it does not."""
    engine_newer: bool = False
    """It needs the newer engine."""
    peak_memory_bytes: int = 50_000_000
    alone: bool = False
    """It fits into memory only without another version beside it."""
    canary_ms: int = 800
    load_ms: int = 150
    engine: str = "onnxruntime"


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one bundle does on a simulated device."""

    resolve: str = ""
    fetch: str = ""
    retry_after_s: float | None = None
    """With `resolve` or `fetch`: None says that trying again changes nothing."""
    resolve_ms: int = 300
    fetch_ms: int = 1_500
    bytes: int = 1_000_000
    affected: float = 1.0
    """Share of devices (by hash) on which the variants behave as the table says; elsewhere they are well."""
    variants: list[VariantBehaviour] = msgspec.field(default_factory=lambda: [VariantBehaviour()])


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    models: dict[str, Behaviour] = {}
    default: Behaviour = Behaviour()


class Behaviours:
    """The table: by manifest digest, else by target `MODEL/VERSION`, else the default (a model that is well)."""

    def __init__(self, models: dict[str, Behaviour] | None = None, default: Behaviour | None = None) -> None:
        self.models: dict[str, Behaviour] = dict(models or {})
        self.default = default or Behaviour()

    def find(self, manifest: str, target: str = "") -> Behaviour:
        """Return the behaviour of a bundle."""
        found = self.models.get(manifest)
        if found is None:
            found = self.models.get(target)
        return self.default if found is None else found

    def on(self, device: str, manifest: str, target: str = "") -> Behaviour:
        """Return the behaviour of a bundle on one device: `affected` picks the same devices every time."""
        found = self.find(manifest, target)
        if found.affected >= 1.0 or ids.share_key(f"affected {manifest}", device) < found.affected * 2**64:
            return found
        well = [VariantBehaviour(id=variant.id, engine=variant.engine) for variant in found.variants]
        return msgspec.structs.replace(found, resolve="", fetch="", variants=well)

    def variant(self, device: str, loadable: Loadable) -> VariantBehaviour:
        """Return the behaviour of a loaded variant on one device."""
        for variant in self.on(device, loadable.manifest, loadable.target).variants:
            if variant.id == loadable.variant:
                return variant
        return VariantBehaviour(id=loadable.variant)

    def update(self, models: dict[str, Behaviour]) -> None:
        """Add or replace entries while devices run."""
        self.models.update(models)


def read(path: Path) -> Behaviours:
    """Read a table from JSON: `{"format": 1, "models": {"sha256:…" or "MODEL/VERSION": {…}}, "default": {…}}`.

    Raises:
        RefusedError: `behaviours_unreadable` or `behaviours_invalid`, naming the field.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefusedError(
            "behaviours_unreadable", f"cannot read {path}: {error.strerror}", next_step="name a JSON file that exists"
        ) from error
    try:
        table = msgspec.json.decode(data, type=_Table)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError("behaviours_invalid", f"{path} is not a table of behaviours: {error}") from error
    if table.format != 1:
        raise RefusedError("behaviours_invalid", f"{path} has format {table.format}, this release reads 1")
    for key, behaviour in (*table.models.items(), ("default", table.default)):
        _check(key, behaviour)
    return Behaviours(table.models, table.default)


def _check(key: str, behaviour: Behaviour) -> None:
    known = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
    codes = [behaviour.resolve, behaviour.fetch]
    for variant in behaviour.variants:
        codes += [variant.canary, variant.canary_newer, variant.load]
        shares = (
            variant.agreement,
            variant.error_rate,
            variant.tail_share,
            variant.crash_per_request,
            variant.down_per_request,
        )
        if not all(0.0 <= share <= 1.0 for share in shares):
            raise RefusedError("behaviours_invalid", f"{key}: {variant.id} has a share outside 0 to 1")
    for code in codes:
        if code and code not in known:
            raise RefusedError("behaviours_invalid", f"{key}: {code!r} is no reason code (wherry_shared.reasons)")
    if not behaviour.variants and not behaviour.resolve:
        raise RefusedError("behaviours_invalid", f"{key}: a bundle that resolves needs a variant")


def digest_of(name: str) -> str:
    """Return a digest that stands for the thing called `name`: simulated bytes have names instead of content."""
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


ENGINE_VERSION = "1.32.0"
NEWER_ENGINE_VERSION = "1.33.0"
NO_ENGINE = ""
"""What is on disk where the engine is gone."""


def candidates(
    behaviour: Behaviour, model: str, target: str, manifest: str, engine_version: str = ENGINE_VERSION
) -> list[Candidate]:
    """Return what a courier would answer to `Resolve`, best variant first."""
    found: list[Candidate] = []
    for variant in behaviour.variants:
        if variant.engine_newer and engine_version != NEWER_ENGINE_VERSION:
            continue
        blob = digest_of(f"{manifest}/{variant.id}")
        loadable = Loadable(
            model=model,
            target=target,
            manifest=manifest,
            variant=variant.id,
            digest=blob,
            engine=variant.engine,
            engine_version=engine_version,
            format="onnx",
            path=f"/simulated/{blob[7:]}",
            golden_path=f"/simulated/{blob[7:]}.golden",
            config_path=f"/simulated/{manifest[7:]}.config",
            interface=_INTERFACE,
        )
        found.append(Candidate(loadable=loadable, bytes=behaviour.bytes, why="simulated"))
    return found


class Traffic:
    """What a stretch of requests to one variant came to."""

    __slots__ = ("crashed", "down", "errors", "latencies", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.crashed = False
        """It took the worker down."""
        self.down = False
        """It took the machine down."""
        self.latencies: list[tuple[str, float, int]] = []
        """(shape bucket, engine time in µs, how many requests it stands for)"""


def traffic(source: random.Random, behaviour: VariantBehaviour, requests: int) -> Traffic:
    """Draw what `requests` requests to a variant come to: errors, latencies, perhaps a crash."""
    drawn = Traffic()
    drawn.requests = requests
    if requests <= 0:
        return drawn
    if behaviour.crash_per_request and source.random() < 1 - (1 - behaviour.crash_per_request) ** requests:
        drawn.crashed = True
        drawn.requests = source.randrange(requests)
    if behaviour.down_per_request:
        drawn.down = source.random() < 1 - (1 - behaviour.down_per_request) ** requests
    if behaviour.error_rate:
        drawn.errors = binomial(source, drawn.requests, behaviour.error_rate)
    answered = drawn.requests - drawn.errors
    draws = min(DRAWS_MAX, answered)
    for index in range(draws):
        times = answered // draws + (1 if index < answered % draws else 0)
        slow = behaviour.tail_share > 0 and source.random() < behaviour.tail_share
        middle = behaviour.tail_us if slow else behaviour.latency_us
        value = middle * math.exp(0.15 * source.gauss(0.0, 1.0))
        drawn.latencies.append((BUCKETS[index % len(BUCKETS)], value, times))
    return drawn


def binomial(source: random.Random, trials: int, share: float) -> int:
    """Return how many of `trials` came out: exact up to 60 trials, by the normal law above."""
    if share <= 0.0 or share >= 1.0:
        return trials if share >= 1.0 else 0
    if trials <= 60:
        return sum(source.random() < share for _ in range(trials))
    spread = math.sqrt(trials * share * (1 - share))
    return min(trials, max(0, round(source.gauss(trials * share, spread))))
