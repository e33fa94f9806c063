"""Everything that an operator may set, in one frozen value: defaults, then `settings.json` of the data folder, then arguments.

The data folder holds the whole of a development server: database, blobs, TUF repository, keys. Each path has its one
name here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from wherry_shared.access import CLIENT_FILE, DEFAULT_DATA
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name

Role = Literal["api", "director", "ingest", "publisher", "keys", "broker"]
"""What a process of a server may be."""
DEFAULT_PORT = 8400
DEFAULT_BROKER_PORT = 8401
DEFAULT_BROKER_SERVER_PORT = 8402
FILE = "settings.json"
CERTIFICATE_DAYS_MAX = 3650
BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{2,62}(/[A-Za-z0-9._-]+)*/?")
"""Where a bucket is: nothing in it that would have to be written otherwise in an address."""
PRESIGN_S_MAX = 3600
"""A signed address opens one blob to whoever has it: long enough to begin a download, never a day."""


class GrantWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A role of a group of people, narrowed where models or cohorts are named."""

    role: Literal["viewer", "operator", "approver", "publisher", "admin"]
    models: list[str] = []
    cohorts: list[str] = []


class Oidc(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where people log in. The client's secret, if it has one, is in `keys/oidc.secret`."""

    issuer: str
    client_id: str
    public_url: str = ""
    """Address under which browsers reach this API; the provider leads back to its `/auth/callback`. Empty: host and port."""
    scopes: tuple[str, ...] = ("openid", "profile", "email", "groups")
    name_claim: str = "email"
    groups_claim: str = "groups"
    groups: dict[str, list[GrantWish]] = {}
    """Group → what its members are granted; who is in none of these cannot log in."""
    session_hours: Annotated[float, msgspec.Meta(gt=0, le=168)] = 8


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server process runs with."""

    data: Path
    host: str = "127.0.0.1"
    """Where the API listens."""
    port: int = DEFAULT_PORT
    https: bool = False
    """Whether the API ends TLS itself, with a certificate of the device authority for `host`."""
    device_certificates: Literal["off", "optional", "required"] = "off"
    """Over HTTPS: whether a device proves itself by its certificate, beside its secret. `required`: the secret alone opens nothing,
    but may renew a certificate that has expired. Behind a proxy that ends TLS: `wherry proxy config`."""
    broker_host: str = "127.0.0.1"
    """Where devices, director and ingest find the broker."""
    broker_port: int = DEFAULT_BROKER_PORT
    broker_tls: bool = False
    """Whether the broker asks for certificates: devices come to `broker_port` with theirs, the roles of the server to
    `broker_server_port` with one that they make themselves (`wherry broker config` writes such a broker's configuration)."""
    broker_server_host: str = "127.0.0.1"
    broker_server_port: int = DEFAULT_BROKER_SERVER_PORT
    broker_tokens: bool = False
    """Whether devices give the broker a signed token as their password (for EMQX and others that check them); where it has TLS, the
    certificate is not asked for then."""
    broker_reload: list[str] = []
    """Command that has the broker read its list of revoked certificates again; empty: SIGHUP to the process that its
    `store/mosquitto.pid` names."""
    broker_files: str = ""
    """Folder with what the broker reads; empty: `broker` in the data folder, which only the server's own user can read."""
    project: str = "default"
    database: str = ""
    """SQLAlchemy URL; empty: SQLite in the data folder."""
    ingest: Literal["director", "separate"] = "director"
    """Who stores what devices say: the director, or processes of their own (`wherry serve ingest`)."""
    publisher: Literal["director", "separate"] = "director"
    """Who takes offers to the broker: the director, or processes of their own (`wherry serve publisher`)."""
    certificate_days: Annotated[float, msgspec.Meta(gt=0, le=CERTIFICATE_DAYS_MAX)] = 30
    """Life of a device certificate; devices renew theirs after two thirds of it."""
    certificate_grace_days: Annotated[float, msgspec.Meta(ge=0, le=CERTIFICATE_DAYS_MAX)] = 365
    """How long after its certificate expired a device that was away may still renew it by itself."""
    telemetry_days: Annotated[int, msgspec.Meta(ge=1)] = 90
    """Days that measurements are kept."""
    reports_days: Annotated[int, msgspec.Meta(ge=1)] = 365
    """Days that reports are kept; what each device runs and what became of each rollout is kept for ever."""
    api_reads_per_s: Annotated[float, msgspec.Meta(ge=0)] = 200
    """What one API token may read in a second (five seconds' worth at once); 0: as much as it likes."""
    api_changes_per_s: Annotated[float, msgspec.Meta(ge=0)] = 50
    """What one API token may change in a second (five seconds' worth at once); 0: as much as it likes."""
    device_requests_per_s: Annotated[float, msgspec.Meta(ge=0)] = 50
    """What one device may ask over HTTP in a second (five seconds' worth at once); 0: as much as it likes."""
    public_per_s: Annotated[float, msgspec.Meta(ge=0)] = 500
    """What one address may ask in a second of what needs nobody to be known: enrolment, TUF metadata, logins; 0: no limit."""
    refused_per_s: Annotated[float, msgspec.Meta(ge=0)] = 20
    """How often one address may be refused in a second before it has to wait; 0: no limit."""
    oidc: Oidc | None = None
    """Where people log in; without it there are API tokens only."""
    encode_blobs: bool = True
    """Whether accepted weights are also stored as zstd."""
    blobs: str = ""
    """Where blobs are: `file:///FOLDER` or `s3://BUCKET/PREFIX`; empty: a folder of the data folder."""
    s3_endpoint: str = ""
    """Address of the object store; empty: what AWS_ENDPOINT_URL says, else AWS."""
    s3_region: str = ""
    """Empty: what AWS_REGION says."""
    s3_public_endpoint: str = ""
    """Address under which devices find the object store, where it is another one."""
    uploads_days: Annotated[int, msgspec.Meta(ge=3)] = 7
    """Days after which an uploaded blob that no bundle names may be deleted (`wherry blobs collect`)."""
    content_keys: str = ""
    """Folder with the keys of the `keys` role, which only that process opens; empty: no such process belongs to this server."""
    presign_s: Annotated[int, msgspec.Meta(ge=0, le=PRESIGN_S_MAX)] = 300
    """How long an address that a device is sent to in the bucket can be used; 0: the API passes the bytes on itself."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """What `wherry serve` has to run, a broker aside."""
        ingest: tuple[Role, ...] = ("ingest",) if self.ingest == "separate" else ()
        publisher: tuple[Role, ...] = ("publisher",) if self.publisher == "separate" else ()
        keys: tuple[Role, ...] = ("keys",) if self.content_keys else ()
        return "api", "director", *ingest, *publisher, *keys

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL in use."""
        return self.database or f"sqlite+aiosqlite:///{self.data / 'wherry.sqlite'}"

    @property
    def url(self) -> str:
        """The address of the API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.https else 'http'}://{host}:{self.port}"

    @property
    def blobs_folder(self) -> Path | None:
        """Blobs, by digest; None if they are in a bucket."""
        if not self.blobs:
            return self.data / "blobs"
        parts = urlsplit(self.blobs)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    @property
    def spool_folder(self) -> Path:
        """Blobs of a bucket while they are worked on as files."""
        return self.data / "spool"

    @property
    def s3_key_file(self) -> Path:
        """A key of the bucket (`{"access_key_id", "secret_access_key"}`), where the environment has none. Mode 0600."""
        return self.keys_folder / "s3.json"

    @property
    def trust_folder(self) -> Path:
        """TUF repository and development keys of the project."""
        return self.data / "trust"

    @property
    def keys_folder(self) -> Path:
        """Secrets of the server: device CA, master key of frames. Mode 0700."""
        return self.data / "keys"

    @property
    def broker_folder(self) -> Path:
        """What the broker reads: configuration, access rules, certificates, revoked certificates."""
        return Path(self.broker_files) if self.broker_files else self.data / "broker"

    @property
    def wheels_folder(self) -> Path:
        """Wheels that invited devices get beside the agent's own, for those without a package index."""
        return self.data / "wheels"

    @property
    def https_pair(self) -> tuple[Path, Path]:
        """Certificate and key that the API shows."""
        return self.keys_folder / "https.pem", self.keys_folder / "https.key"

    @property
    def proxy_secret_file(self) -> Path:
        """What a proxy says to be believed which certificate it saw."""
        return self.keys_folder / "proxy.secret"

    @property
    def master_key_file(self) -> Path:
        """The 32 bytes from which frame keys of devices are derived; the broker never sees them."""
        return self.keys_folder / "frames.key"

    @property
    def client_file(self) -> Path:
        """Address and token for the `wherry` command on this machine. Mode 0600."""
        return self.data / CLIENT_FILE

    @classmethod
    def load(cls, data: Path | None = None, **overrides: Any) -> Settings:
        """Read the settings of a data folder; `overrides` that are not None win.

        Raises:
            RefusedError: `settings_invalid` or `bad_name` (project).
        """
        folder = (data or DEFAULT_DATA).expanduser().absolute()
        values: dict[str, Any] = {}
        file = folder / FILE
        if file.exists():
            try:
                values = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise _invalid(file, error) from error
        values.update({key: value for key, value in overrides.items() if value is not None})
        values["data"] = str(folder)
        try:
            settings = msgspec.convert(values, cls, dec_hook=_decode)
        except msgspec.ValidationError as error:
            raise _invalid(file, error) from error
        check_name(settings.project, "project")
        _check_urls(settings, file)
        return settings

    def save(self) -> None:
        """Write what differs from the defaults to `settings.json`, so that child processes and the next start agree."""
        self.data.mkdir(parents=True, exist_ok=True)
        standard = Settings(data=self.data)
        changed = {
            name: getattr(self, name)
            for name in self.__struct_fields__
            if name != "data" and getattr(self, name) != getattr(standard, name)
        }
        part = self.data / (FILE + ".part")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(changed)) + b"\n")
        part.replace(self.data / FILE)


def _check_urls(settings: Settings, file: Path) -> None:
    place = urlsplit(settings.blobs)
    bucket = BUCKET.fullmatch(settings.blobs)
    folder = place.scheme == "file" and not place.netloc and place.path.startswith("/")
    if (settings.blobs and not (bucket or folder)) or place.query or place.fragment:
        raise _invalid(file, ValueError("blobs is not of the form file:///FOLDER or s3://BUCKET/PREFIX"))
    for name in ("s3_endpoint", "s3_public_endpoint"):
        parts = urlsplit(getattr(settings, name))
        if getattr(settings, name) and (parts.scheme not in ("http", "https") or not parts.hostname or parts.username):
            raise _invalid(file, ValueError(f"{name} is not of the form https://HOST, without user and password"))


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)  # how msgspec is told that a type has no converter here


def _invalid(file: Path, error: Exception) -> RefusedError:
    return RefusedError(
        "settings_invalid",
        f"{file}: {error}",
        consequence="the server does not start",
        next_step="correct the file, or remove it to go back to the defaults",
    )
