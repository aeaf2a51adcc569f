"""What is inside of an update: bombs, nonsense, poison, and what is nearly right."""

import struct

import msgpack
import numpy as np
from attack import Group
from battlefield import MAX_STALENESS, Battlefield
from command_line import until
from party import Party, told
from raw_amqp import ClosedError

from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.codecs.reader import varint
from schemas import wire
from schemas.frame import ModelFrame
from schemas.update import ModelUpdate

CONTENTS = Group("Contents")
attack = CONTENTS.attack

POISONING = Group("Poisoning")
poisoning = POISONING.attack

MIB = 1 << 20
GROWTH = 32 * MIB
"""Of the aggregator, that no bomb may exceed: messages of up to 160 kB come in groups, and the allocator keeps some room."""

WIRE = "bounded msgpack, strict schema"
PAYLOAD = "a payload is exactly one encoding of this model"
BASE = "base version and digest must be of a frame of this ledger"


async def _body(field: Battlefield, body: bytes) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter_of(body))


async def _changed(field: Battlefield, strikes: int = 1, payload: bytes | None = None, **changes: object) -> str:
    mallory = await field.mallory(strikes)
    return await mallory.sends(mallory.letter(await mallory.update(payload, **changes)))


async def _bombs(field: Battlefield, *bodies: bytes) -> str:
    """What became of all, or how far the aggregator grew."""
    field.begin_peak()
    before = field.resident_bytes()
    outcomes = {await _body(field, body) for body in bodies}
    grown = field.peak_bytes() - before
    return ", ".join(sorted(outcomes)) if grown < GROWTH else f"grew by {grown >> 20} MiB"


async def _as_fields(field: Battlefield) -> dict[str, object]:
    mallory = await field.mallory(0)
    return (await mallory.update()).model_dump()


@attack("bytes that are no msgpack, or more of it than one map", expected="refused: malformed", rule=WIRE)
async def not_msgpack(field: Battlefield) -> str:
    whole = msgpack.packb(await _as_fields(field))
    return await _bombs(field, b"\xc1" * 1000, whole[:-1], whole + b"\x00", b"")


@attack(
    "lengths of four thousand million, of lists, maps, texts, binaries and extensions", expected="refused: malformed", rule=WIRE
)
async def claimed_lengths(field: Battlefield) -> str:
    claims = [bytes([kind]) + b"\xff\xff\xff\xff" for kind in (0xDD, 0xDF, 0xDB, 0xC6, 0xC9)]
    return await _bombs(field, *(b"\x81\xa7payload" + claim + b"\x00" * 64 for claim in claims))


@attack("lists in lists, 150,000 deep, and 150,000 of them", expected="refused: malformed", rule=WIRE)
async def nesting(field: Battlefield) -> str:
    return await _bombs(field, b"\x91" * 150_000, b"\x81\xa1a" * 50_000, b"\xdd\x00\x02\x49\xf0" + b"\x90" * 150_000)


@attack("fields of wrong types and out of range", expected="refused: malformed", rule=WIRE)
async def wrong_types(field: Battlefield) -> str:
    fields = await _as_fields(field)
    wrong = ({"sequence": "1"}, {"num_samples": 2**63}, {"train_loss": float("nan")}, {"payload": [0] * 10}, {"party": ["a"]})
    return await _bombs(field, *(msgpack.packb({**fields, **one}) for one in wrong))


@attack("payloads that promise more values than there are", expected="refused: codec", rule=PAYLOAD)
async def promised_counts(field: Battlefield) -> str:
    """Of indices, of bytes of their high stream, of words of an entropy coder."""
    most = varint(2**32 - 1)
    payloads = {
        "topk:0.2+float32": most,
        "topk:0.2+int8": varint(20_000) + b"\x00" * 40 + most,
        "sign": b"\x00\x00\x80\x3f" * 25 + b"\x01\x00\x01\x10\x10" + most,
    }
    field.begin_peak()
    before = field.resident_bytes()
    outcomes = {await _changed(field, payload=payload, codec=codec) for codec, payload in payloads.items()}
    grown = field.peak_bytes() - before
    return ", ".join(sorted(outcomes)) if grown < GROWTH else f"grew by {grown >> 20} MiB"


@attack("indices beyond the model", expected="refused: codec", rule=PAYLOAD)
async def indices_beyond(field: Battlefield) -> str:
    """One index, whose gap leads far beyond the last element."""
    beyond = varint(1) + b"\x18" + varint(1) + b"\xff" * 4
    return await _changed(field, payload=beyond + bytes(4 * 100), codec="topk:0.2+float32")


@attack("a payload that is too short, and one that is too long", expected="refused: codec", rule=PAYLOAD)
async def wrong_length(field: Battlefield) -> str:
    size = 4 * (await field.mallory(0)).manifest.size
    return ", ".join({await _changed(field, payload=bytes(size + more)) for more in (-4, 4)})


@attack("a codec that there is not", expected="refused: codec", rule=PAYLOAD)
async def unknown_codec(field: Battlefield) -> str:
    return ", ".join({await _changed(field, codec=codec) for codec in ("gzip", "topk:nan+int8", "eden:99", "__import__('os')")})


@attack("the layout of another model", expected="refused: manifest", rule="the manifest's digest")
async def another_manifest(field: Battlefield) -> str:
    return await _changed(field, manifest_digest="0" * 64)


@poisoning("not a number, and infinity", expected="refused: non_finite", rule="every value must be finite")
async def not_finite(field: Battlefield) -> str:
    size = (await field.mallory(0)).manifest.size
    payloads = [np.full(size, value, "<f4").tobytes() for value in (np.nan, np.inf, -np.inf)]
    return ", ".join({await _changed(field, payload=payload) for payload in payloads})


@poisoning("values of 1e30", expected="refused: bounds", rule="no value is over 1e6; `[aggregator] max_update_norm`")
async def absurd_values(field: Battlefield) -> str:
    size = (await field.mallory(0)).manifest.size
    return await _changed(field, payload=np.full(size, 1e30, "<f4").tobytes())


@poisoning("100 times the usual norm", expected="refused: outlier", rule="`[trust] outlier_factor`")
async def hundred_times(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter(await mallory.update(mallory.payload(mallory.delta(times=100)))))


@poisoning("10 times the usual norm", expected="merged: norm", rule="`[trust] norm_factor`")
async def ten_times(field: Battlefield) -> str:
    """Scaled down; the reason is in receipt, ledger and event."""
    mallory, since = await field.mallory(0), len(field.tapped)
    update = await mallory.update(mallory.payload(mallory.delta(times=10)))
    outcome = await mallory.sends(mallory.letter(update))
    (entry,) = (entry for entry in field.entries(mallory.name) if entry[0] == update.update_id)
    _, _, reason, factor, _ = entry
    told = lambda: [  # noqa: E731
        facts.reason
        for event in field.events("updates.decided", since=since)
        for facts in event.updates
        if facts.party == mallory.name
    ]
    await field.sees(lambda _: "norm" in told(), "an event says that it was scaled down", since=since)
    return f"{outcome}, at {factor:.2f} of its weight" if reason == "norm" and factor < 0.9 else f"{outcome}, {reason}, {factor}"


@attack("trained from a version that is gone", expected="refused: too_stale", rule="`[merging] max_staleness`")
async def stale(field: Battlefield) -> str:
    (frames,) = field.ask("SELECT version, digest FROM frames ORDER BY number LIMIT 1")
    while field.version <= frames[0] + MAX_STALENESS:
        await _push(field)
    return await _changed(field, base_version=frames[0], base_digest=frames[1])


async def _push(field: Battlefield) -> None:
    """The version on, by as much as a party may send at once."""
    helper = await field.fresh_mallory()
    last = None
    async with helper.publisher() as raw:
        for _ in range(min(590, MAX_STALENESS)):
            last = helper.letter(await helper.update())
            await raw.write(last.frames)
    await helper.receipt(last.properties.message_id, within_s=60)


@attack("trained from a version that is still to come", expected="refused: base", rule=BASE)
async def future(field: Battlefield) -> str:
    return await _changed(field, base_version=field.version + 10_000)


@attack("trained from a model that was never broadcast", expected="refused: base", rule=BASE)
async def never_broadcast(field: Battlefield) -> str:
    return await _changed(field, base_digest="f" * 64)


@attack("a base of another ledger", expected="refused: base", rule=BASE)
async def another_ledger(field: Battlefield) -> str:
    return await _changed(field, ledger="0" * 32)


@poisoning(
    "the opposite of what the others do, at their pace", expected="merged: direction", rule="`[trust] direction`", is_long=True
)
async def sign_flipped(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    payload, outcome, sent = await _against(field, mallory), "", 0
    while outcome != "merged: direction" and sent < 30:
        outcome, sent = await mallory.sends(mallory.letter(await mallory.update(payload))), sent + 1
        await field.go_on()
    *_, (_, _, _, factor, _) = field.entries(mallory.name)
    return f"{outcome}, at {factor:.2f} of its weight, from the {sent}th on"


@poisoning(
    "the same, faster than all others together",
    expected="merged, at 1.00",
    rule="not defended: it is the direction then; `[trust] max_updates_per_minute` and `norm_factor` bound it",
)
async def sign_flipped_fast(field: Battlefield) -> str:
    mallory = await field.fresh_mallory()
    payload = await _against(field, mallory)
    letters = [mallory.letter(await mallory.update(payload)) for _ in range(30)]
    await mallory.posts(*letters)
    outcome = told(await mallory.receipt(letters[-1].properties.message_id))
    *_, (_, _, _, factor, _) = field.entries(mallory.name)
    return f"{outcome}, at {factor:.2f} of its weight, after {len(letters)}"


async def _against(field: Battlefield, mallory: Party) -> bytes:
    """The opposite of where the next frames show that the model goes, of the usual norm."""
    first = (await mallory.newest_frame()).number
    await field.go_on(more=6)
    total = np.zeros(mallory.manifest.size, np.float32)
    for each in await mallory.frames("10s"):
        frame = wire.decode(ModelFrame, each.body)
        if frame.number > first and frame.base is not None and frame.payload:
            decode(frame.payload, parse_codec(frame.codec), manifest=mallory.manifest).add_to(total)
    return mallory.payload(total * np.float32(-mallory.scale / np.linalg.norm(total)))


POISON = Group("Poison for the client library")
poison = POISON.attack

AS_ABSENT = "what cannot be decoded counts as absent"
NOT_READ = "nobody reads it"

_FLAGS = {"content_type": 0x8000, "headers": 0x2000, "delivery_mode": 0x1000, "priority": 0x0800, "expiration": 0x0100}
_FLAGS |= {"message_id": 0x0080, "timestamp": 0x0040, "user_id": 0x0010}


def _short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def _table(*fields: bytes) -> bytes:
    whole = b"".join(fields)
    return struct.pack(">I", len(whole)) + whole


async def _poisoned(field: Battlefield, *, routing_key: bytes = b"", strikes: int = 1, **raw: bytes) -> str:
    """An update that is right, but for these properties, or its routing key."""
    mallory = await field.mallory(strikes)
    update = await mallory.update()
    signature = _short(b"x-fl-signature") + b"S" + struct.pack(">I", 128) + mallory.signature(update).encode()
    values = {
        "headers": _table(signature),
        "delivery_mode": b"\x02",
        "message_id": _short(update.update_id.encode()),
        "user_id": _short(mallory.name.encode()),
        **raw,
    }
    if "headers" in raw:
        values["headers"] = _table(signature, raw["headers"])
    flags = sum(_FLAGS[name] for name in values)
    properties = struct.pack(">H", flags) + b"".join(values[name] for name in _FLAGS if name in values)
    return await _outcome(field, mallory, update, properties, routing_key=routing_key)


async def _outcome(field: Battlefield, party: Party, update: ModelUpdate, properties: bytes, *, routing_key: bytes) -> str:
    """By a receipt; or by what is in quarantine, where it lost its id on the way."""
    since, quarantine = len(field.tapped), field.names.quarantine
    try:
        async with party.publisher() as raw:
            await raw.publish(party.exchange, wire.encode(update), properties, routing_key=routing_key)
    except ClosedError as exc:
        return str(exc)

    def kept() -> list[str]:
        mine = [one for one in field.tapped[since:] if one.headers.get("x-fl-exchange") == party.exchange]
        return [one.reason for one in mine if one.exchange == quarantine]

    await until(lambda: kept() or update.update_id in party.receipts, "a poisoned update is decided")
    return f"refused: {kept()[0]}" if kept() else told(party.receipts[update.update_id])


@poison("a date after the year 9999", expected="refused: identity", rule=AS_ABSENT)
async def late_date(field: Battlefield) -> str:
    return await _poisoned(field, timestamp=b"\x7f" + b"\xff" * 7)


@poison("a header's name that is no text", expected="refused: identity", rule=AS_ABSENT)
async def odd_header(field: Battlefield) -> str:
    return await _poisoned(field, headers=_short(b"\xff\xfe") + b"t\x01")


@poison("tables in tables, 5,000 deep", expected="refused: identity", rule=AS_ABSENT)
async def deep_headers(field: Battlefield) -> str:
    nested = b""
    for _ in range(5000):
        nested = _short(b"a") + b"F" + _table(nested)
    return await _poisoned(field, headers=nested)


@poison("an update id that is no text", expected="refused: identity", rule=AS_ABSENT)
async def odd_id(field: Battlefield) -> str:
    return await _poisoned(field, message_id=_short(b"\xff" * 32))


@poison("a routing key that is no text", expected="merged", rule=NOT_READ)
async def odd_routing_key(field: Battlefield) -> str:
    return await _poisoned(field, routing_key=b"\xff\xfe\x00", strikes=0)


@poison("a content type that is code", expected="merged", rule=NOT_READ)
async def odd_content_type(field: Battlefield) -> str:
    return await _poisoned(field, content_type=_short(b"application/x-python-pickle"), strikes=0)


@poison("the highest priority", expected="merged", rule=NOT_READ)
async def high_priority(field: Battlefield) -> str:
    return await _poisoned(field, priority=b"\xff", strikes=0)


@poison("an expiration of a minute, and one that is no number", expected="merged; 406 PRECONDITION_FAILED", rule=NOT_READ)
async def expiration(field: Battlefield) -> str:
    minute = await _poisoned(field, expiration=_short(b"60000"), strikes=0)
    return f"{minute}; {await _poisoned(field, expiration=_short(b'soon'), strikes=0)}"


@poison("a delivery mode of 77", expected="406 PRECONDITION_FAILED", on_rabbitmq_4="merged", rule=NOT_READ)
async def odd_delivery_mode(field: Battlefield) -> str:
    return await _poisoned(field, delivery_mode=b"\x4d", strikes=0)
