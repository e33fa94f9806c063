"""Every parser that reads foreign bytes, with good examples of what it reads, and ways to make them bad.

A parser either refuses cleanly (a `WherryError`) or returns the exact result: the same for the same bytes, and the same again from its
own encoding where there is one. `FAILURES` of anything else name parser and input.
"""

from __future__ import annotations

import base64
import io
import json
import random
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zstandard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from tests.agent.builders import offered
from tests.fuzz_trust import Nonsense
from tests.trust_kit import FACTS, MODEL, Workstation, assets_of, digest, write_bundle
from wherry_agent import canonical_json, sealing
from wherry_agent.store import asset_members
from wherry_server import desired, trust_rules
from wherry_server.plan import parse_plan
from wherry_server.targeting import parse_selector
from wherry_server.trust import Trust
from wherry_shared import content_keys, dsse, frames, golden, signed_files, statements, tiles, wire
from wherry_shared.bundle import encode_config, parse_config, parse_manifest
from wherry_shared.digest import of_bytes
from wherry_shared.encrypting import encrypt
from wherry_shared.errors import RefusedError, WherryError
from wherry_shared.image_layout import Layout
from wherry_shared.key_ring import KeyRing
from wherry_shared.signed_files import parse_targets

PEAK_BYTES_MAX = 64 * 1024 * 1024
"""Memory that one input of at most some hundred KB may make a parser take."""
DEVICE = "A" * 22
KEY = b"k" * 32


SEAL = sealing.Seal(bytes(32), "migrate")
ASSETS = {"labels.txt": b"cat\ndog\n", "more/words.json": b"[]"}
APPLY = b"""cohorts: [{name: berlin, selector: label.site = berlin}]
flags: [{name: dark, type: boolean, variants: {"1": true, "0": false}, default: "1"}]
rollouts:
- models: &models [{model: thing, version: 1.0.0}]
  stages: &stages [{share: 1.0}]
  cohort: berlin
- {models: *models, stages: *stages, selector: all}
"""
GOLDEN = golden.Golden(
    (
        golden.Vector(
            {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "words": np.array([["cat", ""]], object)},
            {
                "y": golden.Expected(np.ones((2, 2), np.float32), (2, 2)),
                "z": golden.Expected(np.ones(4, np.int64), (9, 9), golden.Sample(1, 7, 4)),
            },
        ),
    ),
    {"y": golden.Tolerance(0.1, 0.0, 0.2), "z": golden.Tolerance(0.0, 0.0)},
)


@dataclass(frozen=True)
class Parser:
    """What reads, and what it can read."""

    name: str
    parse: Callable[[bytes], Any]
    seeds: Sequence[bytes]
    encode: Callable[[Any], bytes] | None = None


@dataclass
class Tally:
    """What was tried."""

    inputs: int = 0
    accepted: int = 0
    failures: list[str] = field(default_factory=list)

    def judge(self, parser: Parser, data: bytes) -> None:
        """Try one input."""
        self.inputs += 1
        measured = self.inputs % 64 == 0
        if measured:
            tracemalloc.start()
        try:
            found = parser.parse(data)
            if parser.parse(data) != found:
                self._fail(parser, data, "two results for the same bytes")
            if parser.encode is not None and parser.parse(parser.encode(found)) != found:
                self._fail(parser, data, "its own encoding is something else")
            self.accepted += 1
        except WherryError as error:
            if not error.code or not error.message:
                self._fail(parser, data, "a refusal without words")
        except Exception as error:
            self._fail(parser, data, f"{type(error).__name__}: {error}")
        finally:
            if measured:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                if peak > PEAK_BYTES_MAX:
                    self._fail(parser, data, f"{peak} bytes of memory")

    def _fail(self, parser: Parser, data: bytes, why: str) -> None:
        if len(self.failures) < 50:
            self.failures.append(f"{parser.name}: {why:.300}: {base64.b64encode(data[:600]).decode()}")


def unsealed(data: bytes, private: X25519PrivateKey) -> bytes:
    """Read a sealed key as a device does."""
    return content_keys.unseal(wire.parse(wire.SealedKey, data), private)


def parsers(folder: Path) -> list[Parser]:
    """Return all, with examples made in `folder`."""
    write_bundle(folder / "bundle")
    layout = Layout(folder / "bundle")
    manifest, parsed, about = layout.bundle()
    config = layout.path(parsed.config.digest).read_bytes()
    acme = Workstation()
    trust = Trust.create_dev(folder / "trust")
    files = {path.name.split(".")[1]: path.read_bytes() for path in (folder / "trust" / "metadata").glob("*.json")}
    policy = {MODEL: {"floor": "1.2.0", "revoked": [{"digest": digest("x"), "effect": "stop"}]}}
    roles = [acme.role(policy=policy), acme.bin(1, {f"{MODEL}/1.0.0": digest("one")})]
    offer = wire.Offer(
        format=1,
        device=DEVICE,
        project="default",
        epoch=1,
        serial=2,
        issued_at=3,
        expires_at=4,
        models={MODEL: offered()},
    )
    envelope = dsse.sign(dsse.OFFER_TYPE, wire.encode(offer), trust.director_keyid, trust.director_sign)
    plan = {
        "models": [{"model": MODEL, "version": "1.1.0", "manifest": digest("m")}],
        "selector": "label.site = berlin and not arch = armv7l",
        "stages": [{"share": 0.05, "soak_s": 60}, {"share": 1.0}],
        "failure": {"share": 0.1},
        "approval": {"stages": [1]},
        "gates": [{"metric": "errors", "harm": 0.05}],
    }
    selectors = [
        b"all",
        b"label.site = berlin and not name = lab-*",
        b"(arch = aarch64 or arch = x86_64) and cores >= 2",
    ]
    index = (folder / "bundle" / "index.json").read_bytes()
    head: dict[str, Any] = {"format": 1, "device": DEVICE}
    stream: dict[str, Any] = {**head, "epoch": "e", "seq": 7, "first": 3, "at": 9}
    hello = wire.Hello(
        **head,
        at=1,
        boot="b",
        agent="0.1.0",
        facts=FACTS,
        running={MODEL: digest("m")},
        streams={"report": ("e", 1, 2)},
    )
    report = wire.Report(**stream, model=MODEL, state="trial", requests=4)
    telemetry = wire.Telemetry(**stream, temperature_c=41.5)
    ack = wire.Ack(**head, stream="report", epoch="e", seq=5)
    ring, plain, private = KeyRing(folder / "ring"), b"of tiles" * 40, X25519PrivateKey.from_private_bytes(KEY)
    encrypt(folder / "bundle", folder / "dark", ring.add(), ring)
    dark = Layout(folder / "dark").manifest_bytes()
    header = tiles.Header(len(plain), of_bytes(plain), len(plain), of_bytes(plain))
    sealed = content_keys.seal(KEY, private.public_key(), model=MODEL, plain=digest("p"), blob=digest("b"))

    def opened(data: bytes) -> bytes:
        return tiles.open_all(io.BytesIO(data), KEY, of_bytes(plain))

    return [
        Parser("manifest", parse_manifest, [manifest], msgspec.json.encode),
        Parser("encrypted manifest", parse_manifest, [dark], msgspec.json.encode),
        Parser("header of tiles", tiles.parse_header, [header.encode()], tiles.Header.encode),
        Parser("encrypted blob", opened, [b"".join(tiles.seal(io.BytesIO(plain), header, KEY))]),
        Parser("sealed key", lambda data: unsealed(data, private), [wire.encode(sealed)]),
        Parser("config", parse_config, [config], encode_config),
        Parser("oci layout", _layout(folder / "fuzzed"), [index]),
        Parser("tuf targets", lambda data: _tuf(parse_targets(data)), [*roles, files["targets"]]),
        Parser("tuf root", lambda data: _tuf(signed_files.parse(Root, data)), [files["root"]]),
        Parser("tuf policy", _policy, [roles[0]]),
        Parser("wire offer", lambda data: wire.parse(wire.Offer, data), [wire.encode(offer)], wire.encode),
        Parser("wire envelope", dsse.open_envelope, [envelope]),
        Parser("wire hello", lambda data: wire.parse(wire.Hello, data), [wire.encode(hello)], wire.encode),
        Parser("wire report", lambda data: wire.parse(wire.Report, data), [wire.encode(report)], wire.encode),
        Parser("wire telemetry", lambda data: wire.parse(wire.Telemetry, data), [wire.encode(telemetry)], wire.encode),
        Parser("wire ack", lambda data: wire.parse(wire.Ack, data), [wire.encode(ack)], wire.encode),
        Parser(
            "wire frame",
            lambda data: frames.unseal(KEY, "report", DEVICE, data),
            [frames.seal(KEY, "report", DEVICE, b'{"a":1}')],
        ),
        Parser(
            "sealed record",
            lambda data: tuple(sealing.opened(SEAL, "journal", data)),
            [SEAL.close("journal", b'{"a":1}', 7), SEAL.close("journal", b"", 8)],
        ),
        *(Parser(name, read, [good]) for name, read, good in Nonsense(folder).parsers()),
        *(_wired(good) for good in _answers(sealed)),
        Parser("golden vectors", lambda data: repr(golden.decode(data)), [golden.encode(GOLDEN)]),
        Parser("golden vectors inside", _inside, [zstandard.decompress(golden.encode(GOLDEN))]),
        Parser(
            "statement", lambda data: statements.check_statement(data, about), [statements.provenance_statement(about)]
        ),
        Parser(
            "bill of materials", lambda data: statements.check_bill(data, about), [statements.bill_of_materials(about)]
        ),
        Parser("assets", _assets(folder / "assets.tar"), [assets_of(ASSETS)[1]]),
        Parser("apply file", _applied(folder / "applied"), [APPLY]),
        Parser("canonical json", _canonical, roles),
        Parser("plan", parse_plan, [json.dumps(plan).encode()], msgspec.json.encode),
        Parser("selector", lambda data: parse_selector(data.decode("utf-8", "replace")), selectors),
    ]


def _answers(sealed: wire.SealedKey) -> list[msgspec.Struct]:
    """Return one of every message that goes over HTTP between a device and its server."""
    more = wire.Encoding(encoding="zstd", digest=digest("z"), bytes=7)
    pems = {"certificate_pem": "-----BEGIN CERTIFICATE-----", "ca_pem": "x"}
    broker: dict[str, Any] = {"broker_host": "::1", "broker_port": 8883, "broker_tls": True, "tuf_path": "/tuf/default"}
    return [
        wire.SealedKeys(format=1, keys=[sealed], missing=2),
        wire.EnrolRequest(format=1, token="a.b.c", csr_pem="x", name="lamp", labels={"site": "berlin"}, facts=FACTS),
        wire.EnrolAnswer(format=1, device=DEVICE, project="default", bearer="b", mac_key="bQ==", **pems, **broker),
        wire.RenewRequest(format=1, csr_pem="x", content_key="eA=="),
        wire.RenewAnswer(format=1, certificate_pem="x"),
        wire.BrokerToken(format=1, token="a.b.c", expires_at=5),
        wire.BlobInfo(digest=digest("b"), bytes=9, encodings=[more]),
        wire.Retire(format=1, device=DEVICE, wipe="models"),
    ]


def _wired(good: msgspec.Struct) -> Parser:
    kind = type(good)
    return Parser(f"wire {kind.__name__}", lambda data: wire.parse(kind, data), [wire.encode(good)], wire.encode)


def _assets(path: Path) -> Callable[[bytes], Any]:
    declared = {asset.path: asset for asset in assets_of(ASSETS)[0].files}

    def parse(data: bytes) -> Any:
        path.write_bytes(data)
        return list(asset_members(path, declared))

    return parse


def _inside(data: bytes) -> str:
    """Read golden vectors whose frame is right, whatever is in it."""
    return repr(golden.decode(zstandard.compress(data, 1)))


def _applied(folder: Path) -> Callable[[bytes], Any]:
    folder.mkdir()

    def parse(data: bytes) -> Any:
        (folder / "apply.yaml").write_bytes(data)
        return msgspec.json.encode(desired.read(folder))

    return parse


def _canonical(data: bytes) -> str:
    """Read what a signature is over in the agent's quick way, and hold it against the library's own."""
    try:
        value = json.loads(data)
        expected = encode_canonical(value)
    except (ValueError, RecursionError, FormatError) as error:
        raise RefusedError("canonical_none", f"it has no canonical form: {error}") from error
    assert canonical_json.encode(value) == expected, "another text would be signed"
    return str(expected)


def _tuf(metadata: Metadata[Any]) -> bytes:
    """Return what was read, as bytes to compare: keys of mappings keep no order there."""
    assert isinstance(metadata.signed, Targets | Root | Snapshot | Timestamp)
    return metadata.signed_bytes


def _policy(data: bytes) -> bytes:
    metadata = parse_targets(data)
    for path, target in metadata.signed.targets.items():
        trust_rules.check_policy(path, target)
    return metadata.signed_bytes


def _layout(folder: Path) -> Callable[[bytes], Any]:
    folder.mkdir(parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def parse(data: bytes) -> Any:
        (folder / "index.json").write_bytes(data)
        return Layout(folder).descriptor()

    return parse


# --- ways to make them bad ----------------------------------------------------------------------

VALUES: tuple[Any, ...] = (None, True, 0, -1, 2**63, 2**64, 10**40, 1e308, 0.1, "", "\x00", "\ud7ff", "x" * 5000, "sha256:" + "0" * 64,
    "../../etc/passwd", [], [[]], {}, {"": {}}, {"format": 2}, [0] * 300)  # fmt: skip
"""What stands where something else was expected."""
_HOLE = "\u2400hole\u2400"


def splice(seed: bytes, at: int, cut: int, data: bytes) -> bytes:
    """Replace bytes."""
    at %= len(seed) + 1
    return seed[:at] + data + seed[at + cut :]


def graft(seed: bytes, at: int, value: Any) -> bytes:
    """Replace one node of JSON; bytes that are none are spliced."""
    try:
        tree = json.loads(seed)
        json.dumps(tree)
    except (ValueError, RecursionError):
        return splice(seed, at, 3, json.dumps(value).encode())
    nodes: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            nodes.append((node, key))
            pending.append(child)
    if not nodes:
        return json.dumps(value).encode()
    node, key = nodes[at % len(nodes)]
    node[key] = value
    return json.dumps(tree).encode()


def nest(seed: bytes, at: int, depth: int) -> bytes:
    """Put something deep where something flat was."""
    return graft(seed, at, _HOLE).replace(json.dumps(_HOLE).encode(), b"[" * depth + b"]" * depth)


def prune(seed: bytes, at: int) -> bytes:
    """Leave a member out, or say it twice."""
    grafted, hole = graft(seed, at, _HOLE), json.dumps(_HOLE).encode()
    return grafted.replace(hole, hole + b"," + hole if at % 2 else b"")


def mutate(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return something that was good once."""
    data = chance.choice(seeds)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(1 << 20)
        match chance.randrange(6):
            case 0:
                data = splice(data, at, chance.randrange(8), chance.randbytes(chance.randrange(8)))
            case 1:
                data = graft(data, at, chance.choice(VALUES))
            case 2:
                data = nest(data, at, chance.choice((2, 70, 2_000, 100_000)))
            case 3:
                data = prune(data, at)
            case 4:
                data = data[: at % (len(data) + 1)]
            case _:
                data = splice(data, at, 0, data[: at % 64])
    return data[:400_000]


def temporary() -> Path:
    """Return a folder for examples that lasts as long as the process."""
    return Path(tempfile.mkdtemp(prefix="wherry-fuzz-"))
