"""A campaign: faults of every kind, one after the other and at times two at once, then quiet, then the audit."""

import asyncio
import random
import shutil
import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.chaos.audit import Audit, audit
from benchmarks.chaos.faults import FAULTS, NEED_MOUNTS, Hurt
from benchmarks.chaos.stage import PARTIES, Stage, staged, until_progress
from workers.outbox import read_unsettled

_START_S, _RECOVERY_S, _QUIET_S, _END_S = 120.0, 90.0, 240.0, 60.0
_WATCH_S = 0.03
_TOGETHER = 0.15
"""How often a fault comes before the one before it is got over."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Incident:
    kind: str
    hurt: Hurt
    recovery_s: float | None
    """From when it was over until the ledger had a new update, of whom it had hit; None where the next one came too soon."""
    standstill_s: float
    """The longest time from its beginning to that recovery in which the ledger had nothing new at all."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """Of one kind of fault, in seconds: until it was got over, counted from its end; and how long nothing was merged."""

    times: int
    median_s: float | None
    longest_s: float | None
    standstill_median_s: float
    standstill_longest_s: float


@dataclass(slots=True)
class Outcome:
    seed: int
    minutes: float
    incidents: list[Incident] = field(default_factory=list)
    audit: Audit = field(default_factory=Audit)
    exits: dict[str, dict[int, int]] = field(default_factory=dict)

    @property
    def faults(self) -> Counter[str]:
        return Counter(incident.kind for incident in self.incidents)

    def recoveries(self) -> dict[str, Recovery]:
        """By kind."""
        seconds: dict[str, list[float]] = defaultdict(list)
        standstills: dict[str, list[float]] = defaultdict(list)
        for incident in self.incidents:
            standstills[incident.kind].append(incident.standstill_s)
            if incident.recovery_s is not None:
                seconds[incident.kind].append(incident.recovery_s)
        return {
            kind: Recovery(
                times=len(standstills[kind]),
                median_s=statistics.median(seconds[kind]) if seconds[kind] else None,
                longest_s=max(seconds[kind], default=None),
                standstill_median_s=statistics.median(standstills[kind]),
                standstill_longest_s=max(standstills[kind]),
            )
            for kind in sorted(standstills)
        }


class Watch:
    """Looks at the ledger all the time, and knows when it grew."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._grew_at: list[float] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        known = 0
        while True:
            newest = await asyncio.to_thread(self._stage.last_seq)
            if newest > known:
                known = newest
                self._grew_at.append(loop.time())
            await asyncio.sleep(_WATCH_S)

    def standstill_s(self, *, since: float) -> float:
        """The longest time without growth that reaches into the time since then."""
        first = bisect_right(self._grew_at, since)
        times = [*self._grew_at[max(0, first - 1) :], asyncio.get_running_loop().time()]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


async def run(
    *, minutes: float, seed: int, folder: Path, say: Say, kinds: tuple[str, ...] = tuple(FAULTS), keep: Path | None = None
) -> Outcome:
    """`kinds` of faults come in shuffled rounds, so that each comes about as often. What was wrong can be looked into in
    `keep`.
    """
    outcome = Outcome(seed, minutes)
    async with federation(folder, outcome, say=say, keep=keep) as stage, asyncio.TaskGroup() as group:
        if not all(member.disk.can_be_full for member in stage.members.values()):
            kinds = tuple(kind for kind in kinds if kind not in NEED_MOUNTS)
            say(f"left out, since nothing may be mounted here: {', '.join(NEED_MOUNTS)}")
        watch = Watch(stage)
        watching = group.create_task(watch.run())
        await _hurt(stage, random.Random(seed), watch, minutes=minutes, kinds=kinds, outcome=outcome, say=say)
        watching.cancel()
    return outcome


@asynccontextmanager
async def federation(folder: Path, outcome: Outcome, *, say: Say, keep: Path | None = None) -> AsyncIterator[Stage]:
    """At work while inside; at the end it comes to rest, is over, and is audited into the outcome."""
    async with staged(folder) as stage, asyncio.TaskGroup() as group:
        keepers = [group.create_task(member.run()) for member in stage.members.values()]
        try:
            await _everybody_takes_part(stage)
            say(f"four parties and two aggregators are at work on RabbitMQ in {stage.node.folder}")
            yield stage
            say("quiet: nobody trains any more, and what is on its way arrives")
            await _rest(stage, outcome)
            await _end(stage, keepers, outcome)
        except BaseException:
            _keep(folder, keep)
            raise
        finally:
            for keeper in keepers:
                keeper.cancel()
        say("the audit: every training again, every entry again")
        outcome.exits = {name: dict(member.exits) for name, member in stage.members.items()}
        violations = outcome.audit.violations
        outcome.audit = await asyncio.to_thread(audit, stage)
        outcome.audit.violations = violations + outcome.audit.violations + _crashes(stage)
        if outcome.audit.violations:
            _keep(folder, keep)


def _keep(folder: Path, keep: Path | None) -> None:
    if keep is not None:
        shutil.copytree(folder, keep, dirs_exist_ok=True)


async def _everybody_takes_part(stage: Stage) -> None:
    for party in PARTIES:
        if await until_progress(stage, since=2, party=party, within_s=_START_S) is None:
            raise RuntimeError(f"{party} takes no part: {_last_words(stage)}")


async def _hurt(
    stage: Stage, dice: random.Random, watch: Watch, *, minutes: float, kinds: tuple[str, ...], outcome: Outcome, say: Say
) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    deck: list[str] = []
    while loop.time() - began < minutes * 60:
        deck = deck or dice.sample(kinds, len(kinds))
        kind = deck.pop()
        hit_at = loop.time()
        hurt = await FAULTS[kind](stage, dice)
        recovery_s: float | None = None
        if dice.random() >= _TOGETHER:
            since = await asyncio.to_thread(stage.entries, hurt.party)
            recovery_s = await until_progress(stage, since=since, party=hurt.party, within_s=_RECOVERY_S)
            if recovery_s is None:
                outcome.audit.violations.append(f"{kind} ({hurt.who} {hurt.what}): no update within {_RECOVERY_S:g} s after it")
            await asyncio.sleep(dice.uniform(0.1, 1.0))
        outcome.incidents.append(Incident(kind, hurt, recovery_s, watch.standstill_s(since=hit_at)))
        got_over = "" if recovery_s is None else f", got over in {recovery_s:.1f} s"
        say(f"{loop.time() - began:6.0f} s  {len(outcome.incidents):4d}  {kind}: {hurt.who} {hurt.what}{got_over}")


async def _rest(stage: Stage, outcome: Outcome) -> None:
    """No frame selects a party any more; when every update has its receipt, the federation is over."""
    for one in stage.aggregators:
        await one.restart(BROKER_FL_AGGREGATOR__FRACTION="1e-9")
    loop = asyncio.get_running_loop()
    began = loop.time()
    while waiting := await asyncio.to_thread(_unsettled, stage):
        if loop.time() - began > _QUIET_S:
            outcome.audit.violations.append(f"{waiting} updates have no receipt after {_QUIET_S:g} s of quiet")
            break
        await asyncio.sleep(0.5)
    # A model that was received is kept on the disk a moment later.
    await asyncio.sleep(1.0)


async def _end(stage: Stage, keepers: list[asyncio.Task[None]], outcome: Outcome) -> None:
    """The federation is over by its time; whoever does not end then is named, and killed."""
    for worker in stage.workers:
        worker.let_end()
    for one in stage.aggregators:
        await one.restart(BROKER_FL_AGGREGATOR__SECONDS="1")
        one.let_end()
    await asyncio.wait(keepers, timeout=_END_S)
    for member in stage.members.values():
        if member.pid is not None:
            outcome.audit.violations.append(f"{member.name} has not ended {_END_S:g} s after the federation was over")
            member.hold_down()
            member.kill()


def _unsettled(stage: Stage) -> int:
    return sum(len(read_unsettled(stage.outbox_folder(party), party)) for party in PARTIES)


def _crashes(stage: Stage) -> list[str]:
    """Whatever is said in a traceback was not foreseen."""
    found = []
    for member in stage.members.values():
        text = member.log.read_text(errors="replace")
        if member.exits[1] or "Traceback (most recent call last)" in text:
            found.append(f"{member.name} ended {member.exits[1]} times with a traceback: {text[-2000:]}")
    return found


def _last_words(stage: Stage) -> str:
    return "; ".join(f"{one.name}: {one.log.read_text(errors='replace')[-300:]}" for one in stage.members.values())
