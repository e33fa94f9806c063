"""The audit of locked packages finds what it is there for, and says so where it could not ask."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

FILE = Path(__file__).parents[2] / "requirements" / "audit.py"
HASH = "--hash=sha256:" + "a" * 64
GOOD = f"one==1.0 \\\n    {HASH} \\\n    {HASH}\n# a remark\nTwo_x[extra]==2.0.post1 {HASH}\n"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["audit"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


audit = _load()


def test_the_locks_of_the_checkout_are_whole() -> None:
    for name in ("python-3.11.txt", "python-3.12.txt", "soak.txt", "audit.txt"):
        locked, troubles = audit.read_lock((FILE.parent / name).read_text(encoding="utf-8"))
        assert locked
        assert troubles == []


def test_a_lock_is_read_and_what_is_wrong_with_it_named() -> None:
    locked, troubles = audit.read_lock(GOOD)
    assert [(one.name, one.version, len(one.hashes)) for one in locked] == [
        ("one", "1.0", 2),
        ("two-x", "2.0.post1", 1),
    ]
    assert troubles == []
    bad = f"loose>=1 {HASH}\nbare==1\nshort==1 --hash=sha256:abc\n--index-url somewhere\nother @ file:///x {HASH}\n"
    locked, troubles = audit.read_lock(bad)
    assert locked == []
    assert len(troubles) == 5


def test_what_is_installed_beside_the_lock_is_named() -> None:
    locked, _ = audit.read_lock(GOOD)
    assert audit.beside(locked, {"one": "1.0", "two-x": "2.0.post1", "pip": "23", "wherry-agent": "0.1.0"}) == []
    found = audit.beside(locked, {"one": "1.1", "stowaway": "3"})
    assert found == ["one 1.1 is installed, 1.0 is locked", "stowaway 3 is installed and not locked"]


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 AND BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("(MIT OR Apache-2.0) AND GPL-3.0-only", False),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-2.0-only", False),
        ("MIT OR Apache-2.0 AND GPL-3.0-only", True),
        ("(MIT", False),
        ("MIT Apache-2.0", False),
        ("", False),
        ("MITX", False),
    ],
)
def test_licences_are_read_as_expressions(expression: str, allowed: bool) -> None:
    assert audit.is_allowed(expression) == allowed
    locked, _ = audit.read_lock(GOOD)
    assert bool(audit.licences(locked, {"one": "MIT", "two-x": expression})) != allowed


def test_the_bill_is_valid_by_the_schema_of_cyclonedx() -> None:
    locked, _ = audit.read_lock((FILE.parent / "python-3.11.txt").read_text(encoding="utf-8"))
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(
        json.dumps(audit.bill(locked, {"msgspec": "BSD-3-Clause"}))
    )
    assert found is None, str(found)[:400]


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"dependencies": list(rows), "fixes": []}


KNOWN = {"name": "one", "version": "1.0", "vulns": []}
WEAK = {"name": "two-x", "version": "2.0", "vulns": [{"id": "X-1", "fix_versions": ["2.1"]}]}
SKIPPED = {"name": "two-x", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("said", "found", "why"),
    [
        (report(KNOWN, {**KNOWN, "name": "two-x"}), [], ""),
        (report(KNOWN, WEAK), ["two-x 2.0: X-1, mended in 2.1"], ""),
        (report(KNOWN, SKIPPED), [], "not run for 1 packages that the database does not know: two-x"),
        (report(WEAK, {**SKIPPED, "name": "one"}), ["two-x 2.0: X-1, mended in 2.1"], "not run for 1 packages that the database does not know: one"),
        (report({**SKIPPED, "name": "one"}, SKIPPED), [], audit.NOT_RUN),
        (report(), [], audit.NOT_RUN),
    ],
)  # fmt: skip
def test_a_package_that_the_database_does_not_know_was_not_asked_for(
    tmp_path: Path, said: dict[str, Any], found: list[str], why: str
) -> None:
    assert audit.weaknesses(said, 2) == (found, why)
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\necho 'No known vulnerabilities found'\necho '{json.dumps(said)}'\nexit 1\n")
    program.chmod(0o755)
    assert audit.ask_database(str(program), FILE, 2) == (found, why)


def test_where_nobody_answers_that_is_what_is_said(tmp_path: Path) -> None:
    program = tmp_path / "pip-audit"
    assert audit.ask_database(str(program), FILE, 2) == ([], "not run: pip-audit is not installed")
    program.write_text("#!/bin/sh\necho 'ConnectionError: no such host' >&2\nexit 1\n")
    program.chmod(0o755)
    assert audit.ask_database(str(program), FILE, 2) == ([], audit.NOT_RUN)
