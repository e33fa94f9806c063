"""The server's TUF repository: what publishers may say, and that nobody else can say it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from tests.trust_kit import MODEL, Workstation, digest, expires, release, with_publisher
from wherry_server import doctor
from wherry_server.settings import Settings
from wherry_server.trust import SIGNED_AT, Trust
from wherry_shared import key_files
from wherry_shared.errors import DeviceError, RefusedError, WherryError

T0 = 1_900_000_000.0
DAY_S = 86_400.0
ONE, TWO = digest("one"), digest("two")
TARGET = f"{MODEL}/1.0.0"


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    return Trust.create_dev(tmp_path / "trust")


@pytest.fixture
def acme(trust: Trust) -> Workstation:
    return with_publisher(trust, Workstation())


def refused(call) -> str:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


def timestamp(trust: Trust) -> Timestamp:
    return Metadata[Timestamp].from_bytes(trust.metadata("timestamp.json")).signed


def snapshot(trust: Trust) -> Snapshot:
    version = timestamp(trust).snapshot_meta.version
    return Metadata[Snapshot].from_bytes(trust.metadata(f"{version}.snapshot.json")).signed


def test_a_development_repository_is_whole_and_its_keys_are_private(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust", now=T0)
    root = Metadata[Root].from_bytes(trust.metadata("1.root.json")).signed
    assert root.consistent_snapshot
    assert set(snapshot(trust).meta) == {"targets.json"}
    assert timestamp(trust).unrecognized_fields[SIGNED_AT] == int(T0 * 1e6)
    keys = sorted((tmp_path / "trust" / "keys").iterdir())
    assert [key.stem for key in keys] == ["director", "root", "snapshot", "targets", "timestamp"]
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    assert trust.public_state()["director_keyids"] == [trust.director_keyid]
    assert trust.public_state()["development"] is True


def test_creation_that_was_cut_short_is_finished_with_the_same_keys(tmp_path: Path):
    folder = tmp_path / "trust"
    first = Trust.create_dev(folder)
    root, keyid = first.root_digest, first.director_keyid
    for path in (folder / "metadata").glob("*.timestamp.json"):
        path.unlink()
    assert not Trust.exists(folder)
    again = Trust.create_dev(folder)
    assert (again.root_digest, again.director_keyid) == (root, keyid)
    assert Trust.open(folder).root_digest == root


def test_opening_a_folder_without_a_repository_is_refused(tmp_path: Path):
    assert refused(lambda: Trust.open(tmp_path)) == "trust_missing"


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path):
    Trust.create_dev(tmp_path / "trust")
    (tmp_path / "trust" / "keys" / "director.pem").chmod(0o644)
    with pytest.raises(DeviceError) as caught:
        Trust.open(tmp_path / "trust").director_sign(b"offer")
    assert caught.value.code == "key_exposed"


def test_a_signed_bin_binds_a_version_to_a_manifest(trust: Trust, acme: Workstation):
    assert trust.target(MODEL, "1.0.0") is None
    before = timestamp(trust).version
    acme.publish(trust, TARGET, ONE)
    assert trust.target(MODEL, "1.0.0") == ONE
    role, version, data = trust.bin_for(TARGET)
    assert version == 1
    assert trust.metadata(f"1.{role}.json") == data
    assert snapshot(trust).meta[f"{role}.json"].version == 1
    assert timestamp(trust).version > before
    assert trust.public_state()["publishers"][0]["bins"] == {role: 1}


def test_another_instance_sees_at_once_what_was_published(tmp_path: Path):
    api, director = Trust.create_dev(tmp_path / "trust"), Trust.open(tmp_path / "trust")
    acme = with_publisher(api, Workstation())
    assert director.target(MODEL, "1.0.0") is None
    for number in range(5):
        acme.publish(api, f"{MODEL}/1.{number}.0", digest(str(number)))
        assert director.target(MODEL, f"1.{number}.0") == digest(str(number))
        assert director.metadata("timestamp.json") == api.metadata("timestamp.json")


def test_a_bin_signed_by_somebody_else_is_refused(trust: Trust, acme: Workstation):
    role, version, _ = trust.bin_for(TARGET)
    forged = acme.bin(1, {TARGET: ONE}, signers=[CryptoSigner.generate_ed25519()])
    assert refused(lambda: trust.accept_bin(role, forged, version)) == "signature_bad"
    assert trust.target(MODEL, "1.0.0") is None


def test_a_signature_that_was_moved_to_other_bytes_is_refused(trust: Trust, acme: Workstation):
    role, _, _ = trust.bin_for(TARGET)
    honest = json.loads(acme.bin(1, {TARGET: ONE}))
    altered = json.loads(acme.bin(1, {TARGET: TWO}))
    altered["signatures"] = honest["signatures"]
    assert refused(lambda: trust.accept_bin(role, json.dumps(altered).encode(), 0)) == "signature_bad"


def test_a_version_is_never_bound_to_another_manifest_and_never_removed(trust: Trust, acme: Workstation):
    acme.publish(trust, TARGET, ONE)
    role, _, _ = trust.bin_for(TARGET)
    assert refused(lambda: trust.accept_bin(role, acme.bin(2, {TARGET: TWO}), 1)) == "target_rebound"
    assert refused(lambda: trust.accept_bin(role, acme.bin(2, {}), 1)) == "target_removed"
    assert trust.target(MODEL, "1.0.0") == ONE


def test_a_replayed_older_bin_is_refused(trust: Trust, acme: Workstation):
    role, _, _ = trust.bin_for(TARGET)
    old = acme.bin(1, {TARGET: ONE})
    assert trust.accept_bin(role, old, 0) == "accepted"
    assert trust.accept_bin(role, acme.bin(2, {TARGET: ONE}), 1) == "accepted"
    assert refused(lambda: trust.accept_bin(role, old, 2)) == "bin_version"
    assert refused(lambda: trust.accept_bin(role, acme.bin(3, {TARGET: ONE}), 1)) == "bin_changed"


def test_of_two_who_replace_the_same_version_one_wins(trust: Trust, acme: Workstation):
    role, _, _ = trust.bin_for(TARGET)
    outcomes: list[str] = []

    def put(data: bytes) -> None:
        try:
            outcomes.append(trust.accept_bin(role, data, 0))
        except RefusedError as error:
            outcomes.append(error.code)

    rivals = [acme.sign(Targets(1, None, expires(80 + day), {TARGET: release(TARGET, ONE)})) for day in range(4)]
    threads = [threading.Thread(target=put, args=(data,)) for data in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["accepted", "bin_changed", "bin_changed", "bin_changed"]


def test_below_threshold_a_bin_stands_as_proposed_until_the_second_signature(trust: Trust):
    pair = with_publisher(trust, Workstation("pair", keys=3, threshold=2))
    role, _, _ = trust.bin_for(TARGET)
    first, second, third = pair.signers
    content = Targets(1, None, expires(90), {TARGET: release(TARGET, ONE)})
    assert trust.accept_bin(role, pair.sign(content, [first]), 0) == "proposed"
    assert trust.target(MODEL, "1.0.0") is None
    other = pair.bin(1, {TARGET: TWO}, signers=[third])
    assert refused(lambda: trust.accept_bin(role, other, 0)) == "bin_proposed"
    assert trust.accept_bin(role, pair.sign(content, [first]), 0) == "proposed"  # the same key twice is one
    assert trust.proposal(role)
    assert trust.accept_bin(role, pair.sign(content, [second]), 0) == "accepted"
    assert trust.target(MODEL, "1.0.0") == ONE
    assert refused(lambda: trust.proposal(role)) == "proposal_unknown"


def test_a_withdrawn_proposal_makes_room_for_another(trust: Trust):
    pair = with_publisher(trust, Workstation("pair", keys=2, threshold=2))
    role, _, _ = trust.bin_for(TARGET)
    trust.accept_bin(role, pair.bin(1, {TARGET: ONE}, signers=pair.signers[:1]), 0)
    trust.withdraw(role)
    assert trust.accept_bin(role, pair.bin(1, {TARGET: TWO}), 0) == "accepted"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (lambda role: Targets(1, None, expires(-1)), "bin_expired"),
        (lambda role: Targets(1, None, expires(200)), "bin_life"),
        (lambda role: Targets(1, None, expires(90), {f"other/{1}": release("other/1", ONE)}), "bad_version"),
        (lambda role: Targets(1, None, expires(90), {"other/1.0.0": release("other/1.0.0", ONE)}), "target_foreign"),
        (lambda role: Targets(1, None, expires(90), {"a/b/c": release("a/b/c", ONE)}), "bad_target"),
        (lambda role: Targets(1, None, expires(90), {TARGET: release(TARGET, ONE, length=1 << 30)}), "target_invalid"),
        (
            lambda role: Targets(
                1, None, expires(90), {f"{MODEL}/1.0.{n}": release(f"{MODEL}/1.0.{n}", ONE) for n in range(40)}
            ),
            "target_misplaced",
        ),
    ],
)
def test_a_bin_that_breaks_a_rule_is_refused_although_its_publisher_signed(trust, acme, content, code):
    role, _, _ = trust.bin_for(TARGET)
    assert refused(lambda: trust.accept_bin(role, acme.sign(content(role)), 0)) == code
    assert trust.role_bytes(role) == (role, 0, b"")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "metadata_invalid"),
        (b"{}", "metadata_invalid"),
        (b"[" * 100_000, "metadata_invalid"),
        (b" " * 3_000_000, "metadata_too_large"),
    ],
)
def test_bytes_that_are_no_metadata_are_refused(trust, acme, data, code):
    role, _, _ = trust.bin_for(TARGET)
    assert refused(lambda: trust.accept_bin(role, data, 0)) == code


def test_timestamp_metadata_cannot_pass_as_a_bin(trust: Trust, acme: Workstation):
    role, _, _ = trust.bin_for(TARGET)
    assert refused(lambda: trust.accept_bin(role, trust.metadata("timestamp.json"), 0)) == "metadata_invalid"


def test_a_publisher_role_delegates_to_its_own_bins_only(trust: Trust):
    acme = Workstation()
    trust.add_publisher("acme", acme.pems(), [MODEL])
    assert refused(lambda: trust.bin_for(TARGET)) == "publisher_unsigned"
    assert refused(lambda: trust.accept_bin("acme", acme.role(bits=8), 0)) == "bins_invalid"
    stranger = Workstation("acme")
    stranger_role = acme.sign(Metadata[Targets].from_bytes(stranger.role()).signed)
    assert refused(lambda: trust.accept_bin("acme", stranger_role, 0)) == "bins_invalid"
    assert trust.accept_bin("acme", acme.role(), 0) == "accepted"


def test_a_policy_stands_in_the_publisher_role_and_is_checked(trust: Trust, acme: Workstation):
    good = {
        MODEL: {"floor": "1.2.0", "revoked": [{"digest": ONE, "effect": "replace"}, {"digest": TWO, "effect": "stop"}]}
    }
    assert trust.accept_bin("acme", acme.role(2, policy=good), 1) == "accepted"
    for bad in (
        {MODEL: {"floor": 7}},
        {MODEL: {"floor": "newest"}},
        {MODEL: {"revoked": [{"digest": "x", "effect": "replace"}]}},
        {MODEL: {"revoked": [{"digest": ONE, "effect": "explode"}]}},
        {"other": {"floor": "1.0.0"}},
    ):
        data = acme.role(3, policy=bad)
        assert refused(lambda data=data: trust.accept_bin("acme", data, 2)) in {
            "policy_invalid",
            "bad_version",
            "target_foreign",
        }
    assert trust.role_bytes("acme")[1] == 2


def test_publishers_cannot_take_each_others_names_models_or_roles(trust: Trust, acme: Workstation):
    other = Workstation("other")
    assert refused(lambda: trust.add_publisher("acme", other.pems(), ["x"])) == "publisher_taken"
    assert refused(lambda: trust.add_publisher("other", other.pems(), [MODEL])) == "model_taken"
    for name in ("root", "timestamp", "acme-1f", "../keys", "UPPER", ""):
        assert refused(lambda name=name: trust.add_publisher(name, other.pems(), ["x"])) == "bad_name"
    assert refused(lambda: trust.add_publisher("other", "no key", ["x"])) == "key_invalid"
    with_publisher(trust, other, ["x"])
    role, _, _ = trust.bin_for("x/1.0.0")
    assert refused(lambda: trust.accept_bin(role, acme.bin(1, {"x/1.0.0": ONE}), 0)) == "signature_bad"
    assert refused(lambda: trust.accept_bin("targets", acme.bin(2, {}), 1)) == "role_unknown"


def test_a_publisher_gains_models_and_saying_it_again_changes_nothing(trust: Trust, acme: Workstation):
    acme.publish(trust, TARGET, ONE)
    trust.add_publisher("acme", acme.pems(), ["second"])
    version = trust.public_state()["roles"]["targets"]["version"]
    trust.add_publisher("acme", acme.pems(), ["second"])
    assert trust.public_state()["roles"]["targets"]["version"] == version
    acme.publish(trust, "second/1.0.0", TWO)
    assert (trust.target(MODEL, "1.0.0"), trust.target("second", "1.0.0")) == (ONE, TWO)


def test_bins_of_all_publishers_stay_within_the_project(trust: Trust):
    for number in range(8):
        workstation = Workstation(f"p{number}")
        assert trust.add_publisher(workstation.name, workstation.pems(), [f"m{number}"]).bins == 32
    late = Workstation("late")
    assert refused(lambda: trust.add_publisher("late", late.pems(), ["late"])) == "bins_exhausted"


def test_without_the_targets_key_a_ceremony_is_needed_and_publishing_goes_on(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust")
    acme = with_publisher(trust, Workstation())
    for name in ("root", "targets"):
        (tmp_path / "trust" / "keys" / f"{name}.pem").unlink()
    server = Trust.open(tmp_path / "trust")
    assert refused(lambda: server.add_publisher("late", Workstation().pems(), ["late"])) == "ceremony_needed"
    acme.publish(server, TARGET, ONE)
    assert server.target(MODEL, "1.0.0") == ONE
    assert server.public_state()["development"] is False


def test_where_the_online_keys_are_elsewhere_the_director_publishes_what_the_api_took(tmp_path: Path):
    director = Trust.create_dev(tmp_path / "trust")
    acme = with_publisher(director, Workstation())
    keys = tmp_path / "trust" / "keys"
    hidden = tmp_path / "elsewhere"
    keys.rename(hidden)
    api = Trust.open(tmp_path / "trust")
    acme.publish(api, TARGET, ONE)
    role = api.bin_for(TARGET)[0]
    assert f"{role}.json" not in snapshot(api).meta
    assert refused(api.refresh_online) == "key_absent"
    hidden.rename(keys)
    assert Trust.open(tmp_path / "trust").refresh_online() is True
    assert snapshot(api).meta[f"{role}.json"].version == 1


def test_online_roles_are_signed_again_at_half_their_life(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust", now=T0)
    first, first_snapshot = timestamp(trust), snapshot(trust)
    assert trust.refresh_online(T0 + DAY_S * 0.4) is False
    assert trust.refresh_online(T0 + DAY_S * 0.6) is True
    assert timestamp(trust).version == int(T0 + DAY_S * 0.6)
    assert timestamp(trust).expires - first.expires == timedelta(days=0.6)
    assert snapshot(trust).version == first_snapshot.version
    assert trust.refresh_online(T0 + DAY_S * 4) is True
    assert snapshot(trust).version == int(T0 + DAY_S * 4)


def test_in_development_the_offline_roles_are_renewed_too(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust", now=T0)
    acme = Workstation()
    trust.add_publisher("acme", acme.pems(), [MODEL], now=T0)
    assert trust.refresh_online(T0 + 200 * DAY_S) is True
    state = trust.public_state()["roles"]
    assert (state["root"]["version"], state["targets"]["version"]) == (2, 3)
    assert [publisher.name for publisher in trust.publishers] == ["acme"]
    first, second = (Metadata[Root].from_bytes(trust.metadata(f"{number}.root.json")) for number in (1, 2))
    first.signed.verify_delegate("root", second.signed_bytes, second.signatures)
    assert second.signed.expires > first.signed.expires


def test_versions_only_rise_also_when_the_clock_went_back(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust", now=T0)
    before = timestamp(trust).version
    acme = with_publisher(trust, Workstation())  # signed by today's clock, years before T0
    acme.publish(trust, TARGET, ONE)
    assert timestamp(trust).version == before + 3  # delegation, role, bin
    assert Trust.open(tmp_path / "trust").target(MODEL, "1.0.0") == ONE


def test_metadata_altered_on_disk_are_not_believed(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust")
    acme = with_publisher(trust, Workstation())
    acme.publish(trust, TARGET, ONE)
    role, version, data = trust.bin_for(TARGET)
    path = tmp_path / "trust" / "metadata" / f"{version}.{role}.json"
    path.write_bytes(data.replace(ONE[7:].encode(), TWO[7:].encode()))
    with pytest.raises(WherryError) as caught:
        Trust.open(tmp_path / "trust").target(MODEL, "1.0.0")
    assert caught.value.code == "metadata_altered"


@pytest.mark.parametrize(
    "name",
    ["../keys/root.pem", "root.json", "0.root.json", "1.root.json/..", "1.ROOT.json", "", "1..json", "99.root.json"],
)
def test_names_that_are_no_metadata_are_refused(trust: Trust, name: str):
    assert refused(lambda: trust.metadata(name)) == "metadata_unknown"


def test_after_a_restore_publishers_hand_in_what_they_kept(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust")
    acme = with_publisher(trust, Workstation())
    role, _, _ = trust.bin_for(TARGET)
    trust.accept_bin(role, acme.bin(1, {TARGET: ONE}), 0)
    kept = acme.bin(4, {TARGET: ONE})
    assert trust.accept_bin(role, kept, 1) == "accepted"
    assert trust.role_bytes(role) == (role, 4, kept)
    assert refused(lambda: trust.accept_bin(role, acme.bin(4 + 20_000, {TARGET: ONE}), 4)) == "bin_version"


RIVAL = """
import sys
from pathlib import Path
from tests.trust_kit import MODEL, Workstation, digest
from wherry_server.trust import Trust
from wherry_shared import key_files
from wherry_shared.errors import RefusedError
trust, who = Trust.open(Path(sys.argv[1])), sys.argv[2]
acme = Workstation()
acme.signers = [key_files.load(Path(sys.argv[3]))]
for number in range(12):
    while True:
        try:
            acme.publish(trust, f"{MODEL}/{who}.{number}.0", digest(f"{who}.{number}"))
            break
        except RefusedError as error:
            assert error.code == "bin_changed", error
"""


def test_two_processes_publish_at_once_and_lose_nothing(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust")
    acme = Workstation()
    acme.signers = [key_files.create(tmp_path / "publisher.pem")]
    with_publisher(trust, acme)
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(tmp_path / "trust"), who, str(tmp_path / "publisher.pem")],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for who in ("1", "2")
    ]
    for rival in rivals:
        _, complaint = rival.communicate(timeout=60)
        assert rival.returncode == 0, complaint.decode()
    for who in ("1", "2"):
        for number in range(12):
            assert trust.target(MODEL, f"{who}.{number}.0") == digest(f"{who}.{number}")
    listed = {name: meta.version for name, meta in snapshot(trust).meta.items()}
    for role, version in trust.public_state()["publishers"][0]["bins"].items():
        assert listed[f"{role}.json"] == version


def test_superseded_online_versions_are_removed_and_nothing_else(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust", now=T0)
    for day in range(40):
        trust.refresh_online(T0 + day * DAY_S)
    names = [path.name for path in (tmp_path / "trust" / "metadata").iterdir()]
    assert len([name for name in names if name.endswith(".timestamp.json")]) == 16
    assert len([name for name in names if name.endswith(".snapshot.json")]) == 10
    assert {"1.root.json", "1.targets.json"} <= set(names)
    assert timestamp(trust).version == int(T0 + 39 * DAY_S)


def test_a_write_that_was_cut_between_bin_and_snapshot_is_published_later(tmp_path: Path):
    trust = Trust.create_dev(tmp_path / "trust")
    acme = with_publisher(trust, Workstation())
    role, _, _ = trust.bin_for(TARGET)
    before = trust.metadata("timestamp.json")
    (tmp_path / "trust" / "metadata" / f"1.{role}.json").write_bytes(acme.bin(1, {TARGET: ONE}))
    assert trust.metadata("timestamp.json") == before
    assert Trust.open(tmp_path / "trust").refresh_online() is True
    assert snapshot(trust).meta[f"{role}.json"].version == 1
    assert trust.target(MODEL, "1.0.0") == ONE


@pytest.mark.parametrize(
    ("days", "level", "words"),
    [
        (0.01, "note", "on this machine"),
        (75, "note", "acme is good until"),
        (95, "bad", "acme expired"),
    ],
)
def test_the_doctor_says_in_time_what_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: float, level: str, words: str
):
    """Online roles are signed anew on the way, as a director does."""
    settings = Settings(data=tmp_path)
    trust = Trust.create_dev(settings.trust_folder)
    with_publisher(trust, Workstation())
    at = time.time() + days * 86_400
    trust.refresh_online(at)
    monkeypatch.setattr(doctor, "now_us", lambda: int(at * 1_000_000))
    found = asyncio.run(doctor.QUESTIONS["trust"](settings))
    assert (found.level, words in found.detail) == (level, True), found
