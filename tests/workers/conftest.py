"""A worker on an in-memory broker, with a hand-made other side, or the real one: for the tests of this folder."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from broadcasting import Broadcaster, publish

from aggregator import admission
from aggregator.broadcast import BroadcastPlan
from aggregator.coordinator import Coordinator, Rules
from aggregator.decisions import Goal
from aggregator.merging.strategies import build_strategy
from aggregator.opening import open_ledger
from aggregator.service import Aggregator, Pace
from aggregator.snapshots import Snapshots
from broker_fl.config import MergingSettings, TrustSettings
from broker_fl.database import sqlite_url
from broker_fl.parameters import manifest_of
from broker_fl.privacy.policy import Limits
from broker_fl.signing import SIGNATURE, body_statement
from broker_fl.topology import Names, party, party_permissions, policies, shared
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.parts import Assembler
from broker_fl.transports.transport import Message
from schemas import wire
from schemas.frame import Plan, TrainingPlan
from schemas.receipt import Receipt
from schemas.update import ModelUpdate
from workers.encoding import Budget
from workers.outbox import open_outbox, read_counters
from workers.privacy import PrivacyBudget
from workers.service import Identity, Link, Worker
from workers.spending import spending_file
from workers.trainer import TrainResult

FEDERATION = "ward"
NAMES = Names(FEDERATION)
MANIFEST = manifest_of({"hidden.weight": np.zeros((40, 50), np.float32), "hidden.bias": np.zeros(8, np.float32)})
PLAN = TrainingPlan(epochs=3, learning_rate=0.125)
PARTIES = ("ann", "bob")
NUM_EXAMPLES = 12
PLAIN = Limits(delta=1e-5, accountant="rdp")
"""Of a party that asks for nothing."""
PATIENCE_S = 20.0
"""The bound of every wait."""


class Trainer:
    """Hands out what it was given: a number for every parameter, a vector, or a function of the number of the training."""

    def __init__(self, delta=1.0):
        self.delta = delta
        self.bases, self.plans, self.mechanisms, self.seeds = [], [], [], []
        self.began = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self, base, plan, *, mechanism, seed, should_stop):
        self.mechanisms.append(mechanism)
        self.bases.append(base)
        self.plans.append(plan)
        self.seeds.append(seed)
        self.began.set()
        while not self.goes_on.wait(0.005):
            if should_stop():
                return None
        delta = self.delta(len(self.bases)) if callable(self.delta) else self.delta
        return TrainResult(
            delta=np.broadcast_to(np.asarray(delta, np.float32), base.shape).copy(),
            num_samples=NUM_EXAMPLES,
            num_steps=4,
            mean_loss=0.5,
        )


class Centre:
    """The other side by hand: broadcasts, takes updates one by one, and answers as it is told."""

    def __init__(self, transport, updates, key=None):
        self.transport = transport
        self._updates = updates
        self.key = key
        """Of the federation: what is broadcast and answered is signed by it."""
        self._assembler = Assembler()
        self.frames = None

    async def broadcast(
        self,
        version,
        *,
        number=None,
        model=None,
        ledger="a" * 32,
        up="float32",
        momentum=0.0,
        fraction=1.0,
        repeat=False,
        over=False,
        manifest=MANIFEST,
        down="float32",
        with_keyframe=False,
        privacy=None,
    ):
        """The first frame as a keyframe and its announcement; then changes. A number that was there already: that frame again.

        By default every parameter is the version's number.
        """
        plan = Plan(
            training=PLAN, update_codec=up, momentum_correction=momentum, fraction=fraction, repeat=repeat, privacy=privacy
        )
        vector = np.full(manifest.size, version, np.float32) if model is None else model
        if self.frames is None or self.frames.ledger != ledger:
            self.frames = Broadcaster(FEDERATION, manifest, ledger=ledger, down=down, plan=plan, number=(number or 1) - 1)
            self.last = self.frames.first(vector, version=version, over=over)
        elif number is None or number > self.frames.number:
            changed = None if plan == self.frames.plan else plan
            self.last = self.frames.next(vector, version=version, over=over, plan=changed, with_keyframe=with_keyframe)
        frame = await publish(self.transport, self.last, key=self.key)
        return frame.model_copy(update={"manifest": manifest})

    async def delivery(self):
        """The next message as it came."""
        delivery = await self._updates.receive()
        await self._updates.acknowledge(delivery.tag)
        return delivery

    async def update(self):
        return wire.decode(ModelUpdate, (await self.delivery()).body)

    async def answer(self, update, outcome="merged", *, reason=None):
        receipt = Receipt(
            federation=FEDERATION,
            party=update.party,
            update_id=update.update_id,
            outcome=outcome,
            version=update.base_version + 1,
            staleness=0,
            codec=update.codec,
            weight=0.0 if outcome == "refused" else 0.25,
            reason=reason or ("base" if outcome == "refused" else None),
        )
        await self.send_receipt(update.party, wire.encode(receipt))

    async def send_receipt(self, to, body, *, signature=None):
        if signature is None and self.key is not None:
            signature = self.key.sign("receipt", body_statement(body))
        headers = {} if signature is None else {SIGNATURE: signature}
        await self.transport.publish(Message(NAMES.receipts, body, routing_key=to, headers=headers))

    def has_more_updates(self):
        return self._updates.receive_nowait() is not None


class Running:
    def __init__(self, worker, outbox):
        self.worker = worker
        self.outbox = outbox
        self.task = None

    async def ended(self):
        await asyncio.shield(self.task)

    async def kill(self):
        self.task.cancel()
        await asyncio.wait([self.task])


class Home:
    """Where a party's worker lives, over its restarts."""

    def __init__(self, folder, broker, party_id="ann"):
        self.folder = Path(folder)
        self.broker = broker
        self.party = party_id

    def connect(self, name):
        return self.broker.connect(name, user=self.party)

    def counters(self):
        return read_counters(self.folder, self.party)

    async def counts(self, name, least=1):
        """Waits until the worker has counted so many."""
        async with asyncio.timeout(PATIENCE_S):
            while self.counters().get(name, 0) < least:  # noqa: ASYNC110 - it happens in another thread
                await asyncio.sleep(0.001)

    def outbox(self):
        return open_outbox(self.folder, party=self.party, federation=FEDERATION)

    @asynccontextmanager
    async def running(
        self,
        train,
        *,
        connect=None,
        clock=time.time,
        manifest=MANIFEST,
        initial=None,
        grace_s=0.0,
        link=None,
        budget=None,
        throttle=1.0,
        resend_after_s=120.0,
        limits=PLAIN,
        record=None,
        observer=None,
        federation_key=None,
        key=None,
    ):
        """The worker at work; at the end it is stopped, unless it ended by itself. What it fails with is raised at the end."""
        own = np.full(manifest.size, -1, np.float32) if initial is None else initial
        with self.outbox() as outbox:
            worker = Worker(
                connect or self.connect,
                outbox,
                train,
                PrivacyBudget(
                    outbox,
                    file=record or spending_file(self.folder, self.party),
                    limits=limits,
                    federation=FEDERATION,
                    party=self.party,
                    num_examples=NUM_EXAMPLES,
                    clock=clock,
                ),
                identity=Identity(FEDERATION, self.party, manifest, own, federation_key, key),
                link=Link(**{"part_bytes": 1024, "max_message_bytes": 1 << 20, "inbox_grace_s": grace_s, **(link or {})}),
                budget=budget or Budget(),
                throttle=throttle,
                resend_after_s=resend_after_s,
                clock=clock,
                observer=observer,
            )
            running = Running(worker, outbox)
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
                running.task = group.create_task(worker.run())
                try:
                    yield running
                finally:
                    worker.stop()


@pytest.fixture
def broker():
    broker = MemoryBroker()
    broker.declare(shared(FEDERATION))
    broker.apply_policies(policies(FEDERATION, model_bytes=1 << 20))
    for name in PARTIES:
        broker.declare(party(FEDERATION, name))
        broker.users[name] = party_permissions(FEDERATION, name)
    return broker


@pytest.fixture
def home(tmp_path, broker):
    return Home(tmp_path / "ann", broker)


@pytest.fixture
def new_home(broker):
    """A function that makes one: of another party, or in another folder."""
    return lambda folder, party_id: Home(folder, broker, party_id)


@pytest.fixture
def centre(broker):
    """A function that opens one."""

    @asynccontextmanager
    async def opened(key=None):
        async with (
            asyncio.timeout(PATIENCE_S),
            broker.connect("centre") as transport,
            transport.consume(NAMES.updates, prefetch=64, name="centre") as updates,
        ):
            yield Centre(transport, updates, key)

    return opened


@pytest.fixture
def new_trainer():
    return Trainer


@pytest.fixture
def aggregator(tmp_path, broker):
    """A function that runs the real one, which merges every update with weight 1; with signatures where it has a key."""
    merging = MergingSettings(mixing_rate=1.0, staleness="constant")
    unsigned = admission.Limits(names=NAMES, manifest=MANIFEST, max_update_bytes=1 << 20, max_update_norm=None)
    pace = Pace(prefetch=8, group_updates=8, group_s=0.001, part_bytes=1024, max_message_bytes=1 << 20, tick_s=0.01)

    @asynccontextmanager
    async def running(
        *, versions=None, up="float32", down="float32", keyframe="float32", keyframe_every_frames=100, register=None, key=None
    ):
        with open_ledger(sqlite_url(tmp_path / "ledger.db")) as ledger:
            ledger_id = ledger.facts()["ledger_id"]
            limits = unsigned if key is None else replace(unsigned, signed_for=ledger_id)
            plan = BroadcastPlan(
                federation=FEDERATION,
                ledger_id=ledger_id,
                manifest=MANIFEST,
                down=down,
                keyframe=keyframe,
                keyframe_every_frames=keyframe_every_frames,
                up=up,
                warm_up_versions=0,
                warm_up_density=0.25,
                momentum_correction=0.0,
                training=PLAN,
                fraction=1.0,
                repeat=build_strategy(merging).may_repeat,
                every_versions=1,
                every_s=1.0,
            )
            rules = Rules(
                limits=limits,
                merging=merging,
                plan=plan,
                goal=Goal(versions=versions),
                snapshot_every_versions=100,
                parts_expire_s=60.0,
                trust=None if key is None else TrustSettings(),
                federation_key=None if key is None else key.public,
            )
            coordinator = Coordinator(ledger, Snapshots(str(tmp_path / "snapshots"), MANIFEST), rules, clock=time.time)
            service = Aggregator(
                broker.connect,
                coordinator,
                topology=shared(FEDERATION),
                limits=limits,
                pace=pace,
                clock=time.time,
                register=register,
                key=key,
            )
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
                task = group.create_task(service.run(lambda: coordinator.open(np.zeros(MANIFEST.size, np.float32))))
                try:
                    yield coordinator, task
                finally:
                    service.stop()

    return running
