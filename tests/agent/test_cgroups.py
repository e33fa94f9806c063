"""Control groups, on folders that stand for the kernel's: when they are used, and what is written where."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest

from tests.agent.builders import loadable
from tests.agent.serving_kit import until
from wherry_agent import cgroups, children, processes
from wherry_shared import reasons

MIB = 1024 * 1024


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """The group of a service as systemd makes it."""
    folder = tmp_path / "system.slice" / "wherry-agent.service"
    folder.mkdir(parents=True)
    (folder / "cgroup.controllers").write_text("cpu memory pids\n")
    (folder / "cgroup.procs").write_text("")
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/system.slice/wherry-agent.service\n")
    return folder


def find(root: Path, *, marked: bool = True) -> Path | None:
    return cgroups.delegated(root, root / "own", lambda _: marked)


def test_a_delegated_group_is_made_ready(tmp_path: Path, service: Path) -> None:
    assert find(tmp_path) == service
    assert (service / "supervisor" / "cgroup.procs").read_text() == str(os.getpid())
    assert (service / "cgroup.subtree_control").read_text() == "+memory"
    (tmp_path / "own").write_text("0::/system.slice/wherry-agent.service/supervisor\n")
    assert find(tmp_path) == service, "also when this process has moved already"


def test_a_group_that_is_not_ours_is_left_alone(tmp_path: Path, service: Path) -> None:
    assert find(tmp_path, marked=False) is None
    (service / "cgroup.controllers").write_text("cpu pids\n")
    assert find(tmp_path) is None
    (tmp_path / "own").write_text("4:memory:/only/the/old/kind\n")
    assert find(tmp_path) is None
    assert sorted(path.name for path in service.iterdir()) == ["cgroup.controllers", "cgroup.procs"]
    assert cgroups.delegated(tmp_path, tmp_path / "none") is None


def test_a_cage_limits_memory_and_knows_who_died_of_it(service: Path) -> None:
    (service / "canary-7").mkdir()
    (service / "canary-7" / "memory.swap.max").write_text("max")
    cage = cgroups.Cage.make(service, "canary-7", 100 * MIB)
    assert cage is not None
    cage.add(7)
    group = service / "canary-7"
    assert (group / "memory.max").read_text() == str(100 * MIB + cgroups.SLACK_BYTES)
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "cgroup.procs").read_text() == "7"
    assert not cage.out_of_memory()
    (group / "memory.events").write_text("low 0\nmax 3\noom 1\noom_kill 0\n")
    assert not cage.out_of_memory()
    (group / "memory.events").write_text("low 0\nmax 3\noom 1\noom_kill 1\n")
    assert cage.out_of_memory()
    for path in group.iterdir():
        path.unlink()
    cage.remove()
    assert not group.exists()


def test_there_is_no_cage_without_a_group_or_a_limit(service: Path) -> None:
    assert cgroups.Cage.make(None, "canary-1", MIB) is None
    assert cgroups.Cage.make(service, "canary-1", 0) is None
    assert cgroups.Cage.make(service / "gone" / "deeper", "canary-1", MIB) is None


@pytest.mark.parametrize(("killed", "reason"), [(1, reasons.OVER_MEMORY), (0, reasons.CRASH)])
def test_a_canary_that_the_kernel_ended_for_its_memory_is_over_memory(
    service: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, killed: int, reason: str
) -> None:
    program = tmp_path / "program.py"
    text = f"""
        import os, sys
        sys.stdin.read()
        group = {str(service)!r} + "/canary-%d" % os.getpid()
        assert open(group + "/cgroup.procs").read() == str(os.getpid())
        open(group + "/memory.events", "w").write("oom_kill {killed}\\n")
        os.kill(os.getpid(), 9)
        """
    program.write_text(textwrap.dedent(text))
    monkeypatch.setattr(processes, "command", lambda *_: [sys.executable, str(program)])
    found: list[children.Judged] = []
    task = children.Judge(candidate=loadable(), memory_bytes_max=100 * MIB)
    processes.canary(task, found.append, service)
    verdict = until(lambda: found and found[0], "the canary was judged")
    assert verdict.reason == reason
