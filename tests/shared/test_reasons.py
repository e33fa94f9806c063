"""Every reason code says whether it speaks against a bundle."""

from __future__ import annotations

from wherry_shared import reasons


def test_every_code_is_of_one_kind() -> None:
    codes = [value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)]
    assert len(codes) == len(set(codes))
    kinds = [*reasons.VERDICTS, *reasons.UNUSABLE, *reasons.NEUTRAL]
    assert sorted(kinds) == sorted(codes)
    assert reasons.ALTERED <= reasons.NEUTRAL
