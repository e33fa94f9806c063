"""The bodies of the processes of a server: api, director, ingest, publisher, keys, broker. One program, started with the role's name."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from importlib import import_module
from typing import Any

from wherry_server.settings import Role, Settings

PARENT = "WHERRY_PARENT"
"""Environment: the process id of the parent with which this process ends."""
GRACE_S = 5
"""How long open requests may take when the api is told to end."""
KEEP_ALIVE_S = 75
BACKLOG = 1024
CHATTY = ("alembic", "gmqtt", "httpx", "tracing")
"""Libraries that log every step at level INFO."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def load(role: Role, settings: Settings) -> None:
    """Import what a role needs, so that it is there when it runs."""
    if role == "api":
        import_module("uvicorn")
        import_module("wherry_server.app")
    elif role == "director":
        import_module("wherry_server.director")
    elif role == "broker" and not settings.broker_tls:
        import_module("wherry_server.broker")


def run(role: Role, settings: Settings, part: str = "1/1") -> None:
    """Be one role until told to end by SIGTERM."""
    die_with_parent()
    _show_name(f"wherry {role}")
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {role} %(levelname)s %(name)s: %(message)s"
    )
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if role == "api":
        run_api(settings)
    elif role == "director":
        from wherry_server import director

        director.run(settings)
    elif role == "ingest":
        from wherry_server import ingest_process

        ingest_process.run(settings, ingest_process.Part.parse(part))
    elif role == "publisher":
        from wherry_server import publisher

        publisher.run(settings)
    elif role == "keys":
        from wherry_server import keys_role

        keys_role.run(settings)
    elif settings.broker_tls:
        from wherry_server import broker_config

        broker_config.become(settings)
    else:
        from wherry_server import broker

        broker.run(settings)


def run_api(settings: Settings) -> None:
    """Serve the API."""
    import uvicorn

    from wherry_server.app import create_app
    from wherry_server.heads import HeadLimit
    from wherry_server.peer import tls_options
    from wherry_server.services import open_services

    speaks: dict[str, Any] = {"http": HeadLimit}
    if settings.https:
        speaks = tls_options(settings.keys_folder, settings.https_pair)
    uvicorn.run(
        create_app(open_services(settings)),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        **speaks,
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


def die_with_parent() -> None:
    """Have the kernel end this process when the parent that `PARENT` names ends, however that ends (Linux)."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it ended before the kernel knew
        sys.exit(1)


def _show_name(name: str) -> None:
    """Have `ps -o comm` and `top` show which role a process is, 15 characters of it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
