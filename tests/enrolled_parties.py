"""A federation's key, a key for each party, and a register of parties in memory: for the tests of both sides."""

import hashlib

from broker_fl.errors import ManagementError
from broker_fl.signing import SigningKey, payload_digest, sign_membership, update_statement
from schemas.membership import Membership

FEDERATION_KEY = SigningKey.from_text("f1" * 32)


def key_of(party, generation=1):
    """The party's own, always the same; one for each time that it was rotated."""
    return SigningKey.from_text(hashlib.sha256(f"{party}/{generation}".encode()).hexdigest())


def membership(party="ann", *, federation="ward", by=FEDERATION_KEY, **changes):
    """Signed, by the federation unless somebody else is named."""
    facts = {"federation": federation, "party": party, "revision": 1, "at": 5.0, "public_key": key_of(party).public}
    return sign_membership(by, Membership(**{**facts, **changes}))


def signature_of(update, key=None):
    """What a party puts into the header of its update; by its own key unless another is named."""
    key = key or key_of(update.party)
    return key.sign("update", update_statement(update, payload_digest=payload_digest(update.payload)))


class RegisterInMemory:
    """What the broker's register answers, and what it was asked for."""

    def __init__(self, *parties, federation="ward"):
        self.federation = federation
        self.members = {}
        self.asked = []
        self.suspended = []
        self.is_away = False
        for party in parties:
            self.enrol(party)

    def enrol(self, party, **changes):
        """The next revision of it."""
        known = self.members.get(party)
        facts = {} if known is None else known.membership.model_dump()
        revision = 1 if known is None else known.membership.revision + 1
        facts |= {"federation": self.federation, "revision": revision, **changes}
        facts.pop("party", None)
        self.members[party] = membership(party, **facts)
        return self.members[party]

    async def all(self):
        self._answer("all")
        return dict(self.members)

    async def one(self, party):
        self._answer(party)
        return self.members.get(party)

    async def suspend(self, party, reason):
        self._answer(f"suspend {party}")
        self.enrol(party, suspended=True, reason=reason)
        self.suspended.append((party, reason))

    def _answer(self, question):
        self.asked.append(question)
        if self.is_away:
            raise ManagementError("the management API does not answer")
