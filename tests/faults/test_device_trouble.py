"""Trouble around a device while a new version is on its way to it: it keeps serving the old one, says why it waits, and goes on.

None of this is held against the model: disk, network and trust are no verdicts.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.services import lacks
from tests.site_kit import MODEL, WAIT_S, Site, asking, check_answers, check_nobody_noticed
from wherry_server.trust import Trust
from wherry_shared import dsse, frames, key_files, wire
from wherry_shared.limits import MQTT_PAYLOAD_BYTES_MAX
from wherry_shared.topics import down
from wherry_simulators.processes import wait_for

pytestmark = [pytest.mark.services, pytest.mark.slow]

MEGABYTE = 1_000_000
DAY_S = 86_400


def waits_for(site: Site, name: str, reason: str) -> str:
    """Wait until an agent says that it waits, and until the server knows; return the detail."""

    def trouble() -> dict[str, Any] | None:
        found: dict[str, Any] = site.slot(name).get("trouble", {})
        return found if found.get("reason") == reason else None

    detail = str(wait_for(f"{name} to wait for {reason}", trouble, WAIT_S)["detail"])
    query = "SELECT 1 FROM device_model WHERE device_id = ? AND model = ? AND state = 'waiting' AND reason = ?"
    wait_for("the report", lambda: site.rows(query, site.device_id(name), MODEL, reason), WAIT_S)
    return detail


def known_bad(site: Site, name: str) -> list[Any]:
    found: list[Any] = site.agents[name].status()["known_bad"]
    return found


# --- the disk -----------------------------------------------------------------------------------


def limit_file_size(site: Site, name: str, count: int) -> None:
    """Let no process of an agent write a file beyond `count` bytes: to it, that is a disk without room."""
    child = site.agents[name].child
    assert child is not None
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (count, resource.RLIM_INFINITY))


def test_a_download_that_does_not_fit_waits_and_fits_later(site: Site) -> None:
    old, new = site.serves("near"), site.release(ballast_bytes=3 * MEGABYTE)
    limit_file_size(site, "near", MEGABYTE)
    with asking(site, "near") as clients:
        stuck = site.begin(new, "near")
        detail = waits_for(site, "near", "disk_full")
        assert "space" in detail
        assert site.serves("near") == old
        site.abort(stuck)
        site.wait_settled(old, "near")
        limit_file_size(site, "near", resource.RLIM_INFINITY)
        assert site.end(site.begin(new, "near"))["state"] == "done"
        site.wait_settled(new, "near")
    assert known_bad(site, "near") == []
    check_answers(clients, old, new)
    check_nobody_noticed(clients)
    site.check_streams()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of its own at `folder`; skip where that is not allowed."""
    folder.mkdir(parents=True)
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        lacks("needs to mount a small disk, which takes root and a kernel that lets it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_with_no_byte_left_stops_nothing_that_serves(site: Site) -> None:
    """Not even the journal can grow; what was durable stays so, and work goes on when there is room again."""
    old = site.current
    with small_disk(site.folder / "full", "24m") as home:
        agent = site.add("full", disk_reserve_mb=0)
        try:
            assert site.end(site.begin(old, "full", trial={"max_s": 1}))["state"] == "done"
            site.wait_settled(old, "full")
            said = site.log_mark("full")
            filler = home / "filler"
            _fill(filler)
            with asking(site, "full") as clients:
                new = site.release()
                number = site.begin(new, "full")
                wait_for("it to say so", lambda: "disk_full" in said() or "no space left" in said(), WAIT_S)
                wait_for("answers meanwhile", lambda: clients["full"].count > 20, WAIT_S)
                assert agent.child is not None
                assert agent.child.alive()
                assert site.serves("full") == old
                check_nobody_noticed(clients)
                filler.unlink()
                agent.child.kill()  # and whatever it could not write must not have been needed
                agent.child.start()
                assert site.end(number)["state"] == "done"
                site.wait_settled(new, "full")
            check_answers(clients, old, new)
            site.check_streams()
        finally:
            site.remove("full")


def _fill(path: Path) -> None:
    """Write until nothing more goes in."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


# --- the network --------------------------------------------------------------------------------


def test_a_server_out_of_reach_in_a_download_is_waited_for_and_nothing_is_fetched_twice(site: Site) -> None:
    size = 13 * MEGABYTE
    old, new = site.serves("far"), site.release(ballast_bytes=size)
    line = site.line
    assert line is not None
    with asking(site, "far") as clients:
        line.stall_after(10 * MEGABYTE)
        number = site.begin(new, "far")
        wait_for("most of the weights", lambda: site.downloaded("far") > size / 2, WAIT_S)
        line.cut()
        waits_for(site, "far", "network")
        assert site.serves("far") == old
        line.answered_bytes = 0
        line.mend()
        assert site.end(number)["state"] == "done"
        site.wait_settled(new, "far")
    assert line.answered_bytes < size / 2, "it went on where the line broke"
    check_answers(clients, old, new)
    check_nobody_noticed(clients)
    site.check_streams()


def test_what_a_lying_mirror_serves_is_refused_and_the_truth_is_taken_later(site: Site) -> None:
    old, new = site.serves("far"), site.release()
    between = site.between
    assert between is not None
    with site.server.client() as client:
        weights = client.get(f"/api/v1/bundles/{MODEL}/{new}")["config"]["variants"][0]["digest"]
    between.lie_about(weights)
    with asking(site, "far") as clients:
        number = site.begin(new, "far")
        detail = waits_for(site, "far", "digest_mismatch")
        assert weights in detail
        assert between.lied >= 1
        assert site.serves("far") == old
        store = site.agents["far"].home / "store/blobs/sha256"
        assert not (store / weights.removeprefix("sha256:")).exists(), "nothing that is not its name is kept under it"
        site.abort(number)
        between.honest()
        assert site.end(site.begin(new, "far"))["state"] == "done"
        site.wait_settled(new, "far")
    assert known_bad(site, "far") == []
    check_answers(clients, old, new)
    check_nobody_noticed(clients)


# --- trust --------------------------------------------------------------------------------------


def _expired(site: Site, _older: bytes) -> dict[str, bytes]:
    """What a server says that signed its newest timestamp four days ago, and nothing since: a freeze."""
    copy = site.folder / "frozen"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(site.server.folder / "trust", copy)
    trust = Trust.open(copy)
    pem = key_files.public_pem(key_files.create(copy / "late.pem"))
    trust.add_publisher("late", pem, ["late"], now=time.time() - 4 * DAY_S)
    newest = {name: role["version"] for name, role in trust.public_state()["roles"].items()}
    names = ["timestamp.json", f"{newest['snapshot']}.snapshot.json", f"{newest['targets']}.targets.json"]
    return {name: trust.metadata(name) for name in names}


def _rolled_back(_site: Site, older: bytes) -> dict[str, bytes]:
    """A timestamp that was good, played again."""
    return {"timestamp.json": older}


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        pytest.param(_expired, "trust_expired", id="expired"),
        pytest.param(_rolled_back, "trust_rollback", id="rolled back"),
    ],
)
def test_a_stale_repository_installs_nothing_and_stops_nothing(
    site: Site, forge: Callable[[Site, bytes], dict[str, bytes]], reason: str
) -> None:
    between = site.between
    assert between is not None
    older = Trust.open(site.server.folder / "trust").metadata("timestamp.json")
    old = site.install("far")
    new = site.release()
    between.own = {f"/tuf/default/{name}": data for name, data in forge(site, older).items()}
    with asking(site, "far") as clients:
        number = site.begin(new, "far")
        waits_for(site, "far", reason)
        assert site.serves("far") == old
        assert any(path.endswith("timestamp.json") for path in between.gave)
        site.abort(number)
        between.honest()
        assert site.end(site.begin(new, "far"))["state"] == "done"
        site.wait_settled(new, "far")
    check_answers(clients, old, new)
    check_nobody_noticed(clients)


# --- messages -----------------------------------------------------------------------------------


def _offers(site: Site, name: str) -> bytes:
    """The envelope of a device's current offer, as the server holds it."""
    ((envelope,),) = site.rows("SELECT envelope FROM offer WHERE device_id = ?", site.device_id(name))
    return bytes(envelope)


def _forged(site: Site, name: str) -> bytes:
    """An offer with the next number that a thief of the broker signed, naming the director's key."""
    envelope, payload, _ = dsse.open_envelope(_offers(site, name))
    offer = json.loads(payload)
    offer["serial"] += 1
    offer["models"] = {MODEL: {"target": "", "manifest": "", "mode": "none"}}
    key = Ed25519PrivateKey.generate()
    return dsse.sign(dsse.OFFER_TYPE, json.dumps(offer).encode(), envelope.keyid, key.sign)


def test_messages_that_are_no_offer_for_this_device_change_nothing(site: Site) -> None:
    """Whoever is at the broker can publish anything: only what the director signed for this device, and new, counts."""
    stale = _offers(site, "near")
    site.install()
    while _serial(site, "far") <= _serial(site, "near"):  # or only its age would be noticed
        site.install("far")
    versions = site.versions()
    device, stranger = site.device_id("near"), site.device_id("far")
    offer, ack = down(device, "offer"), down(device, "ack")
    ahead = wire.Ack(format=1, device=device, stream="report", epoch="e", seq=1 << 40)
    of_another = frames.seal(b"k" * frames.KEY_BYTES, "ack", device, wire.encode(ahead))
    messages: dict[str, tuple[str, bytes, str]] = {
        "not JSON": (offer, b"\xff\x00 nonsense", "an offer is ignored"),
        "no envelope": (offer, b'{"format": 1}', "an offer is ignored"),
        "an envelope of nothing": (offer, b'{"payload": "e30=", "keyid": "k", "sig": "AA=="}', "an offer is ignored"),
        "not base64": (offer, b'{"payload": "%%%", "keyid": "k", "sig": "AA=="}', "an offer is ignored"),
        "nested without end": (offer, b"[" * 50_000, "an offer is ignored"),
        "as large as may be": (offer, b"x" * MQTT_PAYLOAD_BYTES_MAX, "an offer is ignored"),
        "for another device": (offer, _offers(site, "far"), "came to this device"),
        "forged": (offer, _forged(site, "near"), "does not fit"),
        "old": (offer, stale, "is older than"),
        "repeated": (offer, _offers(site, "near"), ""),
        "empty": (offer, b"", ""),
        "no acknowledgement": (ack, b"nonsense", "an acknowledgement is ignored"),
        "an acknowledgement of another's": (ack, of_another, "an acknowledgement is ignored"),
        "the offer of another, on its own topic": (down(stranger, "offer"), stale, ""),
    }
    before = site.agents["near"].status()
    with asking(site) as clients, _broker(site) as publish:
        for name, (topic, payload, words) in messages.items():
            said = site.log_mark("near")
            publish(topic, payload)
            if words:
                wait_for(f"the agent to speak of the message {name}", lambda s=said, w=words: w in s(), WAIT_S)
        told = {name: client.count for name, client in clients.items()}
        wait_for("answers", lambda: all(clients[name].count > told[name] + 5 for name in clients), WAIT_S)
        after = site.agents["near"].status()
    same = ("device", "offer", "models", "known_bad", "reports_owed", "worker_pid", "pid", "connected")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    check_answers(clients, *versions)
    check_nobody_noticed(clients)
    site.install("near")  # it still hears the real ones
    site.check_streams()


def _serial(site: Site, name: str) -> int:
    return wire.parse(wire.Offer, dsse.open_envelope(_offers(site, name))[1]).serial


@contextmanager
def _broker(site: Site) -> Iterator[Callable[[str, bytes], None]]:
    """Publish as anybody who reaches the broker can."""
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="anybody", protocol=mqtt.MQTTv311)
    client.connect("127.0.0.1", site.server.broker_port)
    client.loop_start()

    def publish(topic: str, payload: bytes) -> None:
        sent = client.publish(topic, payload, qos=1)
        sent.wait_for_publish(WAIT_S)
        assert sent.is_published()

    try:
        yield publish
    finally:
        client.disconnect()
        client.loop_stop()
