"""Making, changing and unmaking parties. Everything may be interrupted, and done again."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from broker_fl import definitions
from broker_fl.config import Settings
from broker_fl.definitions import render
from broker_fl.enrolment.credentials import Credentials, Issue, Keeper, Unkept, new_credentials
from broker_fl.enrolment.office import FEW, Known, Office, look_at, look_at_one
from broker_fl.enrolment.roster import PartyFacts, names_of, party_facts
from broker_fl.enrolment.shelf import claim_key, next_membership
from broker_fl.errors import ConfigurationError, ManagementError, NotFoundError, TopologyConflictError
from broker_fl.management import Found, Management
from broker_fl.signing import SigningKey
from broker_fl.topology import (
    SUSPENDED,
    InboxLimits,
    Permissions,
    Topology,
    operator_policies,
    party,
    party_permissions,
    policies_without_logs,
    shared_without_logs,
)
from schemas.membership import Membership, SignedMembership

Outcome = Literal["new", "changed", "unchanged"]
Some = TypeVar("Some")

AT_A_TIME = 1000
"""Parties of one import: 1.5 MB and 3 s (measured on 3.10). RabbitMQ 4 takes up to 20 MB."""
_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be done for one party. Without `is_new` it has a user, whose password stays."""

    facts: PartyFacts
    known: Known
    is_new: bool
    begun: Credentials | None = None

    @property
    def name(self) -> str:
        return self.facts.name


@dataclass(frozen=True, slots=True)
class _Ready:
    """With credentials where some are to be handed over, and a membership where there is a new one."""

    plan: _Plan
    credentials: Credentials | None
    signed: SignedMembership | None

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def membership(self) -> Membership | None:
        return self.signed.membership if self.signed is not None else self.plan.known.membership

    @property
    def is_suspended(self) -> bool:
        return self.membership is not None and self.membership.suspended

    @property
    def outcome(self) -> Outcome:
        if self.plan.known.membership is None or self.plan.is_new:
            return "new"
        return "unchanged" if self.signed is None else "changed"


async def add_parties(
    office: Office,
    roster: Sequence[PartyFacts],
    keeper: Keeper,
    *,
    issue: Issue | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, Outcome]:
    """Each gets what it lacks: a new one user, rights, limits, exchange, inbox, its entry in the register and credentials; one
    that is there keeps its own, and its entry changes where its facts did. `told` hears how many are done.

    Raises ConfigurationError before anything is made, where that cannot be for one of them; BrokerError.
    """
    office.signing_key()
    known = await look_at(office, [facts.name for facts in roster])
    plans = await asyncio.to_thread(_planned, office, roster, known, keeper)
    await prepare_broker(office)
    is_many = len(plans) > FEW
    found = await office.management.found() if is_many else None
    outcomes: dict[str, Outcome] = {}
    for group in _in_groups(plans, AT_A_TIME):
        ready = await asyncio.to_thread(_begun, office, group, keeper, issue)
        await _enrol(office, ready, found)
        await asyncio.to_thread(_finished, ready, keeper)
        outcomes |= {one.name: one.outcome for one in ready}
        told(len(outcomes))
    if is_many:
        await _check_import(office, roster)
    return outcomes


async def add_party(management: Management, settings: Settings, name: str, *, key: SigningKey | None = None) -> Credentials:
    """One that is new, and whose credentials the caller keeps; by the federation's key where none is given. Raises as
    `add_parties`."""
    key = key or await claim_key(management, settings)
    keeper = Unkept()
    await add_parties(Office(settings, management, key.public, key), [party_facts(name)], keeper)
    if name not in keeper.credentials:
        raise ConfigurationError(f"party {name!r} is enrolled already")
    return keeper.credentials[name]


async def prepare_broker(office: Office) -> None:
    """What all parties need of the broker, before there is an aggregator."""
    management = office.management
    await management.apply(shared_without_logs(office.federation))
    await management.apply_policies(policies_without_logs(office.federation))
    await management.apply_operator_policies(operator_policies(office.federation, inbox_limits(office.settings)))
    await management.put_vhost_limits(vhost_limits(office.settings))


def vhost_limits(settings: Settings) -> dict[str, int]:
    """As far as any are asked for."""
    enrolment = settings.enrolment
    asked = {"max-connections": enrolment.vhost_max_connections, "max-queues": enrolment.vhost_max_queues}
    return {limit: value for limit, value in asked.items() if value is not None}


def inbox_limits(settings: Settings) -> InboxLimits:
    enrolment = settings.enrolment
    return InboxLimits(messages=enrolment.inbox_messages, bytes=enrolment.inbox_bytes, ttl_s=enrolment.inbox_ttl_s)


def _planned(office: Office, roster: Sequence[PartyFacts], known: dict[str, Known], keeper: Keeper) -> list[_Plan]:
    """Raises ConfigurationError."""
    plans: list[_Plan] = []
    conflicts: dict[str, list[str]] = {}
    for facts in roster:
        verdict = _judged(office, facts, known[facts.name], keeper)
        if isinstance(verdict, str):
            conflicts.setdefault(verdict, []).append(facts.name)
        else:
            plans.append(verdict)
    if conflicts:
        raise ConfigurationError("; ".join(text.format(names_of(names)) for text, names in conflicts.items()))
    return plans


def _judged(office: Office, facts: PartyFacts, known: Known, keeper: Keeper) -> "_Plan | str":
    """Or why not, with a place for the names."""
    name, user = facts.name, known.user
    begun, finished = keeper.begun(name), keeper.finished(name)
    if user is None:
        if finished is not None:
            return "{0}: there is a file of an earlier enrolment, and the broker knows no such party: move the file away first"
        return _Plan(facts, known, is_new=True, begun=begun)
    # Half-way, it has no rights yet.
    is_ours = known.is_party(office, name) or (begun is not None and not (known.permissions or user.tags))
    if begun is not None and is_ours and begun.opens(user):
        return _Plan(facts, known, is_new=False, begun=begun)
    if not known.is_party(office, name):
        return "{0}: the broker has such a user, which is no party of this federation: choose another name"
    if known.membership is None and facts.public_key is None and office.settings.security.signatures:
        return "{0}: enrolled without an entry in the register that counts: `broker-fl party rotate NAME` gives it one"
    if begun is not None or (finished is not None and not _fits(finished, known)):
        return "{0}: the file holds other credentials than the broker knows: `broker-fl party rotate NAME` makes new ones"
    return _Plan(facts, known, is_new=False)


def _fits(finished: Credentials, known: Known) -> bool:
    member = known.membership
    has_key = finished.key is None or member is None or member.public_key == finished.key.public
    return has_key and known.user is not None and finished.opens(known.user)


def _begun(office: Office, plans: Iterable[_Plan], keeper: Keeper, issue: Issue | None) -> list[_Ready]:
    """For a thread: it makes keys, writes and signs."""
    ready = []
    for plan in plans:
        credentials = plan.begun
        if plan.is_new and credentials is None:
            credentials = _new_credentials(office, plan.facts, issue)
            keeper.begin(plan.name, credentials)
        ready.append(_Ready(plan, credentials, _changed(office, plan.facts, plan.known.membership, credentials)))
    return ready


def _new_credentials(office: Office, facts: PartyFacts, issue: Issue | None) -> Credentials:
    has_own_key = facts.public_key is not None or not office.settings.security.signatures
    return new_credentials(facts.name, has_own_key=has_own_key, issue=issue)


def _changed(
    office: Office, facts: PartyFacts, old: Membership | None, credentials: Credentials | None = None
) -> SignedMembership | None:
    """None where it says already what it should."""
    changes = dict(facts.given)
    if credentials is not None and credentials.key is not None:
        changes.setdefault("public_key", credentials.key.public)
    if old is not None and all(getattr(old, field) == value for field, value in changes.items()):
        return None
    return _next(office, facts.name, old, changes)


def _next(office: Office, name: str, old: Membership | None, changes: dict[str, object]) -> SignedMembership:
    key, now = office.signing_key(), office.clock()
    return next_membership(key, old, federation=office.federation, party=name, now=now, changes=changes)


def _finished(ready: Iterable[_Ready], keeper: Keeper) -> None:
    for one in ready:
        if one.credentials is not None:
            keeper.finish(one.name)


async def _enrol(office: Office, ready: Sequence[_Ready], found: Found | None) -> None:
    """By one import; `found` is what was there of exchanges, queues and bindings, None for few parties, where it is asked."""
    vhost, federation = office.management.vhost, office.federation
    users = [_user(office, one) for one in ready if one.plan.is_new]
    own = [party(federation, one.name) for one in ready]
    body = render(
        vhost,
        *(() if found is None else (_missing(topology, found) for topology in own)),
        users=[user for user in users if user is not None],
        permissions={one.name: granted for one in ready if (granted := _granted(office, one)) is not None},
        global_parameters={
            office.shelf.name_of(one.name): one.signed.model_dump(mode="json") for one in ready if one.signed is not None
        },
    )
    # It is there, and may have a description or a default queue type, which an entry without them would take away.
    del body["vhosts"]
    if any(body.values()):
        await office.management.import_definitions(body)
    if found is None:
        for topology in own:
            await office.management.apply(topology)
    await _at_once(_limit(office, one) for one in ready if not one.plan.is_new)


def _user(office: Office, one: _Ready) -> definitions.User | None:
    if one.credentials is None:
        return None
    old = one.plan.known.user
    tags = () if old is None else old.tags
    return definitions.User(one.name, one.credentials.hash(), tags, _limits(office, one))


def _granted(office: Office, one: _Ready) -> Permissions | None:
    """None where nothing has to change."""
    known, wanted = one.plan.known, party_permissions(office.federation, one.name)
    is_shut_out = one.is_suspended and known.is_used_elsewhere(office)
    return None if is_shut_out or known.permissions.get(office.management.vhost) == wanted else wanted


def _limits(office: Office, one: _Ready) -> dict[str, int]:
    is_shut_out = one.is_suspended and not one.plan.known.is_used_elsewhere(office)
    return {**office.limits, **(SUSPENDED if is_shut_out else {})}


async def _limit(office: Office, one: _Ready) -> None:
    user, wanted = one.plan.known.user, _limits(office, one)
    if user is not None and user.limits != wanted:
        await office.management.put_user_limits(one.name, wanted)


def _missing(wanted: Topology, found: Found) -> Topology:
    """Raises TopologyConflictError for what is there, and of another kind: an import would leave it as it is."""
    for thing, kinds in ((wanted.exchanges, found.exchanges), (wanted.queues, found.queues)):
        for one in thing:
            if kinds.get(one.name, one.kind) != one.kind:
                raise TopologyConflictError(f"{one.name} is there as {kinds[one.name]}, not {one.kind}: delete it")
    return Topology(
        tuple(exchange for exchange in wanted.exchanges if exchange.name not in found.exchanges),
        tuple(queue for queue in wanted.queues if queue.name not in found.queues),
        tuple(binding for binding in wanted.bindings if binding not in found.bindings),
    )


async def _check_import(office: Office, roster: Iterable[PartyFacts]) -> None:
    """RabbitMQ says nothing of what an import left out."""
    found = await office.management.found()
    lacking = [facts.name for facts in roster if _missing(party(office.federation, facts.name), found) != Topology()]
    if lacking:
        raise ManagementError(f"RabbitMQ took the import and did not make all of it, for {names_of(lacking)}: add them again")


async def rotate_party(office: Office, facts: PartyFacts, keeper: Keeper, *, issue: Issue | None = None) -> None:
    """New credentials, which end the old ones and its connections; with `facts` that changed, too.

    Raises NotFoundError for one that is not enrolled, ConfigurationError, BrokerError.
    """
    known = await _enrolled(office, facts.name)
    if issue is None and known.user is not None and known.user.password_hash == "":
        raise ConfigurationError(
            f"party {facts.name!r} logs in by certificate: --certificate issues a new one, --external leaves that to the party"
        )
    credentials = _new_credentials(office, facts, issue)
    await asyncio.to_thread(keeper.begin, facts.name, credentials, over=True)
    signed = _changed(office, facts, known.membership, credentials)
    await prepare_broker(office)
    await _enrol(office, [_Ready(_Plan(facts, known, is_new=True), credentials, signed)], None)
    await office.management.close_connections(facts.name, "the party has new credentials")
    await asyncio.to_thread(keeper.finish, facts.name, over=True)


async def change_party(office: Office, facts: PartyFacts) -> Membership:
    """Raises NotFoundError, ConfigurationError, BrokerError."""
    known = await _enrolled(office, facts.name)
    if known.membership is None:
        raise ConfigurationError(
            f"party {facts.name!r} has no entry in the register that counts: `broker-fl party rotate {facts.name}` gives it one"
        )
    signed = _changed(office, facts, known.membership)
    if signed is None:
        return known.membership
    await office.shelf.put(signed)
    return signed.membership


async def suspend_party(office: Office, name: str, reason: str = "") -> int:
    """Its user stays, and may not log in; its connections are closed; what it sent before is refused. Gives how many connections.

    A user with rights in another virtual host, or of an administrator, goes on there, and has none here. Raises NotFoundError,
    BrokerError.
    """
    known = await _enrolled(office, name)
    member = known.membership
    if member is None or not member.suspended or (reason and member.reason != reason):
        await office.shelf.put(_next(office, name, member, {"suspended": True, "reason": reason}))
    if known.user is None:
        return 0
    # Before its connections are closed, or it opens them again.
    if known.is_used_elsewhere(office):
        with suppress(NotFoundError):
            await office.management.delete_permissions(name)
    else:
        await office.management.put_user_limits(name, SUSPENDED)
    return await office.management.close_connections(name, "the party is suspended")


async def resume_party(office: Office, name: str) -> None:
    """Raises NotFoundError, BrokerError."""
    known = await _enrolled(office, name)
    member = known.membership
    if member is not None and member.suspended:
        await office.shelf.put(_next(office, name, member, {"suspended": False, "reason": ""}))
    if known.user is not None:
        await office.management.put_permissions(name, party_permissions(office.federation, name))
        await office.management.put_user_limits(name, office.limits)


async def remove_party(office: Office, name: str) -> bool:
    """The user first, which closes its connections; then what was its own. Its updates in the queue are still taken.

    Gives whether the user is gone: one with rights in another virtual host, or of an administrator, loses those here alone; its
    connections there are closed too, once.
    Raises NotFoundError, BrokerError.
    """
    management, names = office.management, office.names
    known = await look_at_one(office, name)
    if not known.is_party(office, name) and not await _left_behind(office, name):
        raise _unknown(office, name)
    is_gone = True
    if known.user is not None and known.is_party(office, name):
        is_gone = not known.is_used_elsewhere(office)
        await _shut_out(office, name, is_gone=is_gone)
    for delete, what in (
        (management.delete_exchange, names.up(name)),
        (management.delete_queue, names.inbox(name)),
        (office.shelf.delete, name),
    ):
        # A removal that was interrupted goes on where it was.
        with suppress(NotFoundError):
            await delete(what)
    return is_gone


async def _shut_out(office: Office, name: str, *, is_gone: bool) -> None:
    management = office.management
    with suppress(NotFoundError):
        await (management.delete_user(name) if is_gone else management.delete_permissions(name))
    # Without its rights alone, a busy channel would go on publishing for seconds.
    await management.close_connections(name, "the party is removed")


async def _left_behind(office: Office, name: str) -> bool:
    """Of a removal or an enrolment that was interrupted, or of an entry that nobody vouches for."""
    management, names = office.management, office.names
    _, is_planted = await office.shelf.one(name)
    is_exchange = names.up(name) in await management.exchanges(names.up(name))
    return is_planted or is_exchange or await management.queue(names.inbox(name)) is not None


async def _enrolled(office: Office, name: str) -> Known:
    known = await look_at_one(office, name)
    if not known.is_party(office, name):
        raise _unknown(office, name)
    return known


def _unknown(office: Office, name: str) -> NotFoundError:
    return NotFoundError(f"no party {name!r} in federation {office.federation!r}: `broker-fl party list` shows all")


def _in_groups(items: Sequence[Some], most: int) -> Iterable[Sequence[Some]]:
    return (items[start : start + most] for start in range(0, len(items), most))


async def _at_once(requests: Iterable[Coroutine[Any, Any, None]]) -> None:
    free = asyncio.Semaphore(_REQUESTS_AT_ONCE)

    async def limited(request: Coroutine[Any, Any, None]) -> None:
        async with free:
            await request

    await asyncio.gather(*(limited(request) for request in requests))
