import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from structlog.testing import capture_logs

from aggregator import service
from aggregator.decisions import Goal
from broker_fl.config import MergingSettings
from broker_fl.errors import AccessRefusedError, BrokerUnavailableError, QueueInUseError, StorageFullError
from broker_fl.parameters import digest
from broker_fl.topology import shared
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Message
from schemas import wire
from schemas.event import Event
from schemas.update import ModelUpdate


class KilledError(Exception):
    """Stands for the end of the process: nothing in the aggregator knows it, so nothing is tidied up for it."""


class Watched:
    """A transport that goes through `before(what, argument)` before it acknowledges updates ("ack") or publishes (the exchange).

    Tokens of who leads are acknowledged too, and no update is.
    """

    def __init__(self, transport, before):
        self._transport = transport
        self._before = before

    def __getattr__(self, name):
        return getattr(self._transport, name)

    async def publish(self, message):
        await self._before(message.exchange, message)
        await self._transport.publish(message)

    @asynccontextmanager
    async def consume(self, queue, *, prefetch, name, exclusive=False):
        async with self._transport.consume(queue, prefetch=prefetch, name=name, exclusive=exclusive) as subscription:
            yield WatchedSubscription(subscription, self._before) if queue.endswith(".updates") else subscription


class WatchedSubscription:
    def __init__(self, subscription, before):
        self._subscription = subscription
        self._before = before

    def __getattr__(self, name):
        return getattr(self._subscription, name)

    async def acknowledge(self, tag, *, multiple=False):
        await self._before("ack", tag)
        await self._subscription.acknowledge(tag, multiple=multiple)


def watched(ward, before):
    @asynccontextmanager
    async def connect(name):
        async with ward.broker.connect(name) as transport:
            yield Watched(transport, before)

    return connect


def killed_before(ward, what):
    async def before(where, _argument):
        if where == what:
            raise KilledError(what)

    return watched(ward, before)


@asynccontextmanager
async def expecting_kill():
    with pytest.RaisesGroup(KilledError, flatten_subgroups=True, allow_unwrapped=True):
        yield


# Merging


async def test_published_update_is_merged_and_its_party_told(ward):
    async with ward.running() as running, ward.party() as ann:
        base = (await ann.frame()).frame
        update = await ann.send(base, delta=1.0)
        receipt = await ann.receipt()
        assert (receipt.update_id, receipt.outcome, receipt.version) == (update.update_id, "merged", 1)
        following = await ann.frame()
        assert following.frame.version == 1
        assert np.array_equal(following.model, ward.bench.initial + np.float32(0.3))
    assert running.coordinator.version == 1
    assert ward.queued() == 0


async def test_message_is_acknowledged_after_the_commit_and_the_receipt(ward):
    steps = []

    async def before(what, argument):
        if what == "ack":
            # Another connection sees what is committed, and that only.
            steps.append(("ack", len(ward.merged()), ward.broker.depth(ward.names.inbox("ann"))))

    async with ward.running(connect=watched(ward, before)):
        async with ward.party() as ann:
            base = (await ann.frame()).frame
        async with ward.events("updates.decided") as onlooker, ward.broker.connect("ann", user="ann") as transport:
            update = ward.bench.update(base=base)
            await transport.publish(ward.bench.message(update))
            event = await onlooker.next("updates.decided")
    assert steps == [("ack", 1, 1)]
    assert [facts.outcome for facts in event.updates] == ["merged"]


@pytest.mark.parametrize("moment", ["receipt", "ack"])
async def test_aggregator_killed_between_commit_and_acknowledgement_merges_once(ward, moment):
    what = {"receipt": ward.names.receipts, "ack": "ack"}[moment]
    async with ward.party() as ann:
        async with expecting_kill(), ward.running(connect=killed_before(ward, what)) as running:
            base = (await ann.frame()).frame
            update = await ann.send(base)
            await running.ended()
        assert len(ward.merged()) == 1
        assert ward.queued() == 1
        async with ward.running() as running:
            receipts = await ann.receipts(1 if moment == "receipt" else 2)
            assert {(receipt.update_id, receipt.outcome, receipt.version) for receipt in receipts} == {
                (update.update_id, "merged", 1)
            }
            assert running.coordinator.version == 1
    assert len(ward.merged()) == 1
    assert ward.queued() == 0


async def test_aggregator_killed_before_its_commit_merges_after_the_restart(ward):
    """The clock is asked for the time within the transaction."""
    base, armed = None, threading.Event()

    def clock():
        if armed.is_set() and threading.current_thread().name.startswith("ledger"):
            raise KilledError("in the transaction")
        return 1_000_000.0

    async with ward.party() as ann:
        async with (
            expecting_kill(),
            ward.events() as onlooker,
            ward.running(clock=clock, pace={"tick_s": 60.0}) as running,
        ):
            base = (await ann.frame()).frame
            await onlooker.next("frame.published")
            armed.set()
            await ann.send(base)
            await running.ended()
        assert ward.merged() == []
        async with ward.running() as running:
            assert (await ann.receipt()).outcome == "merged"
    assert len(ward.merged()) == 1


async def test_update_that_is_sent_again_is_merged_once_and_answered_each_time(ward):
    async with ward.running() as running, ward.party() as ann:
        update = await ann.send((await ann.frame()).frame)
        first = await ann.receipt()
        for _ in range(3):
            await ann.send_again(update)
        assert await ann.receipts(3) == [first] * 3
        assert running.coordinator.version == 1


async def test_parties_that_send_at_once_are_all_merged(ward):
    async with ward.running(pace={"prefetch": 7, "group_updates": 5}), ward.party() as ann, ward.party("bob") as bob:
        base = (await ann.frame()).frame
        sent = [[await one.send(base, seed=seed) for seed in range(15)] for one in (ann, bob)]
        receipts = [await ann.receipts(15), await bob.receipts(15)]
    assert {receipt.outcome for both in receipts for receipt in both} == {"merged"}
    assert sorted(receipt.version for both in receipts for receipt in both) == list(range(1, 31))
    for updates, found in zip(sent, receipts, strict=True):
        assert {update.update_id for update in updates} == {receipt.update_id for receipt in found}
    assert ward.queued() == 0


async def test_receipt_of_a_party_that_was_removed_is_left_out(ward):
    async with ward.running() as running, ward.party() as ann:
        base = (await ann.frame()).frame
        async with ward.broker.connect("bob", user="bob") as bob:
            ward.broker.delete_queue(ward.names.inbox("bob"))
            await bob.publish(ward.bench.message(ward.bench.update("bob", base=base)))
        await ann.send(base)
        assert (await ann.receipt()).outcome == "merged"
        assert running.coordinator.version == 2


# Refusing


async def test_refused_update_reaches_quarantine_with_its_reason_in_the_headers(ward):
    async with ward.running(), ward.party() as ann, ward.quarantine() as quarantine:
        base = (await ann.frame()).frame
        update = await ann.send(base, base_digest="0" * 64)
        delivery = await quarantine.receive()
        receipt = await ann.receipt()
    assert delivery.headers["x-fl-reason"] == receipt.reason == "base"
    assert delivery.headers["x-fl-detail"] == receipt.detail
    assert delivery.headers["x-fl-exchange"] == ward.names.up("ann")
    assert delivery.headers["x-fl-user"] == "ann"
    assert delivery.message_id == update.update_id
    assert wire.decode(ModelUpdate, delivery.body) == update
    assert ward.merged() == []


async def test_refused_update_reaches_quarantine_though_the_aggregator_was_killed_after_the_commit(ward):
    async with ward.party() as ann:
        async with expecting_kill(), ward.running(connect=killed_before(ward, ward.names.quarantine)) as running:
            await ann.send((await ann.frame()).frame, base_digest="0" * 64)
            await running.ended()
        assert [entry.reason for entry in ward.bench.entries()[1:]] == ["base"]
        async with ward.running(), ward.quarantine() as quarantine:
            delivery = await quarantine.receive()
            assert (await ann.receipt()).reason == "base"
    assert delivery.headers["x-fl-reason"] == "base"


async def test_refused_update_that_its_party_sends_again_is_not_quarantined_again(ward):
    async with ward.running(), ward.party() as ann:
        update = await ann.send((await ann.frame()).frame, base_digest="0" * 64)
        await ann.receipt()
        await ann.send_again(update)
        await ann.receipt()
    assert ward.broker.depth(ward.names.quarantine) == 1


async def test_message_that_is_no_update_is_quarantined_and_stops_nobody(ward):
    async with ward.running(), ward.party() as ann, ward.quarantine() as quarantine:
        base = (await ann.frame()).frame
        await ann.transport.publish(Message(ward.names.up("ann"), b"\x00not an update", message_id="7" * 32))
        await ann.transport.publish(Message(ward.names.up("ann"), b"", message_id="no id"))
        refused = [await quarantine.receive() for _ in range(2)]
        await ann.send(base)
        outcomes = [receipt.outcome for receipt in await ann.receipts(2)]
    assert [delivery.headers["x-fl-reason"] for delivery in refused] == ["malformed", "malformed"]
    assert outcomes == ["refused", "merged"]


async def test_update_that_another_user_puts_through_a_partys_exchange_is_refused_for_its_identity(ward):
    async with ward.running(), ward.party() as ann, ward.quarantine() as quarantine:
        base = (await ann.frame()).frame
        async with ward.broker.connect("forger", user="admin") as forger:
            await forger.publish(ward.bench.message(ward.bench.update("ann", base=base)))
        delivery = await quarantine.receive()
        assert delivery.headers["x-fl-reason"] == "identity"
        assert "'admin'" in delivery.headers["x-fl-detail"]
        await ann.send(base)
        assert (await ann.receipt()).outcome == "merged"
        assert not ann.has_more_receipts()
    assert [entry.party for entry in ward.bench.entries()[1:]] == ["ann"]


async def test_update_in_the_name_of_another_party_is_refused_for_its_identity(ward):
    async with ward.running(), ward.party() as ann, ward.party("bob") as bob:
        base = (await ann.frame()).frame
        await ann.transport.publish(ward.bench.message(ward.bench.update("bob", base=base), party="ann"))
        receipt = await ann.receipt()
        assert (receipt.outcome, receipt.reason) == ("refused", "identity")
        assert not bob.has_more_receipts()


async def test_party_may_not_write_through_another_partys_exchange(ward):
    async with ward.party() as ann:
        for exchange in (ward.names.up("bob"), ward.names.model, ward.names.receipts, ward.names.events):
            with pytest.raises(AccessRefusedError):
                await ann.transport.publish(Message(exchange, b"forged"))


# Frames


async def test_frames_are_paced_by_versions(ward):
    async with ward.running(every_versions=3), ward.party() as ann:
        base = (await ann.frame()).frame
        for seed in range(6):
            await ann.send(base, seed=seed)
            await ann.receipt()
        frames = await ann.frames_until(lambda frame: frame.version == 6)
    assert [frame.version for frame in frames] == [3, 6]
    assert [frame.number for frame in frames] == [2, 3]


async def test_frame_that_was_committed_and_not_published_is_published_after_the_restart(ward):
    async def before(what, argument):
        if what == ward.names.model and argument.headers["x-fl-version"] == 1:
            raise KilledError

    async with ward.party() as ann:
        async with expecting_kill(), ward.running(connect=watched(ward, before)) as running:
            await ann.send((await ann.frame()).frame)
            await running.ended()
        row = ward.bench.frames()[-1]
        assert (row.version, row.published_at) == (1, None)
        async with ward.running() as running:
            received = await ann.frame()
        assert (received.frame.version, received.frame.number) == (1, 2)
        assert digest(received.model) == running.coordinator.model_digest()
    assert ward.bench.frames()[-1].published_at is not None


async def test_restart_broadcasts_the_newest_frame_again_under_its_number(ward):
    async with ward.party() as ann:
        for _ in range(2):
            async with ward.running():
                received = await ann.frame()
                assert (received.frame.number, received.frame.version) == (1, 0)


async def test_log_that_was_lost_has_the_newest_frame_after_a_restart(ward):
    async with ward.running(), ward.party() as ann:
        await ann.send((await ann.frame()).frame)
        await ann.receipt()
    ward.broker.delete_queue(ward.names.model_log)
    async with ward.running(), ward.events("frame.published") as onlooker:
        await onlooker.next("frame.published")
        async with ward.party() as ann:
            assert (await ann.frame()).frame.version == 1


async def test_model_over_the_brokers_limit_is_broadcast_in_parts(ward):
    ward.broker.max_message_bytes = 2048
    async with ward.running(pace={"max_message_bytes": 2048}), ward.party() as ann:
        received = await ann.frame()
        assert np.array_equal(received.model, ward.bench.initial)
        # Whole, by 512 values in 8 KiB.
        await ann.send(received.frame, codec="topk:0.01+int4")
        received = await ann.frame()
    assert received.frame.base == 1
    assert len(received.frame.payload) > 8000


def broadcasts(ward, sent):
    """A connection that notes what goes to the two logs: kind, number, base."""

    async def before(what, argument):
        if what in (ward.names.model, ward.names.keyframes):
            headers = argument.headers
            assert (what == ward.names.keyframes) == (headers["x-fl-kind"] == "keyframe")
            sent.append((headers["x-fl-kind"], headers["x-fl-number"], headers.get("x-fl-base")))

    return watched(ward, before)


async def _lived(ward, *, updates, connect=None, **rules):
    """An aggregator's session in which each of ann's updates is followed by a frame."""
    async with ward.events("frame.published") as onlooker, ward.running(connect=connect, **rules), ward.party() as ann:
        await onlooker.next("frame.published")
        newest = ward.bench.frames()[-1].number
        base = (await ann.frames_until(lambda frame: frame.number == newest))[-1]
        for seed in range(updates):
            await ann.send(base, seed=seed)
            while base.version == (received := (await ann.frame()).frame).version:
                pass
            base = received
    return base


async def test_keyframe_goes_out_just_before_its_frame(ward):
    sent = []
    await _lived(ward, updates=4, connect=broadcasts(ward, sent), keyframe_every_frames=2, keyframe="int8", down="int4")
    assert sent == [
        ("keyframe", 1, None),
        ("announcement", 1, None),
        ("delta", 2, 1),
        ("keyframe", 3, None),
        ("delta", 3, 2),
        ("delta", 4, 3),
        ("keyframe", 5, None),
        ("delta", 5, 4),
    ]


async def test_each_session_begins_with_a_keyframe_of_the_newest_frame_and_its_announcement(ward):
    first, second, third = [], [], []
    rules = {"down": "int4", "keyframe": "int8"}
    await _lived(ward, updates=2, connect=broadcasts(ward, first), **rules)
    await _lived(ward, updates=1, connect=broadcasts(ward, second), **rules)
    await _lived(ward, updates=0, connect=broadcasts(ward, third), **rules)
    assert first == [("keyframe", 1, None), ("announcement", 1, None), ("delta", 2, 1), ("delta", 3, 2)]
    assert second == [("keyframe", 3, None), ("announcement", 3, None), ("delta", 4, 3)]
    assert third == [("keyframe", 4, None), ("announcement", 4, None)]


async def test_frames_that_wait_go_out_in_order_before_the_session_announces(ward):
    async def before(what, argument):
        if what == ward.names.model and argument.headers["x-fl-kind"] == "delta":
            raise KilledError

    sent = []
    with pytest.RaisesGroup(KilledError, flatten_subgroups=True, allow_unwrapped=True):
        await _lived(ward, updates=1, connect=watched(ward, before), down="int4")
    async with ward.party() as ann:
        await ann.frame()
        async with ward.running(connect=broadcasts(ward, sent), down="int4"):
            assert (await ann.frame()).frame.base == 1
            assert (await ann.frame()).frame.base is None
    assert sent == [("delta", 2, 1), ("keyframe", 2, None), ("announcement", 2, None)]


async def test_keyframe_that_waited_with_its_frame_is_not_made_again(ward):
    async def before(what, argument):
        if what == ward.names.model:
            raise KilledError

    sent = []
    async with expecting_kill(), ward.running(connect=watched(ward, before)) as running:
        await running.ended()
    await _lived(ward, updates=0, connect=broadcasts(ward, sent))
    assert sent == [("keyframe", 1, None), ("announcement", 1, None)]


async def test_newcomer_begins_where_both_logs_were_lost(ward):
    rules = {"down": "topk:0.1+int4", "keyframe": "int8"}
    base = await _lived(ward, updates=3, **rules)
    for queue in (ward.names.model_log, ward.names.keyframe_log):
        ward.broker.delete_queue(queue)
    async with ward.running(**rules) as running, ward.events("frame.published") as onlooker:
        await onlooker.next("frame.published")
        async with ward.party("bob") as bob:
            received = await bob.frame()
            assert (received.frame.number, received.frame.digest) == (base.number, base.digest)
            await bob.send(received.frame)
            assert (await bob.receipt()).outcome == "merged"
            assert (await bob.frame()).frame.base == base.number
        assert running.coordinator.version == 4


async def test_log_that_was_deleted_under_the_aggregator_is_made_again_and_a_newcomer_begins(ward):
    rules = {"down": "topk:0.1+int4", "keyframe": "int8"}
    async with ward.running(**rules) as running, ward.events("frame.published") as onlooker:
        async with ward.party() as ann:
            base = (await ann.frame()).frame
        for queue in (ward.names.model_log, ward.names.keyframe_log):
            ward.broker.delete_queue(queue)
        async with ward.broker.connect("ann", user="ann") as transport:
            await transport.publish(ward.bench.message(ward.bench.update(base=base)))
        while (await onlooker.next("frame.published")).facts["number"] < 2:
            pass
        async with ward.party("bob") as bob:
            assert (await bob.frame()).frame.version == 1
        assert running.coordinator.version == 1


async def test_headers_say_what_a_message_holds(ward):
    async with ward.broker.connect("operator") as transport, ward.running(down="topk:0.1+int8") as running, ward.party() as ann:
        base = (await ann.frame()).frame
        async with (
            transport.follow(ward.names.model_log, start="first", name="console") as log,
            transport.follow(ward.names.keyframe_log, start="first", name="console-2") as keyframes,
            transport.consume(ward.names.inbox("bob"), prefetch=1, name="console-3") as inbox,
            ward.broker.connect("bob", user="bob") as bob,
        ):
            update = ward.bench.update("bob", base=base, codec="int8")
            await bob.publish(ward.bench.message(update))
            announcement, delta, keyframe, receipt = (
                await log.receive(),
                await log.receive(),
                await keyframes.receive(),
                await inbox.receive(),
            )
        assert running.coordinator.version == 1
    first, second = ward.bench.frames()
    assert announcement.headers == {
        "x-fl-kind": "announcement",
        "x-fl-ledger": running.coordinator.ledger_id,
        "x-fl-version": 0,
        "x-fl-number": 1,
        "x-fl-digest": first.digest,
        "x-fl-over": False,
        "x-fl-codec": "float32",
        "x-fl-bytes": len(announcement.body),
    }
    assert delta.headers == {
        "x-fl-ledger": running.coordinator.ledger_id,
        "x-fl-kind": "delta",
        "x-fl-version": 1,
        "x-fl-number": 2,
        "x-fl-base": 1,
        "x-fl-digest": second.digest,
        "x-fl-over": False,
        "x-fl-codec": "topk:0.1+int8",
        "x-fl-bytes": len(delta.body),
    }
    # It came in parts, which say its size for all of them.
    assert keyframe.headers["x-fl-kind"] == "keyframe"
    assert (keyframe.headers["x-fl-codec"], keyframe.headers["x-fl-bytes"]) == ("float32", first.keyframe_size)
    assert receipt.headers == {
        "x-fl-outcome": "merged",
        "x-fl-version": 1,
        "x-fl-staleness": 0,
        "x-fl-codec": "int8",
        "x-fl-bytes": len(wire.encode(update)),
    }


# Parts


async def test_update_in_parts_is_merged(ward):
    ward.broker.max_message_bytes = 4096
    async with ward.running(pace={"max_message_bytes": 4096}), ward.party() as ann:
        await ann.send((await ann.frame()).frame, parts_of=1024)
        assert (await ann.receipt()).outcome == "merged"
        assert not ann.has_more_receipts()
    assert ward.queued() == 0


async def test_more_half_sent_updates_than_the_prefetch_window_holds_stop_nobody(ward):
    async with ward.running(pace={"prefetch": 4}), ward.party() as ann, ward.party("bob") as bob:
        base = (await ann.frame()).frame
        for one in (ann, bob):
            for seed in range(4):
                message = ward.bench.message(ward.bench.update(one.name, base=base, seed=seed))
                await _send_all_but_the_last_part(one, message)
        await bob.send(base)
        assert (await bob.receipt()).outcome == "merged"


async def test_parts_that_came_before_a_restart_are_not_needed_again(ward):
    async with ward.party() as ann:
        async with ward.running() as running:
            base = (await ann.frame()).frame
            message = ward.bench.message(ward.bench.update(base=base))
            last = await _send_all_but_the_last_part(ann, message)
            await ann.send(base, seed=2)
            await ann.receipt()
            assert running.coordinator.version == 1
        assert ward.queued() == 0
        async with ward.running():
            await ann.transport.publish(last)
            assert (await ann.receipt()).outcome == "merged"


async def _send_all_but_the_last_part(one, message):
    *parts, last = split(message, part_bytes=2048, limit_bytes=2048)
    for part in parts:
        await one.transport.publish(part)
    return last


# The end


async def test_federation_ends_at_its_last_version_with_a_frame_that_says_so(ward):
    async with ward.running(goal=Goal(versions=3)) as running, ward.party() as ann:
        base = (await ann.frame()).frame
        for seed in range(5):
            await ann.send(base, seed=seed)
        frames = await ann.frames_until(lambda frame: frame.over)
        await running.ended()
        assert [receipt.version for receipt in await ann.receipts(3)] == [1, 2, 3]
        assert not ann.has_more_receipts()
    assert (frames[-1].version, frames[-1].over) == (3, True)
    assert ward.queued() == 2
    assert len(ward.merged()) == 3


async def test_all_that_was_decided_is_answered_before_the_end(ward):
    """The second group is decided, and reaches the goal, while the first one is still being answered."""
    gate = asyncio.Event()
    waiting = asyncio.Event()

    async def before(what, _argument):
        if what == ward.names.receipts and not gate.is_set():
            waiting.set()
            await gate.wait()

    async with (
        ward.running(connect=watched(ward, before), goal=Goal(versions=3), pace={"group_updates": 1}) as running,
        ward.party() as ann,
    ):
        base = (await ann.frame()).frame
        for seed in range(3):
            await ann.send(base, seed=seed)
        await waiting.wait()
        await ward.until(lambda: len(ward.merged()) == 3)
        gate.set()
        await running.ended()
        assert [receipt.version for receipt in await ann.receipts(3)] == [1, 2, 3]
    assert ward.queued() == 0


async def test_receipts_come_before_the_last_frame(ward):
    """A worker ends with the last frame: by then it should know what became of what it sent."""
    order = []

    async def before(what, argument):
        if what == ward.names.receipts:
            order.append("receipt")
        elif what == ward.names.model and argument.headers["x-fl-over"]:
            order.append("over")

    async with (
        ward.running(connect=watched(ward, before), goal=Goal(versions=9), pace={"group_updates": 2}) as running,
        ward.party() as ann,
    ):
        base = (await ann.frame()).frame
        for seed in range(9):
            await ann.send(base, seed=seed)
        await running.ended()
    assert order == ["receipt"] * 9 + ["over"]


async def test_accuracy_that_is_reached_ends_the_federation(ward):
    async with ward.running(goal=Goal(target_accuracy=0.9)) as running, ward.party() as ann:
        base = (await ann.frame()).frame
        async with ward.broker.connect("evaluator") as evaluator:
            await evaluator.publish(Message(ward.names.events, b"no event", routing_key="model.evaluated"))
            await evaluator.publish(_evaluated(ward, base, accuracy=0.89))
            await ann.send(base)
            await ann.receipt()
            assert not running.task.done()
            await evaluator.publish(_evaluated(ward, base, accuracy=0.9))
        frames = await ann.frames_until(lambda frame: frame.over)
        await running.ended()
    assert frames[-1].version == 1


def _evaluated(ward, frame, *, accuracy):
    event = Event(
        kind="model.evaluated", federation=frame.federation, at=1.0, version=frame.version, facts={"accuracy": accuracy}
    )
    return Message(ward.names.events, wire.encode(event), routing_key=event.kind, mandatory=False)


async def test_time_that_is_over_ends_the_federation(ward):
    async with ward.running(seconds=1.0) as running, ward.party() as ann:
        assert [frame.over for frame in await ann.frames_until(lambda frame: frame.over)][-1]
        await running.ended()


async def test_goal_that_a_buffers_timeout_reaches_ends_the_federation(ward):
    """No update comes any more that could make it look at its goal."""
    merging = MergingSettings(strategy="fedbuff", buffer_size=5, buffer_timeout_s=0.2)
    async with ward.running(merging=merging, goal=Goal(versions=1)) as running, ward.party() as ann:
        await ann.send((await ann.frame()).frame)
        assert (await ann.receipt()).outcome == "buffered"
        await running.ended()
        frames = await ann.frames_until(lambda frame: frame.over)
    assert frames[-1].version == 1


async def test_federation_that_is_over_broadcasts_its_last_frame_again_and_ends(ward):
    async with ward.party() as ann:
        async with ward.running(goal=Goal(versions=1)) as running:
            await ann.send((await ann.frame()).frame)
            await running.ended()
            await ann.frames_until(lambda frame: frame.over)
        async with ward.running(goal=Goal(versions=1)) as running:
            await running.ended()
            assert (await ann.frame()).frame.over


async def test_federation_whose_goal_moved_goes_on_with_what_waits_in_the_queue(ward):
    async with ward.party() as ann:
        async with ward.running(goal=Goal(versions=1)) as running:
            base = (await ann.frame()).frame
            await ann.send(base)
            await ann.send(base, seed=2)
            await running.ended()
        assert ward.queued() == 1
        async with ward.running(goal=Goal(versions=2)) as running:
            await running.ended()
        assert [receipt.version for receipt in await ann.receipts(2)] == [1, 2]
    assert ward.queued() == 0


async def test_stop_answers_what_was_decided_and_leaves_the_rest_in_the_queue(ward):
    async with ward.running(pace={"group_updates": 1}) as running, ward.party() as ann:
        base = (await ann.frame()).frame
        for seed in range(30):
            await ann.send(base, seed=seed)
        first = await ann.receipt()
        running.service.stop()
        await running.ended()
        merged = ward.merged()
        assert len(merged) + ward.queued() == 30
        assert ward.queued() > 0
        receipts = [first, *await ann.receipts(len(merged) - 1)]
        assert {receipt.update_id for receipt in receipts} == {entry.update_id for entry in merged}
        assert not ann.has_more_receipts()


async def test_stop_takes_a_snapshot_that_the_next_start_begins_with(ward):
    async with ward.running(), ward.party() as ann:
        await ann.send((await ann.frame()).frame)
        await ann.receipt()
    with ward.bench.ledger() as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 1]


# A broker that goes away


async def test_broker_that_is_away_at_the_start_ends_it(ward):
    ward.broker.stop()
    with pytest.RaisesGroup(BrokerUnavailableError, flatten_subgroups=True, allow_unwrapped=True):
        async with ward.running() as running:
            await running.ended()


async def test_broker_that_stops_and_starts_loses_and_doubles_nothing(ward):
    sent, done = [], asyncio.Event()
    async with ward.running(pace={"group_updates": 2}) as running:
        async with ward.party() as ann:
            base = (await ann.frame()).frame

        async def send():
            for number in range(60):
                update = ward.bench.update(base=base, update_id=f"{number:032x}", seed=number)
                await _publish_until_confirmed(ward, ward.bench.message(update))
                sent.append(update.update_id)
            done.set()

        async def disturb():
            for merged in (5, 20):
                await ward.until(lambda: running.coordinator.version >= merged)  # noqa: B023
                ward.broker.stop()
                await asyncio.sleep(0.01)
                ward.broker.start()

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            group.create_task(disturb())
        await ward.until(lambda: running.coordinator.version == base.version + 33)
        async with ward.party() as ann:
            # Past the staleness bound the rest is refused, which is a decision too.
            known = set()
            while len(known) < 60:
                known.add((await ann.receipt()).update_id)
    entries = [entry for entry in ward.bench.entries() if entry.kind == "update"]
    assert sorted(entry.update_id for entry in entries) == sorted(sent) == sorted(known)
    assert ward.queued() == 0


async def _publish_until_confirmed(ward, message):
    while True:
        try:
            async with ward.broker.connect("ann", user="ann") as transport:
                await transport.publish(message)
                return
        except BrokerUnavailableError:
            await asyncio.sleep(0.001)


async def test_federation_that_ends_while_the_broker_is_away_waits_for_it_without_haste(ward):
    attempts = 0

    @asynccontextmanager
    async def connect(name):
        nonlocal attempts
        attempts += 1
        async with ward.broker.connect(name) as transport:
            yield transport

    async with ward.running(connect=connect, seconds=1.0) as running:
        async with ward.party() as ann:
            await ann.frame()
        ward.broker.stop()
        await ward.until(lambda: running.coordinator.is_over)
        assert attempts <= 3
        ward.broker.start()
        await running.ended()
        async with ward.party() as ann:
            await ann.frames_until(lambda frame: frame.over)


async def test_stop_while_the_broker_is_away_ends_at_once(ward):
    async with ward.running() as running, ward.events("frame.published") as onlooker:
        await onlooker.next("frame.published")
        ward.broker.stop()
        running.service.stop()
        await running.ended()


async def test_failed_decision_ends_it_though_the_broker_was_lost_at_the_same_moment(ward):
    """Nobody waits for the decision any more when it fails, and the model in memory is ahead of the ledger from then on."""
    in_decision, go_on = threading.Event(), threading.Event()
    armed = threading.Event()

    def clock():
        if armed.is_set() and threading.current_thread().name.startswith("ledger"):
            in_decision.set()
            assert go_on.wait(10)
        return 1_000_000.0

    def limit_pages(running, pages):
        connection = running.coordinator._ledger._connection
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        connection.rollback()

    with pytest.RaisesGroup(StorageFullError, flatten_subgroups=True, allow_unwrapped=True):
        async with ward.events() as onlooker, ward.running(clock=clock, pace={"tick_s": 60.0, "group_s": 0.5}) as running:
            async with ward.party() as ann:
                await onlooker.next("frame.published")
                base = (await ann.frame()).frame
                limit_pages(running, 1)
                armed.set()
                for seed in range(20):
                    await ann.send(base, seed=seed)
                assert await asyncio.to_thread(in_decision.wait, 10)
            ward.broker.stop()
            await ward.until(lambda: "aggregator:ward" not in ward.broker.connections())
            armed.clear()
            go_on.set()
            # There is space again when the broker is back: nothing but the failure itself can tell.
            await asyncio.wrap_future(running.service._ledger_thread.submit(limit_pages, running, 1 << 30))
            ward.broker.start()
            await running.ended()
    assert ward.merged() == []
    async with ward.running(), ward.party() as ann:
        assert {receipt.outcome for receipt in await ann.receipts(20)} == {"merged"}


async def test_second_aggregator_with_another_ledger_is_refused(ward, new_bench, monkeypatch):
    monkeypatch.setattr(service, "_LOOK_WHO_LEADS_S", 0.05)
    elsewhere = type(ward)(new_bench(), ward.broker)
    async with ward.running() as first, ward.party() as ann:
        base = (await ann.frame()).frame
        with pytest.RaisesGroup(
            pytest.RaisesExc(QueueInUseError, match="another aggregator, with another ledger, is at work on federation 'ward'"),
            flatten_subgroups=True,
            allow_unwrapped=True,
        ):
            async with elsewhere.running() as second:
                await second.ended()
        # It has changed nothing, and the first one goes on.
        assert elsewhere.bench.frames() == []
        await ann.send(base)
        assert (await ann.receipt()).outcome == "merged"
    assert first.coordinator.version == 1


async def test_second_aggregator_with_the_same_ledger_stands_by_and_goes_on_where_the_first_ended(ward, monkeypatch):
    monkeypatch.setattr(service, "_LOOK_WHO_LEADS_S", 0.05)
    async with ward.party() as ann:
        with capture_logs() as logs:
            async with ward.running() as first:
                base = (await ann.frame()).frame
                async with ward.running() as second:
                    await ward.until(lambda: any("standing by: another aggregator leads" in line["event"] for line in logs))
                    await ann.send(base)
                    assert (await ann.receipt()).version == 1
                    first.service.stop()
                    await first.ended()
                    update = await ann.send(base)
                    receipt = await ann.receipt()
                    assert (receipt.update_id, receipt.outcome, receipt.version) == (update.update_id, "merged", 2)
                    await ward.until(lambda: not ward.queued())
        assert (first.coordinator.version, second.coordinator.version) == (1, 2)
    assert [entry.version for entry in ward.merged()] == [1, 2]


async def test_aggregator_that_stands_by_ends_when_it_is_stopped(ward):
    async with ward.running(), ward.party() as ann:
        base = (await ann.frame()).frame
        async with ward.running() as second:
            second.service.stop()
            await second.ended()
        await ann.send(base)
        assert (await ann.receipt()).outcome == "merged"


# Events


async def test_everything_that_happens_is_told(ward):
    async with ward.events() as onlooker, ward.party() as ann:
        async with ward.running() as running:
            started = await onlooker.next("aggregator.started")
            assert started.facts == {"over": False}
            published = await onlooker.next("frame.published")
            (row,) = ward.bench.frames()
            assert published.version == 0
            assert published.facts == {
                "number": 1,
                "kind": "announcement",
                "bytes": row.size,
                "codec": "float32",
                "over": False,
                "keyframe_bytes": row.keyframe_size,
                "keyframe_codec": "float32",
            }
            base = (await ann.frame()).frame
            update = await ann.send(base)
            decided = await onlooker.next("updates.decided")
            (facts,) = decided.updates
            assert (facts.party, facts.outcome, facts.staleness, facts.codec) == ("ann", "merged", 0, "float32")
            assert facts.bytes == len(wire.encode(update))
            await ann.send_again(update)
            assert [facts.outcome for facts in (await onlooker.next("updates.decided")).updates] == ["duplicate"]
            await ann.send(base, base_digest="0" * 64)
            (facts,) = (await onlooker.next("updates.decided")).updates
            assert (facts.outcome, facts.reason) == ("refused", "base")
            running.service.stop()
        stopped = await onlooker.next("aggregator.stopped")
        assert (stopped.version, stopped.facts) == (1, {"over": False})


async def test_federation_needs_nothing_on_the_broker_but_its_parties(ward):
    """The aggregator declares what is shared."""
    names = [queue.name for queue in shared(ward.names.federation).queues]
    async with ward.running(), ward.events("frame.published") as onlooker:
        await onlooker.next("frame.published")
        assert ward.broker.queue(names[0]).spec.kind == "quorum"
