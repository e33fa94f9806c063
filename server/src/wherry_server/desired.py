"""What files say that a fleet should have, and what has to change for it. Nothing here calls a server.

A cohort, or a flag, is changed into what the files say. A rollout never changes: it is known by its bundle, by whom it is for and by its attempt,
and is created once; files that now say otherwise about one that is there are refused. What no file names stays, unless pruning
is asked for, which forgets cohorts and deletes flags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from wherry_server.plan import parse_plan
from wherry_shared.errors import RefusedError
from wherry_shared.limits import MIB

SUFFIXES = (".toml", ".yaml", ".yml", ".json")
FILES_MAX = 1000
FILE_BYTES_MAX = 4 * MIB
YAML_DEPTH_MAX = 64
YAML_NODES_MAX = 200_000
"""With each alias counted as what it stands for."""
_ANY = {"manifest": "sha256:" + "0" * 64}
"""What the server adds to a model of a plan."""
FLAG = "flag:"
"""Before a flag's name where rollouts say what they roll out."""
Do = Literal["create", "change", "delete", "start"]


class Cohort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cohort that should be there."""

    name: str
    selector: str
    static: bool = False
    """Keep whom the selector takes when it is applied; applying it again takes nobody anew."""

    @property
    def fields(self) -> dict[str, Any]:
        """Whom it takes, as it is shown and as the API has it."""
        return {"selector": self.selector, **({"static": True} if self.static else {})}


class FlagRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who should get a variant."""

    variant: str
    when: str = "all"
    share: float = 1.0


class Flag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A flag that should be there; what is left out is as if it were empty."""

    name: str
    type: Literal["boolean", "string", "number", "object"]
    variants: dict[str, Any]
    default: str
    description: str = ""
    rules: list[FlagRule] = []

    @property
    def fields(self) -> dict[str, Any]:
        """All but the name, as the API has them."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        del found["name"]
        return found


class Desired(msgspec.Struct, forbid_unknown_fields=True):
    """What one file says, or all together."""

    cohorts: list[Cohort] = []
    flags: list[Flag] = []
    rollouts: list[dict[str, Any]] = []
    """Fields of plans, as `POST /rollouts` takes them."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do."""

    do: Do
    kind: Literal["cohort", "flag", "rollout"]
    name: str
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    number: int = 0


def decode(file: Path) -> dict[str, Any]:
    """Return the fields of a TOML, YAML or JSON file, as JSON has them: dates are text there.

    Raises:
        RefusedError: `plan_file`.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ValueError(f"more than {FILE_BYTES_MAX} bytes")
        if file.suffix == ".toml":
            found = msgspec.toml.decode(data, type=dict[str, Any])
        elif file.suffix in (".yaml", ".yml"):
            _check_yaml(data)
            found = msgspec.yaml.decode(data, type=dict[str, Any])
        else:
            found = msgspec.json.decode(data, type=dict[str, Any])
        plain: dict[str, Any] = msgspec.to_builtins(found, str_keys=True)
        json.dumps(plain, allow_nan=False)
        return plain
    except (OSError, ValueError, TypeError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise RefusedError(
            "plan_file",
            f"{file}: {error}",
            consequence="nothing was changed",
            next_step="see docs/formats/plan.md, and the schema: wherry rollout schema",
        ) from error


def _check_yaml(data: bytes) -> None:
    """Bound depth and size before YAML becomes values: its reader recurses in C without looking, and aliases of aliases multiply.

    Raises:
        ValueError: it is none, or too much.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    nodes = 0
    open_: list[tuple[str | None, int]] = []
    """Anchor of each collection that is not closed yet, and how many nodes came before it."""
    sizes: dict[str, int] = {}
    try:
        for event in yaml.parse(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                nodes += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_.pop()
                if anchor is not None:
                    sizes[anchor] = nodes - before
            elif isinstance(event, yaml.NodeEvent):
                if isinstance(event, yaml.CollectionStartEvent):
                    open_.append((event.anchor, nodes))
                nodes += 1
            if len(open_) > YAML_DEPTH_MAX or nodes > YAML_NODES_MAX:
                raise ValueError(f"nested deeper than {YAML_DEPTH_MAX}, or more than {YAML_NODES_MAX} values")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def read(folder: Path) -> Desired:
    """Return what all files of a folder and the folders below it, but for hidden ones, say together; or one file.

    Raises:
        RefusedError: `plan_file`, or `apply_invalid` for what is no such file, said twice, or nothing at all; what
            `plan.parse_plan` refuses of a rollout.
    """
    whole = Desired()
    below = (
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    files = [folder] if folder.is_file() else sorted(below)[: FILES_MAX + 1]
    if not files or len(files) > FILES_MAX:
        raise _invalid(f"{folder} has {len(files)} files ({', '.join(SUFFIXES)}), expected 1 to {FILES_MAX}")
    for file in files:
        try:
            found = msgspec.convert(decode(file), Desired)
        except msgspec.ValidationError as error:
            raise _invalid(f"{file}: {error}") from error
        for rollout in found.rollouts:
            _check(file, rollout)
        whole.cohorts += found.cohorts
        whole.flags += found.flags
        whole.rollouts += found.rollouts
    names = [f"cohort {cohort.name}" for cohort in whole.cohorts]
    names += [f"flag {flag.name}" for flag in whole.flags]
    names += [f"rollout {' '.join(key(rollout))}" for rollout in whole.rollouts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _invalid(f"said twice: {', '.join(twice)[:300]}")
    return whole


def _check(file: Path, wish: Mapping[str, Any]) -> None:
    """Refuse a rollout that the server would refuse, before anything is changed for its neighbours; what it names may be new."""
    name = " ".join(key(wish))
    known = {field: value for field, value in wish.items() if field not in ("cohort", "models", "start")}
    models = [{**_ANY, **one} for one in wish.get("models", []) if isinstance(one, dict)]
    value = {"value": True} if wish.get("flag") else {}
    try:
        parse_plan({**known, **value, "selector": wish.get("selector") or "all", "models": models})
    except RefusedError as error:
        raise RefusedError(
            error.code,
            f"{file}, rollout {name}: {error.message}",
            consequence="nothing was changed",
            next_step=error.next_step,
        ) from error


def key(wish: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return by what a rollout is known: bundle (or flag and variant), whom it is for, attempt.

    Raises:
        RefusedError: `apply_invalid`.
    """
    models = wish.get("models")
    whom = [f"{kind}={wish[kind]}" for kind in ("cohort", "selector") if wish.get(kind)]
    if wish.get("flag") and len(whom) == 1:
        return f"{FLAG}{wish['flag']}:{wish.get('variant')}", whom[0], str(wish.get("attempt", 1))
    if not isinstance(models, list) or not models or not isinstance(models[0], dict) or len(whom) != 1:
        raise _invalid("a rollout has models = [{model, version}], or flag and variant, and one of cohort or selector")
    bundles = "+".join(f"{one.get('model')}:{one.get('version')}" for one in models)
    return bundles, whom[0], str(wish.get("attempt", 1))


def differs(wished: Any, there: Any) -> bool:
    """Tell whether something is not as wished; what the wish does not say may be anything."""
    if isinstance(wished, dict) and isinstance(there, dict):
        return any(differs(value, there.get(name)) for name, value in wished.items())
    if isinstance(wished, list) and isinstance(there, list):
        return len(wished) != len(there) or any(differs(a, b) for a, b in zip(wished, there, strict=True))
    return bool(wished != there)


def same_json(one: Any, other: Any) -> bool:
    """Tell whether two values are the same JSON, so that 1, 1.0 and true differ as they do for flags."""
    return msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")


def changes(
    desired: Desired,
    cohorts: Mapping[str, Cohort],
    rollouts: Sequence[Mapping[str, Any]],
    *,
    flags: Mapping[str, Mapping[str, Any]] | None = None,
    prune: bool = False,
) -> list[Change]:
    """Return what has to be done, in the order in which it can be done.

    Args:
        desired: what the files say.
        cohorts: those that are there, by name.
        rollouts: those that are there, newest first, with their plans.
        flags: those that are there, by name.
        prune: whether cohorts and flags that no file names go.

    Raises:
        RefusedError: `apply_conflict`, if a rollout that is there is not as the files say; `apply_invalid`.
    """
    found: list[Change] = []
    for cohort in desired.cohorts:
        saved = cohorts.get(cohort.name)
        if saved is None:
            found.append(Change(do="create", kind="cohort", name=cohort.name, after=cohort.fields))
        elif saved != cohort:
            before, after = saved.fields, cohort.fields
            found.append(Change(do="change", kind="cohort", name=cohort.name, before=before, after=after))
    known_flags = flags or {}
    for flag in desired.flags:
        is_there = known_flags.get(flag.name)
        if is_there is None:
            found.append(Change(do="create", kind="flag", name=flag.name, after=flag.fields))
            continue
        other = [field for field, value in flag.fields.items() if not same_json(value, is_there.get(field))]
        if other:
            sides = ({field: side[field] for field in other} for side in (is_there, flag.fields))
            found.append(Change(do="change", kind="flag", name=flag.name, before=next(sides), after=next(sides)))
    there: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for one in rollouts:
        plan = one["plan"]
        whom = {"cohort": plan["cohort"]} if plan["cohort"] else {"selector": plan["selector"]}
        named = {field: plan.get(field) for field in ("models", "flag", "variant", "attempt")}
        there.setdefault(key({**whom, **named}), one)
    for wish in desired.rollouts:
        name = " ".join(key(wish))
        known = there.get(key(wish))
        if known is None:
            found.append(Change(do="create", kind="rollout", name=name, after=dict(wish)))
            continue
        said = {field: value for field, value in wish.items() if field != "start"}
        wrong = sorted(field for field, value in said.items() if differs(value, known["plan"].get(field)))
        if wrong:
            raise RefusedError(
                "apply_conflict",
                f"rollout {known['number']} ({name}) has another {', '.join(wrong)}",
                consequence="nothing was changed: a rollout keeps the plan that it was created with",
                next_step="raise its attempt in the file, or take back the edit",
            )
        if wish.get("start") is True and known["state"] == "created" and not known["wanted"]:
            found.append(Change(do="start", kind="rollout", name=name, number=known["number"]))
    if prune:
        named_cohorts = {cohort.name for cohort in desired.cohorts}
        found += [
            Change(do="delete", kind="cohort", name=name, before=saved.fields)
            for name, saved in cohorts.items()
            if name not in named_cohorts
        ]
        kept = {flag.name for flag in desired.flags}
        found += [
            Change(
                do="delete", kind="flag", name=name, before={"variants": flag["variants"], "default": flag["default"]}
            )
            for name, flag in known_flags.items()
            if name not in kept
        ]
    return found


def _invalid(text: str) -> RefusedError:
    return RefusedError(
        "apply_invalid", text, consequence="nothing was changed", next_step="see what files may say: docs/cli.md"
    )
