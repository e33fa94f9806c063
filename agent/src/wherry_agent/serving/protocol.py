"""The Open Inference Protocol, version 2, over REST: from a request to a response, without a socket.

Names and datatypes are the interface's canonical ones, dynamic axes are −1. Every answer says which version really gave
it (`model_version`) and which variant (`parameters.wherry_variant`); `parameters.wherry_fallback` is true where the
incumbent answered what a candidate on trial failed. Tensors are JSON, or raw bytes behind it (the binary tensor
extension). docs/formats/inference.md says what is spoken, and what is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from wherry_agent.answering.ask import Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.published import Answer
from wherry_agent.answering.registry import Registry
from wherry_agent.serving import tensors
from wherry_agent.serving.buffers import fresh
from wherry_agent.serving.compression import asked_coding, compress, decompress
from wherry_agent.serving.flags import Flags
from wherry_agent.serving.http import BadRequest, Part, Request, Response, written_head
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
from wherry_agent.serving.regions import Regions
from wherry_agent.serving.samples import Samples
from wherry_shared.bundle import TensorSpec
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import Array
from wherry_shared.limits import REQUEST_BYTES_MAX, TENSORS_MAX

log = logging.getLogger(__name__)

PLANS_MAX = 256
PLAN_BYTES_MAX = 2048
"""Headers of requests that are remembered: a client repeats the same one for every tensor of the same shape."""
WRITTEN_MAX = 64
"""The same for what is said beside raw outputs, per loaded variant."""
HEADER_LENGTH = "inference-header-content-length"
_JSON_TYPES = ("application/json", "text/json", "application/octet-stream", "application/x-www-form-urlencoded", "")
"""curl -d sends the form type when it is not told otherwise: what counts is whether the body parses."""


class _InputParameters(msgspec.Struct, frozen=True, gc=False):
    """What is known of a tensor's parameters; others are ignored, as the protocol allows, and null is absence."""

    binary_data_size: int | None = None
    shared_memory_region: str | None = None
    shared_memory_offset: int | None = None
    shared_memory_byte_size: int | None = None


class _OutputParameters(msgspec.Struct, frozen=True, gc=False):
    binary_data: bool | None = None
    classification: int | None = None
    shared_memory_region: str | None = None
    shared_memory_offset: int | None = None
    shared_memory_byte_size: int | None = None


class _RequestParameters(msgspec.Struct, frozen=True, gc=False):
    binary_data_output: bool | None = None
    sequence_id: int | str | None = None
    sequence_start: bool | None = None
    sequence_end: bool | None = None
    wherry_generation: int | None = None
    priority: int | None = None
    timeout: float | None = None
    """Takes whole numbers as well."""


class _RequestTensor(msgspec.Struct, frozen=True):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: _InputParameters | None = None


class _RequestedOutput(msgspec.Struct, frozen=True):
    name: str
    parameters: _OutputParameters | None = None


class _InferRequest(msgspec.Struct, frozen=True):
    inputs: list[_RequestTensor]
    id: str | None = None
    outputs: list[_RequestedOutput] | None = None
    parameters: _RequestParameters | None = None


class _Registration(msgspec.Struct, frozen=True):
    key: str
    byte_size: int
    offset: int = 0


class _Told(msgspec.Struct, frozen=True):
    name: str
    value: float


class _IndexRequest(msgspec.Struct, frozen=True):
    ready: bool | None = None


class _ResponseTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET
    parameters: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class _InferResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    model_name: str
    model_version: str
    parameters: dict[str, Any]
    outputs: list[_ResponseTensor]
    id: str = ""


_infer: msgspec.json.Decoder[_InferRequest] = msgspec.json.Decoder(_InferRequest)
_index: msgspec.json.Decoder[_IndexRequest] = msgspec.json.Decoder(_IndexRequest)
_told: msgspec.json.Decoder[_Told] = msgspec.json.Decoder(_Told)
_registration: msgspec.json.Decoder[_Registration] = msgspec.json.Decoder(_Registration)
_encoder = msgspec.json.Encoder()
_NO_PARAMETERS = _RequestParameters()
_UNSHARED = Ask(unshared=True)
_NO_OUTPUT_PARAMETERS = _OutputParameters()
_RAW = _InferRequest(inputs=[], parameters=_RequestParameters(binary_data_output=True))
"""What a raw binary request says beside its tensor."""


class Protocol:
    """Answers requests from what is published."""

    def __init__(
        self,
        registry: Registry,
        gate: RunGate,
        helpers: Helpers,
        flags: Flags | None = None,
        regions: Regions | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.inference = Inference(registry, gate, helpers, regions, samples)
        self._plans: dict[bytes, _Plan] = {}
        self._flags = flags or Flags()

    def respond(self, request: Request) -> Response:
        """Answer a request; every refusal is a response with an `error`."""
        try:
            if self.inference.cold:
                _aside(request)
            if request.path[-1] == "infer":
                return self._infer_path(request)
            return self._route(request)
        except BadInput as error:
            return failure(400, told(error))
        except (Refusal, BadRequest) as error:
            return failure(error.status, error.message)
        except EngineFault as error:
            return failure(500, told(error))
        except Exception as error:  # the border of the process: a caller gets an answer, the log gets the trace
            log.exception("request %s %s", request.method, "/".join(request.path))
            return failure(500, unforeseen(error))

    # -- inside ----------------------------------------------------------------------------------

    def _infer_path(self, request: Request) -> Response:
        path = request.path  # compared by hand: matching a sequence pattern takes longer than decoding the request
        if len(path) == 4 and path[0] == "v2" and path[1] == "models":
            return self._infer(path[2], "", request) if request.method == "POST" else _wrong_method("POST")
        if len(path) == 6 and path[0] == "v2" and path[1] == "models" and path[3] == "versions":
            return self._infer(path[2], path[4], request) if request.method == "POST" else _wrong_method("POST")
        return _unknown()

    def _route(self, request: Request) -> Response:
        asked = self.inference
        match request.path:
            case ("v2",):
                return _get(request, asked.server_metadata)
            case ("v2", "health", "live"):
                return _get(request, lambda: {"live": True})
            case ("v2", "health", "ready"):
                ready = asked.server_ready()
                return _get(request, lambda: {"ready": ready}, 200 if ready else 503)
            case ("v2", "models", "stats"):
                return _get(request, lambda: asked.statistics("", ""))
            case ("v2", "models", name, *rest) if rest[:1] != ["versions"]:
                return self._model(request, name, "", rest)
            case ("v2", "models", name, "versions", version, *rest):
                return self._model(request, name, version, rest)
            case ("v2", "repository", "index"):
                return _post(request) or _json(asked.index(ready=_only_ready(request.body)))
            case ("v2", "repository", "models", _, "load" | "unload"):
                return _post(request) or failure(403, LOAD_REFUSED)
            case ("v2", "systemsharedmemory", *rest):
                return self._shared_memory(request, rest)
            case ("v2", "cudasharedmemory", *rest) if rest:
                return failure(400, CUDA_REFUSED)
            case ("v2", "trace", "setting"):
                return failure(400, TRACE_REFUSED)
            case ("v2", "logging"):
                return failure(400, LOG_REFUSED)
            case ("ofrep", *rest):
                return self._flags.respond(tuple(rest), request)
        return _unknown()

    def _model(self, request: Request, name: str, version: str, rest: list[str]) -> Response:
        asked = self.inference
        match rest:
            case []:
                return _get(request, lambda: asked.metadata(name, version))
            case ["ready"]:
                return _get(request, lambda: {"name": name, "ready": asked.model_ready(name, version)})
            case ["config"]:
                return _get(request, lambda: asked.config(name, version))
            case ["stats"]:
                return _get(request, lambda: asked.statistics(name, version))
            case ["tell"]:
                return _post(request) or self._tell(name, version, request.body)
            case ["trace", "setting"]:
                return failure(400, TRACE_REFUSED)
        return _unknown()

    def _tell(self, name: str, version: str, body: bytes | memoryview) -> Response:
        try:
            said = _told.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"not a number that is told: {error}") from error
        self.inference.tell(name, version, said.name, said.value)
        return _json({})

    def _shared_memory(self, request: Request, rest: list[str]) -> Response:
        regions, user = self.inference.regions, _user(request)
        match rest:
            case ["status"]:
                return _get(request, lambda: regions.status("", user))
            case ["region", name, "status"]:
                return _get(request, lambda: regions.status(name, user))
            case ["region", name, "register"]:
                if request.method != "POST":
                    return _wrong_method("POST")
                try:
                    said = _registration.decode(request.body)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise BadInput(f"not a registration: {error}") from error
                regions.register(name, said.key, said.offset, said.byte_size, user)
                return _json({})
            case ["unregister"] | ["region", _, "unregister"]:
                if request.method != "POST":
                    return _wrong_method("POST")
                regions.unregister(rest[1] if len(rest) == 3 else "", user)
                return _json({})
        return _unknown()

    def _infer(self, name: str, version: str, request: Request) -> Response:
        headers = request.headers
        kind = headers.get("content-type", "")
        if kind not in _JSON_TYPES and kind.partition(";")[0].strip().lower() not in _JSON_TYPES:
            return failure(415, f"content type {kind[:80]!r} is not supported: send application/json")
        body = request.body
        encoding = headers.get("content-encoding")
        if encoding is not None and encoding.lower() != "identity":
            _aside(request)
            body = decompress(encoding.strip().lower(), body, REQUEST_BYTES_MAX)
        published, loaded = self.inference.find(name, version)
        view = self.inference.view(loaded)
        header_length = headers.get(HEADER_LENGTH)
        if header_length == "0":
            asked, ask = _RAW, _UNSHARED
            inputs, size = _raw_input(loaded.loadable.interface.inputs, body), len(body)
        else:
            length = len(body) if header_length is None else _header_length(header_length, len(body))
            blob = memoryview(body)[length:]
            header = bytes(body[:length]) if length <= PLAN_BYTES_MAX else b""
            plan = self._plans.get(header)
            if plan is not None and plan.raw:
                asked, ask = plan.asked, plan.ask
                inputs, size = plan.inputs(blob, view), len(blob)
            else:
                asked, ask = _parse(header or memoryview(body)[:length]) if plan is None else (plan.asked, plan.ask)
                inputs, shared = self._inputs(asked.inputs, blob, view, request)
                if plan is None:
                    plan = self._remember(header, asked, ask)
                if shared:
                    ask = replace(ask, unshared=False) if plan is None else plan.shared_ask
                size = sum([array.nbytes for array in inputs.values()])
        names = [output.name for output in asked.outputs] if asked.outputs else None
        if request.connection is not None:
            request.connection.stand_aside(self.inference.expected(published, view, size, ask))
        began = time.thread_time()  # engines compute on the CPU, and waiting for the interpreter is nobody's work
        answer = self.inference.run(published, loaded if version else None, inputs, names, ask)
        response = self._answered(name, asked, answer, request)
        view.took(time.thread_time() - began, size)
        accepted = headers.get("accept-encoding")
        coding = "" if accepted is None else asked_coding(accepted)
        if coding:
            _aside(request)
            body = compress(coding, [response.body, *response.parts])
            response = Response(200, body, {**response.headers, "Content-Encoding": coding})
        return response

    def _remember(self, header: bytes, asked: _InferRequest, ask: Ask) -> _Plan | None:
        """Keep what a header says, if others will say the same: a request id is new every time, and so are JSON data."""
        if not header or asked.id or ask.sequence_id:
            return None
        if any(memoryview(tensor.data) for tensor in asked.inputs):
            return None
        if len(self._plans) >= PLANS_MAX:
            self._plans.clear()
        plan = self._plans[header] = _Plan(asked, ask)
        return plan

    def _inputs(
        self, given: list[_RequestTensor], blob: memoryview, view: View, request: Request
    ) -> tuple[dict[str, Array], bool]:
        """Return the inputs, and whether the client can still change one of them."""
        if len(given) > TENSORS_MAX:
            raise BadInput(f"{len(given)} inputs, at most {TENSORS_MAX}")
        inputs: dict[str, Array] = {}
        any_shared = False
        offset = 0
        for tensor in given:
            name = tensor.name
            if name in inputs:
                raise BadInput(f"input {name[:80]!r} is given twice")
            said = tensor.parameters
            if said is None or (said.binary_data_size is None and said.shared_memory_region is None):
                array = tensors.decode(name, tensor.datatype, tensor.shape, tensor.data)
            elif memoryview(tensor.data):
                raise BadInput(f"input {name[:80]!r} has data in JSON and says that they are elsewhere")
            elif said.shared_memory_region is not None:
                region = self.inference.regions.get(said.shared_memory_region, _user(request))
                size = _region_size(name, said.shared_memory_byte_size)
                take = fresh if request.connection is None else request.connection.take
                data, shared = region.read(said.shared_memory_offset or 0, size, take)
                array = tensors.from_bytes(name, tensor.datatype, tensor.shape, data)
                any_shared |= shared
            else:
                size = said.binary_data_size or 0
                if not 0 <= size <= len(blob) - offset:
                    raise BadInput(f"input {name[:80]!r} has {len(blob) - offset} of {size} bytes of raw data")
                array = tensors.from_bytes(name, tensor.datatype, tensor.shape, blob[offset : offset + size])
                offset += size
            inputs[name] = as_declared(name, array, tensor.datatype, view)
        if offset != len(blob):
            raise BadInput(f"{len(blob) - offset} bytes follow the last input")
        return inputs, any_shared

    def _answered(self, name: str, asked: _InferRequest, answer: Answer, request: Request) -> Response:
        view = self.inference.view(answer.loaded)
        said = asked.parameters or _NO_PARAMETERS
        if said.binary_data_output and not asked.outputs and not asked.id:
            return _all_raw(name, answer, view)
        rows: list[_ResponseTensor] = []
        parts: list[Part] = []
        wanted = {output.name: output.parameters for output in asked.outputs or ()}
        for output, array in answer.outputs.items():
            how = wanted.get(output) or _NO_OUTPUT_PARAMETERS
            datatype = view.outputs[output]
            binary = said.binary_data_output if how.binary_data is None else how.binary_data
            if how.classification:
                array, datatype = classified(output, array, how.classification, view), "BYTES"  # noqa: PLW2901
            if how.shared_memory_region is not None:
                region = self.inference.regions.get(how.shared_memory_region, _user(request))
                part = tensors.to_bytes(array)
                region.write(how.shared_memory_offset or 0, _region_size(output, how.shared_memory_byte_size), part)
                where = {
                    "shared_memory_region": region.name,
                    "shared_memory_offset": how.shared_memory_offset or 0,
                    "shared_memory_byte_size": len(part),
                }
                rows.append(_ResponseTensor(output, datatype, array.shape, parameters=where))
            elif binary:
                part = tensors.to_bytes(array)
                parts.append(part)
                rows.append(_ResponseTensor(output, datatype, array.shape, parameters={"binary_data_size": len(part)}))
            else:
                rows.append(_ResponseTensor(output, datatype, array.shape, data=tensors.encode(array, datatype)))
        body = _encoder.encode(_InferResponse(name, view.version, parameters_of(view, answer), rows, asked.id or ""))
        return _raw_response(body, parts) if parts else Response(200, body)


def _all_raw(name: str, answer: Answer, view: View) -> Response:
    """Return the answer of a client that said nothing else: all outputs as raw bytes, beside words said before."""
    parts = [tensors.to_bytes(array) for array in answer.outputs.values()]
    key = (name, answer.fallback, answer.generation, *[array.shape for array in answer.outputs.values()])
    if view.texts:  # the size of raw text does not follow from its shape
        key = (*key, *[len(part) for part in parts])
    written = view.written.get(key)
    if written is None:
        rows = [
            _ResponseTensor(output, view.outputs[output], array.shape, parameters={"binary_data_size": len(part)})
            for (output, array), part in zip(answer.outputs.items(), parts, strict=True)
        ]
        body = _encoder.encode(_InferResponse(name, view.version, parameters_of(view, answer), rows))
        if len(view.written) >= WRITTEN_MAX:
            view.written.clear()
        written = _raw_response(body, [])
        written.head = written_head(written, len(body) + sum(map(len, parts)))
        view.written[key] = written
    return Response(200, written.body, written.headers, parts, written.head)


def _raw_response(body: bytes, parts: list[Part]) -> Response:
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(body))}
    return Response(200, body, headers, parts)


class _Plan:
    """A request without JSON data, as its header says it; found again by the header's own bytes."""

    __slots__ = ("_tensors", "_total", "ask", "asked", "raw", "shared_ask")

    def __init__(self, asked: _InferRequest, ask: Ask) -> None:
        """Take over a request that was found good."""
        self.asked = asked
        self.ask = ask
        self.shared_ask = replace(ask, unshared=False)
        self._tensors: list[tuple[str, str, np.dtype[Any], list[int], int, int, int]] = []
        self._total = 0
        self.raw = True
        """All inputs are raw bytes of the request; else some are in shared memory, which is looked up each time."""
        for tensor in asked.inputs:
            said = tensor.parameters
            if said is None or said.binary_data_size is None or said.shared_memory_region is not None:
                self.raw = False
                return
            dtype, count = tensors.check_shape(tensor.name, tensor.datatype, tensor.shape)
            end = self._total + said.binary_data_size
            self._tensors.append((tensor.name, tensor.datatype, dtype, tensor.shape, count, self._total, end))
            self._total = end

    def inputs(self, blob: memoryview, view: View) -> dict[str, Array]:
        """Return the inputs of a request with this header.

        Raises:
            BadInput: its raw bytes are not those that the header says.
        """
        if len(blob) != self._total:
            raise BadInput(f"{len(blob)} bytes of raw data came, the header says {self._total}")
        inputs = {}
        for name, datatype, dtype, shape, count, start, end in self._tensors:
            array = tensors.from_checked(name, dtype, shape, count, blob[start:end])
            inputs[name] = array if datatype != "BF16" else as_declared(name, array, datatype, view)
        return inputs


def _header_length(text: str, body_length: int) -> int:
    """Return the length of the JSON part of a request."""
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise BadInput("Inference-Header-Content-Length is not a number")
    length = int(text)
    if length > body_length:
        raise BadInput(f"Inference-Header-Content-Length is {length}, the body has {body_length} bytes")
    return length


def _parse(header: bytes | memoryview) -> tuple[_InferRequest, Ask]:
    """Return the JSON part of a request, and what it says about itself."""
    try:
        asked = _infer.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not an inference request: {error}") from error
    said = asked.parameters
    if said is None:
        return asked, Ask(request_id=check_id(asked.id or ""), unshared=True) if asked.id else _UNSHARED
    ask = Ask(
        request_id=check_id(asked.id or ""),
        sequence_id=_sequence(said.sequence_id),
        sequence_start=bool(said.sequence_start),
        sequence_end=bool(said.sequence_end),
        generation=said.wherry_generation or 0,
        unshared=True,
    )
    return asked, ask


def _raw_input(specs: list[TensorSpec], body: bytes | memoryview) -> dict[str, Array]:
    """Return the input of a raw binary request: all of the body is the only tensor, one free axis gives way."""
    required = [spec for spec in specs if not spec.optional]
    if len(required) != 1:
        raise BadInput(f"a raw binary request is for a model with one input, this one has {len(required)}")
    (spec,) = required
    free = [place for place, axis in enumerate(spec.shape) if isinstance(axis, str)]
    if spec.datatype == "BYTES":
        body = len(body).to_bytes(4, "little") + bytes(body)
        return {spec.name: tensors.from_bytes(spec.name, spec.datatype, [1] * len(spec.shape), body)}
    shape = [axis if isinstance(axis, int) else 1 for axis in spec.shape]
    if len(free) > 1:
        raise BadInput(f"input {spec.name!r} has {len(free)} free axes: say its shape in a JSON header")
    dtype, count = tensors.check_shape(spec.name, spec.datatype, shape)
    if free:
        shape[free[0]] = len(body) // max(1, count * dtype.itemsize)
    return {spec.name: tensors.from_bytes(spec.name, spec.datatype, shape, body)}


def _only_ready(body: bytes | memoryview) -> bool:
    """Return what a request for the index asks for; an empty body asks for everything."""
    if not len(body):
        return False
    try:
        return bool(_index.decode(body).ready)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not a request for the index: {error}") from error


def _aside(request: Request) -> None:
    """Say that this request may last."""
    if request.connection is not None:
        request.connection.stand_aside()


def _user(request: Request) -> int | None:
    return None if request.connection is None else request.connection.user()


def _region_size(name: str, said: int | None) -> int:
    if said is None:
        raise BadInput(f"tensor {name[:80]!r} is in shared memory: say its shared_memory_byte_size")
    return said


def _sequence(said: int | str | None) -> str:
    return check_id(str(said)) if said else ""


def _unknown() -> Response:
    return failure(404, "no such path; see /v2, /v2/health/ready, /v2/models/NAME/infer")


def _get(request: Request, make: Callable[[], Any], status: int = 200) -> Response:
    """Answer GET, and HEAD the same: the connection leaves its body out."""
    return _json(make(), status) if request.method in ("GET", "HEAD") else _wrong_method("GET")


def _post(request: Request) -> Response | None:
    return None if request.method == "POST" else _wrong_method("POST")


def _wrong_method(allowed: str) -> Response:
    return Response(405, _encoder.encode({"error": f"use {allowed}"}), {"Allow": allowed})


def _json(value: Any, status: int = 200) -> Response:
    return Response(status, _encoder.encode(value))


def failure(status: int, message: str) -> Response:
    """Return a refusal as the protocol writes it."""
    return Response(status, _encoder.encode({"error": message[:MESSAGE_CHARS_MAX]}))
