"""Whatever happens, in whatever order, also late, twice and across power cuts: what must hold of the machine."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agent.builders import (
    DAY_US,
    MODEL,
    T0_S,
    arm,
    blank,
    candidates,
    digest_of,
    loadable,
    offer,
    offered,
    trust,
)
from wherry_agent import journal, machine, turn
from wherry_agent import state as s
from wherry_agent.children import Judged, Ran
from wherry_shared import reasons
from wherry_shared.clock import MICROSECONDS, Now
from wherry_shared.wire import Trial

MODELS = (MODEL, "pitch")
VERSIONS = ("1.0.0", "1.1.0", "1.2.0")
VARIANTS = ("float", "int8")
TRIAL = Trial(min_requests=3, max_s=30, crashes_max=1)

WAYS: list[dict[str, Any]] = [
    *[{"mode": "replace"}] * 4,
    {"mode": "shadow", "share": 0.5},
    {"mode": "split", "share": 0.1},
    {"mode": "split", "share": 0.5},
    {"mode": "blue_green", "share": 0.0},
    {"mode": "blue_green", "share": 1.0},
]

TRIED = (s.Swapping, s.OnTrial, s.Proving)
model = st.sampled_from(MODELS)
version = st.sampled_from(VERSIONS)
variant = st.sampled_from(VARIANTS)
attempt = st.integers(1, 2)
reason = st.sampled_from(sorted(reasons.VERDICTS | {reasons.NETWORK, reasons.DISK_FULL, reasons.NO_VARIANT, "odd"}))


@st.composite
def offers(draw: Any) -> s.Offered:
    models = {}
    group = draw(st.sampled_from(["", "", "pair"]))
    for name in draw(st.sets(model)):
        if draw(st.integers(0, 9)) == 0:
            models[name] = offered(model=name, mode="none", rollout=draw(st.sampled_from(["r1", "r2"])))
        else:
            models[name] = offered(
                draw(version),
                model=name,
                attempt=draw(attempt),
                trial=TRIAL,
                rollout=draw(st.sampled_from(["r1", "r2"])),
                group=group,
                **draw(st.sampled_from(WAYS[:4] if group else WAYS)),
            )
    return offer(draw(st.integers(1, 40)), models)


def trials(state: s.State) -> list[str]:
    return [slot.phase.trial for slot in state.models.values() if isinstance(slot.phase, s.OnTrial | s.Proving)]


def jobs(state: s.State) -> list[tuple[str, s.Job]]:
    return [(n, slot.phase.job) for n, slot in state.models.items() if not isinstance(slot.phase, s.Idle | s.Safe)]


@st.composite
def events(draw: Any, state: s.State) -> s.Event:
    """An event that may fit the state, or be late, foreign or plainly wrong."""
    kind = draw(st.integers(0, 16))
    fitting = jobs(state)
    name, job = draw(st.sampled_from(fitting)) if fitting and draw(st.booleans()) else (draw(model), None)
    of_version = job.offered.target.split("/")[1] if job is not None and job.offered.target else draw(version)
    manifest = digest_of(f"{name}/{of_version}")
    number = job.offered.attempt if job is not None else draw(attempt)
    which = job.loadable.variant if job is not None and job.candidates else draw(variant)
    item = loadable(of_version, which, name)
    trial = draw(st.sampled_from([*trials(state), "another"]))
    match kind:
        case 0 | 1:
            return draw(offers())
        case 2:
            names = draw(st.permutations(VARIANTS))
            return s.Resolved(name, manifest, number, candidates(of_version, *names, model=name), (), "", trust(2))
        case 3:
            return s.Fetched(name, manifest, number, which)
        case 4 | 5:
            result = Judged(passed=True) if draw(st.booleans()) else Judged(passed=False, reason=draw(reason))
            return s.CanaryDone(name, manifest, number, item.digest, result)
        case 6:
            task = draw(st.sampled_from(["resolve", "fetch", "judge"]))
            return s.TaskFailed(name, manifest, number, task, draw(reason), "x", draw(st.sampled_from([None, 5.0])))
        case 7 | 8:
            slot = state.models.get(name)
            if slot is not None and slot.incumbent is not None and draw(st.booleans()):
                item = slot.incumbent.loadable
            revision = draw(st.sampled_from([state.revision, state.revision, max(0, state.revision - 1)]))
            ok = draw(st.booleans())
            return s.Served(name, item.digest, revision, ok, "" if ok else "load_failed", "", draw(st.booleans()))
        case 9:
            stats = arm(of_version, which, model=name, requests=draw(st.integers(0, 9)), errors=draw(st.integers(0, 9)))
            return s.Measured(name, trial, stats)
        case 10:
            return s.GoldenChecked(name, item.digest, trial, draw(st.booleans()))
        case 11:
            ran = [Ran(one.model, one.manifest, one.variant) for one in (item, loadable("1.0.0", model=name))]
            return s.WorkerDied(
                "x", draw(st.booleans()), tuple(draw(st.lists(st.sampled_from(ran), max_size=2, unique=True)))
            )
        case 12:
            return s.WorkerReady()
        case 13:
            return s.Acked(state.stream, draw(st.integers(0, 30)), draw(st.sampled_from(["", "", "", "stream-2"])))
        case 14:
            return draw(
                st.sampled_from([s.Refreshed(trust(3)), s.RefreshFailed("network", "x"), s.Connected(), s.Stopping()])
            )
        case 15:
            engine = draw(st.sampled_from(["1.32.0", "1.33.0"]))
            result = Judged(passed=True) if draw(st.booleans()) else Judged(passed=False, reason=draw(reason))
            again = s.Rejudged(name, item.digest, engine, result)
            moved: list[s.Event] = [s.HandedOver(), s.HandedOver("it died"), s.HandOverAsked("x")]
            moved += [s.Altered(name, item.manifest, item.variant, "x"), s.Mended(name, item.manifest, item.variant)]
            return draw(st.sampled_from([s.EnginesProbed({"onnxruntime": engine}), again, *moved]))
        case _:
            return s.Tick()


class Watch:
    """What must hold after every step."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.acked = 0

    def note(self, event: s.Event) -> None:
        if isinstance(event, s.CanaryDone) and event.result.passed:
            self.passed.add(event.digest)

    def check(self, before: s.State, after: s.State, effects: tuple[s.Effect, ...]) -> None:
        serving = machine.serving(after)
        for shown in serving:
            assert shown.active.digest in self.passed, "serves what no canary passed"
            if shown.trial:
                assert shown.incumbent is None or shown.active.digest != shown.incumbent.digest
                assert shown.mode == "replace" or shown.incumbent is not None, "nobody is there to answer"
        for name, slot in after.models.items():
            was = before.models.get(name, s.Slot()).phase
            if (
                slot.incumbent is not None
                and isinstance(was, s.OnTrial)
                and was.job.loadable == slot.incumbent.loadable
            ):
                way = was.job.offered
                assert way.mode in ("replace", "blue_green"), "a shadow or a split was confirmed"
                assert way.share == 1.0, "what stood by was confirmed"
        told = [effect for effect in effects if isinstance(effect, s.Serve)]
        if serving != machine.serving(before):
            assert after.revision == before.revision + 1
            assert told, "the serving set changed and the worker was not told"
        for effect in told:
            assert effect.models == serving or effect.revision < after.revision
        if told:
            assert told[-1].models == serving
            assert told[-1].revision == after.revision
        tried = [shown.group for shown in serving if shown.trial]
        assert len(tried) <= 1 or (tried[0] and len(set(tried)) == 1), "two models on trial that are no group"
        self.whole(before, after)
        numbers = [report.seq for report in after.owed]
        assert numbers == list(range(after.seq - len(numbers), after.seq)), "reports are not gapless"
        assert len(numbers) <= turn.OWED_MAX
        assert after.seq >= before.seq
        if after.seq > before.seq:
            assert s.SendReports() in effects
        assert len(after.known_bad) <= turn.KNOWN_BAD_MAX
        assert len(after.models) <= turn.MODELS_MAX
        for slot in after.models.values():
            assert len(slot.ends) <= turn.ENDS_MAX
            at_rest = isinstance(slot.phase, s.Idle | s.Compared | s.Safe | s.Queued)
            assert at_rest or machine.limit_ms(slot.phase) is not None
            if isinstance(slot.phase, s.Compared):
                assert slot.incumbent is not None, "compared with nothing"
                assert slot.phase.job.loadable in machine.kept(after)
        assert journal.decode(journal.encode(after)) == after

    @staticmethod
    def whole(before: s.State, after: s.State) -> None:
        """Who is on trial as one group goes one way."""
        ways: dict[str, set[str]] = {}
        for name, slot in before.models.items():
            was = slot.phase
            if not isinstance(was, TRIED) or not was.job.offered.group:
                continue
            now = after.models.get(name, s.Slot())
            new = now.incumbent is not None and now.incumbent.loadable == was.job.loadable
            way = "new" if new else "trial" if isinstance(now.phase, TRIED) else "old"
            ways.setdefault(was.job.offered.group, set()).add(way)
        assert all(len(found) == 1 for found in ways.values()), f"a group was torn: {ways}"


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_order_of_events_breaks_what_must_hold(data: st.DataObject) -> None:
    state, watch, ms, boot = blank(), Watch(), 0, 1
    durable = state
    for _ in range(data.draw(st.integers(5, 60))):
        ms += data.draw(st.sampled_from([0, 10, 1000, 31_000, 400_000]))
        now = Now(f"boot-{boot}", ms, T0_S + ms / 1000)
        before = state
        if data.draw(st.integers(0, 14)) == 0:
            boot += data.draw(st.integers(0, 1))
            now = Now(f"boot-{boot}", ms, T0_S + ms / 1000)
            state, effects = machine.resume(durable, now)
            before = durable
        else:
            event = data.draw(events(state))
            watch.note(event)
            state, effects = machine.step(state, event, now)
        watch.check(before, state, effects)
        if data.draw(st.integers(0, 9)):
            durable = state  # else the power went before the write


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_from_every_state_time_alone_leads_to_rest(data: st.DataObject) -> None:
    state = blank()
    ms = 0
    for _ in range(data.draw(st.integers(0, 30))):
        now = Now("boot-1", ms, T0_S + ms / 1000)
        state, _ = machine.step(state, data.draw(events(state)), now)
    expiry_ms = 9 * DAY_US // (MICROSECONDS // 1000)
    for _ in range(2000):
        now = Now("boot-1", ms, T0_S + ms / 1000)
        resting = all(isinstance(slot.phase, s.Idle | s.Compared | s.Safe) for slot in state.models.values())
        if resting and ms > expiry_ms:
            break
        state, _ = machine.step(state, s.Tick(), now)
        ms += max(1, machine.next_deadline_ms(state, now))
    assert resting, [slot.phase for slot in state.models.values()]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_device_with_honest_hands_converges_to_the_last_offer(data: st.DataObject) -> None:
    """After any history, children that answer truthfully bring the offered version into service, confirmed."""
    state, ms = blank(), 0
    for _ in range(data.draw(st.integers(0, 25))):
        state, _ = machine.step(state, data.draw(events(state)), Now("boot-1", ms, T0_S))
    serial = (state.offer.serial if state.offer is not None else 0) + 1
    wanted = offered("2.0.0", trial=TRIAL, rollout="final")
    queue: list[s.Event] = [s.WorkerReady(), offer(serial, {MODEL: wanted})]
    for _ in range(400):
        now = Now("boot-1", ms, T0_S + ms / 1000)
        event = queue.pop(0) if queue else s.Tick()
        state, effects = machine.step(state, event, now)
        for effect in effects:
            queue += honest(effect, state)
        if not queue:
            slot = state.models[MODEL]
            if (
                slot.incumbent is not None
                and slot.incumbent.loadable.target == wanted.target
                and slot.phase == s.Idle()
            ):
                break
            ms += max(1, machine.next_deadline_ms(state, now))
    slot = state.models[MODEL]
    assert slot.incumbent is not None
    assert slot.incumbent.loadable.target == wanted.target
    assert [report.state for report in state.owed if report.model == MODEL][-1] in ("confirmed", "confirmed_idle")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_group_converges_whole_on_a_device_with_honest_hands(data: st.DataObject) -> None:
    state, ms = blank(), 0
    for _ in range(data.draw(st.integers(0, 25))):
        state, _ = machine.step(state, data.draw(events(state)), Now("boot-1", ms, T0_S))
    serial = (state.offer.serial if state.offer is not None else 0) + 1
    wanted = {name: offered("2.0.0", model=name, trial=TRIAL, rollout="final", group="all") for name in MODELS}
    queue: list[s.Event] = [s.WorkerReady(), offer(serial, wanted, groups={"all": list(MODELS)})]
    together: set[int] = set()
    for _ in range(600):
        now = Now("boot-1", ms, T0_S + ms / 1000)
        event = queue.pop(data.draw(st.integers(0, len(queue) - 1))) if queue else s.Tick()
        before = state
        state, effects = machine.step(state, event, now)
        Watch.whole(before, state)
        for effect in effects:
            queue += honest(effect, state)
        done = [
            name
            for name, slot in state.models.items()
            if slot.incumbent is not None and slot.incumbent.loadable.target == f"{name}/2.0.0"
        ]
        together.add(len(done))
        if len(done) == len(MODELS):
            break
        if not queue:
            ms += max(1, machine.next_deadline_ms(state, now))
    assert together == {0, len(MODELS)}, "all came in one step"


def honest(effect: s.Effect, state: s.State) -> list[s.Event]:
    """The answers of children that do their work."""
    match effect:
        case s.Resolve():
            name, _, number = effect.offered.target.partition("/")
            found = candidates(number, *VARIANTS, model=name)
            return [s.Resolved(effect.model, effect.offered.manifest, effect.offered.attempt, found)]
        case s.Fetch():
            return [s.Fetched(effect.model, effect.manifest, effect.attempt, effect.variant)]
        case s.Judge():
            item = effect.candidate
            return [s.CanaryDone(effect.model, item.manifest, effect.attempt, item.digest, Judged(passed=True))]
        case s.Serve():
            return [s.Served(one.name, one.active.digest, effect.revision, ok=True) for one in effect.models]
        case s.Rejudge():
            item = effect.candidate
            return [s.Rejudged(effect.model, item.digest, item.engine_version, Judged(passed=True))]
        case s.HandOver():
            return [s.HandedOver()]
        case s.RunGolden():
            return [s.GoldenChecked(effect.model, effect.digest, effect.trial, passed=True)]
        case s.RestartWorker():
            return [s.WorkerDied("ordered", ordered=True), s.WorkerReady()]
        case s.Refresh():
            return [s.Refreshed(trust(9))]
        case s.Mend():
            return [s.Mended(effect.model, effect.manifest, effect.variant)]
        case s.Cancel() | s.SendReports() | s.Collect():
            return []
