"""Reading broadcasts from a log, over both transports; and opening them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from structlog.testing import capture_logs

from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.config import BrokerSettings
from broker_fl.errors import BrokerUnavailableError, DecodeError, ManifestMismatchError
from broker_fl.parameters import digest, manifest_of
from broker_fl.topology import Binding, Exchange, Policy, Queue, Topology
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.model_log import LatestBody, ReceivedModel, follow_frames, open_frame
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Message, Transport
from schemas import wire
from schemas.frame import ModelFrame, TrainingPlan

LOG = "fl.digits.model.log"
TOPOLOGY = Topology((Exchange("model", "fanout"),), (Queue(LOG, "stream"),), (Binding("model", LOG),))


@dataclass(frozen=True, slots=True)
class Broker:
    connect: Callable[[], AbstractAsyncContextManager[Transport]]
    apply_policy: Callable[[dict[str, int]], Awaitable[None]]
    delete_log: Callable[[], Awaitable[None]]


@pytest.fixture(params=["memory", pytest.param("amqp", marks=pytest.mark.rabbitmq)])
def broker(request) -> Broker:
    if request.param == "memory":
        return in_memory()
    vhost = request.getfixturevalue("vhost")
    return Broker(
        connect=lambda: amqp_connect(BrokerSettings(url=SecretStr(vhost.url)))("test"),
        apply_policy=lambda definition: vhost.management.apply_policies([log_policy(definition)]),
        delete_log=lambda: vhost.management.delete_queue(LOG),
    )


def in_memory() -> Broker:
    memory = MemoryBroker()

    async def apply_policy(definition: dict[str, int]) -> None:
        memory.apply_policies((log_policy(definition),))

    async def delete_log() -> None:
        memory.delete_queue(LOG)

    return Broker(connect=lambda: memory.connect("test"), apply_policy=apply_policy, delete_log=delete_log)


def log_policy(definition: dict[str, int]) -> Policy:
    return Policy("log", r"model\.log$", "queues", definition)


@asynccontextmanager
async def connected(broker: Broker) -> AsyncIterator[Transport]:
    async with broker.connect() as transport:
        await transport.declare(TOPOLOGY)
        yield transport


def body_of(number: int, *, size: int = 0) -> bytes:
    return b"frame %03d " % number + bytes(size)


def number_in(body: bytes) -> int:
    return int(body[6:9])


def message_of(number: int, *, size: int = 0) -> Message:
    return Message("model", body_of(number, size=size), message_id=f"id-{number}", headers={"x-fl-number": number})


def parts_of(number: int, *, parts: int, part_bytes: int = 500) -> list[Message]:
    size = parts * part_bytes - len(body_of(number))
    found = list(split(message_of(number, size=size), part_bytes=part_bytes, limit_bytes=0))
    assert len(found) == parts
    return found


async def publish(transport: Transport, *messages: Message) -> None:
    for message in messages:
        await transport.publish(message)


async def numbers_until(transport: Transport, last: int) -> list[int]:
    """Of the frames that a follower yields, up to this one."""
    found: list[int] = []
    async with asyncio.timeout(20), aclosing(follow_frames(transport, LOG, name="test")) as frames:
        async for body in frames:
            found.append(number_in(body))
            if found[-1] == last:
                break
    return found


# Following


async def test_newest_whole_frame_is_found_and_older_ones_only_before_it(broker):
    async with connected(broker) as transport:
        await publish(transport, *map(message_of, range(1, 6)))
        found = await numbers_until(transport, 5)
    assert found == list(range(1, 6))[-len(found) :]


async def test_burst_of_frames_is_yielded_in_order(broker):
    async with connected(broker) as transport:
        await asyncio.gather(*(transport.publish(message_of(number)) for number in range(1, 30)))
        found = await numbers_until(transport, 29)
    assert found == list(range(1, 30))[-len(found) :]


async def test_frames_that_come_later_are_yielded_as_they_come(broker):
    async with connected(broker) as transport:
        await publish(transport, message_of(1))
        async with asyncio.timeout(20), aclosing(follow_frames(transport, LOG, name="test")) as frames:
            assert number_in(await anext(frames)) == 1
            await publish(transport, message_of(2), *parts_of(3, parts=3), message_of(4))
            assert [number_in(await anext(frames)) for _ in range(3)] == [2, 3, 4]


async def test_follower_of_an_empty_log_waits_for_the_first_frame(broker):
    async with connected(broker) as transport:
        waiting = asyncio.create_task(numbers_until(transport, 1))
        await publish(transport, *parts_of(1, parts=4))
        assert await waiting == [1]


@pytest.mark.parametrize("parts", [2, 40, 80])
async def test_newest_frame_is_found_whole_where_the_log_is_entered_in_the_middle_of_it(broker, parts: int):
    await broker.apply_policy({"stream-max-segment-size-bytes": 5_000})
    async with connected(broker) as transport:
        for number in (1, 2, 3):
            await publish(transport, *parts_of(number, parts=parts))
        found = await numbers_until(transport, 3)
    assert found == [1, 2, 3][-len(found) :]


async def test_entering_the_newest_frame_in_its_middle_does_not_read_the_whole_log(broker):
    async with connected(broker) as transport:
        for number in range(1, 6):
            await publish(transport, *parts_of(number, parts=30))
        assert len(await numbers_until(transport, 5)) <= 2


async def test_frame_in_one_message_after_frames_in_parts_is_found(broker):
    async with connected(broker) as transport:
        await publish(transport, *parts_of(1, parts=40), message_of(2))
        assert (await numbers_until(transport, 2))[-1] == 2


async def test_frame_whose_beginning_is_gone_is_left_out_and_the_next_one_is_taken(broker):
    await broker.apply_policy({"stream-max-segment-size-bytes": 100_000, "max-length-bytes": 300_000})
    async with connected(broker) as transport:
        await publish(transport, *parts_of(1, parts=60, part_bytes=20_000))
        await until_beginning_is_gone(transport)
        waiting = asyncio.create_task(numbers_until(transport, 2))
        await publish(transport, *parts_of(2, parts=4, part_bytes=20_000))
        assert await waiting == [2]


async def until_beginning_is_gone(transport: Transport) -> None:
    """RabbitMQ takes its time to delete a segment."""
    async with asyncio.timeout(20):
        while True:
            async with transport.follow(LOG, start="first", name="test") as feed:
                if (await feed.receive()).headers["x-fl-part"] != 0:
                    return
            await asyncio.sleep(0.05)


async def test_frame_that_was_cut_short_and_sent_again_is_yielded_once(broker):
    async with connected(broker) as transport:
        await publish(transport, *parts_of(1, parts=30))
        async with asyncio.timeout(20), aclosing(follow_frames(transport, LOG, name="test")) as frames:
            assert number_in(await anext(frames)) == 1
            await publish(transport, *parts_of(2, parts=30)[:20])
            await publish(transport, *parts_of(2, parts=30), message_of(3))
            assert [number_in(await anext(frames)) for _ in range(2)] == [2, 3]
        assert (await numbers_until(transport, 3))[-2:] in ([2, 3], [3])


async def test_damaged_parts_are_left_out_with_a_warning_and_the_next_frame_is_taken(broker):
    first, *others = parts_of(2, parts=5)
    async with connected(broker) as transport:
        await publish(transport, message_of(1))
        with capture_logs() as logs:
            async with asyncio.timeout(20), aclosing(follow_frames(transport, LOG, name="test")) as frames:
                assert number_in(await anext(frames)) == 1
                await publish(transport, replace(first, body=b"x" * len(first.body)), *others)
                await publish(transport, replace(first, headers={**first.headers, "x-fl-part": "0"}))
                await publish(transport, *parts_of(3, parts=5))
                assert number_in(await anext(frames)) == 3
    assert [(entry["log_level"], entry["message_id"]) for entry in logs] == [("warning", "id-2")] * 2


async def test_log_that_is_deleted_ends_its_followers(broker):
    async with connected(broker) as transport:
        await publish(transport, message_of(1))
        async with asyncio.timeout(20), aclosing(follow_frames(transport, LOG, name="test")) as frames:
            assert number_in(await anext(frames)) == 1
            await broker.delete_log()
            with pytest.raises(BrokerUnavailableError):
                await anext(frames)


# Repeated parts


@st.composite
def with_any_repeats(draw: st.DrawFn) -> list[int]:
    """The parts in order, and after each some that were there already."""
    sequence: list[int] = []
    for index in range(draw(st.integers(2, 6))):
        sequence += [index, *draw(st.lists(st.integers(0, index), max_size=3))]
    return sequence


@st.composite
def with_restarts(draw: st.DrawFn) -> list[int]:
    """Beginnings that were cut short, then all parts in order, and after each some that were there already, but not the first."""
    parts = draw(st.integers(2, 6))
    sequence = [index for length in draw(st.lists(st.integers(1, parts - 1), max_size=3)) for index in range(length)]
    sequence.append(0)
    for index in range(1, parts):
        sequence += [index, *draw(st.lists(st.integers(1, index), max_size=3))]
    return sequence


@settings(deadline=None, max_examples=50)
@given(with_restarts())
def test_frame_is_put_together_from_beginnings_cut_short_and_repeated_parts(sequence: list[int]):
    assert yielded(sequence) == [1, 2]


@settings(deadline=None, max_examples=50)
@given(with_any_repeats())
def test_frame_is_put_together_from_any_repeated_parts(sequence: list[int]):
    assert yielded(sequence) == [1, 2]


def yielded(sequence: list[int]) -> list[int]:
    """What a follower makes of two frames, the first of which came in this sequence of its parts; a repeated one counts once."""

    async def follow() -> list[int]:
        async with connected(in_memory()) as transport:
            await publish(transport, message_of(0))
            found: dict[int, None] = {}
            async with aclosing(follow_frames(transport, LOG, name="test")) as frames:
                assert number_in(await anext(frames)) == 0
                parts = parts_of(1, parts=max(sequence) + 1)
                await publish(transport, *(parts[index] for index in sequence), message_of(2))
                while 2 not in found:
                    found[number_in(await anext(frames))] = None
            return [number for number in found if number]

    with capture_logs():
        return asyncio.run(asyncio.wait_for(follow(), 10))


# The newest of a burst


async def test_who_takes_the_latest_body_gets_the_newest_of_a_burst_and_each_once():
    latest = LatestBody()
    async with asyncio.timeout(5):
        taking = asyncio.create_task(latest.get())
        await asyncio.sleep(0)
        for number in range(5):
            latest.put(body_of(number))
            await asyncio.sleep(0)
        assert number_in(await taking) == 4
        again = asyncio.create_task(latest.get())
        await asyncio.sleep(0.05)
        assert not again.done()
        latest.put(body_of(5))
        assert number_in(await again) == 5


async def test_latest_body_that_waits_already_is_taken_at_once():
    latest = LatestBody()
    latest.put(body_of(1))
    latest.put(body_of(2))
    async with asyncio.timeout(5):
        assert number_in(await latest.get()) == 2


# Opening

MODEL = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, np.float32)}
MANIFEST = manifest_of(MODEL)
VECTOR = np.concatenate([tensor.reshape(-1) for tensor in MODEL.values()])


def frame(**changes: object) -> ModelFrame:
    payload = encode(VECTOR, parse_codec("float32"), manifest=MANIFEST, generator=np.random.default_rng(0))
    fields = {
        "federation": "digits",
        "ledger": "0" * 32,
        "number": 7,
        "version": 12,
        "digest": digest(VECTOR),
        "manifest": MANIFEST,
        "codec": "float32",
        "training": TrainingPlan(),
        "update_codec": "int8",
        "fraction": 1.0,
        "repeat": False,
        "over": False,
        "payload": payload,
    }
    return ModelFrame(**(fields | changes))


def opened(body: bytes) -> ReceivedModel:
    return open_frame(body, federation="digits", manifest=MANIFEST)


def test_opened_frame_holds_the_very_bits_of_the_model():
    received = opened(wire.encode(frame()))
    assert received.frame == frame()
    assert received.model.tobytes() == VECTOR.tobytes()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"federation": "letters"}, "federation 'letters', not 'digits'"),
        ({"digest": hashlib.sha256(b"").hexdigest()}, "frame 7 decodes to another model"),
        ({"payload": np.zeros(8, np.float32).tobytes()}, "frame 7 decodes to another model"),
        ({"payload": bytes(31)}, "32 bytes, not 31"),
    ],
)
def test_frame_that_is_not_what_it_says_is_a_decode_error(changed: dict[str, object], match: str):
    with pytest.raises(DecodeError, match=match):
        opened(wire.encode(frame(**changed)))


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        (manifest_of({"weight": np.zeros((3, 2), np.float32), "bias": np.ones(2, np.float32)}), "weight"),
        (manifest_of({"weight": np.zeros((2, 3), np.float32)}), "expected 1 tensors, this model has 2"),
    ],
)
def test_frame_of_another_model_is_a_manifest_mismatch_that_names_the_difference(manifest, match: str):
    with pytest.raises(ManifestMismatchError, match=match):
        opened(wire.encode(frame(manifest=manifest)))


@pytest.mark.parametrize("body", [b"", b"no frame", wire.encode(frame())[:-1]])
def test_body_that_is_no_frame_is_a_decode_error(body: bytes):
    with pytest.raises(DecodeError):
        opened(body)


def test_newer_is_the_higher_number_of_a_ledger_and_anything_of_another_ledger():
    held = opened(wire.encode(frame()))
    for changed, is_newer in (
        ({"number": 8}, True),
        ({"number": 7}, False),
        ({"number": 6}, False),
        ({"ledger": "1" * 32}, True),
    ):
        assert opened(wire.encode(frame(**changed))).is_newer_than(held) is is_newer
    assert held.is_newer_than(None)
