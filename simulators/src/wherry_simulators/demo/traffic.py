"""A client that never stops asking: real files, the bad class among them, to real agents.

Every answer is counted by what it says of itself. A request fails when the connection breaks, the status is not 200
or the answer does not carry the outputs; nothing is retried, so the count is what an application would have seen.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 15.0


@dataclass
class Tally:
    """What a client saw of one device."""

    answered: int = 0
    failed: int = 0
    fallbacks: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


class Traffic:
    """Asks one agent for inference at a steady pace until stopped."""

    def __init__(self, name: str, port: int, model: str, bodies: Sequence[bytes], per_second: float) -> None:
        self.name = name
        self._port = port
        self._path = f"/v2/models/{model}/infer"
        self._bodies = list(bodies)
        self._pause_s = 1 / per_second
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._tally = Tally()
        self._thread = threading.Thread(target=self._run, name=f"traffic-{name}", daemon=True)

    def start(self) -> Traffic:
        """Begin."""
        self._thread.start()
        return self

    def stop(self) -> Tally:
        """Stop after the request under way and return the count."""
        self._stop.set()
        self._thread.join(timeout=TIMEOUT_S + 5)
        return self.tally()

    def tally(self) -> Tally:
        """Return a copy of the count so far."""
        with self._lock:
            tally = self._tally
            return Tally(tally.answered, tally.failed, tally.fallbacks, Counter(tally.versions), list(tally.errors))

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        turn = 0
        while not self._stop.wait(self._pause_s):
            body = self._bodies[turn % len(self._bodies)]
            turn += 1
            try:
                connection.request("POST", self._path, body=body, headers={"Content-Type": "application/json"})
                answer = connection.getresponse()
                data = answer.read()
                self._count(answer.status, data)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._fail(f"request {turn}: {error!r}")
                connection.close()
        connection.close()

    def _count(self, status: int, data: bytes) -> None:
        if status != 200:
            self._fail(f"{status}: {data[:200].decode(errors='replace')}")
            return
        message: dict[str, Any] = json.loads(data)
        if not message.get("outputs"):
            self._fail(f"no outputs: {data[:200].decode(errors='replace')}")
            return
        with self._lock:
            self._tally.answered += 1
            self._tally.versions[str(message.get("model_version"))] += 1
            self._tally.fallbacks += bool(message.get("parameters", {}).get("wherry_fallback"))

    def _fail(self, why: str) -> None:
        with self._lock:
            self._tally.failed += 1
            if len(self._tally.errors) < 20:
                self._tally.errors.append(why)
