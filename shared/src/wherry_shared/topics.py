"""MQTT topics: exact for devices, two parts that vary, no wildcard on a device (architecture.md §3.10)."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from wherry_shared.errors import RefusedError
from wherry_shared.ids import is_device_id, shard

Up = Literal["report", "telemetry", "hello"]
Down = Literal["offer", "ack"]
_UPS = frozenset(get_args(Up))


class UpTopic(NamedTuple):
    """The parts of a topic on which a device speaks."""

    device: str
    kind: Up


def up(device: str, kind: Up) -> str:
    """Return the topic on which `device` publishes `kind`."""
    return f"w1/{shard(device)}/{device}/{kind}"


def down(device: str, kind: Down) -> str:
    """Return the topic on which `device` listens for `kind`; the offer topic is retained."""
    return f"w1/{device}/{kind}"


def kept(device: str) -> tuple[str, str]:
    """Return the topics of which a broker keeps the last message of a device: its hello and its offer."""
    return up(device, "hello"), down(device, "offer")


def ingest_filter(kind: Up, shard_digits: str = "+") -> str:
    """Return the filter by which ingest subscribes to `kind`, of one shard or of all."""
    return f"w1/{shard_digits}/+/{kind}"


def parse_up(topic: str) -> UpTopic:
    """Take an up topic apart.

    Raises:
        RefusedError: `bad_topic`, also when the shard does not belong to the device.
    """
    parts = topic.split("/")
    if (
        len(parts) == 4
        and parts[0] == "w1"
        and is_device_id(parts[2])
        and parts[3] in _UPS
        and parts[1] == shard(parts[2])
    ):
        return UpTopic(parts[2], parts[3])  # type: ignore[arg-type]
    raise RefusedError("bad_topic", f"topic {topic[:120]!r} is not w1/SHARD/DEVICE/KIND")
