"""How far a party's updates are to be trusted, by what became of those before. Pure: entries of the ledger in, a judgement out.

What is decided here is written into the entry (`factor`, `reason`), so that replay needs no judgement. Records are made again
from the ledger's newest entries at every start; only the running direction begins anew.

Three rules make an update count less, and each has its reason:

norm       larger than `norm_factor` times what the other parties send (the median of their medians): scaled down to that. Two
           others are the least: a single one could say what is usual, and so whom to shut out
direction  its party pulls against where the model goes: the cosines of its updates to the running direction are below zero by
           more than `_T_LEAST` standard errors, and those of most others clearly above it, by no more than twice as much. Else
           the model goes nowhere: near the end of training what honest parties with different data send adds up to nothing, and
           each pulls against the others
tier       the party's tier weighs less

and two refuse it: over `outlier_factor` times what the others send (`outlier`), and of a party that is suspended (`suspended`).
A score, the running mean of what became of a party's updates, ends in a suspension.
"""

import math
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from pydantic import ValidationError

from aggregator.admission import Examined, Refused
from aggregator.records import Entry
from broker_fl.codecs.delta import Delta
from broker_fl.config import TrustSettings
from broker_fl.errors import DamagedError
from broker_fl.parameters import Vector
from schemas.membership import STANDARD_TIER, Membership, SignedMembership
from schemas.receipt import Reason

REMEMBERED_ENTRIES = 5000
"""Of the ledger, from which records are made again."""

_REMEMBERED = 32
"""Norms and cosines of each party."""

_LEAST_OTHERS = 2
_LEAST_UPDATES = 10
"""Of others, before anything is usual."""

_LEAST_COSINES = 10
_T_LEAST = 4.0
_LEAST_MEAN_COSINE = 0.02
"""A pull that is weaker than this is none, however sure it is."""
_LEAST_COMMON_COSINE = 0.1
"""The median of two other parties' mean cosines, below which they go nowhere together. That of more is surer: it may be smaller
by the root of their number."""
_OPPOSED = 0.5
"""The share of that which a party has to pull the other way, before it is more than odd."""

_LEAST_NORM = 1e-20
"""What is smaller says nothing of a direction, and would not be scaled to a unit in float32."""
_DIRECTION_DECAY = 0.9
_LEAST_DIRECTION = 10
"""Merges, before the running direction says anything."""
_RESCALE_BELOW = 1e-6

_SCORE_MEMORY = 0.9
_HOSTILE: frozenset[Reason] = frozenset(
    ("malformed", "identity", "federation", "manifest", "codec", "non_finite", "bounds", "parts", "signature", "outlier", "rate")
)
"""Reasons that nobody meets who runs a worker as it is. Being late, or from before a rollback, says nothing of a party."""
_GOODNESS: dict[str, float] = {"norm": 0.6, "direction": 0.6}
"""Of updates that were merged at less weight: not enough for a suspension by itself."""


@dataclass(frozen=True, slots=True)
class Judgement:
    factor: float = 1.0
    reason: Reason | None = None
    """The heaviest of those that made the factor."""
    detail: str = ""
    cosine: float | None = None


@dataclass(frozen=True, slots=True)
class Suspension:
    """By this ledger."""

    revision: int
    """Of the party's membership; a newer one ends the suspension."""
    reason: str


@dataclass(slots=True)
class Record:
    """One party's."""

    norms: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """Of what was merged or buffered."""
    cosines: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    score: float = 1.0

    def pulls_against(self) -> bool:
        """Whether the mean of the cosines is below zero beyond doubt (Student's t)."""
        count = len(self.cosines)
        if count < _LEAST_COSINES:
            return False
        mean = self.mean_cosine()
        variance = math.fsum((cosine - mean) ** 2 for cosine in self.cosines) / (count - 1)
        return mean < -_LEAST_MEAN_COSINE and mean < -_T_LEAST * math.sqrt(variance / count)

    def mean_cosine(self) -> float:
        """Where there is one."""
        return math.fsum(self.cosines) / len(self.cosines)


class Usual:
    """The median of one figure of each party, of all parties but one; kept sorted, since there may be ten thousand."""

    def __init__(self) -> None:
        self._figures: dict[str, float] = {}
        self._sorted: list[float] = []
        self._counts: Counter[str] = Counter()
        self._total = 0

    def put(self, party: str, figure: float, *, of: int) -> None:
        """In place of what the party had; `of` so many updates."""
        self.drop(party)
        self._figures[party] = figure
        insort(self._sorted, figure)
        self._counts[party] = of
        self._total += of

    def drop(self, party: str) -> None:
        figure = self._figures.pop(party, None)
        if figure is not None:
            del self._sorted[bisect_left(self._sorted, figure)]
            self._total -= self._counts.pop(party)

    def beside(self, party: str) -> float | None:
        """None where too little is known of the others."""
        own, others = self._figures.get(party), self.others(party)
        if others < _LEAST_OTHERS or self._total - self._counts[party] < _LEAST_UPDATES:
            return None
        place = len(self._sorted) if own is None else bisect_left(self._sorted, own)
        return (self._other(place, (others - 1) // 2) + self._other(place, others // 2)) / 2

    def others(self, party: str) -> int:
        """How many there are."""
        return len(self._sorted) - (party in self._figures)

    def _other(self, own: int, index: int) -> float:
        return self._sorted[index if index < own else index + 1]


class Direction:
    """Where the merged updates went: the exponential mean of their unit vectors, at the cost of a sparse update.

    The vector is kept as `_scale` times `_vector`, so that decay is one multiplication.
    """

    def __init__(self, size: int) -> None:
        self._vector = np.zeros(size, np.float32)
        self._scale = 1.0
        self._squared = 0.0
        """Its L2 norm, squared."""
        self._merges = 0

    def cosine(self, delta: Delta, norm: float) -> float | None:
        """None as long as it says nothing."""
        if self._merges < _LEAST_DIRECTION or norm < _LEAST_NORM or self._squared <= 0:
            return None
        cosine = self._along(delta) / (norm * math.sqrt(self._squared))
        return min(1.0, max(-1.0, cosine)) + 0.0

    def add(self, delta: Delta, norm: float, factor: float) -> None:
        if norm < _LEAST_NORM:
            return
        along = factor * self._along(delta) / norm
        self._squared = max(0.0, _DIRECTION_DECAY**2 * self._squared + 2 * _DIRECTION_DECAY * along + factor**2)
        self._scale *= _DIRECTION_DECAY
        delta.add_to(self._vector, factor / (norm * self._scale))
        self._merges += 1
        if self._scale < _RESCALE_BELOW:
            self._vector *= np.float32(self._scale)
            self._scale = 1.0
            self._squared = float(np.square(self._vector, dtype=np.float64).sum())

    def _along(self, delta: Delta) -> float:
        there = self._vector if delta.indices is None else self._vector[delta.indices]
        return self._scale * float(np.dot(there, delta.values))


class Trust:
    """One per leader. Deltas are those that were merged, in their order."""

    def __init__(self, settings: TrustSettings, *, size: int) -> None:
        self._settings = settings
        self._records: dict[str, Record] = {}
        self._members: dict[str, Membership] = {}
        self._shut_out: dict[str, Suspension] = {}
        self._usual_norm, self._usual_cosine = Usual(), Usual()
        self._direction = Direction(size) if settings.direction else None

    def remember(self, entries: Iterable[Entry]) -> None:
        """What became of updates, members and suspensions, in their order."""
        for entry in entries:
            if entry.kind == "party":
                self._enrol(signed_membership_of(entry).membership)
            elif entry.kind == "suspension":
                self._shut_out[entry.party or ""] = Suspension(entry.sequence or 0, entry.detail or "")
                # What it sent says no more what is usual.
                self._drop(entry.party or "")
            elif entry.kind == "update":
                self._weigh(entry)

    def _enrol(self, membership: Membership) -> None:
        suspension = self._shut_out.get(membership.party)
        if suspension is not None and membership.revision > suspension.revision:
            # An operator knows of it: what counts from here on is the register, and the party begins anew.
            del self._shut_out[membership.party]
            self._records.pop(membership.party, None)
            self._drop(membership.party)
        self._members[membership.party] = membership

    def _drop(self, party: str) -> None:
        self._usual_norm.drop(party)
        self._usual_cosine.drop(party)

    def _weigh(self, entry: Entry) -> None:
        party = entry.party or ""
        record = self._records.setdefault(party, Record())
        if entry.outcome in ("merged", "buffered"):
            if entry.norm is not None:
                record.norms.append(entry.norm)
                self._usual_norm.put(party, median(record.norms), of=len(record.norms))
            if entry.cosine is not None:
                record.cosines.append(entry.cosine)
                self._usual_cosine.put(party, record.mean_cosine(), of=len(record.cosines))
            goodness = _GOODNESS.get(entry.reason or "", 1.0)
        elif entry.reason in _HOSTILE and not (entry.reason == "signature" and party not in self._members):
            goodness = 0.0
        else:
            # The register that knows the party's key may have been away, too.
            return
        record.score = _SCORE_MEMORY * record.score + (1 - _SCORE_MEMORY) * goodness

    def strike(self, party: str, reason: Reason) -> None:
        """For a message that makes no entry, and so is forgotten by the next leader."""
        if reason in _HOSTILE:
            self._records.setdefault(party, Record()).score *= _SCORE_MEMORY

    def member(self, party: str) -> Membership | None:
        """As the ledger knows it."""
        return self._members.get(party)

    def suspended(self, party: str) -> str | None:
        """Why it is; None where it is not."""
        member = self._members.get(party)
        if party in self._shut_out:
            return self._shut_out[party].reason
        if member is not None and member.suspended:
            return member.reason or "by an operator"
        return None

    def shut_out(self) -> dict[str, Suspension]:
        """Whom this ledger suspended, and no operator took back as far as the ledger knows."""
        return dict(self._shut_out)

    def judge(self, examined: Examined, model: Vector | None = None) -> Judgement | Refused:
        """Of an update whose turn it is. Before anything is usual, an outlier is what outweighs the model itself."""
        party, norm = examined.update.party, examined.norm
        usual = self._usual_norm.beside(party)
        bound = _times(self._settings.outlier_factor, _norm_of(model) if usual is None else usual)
        if bound is not None and norm > bound:
            what = "the model's own" if usual is None else "the usual"
            return Refused("outlier", f"its norm {norm:.4g} is over {bound:.4g}, {self._settings.outlier_factor:g} times {what}")
        cosine = None if self._direction is None else self._direction.cosine(examined.delta, norm)
        found = [(1.0, None, ""), *self._tier(party), *self._norm(norm, usual), *self._pull(party, cosine)]
        _, reason, detail = min(found, key=lambda rule: rule[0])
        return Judgement(math.prod(factor for factor, _, _ in found), reason, detail, cosine)

    def merged(self, examined: Examined, judgement: Judgement) -> None:
        if self._direction is not None:
            self._direction.add(examined.delta, examined.norm, judgement.factor)

    def _tier(self, party: str) -> list[tuple[float, Reason | None, str]]:
        member = self._members.get(party)
        tier = STANDARD_TIER if member is None else member.tier
        weight = self._settings.weight_of(tier)
        return [(weight, "tier", f"its tier {tier!r} weighs {weight:g}")] if weight < 1 else []

    def _norm(self, norm: float, usual: float | None) -> list[tuple[float, Reason | None, str]]:
        bound = _times(self._settings.norm_factor, usual)
        if bound is None or norm <= bound:
            return []
        return [
            (
                bound / norm,
                "norm",
                f"its norm {norm:.4g} was scaled down to {bound:.4g}, {self._settings.norm_factor:g} times the usual",
            )
        ]

    def _pull(self, party: str, cosine: float | None) -> list[tuple[float, Reason | None, str]]:
        record = self._records.get(party)
        if cosine is None or record is None or not record.pulls_against():
            return []
        common, mean = self._usual_cosine.beside(party), record.mean_cosine()
        least = _LEAST_COMMON_COSINE / math.sqrt(self._usual_cosine.others(party) / _LEAST_OTHERS or 1)
        if common is None or common < least or mean > -_OPPOSED * common:
            return []
        detail = f"its updates have a mean cosine of {mean:.3f} to the running direction, and most others of {common:.3f}"
        return [(self._settings.direction_weight, "direction", detail)]

    def below_threshold(self, party: str) -> float | None:
        """The score that suspends the party; None where it is high enough."""
        record = self._records.get(party)
        return record.score if record is not None and record.score < self._settings.suspend_below else None

    def records(self) -> dict[str, Record]:
        return dict(self._records)


def _norm_of(model: Vector | None) -> float:
    return 0.0 if model is None else math.sqrt(float(np.dot(model, model)))


def _times(factor: float, usual: float | None) -> float | None:
    """None where there is nothing to compare with, or the rule is switched off."""
    return factor * usual if factor and usual else None


def signed_membership_of(entry: Entry) -> SignedMembership:
    """Of an entry of kind `party`, with its payload. Raises DamagedError."""
    try:
        return SignedMembership.model_validate_json(entry.payload or b"")
    except ValidationError as exc:
        raise DamagedError(f"entry {entry.seq} of the ledger holds no membership; restore it from a backup") from exc
