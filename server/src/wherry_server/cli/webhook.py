"""`wherry webhook`: tell other systems what happens."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, IfMatch, client, show, soon, table, when

app = typer.Typer(name="webhook", help="Other systems that are told what happens.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of the webhook.")]


@app.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """List the webhooks, and how many events have not arrived."""
    with client() as server:
        found = server.plain(calls.list_webhooks())

    def render(console: Console) -> None:
        rows = [
            (
                one["name"],
                one["url"],
                " ".join(one["types"]),
                one["waiting"],
                one["dead"],
                _fares(one),
            )
            for one in found
        ]
        console.print(table(("webhook", "url", "types", "#waiting", "#dead", "receiver"), rows))

    show(found, as_json, render)


def _fares(webhook: dict[str, Any]) -> str:
    if not webhook["failures"]:
        return ""
    return f"failed {webhook['failures']} times in a row, asked again {soon(webhook['open_at'])}"


@app.command("create")
def create_webhook(
    name: Name,
    url: Annotated[str, typer.Argument(help="Where events are sent by POST.")],
    event: Annotated[list[str] | None, typer.Option("--type", help='Such as "rollout.*"; may be repeated.')] = None,
    as_json: AsJson = False,
) -> None:
    """Make a webhook; the secret of its signatures is shown this once."""
    with client() as server:
        made = server.plain(calls.create_webhook(name, url, event or ["*"]))
    show(made, as_json, lambda console: console.print(made["secret"], soft_wrap=True))


@app.command("show")
def show_webhook(name: Name, as_json: AsJson = False) -> None:
    """Show a webhook, how many events have not arrived, and how its receiver fares."""
    with client() as server:
        found, tag = server.plain_tagged(calls.show_webhook(name))

    def render(console: Console) -> None:
        console.print(f"{found['name']}  {found['url']}", soft_wrap=True)
        console.print(f"  types     {' '.join(found['types'])}", markup=False)
        console.print(f"  events    {found['waiting']} waiting, {found['dead']} dead")
        console.print(f"  receiver  {_fares(found) or 'answers'}")
        console.print(f"  tag       {tag}")

    show({**found, "tag": tag}, as_json, render)


@app.command("change")
def change_webhook(
    name: Name,
    url: Annotated[str | None, typer.Option(help="Where events are sent from now on.")] = None,
    event: Annotated[
        list[str] | None, typer.Option("--type", help="Instead of all its types; may be repeated.")
    ] = None,
    if_match: IfMatch = "",
    as_json: AsJson = False,
) -> None:
    """Give a webhook another address or other types; its secret stays."""
    with client() as server:
        if not (url and event):  # what is not said stays, if it still is
            known, tag = server.tagged(calls.show_webhook(name))
            url, event, if_match = url or known.url, event or known.types, if_match or tag
        made = server.plain(calls.change_webhook(name, url, event, if_match))
    show(made, as_json, lambda console: console.print(f"webhook {name} is changed"))


@app.command("delete")
def delete_webhook(name: Name, if_match: IfMatch = "", as_json: AsJson = False) -> None:
    """Forget a webhook and what was due to it."""
    with client() as server:
        server.send(calls.delete_webhook(name, if_match))
    show({"name": name, "deleted": True}, as_json, lambda console: console.print(f"webhook {name} is forgotten"))


@app.command("deliveries")
def list_deliveries(
    name: Name,
    dead: Annotated[bool, typer.Option("--dead", help="Only what is not tried any more.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what has not arrived."""
    with client() as server:
        found = server.plain(calls.list_deliveries(name, "dead" if dead else None))

    def render(console: Console) -> None:
        rows = [(one["event"], one["state"], one["tries"], one["error"], when(one["created_at"])) for one in found]
        console.print(table(("#event", "state", "#tries", "error", "since"), rows))

    show(found, as_json, render)


@app.command("redeliver")
def redeliver(
    name: Name, event: Annotated[int, typer.Argument(help="Number of the event.")], as_json: AsJson = False
) -> None:
    """Send an event that has not arrived once more, now."""
    with client() as server:
        found = server.plain(calls.redeliver_event(name, event))
    show(found, as_json, lambda console: console.print(f"event {event} is sent again"))
