"""Signing on the workstation and pushing to a real server."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Targets

from tests.trust_kit import (
    MODEL,
    Answer,
    RunningServer,
    Workstation,
    digest,
    little_server,
    running_server,
    write_bundle,
)
from wherry_optimizer import signing
from wherry_shared import publishing
from wherry_shared.digest import of_bytes
from wherry_shared.errors import DeviceError, RefusedError, UnreachableError
from wherry_shared.publishing import PublisherKey, push, renew, repair, set_policy, sign
from wherry_shared.publishing_remote import Remote


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> PublisherKey:
    return PublisherKey.open(tmp_path_factory.mktemp("workstation") / "wherry" / "publisher.pem")


@pytest.fixture
def remote(server: RunningServer) -> Iterator[Remote]:
    with server.remote() as remote:
        yield remote


_counter = iter(range(1, 1000))


@pytest.fixture
def version() -> str:
    return f"{next(_counter)}.0.0"


@pytest.fixture
def bundle(tmp_path: Path, version: str) -> Path:
    write_bundle(tmp_path / "bundle", version, weights=os.urandom(3_000_000))
    return tmp_path / "bundle"


def refused(call) -> str:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


def test_the_key_is_made_on_first_use_and_is_the_owners_alone(tmp_path: Path):
    path = tmp_path / "config" / "wherry" / "publisher.pem"
    assert PublisherKey.find(path) is None
    key = PublisherKey.open(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert PublisherKey.open(path).keyid == key.keyid
    path.chmod(0o640)
    with pytest.raises(DeviceError, match="others"):
        PublisherKey.open(path)


def test_the_key_is_found_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WHERRY_PUBLISHER_KEY", str(tmp_path / "mine.pem"))
    assert PublisherKey.open().path == tmp_path / "mine.pem"


def test_sign_and_push_release_a_bundle(server, remote, key, bundle: Path, version: str):
    signed = sign(bundle, remote, key)
    assert signed.outcome == "signed"
    assert signed.kept == bundle / ".wherry" / "signed" / f"{signed.role}.{signed.version}.json"
    assert server.trust.target(MODEL, version) is None  # nothing was handed in yet
    seen: list[tuple[int, int]] = []
    pushed = push(bundle, remote, key, progress=lambda done, total: seen.append((done, total)))
    assert (pushed.outcome, pushed.blobs) == ("released", 7)
    assert seen[-1] == (pushed.uploaded_bytes, pushed.uploaded_bytes)
    assert seen[0][0] < seen[-1][0]
    assert server.trust.target(MODEL, version) == signed.manifest == of_bytes(server.blob(signed.manifest))
    again = push(bundle, remote, key)
    assert (again.blobs, again.outcome) == (0, "released")
    assert sign(bundle, remote, key).outcome == "already"


def test_an_unsigned_bundle_is_refused_by_the_server(remote, key, bundle: Path):
    assert refused(lambda: push(bundle, remote, key)) == "unsigned"


def test_weights_altered_after_signing_do_not_leave_the_workstation(server, remote, key, bundle: Path, version: str):
    sign(bundle, remote, key)
    largest = max((bundle / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)
    assert refused(lambda: push(bundle, remote, key)) == "digest_mismatch"
    assert server.trust.target(MODEL, version) is None
    assert not remote.has_blob(f"sha256:{largest.name}")


def test_altered_weights_are_noticed_also_where_the_server_has_the_right_ones(remote, key, bundle: Path):
    sign(bundle, remote, key)
    push(bundle, remote, key)
    largest = max((bundle / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    assert refused(lambda: push(bundle, remote, key)) == "digest_mismatch"
    assert refused(lambda: sign(bundle, remote, key)) == "digest_mismatch"


def test_a_version_cannot_be_signed_for_other_bytes(remote, key, bundle: Path, version: str, tmp_path: Path):
    sign(bundle, remote, key)
    push(bundle, remote, key)
    write_bundle(tmp_path / "other", version, weights=b"something else")
    assert refused(lambda: sign(tmp_path / "other", remote, key)) == "target_rebound"


def test_another_key_cannot_publish_the_model(remote, key, bundle: Path, version: str, tmp_path: Path):
    sign(bundle, remote, key)
    thief = PublisherKey.open(tmp_path / "thief.pem")
    assert refused(lambda: sign(bundle, remote, thief)) == "model_taken"


def same_bin(remote: Remote, versions: Iterator[int]) -> tuple[str, str]:
    """Return two unused versions of the model whose targets fall into one bin."""
    homes: dict[str, str] = {}
    while True:
        candidate = f"{next(versions)}.0.0"
        role, _, _ = remote.bin(f"{MODEL}/{candidate}")
        if role in homes:
            return homes[role], candidate
        homes[role] = candidate


def test_a_release_that_came_between_is_signed_over_where_the_key_is(server, remote, key, bundle, tmp_path: Path):
    sign(bundle, remote, key)  # makes sure that the publisher's role stands
    first, second = same_bin(remote, _counter)
    for name in (first, second):
        write_bundle(tmp_path / name, name, weights=name.encode())
    stale, other = sign(tmp_path / first, remote, key), sign(tmp_path / second, remote, key)
    assert (stale.role, stale.version) == (other.role, other.version)
    push(tmp_path / second, remote, key)
    keyless = refused(lambda: push(tmp_path / first, remote, None))
    assert keyless == "bin_changed"
    assert server.trust.target(MODEL, first) is None
    assert push(tmp_path / first, remote, key).outcome == "released"
    assert {server.trust.target(MODEL, first), server.trust.target(MODEL, second)} == {stale.manifest, other.manifest}


def test_a_bundle_signed_elsewhere_can_be_pushed_without_the_key(server, remote, key, bundle: Path, version: str):
    sign(bundle, remote, key)
    assert push(bundle, remote, None).outcome == "released"
    assert server.trust.target(MODEL, version) is not None


def test_a_bin_that_the_server_made_up_is_not_signed_over(server, remote, key, bundle: Path, version: str):
    role = sign(bundle, remote, key).role
    forged = Workstation().bin(1, {f"{MODEL}/{version}": digest("forged")})

    class Lying(Remote):
        def bin(self, target: str) -> tuple[str, int, bytes]:
            return role, 1, forged

    with Lying(server.url, server.token) as lying:
        assert refused(lambda: sign(bundle, lying, key)) in ("bin_foreign", "bin_rolled_back")


def test_a_bin_of_another_place_is_not_signed(server, remote, key, bundle: Path):
    role = sign(bundle, remote, key).role
    elsewhere = role[:-2] + ("00" if not role.endswith("00") else "01")

    class Lying(Remote):
        def bin(self, target: str) -> tuple[str, int, bytes]:
            return self.role(elsewhere)

    with Lying(server.url, server.token) as lying:
        assert refused(lambda: sign(bundle, lying, key)) == "bin_foreign"


def test_a_server_that_fell_back_is_noticed_and_repaired(tmp_path: Path):
    data = tmp_path / "data"
    key = PublisherKey.open(tmp_path / "publisher.pem")
    write_bundle(tmp_path / "one", "1.0.0")
    write_bundle(tmp_path / "two", "1.0.0", model="second")
    with running_server(data) as server, server.remote() as remote:
        sign(tmp_path / "one", remote, key)
        shutil.copytree(data / "trust", tmp_path / "backup")
        push(tmp_path / "one", remote, key)
        token = server.token
    shutil.rmtree(data / "trust")
    (tmp_path / "backup").rename(data / "trust")
    with running_server(data) as server, Remote(server.url, token) as remote:
        assert server.trust.target(MODEL, "1.0.0") is None
        assert refused(lambda: sign(tmp_path / "one", remote, key)) == "bin_rolled_back"
        taken = repair(remote, key)
        assert len(taken) == 1
        assert server.trust.target(MODEL, "1.0.0") is not None
        assert repair(remote, key) == {}
        assert sign(tmp_path / "two", remote, key).outcome == "signed"


def test_policy_and_renewal_are_signed_by_the_publisher(server, remote, key, bundle: Path, version: str):
    sign(bundle, remote, key)
    push(bundle, remote, key)
    set_policy(remote, key, MODEL, floor="0.1.0", revoked={digest("bad"): "replace"})
    publisher = next(item for item in server.trust.publishers if MODEL in item.models).name
    _, before, data = server.trust.role_bytes(publisher)
    own = Metadata[Targets].from_bytes(data).signed.targets[f"{MODEL}/policy"].custom["wherry"]
    assert own == {"format": 1, "floor": "0.1.0", "revoked": [{"digest": digest("bad"), "effect": "replace"}]}
    said = set_policy(remote, key, MODEL, revoked={digest("worse"): "stop"})
    assert said.outcome == "accepted"
    assert (said.floor, set(said.revoked)) == ("0.1.0", {digest("bad"), digest("worse")}), (
        "nothing comes back by itself"
    )
    said = set_policy(remote, key, MODEL, floor="", allowed=[digest("bad")])
    assert (said.floor, said.revoked) == ("", {digest("worse"): "stop"})
    assert refused(lambda: set_policy(remote, key, MODEL, allowed=[digest("bad")])) == "not_revoked"
    before = server.trust.role_bytes(publisher)[1]
    done = renew(remote, key)
    assert done[publisher] == "accepted"
    assert len(done) > 1
    assert server.trust.role_bytes(publisher)[1] == before + 1
    assert server.trust.target(MODEL, version) is not None


def test_reading_needs_a_token_and_publishing_a_role(server, bundle: Path, key: PublisherKey):
    with Remote(server.url, "nonsense") as stranger:
        assert refused(stranger.state) == "unauthenticated"
    with Remote(server.url, server.viewer_token) as viewer:
        assert viewer.state().publishers
        assert refused(lambda: viewer.register("x", key.public_pem, ["x"])) == "role_missing"
        assert refused(lambda: viewer.put("x", b"{}", 0)) == "role_missing"


def test_a_server_that_speaks_something_else_is_refused(key: PublisherKey):
    with (
        little_server(lambda _path, _headers: Answer(200, b"<html>")) as strange,
        Remote(strange.url, "token") as remote,
    ):
        assert refused(remote.state) == "answer_invalid"
        assert refused(lambda: remote.bin(f"{MODEL}/1.0.0")) == "answer_invalid"
    with Remote(strange.url, "token") as gone, pytest.raises(UnreachableError):
        gone.state()


def test_access_comes_from_arguments_environment_or_the_file_of_wherry_dev(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WHERRY_DATA", str(tmp_path))
    monkeypatch.delenv("WHERRY_SERVER", raising=False)
    monkeypatch.delenv("WHERRY_TOKEN", raising=False)
    assert refused(Remote.find) == "access_missing"
    (tmp_path / "client.json").write_text('{"server": "http://here:1", "token": "t"}')
    assert Remote.find().server == "http://here:1"
    assert refused(lambda: Remote.find("http://elsewhere:1")) == "access_missing"  # its token is not sent elsewhere
    (tmp_path / "client.json").write_text("{")
    assert refused(Remote.find) == "client_file_invalid"


def test_the_sign_command_makes_a_key_once_and_says_what_it_did(server, tmp_path: Path):
    manifest = write_bundle(tmp_path / "bundle", "1.0.0", model="told")
    place = tmp_path / "keys" / "publisher.pem"
    signed, key, made = signing.sign_bundle(tmp_path / "bundle", server=server.url, token=server.token, key=place)
    assert made is True
    text = signing.describe(signed, key, made)
    assert str(place) in text
    assert manifest in text
    assert f"wherry bundle push {tmp_path / 'bundle'}" in text
    assert signing.as_json(signed, key)["publisher"] == f"publisher-{key.keyid[:8]}"
    _, _, again = signing.sign_bundle(tmp_path / "bundle", server=server.url, token=server.token, key=place)
    assert again is False
    assert publishing.PublisherKey.open(place).keyid == key.keyid


def test_with_a_threshold_the_second_key_signs_what_stands_as_proposed(server, remote, tmp_path: Path):
    pair = Workstation("pair", keys=2, threshold=2)
    first, second = (
        PublisherKey(tmp_path / name / "publisher.pem", signer)
        for name, signer in zip(("ada", "bob"), pair.signers, strict=True)
    )
    server.trust.add_publisher("pair", pair.pems(), ["paired"], threshold=2)
    server.trust.accept_bin("pair", pair.role(), 0)
    bundle = tmp_path / "bundle"
    manifest = write_bundle(bundle, "1.0.0", model="paired")
    sign(bundle, remote, first)
    assert push(bundle, remote, first).outcome == "proposed"
    assert server.trust.target("paired", "1.0.0") is None
    assert refused(lambda: remote.add_bundle("paired", "1.0.0", manifest)) == "unsigned"
    other = tmp_path / "other"
    write_bundle(other, "1.0.0", model="paired", weights=b"other")
    assert refused(lambda: sign(other, remote, second)) == "bin_proposed"
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert sign(copy, remote, second).outcome == "cosigned"
    assert push(copy, remote, second).outcome == "released"
    assert server.trust.target("paired", "1.0.0") == manifest
    assert set_policy(remote, first, "paired", floor="1.0.0").outcome == "proposed", "which holds nowhere yet"
    server.trust.withdraw("pair")
    done = renew(remote, first)
    assert set(done.values()) == {"proposed"}
    assert len(done) > 1


def test_a_bundle_signed_for_another_server_is_signed_again_where_the_key_is(remote, key, bundle: Path, tmp_path: Path):
    sign(bundle, remote, key)
    with running_server(tmp_path / "elsewhere") as elsewhere, elsewhere.remote() as there:
        with pytest.raises(RefusedError) as caught:
            push(bundle, there)
        assert caught.value.code == "signed_elsewhere"
        assert "sign" in caught.value.next_step
        other = PublisherKey.open(tmp_path / "other.pem")
        assert push(bundle, there, other).outcome == "released"
