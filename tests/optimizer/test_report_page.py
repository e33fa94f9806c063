"""The report as a page: every name in it is somebody else's, every screen is somebody's."""

from __future__ import annotations

import html
import itertools
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.services import needs
from wherry_optimizer import card, page, pictures

EVIL = (
    "<script>alert(1)</script>]]></style></title></svg><img src=//x.invalid onerror=alert(2)>'\"&|](//x.invalid)\n# a\\"
)
NAMES_SHOWN = 25
FRAME_SECONDS_MAX = 60
"""For a browser to start and draw a page, on a busy machine."""
FRAME = """<!doctype html><body><iframe style="border:0;width:360px;height:4000px" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const inner = event.target.contentDocument;
  for (const one of inner.querySelectorAll("details")) one.open = true;
  document.title = `page ${{inner.documentElement.scrollWidth}} of ${{inner.documentElement.clientWidth}}, `
    + `scrolling in itself ${{[...inner.querySelectorAll(".wide")].filter(one => one.scrollWidth > one.clientWidth).length}}`;
}};
</script>"""


class Parsed(HTMLParser):
    """Every element of a page as (name, attributes), and what is written in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append((self.elements[-1][0] if self.elements else "", data))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def row(name: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "passes": [{"use": "quantize-static"}],
        "passed": True,
        "why": "",
        "by": None,
        "pareto": False,
        "download_bytes": 250_000,
        "download_ratio": 0.25,
        "latency_us": 500.0,
        "latency_ratio": 0.5,
        "peak_memory_bytes": 2e7,
        "value": 0.97,
        "drop": 0.001,
        "interval": [-0.001, 0.003],
        "error": 0.02,
        "notes": [],
    } | more


def report(
    *rows: dict[str, Any], name: str = "model.onnx", chosen: str = "int8", drop_max: float = 0.005
) -> dict[str, Any]:
    """A report of these candidates, `name` wherever names stand."""
    source = row("float", passes=[], download_ratio=1.0, latency_ratio=1.0, drop=0.0, interval=[0.0, 0.0])
    held = {"id": chosen, "passed": True, "why": name, "drop": 0.0, "interval": [-0.001, 0.001], "samples": 9}
    proof = {
        "variant": name,
        "misses": 0.5,
        "broken": {name: {"caught": 1, "tried": 2, "unseen": 1}},
        "ways": 3,
        "false_alarms": [name],
        "held_out": [],
        "mixed_up": {name: True},
    }
    return {
        "model": name,
        "digest": "sha256:00",
        "metric": name,
        "data": {
            "description": name,
            "labelled": True,
            "selection": 9,
            "test": 9,
            "selection_digest": "sha256:11",
            "test_digest": "sha256:22",
        },
        "budget": {"drop_max": drop_max, "floor": None, "error_max": 0.5, "interval_max": 2 * drop_max},
        "provenance": {"tools": {name: name}, "seed": 0, "machine": {"arch": name, "cpu_features": [name]}},
        "targets": {
            name: {
                "about": name,
                "chosen": chosen,
                "reason": name,
                "best_by": {"size": chosen},
                "confirmations": [held],
                "candidates": [source, *rows],
            }
        },
        "golden": {
            "vectors": [{"traits": [name], "tells": 1, "notices": 2}],
            "proofs": [proof],
            "tolerances": {name: {name: 0.001}},
            "misses_warned_above": 0.25,
        },
    }


def hostile() -> dict[str, Any]:
    """A report whose every name is hostile, with layers, refusals and what nobody measured."""
    layers = [{"layer": EVIL, EVIL: EVIL, "output_error": 0.1}]
    nothing = dict.fromkeys(
        ("download_bytes", "download_ratio", "latency_us", "latency_ratio", "value", "drop", "interval", "error")
    )
    return report(
        row(EVIL, pareto=True, notes=[{"pass": EVIL, "layers": layers}]),
        row(f"{EVIL}2", passed=False, by=EVIL, why=EVIL, latency_ratio=None, latency_us=None),
        row("unmade", passed=False, by="pass_noop", why="nothing to do", peak_memory_bytes=None, **nothing),
        *(row(f"levels-{number}+{'long-' * 12}{number}", pareto=True) for number in range(NAMES_SHOWN)),
        name=EVIL,
        chosen=EVIL,
    )


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, as WCAG 2.2 defines it, 1 to 21."""

    def luminance(colour: str) -> float:
        digits = "".join(digit * 2 for digit in colour) if len(colour) == 3 else colour
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_no_name_becomes_markup_and_nothing_comes_from_elsewhere() -> None:
    parsed = Parsed(card.page(hostile()))
    assert {name for name, _ in parsed.elements} & {"script", "img", "a", "link", "iframe"} == set()
    names = {key for _, attributes in parsed.elements for key in attributes}
    assert not [key for key in names if key.startswith("on") or key in {"src", "href", "xlink:href"}]
    assert "url(" not in page.STYLE
    assert "@import" not in page.STYLE
    assert len(parsed.all("style")) == 1
    (policy,) = [one["content"] for one in parsed.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'"), "and a name that got through would still do nothing"


def test_no_name_breaks_the_model_card() -> None:
    words = card.markdown(hostile())
    assert "<script" not in words
    assert "](" not in words
    assert [line for line in words.splitlines() if line.startswith("# ")] == [words.splitlines()[0]]
    cells = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in words.splitlines() if line.startswith("|")]
    assert set(cells) == {len(card.HEAD) + 1, 9}, "candidates, and golden vectors of one kind of broken file"


def test_a_reader_that_sees_nothing_finds_its_way() -> None:
    parsed = Parsed(card.page(hostile()))
    assert parsed.all("html") == [{"lang": "en"}]
    levels = [int(name[1]) for name, _ in parsed.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(one.get("scope") in {"col", "row"} for one in parsed.all("th"))
    assert len(parsed.all("thead")) == len(parsed.all("table")) >= 4
    drawn = [one for one in parsed.all("svg") if one.get("aria-hidden") != "true"]
    assert len(drawn) == len(parsed.all("desc")) == 2
    assert all(one.get("role") == "img" for one in drawn)
    scrolling = [attributes for attributes in parsed.all("div") if attributes.get("class") == "wide"]
    assert len(scrolling) == len(drawn) + len(parsed.all("table")), "tables and pictures scroll in themselves"
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in scrolling), "by keyboard too"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_marks_stand_out_from_what_is_behind_them(scheme: str) -> None:
    sets = [dict(re.findall(r"--(\w+):#([0-9a-f]+)", part)) for part in re.findall(r":root\{([^}]*)\}", page.STYLE)]
    light, dark = sets
    assert light.keys() == dark.keys()
    colours = light if scheme == "light" else dark
    for ground in ("back", "pick", "note"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground
    assert contrast(colours["soft"], colours["back"]) >= 4.5
    for mark in ("front", "beaten", "good", "bad", "budget"):
        assert contrast(colours[mark], colours["back"]) >= 3.0, mark


def test_names_of_the_plot_do_not_overlap_and_stay_in_the_picture() -> None:
    rows = [row(f"levels-{number}", pareto=True, latency_ratio=0.5 + number / 1e4) for number in range(40)]
    shown = pictures.plot(rows, "levels-3")
    height = float(re.search(rf"viewBox='0 0 {pictures.WIDTH} ([\d.]+)'", shown)[1])  # type: ignore[index]
    places = sorted(float(y) for y in re.findall(r"y='([\d.]+)' text-anchor='start'", shown))
    assert len(places) == 40
    assert all(after - before >= pictures.LINE - 0.2 for before, after in itertools.pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= height
    assert "…" in pictures.plot([row("x" * 99, pareto=True)], ""), (
        "a name that has no room is cut, and whole in its title"
    )
    assert "x" * 99 in pictures.plot([row("x" * 99, pareto=True)], "")


@pytest.mark.parametrize("ratios", [(1.0, 1.0), (0.001, 7.3), (0.97, 1.04), (0.2, 0.5), (1.0, 1.33)])
def test_every_mark_is_between_round_ticks_of_axes_that_say_their_unit(ratios: tuple[float, float]) -> None:
    rows = [row(f"v{ratio}", download_ratio=ratio, latency_ratio=ratio, pareto=True) for ratio in ratios]
    shown = pictures.plot(rows, "")
    end = pictures.WIDTH - pictures.RIGHT
    marks = [
        (float(x), float(y)) for x, y in re.findall(r"<circle class='front' cx='([\d.]+)' cy='([\d.]+)' r='6'", shown)
    ]
    assert len(marks) == 2
    assert all(pictures.LEFT <= x <= end and pictures.TOP <= y <= pictures.HEIGHT - pictures.BOTTOM for x, y in marks)
    ticks = [float(words) for words in re.findall(r"text-anchor='(?:middle|end)'>([\d.e+-]+)<", shown)]
    assert len(ticks) >= 6, "three of each axis"
    assert min(ticks) <= min(ratios) <= max(ratios) <= max(ticks)
    assert "latency, × the source" in shown
    assert "download, × the source" in shown


def test_an_interval_beyond_the_picture_has_an_arrow_and_no_dot_where_the_drop_is_not() -> None:
    beyond = row("far", drop=0.9, interval=[0.8, 0.95], passed=False)
    shown = pictures.intervals([row("near"), beyond], 0.005, "accuracy")
    near, far = re.findall(r"<g class=.*?</g>", shown)
    assert "<circle" in near
    assert near.count("<path") == 1
    assert "<circle" not in far
    assert far.count("<path") == 2
    assert "drop of accuracy against the source" in shown
    assert "far, kept out: +0.9000 [+0.8000, +0.9500]" in shown
    assert "budget 0<" in pictures.intervals([row("near")], 0.0, "accuracy"), "no budget at all still has a scale"


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    unmeasured = row("slow", latency_ratio=None, latency_us=None)
    assert "no plot" in pictures.plot([unmeasured], "")
    assert "1 more passed, whose latency was not measured" in pictures.plot([row("int8"), unmeasured], "int8")
    shown = card.page(report(unmeasured, row("int8")))
    assert re.search(r">slow</th><td>yes</td><td>250 kB ×0\.250<span[^>]*></span></td><td>–</td>", shown)
    assert "500 µs ×0.500" in shown
    assert "1.5 ms ×3.000" in card.page(report(row("int8", latency_us=1500.0, latency_ratio=3.0)))
    assert pictures.intervals([row("int8", interval=None)], 0.005, "accuracy") == ""


def test_layers_stand_costliest_first_and_a_long_table_says_what_it_leaves_out() -> None:
    many = [{"layer": f"conv{number}", "output_error": number / 1000} for number in range(page.LAYERS_SHOWN_MAX + 8)]
    kept = [
        {"layer": "gains little", "output_error_without": 0.39},
        {"layer": "gains much", "output_error_without": 0.1},
    ]
    notes = [
        {"pass": "round-obs", "layers": many},
        {"pass": "quantize-static", "output_error": 0.4, "sensitivity": kept},
    ]
    shown = page.layers([row("int8", notes=notes)], "int8")
    assert "48 layers, the 40 that cost most" in shown
    assert shown.index(">conv47<") < shown.index(">conv8<")
    assert ">conv7<" not in shown
    assert shown.index("gains much") < shown.index("gains little")
    assert shown.count("<details open>") == 2, "what was chosen is open"
    assert "<details>" in page.layers([row("int8", notes=notes)], "another")


def test_a_browser_shows_it_on_a_phone_without_an_error(tmp_path: Path) -> None:
    needs("chromium")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=html.escape(card.page(hostile()))), encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=FRAME_SECONDS_MAX
    )
    said = re.search(r"<title>page (\d+) of (\d+), scrolling in itself (\d+)</title>", done.stdout)
    assert said, done.stderr
    assert int(said[1]) <= int(said[2]) <= 360, "the page itself does not scroll sideways"
    assert int(said[3]) >= 3, "the pictures and the table of variants do"
    assert "CONSOLE" not in done.stderr
