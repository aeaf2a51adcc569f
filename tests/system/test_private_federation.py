"""Differential privacy as its users meet it: the command line, a real broker, and workers that are killed."""

import asyncio
import json

import pytest
from command_line import until
from opacus.accountants import RDPAccountant
from small_federation import SmallFederation

from workers.spending import open_spending

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(600)]

DELTA = 1e-5
KILLED = -9
DEATHS = ("worker.trained", "worker.spent", "worker.kept", "worker.sent")
"""All failpoints between a training and the confirmation of its update."""


async def test_workers_that_die_between_training_and_sending_have_written_down_all_that_they_sent(
    federation: SmallFederation,
) -> None:
    federation.configure(
        codec={"up": "int8"},
        privacy={"mechanism": "dp-sgd", "noise_multiplier": 2.0, "delta": DELTA, "max_epsilon": 1000.0},
        aggregator={"versions": 40},
    )
    dying = {f"dies-{number}": name for number, name in enumerate(DEATHS)}
    await federation.enrol(*dying, "thrifty")
    aggregator = federation.aggregator()
    thrifty = federation.worker("thrifty", "--set", "privacy.max_epsilon=1.6")
    first = {
        party: federation.worker(party, variables={"BROKER_FL_FAILPOINTS": f"{failpoint}=kill@2"})
        for party, failpoint in dying.items()
    }
    for running in first.values():
        assert await running.ends() == KILLED
    again = [federation.worker(party) for party in dying]
    # A party whose budget is spent follows the model, and ends well when the federation is over.
    for running in (aggregator, thrifty, *again):
        await running.ends_well()
    assert len(thrifty.lines("no training, the model is followed")) == 1
    assert thrifty.lines("the federation is over")

    for party in (*dying, "thrifty"):
        _expect_paid(federation, party)
    with open_spending(federation.home("thrifty") / "broker-fl-state" / "privacy-thrifty.db") as spending:
        opacus = _opacus(spending.trainings())
        assert 0 < opacus.get_epsilon(DELTA) <= 1.6
        opacus.history += [(2.0, opacus.history[-1][1], 2)]
        assert opacus.get_epsilon(DELTA) > 1.6
    federation.expect_exactly_once(*dying, "thrifty")
    await _expect_reports(federation, "dies-1")


def _expect_paid(federation: SmallFederation, party: str) -> None:
    """Every update that left is written down once, and the ledger knows the same of its noise."""
    entries = federation.updates(party)
    with open_spending(federation.home(party) / "broker-fl-state" / f"privacy-{party}.db") as spending:
        trainings = spending.trainings()
    sent = {entry.update_id for entry in entries} | set(federation.outbox(party).unsettled.values())
    assert {one.update_id for one in trainings} == sent
    assert len(trainings) == len(sent) > 1
    assert all((entry.noise_multiplier, entry.num_steps, entry.train_loss) == (2.0, 2, None) for entry in entries)


def _opacus(trainings: list) -> RDPAccountant:
    accountant = RDPAccountant()
    for training in trainings:
        for _ in range(training.steps):
            accountant.step(noise_multiplier=training.noise_multiplier, sample_rate=training.sample_rate)
    return accountant


async def _expect_reports(federation: SmallFederation, party: str) -> None:
    home = federation.home(party)
    command = ("privacy", "report", "--enrolment", f"{party}.toml")
    said, _, _ = await asyncio.gather(
        federation.succeeds(*command, folder=home),
        federation.succeeds(*command, "--out", "one.html", folder=home),
        federation.succeeds(*command, "--out", "two.html", folder=home),
    )
    assert (home / "one.html").read_bytes() == (home / "two.html").read_bytes()
    report = json.loads((home / "one.json").read_text())
    assert (home / "one.json").read_bytes() == (home / "two.json").read_bytes()
    epsilon = {cost["accountant"]: cost["epsilon"] for cost in report["costs"]}
    with open_spending(home / "broker-fl-state" / f"privacy-{party}.db") as spending:
        assert epsilon["rdp"] == pytest.approx(_opacus(spending.trainings()).get_epsilon(DELTA), abs=1e-6)
    assert f"epsilon by rdp: {epsilon['rdp']:.4f}" in said
    # The aggregator counts the same, of the updates that reached it.
    counted = await federation.succeeds("privacy", "parties")
    reached = RDPAccountant()
    for entry in federation.updates(party):
        for _ in range(entry.num_steps):
            reached.step(noise_multiplier=entry.noise_multiplier, sample_rate=entry.sample_rate)
    assert f"{party}: each example epsilon {reached.get_epsilon(DELTA):.4f}" in counted


async def test_a_worker_that_does_not_know_of_the_noise_is_told_what_is_missing(federation: SmallFederation) -> None:
    await federation.enrol("a")  # Before: its enrolment says nothing of it.
    federation.configure(privacy={"mechanism": "dp-sgd", "noise_multiplier": 2.0}, codec={"up": "int8"})
    aggregator = federation.aggregator("--set", "task.model=federated_cnn", "--set", "task.name=digits")
    assert aggregator.is_alive
    await until(lambda: federation.version == 0 and aggregator.lines("aggregator is up"), "the aggregator is up")
    worker = federation.run(
        *("worker", "--enrolment", "a.toml", "--task", "digits", "--model", "federated_cnn"), folder=federation.home("a")
    )
    assert '[privacy] mechanism = "dp-sgd"' in await worker.ends_with_one_line()
