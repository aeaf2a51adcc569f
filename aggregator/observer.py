"""What the services of this room tell whoever counts: facts that are there already. Nobody has to listen."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from aggregator.records import FrameRow
from broker_fl.transports.transport import Header
from schemas.event import UpdateFacts

SENT_AT = "x-fl-at"
"""The header of an update that says when it was sent: milliseconds since 1970, by its party's clock."""

_CLOCK_AHEAD_MS = 60_000
_LONGEST_WAIT_MS = 30 * 24 * 3_600_000


class Observer(Protocol):
    """Called on the event loop and in the ledger's thread: it returns at once."""

    def leads(self, is_leading: bool) -> None:
        """The federation, with a connection to the broker."""

    def has_version(self, version: int) -> None:
        """The model; told again and again."""

    def decided(self, updates: Sequence[UpdateFacts], *, waits_s: Sequence[float], seconds: float, suspensions: int) -> None:
        """In one commit, which took so long. `waits_s` is how long updates had waited, of those that say when they were sent;
        `suspensions` is how many parties were suspended over them.
        """

    def published(self, frame: FrameRow, *, seconds: float | None) -> None:
        """The broker has it safe, with its keyframe where it has one, so long after it was made; None where it was made anew for
        newcomers.
        """


class Unobserved:
    """Nobody counts."""

    def leads(self, is_leading: bool) -> None:
        pass

    def has_version(self, version: int) -> None:
        pass

    def decided(self, updates: Sequence[UpdateFacts], *, waits_s: Sequence[float], seconds: float, suspensions: int) -> None:
        pass

    def published(self, frame: FrameRow, *, seconds: float | None) -> None:
        pass


def waited_s(headers: Mapping[str, Header], *, now: float) -> float | None:
    """How long ago an update was sent, by its party's word, in seconds; None where that is missing or cannot be.

    A clock that is somewhat ahead says 0.
    """
    sent_ms = headers.get(SENT_AT)
    if type(sent_ms) is not int:
        return None
    # As integers: a party's number may be too large for a float.
    waited_ms = int(now * 1000) - sent_ms
    return max(0, waited_ms) / 1000 if -_CLOCK_AHEAD_MS <= waited_ms <= _LONGEST_WAIT_MS else None
