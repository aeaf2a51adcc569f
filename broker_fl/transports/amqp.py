"""RabbitMQ by aio-pika: the only file that knows it, and the door at which its exceptions become ours.

Connections are plain, not robust: a lost one ends the transport, and whoever runs the service opens another, declares again and
sends again what was not confirmed. Publishing and consuming use connections of their own, since a broker that blocks publishers
(memory or disk alarm) stops reading their connection, acknowledgements included.
"""

import asyncio
import secrets
import ssl
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import aio_pika
import aiormq
import aiormq.exceptions as rmq
import pamqp.decode
from aio_pika.abc import (
    AbstractChannel,
    AbstractConnection,
    AbstractExchange,
    AbstractIncomingMessage,
    AbstractQueue,
    HeadersType,
)
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from broker_fl.config import BrokerSettings
from broker_fl.errors import (
    AccessRefusedError,
    AuthenticationError,
    BrokerError,
    BrokerUnavailableError,
    MessageTooLargeError,
    NotFoundError,
    PublishTimeoutError,
    QueueInUseError,
    TopologyConflictError,
    UnroutableError,
)
from broker_fl.tls import explained, tls_context
from broker_fl.topology import Topology
from broker_fl.transports.transport import Connect, Delivery, Header, Message, Start, Transport

_LOG_PREFETCH = 64
_CONNECT_TIMEOUT_S = 15.0

_unmarshal = ContentHeader.unmarshal


def _unmarshal_what_can_be(header: ContentHeader, data: bytes) -> None:
    """RabbitMQ passes on properties that pamqp cannot decode (a date after 9999, text that is not UTF-8, ever deeper tables), and
    aiormq ends the connection over them: one hostile message, and all that were prefetched with it go back. It comes without any.

    And some that aio_pika cannot take (4.0: any delivery mode), which would then be neither delivered nor acknowledged: 64 of
    them, and nothing comes any more. Nobody here looks at those.
    """
    try:
        _unmarshal(header, data)
    except (ValueError, ArithmeticError, OSError, RecursionError):
        header.properties = Basic.Properties()
    header.properties.delivery_mode = header.properties.expiration = header.properties.timestamp = None


def _routing_key(value: bytes) -> tuple[int, str]:
    """It may be any bytes, which must not end the connection either."""
    length = int.from_bytes(value[:1], "big")
    return length + 1, value[1 : length + 1].decode("utf-8", "replace")


ContentHeader.unmarshal = _unmarshal_what_can_be  # type: ignore[method-assign, assignment]
pamqp.decode.METHODS["any shortstr"] = _routing_key
Basic.Deliver._routing_key = "any shortstr"  # noqa: SLF001


def amqp_connect(settings: BrokerSettings) -> Connect:
    def connect(name: str) -> AbstractAsyncContextManager[Transport]:
        return _open(settings, name=name)

    return connect


@asynccontextmanager
async def _open(settings: BrokerSettings, *, name: str) -> AsyncIterator["AmqpTransport"]:
    user = settings.user()
    tls = await asyncio.to_thread(tls_context, settings) if settings.is_tls else None
    async with AsyncExitStack() as stack:
        publishing = await stack.enter_async_context(_connection(settings, tls, user=user, name=f"{name} (publish)"))
        consuming = await stack.enter_async_context(_connection(settings, tls, user=user, name=name))
        with _mapped("opening a channel"):
            channel = await publishing.channel(publisher_confirms=True, on_return_raises=True)
        yield AmqpTransport(settings, user=user, consuming=consuming, channel=channel)


@asynccontextmanager
async def _connection(
    settings: BrokerSettings, tls: ssl.SSLContext | None, *, user: str, name: str
) -> AsyncIterator[AbstractConnection]:
    url = aio_pika.connection.make_url(settings.url.get_secret_value(), heartbeat=settings.heartbeat_s)
    if settings.logs_in_by_certificate:
        url = url.update_query(auth="EXTERNAL")
    connection = aio_pika.Connection(url, ssl_context=tls, client_properties={"connection_name": name})
    # One that was not opened is closed too: else it closes itself when it is collected, in whatever thread.
    try:
        try:
            await connection.connect(timeout=_CONNECT_TIMEOUT_S)
        except (*CONNECTION_EXCEPTIONS, TimeoutError) as exc:
            raise await _not_connected(settings, tls, exc, user=user) from exc
        yield connection
    finally:
        await _close(connection)


async def _not_connected(settings: BrokerSettings, tls: ssl.SSLContext | None, exc: BaseException, *, user: str) -> BrokerError:
    where = f"the broker at {settings.address()}"
    if isinstance(exc, rmq.AuthenticationError | rmq.ProbableAuthenticationError):
        return _no_login(settings, exc, where=where, user=user)
    if tls is not None:
        own = f"the certificate of {user!r}" if settings.logs_in_by_certificate else None
        found = await explained(exc, where=where, address=settings.host_and_port(), context=tls, own=own)
        if found is not None:
            return found
    if "Connection.Close" in str(exc):  # How aiormq 7.2 tells that the broker answered Open with Close.
        return NotFoundError(
            f"{where} does not open this vhost to {user!r}: it is missing, or the user has no permissions in it, is suspended "
            "or has too many connections"
        )
    return BrokerUnavailableError(
        f"no broker answers at {settings.address()} ({_reason(exc)}): is RabbitMQ running there, "
        "and is [broker] url right (amqps:// for TLS)? `broker-fl demo --keep` starts one to try"
    )


def _no_login(settings: BrokerSettings, exc: Exception, *, where: str, user: str) -> BrokerError:
    by_certificate = settings.logs_in_by_certificate
    if isinstance(exc, rmq.ProbableAuthenticationError):
        why = "the broker has no user of this certificate's name" if by_certificate else "wrong password, or not enrolled"
        return AuthenticationError(f"{where} refuses the login of {user!r}: {why}")
    if by_certificate:
        return AuthenticationError(
            f"{where} offers no login by certificate: turn on its plugin rabbitmq_auth_mechanism_ssl and the mechanism "
            "EXTERNAL, or give a password in [broker] url"
        )
    return AuthenticationError(
        f"{where} takes no passwords: set [broker] certificate and certificate_key, and no password in url"
    )


async def _close(opened: AbstractConnection | AbstractChannel) -> None:
    """Closing what is already broken fails in many ways, and none of them matters."""
    with suppress(BrokerError), _mapped("closing"):
        async with asyncio.timeout(5):
            await opened.close()


def _reason(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


@contextmanager
def _mapped(doing: str) -> Iterator[None]:
    """Foreign exceptions to ours. Nothing of aio-pika, aiormq or pamqp passes."""
    try:
        yield
    except CONNECTION_EXCEPTIONS as exc:
        raise _ours(doing, exc) from exc
    except asyncio.CancelledError as exc:
        # aiormq cancels what waits for a connection whose heartbeats stopped; a task group would take that for our own wish.
        if _is_being_cancelled():
            raise
        raise BrokerUnavailableError(f"{doing}: the broker fell silent") from exc


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _ours(doing: str, exc: Exception) -> BrokerError:
    text = f"{doing}: {_reason(exc)}"
    match exc:
        case rmq.ChannelNotFoundEntity():
            return NotFoundError(text)
        case rmq.ChannelLockedResource():
            return QueueInUseError(text)
        case rmq.ChannelAccessRefused():
            return QueueInUseError(text) if "in exclusive use" in text else AccessRefusedError(text)
        case rmq.ChannelPreconditionFailed():
            return _precondition(text)
        case rmq.PublishError():
            return UnroutableError(f"{doing}: no queue takes it")
        case rmq.DeliveryError():
            return BrokerUnavailableError(f"{doing}: the broker did not take it (a queue is full or not available)")
        case TimeoutError():
            return BrokerUnavailableError(f"{doing}: no answer in time")
        case _:
            return BrokerUnavailableError(text)


def _precondition(text: str) -> BrokerError:
    if "inequivalent" in text:
        return TopologyConflictError(f"it exists with other arguments: {text}")
    if "message size" in text:
        return MessageTooLargeError(text)
    if "user_id" in text:
        return AccessRefusedError(text)
    return BrokerUnavailableError(text)


class AmqpTransport:
    def __init__(self, settings: BrokerSettings, *, user: str, consuming: AbstractConnection, channel: AbstractChannel) -> None:
        self._settings = settings
        self._user = user
        self._consuming = consuming
        self._channel = channel
        self._exchanges: dict[str, AbstractExchange] = {}
        self._publishing: dict[str, asyncio.Event] = {}

    @property
    def user(self) -> str:
        return self._user

    async def declare(self, topology: Topology) -> None:
        with _mapped("declaring"):
            channel = await self._consuming.channel()
            for exchange in topology.exchanges:
                await channel.declare_exchange(exchange.name, aio_pika.ExchangeType(exchange.kind), durable=True)
            for queue in topology.queues:
                await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.all_arguments()))
            for binding in topology.bindings:
                bound = await channel.get_queue(binding.queue, ensure=False)
                await bound.bind(binding.exchange, routing_key=binding.routing_key)
            await channel.close()

    async def has_queue(self, name: str) -> bool:
        try:
            with _mapped(f"looking for queue {name}"):
                channel = await self._consuming.channel()
                await channel.declare_queue(name, passive=True)
                await channel.close()
        except NotFoundError:
            return False
        return True

    async def publish(self, message: Message) -> None:
        exchange = await self._exchange(message.exchange)
        outgoing = aio_pika.Message(
            message.body,
            headers=_sendable(message.headers),
            message_id=message.message_id or None,
            user_id=self.user,
            content_type="application/msgpack",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        try:
            with _mapped(f"publishing to {message.exchange}"):
                async with (
                    asyncio.timeout(self._settings.publish_timeout_s) as deadline,
                    self._one_at_a_time(message.message_id),
                ):
                    await exchange.publish(outgoing, routing_key=message.routing_key, mandatory=message.mandatory)
        except BrokerUnavailableError as exc:
            if deadline.expired():
                raise PublishTimeoutError(
                    f"publishing to {message.exchange}: not confirmed within {self._settings.publish_timeout_s:g} s"
                ) from exc
            raise

    @asynccontextmanager
    async def _one_at_a_time(self, message_id: str) -> AsyncIterator[None]:
        """aiormq knows a returned message by its id alone: of two at once, the wrong one would be unroutable."""
        while message_id in self._publishing:
            await self._publishing[message_id].wait()
        done = asyncio.Event()
        if message_id:
            self._publishing[message_id] = done
        try:
            yield
        finally:
            self._publishing.pop(message_id, None)
            done.set()

    async def _exchange(self, name: str) -> AbstractExchange:
        if name not in self._exchanges:
            with _mapped(f"opening exchange {name}"):
                self._exchanges[name] = await self._channel.get_exchange(name, ensure=False)
        return self._exchanges[name]

    @asynccontextmanager
    async def consume(
        self, queue: str, *, prefetch: int, name: str, exclusive: bool = False
    ) -> AsyncIterator["AmqpSubscription"]:
        async with self._channel_for(prefetch) as channel:
            subscription = AmqpSubscription(channel, what=queue, acknowledges_itself=False)
            with _mapped(f"consuming {queue}"):
                source = await channel.get_queue(queue, ensure=False)
                await subscription.start(source, name=name, exclusive=exclusive)
            yield subscription

    @asynccontextmanager
    async def follow(self, log: str, *, start: Start, name: str) -> AsyncIterator["AmqpSubscription"]:
        async with self._channel_for(_LOG_PREFETCH) as channel:
            subscription = AmqpSubscription(channel, what=log, acknowledges_itself=True)
            with _mapped(f"following {log}"):
                source = await channel.get_queue(log, ensure=False)
                await subscription.start(source, name=name, arguments={"x-stream-offset": start})
            yield subscription

    @asynccontextmanager
    async def listen(
        self, exchange: str, *, routing_key: str = "", name: str, queue: str = ""
    ) -> AsyncIterator["AmqpSubscription"]:
        # Of a connection that was lost, the broker may hold the queue for a while: each has a name that no other had.
        own_name = f"{queue}.{secrets.token_hex(4)}" if queue else None
        async with self._channel_for(_LOG_PREFETCH) as channel:
            subscription = AmqpSubscription(channel, what=exchange, acknowledges_itself=True)
            with _mapped(f"listening to {exchange}"):
                own = await channel.declare_queue(own_name, exclusive=True, auto_delete=True)
                await own.bind(exchange, routing_key=routing_key)
                await subscription.start(own, name=name)
            yield subscription

    @asynccontextmanager
    async def _channel_for(self, prefetch: int) -> AsyncIterator[AbstractChannel]:
        with _mapped("opening a channel"):
            channel = await self._consuming.channel(publisher_confirms=False)
            await channel.set_qos(prefetch_count=prefetch)
        try:
            yield channel
        finally:
            await _close(channel)


@dataclass(slots=True, eq=False)
class AmqpSubscription:
    """Deliveries wait in a queue of our own, which the prefetch bounds.

    Of a log or an own queue, what was received is acknowledged when the next one is asked for, and not behind the reader's back:
    RabbitMQ closes the whole connection over an acknowledgement that comes after its channel was closed.
    """

    channel: AbstractChannel
    what: str
    acknowledges_itself: bool
    _inbox: asyncio.Queue[Delivery | BrokerError] = field(default_factory=asyncio.Queue)
    _underlay: aiormq.abc.AbstractChannel | None = None
    _taken_tag: int = 0
    """The last one received and not acknowledged yet."""

    async def start(
        self,
        source: AbstractQueue,
        *,
        name: str,
        exclusive: bool = False,
        arguments: dict[str, Header] | None = None,
    ) -> None:
        self._underlay = await self.channel.get_underlay_channel()
        self._underlay.on_consumer_cancel_callbacks.add(self._on_cancel)
        self.channel.close_callbacks.add(self._on_close)
        await source.consume(self._on_message, exclusive=exclusive, consumer_tag=name, arguments=dict(arguments or {}))

    async def receive(self) -> Delivery:
        if self.acknowledges_itself and self._taken_tag:
            await self.acknowledge(self._taken_tag, multiple=True)
            self._taken_tag = 0
        return self._taken(await self._inbox.get())

    def receive_nowait(self) -> Delivery | None:
        return None if self._inbox.empty() else self._taken(self._inbox.get_nowait())

    async def acknowledge(self, tag: int, *, multiple: bool = False) -> None:
        with _mapped(f"acknowledging on {self.what}"):
            await self._open_underlay().basic_ack(tag, multiple=multiple, wait=False)

    async def reject(self, tag: int, *, requeue: bool) -> None:
        with _mapped(f"rejecting on {self.what}"):
            await self._open_underlay().basic_reject(tag, requeue=requeue, wait=False)

    def _taken(self, item: Delivery | BrokerError) -> Delivery:
        if isinstance(item, BrokerError):
            self._inbox.put_nowait(item)
            raise item
        self._taken_tag = item.tag
        return item

    def _open_underlay(self) -> aiormq.abc.AbstractChannel:
        if self._underlay is None:
            raise BrokerUnavailableError(f"the subscription to {self.what} has not started")
        return self._underlay

    async def _on_message(self, message: AbstractIncomingMessage) -> None:
        self._inbox.put_nowait(_delivery(message))

    def _on_cancel(self, _: object) -> None:
        self._inbox.put_nowait(BrokerUnavailableError(f"the broker ended the subscription to {self.what}: was it deleted?"))

    def _on_close(self, _: object, exc: BaseException | None) -> None:
        self._inbox.put_nowait(
            BrokerUnavailableError(f"the subscription to {self.what} was lost: {_reason(exc or BrokerError('closed'))}")
        )


def _sendable(headers: Mapping[str, Header]) -> HeadersType:
    """pamqp writes a float in 4 bytes: one that needs 8 goes as its text, not as another number or as an error."""
    return {
        key: repr(value) if isinstance(value, float) and not _fits_4_bytes(value) else value for key, value in headers.items()
    }


def _fits_4_bytes(value: float) -> bool:
    try:
        (same,) = struct.unpack(">f", struct.pack(">f", value))
    except OverflowError:
        return False
    return bool(same == value)


def _delivery(message: AbstractIncomingMessage) -> Delivery:
    headers = {key: value for key, value in message.headers.items() if isinstance(value, str | int | float | bool)}
    offset = headers.get("x-stream-offset")
    return Delivery(
        body=message.body,
        headers=headers,
        message_id=message.message_id or "",
        user_id=message.user_id,
        exchange=message.exchange or "",
        routing_key=message.routing_key or "",
        redelivered=bool(message.redelivered),
        tag=message.delivery_tag or 0,
        offset=offset if isinstance(offset, int) else None,
    )
