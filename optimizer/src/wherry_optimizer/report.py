"""What a bundle holds, for people (a table) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from wherry_optimizer import breaking, proof
from wherry_optimizer.bundling import Bundled
from wherry_optimizer.pipeline import BuildResult
from wherry_optimizer.proof import Proof
from wherry_shared.bundle import Config, Operation, TensorSpec, Variant

SHOWN_CHARS_MAX = 60
"""Of one parameter of an operation; `--json` has it whole."""


def table(config: Config) -> Table:
    """Return one row per variant."""
    title = f"{config.model} {config.version}"
    rows = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=_caption(config),
        caption_justify="left",
    )
    for heading in ("variant", "format", "precision"):
        rows.add_column(heading, no_wrap=True)
    for heading in ("file", "download", "accuracy", "drop", "latency", "peak", "golden"):
        rows.add_column(heading, justify="right", no_wrap=True)
    largest = max(variant.bytes for variant in config.variants)
    for variant in config.variants:
        rows.add_row(*_row(variant, largest))
    return rows


def details(config: Config) -> Group:
    """Return the table with the interface, the licence and where everything came from."""
    lines: list[str] = []
    for kind, specs in (("input", config.interface.inputs), ("output", config.interface.outputs)):
        lines += [f"{kind:<8}{spec.name}: {_tensor(spec)}" for spec in specs]
    for name, bounds in config.interface.dims.items():
        lines.append(f"dim     {name}: {bounds.minimum} to {bounds.maximum or 'any'}")
    for asset in config.assets.files if config.assets is not None else []:
        lines.append(f"asset   {asset.path} ({size(asset.bytes)})")
    for stage, processing in (("before", config.preprocess), ("after", config.postprocess)):
        lines += [f"{stage:<8}{_operation(operation)}" for operation in processing.operations]
        lines += [f"{stage:<8}id {processing.id}"] if processing.id else []
    lines.append(f"licence {config.licence.expression}, {config.licence.attribution} ({config.licence.source})")
    for key, value in config.provenance.source_digests.items():
        lines.append(f"source  {key} {value}")
    for row in config.provenance.refused:
        lines.append(f"refused {row.get('id')}: {row.get('why')}")
    return Group(table(config), Text("\n".join(lines)))


def refused(result: BuildResult) -> Text:
    """Return what was kept out and what golden vectors do not tell apart."""
    lines = [f"refused {item.id}: {item.why} [{item.code}]" for item in result.refused]
    lines += [f"note: no golden vector of {one} tells it from {other}" for one, other in result.packed.unseparated]
    lines += [f"note: {one} does not name {engine}, which {why}" for one, engine, why in result.left_out]
    lines += [f"WARNING: {warning}" for warning in result.bundled.blind]
    return Text("\n".join(lines))


def as_dict(result: BuildResult) -> dict[str, Any]:
    """Return the report of a build as plain values."""
    return {
        "path": str(result.packed.path),
        "model": result.packed.model,
        "version": result.packed.version,
        "manifest": result.packed.digest,
        "data": result.dataset,
        "variants": [
            variant_dict(variant) | {"notes": result.notes.get(variant.id, [])}
            for variant in result.packed.config.variants
        ],
        "refused": [item.as_dict() for item in result.refused],
        "left_out": [list(row) for row in result.left_out],
        "unseparated": [list(pair) for pair in result.packed.unseparated],
        "golden": golden_dict(result.bundled),
    }


def golden_dict(bundled: Bundled) -> dict[str, Any]:
    """Return how golden vectors were chosen and what they were measured to notice, as plain values."""
    return {
        "vectors": [
            {"candidate": one.candidate, "traits": list(one.traits), "tells": one.tells, "notices": one.notices}
            for one in bundled.selection.picked
        ],
        "proofs": [one.as_dict() for one in bundled.proofs],
        "tolerances": {
            key: {name: tolerance.atol for name, tolerance in chosen.tolerances.items()}
            for key, chosen in bundled.selection.by_variant.items()
        },
        "misses_warned_above": proof.MISSES_MAX,
    }


def proofs_table(proofs: Sequence[Proof]) -> Table:
    """Return a row per variant: what its golden vectors notice."""
    rows = Table("variant", "ways to run it", "false alarms", "if held out", "mixed up", *breaking.KINDS, "missed")
    for item in proofs:
        caught = [
            f"{one.caught} of {one.tried}" + (f" ({one.unseen} unseen)" if one.unseen else "")
            for one in item.broken.values()
        ]
        mixed = f"{sum(item.mixed_up.values())} of {len(item.mixed_up)}" if item.mixed_up else "–"
        alarms = ", ".join(item.false_alarms) or "none"
        held = f"{len(item.held_out)} of {item.ways}"
        rows.add_row(item.variant, str(item.ways), alarms, held, mixed, *caught, f"{item.misses:.0%}")
    return rows


def variant_dict(variant: Variant) -> dict[str, Any]:
    """Return the figures of a variant as plain values."""
    figures = next(iter(variant.figures.items()), None)
    accuracy = variant.accuracy
    return {
        "id": variant.id,
        "format": variant.format,
        "precision": variant.precision,
        "passes": variant.passes,
        "digest": variant.digest,
        "bytes": variant.bytes,
        "download_bytes": variant.download_bytes,
        "engines": [engine.name for engine in variant.engines],
        "hardware": figures[0] if figures else None,
        "latency_p50_us": figures[1].latency_p50_us if figures else None,
        "latency_ratio": figures[1].latency_ratio if figures else None,
        "peak_memory_bytes": figures[1].peak_memory_bytes if figures else None,
        "metric": accuracy.metric if accuracy else None,
        "accuracy": accuracy.value if accuracy else None,
        "standard_error": accuracy.standard_error if accuracy else None,
        "drop": accuracy.drop if accuracy else None,
        "drop_standard_error": accuracy.drop_standard_error if accuracy else None,
        "samples": accuracy.samples if accuracy else None,
        "golden": {
            "vectors": variant.golden.vectors,
            "bytes": variant.golden.bytes,
            "synthetic": variant.golden.synthetic,
            "separates": variant.golden.separates,
        },
    }


def _row(variant: Variant, largest: int) -> list[str]:
    figures = next(iter(variant.figures.values()), None)
    accuracy = variant.accuracy
    download = variant.download_bytes or variant.bytes
    return [
        variant.id,
        variant.format,
        variant.precision,
        size(variant.bytes),
        f"{size(download)} ({download / largest:.2f})",
        f"{accuracy.value:.4f} ± {accuracy.standard_error:.4f}" if accuracy else "–",
        f"{accuracy.drop:+.4f} ± {accuracy.drop_standard_error or 0:.4f}" if accuracy else "–",
        f"{figures.latency_p50_us / 1000:.2f} ms (×{figures.latency_ratio or 1:.2f})" if figures else "–",
        size(figures.peak_memory_bytes) if figures else "–",
        f"{variant.golden.vectors}{' synthetic' if variant.golden.synthetic else ''}",
    ]


def _caption(config: Config) -> str:
    accuracy = next((variant.accuracy for variant in config.variants if variant.accuracy), None)
    if accuracy is None:
        return "download: zstd bytes, and their share of the largest file"
    return (
        f"{accuracy.metric} on {accuracy.samples} held-back samples ± standard error; drop against the source, paired. "
        f"Data: {accuracy.data}. latency: median, and × the float variant of the same source, interleaved"
    )


def _operation(operation: Operation) -> str:
    parameters = ", ".join(f"{key} {_short(value)}" for key, value in operation.parameters.items())
    return f"{operation.op} {operation.version}: {parameters}" if parameters else f"{operation.op} {operation.version}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARS_MAX else f"{text[:SHOWN_CHARS_MAX]}…"


def _tensor(spec: TensorSpec) -> str:
    text = f"{spec.datatype} [{', '.join(map(str, spec.shape))}]"
    if spec.low is not None or spec.high is not None:
        text += f" in [{spec.low}, {spec.high}]"
    if spec.labels:
        text += f", {len(spec.labels)} labels"
    return text


def size(count: float) -> str:
    """Return a number of bytes as people read it, in decimal units."""
    for unit in ("B", "kB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} MB"
