"""Asking the worker over its unix socket, for a candidate that is kept out of the application's process.

One keep-alive connection per thread. A request is never sent twice: when the worker dies with it, asking the next
worker the same could kill that one as well.
"""

from __future__ import annotations

import http.client
import select
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from wherry_shared.bundle import Datatype
from wherry_shared.engines import bf16
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import DATATYPES, DTYPES, Array
from wherry_shared.errors import UnreachableError

MARGIN_S = 5.0
"""What a call may take beyond twice its deadline: the candidate's, then the incumbent's, then queueing."""


class NotJson(Exception):  # noqa: N818 - a fact about the input, handled by the caller
    """An input holds NaN or Inf, which JSON cannot carry."""


class _Output(msgspec.Struct, frozen=True):
    name: str
    datatype: Datatype
    shape: list[int]
    data: list[Any]


class RemoteAnswer(msgspec.Struct, frozen=True):
    """What the worker answered."""

    model_version: str
    outputs: list[_Output]
    parameters: dict[str, Any] = {}

    def tensors(self) -> dict[str, Array]:
        """Return the outputs as arrays; null (NaN or Inf, where the interface allows them) becomes NaN."""
        return {output.name: _array(output) for output in self.outputs}


class _Refused(msgspec.Struct, frozen=True):
    error: str = ""


_encoder = msgspec.json.Encoder()
_answer: msgspec.json.Decoder[RemoteAnswer] = msgspec.json.Decoder(RemoteAnswer)
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

    def __init__(self, path: str, model: str, deadline_s: float) -> None:
        self._path = path
        self._url = f"/v2/models/{model}/infer"
        self._timeout_s = 2 * deadline_s + MARGIN_S
        self._local = threading.local()

    def ask(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> RemoteAnswer:
        """Ask the worker.

        Raises:
            BadInput: the worker says so.
            EngineFault: the model failed, and nobody in the worker could answer instead.
            UnreachableError: `worker_gone`, it is not there or does not serve this model (yet); `worker_died`, it had
                the request and gave no answer in time.
            NotJson: an input cannot be sent.
        """
        body = _body(inputs, outputs)
        connection = self._connection()
        try:
            if connection.sock is None:
                connection.connect()
        except OSError as error:
            raise UnreachableError("worker_gone", f"no worker listens: {error!r}") from error
        try:
            connection.request("POST", self._url, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise UnreachableError("worker_died", f"the worker did not answer: {error!r}") from error
        try:
            if response.status == 200:
                return _answer.decode(data)
            message = _refused.decode(data).error
        except msgspec.DecodeError as error:
            raise UnreachableError("worker_died", f"the worker's answer cannot be read: {error}") from error
        if response.status == 400:
            raise BadInput(message)
        if response.status in (404, 503):
            raise UnreachableError("worker_gone", f"the worker does not serve it: {message}")
        raise EngineFault("run_failed", message)

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


def _array(output: _Output) -> Array:
    if output.datatype == "BF16":  # numbers, as the protocol writes them
        return bf16.narrow(np.array(output.data, np.float32).reshape(output.shape))
    return np.array(output.data, DTYPES[output.datatype]).reshape(output.shape)


def _body(inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> bytes:
    given = []
    for name, value in inputs.items():
        if not isinstance(value, np.ndarray):
            raise BadInput(f"input {name!r} is {type(value).__name__}, expected a numpy array")
        datatype = DATATYPES.get(value.dtype)
        if datatype is None:
            raise BadInput(f"input {name!r} has dtype {value.dtype}, which no interface knows")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise NotJson
        given.append({"name": name, "datatype": datatype, "shape": value.shape, "data": value.ravel().tolist()})
    request: dict[str, Any] = {"inputs": given}
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    return _encoder.encode(request)
