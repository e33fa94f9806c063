"""What a request says about itself beside its tensors: the keys by which it falls into a share and into a sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """The request's own words (OIP `id`, `parameters.sequence_id`, `sequence_start`, `sequence_end`)."""

    request_id: str = ""
    sequence_id: str = ""
    """A number that a caller sent is its decimal digits; empty: none."""
    sequence_start: bool = False
    """Begin the sequence here, whatever was known of one with that id."""
    sequence_end: bool = False
    """Forget the sequence after this answer."""
    generation: int = 0
    """Answer by this generation of the model's group or not at all; 0: by whatever is published."""
    unshared: bool = False
    """Nobody changes the input and output arrays after the answer, so that a shadow may read them later without a copy."""


PLAIN = Ask()
"""A request that says nothing about itself."""
