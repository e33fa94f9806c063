"""The other front of a device's identity at a broker: a signed token (RFC 7519) for brokers that check tokens, as EMQX does.

The device asks for it over HTTPS, where it is known, and gives it as its MQTT password. The token names user and client id, which the
broker has to compare, says what the device may read and write, in the form of EMQX's claim `acl`, and lives for an hour: a
device that was shut out gets no other, and a broker that disconnects at expiry ends what is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwt
from joserfc.jwk import ECKey

from wherry_server.secret_files import write_secret
from wherry_server.times import now_us
from wherry_shared import topics

FILE = "broker-tokens.key"
LIFE_S = 3600
ALGORITHM = "ES256"
AUDIENCE = "mqtt"
MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Token:
    """A password for the broker."""

    text: str
    expires_at: int


class Issuer:
    """Signs tokens of one project."""

    def __init__(self, key: ECKey, project: str) -> None:
        self._key = key
        self._project = project

    @classmethod
    def ensure(cls, folder: Path, project: str) -> Issuer:
        """Open the key in a folder, making it if it is not there."""
        path = folder / FILE
        if not path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            write_secret(path, key.private_bytes(serialization.Encoding.PEM, *form))
        opened = ECKey.import_key(path.read_bytes())
        return cls(
            ECKey.import_key(path.read_bytes(), {"kid": opened.thumbprint(), "alg": ALGORITHM, "use": "sig"}), project
        )

    def issue(self, device: str) -> Token:
        """Return a token for a device."""
        now = now_us() // MICROSECONDS
        claims = {
            "iss": f"wherry/{self._project}",
            "aud": AUDIENCE,
            "sub": device,
            "username": device,
            "clientid": device,
            "iat": now,
            "exp": now + LIFE_S,
            "acl": rules(device),
        }
        header = {"alg": ALGORITHM, "kid": str(self._key.kid)}
        return Token(jwt.encode(header, claims, self._key), (now + LIFE_S) * MICROSECONDS)

    def key_set(self) -> dict[str, Any]:
        """Return what a broker checks tokens with (RFC 7517)."""
        return {"keys": [self._key.as_dict(private=False)]}


def rules(device: str) -> list[dict[str, str]]:
    """Return what a device may do; the last rule forbids everything else, whatever the broker does by default."""
    read = [topics.down(device, kind) for kind in ("offer", "ack")]
    write = [topics.up(device, kind) for kind in ("report", "telemetry", "hello")]
    return [
        *({"permission": "allow", "action": "subscribe", "topic": f"eq {topic}"} for topic in read),
        *({"permission": "allow", "action": "publish", "topic": topic} for topic in write),
        {"permission": "deny", "action": "all", "topic": "#"},
    ]
