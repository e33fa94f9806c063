"""`wherry keys`: the keys of the `keys` role, on the machine that keeps them. The server's own processes never open them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from wherry_server.cli.common import AsJson, show
from wherry_server.cli.serve import Data
from wherry_server.settings import Settings

if TYPE_CHECKING:
    from wherry_server.keys_role import KeysRole

app = typer.Typer(name="keys", help="Content keys of encrypted bundles: the keys role.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of the role's keys, on the machine that runs it.")]
T = TypeVar("T")


@app.command()
def init(folder: Folder, as_json: AsJson = False) -> None:
    """Make the role's key pair, the private half under a password; publishers encrypt for its public.pem."""
    _add(folder, as_json, fresh=True)


@app.command()
def rotate(folder: Folder, data: Data = None, as_json: AsJson = False) -> None:
    """Make the role's next key pair and seal every content key in the database for it; the old one stays until `prune`."""
    from wherry_server import keys_role

    keys_role.open_ring(
        Settings.load(data, content_keys=str(folder))
    )  # before there is a new one: does the old one open?
    name = _new(folder)
    count = _with_role(data, folder, lambda role: role.reseal())

    def render(console: Console) -> None:
        console.print(f"{count} content keys are sealed for {name} now; give publishers {folder}/public.pem")
        console.print("Start wherry serve keys again, so that it has the new key.")

    show({"key": name, "resealed": count}, as_json, render)


@app.command()
def prune(folder: Folder, data: Data = None, as_json: AsJson = False) -> None:
    """Remove private keys for which nothing in the database is sealed any more; the current one stays."""
    from wherry_shared import content_keys
    from wherry_shared.key_ring import KeyRing

    _with_role(data, folder, lambda role: role.reseal())
    needed = _with_role(data, folder, lambda role: role.state())
    ring = KeyRing(folder)
    current = content_keys.fingerprint(ring.current())
    gone = [name for name in ring.names() if name not in needed and name != current]
    for name in gone:
        ring.drop(name)
    show({"removed": gone}, as_json, lambda console: console.print(f"{len(gone)} keys removed"))


@app.command()
def wrap(
    folder: Folder,
    bundle: Annotated[str, typer.Option(help="MODEL/VERSION, ahead of any rollout; else what devices lack now.")] = "",
    cohort: Annotated[str, typer.Option(help="With --bundle: for the devices of this cohort only.")] = "",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Wrap content keys once and end, where no process is to have the role's keys all the time."""

    async def work(role: KeysRole) -> int:
        if not bundle:
            return await role.wrap()
        return await role.wrap_bundle(bundle, cohort)

    count = _with_role(data, folder, work)
    show({"wrapped": count}, as_json, lambda console: console.print(f"{count} keys wrapped for devices"))


@app.command()
def status(folder: Folder, data: Data = None, as_json: AsJson = False) -> None:
    """Show for which keys content keys are sealed, and which of those are here."""
    from wherry_shared.key_ring import KeyRing

    found = _with_role(data, folder, lambda role: role.state())
    here = KeyRing(folder).names()
    rows = [{"key": name, "sealed": found.get(name, 0), "here": name in here} for name in sorted({*found, *here})]

    def render(console: Console) -> None:
        for row in rows:
            console.print(f"{row['key']}  {row['sealed']} content keys{'' if row['here'] else ', NOT HERE'}")

    show(rows, as_json, render)


def _add(folder: Path, as_json: bool, *, fresh: bool) -> None:
    from wherry_shared.errors import RefusedError
    from wherry_shared.key_ring import KeyRing

    if fresh and KeyRing(folder).names():
        raise RefusedError(
            "keys_exist", f"{folder} has keys already", next_step=f"for the next one: wherry keys rotate {folder}"
        )
    name = _new(folder)

    def render(console: Console) -> None:
        console.print(f"{name}: give {folder}/public.pem to publishers (wherry-optimizer encrypt --for public.pem)")
        console.print(f"Start: wherry serve keys --keys {folder}")

    show({"key": name, "public": str(folder / "public.pem")}, as_json, render)


def _new(folder: Path) -> str:
    from wherry_shared import content_keys, key_files
    from wherry_shared.key_ring import KeyRing

    password = key_files.password_of(f"the new key of the keys role in {folder}", fresh=True)
    return content_keys.fingerprint(KeyRing(folder).add(password))


def _with_role(data: Path | None, folder: Path, work: Callable[[KeysRole], Awaitable[T]]) -> T:
    from wherry_server import keys_role
    from wherry_server.db.database import Database

    settings = Settings.load(data, content_keys=str(folder))
    ring = keys_role.open_ring(settings)

    async def run() -> T:
        database = Database.open(settings.database_url)
        try:
            return await work(keys_role.KeysRole(database, settings.project, ring))
        finally:
            await database.close()

    return asyncio.run(run())
