"""People log in by OpenID Connect: who they are is checked, what they may follows from their groups, and no foreign page acts as them."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import typer
from joserfc import jwk

from tests.server.harness import NO_TLS, Running, in_database, running
from tests.server.provider import CLIENT, SECRET, Provider, provider
from wherry_server import oidc
from wherry_server.api.login import PAGE_CSP
from wherry_server.cli import login as login_command
from wherry_server.cli.everything import app
from wherry_server.oidc import challenge_of
from wherry_server.sessions import COOKIE, LOGIN_COOKIE
from wherry_server.settings import Oidc, Settings
from wherry_shared.access import LOGIN_FILE
from wherry_shared.errors import RefusedError, WherryError

VERIFIER = "v" * 43


@pytest.fixture(scope="module")
def people() -> Iterator[Provider]:
    with provider() as started:
        yield started


@pytest.fixture(scope="module")
def server(people: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("login") / "data"
    groups = {"admins": [{"role": "admin"}], "lab": [{"role": "operator", "cohorts": ["lab"]}, {"role": "approver"}]}
    with running(folder, oidc={"issuer": people.url, "client_id": CLIENT, "groups": groups}) as started:
        (started.settings.keys_folder / "oidc.secret").write_text(SECRET + "\n")
        yield started


@pytest.fixture(autouse=True)
def honest(people: Provider) -> None:
    people.claims, people.signing, people.algorithm = {}, people.key, "RS256"
    people.person = {"sub": "1", "email": "ann@example.org", "groups": ["lab", "unknown"]}


def browser(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=20, verify=NO_TLS)


def come_back(http: httpx.Client, **asked: Any) -> httpx.Response:
    """Log in as far as the answer to the callback."""
    begun = http.get("/auth/login", params=asked)
    assert begun.status_code == 303, begun.text
    led = httpx.get(begun.headers["location"], trust_env=False)
    return http.get(led.headers["location"])


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_a_browser_logs_in_acts_and_logs_out(server: Running) -> None:
    with browser(server) as http:
        assert http.get("/api/v1/me").status_code == 401
        back = come_back(http, next="/api/v1/fleet")
        assert (back.status_code, back.headers["location"]) == (303, "/api/v1/fleet")
        cookie = back.headers["set-cookie"]
        assert all(word in cookie for word in ("HttpOnly", "SameSite=lax", "Path=/"))
        me = http.get("/api/v1/me").json()
        assert (me["kind"], me["name"]) == ("person", "ann@example.org")
        assert me["grants"] == [
            {"role": "operator", "models": [], "cohorts": ["lab"]},
            {"role": "approver", "models": [], "cohorts": []},
        ]
        csrf = {"X-CSRF-Token": me["csrf_token"]}
        narrow = http.post("/api/v1/cohorts", json={"name": "x", "selector": "all"}, headers=csrf)
        assert code_of(narrow) == (403, "scope_missing")
        kept = {"Cookie": f"{COOKIE}={http.cookies[COOKIE]}"}
        assert http.get("/api/v1/me", headers=kept).status_code == 200
        assert http.post("/auth/logout", headers=csrf).status_code == 204
        assert COOKIE not in http.cookies
        assert http.get("/api/v1/me", headers=kept).status_code == 401, "a copy of the cookie opens nothing any more"
    with server.http() as admin:
        entries = admin.get("/api/v1/audit", params={"actor": "person:ann@example.org"}).json()
        assert [one["action"] for one in entries[:2]] == ["session.end", "session.begin"]


def test_a_foreign_page_changes_nothing(server: Running, people: Provider) -> None:
    people.person["groups"] = ["admins"]
    with browser(server) as http:
        come_back(http)
        csrf = http.get("/api/v1/me").json()["csrf_token"]
        body = {"name": "forged", "selector": "all"}
        for headers in (
            {},
            {"X-CSRF-Token": "0" * 64},
            {"X-CSRF-Token": csrf, "Origin": "https://evil.example"},
            {"X-CSRF-Token": csrf, "Origin": "null"},
        ):
            assert code_of(http.post("/api/v1/cohorts", json=body, headers=headers)) == (403, "csrf_missing")
        own = {"X-CSRF-Token": csrf, "Origin": server.url}
        assert http.post("/api/v1/cohorts", json=body, headers=own).status_code == 201
        session = http.cookies[COOKIE]
        bearer = {"Authorization": f"Bearer {session}"}
    with browser(server) as http:
        assert http.get("/api/v1/me", headers=bearer).status_code == 401, "a cookie is no token of a command line"


FOREIGN = jwk.RSAKey.generate_key(2048, {"kid": "k1"})
LIES: dict[str, dict[str, Any]] = {
    "another nonce": {"claims": {"nonce": "other"}},
    "no nonce": {"claims": {"nonce": None}},
    "for another client": {"claims": {"aud": "other"}},
    "for others, too": {"claims": {"aud": [CLIENT, "other"]}},
    "by another issuer": {"claims": {"iss": "https://other.example"}},
    "expired": {"claims": {"exp": int(time.time()) - 3600}},
    "without an end": {"claims": {"exp": None}},
    "without a subject": {"claims": {"sub": None}},
    "from the future": {"claims": {"iat": int(time.time()) + 7200, "nbf": int(time.time()) + 7200}},
    "an address that nobody verified": {"claims": {"email_verified": False}},
    "groups that are no list": {"claims": {"groups": "admins"}},
    "signed by another key": {"signing": FOREIGN},
    "not signed": {"algorithm": "none"},
    "signed with the public key as a secret": {"algorithm": "HS256"},
    "for us, on behalf of another client": {"claims": {"azp": "other"}},
    "an address that nobody verified, in words": {"claims": {"email_verified": "false"}},
}


@pytest.mark.parametrize("lie", LIES)
def test_who_is_not_proved_is_not_let_in(server: Running, people: Provider, lie: str) -> None:
    for name, value in LIES[lie].items():
        setattr(people, name, value)
    with browser(server) as http:
        assert code_of(come_back(http)) == (403, "login_refused")
        assert COOKIE not in http.cookies


def test_a_token_that_says_whom_it_is_on_behalf_of_is_good(server: Running, people: Provider) -> None:
    people.claims = {"aud": [CLIENT, "other"], "azp": CLIENT, "email_verified": "true"}
    with browser(server) as http:
        assert come_back(http).status_code == 303


def test_clocks_may_differ_by_so_much_and_no_more(server: Running, people: Provider) -> None:
    for claim, offset, status in (
        ("exp", -oidc.LEEWAY_S - 1, 403),
        ("exp", -oidc.LEEWAY_S / 2, 303),
        ("iat", oidc.LEEWAY_S * 10, 403),
        ("iat", oidc.LEEWAY_S, 303),
        ("nbf", oidc.LEEWAY_S * 10, 403),
    ):
        people.claims = {claim: int(time.time() + offset)}
        with browser(server) as http:
            assert come_back(http).status_code == status, (claim, offset)


def test_a_login_ends_in_the_browser_that_began_it_and_once(server: Running, people: Provider) -> None:
    with browser(server) as mine, browser(server) as other:
        begun = mine.get("/auth/login")
        led = httpx.get(begun.headers["location"], trust_env=False).headers["location"]
        assert code_of(other.get(led)) == (403, "login_refused"), "without the cookie of the beginning"
        other.get("/auth/login")
        assert code_of(other.get(led)) == (403, "login_refused"), "with the cookie of another beginning"
        assert mine.get(led).status_code == 303
        assert code_of(mine.get(led)) == (403, "login_refused"), "once more"
    with browser(server) as http:
        stolen = people.authorize({"redirect_uri": "x", "state": "s", "nonce": "n", "code_challenge": "c"}).split("=")[
            1
        ]
        state = http.get("/auth/login").headers["location"].split("state=")[1].split("&")[0]
        code = stolen.split("&")[0]
        assert code_of(http.get("/auth/callback", params={"code": code, "state": state})) == (403, "login_refused")
        http.cookies.set(LOGIN_COOKIE, "AAAA", path="/auth")
        assert code_of(http.get("/auth/callback", params={"code": "c", "state": ""}))[1] == "login_refused"


def test_who_is_in_no_group_that_counts_is_told_so(server: Running, people: Provider) -> None:
    people.person["groups"] = ["unknown"]
    with browser(server) as http:
        assert code_of(come_back(http)) == (403, "login_without_role")


@pytest.mark.parametrize(
    "following", ["//", "//evil.example", "https://evil.example", "/\\evil.example", "evil", "/a?b=//c"]
)
def test_a_login_leads_to_no_foreign_place(server: Running, following: str) -> None:
    with browser(server) as http:
        assert code_of(http.get("/auth/login", params={"next": following})) == (403, "login_refused")


def origin_of_form(page: httpx.Response, server: Running) -> str:
    """Return what a browser says about a page that sends a form to its own server (Fetch, "append a request Origin header")."""
    return "null" if page.headers["referrer-policy"] == "no-referrer" else server.url


def test_the_command_line_gets_a_session_once_the_person_agreed(server: Running) -> None:
    with browser(server) as http:
        page = come_back(http, port=1, challenge=challenge_of(VERIFIER))
        assert page.headers["content-security-policy"] == PAGE_CSP
        assert COOKIE not in http.cookies, "the browser itself is not logged in"
        (ticket,) = re.findall(r'name="ticket" value="([^"]+)"', page.text)
        foreign = http.post("/auth/allow", data={"ticket": ticket}, headers={"Origin": "https://evil.example"})
        assert code_of(foreign) == (403, "login_refused")
        assert code_of(http.post("/auth/allow", data={"ticket": ticket[:-4] + "AAAA"})) == (403, "login_refused")
        led = http.post("/auth/allow", data={"ticket": ticket}, headers={"Origin": origin_of_form(page, server)})
        assert led.headers["location"].startswith("http://127.0.0.1:1/?code=wherrycode_")
        code = led.headers["location"].partition("code=")[2]
        wrong = http.post("/auth/token", json={"code": code, "verifier": "w" * 43})
        assert code_of(wrong) == (403, "login_refused"), "whoever saw the code has not the verifier"
        got = http.post("/auth/token", json={"code": code, "verifier": VERIFIER}).json()
        assert code_of(http.post("/auth/token", json={"code": code, "verifier": VERIFIER})) == (403, "login_refused")
        bearer = {"Authorization": f"Bearer {got['token']}"}
        assert http.get("/api/v1/me", headers=bearer).json()["csrf_token"] == ""
        assert http.get("/api/v1/me", headers={"Authorization": f"Bearer {code}"}).status_code == 401
    with server.http() as admin:
        shown = [one for one in admin.get("/api/v1/sessions").json() if one["kind"] == "cli"]
        assert got["token"] not in json.dumps(shown)
        assert admin.delete(f"/api/v1/sessions/{shown[-1]['id']}").status_code == 204
        assert admin.get("/api/v1/me", headers=bearer).status_code == 401


def test_a_session_ends_by_itself_and_what_a_group_may_is_what_the_settings_say_now(server: Running) -> None:
    with browser(server) as http:
        come_back(http)
        assert http.get("/api/v1/me").status_code == 200
        in_database(server.settings, lambda c: c.exec_driver_sql("UPDATE session SET expires_at = 1"))
        assert http.get("/api/v1/me").status_code == 401


def command(server: Running, *arguments: str) -> Any:
    out = io.StringIO()
    with redirect_stdout(out):
        typer.main.get_command(app).main([*arguments, "--json"], standalone_mode=False)
    return json.loads(out.getvalue())


def test_wherry_login_is_somebody_until_wherry_logout(
    server: Running, no_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_browser(address: str) -> bool:
        def person() -> None:
            with browser(server) as http:
                begun = http.get(address)
                page = http.get(httpx.get(begun.headers["location"], trust_env=False).headers["location"])
                (ticket,) = re.findall(r'name="ticket" value="([^"]+)"', page.text)
                origin = {"Origin": origin_of_form(page, server)}
                allowed = http.post("/auth/allow", data={"ticket": ticket}, headers=origin)
                httpx.get(allowed.headers["location"], trust_env=False)

        threading.Thread(target=person).start()
        return True

    monkeypatch.setattr(login_command.webbrowser, "open", open_browser)
    done = command(server, "--server", server.url, "login")
    assert done["name"] == "ann@example.org"
    file = LOGIN_FILE.expanduser()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [one["role"] for one in command(server, "whoami")["grants"]] == ["operator", "approver"]
    command(server, "logout")
    assert not file.exists()
    with pytest.raises(WherryError) as caught:
        command(server, "whoami")
    assert caught.value.code == "access_missing"


def test_where_nobody_can_log_in_the_way_is_closed(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server, browser(server) as http:
        for answer in (
            http.get("/auth/login"),
            http.get("/auth/callback", params={"state": "s", "code": "c"}),
            http.post("/auth/token", json={"code": "c", "verifier": VERIFIER}),
        ):
            assert code_of(answer) == (404, "login_off")
        http.cookies.set(COOKIE, "wherrysession_x")
        assert http.get("/api/v1/me").status_code == 401


def test_a_session_is_sent_over_no_open_line(tmp_path: Path, people: Provider) -> None:
    wish = {"issuer": people.url, "client_id": CLIENT, "public_url": "http://wherry.example"}
    with running(tmp_path / "data", oidc=wish) as server, browser(server) as http:
        assert code_of(http.get("/auth/login")) == (403, "login_insecure")


def test_over_https_no_other_host_gives_a_browser_cookies_of_this_one(tmp_path: Path, people: Provider) -> None:
    public = "https://wherry.example"
    wish = {"issuer": people.url, "client_id": CLIENT, "public_url": public, "groups": {"lab": [{"role": "operator"}]}}
    with running(tmp_path / "data", oidc=wish) as server, browser(server) as http:
        (server.settings.keys_folder / "oidc.secret").write_text(SECRET)
        begun = http.get("/auth/login")
        login = begun.headers["set-cookie"]
        led = httpx.get(begun.headers["location"], trust_env=False).headers["location"]
        back = http.get(led.removeprefix(public), headers={"Cookie": login.partition(";")[0]})
        session, gone = back.headers.get_list("set-cookie")
        me = http.get("/api/v1/me", headers={"Cookie": session.partition(";")[0]}).json()
        own = {"Cookie": session.partition(";")[0], "X-CSRF-Token": me["csrf_token"], "Origin": public}
        out = http.post("/auth/logout", headers=own).headers["set-cookie"]
        assert http.get("/api/v1/me", headers=own).status_code == 401
    for cookie in (login, session, gone, out):  # RFC 6265bis §4.1.3.2: else browsers take no notice of it
        assert cookie.startswith("__Host-")
        assert {"Secure", "HttpOnly", "Path=/"} <= {part.strip() for part in cookie.split(";")}
        assert "domain" not in cookie.lower()
    assert "Max-Age=0" in gone
    assert "Max-Age=0" in out


def test_a_provider_that_is_another_or_away_logs_nobody_in(tmp_path: Path) -> None:
    import asyncio

    with provider() as liar:
        liar.wrong_issuer = True
        pending = oidc.Pending(state="s", nonce="n", verifier="v", ends_at=0)
        for issuer in (liar.url, "http://127.0.0.1:9", "http://plain.example"):
            found = oidc.Provider(Oidc(issuer=issuer, client_id=CLIENT), SECRET, "http://127.0.0.1/auth/callback")
            with pytest.raises(WherryError) as caught:
                asyncio.run(found.begin(pending))
            assert caught.value.code == "provider_unreachable"


def test_what_is_sealed_is_only_of_its_kind() -> None:
    pending = oidc.Pending(state="s", nonce="n", verifier="v", ends_at=0)
    text = oidc.seal(b"k" * 32, pending)
    assert oidc.unseal(b"k" * 32, text, oidc.Pending) == pending
    assert oidc.unseal(b"o" * 32, text, oidc.Pending) is None
    assert oidc.unseal(b"k" * 32, text, oidc.Agreed) is None
    assert oidc.unseal(b"k" * 32, "ä", oidc.Pending) is None


def test_a_role_that_is_none_is_no_setting(tmp_path: Path) -> None:
    wish = {"issuer": "https://id.example", "client_id": "w", "groups": {"a": [{"role": "king"}]}}
    with pytest.raises(RefusedError, match="king"):
        Settings.load(tmp_path, oidc=wish)
    good = Settings.load(tmp_path, oidc={**wish, "groups": {"a": [{"role": "viewer"}]}})
    good.save()
    assert msgspec.json.decode((tmp_path / "settings.json").read_bytes())["oidc"]["groups"]["a"][0]["role"] == "viewer"
    assert Settings.load(tmp_path).oidc == good.oidc
