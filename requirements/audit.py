"""`make audit`: what can be said of the locked packages, and what could not be asked.

Without any network: every package is pinned with hashes; nothing is installed beside the lock; every licence is one that may be
shipped or used here; a CycloneDX bill of materials of the lock is written. With `--yanked` pip is asked for every locked file once more
(minutes): one that its authors took back is trouble. With a database of weaknesses in reach `pip-audit` is run, from an
environment of its own. An index without that database answers as if it did not know the packages, and `pip-audit` says
"no known vulnerabilities" then: a package that it skipped counts as not asked.

    python requirements/audit.py [--yanked] [--pip-audit PROGRAM] [--require-database]

Exit 0: no trouble was found (the last line says what was not run); 1: there is trouble; 2: what was required was not run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE.parent / "build" / "audit"
MEMBERS = {f"wherry-{name}" for name in ("shared", "optimizer", "server", "agent", "simulators")}
OF_PYTHON = {"pip", "setuptools"}
"""What a virtual environment has from the beginning."""
NOT_RUN = "not run: no database in reach"
SECONDS_MAX = 300.0

ALLOWED = {
    "0BSD", "AFL-2.1", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC",
    "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib", "ZPL-2.1", "GCC-exception-3.1",
}  # fmt: skip
"""SPDX names; of an `OR` one has to be here, of an `AND` all."""
SAID_OTHERWISE = {
    "apache 2.0": "Apache-2.0", "apache license 2.0": "Apache-2.0", "apache license, version 2.0": "Apache-2.0",
    "apache license version 2.0": "Apache-2.0", "apache software license": "Apache-2.0", "apache": "Apache-2.0",
    "apache v2": "Apache-2.0", "bsd": "BSD-3-Clause", "bsd license": "BSD-3-Clause", "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause", "new bsd license": "BSD-3-Clause", "modified bsd license": "BSD-3-Clause",
    "mit license": "MIT", "the mit license (mit)": "MIT", "isc license (iscl)": "ISC", "isc license": "ISC",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0", "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense", "zope public license": "ZPL-2.1", "zlib/libpng license": "Zlib",
}  # fmt: skip
"""Words of people, and of old classifiers, for SPDX names."""
BY_HAND: dict[str, tuple[str, str]] = {"basic-pitch": ("Apache-2.0", "its file LICENSE")}
"""Packages whose metadata say nothing that can be read: SPDX expression, and where it was looked up."""


@dataclass
class Audit:
    """What was found."""

    trouble: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def note(self, what: str, troubles: list[str]) -> None:
        """Take the outcome of a check."""
        self.trouble += [f"{what}: {trouble}" for trouble in troubles]
        if not troubles:
            self.passed.append(what)


@dataclass(frozen=True)
class Locked:
    """A line of a lock."""

    name: str
    version: str
    hashes: tuple[str, ...]


def canonical(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(text: str) -> tuple[list[Locked], list[str]]:
    """Return the packages of a lock, and what is wrong with it."""
    found, troubles = [], []
    for entry in text.replace("\\\n", " ").splitlines():
        line = entry.split("#")[0].strip()
        if not line:
            continue
        parts = line.split()
        pinned = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[a-z0-9,-]+\])?==([A-Za-z0-9.!+_-]+)", parts[0])
        hashes = tuple(part[7:] for part in parts if re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", part))
        if line.startswith("-"):
            troubles.append(f"an option, which may name an index: {line[:60]}")
        elif pinned is None:
            troubles.append(f"not pinned: {line[:60]}")
        elif not hashes:
            troubles.append(f"{parts[0]} has no hash")
        else:
            found.append(Locked(canonical(pinned[1]), pinned[2], hashes))
    return found, troubles


def beside(lock: list[Locked], installed: dict[str, str]) -> list[str]:
    """Return what is installed and not locked, or locked as another version."""
    wanted = {one.name: one.version for one in lock}
    known = MEMBERS | OF_PYTHON
    extra = [
        f"{name} {version} is installed and not locked"
        for name, version in installed.items()
        if name not in known | set(wanted)
    ]
    other = [
        f"{name} {installed[name]} is installed, {version} is locked"
        for name, version in wanted.items()
        if name in installed and installed[name] != version
    ]
    return sorted(extra + other)


def expression_of(about: metadata.PackageMetadata) -> str:
    """Return what a package says of its licence as an SPDX expression, as far as it can be read; empty if it says nothing."""
    said = about.get("License-Expression", "")
    if said:
        return str(said)
    classifiers = [
        line.split(" :: ")[-1]
        for line in about.get_all("Classifier") or []
        if line.startswith("License :: OSI Approved ::")
    ]
    words = [str(about.get("License", "")).strip(), *classifiers]
    for word in words:
        known = SAID_OTHERWISE.get(word.lower(), word)
        if is_allowed(known):
            return known
    return next((word for word in reversed(words) if word and len(word) < 100), "")


def is_allowed(expression: str) -> bool:
    """Tell whether an SPDX expression may be met with licences of `ALLOWED`: of an `OR` one, of an `AND` all."""
    words = re.findall(r"[()]|[^\s()]+", expression)
    try:
        allowed, rest = _either(words)
    except IndexError:  # it ends too early
        return False
    return allowed and not rest


def _either(words: list[str]) -> tuple[bool, list[str]]:
    allowed, rest = _all(words)
    while rest[:1] == ["OR"]:
        other, rest = _all(rest[1:])
        allowed = allowed or other
    return allowed, rest


def _all(words: list[str]) -> tuple[bool, list[str]]:
    allowed, rest = _one(words)
    while rest[:1] in (["AND"], ["WITH"]):
        other, rest = _one(rest[1:])
        allowed = allowed and other
    return allowed, rest


def _one(words: list[str]) -> tuple[bool, list[str]]:
    if words[0] != "(":
        return words[0] in ALLOWED, words[1:]
    allowed, rest = _either(words[1:])
    return allowed and rest[0] == ")", rest[1:]


def licences(lock: list[Locked], said: dict[str, str]) -> list[str]:
    """Return packages whose licence is not allowed, or not known; `said` is of those that are installed."""
    troubles = []
    for one in lock:
        expression = BY_HAND[one.name][0] if one.name in BY_HAND else said.get(one.name)
        if expression is None or is_allowed(expression):
            continue
        troubles.append(f"{one.name} {one.version}: {expression or 'no licence is stated'}")
    return troubles


def bill(lock: list[Locked], said: dict[str, str]) -> dict[str, Any]:
    """Return a CycloneDX bill of materials of a lock."""
    components = []
    for one in lock:
        expression = BY_HAND[one.name][0] if one.name in BY_HAND else said.get(one.name, "")
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": one.name,
            "name": one.name,
            "version": one.version,
            "purl": f"pkg:pypi/{one.name}@{one.version}",
            "properties": [{"name": "wherry:hash", "value": value} for value in one.hashes],
        }
        if expression and is_allowed(expression):
            component["licenses"] = [{"expression": expression}]
        components.append(component)
    about = {"component": {"type": "application", "bom-ref": "wherry", "name": "wherry"}}
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": about, "components": components}


def weaknesses(report: dict[str, Any], count: int) -> tuple[list[str], str]:
    """Read what `pip-audit` wrote: known weaknesses, and why it does not count as run (empty: it does)."""
    rows = report.get("dependencies", [])
    asked = [row for row in rows if "skip_reason" not in row]
    found = [
        f"{row['name']} {row['version']}: {one['id']}, mended in {', '.join(one.get('fix_versions', [])) or 'no release'}"
        for row in asked
        for one in row.get("vulns", [])
    ]
    if not asked:
        return found, NOT_RUN
    if len(asked) < count:
        skipped = sorted(row["name"] for row in rows if "skip_reason" in row)
        return (
            found,
            f"not run for {count - len(asked)} packages that the database does not know: {', '.join(skipped[:5])}",
        )
    return found, ""


def ask_database(program: str, file: Path, count: int) -> tuple[list[str], str]:
    """Run `pip-audit` on a lock."""
    argv = [program, "-r", str(file), "--require-hashes", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
    try:
        done = subprocess.run(
            [*argv, "--timeout", "10"], capture_output=True, text=True, timeout=SECONDS_MAX, check=False
        )
        start = done.stdout.find("{")
        return weaknesses(json.loads(done.stdout[start:]), count)
    except FileNotFoundError:
        return [], "not run: pip-audit is not installed"
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
        return [], NOT_RUN


def yanked(file: Path) -> tuple[list[str], str]:
    """Have pip look up every locked file once more, without installing it."""
    argv = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--require-hashes"]
    done = subprocess.run([*argv, "-r", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        return [], f"not run: pip does not get them all: {done.stderr.strip().splitlines()[-1][:200]}"
    said = done.stdout + done.stderr
    return re.findall(r"yanked version: (.*?)\(", said), ""


def main() -> int:
    """Run the audit of the lock that this Python uses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yanked", action="store_true", help="ask pip for every locked file once more")
    parser.add_argument("--pip-audit", default="pip-audit", metavar="PROGRAM")
    parser.add_argument("--require-database", action="store_true", help="fail where no database of weaknesses answered")
    options = parser.parse_args()
    audit = Audit()
    locks = {}
    for file in (HERE / "python-3.11.txt", HERE / "python-3.12.txt", HERE / "soak.txt", HERE / "audit.txt"):
        locks[file.name], troubles = read_lock(file.read_text(encoding="utf-8"))
        audit.note(f"{file.name}: {len(locks[file.name])} packages, each with its hashes", troubles)
    mine = HERE / ("python-3.11.txt" if sys.version_info[:2] == (3, 11) else "python-3.12.txt")
    lock = locks[mine.name]
    found = {canonical(one.metadata["Name"]): one for one in metadata.distributions()}
    said = {name: expression_of(one.metadata) for name, one in found.items()}
    allowed_beside = {one.name: one for one in (*locks["soak.txt"],)}
    installed = {name: one.version for name, one in found.items() if name not in allowed_beside}
    audit.note("nothing is installed beside the lock", beside(lock, installed))
    audit.note("every licence is one of those that may be used here", licences(lock, said))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "bill.json").write_text(json.dumps(bill(lock, said), indent=2) + "\n", encoding="utf-8")
    audit.passed.append(f"a bill of materials is in {OUT.relative_to(HERE.parent)}/bill.json")
    if options.yanked:
        troubles, why = yanked(mine)
        audit.note("no locked package was taken back", [*troubles]) if not why else audit.not_run.append(
            f"yanked: {why}"
        )
    else:
        audit.not_run.append("yanked: not asked for (--yanked)")
    troubles, why = ask_database(options.pip_audit, mine, len(lock))
    if troubles or not why:
        audit.note("no known weakness (pip-audit)", troubles)
    if why:
        audit.not_run.append(f"pip-audit: {why}")
    for line in audit.passed:
        print(f"ok    {line}")
    for line in audit.trouble:
        print(f"BAD   {line}")
    for line in audit.not_run:
        print(f"open  {line}")
    (OUT / "audit.json").write_text(json.dumps(audit.__dict__, indent=2) + "\n", encoding="utf-8")
    if audit.trouble:
        return 1
    return 2 if options.require_database and why else 0


if __name__ == "__main__":
    sys.exit(main())
