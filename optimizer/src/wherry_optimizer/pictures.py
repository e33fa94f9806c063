"""The two pictures of a report, as plain SVG: download against latency, and the drop of every variant with its interval.

Colours are classes that the style of the page fills, so that they follow a light or dark screen. Whatever a picture shows by colour
it also shows by shape, and a table beside it has the figures.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

WIDTH, HEIGHT = 880, 360
"""Of a picture, in units of its view box; one with more names is higher."""
LEFT, RIGHT, TOP, BOTTOM = 60, 300, 16, 48
"""Room around the plot; names stand right of it."""
LINE = 20
"""Between two names, from base line to base line."""
NAME_CHARS_MAX = 36
"""Of a name in a picture; the table has it whole, and so does the mark when pointed at."""
ROUND = (1.0, 2.0, 5.0)
"""Ticks are these times a power of ten."""
FINE = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
FINEST = (*(n / 10 for n in range(10, 20)), *(n / 4 for n in range(8, 20)), *(n / 2 for n in range(10, 20)))
GRADES = ((ROUND, 4), (FINE, 4), (FINEST, 0))
"""Of ticks of a logarithmic axis, each with how many there have to be, else the next finer ones are taken."""
TICKS = 6
"""About as many on a linear axis."""


def plot(rows: Sequence[Row], chosen: str) -> str:
    """Return download against latency, both as shares of the source and on logarithmic axes, with the Pareto set named."""
    passed = [row for row in rows if row["passed"]]
    shown = [row for row in passed if row["latency_ratio"] and row["download_ratio"]]
    if not shown:
        return "<p>Of no variant that passed a latency was measured here, so there is no plot.</p>"
    across = _decades([row["download_ratio"] for row in shown])
    upward = _decades([row["latency_ratio"] for row in shown])
    named = [row for row in shown if row["pareto"] or row["id"] == chosen or not row["passes"]]
    height = max(HEIGHT, TOP + BOTTOM + LINE * len(named))
    end, floor = WIDTH - RIGHT, height - BOTTOM

    def x_of(value: float) -> float:
        return LEFT + (end - LEFT) * _share(value, across)

    def y_of(value: float) -> float:
        return floor - (floor - TOP) * _share(value, upward)

    marks = []
    for value in across:
        marks.append(_line(x_of(value), TOP, x_of(value), floor, "grid"))
        marks.append(_text(x_of(value), floor + 18, f"{value:g}", "middle"))
    for value in upward:
        marks.append(_line(LEFT, y_of(value), end, y_of(value), "grid"))
        marks.append(_text(LEFT - 8, y_of(value) + 4, f"{value:g}", "end"))
    marks.append(_text((LEFT + end) / 2, height - 8, "download, × the source", "middle"))
    turned = f"transform='translate(16 {(TOP + floor) / 2:.0f}) rotate(-90)'"
    marks.append(f"<text {turned} text-anchor='middle'>latency, × the source</text>")
    path, best = "", math.inf
    for download, latency in sorted((row["download_ratio"], row["latency_ratio"]) for row in shown):
        if latency < best:
            path += f"{'H' if path else 'M'}{x_of(download):.1f}" + ("V" if path else " ") + f"{y_of(latency):.1f}"
            best = latency
    marks.append(f"<path class='stairs' d='{path}'/>")
    named.sort(key=lambda row: y_of(row["latency_ratio"]))
    for row, y in zip(named, _apart([y_of(row["latency_ratio"]) for row in named], TOP + 4, floor), strict=True):
        marks.append(_line(x_of(row["download_ratio"]), y_of(row["latency_ratio"]), end + 10, y, "leader"))
        marks.append(_text(end + 14, y + 4, _short(row["id"]), "start"))
    for row in sorted(shown, key=lambda row: (row["id"] == chosen, row["pareto"])):
        kind = "front" if row["pareto"] else "beaten"
        told = f"{row['id']}: download ×{row['download_ratio']:.3f}, latency ×{row['latency_ratio']:.3f}"
        x, y = x_of(row["download_ratio"]), y_of(row["latency_ratio"])
        if row["id"] == chosen:
            kind = "chosen"
            marks.append(f"<circle class='ring' cx='{x:.1f}' cy='{y:.1f}' r='10'/>")
        marks.append(f"<circle class='{kind}' cx='{x:.1f}' cy='{y:.1f}' r='6'>{_title(told)}</circle>")
    key = [_key("front", "in the Pareto set: no other is as good in download, latency, peak memory and value at once")]
    if chosen:
        key.insert(0, _key("chosen", "chosen, with a ring"))
    if len(named) < len(shown):
        key.append(_key("beaten", "passed, but beaten"))
    unseen = len(passed) - len(shown)
    key.append("dashed: the best of download and latency alone. Both axes are logarithmic; left and down is better.")
    if unseen:
        key.append(f"{unseen} more passed, whose latency was not measured.")
    told = f"{len(shown)} variants that passed, by download and latency; the table below has their figures."
    return _figure("Download against latency", told, height, marks, key)


def intervals(rows: Sequence[Row], limit: float, metric: str, confirmations: Sequence[Row] = ()) -> str:
    """Return the drop of every variant with its interval against the budget, and what the confirmations found."""
    shown = [
        (row["id"], row["drop"], row["interval"], "front" if row["passed"] else "beaten")
        for row in rows
        if row["drop"] is not None and row["interval"] and None not in row["interval"]
    ]
    shown += [
        (row["id"], row["drop"], row["interval"], "chosen" if row["passed"] else "bad")
        for row in confirmations
        if row["drop"] is not None and None not in row["interval"]
    ]
    if not shown:
        return ""
    # what is far beyond the budget is cut and gets an arrow: the picture is of what was close
    reach = limit or max(abs(edge) for _, _, pair, _ in shown for edge in pair) or 1e-6
    most: float = max(2.5 * reach, *(min(high, 6 * reach) for _, _, (_, high), _ in shown))
    least: float = min(-0.2 * reach, *(max(low, -3 * reach) for _, _, (low, _), _ in shown))
    start, end, top = RIGHT, WIDTH - 30, 28
    height = top + LINE * len(shown) + 52
    floor = height - 44

    def at(value: float) -> float:
        return start + (end - start) * (min(max(value, least), most) - least) / (most - least)

    marks = []
    for value in _steps(least, most):
        marks.append(_line(at(value), top, at(value), floor, "axis" if value == 0 else "grid"))
        marks.append(_text(at(value), floor + 16, f"{value:g}", "middle"))
    marks.append(_line(at(limit), top - 8, at(limit), floor, "budget"))
    marks.append(_text(at(limit), top - 12, f"budget {limit:g}", "middle"))
    marks.append(_text((start + end) / 2, height - 8, f"drop of {_short(metric)} against the source", "middle"))
    ends = {"chosen": ", confirmed", "bad": ", NOT confirmed", "beaten": ", kept out"}
    for number, (name, drop, (low, high), kind) in enumerate(shown):
        y = top + 12 + LINE * number
        told = f"{name}{ends.get(kind, '')}: {drop:+.4f} [{low:+.4f}, {high:+.4f}]"
        marks.append(_text(start - 12, y + 4, _short(name, ends.get(kind, "")), "end"))
        marks.append(f"<g class='{kind}'>{_title(told)}<path class='span' d='M{at(low):.1f} {y}H{at(high):.1f}'/>")
        if low < least:
            marks.append(f"<path d='M{start - 8} {y}l9 -5v10z'/>")
        if high > most:
            marks.append(f"<path d='M{end + 8} {y}l-9 -5v10z'/>")
        if least <= drop <= most:
            marks.append(f"<circle cx='{at(drop):.1f}' cy='{y}' r='4.5'/>")
        marks.append("</g>")
    kinds = {kind for *_, kind in shown}
    meanings = {
        "front": "passed",
        "beaten": "kept out",
        "chosen": "confirmed on the test split",
        "bad": "not confirmed there",
    }
    key = [_key(kind, words) for kind, words in meanings.items() if kind in kinds]
    key.append("Bars are 95 % intervals; right is worse; an arrow goes on beyond the picture.")
    told = f"{len(shown)} drops with their intervals against a budget of {limit:g}; the table has the figures."
    return _figure("Drop of the metric, with its interval", told, height, marks, key)


def _figure(title: str, told: str, height: float, marks: Sequence[str], key: Sequence[str]) -> str:
    return (
        f"<h3>{title}</h3><figure><div class='wide' role='region' tabindex='0' aria-label='{title}'>"
        f"<svg viewBox='0 0 {WIDTH} {height}' role='img'>{_title(title)}<desc>{html.escape(told)}</desc>{''.join(marks)}"
        f"</svg></div><figcaption>{' '.join(key)}</figcaption></figure>"
    )


def _key(kind: str, words: str) -> str:
    return f"<span class='key'><svg class='dot' viewBox='0 0 12 12' aria-hidden='true'><circle class='{kind}' cx='6' cy='6' r='5'/></svg>{words}</span>"


def _title(words: str) -> str:
    return f"<title>{html.escape(words)}</title>"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{html.escape(words)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f"<line class='{kind}' x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'/>"


def _short(name: str, end: str = "") -> str:
    """Return a name with its end, cut in the middle where there is no room: how one begins and ends tells it from others."""
    room = NAME_CHARS_MAX - len(end)
    return (name if len(name) <= room else f"{name[: room // 2]}…{name[-(room - room // 2 - 1) :]}") + end


def _apart(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Return ascending places near those wanted, also ascending, `LINE` apart and within the bounds where there is room."""
    places: list[float] = []
    for one in wanted:
        places.append(max(one, places[-1] + LINE if places else low))
    for index in reversed(range(len(places))):
        places[index] = min(places[index], high)
        high = places[index] - LINE
    return places


def _decades(values: Sequence[float]) -> list[float]:
    """Return round ticks of a logarithmic axis from at most the least value to at least the greatest."""
    powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
    found: list[float] = []
    for digits, least in GRADES:
        ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
        first = max(index for index, tick in enumerate(ticks) if tick <= min(values))
        last = min(index for index, tick in enumerate(ticks) if tick >= max(values))
        found = ticks[first - (first == last) : last + 1 + (first == last)]
        if len(found) >= least:
            break
    return found


def _steps(low: float, high: float) -> list[float]:
    """Return round ticks of a linear axis, within it."""
    rough = (high - low) / TICKS
    power = math.floor(math.log10(rough))
    step = next(tick for tick in (float(f"{digit}e{power}") for digit in (*ROUND, 10)) if tick >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _share(value: float, ticks: Sequence[float]) -> float:
    return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
