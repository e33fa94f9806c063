"""A folder of files brings a server to what it says, once; and the schema of plan files says what plans may."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given, settings

from tests.server.fleet_kit import enrol_rows
from tests.server.harness import Running, release
from tests.server.test_cli import said, wherry
from tests.server.test_rollout import plans
from wherry_server import desired
from wherry_server.db.database import Database
from wherry_server.plan import Plan
from wherry_server.plan_schema import wish_schema
from wherry_shared import ids
from wherry_shared.errors import RefusedError

TOML = """
[[cohorts]]
name = "applied"
selector = "label.site = berlin"

[[rollouts]]
models = [{ model = "applied", version = "1.0.0" }]
cohort = "applied"
stages = [{ share = 0.1 }, { share = 1 }]
"""
FLAGS = """
[[flags]]
name = "applied-flag"
type = "number"
variants = { old = 0.8, new = 1 }
default = "old"
rules = [{ when = "label.site = berlin", share = 0.25, variant = "new" }]

[[rollouts]]
flag = "applied-flag"
variant = "new"
selector = "label.site = bonn"
stages = [{ share = 1.0 }]
"""
YAML = "cohorts:\n  - {name: applied-lab, selector: name = lab-*}\n"


def test_files_are_applied_once_and_show_what_they_change(server: Running, tmp_path: Path) -> None:
    release(server, tmp_path, "applied")
    fleet = tmp_path / "fleet"
    (fleet / "below").mkdir(parents=True)
    (fleet / "one.toml").write_text(TOML)
    (fleet / "below" / "two.yaml").write_text(YAML)
    wherry(server, "cohort", "create", "applied-other", "all")
    command = ("apply", "-f", str(fleet))

    nobody = wherry(server, *command)
    assert (nobody.returncode, "[confirmation_missing]" in nobody.stderr) == (1, True), nobody.stderr
    dry = wherry(server, *command, "--dry-run")
    assert dry.returncode == 2, dry.stderr
    assert "+ create cohort applied-lab" in dry.stdout
    assert '+ selector = "label.site = berlin"' in dry.stdout
    names = {one["name"] for one in said(server, "cohort", "list")}  # type: ignore[attr-defined]
    assert not {"applied", "applied-lab"} & names

    done: Any = said(server, *command, "--yes")
    assert [(one["do"], one["kind"]) for one in done["changes"]] == [
        ("create", "cohort"),
        ("create", "cohort"),
        ("create", "rollout"),
    ]
    again = wherry(server, *command, "--dry-run")
    assert (again.returncode, again.stdout.strip()) == (0, "everything is as the files say")

    (fleet / "one.toml").write_text(TOML.replace("berlin", "bonn").replace("stages", "start = true\nstages"))
    done = said(server, *command, "--yes")
    assert [(one["do"], one["kind"]) for one in done["changes"]] == [("change", "cohort"), ("start", "rollout")]
    assert wherry(server, *command, "--dry-run").returncode == 0

    (fleet / "one.toml").write_text(TOML.replace("0.1", "0.2"))
    refused = wherry(server, *command, "--yes")
    assert (refused.returncode, "[apply_conflict]" in refused.stderr) == (1, True), refused.stderr

    (fleet / "one.toml").unlink()
    assert wherry(server, *command, "--dry-run").returncode == 0, "what no file names stays"
    pruned: Any = said(server, *command, "--yes", "--prune")
    assert {(one["do"], one["name"]) for one in pruned["changes"]} == {
        ("delete", "applied"),
        ("delete", "applied-other"),
    }


def test_flags_and_their_rollouts_are_applied_once_and_changed_as_the_files_say(
    server: Running, tmp_path: Path
) -> None:
    folder = tmp_path / "flags"
    folder.mkdir()
    (folder / "flags.toml").write_text(FLAGS)
    command = ("apply", "-f", str(folder))

    def done() -> list[tuple[str, str]]:
        found: Any = said(server, *command, "--yes")
        return [(one["do"], one["kind"]) for one in found["changes"]]

    assert done() == [("create", "flag"), ("create", "rollout")]
    assert done() == []
    (folder / "flags.toml").write_text(FLAGS.replace("0.25", "0.5").replace("old = 0.8", "old = 0.7"))
    dry = wherry(server, *command, "--dry-run")
    assert dry.returncode == 2, dry.stderr
    assert '- variants = {"new": 1, "old": 0.8}' in dry.stdout or '- variants = {"old": 0.8, "new": 1}' in dry.stdout
    assert "default" not in dry.stdout, "only what differs is shown"
    assert done() == [("change", "flag")]
    shown: Any = said(server, "flag", "show", "applied-flag")
    assert (shown["revision"], shown["rules"][0]["share"], shown["variants"]["old"]) == (2, 0.5, 0.7)
    (folder / "flags.toml").write_text(FLAGS.replace("0.25", "0.5").replace("old = 0.8, new = 1", "old = 0.7, new = 2"))
    refused = wherry(server, *command, "--yes")
    assert (refused.returncode, "[flag_in_use]" in refused.stderr) == (1, True), refused.stderr


async def _enrol(server: Running) -> None:
    database = Database.open(server.settings.database_url)
    try:
        await enrol_rows(database, [ids.new_device_id()])
    finally:
        await database.close()


def test_a_static_cohort_is_made_once_and_becomes_live_where_the_files_say_so(server: Running, tmp_path: Path) -> None:
    file = tmp_path / "cohorts.toml"
    text = '[[cohorts]]\nname = "applied-static"\nselector = "all"\n'
    asyncio.run(_enrol(server))
    before: Any = said(server, "cohort", "preview", "all")
    command = ("apply", "-f", str(tmp_path))

    def done() -> list[tuple[str, str, Any]]:
        found: Any = said(server, *command, "--yes")
        return [(one["do"], one["name"], one["after"]) for one in found["changes"]]

    static = {"selector": "all", "static": True}
    file.write_text(f"{text}static = true\n")
    assert done() == [("create", "applied-static", static)]
    shown: Any = said(server, "cohort", "show", "applied-static")
    assert (shown["kept"], shown["kept_from"]) == (before["devices"], "all")
    assert done() == [], "it keeps whom it took"
    file.write_text(text)
    assert done() == [("change", "applied-static", {"selector": "all"})]
    assert done() == []
    file.write_text(f"{text}static = true\n")
    assert done() == [("change", "applied-static", static)]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "apply_invalid"),
        ({"a.toml": "cohort = 1"}, "apply_invalid"),
        ({"a.toml": "x"}, "plan_file"),
        ({"a.yaml": "a: [b"}, "plan_file"),
        ({"a.yaml": "[" * 100_000}, "plan_file"),
        ({"a.json": "[" * 100_000}, "plan_file"),
        (
            {"a.yaml": "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]" for n in range(12))},
            "plan_file",
        ),
        ({"a.yaml": YAML, "b.yml": YAML}, "apply_invalid"),
        ({"a.json": '{"rollouts": [{"models": []}]}'}, "apply_invalid"),
        ({"a.json": '{"cohorts": [{"name": "x"}]}'}, "apply_invalid"),
        ({"a.json": '{"cohorts": [{"name": "x", "selector": "all", "static": "yes"}]}'}, "apply_invalid"),
        ({".github/a.toml": TOML}, "apply_invalid"),
        ({"a.toml": TOML.replace("stages", "steps")}, "plan_invalid"),
        ({"a.toml": TOML.replace("share = 0.1", "share = nan")}, "plan_file"),
        ({"a.toml": FLAGS.replace("share = 1.0", "share = 1.5")}, "plan_stages"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, files: dict[str, str], code: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(RefusedError) as caught:
        desired.read(tmp_path)
    assert caught.value.code == code
    assert caught.value.consequence == "nothing was changed"
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("name", "date"),
    [("a.toml", "start_at = 2026-12-01T22:00:00+01:00\n"), ("a.yaml", "start_at: 2026-12-01 22:00:00+01:00\n")],
)
def test_a_date_is_a_date_also_where_the_format_has_dates(tmp_path: Path, name: str, date: str) -> None:
    file = tmp_path / name
    file.write_text(date)
    assert desired.decode(file) == {"start_at": "2026-12-01T22:00:00+01:00"}


def test_one_file_is_read_and_hidden_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.toml").write_text("no = file of ours")
    (tmp_path / "fleet.toml").write_text(TOML)
    for place in (tmp_path, tmp_path / "fleet.toml"):
        assert [cohort.name for cohort in desired.read(place).cohorts] == ["applied"]


def test_who_is_refused_in_the_middle_is_told_what_was_done(server: Running, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(TOML.replace("applied", "half"))
    refused = wherry(server, "apply", "-f", str(tmp_path), "--yes", "--json")
    problem = json.loads(refused.stderr)
    assert problem["code"] == "bundle_unknown"
    assert problem["detail"].startswith("create rollout half:1.0.0 cohort=half 1: there is no bundle")
    assert problem["consequence"].startswith("of 2 changes 1 were made")
    assert "apply them again" in problem["next_step"]
    assert said(server, "cohort", "show", "half")["selector"] == "label.site = berlin"  # type: ignore[call-overload]
    assert wherry(server, "cohort", "delete", "half").returncode == 0


def test_the_schema_takes_plans_and_refuses_what_plans_refuse(server: Running) -> None:
    schema: Any = said(server, "rollout", "schema")
    assert schema == json.loads(json.dumps(wish_schema()))
    jsonschema_rs.meta.validate(schema)
    good = {
        "models": [{"model": "m", "version": "1.0.0"}],
        "selector": "all",
        "stages": [{"share": 0.1}],
        "start": True,
    }
    jsonschema_rs.validate(schema, {**good, "trial": {"max_s": 5}, "failure": {"share": 0.1}})
    for wrong in ({"stage": []}, {"stages": [{"shares": 1}]}, {"strategy": "brave"}, {"sample_min": "x"}):
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, {**good, **wrong})


@given(plans)
@settings(max_examples=60, deadline=None)
def test_the_schema_refuses_no_plan_that_can_be_stored(plan: Plan) -> None:
    wish = msgspec.json.decode(msgspec.json.encode(plan))
    for given_by_the_server in ("value", "format"):
        wish.pop(given_by_the_server)
    for name in ("flag", "variant", "measure"):
        assert not wish.pop(name)
    wish["models"] = [{"model": one.model, "version": one.version} for one in plan.models]
    jsonschema_rs.validate(wish_schema(), {"start": True, **wish})
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(wish_schema(), {**wish, "braveness": 1})
