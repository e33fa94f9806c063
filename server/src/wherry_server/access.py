"""What every operation of the API needs, read from the routes themselves; one that does not say it keeps the server from starting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from wherry_server.auth import Need, identify_device
from wherry_server.grants import Permission

PUBLIC = frozenset(
    {"health", "enrol", "tuf_metadata", "login", "login_callback", "allow_command_line", "fetch_session"}
    | {"join_program", "authority", "list_wheels", "get_wheel", "broker_keys", "retirement"}
)
"""Operations that need nobody to be known: what lets in is in the request, or all that is told is signed, or says nothing."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation and what it needs."""

    name: str
    method: str
    path: str
    need: Permission | Literal["device", "public"]
    scoped: bool = False
    """Whether a grant with a scope may be enough."""


def _calls(dependant: Dependant) -> Iterator[object]:
    for below in dependant.dependencies:
        yield below.call
        yield from _calls(below)


def _operation(route: APIRoute) -> Operation:
    methods = route.methods or set()
    method = "/".join(sorted(methods - {"HEAD"} or methods))
    calls = list(_calls(route.dependant))
    needs = [call for call in calls if isinstance(call, Need)]
    if len(needs) == 1 and route.name not in PUBLIC:
        return Operation(route.name, method, route.path, needs[0].permission, needs[0].scoped)
    if not needs and identify_device in calls:
        return Operation(route.name, method, route.path, "device")
    if not needs and route.name in PUBLIC:
        return Operation(route.name, method, route.path, "public")
    raise RuntimeError(
        f"{method} {route.path} does not say who may: give it one of the identities of wherry_server.auth"
    )


def operations(routers: Iterable[APIRouter]) -> list[Operation]:
    """Return every operation.

    Raises:
        RuntimeError: one does not say who may.
    """
    found = []
    for router in routers:
        for route in router.routes:
            if not isinstance(route, APIRoute):
                raise RuntimeError(f"{route!r} is no operation, so it cannot say who may")  # noqa: TRY004  # misuse
            found.append(_operation(route))
    return found
