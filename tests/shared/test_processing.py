"""Declared processing: every operation against numbers that others computed, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from wherry_shared import operations, processing
from wherry_shared.bundle import Interface, Operation, Processing, TensorSpec
from wherry_shared.engines.errors import BadInput
from wherry_shared.errors import RefusedError
from wherry_shared.processing import Chain, Choice

ONE = Interface(
    inputs=[TensorSpec(name="image", datatype="FP32", shape=[1, 3, 4, 4])],
    outputs=[TensorSpec(name="scores", datatype="FP32", shape=[1, 3], labels=["cat", "dog", "owl"])],
)
TWO = Interface(inputs=[*ONE.inputs, TensorSpec(name="size", datatype="FP32", shape=[2])], outputs=ONE.outputs)
IMAGE = np.array(
    [[[(i * 37 + j * 91 + c * 53 + (i * j * 17) % 29) % 256 for c in range(3)] for j in range(7)] for i in range(5)],
    np.uint8,
)


def chain(*rows: dict[str, Any], stage: str = "preprocess", interface: Interface = ONE) -> Chain:
    made = Processing(
        operations=[
            Operation(
                op=row["op"],
                version=row.get("version", 1),
                parameters={k: v for k, v in row.items() if k not in ("op", "version")},
            )
            for row in rows
        ]
    )
    empty = Processing()
    return Chain(interface, made, empty) if stage == "preprocess" else Chain(interface, empty, made)


def before(value: np.ndarray, *rows: dict[str, Any]) -> np.ndarray:
    return chain(*rows).before(value)["image"]


def after(value: Any, *rows: dict[str, Any]) -> Any:
    return chain(*rows, stage="postprocess").after({"scores": np.asarray(value, np.float32)})["scores"]


# --- images --------------------------------------------------------------------------------------

PILLOW_NEAREST = [0, 53, 106, 182, 235, 32, 108, 161, 214, 34, 87, 140, 74, 127, 180, 10, 63, 116, 202, 255, 52, 109, 162, 215, 148, 201, 254, 94, 147, 200, 11, 64, 117, 184, 237, 34]  # fmt: skip
PILLOW_BILINEAR = [67, 115, 160, 139, 135, 111, 102, 155, 122, 85, 138, 124, 118, 143, 135, 100, 112, 137, 140, 163, 113, 88, 138, 152, 175, 118, 171, 130, 132, 144, 115, 111, 123, 138, 186, 105]  # fmt: skip
PILLOW_BILINEAR_MIXED = [37, 104, 145, 135, 67, 135, 112, 79, 78, 111, 181, 148, 80, 136, 144, 108, 102, 153]
PILLOW_GREY = [43, 134, 196, 60, 151, 213, 77, 80, 188, 88, 119, 169, 50, 129, 117, 184, 53, 149, 216, 85, 152, 154, 88, 95, 179, 84, 120, 175, 191, 113, 137, 180, 54, 155, 198]  # fmt: skip
"""What Pillow 12 makes of IMAGE: 3 × 4 nearest and bilinear, the first channel of 2 × 9 bilinear, and its grey."""


def test_nearest_and_grey_are_what_pillow_makes() -> None:
    assert (
        before(IMAGE, {"op": "resize", "height": 3, "width": 4, "method": "nearest"}).ravel().tolist() == PILLOW_NEAREST
    )
    assert before(IMAGE, {"op": "channels", "from": "rgb", "to": "grey"}).ravel().tolist() == PILLOW_GREY


def test_antialiased_bilinear_is_within_a_step_of_pillow() -> None:
    resize = {"op": "resize", "method": "bilinear", "antialias": True}
    small = before(IMAGE, {**resize, "height": 3, "width": 4})
    assert np.abs(small.ravel().astype(int) - PILLOW_BILINEAR).max() <= 1
    mixed = before(IMAGE, {**resize, "height": 2, "width": 9})[..., 0]
    assert np.abs(mixed.ravel().astype(int) - PILLOW_BILINEAR_MIXED).max() <= 1


def by_the_formula(value: np.ndarray, height: int, width: int, weight: Any) -> np.ndarray:
    """The definition of a resize, pixel by pixel: rows first, `weight(i, k, length, to)` over its sum."""

    def along(line: list[float], to: int) -> list[float]:
        result = []
        for i in range(to):
            weights = [weight(i, k, len(line), to) for k in range(len(line))]
            result.append(sum(w * x for w, x in zip(weights, line, strict=True)) / sum(weights))
        return result

    rows = np.array([along(list(column), height) for column in value.astype(float).T]).T
    return np.array([along(list(row), width) for row in rows])


def triangle(i: int, k: int, length: int, to: int) -> float:
    support = max(length / to, 1.0)
    return max(0.0, 1.0 - abs(k - ((i + 0.5) * length / to - 0.5)) / support)


def area(i: int, k: int, length: int, to: int) -> float:
    return max(0.0, min(k + 1, (i + 1) * length / to) - max(k, i * length / to))


@pytest.mark.parametrize("size", [(3, 4), (9, 10), (2, 9), (5, 7), (1, 1)])
@pytest.mark.parametrize(
    ("more", "weight"), [({"method": "bilinear", "antialias": True}, triangle), ({"method": "area"}, area)]
)
def test_resizing_floats_is_its_formula(size: tuple[int, int], more: dict[str, Any], weight: Any) -> None:
    value = IMAGE[..., :1].astype(np.float64)
    made = before(value, {"op": "resize", "height": size[0], "width": size[1], **more})
    assert made.dtype == np.float64
    assert np.allclose(made[..., 0], by_the_formula(value[..., 0], *size, weight), rtol=0, atol=1e-9)


def test_bilinear_without_antialias_takes_two_neighbours_and_repeats_the_edge() -> None:
    row = np.array([[[0.0], [10.0], [20.0], [40.0]]])
    made = before(row, {"op": "resize", "height": 1, "width": 8, "method": "bilinear", "antialias": False})
    assert made.ravel().tolist() == [0.0, 2.5, 7.5, 12.5, 17.5, 25.0, 35.0, 40.0]
    made = before(row, {"op": "resize", "height": 1, "width": 2, "method": "bilinear", "antialias": False})
    assert made.ravel().tolist() == [5.0, 30.0]


def test_area_of_whole_pixels_is_their_mean_and_integers_round_half_up() -> None:
    value = np.array([[[1], [2]], [[3], [4]]], np.uint8)
    assert before(value, {"op": "resize", "height": 1, "width": 1, "method": "area"}).ravel().tolist() == [3]
    assert before(value.astype(np.float32), {"op": "resize", "height": 1, "width": 1, "method": "area"}).item() == 2.5


@pytest.mark.parametrize(
    ("fit", "size"), [("stretch", (4, 4)), ("cover", (4, 6)), ("contain", (3, 4))], ids=["stretch", "cover", "contain"]
)
def test_a_resize_may_keep_the_ratio(fit: str, size: tuple[int, int]) -> None:
    made = before(IMAGE, {"op": "resize", "height": 4, "width": 4, "method": "nearest", "fit": fit})
    assert made.shape[:2] == size
    turned = before(
        IMAGE.transpose(1, 0, 2), {"op": "resize", "height": 4, "width": 4, "method": "nearest", "fit": fit}
    )
    assert turned.shape[:2] == size[::-1]


def test_batches_and_grey_images_are_images_too() -> None:
    resize = {"op": "resize", "height": 3, "width": 4, "method": "area"}
    one = before(IMAGE, resize)
    assert np.array_equal(before(np.stack([IMAGE, IMAGE]), resize), np.stack([one, one]))
    assert before(IMAGE[..., 0], resize).shape == (3, 4, 1)


def test_crop_and_pad_are_centred_with_the_odd_pixel_below_and_right() -> None:
    made = before(IMAGE, {"op": "center_crop", "height": 2, "width": 4})
    assert np.array_equal(made, IMAGE[1:3, 1:5])
    made = before(IMAGE, {"op": "pad", "height": 8, "width": 8, "value": 114})
    assert np.array_equal(made[1:6, 0:7], IMAGE)
    assert made[0].tolist() == [[114] * 3] * 8
    made = before(IMAGE, {"op": "pad", "height": 8, "width": 8, "position": "top_left"})
    assert np.array_equal(made[:5, :7], IMAGE)
    assert not made[5:].any()


@pytest.mark.parametrize(
    ("given", "to", "order"),
    [
        ("rgb", "bgr", [2, 1, 0]),
        ("bgr", "rgb", [2, 1, 0]),
        ("rgba", "rgb", [0, 1, 2]),
        ("bgra", "rgb", [2, 1, 0]),
        ("rgba", "bgr", [2, 1, 0]),
    ],
)
def test_channels_change_places(given: str, to: str, order: list[int]) -> None:
    image = np.concatenate([IMAGE, IMAGE[..., :1]], axis=-1) if given.endswith("a") else IMAGE
    assert np.array_equal(before(image, {"op": "channels", "from": given, "to": to}), IMAGE[..., order])


def test_grey_of_bgr_and_of_floats() -> None:
    grey = before(IMAGE, {"op": "channels", "from": "rgb", "to": "grey"})
    assert np.array_equal(before(IMAGE[..., ::-1], {"op": "channels", "from": "bgr", "to": "grey"}), grey)
    exact = before(IMAGE.astype(np.float32), {"op": "channels", "from": "rgb", "to": "grey"})
    assert np.abs(exact - grey).max() <= 0.6
    assert before(grey, {"op": "channels", "from": "grey", "to": "rgb"}).shape == IMAGE.shape


# --- numbers -------------------------------------------------------------------------------------


def test_normalise_works_in_single_precision_step_by_step() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    made = before(IMAGE, {"op": "normalise", "scale": 1 / 255, "mean": mean, "std": std})
    f = np.float32
    by_hand = [(f(f(IMAGE[2, 3, c]) * f(1 / 255)) - f(mean[c])) / f(std[c]) for c in range(3)]
    assert made.dtype == np.float32
    assert made[2, 3].tolist() == [float(value) for value in by_hand]


def test_layouts() -> None:
    assert np.array_equal(before(IMAGE, {"op": "layout", "from": "HWC", "to": "NCHW"}), IMAGE.transpose(2, 0, 1)[None])
    batch = np.stack([IMAGE, IMAGE])
    made = before(batch, {"op": "layout", "from": "NHWC", "to": "NCHW"})
    assert np.array_equal(made, batch.transpose(0, 3, 1, 2))
    assert made.flags.c_contiguous
    assert np.array_equal(before(made[:1], {"op": "layout", "from": "NCHW", "to": "HWC"}), IMAGE)


@pytest.mark.parametrize(
    ("given", "to", "expected"),
    [
        ([-1.0, 0.5, 1.5, 254.5, 300.0, np.nan], "UINT8", [0, 1, 2, 255, 255, 0]),
        ([-0.5, -0.6, 200.0], "INT8", [0, -1, 127]),
        ([1e30, -1e30], "INT64", [2**63 - 1024, -(2**63)]),
    ],
)
def test_casts_to_integers_round_half_up_and_stay_in_range(given: list[float], to: str, expected: list[int]) -> None:
    assert before(np.array(given), {"op": "cast", "to": to}).tolist() == expected
    assert before(np.array([300, -3]), {"op": "cast", "to": "UINT8"}).tolist() == [255, 0]


# --- outputs -------------------------------------------------------------------------------------


def test_softmax_and_sigmoid_stay_finite() -> None:
    assert after([[0.0, np.log(3.0), -1000.0]], {"op": "softmax"})[0] == pytest.approx([0.25, 0.75, 0.0])
    assert after([[1000.0, 999.0, 0.0]], {"op": "softmax"})[0] == pytest.approx([0.7310586, 0.2689414, 0.0])
    assert after([[0.0, 1000.0, -1000.0]], {"op": "sigmoid"})[0] == pytest.approx([0.5, 1.0, 0.0])


def test_choices_carry_labels_and_equal_ones_keep_their_order() -> None:
    rows = [[0.25, 0.5, 0.25], [0.5, 0.0, 0.5]]
    assert after(rows, {"op": "top_k", "k": 2}) == [
        [Choice("dog", 1, 0.5), Choice("cat", 0, 0.25)],
        [Choice("cat", 0, 0.5), Choice("owl", 2, 0.5)],
    ]
    assert len(after(rows, {"op": "top_k", "k": 100})[0]) == 3
    assert after(rows, {"op": "argmax"}) == [[Choice("dog", 1, 0.5)], [Choice("cat", 0, 0.5)]]
    assert after(rows, {"op": "threshold", "at": 0.5}) == [
        [Choice("dog", 1, 0.5)],
        [Choice("cat", 0, 0.5), Choice("owl", 2, 0.5)],
    ]
    assert after(rows, {"op": "threshold", "at": [0.2, 0.9, 0.3]}) == [
        [Choice("cat", 0, 0.25)],
        [Choice("cat", 0, 0.5), Choice("owl", 2, 0.5)],
    ]
    assert after([[np.nan, 1.0, 2.0]], {"op": "top_k", "k": 3})[0][2].index == 0, "NaN comes last"


def test_a_chain_runs_in_order_from_an_image_to_labels() -> None:
    made = chain(
        {"op": "channels", "from": "bgr", "to": "rgb"},
        {"op": "resize", "height": 4, "width": 4, "method": "area", "fit": "cover"},
        {"op": "center_crop", "height": 4, "width": 4},
        {"op": "normalise", "scale": 1 / 255},
        {"op": "layout", "from": "HWC", "to": "NCHW"},
    ).before(IMAGE)["image"]
    assert (made.shape, made.dtype) == ((1, 3, 4, 4), np.float32)
    assert after([[1.0, 3.0, 2.0]], {"op": "softmax"}, {"op": "top_k", "k": 1})[0][0].label == "dog"


def test_several_inputs_are_named() -> None:
    both = chain({"op": "cast", "tensor": "size", "to": "FP32"}, interface=TWO)
    made = both.before({"image": IMAGE, "size": np.array([1, 2])})
    assert made["image"] is IMAGE
    assert made["size"].dtype == np.float32
    with pytest.raises(BadInput, match="several inputs"):
        both.before(IMAGE)
    with pytest.raises(BadInput, match="expected a numpy array"):
        chain().before([1, 2, 3])


UNFIT = [
    (np.zeros((3, 3, 3)), {"op": "center_crop", "height": 4, "width": 1}, "the image has 3 × 3"),
    (np.zeros((3, 3, 3)), {"op": "pad", "height": 2, "width": 9}, "the image has 3 × 3"),
    (np.zeros((3, 3, 4)), {"op": "channels", "from": "rgb", "to": "bgr"}, "has 4 channels"),
    (np.zeros(3), {"op": "resize", "height": 2, "width": 2, "method": "area"}, "works on images"),
    (np.zeros((3, 3, 4)), {"op": "normalise", "mean": [1.0, 2.0, 3.0], "std": [1.0]}, "mean has 3 entries"),
    (np.zeros((3, 3)), {"op": "layout", "from": "HWC", "to": "CHW"}, "the array has 2 axes"),
    (np.zeros((2, 3, 3, 3)), {"op": "layout", "from": "NHWC", "to": "CHW"}, "there are 2 of them"),
    (np.array(["x"], object), {"op": "cast", "to": "FP32"}, "works on numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "row", "said"), UNFIT, ids=[row["op"] for _, row, _ in UNFIT])
def test_what_an_operation_cannot_work_on_is_the_callers_fault(
    value: np.ndarray, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        before(value, row)


# --- what is refused -----------------------------------------------------------------------------

REFUSED = [
    ("preprocess", {"op": "blur"}, "operation_unknown", "preprocess.operations[0] (blur): there is no such operation"),
    ("preprocess", {"op": "resize", "version": 2}, "operation_unknown", "version 2 is not known here, only 1"),
    ("preprocess", {"op": "top_k", "k": 1}, "operation_unknown", "is not an operation of preprocess"),
    ("postprocess", {"op": "resize"}, "operation_unknown", "is not an operation of postprocess"),
    ("preprocess", {"op": "resize", "height": 0, "width": 1, "method": "area"}, "operation_invalid", "$.height"),
    ("preprocess", {"op": "resize", "height": 1, "width": 1}, "operation_invalid", "`method`"),
    ("preprocess", {"op": "resize", "height": 1, "width": 1, "method": "cubic"}, "operation_invalid", "cubic"),
    ("preprocess", {"op": "resize", "height": 1, "width": 1, "method": "bilinear"}, "operation_invalid", "antialias"),
    ("preprocess", {"op": "resize", "height": 1, "width": 1, "method": "area", "antialias": True}, "operation_invalid", "antialias"),
    ("preprocess", {"op": "resize", "height": 1, "width": 1, "method": "area", "hieght": 2}, "operation_invalid", "`hieght`"),
    ("preprocess", {"op": "normalise", "std": [1.0, 0.0]}, "operation_invalid", "std: must not be 0"),
    ("preprocess", {"op": "normalise", "mean": [1.0, 1.0], "std": [1.0, 1.0, 1.0]}, "operation_invalid", "mean has 2 entries"),
    ("preprocess", {"op": "layout", "from": "HWC", "to": "HW"}, "operation_invalid", "HWC cannot become HW"),
    ("preprocess", {"op": "cast", "to": "BYTES"}, "operation_invalid", "BYTES"),
    ("preprocess", {"op": "channels", "from": "rgb", "to": "rgb"}, "operation_invalid", "is what it was"),
    ("preprocess", {"op": "cast", "to": "FP32", "tensor": "nope"}, "operation_invalid", "'nope' is not one of image"),
    ("postprocess", {"op": "top_k", "k": 0}, "operation_invalid", "$.k"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "row", "code", "said"), REFUSED, ids=[f"{r[1]['op']}-{i}" for i, r in enumerate(REFUSED)]
)
def test_an_operation_that_is_unknown_or_wrong_is_refused_by_its_name(
    stage: str, row: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        chain(row, stage=stage)
    assert caught.value.code == code
    assert said in caught.value.message
    assert f"({row['op']})" in caught.value.message


@pytest.mark.parametrize(("stage", "op"), [("preprocess", "normalise"), ("postprocess", "softmax")])
def test_no_operation_works_on_text(stage: operations.Stage, op: str) -> None:
    word = TensorSpec(name="word", datatype="BYTES", shape=["n"])
    number = TensorSpec(name="number", datatype="FP32", shape=["n"])
    texts = Interface(inputs=[word, number], outputs=[word, number])

    def steps(tensor: str) -> list[operations.Step]:
        made = Processing(operations=[Operation(op=op, parameters={"tensor": tensor})])
        return operations.steps_of(made, texts, stage)

    with pytest.raises(RefusedError, match="'word' is text"):
        steps("word")
    assert [step.tensor for step in steps("number")] == ["number"]


def test_nothing_follows_a_choice_and_a_chain_is_bounded() -> None:
    with pytest.raises(RefusedError, match="already turned into choices"):
        chain({"op": "argmax"}, {"op": "softmax"}, stage="postprocess")
    with pytest.raises(RefusedError, match="33 operations, at most 32"):
        chain(*[{"op": "cast", "to": "FP32"}] * 33)
    with pytest.raises(RefusedError, match="has to be named, there are image, size"):
        chain({"op": "cast", "to": "FP32"}, interface=TWO)


def test_every_known_operation_runs() -> None:
    runnable = {*processing._RUN, *processing._CHOOSE}
    assert runnable == set(operations.KNOWN)
    assert set(processing._CHOOSE) == {key for key, known in operations.KNOWN.items() if known.chooses}


def test_an_id_is_made_of_what_a_chain_does() -> None:
    def named(*rows: Operation, own: str = "") -> str:
        return operations.named(Processing(id=own, operations=list(rows)), "preprocess").id

    resize = {"height": 4, "width": 4, "method": "area"}
    plain = named(Operation(op="resize", parameters=resize))
    assert plain.startswith("sha256:")
    assert plain == named(Operation(op="resize", parameters={**resize, "fit": "stretch"})), "a default said is the same"
    assert plain != named(Operation(op="resize", parameters={**resize, "width": 5}))
    assert named(Operation(op="resize", parameters=resize), own="camera-v1") == "camera-v1"
    assert named() == ""


def test_checking_a_chain_needs_no_numpy() -> None:
    code = "import sys, wherry_shared.operations; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
