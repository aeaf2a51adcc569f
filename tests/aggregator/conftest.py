"""An aggregator's state in a folder, with the updates that parties would send to it: for the tests of this folder."""

import asyncio
import time
import uuid
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from enrolled_parties import FEDERATION_KEY, signature_of
from sqlalchemy import update

from aggregator.admission import ANONYMOUS, Credentials, Limits
from aggregator.broadcast import BroadcastPlan
from aggregator.chain import link
from aggregator.coordinator import Coordinator, Rules
from aggregator.decisions import Goal
from aggregator.gate import Gate
from aggregator.merging.strategies import build_strategy
from aggregator.opening import open_ledger, open_ledger_for_reading
from aggregator.reception import arrive
from aggregator.records import ENTRIES
from aggregator.service import Aggregator, Pace
from aggregator.snapshots import Snapshots
from broker_fl.codecs.chain import change, whole_model
from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.config import MergingSettings, TrustSettings
from broker_fl.database import sqlite_url
from broker_fl.parameters import digest, manifest_of
from broker_fl.signing import SIGNATURE
from broker_fl.topology import Names, party, party_permissions, policies, shared
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.parts import Assembler, split
from broker_fl.transports.transport import Delivery, Message
from schemas import wire
from schemas.event import Event
from schemas.frame import ModelFrame, TrainingPlan
from schemas.receipt import Receipt
from schemas.update import ModelUpdate

FEDERATION = "ward"
NAMES = Names(FEDERATION)
MANIFEST = manifest_of({"hidden.weight": np.zeros((40, 50), np.float32), "hidden.bias": np.zeros(8, np.float32)})


@dataclass
class FakeClock:
    now: float = 1_000_000.0

    def __call__(self):
        return self.now


@dataclass
class Bench:
    """One federation's folder. What `opened` gives ends without a farewell, as a killed process does."""

    folder: Path
    clock: FakeClock = field(default_factory=FakeClock)
    names: Names = NAMES
    manifest: object = MANIFEST
    url: str = ""
    """Of the ledger; an SQLite file in the folder where it is not given."""

    def __post_init__(self):
        self.url = self.url or sqlite_url(self.ledger_file)

    @property
    def initial(self):
        return np.random.default_rng(0).standard_normal(self.manifest.size).astype(np.float32)

    @property
    def ledger_file(self):
        return self.folder / "ledger.db"

    def ledger(self):
        return open_ledger(self.url)

    def snapshots(self, folder="snapshots"):
        return Snapshots(str(self.folder / folder), self.manifest)

    def snapshot(self, version):
        """The file of this version's only snapshot."""
        (file,) = (self.folder / "snapshots").glob(f"model-*-v{version:08d}-*.safetensors")
        return file

    def execute(self, statement):
        """SQL that changes something in the ledger, past all that guards it."""
        with self.ledger() as ledger, ledger.transaction():
            assert ledger._connection.exec_driver_sql(statement).rowcount >= 1

    def forge(self, statement):
        """The same by somebody who knows how: with a hash chain that fits what the entries say then."""
        with self.ledger() as ledger:
            with ledger.transaction():
                assert ledger._connection.exec_driver_sql(statement).rowcount >= 1
            chain = ledger.chain_after(0)
            with ledger.transaction():
                for entry in list(ledger.entries_after(0)):
                    chain = link(chain, entry)
                    same = update(ENTRIES).where(ENTRIES.c.seq == entry.seq)
                    ledger._connection.execute(same.values(chain=chain))

    def limits(self, **changes):
        given = {"names": self.names, "manifest": self.manifest, "max_update_bytes": 1 << 20, "max_update_norm": None}
        return Limits(**{**given, **changes})

    def rules(
        self,
        ledger_id,
        *,
        merging=None,
        goal=None,
        down="float32",
        keyframe="float32",
        keyframe_every_frames=100,
        up="float32",
        warm_up_versions=0,
        momentum_correction=0.0,
        training=None,
        every_versions=1,
        every_s=3600.0,
        snapshot_every_versions=1000,
        fraction=1.0,
        parts_expire_s=3600.0,
        trust=None,
        federation_key=None,
        **limits,
    ):
        merging = merging or MergingSettings()
        demands = limits.get("privacy")
        plan = BroadcastPlan(
            federation=self.names.federation,
            ledger_id=ledger_id,
            manifest=self.manifest,
            down=down,
            keyframe=keyframe,
            keyframe_every_frames=keyframe_every_frames,
            up=up,
            warm_up_versions=warm_up_versions,
            warm_up_density=0.25,
            momentum_correction=momentum_correction,
            training=training or TrainingPlan(),
            fraction=fraction,
            repeat=build_strategy(merging).may_repeat,
            every_versions=every_versions,
            every_s=every_s,
            privacy=None if demands is None else demands.plan,
        )
        return Rules(
            limits=self.limits(**limits),
            merging=merging,
            plan=plan,
            goal=goal or Goal(),
            snapshot_every_versions=snapshot_every_versions,
            parts_expire_s=parts_expire_s,
            trust=trust,
            federation_key=federation_key,
        )

    @contextmanager
    def coordinator(self, *, clock=None, **rules):
        """Not yet open."""
        with self.ledger() as ledger:
            made = self.rules(ledger.facts()["ledger_id"], **rules)
            yield Coordinator(ledger, self.snapshots(), made, clock=clock or self.clock)

    @contextmanager
    def opened(self, **rules):
        """Open, with a first frame that is published."""
        with self.coordinator(**rules) as coordinator:
            coordinator.open(self.initial)
            coordinator.tick()
            self.publish(coordinator)
            yield coordinator

    def publish(self, coordinator):
        """All that waits; gives the rows with their bodies."""
        published = []
        while (frame := coordinator.unpublished()) is not None:
            coordinator.published(frame.number)
            published.append(frame)
        return published

    def frames(self):
        with open_ledger_for_reading(self.url) as ledger:
            return ledger.frames_from(0)

    def bodies(self):
        """Of all frames, opened."""
        with open_ledger_for_reading(self.url) as ledger:
            return [wire.decode(ModelFrame, body) for _, body in ledger.bodies_after(0)]

    def follower(self):
        return Follower(self.manifest)

    def entries(self):
        with open_ledger_for_reading(self.url) as ledger:
            return list(ledger.entries_after(0))

    def update(self, party="ann", *, base, delta=None, seed=0, update_id=None, codec="float32", **changes):
        """The message that a party trained from this frame would send. `delta` is a number for all parameters, or a vector."""
        if delta is None:
            delta = 0.1 * np.random.default_rng(seed).standard_normal(self.manifest.size)
        vector = np.broadcast_to(np.asarray(delta, np.float32), (self.manifest.size,)).copy()
        payload = encode(vector, parse_codec(codec), manifest=self.manifest, generator=np.random.default_rng(seed))
        facts = {
            "federation": self.names.federation,
            "party": party,
            "update_id": update_id or uuid.uuid4().hex,
            "sequence": 1,
            "base_version": base.version,
            "base_digest": base.digest,
            "manifest_digest": self.manifest.digest,
            "codec": codec,
            "num_samples": 10,
            "num_steps": 1,
            "train_loss": 0.5,
            "payload": payload,
        }
        return ModelUpdate(**{**facts, **changes})

    def message(self, update, *, party=None, headers=None):
        party = party or update.party
        return Message(self.names.up(party), wire.encode(update), message_id=update.update_id, headers=headers or {})

    def arrival(self, update, *, user=None, limits=None, credentials=ANONYMOUS):
        return self.arrivals(update, user=user, limits=limits, credentials=credentials)[0]

    def arrivals(self, update, *, user=None, limits=None, credentials=ANONYMOUS, part_bytes=1 << 20, limit_bytes=1 << 30):
        """One, or several parts, as the aggregator's decoders find them."""
        messages = split(self.message(update), part_bytes=part_bytes, limit_bytes=limit_bytes)
        user, limits = user or update.party, limits or self.limits()
        return [arrive(delivered(message, user=user), limits, credentials) for message in messages]

    @property
    def ledger_id(self):
        with self.ledger() as ledger:
            return ledger.facts()["ledger_id"]

    def signing_limits(self, **changes):
        """Of a federation that asks for signatures."""
        return self.limits(signed_for=self.ledger_id, **changes)

    def signed_arrivals(self, update, *, member, key=None, limits=None, **how):
        """Of an update that names this ledger, signed by its party, whom the register says to be this member."""
        update = update.model_copy(update={"ledger": self.ledger_id})
        credentials = Credentials(member, signature_of(update, key))
        return self.arrivals(update, limits=limits or self.signing_limits(), credentials=credentials, **how)


class Follower:
    """What a receiver makes of the bodies in the two logs."""

    def __init__(self, manifest):
        self.manifest = manifest
        self.frame = None
        self.model = None
        self.keyframes = {}

    def take(self, row):
        """A row as it is published: the keyframe first."""
        if row.keyframe is not None:
            self.take_keyframe(row.keyframe)
        return self.take_body(row.body)

    def take_keyframe(self, body):
        frame = wire.decode(ModelFrame, body)
        assert (frame.base, frame.keyframe.number, frame.keyframe.bytes) == (None, frame.number, len(frame.payload))
        self.keyframes[frame.number] = frame
        return frame

    def take_body(self, body):
        frame = wire.decode(ModelFrame, body)
        if self.frame is not None and frame.number <= self.frame.number:
            assert (frame.number, frame.digest) == (self.frame.number, self.frame.digest)
        elif self.frame is not None and frame.base == self.frame.number:
            change(self.model, frame, manifest=self.manifest)
        else:
            self.model = whole_model(self.keyframes[frame.number], manifest=self.manifest)
        assert digest(self.model) == frame.digest
        self.frame = frame
        return frame


def delivered(message, *, user, redelivered=False):
    return Delivery(
        body=message.body,
        headers=message.headers,
        message_id=message.message_id,
        user_id=user,
        exchange=message.exchange,
        routing_key=message.routing_key,
        redelivered=redelivered,
        tag=1,
        offset=None,
    )


PARTIES = ("ann", "bob", "cem")
PATIENCE_S = 20.0
"""The bound of every wait."""


async def until(condition):
    """For what happens in threads and files, where no event can be awaited."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads
            await asyncio.sleep(0.001)


class Ward:
    """A broker with its parties, a bench's aggregator upon it, and what its parties and onlookers do."""

    until = staticmethod(until)

    def __init__(self, bench, broker):
        self.bench = bench
        self.broker = broker
        self.names = bench.names

    def connect(self, name):
        return self.broker.connect(name)

    @asynccontextmanager
    async def running(
        self,
        *,
        connect=None,
        clock=time.time,
        seconds=None,
        pace=None,
        limits=None,
        observer=None,
        register=None,
        key=None,
        per_minute=None,
        **rules,
    ):
        """The aggregator at work; at the end it is stopped, unless it has ended by itself.

        What it fails with is raised at the end; `ended` waits for its own end.
        """
        limits = limits or self.bench.limits()
        gate = Gate(per_minute=per_minute, part_bytes=1024, max_update_bytes=limits.max_update_bytes)
        with self.bench.coordinator(clock=clock, **rules) as coordinator:
            service = Aggregator(
                connect or self.connect,
                coordinator,
                topology=shared(self.names.federation),
                limits=limits,
                pace=Pace(**{**PACE, **(pace or {})}),
                clock=clock,
                seconds=seconds,
                observer=observer,
                register=register,
                key=key,
                gate=gate,
            )
            running = Running(service, coordinator)
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
                running.task = group.create_task(service.run(lambda: coordinator.open(self.bench.initial)))
                try:
                    yield running
                finally:
                    service.stop()

    def signing(self, register, **more):
        """What `running` takes where signatures are asked for."""
        ledger_id = self.bench.ledger_id
        return {
            "register": register,
            "key": FEDERATION_KEY,
            "federation_key": FEDERATION_KEY.public,
            "limits": self.bench.limits(signed_for=ledger_id),
            "signed_for": ledger_id,
            "trust": TrustSettings(),
            **more,
        }

    @asynccontextmanager
    async def party(self, name="ann"):
        async with (
            asyncio.timeout(PATIENCE_S),
            self.broker.connect(f"worker:{name}", user=name) as transport,
            transport.consume(self.names.inbox(name), prefetch=16, name=name) as inbox,
            transport.follow(self.names.model_log, start="first", name=name) as log,
            transport.follow(self.names.keyframe_log, start="first", name=name) as keyframes,
        ):
            yield Party(self, name, transport, inbox, log, keyframes)

    @asynccontextmanager
    async def events(self, kind="#"):
        async with (
            self.broker.connect("onlooker") as transport,
            transport.listen(self.names.events, routing_key=kind, name="onlooker") as feed,
        ):
            yield Onlooker(feed)

    @asynccontextmanager
    async def quarantine(self):
        async with (
            self.broker.connect("operator") as transport,
            transport.consume(self.names.quarantine, prefetch=100, name="operator") as subscription,
        ):
            yield subscription

    def queued(self):
        """Updates that wait, while no aggregator is at work."""
        return self.broker.depth(self.names.updates)

    def merged(self):
        return [entry for entry in self.bench.entries() if entry.outcome in ("merged", "buffered")]


PACE = {
    "prefetch": 64,
    "group_updates": 64,
    "group_s": 0.001,
    "part_bytes": 1024,
    "max_message_bytes": 1 << 20,
    "tick_s": 0.01,
}


@dataclass
class Running:
    service: Aggregator
    coordinator: Coordinator
    task: asyncio.Task | None = None

    async def ended(self):
        await asyncio.shield(self.task)


@dataclass
class Received:
    frame: ModelFrame
    model: np.ndarray


class Party:
    def __init__(self, ward, name, transport, inbox, log, keyframes):
        self._ward = ward
        self.name = name
        self.transport = transport
        self._inbox = inbox
        self._log = log
        self._keyframes = keyframes
        self._assemblers = Assembler(), Assembler()
        self._follower = ward.bench.follower()

    async def frame(self):
        """The next one of the log, and its model."""
        body = await self._body(self._log, self._assemblers[0])
        frame = wire.decode(ModelFrame, body)
        held = self._follower.frame
        if held is None or (frame.number > held.number and frame.base != held.number):
            while frame.number not in self._follower.keyframes:
                self._follower.take_keyframe(await self._body(self._keyframes, self._assemblers[1]))
        return Received(self._follower.take_body(body), self._follower.model.copy())

    async def _body(self, feed, assembler):
        while True:
            body = assembler.add(await feed.receive())
            if body is not None:
                return body

    async def frames_until(self, condition):
        frames = []
        while not frames or not condition(frames[-1]):
            frames.append((await self.frame()).frame)
        return frames

    async def send(self, base, *, parts_of=None, **changes):
        """An update trained from this frame. `parts_of` is the size of its parts."""
        update = self._ward.bench.update(self.name, base=base, **changes)
        await self.send_again(update, parts_of=parts_of)
        return update

    async def send_signed(self, base, *, key=None, parts_of=None, **changes):
        """By the party's own key unless another is named."""
        update = self._ward.bench.update(self.name, base=base, **{"ledger": base.ledger, **changes})
        await self.send_again(update, parts_of=parts_of, signature=signature_of(update, key))
        return update

    async def send_again(self, update, *, parts_of=None, signature=None):
        headers = {} if signature is None else {SIGNATURE: signature}
        message = self._ward.bench.message(update, party=self.name, headers=headers)
        for part in split(message, part_bytes=parts_of or 1, limit_bytes=0 if parts_of else 1 << 30):
            await self.transport.publish(part)

    async def receipt(self):
        delivery = await self._inbox.receive()
        await self._inbox.acknowledge(delivery.tag)
        return wire.decode(Receipt, delivery.body)

    async def receipts(self, count):
        return [await self.receipt() for _ in range(count)]

    def has_more_receipts(self):
        return self._inbox.receive_nowait() is not None


class Onlooker:
    def __init__(self, feed):
        self._feed = feed

    async def next(self, kind):
        while True:
            event = wire.decode(Event, (await self._feed.receive()).body)
            if event.kind == kind:
                return event


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
def ward(bench, broker):
    return Ward(bench, broker)


@pytest.fixture
def bench(request, tmp_path):
    """Its ledger is in SQLite, unless the test names another database by `indirect`."""
    database = getattr(request, "param", "sqlite")
    return Bench(tmp_path, url="" if database == "sqlite" else request.getfixturevalue("postgresql_url"))


@pytest.fixture(scope="session")
def new_bench(tmp_path_factory):
    """A function that makes one: for property tests, which need a new one for every example."""
    return lambda: Bench(tmp_path_factory.mktemp("federation"))
