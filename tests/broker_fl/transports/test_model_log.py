"""Reading broadcasts from a log, over both transports."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from structlog.testing import capture_logs

from broker_fl.config import BrokerSettings
from broker_fl.errors import BrokerUnavailableError
from broker_fl.topology import Binding, Exchange, Policy, Queue, Topology
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.model_log import Broadcast, Pending, Place, Traffic, read_from, read_newest, read_queue
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Message, Transport

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
    return Message(
        "model", body_of(number, size=size), message_id=f"id-{number}", headers={"x-fl-number": number, "x-fl-kind": "delta"}
    )


def parts_of(number: int, *, parts: int, part_bytes: int = 500) -> list[Message]:
    size = parts * part_bytes - len(body_of(number))
    found = list(split(message_of(number, size=size), part_bytes=part_bytes, limit_bytes=0))
    assert len(found) == parts
    return found


async def publish(transport: Transport, *messages: Message) -> None:
    for message in messages:
        await transport.publish(message)


def newest(transport: Transport, traffic: Traffic | None = None) -> AsyncGenerator[Broadcast, None]:
    return read_newest(transport, LOG, name="test", traffic=traffic or Traffic())


async def numbers_until(transport: Transport, last: int) -> list[int]:
    """Of the frames that a reader yields, up to this one."""
    found: list[int] = []
    async with asyncio.timeout(20), aclosing(newest(transport)) as frames:
        async for broadcast in frames:
            found.append(number_in(broadcast.body))
            if found[-1] == last:
                break
    return found


# From the newest frame on


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
        async with asyncio.timeout(20), aclosing(newest(transport)) as frames:
            assert number_in((await anext(frames)).body) == 1
            await publish(transport, message_of(2), *parts_of(3, parts=3), message_of(4))
            assert [number_in((await anext(frames)).body) for _ in range(3)] == [2, 3, 4]


async def test_reader_of_an_empty_log_waits_for_the_first_frame(broker):
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
        async with asyncio.timeout(20), aclosing(newest(transport)) as frames:
            assert number_in((await anext(frames)).body) == 1
            await publish(transport, *parts_of(2, parts=30)[:20])
            await publish(transport, *parts_of(2, parts=30), message_of(3))
            assert [number_in((await anext(frames)).body) for _ in range(2)] == [2, 3]
        assert (await numbers_until(transport, 3))[-2:] in ([2, 3], [3])


async def test_damaged_parts_are_left_out_with_a_warning_and_the_next_frame_is_taken(broker):
    first, *others = parts_of(2, parts=5)
    async with connected(broker) as transport:
        await publish(transport, message_of(1))
        with capture_logs() as logs:
            async with asyncio.timeout(20), aclosing(newest(transport)) as frames:
                assert number_in((await anext(frames)).body) == 1
                await publish(transport, replace(first, body=b"x" * len(first.body)), *others)
                await publish(transport, replace(first, headers={**first.headers, "x-fl-part": "0"}))
                await publish(transport, *parts_of(3, parts=5))
                assert number_in((await anext(frames)).body) == 3
    assert [(entry["log_level"], entry["message_id"]) for entry in logs] == [("warning", "id-2")] * 2


async def test_log_that_is_deleted_ends_its_readers(broker):
    async with connected(broker) as transport:
        await publish(transport, message_of(1))
        async with asyncio.timeout(20), aclosing(newest(transport)) as frames:
            assert number_in((await anext(frames)).body) == 1
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
    """What a reader makes of two frames, the first of which came in this sequence of its parts; a repeated one counts once."""

    async def follow() -> list[int]:
        async with connected(in_memory()) as transport:
            await publish(transport, message_of(0))
            found: dict[int, None] = {}
            async with aclosing(newest(transport)) as frames:
                assert number_in((await anext(frames)).body) == 0
                parts = parts_of(1, parts=max(sequence) + 1)
                await publish(transport, *(parts[index] for index in sequence), message_of(2))
                while 2 not in found:
                    found[number_in((await anext(frames)).body)] = None
            return [number for number in found if number]

    with capture_logs():
        return asyncio.run(asyncio.wait_for(follow(), 10))


# From some frame on


async def numbers_from(
    transport: Transport,
    number: int,
    *,
    until: int,
    near: Place | None = None,
    or_newer: bool = False,
    traffic: Traffic | None = None,
) -> list[int]:
    found: list[int] = []
    reading = read_from(transport, LOG, number, or_newer=or_newer, near=near, name="test", traffic=traffic or Traffic())
    async with asyncio.timeout(20), aclosing(reading) as broadcasts:
        async for broadcast in broadcasts:
            assert broadcast.place is not None
            assert broadcast.place.number == number_in(broadcast.body)
            found.append(number_in(broadcast.body))
            if found[-1] == until:
                break
    return found


async def newest_place(transport: Transport) -> Place | None:
    async with asyncio.timeout(20), aclosing(newest(transport)) as broadcasts:
        return (await anext(broadcasts)).place


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("wanted", [1, 40, 59, 60])
async def test_log_is_read_from_a_frame_on_and_not_from_far_before_it(broker, parts: int, wanted: int):
    async with connected(broker) as transport:
        for number in range(1, 61):
            await publish(transport, *(parts_of(number, parts=parts) if parts > 1 else [message_of(number)]))
        near = await newest_place(transport)
        found = await numbers_from(transport, wanted, until=60, near=near)
    assert found == list(range(found[0], 61))
    assert wanted - (60 - wanted) - 12 <= found[0] <= wanted


@pytest.mark.parametrize("parts", [1, 5])
async def test_log_is_read_from_a_frame_on_without_a_known_place(broker, parts: int):
    await broker.apply_policy({"stream-max-segment-size-bytes": 5_000})
    async with connected(broker) as transport:
        for number in range(1, 61):
            await publish(transport, *(parts_of(number, parts=parts) if parts > 1 else [message_of(number)]))
        found = await numbers_from(transport, 31, until=60)
    assert found == list(range(found[0], 61))
    assert found[0] <= 31


async def test_frames_of_very_different_sizes_are_found_further_back(broker):
    async with connected(broker) as transport:
        for number in range(1, 31):
            await publish(transport, *parts_of(number, parts=20))
        await publish(transport, message_of(31))
        found = await numbers_from(transport, 20, until=31, near=await newest_place(transport))
    assert found[0] <= 20
    assert found == list(range(found[0], 32))


async def test_log_whose_wanted_frame_is_gone_is_read_from_its_beginning(broker):
    async with connected(broker) as transport:
        await publish(transport, *map(message_of, range(40, 61)))
        found = await numbers_from(transport, 3, until=60, near=await newest_place(transport))
    assert found == list(range(40, 61))


async def test_newer_frame_that_is_good_enough_is_taken_as_it_is(broker):
    async with connected(broker) as transport:
        for number in (10, 20, 30):
            await publish(transport, *parts_of(number, parts=6))
        found = await numbers_from(transport, 10, until=30, or_newer=True)
    assert found == [10, 20, 30][-len(found) :]


async def test_only_the_first_frame_that_would_do_is_entered_again():
    """The log in memory gives the very last message first; a newer frame costs no more than its own parts, and a few before."""
    async with connected(in_memory()) as transport:
        for number in (10, 20, 30):
            await publish(transport, *parts_of(number, parts=6))
        traffic = Traffic()
        assert await numbers_from(transport, 10, until=30, or_newer=True, traffic=traffic) == [30]
    assert traffic.take()["bytes_down"] <= 500 * 13


# What it costs


async def test_all_that_is_read_is_counted_again_where_it_is_read_again():
    traffic = Traffic()
    async with connected(in_memory()) as transport:
        await publish(transport, message_of(1), *parts_of(2, parts=4), message_of(3))
        async with asyncio.timeout(20), aclosing(newest(transport, traffic)) as frames:
            await anext(frames)
        assert traffic.take() == {"bytes_down": len(body_of(3)), "frames_received": 1, "deltas_received": 1}
        assert traffic.take() == {}
        found = await numbers_from(transport, 2, until=3, near=Place(offset=8, number=3, part=0, parts=1), traffic=traffic)
    assert found[-2:] == [2, 3]
    assert traffic.take()["bytes_down"] >= 4 * 500 + len(body_of(3))


async def test_who_counts_is_told_of_every_message_and_the_codec_that_it_names():
    told = []
    traffic = Traffic(lambda codec, size: told.append((codec, size)))
    named = [replace(part, headers={**part.headers, "x-fl-codec": "int8"}) for part in parts_of(1, parts=2, part_bytes=500)]
    nonsense = replace(message_of(2), headers={"x-fl-number": 2, "x-fl-codec": 8})
    async with connected(in_memory()) as transport, transport.listen("model", name="test") as feed:
        await publish(transport, *named, nonsense, message_of(3))
        async with asyncio.timeout(20), aclosing(read_queue(feed, traffic=traffic)) as broadcasts:
            for number in (1, 2, 3):
                assert number_in((await anext(broadcasts)).body) == number
    sizes = [len(message.body) for message in (*named, nonsense, message_of(3))]
    assert told == list(zip(("int8", "int8", "", ""), sizes, strict=True))
    assert traffic.take()["bytes_down"] == sum(sizes)


async def test_own_queue_gives_whole_bodies_and_leaves_out_what_began_before(broker):
    async with connected(broker) as transport, transport.listen("model", name="test") as feed:
        await publish(transport, *parts_of(1, parts=3)[1:], *parts_of(2, parts=3), message_of(3))
        with capture_logs() as logs:
            async with asyncio.timeout(20), aclosing(read_queue(feed, traffic=Traffic())) as broadcasts:
                found = [number_in((await anext(broadcasts)).body) for _ in range(2)]
    assert found == [2, 3]
    assert {entry["message_id"] for entry in logs} == {"id-1"}


# What waits


def waiting(number: int, *, size: int = 0) -> Broadcast:
    return Broadcast(body_of(number, size=size), None)


async def test_who_takes_what_is_pending_gets_all_of_a_burst_in_order_and_each_once():
    pending = Pending(most_bytes=1000)
    async with asyncio.timeout(5):
        taking = asyncio.create_task(pending.take())
        await asyncio.sleep(0)
        for number in range(5):
            pending.put(waiting(number))
            await asyncio.sleep(0)
        assert [number_in(one.body) for one in await taking] == [0, 1, 2, 3, 4]
        again = asyncio.create_task(pending.take())
        await asyncio.sleep(0.05)
        assert not again.done()
        pending.put(waiting(5))
        assert [number_in(one.body) for one in await again] == [5]


async def test_no_more_waits_than_is_worth_it_and_the_newest_always():
    pending = Pending(most_bytes=1000)
    for number in range(10):
        pending.put(waiting(number, size=300))
    assert number_in(pending.newest().body) == 9
    assert [number_in(one.body) for one in await pending.take()] == [7, 8, 9]
    pending.put(waiting(10, size=5000))
    assert [number_in(one.body) for one in await pending.take()] == [10]
    assert pending.newest() is None
