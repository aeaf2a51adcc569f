"""What the aggregator says, as messages: receipts, what is quarantined, frames, facts of events. Pure."""

from collections.abc import Iterator, Sequence

from aggregator.admission import Refused
from aggregator.decisions import Verdict
from aggregator.records import FrameRow
from broker_fl.signing import SIGNATURE, Kind, SigningKey, body_statement
from broker_fl.topology import Names
from broker_fl.transports.parts import PART, PARTS
from broker_fl.transports.transport import Delivery, Header, Message
from schemas import wire
from schemas.event import UpdateFacts
from schemas.receipt import Receipt

LEDGER = "x-fl-ledger"
"""The header of a frame that says whose it is."""


def frame_messages(names: Names, frame: FrameRow, *, ledger_id: str, key: SigningKey | None = None) -> Iterator[Message]:
    """First the keyframe, where there is one: whoever reads the frame may ask for it. Signed where there is a key."""
    common: dict[str, Header] = {
        LEDGER: ledger_id,
        "x-fl-version": frame.version,
        "x-fl-number": frame.number,
        "x-fl-digest": frame.digest,
        "x-fl-over": frame.over,
    }
    message_id = f"{frame.digest[:16]}-{frame.number}"
    if frame.keyframe is not None:
        codec = frame.keyframe_codec or ""
        headers = {**common, "x-fl-kind": "keyframe", "x-fl-codec": codec, "x-fl-bytes": len(frame.keyframe)}
        headers |= _signature("frame", frame.keyframe, key)
        yield Message(names.keyframes, frame.keyframe, "", message_id, headers)
    headers = {**common, "x-fl-kind": kind_of(frame), "x-fl-codec": frame.codec, "x-fl-bytes": frame.size}
    if frame.base is not None:
        headers["x-fl-base"] = frame.base
    body = frame.body or b""
    yield Message(names.model, body, "", message_id, headers | _signature("frame", body, key))


def _signature(kind: Kind, body: bytes, key: SigningKey | None) -> dict[str, Header]:
    return {} if key is None else {SIGNATURE: key.sign(kind, body_statement(body))}


def receipt_message(names: Names, receipt: Receipt, *, key: SigningKey | None = None) -> Message:
    headers: dict[str, Header] = {
        "x-fl-outcome": receipt.outcome,
        "x-fl-version": receipt.version,
        "x-fl-staleness": receipt.staleness,
        "x-fl-codec": receipt.codec,
        "x-fl-bytes": receipt.bytes,
    }
    if receipt.reason is not None:
        headers["x-fl-reason"] = receipt.reason
    body = wire.encode(receipt)
    headers |= _signature("receipt", body, key)
    return Message(names.receipts, body, routing_key=receipt.party, message_id=receipt.update_id, headers=headers)


def kind_of(frame: FrameRow) -> str:
    return "announcement" if frame.base is None else "delta"


def update_facts(verdicts: Sequence[Verdict]) -> tuple[UpdateFacts, ...]:
    """For the event about them; parts that were put by are no update yet."""
    return tuple(_facts(verdict) for verdict in verdicts if verdict.receipt or verdict.refused)


def _facts(verdict: Verdict) -> UpdateFacts:
    receipt, refused = verdict.receipt, verdict.refused
    return UpdateFacts(
        party=receipt.party if receipt else verdict.party,
        outcome="duplicate" if verdict.is_duplicate else receipt.outcome if receipt else "refused",
        staleness=receipt.staleness if receipt else 0,
        weight=receipt.weight if receipt else 0.0,
        bytes=verdict.size,
        codec=verdict.codec,
        reason=refused.reason if refused else receipt.reason if receipt else None,
        epsilon=verdict.epsilon,
    )


_KEPT_HEADERS = (
    "x-fl-party",
    "x-fl-sequence",
    "x-fl-base-version",
    "x-fl-codec",
    "x-fl-bytes",
    "x-fl-at",
    SIGNATURE,
    PART,
    PARTS,
)
_HEADER_LENGTH = 200


def quarantined(names: Names, delivery: Delivery, refused: Refused, *, most_bytes: int) -> Message:
    """With known headers only, and short ones: all headers together must fit one frame, or the broker closes our connection. Of a
    body that is too large anyway the rest would only drive others' out."""
    headers: dict[str, Header] = {key: _short(delivery.headers[key]) for key in _KEPT_HEADERS if key in delivery.headers}
    headers |= {
        "x-fl-reason": refused.reason,
        "x-fl-detail": _short(refused.detail),
        "x-fl-exchange": delivery.exchange,
        "x-fl-user": delivery.user_id or "",
    }
    return Message(names.quarantine, delivery.body[:most_bytes], message_id=delivery.message_id, headers=headers)


def _short(value: Header) -> Header:
    return value[:_HEADER_LENGTH] if isinstance(value, str) else value
