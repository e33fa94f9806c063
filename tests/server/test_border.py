"""What every answer says to browsers, and how much may be asked by somebody who is not known."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from tests.server.harness import NO_TLS, Running, enrol, running
from wherry_server import access, fleet, heads
from wherry_server.app import BODY_BYTES_MAX, ROUTERS
from wherry_server.border import DOCS_CSP, PUBLIC, Headers
from wherry_server.heads import HEAD_BYTES_MAX
from wherry_server.rates import BURST_S, WHO, Rates, TooManyError
from wherry_server.settings import Settings

SAID = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Written out once more: a header that is taken out of the server is missing here."""
OIDC = {"issuer": "https://id.example", "client_id": "w", "public_url": "https://wherry.example"}


def anybody(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=20, verify=NO_TLS)


def test_every_kind_of_answer_tells_browsers_to_be_careful(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    with server.http() as http, anybody(server) as nobody:
        monkeypatch.setattr(fleet, "fleet_state", broken)
        answers = {
            200: http.get("/api/v1/models"),
            401: nobody.get("/api/v1/models"),
            404: http.get("/nowhere"),
            405: http.delete("/api/v1/fleet"),
            413: http.post("/api/v1/tokens", content=b" " * (BODY_BYTES_MAX + 1)),
            422: http.post("/api/v1/tokens", json={}),
            500: http.get("/api/v1/fleet"),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            for name, value in SAID.items():
                assert answer.headers[name] == value, (status, name)
            assert "strict-transport-security" not in answer.headers, "not over plain http"
        docs = nobody.get("/docs")
        assert docs.headers["content-security-policy"] == DOCS_CSP.decode()
        assert nobody.get("/tuf/default/timestamp.json").headers["cache-control"] == "no-cache", (
            "what it says itself stays"
        )


def test_where_people_log_in_no_foreign_script_runs_and_https_stays(tmp_path: Path) -> None:
    with running(tmp_path / "data", oidc=OIDC) as server, anybody(server) as http:
        assert http.get("/docs").status_code == 404
        assert http.get("/redoc").status_code == 404
        answer = http.get("/api/v1/health")
        assert answer.headers["strict-transport-security"] == "max-age=31536000; includeSubDomains"


def test_an_address_that_is_refused_too_often_waits_and_shuts_out_nobody_else(tmp_path: Path) -> None:
    with running(tmp_path / "data", refused_per_s=0.5) as server, server.http() as known, anybody(server) as stranger:
        assert known.get("/api/v1/fleet").status_code == 200
        wrong = {"Authorization": "Bearer wherryapi_wrong"}
        statuses = [stranger.get("/api/v1/fleet", headers=wrong).status_code for _ in range(5)]
        assert statuses == [401, 401, 429, 429, 429]
        told = stranger.get("/api/v1/fleet")
        assert (told.status_code, told.json()["code"]) == (429, "rate_limited")
        assert int(told.headers["retry-after"]) >= 1
        assert enrol(server, "wherry1.a.b", "x").status_code == 429, "at every door"
        assert known.get("/api/v1/fleet").status_code == 200, "who was let in before is let in"
        with server.http(server.token("viewer")) as new:
            assert new.get("/api/v1/fleet").status_code == 429


def test_what_ends_before_anybody_asks_who_it_is_counts_as_refused_too(tmp_path: Path) -> None:
    with running(tmp_path / "data", refused_per_s=0.5) as server, anybody(server) as stranger:
        assert [stranger.get("/nowhere").status_code for _ in range(4)] == [404, 404, 429, 429]
    with running(tmp_path / "data", refused_per_s=0.5) as server, anybody(server) as stranger:
        broken = {"content": b"{", "headers": {"Content-Type": "application/json"}}
        statuses = [stranger.post("/api/v1/tokens", **broken).status_code for _ in range(4)]  # type: ignore[arg-type]
        assert statuses == [422, 422, 429, 429]
        with server.http() as admin:
            assert admin.get("/nowhere").status_code == 429, "nobody knows it yet"


def test_who_was_let_in_may_ask_for_what_is_not_there(tmp_path: Path) -> None:
    with running(tmp_path / "data", refused_per_s=0.5) as server, server.http() as http:
        assert http.get("/api/v1/fleet").status_code == 200
        assert {http.get("/nowhere").status_code for _ in range(6)} == {404}


def test_a_guess_is_not_taken_for_known_by_asking_for_what_is_not_there(tmp_path: Path) -> None:
    with running(tmp_path / "data", refused_per_s=1) as server, anybody(server) as stranger:
        guesses = [{"Authorization": f"Bearer wherryapi_{number}"} for number in range(3)]
        assert {stranger.get("/nowhere", headers=guess).status_code for guess in guesses} == {404}
        statuses = [stranger.get("/api/v1/fleet", headers=guess).status_code for guess in guesses * 3]
        assert 429 in statuses[:4], "each guess would be looked up without an end"
        assert set(statuses[4:]) == {429}


def talk(server: Running, *pieces: bytes) -> bytes:
    """Send pieces until the server hangs up, and return what it said."""
    with socket.create_connection((server.settings.host, server.settings.port), timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            return b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            return b"reset"


PIECE = b"x" * 16_384
ENDLESS = (PIECE,) * (32 * HEAD_BYTES_MAX // len(PIECE))


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /api/v1/health HTTP/1.1\r\nHost: h\r\na: ",
        b"GET /",
        b"POST /device/v1/enrol HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\na: ",
    ],
    ids=["a header", "an address", "a trailer"],
)
def test_a_head_without_end_is_hung_up_on(server: Running, begin: bytes) -> None:
    assert talk(server, begin, *ENDLESS)[:12] in (b"HTTP/1.1 400", b"reset", b"")


def test_a_head_that_is_never_complete_is_hung_up_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_S", 0.2)
    for begin in (b"", b"GET /api/v1/health HTTP/1.1\r\nHost: h\r\n"):
        with socket.create_connection((server.settings.host, server.settings.port), timeout=20) as connection:
            connection.sendall(begin)
            try:
                assert connection.recv(1) == b""
            except ConnectionResetError:
                continue


def test_many_requests_of_one_connection_are_no_long_head(server: Running) -> None:
    one = b"GET /api/v1/health HTTP/1.1\r\nHost: h\r\na: " + b"x" * 8_000 + b"\r\n\r\n"
    every = one * 19 + one.replace(b"Host: h", b"Host: h\r\nConnection: close")
    answered = talk(server, *(every[place : place + 3_000] for place in range(0, len(every), 3_000)))
    assert answered.count(b"HTTP/1.1 200") == 20


def test_a_wrong_enrolment_token_counts_as_refused(tmp_path: Path) -> None:
    with running(tmp_path / "data", refused_per_s=0.5) as server:
        assert [enrol(server, "wherry1.a.b", "x").status_code for _ in range(3)] == [403, 403, 429]


def test_what_is_for_anybody_has_a_limit_by_address_too(tmp_path: Path) -> None:
    with running(tmp_path / "data", public_per_s=1) as server, anybody(server) as http:
        bogus = {"Authorization": "Bearer x"}
        answers = [http.get("/tuf/default/timestamp.json", headers=bogus).status_code for _ in range(8)]
        assert answers[:4] == [200] * 4
        assert 429 in answers


def test_every_operation_for_anybody_is_under_that_limit() -> None:
    for operation in access.operations(module.router for module in ROUTERS):
        if operation.name != "logout":  # under the limit as well, among what belongs to it
            assert operation.path.startswith(PUBLIC) is (operation.need == "public"), operation


def test_a_device_has_a_limit_of_its_own(tmp_path: Path) -> None:
    with running(tmp_path / "data", device_requests_per_s=0.4) as server:
        one, other = server.device("one"), server.device("other")
        with server.as_device(one) as http, server.as_device(other) as quiet:
            statuses = [http.get("/device/v1/offer").status_code for _ in range(4)]
            assert statuses == [204, 204, 429, 429]
            assert quiet.get("/device/v1/offer").status_code == 204


@pytest.mark.parametrize("name", [name for name in WHO if not name.startswith("api_")])
def test_a_limit_gives_a_burst_and_then_its_rate(name: str) -> None:
    now = [0.0]
    rates = Rates(0, 0, lambda: now[0], **{name: 2.0})
    for _ in range(int(2 * BURST_S)):
        rates.count(name, "a")
    with pytest.raises(TooManyError, match=name):
        rates.look(name, "a")
    rates.count(name, "b")
    now[0] = 0.5
    rates.count(name, "a")
    assert getattr(Settings(data=Path()), name) > 0, "there is a limit unless an operator takes it away"


def test_what_is_no_request_passes(tmp_path: Path) -> None:
    import asyncio

    seen = []

    async def app(scope: object, _receive: object, _send: object) -> None:
        seen.append(scope)

    asyncio.run(Headers(app, https=True)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]
