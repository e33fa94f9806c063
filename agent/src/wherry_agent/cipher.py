"""AES-256-GCM by the library that Python's own `ssl` already has in memory, instead of the 7 MB of `cryptography`.

For the supervisor, which may not import that. The library is found once, and made to reproduce a known answer before it is
used: where there is none, or one that answers otherwise, nothing is encrypted and nothing is read.
"""

from __future__ import annotations

import ctypes
import functools
import ssl
from pathlib import Path

from wherry_shared.errors import DeviceError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
BYTES_MAX = 64 * 1024 * 1024
"""The library counts in C's `int`."""
_GET_TAG, _SET_TAG = 0x10, 0x11
_NAMES = ("libcrypto.so.3", "libcrypto.so.1.1")
_KNOWN = bytes.fromhex("cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919")
"""Test case 14 of the GCM specification: key, nonce and text of zeros, then ciphertext and tag."""


class ForgedError(Exception):
    """The bytes are not those that the holder of the key encrypted, for this place."""


class _Library:
    """The five functions that are needed, with their types."""

    def __init__(self, found: ctypes.CDLL) -> None:
        pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        written = ctypes.POINTER(ctypes.c_int)
        self.new = found.EVP_CIPHER_CTX_new
        self.new.restype = pointer
        self.free = found.EVP_CIPHER_CTX_free
        self.free.argtypes, self.free.restype = [pointer], None
        self.cipher = found.EVP_aes_256_gcm
        self.cipher.restype = pointer
        self.control = found.EVP_CIPHER_CTX_ctrl
        self.control.argtypes = [pointer, number, number, pointer]
        self.begin = found.EVP_CipherInit_ex
        self.begin.argtypes = [pointer, pointer, pointer, text, text, number]
        self.update = found.EVP_CipherUpdate
        self.update.argtypes = [pointer, pointer, written, text, number]
        self.end = found.EVP_CipherFinal_ex
        self.end.argtypes = [pointer, pointer, written]


def encrypt(key: bytes, nonce: bytes, data: bytes, beside: bytes) -> bytes:
    """Return ciphertext and tag; `beside` is authenticated with it.

    Raises:
        DeviceError: `cipher_missing`.
    """
    return _run(_library(), key, nonce, data, beside, None)


def decrypt(key: bytes, nonce: bytes, sealed: bytes, beside: bytes) -> bytes:
    """Return the text of ciphertext and tag.

    Raises:
        ForgedError: they are not what was encrypted with this key, nonce and `beside`.
        DeviceError: `cipher_missing`.
    """
    if len(sealed) < TAG_BYTES:
        raise ForgedError
    return _run(_library(), key, nonce, sealed[:-TAG_BYTES], beside, sealed[-TAG_BYTES:])


def _run(library: _Library, key: bytes, nonce: bytes, data: bytes, beside: bytes, tag: bytes | None) -> bytes:
    assert len(key) == KEY_BYTES
    assert len(nonce) == NONCE_BYTES
    assert len(data) <= BYTES_MAX
    context = library.new()
    if not context:
        raise MemoryError
    out = ctypes.create_string_buffer(len(data) + 1)
    length = ctypes.c_int()
    try:
        good = library.begin(context, library.cipher(), None, key, nonce, int(tag is None)) == 1
        good = good and library.update(context, None, length, beside, len(beside)) == 1
        good = good and library.update(context, out, length, data, len(data)) == 1
        if tag is not None:
            good = good and library.control(context, _SET_TAG, TAG_BYTES, ctypes.create_string_buffer(tag)) == 1
        last = ctypes.create_string_buffer(TAG_BYTES)
        if not good:
            raise _missing("the system's libcrypto refuses AES-256-GCM")
        if library.end(context, last, length) != 1:
            raise ForgedError
        if tag is not None:
            return out.raw[: len(data)]
        if library.control(context, _GET_TAG, TAG_BYTES, last) != 1:
            raise _missing("the system's libcrypto gives no tag")
        return out.raw[: len(data)] + last.raw
    finally:
        library.free(context)


@functools.cache
def _library() -> _Library:
    """Find the library that `ssl` mapped, else the system's; it has to give a known answer.

    Raises:
        DeviceError: `cipher_missing`.
    """
    for name in (*_mapped(), *_NAMES):
        try:
            found = _Library(ctypes.CDLL(name))
        except (OSError, AttributeError):
            continue
        if _run(found, bytes(KEY_BYTES), bytes(NONCE_BYTES), bytes(16), b"", None) == _KNOWN:
            return found
    raise _missing(f"no libcrypto with AES-256-GCM (Python has {ssl.OPENSSL_VERSION})")


def _mapped() -> list[str]:
    """Return where the library is that this process has mapped; none where `ssl` was linked with its own."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libcrypto" in line}
    return sorted(path for path in paths if Path(path).is_file())


def _missing(why: str) -> DeviceError:
    return DeviceError(
        "cipher_missing",
        why,
        consequence="nothing is written in the clear, and what is sealed cannot be read",
        next_step='install libssl3 (Debian), or set at_rest = "off"',
    )
