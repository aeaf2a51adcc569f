import asyncio
import sqlite3
import threading
from contextlib import aclosing, asynccontextmanager

import numpy as np
import pytest
from broadcasting import Broadcaster
from structlog.testing import capture_logs

from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.errors import (
    AuthenticationError,
    BrokerUnavailableError,
    ConfigurationError,
    ManifestMismatchError,
    NotFoundError,
    QueueInUseError,
    StorageFullError,
    StorageInUseError,
    UntrustedBrokerError,
)
from broker_fl.parameters import manifest_of
from broker_fl.topology import Names
from broker_fl.transports.following import Follower
from broker_fl.transports.model_log import read_newest
from broker_fl.transports.transport import Message
from schemas import wire
from schemas.update import ModelUpdate
from workers.encoding import Budget
from workers.outbox import outbox_file, read_counters
from workers.participation import is_selected
from workers.service import seed_of

NAMES = Names("ward")
MANIFEST = manifest_of({"hidden.weight": np.zeros((40, 50), np.float32), "hidden.bias": np.zeros(8, np.float32)})
SPARSE = "topk:0.05+int4"


class KilledError(Exception):
    """Stands for the end of the process: nothing in the worker knows it, so nothing is tidied up for it."""


class Watched:
    """A transport that goes through `before(message)` before it publishes."""

    def __init__(self, transport, before):
        self._transport = transport
        self._before = before

    def __getattr__(self, name):
        return getattr(self._transport, name)

    async def publish(self, message):
        await self._before(message)
        await self._transport.publish(message)


def watched(home, before):
    @asynccontextmanager
    async def connect(name):
        async with home.connect(name) as transport:
            yield Watched(transport, before)

    return connect


def raises(*kinds):
    return pytest.RaisesGroup(*kinds, flatten_subgroups=True, allow_unwrapped=True)


def content(update, manifest):
    return decode(update.payload, parse_codec(update.codec), manifest=manifest).dense()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads and files
            await asyncio.sleep(0.001)


def counters(home):
    return read_counters(home.folder, home.party)


def received(home):
    """Frames of the model log."""
    known = counters(home)
    return known.get("frames_received", 0) - known.get("keyframes_received", 0)


def residual(home, manifest):
    with home.outbox() as outbox:
        return outbox.residual(manifest.digest)


# Training


async def test_frame_is_trained_from_and_the_update_says_all_about_it(home, centre, new_trainer):
    train = new_trainer(0.5)
    async with centre() as hub, home.running(train, clock=lambda: 1234.567):
        frame = await hub.broadcast(4)
        delivery = await hub.delivery()
    update = wire.decode(ModelUpdate, delivery.body)
    assert (update.federation, update.party, update.sequence) == ("ward", "ann", 1)
    assert (update.base_version, update.base_digest) == (4, frame.digest)
    assert update.manifest_digest == frame.manifest.digest
    assert (update.num_samples, update.num_steps, update.train_loss) == (12, 4, 0.5)
    assert np.array_equal(content(update, frame.manifest), np.full(frame.manifest.size, 0.5, np.float32))
    assert delivery.exchange == NAMES.up("ann")
    assert (delivery.user_id, delivery.message_id) == ("ann", update.update_id)
    assert delivery.headers == {
        "x-fl-party": "ann",
        "x-fl-sequence": 1,
        "x-fl-base-version": 4,
        "x-fl-codec": "float32",
        "x-fl-bytes": len(delivery.body),
        "x-fl-at": 1_234_567,
    }
    assert np.array_equal(train.bases[0], np.full(frame.manifest.size, 4, np.float32))
    assert train.plans == [frame.plan.training]
    assert train.seeds == [seed_of("ann", 1)]


async def test_party_trains_once_from_each_version(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train):
        for version in (1, 2):
            frame = await hub.broadcast(version)
            update = await hub.update()
            assert (update.base_version, update.sequence) == (version, version)
            await hub.answer(update)
        # A frame that is broadcast again, by its number or by its version, is no reason to train again.
        await hub.broadcast(2, number=2)
        await hub.broadcast(2, number=3)
        await until(lambda: received(home) == 4)
        await hub.broadcast(3, number=4)
        assert (await hub.update()).base_version == 3
        assert not hub.has_more_updates()
    assert len(train.bases) == 3
    assert train.seeds == [seed_of("ann", number) for number in (1, 2, 3)]
    assert frame.version == 2


async def test_restarted_worker_does_not_train_from_the_same_version_again(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub:
        async with home.running(train):
            await hub.broadcast(1)
            await hub.answer(await hub.update())
        async with home.running(train):
            await until(lambda: received(home) == 2)
            await until(lambda: counters(home).get("updates_merged") == 1)
            await hub.broadcast(2)
            assert (await hub.update()).sequence == 2
    assert len(train.bases) == 2


async def test_training_goes_on_with_the_newest_frame_when_it_is_done(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train):
        train.goes_on.clear()
        await hub.broadcast(1)
        assert await asyncio.to_thread(train.began.wait, 10)
        for version in range(2, 7):
            await hub.broadcast(version)
        await until(lambda: received(home) == 6)
        train.goes_on.set()
        assert (await hub.update()).base_version == 1
        assert (await hub.update()).base_version in range(2, 7)
        await hub.broadcast(7)
        updates = [await hub.update()]
        while updates[-1].base_version < 7:
            updates.append(await hub.update())


async def test_late_worker_begins_with_the_newest_frame(home, centre, new_trainer):
    async with centre() as hub:
        for version in (1, 2, 3):
            await hub.broadcast(version)
        async with home.running(new_trainer()):
            assert (await hub.update()).base_version == 3


async def test_another_ledger_starts_the_numbering_again(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train):
        await hub.broadcast(7, number=9)
        await hub.answer(await hub.update())
        await hub.broadcast(7, number=1, ledger="b" * 32)
        update = await hub.update()
    assert (update.base_version, update.sequence) == (7, 2)


async def test_party_that_may_repeat_trains_again_only_when_its_update_is_settled(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train):
        await hub.broadcast(1, repeat=True)
        for number in (1, 2, 3):
            update = await hub.update()
            assert (update.base_version, update.sequence) == (1, number)
            # A frame that comes meanwhile is looked at, and still nothing is trained.
            await hub.broadcast(1, repeat=True)
            await until(lambda: received(home) == number + 1)  # noqa: B023
            assert len(train.bases) == number
            await hub.answer(update, "buffered")
        await hub.update()


async def test_party_that_is_not_selected_waits_for_a_frame_that_selects_it(home, centre, new_trainer):
    chosen = [
        version
        for version in range(1, 40)
        if is_selected(federation="ward", party="ann", version=version, number=version, fraction=0.2)
    ]
    assert 2 < len(chosen) < 20
    assert chosen[0] > 1
    train = new_trainer()
    async with centre() as hub, home.running(train):
        for version in range(1, chosen[2] + 1):
            await hub.broadcast(version, number=version, fraction=0.2)
            await until(lambda: received(home) == version)  # noqa: B023
            if version in chosen:
                update = await hub.update()
                assert update.base_version == version
                await hub.answer(update)
        assert not hub.has_more_updates()
    assert len(train.bases) == 3


async def test_diverged_training_sends_nothing_and_the_next_model_is_waited_for(home, centre, new_trainer):
    # The third is finite, and added to a residual like it would not be any more.
    train = new_trainer(lambda number: [np.nan, np.inf, -3e38, 1.0][number - 1])
    async with centre() as hub, home.running(train):
        for version in (1, 2, 3):
            await hub.broadcast(version)
            await until(lambda: counters(home).get("trainings_diverged") == version)  # noqa: B023
        frame = await hub.broadcast(4)
        update = await hub.update()
        assert (update.base_version, update.sequence) == (4, 1)
        assert np.isfinite(content(update, frame.manifest)).all()
        assert not hub.has_more_updates()
    assert len(train.bases) == 4
    assert counters(home)["trainings"] == 1
    assert not residual(home, frame.manifest).any()


# Exactly once


async def test_update_residual_and_counters_are_stored_before_anything_is_sent(home, centre, new_trainer):
    async def before(_message):
        raise KilledError

    async with centre() as hub:
        with raises(KilledError):
            async with home.running(new_trainer(), connect=watched(home, before)) as running:
                frame = await hub.broadcast(1, up=SPARSE)
                await running.ended()
        assert not hub.has_more_updates()
        assert received(home) == 1
        assert {name: counters(home)[name] for name in ("trainings", "steps")} == {"trainings": 1, "steps": 4}
        assert "updates_sent" not in counters(home)
        assert np.count_nonzero(residual(home, frame.manifest)) == 1900
        # Killed after storing and before sending: the next start sends it, and does not train from that version again.
        train = new_trainer()
        async with home.running(train):
            update = await hub.update()
            assert (update.sequence, update.base_version) == (1, 1)
            await hub.answer(update)
            await until(lambda: counters(home).get("updates_merged") == 1)
        assert train.bases == []
        assert not hub.has_more_updates()


async def test_update_that_cannot_be_stored_is_not_sent_and_leaves_no_trace(home, centre, new_trainer):
    large = manifest_of({"weight": np.zeros(100_000, np.float32)})
    async with centre() as hub:
        with raises(StorageFullError):
            async with home.running(new_trainer(), manifest=large) as running:
                running.outbox._connection.exec_driver_sql("PRAGMA max_page_count = 1")
                running.outbox._connection.rollback()
                await hub.broadcast(1, manifest=large)
                await running.ended()
        assert not hub.has_more_updates()
        assert "trainings" not in counters(home)
        assert residual(home, large) is None
        async with home.running(new_trainer(), manifest=large):
            assert (await hub.update()).sequence == 1


async def test_retry_sends_the_same_bytes_under_the_same_id(home, centre, new_trainer):
    """The broker takes the message, and the connection is lost before it says so."""
    bodies = []

    @asynccontextmanager
    async def connect(name):
        async with home.connect(name) as transport:
            yield DoubtAfterTheFirst(transport)

    class DoubtAfterTheFirst(Watched):
        def __init__(self, transport):
            super().__init__(transport, None)

        async def publish(self, message):
            bodies.append((message.message_id, message.body))
            await self._transport.publish(message)
            if len(bodies) < 3:
                raise BrokerUnavailableError("no confirmation came")

    async with centre() as hub, home.running(new_trainer(), connect=connect):
        await hub.broadcast(1, up=SPARSE)
        deliveries = [await hub.delivery() for _ in range(3)]
    assert len({(delivery.message_id, delivery.body) for delivery in deliveries}) == 1
    assert len(set(bodies)) == 1


async def test_restarted_worker_sends_what_was_never_confirmed_and_no_more(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub:
        async with home.running(train):
            await hub.broadcast(1)
            confirmed = await hub.update()
            await until(lambda: counters(home).get("updates_sent") == 1)
        async with home.running(train):
            await hub.broadcast(2)
            assert (await hub.update()).sequence == 2
            assert not hub.has_more_updates()
    assert confirmed.sequence == 1


async def test_confirmed_update_without_a_receipt_is_sent_again_after_a_while(home, centre, new_trainer):
    now = [1000.0]
    async with centre() as hub, home.running(new_trainer(), clock=lambda: now[0]):
        await hub.broadcast(1)
        first = await hub.delivery()
        await until(lambda: counters(home).get("updates_sent") == 1)
        now[0] += 121.0
        await hub.broadcast(2)
        again, second = await hub.delivery(), await hub.delivery()
    assert (again.message_id, again.body) == (first.message_id, first.body)
    assert wire.decode(ModelUpdate, second.body).sequence == 2


async def test_confirmed_update_is_sent_again_as_soon_as_the_settings_say_and_until_somebody_answers(home, centre, new_trainer):
    async with centre() as hub, home.running(new_trainer(), resend_after_s=0.05):
        await hub.broadcast(1)
        first, again, once_more = [await hub.delivery() for _ in range(3)]
        assert {(found.message_id, found.body) for found in (again, once_more)} == {(first.message_id, first.body)}
        await hub.answer(wire.decode(ModelUpdate, first.body))
        await until(lambda: counters(home).get("updates_merged") == 1)


async def test_update_is_sent_again_ever_more_rarely_while_nobody_answers(home, centre, new_trainer):
    """An aggregator that was away for a night must not find hundreds of copies of each."""
    now = [1000.0]
    came_again = []
    async with centre() as hub, home.running(new_trainer(), clock=lambda: now[0]):
        await hub.broadcast(1)
        first = await hub.update()
        for version in range(2, 34):
            await until(lambda: not _update_ids(home, "WHERE sent_at IS NULL"))
            now[0] += 121.0
            # A new update makes the worker look into its outbox, as the time does in a real one.
            await hub.broadcast(version)
            while (update := await hub.update()).base_version != version:
                if update == first:
                    came_again.append(version - 1)
        # In 64 minutes; every two minutes would be 31 times.
        assert 2 <= len(came_again) <= 6
        await until(lambda: not _update_ids(home, "WHERE sent_at IS NULL"))
        # Who answers is there again.
        await hub.answer(update)
        await until(lambda: counters(home).get("updates_merged") == 1)
        now[0] += 121.0
        await hub.broadcast(34)
        assert await hub.update() == first


async def test_killed_worker_loses_no_update_wherever_it_was(home, centre, new_trainer):
    """Each life is ended at another moment. At the end every sequence number has arrived, each under one id."""
    arrived = {}

    async with centre() as hub:

        async def collect():
            while True:
                update = await hub.update()
                assert arrived.setdefault(update.sequence, update) == update
                await hub.answer(update)

        async with asyncio.TaskGroup() as group:
            collecting = group.create_task(collect())
            version = 0
            for yields in (1, 5, 20, 60, 150, 400, 1000):
                async with home.running(new_trainer()) as running:
                    for _ in range(3):
                        version += 1
                        await hub.broadcast(version)
                        for _ in range(yields):
                            await asyncio.sleep(0)
                    await running.kill()
            async with home.running(new_trainer()) as running:
                version += 1
                await hub.broadcast(version)
                await until(lambda: any(update.base_version == version for update in arrived.values()))
                await until(lambda: counters(home).get("updates_merged") == counters(home)["trainings"])
            collecting.cancel()
    trainings = counters(home)["trainings"]
    assert sorted(arrived) == list(range(1, trainings + 1))


# Receipts


async def test_settled_update_is_gone_and_counted(home, centre, new_trainer):
    async with centre() as hub:
        async with home.running(new_trainer()):
            for version, outcome in ((1, "merged"), (2, "buffered"), (3, "refused")):
                await hub.broadcast(version)
                await hub.answer(await hub.update(), outcome)
                await until(lambda: counters(home).get(f"updates_{outcome}") == 1)  # noqa: B023
        with home.outbox() as outbox:
            assert outbox.unsettled_count() == 0
            assert outbox.next_sequence() == 4


async def test_content_of_a_refused_update_is_back_in_the_residual_to_the_last_bit(home, centre, new_trainer):
    delta = np.random.default_rng(3).standard_normal(2008).astype(np.float32)
    async with centre() as hub:
        async with home.running(new_trainer(delta)):
            frame = await hub.broadcast(1, up=SPARSE)
            update = await hub.update()
            await until(lambda: counters(home).get("updates_sent") == 1)
        sent = content(update, frame.manifest)
        left = residual(home, frame.manifest)
        assert np.array_equal(left, delta - sent)
        assert np.count_nonzero(sent) < 200
        async with home.running(new_trainer(delta)):
            await hub.answer(update, "refused")
            await until(lambda: counters(home).get("updates_refused") == 1)
    assert np.array_equal(residual(home, frame.manifest), left + sent)
    assert np.allclose(residual(home, frame.manifest), delta, atol=1e-6)


@pytest.mark.parametrize("reason", ["bounds", "non_finite"])
async def test_content_that_can_never_be_taken_does_not_go_into_the_residual(home, centre, new_trainer, reason):
    """It would be in every later update, and the party shut out for ever."""
    async with centre() as hub, home.running(new_trainer(1.0)):
        frame = await hub.broadcast(1)
        await hub.answer(await hub.update(), "refused", reason=reason)
        await until(lambda: counters(home).get("updates_refused") == 1)
        await hub.broadcast(2)
        update = await hub.update()
    assert np.array_equal(content(update, frame.manifest), np.full(frame.manifest.size, 1.0, np.float32))
    assert counters(home)["updates_dropped"] == 1


async def test_receipt_that_comes_twice_gives_back_once(home, centre, new_trainer):
    async with centre() as hub, home.running(new_trainer()):
        frame = await hub.broadcast(1)
        update = await hub.update()
        for _ in range(3):
            await hub.answer(update, "refused")
        await hub.broadcast(2)
        second = await hub.update()
    # float32 sends everything: the residual held the first update once.
    assert np.array_equal(content(second, frame.manifest), np.full(frame.manifest.size, 2.0, np.float32))
    assert counters(home)["updates_refused"] == 1


async def test_error_feedback_conserves_all_that_was_learnt(home, centre, new_trainer):
    """What was merged and what is still left over add up to the sum of all trainings, with refusals on the way."""
    deltas = np.random.default_rng(5).standard_normal((9, 2008)).astype(np.float32)
    merged = np.zeros(2008, np.float64)
    async with centre() as hub:
        for life in range(3):
            async with home.running(new_trainer(lambda number, life=life: deltas[3 * life + number - 1])):
                for number in range(1, 4):
                    version = 3 * life + number
                    frame = await hub.broadcast(version, up=SPARSE)
                    update = await hub.update()
                    is_refused = version in (2, 5, 6)
                    await hub.answer(update, "refused" if is_refused else "merged")
                    if not is_refused:
                        merged += content(update, frame.manifest)
                    settled = f"updates_{'refused' if is_refused else 'merged'}"
                    expected = sum(1 for done in range(1, version + 1) if (done in (2, 5, 6)) == is_refused)
                    await until(lambda: counters(home).get(settled) == expected)  # noqa: B023
    assert np.allclose(merged + residual(home, frame.manifest), deltas.sum(axis=0, dtype=np.float64), atol=1e-5)
    assert counters(home)["trainings"] == 9


async def test_receipt_that_is_none_or_of_an_unknown_update_is_left_out(home, centre, new_trainer, broker):
    async with centre() as hub, home.running(new_trainer()):
        frame = await hub.broadcast(1)
        update = await hub.update()
        await hub.send_receipt("ann", b"no receipt")
        await hub.answer(update.model_copy(update={"update_id": "f" * 32}), "refused")
        await hub.answer(update)
        await until(lambda: counters(home).get("updates_merged") == 1)
        assert broker.depth(NAMES.inbox("ann")) == 0
    assert "updates_refused" not in counters(home)
    assert not residual(home, frame.manifest).any()


async def test_receipt_that_came_while_the_worker_was_away_is_read_at_the_next_start(home, centre, new_trainer):
    async with centre() as hub:
        async with home.running(new_trainer()):
            await hub.broadcast(1)
            update = await hub.update()
        await hub.answer(update)
        async with home.running(new_trainer()):
            await until(lambda: counters(home).get("updates_merged") == 1)


# Frames that must not be trained from


async def test_what_is_no_frame_of_the_federation_is_left_out(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train):
        await hub.broadcast(1)
        await hub.update()
        with capture_logs() as logs:
            foreign = Broadcaster("clinic", MANIFEST).first(np.zeros(MANIFEST.size))[1]
            for number, body in enumerate((b"no frame", wire.encode(foreign)), start=1):
                await hub.transport.publish(Message(NAMES.model, body, headers={"x-fl-number": 2}))
                await until(lambda: sum(line["event"] == "broadcast left out" for line in logs) == number)  # noqa: B023
        await hub.broadcast(2)
        assert (await hub.update()).base_version == 2
    assert len(train.bases) == 2


async def test_another_model_than_the_tasks_ends_the_worker_with_the_difference(home, centre, new_trainer):
    other = manifest_of({"hidden.weight": np.zeros((3, 4), np.float32)})
    async with centre() as hub:
        with raises(ManifestMismatchError):
            async with home.running(new_trainer()) as running:
                await hub.broadcast(1, manifest=other)
                await running.ended()


# What it holds, over its restarts


def models():
    generator = np.random.default_rng(11)
    while True:
        yield generator.standard_normal(MANIFEST.size).astype(np.float32)


def read_since(home, before):
    now = counters(home)
    return {name: now.get(name, 0) - before.get(name, 0) for name in ("bytes_down", "keyframes_received", "deltas_received")}


async def lived(home, hub, train):
    """Until the newest version was trained from, and the update answered; then the worker is stopped."""
    async with home.running(train):
        await hub.answer(await newest_update(hub))


async def newest_update(hub):
    """From the version that was broadcast last; what was sent before, or comes again, is passed over."""
    while (update := await hub.update()).base_version != hub.frames.version:
        pass
    return update


async def test_worker_that_was_away_for_ten_frames_reads_only_the_changes(home, centre, new_trainer):
    train, model = new_trainer(), models()
    async with centre() as hub:
        await hub.broadcast(1, model=next(model), down="topk:0.05+int8")
        for version in range(2, 12):
            await hub.broadcast(version, model=next(model))
        await lived(home, hub, train)
        before, log_bytes = counters(home), hub.frames.log_bytes
        for version in range(12, 22):
            await hub.broadcast(version, model=next(model))
        await lived(home, hub, train)
        read = read_since(home, before)
        assert read["keyframes_received"] == 0
        # Some frames before the wanted ones are read as well, since offsets have gaps.
        assert 10 <= read["deltas_received"] <= 16
        assert read["bytes_down"] < 1.7 * (hub.frames.log_bytes - log_bytes)
        assert train.bases[-1].tobytes() == hub.frames.model.tobytes()


async def test_worker_that_was_away_for_long_takes_the_keyframe_where_that_costs_less(home, centre, new_trainer):
    train, model = new_trainer(), models()
    async with centre() as hub:
        await hub.broadcast(1, model=next(model), down="topk:0.05+int8")
        await lived(home, hub, train)
        before = counters(home)
        for version in range(2, 60):
            await hub.broadcast(version, model=next(model), with_keyframe=version == 58)
        await lived(home, hub, train)
        read = read_since(home, before)
        assert read["keyframes_received"] == 1
        assert read["bytes_down"] < hub.frames.log_bytes
        assert train.bases[-1].tobytes() == hub.frames.model.tobytes()


async def test_killed_worker_goes_on_from_what_was_kept(home, centre, new_trainer):
    train, model = new_trainer(), models()
    async with centre() as hub:
        await hub.broadcast(1, model=next(model), down="topk:0.05+int8")
        for life in range(4):
            async with home.running(train) as running:
                await newest_update(hub)
                for _ in range(3):
                    await hub.broadcast(hub.frames.version + 1, model=next(model))
                await newest_update(hub)
                if life % 2:
                    await asyncio.sleep(0.2)
                await running.kill()
            await hub.broadcast(hub.frames.version + 1, model=next(model))
        await lived(home, hub, train)
    assert counters(home)["keyframes_received"] <= 2
    assert train.bases[-1].tobytes() == hub.frames.model.tobytes()


async def test_worker_whose_disk_is_damaged_takes_the_keyframe(home, centre, new_trainer):
    train, model = new_trainer(), models()
    async with centre() as hub:
        await hub.broadcast(1, model=next(model))
        await lived(home, hub, train)
        connection = sqlite3.connect(outbox_file(home.folder, home.party))
        connection.execute("UPDATE held_model SET vector = zeroblob(8032)")
        connection.commit()
        connection.close()
        before = counters(home)
        await hub.broadcast(2, model=next(model))
        with capture_logs() as logs:
            await lived(home, hub, train)
        assert read_since(home, before)["keyframes_received"] == 1
        assert any("on the disk is damaged" in line["event"] for line in logs)
        assert train.bases[-1].tobytes() == hub.frames.model.tobytes()


async def test_model_on_the_disk_is_not_trained_from_before_the_broker_says_what_is_newest(home, centre, new_trainer, broker):
    train = new_trainer()
    async with centre() as hub:
        await hub.broadcast(1)
        await lived(home, hub, train)
        connection = sqlite3.connect(outbox_file(home.folder, home.party))
        connection.execute("DELETE FROM facts WHERE key = 'trained_from'")
        connection.commit()
        connection.close()
        await hub.broadcast(2)
        broker.stop()
        async with home.running(train):
            await asyncio.sleep(0.1)
            assert len(train.bases) == 1
            broker.start()
            await until(lambda: len(train.bases) == 2)
    assert np.array_equal(train.bases[1], np.full(MANIFEST.size, 2, np.float32))


async def test_federation_that_begins_with_the_own_seeds_model_needs_no_keyframe(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train, initial=np.full(MANIFEST.size, 7, np.float32)):
        for version in (7, 8):
            await hub.broadcast(version)
            await hub.update()
    assert "keyframes_received" not in counters(home)


# What an update may cost


async def test_update_stays_within_the_budget_and_names_its_codec(home, centre, new_trainer):
    delta = next(models())
    async with centre() as hub, home.running(new_trainer(delta), budget=Budget(bytes=531)):
        frame = await hub.broadcast(1, up=SPARSE)
        delivery = await hub.delivery()
        update = wire.decode(ModelUpdate, delivery.body)
        assert len(delivery.body) <= 531
        codec = parse_codec(update.codec)
        assert (codec.with_density(0.05), codec.density < 0.05) == (parse_codec(SPARSE), True)
        assert delivery.headers["x-fl-codec"] == update.codec
    assert np.allclose(content(update, frame.manifest) + residual(home, frame.manifest), delta, atol=1e-5)


async def test_seconds_budget_counts_once_the_line_is_measured(home, centre, new_trainer):
    async def slowly(_message):
        await asyncio.sleep(0.05)

    delta = next(models())
    async with centre() as hub:
        train = new_trainer(delta)
        async with home.running(train, connect=watched(home, slowly), budget=Budget(seconds=0.04)):
            await hub.broadcast(1, up=SPARSE)
            first = await hub.delivery()
            await until(lambda: counters(home).get("updates_sent") == 1)
            await hub.broadcast(2, up=SPARSE)
            second = await hub.delivery()
    assert wire.decode(ModelUpdate, first.body).codec == SPARSE
    assert len(second.body) < 0.9 * len(first.body)
    with home.outbox() as outbox:
        assert 0 < float(outbox.fact("uplink_bytes_per_s")) < len(first.body) / 0.05


async def test_budget_that_no_update_stays_within_ends_the_worker(home, centre, new_trainer):
    async with centre() as hub:
        with raises(ConfigurationError):
            async with home.running(new_trainer(), budget=Budget(bytes=400)) as running:
                await hub.broadcast(1, up=SPARSE)
                await running.ended()
    assert "trainings" not in counters(home)


async def test_momentum_survives_a_restart_and_goes_where_the_federation_wants_none(home, centre, new_trainer):
    delta = next(models())

    def velocity():
        with home.outbox() as outbox:
            return outbox.velocity(MANIFEST.digest)

    waited = np.ones(MANIFEST.size, np.bool_)
    async with centre() as hub:
        for version in (1, 2):
            async with home.running(new_trainer(delta)):
                await hub.broadcast(version, up=SPARSE, momentum=0.5)
                update = await hub.update()
                await until(lambda: counters(home).get("updates_sent") == version)  # noqa: B023
            sent = content(update, MANIFEST) != 0
            waited &= ~sent
            assert not velocity()[sent].any()
        assert np.allclose(velocity()[waited], 1.5 * delta[waited])
        async with home.running(new_trainer(delta)):
            await hub.broadcast(3, up=SPARSE)
            await hub.update()
        assert velocity() is None


# The end


async def test_last_frame_ends_the_worker(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub:
        async with home.running(train) as running:
            await hub.broadcast(1)
            await hub.update()
            await hub.broadcast(2, over=True)
            await running.ended()
        async with home.running(train) as running:
            await running.ended()
    assert len(train.bases) == 1


async def test_last_frame_ends_a_training(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train) as running:
        train.goes_on.clear()
        await hub.broadcast(1)
        assert await asyncio.to_thread(train.began.wait, 10)
        await hub.broadcast(2, over=True)
        await running.ended()
    assert "trainings" not in counters(home)


async def test_receipts_that_came_before_the_last_frame_are_settled_before_the_worker_ends(home, centre, new_trainer, broker):
    """More than the prefetch window holds, so that they take longer than the frame."""
    async with centre() as hub:
        async with home.running(new_trainer()):
            for version in range(1, 41):
                await hub.broadcast(version)
                await hub.update()
        with home.outbox() as outbox:
            stored = [outbox.unsettled(update_id) for update_id in _update_ids(home)]
        for one in stored:
            await hub.answer(wire.decode(ModelUpdate, one.body))
        await hub.broadcast(41, over=True)
        async with home.running(new_trainer()) as running:
            await running.ended()
    assert counters(home)["updates_merged"] == 40
    assert broker.depth(NAMES.inbox("ann")) == 0


async def test_federation_that_goes_on_after_its_end_has_its_party_again(home, centre, new_trainer):
    async with centre() as hub:
        async with home.running(new_trainer()) as running:
            await hub.broadcast(1, over=True)
            await running.ended()
        await hub.broadcast(1)
        async with home.running(new_trainer()):
            assert (await hub.update()).base_version == 1


async def test_stop_drops_the_training_and_keeps_the_outbox(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub:
        async with home.running(train) as running:
            await hub.broadcast(1)
            update = await hub.update()
            train.goes_on.clear()
            train.began.clear()
            await hub.broadcast(2)
            assert await asyncio.to_thread(train.began.wait, 10)
            running.worker.stop()
            await running.ended()
        with home.outbox() as outbox:
            assert outbox.unsettled(update.update_id) is not None
            assert outbox.unsettled_count() == 1


# One worker for a party


async def test_second_worker_on_the_same_folder_is_refused(home, centre, new_trainer):
    async with home.running(new_trainer()):
        with pytest.raises(StorageInUseError, match="another worker on this machine already serves party 'ann'"):
            async with home.running(new_trainer()):
                pass


async def test_second_worker_in_another_folder_is_refused_after_the_grace(home, new_home, tmp_path, centre, new_trainer):
    elsewhere = new_home(tmp_path / "elsewhere", "ann")
    async with centre() as hub, home.running(new_trainer()):
        await hub.broadcast(1)
        await hub.update()
        with raises(QueueInUseError):
            async with elsewhere.running(new_trainer(), grace_s=0.1) as second:
                await second.ended()


async def test_inbox_that_a_lost_connection_still_holds_is_waited_for(home, centre, new_trainer):
    async with centre() as hub, home.connect("the lost connection") as old, home.running(new_trainer(), grace_s=30.0):
        async with old.consume(NAMES.inbox("ann"), prefetch=1, name="old", exclusive=True):
            await hub.broadcast(1)
            await asyncio.sleep(0.05)
            assert not hub.has_more_updates()
        assert (await hub.update()).base_version == 1


# A broker that is away


async def test_training_goes_on_while_the_broker_is_away_and_the_update_follows(home, centre, new_trainer, broker):
    train = new_trainer()
    async with centre() as hub:
        train.goes_on.clear()
        async with home.running(train):
            await hub.broadcast(1)
            assert await asyncio.to_thread(train.began.wait, 10)
            broker.stop()
            train.goes_on.set()
            await until(lambda: counters(home).get("trainings") == 1)
            broker.start()
            async with centre() as hub_again:
                update = await hub_again.update()
                assert (update.base_version, update.sequence) == (1, 1)


async def test_broker_that_is_away_at_the_start_is_waited_for(home, centre, new_trainer, broker):
    broker.stop()
    async with home.running(new_trainer()):
        await asyncio.sleep(0.05)
        broker.start()
        async with centre() as hub:
            await hub.broadcast(1)
            assert (await hub.update()).base_version == 1


async def test_party_that_was_never_enrolled_is_told_so(home, broker, new_trainer):
    broker.delete_queue(NAMES.inbox("ann"))
    with raises(NotFoundError):
        async with home.running(new_trainer()) as running:
            await running.ended()


async def test_party_with_a_wrong_login_is_told_so(new_home, tmp_path, new_trainer):
    with raises(AuthenticationError):
        async with new_home(tmp_path, "eve").running(new_trainer()) as running:
            await running.ended()


async def test_broker_that_does_not_prove_who_it_is_ends_the_worker_that_starts(home, new_trainer):
    """Somebody has to look at the settings."""

    def connect(_):
        raise UntrustedBrokerError("the certificate of the broker is from an unknown CA")

    with raises(UntrustedBrokerError):
        async with home.running(new_trainer(), connect=connect) as running:
            await running.ended()


async def test_broker_that_proved_it_once_is_waited_for(home, centre, new_trainer, broker):
    """A certificate ran out, or somebody is on the line for a while."""
    attempts = []

    def connect(name):
        attempts.append(name)
        if len(attempts) == 2:
            raise UntrustedBrokerError("the certificate of the broker has expired")
        return home.connect(name)

    async with home.running(new_trainer(), connect=connect):
        async with centre() as hub:
            await hub.broadcast(1)
            await hub.update()
        broker.stop()
        broker.start()
        await until(lambda: len(attempts) == 3)


async def test_stop_while_the_broker_is_away_ends_at_once(home, broker, new_trainer):
    broker.stop()
    async with home.running(new_trainer()) as running:
        await asyncio.sleep(0.01)
        running.worker.stop()
        await running.ended()


async def test_stop_at_the_moment_of_an_attempt_ends_the_attempts(home, new_trainer):
    attempts, workers = [], []

    def connect(name):
        attempts.append(name)
        assert len(attempts) < 20, "it tries on and on, and lets nobody else run"
        workers[0].stop()
        raise BrokerUnavailableError("away")

    async with home.running(new_trainer(), connect=connect) as running:
        workers.append(running.worker)
        await running.ended()
    assert len(attempts) == 1


# With the real aggregator


async def test_large_update_travels_in_parts_and_is_merged(home, broker, new_trainer, aggregator):
    broker.max_message_bytes = 16_384
    async with aggregator() as (coordinator, _):
        async with home.running(new_trainer(0.5), link={"max_message_bytes": 2048}) as running:
            await until(lambda: counters(home).get("updates_merged", 0) >= 3)
            running.worker.stop()
            await running.ended()
        assert coordinator.version >= 3
        assert coordinator.counts["duplicate"] == coordinator.counts["refused"] == 0


async def test_worker_holds_what_the_aggregator_broadcast_over_restarts_of_both(home, new_trainer, aggregator, broker):
    """An update from another base than the aggregator's is refused: that none is shows that the bits are the same."""
    deltas = models()
    train = new_trainer(lambda _: next(deltas))
    down = {"down": "topk:0.05+int8", "keyframe": "bfloat16", "keyframe_every_frames": 4}
    with capture_logs() as logs:
        for life in range(3):
            async with aggregator(up=SPARSE, **down) as (coordinator, _), home.running(train) as running:
                wanted = 7 * (life + 1)
                await until(lambda: counters(home).get("updates_merged", 0) >= wanted)  # noqa: B023
                running.worker.stop()
                await running.ended()
                await until(lambda: coordinator.unpublished() is None)
            assert coordinator.counts["refused"] == 0
        received = await newest_model(broker)
    assert received.version == coordinator.version
    assert not [line for line in logs if line["log_level"] == "error"]
    # One at most for a whole life: the model on the disk leads on.
    assert counters(home).get("keyframes_received", 0) <= 3


async def test_all_that_a_party_learnt_is_in_the_model_or_in_its_residual(
    home, new_home, tmp_path, new_trainer, aggregator, broker
):
    """Over kills of both sides and of the broker: with weight 1 the model is the sum of what was merged, to rounding."""
    homes = [home, new_home(tmp_path / "bob", "bob")]
    killed = threading.Event()

    async def live(one, lives):
        for _ in range(lives):
            async with one.running(new_trainer(1.0)) as running:
                before = counters(one).get("trainings", 0)
                await until(lambda: counters(one).get("trainings", 0) >= before + 2 or running.task.done())  # noqa: B023
                await running.kill()

    async def disturb():
        await until(lambda: counters(homes[0]).get("trainings", 0) >= 3)
        broker.stop()
        await asyncio.sleep(0.02)
        broker.start()
        killed.set()

    async with aggregator(up=SPARSE), asyncio.TaskGroup() as group:
        for one in homes:
            group.create_task(live(one, 4))
        group.create_task(disturb())
    # The last lives: everything that lies in an outbox is sent, decided and settled.
    async with aggregator(up=SPARSE) as (coordinator, _):
        for one in homes:
            train = new_trainer(0.0)
            train.goes_on.clear()
            async with one.running(train):
                await until(lambda: _unsettled(one) == 0)  # noqa: B023
        await until(lambda: coordinator.unpublished() is None)
        received = await newest_model(broker)
        assert received.version == coordinator.version
    assert killed.is_set()
    learnt = sum(counters(one)["trainings"] for one in homes)
    kept = sum(residual(one, MANIFEST).astype(np.float64) for one in homes)
    assert learnt >= 12
    assert np.allclose(received.model + kept, learnt, atol=1e-3)


async def newest_model(broker):
    follower = Follower(federation="ward", manifest=MANIFEST, initial=np.zeros(MANIFEST.size, np.float32), name="onlooker")
    pending = follower.new_pending()
    async with broker.connect("onlooker") as transport:
        reading = read_newest(transport, NAMES.model_log, name="onlooker", traffic=follower.traffic)
        async with aclosing(reading) as broadcasts:
            pending.put(await anext(broadcasts))
            return (await follower.next(transport, pending)).received


def _unsettled(one):
    return len(_update_ids(one))


def _update_ids(one, where=""):
    """Of what waits to be settled, beside a worker that is at work."""
    connection = sqlite3.connect(outbox_file(one.folder, one.party))
    try:
        return [row[0] for row in connection.execute(f"SELECT update_id FROM updates {where}")]
    finally:
        connection.close()
