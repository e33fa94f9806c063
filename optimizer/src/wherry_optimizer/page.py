"""Parts of a report as HTML and Markdown that a search and a recipe's build share: pictures, golden vectors, provenance.

Everything is drawn as plain SVG and tables: a report opens anywhere, runs no script and asks nobody for anything.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

WIDTH, HEIGHT = 720, 340
"""Of the plot, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 52, 170, 14, 40
"""Room around it; what stands right of a mark has its name there."""
TICKS = 5
LATENCY = "latency, share of the source"
LINE = 20
"""Height of a row of the picture of intervals, in pixels."""
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:74rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:2px solid #dde3ea;padding-bottom:.2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92em;margin:.6rem 0}
td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #dde3ea;white-space:nowrap}th{font-weight:600}
td:first-child,th:first-child,td.left,th.left{text-align:left}td.wrap{white-space:normal;overflow-wrap:anywhere}
tr.no{color:#76818d}tr.chosen{background:#e8f4ec}
.bar{display:block;height:.45rem;margin:1px 0;background:#3c78b4}.bar.t{background:#d08a2e}
.key{display:inline-block;width:.8rem;height:.6rem;background:#3c78b4;margin:0 .3rem 0 .9rem}.key.t{background:#d08a2e}
svg{max-width:100%;height:auto}svg text{font-size:11px;fill:#445}code{font-size:.85em}li{margin:.15rem 0}
.warn{background:#fdf1dc;padding:.3rem .7rem;border-left:4px solid #d08a2e}summary{cursor:pointer}"""


def plot(rows: Sequence[Row], chosen: str) -> str:
    """Return download against latency: the Pareto set dark and joined, the chosen one green."""
    shown = [row for row in rows if row["passed"] and row["latency_ratio"] is not None and row["download_ratio"]]
    if not shown:
        return "<p>Latency was not measured on this hardware class, so there is no plot.</p>"
    high = _round_up(max(row["latency_ratio"] for row in shown))
    wide = _round_up(max(row["download_ratio"] for row in shown))
    end, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(row: Row) -> tuple[float, float]:
        x = LEFT + (end - LEFT) * row["download_ratio"] / wide
        return x, floor - (floor - TOP) * row["latency_ratio"] / high

    marks = []
    for number in range(TICKS + 1):
        share = number / TICKS
        x, y = LEFT + (end - LEFT) * share, floor - (floor - TOP) * share
        marks += [
            f"<line x1='{x:.1f}' y1='{TOP}' x2='{x:.1f}' y2='{floor}' stroke='#e6eaef'/>",
            f"<line x1='{LEFT}' y1='{y:.1f}' x2='{end}' y2='{y:.1f}' stroke='#e6eaef'/>",
            f"<text x='{x:.1f}' y='{floor + 15}' text-anchor='middle'>{wide * share:.2g}</text>",
            f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{high * share:.2g}</text>",
        ]
    marks += [
        f"<text x='{(LEFT + end) / 2}' y='{HEIGHT - 6}' text-anchor='middle'>download, share of the source</text>",
        f"<text transform='translate(13 {(TOP + floor) / 2}) rotate(-90)' text-anchor='middle'>{LATENCY}</text>",
    ]
    front = sorted(at(row) for row in shown if row["pareto"])
    if len(front) > 1:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
        marks.append(f"<polyline points='{line}' fill='none' stroke='#3c78b4' stroke-dasharray='3 3'/>")
    free = float(TOP)
    for row in sorted(shown, key=lambda row: at(row)[1]):
        x, y = at(row)
        named = row["pareto"] or row["id"] == chosen
        fill = "#2e8b57" if row["id"] == chosen else ("#3c78b4" if row["pareto"] else "#c3ccd6")
        name = html.escape(row["id"])
        if named:  # names stand in a column of their own, one below the other
            free = max(free + 13, y + 4)
            marks.append(f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{end + 8}' y2='{free - 4:.1f}' stroke='#ccd4dc'/>")
            marks.append(f"<text x='{end + 11}' y='{free:.1f}'>{name}</text>")
        marks.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{fill}'><title>{name}</title></circle>")
    height = max(HEIGHT, int(free) + 8)
    return f"<svg viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' role='img'>{''.join(marks)}</svg>"


def intervals(rows: Sequence[Row], limit: float, confirmations: Sequence[Row] = ()) -> str:
    """Return the drop of every variant with its interval, against the budget; confirmations in green or red."""
    shown = [
        (row["id"], row["drop"], row["interval"], "#3c78b4" if row["passed"] else "#b4bec8")
        for row in rows
        if row["drop"] is not None and row["interval"] and None not in row["interval"]
    ]
    shown += [
        (f"{row['id']}, confirmed", row["drop"], row["interval"], "#2e8b57" if row["passed"] else "#b03a2e")
        for row in confirmations
        if row["drop"] is not None and None not in row["interval"]
    ]
    if not shown:
        return ""
    # what is far beyond the budget is cut: the picture is of what was close
    most: float = max(2.5 * limit, *(min(high, 6 * limit) for _, _, (_, high), _ in shown)) or 1e-6
    least: float = min(0.0, *(max(low, -3 * limit) for _, _, (low, _), _ in shown))
    start, end = 250, WIDTH - 20

    def at(value: float) -> float:
        return start + (end - start) * (min(max(value, least), most) - least) / (most - least)

    height = LINE * len(shown) + 34
    marks = []
    for value, colour, word in ((0.0, "#99a5b1", "0"), (limit, "#d08a2e", f"budget {limit:g}")):
        x = at(value)
        marks.append(f"<line x1='{x:.1f}' y1='6' x2='{x:.1f}' y2='{height - 22}' stroke='{colour}'/>")
        marks.append(f"<text x='{x:.1f}' y='{height - 8}' text-anchor='middle'>{word}</text>")
    for number, (name, drop, (low, high), colour) in enumerate(shown):
        y = 16 + LINE * number
        marks += [
            f"<text x='{start - 10}' y='{y + 4}' text-anchor='end'>{html.escape(name)}</text>",
            f"<line x1='{at(low):.1f}' y1='{y}' x2='{at(high):.1f}' y2='{y}' stroke='{colour}' stroke-width='3'/>",
            f"<circle cx='{at(drop):.1f}' cy='{y}' r='4' fill='{colour}'><title>{drop:+.4f}</title></circle>",
        ]
    return (
        "<h3>Drop of the metric, with its interval</h3>"
        f"<svg viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' role='img'>{''.join(marks)}</svg>"
    )


def bars(row: Row) -> str:
    """Return download and latency as bars, a source being 60 pixels."""
    return "".join(
        f"<span class='bar{mark}' style='width:{min(row[key], 2.0) * 60:.0f}px'></span>"
        for key, mark in (("download_ratio", ""), ("latency_ratio", " t"))
        if row[key] is not None
    )


def golden_page(golden: Mapping[str, Any] | None) -> str:
    """Return what golden vectors notice, as HTML."""
    if not golden:
        return ""
    head, lines = _proofs(golden)
    warnings = "".join(f"<p class='warn'>{html.escape(text)}</p>" for text in golden_warnings(golden))
    count = len(golden["vectors"])
    picked = "".join(
        f"<tr><td>{number}</td><td class='left'>{', '.join(one['traits'])}</td><td>{one['tells']}</td>"
        f"<td>{one['notices']}</td></tr>"
        for number, one in enumerate(golden["vectors"], 1)
    )
    return (
        f"<h2>Golden vectors</h2>{warnings}<p>{html.escape(GOLDEN_WORDS)}</p>"
        + _table(head, lines)
        + f"<details><summary>{count} vectors, and why each was chosen</summary>"
        "<table><tr><th>vector</th><th class='left'>looked at for</th><th>pairs of variants told apart</th>"
        f"<th>broken files noticed</th></tr>{picked}</table></details>"
    )


GOLDEN_WORDS = (
    "A device runs them before a variant may serve. False alarms: ways to run the variant here in which it misses its own; "
    "if held out: ways that would have been, had the tolerance been made without them. Caught: of files with one thing "
    "wrong, by kind; unseen ones differ on no sample that was at hand, and do not count as missed."
)


def golden_markdown(golden: Mapping[str, Any] | None) -> list[str]:
    """Return what golden vectors notice, as lines of Markdown."""
    if not golden:
        return []
    head, lines = _proofs(golden)
    return [
        "## Golden vectors",
        "",
        GOLDEN_WORDS,
        "",
        *(f"**{text}**\n" for text in golden_warnings(golden)),
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]


def golden_warnings(golden: Mapping[str, Any]) -> list[str]:
    """Return what is to be warned of."""
    return [
        f"{one['variant']}: {one['misses']:.0%} of what is wrong with a file passes its golden vectors"
        for one in golden["proofs"]
        if one["misses"] > golden["misses_warned_above"]
    ]


def _proofs(golden: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    proofs = golden["proofs"]
    kinds = list(proofs[0]["broken"]) if proofs else []
    head = ["variant", "tolerance", "ways", "false alarms", "if held out", "mix-ups noticed", *kinds, "missed"]
    lines = []
    for one in proofs:
        cells = [
            f"{row['caught']} of {row['tried']}" + (f" ({row['unseen']} unseen)" if row["unseen"] else "")
            if row["tried"]
            else "–"
            for row in one["broken"].values()
        ]
        bounds = ", ".join(f"{value:.2g}" for value in golden["tolerances"].get(one["variant"], {}).values())
        mixed = one["mixed_up"]
        lines.append(
            [
                one["variant"],
                bounds or "–",
                str(one["ways"]),
                ", ".join(one["false_alarms"]) or "none",
                ", ".join(one["held_out"]) or "none",
                f"{sum(mixed.values())} of {len(mixed)}" if mixed else "–",
                *cells,
                f"{one['misses']:.0%}",
            ]
        )
    return head, lines


def provenance_page(report: Mapping[str, Any]) -> str:
    """Return where it all came from, as HTML."""
    return "<h2>Provenance</h2>" + _table(["what", "value"], provenance_lines(report), wrap=True)


def provenance_lines(report: Mapping[str, Any]) -> list[list[str]]:
    """Return (what, value) of where it all came from."""
    data, found = report["data"], report["provenance"]
    rows = [["source", str(report["digest"])]]
    if report.get("manifest"):
        rows.append(["bundle", f"{report['path']} ({report['manifest']})"])
    rows += [
        ["data", data["description"]],
        *([f"{part} samples", str(data[f"{part}_digest"])] for part in ("selection", "test")),
        ["machine", ", ".join([found["machine"]["arch"], *found["machine"].get("cpu_features", [])])],
        ["seed", str(found["seed"])],
        *([f"made by {name}", version] for name, version in found["tools"].items()),
    ]
    return [list(row) for row in rows]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], *, wrap: bool = False) -> str:
    kind = " class='left wrap'" if wrap else ""
    top = "".join(f"<th{' class=left' if wrap else ''}>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<div class='wide'><table><tr>{top}</tr>{body}</table></div>"


def _round_up(value: float) -> float:
    """Return the end of an axis that has round ticks."""
    for step in (0.25, 0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0):
        if value <= step:
            return step
    return value * 1.05
