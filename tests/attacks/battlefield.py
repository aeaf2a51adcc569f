"""A federation at work: an aggregator and two honest workers in processes of their own, a real broker, and taps of an operator
who listens to everything. Attackers are enrolled as anybody is.
"""

import asyncio
import os
import secrets
import sqlite3
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from command_line import Running, until
from pamqp.commands import Basic, Queue
from party import Party
from raw_amqp import RawConnection, raw_connection
from small_federation import SmallFederation

from broker_fl.enrolment import Office, PartyFiles, Unkept, add_parties, open_office, party_facts
from broker_fl.management import Management
from broker_fl.tasks.module import initial
from broker_fl.tasks.registry import load_task
from broker_fl.topology import Names
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ
from schemas import wire
from schemas.event import Event
from schemas.manifest import Manifest

HONEST = ("alice", "bob")

MAX_STALENESS = 800
"""More versions than a party may make at once."""
INBOX_MESSAGES = 40

STEPS = 8
"""Of a training, each with a pause: an honest party sends less than the rate allows."""

_STRIKES = 8
"""Refusals that a party survives: after 12 in a row it is suspended."""

TABLE = os.environ.get("ATTACK_TABLE")
"""The file that the table of docs/security.md is written to: then floods are longer, and need a quiet machine."""
WINDOW_S = 10.0 if TABLE else 2.0
PATIENCE_S = 60.0
_HAS_PROC = Path("/proc/self/clear_refs").exists()
_FEW = 20
"""Messages that wait: those of a few honest updates."""


@dataclass(frozen=True, slots=True)
class Tapped:
    """A message that an operator's queue got."""

    exchange: str
    routing_key: str
    message_id: str
    headers: dict[str, object]
    body: bytes
    """Of events."""
    size: int

    @property
    def reason(self) -> str:
        """Of what is in quarantine."""
        return str(self.headers.get("x-fl-reason", ""))


@dataclass(frozen=True, slots=True)
class Pace:
    """Of the honest parties, while somebody attacks."""

    ratio: float
    """To that of calm."""
    longest_wait_s: float
    """Between two of their updates that were merged."""

    def __str__(self) -> str:
        return f"{self.ratio:.2f}, {self.longest_wait_s:.1f} s"


@dataclass(frozen=True, slots=True)
class Row:
    attack: str
    observed: str
    pace: Pace | None


@dataclass
class Battlefield:
    federation: SmallFederation
    office: Office
    broker_version: str
    aggregator: Running
    workers: dict[str, Running]
    manifest: Manifest
    tapped: list[Tapped] = field(default_factory=list)
    calm_pace: float = 0.0
    """Merged honest updates a second while nobody attacks."""
    rows: list[Row] = field(default_factory=list)
    """What was observed."""
    keys: dict[str, str] = field(default_factory=dict)
    """The public keys of parties, from themselves."""
    sessions: dict[str, int] = field(default_factory=dict)
    """Of the workers, before the first attack: they may have come before there was a model."""
    _mallory: Party | None = None
    _strikes: int = 0
    _names_made: int = 0
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def names(self) -> Names:
        return self.federation.names

    @property
    def management(self) -> Management:
        return self.federation.management

    @property
    def admin_url(self) -> str:
        return self.federation.url

    @property
    def is_rabbitmq_4(self) -> bool:
        return int(self.broker_version.partition(".")[0]) >= 4

    # Parties

    async def enrol(self, name: str, **facts: object) -> Party:
        keeper = Unkept()
        await add_parties(self.office, [party_facts(name, facts)], keeper)
        self.federation.enrolled.add(name)
        credentials = keeper.credentials[name]
        assert credentials.password is not None
        assert credentials.key is not None
        self.keys[name] = credentials.key.public
        return Party(
            name=name,
            password=credentials.password.get_secret_value(),
            key=credentials.key,
            url=self.admin_url,
            names=self.names,
            manifest=self.manifest,
            scale=self.usual_norm(),
        )

    async def mallory(self, strikes: int = 1) -> Party:
        """A hostile party that may commit so many more offences; a new one where the last is close to its suspension."""
        if self._mallory is None or self._strikes + strikes > _STRIKES:
            self._mallory, self._strikes = await self.fresh_mallory(), 0
        self._strikes += strikes
        self._mallory.scale = self.usual_norm()
        return self._mallory

    async def fresh_mallory(self) -> Party:
        self._names_made += 1
        party = await self.enrol(f"mallory-{self._names_made}")
        await self._stack.enter_async_context(party.listening())
        return party

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[RawConnection]:
        """Whoever runs the broker."""
        async with raw_connection(self.admin_url) as raw:
            await raw.confirms()
            yield raw

    # What an operator sees

    @asynccontextmanager
    async def _tapping(self) -> AsyncIterator[None]:
        """All receipts, all events, all that goes into quarantine, and all broadcasts."""
        async with raw_connection(self.admin_url) as raw:
            queue = (await raw.ask(Queue.Declare(exclusive=True), Queue.DeclareOk)).queue
            names = self.names
            keys = {names.receipts: HONEST, names.events: ("#",), names.quarantine: ("",), names.model: ("",)}
            for exchange, bound in keys.items():
                for key in bound:
                    await raw.ask(Queue.Bind(queue=queue, exchange=exchange, routing_key=key), Queue.BindOk)
            raw.send(Basic.Consume(queue=queue, no_ack=True))
            task = asyncio.create_task(self._tap(raw))
            try:
                yield
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _tap(self, raw: RawConnection) -> None:
        while True:
            try:
                deliver, header, body = await raw.next_message()
            except TimeoutError:
                continue
            properties = header.properties
            self.tapped.append(
                Tapped(
                    deliver.exchange,
                    deliver.routing_key,
                    properties.message_id or "",
                    dict(properties.headers or {}),
                    body if deliver.exchange == self.names.events else b"",
                    len(body),
                )
            )

    async def sees(self, wanted: Callable[[Tapped], bool], what: str, *, since: int = 0) -> Tapped:
        found: list[Tapped] = []

        def is_there() -> bool:
            found[:] = [one for one in self.tapped[since:] if wanted(one)]
            return bool(found)

        await until(is_there, what, within_s=PATIENCE_S)
        return found[0]

    async def quarantined(self, message_id: str) -> str:
        """Why."""
        wanted = lambda one: one.exchange == self.names.quarantine and one.message_id == message_id  # noqa: E731
        return (await self.sees(wanted, f"{message_id} is in quarantine")).reason

    def events(self, kind: str, *, since: int = 0) -> list[Event]:
        exchange = self.names.events
        found = [one for one in self.tapped[since:] if (one.exchange, one.routing_key) == (exchange, kind)]
        return [wire.decode(Event, one.body) for one in found]

    # The ledger

    def ask(self, question: str, *values: object) -> list[tuple]:
        """SQL to the ledger, as it is now."""
        with closing(sqlite3.connect(f"file:{self.federation.ledger_file}?mode=ro", uri=True, timeout=30)) as connection:
            return connection.execute(question, values).fetchall()

    def entries(self, party: str, kind: str = "update") -> list[tuple]:
        """Update id, outcome, reason, factor and detail, in order."""
        return self.ask(
            "SELECT update_id, outcome, reason, factor, detail FROM entries WHERE party = ? AND kind = ? ORDER BY seq",
            party,
            kind,
        )

    def merged(self) -> dict[str, int]:
        counts = dict.fromkeys(HONEST, 0)
        counts |= dict(self.ask("SELECT party, COUNT(*) FROM entries WHERE outcome = 'merged' GROUP BY party"))
        return {party: counts[party] for party in HONEST}

    async def pace_since(self, began: float) -> "Pace":
        """From an attack's beginning until nothing of it waits, and a few seconds at least."""
        async with self.admin() as raw:
            while await raw.depth(self.names.updates) > _FEW:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        ends = max(time.time(), began + WINDOW_S)
        await asyncio.sleep(ends - time.time())
        times = self._merged_at(began, ends)
        waits = [after - before for before, after in pairwise([began, *times, ends])]
        return Pace(len(times) / (ends - began) / self.calm_pace, max(waits))

    async def measure_calm(self) -> None:
        began = time.time()
        await asyncio.sleep(WINDOW_S)
        self.calm_pace = len(self._merged_at(began, time.time())) / (time.time() - began)

    def _merged_at(self, since: float, until: float) -> list[float]:
        """When honest updates were merged."""
        rows = self.ask(
            "SELECT at FROM entries WHERE outcome = 'merged' AND party IN ('alice', 'bob') AND at BETWEEN ? AND ? ORDER BY at",
            since,
            until,
        )
        return [at for (at,) in rows]

    @property
    def version(self) -> int:
        ((version,),) = self.ask("SELECT MAX(version) FROM entries")
        return version

    def usual_norm(self) -> float:
        rows = self.ask("SELECT norm FROM entries WHERE party = 'alice' AND outcome = 'merged' ORDER BY seq DESC LIMIT 32")
        return statistics.median(norm for (norm,) in rows)

    # Memory

    def resident_bytes(self) -> int:
        return self._status("VmRSS")

    def begin_peak(self) -> None:
        if _HAS_PROC:
            Path(f"/proc/{self.aggregator.pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        return self._status("VmHWM")

    def _status(self, key: str) -> int:
        """0 where the system does not tell."""
        if not _HAS_PROC:
            return 0
        text = Path(f"/proc/{self.aggregator.pid}/status").read_text()
        return int(text.partition(f"{key}:")[2].split()[0]) << 10

    # What has to go on

    async def go_on(self, *, more: int = 1) -> None:
        """Honest parties' updates are merged, and make new versions."""
        before = self.merged()
        enough = lambda: all(now >= before[party] + more for party, now in self.merged().items())  # noqa: E731
        await until(
            lambda: enough() or not self.is_alive, f"alice's and bob's training goes on after {before}", within_s=PATIENCE_S
        )
        assert self.is_alive, self.federation.report()

    @property
    def is_alive(self) -> bool:
        return all(running.is_alive for running in (self.aggregator, *self.workers.values()))

    def expect_unharmed(self) -> None:
        """The same aggregator without a pause; nobody honest was refused anything."""
        assert self.is_alive, self.federation.report()
        assert len(self.aggregator.lines("aggregator is up")) == 1, self.aggregator.report()
        assert not self.aggregator.lines("broker lost"), self.aggregator.report()
        assert not self.aggregator.lines("Traceback"), self.aggregator.report()
        refused = self.ask("SELECT party, reason, detail FROM entries WHERE outcome = 'refused' AND party IN ('alice', 'bob')")
        assert refused == []
        for name, worker in self.workers.items():
            assert len(worker.lines("connected")) == self.sessions[name], f"{name} lost its connection\n{worker.report()}"

    async def end(self) -> None:
        """Everything is told and settled, and the ledger is true."""
        self.expect_unharmed()
        for running in (*self.workers.values(), self.aggregator):
            running.terminate()
            await running.ends_well()
        strangers = {party for (party,) in self.ask("SELECT DISTINCT party FROM entries WHERE kind = 'update'")} - set(HONEST)
        self.federation.expect_exactly_once(*HONEST, strangers=strangers)
        for party in HONEST:
            self.federation.expect_held(party)
        keys = self.federation.folder / "keys"
        keys.write_text("".join(f"{name} {key}\n" for name, key in self.keys.items()))
        said = await self.federation.succeeds("ledger", "verify", "--party-keys", str(keys))
        ((merged,),) = self.ask("SELECT COUNT(*) FROM entries WHERE outcome = 'merged'")
        assert "all as recorded" in said
        assert f"{merged} updates are signed by their parties" in said
        assert "; 0 are unsigned" in said


@asynccontextmanager
async def battlefield(rabbitmq: LocalRabbitMQ, folder: Path) -> AsyncIterator[Battlefield]:
    vhost = f"attacks-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        management = await stack.enter_async_context(Management(rabbitmq.management_url, vhost=vhost))
        await management.put_vhost()
        stack.push_async_callback(management.delete_vhost)
        url = f"{rabbitmq.url}{vhost}"
        federation = SmallFederation(folder, url=url, management_url=rabbitmq.management_url, management=management, task="WIDE")
        federation.configure(
            training={"steps": STEPS, "learning_rate": 0.00002},
            merging={"max_staleness": MAX_STALENESS},
            enrolment={"inbox_messages": INBOX_MESSAGES},
            security={"key": str(federation.server / "federation.key")},
        )
        stack.push_async_callback(federation.end)
        stack.callback(lambda: sys.stdout.write(federation.report()))
        office = await stack.enter_async_context(open_office(federation.settings))
        overview = await management.overview()
        keys = await _enrol_honest(federation, office)
        _, manifest, _ = initial(load_task(federation.task), None, 0)
        opened = Battlefield(
            federation=federation,
            office=office,
            broker_version=overview.rabbitmq_version,
            aggregator=federation.aggregator(),
            workers={party: federation.worker(party) for party in HONEST},
            manifest=manifest,
        )
        await opened.aggregator.says("aggregator is up")
        await stack.enter_async_context(opened._tapping())
        await stack.enter_async_context(opened._stack)
        await federation.reaches(20, opened.aggregator, *opened.workers.values())
        opened.keys |= keys
        opened.sessions |= {name: len(worker.lines("connected")) for name, worker in opened.workers.items()}
        await opened.measure_calm()
        yield opened
        await opened.end()


async def _enrol_honest(federation: SmallFederation, office: Office) -> dict[str, str]:
    """As `broker-fl party add` does; gives their public keys."""
    for party in HONEST:
        federation.home(party).mkdir()
        federation.enrolled.add(party)
    files = PartyFiles(
        federation.settings, aggregator_key=office.public_key, file_of=lambda party: federation.home(party) / f"{party}.toml"
    )
    await add_parties(office, [party_facts(party) for party in HONEST], files)
    found = {party: files.finished(party) for party in HONEST}
    return {party: credentials.key.public for party, credentials in found.items() if credentials is not None}
