"""Every bundle of `bundles/` is refused by every reader, with the code that the table says, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.conformance.make_bundles import BUNDLES, VERSION, make
from tests.trust_kit import (
    FACTS,
    Answer,
    LittleServer,
    RunningServer,
    Workstation,
    blob_answer,
    running_server,
    with_publisher,
)
from wherry_agent.children import CourierAnswer, Enrol, Enrolled, Failed, Fetch, Fetched, Resolve, Resolved
from wherry_agent.courier import run
from wherry_shared import wire
from wherry_shared.digest import of_bytes
from wherry_shared.errors import RefusedError
from wherry_shared.image_layout import Layout

KEPT = Path(__file__).parent / "bundles"
TABLE: dict[str, dict[str, Any]] = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))
NAMES = sorted(TABLE)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_script_makes_the_very_bundles_that_are_kept(tmp_path: Path) -> None:
    make(tmp_path / "again")
    again, kept = files(tmp_path / "again"), files(KEPT)
    assert sorted(again) == sorted(kept)
    assert [name for name in again if again[name] != kept[name]] == []
    assert sorted(BUNDLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_refuses(name: str) -> None:
    expected = TABLE[name]["reader"]
    if not expected:
        Layout(KEPT / name).verify_all(VERSION)
        return
    with pytest.raises(RefusedError) as caught:
        Layout(KEPT / name).verify_all(VERSION)
    assert caught.value.code == expected


# --- the server -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a publisher that signs anything."""
    with running_server(tmp_path_factory.mktemp("conformance") / "server") as found:
        workstation = with_publisher(found.trust, Workstation(), NAMES)
        for name, row in TABLE.items():
            if row["signed"]:
                length = len(blobs_of(name)[row["manifest"]])
                workstation.publish(found.trust, f"{name}/{VERSION}", row["manifest"], length=length)
        yield found


def blobs_of(name: str) -> dict[str, bytes]:
    """What a push would upload: digest by name → bytes."""
    folder = KEPT / name / "blobs" / "sha256"
    return {f"sha256:{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


def push(server: RunningServer, name: str) -> httpx.Response:
    """Upload and release as a client would that checks nothing itself; return the first refusal, or the release."""
    headers = {"Authorization": f"Bearer {server.token}"}
    with httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=20) as http:
        for digest, data in blobs_of(name).items():
            answer = http.put(f"/api/v1/blobs/{digest}", content=data)
            if answer.is_error:
                return answer
        return http.post(
            "/api/v1/bundles", json={"model": name, "version": VERSION, "manifest": TABLE[name]["manifest"]}
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_server_refuses(server: RunningServer, name: str) -> None:
    expected = TABLE[name]
    answer = push(server, name)
    listed = httpx.get(
        f"{server.url}/api/v1/bundles?model={name}",
        headers={"Authorization": f"Bearer {server.token}"},
        trust_env=False,
    ).json()
    if not expected["server"]:
        assert answer.status_code == 201, answer.text
        assert len(listed) == 1
        return
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, expected["server"]), problem
    assert problem["detail"]
    assert listed == []
    for digest, data in blobs_of(name).items():
        if of_bytes(data) != digest:
            assert not server.services.blobs.path(digest).exists(), "altered bytes are not kept under the name"


# --- the agent --------------------------------------------------------------------------------------


def mirror(name: str) -> LittleServer:
    """Serve the bundle's blobs as they lie there, to whoever asks."""
    blobs = blobs_of(name)

    def answer(path: str, headers: dict[str, str]) -> Answer:
        digest = path.rpartition("/")[2]
        return blob_answer(blobs[digest], f'"{digest}"', headers) if digest in blobs else Answer(404)

    return LittleServer(answer)


@pytest.mark.parametrize("name", NAMES)
def test_the_agent_refuses(server: RunningServer, tmp_path: Path, name: str) -> None:
    """Even if a server had taken it, or a mirror serves it: the courier looks at everything itself."""
    expected = TABLE[name]
    home = tmp_path / "device"
    enrolled = run(Enrol(home=str(home), server=server.url, token=server.enrolment_token, name=f"wary-{name}"), _ignore)
    assert isinstance(enrolled, Enrolled)
    bundle = mirror(name)
    try:
        task = Resolve(
            home=str(home),
            server=server.url,
            mirrors=[bundle.url],
            time_floor_us=0,
            floors={},
            current=0,
            model=name,
            offered=wire.OfferedModel(target=f"{name}/{VERSION}", manifest=expected["manifest"]),
            facts=msgspec.to_builtins(FACTS),
            contract=None,
        )
        resolved = run(task, _ignore)
        if expected["agent"] and expected["agent_step"] == "resolve":
            assert refusal(resolved) == expected["agent"]
            return
        assert isinstance(resolved, Resolved), resolved
        fetch = Fetch(
            home=str(home),
            server=server.url,
            mirrors=[bundle.url],
            manifest=expected["manifest"],
            variant="float",
            tries_max=1,
        )
        fetched = run(fetch, _ignore)
        if expected["agent"]:
            assert refusal(fetched) == expected["agent"]
            weights = resolved.candidates[0].loadable.digest
            assert not (home / "store/blobs/sha256" / weights.removeprefix("sha256:")).exists()
        else:
            assert isinstance(fetched, Fetched), fetched
    finally:
        bundle.close()


def refusal(answer: CourierAnswer) -> str:
    assert isinstance(answer, Failed), answer
    assert answer.detail
    return answer.reason


def _ignore(_answer: CourierAnswer) -> None:
    """Progress is nobody's business here."""
