"""What a device says about itself, and whether a variant fits it. Pure: probing lives in the agent and the engines."""

from __future__ import annotations

import re

import msgspec

from wherry_shared.bundle import Config, EngineName, EngineRange, Figures, Format, Variant


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An engine that ran a tiny model on this device."""

    name: EngineName
    version: str
    formats: list[Format]


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Facts that a device reports; cohorts select on them and variants are matched with them."""

    arch: str
    """`platform.machine()`: x86_64, aarch64, armv7l."""
    os: str = ""
    python: str = ""
    agent: str = ""
    cpu_model: str = ""
    cpu_features: list[str] = []
    """Of the features that variants ask for (see FEATURES), those that this CPU has."""
    cores: int = 1
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    accelerator: str = "none"
    engines: list[EngineFacts] = []
    labels: dict[str, str] = {}
    contracts: dict[str, str] = {}
    """Digest of the interface contract that applications on this device rely on, per model."""
    timezone: str = "UTC"

    def engine(self, name: str) -> EngineFacts | None:
        """Return the engine of that name, if it works here."""
        return next((engine for engine in self.engines if engine.name == name), None)


FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
"""CPU features (names as in /proc/cpuinfo) that change which variant is fastest."""


def hardware_class(facts: DeviceFacts, engine: EngineFacts) -> str:
    """Return the class within which measurements and failures carry over.

    Made of (arch, CPU features used, accelerator, engine name, engine major.minor), for example
    `x86_64+avx2+avx512_vnni/none/onnxruntime-1.32`.
    """
    cpu = "+".join([facts.arch, *sorted(feature for feature in facts.cpu_features if feature in FEATURES)])
    return f"{cpu}/{facts.accelerator}/{engine.name}-{'.'.join(engine.version.split('.')[:2])}"


def version_key(text: str) -> tuple[int, ...]:
    """Return the leading integers of a version of an engine: `1.32.0.dev1` gives (1, 32, 0)."""
    numbers: list[int] = []
    for part in text.split("."):
        match = re.match(r"\d+", part)
        if match is None:
            break
        numbers.append(int(match[0]))
    return tuple(numbers)


def engine_for(variant: Variant, facts: DeviceFacts) -> EngineFacts | None:
    """Return the first engine of this device that may run `variant`, in the order in which the variant names them."""
    for wanted in variant.engines:
        have = facts.engine(wanted.name)
        if have is not None and variant.format in have.formats and _in_range(have.version, wanted):
            return have
    return None


def _in_range(version: str, wanted: EngineRange) -> bool:
    key = version_key(version)
    if key < version_key(wanted.minimum):
        return False
    if wanted.maximum is None:
        return True
    top = version_key(wanted.maximum)
    return key[: len(top)] <= top


def misfits(variant: Variant, facts: DeviceFacts) -> list[str]:
    """Say why `variant` cannot run on a device with `facts`; empty if it can."""
    found: list[str] = []
    if variant.needs.arch and facts.arch not in variant.needs.arch:
        found.append(f"needs {' or '.join(variant.needs.arch)}, device is {facts.arch}")
    missing = [feature for feature in variant.needs.cpu_features if feature not in facts.cpu_features]
    if missing:
        found.append(f"needs CPU features {', '.join(missing)}")
    if variant.needs.memory_bytes and facts.memory_bytes and variant.needs.memory_bytes > facts.memory_bytes:
        found.append(f"needs {variant.needs.memory_bytes} bytes of memory, device has {facts.memory_bytes}")
    if engine_for(variant, facts) is None:
        wanted = " or ".join(
            f"{e.name} ≥ {e.minimum}" + (f" ≤ {e.maximum}" if e.maximum else "") for e in variant.engines
        )
        have = ", ".join(f"{e.name} {e.version}" for e in facts.engines) or "none"
        found.append(f"needs {wanted}, device has {have}")
    return found


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """A fitting variant with the reason for its place."""

    variant: Variant
    engine: EngineFacts
    why: str


def rank(config: Config, facts: DeviceFacts, fleet: dict[str, Figures] | None = None) -> list[Ranked]:
    """Order the fitting variants of a bundle, best first.

    Measured latency on this hardware class decides: the fleet's figures (`fleet`: variant id → figures, newer) before
    the bundle's own; a variant measured nowhere for this class comes after those measured, by download size.
    """
    rows: list[tuple[tuple[int, float, int, str], Ranked]] = []
    for variant in config.variants:
        if misfits(variant, facts):
            continue
        engine = engine_for(variant, facts)
        if engine is None:
            continue
        size = variant.download_bytes or variant.bytes
        figures = (fleet or {}).get(variant.id)
        source = "measured by the fleet"
        if figures is None:
            figures = variant.figures.get(hardware_class(facts, engine))
            source = "measured at build for this hardware class"
        if figures is None:
            key = (1, float(size), 0, variant.id)
            why = f"not measured on this hardware class, {size} bytes to download"
        else:
            key = (0, figures.latency_p50_us, size, variant.id)
            why = f"{figures.latency_p50_us:.0f} µs median, {source}"
        rows.append((key, Ranked(variant=variant, engine=engine, why=why)))
    rows.sort(key=lambda row: row[0])
    return [ranked for _, ranked in rows]
