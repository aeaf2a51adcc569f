"""The worker with an observer that counts, on the broker in memory."""

import asyncio
import math

import pytest
from metric_names import values_of

from broker_fl.cli.metrics.worker import WorkerMetrics
from broker_fl.privacy.accounting import epsilon_of
from broker_fl.privacy.policy import Limits
from schemas import wire
from schemas.privacy import PrivacyPlan
from schemas.update import ModelUpdate
from workers.spending import open_spending, spending_file

NOISE = PrivacyPlan(noise_multiplier=2.0, max_grad_norm=1.0, delta=1e-5, accountant="rdp")


def opened(delivery):
    return wire.decode(ModelUpdate, delivery.body)


@pytest.fixture
def metrics():
    return WorkerMetrics()


@pytest.fixture
def told(metrics):
    """A function that waits until a series has a value."""

    async def until(name, value):
        async with asyncio.timeout(20):
            while values_of(metrics.registry).get(name) != value:  # noqa: ASYNC110 - some of it happens in other threads
                await asyncio.sleep(0.001)

    return until


async def test_what_a_worker_does_is_what_its_metrics_say(home, centre, new_trainer, metrics, told):
    async with centre() as hub, home.running(new_trainer(), observer=metrics):
        await told("broker_fl_worker_connected", 1)
        await hub.broadcast(1, up="int8")
        first = await hub.delivery()
        await told("broker_fl_worker_unsettled_updates", 1)
        await told("broker_fl_worker_version", 1)
        await hub.answer(opened(first))
        await told("broker_fl_worker_unsettled_updates", 0)
        await hub.broadcast(2, up="int8")
        second = await hub.delivery()
        await hub.answer(opened(second), "refused")
        await told('broker_fl_worker_updates_total{outcome="refused"}', 1)
        await hub.broadcast(3, up="int8", over=True)
        await told("broker_fl_worker_connected", 0)
    found = values_of(metrics.registry)
    assert found["broker_fl_worker_version"] == 3
    assert found["broker_fl_worker_trainings_total"] == found["broker_fl_worker_training_seconds_count"] == 2
    assert found['broker_fl_worker_updates_total{outcome="merged"}'] == 1
    assert found["broker_fl_worker_unsettled_updates"] == 0
    counters = home.counters()
    assert (
        found['broker_fl_bytes_total{codec="int8",direction="up"}'] == counters["bytes_up"] == len(first.body) + len(second.body)
    )
    down = {name: value for name, value in found.items() if 'direction="down"' in name}
    assert down == {'broker_fl_bytes_total{codec="float32",direction="down"}': counters["bytes_down"]}


async def test_what_waits_and_what_is_held_are_told_at_the_start(home, centre, new_trainer, metrics, told):
    async with centre() as hub, home.running(new_trainer()) as running:
        await hub.broadcast(5)
        await hub.delivery()
        await home.counts("updates_sent")
        async with asyncio.timeout(20):
            while running.outbox.held_model() is None:  # noqa: ASYNC110 - it is kept in a thread, somewhat later
                await asyncio.sleep(0.001)
    home.broker.stop()
    async with home.running(new_trainer(), observer=metrics):
        await told("broker_fl_worker_unsettled_updates", 1)
        await told("broker_fl_worker_version", 5)
        assert values_of(metrics.registry)["broker_fl_worker_connected"] == 0


async def test_a_lost_broker_is_no_connection(home, centre, new_trainer, metrics, told):
    async with home.running(new_trainer(), observer=metrics):
        await told("broker_fl_worker_connected", 1)
        home.broker.stop()
        await told("broker_fl_worker_connected", 0)
        home.broker.start()
        await told("broker_fl_worker_connected", 1)


async def test_the_epsilon_is_that_of_the_record_after_each_training_and_after_a_restart(
    home, centre, new_trainer, metrics, told
):
    limits = Limits(delta=1e-6, accountant="rdp", must_be_noised=True)

    def recorded():
        with open_spending(spending_file(home.folder, home.party)) as spending:
            return epsilon_of(spending.history(), delta=1e-6, accountant="rdp")

    async with centre() as hub, home.running(new_trainer(), observer=metrics, limits=limits):
        await told("broker_fl_worker_epsilon", 0.0)
        for version in (1, 2):
            await hub.broadcast(version, privacy=NOISE)
            await hub.update()
            await told("broker_fl_worker_epsilon", recorded())
    assert recorded() > 0
    again = WorkerMetrics()
    async with home.running(new_trainer(), observer=again, limits=limits):
        async with asyncio.timeout(20):
            while values_of(again.registry)["broker_fl_worker_epsilon"] != recorded():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_a_worker_without_noise_tells_no_epsilon(home, centre, new_trainer, metrics, told):
    async with centre() as hub, home.running(new_trainer(), observer=metrics):
        await hub.broadcast(1)
        await hub.update()
        await told("broker_fl_worker_trainings_total", 1)
    assert math.isnan(values_of(metrics.registry)["broker_fl_worker_epsilon"])


async def test_a_training_that_diverged_is_a_training(home, centre, new_trainer, metrics, told):
    async with centre() as hub, home.running(new_trainer(float("nan")), observer=metrics):
        await hub.broadcast(1)
        await told("broker_fl_worker_trainings_total", 1)
        await home.counts("trainings_diverged")
    assert values_of(metrics.registry)["broker_fl_worker_unsettled_updates"] == 0
