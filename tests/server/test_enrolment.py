"""Ways in for devices, beside the token of one: many, by a person, by a key; and ways out and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.server.fleet_kit import fleet, run
from tests.server.harness import Running, csr, enrol, in_database, running
from wherry_server import clones, hellos, revocation
from wherry_server import enrolment_requests as requests
from wherry_shared import wire


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("enrolment")) as found:
        yield found


def public(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def code(answer: object) -> str:
    return str(answer.json()["code"])  # type: ignore[attr-defined]


def test_a_device_waits_until_a_person_accepts_its_key(server: Running) -> None:
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    token = server.enrolment_token(uses=2, hold=True, labels={"site": "north"})
    for _ in range(3):  # it asks again and again, and is one request
        waits = enrol(server, token, "held", csr_pem=csr(key), labels={"line": "4"})
        assert (waits.status_code, code(waits)) == (503, "enrolment_pending")
    assert code(enrol(server, token, "held", csr_pem=csr(other))) == "enrolment_pending"
    with server.http() as http, server.http(server.token("viewer")) as viewer:
        assert viewer.get("/api/v1/enrolment-requests").status_code == 403
        listed = {one["key"]: one for one in http.get("/api/v1/enrolment-requests").json()}
        mine, theirs = requests.key_of(public(key)), requests.key_of(public(other))
        assert (listed[mine]["state"], listed[mine]["name"]) == ("pending", "held")
        assert code(http.post("/api/v1/enrolment-requests/held/accept")) == "request_unknown", "two ask under that name"
        short = {one: one.removeprefix("sha256:")[:12] for one in (mine, theirs)}
        assert viewer.post(f"/api/v1/enrolment-requests/{short[mine]}/accept").status_code == 403
        assert http.post(f"/api/v1/enrolment-requests/{short[theirs]}/refuse").json()["state"] == "refused"
        assert http.post(f"/api/v1/enrolment-requests/{short[mine]}/accept").json()["state"] == "expected"
    third = enrol(server, token, "third", csr_pem=csr())
    assert code(third) == "enrolment_refused", "the token was good for two requests"
    assert code(enrol(server, token, "held", csr_pem=csr(other))) == "enrolment_refused"
    let_in = enrol(server, token, "held", csr_pem=csr(key), labels={"line": "4"})
    assert let_in.status_code == 200
    again = enrol(server, token, "held", csr_pem=csr(key))
    assert wire.parse(wire.EnrolAnswer, again.content).device == wire.parse(wire.EnrolAnswer, let_in.content).device
    with server.http() as http:
        assert http.get("/api/v1/devices/held").json()["labels"] == {"site": "north", "line": "4"}


def test_a_key_that_is_expected_needs_no_secret_and_no_other_key_gets_in(server: Running) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with server.http() as http:
        body = {"public_key": public(key), "name": "factory-7", "labels": {"site": "south"}}
        made = http.post("/api/v1/enrolment-requests", json=body).json()
        assert code(http.post("/api/v1/enrolment-requests", json={"public_key": "x"})) == "key_invalid"
    assert code(enrol(server, made["token"], "factory-7")) == "enrolment_refused", "the token is no secret"
    answer = enrol(server, made["token"], "its-own-name", csr_pem=csr(key))
    assert answer.status_code == 200, answer.text
    assert enrol(server, made["token"], "its-own-name", csr_pem=csr(key)).status_code == 200, "the answer got lost"
    with server.http() as http:
        shown = http.get("/api/v1/devices/factory-7").json()
        assert (shown["labels"], shown["id"]) == (
            {"site": "south"},
            wire.parse(wire.EnrolAnswer, answer.content).device,
        )
        assert [
            one["state"] for one in http.get("/api/v1/enrolment-requests").json() if one["key"] == made["key"]
        ] == []


def test_a_batch_token_lets_so_many_in_and_no_more(server: Running) -> None:
    token = server.enrolment_token(uses=3)
    assert [enrol(server, token, f"batch-{n}").status_code for n in range(4)] == [200, 200, 200, 403]
    in_database(
        server.settings, lambda c: c.exec_driver_sql("UPDATE enrolment_token SET expires_at = 1, uses_left = 9")
    )
    assert code(enrol(server, token, "batch-9")) == "enrolment_refused"


def test_a_device_that_was_away_for_long_renews_until_the_grace_ends_and_then_needs_a_person(server: Running) -> None:
    device = server.device("away")

    def expired(days_ago: float) -> None:
        at = requests.now_us() - int(days_ago * 86_400 * 1_000_000)
        sql = f"UPDATE device SET certificate_expires_at = {at} WHERE name = 'away'"
        in_database(server.settings, lambda c: c.exec_driver_sql(sql))

    with server.as_device(device) as as_device, server.http() as http:

        def renew() -> int:
            body = wire.encode(wire.RenewRequest(format=1, csr_pem=csr(None, device.device)))
            return as_device.post("/device/v1/renew", content=body).status_code

        expired(days_ago=364)
        assert renew() == 200
        expired(days_ago=366)
        assert renew() == 403
        assert code(as_device.get("/device/v1/offer")) == "certificate_lapsed"
        assert http.post("/api/v1/devices/away/readmit").status_code == 200
        assert renew() == 200


def test_who_was_revoked_is_let_in_again_and_who_was_cloned_is_not(server: Running) -> None:
    device = server.device("back")
    with server.as_device(device) as as_device, server.http() as http:
        http.post("/api/v1/devices/back/revoke")
        assert as_device.get("/device/v1/offer").status_code == 403
        http.post("/api/v1/devices/back/readmit")
        assert as_device.get("/device/v1/offer").status_code == 204
        in_database(
            server.settings,
            lambda c: c.exec_driver_sql(
                "UPDATE device SET state = 'quarantined', state_reason = 'cloned' WHERE name = 'back'"
            ),
        )
        assert code(http.post("/api/v1/devices/back/readmit")) == "device_cloned"
        assert as_device.get("/device/v1/offer").status_code == 403


def test_a_key_that_a_person_named_lets_one_device_in_and_never_back(server: Running) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with server.http() as http:
        made = http.post("/api/v1/enrolment-requests", json={"public_key": public(key)}).json()
        assert enrol(server, made["token"], "stolen", csr_pem=csr(key)).status_code == 200
        assert code(enrol(server, made["token"], "its-twin", csr_pem=csr(key))) == "enrolment_refused"
        assert http.post("/api/v1/devices/stolen/revoke").status_code == 200
        assert code(enrol(server, made["token"], "its-twin", csr_pem=csr(key))) == "enrolment_refused"
        assert code(enrol(server, made["token"], "stolen", csr_pem=csr(key))) == "name_taken"
        assert http.post("/api/v1/devices/stolen/decommission").status_code == 200
        assert code(enrol(server, made["token"], "stolen", csr_pem=csr(key))) == "enrolment_refused", "the name is free"
        # a person lets it in again: by a token, here one that wants the key accepted, or by naming the key again
        held = server.enrolment_token(hold=True)
        assert code(enrol(server, held, "stolen", csr_pem=csr(key))) == "enrolment_pending"
        assert http.post("/api/v1/enrolment-requests/stolen/accept").json()["state"] == "expected"
        assert enrol(server, held, "stolen", csr_pem=csr(key)).status_code == 200


def test_a_key_is_one_devices_and_a_copied_one_is_nobodys(server: Running) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    token = server.enrolment_token(uses=2)
    assert enrol(server, token, "first-of-image", csr_pem=csr(key)).status_code == 200
    for again in (token, server.enrolment_token(hold=True)):
        assert code(enrol(server, again, "second-of-image", csr_pem=csr(key))) == "key_taken"
    with server.http() as http:
        assert [one for one in http.get("/api/v1/enrolment-requests").json() if one["name"] == "second-of-image"] == []
        sql = "UPDATE device SET state = 'quarantined', state_reason = 'cloned' WHERE name = 'first-of-image'"
        in_database(server.settings, lambda c: c.exec_driver_sql(sql))
        assert code(enrol(server, token, "second-of-image", csr_pem=csr(key))) == "key_taken"
        assert http.post("/api/v1/devices/first-of-image/decommission").status_code == 200
        assert code(enrol(server, token, "first-of-image", csr_pem=csr(key))) == "key_taken", "others have it, too"
    assert enrol(server, token, "first-of-image").status_code == 200, "another key, by the use that is left"


def test_what_a_request_claims_is_not_in_the_certificate(server: Running) -> None:
    victim = server.device("claimed")
    key = ec.generate_private_key(ec.SECP256R1())
    claims = x509.CertificateSigningRequestBuilder(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in (victim.device, "wherry-server")])
    )
    for extension in (
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.DNSName(victim.device)]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
    ):
        claims = claims.add_extension(extension, critical=True)
    text = claims.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    answer = wire.parse(wire.EnrolAnswer, enrol(server, server.enrolment_token(), "claiming", csr_pem=text).content)
    found = x509.load_pem_x509_certificate(answer.certificate_pem.encode())
    assert [one.value for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [answer.device]
    assert answer.device != victim.device
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        found.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_a_device_gets_so_many_certificates_a_day_and_no_more(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation, "CERTIFICATES_PER_DAY_MAX", 3)
    device, other = server.device("greedy"), server.device("modest")

    def renew(who: wire.EnrolAnswer) -> Any:
        with server.as_device(who) as http:
            body = wire.encode(wire.RenewRequest(format=1, csr_pem=csr(None, who.device)))
            return http.post("/device/v1/renew", content=body)

    answers = [renew(device) for _ in range(4)]
    assert [one.status_code for one in answers] == [200, 200, 429, 429]
    assert code(answers[-1]) == "certificates_too_many"
    assert renew(other).status_code == 200
    sql = f"UPDATE device_certificate SET issued_at = issued_at - 86400000001 WHERE device_id = '{device.device}'"
    in_database(server.settings, lambda c: c.exec_driver_sql(sql))
    assert renew(device).status_code == 200, "a day later"


# --- clones -------------------------------------------------------------------------------------

STREAMS: dict[wire.StreamName, tuple[str, int, int]] = {"report": ("e1", 1, 1)}
HELLOS = [
    # (boot, stream, at by the device's clock, next number if not 1) of hellos → whether they show that the identity was copied
    ("one place", [("a", "s", 1), ("a", "s", 2), ("a", "s", 3)], False),
    ("boots of one machine", [("a", "s", 1), ("b", "s", 2), ("c", "s", 3), ("d", "s", 4)], False),
    ("a journal begun anew", [("a", "s", 1), ("a", "t", 2), ("a", "t", 3)], False),
    ("two machines, one journal", [("a", "s", 1), ("b", "s", 2), ("a", "s", 3), ("b", "s", 4), ("a", "s", 5)], True),
    ("one machine, two journals", [("a", "s", 1), ("a", "t", 2), ("a", "s", 3), ("a", "t", 4), ("a", "s", 5)], True),
    ("three places", [(one, "s", at) for at, one in enumerate("abcabcabc")], True),
    ("an earlier boot's hello repeated", [("a", "s", 1), ("b", "s", 2), *[("a", "s", 1), ("b", "s", 2)] * 5], False),
    ("held back once, with a clock set back", [("a", "s", 9), ("b", "s", 3), ("a", "s", 10), ("b", "s", 4)], False),
    ("a clone whose clock is behind", [("a", "s", 9, 5), *[("b", "s", 3, 6 + n) for n in (0, 2, 4)]], False),
    (
        "the same, in turns",
        [("a", "s", 90, 5), *[("ab"[n % 2], "s", 90 * (n % 2 == 0), 5 + n) for n in range(1, 7)]],
        True,
    ),
]


@pytest.mark.parametrize(("said", "cloned"), [row[1:] for row in HELLOS], ids=[row[0] for row in HELLOS])
def test_an_identity_in_two_places_is_told_from_a_device_that_moves_on(
    said: list[tuple[Any, ...]], cloned: bool
) -> None:
    places, standing, found = clones.Places(), hellos.Standing(-1, "", {}), False
    for boot, stream, at, *number in said:
        streams = {"report": (stream, 1, number[0] if number else 1)}
        hello = wire.Hello(format=1, device="d", at=at, boot=boot, agent="1", streams=streams)  # type: ignore[arg-type]
        if hellos.is_news(hello, standing):
            places, proof = clones.judge(places, hello, later=hellos.is_later(hello, standing))
            standing, found = hellos.standing(hello), found or proof
    assert found is cloned


def test_a_copied_identity_is_put_into_quarantine_by_what_both_say(tmp_path: Path) -> None:
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)  # which says hello from place "b", as every device of this kit
            for boot in ("a", "b", "a", "b", "b"):
                said = wire.Hello(format=1, device=device.id, at=device.tick(), boot=boot, agent="1", streams=STREAMS)
                await found.ingest.store_batch({"hello": [(device.id, device.frame("hello", said))]})
                (row,) = await found.rows("SELECT state, state_reason FROM device")
                assert tuple(row) == (("quarantined", "cloned") if device.clock >= 5 else ("active", ""))
            (cut,) = await found.rows("SELECT device_id FROM session_cut")
            assert cut.device_id == device.id

    run(work())
