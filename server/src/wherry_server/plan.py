"""What a rollout intends, fixed when it is created. Pure.

`parse_plan` refuses whatever it does not know or cannot hold to; a plan that does not parse is never stored, so no gate
ever meets a bound that it cannot read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from wherry_server import pacing
from wherry_server.flags import PREFIX as FLAG_PREFIX
from wherry_server.flags import fingerprint, type_of
from wherry_server.gates import APP, BESIDE, QUANTILES, Bound, Gate, check_bound, check_gate, has_control
from wherry_server.pacing import Approval, Rate, Window
from wherry_server.targeting import FAMILIES, FIELDS, counted_cut_offs, cut_offs, parse_selector
from wherry_shared.digest import check_digest
from wherry_shared.errors import RefusedError
from wherry_shared.ids import target_path
from wherry_shared.wire import Mode, Trial

FORMAT = 1
STAGES_MAX = 20
MODELS_MAX = 1
"""One until groups of models are released together; plans and tables hold a list from the start."""
SECONDS_MAX = 366 * 86_400
PRIORITY_MAX = 1_000
ATTEMPT_MAX = 1_000_000
STRATA_MAX = 4
COUNT_MAX = 100_000_000
"""Devices of a stage that is given as a count."""
GATES_MAX = 8
PERIOD_S_MIN, PERIOD_S_MAX = 10, 86_400
GRACE_S = 30
"""How long after a period its telemetry may arrive and count."""
HOLD_BACK = 0.05
"""Share of the cohort that keeps the incumbent until a rollout with a comparison is done, unless the plan says another."""
HOLD_BACK_MAX = 0.5
HARMED_MAX = 5.0
FLAG_STRATEGIES = frozenset({"canary", "adaptive", "all_at_once"})
FLAG_METRICS = frozenset({"failed", "returned", "errors", "crash_rate", *QUANTILES})
"""And what applications tell: what is measured on devices, whoever caused it."""
FLAG_TERMS = frozenset({"min_requests", "max_s", "error_rate_max", "errors_min"})
"""Of a trial: what holds for flags, which the server judges (`flag_trials`)."""
Strategy = Literal["canary", "adaptive", "all_at_once", "shadow", "blue_green", "split"]
OnHalt = Literal["hold", "revert_stage", "revert_all"]
Then = Literal["keep", "promote", "back"]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of plan types: an unknown field is a wish that nobody would obey, so it is refused."""


class PlannedModel(_Strict, frozen=True, kw_only=True):
    """A model and the bundle that it should come to."""

    model: str
    version: str
    manifest: str

    @property
    def target(self) -> str:
        """TUF target path of the bundle."""
        return f"{self.model}/{self.version}"


class Stage(_Strict, frozen=True, kw_only=True):
    """A share or a number of the cohort's devices, and what it has to prove before the next one starts."""

    share: float = 0.0
    count: int = 0
    """Devices instead of a share, divided among the strata by their size, rounded up in each."""
    per_stratum: bool = False
    """Whether `count` is of each stratum."""
    soak_s: int = 0
    """Seconds that the stage stays as it is after its sample stood, for trouble that comes late."""
    confirmed_min: int = 1
    """Devices new in this stage that have to be confirmed with traffic (all of them if the stage has fewer); 0 is a
    choice that is shown."""


class Split(_Strict, frozen=True, kw_only=True):
    """An experiment: the candidate has a stable share for a stated time, and the gates with a control say what came of it."""

    for_s: int
    """How long, from when the sample stands (of devices), or on each device from its first request (of requests)."""
    by: Literal["devices", "requests"] = "devices"
    share: float = 0.5
    """Of the devices of the last stage's share, or of the requests of each device."""
    better: Then = "promote"
    """What follows where a gate's difference is below 0 and none is undecided."""
    same: Then = "back"
    """What follows where every gate rules its harm out and none shows a difference."""
    undecided: Then = "back"


class Plan(_Strict, frozen=True, kw_only=True):
    """Everything that `rollout.decide` obeys."""

    format: int = FORMAT
    models: list[PlannedModel] = []
    flag: str = ""
    """A feature flag instead of models."""
    variant: str = ""
    """Of `flag`: what the devices should have."""
    value: Any = None
    """Of `variant`, when the rollout was created."""
    measure: str = ""
    """With `flag`: the model on whose requests devices are judged and compared; all of them if empty."""
    selector: str
    cohort: str = ""
    """Name of the saved cohort that the selector came from; the text above is what counts."""
    strategy: Strategy = "canary"
    harmed_max: float | None = None
    """Of `adaptive`: devices that may be harmed, as far as is known (`sequential.expected_harm`); HARMED_MAX by default."""
    requests: float = 1.0
    """Of `shadow`: share of each device's requests that the candidate answers too, unseen."""
    on_success: Literal["promote", "end"] = "promote"
    """Of `shadow`: whether the devices then get the bundle, stage by stage, or go on as they were."""
    split: Split | None = None
    stages: list[Stage]
    strata: list[str] = []
    """Fields within each of whose values the share is taken, so that a stage resembles the fleet."""
    sample_min: int = 1
    """Settled devices new in a stage before it may end (all of them if the stage has fewer)."""
    settled_share: float = 0.95
    """Share of exposed devices that have to have settled, or to have passed a deadline, before a stage may end."""
    failure: Bound = Bound(share=0.1, sample_min=5)
    silent_s: int = 3_600
    """A device that never spoke of its exposure for this long, or then vanished for this long, is silent."""
    silent: Bound = Bound(share=0.5, sample_min=5)
    late_s: int = 3_600
    """A device that spoke of its exposure this long ago, and has not settled, is late."""
    late: Bound = Bound(share=0.3, sample_min=5)
    excused: Bound = Bound(share=0.5, sample_min=5)
    """Devices that ended their attempt without a verdict (restarts, a policy of the publisher): neutral one by one, but a
    release that most devices cannot even judge is not proved by the rest."""
    gates: list[Gate] = []
    """Gates with stated errors, beside the bounds above."""
    period_s: int = 900
    """Gates with a control compare values of whole periods of this length."""
    hold_back: float | None = None
    """Share of the cohort that is not exposed before the rollout is done; by default HOLD_BACK if a gate has a control."""
    stage_max_s: int = 7 * 86_400
    """A stage that has not proved itself by then halts the rollout, keeping what is confirmed."""
    revert_s: int = 86_400
    """How long a halt waits for devices to be back; those still away are counted and get it at their next hello."""
    on_halt: OnHalt = "revert_all"
    supersede: bool = False
    """Take devices over from an active rollout of the same model and priority."""
    rollback: bool = False
    """It takes devices back to what they had: a rollback after it goes back further, and never to what it took away."""
    priority: int = 0
    attempt: int = 1
    """Above 1: try again also where the bundle is known to be bad."""
    trial: Trial = Trial()
    rate: Rate | None = None
    """How fast devices are exposed inside a stage."""
    window: Window | None = None
    """When devices are exposed, by the clock of their own time zone."""
    start_at: str = ""
    """A date with a zone, before which the first stage does not begin."""
    approval: Approval | None = None

    @property
    def targets(self) -> list[PlannedModel]:
        """What is rolled out, under the names that assignments have: models, or a flag as if it were one."""
        if not self.flag:
            return self.models
        digest = fingerprint(self.flag, self.variant, self.value)
        return [PlannedModel(model=FLAG_PREFIX + self.flag, version=self.variant, manifest=digest)]

    @property
    def start_us(self) -> int:
        """When the first stage may begin, microseconds UTC; 0 where nothing is said."""
        return pacing.start_us(self.start_at)

    def approvers(self, stage: int, round_: int = 1) -> int:
        """Return how many people have to agree before a stage begins; who flips together does so in the last one."""
        rule = self.approval
        if rule is None or round_ not in rule.rounds:
            return 0
        flips = round_ == 2 and self.strategy == "blue_green"
        asked = stage == len(self.stages) - 1 if flips else stage + 1 in rule.stages
        return rule.approvers if asked else 0

    @property
    def rounds(self) -> int:
        """How often devices are told: once, or first to try the candidate beside the incumbent and then to let it answer."""
        return 2 if self.two_rounds and self.on_success != "end" else 1

    @property
    def tries(self) -> Mode:
        """How the first of two rounds offers the candidate; `replace` where there is one round only."""
        if self.strategy == "shadow":
            return "shadow"
        if self.strategy == "blue_green":
            return "blue_green"
        return "split" if self.split is not None and self.split.by == "requests" else "replace"

    @property
    def two_rounds(self) -> bool:
        """Whether the candidate first runs beside the incumbent everywhere, and takes over in a second round."""
        return self.tries != "replace"

    @property
    def paired(self) -> bool:
        """Whether a device is its own control: candidate and incumbent share its requests."""
        return self.tries == "split"

    @property
    def tried(self) -> tuple[float, Trial]:
        """The share of requests and the terms of the first of two rounds."""
        if self.split is not None:
            return self.split.share, msgspec.structs.replace(self.trial, max_s=self.split.for_s)
        if self.strategy == "blue_green":  # it stands by until everybody is told to flip
            longest = min(self.stage_max_s * (len(self.stages) + 1), SECONDS_MAX)
            return 0.0, msgspec.structs.replace(self.trial, max_s=longest)
        return self.requests, self.trial

    @property
    def compared(self) -> list[Gate]:
        """The gates that have a control."""
        return [gate for gate in self.gates if has_control(gate.metric)]

    @property
    def held_back(self) -> float:
        """The share that keeps the incumbent until the rollout is done."""
        if self.split is not None and self.split.by == "devices":
            return 1 - self.split.share
        if self.hold_back is None:
            return HOLD_BACK if self.compared else 0.0
        return self.hold_back

    @property
    def takes_turns(self) -> bool:
        """Whether few devices at a time are taken from one stratum after the other, so that the first are of every kind."""
        return self.strategy == "adaptive" and bool(self.strata)

    @property
    def harm_bound(self) -> float:
        """How much expected harm `adaptive` keeps to."""
        return HARMED_MAX if self.harmed_max is None else self.harmed_max

    def cut_offs(
        self, stage: int, keys: Mapping[str, Iterable[int]], stored: Mapping[str, int], *, done: bool = False
    ) -> dict[str, int]:
        """Return the cut-offs with which a stage begins; when all is done the last one has its whole share."""
        told = self.stages[stage]
        if told.count:
            most = 1.0 if done else 1 - self.held_back
            return counted_cut_offs(keys, told.count, each=told.per_stratum, most=most, stored=stored)
        return cut_offs(keys, self.share_of(stage, done=done), stored)

    def share_of(self, stage: int, *, done: bool = False) -> float:
        """Return the share of the cohort that a stage exposes; the last one exposes its whole share when all is done.

        A stage that is a count has no share (0); it goes no further than 1 − `held_back` either.
        """
        share = self.stages[stage].share
        return share if done else min(share, 1 - self.held_back)


NOT_STORED = "nothing was stored"
SEE_PLANS = "see what a plan may say: docs/formats/plan.md"


def parse_plan(data: bytes | dict[str, Any]) -> Plan:
    """Parse and check a plan.

    Raises:
        RefusedError: `plan_invalid`, `plan_format`, `plan_strategy`, `plan_models`, `plan_stages`, `plan_bound`,
            `plan_gate`, `plan_flag`, `plan_range`, `plan_rate`, `plan_window`, `plan_date`, `plan_approval`, `bad_selector`, `bad_name`, `bad_version` or `bad_digest`.
    """
    try:
        raw = msgspec.json.decode(data) if isinstance(data, bytes) else data
        if not isinstance(raw, dict):
            raise RefusedError("plan_invalid", "a plan is an object")
        _check_known(raw)
        plan = msgspec.convert(raw, Plan)
        _check(plan)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(
            "plan_invalid", f"not a plan: {error}", consequence=NOT_STORED, next_step=SEE_PLANS
        ) from error
    except RefusedError as error:
        error.consequence = error.consequence or NOT_STORED
        error.next_step = error.next_step or SEE_PLANS
        raise
    return plan


def _check_known(raw: dict[str, Any]) -> None:
    """Refuse what types alone would let pass: later formats, unknown trial terms."""
    if raw.get("format", FORMAT) != FORMAT:
        raise RefusedError("plan_format", f"plan format {raw['format']!r:.40}, this release reads {FORMAT}")
    trial = raw.get("trial", {})
    if isinstance(trial, dict):
        unknown = sorted(str(key) for key in trial if key not in Trial.__struct_fields__)
        if unknown:
            raise RefusedError("plan_invalid", f"not a plan: unknown trial terms {', '.join(unknown)[:200]}")


def _within(value: float, low: float, high: float, what: str) -> None:
    if not low <= value <= high:
        raise RefusedError("plan_range", f"{what} is {value}, expected {low} to {high}")


def _check(plan: Plan) -> None:
    if plan.flag:
        _check_flag(plan)
    elif plan.variant or plan.measure or plan.value is not None:
        raise RefusedError("plan_flag", "variant and measure are of a rollout of a flag, and the plan names none")
    elif not 1 <= len(plan.models) <= MODELS_MAX:
        raise RefusedError(
            "plan_models",
            f"a plan names {len(plan.models)} models, this release rolls out {MODELS_MAX} at a time",
            next_step="make one rollout per model",
        )
    for planned in plan.models:
        target_path(planned.model, planned.version)
        check_digest(planned.manifest)
    parse_selector(plan.selector)
    if not 1 <= len(plan.stages) <= STAGES_MAX:
        raise RefusedError("plan_stages", f"{len(plan.stages)} stages, expected 1 to {STAGES_MAX}")
    before, counted = 0.0, 0
    for number, stage in enumerate(plan.stages, 1):
        if stage.count:
            if stage.share or before or stage.count <= counted or plan.strategy == "adaptive":
                raise RefusedError(
                    "plan_stages",
                    f"stage {number} has count {stage.count}: counts ascend, come before shares, and are not of adaptive",
                )
            counted = stage.count
            _within(stage.count, 1, COUNT_MAX, f"count of stage {number}")
        elif not before < stage.share <= 1:
            raise RefusedError(
                "plan_stages", f"stage {number} has share {stage.share}, expected above {before} up to 1"
            )
        else:
            before = stage.share
            _within(stage.share, 1e-6, 1, f"share of stage {number}")
        if stage.per_stratum and not (stage.count and plan.strata):
            raise RefusedError(
                "plan_stages", f"stage {number} is per_stratum without a count, or the plan has no strata"
            )
        _within(stage.soak_s, 0, SECONDS_MAX, f"soak_s of stage {number}")
        _within(stage.confirmed_min, 0, 1_000_000, f"confirmed_min of stage {number}")
    if len(plan.strata) > STRATA_MAX:
        raise RefusedError("plan_range", f"{len(plan.strata)} strata, at most {STRATA_MAX}")
    for field in plan.strata:
        family, dot, rest = field.partition(".")
        if field not in FIELDS and not (dot and rest and family in FAMILIES):
            raise RefusedError("plan_range", f"strata name an unknown field {field[:40]!r}")
    for name in ("failure", "silent", "late", "excused"):
        check_bound(getattr(plan, name), name)
    if len(plan.gates) > GATES_MAX or len({gate.metric for gate in plan.gates}) < len(plan.gates):
        raise RefusedError("plan_gate", f"at most {GATES_MAX} gates, and one per metric")
    _within(plan.period_s, PERIOD_S_MIN, PERIOD_S_MAX, "period_s")
    for gate in plan.gates:
        check_gate(gate, plan.period_s)
    if plan.split is None:
        _within(plan.held_back, 0, HOLD_BACK_MAX, "hold_back")
    if plan.strategy == "adaptive":
        if len(plan.stages) != 1:
            raise RefusedError(
                "plan_stages", "adaptive widens by itself: give one stage, with the share that it ends at"
            )
        _within(plan.harm_bound, 1, 1_000_000, "harmed_max")
    elif plan.harmed_max is not None:
        raise RefusedError("plan_range", "harmed_max is of strategy adaptive", consequence="nobody would obey it")
    if plan.strategy == "all_at_once" and (len(plan.stages) != 1 or plan.stages[0].share != 1):
        raise RefusedError("plan_stages", "all_at_once has no steps: give one stage with share 1, or use canary")
    _check_strategy(plan)
    if plan.compared and not plan.held_back and not plan.paired:
        raise RefusedError("plan_gate", "hold_back is 0, and a gate compares with devices that are held back")
    _within(plan.sample_min, 1, 1_000_000, "sample_min")
    _within(plan.settled_share, 0.01, 1, "settled_share")
    for name in ("silent_s", "late_s", "stage_max_s", "revert_s"):
        _within(getattr(plan, name), 1, SECONDS_MAX, name)
    _within(plan.priority, -PRIORITY_MAX, PRIORITY_MAX, "priority")
    _within(plan.attempt, 1, ATTEMPT_MAX, "attempt")
    pacing.check(plan.rate, plan.window, plan.approval, plan.start_at, len(plan.stages), plan.rounds)
    _check_trial(plan.trial)
    if plan.late_s <= plan.trial.max_s:
        raise RefusedError(
            "plan_range",
            f"late_s {plan.late_s} is not above the trial's max_s {plan.trial.max_s}",
            consequence="every quiet device would be late before its trial may end",
        )
    kept = plan.split.for_s if plan.split is not None else 0
    longest = max(stage.soak_s for stage in plan.stages) + plan.late_s + kept
    if plan.stage_max_s < longest:
        raise RefusedError(
            "plan_range",
            f"stage_max_s {plan.stage_max_s} is below the longest soak + late_s (+ split.for_s), {longest}",
        )


def _check_flag(plan: Plan) -> None:
    """Refuse what would have no meaning for a flag, which no device tries by itself."""
    if plan.models:
        raise RefusedError("plan_flag", "a plan has models or a flag", next_step="make one rollout for each")
    if plan.strategy not in FLAG_STRATEGIES:
        raise RefusedError("plan_flag", f"strategy {plan.strategy} is of models", next_step="use canary")
    if not plan.variant or type_of(plan.value) == "nothing":
        raise RefusedError("plan_flag", "a rollout of a flag names the variant that devices should have")
    strange = sorted({one.metric for one in plan.gates if not one.metric.startswith(APP)} - FLAG_METRICS)
    if strange:
        raise RefusedError("plan_flag", f"gates of {', '.join(strange)} measure models, and this is a flag")
    default = Trial()
    vain = [name for name in Trial.__struct_fields__ if name not in FLAG_TERMS]
    vain = [name for name in vain if getattr(plan.trial, name) != getattr(default, name)]
    if vain:
        raise RefusedError(
            "plan_flag",
            f"trial has {', '.join(vain)}, which no device obeys for a flag",
            next_step=f"terms of a flag's trial: {', '.join(sorted(FLAG_TERMS))}",
        )


def _check_strategy(plan: Plan) -> None:
    """Refuse terms of one strategy in a plan of another, and strategies without what they end by.

    Raises:
        RefusedError: `plan_strategy` or `plan_range`.
    """
    if (plan.split is not None) != (plan.strategy == "split"):
        raise RefusedError("plan_strategy", "strategy split and its terms `split` belong together")
    if plan.strategy != "shadow" and (plan.requests != 1 or plan.on_success != "promote"):
        raise RefusedError("plan_strategy", "requests and on_success are of strategy shadow")
    beside = sorted({gate.metric for gate in plan.gates} & BESIDE)
    if beside and plan.strategy != "shadow":
        raise RefusedError("plan_strategy", f"gate {beside[0]} is of strategy shadow")
    _within(plan.requests, 0.001, 1, "requests")
    promotes = plan.strategy == "shadow" and plan.on_success == "promote"
    if promotes and "disagreed" not in beside and not plan.trial.agreement_min:
        raise RefusedError(
            "plan_strategy",
            "a shadow is promoted by its agreement, and the plan does not say how much",
            next_step='give a gate with metric "disagreed", trial.agreement_min, or on_success = "end"',
        )
    if plan.strategy == "blue_green" and plan.on_halt != "revert_all":
        raise RefusedError("plan_strategy", "blue_green flips everybody back: on_halt is revert_all")
    split = plan.split
    if split is None:
        return
    _within(split.share, 0.01, 0.99, "split.share")
    _within(split.for_s, 1, SECONDS_MAX, "split.for_s")
    if len(plan.stages) != 1:
        raise RefusedError("plan_stages", "a split has one stage: whom it is for; its own share is split.share")
    if not plan.compared:
        raise RefusedError("plan_strategy", "a split ends with a verdict: give gates that compare, such as errors")
    if plan.hold_back is not None:
        raise RefusedError("plan_strategy", "a split holds back by itself: hold_back is not of it")
    if split.for_s < (shortest := 2 * plan.period_s + GRACE_S):
        raise RefusedError(
            "plan_range",
            f"split.for_s {split.for_s} is below {shortest}: what is left of the period in which it begins, a whole one of"
            f" {plan.period_s} s to compare, and {GRACE_S} s until it has been heard of",
            consequence="it would end undecided",
            next_step="give it longer, or a shorter period_s",
        )
    if split.by == "requests":
        if "keep" in (split.better, split.same, split.undecided):
            raise RefusedError("plan_strategy", "a split of requests ends on each device: promote or back, not keep")
        if any(gate.metric == "crash_rate" for gate in plan.compared):
            raise RefusedError(
                "plan_strategy",
                "both sides of a split of requests share a worker, and die together: compare errors, latency or app:NAME",
            )
        if plan.late_s <= split.for_s:
            raise RefusedError("plan_range", f"late_s {plan.late_s} is not above split.for_s {split.for_s}")


def _check_trial(trial: Trial) -> None:
    _within(trial.min_requests, 0, 1_000_000_000, "trial.min_requests")
    _within(trial.max_s, 1, SECONDS_MAX, "trial.max_s")
    _within(trial.error_rate_max, 0, 1, "trial.error_rate_max")
    _within(trial.errors_min, 0, 1_000_000_000, "trial.errors_min")
    for name in ("latency_ratio_max", "latency_tail_ratio_max", "canary_latency_ratio_max"):
        _within(getattr(trial, name), 0.01, 1_000_000, f"trial.{name}")
    for name in ("latency_tail_min_ms", "restarts_max", "crashes_max", "canary_memory_bytes_max"):
        _within(getattr(trial, name), 0, 1 << 50, f"trial.{name}")
    _within(trial.deadline_ms, 1, 86_400_000, "trial.deadline_ms")
    _within(trial.canary_s, 1, 86_400, "trial.canary_s")
    _within(trial.variant_tries, 1, 16, "trial.variant_tries")
