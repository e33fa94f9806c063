"""`python -m wherry_agent.workers`: a worker on the descriptors that the supervisor left open for it.

`WHERRY_CONTROL_FD` is the control channel, `WHERRY_LISTEN_FDS` the listening sockets (comma separated; TCP and unix),
`WHERRY_MEMORY_RESERVE_BYTES` what a swap leaves free on this machine. `WHERRY_PREPARE` names engines to import at once (a spare). `WHERRY_PASS_FD` is where open connections go when
this worker makes way for another, `WHERRY_TAKE_FDS` where those of the workers before it come from.
`WHERRY_GRPC_PORT` is a loopback port for gRPC, 0 or nothing leaves it off; `WHERRY_GRPC_SOCKET` is where a unix socket for it is
opened beside the port. `WHERRY_REGIONS_FD` holds registrations of shared memory that the worker before had,
`WHERRY_IN_FLIGHT_FD` is where this one notes what it runs.
"""

from __future__ import annotations

import logging
import os
import socket
import sys

from wherry_agent.answering.memory import RESERVE_BYTES_DEFAULT
from wherry_agent.in_flight import UNREAD, Page
from wherry_agent.serving.ledger import Ledger
from wherry_agent.serving.passing import PASS_SECONDS_MAX
from wherry_agent.workers import bare
from wherry_shared.errors import WherryError


def main() -> int:
    """Run a worker until it is told to stop; returns only if it cannot begin."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        control = socket.socket(fileno=int(os.environ["WHERRY_CONTROL_FD"]))
        listeners, pass_on, take_over = (
            [socket.socket(fileno=int(text)) for text in os.environ.get(name, "").split(",") if text]
            for name in ("WHERRY_LISTEN_FDS", "WHERRY_PASS_FD", "WHERRY_TAKE_FDS")
        )
        for end in pass_on:
            end.settimeout(PASS_SECONDS_MAX)
        grpc_port = int(os.environ.get("WHERRY_GRPC_PORT") or 0)
        regions = os.environ.get("WHERRY_REGIONS_FD", "")
        ledger = Ledger(int(regions)) if regions else None
        in_flight = os.environ.get("WHERRY_IN_FLIGHT_FD", "")
        page = Page(int(in_flight)) if in_flight else UNREAD
        reserve = int(os.environ.get("WHERRY_MEMORY_RESERVE_BYTES", RESERVE_BYTES_DEFAULT))
    except (KeyError, ValueError, OSError) as error:
        print(f"error: a worker is started by the supervisor ({type(error).__name__}: {error})", file=sys.stderr)  # noqa: T201
        return 2
    why = bare.lacking()
    if why:
        bare.Bare(control, listeners, why, take_over=take_over, grpc=bool(grpc_port)).run()
        return 0
    from wherry_agent.workers.worker import Worker
    from wherry_shared.engines.tiny import run_tiny

    os.umask(0o077)  # gRPC makes its socket itself: nobody else may connect before the supervisor has set its rights
    for engine in filter(None, os.environ.get("WHERRY_PREPARE", "").split(",")):
        try:
            run_tiny(engine)
        except (WherryError, ArithmeticError) as error:  # whoever loads a model in it says more
            logging.getLogger(__name__).warning("engine %s is not prepared: %s", engine, error)
    worker = Worker(
        control,
        listeners,
        reserve_bytes=reserve,
        pass_on=pass_on[0] if pass_on else None,
        take_over=take_over,
        grpc_port=grpc_port,
        grpc_socket=os.environ.get("WHERRY_GRPC_SOCKET", ""),
        ledger=ledger,
        page=page,
    )
    worker.run()
    # an engine may still be in a run that nobody waits for; its thread, back from native code into an interpreter that
    # is being taken down, would end this process with SIGABRT, which looks like a crash
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
