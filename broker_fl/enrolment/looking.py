"""What there is of parties: all of them in a line each, and one with everything. Nothing here is a secret."""

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from broker_fl.config import Settings
from broker_fl.enrolment.office import Known, Office, look_at_one
from broker_fl.errors import NotFoundError
from broker_fl.management import Management
from broker_fl.topology import Names, Permissions
from schemas.membership import Membership

PartyState = Literal["enrolled", "suspended", "unregistered", "incomplete"]
"""unregistered: without an entry in the register that counts. incomplete: without exchange or login."""


@dataclass(frozen=True, slots=True)
class Listed:
    name: str
    state: PartyState
    membership: Membership | None


@dataclass(frozen=True, slots=True)
class SeenConnection:
    name: str
    peer: str
    since: datetime | None
    """The management API knows it after some seconds."""


@dataclass(frozen=True, slots=True)
class Seen:
    """`permissions` are those here; `elsewhere` names the other vhosts in which the login has some."""

    name: str
    state: PartyState
    membership: Membership | None
    login: Literal["password", "certificate", "none"]
    limits: dict[str, int]
    permissions: Permissions | None
    elsewhere: tuple[str, ...]
    connections: tuple[SeenConnection, ...]
    inbox: int | None
    """Receipts that wait; None without an inbox."""


async def list_parties(management: Management, settings: Settings) -> list[str]:
    """By their exchanges: those that may send."""
    names = Names(settings.federation.name)
    return sorted(filter(None, map(names.party_of, await management.exchanges(names.up("")))))


async def list_members(office: Office) -> tuple[list[Listed], list[str]]:
    """By name; and who has an entry in the register that nobody vouches for."""
    there = set(await list_parties(office.management, office.settings))
    signed, planted = await office.shelf.all()
    members = {name: one.membership for name, one in signed.items()}
    named = [(name, members.get(name)) for name in sorted(there | members.keys())]
    return [Listed(name, _state(member, is_whole=name in there), member) for name, member in named], sorted(planted)


async def see_party(office: Office, name: str) -> Seen:
    """Raises NotFoundError, BrokerError."""
    management = office.management
    known, inbox, kinds = await asyncio.gather(
        look_at_one(office, name), management.queue(office.names.inbox(name)), management.exchanges(office.names.up(name))
    )
    is_there = office.names.up(name) in kinds
    if not known.is_party(office, name) and not is_there:
        raise NotFoundError(f"no party {name!r} in federation {office.federation!r}: `broker-fl party list` shows all")
    opened = [one for one, vhost in (await management.connections_of(name)).items() if vhost == management.vhost]
    connections = await asyncio.gather(*(_connection(management, one) for one in opened))
    user = known.user
    return Seen(
        name=name,
        state=_state(known.membership, is_whole=is_there and inbox is not None and user is not None),
        membership=known.membership,
        login=_login(known),
        limits={} if user is None else dict(user.limits),
        permissions=known.permissions.get(management.vhost),
        elsewhere=tuple(sorted(known.permissions.keys() - {management.vhost})),
        connections=tuple(connections),
        inbox=None if inbox is None else inbox.ready,
    )


async def _connection(management: Management, name: str) -> SeenConnection:
    found = await management.connection(name)
    if found is None:
        return SeenConnection(name, name.partition(" ")[0], None)
    return SeenConnection(found.name, found.peer, found.connected_at)


def fingerprint(public_key: str) -> str:
    """Of a public key, for people to compare: the first half of its SHA-256."""
    digits = hashlib.sha256(bytes.fromhex(public_key)).hexdigest()[:32]
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def _state(member: Membership | None, *, is_whole: bool) -> PartyState:
    if not is_whole:
        return "incomplete"
    if member is None:
        return "unregistered"
    return "suspended" if member.suspended else "enrolled"


def _login(known: Known) -> Literal["password", "certificate", "none"]:
    if known.user is None:
        return "none"
    return "password" if known.user.password_hash else "certificate"
