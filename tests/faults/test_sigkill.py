"""SIGKILL in the middle of a rollout, to every kind of process: nothing acknowledged is lost, nothing foreign answers, it goes on.

A version's answers are its number, so every answer that applications got shows by itself which model gave it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.site_kit import (
    WAIT_S,
    Site,
    asking,
    check_answers,
    check_nobody_noticed,
    children,
    is_gone,
    kill,
    role,
)
from wherry_simulators.processes import wait_for

pytestmark = [pytest.mark.services, pytest.mark.slow]

MEGABYTE = 1_000_000
WEIGHTS_BYTES = 13 * MEGABYTE
STALLED_BYTES = 10 * MEGABYTE
"""Two of the store's syncs (4 MiB each) are behind it by then."""


@pytest.mark.parametrize("name", ["api", "director", "broker"])
def test_a_killed_part_of_the_server_is_started_again_and_the_rollout_goes_on(site: Site, name: str) -> None:
    old, new = site.versions(), site.release()
    with asking(site) as clients:
        number = site.begin(new)
        site.first("on trial")
        before = role(site, name)
        kill(before)
        site.check_acknowledged()
        wait_for(f"another {name}", lambda: role(site, name) not in (0, before), WAIT_S)
        assert _end(site, number) == "done"
        site.wait_settled(new)
    check_answers(clients, *old, new)
    check_nobody_noticed(clients)
    site.check_streams()


def test_a_server_killed_whole_goes_on_from_its_data(site: Site) -> None:
    old, new = site.versions(), site.release()
    server = site.server.child
    assert server is not None
    with asking(site) as clients:
        number = site.begin(new)
        site.first("on trial")
        parts = children(server.pid)
        assert len(parts) == 3
        os.killpg(server.pid, signal.SIGKILL)
        assert server.process is not None
        server.process.wait(WAIT_S)
        wait_for("its children to end with it", lambda: all(map(is_gone, parts)), WAIT_S)
        site.check_acknowledged()
        exposed = _exposed(site, number)
        site.server.start()
        assert exposed <= _exposed(site, number), "nobody was forgotten"
        assert _end(site, number) == "done"
        site.wait_settled(new)
    check_answers(clients, *old, new)
    check_nobody_noticed(clients)
    site.check_streams()


def _during_fetch(site: Site) -> None:
    wait_for("most of the weights", lambda: site.downloaded("far") > WEIGHTS_BYTES / 2, WAIT_S)
    site.until("far", "downloading")


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(_during_fetch, id="downloading"),
        pytest.param(lambda site: site.until("far", "in the canary"), id="in the canary"),
        pytest.param(lambda site: site.until("far", "on trial"), id="on trial"),
    ],
)
def test_a_killed_supervisor_takes_up_what_it_was_doing(site: Site, moment: Callable[[Site], object]) -> None:
    large = moment is _during_fetch
    old, new = site.versions(), site.release(ballast_bytes=WEIGHTS_BYTES if large else 0)
    agent, line = site.agents["far"], site.line
    assert agent.child is not None
    assert line is not None
    supervisor = agent.child
    with asking(site) as clients:
        if large:
            line.stall_after(STALLED_BYTES)
        number = site.begin(new)
        moment(site)
        parts = children(supervisor.pid)
        supervisor.kill()
        wait_for("its children to end with it", lambda: all(map(is_gone, parts)), WAIT_S)
        epoch, told = site.acknowledged("far")
        assert told <= site.stored("far", epoch)
        line.flow()
        line.answered_bytes = 0
        supervisor.start()
        assert _end(site, number) == "done"
        site.wait_settled(new)
        if large:
            assert line.answered_bytes < WEIGHTS_BYTES / 2, "it went on near where the dead one stopped"
        assert site.acknowledged("far")[0] == epoch, "the stream of reports is the same one"
    check_answers(clients, *old, new)
    check_nobody_noticed({"near": clients["near"]})
    site.check_streams()


def test_a_killed_worker_refuses_nobody_and_the_incumbent_is_not_blamed(site: Site) -> None:
    """Before the swap the crash is the incumbent's; in the trial it is one that this plan allows."""
    old, new = site.versions(), site.release()
    with asking(site) as clients:
        number = site.begin(new, trial={"crashes_max": 1, "min_requests": 100, "max_s": 20})
        for moment in ("in the canary", "on trial"):
            name = site.first(moment)
            before = site.agents[name].status()["worker_pid"]
            told = clients[name].count
            kill(before)
            wait_for(
                "another worker", lambda n=name, b=before: site.agents[n].status()["worker_pid"] not in (0, b), WAIT_S
            )
            wait_for("answers", lambda n=name, t=told: clients[n].count > t, WAIT_S)
        assert _end(site, number) == "done"
        site.wait_settled(new)
    check_answers(clients, *old, new)
    for client in clients.values():
        assert client.refused == 0
    assert sum(client.cut for client in clients.values()) <= 2, "at most the request in each dead worker's hands"
    site.check_streams()


def test_a_worker_killed_in_a_trial_condemns_the_candidate_and_everyone_goes_back(site: Site) -> None:
    old = site.install()
    new = site.release()
    with asking(site) as clients:
        number = site.begin(new, trial={"min_requests": 1000, "max_s": 60}, failure={"count": 0})
        name = site.first("on trial")
        kill(site.agents[name].status()["worker_pid"])
        assert _end(site, number) == "halted"
        site.wait_settled(old)
    query = "SELECT reason FROM report_log WHERE device_id = ? AND state = 'returned' ORDER BY seq DESC LIMIT 1"
    assert site.rows(query, site.device_id(name)) == [("crash",)]
    check_answers(clients, old, new)
    assert all(client.refused == 0 for client in clients.values())
    site.check_streams()


def _end(site: Site, number: int) -> str:
    return str(site.end(number)["state"])


def _exposed(site: Site, number: int) -> set[str]:
    query = "SELECT a.device_id FROM assignment a JOIN rollout r ON r.id = a.rollout_id WHERE r.number = ?"
    return {device for (device,) in site.rows(query, number)}
