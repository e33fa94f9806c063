"""A bundle is an OCI artifact: tools that know nothing of Wherry inspect it, and carry it through a registry."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.services import needs
from tests.site_kit import constant_model
from wherry_optimizer.pack import pack_model
from wherry_shared.bundle import ARTIFACT_TYPE, CONFIG_TYPE, MANIFEST_TYPE, WEIGHT_TYPE
from wherry_shared.image_layout import Layout
from wherry_simulators.processes import free_port, wait_for

pytestmark = pytest.mark.services

VERSION = "1.0.0"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    source = constant_model(folder / "m.onnx", 1)
    packed = pack_model(source, name="m", version=VERSION, licence="Apache-2.0", attribution="tests", output=folder)
    return packed.path


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[int]:
    """A registry on a free port of the loopback; its port."""
    needs("skopeo", "docker-registry")
    port = free_port()
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}"},
        "log": {"level": "error"},
    }
    file = tmp_path / "registry.yml"
    file.write_text(json.dumps(settings))  # YAML holds JSON
    with (tmp_path / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(file)], stdout=log, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "registry.log").read_text()
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for("the registry", answers, 30)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def skopeo(*arguments: str) -> bytes:
    done = subprocess.run(["skopeo", *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_skopeo_shows_the_model_manifest(bundle: Path) -> None:
    needs("skopeo")
    raw = skopeo("inspect", "--raw", f"oci:{bundle}:{VERSION}")
    assert raw == Layout(bundle).manifest_bytes(VERSION)
    manifest = json.loads(raw)
    assert (manifest["mediaType"], manifest["artifactType"]) == (MANIFEST_TYPE, ARTIFACT_TYPE)
    assert manifest["config"]["mediaType"] == CONFIG_TYPE
    assert WEIGHT_TYPE in {layer["mediaType"] for layer in manifest["layers"]}


def test_a_registry_gives_back_what_skopeo_brought(bundle: Path, registry: int, tmp_path: Path) -> None:
    there = f"docker://127.0.0.1:{registry}/m:{VERSION}"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{bundle}:{VERSION}", there)
    raw = skopeo("inspect", "--raw", "--tls-verify=false", there)
    assert raw == Layout(bundle).manifest_bytes(VERSION), "the digest that is signed is the registry's digest"
    back = tmp_path / "back"
    skopeo("copy", "--src-tls-verify=false", there, f"oci:{back}:{VERSION}")
    assert Layout(back).manifest_bytes(VERSION) == raw
    Layout(back).verify_all(VERSION)
