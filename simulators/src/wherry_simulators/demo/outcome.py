"""What came out: checked facts, the report file, the summary table. The demo fails if any check does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wherry_simulators.demo.bundles import Release

BACK = ("returned", "reverted")
"""Outcomes of devices that ran a release and went back: by themselves, or taken back by the rollout."""

TOTAL_S = 120.0
"""What the demo is to take on two free cores; told, not judged, since the machine may be busy."""


@dataclass
class Outcome:
    """Facts gathered while the demo runs."""

    real: int = 0
    swarm: int = 0
    releases: list[Release] = field(default_factory=list)
    kept_out: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    refused_by_server: int = 0
    refused_by_agent: int = 0
    answered: int = 0
    failed: int = 0
    fallbacks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    checks: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        """Seconds of all steps together."""
        return sum(self.seconds.values())

    def check(self, what: str, good: bool) -> bool:
        """Remember whether something came out."""
        self.checks.append((what, good))
        return good

    @property
    def good(self) -> bool:
        """Whether everything came out."""
        return bool(self.checks) and all(good for _, good in self.checks)

    def add_rollout(self, shown: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Keep the counts of a rollout as the server shows it at its end."""
        real, simulated = shown["counts"]["real"], shown["counts"]["simulated"]

        def both(name: str) -> int:
            return int(real.get(name, 0)) + int(simulated.get(name, 0))

        row = {
            "model": shown["model"],
            "version": shown["version"],
            "state": shown["state"],
            "exposed": both("exposed"),
            "confirmed": both("confirmed"),
            "confirmed_idle": both("confirmed_idle"),
            "reverted": sum(both(name) for name in BACK),
            "reverted_real": sum(int(real.get(name, 0)) for name in BACK),
            "seconds": round(seconds, 2),
            "reason": shown["reason"],
        }
        self.rollouts.append(row)
        return row

    def as_dict(self) -> dict[str, Any]:
        """Return the report."""
        return {
            "devices": {"real": self.real, "swarm": self.swarm},
            "variants": [
                {
                    "bundle": f"{release.model} {release.version}",
                    "id": variant.id,
                    "format": variant.format,
                    "precision": variant.precision,
                    "bytes": variant.bytes,
                    "download_bytes": variant.download_bytes,
                    "accuracy": variant.accuracy.value if variant.accuracy else None,
                    "accuracy_drop": variant.accuracy.drop if variant.accuracy else None,
                    "standard_error": variant.accuracy.standard_error if variant.accuracy else None,
                    "data": variant.accuracy.data if variant.accuracy else None,
                    "latency_ratio": next((f.latency_ratio for f in variant.figures.values()), None),
                }
                for release in self.releases
                for variant in release.config.variants
            ],
            "kept_out": self.kept_out,
            "rollouts": self.rollouts,
            "refused": {"server": self.refused_by_server, "agent": self.refused_by_agent},
            "inference": {"answered": self.answered, "failed": self.failed, "by_incumbent": self.fallbacks},
            "seconds": {name: round(value, 2) for name, value in {**self.seconds, "total": self.total_s}.items()},
            "checks": [{"what": what, "good": good} for what, good in self.checks],
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def show(self, console: Console) -> None:
        """Print the summary."""
        table = Table(title="Rollouts", title_justify="left", box=None, pad_edge=False)
        for name in ("model", "version", "state", "exposed", "confirmed", "idle", "back", "real back", "seconds"):
            table.add_column(name, justify="left" if name in ("model", "version", "state") else "right")
        for row in self.rollouts:
            cells = (row["exposed"], row["confirmed"], row["confirmed_idle"], row["reverted"], row["reverted_real"])
            table.add_row(row["model"], row["version"], row["state"], *map(str, cells), f"{row['seconds']:.1f}")
        console.print(table)
        console.print(
            f"\ninference: {self.answered} answered, {self.failed} failed; "
            f"{self.fallbacks} answered by the incumbent because the candidate could not\n"
        )
        for what, good in self.checks:
            console.print(f"  {'[green]yes[/]' if good else '[bold red]NO [/]'}  {what}")
        took = f"{self.total_s:.0f} s in all, of which the build took {self.seconds.get('build', 0):.0f}"
        late = "" if self.total_s <= TOTAL_S else f"; two cores with nothing else to do need less than {TOTAL_S:.0f}"
        console.print(f"\n{self.real} real agents, {self.swarm} simulated devices, {took}{late}")


def data_lines(releases: list[Release]) -> list[str]:
    """Say of each release on what data its accuracy was measured."""
    told: list[str] = []
    for release in releases:
        data = {variant.accuracy.data for variant in release.config.variants if variant.accuracy}
        told += [f"{release.name}: accuracy on {words}" for words in sorted(data)]
    return told


def variants_table(releases: list[Release]) -> Table:
    """Return size, accuracy and latency of every variant of the releases that were built."""
    table = Table(box=None, pad_edge=False)
    for name in ("bundle", "variant", "format", "precision", "kB", "kB sent", "accuracy", "drop", "n", "latency"):
        table.add_column(name, justify="left" if name in ("bundle", "variant", "format", "precision") else "right")
    for release in releases:
        for variant in release.config.variants:
            accuracy = variant.accuracy
            ratio = next((f.latency_ratio for f in variant.figures.values() if f.latency_ratio), None)
            table.add_row(
                release.name,
                variant.id,
                variant.format,
                variant.precision,
                f"{variant.bytes / 1000:.0f}",
                f"{variant.download_bytes / 1000:.0f}",
                f"{accuracy.value:.3f} ± {accuracy.standard_error:.3f}" if accuracy else "",
                f"{100 * accuracy.drop:+.1f} points" if accuracy else "",
                str(accuracy.samples) if accuracy else "",
                f"×{ratio:.2f}" if ratio else "",
            )
    return table
