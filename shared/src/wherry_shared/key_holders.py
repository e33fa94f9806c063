"""Where a person's signing key is: in an encrypted file, or in a security module that never lets it out (PKCS#11).

`pkcs11:TOKEN` names the token by its label, `pkcs11:TOKEN/ID` a key pair on it (2 by default, slot 9c of a PIV card): ECDSA on P-256, which
TUF knows and modules have. The module is the shared library that WHERRY_PKCS11_MODULE names; its PIN is typed, or in
WHERRY_KEY_PASSWORD_FILE like the password of a file. Needs the extra `pkcs11`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import HSMSigner, Signer

from wherry_shared import key_files
from wherry_shared.errors import DeviceError, RefusedError

PREFIX = "pkcs11:"
MODULE_VARIABLE = "WHERRY_PKCS11_MODULE"
KEY_ID = 2


def open_key(place: str) -> Signer:
    """Open the key at `place`: a path, or `pkcs11:TOKEN[/ID]`.

    Raises:
        RefusedError: `key_absent`, `key_invalid`, `password_missing`, `password_wrong`, `module_missing`.
        DeviceError: `key_exposed`, or `module_failed`.
    """
    if place.startswith(PREFIX):
        token, number = _named(place)
        with _module(place):
            uri, public = HSMSigner.import_(number, token, lambda _what: key_files.password_of(place))
            return HSMSigner.from_priv_key_uri(uri, public, lambda _what: key_files.password_of(place))
    try:
        return key_files.load(Path(place).expanduser())
    except FileNotFoundError as error:
        raise RefusedError("key_absent", f"there is no key {place}", consequence="nothing was signed") from error


@contextlib.contextmanager
def using(signer: Signer) -> Iterator[None]:
    """Sign inside this: what a module says becomes an error of ours."""
    if isinstance(signer, HSMSigner):
        with _module(f"{PREFIX}{signer.token_label}/{signer.hsm_keyid}"):
            yield
    else:
        yield


def make_in_module(place: str) -> Signer:
    """Make a key pair on a token that has none under this id, and return it; one that is there is returned as it is.

    Raises:
        RefusedError: as `open_key`.
        DeviceError: `module_failed`.
    """
    try:
        return open_key(place)
    except RefusedError as error:
        if error.code != "key_absent":
            raise
    token, number = _named(place)
    with _module(place):
        import pkcs11
        from pkcs11.util import biginteger
        from pkcs11.util.ec import encode_named_curve_parameters

        found = pkcs11.lib(os.environ["PYKCS11LIB"]).get_token(token_label=token)
        with found.open(user_pin=key_files.password_of(place), rw=True) as session:
            curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
            parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
            parameters.generate_keypair(id=biginteger(number), label="wherry", store=True)
    return open_key(place)


def _named(place: str) -> tuple[str, int]:
    token, slash, number = place.removeprefix(PREFIX).partition("/")
    if not token or (slash and not number.isdecimal()):
        raise RefusedError("key_invalid", f"{place[:80]!r} is not pkcs11:TOKEN or pkcs11:TOKEN/ID")
    return token, int(number) if slash else KEY_ID


@contextlib.contextmanager
def _module(place: str) -> Iterator[None]:
    """Name the module to the library, and turn what both say into our errors."""
    path = os.environ.get(MODULE_VARIABLE) or os.environ.get("PYKCS11LIB")
    if not path:
        raise RefusedError(
            "module_missing",
            f"{place} is on a security module, and nobody says how to reach it",
            consequence="nothing was signed",
            next_step=f"set {MODULE_VARIABLE} to its PKCS#11 library, as /usr/lib/softhsm/libsofthsm2.so",
        )
    os.environ["PYKCS11LIB"] = path  # where securesystemslib looks for it
    try:
        from pkcs11.exceptions import PinIncorrect, PKCS11Error
    except ImportError as error:
        raise RefusedError(
            "module_missing", "python-pkcs11 is not installed", next_step="pip install 'wherry-shared[pkcs11]'"
        ) from error
    try:
        yield
    except PinIncorrect as error:
        raise RefusedError("password_wrong", f"{place} does not open with this PIN") from error
    except UnsupportedLibraryError as error:
        raise RefusedError("module_missing", str(error)) from error
    except ValueError as error:
        raise RefusedError("key_absent", f"{place}: {error}", consequence="nothing was signed") from error
    except (PKCS11Error, RuntimeError) as error:
        why = str(error) or type(error).__name__
        raise DeviceError(
            "module_failed", f"{place}: {why}", next_step=f"check the token and {MODULE_VARIABLE}"
        ) from error
