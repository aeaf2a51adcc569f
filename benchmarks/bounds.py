"""The aggregator's memory, as a process of its own, while much waits for it: bounded by the prefetch, whatever waits.

Three conditions, each a federation with a ledger of its own, on a private RabbitMQ node:

- half-sent: parties send all parts but the last of as many updates as each may have half-sent, then the last parts of a tenth of
  the updates. A part is a decision of its own: it is put by in the ledger's database.
- queued: small sparse updates of four parties wait in the queue when the aggregator starts.
- slow disk: dense updates wait, and each commit takes half a second; after `--slow-s`, or when all are decided, it is stopped.

`rss before` is that of the aggregator at rest after its first frame; where updates wait for it, it was started again, and that
is the process before. `rss peak` is the kernel's high-water mark; `late growth` is by how much the highest sample of the second
half of the time is over that of the first half, since what leaks goes on growing. `most waiting` are messages that the broker had
in the queue, `most unacknowledged` those that it had delivered and not got back, by its own count; `left` is what it held of both
at the end. An update that is not in the ledger exactly once fails the benchmark. Linux only.

    python -m benchmarks.bounds [--json FILE] [--half-sent 1000] [--queued 100000] [--slow 2000] [--slow-s 30]
"""

import asyncio
import os
import secrets
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import uvloop
from pydantic import SecretStr
from torch import Tensor, nn

from aggregator.opening import open_ledger_for_reading
from aggregator.spool import MAX_HALF_SENT
from benchmarks.chaos.nursery import python_path
from benchmarks.report import parser, show
from broker_fl.cli.options import Flags, environment_of
from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.config import AggregatorSettings, BrokerSettings, load_settings
from broker_fl.database import sqlite_url
from broker_fl.enrolment import add_party
from broker_fl.management import Management
from broker_fl.signing import SigningKey
from broker_fl.tasks import Examples
from broker_fl.tasks.module import initial
from broker_fl.topology import Names
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.following import parse_frame
from broker_fl.transports.local_rabbitmq import HOST, LocalRabbitMQ, local_rabbitmq
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Message
from schemas import wire
from schemas.manifest import Manifest
from schemas.update import ModelUpdate

FEATURES, OUTPUTS = 64, 1000
DENSE, SPARSE = "float32", "topk:0.01+int4"
"""An update of the model has 256 kB in the one, and 1.2 kB in the other."""
PART_BYTES = 64 << 10
COMPLETED_OF = 10
SENDERS = 4
SLOW_COMMIT = "aggregator.decided=sleep:0.5"
PREFETCH = AggregatorSettings().prefetch

DISTINCT = 16
_AT_A_TIME = 64
"""Messages of a sender that wait for their confirms."""
_SENDERS_AT_A_TIME = 8

_SAMPLE_S, _LOOK_S = 0.05, 0.25
_REST_S = 1.0
_COUNTED_S = 2.5
_COUNT_MS = 250
"""The broker counts what is in its queues so often, a broker of others every second."""
_START_S, _STOP_S, _STANDSTILL_S = 120.0, 60.0, 60.0

_MB = 1e6


class Flat:
    """A task of which only the size of the model matters."""

    def build_model(self, data: Path | None) -> nn.Module:
        return nn.Linear(FEATURES, OUTPUTS, bias=False)

    def train_examples(self, data: Path | None) -> Examples:
        return Examples(torch.zeros(1, FEATURES), torch.zeros(1, dtype=torch.int64))

    def test_examples(self, data: Path | None) -> Examples:
        return self.train_examples(data)

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return inputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return 0


TASK = Flat()


@dataclass(frozen=True, slots=True)
class Row:
    condition: str
    messages: int
    bytes_sent: int
    rss_before_mb: float
    rss_peak_mb: float
    growth_mb: float
    late_growth_mb: float
    most_waiting: int
    most_unacknowledged: int
    left: int
    seconds: float
    decided_per_s: float
    """Messages: parts are decided on too."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process, in MB, by the kernel's count."""

    rss: float
    peak: float


def memory_of(pid: int) -> Memory:
    """Raises OSError or KeyError where it has ended."""
    lines = map(str.split, Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {words[0]: int(words[1]) * 1024 / _MB for words in lines if words[0] in ("VmRSS:", "VmHWM:")}
    return Memory(found["VmRSS:"], found["VmHWM:"])


def late_growth(samples: Sequence[tuple[float, float]]) -> float:
    """Of (when, how much): the highest of the second half of the time over the highest of the first half."""
    middle = (samples[0][0] + samples[-1][0]) / 2
    early = max(size for at, size in samples if at <= middle)
    return max((size for at, size in samples if at > middle), default=early) - early


@dataclass(frozen=True, slots=True)
class Federation:
    name: str
    node: LocalRabbitMQ
    management: Management
    folder: Path
    manifest: Manifest

    @property
    def names(self) -> Names:
        return Names(self.name)

    @property
    def ledger_url(self) -> str:
        return sqlite_url(self.folder / "ledger.db")

    @property
    def log(self) -> Path:
        return self.folder / "aggregator.log"

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def variables(self) -> dict[str, str]:
        """Of the aggregator's environment."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_FL_")}
        settings: Flags = {
            "federation": {"name": self.name},
            "broker": {"url": self.node.url, "management_url": self.node.management_url},
            "task": {"name": f"{Path(__file__).resolve()}:TASK"},
            # All updates are trained from version 0.
            "merging": {"max_staleness": 10**9},
            "aggregator": {"state": self.folder},
            "evaluation": {"enabled": False},
            # The parties of this benchmark sign nothing, and send as fast as they can.
            "security": {"signatures": False},
            "trust": {"max_updates_per_minute": 0},
        }
        # The task is in this package, and Opacus installs one of the same name.
        return {**inherited, **python_path(inherited), **environment_of(settings)}

    def entries(self) -> int:
        with open_ledger_for_reading(self.ledger_url) as ledger:
            return ledger.last_seq()

    def parts(self, parties: Iterable[str]) -> int:
        with open_ledger_for_reading(self.ledger_url) as ledger:
            return sum(ledger.parts_of(party) for party in parties)

    def outcomes(self) -> Counter[str]:
        """Of all updates. Fails where one was decided twice."""
        outcomes: Counter[str] = Counter()
        times: Counter[tuple[str | None, int | None]] = Counter()
        with open_ledger_for_reading(self.ledger_url) as ledger:
            for entry in ledger.entries_after(0):
                if entry.kind == "update":
                    outcomes[entry.outcome or ""] += 1
                    times[entry.party, entry.sequence] += 1
        doubled = [key for key, count in times.items() if count > 1]
        assert not doubled, f"decided more than once: {doubled[:5]}"
        return outcomes

    async def messages(self) -> tuple[int, int]:
        """In the updates queue: those that wait, and those that are delivered and not acknowledged."""
        found = await self.management.queues(self.names.updates, only_totals=True)
        return sum(queue.ready for queue in found), sum(queue.unacknowledged for queue in found)


@dataclass(slots=True)
class Meter:
    """Looks at a running aggregator, and at its queue, all the time."""

    federation: Federation
    process: asyncio.subprocess.Process
    samples: list[tuple[float, float]] = field(default_factory=list)
    most_waiting: int = 0
    most_unacknowledged: int = 0

    @property
    def rss_mb(self) -> float:
        return self.samples[-1][1]

    async def watch_memory(self) -> None:
        """Until cancelled."""
        while True:
            try:
                memory = memory_of(self.process.pid)
            except (OSError, KeyError) as exc:
                raise RuntimeError(f"the aggregator ended: {self.federation.said()[-2000:]}") from exc
            self.samples.append((time.perf_counter(), memory.rss))
            await asyncio.sleep(_SAMPLE_S)

    async def watch_queue(self) -> None:
        """Until cancelled."""
        while True:
            ready, unacknowledged = await self.federation.messages()
            self.most_waiting = max(self.most_waiting, ready)
            self.most_unacknowledged = max(self.most_unacknowledged, unacknowledged)
            await asyncio.sleep(_LOOK_S)

    def begin(self) -> None:
        """What was before counts no more, but for the high-water mark of the process."""
        self.samples = self.samples[-1:]
        self.most_waiting = self.most_unacknowledged = 0


@asynccontextmanager
async def aggregator(federation: Federation, *, failpoints: str = "") -> AsyncIterator[Meter]:
    """At work while inside, and stopped in order at the end."""
    began_at = len(federation.said())
    with federation.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "broker_fl", "aggregator", "--log-format", "json", "--until-stdin-closes"),
            stdin=asyncio.subprocess.PIPE,  # Should we be killed, it ends.
            stdout=log,
            stderr=log,
            cwd=federation.folder,
            env={**federation.variables(), **({"BROKER_FL_FAILPOINTS": failpoints} if failpoints else {})},
        )
    meter = Meter(federation, process)
    try:
        async with asyncio.TaskGroup() as group:
            watches = [group.create_task(watch) for watch in (meter.watch_memory(), meter.watch_queue())]
            await until(lambda: "aggregator is up" in federation.said()[began_at:], within_s=_START_S)
            meter.begin()
            yield meter
            for watch in watches:
                watch.cancel()
        process.terminate()
        async with asyncio.timeout(_STOP_S):
            code = await process.wait()
        assert code == 0, f"the aggregator ended with {code}: {federation.said()[-2000:]}"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until(reached: Callable[[], bool], *, within_s: float) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        # What is waited for happens in another process.
        while not await asyncio.to_thread(reached):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_count(count: Callable[[], int], expected: int, *, within_s: float | None = None) -> None:
    """Looks until there are so many, or the time is over. Raises TimeoutError where nothing changes for long."""
    began = changed_at = time.perf_counter()
    known = -1
    while (found := await asyncio.to_thread(count)) < expected:
        now = time.perf_counter()
        if within_s is not None and now - began > within_s:
            return
        if found != known:
            known, changed_at = found, now
        elif now - changed_at > _STANDSTILL_S:
            raise TimeoutError(f"{found} of {expected}, and no more for {_STANDSTILL_S:g} s")
        await asyncio.sleep(_LOOK_S)


async def at_rest(meter: Meter) -> tuple[float, str]:
    """What it takes after its first frame, in MB; and that frame's digest."""
    federation = meter.federation
    await until(lambda: "model broadcast" in federation.said(), within_s=_START_S)
    admin = amqp_connect(BrokerSettings(url=SecretStr(federation.node.url)))
    async with admin("bounds") as transport, transport.follow(federation.names.model_log, start="first", name="bounds") as feed:
        frame = parse_frame((await feed.receive()).body, federation=federation.name, manifest=federation.manifest)
    assert frame.version == 0
    await asyncio.sleep(_REST_S)
    return meter.rss_mb, frame.digest


class Sender:
    """One party, which only sends; under its own login, since its name must be the broker's word."""

    def __init__(self, federation: Federation, party: str, password: SecretStr) -> None:
        url = f"amqp://{party}:{password.get_secret_value()}@{HOST}:{federation.node.amqp_port}/"
        self._connect = amqp_connect(BrokerSettings(url=SecretStr(url), publish_timeout_s=300.0))
        self._federation = federation
        self.party = party

    def updates(self, count: int, *, codec: str, payloads: Sequence[bytes], base_digest: str) -> Iterator[Message]:
        for sequence in range(1, count + 1):
            update = ModelUpdate(
                federation=self._federation.name,
                party=self.party,
                update_id=uuid.uuid4().hex,
                sequence=sequence,
                base_version=0,
                base_digest=base_digest,
                manifest_digest=self._federation.manifest.digest,
                codec=codec,
                num_samples=1,
                num_steps=1,
                train_loss=0.0,
                payload=payloads[sequence % len(payloads)],
            )
            yield Message(self._federation.names.up(self.party), wire.encode(update), message_id=update.update_id)

    async def send(self, messages: Iterable[Message]) -> int:
        """Bytes of their bodies, all confirmed."""
        total, rest = 0, iter(messages)
        async with self._connect("bounds") as transport:
            while some := list(islice(rest, _AT_A_TIME)):
                await asyncio.gather(*map(transport.publish, some))
                total += sum(len(message.body) for message in some)
        return total


async def enrolled(federation: Federation, count: int) -> list[Sender]:
    settings = load_settings(flags={"federation": {"name": federation.name}}, environment={})
    names = [f"{federation.name}-{number}" for number in range(count)]
    key = SigningKey.generate()
    credentials = [await add_party(federation.management, settings, name, key=key) for name in names]
    return [Sender(federation, name, own.password) for name, own in zip(names, credentials, strict=True)]


async def send_all(messages: Mapping[Sender, Iterable[Message]]) -> int:
    """Bytes of what all of them sent."""
    free = asyncio.Semaphore(_SENDERS_AT_A_TIME)

    async def send(sender: Sender, own: Iterable[Message]) -> int:
        async with free:
            return await sender.send(own)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send(sender, own)) for sender, own in messages.items()]
    return sum(task.result() for task in tasks)


def payloads(codec: str, manifest: Manifest) -> list[bytes]:
    generator = np.random.default_rng(1)
    delta = generator.standard_normal(manifest.size, dtype=np.float32) * np.float32(1e-6)
    parsed = parse_codec(codec)
    return [encode(np.roll(delta, shift), parsed, manifest=manifest, generator=generator) for shift in range(DISTINCT)]


def shares(count: int, senders: Sequence[Sender]) -> dict[Sender, int]:
    """How many each of them sends."""
    return {sender: len(range(number, count, len(senders))) for number, sender in enumerate(senders)}


async def row_of(
    condition: str, meter: Meter, *, before_mb: float, messages: int, decided: int, sent_bytes: int, began: float
) -> Row:
    """While it still runs; the time ends now."""
    seconds = time.perf_counter() - began
    peak = memory_of(meter.process.pid).peak
    late = late_growth(meter.samples)
    await asyncio.sleep(_COUNTED_S)
    left = sum(await meter.federation.messages())
    return Row(
        condition=condition,
        messages=messages,
        bytes_sent=sent_bytes,
        rss_before_mb=before_mb,
        rss_peak_mb=peak,
        growth_mb=peak - before_mb,
        late_growth_mb=late,
        most_waiting=meter.most_waiting,
        most_unacknowledged=meter.most_unacknowledged,
        left=left,
        seconds=seconds,
        decided_per_s=decided / seconds,
    )


async def half_sent(federation: Federation, count: int) -> Row:
    senders = await enrolled(federation, -(-count // MAX_HALF_SENT))
    encoded = payloads(DENSE, federation.manifest)
    completed = range(0, count, COMPLETED_OF)
    last_parts: dict[Sender, list[Message]] = {}
    sent = 0

    def all_but_last(number: int, sender: Sender) -> Iterator[Message]:
        nonlocal sent
        own = range(number, count, len(senders))
        updates = sender.updates(len(own), codec=DENSE, payloads=encoded, base_digest=base_digest)
        for index, update in zip(own, updates, strict=True):
            *parts, last = split(update, part_bytes=PART_BYTES, limit_bytes=PART_BYTES)
            if index in completed:
                last_parts.setdefault(sender, []).append(last)
            sent += len(parts)
            yield from parts

    parties = [sender.party for sender in senders]
    async with aggregator(federation) as meter:
        before_mb, base_digest = await at_rest(meter)
        meter.begin()
        began = time.perf_counter()
        sent_bytes = await send_all({sender: all_but_last(number, sender) for number, sender in enumerate(senders)})
        half = sent
        await until_count(lambda: federation.parts(parties), half)
        sent_bytes += await send_all(last_parts)
        await until_count(lambda: federation.entries() - 1, len(completed))
        messages = half + len(completed)
        row = await row_of(
            f"{count:,} half-sent",
            meter,
            before_mb=before_mb,
            messages=messages,
            decided=messages,
            sent_bytes=sent_bytes,
            began=began,
        )
    outcomes = await asyncio.to_thread(federation.outcomes)
    assert outcomes == {"merged": len(completed)}, outcomes
    left = await asyncio.to_thread(federation.parts, parties)
    assert left == half - half // count * len(completed), f"{left} parts of half-sent updates are left"
    return row


async def queued(
    federation: Federation, count: int, *, condition: str, codec: str, failpoints: str = "", within_s: float | None = None
) -> Row:
    senders = await enrolled(federation, SENDERS)
    encoded = payloads(codec, federation.manifest)
    async with aggregator(federation) as meter:
        before_mb, base_digest = await at_rest(meter)
    own = shares(count, senders)
    sent_bytes = await send_all(
        {sender: sender.updates(share, codec=codec, payloads=encoded, base_digest=base_digest) for sender, share in own.items()}
    )
    print(f"{condition}: {count} updates of {sent_bytes / count:,.0f} bytes are in the queue", flush=True)
    async with aggregator(federation, failpoints=failpoints) as meter:
        began = time.perf_counter()
        await until_count(lambda: federation.entries() - 1, count, within_s=within_s)
        row = await row_of(
            condition,
            meter,
            before_mb=before_mb,
            messages=count,
            decided=await asyncio.to_thread(federation.entries) - 1,
            sent_bytes=sent_bytes,
            began=began,
        )
    outcomes = await asyncio.to_thread(federation.outcomes)
    assert set(outcomes) == {"merged"}, outcomes
    assert outcomes.total() == count or within_s is not None, outcomes
    return row


@asynccontextmanager
async def federated(node: LocalRabbitMQ) -> AsyncIterator[Federation]:
    """Not yet anything but a name and a folder."""
    _, manifest, _ = initial(TASK, None, 0)
    with tempfile.TemporaryDirectory(prefix="broker-fl-bounds-") as folder:
        async with Management(node.management_url) as management:
            yield Federation(f"bounds-{secrets.token_hex(3)}", node, management, Path(folder), manifest)


async def measure(
    node: LocalRabbitMQ, *, half_sent_updates: int, queued_updates: int, slow_updates: int, slow_s: float
) -> list[Row]:
    """None of a condition of which there are no updates."""
    rows = []
    if half_sent_updates:
        async with federated(node) as federation:
            rows.append(await half_sent(federation, half_sent_updates))
            print(rows[-1], flush=True)
    if slow_updates:
        async with federated(node) as federation:
            rows.append(
                await queued(
                    federation,
                    slow_updates,
                    condition=f"{slow_updates:,}, slow disk",
                    codec=DENSE,
                    failpoints=SLOW_COMMIT,
                    within_s=slow_s,
                )
            )
            print(rows[-1], flush=True)
    if queued_updates:
        async with federated(node) as federation:
            rows.append(await queued(federation, queued_updates, condition=f"{queued_updates:,} queued", codec=SPARSE))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--half-sent", type=int, default=1000, help="updates of which the last part is missing")
    arguments.add_argument("--queued", type=int, default=100_000, help="small updates that wait when the aggregator starts")
    arguments.add_argument("--slow", type=int, default=2000, help="large updates that wait for a slow disk")
    arguments.add_argument("--slow-s", type=float, default=30.0, help="for so long at most")
    given = arguments.parse_args()

    async def run() -> list[Row]:
        async with local_rabbitmq(statistics_interval_ms=_COUNT_MS, stop_timeout_s=0) as node:
            return await measure(
                node,
                half_sent_updates=given.half_sent,
                queued_updates=given.queued,
                slow_updates=given.slow,
                slow_s=given.slow_s,
            )

    show(f"Memory of the aggregator, prefetch {PREFETCH}", uvloop.run(run()), json_file=given.json, hidden=("left",))


if __name__ == "__main__":
    main()
