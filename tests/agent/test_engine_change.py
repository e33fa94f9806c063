"""A whole agent whose engine is replaced on disk while it serves: a shim stands for the package manager."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agent.daemon_kit import MODEL, Agent, Site, site
from tests.shared.engines import models
from wherry_agent import status
from wherry_shared import reasons
from wherry_shared.digest import hex_of, of_file

SHIM = """
import importlib.abc, importlib.machinery, os, sys
FOLDER = os.path.dirname(__file__)

def read(name):
    try:
        with open(os.path.join(FOLDER, name)) as file:
            return file.read()
    except OSError:
        return ""

class Loader(importlib.abc.Loader):
    def __init__(self, real): self.real = real
    def create_module(self, spec): return self.real.create_module(spec)
    def exec_module(self, module):
        self.real.exec_module(module)
        module.__version__, broken = read("version"), read("broken").split()
        plain = module.InferenceSession
        class Session(plain):
            def __init__(self, path, *rest, **more):
                super().__init__(path, *rest, **more)
                if os.path.basename(str(path)) in broken:
                    inner, self._sess = self._sess, Off(self._sess)
        module.InferenceSession = Session

class Off:
    def __init__(self, inner): self._inner = inner
    def __getattr__(self, name): return getattr(self._inner, name)
    def run(self, *arguments): return [value + 1 for value in self._inner.run(*arguments)]

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "onnxruntime":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec

sys.meta_path.insert(0, Finder())
"""


class Engine:
    """The onnxruntime that processes started from now on find."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SHIM)
        self.replace("90.0.0")

    def replace(self, version: str, *broken: Path) -> None:
        """Install another version, with which these files give other numbers."""
        (self.folder / "version").write_text(version)
        (self.folder / "broken").write_text("\n".join(hex_of(of_file(path)) for path in broken))


@contextmanager
def asking(device: Agent) -> Iterator[list[str]]:
    """Ask all the time; yield what went wrong."""
    stop = threading.Event()
    wrong: list[str] = []

    def main() -> None:
        while not stop.is_set():
            time.sleep(0.01)
            try:
                code, answer = device.infer()
            except Exception as error:
                wrong.append(repr(error))
                continue
            value = answer["outputs"][0]["data"][0] if code == 200 else None
            right = {"1.0.0": 2.0, "1.1.0": 3.0}
            if code != 200 or value != right[answer["model_version"]]:
                wrong.append(f"{code} {answer}")

    threads = [threading.Thread(target=main) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def engine_of(shown: dict) -> str:
    return str(shown["models"][MODEL]["serves"]["engine"])


@pytest.mark.services
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_replaced_engine_is_judged_before_it_serves_and_nobody_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tmp_path / "shim")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(engine.folder), os.environ.get("PYTHONPATH", "")]))
    first, second = models.scale(tmp_path / "one.onnx", 2.0), models.scale(tmp_path / "two.onnx", 3.0)
    with site(tmp_path) as server:
        server.release("1.0.0", first)
        server.release("1.1.0", second)
        device = Agent(server, "far")
        try:
            _tell_story(server, device, engine, second)
        finally:
            if device.child.poll() is None:
                device.stop()


def _tell_story(server: Site, device: Agent, engine: Engine, second: Path) -> None:
    device.until("engines are known", lambda shown: any("90.0.0" in one for one in shown["engines"]))
    for version in ("1.0.0", "1.1.0"):
        server.deploy(version, "far", trial_s=1)
        device.until_serves(version)
    pid = device.status()["worker_pid"]

    # what fails with the new engine goes on in the process that has the old one
    engine.replace("90.1.0", second)
    with asking(device) as wrong:
        device.child.send_signal(signal.SIGHUP)
        shown = device.until("it is judged", lambda shown: shown["known_bad"])
        assert shown["known_bad"][0]["engine"] == "onnxruntime 90.1.0"
        assert shown["known_bad"][0]["reason"] == reasons.GOLDEN_MISS
        assert device.status()["models"][MODEL]["last_report"]["reason"] == reasons.ENGINE_CHANGED
        assert set(device.ask(20)) == {"1.1.0"}
        assert "worker   still has onnxruntime 90.0.0 in memory" in status.render(device.status())
    assert wrong == []
    assert device.status()["worker_pid"] == pid

    # a worker that has to start with the new one serves what is left, proved with it
    os.kill(pid, signal.SIGKILL)
    shown = device.until(
        "the last good version serves",
        lambda shown: shown["models"][MODEL].get("serves", {}).get("target") == f"{MODEL}/1.0.0",
    )
    device.until("it is proved", lambda shown: engine_of(shown) == "onnxruntime 90.1.0")
    assert set(device.ask(20)) == {"1.0.0"}

    # what passes is served by another worker that has the new engine, and nobody notices
    pid = device.until("a worker", lambda shown: shown["worker_pid"])["worker_pid"]
    engine.replace("90.2.0")
    with asking(device) as wrong:
        device.child.send_signal(signal.SIGHUP)
        device.until("another worker", lambda shown: shown["worker_pid"] not in (0, pid))
        device.until("it is proved", lambda shown: engine_of(shown) == "onnxruntime 90.2.0")
        assert set(device.ask(20)) == {"1.0.0"}
        pid = device.status()["worker_pid"]
        device.child.send_signal(signal.SIGUSR1)  # the operator may ask for another one, too
        device.until("another worker", lambda shown: shown["worker_pid"] not in (0, pid))
        assert set(device.ask(20)) == {"1.0.0"}
    assert wrong == []
