"""The threat model says what the code does: every row names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "threat-model.md"
NAMED = re.compile(r"`(tests/[a-z_/0-9]+\.py)::(test_[a-z_0-9]+)`")
DESIGNED = (
    "broker, or the network between",
    "server with its online keys",
    "one publisher key",
    "the content-key role",
    "a device",
)
"""Rows that the design has from the beginning."""


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] not in ("stolen", "who", "---")]


def test_the_rows_of_the_design_are_there() -> None:
    assert set(DESIGNED) <= {row[0] for row in rows()}
    assert len(rows()) > 15


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_names_tests_that_exist(row: list[str]) -> None:
    named = NAMED.findall(row[-1])
    assert named, f"{row[0]}: no test plays this thief"
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in found, f"{file} has no {name} any more"


@pytest.mark.parametrize("file", ["python-3.11.txt", "python-3.12.txt"])
def test_every_package_is_pinned_with_a_hash(file: str) -> None:
    text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    wanted = re.findall(r"^(\S+?)==.*(?:\\\n\s+--hash=sha256:[0-9a-f]{64}.*)+", text, flags=re.MULTILINE)
    names = re.findall(r"^([A-Za-z0-9][^\s=]*)", text, flags=re.MULTILINE)
    assert len(wanted) == len(names) > 50


def test_pages_that_promise_security_lead_to_pages_that_are_there() -> None:
    for page in (ROOT / "SECURITY.md", PAGE):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), link
