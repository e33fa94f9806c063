"""Downloads of a real agent that wait for power, are interrupted by heat, and resume; with a server beside it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import onnx
import pytest

from tests.agent.daemon_kit import MODEL, Agent, Site, agent, site
from tests.agent.serving_kit import until
from tests.shared.engines import models
from wherry_agent import status

pytestmark = [pytest.mark.services, pytest.mark.slow]


def heavy(path: Path, factor: float, count: int) -> Path:
    """A model with bytes in it that do not compress."""
    models.scale(path, factor)
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"ballast": secrets.token_hex(count)})
    onnx.save(model, str(path))
    return path


class Device:
    """A device whose /sys is a folder."""

    def __init__(self, sys: Path) -> None:
        self.sys = sys
        self.set("class/power_supply/BAT0", type="Battery", capacity="90", status="Discharging")
        self.set("class/power_supply/AC", type="Mains", online="0")
        self.hot(40)

    def set(self, folder: str, **files: str) -> None:
        (self.sys / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.sys / folder / name).write_text(text)

    def hot(self, celsius: int) -> None:
        self.set("class/thermal/thermal_zone0", temp=str(celsius * 1000))


def waits(device: Agent, part: str) -> None:
    def check(shown: dict) -> bool:
        trouble = shown["models"].get(MODEL, {}).get("trouble", {})
        return trouble.get("reason") == "conditions" and part in trouble["detail"]

    device.until(f"it waits: {part}", check)


def synced(home: Path) -> int:
    return sum(json.loads(path.read_bytes())["synced"] for path in (home / "store/blobs/sha256").glob("*.part.json"))


def states(server: Site) -> set[str]:
    return {one["state"] for one in server.call("GET", "/api/v1/devices/lamp")[1]["models"]}


def test_a_download_waits_for_mains_stops_in_the_heat_and_goes_on(tmp_path: Path) -> None:
    fake = Device(tmp_path / "sys")
    config = tmp_path / "agent.toml"
    config.write_text(
        "download_bytes_per_s_max = 4096\n"
        f'[conditions]\nmains = true\ntemperature_c_max = 80\ncheck_s = 0.3\nsys = "{fake.sys}"\n'
    )
    with site(tmp_path) as server, agent(server, "lamp", "--config", str(config)) as device:
        server.release("1.0.0", heavy(tmp_path / "one.onnx", 2.0, 40_000))
        device.until("it is connected", lambda shown: shown["connected"] == "mqtt" and shown["engines"])
        server.deploy("1.0.0", "lamp", trial_s=2)
        waits(device, "battery")
        assert synced(device.home) == 0
        until(lambda: "waiting" in states(server), "the server knows that it waits")

        fake.set("class/power_supply/AC", online="1")
        device.until(
            "something came", lambda shown: any(done > 0 for done, _ in shown["downloads"]["running"].values())
        )
        fake.hot(81)
        waits(device, "81 °C")
        shown = device.status()
        assert not shown["downloads"]["running"]
        assert "the device is at 81 °C, 80 are allowed" in status.render(shown)

        fake.hot(60)
        device.until_serves("1.0.0")
        assert device.stop() == 0
