"""Asking the worker over its unix socket, for a candidate that is kept out of the application's process.

Tensors go as raw bytes, both ways. One keep-alive connection per thread. A request is never sent twice: when the worker dies with it, asking the next
worker the same could kill that one as well.
"""

from __future__ import annotations

import http.client
import re
import select
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from wherry_agent.serving import tensors
from wherry_shared.bundle import Datatype, Interface
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import DTYPES, Array
from wherry_shared.errors import UnreachableError

HEADER_LENGTH = "Inference-Header-Content-Length"
_SENTENCE = re.compile(r"(?P<cause>.*) \(so: .*; next: (?P<next>.*)\)", re.DOTALL)
MARGIN_S = 5.0
"""What a call may take beyond twice its deadline: the candidate's, then the incumbent's, then queueing."""


class _Parameters(msgspec.Struct, frozen=True):
    binary_data_size: int


class _Output(msgspec.Struct, frozen=True):
    name: str
    datatype: Datatype
    shape: list[int]
    parameters: _Parameters


class _Head(msgspec.Struct, frozen=True):
    """The JSON part of an answer."""

    model_version: str
    outputs: list[_Output]
    parameters: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """What the worker answered."""

    model_version: str
    parameters: Mapping[str, Any]
    tensors: dict[str, Array]


class _Refused(msgspec.Struct, frozen=True):
    error: str = ""


_encoder = msgspec.json.Encoder()
_head: msgspec.json.Decoder[_Head] = msgspec.json.Decoder(_Head)
_refused: msgspec.json.Decoder[_Refused] = msgspec.json.Decoder(_Refused)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class WorkerClient:
    """Calls of one model in the worker."""

    def __init__(self, path: str, model: str, interface: Interface, deadline_s: float) -> None:
        self._path = path
        self._url = f"/v2/models/{model}/infer"
        self._datatypes = {spec.name: spec.datatype for spec in interface.inputs}
        self._timeout_s = 2 * deadline_s + MARGIN_S
        self._local = threading.local()

    def ask(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> RemoteAnswer:
        """Ask the worker.

        Raises:
            BadInput: the worker says so.
            EngineFault: the model failed, and nobody in the worker could answer instead.
            UnreachableError: `worker_gone`, it is not there or does not serve this model (yet); `worker_died`, it had
                the request and gave no answer in time.
        """
        head, parts = self._request(inputs, outputs)
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
        body = b"".join([head, *parts])
        connection = self._connection()
        try:
            if connection.sock is None:
                connection.connect()
        except OSError as error:
            raise UnreachableError("worker_gone", f"no worker listens: {error!r}") from error
        try:
            connection.request("POST", self._url, body, headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise UnreachableError("worker_died", f"the worker did not answer: {error!r}") from error
        try:
            if response.status == 200:
                return _answered(data, response.getheader(HEADER_LENGTH) or "")
            message = _refused.decode(data).error
        except (msgspec.DecodeError, ValueError, BadInput) as error:
            raise UnreachableError("worker_died", f"the worker's answer cannot be read: {error}") from error
        if response.status == 400:
            raise _bad_input(message)
        if response.status in (404, 503):
            raise UnreachableError("worker_gone", f"the worker does not serve it: {message}")
        raise EngineFault("run_failed", message)

    def _request(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None
    ) -> tuple[bytes, list[bytes | memoryview]]:
        """Return the JSON head and the raw tensors of a request."""
        rows, parts = [], []
        for name, value in inputs.items():
            if not isinstance(value, np.ndarray):
                raise BadInput(f"input {name!r} is {type(value).__name__}, expected a numpy array")
            datatype = self._datatypes.get(name)
            if datatype is None:
                raise BadInput(f"no such input: {name!r}")
            if value.dtype != DTYPES[datatype]:
                raise BadInput(f"input {name!r} has dtype {value.dtype}, expected {DTYPES[datatype]}")
            part = tensors.to_bytes(value)
            parameters = {"binary_data_size": len(part)}
            rows.append({"name": name, "datatype": datatype, "shape": value.shape, "parameters": parameters})
            parts.append(part)
        request: dict[str, Any] = {"inputs": rows, "parameters": {"binary_data_output": True}}
        if outputs is not None:
            request["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        return _encoder.encode(request), parts

    def _connection(self) -> _UnixConnection:
        connection: _UnixConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _UnixConnection(self._path, self._timeout_s)
        elif connection.sock is not None and _readable(connection.sock):
            connection.close()  # readable while nothing was asked: the other side closed an idle connection
        return connection


def _readable(sock: socket.socket) -> bool:
    """Tell whether something (or the end) waits to be read; by poll, since an application may have many descriptors."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _bad_input(told: str) -> BadInput:
    """Return what the worker raised, from `BadInput.sentence`."""
    found = _SENTENCE.fullmatch(told)
    return BadInput(found["cause"], next_step=found["next"]) if found is not None else BadInput(told)


def _answered(data: bytes, head_length: str) -> RemoteAnswer:
    """Take an answer apart; the arrays are the caller's, to write to as well.

    Raises:
        ValueError, msgspec.DecodeError, BadInput: it is none.
    """
    at = int(head_length)
    head = _head.decode(memoryview(data)[:at])
    found: dict[str, Array] = {}
    for output in head.outputs:
        part = memoryview(data)[at : at + output.parameters.binary_data_size]
        found[output.name] = tensors.from_bytes(output.name, output.datatype, output.shape, part).copy()
        at += output.parameters.binary_data_size
    if at != len(data):
        raise ValueError(f"{len(data)} bytes, its head speaks of {at}")
    return RemoteAnswer(head.model_version, head.parameters, found)
