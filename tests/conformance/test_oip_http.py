"""tritonclient over HTTP, both of its clients, against a real worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from tests.agent import swap_kit
from tests.agent.serving_kit import WorkerProcess, until
from tests.conformance import oip_kit
from tests.conformance.oip_kit import KINDS
from wherry_agent.children import ServeModel


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder: Path = tmp_path_factory.mktemp("oip")
    with oip_kit.serving(folder) as process:
        yield process


@pytest.fixture
def client(served: WorkerProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{served.port}") as made:
        yield made


ONES = np.ones((1, 4), np.float32)


def given(values: np.ndarray, name: str = "x", datatype: str = "FP32", **how) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, **how)
    return made


def test_health_metadata_config_index_and_statistics(client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1.0.0")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "wherry"
    assert client.get_model_metadata("scale")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    config = client.get_model_config("scale", "1.0.0")
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (64, "TYPE_FP32")
    assert (config["input"][0]["dims"], config["input"][0]["format"]) == ([4], "FORMAT_NONE")
    single = client.get_model_config("half")
    assert (single["max_batch_size"], single["input"][0]["dims"]) == (0, [-1])
    index = client.get_model_repository_index()
    assert {"name": "scale", "version": "1.0.0", "state": "READY"} in index
    before = client.get_inference_statistics("scale")["model_stats"][0]["inference_stats"]["success"]["count"]
    client.infer("scale", [given(ONES)])
    after = client.get_inference_statistics("scale")["model_stats"][0]["inference_stats"]["success"]["count"]
    assert after == before + 1
    assert {row["name"] for row in client.get_inference_statistics()["model_stats"]} >= {"scale", "types"}


def test_what_a_device_does_not_do_is_refused_with_a_reason(client: triton.InferenceServerClient):
    for call in (
        lambda: client.load_model("scale"),
        lambda: client.unload_model("scale"),
        client.get_trace_settings,
        lambda: client.update_trace_settings("scale", {"trace_level": "OFF"}),
        client.get_log_settings,
        lambda: client.update_log_settings({"log_info": True}),
        client.get_cuda_shared_memory_status,
        lambda: client.get_model_metadata("other"),
        lambda: client.get_model_config("scale", "9.9.9"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert len(refused.value.message()) > 10
        assert int(refused.value.status()) < 500


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_every_datatype_passes_as_bytes_and_as_json(
    client: triton.InferenceServerClient, binary_in: bool, binary_out: bool
):
    inputs = [
        given(values, f"in_{name}", name, binary_data=binary_in or name == "FP16")
        for name, (_, values) in KINDS.items()
    ]
    outputs = [triton.InferRequestedOutput(f"out_{name}", binary_data=binary_out) for name in KINDS]
    answer = client.infer("types", inputs, outputs=outputs, request_id="7")
    assert answer.get_response()["id"] == "7"
    assert answer.get_response()["model_version"] == "1.0.0"
    for name, (_, values) in KINDS.items():
        found = answer.as_numpy(f"out_{name}")
        if name == "BYTES":
            found = np.array([text.decode() if isinstance(text, bytes) else text for text in found], np.object_)
        assert found.dtype == values.dtype, name
        assert np.array_equal(found, values), name


@pytest.mark.parametrize("binary_out", [True, False])
def test_bf16_passes(client: triton.InferenceServerClient, binary_out: bool):
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("same", "wide")]
    answer = client.infer("half", [given(oip_kit.HALF, "x", "BF16")], outputs=outputs)
    assert answer.get_output("same")["datatype"] == "BF16"
    assert np.array_equal(answer.as_numpy("same"), oip_kit.HALF)
    assert np.array_equal(answer.as_numpy("wide"), oip_kit.HALF.astype(np.float32))


def test_bf16_is_widened_for_a_model_that_takes_fp32(client: triton.InferenceServerClient):
    values = np.array([[0.5, 1.0, 3.140625, -2.0]], ml_dtypes.bfloat16)
    answer = client.infer("scale", [given(values, "x", "BF16")])
    assert np.array_equal(answer.as_numpy("y"), 2 * values.astype(np.float32))
    bits = np.array([1, 2, 3], ml_dtypes.bfloat16)
    inputs = [given(v, f"in_{n}", n) for n, (_, v) in KINDS.items() if n != "INT16"]
    with pytest.raises(InferenceServerException, match="is BF16, the model takes INT16"):
        client.infer("types", [*inputs, given(bits, "in_INT16", "BF16")])


def test_inputs_as_bytes_and_as_json_in_one_request(client: triton.InferenceServerClient):
    inputs = [
        given(values, f"in_{name}", name, binary_data=name == "FP16" or index % 2 == 0)
        for index, (name, (_, values)) in enumerate(KINDS.items())
    ]
    outputs = [
        triton.InferRequestedOutput("out_INT64", binary_data=True),
        triton.InferRequestedOutput("out_FP32", binary_data=False),
    ]
    answer = client.infer("types", inputs, outputs=outputs)
    assert [row["name"] for row in answer.get_response()["outputs"]] == ["out_INT64", "out_FP32"]
    for name in ("INT64", "FP32"):
        assert np.array_equal(answer.as_numpy(f"out_{name}"), KINDS[name][1])


@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
def test_compressed_requests_and_answers(client: triton.InferenceServerClient, request_coding, response_coding):
    values = np.arange(150_000, dtype=np.float32)[None]
    answer = client.infer(
        "image",
        [given(values)],
        request_compression_algorithm=request_coding,
        response_compression_algorithm=response_coding,
    )
    assert np.array_equal(answer.as_numpy("y"), 2 * values)


def test_parameters_query_headers_priority_and_timeout_change_nothing(client: triton.InferenceServerClient):
    answer = client.infer(
        "scale",
        [given(ONES)],
        query_params={"a": "1", "b": ["x", "y"]},
        headers={"X-Trace": "1"},
        priority=2,
        timeout=5_000_000,
        sequence_id=5,
        sequence_start=True,
        sequence_end=True,
        parameters={"mine": "1", "number": 4, "yes": True},
        model_version="1.0.0",
    )
    assert answer.as_numpy("y").tolist() == [[2.0] * 4]


def test_classification_names_the_largest_entries(client: triton.InferenceServerClient):
    values = np.array([[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.0, 0.5]], np.float32)
    outputs = [triton.InferRequestedOutput("y", class_count=2)]
    found = client.infer("label", [given(values)], outputs=outputs).as_numpy("y")
    assert found.shape == (2, 2)
    assert [text.decode() for text in found.ravel()] == [
        "0.800000:1:dog",
        "0.600000:3:fish",
        "1.800000:0:cat",
        "1.000000:3:fish",
    ]


def test_an_image_client_finds_what_it_looks_for(client: triton.InferenceServerClient):
    """The steps of clients that classify images: shape and layout from the configuration, labels from the answer."""
    config = client.get_model_config("picture")
    (entry,) = config["input"]
    assert (config["max_batch_size"], entry["format"], entry["dims"]) == (8, "FORMAT_NCHW", [3, 4, 4])
    assert client.get_model_metadata("picture")["inputs"][0]["shape"] == [-1, 3, 4, 4]
    images = np.zeros((2, 3, 4, 4), np.float32)
    images[0, 1] = 1.0
    images[1, 2] = 2.0
    outputs = [triton.InferRequestedOutput("y", class_count=1)]
    found = client.infer("picture", [given(images)], outputs=outputs).as_numpy("y")
    assert [row[0].decode().split(":")[2] for row in found] == ["dog", "bird"]


def test_many_requests_at_once(served: WorkerProcess):
    with triton.InferenceServerClient(f"127.0.0.1:{served.port}", concurrency=4) as client:
        started = [client.async_infer("scale", [given(ONES * n)]) for n in range(40)]
        for n, one in enumerate(started):
            assert one.get_result().as_numpy("y").tolist() == [[2.0 * n] * 4]


def test_bad_requests_carry_their_reason(client: triton.InferenceServerClient):
    for inputs, word in (
        ([given(np.ones((1, 5), np.float32))], "shape"),
        ([given(np.ones((1, 4), np.float64), "x", "FP64")], "dtype"),
        ([given(ONES, "z")], "no such input"),
        ([given(ONES), given(ONES)], "twice"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            client.infer("scale", inputs)
        assert (refused.value.status(), word in refused.value.message()) == ("400", True), refused.value


def test_the_asyncio_client(served: WorkerProcess):
    async def talk() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("scale")
            assert (await client.get_server_metadata())["name"] == "wherry"
            assert (await client.get_model_metadata("scale"))["versions"] == ["1.0.0"]
            assert (await client.get_model_config("scale"))["name"] == "scale"
            assert len(await client.get_model_repository_index()) == 6
            assert (await client.get_inference_statistics("scale"))["model_stats"]
            answers = await asyncio.gather(*[client.infer("scale", [given(ONES * n)]) for n in range(20)])
            assert [answer.as_numpy("y")[0, 0] for answer in answers] == [2.0 * n for n in range(20)]
            values = np.arange(150_000, dtype=np.float32)[None]
            answer = await client.infer(
                "image",
                [given(values)],
                request_compression_algorithm="deflate",
                response_compression_algorithm="gzip",
            )
            assert np.array_equal(answer.as_numpy("y"), 2 * values)
            with pytest.raises(InferenceServerException, match="offer"):
                await client.load_model("scale")

    asyncio.run(talk())


def test_shared_memory_in_and_out(client: triton.InferenceServerClient):
    values = np.arange(150_000, dtype=np.float32)[None]
    with oip_kit.region("wherry_in", values.nbytes) as source, oip_kit.region("wherry_out", values.nbytes) as target:
        shm.set_shared_memory_region(source, [values])
        client.register_system_shared_memory("in", "/wherry_in", values.nbytes)
        client.register_system_shared_memory("out", "/wherry_out", values.nbytes)
        assert [row["name"] for row in client.get_system_shared_memory_status()] == ["in", "out"]
        assert client.get_system_shared_memory_status("in")[0]["key"] == "/wherry_in"
        tensor = triton.InferInput("x", list(values.shape), "FP32")
        tensor.set_shared_memory("in", values.nbytes)
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("out", values.nbytes)
        answer = client.infer("image", [tensor], outputs=[output])
        row = answer.get_output("y")
        assert row["parameters"]["shared_memory_byte_size"] == values.nbytes
        found = shm.get_contents_as_numpy(target, np.float32, row["shape"])
        assert np.array_equal(found, 2 * values)
        del found
        plain = client.infer("image", [tensor])
        assert np.array_equal(plain.as_numpy("y"), 2 * values)
        output.set_shared_memory("out", 100)
        with pytest.raises(InferenceServerException, match="does not fit"):
            client.infer("image", [tensor], outputs=[output])
        os.truncate("/dev/shm/wherry_in", 1000)  # a client that does this to itself harms nobody else
        with pytest.raises(InferenceServerException, match="shorter"):
            client.infer("image", [tensor])
        client.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match="not registered"):
            client.infer("image", [tensor])
        client.unregister_system_shared_memory()
        assert client.get_system_shared_memory_status() == []
    for key in ("/../etc/passwd", "/none"):
        with pytest.raises(InferenceServerException):
            client.register_system_shared_memory("r", key, 1)
    with pytest.raises(InferenceServerException, match="CUDA"):
        client.register_cuda_shared_memory("c", b"handle", 0, 64)


def test_a_region_outlives_the_worker(tmp_path: Path):
    values = np.ones((1, 4), np.float32)
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_shared_memory("kept", values.nbytes)
    (model,) = swap_kit.versions(tmp_path, 1)
    with (
        oip_kit.region("wherry_kept", values.nbytes) as source,
        swap_kit.supervised(tmp_path) as site,
        triton.InferenceServerClient(f"127.0.0.1:{site.port}") as client,
    ):
        shm.set_shared_memory_region(source, [values])
        site.serve(ServeModel(name="scale", active=model))
        client.register_system_shared_memory("kept", "/wherry_kept", values.nbytes)
        for end in (site.hand_over, lambda: os.kill(site.worker.pid, signal.SIGKILL)):
            pid = site.worker.pid
            end()
            until(lambda pid=pid: site.worker.pid not in (0, pid), "another worker is there")
            with triton.InferenceServerClient(f"127.0.0.1:{site.port}") as again:
                assert again.infer("scale", [tensor]).as_numpy("y").tolist() == [[1.0] * 4]
