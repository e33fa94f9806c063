"""BF16, which numpy lacks: the upper half of a float32, carried as uint16.

Arrays of both kinds look alike, so what one holds is told by the interface's datatype, never by its dtype.
"""

from __future__ import annotations

import numpy as np

from wherry_shared.engines.session import Array

_EXPONENT = 0x7F80
"""Where all of these bits are set there is NaN or Inf."""

_NAN = 0x7FC0


def widen(array: Array) -> Array:
    """Return BF16 as float32, exactly."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrow(array: Array) -> Array:
    """Return float32 as BF16, rounded to the nearest, ties to even; what is beyond its range becomes Inf."""
    bits = np.ascontiguousarray(array, np.float32).reshape(array.shape).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), _NAN, rounded).astype(np.uint16)


def finite(array: Array) -> bool:
    """Tell whether a BF16 array holds neither NaN nor Inf."""
    return not bool(((array & _EXPONENT) == _EXPONENT).any())
