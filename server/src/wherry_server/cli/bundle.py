"""`wherry bundle` and `wherry model`: push, list, show."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from wherry_server import calls
from wherry_server.cli.common import GLOBALS, AsJson, client, show, size, table, when
from wherry_shared.access import find_access
from wherry_shared.errors import RefusedError

app = typer.Typer(name="bundle", help="Signed releases of models.", no_args_is_help=True)


@app.command("push")
def push_bundle(
    path: Annotated[Path, typer.Argument(help="Folder of a built and signed bundle.", exists=True, file_okay=False)],
    key: Annotated[Path | None, typer.Option(help="Publisher's key (WHERRY_PUBLISHER_KEY).")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload what the server lacks, hand in the signed bin, release the bundle."""
    from wherry_shared.publishing import PublisherKey, Remote, push

    access = find_access(GLOBALS.server, GLOBALS.token)
    quiet = as_json or GLOBALS.as_json
    with (
        Remote(access.server, access.token, ca=access.ca) as remote,
        Progress(
            TextColumn("uploading"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet,
        ) as bar,
    ):
        task = bar.add_task("upload", total=None)
        pushed = push(
            path,
            remote,
            PublisherKey.find(key),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )

    def render(console: Console) -> None:
        what = "released" if pushed.outcome == "released" else "proposed: the bin needs more signatures"
        console.print(f"{pushed.target}  {what}")
        console.print(f"  manifest  {pushed.manifest}")
        console.print(f"  uploaded  {size(pushed.uploaded_bytes)} in {pushed.blobs} blobs")
        if pushed.outcome == "released":
            model, _, version = pushed.target.partition("/")
            console.print(f"next: wherry deploy {model}:{version} --device NAME")

    show(asdict(pushed), as_json, render)


@app.command("verify")
def verify_bundle(
    path: Annotated[Path, typer.Argument(help="Folder of a bundle.", exists=True, file_okay=False)],
    root_digest: Annotated[
        str, typer.Option(help="SHA-256 of the first root, the third part of any enrolment token.")
    ] = "",
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Of one that was not pushed yet: bytes and statements.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify a bundle without any server: its bytes, its provenance and bill of materials, its signatures up to the root."""
    from wherry_server.verifying import verify

    found = [asdict(link) for link in verify(path, datetime.now(UTC), root_digest=root_digest, unsigned=unsigned)]

    def render(console: Console) -> None:
        for link in found:
            console.print(f"ok  {link['what']:<10} {link['detail']}", markup=False)

    show(found, as_json, render)


@app.command("list")
def list_bundles(
    model: Annotated[str | None, typer.Option(help="Of this model only.")] = None, as_json: AsJson = False
) -> None:
    """List bundles, the newest version of each model first."""
    with client() as server:
        found = server.plain(calls.list_bundles(model))

    def render(console: Console) -> None:
        rows = [
            (
                bundle["model"],
                bundle["version"],
                ", ".join(variant["id"] for variant in bundle["variants"]),
                size(bundle["total_bytes"]),
                bundle["licence"],
                when(bundle["created_at"]),
            )
            for bundle in found
        ]
        console.print(table(("model", "version", "variants", "#size", "licence", "published"), rows))
        if not rows:
            console.print("no bundles yet; push one: wherry bundle push PATH")

    show(found, as_json, render)


@app.command("show")
def show_bundle(bundle: Annotated[str, typer.Argument(help="MODEL:VERSION")], as_json: AsJson = False) -> None:
    """Show a bundle: its variants with size, accuracy and latency, its interface, its licence."""
    model, version = split_bundle(bundle)
    with client() as server:
        found = server.plain(calls.show_bundle(model, version))
    show(found, as_json, lambda console: _render_bundle(console, found))


def split_bundle(text: str) -> tuple[str, str]:
    """Take MODEL:VERSION (or MODEL/VERSION) apart.

    Raises:
        RefusedError: `bundle_name_invalid`.
    """
    model, mark, version = text.replace("/", ":", 1).partition(":")
    if not mark or not model or not version:
        raise RefusedError(
            "bundle_name_invalid", f"{text[:120]!r} is not MODEL:VERSION", next_step="write my-model:1.0.0"
        )
    return model, version


def _render_bundle(console: Console, bundle: dict[str, Any]) -> None:
    config = bundle["config"]
    console.print(f"{bundle['model']} {bundle['version']}  {bundle['description']}".rstrip())
    console.print(f"  manifest   {bundle['manifest']}")
    console.print(f"  published  {when(bundle['created_at'])} by {bundle['created_by']}")
    licence = config["licence"]
    console.print(f"  licence    {licence['expression']}; {licence['attribution']} ({licence['source']})")
    for kind in ("inputs", "outputs"):
        for spec in config["interface"][kind]:
            shape = ", ".join(str(axis) for axis in spec["shape"])
            console.print(f"  {kind[:-1]:<9}  {spec['name']}: {spec['datatype']} ({shape})")
    rows = []
    for variant in bundle["variants"]:
        accuracy = variant["accuracy"]
        latencies = [figures["latency_p50_us"] for figures in variant["figures"].values()]
        rows.append(
            (
                variant["id"],
                variant["format"],
                variant["precision"],
                size(variant["bytes"]),
                size(variant["download_bytes"]),
                ""
                if accuracy is None
                else f"{accuracy['value']:.4f} ±{accuracy['standard_error']:.4f} {accuracy['metric']}",
                "" if not latencies else f"{min(latencies) / 1000:.2f} ms",
                ", ".join(variant["engines"]),
            )
        )
    console.print(
        table(("variant", "format", "precision", "#size", "#download", "accuracy", "#median", "engines"), rows)
    )
