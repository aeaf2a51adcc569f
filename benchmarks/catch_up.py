"""Catch-up measured: bytes and seconds for a device 1, 10, 100 and 1000 versions behind, and for a newcomer.

The aggregator, with its own retention policies on a private RabbitMQ node, broadcasts every version of a synthetic federation.
Then devices that held the model of an earlier one catch up, one after the other. The last keyframe is then half of
`KEYFRAME_EVERY` frames old, as it is on average.

`bytes` and `frames` are all that was read, with what is read twice or in vain; `delta_way_bytes` and `keyframe_way_bytes` are
what the newest frame says that both ways cost; a dense model has `dense_bytes`. `seconds` go from connecting to the newest model
in memory, its digest checked: the median of the rounds.

    python -m benchmarks.catch_up [--json FILE] [--parameters 1000000] [--rounds 3]
"""

import asyncio
import tempfile
import time
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import uvloop
from pydantic import SecretStr

from aggregator.admission import Limits
from aggregator.broadcast import BroadcastPlan
from aggregator.coordinator import Coordinator, Rules
from aggregator.decisions import Goal
from aggregator.ledger import Ledger
from aggregator.opening import open_ledger
from aggregator.service import Aggregator, Pace
from aggregator.snapshots import Snapshots
from benchmarks.aggregator import DISTINCT, FEDERATION, PARTY, Case, manifest_for, payloads, updates
from benchmarks.report import parser, show
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs
from broker_fl.config import BrokerSettings, MergingSettings, load_settings
from broker_fl.database import sqlite_url
from broker_fl.enrolment import add_party
from broker_fl.management import Management
from broker_fl.parameters import Vector, digest
from broker_fl.signing import SigningKey
from broker_fl.topology import Names, policies, shared
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.following import Follower, ReceivedModel, advance, deltas_cost_less, parse_frame, received_by
from broker_fl.transports.local_rabbitmq import HOST, LocalRabbitMQ, local_rabbitmq
from broker_fl.transports.model_log import Pending, Traffic, place_of, read_newest
from broker_fl.transports.transport import Connect, Message, Transport
from schemas import wire
from schemas.frame import ModelFrame, TrainingPlan
from schemas.manifest import Manifest

NAMES = Names(FEDERATION)
CODEC = "topk:0.01+int4"
KEYFRAME_EVERY = 100
BEHIND = (1, 10, 100, 1000)
MOST_S = 60.0


@dataclass(frozen=True, slots=True)
class Row:
    behind: str
    way: str
    bytes: int
    frames: int
    keyframes: int
    seconds: float
    delta_way_bytes: int
    keyframe_way_bytes: int
    dense_bytes: int
    of_dense: float


def last_number(behind: int) -> int:
    """Of the frame, the first one is 1, that is so far from the first, and half-way between two keyframes."""
    return KEYFRAME_EVERY * -(-behind // KEYFRAME_EVERY) + KEYFRAME_EVERY // 2 + 1


def way_of(held: ReceivedModel | None, newest: ModelFrame, *, keyframes: int, oldest: int) -> str:
    """Which way a device took; a newcomer holds None. `oldest` is the first frame that the model log still has."""
    if keyframes == 0:
        return "deltas"
    number, log_bytes = (0, 0) if held is None else (held.number, held.log_bytes)
    if not deltas_cost_less(log_bytes, newest):
        return "keyframe"
    return "keyframe: deltas gone" if oldest > number + 1 else "keyframe: against its price"


def row_of(
    behind: str,
    held: ReceivedModel | None,
    newest: ModelFrame,
    *,
    counts: dict[str, int],
    seconds: float,
    oldest: int,
    dense: int,
) -> Row:
    """`counts` are of the follower's traffic, `dense` the bytes of a model."""
    keyframes = counts.get("keyframes_received", 0)
    return Row(
        behind=behind,
        way=way_of(held, newest, keyframes=keyframes, oldest=oldest),
        bytes=counts["bytes_down"],
        frames=counts["frames_received"],
        keyframes=keyframes,
        seconds=seconds,
        delta_way_bytes=newest.log_bytes - (0 if held is None else held.log_bytes),
        keyframe_way_bytes=newest.keyframe.bytes + newest.log_bytes - newest.keyframe.log_bytes,
        dense_bytes=dense,
        of_dense=counts["bytes_down"] / dense,
    )


def aggregator(ledger: Ledger, folder: Path, manifest: Manifest, node: LocalRabbitMQ) -> tuple[Coordinator, Aggregator]:
    plan = BroadcastPlan(
        federation=FEDERATION,
        ledger_id=ledger.facts()["ledger_id"],
        manifest=manifest,
        down=CODEC,
        keyframe="float32",
        keyframe_every_frames=KEYFRAME_EVERY,
        up=CODEC,
        warm_up_versions=0,
        warm_up_density=0.25,
        momentum_correction=0.0,
        training=TrainingPlan(),
        fraction=1.0,
        repeat=True,
        every_versions=1,
        every_s=3600.0,
    )
    limits = Limits(NAMES, manifest, 4 * manifest.size + 65_536, None)
    rules = Rules(limits, MergingSettings(), plan, Goal(), 200, 3600.0)
    coordinator = Coordinator(ledger, Snapshots(str(folder / "snapshots"), manifest), rules, clock=time.time)
    # A group of one, and a tick that soon sees a version whose frame had to wait for the one before it.
    pace = Pace(64, 1, 0.02, 1 << 20, 16 << 20, tick_s=0.02)
    connect = amqp_connect(BrokerSettings(url=SecretStr(node.url)))
    return coordinator, Aggregator(connect, coordinator, topology=shared(FEDERATION), limits=limits, pace=pace, clock=time.time)


async def federate(connect: Connect, initial: Vector, manifest: Manifest) -> tuple[dict[int, ReceivedModel], ModelFrame]:
    """Answers each frame with an update, as a party would; gives the models so many versions behind, and the newest frame."""
    case = Case(CODEC, manifest.size, updates=1)
    encoded = payloads(case, manifest)
    last = last_number(max(BEHIND))
    frames: list[ModelFrame] = []
    models: dict[int, ReceivedModel] = {}
    held: ReceivedModel | None = None
    async with (
        connect("bench-feed") as transport,
        aclosing(read_newest(transport, NAMES.model_log, name="bench-feed", traffic=Traffic())) as broadcasts,
    ):
        async for broadcast in broadcasts:
            frames.append(parse_frame(broadcast.body, federation=FEDERATION, manifest=manifest))
            number = frames[-1].number
            assert number == len(frames), "a frame for every version, and none left out"
            if last - number in BEHIND:
                held = held or received_by(frames[0], initial)
                models[last - number] = held = await asyncio.to_thread(advance, held, frames[held.number :], manifest=manifest)
            if number == last:
                break
            payload = encoded[number % DISTINCT]
            (update,) = updates(case, manifest, [payload], base_digest=frames[-1].digest, party_name=PARTY)
            update = update.model_copy(update={"base_version": frames[-1].version, "sequence": number})
            await transport.publish(Message(NAMES.up(PARTY), wire.encode(update), message_id=update.update_id))
    return models, frames[-1]


async def catch_up(
    connect: Connect, held: ReceivedModel | None, newest: ModelFrame, *, initial: Vector, manifest: Manifest
) -> tuple[float, dict[str, int]]:
    """Seconds, and the follower's traffic."""
    follower = Follower(federation=FEDERATION, manifest=manifest, initial=initial, name="bench-device")
    follower.held = held
    began = time.perf_counter()
    async with asyncio.timeout(MOST_S), connect("bench-device") as transport, asyncio.TaskGroup() as group:
        pending = follower.new_pending()
        reading = group.create_task(read_log(transport, pending, follower.traffic))
        while follower.held is None or follower.held.number < newest.number:
            await follower.next(transport, pending)
        seconds = time.perf_counter() - began
        reading.cancel()
    assert digest(follower.held.model) == follower.held.digest == newest.digest
    return seconds, follower.traffic.take()


async def read_log(transport: Transport, pending: Pending, traffic: Traffic) -> None:
    async with aclosing(read_newest(transport, NAMES.model_log, name="bench-device", traffic=traffic)) as broadcasts:
        async for broadcast in broadcasts:
            pending.put(broadcast)


async def oldest_number(connect: Connect) -> int:
    async with connect("bench") as transport, transport.follow(NAMES.model_log, start="first", name="bench") as feed:
        place = place_of(await feed.receive())
        assert place is not None
        return place.number


async def measure(parameters: int, rounds: int) -> list[Row]:
    generator = np.random.default_rng(0)
    initial = generator.standard_normal(parameters, dtype=np.float32) * np.float32(0.05)
    manifest = manifest_for(Case(CODEC, parameters, updates=1))
    async with local_rabbitmq(stop_timeout_s=0) as node:
        async with Management(node.management_url) as management:
            settings = load_settings(flags={"federation": {"name": FEDERATION}}, environment={})
            credentials = await add_party(management, settings, PARTY, key=SigningKey.generate())
            await management.apply_policies(policies(FEDERATION, model_bytes=4 * manifest.size))
            await management.apply(shared(FEDERATION))  # After the policies, as the aggregator does it.
        url = f"amqp://{PARTY}:{credentials.password.get_secret_value()}@{HOST}:{node.amqp_port}/"
        party = amqp_connect(BrokerSettings(url=SecretStr(url)))
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, open_ledger(sqlite_url(Path(folder) / "ledger.db")) as ledger:
            coordinator, service = aggregator(ledger, Path(folder), manifest, node)
            async with asyncio.TaskGroup() as group:
                group.create_task(service.run(partial(coordinator.open, initial)))
                models, newest = await federate(party, initial, manifest)
                service.stop()
        oldest = await oldest_number(party)
        seconds = time.perf_counter() - began
        print(f"{newest.number} frames in {seconds:.0f} s; the model log holds them from frame {oldest} on", flush=True)
        rows = []
        for behind in (*BEHIND, None):
            held = None if behind is None else models[behind]
            caught = [await catch_up(party, held, newest, initial=initial, manifest=manifest) for _ in range(rounds)]
            middle, counts = sorted(caught, key=lambda one: one[0])[rounds // 2]
            name = "newcomer" if behind is None else str(behind)
            rows.append(row_of(name, held, newest, counts=counts, seconds=middle, oldest=oldest, dense=4 * manifest.size))
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--parameters", type=int, default=1_000_000, help="of the model")
    arguments.add_argument("--rounds", type=int, default=3, help="of each device; the row has the median of their seconds")
    given = arguments.parse_args()
    configure_logs(LogLevel.ERROR, LogFormat.CONSOLE)
    rows = uvloop.run(measure(given.parameters, given.rounds))
    show(f"Catching up with a model of {given.parameters} parameters", rows, json_file=given.json)


if __name__ == "__main__":
    main()
