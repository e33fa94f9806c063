"""Carries rollouts on: reads evidence, asks `rollout.decide`, writes what it says in one transaction.

The transaction compares the rollout's revision and the lease's epoch, so a decision made on what is no longer so is thrown
away and made again. Nothing is remembered in this process that a restart may not forget: scans and parsed plans are caches,
publishing is an outbox, and the state of every rollout is its row.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec
from sqlalchemy import insert, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from wherry_server import (
    assignments,
    audit,
    comparison,
    evidence,
    flag_trials,
    flag_values,
    offers,
    quarantine,
    rollouts,
)
from wherry_server.assignments import Prepared
from wherry_server.db import bulk
from wherry_server.db.database import DATABASE_ERRORS
from wherry_server.db.tables import Decision as DecisionRow
from wherry_server.db.tables import Rollout, RolloutStatus, table
from wherry_server.evidence import Candidate
from wherry_server.flag_bearer import Bearer
from wherry_server.ingest import Behind, Stored
from wherry_server.jobs import begun
from wherry_server.lanes import ended
from wherry_server.lease import Lease, boot_id
from wherry_server.offers import Composer, Number
from wherry_server.outbox import Outbox
from wherry_server.plan import Plan, parse_plan
from wherry_server.rollout import (
    EXPOSED_PER_TURN,
    Decision,
    Evidence,
    Expose,
    Moved,
    Progress,
    Promote,
    Retry,
    Withdraw,
    decide,
    reach,
)
from wherry_server.services import Services
from wherry_server.targeting import in_turns
from wherry_server.times import now_us
from wherry_shared.clock import MICROSECONDS, Now
from wherry_shared.errors import RefusedError, UnreachableError, WherryError

log = logging.getLogger(__name__)

_ROLLOUT = table(Rollout)

TURN_MIN_S = 0.2
TURN_MAX_S = 1.0
"""Deadlines and operators are noticed within this time even if no device says anything."""
SCAN_MIN_S = 1.0
SCAN_SHARE = 20
"""A scan of the members is repeated at the earliest after this many times what it took: at most 5 % of a core."""
QUIET_SHARE = 100
"""While nothing is seen to change, scans come to be this far apart, and devices are counted again this seldom: 1 % of a core."""
COUNTED_ALWAYS = 1_000
"""Fewer devices than this are counted in every turn."""
REPORT_LATE_S = 60.0
"""So long after it was received a report may be committed, and so far apart may be the clocks of the server's machines."""
REPORTS_COUNTED_MAX = 2_000
SCAN_FRESH_S = 1.0
JUDGE_SHARE = 5
JUDGE_SHARE_MAX = 20
"""Devices with a flag's variant are judged again after this many times what it took: at most a sixth of a core, and less and less
while nothing comes of it."""
DONE_SCAN_MIN_S = 5.0
"""Of those that expose nobody, or newcomers only."""
TELL_MIN_S = 1.0
TELL_AGAIN_S = rollouts.STATUS_FRESH_S / 2
"""How a rollout stands is written down this often at most, and at least."""
RESIGN_S = 60.0
RESIGN_PER_TURN = 2_000
COMPOSE_TRIES = 3
AHEAD_S = 10.0
"""Offers that were composed ahead are used for so long."""
HELLOS_PER_TURN = 2_000
SCANNED = frozenset({"created", "running", "paused", "done"})
"""States in which the members of the cohort are looked at."""
CONDEMNING = frozenset({"failure_bound", "failed_bound", "returned_bound", "crashed_bound"})
"""Reasons of a halt after which the hardware on which the bundle failed is not offered it again."""


@dataclass(slots=True)
class _Ahead:
    """Offers composed for whom a stage exposes next. They are no more than signed bytes until a turn decides so."""

    stage: int
    tried: bool
    keyid: str
    """Of the key that signs them."""
    task: asyncio.Task[Prepared]
    since: float = field(default_factory=time.monotonic)

    def fits(self, stage: int, keyid: str, others_at: float, *, tried: bool) -> bool:
        """Tell whether they can be used; not if other offers were written meanwhile, by which these may be outdated."""
        young = time.monotonic() - self.since < AHEAD_S and others_at < self.since
        return young and (self.stage, self.tried, self.keyid) == (stage, tried, keyid)


@dataclass(slots=True)
class _Known:
    """What this process remembers of a rollout, to save work."""

    plan: Plan
    scan: evidence.Scan | None = None
    scanned_at: float = 0.0
    scan_cost: float = 0.0
    scan_share: int = SCAN_SHARE
    seen: tuple[int, int, int, int] = (0, 0, 0, 0)
    """What the last scan came to."""
    tally: evidence.Tally | None = None
    tally_cost: float = 0.0
    news: int = -1
    """Which of `Conductor._news` the tally has."""
    judge_at: float = 0.0
    """When devices with a flag's variant are judged next."""
    judge_share: int = JUDGE_SHARE
    compared_until: int = -1
    """The period until which every lane of its comparisons was taken."""
    ahead: _Ahead | None = None
    status: tuple[str, str] | None = None
    """How it stands, as JSON: evidence, and devices by outcome."""
    told: tuple[str, str] | None = None
    told_at: float = 0.0
    failed: int = 0
    """Devices that failed with the bundle, as last counted."""
    condemned: int = 0
    """How many had, when hardware was last judged."""
    condemn_at: float = 0.0
    """When it is judged next at the earliest."""

    def fails_on_more(self, now: float) -> bool:
        """Tell whether it is time to judge hardware; of a flag there is none to judge while its rollout goes on."""
        return self.failed > self.condemned and now >= self.condemn_at and not self.plan.flag

    def untold(self, now: float) -> bool:
        """Tell whether it is time to say how it stands."""
        after = TELL_MIN_S if self.status != self.told else TELL_AGAIN_S
        return self.status is not None and (self.told is None or now - self.told_at >= after)

    def due(self, minimum: float, now: float) -> bool:
        """Tell whether the members are looked at again."""
        return self.scan is None or now - self.scanned_at >= max(minimum, self.scan_share * self.scan_cost)

    def counted(self, state: str, news: int, moment: int) -> bool:
        """Tell whether the last count still stands.

        Reports change it, and so does this process; the few other things that do (time, devices that were shut out) are seen when it
        is made again all the same. Of a return the hellos say when a device is back. A few devices are counted always.
        """
        tally = self.tally
        if tally is None or self.news != news or state == "returning" or tally.devices < COUNTED_ALWAYS:
            return False
        return 0 <= moment - tally.now < QUIET_SHARE * self.tally_cost * MICROSECONDS


@dataclass(slots=True)
class Conductor:
    """One project's director; `turn` is one look at every rollout under way."""

    services: Services
    lease: Lease
    composer: Composer
    outbox: Outbox | None = None
    clock: Callable[[], Now] = field(default_factory=lambda: _clock(boot_id()))
    moment: Callable[[], int] = now_us
    """Microseconds UTC: when devices are exposed, and which periods of telemetry have ended."""
    _known: dict[str, _Known] = field(default_factory=dict)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _hellos: dict[str, Behind] = field(default_factory=dict)
    _resign_at: float = 0.0
    _bearer: Bearer | None = None
    _others_at: float = 0.0
    """When offers were last written by what is no rollout's turn."""
    _news: int = 0
    """How often reports were noticed."""
    _heard: int = 0
    _heard_from: int = 0
    """How many reports were received from this moment on, when last counted."""
    _full: bool = False
    """Whether the last turn exposed as many as one may, so that there is more to do at once."""

    # --- what ingest tells ----------------------------------------------------------------------

    def stored(self, result: Stored) -> None:
        """Take note of what a batch changed."""
        for hello in result.hellos:
            self._hellos[hello.device] = hello
        if result.moved:
            self._woken.set()

    # --- turns ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take turns until cancelled. Whatever writes offers is called from here, one after the other."""
        while True:
            started = time.monotonic()
            moved = more = False
            if self.lease.epoch:
                await self.reconcile()
                await self._resign_in_time()
                moved = await self.bear_flags() > 0
                more = self._bear().more
                moved = await self.turn() or moved
            spent = time.monotonic() - started
            if self._full or more:  # where much is to do, it goes on
                self._woken.clear()
                await asyncio.sleep(0)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_MAX_S):
                    await self._woken.wait()
            self._woken.clear()
            await asyncio.sleep(TURN_MIN_S if moved else max(TURN_MIN_S, spent))

    async def turn(self) -> bool:
        """Look at every rollout once, the one that outranks the others first; tell whether anything was decided."""
        async with self.services.database.read() as connection:
            await self._listen(connection)
            rows = (await connection.execute(_UNDER_WAY, {"project": self.services.project})).all()
        moved = self._full = False
        for row in rows:
            try:
                moved = await self._look(row) or moved
            except UnreachableError as error:
                log.info("%s: %s", _name(row), error.message)
                if error.code == "lease_lost":
                    return moved
            except RefusedError as error:
                log.error("%s cannot go on: %s", _name(row), error)
        for gone in self._known.keys() - {row.id for row in rows}:
            del self._known[gone]
        await self._tell()
        return moved

    async def _listen(self, connection: AsyncConnection) -> None:
        """Notice whether any report was stored since the last turn, whoever stores them."""
        project, now = self.services.project, now_us()
        count = await evidence.reports_since(connection, project, self._heard_from, REPORTS_COUNTED_MAX)
        if count != self._heard or count == REPORTS_COUNTED_MAX:
            self._news += 1
        late = int(REPORT_LATE_S * MICROSECONDS)
        if count == REPORTS_COUNTED_MAX or now - self._heard_from > 2 * late:
            self._heard_from = now - late
            count = await evidence.reports_since(connection, project, self._heard_from, REPORTS_COUNTED_MAX)
        self._heard = count

    async def _tell(self) -> None:
        """Write down how the rollouts stand, for whoever asks; nothing is decided on it."""
        moment, now = self.moment(), time.monotonic()
        due = {rollout: known for rollout, known in self._known.items() if known.untold(now)}
        if not due:
            return
        try:
            async with self.services.database.write() as connection:
                await self.lease.check(connection)
                await self._write_status(connection, due, moment)
        except UnreachableError as error:
            log.info("%s", error.message)
            return
        for known in due.values():
            known.told, known.told_at = known.status, now

    async def _write_status(self, connection: AsyncConnection, known: Mapping[str, _Known], moment: int) -> None:
        rows = [
            (rollout, self.services.project, *one.status, moment)
            for rollout, one in known.items()
            if one.status is not None
        ]
        await bulk.upsert(connection, table(RolloutStatus), _STATUS, rows, update=_STATUS[2:])

    async def _look(self, row: Any) -> bool:
        known = self._known.get(row.id)
        if known is None:
            known = self._known[row.id] = _Known(parse_plan(_builtins(row.plan)))
        progress = evidence.load_progress(_builtins(row.progress))
        now, moment = self.clock(), self.moment()
        if known.plan.flag and row.state in flag_trials.TRIED:
            await self._settle_flag(row, known, moment)
        if row.state == "done" and not row.wanted and not known.due(DONE_SCAN_MIN_S, time.monotonic()):
            if not known.scan or not known.scan.open(
                known.plan, progress.cut_offs, reach(known.plan, progress), moment
            ):
                return False
        elif row.state in SCANNED and known.due(
            DONE_SCAN_MIN_S if row.state == "paused" else SCAN_MIN_S, time.monotonic()
        ):
            known.scan = None
        found, after, decisions = await self._ask(row, known, progress, now, moment)
        if known.fails_on_more(time.monotonic()) and row.state in SCANNED and await self._condemn(row, known, moment):
            known.scan = None
            found, after, decisions = await self._ask(row, known, progress, now, moment)
        if after.stage != progress.stage and time.monotonic() - known.scanned_at > SCAN_FRESH_S:
            known.scan = None  # a cut-off is drawn from the members at this moment
            found, after, decisions = await self._ask(row, known, progress, now, moment)
        if not decisions and after == progress and not row.wanted:
            return False
        prepared = await self._prepare(row, known, after, decisions, moment)
        told = prepared.exposed or prepared.promoted or prepared.lost
        idle = all(isinstance(one, Expose | Promote) for one in decisions) and not told
        if idle and after == progress and not row.wanted:
            return False
        await self._commit(row, known, progress, after, decisions, found, prepared, moment)
        known.told_at = -TELL_AGAIN_S  # what it changed is told in the next turn
        for other in self._known.values():
            other.tally, other.scan_share = None, SCAN_SHARE
        self._after(known, prepared)
        if known.plan.flag and any(isinstance(one, Withdraw) for one in decisions):
            self._bear().look_soon()  # whom a newer rollout took over and gave back has it of this one, and no more
        for one in decisions:
            if isinstance(one, Moved):
                log.info("%s is %s: %s", _name(row), one.state, one.reason)
        return True

    async def _ask(
        self, row: Any, known: _Known, progress: Progress, now: Now, moment: int
    ) -> tuple[Evidence, Progress, tuple[Decision, ...]]:
        async with self.services.database.read() as connection:
            if known.scan is None and row.state in SCANNED:
                started = time.monotonic()
                known.scan = await evidence.scan(connection, row, known.plan)
                known.scanned_at = time.monotonic()
                known.scan_cost = known.scanned_at - started
                quiet = known.scan.size == known.seen
                known.scan_share = min(2 * known.scan_share, QUIET_SHARE) if quiet else SCAN_SHARE
                known.seen = known.scan.size
            tallied = known.tally if known.counted(row.state, self._news, moment) else None
            if tallied is None:
                started = time.monotonic()
                tallied = await evidence.tally(connection, row.id, known.plan, moment)
                known.tally, known.tally_cost, known.news = tallied, time.monotonic() - started, self._news
            known.failed = tallied.broken
            known.condemned = min(known.condemned, known.failed)  # some may have been told to try again
            found = await evidence.read(connection, row, known.plan, progress, known.scan, tallied)
            if known.scan is not None and row.state in rollouts.TOLD:
                known.status = (msgspec.json.encode(found).decode(), msgspec.json.encode(tallied.outcomes).decode())
            until = ended(known.plan, moment)
            if known.plan.compared and row.state in ("running", "paused") and until > known.compared_until:
                scan = known.scan or await evidence.scan(connection, row, known.plan)
                taken = await comparison.take(connection, row, known.plan, progress, scan, moment)
                found = msgspec.structs.replace(found, taken=taken)
                if not taken:
                    known.compared_until = until
        found = msgspec.structs.replace(found, at=now)
        after, decisions = decide(known.plan, progress, found, now)
        return found, after, decisions

    async def _prepare(
        self, row: Any, known: _Known, after: Progress, decisions: tuple[Decision, ...], moment: int
    ) -> Prepared:
        """Read and sign what the decisions need, outside of the write transaction."""
        prepared = Prepared()
        database = self.services.database
        for one in decisions:
            if isinstance(one, Expose) and known.scan is not None:
                most = EXPOSED_PER_TURN if one.limit is None else min(one.limit, EXPOSED_PER_TURN)
                found = known.scan.open(known.plan, after.cut_offs, one.share, moment)
                if known.plan.takes_turns:
                    found = in_turns(found, attrgetter("stratum"))
                tried = known.plan.two_rounds and not after.promoting
                await self._expose(prepared, row, known, one.stage, found[:most], moment, tried=tried)
                following = found[most : most + EXPOSED_PER_TURN] if one.limit is None else []
                if following:
                    known.ahead = self._go_ahead(row, known.plan, one.stage, following, moment, tried=tried)
            elif isinstance(one, Promote):
                most = EXPOSED_PER_TURN if one.limit is None else min(one.limit, EXPOSED_PER_TURN)
                async with database.read() as connection:
                    rows = await assignments.read_promoting(connection, row.id, one.stage, most)
                    current = await offers.current(connection, sorted({found.device_id for found in rows}))
                await asyncio.to_thread(
                    assignments.promote, prepared, row, known.plan, rows, current, self.composer, moment
                )
            elif isinstance(one, Withdraw):
                async with database.read() as connection:
                    recalled = known.scan.recalled if known.scan is not None else frozenset()
                    rows = await assignments.read_withdrawing(connection, row.id, one.scope, one.stage, recalled)
                    devices = sorted({found.device_id for found in rows})
                    current = await offers.current(connection, devices)
                    flags = await flag_values.without(connection, row, devices) if known.plan.flag else {}
                prepared.scope, prepared.stage = one.scope, one.stage
                await asyncio.to_thread(
                    assignments.withdraw, prepared, row, known.plan, rows, current, self.composer, moment, flags
                )
            elif isinstance(one, Retry):
                async with database.read() as connection:
                    rows = await assignments.read_retrying(connection, row, known.plan, failed=one.failed)
                    current = await offers.current(connection, sorted({found.device_id for found in rows}))
                await asyncio.to_thread(
                    assignments.retry, prepared, row, known.plan, rows, current, self.composer, moment
                )
        for refused in prepared.refused:
            log.error("%s: %s", _name(row), refused)
        return prepared

    async def _expose(
        self,
        prepared: Prepared,
        row: Any,
        known: _Known,
        stage: int,
        chosen: list[Candidate],
        moment: int,
        *,
        tried: bool,
    ) -> None:
        """Compose the offers of a stage's devices, but for those that were composed ahead."""
        ahead, known.ahead = known.ahead, None
        if ahead is not None and ahead.fits(stage, self.composer.keyid, self._others_at, tried=tried):
            wanted, made = set(chosen), await ahead.task
            pairs = zip(made.exposed, made.composed, strict=True)
            used = [(candidate, offer) for candidate, offer in pairs if candidate in wanted]
            prepared.exposed += [candidate for candidate, _ in used]
            prepared.composed += [offer for _, offer in used]
            prepared.stage, prepared.tried = stage, tried
            wanted.difference_update(prepared.exposed)
            chosen = [candidate for candidate in chosen if candidate in wanted]
        if chosen:
            async with self.services.database.read() as connection:
                current = await assignments.read_exposing(connection, chosen)
            await asyncio.to_thread(
                assignments.expose,
                prepared,
                row,
                known.plan,
                stage,
                chosen,
                current,
                self.composer,
                moment,
                tried=tried,
            )

    def _go_ahead(
        self, row: Any, plan: Plan, stage: int, candidates: list[Candidate], moment: int, *, tried: bool
    ) -> _Ahead:
        """Begin with the offers of those whom the next turn will expose, if it judges so, while those before are stored."""

        async def compose() -> Prepared:
            prepared = Prepared()
            async with self.services.database.read() as connection:
                current = await assignments.read_exposing(connection, candidates)
            await asyncio.to_thread(
                assignments.expose, prepared, row, plan, stage, candidates, current, self.composer, moment, tried=tried
            )
            return prepared

        return _Ahead(stage, tried, self.composer.keyid, begun(compose(), "offers ahead"))

    async def _commit(
        self,
        row: Any,
        known: _Known,
        before: Progress,
        after: Progress,
        decisions: tuple[Decision, ...],
        found: Evidence,
        prepared: Prepared,
        moment: int,
    ) -> None:
        """Write progress, decision, assignments, offers, and on what it was decided together, or nothing.

        Raises:
            UnreachableError: `rollout_changed` or `lease_lost`: look again.
        """
        async with self.services.database.write() as connection:
            await self.lease.check(connection)
            changed = await connection.execute(
                update(_ROLLOUT)
                .where(_ROLLOUT.c.id == row.id, _ROLLOUT.c.revision == row.revision)
                .values(
                    progress=msgspec.to_builtins(after),
                    state=after.state,
                    reason=after.reason,
                    revision=row.revision + 1,
                    wanted="",
                    lease_epoch=self.lease.epoch,
                    updated_at=moment,
                )
            )
            if changed.rowcount != 1:
                raise UnreachableError("rollout_changed", "changed meanwhile, looking again")
            await connection.execute(
                insert(DecisionRow).values(
                    rollout_id=row.id,
                    revision=row.revision + 1,
                    project_id=row.project_id,
                    at=moment,
                    decisions=msgspec.to_builtins(decisions),
                    evidence=msgspec.to_builtins(found),
                    progress_before=msgspec.to_builtins(before),
                )
            )
            if (after.state, after.stage) != (before.state, before.stage):
                action = "rollout.stage" if after.state == before.state else f"rollout.{after.state}"
                said = {
                    "model": row.model,
                    "stage": after.stage,
                    "reason": after.reason,
                    "before": {"state": before.state, "stage": before.stage},
                    "after": {"state": after.state, "stage": after.stage},
                    "evidence": {"decision": row.revision + 1},
                }
                await audit.append(connection, row.project_id, "director", action, str(row.number), **said)
            if after.reason in CONDEMNING and before.state != "returning":
                bad = await quarantine.condemnable(connection, row, known.plan)
                await quarantine.condemn(connection, row, known.plan, bad, moment)
                self._look_anew(known.plan, bad)
            await self._write_status(connection, {row.id: known}, moment)
            await assignments.apply(connection, row, known.plan, prepared, moment)

    async def _condemn(self, row: Any, known: _Known, moment: int) -> bool:
        """Keep the bundle from hardware on which it fails, also where the rollout as a whole goes on; tell whether any is new."""
        started = time.monotonic()
        failed = known.failed
        async with self.services.database.read() as connection:
            bad = await quarantine.condemnable(connection, row, known.plan)
        if bad:
            async with self.services.database.write() as connection:
                await self.lease.check(connection)
                await quarantine.condemn(connection, row, known.plan, bad, moment)
            self._look_anew(known.plan, bad)
            log.warning("%s fails on %s: not offered there any more", _name(row), ", ".join(sorted(bad)))
        known.condemned, ended = failed, time.monotonic()
        known.condemn_at = ended + SCAN_SHARE * (ended - started)
        return bool(bad)

    def _look_anew(self, plan: Plan, bad: Mapping[str, Any]) -> None:
        """Have every rollout of a bundle see the hardware on which it is known to be bad from now on."""
        manifests = {planned.manifest for planned in plan.targets}
        for other in self._known.values():
            if bad and not manifests.isdisjoint(planned.manifest for planned in other.plan.targets):
                other.scan = None

    def _after(self, known: _Known, prepared: Prepared) -> None:
        if prepared.scope == "recalled" and known.scan is not None:
            known.scan.recalled = frozenset()  # what is left of them the next scan says
        exposed = {one.device for one in prepared.exposed}
        self._full = self._full or len(exposed) >= EXPOSED_PER_TURN
        if exposed:
            models = {planned.model for planned in known.plan.targets}
            for other in self._known.values():  # of what it exposed, no rollout of the model takes anything newly
                if other.scan is not None and not models.isdisjoint(planned.model for planned in other.plan.targets):
                    other.scan.leave_out(exposed)
        if prepared.composed and self.outbox is not None:
            self.outbox.wake()
        self._woken.set()

    # --- flags ----------------------------------------------------------------------------------

    async def _settle_flag(self, row: Any, known: _Known, moment: int) -> None:
        """Judge the devices that have the variant of a flag's rollout; who goes back gets its offer in the next turn."""
        started = time.monotonic()
        if started < known.judge_at:
            return
        async with self.services.database.read() as connection:
            settled = await flag_trials.look(connection, row, known.plan, moment)
        if settled:
            async with self.services.database.write() as connection:
                await self.lease.check(connection)
                await flag_trials.write(connection, row, settled, moment)
            known.tally = None
            self._bear().owe(settled.returned)
            self._woken.set()
        ended = time.monotonic()
        known.judge_share = JUDGE_SHARE if settled else min(2 * known.judge_share, JUDGE_SHARE_MAX)
        known.judge_at = ended + known.judge_share * (ended - started)

    async def bear_flags(self) -> int:
        """Bring devices the flags that they should have; return how many offers that took."""
        done = await self._bear().turn()
        if done:
            self._others_at = time.monotonic()
        return done

    def _bear(self) -> Bearer:
        if self._bearer is None:
            self._bearer = Bearer(self.services, self.lease, self.composer)
        self._bearer.outbox = self.outbox
        return self._bearer

    # --- hellos ---------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Answer hellos that named another offer than the current one: publish it again, or go on above theirs."""
        hellos = [self._hellos.pop(device) for device in list(self._hellos)[:HELLOS_PER_TURN]]
        if not hellos:
            return
        try:
            await self._answer(hellos)
        except (WherryError, *DATABASE_ERRORS):
            for hello in hellos:
                self._hellos.setdefault(hello.device, hello)  # a newer one came meanwhile, or this one waits again
            raise

    async def _answer(self, hellos: list[Behind]) -> None:
        async with self.services.database.read() as connection:
            current = await offers.current(connection, [hello.device for hello in hellos])
        behind, ahead, new = [], [], set()
        for hello in hellos:
            standing = current.get(hello.device)
            if standing is None:
                continue
            if standing.number == Number(0, 0):
                new.add(hello.device)
                continue
            said = Number(hello.epoch, hello.serial)
            if said < standing.number:
                behind.append(hello.device)
            elif said > standing.number:
                ahead.append(hello.device)
        self._bear().owe(new)
        if new:
            for known in self._known.values():
                known.scan_share = SCAN_SHARE
        if ahead:
            log.warning("%d devices know newer offers than this server: going on above them", len(ahead))
            await self._compose_again(ahead)
        if behind and self.outbox is not None:
            await self.outbox.again(behind)

    async def _resign_in_time(self) -> None:
        if time.monotonic() < self._resign_at:
            return
        self._resign_at = time.monotonic() + RESIGN_S
        try:
            await self.resign()
        except WherryError as error:
            log.warning("offers are signed anew in %s s: %s", RESIGN_S, error)

    async def resign(self) -> int:
        """Sign offers anew that are past half of their life or that another director key signed; return how many."""
        trust = self.services.trust
        if trust.director_keyid != self.composer.keyid:
            log.info("the director key was replaced: offers are signed anew")
            self.composer.use(*trust.director)
        async with self.services.database.read() as connection:
            rows = await connection.execute(
                _OLD,
                {
                    "project": self.services.project,
                    "before": max(now_us() - offers.HALF_LIFE_US, trust.director_since_us),
                    "limit": RESIGN_PER_TURN,
                },
            )
            devices = [row.device_id for row in rows]
        if devices:
            await self._compose_again(devices)
        return len(devices)

    async def _compose_again(self, devices: list[str]) -> None:
        for tried in range(1, COMPOSE_TRIES + 1):
            try:
                await self._compose_once(devices)
                break
            except UnreachableError as error:
                if error.code != "offer_changed" or tried == COMPOSE_TRIES:
                    raise
                log.info("composing again: %s", error.message)
        if self.outbox is not None:
            self.outbox.wake()

    async def _compose_once(self, devices: list[str]) -> None:
        moment = now_us()
        async with self.services.database.read() as connection:
            current = await offers.current(connection, devices)
        composed = await asyncio.to_thread(self._compose_all, current, moment)
        async with self.services.database.write() as connection:
            await self.lease.check(connection)
            await offers.write(connection, self.services.project, composed)
        self._others_at = time.monotonic()

    def _compose_all(self, current: dict[str, offers.Current], moment: int) -> list[offers.Composed]:
        """Compose what is offered already under new numbers; who cannot get an offer stops nobody else."""
        wanted = [offers.Wanted(device, found, found.models) for device, found in current.items()]
        composed, refused = self.composer.compose_all(wanted, moment)
        for error in refused:
            log.error("%s", error)
        return composed


def _clock(boot: str) -> Callable[[], Now]:
    return lambda: Now(boot, time.monotonic_ns() // 1_000_000, time.time())


def _builtins(raw: Any) -> Any:
    return msgspec.json.decode(raw) if isinstance(raw, (str, bytes)) else raw


def _name(row: Any) -> str:
    return f"rollout {row.number} ({row.model})"


_STATUS = ("rollout_id", "project_id", "evidence", "outcomes", "at")
_UNDER_WAY = text(
    "SELECT id, project_id, number, model, CAST(plan AS TEXT) AS plan, CAST(progress AS TEXT) AS progress, state, salt,"
    " priority, revision, wanted FROM rollout WHERE project_id = :project AND (state IN ('running', 'paused', 'returning',"
    " 'done') OR wanted <> '') ORDER BY priority DESC, number DESC"
)
_OLD = text(
    "SELECT o.device_id FROM offer o JOIN device d ON d.id = o.device_id AND d.state = 'active'"
    " WHERE o.project_id = :project AND o.issued_at < :before ORDER BY o.issued_at LIMIT :limit"
)
