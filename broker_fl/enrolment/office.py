"""Who enrols, and what the broker knows of a party before anything is done."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from broker_fl.config import Settings
from broker_fl.enrolment.shelf import Shelf, claim_key, management_of, public_key
from broker_fl.errors import ConfigurationError
from broker_fl.management import Management, User
from broker_fl.signing import SigningKey
from broker_fl.topology import Names, Permissions, party_limits, party_permissions
from schemas.membership import Membership, SignedMembership

FEW = 16
"""So many parties are asked for one by one; for more, everybody."""


@dataclass(frozen=True, slots=True)
class Office:
    """The management API with an administrator's rights, and the federation's key. Only `signing_key` asks for the private one:
    who reads may have the public one alone, and whoever has none takes what the register says."""

    settings: Settings
    management: Management
    public_key: str | None
    key: SigningKey | None = None
    clock: Callable[[], float] = time.time

    @property
    def federation(self) -> str:
        return self.settings.federation.name

    @property
    def names(self) -> Names:
        return Names(self.federation)

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.management, self.federation, self.public_key)

    @property
    def limits(self) -> dict[str, int]:
        """Of a party."""
        enrolment = self.settings.enrolment
        return party_limits(connections=enrolment.max_connections, channels=enrolment.max_channels)

    def signing_key(self) -> SigningKey:
        if self.key is None:
            raise ConfigurationError("the register of parties changes by the federation's private key alone ([security] key)")
        return self.key


@asynccontextmanager
async def open_office(settings: Settings, *, signs: bool = True) -> AsyncIterator[Office]:
    """`signs`: the private key is needed, and made where the federation has none. Raises BrokerError, ConfigurationError."""
    async with management_of(settings.broker) as management:
        if signs:
            key = await claim_key(management, settings)
            yield Office(settings, management, key.public, key)
        else:
            yield Office(settings, management, public_key(settings))


@dataclass(frozen=True, slots=True)
class Known:
    """What the broker has under a party's name."""

    user: User | None = None
    permissions: Mapping[str, Permissions] = field(default_factory=dict)
    """Of the user, by vhost."""
    signed: SignedMembership | None = None

    @property
    def membership(self) -> Membership | None:
        return None if self.signed is None else self.signed.membership

    def is_party(self, office: Office, name: str) -> bool:
        """By the register; or by the rights here, for one that was enrolled before there was a register, or half-way."""
        here = self.permissions.get(office.management.vhost)
        write = party_permissions(office.federation, name).write
        return self.signed is not None or (here is not None and here.write == write)

    def is_used_elsewhere(self, office: Office) -> bool:
        """Users belong to the whole broker: whether this one has rights in other vhosts, or of an administrator."""
        return bool(self.permissions.keys() - {office.management.vhost}) or (self.user is not None and bool(self.user.tags))


async def look_at(office: Office, names: Sequence[str]) -> dict[str, Known]:
    if len(names) > FEW:
        return await _look_at_all(office, names)
    found = await asyncio.gather(*(look_at_one(office, name) for name in names))
    return dict(zip(names, found, strict=True))


async def look_at_one(office: Office, name: str) -> Known:
    management = office.management
    user, permissions, (signed, _) = await asyncio.gather(
        management.user(name), management.permissions_of(name), office.shelf.one(name)
    )
    return Known(user, permissions, signed)


async def _look_at_all(office: Office, names: Sequence[str]) -> dict[str, Known]:
    users = {user.name: user for user in await office.management.list_users()}
    permissions = await office.management.permissions()
    entries, _ = await office.shelf.all()
    return {name: Known(users.get(name), permissions.get(name, {}), entries.get(name)) for name in names}
