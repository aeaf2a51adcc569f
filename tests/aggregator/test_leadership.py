import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from enrolled_parties import RegisterInMemory

import aggregator.coordinator
import aggregator.leadership
import aggregator.service
from aggregator.compaction import compact
from aggregator.decisions import Goal
from aggregator.history import roll_back
from aggregator.leadership import candidacy
from aggregator.opening import open_ledger_for_reading
from aggregator.service import Aggregator, Pace
from aggregator.snapshots import Snapshots
from aggregator.verification import verify
from broker_fl.config import MergingSettings
from broker_fl.database import sqlite_url
from broker_fl.errors import FencedError, QueueInUseError
from broker_fl.topology import Exchange, Topology, party, shared
from broker_fl.transports.memory import MemoryBroker

RULES = {"merging": MergingSettings(max_staleness=1000), "snapshot_every_versions": 5}


class Line:
    """A connection to the broker that can be cut, as by a broken cable."""

    def __init__(self, broker):
        self._broker = broker
        self._transports = []

    @asynccontextmanager
    async def connect(self, name):
        async with self._broker.connect(name) as transport:
            self._transports.append(transport)
            yield transport

    def cut(self):
        self._transports[-1].cut()

    def leads(self, ward):
        """Whether it is the one that the broker hands the token to."""
        consumers = ward.broker.queue(ward.names.leader).consumers
        return consumers[:1] != [] and consumers[0] in self._transports[-1]._queues_by_consumer


def _lead(ward):
    with open_ledger_for_reading(sqlite_url(ward.bench.ledger_file)) as ledger:
        return ledger.lead()


def _verify(bench):
    with bench.ledger() as ledger:
        return verify(ledger, bench.snapshots())


def _aggregators(ward):
    return ward.broker.connections().count(f"aggregator:{ward.names.federation}")


async def _stands_by(ward):
    """Until two are connected, one of which is not elected."""
    await ward.until(lambda: _aggregators(ward) == 2 and len(ward.broker.queue(ward.names.leader).consumers) == 2)


async def _receipts_of(ann, updates):
    """By update id, when all of them have one."""
    found = {}
    while len(found) < len(updates):
        receipt = await ann.receipt()
        assert found.setdefault(receipt.update_id, receipt) == receipt
    assert set(found) == {update.update_id for update in updates}
    return found


def _expect_exactly_once(ward, updates):
    assert sorted(entry.update_id for entry in ward.merged()) == sorted(update.update_id for update in updates)
    found = _verify(ward.bench)
    assert (found.merged, found.version) == (len(updates), len(updates))


async def test_first_one_leads_and_the_second_one_stands_by_and_merges_nothing(ward):
    async with ward.party() as ann, ward.running(**RULES) as first:
        frame = (await ann.frame()).frame
        async with ward.running(**RULES) as second:
            await _stands_by(ward)
            updates = [await ann.send(frame, seed=seed) for seed in range(10)]
            await _receipts_of(ann, updates)
            assert (first.coordinator.counts["merged"], second.coordinator.counts.total()) == (10, 0)
            assert _lead(ward).epoch == 1
        assert _lead(ward).epoch == 1
    _expect_exactly_once(ward, updates)


async def test_second_one_takes_over_when_the_first_one_is_stopped(ward):
    async with ward.party() as ann, ward.running(**RULES) as first:
        frame = (await ann.frame()).frame
        async with ward.running(**RULES) as second:
            await _stands_by(ward)
            updates = [await ann.send(frame, seed=seed) for seed in range(30)]
            await ward.until(ward.merged)
            first.service.stop()
            await first.ended()
            updates += [await ann.send(frame, seed=seed) for seed in range(30, 40)]
            await _receipts_of(ann, updates)
            assert _lead(ward).epoch == 2
            assert second.coordinator.counts["merged"] >= 10
            assert first.coordinator.counts["merged"] + second.coordinator.counts["merged"] == 40
    _expect_exactly_once(ward, updates)


async def test_second_one_takes_over_when_the_first_one_is_cut_and_the_first_one_stands_by_when_it_comes_back(ward):
    line = Line(ward.broker)
    async with ward.party() as ann, ward.running(connect=line.connect, **RULES) as first:
        frame = (await ann.frame()).frame
        async with ward.running(**RULES) as second:
            await _stands_by(ward)
            updates = [await ann.send(frame, seed=seed) for seed in range(30)]
            await ward.until(ward.merged)
            line.cut()
            updates += [await ann.send(frame, seed=seed) for seed in range(30, 40)]
            await _receipts_of(ann, updates)
            await ward.until(lambda: _lead(ward).epoch == 2)
            await _stands_by(ward)
            before = first.coordinator.counts["merged"]
            updates += [await ann.send(frame, seed=seed) for seed in range(40, 45)]
            await _receipts_of(ann, updates[40:])
            assert first.coordinator.counts["merged"] == before
            assert not first.task.done()
            second.service.stop()
            await second.ended()
        # The first one leads again, and what it had in memory is made anew.
        updates += [await ann.send(frame, seed=seed) for seed in range(45, 50)]
        await _receipts_of(ann, updates[45:])
        assert first.coordinator.version == 50
        assert _lead(ward).epoch == 3
    _expect_exactly_once(ward, updates)


async def test_leader_goes_from_one_to_the_other_again_and_again_and_each_update_is_merged_once(ward):
    lines = Line(ward.broker), Line(ward.broker)
    async with (
        ward.party() as ann,
        ward.running(connect=lines[0].connect, **RULES),
        ward.running(connect=lines[1].connect, **RULES),
    ):
        frame = (await ann.frame()).frame
        updates = []
        for turn in range(4):
            await _stands_by(ward)
            updates += [await ann.send(frame, seed=100 * turn + seed) for seed in range(10)]
            await ward.until(lambda: len(ward.merged()) > 10 * turn)  # noqa: B023 - awaited in this turn
            leader = next(line for line in lines if line.leads(ward))
            for line in lines if turn % 2 else (leader,):
                line.cut()
            await ward.until(lambda: not leader.leads(ward) or turn % 2)  # noqa: B023
        await _receipts_of(ann, updates)
    _expect_exactly_once(ward, updates)


async def test_leader_whose_ledger_was_taken_opens_its_state_again_and_goes_on(ward):
    async with ward.party() as ann, ward.running(**RULES) as running:
        frame = (await ann.frame()).frame
        updates = [await ann.send(frame, seed=seed) for seed in range(3)]
        await _receipts_of(ann, updates)
        with ward.bench.ledger() as other:
            other.take_lead("somebody else", at=time.time())
            other.let_go()
        updates += [await ann.send(frame, seed=seed) for seed in range(3, 6)]
        await _receipts_of(ann, updates[3:])
        assert _lead(ward).epoch == 3
        assert running.coordinator.version == 6
    _expect_exactly_once(ward, updates)


async def test_leader_with_nothing_to_do_notices_that_its_ledger_was_taken(ward, monkeypatch):
    monkeypatch.setattr(aggregator.coordinator, "_LOOK_EVERY_S", 0.0)
    async with ward.running(**RULES):
        await ward.until(lambda: _lead(ward) is not None)
        with ward.bench.ledger() as other:
            other.take_lead("somebody else", at=time.time())
            await ward.until(lambda: _lead(ward).epoch == 3)


async def test_leader_that_is_fenced_again_and_again_says_that_the_other_is_on_another_broker(ward, monkeypatch):
    monkeypatch.setattr(aggregator.coordinator, "_LOOK_EVERY_S", 0.0)
    with pytest.RaisesGroup(FencedError, flatten_subgroups=True, allow_unwrapped=True) as raised:
        async with ward.running(**RULES) as running:
            await ward.until(lambda: _lead(ward) is not None)
            with ward.bench.ledger() as other:
                while not running.task.done():
                    other.take_lead("somebody else", at=time.time())
                    taken = other.epoch
                    await ward.until(lambda: running.task.done() or _lead(ward).epoch > taken)  # noqa: B023
    (error,) = raised.value.exceptions if isinstance(raised.value, ExceptionGroup) else (raised.value,)
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert "does it work on another broker?" in str(error)


async def test_one_that_would_stand_by_with_another_ledger_ends(ward, new_bench, monkeypatch):
    async with ward.party() as ann, ward.running(**RULES):
        frame = (await ann.frame()).frame
        monkeypatch.setattr(aggregator.service, "_LOOK_WHO_LEADS_S", 0.01)
        elsewhere = type(ward)(new_bench(), ward.broker)
        with pytest.RaisesGroup(QueueInUseError, flatten_subgroups=True, allow_unwrapped=True):
            async with elsewhere.running(**RULES) as stranger:
                await stranger.ended()
        await ann.send(frame)
        assert (await ann.receipt()).outcome == "merged"
        assert stranger.coordinator.counts.total() == 0


async def test_one_that_stands_by_is_stopped_cleanly(ward):
    async with ward.party() as ann, ward.running(**RULES):
        frame = (await ann.frame()).frame
        async with ward.running(**RULES) as second:
            await _stands_by(ward)
            second.service.stop()
            await second.ended()
        assert (_lead(ward).epoch, _aggregators(ward)) == (1, 1)
        await ann.send(frame)
        assert (await ann.receipt()).outcome == "merged"


async def test_seconds_of_one_that_stands_by_count_from_when_it_leads(ward):
    async with ward.party() as ann, ward.running(**RULES) as first, ward.running(seconds=0.1, **RULES) as second:
        frame = (await ann.frame()).frame
        await _stands_by(ward)
        await asyncio.sleep(0.3)
        await ann.send(frame)
        assert (await ann.receipt()).outcome == "merged"
        assert not second.task.done()
        first.service.stop()
        await first.ended()
        await second.ended()
        frames = await ann.frames_until(lambda frame: frame.over)
    assert (frames[-1].version, _lead(ward).epoch) == (1, 2)


async def test_one_that_was_standing_by_when_the_federation_ended_ends_too(ward):
    rules = {**RULES, "goal": Goal(versions=5)}
    async with ward.party() as ann, ward.running(**rules) as first, ward.running(**rules) as second:
        frame = (await ann.frame()).frame
        await _stands_by(ward)
        updates = [await ann.send(frame, seed=seed) for seed in range(5)]
        await _receipts_of(ann, updates)
        await first.ended()
        await second.ended()
        assert (await ann.frames_until(lambda frame: frame.over))[-1].version == 5
    assert _lead(ward).let_go
    _expect_exactly_once(ward, updates)


class Slow(Snapshots):
    """A large model's: time for a leader to notice that its lead was taken."""

    def write(self, *arguments, **facts):
        time.sleep(0.5)
        return super().write(*arguments, **facts)


async def test_version_is_rolled_back_while_updates_come_in_and_the_aggregator_goes_on_from_it(ward):
    bench = ward.bench

    def back():
        with bench.ledger() as ledger:
            slow = Slow(str(bench.folder / "snapshots"), bench.manifest)
            return roll_back(ledger, slow, to=3, holder="an operator", at=time.time())

    async with ward.party() as ann, ward.party("bob") as bob, ward.running(**RULES) as running:
        frame = (await ann.frame()).frame
        updates = [await ann.send(frame, seed=seed) for seed in range(6)]
        await _receipts_of(ann, updates)
        going_back = asyncio.create_task(asyncio.to_thread(back))
        later = []
        while not going_back.done():
            later.append(await ann.send(frame, seed=100 + len(later)))
            await asyncio.sleep(0.01)
        done = await going_back
        receipts = await _receipts_of(ann, later)
        assert {receipt.outcome for receipt in receipts.values()} == {"merged"}
        frames = await bob.frames_until(lambda frame: frame.version >= done.version)
        assert (frames[-1].base, frames[-1].version) == (None, done.version)
        assert not running.task.done()
    assert _verify(bench).version == 7 + len(later)


async def test_rollback_of_an_aggregator_with_nothing_to_do_is_broadcast_soon(ward, monkeypatch):
    monkeypatch.setattr(aggregator.coordinator, "_LOOK_EVERY_S", 0.0)
    async with ward.party() as ann, ward.running(**RULES):
        frame = (await ann.frame()).frame
        await _receipts_of(ann, [await ann.send(frame, seed=seed) for seed in range(4)])
        await asyncio.sleep(0.1)
        with ward.bench.ledger() as ledger:
            roll_back(ledger, ward.bench.snapshots(), to=2, holder="an operator", at=time.time())
        async with asyncio.timeout(5):
            frames = await ann.frames_until(lambda frame: frame.version == 5)
        assert frames[-1].base is None


async def test_compaction_beside_an_aggregator_at_work_loses_nothing(ward):
    def small():
        with ward.bench.ledger() as ledger:
            return compact(ledger, ward.bench.snapshots(), keep=5)

    line = Line(ward.broker)
    async with ward.party() as ann, ward.running(connect=line.connect, **{**RULES, "snapshot_every_versions": 1}):
        frame = (await ann.frame()).frame
        updates = []
        for turn in range(4):
            updates += [await ann.send(frame, seed=10 * turn + seed) for seed in range(10)]
            await _receipts_of(ann, updates[-10:])
            await asyncio.to_thread(small)
            line.cut()
    assert _verify(ward.bench).replayed_from > 0
    _expect_exactly_once(ward, updates)


@asynccontextmanager
async def _at_work(bench, broker, *, register=None):
    """As `Ward.running`, with a broker of its own."""
    with bench.coordinator(clock=time.time, **RULES) as coordinator:
        service = Aggregator(
            broker.connect,
            coordinator,
            topology=shared(bench.names.federation),
            limits=bench.limits(),
            pace=Pace(prefetch=64, group_updates=64, group_s=0.001, part_bytes=1024, max_message_bytes=1 << 20, tick_s=0.01),
            clock=time.time,
            register=register,
        )
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(service.run(lambda: coordinator.open(bench.initial)))
            try:
                yield
            finally:
                service.stop()


def _is_bound(broker, names, name):
    return any((binding.exchange, binding.queue) == (names.up(name), names.updates) for binding in broker._bindings)


async def test_updates_queue_that_was_deleted_is_declared_and_the_known_parties_are_bound_again(ward):
    async with ward.party() as ann, ward.running(**RULES):
        frame = (await ann.frame()).frame
        await ann.send(frame)
        await ann.receipt()
        ward.broker.delete_queue(ward.names.updates)
        assert not _is_bound(ward.broker, ward.names, "ann")
        await ward.until(lambda: _is_bound(ward.broker, ward.names, "ann"))
        await ann.send(frame, seed=1)
        assert (await ann.receipt()).outcome == "merged"
        # Nobody has told of bob.
        assert not _is_bound(ward.broker, ward.names, "bob")


async def test_parties_that_are_in_the_register_are_bound_too(ward):
    ward.broker.delete_queue(ward.names.updates)
    register = RegisterInMemory("bob", "cem")
    async with _at_work(ward.bench, ward.broker, register=register), ward.party("bob") as bob:
        await ward.until(lambda: _is_bound(ward.broker, ward.names, "cem"))
        await bob.send((await bob.frame()).frame)
        assert (await bob.receipt()).outcome == "merged"


async def test_party_whose_exchange_is_gone_is_left_out_and_a_register_that_is_away_stops_nothing(ward):
    register = RegisterInMemory("ann")
    register.is_away = True
    async with ward.party() as ann, ward.party("cem") as cem, ward.running(**RULES):
        frame = (await ann.frame()).frame
        for sender in (ann, cem):
            await sender.send(frame)
            await sender.receipt()
    other = MemoryBroker()
    federation, names = ward.names.federation, ward.names
    ann_s = party(federation, "ann")
    other.declare(replace(shared(federation), exchanges=(*shared(federation).exchanges, *ann_s.exchanges)))
    other.declare(Topology(queues=ann_s.queues, bindings=tuple(b for b in ann_s.bindings if b.exchange == names.receipts)))
    other.users["ann"] = ward.broker.users["ann"]
    other.delete_queue(names.updates)
    again = type(ward)(ward.bench, other)
    async with _at_work(ward.bench, other, register=register):
        await ward.until(lambda: other.has_queue(names.model_log) and _is_bound(other, names, "ann"))
        async with again.party() as ann:
            await ann.send(frame, seed=1)
            assert (await ann.receipt()).outcome == "merged"
        assert not _is_bound(other, names, "cem")
    assert Exchange(names.up("cem"), "fanout") not in other._exchanges.values()


def _tokens(ward):
    """Ready, and handed to somebody."""
    queue = ward.broker.queue(ward.names.leader)
    return len(queue.ready), [len(consumer.unsettled) for consumer in queue.consumers]


async def test_leader_takes_in_the_tokens_that_others_bring_so_that_the_queue_never_grows(ward):
    async with ward.connect("leader") as transport, candidacy(transport, ward.names) as leader:
        await leader.elected()
        keeping = asyncio.create_task(leader.keep())
        await ward.until(lambda: _tokens(ward) == (0, [1]))
        for _ in range(50):
            async with ward.connect("another") as other, candidacy(other, ward.names) as candidate:
                election = asyncio.create_task(candidate.elected())
                await asyncio.sleep(0)
                assert not election.done()
                election.cancel()
        await ward.until(lambda: _tokens(ward) == (0, [1]))
        keeping.cancel()


async def test_leader_renews_its_token_before_the_broker_takes_it_away(ward, monkeypatch):
    monkeypatch.setattr(aggregator.leadership, "_RENEW_S", 0.005)
    async with ward.connect("leader") as transport, candidacy(transport, ward.names) as leader:
        await leader.elected()
        keeping = asyncio.create_task(leader.keep())
        (consumer,) = ward.broker.queue(ward.names.leader).consumers
        await ward.until(lambda: len(consumer.unsettled) == 1 and next(iter(consumer.unsettled)) > 10)
        assert _tokens(ward)[0] == 0
        keeping.cancel()


@pytest.mark.parametrize("keeps", [False, True])
async def test_next_candidate_is_elected_as_soon_as_the_leader_s_connection_ends(ward, keeps):
    async with ward.connect("second") as second_s, ward.connect("first") as first_s, candidacy(first_s, ward.names) as first:
        await first.elected()
        keeping = asyncio.create_task(first.keep()) if keeps else None
        async with candidacy(second_s, ward.names) as second:
            election = asyncio.create_task(second.elected())
            await asyncio.sleep(0.01)
            assert not election.done()
            if keeping is not None:
                keeping.cancel()
            first_s.cut()
            await asyncio.wait_for(election, 5)


async def test_candidate_of_a_queue_that_was_deleted_brings_a_new_token(ward):
    for _ in range(2):
        async with ward.connect("one") as transport, candidacy(transport, ward.names) as candidate:
            await asyncio.wait_for(candidate.elected(), 5)
        ward.broker.delete_queue(ward.names.leader)


@pytest.mark.parametrize("log_name", ["model_log", "keyframe_log"])
async def test_log_that_was_deleted_under_an_aggregator_with_nothing_to_do_is_made_again(ward, monkeypatch, log_name):
    monkeypatch.setattr(aggregator.service, "_LOOK_FOR_LOGS_S", 0.05)
    name = getattr(ward.names, log_name)
    async with ward.running():
        await ward.until(lambda: ward.broker.has_queue(name) and ward.bench.frames())
        ward.broker.delete_queue(name)
        await ward.until(lambda: ward.broker.has_queue(name))
        await ward.until(lambda: ward.broker.queue(name).log)
