"""The report of a search or of a recipe's build: one HTML file that needs nothing else, the same as JSON, and a model card in Markdown.

What was refused stands there with by how much, beside what was chosen: a search is believed for what it kept out.
"""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import Any

import msgspec

from wherry_optimizer import candidates, measure, pictures, report
from wherry_optimizer import page as pages
from wherry_optimizer.attempt import TOOLS
from wherry_optimizer.candidates import SOURCE, Row
from wherry_optimizer.gate import UPPER_FACTOR, Verdict
from wherry_optimizer.page import plain
from wherry_optimizer.pipeline import BuildResult, Refused
from wherry_optimizer.search import Confirmation, Found, Result, Tried
from wherry_shared.bundle import Variant
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout

FORMAT = 1


def write(result: Result, output: Path) -> None:
    """Write `report.json`, `report.html`, `MODEL-CARD.md` and the chosen files into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    for found in result.found:
        if found.confirmation is None or found.confirmation.verdict.passed:
            target = output / f"{found.target.name}.{result.problem.format}"
            shutil.copyfile(found.find(found.chosen).answer.path, target)
            result.files[found.target.name] = target
    _write(as_dict(result), output / "report.json", output / "report.html", output / "MODEL-CARD.md")


def write_build(result: BuildResult) -> dict[str, Any]:
    """Write the report of a recipe's build beside its bundle, as NAME-VERSION.report.json, .html and .md; return it."""
    found = of_build(result)
    json_, html_, card = (
        result.path.with_name(f"{result.path.name}.report.{ending}") for ending in ("json", "html", "md")
    )
    _write(found, json_, html_, card)
    return found


def _write(report: Mapping[str, Any], json_: Path, html_: Path, card: Path) -> None:
    json_.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    html_.write_text(page(report), encoding="utf-8")
    card.write_text(markdown(report), encoding="utf-8")


def as_dict(result: Result) -> dict[str, Any]:
    """Return the report as plain values; what nobody measured is null."""
    problem, budget = result.problem, result.settings.budget
    return {
        "format": FORMAT,
        "model": problem.source.name,
        "digest": problem.digest,
        "metric": problem.metric.name,
        "data": {
            "description": result.parts.description,
            "labelled": result.parts.labelled,
            "calibration": len(problem.calibration),
            "selection": len(problem.selection),
            "test": len(problem.test),
            "selection_digest": problem.data_digest("selection"),
            "test_digest": problem.data_digest("test"),
        },
        "budget": {
            "drop_max": budget.drop_max,
            "floor": budget.floor,
            "error_max": budget.error_max,
            "interval_max": budget.drop_max * budget.upper_factor,
        },
        "provenance": {
            "tools": measure.tools(TOOLS),
            "seed": problem.seed,
            "machine": msgspec.to_builtins(measure.machine()),
        },
        "targets": {found.target.name: _target(found, result.files) for found in result.found},
        "golden": report.golden_dict(result.bundled) if result.bundled else None,
        "path": str(result.bundled.packed.path) if result.bundled else None,
        "manifest": result.bundled.packed.digest if result.bundled else None,
    }


def of_build(result: BuildResult) -> dict[str, Any]:
    """Return the report of a recipe's build in the form of a search's, beside what `report.as_dict` says."""
    config, terms = result.packed.config, result.recipe.gate
    made = {item.id: item for item in result.bundled.made}
    first = {item.source: item.id for item in result.bundled.made if not item.passes}
    variants = {variant.id: variant for variant in config.variants}
    rows, pareto = [], []
    for variant in config.variants:
        item, source = made[variant.id], variants[first[made[variant.id].source]]
        row = _variant(variant, source)
        judged = item.judged
        row |= {
            "notes": item.notes,
            "pareto": False,
            "value": _number(judged.drop.value) if judged else None,
            "drop": _number(judged.drop.drop) if judged else None,
            "interval": [_number(judged.drop.low), _number(judged.drop.high)] if judged else None,
            "error": _number(judged.error) if judged else None,
        }
        rows.append(row)
        latency, peak = (row[name] if row[name] is not None else nan for name in ("latency_ratio", "peak_memory_bytes"))
        pareto.append(Row(variant.id, row["download_bytes"] or 0, latency, peak, row["value"] or nan))
    for key in candidates.pareto(pareto):
        next(row for row in rows if row["id"] == key)["pareto"] = True
    rows += [_refused(item) for item in result.refused]
    confirmations = [
        _confirmation(
            Confirmation(item.id, item.confirmed.drop, item.confirmed.error, Verdict(True, ""), item.confirmed.drop)
        )
        for item in result.bundled.made
        if item.confirmed is not None and item.passes
    ]
    told = report.as_dict(result)
    data = result.dataset
    return {
        **told,
        "format": FORMAT,
        "model": f"{config.model} {config.version}",
        "digest": ", ".join(config.provenance.source_digests.values()),
        "metric": data["metric"],
        "data": {**data, "labelled": True, "selection_digest": data["digest"], "test_digest": data["digest"]},
        "budget": {
            "drop_max": terms.drop_max,
            "floor": terms.floor,
            "error_max": terms.error_max,
            "interval_max": terms.drop_max * (1.0 if terms.strict else UPPER_FACTOR),
        },
        "provenance": {
            "tools": config.provenance.tools,
            "seed": result.recipe.data.seed,
            "machine": msgspec.to_builtins(measure.machine()),
        },
        "targets": {
            "recipe": {
                "about": "The variants that the recipe names",
                "chosen": "",
                "reason": "Each that passed its gate and was confirmed is in the bundle",
                "confirmations": confirmations,
                "candidates": rows,
            }
        },
    }


def _variant(variant: Variant, source: Variant | None) -> dict[str, Any]:
    """Return a variant of a bundle in the form of a candidate."""
    figures = next(iter(variant.figures.values()), None)
    whole = (source.download_bytes or source.bytes) if source is not None else None
    download = variant.download_bytes or variant.bytes
    accuracy = variant.accuracy
    return {
        "id": variant.id,
        "passes": [{"use": name} for name in variant.passes],
        "options": variant.options,
        "passed": True,
        "why": "in the bundle",
        "by": None,
        "pareto": False,
        "digest": variant.digest,
        "bytes": variant.bytes,
        "download_bytes": download,
        "download_ratio": round(download / whole, 4) if whole else None,
        "compressed_ratio": round(download / source.bytes, 4) if source is not None else None,
        "latency_ratio": figures.latency_ratio if figures else None,
        "latency_us": figures.latency_p50_us if figures else None,
        "peak_memory_bytes": figures.peak_memory_bytes if figures else None,
        "load_ms": figures.load_ms if figures else None,
        "value": _number(accuracy.value) if accuracy else None,
        "drop": _number(accuracy.drop) if accuracy else None,
        "interval": None,
        "error": None,
        "notes": [],
    }


def _refused(item: Refused) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("digest", "bytes", "download_bytes", "download_ratio", "compressed_ratio", "latency_ratio", "latency_us")
    )
    return {
        **empty,
        **dict.fromkeys(("peak_memory_bytes", "load_ms", "interval", "error")),
        "id": item.id,
        "passes": [],
        "options": {},
        "passed": False,
        "why": item.why,
        "by": item.code,
        "pareto": False,
        "value": _number(item.accuracy.value) if item.accuracy else None,
        "drop": _number(item.accuracy.drop) if item.accuracy else None,
        "notes": [],
    }


def _target(found: Found, files: Mapping[str, Path]) -> dict[str, Any]:
    source = found.find(SOURCE)
    return {
        "about": found.target.about,
        "chosen": found.chosen,
        "reason": found.reason,
        "best_by": dict(found.best),
        "file": files[found.target.name].name if found.target.name in files else None,
        "seconds": round(found.seconds, 1),
        "cut_short": found.cut_short,
        "confirmations": [_confirmation(one) for one in found.confirmations],
        "candidates": [_candidate(item, source) for item in found.tried],
    }


def _confirmation(one: Confirmation) -> dict[str, Any]:
    return {
        "id": one.id,
        "passed": one.verdict.passed,
        "why": one.verdict.why,
        "value": _number(one.drop.value),
        "drop": _number(one.drop.drop),
        "interval": [_number(one.drop.low), _number(one.drop.high)],
        "error": _number(one.error),
        "samples": one.drop.samples,
    }


def _candidate(item: Tried, source: Tried) -> dict[str, Any]:
    drop = item.drop
    whole = source.answer.download_bytes or 1
    return {
        "id": item.id,
        "passes": [msgspec.to_builtins(step) for step in item.candidate.steps],
        "options": dict(item.candidate.options),
        "passed": item.verdict.passed,
        "why": item.verdict.why,
        "by": item.verdict.by or None,
        "pareto": item.pareto,
        "digest": item.answer.digest or None,
        "bytes": item.answer.bytes or None,
        "download_bytes": item.answer.download_bytes or None,
        "download_ratio": round(item.answer.download_bytes / whole, 4) if item.answer.download_bytes else None,
        "compressed_ratio": round(item.answer.download_bytes / source.answer.bytes, 4)
        if item.answer.download_bytes
        else None,
        "latency_ratio": _number(item.latency_ratio),
        "latency_us": _number(item.latency_us),
        "peak_memory_bytes": _number(item.peak_bytes),
        "load_ms": _number(item.load_ms),
        "value": _number(drop.value) if drop else None,
        "drop": _number(drop.drop) if drop else None,
        "interval": [_number(drop.low), _number(drop.high)] if drop else None,
        "error": _number(item.answer.error) if not item.answer.code else None,
        "seconds": round(item.answer.seconds, 2),
        "cached": item.answer.cached,
        "notes": item.answer.notes,
    }


def _number(value: float) -> float | None:
    return round(value, 6) if isfinite(value) else None


def markdown(report: Mapping[str, Any]) -> str:
    """Return a model card."""
    budget = report["budget"]
    lines = [
        f"# {plain(report['model'])}",
        "",
        plain(_source_line(report)),
        _budget_line(budget),
        "",
    ]
    for name, target in report["targets"].items():
        lines += [
            f"## {plain(_title(name, target))}",
            "",
            plain(f"{target['about']}. {_capital(target['reason'])}."),
            "",
        ]
        for one in target["confirmations"]:
            held = "Confirmed" if one["passed"] else "NOT confirmed"
            lines += [f"{held} on the test split: {plain(_confirmed(one))}.", ""]
        lines += pages.markdown_table(HEAD, [_cells(row) for row in target["candidates"]])
        refused = [row for row in target["candidates"] if not row["passed"]]
        if refused:
            lines += ["", "Kept out:", ""]
            lines += [f"- {plain(_kept_out(row))}" for row in refused]
        lines.append("")
    lines += pages.golden_markdown(report.get("golden"))
    tools = ", ".join(f"{name} {version}" for name, version in report["provenance"]["tools"].items())
    lines += [f"Made by {plain(tools)}; seed {report['provenance']['seed']}.", ""]
    return "\n".join(lines)


def _source_line(report: Mapping[str, Any]) -> str:
    data = report["data"]
    unlabelled = "" if data["labelled"] else "; without labels, so agreement with the float model"
    return (
        f"Source {report['digest']}. Metric: {report['metric']}, on {data['selection']} samples for selection and "
        f"{data['test']} for the confirmation ({data['description']}{unlabelled})."
    )


def _budget_line(budget: Mapping[str, Any]) -> str:
    floor = "" if budget["floor"] is None else f", floor {budget['floor']:g}"
    return (
        f"Budget: a drop of at most {budget['drop_max']:g}, its interval up to {budget['interval_max']:g}, outputs moved by "
        f"at most {budget['error_max']:g}{floor}."
    )


HEAD = ("variant", "passed", "download", "latency", "peak memory", "value", "drop (95 %)", "moved")
TABLE_WORDS = (
    "◆: in the Pareto set. ×: share of the source; of latency it is that of rounds in which both ran in turn. A bar as long as half its "
    "column is the source; one with a broken end goes on. Moved: how far outputs are from the source's, as a share. –: not measured."
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    interval = row["interval"]
    return [
        row["id"] + (" ◆" if row["pareto"] else ""),
        "yes" if row["passed"] else f"no ({row['by']})",
        _figure(row["download_bytes"] and report.size(row["download_bytes"]), row["download_ratio"]),
        _figure(row["latency_us"] and _time(row["latency_us"]), row["latency_ratio"]),
        f"{row['peak_memory_bytes'] / 1e6:.1f} MB" if row["peak_memory_bytes"] else "–",
        f"{row['value']:.4f}" if row["value"] is not None else "–",
        f"{row['drop']:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
        if row["drop"] is not None and interval and None not in interval
        else "–",
        f"{row['error']:.3f}" if row["error"] is not None else "–",
    ]


def _time(us: float) -> str:
    return f"{us:.3g} µs" if us < 999.5 else f"{us / 1000:.3g} ms"


def _figure(value: str | float | None, ratio: float | None) -> str:
    """Return a figure as measured, where there is one, and as a share of the source's."""
    return " ".join([*([str(value)] if value else []), *([f"×{ratio:.3f}"] if ratio is not None else [])]) or "–"


def page(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML page without scripts or anything from elsewhere."""
    name = html.escape(report["model"])
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{pages.POLICY}">',
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{name}: report of the optimizer</title><style>{pages.STYLE}</style></head><body><main>",
        f"<h1>{name}</h1>",
        f"<p>{html.escape(_source_line(report))} {html.escape(_budget_line(report['budget']))}</p>",
    ]
    limit = report["budget"]["drop_max"]
    for target_name, target in report["targets"].items():
        rows, chosen = target["candidates"], target["chosen"]
        parts.append(f"<h2>{html.escape(_title(target_name, target))}</h2>")
        about = f"{target['about']}. {_capital(target['reason'])}."
        parts.append(f"<p>{html.escape(about)}</p>")
        best = ", ".join(f"{what}: {key}" for what, key in target.get("best_by", {}).items())
        parts.append(f"<p>Best by preference: {html.escape(best)}.</p>" if best else "")
        for one in target["confirmations"]:
            held = "Confirmed" if one["passed"] else "<b>Not confirmed</b>"
            parts.append(f"<p>{held} on the test split: {html.escape(_confirmed(one))}.</p>")
        parts += [pictures.plot(rows, chosen), _rows(rows, chosen)]
        parts.append(pictures.intervals(rows, limit, report["metric"], target["confirmations"]))
        parts.append(pages.layers(rows, chosen))
    parts += [pages.golden_page(report.get("golden")), pages.provenance_page(report), "</main></body></html>"]
    return "\n".join(part for part in parts if part) + "\n"


def _kept_out(row: Mapping[str, Any]) -> str:
    return f"{row['id']} ({row['by']}): {row['why']}"


def _capital(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}"


def _title(name: str, target: Mapping[str, Any]) -> str:
    return f"{name}: {target['chosen']}" if target["chosen"] else name


def _confirmed(one: Mapping[str, Any]) -> str:
    """Return what a confirmation says, in the gate's words or in figures."""
    if one["why"]:
        return f"{one['id']}: {one['why']}"
    low, high = one["interval"]
    return f"{one['id']}: drop {one['drop']:+.4f} [{low:+.4f}, {high:+.4f}] on {one['samples']} samples"


def _rows(rows: Sequence[Mapping[str, Any]], chosen: str) -> str:
    lines: list[list[pages.Cell]] = []
    for row in rows:
        cells: list[pages.Cell] = [*_cells(row)]
        for place, key in ((2, "download_ratio"), (3, "latency_ratio")):
            if row[key] is not None:
                cells[place] = (_cells(row)[place], row[key] / 2)
        lines.append(cells)
    kinds = ["chosen" if row["id"] == chosen else ("" if row["passed"] else "no") for row in rows]
    refused = [row for row in rows if not row["passed"]]
    kept_out = "".join(f"<li>{html.escape(_kept_out(row))}</li>" for row in refused)
    return (
        f"<h3>Every variant</h3>{pages.table('Every variant', HEAD, lines, kinds=kinds)}<p>{html.escape(TABLE_WORDS)}</p>"
        + (f"<h3>Kept out</h3><ul>{kept_out}</ul>" if refused else "")
    )


def compare(one: Path, other: Path) -> list[dict[str, Any]]:
    """Return how two reports, or two bundles, differ, per target and candidate: the figures of both.

    Sizes and latency of bundles can be compared always; what was measured on other samples or by another metric is left out.

    Raises:
        RefusedError: `report_invalid`, or `report_differs`, where two reports are not about the same metric and samples, or one is
            a bundle and the other a report.
    """
    whole = [_is_bundle(path) for path in (one, other)]
    if whole[0] != whole[1]:
        raise _differs("one is a bundle, the other a report")
    first, second = (_of_bundle(path) if whole[0] else _read(path) for path in (one, other))
    alike = first["metric"] == second["metric"] and (
        first["data"]["selection_digest"] == second["data"]["selection_digest"]
    )
    if not alike and not whole[0]:
        if first["metric"] != second["metric"]:
            raise _differs(f"metric: {first['metric']} and {second['metric']}")
        raise _differs("they were measured on different samples")
    if not alike:
        for row in (*first["targets"]["bundle"]["candidates"], *second["targets"]["bundle"]["candidates"]):
            row |= {"value": None, "drop": None}
    rows = []
    for name in sorted({*first["targets"], *second["targets"]}):
        tables = [
            {row["id"]: row for row in report["targets"].get(name, {}).get("candidates", [])}
            for report in (first, second)
        ]
        chosen = [report["targets"].get(name, {}).get("chosen") for report in (first, second)]
        for key in dict.fromkeys([*tables[0], *tables[1]]):
            pair = [table.get(key) for table in tables]
            rows.append(
                {
                    "target": name,
                    "id": key,
                    "chosen": [one_of == key for one_of in chosen],
                    **{
                        field: [row[field] if row else None for row in pair]
                        for field in (
                            "passed",
                            "download_bytes",
                            "download_ratio",
                            "latency_ratio",
                            "peak_memory_bytes",
                            "value",
                            "drop",
                            "error",
                        )
                    },
                }
            )
    return rows


def _is_bundle(path: Path) -> bool:
    return (path / "oci-layout").is_file()


def _of_bundle(path: Path) -> dict[str, Any]:
    """Return the part of a report that a bundle holds itself."""
    config = Layout(path).bundle()[2]
    source = next((variant for variant in config.variants if not variant.passes), None)
    metric = next((variant.accuracy.metric for variant in config.variants if variant.accuracy), None)
    return {
        "metric": metric,
        "data": {"selection_digest": sorted(config.provenance.data_digests.items())},
        "targets": {"bundle": {"chosen": None, "candidates": [_variant(one, source) for one in config.variants]}},
    }


class _Samples(msgspec.Struct, frozen=True, kw_only=True):
    """By what two reports are told to be of the same samples."""

    selection_digest: str


class _Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared of a candidate."""

    id: str
    passed: bool
    download_bytes: int | None
    download_ratio: float | None
    latency_ratio: float | None
    peak_memory_bytes: float | None
    value: float | None
    drop: float | None
    error: float | None


class _Searched(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared of a target."""

    chosen: str | None
    candidates: list[_Figures]


class _Compared(msgspec.Struct, frozen=True, kw_only=True):
    """What a report has to hold to be compared; what else it holds is of no matter."""

    metric: str
    data: _Samples
    targets: dict[str, _Searched]


def _read(path: Path) -> dict[str, Any]:
    path = path / "report.json" if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, this release reads {FORMAT}")
        msgspec.convert(found, _Compared)
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            "report_invalid",
            f"{path} is no report of a search: {error}",
            next_step="name a folder that `wherry-optimizer auto` wrote, a report.json, or two bundles",
        ) from error


def _differs(why: str) -> RefusedError:
    return RefusedError(
        "report_differs",
        f"the reports cannot be compared: {why}",
        consequence="their figures would say nothing about each other",
        next_step="search or build again with the same data, metric and seed; compare a bundle with a bundle",
    )
