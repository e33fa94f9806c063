"""From a model and data to the variant to ship, in one call: what `wherry-optimizer auto` does.

    from pathlib import Path
    from wherry_optimizer.auto import auto

    result = auto(Path("model.onnx"), "data.npz", metric="accuracy", drop_max=0.005, output=Path("out"))
    result.chosen("x86-vnni").path

It checks the model, reads the data, searches for each target and writes what was chosen, every refusal with its
reason, and a report, to one folder; with a `Release` also a bundle of them. Where nothing passes, or the test split contradicts, the report is written all the
same and `auto` raises.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from wherry_optimizer import attempt, card, gate, labelled, making, measure, metrics, search, shipping
from wherry_optimizer import interface as interfaces
from wherry_optimizer.attempt import Problem
from wherry_optimizer.candidates import SOURCE, TARGETS, Prefer, Target
from wherry_optimizer.labelled import Parts
from wherry_optimizer.model import Model, gathered, read_onnx, subgraphs
from wherry_optimizer.model import load as load_model
from wherry_optimizer.precision import precision_of
from wherry_optimizer.recipe import ProcessingFile
from wherry_optimizer.shipping import Release
from wherry_shared import digest
from wherry_shared.bundle import Figures, Interface
from wherry_shared.engines import load as open_session
from wherry_shared.engines.errors import EngineFault
from wherry_shared.errors import DeviceError, RefusedError

CALLS_MAX = 200
"""Single calls that a pass may calibrate with."""
STEPS_PER_SAMPLE = 24
"""Of a sample with steps, so many calls are calibrated with, drawn by the seed."""
DROP_MAX = 0.005
MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
"""Operators whose weights have to be finite."""


def auto(
    model: Path,
    data: str | Parts,
    *,
    metric: str = "accuracy",
    outputs: Sequence[str] = (),
    drop_max: float = DROP_MAX,
    floor: float | None = None,
    error_max: float = 0.5,
    strict: bool = False,
    targets: Sequence[str] = (),
    output: Path | None = None,
    release: Release | None = None,
    cache: Path | None = None,
    prefer: Prefer = "balanced",
    seconds_max: float = search.SECONDS_MAX,
    workers: int = search.WORKERS,
    prune: bool = True,
    weigh: bool = True,
    state: Mapping[str, str] | None = None,
    label: str = "label",
    reported: Path | None = None,
    memory_bytes_max: int = making.MEMORY_BYTES_MAX,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    run: search.Run = attempt.run,
) -> search.Result:
    """Search for the best variant of a model for each target.

    Args:
        model: an ONNX or TFLite file, float.
        data: see `labelled.load`; or samples that are cut already.
        metric: see `metrics`; without labels only `agreement` makes sense, and is taken.
        outputs: native names of the outputs that the metric looks at.
        drop_max: what the metric may lose, in its own unit (0.005 of an accuracy is half a point).
        floor: what the metric may not fall below.
        error_max: how far outputs may move (L2, as a share of the source's).
        strict: the whole interval of the drop, not the drop alone, has to lie within `drop_max`.
        targets: names of `candidates.TARGETS`; by default this machine's, or `tflite` for such a file.
        output: where chosen files and the report go; none: nothing is written but the cache.
        release: what the bundle of the source and of all that was chosen is called; none: no bundle is made.
        cache: folder of what was made; by default below the user's cache folder.
        prefer: what to choose by among those that pass and that no other beats.
        seconds_max: for each target; no candidate begins later.
        workers: candidates at a time.
        prune: also try to prune.
        weigh: measure latency and memory of what passed.
        state: native input → the output of the step before that it is.
        label: array or column of labels.
        reported: JSON, digest of a file → figures that devices of the target reported.
        memory_bytes_max: of one candidate's process.
        seed: of everything random.
        say: told each step in a sentence.
        run: what does a task, see `search.search`.

    Raises:
        DeviceError: `folder_unwritable`.
        RefusedError: `model_*`, `data_*`, `metric_*`, `budget_invalid`, `setting_invalid`, `state_invalid`, `output_unknown`,
            `reported_invalid`, `target_unknown`, `source_failed`, and as `shipping.ship`; `budget_unmet` where no candidate
            passed for some target; `unconfirmed` where the test split contradicts the choice.
    """
    _check_settings(seconds_max=seconds_max, workers=workers, memory_bytes_max=memory_bytes_max, seed=seed)
    budget = gate.Budget(drop_max, floor, error_max, 1.0 if strict else gate.UPPER_FACTOR)
    figures = _reported(reported)
    folder = cache or default_cache()
    for place in (folder, output):
        if place is not None:
            check_writable(place)
    if release is not None:
        if output is None:
            raise RuntimeError("a bundle needs a folder")
        release.check(output)
    said = release.said() if release is not None else ProcessingFile()
    if run is attempt.run:  # else no children are wanted
        workshop = making.Workshop(folder, making.Limits(memory_bytes_max=memory_bytes_max))
        with contextlib.closing(workshop):
            workshop.look(model, said.interface)
    source = load_model(model)
    check_source(source)
    chosen = [find_target(name, source) for name in targets] or [default_target(source)]
    # one set of data for all: the interface that samples are checked against is the file's own
    try:
        fitted = interfaces.derive(model, source.format, {}, said.interface)
    except EngineFault as error:
        raise RefusedError(
            "model_operator",
            f"no engine here runs {model.name}: {error.message}",
            consequence="nothing was tried",
            next_step="export it with operators of ONNX's own domains, or of an engine that is installed",
        ) from error
    if isinstance(data, Parts):
        parts = data
    else:
        parts = labelled.load(data, fitted.interface, label=label, seed=seed)
    if not parts.labelled and metric != "agreement" and ":" not in metric:
        metric = "agreement"
    spec = metrics.MetricOf(name=metric, outputs=tuple(outputs), folder=str(Path.cwd()))
    metrics.make(spec)
    check_names(fitted.interface, spec.outputs, state or {})
    if parts.labelled:
        judged = next(
            (one for one in fitted.interface.outputs if one.name in spec.outputs), fitted.interface.outputs[0]
        )
        labelled.check_labels([*parts.selection, *parts.test], metric, judged, fitted.interface)
    problem = make_problem(gathered(source, folder / "sources"), parts, spec, state or {}, seed)
    settings = search.Settings(
        budget=budget,
        prefer=prefer,
        seconds_max=seconds_max,
        workers=workers,
        prune=prune,
        weigh=weigh,
        memory_bytes_max=memory_bytes_max,
        reported=figures,
    )
    here = measure.machine()
    found = []
    for target in chosen:
        is_here = target.arch in ("", here.arch)
        own = replace(settings, measured_here=is_here)
        found.append(search.search(problem, target, own, folder, say, run))
    result = search.Result(problem, parts, found, settings, folder)
    if output is not None:
        card.write(result, output)
    check_result(result)
    if release is not None and output is not None:
        result = replace(result, bundled=shipping.ship(result, source, fitted, release, output, say))
        card.write(result, output)
    return result


def _check_settings(*, seconds_max: float, workers: int, memory_bytes_max: int, seed: int) -> None:
    """Refuse limits under which nothing can be done.

    Raises:
        RefusedError: `setting_invalid`.
    """
    wrong = [
        text
        for text, fine in (
            (f"{seconds_max} seconds", seconds_max > 0),
            (f"{workers} workers", workers >= 1),
            (f"{memory_bytes_max / 2**30:.3g} GB of memory", memory_bytes_max >= making.MEMORY_BYTES_MIN),
            (f"seed {seed}", seed >= 0),
        )
        if not fine
    ]
    if wrong:
        raise RefusedError(
            "setting_invalid",
            f"a search cannot do with {', '.join(wrong)}",
            consequence="nothing was tried",
            next_step=f"give more than 0 seconds, at least one worker, at least {making.MEMORY_BYTES_MIN / 2**30:.3g} GB, "
            "and a seed from 0 on",
        )


def check_writable(folder: Path) -> None:
    """Make a folder and write into it, before minutes are spent on what would be written.

    Raises:
        DeviceError: `folder_unwritable`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise DeviceError(
            "folder_unwritable",
            f"{folder} cannot be written to: {error.strerror}",
            consequence="what is made and found could not be kept, so nothing was tried",
            next_step="name another folder (--output, --cache), make room, or change its permissions",
        ) from error


def check_names(interface: Interface, outputs: Sequence[str], state: Mapping[str, str]) -> None:
    """Check that outputs and pairs of state are the model's.

    Raises:
        RefusedError: `output_unknown`; `state_invalid` where a pair names no input or output, the two do not fit, or no
            input is left that has steps.
    """
    inputs = {one.name: one for one in interface.inputs}
    given = {one.name: one for one in interface.outputs}
    for name in outputs:
        if name not in given:
            raise RefusedError(
                "output_unknown",
                f"the model has no output {name!r} for the metric to look at",
                consequence="nothing was tried",
                next_step=f"name {', '.join(given)}",
            )
    for name, of in state.items():
        one, other = inputs.get(name), given.get(of)
        if one is None or other is None:
            why = f"there is no {'input' if one is None else 'output'} {name if one is None else of!r}"
        elif one.datatype != other.datatype:
            why = f"input {name!r} is {one.datatype} and output {of!r} is {other.datatype}"
        elif len(state) == len(inputs):
            why = "every input is state, so no input has steps"
        else:
            continue
        raise RefusedError(
            "state_invalid",
            f"state {name}={of}: {why}",
            consequence="nothing was tried",
            next_step=f"give INPUT=OUTPUT, of inputs {', '.join(inputs)} and outputs {', '.join(given)}",
        )


def check_result(result: search.Result) -> None:
    """Raise where a target got nothing, or something that the test split contradicts.

    Raises:
        RefusedError: `budget_unmet` or `unconfirmed`.
    """
    for found in result.found:
        if found.chosen == SOURCE and len([item for item in found.tried if item.verdict.passed]) == 1:
            raise _unmet(found, result.settings.budget)
        if found.confirmation is not None and not found.confirmation.verdict.passed:
            told = "; ".join(f"{one.id}: {one.verdict.why}" for one in found.confirmations)
            raise RefusedError(
                "unconfirmed",
                f"{found.target.name}: what met the budget on the selection split did not on the test split: {told}",
                consequence="nothing was chosen; a test split that has spoken so often is used up",
                next_step="gather more samples and search again, or raise --max-drop",
            )


def _unmet(found: search.Found, budget: gate.Budget) -> RefusedError:
    """Say what kept everything out, and how far from it the nearest was."""
    judged = [item for item in found.refused if item.drop is not None and isfinite(item.drop.drop)]
    nearest = min(judged, key=lambda item: item.drop.drop if item.drop is not None else 0.0, default=None)
    near = f"; nearest was {nearest.id}: {nearest.verdict.why}" if nearest is not None else ""
    own = found.find(SOURCE).drop
    options = {"drop": "--max-drop", "interval": "--max-drop", "floor": "--floor", "error": "--max-error"}
    ways = sorted({options[item.verdict.by] for item in judged if item.verdict.by in options})
    why = f"{found.target.name}: none of {len(found.refused)} candidates passed the gate{near}"
    next_step = f"give {' or '.join([*ways, '--seconds'])} more room, or ship the model as it is"
    if budget.floor is not None and own is not None and own.value < budget.floor:
        why = f"{found.target.name}: the model itself, at {own.value:.4f}, is below the floor of {budget.floor:.4f}"
        next_step = "lower --floor, or train the model further"
    elif not found.refused:
        why = f"{found.target.name}: the time was up before any candidate was done"
        next_step = "raise --seconds"
    return RefusedError(
        "budget_unmet",
        why,
        consequence="nothing was chosen; the report says what each was refused for",
        next_step=next_step,
    )


def check_source(model: Model) -> None:
    """Refuse what no search can start from.

    Raises:
        RefusedError: `already_quantized` or `model_not_finite`, naming the weight.
    """
    if precision_of(model).quantized:
        raise RefusedError(
            "already_quantized",
            f"{model.path.name} is quantized already",
            consequence="what quantizing lost cannot be had back, so nothing was tried",
            next_step="give the float model; `wherry-optimizer pack` ships this one as it is",
        )
    if model.format != "onnx":
        return
    graph = read_onnx(model.path)
    multiplied = {
        name
        for inner in subgraphs(graph.graph)
        for node in inner.node
        if node.op_type in MULTIPLIES
        for name in node.input
    }
    for inner in subgraphs(graph.graph):
        for tensor in inner.initializer:
            if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
                continue
            value = numpy_helper.to_array(tensor)
            # a mask may well be infinite, what is multiplied with may not
            if np.isnan(value).any() or (tensor.name in multiplied and np.isinf(value).any()):
                raise RefusedError(
                    "model_not_finite",
                    f"weight {tensor.name!r} of {model.path.name} holds NaN or Inf",
                    consequence="every answer that it reaches is no number, so nothing was tried",
                    next_step="train or export the model again",
                )


def find_target(name: str, model: Model) -> Target:
    """Return a target by name.

    Raises:
        RefusedError: `target_unknown`, or `target_unfit` where it runs no such file.
    """
    found = TARGETS.get(name)
    if found is None:
        raise RefusedError("target_unknown", f"there is no target {name!r}", next_step=f"use {', '.join(TARGETS)}")
    if found.format != model.format:
        raise RefusedError(
            "target_unfit",
            f"target {name} runs {found.format}, the model is {model.format}",
            consequence="nothing was tried",
            next_step="name another target, or convert the model first",
        )
    return found


def default_target(model: Model) -> Target:
    """Return the target that this machine is of."""
    if model.format == "tflite":
        return TARGETS["tflite"]
    here = measure.machine()
    if here.arch in ("aarch64", "arm64"):
        return TARGETS["arm-dotprod"]
    vnni = {"avx512_vnni", "avx_vnni"} & set(here.cpu_features)
    return TARGETS["x86-vnni" if vnni else "x86"]


def default_cache() -> Path:
    """Return where results are kept by default."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "wherry" / "optimizer"


def make_problem(model: Model, parts: Parts, metric: metrics.MetricOf, state: Mapping[str, str], seed: int) -> Problem:
    """Return the problem, with calibration samples as the single calls that they are made of."""
    rng = np.random.default_rng(seed)
    calls: list[dict[str, attempt.Array]] = []
    session = open_session(model.path, model.format, options={"threads": 1})
    try:
        for sample in parts.calibration:
            own = list(attempt.calls_of(session, sample, state))
            if len(own) > STEPS_PER_SAMPLE:
                own = [own[index] for index in sorted(rng.choice(len(own), STEPS_PER_SAMPLE, replace=False))]
            calls += own
    finally:
        session.close()
    if len(calls) > CALLS_MAX:
        calls = [calls[index] for index in sorted(rng.choice(len(calls), CALLS_MAX, replace=False))]
    return Problem(
        source=model.path.resolve(),
        format=model.format,
        digest=model.digest,
        metric=metric,
        calibration=tuple(calls),
        selection=parts.selection,
        test=parts.test,
        state=dict(state),
        seed=seed,
    )


def _reported(path: Path | None) -> dict[str, Figures]:
    if path is None:
        return {}
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Figures])
        for key, figures in found.items():
            if not digest.is_digest(key):
                raise ValueError(f"{key!r} is no digest of a file (sha256:…)")
            if not figures.latency_p50_us > 0 or figures.peak_memory_bytes < 0:
                raise ValueError(
                    f"{key}: a latency of {figures.latency_p50_us} µs and {figures.peak_memory_bytes} bytes are no measurement"
                )
    except (OSError, ValueError) as error:
        raise RefusedError(
            "reported_invalid",
            f"{path}: {error}",
            consequence="nothing was tried",
            next_step="give a JSON object: digest of a file → latency_p50_us, peak_memory_bytes, load_ms",
        ) from error
    return found
