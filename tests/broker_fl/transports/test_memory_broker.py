"""What only the broker in memory has: stopping it, looking into it, and doing all at once."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from broker_fl.errors import AuthenticationError, BrokerUnavailableError, NotFoundError
from broker_fl.topology import Binding, Exchange, Permissions, Policy, Queue, Topology, leadership
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.transport import Message

TOPOLOGY = Topology(
    (Exchange("x", "fanout"),),
    (Queue("q", "quorum", {"x-dead-letter-exchange": "dead"}), Queue("log", "stream")),
    (Binding("x", "q"), Binding("x", "log")),
)


async def broker_with(*texts: bytes) -> MemoryBroker:
    broker = MemoryBroker()
    async with broker.connect("test") as transport:
        await transport.declare(TOPOLOGY)
        for text in texts:
            await transport.publish(Message("x", text))
    return broker


async def test_stopped_broker_is_unavailable_until_it_starts_and_keeps_its_queues_and_logs():
    broker = await broker_with(b"1", b"2")
    broker.stop()
    with pytest.raises(BrokerUnavailableError):
        async with broker.connect("test"):
            pass
    broker.start()
    assert broker.depth("q") == 2
    async with (
        broker.connect("test") as transport,
        transport.consume("q", prefetch=5, name="c") as subscription,
        transport.follow("log", start="first", name="c") as feed,
    ):
        for source in (subscription, feed):
            assert [(await source.receive()).body for _ in range(2)] == [b"1", b"2"]


async def test_stopping_returns_each_message_once_however_many_consumers_there_are():
    broker = await broker_with(b"1")
    broker.apply_policies((Policy("limit", "^q$", "queues", {"delivery-limit": 2}),))
    for _ in range(2):
        async with broker.connect("one") as one, broker.connect("two") as two:
            async with one.consume("q", prefetch=1, name="c") as first, two.consume("q", prefetch=1, name="c"):
                assert (await first.receive()).body == b"1"
                broker.stop()
                assert broker.depth("q") == 1
            broker.start()
    assert broker.depth("q") == 1


async def test_transport_that_was_cut_stays_cut_when_the_broker_is_up_again():
    broker = await broker_with()
    async with broker.connect("test") as transport:
        broker.stop()
        broker.start()
        with pytest.raises(BrokerUnavailableError):
            await transport.publish(Message("x", b"1"))
    assert broker.depth("q") == 0


async def test_depth_counts_what_is_ready_and_not_what_is_handed_out():
    broker = await broker_with(b"1", b"2", b"3")
    async with broker.connect("test") as transport:
        assert broker.depth("q") == 3
        async with transport.consume("q", prefetch=2, name="c") as subscription:
            assert broker.depth("q") == 1
            await subscription.acknowledge((await subscription.receive()).tag)
            assert broker.depth("q") == 0
        assert broker.depth("q") == 2


async def test_connections_are_named_while_they_last():
    broker = MemoryBroker()
    async with broker.connect("one"), broker.connect("two"), broker.connect("two"):
        assert broker.connections() == ["one", "two", "two"]
    assert broker.connections() == []


async def test_only_the_administrator_and_the_users_of_the_broker_come_in():
    broker = MemoryBroker()
    broker.users["alice"] = Permissions("^$", "^$", "^$")
    async with broker.connect("test", user="alice") as transport:
        assert transport.user == "alice"
    del broker.users["alice"]
    with pytest.raises(AuthenticationError, match="alice"):
        async with broker.connect("test", user="alice"):
            pass


async def test_offsets_of_a_log_have_gaps():
    broker = await broker_with(*(b"%d" % number for number in range(20)))
    async with broker.connect("test") as transport, transport.follow("log", start="first", name="c") as feed:
        offsets = [(await feed.receive()).offset for _ in range(20)]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] - offsets[0] > 19


async def test_log_keeps_the_bytes_of_its_policy_and_always_its_newest_message():
    broker = MemoryBroker()
    broker.apply_policies((Policy("log", "^log$", "queues", {"max-length-bytes": 10}),))
    async with broker.connect("test") as transport:
        await transport.declare(TOPOLOGY)
        for text in (b"aaaa", b"bbbb", b"cccc"):
            await transport.publish(Message("x", text))
        async with transport.follow("log", start="first", name="c") as feed:
            assert [(await feed.receive()).body for _ in range(2)] == [b"bbbb", b"cccc"]
        await transport.publish(Message("x", b"d" * 50))
        async with transport.follow("log", start=0, name="c") as feed:
            assert (await feed.receive()).body == b"d" * 50
            assert feed.receive_nowait() is None


async def test_policy_of_the_highest_priority_counts_alone():
    broker = MemoryBroker()
    low = Policy("low", ".*", "queues", {"max-length-bytes": 1}, priority=1)
    high = Policy("high", "^log$", "queues", {"max-length-bytes": 1000}, priority=2)
    broker.apply_policies((high, low))
    async with broker.connect("test") as transport:
        await transport.declare(TOPOLOGY)
        for text in (b"1", b"2", b"3"):
            await transport.publish(Message("x", text))
        async with transport.follow("log", start="first", name="c") as feed:
            assert [(await feed.receive()).body for _ in range(3)] == [b"1", b"2", b"3"]


async def test_deleted_queue_is_gone_with_its_messages_and_bindings():
    broker = await broker_with(b"1")
    broker.delete_queue("q")
    async with broker.connect("test") as transport:
        with pytest.raises(NotFoundError):
            async with transport.consume("q", prefetch=1, name="c"):
                pass
        await transport.publish(Message("x", b"2"))
        await transport.declare(TOPOLOGY)
    assert broker.depth("q") == 0


async def test_late_end_of_a_cut_consumer_takes_nothing_from_the_next_one():
    broker = MemoryBroker()
    async with AsyncExitStack() as late:
        first = await late.enter_async_context(broker.connect("first"))
        await first.declare(leadership("f"))
        await first.publish(Message("fl.f.leader", b"token"))
        held = await late.enter_async_context(first.consume("fl.f.leader", prefetch=2, name="first"))
        await held.receive()
        broker.stop()
        broker.start()
        async with (
            asyncio.timeout(5),
            broker.connect("second") as second,
            second.consume("fl.f.leader", prefetch=2, name="second") as standing,
            broker.connect("third") as third,
            third.consume("fl.f.leader", prefetch=2, name="third") as waiting,
        ):
            token = await standing.receive()
            assert token.redelivered
            await late.aclose()
            assert waiting.receive_nowait() is standing.receive_nowait() is None
            await standing.acknowledge(token.tag)


async def test_all_followers_are_woken_by_each_message():
    broker = await broker_with()
    async with (
        broker.connect("test") as transport,
        asyncio.timeout(5),
        transport.follow("log", start="next", name="one") as one,
        transport.follow("log", start="next", name="two") as two,
    ):
        for text in (b"1", b"2"):
            waiting = [asyncio.create_task(feed.receive()) for feed in (one, two)]
            await asyncio.sleep(0)
            await transport.publish(Message("x", text))
            assert [delivery.body for delivery in await asyncio.gather(*waiting)] == [text, text]
