"""`broker-fl status`."""

import asyncio
import json
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options

if TYPE_CHECKING:
    from aggregator.records import Total
    from broker_fl.config import Settings
    from broker_fl.enrolment import Office


@dataclass(slots=True)
class PartyStatus:
    online: bool = False
    display_name: str = ""
    """This and the next three are from the register."""
    group: str | None = None
    tier: str = ""
    suspended: bool = False
    merged: int = 0
    buffered: int = 0
    refused: int = 0
    bytes_up: int = 0
    codec: str = ""
    """Of its last update."""
    mean_update_bytes: float = 0.0
    """Of those that were not refused."""
    mean_staleness: float = 0.0
    max_staleness: int = 0


@dataclass(slots=True)
class QueueStatus:
    name: str
    kind: str
    ready: int
    unacknowledged: int
    consumers: int


@dataclass(slots=True)
class Status:
    federation: str
    broker: str = ""
    version: int | None = None
    is_over: bool = False
    frames: int = 0
    """Delta frames, and the announcement of the first model."""
    frame_bytes: int = 0
    frame_codec: str = ""
    """Of the newest; that of keyframes likewise."""
    keyframes: int = 0
    keyframe_bytes: int = 0
    keyframe_codec: str = ""
    aggregator_online: bool = False
    standbys: int = 0
    """Aggregators that are connected, beside the one that leads."""
    leader: str = ""
    """Which process took the ledger last, and did not let go of it: its host and its pid."""
    parties: dict[str, PartyStatus] = field(default_factory=dict)
    queues: list[QueueStatus] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What could not be asked, and why."""


def command(
    config: options.Config = None,
    broker: options.Broker = None,
    state: options.State = None,
    ledger: options.Ledger = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    sets: options.Sets = None,
) -> None:
    """Show versions, parties, queues, staleness and bytes, from the ledger and the broker's management API."""
    from broker_fl.errors import StorageUnavailableError

    settings = options.load(
        config, options.flags_of({"broker.url": broker, "aggregator.state": state, "aggregator.ledger": ledger}, sets)
    )
    status = Status(settings.federation.name)
    try:
        _ask_ledger(settings, status)
    except StorageUnavailableError as exc:
        status.missing.append(f"versions, bytes and staleness: {exc}")
    asyncio.run(_ask_broker(settings, status))
    if as_json:
        typer.echo(json.dumps(asdict(status)))
    else:
        _show(status)


def _ask_ledger(settings: "Settings", status: Status) -> None:
    from aggregator.opening import open_ledger_for_reading
    from broker_fl.cli.stores import ledger_url
    from broker_fl.database import display_name, is_there

    url = ledger_url(settings)
    if not is_there(url):
        status.missing.append(
            f"versions, bytes and staleness: no ledger at {display_name(url)} (it is on the aggregator's machine; see --state)"
        )
        return
    with open_ledger_for_reading(url) as ledger:
        last, lead = ledger.last_frame(), ledger.lead()
        status.leader = "" if lead is None or lead.let_go else lead.holder
        status.version = ledger.latest_version()
        status.is_over = last is not None and last.over
        frames = ledger.frame_totals()
        status.frames, status.frame_bytes, status.frame_codec = frames.frames, frames.size, frames.codec
        status.keyframes, status.keyframe_bytes, status.keyframe_codec = (
            frames.keyframes,
            frames.keyframe_size,
            frames.keyframe_codec,
        )
        codecs = ledger.last_codecs()
        for name, totals in groupby(ledger.totals(), key=attrgetter("party")):
            status.parties[name] = _party_status(list(totals), codec=codecs.get(name, ""))


def _party_status(totals: "list[Total]", *, codec: str) -> PartyStatus:
    accepted = [total for total in totals if total.outcome != "refused"]
    updates = sum(total.updates for total in accepted)
    counts = {total.outcome: total.updates for total in totals}
    return PartyStatus(
        merged=counts.get("merged", 0),
        buffered=counts.get("buffered", 0),
        refused=counts.get("refused", 0),
        bytes_up=sum(total.size for total in totals),
        codec=codec,
        mean_update_bytes=sum(total.size for total in accepted) / updates if updates else 0.0,
        mean_staleness=sum(total.mean_staleness * total.updates for total in accepted) / updates if updates else 0.0,
        max_staleness=max((total.max_staleness for total in accepted), default=0),
    )


async def _ask_broker(settings: "Settings", status: Status) -> None:
    from broker_fl.enrolment import open_office
    from broker_fl.errors import BrokerError

    federation = settings.federation.name
    try:
        async with open_office(settings, signs=False) as office:
            management = office.management
            status.broker = f"RabbitMQ {(await management.overview()).rabbitmq_version} at {settings.broker.address()}"
            await _ask_register(office, status)
            aggregators = 0
            for connection in await management.connections():
                kind, _, name = connection.name.partition(":")
                if kind == "worker" and name in status.parties:
                    status.parties[name].online = True
                aggregators += connection.name == f"aggregator:{federation}"
            status.aggregator_online, status.standbys = aggregators > 0, max(0, aggregators - 1)
            for queue in await management.queues(f"fl.{federation}."):
                status.queues.append(QueueStatus(queue.name, queue.type, queue.ready, queue.unacknowledged, queue.consumers or 0))
    except BrokerError as exc:
        status.missing.append(f"queues and who is online: {exc}")


async def _ask_register(office: "Office", status: Status) -> None:
    from broker_fl.enrolment import list_members

    members, planted = await list_members(office)
    for one in members:
        party = status.parties.setdefault(one.name, PartyStatus())
        if one.membership is not None:
            member = one.membership
            party.display_name, party.group, party.tier = member.display_name, member.group, member.tier
            party.suspended = member.suspended
    if planted:
        status.missing.append(f"entries in the register that the federation's key did not sign: {', '.join(planted)}")


def _show(status: Status) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    version = "unknown" if status.version is None else str(status.version)
    standbys = f", {status.standbys} standing by" if status.standbys else ""
    leads = f" ({status.leader.removeprefix('aggregator ')})" if status.leader else ""
    aggregator = f"online{leads}{standbys}" if status.aggregator_online else "offline"
    over = ", over" if status.is_over else ""
    console.print(f"[bold]{status.federation}[/bold] on {status.broker or 'an unreachable broker'}")
    console.print(f"version {version}{over}; aggregator {aggregator}")
    for what, count, size, codec in (
        ("frames", status.frames, status.frame_bytes, status.frame_codec),
        ("keyframes", status.keyframes, status.keyframe_bytes, status.keyframe_codec),
    ):
        console.print(f"{count} {what}, {size:,} bytes{', ' + codec if codec else ''}", highlight=False)
    parties = Table(title="Parties")
    for column in ("party", "group, tier", "state", "codec"):
        parties.add_column(column, overflow="fold")
    for column in ("merged / buffered / refused", "bytes up", "bytes an update", "staleness, mean / max"):
        parties.add_column(column, justify="right")
    for name, party in sorted(status.parties.items()):
        parties.add_row(
            # Not by markup: it is what somebody wrote.
            Text(f"{name}\n{party.display_name}".rstrip()),
            ", ".join(filter(None, (party.group, party.tier))),
            "suspended" if party.suspended else "online" if party.online else "offline",
            party.codec,
            f"{party.merged} / {party.buffered} / {party.refused}",
            f"{party.bytes_up:,}",
            f"{party.mean_update_bytes:,.0f}",
            f"{party.mean_staleness:.1f} / {party.max_staleness}",
        )
    console.print(parties)
    queues = Table("queue", "type", title="Queues")
    for column in ("ready", "unacknowledged", "consumers"):
        queues.add_column(column, justify="right")
    for queue in status.queues:
        queues.add_row(queue.name, queue.kind, str(queue.ready), str(queue.unacknowledged), str(queue.consumers))
    console.print(queues)
    for line in status.missing:
        console.print(f"missing: {line}", style="yellow", markup=False)
