"""What devices say is stored once and acknowledged without gaps, whatever comes between."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tests.server.fleet_kit import PROJECT, FakeDevice, Fleet, fleet, manifest_of, run
from wherry_server import cohorts, hellos, ingest
from wherry_server import fleet as devices_of
from wherry_server.collector import Collector
from wherry_server.streams import AHEAD_MAX, SEQ_MAX, Position
from wherry_shared import frames, ids, reasons, topics, wire
from wherry_shared.errors import RefusedError
from wherry_shared.facts import DeviceFacts
from wherry_shared.limits import METRICS_PER_WINDOW_MAX, SAMPLE_BYTES_MAX, SAMPLES_PER_WINDOW_MAX

pytestmark = pytest.mark.backends

# --- one stream ---------------------------------------------------------------------------------

STREAMS = [
    # messages as (seq, first) → contiguous, lost, new ones
    ("in order", [(1, 1), (2, 1), (3, 2)], 3, 0, [1, 2, 3]),
    ("repeated", [(1, 1), (1, 1), (2, 1), (1, 1)], 2, 0, [1, 2]),
    ("a gap stays open", [(1, 1), (3, 1)], 1, 0, [1, 3]),
    ("a gap closes", [(1, 1), (3, 1), (2, 1)], 3, 0, [1, 3, 2]),
    ("out of order", [(3, 1), (2, 1), (1, 1)], 3, 0, [3, 2, 1]),
    ("first jumps", [(1, 1), (9, 8)], 7, 6, [1, 9]),
    ("first jumps to the message itself", [(1, 1), (9, 9)], 9, 7, [1, 9]),
    ("first jumps over what was stored ahead", [(1, 1), (4, 1), (6, 6)], 6, 3, [1, 4, 6]),
    ("begins late", [(50, 50), (51, 50)], 51, 49, [50, 51]),
    ("an old one after the jump is no news", [(9, 9), (3, 1)], 9, 8, [9]),
]


@pytest.mark.parametrize(
    ("messages", "contiguous", "lost", "new"), [row[1:] for row in STREAMS], ids=[r[0] for r in STREAMS]
)
def test_a_stream_moves_on_by_its_rules(messages: list, contiguous: int, lost: int, new: list[int]):
    position = Position()
    taken = [seq for seq, first in messages if position.accept(seq, first) == "new"]
    assert (position.contiguous, position.lost, taken) == (contiguous, lost, new)


@pytest.mark.parametrize(("seq", "first"), [(0, 0), (1, 0), (1, 2), (-1, -1), (SEQ_MAX + 1, 1), (5, -3)])
def test_numbers_that_cannot_be_are_refused(seq: int, first: int):
    with pytest.raises(RefusedError) as caught:
        Position().accept(seq, first)
    assert caught.value.code == "stream_invalid"


def test_a_message_far_above_a_gap_is_refused_and_comes_again():
    position = Position()
    with pytest.raises(RefusedError) as caught:
        position.accept(AHEAD_MAX + 1, 1)
    assert caught.value.code == "stream_ahead"
    assert position.contiguous == 0


@given(st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=200)
def test_delivery_in_any_order_with_repeats_stores_each_once_and_acknowledges_all(count: int, seed: int):
    chance = random.Random(seed)
    sent = [number for number in range(1, count + 1) for _ in range(chance.randint(1, 3))]
    chance.shuffle(sent)
    position = Position()
    new = []
    for seq in sent:
        if position.accept(seq, 1) == "new":
            new.append(seq)
        held = set(new)
        assert position.contiguous == next(n for n in range(count + 1) if n + 1 not in held)
    assert sorted(new) == list(range(1, count + 1))
    assert (position.contiguous, position.lost, position.ahead) == (count, 0, set())


# --- through the database -----------------------------------------------------------------------


def telemetry(device: FakeDevice, seq: int, first: int = 1, **more: Any) -> bytes:
    window = wire.Window(
        model="m", manifest="sha256:1", variant="v", arm="incumbent", start=1, duration_us=5, requests=3
    )
    values = {"format": 1, "device": device.id, "epoch": "t1", "seq": seq, "first": first, "at": 1, "windows": [window]}
    return device.frame("telemetry", wire.Telemetry(**{**values, **more}))


def window_with(*sizes: int) -> wire.Window:
    samples = [
        wire.Sample(inputs=[wire.SampleTensor(name="x", datatype="UINT8", shape=[size], data=b"s" * size)])
        for size in sizes
    ]
    kind: dict[str, Any] = {"model": "m", "manifest": "sha256:1", "variant": "v", "arm": "incumbent"}
    return wire.Window(**kind, start=1, duration_us=5, requests=3, samples=samples, samples_left_out=2)


def report(device: FakeDevice, seq: int, first: int = 1, **more: Any) -> bytes:
    values = {"format": 1, "device": device.id, "epoch": "e1", "seq": seq, "first": first, "at": 1, "model": "m"}
    return device.frame("report", wire.Report(**{**values, "state": "confirmed", "running": "sha256:1", **more}))


def test_samples_are_stored_within_their_bounds_and_what_is_beyond_is_counted(tmp_path: Path):
    fits = window_with(*[SAMPLE_BYTES_MAX] * SAMPLES_PER_WINDOW_MAX)
    too_large = window_with(1, SAMPLE_BYTES_MAX + 1)
    too_many = window_with(*[1] * (SAMPLES_PER_WINDOW_MAX + 1))

    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            frame = telemetry(device, 1, windows=[fits, too_large, too_many])
            acks = await found.ingest.store("telemetry", [(device.id, frame)])
            assert acked(device, acks) == [("telemetry", "t1", 1)], "its counts are as good as ever"
            rows = await found.rows("SELECT body FROM telemetry_window ORDER BY position")
            stored = [wire.parse(wire.Window, row.body) for row in rows]
            assert stored[0] == fits
            assert [(one.samples, one.samples_left_out, one.requests) for one in stored[1:]] == [
                ([], 4, 3),
                ([], 2 + SAMPLES_PER_WINDOW_MAX + 1, 3),
            ]
            assert found.ingest.refused == {"samples_too_large": 2}

    run(work())


METRICS = [
    ({f"m{n}": wire.Sum(count=2, total=-1.5) for n in range(METRICS_PER_WINDOW_MAX)}, True),
    ({f"m{n}": wire.Sum(count=2, total=1.0) for n in range(METRICS_PER_WINDOW_MAX + 1)}, False),
    ({"Upper": wire.Sum(count=2, total=1.0)}, False),
    ({"m": wire.Sum(count=0, total=1.0)}, False),
]


def test_crashes_and_metrics_are_stored_within_their_bounds(tmp_path: Path):
    windows = [msgspec.structs.replace(window_with(), crashes=4, metrics=metrics) for metrics, _ in METRICS]

    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            frame = telemetry(device, 1, windows=windows)
            for _ in range(2):  # the second is a repetition
                acks = await found.ingest.store("telemetry", [(device.id, frame)])
            assert acked(device, acks) == [("telemetry", "t1", 1)]
            rows = await found.rows("SELECT crashes, requests FROM telemetry_window")
            assert [(row.crashes, row.requests) for row in rows] == [(4, 3)] * len(METRICS)
            rows = await found.rows(
                "SELECT position, name, model, arm, count, total FROM telemetry_metric ORDER BY name"
            )
            kept = [(position, name) for position, (metrics, fits) in enumerate(METRICS) if fits for name in metrics]
            assert [(row.position, row.name) for row in rows] == kept
            assert {(row.model, row.arm, row.count, row.total) for row in rows} == {("m", "incumbent", 2, -1.5)}
            assert found.ingest.refused == {"metrics_invalid": 3}

    run(work())


def test_what_a_shadow_and_a_standby_say_is_stored_whole(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            store = found.ingest.store
            compared = {"compared": 9, "agreed": 8, "skipped": 4}
            shadow = wire.Window(
                model="m",
                manifest="sha256:2",
                variant="v",
                arm="shadow",
                start=1,
                duration_us=5,
                requests=9,
                confidence={"3": 9},
                distance={"2": 9},
                **compared,
            )
            frame = telemetry(device, 1, windows=[shadow])
            assert acked(device, await store("telemetry", [(device.id, frame)])) == [("telemetry", "t1", 1)]
            terms = {"manifest": "sha256:2", "share": 0.0, "group": "g"}
            said = [
                report(device, 1, state="standby", mode="blue_green", **terms),
                report(device, 2, state="compared", mode="shadow", trial_end="time", **{**terms, **compared}),
            ]
            assert acked(device, await store("report", [(device.id, one) for one in said])) == [("report", "e1", 2)]
            (window,) = await found.rows("SELECT arm, body FROM telemetry_window")
            assert window.arm == "shadow"
            assert wire.parse(wire.Window, window.body) == shadow
            rows = await found.rows("SELECT state, body FROM report_log ORDER BY seq")
            assert [row.state for row in rows] == ["standby", "compared"]
            last = wire.parse(wire.Report, rows[-1].body)
            assert (last.mode, last.share, last.group, last.compared, last.agreed) == ("shadow", 0.0, "g", 9, 8)

    run(work())


def acked(device: FakeDevice, answers: list[tuple[str, bytes]]) -> list[tuple[str, str, int]]:
    found = []
    for name, frame in answers:
        assert name == device.id
        ack = wire.parse(wire.Ack, frames.unseal(device.key, "ack", device.id, frame))
        found.append((ack.stream, ack.epoch, ack.seq))
    return found


def test_repeats_gaps_and_jumps_over_batches_keep_the_log_and_the_acknowledgement_right(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            store = found.ingest.store
            assert acked(device, await store("telemetry", [(device.id, telemetry(device, 1))])) == [
                ("telemetry", "t1", 1)
            ]
            assert acked(device, await store("telemetry", [(device.id, telemetry(device, 3))])) == [
                ("telemetry", "t1", 1)
            ]
            assert acked(device, await store("telemetry", [(device.id, telemetry(device, 3))])) == [
                ("telemetry", "t1", 1)
            ]
            assert acked(device, await store("telemetry", [(device.id, telemetry(device, 2))])) == [
                ("telemetry", "t1", 3)
            ]
            assert acked(device, await store("telemetry", [(device.id, telemetry(device, 9, 8))])) == [
                ("telemetry", "t1", 7)
            ]
            assert acked(device, await store("telemetry", [(device.id, telemetry(device, 8, 8))])) == [
                ("telemetry", "t1", 9)
            ]
            logged = await found.rows("SELECT seq FROM telemetry_log ORDER BY seq")
            assert [row.seq for row in logged] == [1, 2, 3, 8, 9]
            assert len(await found.rows("SELECT 1 FROM telemetry_window")) == 5
            (stream,) = await found.rows("SELECT contiguous, highest, lost FROM stream")
            assert tuple(stream) == (9, 9, 4)
            assert found.ingest.lost == 4

    run(work())


def test_two_ingests_over_one_database_agree_on_what_is_new(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            from wherry_server.ingest import Ingest

            (device,) = await found.enrol(1)
            other = Ingest(found.database, found.services.master_key, "default")
            await found.ingest.store("report", [(device.id, report(device, 1)), (device.id, report(device, 2))])
            answers = await other.store("report", [(device.id, report(device, 2)), (device.id, report(device, 3))])
            assert acked(device, answers) == [("report", "e1", 3)]
            assert len(await found.rows("SELECT 1 FROM report_log")) == 3

    run(work())


def test_what_is_stored_already_without_its_stream_is_acknowledged_and_not_stored_twice(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            await found.ingest.store("telemetry", [(device.id, telemetry(device, seq)) for seq in (1, 2)])
            async with found.database.write() as connection:
                await connection.execute(text("DELETE FROM stream WHERE stream = 'telemetry'"))
            answers = await found.ingest.store("telemetry", [(device.id, telemetry(device, seq)) for seq in (1, 2, 3)])
            assert acked(device, answers) == [("telemetry", "t1", 3)]
            assert [row.seq for row in await found.rows("SELECT seq FROM telemetry_log ORDER BY seq")] == [1, 2, 3]
            assert len(await found.rows("SELECT 1 FROM telemetry_window")) == 3

    run(work())


def test_only_a_newer_report_replaces_the_current_row(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            store = found.ingest.store

            async def current() -> tuple[str, int]:
                (row,) = await found.rows("SELECT running, seq FROM device_model WHERE model = 'm'")
                return row.running, row.seq

            await store("report", [(device.id, report(device, 2, running="sha256:2"))])
            await store("report", [(device.id, report(device, 1, running="sha256:1"))])
            assert await current() == ("sha256:2", 2)
            # a new journal is newer, though its numbers begin again; the old epoch is old news from then on
            await store("report", [(device.id, report(device, 1, epoch="e2", running="sha256:9"))])
            assert await current() == ("sha256:9", 1)
            await store("report", [(device.id, report(device, 3, running="sha256:3"))])
            assert await current() == ("sha256:9", 1)

    run(work())


def spoiled(found: Fleet, device: FakeDevice, other: FakeDevice) -> dict[str, tuple[str, str, bytes]]:
    """One message per way of being wrong: name → (expected code, device by topic, frame)."""
    good = report(device, 1)
    stranger = ids.new_device_id()
    key = frames.device_key(found.services.master_key, stranger)
    foreign = wire.Report(format=1, device=other.id, epoch="e1", seq=1, first=1, at=1, model="m", state="confirmed")
    unknown = wire.Report(format=1, device=stranger, epoch="e1", seq=1, first=1, at=1, model="m", state="confirmed")

    def sealed(payload: bytes) -> bytes:
        return frames.seal(device.key, "report", device.id, payload)

    return {
        "altered": ("frame_forged", device.id, good[:-2] + b" }"),
        "under another key": ("frame_forged", device.id, frames.seal(b"k" * 32, "report", device.id, b"{}")),
        "on another device's topic": ("frame_forged", other.id, good),
        "of another kind": ("frame_forged", device.id, frames.seal(device.key, "hello", device.id, b"{}")),
        "names another device": ("message_foreign", device.id, sealed(wire.encode(foreign))),
        "no frame": ("frame_invalid", device.id, b"hello"),
        "empty": ("frame_invalid", device.id, b""),
        "not JSON": ("message_invalid", device.id, sealed(b"\xff\x00{")),
        "not a report": ("message_invalid", device.id, sealed(b'{"format": 1}')),
        "nested without end": ("message_invalid", device.id, sealed(b"[" * 5000)),
        "of a later format": ("message_format", device.id, sealed(good[44:].replace(b'"format":1', b'"format":2'))),
        "numbers beyond any table": ("message_invalid", device.id, report(device, 1, requests=1 << 63)),
        "a negative number": ("message_invalid", device.id, report(device, 1, errors=-1)),
        "a stream that cannot be": ("stream_invalid", device.id, report(device, 1, first=7)),
        "too large": ("frame_too_large", device.id, report(device, 1, detail="x" * 100_000)),
        "not enrolled": ("device_unknown", stranger, frames.seal(key, "report", stranger, wire.encode(unknown))),
        "no device id": ("bad_topic", "nobody", good),
    }


def test_what_is_wrong_with_a_message_is_counted_and_stops_nobody(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            device, other, healthy = await found.enrol(3)
            for seq, (name, (code, topic, frame)) in enumerate(spoiled(found, device, other).items(), 1):
                before = found.ingest.refused[code]
                answers = await found.ingest.store("report", [(topic, frame), (healthy.id, report(healthy, seq))])
                assert found.ingest.refused[code] == before + 1, name
                assert (healthy.id, seq) in [
                    (d, wire.parse(wire.Ack, f[44:]).seq) for d, f in answers if d == healthy.id
                ], name
            assert {row.device_id for row in await found.rows("SELECT device_id FROM report_log")} == {healthy.id}

    run(work())


def test_a_revoked_device_is_heard_no_more(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            from sqlalchemy import text

            async with found.database.write() as connection:
                await connection.execute(text("UPDATE device SET state = 'revoked'"))
            assert await found.ingest.store("report", [(device.id, report(device, 1))]) == []
            assert found.ingest.refused["device_unknown"] == 1

    run(work())


def test_of_a_device_that_left_for_good_the_broker_keeps_nothing(tmp_path: Path):
    cleared: list[str] = []

    async def work() -> None:
        async with fleet(tmp_path) as found:
            left, revoked, healthy = devices = await found.enrol(3)
            async with found.database.write() as connection:
                for device, state in ((left, "decommissioned"), (revoked, "revoked")):
                    await devices_of.end_device(connection, PROJECT, device.id, state)  # type: ignore[arg-type]
            stored = asyncio.Event()
            gathers = Collector(found.ingest, lambda *_: None, lambda _: stored.set(), cleared.append)
            task = asyncio.create_task(gathers.run())
            for device in devices:
                gathers.received(topics.up(device.id, "hello"), device.hello())
            gathers.received(topics.up(healthy.id, "hello"), b"")  # as the broker passes on what clears
            await asyncio.wait_for(stored.wait(), 20)
            task.cancel()
            assert cleared == [topics.up(left.id, "hello"), topics.down(left.id, "offer")]
            assert found.ingest.refused == {"device_unknown": 2}

    run(work())


def test_a_hello_brings_facts_and_what_runs_but_no_older_word_than_a_report(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)

            def hello(running: str, following: int) -> bytes:
                said = msgspec.convert(
                    {
                        "format": 1,
                        "device": device.id,
                        "at": device.tick(),
                        "boot": "b2",
                        "trust_version": 3,
                        "trust_state": "trust_stale",
                        "agent": "0.1.0",
                        "offer_epoch": 1,
                        "offer_serial": 7,
                        "facts": {"arch": "aarch64"},
                        "running": {"m": running},
                        "streams": {"report": ["e1", 1, following]},
                    },
                    wire.Hello,
                )
                return device.frame("hello", said)

            async def running() -> str:
                (row,) = await found.rows("SELECT running FROM device_model WHERE model = 'm'")
                value: str = row.running
                return value

            await found.ingest.store(
                "report", [(device.id, report(device, n, running=f"sha256:{n}")) for n in (1, 2, 3)]
            )
            await found.ingest.store("hello", [(device.id, hello("sha256:old", 3))])  # said before the third report
            assert await running() == "sha256:3"
            await found.ingest.store("hello", [(device.id, hello("sha256:new", 4))])
            assert await running() == "sha256:new"
            (row,) = await found.rows("SELECT boot, offer_serial, facts, last_seen_at FROM device")
            assert (row.boot, row.offer_serial) == ("b2", 7)
            assert "aarch64" in str(row.facts)
            async with found.database.read() as connection:
                shown = await devices_of.show_device(connection, "default", device.id)
            assert (shown["trust_version"], shown["trust_state"]) == (3, "trust_stale")
            assert row.last_seen_at > 0

    run(work())


def test_facts_with_a_character_that_not_every_database_holds_are_kept_without_it(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            hello = wire.parse(wire.Hello, frames.unseal(device.key, "hello", device.id, device.hello()))
            facts = DeviceFacts(arch="x86\x00_64", cores=4)
            frame = device.frame("hello", msgspec.structs.replace(hello, facts=facts, at=device.tick()))
            await found.ingest.store("hello", [(device.id, frame)])
            assert not found.ingest.refused
            async with found.database.read() as connection:
                shown = await cohorts.preview(connection, "default", "arch = x86*_64 and cores = 4", 10)
            assert shown["devices"] == 1

    run(work())


def test_an_acknowledgement_carries_the_request_for_logs(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            from wherry_server import fleet as devices

            async with found.database.write() as connection:
                at = await devices.request_logs(connection, "default", device.id)
            ((_, frame),) = await found.ingest.store("report", [(device.id, report(device, 1))])
            assert wire.parse(wire.Ack, frame[44:]).logs == at

    run(work())


def test_a_request_for_logs_is_not_repeated_for_ever(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            async with found.database.write() as connection:
                await devices_of.request_logs(connection, "default", device.id)
                age = {"age": ingest.LOGS_FOR_US}
                await connection.execute(text("UPDATE device_log SET requested_at = requested_at - :age"), age)
            ((_, frame),) = await found.ingest.store("report", [(device.id, report(device, 1))])
            assert wire.parse(wire.Ack, frame[44:]).logs == 0

    run(work())


BEFORE = hellos.Standing(100, "b1", {"report": ("e1", 5), "telemetry": ("t1", 9)})
HELLOS = [
    # at, boot, nexts → news
    (101, "b1", {"report": ("e1", 5), "telemetry": ("t1", 9)}, True),
    (101, "b1", {"report": ("e2", 1)}, True),  # a new journal
    (100, "b1", {"report": ("e1", 5), "telemetry": ("t1", 9)}, False),  # the very same
    (90, "b1", {"report": ("e1", 5), "telemetry": ("t1", 9)}, False),
    (90, "b1", {"report": ("e1", 5), "telemetry": ("t1", 10)}, True),  # the clock was set back
    (90, "b1", {"report": ("e1", 4), "telemetry": ("t1", 10)}, False),
    (1, "b2", {"report": ("e1", 5), "telemetry": ("t1", 9)}, True),  # a clock that begins anew
    (1, "b0", {"report": ("e1", 4), "telemetry": ("t1", 9)}, False),  # of an earlier boot
    (1, "b0", {"report": ("e0", 7), "telemetry": ("t1", 9)}, False),  # of an earlier journal
    (1, "b0", {"report": ("e1", 5)}, False),
]


@pytest.mark.parametrize(("at", "boot", "nexts", "news"), HELLOS)
def test_a_hello_is_news_only_if_it_was_said_later(at: int, boot: str, nexts: dict, news: bool):
    streams = {name: (epoch, 1, following) for name, (epoch, following) in nexts.items()}
    said = wire.Hello(format=1, device="d", at=at, boot=boot, agent="0.1.0", streams=streams)
    assert hellos.is_news(said, BEFORE) is news


def test_what_is_played_back_brings_nothing_back(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            old = device.hello()
            device.known = (1, 7)
            spoken = report(device, 1)
            await found.ingest.store("hello", [(device.id, device.hello())])
            await found.ingest.store("report", [(device.id, spoken)])
            async with found.database.write() as connection:
                await connection.execute(text("UPDATE device SET last_seen_at = 5"))
            found.ingest._seen.clear()
            result = await found.ingest.store_batch({"hello": [(device.id, old)], "report": [(device.id, spoken)]})
            assert result.hellos == []
            assert len(result.acks) == 1  # the device may not have heard it
            (row,) = await found.rows("SELECT offer_serial, last_seen_at FROM device")
            assert tuple(row) == (7, 5)
            assert found.ingest.refused["hello_old"] == 1
            newest = device.hello()
            await found.ingest.store("hello", [(device.id, newest)])
            await found.ingest.store("hello", [(device.id, newest)])
            assert found.ingest.refused["hello_old"] == 1, "the very last one comes again from the broker"

    run(work())


def test_a_home_that_was_put_back_is_acknowledged_beyond_what_it_knows_and_written_down(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            (device,) = await found.enrol(1)
            for seq in range(1, 6):
                await found.ingest.store("report", [(device.id, report(device, seq))])
            again = report(device, 3, running="sha256:0")  # a number that was given before
            acks = await found.ingest.store("report", [(device.id, again)])
            assert acked(device, acks) == [("report", "e1", 5)], "by this it learns that it is older than what it said"
            for seq in (1, 2):
                told = report(device, seq, epoch="e2", reason=reasons.PUT_BACK, detail="report 5", running="sha256:0")
                await found.ingest.store("report", [(device.id, told)])
            rows = await found.rows("SELECT action, subject, detail FROM audit_entry WHERE action = 'device.put_back'")
            assert [row.subject for row in rows] == [device.id], "once an hour"
            assert "report 5" in str(rows[0].detail)
            (row,) = await found.rows("SELECT running, reason FROM device_model")
            assert tuple(row) == ("sha256:0", reasons.PUT_BACK)

    run(work())


def test_where_a_device_came_from_is_learned_from_its_report(tmp_path: Path):
    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.0.0", "1.1.0")
            (device,) = await found.enrol(1)
            device.running = manifest_of("1.0.0")  # the server does not know: no hello said so
            number = await found.roll_out("1.1.0")
            await found.until(number, "done")
            (row,) = await found.rows("SELECT from_manifest, from_target FROM assignment")
            assert tuple(row) == (manifest_of("1.0.0"), "file-type/1.0.0")

    run(work())


@pytest.mark.parametrize(
    ("behaviour", "outcome"), [("good", "confirmed"), ("idle", "confirmed_idle"), ("bad", "returned")]
)
@pytest.mark.parametrize("together", [True, False])
def test_a_report_that_comes_again_after_its_successor_undoes_nothing(
    tmp_path: Path, behaviour: Any, outcome: str, together: bool
):
    """What is lost on its way to a killed director is sent again, after what the device said since."""

    async def work() -> None:
        async with fleet(tmp_path) as found:
            await found.publish("1.1.0")
            (device,) = await found.enrol(1, version="1.0.0")
            device.behaviours["1.1.0"] = behaviour
            device.online = False
            await found.roll_out("1.1.0")
            await found.turn()
            await found.turn()
            (row,) = await found.rows("SELECT envelope FROM offer")
            assert device.take_offer(bytes(row.envelope))
            trial, end = ((device.id, frame) for frame in device.owed_frames())
            if together:
                await found.ingest.store("report", [end, trial])
            else:
                await found.ingest.store("report", [end])
                await found.ingest.store("report", [trial])
            (row,) = await found.rows("SELECT outcome, settled_at, from_manifest FROM assignment")
            assert row.outcome == outcome
            assert row.settled_at > 0
            assert row.from_manifest == manifest_of("1.0.0")

    run(work())
