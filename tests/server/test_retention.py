"""What devices said is deleted after its time, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from sqlalchemy import text

from tests.server.fleet_kit import PROJECT, FakeDevice, fleet, run
from wherry_server import retention
from wherry_server.settings import Settings
from wherry_shared import wire
from wherry_shared.errors import RefusedError

pytestmark = pytest.mark.backends


def telemetry(device: FakeDevice, seq: int) -> bytes:
    window = wire.Window(
        model="m", manifest="sha256:1", variant="v", arm="incumbent", start=1, duration_us=5, requests=3
    )
    said = wire.Telemetry(format=1, device=device.id, epoch="t1", seq=seq, first=1, at=1, windows=[window])
    return device.frame("telemetry", said)


def report(device: FakeDevice, seq: int) -> bytes:
    said = wire.Report(format=1, device=device.id, epoch="e1", seq=seq, first=1, at=1, model="m", state="confirmed")
    return device.frame("report", said)


def test_what_is_old_goes_step_by_step_and_what_is_above_a_gap_or_young_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            seqs = (1, 2, 3, 4, 5, 7)  # 6 is on its way
            await found.ingest.store("telemetry", [(device.id, telemetry(device, seq)) for seq in seqs])
            await found.ingest.store("report", [(device.id, report(device, seq)) for seq in seqs])
            settings = msgspec.structs.replace(found.services.settings, telemetry_days=90, reports_days=365)
            assert await retention.forget(found.database, PROJECT, settings) == 0
            async with found.database.write() as connection:
                age = {"age": 100 * retention.DAY_US}
                for table in ("telemetry_log", "report_log"):
                    older = f"UPDATE {table} SET received_at = received_at - :age WHERE seq <> 5"
                    await connection.execute(text(older), age)
            assert await retention.forget(found.database, PROJECT, settings) == 4
            for table in ("telemetry_log", "telemetry_window"):
                assert [row.seq for row in await found.rows(f"SELECT seq FROM {table} ORDER BY seq")] == [5, 7]
            assert len(await found.rows("SELECT 1 FROM report_log")) == 6
            assert len(await found.rows("SELECT 1 FROM device_model")) == 1
            # what was deleted is not taken for new
            result = await found.ingest.store_batch({"telemetry": [(device.id, telemetry(device, 1))]})
            assert result.new == 0

    monkeypatch.setattr(retention, "MESSAGES_PER_STEP", 3)
    run(work())


def test_nothing_is_kept_for_less_than_a_day(tmp_path: Path):
    with pytest.raises(RefusedError) as caught:
        Settings.load(tmp_path, telemetry_days=0)
    assert caught.value.code == "settings_invalid"
