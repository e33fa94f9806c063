"""A repository that says anything at all, with every signature right: how far signed nonsense gets into a device.

Bytes that nobody signed end at a signature, so mutating them never reaches what lies behind it. Here the thief has all keys: what stands in
a role is made bad, signed again, and a device's own client (`wherry_agent.trust`) refreshes and asks its questions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from tuf.api import exceptions
from tuf.api.metadata import Root, Targets
from tuf.ngclient import FetcherInterface

from tests.trust_kit import MODEL, Workstation, digest, with_publisher
from wherry_agent.children import Trust as Word
from wherry_agent.trust import CONFIG, Known, Session, border, open_updater
from wherry_server import trust_offline, trust_rules
from wherry_server.trust import Trust
from wherry_shared import key_files, signed_files
from wherry_shared.signed_files import parse_targets

S = 1_000_000
TARGET = f"{MODEL}/1.0.0"


class _Files(FetcherInterface):
    """Answers from a dictionary."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = urlsplit(url).path.rpartition("/")[2]
        if name not in self._files:
            raise exceptions.DownloadHTTPError(name, 404)
        yield self._files[name]


class Nonsense:
    """A repository in development, one publisher, one release with a policy; `parsers` make one role of it bad."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.trust = Trust.create_dev(folder / "nonsense")
        self._acme = Workstation()
        with_publisher(self.trust, self._acme)
        policy = {MODEL: {"floor": "0.9.0", "revoked": [{"digest": digest("x"), "effect": "stop"}]}}
        assert self.trust.accept_bin("acme", self._acme.role(2, policy=policy), 1) == "accepted"
        self._acme.publish(self.trust, TARGET, digest("one"))
        self._signers = {
            role: key_files.load(folder / "nonsense" / "keys" / f"{role}.pem")
            for role in ("root", "targets", "snapshot", "timestamp")
        }
        self._files: dict[str, bytes] = {}
        self._names: dict[str, str] = {}
        """Role → name of the file that clients ask for."""
        for path in (folder / "nonsense" / "metadata").glob("*.json"):
            version, _, role = path.stem.partition(".")
            known = self._names.get(role, "0.")
            if int(version) > int(known.partition(".")[0]):
                self._names[role] = path.name
            self._files[path.name] = path.read_bytes()
        self._files["timestamp.json"] = self._files[self._names["timestamp"]]
        self._names["timestamp"] = "timestamp.json"
        self._bin = next(role for role in self._names if role.startswith("acme-"))
        self._now = datetime.now(UTC)

    def parsers(self) -> Iterator[tuple[str, Callable[[bytes], Any], bytes]]:
        """Return (name, what reads, a good example)."""
        for role, name in (
            ("timestamp", "timestamp"),
            ("snapshot", "snapshot"),
            ("targets", "targets"),
            ("acme", "publisher role"),
            (self._bin, "bin"),
        ):
            yield f"signed {name}", self._reader(role, self._names[role]), self._files[self._names[role]]
        root = json.loads(self._files[self._names["root"]])
        root["signed"]["version"] += 1
        yield "signed root", self._reader("root", "2.root.json"), json.dumps(root).encode()
        yield "rules of a root", self._root_rules, self._files[self._names["root"]]
        yield "rules of targets", self._targets_rules, self._files[self._names["targets"]]
        yield "rules of a publisher", self._publisher_rules, self._files[self._names["acme"]]
        yield "rules of a bin", self._bin_rules, self._files[self._names[self._bin]]

    # --- what a device makes of it --------------------------------------------------------------

    def _reader(self, role: str, name: str) -> Callable[[bytes], Any]:
        def read(data: bytes) -> Any:
            files = {**self._files, name: self._signed(role, data)}
            if role == "snapshot":
                files["timestamp.json"] = self._stamped(files[name])
            return self._asked(files)

        return read

    def _signed(self, role: str, data: bytes) -> bytes:
        """Sign what stands in `data`, where it has a form that can be signed at all."""
        try:
            signed = json.loads(data)["signed"]
            text = encode_canonical(signed)
            assert isinstance(text, str)
            blob = text.encode()
        except (ValueError, TypeError, KeyError, RecursionError, FormatError):
            return data
        signer = self._signers.get(role) or self._acme.signers[0]
        made = [{"keyid": one.public_key.keyid, "sig": one.sign(blob).signature} for one in (signer,)]
        return json.dumps({"signatures": made, "signed": signed}).encode()

    def _stamped(self, snapshot: bytes) -> bytes:
        stamp = json.loads(self._files["timestamp.json"])
        about = stamp["signed"]["meta"]["snapshot.json"]
        about["hashes"] = {"sha256": hashlib.sha256(snapshot).hexdigest()}
        about.pop("length", None)
        return self._signed("timestamp", json.dumps(stamp).encode())

    def _asked(self, files: dict[str, bytes]) -> Any:
        home = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            with border():
                updater = open_updater(home, "http://nowhere/tuf", _Files(files), files["1.root.json"], CONFIG)
                updater.set_reference_time(self._now)
                updater.refresh()
            session = Session(updater, home, Known(0, {}, 0), int(self._now.timestamp()) * S)
            session.check_floors()
            policy = session.policy(MODEL)
            found = session.director_keys(), session.manifest_of(TARGET), policy.floor, sorted(policy.revoked)
            word = session.trust(1, changed=True)
            assert msgspec.json.decode(msgspec.json.encode(word), type=Word) == word, "the journal cannot keep it"
            return found, word
        finally:
            shutil.rmtree(home)

    # --- what a server makes of it --------------------------------------------------------------

    def _root_rules(self, data: bytes) -> Any:
        root = signed_files.parse(Root, data)
        trust_offline.check_root(None, root.signed, self._now)
        trust_offline.check_signed(trust_offline.needs(root, None, None))
        return root.signed_bytes

    def _targets_rules(self, data: bytes) -> Any:
        targets = signed_files.parse(Targets, data)
        held = signed_files.parse(Targets, self._files[self._names["targets"]]).signed
        held.version = targets.signed.version - 1
        trust_offline.check_targets(held, targets.signed, self._now)
        return [*map(str, trust_offline.publishers(targets.signed)), *trust_offline.director_keys(targets.signed)]

    def _publisher_rules(self, data: bytes) -> Any:
        proposed = parse_targets(data).signed
        (publisher,) = self.trust.publishers
        delegations = signed_files.parse(Targets, self._files[self._names["targets"]]).signed.delegations
        assert delegations is not None
        assert delegations.roles is not None
        trust_rules.check_next("acme", None, proposed, self._now)
        trust_rules.check_publisher_role(delegations.roles["acme"], publisher, proposed)
        return sorted(proposed.targets)

    def _bin_rules(self, data: bytes) -> Any:
        proposed = parse_targets(data).signed
        (publisher,) = self.trust.publishers
        parent = parse_targets(self._files[self._names["acme"]]).signed
        held = parse_targets(self._files[self._names[self._bin]]).signed
        trust_rules.check_next(self._bin, None, proposed, self._now)
        trust_rules.check_bin(self._bin, parent, publisher, held, proposed)
        return sorted(proposed.targets)
