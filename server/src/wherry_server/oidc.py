"""Logging people in by OpenID Connect: the authorization code flow with PKCE, for a browser and for the command line.

Nothing is kept about a login that is under way: what the answer has to fit (state, nonce, verifier) is in a sealed cookie, so that a
login can only be ended by the browser that began it. Who a person is comes from the ID token, whose signature, issuer, audience, times
and nonce are checked; what they may do comes from their groups, by `settings.oidc.groups`. The command line gets a session of its own,
after the person agreed to that on a page, and only with the verifier of whose challenge it sent.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import httpx
import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from wherry_server.settings import Oidc
from wherry_shared.access import LOOPBACK
from wherry_shared.errors import RefusedError, UnreachableError

ALGORITHMS = ("RS256", "PS256", "ES256")
"""Of ID tokens: signatures by keys of the provider, never by a secret that others hold, never none."""
LOGIN_S = 600
"""How long a person may take at the provider."""
LEEWAY_S = 30
"""How far the provider's clock may be off."""
DISCOVERY_S = 3_600
"""How long what the provider says about itself is believed without asking again."""
KEYS_S_MIN = 30
"""Keys are not asked for more often than this, whatever key ids tokens name."""
TIMEOUT_S = 10.0
ANSWER_BYTES_MAX = 1 << 20
GROUPS_MAX = 1_000
NAME_CHARS_MAX = 128
_NONCE_BYTES = 12

T = TypeVar("T")


class Pending(msgspec.Struct, frozen=True):
    """A login that is under way: what its answer has to fit, and where it leads."""

    state: str
    nonce: str
    verifier: str
    ends_at: float
    following: str = "/"
    port: int = 0
    """Where the command line listens; 0: it is a browser that logs in."""
    challenge: str = ""


class Agreed(msgspec.Struct, frozen=True):
    """What a person is asked to agree to: that a command line acts as them."""

    subject: str
    name: str
    groups: list[str]
    port: int
    challenge: str
    ends_at: float


class _Discovery(msgspec.Struct, frozen=True):
    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str


class _Tokens(msgspec.Struct, frozen=True):
    id_token: str


@dataclass(frozen=True, slots=True)
class Person:
    """Who logged in."""

    subject: str
    name: str
    groups: tuple[str, ...]


def seal(master_key: bytes, what: msgspec.Struct) -> str:
    """Return a value that only this server can have made and read, bound to its kind."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = _cipher(master_key).encrypt(nonce, msgspec.json.encode(what), type(what).__name__.encode())
    return base64.urlsafe_b64encode(nonce + sealed).decode().rstrip("=")


def unseal(master_key: bytes, text: str, kind: type[T]) -> T | None:
    """Return a sealed value; None if this server did not make it, or for something else."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        plain = _cipher(master_key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], kind.__name__.encode())
        return msgspec.json.decode(plain, type=kind)
    except (ValueError, InvalidTag, msgspec.DecodeError):
        return None


def _cipher(master_key: bytes) -> AESGCM:
    return AESGCM(hmac.digest(master_key, b"wherry login", "sha256"))


def challenge_of(verifier: str) -> str:
    """Return the S256 challenge of a verifier (RFC 7636)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")


def refused(why: str) -> RefusedError:
    """Return why somebody is not logged in."""
    return RefusedError(
        "login_refused", f"login refused: {why}", consequence="nobody is logged in", next_step="begin the login again"
    )


class Provider:
    """The OpenID provider of a project, as far as this process knows it."""

    def __init__(self, settings: Oidc, secret: str, redirect_uri: str) -> None:
        self._settings = settings
        self._secret = secret
        self._redirect_uri = redirect_uri
        self._discovery: _Discovery | None = None
        self._discovered_at = 0.0
        self._keys: Any = None
        self._keys_at = 0.0

    async def begin(self, pending: Pending) -> str:
        """Return where to send the browser."""
        discovery = await self._discover()
        asked = {
            "response_type": "code",
            "client_id": self._settings.client_id,
            "redirect_uri": self._redirect_uri,
            "scope": " ".join(self._settings.scopes),
            "state": pending.state,
            "nonce": pending.nonce,
            "code_challenge": challenge_of(pending.verifier),
            "code_challenge_method": "S256",
        }
        mark = "&" if urlsplit(discovery.authorization_endpoint).query else "?"
        return f"{discovery.authorization_endpoint}{mark}{urlencode(asked)}"

    async def end(self, pending: Pending, code: str) -> Person:
        """Exchange the code of an answer for who the person is.

        Raises:
            RefusedError: `login_refused`.
            UnreachableError: `provider_unreachable`.
        """
        discovery = await self._discover()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "client_id": self._settings.client_id,
            "code_verifier": pending.verifier,
            **({"client_secret": self._secret} if self._secret else {}),
        }
        answer = await self._ask("POST", discovery.token_endpoint, data=form)
        try:
            tokens = msgspec.json.decode(answer, type=_Tokens)
        except msgspec.DecodeError as error:
            raise refused("the provider gave no ID token") from error
        return await self._person(tokens.id_token, pending.nonce)

    async def _person(self, token: str, nonce: str) -> Person:
        from joserfc import errors, jwt

        wanted = {
            "iss": {"essential": True, "value": self._settings.issuer},
            "aud": {"essential": True, "value": self._settings.client_id},
            "nonce": {"essential": True, "value": nonce},
            "sub": {"essential": True},
            "exp": {"essential": True},
            "iat": {"essential": True},
        }
        try:
            try:
                decoded = jwt.decode(token, await self._key_set(), algorithms=ALGORITHMS)
            except (errors.InvalidKeyIdError, errors.BadSignatureError, ValueError):
                decoded = jwt.decode(token, await self._key_set(anew=True), algorithms=ALGORITHMS)
            claims = decoded.claims
            jwt.JWTClaimsRegistry(leeway=LEEWAY_S, **wanted).validate(claims)  # type: ignore[arg-type]  # TypedDicts
        except (errors.JoseError, ValueError) as error:
            raise refused(f"the ID token is not good: {type(error).__name__}") from error
        audience = claims["aud"]
        several = isinstance(audience, list) and len(audience) > 1
        if (several or "azp" in claims) and claims.get("azp") != self._settings.client_id:
            raise refused("the ID token is meant for others, too")
        name = str(claims.get(self._settings.name_claim) or claims["sub"])
        groups = claims.get(self._settings.groups_claim) or []
        if not isinstance(groups, list) or len(groups) > GROUPS_MAX:
            raise refused(f"the claim {self._settings.groups_claim} is no list of groups")
        # some providers write it as text
        verified = claims.get("email_verified", True) in (True, "true")
        if self._settings.name_claim == "email" and not verified:
            raise refused("the provider has not verified the address of this person")
        known = tuple(str(group) for group in groups if str(group) in self._settings.groups)
        return Person(subject=f"{claims['iss']}|{claims['sub']}", name=name[:NAME_CHARS_MAX], groups=known)

    async def _discover(self) -> _Discovery:
        if self._discovery is not None and time.monotonic() - self._discovered_at < DISCOVERY_S:
            return self._discovery
        answer = await self._ask("GET", self._settings.issuer.rstrip("/") + "/.well-known/openid-configuration")
        try:
            found = msgspec.json.decode(answer, type=_Discovery)
        except msgspec.DecodeError as error:
            raise _away(f"what it says about itself cannot be read: {error}") from error
        if found.issuer != self._settings.issuer:
            raise _away(f"it calls itself {found.issuer[:100]}, not {self._settings.issuer}")
        self._discovery, self._discovered_at = found, time.monotonic()
        return found

    async def _key_set(self, *, anew: bool = False) -> Any:
        from joserfc.jwk import KeySet

        age = time.monotonic() - self._keys_at
        if self._keys is None or age > DISCOVERY_S or (anew and age > KEYS_S_MIN):
            answer = await self._ask("GET", (await self._discover()).jwks_uri)
            try:
                self._keys = KeySet.import_key_set(msgspec.json.decode(answer))
            except (msgspec.DecodeError, ValueError, KeyError, TypeError) as error:
                raise _away("its keys cannot be read") from error
            self._keys_at = time.monotonic()
        return self._keys

    async def _ask(self, method: str, url: str, **more: Any) -> bytes:
        parts = urlsplit(url)
        here = parts.hostname in LOOPBACK
        if parts.scheme != "https" and not (parts.scheme == "http" and here):
            raise _away(f"{url[:100]} is not https")
        try:
            async with (
                httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=not here) as http,
                http.stream(method, url, headers={"Accept": "application/json"}, **more) as answer,
            ):
                data = b""
                async for piece in answer.aiter_bytes():
                    data += piece
                    if len(data) > ANSWER_BYTES_MAX:
                        raise _away("it answers without end")
                if answer.status_code in (400, 401, 403):
                    raise refused("the provider does not accept the code")
                if not answer.is_success:
                    raise _away(f"it answered {answer.status_code}")
                return data
        except httpx.HTTPError as error:
            raise _away(type(error).__name__) from error


def _away(why: str) -> UnreachableError:
    return UnreachableError(
        "provider_unreachable",
        f"the OpenID provider cannot be used: {why}",
        consequence="nobody can log in; API tokens work",
        next_step="see oidc in settings.json, and whether the provider answers this server",
    )
