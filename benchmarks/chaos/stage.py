"""A federation to be hurt: a broker, two aggregators with one ledger, four parties, and for each a link, a disk and a clock."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from pydantic import SecretStr

from aggregator.opening import open_ledger_for_reading
from aggregator.snapshots import Snapshots
from benchmarks.chaos.disk import Disk, disk
from benchmarks.chaos.member import Member
from benchmarks.chaos.nursery import ClockFile, Nursery
from benchmarks.chaos.proxy import proxy
from broker_fl.config import BrokerSettings, load_settings
from broker_fl.database import sqlite_url
from broker_fl.enrolment import add_party
from broker_fl.errors import ConfigurationError, StorageError
from broker_fl.keys import load_key
from broker_fl.management import Management
from broker_fl.topology import Names
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import HOST, LocalRabbitMQ, local_rabbitmq
from broker_fl.transports.transport import Connect
from schemas.manifest import Manifest

FEDERATION = "chaos"
NAMES = Names(FEDERATION)
PARTIES = ("ann", "bob", "cem", "dee")
IN_PARTS = "ann"
"""Sends whole updates, which travel in parts; the others keep within a budget."""
AGGREGATORS = ("aggregator-1", "aggregator-2")
TASK = Path(__file__).parent / "drift.py"

_BUDGET = "8kB"
_PART_BYTES = 16_384
_LEAST_MESSAGE_BYTES = 65_536

SETTINGS: dict[str, dict[str, object]] = {
    "federation": {"name": FEDERATION},
    "task": {"name": f"{TASK}:TASK"},
    # Dead links are found within seconds, so that a campaign of minutes sees hundreds of them.
    "broker": {
        "heartbeat_s": 1,
        "publish_timeout_s": 3.0,
        "max_message_bytes": _LEAST_MESSAGE_BYTES,
        "part_bytes": _PART_BYTES,
    },
    "training": {"steps": 1, "batch_size": 4, "learning_rate": 0.05, "momentum": 0.0},
    "merging": {"max_staleness": 24},
    "codec": {"up": "topk:0.6+float32", "down": "topk:0.05+int8", "keyframe": "float32", "keyframe_every_frames": 50},
    "aggregator": {
        "broadcast_every_merges": 3,
        "broadcast_every_s": 0.2,
        "snapshot_every_versions": 100,
        "parts_expire_s": 20.0,
    },
    "worker": {"resend_after_s": 3.0, "threads": 1},
    "evaluation": {"enabled": False},
}

_OVER_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Stage:
    node: LocalRabbitMQ
    management: Management
    members: dict[str, Member]
    logins: dict[str, Connect]
    """Of the parties, past their links: for what somebody sends again in their name."""
    state: Path
    """Of the two aggregators."""

    @property
    def aggregators(self) -> list[Member]:
        return [self.members[name] for name in AGGREGATORS]

    @property
    def workers(self) -> list[Member]:
        return [self.members[name] for name in PARTIES]

    @property
    def leader(self) -> Member:
        """By the ledger, which may be behind for a moment; the first one where nobody leads."""
        with open_ledger_for_reading(self.ledger_url) as ledger:
            lead = ledger.lead()
        return next((one for one in self.aggregators if lead and lead.holder.endswith(f"pid {one.pid}")), self.aggregators[0])

    @property
    def standby(self) -> Member:
        first, second = self.aggregators
        return second if self.leader is first else first

    @property
    def ledger_url(self) -> str:
        return sqlite_url(self.state / "ledger.db")

    def snapshots(self, manifest: Manifest) -> Snapshots:
        return Snapshots(str(self.state / "snapshots"), manifest)

    def outbox_folder(self, party: str) -> Path:
        return self.members[party].disk.folder / "broker-fl-state"

    def last_seq(self) -> int:
        """Of the ledger; 0 while it is being made."""
        try:
            with open_ledger_for_reading(self.ledger_url) as ledger:
                return ledger.last_seq()
        except (ConfigurationError, StorageError):
            return 0

    def entries(self, party: str | None = None) -> int:
        """How many updates the ledger has decided on; 0 while it is being made."""
        try:
            with open_ledger_for_reading(self.ledger_url) as ledger:
                totals = ledger.totals()
        except (ConfigurationError, StorageError):
            return 0
        return sum(total.updates for total in totals if party in (None, total.party))


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    """Nothing runs yet but the broker. At its end no process is left, and no file outside of the folder."""
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(local_rabbitmq(stop_timeout_s=0))
        management = await stack.enter_async_context(Management(node.management_url))
        nursery = await stack.enter_async_context(Nursery())
        logs = folder / "logs"
        logs.mkdir()
        state = stack.enter_context(disk(folder / "server"))
        members: dict[str, Member] = {}
        logins: dict[str, Connect] = {}

        async def add(name: str, argv: list[str], own: Disk, *, user: str, password: str, more: Mapping[str, str]) -> None:
            link = await stack.enter_async_context(proxy(HOST, node.amqp_port))
            variables = {**_variables(), "BROKER_FL_BROKER__URL": _url(user, password, link.port), **more}
            members[name] = Member(
                name,
                nursery=nursery,
                argv=[*argv, "--log-format", "json"],
                variables=variables,
                disk=own,
                link=link,
                clock=ClockFile(folder / f"{name}.clock"),
                logs=logs,
            )

        admin = urlsplit(node.url)
        console = {"BROKER_FL_BROKER__MANAGEMENT_URL": node.management_url}
        for name in AGGREGATORS:
            await add(name, ["aggregator"], state, user=admin.username or "", password=admin.password or "", more=console)
        # With the aggregators' key, in their folder.
        stores = {"state": str(state.folder / "broker-fl-state")}
        settings = load_settings(flags={"federation": {"name": FEDERATION}, "aggregator": stores}, environment={})
        for party in PARTIES:
            credentials = await add_party(management, settings, party)
            password = credentials.password.get_secret_value()
            own = stack.enter_context(disk(folder / party))
            keys = {
                "BROKER_FL_SECURITY__AGGREGATOR_KEY": load_key(settings.key_file).public,
                "BROKER_FL_SECURITY__PARTY_KEY": credentials.key.text(),
            }
            await add(party, ["worker", "--party", party], own, user=party, password=password, more=_of_party(party) | keys)
            broker = BrokerSettings(url=SecretStr(_url(party, password, node.amqp_port)))
            logins[party] = amqp_connect(broker)
        yield Stage(node, management, members, logins, state.folder / "broker-fl-state")


def _variables() -> dict[str, str]:
    values = {f"BROKER_FL_{section}__{key}".upper(): value for section, keys in SETTINGS.items() for key, value in keys.items()}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _of_party(party: str) -> dict[str, str]:
    if party == IN_PARTS:
        return {}
    return {"BROKER_FL_WORKER__BUDGET": _BUDGET, "BROKER_FL_BROKER__MAX_MESSAGE_BYTES": str(_OVER_MESSAGE_BYTES)}


def _url(user: str, password: str, port: int) -> str:
    return f"amqp://{quote(user, safe='')}:{quote(password, safe='')}@{HOST}:{port}/"


async def until_progress(stage: Stage, *, since: int, party: str | None, within_s: float) -> float | None:
    """Seconds until the ledger has more updates (of the party); None if it has not."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while await asyncio.to_thread(stage.entries, party) <= since:
        if loop.time() - began > within_s:
            return None
        await asyncio.sleep(0.05)
    return loop.time() - began
