"""The report of a search: one HTML file that needs nothing else, the same as JSON, and a model card in Markdown.

What was refused stands there with by how much, beside what was chosen: a search is believed for what it kept out.
"""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from wherry_optimizer import measure
from wherry_optimizer.attempt import TOOLS
from wherry_optimizer.candidates import SOURCE
from wherry_optimizer.search import Confirmation, Found, Result, Tried
from wherry_shared.errors import RefusedError

FORMAT = 1
PLOT_WIDTH, PLOT_HEIGHT = 640, 320
"""Of the plot, in pixels."""
LAYERS_SHOWN_MAX = 40


def write(result: Result, output: Path) -> None:
    """Write `report.json`, `report.html`, `MODEL-CARD.md` and the chosen files into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    for found in result.found:
        if found.confirmation is None or found.confirmation.verdict.passed:
            target = output / f"{found.target.name}.{result.problem.format}"
            shutil.copyfile(found.find(found.chosen).answer.path, target)
            result.files[found.target.name] = target
    report = as_dict(result)
    (output / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "report.html").write_text(page(report), encoding="utf-8")
    (output / "MODEL-CARD.md").write_text(markdown(report), encoding="utf-8")


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
    }


def _target(found: Found, files: Mapping[str, Path]) -> dict[str, Any]:
    source = found.find(SOURCE)
    return {
        "about": found.target.about,
        "chosen": found.chosen,
        "reason": found.reason,
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
        f"# {report['model']}",
        "",
        _source_line(report),
        _budget_line(budget),
        "",
    ]
    for name, target in report["targets"].items():
        lines += [f"## {name}: {target['chosen']}", "", f"{target['about']}. {target['reason']}.", ""]
        for one in target["confirmations"]:
            held = "Confirmed" if one["passed"] else "NOT confirmed"
            lines += [f"{held} on the test split: {one['id']}: {one['why']}.", ""]
        lines += [
            "| variant | passed | download | latency | peak | value | drop (95 %) | moved |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in target["candidates"]:
            lines.append(f"| {' | '.join(_cells(row))} |")
        refused = [row for row in target["candidates"] if not row["passed"]]
        if refused:
            lines += ["", "Kept out:", ""]
            lines += [f"- {row['id']} ({row['by']}): {row['why']}" for row in refused]
        lines.append("")
    tools = ", ".join(f"{name} {version}" for name, version in report["provenance"]["tools"].items())
    lines += [f"Made by {tools}; seed {report['provenance']['seed']}.", ""]
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


def _cells(row: Mapping[str, Any]) -> list[str]:
    interval = row["interval"]
    return [
        row["id"] + (" ◆" if row["pareto"] else ""),
        "yes" if row["passed"] else f"no ({row['by']})",
        _share(row["download_ratio"]),
        _share(row["latency_ratio"]),
        f"{row['peak_memory_bytes'] / 1e6:.1f} MB" if row["peak_memory_bytes"] else "–",
        f"{row['value']:.4f}" if row["value"] is not None else "–",
        f"{row['drop']:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
        if row["drop"] is not None and interval and None not in interval
        else "–",
        f"{row['error']:.3f}" if row["error"] is not None else "–",
    ]


def _share(value: float | None) -> str:
    return f"×{value:.3f}" if value is not None else "–"


STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}td,th{padding:.25rem .6rem;text-align:right;
border-bottom:1px solid #dde3ea}td:first-child,th:first-child,td.left{text-align:left}tr.no{color:#8a95a1}
tr.chosen{background:#e8f4ec}.bar{display:inline-block;height:.7rem;background:#3c78b4;vertical-align:middle}
.bar.t{background:#d08a2e}svg text{font-size:11px;fill:#445}code{font-size:.85em}h2{margin-top:2.2rem}"""


def page(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML page without scripts or anything from elsewhere."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        f"<title>{html.escape(report['model'])}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(report['model'])}</h1>",
        f"<p>{html.escape(_source_line(report))} {html.escape(_budget_line(report['budget']))}</p>",
    ]
    for name, target in report["targets"].items():
        parts.append(f"<h2>{html.escape(name)}: {html.escape(target['chosen'])}</h2>")
        parts.append(f"<p>{html.escape(target['about'])}. {html.escape(target['reason'])}.</p>")
        for one in target["confirmations"]:
            held = "Confirmed" if one["passed"] else "<b>Not confirmed</b>"
            parts.append(f"<p>{held} on the test split: {html.escape(one['id'])}: {html.escape(one['why'])}.</p>")
        parts += [_plot(target["candidates"], target["chosen"]), _rows(target["candidates"], target["chosen"])]
        parts.append(_sensitivity(target["candidates"]))
    tools = ", ".join(f"{name} {version}" for name, version in report["provenance"]["tools"].items())
    parts.append(f"<p>Made by {html.escape(tools)}; seed {report['provenance']['seed']}.</p></html>")
    return "\n".join(parts) + "\n"


def _plot(rows: Sequence[Mapping[str, Any]], chosen: str) -> str:
    """Return download against latency as SVG: ◆ for the Pareto set, the chosen one filled."""
    shown = [row for row in rows if row["passed"] and row["latency_ratio"] is not None and row["download_ratio"]]
    if not shown:
        return "<p>Latency was not measured on this hardware class, so there is no plot.</p>"
    top = max(1.05, *(row["latency_ratio"] * 1.05 for row in shown))
    right = max(1.05, *(row["download_ratio"] * 1.05 for row in shown))
    marks = [
        f"<line x1='40' y1='{PLOT_HEIGHT - 30}' x2='{PLOT_WIDTH}' y2='{PLOT_HEIGHT - 30}' stroke='#99a'/>",
        f"<line x1='40' y1='0' x2='40' y2='{PLOT_HEIGHT - 30}' stroke='#99a'/>",
        f"<text x='{PLOT_WIDTH - 190}' y='{PLOT_HEIGHT - 8}'>download, share of float (0 to {right:.2f})</text>",
        f"<text x='44' y='12'>latency, share of float (0 to {top:.2f})</text>",
    ]
    for row in shown:
        x = 40 + (PLOT_WIDTH - 60) * row["download_ratio"] / right
        y = (PLOT_HEIGHT - 30) * (1 - row["latency_ratio"] / top)
        fill = "#2e8b57" if row["id"] == chosen else ("#3c78b4" if row["pareto"] else "#c3ccd6")
        marks.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{fill}'><title>{html.escape(row['id'])}</title></circle>"
        )
        if row["pareto"] or row["id"] == chosen:
            marks.append(f"<text x='{x + 7:.1f}' y='{y + 4:.1f}'>{html.escape(row['id'])}</text>")
    return f"<svg viewBox='0 0 {PLOT_WIDTH} {PLOT_HEIGHT}' width='{PLOT_WIDTH}' role='img'>{''.join(marks)}</svg>"


def _rows(rows: Sequence[Mapping[str, Any]], chosen: str) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("variant", "passed", "download", "latency", "peak", "value", "drop (95 %)", "moved")
    )
    lines = [f"<table><tr>{head}<th></th></tr>"]
    for row in rows:
        kind = "chosen" if row["id"] == chosen else ("" if row["passed"] else "no")
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
        bars = "".join(
            f"<span class='bar{mark}' style='width:{min(row[key], 2.0) * 60:.0f}px'></span><br>"
            for key, mark in (("download_ratio", ""), ("latency_ratio", " t"))
            if row[key] is not None
        )
        why = html.escape(row["why"])
        lines.append(f"<tr class='{kind}' title='{why}'>{cells}<td class='left'>{bars}</td></tr>")
    refused = [row for row in rows if not row["passed"]]
    kept_out = "".join(
        f"<li>{html.escape(row['id'])} ({html.escape(str(row['by']))}): {html.escape(row['why'])}</li>"
        for row in refused
    )
    return "\n".join([*lines, "</table>", f"<p>Kept out:</p><ul>{kept_out}</ul>" if refused else ""])


def _sensitivity(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the layers of quantized and pruned variants cost, where passes told."""
    parts = []
    for row in rows:
        for note in row["notes"]:
            layers = note.get("layers") or note.get("sensitivity") or []
            if not layers:
                continue
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in layer.values()) + "</tr>"
                for layer in layers[:LAYERS_SHOWN_MAX]
            )
            head = "".join(f"<th>{html.escape(str(key))}</th>" for key in layers[0])
            parts.append(
                f"<details><summary>{html.escape(row['id'])}, {html.escape(note['pass'])}: {len(layers)} layers</summary>"
                f"<table><tr>{head}</tr>{body}</table></details>"
            )
    return f"<h3>Layers</h3>{''.join(parts)}" if parts else ""


def compare(one: Path, other: Path) -> list[dict[str, Any]]:
    """Return how two reports differ, per target and candidate: the figures of both.

    Raises:
        RefusedError: `report_invalid` or `report_differs`, where they are not about the same metric and samples.
    """
    first, second = _read(one), _read(other)
    for key in ("metric",):
        if first[key] != second[key]:
            raise _differs(f"{key}: {first[key]} and {second[key]}")
    if first["data"]["selection_digest"] != second["data"]["selection_digest"]:
        raise _differs("they were measured on different samples")
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


def _read(path: Path) -> dict[str, Any]:
    path = path / "report.json" if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, this release reads {FORMAT}")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            "report_invalid",
            f"{path} is no report of a search: {error}",
            next_step="name a folder that `wherry-optimizer auto` wrote, or its report.json",
        ) from error


def _differs(why: str) -> RefusedError:
    return RefusedError(
        "report_differs",
        f"the reports cannot be compared: {why}",
        consequence="their figures would say nothing about each other",
        next_step="search again with the same data, metric and seed",
    )
