"""What goes into a decision and what comes out of it."""

import json
from dataclasses import dataclass
from typing import TypedDict

from aggregator.admission import Examined, Refused, Sender
from aggregator.merging.fold import Outcome
from aggregator.records import Entry
from broker_fl.transports.parts import Part
from schemas.receipt import Receipt
from schemas.update import ModelUpdate


@dataclass(frozen=True, slots=True)
class PartBody:
    place: Part
    body: bytes


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message from the updates queue, after `identify` and, unless it is a part, `examine`."""

    sender: Sender | None
    """None where the broker's word for who sent it is missing."""
    content: Examined | Refused | PartBody
    size: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an arrival: a receipt for the party, and why it was refused; neither for a part that was put by."""

    receipt: Receipt | None = None
    refused: Refused | None = None
    is_duplicate: bool = False
    codec: str = ""
    size: int = 0
    epsilon: float | None = None
    """What the party has spent by now; None without differential privacy."""


@dataclass(frozen=True, slots=True)
class Goal:
    """When the federation is over: at a version, at an accuracy, or never."""

    versions: int | None = None
    target_accuracy: float | None = None

    def as_text(self) -> str:
        return json.dumps({"versions": self.versions, "target_accuracy": self.target_accuracy})

    def is_reached(self, *, version: int, accuracy: float | None = None) -> bool:
        if self.versions is not None and version >= self.versions:
            return True
        return self.target_accuracy is not None and accuracy is not None and accuracy >= self.target_accuracy


class Cost(TypedDict, total=False):
    """The part of an entry that says what an update cost its party's privacy."""

    num_steps: int
    noise_multiplier: float | None
    sample_rate: float | None


def cost_of(update: ModelUpdate) -> Cost:
    facts = update.privacy
    return Cost(
        num_steps=update.num_steps,
        noise_multiplier=None if facts is None else facts.noise_multiplier,
        sample_rate=None if facts is None else facts.sample_rate,
    )


def accepted_entry(seq: int, examined: Examined, outcome: Outcome, *, at: float, version: int, size: int) -> Entry:
    update = examined.update
    return Entry(
        seq=seq,
        kind="update",
        at=at,
        version=version,
        party=update.party,
        update_id=update.update_id,
        sequence=update.sequence,
        base_version=update.base_version,
        num_samples=update.num_samples,
        **cost_of(update),
        train_loss=update.train_loss,
        codec=update.codec,
        size=size,
        outcome=outcome.kind,
        staleness=outcome.staleness,
        weight=outcome.weight,
        payload_digest=examined.payload_digest,
        payload=update.payload,
    )


def refused_entry(
    seq: int, sender: Sender, refused: Refused, *, at: float, version: int, size: int, update: ModelUpdate | None
) -> Entry:
    """Without the payload: it is in quarantine. `update` is None where it was not looked at for its own sake.

    What it cost its party is written down wherever that could be read: it was sent.
    """
    sent = update or refused.update
    return Entry(
        seq=seq,
        kind="update",
        at=at,
        version=version,
        party=sender.party,
        update_id=sender.update_id,
        sequence=update.sequence if update else None,
        base_version=update.base_version if update else None,
        **(cost_of(sent) if sent else {}),
        codec=update.codec if update else None,
        size=size,
        outcome="refused",
        reason=refused.reason,
        detail=refused.detail[:1000].replace("\0", "\ufffd"),  # PostgreSQL keeps no text with NUL.
        staleness=max(0, version - update.base_version) if update else 0,
        weight=0.0,
    )


def receipt_for(entry: Entry, *, federation: str) -> Receipt:
    return Receipt.model_validate(
        {
            "federation": federation,
            "party": entry.party,
            "update_id": entry.update_id,
            "outcome": entry.outcome,
            "version": entry.version,
            "staleness": entry.staleness or 0,
            "weight": entry.weight or 0.0,
            "codec": entry.codec or "",
            "bytes": entry.size or 0,
            "reason": entry.reason,
            "detail": entry.detail or "",
        }
    )
