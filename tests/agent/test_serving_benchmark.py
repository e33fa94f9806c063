"""What the benchmark of local serving makes of the figures of others, without measuring any."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serving


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    monkeypatch.setattr(serving, "OUT", tmp_path / "serving.json")
    return tmp_path


def script(folder: Path, text: str) -> None:
    (folder / "benchmarks" / "one.py").write_text(text)


def test_figures_of_a_benchmark_that_found_a_failure_are_kept_and_its_end_is_said(folder: Path):
    script(folder, "open('one.json', 'w').write('{\"points\": 3}'); raise SystemExit(1)")
    assert serving.other("one") == {"points": 3, "one_exit_code": 1}


def test_figures_of_an_earlier_run_are_none_of_this_one(folder: Path):
    (folder / "one.json").write_text("{}")
    script(folder, "raise SystemExit(2)")
    with pytest.raises(RuntimeError, match="ended with 2"):
        serving.other("one")


def test_the_supervisor_counts_into_the_memory_of_a_device():
    idle = {"wherry worker": 30.0, "mlserver": 100.0, "kserve": 80.0}
    assert serving.with_supervisor({"idle_pss_mb": idle, "supervisor_rss_mb": 10.0}) == {
        "idle_pss_with_supervisor_ratio": 0.5
    }
    assert serving.with_supervisor({"idle_pss_mb": idle}) == {}, "not measured, so not said"


def waiting(text: str) -> subprocess.Popen[bytes]:
    """Start a process that runs some lines, says so, and waits for its standard input to end."""
    text += "; print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def test_a_server_pays_for_libraries_that_the_benchmark_has_as_well():
    with waiting("import sys, numpy") as server, waiting("import sys, numpy"):
        rollup = Path(f"/proc/{server.pid}/smaps_rollup").read_text(encoding="ascii")
        found = {name: int(kb) / 1024 for name, kb in re.findall(r"^(Rss|Pss): *(\d+)", rollup, re.MULTILINE)}
        assert found["Pss"] < 0.9 * found["Rss"], "this process maps the same files"
        assert serving.set_mb(server.pid) == pytest.approx(found["Rss"], rel=0.03)


def test_a_library_of_several_processes_of_one_server_counts_once():
    one = "import sys, numpy"
    child = f"{one}; print(flush=True); sys.stdin.read()"
    pipes = "stdin=subprocess.PIPE, stdout=subprocess.PIPE"
    many = f"{one}, subprocess; child = subprocess.Popen([sys.executable, '-c', '{child}'], {pipes}); child.stdout.readline()"
    with waiting(one) as single, waiting(many) as pair:
        alone, both = serving.set_mb(single.pid), serving.set_mb(pair.pid)
        assert len(serving.tree(pair.pid)) == 2
        assert alone < both < 1.8 * alone


KEYS = {
    "supervisor_rss_mb",
    "handle_overhead_us",
    "rest_binary_overhead_us",
    "uds_overhead_us",
    "shm_600k_ratio_to_bare",
    "rps_ratio_to_best_peer",
    "idle_pss_ratio_to_best_peer",
    "swap_failed",
    "swap_count",
    "p99_swap_ratio",
    "rollback_warm_ms",
    "rollback_cold_ms",
    "crash_points",
    "crash_points_failed",
}


def test_every_figure_that_was_promised_is_written_by_the_benchmark_or_by_one_that_it_runs():
    scripts = Path(serving.__file__).parent
    written = "".join((scripts / f"{name}.py").read_text(encoding="utf-8") for name in ("serving", *serving.OTHERS))
    assert {key for key in KEYS if f'"{key}": ' not in written} == set()
    assert serving.with_supervisor({}) == {}
    idle = {"wherry worker": 50.0, "mlserver": 100.0, "kserve": 120.0, "bare process with gRPC": 40.0}
    found = serving.with_supervisor({"supervisor_rss_mb": 25.0, "idle_pss_mb": idle})
    assert found == {"idle_pss_with_supervisor_ratio": 0.75}, "of peers, not of what else was weighed"
