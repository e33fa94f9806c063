"""What must hold in every world: safety after every write and effect, convergence at the end.

The checkers know the truth from the simulated hands (what a canary really passed, what a trial really saw, what the
worker really serves) and compare the machine's states, effects and reports with it. A violation names the rule, the
device and the instant; a run goes on, so that one cause does not hide another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from wherry_agent import state as s
from wherry_agent import turn
from wherry_shared import reasons
from wherry_shared.wire import OfferedModel, Report
from wherry_simulators.device import Device
from wherry_simulators.server import Server
from wherry_simulators.worker import Worker

VIOLATIONS_MAX = 50
"""Beyond this a run only counts."""
CONFIRMED = frozenset({"confirmed", "confirmed_idle"})
NEGATIVE_ENDS = frozenset({"returned", "failed", "refused", "safe"})
_TRIED = (s.Swapping, s.OnTrial, s.Proving)
ENDS = CONFIRMED | NEGATIVE_ENDS | {"removed", "compared"}


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that did not hold."""

    rule: str
    device: str
    at_ms: int
    detail: str

    def __str__(self) -> str:
        return f"{self.at_ms / 1000:.1f} s, {self.device}: {self.rule}: {self.detail}"


class Checkers:
    """Looks on in one world."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.violations: list[Violation] = []
        self.count = 0
        self.reports = 0
        self.trace = hashlib.blake2b(digest_size=16)
        self._bad: dict[tuple[str, str], int] = {}
        """(device, variant digest) → highest attempt that ended in a verdict here."""
        self._held_ms: dict[tuple[str, str], int] = {}
        """(device, digest of what served last) → when nothing served any more."""
        self._said: dict[tuple[str, str, int], bytes] = {}
        """(device, stream epoch, seq) → body."""
        self._ends: dict[str, list[Report]] = {}
        """Device → final outcomes that its journal ever held."""
        self._began_ms: dict[tuple[str, str], int] = {}
        """(device, trial) → when the candidate first served in it."""
        self._confirmed: set[tuple[str, str]] = set()
        """(device, model) that ever had a confirmed version."""
        self._downs: dict[tuple[str, str, s.End], int] = {}
        """(device, variant digest, attempt) → ends of the agent that nobody ordered while it was tried."""
        self._fell: dict[tuple[str, str], int] = {}
        """(device, manifest) → ends that nobody had ordered while it was trusted and nothing was tried."""
        self._took_down_trusted: dict[tuple[str, str], int] = {}
        """(device, manifest) → times that the machine was taken down while it was trusted and nothing was tried."""
        self._took_down: dict[tuple[str, str, s.End], int] = {}
        """The same → times that it took the whole machine down."""
        self._proved: dict[tuple[str, str], str] = {}
        """(device, model) → manifest that ran or was compared there: a newer offer of it needs no download."""

    def object(self, rule: str, device: Device, detail: str) -> None:
        """Note a violation."""
        self.count += 1
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(Violation(rule, device.name, device.world.agenda.now_ms, detail))

    # --- after every write ------------------------------------------------------------------------

    def wrote(self, device: Device, before: s.State, event: s.Event | None, after: s.State) -> None:
        """Check what a turn changed."""
        self._trace(device, event, after)
        if after.seq < before.seq or after.revision < before.revision:
            self.object("counters never fall", device, f"seq {before.seq}→{after.seq}")
        if before.offer is not None and after.offer is not None:
            known, taken = (before.offer.epoch, before.offer.serial), (after.offer.epoch, after.offer.serial)
            if taken < known:
                self.object("an older offer changes nothing", device, f"{known}→{taken}")
        if event is not None and after.offer is not None:
            self._expired_starts_nothing(device, before, after, after.offer)
        self._proved_stays(device, after)
        self._groups_stay_whole(device, before, after)
        if isinstance(event, s.Measured):
            self._answers_as_offered(device, event)
        if after.seq != before.seq:
            made = [report for report in after.owed if report.seq >= before.seq]
            if [report.seq for report in made] != list(range(before.seq, after.seq)):
                self.object("reports are gapless", device, f"made {[report.seq for report in made]}")
            for report in made:
                self._reported(device, before, after, report)

    def _expired_starts_nothing(self, device: Device, before: s.State, after: s.State, offer: s.Accepted) -> None:
        began = [
            name
            for name, slot in after.models.items()
            if isinstance(slot.phase, s.Resolving | s.Fetching)
            and isinstance(before.models.get(name, s.Slot()).phase, s.Idle | s.Waiting | s.Compared)
        ]
        if began:
            offers = self._server.records[device.name].expires
            wall_us = device.now().wall_us
            if wall_us >= offers.get(offer.serial, wall_us + 1):
                self.object("an expired offer starts nothing", device, f"serial {offer.serial} began {began[0]}")

    def _proved_stays(self, device: Device, after: s.State) -> None:
        """A bundle that ran on trial or was compared is neither fetched nor judged again when its mode changes."""
        for name, slot in after.models.items():
            phase, key = slot.phase, (device.name, name)
            if isinstance(phase, s.Swapping | s.OnTrial | s.Proving | s.Compared):
                self._proved[key] = phase.job.offered.manifest
            elif isinstance(phase, s.Idle | s.Safe | s.Returning):
                self._proved.pop(key, None)
            elif isinstance(phase, s.Fetching | s.Judging) and self._proved.get(key) == phase.job.offered.manifest:
                self.object("what is proved here is not brought again", device, f"{name}: {type(phase).__name__}")

    def _groups_stay_whole(self, device: Device, before: s.State, after: s.State) -> None:
        """What is on trial as one group is confirmed in one turn, or goes back in one; none is blamed for another."""
        fates: dict[str, set[str]] = {}
        for name, slot in before.models.items():
            phase = slot.phase
            if not isinstance(phase, _TRIED) or not phase.job.offered.group:
                continue
            later = after.models.get(name, s.Slot())
            confirmed = later.incumbent is not None and later.incumbent.loadable.digest == phase.job.loadable.digest
            stays = isinstance(later.phase, _TRIED)
            fates.setdefault(phase.job.offered.group, set()).add("new" if confirmed else "trial" if stays else "old")
            blamed = {bad.digest for bad in after.known_bad} - {bad.digest for bad in before.known_bad}
            reason = later.phase.reason if isinstance(later.phase, s.Returning) else ""
            if reason == reasons.GROUP and phase.job.loadable.digest in blamed:
                self.object("nobody is blamed for another of its group", device, name)
        for group, found in fates.items():
            if len(found) > 1:
                self.object("a group stays whole", device, f"{group}: {sorted(found)}")

    def _answers_as_offered(self, device: Device, event: s.Measured) -> None:
        """A shadow never answers, nor does a candidate that stands by."""
        manifest = event.candidate.manifest
        if not device.hands.ledger.answered_by.get((event.model, manifest)):
            return
        offers = [offered.get(event.model) for offered in self._server.records[device.name].offers.values()]
        ways = {(one.mode, one.share) for one in offers if one is not None and one.manifest == manifest}
        if all(mode == "shadow" or share == 0.0 for mode, share in ways):
            self.object("only what was offered to answer answers", device, f"{event.model}: {sorted(ways)}")

    def _trace(self, device: Device, event: s.Event | None, after: s.State) -> None:
        phases = ",".join(f"{name}:{type(slot.phase).__name__}" for name, slot in after.models.items())
        line = (
            f"{device.world.agenda.now_ms} {device.name} {type(event).__name__} {after.revision} {after.seq} {phases}\n"
        )
        self.trace.update(line.encode())

    def _reported(self, device: Device, before: s.State, after: s.State, report: Report) -> None:
        self.reports += 1
        if report.state in ENDS:
            self._ends.setdefault(device.name, []).append(report)
        if report.state in NEGATIVE_ENDS and not report.reason:
            self.object("a report that says no says why", device, f"{report.state} of {report.target}")
        self._names_an_offer(device, report)
        slot = before.models.get(report.model)
        phase = slot.phase if slot is not None else None
        if report.state in CONFIRMED:
            self._confirmed.add((device.name, report.model))
            if isinstance(phase, s.OnTrial | s.Proving):
                self._confirmed_by_rule(device, phase, report)
            elif slot is None or slot.incumbent is None or slot.incumbent.manifest != report.manifest:
                self.object("confirmed only after a trial", device, f"{report.target} from {type(phase).__name__}")
        if report.state == "compared":
            self._compared_by_rule(device, phase, report)
        if report.state == "safe":  # declared: whatever fails after it leaves the device as safe as it was
            self._confirmed.discard((device.name, report.model))
            held = after.models[report.model].held if report.model in after.models else None
            if held is not None:  # tried again, in its time, by its canary and a trial
                key = (device.name, held.version.loadable.digest)
                self._bad.pop(key, None)
                self._held_ms[key] = device.world.agenda.now_ms
        if report.state in {"returned", "failed"} and report.reason in reasons.VERDICTS:
            self._remember_bad(device, phase, report)
        if report.reason == reasons.DEVICE_DOWN:
            self._blamed_with_cause(device, phase, report)
        self._runs_what_it_says(device, report)

    def _names_an_offer(self, device: Device, report: Report) -> None:
        offered = self._server.records[device.name].offers.get(report.serial, {}).get(report.model)
        if offered is None:
            self.object("a report names an offer", device, f"{report.state} under serial {report.serial}")

    def _confirmed_by_rule(self, device: Device, phase: s.OnTrial | s.Proving, report: Report) -> None:
        terms, ledger, trial = phase.job.offered.trial, device.hands.ledger, (report.model, phase.trial)
        offered = self._server.records[device.name].offers[report.serial][report.model]
        if offered.mode in ("shadow", "split") or offered.share < 1.0:
            self.object("only what answered everybody is confirmed", device, f"{offered.mode} of {offered.share}")
        seen = ledger.requests.get(trial, 0)
        if report.requests > seen or report.errors > ledger.errors.get(trial, 0):
            self.object("a report counts what happened", device, f"{report.requests} requests reported, {seen} made")
        if report.state == "confirmed" and report.requests - report.errors < terms.min_requests:
            self.object("confirmed only by the trial's rule", device, f"{report.requests} requests")
        passed_before = isinstance(phase, s.OnTrial) and phase.passed == "idle"
        if (isinstance(phase, s.Proving) or passed_before) and trial not in ledger.golden:
            self.object("confirmed only by the trial's rule", device, "the golden vectors did not pass again")
        if report.state == "confirmed_idle":
            lasted_ms = device.world.agenda.now_ms - self._began_ms.get((device.name, phase.trial), 0)
            if lasted_ms < terms.max_s * 1000:
                self.object("confirmed only by the trial's rule", device, f"idle after {lasted_ms} ms")
        if report.errors >= terms.errors_min and report.errors > terms.error_rate_max * report.requests:
            self.object(
                "a candidate that fails is not confirmed", device, f"{report.errors} of {report.requests} failed"
            )

    def _compared_by_rule(self, device: Device, phase: s.Phase | None, report: Report) -> None:
        if not isinstance(phase, s.OnTrial) or report.mode == "replace":
            self.object("compared only after a shadow, split or standby", device, f"{report.mode} {report.target}")
            return
        lasted_ms = device.world.agenda.now_ms - self._began_ms.get((device.name, phase.trial), 0)
        if lasted_ms < phase.job.offered.trial.max_s * 1000:
            self.object("compared only when its time is over", device, f"{report.target} after {lasted_ms} ms")

    def _remember_bad(self, device: Device, phase: s.Phase | None, report: Report) -> None:
        job = getattr(phase, "job", None)
        # what is trusted may give way while a candidate is on its way: the verdict is not that one's
        if isinstance(job, s.Job) and job.candidates and job.offered.manifest == report.manifest:
            key = (device.name, job.loadable.digest)
            self._bad[key] = max(self._bad.get(key, 0), job.offered.attempt)

    def _blamed_with_cause(self, device: Device, phase: s.Phase | None, report: Report) -> None:
        job = getattr(phase, "job", None)
        if not isinstance(job, s.Job) or not job.candidates or job.offered.manifest != report.manifest:
            fell = self._fell.get((device.name, report.manifest), 0)
            if fell < turn.FALLS_MAX:
                self.object("only what a device goes down with is blamed for it", device, f"{fell} times, trusted")
            return
        downs, due = self._downs.get(_key(device, job), 0), max(2, job.offered.trial.restarts_max)
        if downs < due:
            self.object("only what a device goes down with is blamed for it", device, f"{downs} times, of {due}")

    def went_down(self, device: Device, held: s.State) -> None:
        """Count an end that nobody had ordered for what was tried then."""
        tried = [key for key, _ in _tried(device, held.models)]
        for key in tried:
            self._downs[key] = self._downs.get(key, 0) + 1
        for slot in held.models.values() if not tried else ():
            if slot.incumbent is not None:
                trusted = (device.name, slot.incumbent.manifest)
                self._fell[trusted] = self._fell.get(trusted, 0) + 1

    def taken_down(self, device: Device) -> None:
        """Check that nothing takes a device down again and again."""
        for key, job in _tried(device, device.durable.models):
            times = self._took_down[key] = self._took_down.get(key, 0) + 1
            if times > job.offered.trial.restarts_max:
                self.object("nothing takes a device down for ever", device, f"{job.offered.target}, {times} times")
        for name, slot in device.durable.models.items():
            if slot.incumbent is None or any(True for _ in _tried(device, device.durable.models)):
                continue
            trusted = (device.name, slot.incumbent.manifest)
            times = self._took_down_trusted[trusted] = self._took_down_trusted.get(trusted, 0) + 1
            if times > turn.FALLS_MAX + turn.REJUDGE_DOWNS_MAX:
                self.object("nothing takes a device down for ever", device, f"{name}, {times} times")

    def _runs_what_it_says(self, device: Device, report: Report) -> None:
        """A report's `running` is what the worker serves, whenever the worker has nothing left to do."""
        worker = device.hands.worker
        if worker is None or device.hands.busy(device.now()) or not worker.told:
            return
        serving = worker.serving.get(report.model)
        really = serving.manifest if serving is not None else ""
        under_way = {"trial", "standby", "compared"}
        if report.state in CONFIRMED | under_way and report.running != really:
            self.object("a report says what runs", device, f"{report.state}: {report.running[:15]}, not {really[:15]}")
        told = worker.commands.get(report.model)
        beside = told is not None and told.trial and told.mode != "replace" and not worker.both_loaded(told)
        if report.state in under_way and beside:
            self.object("both versions are in memory where the mode needs it", device, report.mode)

    # --- before and after effects -----------------------------------------------------------------

    def ordered(self, device: Device, effect: s.Effect) -> None:
        """Check an effect before it runs."""
        match effect:
            case s.Judge(candidate=candidate, attempt=attempt):
                self._not_bad(device, candidate.digest, attempt)
            case s.Serve(models=models):
                for model in models:
                    digest = model.active.digest
                    if digest not in device.hands.passed:
                        self.object("only what a canary passed serves", device, f"{model.active.target}")
                    if model.trial:
                        phase = device.memory.models[model.name].phase
                        job = getattr(phase, "job", None)
                        self._not_bad(device, digest, job.offered.attempt if isinstance(job, s.Job) else 0)
                        if isinstance(job, s.Job) and (model.mode, model.share) != (
                            job.offered.mode,
                            job.offered.share,
                        ):
                            self.object("the worker is told the offered mode", device, f"{model.mode} {model.share}")
            case s.RestartWorker(why=why):
                worker = device.hands.worker
                if worker is not None and worker.well and worker.told and not device.hands.busy(device.now()):
                    self.object("a worker that does what it is told is not ended", device, why)
            case s.Collect(keep=keep):
                kept = {loadable.digest for loadable in keep}
                for digest in self._needed(device):
                    if digest not in kept:
                        self.object("what may still serve is not collected", device, digest[:15])
            case s.HandOver():
                for name, slot in device.memory.models.items():
                    incumbent = slot.incumbent
                    if incumbent is not None:
                        self._proved_by_engine(device, name, incumbent.loadable.digest)
            case _:
                pass

    def _proved_by_engine(self, device: Device, name: str, digest: str) -> None:
        engine_version = device.hands.files.engine
        if (digest, engine_version) not in device.hands.proved:
            self.object("a worker takes over only with what its engines proved", device, f"{name}, {engine_version}")

    def _needed(self, device: Device) -> Iterable[str]:
        for slot in device.memory.models.values():
            if slot.incumbent is not None:
                yield slot.incumbent.loadable.digest
            elif isinstance(slot.phase, s.Safe) and slot.held is not None:
                yield slot.held.version.loadable.digest
            if isinstance(slot.phase, s.Judging | s.Queued | s.Swapping | s.OnTrial | s.Proving | s.Compared):
                yield slot.phase.job.loadable.digest

    def _not_bad(self, device: Device, digest: str, attempt: int) -> None:
        key = (device.name, digest)
        safe_ms = device.world.agenda.now_ms - self._held_ms.get(key, -turn.HELD_RETRY_MIN_MS)
        if safe_ms < turn.HELD_RETRY_MIN_MS:
            self.object("what served last is tried again in its time", device, f"{digest[:15]} after {safe_ms} ms")
        if attempt <= self._bad.get(key, 0):
            self.object("known bad is not tried again", device, f"{digest[:15]} at attempt {attempt}")

    def happened(self, device: Device, events: tuple[s.Event, ...]) -> None:
        """Check what the worker serves after it did something."""
        worker = device.hands.worker
        if worker is None:
            return
        for event in events:
            if isinstance(event, s.CanaryDone) and event.result.passed:
                continue
            if not isinstance(event, s.Served):
                continue
            self._together(device)
            for name, loadable in worker.serving.items():
                if loadable.digest not in device.hands.passed:
                    self.object("only what a canary passed serves", device, f"{loadable.target} serves")
                if loadable.digest not in device.hands.files.here and loadable.digest in device.hands.wants:
                    self.object("only what is on disk serves", device, f"{loadable.target} serves")
                self._old_or_new(device, name, loadable.manifest)
                trial = worker.trial(name)
                if trial:
                    self._began_ms.setdefault((device.name, trial), device.world.agenda.now_ms)
            return

    def _together(self, device: Device) -> None:
        """All of a group are in the worker, or none."""
        worker = device.hands.worker
        if worker is None or device.hands.busy(device.now()):
            return
        for group, names in device.memory.offer.groups.items() if device.memory.offer is not None else ():
            served = {name for name in names if name in worker.commands and worker.commands[name].group == group}
            served = {name for name in served if worker.commands[name].trial}
            tried = {
                name
                for name in names
                if name in device.memory.models and isinstance(device.memory.models[name].phase, _TRIED)
            }
            if served and tried and served != tried:
                self.object("a group is swapped at once", device, f"{sorted(served)} of {sorted(tried)}")

    def _old_or_new(self, device: Device, name: str, manifest: str) -> None:
        offers = self._server.records[device.name].offers.values()
        if not any(name in offered and offered[name].manifest == manifest for offered in offers):
            self.object("what serves was offered", device, manifest[:15])

    def heard(self, device: Device, report: Report) -> None:
        """Check a report that reached the server: one number, one body."""
        key = (device.name, report.epoch, report.seq)
        body = msgspec.json.encode(msgspec.structs.replace(report, first=0))
        if self._said.setdefault(key, body) != body:
            self.object("a report's number has one body", device, f"seq {report.seq} says {report.state} now")

    # --- at the end -------------------------------------------------------------------------------

    def not_settled(self, device: Device) -> str:
        """Say what a device has not brought to an end yet; empty if nothing is left."""
        record = self._server.records[device.name]
        if not device.up:
            return "down"
        if device.memory.owed:
            return f"owes {len(device.memory.owed)} reports"
        worker = device.hands.worker
        for name, desired in record.desired.items():
            loadable = worker.serving.get(name) if worker is not None else None
            running = loadable.manifest if loadable is not None else ""
            about = record.about.get((name, desired.manifest, desired.attempt))
            why = _model_not_settled(desired, running, record.current.get(name), about)
            if not why and loadable is not None and worker is not None:
                engine_version = worker.engine_version
                if device.world.engines_change and (loadable.digest, engine_version) not in device.hands.proved:
                    why = f"serves {loadable.target} with engine {engine_version}, which never proved it"
                elif engine_version != (here := device.hands.files.engine) and _all_proved(worker, device, here):
                    why = f"has engine {engine_version} in memory, and {here} is proved"
            slot = device.memory.models.get(name)
            incumbent = slot.incumbent if slot is not None else None
            if not why and incumbent is not None and incumbent.loadable.digest in device.hands.files.altered:
                why = f"the file of {incumbent.loadable.target} is altered"
            held = slot.held if slot is not None and isinstance(slot.phase, s.Safe) else None
            if not why and held is not None and held.version.manifest == desired.manifest:
                why = "is to try again what served last"
            if why:
                return f"{name}: {why}, phase {type(slot.phase).__name__ if slot is not None else 'none'}"
        return ""

    def finish(self, devices: Iterable[Device]) -> None:
        """Check what must hold once everything settled."""
        for device in devices:
            why = self.not_settled(device)
            if why:
                self.object("every device comes to an end by itself", device, why)
            record = self._server.records[device.name]
            stream = record.streams.get(("report", device.durable.stream))
            if stream is not None and (stream.lost or stream.above or stream.contiguous != device.durable.seq - 1):
                self.object("no report is lost", device, f"lost {stream.lost}, stored up to {stream.contiguous}")
            stored = {(report.epoch, report.seq) for report in record.log}
            for report in self._ends.get(device.name, ()):
                if (report.epoch, report.seq) not in stored:
                    self.object("no report is lost", device, f"{report.state} of {report.target}")
            self._truth_at_the_end(device)
            self._no_mixed_group(device)

    def _no_mixed_group(self, device: Device) -> None:
        """Of what a group was to bring, a device runs all or none; what it ran before counts for neither."""
        record, worker = self._server.records[device.name], device.hands.worker
        groups: dict[str, dict[str, bool]] = {}
        for name, desired in record.desired.items():
            if not desired.group or desired.mode == "none" or worker is None:
                continue
            first = next(
                (r for r in record.log if r.model == name and r.manifest == desired.manifest and r.state in CONFIRMED),
                None,
            )
            if first is not None and first.group != desired.group:
                continue
            running = worker.serving.get(name)
            brought = running is not None and running.manifest == desired.manifest
            groups.setdefault(desired.group, {})[name] = brought
        for group, found in groups.items():
            if len(set(found.values())) > 1:
                self.object("no device ends on a mixed group", device, f"{group}: {found}")

    def _truth_at_the_end(self, device: Device) -> None:
        worker = device.hands.worker
        if worker is None:
            self.object("a device ends with a worker", device, "none")
            return
        for name, report in self._server.records[device.name].current.items():
            loadable = worker.serving.get(name)
            running = loadable.manifest if loadable is not None else ""
            if running != report.running:
                self.object("a report says what runs", device, f"last word {report.state} of {report.target}")
            desired = self._server.records[device.name].desired.get(name)
            removed = desired is not None and desired.mode == "none"
            safe = report.state == "safe"
            if (device.name, name) in self._confirmed and not running and not removed and not safe:
                self.object("what once served keeps serving", device, f"{name} serves nothing")


def _all_proved(worker: Worker, device: Device, engine_version: str) -> bool:
    return all((one.digest, engine_version) in device.hands.proved for one in worker.serving.values())


def _tried(device: Device, models: Mapping[str, s.Slot]) -> Iterator[tuple[tuple[str, str, s.End], s.Job]]:
    """Yield what is tried: the key under which its ends are counted, and its job."""
    for slot in models.values():
        if isinstance(slot.phase, (s.Judging, *_TRIED)):
            yield _key(device, slot.phase.job), slot.phase.job


def _key(device: Device, job: s.Job) -> tuple[str, str, s.End]:
    return device.name, job.loadable.digest, turn.end_of(job.offered)


def _model_not_settled(desired: OfferedModel, running: str, report: Report | None, about: Report | None) -> str:
    """`report` is the device's last word on the model, `about` its last word on what is desired."""
    if report is None:
        return "" if desired.mode == "none" and not running else "never reported"
    if desired.mode == "none":
        return "" if not running else f"still runs {running[:15]}"
    if running == desired.manifest and report.state in CONFIRMED and report.manifest == desired.manifest:
        return ""
    if about is not None and about.state in NEGATIVE_ENDS and about.reason and report.state in ENDS:
        return ""
    beside = desired.mode in ("shadow", "split") or desired.share < 1.0
    if beside and about is not None and about.state == "compared" and running != desired.manifest:
        return ""
    return f"desired {desired.target}, last word {report.state} of {report.target} ({report.reason})"
