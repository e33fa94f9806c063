"""The server side as a device sees it: offers by serial, hello, acknowledgements after commit. No database, no broker.

It keeps the rules of contracts.md §3 that a device relies on: one offer per device composed of all its models, a serial
that only rises (and continues above what a device says it knows), streams that are stored once, gapless, and
acknowledged end to end. What it *wants* comes from a rollout or from a scenario.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

from wherry_shared import dsse, wire
from wherry_shared.clock import MICROSECONDS
from wherry_shared.wire import Ack, Hello, Offer, OfferedModel, Report, StreamName, Telemetry

PROJECT = "simulated"
KEYID = "simulated-director"
OFFER_LIFE_S = 7 * 86_400
_KEY = b"the simulated director key: a keyed hash stands in for Ed25519, the envelope and its checks are real"


def sign(payload: bytes, keyid: str = KEYID) -> bytes:
    """Return the envelope of an offer's bytes."""
    return dsse.sign(dsse.OFFER_TYPE, payload, keyid, lambda message: hmac.digest(_KEY, message, hashlib.sha256))


def verify(envelope: bytes) -> bytes:
    """Return the payload of an envelope that this server signed.

    Raises:
        RefusedError: as `dsse.verify`.
    """

    def good(message: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(hmac.digest(_KEY, message, hashlib.sha256), signature)

    return dsse.verify(dsse.OFFER_TYPE, envelope, {KEYID: good})


@dataclass(slots=True)
class Stream:
    """How far one (device, stream, epoch) is stored."""

    contiguous: int = 0
    above: set[int] = field(default_factory=set)
    lost: int = 0

    def take(self, seq: int, first: int) -> bool:
        """Store `seq` and say whether it is new; what lies below `first` and never came is counted as lost."""
        if first - 1 > self.contiguous:
            gap = set(range(self.contiguous + 1, first))
            self.lost += len(gap - self.above)
            self.above -= gap
            self.contiguous = first - 1
        new = seq > self.contiguous and seq not in self.above
        if new:
            self.above.add(seq)
        while self.contiguous + 1 in self.above:
            self.contiguous += 1
            self.above.discard(self.contiguous)
        return new


@dataclass(slots=True)
class Record:
    """What the server knows about one device."""

    desired: dict[str, OfferedModel] = field(default_factory=dict)
    epoch: int = 1
    serial: int = 0
    issued_us: int = 0
    envelope: bytes = b""
    offers: dict[int, dict[str, OfferedModel]] = field(default_factory=dict)
    """Every offer ever made to the device, by serial: checkers compare reports with it."""
    expires: dict[int, int] = field(default_factory=dict)
    """Serial → when the newest offer of that number expires (µs)."""
    known: tuple[int, int] = (0, 0)
    """(epoch, serial) that the device last said it knows."""
    streams: dict[tuple[StreamName, str], Stream] = field(default_factory=dict)
    log: list[Report] = field(default_factory=list)
    about: dict[tuple[str, str, int], Report] = field(default_factory=dict)
    """Per (model, manifest, attempt), the report with the highest seq."""
    current: dict[str, Report] = field(default_factory=dict)
    """Per model, the report with the highest seq of the newest epoch."""
    hello: Hello | None = None


class Server:
    """All devices' records. Callers carry the messages."""

    def __init__(self, devices: list[str], offer_life_s: int = OFFER_LIFE_S) -> None:
        self.records = {device: Record() for device in devices}
        self._life_us = offer_life_s * MICROSECONDS
        self._renew_us = 0

    def desire(self, device: str, model: str, offered: OfferedModel, now_us: int) -> bytes:
        """Make a new offer in which `model` should be `offered`; return the envelope to publish."""
        return self.desire_all(device, {model: offered}, now_us)

    def desire_all(self, device: str, models: dict[str, OfferedModel], now_us: int) -> bytes:
        """Make one new offer in which all of these models should be as offered."""
        record = self.records[device]
        desired = {**record.desired, **models}
        if record.desired == desired and record.envelope:
            return record.envelope
        record.desired = desired
        return self._reissue(device, record, now_us)

    def renew(self, now_us: int) -> list[tuple[str, bytes]]:
        """Sign every offer anew that is past half its life; return them to publish."""
        renewed: list[tuple[str, bytes]] = []
        if now_us < self._renew_us:
            return renewed
        self._renew_us = now_us + self._life_us // 20
        for device, record in self.records.items():
            if record.envelope and now_us - record.issued_us > self._life_us // 2:
                renewed.append((device, self._reissue(device, record, now_us)))
        return renewed

    def _reissue(self, device: str, record: Record, now_us: int) -> bytes:
        record.serial += 1
        record.issued_us = now_us
        record.offers[record.serial] = record.desired
        record.expires[record.serial] = now_us + self._life_us
        record.envelope = sign(
            wire.encode(
                Offer(
                    format=wire.FORMAT,
                    device=device,
                    project=PROJECT,
                    epoch=record.epoch,
                    serial=record.serial,
                    issued_at=now_us,
                    expires_at=now_us + self._life_us,
                    models=record.desired,
                    groups=_groups(record.desired),
                )
            )
        )
        return record.envelope

    def restore(self, device: str, serial: int) -> None:
        """Forget offers above `serial`, as a restore from a backup does; hello heals it."""
        record = self.records[device]
        record.serial = min(record.serial, serial)
        record.envelope = b""

    def on_hello(self, device: str, hello: Hello, now_us: int) -> bytes | None:
        """Take a hello in; return the offer that the device should get, if it does not know it."""
        record = self.records[device]
        record.hello = hello
        record.known = (hello.offer_epoch, hello.offer_serial)
        if record.known > (record.epoch, record.serial):
            record.epoch, record.serial = record.known
            return self._reissue(device, record, now_us) if record.desired else None
        if record.desired and not record.envelope:
            return self._reissue(device, record, now_us)
        return record.envelope if record.desired and record.known < (record.epoch, record.serial) else None

    def on_report(self, device: str, report: Report) -> tuple[Ack, bool]:
        """Store a report once; return the acknowledgement, and whether it was new."""
        record = self.records[device]
        ack, new = self._store(device, "report", report.epoch, report.seq, report.first)
        if new:
            record.log.append(report)
            before = record.current.get(report.model)
            if before is None or before.epoch != report.epoch or before.seq < report.seq:
                record.current[report.model] = report
            key = (report.model, report.manifest, report.attempt)
            if key not in record.about or record.about[key].seq < report.seq:
                record.about[key] = report
        return ack, new

    def on_telemetry(self, device: str, telemetry: Telemetry) -> tuple[Ack, bool]:
        """Store a telemetry message once."""
        return self._store(device, "telemetry", telemetry.epoch, telemetry.seq, telemetry.first)

    def _store(self, device: str, name: StreamName, epoch: str, seq: int, first: int) -> tuple[Ack, bool]:
        stream = self.records[device].streams.setdefault((name, epoch), Stream())
        new = stream.take(seq, first)
        return Ack(format=wire.FORMAT, device=device, stream=name, epoch=epoch, seq=stream.contiguous), new


def _groups(models: dict[str, OfferedModel]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, offered in models.items():
        if offered.group:
            found.setdefault(offered.group, []).append(name)
    return found
