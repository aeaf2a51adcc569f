"""The door to aio-pika: nothing foreign passes it, and what a hostile or silent peer does stays outside."""

import asyncio
import inspect
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from urllib.parse import urlsplit

import aio_pika.exceptions
import aiormq
import aiormq.exceptions
import pamqp.exceptions
import pamqp.frame
import pytest
from aiormq.abc import ChannelFrame, DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader
from pydantic import SecretStr

from broker_fl.config import BrokerSettings
from broker_fl.errors import (
    AccessRefusedError,
    AuthenticationError,
    BrokerError,
    BrokerUnavailableError,
    DecodeError,
    MessageTooLargeError,
    NotFoundError,
    PublishTimeoutError,
    QueueInUseError,
    TopologyConflictError,
    UnroutableError,
)
from broker_fl.topology import Binding, Exchange, Policy, Queue, Topology
from broker_fl.transports.amqp import AmqpTransport, _mapped, amqp_connect
from broker_fl.transports.transport import Delivery, Message

SECRET = "correct-horse"
TOPOLOGY = Topology((Exchange("x", "fanout"),), (Queue("q", "classic"),), (Binding("x", "q"),))

rmq = aiormq.exceptions


def foreign_exceptions() -> list[type[BaseException]]:
    found = {
        kind
        for module in (aiormq.exceptions, aio_pika.exceptions, pamqp.exceptions)
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, BaseException)
    }
    return sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__name__}")


def instance_of(kind: type[BaseException]) -> BaseException:
    if issubclass(kind, rmq.PublishError):
        returned = Basic.Return(312, "NO_ROUTE", "x", "")
        return kind(DeliveredMessage(returned, ContentHeader(), b"", channel=None), returned)
    if issubclass(kind, rmq.DeliveryError):
        return kind(None, Basic.Nack())
    return kind("some\nreason", "and more")


@pytest.mark.parametrize("kind", foreign_exceptions(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_foreign_exception_becomes_one_of_ours(kind: type[BaseException]):
    foreign = instance_of(kind)
    with pytest.raises(BrokerError, match=r"^doing this: ") as caught, _mapped("doing this"):
        raise foreign
    assert caught.value.__cause__ is foreign
    assert "\n" not in str(caught.value)


def test_there_are_foreign_exceptions_to_map():
    assert {rmq.AMQPError, rmq.ChannelInvalidStateError, pamqp.exceptions.PAMQPException} < set(foreign_exceptions())


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (rmq.ChannelNotFoundEntity("NOT_FOUND - no exchange 'x'"), NotFoundError),
        (rmq.ChannelAccessRefused("ACCESS_REFUSED - access to exchange 'x' refused"), AccessRefusedError),
        (rmq.ChannelAccessRefused("ACCESS_REFUSED - access to exchange 'up.exclusive-bank' refused"), AccessRefusedError),
        (rmq.ChannelAccessRefused("ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use"), QueueInUseError),
        (rmq.ChannelLockedResource("RESOURCE_LOCKED - cannot obtain exclusive access to locked queue"), QueueInUseError),
        (rmq.ChannelPreconditionFailed("PRECONDITION_FAILED - inequivalent arg 'size' for queue 'q'"), TopologyConflictError),
        (rmq.ChannelPreconditionFailed("PRECONDITION_FAILED - message size 2 is larger than 1"), MessageTooLargeError),
        (rmq.ChannelPreconditionFailed("PRECONDITION_FAILED - user_id property set to 'size'"), AccessRefusedError),
        (rmq.ChannelPreconditionFailed("PRECONDITION_FAILED - unknown delivery tag 7"), BrokerUnavailableError),
        (instance_of(rmq.PublishError), UnroutableError),
        (instance_of(rmq.DeliveryError), BrokerUnavailableError),
        (rmq.ConnectionClosed(320, "CONNECTION_FORCED"), BrokerUnavailableError),
        (ConnectionResetError("reset"), BrokerUnavailableError),
        (TimeoutError(), BrokerUnavailableError),
        (ssl.SSLError("bad certificate"), BrokerUnavailableError),
    ],
)
def test_what_the_broker_says_becomes_the_error_that_callers_tell_apart(foreign: Exception, ours: type[BrokerError]):
    with pytest.raises(BrokerError) as caught, _mapped("doing this"):
        raise foreign
    assert type(caught.value) is ours


@pytest.mark.parametrize("own", [ZeroDivisionError(), DecodeError("damaged"), UnroutableError("lost"), KeyError("x")])
def test_what_is_not_foreign_passes_as_it_is(own: Exception):
    with pytest.raises(type(own)) as caught, _mapped("doing this"):
        raise own
    assert caught.value is own


async def test_cancellation_of_ours_stays_a_cancellation_and_one_of_aiormqs_does_not():
    async def wait(waited: asyncio.Future[None]) -> None:
        with _mapped("waiting"):
            await waited

    waiting = asyncio.create_task(wait(asyncio.get_running_loop().create_future()))
    await asyncio.sleep(0)
    waiting.cancel()
    (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)

    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    lost.set_exception(asyncio.CancelledError())
    with pytest.raises(BrokerUnavailableError, match="silent"):
        await wait(lost)


# Opening


def connect(url: str, **settings: object):
    return amqp_connect(BrokerSettings(url=SecretStr(url), **settings))("test")


def as_user(url: str, user: str, password: str) -> str:
    return f"amqp://{user}:{password}@{url.rpartition('@')[2]}"


async def test_unreachable_broker_is_unavailable_in_one_line_that_names_the_address_and_not_the_password():
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{port}") as caught:
        async with connect(f"amqp://alice:{SECRET}@127.0.0.1:{port}/"):
            pass
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"AMQP\x00\x01\x00\x00",
        b"\x16\x03\x01" + bytes(1000),
        pamqp.frame.marshal(Basic.Ack(), 0),
    ],
)
async def test_what_is_no_broker_is_unavailable(answer: bytes):
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read(8)
            writer.write(answer)
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for scheme in ("amqp", "amqps"):
            with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{port}") as caught:
                async with connect(f"{scheme}://alice:{SECRET}@127.0.0.1:{port}/"):
                    pass
            assert "\n" not in str(caught.value)
            assert SECRET not in str(caught.value)


@pytest.mark.rabbitmq
async def test_vhost_that_is_not_there_is_not_found(rabbitmq):
    with pytest.raises(NotFoundError, match="missing") as caught:
        async with connect(f"{rabbitmq.url}nowhere"):
            pass
    assert rabbitmq.password.get_secret_value() not in str(caught.value)


@pytest.mark.rabbitmq
async def test_vhost_that_the_user_has_no_permissions_in_is_not_found(vhost):
    await vhost.management.put_user("outsider", SecretStr(SECRET))
    with pytest.raises(NotFoundError, match=r"outsider.*no permissions"):
        async with connect(as_user(vhost.url, "outsider", SECRET)):
            pass
    await vhost.management.delete_user("outsider")


@pytest.mark.rabbitmq
async def test_wrong_password_is_an_authentication_error_that_does_not_tell_it(vhost, rabbitmq):
    with pytest.raises(AuthenticationError, match=f"{rabbitmq.user}.*wrong password") as caught:
        async with connect(as_user(vhost.url, rabbitmq.user, SECRET)):
            pass
    assert SECRET not in str(caught.value)


# Publishing and consuming


async def take(source, count: int = 1) -> list[Delivery]:
    async with asyncio.timeout(15):
        return [await source.receive() for _ in range(count)]


@pytest.mark.rabbitmq
async def test_message_that_a_full_queue_refuses_is_unavailable_and_the_next_one_is_not(vhost):
    full = Policy("full", "^q$", "queues", {"max-length": 1, "overflow": "reject-publish"})
    await vhost.management.apply_policies([full])
    async with connect(vhost.url) as transport:
        await transport.declare(TOPOLOGY)
        await transport.publish(Message("x", b"1"))
        with pytest.raises(BrokerUnavailableError, match="full"):
            await transport.publish(Message("x", b"2"))
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            await subscription.acknowledge((await take(subscription))[0].tag)
            await vhost.management.delete_policy("full")
            await transport.publish(Message("x", b"3"))
            assert (await take(subscription))[0].body == b"3"


@pytest.mark.rabbitmq
@pytest.mark.parametrize(("sent", "came"), [(0.5, 0.5), (-1e38, "-1e+38"), (0.1, "0.1"), (1e300, "1e+300")])
async def test_float_that_amqp_would_change_comes_as_its_text(vhost, sent: float, came: float | str):
    async with connect(vhost.url) as transport:
        await transport.declare(TOPOLOGY)
        await transport.publish(Message("x", b"", headers={"float": sent}))
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            assert (await take(subscription))[0].headers == {"float": came}


@pytest.mark.rabbitmq
async def test_forged_sender_is_refused_and_a_missing_one_is_seen_to_be_missing(vhost, rabbitmq):
    async with connect(vhost.url) as transport:
        await transport.declare(TOPOLOGY)
    async with await aio_pika.connect(vhost.url) as connection:
        forger = AmqpTransport(BrokerSettings(), user="alice", consuming=connection, channel=await connection.channel())
        with pytest.raises(AccessRefusedError, match="user_id"):
            await forger.publish(Message("x", b"forged"))
        channel = await connection.channel()
        await (await channel.get_exchange("x", ensure=False)).publish(aio_pika.Message(b"anonymous"), "")
    async with connect(vhost.url) as transport, transport.consume("q", prefetch=2, name="c") as subscription:
        await transport.publish(Message("x", b"signed"))
        senders = [(delivery.body, delivery.user_id) for delivery in await take(subscription, 2)]
    assert senders == [(b"anonymous", None), (b"signed", rabbitmq.user)]


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(key: bytes, value: bytes) -> bytes:
    field = short(key) + value
    return struct.pack(">I", len(field)) + field


def nested(depth: int) -> bytes:
    inner = struct.pack(">I", 0)
    for _ in range(depth):
        inner = table(b"", b"F" + inner)
    return inner


HEADERS, MESSAGE_ID, TIMESTAMP = 0x2000, 0x0080, 0x0040


@pytest.mark.rabbitmq
@pytest.mark.parametrize(
    ("flag", "properties"),
    [
        pytest.param(TIMESTAMP, struct.pack(">Q", 2**63 - 1), id="a date beyond all calendars"),
        pytest.param(HEADERS, table(b"t", b"T" + struct.pack(">Q", 2**63 - 1)), id="such a date in the headers"),
        pytest.param(HEADERS, table(b"\xff", b"t\x01"), id="a key that is no text"),
        pytest.param(HEADERS, nested(5000), id="tables within tables"),
        pytest.param(MESSAGE_ID, short(b"\xff\xfe"), id="an id that is no text"),
    ],
)
async def test_properties_that_cannot_be_read_count_as_absent_and_end_nothing(vhost, flag: int, properties: bytes):
    async with connect(vhost.url) as transport:
        await transport.declare(TOPOLOGY)
        await publish_raw(vhost.url, b"hostile", flag=flag, properties=properties)
        await transport.publish(Message("x", b"good", message_id="1", headers={"a": 1}))
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            hostile, good = await take(subscription, 2)
    assert (hostile.body, hostile.user_id, hostile.message_id, hostile.headers) == (b"hostile", None, "", {})
    assert (good.body, good.message_id, good.headers) == (b"good", "1", {"a": 1})


@pytest.mark.rabbitmq
async def test_routing_key_that_is_no_text_ends_nothing(vhost):
    async with connect(vhost.url) as transport:
        await transport.declare(TOPOLOGY)
        await publish_raw(vhost.url, b"hostile", routing_key=b"\xff\xfe")
        await transport.publish(Message("x", b"good"))
        async with transport.consume("q", prefetch=5, name="c") as subscription:
            hostile, good = await take(subscription, 2)
    assert (hostile.body, hostile.routing_key, good.body) == (b"hostile", "\ufffd\ufffd", b"good")


def test_properties_that_nobody_reads_are_none_so_that_aio_pika_can_take_every_message():
    """RabbitMQ 4.0 passes on any delivery mode."""
    header = ContentHeader()
    header.unmarshal(struct.pack(">HHQH", 60, 0, 0, 0x1100) + b"\x4d" + short(b"soon"))
    message = aio_pika.IncomingMessage(DeliveredMessage(Basic.Deliver("c", 1, False, "x", ""), header, b"", channel=None))
    assert (message.delivery_mode, message.expiration) == (aio_pika.DeliveryMode.NOT_PERSISTENT, None)


async def publish_raw(url: str, body: bytes, *, flag: int = 0, properties: bytes = b"", routing_key: bytes = b"") -> None:
    """As a client that minds no rules; returns when the broker has confirmed it."""
    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        channel.confirmations[1] = confirmed = channel.create_future()
        frames = [
            raw_frame(1, channel.number, struct.pack(">IH", Basic.Publish.index, 0) + short(b"x") + short(routing_key) + b"\0"),
            raw_frame(2, channel.number, struct.pack(">HHQH", 60, 0, len(body), flag) + properties),
            raw_frame(3, channel.number, body),
        ]
        await channel.write_queue.put(ChannelFrame(payload=b"".join(frames), should_close=False, drain_future=None))
        async with asyncio.timeout(15):
            await confirmed


def raw_frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


# A broker that falls silent


@asynccontextmanager
async def tunnel(url: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A URL that leads to the broker, and what must be set for bytes to pass."""
    is_open = asyncio.Event()
    is_open.set()
    broker = urlsplit(url)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError), closing(sink):
            while data := await source.read(1 << 16):
                await is_open.wait()
                sink.write(data)
                await sink.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection(broker.hostname, broker.port)
        await asyncio.gather(pump(reader, to_broker), pump(from_broker, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        login, _, _ = broker.netloc.rpartition("@")
        yield f"amqp://{login}@127.0.0.1:{port}{broker.path}", is_open
        is_open.set()


@pytest.mark.rabbitmq
async def test_publish_that_is_not_confirmed_in_time_says_so_and_may_have_arrived(vhost):
    async with tunnel(vhost.url) as (url, is_open), connect(url, publish_timeout_s=0.2) as transport:
        await transport.declare(TOPOLOGY)
        is_open.clear()
        with pytest.raises(PublishTimeoutError, match=r"within 0\.2 s"):
            await transport.publish(Message("x", b"late"))
        is_open.set()
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            assert (await take(subscription))[0].body == b"late"


@pytest.mark.rabbitmq
async def test_broker_that_falls_silent_is_unavailable_to_all_who_wait_and_cancels_none_of_them(vhost):
    async with tunnel(vhost.url) as (url, is_open), connect(url, heartbeat_s=1) as transport:
        await transport.declare(TOPOLOGY)
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            is_open.clear()
            waiting: tuple[Callable[[], Awaitable[object]], ...] = (
                lambda: transport.publish(Message("x", b"lost")),
                lambda: transport.declare(TOPOLOGY),
                lambda: transport.listen("x", name="l").__aenter__(),
                lambda: transport.consume("q", prefetch=1, name="d").__aenter__(),
                subscription.receive,
            )
            async with asyncio.timeout(30):
                outcomes = await asyncio.gather(*(wait() for wait in waiting), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BrokerUnavailableError] * len(waiting)
