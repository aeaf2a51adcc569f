"""Whose word the ledger's entries are: each party's key, and each update's signature, checked again. Pure."""

from collections.abc import Collection, Mapping

from aggregator.ledger import FEDERATION_KEY
from aggregator.records import Entry
from aggregator.trust import signed_membership_of
from broker_fl.errors import DamagedError
from broker_fl.signing import canonical, is_signed, is_vouched_for, statement_facts
from schemas.membership import Membership


class Signatures:
    """Of one ledger, entry by entry, in their order."""

    def __init__(self, facts: Mapping[str, str], *, name: str, party_keys: Mapping[str, Collection[str]] | None = None) -> None:
        """`party_keys`: all that each party had, from the parties themselves; else the ledger's own word counts, as far as the
        federation signed it."""
        self._facts = facts
        self._name = name
        self._party_keys = party_keys
        self._members: dict[str, Membership] = {}
        self.signed = self.unsigned = 0

    def check(self, entry: Entry) -> None:
        """Raises DamagedError."""
        if entry.kind == "party":
            self._enrol(entry)
        elif entry.kind == "update" and entry.outcome in ("merged", "buffered"):
            self._expect_signature(entry)

    def _enrol(self, entry: Entry) -> None:
        signed = signed_membership_of(entry)
        member = signed.membership
        federation_key = self._facts.get(FEDERATION_KEY)
        is_ours = (member.federation, member.party) == (self._facts["federation"], entry.party)
        if not is_ours or federation_key is None or not is_vouched_for(signed, by=federation_key):
            raise DamagedError(f"{self._name}: entry {entry.seq} holds a membership that the federation's key did not sign")
        known = self._members.get(member.party)
        if known is not None and known.revision >= member.revision:
            raise DamagedError(f"{self._name}: entry {entry.seq} goes back to an older membership of {member.party!r}")
        self._members[member.party] = member

    def _expect_signature(self, entry: Entry) -> None:
        keys = self._keys_of(entry.party or "")
        if entry.signature is None:
            if keys:
                raise DamagedError(
                    f"{self._name}: entry {entry.seq} lacks the signature of party {entry.party!r}, which has a key"
                )
            self.unsigned += 1
            return
        if not keys:
            raise DamagedError(
                f"{self._name}: entry {entry.seq} is signed, and nobody says by which key of party {entry.party!r}"
            )
        statement = self.statement(entry)
        if not any(is_signed("update", statement, entry.signature, by=key) for key in keys):
            raise DamagedError(f"{self._name}: entry {entry.seq} is not signed by the key of party {entry.party!r}")
        self.signed += 1

    def _keys_of(self, party: str) -> Collection[str]:
        if self._party_keys is not None:
            return self._party_keys.get(party, ())
        member = self._members.get(party)
        return () if member is None or member.public_key is None else (member.public_key,)

    def statement(self, entry: Entry) -> bytes:
        """What the party signed, made again from what the ledger kept."""
        return canonical(
            statement_facts(
                federation=self._facts["federation"],
                ledger=self._facts["ledger_id"],
                party=entry.party or "",
                update_id=entry.update_id or "",
                sequence=entry.sequence or 0,
                base_version=entry.base_version or 0,
                base_digest=entry.base_digest or "",
                manifest=self._facts["manifest"],
                codec=entry.codec or "",
                num_samples=entry.num_samples or 0,
                num_steps=entry.num_steps or 0,
                train_loss=entry.train_loss,
                noise_multiplier=entry.noise_multiplier,
                sample_rate=entry.sample_rate,
                payload_digest=entry.payload_digest or "",
            )
        )
