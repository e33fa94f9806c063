"""Who a rollout is for, and who of them comes first. Pure.

**Shares.** Every device has a 64-bit key per rollout, `ids.share_key(salt, device)`. When a stage starts, the cut-off of
each stratum is the key of rank ceil(share × N) among its N members; it is stored and never falls; a device is exposed
exactly if its key is at or below the stored cut-off. Shares nest, membership never depends on who came first, and a
device that joins later compares with the same stored number. At share 1 the cut-off is the whole key space.

**Selectors.** A cohort is a text that people write, parsed here and evaluated here over plain values, never by SQL:

    selector   = term {"or" term}
    term       = factor {"and" factor}
    factor     = "not" factor | "(" selector ")" | "all" | comparison
    comparison = FIELD OP VALUE | FIELD "in" "(" VALUE {"," VALUE} ")"
    OP         = "=" | "!=" | "<" | "<=" | ">" | ">="

`=`, `!=` and `in` take `*` as a wildcard for any run of characters (`name = lab-*`). Order compares numbers, versions
(`agent >= 0.2.0`), sizes (`memory_bytes >= 2G`) and ages (`last_seen < 15m`: seen less than fifteen minutes ago).
Values with other characters than `A-Za-z0-9_.*:+/@-` stand in double quotes, where a backslash escapes. A field that a device
does not have equals nothing and is neither below nor above anything; `!=` is true of it. Where a field has several values
(`engine`, `cpu_feature`), a comparison holds if it holds for one of them, and `!=` if none is equal.

Fields: `id`, `name`, `state`, `simulated`, `arch`, `os`, `python`, `agent`, `cpu_model`, `cpu_feature`, `cores`,
`memory_bytes`, `disk_free_bytes`, `accelerator`, `timezone`, `engine`, `engine.NAME` (its version), `label.KEY`,
`runs.MODEL` (the version that answers there), `kept.LIST` (`true` on the devices that a static cohort keeps), `last_seen` and
`enrolled` (ages).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from operator import itemgetter
from typing import Literal, TypeAlias, TypeVar

import msgspec

from wherry_shared.errors import RefusedError
from wherry_shared.ids import share_key

T = TypeVar("T")
KEY_MAX = (1 << 64) - 1
_SIGNED = 1 << 63
SELECTOR_CHARS_MAX = 2_000
SELECTOR_DEPTH_MAX = 32
SELECTOR_TERMS_MAX = 200
_SHARE_DENOMINATOR_MAX = 1_000_000

Value: TypeAlias = str | int | float
View: TypeAlias = Mapping[str, Value | Sequence[str]]
"""What a selector is evaluated over: field name → value, or several values. Made by `cohorts.view`."""

FIELDS = frozenset(
    {
        "id",
        "name",
        "state",
        "simulated",
        "arch",
        "os",
        "python",
        "agent",
        "cpu_model",
        "cpu_feature",
        "cores",
        "memory_bytes",
    }
    | {"disk_free_bytes", "accelerator", "timezone", "engine", "last_seen", "enrolled"}
)
FAMILIES = frozenset({"engine", "kept", "label", "runs"})
"""First parts of fields with a dot: `label.site`."""
AGES = frozenset({"last_seen", "enrolled"})
SIZES = frozenset({"memory_bytes", "disk_free_bytes"})
NUMBERS = frozenset({"cores", *SIZES, *AGES})
FIELD_ALIKE_MIN = 0.75
"""How alike (`difflib`) a field has to be to what was written for it to be what was meant."""


# --- shares -------------------------------------------------------------------------------------


def exact(share: float) -> Fraction:
    """Return the share that a person wrote: 0.07 is 7/100, not the nearest binary fraction."""
    return Fraction(share).limit_denominator(_SHARE_DENOMINATOR_MAX)


def share_count(share: float, population: int) -> int:
    """Return ceil(share × population): the one place where a share becomes a count."""
    return -(-(exact(share) * population) // 1)


def cut_offs(
    keys: Mapping[str, Iterable[int]], share: float, stored: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the cut-off of each stratum at the start of a stage.

    Args:
        keys: the keys of the members of each stratum.
        share: the share of the stage, above 0 and at most 1.
        stored: cut-offs of the stage before; a cut-off never falls below them.
    """
    result = dict(stored or {})
    for stratum, members in keys.items():
        ranked = sorted(members)
        if share >= 1:
            at = KEY_MAX
        elif ranked:
            at = ranked[share_count(share, len(ranked)) - 1]
        else:
            continue
        result[stratum] = max(at, result.get(stratum, 0))
    if share >= 1:
        result = dict.fromkeys(result, KEY_MAX)
    return result


def counted_cut_offs(
    keys: Mapping[str, Iterable[int]], count: int, *, each: bool, most: float, stored: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the cut-offs of a stage that is a number of devices.

    Args:
        keys: the keys of the members of each stratum.
        count: devices of the whole cohort, divided among the strata by their size, rounded up in each.
        each: whether `count` is of each stratum instead.
        most: the share of a stratum beyond which it does not go.
        stored: cut-offs of the stage before; a cut-off never falls below them.
    """
    result = dict(stored or {})
    ranked = {stratum: sorted(members) for stratum, members in keys.items()}
    population = sum(map(len, ranked.values()))
    for stratum, members in ranked.items():
        wanted = count if each else -(-count * len(members) // population) if population else 0
        rank = min(wanted, share_count(most, len(members)), len(members))
        if rank:
            result[stratum] = max(members[rank - 1], result.get(stratum, 0))
    return result


def cut_off_of(stratum: str, stored: Mapping[str, int], share: float) -> int:
    """Return the highest key of a stratum that belongs to the stages so far.

    A stratum without a stored cut-off had no member when the stage started: its newcomers are taken by the share of the
    key space, which is what the cut-off of a large stratum tends to.
    """
    at = stored.get(stratum)
    if at is None:
        at = KEY_MAX if share >= 1 else int(exact(share) * KEY_MAX)
    return at


def exposed(key: int, stratum: str, stored: Mapping[str, int], share: float) -> bool:
    """Tell whether a device with `key` belongs to the stages so far."""
    return key <= cut_off_of(stratum, stored, share)


def in_turns(ranked: Iterable[T], stratum: Callable[[T], str]) -> list[T]:
    """Return what is ranked so that every stratum has its first one before any has its second."""
    seen: dict[str, int] = {}
    numbered: list[tuple[int, int, T]] = []
    for place, one in enumerate(ranked):
        name = stratum(one)
        seen[name] = seen.get(name, 0) + 1
        numbered.append((seen[name], place, one))
    return [one for _, _, one in sorted(numbered, key=itemgetter(0, 1))]


def key_of(salt: str, device: str) -> int:
    """Return the key of a device in a rollout."""
    return share_key(salt, device)


def control_rank(key: int, held_back: float) -> int:
    """Return by how much a device is wanted as a control: the last to be exposed first, who is held back last of all.

    Where the hold-back begins is taken from the key space, which is close enough for an order.
    """
    return key - KEY_MAX - 1 if key > int((1 - exact(held_back)) * KEY_MAX) else key


def signed(key: int) -> int:
    """Return a key as a signed 64-bit number in the same order, as databases hold it."""
    return key - _SIGNED


def unsigned(held: int) -> int:
    """Return the key that a database holds as a signed number."""
    return held + _SIGNED


# --- selectors ----------------------------------------------------------------------------------

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in"]


class _Node(msgspec.Struct, frozen=True, kw_only=True, tag_field="node"):
    """Base of the parts of a selector."""


class Everything(_Node, tag="all", frozen=True, kw_only=True):
    """`all`: every active device."""


class Compare(_Node, tag="compare", frozen=True, kw_only=True):
    """A field against one value, or against several with `in`."""

    field: str
    operator: Operator
    values: tuple[str, ...]


class Not(_Node, tag="not", frozen=True, kw_only=True):
    """What the inner selector does not take."""

    inner: Selector


class And(_Node, tag="and", frozen=True, kw_only=True):
    """What all parts take."""

    parts: tuple[Selector, ...]


class Or(_Node, tag="or", frozen=True, kw_only=True):
    """What one part takes."""

    parts: tuple[Selector, ...]


Selector: TypeAlias = Everything | Compare | Not | And | Or

_TOKEN = re.compile(r'\s*(?:(?P<word>[A-Za-z0-9_.*:+/@-]+)|(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>!=|<=|>=|[=<>(),]))')
_ORDER = frozenset({"<", "<=", ">", ">="})
_KEYWORDS = frozenset({"and", "or", "not", "in", "all"})
_AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZE_UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3}


class _Token(msgspec.Struct, frozen=True):
    kind: Literal["word", "text", "mark", "end"]
    text: str
    at: int


def parse_selector(text: str) -> Selector:
    """Parse a selector.

    Raises:
        RefusedError: `bad_selector`, with the place.
    """
    if len(text) > SELECTOR_CHARS_MAX:
        raise RefusedError("bad_selector", f"selector of {len(text)} characters, at most {SELECTOR_CHARS_MAX}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RefusedError("bad_selector", "selector with half a character (a lone surrogate)")
    parser = _Parser(_tokens(text))
    selector = parser.selector(0)
    parser.expect_end()
    return selector


def _refuse(message: str, at: int) -> RefusedError:
    return RefusedError(
        "bad_selector",
        f"selector, at character {at + 1}: {message}",
        next_step='write it as: label.site = berlin and not name = lab-* and agent >= 0.1.0, or "all"',
    )


def _tokens(text: str) -> list[_Token]:
    found: list[_Token] = []
    at = 0
    stripped = len(text.rstrip())
    while at < stripped:
        match = _TOKEN.match(text, at)
        if match is None:
            raise _refuse(f"cannot read {text[at : at + 12].strip()!r}", at)
        kind = match.lastgroup
        raw = match[kind] if kind else ""
        if kind == "text":
            found.append(_Token("text", re.sub(r"\\(.)", r"\1", raw[1:-1], flags=re.DOTALL), match.start(kind)))
        elif kind in ("word", "mark"):
            found.append(_Token(kind, raw, match.start(kind)))  # type: ignore[arg-type]
        at = match.end()
    found.append(_Token("end", "", stripped))
    return found


class _Parser:
    """Recursive descent over the grammar in the module's head; depth and size are bounded."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.terms = 0

    @property
    def here(self) -> _Token:
        return self.tokens[self.at]

    def take(self) -> _Token:
        token = self.here
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return token

    def is_word(self, word: str) -> bool:
        return self.here.kind == "word" and self.here.text.lower() == word

    def is_mark(self, mark: str) -> bool:
        return self.here.kind == "mark" and self.here.text == mark

    def expect_mark(self, mark: str) -> None:
        if not self.is_mark(mark):
            raise _refuse(f"expected {mark!r}", self.here.at)
        self.take()

    def expect_end(self) -> None:
        if self.here.kind != "end":
            raise _refuse(f"{self.here.text[:40]!r} is one too many", self.here.at)

    def selector(self, depth: int) -> Selector:
        parts = [self.term(depth)]
        while self.is_word("or"):
            self.take()
            parts.append(self.term(depth))
        return parts[0] if len(parts) == 1 else Or(parts=tuple(parts))

    def term(self, depth: int) -> Selector:
        parts = [self.factor(depth)]
        while self.is_word("and"):
            self.take()
            parts.append(self.factor(depth))
        return parts[0] if len(parts) == 1 else And(parts=tuple(parts))

    def factor(self, depth: int) -> Selector:
        if depth > SELECTOR_DEPTH_MAX:
            raise _refuse(f"nested deeper than {SELECTOR_DEPTH_MAX}", self.here.at)
        self.terms += 1
        if self.terms > SELECTOR_TERMS_MAX:
            raise _refuse(f"more than {SELECTOR_TERMS_MAX} terms", self.here.at)
        if self.is_word("not"):
            self.take()
            return Not(inner=self.factor(depth + 1))
        if self.is_mark("("):
            self.take()
            inner = self.selector(depth + 1)
            self.expect_mark(")")
            return inner
        if self.is_word("all"):
            self.take()
            return Everything()
        return self.comparison()

    def comparison(self) -> Compare:
        token = self.take()
        if token.kind != "word":
            raise _refuse("expected a field such as name or label.site", token.at)
        _check_field(token.text, token.at)
        operator = self.take()
        if operator.kind == "word" and operator.text.lower() == "in":
            self.expect_mark("(")
            values = [self.value(token.text, "in")]
            while self.is_mark(","):
                self.take()
                values.append(self.value(token.text, "in"))
                self.terms += 1
            self.expect_mark(")")
            return Compare(field=token.text, operator="in", values=tuple(values))
        if operator.kind != "mark" or operator.text in "(),":
            raise _refuse("expected = != < <= > >= or in", operator.at)
        value = self.value(token.text, operator.text)
        return Compare(field=token.text, operator=operator.text, values=(value,))  # type: ignore[arg-type]

    def value(self, field: str, operator: str) -> str:
        token = self.take()
        if token.kind not in ("word", "text") or (token.kind == "word" and token.text.lower() in _KEYWORDS):
            raise _refuse("expected a value (quote words that are keywords)", token.at)
        if field in NUMBERS and _number(field, token.text) is None:
            kind = "an age such as 15m, 2h or 7d" if field in AGES else "a number such as 4 or 2G"
            raise _refuse(f"{field} compares with {kind}", token.at)
        if operator in _ORDER and field not in NUMBERS and _order_key(token.text) is None:
            raise _refuse(f"{token.text[:40]!r} is no number or version, so nothing is below or above it", token.at)
        return token.text


def _check_field(field: str, at: int) -> None:
    family, dot, rest = field.partition(".")
    if field in FIELDS or (dot and rest and family in FAMILIES):
        return
    near = get_close_matches(family, [*FIELDS, *FAMILIES] if not dot else list(FAMILIES), n=1, cutoff=FIELD_ALIKE_MIN)
    if near:
        meant = f"{near[0]}.{rest or 'KEY'}" if near[0] in FAMILIES else near[0]
    else:
        meant = f"label.{field}"[:48]
    raise _refuse(f"there is no field {field[:40]!r}; is it {meant}?", at)


def _number(field: str, text: str) -> float | None:
    units = _AGE_UNITS if field in AGES else _SIZE_UNITS if field in SIZES else {"": 1}
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([A-Za-z]?)", text)
    if match is None or match[2] not in units:
        return None
    return float(match[1]) * units[match[2]]


def _order_key(text: str) -> tuple[int, ...] | None:
    """Numbers and versions as integers: 1.10.0 is above 1.9; what follows a number that is not a dot is left out."""
    match = re.match(r"[0-9]{1,15}(?:\.[0-9]{1,15}){0,7}", text)
    if match is None:
        return None
    numbers = [int(part) for part in match[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()  # 1.0 and 1.0.0 are equal
    return tuple(numbers)


def matches(selector: Selector, view: View) -> bool:
    """Tell whether a device takes part."""
    match selector:
        case Everything():
            return True
        case Not(inner=inner):
            return not matches(inner, view)
        case And(parts=parts):
            return all(matches(part, view) for part in parts)
        case Or(parts=parts):
            return any(matches(part, view) for part in parts)
        case Compare():
            return _compare(selector, view.get(selector.field))


def _compare(compare: Compare, have: Value | Sequence[str] | None) -> bool:
    several: Sequence[Value]
    if have is None:
        several = ()
    elif isinstance(have, (str, int, float)):
        several = (have,)
    else:
        several = have
    if compare.operator == "!=":
        return not any(_equal(compare.field, one, compare.values[0]) for one in several)
    if compare.operator in ("=", "in"):
        return any(_equal(compare.field, one, value) for one in several for value in compare.values)
    return any(_ordered(compare.field, one, compare.operator, compare.values[0]) for one in several)


def _equal(field: str, have: Value, want: str) -> bool:
    if field in NUMBERS and not isinstance(have, str):
        return have == _number(field, want)
    return _glob(want, have if isinstance(have, str) else str(have))


def _ordered(field: str, have: Value, operator: str, want: str) -> bool:
    left: tuple[float, ...] | None
    right: tuple[float, ...] | None
    if field in NUMBERS and not isinstance(have, str):
        number = _number(field, want)
        left, right = (have,), None if number is None else (number,)
    else:
        left, right = _order_key(str(have)), _order_key(want)
    if left is None or right is None:
        return False
    if operator == "<":
        return left < right
    if operator == "<=":
        return left <= right
    return left > right if operator == ">" else left >= right


def _glob(pattern: str, text: str) -> bool:
    """Match `*` in linear time: each piece is looked for after the one before."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    *middle, last = rest
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in middle:
        at = text.find(piece, at, end)
        if at < 0:
            return False
        at += len(piece)
    return True
