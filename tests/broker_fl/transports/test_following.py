"""Following the model through its two logs, on the in-memory broker."""

import asyncio
import itertools
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from broadcasting import PLAN, Broadcaster, messages, publish
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from broker_fl.errors import DecodeError, ManifestMismatchError
from broker_fl.parameters import digest, manifest_of
from broker_fl.topology import Names, Policy, shared
from broker_fl.transports.following import Follower, advance, deltas_cost_less, received_by
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.model_log import read_newest
from broker_fl.transports.transport import Message
from schemas import wire
from schemas.frame import KeyframePlace

NAMES = Names("ward")
MANIFEST = manifest_of({"hidden.weight": np.zeros((40, 50), np.float32), "hidden.bias": np.zeros(8, np.float32)})
RNG = np.random.default_rng(0)
SEEDED = RNG.standard_normal(MANIFEST.size).astype(np.float32)
OTHER = np.ones(MANIFEST.size, np.float32)


class Site:
    """A broker, what was broadcast on it, and who follows that."""

    def __init__(self, broker, transport, frames):
        self.broker = broker
        self.transport = transport
        self.frames = frames
        self.part_bytes = None

    async def send(self, pair):
        return await publish(self.transport, pair, part_bytes=self.part_bytes)

    async def begin(self, model=SEEDED, **facts):
        return await self.send(self.frames.first(model, **facts))

    async def go_on(self, count=1, **facts):
        for _ in range(count):
            moved = self.frames.model + RNG.standard_normal(MANIFEST.size).astype(np.float32)
            last = await self.send(self.frames.next(moved, **facts))
        return last

    @asynccontextmanager
    async def following(self, held=None, *, initial=OTHER, patience_s=5.0):
        """A follower attached to the model log; from a model, as after a time away."""
        one = Follower(federation="ward", manifest=MANIFEST, initial=initial, name="test", patience_s=patience_s)
        one.held = held
        pending = one.new_pending()
        async with self.broker.connect("follower") as transport, asyncio.TaskGroup() as group:

            async def read():
                reading = read_newest(transport, NAMES.model_log, name="test", traffic=one.traffic)
                async with aclosing(reading) as broadcasts:
                    async for broadcast in broadcasts:
                        pending.put(broadcast)

            reading = group.create_task(read())
            try:
                yield Following(self, one, transport, pending)
            finally:
                reading.cancel()


class Following:
    def __init__(self, site, follower, transport, pending):
        self._site = site
        self._transport = transport
        self._pending = pending
        self.follower = follower

    async def next(self):
        return await self.follower.next(self._transport, self._pending)

    async def newest(self):
        """Progress, up to the last bit of what was broadcast last."""
        while True:
            progress = await self.next()
            if progress is not None and progress.received.number >= self._site.frames.number:
                assert progress.received.number == self._site.frames.number
                assert progress.received.model.tobytes() == self._site.frames.model.tobytes()
                assert progress.received.digest == digest(self._site.frames.model)
                assert progress.received.version == self._site.frames.version
                assert progress.received.plan == self._site.frames.plan
                return progress

    def read(self):
        """Keyframes, deltas and bytes since this was last asked."""
        counts = self.follower.traffic.take()
        return counts.get("keyframes_received", 0), counts.get("deltas_received", 0), counts.get("bytes_down", 0)


class SlowLog:
    """A connection on which each message of a log takes its time."""

    def __init__(self, transport, *, seconds):
        self._transport = transport
        self._seconds = seconds

    @asynccontextmanager
    async def follow(self, log, **facts):
        async with self._transport.follow(log, **facts) as feed:
            receive = feed.receive

            async def late():
                await asyncio.sleep(self._seconds)
                return await receive()

            feed.receive = late
            yield feed


@pytest.fixture
async def site():
    broker = MemoryBroker()
    broker.declare(shared("ward"))
    async with asyncio.timeout(20), broker.connect("centre") as transport:
        yield Site(broker, transport, Broadcaster("ward", MANIFEST, down="topk:0.05+int8"))


def errors(logs):
    return [line for line in logs if line["log_level"] == "error"]


# As they come


async def test_contiguous_frames_are_followed_with_nothing_but_the_changes(site):
    await site.begin()
    async with site.following() as one:
        assert (await one.newest()).is_anew
        one.read()
        for _ in range(5):
            await site.go_on()
            progress = await one.newest()
            assert (len(progress.bodies), progress.is_anew) == (1, False)
        assert one.read()[:2] == (0, 5)


async def test_burst_is_followed_in_one_go(site):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        await site.go_on(7)
        assert len((await one.next()).bodies) == 7
        assert one.follower.held.number == 8


async def test_frame_that_changes_nothing_has_another_version_and_the_same_model(site):
    await site.begin()
    async with site.following() as one:
        before = (await one.newest()).received
        await site.send(site.frames.next(version=5))
        after = (await one.newest()).received
        assert after.model is before.model
        assert (before.version, after.version, after.number) == (0, 5, 2)


async def test_model_that_was_given_away_is_left_as_it_is(site):
    await site.begin()
    async with site.following() as one:
        before = (await one.newest()).received
        bits = before.model.tobytes()
        await site.go_on()
        await one.newest()
        assert before.model.tobytes() == bits


async def test_frames_that_come_again_change_nothing(site):
    await site.begin()
    async with site.following() as one:
        second = site.frames.next(SEEDED * 2)
        for _ in range(2):
            await site.send(second)
        third = site.frames.next(SEEDED * 3)
        for pair in (third, second, third):
            await site.send(pair)
        await one.newest()
        await site.send(third)
        assert (await one.next()).bodies == ()
        await site.send(second)
        await site.go_on()
        assert len((await one.newest()).bodies) == 1


@pytest.mark.parametrize("keyframe", ["float32", "float16", "bfloat16", "int8"])
async def test_keyframe_between_changes_rounds_what_followers_hold_and_costs_them_nothing(site, keyframe):
    site.frames.keyframe = keyframe
    await site.begin()
    async with site.following() as one, site.following(initial=SEEDED) as other:
        await one.newest()
        await other.newest()
        one.read()
        for _ in range(3):
            await site.go_on(2)
            await site.go_on(with_keyframe=True)
            await one.newest()
            await other.newest()
        assert one.read()[:2] == (0, 9)


async def test_plan_is_kept_until_another_one_comes(site):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        await site.go_on(plan=PLAN.model_copy(update={"update_codec": "int8"}))
        await site.go_on(2)
        assert (await one.newest()).received.plan.update_codec == "int8"


# Late, and with gaps


async def test_late_joiner_takes_the_keyframe_and_the_changes_since(site):
    await site.begin()
    await site.go_on(20)
    await site.go_on(with_keyframe=True)
    await site.go_on(3)
    async with site.following() as one:
        assert (await one.newest()).is_anew
        keyframes, deltas, _ = one.read()
    assert keyframes == 1
    assert deltas < 10


async def test_change_that_was_missed_is_read_from_the_log(site):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        missed = site.frames.next(SEEDED * 2)
        await site.send(missed)
        await asyncio.sleep(0.05)
        await one._pending.take()
        await site.go_on()
        one.read()
        assert not (await one.newest()).is_anew
        assert one.read()[0] == 0


async def test_who_was_away_for_ten_frames_reads_only_the_changes(site):
    await site.begin(OTHER)
    await site.go_on(20)
    async with site.following() as one:
        held = (await one.newest()).received
    log_bytes = site.frames.log_bytes
    await site.go_on(10)
    async with site.following(held) as one:
        progress = await one.newest()
        keyframes, deltas, read_bytes = one.read()
    assert (len(progress.bodies), progress.is_anew) == (10, False)
    assert keyframes == 0
    # The ones before are the slack for offsets that were skipped.
    assert 10 <= deltas <= 16
    assert read_bytes < 1.7 * (site.frames.log_bytes - log_bytes)


async def test_changes_that_are_long_in_coming_on_a_slow_line_are_waited_for(site):
    await site.begin(OTHER)
    await site.go_on(2)
    async with site.following() as one:
        held = (await one.newest()).received
    await site.go_on(4)
    async with site.following(held, patience_s=0.05) as one:
        one._transport = SlowLog(one._transport, seconds=0.15)
        assert not (await one.newest()).is_anew
        assert one.read()[0] == 0


async def test_who_was_away_for_long_takes_the_keyframe_where_that_costs_less(site):
    await site.begin(OTHER)
    async with site.following() as one:
        held = (await one.newest()).received
    await site.go_on(200)
    await site.go_on(with_keyframe=True)
    await site.go_on(2)
    changes = site.frames.log_bytes - held.log_bytes
    async with site.following(held) as one:
        assert (await one.newest()).is_anew
        keyframes, deltas, read_bytes = one.read()
    assert keyframes == 1
    assert deltas < 10
    assert read_bytes < changes / 5


def test_choice_is_by_what_both_ways_cost():
    frames = Broadcaster("ward", MANIFEST)
    _, frame = frames.first(SEEDED)
    place = KeyframePlace(number=1, bytes=1000, log_bytes=500)
    frame = frame.model_copy(update={"log_bytes": 900, "keyframe": place})
    # The changes since the keyframe cost 400 in both ways: it is the keyframe against those before it.
    assert deltas_cost_less(500, frame)
    assert deltas_cost_less(899, frame)
    assert deltas_cost_less(-500, frame)
    assert not deltas_cost_less(-501, frame)


async def test_changes_that_are_gone_from_the_log_mean_the_keyframe(site):
    await site.begin(OTHER)
    async with site.following() as one:
        held = (await one.newest()).received
    await site.go_on(20)
    site.broker.apply_policies((Policy("log", r"model\.log$", "queues", {"max-length-bytes": 3000}),))
    await site.go_on(with_keyframe=True)
    await site.go_on(2)
    async with site.following(held) as one:
        # So small that the cost says nothing against the changes.
        one.follower.held = replace(held, log_bytes=site.frames.log_bytes - 100)
        with capture_logs() as logs:
            assert (await one.newest()).is_anew
        assert one.read()[0] == 1
    assert "changes since the held frame are gone from the log" in [line["event"] for line in logs]
    assert not errors(logs)


async def test_keyframe_without_the_changes_after_it_is_better_than_nothing_until_the_next_one(site):
    await site.begin(OTHER)
    await site.go_on(3)
    site.broker.apply_policies((Policy("log", r"model\.log$", "queues", {"max-length-bytes": 1}),))
    await site.go_on()
    async with site.following() as one:
        with capture_logs() as logs:
            progress = await one.next()
            assert (progress.received.number, progress.is_anew) == (1, True)
            assert len(errors(logs)) == 1
            one.read()
            await site.go_on()
            assert await one.next() is None
        assert one.read()[:2] == (0, 1)
        await site.go_on(with_keyframe=True)
        assert (await one.newest()).is_anew


async def test_gap_inside_of_a_burst_is_closed(site):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        pairs = [site.frames.next(SEEDED * factor) for factor in range(2, 8)]
        for pair in pairs:
            await site.send(pair)
        await asyncio.sleep(0.05)
        burst = await one._pending.take()
        one.read()
        for broadcast in (*burst[:2], *burst[4:]):
            one._pending.put(broadcast)
        assert not (await one.newest()).is_anew
        assert one.read()[0] == 0


async def test_after_a_lost_connection_it_goes_on_from_what_was_held(site):
    await site.begin()
    await site.go_on()
    async with site.following() as one:
        held = (await one.newest()).received
    await site.go_on(3)
    async with site.following(held) as one:
        progress = await one.newest()
    assert (len(progress.bodies), progress.is_anew) == (3, False)


async def test_what_waited_too_long_is_read_again(site):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        one._pending._most_bytes = 1000
        one.read()
        await site.go_on(10)
        await asyncio.sleep(0.05)
        assert not (await one.newest()).is_anew
        assert one.read()[0] == 0


# The own seed


async def test_model_that_the_own_seed_draws_needs_no_keyframe(site):
    await site.begin()
    async with site.following(initial=SEEDED) as one:
        progress = await one.newest()
        assert progress.is_anew
        await site.go_on(3)
        await one.newest()
        assert one.read()[:2] == (0, 3)


@pytest.mark.parametrize("keyframe", ["float16", "bfloat16", "int8"])
async def test_own_seeds_model_is_rounded_as_the_federations_was(site, keyframe):
    site.frames.keyframe = keyframe
    await site.begin()
    async with site.following(initial=SEEDED) as one:
        await one.newest()
        assert one.read()[0] == 0


async def test_late_joiner_goes_on_from_its_own_seed_while_that_costs_less(site):
    await site.begin()
    await site.go_on(5)
    async with site.following(initial=SEEDED) as one:
        progress = await one.newest()
        assert progress.is_anew
        assert len(progress.bodies) == 6
        assert one.read()[0] == 0
    await site.go_on(40)
    await site.go_on(with_keyframe=True)
    async with site.following(initial=SEEDED) as one:
        await one.newest()
        assert one.read()[0] == 1


async def test_late_joiner_with_another_seed_asks_for_the_first_frame_once(site):
    await site.begin()
    await site.go_on(5)
    async with site.following(initial=OTHER) as one:
        with capture_logs() as logs:
            await one.newest()
        assert one.read()[0] == 1
        assert one.follower._begun_otherwise == site.frames.ledger
    assert not errors(logs)


# What is announced again


async def test_restarted_aggregators_announcement_costs_its_followers_nothing_and_brings_its_plan(site):
    await site.begin()
    async with site.following() as one:
        await site.go_on(3, over=False)
        await one.newest()
        one.read()
        site.frames.plan = PLAN.model_copy(update={"fraction": 0.5})
        await site.send(site.frames.announce())
        progress = await one.newest()
        assert (progress.received.plan.fraction, progress.is_anew, len(progress.bodies)) == (0.5, False, 1)
        await site.go_on()
        await one.newest()
        assert one.read()[:2] == (0, 1)


async def test_announcement_that_was_missed_still_brings_its_plan(site):
    """The frame after it says nothing of the plan, since the announcement did."""
    await site.begin()
    await site.go_on(10)
    async with site.following() as one:
        held = (await one.newest()).received
    site.frames.plan = PLAN.model_copy(update={"update_codec": "int4"})
    await site.send(site.frames.announce())
    await site.go_on(2)
    async with site.following(held) as one:
        progress = await one.newest()
    assert progress.received.plan.update_codec == "int4"
    assert not progress.is_anew


async def test_federation_that_was_over_goes_on(site):
    await site.begin()
    await site.send(site.frames.next(over=True))
    async with site.following() as one:
        assert (await one.newest()).received.over
        await site.send(site.frames.announce(over=False))
        assert not (await one.newest()).received.over
        await site.go_on()
        assert not (await one.newest()).received.over


async def test_announcement_of_another_model_under_the_held_number_means_the_keyframe(site):
    await site.begin()
    async with site.following() as one:
        await site.go_on(2)
        await one.newest()
        site.frames.model = SEEDED * 5
        await site.send(site.frames.announce())
        with capture_logs() as logs:
            assert (await one.newest()).is_anew
    assert len(errors(logs)) == 1


async def test_another_ledger_starts_again(site):
    await site.begin()
    await site.go_on(9)
    async with site.following() as one:
        await one.newest()
        site.frames = Broadcaster("ward", MANIFEST, ledger="b" * 32)
        await site.begin(SEEDED * 2)
        assert (await one.newest()).is_anew
        await site.go_on(2)
        await one.newest()
    # Its numbers are in the logs of the old one too, and still nothing is mixed up.
    async with site.following() as one:
        await one.newest()


# What is wrong


async def test_frame_that_yields_another_model_than_it_says_means_the_keyframe(site):
    """What was wrong is what this follower holds; those after it are right."""
    await site.begin()
    async with site.following() as one:
        held = (await one.newest()).received
        one.follower.held = replace(held, model=held.model + 1)
        await site.go_on(with_keyframe=True)
        with capture_logs() as logs:
            assert (await one.newest()).is_anew
        assert one.read()[0] == 2
    assert len(errors(logs)) == 1


async def test_wrong_frame_is_left_out_loudly_and_the_next_keyframe_taken(site):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        with capture_logs() as logs:
            payload = Broadcaster("ward", MANIFEST, down=site.frames.down)
            payload.first(SEEDED)
            keyframe, frame = site.frames.next(SEEDED * 2)
            await site.send((keyframe, frame.model_copy(update={"payload": payload.next(SEEDED * 3)[1].payload})))
            one.read()
            # As good as it gets: what the keyframe before it says.
            assert (await one.next()).received.number == 1
            assert one.read()[0] == 1
            for _ in range(3):
                await site.go_on()
                assert await one.next() is None
            assert one.read()[0] == 0
            await site.go_on(with_keyframe=True)
            assert (await one.newest()).is_anew
    assert errors(logs)


async def test_wrong_keyframe_is_left_out_loudly_and_another_one_waited_for(site):
    keyframe, frame = site.frames.first(SEEDED)
    for damage in ({"digest": "0" * 64}, {"payload": b"short"}):
        await site.send((keyframe.model_copy(update=damage), frame))
        async with site.following() as one:
            with capture_logs() as logs:
                assert await one.next() is None
                assert len(errors(logs)) == 1
                await site.send(site.frames.next(SEEDED * 2))
                assert await one.next() is None
            assert one.read()[0] == 1
            # A restarted aggregator announces a good one.
            await site.send(site.frames.announce())
            assert (await one.newest()).is_anew
        site.frames = Broadcaster("ward", MANIFEST, ledger="b" * 32)
        keyframe, frame = site.frames.first(SEEDED)


@pytest.mark.parametrize("damage", [{"codec": "unheard-of"}, {"payload": b"x"}])
async def test_frame_that_cannot_be_decoded_leaves_what_is_held_and_the_keyframe_is_taken(site, damage):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        keyframe, frame = site.frames.next(SEEDED * 2, with_keyframe=True)
        with capture_logs() as logs:
            await site.send((keyframe, frame.model_copy(update=damage)))
            assert (await one.newest()).is_anew
    assert len(errors(logs)) == 1


async def test_frame_that_nobody_can_round_alike_is_left_out(site):
    _, first = site.frames.first(SEEDED)
    for rounding in ("unheard-of", "randomk:0.5+int8"):
        await site.send((None, first.model_copy(update={"rounding": rounding})))
        async with site.following() as one:
            with capture_logs() as logs:
                assert await one.next() is None
        assert [line["event"] for line in errors(logs)] == ["broadcast left out"]


async def test_what_is_no_frame_of_the_federation_is_left_out(site):
    await site.begin()
    async with site.following() as one:
        await one.newest()
        foreign = wire.encode(Broadcaster("clinic", MANIFEST).first(SEEDED)[1])
        for body, match in ((foreign, "'clinic', not 'ward'"), (b"no frame", "msgpack")):
            with capture_logs() as logs:
                await site.transport.publish(Message(NAMES.model, body))
                assert await one.next() is None
            assert [line["event"] for line in errors(logs)] == ["broadcast left out"]
            assert match in logs[0]["reason"]
        await site.go_on()
        assert not (await one.newest()).is_anew


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        (manifest_of({"hidden.weight": np.zeros((50, 40), np.float32), "hidden.bias": np.zeros(8, np.float32)}), "hidden.weight"),
        (manifest_of({"hidden.weight": np.zeros((40, 50), np.float32)}), "expected 1 tensors, this model has 2"),
    ],
)
async def test_frame_of_another_model_is_a_manifest_mismatch_that_names_the_difference(site, manifest, match):
    site.frames = Broadcaster("ward", manifest)
    await site.send(site.frames.first(np.zeros(manifest.size)))
    with pytest.RaisesGroup(pytest.RaisesExc(ManifestMismatchError, match=match)):
        async with site.following() as one:
            await one.next()


async def test_keyframe_that_does_not_come_is_waited_for_aloud_and_then_taken(site):
    keyframe, frame = site.frames.first(SEEDED)
    await site.send((None, frame))
    async with site.following(patience_s=0.05) as one:
        with capture_logs() as logs:
            waiting = asyncio.create_task(one.newest())
            await asyncio.sleep(0.3)
            assert len(logs) >= 2
            assert {line["event"] for line in logs} == {"the keyframe has not come yet, waiting on"}
            for message in messages(NAMES.keyframes, keyframe):
                await site.transport.publish(message)
            await waiting


async def test_keyframe_is_not_waited_for_when_another_ledger_goes_on(site):
    _, frame = site.frames.first(SEEDED)
    await site.send((None, frame))
    async with site.following(patience_s=0.05) as one:
        waiting = asyncio.create_task(one.next())
        await asyncio.sleep(0.1)
        site.frames = Broadcaster("ward", MANIFEST, ledger="b" * 32)
        await site.begin(SEEDED * 2)
        assert await waiting is None
        await one.newest()


# In parts


@pytest.mark.parametrize("part_bytes", [100, 1000])
async def test_frames_in_parts_are_followed_like_others(site, part_bytes):
    site.part_bytes = part_bytes
    await site.begin(OTHER)
    await site.go_on(5)
    async with site.following() as one:
        held = (await one.newest()).received
    await site.go_on(10)
    async with site.following(held) as one:
        progress = await one.newest()
        assert (len(progress.bodies), progress.is_anew) == (10, False)
        assert one.read()[0] == 0
    await site.go_on(with_keyframe=True)
    await site.go_on(3)
    async with site.following(initial=SEEDED) as one:
        await one.newest()
        assert one.read()[0] == 1


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from(["change", "keyframe", "nothing", "again", "announce", "away", "plan"]), max_size=25), st.booleans()
)
def test_whatever_happens_the_newest_model_is_held_to_the_last_bit(happens, in_parts):
    async def live():
        broker = MemoryBroker()
        broker.declare(shared("ward"))
        async with asyncio.timeout(20), broker.connect("centre") as transport:
            site = Site(broker, transport, Broadcaster("ward", MANIFEST, down="topk:0.05+int8", keyframe="bfloat16"))
            site.part_bytes = 300 if in_parts else None
            pair = site.frames.first(OTHER)
            await site.send(pair)
            held = None
            for is_away, group in itertools.groupby(happens, key=lambda event: event == "away"):
                async with site.following(held) as one:
                    if not is_away:
                        held = (await one.newest()).received
                for event in group:
                    if event == "announce":
                        pair = site.frames.announce()
                    elif event in ("change", "keyframe", "plan"):
                        moved = site.frames.model + RNG.standard_normal(MANIFEST.size).astype(np.float32)
                        plan = PLAN.model_copy(update={"fraction": float(RNG.uniform(0.1, 1))}) if event == "plan" else None
                        pair = site.frames.next(moved, with_keyframe=event == "keyframe", plan=plan)
                    elif event == "nothing":
                        pair = site.frames.next(version=site.frames.version + 1)
                    await site.send(pair)
            async with site.following(held) as one:
                await one.newest()

    with capture_logs() as logs:
        asyncio.run(live())
    assert not errors(logs)


# What frames make of a model


def test_changes_are_checked_against_the_digest_of_the_last():
    frames = Broadcaster("ward", MANIFEST)
    start = received_by(frames.first(SEEDED)[1], SEEDED)
    steps = [frames.next(SEEDED * factor)[1] for factor in (2, 3, 4)]
    reached = advance(start, steps, manifest=MANIFEST)
    assert (reached.number, reached.digest) == (4, digest(frames.model))
    assert start.model is SEEDED
    with pytest.raises(DecodeError, match="frame 4 yields another model"):
        advance(start, steps[1:], manifest=MANIFEST)
    with pytest.raises(DecodeError, match="frame 3 yields another model"):
        advance(start, [*steps[:1], steps[1].model_copy(update={"digest": "0" * 64})], manifest=MANIFEST)


def test_frame_that_changes_nothing_keeps_the_digest():
    frames = Broadcaster("ward", MANIFEST)
    start = received_by(frames.first(SEEDED)[1], SEEDED)
    frame = frames.next(version=7)[1]
    assert advance(start, [frame], manifest=MANIFEST).version == 7
    with pytest.raises(DecodeError, match="frame 2"):
        advance(start, [frame.model_copy(update={"digest": "0" * 64})], manifest=MANIFEST)
    assert wire.encode(frame) == wire.encode(frame)
