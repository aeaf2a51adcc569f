"""Which of several aggregators of one federation is at work: a token, in a queue with a single active consumer.

RabbitMQ hands the token to one consumer, who keeps it without acknowledging it. When that one's connection ends, however it
ends, the token goes back into the queue and to the next consumer, within milliseconds. That is not fencing: a leader that was
frozen does not know that it was replaced. The ledger's epoch sees to that.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker_fl.topology import Names, leadership
from broker_fl.transports.transport import Message, Subscription, Transport

_RENEW_S = 300.0
"""RabbitMQ closes the channel of whoever keeps a message for 30 minutes; each renewed token is a new message."""

_TOKENS_AT_A_TIME = 2
"""The one that is kept, and the one that takes its place."""


class Candidate:
    """Use inside `candidacy`."""

    def __init__(self, transport: Transport, tokens: Subscription, names: Names) -> None:
        self._transport = transport
        self._tokens = tokens
        self._names = names
        self._held: int | None = None

    async def elected(self) -> None:
        """Returns when nobody else leads. Raises BrokerUnavailableError when the connection is lost."""
        self._held = (await self._tokens.receive()).tag

    async def keep(self) -> None:
        """Until cancelled. Tokens that other candidates brought along are taken out of the way."""
        await self._offer()
        while True:
            try:
                async with asyncio.timeout(_RENEW_S):
                    newer = (await self._tokens.receive()).tag
            except TimeoutError:
                await self._offer()
                continue
            if self._held is not None:
                await self._tokens.acknowledge(self._held)
            self._held = newer

    async def _offer(self) -> None:
        await self._transport.publish(Message(self._names.leader, b"", message_id="token"))


@asynccontextmanager
async def candidacy(transport: Transport, names: Names, *, name: str = "aggregator") -> AsyncIterator[Candidate]:
    """Stands for election while inside; whoever was elected leads until the end of it. `name` is what an operator reads of it in
    the console."""
    await transport.declare(leadership(names.federation))
    # Whoever comes brings a token, so that there is always one, whatever became of the queue.
    await transport.publish(Message(names.leader, b"", message_id="token"))
    async with transport.consume(names.leader, prefetch=_TOKENS_AT_A_TIME, name=name) as tokens:
        yield Candidate(transport, tokens, names)
