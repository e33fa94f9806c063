"""Feature flags as operators define them, and which variant a device has by rules. Pure.

    flag = type, variants (name → value), default, rules
    rule = when (selector) , share, variant

Rules are asked in their order. A rule takes a device if its selector does and the device's key is within its share of the key
space; the first that takes it gives it its variant, and a device that none takes has the default. The key is of (flag's
salt, device) and the same for all rules of a flag, so that shares nest: who has the variant at 5 % has it at 25 %, and
`[{share 0.1, a}, {share 0.5, b}]` gives a to a tenth, b to four tenths, and the default to the rest.

What a rollout gives to a device stands above the rules (`flag_values`). A definition that does not parse is never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from wherry_server.targeting import KEY_MAX, Selector, View, exact, key_of, matches, parse_selector
from wherry_shared import digest
from wherry_shared import flags as device_flags
from wherry_shared.errors import RefusedError

TYPES = ("boolean", "string", "number", "object")
RULES_MAX = 32
VARIANTS_MAX = 32
VARIANT_CHARS_MAX = 64
DESCRIPTION_CHARS_MAX = 400
PREFIX = "flag:"
"""Before a flag's name where rollouts name what they roll out; no model's name has a colon."""

Type = Literal["boolean", "string", "number", "object"]
SEE_FLAGS = "see what a flag may say: docs/flags.md"


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of definitions: an unknown field is a wish that nobody would obey."""


class Rule(_Strict, frozen=True, kw_only=True):
    """Who gets a variant."""

    when: str = "all"
    """A selector."""
    share: float = 1.0
    """Share of the key space; 1 is everybody."""
    variant: str


class Flag(_Strict, frozen=True, kw_only=True):
    """A definition."""

    name: str
    type: Type
    description: str = ""
    variants: dict[str, Any]
    default: str
    """Variant of whoever no rule and no rollout takes."""
    rules: list[Rule] = []


class Source(NamedTuple):
    """Which variant a device has, and why."""

    variant: str
    by: Literal["default", "rule", "rollout"]
    number: int = 0
    """Of the rule (from 1) or of the rollout."""


class Ready(NamedTuple):
    """A definition with its selectors parsed: what is asked about many devices."""

    flag: Flag
    salt: str
    rules: tuple[tuple[Selector, int, str], ...]
    """Selector, highest key, variant."""

    def ruled(self, device: str, view: View) -> Source:
        """Return what default and rules give to a device."""
        key = key_of(self.salt, device) if self.rules else 0
        for number, (selector, highest, variant) in enumerate(self.rules, 1):
            if key <= highest and matches(selector, view):
                return Source(variant, "rule", number)
        return Source(self.flag.default, "default")


def parse_flag(raw: Mapping[str, Any]) -> Flag:
    """Parse and check a definition.

    Raises:
        RefusedError: `flag_invalid` or `bad_selector`.
    """
    try:
        flag = msgspec.convert(dict(raw), Flag)
        msgspec.json.encode(flag)
    except (msgspec.ValidationError, UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise _invalid(f"not a flag: {error}") from error
    _check(flag)
    return flag


def ready(flag: Flag, salt: str) -> Ready:
    """Return a definition, ready to be asked about devices."""
    rules = tuple((parse_selector(rule.when), _highest(rule.share), rule.variant) for rule in flag.rules)
    return Ready(flag, salt, rules)


def together(flags: Iterable[Flag]) -> str:
    """Say why no offer can carry all flags, whichever variants a device has; empty if any can."""
    return device_flags.trouble({flag.name: _largest(flag) for flag in flags})


def fingerprint(name: str, variant: str, value: Any) -> str:
    """Return the digest by which rollouts and quarantine know a variant: another value is another thing."""
    return digest.of_bytes(msgspec.json.encode([name, variant, value], order="sorted"))


def _highest(share: float) -> int:
    return KEY_MAX if share >= 1 else int(exact(share) * KEY_MAX)


def _largest(flag: Flag) -> Any:
    return max(flag.variants.values(), key=lambda value: len(msgspec.json.encode(value)))


def _check(flag: Flag) -> None:
    if flag.name.startswith("."):
        raise _invalid(f"a flag's name begins with a letter or digit: {flag.name[:40]!r}")
    if len(flag.description) > DESCRIPTION_CHARS_MAX:
        raise _invalid(f"description of {len(flag.description)} characters, at most {DESCRIPTION_CHARS_MAX}")
    if not 1 <= len(flag.variants) <= VARIANTS_MAX:
        raise _invalid(f"{len(flag.variants)} variants, expected 1 to {VARIANTS_MAX}")
    for variant, value in flag.variants.items():
        if not 1 <= len(variant) <= VARIANT_CHARS_MAX or not set(variant) <= _VARIANT:
            raise _invalid(f"variant {variant[:40]!r}: 1 to {VARIANT_CHARS_MAX} of A-Z a-z 0-9 . _ -")
        if type_of(value) != flag.type:
            raise _invalid(f"variant {variant!r} is a {type_of(value)}, the flag is a {flag.type}")
        why = device_flags.trouble({flag.name: value})
        if why:
            raise _invalid(why)
    for what, variant in (("default", flag.default), *((f"rule {n}", r.variant) for n, r in enumerate(flag.rules, 1))):
        if variant not in flag.variants:
            raise _invalid(f"{what} is {variant[:40]!r}, which is none of its variants")
    if len(flag.rules) > RULES_MAX:
        raise _invalid(f"{len(flag.rules)} rules, at most {RULES_MAX}")
    for number, rule in enumerate(flag.rules, 1):
        parse_selector(rule.when)
        if not 1e-6 <= rule.share <= 1:
            raise _invalid(f"rule {number} has share {rule.share}, expected 0.000001 to 1")


def type_of(value: Any) -> str:
    """Return the type of a value as flags have it, `nothing` for what no flag can be."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "nothing"


def _invalid(message: str) -> RefusedError:
    return RefusedError("flag_invalid", message, consequence="nothing was changed", next_step=SEE_FLAGS)


_VARIANT = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
