"""TUF files and bins over HTTP, and the publisher's commands on top of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.server.harness import Running, write_bundle
from tests.server.test_cli import said, wherry
from wherry_shared.publishing import PublisherKey, push, sign


def test_the_timestamp_is_asked_for_again_at_no_cost(server: Running) -> None:
    with server.http() as http:
        first = http.get("/tuf/default/timestamp.json")
        assert first.status_code == 200
        assert first.headers["etag"] == f'"{hashlib.sha256(first.content).hexdigest()}"'
        assert first.headers["cache-control"] == "no-cache"
        again = http.get("/tuf/default/timestamp.json", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert "immutable" in http.get("/tuf/default/1.root.json").headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "/tuf/default/root.json",
        "/tuf/default/9.root.json",
        "/tuf/other/timestamp.json",
        "/tuf/default/..%2Fkeys%2Froot.pem",
        "/tuf/default/1.root.json%00",
        "/tuf/default/.timestamp.json",
    ],
)
def test_other_names_are_not_found(server: Running, path: str) -> None:
    with server.http() as http:
        answer = http.get(path)
    assert answer.status_code == 404
    assert b"PRIVATE" not in answer.content


def test_a_bin_without_a_precondition_is_refused(server: Running) -> None:
    with server.http(server.admin) as http:
        for etag in ({}, {"If-Match": "*"}, {"If-Match": "1"}, {"If-Match": 'W/"1"'}):
            answer = http.put("/api/v1/trust/bins/x", content=b"{}", headers=etag)
            assert (answer.status_code, answer.json()["code"]) == (428, "precondition_missing")
        answer = http.put("/api/v1/trust/bins/x", content=b"{}", headers={"If-Match": '"0"'})
        assert (answer.status_code, answer.json()["code"]) == (404, "role_unknown")
        answer = http.get("/api/v1/trust/bins", params={"target": "nobody/1.0.0"})
        assert (answer.status_code, answer.json()["code"]) == (404, "publisher_unknown")


def test_a_stale_bin_gets_412(server: Running, tmp_path: Path) -> None:
    key = PublisherKey.open(tmp_path / "key.pem")
    write_bundle(tmp_path / "one", "stale", "1.0.0")
    with server.remote() as remote:
        signed = sign(tmp_path / "one", remote, key)
        push(tmp_path / "one", remote, key)
    with server.http(server.admin) as http:
        answer = http.put(
            f"/api/v1/trust/bins/{signed.role}", content=signed.kept.read_bytes(), headers={"If-Match": '"0"'}
        )
        assert (answer.status_code, answer.json()["code"]) == (412, "bin_changed")
        current = http.get(f"/api/v1/trust/bins/{signed.role}")
        assert (current.headers["etag"], current.headers["wherry-role"]) == (f'"{signed.version}"', signed.role)
        assert current.content == signed.kept.read_bytes()
        entries = http.get("/api/v1/audit").json()
        text = str(entries)
    for action in ("publisher.add", "bin.put"):
        assert action in text
    assert signed.role in text


def test_publishers_set_policies_and_renew_by_command(server: Running, tmp_path: Path) -> None:
    place = tmp_path / "key.pem"
    write_bundle(tmp_path / "one", "commanded", "1.0.0")
    missing = wherry(server, "trust", "renew", "--key", str(place))
    assert missing.returncode == 1
    assert "[key_absent]" in missing.stderr
    with server.remote() as remote:
        signed = sign(tmp_path / "one", remote, PublisherKey.open(place))
        push(tmp_path / "one", remote, PublisherKey.open(place))
    told = said(
        server,
        "trust",
        "policy",
        "commanded",
        "--floor",
        "0.9.0",
        "--revoke",
        signed.manifest,
        "--key",
        str(place),
    )
    assert told == {
        "model": "commanded",
        "floor": "0.9.0",
        "revoked": {signed.manifest: "replace"},
        "version": 2,
        "outcome": "accepted",
    }
    roles = dict.fromkeys((signed.publisher, signed.role), "accepted")
    assert said(server, "trust", "renew", "--key", str(place)) == {"roles": roles}
    assert said(server, "trust", "repair", "--key", str(place)) == {"roles": {}}


def test_who_takes_gzip_gets_metadata_compressed(server: Running) -> None:
    with server.http() as http:
        plain = http.get("/tuf/default/1.root.json", headers={"Accept-Encoding": "identity"})
        packed = http.get("/tuf/default/1.root.json", headers={"Accept-Encoding": "gzip"})
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) * 0.6
        assert packed.content == plain.content
        assert plain.headers["vary"] == packed.headers["vary"] == "Accept-Encoding"
        again = http.get("/tuf/default/1.root.json", headers={"If-None-Match": packed.headers["etag"]})
        assert again.status_code == 304
        stamp = http.get("/tuf/default/timestamp.json", headers={"Accept-Encoding": "gzip"})
        assert "content-encoding" not in stamp.headers, "it is small, and asked for again by its tag"
