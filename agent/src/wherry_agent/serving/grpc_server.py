"""The Open Inference Protocol, version 2, over gRPC: the extra `wherry-agent[grpc]`, imported only where it is on.

gRPC opens its sockets itself and cannot take an inherited socket or connection. So what REST promises for a change of the
worker process does not hold here: in-process swaps fail nothing, but at a hand-over or after a crash connections break.
The next worker takes the port as soon as it is free; its unix socket has a name of its own, to which the supervisor leads
the one that clients know (`socket_name`). `wherry-agent doctor` says so where gRPC is on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from wherry_agent.answering.ask import Ask
from wherry_agent.children import Grpc, GrpcDoing
from wherry_agent.serving import tensors
from wherry_agent.serving.buffers import ALIGNMENT, Buffer, aligned_start, fresh
from wherry_agent.serving.http import buffers
from wherry_agent.serving.inference import (
    CUDA_REFUSED,
    LOAD_REFUSED,
    LOG_REFUSED,
    MESSAGE_CHARS_MAX,
    TRACE_REFUSED,
    Inference,
    Refusal,
    View,
    as_declared,
    check_id,
    classified,
    parameters_of,
    told,
    unforeseen,
)
from wherry_agent.serving.messages import SERVICE, message, put_in, taken_out
from wherry_agent.serving.peers import user_of_tcp
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import Array
from wherry_shared.limits import REQUEST_BYTES_MAX, TENSORS_MAX

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
WORKERS_MAX = 24
"""Calls at once; more wait. The run gate bounds how many of them run a model."""
CALLS_WAITING_MAX = 64
"""Calls of one connection that its client may have begun; further ones wait on its side."""
STREAMS_MAX = 16
"""Open streams at once: each keeps one of the calls above."""
HEADER_BYTES_MAX = 64 * 1024
"""What a message may have beside its tensors."""
SOCKET_PATH_BYTES_MAX = 107
BIND_SECONDS = 0.05
"""Between two looks at a port that the worker before still holds: it gives it back soon."""
SOON_SECONDS = 5.0
BIND_SECONDS_LATER = 2.0
"""Between two looks at a port that somebody else has."""

_OPTIONS = [
    ("grpc.max_concurrent_streams", CALLS_WAITING_MAX),
    ("grpc.so_reuseport", 0),  # two workers on one port would share its connections
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX + HEADER_BYTES_MAX),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_ping_strikes", 0),  # keep-alive pings of a local client are no attack
    ("grpc.http2.min_ping_interval_without_data_ms", 0),
]
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
}
_CONTENTS = {
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
"""Datatype → field of the typed contents; FP16 and BF16 have none."""
_REFUSED = {
    "RepositoryModelLoad": (403, LOAD_REFUSED),
    "RepositoryModelUnload": (403, LOAD_REFUSED),
    "CudaSharedMemoryStatus": (400, CUDA_REFUSED),
    "CudaSharedMemoryRegister": (400, CUDA_REFUSED),
    "CudaSharedMemoryUnregister": (400, CUDA_REFUSED),
    "TraceSetting": (400, TRACE_REFUSED),
    "LogSettings": (400, LOG_REFUSED),
}

_Request = message("ModelInferRequest")
_Response = message("ModelInferResponse")
_StreamResponse = message("ModelStreamInferResponse")
_RAW_IN = _Request.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_RAW_OUT = _Response.DESCRIPTOR.fields_by_name["raw_output_contents"].number
_ANSWER = _StreamResponse.DESCRIPTOR.fields_by_name["infer_response"].number


class _Asked(NamedTuple):
    """A request, and its raw tensors beside it."""

    request: Any
    raw: list[bytes | memoryview]
    used: list[Buffer]
    """Buffers that raw tensors were copied to; they serve other requests when this one is over."""

    @classmethod
    def read(cls, data: bytes) -> _Asked:
        """Read a message.

        Raises:
            DecodeError: it is none.
        """
        rest, taken = taken_out(data, _RAW_IN)
        request = _Request.FromString(rest)
        return cls(request, list(taken or request.raw_input_contents), [])

    def aligned(self, part: bytes | memoryview) -> bytes | memoryview:
        """Return a raw tensor where engines can read it: in a message it lies anywhere."""
        if isinstance(part, bytes):
            return part
        buffer = buffers.take(len(part) + ALIGNMENT)
        self.used.append(buffer)
        start = aligned_start(buffer, 0)
        view: memoryview = buffer.data[start : start + len(part)]
        view[:] = part
        return view


class GrpcServer:
    """Answers on a unix socket, and on a loopback port from when it is free."""

    def __init__(self, port: int, path: str, inference: Inference, say: Callable[[Grpc], None]) -> None:
        """Prepare; `path` is where the unix socket is made (empty: none), by a name that no other process uses."""
        self.port = port
        self.path = path
        self._tell = say
        self._no_socket = "not served yet"
        self._calls = _Calls(inference, port)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(WORKERS_MAX, thread_name_prefix="grpc")
        self._servers: list[Any] = []
        """One for each address: gRPC takes no further one once it answers."""
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to answer, on the port as soon as it can be had; returns at once."""
        threading.Thread(target=self._bind, name="grpc-bind", daemon=True).start()

    def stop(self, grace_s: float) -> list[threading.Event]:
        """Give port and socket back; return what is set when calls in flight are over, or were ended after so long."""
        self._stopped.set()
        with self._lock:
            servers = list(self._servers)
        return [server.stop(grace_s) for server in servers]

    def _say(self, doing: GrpcDoing) -> None:
        self._tell(Grpc(doing=doing, socket=self._no_socket))

    def _bind_socket(self) -> str:
        """Open the unix socket; return why that is not possible."""
        if not self.path:
            return "not served"
        if len(self.path.encode()) > SOCKET_PATH_BYTES_MAX:
            return f"not served: its path has more than {SOCKET_PATH_BYTES_MAX} bytes"
        if not os.access(Path(self.path).parent, os.W_OK):
            return "not served: its folder takes no changes"
        return "" if self._serve(f"unix:{self.path}") else "not served: gRPC cannot open it"

    def _bind(self) -> None:
        self._no_socket = self._bind_socket()
        if self._no_socket:
            log.warning("gRPC's unix socket is %s", self._no_socket)
        since = 0.0
        while not self._stopped.is_set():
            if _free(self.port) and self._serve(f"{HOST}:{self.port}"):
                log.info("gRPC on port %d", self.port)
                self._say("served")
                return
            if not since:
                log.info("gRPC waits for port %d", self.port)
                self._say("waiting for the port")
                since = time.monotonic()
            soon = time.monotonic() - since < SOON_SECONDS
            self._stopped.wait(BIND_SECONDS if soon else BIND_SECONDS_LATER)

    def _serve(self, address: str) -> bool:
        server = grpc.server(self._pool, options=_OPTIONS)
        server.add_generic_rpc_handlers([self._calls.handlers()])
        try:
            server.add_insecure_port(address)
        except RuntimeError:  # somebody was faster
            return False
        with self._lock:
            if self._stopped.is_set():
                return False
            server.start()
            self._servers.append(server)
        return True


def _free(port: int) -> bool:
    """Tell whether a port can be bound: gRPC's own try would write an error to the log each time."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # it is taken
            probe.bind((HOST, port))
            probe.listen(1)  # binding alone succeeds beside a listener with the same option
            return True
    return False


class _Calls:
    """One method per call of the service."""

    def __init__(self, inference: Inference, port: int) -> None:
        self._inference = inference
        self._port = port
        self._streams = threading.BoundedSemaphore(STREAMS_MAX)

    def handlers(self) -> Any:
        """Return what gRPC routes calls by."""
        asked = self._inference

        def unary(name: str, call: Callable[[Any, Any], Any]) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                _guarded(call, message(f"{name}Request").FromString),
                response_serializer=message(f"{name}Response").SerializeToString,
            )

        def filled(name: str, make: Callable[[Any, Any], dict[str, Any]]) -> Any:
            """Return a handler of a call whose answer is a description."""
            kind = message(f"{name}Response")
            return unary(name, lambda request, context: json_format.ParseDict(make(request, context), kind()))

        methods = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(_guarded(self._infer, bytes)),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
            "ServerLive": filled("ServerLive", lambda *_: {"live": True}),
            "ServerReady": filled("ServerReady", lambda *_: {"ready": asked.server_ready()}),
            "ModelReady": filled("ModelReady", lambda request, _: {"ready": self._ready(request)}),
            "ServerMetadata": filled("ServerMetadata", lambda *_: asked.server_metadata()),
            "ModelMetadata": filled("ModelMetadata", lambda request, _: asked.metadata(request.name, request.version)),
            "ModelConfig": filled(
                "ModelConfig", lambda request, _: {"config": asked.config(request.name, request.version)}
            ),
            "ModelStatistics": filled(
                "ModelStatistics", lambda request, _: asked.statistics(request.name, request.version)
            ),
            "RepositoryIndex": filled(
                "RepositoryIndex",
                lambda request, _: {"models": asked.index(ready=request.ready)},
            ),
            "SystemSharedMemoryStatus": filled(
                "SystemSharedMemoryStatus",
                lambda request, context: {
                    "regions": {row["name"]: row for row in asked.regions.status(request.name, self._user(context))}
                },
            ),
            "SystemSharedMemoryRegister": filled("SystemSharedMemoryRegister", self._register),
            "SystemSharedMemoryUnregister": filled("SystemSharedMemoryUnregister", self._unregister),
        }
        for name, (status, reason) in _REFUSED.items():
            methods[name] = grpc.unary_unary_rpc_method_handler(_refusing(status, reason))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _user(self, context: Any) -> int | None:
        """Return the user id of the client; None if the system does not say."""
        kind, _, address = context.peer().partition(":")
        host, _, port = address.rpartition(":")
        if kind != "ipv4" or not port.isdigit():
            return None
        return user_of_tcp((host, int(port)), (HOST, self._port))

    def _ready(self, request: Any) -> bool:
        try:
            return self._inference.model_ready(request.name, request.version)
        except Refusal:
            return False

    def _register(self, request: Any, context: Any) -> dict[str, Any]:
        self._inference.regions.register(
            request.name, request.key, request.offset, request.byte_size, self._user(context)
        )
        return {}

    def _unregister(self, request: Any, context: Any) -> dict[str, Any]:
        self._inference.regions.unregister(request.name, self._user(context))
        return {}

    def _stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        if not self._streams.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"no more than {STREAMS_MAX} streams at once")
        try:
            for data in requests:
                try:
                    answer = put_in(b"", _ANSWER, [self._infer(data, context)])
                except Exception as error:  # the border of the process: a stream goes on after a refused request
                    answer = _refused(error, data)
                yield answer
        finally:
            self._streams.release()

    def _infer(self, data: bytes, context: Any) -> bytes:
        taken = _Asked.read(data)
        answer = self._answer(taken, context)
        while taken.used:  # its tensors are gone by now, unless somebody still runs on them
            buffers.give(taken.used.pop())
        return answer

    def _answer(self, taken: _Asked, context: Any) -> bytes:
        asked, request = self._inference, taken.request
        version = request.model_version
        published, loaded = asked.find(request.model_name, version)
        view = asked.view(loaded)
        inputs, shared = self._inputs(taken, view, context)
        said = request.parameters
        ask = Ask(
            request_id=check_id(request.id),
            sequence_id=_sequence(said),
            sequence_start=_parameter(said, "sequence_start", bool, default=False),
            sequence_end=_parameter(said, "sequence_end", bool, default=False),
            generation=_parameter(said, "wherry_generation", int, default=0),
            unshared=not shared,
        )
        names = [output.name for output in request.outputs] or None
        answer = asked.run(published, loaded if version else None, inputs, names, ask)
        view = asked.view(answer.loaded)
        response = _Response(model_name=request.model_name, model_version=view.version, id=request.id)
        for name, value in parameters_of(view, answer).items():
            _set(response.parameters, name, value)
        if "triton_enable_empty_final_response" in said:  # one answer per request: each is the last
            response.parameters["triton_final_response"].bool_param = True
        parts = self._fill(response, taken, answer.outputs, view, context)
        return put_in(response.SerializeToString(), _RAW_OUT, parts)

    def _inputs(self, taken: _Asked, view: View, context: Any) -> tuple[dict[str, Array], bool]:
        """Return the inputs, and whether the client can still change one of them."""
        request = taken.request
        if len(request.inputs) > TENSORS_MAX:
            raise BadInput(f"{len(request.inputs)} inputs, at most {TENSORS_MAX}")
        inputs: dict[str, Array] = {}
        any_shared = False
        raw = iter(taken.raw)
        for tensor in request.inputs:
            name = tensor.name
            if name in inputs:
                raise BadInput(f"input {name[:80]!r} is given twice")
            if "shared_memory_region" in tensor.parameters:
                region, offset, size = self._place(tensor.parameters, name, context)
                data, shared = region.read(offset, size, fresh)
                array = tensors.from_bytes(name, tensor.datatype, tensor.shape, data)
                any_shared |= shared
            elif not taken.raw:
                array = _typed(name, tensor)
            elif tensor.HasField("contents") and tensor.contents.ByteSize():
                raise BadInput(f"input {name[:80]!r} has contents beside raw_input_contents")
            else:
                found = next(raw, None)
                if found is None:
                    raise BadInput(f"raw_input_contents has no entry for input {name[:80]!r}")
                array = tensors.from_bytes(name, tensor.datatype, tensor.shape, taken.aligned(found))
            inputs[name] = as_declared(name, array, tensor.datatype, view)
        if next(raw, None) is not None:
            raise BadInput("raw_input_contents has more entries than there are inputs")
        return inputs, any_shared

    def _fill(
        self, response: Any, taken: _Asked, outputs: dict[str, Array], view: View, context: Any
    ) -> list[bytes | memoryview]:
        """Write outputs the way the inputs came: typed contents if those were, else return their raw bytes."""
        request = taken.request
        parts: list[bytes | memoryview] = []
        wanted = {output.name: output.parameters for output in request.outputs}
        typed = not taken.raw and any(tensor.HasField("contents") for tensor in request.inputs)
        typed = typed and all(view.outputs[name] in _CONTENTS for name in outputs)
        for name, array in outputs.items():
            datatype = view.outputs[name]
            said = wanted.get(name, {})
            count = _parameter(said, "classification", int, default=0)
            if count:
                array, datatype = classified(name, array, count, view), "BYTES"  # noqa: PLW2901
            row = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
            if "shared_memory_region" in said:
                region, offset, size = self._place(said, name, context)
                part = tensors.to_bytes(array)
                region.write(offset, size, part)
                _set(row.parameters, "shared_memory_region", region.name)
                _set(row.parameters, "shared_memory_offset", offset)
                _set(row.parameters, "shared_memory_byte_size", len(part))
            elif typed:
                values = array.ravel().tolist()
                if datatype == "BYTES":
                    values = [value.encode() if isinstance(value, str) else value for value in values]
                getattr(row.contents, _CONTENTS[datatype]).extend(values)
            else:
                parts.append(tensors.to_bytes(array))
        return parts

    def _place(self, said: Any, name: str, context: Any) -> tuple[Any, int, int]:
        """Return region, offset and size of a tensor in shared memory."""
        region = self._inference.regions.get(
            _parameter(said, "shared_memory_region", str, default=""), self._user(context)
        )
        if "shared_memory_byte_size" not in said:
            raise BadInput(f"tensor {name[:80]!r} is in shared memory: say its shared_memory_byte_size")
        size = _parameter(said, "shared_memory_byte_size", int, default=0)
        return region, _parameter(said, "shared_memory_offset", int, default=0), size


def _refused(error: Exception, data: bytes) -> bytes:
    """Return what a stream says of a request that is not answered, in its place."""
    answer = _StreamResponse(error_message=_told(error)[1])
    with contextlib.suppress(DecodeError):
        request = _Asked.read(data).request
        answer.infer_response.id = request.id
        answer.infer_response.model_name = request.model_name
    whole: bytes = answer.SerializeToString()
    return whole


def _guarded(call: Callable[[Any, Any], Any], read: Callable[[bytes], Any]) -> Callable[[bytes, Any], Any]:
    """Read the request of a call, and turn what the call raises into its status."""

    def run(data: bytes, context: Any) -> Any:
        try:
            return call(read(data), context)
        except Exception as error:  # the border of the process: a caller gets an answer, the log gets the trace
            code, text = _told(error)
        return context.abort(code, text)

    return run


def _told(error: Exception) -> tuple[Any, str]:
    """Return the status of an error, and its message."""
    if isinstance(error, BadInput):
        return grpc.StatusCode.INVALID_ARGUMENT, told(error)
    if isinstance(error, Refusal):
        return _CODES[error.status], error.message[:MESSAGE_CHARS_MAX]
    if isinstance(error, EngineFault):
        return grpc.StatusCode.INTERNAL, told(error)
    if isinstance(error, DecodeError):
        return grpc.StatusCode.INVALID_ARGUMENT, "the request is not the message that this call takes"
    log.error("a call over gRPC", exc_info=error)
    return grpc.StatusCode.INTERNAL, unforeseen(error)


def _refusing(status: int, reason: str) -> Callable[[Any, Any], Any]:
    return lambda _, context: context.abort(_CODES[status], reason)


def _parameter(said: Any, name: str, kind: type[Any], *, default: Any) -> Any:
    """Return a parameter of its type, or the default if it is absent.

    Raises:
        BadInput: it has another type.
    """
    if name not in said:
        return default
    choice = said[name].WhichOneof("parameter_choice")
    value = getattr(said[name], choice) if choice else None
    if type(value) is not kind:
        raise BadInput(f"parameter {name} is {value!r}, expected {kind.__name__}")
    return value


def _sequence(said: Any) -> str:
    if "sequence_id" not in said:
        return ""
    kind = str if said["sequence_id"].WhichOneof("parameter_choice") == "string_param" else int
    value = _parameter(said, "sequence_id", kind, default="")
    return check_id(str(value)) if value else ""


def _set(parameters: Any, name: str, value: str | bool | int) -> None:
    kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
    setattr(parameters[name], kind, value)


def _typed(name: str, tensor: Any) -> Array:
    """Return the array that typed contents hold."""
    dtype, count = tensors.check_shape(name, tensor.datatype, tensor.shape)
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise BadInput(f"input {name[:80]!r}: {tensor.datatype} travels in raw_input_contents only")
    values = getattr(tensor.contents, field)
    if len(values) != count:
        raise BadInput(f"input {name[:80]!r} has {len(values)} values in {field}, its shape asks for {count}")
    if tensor.datatype == "BYTES":
        return tensors.from_texts(name, tensor.shape, values)
    if dtype.kind in "ui" and count:
        info = np.iinfo(dtype)
        if min(values) < info.min or max(values) > info.max:
            raise BadInput(f"input {name[:80]!r}: a value is out of the range of {tensor.datatype}")
    return np.fromiter(values, dtype, count).reshape(tensor.shape)
