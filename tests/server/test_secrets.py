"""No secret is where it does not belong: planted ones are looked for in logs, answers, the audit log, events and the screen."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import httpx
import pytest
import typer

from tests.server.harness import NO_TLS, Running, running
from tests.server.provider import CLIENT, provider
from tests.server.test_access import OPERATIONS, VALUES, stock
from tests.server.test_login import browser, come_back
from wherry_server import dev, fleet
from wherry_server.api.description import BODIES
from wherry_server.cli.everything import app
from wherry_server.sessions import COOKIE
from wherry_server.settings import Settings
from wherry_shared.errors import UnreachableError, WherryError

PLANTED = "planted-client-secret-4711"
PASSWORD = "planted-database-password-4711"
SHOWN_ONCE = {"create_token", "create_enrolment_token", "create_webhook", "enrol", "renew", "fetch_session"}
"""Operations whose answer is a secret."""


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Every line of every logger, however little it matters."""
    for name in ("", "wherry_server", "uvicorn", "httpx", "aiosqlite", "asyncio", "fastapi"):
        caplog.set_level(logging.DEBUG, name)
    caplog.set_level(logging.WARNING, "httpcore")  # below that it tells the headers that the test itself sends
    return caplog


def ways(secret: str) -> list[dict[str, str]]:
    """Headers by which somebody may send a secret, rightly or not."""
    return [
        {"Authorization": f"Bearer {secret}"},
        {"Authorization": f"Bearer {secret}x"},
        {"Authorization": f"Basic {secret}", "X-Api-Key": secret},
        {"Cookie": f"{COOKIE}={secret}"},
    ]


def test_planted_secrets_are_found_nowhere(
    tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with provider() as people:
        people.person["groups"] = ["lab"]
        oidc = {"issuer": people.url, "client_id": CLIENT, "groups": {"lab": [{"role": "admin"}]}}
        limits = {"api_reads_per_s": 0, "api_changes_per_s": 0, "device_requests_per_s": 0, "public_per_s": 0}
        with running(tmp_path / "data", oidc=oidc, **limits) as server:
            people.secret = PLANTED
            (server.settings.keys_folder / "oidc.secret").write_text(PLANTED)
            stock(server, tmp_path)
            device = server.device("planted")
            hook = {"name": "told", "url": "http://127.0.0.1:9/hook"}
            with server.http() as admin, browser(server) as person:
                assert come_back(person).status_code == 303
                session = person.cookies[COOKIE]
                secrets = {
                    "api token": server.admin,
                    "session": session,
                    "csrf token": person.get("/api/v1/me").json()["csrf_token"],
                    "device bearer": device.bearer,
                    "device frame key": device.mac_key,
                    "enrolment token": server.enrolment_token().split(".")[1],
                    "webhook": admin.post("/api/v1/webhooks", json=hook).json()["secret"].removeprefix("whsec_"),
                    "client secret of OIDC": PLANTED,
                    "master key": server.settings.master_key_file.read_bytes().hex(),
                    "key of the device CA": _pem_line(server.settings.keys_folder),
                }
                said = [*_walk(server, [server.admin, f"{device.device}:{device.bearer}"])]
                monkeypatch.setattr(fleet, "fleet_state", _broken)
                failed = admin.get("/api/v1/fleet")
                assert failed.status_code == 500
                said += [failed.text, _commands(server)]
            with server.http() as admin:
                said += [
                    admin.get(f"/api/v1/{path}").text for path in ("audit/export", "webhooks", "tokens", "sessions")
                ]
        places = {"answers": "\n".join(said), "logs": logged.text + repr([record.args for record in logged.records])}
    assert len(places["logs"]) > 1_000, "something was logged at all"
    assert len(said) > 200
    for place, text in places.items():
        found = [name for name, secret in secrets.items() if secret in text]
        assert not found, f"{found} in the {place}"


def _broken(*_: object) -> None:
    raise RuntimeError("on purpose")


def _pem_line(folder: Path) -> str:
    """Return a line from the middle of a private key."""
    texts = [
        file.read_text()
        for file in sorted(folder.iterdir())
        if file.suffix in (".pem", ".key") and b"PRIVATE KEY" in file.read_bytes()
    ]
    return texts[0].splitlines()[2]


def _walk(server: Running, secrets: list[str]) -> Iterator[str]:
    """Ask every operation in every way, and yield what is answered."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20, verify=NO_TLS) as http:
        for operation in OPERATIONS:
            if operation.name in ("follow_rollout", "simulate_rollout"):
                continue  # lasts; takes long
            path = operation.path.format(**VALUES)
            body = {} if operation.method in ("GET", "HEAD", "DELETE") else {"json": BODIES.get(operation.name, {})}
            for secret in secrets[1:] if operation.need == "device" else secrets[:1]:
                for headers in ways(secret):
                    try:
                        answer = http.request(operation.method, path, headers=headers, **body)
                    except httpx.TransportError:  # it hung up after an answer without reading a body to its end
                        answer = http.request(operation.method, path, headers=headers, **body)
                    if operation.name not in SHOWN_ONCE or not answer.is_success:
                        yield answer.text + repr(answer.headers)


def _commands(server: Running) -> str:
    """Return what commands print, whether they succeed or not."""
    out = io.StringIO()
    tree = typer.main.get_command(app)
    with redirect_stdout(out), redirect_stderr(out):
        for arguments in (
            ["health"],
            ["whoami"],
            ["token", "list"],
            ["device", "show", "none"],
            ["rollout", "show", "99"],
        ):
            for token in (server.admin, server.admin + "x"):
                for form in ([], ["--json"]):
                    try:
                        tree.main(["--server", server.url, "--token", token, *arguments, *form], standalone_mode=False)
                    except WherryError as error:
                        out.write(error.diagnostics() + repr(error))
    return out.getvalue()


def test_the_password_of_a_database_is_in_no_error(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    url = f"postgresql+asyncpg://wherry:{PASSWORD}@127.0.0.1:9/wherry"
    with pytest.raises(UnreachableError) as caught:
        dev.init(Settings.load(tmp_path / "data", database=url))
    assert PASSWORD not in caught.value.diagnostics() + logged.text


def test_files_that_hold_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server:
        settings = server.settings
        assert settings.data.stat().st_mode & 0o777 == 0o700
        assert settings.keys_folder.stat().st_mode & 0o777 == 0o700
        private = [file for file in settings.data.rglob("*") if file.is_file() and b"PRIVATE KEY" in file.read_bytes()]
        assert private
        for file in [*private, settings.master_key_file]:
            assert file.stat().st_mode & 0o077 == 0, file
        assert (
            json.loads(
                (settings.data / "settings.json").read_text() if (settings.data / "settings.json").exists() else "{}"
            )
            == {}
        )
