"""What the project needs of a broker, and no more. Two implementations pass one contract suite (tests/contracts)."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from broker_fl.topology import Topology

Header = str | int | float | bool
Start = Literal["first", "last", "next"] | int
"""Where to attach to a log: its first, its last or the next message, or an offset."""


@dataclass(frozen=True, slots=True)
class Message:
    exchange: str
    body: bytes
    routing_key: str = ""
    message_id: str = ""
    headers: Mapping[str, Header] = field(default_factory=dict)
    mandatory: bool = True
    """Raise UnroutableError if no queue takes it."""


@dataclass(frozen=True, slots=True)
class Delivery:
    body: bytes
    headers: Mapping[str, Header]
    message_id: str
    user_id: str | None
    """The sender's login, checked by the broker; None if the sender did not say."""
    exchange: str
    routing_key: str
    redelivered: bool
    tag: int
    offset: int | None
    """In a log; offsets ascend, with gaps."""


class Feed(Protocol):
    """Reads without consuming."""

    async def receive(self) -> Delivery:
        """The next one; raises BrokerUnavailableError when the connection is lost or the queue deleted."""

    def receive_nowait(self) -> Delivery | None:
        """The next one if it is here already."""


class Subscription(Feed, Protocol):
    """Consumes: what is not acknowledged when it closes is delivered again."""

    async def acknowledge(self, tag: int, *, multiple: bool = False) -> None:
        """Of this delivery, or of all up to it."""

    async def reject(self, tag: int, *, requeue: bool) -> None:
        """Back into the queue, or to where its dead letters go."""


class Transport(Protocol):
    """One login's connection to a broker. A lost connection is not mended: open another transport."""

    @property
    def user(self) -> str: ...

    async def declare(self, topology: Topology) -> None:
        """Exchanges, queues and bindings; idempotent. Raises TopologyConflictError where one exists with other arguments."""

    async def has_queue(self, name: str) -> bool: ...

    async def publish(self, message: Message) -> None:
        """Returns when the broker has it safe.

        Raises UnroutableError, AccessRefusedError, NotFoundError, MessageTooLargeError, PublishTimeoutError (it may have
        arrived or not) and BrokerUnavailableError (the same).
        """

    def consume(
        self, queue: str, *, prefetch: int, name: str, exclusive: bool = False
    ) -> AbstractAsyncContextManager[Subscription]:
        """`name` is what an operator reads in the console. Raises QueueInUseError if another one holds the queue alone."""

    def follow(self, log: str, *, start: Start, name: str) -> AbstractAsyncContextManager[Feed]:
        """A log from `start` on. `last` may begin some messages before the last one."""

    def listen(self, exchange: str, *, routing_key: str = "", name: str, queue: str = "") -> AbstractAsyncContextManager[Feed]:
        """What is published from now on, through a queue of its own that goes when it closes. `queue` is what the name of that
        begins with; without it the broker names it."""


class Connect(Protocol):
    """Opens transports; what a service is given instead of an address."""

    def __call__(self, name: str) -> AbstractAsyncContextManager[Transport]:
        """`name` is the connection's name in the console. Raises BrokerUnavailableError and AuthenticationError."""
