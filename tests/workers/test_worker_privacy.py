"""A worker under differential privacy: what it sends, what it writes down, and when it trains no more."""

import asyncio
import json
from dataclasses import replace

import numpy as np
from structlog.testing import capture_logs

from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.privacy.accounting import epsilon_of
from broker_fl.privacy.policy import Limits
from schemas import wire
from schemas.privacy import PrivacyPlan
from schemas.update import ModelUpdate
from workers.outbox import open_outbox
from workers.service import seed_of
from workers.spending import open_spending, spending_file

ASKED = PrivacyPlan(noise_multiplier=2.0, max_grad_norm=0.5, delta=1e-5, accountant="rdp")


def trainings(home):
    with open_spending(spending_file(home.folder, home.party)) as spending:
        return spending.trainings()


async def test_an_update_says_its_noise_and_not_its_loss_and_its_cost_is_written_down(home, centre, new_trainer):
    train = new_trainer(0.5)
    async with centre() as hub, home.running(train):
        await hub.broadcast(4, privacy=ASKED)
        update = await hub.update()
    (mechanism,) = train.mechanisms
    assert (mechanism.noise_multiplier, mechanism.sample_rate, mechanism.max_grad_norm) == (2.0, 1.0, 0.5)
    assert mechanism.steps == 3
    assert (update.privacy.noise_multiplier, update.privacy.sample_rate, update.privacy.max_grad_norm) == (2.0, 1.0, 0.5)
    assert update.train_loss is None
    (paid,) = trainings(home)
    assert (paid.update_id, paid.base_version, paid.federation, paid.party) == (update.update_id, 4, "ward", "ann")
    assert (paid.noise_multiplier, paid.sample_rate, paid.steps, paid.num_examples) == (2.0, 1.0, 3, 12)


async def test_seeds_of_noised_trainings_are_nobodys_to_know(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train):
        for version in (1, 2):
            await hub.broadcast(version, privacy=ASKED)
            await hub.answer(await hub.update())
        await home.counts("updates_merged", 2)
    async with centre() as hub, home.running(train):
        await hub.broadcast(3, privacy=ASKED, ledger="b" * 32)
        await hub.update()
    assert len(set(train.seeds)) == 3
    assert not {seed_of("ann", sequence) for sequence in range(10)} & set(train.seeds)


async def test_without_noise_nothing_changes_and_no_record_is_made(home, centre, new_trainer):
    train = new_trainer()
    async with centre() as hub, home.running(train):
        await hub.broadcast(1)
        update = await hub.update()
    assert (train.mechanisms, update.privacy, update.train_loss) == ([None], None, 0.5)
    assert not spending_file(home.folder, home.party).exists()


async def test_what_is_sent_again_is_the_same_bytes_and_costs_nothing(home, centre, new_trainer):
    async with centre() as hub, home.running(new_trainer(), resend_after_s=0.2):
        await hub.broadcast(1, privacy=ASKED)
        first = await hub.delivery()
        again = await hub.delivery()
    assert first.body == again.body
    async with centre() as hub, home.running(new_trainer(), resend_after_s=0.2):
        await hub.broadcast(1, privacy=ASKED)
        after_a_restart = await hub.delivery()
    assert after_a_restart.body == first.body
    assert len(trainings(home)) == 1


async def test_with_its_budget_spent_a_worker_follows_the_model_and_ends_well_when_the_federation_does(home, centre, new_trainer):
    train = new_trainer()
    limits = Limits(delta=1e-5, accountant="rdp", max_epsilon=12.0)
    with capture_logs() as said:
        async with centre() as hub, home.running(train, limits=limits) as running:
            version = 0
            while not home.counters().get("trainings_declined"):
                version += 1
                await hub.broadcast(version, privacy=ASKED)
                await _is_through(home, version)
            done = len(train.bases)
            for further in (1, 2):
                await hub.broadcast(version + further, privacy=ASKED)
            await hub.broadcast(version + 3, privacy=ASKED, over=True)
            await running.ended()
    assert 1 < done == len(train.bases) == len(trainings(home))
    (declined,) = [entry for entry in said if entry["event"] == "no training, the model is followed"]
    assert "the privacy budget is spent" in declined["reason"]
    with open_spending(spending_file(home.folder, home.party)) as spending:
        assert epsilon_of(spending.history(), delta=1e-5, accountant="rdp") <= 12.0


async def _is_through(home, version):
    async with asyncio.timeout(20):
        while not (home.counters().get("trainings", 0) == version or home.counters().get("trainings_declined")):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_party_with_a_limit_does_not_train_where_nobody_asks_for_noise(home, centre, new_trainer):
    train = new_trainer()
    with capture_logs() as said:
        async with centre() as hub, home.running(train, limits=Limits(delta=1e-5, accountant="rdp", max_epsilon=5.0)):
            await hub.broadcast(1)
            await home.counts("trainings_declined")
            # The federation thinks better of it.
            await hub.broadcast(1, number=2, privacy=ASKED)
            update = await hub.update()
    assert update.privacy is not None
    assert len(train.bases) == 1
    assert any("asks for no differential privacy" in str(entry.get("reason")) for entry in said)


async def test_a_training_that_diverged_costs_what_it_costs_and_nothing_is_sent(home, centre, new_trainer):
    train = new_trainer(lambda number: np.nan if number == 1 else 1.0)
    async with centre() as hub, home.running(train):
        await hub.broadcast(1, privacy=ASKED)
        await home.counts("trainings_diverged")
        await hub.broadcast(2, privacy=ASKED)
        update = await hub.update()
    assert [paid.update_id for paid in trainings(home)] == [None, update.update_id]
    assert [paid.base_version for paid in trainings(home)] == [1, 2]


async def test_workers_of_two_federations_on_the_same_data_stop_at_their_common_limit(home, centre, new_trainer, tmp_path):
    record, limits = tmp_path / "patients.db", Limits(delta=1e-5, accountant="rdp", max_epsilon=12.0)
    train = new_trainer()
    async with centre() as hub, home.running(train, limits=limits, record=record):
        await hub.broadcast(1, privacy=ASKED)
        await hub.update()
        with open_spending(record) as spending:
            (first,) = spending.trainings()
        # What the other federation's worker does in its process.
        with open_outbox(tmp_path / "other", party="ann", federation="onco") as outbox:
            spending = outbox.attach(record)
            with outbox.transaction():
                for number in range(100):
                    spending.add(_of_another_federation(first, number))
        await hub.broadcast(2, privacy=ASKED)
        await home.counts("trainings_declined")
    assert len(train.bases) == 1


def _of_another_federation(training, number):
    return replace(training, number=None, federation="onco", outbox="other", update_id=f"{number:032x}")


async def test_what_was_promised_is_written_down(home, centre, new_trainer):
    limits = Limits(delta=1e-6, accountant="prv", max_epsilon=50.0)
    async with centre() as hub, home.running(new_trainer(), limits=limits):
        await hub.broadcast(1, privacy=ASKED)
        body = (await hub.delivery()).body
    assert wire.decode(ModelUpdate, body).privacy is not None
    with open_spending(spending_file(home.folder, home.party)) as spending:
        (promise,) = spending.promises()
    assert json.loads(promise.limits) == {"delta": 1e-6, "accountant": "prv", "max_epsilon": 50.0, "must_be_noised": False}
    assert json.loads(promise.plan)["noise_multiplier"] == 2.0


async def test_nothing_of_trainings_without_noise_rides_in_updates_that_are_paid_for_as_noised(home, centre, new_trainer):
    raw, noised = new_trainer(100.0), new_trainer(1.0)
    async with centre() as hub, home.running(raw):
        await hub.broadcast(1, up="topk:0.05+float32")
        await hub.answer(await hub.update())
        await home.counts("updates_merged")
    with home.outbox() as outbox:
        assert np.abs(outbox.residual(hub.frames.manifest.digest)).max() == 100
    async with centre() as hub, home.running(noised):
        await hub.broadcast(2, ledger="b" * 32, privacy=ASKED)
        update = await hub.update()
    assert update.privacy is not None
    assert _largest(update, hub) == 1


async def test_an_update_without_noise_that_is_refused_does_not_return_under_noise(home, centre, new_trainer):
    async with centre() as hub, home.running(new_trainer(100.0)):
        await hub.broadcast(1)
        raw = await hub.update()
    async with centre() as hub, home.running(new_trainer(1.0)):
        await hub.broadcast(2, ledger="b" * 32, privacy=ASKED)
        await home.counts("updates_dropped")
        await hub.answer(raw, outcome="refused", reason="privacy")
        await hub.broadcast(3, ledger="b" * 32, privacy=ASKED)
        updates = [await hub.update() for _ in range(2)]
    assert {_largest(update, hub) for update in updates if update.privacy is not None} == {1}


async def test_updates_without_noise_are_not_sent_once_the_party_allows_none(home, centre, new_trainer):
    async with home.running(new_trainer(100.0)) as _, centre() as hub:
        await hub.broadcast(1)
        await home.counts("trainings")
    with home.outbox() as outbox:
        made = outbox.all_unsettled()
        with outbox.transaction():
            for stored in made:
                outbox.mark_sent(stored.update_id, at=0.0)
    async with centre() as hub, home.running(new_trainer(), limits=Limits(delta=1e-5, accountant="rdp", max_epsilon=5.0)):
        await hub.broadcast(2)
        await home.counts("trainings_declined")
        assert home.counters()["updates_dropped"] == len(made) == 1
    with home.outbox() as outbox:
        assert outbox.all_unsettled() == []


def _largest(update, hub):
    decoded = decode(update.payload, parse_codec(update.codec), manifest=hub.frames.manifest)
    return np.abs(decoded.dense()).max()


async def test_what_noised_trainings_left_over_is_kept_over_restarts(home, centre, new_trainer):
    limits = Limits(delta=1e-5, accountant="rdp", max_epsilon=50.0)
    async with centre() as hub, home.running(new_trainer(3.0), limits=limits):
        await hub.broadcast(1, up="topk:0.05+float32", privacy=ASKED)
        await hub.answer(await hub.update())
        await home.counts("updates_merged")
    async with centre() as hub, home.running(new_trainer(1.0), limits=limits):
        await hub.broadcast(2, ledger="b" * 32, up="topk:0.05+float32", privacy=ASKED)
        update = await hub.update()
    assert _largest(update, hub) == 4


async def test_a_record_that_is_gone_is_no_reason_to_train_without_noise(home, centre, new_trainer):
    async with centre() as hub, home.running(new_trainer()):
        await hub.broadcast(1, privacy=ASKED)
        await hub.answer(await hub.update())
    spending_file(home.folder, home.party).unlink()
    train = new_trainer()
    async with centre() as hub, home.running(train):
        await hub.broadcast(2, ledger="b" * 32)
        await home.counts("trainings_declined")
    assert train.bases == []
