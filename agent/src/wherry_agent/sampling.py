"""Which inputs may leave a device: of models for which its offer asks, and its own settings consent to each. Pure.

The offer asks by the flag `wherry.samples`, an object of model → share of requests. Consent is `samples_consent` in the
settings, which no offer can change. Without both nothing is taken, and what was taken is not sent any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from wherry_shared.limits import SAMPLE_SHARE_MAX
from wherry_shared.wire import Telemetry

FLAG = "wherry.samples"


def asked(flags: Mapping[str, Any]) -> dict[str, float]:
    """Return model → share of its requests, as far as the flag says so; anything else in it asks for nothing."""
    value = flags.get(FLAG)
    if not isinstance(value, Mapping):
        return {}
    shares = {name: share for name, share in value.items() if isinstance(share, int | float) and share is not True}
    return {name: min(float(share), SAMPLE_SHARE_MAX) for name, share in sorted(shares.items()) if share > 0}


def shares(flags: Mapping[str, Any], consent: Collection[str]) -> dict[str, float]:
    """Return model → share of its requests whose inputs may leave the device."""
    return {name: share for name, share in asked(flags).items() if name in consent}


def words(flags: Mapping[str, Any], consent: Collection[str]) -> list[str]:
    """Say what is asked for, and whether it is given."""
    given = shares(flags, consent)
    return [
        f"{name}: inputs of {share:.2%} of the requests are sent, a few in each window"
        if name in given
        else f"{name}: inputs are asked for, and not sent: samples_consent does not name it"
        for name, share in asked(flags).items()
    ]


def without(message: Telemetry, may: Callable[[str], bool] = lambda _: False) -> Telemetry:
    """Return a message without the samples of models whose inputs may not leave, or not any more."""
    if all(may(window.model) or not window.samples for window in message.windows):
        return message
    windows = [
        window if may(window.model) else msgspec.structs.replace(window, samples=[]) for window in message.windows
    ]
    return msgspec.structs.replace(message, windows=windows)
