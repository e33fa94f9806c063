"""Lists in pages: `limit` says how long one is, and the answer's `Link` header (RFC 8288, rel="next") where the next begins.

A cursor says behind what the next page begins, so that nothing is missed or told twice while the list changes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

import msgspec
from fastapi import Depends, Query, Request, Response

from wherry_shared.errors import RefusedError

T = TypeVar("T")
CursorId = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A key that is a number."""
LIMIT_MAX = 1000
CURSOR_CHARS_MAX = 400


def check_text(value: str) -> None:
    """Refuse what a database cannot hold as text, and so cannot have.

    Raises:
        RefusedError: `request_invalid`.
    """
    if "\0" in value:
        raise RefusedError("request_invalid", "a NUL character is in no name", consequence="nothing was looked for")


class Page:
    """The page that a request asks for."""

    def __init__(
        self,
        request: Request,
        response: Response,
        cursor: Annotated[
            str, Query(max_length=CURSOR_CHARS_MAX, description="where the page begins: from the Link header before")
        ] = "",
        limit: Annotated[int, Query(ge=1, le=LIMIT_MAX, description="entries of a page")] = 200,
    ) -> None:
        self._request = request
        self._response = response
        self._cursor = cursor
        self.limit = limit

    def behind(self, kind: Any) -> Any | None:
        """Return the key behind which the page begins, None for the first page.

        Raises:
            RefusedError: `cursor_invalid`.
        """
        if not self._cursor:
            return None
        try:
            padded = self._cursor + "=" * (-len(self._cursor) % 4)
            found = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True), type=kind)
        except (binascii.Error, msgspec.DecodeError, ValueError) as error:
            raise RefusedError(
                "cursor_invalid", "this is no cursor of this list", next_step="begin again without a cursor"
            ) from error
        return found

    def end(self, key: Any) -> None:
        """Say in the answer that more follows behind `key`."""
        cursor = base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")
        kept = [(name, value) for name, value in self._request.query_params.multi_items() if name != "cursor"]
        self._response.headers["Link"] = (
            f'<{self._request.url.path}?{urlencode([*kept, ("cursor", cursor)])}>; rel="next"'
        )

    def full(self, rows: Sequence[T], key: Callable[[T], Any]) -> list[T]:
        """Cut what was read with one row more than `limit`."""
        if len(rows) > self.limit:
            self.end(key(rows[self.limit - 1]))
        return list(rows[: self.limit])

    def cut(self, rows: Sequence[T], key: Callable[[T], list[Any]]) -> list[T]:
        """Return the page of a whole short list, which is sorted by `key`."""
        behind = self.behind(list[Any])
        try:
            left = sorted((row for row in rows if behind is None or key(row) > behind), key=key)
        except TypeError as error:
            raise RefusedError("cursor_invalid", "this is no cursor of this list") from error
        return self.full(left, key)

    def listed(self, rows: Sequence[T], key: Callable[[T], list[Any]]) -> list[T]:
        """Return the page of a whole short list whose order `key` does not tell, and which nothing leaves."""
        behind = self.behind(list[Any])
        if behind is None:
            return self.full(rows, key)
        for position, row in enumerate(rows):
            if key(row) == behind:
                return self.full(rows[position + 1 :], key)
        raise RefusedError("cursor_invalid", "this is no cursor of this list", next_step="begin again without a cursor")


Paging = Annotated[Page, Depends(Page)]
