"""Devices: how they become known, and what operators see of them."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from sqlalchemy import insert, update

from tests.server.harness import Running, csr, enrol, in_database
from wherry_agent.daemon import HEARTBEAT_S
from wherry_server.db.tables import Cohort, Device, DeviceModel, Offer, TelemetryWindow, table
from wherry_server.times import now_us
from wherry_shared import wire
from wherry_shared.facts import DeviceFacts, EngineFacts
from wherry_shared.frames import device_key
from wherry_shared.ids import is_device_id
from wherry_shared.sketch import Sketch

pytestmark = pytest.mark.backends


def test_a_device_gets_an_identity_of_its_own(server: Running) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    facts = DeviceFacts(arch="x86_64", engines=[EngineFacts(name="onnxruntime", version="1.32.0", formats=["onnx"])])
    token = server.enrolment_token(labels={"site": "north"})
    answer = enrol(server, token, "press-1", csr_pem=csr(key), labels={"line": "4", "site": "south"}, facts=facts)
    device = wire.parse(wire.EnrolAnswer, answer.content)
    assert is_device_id(device.device)
    master = server.settings.master_key_file.read_bytes()
    assert base64.b64decode(device.mac_key) == device_key(master, device.device)
    certificate = x509.load_pem_x509_certificate(device.certificate_pem.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(device.ca_pem.encode()))
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == device.device
    assert (device.project, device.tuf_path) == ("default", "/tuf/default")
    with server.http() as http:
        shown = http.get("/api/v1/devices/press-1").json()
        assert shown["id"] == device.device
        assert shown["labels"] == {"line": "4", "site": "north"}, "what the operator said counts more"
        assert shown["engines"] == ["onnxruntime 1.32.0"]
        assert http.get(f"/api/v1/devices/{device.device}").json() == shown


@pytest.mark.parametrize(
    "token", ["", "wherry1", "wherry1..", "wherry1.unknown.00", "wherry2.unknown.00", "a.b.c.d", "wherry1.ü.00"]
)
def test_an_unknown_token_enrols_nobody(server: Running, token: str) -> None:
    answer = enrol(server, token, "stranger")
    assert (answer.status_code, answer.json()["code"]) == (403, "enrolment_refused")


def test_a_token_is_good_for_as_many_devices_as_it_says_also_when_they_come_at_once(server: Running) -> None:
    token = server.enrolment_token(uses=5)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: enrol(server, token, f"crowd-{number}"), range(12)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 5 + [403] * 7
    devices = {wire.parse(wire.EnrolAnswer, answer.content).device for answer in answers if answer.status_code == 200}
    assert len(devices) == 5
    with server.http() as http:
        assert len(http.get("/api/v1/devices", params={"name": "crowd-"}).json()["devices"]) == 5
        assert http.get("/api/v1/audit/verify").json()["whole"]


def test_an_enrolment_whose_answer_got_lost_is_repeated_without_harm(server: Running) -> None:
    token = server.enrolment_token(uses=1)
    request = csr()
    first = wire.parse(wire.EnrolAnswer, enrol(server, token, "again", csr_pem=request).content)
    second = wire.parse(wire.EnrolAnswer, enrol(server, token, "again", csr_pem=request).content)
    assert second.device == first.device
    assert second.bearer != first.bearer
    with server.as_device(first) as old, server.as_device(second) as new:
        assert old.post("/device/v1/logs", json=[]).status_code == 401
        assert new.post("/device/v1/logs", json=[]).status_code == 204


def test_another_key_does_not_get_a_name_that_is_taken(server: Running) -> None:
    server.device("unique")
    answer = enrol(server, server.enrolment_token(), "unique")
    assert (answer.status_code, answer.json()["code"]) == (409, "name_taken")


def _rsa_request() -> str:
    key = rsa.generate_private_key(65537, 2048)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


_ECDSA_SHA256, _NOTHING_KNOWN = bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06082a8648ce3d04037f")
"""Object identifiers of an algorithm that signs requests, and of none."""


def _altered_request(part: bytes = b"", other: bytes = b"") -> str:
    der = bytearray(x509.load_pem_x509_csr(csr().encode()).public_bytes(serialization.Encoding.DER))
    if part:
        der[der.rindex(part) :] = der[der.rindex(part) :].replace(part, other, 1)
    else:
        der[-1] ^= 1
    body = base64.encodebytes(bytes(der)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: "",
        lambda: "not a request",
        lambda: csr(ec.generate_private_key(ec.SECP384R1())),
        _rsa_request,
        _altered_request,
        lambda: _altered_request(_ECDSA_SHA256, _NOTHING_KNOWN),
        lambda: "x" * 20_000,
    ],
    ids=["empty", "text", "other curve", "rsa", "altered", "signed by nothing known", "huge"],
)
def test_a_request_that_is_not_a_sound_p256_one_is_refused(server: Running, make: object) -> None:
    token = server.enrolment_token(uses=1)
    answer = enrol(server, token, "unsound", csr_pem=make())  # type: ignore[operator]
    assert (answer.status_code, answer.json()["code"]) == (422, "csr_invalid")
    assert enrol(server, token, f"sound-{now_us()}").status_code == 200, "the refusal used the token up"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"name": "../etc"}, "bad_name"),
        ({"name": ""}, "bad_name"),
        ({"labels": {"a b": "c"}}, "labels_invalid"),
        ({"labels": {"a": "c" * 200}}, "labels_invalid"),
        ({"labels": {str(number): "x" for number in range(40)}}, "labels_invalid"),
        ({"format": 9}, "message_format"),
    ],
)
def test_bad_names_labels_and_formats_are_refused(server: Running, fields: dict[str, object], code: str) -> None:
    answer = enrol(server, server.enrolment_token(), **{"name": "plain", **fields})
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_only_the_right_secret_speaks_for_a_device(server: Running) -> None:
    device, other = server.device("secret-1"), server.device("secret-2")
    for token in (
        f"{device.device}:{other.bearer}",
        f"{device.device}:",
        device.bearer,
        f"{device.device[:-1]}x:{device.bearer}",
        server.admin,
    ):
        with server.http(token) as http:
            answer = http.post("/device/v1/logs", json=["x"])
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), token


def test_a_revoked_device_gets_nothing_more_and_its_name_stays_taken(server: Running) -> None:
    device = server.device("revoked")
    with server.http(server.token("operator")) as http:
        assert http.post("/api/v1/devices/revoked/revoke").json() == {"device": device.device, "state": "revoked"}
        assert http.get("/api/v1/devices/revoked").json()["state"] == "revoked"
    with server.as_device(device) as http:
        answer = http.post("/device/v1/logs", json=["x"])
    assert (answer.status_code, answer.json()["code"]) == (403, "device_revoked")
    assert enrol(server, server.enrolment_token(), "revoked").status_code == 409


def test_the_name_of_a_decommissioned_device_is_free_again(server: Running) -> None:
    for _ in range(2):
        device = server.device("replaced")
        with server.http() as http:
            for _ in range(2):
                assert http.post(f"/api/v1/devices/{device.device}/decommission").status_code == 200
            assert http.get(f"/api/v1/devices/{device.device}").json()["name"] == f"replaced~{device.device}"
        with server.as_device(device) as http:
            assert http.post("/device/v1/logs", json=["x"]).status_code == 403
    assert server.device("replaced").device


def test_devices_are_listed_page_by_page_and_filtered(server: Running) -> None:
    names = [f"page-{number}" for number in range(5)]
    devices = [server.device(name) for name in names]
    _say(server, devices[1].device, "pager", state="trial")
    _say(server, devices[2].device, "pager", state="confirmed")
    with server.http() as http:
        first = http.get("/api/v1/devices", params={"name": "page-", "limit": 3}).json()
        second = http.get("/api/v1/devices", params={"name": "page-", "limit": 3, "after": first["next"]}).json()
        assert [device["name"] for device in first["devices"] + second["devices"]] == names
        assert second["next"] == ""

        def found(**parameters: str) -> list[str]:
            return [device["name"] for device in http.get("/api/v1/devices", params=parameters).json()["devices"]]

        assert found(model="pager") == names[1:3]
        assert found(model="pager", state="trial") == [names[1]]
        assert found(model="other", state="trial") == []
        assert found(name="page_") == [], "an underscore is no wildcard"
        cohort = {"name": "late-pages", "selector": "name in (page-3, page-4)", "created_by": "me"}
        in_database(
            server.settings,
            lambda c: c.execute(insert(Cohort).values(project_id="default", created_at=now_us(), **cohort)),
        )
        assert found(cohort="late-pages") == names[3:]
        assert http.get("/api/v1/devices", params={"cohort": "none"}).json()["code"] == "cohort_unknown"
        assert set(found(state="active")) >= set(names)


def test_a_device_shows_what_runs_and_why(server: Running) -> None:
    device = server.device("shown")
    _say(
        server,
        device.device,
        "shower",
        state="confirmed",
        manifest="sha256:" + "a" * 64,
        running="sha256:" + "a" * 64,
        running_variant="int8",
        reason="health_errors",
        detail="3 of 20 failed",
        body={
            "variants": [
                {
                    "id": "int8",
                    "outcome": "serving",
                    "why": "41 µs",
                    "engine": "onnxruntime 1.32.0",
                    "peak_memory_bytes": 7,
                    "latency_p50_us": 41.0,
                    "latency_p99_us": 99.0,
                }
            ]
        },
    )
    _measure(server, device.device, "shower", "sha256:" + "a" * 64, [1000.0] * 99 + [9000.0])
    with server.http() as http:
        model = http.get("/api/v1/devices/shown").json()["models"][0]
    assert (model["variant"], model["why"], model["engine"]) == ("int8", "41 µs", "onnxruntime 1.32.0")
    assert (model["reason"], model["detail"], model["peak_memory_bytes"]) == ("health_errors", "3 of 20 failed", 7)
    assert (model["canary_p50_us"], model["canary_p99_us"]) == (41.0, 99.0)
    assert model["latency"]["requests"] == 100
    assert model["latency"]["p50_us"] == pytest.approx(1000, rel=0.05)


def test_what_was_tried_of_a_candidate_is_not_said_of_what_serves_in_its_place(server: Running) -> None:
    device = server.device("gone-back")
    candidate = {
        "id": "int8",
        "outcome": "failed",
        "why": "41 µs",
        "engine": "onnxruntime 1.32.0",
        "peak_memory_bytes": 7,
    }
    _say(
        server,
        device.device,
        "shower",
        state="returned",
        manifest="sha256:" + "b" * 64,
        running="sha256:" + "a" * 64,
        running_variant="int8",
        reason="health_errors",
        body={"variants": [candidate]},
    )
    with server.http() as http:
        model = http.get("/api/v1/devices/gone-back").json()["models"][0]
    assert (model["variant"], model["why"], model["engine"], model["peak_memory_bytes"]) == ("int8", "", "", 0)
    assert model["variants"] == [candidate]


def test_why_the_version_runs_that_a_device_went_back_to_is_said_where_it_reports_it(server: Running) -> None:
    device = server.device("gone-back-told")
    candidate = {"id": "int8", "outcome": "failed", "why": "41 µs", "engine": "onnxruntime 1.32.0"}
    serving = {"id": "int8", "outcome": "serving", "why": "52 µs", "engine": "onnxruntime 1.31.0"}
    _say(
        server,
        device.device,
        "shower",
        state="returned",
        manifest="sha256:" + "b" * 64,
        running="sha256:" + "a" * 64,
        running_variant="int8",
        reason="health_errors",
        body={"variants": [candidate], "serving": serving},
    )
    with server.http() as http:
        model = http.get("/api/v1/devices/gone-back-told").json()["models"][0]
    assert (model["why"], model["engine"]) == ("52 µs", "onnxruntime 1.31.0")
    assert model["variants"] == [candidate]


def test_a_device_is_said_to_know_its_offer_once_it_spoke_of_it(server: Running) -> None:
    device = server.device("offered")
    offer = {"device_id": device.device, "project_id": "default", "epoch": 5, "serial": 3, "envelope": b"{}"}
    times = {"issued_at": now_us(), "expires_at": now_us() + 10**9}
    in_database(server.settings, lambda c: c.execute(insert(Offer).values(models={}, **offer, **times)))

    def known() -> int:
        with server.http() as http:
            serial: int = http.get("/api/v1/devices/offered").json()["offer"]["known_serial"]
            return serial

    assert known() == 0
    _say(server, device.device, "offer-model", state="fetching", body={"serial": 3})
    assert known() == 3


def test_the_fleet_is_counted_with_simulated_devices_apart(server: Running) -> None:
    with server.http() as http:
        before = http.get("/api/v1/fleet").json()["devices"]
        real = server.device("counted")
        for number in range(2):
            swarm = server.device(f"swarm-{number}", simulated="true")
            _say(server, swarm.device, "counter", state="confirmed", running="sha256:" + "b" * 64)
        _say(server, real.device, "counter", state="failed", running="")
        after = http.get("/api/v1/fleet").json()
    assert after["devices"]["real"]["active"] == before["real"]["active"] + 1
    assert after["devices"]["simulated"]["active"] == before["simulated"]["active"] + 2
    counter = after["models"]["counter"]
    assert counter["states"] == {"confirmed": {"real": 0, "simulated": 2}, "failed": {"real": 1, "simulated": 0}}
    assert counter["versions"]["none"] == {"real": 1, "simulated": 0}


def test_a_device_with_nothing_to_say_but_its_heartbeat_counts_as_heard(server: Running) -> None:
    idle = server.device("idle")

    def heard(seconds_ago: float) -> int:
        moment = now_us() - int(seconds_ago * 1_000_000)
        change = update(Device).where(table(Device).c.id == idle.device).values(last_seen_at=moment)
        in_database(server.settings, lambda c: c.execute(change))
        with server.http() as http:
            return int(http.get("/api/v1/fleet").json()["devices"]["real"]["seen_recently"])

    assert heard(2.5 * HEARTBEAT_S) == heard(0), "one that was lost makes nobody silent"
    assert heard(3600) == heard(0) - 1


def test_log_lines_come_when_an_operator_asks(server: Running) -> None:
    device = server.device("logger")
    with server.http(server.token("viewer")) as http:
        assert http.post("/api/v1/devices/logger/logs").status_code == 403
        assert http.get("/api/v1/devices/logger/logs").json() == {"requested_at": 0, "received_at": 0, "lines": []}
    with server.http(server.token("operator")) as http, server.as_device(device) as own:
        asked = http.post("/api/v1/devices/logger/logs")
        assert asked.status_code == 202
        assert own.post("/device/v1/logs", content=b"{").status_code == 422
        assert own.post("/device/v1/logs", json=[f"line {number}" for number in range(300)]).status_code == 204
        found = http.get("/api/v1/devices/logger/logs").json()
    assert found["requested_at"] == asked.json()["requested_at"] <= found["received_at"]
    assert found["lines"] == [f"line {number}" for number in range(100, 300)]


def _say(server: Running, device: str, model: str, **fields: object) -> None:
    row = {
        "device_id": device,
        "model": model,
        "project_id": "default",
        "updated_at": now_us(),
        "running": "",
        **fields,
    }
    in_database(server.settings, lambda c: c.execute(insert(DeviceModel).values({"body": {}, **row})))


def _measure(server: Running, device: str, model: str, manifest: str, values: list[float]) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    window = wire.Window(
        model=model,
        manifest=manifest,
        variant="int8",
        arm="incumbent",
        start=1,
        duration_us=1,
        requests=len(values),
        latency_us={"0": sketch.to_wire()},
    )
    row = {
        "device_id": device,
        "epoch": "e",
        "seq": 1,
        "position": 0,
        "project_id": "default",
        "model": model,
        "manifest": manifest,
        "variant": "int8",
        "arm": "incumbent",
        "start": 1,
        "duration_us": 1,
        "requests": len(values),
        "body": wire.encode(window),
    }
    in_database(server.settings, lambda c: c.execute(insert(TelemetryWindow).values(row)))


# --- renewal --------------------------------------------------------------------------------------


def ask_renewal(client: httpx.Client, csr_pem: str) -> httpx.Response:
    return client.post("/device/v1/renew", content=wire.encode(wire.RenewRequest(format=1, csr_pem=csr_pem)))


def test_a_device_renews_its_certificate_over_a_new_key_and_keeps_its_secrets(server: Running) -> None:
    device = server.device("renewing")
    key = ec.generate_private_key(ec.SECP256R1())
    with server.as_device(device) as client, server.http() as http:
        before = http.get("/api/v1/devices/renewing").json()["certificate_expires_at"]
        answer = ask_renewal(client, csr(key, device.device))
        assert answer.status_code == 200, answer.text
        certificate = x509.load_pem_x509_certificate(
            wire.parse(wire.RenewAnswer, answer.content).certificate_pem.encode()
        )
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(device.ca_pem.encode()))
        assert certificate.public_key() == key.public_key()
        first = x509.load_pem_x509_certificate(device.certificate_pem.encode())
        assert certificate.subject == first.subject
        assert certificate.serial_number != first.serial_number
        assert client.post("/device/v1/logs", json=[]).status_code == 204, "the bearer stays"
        assert http.get("/api/v1/devices/renewing").json()["certificate_expires_at"] >= before
        assert http.get("/api/v1/audit/verify").json()["whole"]


@pytest.mark.parametrize(
    "make",
    [
        lambda device: csr(None, "d" * 22),
        lambda device: csr(None, device, "d" * 22),
        lambda device: csr(ec.generate_private_key(ec.SECP384R1()), device),
        lambda _: _rsa_request(),
        lambda _: _altered_request(),
        lambda _: "not a request",
    ],
    ids=["another device", "two devices", "other curve", "rsa", "altered", "text"],
)
def test_a_renewal_for_another_key_or_subject_is_refused(server: Running, make: Callable[[str], str]) -> None:
    device = server.device(f"unsound-{secrets.token_hex(4)}")
    with server.as_device(device) as client:
        answer = ask_renewal(client, make(device.device))
        assert (answer.status_code, answer.json()["code"]) == (422, "csr_invalid")


def test_only_a_known_and_active_device_renews(server: Running) -> None:
    device = server.device("leaving")
    with server.http(f"{device.device}:somebody-elses") as stranger, server.http(f"{'d' * 22}:secret") as unknown:
        assert ask_renewal(stranger, csr(None, device.device)).status_code == 401
        assert ask_renewal(unknown, csr(None, "d" * 22)).status_code == 401
    devices = table(Device)
    in_database(
        server.settings,
        lambda c: c.execute(update(devices).where(devices.c.id == device.device).values(state="revoked")),
    )
    with server.as_device(device) as client:
        answer = ask_renewal(client, csr(None, device.device))
        assert (answer.status_code, answer.json()["code"]) == (403, "device_revoked")
