"""What an operator may set on a device: a TOML file, and flags that win over it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wherry_agent.conditions import Conditions, parse_window
from wherry_agent.platform_key import check_source
from wherry_agent.retirement import Wipe
from wherry_agent.sealing import Mode
from wherry_shared.bundle import Contract, EngineName, StatePair, TensorSpec, check_interface
from wherry_shared.errors import RefusedError

FILE = "agent.toml"
HTTP_PORT_DEFAULT = 8500
MIB = 1024 * 1024
RATE_MIN = 1024
"""Bytes a second: slower, a source looks like one that trickles."""

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Rate = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one agent; the file's names are these names."""

    home: str = "/var/lib/wherry"
    """Folder for identity, store, journal and sockets."""
    server: str = ""
    """Address of the API; only needed until the device is enrolled."""
    token: str = ""
    """Enrolment token; only needed until the device is enrolled."""
    ca: str = ""
    """File with the certificate of the authority that signed for the server; only needed until the device is enrolled."""
    name: str = ""
    """Name of the device at enrolment; empty for its host name."""
    labels: dict[str, str] = {}
    """Words by which cohorts choose devices."""
    engines: list[EngineName] = []
    """Engines that may be used; empty for all that work here."""
    mirrors: list[str] = []
    """Addresses that serve blobs like the server does; tried first, trusted never."""
    http_port: Port = HTTP_PORT_DEFAULT
    """Loopback port on which models are served; 0 for any free one (see `wherry-agent status`)."""
    grpc_port: Port = 0
    """Loopback port for gRPC, beside which it has the unix socket `run/grpc.sock` (needs `wherry-agent[grpc]`); 0 leaves both off."""
    handle_group: str = ""
    """System group whose members may use models in their own process, by the sockets and the served files in `home`."""
    memory_reserve_mb: Size = 64
    """Memory that a hot swap leaves free."""
    warm_start: Literal["off", "auto", "on"] = "off"
    """Keep a spare worker ready, which takes the place of a dead one without importing anything (measured on two busy
    cores: 0.1 s instead of 3 s until the next answer) and costs 33 MB; `auto`: where 512 MB are available."""
    canary_memory_mb: Size = 0
    """What a candidate may use in the canary; 0 for half of the memory available when it starts."""
    disk_reserve_mb: Size = 64
    """Disk space that a download leaves free; of less than 16 it leaves 16."""
    disk_budget_mb: Size = 0
    """What all models together may take on the disk; within it, versions that are not needed stay as a cache. 0 for no
    bound, and nothing is kept that is not needed."""
    download_bytes_per_s_max: Rate = 0
    """How fast models are downloaded, all together; 0 for as fast as it goes, else at least 1024."""
    conditions: Conditions = Conditions()
    """When models may be downloaded."""
    scrub_every_s: Annotated[float, msgspec.Meta(gt=0, le=31_536_000)] = 86_400.0
    """How often the files of trusted versions are read again; what is altered is fetched again."""
    window_s: Seconds = 30.0
    """Length of a telemetry window."""
    telemetry_mb: Size = 8
    """Telemetry kept while the server cannot be reached."""
    samples_consent: list[str] = []
    """Models of which the inputs of a few requests may be sent to the server, where its offer asks for them; empty: none."""
    wipe_allowed: Wipe = "all"
    """What the server may have removed when the device leaves the fleet: `nothing`, `models`, `all` (its identity, too)."""
    at_rest_key: str = ""
    """Where the key comes from that seals journal, telemetry and identity on the disk: `file:PATH`, `credential:NAME` of
    systemd, `tpm2:OBJECT`; empty: none."""
    at_rest: Mode = "off"
    """`on`: everything is sealed, and what is not is refused; `migrate`: what is not sealed yet is taken, too (for the
    first start with a key); `off`: nothing is sealed any more (with the key still named, for the start that opens all)."""
    set_clock: bool = False
    """Set a clock that is behind a verified time forward at start (needs the right to); else it is only reported."""
    contracts: dict[str, Contract] = {}
    """By model: what applications rely on; wins over what they declare themselves and over the first version's interface."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is written to standard error."""


def load(path: Path | None, flags: dict[str, Any]) -> Settings:
    """Read settings; `flags` holds what was given on the command line.

    Args:
        path: the file; None for `HOME/agent.toml`, which may be absent.
        flags: names of `Settings` to values; wins over the file.

    Raises:
        RefusedError: `settings_missing` or `settings_invalid`, naming the field.
    """
    home = Path(str(flags.get("home", Settings().home)))
    file = path or home / FILE
    values: dict[str, Any] = {}
    if file.exists():
        import tomllib

        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise RefusedError("settings_invalid", f"{file}: {error}", next_step="correct the file") from error
    elif path is not None:
        raise RefusedError("settings_missing", f"{file} does not exist", next_step="name a file that does")
    try:
        settings = msgspec.convert({**values, **flags}, Settings)
    except msgspec.ValidationError as error:
        raise RefusedError("settings_invalid", f"{file}: {error}", next_step="correct the file or the flags") from error
    for name, contract in settings.contracts.items():
        stray = _stray(values.get("contracts", {}).get(name, {}))
        try:
            check_interface(contract)
        except RefusedError as error:
            stray = stray or error.message
        if stray:
            raise RefusedError("settings_invalid", f"{file}: contracts.{name}: {stray}", next_step="correct the file")
    _check_downloads(file, settings)
    trouble = check_source(settings.at_rest_key) if settings.at_rest_key else ""
    if settings.at_rest != "off" and not settings.at_rest_key:
        trouble = "at_rest needs a key: at_rest_key"
    if trouble:
        raise RefusedError("settings_invalid", f"{file}: {trouble}", next_step="correct the file")
    return msgspec.structs.replace(settings, home=str(Path(settings.home).absolute()))


def _check_downloads(file: Path, settings: Settings) -> None:
    trouble = ""
    if 0 < settings.download_bytes_per_s_max < RATE_MIN:
        trouble = f"download_bytes_per_s_max: at least {RATE_MIN}, or 0 for no bound"
    for number, text in enumerate(settings.conditions.windows):
        try:
            parse_window(text)
        except ValueError as error:
            trouble = f"conditions.windows[{number}]: {error}"
    if trouble:
        raise RefusedError("settings_invalid", f"{file}: {trouble}", next_step="correct the file")


def _stray(table: dict[str, Any]) -> str:
    """Name a field of a contract that is none: bundles may carry unknown fields, a file that a person wrote may not."""
    parts: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [("", table, Contract.__struct_fields__)]
    for key, kind in (("inputs", TensorSpec), ("outputs", TensorSpec), ("state", StatePair)):
        parts += [(f"{key}.", row, kind.__struct_fields__) for row in table.get(key, [])]
    return next(
        (f"there is no field {where}{key}" for where, row, known in parts for key in row if key not in known), ""
    )
