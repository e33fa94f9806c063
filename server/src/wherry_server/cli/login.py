"""`wherry login`, `logout`, `whoami` and `session`: people, by the OpenID provider of the server."""

from __future__ import annotations

import secrets
import sys
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec
import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import GLOBALS, AsJson, client, date, show, table, when
from wherry_server.secret_files import write_secret
from wherry_shared.access import LOGIN_FILE, LOOPBACK, Access, find_access, unreachable
from wherry_shared.errors import RefusedError

app = typer.Typer(name="session", help="Who is logged in.", no_args_is_help=True)
commands = typer.Typer()
WAIT_S = 300
"""How long a person may take in the browser."""
DONE = b"<!doctype html><title>Wherry</title><p>You are logged in on the command line. This page can be closed."


class _Listener(HTTPServer):
    code = ""


class _Handler(BaseHTTPRequestHandler):
    """Takes the one request by which the browser brings the code."""

    def do_GET(self) -> None:
        """Take the code."""
        assert isinstance(self.server, _Listener)
        self.server.code = (parse_qs(urlsplit(self.path).query).get("code") or [""])[0]
        self.send_response(200 if self.server.code else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(DONE)))
        self.end_headers()
        self.wfile.write(DONE)

    def log_message(self, *_: object) -> None:
        """Say nothing: the request holds a code."""


@commands.command()
def login(
    browser: Annotated[bool, typer.Option(help="Open a browser; else only print where to go.")] = True,
    as_json: AsJson = False,
) -> None:
    """Log in by a browser on this machine; commands then act as you until the session ends."""
    import httpx

    from wherry_server.client import check
    from wherry_server.oidc import challenge_of  # brings cryptography along

    server = (GLOBALS.server or find_access(GLOBALS.server, "not needed yet").server).rstrip("/")
    verifier = secrets.token_urlsafe(48)
    with _Listener(("127.0.0.1", 0), _Handler) as listener:
        asked = {"port": listener.server_address[1], "challenge": challenge_of(verifier)}
        address = f"{server}/auth/login?{urlencode(asked)}"
        sys.stderr.write(f"open in a browser on this machine:\n{address}\n")
        sys.stderr.flush()
        if browser:
            webbrowser.open(address)
        listener.timeout = 1.0
        ends = time.monotonic() + WAIT_S
        while not listener.code and time.monotonic() < ends:
            listener.handle_request()
    if not listener.code:
        raise RefusedError("login_refused", f"nobody logged in within {WAIT_S} s", next_step="try again: wherry login")
    try:
        here = httpx.URL(server).host in LOOPBACK
        answer = httpx.post(
            f"{server}/auth/token",
            json={"code": listener.code, "verifier": verifier},
            timeout=30,
            trust_env=not here,
        )
    except httpx.HTTPError as error:
        raise unreachable(server, error) from error
    got = check(answer).json()
    file = LOGIN_FILE.expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_secret(file, msgspec.json.encode(Access(server=server, token=got["token"])) + b"\n")
    done = {"server": server, "name": got["name"], "expires_at": got["expires_at"], "file": str(file)}
    show(done, as_json, lambda console: console.print(f"logged in as {got['name']} until {date(got['expires_at'])}"))


@commands.command()
def logout(as_json: AsJson = False) -> None:
    """End the session of wherry login and forget it."""
    file = LOGIN_FILE.expanduser()
    if not file.exists():
        raise RefusedError("not_logged_in", "nobody is logged in here", next_step="wherry login")
    with client() as server:
        server.post("/auth/logout")
    file.unlink()
    show({"logged_out": True}, as_json, lambda console: console.print("logged out"))


@commands.command()
def whoami(as_json: AsJson = False) -> None:
    """Show who you are to the server and what was granted to you."""
    with client() as server:
        found = server.plain(calls.show_me())
    found.pop("csrf_token", None)

    def render(console: Console) -> None:
        console.print(f"{found['kind']} {found['name']}, project {found['project']}")
        for one in found["grants"]:
            scope = ", ".join([*one["models"], *one["cohorts"]])
            console.print(f"  {one['role']}{f', narrowed to {scope}' if scope else ''}")

    show(found, as_json, render)


@app.command("list")
def list_sessions(as_json: AsJson = False) -> None:
    """List who is logged in."""
    with client() as server:
        found: list[dict[str, Any]] = server.plain(calls.list_sessions())

    def render(console: Console) -> None:
        rows = [
            (
                one["id"],
                one["name"],
                one["kind"],
                ", ".join(one["groups"]),
                when(one["created_at"]),
                date(one["expires_at"]),
            )
            for one in found
        ]
        console.print(table(("id", "name", "by", "groups", "since", "until"), rows))

    show(found, as_json, render)


@app.command("revoke")
def revoke_session(
    session: Annotated[str, typer.Argument(help="Id as in wherry session list.")], as_json: AsJson = False
) -> None:
    """End somebody's session; from then on it opens nothing."""
    with client() as server:
        server.send(calls.revoke_session(session))
    show({"id": session, "revoked": True}, as_json, lambda console: console.print(f"{session} opens nothing any more"))
