"""What happened is told, signed, until it arrives; what does not arrive is listed and sent again on demand."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.server.harness import Running, in_database
from wherry_server import audit, calls, webhooks
from wherry_server.client import Client
from wherry_server.db.database import Database
from wherry_server.postman import (
    PAUSE_S_FIRST,
    PAUSE_S_MAX,
    SHARED_MAX,
    TRIES_MAX,
    UNDER_WAY_MAX,
    UNDER_WAY_PER_RECEIVER,
    Postman,
    pause_s,
    room,
)
from wherry_shared.access import Access
from wherry_shared.errors import RefusedError


class Receiver:
    """Another system: answers as it is told and remembers what came."""

    def __init__(self) -> None:
        self.status, self.came = 204, list[httpx.Request]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.came.append(request)
        if self.status == 0:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(self.status)


def post(server: Running, receiver: Receiver, turns: int = 1) -> None:
    """Let the director's postman work, as if what waits were due."""

    async def work() -> None:
        database = Database.open(server.settings.database_url)
        key = server.settings.master_key_file.read_bytes()
        try:
            async with httpx.AsyncClient(transport=httpx.MockTransport(receiver)) as http:
                postman = Postman(database, server.settings.project, key, http)
                for _ in range(turns):
                    async with database.write() as connection:
                        await connection.exec_driver_sql("UPDATE webhook_delivery SET next_at = 0")
                        await connection.exec_driver_sql("UPDATE webhook SET open_at = 0")
                    while await postman.turn():
                        pass
        finally:
            await database.close()

    asyncio.run(work())


def test_an_event_is_told_signed_and_again_until_it_arrives(server: Running) -> None:
    receiver = Receiver()
    with Client(Access(server=server.url, token=server.admin)) as client:
        made = client.send(calls.create_webhook("chat", "https://chat.example/hook", ["cohort.*"]))
        client.send(calls.create_webhook("silent", "https://silent.example/hook", ["rollout.*"]))
        client.send(calls.create_cohort("told", "all"))
        receiver.status = 500
        post(server, receiver)
        assert len(receiver.came) == 1
        (waiting,) = client.send(calls.list_deliveries("chat"))
        assert (waiting.state, waiting.tries, waiting.error) == ("waiting", 1, "it answered 500")
        assert waiting.next_at > waiting.created_at
        failing = next(one for one in client.send(calls.list_webhooks()) if one.name == "chat")
        assert (failing.failures, failing.open_at > waiting.created_at) == (1, True)
        assert client.send(calls.list_deliveries("silent")) == []
        receiver.status = 204
        post(server, receiver)
        post(server, receiver)
        assert len(receiver.came) == 2, "what arrived is not told again"
        assert client.send(calls.list_deliveries("chat")) == []
        assert [one.failures for one in client.send(calls.list_webhooks()) if one.name == "chat"] == [0]

        first, request = receiver.came
        assert request.headers["content-type"].startswith("application/cloudevents+json")
        event = json.loads(request.content)
        assert (event["specversion"], event["type"], event["subject"]) == ("1.0", "dev.wherry.cohort.create", "told")
        assert event["data"] == {"actor": "token:admin", "selector": "all"}
        assert first.headers["webhook-id"] == request.headers["webhook-id"] == event["id"]
        said = f"{event['id']}.{request.headers['webhook-timestamp']}.".encode() + request.content
        digest = hmac.new(base64.b64decode(made.secret.removeprefix("whsec_")), said, hashlib.sha256).digest()
        assert request.headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
        client.send(calls.delete_webhook("chat"))
        client.send(calls.delete_webhook("silent"))


@pytest.mark.parametrize("status", [0, 302, 404])
def test_what_never_arrives_is_dead_until_an_operator_sends_it_again(server: Running, status: int) -> None:
    receiver, name = Receiver(), f"dead-{status}"
    receiver.status = status
    with Client(Access(server=server.url, token=server.admin)) as client:
        client.send(calls.create_webhook(name, "http://127.0.0.1:9/", ["token.create"]))
        client.send(calls.create_token("someone", "viewer"))
        post(server, receiver, TRIES_MAX + 3)
        assert len(receiver.came) == TRIES_MAX
        (dead,) = client.send(calls.list_deliveries(name, "dead"))
        assert (dead.state, dead.tries) == ("dead", TRIES_MAX)
        assert [one.dead for one in client.send(calls.list_webhooks()) if one.name == name] == [1]
        with pytest.raises(RefusedError) as caught:
            client.send(calls.redeliver_event(name, dead.event + 1))
        assert caught.value.code == "delivery_unknown"
        client.send(calls.redeliver_event(name, dead.event))
        receiver.status = 200
        post(server, receiver)
        assert len(receiver.came) == TRIES_MAX + 1
        assert client.send(calls.list_deliveries(name)) == []
        client.send(calls.delete_webhook(name))


def test_nobody_waits_for_a_receiver_that_is_slow_or_fails(server: Running) -> None:
    """Thirty events are due to three receivers: one answers, one hangs, one refuses; then the hanging one comes to itself."""

    async def work() -> None:
        database = Database.open(server.settings.database_url)
        project, awake = server.settings.project, asyncio.Event()
        came: dict[str, list[str]] = {"quick": [], "slow": [], "down": []}

        async def receiver(request: httpx.Request) -> httpx.Response:
            came[request.url.host].append(request.headers["webhook-id"])
            if request.url.host == "slow":
                await awake.wait()
            return httpx.Response(503 if request.url.host == "down" else 204)

        async with httpx.AsyncClient(transport=httpx.MockTransport(receiver)) as http:
            postman = Postman(database, project, b"k" * 32, http)
            for name in came:
                await webhooks.create(database, project, b"k" * 32, "us", name, f"http://{name}/", ["test.*"])
            async with database.write() as connection:
                for number in range(30):
                    await audit.append(connection, project, "us", "test.event", str(number))
            while len(came["quick"]) < 30:
                assert await postman.turn()
            assert came["quick"] == sorted(set(came["quick"]), key=int), "in order, each once"
            assert len(came["slow"]) == UNDER_WAY_PER_RECEIVER
            assert 1 <= len(came["down"]) <= UNDER_WAY_PER_RECEIVER, "then it is left alone"

            async with database.read() as connection:
                found = {one["name"]: one for one in await webhooks.every(connection, project)}
                waiting = await webhooks.deliveries(connection, project, "down", "waiting")
            assert (found["down"]["failures"], found["down"]["waiting"], found["quick"]["failures"]) == (1, 30, 0)
            assert {one["tries"] for one in waiting} == {1}, "its failure is a try of all that waits for it"

            awake.set()
            while len(came["slow"]) < 30:
                assert await postman.turn()
            assert sorted(came["slow"]) == sorted(came["quick"])
            await webhooks.redeliver(database, project, "us", "down", waiting[-1]["event"])
            before = len(came["down"])
            await postman.turn()
            await postman.turn()
            assert came["down"][before:] == [str(waiting[-1]["event"])], "one event asks whether it is back"
            await postman.rest()
        for name in came:
            await webhooks.remove(database, project, "us", name)
        await database.close()

    asyncio.run(work())


def test_an_event_that_is_always_refused_holds_no_other_up(server: Running) -> None:
    refused = "never"

    async def work() -> None:
        database = Database.open(server.settings.database_url)
        project, came = server.settings.project, list[str]()

        def receiver(request: httpx.Request) -> httpx.Response:
            subject = json.loads(request.content)["subject"]
            came.append(subject)
            return httpx.Response(400 if subject == refused else 204)

        async with httpx.AsyncClient(transport=httpx.MockTransport(receiver)) as http:
            postman = Postman(database, project, b"k" * 32, http)
            await webhooks.create(database, project, b"k" * 32, "us", "picky", "http://picky/", ["test.*"])
            async with database.write() as connection:
                for subject in (refused, *map(str, range(12))):
                    await audit.append(connection, project, "us", "test.event", subject)
            for _ in range(3):
                while await postman.turn():
                    pass
                async with database.write() as connection:
                    await connection.exec_driver_sql("UPDATE webhook SET open_at = 0")
            async with database.read() as connection:
                (left,) = await webhooks.deliveries(connection, project, "picky", "")
            assert sorted(came) == sorted((refused, *map(str, range(12))))
            assert (left["state"], left["error"]) == ("waiting", "it answered 400")
        await webhooks.remove(database, project, "us", "picky")
        await database.close()

    asyncio.run(work())


def test_every_receiver_has_room_whatever_the_others_take() -> None:
    under_way = Counter[str]()
    names = [f"r{number}" for number in range(webhooks.WEBHOOKS_MAX)]
    for _ in range(3):
        for name in names:
            under_way[name] += room(name, under_way, failures=0)
    assert all(1 <= many <= UNDER_WAY_PER_RECEIVER for many in under_way.values())
    assert under_way.total() == UNDER_WAY_MAX == len(names) + SHARED_MAX
    assert room("new", under_way, failures=0) == room("new", under_way, failures=3) == 1
    assert room(names[-1], under_way, failures=3) == 0


def test_a_webhook_that_moves_keeps_its_secret_and_what_is_due(server: Running) -> None:
    receiver = Receiver()
    with Client(Access(server=server.url, token=server.admin)) as client:
        client.send(calls.create_webhook("moving", "https://old.example/", ["cohort.*"]))
        client.send(calls.create_cohort("moved", "all"))
        receiver.status = 0
        post(server, receiver)
        _, tag = client.tagged(calls.show_webhook("moving"))
        client.send(calls.change_webhook("moving", "https://new.example/", ["token.*"], tag))
        with pytest.raises(RefusedError) as caught:
            client.send(calls.delete_webhook("moving", tag))
        assert caught.value.code == "webhook_changed"
        shown, tag = client.tagged(calls.show_webhook("moving"))
        assert (shown.failures, shown.open_at, shown.waiting, shown.types) == (0, 0, 1, ["token.*"])
        receiver.status = 204
        post(server, receiver)
        assert [request.url.host for request in receiver.came] == ["old.example", "new.example"]
        client.send(calls.delete_webhook("moving", tag))


def test_pauses_grow_to_a_bound_and_differ() -> None:
    for tries in range(1, 40):
        most = min(PAUSE_S_FIRST * 2 ** (tries - 1), PAUSE_S_MAX)
        found = [pause_s(tries) for _ in range(20)]
        assert all(most / 2 <= one <= most for one in found)
        assert len(set(found)) > 1


@pytest.mark.parametrize("url", ["", "ftp://x/", "http://", "http://u:p@x/", "http://a b/", "http://x:99999/", "/x"])
def test_what_is_no_address_is_refused(server: Running, url: str) -> None:
    with Client(Access(server=server.url, token=server.admin)) as client, pytest.raises(RefusedError) as caught:
        client.send(calls.create_webhook("wrong", url))
    assert caught.value.code == "webhook_invalid"


def test_the_secret_is_nowhere_in_the_database(server: Running) -> None:
    with Client(Access(server=server.url, token=server.admin)) as client:
        made = client.send(calls.create_webhook("secretive", "https://x.example/"))
        rows: Any = in_database(server.settings, lambda c: c.exec_driver_sql("SELECT * FROM webhook")).all()
        assert made.secret.startswith("whsec_")
        assert made.secret not in str(rows)
        assert webhooks.secret(b"another key", "x") != made.secret
        client.send(calls.delete_webhook("secretive"))


def test_the_secret_in_an_address_is_told_to_admins_only_and_stands_in_no_log(server: Running) -> None:
    planted = "B7f3planted9Qx"
    address = f"https://chat.example:8443/services/{planted}?token={planted}"
    with Client(Access(server=server.url, token=server.admin)) as admin:
        admin.send(calls.create_webhook("spoken", address, ["*"]))
        viewer_token = admin.send(calls.create_token("reader", "viewer")).token
        _, tag = admin.tagged(calls.show_webhook("spoken"))
        admin.send(calls.change_webhook("spoken", address + planted, ["*"], tag))
        assert admin.send(calls.show_webhook("spoken")).url == address + planted
        with Client(Access(server=server.url, token=viewer_token)) as viewer:
            (listed,) = (one for one in viewer.send(calls.list_webhooks()) if one.name == "spoken")
            assert listed.url == viewer.send(calls.show_webhook("spoken")).url == "https://chat.example:8443/…"
        admin.send(calls.delete_webhook("spoken"))
        entries = admin.send(calls.list_audit(subject="spoken"))
    assert {entry.action for entry in entries} == {"webhook.create", "webhook.change", "webhook.delete"}
    assert planted not in repr(entries)
    assert any(entry.detail.get("moved") for entry in entries)
