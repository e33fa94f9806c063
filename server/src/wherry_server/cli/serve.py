"""`wherry dev` and `wherry serve`: start a development server, or one role of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from wherry_server.cli.common import AsJson, show
from wherry_server.settings import Settings
from wherry_shared.access import DEFAULT_DATA
from wherry_shared.errors import RefusedError

commands = typer.Typer()

Data = Annotated[
    Path | None, typer.Option(help="Data folder (WHERRY_DATA).", envvar="WHERRY_DATA", show_default=str(DEFAULT_DATA))
]
Port = Annotated[int | None, typer.Option(help="Port of the API.", min=1, max=65535, show_default="8400, or as before")]
BrokerPort = Annotated[
    int | None, typer.Option(help="Port of the MQTT broker.", min=1, max=65535, show_default="8401, or as before")
]


@commands.command()
def dev(
    data: Data = None,
    port: Port = None,
    broker_port: BrokerPort = None,
    lan: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Serve real devices at this address of this machine: HTTPS and MQTT with certificates (needs mosquitto).",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Start everything on this machine: API, director, MQTT broker, SQLite, generated keys. For development."""
    from wherry_server import dev as development

    served: dict[str, Any] = {}
    if lan is not None:
        served = {"host": lan, "broker_host": lan, "https": True, "broker_tls": True, "device_certificates": "required"}
    development.run(Settings.load(data, port=port, broker_port=broker_port, **served), quiet=quiet)


@commands.command()
def init(
    data: Data = None,
    database: Annotated[
        str | None,
        typer.Option(help="SQLAlchemy URL, as postgresql+asyncpg://USER:PASSWORD@HOST/NAME.", show_default="SQLite"),
    ] = None,
    project: Annotated[
        str | None,
        typer.Option(help="Name of the project that this folder is for.", show_default="default, or as before"),
    ] = None,
    broker_host: Annotated[str | None, typer.Option(help="Host of the MQTT broker.", show_default="127.0.0.1")] = None,
    broker_port: BrokerPort = None,
    host: Annotated[str | None, typer.Option(help="Where the API listens.", show_default="127.0.0.1")] = None,
    port: Port = None,
    separate_ingest: Annotated[
        bool | None,
        typer.Option(help="Whether processes of their own store what devices say.", show_default="the director does"),
    ] = None,
    separate_publisher: Annotated[
        bool | None,
        typer.Option(
            help="Whether processes of their own take offers to the broker.", show_default="the director does"
        ),
    ] = None,
    blobs: Annotated[
        str | None,
        typer.Option(help="Where blobs are: file:///FOLDER or s3://BUCKET/PREFIX.", show_default="the data folder"),
    ] = None,
    s3_endpoint: Annotated[
        str | None, typer.Option(help="Address of the object store.", show_default="AWS_ENDPOINT_URL, or AWS")
    ] = None,
    s3_region: Annotated[str | None, typer.Option(help="Its region.", show_default="AWS_REGION")] = None,
    s3_public_endpoint: Annotated[
        str | None, typer.Option(help="Its address for devices, where that is another one.", show_default="the same")
    ] = None,
    content_keys: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the keys role, where this machine runs it (wherry keys init).", show_default="none"
        ),
    ] = None,
    presign_s: Annotated[
        int | None,
        typer.Option(
            help="Life of addresses that devices are sent to; 0: the API sends the bytes.", show_default="300"
        ),
    ] = None,
    development_trust: Annotated[
        bool,
        typer.Option(
            "--development-trust",
            help="Make root and targets keys on this machine, where no ceremony made a repository: for trying things out.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a data folder and a database ready for `wherry serve`; doing it again brings the schema to this release."""
    from wherry_server import dev as development
    from wherry_server.trust import Trust

    who = {None: None, True: "separate", False: "director"}
    _check_project(data, project)
    settings = Settings.load(
        data,
        database=database,
        project=project,
        broker_host=broker_host,
        broker_port=broker_port,
        host=host,
        port=port,
        ingest=who[separate_ingest],
        publisher=who[separate_publisher],
        blobs=blobs,
        s3_endpoint=s3_endpoint,
        s3_region=s3_region,
        s3_public_endpoint=s3_public_endpoint,
        presign_s=presign_s,
        content_keys=str(content_keys.absolute()) if content_keys is not None else None,
    )
    if not development_trust and not Trust.exists(settings.trust_folder):
        raise RefusedError(
            "ceremony_needed",
            f"nobody signed yet whose word devices of {settings.data} are to take",
            consequence="nothing was made ready",
            next_step="hold the first ceremony (docs/runbooks/ceremonies.md), or try things out with --development-trust",
        )
    shown = development.init(settings)
    keys = "development" if Trust.open(settings.trust_folder).public_state()["development"] else "offline"
    made = {
        "project": settings.project,
        "data": str(settings.data),
        "api": settings.url,
        "admin_token": shown.admin if shown.fresh else "",
        "enrolment_token": shown.enrolment,
        "trust": keys,
        "start": [f"wherry serve {role} --data {settings.data}" for role in settings.roles],
    }

    def render(console: Console) -> None:
        console.print(f"Ready: project {settings.project}, data in {settings.data}, API at {settings.url}")
        if shown.fresh:
            console.print(f"Admin token, shown this once: {shown.admin}\n  (kept in {settings.client_file}, mode 0600)")
        console.print(f"Enrolment token of devices: {shown.enrolment}")
        if keys == "development":
            console.print(
                "Root and targets keys were made on this machine, which is for development: for a fleet hold a ceremony first,"
                " or leave development by a rotation (docs/runbooks/ceremonies.md, root-rotation.md)"
            )
        console.print("Start, any number of each:", *made["start"], sep="\n  ")

    show(made, as_json, render)


def _check_project(data: Path | None, project: str | None) -> None:
    """Refuse to make a folder another project's: its keys are of the one that it was made for.

    Raises:
        RefusedError: `project_fixed`.
    """
    made = Settings.load(data)
    if project is not None and made.master_key_file.exists() and made.project != project:
        raise RefusedError(
            "project_fixed",
            f"{made.data} is of project {made.project}",
            consequence="nothing was changed",
            next_step="give each project a data folder of its own: wherry init --data DIR --project NAME",
        )


@commands.command()
def serve(
    role: Annotated[str, typer.Argument(help="api, director, ingest, publisher, keys or broker")],
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="Where this API listens.", show_default="as it was made")] = None,
    port: Port = None,
    part: Annotated[str, typer.Option(help="Of ingest: which part of the devices, as 1/4.")] = "1/1",
    keys: Annotated[
        Path | None,
        typer.Option(help="Of keys: the folder that `wherry keys init` made.", show_default="as wherry init was told"),
    ] = None,
) -> None:
    """Run one role of a server on a data folder that `wherry init` or `wherry dev` made ready."""
    from wherry_server import roles

    settings = Settings.load(data, host=host, port=port, content_keys=str(keys) if keys is not None else None)
    match role:
        case "api" | "director" | "ingest" | "publisher" | "keys" | "broker":
            roles.run(role, settings, part)
        case _:
            raise RefusedError(
                "role_unknown_here",
                f"there is no role {role[:40]!r}",
                next_step="say api, director, ingest, publisher, keys or broker",
            )
