"""Everything that an operator may set, in one frozen value: defaults, then `settings.json` of the data folder, then arguments.

The data folder holds the whole of a development server: database, blobs, TUF repository, keys. Each path has its one
name here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wherry_shared.access import CLIENT_FILE, DEFAULT_DATA
from wherry_shared.errors import RefusedError
from wherry_shared.ids import check_name

DEFAULT_PORT = 8400
DEFAULT_BROKER_PORT = 8401
FILE = "settings.json"
CERTIFICATE_DAYS_MAX = 3650


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server process runs with."""

    data: Path
    host: str = "127.0.0.1"
    """Where the API listens."""
    port: int = DEFAULT_PORT
    broker_host: str = "127.0.0.1"
    """Where devices, director and ingest find the broker."""
    broker_port: int = DEFAULT_BROKER_PORT
    project: str = "default"
    database: str = ""
    """SQLAlchemy URL; empty: SQLite in the data folder."""
    ingest: Literal["director", "separate"] = "director"
    """Who stores what devices say: the director, or processes of their own (`wherry serve ingest`)."""
    certificate_days: Annotated[float, msgspec.Meta(gt=0, le=CERTIFICATE_DAYS_MAX)] = 30
    """Life of a device certificate; devices renew theirs after two thirds of it."""
    telemetry_days: Annotated[int, msgspec.Meta(ge=1)] = 90
    """Days that measurements are kept."""
    reports_days: Annotated[int, msgspec.Meta(ge=1)] = 365
    """Days that reports are kept; what each device runs and what became of each rollout is kept for ever."""
    api_reads_per_s: Annotated[float, msgspec.Meta(ge=0)] = 200
    """What one API token may read in a second (five seconds' worth at once); 0: as much as it likes."""
    api_changes_per_s: Annotated[float, msgspec.Meta(ge=0)] = 50
    """What one API token may change in a second (five seconds' worth at once); 0: as much as it likes."""
    encode_blobs: bool = True
    """Whether accepted weights are also stored as zstd."""

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL in use."""
        return self.database or f"sqlite+aiosqlite:///{self.data / 'wherry.sqlite'}"

    @property
    def url(self) -> str:
        """The address of the API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def blobs_folder(self) -> Path:
        """Blobs, by digest."""
        return self.data / "blobs"

    @property
    def trust_folder(self) -> Path:
        """TUF repository and development keys of the project."""
        return self.data / "trust"

    @property
    def keys_folder(self) -> Path:
        """Secrets of the server: device CA, master key of frames. Mode 0700."""
        return self.data / "keys"

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
