"""`wherry-sim`: worlds of virtual time, swarms against a real server, deliberate bugs, and the demo."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import msgspec

from wherry_shared.errors import RefusedError, WherryError

EXIT_FOUND, EXIT_USAGE = 1, 2
VIOLATIONS_SHOWN = 5


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exit 1 when a world was violated, a mutant survived or the demo did not come out."""
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
    except WherryError as error:
        print(error.diagnostics(), file=sys.stderr)
        status = EXIT_USAGE if isinstance(error, RefusedError) else EXIT_FOUND
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wherry-sim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    world = commands.add_parser(
        "world", help="run scenarios of virtual time on the real machine and check what must hold"
    )
    world.add_argument("--scenario", default="", help="part of a scenario's name; all of them if not given")
    world.add_argument("--seeds", type=int, default=5, help="how many seeds each (default 5)")
    world.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    world.add_argument("--devices", type=int, default=None, help="devices instead of the scenario's number")
    world.add_argument("--list", action="store_true", help="list the scenarios and end")
    world.add_argument("--json", action="store_true", help="one JSON object per run")
    world.set_defaults(run=_world)

    mutants = commands.add_parser("mutants", help="put deliberate bugs into the machine; each has to be caught")
    mutants.add_argument("--seeds", type=int, default=6, help="seeds per scenario until a mutant counts as survivor")
    mutants.add_argument("--json", action="store_true", help="one JSON object per mutant")
    mutants.set_defaults(run=_mutants)

    swarm = commands.add_parser("swarm", help="hold many simulated devices against a real server until interrupted")
    swarm.add_argument("--server", required=True, help="address of the API, such as http://127.0.0.1:8400")
    swarm.add_argument("--token", required=True, help="enrolment token, as wherry dev prints it")
    swarm.add_argument("--devices", type=int, default=200)
    swarm.add_argument(
        "--behaviours", type=Path, default=None, help="JSON table of model behaviours; default: all are well"
    )
    swarm.add_argument("--seed", type=int, default=0)
    swarm.add_argument("--speed", type=float, default=1.0, help="how much faster than real time devices live")
    swarm.add_argument("--requests-per-s", type=float, default=20.0, help="simulated requests per device and model")
    swarm.add_argument("--name", default="swarm", help="devices are called NAME-SEED-NUMBER")
    swarm.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    swarm.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two lines of counts")
    swarm.add_argument("--seconds", type=float, default=0.0, help="end after this long; 0: until interrupted")
    swarm.set_defaults(run=_swarm)

    rollout = commands.add_parser("rollout", help="rehearse a plan on the real machine, beside its forecast")
    rollout.add_argument("plan", type=Path, help="plan file, as of wherry rollout create --plan")
    rollout.add_argument("--devices", type=int, default=100, help="how many devices (default 100)")
    rollout.add_argument(
        "--failed", type=float, default=0.0, help="share of the devices that are there on which the new version fails"
    )
    rollout.add_argument("--silent", type=float, default=0.0, help="share of devices that are away until it has ended")
    rollout.add_argument(
        "--worse", type=float, default=0.0, help="by how many times a gate's harm it is worse, where a gate compares"
    )
    for flag, what in (
        ("--stratum", "strata of a plan with strata"),
        ("--zone", "time zones, for a plan with a window"),
    ):
        rollout.add_argument(
            flag, action="append", default=[], metavar="NAME=WEIGHT", help=f"{what}; once for each, such as armv7l=0.2"
        )
    rollout.add_argument("--seed", type=int, default=0)
    rollout.add_argument("--json", action="store_true", help="one JSON object")
    rollout.set_defaults(run=_rollout)

    demo = commands.add_parser("demo", help="the whole path in one command: optimizer, server, agents, swarm, rollouts")
    demo.add_argument("--keep", action="store_true", help="leave the server running at the end")
    demo.set_defaults(run=_demo)
    return parser


def _world(options: argparse.Namespace) -> int:
    from wherry_simulators import scenarios
    from wherry_simulators.world import World

    rows = scenarios.matching(options.scenario)
    if options.list:
        for row in rows:
            print(row.name)
        return 0
    broken, rules = 0, Counter[str]()
    steps, seconds = 0, 0.0
    for row in rows:
        for seed in range(options.seed, options.seed + options.seeds):
            result = World(row, seed, devices=options.devices).run()
            steps, seconds = steps + result.steps, seconds + result.seconds
            broken += result.violation_count > 0
            rules.update(violation.rule for violation in result.violations)
            if options.json:
                print(msgspec.json.encode(result).decode(), flush=True)
                continue
            ran = ", ".join(f"{count}× {version or 'none'}" for version, count in result.running.items())
            print(
                f"{'FAIL' if result.violations else 'ok  '} {row.name} (seed {seed}): {result.devices} devices,"
                f" {result.virtual_s / 3600:.1f} h, {result.crashes} crashes, {result.messages_lost} of"
                f" {result.messages_sent} messages lost, {result.steps} steps at {result.steps_per_s:.0f}/s; end on {ran}"
            )
            for violation in result.violations[:VIOLATIONS_SHOWN]:
                print(f"       {violation}")
    if not options.json:
        print(
            f"{len(rows) * options.seeds} runs, {broken} violated; {steps} steps at {steps / max(seconds, 1e-9):.0f}/s"
        )
        for rule, count in rules.most_common():
            print(f"  {count}× {rule}")
    return EXIT_FOUND if broken else 0


def _mutants(options: argparse.Namespace) -> int:
    from wherry_simulators import mutants

    control = mutants.fate(mutants.CONTROL, options.seeds)
    if control.caught:
        where = f"{control.scenario}, seed {control.seed}"
        print(f"the machine as it is breaks a rule: {control.rule} ({where})", file=sys.stderr)
        return EXIT_FOUND
    survivors = 0
    for fate in mutants.hunt(options.seeds):
        survivors += not fate.caught
        if options.json:
            print(msgspec.json.encode(fate).decode(), flush=True)
        else:
            how = f"{fate.rule} ({fate.scenario}, seed {fate.seed})" if fate.caught else "nobody noticed"
            print(f"{'caught  ' if fate.caught else 'SURVIVED'} {fate.mutant}: {how}, {fate.runs} runs", flush=True)
    if not options.json:
        print(f"{survivors} of {len(mutants.ALL)} deliberate bugs survived")
    return EXIT_FOUND if survivors else 0


def _swarm(options: argparse.Namespace) -> int:
    from wherry_simulators import models
    from wherry_simulators.swarm import Options, Swarm

    behaviours = models.read(options.behaviours) if options.behaviours is not None else models.Behaviours()
    labels: dict[str, str] = {}
    for text in options.label:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise RefusedError("labels_invalid", f"label {text!r} is not KEY=VALUE")
        labels[key] = value
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    swarm = Swarm(
        Options(
            server=options.server,
            token=options.token,
            devices=options.devices,
            seed=options.seed,
            speed=options.speed,
            requests_per_s=options.requests_per_s,
            name=options.name,
            labels=labels,
        ),
        behaviours,
    )
    print(
        f"{options.devices} simulated devices: machine, MQTT, signatures and reports are real; what models do there comes"
        " from a table; all devices share one TUF refresh",
        file=sys.stderr,
        flush=True,
    )
    lived_s = 0.0
    with swarm:
        while True:
            print(msgspec.json.encode(swarm.counts()).decode(), flush=True)
            if stop.wait(options.every):
                return 0
            lived_s += options.every
            if options.seconds and lived_s >= options.seconds:
                return 0


def _rollout(options: argparse.Namespace) -> int:
    from wherry_server.cli.rollout import read_plan, with_stages
    from wherry_simulators.rehearsal import plan_of, rehearse, weights

    plan = plan_of(with_stages(read_plan(options.plan), options.plan, None, None, None))
    found = rehearse(
        plan,
        options.devices,
        options.failed,
        options.seed,
        silent=options.silent,
        worse=options.worse,
        strata=weights(options.stratum),
        zones=weights(options.zone),
    )
    if options.json:
        print(msgspec.json.encode(found).decode())
        return EXIT_FOUND if found.violations else 0
    for words, one in [("the real machine", found.real), *(("forecast", one) for one in found.forecast)]:
        detected = f", breach after {one.detected_s} s" if one.detected_s is not None else ""
        print(f"{words}: {one.state} after {one.duration_s} s, {one.exposed} of {found.devices} exposed{detected}")
    print(f"devices settled in {found.settle_s:.0f} s; {found.violations} rules broken")
    return EXIT_FOUND if found.violations else 0


def _demo(options: argparse.Namespace) -> int:
    demo = importlib.import_module("wherry_simulators.demo.run")
    return int(demo.main(keep=options.keep))


if __name__ == "__main__":
    main()
