"""`wherry token`: for devices that enrol, and for people and machines that operate."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, IfMatch, client, date, labels_of, show, table, when

app = typer.Typer(name="token", help="Tokens: for devices that enrol, for people and machines.", no_args_is_help=True)


TokenId = Annotated[str, typer.Argument(help="Id as in wherry token list.")]


@app.command("create")
def create_enrolment_token(
    uses: Annotated[int, typer.Option(help="How many devices may enrol with it.", min=1)] = 1,
    days: Annotated[int, typer.Option(help="How long it is good.", min=1)] = 7,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE put on each device; may be repeated.")] = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Each device waits until its key is accepted: wherry device pending.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the token only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a token by which devices enrol; it is shown this once."""
    with client() as server:
        made = server.plain(calls.create_enrolment_token(uses, days, labels_of(label), hold=hold))
        address = server.server

    def render(console: Console) -> None:
        if quiet:
            console.print(made["token"], soft_wrap=True)
            return
        console.print(f"for {uses} device{'s' if uses > 1 else ''}, {days} days, shown this once:")
        console.print(made["token"], soft_wrap=True)
        console.print(f"next: wherry-agent run --server {address} --token TOKEN --home DIR --name NAME", soft_wrap=True)

    show(made, as_json, render)


@app.command("api")
def create_api_token(
    name: Annotated[str, typer.Argument(help="Whose token it is; stands in the audit log.")],
    role: Annotated[str, typer.Option(help="viewer, operator, approver, publisher or admin.")] = "viewer",
    model: Annotated[list[str] | None, typer.Option(help="It changes only this model; may be repeated.")] = None,
    cohort: Annotated[list[str] | None, typer.Option(help="It changes only this cohort; may be repeated.")] = None,
    days: Annotated[int, typer.Option(help="How long it is good.", min=1)] = 90,
    as_json: AsJson = False,
) -> None:
    """Make a token for a person or machine; it is shown this once."""
    with client() as server:
        made = server.plain(calls.create_token(name, role, days, model or (), cohort or ()))
    show(made, as_json, lambda console: console.print(made["token"], soft_wrap=True))


@app.command("list")
def list_tokens(
    name: Annotated[str, typer.Option(help="Part of the name.")] = "",
    role: Annotated[str | None, typer.Option(help="Of this role.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the tokens of people and machines, without their secrets."""
    with client() as server:
        found = server.plain(calls.list_tokens(name, role))

    def render(console: Console) -> None:
        rows = [
            (
                token["id"],
                token["name"],
                token["role"],
                ", ".join([*token["models"], *token["cohorts"]]),
                when(token["created_at"]),
                date(token["expires_at"]),
            )
            for token in found
        ]
        console.print(table(("id", "name", "role", "narrowed to", "made", "good until"), rows))

    show(found, as_json, render)


@app.command("show")
def show_token(token_id: TokenId, as_json: AsJson = False) -> None:
    """Show a token of a person or machine, without its secret."""
    with client() as server:
        found, tag = server.plain_tagged(calls.show_token(token_id))

    def render(console: Console) -> None:
        console.print(f"{found['id']}  {found['role']} {found['name']}, good until {date(found['expires_at'])}")
        console.print(f"tag  {tag}", soft_wrap=True)

    show({**found, "tag": tag}, as_json, render)


@app.command("revoke")
def revoke_token(token_id: TokenId, if_match: IfMatch = "", as_json: AsJson = False) -> None:
    """Revoke a token; from then on it opens nothing."""
    with client() as server:
        server.send(calls.revoke_token(token_id, if_match))
    show(
        {"id": token_id, "revoked": True}, as_json, lambda console: console.print(f"{token_id} opens nothing any more")
    )
