"""Handles in real application processes, a real worker, and the supervisor's side of both."""

from __future__ import annotations

import contextlib
import errno
import gc
import grp
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.agent.serving_kit import instead, loadable, until, worker
from tests.shared.engines import models
from tests.trust_kit import assets_of
from wherry_agent import handle_messages as messages
from wherry_agent import handle_server
from wherry_agent.answering import arms
from wherry_agent.answering.arms import Counter, load_variant
from wherry_agent.children import ArmStats, ServeModel
from wherry_agent.disk import Disk
from wherry_agent.handle import Model
from wherry_agent.handle_server import HandleCrash, HandleServer, HandleVerdict, allowed
from wherry_agent.store import Store
from wherry_agent.telemetry import Context, Windows
from wherry_shared.engines import BadInput, EngineFault
from wherry_shared.engines.canonical import BUCKET_BITS
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.limits import METRICS_PER_WINDOW_MAX
from wherry_shared.sketch import Sketch
from wherry_shared.wire import Sum

ONES = {"x": np.ones((1, 4), np.float32)}
NEGATIVE = {"x": np.full((1, 4), -1, np.float32)}


class Supervisor:
    """A handle server whose callbacks are kept."""

    def __init__(self, folder: Path, worker_socket: str = "") -> None:
        self.path = folder / "handle.sock"
        self.crashes: list[HandleCrash] = []
        self.verdicts: list[HandleVerdict] = []
        self.server = HandleServer(
            self.path,
            worker_socket=worker_socket,
            on_crash=self.crashes.append,
            on_verdict=self.verdicts.append,
        )

    def publish(self, active, **more) -> None:
        self.server.publish("scale", ServeModel(name="scale", active=active, **more))

    def publish_and_settle(self, active, **more) -> None:
        self.publish(active, **more)
        until(lambda: self.server.settled("scale"), "all handles act on the assignment")

    def model(self, **more) -> Model:
        return Model("scale", socket=self.path, timeout_s=20, **more)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path)
    yield made
    made.server.close()


def test_a_handle_runs_the_published_version_with_its_labels_and_assets(tmp_path: Path, supervisor: Supervisor):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "labels.txt").write_text("cat dog")
    interface = models.interface()
    labelled = msgspec.structs.replace(
        interface, outputs=[msgspec.structs.replace(interface.outputs[0], labels=["a", "b", "c", "d"])]
    )
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0), interface=labelled, assets_path=str(assets))
    supervisor.publish(good)
    with supervisor.model() as model:
        answer = model.run(ONES)
        assert answer["y"].tolist() == [[2.0] * 4]
        assert (answer.by.version, answer.by.variant, answer.fallback) == ("1.0.0", "float", False)
        assert answer.by.labels == {"y": ["a", "b", "c", "d"]}
        assert answer.by.asset("labels.txt").read_text() == "cat dog"
        for path in ("nope", "../handle.sock", "/etc/passwd"):
            with pytest.raises(RefusedError, match="asset_missing"):
                answer.by.asset(path)
        with pytest.raises(BadInput):
            model.run({"x": np.ones((1, 4), np.float64)})


def test_swaps_under_concurrent_calls_fail_none_of_them(tmp_path: Path, supervisor: Supervisor):
    versions = [loadable(models.scale(tmp_path / f"{n}.onnx", n), f"1.{n}.0") for n in range(1, 7)]
    supervisor.publish(versions[0])
    wrong: list[object] = []
    calls = [0]
    stop = threading.Event()
    with supervisor.model() as model:

        def keep_calling() -> None:
            while not stop.is_set():
                try:
                    answer = model.run(ONES)
                    if answer["y"][0, 0] != float(answer.by.version.split(".")[1]):
                        wrong.append(answer.by)
                    calls[0] += 1
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=keep_calling) for _ in range(2)]
        for thread in threads:
            thread.start()
        for version in versions[1:]:
            supervisor.publish_and_settle(version)
            assert model.run(ONES).by.version == version.target.split("/")[1]
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert supervisor.server.leases() == {versions[-1].digest}
    until(lambda: supervisor.server.leases() == set(), "the lease ends with the handle")


def test_a_version_is_freed_as_soon_as_the_last_call_by_it_returns(tmp_path: Path, supervisor: Supervisor):
    slow = loadable(models.slow(tmp_path / "slow.onnx", turns=20_000), "1.0.0")
    supervisor.publish(slow)
    answers: list[str] = []
    with supervisor.model() as model:
        loaded = model._loaded()[0]
        session = weakref.ref(loaded.bound.session)
        del loaded
        caller = threading.Thread(target=lambda: answers.append(model.run(ONES).by.version))
        before = time.process_time()
        caller.start()
        until(lambda: time.process_time() - before > 0.05, "the call is inside the engine")
        gc.disable()  # a cycle would keep a whole model until somebody looks for cycles
        try:
            supervisor.publish_and_settle(loadable(models.scale(tmp_path / "2.onnx", 2.0), "2.0.0"))
            assert model.run(ONES).by.version == "2.0.0"
            assert answers or session() is not None
            caller.join(60)
            assert answers == ["1.0.0"]
            until(lambda: session() is None, "the old session is gone")
        finally:
            gc.enable()


def test_every_call_is_counted_once_even_across_a_swap(tmp_path: Path, supervisor: Supervisor):
    one = loadable(models.scale(tmp_path / "1.onnx", 1), "1.1.0")
    two = loadable(models.scale(tmp_path / "2.onnx", 2), "1.2.0")
    supervisor.publish(one)
    counts: dict[str, int] = {}

    def total() -> int:
        for stats in supervisor.server.drain_stats():
            counts[stats.digest] = stats.requests
        return sum(counts.values())

    with supervisor.model() as model:
        for _ in range(37):
            model.run(ONES)
        supervisor.publish_and_settle(two)
        for _ in range(5):
            model.run(ONES)
        until(lambda: total() == 42, "all calls are counted")
        assert counts == {one.digest: 37, two.digest: 5}
        for _ in range(3):
            model.run(ONES)
    until(lambda: total() == 45, "what was counted last is said at goodbye")


def test_a_handle_that_lives_long_keeps_no_counts_of_versions_that_are_gone(tmp_path: Path, supervisor: Supervisor):
    versions = [loadable(models.scale(tmp_path / f"{n}.onnx", n), f"1.{n}.0") for n in (1, 2, 3)]
    supervisor.publish(versions[0])
    seen: dict[str, int] = {}

    def drained() -> dict[str, int]:
        seen.update({stats.digest: stats.requests for stats in supervisor.server.drain_stats()})
        return seen

    with supervisor.model(), supervisor.model() as model:
        for version in versions:
            supervisor.publish_and_settle(version)
            for _ in range(3):
                model.run(ONES)
        until(lambda: drained() == dict.fromkeys((one.digest for one in versions), 3), "all are counted")
        assert supervisor.server.drain_stats() == []
        kept = {key[0] for peer in supervisor.server._peers for key in peer.counts}
        assert kept == {versions[-1].digest}
        model.run(ONES)
        until(lambda: drained()[versions[-1].digest] == 4, "the version in use is counted on")


def test_a_version_that_comes_back_is_counted_from_nothing(tmp_path: Path, supervisor: Supervisor):
    one, two = (loadable(models.scale(tmp_path / f"{n}.onnx", n), f"1.{n}.0") for n in (1, 2))
    supervisor.publish(one)
    windows, seen = Windows(), [0]

    def told(digest: str) -> int:
        windows.look("handle", supervisor.server.drain_stats(), 1)
        seen[0] += sum(window.requests for window in windows.cut(2, lambda _: Context("", 0)))
        windows.keep_only({digest})
        return seen[0]

    with supervisor.model() as other, supervisor.model() as model:
        for version, calls in ((one, 30), (two, 7), (one, 20), (two, 9)):
            supervisor.publish_and_settle(version)
            before = told(version.digest)
            for _ in range(calls):
                model.run(ONES)
            other.run(ONES)
            until(lambda: told(version.digest) == before + calls + 1, "each is told once", 10)  # noqa: B023 - at once
            until(lambda: supervisor.server.drain_stats() == [], "there is no more to tell")
    assert told(two.digest) == 70


def test_what_one_process_counts_is_bounded(supervisor: Supervisor):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(supervisor.path))
        peer.sendall(messages.encode(messages.Hi(format=messages.FORMAT, model="scale", pid=1)))
        digests = [f"sha256:{number:064x}" for number in range(2 * handle_server.COUNTS_MAX)]
        peer.sendall(messages.encode(messages.Engaged(revision=0, holds=digests)))
        for digest in digests:
            arm = ArmStats(model="scale", manifest="", variant="", digest=digest, arm="incumbent", requests=1)
            peer.sendall(messages.encode(messages.Counts(arms=[arm])))

        def heard() -> bool:
            return digests[-1] in {stats.digest for stats in supervisor.server.drain_stats()}

        until(heard, "the last counts arrive")
        (kept,) = supervisor.server._peers
        assert [key[0] for key in kept.counts] == digests[-handle_server.COUNTS_MAX :]


def test_runs_are_folded_as_if_each_was_counted_alone(tmp_path: Path):
    counter = Counter(loadable(models.scale(tmp_path / "a.onnx", 2.0)), "incumbent")
    counter.leave_out(3)
    runs = [(bucket, 37 * number * number + bucket) for number in range(200) for bucket in (2, 9)]
    counter.pending.extend(engine_ns << BUCKET_BITS | bucket for bucket, engine_ns in runs)
    counter.fold()
    expected = {"2": Sketch(), "9": Sketch()}
    for bucket, engine_ns in runs[3:]:
        expected[str(bucket)].add(engine_ns / 1000)
    stats = counter.stats()
    assert stats.requests == 400
    assert stats.latency_us == {bucket: sketch.to_wire() for bucket, sketch in expected.items()}
    counter.fold()
    assert counter.stats() == stats


def test_answers_of_a_worker_are_counted_when_somebody_looks_as_if_each_was_counted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = load_variant(loadable(models.scale(tmp_path / "a.onnx", 2.0)))
    counter = Counter(loaded.loadable, "incumbent")
    loaded.runs_to_leave_out = 2
    expected, waits = Sketch(), Sketch()
    for number in range(300):
        wait_ns = 5000 if number % 7 == 0 else 0
        counter.answered(loaded, 3, 1000 + 37 * number, wait_ns, {})
        waits.add(wait_ns / 1000)
        if number >= 2:
            expected.add((1000 + 37 * number) / 1000)
    assert not counter.told_everything()
    told = counter.news()
    assert told is not None
    assert (told.requests, told.latency_us, told.wait_us) == (300, {"3": expected.to_wire()}, waits.to_wire())
    assert counter.told_everything()
    assert counter.news() is None
    monkeypatch.setattr(arms, "PENDING_MAX", 10)
    for _ in range(25):
        counter.answered(loaded, 3, 1000, 0, {})
    assert len(counter._answered) < 10, "what waits is bounded, also if nobody looks"
    assert counter.stats().requests == 325


def test_the_top_class_of_some_answers_is_counted_outside_the_call(tmp_path: Path, supervisor: Supervisor):
    interface = models.interface()
    labelled = [msgspec.structs.replace(interface.outputs[0], labels=["a", "b", "c", "d"])]
    good = loadable(
        models.scale(tmp_path / "a.onnx", 2.0), interface=msgspec.structs.replace(interface, outputs=labelled)
    )
    supervisor.publish(good)
    with supervisor.model() as model:
        for _ in range(5):
            model.run({"x": np.array([[0, 0, 0.25, 0]], np.float32)})

        def told() -> bool:
            return any(set(one.classes) == {"c"} and one.confidence for one in supervisor.server.drain_stats())

        until(told, "a sample of the classes arrives")


def test_a_candidate_is_kept_out_of_the_process_until_it_is_confirmed(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    candidate = loadable(models.root(tmp_path / "new.onnx"), "1.1.0")
    with worker(tmp_path) as process:
        supervisor = Supervisor(tmp_path, str(process.unix_path))
        supervisor.publish(good)
        with supervisor.model() as model:
            process.serve(ServeModel(name="scale", active=candidate, incumbent=good, trial="t"))
            supervisor.publish_and_settle(candidate, incumbent=good, trial="t")
            answer = model.run({"x": np.full((1, 4), 9, np.float32)}, ["y"])
            assert (answer["y"].tolist(), answer.by.version, answer.fallback) == ([[3.0] * 4], "1.1.0", False)
            assert answer["y"].dtype == np.float32
            answer = model.run(NEGATIVE)
            assert (answer["y"].tolist(), answer.by.version, answer.fallback) == ([[-2.0] * 4], "1.0.0", True)
            arm = process.arm("candidate", lambda one: one.errors == 1)
            assert (arm.requests, arm.fallbacks) == (2, 1)
            assert supervisor.server.leases() == {good.digest, candidate.digest}
            with pytest.raises(BadInput) as refused:
                model.run({"x": np.ones((1, 5), np.float32)})
            assert refused.value.message.endswith("expected ['n', 4]"), "said once, as in this process"
            assert refused.value.next_step == "compare the request with the model's metadata"
            process.serve(ServeModel(name="scale", active=candidate))
            supervisor.publish_and_settle(candidate)
            assert model.run({"x": np.full((1, 4), 4, np.float32)}).by.version == "1.1.0"
            assert supervisor.server.leases() == {candidate.digest}
            with pytest.raises(EngineFault, match="not_finite"):
                model.run(NEGATIVE)
        supervisor.server.close()


def test_an_incumbent_that_fails_too_is_counted_like_any_other_failure(tmp_path: Path):
    good = loadable(models.root(tmp_path / "good.onnx"))
    candidate = loadable(models.root(tmp_path / "new.onnx"), "1.1.0")
    with worker(tmp_path) as process:
        supervisor = Supervisor(tmp_path, str(process.unix_path))
        supervisor.publish(good)
        with supervisor.model() as model:
            process.serve(ServeModel(name="scale", active=candidate, incumbent=good, trial="t"))
            supervisor.publish_and_settle(candidate, incumbent=good, trial="t")
            with pytest.raises(EngineFault, match="not_finite"):
                model.run(NEGATIVE)

            def counted() -> bool:
                return any((one.arm, one.errors) == ("incumbent", 1) for one in supervisor.server.drain_stats())

            until(counted, "the incumbent's failure is told")
        supervisor.server.close()


def test_a_worker_that_dies_with_a_request_takes_no_caller_with_it(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    endless = loadable(models.slow(tmp_path / "slow.onnx", 3.0, turns=1_000_000), "1.1.0")
    with worker(tmp_path) as process:
        supervisor = Supervisor(tmp_path, str(process.unix_path))
        supervisor.publish(good)
        with supervisor.model() as model:
            wanted = ServeModel(name="scale", active=endless, incumbent=good, trial="t", deadline_ms=60_000)
            process.serve(wanted)
            supervisor.server.publish("scale", wanted)
            until(lambda: supervisor.server.settled("scale"), "the trial begins")
            answers: list[object] = []
            caller = threading.Thread(target=lambda: answers.append(model.run(ONES)))
            caller.start()
            # the worker is inside the candidate once its helper thread burns CPU
            until(lambda: _cpu_ticks(process.process.pid) > 60, "the candidate runs")
            process.process.send_signal(signal.SIGSEGV)
            caller.join(20)
            (answer,) = answers
            assert (answer["y"].tolist(), answer.by.version, answer.fallback) == ([[2.0] * 4], "1.0.0", True)

            def candidate_errors() -> bool:
                return any(
                    (one.arm, one.errors, one.fallbacks) == ("candidate", 1, 1)
                    for one in supervisor.server.drain_stats()
                )

            until(candidate_errors, "the handle counts what the worker no longer can")
        supervisor.server.close()


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_inline_runs_the_candidate_here_and_falls_back_here(tmp_path: Path, supervisor: Supervisor):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    candidate = loadable(models.root(tmp_path / "new.onnx"), "1.1.0")
    supervisor.publish(good)
    with supervisor.model(isolation="inline") as model:
        supervisor.publish_and_settle(candidate, incumbent=good, trial="t")
        assert model.run(ONES).by.version == "1.1.0"
        answer = model.run(NEGATIVE)
        assert (answer.by.version, answer.fallback, answer["y"][0, 0]) == ("1.0.0", True, -2.0)
        until(
            lambda: any(
                (one.arm, one.requests, one.errors) == ("candidate", 2, 1) for one in supervisor.server.drain_stats()
            ),
            "the candidate's error reaches the supervisor",
        )
    assert supervisor.crashes == []


def test_in_a_split_the_application_keeps_the_incumbent_inside_it(tmp_path: Path, supervisor: Supervisor):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    candidate = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    supervisor.publish(good)
    with supervisor.model(isolation="inline") as model:
        supervisor.publish_and_settle(candidate, incumbent=good, trial="t", mode="split", share=0.9)
        assert {model.run(ONES).by.version for _ in range(20)} == {"1.0.0"}


APPLICATION = """
import os, signal, sys
import numpy as np
from wherry_agent.handle import Model
model = Model("scale", socket=sys.argv[1], isolation=sys.argv[2], timeout_s=20)
print(model.run({"x": np.ones((1, 4), np.float32)}).by.version, flush=True)
line = sys.stdin.readline().strip()
if line == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def application(path: Path, isolation: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", APPLICATION, str(path), isolation],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_an_application_that_dies_on_an_inline_candidate_counts_against_it(tmp_path: Path, supervisor: Supervisor):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    candidate = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    supervisor.publish(candidate, incumbent=good, trial="t")
    with application(supervisor.path, "inline") as first:
        assert first.stdout.readline() == "1.1.0\n"
        first.communicate("crash\n")
    (crash,) = until(lambda: supervisor.crashes, "the crash is told")
    assert (crash.model, crash.digest, crash.trial, crash.pid) == ("scale", candidate.digest, "t", first.pid)
    with application(supervisor.path, "inline") as second:
        assert second.stdout.readline() == "1.0.0\n", "after a crash the next connection gets the incumbent"
        second.communicate("bye\n")
    assert second.returncode == 0
    until(lambda: supervisor.server.leases() == set(), "the second application is gone")
    assert len(supervisor.crashes) == 1, "an exit with goodbye is no crash"


def test_an_application_that_dies_on_a_trusted_version_is_no_evidence(tmp_path: Path, supervisor: Supervisor):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    supervisor.publish(good)
    with application(supervisor.path, "worker") as first:
        assert first.stdout.readline() == "1.0.0\n"
        assert supervisor.server.leases() == {good.digest}
        first.communicate("crash\n")
    until(lambda: supervisor.server.leases() == set(), "the lease ends with the process")
    assert supervisor.crashes == []


def test_without_its_supervisor_a_handle_serves_the_last_verified_version(tmp_path: Path):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    candidate = loadable(models.scale(tmp_path / "new.onnx", 3.0), "1.1.0")
    supervisor = Supervisor(tmp_path)
    supervisor.publish(good)
    with supervisor.model(isolation="inline") as model:
        supervisor.publish_and_settle(candidate, incumbent=good, trial="t")
        assert model.run(ONES).by.version == "1.1.0"
        supervisor.server.close()
        until(lambda: model.run(ONES).by.version == "1.0.0", "the candidate is nobody's to judge now")
        with pytest.raises(UnreachableError, match="supervisor_unreachable"):
            model.report_bad("nobody hears this")
        again = Supervisor(tmp_path)
        again.publish(candidate)
        until(lambda: model.run(ONES).by.version == "1.1.0", "the handle finds its supervisor again")
        again.server.close()


def test_a_version_that_does_not_load_leaves_what_serves(tmp_path: Path, supervisor: Supervisor):
    good = loadable(models.scale(tmp_path / "good.onnx", 2.0))
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    broken = msgspec.structs.replace(instead(good, tmp_path / "junk.onnx"), manifest="sha256:" + "1" * 64)
    supervisor.publish(good)
    with supervisor.model() as model:
        supervisor.publish_and_settle(broken)
        assert model.run(ONES).by.version == "1.0.0"


def test_assets_of_a_version_stay_as_long_as_an_application_has_it(tmp_path: Path, supervisor: Supervisor):
    """Releases come and go, and an application cannot load them: what answers goes on with its own labels."""
    store = Store(tmp_path, Disk())
    assets, tar = assets_of({"labels.txt": b"cat dog"})
    store.add(assets.digest, tar)
    folder = store.unpack(assets.digest, assets.files)
    weights = models.scale(tmp_path / "good.onnx", 2.0)
    good = loadable(weights, assets_path=str(folder))
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    supervisor.publish(good)
    with supervisor.model() as model:
        for number in (1, 2):
            broken = instead(good, tmp_path / "junk.onnx")
            supervisor.publish_and_settle(
                msgspec.structs.replace(broken, manifest="sha256:" + f"{number}" * 64, assets_path="")
            )
        answer = model.run(ONES)
        assert answer.by.version == "1.0.0"
        assert supervisor.server.leases() == {good.digest, assets.digest}
        store.collect(supervisor.server.leases())
        assert answer.by.asset("labels.txt").read_bytes() == b"cat dog"


def test_an_application_can_give_its_own_verdict(tmp_path: Path, supervisor: Supervisor):
    supervisor.publish(loadable(models.scale(tmp_path / "good.onnx", 2.0)))
    with supervisor.model() as model:
        model.report_bad("boxes are upside down", model.run(ONES), severe=True)
        (verdict,) = until(lambda: supervisor.verdicts, "the verdict arrives")
        assert (verdict.reason, verdict.digest) == ("boxes are upside down", model.served.digest)


@pytest.mark.parametrize("trial", ["", "r1.1.3"])
def test_answers_that_the_application_calls_wrong_are_counted(tmp_path: Path, supervisor: Supervisor, trial: str):
    supervisor.publish(loadable(models.scale(tmp_path / "good.onnx", 2.0)), trial=trial)
    with supervisor.model(isolation="inline") as model:
        for _ in range(3):
            model.report_bad("boxes are upside down", model.run(ONES))

        def rejected() -> int:
            return sum(stats.rejected for stats in supervisor.server.drain_stats() if stats.trial == trial)

        until(lambda: rejected() == 3, "the supervisor has all of them")
        assert supervisor.verdicts == [], "none of them condemns alone"


def test_what_an_application_tells_of_an_answer_is_of_the_version_that_gave_it(tmp_path: Path, supervisor: Supervisor):
    supervisor.publish(loadable(models.scale(tmp_path / "old.onnx", 2.0)))
    with supervisor.model() as model:
        first = model.run(ONES)
        supervisor.publish_and_settle(loadable(models.scale(tmp_path / "new.onnx", 3.0), "2.0.0"))
        assert model.tell("agreed", 1, first)
        assert model.tell("agreed", 0, model.run(ONES))
        assert model.tell("agreed", 1)
        told: dict[str, Sum] = {}

        def arrived() -> bool:
            told.update(
                {stats.digest: sum_ for stats in supervisor.server.drain_stats() for sum_ in stats.metrics.values()}
            )
            return sum(one.count for one in told.values()) == 3

        until(arrived, "the supervisor has all of them")
        assert told == {first.by.digest: Sum(count=1, total=1.0), model.served.digest: Sum(count=2, total=1.0)}
        for name, value, code in [
            ("Agreed", 1, "metric_name"),
            ("a" * 41, 1, "metric_name"),
            ("agreed", float("nan"), "metric_value"),
            ("agreed", 1e13, "metric_value"),
        ]:
            with pytest.raises(RefusedError, match=code):
                model.tell(name, value)
        for number in range(METRICS_PER_WINDOW_MAX - 1):
            model.tell(f"m{number}", 1)
        with pytest.raises(RefusedError, match="metrics_too_many"):
            model.tell("one_more", 1)


def test_nothing_to_serve_and_nobody_there_are_told_apart(tmp_path: Path, supervisor: Supervisor):
    with pytest.raises(UnreachableError, match="no_model"):
        Model("scale", socket=supervisor.path, timeout_s=0.5)
    with pytest.raises(UnreachableError, match="supervisor_unreachable"):
        Model("scale", socket=tmp_path / "nobody.sock", timeout_s=0.3)


def test_a_moment_without_descriptors_or_threads_is_not_the_end_of_the_handles(supervisor: Supervisor, monkeypatch):
    real_accept, real_start = socket.socket.accept, threading.Thread.start
    failed: list[str] = []

    def accept(listener: socket.socket):
        if listener is supervisor.server._listener and failed.count("accept") < 2:
            failed.append("accept")
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real_accept(listener)

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("handle-") and "start" not in failed:
            failed.append("start")
            raise RuntimeError("can't start new thread")
        real_start(thread)

    monkeypatch.setattr(socket.socket, "accept", accept)
    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(2):  # the acceptor still waits in the accept that was not replaced; its thread fails
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(20)
            peer.connect(str(supervisor.path))
            hi = messages.Hi(format=messages.FORMAT, model="scale", pid=1)
            with contextlib.suppress(BrokenPipeError):
                peer.sendall(messages.encode(hi))
            with contextlib.suppress(ConnectionResetError):
                answer = peer.recv(4096)
    assert isinstance(messages.parse_to_handle(answer.strip()), messages.Assign)
    assert failed == ["start", "accept", "accept"]


def test_strangers_are_refused():
    assert allowed(0, [0], None)
    assert allowed(os.geteuid(), [12345], None)
    stranger = os.geteuid() + 54321
    assert not allowed(stranger, [12345], None)
    assert not allowed(stranger, [12345], 999)
    assert allowed(stranger, [12345, 999], 999), "one of its groups is the one that may"


def heard_by_another_user(path: Path, groups: list[int], said: str = "") -> bytes:
    """Connect as user 54321 with supplementary groups, say something, and return the first line that comes back."""
    path.chmod(0o777)
    for folder in path.parents:
        if folder.stat().st_uid == 0 and folder != Path("/") and "pytest" in str(folder):
            folder.chmod(0o755)
    code = (
        f"import os, socket, sys; os.setgroups({groups}); os.setgid(54321); os.setuid(54321);"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(sys.argv[1]);"
        "sys.argv[2] and s.sendall(sys.argv[2].encode()); print(s.makefile().readline())"
    )
    argv = [sys.executable, "-c", code, str(path), said]
    return subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_is_refused_by_its_credentials(supervisor: Supervisor):
    refusal = messages.parse_to_handle(heard_by_another_user(supervisor.path, [54322]))
    assert isinstance(refusal, messages.Refusal)
    assert refusal.code == "not_allowed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_that_was_given_the_group_may_use_models(tmp_path: Path):
    """Its user is in no group file, and the group is not its first one: systemd and containers give groups so."""
    group = next(entry for entry in grp.getgrall() if entry.gr_gid != 0)
    said = messages.encode(messages.WatchFlags(format=messages.FORMAT, pid=1)).decode()
    server = HandleServer(tmp_path / "handle.sock", group=group.gr_name)
    server.publish_flags({})
    try:
        first = messages.parse_to_handle(heard_by_another_user(tmp_path / "handle.sock", [54322, group.gr_gid], said))
    finally:
        server.close()
    assert isinstance(first, messages.Flags)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        json.dumps({"kind": "hi", "format": 99, "model": "scale", "pid": 1}).encode() + b"\n",
        b"x" * (messages.LINE_BYTES_MAX + 2),
        json.dumps(
            {
                "kind": "counts",
                "arms": [
                    {"model": "m", "manifest": "", "variant": "", "digest": "", "arm": "incumbent", "wait_us": {"q": 1}}
                ],
            }
        ).encode()
        + b"\n",
    ],
)
def test_what_is_no_handle_is_refused_and_others_go_on(tmp_path: Path, supervisor: Supervisor, line: bytes):
    supervisor.publish(loadable(models.scale(tmp_path / "good.onnx", 2.0)))
    with supervisor.model() as model, socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(20)
        stranger.connect(str(supervisor.path))
        stranger.sendall(line)
        answer = b""
        while chunk := stranger.recv(4096):
            answer += chunk
        assert isinstance(messages.parse_to_handle(answer.strip()), messages.Refusal)
        assert model.run(ONES).by.version == "1.0.0"
    assert supervisor.crashes == []


def test_the_supervisors_side_loads_neither_numpy_nor_an_engine():
    code = (
        "import sys, wherry_agent.handle_server, wherry_agent.canary_exit;"
        "print([m for m in ('numpy', 'onnxruntime', 'asyncio', 'cryptography', 'wherry_shared.engines') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
