"""Small real networks and data for tests: trained nowhere, but with weights that decide something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

CLASSES = 6
FEATURES = 48
HIDDEN = 96


def blobs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (count, 48) float32 points around six centres, and which centre each belongs to."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 1, (CLASSES, FEATURES))
    labels = rng.integers(0, CLASSES, count)
    return (centres[labels] + rng.normal(0, 0.7, (count, FEATURES))).astype(np.float32), labels


def classifier(
    path: Path, *, opset: int = 15, constants: bool = False, batch: int | str = "N", name: str = "x"
) -> Path:
    """Write a two-layer network that names the centre a point is nearest to.

    The first layer spreads the features over redundant hidden units, the second reads the distances off again by least
    squares, so that both layers have weights that pruning can move between.
    """
    rng = np.random.default_rng(7)
    first = (rng.normal(0, 1, (FEATURES, HIDDEN)) / np.sqrt(FEATURES)).astype(np.float32)
    points, labels = blobs(2000, seed=5)
    hidden = np.maximum(points @ first, 0)
    second, *_ = np.linalg.lstsq(hidden, np.eye(CLASSES)[labels] * 4, rcond=None)
    weights = {"first": first, "second": second.astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", [name, "first"], ["h"], name="layer/one"),
        helper.make_node("Relu", ["h"], ["r"], name="layer/relu"),
        helper.make_node("MatMul", ["r", "second"], ["z"], name="layer/two"),
        helper.make_node("Softmax", ["z"], ["p"], name="layer/out", axis=-1),
    ]
    initializers = []
    for key, value in weights.items():
        tensor = numpy_helper.from_array(value, key)
        if constants:
            nodes.insert(0, helper.make_node("Constant", [], [key], value=tensor))
        else:
            initializers.append(tensor)
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, FEATURES])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [batch, CLASSES])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def conv(path: Path, *, size: int | str = "H") -> Path:
    """Write a strided, padded convolution over images of free height and width, pooled to four numbers."""
    rng = np.random.default_rng(3)
    graph = helper.make_graph(
        [
            helper.make_node(
                "Conv", ["image", "w"], ["c"], name="conv", strides=[2, 1], pads=[1, 0, 1, 2], dilations=[1, 2]
            ),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["g"]),
            helper.make_node("Flatten", ["g"], ["y"]),
        ],
        "conv",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, size, size if size != "H" else "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(rng.normal(0, 1, (4, 3, 3, 3)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def hog(path: Path) -> Path:
    """Write a network that fills 40 GB with ones to add them up."""
    return _of_vectors(
        path,
        [
            helper.make_node(
                "ConstantOfShape", ["s"], ["big"], value=numpy_helper.from_array(np.ones(1, np.float32), "v")
            ),
            helper.make_node("ReduceSum", ["big"], ["r"], keepdims=0),
            helper.make_node("Mul", ["x", "r"], ["p"]),
        ],
        numpy_helper.from_array(np.array([10, 1000, 1000, 1000], np.int64), "s"),
    )


def endless(path: Path) -> Path:
    """Write a network with a loop that nothing ends."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["again"]), helper.make_node("Add", ["a", "a"], ["twice"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("twice", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["", "go", "x"], ["p"], body=body)
    return _of_vectors(path, [loop], numpy_helper.from_array(np.array(True), "go"))


def _of_vectors(path: Path, nodes: list[onnx.NodeProto], *weights: TensorProto) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", FEATURES]) for name in ("x", "p")]
    graph = helper.make_graph(nodes, "vectors", ends[:1], ends[1:], list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


RECIPE = """
format = 1
name = "blobs"
version = "1.0.0"

[licence]
expression = "MIT"
source = "tests"
attribution = "the tests"

[sources.onnx]
path = "model.onnx"

[data]
kind = "npz"
path = "data.npz"
calibration = 64
evaluation = 200

[gate]
drop_max = 0.05

[golden]
vectors = 8
candidates = 24

[measure]
rounds = 3
seconds = 0.2

[[variants]]
id = "float"
source = "onnx"
"""

INT8 = """
[[variants]]
id = "int8"
source = "onnx"
passes = [{ use = "quantize-static" }]
"""

PRUNED = """
[[variants]]
id = "pruned-int8"
source = "onnx"
passes = [{ use = "prune-obs", sparsity = 0.5, minimum_elements = 500 }, { use = "quantize-static" }]
"""

RUINED = """
[[variants]]
id = "ruined"
source = "onnx"
passes = [{ use = "prune-obs", sparsity = 0.99, minimum_elements = 500, error_max = 10.0 }]
"""


def workshop(folder: Path, *variants: str, recipe: str = RECIPE) -> Path:
    """Write a model, data and a recipe; return the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    classifier(folder / "model.onnx")
    points, labels = blobs(320, seed=1)
    np.savez(folder / "data.npz", x=points, label=labels)
    path = folder / "recipe.toml"
    path.write_text(recipe + "".join(variants))
    return path


def dictionary(path: Path, *, oil: str = "Flüssigkeit") -> Path:
    """Write a model of text: a word gives its kind (text) and its number."""
    words = {"keys_strings": ["cat", "Öl"], "domain": "ai.onnx.ml"}
    kinds = helper.make_node(
        "LabelEncoder", ["word"], ["kind"], values_strings=["animal", oil], default_string="unknown", **words
    )
    numbers = helper.make_node("LabelEncoder", ["word"], ["number"], values_int64s=[3, 7], default_int64=-1, **words)
    graph = helper.make_graph(
        [kinds, numbers],
        "dictionary",
        [helper.make_tensor_value_info("word", TensorProto.STRING, ["N", 1])],
        [
            helper.make_tensor_value_info("kind", TensorProto.STRING, ["N", 1]),
            helper.make_tensor_value_info("number", TensorProto.INT64, ["N", 1]),
        ],
    )
    return _save_with_ml(graph, path)


def judge_of_points(path: Path, names: tuple[str, str] = ("near", "far")) -> Path:
    """Write what converters make of a classifier with names for classes: numbers in, the name (text) and the scores out."""
    classify = helper.make_node(
        "LinearClassifier",
        ["x"],
        ["label", "scores"],
        domain="ai.onnx.ml",
        coefficients=[1.0, 1.0, -1.0, -1.0],
        intercepts=[0.0, 0.0],
        classlabels_strings=list(names),
        post_transform="SOFTMAX",
    )
    graph = helper.make_graph(
        [classify],
        "judge",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [
            helper.make_tensor_value_info("label", TensorProto.STRING, ["N"]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 2]),
        ],
    )
    return _save_with_ml(graph, path)


def _save_with_ml(graph: onnx.GraphProto, path: Path) -> Path:
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", 2)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def scaling(path: Path, factor: float, shape: list[int | str], *, names: tuple[str, str] = ("x", "y")) -> Path:
    """Write y = factor · x as ONNX."""
    x, y = names
    graph = helper.make_graph(
        [helper.make_node("Mul", [x, "factor"], [y])],
        "scaling",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def scaling_tflite(path: Path, factor: float, shape: list[int], *, names: tuple[str, str] = ("x", "y")) -> Path:
    """Write y = factor · x as TFLite, with fixed shapes and without a signature."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(called: str, dims: list[int], buffer: int) -> object:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = called, dims, schema.TensorType.FLOAT32, buffer
        return made

    constant = schema.BufferT()
    constant.data = np.frombuffer(np.array(factor, np.float32).tobytes(), np.uint8)
    code, operator, graph, model = schema.OperatorCodeT(), schema.OperatorT(), schema.SubGraphT(), schema.ModelT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.MUL
    code.version = 1
    operator.inputs, operator.outputs = [0, 1], [2]
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.MulOptions, schema.MulOptionsT()
    graph.tensors = [tensor(names[0], shape, 0), tensor("factor", [], 1), tensor(names[1], shape, 0)]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [operator]
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [schema.BufferT(), constant]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def channels_last(path: Path, *, batch: int | str = "N") -> Path:
    """Write a network over images of (8, 8, 3), channels last, that tells which third of an image is bright.

    Convolutions are turned there and back, as converters from TensorFlow write them; the last layer is fitted.
    """
    rng = np.random.default_rng(11)
    weights = {
        "first": (rng.normal(0, 1, (24, 3, 3, 3)) / 5).astype(np.float32),
        "bias": rng.normal(0, 0.1, 24).astype(np.float32),
        "second": (rng.normal(0, 1, (24, 24, 3, 3)) / 15).astype(np.float32),
    }
    there, back = [0, 3, 1, 2], [0, 2, 3, 1]
    nodes = [
        helper.make_node("Transpose", ["image"], ["t0"], perm=there),
        helper.make_node("Conv", ["t0", "first"], ["c0"], name="conv/one", pads=[1] * 4),
        helper.make_node("Transpose", ["c0"], ["l0"], perm=back),
        helper.make_node("Add", ["l0", "bias"], ["a0"]),
        helper.make_node("Relu", ["a0"], ["r0"]),
        helper.make_node("Transpose", ["r0"], ["t1"], perm=there),
        helper.make_node("Conv", ["t1", "second"], ["c1"], name="conv/two", pads=[1] * 4, strides=[1, 2]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Transpose", ["r1"], ["l1"], perm=back),
        helper.make_node("ReduceMean", ["l1"], ["flat"], axes=[1], keepdims=0),
        helper.make_node("Reshape", ["flat", "shape"], ["features"]),
        helper.make_node("MatMul", ["features", "head"], ["scores"], name="head"),
    ]
    weights["head"] = np.zeros((96, 3), np.float32)

    def write() -> None:
        stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        graph = helper.make_graph(
            nodes,
            "channels-last",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 8, 8, 3])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 3])],
            [*stored, numpy_helper.from_array(np.array([-1, 96], np.int64), "shape")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)

    write()
    model = onnx.load(path)
    model.graph.output.append(helper.make_empty_tensor_value_info("features"))
    images, labels = bright(400, seed=3)
    from onnxruntime import InferenceSession

    (features,) = InferenceSession(model.SerializeToString()).run(["features"], {"image": images})
    fitted, *_ = np.linalg.lstsq(features, np.eye(3)[labels] * 4, rcond=None)
    weights["head"] = fitted.astype(np.float32)
    write()
    return path


def bright(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (count, 8, 8, 3) float32 in [0, 1], and which third of the columns is bright in one of the colours."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.uniform(0, 0.5, (count, 8, 8, 3)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[:, label * 3 : label * 3 + 2, rng.integers(3)] += 0.5
    return images, labels


NATIVE = """
import os, pathlib, msgspec
from wherry_optimizer.passes import Result
class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    how: str = "crash"
def apply(path, parameters, work):
    if parameters.how == "crash":
        os.abort()
    if parameters.how == "memory":
        hoard = [bytearray(64 << 20) for _ in range(64)]
    if parameters.how == "hang":
        import time
        time.sleep(600)
    if parameters.how == "raise":
        raise KeyError("a tensor")
    if parameters.how == "exit":
        os._exit(0)
    if parameters.how == "last words":
        print("I know better", flush=True)
        os._exit(0)
    if parameters.how == "chatter":
        print("x" * 100_000)
        os.system("echo and what it starts, too")
    target = work.folder / "same.onnx"
    target.write_bytes(path.read_bytes())
    if parameters.how == "rename":
        import onnx
        model = onnx.load(path)
        model.graph.node[-1].output[0] = model.graph.output[0].name = "renamed"
        onnx.save(model, target)
    if parameters.how == "overflow":
        import numpy, onnx
        from onnx import numpy_helper
        model = onnx.load(path)
        weight = model.graph.initializer[0]
        value = numpy.full_like(numpy_helper.to_array(weight), numpy.inf)
        weight.CopyFrom(numpy_helper.from_array(value, weight.name))
        onnx.save(model, target)
    if parameters.how == "wreck":
        target.write_bytes(path.read_bytes()[:-100])
    return Result(target)
"""


def plug_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution with a pass of its own, as another project would."""
    (folder / "wherry_test_native.py").write_text(
        NATIVE
        + "from wherry_optimizer.passes import PassInfo\n"
        + "INFO = PassInfo('test-native', 'wherry_test_native', ('onnx',), '', False, 'a test')\n"
    )
    about = folder / "wherry_test_native-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wherry-test-native\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[wherry_optimizer.passes]\ntest-native = wherry_test_native:INFO\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
