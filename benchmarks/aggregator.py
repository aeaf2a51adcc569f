"""Durable merges per second, beside the plain consume-and-acknowledge rate of aio-pika on the same messages in the same run.

Both drain the same quorum queue on a private RabbitMQ node. A merge is all that it is in production: checks, decoding, ledger
with fsync, receipt, event, acknowledgement, and a broadcast every five seconds. Guarded is the same with signatures of updates,
receipts and frames, and the rules of trust. The ratio is the median of the rounds' ratios.

    python -m benchmarks.aggregator [--json FILE] [--rounds 3] [--codec int8]
"""

import asyncio
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import numpy as np
import uvloop
from pydantic import SecretStr

from aggregator.admission import Limits
from aggregator.broadcast import BroadcastPlan
from aggregator.coordinator import Coordinator, Rules
from aggregator.decisions import Goal
from aggregator.gate import Gate
from aggregator.opening import open_ledger
from aggregator.service import Aggregator, Pace
from aggregator.snapshots import Snapshots
from benchmarks.report import parser, show
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs
from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.config import BrokerSettings, CodecSettings, MergingSettings, TrustSettings
from broker_fl.database import sqlite_url
from broker_fl.management import Management
from broker_fl.parameters import digest, manifest_of
from broker_fl.signing import SIGNATURE, SigningKey, payload_digest, sign_membership, update_statement
from broker_fl.topology import Names, Permissions, party, shared
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import local_rabbitmq
from broker_fl.transports.transport import Header, Message
from schemas import wire
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest
from schemas.membership import Membership, SignedMembership
from schemas.update import ModelUpdate

FEDERATION = "bench"
PREFETCH = 64
DISTINCT = 32
PARTY = "bench"
BROADCAST_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Case:
    codec: str
    parameters: int
    updates: int


CASES = (
    Case("int8", 10_000, 4000),
    Case("topk:0.01+int4", 660_000, 4000),
    Case("int8", 250_000, 1500),
    Case("topk:0.01+int4", 16_500_000, 600),
)


@dataclass(frozen=True, slots=True)
class Row:
    codec: str
    parameters: int
    bytes: int
    updates: int
    raw_per_s: float
    merges_per_s: float
    ratio: float
    guarded_per_s: float
    guarded_ratio: float
    """To the merges without."""


@dataclass(frozen=True, slots=True)
class Guard:
    federation: SigningKey
    party: SigningKey

    def signed(self) -> SignedMembership:
        member = Membership(federation=FEDERATION, party=PARTY, revision=1, at=time.time(), public_key=self.party.public)
        return sign_membership(self.federation, member)

    async def all(self) -> dict[str, SignedMembership]:
        return {PARTY: self.signed()}

    async def one(self, party: str) -> SignedMembership | None:
        return self.signed() if party == PARTY else None

    async def suspend(self, party: str, reason: str) -> None:
        raise AssertionError(f"{party} is honest: {reason}")


GUARD = Guard(SigningKey.generate(), SigningKey.generate())


def manifest_for(case: Case) -> Manifest:
    small = min(500, case.parameters // 2)
    return manifest_of({"weight": np.zeros(case.parameters - small, np.float32), "bias": np.zeros(small, np.float32)})


def payloads(case: Case, manifest: Manifest) -> list[bytes]:
    generator = np.random.default_rng(1)
    codec = parse_codec(case.codec)
    delta = generator.standard_normal(manifest.size, dtype=np.float32) * np.float32(1e-3)
    return [encode(np.roll(delta, shift), codec, manifest=manifest, generator=generator) for shift in range(DISTINCT)]


def updates(
    case: Case, manifest: Manifest, encoded: list[bytes], *, base_digest: str, party_name: str, ledger: str | None = None
) -> list[ModelUpdate]:
    return [
        ModelUpdate(
            federation=FEDERATION,
            ledger=ledger,
            party=party_name,
            update_id=uuid.uuid4().hex,
            sequence=number + 1,
            base_version=0,
            base_digest=base_digest,
            manifest_digest=manifest.digest,
            codec=case.codec,
            num_samples=1,
            num_steps=1,
            train_loss=0.0,
            payload=encoded[number % DISTINCT],
        )
        for number in range(case.updates)
    ]


async def fill(settings: BrokerSettings, messages: list[ModelUpdate], party_name: str) -> int:
    """Bytes of one message."""
    bodies = [wire.encode(update) for update in messages]
    headers = [_signature(update) for update in messages]
    async with amqp_connect(settings)("bench-fill") as transport:
        for start in range(0, len(messages), PREFETCH):
            await asyncio.gather(
                *(
                    transport.publish(
                        Message(Names(FEDERATION).up(party_name), body, message_id=update.update_id, headers=signature)
                    )
                    for update, body, signature in zip(
                        messages[start : start + PREFETCH],
                        bodies[start : start + PREFETCH],
                        headers[start : start + PREFETCH],
                        strict=True,
                    )
                )
            )
    return len(bodies[0])


def _signature(update: ModelUpdate) -> dict[str, Header]:
    if update.ledger is None:
        return {}
    statement = update_statement(update, payload_digest=payload_digest(update.payload))
    return {SIGNATURE: GUARD.party.sign("update", statement)}


async def raw_rate(settings: BrokerSettings, count: int) -> float:
    """aio-pika's own consume and acknowledge, one by one, with the same prefetch."""
    done = asyncio.Event()
    seen = 0

    async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        nonlocal seen
        await message.ack()
        seen += 1
        if seen == count:
            done.set()

    connection = await aio_pika.connect(settings.url.get_secret_value())
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.get_queue(Names(FEDERATION).updates, ensure=False)
        began = time.perf_counter()
        await queue.consume(on_message)
        await done.wait()
        return count / (time.perf_counter() - began)


async def merge_rate(
    settings: BrokerSettings, case: Case, manifest: Manifest, encoded: list[bytes], folder: Path, *, guarded: bool
) -> tuple[float, int]:
    """The whole aggregator, from its first message to its last acknowledgement; and the bytes of one message."""
    codec = CodecSettings()
    plan = BroadcastPlan(
        federation=FEDERATION,
        ledger_id="0" * 32,
        manifest=manifest,
        down=codec.down,
        keyframe=codec.keyframe,
        keyframe_every_frames=codec.keyframe_every_frames,
        up=case.codec,
        warm_up_versions=0,
        warm_up_density=codec.warm_up_density,
        momentum_correction=0.0,
        training=TrainingPlan(),
        fraction=1.0,
        repeat=False,
        every_versions=1_000_000,
        every_s=BROADCAST_EVERY_S,
    )
    with open_ledger(sqlite_url(folder / "ledger.db")) as ledger:
        ledger_id = ledger.facts()["ledger_id"] if guarded else None
        limits = Limits(Names(FEDERATION), manifest, 4 * manifest.size + 65_536, None, signed_for=ledger_id)
        rules = Rules(
            limits,
            MergingSettings(max_staleness=1_000_000),
            plan,
            Goal(versions=case.updates),
            1_000_000,
            3600.0,
            trust=TrustSettings() if guarded else None,
            federation_key=GUARD.federation.public if guarded else None,
        )
        coordinator = Coordinator(ledger, Snapshots(str(folder / "snapshots"), manifest), rules, clock=time.time)
        model = np.zeros(manifest.size, np.float32)
        coordinator.open(model)
        coordinator.tick()
        messages = updates(case, manifest, encoded, base_digest=digest(model), party_name=PARTY, ledger=ledger_id)
        size = await fill(settings, messages, PARTY)
        service = Aggregator(
            amqp_connect(settings),
            coordinator,
            topology=shared(FEDERATION),
            limits=limits,
            pace=Pace(PREFETCH, 64, 0.02, 1 << 20, 16 << 20),
            clock=time.time,
            register=GUARD if guarded else None,
            key=GUARD.federation if guarded else None,
            gate=Gate(per_minute=10**9, part_bytes=1 << 20, max_update_bytes=limits.max_update_bytes),
        )
        began = time.perf_counter()
        await service.run(lambda: None)
        seconds = time.perf_counter() - began
        assert coordinator.counts["merged"] == case.updates, coordinator.counts
    return case.updates / seconds, size


async def one_round(settings: BrokerSettings, case: Case, manifest: Manifest, encoded: list[bytes]) -> Row:
    async with amqp_connect(settings)("bench") as transport:
        await transport.declare(shared(FEDERATION))
        await transport.declare(party(FEDERATION, PARTY))
    await fill(settings, updates(case, manifest, encoded, base_digest="0" * 64, party_name=PARTY), PARTY)
    raw = await raw_rate(settings, case.updates)
    with tempfile.TemporaryDirectory() as folder:
        merges, size = await merge_rate(settings, case, manifest, encoded, Path(folder), guarded=False)
    with tempfile.TemporaryDirectory() as folder:
        guarded, _ = await merge_rate(settings, case, manifest, encoded, Path(folder), guarded=True)
    return Row(case.codec, case.parameters, size, case.updates, raw, merges, merges / raw, guarded, guarded / merges)


async def measure(rounds: int, cases: tuple[Case, ...]) -> list[Row]:
    rows = []
    async with local_rabbitmq(stop_timeout_s=0) as node:
        async with Management(node.management_url) as management:
            await management.put_user(PARTY, SecretStr(PARTY))
            await management.put_permissions(PARTY, Permissions(".*", ".*", ".*"))
        settings = BrokerSettings(url=SecretStr(f"amqp://{PARTY}:{PARTY}@127.0.0.1:{node.amqp_port}/"))
        for case in cases:
            manifest = manifest_for(case)
            encoded = payloads(case, manifest)
            found = [await one_round(settings, case, manifest, encoded) for _ in range(rounds)]
            middle = sorted(found, key=lambda row: row.ratio)[len(found) // 2]
            rows.append(middle)
            print(middle, flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=3, help="of each case; the row is the one with the median ratio")
    arguments.add_argument("--codec", help="only the cases of this codec")
    given = arguments.parse_args()
    configure_logs(LogLevel.ERROR, LogFormat.CONSOLE)
    cases = tuple(case for case in CASES if given.codec in (None, case.codec))
    show("Durable merges beside plain consuming", uvloop.run(measure(given.rounds, cases)), json_file=given.json)


if __name__ == "__main__":
    main()
