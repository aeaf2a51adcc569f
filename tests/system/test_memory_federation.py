"""A whole federation in one process: the real task, training and wiring, on the in-memory broker."""

import asyncio
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from aggregator.opening import open_ledger_for_reading
from aggregator.recovery import manifest_of_ledger
from aggregator.verification import verify
from broker_fl.cli.stores import ledger_url, snapshots_of
from broker_fl.cli.wiring import built_aggregator, built_evaluator, built_worker
from broker_fl.config import load_settings
from broker_fl.topology import Names, party, party_permissions, policies, shared
from broker_fl.transports.memory import MemoryBroker
from schemas import wire
from schemas.event import Event
from workers.outbox import open_outbox, read_counters

PARTIES = ("ann", "bob", "cem")
NAMES = Names("digits")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def broker():
    broker = MemoryBroker()
    broker.declare(shared("digits"))
    broker.apply_policies(policies("digits", model_bytes=1 << 20))
    for name in PARTIES:
        broker.declare(party("digits", name))
        broker.users[name] = party_permissions("digits", name)
    return broker


@pytest.fixture
def settings_of(tmp_path):
    """A function: the settings of the federation, or of one of its workers."""

    def made(worker=None, **sections):
        number = PARTIES.index(worker) + 1 if worker else None
        flags = {
            "federation": {"name": "digits"},
            "partition": {"scheme": "iid"},
            "training": {"learning_rate": 0.05, "epochs": 1},
            "codec": {"up": "int8"},
            "evaluation": {"device": "cpu"},
            "worker": {
                "party": worker,
                "state": tmp_path / "worker",
                "share": number and f"{number}/{len(PARTIES)}",
                "device": "cpu",
            },
            **sections,
        }
        flags["security"] = {"signatures": False}
        flags["trust"] = {"max_updates_per_minute": 0}
        flags["aggregator"] = {"state": tmp_path / "aggregator", "broadcast_every_s": 0.05, **sections.get("aggregator", {})}
        return load_settings(flags=flags, environment={})

    return made


async def _lived(broker, settings_of, **sections):
    """A federation from its first model to its last; the events about its evaluations."""
    settings = settings_of(**sections)
    events = []

    async def look_on(transport, is_broadcast):
        async with transport.listen(NAMES.events, routing_key="#", name="onlooker") as feed:
            while not (events and events[-1].facts["over"]):
                event = wire.decode(Event, (await feed.receive()).body)
                if event.kind == "frame.published":
                    is_broadcast.set()
                elif event.kind == "model.evaluated":
                    events.append(event)

    with ExitStack() as stack:
        built = stack.enter_context(built_aggregator(settings, broker.connect))
        workers = [
            stack.enter_context(built_worker(settings_of(name, **sections), partial(broker.connect, user=name)))
            for name in PARTIES
        ]
        evaluator = built_evaluator(settings, broker.connect)
        async with asyncio.timeout(120), broker.connect("onlooker") as transport, asyncio.TaskGroup() as group:
            is_broadcast = asyncio.Event()
            group.create_task(look_on(transport, is_broadcast))
            group.create_task(built.service.run(built.open_state))
            # In a log that ends with a last frame, workers would take the federation for over.
            await is_broadcast.wait()
            for service in (*workers, evaluator):
                group.create_task(service.run())
        digest = built.coordinator.model_digest()
    return settings, digest, events


def _verified(settings, manifest):
    with open_ledger_for_reading(ledger_url(settings)) as ledger:
        return verify(ledger, snapshots_of(settings, manifest)), ledger.totals()


def _manifest(settings):
    with open_ledger_for_reading(ledger_url(settings)) as ledger:
        return manifest_of_ledger(ledger)


def _assert_books_agree(settings, totals):
    """What each worker counted is what the ledger says of it; nothing is on its way but what was never decided."""
    for name in PARTIES:
        counters = read_counters(settings.worker.state, name)
        decided = {total.outcome: total.updates for total in totals if total.party == name}
        with open_outbox(settings.worker.state, party=name, federation="digits") as outbox:
            unsettled = outbox.unsettled_count()
        for outcome in ("merged", "buffered", "refused"):
            assert counters.get(f"updates_{outcome}", 0) == decided.get(outcome, 0), (name, outcome)
        assert counters["trainings"] == sum(decided.values()) + unsettled
        assert counters["bytes_up"] >= sum(total.size for total in totals if total.party == name)


async def test_federation_learns_digits_and_its_books_agree(broker, settings_of):
    settings, digest, events = await _lived(
        broker, settings_of, aggregator={"versions": 40, "broadcast_every_merges": 1, "snapshot_every_versions": 15}
    )
    assert events[-1].version == 40
    assert events[-1].facts["accuracy"] > 0.9
    found, totals = _verified(settings, _manifest(settings))
    assert (found.version, found.merged, found.model_digest) == (40, 40, digest)
    assert found.snapshots == 4
    assert {total.party for total in totals} == set(PARTIES)
    _assert_books_agree(settings, totals)
    assert broker.depth(NAMES.quarantine) == sum(total.updates for total in totals if total.outcome == "refused")


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff"])
async def test_federation_with_a_buffer_comes_to_its_last_version(broker, settings_of, strategy):
    settings, digest, events = await _lived(
        broker, settings_of, merging={"strategy": strategy, "buffer_size": 3}, aggregator={"versions": 8}
    )
    assert events[-1].version == 8
    assert events[-1].facts["accuracy"] > 0.5
    found, totals = _verified(settings, _manifest(settings))
    assert (found.version, found.merged, found.buffered, found.model_digest) == (8, 8, 16, digest)
    _assert_books_agree(settings, totals)


async def test_federation_goes_on_where_it_ended_when_its_goal_moves(broker, settings_of):
    _, first, _ = await _lived(broker, settings_of, aggregator={"versions": 2})
    settings, second, _ = await _lived(broker, settings_of, aggregator={"versions": 5})
    assert first != second
    found, totals = _verified(settings, _manifest(settings))
    assert (found.version, found.merged, found.model_digest) == (5, 5, second)
    _assert_books_agree(settings, totals)


async def test_target_accuracy_ends_the_federation(broker, settings_of):
    _, _, events = await _lived(broker, settings_of, aggregator={"target_accuracy": 0.6, "versions": 200})
    assert any(event.facts["accuracy"] >= 0.6 for event in events)
    assert events[-1].version < 200
