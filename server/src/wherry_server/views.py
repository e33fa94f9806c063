"""What selectors see of devices, and how little has to be read of each row for it.

Membership is judged by `targeting.matches` and by nothing else. What makes a large fleet cheap is that a selector looks at two
or three fields: the database gives just those of each row, as the JSON text that the row holds (`Projection`), and equal
texts are decoded and judged once. Most fields have few values, so that the database can also count the devices of each
combination, and one judgement holds for thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import msgspec

from wherry_server.targeting import And, Compare, Everything, Not, Or, Selector, Value, matches

SECOND_US = 1_000_000


class Seen(Mapping[str, Value | Sequence[str]]):
    """What selectors see of a device row (`id, name, state, labels, facts, simulated, last_seen_at, enrolled_at`).

    A field is worked out when somebody looks at it: most selectors look at two, of thousands of devices.
    Labels that an operator set win over those that the device reports about itself.
    """

    __slots__ = ("_facts", "_kept", "_now", "_row", "_runs")

    def __init__(self, row: Any, runs: Mapping[str, str], now: int, kept: Iterable[str] = ()) -> None:
        self._row, self._runs, self._now, self._kept = row, runs, now, kept
        self._facts: dict[str, Any] | None = None

    def __getitem__(self, field: str) -> Value | Sequence[str]:
        """Return a field.

        Raises:
            KeyError: the device does not have it.
        """
        found: Value | Sequence[str] | None = self.get(field)
        if found is None:
            raise KeyError(field)
        return found

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field, or `default`."""
        if field in _OF_ROW:
            return getattr(self._row, field)
        family, dot, rest = field.partition(".")
        found = self._in_family(family, rest) if dot else self._plain(field)
        return default if found is None else found

    def __iter__(self) -> Iterator[str]:
        """Name the fields that the device has."""
        named = [*_OF_ROW, *_PLAIN, *(f"{family}.{rest}" for family in _IN_FAMILIES for rest in self._members(family))]
        return (field for field in named if self.get(field) is not None)

    def __len__(self) -> int:
        """Count the fields that the device has."""
        return sum(1 for _ in self)

    def _plain(self, field: str) -> Any:
        row, facts = self._row, self.facts
        if field in _TEXTS:
            value = facts.get(field)
            return value if isinstance(value, str) and value else None
        if field in _NUMBERS:
            value = facts.get(field)
            return value if isinstance(value, int) else None
        match field:
            case "simulated":
                return "true" if row.simulated else "false"
            case "enrolled":
                return (self._now - row.enrolled_at) // SECOND_US
            case "last_seen":
                return (self._now - row.last_seen_at) // SECOND_US if row.last_seen_at else None
            case "cpu_feature":
                return [str(feature) for feature in facts.get("cpu_features") or []]
            case "engine":
                return [str(engine.get("name")) for engine in self._engines()]
            case _:
                return None

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the device; none if they are not an object."""
        if self._facts is None:
            found = _decoded(self._row.facts)
            self._facts = found if isinstance(found, dict) else {}
        return self._facts

    def _engines(self) -> list[dict[str, Any]]:
        return [engine for engine in self.facts.get("engines") or [] if isinstance(engine, dict)]

    def _engine(self, name: str) -> str | None:
        return next(
            (str(one.get("version")) for one in reversed(self._engines()) if str(one.get("name")) == name), None
        )

    def _label(self, name: str) -> str | None:
        for labels in (_decoded(self._row.labels), self.facts.get("labels")):
            if labels and name in labels:
                return str(labels[name])
        return None

    def _in_family(self, family: str, rest: str) -> str | None:
        match family:
            case "engine":
                return self._engine(rest)
            case "label":
                return self._label(rest)
            case "runs":
                return self._runs.get(rest)
            case "kept":
                return "true" if rest in self._kept else None
            case _:
                return None

    def _members(self, family: str) -> Iterable[str]:
        if family == "label":
            return {**(self.facts.get("labels") or {}), **(_decoded(self._row.labels) or {})}
        if family == "kept":
            return self._kept
        return self._runs if family == "runs" else [str(one.get("name")) for one in self._engines()]


def _decoded(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, str) else value


_OF_ROW = ("id", "name", "state")
_TEXTS = ("arch", "os", "python", "agent", "cpu_model", "accelerator", "timezone")
_NUMBERS = ("cores", "memory_bytes", "disk_free_bytes")
_PLAIN = (*_TEXTS, *_NUMBERS, "simulated", "enrolled", "last_seen", "cpu_feature", "engine")
_IN_FAMILIES = ("engine", "kept", "label", "runs")


def looks(selector: Selector) -> set[str]:
    """Return the fields that a selector looks at."""
    match selector:
        case Everything():
            return set()
        case Compare(field=field):
            return {field}
        case Not(inner=inner):
            return looks(inner)
        case And(parts=parts) | Or(parts=parts):
            return set().union(*(looks(part) for part in parts))


def lists(fields: AbstractSet[str]) -> list[str]:
    """Return the lists of static cohorts that are looked at."""
    return sorted(field.partition(".")[2] for field in fields if field.startswith("kept."))


class Row(NamedTuple):
    """What was read of a device, as `Seen` takes it."""

    id: str
    name: str
    state: str
    labels: dict[str, Any]
    facts: dict[str, Any]
    simulated: bool
    last_seen_at: int
    enrolled_at: int


class Projection:
    """What has to be read of `device d` to see some fields of it.

    The expressions come in one order: `seen` (facts and labels, as JSON text), a manifest for each model, the name of each list
    that keeps the device, `simulated`, and the columns that are nearly every device's own.
    """

    def __init__(self, fields: AbstractSet[str], *, sqlite: bool) -> None:
        self._sqlite = sqlite
        self.columns = tuple(column for field, column in _COLUMNS.items() if field in fields)
        keys = {_ARRAYS.get(field, field) for field in fields if field in (*_TEXTS, *_NUMBERS, *_ARRAYS)}
        keys |= {"engines" for field in fields if field.startswith("engine.")}
        self._facts = sorted(keys)
        self._labels = sorted(field.partition(".")[2] for field in fields if field.startswith("label."))
        self.models = sorted(field.partition(".")[2] for field in fields if field.startswith("runs."))
        self.lists = lists(fields)
        self.width = 2 + len(self.models) + len(self.lists) + len(self.columns)
        self._decoded: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    @property
    def bound(self) -> dict[str, str]:
        """The values that the expressions bind by name."""
        found = {f"model{at}": model for at, model in enumerate(self.models)}
        found |= {f"list{at}": one for at, one in enumerate(self.lists)}
        for at, name in enumerate(self._facts):
            found[f"fact{at}"] = f'$."{name}"' if self._sqlite else name
        for at, name in enumerate(self._labels):
            found[f"label{at}"] = f'$."{name}"' if self._sqlite else name
            if self._sqlite:
                found[f"told{at}"] = f'$.labels."{name}"'
        return found

    @property
    def seen(self) -> str:
        """SQL of facts and labels: an array of arrays, in which every value stands as the row has it."""
        facts, labels = range(len(self._facts)), range(len(self._labels))
        if not (self._facts or self._labels):
            return "''"
        if self._sqlite:  # json_extract gives an array where it has several paths
            told = [*(f":fact{at}" for at in facts), *(f":told{at}" for at in labels)]
            given = [f":label{at}" for at in labels]
            parts = [f"json_extract(d.{of}, {', '.join([*paths, _NO_PATH])})" for of, paths in _both(told, given)]
            return "'[' || " + " || ',' || ".join(parts) + " || ']'"
        told = [f"d.facts -> CAST(:fact{at} AS VARCHAR)" for at in facts]
        told += [f"d.facts -> 'labels' -> CAST(:label{at} AS VARCHAR)" for at in labels]
        given = [f"d.labels -> CAST(:label{at} AS VARCHAR)" for at in labels]
        parts = [
            " || ',' || ".join(f"COALESCE(CAST({one} AS TEXT), 'null')" for one in of) for _, of in _both(told, given)
        ]
        arrays = " || ',' || ".join(f"'[' || {part} || ']'" for part in parts)
        return f"('[' || {arrays} || ']') COLLATE \"C\""  # sorted, if the planner sorts, as bytes

    @property
    def expressions(self) -> str:
        """What to select."""
        runs = [f"m{at}.running AS run{at}" for at in range(len(self.models))]
        kept = [f"k{at}.list_id AS kept{at}" for at in range(len(self.lists))]
        return ", ".join([f"{self.seen} AS seen", *runs, *kept, "d.simulated", *(f"d.{one}" for one in self.columns)])

    @property
    def joins(self) -> str:
        """What the expressions read besides `device d`."""
        return "".join(
            f" LEFT JOIN device_model m{at} ON m{at}.device_id = d.id AND m{at}.model = :model{at}"
            for at in range(len(self.models))
        ) + "".join(
            f" LEFT JOIN kept_member k{at} ON k{at}.device_id = d.id AND k{at}.list_id = :list{at}"
            for at in range(len(self.lists))
        )

    def view(self, values: Sequence[Any], versions: Mapping[str, str], now: int) -> Seen:
        """Return what is seen of the values of `expressions`; `versions`: of the bundles by manifest."""
        seen, *rest = values
        facts, labels = self._decode(seen)
        models = len(self.models)
        runs = {
            model: versions[manifest]
            for model, manifest in zip(self.models, rest[:models], strict=True)
            if manifest in versions
        }
        own_from = models + len(self.lists)
        kept = [one for one in rest[models:own_from] if one]
        own = dict(zip(self.columns, rest[own_from + 1 :], strict=True))
        row = Row(
            own.get("id", ""),
            own.get("name", ""),
            "active",
            labels,
            facts,
            rest[own_from],
            own.get("last_seen_at", 0),
            own.get("enrolled_at", 0),
        )
        return Seen(row, runs, now, kept)

    def _decode(self, seen: str) -> tuple[dict[str, Any], dict[str, Any]]:
        known = self._decoded.get(seen)
        if known is None:
            told, given = [*msgspec.json.decode(seen or "[]"), [], []][:2]
            facts = _present(self._facts, told)
            if self._labels:
                facts["labels"] = _present(self._labels, told[len(self._facts) :])
            known = self._decoded[seen] = (facts, _present(self._labels, given))
        return known


class Judge:
    """Tells of what a projection gave whether a selector takes it; what is equal is judged once."""

    def __init__(
        self,
        selector: Selector,
        versions: Mapping[str, str],
        now: int,
        *,
        also: AbstractSet[str] = frozenset(),
        sqlite: bool,
    ) -> None:
        self._selector, self._versions, self._now = selector, versions, now
        looked_at = looks(selector)
        self.projection = Projection(looked_at | also, sqlite=sqlite)
        self.alike = looked_at.isdisjoint(_COLUMNS)
        """Whether the selector looks at nothing that nearly every device has for itself."""
        self._key = self.projection.width - len(self.projection.columns)
        self._judged: dict[tuple[Any, ...], bool] = {}
        self._views: dict[tuple[Any, ...], Seen] = {}

    def view(self, values: Sequence[Any]) -> Seen:
        """Return what is seen of the values."""
        if self.projection.columns:
            return self.projection.view(values, self._versions, self._now)
        key = tuple(values)
        known = self._views.get(key)
        if known is None:
            known = self._views[key] = self.projection.view(values, self._versions, self._now)
        return known

    def takes(self, values: Sequence[Any]) -> bool:
        """Tell whether the selector takes a device with these values."""
        if not self.alike:
            return matches(self._selector, self.view(values))
        key = tuple(values[: self._key])
        known = self._judged.get(key)
        if known is None:
            known = self._judged[key] = matches(self._selector, self.view(values))
        return known


def _both(told: list[str], given: list[str]) -> list[tuple[str, list[str]]]:
    """Return the columns that are read, with what is read of them; the labels of a row only where there are any to read."""
    return [("facts", told), ("labels", given)] if given else [("facts", told)]


def _present(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


_NO_PATH = "'$.\"\"'"
"""A path to what nobody has."""
_COLUMNS = {"id": "id", "name": "name", "last_seen": "last_seen_at", "enrolled": "enrolled_at"}
_ARRAYS = {"cpu_feature": "cpu_features", "engine": "engines"}
"""Field → key of the facts, where it is called otherwise there."""
