"""The register of parties: a membership of each, on the broker and signed by the federation's key.

It is kept as RabbitMQ's global parameters, which are exported and imported with all else, and which whoever runs the broker can
change: what the federation's key did not sign, for this party of this federation, is as good as not there.

    VHOST:fl.F.party.P   {"membership": {...}, "signature": "..."}
    VHOST:fl.F.key       {"public_key": "..."}: whose signature that is, so that nobody makes a second key by mistake
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from broker_fl.config import BrokerSettings, Settings
from broker_fl.errors import ConfigurationError
from broker_fl.keys import load_key, load_or_make_key
from broker_fl.management import Management
from broker_fl.signing import SigningKey, is_vouched_for, sign_membership
from broker_fl.tls import management_tls
from schemas.ids import is_name
from schemas.membership import Membership, SignedMembership


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where one federation's entries are. `key` is the federation's public one; without it nothing is checked. `checked`
    remembers, by party, what was checked and what came of it."""

    management: Management
    federation: str
    key: str | None
    checked: dict[str, tuple[object, SignedMembership]] = field(default_factory=dict)

    @property
    def _prefix(self) -> str:
        # Global parameters are the whole broker's.
        return f"{self.management.vhost}:fl.{self.federation}."

    def name_of(self, party: str) -> str:
        return f"{self._prefix}party.{party}"

    @property
    def key_name(self) -> str:
        return f"{self._prefix}key"

    async def all(self) -> tuple[dict[str, SignedMembership], list[str]]:
        """By party; and the names of those whose entry nobody vouches for."""
        found = await self.management.global_parameters(self.name_of(""))
        # Ten thousand signatures take a second.
        return await asyncio.to_thread(self._sorted_out, found)

    async def one(self, party: str) -> tuple[SignedMembership | None, bool]:
        """And whether there is one that nobody vouches for."""
        value = await self.management.global_parameter(self.name_of(party))
        signed = self._checked(party, value)
        return signed, value is not None and signed is None

    async def put(self, signed: SignedMembership) -> None:
        await self.management.put_global_parameter(self.name_of(signed.membership.party), signed.model_dump(mode="json"))

    async def delete(self, party: str) -> None:
        await self.management.delete_global_parameter(self.name_of(party))

    def _sorted_out(self, found: Mapping[str, object]) -> tuple[dict[str, SignedMembership], list[str]]:
        known: dict[str, SignedMembership] = {}
        planted = []
        for party, value in found.items():
            signed = self._checked(party, value)
            if signed is not None:
                known[party] = signed
            elif is_name(party):
                planted.append(party)
        return known, planted

    def _checked(self, party: str, value: object) -> SignedMembership | None:
        known = self.checked.get(party)
        if known is not None and known[0] == value:
            return known[1]
        signed = self._check(party, value)
        if signed is not None:
            self.checked[party] = (value, signed)
        return signed

    def _check(self, party: str, value: object) -> SignedMembership | None:
        try:
            signed = SignedMembership.model_validate(value)
        except ValidationError:
            return None
        member = signed.membership
        # One that was copied from another party or federation is signed, too.
        if (member.federation, member.party) != (self.federation, party):
            return None
        return signed if self.key is None or is_vouched_for(signed, by=self.key) else None


def management_of(broker: BrokerSettings) -> Management:
    """The management API of the broker and vhost that the settings name."""
    return Management(broker.management().get_secret_value(), vhost=broker.vhost(), tls=management_tls(broker))


async def claim_key(management: Management, settings: Settings) -> SigningKey:
    """The federation's, which the register is signed by. Made, and noted there, where it has none yet.

    Raises ConfigurationError where the register knows another one than the file holds.
    """
    name = Shelf(management, settings.federation.name, None).key_name
    noted = _noted(await management.global_parameter(name))
    file = settings.key_file
    if noted is None:
        key = load_or_make_key(file)
        await management.put_global_parameter(name, {"public_key": key.public})
        return key
    if not file.exists():
        raise ConfigurationError(
            f"the register of federation {settings.federation.name!r} is signed by the key {noted[:12]}..., and there is no "
            f"{file}: put the federation's key there, or name it by [security] key"
        )
    key = load_key(file)
    if key.public != noted:
        raise ConfigurationError(
            f"the register of federation {settings.federation.name!r} is signed by the key {noted[:12]}..., and {file} holds "
            f"{key.public[:12]}...: put the federation's key there, or name it by [security] key"
        )
    return key


def public_key(settings: Settings) -> str | None:
    """The federation's, for who only reads; None where this machine does not know it. Raises ConfigurationError."""
    if settings.security.aggregator_key is not None:
        return settings.security.aggregator_key
    return load_key(settings.key_file).public if settings.key_file.exists() else None


def _noted(value: object) -> str | None:
    key = value.get("public_key") if isinstance(value, Mapping) else None
    return key if isinstance(key, str) else None


def next_membership(
    key: SigningKey, old: Membership | None, *, federation: str, party: str, now: float, changes: Mapping[str, object]
) -> SignedMembership:
    """The old one with `changes`. Its revision is the time in milliseconds, unless the old one has that already: so it goes up
    beyond a removal, too, which leaves no old one."""
    at = round(now, 3)
    revision = max(int(at * 1000), 1 if old is None else old.revision + 1)
    facts = {} if old is None else old.model_dump()
    facts |= {"federation": federation, "party": party, "revision": revision, "at": at, **changes}
    return sign_membership(key, Membership.model_validate(facts))
