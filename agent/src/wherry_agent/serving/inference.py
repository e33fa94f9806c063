"""What local serving says, whatever protocol asks: finding, describing and running what is published.

REST and gRPC are two ways of writing the same words; each turns a `Refusal` into its own kind of error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from wherry_agent import __version__
from wherry_agent.answering.arms import Counter, Loaded
from wherry_agent.answering.ask import PLAIN, Ask
from wherry_agent.answering.gate import RunGate
from wherry_agent.answering.helpers import Helpers
from wherry_agent.answering.published import Answer, Published
from wherry_agent.answering.registry import Registry
from wherry_agent.serving import tensors
from wherry_agent.serving.http import Response
from wherry_agent.serving.regions import Regions
from wherry_agent.serving.samples import Samples
from wherry_shared.bundle import PLATFORMS, Interface, TensorSpec, axis_bounds
from wherry_shared.engines import bf16
from wherry_shared.engines.errors import BadInput, EngineFault
from wherry_shared.engines.session import Array
from wherry_shared.errors import RefusedError
from wherry_shared.sketch import Sketch

NAME = "wherry"
EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "sequence",
    "statistics",
    "system_shared_memory",
]
REQUEST_ID_CHARS_MAX = 1024
MESSAGE_CHARS_MAX = 1000
"""Of an error, which may repeat what the caller sent; over gRPC it travels among headers, which clients bound."""
BATCH_UNBOUNDED = 1024
"""What a configuration says where the interface names no limit: clients of that extension need a number."""

LOAD_REFUSED = "what a device serves is decided by its offer: use `wherry deploy` or `wherry rollback`"
CUDA_REFUSED = "CUDA shared memory is not supported: use system shared memory, or send the tensor"
TRACE_REFUSED = "there are no trace settings here; see `wherry-agent status` and the model's statistics"
LOG_REFUSED = "log settings belong to the device's operator: see log_level in the agent's settings"


class Refusal(Exception):  # noqa: N818 - named after what the caller gets
    """What was asked for is not done; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def told(error: BadInput | EngineFault) -> str:
    """Return what a caller is told of an error: cause, consequence, next step."""
    if isinstance(error, BadInput):
        return error.sentence(MESSAGE_CHARS_MAX)
    consequence = error.consequence or "nobody else could answer this request"
    next_step = error.next_step or "it is counted against this version; see `wherry-agent status`"
    return EngineFault(error.code, str(error), consequence=consequence, next_step=next_step).sentence(MESSAGE_CHARS_MAX)


def unforeseen(error: Exception) -> str:
    """Return what a caller is told of an error that nobody foresaw; its trace is in the log."""
    return f"internal error: {type(error).__name__} (so: the request was not answered; next: see the agent's log)"


class View:
    """What is looked up about a loaded variant in every request."""

    def __init__(self, loaded: Loaded) -> None:
        loadable = loaded.loadable
        interface = loadable.interface
        self.version = loaded.version
        self.variant = loadable.variant
        self.inputs = {spec.name: spec.datatype for spec in interface.inputs}
        self.outputs = {spec.name: spec.datatype for spec in interface.outputs}
        self.texts = "BYTES" in self.outputs.values()
        self.labels = {spec.name: spec.labels for spec in interface.outputs}
        self.written: dict[tuple[object, ...], Response] = {}
        """What was said beside raw outputs, by all that it says: most answers say the same."""
        self._seconds = math.inf
        self._bytes = 0

    def expected(self, size: int) -> float:
        """Return the CPU seconds that a request with so many bytes of inputs may take; infinite if none as large was seen."""
        return self._seconds if size <= self._bytes else math.inf

    def took(self, seconds: float, size: int) -> None:
        """Take note of a request's CPU seconds: what takes longer counts by half, what is shorter only little by little.

        Its time by the clock would hold the wait for the interpreter too: once several threads wait for one another,
        every request would seem long, and for that go on to get a thread of its own.
        """
        if self._seconds == math.inf:
            self._seconds = seconds
        else:
            self._seconds += (seconds - self._seconds) / (2 if seconds > self._seconds else 8)
        self._bytes = max(self._bytes, size)


class Inference:
    """Answers from a registry."""

    def __init__(
        self,
        registry: Registry,
        gate: RunGate,
        helpers: Helpers,
        regions: Regions | None = None,
        samples: Samples | None = None,
    ) -> None:
        self._registry = registry
        self._samples = samples or Samples()
        self._gate = gate
        self._helpers = helpers
        self.regions = regions or Regions()

    def find(self, name: str, version: str) -> tuple[Published, Loaded]:
        """Return a model in service, and the version that is asked for (empty: as the trial routes).

        Raises:
            Refusal: 404, with what there is.
        """
        published = self._registry.get(name)
        if published is None:
            known = ", ".join(self._registry.names()) or "none"
            raise Refusal(404, f"model {name[:80]!r} is not served here; served: {known}")
        if not version:
            return published, published.active
        for loaded in published.loaded():
            if loaded.version == version:
                return published, loaded
        versions = ", ".join(_versions(published))
        raise Refusal(404, f"version {version[:80]!r} of {name!r} is not loaded; loaded: {versions}")

    def view(self, loaded: Loaded) -> View:
        """Return what is looked up about a loaded variant."""
        view: View | None = loaded.notes.get("view")
        if view is None:
            view = loaded.notes["view"] = View(loaded)
        return view

    def run(
        self,
        published: Published,
        loaded: Loaded | None,
        inputs: dict[str, Array],
        outputs: Sequence[str] | None,
        ask: Ask = PLAIN,
    ) -> Answer:
        """Run a request, by `loaded` if a version was named.

        Raises:
            BadInput: the caller's fault.
            EngineFault: the model failed and nobody else could answer.
        """
        if ask.generation and ask.generation != published.generation:
            raise BadInput(
                f"generation {ask.generation} was replaced by {published.generation}",
                next_step="ask the models of this group again, all of them by one generation",
            )
        if loaded is not None:
            answer = published.answer_by(loaded, self._gate, inputs, outputs, ask=ask)
        else:
            answer = published.answer(self._gate, self._helpers, inputs, outputs, ask=ask)
            if self._samples.shares:
                self._samples.look(published, answer, inputs)
        return replace(answer, generation=published.generation) if published.group else answer

    @property
    def cold(self) -> bool:
        """Whether a model is being swapped cold, so that who asks for it waits."""
        return self._registry.cold

    def expected(self, published: Published, view: View, size: int, ask: Ask) -> float:
        """Return how many seconds a request may take; infinite where it may wait for others, or for a trial's deadline."""
        if published.trial or ask.sequence_id or not self._gate.free:
            return math.inf
        return view.expected(size)

    # -- descriptions ----------------------------------------------------------------------------

    def server_metadata(self) -> dict[str, Any]:
        """Return name, version and extensions."""
        return {"name": NAME, "version": __version__, "extensions": EXTENSIONS}

    def server_ready(self) -> bool:
        """Tell whether a model answers, or is being swapped."""
        return bool(self._registry.names())

    def model_ready(self, name: str, version: str) -> bool:
        """Return True; also while the model is swapped.

        Raises:
            Refusal: 404.
        """
        if version or name not in self._registry.names():
            self.find(name, version)
        return True

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        """Return a model's metadata.

        Raises:
            Refusal: 404.
        """
        published, loaded = self.find(name, version)
        interface = loaded.loadable.interface
        return {
            "name": name,
            "versions": _versions(published),
            "platform": _platform(loaded),
            "inputs": [_described(spec) for spec in interface.inputs],
            "outputs": [_described(spec) for spec in interface.outputs],
        }

    def config(self, name: str, version: str) -> dict[str, Any]:
        """Return a model's configuration in the words of the model configuration extension.

        A free first axis that all tensors share is the batch there: `max_batch_size` is its limit, `dims` leave it out.

        Raises:
            Refusal: 404.
        """
        _, loaded = self.find(name, version)
        interface = loaded.loadable.interface
        batch = _batch_max(interface)
        skip = 1 if batch else 0
        return {
            "name": name,
            "platform": _platform(loaded),
            "backend": loaded.loadable.engine,
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": batch,
            "input": [
                {
                    **_configured(spec, skip),
                    "format": f"FORMAT_{spec.layout}" if spec.layout in ("NCHW", "NHWC") else "FORMAT_NONE",
                    "optional": spec.optional,
                }
                for spec in interface.inputs
            ],
            "output": [_configured(spec, skip) for spec in interface.outputs],
            "parameters": {
                "wherry_variant": {"string_value": loaded.loadable.variant},
                "wherry_version": {"string_value": loaded.version},
            },
        }

    def statistics(self, name: str, version: str) -> dict[str, Any]:
        """Return counts of this worker process: of one model, or of all if `name` is empty.

        Raises:
            Refusal: 404.
        """
        if name:
            published, _ = self.find(name, version)
            chosen = [published]
        else:
            chosen = self._registry.all()
        rows = []
        for one in chosen:
            arms = [(one.active, one.counter)]
            if one.incumbent is not None and one.incumbent_counter is not None:
                arms.append((one.incumbent, one.incumbent_counter))
            rows += [_counted(loaded, counter) for loaded, counter in arms if version in ("", loaded.version)]
        return {"model_stats": rows}

    def tell(self, name: str, version: str, metric: str, value: float) -> None:
        """Count a number that an application tells of answers of a version; without one, of who answers first.

        Raises:
            Refusal: 404.
            BadInput: nobody may tell this.
        """
        published, loaded = self.find(name, version)
        loaded = loaded if version else published.first
        counter = published.counter if loaded is published.active else published.incumbent_counter
        if counter is None:
            raise Refusal(404, f"version {loaded.version} of {name!r} is not counted any more")
        try:
            counter.told(metric, value)
        except RefusedError as error:
            raise BadInput(error.message) from error

    def index(self, *, ready: bool) -> list[dict[str, Any]]:
        """Return every model with its loaded versions; with `ready` only what answers now."""
        found: list[dict[str, Any]] = []
        for name in self._registry.names():
            published = self._registry.peek(name)
            if published is None and not ready:
                found.append({"name": name, "state": "UNAVAILABLE", "reason": "it is being swapped"})
            elif published is not None:
                found += [{"name": name, "version": version, "state": "READY"} for version in _versions(published)]
        return found


def as_declared(name: str, array: Array, datatype: str, view: View) -> Array:
    """Return an input as the interface has it: BF16 is widened, exactly, for a model that takes FP32.

    UINT16 is taken for the bits of BF16, as numpy has it.

    Raises:
        BadInput: BF16 bits would be taken for integers.
    """
    if datatype != "BF16":
        return array  # the interface is checked where the model runs
    wanted = view.inputs.get(name)
    if wanted == "FP32":
        return bf16.widen(array)
    if wanted not in (None, "BF16"):
        raise BadInput(f"input {name[:80]!r} is BF16, the model takes {wanted}")
    return array


def classified(output: str, array: Array, count: int, view: View) -> Array:
    """Return the `count` largest entries of an output, as the classification extension writes them.

    Raises:
        BadInput: the output has no order, or `count` is no number of classes.
    """
    if count < 0:
        raise BadInput(f"output {output!r}: classification is {count}, expected a number of classes")
    numbers = bf16.widen(array) if view.outputs[output] == "BF16" else array
    return tensors.classify(numbers, count, view.labels[output])


def check_id(request_id: str) -> str:
    """Return a request's id.

    Raises:
        BadInput: it is too long.
    """
    if len(request_id) > REQUEST_ID_CHARS_MAX:
        raise BadInput(f"the request's id has {len(request_id)} characters, at most {REQUEST_ID_CHARS_MAX}")
    return request_id


def parameters_of(view: View, answer: Answer) -> dict[str, str | bool | int]:
    """Return the parameters that every answer carries."""
    parameters: dict[str, str | bool | int] = {"wherry_variant": view.variant}
    if answer.fallback:
        parameters["wherry_fallback"] = True
    if answer.generation:
        parameters["wherry_generation"] = answer.generation
    return parameters


def _versions(published: Published) -> list[str]:
    return list(dict.fromkeys(loaded.version for loaded in published.loaded()))


def _platform(loaded: Loaded) -> str:
    return PLATFORMS["tflite" if loaded.loadable.format == "tflite" else "onnx"]


def _shape(spec: TensorSpec) -> list[int]:
    return [axis if isinstance(axis, int) else -1 for axis in spec.shape]


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": _shape(spec)}


def _batch_max(interface: Interface) -> int:
    """Return how many rows a request may have; 0 if the first axes are not one free axis from 1 on, before others."""
    firsts = {spec.shape[0] if len(spec.shape) > 1 else 0 for spec in (*interface.inputs, *interface.outputs)}
    axis = firsts.pop() if len(firsts) == 1 else 0
    if not isinstance(axis, str):
        return 0
    low, high = axis_bounds(axis, interface)
    return (high or BATCH_UNBOUNDED) if low <= 1 else 0


def _configured(spec: TensorSpec, skip: int) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": _shape(spec)[skip:]}


def _counted(loaded: Loaded, counter: Counter) -> dict[str, Any]:
    stats = counter.stats()
    runs, run_ns = _sum(stats.latency_us.values())
    waits, wait_ns = _sum([stats.wait_us])
    good = stats.requests - stats.errors
    return {
        "name": stats.model,
        "version": loaded.version,
        "inference_count": good,
        "execution_count": good,
        "inference_stats": {
            "success": {"count": good, "ns": run_ns + wait_ns},
            "fail": {"count": stats.errors, "ns": 0},
            "queue": {"count": waits, "ns": wait_ns},
            "compute_input": {"count": 0, "ns": 0},
            "compute_infer": {"count": runs, "ns": run_ns},
            "compute_output": {"count": 0, "ns": 0},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
    }


def _sum(wires: Iterable[Mapping[str, int]]) -> tuple[int, int]:
    """Return how many runs some sketches counted, and their nanoseconds, to about the sketch's relative error."""
    whole = Sketch()
    for wire in wires:
        whole.merge(Sketch.from_wire(wire))
    return whole.count, int(whole.total * 1000)
