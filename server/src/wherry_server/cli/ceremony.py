"""`wherry trust`, what people do together: keys, the first root, rotation, publishers, each prepared, signed, handed in."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from wherry_server import calls
from wherry_server.cli.common import AsJson, client, show, table
from wherry_shared.access import DEFAULT_DATA
from wherry_shared.errors import RefusedError

if TYPE_CHECKING:  # tuf and cryptography cost a quarter of a second
    from securesystemslib.signer import SSlibKey

    from wherry_server.ceremony import Ceremony

app = typer.Typer()
root = typer.Typer(name="root", help="The root of trust: who holds its keys.", no_args_is_help=True)
director = typer.Typer(name="director", help="The key that signs offers.", no_args_is_help=True)
publisher = typer.Typer(name="publisher", help="Who may release which models.", no_args_is_help=True)
for group in (root, director, publisher):
    app.add_typer(group)

Folder = Annotated[Path, typer.Argument(help="Folder of the ceremony; it holds no secret.", metavar="FOLDER")]
Holders = Annotated[list[Path], typer.Option("--key", help="A holder's public key (FILE.pub); repeat it.", exists=True)]
Online = Annotated[Path, typer.Option(help="Folder that `wherry trust online-keys` wrote.", exists=True)]
Data = Annotated[Path | None, typer.Option(help="Data folder of a server on this machine.", envvar="WHERRY_DATA")]
Threshold = Annotated[int, typer.Option(help="How many of the keys have to sign.", min=1)]


@app.command("key")
def make_key(
    file: Annotated[
        Path,
        typer.Argument(
            help="Where the key goes: a file, with its public half as FILE.pub beside it; or pkcs11:TOKEN/ID."
        ),
    ],
    public: Annotated[Path | None, typer.Option(help="Where the public half goes.", show_default="FILE.pub")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a signing key in an encrypted file (password typed, or in WHERRY_KEY_PASSWORD_FILE) or in a security module."""
    from wherry_shared import key_files, key_holders

    if str(file).startswith(key_holders.PREFIX):
        held = key_holders.make_in_module(str(file))
        public = public or Path(f"{str(file).removeprefix(key_holders.PREFIX).replace('/', '-')}.pub")
        public.write_text(key_files.public_pem(held), encoding="ascii")
        made = {"key": str(file), "public": str(public), "keyid": held.public_key.keyid}
        show(
            made,
            as_json,
            lambda console: console.print(f"{file}, never out of its module; {public}, key {made['keyid'][:12]}"),
        )
        return
    password = key_files.password_of(f"the new key {file}", fresh=True)
    try:
        signer = key_files.create(file, password)
    except FileExistsError as error:
        raise RefusedError(
            "key_taken", f"{file} is there already", consequence="it was left alone", next_step="choose another name"
        ) from error
    public = public or file.with_name(file.name + ".pub")
    public.write_text(key_files.public_pem(signer), encoding="ascii")
    found = {"key": str(file), "public": str(public), "keyid": signer.public_key.keyid}
    show(found, as_json, lambda console: console.print(f"{file} (encrypted) and {public}, key {found['keyid'][:12]}"))


@app.command("online-keys")
def online_keys(
    out: Annotated[Path, typer.Argument(help="Where the public halves go, as ROLE.pub.")],
    role: Annotated[list[str] | None, typer.Option(help="snapshot, timestamp or director; all by default.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """On a server: make the keys that it signs with, or those that are to replace them; they never leave it."""
    from wherry_server.settings import Settings
    from wherry_server.trust import Trust
    from wherry_server.trust_keys import ONLINE

    settings = Settings.load(data or DEFAULT_DATA)
    pems = Trust.online_keys(settings.trust_folder, role or ONLINE)
    out.mkdir(parents=True, exist_ok=True)
    for name, pem in pems.items():
        (out / f"{name}.pub").write_text(pem, encoding="ascii")
    show(pems, as_json, lambda console: console.print(f"public keys of {', '.join(pems)} in {out}"))


@app.command("init")
def begin(
    folder: Folder,
    key: Holders,
    online: Online,
    threshold: Threshold = 2,
    as_json: AsJson = False,
) -> None:
    """Prepare the first root and targets of a repository, with keys that people hold: 2 of at least 3 by default."""
    from wherry_server.ceremony import Ceremony

    if len(key) <= threshold:
        raise RefusedError(
            "keys_few",
            f"{len(key)} keys for a threshold of {threshold}: one lost key would be the end of it",
            consequence="nothing was prepared",
            next_step="name one holder more than have to sign",
        )
    held = Ceremony(folder)
    held.begin([_key(path) for path in key], threshold, _online(online), _now())
    _prepared(held, as_json)


@app.command("fetch")
def fetch(
    folder: Folder,
    root_digest: Annotated[str, typer.Option(help="SHA-256 of the first root, where the folder is new.")] = "",
    as_json: AsJson = False,
) -> None:
    """Bring what holds on the server into the folder, verified from its first root on."""
    from wherry_server.ceremony import Ceremony

    with client() as server:
        found = server.send(calls.offline_metadata())
    held = Ceremony(folder)
    held.load([text.encode() for text in found["roots"]], found["targets"].encode(), root_digest)
    versions = {"root": len(found["roots"]), "folder": str(folder)}
    show(versions, as_json, lambda console: console.print(f"{folder} holds {len(found['roots'])} roots, verified"))


@root.command("rotate")
def rotate(
    folder: Folder,
    add: Annotated[list[Path] | None, typer.Option(help="Public key of a holder who comes.", exists=True)] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Beginning of the key id of a holder who goes.")] = None,
    threshold: Annotated[int | None, typer.Option(help="How many have to sign from now on.", min=1)] = None,
    online: Annotated[Path | None, typer.Option(help="Folder with new keys of the server.", exists=True)] = None,
    as_json: AsJson = False,
) -> None:
    """Prepare the next root: other holders, another threshold, other keys of the server."""
    held = _held(folder)
    keys = _online(online) if online else {}
    held.rotate(_now(), add=[_key(path) for path in add or []], remove=remove or [], threshold=threshold, online=keys)
    _prepared(held, as_json)


@root.command("renew")
def renew(folder: Folder, as_json: AsJson = False) -> None:
    """Prepare root and targets that say the same for another year."""
    held = _held(folder)
    held.renew(_now())
    _prepared(held, as_json)


@director.command("rotate")
def rotate_director(
    folder: Folder,
    online: Online,
    keep: Annotated[
        bool, typer.Option("--keep", help="Let offers of the old key be good too; never after theft.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prepare targets that name another director key."""
    held = _held(folder)
    key = _online(online).get("director")
    if key is None:
        raise RefusedError(
            "online_keys_missing",
            f"{online} holds no director.pub",
            next_step="on the server: wherry trust online-keys OUT --role director",
        )
    held.replace_director(_now(), key, keep=keep)
    _prepared(held, as_json)


@publisher.command("add")
def add_publisher(
    name: Annotated[str, typer.Argument(help="Whom to trust.")],
    key: Annotated[list[Path], typer.Option(help="File with a public key (PEM); may be repeated.", exists=True)],
    model: Annotated[list[str], typer.Option(help="Model that the publisher may release; may be repeated.")],
    threshold: Threshold = 1,
    ceremony: Annotated[
        Path | None, typer.Option(help="Prepare it in this folder; else the server does it at once, in development.")
    ] = None,
    bits: Annotated[
        int, typer.Option(help="With a ceremony: 2^BITS hash bins of the project's 256.", min=1, max=8)
    ] = 5,
    as_json: AsJson = False,
) -> None:
    """Delegate models to a publisher; one of this name gets these keys instead of its own (with a ceremony)."""
    if ceremony is not None:
        held = _held(ceremony)
        held.publisher(_now(), name, [_key(path) for path in key], model, threshold, bits)
        _prepared(held, as_json)
        return
    pems = [file.read_text(encoding="ascii", errors="replace") for file in key]
    with client() as server:
        found = server.plain(calls.add_publisher(name, pems, model, threshold))
    show(found, as_json, lambda console: console.print(f"{name} may release {', '.join(found['models'])}"))


@publisher.command("revoke")
def revoke_publisher(
    folder: Folder, name: Annotated[str, typer.Argument(help="Whom to trust no more.")], as_json: AsJson = False
) -> None:
    """Prepare targets without a publisher: no device installs anything of it any more."""
    held = _held(folder)
    held.revoke_publisher(_now(), name)
    _prepared(held, as_json)


@app.command("show")
def show_ceremony(folder: Folder, as_json: AsJson = False) -> None:
    """Say what holds, what a ceremony would change, and whose signatures are missing."""
    held = _held(folder)
    lines = list(held.holds())
    prepared = held.next_root() is not None or held.next_targets() is not None
    if prepared:
        held.check(_now())
        lines += ["to be:", *held.changes()]

    def render(console: Console) -> None:
        console.print(*lines, sep="\n", markup=False)
        if prepared:
            _render_needs(console, held)

    show({"folder": str(folder), "lines": lines, "needs": _needs(held) if prepared else []}, as_json, render)


@app.command("sign")
def sign(
    folder: Folder,
    key: Annotated[str, typer.Option(help="A holder's private key: a file, or pkcs11:LABEL.")],
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking; what changes was read before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read what changes, and sign it."""
    from wherry_server.ceremony import Ceremony
    from wherry_shared.key_holders import open_key, using

    held = Ceremony(folder)
    held.check(_now())
    if not yes:
        for line in held.changes():
            typer.echo(line, err=True)
        typer.confirm("Sign this?", abort=True, err=True)
    signer = open_key(key)
    with using(signer):
        done = held.sign(signer, _now())

    def render(console: Console) -> None:
        console.print(f"signed {' and '.join(done)}")
        _render_needs(console, held)

    show({"signed": done, "needs": _needs(held)}, as_json, render)


@app.command("submit")
def submit(
    folder: Folder,
    data: Annotated[
        Path | None, typer.Option(help="Data folder of a server that has not begun; else it goes over the API.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Hand in what holds already: to a server restored from an old backup.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hand in what enough holders signed."""
    from wherry_server.ceremony import Ceremony
    from wherry_server.settings import Settings
    from wherry_server.trust import Trust

    held = Ceremony(folder)
    roots, targets = held.holding() if again else held.whole(_now())
    if data is not None:
        trust = Trust.found(Settings.load(data).trust_folder, roots, targets)
        found: dict[str, Any] = {"root": len(roots), "root_digest": trust.root_digest}
    else:
        with client() as server:
            found = server.plain(calls.put_offline(roots, targets))
    if not again:
        held.hold()
    show(
        found,
        as_json,
        lambda console: console.print("this holds now: " + ", ".join(f"{k} {v}" for k, v in found.items())),
    )


def _held(folder: Path) -> Ceremony:
    from wherry_server.ceremony import Ceremony

    return Ceremony(folder)


def _key(path: Path) -> SSlibKey:
    from wherry_shared import key_files

    return key_files.parse_public(path.read_text(encoding="ascii", errors="replace"))


def _online(folder: Path) -> dict[str, SSlibKey]:
    return {path.stem: _key(path) for path in sorted(folder.glob("*.pub"))}


def _now() -> datetime:
    return datetime.now(UTC)


def _needs(held: Ceremony) -> list[dict[str, Any]]:
    return [
        {
            "role": need.role,
            "keys": need.by,
            "signed": len(need.signed),
            "threshold": need.threshold,
            "missing": list(need.unsigned),
        }
        for need in held.needs()
    ]


def _prepared(held: Ceremony, as_json: bool) -> None:
    lines = list(held.changes())

    def render(console: Console) -> None:
        console.print(*lines, sep="\n", markup=False)
        _render_needs(console, held)

    show({"folder": str(held.folder), "changes": lines, "needs": _needs(held)}, as_json, render)


def _render_needs(console: Console, held: Ceremony) -> None:
    needs = _needs(held)
    rows = [
        (
            need["role"],
            need["keys"],
            f"{need['signed']} of {need['threshold']}",
            ", ".join(k[:12] for k in need["missing"]),
        )
        for need in needs
    ]
    console.print(table(("role", "signed by", "#signed", "not yet signed"), rows))
    met = all(need["signed"] >= need["threshold"] for need in needs)
    verb = "submit" if met else "sign"
    console.print(f"next: wherry trust {verb} {held.folder}" + ("" if met else " --key FILE"))
