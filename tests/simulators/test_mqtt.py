from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_simulators import mqtt


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.booleans()), min_size=1, max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_packets_come_out_whole_however_the_bytes_arrive(messages, cuts):
    stream = b"".join(mqtt.publish("w1/x/offer", body, 7 if acked else 0) for body, acked in messages)
    splitter = mqtt.Splitter()
    packets, at, turn = [], 0, 0
    while at < len(stream):
        step = cuts[turn % len(cuts)]
        packets += splitter.feed(stream[at : at + step])
        at, turn = at + step, turn + 1
    assert [kind for kind, _ in packets] == [0x32 if acked else 0x30 for _, acked in messages]
    skip = [2 + 10 + (2 if acked else 0) for _, acked in messages]
    assert [body[n:] for (_, body), n in zip(packets, skip, strict=True)] == [body for body, _ in messages]


@pytest.mark.parametrize("data", [b"\x30\xff\xff\xff\xff\x01", b"\x30\xff\xff\xff\x7f"])
def test_a_length_that_no_broker_may_send_is_refused(data):
    with pytest.raises(mqtt.ProtocolError):
        mqtt.Splitter().feed(data)


def serve(script):
    """Run `script(connection, reader, writer, ready, messages)` between a Connection and a hand-held server."""

    async def run():
        taken: asyncio.Queue = asyncio.Queue()
        server = await asyncio.start_server(lambda r, w: taken.put_nowait((r, w)), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        messages: list[tuple[str, bytes]] = []
        ready = asyncio.Event()
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: mqtt.Connection(
                "c",
                username="u",
                password="p",
                filters={"w1/c/offer": 1},
                on_ready=ready.set,
                on_message=lambda topic, payload: messages.append((topic, payload)),
            ),
            "127.0.0.1",
            port,
        )
        reader, writer = await taken.get()
        try:
            async with asyncio.timeout(10):
                await script(connection, reader, writer, ready, messages)
        finally:
            connection.abort("end of test")
            writer.close()
            server.close()

    asyncio.run(run())


async def accept(reader, writer, ready):
    head = await reader.readexactly(2)
    assert (await reader.readexactly(head[1]))[:7] == b"\x00\x04MQTT\x04"
    writer.write(b"\x20\x02\x00\x00")
    head = await reader.readexactly(2)
    body = await reader.readexactly(head[1])
    assert (head[0], body[2:]) == (0x82, b"\x00\x0aw1/c/offer\x01")
    writer.write(b"\x90\x03" + body[:2] + b"\x01")
    await ready.wait()


def test_a_message_of_qos_1_is_delivered_and_acknowledged():
    async def script(connection, reader, writer, ready, messages):
        assert connection.publish("w1/00/c/report", b"early", qos=1) is False
        await accept(reader, writer, ready)
        writer.write(mqtt.publish("w1/c/offer", b"offer", 513))
        assert await reader.readexactly(4) == b"\x40\x02\x02\x01"
        assert messages == [("w1/c/offer", b"offer")]

    serve(script)


@pytest.mark.parametrize(
    ("packet", "word"),
    [
        (b"\x20\x02\x00\x05", "refused with code 5"),
        (b"\x82\x00", "not for a client"),
        (b"\x34\x04\x00\x01a\x00", "QoS 2"),
        (b"\x32\x02\x00\x09", "cut short"),
    ],
)
def test_what_a_broker_must_not_send_ends_the_connection_with_a_reason(packet, word):
    async def script(connection, reader, writer, ready, messages):
        writer.write(packet)
        assert word in await connection.closed
        assert messages == []

    serve(script)


def test_a_connection_that_the_broker_drops_says_so():
    async def script(connection, reader, writer, ready, messages):
        await accept(reader, writer, ready)
        writer.close()
        assert "closed by the broker" in await connection.closed
        assert connection.publish("w1/00/c/report", b"x", qos=0) is False

    serve(script)
