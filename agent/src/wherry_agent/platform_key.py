"""Where the key for encryption at rest comes from: a file, a credential of systemd, or a TPM.

`at_rest_key` names one source: `file:PATH` (for its owner only), `credential:NAME` (`LoadCredentialEncrypted=` of the unit;
systemd may have sealed it to the TPM itself) or `tpm2:OBJECT` (a persistent handle or a context file, given out by
`tpm2_unseal` of Debian's tpm2-tools). The key is 32 bytes, raw or in hex. It is read once per start and never written.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

from wherry_agent import cipher
from wherry_agent.sealing import Mode, Seal
from wherry_shared.errors import DeviceError, RefusedError

CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""Where systemd puts a unit's credentials."""
TPM_COMMAND = "tpm2_unseal"
TPM_SECONDS_MAX = 30.0
"""Slow chips take a second or two."""
KEY_FILE_BYTES_MAX = 128
_SOURCE = re.compile(r"(file|credential|tpm2):(\S.*)")
_CREDENTIAL = re.compile(r"[A-Za-z0-9_.@-]{1,100}")
_OBJECT = re.compile(r"(?:0x[0-9A-Fa-f]{8}|/.*)")


def check_source(source: str) -> str:
    """Say what is wrong with the name of a source; empty if nothing is."""
    found = _SOURCE.fullmatch(source)
    if found is None:
        return "at_rest_key: file:PATH, credential:NAME or tpm2:OBJECT"
    kind, name = found.groups()
    if kind == "file" and not name.startswith("/"):
        return "at_rest_key: the path of a file begins with /"
    if kind == "credential" and _CREDENTIAL.fullmatch(name) is None:
        return "at_rest_key: not the name of a credential"
    if kind == "tpm2" and _OBJECT.fullmatch(name) is None:
        return "at_rest_key: tpm2: a handle like 0x81010001, or the path of a context file"
    return ""


def seal_of(source: str, mode: Mode) -> Seal | None:
    """Return the seal that settings ask for; None where they name no key.

    Raises:
        DeviceError: `at_rest_key_unavailable`: the source does not give it; `at_rest_key_open`: others can read it.
        RefusedError: `at_rest_key_invalid`: it is no key.
    """
    if not source:
        return None
    kind, _, name = source.partition(":")
    if kind == "file":
        data = _of_file(Path(name))
    elif kind == "credential":
        data = _of_credential(name)
    else:
        data = _of_tpm(name)
    return Seal(_key(source, data), mode, source)


def _key(source: str, data: bytes) -> bytes:
    if len(data) == cipher.KEY_BYTES:
        return data
    text = data.strip()
    if re.fullmatch(rb"[0-9A-Fa-f]{64}", text) is None:
        raise RefusedError(
            "at_rest_key_invalid",
            f"{source} holds {len(data)} bytes that are no key",
            consequence="the agent does not start",
            next_step="it has to be 32 random bytes, raw or as 64 hex digits: head -c 32 /dev/urandom",
        )
    return bytes.fromhex(text.decode())


def _of_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            data = file.read(KEY_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _unavailable(f"{path}: {error.strerror}", "put the file back, readable for the agent's user") from error
    if not stat.S_ISREG(about.st_mode) or about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o077:
        raise DeviceError(
            "at_rest_key_open",
            f"{path} is a key that others can read or replace",
            consequence="it is not used, and the agent does not start",
            next_step=f"chmod 600 {path}, and let the agent's user own it",
        )
    return data


def _of_credential(name: str) -> bytes:
    folder = os.environ.get(CREDENTIALS, "")
    if not folder:
        raise _unavailable(
            f"this process has no credential {name}: only the unit has it",
            f"name it in the unit: LoadCredentialEncrypted={name}:/etc/credstore.encrypted/{name}",
        )
    try:
        return (Path(folder) / name).read_bytes()[: KEY_FILE_BYTES_MAX + 1]
    except OSError as error:
        raise _unavailable(
            f"systemd gave no credential {name}: {error.strerror}", "see LoadCredentialEncrypted= of the unit"
        ) from error


def _of_tpm(name: str) -> bytes:
    try:
        done = subprocess.run(
            [TPM_COMMAND, "-Q", "-c", name], capture_output=True, timeout=TPM_SECONDS_MAX, check=False
        )
    except FileNotFoundError as error:
        raise _unavailable(f"there is no {TPM_COMMAND} on this device", "install tpm2-tools (Debian)") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unavailable(
            f"{TPM_COMMAND} gives no answer: {error}", "see whether the TPM works: tpm2_getcap"
        ) from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _unavailable(
            f"the TPM does not give out {name}: {said[-1][:200] if said else done.returncode}",
            "see whether this is the device on which it was sealed, and whether the agent's user may use the TPM",
        )
    return done.stdout[: KEY_FILE_BYTES_MAX + 1]


def _unavailable(why: str, next_step: str) -> DeviceError:
    return DeviceError(
        "at_rest_key_unavailable",
        f"the key for what is on disk cannot be had: {why}",
        consequence="nothing was changed on the disk; the agent does not start without its key",
        next_step=next_step,
    )
