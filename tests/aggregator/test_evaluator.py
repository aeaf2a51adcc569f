import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from broadcasting import Broadcaster, publish
from structlog.testing import capture_logs

from aggregator.evaluator import Evaluator, Score
from broker_fl.errors import BrokerUnavailableError, ManifestMismatchError, NotFoundError, UntrustedBrokerError
from broker_fl.parameters import manifest_of
from broker_fl.transports.transport import Message


class Scorer:
    """Takes the model's first number for its accuracy. May be held."""

    def __init__(self):
        self.seen = []
        self.began = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self, model):
        self.began.set()
        assert self.goes_on.wait(10)
        self.seen.append(float(model[0]))
        return Score(accuracy=float(model[0]), loss=0.25, count=360)


class Studio:
    """A broker that frames are broadcast on, and the evaluator."""

    def __init__(self, ward):
        self.ward = ward
        self.scorer = Scorer()
        self.frames = None
        self.last = None

    async def broadcast(self, number, *, accuracy, version=None, over=False, ledger_id="a" * 32, part_bytes=None):
        """The first frame as a keyframe and its announcement; then changes. A number that was there already: that frame again."""
        manifest = self.ward.bench.manifest
        model = np.full(manifest.size, accuracy, np.float32)
        version = number if version is None else version
        if self.frames is None or self.frames.ledger != ledger_id:
            self.frames = Broadcaster(self.ward.names.federation, manifest, ledger=ledger_id, number=number - 1)
            self.last = self.frames.first(model, version=version, over=over)
        elif number > self.frames.number:
            self.last = self.frames.next(model, version=version, over=over)
        async with self.ward.broker.connect("aggregator") as transport:
            await publish(transport, self.last, part_bytes=part_bytes)

    async def publish(self, body):
        async with self.ward.broker.connect("aggregator") as transport:
            await transport.publish(Message(self.ward.names.model, body))

    @asynccontextmanager
    async def running(self, connect=None):
        evaluator = Evaluator(
            connect or self.ward.connect,
            self.scorer,
            federation=self.ward.names.federation,
            manifest=self.ward.bench.manifest,
            initial=np.zeros(self.ward.bench.manifest.size, np.float32),
            clock=lambda: 7.0,
        )
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            task = group.create_task(evaluator.run())
            try:
                yield task
            finally:
                evaluator.stop()


@pytest.fixture
def studio(ward):
    return Studio(ward)


async def test_frame_is_evaluated_and_its_score_told(studio):
    async with studio.ward.events("model.evaluated") as onlooker, studio.running():
        await studio.broadcast(1, accuracy=0.5, version=4)
        event = await onlooker.next("model.evaluated")
    assert event.version == 4
    assert event.at == 7.0
    assert event.facts == {"accuracy": 0.5, "loss": 0.25, "count": 360, "seconds": 0.0, "over": False}


async def test_each_new_frame_is_evaluated_once(studio):
    async with studio.ward.events("model.evaluated") as onlooker, studio.running():
        for number in (1, 2):
            await studio.broadcast(number, accuracy=number / 10)
            await onlooker.next("model.evaluated")
        # A restarted aggregator broadcasts its newest frame again.
        await studio.broadcast(2, accuracy=0.2)
        await studio.broadcast(3, accuracy=0.3)
        assert (await onlooker.next("model.evaluated")).version == 3
    assert studio.scorer.seen == [pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.3)]


async def test_frames_come_through_a_queue_of_its_own_and_not_from_the_log(studio):
    async with studio.ward.events("model.evaluated") as onlooker, studio.running():
        for number in (1, 2):
            await studio.broadcast(number, accuracy=number / 10)
            await onlooker.next("model.evaluated")
        studio.ward.broker.delete_queue(studio.ward.names.model_log)
        await studio.broadcast(3, accuracy=0.3)
        assert (await onlooker.next("model.evaluated")).version == 3


async def test_evaluator_ends_by_itself_after_the_last_frame(studio):
    async with studio.ward.events("model.evaluated") as onlooker, studio.running() as task:
        await studio.broadcast(1, accuracy=0.5, over=True)
        await task
        assert (await onlooker.next("model.evaluated")).facts["over"]


async def test_late_evaluator_takes_the_newest_frame_from_the_log(studio):
    for number in (1, 2, 3):
        await studio.broadcast(number, accuracy=number / 10, over=number == 3)
    async with studio.running() as task:
        await task
    assert studio.scorer.seen == [pytest.approx(0.3)]


async def test_late_evaluator_takes_the_newest_frame_though_the_log_begins_before_it(studio):
    """RabbitMQ gives the last chunk of a log, which may hold some frames, the oldest first."""

    class FromTheFirst:
        def __init__(self, transport):
            self._transport = transport

        def __getattr__(self, name):
            return getattr(self._transport, name)

        def follow(self, log, *, start, name):
            return self._transport.follow(log, start="first" if start == "last" else start, name=name)

    @asynccontextmanager
    async def connect(name):
        async with studio.ward.broker.connect(name) as transport:
            yield FromTheFirst(transport)

    for number in (1, 2, 3):
        await studio.broadcast(number, accuracy=number / 10, over=number == 3)
    async with studio.running(connect) as task:
        await task
    assert studio.scorer.seen[-1] == pytest.approx(0.3)


async def test_late_evaluator_puts_a_frame_in_parts_together(studio):
    await studio.broadcast(1, accuracy=0.1, part_bytes=1000)
    await studio.broadcast(2, accuracy=0.2, over=True, part_bytes=1000)
    async with studio.running() as task:
        await task
    assert studio.scorer.seen == [pytest.approx(0.2)]


async def test_slow_evaluator_goes_on_with_the_newest_frame(studio):
    async with studio.ward.events("model.evaluated") as onlooker, studio.running() as task:
        studio.scorer.goes_on.clear()
        await studio.broadcast(1, accuracy=0.1)
        assert await asyncio.to_thread(studio.scorer.began.wait, 10)
        for number in range(2, 8):
            await studio.broadcast(number, accuracy=number / 10, over=number == 7)
        studio.scorer.goes_on.set()
        assert (await onlooker.next("model.evaluated")).version == 1
        assert (await onlooker.next("model.evaluated")).version == 7
        await task
    assert len(studio.scorer.seen) == 2


async def test_broadcast_that_is_no_frame_is_left_out(studio):
    async with studio.ward.events("model.evaluated") as onlooker, studio.running():
        with capture_logs() as logs:
            await studio.publish(b"no frame")
            await studio.ward.until(lambda: any(line["event"] == "broadcast left out" for line in logs))
        await studio.broadcast(1, accuracy=0.5)
        assert (await onlooker.next("model.evaluated")).version == 1


async def test_frame_of_another_ledger_starts_again(studio):
    async with studio.ward.events("model.evaluated") as onlooker, studio.running():
        await studio.broadcast(9, accuracy=0.9)
        await onlooker.next("model.evaluated")
        await studio.broadcast(1, accuracy=0.1, ledger_id="b" * 32)
        assert (await onlooker.next("model.evaluated")).version == 1


async def test_another_model_ends_the_evaluator_with_its_difference(studio):
    studio.ward.bench.manifest = manifest_of({"other": np.zeros(3, np.float32)})
    await studio.broadcast(1, accuracy=0.5)
    studio.ward.bench.manifest = manifest_of({"mine": np.zeros(3, np.float32)})
    with pytest.RaisesGroup(ManifestMismatchError, flatten_subgroups=True, allow_unwrapped=True):
        async with studio.running() as task:
            await asyncio.shield(task)


async def test_broker_that_comes_back_is_waited_for(studio):
    attempts = 0

    @asynccontextmanager
    async def connect(name):
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise BrokerUnavailableError("not yet")
        async with studio.ward.broker.connect(name) as transport:
            yield transport

    async with studio.ward.events("model.evaluated") as onlooker, studio.running(connect):
        await studio.broadcast(1, accuracy=0.5)
        assert (await onlooker.next("model.evaluated")).version == 1
    studio.ward.broker.stop()
    studio.ward.broker.start()


async def test_frame_that_was_broadcast_while_the_broker_was_lost_is_evaluated(studio):
    async with studio.running() as task:
        await studio.broadcast(1, accuracy=0.1)
        await studio.ward.until(lambda: studio.scorer.seen)
        studio.ward.broker.stop()
        studio.ward.broker.start()
        await studio.broadcast(2, accuracy=0.2, over=True)
        await task
    assert studio.scorer.seen == [pytest.approx(0.1), pytest.approx(0.2)]


async def test_score_that_could_not_be_told_is_told_when_the_broker_is_back(studio):
    """Else the last frame would count as evaluated, and the evaluator never end."""

    class LostAtFirst:
        def __init__(self, transport):
            self._transport = transport

        def __getattr__(self, name):
            return getattr(self._transport, name)

        async def publish(self, message):
            nonlocal is_lost
            if not is_lost:
                is_lost = True
                raise BrokerUnavailableError("lost")
            await self._transport.publish(message)

    @asynccontextmanager
    async def connect(name):
        async with studio.ward.broker.connect(name) as transport:
            yield LostAtFirst(transport)

    is_lost = False
    async with studio.ward.events("model.evaluated") as onlooker, studio.running(connect) as task:
        await studio.broadcast(1, accuracy=0.5, over=True)
        assert (await onlooker.next("model.evaluated")).facts["over"]
        await task
    assert is_lost


@pytest.mark.parametrize("gone", [NotFoundError, UntrustedBrokerError])
async def test_broker_that_is_not_what_it_was_is_waited_for(studio, gone):
    """One that starts again does not know all of its queues and exchanges at once."""
    attempts = []

    @asynccontextmanager
    async def connect(name):
        attempts.append(name)
        if len(attempts) == 2:
            raise gone("no vhost, or an expired certificate")
        async with studio.ward.broker.connect(name) as transport:
            yield transport

    async with studio.running(connect) as task:
        await studio.broadcast(1, accuracy=0.1)
        await studio.ward.until(lambda: studio.scorer.seen)
        studio.ward.broker.stop()
        studio.ward.broker.start()
        await studio.broadcast(2, accuracy=0.2, over=True)
        await task
    assert len(attempts) == 3


async def test_broker_that_does_not_prove_who_it_is_ends_the_evaluator_that_starts(studio):
    def connect(_):
        raise UntrustedBrokerError("the certificate of the broker is from an unknown CA")

    with pytest.RaisesGroup(UntrustedBrokerError, flatten_subgroups=True, allow_unwrapped=True):
        async with studio.running(connect) as task:
            await asyncio.shield(task)


async def test_federation_that_is_not_there_ends_the_evaluator(studio):
    studio.ward.broker._exchanges.clear()
    with pytest.RaisesGroup(NotFoundError, flatten_subgroups=True, allow_unwrapped=True):
        async with studio.running() as task:
            await asyncio.shield(task)


async def test_changes_before_it_came_and_while_it_was_slow_are_followed_to_the_newest_model(studio):
    for number in range(1, 6):
        await studio.broadcast(number, accuracy=number / 10, part_bytes=700)
    async with studio.ward.events("model.evaluated") as onlooker, studio.running() as task:
        await onlooker.next("model.evaluated")
        studio.scorer.began.clear()
        studio.scorer.goes_on.clear()
        await studio.broadcast(6, accuracy=0.6)
        assert await asyncio.to_thread(studio.scorer.began.wait, 10)
        for number in range(7, 10):
            await studio.broadcast(number, accuracy=number / 10, over=number == 9)
        studio.scorer.goes_on.set()
        await task
    assert studio.scorer.seen == [pytest.approx(0.5), pytest.approx(0.6), pytest.approx(0.9)]
