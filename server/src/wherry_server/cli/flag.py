"""`wherry flag`: feature flags of devices."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.answers import flag_tag
from wherry_server.cli import rollout
from wherry_server.cli.common import GLOBALS, AsJson, client, show, table, when
from wherry_server.desired import same_json
from wherry_shared.errors import RefusedError

app = typer.Typer(name="flag", help="Feature flags: typed values for applications on devices.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the flag.")]
Variants = Annotated[list[str] | None, typer.Option("--variant", help="NAME=VALUE, the value as JSON; repeatable.")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", help="Such as: on; on 25%; on 25% if label.site = berlin. Repeatable, asked in order."),
]
ON_OFF = {"on": True, "off": False}
"""Variants of a boolean where nothing is said; the default is off."""
_RULE = re.compile(
    r"\s*(?P<variant>[A-Za-z0-9._-]+)(?:\s+(?P<share>[0-9.]+)\s*%)?(?:\s+if\s+(?P<when>.+))?\s*", re.DOTALL
)


def parse_variants(texts: list[str], kind: str) -> dict[str, Any]:
    """Return the variants of `NAME=VALUE`; of a string flag a value that is no JSON string stands for itself.

    Raises:
        RefusedError: `flag_invalid`.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise _invalid(f"{text!r} is not NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            if kind != "string":
                raise _invalid(f"{value!r} is not JSON") from error
            found[name] = value
        if kind == "string" and not isinstance(found[name], str):
            found[name] = value
    return found


def parse_rule(text: str) -> dict[str, Any]:
    """Return the rule of `VARIANT [SHARE%] [if SELECTOR]`.

    Raises:
        RefusedError: `flag_invalid`.
    """
    found = _RULE.fullmatch(text)
    if found is None:
        raise _invalid(f"{text!r} is not VARIANT [SHARE%] [if SELECTOR]")
    try:
        share = float(found["share"] or 100) / 100
    except ValueError as error:
        raise _invalid(f"{found['share']!r} is not a percentage") from error
    return {"when": found["when"] or "all", "share": share, "variant": found["variant"]}


@app.command("list")
def list_flags(name: Annotated[str, typer.Option(help="Part of the name.")] = "", as_json: AsJson = False) -> None:
    """List the flags."""
    found = client().plain(calls.list_flags(name))

    def render(out: Console) -> None:
        rows = [
            (one["name"], one["type"], one["default"], len(one["rules"]), when(one["updated_at"]), one["updated_by"])
            for one in found
        ]
        out.print(table(["FLAG", "TYPE", "DEFAULT", "#RULES", "CHANGED", "BY"], rows))

    show(found, as_json, render)


@app.command("show")
def show_flag(
    name: Name,
    device: Annotated[str | None, typer.Option(help="What this device should have, and why.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a flag, and how many devices should have which variant; or one device's."""
    if device is not None:
        one = client().plain(calls.explain_flag(name, device))
        show(one, as_json, lambda out: _explained(out, one))
        return
    found = client().plain(calls.show_flag(name))

    def render(out: Console) -> None:
        _definition(out, found)
        _spread(out, found["spread"])

    show(found, as_json, render)


@app.command()
def create(
    name: Name,
    kind: Annotated[str, typer.Option("--type", help="boolean, string, number or object.")] = "boolean",
    variant: Variants = None,
    default: Annotated[str, typer.Option(help="Variant of whoever no rule and no rollout takes.")] = "",
    rule: Rules = None,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a flag; a boolean has the variants on and off, and is off, unless something else is said."""
    variants = parse_variants(variant or [], kind)
    if kind == "boolean" and not variants:
        variants, default = ON_OFF, default or "off"
    wish = {
        "name": name,
        "type": kind,
        "description": description,
        "variants": variants,
        "default": default or next(iter(variants), ""),
        "rules": [parse_rule(one) for one in rule or []],
    }
    made = client().plain(calls.create_flag(wish))
    show(made, as_json, lambda out: _definition(out, made))


@app.command("set")
def set_flag(
    name: Name,
    default: Annotated[str | None, typer.Option(help="Variant of whoever no rule and no rollout takes.")] = None,
    variant: Variants = None,
    drop: Annotated[list[str] | None, typer.Option(help="A variant that goes; repeatable.")] = None,
    rule: Rules = None,
    no_rules: Annotated[bool, typer.Option("--no-rules", help="Take all rules away.")] = False,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change a flag at once for every device, after saying how many get another value. Rules given replace all rules."""
    with client() as server:
        known = server.plain(calls.show_flag(name))
        wish = {field: known[field] for field in ("name", "type", "description", "variants", "default", "rules")}
        kept = {key: value for key, value in known["variants"].items() if key not in (drop or [])}
        wish["variants"] = {**kept, **parse_variants(variant or [], known["type"])}
        if default is not None:
            wish["default"] = default
        if description is not None:
            wish["description"] = description
        if rule or no_rules:
            wish["rules"] = [parse_rule(one) for one in rule or []]
        if not (yes or as_json or GLOBALS.as_json):
            coming = server.plain(calls.preview_flag(wish))
            for field in sorted(wish):
                if not same_json(known[field], wish[field]):
                    typer.echo(f"  - {field} = {json.dumps(known[field], ensure_ascii=False)}")
                    typer.echo(f"  + {field} = {json.dumps(wish[field], ensure_ascii=False)}")
            typer.echo(f"{coming['changed']} of {coming['devices']} devices get another value")
            typer.confirm("do that?", abort=True)
        made = server.plain(calls.change_flag(name, wish, if_match=flag_tag(known)))
    show(made, as_json, lambda out: _definition(out, made))


@app.command()
def preview(
    name: Name,
    default: Annotated[str | None, typer.Option(help="Variant of whoever no rule and no rollout takes.")] = None,
    rule: Rules = None,
    as_json: AsJson = False,
) -> None:
    """Say how many devices another default or other rules would change, without saving them."""
    with client() as server:
        known = server.plain(calls.show_flag(name))
        wish = {field: known[field] for field in ("name", "type", "description", "variants", "default", "rules")}
        if default is not None:
            wish["default"] = default
        if rule:
            wish["rules"] = [parse_rule(one) for one in rule]
        found = server.plain(calls.preview_flag(wish))

    def render(out: Console) -> None:
        out.print(f"{found['changed']} of {found['devices']} devices get another value")
        _spread(out, found["spread"])

    show(found, as_json, render)


@app.command("rollout")
def roll_out(  # one option per wish
    name: Name,
    variant: Annotated[str, typer.Argument(help="The variant that devices should have.")],
    cohort: Annotated[str | None, typer.Option(help="Saved cohort.")] = None,
    selector: Annotated[str | None, typer.Option(help='Selector, such as "all".')] = None,
    device: Annotated[str | None, typer.Option(help="One device, by id or name.")] = None,
    stages: Annotated[
        str | None, typer.Option(help=f"Shares of the cohort in percent (default: {rollout.STAGES}).")
    ] = None,
    soak: Annotated[
        int | None, typer.Option(help="Seconds that a stage soaks after its sample stood (default: 0).")
    ] = None,
    confirmed_min: Annotated[
        int | None, typer.Option(help="Devices with traffic that each stage needs (default: 1).")
    ] = None,
    measure: Annotated[str, typer.Option(help="Model on whose requests devices are judged; all unless told.")] = "",
    min_requests: Annotated[
        int | None, typer.Option(help="Requests that confirm a device (default: 20); 0: having the variant does.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Seconds after which a trial without traffic ends.")] = None,
    plan: Annotated[Path | None, typer.Option(help="More of the plan, as TOML, YAML or JSON.")] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Start it and watch it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Roll a variant out in stages; it waits until it is started. From then on it is a rollout: wherry rollout."""
    given = {"cohort": cohort, "selector": selector, "device": device, "measure": measure}
    planned = rollout.with_stages(rollout.read_plan(plan), plan, stages, soak, confirmed_min)
    wish: dict[str, Any] = {**planned, "flag": name, "variant": variant}
    wish |= {key: value for key, value in given.items() if value}
    terms = {key: value for key, value in (("min_requests", min_requests), ("max_s", trial)) if value is not None}
    if terms:
        stated = wish.get("trial")
        wish["trial"] = {**(stated if isinstance(stated, dict) else {}), **terms}
    wish["start"] = start or watch
    rollout.run(client(), wish, watch=watch, as_json=as_json)


@app.command()
def delete(name: Name, as_json: AsJson = False) -> None:
    """Delete a flag that no rollout gives; applications get their own defaults from then on."""
    client().send(calls.delete_flag(name))
    show({"name": name, "deleted": True}, as_json, lambda out: out.print(f"flag {name} is deleted"))


def _definition(out: Console, found: dict[str, Any]) -> None:
    out.print(f"flag {found['name']}  {found['type']}  revision {found['revision']}  {found['description']}".rstrip())
    for name, value in found["variants"].items():
        default = "  (default)" if name == found["default"] else ""
        out.print(f"  {name} = {json.dumps(value, ensure_ascii=False)}{default}", markup=False)
    for number, rule in enumerate(found["rules"], 1):
        share = "" if rule["share"] == 1 else f" {rule['share'] * 100:.6g}%"
        out.print(f"  rule {number}: {rule['variant']}{share} if {rule['when']}", markup=False)


def _spread(out: Console, spread: list[dict[str, Any]]) -> None:
    rows = [(one["variant"], _by(one), one["devices"]) for one in spread]
    out.print(table(["VARIANT", "BY", "#DEVICES"], rows))


def _explained(out: Console, one: dict[str, Any]) -> None:
    out.print(
        f"{one['name']}: {one['flag']} = {json.dumps(one['value'])}  ({one['variant']}, by {_by(one)})", markup=False
    )
    if not one["offered"]:
        out.print("its offer does not carry the flag yet")
    else:
        known = "and it knows that offer" if one["known"] else "which it has not spoken of yet"
        out.print(f"its offer says {json.dumps(one['offered_value'])}, {known}", markup=False)


def _by(one: dict[str, Any]) -> str:
    return f"{one['by']} {one['number']}" if one["number"] else str(one["by"])


def _invalid(message: str) -> RefusedError:
    return RefusedError("flag_invalid", message, consequence="nothing was changed", next_step="see docs/flags.md")
