"""Raw tensors over HTTP as bytes on a wire: what is repeated, what is mixed, what is cut short, and what comes back."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.agent.serving_kit import loadable
from tests.agent.test_serving_http import Endpoint
from tests.conformance import oip_kit
from tests.shared.engines import models
from wherry_agent.serving import protocol, tensors
from wherry_shared.engines import BadInput
from wherry_shared.limits import REQUEST_BYTES_MAX


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path)
    made.publish("scale", loadable(models.scale(tmp_path / "a.onnx", 2.0)))
    made.publish("types", oip_kit.types_model(tmp_path))
    yield made
    made.server.drain(time.monotonic() + 5)


def header(shape: list[int], size: int, **more: Any) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **more}).encode()


def ask(
    sock: socket.socket, text: bytes, blob: bytes, *more: str, model: str = "scale"
) -> tuple[dict[str, str], bytes]:
    """Send one request on an open connection; return status and headers, and the body."""
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        f"Content-Length: {len(text + blob)}",
        f"Inference-Header-Content-Length: {len(text)}",
        *more,
    ]
    sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + text + blob)
    answer = b""
    while b"\r\n\r\n" not in answer:
        chunk = sock.recv(65536)
        assert chunk, "the connection closed instead of answering"
        answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    headers["status"] = first.split()[1]
    while len(body) < int(headers["content-length"]):
        body += sock.recv(65536)
    return headers, body


def read(headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], bytes]:
    length = int(headers["inference-header-content-length"])
    return json.loads(body[:length]), body[length:]


FOUR = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_client_repeats_its_header_and_each_answer_is_its_own(endpoint: Endpoint, family: str):
    sock = endpoint.connect() if family == "tcp" else socket.socket(socket.AF_UNIX)
    if family == "unix":
        sock.settimeout(20)
        sock.connect(str(endpoint.unix_path))
    with sock:
        for number in range(5):
            blob = struct.pack("<4f", number, 2, 3, 4)
            headers, body = ask(sock, header([1, 4], 16), blob)
            said, raw = read(headers, body)
            assert (headers["status"], headers["content-type"]) == ("200", "application/octet-stream")
            assert struct.unpack("<4f", raw) == (2.0 * number, 4, 6, 8)
            assert said["outputs"] == [
                {"name": "y", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
            ]
        for wrong in (FOUR + b"x", FOUR[:-1], b""):
            headers, body = ask(sock, header([1, 4], 16), wrong)
            assert (headers["status"], "raw data" in json.loads(body)["error"]) == ("400", True)
        said, raw = read(*ask(sock, header([2, 4], 32), FOUR * 2))
        assert (said["outputs"][0]["shape"], len(raw)) == ([2, 4], 32)


def test_answers_to_remembered_headers_say_who_gave_them(tmp_path: Path, endpoint: Endpoint):
    with endpoint.connect() as sock:
        assert read(*ask(sock, header([1, 4], 16), FOUR))[0]["model_version"] == "1.0.0"
        endpoint.publish("scale", loadable(models.scale(tmp_path / "b.onnx", 3.0), "1.1.0"))
        said, raw = read(*ask(sock, header([1, 4], 16), FOUR))
        assert (said["model_version"], struct.unpack("<4f", raw)[0]) == ("1.1.0", 3.0)
        endpoint.publish("other", loadable(models.scale(tmp_path / "c.onnx", 4.0), model="other"))
        assert read(*ask(sock, header([1, 4], 16), FOUR, model="other"))[0]["model_name"] == "other"


def test_what_is_remembered_is_bounded_and_new_ids_are_not(endpoint: Endpoint, monkeypatch):
    monkeypatch.setattr(protocol, "PLANS_MAX", 3)
    plans = endpoint.server._protocol._plans
    with endpoint.connect() as sock:
        for rows in range(1, 8):
            assert ask(sock, header([rows, 4], 16 * rows), FOUR * rows)[0]["status"] == "200"
            assert len(plans) <= 3
        before = dict(plans)
        for number in range(5):
            said, _ = read(*ask(sock, header([1, 4], 16, id=str(number)), FOUR))
            assert said["id"] == str(number)
        assert plans == before


def test_text_of_other_lengths_under_one_header_shape(endpoint: Endpoint):
    def request(texts: list[str]) -> tuple[bytes, bytes]:
        inputs, blobs = [], []
        for name, (_, values) in oip_kit.KINDS.items():
            array = np.array(texts, np.object_) if name == "BYTES" else values
            blob = bytes(tensors.to_bytes(array))
            inputs.append(
                {"name": f"in_{name}", "datatype": name, "shape": [3], "parameters": {"binary_data_size": len(blob)}}
            )
            blobs.append(blob)
        return json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode(), b"".join(blobs)

    with endpoint.connect() as sock:
        for texts in (["a", "b", "c"], ["b", "a", "c"], ["", "ab", "c"], ["ü", "", "c"]):
            said, raw = read(*ask(sock, *request(texts), model="types"))
            sizes = {row["name"]: row["parameters"]["binary_data_size"] for row in said["outputs"]}
            start = 0
            for name, size in sizes.items():
                if name == "out_BYTES":
                    found = tensors.from_bytes("y", "BYTES", [3], raw[start : start + size]).tolist()
                start += size
            assert (found, start) == (texts, len(raw))


def test_a_body_that_is_nothing_but_the_tensor(endpoint: Endpoint):
    with endpoint.connect() as sock:
        for rows in (1, 3):
            said, raw = read(*ask(sock, b"", FOUR * rows))
            assert (said["outputs"][0]["shape"], struct.unpack("<4f", raw[:16])) == ([rows, 4], (2, 4, 6, 8))
        for blob in (b"", FOUR + b"x"):
            headers, _ = ask(sock, b"", blob)
            assert headers["status"] == "400"
        headers, body = ask(sock, b"", FOUR, model="types")
        assert (headers["status"], "one input" in json.loads(body)["error"]) == ("400", True)


def test_bodies_are_compressed_both_ways_on_request_only(endpoint: Endpoint):
    text = header([1, 4], 16)
    with endpoint.connect() as sock:
        for coding, pack, unpack in (
            ("gzip", gzip.compress, gzip.decompress),
            ("deflate", zlib.compress, zlib.decompress),
        ):
            packed = pack(text + FOUR)
            lines = (
                f"Content-Encoding: {coding}",
                f"Accept-Encoding: {coding}",
                f"Inference-Header-Content-Length: {len(text)}",
            )
            sock.sendall(
                "\r\n".join(["POST /v2/models/scale/infer HTTP/1.1", f"Content-Length: {len(packed)}", *lines]).encode()
                + b"\r\n\r\n"
                + packed
            )
            head, _, body = sock.recv(65536).partition(b"\r\n\r\n")
            assert f"Content-Encoding: {coding}".encode() in head
            assert unpack(body).endswith(struct.pack("<4f", 2, 4, 6, 8))
        for accept in ("gzip, deflate", "gzip;q=0", "br", "*", ""):
            headers, _ = ask(sock, text, FOUR, f"Accept-Encoding: {accept}")
            assert "content-encoding" not in headers, accept
        for broken in (b"no gzip", gzip.compress(text)[:-3], gzip.compress(text) + b"more"):
            headers, body = ask(sock, b"", broken, "Content-Encoding: gzip")
            assert (headers["status"], bool(json.loads(body)["error"])) == ("400", True)
        bomb = gzip.compress(bytes(REQUEST_BYTES_MAX + 1), 9)
        headers, body = ask(sock, b"", bomb, "Content-Encoding: gzip")
        assert (headers["status"], "more than" in json.loads(body)["error"]) == ("413", True)


def test_large_tensors_arrive_in_pieces_and_leave_from_where_they_lie(tmp_path: Path, endpoint: Endpoint):
    endpoint.publish("image", oip_kit.image_model(tmp_path))
    values = np.arange(300_000, dtype=np.float32)
    with endpoint.connect() as sock:
        for _ in range(3):
            text = header([2, 150_000], values.nbytes)
            _, raw = read(*ask(sock, text, values.tobytes(), model="image"))
            assert np.array_equal(np.frombuffer(raw, np.float32), 2 * values)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "word"),
    [
        ("FP32", [2], b"\0" * 7, "8"),
        ("BOOL", [2], b"\0\2", "0 or 1"),
        ("BYTES", [1], b"\1\0\0", "too few"),
        ("BYTES", [2], b"\0\0\0\0\1\0\0\0", "7 bytes|1 bytes"),
        ("BYTES", [1], b"\xff\xff\xff\xff", "bytes"),
        ("BYTES", [1], b"\1\0\0\0\xff", "UTF-8"),
        ("BYTES", [1], b"\0\0\0\0x", "follow"),
        ("BYTES", [60_000_000], b"\0" * 8, "too few"),
        ("FP8", [1], b"\0", "not supported"),
    ],
)
def test_raw_bytes_that_are_no_tensor(datatype: str, shape: list[int], data: bytes, word: str):
    with pytest.raises(BadInput, match=word):
        tensors.from_bytes("x", datatype, shape, data)


def test_raw_tensors_lie_where_they_came_unless_that_is_not_aligned():
    data = np.arange(16, dtype=np.uint8)
    aligned = tensors.from_bytes("x", "FP32", [4], data.data)
    assert np.shares_memory(aligned, data)
    shifted = np.empty(17, np.uint8)
    assert not np.shares_memory(tensors.from_bytes("x", "FP32", [4], shifted.data[1:]), shifted)
    assert tensors.from_bytes("x", "FP32", [0, 3], b"").shape == (0, 3)
    large = np.ones(100_000, np.float32)
    assert np.shares_memory(np.frombuffer(tensors.to_bytes(large), np.float32), large)
    assert bytes(tensors.to_bytes(large[::2])) == large[::2].tobytes()


@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize(
    ("datatype", "dtype", "largest", "beyond"),
    [
        ("FP16", np.float16, 65519.99, 65520.0),
        ("FP32", np.float32, 3.4028235e38, 3.4028236e38),
        ("BF16", np.uint16, 3.3895e38, 3.4e38),
        ("INT8", np.int8, 127, 128),
        ("UINT64", np.uint64, 2**64 - 1, 2**64),
    ],
)
def test_numbers_in_json_end_where_their_datatype_does(datatype: str, dtype, largest, beyond, count: int):
    def decode(value: Any) -> np.ndarray:
        return tensors.decode("x", datatype, [count], msgspec.Raw(json.dumps([value] * count).encode()))

    assert decode(largest).dtype == dtype
    with pytest.raises(BadInput, match="out of"):
        decode(beyond)
