"""`wherry deploy` and `wherry rollback`: the short ways of the first day."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from wherry_server import calls
from wherry_server.cli import rollout
from wherry_server.cli.common import AsJson, client, show
from wherry_shared.errors import RefusedError

commands = typer.Typer()
TRIAL_S = 60


@commands.command()
def deploy(
    target: Annotated[str, typer.Argument(help="MODEL:VERSION")],
    device: Annotated[str | None, typer.Option(help="One device, by id or name.")] = None,
    cohort: Annotated[str | None, typer.Option(help="A saved cohort.")] = None,
    selector: Annotated[str | None, typer.Option(help='A selector, such as "all".')] = None,
    trial: Annotated[int, typer.Option(help="Seconds after which a trial without traffic ends.")] = TRIAL_S,
    attempt: Annotated[int, typer.Option(help="Above 1: try again where the bundle is known to be bad.")] = 1,
    supersede: Annotated[bool, typer.Option("--supersede", help="Take devices from a rollout under way.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Watch it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a bundle to a device or a cohort in one stage.

    Everybody at once, back again if more than a tenth fail; a device without traffic is confirmed by its golden vectors.
    """
    given = {"device": device, "cohort": cohort, "selector": selector}
    whom = {key: value for key, value in given.items() if value}
    if len(whom) != 1:
        raise RefusedError(
            "plan_target",
            "say where to deploy by exactly one of --device, --cohort or --selector",
            next_step=f"wherry deploy {target} --device NAME",
        )
    wish: dict[str, Any] = {
        **whom,
        "models": [rollout.parse_target(target)],
        "stages": [{"share": 1.0, "confirmed_min": 0}],
        "trial": {"max_s": trial},
        "attempt": attempt,
        "supersede": supersede,
        "start": True,
    }
    rollout.run(client(), wish, watch=watch, as_json=as_json)


@commands.command()
def rollback(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    device: Annotated[str | None, typer.Option(help="On this device only.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Watch it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a model back to what ran before: where its newest rollout reached, or on one device."""
    api = client()
    found = api.plain(calls.roll_back(model, device))
    if not watch:
        state = f"{found['wanted']} is wanted (now {found['state']})" if found["wanted"] else found["state"]
        words = f"rollout {found['number']} ({found['model']}:{found['version']}): {state}"
        show(found, as_json, lambda out: out.print(words))
        return
    try:
        rollout.follow(api, found["number"], as_json=as_json)
    except typer.Exit:
        if api.send(calls.show_rollout(found["number"])).state != "reverted":
            raise
