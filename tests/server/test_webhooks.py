"""What happened is told, signed, until it arrives; what does not arrive is listed and sent again on demand."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from typing import Any

import httpx
import pytest

from tests.server.harness import Running, in_database
from wherry_server import calls, webhooks
from wherry_server.client import Client
from wherry_server.db.database import Database
from wherry_server.webhooks import PAUSE_S_FIRST, PAUSE_S_MAX, TRIES_MAX, Postman, pause_s
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
        assert client.send(calls.list_deliveries("silent")) == []
        receiver.status = 204
        post(server, receiver)
        post(server, receiver)
        assert len(receiver.came) == 2, "what arrived is not told again"
        assert client.send(calls.list_deliveries("chat")) == []

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
