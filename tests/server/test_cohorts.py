"""What selectors see of a device."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from wherry_server.views import Seen

FACTS: dict[str, Any] = {
    "arch": "x86_64",
    "os": "",
    "agent": "0.10.2",
    "cores": 4,
    "memory_bytes": 4_000_000_000,
    "disk_free_bytes": "unknown",
    "engines": [
        {"name": "onnxruntime", "version": "1.32.0"},
        "nonsense",
        {"name": "ai-edge-litert", "version": "2.3.0"},
    ],
    "labels": {"site": "berlin", "rack": 7},
}
ROW = {
    "id": "Zk3x_0-9aQ2mP7rT1vW8bA",
    "name": "line-7",
    "state": "active",
    "labels": {"site": "new york", "floor": 3},
    "facts": FACTS,
    "simulated": False,
    "last_seen_at": 30_000_000,
    "enrolled_at": 10_000_000,
}
SEEN = {
    "id": "Zk3x_0-9aQ2mP7rT1vW8bA",
    "name": "line-7",
    "state": "active",
    "arch": "x86_64",
    "agent": "0.10.2",
    "cores": 4,
    "memory_bytes": 4_000_000_000,
    "simulated": "false",
    "enrolled": 110,
    "last_seen": 90,
    "cpu_feature": [],
    "engine": ["onnxruntime", "ai-edge-litert"],
    "engine.onnxruntime": "1.32.0",
    "engine.ai-edge-litert": "2.3.0",
    "label.site": "new york",
    "label.floor": "3",
    "label.rack": "7",
    "runs.file-type": "1.1.0",
}


def seen(**changes: Any) -> Seen:
    return Seen(SimpleNamespace(**{**ROW, **changes}), {"file-type": "1.1.0"}, 120_000_000)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_device_is_seen_with_what_it_has_and_nothing_else(as_text: bool) -> None:
    """JSON comes as text where a query asked for it, else decoded."""
    changes = {name: json.dumps(ROW[name]) for name in ("facts", "labels")} if as_text else {}
    found = seen(**changes)
    assert dict(found) == SEEN
    assert len(found) == len(SEEN)
    for field, value in SEEN.items():
        assert found[field] == value


@pytest.mark.parametrize(
    "field", ["os", "disk_free_bytes", "accelerator", "label.none", "engine.none", "runs.none", "other.x", "label", "x"]
)
def test_what_a_device_does_not_have_is_not_there(field: str) -> None:
    assert field not in seen()
    with pytest.raises(KeyError):
        seen()[field]


def test_a_device_never_seen_and_one_with_nonsense_for_facts_have_what_is_left() -> None:
    assert "last_seen" not in seen(last_seen_at=0)
    assert {"id", "name", "label.site", "runs.file-type"} <= set(seen(facts="[]"))
    assert "arch" not in seen(facts="[]")
