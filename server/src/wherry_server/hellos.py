"""Whether a hello is news. Pure.

A hello has no number, and anybody who heard one at the broker can send its bytes again: an old one must not bring back
facts, offer number or boot. Accepted is

1. what was said later than the last accepted one, by the device's clock;
2. what stands further in the streams: no stream's next number fell and one rose, which no earlier hello can say. This
   takes a device whose clock was set back in the midst of a boot, as soon as it has anything to report;
3. what comes from another boot with no stream's next number fallen: a device whose clock begins anew at each boot.

By 3 a hello of an earlier boot passes if the device has said nothing since; the next true hello or message sets it right.
A device that lost its journal *and* its clock (streams under new names, an earlier time) is heard in its reports, but its
hellos only once its clock is right.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import msgspec

from wherry_shared.facts import DeviceFacts
from wherry_shared.wire import Hello

BOOT_CHARS_MAX = 64
Nexts: TypeAlias = dict[str, tuple[str, int]]
"""Stream → (epoch, next number)."""


class Standing(NamedTuple):
    """What the last accepted hello of a device said."""

    at: int
    boot: str
    nexts: Nexts


def nexts(hello: Hello) -> Nexts:
    """Return where a hello says that the streams stand."""
    return {name: (epoch, following) for name, (epoch, _, following) in hello.streams.items()}


def standing(hello: Hello) -> Standing:
    """Return what later hellos are compared with."""
    return Standing(hello.at, hello.boot[:BOOT_CHARS_MAX], nexts(hello))


def is_news(hello: Hello, before: Standing) -> bool:
    """Tell whether a hello was said after `before`, as the rules above have it."""
    if is_later(hello, before):
        return True
    return _fell_nowhere(hello, before) and hello.boot[:BOOT_CHARS_MAX] != before.boot


def is_later(hello: Hello, before: Standing) -> bool:
    """Tell whether a hello was certainly said after `before`: by 1 or 2."""
    said = nexts(hello)
    return hello.at > before.at or (
        _fell_nowhere(hello, before) and any(said[name][1] > following for name, (_, following) in before.nexts.items())
    )


def _fell_nowhere(hello: Hello, before: Standing) -> bool:
    said = nexts(hello)
    return all(
        said.get(name, ("", 0))[0] == epoch and said[name][1] >= following
        for name, (epoch, following) in before.nexts.items()
    )


def facts_to_keep(facts: DeviceFacts) -> dict[str, Any]:
    """Return facts as every database can hold them: NUL is no character of PostgreSQL's, and becomes a replacement."""
    return msgspec.json.decode(msgspec.json.encode(facts).replace(rb"\u0000", rb"\ufffd"), type=dict[str, Any])
