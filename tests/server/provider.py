"""An OpenID provider on loopback, which logs in whomever the test names, and can be made to lie."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwk, jwt

CLIENT, SECRET = "wherry", "a-secret-of-the-client"


class Provider:
    """The state of a provider: who would log in, and how it lies."""

    def __init__(self) -> None:
        self.key = jwk.RSAKey.generate_key(2048, {"kid": "k1", "use": "sig", "alg": "RS256"})
        self.signing: Any = self.key
        self.algorithm = "RS256"
        self.person: dict[str, Any] = {"sub": "1", "email": "ann@example.org", "groups": ["lab"]}
        self.claims: dict[str, Any] = {}
        """What the next token says otherwise; None leaves a claim out."""
        self.wrong_issuer = False
        self.codes: dict[str, dict[str, str]] = {}
        self.url = ""
        self.secret = SECRET

    def authorize(self, asked: dict[str, str]) -> str:
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def token(self, form: dict[str, str]) -> dict[str, Any] | None:
        asked = self.codes.pop(form.get("code", ""), None)
        if asked is None or (form.get("client_id"), form.get("client_secret")) != (CLIENT, self.secret):
            return None
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != asked["code_challenge"]:
            return None
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": CLIENT,
            "nonce": asked["nonce"],
            "iat": now,
            "exp": now + 60,
            **self.person,
            **self.claims,
        }
        said = {name: value for name, value in claims.items() if value is not None}
        header = {"alg": self.algorithm, "kid": "k1"}
        if self.algorithm in ("none", "HS256"):  # by hand: no library would sign so
            parts = [_base64(json.dumps(one).encode()) for one in (header, said)]
            public = self.key.as_pem(private=False)
            seal = hmac.digest(public, ".".join(parts).encode(), "sha256") if self.algorithm == "HS256" else b""
            return {"id_token": ".".join([*parts, _base64(seal)]), "access_token": "a", "token_type": "Bearer"}
        token = jwt.encode(header, said, self.signing, algorithms=[self.algorithm])
        return {"id_token": token, "access_token": "a", "token_type": "Bearer"}


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@contextmanager
def provider() -> Iterator[Provider]:
    """Run a provider."""
    state = Provider()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, body: Any, **headers: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if parts.path == "/.well-known/openid-configuration":
                issuer = "https://other.example" if state.wrong_issuer else state.url
                ends = {
                    name: f"{state.url}/{name}" for name in ("authorization_endpoint", "token_endpoint", "jwks_uri")
                }
                self._answer(200, {"issuer": issuer, **ends})
            elif parts.path == "/authorization_endpoint":
                assert (asked["client_id"], asked["response_type"]) == (CLIENT, "code")
                assert asked["code_challenge_method"] == "S256"
                self._answer(303, {}, Location=state.authorize(asked))
            elif parts.path == "/jwks_uri":
                self._answer(200, {"keys": [state.key.as_dict(private=False)]})
            else:
                self._answer(404, {})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            answer = state.token({name: values[0] for name, values in parse_qs(body).items()})
            self._answer(*((400, {"error": "invalid_grant"}) if answer is None else (200, answer)))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
