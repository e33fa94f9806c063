"""tritonclient over gRPC, both of its clients, against a real worker; and the messages against tritonclient's own."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from tests.agent.serving_kit import DEADLINE_S, WorkerProcess, until
from tests.conformance import oip_kit
from tests.conformance.oip_kit import KINDS
from wherry_agent.serving import messages
from wherry_simulators.processes import free_port

SERVING = Path(messages.__file__).parent


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    number = free_port()
    with oip_kit.serving(tmp_path_factory.mktemp("oip"), WHERRY_GRPC_PORT=str(number)):
        yield number


@pytest.fixture
def client(port: int) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as made:
        until(lambda: _live(made), "gRPC answers")
        yield made


def _live(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_live())
    except InferenceServerException:
        return False


ONES = np.ones((1, 4), np.float32)


def given(values: np.ndarray, name: str = "x", datatype: str = "FP32") -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def test_messages_and_field_numbers_are_the_published_ones():
    theirs = {
        **service_pb2.DESCRIPTOR.message_types_by_name,
        **model_config_pb2.DESCRIPTOR.message_types_by_name,
    }
    ours = descriptor_pb2.FileDescriptorSet.FromString((SERVING / "oip.binpb").read_bytes()).file[0]

    def compare(mine: Any, other: Any) -> None:
        fields = {field.name: field for field in other.fields}
        for field in mine.field:
            published = fields[field.name]
            assert (field.number, field.type) == (published.number, published.type), f"{mine.name}.{field.name}"
            assert (field.label == field.LABEL_REPEATED) == published.is_repeated, f"{mine.name}.{field.name}"
        for nested in mine.nested_type:
            compare(nested, other.nested_types_by_name[nested.name])

    for message in ours.message_type:
        compare(message, theirs[message.name])
    (service,) = ours.service
    calls = service_pb2.DESCRIPTOR.services_by_name[service.name].methods_by_name
    for method in service.method:
        published = calls[method.name]
        assert (method.input_type, method.output_type) == (
            f".{published.input_type.full_name}",
            f".{published.output_type.full_name}",
        )


def test_the_compiled_messages_are_those_of_the_text(tmp_path: Path):
    made = tmp_path / "oip.binpb"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{SERVING}", f"--descriptor_set_out={made}", "oip.proto"],
        check=True,
    )
    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(made.read_bytes()) == read((SERVING / "oip.binpb").read_bytes()), "compile oip.proto again"


def test_health_metadata_config_index_and_statistics(client: triton.InferenceServerClient):
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1.0.0")
    assert not client.is_model_ready("other")
    about = client.get_server_metadata()
    assert (about.name, "system_shared_memory" in about.extensions) == ("wherry", True)
    model = client.get_model_metadata("scale")
    assert (model.platform, list(model.versions)) == ("onnxruntime_onnx", ["1.0.0"])
    assert (model.inputs[0].datatype, list(model.inputs[0].shape)) == ("FP32", [-1, 4])
    config = client.get_model_config("picture").config
    assert (config.max_batch_size, list(config.input[0].dims)) == (8, [3, 4, 4])
    assert config.input[0].format == model_config_pb2.ModelInput.FORMAT_NCHW
    config = client.get_model_config("types").config
    assert config.input[0].data_type == model_config_pb2.TYPE_BOOL
    assert config.parameters["wherry_variant"].string_value == "float"
    assert "scale" in {row.name for row in client.get_model_repository_index().models}
    before = client.get_inference_statistics("scale").model_stats[0].inference_stats.success.count
    client.infer("scale", [given(ONES)])
    assert client.get_inference_statistics("scale").model_stats[0].inference_stats.success.count == before + 1


def test_what_a_device_does_not_do_is_refused_with_a_reason(client: triton.InferenceServerClient):
    for call, code in (
        (lambda: client.load_model("scale"), "PERMISSION_DENIED"),
        (lambda: client.unload_model("scale"), "PERMISSION_DENIED"),
        (client.get_trace_settings, "INVALID_ARGUMENT"),
        (client.get_log_settings, "INVALID_ARGUMENT"),
        (client.get_cuda_shared_memory_status, "INVALID_ARGUMENT"),
        (lambda: client.get_model_metadata("other"), "NOT_FOUND"),
        (lambda: client.infer("scale", [given(ONES)], model_version="9.9.9"), "NOT_FOUND"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            call()
        assert refused.value.status() == f"StatusCode.{code}"
        assert len(refused.value.message()) > 10


def test_every_datatype_passes_raw(client: triton.InferenceServerClient):
    inputs = [given(values, f"in_{name}", name) for name, (_, values) in KINDS.items()]
    answer = client.infer("types", inputs, request_id="7")
    assert (answer.get_response().id, answer.get_response().model_version) == ("7", "1.0.0")
    for name, (_, values) in KINDS.items():
        found = answer.as_numpy(f"out_{name}")
        if name == "BYTES":
            found = np.array([text.decode() for text in found], np.object_)
        assert found.dtype == values.dtype, name
        assert np.array_equal(found, values), name
    outputs = [triton.InferRequestedOutput("out_INT64")]
    answer = client.infer("types", inputs, outputs=outputs)
    assert [row.name for row in answer.get_response().outputs] == ["out_INT64"]


def test_bf16_passes(client: triton.InferenceServerClient):
    answer = client.infer("half", [given(oip_kit.HALF, "x", "BF16")])
    assert np.array_equal(answer.as_numpy("same"), oip_kit.HALF)
    assert np.array_equal(answer.as_numpy("wide"), oip_kit.HALF.astype(np.float32))
    values = np.array([[0.5, 1.0, 3.140625, -2.0]], ml_dtypes.bfloat16)
    assert np.array_equal(
        client.infer("scale", [given(values, "x", "BF16")]).as_numpy("y"), 2 * values.astype(np.float32)
    )


FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def plain(name: str, values: list, field: str, shape: list[int], datatype: str) -> Any:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    getattr(tensor.contents, field).extend(values)
    return tensor


def test_typed_contents_come_back_as_typed_contents(client: triton.InferenceServerClient, port: int):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="scale", id="9")
        request.inputs.append(plain("x", [1, 2, 3, 4], "fp32_contents", [1, 4], "FP32"))
        answer = stub.ModelInfer(request)
        assert list(answer.outputs[0].contents.fp32_contents) == [2, 4, 6, 8]
        assert (len(answer.raw_output_contents), answer.parameters["wherry_variant"].string_param) == (0, "float")
        for datatype, field in FIELDS.items():
            values = KINDS[datatype][1].tolist()
            if datatype == "BYTES":
                values = [text.encode() for text in values]
            tensor = plain("in_X", values, field, [3], datatype)
            with pytest.raises(grpc.RpcError) as refused:  # the other inputs are missing: it parsed
                stub.ModelInfer(service_pb2.ModelInferRequest(model_name="types", inputs=[tensor]))
            assert "no such input" in refused.value.details(), datatype
        for tensor, word in (
            (plain("x", [1, 2, 3], "fp32_contents", [1, 4], "FP32"), "3 values"),
            (plain("x", [1, 2, 3, 4], "fp32_contents", [1, 4], "FP16"), "raw_input_contents only"),
            (plain("x", [300, 2, 3, 4], "int_contents", [1, 4], "INT8"), "out of the range"),
            (plain("x", [1, 2, 3, 4], "int_contents", [1, 4], "FP32"), "0 values"),
            (plain("x", [b"\xff"], "bytes_contents", [1], "BYTES"), "UTF-8"),
            (plain("x", [1, 2, 3, 4], "fp32_contents", [-1, 4], "FP32"), "cannot be"),
            (plain("x", [1, 2, 3, 4], "fp32_contents", [1, 4], "FP31"), "not supported"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(service_pb2.ModelInferRequest(model_name="scale", inputs=[tensor]))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert word in refused.value.details()
        full = plain("x", [1, 2, 3, 4], "fp32_contents", [1, 4], "FP32")
        bare = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
        for tensors, raw, word in (
            ([full], [b"\0" * 16], "beside"),
            ([bare], [b"\0" * 16] * 2, "more entries"),
            ([bare], [b"\0" * 15], "15 bytes"),
            ([bare, bare], [b"\0" * 16] * 2, "twice"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(
                    service_pb2.ModelInferRequest(model_name="scale", inputs=tensors, raw_input_contents=raw)
                )
            assert (refused.value.code(), word in refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_what_is_no_message_and_what_is_too_long_to_repeat(client: triton.InferenceServerClient, port: int):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for call in ("ModelInfer", "ModelMetadata", "SystemSharedMemoryRegister"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(b"\x0a\xff\xff")
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        streamed = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )(iter([b"\x0a\xff\xff"]))
        assert "not the message" in next(streamed).error_message
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        long = [plain("x" * 50_000 + str(n), [1], "fp32_contents", [1], "FP32") for n in range(3)]
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(service_pb2.ModelInferRequest(model_name="scale", inputs=long))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no such input" in refused.value.details()


def test_parameters_sequences_compression_and_classification(client: triton.InferenceServerClient):
    for coding in ("gzip", "deflate"):
        answer = client.infer(
            "scale",
            [given(ONES)],
            compression_algorithm=coding,
            priority=2,
            timeout=5_000_000,
            sequence_id=5,
            sequence_start=True,
            sequence_end=True,
            parameters={"mine": "1", "number": 4, "yes": True},
            headers={"x-trace": "1"},
        )
        assert answer.as_numpy("y").tolist() == [[2.0] * 4]
    answer = client.infer("scale", [given(ONES)], sequence_id="a-b", sequence_start=True, sequence_end=True)
    assert answer.as_numpy("y").tolist() == [[2.0] * 4]
    outputs = [triton.InferRequestedOutput("y", class_count=1)]
    values = np.array([[0.1, 0.4, 0.2, 0.3]], np.float32)
    assert client.infer("label", [given(values)], outputs=outputs).as_numpy("y").tolist() == [[b"0.800000:1:dog"]]


def test_shared_memory_in_and_out(client: triton.InferenceServerClient):
    values = np.arange(150_000, dtype=np.float32)[None]
    with oip_kit.region("wherry_gin", values.nbytes) as source, oip_kit.region("wherry_gout", values.nbytes) as target:
        shm.set_shared_memory_region(source, [values])
        client.register_system_shared_memory("gin", "/wherry_gin", values.nbytes)
        client.register_system_shared_memory("gout", "/wherry_gout", values.nbytes)
        assert set(client.get_system_shared_memory_status().regions) == {"gin", "gout"}
        tensor = triton.InferInput("x", list(values.shape), "FP32")
        tensor.set_shared_memory("gin", values.nbytes)
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("gout", values.nbytes)
        answer = client.infer("image", [tensor], outputs=[output])
        found = shm.get_contents_as_numpy(target, np.float32, answer.get_output("y").shape)
        assert np.array_equal(found, 2 * values)
        del found
        assert np.array_equal(client.infer("image", [tensor]).as_numpy("y"), 2 * values)
        client.unregister_system_shared_memory("gin")
        with pytest.raises(InferenceServerException, match="not registered"):
            client.infer("image", [tensor])
        client.unregister_system_shared_memory()
        assert not client.get_system_shared_memory_status().regions


def test_a_stream_answers_in_order_and_goes_on_after_a_refusal(client: triton.InferenceServerClient):
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for n in range(5):
        client.async_stream_infer("scale", [given(ONES * n)], request_id=str(n))
    client.async_stream_infer("other", [given(ONES)], request_id="bad")
    client.async_stream_infer("scale", [given(ONES)], request_id="last", enable_empty_final_response=True)
    found = [answers.get(timeout=DEADLINE_S) for _ in range(7)]
    client.stop_stream()
    assert [result.get_response().id for result, error in found if error is None] == ["0", "1", "2", "3", "4", "last"]
    assert found[2][0].as_numpy("y").tolist() == [[4.0] * 4]
    assert "other" in found[5][1].message()
    assert found[6][0].get_response().parameters["triton_final_response"].bool_param


def test_many_requests_at_once(client: triton.InferenceServerClient):
    answers: queue.Queue = queue.Queue()
    for n in range(40):
        client.async_infer("scale", [given(ONES * n)], lambda result, error: answers.put((result, error)))
    found = [answers.get(timeout=DEADLINE_S) for _ in range(40)]
    assert [error for _, error in found if error is not None] == []
    assert sorted(result.as_numpy("y")[0, 0] for result, _ in found) == [2.0 * n for n in range(40)]


def test_the_asyncio_client(client: triton.InferenceServerClient, port: int):
    async def talk() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{port}") as aio:
            assert await aio.is_server_live()
            assert await aio.is_server_ready()
            assert await aio.is_model_ready("scale")
            assert (await aio.get_server_metadata()).name == "wherry"
            assert (await aio.get_model_config("scale")).config.name == "scale"
            answers = await asyncio.gather(*[aio.infer("scale", [given(ONES * n)]) for n in range(20)])
            assert [answer.as_numpy("y")[0, 0] for answer in answers] == [2.0 * n for n in range(20)]

            async def requests():
                for n in range(3):
                    yield {"model_name": "scale", "inputs": [given(ONES * n)], "request_id": str(n)}

            streamed = [result async for result, error in aio.stream_infer(requests()) if error is None]
            assert [result.as_numpy("y")[0, 0] for result in streamed] == [0.0, 2.0, 4.0]
            with pytest.raises(InferenceServerException, match="offer"):
                await aio.load_model("scale")

    asyncio.run(talk())


def test_a_worker_that_follows_takes_the_port_when_it_is_free(tmp_path: Path):
    number = free_port()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        triton.InferenceServerClient(f"127.0.0.1:{number}") as client,
        oip_kit.serving(tmp_path / "a", WHERRY_GRPC_PORT=str(number)) as first,
    ):
        until(lambda: _live(client), "the first answers")
        with oip_kit.serving(tmp_path / "b", WHERRY_GRPC_PORT=str(number)) as second:
            assert client.infer("scale", [given(ONES)]).as_numpy("y")[0, 0] == 2.0
            first.process.kill()
            first.process.wait(DEADLINE_S)
            with triton.InferenceServerClient(f"127.0.0.1:{number}") as again:
                until(lambda: _live(again), "the second answers")
                assert again.infer("scale", [given(ONES)]).as_numpy("y")[0, 0] == 2.0
            assert second.process.poll() is None


def test_a_worker_without_the_packages_serves_rest(tmp_path: Path):
    (tmp_path / "grpc.py").write_text("raise ImportError('not here')\n")
    with oip_kit.serving(tmp_path, WHERRY_GRPC_PORT=str(free_port()), PYTHONPATH=str(tmp_path)) as process:
        assert _answers(process)


def _answers(process: WorkerProcess) -> bool:
    return process.infer([[1.0] * 4])[0] == 200
