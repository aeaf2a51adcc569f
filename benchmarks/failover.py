"""How long nothing is merged when the aggregator that leads fails, and the one that stands by takes over.

Two aggregators with one ledger and two workers that never stop sending, as processes, on a private RabbitMQ node. The seconds
go from the failure to the first entry of the new leader in the ledger; where the old one still got some in, as an orderly end
does, the longest time without one counts. The ledger is looked at every 10 ms.

A leader is killed, asked to end, cut off from the broker, or frozen. Nobody can tell a frozen one from a slow one but by its
heartbeats; it is thawed when the other one leads, and must find out by itself. `held` are rounds, left out of the seconds, in
which the freeze came in the middle of a commit, and SQLite's ledger was locked by it until the thaw; on PostgreSQL whoever takes
over ends the frozen one's session. At the end the whole ledger is replayed, and each update of each worker must be in it
exactly once.

PostgreSQL: the empty database that `--postgresql` names, or else a private server, where this checkout's tests can start one.
Linux only.

    python -m benchmarks.failover [--json FILE] [--rounds 5] [--only "kill -9"] [--postgresql URL]
"""

import asyncio
import importlib.util
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import uvloop
from pydantic import SecretStr

from aggregator.opening import open_ledger_for_reading
from aggregator.recovery import manifest_of_ledger
from aggregator.snapshots import Snapshots
from aggregator.verification import verify
from benchmarks.chaos import drift
from benchmarks.chaos.disk import Disk
from benchmarks.chaos.member import Member
from benchmarks.chaos.nursery import Child, ClockFile, Nursery
from benchmarks.chaos.proxy import proxy
from benchmarks.report import parser, show
from broker_fl.cli.options import Flags, environment_of
from broker_fl.config import load_settings
from broker_fl.database import sqlite_url
from broker_fl.enrolment import Credentials, add_party
from broker_fl.keys import load_key
from broker_fl.management import Management
from broker_fl.transports.local_rabbitmq import HOST, LocalRabbitMQ, local_rabbitmq

HEARTBEAT_S, SHORT_HEARTBEAT_S = 10, 1
"""The default, and the shortest that there is."""
WORKERS = 2
SQLITE, POSTGRESQL = "SQLite", "PostgreSQL"

_POLL_S = 0.01
_START_S, _TAKE_OVER_S, _STAND_BY_S, _QUIET_S = 60.0, 60.0, 60.0, 1.0
_BETWEEN_S = 0.5
_RECOVERY_S = 5.0
"""What a standby takes at most, from when the broker gives a silent connection up, which it does within three heartbeats."""

_TASK = f"{Path(drift.__file__).resolve()}:TASK"
_BROADCAST_S = 0.05
"""Workers train once from each frame: so soon after each merge they may train again."""

_UP = "aggregator is up"
_STANDS_BY = "standing by: another aggregator leads"
_LOST = ("the ledger was taken", "broker lost", "ledger lost")

_PRIVATE_POSTGRESQL = Path(__file__).resolve().parent.parent / "tests/local_postgresql.py"


@dataclass(frozen=True, slots=True)
class Row:
    ledger: str
    failure: str
    rounds: int
    median_s: float | None
    longest_s: float | None
    held: int


@dataclass(frozen=True, slots=True)
class Failure:
    """`hit` does it; what is frozen is thawed when somebody else leads."""

    hit: Callable[[Member], None]
    heartbeat_s: int = HEARTBEAT_S
    freezes: bool = False

    @property
    def within_s(self) -> float:
        """So soon somebody has taken over, unless the ledger is held."""
        return 3 * self.heartbeat_s + _RECOVERY_S if self.freezes else _TAKE_OVER_S


FAILURES: dict[str, Failure] = {
    "kill -9": Failure(Member.kill),
    "SIGTERM": Failure(Member.terminate),
    "link cut": Failure(lambda member: member.link.cut()),
    f"frozen, heartbeat {HEARTBEAT_S} s": Failure(Member.freeze, freezes=True),
    f"frozen, heartbeat {SHORT_HEARTBEAT_S} s": Failure(Member.freeze, heartbeat_s=SHORT_HEARTBEAT_S, freezes=True),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A federation at work."""

    ledger_url: str
    state: Path
    aggregators: tuple[Member, Member]
    workers: Sequence[Child]

    def leader_and_standby(self) -> tuple[Member, Member, int]:
        """By the ledger; and the leader's epoch."""
        with open_ledger_for_reading(self.ledger_url) as ledger:
            lead = ledger.lead()
        first, second = self.aggregators
        assert lead is not None
        if lead.holder.endswith(f"pid {first.pid}"):
            return first, second, lead.epoch
        assert lead.holder.endswith(f"pid {second.pid}"), f"{lead.holder} leads, which is neither {first.pid} nor {second.pid}"
        return second, first, lead.epoch


def standstill_s(ledger_url: str, *, epoch: int, since: float, within_s: float) -> float | None:
    """The longest time without a new entry, from then to the first entry that a leader after this epoch makes; None if there is
    none in time.
    """
    with open_ledger_for_reading(ledger_url) as ledger:
        known, grew_at, longest, is_new = ledger.last_seq(), since, 0.0, False
        while (now := time.monotonic()) < since + within_s:
            lead = ledger.lead()
            newest = ledger.last_seq()
            if newest > known:
                longest = max(longest, now - grew_at)
                known, grew_at = newest, now
                if is_new:
                    return longest
            # What is in the ledger when the new lead is seen may be the old leader's; nothing after that is.
            is_new = lead is not None and lead.epoch > epoch
            time.sleep(_POLL_S)
    return None


async def says(member: Member, words: Sequence[str], *, after: int, within_s: float) -> None:
    """Waits until its log, from there on, has one of them."""
    try:
        async with asyncio.timeout(within_s):
            # What is waited for happens in another process.
            while not any(word in said(member)[after:] for word in words):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError as exc:
        raise TimeoutError(f"{member.name} does not say {' or '.join(words)!r}: {said(member)[-1000:]}") from exc


def said(member: Member) -> str:
    return member.log.read_text(errors="replace") if member.log.exists() else ""


async def one_round(stage: Stage, failure: Failure) -> float | None:
    """Seconds without a merge; None where nobody could take over from a frozen leader. Afterwards the other one leads, and
    who failed stands by.
    """
    leader, standby, epoch = await asyncio.to_thread(stage.leader_and_standby)
    after, since = len(said(leader)), time.monotonic()
    failure.hit(leader)
    seconds = await asyncio.to_thread(standstill_s, stage.ledger_url, epoch=epoch, since=since, within_s=failure.within_s)
    if failure.freezes:
        leader.thaw()
        await says(leader, _LOST, after=after, within_s=_STAND_BY_S)
    elif seconds is None:
        raise TimeoutError(f"{standby.name} has not taken over: {said(standby)[-1000:]}")
    await says(leader, (_STANDS_BY,), after=after, within_s=_STAND_BY_S)
    await asyncio.sleep(_BETWEEN_S)
    return seconds


async def set_heartbeat(stage: Stage, seconds: int) -> None:
    """Of both aggregators, which start again."""
    leader, standby, _ = await asyncio.to_thread(stage.leader_and_standby)
    for member in (standby, leader):
        after = len(said(member))
        await member.restart(BROKER_FL_BROKER__HEARTBEAT_S=str(seconds))
        await says(member, (_STANDS_BY,), after=after, within_s=_STAND_BY_S)


async def hurt(stage: Stage, ledger: str, failures: Mapping[str, Failure], *, rounds: int) -> list[Row]:
    rows = []
    heartbeat_s = _first_heartbeat_s(failures)
    for name, failure in failures.items():
        if failure.heartbeat_s != heartbeat_s:
            heartbeat_s = failure.heartbeat_s
            await set_heartbeat(stage, heartbeat_s)
        found = [await one_round(stage, failure) for _ in range(rounds)]
        seconds = [one for one in found if one is not None]
        median, longest = (statistics.median(seconds), max(seconds)) if seconds else (None, None)
        rows.append(Row(ledger, name, rounds, median, longest, held=len(found) - len(seconds)))
        print(rows[-1], flush=True)
    return rows


def _first_heartbeat_s(failures: Mapping[str, Failure]) -> int:
    return next(iter(failures.values())).heartbeat_s


@asynccontextmanager
async def staged(
    node: LocalRabbitMQ, nursery: Nursery, folder: Path, *, ledger_url: str, heartbeat_s: int = HEARTBEAT_S
) -> AsyncIterator[Stage]:
    """All are at work while inside. Where the body ends well, the workers end in order, what they sent is decided, and the
    aggregators end.
    """
    federation = f"failover-{secrets.token_hex(3)}"
    common: Flags = {"federation": {"name": federation}, "task": {"name": _TASK}}
    state = folder / "state"
    async with AsyncExitStack() as stack:
        first, second = [
            await _aggregator(
                stack, node, nursery, folder, number=number, settings=common | _stores(state, ledger_url), heartbeat_s=heartbeat_s
            )
            for number in (1, 2)
        ]
        group = await stack.enter_async_context(asyncio.TaskGroup())
        keepers: list[asyncio.Task[None]] = []
        stack.callback(lambda: [keeper.cancel() for keeper in keepers])
        for member, word in ((first, _UP), (second, _STANDS_BY)):
            keepers.append(group.create_task(member.run()))
            await says(member, (word,), after=0, within_s=_START_S)
        async with Management(node.management_url) as management:
            parties = [f"{federation}-{number}" for number in range(WORKERS)]
            # With the aggregators' key, in their folder.
            settings = load_settings(flags=common | {"aggregator": {"state": state}}, environment={})
            keys = [await add_party(management, settings, party) for party in parties]
        federation_key = load_key(settings.key_file).public
        workers = [
            await _worker(node, nursery, folder, party=party, own=own, settings=common, federation_key=federation_key)
            for party, own in zip(parties, keys, strict=True)
        ]
        stage = Stage(ledger_url, state, (first, second), workers)
        await _until_all_send(stage)
        yield stage
        await _end(stage)
        async with asyncio.timeout(_START_S):
            await asyncio.gather(*keepers)


def _stores(state: Path, ledger_url: str) -> Flags:
    broadcast = {"broadcast_every_merges": 1, "broadcast_every_s": _BROADCAST_S}
    return {"aggregator": {"state": state, "ledger": ledger_url, **broadcast}, "evaluation": {"enabled": False}}


async def _aggregator(
    stack: AsyncExitStack, node: LocalRabbitMQ, nursery: Nursery, folder: Path, *, number: int, settings: Flags, heartbeat_s: int
) -> Member:
    """With a link of its own; not yet started."""
    name = f"aggregator-{number}"
    link = await stack.enter_async_context(proxy(HOST, node.amqp_port))
    url = _url(node.user, node.password, link.port)
    broker: Flags = {"broker": {"url": url, "management_url": node.management_url, "heartbeat_s": heartbeat_s}}
    return Member(
        name,
        nursery=nursery,
        argv=["aggregator", "--log-format", "json"],
        variables=environment_of(settings | broker),
        disk=Disk(folder, can_be_full=False),
        link=link,
        clock=ClockFile(folder / f"{name}.clock"),
        logs=folder,
    )


async def _worker(
    node: LocalRabbitMQ,
    nursery: Nursery,
    folder: Path,
    *,
    party: str,
    own: Credentials,
    settings: Flags,
    federation_key: str,
) -> Child:
    flags: Flags = {
        "broker": {"url": _url(party, own.password, node.amqp_port)},
        "worker": {"party": party, "state": folder / party, "threads": 1},
        "security": {"aggregator_key": federation_key, "party_key": own.key.text()},
    }
    variables = environment_of(settings | flags)
    log = folder / f"{party}.err"
    return await nursery.start(
        ["worker", "--log-format", "json"], folder=folder, out=folder / f"{party}.out", err=log, variables=variables
    )


def _url(user: str, password: SecretStr, port: int) -> str:
    return f"amqp://{user}:{password.get_secret_value()}@{HOST}:{port}/"


async def _until_all_send(stage: Stage) -> None:
    async with asyncio.timeout(_START_S):
        # What is waited for happens in other processes.
        while len(await asyncio.to_thread(_sequences, stage.ledger_url)) < len(stage.workers):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def _end(stage: Stage) -> None:
    for worker in stage.workers:
        worker.terminate()
        assert await worker.ended() == 0, "a worker did not end in order"
    decided = -1
    while (newest := sum(map(len, (await asyncio.to_thread(_sequences, stage.ledger_url)).values()))) > decided:
        decided = newest
        await asyncio.sleep(_QUIET_S)
    leader, standby, _ = await asyncio.to_thread(stage.leader_and_standby)
    for member in (standby, leader):
        member.let_end()
        member.terminate()


def _sequences(ledger_url: str) -> dict[str, list[int]]:
    """Of the updates in the ledger, by party, in order of their decision."""
    sequences: dict[str, list[int]] = defaultdict(list)
    with open_ledger_for_reading(ledger_url) as ledger:
        for entry in ledger.entries_after(0):
            if entry.kind == "update" and entry.party is not None and entry.sequence is not None:
                sequences[entry.party].append(entry.sequence)
    return sequences


def audit(stage: Stage) -> int:
    """How many updates were decided. Fails where one was lost or doubled, and raises DamagedError where replay comes to anything
    else than what the ledger says.
    """
    with open_ledger_for_reading(stage.ledger_url) as ledger:
        verified = verify(ledger, Snapshots(str(stage.state / "snapshots"), manifest_of_ledger(ledger)))
    assert verified.replayed_from == 0
    sequences = _sequences(stage.ledger_url)
    for party, numbers in sequences.items():
        doubled = [number for number, count in Counter(numbers).items() if count > 1]
        lost = set(range(1, max(numbers))) - set(numbers)
        assert doubled == [], f"{party}: doubled {doubled}"
        assert lost == set(), f"{party}: lost {sorted(lost)}"
    return sum(map(len, sequences.values()))


def unforeseen_ends(stage: Stage) -> list[str]:
    """Of aggregators that were neither killed nor asked to end."""
    return [
        f"{member.name} ended {times} times with {code}: {said(member)[-1000:]}"
        for member in stage.aggregators
        for code, times in member.exits.items()
        if code not in (0, -signal.SIGKILL)
    ]


async def measure(
    node: LocalRabbitMQ, ledger_urls: Mapping[str, str | None], failures: Mapping[str, Failure], *, rounds: int
) -> list[Row]:
    """`ledger_urls` by the name of what the ledger is in; None is SQLite in a folder."""
    rows = []
    async with Nursery() as nursery:
        for name, url in ledger_urls.items():
            with tempfile.TemporaryDirectory(prefix="broker-fl-failover-") as folder:
                ledger_url = url or sqlite_url(Path(folder) / "ledger.db")
                heartbeat_s = _first_heartbeat_s(failures)
                async with staged(node, nursery, Path(folder), ledger_url=ledger_url, heartbeat_s=heartbeat_s) as stage:
                    rows += await hurt(stage, name, failures, rounds=rounds)
                updates = await asyncio.to_thread(audit, stage)
                print(f"{name}: {updates} updates, each in the ledger once; replay comes to the same", flush=True)
                for end in unforeseen_ends(stage):
                    print(f"UNFORESEEN: {end}", flush=True)
    return rows


@contextmanager
def postgresql(given: str | None) -> Iterator[str | None]:
    """The URL of an empty database; None, and a word why, where there is none."""
    if given is not None:
        yield given
        return
    if not _PRIVATE_POSTGRESQL.exists():
        print(
            f"{POSTGRESQL} is left out: there is no {_PRIVATE_POSTGRESQL} to start a private server by; name a --postgresql URL"
        )
        yield None
        return
    private = _module(_PRIVATE_POSTGRESQL)
    if private.find_postgresql() is None:
        print(f"{POSTGRESQL} is left out: the server is not installed; name the URL of another by --postgresql")
        yield None
        return
    with private.local_postgresql() as server, server.database() as url:
        yield url


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs, since a dataclass looks its own module up there.
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=5, help="of each failure")
    arguments.add_argument("--only", action="append", choices=FAILURES, help="only this failure; may be repeated")
    arguments.add_argument("--ledger", choices=(SQLITE, POSTGRESQL), help="only this one")
    arguments.add_argument("--postgresql", metavar="URL", help="of an empty database")
    given = arguments.parse_args()
    failures = {name: failure for name, failure in FAILURES.items() if name in (given.only or FAILURES)}

    async def run(ledger_urls: Mapping[str, str | None]) -> list[Row]:
        async with local_rabbitmq(stop_timeout_s=0) as node:
            return await measure(node, ledger_urls, failures, rounds=given.rounds)

    ledger_urls: dict[str, str | None] = {SQLITE: None} if given.ledger in (None, SQLITE) else {}
    with ExitStack() as stack:
        if given.ledger in (None, POSTGRESQL):
            url = stack.enter_context(postgresql(given.postgresql))
            ledger_urls |= {POSTGRESQL: url} if url is not None else {}
        rows = uvloop.run(run(ledger_urls))
    show("Nothing is merged after the leader fails, in seconds", rows, json_file=given.json)


if __name__ == "__main__":
    main()
