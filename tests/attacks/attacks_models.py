"""To speak for the aggregator: as a party, and as whoever runs the broker."""

import asyncio

from attack import Group
from battlefield import HONEST, Battlefield
from pamqp.commands import Basic, Exchange
from raw_amqp import ClosedError, RawConnection

from broker_fl.signing import SIGNATURE, SigningKey, body_statement
from schemas import wire
from schemas.frame import ModelFrame
from schemas.membership import Membership
from schemas.receipt import Receipt

MODEL = Group("False models")
attack = MODEL.attack

OWN_EXCHANGE = "permission: write `^fl\\.F\\.up\\.P$`"
NO_BINDING = "permission: read of no exchange, write of no queue"


def _publishing(exchange: str) -> None:
    @attack(f"publishes to the {exchange} exchange", expected="403 ACCESS_REFUSED", rule=OWN_EXCHANGE)
    async def publish(field: Battlefield) -> str:
        mallory = await field.mallory(0)
        letter = mallory.letter(await mallory.update())
        try:
            async with mallory.publisher() as raw:
                return await raw.publish(f"fl.{field.names.federation}.{exchange}", letter.body, letter.properties)
        except ClosedError as exc:
            return str(exc)


for _exchange in ("model", "keyframes", "receipts", "events", "quarantine", "leader"):
    _publishing(_exchange)


@attack("binds its own exchange to the model's, either way", expected="403 ACCESS_REFUSED", rule=NO_BINDING)
async def bind_exchanges(field: Battlefield) -> str:
    mallory = await field.mallory(0)
    own, model = mallory.exchange, field.names.model
    answers = []
    for destination, source in ((model, own), (own, model), (own, field.names.up("alice"))):
        try:
            async with mallory.raw() as raw:
                await raw.ask(Exchange.Bind(destination=destination, source=source), Exchange.BindOk)
            answers.append("bound")
        except ClosedError as exc:
            answers.append(str(exc))
    return ", ".join(sorted(set(answers)))


BROKER = Group("False models, by whoever runs the broker")
by_broker = BROKER.attack

KEY = "`[security] aggregator_key` in the party's file"
LEFT_OUT = "left out by both"


def _heard(field: Battlefield, text: str) -> dict[str, int]:
    return {name: len(field.workers[name].lines(text)) for name in HONEST}


async def _told(field: Battlefield, text: str, before: dict[str, int]) -> str:
    for _ in range(500):
        now = _heard(field, text)
        if all(now[name] > before[name] for name in HONEST):
            return LEFT_OUT
        await asyncio.sleep(0.02)
    return f"said by {[name for name in HONEST if now[name] > before[name]]}"


async def _false_frame(field: Battlefield) -> bytes:
    """The newest that there is, but for a number that is far ahead and a model that is nobody's."""
    mallory = await field.mallory(0)
    frame = wire.decode(ModelFrame, (await mallory.newest_frame()).body)
    return wire.encode(frame.model_copy(update={"number": frame.number + 1000, "version": frame.version + 1000, "over": True}))


async def _broadcast(raw: RawConnection, field: Battlefield, body: bytes, signature: object) -> None:
    frame = wire.decode(ModelFrame, body)
    headers = {"x-fl-kind": "delta", "x-fl-ledger": frame.ledger, "x-fl-number": frame.number, "x-fl-version": frame.version}
    headers |= {"x-fl-digest": frame.digest} | ({} if signature is None else {SIGNATURE: signature})
    properties = Basic.Properties(headers=headers, delivery_mode=2, message_id=f"{frame.digest[:16]}-{frame.number}")
    assert await raw.publish(field.names.model, body, properties) == "confirmed"


@by_broker("publishes a frame without a signature: the federation is over", expected=LEFT_OUT, rule=KEY)
async def unsigned_frame(field: Battlefield) -> str:
    body, before = await _false_frame(field), _heard(field, "broadcast left out")
    async with field.admin() as raw:
        await _broadcast(raw, field, body, None)
    return await _told(field, "broadcast left out", before)


@by_broker("signs it with a party's key", expected=LEFT_OUT, rule=KEY)
async def frame_signed_by_a_party(field: Battlefield) -> str:
    body, before = await _false_frame(field), _heard(field, "broadcast left out")
    mallory = await field.mallory(0)
    async with field.admin() as raw:
        await _broadcast(raw, field, body, mallory.key.sign("frame", body_statement(body)))
    return await _told(field, "broadcast left out", before)


@by_broker("takes a receipt's signature for a frame", expected=LEFT_OUT, rule="each kind of statement is signed as such")
async def frame_with_a_receipts_signature(field: Battlefield) -> str:
    """The federation's key signs what a party can choose a part of: here the same bytes, as another kind."""
    body, before = await _false_frame(field), _heard(field, "broadcast left out")
    key = SigningKey.from_text((field.federation.server / "federation.key").read_text().strip())
    async with field.admin() as raw:
        await _broadcast(raw, field, body, key.sign("receipt", body_statement(body)))
    return await _told(field, "broadcast left out", before)


@by_broker("publishes a real frame again, an older one", expected="nobody goes back", rule="a frame's number goes up")
async def replayed_frame(field: Battlefield) -> str:
    mallory = await field.mallory(0)
    old = await mallory.newest_frame()
    await field.go_on(more=2)
    async with field.admin() as raw:
        await _broadcast(raw, field, old.body, old.headers[SIGNATURE])
    await field.go_on(more=2)
    for name in HONEST:
        numbers = [int(line.partition("number=")[2].split()[0]) for line in field.workers[name].lines("model received")]
        if numbers != sorted(numbers):
            return f"{name} went back"
    return "nobody goes back"


@by_broker("forges receipts in the inboxes", expected=LEFT_OUT, rule=KEY)
async def forged_receipts(field: Battlefield) -> str:
    """Refused, for what is on its way: to make its party lose or send it twice."""
    mallory, before = await field.mallory(0), _heard(field, "receipt left out")
    async with field.admin() as raw:
        for party in HONEST:
            open_ids = list(field.federation.outbox(party).unsettled.values()) or [mallory.letter_of(b"").properties.message_id]
            receipt = Receipt(
                federation=field.names.federation,
                party=party,
                update_id=open_ids[0],
                outcome="refused",
                version=1,
                staleness=0,
                weight=0.0,
                reason="outlier",
            )
            body = wire.encode(receipt)
            headers = {SIGNATURE: mallory.key.sign("receipt", body_statement(body))}
            properties = Basic.Properties(headers=headers, message_id=open_ids[0], delivery_mode=2)
            await raw.publish(field.names.receipts, body, properties, routing_key=party)
    return await _told(field, "receipt left out", before)


@by_broker("puts a party's real receipt into the others' inboxes", expected=LEFT_OUT, rule="a receipt names its party")
async def anothers_receipt(field: Battlefield) -> str:
    mallory, before = await field.mallory(0), _heard(field, "receipt left out")
    letter = mallory.letter(await mallory.update())
    await mallory.sends(letter)
    body, signature = mallory.receipt_messages[letter.properties.message_id]
    async with field.admin() as raw:
        for party in HONEST:
            properties = Basic.Properties(
                headers={SIGNATURE: signature}, message_id=letter.properties.message_id, delivery_mode=2
            )
            await raw.publish(field.names.receipts, body, properties, routing_key=party)
    return await _told(field, "receipt left out", before)


@by_broker(
    "puts another key for a party into the register",
    expected="refused: signature; her own: merged",
    rule="memberships are signed by the federation's key",
)
async def planted_key(field: Battlefield) -> str:
    dora = await field.enrol("dora")
    planted = SigningKey.generate()
    name = field.office.shelf.name_of("dora")
    membership = Membership(federation=field.names.federation, party="dora", revision=2**50, at=0.0, public_key=planted.public)
    forged = {"membership": membership.model_dump(mode="json"), "signature": planted.sign("membership", b"")}
    kept = await field.management.global_parameter(name)
    async with dora.listening():
        own = await dora.sends(dora.letter(await dora.update()))
        await field.management.put_global_parameter(name, forged)
        false = await dora.sends(dora.letter(await dora.update(), key=planted))
        again = await dora.sends(dora.letter(await dora.update()))
        await field.management.put_global_parameter(name, kept)
    return f"{false}; her own: {own}" if own == again else f"{false}; her own: {own}, then {again}"


@by_broker(
    "publishes through a party's exchange, in its name",
    expected="refused: signature",
    rule="`[security] signatures`",
)
async def in_a_partys_name(field: Battlefield) -> str:
    """The broker's user may be made to look like any; nobody can sign."""
    erin, mallory = await field.enrol("erin"), await field.mallory(0)
    letter = erin.letter(await erin.update(), key=mallory.key)
    async with erin.listening(), erin.publisher() as raw:
        await raw.publish(letter.exchange, letter.body, letter.properties)
        receipt = await erin.receipt(letter.properties.message_id)
    return f"{receipt.outcome}: {receipt.reason}"
