"""What goes into a decision and what comes out of it."""

import json
from dataclasses import dataclass
from typing import TypedDict

from aggregator.admission import ANONYMOUS, Credentials, Examined, Refused, Sender
from aggregator.merging.fold import Outcome
from aggregator.records import Entry
from aggregator.trust import Judgement
from broker_fl.signing import payload_digest
from broker_fl.transports.parts import Part
from schemas.membership import SignedMembership
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
    credentials: Credentials = ANONYMOUS
    party: str | None = None
    """Where the sender's id or name is missing, whose exchange it came through: nobody else may write to that."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an arrival: a receipt for the party, and why it was refused; neither for a part that was put by, and no
    receipt for what was dropped unseen."""

    receipt: Receipt | None = None
    refused: Refused | None = None
    is_duplicate: bool = False
    codec: str = ""
    size: int = 0
    epsilon: float | None = None
    """What the party has spent by now; None without differential privacy."""
    party: str | None = None
    """Where it was dropped without a receipt."""
    suspends: bool = False
    """The party, from now on."""

    @property
    def is_late_suspension(self) -> bool:
        """The door took the party for suspended, and the ledger knows better."""
        return self.refused is not None and self.refused.reason == "suspended" and self.receipt is not None


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


def accepted_entry(
    seq: int, examined: Examined, judgement: Judgement, outcome: Outcome, *, at: float, version: int, size: int
) -> Entry:
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
        base_digest=update.base_digest,
        num_samples=update.num_samples,
        **cost_of(update),
        train_loss=update.train_loss,
        codec=update.codec,
        size=size,
        outcome=outcome.kind,
        reason=judgement.reason,
        detail=judgement.detail or None,
        staleness=outcome.staleness,
        weight=outcome.weight,
        factor=judgement.factor,
        norm=examined.norm,
        cosine=judgement.cosine,
        signature=examined.signature,
        payload_digest=examined.payload_digest,
        payload=update.payload,
    )


def refused_entry(
    seq: int, sender: Sender, refused: Refused, *, at: float, version: int, size: int, examined: Examined | None
) -> Entry:
    """Without the payload: it is in quarantine. `examined` is None where it was not looked at for its own sake.

    What it cost its party is written down wherever that could be read: it was sent.
    """
    update = None if examined is None else examined.update
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
        base_digest=update.base_digest if update else None,
        num_samples=update.num_samples if update else None,
        train_loss=update.train_loss if update else None,
        **(cost_of(sent) if sent else {}),
        codec=update.codec if update else None,
        size=size,
        outcome="refused",
        reason=refused.reason,
        detail=refused.detail[:1000].replace("\0", "\ufffd"),  # PostgreSQL keeps no text with NUL.
        staleness=max(0, version - update.base_version) if update else 0,
        weight=0.0,
        norm=examined.norm if examined else None,
        signature=examined.signature if examined else None,
        payload_digest=examined.payload_digest if examined else None,
    )


def party_entry(seq: int, signed: SignedMembership, *, at: float, version: int) -> Entry:
    """What the federation's register says of a party, from the first update on that is decided by it."""
    content = signed.model_dump_json().encode()
    member = signed.membership
    return Entry(
        seq,
        "party",
        at,
        version,
        party=member.party,
        sequence=member.revision,
        payload=content,
        payload_digest=payload_digest(content),
    )


def suspension_entry(seq: int, party: str, *, revision: int, detail: str, at: float, version: int) -> Entry:
    return Entry(seq, "suspension", at, version, party=party, sequence=revision, detail=detail)


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
