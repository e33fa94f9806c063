"""`wherry-optimizer`: build, pack, inspect and sign bundles on a workstation."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from wherry_shared import unwanted
from wherry_shared.errors import DeviceError, WherryError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make small, proved, signed bundles of models.",
)
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
"""What is told as trouble with a disk; any other error of the system is a fault of this program."""
MEMORY_GB_MAX = 2.0**30
"""Of an option: what is more is no limit that an operating system could take."""
PIPED_COLUMNS = 140
"""Width of tables where nobody's window says how wide it is."""
out = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
err = Console(stderr=True, width=None if sys.stderr.isatty() else PIPED_COLUMNS)

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder in which NAME-VERSION is made, or that folder itself.")
]
Attribution = Annotated[
    str, typer.Option(help='Whose work it is, e.g. "Example Ltd"; else what the file says, else "not stated".')
]
ProcessingOf = Annotated[
    Path | None, typer.Option(help="TOML: the tables preprocess, postprocess and interface of a recipe.")
]
AssetFiles = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]FILE", help="A file for applications, e.g. thresholds.json; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder with an OCI image layout.")]


def _memory(gigabytes: float) -> int:
    """Return bytes of a limit."""
    if not 0 < gigabytes < MEMORY_GB_MAX:
        raise typer.BadParameter(f"more than 0 and less than {MEMORY_GB_MAX:.0f}", param_hint="--memory-gb")
    return int(gigabytes * 2**30)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _warn_unstated(attribution: str, licence: str) -> None:
    """Say that a bundle names nobody."""
    from wherry_optimizer.pack import UNSTATED

    if attribution == UNSTATED:
        err.print(
            'WARNING: the file does not say whose work the model is, so the bundle says "not stated"; '
            f"most licences, {licence} perhaps among them, ask for a name\n"
            'next: make it again with --attribution, e.g. --attribution "Example Ltd"',
            style="bold yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@contextlib.contextmanager
def _told(seconds: float) -> Iterator[Callable[[str], None]]:
    """Give what tells each step: a line each, and on a terminal below them a bar of the time that is left to it."""
    if not err.is_terminal:
        yield lambda text: err.print(text, style="dim", markup=False)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    began = time.monotonic()
    columns = (
        TextColumn("{task.fields[step]} steps"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("of {task.total:.0f} s"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("search", total=seconds, step=0)

        def say(text: str) -> None:
            progress.print(Text(text, style="dim"))
            progress.update(task, completed=time.monotonic() - began, step=progress.tasks[0].fields["step"] + 1)

        yield say


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a packaged recipe.")],
    output: Output = Path(),
    memory_gb: Annotated[float, typer.Option(help="Memory of the process that runs the passes at most.")] = 6.0,
    pass_seconds: Annotated[float, typer.Option(help="Time of one pass at most.")] = 1800.0,
    as_json: AsJson = False,
) -> None:
    """Make a bundle from a float model and labelled data, as a recipe says."""
    from wherry_optimizer import card, pipeline, report
    from wherry_optimizer.making import Limits

    limits = Limits(memory_bytes_max=_memory(memory_gb), seconds_max=pass_seconds)
    result = pipeline.build(
        recipe, output, progress=lambda text: err.print(text, style="dim", markup=False), limits=limits
    )
    written = card.write_build(result)
    if as_json:
        _print_json(written)
        return
    out.print(report.table(result.packed.config))
    out.print(report.proofs_table(result.bundled.proofs))
    out.print(report.refused(result))
    out.print(f"{result.path} ({result.packed.digest})", markup=False, highlight=False, soft_wrap=True)


@app.command()
def auto(
    model: Annotated[Path, typer.Argument(help="A float ONNX or TFLite file.")],
    *,
    data: Annotated[
        str,
        typer.Option(
            help="Samples: .npz, .csv, .parquet, a folder per class, or module:function. See docs/optimizer.md."
        ),
    ],
    metric: Annotated[str, typer.Option(help="Name of a metric, or module:function.")] = "accuracy",
    metric_output: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Output that the metric looks at; repeatable.")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="What the metric may lose: 0.005 is half a point.")] = 0.005,
    floor: Annotated[float | None, typer.Option(help="What the metric may not fall below.")] = None,
    max_error: Annotated[float, typer.Option(help="How far outputs may move, as a share of the float model's.")] = 0.5,
    strict: Annotated[bool, typer.Option(help="The whole interval of the drop has to be within --max-drop.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="x86-vnni, x86, arm-dotprod, jetson, phone or tflite; repeatable; by default this machine's."
        ),
    ] = None,
    prefer: Annotated[str, typer.Option(help="balanced, size, latency, memory or accuracy.")] = "balanced",
    seconds: Annotated[float, typer.Option(help="No candidate begins later than this.")] = 300.0,
    workers: Annotated[int, typer.Option(help="Candidates at a time.")] = 2,
    prune: Annotated[bool, typer.Option(help="Also try to prune.")] = True,
    state: Annotated[
        list[str] | None, typer.Option(metavar="INPUT=OUTPUT", help="An input that is the output of the step before.")
    ] = None,
    label: Annotated[str, typer.Option(help="Array or column of labels.")] = "label",
    reported: Annotated[
        Path | None, typer.Option(help="JSON: digest of a file → figures that devices reported.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of what was made already.")] = None,
    memory_gb: Annotated[float, typer.Option(help="Memory of one candidate's process at most.")] = 6.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    name: Annotated[str, typer.Option(help="Make a bundle of this name, of the model and all that was chosen.")] = "",
    version: Annotated[str, typer.Option(help="SemVer of the bundle.")] = "",
    licence: Annotated[str, typer.Option(help="SPDX expression, e.g. Apache-2.0, or LicenseRef-NAME.")] = "",
    attribution: Attribution = "",
    source: Annotated[str, typer.Option(help="Where the model comes from, e.g. an address.")] = "",
    processing: ProcessingOf = None,
    asset: AssetFiles = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for chosen files, the report and NAME-VERSION.")
    ] = Path("optimized"),
    as_json: AsJson = False,
) -> None:
    """Search for the smallest and fastest variant that loses no more than --max-drop, for each target.

    With --name, --version and --licence all of them become one bundle, ready to be signed.
    """
    from wherry_optimizer import assets, card, report
    from wherry_optimizer.auto import auto as search_all
    from wherry_optimizer.candidates import PREFERENCES
    from wherry_optimizer.shipping import Release

    if prefer not in PREFERENCES:
        raise typer.BadParameter(f"one of {', '.join(PREFERENCES)}", param_hint="--prefer")
    for value, option in ((version, "--version"), (licence, "--licence")):
        if bool(value) != bool(name):
            raise typer.BadParameter("a bundle needs --name, --version and --licence", param_hint=option)
    release = None
    if name:
        release = Release(
            name, version, licence, attribution, source, processing=processing, files=assets.named(asset or [])
        )
    pairs = [text.partition("=") for text in state or []]
    if not all(given and of for given, _, of in pairs):
        raise typer.BadParameter("INPUT=OUTPUT", param_hint="--state")
    with _told(seconds * max(1, len(target or []))) as say:
        result = search_all(
            model,
            data,
            metric=metric,
            outputs=metric_output or [],
            drop_max=max_drop,
            floor=floor,
            error_max=max_error,
            strict=strict,
            targets=target or [],
            output=output,
            release=release,
            cache=cache,
            prefer=prefer,
            seconds_max=seconds,
            workers=workers,
            prune=prune,
            state={name: of for name, _, of in pairs},
            label=label,
            reported=reported,
            memory_bytes_max=_memory(memory_gb),
            seed=seed,
            say=say,
        )
    if as_json:
        _print_json(card.as_dict(result))
        return
    for found in result.found:
        out.print(f"{found.target.name}: {found.chosen}, {found.reason}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"{output / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    if result.bundled is not None:
        packed = result.bundled.packed
        _warn_unstated(packed.config.licence.attribution, licence)
        out.print(report.table(packed.config))
        out.print(report.proofs_table(result.bundled.proofs))
        for warning in result.bundled.blind:
            err.print(f"WARNING: {warning}", style="bold yellow", markup=False, highlight=False, soft_wrap=True)
        out.print(f"{packed.path} ({packed.digest})", markup=False, highlight=False, soft_wrap=True)


@app.command("export-torch")
def export_torch(
    where: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="Returns a PyTorch module in evaluation mode, and its examples."
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")] = Path("model.onnx"),
    python: Annotated[
        Path | None, typer.Option(help="A Python that has torch and onnxscript; by default this one.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of the export at most.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Write a PyTorch module as ONNX, if the file answers its examples as the module does."""
    import msgspec

    from wherry_optimizer.exporting import from_torch

    made = from_torch(where, output, python=python, seconds_max=seconds)
    if as_json:
        _print_json(msgspec.to_builtins(made, enc_hook=str))
        return
    batch = "any batch" if made.dynamic else "shapes as in the examples"
    text = (
        f"{made.path}: {', '.join(made.inputs)} → {', '.join(made.outputs)}, {batch}, {made.error:.1g} from the module"
    )
    out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command("env")
def make_environment(
    tool: Annotated[str, typer.Argument(help="onnx2tf.")],
    *,
    python: Annotated[Path | None, typer.Option(help="The Python to make it from, new enough for the tool.")] = None,
) -> None:
    """Make the environment of a tool that cannot live beside this one, in the user's cache folder."""
    from wherry_optimizer import environments

    made = environments.make(tool, python, lambda text: err.print(text, style="dim", markup=False))
    out.print(str(made), markup=False, highlight=False, soft_wrap=True)


@app.command("convert-tflite")
def convert_tflite(
    model: Annotated[Path, typer.Argument(help="A float ONNX file.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The TFLite file to write.")] = Path("model.tflite"),
    batch: Annotated[int, typer.Option(min=1, help="The one length of the batch that the file will take.")] = 1,
    length: Annotated[
        list[str] | None, typer.Option(metavar="AXIS=N", help="Length of another axis that is free; repeatable.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Samples to compare on: .npz, an array per input; else made up.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of the conversion at most.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Convert ONNX to TFLite by onnx2tf, if the result has the same inputs and outputs and answers the same."""
    import msgspec

    from wherry_optimizer import converting

    pairs = [text.partition("=") for text in length or []]
    if any(not number.isdecimal() for _, _, number in pairs):
        raise typer.BadParameter("AXIS=N", param_hint="--length")
    lengths = {axis: int(number) for axis, _, number in pairs}
    made = converting.to_tflite(model, output, batch=batch, lengths=lengths, inputs=inputs, seconds_max=seconds)
    if as_json:
        _print_json(msgspec.to_builtins(made, enc_hook=str))
        return
    for name in made.constant:
        err.print(
            f"output {name!r} was the same for all samples: give others by --inputs", style="yellow", markup=False
        )
    shapes = ", ".join(f"{name} {shape}" for name, shape in made.shapes.items())
    kind = "made-up" if made.made_up else "given"
    text = f"{made.path}: {shapes}, {made.error:.1g} from the ONNX file on {made.samples} {kind} samples"
    out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder that auto wrote, a report.json, or a bundle.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same data and metric.")],
    as_json: AsJson = False,
) -> None:
    """Show side by side what two searches or builds found, or what two bundles hold."""
    from rich.table import Table

    from wherry_optimizer import card

    rows = card.compare(one, other)
    if as_json:
        _print_json(rows)
        return
    fields = ("passed", "download_bytes", "download_ratio", "latency_ratio", "value", "drop", "error")
    table = Table("target", "variant", *(name.replace("_", " ") for name in fields))
    for row in rows:
        mark = "".join(letter for letter, is_chosen in zip("AB", row["chosen"], strict=True) if is_chosen)
        cells = [" → ".join("–" if value is None else str(value) for value in row[name]) for name in fields]
        table.add_row(row["target"], row["id"] + (f" (chosen {mark})" if mark else ""), *cells)
    out.print(table)


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(help="An ONNX or TFLite file.")],
    *,
    name: Annotated[str, typer.Option(help="Name of the model, e.g. defect-detector.")],
    version: Annotated[str, typer.Option(help="SemVer, e.g. 1.0.0.")],
    licence: Annotated[str, typer.Option(help="SPDX expression, e.g. Apache-2.0, or LicenseRef-NAME.")],
    inputs: Annotated[
        Path | None, typer.Option(help="Samples: .npz, an array per input, samples along axis 0.")
    ] = None,
    attribution: Attribution = "",
    source: Annotated[str, typer.Option(help="Where it comes from, e.g. an address.")] = "",
    processing: ProcessingOf = None,
    asset: AssetFiles = None,
    output: Output = Path(),
    as_json: AsJson = False,
) -> None:
    """Make a bundle of one model as it is, without labels."""
    from wherry_optimizer import assets, making, recipe, report
    from wherry_optimizer.pack import pack_model

    said = recipe.read_processing(processing) if processing is not None else recipe.ProcessingFile()
    with contextlib.closing(making.Workshop(Path(), making.Limits())) as workshop:
        workshop.look(model, said.interface)
    packed = pack_model(
        model,
        name=name,
        version=version,
        licence=licence,
        output=output,
        attribution=attribution,
        source=source,
        inputs=inputs,
        processing=processing,
        files=assets.named(asset or []),
    )
    _warn_unstated(packed.config.licence.attribution, licence)
    if as_json:
        rows = [report.variant_dict(variant) for variant in packed.config.variants]
        _print_json({"path": str(packed.path), "manifest": packed.digest, "variants": rows})
        return
    out.print(report.details(packed.config))
    if packed.synthetic:
        out.print("golden vectors are made up from the interface's ranges; --inputs samples.npz gives better ones")
    out.print(f"{packed.path} ({packed.digest})", markup=False, highlight=False, soft_wrap=True)


@app.command()
def inspect(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Show what a bundle holds, after checking every blob."""
    import msgspec

    from wherry_optimizer import report
    from wherry_shared.image_layout import Layout

    layout = Layout(bundle)
    layout.verify_all()
    descriptor = layout.descriptor()
    _, _, config = layout.bundle()
    if as_json:
        _print_json({"manifest": descriptor.digest, "config": msgspec.to_builtins(config)})
        return
    out.print(report.details(config))
    out.print(f"manifest {descriptor.digest}", markup=False, highlight=False, soft_wrap=True)


@app.command("prove")
def prove_bundle(
    bundle: BundlePath,
    *,
    tries: Annotated[int, typer.Option(min=0, help="Files with one thing wrong that are tried, per variant.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the places that are broken.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Measure false alarms and misses of the golden vectors; exit status 1 if a variant misses its own."""
    from wherry_optimizer import proof, report

    proofs = proof.prove(bundle, tries=tries, seed=seed)
    if as_json:
        _print_json([item.as_dict() for item in proofs])
    else:
        out.print(report.proofs_table(proofs))
    if any(item.false_alarms for item in proofs):
        raise typer.Exit(1)


@app.command()
def sign(
    bundle: BundlePath,
    *,
    server: Annotated[str | None, typer.Option(help="Address; else WHERRY_SERVER, else what wherry dev wrote.")] = None,
    token: Annotated[str | None, typer.Option(help="API token; else WHERRY_TOKEN, else what wherry dev wrote.")] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="The publisher's key: a file or pkcs11:TOKEN/ID; a server in development lets it be made on first use."
        ),
    ] = None,
    publisher: Annotated[str | None, typer.Option(help="Name under which to publish.")] = None,
    as_json: AsJson = False,
) -> None:
    """Sign a bundle as a release with the publisher's key, which never leaves this machine."""
    from wherry_optimizer import signing

    signed, opened, made = signing.sign_bundle(bundle, server=server, token=token, key=key, publisher=publisher)
    if as_json:
        _print_json(signing.as_json(signed, opened))
        return
    out.print(signing.describe(signed, opened, made), markup=False, highlight=False, soft_wrap=True)


@app.command()
def encrypt(
    bundle: BundlePath,
    output: Annotated[Path, typer.Argument(help="Folder that is made: the same bundle, encrypted.")],
    *,
    recipient: Annotated[
        Path,
        typer.Option("--for", help="public.pem of the server's keys role (wherry keys init), as its keeper gave it."),
    ],
    ring: Annotated[
        Path | None, typer.Option("--keys", help="Folder of your own content keys; made on first use.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Make new content keys for plaintexts encrypted before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encrypt the weights and golden vectors of a bundle, before it is signed; devices decrypt them in memory only."""
    from wherry_optimizer import encryption

    done = encryption.encrypt_bundle(bundle, output, recipient, ring, fresh=fresh)
    if as_json:
        _print_json(encryption.as_json(done, output))
        return
    out.print(encryption.describe(done, output), markup=False, highlight=False, soft_wrap=True)


@app.command("recipe-schema")
def recipe_schema() -> None:
    """Print the JSON Schema of a recipe, with the parameters of every pass that is installed."""
    from wherry_optimizer import recipe

    _print_json(recipe.schema())


@app.command("passes")
def list_passes(as_json: AsJson = False) -> None:
    """List the passes that a recipe may use, and what each needs."""
    import msgspec
    from rich.table import Table

    from wherry_optimizer.passes import catalogue

    if as_json:
        _print_json([msgspec.to_builtins(info) for info in catalogue()])
        return
    rows = Table("pass", "formats", "makes", "calibration data", "what it does")
    for info in catalogue():
        needs = "needed" if info.calibration else "–"
        rows.add_row(info.name, ", ".join(info.formats), info.precision or "–", needs, info.summary)
    out.print(rows)


def main() -> None:
    """Run the command line; errors are told as cause, consequence and next step."""
    unwanted.keep_out()
    try:
        app()
    except WherryError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or "the folder that is written to, or the one for temporary files"
        _fail(
            DeviceError(
                "disk",
                f"{where}: {error.strerror}",
                consequence="it ended there; files that it was writing may not be whole",
                next_step="make room, change permissions or name another folder, and run it again",
            )
        )


def _fail(error: WherryError) -> None:
    err.print(error.diagnostics(), style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
