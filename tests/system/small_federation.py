"""A federation as a user sets it up: a folder for the server, one for each party, and the broker between them."""

import asyncio
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from command_line import Running, until

from aggregator.ledger import Ledger
from aggregator.opening import open_ledger_for_reading
from aggregator.records import Entry
from aggregator.recovery import manifest_of_ledger
from aggregator.snapshots import Snapshots
from aggregator.verification import verify
from broker_fl.config import Settings, load_settings
from broker_fl.database import sqlite_url
from broker_fl.errors import ConfigurationError, StorageError
from broker_fl.management import Management
from broker_fl.parameters import Vector, digest
from broker_fl.topology import Names
from broker_fl.transports.following import ReceivedModel
from broker_fl.transports.transport import Delivery, Transport
from workers.held import HeldModel
from workers.outbox import open_outbox

TASKS = Path(__file__).parent / "blobs.py"

Section = Mapping[str, object]


class SmallFederation:
    """Writes nothing and starts nothing by itself. `end` ends what was started."""

    def __init__(self, folder: Path, *, url: str, management_url: str, management: Management, task: str = "TASK") -> None:
        self.folder = folder
        self.url = url
        self.management = management
        self.server = folder / "server"
        self.logs = folder / "logs"
        self.task = f"{TASKS}:{task}"
        self.names = Names("blobs")
        self.started: list[Running] = []
        self.enrolled: set[str] = set()
        self._settings: dict[str, dict[str, object]] = {
            "federation": {"name": "blobs"},
            "broker": {"url": url, "management_url": management_url},
            "training": {"steps": 2},
            "merging": {"max_staleness": 1000},
            "codec": {"up": "topk:0.2+int8"},
            # Every version at once, so that the parties never wait for each other.
            "aggregator": {"broadcast_every_merges": 1, "broadcast_every_s": 0.2},
            "evaluation": {"enabled": False},
        }
        for made in (self.server, self.logs):
            made.mkdir()
        self.configure()

    def configure(self, **sections: Section) -> None:
        """Writes the server's federation.toml, with these settings over the usual ones."""
        for section, keys in sections.items():
            self._settings.setdefault(section, {}).update(keys)
        lines = []
        for section, keys in self._settings.items():
            # Strings and numbers are written in TOML as they are in JSON.
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items()), ""]
        (self.server / "federation.toml").write_text("\n".join(lines))

    @property
    def settings(self) -> Settings:
        return load_settings(self.server / "federation.toml", environment={})

    def home(self, party: str) -> Path:
        """Where a party's worker runs: it has its enrolment and nothing of the server's."""
        return self.folder / party

    def outbox_file(self, party: str) -> Path:
        return self.home(party) / "broker-fl-state" / f"outbox-{party}.db"

    @property
    def ledger_file(self) -> Path:
        return self.server / "broker-fl-state" / "ledger.db"

    def run(self, *arguments: str, name: str = "", folder: Path | None = None, **more: object) -> Running:
        running = Running(*arguments, name=name or arguments[0], logs=self.logs, folder=folder or self.server, **more)
        self.started.append(running)
        return running

    async def succeeds(self, *arguments: str, folder: Path | None = None) -> str:
        """What the command says on standard output."""
        running = self.run(*arguments, name="-".join(arguments[:2]), folder=folder)
        await running.ends_well()
        return running.out

    async def enrol(self, *parties: str) -> None:
        for party in parties:
            self.home(party).mkdir()
            self.enrolled.add(party)
        added = [self.succeeds("party", "add", party, "--out", str(self.home(party) / f"{party}.toml")) for party in parties]
        # RabbitMQ 3.10 answers 500 to the second of two that declare the same stream at the same time.
        await added[0]
        await asyncio.gather(*added[1:])

    def aggregator(self, *arguments: str, **more: object) -> Running:
        return self.run("aggregator", "--task", self.task, *arguments, **more)

    def worker(self, party: str, *arguments: str, **more: object) -> Running:
        return self.run(
            *("worker", "--enrolment", f"{party}.toml", "--task", self.task, *arguments),
            name=f"worker-{party}",
            folder=self.home(party),
            **more,
        )

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        with open_ledger_for_reading(sqlite_url(self.ledger_file)) as ledger:
            yield ledger

    @property
    def version(self) -> int:
        try:
            with self.ledger() as ledger:
                return ledger.latest_version()
        except (ConfigurationError, StorageError):
            return 0  # The ledger is being made.

    @property
    def is_over(self) -> bool:
        with self.ledger() as ledger:
            frame = ledger.last_frame()
        return frame is not None and frame.over

    async def reaches(self, version: int, *by: Running) -> None:
        """Waits for a version; fails as soon as one of those that should make it has ended."""
        await until(lambda: self.version >= version or not all(running.is_alive for running in by), f"version {version} is made")
        assert self.version >= version, f"someone ended at version {self.version}, before {version}"

    def updates(self, party: str | None = None) -> list[Entry]:
        """The ledger's entries about updates, in order."""
        with self.ledger() as ledger:
            entries = [entry for entry in ledger.entries_after(0) if entry.kind == "update"]
        return [entry for entry in entries if party in (None, entry.party)]

    def outbox(self, party: str) -> "OutboxState":
        return OutboxState(self.outbox_file(party))

    def expect_exactly_once(self, *parties: str, strangers: Collection[str] = ()) -> None:
        """The ledger is true; every update that a party made is in it once, or still in the party's outbox, and both sides
        counted the same.
        """
        updates = self.updates()
        with self.ledger() as ledger:
            verified = verify(ledger, Snapshots(str(self.ledger_file.parent / "snapshots"), manifest_of_ledger(ledger)))
        assert verified.version == self.version
        ids = [(entry.party, entry.update_id) for entry in updates]
        assert len(ids) == len(set(ids)), "an update id is in the ledger twice"
        assert {entry.party for entry in updates} <= {*parties, *strangers}
        for party in parties:
            box = self.outbox(party)
            entries = [entry for entry in updates if entry.party == party]
            sequences = [entry.sequence for entry in entries]
            assert len(sequences) == len(set(sequences)), f"{party}: a sequence number is in the ledger twice: {sequences}"
            made = set(range(1, box.last_sequence + 1))
            assert made == {*sequences, *box.unsettled}, f"{party}: {box.last_sequence} made, {sequences}, {box.unsettled}"
            assert box.counters.get("trainings", 0) == box.last_sequence
            open_ids = set(box.unsettled.values())
            for outcome in ("merged", "buffered", "refused"):
                settled = [entry for entry in entries if entry.outcome == outcome and entry.update_id not in open_ids]
                assert box.counters.get(f"updates_{outcome}", 0) == len(settled), f"{party}: {outcome}, {box.counters}"

    def held(self, party: str) -> ReceivedModel:
        """What a party's disk holds; its worker must have ended."""
        with self.ledger() as ledger:
            manifest = manifest_of_ledger(ledger)
        with open_outbox(self.outbox_file(party).parent, party=party, federation=self.names.federation) as outbox:
            held = HeldModel(outbox, federation=self.names.federation, manifest=manifest).load()
        assert held is not None, f"{party} holds no model"
        return held

    def expect_held(self, party: str) -> ReceivedModel:
        """What a party's disk holds is, to the last bit, what the aggregator has under the number of that frame."""
        held = self.held(party)
        with self.ledger() as ledger:
            digests = {frame.number: frame.digest for frame in ledger.frames_from(0)}
        assert digest(held.model) == digests[held.number], f"{party} holds another model than frame {held.number}"
        return held

    def report(self) -> str:
        return "\n".join(running.report() for running in self.started)

    async def end(self) -> None:
        for running in self.started:
            running.kill()
        for party in self.enrolled:
            if await self.management.user_exists(party):
                await self.management.delete_user(party)
        # The register is the whole broker's, and outlives the vhost.
        prefix = f"{self.management.vhost}:fl.{self.names.federation}."
        for name in await self.management.global_parameters(prefix):
            await self.management.delete_global_parameter(prefix + name)


class OutboxState:
    """What an outbox holds at this moment; its worker may run."""

    def __init__(self, file: Path) -> None:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection, connection:
            connection.execute("BEGIN")
            facts = dict(connection.execute("SELECT key, value FROM facts"))
            self.counters: dict[str, int] = dict(connection.execute("SELECT name, value FROM counters"))
            self.unsettled: dict[int, str] = dict(connection.execute("SELECT sequence, update_id FROM updates"))
            self.bodies: dict[int, bytes] = dict(connection.execute("SELECT sequence, body FROM updates"))
            vectors = connection.execute("SELECT vector FROM residual").fetchall()
        self.last_sequence = int(facts.get("sequence", 0))
        self.residual: Vector | None = np.frombuffer(vectors[0][0], dtype="<f4") if vectors else None


async def quarantined(transport: Transport, names: Names) -> Delivery:
    """The first message of the quarantine, which stays there."""
    async with transport.consume(names.quarantine, prefetch=1, name="test") as subscription, asyncio.timeout(30):
        return await subscription.receive()
