"""Whatever a client sends, it gets an answer that says what is wrong; never a 5xx, and never the end of the worker."""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks, openapi

from tests.agent.serving_kit import DEADLINE_S, WorkerProcess
from tests.conformance import oip_kit

ROOT = Path(__file__).parents[2]
SCHEMA = openapi.from_path(ROOT / "docs/formats/inference.openapi.yaml")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with oip_kit.serving(tmp_path_factory.mktemp("oip")) as process:
        yield process
        assert process.process.poll() is None, "the worker died"
        process.pump()
        stats = [arm for event in process.events for arm in getattr(event, "arms", [])]
        assert not any(arm.errors for arm in stats), "the caller's fault is no evidence"


@SCHEMA.parametrize()
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_answers_are_what_the_description_says(case: Any, served: WorkerProcess):
    with requests.Session() as session:
        session.trust_env = False
        answer = case.call(base_url=f"http://127.0.0.1:{served.port}", session=session, timeout=DEADLINE_S)
    chosen = [checks.not_a_server_error]
    if answer.status_code != 405:  # a method that the path does not have
        chosen = [
            checks.status_code_conformance,
            checks.response_schema_conformance,
            checks.content_type_conformance,
        ]
    case.validate_response(answer, checks=chosen)


def post(served: WorkerProcess, model: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=DEADLINE_S)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


names = st.sampled_from(["x", "y", "in_BYTES", "", "\N{SNOWMAN}" * 100])
numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 4, 16, -1, 2**31, 2**63])
parameters = st.dictionaries(
    st.sampled_from(
        [
            "binary_data_size",
            "shared_memory_region",
            "shared_memory_offset",
            "shared_memory_byte_size",
            "classification",
        ]
    ),
    numbers | st.booleans() | st.text(max_size=5) | st.none(),
    max_size=3,
)
tensors = st.fixed_dictionaries(
    {
        "name": names,
        "datatype": st.sampled_from([*oip_kit.KINDS, "BF16", "FP8", ""]),
        "shape": st.lists(st.integers(-1, 5) | numbers, max_size=4) | st.lists(st.just(1), min_size=20, max_size=20),
    },
    optional={
        "data": st.lists(numbers | st.floats() | st.text(max_size=3) | st.none(), max_size=6),
        "parameters": parameters,
    },
)
bodies = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, max_size=3)},
    optional={
        "id": st.text(max_size=5) | numbers,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_output", "sequence_id", "priority"]), numbers),
        "outputs": st.lists(st.fixed_dictionaries({"name": names}, optional={"parameters": parameters}), max_size=3),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=bodies,
    blob=st.binary(max_size=80),
    header_length=st.none() | st.integers(-2, 400) | st.sampled_from(["", "x", "1e3", "9" * 30]),
    exact=st.booleans(),
)
def test_no_mixture_of_json_and_raw_bytes_makes_it_fail(
    served: WorkerProcess, body: Any, blob: bytes, header_length: Any, exact: bool
):
    text = json.dumps(body).encode()
    headers = {} if header_length is None else {"Inference-Header-Content-Length": str(header_length)}
    if exact:
        headers = {"Inference-Header-Content-Length": str(len(text))}
    for model in ("scale", "types"):
        status, answer = post(served, model, text + blob, headers)
        assert status in (200, 400), answer
        if status == 400:
            assert json.loads(answer)["error"]


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cut=st.integers(0, 120),
    noise=st.binary(max_size=12),
    coding=st.sampled_from([None, "gzip", "deflate", "br", "\xff"]),
)
def test_no_damage_to_a_good_request_makes_it_fail(served: WorkerProcess, cut: int, noise: bytes, coding: str | None):
    text = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}]}
    ).encode()
    whole = text + struct.pack("<4f", 1, 2, 3, 4)
    damaged = whole[:cut] + noise + whole[cut + len(noise) :]
    headers = {"Inference-Header-Content-Length": str(len(text))}
    if coding is not None:
        headers["Content-Encoding"] = coding
    status, answer = post(served, "scale", damaged, headers)
    assert status in (200, 400, 404, 415), answer
    assert post(served, "scale", whole, {"Inference-Header-Content-Length": str(len(text))})[0] == 200
