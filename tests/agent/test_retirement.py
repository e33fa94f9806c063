"""A device that leaves its fleet: told by its server alone, it removes what was asked and its owner allows, over power cuts, too."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_link import nothing
from tests.server.harness import Running, free_port, running
from wherry_agent import daemon, link, retirement
from wherry_agent.disk import Disk
from wherry_agent.identity import Identity
from wherry_agent.link import Callbacks, Link
from wherry_agent.settings import Settings
from wherry_shared import frames, wire
from wherry_shared.errors import RefusedError

HELD = (
    "agent.toml",
    "identity/device.json",
    "identity/key.pem",
    "journal.json",
    "store/blob",
    "trust/1/root.json",
    "run/lock",
)
LEFT = {
    "nothing": set(HELD),
    "models": {"agent.toml", "identity/device.json", "identity/key.pem", "run/lock"},
    "all": {"agent.toml", "run/lock"},
}


def home(folder: Path) -> Path:
    for name in HELD:
        path = folder / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder / "home"


@pytest.mark.parametrize("wipe", LEFT)
def test_an_agent_that_finds_that_it_retired_removes_the_rest_and_is_not_started_again(
    tmp_path: Path, wipe: Any
) -> None:
    found = home(tmp_path)
    retirement.note(found, wipe, Disk())
    for _ in range(2):  # as after a power cut in between, and once more
        assert daemon.main(Settings(home=str(found))) == 78
        left = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
        assert left == LEFT[wipe] | {retirement.FILE}
    unit = Path(daemon.__file__).with_name("systemd") / "wherry-agent.service"
    assert "RestartPreventExitStatus=78" in unit.read_text().splitlines()


@pytest.mark.parametrize(
    ("asked", "allowed", "done"),
    [("all", "all", "all"), ("all", "models", "models"), ("models", "all", "models"), ("all", "nothing", "nothing")],
)
def test_the_owner_of_a_device_says_how_far_an_order_goes(asked: Any, allowed: Any, done: str) -> None:
    assert retirement.bounded(asked, allowed) == done


def device(server: Running, name: str) -> Identity:
    answer = server.device(name)
    return Identity(
        format=1,
        device=answer.device,
        project=answer.project,
        name=name,
        server=server.url,
        root_digest="",
        tuf_path=answer.tuf_path,
        bearer=answer.bearer,
        mac_key=answer.mac_key,
        broker_host="127.0.0.1",
        broker_port=free_port(),
    )


def test_only_a_device_that_left_is_told_and_only_by_its_own_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "HTTP_AFTER_S", 0.1)
    monkeypatch.setattr(link, "HTTP_EVERY_S", 0.2)
    with running(tmp_path / "data") as server:
        leaving, revoked, staying = (device(server, name) for name in ("leaving", "revoked", "staying"))
        told: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        links = []
        for known in (leaving, revoked, staying):
            callbacks = Callbacks(
                up=nothing,
                down=nothing,
                offer=nothing,
                ack=nothing,
                reached=nothing,
                outgoing=lambda _kind: [],
                retire=lambda frame, known=known: told.put((known.name, frame)),  # type: ignore[misc]
            )
            links.append(Link(tmp_path / known.name, known, server.url, callbacks))
            links[-1].start()
        try:
            with server.http() as http:
                assert http.post("/api/v1/devices/revoked/revoke").status_code == 200
                assert http.post("/api/v1/devices/leaving/decommission", params={"wipe": "models"}).status_code == 200
            name, frame = told.get(timeout=60)
        finally:
            for one in links:
                one.stop()
        assert name == "leaving"
        assert all(said == (name, frame) for said in iter(lambda: told.empty() or told.get(), True))
        order = wire.parse(wire.Retire, links[0].unseal("retire", frame))
        assert (order.device, order.wipe) == (leaving.device, "models")
        with pytest.raises(RefusedError):
            links[2].unseal("retire", frame)  # somebody else's order
        with pytest.raises(RefusedError):
            links[0].unseal("retire", frames.seal(b"k" * 32, "retire", leaving.device, wire.encode(order)))
        with server.http(f"{leaving.device}:guessed") as thief:
            assert thief.get("/device/v1/retirement").status_code == 404
