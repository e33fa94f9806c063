"""Getting the content keys of an encrypted bundle: asked for before any weights, kept as they came, sealed for this device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from wherry_agent import identity
from wherry_agent.courier_http import Http
from wherry_agent.device_keys import DeviceKeys, missing
from wherry_agent.disk import Disk
from wherry_agent.identity import Identity
from wherry_shared import limits, reasons, wire
from wherry_shared.bundle import Manifest, encrypted_layers
from wherry_shared.errors import RefusedError, UnreachableError

log = logging.getLogger(__name__)

PATH = "/device/v1/keys/"
ANSWER_BYTES_MAX = 256 * limits.KIB


def bring_keys(
    home: Path,
    known: Identity,
    http: Http,
    server: str,
    disk: Disk,
    digest: str,
    manifest: Manifest,
    blobs: Iterable[str],
) -> None:
    """Have a key for every encrypted blob among `blobs`, all of the bundle with the manifest `digest`.

    Raises:
        DeviceError: `key_missing`, the server has none for this device yet; or `disk`.
        UnreachableError: `network`.
    """
    encrypted = {layer.digest for layer in encrypted_layers(manifest).values()}
    keys = DeviceKeys(home, identity.content_password(disk.seal))
    lacking = [blob for blob in blobs if blob in encrypted and not keys.opens(blob)]
    if not lacking:
        return
    if not known.content_key:
        raise missing(
            "this device has no key of its own for content keys yet: it makes one when it renews its certificate"
        )
    for record in _ask(http, server, digest):
        if record.blob in lacking and record.device == known.device:
            try:
                keys.keep(record, disk)
            except RefusedError as error:
                log.warning("%s", error.message)
            else:
                lacking.remove(record.blob)
    if lacking:
        raise missing(f"the server has no key for this device yet for {len(lacking)} encrypted files of {digest}")


def _ask(http: Http, server: str, digest: str) -> list[wire.SealedKey]:
    with http.request("GET", f"{server}{PATH}{digest}") as answer:
        data = answer.read(ANSWER_BYTES_MAX)
        if answer.status == 404:  # an older server, or a bundle that is not for this device
            return []
        if answer.status != 200:
            raise UnreachableError(reasons.NETWORK, f"the server answered {answer.status} for the keys of {digest}")
    return wire.parse(wire.SealedKeys, data, bytes_max=ANSWER_BYTES_MAX).keys
