"""Bodies in gzip and deflate (RFC 9110 §8.4.1), bounded before they are believed.

On one machine a compressed answer is slower than a plain one, so it is given only to a client that names one coding and
nothing else; a list such as `gzip, deflate, br` is what libraries send by themselves, and plain serves it.
"""

from __future__ import annotations

import zlib

from wherry_agent.serving.http import BadRequest

_LEVEL = 1
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""Coding → window bits of zlib; `deflate` is the zlib format."""


def decompress(coding: str, body: bytes | bytearray | memoryview, bytes_max: int) -> bytes:
    """Return the plain body.

    Raises:
        BadRequest: 400, 413 or 415.
    """
    window = _WINDOWS.get(coding)
    if window is None:
        raise BadRequest(415, f"content encoding {coding[:40]!r} is not supported: send identity, gzip or deflate")
    machine = zlib.decompressobj(window)
    try:
        plain = machine.decompress(body, bytes_max + 1)
    except zlib.error as error:
        raise BadRequest(400, f"the body is not {coding}: {error}") from error
    if len(plain) > bytes_max:
        raise BadRequest(413, f"the body has more than {bytes_max} bytes when it is decompressed")
    if not machine.eof or machine.unused_data:
        raise BadRequest(400, f"the body is not one whole {coding} stream")
    return plain


def asked_coding(accept: str) -> str:
    """Return the coding that an Accept-Encoding header asks for; empty for plain."""
    name, _, quality = accept.strip().lower().partition(";")
    refused = quality.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return name.strip() if name.strip() in _WINDOWS and not refused else ""


def compress(coding: str, parts: list[bytes | memoryview]) -> bytes:
    """Return the parts, one after another, in a coding."""
    machine = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOWS[coding])
    return b"".join([*(machine.compress(part) for part in parts), machine.flush()])
