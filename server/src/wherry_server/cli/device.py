"""`wherry device`: list, show, logs; let in, shut out."""

from __future__ import annotations

import hashlib
import json
import shlex
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, IfMatch, client, labels_of, show, size, table, when
from wherry_shared.errors import RefusedError, UnreachableError

if TYPE_CHECKING:
    from wherry_server.client import Client

app = typer.Typer(name="device", help="Enrolled devices.", no_args_is_help=True)

LOGS_POLL_S = 0.5
LOGS_WAIT_S = 30.0
"""How long a device may take to send its log lines."""

Device = Annotated[str, typer.Argument(help="Name or id of a device.")]


@app.command("list")
def list_devices(
    name: Annotated[str | None, typer.Option(help="Part of the name.")] = None,
    state: Annotated[
        str | None, typer.Option(help="State of the device, or of a model on it (trial, failed, …).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Devices that said something about this model.")] = None,
    cohort: Annotated[str | None, typer.Option(help="Members of this cohort.")] = None,
    selector: Annotated[str | None, typer.Option(help="Devices that this selector takes.")] = None,
    as_json: AsJson = False,
) -> None:
    """List devices and what runs on them."""
    with client() as server:
        found = server.plain(calls.list_devices(name, state, model, cohort, selector))["devices"]

    def render(console: Console) -> None:
        rows = [
            (
                device["name"],
                "simulated" if device["simulated"] else device["arch"],
                device["state"],
                ", ".join(_running(model) for model in device["models"]) or "nothing yet",
                " ".join(f"{key}={value}" for key, value in sorted(device["labels"].items())),
                when(device["last_seen_at"]),
            )
            for device in found
        ]
        console.print(table(("device", "kind", "state", "models", "labels", "seen"), rows))
        if not rows:
            console.print("no device fits; enrol one: wherry token create, then wherry-agent run")

    show(found, as_json, render)


def _running(model: dict[str, Any]) -> str:
    version = model["version"] or "none"
    text = f"{model['model']} {version}"
    if model["variant"]:
        text += f" ({model['variant']})"
    if model["state"] not in ("confirmed", "confirmed_idle"):
        text += f" [{model['state']}{': ' + model['reason'] if model['reason'] else ''}]"
    return text.replace("[", "\\[")


@app.command("show")
def show_device(
    device: Device,
    logs: Annotated[bool, typer.Option("--logs", help="Ask the device for its last log lines as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a device: which variant runs and why, latency, memory, the last reason, what it should have."""
    with client() as server:
        if logs:
            _fetch_logs(server, device, LOGS_WAIT_S)
        shown, tag = server.plain_tagged(calls.show_device(device))
    found = {**shown, "tag": tag}

    def render(console: Console) -> None:
        _render(console, found)
        if logs:
            for line in found["logs"]["lines"]:
                console.print(line, markup=False, soft_wrap=True)

    show(found, as_json, render)


def _render(console: Console, device: dict[str, Any]) -> None:
    facts = device["facts"]
    kind = "simulated device" if device["simulated"] else "device"
    console.print(f"{device['name']}  {kind} {device['id']}, {device['state']}, seen {when(device['last_seen_at'])}")
    console.print(
        f"  machine  {device['arch'] or 'unknown'}, {facts.get('cores', '?')} cores, "
        f"{size(facts.get('memory_bytes', 0))} memory, agent {device['agent'] or 'unknown'}"
    )
    console.print(f"  trust    set {device['trust_version'] or 'none'}, {device['trust_state'] or 'in order'}")
    console.print(f"  engines  {', '.join(device['engines']) or 'none reported'}")
    if device["labels"]:
        console.print("  labels   " + " ".join(f"{key}={value}" for key, value in sorted(device["labels"].items())))
    console.print(f"  tag      {device['tag']}")
    for model in device["models"]:
        _render_model(console, model)
    if not device["models"]:
        console.print("  models   nothing reported yet")
    offer = device["offer"]
    if offer is not None:
        known = (
            "the device has it"
            if offer["known_serial"] >= offer["serial"]
            else "the device has not said that it has it"
        )
        wanted = ", ".join(
            f"{name} → {model.get('target') or 'none'}" for name, model in sorted(offer["models"].items())
        )
        console.print(f"  offer    serial {offer['serial']} ({known}): {wanted or 'no models'}")
        for name, value in sorted(offer["flags"].items()):
            console.print(f"  flag     {name} = {json.dumps(value, ensure_ascii=False)}", markup=False)


def _render_model(console: Console, model: dict[str, Any]) -> None:
    version = model["version"] or model["running"] or "nothing"
    console.print(f"  {model['model']}  runs {version}; state {model['state']}, {when(model['updated_at'])}")
    if model["variant"]:
        memory = f", peak {size(model['peak_memory_bytes'])}" if model["peak_memory_bytes"] else ""
        engine = f" on {model['engine']}" if model["engine"] else ""
        console.print(f"    variant  {model['variant']}{engine}{memory}")
    if model["why"]:
        console.print(f"    why      {model['why']}")
    if model["canary_p50_us"]:
        console.print(
            f"    canary   {model['canary_p50_us'] / 1000:.2f} ms median, {model['canary_p99_us'] / 1000:.2f} ms p99"
        )
    latency = model["latency"]
    if latency is not None and latency["p50_us"] is not None:
        console.print(
            f"    latency  {latency['p50_us'] / 1000:.2f} ms median, {latency['p99_us'] / 1000:.2f} ms p99 "
            f"over {latency['requests']} requests, {latency['errors']} errors"
        )
    if model["reason"]:
        console.print(f"    reason   {model['reason']}: {model['detail']}", markup=False)
    for variant in model["variants"]:
        if variant["id"] != model["variant"] or model["manifest"] != model["running"]:
            text = f"    {variant['outcome']:<8} {variant['id']} {variant.get('reason', '')} {variant.get('why', '')}"
            console.print(text.rstrip(), markup=False)


@app.command("revoke")
def revoke_device(device: Device, if_match: IfMatch = "", as_json: AsJson = False) -> None:
    """Shut a device out at once; its name stays taken."""
    _end(device, "revoke", if_match, as_json)


@app.command("decommission")
def decommission_device(
    device: Device,
    wipe: Annotated[
        Literal["nothing", "models", "all"] | None,
        typer.Option(
            help="Have it stop for good and remove this, as far as its own settings allow.",
            show_default="it is told nothing",
        ),
    ] = None,
    if_match: IfMatch = "",
    as_json: AsJson = False,
) -> None:
    """Take a device out of the fleet; its name is free for a new enrolment."""
    _end(device, "decommission", if_match, as_json, wipe or "")


@app.command("readmit")
def readmit_device(device: Device, as_json: AsJson = False) -> None:
    """Let a device in again that was revoked, in quarantine for flooding, or away for longer than it may be."""
    with client() as server:
        found = server.plain(calls.readmit_device(device))
    show(found, as_json, lambda console: console.print(f"{device} is {found['state']} again"))


Key = Annotated[str, typer.Argument(help="First twelve digits of its key, or the name under which it asks.")]


@app.command("expect")
def expect_device(
    key: Annotated[
        Path, typer.Option("--key", help="File with its public key in PEM, as wherry-agent key prints it.", exists=True)
    ],
    name: Annotated[str, typer.Option(help="Name that it gets.", show_default="its own choice")] = "",
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE put on it; may be repeated.")] = None,
    days: Annotated[int, typer.Option(help="How long it may take to come.", min=1)] = 30,
    as_json: AsJson = False,
) -> None:
    """Let a device in by its key when it comes; what is pasted on it is no secret."""
    with client() as server:
        made = server.plain(calls.expect_device(key.read_text(), name, labels_of(label), days))
    show(made, as_json, lambda console: console.print(made["token"], soft_wrap=True))


@app.command("invite")
def invite_device(
    count: Annotated[int, typer.Option(help="How many devices may come by this line.", min=1)] = 1,
    days: Annotated[int, typer.Option(help="How long it is good.", min=1)] = 7,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE put on each; may be repeated.")] = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="Each device waits until its key is accepted: wherry device pending.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print one line to paste on a Raspberry Pi: it installs the agent from this server, enrols it and starts it."""
    with client() as server:
        server.send(calls.list_enrolment_requests(limit=1))  # who may not invite is told that first
        if not server.server.startswith("https:"):
            raise RefusedError(
                "invite_needs_https",
                f"devices cannot be invited to {server.server}: it is not served by HTTPS",
                consequence="no token was made",
                next_step="serve an address of this machine that devices reach: wherry dev --lan ADDRESS",
            )
        program: bytes = server.send(calls.Call(method="GET", path="/install/join.py", result=bytes))
        shown: bytes = server.send(calls.Call(method="GET", path="/install/ca.pem", result=bytes))
        authority = ssl.PEM_cert_to_DER_cert(shown.decode())
        token = server.send(calls.create_enrolment_token(count, days, labels_of(label), hold=hold)).token
        address = server.server
    quoted = shlex.quote(address)
    line = (
        f"f=$(mktemp) && curl -fsSk {quoted}/install/join.py -o $f"
        f" && echo '{hashlib.sha256(program).hexdigest()}  '$f | sha256sum -c --status"
        f" && echo {token} | python3 -I $f {quoted} --ca {hashlib.sha256(authority).hexdigest()} --token -"
        + (" --many" if count > 1 else "")
    )

    def render(_console: Console) -> None:
        print(line)  # as it is, whatever the width of the terminal

    show({"line": line, "uses": count, "days": days}, as_json, render)


@app.command("pending")
def pending_devices(as_json: AsJson = False) -> None:
    """List the keys that wait to be accepted, may enrol, or were refused."""
    with client() as server:
        found = server.plain(calls.list_enrolment_requests())

    def render(console: Console) -> None:
        rows = [
            (one["key"].removeprefix("sha256:")[:12], one["name"], one["state"], when(one["created_at"]))
            for one in found
        ]
        console.print(table(("key", "name", "state", "since"), rows))

    show(found, as_json, render)


@app.command("accept")
def accept_device(key: Key, as_json: AsJson = False) -> None:
    """Accept a device that waits; compare its key with what wherry-agent key prints on it."""
    _settle(key, "accept", as_json)


@app.command("refuse")
def refuse_device(key: Key, as_json: AsJson = False) -> None:
    """Refuse a device that waits."""
    _settle(key, "refuse", as_json)


def _settle(key: str, verdict: Literal["accept", "refuse"], as_json: bool) -> None:
    with client() as server:
        found = server.plain(calls.settle_enrolment(key, verdict))
    word = {"expected": "may enrol", "refused": "may not enrol"}[found["state"]]
    show(found, as_json, lambda console: console.print(f"{found['name'] or found['key']} {word}"))


def _end(device: str, ending: Literal["revoke", "decommission"], if_match: str, as_json: bool, wipe: str = "") -> None:
    with client() as server:
        found = server.plain(calls.end_device(device, ending, if_match, wipe))
    show(found, as_json, lambda console: console.print(f"{device} is {found['state']}"))


@app.command("logs")
def device_logs(
    device: Device,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the device to send them.", min=0)] = LOGS_WAIT_S,
    as_json: AsJson = False,
) -> None:
    """Ask a device for its last log lines and print them."""
    with client() as server:
        found = _fetch_logs(server, device, wait)

    def render(console: Console) -> None:
        for line in found["lines"]:
            console.print(line, markup=False)

    show(found, as_json, render)


def _fetch_logs(server: Client, device: str, wait_s: float) -> dict[str, Any]:
    requested_at = server.send(calls.request_logs(device)).requested_at
    deadline = time.monotonic() + wait_s
    while True:
        found: dict[str, Any] = server.plain(calls.show_logs(device))
        if found["received_at"] >= requested_at:
            return found
        if time.monotonic() >= deadline:
            raise UnreachableError(
                "logs_late",
                f"{device} has not sent its log within {wait_s:.0f} s",
                consequence="the request stands: it sends them when it next reports",
                next_step="look again later with wherry device logs, or see when it was last seen: wherry device show",
            )
        time.sleep(LOGS_POLL_S)
