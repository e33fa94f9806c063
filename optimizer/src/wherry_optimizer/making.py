"""One pass on one file, held to what every pass owes; and a process of its own in which a build has its passes run.

A pass owes a file that loads, that is not the one it was given, and whose inputs and outputs are the source's. Passes are
other people's graph surgery and engines are native code: either may crash, hang or take all memory. So a `Workshop` has a
child (`python -m wherry_optimizer.making`) do both, under limits of memory and time; where it dies, what it did becomes a
refusal, and the next variant gets a new one.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from wherry_optimizer import confined, model, passes
from wherry_optimizer import interface as interfaces
from wherry_optimizer.golden import Runnable
from wherry_optimizer.recipe import Hints, convert_parameters
from wherry_shared import digest
from wherry_shared.bundle import Format
from wherry_shared.engines import load
from wherry_shared.engines.errors import OutOfMemory
from wherry_shared.engines.session import NativeTensor, Session
from wherry_shared.errors import RefusedError, WherryError

Array = npt.NDArray[Any]
Contract: TypeAlias = tuple[Sequence[NativeTensor], Sequence[NativeTensor]]
"""Inputs and outputs of a file."""

MEMORY_BYTES_MAX = 6 * 2**30
"""Of data, of the process that makes and runs a variant."""
MEMORY_BYTES_MIN = 2**28
"""With less the libraries alone do not fit, so that every variant would be refused for what is no fault of its own."""
LOOK_SECONDS_MAX = 120.0
"""Of opening a source and running it on made-up input for the first time."""
STEP_SECONDS_MAX = 1800.0
"""Of one pass of a build, and of the first run of what they made."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a build's child may take."""

    memory_bytes_max: int = MEMORY_BYTES_MAX
    seconds_max: float = STEP_SECONDS_MAX
    """Of one pass."""


def apply(
    info: passes.PassInfo, path: Path, source: Path, form: Format, parameters: msgspec.Struct, work: passes.Work
) -> passes.Result:
    """Run a pass in this process.

    Args:
        info: which one.
        path: the file that it is given.
        source: the file without any pass, whose contract has to be kept.
        form: format of both.
        parameters: of the pass's own type.
        work: its folder and calibration data.

    Raises:
        RefusedError: `pass_unfit`, `pass_noop` (also where the file is the same byte for byte), `contract_changed`, or
            what the pass itself refuses.
        EngineFault: what it made does not load.
    """
    if form not in info.formats:
        raise RefusedError(
            "pass_unfit",
            f"pass {info.name} works on {', '.join(info.formats)} only",
            consequence="the variant was not made",
            next_step="use a pass for its format, see `wherry-optimizer passes`, or another source",
        )
    result = passes.module(info).apply(path, parameters, work)
    if digest.of_file(result.path) == digest.of_file(path):
        raise RefusedError(
            "pass_noop",
            f"{info.name} changed nothing: the file is the same byte for byte",
            consequence="the variant would be the source under another name",
            next_step="take it out",
        )
    before, made = (load(one, form, options={"threads": 1}) for one in (source, result.path))
    try:
        check_contract(before, made)
    except RefusedError as error:
        raise RefusedError(
            error.code, f"{info.name}: {error.message}", consequence=error.consequence, next_step=error.next_step
        ) from error
    finally:
        before.close()
        made.close()
    return result


def check_contract(source: Session, made: Session) -> None:
    """Check that names, datatypes and shapes are those of the source.

    Raises:
        RefusedError: `contract_changed`, naming the tensor.
    """
    check_tensors(source.describe(), made.describe())


def check_tensors(before: Contract, after: Contract) -> None:
    """Do what `check_contract` does, on inputs and outputs as sessions describe them."""
    for kind, old, new in zip(("input", "output"), before, after, strict=True):
        was = {tensor.name: tensor for tensor in old}
        now = {tensor.name: tensor for tensor in new}
        for name in sorted(set(was) | set(now)):
            one, two = was.get(name), now.get(name)
            if one is None or two is None:
                why = f"{kind} {name!r} {'is gone' if two is None else 'is new'}"
            elif one.datatype != two.datatype:
                why = f"{kind} {name!r} was {one.datatype} and is {two.datatype}"
            elif (kind == "input" and not _same_shape(one.shape, two.shape)) or (
                one.shape and two.shape and not _compatible(one.shape, two.shape)
            ):
                why = f"{kind} {name!r} had shape {list(one.shape)} and has {list(two.shape)}"
            else:
                continue
            raise RefusedError(
                "contract_changed",
                why,
                consequence="applications could not use the variant, so it was not kept",
                next_step="report the pass that did it",
            )


def _same_shape(one: Sequence[int | str], two: Sequence[int | str]) -> bool:
    return len(one) == len(two) and all(
        (a == b) if _fixed(a) or _fixed(b) else True for a, b in zip(one, two, strict=True)
    )


def _compatible(one: Sequence[int | str], two: Sequence[int | str]) -> bool:
    """Tell whether shapes of an output agree where both are fixed: shape inference may know more, or less, than before."""
    return len(one) == len(two) and all(a == b for a, b in zip(one, two, strict=True) if _fixed(a) and _fixed(b))


def _fixed(axis: int | str) -> bool:
    return isinstance(axis, int) and axis >= 0


def plain(value: Any) -> Any:
    """Encode what the notes of a pass may hold beside plain values (an `enc_hook` of msgspec)."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value)} in the notes of a pass")


class _Look(msgspec.Struct, frozen=True, kw_only=True):
    """How a source's interface is to be found."""

    tensors: dict[str, str]
    hints: Hints
    texts: dict[str, str]


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is asked: a pass, without one to run a variant once, or to look at a source."""

    look: _Look | None = None
    use: str = ""
    path: str
    source: str = ""
    format: Format = "onnx"
    parameters: dict[str, Any] = {}
    folder: str = ""
    data: str = ""
    """File with the pickled calibration calls, or with (variant, inputs); this program's own parent wrote it."""
    seed: int = 0


class _Said(msgspec.Struct, frozen=True, kw_only=True):
    """What it answers."""

    code: str = ""
    why: str = ""
    consequence: str = ""
    next_step: str = ""
    path: str = ""
    notes: dict[str, Any] = {}


class Workshop:
    """Where the passes of a build run: a child that is begun when it is needed, and again after it died."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Say where files that it reads may be left, and what it may take."""
        self._folder = folder
        self._limits = limits
        self._data: dict[int, tuple[Any, str]] = {}
        self._child = confined.Worker(
            [sys.executable, "-m", "wherry_optimizer.making", str(limits.memory_bytes_max)], limits.memory_bytes_max
        )

    def begin(self) -> None:
        """Start the child, so that it is there when it is asked."""
        self._child.begin()

    def apply(
        self,
        info: passes.PassInfo,
        path: Path,
        source: Path,
        form: Format,
        parameters: msgspec.Struct,
        work: passes.Work,
    ) -> passes.Result:
        """Do what `apply` does, in the child.

        Raises:
            RefusedError: as `apply`, an engine's fault too; `pass_crashed`, `pass_memory` or `pass_timeout` where the child
                died of it.
        """
        said = self._ask(
            _Asked(
                use=info.name,
                path=str(path),
                source=str(source),
                format=form,
                parameters=msgspec.to_builtins(parameters),
                folder=str(work.folder),
                data=self._left(work.calibration),
                seed=work.seed,
            ),
            info.name,
        )
        return passes.Result(Path(said.path), said.notes)

    def run(self, variant: Runnable, inputs: dict[str, Array]) -> None:
        """Load a variant and run it once, so that what kills the process that does so is known before this one does.

        Args:
            variant: file, interface and engine.
            inputs: one sample, canonical.

        Raises:
            RefusedError: as `apply`.
        """
        data = self._write((variant, inputs))
        asked = _Asked(path=str(variant.path), format=variant.format, data=data)
        try:
            self._ask(asked, "running what they made" if variant.quantized else "running it")
        finally:
            Path(data).unlink()

    def look(
        self, path: Path, hints: Hints, tensors: Mapping[str, str] | None = None, texts: Mapping[str, str] | None = None
    ) -> None:
        """Open a source and find its interface in the child, so that a file that kills who does so is refused.

        What else is wrong with it is told by who does the same in its own process afterwards.

        Args:
            path: the file.
            hints: as `interface.derive` takes them; so are the others.
            tensors: canonical → native names.
            texts: input → a text that the model takes.

        Raises:
            RefusedError: `model_unrunnable`.
        """
        asked = _Asked(path=str(path), look=_Look(tensors=dict(tensors or {}), hints=hints, texts=dict(texts or {})))
        ended = self._child.ask(msgspec.json.encode(asked), min(LOOK_SECONDS_MAX, self._limits.seconds_max))
        why = ended.why if ended.how != "well" else msgspec.json.decode(ended.out, type=_Said).why
        if why:
            raise RefusedError(
                "model_unrunnable",
                f"{path.name} cannot be opened and run once: {why}",
                consequence="it ran in a process of its own; nothing else was done with it",
                next_step="run it by hand on one sample; compare the file with the original, or export it again",
            )

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _ask(self, asked: _Asked, what: str) -> _Said:
        ended = self._child.ask(msgspec.json.encode(asked), self._limits.seconds_max)
        if ended.how != "well":
            raise RefusedError(
                f"pass_{ended.how}",
                f"{what}: {ended.why}",
                consequence="the variant was not made; the build goes on with the others",
                next_step="give the build more memory or time (`--memory-gb`, `--pass-seconds`), or use another pass",
            )
        said = msgspec.json.decode(ended.out, type=_Said)
        if said.code:
            raise RefusedError(said.code, said.why, consequence=said.consequence, next_step=said.next_step)
        return said

    def _left(self, calls: Sequence[Any]) -> str:
        """Return the file with calibration calls, written once for all passes that are given the same."""
        if id(calls) not in self._data:
            self._data[id(calls)] = calls, self._write(calls)
        return self._data[id(calls)][1]

    def _write(self, value: Any) -> str:
        data = pickle.dumps(value)
        path = self._folder / f"{digest.of_bytes(data).partition(':')[2]}.pickle"
        path.write_bytes(data)
        return str(path)


def _looked(path: Path, look: _Look) -> _Said:
    try:
        interfaces.derive(path, model.load(path).format, look.tensors, look.hints, look.texts)
    except WherryError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OutOfMemory):
                return _Said(why=str(cause))
            cause = cause.__cause__
    return _Said()


def _do(asked: _Asked) -> _Said:
    if asked.look is not None:
        return _looked(Path(asked.path), asked.look)
    given = pickle.loads(Path(asked.data).read_bytes())  # noqa: S301 - this program's own parent wrote it
    if not asked.use:
        variant, inputs = given
        bound = variant.open()
        bound.run(inputs)
        bound.close()
        return _Said(path=asked.path)
    info = passes.find(asked.use)
    parameters = convert_parameters(asked.parameters, passes.module(info).Parameters, asked.use)
    work = passes.Work(Path(asked.folder), given, asked.seed)
    result = apply(info, Path(asked.path), Path(asked.source), asked.format, parameters, work)
    return _Said(path=str(result.path), notes=result.notes)


def main() -> None:
    """Answer each line of stdin with a line: MEMORY_BYTES_MAX is the argument."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what passes print is no answer
    confined.die_with_parent()
    confined.limit_memory(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        try:
            said = _do(msgspec.json.decode(line, type=_Asked))
        except WherryError as error:
            said = _Said(code=error.code, why=error.message, consequence=error.consequence, next_step=error.next_step)
        answers.write(msgspec.json.encode(said, enc_hook=plain) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
