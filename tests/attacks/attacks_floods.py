"""More of everything than anybody needs. A flood ends when its party is suspended, or with its messages."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count, islice, repeat
from secrets import token_bytes

from attack import Group
from battlefield import INBOX_MESSAGES, TABLE, Battlefield
from command_line import until
from pamqp.commands import Basic, Channel
from party import Letter, Party
from raw_amqp import ClosedError, RawConnection

from broker_fl.signing import SIGNATURE
from schemas import wire
from schemas.event import Event

FLOODS = Group("Floods")
attack = FLOODS.attack

CHUNK = 64 << 10
"""Bytes that are written at a time."""
LASTS_S = 20.0
MESSAGES = 200_000 if TABLE else 5_000
"""A flood that nobody stops ends by itself: what it leaves behind must not keep a slow machine busy for minutes."""
SUSPENDS = "`[trust] suspend_below`"
RATE = "`[trust] max_updates_per_minute`"


@asynccontextmanager
async def _connections(party: Party, number: int) -> AsyncIterator[list[RawConnection]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(party.raw()) for _ in range(number)]


async def _pour(raw: RawConnection, frames: Iterator[bytes], ends_at: float) -> int:
    """As fast as the broker takes them, until it hangs up; gives how many went out."""
    sent, waiting = 0, bytearray()
    try:
        for each in frames:
            waiting += each
            sent += 1
            if len(waiting) >= CHUNK:
                await raw.write(bytes(waiting))
                waiting.clear()
                await asyncio.sleep(0)
                if time.monotonic() > ends_at:
                    return sent
        await raw.write(bytes(waiting))
        while time.monotonic() < ends_at:
            await raw.receive(within_s=ends_at - time.monotonic())
    except (ClosedError, TimeoutError):
        pass
    return sent


async def _flood(field: Battlefield, frames: Iterable[bytes] | None = None, *, party: Party, connections: int = 2) -> str:
    """What became of the party; with how much of it is in the ledger and in quarantine."""
    since, began = len(field.tapped), time.monotonic()
    source = islice(frames, MESSAGES)
    async with _connections(party, connections) as opened:
        sent = sum(await asyncio.gather(*(_pour(raw, source, began + LASTS_S) for raw in opened)))
    return await _after(field, party, sent=sent, since=since, began=began)


async def _after(field: Battlefield, party: Party, *, sent: int, since: int, began: float) -> str:
    suspensions = field.entries(party.name, "suspension")
    if not suspensions:
        return f"not suspended after {time.monotonic() - began:.1f} s and {sent} messages"
    told = lambda one: one.routing_key == "party.suspended" and wire.decode(Event, one.body).facts["party"] == party.name  # noqa: E731
    await field.sees(told, "an event says that the party is suspended", since=since)
    await until(lambda: party.closed_at is not None, "the party's connections are closed")
    assert (await party.login_is_closed()).startswith("530"), "a suspended party logs in"
    seconds = party.closed_at - (time.time() - (time.monotonic() - began))
    entries = len(field.entries(party.name))
    kept = [one for one in field.tapped[since:] if one.exchange == field.names.quarantine]
    assert len(kept) <= 21, f"{len(kept)} messages went into quarantine"
    assert entries <= 650, f"{entries} entries are in the ledger"
    return f"suspended after {seconds:.1f} s; {entries} of its messages are in the ledger, {len(kept)} in quarantine"


@attack("opens more connections than a party may", expected="530 NOT_ALLOWED", rule="`[enrolment] max_connections`")
async def many_connections(field: Battlefield) -> str:
    mallory, opened = await field.fresh_mallory(), 1  # It listens to its inbox.
    async with AsyncExitStack() as stack:
        try:
            while opened < 50:
                await stack.enter_async_context(mallory.raw())
                opened += 1
        except ClosedError as exc:
            return f"{exc} after {opened}"
    return f"{opened} connections"


@attack("opens more channels than a party may", expected="530 NOT_ALLOWED", rule="`[enrolment] max_channels`")
async def many_channels(field: Battlefield) -> str:
    mallory, opened = await field.fresh_mallory(), 2
    try:
        async with mallory.raw() as raw:
            while opened < 200:
                raw.send(Channel.Open(), channel=opened)
                await raw.expect(Channel.OpenOk)
                opened += 1
    except ClosedError as exc:
        return f"{exc} after {opened}"
    return f"{opened} channels"


@attack("sends small nonsense as fast as it can", expected="suspended", rule=SUSPENDS, is_long=True)
async def small_nonsense(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    return await _flood(field, (mallory.letter_of(b"nonsense").frames for _ in count()), party=mallory)


@attack("the same without a user_id", expected="suspended", rule=SUSPENDS, is_long=True)
async def nonsense_of_nobody(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    return await _flood(field, repeat(mallory.letter_of(b"nonsense", user_id=None).frames), party=mallory)


@attack("the same without an update id", expected="suspended", rule=SUSPENDS, is_long=True)
async def nonsense_without_an_id(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    return await _flood(field, repeat(mallory.letter_of(b"nonsense", message_id="none").frames), party=mallory)


@attack(
    "sends new and well-formed updates as fast as it can", expected="suspended", rule=f"{RATE}, then {SUSPENDS}", is_long=True
)
async def well_formed(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    letters = [mallory.letter(await mallory.update()).frames for _ in range(1000)]
    return await _flood(field, letters, party=mallory)


@attack("sends one update again and again", expected="suspended", rule=f"{RATE}, then {SUSPENDS}", is_long=True)
async def one_update(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    return await _flood(field, repeat(mallory.letter(await mallory.update()).frames), party=mallory)


@attack(
    "begins thousands of updates in parts",
    expected="suspended",
    rule="four half-sent updates a party, then " + SUSPENDS,
    is_long=True,
)
async def half_sent(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    said = await _flood(field, (_part(mallory).frames for _ in count()), party=mallory)
    ((spooled,),) = field.ask("SELECT COUNT(DISTINCT update_id) FROM parts WHERE party = ?", mallory.name)
    return said if spooled <= 4 else f"{spooled} half-sent updates are spooled"


@attack("sends one part for ever", expected="suspended", rule=f"{RATE}, then {SUSPENDS}", is_long=True)
async def one_part(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    return await _flood(field, repeat(_part(mallory).frames), party=mallory)


def _part(party: Party) -> Letter:
    place = {"x-fl-part": 0, "x-fl-parts": 3, "x-fl-size": 3000, "x-fl-sha256": "0" * 64}
    return party.letter_of(b"x" * 1024, headers=place)


@attack("sends bodies near the broker's limit", expected="suspended", rule=SUSPENDS, is_long=True)
async def large_bodies(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    field.begin_peak()
    before, body = field.resident_bytes(), token_bytes(15 << 20)
    said = await _flood(field, (mallory.letter_of(body).frames for _ in range(100)), party=mallory)
    return f"{said}; the aggregator grew by {(field.peak_bytes() - before) >> 20} MiB"


@attack("sends a body over the broker's limit", expected="406 PRECONDITION_FAILED", rule="RabbitMQ: `max_message_size`")
async def over_the_brokers_limit(field: Battlefield) -> str:
    mallory = await field.mallory(0)
    return await mallory.posts(mallory.letter_of(bytes((16 << 20) + 1)))


@attack("sends a body over the federation's limit", expected="refused: bounds", rule="`[aggregator] max_update_bytes`")
async def over_the_federations_limit(field: Battlefield) -> str:
    mallory, since = await field.mallory(), len(field.tapped)
    outcome = await mallory.sends(mallory.letter_of(bytes(1 << 20)))
    kept = await field.sees(lambda one: one.exchange == field.names.quarantine, "it is in quarantine", since=since)
    assert kept.size < 1 << 18, "of a body that is too large, all is kept"
    return outcome


@attack(
    "never reads its inbox", expected=f"{INBOX_MESSAGES} receipts wait", rule="`[enrolment] inbox_messages` (operator policy)"
)
async def unread_inbox(field: Battlefield) -> str:
    silent = await field.enrol("silent")
    letter = silent.letter(await silent.update())
    await silent.posts(*[letter] * (INBOX_MESSAGES + 30))
    inbox = field.names.inbox("silent")
    async with field.admin() as raw:
        for _ in range(50):
            await asyncio.sleep(0.05)
            if await raw.depth(inbox) >= INBOX_MESSAGES:
                break
        await asyncio.sleep(0.3)
        waiting = await raw.depth(inbox)
    return f"{waiting} receipts wait"


@attack("takes receipts and never acknowledges them", expected="others go on", rule=f"{RATE}, RabbitMQ: `consumer_timeout`")
async def hoarded_receipts(field: Battlefield) -> str:
    hoarder = await field.enrol("hoarder")
    letter = hoarder.letter(await hoarder.update())
    async with hoarder.raw() as raw:
        await raw.ask(Basic.Consume(queue=field.names.inbox("hoarder")), Basic.ConsumeOk)
        await hoarder.posts(*[letter] * 50)
        for _ in range(50):
            await raw.next_message()
        await field.go_on()
    return "others go on, while 50 are held"


@attack(
    "sends headers of 100 kB", expected="merged; refused: malformed", rule="only known headers are kept, cut to 200 characters"
)
async def large_headers(field: Battlefield) -> str:
    mallory = await field.mallory()
    update = await mallory.update()
    large = {"x": "x" * 100_000, "x-fl-codec": "y" * 20_000}
    signed = {**large, SIGNATURE: mallory.signature(update)}
    good = await mallory.sends(mallory.letter(update, headers=signed))
    bad = await mallory.sends(mallory.letter_of(b"nonsense", headers=large))
    return f"{good}; {bad}"
