"""Models and updates that are over the broker's limit for a message travel in parts, end to end."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from command_line import until
from small_federation import SmallFederation

from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.parts import PARTS
from broker_fl.transports.transport import Delivery, Feed

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]

PART_BYTES = 8192


async def test_model_and_updates_travel_in_parts_and_a_worker_that_attaches_late_finds_the_whole_frame(
    federation: SmallFederation,
) -> None:
    federation.task = federation.task.replace(":TASK", ":WIDE")
    federation.configure(
        broker={"max_message_bytes": 65_536, "part_bytes": PART_BYTES}, codec={"up": "float32", "down": "float32"}
    )
    await federation.enrol("early", "late")
    names, part_bytes = federation.names, ("--set", f"broker.part_bytes={PART_BYTES}")
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(amqp_connect(federation.settings.broker)("test"))
        listen = [transport.listen(names.up(party), name=party) for party in ("early", "late")]
        updates = [await stack.enter_async_context(listening) for listening in listen]
        aggregator = federation.aggregator()
        early = federation.worker("early", *part_bytes)
        await federation.reaches(8, aggregator, early)
        late = federation.worker("late", *part_bytes)
        await until(lambda: len(federation.updates("late")) >= 3, "the late worker takes part")
        for running in (early, late, aggregator):
            running.terminate()
            await running.ends_well()
        received = [await everything(feed) for feed in updates]
        logs = [transport.follow(log, start="first", name="test") for log in (names.model_log, names.keyframe_log)]
        frames, keyframes = [await everything(await stack.enter_async_context(log)) for log in logs]
    announcement, *deltas = frames
    assert announcement.headers["x-fl-kind"] == "announcement"
    assert PARTS not in announcement.headers
    for deliveries in (*received, deltas, keyframes):
        assert deliveries
        for delivery in deliveries:
            assert len(delivery.body) <= PART_BYTES
            assert delivery.headers[PARTS] >= 12
            assert delivery.headers["x-fl-size"] > 65_536
    # The changes since the first model cost more than a whole one.
    assert federation.outbox("late").counters["keyframes_received"] == 1
    for party in ("early", "late"):
        federation.expect_held(party)
    bases = [entry.base_version for entry in federation.updates("late")]
    assert bases[0] >= 8
    assert "left out" not in late.err
    with federation.ledger() as ledger:
        for party in ("early", "late"):
            # Only of what was on its way when its worker was stopped.
            assert set(ledger.half_sent(party)) <= set(federation.outbox(party).unsettled.values())
    federation.expect_exactly_once("early", "late")


async def everything(feed: Feed) -> list[Delivery]:
    """What is there now."""
    deliveries: list[Delivery] = []
    while True:
        try:
            async with asyncio.timeout(1):
                deliveries.append(await feed.receive())
        except TimeoutError:
            return deliveries
