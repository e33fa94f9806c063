"""`wherry rollout`: make, command and watch rollouts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.text import Text

from wherry_server import calls, desired
from wherry_server.cli.common import GLOBALS, AsJson, among, client, console, show, table, when
from wherry_server.outcomes import Standing
from wherry_server.plan import Strategy
from wherry_server.rollout import State
from wherry_shared.errors import RefusedError

if TYPE_CHECKING:
    from wherry_server.client import Client

app = typer.Typer(name="rollout", help="Move devices to a bundle in stages.", no_args_is_help=True)

EXIT_NOT_DONE = 3
"""Exit status of `watch` for a rollout that ended without being done."""
EXIT_HELD = 4
"""Exit status of `watch` for a rollout that goes on only once somebody lets go of its devices, or says what follows."""
TOO_FEW = "too_few"
"""Code in `why_not_yet`: too few devices were exposed for a verdict on what failed, and a person has to say what follows."""
HELD = "held"
"""Code in `why_not_yet`: every device in reach is in quarantine, held by another rollout, or known to fail with the bundle."""
FINAL = frozenset({"done", "halted", "aborted", "reverted"})
STATES: tuple[str, ...] = get_args(State)
STRATEGIES: tuple[str, ...] = get_args(Strategy)
STAGES = "5,25,100"
BAR_CHARS = 24
BAR_CHARS_MIN = 8
"""Where the other columns leave less, there is no bar."""
GAP_CHARS = 2
"""Between two columns of a table."""
_MEASURE = Console(width=1000)
"""Wide enough to ask a table how wide it is by itself."""
Number = Annotated[int, typer.Argument(help="Number of the rollout.")]
PLACES = {
    "pending": "it was exposed and has not settled",
    "silent": "it never spoke of its exposure, or then vanished, until the deadline for that",
    "late": "it spoke of its exposure and did not settle within its deadline",
    "proved": "it came through the first round",
    "confirmed": "it has the bundle, proved by requests",
    "confirmed_idle": "it has the bundle, proved by golden vectors without requests",
    "returned": "it went back from its trial, and is in quarantine",
    "failed": "the bundle failed there, and it is in quarantine",
    "refused": "it refused the bundle, and is in quarantine",
    "excused": "it ended its attempt without a verdict: wherry rollout retry",
    "withdrawn": "it was withdrawn before it had changed (known_bad: the bundle fails on its hardware)",
    "revert_pending": "it is to go back, and has not said yet that it has",
    "reverted": "it went back",
    "superseded": "a newer rollout took it over",
    "not_member": "it is no active member of the cohort",
    "held": "another rollout holds it, and is not outranked",
    "quarantine": "it is in quarantine, where the bundle failed before: wherry quarantine release",
    "known_bad": "the bundle is known to be bad on its hardware: wherry quarantine hardware",
    "ahead": "it belongs to a later stage: its key is above the cut-off",
    "window": "its maintenance window is shut",
    "next": "it is exposed in one of the next turns",
}
WAITS = {
    "not_started": "it has not been started: wherry rollout start",
    "ordered": "the director's next turn, which takes up what was ordered",
    "paused": "it is paused: wherry rollout resume",
    "no_devices": "no device of the cohort is exposed yet: wherry cohort preview says whom a selector takes",
    "start_at": "seconds until its date",
    "approval": "people who agreed that what comes next begins: wherry rollout approve",
    "window": "devices are exposed, the others' maintenance windows are shut",
    "held": "the devices are in quarantine, held by another rollout, or the bundle is known to be bad on their hardware",
    "exposing": "devices are being exposed",
    "promoting": "devices told to let the candidate answer",
    "widening": "devices exposed, of those it ends at: it widens as far as the expected harm allows",
    "sample": "devices that have settled, of the minimum sample",
    "in_flight": "devices that have settled or passed a deadline, of those needed",
    "traffic": "devices confirmed with traffic, of those needed",
    "too_few": "devices judged, of the sample, and no more come by themselves: retry-failed, revert or abort, or wait for its deadline",
    "soak": "seconds of soaking",
    "revert_pending": "devices that are back",
    "revert_deadline": "seconds until nobody waits for them any more",
}


def parse_target(text: str) -> dict[str, str]:
    """Return {model, version} of MODEL:VERSION.

    Raises:
        RefusedError: `bad_target`.
    """
    model, colon, version = text.partition(":")
    if not (model and colon and version):
        raise RefusedError("bad_target", f"{text!r} is not MODEL:VERSION", next_step="such as file-type:1.1.0")
    return {"model": model, "version": version}


def parse_stages(text: str, soak_s: int, confirmed_min: int) -> list[dict[str, Any]]:
    """Return the stages of `5,25,100` (percent).

    Raises:
        RefusedError: `plan_stages`.
    """
    stages = []
    for part in text.split(","):
        try:
            percent = float(part.strip().removesuffix("%"))
        except ValueError:
            percent = math.nan
        if not 0 < percent <= 100:
            raise RefusedError(
                "plan_stages", f"{part!r} is not a percentage above 0 up to 100", next_step="such as 5,25,100"
            )
        stages.append({"share": percent / 100, "soak_s": soak_s, "confirmed_min": confirmed_min})
    return stages


def read_plan(file: Path | None) -> dict[str, Any]:
    """Return the fields of a plan file: TOML, YAML or JSON.

    Raises:
        RefusedError: `plan_file`.
    """
    return {} if file is None else desired.decode(file)


@app.command()
def create(  # one option per wish
    target: Annotated[str, typer.Argument(help="MODEL:VERSION")],
    cohort: Annotated[str | None, typer.Option(help="Saved cohort.")] = None,
    selector: Annotated[str | None, typer.Option(help='Selector, such as "all".')] = None,
    device: Annotated[str | None, typer.Option(help="One device, by id or name.")] = None,
    stages: Annotated[str | None, typer.Option(help=f"Shares of the cohort in percent (default: {STAGES}).")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="canary, adaptive, all_at_once, shadow, blue_green or split (docs/strategies.md).",
            autocompletion=among(STRATEGIES),
        ),
    ] = None,
    soak: Annotated[
        int | None, typer.Option(help="Seconds that a stage soaks after its sample stood (default: 0).")
    ] = None,
    confirmed_min: Annotated[
        int | None, typer.Option(help="Devices with traffic that each stage needs (default: 1).")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Seconds after which a trial without traffic ends.")] = None,
    plan: Annotated[Path | None, typer.Option(help="More of the plan, as TOML, YAML or JSON.")] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Start it and watch it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create a rollout; it waits until it is started."""
    planned = read_plan(plan)
    if strategy is not None:
        planned["strategy"] = strategy
    planned = with_stages(planned, plan, stages, soak, confirmed_min)
    wish = {**planned, "models": [parse_target(target)]}
    wish.update(
        {key: value for key, value in (("cohort", cohort), ("selector", selector), ("device", device)) if value}
    )
    if trial is not None:
        stated = wish.get("trial")
        wish["trial"] = {**(stated if isinstance(stated, dict) else {}), "max_s": trial}
    wish["start"] = start or watch
    run(client(), wish, watch=watch, as_json=as_json)


def with_stages(
    planned: dict[str, Any], plan: Path | None, stages: str | None, soak: int | None, confirmed_min: int | None
) -> dict[str, Any]:
    """Return a plan with its stages, of the file or of the options.

    Raises:
        RefusedError: `plan_conflict` or `plan_stages`.
    """
    if "stages" not in planned:
        whole = "100" if planned.get("strategy") in ("adaptive", "all_at_once", "blue_green", "split") else STAGES
        found = parse_stages(stages or whole, soak or 0, 1 if confirmed_min is None else confirmed_min)
        return {**planned, "stages": found}
    given = {"--stages": stages, "--soak": soak, "--confirmed-min": confirmed_min}
    if both := [name for name, value in given.items() if value is not None]:
        raise RefusedError(
            "plan_conflict",
            f"{plan} has stages, and so has the command: {', '.join(both)}",
            consequence="nothing was created",
            next_step="say them in one place",
        )
    return planned


def run(api: Client, wish: dict[str, Any], *, watch: bool, as_json: bool) -> None:
    """Create the rollout of a wish, and watch it if that was asked for."""
    made = api.plain(calls.create_rollout(wish))
    if watch:
        follow(api, made["number"], as_json=as_json)
    else:

        def render(out: Console) -> None:
            _details(out, made)
            if not wish.get("start"):
                out.print(f"next: wherry rollout start {made['number']}")

        show(made, as_json, render)


@app.command("list")
def list_rollouts(
    model: Annotated[str | None, typer.Option(help="Of this model.")] = None,
    state: Annotated[str | None, typer.Option(help="In this state.", autocompletion=among(STATES))] = None,
    as_json: AsJson = False,
) -> None:
    """List the newest rollouts."""
    found = client().plain(calls.list_rollouts(model, state))

    def render(out: Console) -> None:
        rows = [
            (
                one["number"],
                f"{one['model']}:{one['version']}",
                one["cohort"] or one["selector"],
                one["state"] + (f" ({one['reason']})" if one["reason"] else ""),
                f"{one['stage'] + 1} of {one['stages_total']}",
                when(one["updated_at"]),
            )
            for one in found
        ]
        out.print(table(["#NO", "BUNDLE", "FOR", "STATE", "STAGE", "CHANGED"], rows))

    show(found, as_json, render)


@app.command("show")
def show_rollout(number: Number, as_json: AsJson = False) -> None:
    """Show a rollout: stages, counts, reasons, and why it is not further yet."""
    found = client().plain(calls.show_rollout(number))
    show(found, as_json, lambda out: _details(out, found))


@app.command()
def decisions(
    number: Number,
    after: Annotated[int, typer.Option(min=0, help="Behind this revision.")] = 0,
    as_json: AsJson = False,
) -> None:
    """List what was decided on a rollout."""
    found = client().plain(calls.list_decisions(number, after))

    def render(out: Console) -> None:
        rows = [(one["revision"], when(one["at"]), "; ".join(_said(d) for d in one["decisions"])) for one in found]
        out.print(table(["#REVISION", "WHEN", "DECIDED"], rows))

    show(found, as_json, render)


@app.command()
def schema(as_json: AsJson = False) -> None:
    """Print the JSON schema of plan files, for editors and for checks in git."""
    from wherry_server.plan_schema import wish_schema

    found = wish_schema()
    show(found, as_json, lambda out: out.print_json(data=found))


@app.command()
def explain(
    number: Number,
    device: Annotated[str | None, typer.Option(help="Where this device stands, by id or name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say why a rollout or a device is where it is, and replay what was decided."""
    found = client().plain(calls.explain_rollout(number, device or ""))

    def render(out: Console) -> None:
        reason = f" ({found['reason']})" if found["reason"] else ""
        where = f", stage {found['stage'] + 1}/{found['stages_total']}" if found["stage"] >= 0 else ""
        out.print(f"rollout {number} is {found['state']}{reason}{_round(found) and ',' + _round(found)}{where}")
        for why in found["why_not_yet"]:
            out.print(f"waits: {_why(why)}", markup=False)
        for gate in found["gates"]:
            if gate["numbers"]:
                out.print(_gate(gate), markup=False)
        _say_needs(out, found["needs"])
        rows = [
            (
                one["revision"],
                when(one["at"]),
                "; ".join(_said(d) for d in one["decisions"]),
                {True: "yes", False: "NO", None: "unknown"}[one["follows"]],
            )
            for one in found["decided"]
        ]
        out.print(table(["#REVISION", "WHEN", "DECIDED", "FOLLOWS"], rows))
        differ = f"; these do not follow: {found['differing']}" if found["differing"] else ", all follow"
        out.print(f"{found['replayed']} decisions replayed from their evidence{differ}", markup=False)
        if found["device"]:
            said = {**found["device"]}
            code, name = said.pop("code"), said.pop("name")
            told = {key: when(value) if key.endswith("_at") and value else value for key, value in said.items()}
            more = ", ".join(f"{key} {value}" for key, value in told.items() if value not in (None, "", 0))
            out.print(f"{name}: {PLACES[code]} [{code}]; {more}", markup=False)

    show(found, as_json, render)


@app.command()
def devices(
    number: Number,
    state: Annotated[
        str | None,
        typer.Option(help=f"In this state: {', '.join(get_args(Standing))}.", autocompletion=among(get_args(Standing))),
    ] = None,
    stage: Annotated[int | None, typer.Option(min=1, help="Exposed by this stage.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the devices that a rollout exposed, and where each one stands."""
    found = client().plain(calls.list_rollout_devices(number, state or "", stage))

    def render(out: Console) -> None:
        rows = [
            (
                one["name"],
                one["stage"],
                one["state"],
                one["reason"],
                *(when(one[at]) if one[at] else "" for at in ("exposed_at", "settled_at", "last_seen_at")),
            )
            for one in found
        ]
        out.print(table(["DEVICE", "#STAGE", "STATE", "REASON", "EXPOSED", "SETTLED", "SEEN"], rows))

    show(found, as_json, render)


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(help="Plan, as TOML, YAML or JSON.")],
    devices: Annotated[
        int | None, typer.Option(help="So many devices of one kind, instead of the fleet as it stands.")
    ] = None,
    failed: Annotated[float, typer.Option(help="Probability that a device fails.")] = 0.01,
    silent: Annotated[float, typer.Option(help="Probability that a device stays silent.")] = 0.01,
    late: Annotated[float, typer.Option(help="Probability that a device is late.")] = 0.0,
    idle: Annotated[float, typer.Option(help="Of those confirmed, the share without traffic.")] = 0.0,
    settle: Annotated[float, typer.Option(help="Seconds in which a device settles, in the middle.")] = 120.0,
    fails: Annotated[float, typer.Option(help="Seconds until a device that fails has failed; 0: as --settle.")] = 0.0,
    returned: Annotated[float, typer.Option(help="Of those that fail, the share that goes back from a trial.")] = 1.0,
    crashed: Annotated[float, typer.Option(help="Of those that fail, the share that crashes.")] = 0.0,
    worse: Annotated[
        float, typer.Option(help="Worse than the control in each gate that has one, times the harm that matters.")
    ] = 0.0,
    spread: Annotated[float, typer.Option(help="Standard deviation of devices' values there, of the cap.")] = 0.1,
    runs: Annotated[int, typer.Option(help="How many times.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Forecast a plan by the real engine over devices whose outcomes are stated; nothing is stored."""
    outcomes = {"failed": failed, "silent": silent, "late": late, "idle": idle, "settle_s": settle, "fails_s": fails}
    outcomes |= {"returned": returned, "crashed": crashed, "worse": worse, "spread": spread}
    wish = {
        "plan": with_stages(read_plan(plan), plan, None, None, None),
        "devices": devices or 0,
        "outcomes": outcomes,
        "runs": runs,
    }
    found = client().plain(calls.simulate_rollout(wish))

    def render(out: Console) -> None:
        ends = ", ".join(f"{count}× {state}" for state, count in found["ends"].items())
        out.print(f"{found['runs']} runs over {found['devices']} devices: {ends}")
        rows = [
            (words, *found[name].values())
            for name, words in (
                ("duration_s", "seconds to the end"),
                ("detected_s", "seconds to the breach"),
                ("exposed", "devices exposed"),
                ("failed", "devices failed"),
            )
            if found[name]
        ]
        out.print(table(["", "#10 %", "#50 %", "#90 %"], rows))
        _say_needs(out, found["needs"])

    show(found, as_json, render)


@app.command()
def watch(number: Number, as_json: AsJson = False) -> None:
    """Watch a rollout until it ends; exits with 3 if it does not end done."""
    follow(client(), number, as_json=as_json)


def _command(name: calls.Command, help_text: str, typed: str = "") -> None:
    def run_command(number: Number, as_json: AsJson = False) -> None:
        found = client().plain(calls.command_rollout(number, name))
        show(found, as_json, lambda out: out.print(f"rollout {number}: {name} is wanted (now {found['state']})"))

    app.command(typed or name, help=help_text)(run_command)


@app.command()
def approve(
    number: Number,
    stage: Annotated[int | None, typer.Option(help="The stage that may begin; the next one unless told.")] = None,
    round_: Annotated[int | None, typer.Option("--round", help="Its round, 1 or 2.")] = None,
    as_json: AsJson = False,
) -> None:
    """Agree that a stage begins, where the plan asks for approval."""
    with client() as server:
        coming = server.send(calls.show_rollout(number)).following if stage is None else None
        if coming is not None:
            stage, round_ = coming.stage, round_ or coming.round
        found = server.plain(calls.approve_rollout(number, stage or 1, round_ or 1))
    what = f"stage {stage or 1}" + (f" of round {round_ or 1}" if found.get("rounds_total", 1) > 1 else "")
    show(found, as_json, lambda out: out.print(f"rollout {number}: {what} is approved (now {found['state']})"))


_command("start", "Start a rollout.")
_command("pause", "Expose no further devices; those exposed go on, and a breach still halts.")
_command("resume", "Go on after a pause.")
_command("abort", "End a rollout: what is not confirmed is withdrawn, what is confirmed stays.")
_command("retry", "Let devices that ended without a verdict try once more.")
_command("retry_failed", "Let those that failed try once more as well: their failures no longer count.", "retry-failed")
_command("revert", "Bring every device that it changed back to what it ran before.")


def follow(api: Client, number: int, *, as_json: bool) -> None:
    """Show a rollout until it ends.

    Raises:
        typer.Exit: with `EXIT_NOT_DONE`, unless it is done; with `EXIT_HELD` while it holds no device that could end it.
    """
    machine = as_json or GLOBALS.as_json
    found: dict[str, Any] = {}
    shown = (event.data for event in api.follow(number) if event.kind == "progress")
    if machine or not sys.stdout.isatty():
        last: Any = None
        for found in shown:
            said = (found["revision"], found["counts"], found["state"])
            if said != last:
                sys.stdout.write((json.dumps(found) if machine else _line(found)) + "\n")
                sys.stdout.flush()
                last = said
            if is_held(found) or is_stuck(found):
                break
    else:
        with Live(console=console(), refresh_per_second=4) as live:
            for found in shown:
                live.update(progress_view(found, live.console.width))
                if is_held(found) or is_stuck(found):
                    break
    if is_stuck(found):
        sys.stderr.write(
            f"rollout {number} waits: what failed is too few devices for a verdict, and no more are exposed before there is one"
            f" (wherry rollout devices {number}); go on with retry-failed, or end it with revert or abort\n"
        )
        raise typer.Exit(EXIT_HELD)
    if is_held(found):
        sys.stderr.write(
            f"rollout {number} waits: none of its devices may have {found['model']}:{found['version']}; each is in quarantine,"
            " held by another rollout, or of hardware on which it is known to be bad; it goes on once one is let go"
            f" (wherry rollout show {number}; wherry quarantine list)\n"
        )
        raise typer.Exit(EXIT_HELD)
    if found["state"] != "done":
        raise typer.Exit(EXIT_NOT_DONE)


def is_held(found: dict[str, Any]) -> bool:
    """Tell whether a rollout reached nobody and cannot, until a device is let go by somebody else."""
    codes = {why["code"] for why in found["why_not_yet"]}
    return found["state"] == "running" and HELD in codes and codes <= {HELD, "soak"}


def is_stuck(found: dict[str, Any]) -> bool:
    """Tell whether a rollout waits for a person's word on a failure that is too few devices to judge."""
    return found["state"] == "running" and any(why["code"] == TOO_FEW for why in found["why_not_yet"])


# --- for people ---------------------------------------------------------------------------------


def progress_view(found: dict[str, Any], width: int) -> RenderableType:
    """Return the live view of a rollout; the bar takes what the other columns leave of `width`."""
    head = Text.assemble(
        (f"rollout {found['number']}", "bold"),
        f"  {found['model']}:{found['version']} for {found['cohort'] or found['selector']}  ",
        (found["state"], "bold green" if found["state"] == "done" else "bold"),
        _round(found),
        f" ({found['reason']})" if found["reason"] else "",
    )
    rows: list[list[Any]] = []
    bars = []
    for index, stage in enumerate(found["stages"], 1):
        counts = stage["counts"]
        good = counts["confirmed"] + counts["confirmed_idle"] + counts["proved"]
        everyone = sum(counts.values())
        bars.append((good, counts["failed"], everyone))
        rows.append(
            [
                index,
                _size(stage),
                stage["state"],
                everyone,
                good,
                counts["failed"],
                counts["pending"],
                counts["silent"] + counts["late"],
                counts["withdrawn"] + counts["reverted"],
                counts["revert_pending"],
            ]
        )
    columns = ["#", "SHARE", "STAGE", "#EXPOSED", "#GOOD", "#BAD", "#UNDER WAY", "#QUIET", "#BACK", "#GOING BACK"]
    while columns[-1] in ("#BACK", "#GOING BACK") and not any(row[-1] for row in rows):
        columns.pop()  # nobody went back, as in most rollouts
        rows = [row[:-1] for row in rows]
    taken = Measurement.get(_MEASURE, _MEASURE.options, table(columns, rows)).maximum
    chars = min(BAR_CHARS, width - taken - GAP_CHARS)
    if chars >= BAR_CHARS_MIN:
        columns.insert(3, "")
        for row, counted in zip(rows, bars, strict=True):
            row.insert(3, _bar(*counted, chars))
    real, simulated = found["counts"]["real"], found["counts"]["simulated"]
    tail = f"devices: {real['exposed']} real, {simulated['exposed']} simulated exposed"
    tail += (
        f"; the cohort has {found['members']} now"
        if found["state"] in FINAL
        else f" of {found['members']} in the cohort"
    )
    gates = [Text(_gate(gate)) for gate in found["gates"] if gate.get("numbers")]
    lines = [*gates, *(Text(f"waits: {_why(why)}") for why in found["why_not_yet"])]
    return Group(head, table(columns, rows), Text(tail, style="dim"), *lines)


def _details(out: Console, found: dict[str, Any]) -> None:
    out.print(progress_view(found, out.width))
    reasons = [
        (one["stage"] + 1, one["outcome"], one["reason"], "simulated" if one["simulated"] else "real", one["devices"])
        for one in found["outcomes"]
        if one["reason"]
    ]
    if reasons:
        out.print(table(["#STAGE", "OUTCOME", "REASON", "KIND", "#DEVICES"], reasons))
    if not found["members"] and found["state"] not in FINAL:
        out.print(f"note: the cohort has no device now ({found['selector']}); those that come join it", markup=False)
    for index, stage in enumerate(found["stages"], 1):
        if stage["confirmed_min"] == 0:
            out.print(f"note: stage {index} asks for no device confirmed with traffic (confirmed_min = 0)")


def _bar(good: int, bad: int, everyone: int, chars: int) -> Text:
    if not everyone:
        return Text("·" * chars, style="dim")
    first = chars * good // everyone
    second = min(chars - first, -(-chars * bad // everyone))
    return Text.assemble(("█" * first, "green"), ("█" * second, "red"), ("·" * (chars - first - second), "dim"))


def _why(why: dict[str, Any]) -> str:
    said = WAITS.get(why["code"], f"gate {why['code'].removeprefix('gate_')}: devices judged, of the sample")
    amount = f"{why['have']} of {why['need']} " if why["need"] else ""
    return f"{amount}{said} [{why['code']}]"


def _gate(gate: dict[str, Any]) -> str:
    numbers = gate["numbers"]
    form = "{:.3g}/h" if gate["gate"] == "crash_rate" else "{:.4g}" if gate["gate"].startswith("app:") else "{:.2%}"
    estimate, low, high = (form.format(numbers[name]) for name in ("estimate", "low", "high"))
    return (
        f"gate {gate['gate']}: {gate['outcome']}; {estimate}, between {low} and {high}; evidence {numbers['e_halt']:.3g} for harm, {numbers['e_pass']:.3g} against;"
        f" {numbers['sample']} devices, about {numbers['needed']} decide"
    )


def _say_needs(out: Console, needs: list[dict[str, Any]]) -> None:
    """Say what sample the stated harm and errors ask for."""
    for one in needs:
        samples = [one["samples"][0], one["samples"][-1]] if len(one["samples"]) > 1 else one["samples"]
        said = " or ".join(
            f"{sample['devices']} devices"
            + (f" {sample['after_s'] / 3600:.3g} h after they have it" if sample["after_s"] else " that settled")
            + (f" ({sample['device_hours']:.3g} device-hours)" if sample["device_hours"] else "")
            for sample in samples
        )
        out.print(f"gate {one['gate']} needs about {said}", markup=False)


def _said(decision: dict[str, Any]) -> str:
    match decision["decision"]:
        case "expose":
            return f"expose stage {decision['stage'] + 1} ({decision['share'] * 100:g} %)"
        case "promote":
            return f"promote up to stage {decision['stage'] + 1}"
        case "withdraw":
            return f"withdraw ({decision['scope']})"
        case "retry":
            return "try again" + (", also those that failed" if decision["failed"] else "")
        case _:
            return f"{decision['state']}: {decision['reason']}"


def _size(stage: dict[str, Any]) -> str:
    if stage.get("count"):
        return str(stage["count"])
    return f"{stage['share']:.4g}".rstrip() if stage["share"] < 0.0001 else f"{stage['share'] * 100:g} %"


def _round(found: dict[str, Any]) -> str:
    """Name the round of a rollout that has two."""
    return f" round {found['round']}/2" if found.get("rounds_total", 1) > 1 else ""


def _line(found: dict[str, Any]) -> str:
    counts = {
        name: found["counts"]["real"][name] + found["counts"]["simulated"][name] for name in found["counts"]["real"]
    }
    said = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    reason = f" ({found['reason']})" if found["reason"] else ""
    waits = "; ".join(_why(why) for why in found["why_not_yet"])
    return (
        f"rollout {found['number']} {found['model']}:{found['version']} {found['state']}{reason}"
        f"{_round(found)} stage {found['stage'] + 1}/{found['stages_total']}: {said or 'nobody exposed'}"
        f"{f'; waits: {waits}' if waits else ''}"
    )
