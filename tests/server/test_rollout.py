"""The rollout engine over random plans, fleets, outcomes and orders of events; then the cases that have a name."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_server.gates import Bound
from wherry_server.plan import Plan, parse_plan
from wherry_server.rollout import (
    ACTIVE,
    FINAL,
    PACE_ERROR,
    RESTARTS_MAX,
    Counts,
    Decision,
    Evidence,
    Expose,
    Lane,
    Moved,
    Progress,
    Promote,
    Retry,
    State,
    Taken,
    Withdraw,
    allowed_now,
    approvable,
    approval_key,
    decide,
    following,
    next_share,
    reach,
    seen,
    takes_newcomers,
    verdicts,
    why_not_yet,
)
from wherry_server.sequential import Pairs, expected_harm
from wherry_server.targeting import cut_offs, exposed, key_of
from wherry_shared.clock import Now, Since
from wherry_shared.errors import RefusedError

DIGEST = "sha256:" + "a" * 64
SALT = "salt"
LATE_S, SILENT_S, STAGE_MAX_S, REVERT_S = 60, 100, 500, 80


def plan_of(**changes: Any) -> Plan:
    """A plan with short waits."""
    return parse_plan(
        {
            "models": [{"model": "m", "version": "1.0.0", "manifest": DIGEST}],
            "selector": "all",
            "stages": [{"share": 0.25}, {"share": 1.0}],
            "trial": {"max_s": 30},
            "late_s": LATE_S,
            "silent_s": SILENT_S,
            "stage_max_s": STAGE_MAX_S,
            "revert_s": REVERT_S,
            **changes,
        }
    )


@dataclass
class Device:
    """One device of the model fleet, and what it will do once it is exposed."""

    name: str
    stratum: str
    behaviour: str
    delay_s: int
    state: str = ""
    stage: int = -1
    exposed_s: float = 0.0
    changed: bool = False
    timezone: str = "UTC"
    tried: bool = False

    def settle(self, now_s: float) -> None:
        """Let time pass on the device."""
        if self.state == "exposed" and now_s - self.exposed_s >= self.delay_s:
            if self.tried and self.behaviour not in ("failed", "mute", "stuck"):
                self.state = "proved"
            elif self.behaviour in ("confirmed", "confirmed_idle", "vanishes"):
                self.state, self.changed = self.behaviour.replace("vanishes", "confirmed"), True
            elif self.behaviour == "failed":
                self.state = "failed"
        if self.state == "revert_pending" and self.behaviour != "vanishes":
            self.state, self.changed = "reverted", False


@dataclass
class Fleet:
    """What the director does with decisions and where its counts come from, without a database."""

    plan: Plan
    devices: list[Device]
    chunk: int
    now_s: float = 0.0
    progress: Progress = field(default_factory=Progress)
    ever_exposed: set[str] = field(default_factory=set)

    def evidence(self, now_s: float, command: str) -> Evidence:
        self.now_s = now_s
        stages: list[dict[str, int]] = [{} for _ in self.plan.stages]
        for device in self.devices:
            if not device.state:
                continue
            became = device.state
            if became == "exposed":
                waited = now_s - device.exposed_s
                quiet = device.behaviour == "mute"
                became = "pending"
                if waited >= SILENT_S and quiet:
                    became = "silent"
                elif waited >= LATE_S and not quiet:
                    became = "late"
            stages[device.stage][became] = stages[device.stage].get(became, 0) + 1
        keys: dict[str, list[int]] = {}
        for device in self.devices:
            keys.setdefault(device.stratum, []).append(key_of(SALT, device.name))
        found = Evidence(
            stages=[Counts(**stage) for stage in stages],
            members=len(self.devices),
            unexposed=len(self.below(self.progress)),
            happened={"failed": sum(stage.get("failed", 0) for stage in stages)},
            unpromoted=[sum(one.stage == stage for one in self.unpromoted()) for stage in range(len(self.plan.stages))],
            beside={"disagreed": ((0, sum(one.state == "proved" for one in self.devices)),)},
            command=command,  # type: ignore[arg-type]
        )
        below = self.below(self.progress)
        open_now = [device for device in below if self.window_open(device)]
        found = msgspec.structs.replace(
            found,
            unexposed=len(open_now),
            closed=len(below) - len(open_now),
            approvals={
                approval_key(stage, number): 1
                for stage in range(len(self.plan.stages))
                for number in (1, 2)
                if now_s >= agreed_s(stage, number)
            },
        )
        following = len(self.plan.stages) if self.progress.promoting else self.progress.stage + 1
        adaptive = self.plan.strategy == "adaptive"
        share = next_share(self.plan, self.progress, found) if adaptive else 0.0
        coming: dict[str, int] = {}
        if adaptive and share:
            coming = cut_offs(keys, share, self.progress.cut_offs)
        elif not adaptive and following < len(self.plan.stages):
            coming = self.plan.cut_offs(following, keys, self.progress.cut_offs)
        elif not adaptive and self.plan.held_back:
            coming = self.plan.cut_offs(following - 1, keys, self.progress.cut_offs, done=True)
        return msgspec.structs.replace(found, next_cut_offs=coming, next_share=share)

    def window_open(self, device: Device) -> bool:
        return self.plan.window is None or self.plan.window.open_at(int(self.now_s * 1e6), device.timezone)

    def below(self, progress: Progress) -> list[Device]:
        """Devices that a stage may still expose."""
        if not takes_newcomers(self.plan, progress):
            return []
        share = reach(self.plan, progress)
        return [
            device
            for device in self.devices
            if not device.state and exposed(key_of(SALT, device.name), device.stratum, progress.cut_offs, share)
        ]

    def unpromoted(self) -> list[Device]:
        """Devices whose candidate did not take over yet."""
        return [one for one in self.devices if one.tried and one.state in ("exposed", "proved")]

    def apply(self, decisions: tuple[Decision, ...], after: Progress, now_s: float) -> None:
        for one in decisions:
            if isinstance(one, Expose):
                most = self.chunk if one.limit is None else min(self.chunk, one.limit)
                for device in [device for device in self.below(after) if self.window_open(device)][:most]:
                    device.state, device.stage, device.exposed_s = "exposed", one.stage, now_s
                    device.tried = self.plan.two_rounds and not after.promoting
                    self.ever_exposed.add(device.name)
            elif isinstance(one, Promote):
                most = self.chunk if one.limit is None else min(self.chunk, one.limit)
                for device in [device for device in self.unpromoted() if device.stage <= one.stage][:most]:
                    device.state, device.tried, device.exposed_s = "exposed", False, now_s
            elif isinstance(one, Retry):
                for device in self.devices:
                    if one.failed and device.state == "failed":
                        device.state, device.exposed_s = "exposed", now_s
            elif isinstance(one, Withdraw):
                for device in self.devices:
                    confirmed = device.state in ("confirmed", "confirmed_idle")
                    in_scope = one.scope == "all" or (one.scope == "stage" and device.stage == one.stage)
                    if device.state in ("exposed", "proved"):
                        device.state = "withdrawn"
                    elif confirmed and in_scope:
                        device.state = "revert_pending"
        self.progress = after


SHADOW: dict[str, Any] = {
    "strategy": "shadow",
    "gates": [{"metric": "disagreed", "tolerated": 0.1, "harm": 0.5, "beta": 0.3}],
    "trial": {"max_s": 30, "agreement_min": 0.5},
}
SPLIT: dict[str, Any] = {
    "strategy": "split",
    "split": {"for_s": 50},
    "period_s": 10,
    "gates": [{"metric": "errors", "harm": 0.1}],
    "hold_back": None,
}


def agreed_s(stage: int, number: int) -> int:
    """When somebody agreed to a stage of a round."""
    return 40 * (stage + 1) + 150 * (number - 1)


def _fitting(pace: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """Approvals of a second round are of plans that have one."""
    second = pace.get("approval", {}).get("rounds") == [2]
    return {} if second and plan_of(**{"stages": [{"share": 1.0}], **how}).rounds == 1 else pace


behaviours = st.sampled_from(["confirmed"] * 5 + ["vanishes"] * 2 + ["confirmed_idle", "failed", "mute", "stuck"])
devices = st.lists(
    st.tuples(st.sampled_from(["", "", "b"]), behaviours, st.integers(0, 50)), min_size=0, max_size=25
).map(lambda rows: [Device(f"d{n}", stratum, how, delay) for n, (stratum, how, delay) in enumerate(rows)])
bounds = st.one_of(
    st.builds(Bound, count=st.integers(0, 4)),
    st.builds(Bound, share=st.sampled_from([0.0, 0.1, 0.3, 0.6]), sample_min=st.integers(1, 6)),
)
plans = st.builds(
    lambda shares, soak, confirmed, failure, silent, late, on_halt, sample, settled, gates, how, counted, pace: plan_of(
        stages=[
            *({"count": count, "confirmed_min": confirmed} for count in counted if "strategy" not in how),
            *({"share": share, "soak_s": soak, "confirmed_min": confirmed} for share in sorted(set(shares))),
        ][: 1 if how.get("strategy") in ("adaptive", "split") else None],
        failure=msgspec.to_builtins(failure),
        silent=msgspec.to_builtins(silent),
        late=msgspec.to_builtins(late),
        sample_min=sample,
        settled_share=settled,
        **{"gates": gates, "on_halt": on_halt, **how},
        **_fitting(pace, how),
    ),
    st.lists(st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=4),
    st.sampled_from([0, 0, 30]),
    st.sampled_from([0, 1, 1, 3]),
    bounds,
    bounds,
    bounds,
    st.sampled_from(["hold", "revert_stage", "revert_all"]),
    st.integers(1, 8),
    st.sampled_from([0.5, 0.95, 1.0]),
    st.sampled_from([[], [], [{"metric": "failed", "tolerated": 0.1, "harm": 0.5, "beta": 0.3}]]),
    st.sampled_from(
        [
            {},
            {},
            {"hold_back": 0.2},
            {"strategy": "adaptive", "harmed_max": 2},
            {"strategy": "adaptive", "hold_back": 0.1},
            {**SHADOW, "gates": []},
            {**SHADOW, "on_success": "end"},
            {"strategy": "blue_green", "on_halt": "revert_all"},
            SPLIT,
            {**SPLIT, "split": {"for_s": 50, "undecided": "keep"}},
            {**SPLIT, "split": {"for_s": 50, "undecided": "promote"}},
            {**SPLIT, "split": {"for_s": 50, "by": "requests", "undecided": "promote"}},
        ]
    ),
    st.sampled_from([[], [], [2], [1, 4]]),
    st.sampled_from(
        [
            {},
            {},
            {"rate": {"per_minute": 20}},
            {"rate": {"per_minute": 5, "ramp_to": 60, "ramp_s": 60}},
            {"window": {"from": "00:05", "until": "00:20"}},
            {"window": {"from": "00:01", "until": "23:59"}, "rate": {"per_minute": 30}},
            {"start_at": "1970-01-01T00:01:00+00:00", "approval": {"stages": [1]}},
            {"approval": {"stages": [1], "rounds": [2]}},
        ]
    ),
)
commands = st.lists(
    st.tuples(
        st.integers(0, 60), st.sampled_from(["pause", "resume", "abort", "revert", "revert", "start", "retry_failed"])
    ),
    max_size=4,
)


def told(evidence: Evidence, progress: Progress) -> int:
    """Return how many devices of the stage were exposed, or in a second round promoted or through without."""
    waiting = evidence.unpromoted[progress.stage : progress.stage + 1] if progress.promoting else []
    return evidence.stage(progress.stage).ever - sum(waiting)


BACK = {"hold": "unconfirmed", "revert_stage": "stage", "revert_all": "all"}
WORLDS = (plans, devices, commands, st.integers(0, 2**32), st.integers(1, 10), st.integers(0, 3))
"""A rollout from start to end: plan, fleet, orders, chance, devices of one transaction, reboots."""


@given(*WORLDS)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_a_rollout_is_bounded_final_and_ends(
    plan: Plan, members: list[Device], orders: list[tuple[int, str]], seed: int, chunk: int, reboots: int
):
    chance = random.Random(seed)
    newcomers = [Device(f"n{n}", chance.choice(["", "b", "c"]), "confirmed", 3) for n in range(chance.randrange(4))]
    fleet = Fleet(plan, members, chunk)
    wanted = {0: "start", **{turn + 1: command for turn, command in orders}}
    boots = {chance.randrange(1, 80) for _ in range(reboots)}
    now_s, boot, boot_s = 0.0, 0, 0.0
    breached, anchors, stage_s, stage_told, returned_s = False, 0, 0.0, 0, 0.0
    window_s = 86_400 if plan.window is not None else 0
    limit_s = window_s + (2 * len(plan.stages) + 1) * (STAGE_MAX_S + 60) * (reboots + 2) + 2 * REVERT_S + 1000
    turn = 0
    while True:
        if turn in boots:
            boot, boot_s = boot + 1, now_s
        now = Now(f"boot-{boot}", int((now_s - boot_s) * 1000), now_s)
        if newcomers and chance.random() < 0.1:
            fleet.devices.append(newcomers.pop())
        for device in chance.sample(fleet.devices, len(fleet.devices)):
            device.settle(now_s)
        command = wanted.get(turn, "")
        if fleet.progress.state == "paused" and turn > 70:
            command = "resume"
        before = fleet.progress
        evidence = fleet.evidence(now_s, command)
        after, decisions = decide(plan, before, evidence, now)

        # the same question has the same answer, and carrying the answer out twice changes nothing more
        assert decide(plan, before, evidence, now) == (after, decisions)

        exposing = [one for one in decisions if isinstance(one, Expose)]
        promoting = [one for one in decisions if isinstance(one, Promote)]
        found = verdicts(plan, seen(before, evidence), after.compared)
        breached = breached or (before.state in ACTIVE and any(one.outcome == "breach" for one in found))
        if breached:
            assert not exposing, "nothing widens after a breach"
            assert not promoting, "nothing is promoted after a breach"
        if after.state == "returning" and before.state != "returning" and after.reason.endswith("_bound"):
            scopes = [one.scope for one in decisions if isinstance(one, Withdraw)]
            assert scopes == [BACK[plan.on_halt]], "a breach takes back whom the plan says"
        assert all(after.cut_offs.get(name, 0) >= at for name, at in before.cut_offs.items()), "a cut-off fell"
        second = after.promoting and not before.promoting
        assert second or before.stage <= after.stage <= before.stage + 1
        assert after.promoting or not before.promoting, "a second round was taken back"
        assert not promoting or (plan.two_rounds and after.promoting and after.state == "running")
        if before.state in FINAL:
            assert after.state == before.state or command == "revert"
            assert not exposing or before.state == "done"
        if before.state in ("paused", "returning", "halted", "aborted", "reverted"):
            assert not exposing or command == "resume"
            assert not promoting or command == "resume"
        if after.stage > before.stage or second:
            number = 2 if after.promoting else 1
            agreed = now_s >= agreed_s(after.stage, number)
            assert agreed or not plan.approvers(after.stage, number), "it began unapproved"
            assert now.wall_us >= plan.start_us, "it began before its date"
        if after.stage > before.stage or second:
            anchors, stage_s, stage_told = 0, now_s, told(evidence, after)
        anchors += after.paced is not None and after.paced != before.paced
        if plan.rate is not None and exposing and after.state == "running":
            assert exposing[-1].limit is not None
            fastest = max(plan.rate.per_minute, plan.rate.ramp_to or 0) / 60
            here = told(evidence, after) - stage_told + exposing[-1].limit
            assert here <= anchors + fastest * (now_s - stage_s) + 1e-6, "faster than the rate"
        for one in exposing:
            assert one.cut_offs == after.cut_offs
        if after.entered != before.entered:  # it began, went further by order, or a reboot started it again
            returned_s = now_s
        assert after.state != "returning" or now_s - returned_s < plan.revert_s, "devices are waited for without end"

        fleet.apply(decisions, after, now_s)
        if plan.strategy == "adaptive" and exposing and exposing[-1].limit is not None:
            total = fleet.evidence(now_s, "").total
            good = total.confirmed + total.confirmed_idle
            exposed_now = total.settled + total.pending + total.late
            harm = expected_harm(exposed=exposed_now, bad=total.failed, good=good, error=PACE_ERROR)
            assert harm <= plan.harm_bound + 1e-6 or not exposing[-1].limit, "more harm is expected than is allowed"
        exposed_then = set(fleet.ever_exposed)
        for device in fleet.devices:
            if device.name in exposed_then:
                share = reach(plan, after)
                assert exposed(key_of(SALT, device.name), device.stratum, after.cut_offs, share), "above the cut-off"
        if after.state not in FINAL:
            assert why_not_yet(plan, after, evidence, now) or exposing or promoting or after != before

        turn += 1
        now_s += chance.choice([1, 2, 5, 13]) + (300 if evidence.closed else 0)
        if after.state in FINAL and turn > max([0, *wanted]) and not newcomers:
            break
        if after.state in FINAL and turn > 400:
            break
        assert now_s < limit_s, f"does not end: {after.state}, {why_not_yet(plan, after, evidence, now)}"

    changed = [device for device in fleet.devices if device.changed]
    if fleet.progress.state == "reverted" or (
        fleet.progress.state == "halted" and plan.on_halt == "revert_all" and "_bound" in fleet.progress.reason
    ):
        assert all(device.behaviour == "vanishes" for device in changed), "a device that changed was not brought back"
    if fleet.progress.state in ("halted", "aborted", "reverted"):
        assert not [device for device in fleet.devices if device.state == "exposed"], "an unconfirmed one was left"


# --- cases with a name ---------------------------------------------------------------------------

NOW = Now("boot", 10_000_000, 1_000_000.0)


def later(seconds: float, boot: str = "boot") -> Now:
    return Now(boot, 10_000_000 + int(seconds * 1000), 1_000_000.0 + seconds)


def started(plan: Plan, members: int = 100) -> Progress:
    keys = {"": [key_of(SALT, f"d{n}") for n in range(members)]}
    evidence = Evidence(
        stages=[Counts()] * len(plan.stages), next_cut_offs=cut_offs(keys, plan.stages[0].share), command="start"
    )
    progress, decisions = decide(plan, Progress(), evidence, NOW)
    assert [type(one) for one in decisions] == [Moved, Expose]
    return progress


def evidence_of(*stages: Counts, alone: bool = False, **more: Any) -> Evidence:
    return Evidence(stages=list(stages), members=1 if alone else 100, **more)


def codes(plan: Plan, progress: Progress, evidence: Evidence, now: Now) -> list[str]:
    return [why.code for why in why_not_yet(plan, progress, evidence, now)]


def test_a_rollout_that_was_not_started_stays_as_it_is():
    plan = plan_of()
    assert decide(plan, Progress(), evidence_of(Counts(), Counts()), NOW) == (Progress(), ())
    assert codes(plan, Progress(), evidence_of(Counts(), Counts()), NOW) == ["not_started"]


WAITING = [
    ("exposing", Counts(confirmed=25), {"unexposed": 5}),
    ("no_devices", Counts(), {}),
    ("held", Counts(), {"held": 3}),
    ("sample", Counts(confirmed=2, silent=1), {}),
    ("in_flight", Counts(confirmed=20, pending=5), {}),
    ("traffic", Counts(confirmed_idle=25), {}),
]


@pytest.mark.parametrize(("code", "counts", "more"), WAITING)
def test_a_stage_says_what_it_waits_for(code: str, counts: Counts, more: dict[str, Any]):
    plan = plan_of(sample_min=3 if code == "sample" else 1)
    progress = started(plan)
    evidence = evidence_of(counts, Counts(), **more)
    after, decisions = decide(plan, progress, evidence, later(1))
    assert code in codes(plan, after, evidence, later(1))
    assert after.stage == 0
    assert not [one for one in decisions if isinstance(one, Moved)]


def test_a_stage_whose_devices_all_confirmed_is_followed_by_the_next():
    plan = plan_of()
    after, decisions = decide(
        plan, started(plan), evidence_of(Counts(confirmed=25), Counts(), next_cut_offs={"": 99}), later(1)
    )
    assert after.stage == 1
    assert [type(one) for one in decisions] == [Expose]


def test_a_soak_counts_from_when_the_sample_stood_and_starts_again_after_a_reboot():
    plan = plan_of(stages=[{"share": 1.0, "soak_s": 100}])
    progress = started(plan)
    good = evidence_of(Counts(confirmed=100))
    progress, _ = decide(plan, progress, good, later(50))
    progress, _ = decide(plan, progress, good, later(149))
    assert codes(plan, progress, good, later(149)) == ["soak"]
    rebooted, _ = decide(plan, progress, good, Now("other", 5_000, 1_000_150.0))
    assert (rebooted.state, rebooted.restarts) == ("running", 1)
    done, _ = decide(plan, progress, good, later(150))
    assert done.state == "done"


def test_a_wait_that_reboots_restart_for_ever_is_ended():
    plan = plan_of(stages=[{"share": 1.0}])
    progress = started(plan)
    pending = evidence_of(Counts(pending=100))
    for boot in range(RESTARTS_MAX + 1):
        progress, _ = decide(plan, progress, pending, Now(f"boot-{boot}", 0, 0.0))
    assert (progress.state, progress.ending) == ("returning", "halted")


def test_a_breach_is_judged_before_an_operator_may_pause():
    plan = plan_of()
    after, decisions = decide(
        plan, started(plan), evidence_of(Counts(confirmed=5, failed=20), Counts(), command="pause"), later(1)
    )
    assert (after.state, after.ending, after.reason) == ("returning", "halted", "failure_bound")
    assert [one for one in decisions if isinstance(one, Withdraw)] == [Withdraw(scope="all", stage=0)]


def test_a_paused_rollout_still_halts_on_a_breach_and_exposes_nobody():
    plan = plan_of()
    paused, _ = decide(plan, started(plan), evidence_of(Counts(pending=25), Counts(), command="pause"), later(1))
    still, decisions = decide(plan, paused, evidence_of(Counts(pending=25), Counts(), unexposed=5), later(2))
    assert (still.state, decisions) == ("paused", ())
    halted, _ = decide(plan, paused, evidence_of(Counts(failed=25), Counts()), later(3))
    assert halted.state == "returning"


@pytest.mark.parametrize(
    ("on_halt", "scope"), [("hold", "unconfirmed"), ("revert_stage", "stage"), ("revert_all", "all")]
)
def test_a_halt_brings_back_whom_the_plan_says(on_halt: str, scope: str):
    plan = plan_of(on_halt=on_halt)
    _, decisions = decide(plan, started(plan), evidence_of(Counts(failed=25), Counts()), later(1))
    assert [one.scope for one in decisions if isinstance(one, Withdraw)] == [scope]


@pytest.mark.parametrize(("counts", "reason"), [(Counts(silent=25), "silent_bound"), (Counts(late=25), "late_bound")])
def test_devices_that_are_quiet_halt_by_bounds_of_their_own(counts: Counts, reason: str):
    plan = plan_of()
    after, _ = decide(plan, started(plan), evidence_of(counts, Counts()), later(1))
    assert after.reason == reason


def test_a_stage_that_proves_nothing_halts_at_its_deadline_and_keeps_what_is_confirmed():
    plan = plan_of()
    idle = evidence_of(Counts(confirmed_idle=25), Counts())
    after, decisions = decide(plan, started(plan), idle, later(STAGE_MAX_S))
    assert after.reason == "stage_deadline:traffic"
    assert [one.scope for one in decisions if isinstance(one, Withdraw)] == ["unconfirmed"]


@pytest.mark.parametrize("state", ["running", "paused", "done", "returning", "halted"])
def test_who_is_recalled_is_withdrawn_before_anything_widens_wherever_the_bundle_may_still_be_offered(state: State):
    plan = plan_of()
    progress = msgspec.structs.replace(started(plan), state=state)
    found = evidence_of(Counts(pending=5, confirmed=20), Counts(revert_pending=1), unexposed=5, recalled=2)
    after, decisions = decide(plan, progress, found, later(1))
    wanted = (Withdraw(scope="recalled", stage=0),) if state in ("running", "paused", "done") else ()
    assert (after.state, decisions) == (state, wanted)
    if state in ("running", "paused"):  # an order is not lost by it, and a breach goes further
        told, _ = decide(plan, progress, msgspec.structs.replace(found, command="abort"), later(1))
        assert told.ending == "aborted"
        _, decisions = decide(plan, progress, msgspec.structs.replace(found, stages=[Counts(failed=25)]), later(1))
        assert [one.scope for one in decisions if isinstance(one, Withdraw)] == ["all"]


def test_returning_waits_for_devices_but_not_for_ever():
    plan = plan_of()
    returning, _ = decide(plan, started(plan), evidence_of(Counts(failed=25), Counts()), later(1))
    pending = evidence_of(Counts(failed=20, revert_pending=5), Counts())
    assert decide(plan, returning, pending, later(2)) == (returning, ())
    expired, decisions = decide(plan, returning, pending, later(1 + REVERT_S))
    assert expired.state == "halted"
    assert [one.reason for one in decisions if isinstance(one, Moved)] == ["revert_deadline"]
    back, _ = decide(plan, returning, evidence_of(Counts(failed=20, reverted=5), Counts()), later(2))
    assert back.state == "halted"


def test_a_release_that_is_done_stays_desired_for_newcomers_only():
    plan = plan_of(stages=[{"share": 1.0}])
    done, _ = decide(plan, started(plan), evidence_of(Counts(confirmed=100)), later(1))
    assert done.state == "done"
    assert decide(plan, done, evidence_of(Counts(failed=100)), later(2)) == (done, ())
    same, decisions = decide(plan, done, evidence_of(Counts(confirmed=100), unexposed=1), later(3))
    assert (same, [type(one) for one in decisions]) == (done, [Expose])


def test_only_a_person_leaves_a_final_state():
    plan = plan_of(stages=[{"share": 1.0}])
    done, _ = decide(plan, started(plan), evidence_of(Counts(confirmed=100)), later(1))
    back, decisions = decide(plan, done, evidence_of(Counts(confirmed=100), command="revert"), later(2))
    assert (back.state, back.ending) == ("returning", "reverted")
    assert [one.scope for one in decisions if isinstance(one, Withdraw)] == ["all"]
    reverted, _ = decide(plan, back, evidence_of(Counts(reverted=100)), later(3))
    assert reverted.state == "reverted"
    assert decide(plan, reverted, evidence_of(Counts(reverted=100), command="revert"), later(4)) == (reverted, ())


def test_one_device_is_a_sample_where_there_is_only_one():
    plan = plan_of(stages=[{"share": 1.0, "confirmed_min": 0}])
    progress = started(plan, members=1)
    assert decide(plan, progress, evidence_of(Counts(confirmed_idle=1), alone=True), later(1))[0].state == "done"
    assert decide(plan, progress, evidence_of(Counts(failed=1), alone=True), later(1))[0].reason == "failure_bound"


def test_one_failed_device_in_a_stage_of_one_neither_halts_nor_widens():
    plan = plan_of(stages=[{"share": 0.01}, {"share": 1.0}])
    progress = started(plan)
    one = evidence_of(Counts(failed=1), Counts())
    waits, decisions = decide(plan, progress, one, later(1))
    assert (waits.state, waits.stage, decisions) == ("running", 0, ())
    assert {"too_few", "gate_failure"} <= set(codes(plan, waits, one, later(1)))
    assert "too_few" not in codes(plan, waits, evidence_of(Counts(pending=1), Counts()), later(1))
    # a person says what follows, or the deadline does
    again, decisions = decide(plan, waits, msgspec.structs.replace(one, command="retry_failed"), later(2))
    assert decisions == (Retry(failed=True),)
    assert decide(plan, again, evidence_of(Counts(confirmed=1), Counts()), later(3))[0].stage == 1
    assert decide(plan, waits, one, later(STAGE_MAX_S))[0].reason == "stage_deadline:too_few"
    # two are a share, and so is one where a count says so
    assert decide(plan, progress, evidence_of(Counts(failed=2), Counts()), later(1))[0].reason == "failure_bound"
    strict = plan_of(failure={"count": 0})
    assert decide(strict, progress, one, later(1))[0].reason == "failure_bound"


GATED = [
    # counts of the stage, failed devices, state after, reason or what is missing, what happens
    (Counts(confirmed=25), 0, "running", "gate_failed", "twenty-five good devices do not prove less than 10 %"),
    (Counts(confirmed=100), 0, "running", "", "a hundred do"),
    (Counts(confirmed=300, pending=5), 0, "running", "", "three hundred also with five under way"),
    (Counts(confirmed=100, pending=100), 0, "running", "gate_failed", "but not with a hundred"),
    (Counts(confirmed=22, failed=4), 4, "returning", "failed_bound", "four of twenty-six are no accident at 2 %"),
    (Counts(pending=300, failed=4), 4, "running", "gate_failed", "four of three hundred are, whoever answered first"),
    (Counts(silent=100), 0, "running", "gate_failed", "silence proves nothing"),
]


@pytest.mark.parametrize(("counts", "failed", "state", "code", "why"), GATED)
def test_a_gate_with_stated_errors_decides_as_its_evidence_allows(
    counts: Counts, failed: int, state: str, code: str, why: str
):
    plan = plan_of(
        gates=[{"metric": "failed", "tolerated": 0.02, "harm": 0.08}],
        failure={"count": 1000},
        silent={"count": 1000},
        settled_share=0.01,
    )
    evidence = evidence_of(counts, Counts(), happened={"failed": failed})
    after, decisions = decide(plan, started(plan), evidence, later(1))
    assert after.state == state, why
    if state == "returning":
        assert after.reason == code
        (moved,) = [one for one in decisions if isinstance(one, Moved)]
        assert moved.verdicts[0].numbers is not None
        assert moved.verdicts[0].numbers.low > 0.02
    else:
        assert after.stage == (0 if code else 1), why
        assert (code in codes(plan, after, evidence, later(1))) is bool(code)


def adaptive(**changes: Any) -> Plan:
    return plan_of(strategy="adaptive", stages=[{"share": 1.0}], **changes)


PACES = [
    # counts, may be exposed now, share to reach of a hundred members, why
    (Counts(), 5, 0.05, "it starts with a handful"),
    (Counts(pending=5), 0, 0.05, "which have to answer first"),
    (Counts(silent=5), 5, 0.1, "or never to have spoken of it: silence has a bound of its own"),
    (Counts(late=5), 0, 0.05, "who is late may be harmed"),
    (Counts(confirmed=5), 9, 0.14, "good news let it widen"),
    (Counts(confirmed=20), 26, 0.46, "faster and faster"),
    (Counts(confirmed=20, failed=20), 6, 0.46, "bad news slow it down"),
    (Counts(confirmed_idle=100), 122, 1.0, "until all have it"),
]


@pytest.mark.parametrize(("counts", "allowed", "share", "why"), PACES)
def test_the_pace_of_an_adaptive_rollout_follows_the_expected_harm(
    counts: Counts, allowed: int, share: float, why: str
):
    plan = adaptive()
    evidence = evidence_of(counts)
    assert allowed_now(plan, evidence) == allowed, why
    assert next_share(plan, Progress(state="running", stage=0), evidence) == pytest.approx(share), why


def test_an_adaptive_rollout_goes_to_half_until_its_gates_pass_and_then_to_all():
    plan = adaptive(gates=[{"metric": "failed", "tolerated": 0.02, "harm": 0.02}])
    running = Progress(state="running", stage=0, entered=Since.at(NOW), cut_offs={"": 5})
    unproved = evidence_of(Counts(confirmed=60))
    assert next_share(plan, running, unproved) == 0.5
    proved = evidence_of(Counts(confirmed=600))
    assert next_share(plan, running, proved) == 1.0
    after, decisions = decide(
        plan, running, msgspec.structs.replace(proved, next_cut_offs={"": 99}, next_share=1.0, unexposed=0), later(1)
    )
    assert after.widened
    assert decisions == (Expose(stage=0, share=1.0, cut_offs={"": 99}, limit=None),)


def test_an_adaptive_rollout_whose_harm_is_used_up_exposes_nobody():
    plan = adaptive()
    running = Progress(state="running", stage=0, entered=Since.at(NOW), cut_offs={"": 5})
    waiting = evidence_of(Counts(pending=5), unexposed=3, next_cut_offs={"": 9}, next_share=0.05)
    assert decide(plan, running, waiting, later(1)) == (running, ())
    assert "widening" in codes(plan, running, waiting, later(1))


COMPARISONS = [
    # lanes taken: (wave, lane, differences), state after, stage after, why
    ([], "running", 0, "no comparison is no success"),
    ([(7, 0, ((0, 5),))], "running", 0, "five pairs are too few"),
    ([(7, 0, ((0, 60),))], "running", 1, "sixty pairs without a difference are enough"),
    ([(7, 0, ((128, 30),))], "returning", 0, "thirty that are worse by half of the cap are enough as well"),
    ([(7, 0, ((0, 60),)), (7, 1, ((128, 30),))], "returning", 0, "harm that comes late outweighs a good first period"),
    ([(7, 1, ((128, 30),))], "running", 0, "a lane before its turn is not counted"),
    ([(7, 0, ((0, 5),))] * 20, "running", 0, "and none is counted twice"),
    ([(wave, 0, ((0, 5),)) for wave in range(12)], "running", 1, "but waves add up"),
]


@pytest.mark.parametrize(("taken", "state", "stage", "why"), COMPARISONS)
def test_a_comparison_decides_as_its_pairs_say(taken: list[tuple[int, int, Pairs]], state: str, stage: int, why: str):
    plan = plan_of(gates=[{"metric": "errors", "harm": 0.01}])
    lanes = [Taken(wave=wave, lane=lane, lanes={"errors": Lane(pairs=pairs)}) for wave, lane, pairs in taken]
    evidence = evidence_of(Counts(confirmed=25), Counts(), taken=lanes)
    after, decisions = decide(plan, started(plan), evidence, later(1))
    assert (after.state, after.stage) == (state, stage), why
    if state == "returning":
        assert after.reason == "errors_bound"
        (moved,) = [one for one in decisions if isinstance(one, Moved)]
        assert [verdict.gate for verdict in moved.verdicts] == ["errors"]
    # the next turn has nothing new to take and says the same
    again, _ = decide(plan, after, msgspec.structs.replace(evidence, taken=[]), later(2))
    assert again.compared == after.compared


BOTH = {"approval": {"stages": [1, 2], "rounds": [1, 2]}}


@pytest.mark.parametrize(
    ("how", "begins"),
    [
        (SHADOW, [(0, 1), (1, 1), (0, 2), (1, 2)]),
        ({"strategy": "blue_green", "gates": []}, [(0, 1), (1, 1), (1, 2)]),
        ({**SHADOW, "on_success": "end", "approval": {"stages": [1, 2]}}, [(0, 1), (1, 1)]),
        ({"approval": {"stages": [1, 2]}}, [(0, 1), (1, 1)]),
    ],
)
def test_every_stage_of_both_rounds_waits_for_its_own_approval(how: dict[str, Any], begins: list[tuple[int, int]]):
    plan = plan_of(**{**BOTH, **how})
    counts = Counts(proved=25) if plan.two_rounds else Counts(confirmed=25)
    progress, found = Progress(), evidence_of(Counts(), Counts(), command="start", next_cut_offs={"": 9})
    for index, (stage, number) in enumerate(begins):
        waits, decisions = decide(plan, progress, found, later(9 * STAGE_MAX_S * (index + 1)))
        assert not [one for one in decisions if isinstance(one, Expose | Promote)], "no deadline runs, nothing begins"
        assert waits.state == "running"
        still = msgspec.structs.replace(found, command="")
        assert [one.code for one in why_not_yet(plan, waits, still, NOW)] == ["approval"]
        assert approvable(plan, waits, stage, number)
        assert not any(approvable(plan, waits, *one) for one in begins[:index]), "what began asks nobody"
        if index:
            assert following(plan, waits) == (stage, number)
        agreed = {approval_key(*one): 1 for one in begins[: index + 1]}
        progress, decisions = decide(
            plan, waits, msgspec.structs.replace(still, approvals=agreed), later(9 * STAGE_MAX_S * (index + 1))
        )
        assert (progress.stage, progress.promoting) == (stage, number == 2)
        assert isinstance(decisions[-1], Promote if number == 2 else Expose)
        beside = {"disagreed": ((0, 100),)}
        found = evidence_of(counts, counts, approvals=agreed, next_cut_offs={"": 9}, beside=beside)
        if number == 2:
            found = evidence_of(Counts(confirmed=25), counts, unpromoted=[0, 25], approvals=agreed, beside=beside)
    assert following(plan, progress) is None


@pytest.mark.parametrize("rule", [{"rounds": [2]}, {"rounds": []}, {"rounds": [0]}])
def test_a_plan_without_a_second_round_asks_for_no_approval_of_one(rule: dict[str, Any]):
    for how in ({}, {**SHADOW, "on_success": "end"}):
        with pytest.raises(RefusedError) as caught:
            plan_of(**how, approval=rule)
        assert caught.value.code == "plan_approval"
