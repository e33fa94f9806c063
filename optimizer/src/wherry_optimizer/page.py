"""Parts of a report as HTML and Markdown that a search and a recipe's build share: style, tables, layers, golden vectors, provenance.

A report opens anywhere, runs no script and asks nobody for anything. What stands in it, names of tensors among it, is others': all
of it is escaped where a cell or a mark is written.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

STYLE = """:root{color-scheme:light dark;--back:#fff;--ink:#1c2733;--soft:#55616d;--line:#dde3ea;--good:#1f7a46;--bad:#b03a2e;
--front:#2f6ca8;--beaten:#7b8894;--budget:#b5651d;--pick:#e8f4ec;--note:#fdf1dc}
@media screen and (prefers-color-scheme:dark){:root{--back:#14191f;--ink:#e4e9ee;--soft:#a3afbb;--line:#333d47;--good:#4cc38a;--bad:#ff8a7a;
--front:#6cb0ee;--beaten:#84919d;--budget:#e6a04a;--pick:#1b3327;--note:#3a2e17}}
body{font:15px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--back);overflow-wrap:anywhere}
h1{margin-bottom:.2rem;line-height:1.25}h2{margin-top:2.4rem;border-bottom:2px solid var(--line);padding-bottom:.2rem}
.wide{overflow-x:auto}.wide:focus-visible,summary:focus-visible{outline:2px solid var(--front);outline-offset:2px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92em;margin:.6rem 0;overflow-wrap:normal}
td,th{padding:.25rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}th{font-weight:600}
tbody th{font-weight:400;white-space:normal;overflow-wrap:anywhere;min-width:9rem;background:inherit}
tr>th:first-child{position:sticky;left:0}thead tr{background:var(--back)}thead th{background:inherit}
td.left,th.left,tr>:first-child{text-align:left}
table.wrap td{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:8rem}.wrap tbody th{min-width:5rem}.wrap th:last-child{text-align:left}
tbody tr{background:var(--back)}tr.no{color:var(--soft)}tbody tr.chosen{background:var(--pick)}
.bar{display:block;height:.35rem;min-width:1px;margin:1px 0 3px;background:var(--front)}.no .bar{background:var(--beaten)}
.bar.cut{border-right:5px double var(--back)}
figure{margin:.6rem 0}figcaption{font-size:.92em;color:var(--soft)}.key{display:inline-block;margin-right:.8rem}.dot{width:.7rem;margin-right:.3rem}
.wide>svg{display:block;width:100%;min-width:46rem;max-width:62rem;height:auto}text{font-size:13px;fill:var(--ink)}
.grid{stroke:var(--line)}.leader{stroke:var(--beaten);opacity:.5}.axis{stroke:var(--soft)}.budget{stroke:var(--budget);stroke-width:2}
.stairs{fill:none;stroke:var(--front);stroke-dasharray:4 4}.ring{fill:none;stroke:var(--good);stroke-width:2}
circle{stroke:var(--back)}.front{fill:var(--front)}.beaten{fill:var(--beaten)}.chosen{fill:var(--good)}.bad{fill:var(--bad)}
.span{stroke-width:3}.front>.span{stroke:var(--front)}.beaten>.span{stroke:var(--beaten);stroke-dasharray:6 3}
.chosen>.span{stroke:var(--good)}.bad>.span{stroke:var(--bad)}
.warn{background:var(--note);padding:.3rem .7rem;border-left:4px solid var(--budget)}summary{cursor:pointer}li{margin:.15rem 0}
@media print{body{margin:0;max-width:none;font-size:10pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.wide{overflow:visible}.wide>svg{min-width:0}table{font-size:.75em}td,th{white-space:normal;padding:.2rem .3rem}tbody th{min-width:0}
tr,figure,.warn{break-inside:avoid}h2,h3{break-after:avoid}details::details-content{content-visibility:visible;block-size:auto}}"""
"""Marks have at least 3 : 1 against the background, words 4.5 : 1, light and dark (WCAG 2.2, 1.4.3 and 1.4.11)."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a page may load or run: its own style. Should a name ever get through unescaped, it still does nothing."""
LAYERS_SHOWN_MAX = 40
"""Rows of one table of layers: those that cost most."""
COSTS = {
    "output_error": "error of its output, share",
    "output_error_alone": "error of the model if only it is quantized, share",
    "output_error_without": "error of the model if only it stays float, share",
}
"""What passes tell about a layer, and how it reads."""

Cell = str | tuple[str, float]
"""Text, or text with a bar below that takes this share of the cell; what is beyond 1 is cut."""


def table(
    label: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], *, kinds: Sequence[str] = (), wrap: bool = False
) -> str:
    """Return a table that scrolls in itself; the first cell of a row is its heading, and `kinds` are classes of rows."""
    top = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in head)
    body = []
    for number, (first, *cells) in enumerate(rows):
        kind = f" class='{kinds[number]}'" if kinds and kinds[number] else ""
        body.append(
            f"<tr{kind}><th scope='row'>{_cell(first)}</th>{''.join(f'<td>{_cell(cell)}</td>' for cell in cells)}</tr>"
        )
    words = html.escape(label)
    return (
        f"<div class='wide' role='region' tabindex='0' aria-label='{words}'><table{' class=wrap' if wrap else ''}>"
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    words, share = cell
    cut = " cut" if share > 1 else ""
    return f"{html.escape(words)}<span class='bar{cut}' style='width:{100 * min(share, 1.0):.0f}%'></span>"


def layers(rows: Sequence[Row], chosen: str) -> str:
    """Return what single layers of quantized and pruned variants cost, where passes told, the costliest first."""
    parts = []
    for row in rows:
        for note in row["notes"]:
            told = note.get("layers") or note.get("sensitivity") or []
            if not told:
                continue
            cost = next((key for key in COSTS if key in told[0]), None)
            costs = [_cost(one, cost, note) for one in told]
            ranked = sorted(zip(costs, told, strict=True), key=lambda pair: -pair[0])[:LAYERS_SHOWN_MAX]
            most = max(costs) or 1.0
            keys = list(told[0])
            lines: list[list[Cell]] = [
                [
                    (str(one.get(key, "–")), max(share, 0.0) / most) if key == cost else str(one.get(key, "–"))
                    for key in keys
                ]
                for share, one in ranked
            ]
            name = f"{row['id']}, {note['pass']}: {len(told)} layers"
            if len(told) > len(lines):
                name += f", the {len(lines)} that cost most"
            head = [COSTS.get(key, key.replace("_", " ")) for key in keys]
            opened = " open" if row["id"] == chosen else ""
            parts.append(f"<details{opened}><summary>{html.escape(name)}</summary>{table(name, head, lines)}</details>")
    if not parts:
        return ""
    words = "What each layer costs by itself, on calibration samples; the bar compares the layers of one table."
    return f"<h3>Layers</h3><p>{words}</p>{''.join(parts)}"


def _cost(layer: Row, key: str | None, note: Row) -> float:
    """Return what a layer costs: of one that was left float, what the whole error has more."""
    if key is None:
        return 0.0
    value = float(layer.get(key) or 0.0)
    return float(note.get("output_error") or 0.0) - value if key == "output_error_without" else value


def golden_page(golden: Mapping[str, Any] | None) -> str:
    """Return what golden vectors notice, as HTML."""
    if not golden:
        return ""
    head, lines = _proofs(golden)
    warnings = "".join(f"<p class='warn'>{html.escape(text)}</p>" for text in golden_warnings(golden))
    count = len(golden["vectors"])
    why = ["vector", "looked at for", "pairs of variants told apart", "broken files noticed"]
    picked = [
        [str(number), ", ".join(one["traits"]), str(one["tells"]), str(one["notices"])]
        for number, one in enumerate(golden["vectors"], 1)
    ]
    title = f"{count} vectors, and why each was chosen"
    return (
        f"<h2>Golden vectors</h2>{warnings}<p>{html.escape(GOLDEN_WORDS)}</p>"
        + table("What golden vectors notice", head, lines)
        + f"<details><summary>{title}</summary>{table(title, why, picked)}</details>"
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
        *(f"**{plain(text)}**\n" for text in golden_warnings(golden)),
        *markdown_table(head, lines),
        "",
    ]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of Markdown, its cells made harmless."""
    return [f"| {' | '.join(plain(cell) for cell in row)} |" for row in (head, ["---"] * len(head), *rows)]


def plain(words: str) -> str:
    """Return words that in Markdown begin no HTML, link, cell or line of their own."""
    words = " ".join(words.split())
    for sign, harmless in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("](", "]\\(")):
        words = words.replace(sign, harmless)
    return words


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
    return "<h2>Provenance</h2>" + table("Provenance", ["what", "value"], provenance_lines(report), wrap=True)


def provenance_lines(report: Mapping[str, Any]) -> list[list[str]]:
    """Return (what, value) of where it all came from."""
    data, found = report["data"], report["provenance"]
    rows = [["source", str(report["digest"])]]
    if report.get("manifest"):
        rows.append(["bundle", f"{Path(report['path']).name} ({report['manifest']})"])
    rows += [
        ["data", data["description"]],
        *([f"{part} samples", str(data[f"{part}_digest"])] for part in ("selection", "test")),
        ["machine", ", ".join([found["machine"]["arch"], *found["machine"].get("cpu_features", [])])],
        ["seed", str(found["seed"])],
        *([f"made by {name}", version] for name, version in found["tools"].items()),
    ]
    return [list(row) for row in rows]
