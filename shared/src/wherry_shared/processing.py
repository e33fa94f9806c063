"""Declared pre- and post-processing, run: from what an application has to an interface's inputs, and from outputs to choices.

NumPy only, and the same bytes everywhere: weighted sums are taken in FP64, tap after tap, never by a library that may
order them anew. What each operation means is in `docs/formats/processing.md`; which there are in `operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from wherry_shared import operations as known
from wherry_shared.bundle import Interface, Processing
from wherry_shared.engines.errors import BadInput
from wherry_shared.engines.session import DTYPES, Array

Raw: TypeAlias = Array | Mapping[str, Array]
"""One array where the interface has one input besides state, else arrays by input name."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An entry of an output's last axis that was chosen; `label` is empty where the interface has none."""

    label: str
    index: int
    score: float


Choices: TypeAlias = list[list[Choice]]
"""Per row (all axes but the last, flattened), the best first."""


class Chain:
    """The processing of one bundle, checked once and run often; it has no state."""

    def __init__(self, interface: Interface, preprocess: Processing, postprocess: Processing) -> None:
        """Check both chains.

        Raises:
            RefusedError: `operation_unknown` or `operation_invalid`.
        """
        self.interface = interface
        self._inputs = {spec.name for spec in interface.inputs}
        plain = self._inputs - known.state_of(interface, "preprocess")
        self._only = next(iter(plain)) if len(plain) == 1 else ""
        self._labels = {spec.name: spec.labels or [] for spec in interface.outputs}
        self._pre = known.steps_of(preprocess, interface, "preprocess")
        self._post = known.steps_of(postprocess, interface, "postprocess")

    def begins_like(self, other: Chain) -> bool:
        """Tell whether the same raw input becomes the same inputs under another chain."""
        return self is other or self._pre == other._pre

    def before(self, raw: Raw) -> dict[str, Array]:
        """Return the inputs that `raw` stands for.

        Raises:
            BadInput: an operation cannot work on it.
        """
        values = self._named(raw)
        for step in self._pre:
            if step.tensor in values:  # an optional input may be left out
                values[step.tensor] = _RUN[step.op, step.version](values[step.tensor], step.parameters)
        return values

    def after(self, outputs: Mapping[str, Array]) -> dict[str, Any]:
        """Return the outputs with their chain applied: arrays, or choices where an operation chooses."""
        values: dict[str, Any] = dict(outputs)
        for step in self._post:
            if step.tensor not in values:
                continue
            value, parameters = values[step.tensor], step.parameters
            choose = _CHOOSE.get((step.op, step.version))
            if choose is not None:
                values[step.tensor] = choose(value, parameters, self._labels[step.tensor])
            else:
                values[step.tensor] = _RUN[step.op, step.version](value, parameters)
        return values

    def _named(self, raw: Raw) -> dict[str, Array]:
        if isinstance(raw, Mapping):
            values = dict(raw)
        elif self._only:
            values = {self._only: raw}
        else:
            raise BadInput(f"the model has several inputs: give a mapping of {', '.join(sorted(self._inputs))}")
        for name, value in values.items():
            if not isinstance(value, np.ndarray):
                raise BadInput(f"input {name!r} is {type(value).__name__}, expected a numpy array")
        return values


# --- images: (…, H, W, C) ------------------------------------------------------------------------


def _image(value: Array, what: str) -> Array:
    if value.ndim == 2:
        value = value[:, :, np.newaxis]
    if value.ndim < 3 or value.dtype.kind not in "iuf" or 0 in value.shape:
        raise BadInput(f"{what} works on images (…, H, W, C) of numbers, not on {value.dtype} {list(value.shape)}")
    return value


def _resize(value: Array, p: known.Resize) -> Array:
    value = _image(value, "resize")
    height, width = value.shape[-3:-1]
    to_height, to_width = target_size(height, width, p)
    if p.method == "nearest":
        rows, columns = _nearest(height, to_height), _nearest(width, to_width)
        return np.ascontiguousarray(value.take(rows, axis=-3).take(columns, axis=-2))
    if p.method == "area":
        taps = (_area(height, to_height), _area(width, to_width))
    else:
        wide = bool(p.antialias)
        taps = (_triangle(height, to_height, wide=wide), _triangle(width, to_width, wide=wide))
    result = value.astype(np.float64)
    for axis, (indices, weights) in zip((-3, -2), taps, strict=True):
        result = _weighted(result, indices, weights, axis)
    return _as(result, value.dtype)


def target_size(height: int, width: int, p: known.Resize) -> tuple[int, int]:
    """Return (height, width) of a resized image; sides that follow from the ratio are rounded half up, at least 1."""
    if p.fit == "stretch":
        return p.height, p.width
    # compare p.height / height with p.width / width without dividing
    by_height = (p.height * width >= p.width * height) == (p.fit == "cover")
    if by_height:
        return p.height, max(1, (2 * width * p.height + height) // (2 * height))
    return max(1, (2 * height * p.width + width) // (2 * width)), p.width


def _nearest(length: int, to: int) -> Array:
    """⌊(i + ½) · length / to⌋, in integers."""
    return (2 * np.arange(to, dtype=np.int64) + 1) * length // (2 * to)


def _triangle(length: int, to: int, *, wide: bool) -> tuple[Array, Array]:
    """Indices and weights (taps, to) of linear interpolation around (i + ½) · length / to − ½.

    `wide`: the triangle is as wide as the scale when the image shrinks; its weights are those inside the image, over
    their sum.
    """
    scale = length / to
    centre = (np.arange(to, dtype=np.float64) + 0.5) * scale - 0.5
    support = max(scale, 1.0) if wide else 1.0
    if support == 1.0:
        low = np.floor(centre)
        share = centre - low
        indices = np.stack([low, low + 1]).astype(np.int64).clip(0, length - 1)
        return indices, np.stack([1.0 - share, share])
    first = np.ceil(centre - support).astype(np.int64)
    count = int(np.floor(2 * support)) + 1
    indices = first + np.arange(count, dtype=np.int64)[:, np.newaxis]
    weights = np.maximum(0.0, 1.0 - np.abs(indices - centre) / support)
    weights[(indices < 0) | (indices >= length)] = 0.0
    return indices.clip(0, length - 1), weights / _summed(weights)


def _area(length: int, to: int) -> tuple[Array, Array]:
    """Indices and weights (taps, to): by how much each pixel lies under the output pixel, over its size."""
    scale = length / to
    start = np.arange(to, dtype=np.float64) * scale
    end = start + scale
    first = np.floor(start).astype(np.int64)
    count = int(np.ceil(scale)) + 1
    indices = first + np.arange(count, dtype=np.int64)[:, np.newaxis]
    weights = np.maximum(0.0, np.minimum(indices + 1, end) - np.maximum(indices, start))
    weights[indices >= length] = 0.0
    return indices.clip(0, length - 1), weights / _summed(weights)


def _summed(weights: Array) -> Array:
    total = np.zeros(weights.shape[1])
    for row in weights:
        total = total + row
    return total


def _weighted(value: Array, indices: Array, weights: Array, axis: int) -> Array:
    """Sum taps along an axis one after the other, so that the order of additions is the same everywhere."""
    shape = [1] * value.ndim
    shape[axis] = indices.shape[1]
    result: Array = np.zeros([*value.shape[:axis], indices.shape[1], *value.shape[value.ndim + axis + 1 :]])
    for index, weight in zip(indices, weights, strict=True):
        if weight.any():
            result += value.take(index, axis=axis) * weight.reshape(shape)
    return result


def _center_crop(value: Array, p: known.CenterCrop) -> Array:
    value = _image(value, "center_crop")
    height, width = value.shape[-3:-1]
    if height < p.height or width < p.width:
        raise BadInput(f"center_crop to {p.height} × {p.width}: the image has {height} × {width}")
    top, left = (height - p.height) // 2, (width - p.width) // 2
    return np.ascontiguousarray(value[..., top : top + p.height, left : left + p.width, :])


def _pad(value: Array, p: known.Pad) -> Array:
    value = _image(value, "pad")
    height, width = value.shape[-3:-1]
    if height > p.height or width > p.width:
        raise BadInput(f"pad to {p.height} × {p.width}: the image has {height} × {width}")
    top, left = (0, 0) if p.position == "top_left" else ((p.height - height) // 2, (p.width - width) // 2)
    result = np.empty([*value.shape[:-3], p.height, p.width, value.shape[-1]], value.dtype)
    result[...] = _as(np.float64(p.value), value.dtype)
    result[..., top : top + height, left : left + width, :] = value
    return result


_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114
_SHARES_16 = (19595, 38470, 7471)
"""The same in 65536ths, for integers."""


def _channels(value: Array, p: known.Channels) -> Array:
    value = _image(value, "channels")
    count = 1 if p.from_ == "grey" else len(p.from_)
    if value.shape[-1] != count:
        raise BadInput(f"channels from {p.from_}: the image has {value.shape[-1]} channels")
    if p.from_ == "grey":
        return np.repeat(value, 3, axis=-1)
    rgb = value[..., :3] if p.from_.startswith("rgb") else value[..., 2::-1]
    if p.to == "rgb":
        return np.ascontiguousarray(rgb)
    if p.to == "bgr":
        return np.ascontiguousarray(rgb[..., ::-1])
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    if value.dtype.kind == "f":
        grey = _as(
            _RED * red.astype(np.float64) + _GREEN * green.astype(np.float64) + _BLUE * blue.astype(np.float64),
            value.dtype,
        )
    else:
        shares = [share * colour.astype(np.int64) for share, colour in zip(_SHARES_16, (red, green, blue), strict=True)]
        grey = ((shares[0] + shares[1] + shares[2] + 0x8000) >> 16).astype(value.dtype)
    return grey[..., np.newaxis]


# --- numbers -------------------------------------------------------------------------------------


def _normalise(value: Array, p: known.Normalise) -> Array:
    if value.dtype.kind not in "iufb" or value.ndim == 0:
        raise BadInput(f"normalise works on numbers, not on {value.dtype} {list(value.shape)}")
    for name, entries in (("mean", p.mean), ("std", p.std)):
        if len(entries) not in (1, value.shape[-1]):
            raise BadInput(f"normalise: {name} has {len(entries)} entries, the last axis {value.shape[-1]}")
    scaled = value.astype(np.float32) * np.float32(p.scale)
    return (scaled - np.asarray(p.mean, np.float32)) / np.asarray(p.std, np.float32)


def _layout(value: Array, p: known.Layout) -> Array:
    if value.ndim != len(p.from_):
        raise BadInput(f"layout from {p.from_}: the array has {value.ndim} axes")
    axes: str = p.from_
    if "N" in axes and "N" not in p.to:
        if value.shape[0] != 1:
            raise BadInput(f"layout from {p.from_} to {p.to}: there are {value.shape[0]} of them, not 1")
        value, axes = value[0], axes[1:]
    if "N" in p.to and "N" not in axes:
        value, axes = value[np.newaxis], "N" + axes
    return np.ascontiguousarray(value.transpose([axes.index(axis) for axis in p.to]))


def _cast(value: Array, p: known.Cast) -> Array:
    if value.dtype.kind not in "iufb":
        raise BadInput(f"cast works on numbers, not on {value.dtype}")
    return _as(value, DTYPES[p.to])


def _as(value: Array | np.float64, dtype: np.dtype[Any]) -> Array:
    """Convert: to integers by rounding half up within the range, NaN to 0; to bool by ≠ 0; else as IEEE rounds."""
    array = np.asarray(value)
    if dtype.kind in "iu" and array.dtype.kind == "f":
        limits = np.iinfo(dtype)
        rounded = np.floor(np.nan_to_num(array.astype(np.float64), nan=0.0) + 0.5)
        high = np.nextafter(np.float64(limits.max), 0) if limits.bits == 64 else np.float64(limits.max)
        clipped: Array = rounded.clip(np.float64(limits.min), high)
        return clipped.astype(dtype)
    if dtype.kind in "iu" and array.dtype.kind in "iu":
        limits = np.iinfo(dtype)
        have = np.iinfo(array.dtype)
        return array.clip(max(limits.min, have.min), min(limits.max, have.max)).astype(dtype)
    return array.astype(dtype)


# --- outputs -------------------------------------------------------------------------------------


def _softmax(value: Array, _p: known.Softmax) -> Array:
    exact = value.astype(np.float64)
    powers = np.exp(exact - exact.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares.astype(np.float32)


def _sigmoid(value: Array, _p: known.Sigmoid) -> Array:
    exact = value.astype(np.float64)
    power = np.exp(-np.abs(exact))  # never above 1: no overflow on either side
    return np.where(exact >= 0, 1.0 / (1.0 + power), power / (1.0 + power)).astype(np.float32)


def _rows(value: Array) -> Array:
    return value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)


def _choice(row: Array, index: int, labels: Sequence[str]) -> Choice:
    return Choice(labels[index] if index < len(labels) else "", index, float(row[index]))


def _best_first(row: Array) -> list[int]:
    """Indices, largest entry first; of equal ones the lower index first; NaN last."""
    order = np.argsort(-row.astype(np.float64), kind="stable")
    return [int(index) for index in order]


def _top_k(value: Array, p: known.TopK, labels: Sequence[str]) -> Choices:
    return [[_choice(row, index, labels) for index in _best_first(row)[: p.k]] for row in _rows(value)]


def _threshold(value: Array, p: known.Threshold, labels: Sequence[str]) -> Choices:
    rows = _rows(value)
    at = np.asarray(p.at, np.float64)
    if at.ndim and at.size not in (1, rows.shape[-1]):
        raise BadInput(f"threshold has {at.size} bounds, the last axis {rows.shape[-1]} entries")
    bounds = np.broadcast_to(at, rows.shape[-1:])
    return [
        [_choice(row, index, labels) for index in _best_first(row) if float(row[index]) >= bounds[index]]
        for row in rows
    ]


def _argmax(value: Array, _p: known.Argmax, labels: Sequence[str]) -> Choices:
    return [[_choice(row, _best_first(row)[0], labels)] for row in _rows(value)]


_RUN: dict[tuple[str, int], Callable[[Array, Any], Array]] = {
    ("resize", 1): _resize,
    ("center_crop", 1): _center_crop,
    ("pad", 1): _pad,
    ("channels", 1): _channels,
    ("normalise", 1): _normalise,
    ("layout", 1): _layout,
    ("cast", 1): _cast,
    ("softmax", 1): _softmax,
    ("sigmoid", 1): _sigmoid,
}
_CHOOSE: dict[tuple[str, int], Callable[[Array, Any, Sequence[str]], Choices]] = {
    ("top_k", 1): _top_k,
    ("threshold", 1): _threshold,
    ("argmax", 1): _argmax,
}
