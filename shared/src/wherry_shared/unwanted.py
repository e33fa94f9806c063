"""Keeps out of a process of ours what its libraries import because it happens to be installed, and nobody here uses.

securesystemslib imports the SDK of a cloud for a kind of key that Wherry has not, httpx its command line with a
highlighter: each takes longer than all of our own modules. Both do without where there is none. Only for a process of our own, before anything
else of it is imported.
"""

from __future__ import annotations

import sys

UNWANTED = ("boto3", "httpx._main")


def keep_out() -> None:
    """Make importing them fail; what is imported already stays."""
    for name in UNWANTED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # the documented way to make an import fail
