"""The register of parties as an aggregator asks it, all the time."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from broker_fl.config import Settings
from broker_fl.enrolment.office import Office
from broker_fl.enrolment.parties import suspend_party
from broker_fl.enrolment.shelf import Shelf, claim_key, management_of
from broker_fl.signing import SigningKey
from schemas.membership import SignedMembership

log = structlog.get_logger(__name__)


class Register:
    """All raise BrokerError. The first to be asked raises ConfigurationError where the register is signed by another key than the
    settings name."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._key: SigningKey | None = None
        self._checked: dict[str, tuple[object, SignedMembership]] = {}
        self._told: set[str] = set()

    async def all(self) -> dict[str, SignedMembership]:
        """By party. Entries that the federation's key did not sign are left out, with a warning."""
        async with self._shelf() as shelf:
            found, planted = await shelf.all()
        for party in planted:
            self._warn(party)
        self._told &= set(planted)
        return found

    async def one(self, party: str) -> SignedMembership | None:
        async with self._shelf() as shelf:
            found, is_planted = await shelf.one(party)
        if is_planted:
            self._warn(party)
        return found

    async def suspend(self, party: str, reason: str) -> None:
        """As `broker-fl party suspend`. Raises NotFoundError for one that is not enrolled."""
        async with self._office() as office:
            await suspend_party(office, party, reason)

    @asynccontextmanager
    async def _shelf(self) -> AsyncIterator[Shelf]:
        async with self._office() as office:
            yield replace(office.shelf, checked=self._checked)

    @asynccontextmanager
    async def _office(self) -> AsyncIterator[Office]:
        async with management_of(self._settings.broker) as management:
            if self._key is None:
                self._key = await claim_key(management, self._settings)
            yield Office(self._settings, management, self._key.public, self._key, self._clock)

    def _warn(self, party: str) -> None:
        if party not in self._told:
            self._told.add(party)
            log.warning("an entry in the register is not signed by the federation's key: it does not count", party=party)
