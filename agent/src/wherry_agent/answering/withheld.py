"""Takes values out of what an engine says of a failure, before that leaves the device in a report.

Engines quote what they were given ("idx=98765 must be within [-2,1]", "could not convert 'name of a person'"). Numbers,
lists and quoted words are replaced; the words around them, by which a person knows the failure, stay.
"""

from __future__ import annotations

import re

WITHHELD = "…"
_VALUES = re.compile(r"""'[^']*'|"[^"]*"|\[\s*[-+.\d'"][^\]]*\]|(?<!\w)[-+]?\d[\w.+-]*""")


def withhold(text: str) -> str:
    """Return an error's words without values."""
    return _VALUES.sub(WITHHELD, text)
