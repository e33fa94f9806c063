"""Blobs over HTTP: how they are uploaded, encoded and fetched. What keeps them is in `test_blob_stores`."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from sqlalchemy import insert

from tests.offering import give
from tests.s3 import REGION, S3, with_key
from tests.server.harness import Running, in_database, release, running, until
from wherry_server.blob_folder import INCOMING
from wherry_server.db.tables import Assignment
from wherry_shared import wire
from wherry_shared.bundle import Manifest
from wherry_shared.digest import of_bytes

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server on SQLite and a folder, and one on PostgreSQL and a bucket, whose bytes it sends itself."""
    more: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("server") / "data"
    if request.param == "postgres":
        s3: S3 = request.getfixturevalue("s3")
        more = {"database": request.getfixturevalue("postgres").database(), "blobs": s3.bucket(), "s3_endpoint": s3.url}
        more |= {"s3_region": REGION, "presign_s": 0}
        with_key(folder)
    with running(folder, **more) as started:
        yield started


def arriving(server: Running, s3: S3) -> int:
    """Return how many uploads were begun and are not at their end."""
    if server.settings.blobs:
        return s3.uploads(server.settings.blobs)
    return len(list((server.settings.data / "blobs" / INCOMING).glob("*")))


def test_what_a_stopped_server_left_uncompressed_is_taken_up_at_the_next_start(tmp_path: Path) -> None:
    with running(tmp_path / "data", encode_blobs=False) as server:
        manifest, digest = release(server, tmp_path, "late")
        device = server.device("patient")
        give(server.settings, device.device, digest)
        url = f"/device/v1/blobs/{manifest.layers[0].digest}/info"
        with server.as_device(device) as http:
            assert wire.parse(wire.BlobInfo, http.get(url).content).encodings == []
    with running(tmp_path / "data") as server, server.as_device(device) as http:
        until(lambda: wire.parse(wire.BlobInfo, http.get(url).content).encodings)


# --- over HTTP ----------------------------------------------------------------------------------


def test_an_altered_upload_is_refused_and_leaves_nothing(server: Running) -> None:
    digest = of_bytes(b"altered upload")
    with server.http() as http:
        answer = http.put(f"/api/v1/blobs/{digest}", content=b"altered uploaD")
        assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
        assert answer.headers["content-type"] == "application/problem+json"
        assert http.head(f"/api/v1/blobs/{digest}").status_code == 404
        assert http.put(f"/api/v1/blobs/{digest}", content=b"altered upload").status_code == 201
        assert http.put(f"/api/v1/blobs/{digest}", content=b"altered upload").status_code == 200
        assert http.head(f"/api/v1/blobs/{digest}").headers["wherry-bytes"] == "14"


def test_an_upload_that_is_cut_short_leaves_nothing(server: Running, s3: S3) -> None:
    data = b"cut!" * 5_000_000
    digest = of_bytes(data)
    with socket.create_connection(("127.0.0.1", server.settings.port)) as raw:
        raw.sendall(
            f"PUT /api/v1/blobs/{digest} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.admin}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
        )
        raw.sendall(data[: len(data) // 2])
        until(lambda: arriving(server, s3))
    until(lambda: not arriving(server, s3))
    with server.http() as http:
        assert http.head(f"/api/v1/blobs/{digest}").status_code == 404
        assert http.put(f"/api/v1/blobs/{digest}", content=data).status_code == 201


def test_who_may_not_publish_uploads_nothing(server: Running) -> None:
    digest = of_bytes(b"of an operator")
    with server.http(server.token("operator")) as http:
        answer = http.put(f"/api/v1/blobs/{digest}", content=b"of an operator")
        assert (answer.status_code, answer.json()["code"]) == (403, "role_missing")
        assert http.head(f"/api/v1/blobs/{digest}").status_code == 404


def test_a_device_fetches_blobs_of_its_project_by_ranges_and_conditions(server: Running, tmp_path: Path) -> None:
    weights = hashlib.shake_256(b"random").digest(700_000)
    manifest, released = release(server, tmp_path, "ranged", weights=weights)
    digest = manifest.layers[0].digest
    etag = f'"{digest}"'
    device = server.device("ranger")
    give(server.settings, device.device, released)
    with server.as_device(device) as http:
        url = f"/device/v1/blobs/{digest}"
        whole = http.get(url)
        assert (whole.status_code, whole.content) == (200, weights)
        assert whole.headers["etag"] == etag
        assert whole.headers["content-length"] == str(len(weights))
        assert whole.headers["accept-ranges"] == "bytes"
        part = http.get(url, headers={"Range": "bytes=600000-"})
        assert (part.status_code, part.content) == (206, weights[600_000:])
        assert part.headers["content-range"] == "bytes 600000-699999/700000"
        beyond = http.get(url, headers={"Range": "bytes=700000-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */700000")
        same = http.get(url, headers={"If-None-Match": etag})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
        assert http.get(url, headers={"Range": "bytes=0-0", "If-Range": '"x"'}).content == weights
        assert http.get(url, headers={"Range": "bytes=0-1,4-5"}).content == weights


def test_a_blob_that_no_bundle_names_is_not_served(server: Running) -> None:
    digest = of_bytes(b"inert")
    with server.http() as http:
        assert http.put(f"/api/v1/blobs/{digest}", content=b"inert").status_code == 201
    with server.as_device(server.device("curious")) as http:
        for path in (f"/device/v1/blobs/{digest}", f"/device/v1/blobs/{digest}/info"):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["code"]) == (404, "blob_unknown")


def assign(server: Running, device: str, rollout: str, came_from: str, to: str, outcome: str) -> None:
    """Insert an assignment as a rollout leaves it."""
    row = {
        "rollout_id": rollout,
        "device_id": device,
        "model": "had",
        "project_id": server.settings.project,
        "stage": 0,
        "share_key": 0,
        "from_manifest": came_from,
        "to_manifest": to,
        "to_target": "had/1.0.0",
        "exposed_at": 1,
        "outcome": outcome,
    }
    in_database(server.settings, lambda connection: connection.execute(insert(Assignment).values(**row)))


def opened(server: Running, device: wire.EnrolAnswer, manifest: Manifest, digest: str) -> set[int]:
    """Return the statuses with which all blobs of a bundle answer a device, and their information."""
    blobs = [digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)]
    with server.as_device(device) as http:
        answers = [http.get(f"/device/v1/blobs/{blob}{part}") for blob in blobs for part in ("", "/info")]
    assert all(answer.is_success or answer.json()["code"] == "blob_unknown" for answer in answers)
    return {answer.status_code for answer in answers}


def test_a_device_reads_what_it_is_offered_and_nothing_that_only_another_one_is(
    server: Running, tmp_path: Path
) -> None:
    mine, my_digest = release(server, tmp_path, "mine", weights=b"mine" * 9000)
    other, other_digest = release(server, tmp_path, "other", weights=b"other" * 9000)
    thief, owner = server.device("thief"), server.device("owner")
    assert opened(server, thief, mine, my_digest) == {404}
    give(server.settings, thief.device, my_digest)
    give(server.settings, owner.device, other_digest)
    assert opened(server, thief, mine, my_digest) == {200}
    assert opened(server, thief, other, other_digest) == {404}
    assert opened(server, owner, other, other_digest) == {200}

    def encoded() -> str:
        with server.as_device(owner) as http:
            answer = http.get(f"/device/v1/blobs/{other.layers[0].digest}/info").content
        return "".join(encoding.digest for encoding in wire.parse(wire.BlobInfo, answer).encodings)

    url = f"/device/v1/blobs/{until(encoded)}"
    with server.as_device(owner) as own, server.as_device(thief) as foreign:
        assert own.get(url, headers={"Range": "bytes=0-9"}).status_code == 206
        assert foreign.get(url, headers={"Range": "bytes=0-9"}).status_code == 404


def test_a_device_reads_its_incumbent_and_no_bundle_that_it_only_claims_to_run(server: Running, tmp_path: Path) -> None:
    old, old_digest = release(server, tmp_path, "had", "1.0.0", weights=b"old" * 9000)
    new, new_digest = release(server, tmp_path, "had", "2.0.0", weights=b"new" * 9000)
    claimed, claimed_digest = release(server, tmp_path, "coveted", weights=b"coveted" * 9000)
    keeper = server.device("keeper")
    device = keeper.device
    assign(server, device, "first", "", old_digest, "superseded")
    assert opened(server, keeper, old, old_digest) == {404}
    assign(server, device, "second", old_digest, new_digest, "exposed")
    assert opened(server, keeper, old, old_digest) == {200}
    assert opened(server, keeper, new, new_digest) == {200}
    assign(server, device, "third", claimed_digest, new_digest, "exposed")  # `from` is what the device reported
    assert opened(server, keeper, claimed, claimed_digest) == {404}


def test_weights_that_get_smaller_are_also_served_as_zstd(server: Running, tmp_path: Path) -> None:
    weights = b"\0" * 200_000 + hashlib.shake_256(b"x").digest(50_000)
    manifest, released = release(server, tmp_path, "sparse", weights=weights)
    raw = manifest.layers[0].digest
    device = server.device("saver")
    give(server.settings, device.device, released)
    with server.as_device(device) as http:

        def info() -> wire.BlobInfo:
            return wire.parse(wire.BlobInfo, http.get(f"/device/v1/blobs/{raw}/info").content)

        until(lambda: info().encodings)
        found = info()
        assert found.bytes == len(weights)
        encoding = found.encodings[0]
        assert encoding.bytes < 60_000
        encoded = http.get(f"/device/v1/blobs/{encoding.digest}").content
        assert (of_bytes(encoded), len(encoded)) == (encoding.digest, encoding.bytes)
        assert zstandard.ZstdDecompressor().decompress(encoded) == weights
    with server.http() as http:
        variant = http.get("/api/v1/bundles/sparse/1.0.0").json()["variants"][0]
        assert (variant["bytes"], variant["download_bytes"]) == (len(weights), encoding.bytes)


def test_weights_that_do_not_get_smaller_keep_one_form(server: Running, tmp_path: Path) -> None:
    manifest, first = release(server, tmp_path, "noise", weights=hashlib.shake_256(b"noise").digest(100_000))
    marker, second = release(server, tmp_path, "marker", weights=b"m" * 100_000)  # encoded after it, one at a time
    device = server.device("listener")
    give(server.settings, device.device, first, second)
    with server.as_device(device) as http:

        def encodings(digest: str) -> list[wire.Encoding]:
            return wire.parse(wire.BlobInfo, http.get(f"/device/v1/blobs/{digest}/info").content).encodings

        until(lambda: encodings(marker.layers[0].digest))
        assert encodings(manifest.layers[0].digest) == []
