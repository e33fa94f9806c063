"""The whole home of a device is put back as it once was: by a card that was written again, or by a thief with its disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.site_kit import WAIT_S, Site
from wherry_simulators.processes import wait_for

pytestmark = pytest.mark.slow


def test_a_device_from_an_older_card_is_noticed_and_brought_up_to_date(tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        site.server.start()
        near = site.add("near")
        first = site.install()
        assert near.child is not None
        near.child.stop()
        shutil.copytree(near.home, tmp_path / "card", ignore=shutil.ignore_patterns("run"))
        near.start()
        site.install()
        newest = site.install()
        assert near.child is not None
        near.child.stop()
        shutil.rmtree(near.home)
        shutil.copytree(tmp_path / "card", near.home)
        near.start()
        wait_for("the older life to serve", lambda: site.serves("near") in (first, newest), WAIT_S)
        site.wait_settled(newest)

        def written_down() -> bool:
            with site.server.client() as client:
                entries = client.get("/api/v1/audit", action="device.put_back")
                return [entry["subject"] for entry in entries] == [site.device_id("near")]

        wait_for("the server to write it down", written_down, WAIT_S)
        third = site.install()
        assert third != newest, "and it takes what comes after"
        assert len(site.agents["near"].status()["models"]) == 1
    finally:
        site.stop()
