"""`wherry quarantine`: where a bundle is not offered again, and letting it be offered once more."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, client, show, table, when

app = typer.Typer(name="quarantine", help="Devices and hardware on which a bundle failed.", no_args_is_help=True)


@app.command("list")
def list_devices(
    model: Annotated[str | None, typer.Option(help="For this model.")] = None,
    reason: Annotated[str | None, typer.Option(help="With this reason.")] = None,
    device: Annotated[str | None, typer.Option(help="This device, by id or name.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the devices in quarantine and why they are there."""
    found = client().plain(calls.list_quarantine(model or "", reason or "", device or ""))

    def render(out: Console) -> None:
        rows = [
            (one["name"], one["target"], one["reason"], one["rollout"], one["attempt"], when(one["settled_at"]))
            for one in found
        ]
        out.print(table(["DEVICE", "BUNDLE", "REASON", "#ROLLOUT", "#ATTEMPT", "SINCE"], rows))

    show(found, as_json, render)


@app.command()
def release(
    device: Annotated[str, typer.Argument(help="Device, by id or name.")],
    model: Annotated[str, typer.Argument(help="Model.")],
    as_json: AsJson = False,
) -> None:
    """Let a device out: the next rollout offers it the bundle as a new attempt."""
    done = client().plain(calls.release_device(device, model))
    show(done, as_json, lambda out: out.print(f"{done['name']} is out of quarantine for {model}"))


@app.command()
def hardware(as_json: AsJson = False) -> None:
    """List the bundles that are known to be bad, by hardware class."""
    found = client().plain(calls.list_hardware())

    def render(out: Console) -> None:
        rows = [
            (one["target"], one["hardware_class"], one["reason"], one["devices"], one["manifest"][:19]) for one in found
        ]
        out.print(table(["BUNDLE", "HARDWARE", "REASON", "#FAILED", "MANIFEST"], rows))

    show(found, as_json, render)


@app.command()
def clear(
    target: Annotated[str, typer.Argument(help="MODEL/VERSION, or the manifest digest.")],
    hardware_class: Annotated[str, typer.Argument(metavar="HARDWARE", help="Hardware class, as listed.")],
    as_json: AsJson = False,
) -> None:
    """Let a bundle be offered again on a hardware class; devices on which it failed stay in quarantine."""
    api = client()
    known = api.plain(calls.list_hardware())
    manifest = next((one["manifest"] for one in known if one["target"] == target), target)
    api.send(calls.clear_hardware(manifest, hardware_class))
    done = {"manifest": manifest, "hardware_class": hardware_class}
    show(done, as_json, lambda out: out.print(f"{target} may be offered on {hardware_class} again"))
