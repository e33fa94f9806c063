"""A PostgreSQL server of one's own for tests and benchmarks: on a unix socket in a folder of its own, ended with the run."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg

from tests.services import lacks
from wherry_server.db.migrate import upgrade

START_S = 60.0
USER = "wherry"
TEMPLATE = "wherry_template"
CONNECTIONS_MAX = 200
"""Every test opens pools of its own, some several."""


def _program(name: str) -> str:
    """Return where a program of the server is; Debian keeps them off the path."""
    found = shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None
    )
    return found or lacks(f"not installed: {name}")


class Postgres:
    """A running server; `database` makes an empty database with the newest schema."""

    def __init__(self, *, durable: bool = False) -> None:
        """Start; `durable` as it is installed, else without fsync, which tests need not wait for."""
        initdb, postgres = _program("initdb"), _program("postgres")
        self._made = 0
        self._urls: dict[Path, str] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="wherry-pg-"))  # short: a socket's path is at most 107 bytes
        self._user: dict[str, str | int] = {}
        if os.geteuid() == 0:  # it refuses root
            nobody = next((name for name in ("postgres", "nobody") if _known(name)), "nobody")
            found = pwd.getpwnam(nobody)
            os.chown(self._folder, found.pw_uid, found.pw_gid)
            self._user = {"user": found.pw_uid, "group": found.pw_gid}
        data = self._folder / "data"
        made = subprocess.run(
            [initdb, "-D", data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"],
            capture_output=True,
            text=True,
            timeout=START_S,
            cwd=self._folder,
            **self._user,  # type: ignore[call-overload]
        )
        assert made.returncode == 0, made.stderr
        arguments = [postgres, "-D", data, "-k", self._folder, "-c", "listen_addresses="]
        arguments += ["-c", f"max_connections={CONNECTIONS_MAX}"]
        if not durable:
            arguments += ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "shared_buffers=64MB"]
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            arguments, stdout=self._log, stderr=subprocess.STDOUT, cwd=self._folder, **self._user
        )  # type: ignore[call-overload]
        self._wait()
        self._sql(f"CREATE DATABASE {TEMPLATE}")
        upgrade(self.url(TEMPLATE))

    def url(self, name: str) -> str:
        """Return the SQLAlchemy URL of a database."""
        return f"postgresql+asyncpg://{USER}@/{name}?host={self._folder}"

    def database(self) -> str:
        """Make a database with the newest schema and nothing in it; return its URL."""
        self._made += 1
        name = f"test_{self._made}"
        self._sql(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        return self.url(name)

    def empty(self) -> str:
        """Make a database with nothing in it, not even a schema; return its URL."""
        self._made += 1
        name = f"test_{self._made}"
        self._sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def of(self, folder: Path) -> str:
        """Return the URL of the database that belongs to a server's data folder."""
        if folder not in self._urls:
            self._urls[folder] = self.database()
        return self._urls[folder]

    def close(self) -> None:
        """End the server at once and remove what it kept."""
        self._process.send_signal(signal.SIGINT)  # fast: connections that tests left open end with it
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder)

    def _sql(self, statement: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(host=str(self._folder), user=USER, database="postgres")
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as pool:  # a test may ask from inside its loop
            pool.submit(lambda: asyncio.run(run())).result()

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        last: Exception | None = None
        while self._process.poll() is None and time.monotonic() < end:
            try:
                self._sql("SELECT 1")
            except (OSError, asyncpg.PostgresError) as error:
                last = error
                time.sleep(0.05)
            else:
                return
        said = (self._folder / "log").read_text(errors="replace")
        raise AssertionError(f"PostgreSQL does not answer: {last}; it said:\n{said}")


def _known(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
