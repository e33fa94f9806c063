"""Whom a selector takes is the same whether the database reads a few fields of a fleet or Python sees whole devices."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, text

from tests.server.fleet_kit import MODEL, PROJECT, Fleet, fleet, manifest_of
from wherry_server import cohorts
from wherry_server.db.tables import Device, DeviceModel
from wherry_server.targeting import matches, parse_selector
from wherry_server.times import now_us
from wherry_server.views import Seen

pytestmark = pytest.mark.backends

WORDS = ["", "a", "b", "ab", "1.2.0", "1.10", "true", "None", "7", "é%_", "\U0001f600", '"q"']
anything = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.just(1 << 62), st.floats(0, 9), st.sampled_from(WORDS)
)
engine = st.one_of(
    st.fixed_dictionaries({"name": st.sampled_from(["ort", "tfl"])}, optional={"version": st.sampled_from(WORDS)}),
    st.sampled_from(WORDS),
)
labels = st.dictionaries(st.sampled_from(["a", "b.c", "x/y"]), st.sampled_from(WORDS), max_size=2)
facts = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "arch": anything,
            "agent": anything,
            "cores": anything,
            "memory_bytes": anything,
            "cpu_features": st.lists(st.sampled_from(WORDS), max_size=2),
            "engines": st.lists(engine, max_size=2),
            "labels": labels,
        },
    ),
    st.just([]),
)
device = st.fixed_dictionaries(
    {
        "facts": facts,
        "labels": labels,
        "name": st.sampled_from(["lab-", "line-", "é"]),
        "simulated": st.booleans(),
        "state": st.sampled_from(["active"] * 5 + ["revoked"]),
        "ago_s": st.sampled_from([-1, 100, 10_000]),
        "running": st.sampled_from(["", manifest_of("1.0.0"), manifest_of("1.1.0"), "sha256:unknown"]),
    }
)
texts = st.sampled_from(
    [
        *("arch", "agent", "cpu_feature", "engine", "engine.ort", "label.a", "label.b.c", "label.x/y", "name"),
        *("simulated", f"runs.{MODEL}", "runs.other", "state", "id"),
    ]
)
value = st.sampled_from(["a", "*", "a*", "*b*", "lab-*", "lab-3", "true", "1.2", "None", '"é%_"', '""', "active"])
comparison = st.one_of(
    st.builds("{} {} {}".format, texts, st.sampled_from(["=", "!="]), value),
    st.builds("{} in ({}, {})".format, texts, value, value),
    st.builds("{} {} 1.5".format, texts, st.sampled_from(["<", ">="])),
    st.builds(
        "{} {} {}".format,
        st.sampled_from(["cores", "memory_bytes"]),
        st.sampled_from(["=", "!=", "<", ">="]),
        st.integers(0, 4),
    ),
    st.builds("{} {} 20m".format, st.sampled_from(["last_seen", "enrolled"]), st.sampled_from(["<", ">"])),
    st.just("all"),
)
selector = st.recursive(
    comparison,
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner),
        st.builds("({}) and ({})".format, inner, inner),
        st.builds("({}) or ({})".format, inner, inner),
    ),
    max_leaves=4,
)


async def enrol(found: Fleet, devices: list[dict[str, Any]]) -> None:
    now = now_us()
    async with found.database.write() as connection:
        await connection.execute(text("DELETE FROM device"))
        await connection.execute(text("DELETE FROM device_model"))
        for at, one in enumerate(devices):
            seen_at = now - one["ago_s"] * 1_000_000 if one["ago_s"] > 0 else 0
            row = {
                "id": f"{at:022}",
                "project_id": PROJECT,
                "name": f"{one['name']}{at}",
                "bearer_hash": "",
                "key_digest": str(at),
                "enrolled_at": seen_at or 1,
                "last_seen_at": seen_at,
                **{name: one[name] for name in ("facts", "labels", "simulated", "state")},
            }
            await connection.execute(insert(Device).values(row))
            if one["running"]:
                said = {"device_id": row["id"], "model": MODEL, "running": one["running"], "body": {}}
                what = {"project_id": PROJECT, "state": "confirmed", "updated_at": 1}
                await connection.execute(insert(DeviceModel).values(**said, **what))


async def whole(found: Fleet, wanted: str) -> list[Any]:
    """The devices that a selector takes, judged one by one over all that is known of each."""
    parsed, now = parse_selector(wanted), now_us()
    versions = {manifest_of(version): version for version in ("1.0.0", "1.1.0")}
    runs = {
        row.device_id: {row.model: versions[row.running]}
        for row in await found.rows("SELECT device_id, model, running FROM device_model")
        if row.running in versions
    }
    rows = await found.rows("SELECT * FROM device WHERE state = 'active'")
    return [row for row in rows if matches(parsed, Seen(row, runs.get(row.id, {}), now))]


async def compare(found: Fleet, wanted: str) -> None:
    taken = await whole(found, wanted)
    ids, names = {row.id for row in taken}, {row.name for row in taken}
    parsed = parse_selector(wanted)
    async with found.database.read() as connection:
        members = await cohorts.members(connection, PROJECT, parsed, also=frozenset({"name", "arch"}), facts=True)
        assert {member.id for member in members} == ids
        known = {row.id: row for row in taken}
        for member in members:
            assert member.view is not None
            seen = Seen(known[member.id], {}, 0)
            assert (member.view["name"], member.view.get("arch")) == (seen["name"], seen.get("arch"))
            assert json.loads(member.facts) == json.loads(known[member.id].facts)
        assert {member.id for member in await cohorts.members(connection, PROJECT, parsed)} == ids
        assert await cohorts.count(connection, PROJECT, parsed) == len(ids)
        shown = await cohorts.preview(connection, PROJECT, wanted, 100)
        simulated = sum(bool(row.simulated) for row in taken)
        assert (shown["devices"], shown["simulated"]) == (len(ids), simulated)
        assert (len(shown["names"]), set(shown["names"])) == (len(names), names)
        few = (await cohorts.preview(connection, PROJECT, wanted, 2))["names"]
        assert few == shown["names"][:2]


def test_the_database_and_python_take_the_same_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with asyncio.Runner() as runner:
        manager = fleet(tmp_path)
        found = runner.run(manager.__aenter__())
        try:
            runner.run(found.publish("1.0.0", "1.1.0"))

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
            @given(st.lists(device, max_size=10), st.lists(selector, min_size=4, max_size=4), st.booleans())
            def check(devices: list[dict[str, Any]], selectors: list[str], narrow: bool) -> None:
                monkeypatch.setattr(cohorts, "WALK_EXPECTED_MAX", -1 if narrow else 4_000)
                runner.run(enrol(found, devices))
                for wanted in selectors:
                    runner.run(compare(found, wanted))

            monkeypatch.setattr(cohorts, "WALK_MIN", 2)
            check()
        finally:
            runner.run(manager.__aexit__(None, None, None))
