"""What TLS costs: the same messages over mutual TLS and in the clear, in turns, each with a private node of its own.

Both nodes run the whole time; clients are the transport that workers and aggregator use, on uvloop, in this process. Messages go
through a fanout exchange into a quorum queue, as updates do: they are published with up to 32 waiting for their confirmation,
then consumed and acknowledged in groups. Opening is one transport, which is two connections, a handshake and a login each.

`ratio` is TLS over plain, the median of the ratios of rounds in which the two took turns at going first; one round before them
does not count. CPU is milliseconds per message (or opening), of this process and of the node's.

    python -m benchmarks.tls [--json FILE] [--rounds 7]
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from pydantic import SecretStr

from benchmarks.report import parser, show
from broker_fl.certificates import Certificates
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs
from broker_fl.config import BrokerSettings
from broker_fl.topology import Binding, Exchange, Queue, Topology
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ, NodeTls, local_rabbitmq
from broker_fl.transports.transport import Connect, Message, Transport

SIZES = {10_000: 2000, 250_000: 400, 4 << 20: 40}
"""Bytes of a message, and how many of them make a round."""
OPENINGS = 20
WINDOW = 32
PREFETCHED_BYTES = 64 << 20
TOPOLOGY = Topology((Exchange("x", "fanout"),), (Queue("q", "quorum"),), (Binding("x", "q"),))


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    bytes: int
    plain_per_s: float
    tls_per_s: float
    plain_mb_s: float
    tls_mb_s: float
    ratio: float
    client_cpu_plain_ms: float
    client_cpu_tls_ms: float
    broker_cpu_plain_ms: float
    broker_cpu_tls_ms: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one message or opening, in seconds."""

    wall_s: float
    client_s: float
    broker_s: float


@dataclass(frozen=True, slots=True)
class Side:
    """A node, and how it is reached."""

    name: str
    node: LocalRabbitMQ
    connect: Connect

    async def cost(self, work: Callable[[], Awaitable[None]], *, count: int) -> Cost:
        wall, client, broker = time.perf_counter(), time.process_time(), cpu_s(self.node.pid)
        await work()
        return Cost(
            (time.perf_counter() - wall) / count,
            (time.process_time() - client) / count,
            (cpu_s(self.node.pid) - broker) / count,
        )


def cpu_s(pid: int) -> float:
    """Of user and kernel, by /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def sides() -> AsyncIterator[tuple[Side, Side]]:
    async with AsyncExitStack() as stack:
        authority = Certificates.make(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        certificate, key = authority.keep(authority.issue("broker", hosts=("127.0.0.1",)))
        tls = NodeTls(authority.folder / "ca.pem", certificate, key, authority.revocations)
        plain = await stack.enter_async_context(local_rabbitmq(stop_timeout_s=0))
        encrypted = await stack.enter_async_context(local_rabbitmq(stop_timeout_s=0, tls=tls))
        own = authority.issue(encrypted.user)
        login = BrokerSettings(
            url=SecretStr(encrypted.url), ca=authority.ca_pem, certificate=own.certificate_pem, certificate_key=own.key_pem
        )
        yield (
            Side("plain", plain, amqp_connect(BrokerSettings(url=SecretStr(plain.url)))),
            Side("tls", encrypted, amqp_connect(login)),
        )


async def publish(transport: Transport, body: bytes, *, count: int) -> None:
    window = asyncio.Semaphore(WINDOW)

    async def one() -> None:
        async with window:
            await transport.publish(Message("x", body))

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


async def consume(transport: Transport, *, count: int, prefetch: int) -> None:
    group = max(1, prefetch // 2)
    async with transport.consume("q", prefetch=prefetch, name="bench") as subscription:
        for number in range(1, count + 1):
            delivery = await subscription.receive()
            if number % group == 0 or number == count:
                await subscription.acknowledge(delivery.tag, multiple=True)


async def open_and_close(side: Side) -> None:
    for _ in range(OPENINGS):
        async with side.connect("bench"):
            pass


async def measure(rounds: int) -> list[Row]:
    costs: dict[tuple[str, int], dict[str, list[Cost]]] = {}
    async with sides() as both:
        for side in both:
            async with side.connect("bench") as transport:
                await transport.declare(TOPOLOGY)
        for number in range(rounds + 1):
            for side in both if number % 2 else both[::-1]:
                for what, cost in (await one_round(side)).items():
                    if number:
                        costs.setdefault(what, {}).setdefault(side.name, []).append(cost)
            print(f"round {number} of {rounds}", flush=True)
    return [row_of(what, size, plain=of["plain"], tls=of["tls"]) for (what, size), of in costs.items()]


async def one_round(side: Side) -> dict[tuple[str, int], Cost]:
    costs = {("open", 0): await side.cost(lambda: open_and_close(side), count=OPENINGS)}
    async with side.connect("bench") as transport:
        for size, count in SIZES.items():
            body, prefetch = bytes(size), max(8, min(64, PREFETCHED_BYTES // size))

            async def send(body: bytes = body, count: int = count) -> None:
                await publish(transport, body, count=count)

            async def receive(count: int = count, prefetch: int = prefetch) -> None:
                await consume(transport, count=count, prefetch=prefetch)

            costs["publish", size] = await side.cost(send, count=count)
            costs["consume", size] = await side.cost(receive, count=count)
    return costs


def row_of(what: str, size: int, *, plain: list[Cost], tls: list[Cost]) -> Row:
    def per_s(costs: list[Cost]) -> float:
        return 1 / statistics.median(cost.wall_s for cost in costs)

    def ms(seconds: Iterable[float]) -> float:
        return 1000 * statistics.median(seconds)

    return Row(
        what=what,
        bytes=size,
        plain_per_s=per_s(plain),
        tls_per_s=per_s(tls),
        plain_mb_s=per_s(plain) * size / 1e6,
        tls_mb_s=per_s(tls) * size / 1e6,
        ratio=statistics.median(one.wall_s / other.wall_s for one, other in zip(plain, tls, strict=True)),
        client_cpu_plain_ms=ms(cost.client_s for cost in plain),
        client_cpu_tls_ms=ms(cost.client_s for cost in tls),
        broker_cpu_plain_ms=ms(cost.broker_s for cost in plain),
        broker_cpu_tls_ms=ms(cost.broker_s for cost in tls),
    )


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    configure_logs(LogLevel.WARNING, LogFormat.CONSOLE)
    rows = uvloop.run(measure(given.rounds))
    show("TLS beside plain", rows, json_file=given.json)


if __name__ == "__main__":
    main()
