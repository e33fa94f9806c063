"""Decoding zstd with bounds: a window that a small device can hold, and never more bytes out than were announced.

The standard library's module where there is one (Python 3.14), its backport before: half a megabyte installed, where the
common binding takes twenty-three. Compressing is done on workstations and servers, which have that one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO

from wherry_shared import limits

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK_BYTES = 256 * limits.KIB


class ZstdInvalidError(Exception):
    """These bytes are no whole zstd frame that this device decodes."""


def pieces(source: BinaryIO) -> Iterator[bytes]:
    """Decode the one frame in `source`, piece by piece; what follows it is refused.

    Raises:
        ZstdInvalidError: also for a frame that ends too early or wants too large a window.
    """
    decoder = _decoder()
    try:
        while not decoder.eof:
            data = b""
            if decoder.needs_input:
                data = source.read(CHUNK_BYTES)
                if not data:
                    raise ZstdInvalidError("the frame is cut short")
            yield decoder.decompress(data, CHUNK_BYTES)
    except (zstd.ZstdError, MemoryError) as error:
        raise ZstdInvalidError(str(error)) from error
    if decoder.unused_data or source.read(1):
        raise ZstdInvalidError("something follows the frame")


def inflate(data: bytes, bytes_max: int) -> bytes | None:
    """Decode a frame, None if it holds more than `bytes_max`.

    Raises:
        ZstdInvalidError: as `pieces`.
    """
    decoder = _decoder()
    found = bytearray()
    try:
        while not decoder.eof:
            piece = decoder.decompress(data, bytes_max + 1 - len(found))
            data = b""
            found += piece
            if len(found) > bytes_max:
                return None
            if not piece and decoder.needs_input:
                raise ZstdInvalidError("the frame is cut short")
    except (zstd.ZstdError, MemoryError) as error:
        raise ZstdInvalidError(str(error)) from error
    if decoder.unused_data:
        raise ZstdInvalidError("something follows the frame")
    return bytes(found)


def _decoder() -> zstd.ZstdDecompressor:
    window = limits.ZSTD_WINDOW_BYTES_MAX.bit_length() - 1
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
