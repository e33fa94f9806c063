"""A bundle is accepted after everything that can be checked was checked, and never changes."""

from __future__ import annotations

from pathlib import Path

import httpx
import msgspec
import pytest

from tests.server.harness import Running, release, running, write_bundle
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout, LayoutWriter
from wherry_shared.publishing import PublisherKey, sign

pytestmark = pytest.mark.backends


def upload(http: httpx.Client, root: Path, *, leave: str = "") -> None:
    """Upload the blobs of a layout, but one."""
    for path in (root / "blobs" / "sha256").iterdir():
        if path.name != leave.removeprefix("sha256:"):
            assert http.put(f"/api/v1/blobs/sha256:{path.name}", content=path.read_bytes()).status_code in (200, 201)


def publish(http: httpx.Client, model: str, version: str, manifest: str) -> httpx.Response:
    return http.post("/api/v1/bundles", json={"model": model, "version": version, "manifest": manifest})


def test_a_signed_bundle_is_released_and_listed(server: Running, tmp_path: Path) -> None:
    _, digest = release(server, tmp_path, "listed", "1.9.0")
    release(server, tmp_path, "listed", "1.10.0")
    release(server, tmp_path, "listed", "1.10.0-rc.1")
    with server.http(server.token("viewer")) as http:
        bundles = http.get("/api/v1/bundles", params={"model": "listed"}).json()
        assert [bundle["version"] for bundle in bundles] == ["1.10.0", "1.10.0-rc.1", "1.9.0"]
        assert bundles[2]["manifest"] == digest
        assert bundles[2]["variants"][0]["engines"] == ["onnxruntime"]
        shown = http.get("/api/v1/bundles/listed/1.9.0").json()
        assert shown["config"]["interface"]["inputs"][0]["name"] == "x"
        models = {model["name"]: model for model in http.get("/api/v1/models").json()}
        assert models["listed"]["versions"] == ["1.10.0", "1.10.0-rc.1", "1.9.0"]
        assert models["listed"]["devices"] == 0


def test_an_unsigned_bundle_is_refused_and_stays_inert(server: Running, tmp_path: Path) -> None:
    manifest, digest = write_bundle(tmp_path, "unsigned", weights=b"never signed" * 100)
    with server.http() as http:
        upload(http, tmp_path)
        answer = publish(http, "unsigned", "1.0.0", digest)
        assert (answer.status_code, answer.json()["code"]) == (422, "unsigned")
        assert http.get("/api/v1/bundles/unsigned/1.0.0").status_code == 404
    with server.as_device(server.device("wary")) as device:
        assert device.get(f"/device/v1/blobs/{manifest.layers[0].digest}").status_code == 404


def test_a_bundle_is_not_signed_by_the_signature_of_another_version(server: Running, tmp_path: Path) -> None:
    release(server, tmp_path, "borrowed", "1.0.0")
    _, other = write_bundle(tmp_path / "other", "borrowed", "1.0.0", weights=b"swapped" * 100)
    with server.http() as http:
        upload(http, tmp_path / "other")
        answer = publish(http, "borrowed", "1.0.0", other)
        assert (answer.status_code, answer.json()["code"]) == (422, "unsigned")
        assert "the signed bin names" in answer.json()["detail"]


@pytest.mark.parametrize("missing", ["config", "weights", "golden", "manifest"])
def test_a_bundle_with_a_missing_blob_is_refused_with_its_name(server: Running, tmp_path: Path, missing: str) -> None:
    manifest, digest = write_bundle(tmp_path, "gap", weights=b"gap" * 700 + missing.encode())
    name = {
        "config": manifest.config.digest,
        "weights": manifest.layers[0].digest,
        "golden": manifest.layers[1].digest,
        "manifest": digest,
    }[missing]
    with server.http() as http:
        if missing == "golden":  # the same for all four: it must not be there from another one
            manifest, digest = write_bundle(tmp_path / "golden", "gap-of-golden")
            name = manifest.layers[1].digest
            upload(http, tmp_path / "golden", leave=name)
            answer = publish(http, "gap-of-golden", "1.0.0", digest)
        else:
            upload(http, tmp_path, leave=name)
            answer = publish(http, "gap", "1.0.0", digest)
    assert (answer.status_code, answer.json()["code"]) == (422, "blob_missing")
    assert name in answer.json()["detail"]


def test_a_version_is_bound_to_one_manifest_for_ever(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server, server.http() as http:
        _, digest = release(server, tmp_path, "bound")
        assert publish(http, "bound", "1.0.0", digest).status_code == 200
        _, other = write_bundle(tmp_path / "other", "bound", weights=b"other" * 500)
        key = PublisherKey.open(tmp_path / "data-publisher.pem")
        with server.remote() as remote, pytest.raises(RefusedError) as caught:
            sign(tmp_path / "other", remote, key, publisher="lab")
        assert caught.value.code == "target_rebound"
        upload(http, tmp_path / "other")
        assert publish(http, "bound", "1.0.0", other).status_code in (409, 422)
        assert http.get("/api/v1/bundles/bound/1.0.0").json()["manifest"] == digest


def test_a_bundle_under_another_name_than_it_was_built_with_is_refused(server: Running, tmp_path: Path) -> None:
    _, digest = write_bundle(tmp_path, "named")
    with server.http() as http:
        upload(http, tmp_path)
        answer = publish(http, "renamed", "1.0.0", digest)
        assert (answer.status_code, answer.json()["code"]) == (422, "bundle_mismatch")
        answer = publish(http, "named", "1.0.1", digest)
        assert (answer.status_code, answer.json()["code"]) == (422, "bundle_mismatch")


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"{}", "manifest_invalid"), (b"\xff\x00", "manifest_invalid"), (b"[" * 200_000, "manifest_invalid")],
)
def test_what_is_no_manifest_is_refused(server: Running, data: bytes, code: str) -> None:
    with server.http() as http:
        http.put(f"/api/v1/blobs/{of_bytes(data)}", content=data)
        answer = publish(http, "odd", "1.0.0", of_bytes(data))
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_a_manifest_that_lies_about_a_size_is_refused(server: Running, tmp_path: Path) -> None:
    manifest, _ = write_bundle(tmp_path, "liar")
    layers = [manifest.layers[0], manifest.layers[1]]
    writer = LayoutWriter(tmp_path)
    lying = msgspec.structs.replace(
        manifest, config=msgspec.structs.replace(manifest.config, size=manifest.config.size + 1), layers=layers
    )
    digest = writer.finish(lying, "1.0.0").digest
    with server.http() as http:
        upload(http, tmp_path)
        answer = publish(http, "liar", "1.0.0", digest)
    assert (answer.status_code, answer.json()["code"]) == (422, "manifest_invalid")


def test_publishing_needs_the_role(server: Running, tmp_path: Path) -> None:
    _, digest = write_bundle(tmp_path, "roles")
    assert Layout(tmp_path).descriptor().digest == digest
    with server.http(server.token("operator")) as http:
        answer = publish(http, "roles", "1.0.0", digest)
    assert (answer.status_code, answer.json()["code"]) == (403, "role_missing")
