"""A broker in this process, with the semantics that the project relies on: for tests, and for a demo where no RabbitMQ is.

It keeps to RabbitMQ in fanout, direct and topic routing, permissions, checked user ids, acknowledgements, redelivery, delivery
limits, dead letters, single active consumers, exclusive consumers, logs with offsets that have gaps, and message size. It keeps
nothing when the process ends.
"""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count

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
from broker_fl.topology import Binding, Exchange, Permissions, Policy, Queue, Topology
from broker_fl.transports.transport import Delivery, Message, Start

EVERYTHING = Permissions(configure=".*", write=".*", read=".*")
_MESSAGES_PER_OFFSET_GAP = 4


@dataclass(slots=True)
class _Stored:
    delivery: Delivery
    returns: int = 0
    """How often it came back: RabbitMQ's x-delivery-count."""


@dataclass(slots=True, eq=False)
class _Consumer:
    """One subscription's side of a queue: what was handed to it, and what it has not settled."""

    name: str
    prefetch: int
    exclusive: bool = False
    settles: bool = True
    """Whether it says what is settled; else everything is, as soon as it was handed over."""
    is_open: bool = True
    inbox: asyncio.Queue[Delivery | None] = field(default_factory=asyncio.Queue)
    unsettled: dict[int, _Stored] = field(default_factory=dict)
    tags: Iterator[int] = field(default_factory=lambda: count(1))

    def close(self) -> None:
        self.is_open = False
        self.unsettled.clear()
        self.inbox.put_nowait(None)


@dataclass(slots=True)
class _Queue:
    spec: Queue
    ready: deque[_Stored] = field(default_factory=deque)
    consumers: list[_Consumer] = field(default_factory=list)
    log: list[Delivery] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    is_deleted: bool = False


class MemoryBroker:
    def __init__(self, *, max_message_bytes: int = 16 << 20) -> None:
        self.users: dict[str, Permissions] = {}
        self.max_message_bytes = max_message_bytes
        self._exchanges: dict[str, Exchange] = {}
        self._queues: dict[str, _Queue] = {}
        self._bindings: set[Binding] = set()
        self._policies: dict[str, Policy] = {}
        self._transports: dict[int, MemoryTransport] = {}
        self._numbers = count(1)
        self._offsets = count(1)
        self.is_up = True

    @asynccontextmanager
    async def connect(self, name: str, *, user: str = "admin") -> AsyncIterator["MemoryTransport"]:
        """Users are made by writing to `users`; `admin` may do everything."""
        if not self.is_up:
            raise BrokerUnavailableError("the in-memory broker is stopped")
        if user != "admin" and user not in self.users:
            raise AuthenticationError(f"the in-memory broker knows no user {user!r}")
        number = next(self._numbers)
        transport = MemoryTransport(self, user=user, name=name)
        self._transports[number] = transport
        try:
            yield transport
        finally:
            del self._transports[number]
            transport.cut()

    def connections(self) -> list[str]:
        """The names of those who are connected."""
        return [transport.name for transport in self._transports.values()]

    def stop(self) -> None:
        """Cuts all connections; queues and logs stay, as with a restarted broker."""
        self.is_up = False
        for transport in list(self._transports.values()):
            transport.cut()

    def start(self) -> None:
        self.is_up = True

    def depth(self, queue: str) -> int:
        """Messages that are ready."""
        return len(self._queues[queue].ready)

    def apply_policies(self, policies: tuple[Policy, ...]) -> None:
        self._policies.update({policy.name: policy for policy in policies})

    def permissions(self, user: str) -> Permissions:
        return EVERYTHING if user == "admin" else self.users[user]

    def declare(self, topology: Topology) -> None:
        for exchange in topology.exchanges:
            if self._exchanges.setdefault(exchange.name, exchange) != exchange:
                raise TopologyConflictError(f"exchange {exchange.name} exists with another type")
        for queue in topology.queues:
            if self._queues.setdefault(queue.name, _Queue(queue)).spec != queue:
                raise TopologyConflictError(f"queue {queue.name} exists with other arguments")
        for binding in topology.bindings:
            self._exchange(binding.exchange)
            self.queue(binding.queue)
            self._bindings.add(binding)

    def delete_queue(self, name: str) -> None:
        queue = self._queues.pop(name)
        queue.is_deleted = True
        queue.grown.set()
        for consumer in queue.consumers:
            consumer.close()
        queue.consumers.clear()
        self._bindings = {binding for binding in self._bindings if binding.queue != name}

    def has_queue(self, name: str) -> bool:
        return name in self._queues

    def queue(self, name: str) -> _Queue:
        if name not in self._queues:
            raise NotFoundError(f"no queue {name!r}")
        return self._queues[name]

    def route(self, delivery: Delivery) -> int:
        """How many queues took it."""
        exchange = self._exchange(delivery.exchange)
        targets = {
            binding.queue
            for binding in self._bindings
            if binding.exchange == exchange.name and _matches(exchange, binding.routing_key, delivery.routing_key)
        }
        for name in targets:
            self._store(self._queues[name], _Stored(delivery))
        return len(targets)

    def new_name(self, prefix: str) -> str:
        return f"{prefix}.{next(self._numbers)}"

    def detach(self, queue: _Queue, consumer: _Consumer) -> None:
        """What it has not settled goes back."""
        unsettled = list(consumer.unsettled.values())
        consumer.close()
        if consumer in queue.consumers:
            queue.consumers.remove(consumer)
            self.give_back(queue, unsettled)

    def dispatch(self, queue: _Queue) -> None:
        if not self.is_up:
            return
        single = queue.spec.arguments.get("x-single-active-consumer", False)
        for consumer in queue.consumers[:1] if single else queue.consumers:
            while queue.ready and len(consumer.unsettled) < consumer.prefetch:
                stored = queue.ready.popleft()
                tag = next(consumer.tags)
                if consumer.settles:
                    consumer.unsettled[tag] = stored
                consumer.inbox.put_nowait(replace(stored.delivery, tag=tag, redelivered=stored.returns > 0))

    def give_back(self, queue: _Queue, stored: list[_Stored]) -> None:
        """Into the queue again at its front, or past the delivery limit to the dead letters."""
        limit = self._effective(queue.spec.name).get("delivery-limit")
        for one in reversed(stored):
            one.returns += 1
            if queue.spec.kind == "quorum" and isinstance(limit, int) and one.returns > limit:
                self.dead_letter(queue, one, reason="delivery_limit")
            else:
                queue.ready.appendleft(one)
        self.dispatch(queue)

    def dead_letter(self, queue: _Queue, stored: _Stored, *, reason: str) -> None:
        exchange = queue.spec.arguments.get("x-dead-letter-exchange")
        if isinstance(exchange, str):
            headers = {
                **stored.delivery.headers,
                "x-first-death-reason": reason,
                "x-first-death-queue": queue.spec.name,
                "x-first-death-exchange": stored.delivery.exchange,
            }
            self.route(replace(stored.delivery, exchange=exchange, headers=headers))

    def _store(self, queue: _Queue, stored: _Stored) -> None:
        if queue.spec.kind == "stream":
            offset = next(self._offsets)
            if offset % _MESSAGES_PER_OFFSET_GAP == 0:
                offset = next(self._offsets)
            queue.log.append(replace(stored.delivery, offset=offset))
            self._trim(queue)
            queue.grown.set()
        else:
            queue.ready.append(stored)
            self.dispatch(queue)

    def _trim(self, queue: _Queue) -> None:
        keep_bytes = self._effective(queue.spec.name).get("max-length-bytes")
        if isinstance(keep_bytes, int):
            held = sum(len(delivery.body) for delivery in queue.log)
            while held > keep_bytes and len(queue.log) > 1:
                held -= len(queue.log.pop(0).body)

    def _effective(self, queue: str) -> dict[str, str | int | bool]:
        matching = [policy for policy in self._policies.values() if re.search(policy.pattern, queue)]
        return dict(max(matching, key=lambda policy: policy.priority).definition) if matching else {}

    def _exchange(self, name: str) -> Exchange:
        if name not in self._exchanges:
            raise NotFoundError(f"no exchange {name!r}")
        return self._exchanges[name]


def _matches(exchange: Exchange, pattern: str, routing_key: str) -> bool:
    if exchange.kind == "fanout":
        return True
    if exchange.kind == "direct":
        return pattern == routing_key
    return _words_match(pattern.split("."), routing_key.split(".") if routing_key else [])


def _words_match(pattern: list[str], words: list[str]) -> bool:
    """`*` is one word, `#` any number of them."""
    if not pattern:
        return not words
    head, *rest = pattern
    if head == "#":
        return any(_words_match(rest, words[skipped:]) for skipped in range(len(words) + 1))
    return bool(words) and head in ("*", words[0]) and _words_match(rest, words[1:])


class MemoryTransport:
    def __init__(self, broker: MemoryBroker, *, user: str, name: str) -> None:
        self._broker = broker
        self._user = user
        self.name = name
        self._permissions = broker.permissions(user)
        self._queues_by_consumer: dict[_Consumer, _Queue] = {}
        self._feeds: list[MemoryFeed] = []
        self._is_lost = False

    @property
    def user(self) -> str:
        return self._user

    def cut(self) -> None:
        """The connection is gone."""
        self._is_lost = True
        for feed in self._feeds:
            feed.close()
        for consumer, queue in self._queues_by_consumer.items():
            self._broker.detach(queue, consumer)

    async def declare(self, topology: Topology) -> None:
        self._alive()
        for name in [exchange.name for exchange in topology.exchanges] + [queue.name for queue in topology.queues]:
            self._allow("configure", self._permissions.configure, name)
        for binding in topology.bindings:
            self._allow("write", self._permissions.write, binding.queue)
            self._allow("read", self._permissions.read, binding.exchange)
        self._broker.declare(topology)

    async def has_queue(self, name: str) -> bool:
        self._alive()
        return self._broker.has_queue(name)

    async def publish(self, message: Message) -> None:
        self._alive()
        self._allow("write", self._permissions.write, message.exchange)
        if len(message.body) > self._broker.max_message_bytes:
            raise MessageTooLargeError(
                f"{len(message.body)} bytes are over the broker's limit of {self._broker.max_message_bytes}"
            )
        delivery = Delivery(
            body=message.body,
            headers=dict(message.headers),
            message_id=message.message_id,
            user_id=self._user,
            exchange=message.exchange,
            routing_key=message.routing_key,
            redelivered=False,
            tag=0,
            offset=None,
        )
        if not self._broker.route(delivery) and message.mandatory:
            raise UnroutableError(f"no queue takes messages of {message.exchange!r} with key {message.routing_key!r}")
        await asyncio.sleep(0)

    @asynccontextmanager
    async def consume(
        self, queue: str, *, prefetch: int, name: str, exclusive: bool = False
    ) -> AsyncIterator["MemorySubscription"]:
        self._alive()
        self._allow("read", self._permissions.read, queue)
        state = self._broker.queue(queue)
        if any(other.exclusive for other in state.consumers) or (exclusive and state.consumers):
            raise QueueInUseError(f"queue {queue!r} is held by another consumer alone")
        async with self._attached(state, _Consumer(name, prefetch, exclusive)) as subscription:
            yield subscription

    @asynccontextmanager
    async def _attached(self, queue: _Queue, consumer: _Consumer) -> AsyncIterator["MemorySubscription"]:
        queue.consumers.append(consumer)
        self._queues_by_consumer[consumer] = queue
        self._broker.dispatch(queue)
        try:
            yield MemorySubscription(self._broker, queue, consumer)
        finally:
            del self._queues_by_consumer[consumer]
            self._broker.detach(queue, consumer)

    @asynccontextmanager
    async def follow(self, log: str, *, start: Start, name: str) -> AsyncIterator["MemoryFeed"]:  # noqa: ARG002
        self._alive()
        self._allow("read", self._permissions.read, log)
        state = self._broker.queue(log)
        feed = MemoryFeed(state, next_offset=_first_offset(state.log, start))
        self._feeds.append(feed)
        try:
            yield feed
        finally:
            self._feeds.remove(feed)
            feed.close()

    @asynccontextmanager
    async def listen(
        self, exchange: str, *, routing_key: str = "", name: str, queue: str = ""
    ) -> AsyncIterator["MemorySubscription"]:
        self._alive()
        self._allow("read", self._permissions.read, exchange)
        own = Queue(self._broker.new_name(queue or f"listen.{name}"), "classic")
        self._broker.declare(Topology(queues=(own,), bindings=(Binding(exchange, own.name, routing_key),)))
        consumer = _Consumer(name, prefetch=1, settles=False)
        try:
            async with self._attached(self._broker.queue(own.name), consumer) as subscription:
                yield subscription
        finally:
            self._broker.delete_queue(own.name)

    def _alive(self) -> None:
        if self._is_lost:
            raise BrokerUnavailableError("the connection to the in-memory broker is gone")

    def _allow(self, right: str, pattern: str, name: str) -> None:
        if not re.search(pattern, name):
            raise AccessRefusedError(f"user {self._user!r} has no {right} right on {name!r}")


def _first_offset(log: list[Delivery], start: Start) -> int:
    if start == "first":
        return 0
    if isinstance(start, int):
        return start
    last = (log[-1].offset or 0) if log else 0
    return last if start == "last" else last + 1


class MemorySubscription:
    def __init__(self, broker: MemoryBroker, queue: _Queue, consumer: _Consumer) -> None:
        self._broker = broker
        self._queue = queue
        self._consumer = consumer

    async def receive(self) -> Delivery:
        return self._checked(await self._consumer.inbox.get())

    def receive_nowait(self) -> Delivery | None:
        return None if self._consumer.inbox.empty() else self._checked(self._consumer.inbox.get_nowait())

    async def acknowledge(self, tag: int, *, multiple: bool = False) -> None:
        self._alive()
        for settled in [known for known in self._consumer.unsettled if known == tag or (multiple and known < tag)]:
            del self._consumer.unsettled[settled]
        self._broker.dispatch(self._queue)

    async def reject(self, tag: int, *, requeue: bool) -> None:
        self._alive()
        stored = self._consumer.unsettled.pop(tag)
        if requeue:
            self._broker.give_back(self._queue, [stored])
        else:
            self._broker.dead_letter(self._queue, stored, reason="rejected")
            self._broker.dispatch(self._queue)

    def _alive(self) -> None:
        if not self._consumer.is_open:
            raise BrokerUnavailableError(f"the subscription to {self._queue.spec.name} is closed, or its connection lost")

    def _checked(self, delivery: Delivery | None) -> Delivery:
        if delivery is None:
            self._consumer.inbox.put_nowait(None)
            raise BrokerUnavailableError(f"the subscription to {self._queue.spec.name} was closed, lost or its queue deleted")
        return delivery


class MemoryFeed:
    def __init__(self, queue: _Queue, *, next_offset: int) -> None:
        self._queue = queue
        self._next_offset = next_offset
        self._is_open = True

    def close(self) -> None:
        self._is_open = False
        self._queue.grown.set()

    async def receive(self) -> Delivery:
        while (delivery := self.receive_nowait()) is None:
            self._queue.grown.clear()
            await self._queue.grown.wait()
        return delivery

    def receive_nowait(self) -> Delivery | None:
        if not self._is_open or self._queue.is_deleted:
            raise BrokerUnavailableError(f"the log {self._queue.spec.name} was deleted, or its connection lost")
        for delivery in self._queue.log:
            if delivery.offset is not None and delivery.offset >= self._next_offset:
                self._next_offset = delivery.offset + 1
                return delivery
        return None
