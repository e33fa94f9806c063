"""A bundle is verified by its folder alone: whoever alters a byte, a statement or a signature is told which; and OpenSSL agrees."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from tuf.api.metadata import Metadata, Targets

from tests.services import needs
from tests.trust_kit import MODEL, RunningServer, running_server, write_bundle
from wherry_server import verifying
from wherry_shared import dsse, key_files, statements
from wherry_shared.bundle import Config, parse_config
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import SIGNED, Layout, blob_path
from wherry_shared.publishing import CHAIN, PublisherKey, push, set_policy, sign

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("verify") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> PublisherKey:
    return PublisherKey.open(tmp_path_factory.mktemp("key") / "publisher.pem")


@pytest.fixture(scope="module")
def pushed(server: RunningServer, key: PublisherKey, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed") / "bundle"
    write_bundle(folder)
    with server.remote() as remote:
        sign(folder, remote, key)
        assert push(folder, remote, key).outcome == "released"
    return folder


@pytest.fixture
def bundle(pushed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pushed, tmp_path / "bundle"))


def refused(path: Path, **how: str) -> str:
    with pytest.raises(RefusedError) as caught:
        list(verifying.verify(path, NOW, **how))
    return caught.value.code


def config_of(path: Path) -> Config:
    return Layout(path).bundle()[2]


def test_the_whole_chain_is_verified_without_the_server(bundle: Path, server: RunningServer):
    links = list(verifying.verify(bundle, NOW, root_digest=server.trust.root_digest))
    assert [link.what for link in links] == [
        "bytes",
        "statement",
        "statement",
        "root",
        "targets",
        "publisher",
        "release",
    ]
    assert "as you named it" in links[3].detail
    assert "good until" in links[-1].detail
    late = list(verifying.verify(bundle, NOW + timedelta(days=1000)))
    assert "expired" in late[-1].detail
    assert "nobody compared" in late[3].detail


def _weights(path: Path) -> None:
    blob = blob_path(path, config_of(path).variants[0].digest)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")


def _bin(path: Path) -> None:
    file = next((path / SIGNED / CHAIN).glob("*-*.json"))
    content = json.loads(file.read_bytes())
    content["signed"]["version"] += 1
    file.write_text(json.dumps(content))


def _targets(path: Path) -> None:
    file = path / SIGNED / CHAIN / "targets.json"
    content = json.loads(file.read_bytes())
    content["signatures"] = []
    file.write_text(json.dumps(content))


def _no_chain(path: Path) -> None:
    shutil.rmtree(path / SIGNED / CHAIN)


def _no_publisher(path: Path) -> None:
    for file in (path / SIGNED / CHAIN).glob("publisher-*.json"):
        if file.stem.count("-") == 1:
            file.unlink()


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (_weights, "digest_mismatch"),
        (_bin, "chain_broken"),
        (_targets, "signatures_missing"),
        (_no_chain, "chain_missing"),
        (_no_publisher, "chain_missing"),
    ],
)
def test_what_was_altered_is_refused(bundle: Path, edit: Callable[[Path], None], code: str):
    edit(bundle)
    assert refused(bundle) == code


def test_another_root_and_another_bundle_are_refused(bundle: Path, tmp_path: Path):
    assert refused(bundle, root_digest="0" * 64) == "root_foreign"
    write_bundle(tmp_path / "other", weights=b"other" * 500)
    shutil.copytree(bundle / SIGNED, tmp_path / "other" / SIGNED)
    assert refused(tmp_path / "other") == "unsigned"
    assert next(link.what for link in verifying.verify(tmp_path / "other", NOW, unsigned=True)) == "bytes"


def test_a_revoked_bundle_is_not_good_any_more(server: RunningServer, key: PublisherKey, tmp_path: Path):
    manifest = write_bundle(tmp_path / "bad", model="withdrawn")
    with server.remote() as remote:
        sign(tmp_path / "bad", remote, key)
        push(tmp_path / "bad", remote, key)
        set_policy(remote, key, "withdrawn", revoked={manifest: "stop"})
        push(tmp_path / "bad", remote, key)
    assert refused(tmp_path / "bad") == "revoked"


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (statements.provenance_statement, statements.check_statement),
        (statements.bill_of_materials, statements.check_bill),
    ],
)
def test_statements_that_speak_of_something_else_are_refused(
    pushed: Path, make: Callable[[Config], bytes], check: Callable[[bytes, Config], None]
):
    config = config_of(pushed)
    check(make(config), config)
    other = msgspec.structs.replace(config.variants[0], digest="sha256:" + "0" * 64)
    cases = [make(msgspec.structs.replace(config, variants=[other])), b"{}", b"\xff", b"[" * 5000]
    for data in cases:
        with pytest.raises(RefusedError) as caught:
            check(data, config)
        assert caught.value.code == "statement_invalid"
    again = parse_config(msgspec.json.encode(config))
    assert make(again) == make(config), "the same config says the same"


def test_openssl_verifies_what_publisher_and_director_signed(pushed: Path, server: RunningServer, tmp_path: Path):
    needs("openssl")
    chain = pushed / SIGNED / CHAIN
    bin_ = Metadata[Targets].from_file(str(next(path for path in chain.glob("*.json") if path.stem.count("-") == 2)))
    ((keyid, signature),) = bin_.signatures.items()
    public = Metadata[Targets].from_file(str(chain / "targets.json")).signed.delegations.keys[keyid]
    payload = b'{"offer":1}'
    envelope = dsse.sign(dsse.OFFER_TYPE, payload, server.trust.director_keyid, server.trust.director_sign)
    director = server.trust.public_state()["director_keyids"][0]
    pem = Metadata[Targets].from_file(str(chain / "targets.json")).signed.targets["director.json"]
    director_pem = pem.unrecognized_fields["custom"]["wherry"]["keys"][director]
    for name, key, message, said in (
        ("bin", key_files.pem_of(public), bin_.signed_bytes, bytes.fromhex(signature.signature)),
        ("offer", director_pem, dsse.pre_authentication(dsse.OFFER_TYPE, payload), dsse.open_envelope(envelope)[2]),
    ):
        files = {"pub": key.encode(), "data": message, "sig": said, "bad": message + b" "}
        for ending, content in files.items():
            (tmp_path / f"{name}.{ending}").write_bytes(content)

        def openssl(data: str, name: str = name) -> int:
            command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", f"{name}.pub", "-rawin"]
            command += ["-in", f"{name}.{data}", "-sigfile", f"{name}.sig"]
            return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

        assert openssl("data") == 0
        assert openssl("bad") != 0


def test_a_bundle_of_the_kit_is_about_its_model(pushed: Path):
    statement = json.loads(statements.provenance_statement(config_of(pushed)))
    assert statement["predicate"]["buildDefinition"]["externalParameters"]["model"] == MODEL
