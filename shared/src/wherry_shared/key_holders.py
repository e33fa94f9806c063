"""Where a person's signing key is: in an encrypted file, or in a security module that never lets it out (PKCS#11).

`pkcs11:LABEL` names a key pair (ECDSA on P-256) by its label; the module is the shared library that WHERRY_PKCS11_MODULE
names, the PIN is typed or in WHERRY_KEY_PASSWORD_FILE like the password of a file.
"""

from __future__ import annotations

from pathlib import Path

from securesystemslib.signer import Signer

from wherry_shared import key_files
from wherry_shared.errors import RefusedError

PREFIX = "pkcs11:"
MODULE_VARIABLE = "WHERRY_PKCS11_MODULE"


def open_key(place: str) -> Signer:
    """Open the key at `place`: a path, or `pkcs11:LABEL`.

    Raises:
        RefusedError: `key_absent`, `key_invalid`, `password_missing`, `password_wrong`, `module_missing`.
        DeviceError: `key_exposed`.
    """
    if place.startswith(PREFIX):
        raise RefusedError("module_missing", "no security module is spoken to here")
    try:
        return key_files.load(Path(place).expanduser())
    except FileNotFoundError as error:
        raise RefusedError("key_absent", f"there is no key {place}", consequence="nothing was signed") from error
