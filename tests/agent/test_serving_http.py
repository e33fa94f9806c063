"""The endpoint over real sockets: the Open Inference Protocol in JSON, and HTTP as clients get it wrong."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http import client as http_client
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agent.serving_kit import infer_body, loadable, until
from tests.shared.engines import models
from wherry_agent.answering.arms import Counter, load_variant
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.published import Published
from wherry_agent.answering.registry import Registry
from wherry_agent.serving import http, listener, tensors
from wherry_agent.serving.http import HEAD_BYTES_MAX, BadRequest, Connection, body_length, parse_head, read_chunks
from wherry_agent.serving.inference import MESSAGE_CHARS_MAX, Inference, View
from wherry_agent.serving.listener import HttpServer
from wherry_agent.serving.protocol import Protocol
from wherry_shared.bundle import Bounds, Interface, TensorSpec
from wherry_shared.digest import of_file
from wherry_shared.engines import BadInput
from wherry_shared.limits import REQUEST_BYTES_MAX
from wherry_shared.wire import Sum


class Endpoint:
    """A served registry on TCP and unix."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry()
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.unix_path = folder / "http.sock"
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(self.unix_path))
        unix.listen()
        self.server = HttpServer([self.tcp, unix], Protocol(self.registry, RunGate(), Helpers()))
        self.server.start()

    def publish(self, name: str, active, incumbent=None, trial: str = "") -> None:
        self.registry.publish(
            name,
            Published(
                active=load_variant(active),
                counter=Counter(active, "candidate" if trial else "incumbent", trial),
                incumbent=load_variant(incumbent) if incumbent else None,
                incumbent_counter=Counter(incumbent, "incumbent") if incumbent else None,
                trial=trial,
            ),
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def raw(self, data: bytes) -> bytes:
        """Send bytes, close the sending side, return everything that comes back."""
        with self.connect() as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := sock.recv(65536):
                answer += chunk
            return answer

    def call(self, method: str, path: str, body: Any = None, *headers: str) -> tuple[int, Any]:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers]
        return parse(self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + data))


def parse(answer: bytes) -> tuple[int, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path)
    made.publish("scale", loadable(models.scale(tmp_path / "a.onnx", 2.0)))
    yield made
    made.server.drain(time.monotonic() + 5)


INFER = "/v2/models/scale/infer"
ONES = infer_body([[1.0, 1.0, 1.0, 1.0]])


def test_server_and_model_metadata(endpoint: Endpoint):
    status, about = endpoint.call("GET", "/v2")
    assert (status, about["name"], "binary_tensor_data" in about["extensions"]) == (200, "wherry", True)
    assert endpoint.call("GET", "/v2/health/live") == (200, {"live": True})
    assert endpoint.call("GET", "/v2/health/ready") == (200, {"ready": True})
    expected = {
        "name": "scale",
        "versions": ["1.0.0"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    }
    assert endpoint.call("GET", "/v2/models/scale") == (200, expected)
    assert endpoint.call("GET", "/v2/models/scale/versions/1.0.0") == (200, expected)
    assert endpoint.call("GET", "/v2/models/scale/ready") == (200, {"name": "scale", "ready": True})
    assert endpoint.call("GET", "/v2/models/scale/versions/1.0.0/ready")[0] == 200


def test_a_server_without_models_says_in_code_and_body_that_it_is_not_ready(endpoint: Endpoint):
    endpoint.registry.withdraw("scale")
    assert endpoint.call("GET", "/v2/health/ready") == (503, {"ready": False})


def test_the_index_leaves_out_what_does_not_answer_where_that_is_asked(endpoint: Endpoint):
    path = "/v2/repository/index"
    answers = {"name": "scale", "version": "1.0.0", "state": "READY"}
    endpoint.registry.go_cold("swapped")
    swapped = {"name": "swapped", "state": "UNAVAILABLE", "reason": "it is being swapped"}
    for everything in (None, {}, {"ready": False}, {"ready": None}):
        status, rows = endpoint.call("POST", path, everything)
        assert (status, sorted(rows, key=lambda row: row["name"])) == (200, [answers, swapped])
    assert endpoint.call("POST", path, {"ready": True}) == (200, [answers])
    status, answer = endpoint.call("POST", path, {"ready": "yes"})
    assert (status, "ready" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    "parameters",
    [
        {"sequence_id": None},
        {"sequence_start": None},
        {"sequence_end": None},
        {"binary_data_output": None},
        {"wherry_generation": None},
        {"priority": None},
        {"timeout": None},
        {"timeout": 0.5},
        {"timeout": 500_000},
        {"somebody_elses": None},
    ],
)
def test_a_parameter_that_is_null_is_absent_and_a_timeout_may_have_a_fraction(endpoint: Endpoint, parameters):
    status, answer = endpoint.call("POST", INFER, {**ONES, "parameters": parameters})
    assert (status, answer.get("error")) == (200, None)
    assert answer["outputs"][0]["data"] == [2.0, 2.0, 2.0, 2.0]


def test_infer_answers_with_id_version_variant_and_requested_outputs(endpoint: Endpoint):
    status, answer = endpoint.call("POST", INFER, {**ONES, "id": "42", "outputs": [{"name": "y"}]})
    assert status == 200
    assert answer == {
        "model_name": "scale",
        "model_version": "1.0.0",
        "id": "42",
        "parameters": {"wherry_variant": "float"},
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0] * 4}],
    }
    nothing = {"id": None, "parameters": None, "outputs": []}
    assert endpoint.call("POST", INFER, {**ONES, **nothing})[1]["outputs"] == answer["outputs"], "null is absence"
    flat = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": [1, 2, 3, 4, 5, 6, 7, 8]}]}
    assert endpoint.call("POST", INFER, flat)[1]["outputs"][0]["data"] == [2.0, 4, 6, 8, 10, 12, 14, 16]


def test_explicit_versions_answer_only_while_they_are_loaded_and_are_no_evidence(tmp_path: Path, endpoint: Endpoint):
    old = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    new = loadable(models.scale(tmp_path / "b.onnx", 3.0), "1.1.0")
    endpoint.publish("scale", new, old, trial="t")
    assert endpoint.call("GET", "/v2/models/scale")[1]["versions"] == ["1.1.0", "1.0.0"]
    assert endpoint.call("POST", INFER, ONES)[1]["model_version"] == "1.1.0"
    for version, value in (("1.0.0", 2.0), ("1.1.0", 3.0)):
        status, answer = endpoint.call("POST", f"/v2/models/scale/versions/{version}/infer", ONES)
        assert (status, answer["model_version"], answer["outputs"][0]["data"][0]) == (200, version, value)
    published = endpoint.registry.get("scale")
    assert published is not None
    assert published.counter.stats().requests == 1
    assert published.incumbent_counter is not None
    assert published.incumbent_counter.stats().requests == 0
    status, answer = endpoint.call("POST", "/v2/models/scale/versions/0.9.0/infer", ONES)
    assert status == 404
    assert "1.1.0, 1.0.0" in answer["error"]


def change(**what: Any) -> dict[str, Any]:
    return {"inputs": [{**ONES["inputs"][0], **what}]}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "not an inference request"),
        (b"{", "not an inference request"),
        (b"\xff\xfe", "not an inference request"),
        (b"[" * 100_000, "not an inference request"),
        ({}, "inputs"),
        ({"inputs": []}, "missing"),
        ({"inputs": [ONES["inputs"][0]] * 2}, "given twice"),
        (change(name="z"), "no such input"),
        (change(datatype="FP64"), "dtype"),
        (change(datatype="BF16", data=[1, 2, 3, 3.4e38]), "out of the range"),
        (change(datatype="nope"), "not supported"),
        (change(shape=[1, 5]), "asks for 5"),
        (change(shape=[-1, 4]), "cannot be"),
        (change(shape=[1] * 40), "cannot be"),
        (change(shape=[1 << 40, 1 << 40]), "at most"),
        (change(shape=[4]), "shape"),
        (change(data=["1", "2", "3", "4"]), "not FP32 values"),
        (change(data=[1, 2, 3, None]), "not FP32 values"),
        (change(data=[True, False, True, True]), "not FP32 values"),
        (change(data={"a": 1}), "not FP32 values"),
        (change(data=[1, 2, 3, 1e39]), "out of the range"),
        (change(data=[[[[[[[[[[[[[[[[[[[[1, 2, 3, 4]]]]]]]]]]]]]]]]]]]]), "deep"),
        ({**ONES, "outputs": [{"name": "nope"}]}, "no such output"),
        (change(parameters={"binary_data_size": 16}), "has data in JSON and says"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4]}]}, "neither data nor"),
        ({**ONES, "id": "x" * 2000}, "characters"),
        ({**ONES, "parameters": {"sequence_start": "yes"}}, "sequence_start"),
        ({**ONES, "parameters": {"priority": "high"}}, "priority"),
        ({**ONES, "outputs": [{"name": "y", "parameters": {"classification": -1}}]}, "classification"),
    ],
)
def test_every_bad_request_is_400_with_its_reason(endpoint: Endpoint, body: Any, word: str):
    status, answer = endpoint.call("POST", INFER, body)
    assert status == 400
    assert word in answer["error"]
    published = endpoint.registry.get("scale")
    assert published is not None
    assert published.counter.stats().errors == 0, "the caller's fault is no evidence"


def test_an_error_does_not_repeat_megabytes_of_what_was_sent(endpoint: Endpoint):
    status, answer = endpoint.call("POST", INFER, change(name="z" * 100_000))
    assert (status, len(answer["error"]) <= 1000) == (400, True)


def test_a_number_about_an_answer_is_counted_with_the_version_that_gave_it(tmp_path: Path, endpoint: Endpoint):
    old = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    new = loadable(models.scale(tmp_path / "b.onnx", 3.0), "1.1.0")
    endpoint.publish("scale", new, old, trial="t")
    said = {"name": "agreed", "value": 0.5}
    for path in ("versions/1.0.0/tell", "versions/1.1.0/tell", "tell"):
        assert endpoint.call("POST", f"/v2/models/scale/{path}", said) == (200, {})
    published = endpoint.registry.get("scale")
    assert published is not None
    assert published.incumbent_counter is not None
    assert published.counter.stats().metrics == {"agreed": Sum(count=2, total=1.0)}
    assert published.incumbent_counter.stats().metrics == {"agreed": Sum(count=1, total=0.5)}
    assert published.counter.news() is not None, "the supervisor will hear of it"
    for body, status in [
        ({"name": "Agreed", "value": 1}, 400),
        ({"name": "agreed", "value": 1e13}, 400),
        ({"name": "agreed", "value": "1"}, 400),
        ({"name": "agreed"}, 400),
        (b"[", 400),
    ]:
        assert endpoint.call("POST", "/v2/models/scale/tell", body)[0] == status
    assert endpoint.call("POST", "/v2/models/scale/versions/0.9.0/tell", said)[0] == 404
    assert endpoint.call("POST", "/v2/models/other/tell", said)[0] == 404
    assert endpoint.call("GET", "/v2/models/scale/tell")[0] == 405


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", (), 404),
        ("GET", "/v2/nope", (), 404),
        ("GET", "/v2/models/other", (), 404),
        ("GET", "/v2/models/other/ready", (), 404),
        ("GET", INFER, (), 405),
        ("POST", "/v2/health/live", (), 405),
        ("POST", INFER, ("Inference-Header-Content-Length: 10",), 400),
        ("POST", INFER, ("Inference-Header-Content-Length: 1e3",), 400),
        ("POST", INFER, ("Inference-Header-Content-Length: 100000",), 400),
        ("POST", INFER, ("Content-Type: text/html",), 415),
        ("POST", INFER, ("Content-Encoding: gzip",), 400),
        ("POST", INFER, ("Content-Encoding: br",), 415),
        ("POST", "/v2/repository/models/scale/load", (), 403),
        ("POST", "/v2/repository/models/scale/unload", (), 403),
        ("GET", "/v2/cudasharedmemory/status", (), 400),
        ("GET", "/v2/trace/setting", (), 400),
        ("GET", "/v2/models/scale/trace/setting", (), 400),
        ("GET", "/v2/logging", (), 400),
    ],
)
def test_other_paths_methods_and_types_are_refused(endpoint: Endpoint, method, path, headers, status):
    found, answer = endpoint.call(method, path, ONES if method == "POST" else None, *headers)
    assert found == status
    assert answer["error"]


def chunks(framed: bytes, *headers: bytes, path: str = "/v2") -> bytes:
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Transfer-Encoding: chunked", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + framed


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v2\r\n\r\n", 400),
        (b"GET /v2 HTTP/2.0\r\n\r\n", 505),
        (b"GET /v2 HTTP/1.1\nHost: x\n\r\n\r\n", 400),
        (b"GET v2 HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\n folded: x\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nContent-Length : 3\r\n\r\nabc", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nConnection: close\r\n\r\n", 405),
        (chunks(b"0\r\n\r\n", b"Connection: close"), 405),
        (chunks(b"3\r\nabc\r\n0\r\n\r\n", b"Content-Length: 3"), 400),
        (chunks(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), 400),
        (chunks(b"0\r\n\r\n").replace(b"1.1", b"1.0"), 400),
        (chunks(b"0\r\n\r\n").replace(b": chunked", b": gzip, chunked"), 501),
        (chunks(b"0\r\n\r\n").replace(b": chunked", b": xchunked"), 501),
        (chunks(b"3\nabc\n0\n\n" + b" " * 300), 431),
        (chunks(b"\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b"-3\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b"+3\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b"3_0\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b" 3\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b"2\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks(b"4\r\nabc"), 400),
        (chunks(b"0\r\nX: a\nb\r\n\r\n"), 400),
        (chunks(b"0\r\n" + (b"X: " + b"x" * 1000 + b"\r\n") * 20), 431),
        (chunks(b"3;" + b"x" * 300 + b"\r\nabc\r\n0\r\n\r\n"), 431),
        (chunks(b"%x\r\n" % (REQUEST_BYTES_MAX + 1)), 413),
        (chunks(b"ffffffffffffffff\r\n"), 413),
        (chunks(b"f" * 17 + b"\r\n"), 400),
        (f"POST /v2 HTTP/1.1\r\nContent-Length: {REQUEST_BYTES_MAX + 1}\r\n\r\n".encode() + b"x" * 1000, 413),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc", 400),
        (b"GET /v2 HTTP/1.1\r\nX: " + b"x" * (HEAD_BYTES_MAX + 1) + b"\r\n\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\n" + b"a: b\r\n" * 100 + b"\r\n", 431),
    ],
)
def test_what_is_not_http_gets_an_answer_and_a_closed_connection(endpoint: Endpoint, data: bytes, status: int):
    answer = endpoint.raw(data)
    assert parse(answer)[0] == status
    assert b"Connection: close" in answer
    assert endpoint.call("GET", "/v2/health/live")[0] == 200


def request(body: Any, *headers: str) -> bytes:
    data = json.dumps(body).encode()
    return (
        "\r\n".join([f"POST {INFER} HTTP/1.1", f"Content-Length: {len(data)}", *headers]).encode() + b"\r\n\r\n" + data
    )


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """Return the head of the next answer, and what came behind it."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        chunk = sock.recv(65536)
        assert chunk, "the connection closed instead of answering"
        answer += chunk
    head, end, rest = answer.partition(b"\r\n\r\n")
    return head + end, rest


def read_answer(sock: socket.socket) -> tuple[bytes, bytes]:
    head, body = read_head(sock)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(65536)
    assert len(body) == length
    return head, body


def read_one(sock: socket.socket) -> tuple[int, Any]:
    head, body = read_answer(sock)
    return int(head.split()[1]), json.loads(body)


def test_one_connection_answers_many_requests_whatever_the_pieces(endpoint: Endpoint):
    with endpoint.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = request(ONES)
        for piece in (1, 7, 64, len(data)):
            for start in range(0, len(data), piece):
                sock.sendall(data[start : start + piece])
            assert read_one(sock)[0] == 200
        bad = request({"inputs": []})
        sock.sendall(bad)
        assert read_one(sock)[0] == 400
        sock.sendall(data)
        assert read_one(sock)[0] == 200, "a refused request leaves the connection usable"


@pytest.mark.parametrize(
    "sent", [b"POST /v2 HTTP/1.1\r\nHost", b"POST /v2 HTTP/1.1\r\nContent-Length: 100000\r\n\r\nabc"]
)
def test_a_request_that_does_not_end_is_refused_in_time(endpoint: Endpoint, monkeypatch, sent: bytes):
    monkeypatch.setattr(http, "REQUEST_SECONDS_MAX", 0.4)
    monkeypatch.setattr(http, "LIMIT_SECONDS_OFF", 0.0)
    with endpoint.connect() as sock:
        sock.sendall(sent)
        status, answer = read_one(sock)
    assert (status, "in time" in answer["error"]) == (408, True)


def test_the_time_that_one_request_had_left_is_not_the_next_ones(endpoint: Endpoint):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        connection._limit(0.05)  # as if the last request had come just before its deadline
        theirs.sendall(b"POST /v2 HTTP/1.1\r\nContent-Length: 6\r\n\r\nabc")
        late = threading.Timer(0.4, theirs.sendall, [b"def"])
        assert connection.take_up()
        late.start()
        request = connection.read()
        assert request is not None
        assert bytes(request.body) == b"abcdef"
        late.join()


def test_pipelined_requests_are_answered_in_order(endpoint: Endpoint):
    answers = endpoint.raw(b"".join(request({**ONES, "id": str(n)}) for n in range(5)))
    ids = [json.loads(part.partition(b"\r\n\r\n")[2])["id"] for part in answers.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert ids == ["0", "1", "2", "3", "4"]


def test_the_connection_closes_when_the_client_asks_for_it(endpoint: Endpoint):
    with endpoint.connect() as sock:
        sock.sendall(request(ONES, "Connection: close"))
        assert read_one(sock)[0] == 200
        assert sock.recv(10) == b""
    with endpoint.connect() as sock:
        sock.sendall(request(ONES).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        assert read_one(sock)[0] == 200
        assert sock.recv(10) == b""


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/health/ready", "/v2/models/scale", "/v2/nope", INFER, "/ofrep/v1/configuration"]
)
def test_head_is_answered_as_get_without_its_body(endpoint: Endpoint, path: str):
    lines = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with endpoint.connect() as sock:
        sock.sendall(lines)
        wanted, body = read_answer(sock)
        assert body
        for _ in range(2):  # a body would be taken for the head of the second answer
            sock.sendall(lines.replace(b"GET", b"HEAD"))
            assert read_head(sock) == (wanted, b"")


def test_an_old_client_that_asks_to_stay_is_told_that_it_may(endpoint: Endpoint):
    data = request(ONES, "Connection: Keep-Alive").replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with endpoint.connect() as sock:
        for _ in range(2):
            sock.sendall(data)
            head, _ = read_answer(sock)
            assert b"\r\nConnection: keep-alive\r\n" in head
        sock.sendall(request(ONES))
        assert b"connection:" not in read_answer(sock)[0].lower(), "HTTP/1.1 stays without a word"


def test_a_client_that_expects_a_go_ahead_gets_it(endpoint: Endpoint):
    head, _, body = request(ONES, "Expect: 100-continue").partition(b"\r\n\r\n")
    with endpoint.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_one(sock)[0] == 200


@pytest.mark.parametrize("size", [1, 3, 50, 10_000])
@pytest.mark.parametrize("piece", [1, 17, 65_536])
def test_a_body_in_chunks_is_the_body_however_it_is_cut(endpoint: Endpoint, size: int, piece: int):
    text = json.dumps(ONES).encode()
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    framed = b"".join(b"%X;name=value\r\n%b\r\n" % (len(part), part) for part in parts)
    data = chunks(framed + b"000\r\nContent-Length: 7\r\nX-Sum: 1\r\n\r\n", path=INFER)
    with endpoint.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), piece):
            sock.sendall(data[start : start + piece])
        assert read_one(sock)[0] == 200
        sock.sendall(request(ONES))
        assert read_one(sock)[0] == 200, "the connection stays usable"


def test_what_is_pipelined_behind_chunks_is_the_next_request(endpoint: Endpoint):
    text = json.dumps(ONES).encode()
    data = chunks(b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text), path=INFER)
    with endpoint.connect() as sock:
        sock.sendall(data + data + request(ONES, "Connection: close"))
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1 200 OK") == 3


def test_a_client_that_streams_tensors_may_have_them_unaligned(endpoint: Endpoint):
    head = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}]}
    text = json.dumps(head).encode()
    text += b" " * (3 - len(text) % 4)  # the numbers begin at an odd place
    connection = http_client.HTTPConnection("127.0.0.1", endpoint.port, timeout=20)
    pieces = iter([text, np.array([1, 2, 3, 4], np.float32).tobytes()])
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
    connection.request("POST", INFER, pieces, headers, encode_chunked=True)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    assert (answer.status, body["outputs"][0]["data"]) == (200, [2, 4, 6, 8])


def test_chunks_that_do_not_end_are_refused_in_time(endpoint: Endpoint, monkeypatch):
    monkeypatch.setattr(http, "REQUEST_SECONDS_MAX", 0.4)
    monkeypatch.setattr(http, "LIMIT_SECONDS_OFF", 0.0)
    with endpoint.connect() as sock:
        sock.sendall(chunks(b"5\r\nabc"))
        status, answer = read_one(sock)
    assert (status, "in time" in answer["error"]) == (408, True)


def test_many_chunks_together_are_not_above_the_limit(monkeypatch):
    monkeypatch.setattr(http, "REQUEST_BYTES_MAX", 10)
    body, rest = read_chunks(b"5\r\nabcde\r\n5\r\nfghij\r\n0\r\n\r\nrest", lambda: b"")
    assert (bytes(body), rest) == (b"abcdefghij", b"rest")
    with pytest.raises(BadRequest) as caught:
        read_chunks(b"5\r\nabcde\r\n6\r\nfghijk\r\n0\r\n\r\n", lambda: b"")
    assert caught.value.status == 413


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text("0123456789abcdef;\r\n xX", max_size=40).map(str.encode))
def test_no_chunks_make_the_reader_raise_anything_but_its_own_refusal(data: bytes):
    def ended() -> bytes:
        raise BadRequest(400, "the end")

    status = 0
    try:
        body, rest = read_chunks(data, ended)
    except BadRequest as error:
        status = error.status
    else:
        assert len(body) + len(rest) + 5 <= len(data)
    assert status in {0, 400, 413, 431}


def test_a_large_body_and_answer_pass(tmp_path: Path, endpoint: Endpoint):
    wide = models.interface(width=60_000)
    endpoint.publish(
        "wide", loadable(models.scale(tmp_path / "w.onnx", 2.0, width=60_000), model="wide", interface=wide)
    )
    values = np.arange(120_000, dtype=np.float32) / 7
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 60_000], "data": values.tolist()}]}
    status, answer = endpoint.call("POST", "/v2/models/wide/infer", body)
    assert status == 200
    assert np.array_equal(np.array(answer["outputs"][0]["data"], np.float32), 2 * values)


def test_the_unix_socket_serves_the_same(endpoint: Endpoint):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(endpoint.unix_path))
        sock.sendall(request(ONES))
        assert read_one(sock)[1]["outputs"][0]["data"] == [2.0] * 4


def test_more_connections_than_the_cap_wait_and_none_is_refused(endpoint: Endpoint, monkeypatch):
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 4)
    held = [endpoint.connect() for _ in range(4)]
    for sock in held:
        sock.sendall(request(ONES))
        assert read_one(sock)[0] == 200
    with endpoint.connect() as waiting:
        waiting.sendall(request(ONES))
        waiting.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        held[0].close()
        waiting.settimeout(20)
        assert read_one(waiting)[0] == 200
    for sock in held:
        sock.close()


def test_the_longest_idle_connection_makes_room_for_one_that_waits(endpoint: Endpoint, monkeypatch):
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(listener, "IDLE_SECONDS_WHEN_FULL", 0.2)
    oldest, newer = endpoint.connect(), endpoint.connect()
    for sock in (oldest, newer):
        sock.sendall(request(ONES))
        assert read_one(sock)[0] == 200
        # the answer is here before the server's thread waits again: only then is it idle, in this order
        until(lambda: all(client.waiting for client in endpoint.server._clients), "the server's threads wait")
    with endpoint.connect() as waiting:
        waiting.sendall(request(ONES))
        assert read_one(waiting)[0] == 200
        assert oldest.recv(1) == b"", "the oldest was closed"
        newer.sendall(request(ONES))
        assert read_one(newer)[0] == 200
    oldest.close()
    newer.close()


def test_a_moment_without_threads_costs_nobody_an_answer(endpoint: Endpoint, monkeypatch):
    real = threading.Thread.start
    refused: list[str] = []

    def start(thread: threading.Thread) -> None:
        if thread.name == "http" and len(refused) < 2:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with endpoint.connect() as slow, endpoint.connect() as other:
        for _ in range(3):  # who comes in pieces wants a thread of its own, and gets one at last
            slow.sendall(request(ONES)[:30])
            until(lambda: any(not client.waiting for client in endpoint.server._clients), "its request has begun")
            slow.sendall(request(ONES)[30:])
            assert read_one(slow)[0] == 200
        other.sendall(request(ONES))
        assert read_one(other)[0] == 200
    assert len(refused) == 2


HOLDERS = {
    "a model that takes long": ("slow", request(ONES).replace(b"scale", b"slow", 1)),
    "a request that is not whole yet": ("scale", request(ONES)[:-5]),
    "a head that is not whole yet": ("scale", request(ONES)[:20]),
    "a client that does not read": ("scale", request({**ONES, "id": "x" * 1000}) * 40_000),
    "a model that is swapped cold": ("cold", request(ONES).replace(b"scale", b"cold", 1)),
}


@pytest.mark.parametrize("what", HOLDERS)
def test_nobody_waits_for(what: str, endpoint: Endpoint, tmp_path: Path):
    model, data = HOLDERS[what]
    if model == "slow":
        endpoint.publish("slow", loadable(models.slow(tmp_path / "s.onnx", 2.0, turns=30_000), model="slow"))
    if model == "cold":
        endpoint.registry.go_cold("cold")
    held, others = endpoint.connect(), [endpoint.connect() for _ in range(3)]
    sending = threading.Thread(target=_send_what_goes, args=(held, data), daemon=True)
    sending.start()
    until(lambda: any(client.aside for client in endpoint.server._clients), "it has a thread of its own")
    for _ in range(3):
        for other in others:
            other.sendall(request(ONES))
            assert read_one(other)[0] == 200
    assert any(client.aside for client in endpoint.server._clients), "it has not ended meanwhile"
    if model == "cold":
        endpoint.registry.withdraw("cold")
    held.close()
    sending.join(20)
    for other in others:
        other.close()
    until(lambda: not endpoint.server._clients, "all connections are let go", 60)


def test_what_a_request_waited_for_does_not_make_its_model_a_long_one(endpoint: Endpoint, monkeypatch):
    """Else threads that wait for one another would each ask for a thread of its own, for ever."""
    waited, real = 0.02, Inference.run

    def run(*args: Any, **more: Any) -> Any:
        time.sleep(waited)
        return real(*args, **more)

    monkeypatch.setattr(Inference, "run", run)
    for _ in range(3):
        assert endpoint.call("POST", INFER, ONES)[0] == 200
    published = endpoint.registry.get("scale")
    assert published is not None
    assert published.active.notes["view"].expected(16) < waited / 2


def test_a_model_that_takes_longer_is_believed_at_once_and_one_that_was_disturbed_soon_again(endpoint: Endpoint):
    published = endpoint.registry.get("scale")
    assert published is not None
    view = View(published.active)
    assert view.expected(0) == math.inf, "nobody knows yet"
    view.took(50e-6, 16)
    assert (view.expected(16), view.expected(17)) == (50e-6, math.inf)
    view.took(0.05, 16)
    assert view.expected(16) > listener.ALONE_SECONDS
    for _ in range(60):
        view.took(50e-6, 16)
    assert view.expected(16) < listener.SHORT_SECONDS


def _send_what_goes(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the test closes it under this thread
        sock.sendall(data)


def test_draining_answers_what_is_in_flight_and_closes_idle_connections(tmp_path: Path):
    endpoint = Endpoint(tmp_path)
    endpoint.publish("scale", loadable(models.slow(tmp_path / "s.onnx", 2.0, turns=3000)))
    idle = endpoint.connect()
    idle.sendall(request(infer_body([[0.0] * 4])))
    assert read_one(idle)[0] == 200
    busy = endpoint.connect()
    busy.sendall(request(ONES))
    until(lambda: any(not client.waiting for client in endpoint.server._clients), "the slow request is running")
    draining = threading.Thread(target=lambda: endpoint.server.drain(time.monotonic() + 20))
    draining.start()
    assert read_one(busy)[0] == 200
    assert busy.recv(1) == b""
    assert idle.recv(1) == b""
    draining.join(20)
    assert not draining.is_alive()
    idle.close()
    busy.close()


def test_all_datatypes_pass_through_json_and_onnx(tmp_path: Path, endpoint: Endpoint):
    import onnx
    from onnx import TensorProto, helper

    kinds = {
        "BOOL": (TensorProto.BOOL, [True, False]),
        "UINT8": (TensorProto.UINT8, [0, 255]),
        "INT8": (TensorProto.INT8, [-128, 127]),
        "INT16": (TensorProto.INT16, [-32768, 32767]),
        "INT32": (TensorProto.INT32, [-(2**31), 2**31 - 1]),
        "INT64": (TensorProto.INT64, [-(2**63), 2**63 - 1]),
        "UINT64": (TensorProto.UINT64, [0, 2**64 - 1]),
        "FP16": (TensorProto.FLOAT16, [0.5, -2.0]),
        "FP64": (TensorProto.DOUBLE, [0.1, -1e300]),
        "BYTES": (TensorProto.STRING, ["a", "ü"]),
    }
    nodes, inputs, outputs = [], [], []
    for name, (kind, _) in kinds.items():
        nodes.append(helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]))
        inputs.append(helper.make_tensor_value_info(f"in_{name}", kind, ["n"]))
        outputs.append(helper.make_tensor_value_info(f"out_{name}", kind, ["n"]))
    path = models.save(tmp_path / "types.onnx", nodes, inputs, outputs)
    assert onnx.load(path)
    interface = Interface(
        inputs=[TensorSpec(name=f"in_{name}", datatype=name, shape=["n"]) for name in kinds],
        outputs=[TensorSpec(name=f"out_{name}", datatype=name, shape=["n"]) for name in kinds],
        dims={"n": Bounds()},
    )
    plain = loadable(models.scale(tmp_path / "x.onnx", 1.0))
    typed = msgspec.structs.replace(
        plain, model="types", path=str(path), digest=of_file(path), golden_path="", interface=interface
    )
    endpoint.publish("types", typed)
    body = {
        "inputs": [
            {"name": f"in_{name}", "datatype": name, "shape": [2], "data": data} for name, (_, data) in kinds.items()
        ]
    }
    status, answer = endpoint.call("POST", "/v2/models/types/infer", body)
    assert status == 200, answer
    assert {output["name"]: output["data"] for output in answer["outputs"]} == {
        f"out_{name}": data for name, (_, data) in kinds.items()
    }
    for name, value in (("UINT8", 256), ("INT8", -129), ("UINT64", -1), ("INT64", 2**63), ("FP16", 1e6)):
        wrong = {
            "inputs": [
                {**entry, "data": [value, 0]} if entry["datatype"] == name else entry for entry in body["inputs"]
            ]
        }
        status, answer = endpoint.call("POST", "/v2/models/types/infer", wrong)
        assert status == 400, (name, answer)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_no_head_makes_the_parser_raise_anything_but_its_own_refusal(head: bytes):
    status = 0
    try:
        method, path, headers, _ = parse_head(head)
        body_length(headers)
    except BadRequest as error:
        status = error.status
    else:
        assert method
        assert isinstance(path, tuple)
    assert status in {0, 400, 413, 431, 501, 505}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["FP32", "INT8", "UINT64", "BOOL", "BYTES", "FP16"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=12,
    ),
    st.lists(st.integers(-1, 5), max_size=4),
)
def test_any_data_is_an_array_of_its_shape_or_bad_input(datatype: str, data: Any, shape: list[int]):
    try:
        array = tensors.decode(
            "x", datatype, shape, msgspec.Raw(msgspec.json.encode(data) if _encodable(data) else b"1")
        )
    except BadInput:
        return
    assert list(array.shape) == shape


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["FP32", "FP64", "INT32", "UINT8", "FP16"]),
    st.lists(st.integers(0, 255), min_size=1, max_size=40),
    st.sampled_from(["", " ", "\n   ", " " * 70]),
    st.randoms(use_true_random=False),
    st.sampled_from([None, "null", '"7"', "1e400", "[3]", "300.5", "70000", "{}"]),
)
def test_a_long_list_is_read_as_a_short_one_would_be(
    datatype: str, numbers: list[int], gap: str, random: Random, odd: str | None
):
    texts = [
        str(number) if "INT" in datatype else f"{number}.25"
        for number in numbers * (tensors.PIECE_BYTES // len(numbers))
    ]
    if odd is not None:
        texts[random.randrange(len(texts))] = odd
    text = f"[{f',{gap}'.join(texts)}]".encode()
    assert len(text) > tensors.PIECE_BYTES

    def read() -> Any:
        try:
            return tensors.decode("x", datatype, [len(texts)], msgspec.Raw(text)).tolist()
        except BadInput as error:
            return str(error)

    in_pieces = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "PIECE_BYTES", 1 << 40)
        assert in_pieces == read()


def test_a_shape_that_lies_makes_no_array_of_its_size():
    text = msgspec.Raw(b"[" + b"1," * tensors.PIECE_BYTES + b"1]")
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="asks for 67108864"):
            tensors.decode("x", "FP64", [tensors.ELEMENTS_MAX], text)
        assert tracemalloc.get_traced_memory()[1] < 8 * tensors.ELEMENTS_MAX // 10
    finally:
        tracemalloc.stop()


def _encodable(data: Any) -> bool:
    try:
        msgspec.json.encode(data)
    except (OverflowError, msgspec.EncodeError):
        return False
    return True


def test_a_refusal_says_cause_consequence_and_next_step(endpoint: Endpoint, tmp_path: Path):
    endpoint.publish("scale", loadable(models.root(tmp_path / "m.onnx")))
    path = "/v2/models/scale/infer"
    for row, status, rest in (
        ([1.0, 2.0], 400, "the model was not run; next: compare the request with the model's metadata)"),
        ([-1.0] * 4, 500, "the answer is withheld, and held against the model; next: look for what overflows"),
    ):
        got, body = endpoint.call("POST", path, infer_body([row]))
        assert got == status
        cause, _, said = body["error"].partition(" (so: ")
        assert cause.startswith(("input 'x'", "output 'y'"))
        assert said.startswith(rest)
    long = {"inputs": [{"name": "x" * 5000, "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}]}
    _, body = endpoint.call("POST", path, long)
    assert len(body["error"]) == MESSAGE_CHARS_MAX
    assert body["error"].endswith("next: compare the request with the model's metadata)")


def test_a_head_that_was_written_before_is_that_of_this_answer(endpoint: Endpoint):
    def request(rows: int, *headers: str, version: str = "1.1") -> bytes:
        raw = np.full((rows, 4), rows, np.float32).tobytes()
        tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 4], "parameters": {"binary_data_size": len(raw)}}
        said = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        lines = [f"POST {INFER} HTTP/{version}", f"Content-Length: {len(said) + len(raw)}", *headers]
        lines.append(f"Inference-Header-Content-Length: {len(said)}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + said + raw

    asked = [
        (1, request(1), None),
        (1, request(1), None),
        (2, request(2), None),
        (1, request(1, "Accept-Encoding: gzip"), None),
        (2, request(2), None),
        (1, request(1, "Connection: keep-alive", version="1.0"), "keep-alive"),
        (1, request(1, "Connection: close"), "close"),
    ]
    left = endpoint.raw(b"".join(data for _, data, _ in asked))
    for rows, _, connection in asked:
        head, _, left = left.partition(b"\r\n\r\n")
        headers = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
        body, left = left[: int(headers["Content-Length"])], left[int(headers["Content-Length"]) :]
        if "Content-Encoding" in headers:
            body = gzip.decompress(body)
        said = json.loads(body[: int(headers["Inference-Header-Content-Length"])])
        assert said["outputs"][0]["shape"] == [rows, 4]
        assert np.frombuffer(body[-16 * rows :], np.float32).tolist() == [2.0 * rows] * 4 * rows
        assert headers.get("Connection") == connection
    assert left == b""
