"""The OCI image layout: what is written can be read by us and by skopeo, and what was altered is refused."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.services import needs
from wherry_shared.bundle import (
    ANNOTATION_VARIANT,
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    DOC_TYPE,
    GOLDEN_TYPE,
    MANIFEST_TYPE,
    WEIGHT_TYPE,
    Config,
    EngineRange,
    GoldenIndex,
    Interface,
    Licence,
    Manifest,
    Provenance,
    TensorSpec,
    Variant,
    encode_config,
)
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout, LayoutWriter, verify_blob


def write(root: Path, version: str = "1.0.0", *, weights: bytes = b"weights" * 1000) -> Manifest:
    """Write a small bundle whose weights are no model: the layout does not look inside."""
    writer = LayoutWriter(root)
    source = root.parent / "weights.bin"
    source.write_bytes(weights)
    layer = writer.add_file(source, WEIGHT_TYPE, {ANNOTATION_VARIANT: "float"})
    golden = writer.add_bytes(b"golden", GOLDEN_TYPE, {ANNOTATION_VARIANT: "float"})
    licence = writer.add_bytes(b"do as you like", DOC_TYPE)
    tensor = TensorSpec(name="x", datatype="FP32", shape=[1])
    config = Config(
        format=1,
        model="thing",
        version=version,
        interface=Interface(inputs=[tensor], outputs=[tensor]),
        variants=[
            Variant(
                id="float",
                digest=layer.digest,
                bytes=layer.size,
                format="onnx",
                precision="float32",
                engines=[EngineRange(name="onnxruntime", minimum="1.20")],
                golden=GoldenIndex(digest=golden.digest, bytes=golden.size, vectors=1),
            )
        ],
        licence=Licence(expression="MIT", source="here", attribution="us"),
        provenance=Provenance(source_digests={}),
    )
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=writer.add_bytes(encode_config(config), CONFIG_TYPE),
        layers=[layer, golden, licence],
    )
    writer.finish(manifest, version)
    return manifest


def refusal(root: Path) -> str:
    """Return the code with which reading everything is refused."""
    with pytest.raises(RefusedError) as caught:
        Layout(root).verify_all()
    return caught.value.code


def test_a_written_bundle_reads_back_verified(tmp_path: Path) -> None:
    manifest = write(tmp_path / "b")
    layout = Layout(tmp_path / "b")
    assert layout.verify_all() == manifest
    data, _, config = layout.bundle("1.0.0")
    assert of_bytes(data) == layout.descriptor().digest
    assert config.variants[0].bytes == 7000


def test_writing_twice_gives_the_same_manifest(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b")
    write(tmp_path / "c" / "b")
    assert Layout(tmp_path / "a" / "b").descriptor() == Layout(tmp_path / "c" / "b").descriptor()


def test_a_second_version_joins_the_index_and_a_repeated_one_replaces(tmp_path: Path) -> None:
    root = tmp_path / "b"
    write(root)
    write(root, "1.1.0")
    write(root, "1.1.0", weights=b"other")
    layout = Layout(root)
    assert len(layout.index.manifests) == 2
    assert layout.bundle("1.1.0")[2].variants[0].bytes == 5
    with pytest.raises(RefusedError, match=r"1\.0\.0, 1\.1\.0"):
        layout.descriptor()


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda blob: blob.unlink(), "blob_missing"),
        (lambda blob: blob.write_bytes(b"W" + blob.read_bytes()[1:]), "digest_mismatch"),
        (lambda blob: blob.write_bytes(blob.read_bytes()[:-1]), "length_mismatch"),
        (lambda blob: blob.write_bytes(blob.read_bytes() + b"!"), "length_mismatch"),
    ],
)
def test_a_damaged_blob_is_refused(tmp_path: Path, damage: object, code: str) -> None:
    manifest = write(tmp_path / "b")
    layer = manifest.layers[0]
    path = Layout(tmp_path / "b").path(layer.digest)
    damage(path)
    assert refusal(tmp_path / "b") == code
    with pytest.raises(RefusedError) as whole:
        Layout(tmp_path / "b").verify_all()
    assert "float of" in whole.value.message
    assert whole.value.consequence
    assert whole.value.next_step
    with pytest.raises(RefusedError) as caught:
        verify_blob(path, layer.digest, layer.size)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("oci-layout", None),
        ("oci-layout", b"{}"),
        ("oci-layout", b'{"imageLayoutVersion":"2.0.0"}'),
        ("index.json", None),
        ("index.json", b"[]"),
        ("index.json", b'{"schemaVersion":2,"manifests":[]}'),
        ("index.json", b"\xff" * 10),
        ("index.json", b" " * ((1 << 20) + 1)),
    ],
)
def test_a_folder_that_is_no_layout_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    write(tmp_path / "b")
    file = tmp_path / "b" / name
    file.unlink() if content is None else file.write_bytes(content)
    assert refusal(tmp_path / "b") == "layout_invalid"


def test_a_digest_cannot_name_a_path_outside(tmp_path: Path) -> None:
    write(tmp_path / "b")
    index = json.loads((tmp_path / "b" / "index.json").read_bytes())
    index["manifests"][0]["digest"] = "sha256:../../../../etc/passwd"
    (tmp_path / "b" / "index.json").write_text(json.dumps(index))
    assert refusal(tmp_path / "b") == "bad_digest"


def test_a_config_that_names_blobs_the_manifest_lacks_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "b"
    manifest = write(root)
    LayoutWriter(root).finish(
        Manifest(
            schema_version=2,
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            config=manifest.config,
            layers=manifest.layers[1:],
        ),
        "1.0.0",
    )
    assert refusal(root) == "config_invalid"


def test_skopeo_inspects_a_bundle_and_copies_it_through_a_registry(tmp_path: Path) -> None:
    needs("skopeo", "docker-registry")
    root = tmp_path / "b"
    write(root)
    raw = subprocess.run(["skopeo", "inspect", "--raw", f"oci:{root}:1.0.0"], check=True, capture_output=True).stdout
    assert raw == Layout(root).manifest_bytes("1.0.0")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = tmp_path / "registry.yml"
    settings.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path / 'registry'}\n"
        f"http:\n  addr: 127.0.0.1:{port}\nlog:\n  level: error\n"
    )
    registry = subprocess.Popen(["docker-registry", "serve", str(settings)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert registry.poll() is None, registry.stderr.read()
            assert time.monotonic() < deadline, "the registry did not listen"
            time.sleep(0.05)
        remote = f"docker://127.0.0.1:{port}/models/thing:1.0.0"
        subprocess.run(["skopeo", "copy", "--dest-tls-verify=false", f"oci:{root}:1.0.0", remote], check=True)
        back = tmp_path / "back"
        subprocess.run(["skopeo", "copy", "--src-tls-verify=false", remote, f"oci:{back}:1.0.0"], check=True)
    finally:
        registry.terminate()
        registry.wait(10)
    assert Layout(back).manifest_bytes("1.0.0") == raw
    Layout(back).verify_all("1.0.0")
