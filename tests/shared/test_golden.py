"""Golden vectors: what they hold survives the wire, and they notice what they must."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wherry_shared import golden, limits
from wherry_shared.errors import RefusedError
from wherry_shared.golden import Expected, Golden, Tolerance, Vector


def one(values: np.ndarray, tolerance: Tolerance, *, sample: golden.Sample | None = None) -> Golden:
    """A golden set with one vector and one output."""
    kept = values if sample is None else values.reshape(-1)[sample.indices(values.size)]
    vector = Vector({"x": np.arange(3, dtype=np.int32)}, {"y": Expected(kept, values.shape, sample)})
    return Golden((vector,), {"y": tolerance})


@given(
    hnp.arrays(st.sampled_from(sorted(golden.DTYPES.values(), key=str)), hnp.array_shapes(max_dims=4, min_side=0)),
    st.booleans(),
)
def test_every_tensor_survives_the_wire(array: np.ndarray, synthetic: bool) -> None:
    before = Golden(
        (Vector({"in": array}, {"out": Expected(array, array.shape)}),),
        {"out": Tolerance(0.5, 0.25, 0.125)},
        synthetic,
    )
    after = golden.decode(golden.encode(before))
    assert after.synthetic is synthetic
    assert after.tolerances == before.tolerances
    np.testing.assert_array_equal(after.vectors[0].inputs["in"], array)
    np.testing.assert_array_equal(after.vectors[0].expected["out"].values, array)
    assert after.vectors[0].expected["out"].values.dtype == array.dtype


@pytest.mark.parametrize("length", range(8))
def test_decoded_tensors_are_aligned_whatever_is_before_them(length: int) -> None:
    """Engines sum memory that is not in another order, and some machines cannot read it at all."""
    name = "x" * (length + 1)
    inputs = {name: np.arange(3, dtype=np.uint8), "wide": np.arange(4, dtype=np.float64)}
    made = Golden((Vector(inputs, {"y": Expected(np.ones(2, np.float32), (2,))}),), {"y": Tolerance(0.0, 0.0)})
    (vector,) = golden.decode(golden.encode(made)).vectors
    arrays = [*vector.inputs.values(), vector.expected["y"].values]
    assert all(array.__array_interface__["data"][0] % golden.ALIGNED_BYTES == 0 for array in arrays)
    assert not any(array.flags.writeable for array in arrays)
    np.testing.assert_array_equal(vector.inputs["wide"], np.arange(4))


def test_encoding_the_same_vectors_twice_gives_the_same_bytes() -> None:
    subject = one(np.linspace(0, 1, 7, dtype=np.float32), Tolerance(1e-4, 0))
    assert golden.encode(subject) == golden.encode(subject)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ([0.1, 0.9], None),
        ([0.1005, 0.9], None),
        ([0.102, 0.9], "value"),
        ([np.nan, 0.9], "value"),
        ([np.inf, 0.9], "value"),
        ([[0.1, 0.9]], "shape"),
    ],
)
def test_an_output_passes_within_its_tolerance_only(output: list[float], why: str | None) -> None:
    subject = one(np.array([0.1, 0.9], np.float32), Tolerance(1e-3, 0.0))
    misses = golden.check(subject, lambda _: {"y": np.array(output, np.float32)})
    assert [miss.why for miss in misses] == ([why] if why else [])


def test_relative_tolerance_grows_with_the_expected_value() -> None:
    subject = one(np.array([100.0, 1.0], np.float32), Tolerance(0.0, 0.01))
    assert golden.check(subject, lambda _: {"y": np.array([100.9, 1.0], np.float32)}) == []
    assert golden.check(subject, lambda _: {"y": np.array([100.0, 1.02], np.float32)})[0].why == "value"


def test_a_missing_output_and_a_foreign_dtype_are_misses() -> None:
    subject = one(np.zeros(2, np.float32), Tolerance(1.0, 1.0))
    assert [m.why for m in golden.check(subject, lambda _: {})] == ["missing"]
    assert [m.why for m in golden.check(subject, lambda _: {"y": np.zeros(2)})] == ["dtype"]


def test_the_leading_class_may_not_change_where_it_leads_clearly() -> None:
    clear = one(np.array([[0.40, 0.60]], np.float32), Tolerance(0.2, 0.0, argmax_margin=0.1))
    close = one(np.array([[0.49, 0.51]], np.float32), Tolerance(0.2, 0.0, argmax_margin=0.1))
    swapped = {"y": np.array([[0.51, 0.49]], np.float32)}
    assert [m.why for m in golden.check(clear, lambda _: swapped)] == ["argmax"]
    assert golden.check(close, lambda _: swapped) == []


def test_a_sampled_output_is_compared_at_its_sample() -> None:
    values = np.arange(1000, dtype=np.float32).reshape(10, 100)
    sample = golden.sample_of(values.size, 50, seed=3)
    subject = golden.decode(golden.encode(one(values, Tolerance(0.5, 0.0), sample=sample)))
    assert golden.check(subject, lambda _: {"y": values}) == []
    touched = values.copy().reshape(-1)
    touched[sample.indices(values.size)[17]] += 1
    assert golden.check(subject, lambda _: {"y": touched.reshape(values.shape)})[0].why == "value"


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(0, 1 << 32))
def test_a_sample_takes_no_index_twice(size: int, count: int, seed: int) -> None:
    indices = golden.sample_of(size, count, seed).indices(size)
    assert len(set(indices.tolist())) == min(size, count) == len(indices)
    assert indices.min() >= 0
    assert indices.max() < size


def test_decoding_stops_at_its_bound() -> None:
    bomb = zstandard.compress(golden.MAGIC + b"\0" * (1 << 22))
    with pytest.raises(RefusedError) as caught:
        golden.decode(bomb, decoded_bytes_max=1 << 20)
    assert caught.value.code == "golden_too_large"


@given(st.data())
def test_altered_bytes_are_refused_or_harmless_but_never_crash(data: st.DataObject) -> None:
    body = zstandard.decompress(golden.encode(one(np.ones((2, 3), np.float32), Tolerance(1e-4, 0.0))))
    start = data.draw(st.integers(0, len(body) - 1))
    altered = body[:start] + data.draw(st.binary(max_size=12)) + body[start + data.draw(st.integers(0, 12)) :]
    code = ""
    try:
        golden.decode(zstandard.compress(altered))
    except RefusedError as error:
        code = error.code
    assert code in ("", "golden_invalid")


@pytest.mark.parametrize("cut", [0, 4, 20, -3])
def test_a_cut_file_is_refused(cut: int) -> None:
    whole = golden.encode(one(np.ones((2, 3), np.float32), Tolerance(1e-4, 0.0)))
    with pytest.raises(RefusedError) as caught:
        golden.decode(whole[:cut])
    assert caught.value.code == "golden_invalid"


@given(hnp.arrays(np.object_, hnp.array_shapes(max_dims=3, min_side=0), elements=st.text(), fill=st.nothing()))
def test_text_survives_the_wire_and_is_compared_exactly(array: np.ndarray) -> None:
    before = Golden((Vector({"in": array}, {"out": Expected(array, array.shape)}),), {"out": Tolerance(0, 0)})
    after = golden.decode(golden.encode(before))
    np.testing.assert_array_equal(after.vectors[0].inputs["in"], array)
    assert golden.check(after, lambda _: {"out": array.copy()}) == []
    if array.size:
        other = array.copy()
        other.flat[-1] += "!"
        (miss,) = golden.check(after, lambda _: {"out": other})
        assert (miss.why, miss.difference) == ("text", 1)
        assert "1 of its elements" in str(miss)


def test_text_against_numbers_is_a_miss_and_a_sample_of_it_is_compared() -> None:
    words = np.array(["a", "b", "c", "d"], object)
    assert [m.why for m in golden.check(one(words, Tolerance(0, 0)), lambda _: {"y": np.zeros(4)})] == ["dtype"]
    sampled = golden.decode(golden.encode(one(words, Tolerance(0, 0), sample=golden.Sample(1, 3, 2))))  # b and a
    assert golden.check(sampled, lambda _: {"y": np.array(["a", "b", "x", "y"], object)}) == []
    assert [m.difference for m in golden.check(sampled, lambda _: {"y": np.array(["a", "x", "c", "d"], object)})] == [1]


@pytest.mark.parametrize("element", [b"bytes", 3, None, "\ud800"])
def test_what_is_not_text_is_refused_with_a_way_out(element: object) -> None:
    with pytest.raises(RefusedError) as caught:
        golden.encode(one(np.array([element], object), Tolerance(0, 0)))
    assert caught.value.code == "golden_datatype"
    assert "UINT8" in caught.value.next_step


@given(st.data())
def test_altered_text_is_refused_or_harmless_but_never_crashes(data: st.DataObject) -> None:
    body = zstandard.decompress(golden.encode(one(np.array(["one", "zwei", "três"], object), Tolerance(0, 0))))
    start = data.draw(st.integers(0, len(body) - 1))
    altered = body[:start] + data.draw(st.binary(max_size=12)) + body[start + data.draw(st.integers(0, 12)) :]
    code = ""
    try:
        golden.decode(zstandard.compress(altered))
    except RefusedError as error:
        code = error.code
    assert code in ("", "golden_invalid")


def test_no_more_text_is_decoded_than_a_device_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden.encode(one(np.array(["", "", ""], object), Tolerance(0, 0)))
    monkeypatch.setattr(limits, "GOLDEN_TEXTS_MAX", 2)
    with pytest.raises(RefusedError, match="more than 2 elements of text"):
        golden.decode(data)
