"""Enrolment measured: many parties added from a file, added again, listed, read by an aggregator; one suspended, rotated and
removed while it publishes.

On a private RabbitMQ node, through the same functions as `broker-fl party`, without the start of Python. `cut off` is the time
from the command's first request until the party's busy connection is closed. `broker MB` is what the node's memory (RSS) grew by.

    python -m benchmarks.enrolment [--json FILE] [--parties 1000]
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.report import parser, show
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs
from broker_fl.config import Settings, load_settings
from broker_fl.enrolment import (
    Office,
    PartyFiles,
    Register,
    add_parties,
    list_members,
    open_office,
    party_facts,
    read_roster,
    remove_party,
    rotate_party,
    see_party,
    suspend_party,
)
from broker_fl.errors import BrokerError
from broker_fl.topology import Names
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import local_rabbitmq
from broker_fl.transports.transport import Message

FEDERATION = "enrolment"
NAMES = Names(FEDERATION)


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    parties: int
    seconds: float
    parties_per_second: float
    broker_mb: float


@dataclass(frozen=True, slots=True)
class Bench:
    office: Office
    settings: Settings
    folder: Path
    pid: int

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.toml"

    @property
    def files(self) -> PartyFiles:
        return PartyFiles(self.settings, aggregator_key=self.office.public_key, file_of=self.file)

    def memory_mb(self) -> float:
        (line,) = (line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    async def timed(self, what: str, parties: int, doing: Awaitable[object]) -> Row:
        before, began = self.memory_mb(), time.perf_counter()
        await doing
        seconds = time.perf_counter() - began
        return Row(what, parties, seconds, parties / seconds, self.memory_mb() - before)

    async def cut_off(self, what: str, name: str, command: Callable[[], Awaitable[object]]) -> Row:
        """A party that publishes all the time, until it may not any more."""
        settings = load_settings(self.file(name), environment={})
        async with amqp_connect(settings.broker)(f"worker:{name}") as party:
            sent = asyncio.Event()

            async def publish() -> None:
                with suppress(BrokerError):
                    while True:
                        await party.publish(Message(NAMES.up(name), b"x" * 10_000, mandatory=False))
                        sent.set()

            publishing = asyncio.create_task(publish())
            await sent.wait()
            began = time.perf_counter()
            doing = asyncio.create_task(_run(command))
            await publishing
            seconds = time.perf_counter() - began
            await doing
        return Row(what, 1, seconds, 1 / seconds, 0.0)


async def _run(command: Callable[[], Awaitable[object]]) -> None:
    await command()


def roster(folder: Path, count: int) -> Path:
    file = folder / "parties.csv"
    lines = [f'p{number:05d},"Hospital, no. {number}",region-{number % 17},{1000 + number},standard' for number in range(count)]
    file.write_text("\n".join(("name,display_name,group,num_samples,tier", *lines, "")))
    return file


async def measured(count: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        async with local_rabbitmq(stop_timeout_s=0) as node:
            flags = {
                "federation": {"name": FEDERATION},
                "broker": {"url": node.url, "management_url": node.management_url},
                "aggregator": {"state": folder},
            }
            settings = load_settings(flags=flags, environment={})
            async with open_office(settings) as office:
                return await rows(Bench(office, settings, Path(folder), node.pid), count)


async def rows(bench: Bench, count: int) -> list[Row]:
    office, register = bench.office, Register(bench.settings)
    parties = read_roster(roster(bench.folder, count))
    made = [await bench.timed("enrol", count, add_parties(office, parties, bench.files))]
    made.append(await bench.timed("enrol again", count, add_parties(office, parties, bench.files)))
    made.append(await bench.timed("list", count, list_members(office)))
    made.append(await bench.timed("register, for an aggregator", count, register.all()))
    made.append(await bench.timed("register, again", count, register.all()))
    one = party_facts("one-more", {"group": "region-1"})
    made.append(await bench.timed("enrol one more", 1, add_parties(office, [one], bench.files)))
    made.append(await bench.timed("show one", 1, see_party(office, "one-more")))
    names = [facts.name for facts in parties]
    for what, name, command in (
        ("suspend one: cut off", names[0], lambda: suspend_party(office, names[0], "a benchmark")),
        ("rotate one: cut off", names[1], lambda: rotate_party(office, parties[1], bench.files)),
        ("remove one: cut off", names[2], lambda: remove_party(office, names[2])),
    ):
        made.append(await bench.cut_off(what, name, command))
    return made


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--parties", type=int, default=1000)
    options = arguments.parse_args()
    configure_logs(LogLevel.ERROR, LogFormat.CONSOLE)
    show("Enrolment", uvloop.run(measured(options.parties)), json_file=options.json)


if __name__ == "__main__":
    main()
