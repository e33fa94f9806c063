"""What keeps blobs, a folder or a bucket: whole and right, or not there; and a bucket behind a server and a courier."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zstandard
from sqlalchemy import insert
from typer.testing import CliRunner

from tests.offering import give
from tests.s3 import KEY_ID, REGION, S3, SECRET, Door, with_key
from tests.server.harness import Running, free_port, in_database, release, running, until
from tests.server.test_director_process import role
from tests.server.test_replicas import answers
from tests.tls_front import TlsFront, server_certificate
from tests.trust_kit import Answer, little_server
from wherry_agent.courier_blobs import Blobs as Courier
from wherry_agent.courier_http import Http
from wherry_agent.disk import Disk
from wherry_agent.store import Store
from wherry_server import dev, pulse, uploads
from wherry_server.api.blobs import body_chunks
from wherry_server.blob_bucket import PART_BYTES, BucketBlobs, Credentials
from wherry_server.blob_folder import INCOMING, FolderBlobs
from wherry_server.blobs import Blobs, key_of
from wherry_server.cli.everything import app
from wherry_server.db.database import Database
from wherry_server.db.tables import BlobOwner
from wherry_server.encodings import StoppedError, compress
from wherry_server.identity import DeviceAuthority
from wherry_server.services import prepare
from wherry_server.settings import Settings
from wherry_server.spool import Spool
from wherry_shared import wire
from wherry_shared.bundle import Manifest
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError, RefusedError, UnreachableError, WherryError
from wherry_shared.limits import ZSTD_WINDOW_BYTES_MAX
from wherry_shared.publishing import PublisherKey, push

DATA = bytes(range(256)) * 2000
DIGEST = of_bytes(DATA)
CREDENTIALS = Credentials(KEY_ID, SECRET)


@pytest.fixture(scope="module")
def door(s3: S3) -> Iterator[Door]:
    opened = Door(s3)
    yield opened
    opened.close()


def bucket_of(url: str, endpoint: str, spool: Path, **more: Any) -> BucketBlobs:
    fields = {"endpoint": endpoint, "region": REGION, "credentials": CREDENTIALS, **more}
    return BucketBlobs(url, Spool(spool), **fields)


@pytest.fixture(params=["folder", "bucket"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """A store of each kind, empty."""
    if request.param == "folder":
        return FolderBlobs(tmp_path / "blobs")
    s3: S3 = request.getfixturevalue("s3")
    return bucket_of(s3.bucket(), s3.url, tmp_path / "spool")


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def listed(blobs: Blobs) -> dict[str, int]:
    return {found.digest: found.bytes async for found in blobs.listed()}


def left_in(blobs: Blobs) -> list[str]:
    """Return everything that is kept: blobs, and in a folder what arrives."""
    if isinstance(blobs, FolderBlobs):
        return sorted(str(path.relative_to(blobs.folder)) for path in blobs.folder.rglob("*") if path.is_file())
    return [key_of(digest) for digest in asyncio.run(listed(blobs))]


def test_a_blob_is_read_back_as_it_was_written(blobs: Blobs) -> None:
    async def run() -> None:
        assert await blobs.stat(DIGEST) is None
        assert await blobs.put(DIGEST, chunks(DATA[:7], b"", DATA[7:]), length=len(DATA))
        unread = chunks(DATA)
        assert not await blobs.put(DIGEST, unread, length=len(DATA))
        assert [piece async for piece in unread] == [DATA], "what is here already is not taken again"
        read = b"".join([piece async for piece in blobs.read(DIGEST, 5, 400_000)])
        assert read == DATA[5:400_000]
        assert await blobs.get(DIGEST, bytes_max=len(DATA)) == DATA
        assert await blobs.size(DIGEST) == len(DATA)
        empty = await blobs.put_bytes(b"")
        assert await blobs.get(empty, bytes_max=0) == b""
        assert await listed(blobs) == {DIGEST: len(DATA), empty: 0}
        assert set(await blobs.stats([DIGEST, DIGEST, empty, of_bytes(b"else")])) == {DIGEST, empty}
        await blobs.check()
        await blobs.delete(DIGEST)
        await blobs.delete(DIGEST)
        assert await listed(blobs) == {empty: 0}

    asyncio.run(run())


def test_a_blob_of_several_parts_is_read_back_and_one_that_ends_wrong_is_never_seen(blobs: Blobs, s3: S3) -> None:
    large = hashlib.shake_256(b"large").digest(PART_BYTES + 3_000_000)
    parts = [large[start : start + 1_000_000] for start in range(0, len(large), 1_000_000)]

    async def run() -> None:
        with pytest.raises(RefusedError) as caught:
            await blobs.put(of_bytes(large), chunks(*parts[:-1], parts[-1][:-1] + b"x"))
        assert caught.value.code == "digest_mismatch"
        assert await listed(blobs) == {}
        assert await blobs.put(of_bytes(large), chunks(*parts), length=len(large))
        read = b"".join([piece async for piece in blobs.read(of_bytes(large), 1, len(large))])
        assert read == large[1:]

    asyncio.run(run())
    assert left_in(blobs) == [key_of(of_bytes(large))]
    if isinstance(blobs, BucketBlobs):
        assert s3.uploads(blobs.where) == 0


@pytest.mark.parametrize(
    ("parts", "length", "code"),
    [
        ((DATA[:-1],), len(DATA), "length_mismatch"),
        ((DATA, b"x"), len(DATA), "length_mismatch"),
        ((DATA[:-1] + b"x",), len(DATA), "digest_mismatch"),
        ((DATA[:-1],), None, "digest_mismatch"),
        ((), 0, "digest_mismatch"),
    ],
)
def test_nothing_is_kept_of_a_blob_that_is_not_what_it_says(
    blobs: Blobs, parts: tuple[bytes, ...], length: int | None, code: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        asyncio.run(blobs.put(DIGEST, chunks(*parts), length=length))
    assert caught.value.code == code
    assert left_in(blobs) == []


def test_the_same_blob_sent_twice_at_once_is_stored_once(blobs: Blobs) -> None:
    async def run() -> list[bool]:
        return await asyncio.gather(*(blobs.put(DIGEST, chunks(DATA)) for _ in range(8)))

    assert sum(asyncio.run(run())) >= 1
    assert left_in(blobs) == [key_of(DIGEST)]


def test_a_large_blob_is_not_read_where_a_small_one_is_expected(blobs: Blobs) -> None:
    asyncio.run(blobs.put_bytes(DATA))
    with pytest.raises(RefusedError) as caught:
        asyncio.run(blobs.get(DIGEST, bytes_max=10))
    assert caught.value.code == "blob_too_large"
    with pytest.raises(RefusedError) as caught:
        asyncio.run(blobs.get(of_bytes(b"none"), bytes_max=10))
    assert caught.value.code == "blob_unknown"


@pytest.mark.parametrize("name", ["sha256:../../etc/passwd", "sha256:AB", "md5:" + "0" * 32, "", "sha256:" + "g" * 64])
def test_only_digests_name_blobs(blobs: Blobs, name: str) -> None:
    for call in (blobs.stat, blobs.delete, lambda digest: blobs.put(digest, chunks(b""))):
        with pytest.raises(WherryError) as caught:
            asyncio.run(call(name))
        assert caught.value.code == "bad_digest"


def test_a_blob_that_was_altered_where_it_is_kept_is_not_used(blobs: Blobs, s3: S3) -> None:
    async def run() -> None:
        await blobs.put_bytes(DATA)
        wrong = DATA[:-1] + b"x"
        if isinstance(blobs, FolderBlobs):
            blobs.path(DIGEST).write_bytes(wrong)
        else:
            assert s3.ask("PUT", f"/{blobs.where.removeprefix('s3://')}/{key_of(DIGEST)}", wrong) == 200
        with pytest.raises(DeviceError) as caught:
            await blobs.get(DIGEST, bytes_max=len(DATA))
        assert caught.value.code == "blob_damaged"
        if isinstance(blobs, BucketBlobs):
            with pytest.raises(DeviceError) as caught:
                async with blobs.local(DIGEST, len(DATA)):
                    pytest.fail("it was taken for what it should be")
            assert caught.value.code == "blob_damaged"

        await blobs.delete(DIGEST)
        with pytest.raises(DeviceError, match="not in") as caught:
            await anext(blobs.read(DIGEST, 0, 10))
        assert caught.value.code == "blob_damaged"

    asyncio.run(run())


def test_work_on_files_finds_a_blob_as_a_file_and_leaves_none(blobs: Blobs, tmp_path: Path) -> None:
    async def run() -> None:
        await blobs.put_bytes(DATA)
        async with blobs.local(DIGEST, len(DATA)) as raw, blobs.scratch(1000) as made:
            assert raw.read_bytes() == DATA
            made.write_bytes(b"made of it")
            await blobs.put_file(made, of_bytes(b"made of it"), 10)
        assert not made.exists()
        assert await blobs.get(of_bytes(b"made of it"), bytes_max=10) == b"made of it"

    asyncio.run(run())
    assert sorted(left_in(blobs)) == sorted(key_of(of_bytes(data)) for data in (DATA, b"made of it"))
    assert not list((tmp_path / "spool").glob("*"))


def test_an_upload_that_no_bundle_names_counts_as_gone_a_day_before_it_is_deleted(blobs: Blobs, tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "data")
    prepare(settings)
    inert, named = of_bytes(b"inert"), of_bytes(b"named")
    row = {"project_id": settings.project, "digest": named, "bytes": 5, "created_at": 1, "kind": "other"}
    in_database(settings, lambda connection: connection.execute(insert(BlobOwner).values(**row)))
    database = Database.open(settings.database_url)
    began_s = time.time()

    async def here(days: float) -> set[str]:
        async with database.read() as connection:
            both = [inert, named, of_bytes(b"never uploaded")]
            return set(await uploads.here(connection, blobs, both, 7, now_s=began_s + days * uploads.DAY_S))

    async def collect(days: float, *, delete: bool) -> int:
        now_s = began_s + days * uploads.DAY_S
        return (await uploads.collect(database, blobs, 7, delete=delete, now_s=now_s)).blobs

    async def run() -> None:
        await blobs.put_bytes(b"inert")
        await blobs.put_bytes(b"named")
        assert await here(5.9) == {inert, named}
        assert await here(6.1) == {named}
        assert await collect(6.9, delete=True) == 0
        assert await collect(7.1, delete=False) == 1
        assert await collect(7.1, delete=True) == 1
        assert await listed(blobs) == {named: 5}
        await database.close()

    asyncio.run(run())


def test_what_is_uploaded_again_after_a_day_is_new_again(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        await blobs.put_bytes(DATA)
        if isinstance(blobs, FolderBlobs):
            os.utime(blobs.path(DIGEST), (1, 1))
        monkeypatch.setattr(f"{type(blobs).__module__}.REFRESHED_S", 0.0)
        before_s = time.time()
        taken = await blobs.put(DIGEST, chunks(DATA))
        assert taken == isinstance(blobs, BucketBlobs)
        found = await blobs.stat(DIGEST)
        assert found is not None
        assert found.modified_s > before_s - 2.0, "whole seconds"
        assert await blobs.get(DIGEST, bytes_max=len(DATA)) == DATA

    asyncio.run(run())


def test_a_sender_that_stands_still_is_not_waited_for(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherry_server.api.blobs.SILENCE_S", 0.05)

    class Request:
        async def stream(self) -> AsyncIterator[bytes]:
            yield DATA * 20  # more than one part: the upload to a bucket has begun
            await asyncio.sleep(3600)

    with pytest.raises(RefusedError, match="stood still") as caught:
        asyncio.run(blobs.put(of_bytes(DATA * 40), body_chunks(Request())))
    assert caught.value.code == "length_mismatch"
    assert left_in(blobs) == []


# --- a folder -------------------------------------------------------------------------------------


def test_what_a_killed_upload_left_is_swept(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    (tmp_path / INCOMING).mkdir()
    (tmp_path / INCOMING / "half").write_bytes(b"half")
    assert blobs.sweep(older_than_s=1000.0) == 0
    assert blobs.sweep() == 1
    assert left_in(blobs) == []


def test_a_disk_that_takes_no_more_is_this_machines_fault_and_nothing_stays(tmp_path: Path) -> None:
    script = """
import asyncio, resource, sys
from pathlib import Path
from wherry_server.blob_folder import FolderBlobs
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
data = b"x" * 3_000_000

async def chunks():
    for start in range(0, len(data), 65536):
        yield data[start : start + 65536]

try:
    asyncio.run(FolderBlobs(Path(sys.argv[1])).put(of_bytes(data), chunks()))
except DeviceError as error:
    print(error.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "disk", done.stderr
    assert left_in(FolderBlobs(tmp_path)) == []


def test_the_window_of_an_encoding_fits_every_device(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.write_bytes(b"the same line again and again\n" * 500_000)
    size = source.stat().st_size
    assert size > ZSTD_WINDOW_BYTES_MAX
    digest, length = compress(source, tmp_path / "encoded", size, threading.Event())
    encoded = (tmp_path / "encoded").read_bytes()
    assert (of_bytes(encoded), len(encoded)) == (digest, length)
    assert zstandard.get_frame_parameters(encoded).window_size <= ZSTD_WINDOW_BYTES_MAX
    decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    assert decoder.decompress(encoded) == source.read_bytes()


def test_compressing_is_given_up_when_the_server_ends(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(DATA)
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        compress(tmp_path / "raw", tmp_path / "encoded", len(DATA), stop)


# --- the spool ------------------------------------------------------------------------------------


def test_the_spool_is_bounded_and_who_does_not_fit_now_waits(tmp_path: Path) -> None:
    async def run() -> None:
        spool = Spool(tmp_path, 100)
        with pytest.raises(DeviceError) as caught:
            async with spool.file(101):
                pass
        assert caught.value.code == "spool_small"
        order: list[str] = []

        async def second() -> None:
            async with spool.file(50):
                order.append("second")

        async with spool.file(60) as path:
            path.write_bytes(b"x")
            waiting = asyncio.create_task(second())
            for _ in range(5):
                await asyncio.sleep(0)
            order.append("first")
        await waiting
        assert order == ["first", "second"]

    asyncio.run(run())
    assert not list(tmp_path.iterdir())


# --- a bucket that does not work ------------------------------------------------------------------


def test_a_bucket_that_is_not_there_or_does_not_answer_says_what_to_do(s3: S3, door: Door, tmp_path: Path) -> None:
    absent = bucket_of("s3://wherry-nobody-made-this", s3.url, tmp_path)
    shut = bucket_of("s3://wherry-any", f"http://127.0.0.1:{free_port()}", tmp_path)
    for blobs, why in ((absent, "NoSuchBucket"), (shut, "no answer")):
        for call in (blobs.check, lambda blobs=blobs: blobs.put(DIGEST, chunks(DATA))):
            if blobs is shut and call != blobs.check:
                continue  # each takes its retries
            with pytest.raises(UnreachableError, match=why) as caught:
                asyncio.run(call())
            assert caught.value.code == "blobs_unreachable"
            assert caught.value.consequence
            assert "bucket exists" in caught.value.next_step


def test_no_credential_is_in_what_a_refusal_says(tmp_path: Path) -> None:
    """S3 repeats what it was sent, session tokens too, when a signature is wrong."""
    body = f"<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId>".encode()
    body += b"<CanonicalRequest>x-amz-security-token:the-token</CanonicalRequest></Error>"
    with little_server(lambda _path, _headers: Answer(403, body)) as server:
        keys = Credentials(KEY_ID, SECRET, "the-token")
        blobs = bucket_of("s3://wherry-any/p", server.url, tmp_path, credentials=keys)
        with pytest.raises(UnreachableError, match="SignatureDoesNotMatch") as caught:
            asyncio.run(blobs.check())
        assert server.asked[-1][1]["x-amz-security-token"] == "the-token"
    assert caught.value.code == "blobs_forbidden"
    told = caught.value.diagnostics() + str(caught.value.__cause__) + repr(blobs.__dict__) + repr(keys)
    assert not any(secret in told for secret in (SECRET, "the-token"))
    assert caught.value.__suppress_context__


def test_the_environment_says_where_the_bucket_is_and_who_we_are(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }.items():
        monkeypatch.setenv(name, value)
    blobs = BucketBlobs(s3.bucket(), Spool(tmp_path))

    async def run() -> str | None:
        await blobs.put_bytes(DATA)
        return await blobs.address(DIGEST, 60)

    address = asyncio.run(run())
    assert address is not None
    assert address.startswith(s3.url)
    assert f"{KEY_ID}%2F" in address
    assert SECRET not in address


def test_without_any_credentials_it_says_which_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with little_server(lambda _path, _headers: Answer(404)) as instance:  # what stands for the machine's own service
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", instance.url)
        blobs = BucketBlobs("s3://wherry-any", Spool(tmp_path), endpoint=instance.url, region=REGION)
        for call in (blobs.check, lambda: blobs.address(DIGEST, 60)):
            with pytest.raises(UnreachableError, match="no credentials") as caught:
                asyncio.run(call())
            assert caught.value.code == "blobs_forbidden"
            assert "keys/s3.json" in caught.value.next_step


def test_a_store_with_an_authority_of_its_own_is_believed_when_the_environment_names_it(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DeviceAuthority.create(tmp_path, "store")
    front = TlsFront(s3.port, *server_certificate(tmp_path, tmp_path))
    bucket, url = s3.bucket(), f"https://127.0.0.1:{front.port}"
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    with pytest.raises(UnreachableError):
        asyncio.run(bucket_of(bucket, url, tmp_path).check())
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "devices-ca.pem"))
    blobs = bucket_of(bucket, url, tmp_path)
    asyncio.run(blobs.put_bytes(DATA))
    assert asyncio.run(blobs.size(DIGEST)) == len(DATA)
    front.close()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none"))
    with pytest.raises(RefusedError, match="AWS_CA_BUNDLE"):
        bucket_of(bucket, url, tmp_path)


def test_a_key_file_that_is_none_is_refused_without_quoting_it(tmp_path: Path) -> None:
    file = tmp_path / "s3.json"
    assert Credentials.load(file) is None
    file.write_bytes(msgspec.json.encode(CREDENTIALS))
    assert Credentials.load(file) == CREDENTIALS
    file.write_text(f'{{"secret_access_key": "{SECRET}", "acces_key_id": "x"}}')
    with pytest.raises(RefusedError) as caught:
        Credentials.load(file)
    assert SECRET not in caught.value.diagnostics()


@pytest.mark.parametrize(
    "wrong",
    [
        {"blobs": "s3://"},
        {"blobs": "s3://key:secret@bucket"},
        {"blobs": "file://host/folder"},
        {"blobs": "https://bucket"},
        {"blobs": "s3://bucket?x=1"},
        {"blobs": "s3://bucket/some prefix"},
        {"blobs": "s3://bucket/a//b"},
        {"blobs": "/folder"},
        {"s3_endpoint": "127.0.0.1:9000"},
        {"s3_public_endpoint": "https://user:password@host"},
        {"presign_s": 86_400},
    ],
)
def test_a_place_that_is_none_is_refused_when_settings_are_read(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(RefusedError) as caught:
        Settings.load(tmp_path, **wrong)
    assert caught.value.code == "settings_invalid"


def test_blobs_can_be_in_another_folder(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path / "data", blobs=f"file://{tmp_path}/other%20disk")
    assert settings.blobs_folder == tmp_path / "other disk"
    assert Settings.load(tmp_path / "data", blobs="s3://bucket/prefix").blobs_folder is None


# --- a bucket behind a server ---------------------------------------------------------------------


@contextmanager
def served(folder: Path, bucket: str, endpoint: str, **overrides: Any) -> Iterator[Running]:
    """Run a server whose blobs are in a bucket."""
    with_key(folder)
    with running(folder, blobs=bucket, s3_endpoint=endpoint, s3_region=REGION, **overrides) as server:
        yield server


def given(server: Running, folder: Path, model: str, weights: bytes) -> tuple[Manifest, wire.EnrolAnswer]:
    """Release a bundle and give it to a device."""
    manifest, digest = release(server, folder, model, weights=weights)
    device = server.device(f"of-{model}")
    give(server.settings, device.device, digest)
    return manifest, device


def health(http: httpx.Client) -> dict[str, str]:
    answer = http.get("/api/v1/health")
    assert answer.status_code == 200, "devices are served without blobs"
    return answer.json()


def courier(server: Running, device: wire.EnrolAnswer, home: Path) -> Courier:
    http = Http(server=server.url, authorization=f"Bearer {device.device}:{device.bearer}")
    return Courier(
        store=Store(home, Disk()),
        disk=Disk(),
        http=http,
        server=server.url,
        mirrors=[],
        tries_max=3,
        sleep=lambda _seconds: None,
    )


def test_a_device_is_sent_to_the_bucket_and_resumes_there_by_new_addresses(s3: S3, door: Door, tmp_path: Path) -> None:
    weights = hashlib.shake_256(b"bucket").digest(700_000)
    with served(tmp_path / "data", s3.bucket(), s3.url, s3_public_endpoint=door.url) as server:
        manifest, device = given(server, tmp_path, "far", weights)
        digest = manifest.layers[0].digest
        url = f"/device/v1/blobs/{digest}"
        etag = f'"{digest}"'

        # who may not have it is not told where it is
        with server.as_device(server.device("stranger")) as http:
            answer = http.get(url)
            assert (answer.status_code, answer.json()["code"], "location" in answer.headers) == (
                404,
                "blob_unknown",
                False,
            )
        with server.http("nobody") as http:
            assert http.get(url).status_code == 401
        with server.as_device(device) as http:
            assert http.get(url, headers={"If-None-Match": etag}).status_code == 304
            assert http.get(url, headers={"Range": "bytes=700000-"}).status_code == 416
            assert not door.asked
            sent = http.get(url)
            assert (sent.status_code, sent.headers["cache-control"], sent.content) == (307, "no-store", b"")
            assert sent.headers["location"].startswith(f"{door.url}/")
            assert "X-Amz-Expires=300" in sent.headers["location"]
            other = sent.headers["location"].replace(digest[7:], hashlib.sha256(b"other").hexdigest())
        assert httpx.get(sent.headers["location"], trust_env=False).content == weights
        assert httpx.get(other, trust_env=False).status_code == 403, "an address opens one blob"
        assert door.refused == ["signature"]

        # cut in the middle, then an address that expired on the way, then cut again
        door.asked.clear()
        door.refused.clear()
        door.cuts[:] = [200_000, 300_000]
        door.late_s[:] = [0.0, 10_000.0]
        bring = courier(server, device, tmp_path / "home")
        bring.bring(digest, len(weights))
        assert bring.store.read(digest, len(weights)) == weights
        assert bring.wire_bytes == len(weights), "nothing was fetched twice"
        # a bucket that lost a blob is filled again by pushing what named it
        asyncio.run(bucket_of(server.settings.blobs, s3.url, tmp_path).delete(digest))
        with server.as_device(device) as http:
            lost = http.get(url).headers["location"]
            assert httpx.get(lost, trust_env=False).status_code == 404
        with server.remote() as remote:
            push(tmp_path / "far-1.0.0", remote, PublisherKey.open(tmp_path / "data-publisher.pem"))
        assert httpx.get(lost, trust_env=False).content == weights
    ranges = [headers.get("range") for _, headers in door.asked[:4]]
    assert ranges == [None, "bytes=200000-", "bytes=200000-", "bytes=500000-"]
    assert door.refused == ["expired"]
    assert not any({"authorization", "if-range"} & headers.keys() for _, headers in door.asked)
    assert device.bearer not in repr(door.asked)


def test_without_addresses_the_server_passes_the_bytes_on_and_encodings_are_made_in_the_spool(
    s3: S3, door: Door, tmp_path: Path
) -> None:
    weights = b"\0" * 3_000_000 + hashlib.shake_256(b"x").digest(50_000)
    door.asked.clear()
    bucket = s3.bucket()
    with served(tmp_path / "data", bucket, s3.url, s3_public_endpoint=door.url, presign_s=0) as server:
        manifest, device = given(server, tmp_path, "near", weights)
        digest = manifest.layers[0].digest
        with server.as_device(device) as http:
            url = f"/device/v1/blobs/{digest}"
            part = http.get(url, headers={"Range": "bytes=600000-"})
            assert (part.status_code, part.content) == (206, weights[600_000:])
            assert part.headers["content-range"] == f"bytes 600000-{len(weights) - 1}/{len(weights)}"

            def encodings() -> list[wire.Encoding]:
                return wire.parse(wire.BlobInfo, http.get(f"{url}/info").content).encodings

            (encoding,) = until(encodings)
            encoded = http.get(f"/device/v1/blobs/{encoding.digest}").content
            assert zstandard.ZstdDecompressor().decompress(encoded) == weights
            until(lambda: not list(server.settings.spool_folder.glob("*")))
        courier(server, device, tmp_path / "home").bring(digest, len(weights))
        assert Store(tmp_path / "home", Disk()).read(digest, len(weights)) == weights
    assert not door.asked
    assert not (tmp_path / "data" / "blobs").exists()


def test_a_bucket_out_of_reach_is_said_so_and_nothing_is_lost(
    s3: S3, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store hangs up on everybody for a while: health tells, uploads and downloads say so, later all goes on."""
    weights = hashlib.shake_256(b"away").digest(300_000)
    monkeypatch.setattr(pulse, "KEPT_S", 0.0)
    with served(tmp_path / "data", s3.bucket(), door.url, presign_s=0) as server:
        manifest, device = given(server, tmp_path, "away", weights)
        url = f"/device/v1/blobs/{manifest.layers[0].digest}"
        with server.as_device(device) as http:
            assert http.get(f"{url}/info").status_code == 200  # the manifest was read: it says who may have what
        door.shut = True
        try:
            with server.http() as http:
                answer = http.put(f"/api/v1/blobs/{DIGEST}", content=DATA)
                assert (answer.status_code, answer.json()["code"]) == (503, "blobs_unreachable")
                assert "then upload again" in answer.json()["next_step"]
                found = until(lambda: (now := health(http))["blobs"] != pulse.LATE and now)
                assert (found["status"], found["blobs"]) == ("degraded", "blobs_unreachable")
            with server.as_device(device) as http:
                assert (http.get(url).status_code, http.get(f"{url}/info").status_code) == (503, 200)
            bring = courier(server, device, tmp_path / "home")
            bring.tries_max = 1
            with pytest.raises(UnreachableError, match="503"):
                bring.bring(manifest.layers[0].digest, len(weights))
        finally:
            door.shut = False
        with server.http() as http:
            assert health(http)["status"] == "ok"
            assert http.put(f"/api/v1/blobs/{DIGEST}", content=DATA).status_code == 201
        bring.bring(manifest.layers[0].digest, len(weights))
        assert bring.store.read(manifest.layers[0].digest, len(weights)) == weights


def test_a_server_is_not_made_ready_over_a_bucket_that_does_not_let_it_in(tmp_path: Path) -> None:
    with_key(tmp_path / "data")
    with little_server(lambda _path, _headers: Answer(403, b"<Error><Code>AccessDenied</Code></Error>")) as refusing:
        settings = Settings.load(tmp_path / "data", blobs="s3://wherry-any", s3_endpoint=refusing.url, s3_region=REGION)
        with pytest.raises(UnreachableError) as caught:
            dev.init(settings)
    assert caught.value.code == "blobs_forbidden"
    assert not (tmp_path / "data" / "settings.json").exists()


def doctor(folder: Path) -> tuple[int, dict[str, dict[str, str]]]:
    done = CliRunner().invoke(app, ["doctor", "--data", str(folder), "--json"])
    return done.exit_code, {row["asked"]: row for row in json.loads(done.stdout)}


def test_the_doctor_asks_the_bucket_and_the_way_of_devices_to_it(s3: S3, door: Door, tmp_path: Path) -> None:
    bucket, folder = s3.bucket(), tmp_path / "data"
    with_key(folder)
    ports = ["--port", str(free_port()), "--broker-port", str(free_port())]
    store = ["--blobs", bucket, "--s3-endpoint", s3.url, "--s3-region", REGION, "--s3-public-endpoint", door.url]
    made = CliRunner().invoke(app, ["init", "--data", str(folder), "--development-trust", *ports, *store])
    assert made.exit_code == 0, made.output
    code, found = doctor(folder)
    levels = {name: row["level"] for name, row in found.items()}
    assert levels == {
        "data folder": "bad",
        "database": "ok",
        "trust": "note",
        "blobs": "note",
        "broker": "bad",
        "api": "note",
    }
    assert (code, "s3.json" in found["data folder"]["detail"]) == (1, True)
    assert door.url in found["blobs"]["detail"], "plain http to the bucket, where the API may be https"
    (folder / "keys" / "s3.json").chmod(0o600)
    door.late_s[:] = [1000.0]
    found = doctor(folder)[1]
    assert found["data folder"]["level"] == "ok"
    assert "answers 403" in found["blobs"]["detail"]
    asyncio.run(_nothing_in(bucket_of(bucket, s3.url, tmp_path)))
    absent = json.loads((folder / "settings.json").read_bytes()) | {"blobs": "s3://wherry-absent"}
    (folder / "settings.json").write_text(json.dumps(absent))
    row = doctor(folder)[1]["blobs"]
    assert (row["level"], "NoSuchBucket" in row["detail"]) == ("bad", True)
    assert "bucket exists" in row["next_step"]


async def _nothing_in(blobs: Blobs) -> None:
    assert await listed(blobs) == {}, "the doctor leaves nothing"


def test_uploads_are_collected_by_a_command_that_first_only_counts(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with running(folder, encode_blobs=False, uploads_days=3) as server:
        server.settings.save()
        blobs = FolderBlobs(folder / "blobs")
        manifest, digest = release(server, tmp_path, "kept")
        long_ago = time.time() - 10 * uploads.DAY_S
        with server.http() as http:
            assert http.put(f"/api/v1/blobs/{DIGEST}", content=DATA).status_code == 201
            for one in (DIGEST, digest, manifest.layers[0].digest):
                os.utime(blobs.path(one), (long_ago, long_ago))
            assert http.head(f"/api/v1/blobs/{DIGEST}").status_code == 404, "soon it is gone: upload it again"
            assert http.head(f"/api/v1/blobs/{digest}").status_code == 200
            assert http.put(f"/api/v1/blobs/{DIGEST}", content=DATA).status_code == 200
            assert http.head(f"/api/v1/blobs/{DIGEST}").status_code == 200
            os.utime(blobs.path(DIGEST), (long_ago, long_ago))
            (blobs.folder / INCOMING / "half").write_bytes(b"half")
            os.utime(blobs.folder / INCOMING / "half", (long_ago, long_ago))
    run = CliRunner()
    found = json.loads(run.invoke(app, ["blobs", "collect", "--data", str(folder), "--json"]).stdout)
    assert found == {"blobs": 1, "bytes": len(DATA), "leftovers": 0, "days": 3, "deleted": False}
    assert blobs.path(DIGEST).exists()
    done = run.invoke(app, ["blobs", "collect", "--data", str(folder), "--delete"])
    assert "1 leftovers" in done.stdout
    assert not blobs.path(DIGEST).exists()
    assert blobs.path(digest).exists()


@pytest.mark.soak
def test_an_api_that_is_killed_in_an_upload_leaves_nothing_to_see_and_another_takes_it(s3: S3, tmp_path: Path) -> None:
    bucket, ports = s3.bucket(), (free_port(), free_port())
    data = hashlib.shake_256(b"killed").digest(3 * PART_BYTES)
    digest = of_bytes(data)
    with_key(tmp_path / "data")
    settings = Settings.load(tmp_path / "data", blobs=bucket, s3_endpoint=s3.url, s3_region=REGION)
    token = dev.init(settings).admin
    path = f"/api/v1/blobs/{digest}"
    with role("api", settings, "--port", str(ports[0])) as first, role("api", settings, "--port", str(ports[1])):
        until(lambda: all(answers(port) for port in ports), 60)
        with socket.create_connection(("127.0.0.1", ports[0])) as raw:
            raw.sendall(
                f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
            )
            raw.sendall(data[: 2 * PART_BYTES + 100_000])
            until(lambda: s3.uploads(bucket) == 1)
            first.kill()
            first.wait()
        headers = {"Authorization": f"Bearer {token}"}
        second = f"http://127.0.0.1:{ports[1]}"
        with httpx.Client(base_url=second, headers=headers, trust_env=False, timeout=60) as http:
            assert http.head(path).status_code == 404
            assert asyncio.run(listed(bucket_of(bucket, s3.url, tmp_path))) == {}
            assert http.put(path, content=data).status_code == 201
            assert http.head(path).headers["wherry-bytes"] == str(len(data))
    assert s3.uploads(bucket) == 1, "what the bucket's lifecycle rule is for"
