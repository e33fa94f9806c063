"""What an operation touches, looked up where its path does not say it: the models and cohorts that a grant has to reach."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import cohorts, fleet, rollouts
from wherry_server.auth import Identity
from wherry_server.grants import Subject, cohorts_named
from wherry_server.targeting import parse_selector
from wherry_shared.errors import RefusedError


def _cohort(name: object) -> frozenset[str]:
    return frozenset({name}) if isinstance(name, str) and name else frozenset()


async def of_device(
    connection: AsyncConnection, identity: Identity, device: str, models: frozenset[str] = frozenset()
) -> Subject:
    """Return a device: the cohorts, of those to which the grants are narrowed, that take it now.

    Raises:
        RefusedError: `device_unknown`.
    """
    project = identity.project
    found = await fleet.find_device(connection, project, device)
    holding = set()
    for name in cohorts_named(identity.grants):
        try:
            selector = parse_selector((await cohorts.find(connection, project, name))["selector"])
        except RefusedError:  # there is no such cohort (any more), so it holds nobody
            continue
        if await cohorts.members(connection, project, selector, devices=[found.id]):
            holding.add(name)
    return Subject(models=models, cohorts=frozenset(holding))


async def of_rollout(connection: AsyncConnection, identity: Identity, number: int) -> Subject:
    """Return what a rollout is about and whom it is for: a cohort by name, or a device, as of a wish.

    Raises:
        RefusedError: `rollout_unknown`.
    """
    plan = (await rollouts.find(connection, identity.project, number)).plan
    models = frozenset(str(one["model"]) for one in plan.get("models", []))
    device = rollouts.only_device(plan["selector"])
    if device and not plan.get("cohort"):
        try:
            return await of_device(connection, identity, device, models)
        except RefusedError:  # it is gone, so no cohort takes it
            return Subject(models=models)
    return Subject(models=models, cohorts=_cohort(plan.get("cohort")))


async def of_wish(connection: AsyncConnection, identity: Identity, wish: dict[str, Any]) -> Subject:
    """Return what a rollout that somebody wants would be about.

    A selector is within no cohort, even where it takes the same devices now. What is no plan touches nothing that a scope reaches.

    Raises:
        RefusedError: `device_unknown`.
    """
    given = wish.get("models")
    models = frozenset(
        str(one["model"])
        for one in (given if isinstance(given, list) else [])
        if isinstance(one, dict) and "model" in one
    )
    device = wish.get("device")
    if isinstance(device, str) and device:
        return await of_device(connection, identity, device, models)
    return Subject(models=models, cohorts=_cohort(wish.get("cohort")))


async def of_rollback(connection: AsyncConnection, identity: Identity, model: str, device: str | None) -> Subject:
    """Return what bringing a model back touches: a device, or whom its newest rollout reached.

    Raises:
        RefusedError: `device_unknown`.
    """
    if device is not None:
        return await of_device(connection, identity, device, frozenset({model}))
    number = await rollouts.newest(connection, identity.project, model)
    return Subject() if number is None else await of_rollout(connection, identity, number)
