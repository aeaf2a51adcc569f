"""What can go wrong, one function a kind: does it, lasts as long as it lasts, and leaves everything as a repaired machine would
be.
"""

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aggregator.opening import open_ledger_for_reading
from benchmarks.chaos.member import Member
from benchmarks.chaos.stage import AGGREGATORS, IN_PARTS, NAMES, PARTIES, Stage
from broker_fl.failpoints import FAILPOINTS
from broker_fl.topology import party as topology_of_party
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Message
from workers.outbox import read_unsettled

_CONFIRMED_S = 3.0
"""RabbitMQ 3.10 forgets a quorum queue that was declared just before kill -9."""

_SECONDS_OF_HOUR, _HOURS_OF_WEEK = 3600.0, 168


@dataclass(frozen=True, slots=True)
class Hurt:
    """Whom a fault hit, by name: a member, or everybody."""

    who: str
    what: str = ""

    @property
    def party(self) -> str | None:
        """Whose updates show that it has recovered; None: anybody's."""
        return self.who if self.who in PARTIES else None


Fault = Callable[[Stage, random.Random], Awaitable[Hurt]]


async def kill_leader(stage: Stage, dice: random.Random) -> Hurt:
    return await _killed(stage.leader, pause_s=dice.choice((0.0, 1.0, 3.0)))


async def kill_standby(stage: Stage, dice: random.Random) -> Hurt:
    return await _killed(stage.standby, pause_s=dice.uniform(0, 1))


async def kill_both_aggregators(stage: Stage, dice: random.Random) -> Hurt:
    for one in stage.aggregators:
        one.kill()
    return Hurt("everybody", "both aggregators")


async def kill_worker(stage: Stage, dice: random.Random) -> Hurt:
    return await _killed(dice.choice(stage.workers), pause_s=dice.choice((0.0, 1.0)))


async def freeze_leader(stage: Stage, dice: random.Random) -> Hurt:
    """Long enough, at times, for the standby to take over; the thawed one must not commit then."""
    return await _frozen(stage.leader, seconds=dice.choice((0.5, 2.0, 8.0)))


async def freeze_worker(stage: Stage, dice: random.Random) -> Hurt:
    return await _frozen(dice.choice(stage.workers), seconds=dice.choice((0.5, 2.0, 6.0)))


async def kill_broker(stage: Stage, dice: random.Random) -> Hurt:
    await asyncio.sleep(_CONFIRMED_S)
    stage.node.kill()
    await stage.node.start_again()
    return Hurt("everybody")


async def restart_broker(stage: Stage, dice: random.Random) -> Hurt:
    await stage.node.stop()
    await stage.node.start_again()
    return Hurt("everybody")


async def cut_link(stage: Stage, dice: random.Random) -> Hurt:
    member = _anybody(stage, dice)
    member.link.cut()
    return Hurt(member.name)


async def black_hole(stage: Stage, dice: random.Random) -> Hurt:
    member = _anybody(stage, dice)
    member.link.black_hole(True)
    return await _healed(member, after_s=dice.choice((0.5, 2.0, 6.0)))


async def slow_link(stage: Stage, dice: random.Random) -> Hurt:
    member = _anybody(stage, dice)
    member.link.slow(dice.choice((2e3, 2e4, 1e5)))
    return await _healed(member, after_s=dice.uniform(1, 4))


async def lost_confirms(stage: Stage, dice: random.Random) -> Hurt:
    """What is published arrives, and nobody hears of it: it times out, and is sent again."""
    member = _anybody(stage, dice)
    member.link.deafen(True)
    return await _healed(member, after_s=dice.choice((0.2, 1.0, 5.0)))


async def lost_acknowledgements(stage: Stage, dice: random.Random) -> Hurt:
    """What was consumed is not acknowledged, and delivered again."""
    member = _anybody(stage, dice)
    member.link.mute(True)
    return await _healed(member, after_s=dice.choice((0.2, 1.0, 5.0)))


async def sent_twice(stage: Stage, dice: random.Random) -> Hurt:
    """The very bytes of updates that wait for their receipts, once more under their ids, in parts where they are large."""
    party = dice.choice(PARTIES)
    waiting = await asyncio.to_thread(read_unsettled, stage.outbox_folder(party), party)
    async with stage.logins[party]("chaos") as transport:
        for stored in waiting:
            message = Message(NAMES.up(party), stored.body, message_id=stored.update_id)
            for part in split(message, part_bytes=16_384, limit_bytes=65_536):
                await transport.publish(part)
    return Hurt(party, f"{len(waiting)} updates")


async def half_sent(stage: Stage, dice: random.Random) -> Hurt:
    """A worker that dies between two parts of an update."""
    worker = stage.members[IN_PARTS]
    worker.arm(f"worker.part=kill@{dice.randint(1, 9)}")
    await asyncio.sleep(1.0)
    return Hurt(worker.name)


async def failpoint(stage: Stage, dice: random.Random) -> Hurt:
    """Somebody dies at a moment that no signal could be timed for."""
    name = dice.choice(sorted(FAILPOINTS))
    async with armed(stage, f"{name}=kill@{dice.randint(1, 10)}", worker=dice.choice(stage.workers)) as member:
        await asyncio.sleep(2.0)
    return Hurt(member.name, name)


@asynccontextmanager
async def armed(stage: Stage, failpoint: str, *, worker: Member) -> AsyncIterator[Member]:
    """The worker, or for an aggregator's failpoint the one that leads while inside. It is killed once, to begin with."""
    if failpoint.startswith("worker."):
        worker.arm(failpoint)
        yield worker
        return
    leader, standby = stage.leader, stage.standby
    standby.arm(failpoint)
    leader.hold_down()
    leader.kill()
    try:
        yield standby
    finally:
        leader.let_up()


async def memory_alarm(stage: Stage, dice: random.Random) -> Hurt:
    await stage.node.control("set_vm_memory_high_watermark", "absolute", "1MB")
    await asyncio.sleep(dice.uniform(0.5, 5))
    await stage.node.control("set_vm_memory_high_watermark", "absolute", "1GB")
    return Hurt("everybody")


async def disk_alarm(stage: Stage, dice: random.Random) -> Hurt:
    await stage.node.control("set_disk_free_limit", "900000GB")
    await asyncio.sleep(dice.uniform(0.5, 5))
    await stage.node.control("set_disk_free_limit", "100MB")
    return Hurt("everybody")


async def full_ledger_disk(stage: Stage, dice: random.Random) -> Hurt:
    return await _full(stage.leader, everybody=True, seconds=dice.uniform(1, 3))


async def full_outbox_disk(stage: Stage, dice: random.Random) -> Hurt:
    """When it starts: at work it writes over what it has, and needs no more room than it took in its first seconds."""
    worker = dice.choice(stage.workers)
    async with worker.stopped():
        worker.disk.fill()
    return await _full(worker, everybody=False, seconds=dice.uniform(1, 3))


async def clock_jump(stage: Stage, dice: random.Random) -> Hurt:
    """Of a machine, by up to a week, there or back; both aggregators are on one machine."""
    hours = dice.choice((-1, 1)) * dice.uniform(0.1, _HOURS_OF_WEEK)
    name = dice.choice((AGGREGATORS[0], *PARTIES))
    for member in stage.aggregators if name in AGGREGATORS else [stage.members[name]]:
        member.clock.jump(hours * _SECONDS_OF_HOUR)
    return Hurt(name, f"{hours:+.1f} h")


async def deleted_queue(stage: Stage, dice: random.Random) -> Hurt:
    """Under whoever consumes it, with all that is in it."""
    name = dice.choice((NAMES.updates, NAMES.model_log, NAMES.keyframe_log, NAMES.leader))
    await stage.management.delete_queue(name)
    return Hurt("everybody", name)


async def deleted_inbox(stage: Stage, dice: random.Random) -> Hurt:
    """An operator's mistake, which the operator mends as `broker-fl party add` would."""
    party = dice.choice(PARTIES)
    await stage.management.delete_queue(NAMES.inbox(party))
    await asyncio.sleep(1.0)
    await stage.management.apply(topology_of_party(NAMES.federation, party))
    return Hurt(party)


async def rollback(stage: Stage, dice: random.Random) -> Hurt:
    """By an operator, while the aggregator is at work."""
    version = await asyncio.to_thread(_latest_version, stage)
    to = max(0, version - dice.randint(1, 12))
    if to == version:
        return Hurt("everybody", "nothing to go back from")
    command = (sys.executable, "-P", "-m", "broker_fl", "model", "rollback", "--to", str(to), "--state", str(stage.state))
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the rollback failed: {done.stderr}")
    return Hurt("everybody", f"to version {to}")


FAULTS: dict[str, Fault] = {
    "kill leader": kill_leader,
    "kill standby": kill_standby,
    "kill both aggregators": kill_both_aggregators,
    "kill worker": kill_worker,
    "freeze leader": freeze_leader,
    "freeze worker": freeze_worker,
    "kill broker": kill_broker,
    "restart broker": restart_broker,
    "cut link": cut_link,
    "black hole": black_hole,
    "slow link": slow_link,
    "lost confirms": lost_confirms,
    "lost acknowledgements": lost_acknowledgements,
    "sent twice": sent_twice,
    "half-sent parts": half_sent,
    "failpoint": failpoint,
    "memory alarm": memory_alarm,
    "disk alarm": disk_alarm,
    "full disk of the ledger": full_ledger_disk,
    "full disk of an outbox": full_outbox_disk,
    "clock jump": clock_jump,
    "deleted queue": deleted_queue,
    "deleted inbox": deleted_inbox,
    "rollback": rollback,
}


NEED_MOUNTS = ("full disk of the ledger", "full disk of an outbox")


def _anybody(stage: Stage, dice: random.Random) -> Member:
    """The leader half of the time: it is where things meet."""
    return stage.leader if dice.random() < 0.5 else dice.choice(stage.workers)


async def _killed(member: Member, *, pause_s: float) -> Hurt:
    member.hold_down()
    try:
        member.kill()
        await asyncio.sleep(pause_s)
    finally:
        member.let_up()
    return Hurt(member.name)


async def _frozen(member: Member, *, seconds: float) -> Hurt:
    member.freeze()
    try:
        await asyncio.sleep(seconds)
    finally:
        member.thaw()
    return Hurt(member.name, f"{seconds:g} s")


async def _healed(member: Member, *, after_s: float) -> Hurt:
    try:
        await asyncio.sleep(after_s)
    finally:
        member.link.heal()
    return Hurt(member.name, f"{after_s:.1f} s")


async def _full(member: Member, *, everybody: bool, seconds: float) -> Hurt:
    member.disk.fill()
    try:
        await asyncio.sleep(seconds)
    finally:
        member.disk.make_room()
    return Hurt("everybody" if everybody else member.name)


def _latest_version(stage: Stage) -> int:
    with open_ledger_for_reading(stage.ledger_url) as ledger:
        return ledger.latest_version()
