"""kill -9 of the aggregator, of a worker, of the broker, in the middle of a run: nothing is lost, nothing is doubled."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from command_line import until
from small_federation import SmallFederation

from broker_fl.transports.local_rabbitmq import LocalRabbitMQ

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]

CONFIRMED_S = 2.5
"""RabbitMQ 3.10 forgets a quorum queue that was declared just before kill -9."""


async def test_aggregator_killed_again_and_again_in_mid_run_loses_and_doubles_nothing(federation: SmallFederation) -> None:
    await federation.enrol("a", "b")
    workers = [federation.worker(party) for party in ("a", "b")]
    for version in (20, 60, 110):
        aggregator = federation.aggregator("--versions", "160")
        await federation.reaches(version, aggregator)
        aggregator.kill()
    reached = federation.version
    aggregator = federation.aggregator("--versions", "160")
    await aggregator.ends_well()
    assert reached < 160
    for worker in workers:
        await worker.ends_well()
    assert federation.version == 160
    federation.expect_exactly_once("a", "b")
    said = await federation.succeeds("ledger", "verify")
    assert "(160 merged, 0 buffered, 0 refused)" in said
    assert "all as recorded" in said


async def test_worker_killed_again_and_again_in_mid_run_leaves_no_gap_and_no_double(federation: SmallFederation) -> None:
    await federation.enrol("a")
    aggregator = federation.aggregator("--versions", "80")
    for version in (15, 45):
        worker = federation.worker("a")
        await federation.reaches(version, worker, aggregator)
        worker.kill()
    worker = federation.worker("a")
    await aggregator.ends_well()
    await worker.ends_well()
    assert [entry.sequence for entry in federation.updates("a")] == list(range(1, 81))
    federation.expect_exactly_once("a")


async def test_broker_killed_in_mid_run_is_waited_for_and_nothing_is_lost(
    federation_on_own_node: SmallFederation, own_node: LocalRabbitMQ
) -> None:
    federation = federation_on_own_node
    await federation.enrol("a", "b")
    aggregator = federation.aggregator("--versions", "250")
    workers = [federation.worker(party) for party in ("a", "b")]
    await federation.reaches(10, aggregator, *workers)
    await asyncio.sleep(CONFIRMED_S)
    before = federation.version
    async with killed(own_node):
        for running in (aggregator, *workers):
            await running.says("trying again")
    await aggregator.ends_well()
    for worker in workers:
        await worker.ends_well()
    assert before < 250
    assert federation.version == 250
    federation.expect_exactly_once("a", "b")


async def test_federation_whose_time_is_over_waits_quietly_for_its_broker_and_for_those_who_wait_too(
    federation_on_own_node: SmallFederation, own_node: LocalRabbitMQ
) -> None:
    federation = federation_on_own_node
    await federation.enrol("a")
    aggregator = federation.aggregator("--seconds", "8")
    await aggregator.says("model broadcast")
    await asyncio.sleep(CONFIRMED_S)
    async with killed(own_node):
        worker = federation.worker("a")
        await until(lambda: federation.is_over, "the federation is over")
        await worker.says("no broker, trying again", times=2)
        assert worker.is_alive
        # Since then, with pauses of seconds; it was thousands of times.
        assert len(aggregator.lines("broker lost")) < 50
    await aggregator.ends_well()
    await worker.ends_well()
    assert "connected" in worker.err
    federation.expect_exactly_once("a")


@asynccontextmanager
async def killed(node: LocalRabbitMQ) -> AsyncIterator[None]:
    """Away while inside, back afterwards."""
    node.kill()
    try:
        yield
    finally:
        await node.start_again()
