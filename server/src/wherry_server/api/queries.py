"""What a request says behind the `?`: a parameter that the operation does not have, or one said twice, is refused.

A filter with a typo would else be none, and the list be everything.
"""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches

from fastapi import Request, params
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_flat_params

from wherry_shared.errors import RefusedError

FOREIGN = frozenset({"login_callback"})
"""Operations to which others send: RFC 6749 §4.1.2 has whoever logs in ignore what it does not know of an answer."""
NAME_CHARS_MAX = 64
"""Of a parameter's name in an error."""


async def check(request: Request) -> None:
    """Let pass what the operation of a request knows: a dependency of every operation.

    Raises:
        RefusedError: `request_invalid`.
    """
    if not request.scope["query_string"]:
        return
    route = request.scope["route"]
    if route.name in FOREIGN:
        return
    known = parameters(route.dependant)
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        shown = name[:NAME_CHARS_MAX]
        if name not in known:
            like = get_close_matches(shown, known, n=1)
            meant = f"perhaps {like[0]} is meant; " if like else ""
            raise RefusedError(
                "request_invalid",
                f"query.{shown}: there is no such parameter here",
                consequence="nothing was done",
                next_step=f"{meant}there are: {', '.join(sorted(known)) or 'none'}",
            )
        if times > 1:
            raise RefusedError(
                "request_invalid",
                f"query.{shown}: was said {times} times",
                consequence="nothing was done",
                next_step="say it once",
            )


def parameters(dependant: Dependant) -> set[str]:
    """Return the names of all query parameters of an operation and of what it depends on."""
    return {field.alias for field in get_flat_params(dependant) if isinstance(field.field_info, params.Query)}
