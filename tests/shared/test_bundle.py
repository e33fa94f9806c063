"""The signed config: what is refused, what is compatible, which variant a device takes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_shared import bundle, facts
from wherry_shared.errors import RefusedError

DIGEST = "sha256:" + "ab" * 32


def variant(name: str, **changes: Any) -> bundle.Variant:
    values: dict[str, Any] = {
        "id": name,
        "digest": DIGEST,
        "bytes": 100,
        "format": "onnx",
        "precision": "fp32",
        "engines": [bundle.EngineRange(name="onnxruntime", minimum="1.20")],
        "golden": bundle.GoldenIndex(digest=DIGEST, bytes=10, vectors=4),
    }
    return bundle.Variant(**(values | changes))


INTERFACE = bundle.Interface(
    inputs=[bundle.TensorSpec(name="x", datatype="FP32", shape=["n", 16])],
    outputs=[bundle.TensorSpec(name="y", datatype="FP32", shape=["n", 4], labels=["a", "b", "c", "d"])],
    dims={"n": bundle.Bounds(minimum=1, maximum=8)},
)
CONFIG = bundle.Config(
    format=1,
    model="m",
    version="1.0.0",
    interface=INTERFACE,
    variants=[variant("float")],
    licence=bundle.Licence(expression="Apache-2.0", source="s", attribution="a"),
    provenance=bundle.Provenance(source_digests={"model.onnx": DIGEST}),
)


def test_a_config_comes_back_as_it_went_and_encodes_the_same_twice() -> None:
    data = bundle.encode_config(CONFIG)
    assert bundle.parse_config(data) == CONFIG
    assert bundle.encode_config(bundle.parse_config(data)) == data


def changed(path: str, value: Any) -> bytes:
    body = json.loads(bundle.encode_config(CONFIG))
    place: Any = body
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[int(last) if last.isdigit() else last] = value
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("format", 2, "config_format"),
        ("requires", ["encryption"], "config_requires"),
        ("model", "../m", "bad_name"),
        ("version", "1", "bad_version"),
        ("variants", [], "config_invalid"),
        ("variants.0.engines", [], "config_invalid"),
        ("variants.0.digest", "sha256:1", "bad_digest"),
        ("variants.0.bytes", 0, "config_invalid"),
        ("variants.0.tensors", {"z": "y"}, "config_invalid"),
        ("variants.0.golden.vectors", 65, "config_invalid"),
        ("variants.0.format", "pickle", "config_invalid"),
        ("interface.inputs.0.shape", ["k"], "config_invalid"),
        ("interface.inputs.0.shape", [-1], "config_invalid"),
        ("interface.inputs", [], "config_invalid"),
        ("interface.state", [{"output": "y", "input": "nowhere"}], "config_invalid"),
        ("licence.expression", " ", "licence_missing"),
        ("licence.expression", "Nonsense License", "licence_invalid"),
        ("licence.attribution", " ", "licence_missing"),
        (
            "assets",
            {"digest": DIGEST, "bytes": 1, "files": [{"path": "../x", "digest": DIGEST, "bytes": 1}]},
            "config_invalid",
        ),
    ],
)
def test_a_config_is_refused_for(path: str, value: Any, code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        bundle.parse_config(changed(path, value))
    assert caught.value.code == code


def test_an_unknown_optional_field_is_ignored() -> None:
    assert bundle.parse_config(changed("mood", "good")) == CONFIG


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    for parse in (bundle.parse_config, bundle.parse_manifest):
        with pytest.raises(RefusedError):
            parse(data)


def tensor(**changes: Any) -> bundle.TensorSpec:
    return bundle.TensorSpec(**({"name": "x", "datatype": "FP32", "shape": ["n", 16]} | changes))


def interface(**changes: Any) -> bundle.Interface:
    return msgspec.structs.replace(INTERFACE, **changes)


@pytest.mark.parametrize(
    ("offered", "fields"),
    [
        (INTERFACE, []),
        (interface(dims={"n": bundle.Bounds(minimum=1, maximum=16)}), []),
        (interface(dims={"n": bundle.Bounds(minimum=1)}), []),
        (interface(dims={"n": bundle.Bounds(minimum=1, maximum=4)}), ["inputs.x.shape[0]"]),
        (
            interface(
                outputs=[msgspec.structs.replace(INTERFACE.outputs[0], shape=["k", 4])],
                dims={**INTERFACE.dims, "k": bundle.Bounds(minimum=1, maximum=16)},
            ),
            ["outputs.y.shape[0]"],
        ),
        (interface(inputs=[tensor(shape=["n", "w"])], dims={**INTERFACE.dims, "w": bundle.Bounds(minimum=1)}), []),
        (interface(inputs=[tensor(shape=["n", 17])]), ["inputs.x.shape[1]"]),
        (interface(inputs=[tensor(datatype="FP16")]), ["inputs.x.datatype"]),
        (interface(inputs=[tensor(shape=["n", 16, 1])]), ["inputs.x.shape"]),
        (interface(inputs=[tensor(layout="NHWC")]), ["inputs.x.layout"]),
        (interface(inputs=[tensor(), tensor(name="z", optional=True)]), []),
        (interface(inputs=[tensor(), tensor(name="z")]), ["inputs.z"]),
        (interface(inputs=[tensor(name="z")]), ["inputs.x", "inputs.z"]),
        (interface(outputs=[*INTERFACE.outputs, tensor(name="extra")]), []),
        (interface(outputs=[tensor(name="extra")]), ["outputs.y"]),
        (
            interface(outputs=[msgspec.structs.replace(INTERFACE.outputs[0], labels=["a", "b", "d", "c"])]),
            ["outputs.y.labels"],
        ),
        (interface(outputs=[msgspec.structs.replace(INTERFACE.outputs[0], finite=False)]), ["outputs.y.finite"]),
    ],
    ids=[
        "the same",
        "larger batches than before",
        "batches of any length",
        "smaller batches than the application sends",
        "more rows out than the application expects",
        "an input axis became dynamic",
        "an input axis changed its length",
        "an input changed its datatype",
        "an input gained an axis",
        "an input gained a layout",
        "a new optional input",
        "a new required input",
        "an input was renamed",
        "a new output",
        "an output is gone",
        "labels changed their order",
        "an output may now be NaN",
    ],
)
def test_compatibility_names_the_field(offered: bundle.Interface, fields: list[str]) -> None:
    found = bundle.incompatibilities(INTERFACE, offered)
    assert [sentence.split(":")[0].removesuffix(".optional") for sentence in found] == fields


def shapes(inputs: dict[str, list[int | str]], output: list[int | str]) -> bundle.Interface:
    """An interface whose dynamic axes may have any length."""
    axes = {axis for shape in (*inputs.values(), output) for axis in shape if isinstance(axis, str)}
    return bundle.Interface(
        inputs=[tensor(name=name, shape=shape) for name, shape in inputs.items()],
        outputs=[tensor(name="y", shape=output)],
        dims={axis: bundle.Bounds(minimum=1) for axis in axes} | {"k": bundle.Bounds(minimum=1, maximum=4)},
    )


@pytest.mark.parametrize(
    ("was", "now", "broken"),
    [
        (shapes({"x": ["n", 3]}, ["n"]), shapes({"x": ["batch", 3]}, ["batch"]), []),
        (shapes({"x": ["k"]}, ["k"]), shapes({"x": ["n"]}, ["n"]), []),
        (shapes({"x": ["k"]}, ["k"]), shapes({"x": ["n"]}, ["m"]), ["outputs.y.shape[0]"]),
        (
            shapes({"x": ["k"], "z": ["n"]}, ["k"]),
            shapes({"x": ["n"], "z": ["m"]}, ["m"]),
            ["outputs.y.shape[0]"],
        ),
        (shapes({"x": ["n"], "z": ["n"]}, ["n"]), shapes({"x": ["a"], "z": ["b"]}, ["b"]), []),
        (shapes({"x": ["a"], "z": ["b"]}, ["b"]), shapes({"x": ["n"], "z": ["n"]}, ["n"]), ["inputs.z.shape[0]"]),
        (shapes({"x": [4], "z": [4]}, [4]), shapes({"x": ["n"], "z": ["n"]}, [4]), []),
        (shapes({"x": [4], "z": [5]}, [4]), shapes({"x": ["n"], "z": ["n"]}, [4]), ["inputs.z.shape[0]"]),
    ],
    ids=[
        "another name for the same axis",
        "another name, and longer ones too",
        "an output no longer as long as what was given",
        "an output as long as another input",
        "inputs may differ now",
        "inputs have to be alike now",
        "inputs that were alike have to be",
        "inputs that were not alike have to be",
    ],
)
def test_names_of_axes_are_each_sides_own(was: bundle.Interface, now: bundle.Interface, broken: list[str]) -> None:
    assert [sentence.split(":")[0] for sentence in bundle.incompatibilities(was, now)] == broken


def test_another_preprocess_id_breaks_the_contract() -> None:
    found = bundle.incompatibilities(INTERFACE, INTERFACE, contract_preprocess="rgb-v1", offered_preprocess="bgr-v1")
    assert found == ["preprocess.id: was 'rgb-v1', now 'bgr-v1'"]


def declared(**changes: Any) -> bundle.Contract:
    """What an application says that it relies on: the same tensors, without layouts and labels."""
    plain = [
        msgspec.structs.replace(spec, labels=None, layout=None) for spec in (*INTERFACE.inputs, *INTERFACE.outputs)
    ]
    count = len(INTERFACE.inputs)
    return bundle.Contract(inputs=plain[:count], outputs=plain[count:], dims=INTERFACE.dims, **changes)


def test_what_a_declared_contract_does_not_name_may_be_anything() -> None:
    labelled = msgspec.structs.replace(
        INTERFACE, outputs=[msgspec.structs.replace(spec, labels=["a"], layout="NC") for spec in INTERFACE.outputs]
    )
    contract = declared()
    assert bundle.incompatibilities(contract, labelled, contract_preprocess=contract.preprocess, declared=True) == []
    assert bundle.incompatibilities(contract, labelled, contract_preprocess="", declared=False)
    stated = msgspec.structs.replace(
        contract, outputs=[msgspec.structs.replace(spec, labels=["b"]) for spec in contract.outputs]
    )
    found = bundle.incompatibilities(stated, labelled, contract_preprocess=None, declared=True)
    assert [sentence for sentence in found if ".labels: changed" in sentence]
    found = bundle.incompatibilities(
        contract, labelled, contract_preprocess="rgb", offered_preprocess="", declared=True
    )
    assert found == ["preprocess.id: was 'rgb', now ''"]


ORT = facts.EngineFacts(name="onnxruntime", version="1.32.0", formats=["onnx"])
LITERT = facts.EngineFacts(name="ai-edge-litert", version="2.3.0", formats=["tflite"])
DEVICE = facts.DeviceFacts(arch="x86_64", cpu_features=["avx2", "avx512_vnni"], memory_bytes=1000, engines=[ORT])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"needs": bundle.Needs(arch=["aarch64"])}, "aarch64"),
        ({"needs": bundle.Needs(cpu_features=["asimddp"])}, "asimddp"),
        ({"needs": bundle.Needs(memory_bytes=2000)}, "memory"),
        ({"engines": [bundle.EngineRange(name="onnxruntime", minimum="1.33")]}, "onnxruntime"),
        ({"engines": [bundle.EngineRange(name="onnxruntime", minimum="1.20", maximum="1.31")]}, "onnxruntime"),
        ({"format": "tflite", "engines": [bundle.EngineRange(name="ai-edge-litert", minimum="2")]}, "ai-edge-litert"),
    ],
)
def test_a_misfit_says_what_is_missing(changes: dict[str, Any], word: str) -> None:
    sentences = facts.misfits(variant("v", **changes), DEVICE)
    assert len(sentences) == 1
    assert word in sentences[0]


def test_a_maximum_without_a_patch_covers_its_patches() -> None:
    wanted = variant("v", engines=[bundle.EngineRange(name="onnxruntime", minimum="1.20", maximum="1.32")])
    assert facts.misfits(wanted, DEVICE) == []


def test_the_hardware_class_names_what_figures_depend_on() -> None:
    assert facts.hardware_class(DEVICE, ORT) == "x86_64+avx2+avx512_vnni/none/onnxruntime-1.32"


def test_the_fastest_measured_variant_comes_first_and_unmeasured_ones_last() -> None:
    here = facts.hardware_class(DEVICE, ORT)
    config = msgspec.structs.replace(
        CONFIG,
        variants=[
            variant("small", bytes=10),
            variant("float", figures={here: bundle.Figures(latency_p50_us=900)}),
            variant("int8", figures={here: bundle.Figures(latency_p50_us=300)}),
            variant("elsewhere", bytes=5, figures={"aarch64/none/onnxruntime-1.32": bundle.Figures(latency_p50_us=1)}),
            variant("tflite", format="tflite", engines=[bundle.EngineRange(name="ai-edge-litert", minimum="2")]),
        ],
    )
    assert [row.variant.id for row in facts.rank(config, DEVICE)] == ["int8", "float", "elsewhere", "small"]
    fleet = {"float": bundle.Figures(latency_p50_us=100)}
    ranked = facts.rank(config, DEVICE, fleet)
    assert [row.variant.id for row in ranked][:2] == ["float", "int8"]
    assert "fleet" in ranked[0].why
    both = msgspec.structs.replace(DEVICE, engines=[LITERT])
    assert [row.variant.id for row in facts.rank(config, both)] == ["tflite"]
