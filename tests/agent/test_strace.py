"""No durable step exists outside the seam, and each of its steps is done: what the system saw of a whole agent is what it recorded.

A real `wherry-agent run` enrols, installs a version whose download is killed and goes on, and goes back from a second one in
its trial, under strace; every call
that changes names or syncs below its home, of any of its processes, has to be a step that `disk` recorded, but for a short
list. Elsewhere nothing is changed but what is temporary.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.daemon_kit import Agent, Site, children_of, site
from tests.agent.serving_kit import until
from tests.line import Line
from tests.services import needs
from tests.shared.engines import models
from tests.site_kit import constant_model
from wherry_agent.disk import STEPS
from wherry_agent.store import SYNC_BYTES

pytestmark = pytest.mark.services

CALLS = (
    "open,openat,creat,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat,"
    "truncate,ftruncate,fsync,fdatasync,sync_file_range,mknod,mknodat"
)
OUTSIDE = {
    r"telemetry\.db(-wal|-shm|-journal)?": "SQLite; may lose whole windows",
    r"run(/.*)?": "sockets and the lock of a running agent",
    r"trust/\.lock": "a lock without content",
    r"trust/\.scratch(/.*)?": "what python-tuf works on; synced and renamed through the seam",
}
"""Paths below the home whose changes need not go through the seam, and why a power cut may take them."""
ELSEWHERE = {
    r"/dev/.*": "devices, and pages in memory, too",
    r"/memfd:.*": "pages in memory",
    r"/proc/.*": "the kernel's words",
    r"/sys/fs/cgroup/.*": "limits of a canary",
    r".*/__pycache__/.*": "compiled Python",
}
"""What may be changed outside of the home of the agent, above all nothing below that of its user."""
LINE = re.compile(r"(?P<call>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+)")
NAME = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
"""A name, and the folder to which it is relative, which strace adds."""
WEIGHTS_BYTES = 3 * SYNC_BYTES
STALLED_BYTES = SYNC_BYTES + SYNC_BYTES // 2
"""One sync is behind it by then, and the next one far."""
FD = re.compile(r"^\d+<([^>]*)>")


class Traced(Agent):
    """An agent under strace, whose steps are recorded, behind a line that can stall."""

    def __init__(self, site: Site, name: str) -> None:
        self.line = Line(site.port)
        super().__init__(site, name)

    def start(self) -> subprocess.Popen[bytes]:
        self.record = self.site.folder / f"{self.name}.steps"
        trace = ["strace", "-ff", "-y", "--seccomp-bpf", "-f", "-e", f"trace={CALLS}", "-e", "signal=none"]
        argv = [*trace, "-o", str(self.site.folder / f"{self.name}.trace"), "-E", f"{STEPS}=record:{self.record}"]
        self.scratch = self.site.folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        argv += ["-E", f"HOME={self.site.folder / 'user'}", "-E", f"TMPDIR={self.scratch}"]
        argv += [sys.executable, "-m", "wherry_agent.cli", "run", "--home", str(self.home), "--name", self.name]
        argv += ["--http-port", str(self.port), "--server", self.line.address, "--token", self.site.enrolment]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(argv, stderr=log, stdout=log)
        return self.child

    def stop(self) -> int:
        """End the agent itself: strace keeps signals to itself, and ends with what it traces."""
        shown = self.status()
        if shown["running"]:
            os.kill(shown["pid"], signal.SIGTERM)
        else:
            self.child.kill()
        return self.child.wait(60)

    def partial(self) -> int:
        """Return the size of the download under way, once it was synced a first time."""
        records = list((self.home / "store" / "blobs" / "sha256").glob("*.part.json"))
        with contextlib.suppress(OSError):
            return records[0].with_suffix("").stat().st_size if records else 0
        return 0

    def couriers(self) -> list[int]:
        """Return the processes that download."""
        agent = self.status()["pid"]
        return [
            pid for pid in children_of(agent) if b"wherry_agent.courier" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def seen(self) -> Iterator[tuple[str, Path]]:
        """Yield (step, path) of every successful call of every process that changed something below the home."""
        for trace in self.site.folder.glob(f"{self.name}.trace.*"):
            for line in trace.read_text(errors="replace").splitlines():
                match = LINE.search(line)
                if match is not None and int(match["result"]) >= 0:
                    yield from _steps(match["call"], match["arguments"])


def _steps(call: str, arguments: str) -> Iterator[tuple[str, Path]]:
    names = [Path(folder or "/") / name for folder, name in NAME.findall(arguments)]
    if call in ("open", "openat", "creat"):
        if call == "creat" or re.search(r"O_CREAT|O_WRONLY|O_RDWR|O_TRUNC", arguments):
            yield "open", names[0]
    elif call.startswith("rename"):
        yield "rename", names[-1]
    elif call.startswith(("link", "symlink")):
        yield call.removesuffix("at"), names[-1]
    elif call == "rmdir" or (call == "unlinkat" and "AT_REMOVEDIR" in arguments):
        yield "rmdir", names[0]
    elif call.startswith("unlink"):
        yield "unlink", names[0]
    elif call.startswith(("mkdir", "mknod")):
        yield call.removesuffix("at"), names[0]
    elif call == "truncate":
        yield "truncate", names[0]
    else:  # of a descriptor, whose path strace adds
        found = FD.match(arguments)
        assert found is not None, arguments
        yield {"ftruncate": "truncate", "fsync": "fsync"}.get(call, call), Path(found[1])


@pytest.mark.slow
def test_every_durable_step_of_a_whole_agent_goes_through_the_seam(tmp_path: Path, record_property) -> None:
    needs("strace")
    with site(tmp_path) as wherry:
        wherry.release("1.0.0", constant_model(tmp_path / "old.onnx", 14.0, ballast_bytes=WEIGHTS_BYTES))
        wherry.release("2.0.0", models.choosy(tmp_path / "choosy.onnx", 2.0))
        agent = Traced(wherry, "lamp")
        try:
            agent.until("it is enrolled", lambda shown: shown["engines"], deadline_s=120)
            agent.line.stall_after(STALLED_BYTES)
            wherry.deploy("1.0.0", "lamp", trial_s=1)
            until(lambda: agent.partial() > STALLED_BYTES - SYNC_BYTES // 4, "the download stalls", 60)
            (courier,) = agent.couriers()
            os.kill(courier, signal.SIGKILL)
            until(
                lambda: not Path(f"/proc/{courier}").exists(),
                "strace lets the courier die, and its buffers with it",
                60,
            )
            agent.line.answered_bytes = 0
            agent.line.flow()
            agent.until_serves("1.0.0", deadline_s=120)
            assert agent.line.answered_bytes < WEIGHTS_BYTES, "it went on where the dead courier had synced"
            wherry.deploy("2.0.0", "lamp")
            agent.until_doing("on trial", deadline_s=120)
            until(lambda: agent.infer(7.0)[0] != 200 or agent.model()["doing"] != "on trial", "its trial ends", 60)
            agent.until_serves("1.0.0", deadline_s=120)
            agent.until("2.0.0 is known bad", lambda shown: shown["known_bad"], deadline_s=60)
            assert "health_errors" in agent.log.read_text()
            assert agent.ask(3, 7.0) == ["1.0.0"] * 3
        finally:
            agent.stop()
    home = agent.home
    steps = Counter(
        (step, Path(path))
        for role, step, path in (line.split(" ", 2) for line in agent.record.read_text().splitlines())
        if role in ("supervisor", "courier")
    )
    recorded = Counter[tuple[str, Path]]()
    for (step, path), count in steps.items():
        recorded[{"fsync_folder": "fsync", "create": "open"}.get(step, step), path] += count
    opened = {path for step, path in steps if step in ("create", "truncate")}
    checked = Counter[str]()
    strays: list[str] = []
    seen = Counter(agent.seen())
    strays += [
        f"{step} {path}: recorded {count}, seen {seen[step, path]}"
        for (step, path), count in recorded.items()
        if step not in ("open", "write") and seen[step, path] < count
    ]
    for (step, path), count in seen.items():
        if not path.is_relative_to(home):
            passing = path == agent.record or path.is_relative_to(agent.scratch)
            passing |= (step, path) == ("fsync", home.parent)  # the home itself was made
            if not passing and not any(re.fullmatch(pattern, str(path)) for pattern in ELSEWHERE):
                strays.append(f"{step} {path} ×{count}")
            continue
        below = str(path.relative_to(home))
        if any(re.fullmatch(pattern, below) for pattern in OUTSIDE) and not (step == "fsync" and ".scratch" in below):
            continue
        if (step, below) == ("fdatasync", "."):
            continue  # SQLite, after it made its files
        if step == "open":
            if path not in opened:
                strays.append(f"{step} {below} ×{count}")
        elif recorded[step, path] != count:
            strays.append(f"{step} {below}: seen {count}, recorded {recorded[step, path]}")
        checked[step] += count
    assert not strays, "\n".join(sorted(strays))
    assert checked.keys() >= {"open", "rename", "link", "unlink", "mkdir", "rmdir", "fsync", "truncate"}, checked
    roles = {line.split(" ", 1)[0] for line in agent.record.read_text().splitlines()}
    assert roles == {"supervisor", "courier"}
    record_property("note", f"strace: {sum(checked.values())} calls below the home, every one a recorded step")
