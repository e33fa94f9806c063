"""`wherry trust`: who may say what a bundle is, and how fresh that word is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli import ceremony
from wherry_server.cli.common import GLOBALS, AsJson, client, date, show, table
from wherry_shared.access import find_access
from wherry_shared.errors import RefusedError

if TYPE_CHECKING:  # tuf and cryptography cost a quarter of a second
    from wherry_shared.publishing import PublisherKey, Remote

app = typer.Typer(name="trust", help="The signing keys that devices trust.", no_args_is_help=True)
app.registered_commands.extend(ceremony.app.registered_commands)
app.registered_groups.extend(ceremony.app.registered_groups)

KeyFile = Annotated[Path | None, typer.Option(help="Publisher's key (WHERRY_PUBLISHER_KEY).")]


@app.callback()
def trust() -> None:
    """The signing keys that devices trust."""


@app.command("status")
def trust_status(as_json: AsJson = False) -> None:
    """Show roles with version and expiry, publishers with their models."""
    with client() as server:
        found = server.plain(calls.trust_state())
    show(found, as_json, lambda console: _render(console, found))


@app.command("role")
def show_role(
    role: Annotated[str, typer.Argument(help="Bin or publisher's role, or MODEL/VERSION for the bin of a release.")],
    proposed: Annotated[bool, typer.Option("--proposed", help="What waits for more signatures instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the signed metadata of a bin or publisher's role."""
    with client() as server:
        if proposed:
            found = server.send(calls.proposal(role))
        else:
            found = server.send(calls.bin_of_target(role) if "/" in role else calls.bin_by_role(role))
    decoded = json.loads(found) if found else None  # nobody signed it yet
    show(decoded, as_json, lambda console: console.print(found.decode(), markup=False, soft_wrap=True))


@app.command("withdraw")
def withdraw(role: Annotated[str, typer.Argument(help="Role of the proposal.")], as_json: AsJson = False) -> None:
    """Drop a proposal, so that another can be made."""
    with client() as server:
        server.send(calls.withdraw_proposal(role))
    show({"role": role, "withdrawn": True}, as_json, lambda console: console.print(f"the proposal for {role} is gone"))


@app.command("policy")
def set_model_policy(
    model: Annotated[str, typer.Argument(help="Model whose policy this is.")],
    floor: Annotated[
        str | None, typer.Option(help="Lowest version that devices may run; none: no floor.", show_default="as before")
    ] = None,
    revoke: Annotated[
        list[str] | None,
        typer.Option(help="Manifest digest that no device may install any more; DIGEST=stop: nor serve. Repeat it."),
    ] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Manifest digest whose revocation is taken back.")] = None,
    key: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign a change of a model's policy, floor and revocations; what is not named stays."""
    from wherry_shared.publishing import set_policy

    revoked = {}
    for item in revoke or []:
        digest, _, effect = item.partition("=")
        revoked[digest] = effect or "replace"
    with _signing(key) as (remote, opened):
        signed = set_policy(
            remote, opened, model, floor="" if floor == "none" else floor, revoked=revoked, allowed=allow or ()
        )

    def render(console: Console) -> None:
        holds = "holds" if signed.outcome == "accepted" else "is proposed: others have to sign it (wherry trust cosign)"
        console.print(f"{model}/policy, version {signed.version} of its publisher, {holds}")
        console.print(f"  floor    {signed.floor or 'none'}")
        for digest, effect in signed.revoked.items():
            console.print(f"  revoked  {digest} ({effect})", soft_wrap=True)

    show({"model": model, **asdict(signed)}, as_json, render)


@app.command("renew")
def renew_roles(key: KeyFile = None, as_json: AsJson = False) -> None:
    """Sign this publisher's roles anew; due every 90 days, or devices stop installing its releases."""
    from wherry_shared.publishing import renew

    _on_roles(renew, "signed anew", key, as_json)


@app.command("repair")
def repair_roles(key: KeyFile = None, as_json: AsJson = False) -> None:
    """Hand in again what this publisher signed and a server restored from a backup no longer has."""
    from wherry_shared.publishing import repair

    _on_roles(repair, "handed in again", key, as_json)


@app.command("adopt")
def adopt_roles(
    publisher: Annotated[str, typer.Argument(help="The publisher.")],
    partner: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Public key of another who signs for it; repeat it.", exists=True),
    ] = None,
    threshold: Annotated[int, typer.Option(help="How many of you sign together.", min=1)] = 1,
    former: Annotated[
        list[Path] | None, typer.Option(help="Public key that signed before and was replaced; repeat it.", exists=True)
    ] = None,
    former_threshold: Annotated[int, typer.Option(help="How many of those signed together.", min=1)] = 1,
    key: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign a publisher's roles with the keys that it has now: the first time with several, or after keys were replaced."""
    from wherry_shared import key_files
    from wherry_shared.publishing_parties import adopt

    def read(paths: list[Path] | None) -> list[Any]:
        return [key_files.parse_public(path.read_text(encoding="ascii", errors="replace")) for path in paths or []]

    with _signing(key) as (remote, opened):
        done = adopt(
            remote,
            opened,
            publisher,
            partners=read(partner),
            threshold=threshold,
            former=read(former),
            former_threshold=former_threshold,
        )

    def render(console: Console) -> None:
        for one in done:
            console.print(f"{one.role} version {one.version} {one.outcome}")
        if not done:
            console.print("nothing to be signed here; what others began: wherry trust cosign")

    show([asdict(one) for one in done], as_json, render)


@app.command("cosign")
def cosign_proposals(
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking; what changes was read before.")] = False,
    key: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Read what others of this publisher's keys proposed, and sign it too."""
    from wherry_shared.publishing_parties import cosign, proposals

    done: list[dict[str, str]] = []
    with _signing(key) as (remote, opened):
        for found in list(proposals(remote, opened)):
            if not yes:
                typer.echo("\n".join((found.role, *found.changes)), err=True)
                if not typer.confirm("Sign this?", err=True):
                    continue
            done.append({"role": found.role, "outcome": cosign(remote, opened, found)})

    def render(console: Console) -> None:
        for one in done:
            console.print(f"{one['role']} {one['outcome']}")
        if not done:
            console.print("nothing was signed")

    show(done, as_json, render)


def _on_roles(
    action: Callable[[Remote, PublisherKey], dict[str, str]], what: str, key: Path | None, as_json: bool
) -> None:
    with _signing(key) as (remote, opened):
        roles = action(remote, opened)
    proposed = [role for role, outcome in roles.items() if outcome != "accepted"]

    def render(console: Console) -> None:
        console.print(f"{what}: {', '.join(roles)}" if roles else f"nothing to be {what}")
        if proposed:
            console.print(f"not in force before others sign too (wherry trust cosign): {', '.join(proposed)}")

    show({"roles": roles}, as_json, render)


@contextmanager
def _signing(key: Path | None) -> Iterator[tuple[Remote, PublisherKey]]:
    """Connect to the server with the publisher's key of this machine."""
    from wherry_shared.publishing import PublisherKey, Remote

    access = find_access(GLOBALS.server, GLOBALS.token)
    opened = PublisherKey.find(key)
    if opened is None:
        raise RefusedError(
            "key_absent",
            "there is no publisher's key on this machine",
            consequence="nothing was signed",
            next_step="run this where bundles are signed, or name the key: --key FILE",
        )
    with Remote(access.server, access.token, ca=access.ca) as remote:
        yield remote, opened


def _render(console: Console, state: dict[str, Any]) -> None:
    console.print(f"root v1      sha256 {state['root_digest']} (what enrolment tokens carry)", soft_wrap=True)
    console.print(f"director     {', '.join(state['director_keyids'])}", soft_wrap=True)
    if state["development"]:
        console.print("development  root and targets keys are on the server: no offline ceremony protects them")
    rows = [
        (name, role["version"], role["threshold"], date(role["expires_at"])) for name, role in state["roles"].items()
    ]
    console.print(table(("role", "#version", "#threshold", "expires"), rows))
    publishers = [
        (
            publisher["name"],
            ", ".join(publisher["models"]),
            publisher["threshold"],
            len(publisher["bins"]),
            date(publisher["expires_at"]) if publisher["expires_at"] else "",
        )
        for publisher in state["publishers"]
    ]
    if publishers:
        console.print(table(("publisher", "models", "#threshold", "#bins in use", "expires"), publishers))
        for publisher in state["publishers"]:
            if publisher["unsigned"]:
                count, name = len(publisher["unsigned"]), publisher["name"]
                console.print(
                    f"{name} has new keys that have not signed {count} of its roles: wherry trust adopt {name}"
                )
    else:
        console.print("no publishers yet; the first wherry-optimizer sign registers one (in development)")
