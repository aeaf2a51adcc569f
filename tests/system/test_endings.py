"""How a run ends: at its goal, at a signal, at an accuracy; and what the same command does afterwards."""

import pytest
from command_line import descendants, until
from small_federation import SmallFederation

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]


async def test_federation_ends_at_its_version_for_all_and_goes_on_when_the_goal_moves(federation: SmallFederation) -> None:
    await federation.enrol("a")
    aggregator, worker = federation.aggregator("--versions", "20"), federation.worker("a")
    await aggregator.ends_well()
    await worker.ends_well()
    assert aggregator.out == "version 20: 20 merged, 0 buffered, 0 refused, 0 duplicate; the federation is over\n"
    assert worker.lines("the federation is over")

    again, worker_again = federation.aggregator("--versions", "20"), federation.worker("a")
    await again.ends_well()
    await worker_again.ends_well()
    assert again.out == "version 20: 0 merged, 0 buffered, 0 refused, 0 duplicate; the federation is over\n"
    assert not worker_again.lines("trained")

    further = federation.aggregator("--versions", "40")
    await further.says("the federation goes on")
    await further.says("model broadcast")
    worker = federation.worker("a")
    await further.ends_well()
    await worker.ends_well()
    assert further.out.startswith("version 40: 20 merged")
    assert further.out.endswith("the federation is over\n")
    federation.expect_exactly_once("a")


async def test_signal_ends_an_aggregator_and_a_worker_cleanly_and_soon(federation: SmallFederation) -> None:
    await federation.enrol("a")
    aggregator, worker = federation.aggregator(), federation.worker("a")
    await federation.reaches(10, aggregator, worker)
    aggregator.terminate()
    await aggregator.ends_well(within_s=30)
    worker.terminate()
    await worker.ends_well(within_s=30)
    reached = federation.version
    assert aggregator.out.startswith(f"version {reached}: {reached} merged")
    assert aggregator.out.endswith("stopped; the same command goes on\n")
    with federation.ledger() as ledger:
        *_, newest = ledger.snapshots()
    assert newest.version == reached
    federation.expect_exactly_once("a")


async def test_target_accuracy_ends_it_and_the_evaluator_never_outlives_its_aggregator(federation: SmallFederation) -> None:
    await federation.enrol("a")
    killed, worker = federation.aggregator("--evaluation"), federation.worker("a")
    await killed.says("model evaluated")
    evaluators = descendants(killed.pid)
    assert len(evaluators) == 1
    killed.kill()
    await until(lambda: not any(process.is_alive for process in evaluators), "the evaluator ends with its killed aggregator")

    # The flags of the command line reach the evaluator too.
    aggregator = federation.aggregator("--evaluation", "--target-accuracy", "0.9")
    await until(lambda: descendants(aggregator.pid) or not aggregator.is_alive, "an evaluator is started")
    evaluators = descendants(aggregator.pid)
    await aggregator.ends_well()
    await worker.ends_well()
    assert aggregator.lines("goal reached")
    assert aggregator.lines("model evaluated")
    assert not any(process.is_alive for process in evaluators)
    assert aggregator.out.endswith("the federation is over\n")
    federation.expect_exactly_once("a")
