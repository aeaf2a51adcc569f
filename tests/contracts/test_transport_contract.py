"""What every transport must do: the same tests over the broker in memory and over RabbitMQ."""

import asyncio
import itertools
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from transport_contract import (
    MAX_MESSAGE_BYTES,
    BrokerUnderTest,
    MemoryUnderTest,
    RabbitMQUnderTest,
    bodies,
    patience,
    take,
    take_until,
    until,
)

from broker_fl import topology
from broker_fl.config import BrokerSettings
from broker_fl.errors import (
    AccessRefusedError,
    AuthenticationError,
    BrokerUnavailableError,
    MessageTooLargeError,
    NotFoundError,
    QueueInUseError,
    TopologyConflictError,
    UnroutableError,
)
from broker_fl.topology import Binding, Exchange, Names, Policy, Queue, Topology
from broker_fl.transports.parts import Assembler, split
from broker_fl.transports.transport import Delivery, Message, Start, Transport

NAMES = Names("digits")

FANOUT = Topology((Exchange("x", "fanout"),), (Queue("q", "quorum"),), (Binding("x", "q"),))
CLASSIC = Topology((Exchange("x", "fanout"),), (Queue("q", "classic"),), (Binding("x", "q"),))
LOG = Topology((Exchange("x", "fanout"),), (Queue("log", "stream"),), (Binding("x", "log"),))
SINGLE = Topology((Exchange("x", "fanout"),), (Queue("q", "quorum", {"x-single-active-consumer": True}),), (Binding("x", "q"),))
DEAD_LETTERS = Topology(
    (Exchange("x", "fanout"), Exchange("dead", "fanout")),
    (Queue("q", "quorum", {"x-dead-letter-exchange": "dead"}), Queue("dead", "classic")),
    (Binding("x", "q"), Binding("dead", "dead")),
)


@pytest.fixture(params=["memory", pytest.param("amqp", marks=pytest.mark.rabbitmq)])
def broker(request) -> BrokerUnderTest:
    if request.param == "memory":
        return MemoryUnderTest()
    vhost = request.getfixturevalue("vhost")
    return RabbitMQUnderTest(url=vhost.url, management_url=vhost.management_url, management=vhost.management)


async def publish(transport: Transport, *texts: bytes, exchange: str = "x", routing_key: str = "") -> None:
    for text in texts:
        await transport.publish(Message(exchange, text, routing_key=routing_key))


# Declaring


async def test_topology_declared_twice_is_there_once(broker):
    async with broker.connect() as transport:
        await transport.declare(topology.shared("digits"))
        await transport.declare(topology.party("digits", "alice"))
        await transport.declare(topology.shared("digits"))
        await transport.declare(topology.party("digits", "alice"))
        await publish(transport, b"once", exchange=NAMES.up("alice"))
        async with transport.consume(NAMES.updates, prefetch=5, name="c") as updates:
            assert bodies(await take(updates, 1)) == [b"once"]
            assert updates.receive_nowait() is None


@pytest.mark.parametrize(
    "other",
    [
        Topology(exchanges=(Exchange("x", "topic"),)),
        Topology(queues=(Queue("q", "classic"),)),
        Topology(queues=(Queue("q", "quorum", {"x-single-active-consumer": True}),)),
    ],
)
async def test_what_exists_with_other_arguments_is_a_conflict(broker, other: Topology):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        with pytest.raises(TopologyConflictError, match="exists"):
            await transport.declare(other)
        await transport.declare(FANOUT)


@pytest.mark.parametrize("binding", [Binding("x", "nowhere"), Binding("nowhere", "q")])
async def test_binding_of_what_is_not_there_is_not_found(broker, binding: Binding):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        with pytest.raises(NotFoundError, match="nowhere"):
            await transport.declare(Topology(bindings=(binding,)))


async def test_queue_is_there_from_its_declaration_to_its_deletion(broker):
    async with broker.connect() as transport, broker.connect() as other:
        assert not await transport.has_queue("q")
        await transport.declare(FANOUT)
        await transport.declare(LOG)
        for asking in (transport, other):
            assert await asking.has_queue("q")
            assert await asking.has_queue("log")
            assert not await asking.has_queue("x")
            assert not await asking.has_queue("Q")
        await broker.delete_queue("q")
        assert not await other.has_queue("q")
        await transport.declare(FANOUT)
        assert await other.has_queue("q")


async def test_asking_for_a_queue_harms_nothing(broker):
    async with broker.connect() as transport:
        await transport.declare(SINGLE)
        await publish(transport, b"1")
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            for _ in range(20):
                assert await transport.has_queue("q")
                assert not await transport.has_queue("nowhere")
            (held,) = await take(subscription, 1)
            await subscription.acknowledge(held.tag)
            await publish(transport, b"2")
            assert bodies(await take(subscription, 1)) == [b"2"]


# Routing


async def test_fanout_copies_to_every_queue_whatever_the_key(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await transport.declare(Topology(queues=(Queue("r", "classic"),), bindings=(Binding("x", "r"),)))
        await publish(transport, b"to both", routing_key="any.key")
        for queue in ("q", "r"):
            async with transport.consume(queue, prefetch=1, name="c") as subscription:
                (delivery,) = await take(subscription, 1)
                assert (delivery.body, delivery.exchange, delivery.routing_key) == (b"to both", "x", "any.key")


async def test_direct_exchange_routes_by_the_exact_key(broker):
    wanted = Topology(
        (Exchange("x", "direct"),),
        (Queue("a", "classic"), Queue("b", "classic")),
        (Binding("x", "a", "alice"), Binding("x", "b", "bob"), Binding("x", "b", "both"), Binding("x", "a", "both")),
    )
    async with broker.connect() as transport:
        await transport.declare(wanted)
        for key in ("alice", "bob", "both"):
            await publish(transport, key.encode(), routing_key=key)
        with pytest.raises(UnroutableError):
            await publish(transport, b"lost", routing_key="ali")
        for queue, expected in (("a", [b"alice", b"both"]), ("b", [b"bob", b"both"])):
            async with transport.consume(queue, prefetch=5, name="c") as subscription:
                assert bodies(await take(subscription, 2)) == expected


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("update.*", ["update.merged", "update.refused"], ["update", "update.merged.late", "model.evaluated"]),
        ("update.#", ["update", "update.merged", "update.merged.late"], ["updates", "late.update"]),
        ("#", ["", "update", "update.merged.late"], []),
        ("*", ["update"], ["", "update.merged"]),
        ("#.late", ["late", "update.late", "update.merged.late"], ["later", "update.late.r"]),
        ("update.#.late", ["update.late", "update.merged.late", "update.a.b.late"], ["update", "late", "updatelate"]),
        ("*.#", ["update", "update.merged"], [""]),
        ("a+b", ["a+b"], ["aab"]),
    ],
)
async def test_topic_exchange_routes_by_patterns_of_words(broker, pattern: str, matching: list[str], others: list[str]):
    async with broker.connect() as transport:
        await transport.declare(Topology((Exchange("x", "topic"),), (Queue("q", "classic"),), (Binding("x", "q", pattern),)))
        for key in matching:
            await publish(transport, b"", routing_key=key)
        for key in others:
            with pytest.raises(UnroutableError):
                await publish(transport, b"", routing_key=key)
        async with transport.consume("q", prefetch=9, name="c") as subscription:
            assert [delivery.routing_key for delivery in await take(subscription, len(matching))] == matching


async def test_queue_bound_twice_gets_a_message_once(broker):
    async with broker.connect() as transport:
        await transport.declare(Topology((Exchange("x", "topic"),), (Queue("q", "classic"),), (Binding("x", "q", "#"),)))
        await transport.declare(Topology(bindings=(Binding("x", "q", "a.*"),)))
        await publish(transport, b"1", b"2", routing_key="a.b")
        async with transport.consume("q", prefetch=9, name="c") as subscription:
            assert bodies(await take(subscription, 2)) == [b"1", b"2"]


# Publishing


async def test_published_message_waits_for_who_comes_later(broker):
    async with broker.connect() as sender:
        await sender.declare(FANOUT)
        await publish(sender, b"1", b"2", b"3")
    async with broker.connect() as receiver, receiver.consume("q", prefetch=5, name="c") as subscription:
        deliveries = await take(subscription, 3)
    assert bodies(deliveries) == [b"1", b"2", b"3"]
    assert not any(delivery.redelivered for delivery in deliveries)
    assert all(delivery.offset is None for delivery in deliveries)


async def test_mandatory_message_that_no_queue_takes_is_unroutable_and_harms_nothing(broker):
    async with broker.connect() as transport:
        await transport.declare(Topology(exchanges=(Exchange("x", "fanout"),)))
        with pytest.raises(UnroutableError, match="x"):
            await transport.publish(Message("x", b"lost", message_id="1"))
        await transport.publish(Message("x", b"lost", mandatory=False))
        await transport.declare(FANOUT)
        await publish(transport, b"taken")
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            assert bodies(await take(subscription, 1)) == [b"taken"]


async def test_messages_of_the_same_id_at_once_are_told_apart(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await transport.declare(Topology(exchanges=(Exchange("nobody", "fanout"),)))
        targets = ["nobody", "x"] * 10
        async with patience():
            outcomes = await asyncio.gather(
                *(transport.publish(Message(target, b"", message_id="same")) for target in targets), return_exceptions=True
            )
    assert [type(outcome) for outcome in outcomes] == [UnroutableError, type(None)] * 10


async def test_message_to_an_exchange_that_is_not_there_is_not_found(broker):
    async with broker.connect() as transport:
        with pytest.raises(NotFoundError, match="nowhere"):
            await publish(transport, b"lost", exchange="nowhere")


async def test_message_over_the_brokers_limit_is_too_large_and_one_at_the_limit_is_not(broker):
    async with broker.connect() as transport:
        await transport.declare(CLASSIC)
        await publish(transport, bytes(MAX_MESSAGE_BYTES))
        with pytest.raises(MessageTooLargeError, match=str(MAX_MESSAGE_BYTES)):
            await publish(transport, bytes(MAX_MESSAGE_BYTES + 1))
    async with broker.connect() as transport, transport.consume("q", prefetch=1, name="c") as subscription:
        assert [len(body) for body in bodies(await take(subscription, 1))] == [MAX_MESSAGE_BYTES]


async def test_message_over_the_brokers_limit_goes_in_parts_and_is_whole_again(broker):
    """With the settings as they are: 16 MiB is all that RabbitMQ takes since 4.0, unless it is told otherwise."""
    settings = BrokerSettings()
    whole = Message("x", random.Random(0).randbytes(settings.max_message_bytes + 1), message_id="large")
    async with broker.connect() as transport:
        await transport.declare(CLASSIC)
        await transport.declare(LOG)
        with pytest.raises(MessageTooLargeError):
            await transport.publish(whole)
    async with broker.connect() as transport:
        parts = list(split(whole, part_bytes=settings.part_bytes, limit_bytes=settings.max_message_bytes))
        assert len(parts) == 17
        for part in parts:
            await transport.publish(part)
        async with (
            transport.consume("q", prefetch=20, name="c") as subscription,
            transport.follow("log", start="first", name="c") as feed,
        ):
            for source in (subscription, feed):
                assembler = Assembler()
                *unfinished, body = [assembler.add(delivery) for delivery in await take(source, 17)]
                assert (set(unfinished), body) == ({None}, whole.body)


async def test_many_messages_at_once_all_arrive(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await asyncio.gather(*(publish(transport, b"%d" % number) for number in range(200)))
        async with transport.consume("q", prefetch=300, name="c") as subscription:
            assert sorted(map(int, bodies(await take(subscription, 200)))) == list(range(200))


async def test_headers_id_and_body_arrive_as_they_were_sent(broker):
    headers = {"text": "é\n", "none": "", "int": -5, "large": 2**62, "float": -2.25, "yes": True, "no": False}
    body = bytes(range(256)) * 1000
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await transport.publish(Message("x", body, message_id="an id", headers=headers))
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            (delivery,) = await take(subscription, 1)
    assert (delivery.body, delivery.message_id) == (body, "an id")
    assert dict(delivery.headers) == headers
    assert {key: type(value) for key, value in delivery.headers.items()} == {key: type(value) for key, value in headers.items()}


async def test_empty_body_is_a_message(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"")
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            assert bodies(await take(subscription, 1)) == [b""]


# Consuming


async def test_prefetch_bounds_what_is_handed_out_and_not_acknowledged(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"1", b"2", b"3", b"4", b"5", b"6", b"7")
        async with (
            transport.consume("q", prefetch=2, name="first") as first,
            transport.consume("q", prefetch=3, name="second") as second,
        ):
            held = await take(first, 2)
            assert bodies(held) == [b"1", b"2"]
            others = await take(second, 3)
            assert bodies(others) == [b"3", b"4", b"5"]
            assert (first.receive_nowait(), second.receive_nowait()) == (None, None)
            await first.acknowledge(held[0].tag)
            assert bodies(await take(first, 1)) == [b"6"]
            await second.acknowledge(others[-1].tag, multiple=True)
            assert bodies(await take(second, 1)) == [b"7"]


async def test_what_was_not_acknowledged_comes_again_in_order_and_says_so(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"1", b"2", b"3", b"4")
        async with transport.consume("q", prefetch=9, name="c") as subscription:
            deliveries = await take(subscription, 4)
            await subscription.acknowledge(deliveries[1].tag)
        async with transport.consume("q", prefetch=9, name="c") as subscription:
            again = await take(subscription, 3)
    assert bodies(again) == [b"1", b"3", b"4"]
    assert all(delivery.redelivered for delivery in again)


async def test_acknowledging_multiple_settles_all_up_to_the_tag(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"1", b"2", b"3", b"4")
        async with transport.consume("q", prefetch=9, name="c") as subscription:
            deliveries = await take(subscription, 4)
            await subscription.acknowledge(deliveries[2].tag, multiple=True)
        async with transport.consume("q", prefetch=9, name="c") as subscription:
            assert bodies(await take(subscription, 1)) == [b"4"]
            assert subscription.receive_nowait() is None


async def test_tags_ascend_from_one_in_each_subscription(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"1", b"2", b"3")
        for _ in range(2):
            async with transport.consume("q", prefetch=9, name="c") as subscription:
                assert [delivery.tag for delivery in await take(subscription, 3)] == [1, 2, 3]


async def test_rejected_message_comes_again_when_it_is_requeued(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"1")
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            (first,) = await take(subscription, 1)
            await subscription.reject(first.tag, requeue=True)
            (again,) = await take(subscription, 1)
    assert (again.body, again.redelivered) == (b"1", True)


async def test_rejected_message_that_is_not_requeued_goes_to_the_dead_letters_with_its_reason(broker):
    async with broker.connect() as transport:
        await transport.declare(DEAD_LETTERS)
        await transport.publish(Message("x", b"bad", routing_key="key", message_id="id", headers={"x-fl-version": 7}))
        await publish(transport, b"good")
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            bad, good = await take(subscription, 2)
            await subscription.reject(bad.tag, requeue=False)
            await subscription.acknowledge(good.tag)
        async with transport.consume("dead", prefetch=5, name="c") as subscription:
            (dead,) = await take(subscription, 1)
    assert (dead.body, dead.exchange, dead.routing_key, dead.message_id) == (b"bad", "dead", "key", "id")
    assert dead.user_id == broker.administrator
    expected = {
        "x-fl-version": 7,
        "x-first-death-reason": "rejected",
        "x-first-death-queue": "q",
        "x-first-death-exchange": "x",
    }
    assert expected.items() <= dead.headers.items()


async def test_rejected_message_without_dead_letters_is_gone(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"1", b"2")
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            await subscription.reject((await take(subscription, 1))[0].tag, requeue=False)
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            assert bodies(await take(subscription, 1)) == [b"2"]


async def test_message_rejected_beyond_the_delivery_limit_goes_to_the_dead_letters(broker):
    await broker.apply_policies(Policy("limit", "^q$", "queues", {"delivery-limit": 2}))
    async with broker.connect() as transport:
        await transport.declare(DEAD_LETTERS)
        await publish(transport, b"poison")
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            for _ in range(3):
                (delivery,) = await take(subscription, 1)
                assert delivery.body == b"poison"
                await subscription.reject(delivery.tag, requeue=True)
            await publish(transport, b"next")
            assert bodies(await take(subscription, 1)) == [b"next"]
        async with transport.consume("dead", prefetch=5, name="c") as subscription:
            (dead,) = await take(subscription, 1)
    assert (dead.body, dead.headers["x-first-death-reason"]) == (b"poison", "delivery_limit")


async def test_message_that_ends_its_consumers_beyond_the_delivery_limit_goes_to_the_dead_letters(broker):
    await broker.apply_policies(Policy("limit", "^q$", "queues", {"delivery-limit": 2}))
    async with broker.connect() as transport:
        await transport.declare(DEAD_LETTERS)
        await publish(transport, b"poison")
        for _ in range(3):
            async with transport.consume("q", prefetch=1, name="c") as subscription:
                assert bodies(await take(subscription, 1)) == [b"poison"]
        await publish(transport, b"next")
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            assert bodies(await take(subscription, 1)) == [b"next"]
        async with transport.consume("dead", prefetch=5, name="c") as subscription:
            (dead,) = await take(subscription, 1)
    assert (dead.body, dead.headers["x-first-death-reason"]) == (b"poison", "delivery_limit")


async def test_classic_queue_knows_no_delivery_limit(broker):
    await broker.apply_policies(Policy("limit", "^q$", "queues", {"delivery-limit": 1}))
    async with broker.connect() as transport:
        await transport.declare(CLASSIC)
        await publish(transport, b"again")
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            for _ in range(5):
                (delivery,) = await take(subscription, 1)
                await subscription.reject(delivery.tag, requeue=True)
            assert bodies(await take(subscription, 1)) == [b"again"]


async def test_queue_that_is_not_there_is_not_found(broker):
    async with broker.connect() as transport:
        with pytest.raises(NotFoundError, match="nowhere"):
            async with transport.consume("nowhere", prefetch=1, name="c"):
                pass
        with pytest.raises(NotFoundError, match="nowhere"):
            async with transport.follow("nowhere", start="first", name="c"):
                pass
        with pytest.raises(NotFoundError, match="nowhere"):
            async with transport.listen("nowhere", name="c"):
                pass


async def test_only_the_first_consumer_of_a_single_active_queue_gets_messages_until_it_closes(broker):
    async with broker.connect("first") as one, broker.connect("second") as other:
        await one.declare(SINGLE)
        async with (
            one.consume("q", prefetch=1, name="active") as active,
            other.consume("q", prefetch=5, name="standby") as standby,
        ):
            await publish(one, b"1", b"2", b"3")
            (held,) = await take(active, 1)
            await active.acknowledge(held.tag)
            (held,) = await take(active, 1)
            assert (held.body, standby.receive_nowait()) == (b"2", None)


async def test_standby_takes_over_when_the_active_consumer_closes(broker):
    async with broker.connect("first") as one, broker.connect("second") as other, AsyncExitStack() as stack:
        await one.declare(SINGLE)
        active = await stack.enter_async_context(one.consume("q", prefetch=5, name="active"))
        async with other.consume("q", prefetch=5, name="standby") as standby:
            await publish(one, b"1", b"2")
            done, _ = await take(active, 2)
            await active.acknowledge(done.tag)
            assert standby.receive_nowait() is None
            await stack.aclose()
            await publish(one, b"3")
            again, new = await take(standby, 2)
    assert (again.body, again.redelivered) == (b"2", True)
    assert (new.body, new.redelivered) == (b"3", False)


async def test_standby_gets_what_the_active_consumer_kept_when_its_connection_is_cut(broker):
    """What leadership rests on: a message that is kept and never acknowledged is one consumer's at a time, and never lost."""
    async with broker.connect("victim") as one, broker.connect("second") as other, broker.connect("third") as third:
        await one.declare(SINGLE)
        await publish(one, b"token")
        async with one.consume("q", prefetch=2, name="active") as active:
            (held,) = await take(active, 1)
            async with (
                other.consume("q", prefetch=2, name="standby") as standby,
                third.consume("q", prefetch=2, name="late") as late,
            ):
                assert standby.receive_nowait() is late.receive_nowait() is None
                waiting = asyncio.create_task(standby.receive())
                await broker.cut(one, name="victim")
                async with patience():
                    taken = await waiting
                assert (taken.body, taken.redelivered) == (b"token", True)
                with pytest.raises(BrokerUnavailableError):
                    await active.acknowledge(held.tag)
                assert late.receive_nowait() is None
            # In order this time.
            async with third.consume("q", prefetch=2, name="last") as last:
                assert bodies(await take(last, 1)) == [b"token"]


async def test_kept_message_is_replaced_by_a_newer_one_and_nobody_else_gets_either(broker):
    """How a leader renews its token: RabbitMQ closes the channel of who keeps one message for too long."""
    async with broker.connect("first") as one, broker.connect("second") as other:
        await one.declare(SINGLE)
        await publish(one, b"1")
        async with one.consume("q", prefetch=2, name="active") as active:
            (held,) = await take(active, 1)
            async with other.consume("q", prefetch=2, name="standby") as standby:
                for text in (b"2", b"3", b"4"):
                    await publish(other, text)
                    (newer,) = await take(active, 1)
                    assert newer.body == text
                    await active.acknowledge(held.tag)
                    held = newer
                assert standby.receive_nowait() is None
        async with other.consume("q", prefetch=2, name="next") as following:
            assert [(found.body, found.redelivered) for found in await take(following, 1)] == [(b"4", True)]
            assert following.receive_nowait() is None


async def test_queue_held_alone_is_in_use_until_its_holder_closes(broker):
    async with broker.connect("first") as one, broker.connect("second") as other:
        await one.declare(CLASSIC)
        async with one.consume("q", prefetch=1, name="holder", exclusive=True) as holder:
            for exclusive in (True, False):
                with pytest.raises(QueueInUseError, match="q"):
                    async with other.consume("q", prefetch=1, name="late", exclusive=exclusive):
                        pass
            await publish(one, b"1")
            assert bodies(await take(holder, 1)) == [b"1"]
        async with other.consume("q", prefetch=1, name="late", exclusive=True) as late:
            assert bodies(await take(late, 1)) == [b"1"]


async def test_queue_that_has_a_consumer_cannot_be_held_alone(broker):
    async with broker.connect() as transport:
        await transport.declare(CLASSIC)
        async with transport.consume("q", prefetch=1, name="shares"):
            with pytest.raises(QueueInUseError, match="q"):
                async with transport.consume("q", prefetch=1, name="alone", exclusive=True):
                    pass


async def test_next_message_without_waiting_is_none_until_one_is_here(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            assert subscription.receive_nowait() is None
            await publish(transport, b"1")
            came: list[Delivery] = []

            async def comes() -> bool:
                came.extend(filter(None, [subscription.receive_nowait()]))
                return bool(came)

            await until(comes)
            assert bodies(came) == [b"1"]
            assert subscription.receive_nowait() is None


async def test_receiving_that_is_cancelled_loses_nothing(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        async with transport.consume("q", prefetch=50, name="c") as subscription, patience():
            got: list[bytes] = []
            sending = asyncio.create_task(publish(transport, *(b"%d" % number for number in range(50))))
            while len(got) < 50:
                receiving = asyncio.create_task(subscription.receive())
                await asyncio.sleep(0)
                receiving.cancel()
                got += bodies(one for one in await asyncio.gather(receiving, return_exceptions=True) if not is_cancelled(one))
            await sending
    assert got == [b"%d" % number for number in range(50)]


def is_cancelled(outcome: object) -> bool:
    return isinstance(outcome, asyncio.CancelledError)


# Closing and losing


async def test_closed_subscription_is_unavailable(broker):
    async with broker.connect() as transport:
        await transport.declare(CLASSIC)
        await transport.declare(LOG)
        await publish(transport, b"1", b"2")
        async with (
            transport.consume("q", prefetch=1, name="c") as subscription,
            transport.follow("log", start="next", name="c") as feed,
            transport.listen("x", name="c") as heard,
        ):
            (delivery,) = await take(subscription, 1)
        for closed in (subscription, feed, heard):
            with pytest.raises(BrokerUnavailableError):
                await take(closed, 1)
            with pytest.raises(BrokerUnavailableError):
                closed.receive_nowait()
        with pytest.raises(BrokerUnavailableError):
            await subscription.acknowledge(delivery.tag)
        with pytest.raises(BrokerUnavailableError):
            await subscription.reject(delivery.tag, requeue=True)
        async with transport.consume("q", prefetch=2, name="c") as subscription:
            assert bodies(await take(subscription, 2)) == [b"1", b"2"]


async def test_lost_connection_is_unavailable_everywhere_and_all_that_it_held_is_free_again(broker):
    async with broker.connect() as transport:
        await transport.declare(CLASSIC)
        await transport.declare(LOG)
        await publish(transport, b"1")
    async with broker.connect("victim") as victim:
        await lose(broker, victim)
        await broker.restart()
        async with broker.connect() as other, other.consume("q", prefetch=5, name="c") as subscription:
            (again,) = await take(subscription, 1)
            assert (again.body, again.redelivered) == (b"1", True)


async def lose(broker: BrokerUnderTest, victim: Transport) -> None:
    """Whose connection is named victim."""

    async def is_listed() -> bool:
        return "victim" in await broker.connection_names()

    async with (
        victim.consume("q", prefetch=5, name="c") as subscription,
        victim.follow("log", start="next", name="c") as feed,
        victim.listen("x", name="c") as heard,
    ):
        (held,) = await take(subscription, 1)
        waiting = [asyncio.create_task(source.receive()) for source in (subscription, feed, heard)]
        await until(is_listed)
        await broker.break_connections("victim")
        async with patience():
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [BrokerUnavailableError] * 3
        with pytest.raises(BrokerUnavailableError):
            subscription.receive_nowait()
        for trying in (
            take(subscription, 1),
            subscription.acknowledge(held.tag),
            publish(victim, b"2"),
            victim.declare(FANOUT),
            victim.has_queue("q"),
        ):
            with pytest.raises(BrokerUnavailableError):
                await trying
        for opening in (
            victim.consume("q", prefetch=1, name="c"),
            victim.follow("log", start="first", name="c"),
            victim.listen("x", name="c"),
        ):
            with pytest.raises(BrokerUnavailableError):
                async with opening:
                    pass


async def test_queue_deleted_under_its_consumer_is_unavailable(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await transport.declare(LOG)
        async with (
            transport.consume("q", prefetch=1, name="c") as subscription,
            transport.follow("log", start="first", name="c") as feed,
        ):
            waiting = [asyncio.create_task(source.receive()) for source in (subscription, feed)]
            await broker.delete_queue("q")
            await broker.delete_queue("log")
            async with patience():
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [BrokerUnavailableError] * 2
        await transport.declare(FANOUT)
        await publish(transport, b"goes on")


async def test_log_closed_while_its_messages_come_harms_nothing_else(broker):
    async with broker.connect() as transport:
        await transport.declare(LOG)
        await publish(transport, *(bytes(100_000) for _ in range(20)))
        async with transport.follow("log", start="next", name="c") as other:
            for _ in range(20):
                async with transport.follow("log", start="first", name="c") as feed:
                    await take(feed, 3)
            await publish(transport, b"new")
            assert bodies(await take(other, 1)) == [b"new"]


async def test_unknown_user_is_an_authentication_error(broker):
    with pytest.raises(AuthenticationError, match="nobody"):
        async with broker.connect(user="nobody"):
            pass


# Permissions


@dataclass(frozen=True, slots=True)
class Enrolled:
    """Two parties. Both inboxes hold a receipt, and the log holds a frame."""

    alice: str
    bob: str


@pytest.fixture
async def parties(broker) -> Enrolled:
    enrolled = Enrolled(await broker.add_party("digits"), await broker.add_party("digits"))
    async with broker.connect() as admin:
        await admin.declare(topology.shared("digits"))
        await admin.declare(topology.leadership("digits"))
        for name in (enrolled.alice, enrolled.bob):
            await admin.declare(topology.party("digits", name))
            await publish(admin, b"receipt", exchange=NAMES.receipts, routing_key=name)
        await publish(admin, b"frame", exchange=NAMES.model)
    return enrolled


async def test_every_message_carries_the_login_of_its_sender(broker, parties):
    async with broker.connect() as admin, broker.connect(user=parties.alice) as party:
        assert (admin.user, party.user) == (broker.administrator, parties.alice)
        await publish(party, b"mine", exchange=NAMES.up(parties.alice))
        await publish(admin, b"ours", exchange=NAMES.up(parties.alice))
        async with admin.consume(NAMES.updates, prefetch=5, name="c") as subscription:
            assert [delivery.user_id for delivery in await take(subscription, 2)] == [parties.alice, broker.administrator]


async def test_party_sends_up_and_reads_the_log_and_its_inbox(broker, parties):
    alice = parties.alice
    async with (
        broker.connect(user=alice) as party,
        party.consume(NAMES.inbox(alice), prefetch=5, name="c", exclusive=True) as inbox,
        party.follow(NAMES.model_log, start="first", name="c") as log,
    ):
        await publish(party, b"update", exchange=NAMES.up(alice))
        (receipt,) = await take(inbox, 1)
        await inbox.acknowledge(receipt.tag)
        assert (receipt.body, receipt.routing_key) == (b"receipt", alice)
        assert bodies(await take(log, 1)) == [b"frame"]
    async with broker.connect() as admin, admin.consume(NAMES.updates, prefetch=5, name="c") as updates:
        (update,) = await take(updates, 1)
    assert NAMES.party_of(update.exchange) == update.user_id == alice


@pytest.mark.parametrize("exchange", ["up of another", "model", "receipts", "events", "quarantine", "leader"])
async def test_party_publishes_nowhere_else(broker, parties, exchange: str):
    names = {
        "up of another": NAMES.up(parties.bob),
        "model": NAMES.model,
        "receipts": NAMES.receipts,
        "events": NAMES.events,
        "quarantine": NAMES.quarantine,
        "leader": NAMES.leader,
    }
    async with broker.connect(user=parties.alice) as party:
        with pytest.raises(AccessRefusedError, match=names[exchange]):
            await publish(party, b"forged", exchange=names[exchange], routing_key=parties.bob)
    async with broker.connect() as admin, admin.consume(NAMES.updates, prefetch=5, name="c") as updates:
        await publish(admin, b"true", exchange=NAMES.up(parties.bob))
        assert bodies(await take(updates, 1)) == [b"true"]


async def test_party_reads_nothing_else(broker, parties):
    async with broker.connect(user=parties.alice) as party:
        for queue in (NAMES.inbox(parties.bob), NAMES.updates, NAMES.quarantine, NAMES.leader):
            with pytest.raises(AccessRefusedError, match=queue):
                async with party.consume(queue, prefetch=1, name="c"):
                    pass
        with pytest.raises(AccessRefusedError, match=NAMES.updates):
            async with party.follow(NAMES.updates, start="first", name="c"):
                pass
        for exchange in (NAMES.model, NAMES.events, NAMES.leader, NAMES.up(parties.bob)):
            with pytest.raises(AccessRefusedError):
                async with party.listen(exchange, routing_key="#", name="c"):
                    pass


async def test_party_declares_nothing(broker, parties):
    alice = parties.alice
    attempts = (
        Topology(exchanges=(Exchange("mine", "fanout"),)),
        Topology(queues=(Queue("mine", "classic"),)),
        Topology(bindings=(Binding(NAMES.model, NAMES.inbox(alice)),)),
        Topology(bindings=(Binding(NAMES.up(alice), NAMES.inbox(parties.bob)),)),
        topology.party("digits", alice),
        topology.shared("digits"),
        topology.leadership("digits"),
    )
    async with broker.connect(user=alice) as party:
        for attempt in attempts:
            with pytest.raises(AccessRefusedError):
                await party.declare(attempt)


# Logs


async def test_log_is_read_by_many_and_consumed_by_none(broker):
    async with broker.connect() as transport:
        await transport.declare(LOG)
        await publish(transport, b"1", b"2", b"3")
        async with (
            transport.follow("log", start="first", name="one") as one,
            transport.follow("log", start="first", name="two") as two,
        ):
            await publish(transport, b"4")
            for feed in (one, two):
                assert bodies(await take(feed, 4)) == [b"1", b"2", b"3", b"4"]
        async with transport.follow("log", start="first", name="three") as three:
            deliveries = await take(three, 4)
    assert bodies(deliveries) == [b"1", b"2", b"3", b"4"]
    assert not any(delivery.redelivered for delivery in deliveries)


async def test_long_log_is_read_to_its_end_in_order_with_offsets_that_ascend(broker):
    texts = [b"%d" % number for number in range(300)]
    async with broker.connect() as transport:
        await transport.declare(LOG)
        await asyncio.gather(*(publish(transport, text) for text in texts))
        async with transport.follow("log", start="first", name="c") as feed:
            deliveries = await take(feed, 300)
            assert feed.receive_nowait() is None
        async with transport.follow("log", start="first", name="c") as feed:
            again = await take(feed, 300)
    assert bodies(deliveries) == bodies(again) == texts
    offsets = [delivery.offset for delivery in deliveries]
    assert offsets == sorted(set(offsets))
    assert offsets == [delivery.offset for delivery in again]


async def test_log_is_followed_from_its_last_message(broker):
    texts = [b"%d" % number for number in range(20)]
    async with broker.connect() as transport:
        await transport.declare(LOG)
        await publish(transport, *texts)
        async with transport.follow("log", start="last", name="c") as feed:
            deliveries = await take_until(feed, texts[-1])
            assert bodies(deliveries) == texts[-len(deliveries) :]
            await publish(transport, b"new")
            assert bodies(await take(feed, 1)) == [b"new"]


async def test_log_is_followed_from_the_next_message(broker):
    async with broker.connect() as transport:
        await transport.declare(LOG)
        await publish(transport, b"1", b"2")
        async with transport.follow("log", start="next", name="c") as feed:
            await publish(transport, b"3", b"4")
            assert bodies(await take(feed, 2)) == [b"3", b"4"]


async def test_log_is_followed_from_an_offset(broker):
    texts = [b"%d" % number for number in range(20)]
    async with broker.connect() as transport:
        await transport.declare(LOG)
        await publish(transport, *texts)
        async with transport.follow("log", start="first", name="c") as feed:
            offsets = [delivery.offset for delivery in await take(feed, 20)]
        async with transport.follow("log", start=offsets[7], name="c") as feed:
            deliveries = await take(feed, 13)
        assert bodies(deliveries) == texts[7:]
        assert [delivery.offset for delivery in deliveries] == offsets[7:]
        async with transport.follow("log", start=0, name="c") as feed:
            assert bodies(await take(feed, 20)) == texts


@pytest.mark.parametrize("start", ["first", "last", "next", 0])
async def test_follower_of_an_empty_log_gets_its_first_message(broker, start: Start):
    async with broker.connect() as transport:
        await transport.declare(LOG)
        async with transport.follow("log", start=start, name="c") as feed:
            assert feed.receive_nowait() is None
            await publish(transport, b"1", b"2")
            assert bodies(await take(feed, 2)) == [b"1", b"2"]


async def test_log_forgets_its_oldest_messages_by_policy_and_never_its_newest(broker):
    sizes = {"max-length-bytes": 400_000, "stream-max-segment-size-bytes": 100_000}
    await broker.apply_policies(Policy("log", "^log$", "queues", sizes))
    async with broker.connect() as transport:
        await transport.declare(LOG)
        async with patience():
            for number in itertools.count():
                await publish(transport, b"%07d" % number + bytes(50_000))
                async with transport.follow("log", start="first", name="c") as feed:
                    first = int((await feed.receive()).body[:7])
                if number > 20 and first > 5:
                    break
        async with transport.follow("log", start=0, name="c") as feed:
            held = [int(body[:7]) for body in bodies(await take_until(feed, b"%07d" % number + bytes(50_000)))]
    assert first <= held[0] < number
    assert held == list(range(held[0], number + 1))


# Listening


async def test_listeners_each_hear_what_is_published_from_then_on(broker):
    async with broker.connect() as transport:
        await transport.declare(FANOUT)
        await publish(transport, b"before")
        async with transport.listen("x", name="one") as one:
            await publish(transport, b"1")
            async with transport.listen("x", name="two") as two:
                await publish(transport, b"2")
                assert bodies(await take(one, 2)) == [b"1", b"2"]
                assert bodies(await take(two, 1)) == [b"2"]
                assert two.receive_nowait() is None
            await publish(transport, b"3")
            assert bodies(await take(one, 1)) == [b"3"]


async def test_listener_hears_the_keys_it_asked_for(broker):
    async with broker.connect() as transport:
        await transport.declare(Topology(exchanges=(Exchange("x", "topic"),)))
        async with transport.listen("x", routing_key="model.*", name="c") as feed:
            with pytest.raises(UnroutableError):
                await publish(transport, b"another", routing_key="update.merged")
            await publish(transport, b"mine", routing_key="model.evaluated")
            (delivery,) = await take(feed, 1)
    assert (delivery.body, delivery.exchange, delivery.routing_key) == (b"mine", "x", "model.evaluated")
    assert delivery.user_id == broker.administrator


async def test_listener_that_closed_leaves_no_queue_behind(broker):
    async with broker.connect() as transport:
        await transport.declare(Topology(exchanges=(Exchange("x", "fanout"),)))
        async with transport.listen("x", name="c") as feed:
            await publish(transport, b"heard")
            assert bodies(await take(feed, 1)) == [b"heard"]
        with pytest.raises(UnroutableError):
            await publish(transport, b"unheard")


async def test_listener_hears_a_long_burst_in_order(broker):
    texts = [b"%d" % number for number in range(300)]
    async with broker.connect() as transport:
        await transport.declare(Topology(exchanges=(Exchange("x", "fanout"),)))
        async with transport.listen("x", name="c") as feed:
            await asyncio.gather(*(publish(transport, text) for text in texts))
            assert bodies(await take(feed, 300)) == texts
