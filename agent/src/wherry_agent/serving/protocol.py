"""The Open Inference Protocol, version 2, JSON over REST: from a request to a response, without a socket.

Names and datatypes are the interface's canonical ones, dynamic axes are −1. Every answer says which version really gave
it (`model_version`) and which variant (`parameters.wherry_variant`); `parameters.wherry_fallback` is true where the
incumbent answered what a candidate on trial failed. What a later release brings (binary tensors, shared memory,
sequences) is refused by name.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from wherry_agent import __version__
from wherry_agent.answering.arms import Loaded
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.published import Answer, Published
from wherry_agent.answering.registry import Registry
from wherry_agent.serving import tensors
from wherry_agent.serving.flags import Flags
from wherry_agent.serving.http import Request, Response
from wherry_shared.bundle import PLATFORMS, Interface, TensorSpec
from wherry_shared.engines.errors import BadInput, EngineFault

log = logging.getLogger(__name__)


class _RequestTensor(msgspec.Struct, frozen=True):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: dict[str, Any] = {}


class _RequestedOutput(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Any] = {}


class _InferRequest(msgspec.Struct, frozen=True):
    inputs: list[_RequestTensor]
    id: str = ""
    outputs: list[_RequestedOutput] | None = None
    parameters: dict[str, Any] = {}


class _ResponseTensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class _InferResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    model_name: str
    model_version: str
    parameters: dict[str, Any]
    outputs: list[_ResponseTensor]
    id: str = ""


_infer: msgspec.json.Decoder[_InferRequest] = msgspec.json.Decoder(_InferRequest)
_encoder = msgspec.json.Encoder()

_LATER = {
    "binary_data": "binary tensors are not supported yet: send binary_data=false and JSON data",
    "binary_data_size": "binary tensors are not supported yet: send JSON data",
    "binary_data_output": "binary tensors are not supported yet: ask for binary_data_output=false",
    "shared_memory_region": "shared memory is not supported yet: send JSON data",
    "classification": "the classification extension is not supported: read the labels from the bundle's assets",
    "sequence_id": "sequences are not supported yet",
}


class Protocol:
    """Answers requests from what is published."""

    def __init__(self, registry: Registry, gate: RunGate, helpers: Helpers, flags: Flags | None = None) -> None:
        self._registry = registry
        self._gate = gate
        self._helpers = helpers
        self._flags = flags or Flags()

    def respond(self, request: Request) -> Response:
        """Answer a request; every refusal is a response with an `error`."""
        try:
            return self._route(request)
        except BadInput as error:
            return failure(400, error.message)
        except EngineFault as error:
            return failure(500, str(error))
        except Exception as error:  # the border of the process: a caller gets an answer, the log gets the trace
            log.exception("request %s %s", request.method, "/".join(request.path))
            return failure(500, f"internal error: {type(error).__name__}")

    # -- inside ----------------------------------------------------------------------------------

    def _route(self, request: Request) -> Response:
        match request.path:
            case ("v2",):
                return _get(request) or _json({"name": "wherry", "version": __version__, "extensions": []})
            case ("v2", "health", "live"):
                return _get(request) or _json({"live": True})
            case ("v2", "health", "ready"):
                return _get(request) or self._server_ready()
            case ("v2", "models", name):
                return _get(request) or self._metadata(name, "")
            case ("v2", "models", name, "versions", version):
                return _get(request) or self._metadata(name, version)
            case ("v2", "models", name, "ready"):
                return _get(request) or self._model_ready(name, "")
            case ("v2", "models", name, "versions", version, "ready"):
                return _get(request) or self._model_ready(name, version)
            case ("v2", "models", name, "infer"):
                return _post(request) or self._infer(name, "", request)
            case ("v2", "models", name, "versions", version, "infer"):
                return _post(request) or self._infer(name, version, request)
            case ("ofrep", *rest):
                return self._flags.respond(tuple(rest), request)
        return failure(404, "no such path; see /v2, /v2/health/ready, /v2/models/NAME/infer")

    def _server_ready(self) -> Response:
        """Ready once every model of the last desired state answers or is being swapped."""
        ready = bool(self._registry.names())
        return _json({"ready": ready}, 200 if ready else 503)

    def _find(self, name: str, version: str) -> tuple[Published, Loaded] | Response:
        published = self._registry.get(name)
        if published is None:
            known = ", ".join(self._registry.names()) or "none"
            return failure(404, f"model {name[:80]!r} is not served here; served: {known}")
        if not version:
            return published, published.active
        for loaded in published.loaded():
            if loaded.version == version:
                return published, loaded
        versions = ", ".join(_versions(published))
        return failure(404, f"version {version[:80]!r} of {name!r} is not loaded; loaded: {versions}")

    def _metadata(self, name: str, version: str) -> Response:
        found = self._find(name, version)
        if isinstance(found, Response):
            return found
        published, loaded = found
        interface = loaded.loadable.interface
        return _json(
            {
                "name": name,
                "versions": _versions(published),
                "platform": PLATFORMS["tflite" if loaded.loadable.format == "tflite" else "onnx"],
                "inputs": [_described(spec) for spec in interface.inputs],
                "outputs": [_described(spec) for spec in interface.outputs],
            }
        )

    def _model_ready(self, name: str, version: str) -> Response:
        if not version and name in self._registry.names():
            return _json({"name": name, "ready": True})  # also while it is swapped
        found = self._find(name, version)
        return found if isinstance(found, Response) else _json({"name": name, "ready": True})

    def _infer(self, name: str, version: str, request: Request) -> Response:
        refusal = _unsupported(request)
        if refusal is not None:
            return refusal
        found = self._find(name, version)
        if isinstance(found, Response):
            return found
        published, loaded = found
        asked = _parse(request.body)
        inputs = {}
        for tensor in asked.inputs:
            _refuse_later(tensor.parameters)
            if tensor.name in inputs:
                raise BadInput(f"input {tensor.name!r} is given twice")
            inputs[tensor.name] = tensors.decode(tensor.name, tensor.datatype, tensor.shape, tensor.data)
        outputs = None if asked.outputs is None else [output.name for output in asked.outputs]
        if version:
            answer = published.answer_by(loaded, self._gate, inputs, outputs)
        else:
            answer = published.answer(self._gate, self._helpers, inputs, outputs)
        return Response(200, _encoder.encode(_answered(name, asked.id, answer)))


def _answered(name: str, request_id: str, answer: Answer) -> _InferResponse:
    loadable = answer.loaded.loadable
    parameters: dict[str, Any] = {"wherry_variant": loadable.variant}
    if answer.fallback:
        parameters["wherry_fallback"] = True
    datatypes = _datatypes(loadable.interface)
    return _InferResponse(
        model_name=name,
        model_version=answer.loaded.version,
        id=request_id,
        parameters=parameters,
        outputs=[
            _ResponseTensor(
                name=output, datatype=datatypes[output], shape=list(array.shape), data=tensors.encode(array)
            )
            for output, array in answer.outputs.items()
        ],
    )


def _datatypes(interface: Interface) -> dict[str, str]:
    return {spec.name: spec.datatype for spec in interface.outputs}


def _parse(body: bytes | bytearray) -> _InferRequest:
    try:
        asked = _infer.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not an inference request: {error}") from error
    _refuse_later(asked.parameters)
    for output in asked.outputs or ():
        _refuse_later(output.parameters)
    return asked


def _refuse_later(parameters: dict[str, Any]) -> None:
    for name, message in _LATER.items():
        if parameters.get(name):
            raise BadInput(message)


def _unsupported(request: Request) -> Response | None:
    if "inference-header-content-length" in request.headers:
        return failure(400, _LATER["binary_data_size"])
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind not in ("application/json", "text/json", "application/x-www-form-urlencoded", ""):
        # curl -d sends the form type when it is not told otherwise: what counts is whether the body parses
        return failure(415, f"content type {kind[:80]!r} is not supported: send application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        return failure(415, "compressed requests are not supported")
    return None


def _versions(published: Published) -> list[str]:
    return list(dict.fromkeys(loaded.version for loaded in published.loaded()))


def _described(spec: TensorSpec) -> dict[str, Any]:
    shape = [axis if isinstance(axis, int) else -1 for axis in spec.shape]
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape}


def _get(request: Request) -> Response | None:
    return None if request.method == "GET" else _wrong_method("GET")


def _post(request: Request) -> Response | None:
    return None if request.method == "POST" else _wrong_method("POST")


def _wrong_method(allowed: str) -> Response:
    return Response(405, _encoder.encode({"error": f"use {allowed}"}), {"Allow": allowed})


def _json(value: Any, status: int = 200) -> Response:
    return Response(status, _encoder.encode(value))


def failure(status: int, message: str) -> Response:
    """Return a refusal as the protocol writes it."""
    return Response(status, _encoder.encode({"error": message}))
