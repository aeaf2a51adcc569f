"""How many messages of a party are looked at, and how many of those that are refused are kept. Pure: it is told the time.

A token bucket for each party: so many a minute, and as many at once after a pause. What is over is refused before it is
decoded, so that a flood costs the aggregator next to nothing.
"""

from dataclasses import dataclass

from aggregator.admission import Refused

QUARANTINED_PER_MINUTE = 20
"""Of one party: a flood of what is refused must not drive out what others sent."""

ANSWERED_AGAIN_PER_MINUTE = 60
"""Receipts that one party gets once more, for updates that were decided before: each is signed and published."""

_MINUTE_S = 60.0


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Bucket:
    """Tokens by party. A clock that went back adds none."""

    def __init__(self, per_minute: int) -> None:
        self._most = float(per_minute)
        self._buckets: dict[str, _Bucket] = {}

    def take(self, party: str, cost: float, *, now: float) -> bool:
        """Whether there was enough left."""
        bucket = self._buckets.setdefault(party, _Bucket(self._most, now))
        elapsed, bucket.at = max(0.0, now - bucket.at), now
        bucket.tokens = min(self._most, bucket.tokens + elapsed * self._most / _MINUTE_S)
        if bucket.tokens < cost:
            return False
        bucket.tokens -= cost
        return True


class Gate:
    """For the event loop; time is monotonic, in seconds."""

    def __init__(self, *, per_minute: int, part_bytes: int, max_update_bytes: int) -> None:
        """0 a minute: no limit."""
        self._per_minute = per_minute
        self._bucket = Bucket(per_minute) if per_minute else None
        self._quarantine = Bucket(QUARANTINED_PER_MINUTE)
        self._again = Bucket(ANSWERED_AGAIN_PER_MINUTE)
        self._part_bytes = part_bytes
        self._max_update_bytes = max_update_bytes

    def refused(self, party: str, size: int, *, is_part: bool, now: float) -> Refused | None:
        """Of a message of so many bytes. All parts of the largest update that there may be cost about what one whole message
        does."""
        cost = min(1.0, max(size, self._part_bytes) / self._max_update_bytes) if is_part else 1.0
        if self._bucket is None or self._bucket.take(party, cost, now=now):
            return None
        return Refused("rate", f"more than {self._per_minute} updates a minute")

    def may_quarantine(self, party: str, *, now: float) -> bool:
        return self._quarantine.take(party, 1.0, now=now)

    def may_answer_again(self, party: str, *, now: float) -> bool:
        return not self._per_minute or self._again.take(party, 1.0, now=now)
