"""Following the model with the federation's key: what it did not sign is as good as not sent, whoever sent it."""

import asyncio
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from broadcasting import Broadcaster, messages, publish
from enrolled_parties import FEDERATION_KEY, key_of
from structlog.testing import capture_logs

from broker_fl.parameters import manifest_of
from broker_fl.signing import SIGNATURE, body_statement
from broker_fl.topology import Names, shared
from broker_fl.transports.following import Follower
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.model_log import read_newest
from schemas import wire
from schemas.frame import ModelFrame

NAMES = Names("ward")
MANIFEST = manifest_of({"weight": np.zeros(3000, np.float32)})
INITIAL = np.ones(MANIFEST.size, np.float32)
FORGED = np.full(MANIFEST.size, 666, np.float32)
MALLORY = key_of("mallory")


class Stage:
    """A broker that anybody may write to, an honest aggregator, and one who follows."""

    def __init__(self, broker, transport, follower, pending):
        self.broker = broker
        self.transport = transport
        self.follower = follower
        self._pending = pending
        self.frames = Broadcaster("ward", MANIFEST)
        self.part_bytes = None

    async def send(self, pair, key=FEDERATION_KEY):
        return await publish(self.transport, pair, part_bytes=self.part_bytes, key=key)

    async def begin(self, **facts):
        return await self.send(self.frames.first(2 * INITIAL, **facts))

    async def go_on(self, **facts):
        return await self.send(self.frames.next(self.frames.model + np.float32(1), **facts))

    async def next(self):
        return await self.follower.next(self.transport, self._pending)

    async def left_out(self):
        """Takes what is pending, which leads nowhere; gives why it was left out."""
        with capture_logs() as logs:
            assert await self.next() is None
        return [told["reason"] for told in logs if told["event"] == "broadcast left out"]

    async def newest(self):
        """Up to what the honest one broadcast last, to the last bit."""
        async with asyncio.timeout(10):
            while (progress := await self.next()) is None or progress.received.number < self.frames.number:
                pass
        assert progress.received.model.tobytes() == self.frames.model.tobytes()
        return progress

    def forged(self):
        """The next frame as somebody else would have it."""
        other = replace(self.frames)
        return other.next(FORGED)


@pytest.fixture
async def stage():
    async with _stage(federation_key=FEDERATION_KEY.public) as one:
        yield one


@asynccontextmanager
async def _stage(*, broker=None, held=None, **facts):
    if broker is None:
        broker = MemoryBroker()
        broker.declare(shared("ward"))
    follower = Follower(federation="ward", manifest=MANIFEST, initial=INITIAL, name="test", patience_s=0.5, **facts)
    follower.held = held
    pending = follower.new_pending()
    async with asyncio.timeout(20), broker.connect("anybody") as transport, asyncio.TaskGroup() as group:

        async def read():
            async with aclosing(read_newest(transport, NAMES.model_log, name="test", traffic=follower.traffic)) as broadcasts:
                async for broadcast in broadcasts:
                    pending.put(broadcast)

        reading = group.create_task(read())
        try:
            yield Stage(broker, transport, follower, pending)
        finally:
            reading.cancel()


@pytest.mark.parametrize("part_bytes", [None, 2000])
async def test_signed_frames_are_followed_whole_and_in_parts_with_keyframes_and_without(stage, part_bytes):
    stage.part_bytes = part_bytes
    await stage.begin()
    assert (await stage.newest()).is_anew
    await stage.go_on()
    assert not (await stage.newest()).is_anew
    await stage.go_on(with_keyframe=True)
    await stage.newest()


@pytest.mark.parametrize("key", [None, MALLORY], ids=["unsigned", "by another key"])
async def test_frame_that_the_federation_did_not_sign_is_left_out_and_the_true_one_is_followed(stage, key):
    await stage.begin()
    await stage.newest()
    await stage.send(stage.forged(), key=key)
    (reason,) = await stage.left_out()
    assert reason.startswith(f"it is not signed by the federation's key {FEDERATION_KEY.public[:12]}: somebody else sent it")
    assert stage.follower.held.number == 1
    await stage.go_on()
    await stage.newest()


async def test_beside_true_ones_in_one_burst_it_is_left_out_too(stage):
    await stage.begin()
    await stage.newest()
    await stage.send(stage.forged(), key=MALLORY)
    await stage.go_on()
    await stage.send(stage.forged(), key=None)
    await stage.newest()


@pytest.mark.parametrize(
    "signature",
    [
        lambda body: FEDERATION_KEY.sign("receipt", body_statement(body)),
        lambda body: FEDERATION_KEY.sign("frame", body_statement(body + b"x")),
        lambda body: FEDERATION_KEY.sign("frame", body),
        lambda body: FEDERATION_KEY.sign("frame", body_statement(body)).upper(),
        lambda _: "",
        lambda _: 7,
    ],
    ids=["of a receipt", "of another body", "of no statement", "upper case", "empty", "a number"],
)
async def test_what_is_no_signature_of_this_frame_is_none(stage, signature):
    await stage.begin()
    await stage.newest()
    _, frame = stage.forged()
    (message,) = messages(NAMES.model, frame)
    await stage.transport.publish(replace(message, headers={**message.headers, SIGNATURE: signature(message.body)}))
    assert len(await stage.left_out()) == 1


async def test_frame_that_was_changed_on_its_way_is_left_out(stage):
    await stage.begin()
    await stage.newest()
    _, frame = stage.frames.next(stage.frames.model + np.float32(1))
    (message,) = messages(NAMES.model, frame, key=FEDERATION_KEY)
    body = wire.encode(frame.model_copy(update={"over": True}))
    await stage.transport.publish(replace(message, body=body))
    assert len(await stage.left_out()) == 1
    await stage.transport.publish(message)
    assert not (await stage.newest()).received.over


async def test_frame_of_another_federation_with_the_same_key_is_left_out(stage):
    await stage.begin()
    await stage.newest()
    _, frame = stage.forged()
    (message,) = messages(NAMES.model, frame.model_copy(update={"federation": "banks"}), key=FEDERATION_KEY)
    await stage.transport.publish(message)
    assert await stage.left_out() == ["the frame is of federation 'banks', not 'ward'"]


async def test_frame_that_is_sent_once_more_takes_nobody_back(stage):
    """It is signed, and goes for ever: its number tells that it is old."""
    old = [stage.frames.first(2 * INITIAL)]
    await stage.send(old[0])
    await stage.newest()
    for _ in range(3):
        old.append(stage.frames.next(stage.frames.model + np.float32(1)))
        await stage.send(old[-1])
        await stage.newest()
    for pair in old[:-1]:
        await stage.send((None, pair[1]))
        assert await stage.next() is None
    assert stage.follower.held.number == 4
    await stage.go_on()
    assert not (await stage.newest()).is_anew


async def test_newcomer_waits_for_a_keyframe_that_the_federation_signed(stage):
    keyframe, announcement = stage.frames.first(2 * INITIAL)
    forged, _ = replace(stage.frames).next(FORGED, with_keyframe=True)
    forged = forged.model_copy(update={"number": 1})
    for message in messages(NAMES.keyframes, forged, key=MALLORY):
        await stage.transport.publish(message)
    for message in messages(NAMES.model, announcement, key=FEDERATION_KEY):
        await stage.transport.publish(message)
    waiting = asyncio.create_task(stage.newest())
    with capture_logs() as logs:
        while not any(told["event"] == "broadcast left out" for told in logs):  # noqa: ASYNC110 - it happens in another task
            await asyncio.sleep(0.001)
    assert not waiting.done()
    for message in messages(NAMES.keyframes, keyframe, key=FEDERATION_KEY):
        await stage.transport.publish(message)
    assert (await waiting).is_anew


async def test_what_was_missed_is_read_from_a_log_that_others_wrote_into(stage):
    await stage.begin()
    held = (await stage.newest()).received
    await stage.go_on()
    forged = await stage.send(stage.forged(), key=MALLORY)
    await stage.go_on()
    async with _stage(broker=stage.broker, held=held, federation_key=FEDERATION_KEY.public) as late:
        late.frames = stage.frames
        progress = await late.newest()
    assert not progress.is_anew
    # The announcement of the held one is read again, too.
    assert [wire.decode(ModelFrame, body).number for body in progress.bodies] == [1, 2, 3]
    assert wire.encode(forged) not in progress.bodies


async def test_without_a_key_any_frame_is_followed():
    async with _stage() as stage:
        await stage.send(stage.frames.first(2 * INITIAL), key=None)
        await stage.newest()
        await stage.send(stage.frames.next(FORGED), key=MALLORY)
        await stage.newest()
