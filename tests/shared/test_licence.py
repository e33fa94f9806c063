"""SPDX expressions: what the grammar takes, what it refuses where, and which ids may be packed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_shared.errors import RefusedError
from wherry_shared.licence import KNOWN, NESTING_MAX, check_grammar, check_known

ATOMS = st.one_of(
    st.sampled_from(sorted(KNOWN)),
    st.sampled_from(sorted(KNOWN)).map(lambda name: f"{name}+"),
    st.from_regex(r"LicenseRef-[A-Za-z0-9.-]{1,9}", fullmatch=True),
    st.from_regex(r"DocumentRef-[a-z]{1,5}:LicenseRef-[A-Za-z0-9.-]{1,9}", fullmatch=True),
    st.just("GPL-2.0-only WITH Classpath-exception-2.0"),
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        inner.map(lambda text: f"({text})"),
        st.tuples(inner, st.sampled_from(["AND", "OR"]), inner).map(" ".join),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_every_expression_that_the_grammar_makes_is_taken(expression: str) -> None:
    assert check_known(expression) == check_grammar(expression)


@given(st.text(alphabet="MIT()+ ANDORWH:.-", max_size=40))
def test_any_text_is_taken_or_refused_by_code(text: str) -> None:
    try:
        names = check_grammar(text)
    except RefusedError as error:
        code = error.code
    else:
        code = "taken" if names.licences or names.references else "taken without an id"
    assert code in ("taken", "licence_invalid", "licence_missing")


def test_what_an_expression_names_is_told() -> None:
    names = check_grammar("(MIT OR Apache-2.0+) AND LicenseRef-Weights AND GPL-2.0-only WITH LLVM-exception")
    assert names.licences == ("MIT", "Apache-2.0", "GPL-2.0-only")
    assert names.exceptions == ("LLVM-exception",)
    assert names.references == ("LicenseRef-Weights",)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("Nonsense License", "expected AND, OR, WITH or the end, found 'License'"),
        ("MIT and ISC", "found 'and'"),
        ("MIT AND", "expected a licence id, found the end"),
        ("OR MIT", "expected a licence id, found 'OR'"),
        ("(MIT", "expected ')', found the end"),
        ("MIT)", "found ')'"),
        ("()", "expected a licence id, found ')'"),
        ("MIT/ISC", "'MIT/ISC' is not a licence id"),
        ("MIT WITH", "expected an exception id"),
        ("(MIT OR ISC) WITH LLVM-exception", "found 'WITH'"),
        ("LicenseRef-", "'LicenseRef-' is not"),
        ("DocumentRef-a", "'DocumentRef-a' is not"),
        ("LicenseRef-a+", "'LicenseRef-a+' is not"),
        ("+", "'+' is not a licence id"),
        ("(" * (NESTING_MAX + 1) + "MIT" + ")" * (NESTING_MAX + 1), "deeper than"),
        ("MIT OR " * 200 + "MIT", "characters, at most"),
    ],
)
def test_what_is_no_expression_is_refused_with_its_place(expression: str, said: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check_grammar(expression)
    assert caught.value.code == "licence_invalid"
    assert said in caught.value.message


@pytest.mark.parametrize("expression", ["", " ", "\n\t"])
def test_an_empty_expression_is_missing(expression: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check_grammar(expression)
    assert caught.value.code == "licence_missing"


def test_readers_take_an_id_that_makers_do_not_know() -> None:
    assert check_grammar("Brand-New-1.0").licences == ("Brand-New-1.0",)
    with pytest.raises(RefusedError) as caught:
        check_known("Brand-New-1.0")
    assert caught.value.code == "licence_unknown"
    assert "LicenseRef-NAME" in (caught.value.next_step or "")


def test_a_misspelt_id_is_told_the_right_one_and_case_does_not_matter() -> None:
    check_known("apache-2.0 OR mit")
    with pytest.raises(RefusedError) as caught:
        check_known("Apache2.0")
    assert "use Apache-2.0" in (caught.value.next_step or "")
    with pytest.raises(RefusedError, match="licence exception"):
        check_known("GPL-2.0-only WITH My-exception")
