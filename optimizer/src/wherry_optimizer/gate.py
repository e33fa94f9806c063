"""Whether a variant may be packed: its accuracy budget. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from wherry_shared.bundle import Accuracy


@dataclass(frozen=True, slots=True)
class Verdict:
    """The word of the gate, and why."""

    passed: bool
    why: str


def judge(accuracy: Accuracy, drop_max: float) -> Verdict:
    """Compare the drop against the source model with the budget; a drop that is no number never passes."""
    error = accuracy.drop_standard_error or 0.0
    measured = f"{accuracy.metric} {accuracy.value:.4f}, drop {accuracy.drop:.4f} ± {error:.4f}"
    samples = f"on {accuracy.samples} samples"
    if accuracy.drop <= drop_max:
        return Verdict(True, f"{measured} {samples}, budget {drop_max:.4f}")
    return Verdict(False, f"{measured} {samples}: over its budget of {drop_max:.4f} by {accuracy.drop - drop_max:.4f}")
