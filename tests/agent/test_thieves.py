"""What a thief gets, as far as metadata go: the rows of the threat table, played against a device's own client.

That a forged, rolled back or cut-off answer of the network is refused is in `test_trust`; here is what stolen keys can and cannot do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Targets

from tests.agent.test_trust import DAY_S, ONE, TARGET, TWO, Device, Repository, refused
from tests.trust_kit import MODEL, Workstation, expires, release, with_publisher


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made = Repository(tmp_path / "server")
    yield made
    made.web.close()


@pytest.fixture
def device(tmp_path: Path, repository: Repository) -> Device:
    return Device(tmp_path / "device", repository)


def listed(repository: Repository, **roles: int) -> dict[str, int]:
    """What a snapshot of the thief's lists: what the server has, but for `roles` (`_` stands for `-`)."""
    state = repository.trust.public_state()
    versions = {"targets.json": state["roles"]["targets"]["version"]}
    for publisher in state["publishers"]:
        versions[f"{publisher['name']}.json"] = publisher["version"]
        versions |= {f"{name}.json": version for name, version in publisher["bins"].items()}
    return versions | {f"{name.replace('_', '-')}.json": version for name, version in roles.items()}


def with_floor(repository: Repository, floor: str) -> None:
    role = repository.acme.role(2, policy={MODEL: {"floor": floor, "revoked": [{"digest": ONE, "effect": "stop"}]}})
    assert repository.trust.accept_bin("acme", role, 1) == "accepted"


def test_online_keys_cannot_take_back_a_floor_or_a_revocation_that_a_device_has_seen(
    device: Device, repository: Repository
):
    repository.publish()
    with_floor(repository, "1.2.0")
    device.refresh(TARGET)
    with device.keeper().online() as session:
        assert session.policy(MODEL).floor == "1.2.0"
        device.word = device.keeper().commit(session)
    repository.sign_online(listed(repository, acme=1), version=int(time.time()) + 100)
    (device.set / "snapshot.json").write_bytes(b"")  # so that only the journal remembers
    assert refused(device.refresh) == "trust_rollback"


def test_online_keys_show_a_fresh_device_an_older_state_and_nothing_that_was_never_signed(
    tmp_path: Path, repository: Repository
):
    repository.publish()
    old = listed(repository)
    repository.publish("2.0.0", TWO)
    fresh = Device(tmp_path / "fresh", repository)
    old_bins = {name: version for name, version in old.items() if name in listed(repository)}
    repository.sign_online(old_bins, version=int(time.time()) + 100)
    assert fresh.refresh(TARGET) == ONE  # chosen among what was published: this is what such a thief can do
    assert Device(tmp_path / "other", repository).refresh(f"{MODEL}/3.0.0") is None


def test_online_keys_hide_updates_only_until_what_people_signed_expires(device: Device, repository: Repository):
    repository.publish()
    versions = listed(repository)
    repository.sign_online(versions, version=int(time.time()) + 100, life=1000)
    assert device.refresh(TARGET) == ONE
    device.wall_s += 89 * DAY_S
    repository.sign_online(versions, version=int(time.time()) + 101, life=1000)
    assert device.refresh(TARGET) == ONE
    device.wall_s += 2 * DAY_S  # the publisher's role lives 90 days, and only the publisher signs it again
    assert refused(lambda: device.refresh(TARGET)) == "trust_expired"


def test_online_keys_name_no_other_director(device: Device, repository: Repository):
    known = set()
    with device.keeper().online() as session:
        known = set(session.director_keys())
    versions = listed(repository)
    version = versions["targets.json"] + 1
    forged = Workstation("targets").sign(Targets(version, None, expires(90)), [repository.key("timestamp")])
    repository.sign_online({**versions, "targets.json": version}, version=int(time.time()) + 100)
    repository.replaced[f"{version}.targets.json"] = forged
    assert refused(device.refresh) == "trust_invalid"
    repository.replaced = {}
    with device.keeper().online() as session:
        assert set(session.director_keys()) == known


def test_a_publishers_key_releases_that_publishers_models_and_no_others(tmp_path: Path, repository: Repository):
    other = with_publisher(repository.trust, Workstation("other"), ["theirs"])
    other.publish(repository.trust, "theirs/1.0.0", ONE)
    device = Device(tmp_path / "device", repository)
    thief = repository.acme
    versions = listed(repository)
    theirs, mine = repository.trust.bin_for("theirs/2.0.0")[0], repository.trust.bin_for(TARGET)[0]
    content = {path: release(path, TWO) for path in ("theirs/2.0.0", "theirs/1.0.0", TARGET)}
    forged = thief.sign(Targets(2, None, expires(90), content))
    # with the online keys too, the thief puts that bin in every place where a device could look
    files = {f"2.{theirs}.json": forged, f"1.{mine}.json": thief.sign(Targets(1, None, expires(90), content))}
    repository.sign_online({**versions, f"{theirs}.json": 2, f"{mine}.json": 1}, version=int(time.time()) + 100)
    repository.replaced |= files
    assert refused(lambda: device.refresh("theirs/2.0.0")) == "trust_invalid"
    assert device.refresh(TARGET) == TWO  # its own models are the thief's until it is revoked


def test_one_of_two_publisher_keys_gets_nothing_even_with_the_online_keys(tmp_path: Path, repository: Repository):
    pair = with_publisher(repository.trust, Workstation("pair", keys=3, threshold=2), ["paired"])
    device = Device(tmp_path / "device", repository)
    stolen = pair.signers[0]
    role = repository.trust.bin_for("paired/1.0.0")[0]
    content = Targets(1, None, expires(90), {"paired/1.0.0": release("paired/1.0.0", TWO)})
    twice = pair.sign(content, [stolen, stolen, CryptoSigner.generate_ed25519()])
    repository.sign_online({**listed(repository), f"{role}.json": 1}, version=int(time.time()) + 100)
    repository.replaced[f"1.{role}.json"] = twice
    assert refused(lambda: device.refresh("paired/1.0.0")) == "trust_invalid"
    # nor the publisher's role with bins of its own key
    alone = Workstation("pair")
    alone.signers = [stolen]
    repository.sign_online({**listed(repository), "pair.json": 2}, version=int(time.time()) + 101)
    repository.replaced["2.pair.json"] = alone.role(2)
    assert refused(lambda: device.refresh("paired/1.0.0")) == "trust_invalid"
