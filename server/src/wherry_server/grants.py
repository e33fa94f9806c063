"""What a role may do, and how far a grant reaches. Whatever is not granted is refused.

Roles are apart, so that no one of them is enough to bring something to a fleet: who publishes does not operate, who operates
does not approve. Only an admin may all of it. A grant may be narrowed to models and cohorts: it then changes only what lies within
them. A scope narrows changes, not reading: who may read a project reads all of it, and what must not be read belongs into another
project (ADR 33).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["viewer", "operator", "approver", "publisher", "admin"]
Permission = Literal["read", "operate", "approve", "publish", "administer"]
ROLES: tuple[Role, ...] = get_args(Role)
MAY: dict[Role, frozenset[Permission]] = {
    "viewer": frozenset({"read"}),
    "operator": frozenset({"read", "operate"}),
    "approver": frozenset({"read", "approve"}),
    "publisher": frozenset({"read", "publish"}),
    "admin": frozenset(get_args(Permission)),
}
SCOPE_MAX = 100
"""Models, and cohorts, that one grant names."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What an operation touches."""

    models: frozenset[str] = frozenset()
    """Models that it changes something about; none if it is not about models."""
    cohorts: frozenset[str] = frozenset()
    """Cohorts each of which holds every device that it touches."""

    @classmethod
    def everything(cls) -> Subject:
        """What no scope reaches."""
        return cls()

    def said(self) -> str:
        """Say it in an error."""
        named = [f"model {name[:64]}" for name in sorted(self.models)]
        return ", ".join([*named, *(f"cohort {name[:64]}" for name in sorted(self.cohorts))]) or "all of the project"


@dataclass(frozen=True, slots=True)
class Grant:
    """A role, narrowed where models or cohorts are named."""

    role: Role
    models: tuple[str, ...] = ()
    cohorts: tuple[str, ...] = ()

    @property
    def everywhere(self) -> bool:
        """Whether nothing narrows it."""
        return not self.models and not self.cohorts

    def allows(self, permission: Permission) -> bool:
        """Tell whether its role may do something at all."""
        return permission in MAY.get(self.role, frozenset())

    def covers(self, subject: Subject) -> bool:
        """Tell whether all that an operation touches lies within."""
        models = not self.models or (bool(subject.models) and subject.models <= set(self.models))
        return models and (not self.cohorts or not subject.cohorts.isdisjoint(self.cohorts))


def roles_with(permission: Permission) -> list[Role]:
    """Return the roles that may do something."""
    return [role for role in ROLES if permission in MAY[role]]


def cohorts_named(grants: Iterable[Grant]) -> frozenset[str]:
    """Return the cohorts to which grants are narrowed."""
    return frozenset(name for grant in grants for name in grant.cohorts)
