"""Who is enrolled: what the federation's register says, as far as the aggregator knows it.

The register may be away: what was known before, by the ledger too, goes on counting.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Protocol

import structlog

from aggregator.trust import Suspension
from broker_fl.errors import BrokerError
from schemas.membership import SignedMembership

log = structlog.get_logger(__name__)

_REFRESH_S = 30.0
"""Ten thousand parties take the broker most of a second. What cannot wait is looked up alone: a new party, a new key."""
_ASK_AGAIN_S = 2.0
"""How soon the register is asked again for one party: a hostile one must not make the aggregator ask for every message."""
_ANSWERS_WITHIN_S = 2.0
"""All updates wait for what is asked for one party."""


class Register(Protocol):
    """Kept on the broker. Its memberships are the federation's word: their signatures were checked. All raise BrokerError."""

    async def all(self) -> Mapping[str, SignedMembership]:
        """By party."""

    async def one(self, party: str) -> SignedMembership | None: ...

    async def suspend(self, party: str, reason: str) -> None:
        """Writes it down, closes the party's connections, and keeps it out until an operator lets it in again."""


class Members:
    """The newest revision of each membership that was seen; for the event loop."""

    def __init__(self, register: Register | None) -> None:
        self._register = register
        self._known: dict[str, SignedMembership] = {}
        self._asked_at: dict[str, float] = {}
        self._half_done: set[str] = set()
        """Suspensions that the register may say already, while connections are still open."""

    def recall(self, members: Iterable[SignedMembership]) -> None:
        """From the ledger, which has what counted when a party was last heard of."""
        for signed in members:
            member = signed.membership
            known = self._known.get(member.party)
            if known is None or known.membership.revision < member.revision:
                self._known[member.party] = signed

    def learn(self, members: Iterable[SignedMembership]) -> None:
        """From the register. An older revision than one that is known changes nothing: a broker could bring back a key that was
        given up."""
        for signed in members:
            member = signed.membership
            self.recall((signed,))
            if (known := self._known[member.party].membership.revision) > member.revision:
                log.error(
                    "the register went back: the newer membership counts",
                    party=member.party,
                    known=known,
                    found=member.revision,
                )

    def get(self, party: str) -> SignedMembership | None:
        return self._known.get(party)

    def parties(self) -> list[str]:
        return sorted(self._known)

    async def look_up(self, party: str) -> SignedMembership | None:
        """Asks the register, unless it was asked for this party a moment ago."""
        loop = asyncio.get_running_loop()
        asked = self._asked_at.get(party)
        if self._register is not None and (asked is None or loop.time() - asked >= _ASK_AGAIN_S):
            self._asked_at[party] = loop.time()
            try:
                async with asyncio.timeout(_ANSWERS_WITHIN_S):
                    await self._ask(self._register, party)
            except (BrokerError, TimeoutError) as exc:
                log.warning("the register of parties cannot be asked", party=party, reason=str(exc) or "no answer")
            # Of when it answered: it may take longer than that.
            self._asked_at[party] = loop.time()
        return self.get(party)

    async def _ask(self, register: Register, party: str) -> None:
        found = await register.one(party)
        self.learn(() if found is None else (found,))

    async def refresh(self) -> None:
        """All of them. Raises nothing: a register that is away changes nothing."""
        if self._register is None:
            return
        try:
            found = await self._register.all()
        except BrokerError as exc:
            log.warning("the register of parties cannot be read: what was known before counts", reason=str(exc))
        else:
            self.learn(found.values())

    async def refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            await self.refresh()

    def still_out(self, suspended: Mapping[str, Suspension]) -> dict[str, Suspension]:
        """Those of whom the register has nothing newer than their suspension, but that: an operator may have taken it back."""
        return {party: suspension for party, suspension in suspended.items() if not self._is_taken_back(party, suspension)}

    def _is_taken_back(self, party: str, suspension: Suspension) -> bool:
        known = self._known.get(party)
        return known is not None and known.membership.revision > suspension.revision and not known.membership.suspended

    async def shut_out(self, suspended: Mapping[str, Suspension]) -> list[str]:
        """Closes the broker to the parties that the ledger suspended, where the register does not say so yet; gives whom."""
        if self._register is None:
            return []
        done = []
        for party, suspension in suspended.items():
            try:
                if await self._shut_out(self._register, party, suspension):
                    done.append(party)
            except BrokerError as exc:
                log.error("a suspended party keeps its login: `broker-fl party suspend`", party=party, reason=str(exc))  # noqa: TRY400
        return done

    async def _shut_out(self, register: Register, party: str, suspension: Suspension) -> bool:
        if self._is_done(party):
            return False
        # What is known may be of the ledger alone, and an operator have been here since.
        await self._ask(register, party)
        if party not in self._known or self._is_done(party) or self._is_taken_back(party, suspension):
            self._half_done.discard(party)
            return False
        self._half_done.add(party)
        await register.suspend(party, suspension.reason)
        self._half_done.discard(party)
        await self._ask(register, party)
        return True

    def _is_done(self, party: str) -> bool:
        known = self._known.get(party)
        return known is not None and known.membership.suspended and party not in self._half_done
