"""SPDX licence expressions: the grammar, and the ids that are taken without asking. Pure.

Readers check the grammar only (`check_grammar`), so that a bundle with an id that is newer than this release stays readable.
Whoever makes a bundle is checked against `KNOWN` as well (`check_known`): a misspelt id names no terms at all, and terms that
are on no list have a form of their own, `LicenseRef-NAME`. Ids compare without case, operators are upper case
(SPDX specification 2.3, annex D).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from wherry_shared.errors import RefusedError

EXPRESSION_CHARACTERS_MAX = 1024
NESTING_MAX = 32
"""Parentheses within parentheses."""

KNOWN = frozenset(
    [
        "0BSD",
        "AFL-3.0",
        "AGPL-3.0-only",
        "AGPL-3.0-or-later",
        "Apache-1.1",
        "Apache-2.0",
        "Artistic-1.0",
        "Artistic-2.0",
        "BlueOak-1.0.0",
        "BSD-1-Clause",
        "BSD-2-Clause",
        "BSD-2-Clause-Patent",
        "BSD-3-Clause",
        "BSD-3-Clause-Clear",
        "BSD-3-Clause-LBNL",
        "BSD-4-Clause",
        "BSL-1.0",
        "BUSL-1.1",
        "CC-BY-2.0",
        "CC-BY-2.5",
        "CC-BY-3.0",
        "CC-BY-4.0",
        "CC-BY-NC-3.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-ND-3.0",
        "CC-BY-NC-ND-4.0",
        "CC-BY-NC-SA-3.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-ND-4.0",
        "CC-BY-SA-2.0",
        "CC-BY-SA-3.0",
        "CC-BY-SA-4.0",
        "CC-PDDC",
        "CC0-1.0",
        "CDDL-1.0",
        "CDDL-1.1",
        "CDLA-Permissive-1.0",
        "CDLA-Permissive-2.0",
        "CDLA-Sharing-1.0",
        "CECILL-2.1",
        "CECILL-B",
        "CECILL-C",
        "CPL-1.0",
        "C-UDA-1.0",
        "ECL-2.0",
        "EPL-1.0",
        "EPL-2.0",
        "EUPL-1.1",
        "EUPL-1.2",
        "GFDL-1.3-only",
        "GFDL-1.3-or-later",
        "GPL-2.0-only",
        "GPL-2.0-or-later",
        "GPL-3.0-only",
        "GPL-3.0-or-later",
        "GPL-2.0",
        "GPL-3.0",
        "LGPL-2.1",
        "LGPL-3.0",
        "AGPL-3.0",
        "HPND",
        "ISC",
        "LGPL-2.0-only",
        "LGPL-2.0-or-later",
        "LGPL-2.1-only",
        "LGPL-2.1-or-later",
        "LGPL-3.0-only",
        "LGPL-3.0-or-later",
        "libpng-2.0",
        "LPL-1.02",
        "MirOS",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        "MIT-Modern-Variant",
        "MPL-1.1",
        "MPL-2.0",
        "MPL-2.0-no-copyleft-exception",
        "MS-PL",
        "MS-RL",
        "MulanPSL-2.0",
        "NCSA",
        "OASIS-IPR",
        "ODbL-1.0",
        "ODC-By-1.0",
        "OFL-1.1",
        "OGL-UK-3.0",
        "OpenSSL",
        "OSL-3.0",
        "PDDL-1.0",
        "PHP-3.01",
        "PolyForm-Noncommercial-1.0.0",
        "PolyForm-Small-Business-1.0.0",
        "PostgreSQL",
        "PSF-2.0",
        "Python-2.0",
        "QPL-1.0",
        "Ruby",
        "SSPL-1.0",
        "TCL",
        "Unicode-3.0",
        "Unicode-DFS-2016",
        "Unlicense",
        "UPL-1.0",
        "Vim",
        "W3C",
        "WTFPL",
        "X11",
        "Zlib",
        "ZPL-2.1",
    ]
)
"""Ids of licences that models, data and code commonly come under; a part of the SPDX list."""
EXCEPTIONS = frozenset(
    [
        "Autoconf-exception-3.0",
        "Bison-exception-2.2",
        "Classpath-exception-2.0",
        "GCC-exception-2.0",
        "GCC-exception-3.1",
        "LLVM-exception",
        "OCaml-LGPL-linking-exception",
        "OpenJDK-assembly-exception-1.0",
        "Qt-LGPL-exception-1.1",
    ]
)
"""Ids that may stand behind WITH."""

_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")
_ID = re.compile(r"[A-Za-z0-9.-]+")
_REFERENCE = re.compile(r"(?:DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+")
_OPERATORS = ("AND", "OR", "WITH")
_KNOWN_LOWER = {name.lower(): name for name in KNOWN}
_EXCEPTIONS_LOWER = {name.lower(): name for name in EXCEPTIONS}


@dataclass(frozen=True, slots=True)
class Names:
    """What an expression names, in order: `licences` without `+`, `exceptions`, and `references` of one's own."""

    licences: tuple[str, ...]
    exceptions: tuple[str, ...]
    references: tuple[str, ...]


def check_grammar(expression: str) -> Names:
    """Check that a text is an SPDX expression, and return the ids in it.

    Raises:
        RefusedError: `licence_missing` for an empty one, `licence_invalid` naming the place.
    """
    if not expression.strip():
        raise RefusedError(
            "licence_missing",
            "a bundle carries a licence expression",
            consequence="nobody may be sent a model without knowing its terms",
            next_step="name it, e.g. Apache-2.0",
        )
    if len(expression) > EXPRESSION_CHARACTERS_MAX:
        raise _invalid(expression, f"has {len(expression)} characters, at most {EXPRESSION_CHARACTERS_MAX}")
    return _Parser(expression).run()


def check_known(expression: str) -> Names:
    """Check the grammar and that every id is a known one.

    Raises:
        RefusedError: as `check_grammar`, and `licence_unknown`.
    """
    names = check_grammar(expression)
    for kind, given, known in (
        ("licence", names.licences, _KNOWN_LOWER),
        ("licence exception", names.exceptions, _EXCEPTIONS_LOWER),
    ):
        for name in given:
            if name.lower() in known:
                continue
            near = difflib.get_close_matches(name.lower(), known, n=1)
            meant = f"use {known[near[0]]} if that is meant; " if near else ""
            raise RefusedError(
                "licence_unknown",
                f"{name!r} is no {kind} that Wherry knows by its SPDX id",
                consequence="nobody may be sent a model without knowing its terms",
                next_step=f"{meant}for terms of your own, or an SPDX id that is missing here, say LicenseRef-NAME",
            )
    return names


class _Parser:
    """Recursive descent: expression = and {OR and}, and = term {AND term}, term = ( expression ) or an id."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _TOKEN.findall(text)
        self._next = 0
        self._licences: list[str] = []
        self._exceptions: list[str] = []
        self._references: list[str] = []

    def run(self) -> Names:
        self._alternatives(0)
        if self._peek() is not None:
            raise self._unexpected("AND, OR, WITH or the end")
        return Names(tuple(self._licences), tuple(self._exceptions), tuple(self._references))

    def _alternatives(self, depth: int) -> None:
        self._joined(depth)
        while self._take("OR"):
            self._joined(depth)

    def _joined(self, depth: int) -> None:
        self._term(depth)
        while self._take("AND"):
            self._term(depth)

    def _term(self, depth: int) -> None:
        if self._take("("):
            if depth == NESTING_MAX:
                raise _invalid(self._text, f"nests parentheses deeper than {NESTING_MAX}")
            self._alternatives(depth + 1)
            if not self._take(")"):
                raise self._unexpected("')'")
            return
        token = self._id("a licence id")
        if token.startswith(("LicenseRef-", "DocumentRef-")):
            if not _REFERENCE.fullmatch(token):
                raise _invalid(self._text, f"{token!r} is not [DocumentRef-NAME:]LicenseRef-NAME")
            self._references.append(token)
        else:
            plain = token.removesuffix("+")
            if not _ID.fullmatch(plain):
                raise _invalid(self._text, f"{token!r} is not a licence id (letters, digits, '.' and '-')")
            self._licences.append(plain)
        if self._take("WITH"):
            exception = self._id("an exception id")
            if not _ID.fullmatch(exception):
                raise _invalid(self._text, f"{exception!r} is not an exception id (letters, digits, '.' and '-')")
            self._exceptions.append(exception)

    def _id(self, what: str) -> str:
        token = self._peek()
        if token is None or token in ("(", ")", *_OPERATORS):
            raise self._unexpected(what)
        self._next += 1
        return token

    def _peek(self) -> str | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, token: str) -> bool:
        if self._peek() != token:
            return False
        self._next += 1
        return True

    def _unexpected(self, wanted: str) -> RefusedError:
        token = self._peek()
        return _invalid(self._text, f"expected {wanted}, found {'the end' if token is None else repr(token)}")


def _invalid(text: str, why: str) -> RefusedError:
    return RefusedError(
        "licence_invalid",
        f"licence {text[:120]!r} is no SPDX expression: {why}",
        consequence="nobody may be sent a model without knowing its terms",
        next_step="give an SPDX id such as Apache-2.0, ids joined by AND or OR, or LicenseRef-NAME",
    )
