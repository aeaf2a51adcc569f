"""The door: what is looked at of a message, by whom its sender is known, and what of the refused is kept.

On the event loop but for the decoding, which runs in a pool of threads.
"""

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import structlog

from aggregator.admission import ANONYMOUS, Credentials, Limits, Refused, examine, identify
from aggregator.decisions import Arrival, PartBody
from aggregator.gate import Gate
from aggregator.register import Members
from broker_fl.errors import DecodeError
from broker_fl.signing import SIGNATURE
from broker_fl.transports.parts import PART, part_of
from broker_fl.transports.transport import Delivery
from schemas.ids import is_name

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Caller:
    party: str | None
    """None where the broker does not vouch for one."""
    credentials: Credentials
    refused: Refused | None
    """Without a look at the message."""


class Reception:
    def __init__(self, limits: Limits, members: Members, gate: Gate, decoders: Executor) -> None:
        self._limits = limits
        self._members = members
        self._gate = gate
        self._decoders = decoders
        self._shut_out: frozenset[str] = frozenset()

    def shut_out(self, parties: Iterable[str]) -> None:
        """What these send is not decoded any more."""
        self._shut_out = frozenset(parties)

    def shut_out_party(self, delivery: Delivery) -> str | None:
        """Whose it is, where that is one of those; else None."""
        party = self._party(delivery)
        return party if party in self._shut_out else None

    async def examine(self, deliveries: Sequence[Delivery]) -> list[Arrival]:
        """In their order."""
        parties = [self._party(delivery) for delivery in deliveries]
        unknown = {party for party in parties if party is not None and self._members.get(party) is None}
        await asyncio.gather(*map(self._members.look_up, unknown))
        callers = list(map(self._caller, deliveries, parties))
        arrivals = await asyncio.gather(*map(self._arrival, deliveries, callers))
        # Once for all messages of a party: who asks beside is not waited for.
        doubted = {party for party, arrival in zip(parties, arrivals, strict=True) if party is not None and _is_unsigned(arrival)}
        await asyncio.gather(*map(self._members.look_up, doubted))
        return list(await asyncio.gather(*map(self._second_look, deliveries, callers, arrivals)))

    def keeps(self, delivery: Delivery, refused: Refused) -> bool:
        """Whether a refused message goes into quarantine: not of a flood, and not at the cost of others'. By the exchange, which
        the broker keeps for its party: a sender may leave out who it is."""
        if refused.reason in ("rate", "suspended"):
            return False
        return self._gate.may_quarantine(delivery.exchange, now=asyncio.get_running_loop().time())

    def answers_again(self, delivery: Delivery) -> bool:
        """Whether one that was decided before gets its receipt once more. Without, an honest sender asks again later."""
        return self._gate.may_answer_again(delivery.exchange, now=asyncio.get_running_loop().time())

    def _party(self, delivery: Delivery) -> str | None:
        """By the exchange, too: who leaves out its user_id is counted all the same."""
        party = self._limits.names.party_of(delivery.exchange)
        return party if party is not None and is_name(party) and delivery.user_id in (None, party) else None

    def _caller(self, delivery: Delivery, party: str | None) -> _Caller:
        if party is None:
            return _Caller(None, ANONYMOUS, None)
        member = self._members.get(party)
        if party in self._shut_out or (member is not None and member.membership.suspended):
            refused: Refused | None = Refused("suspended", "its party is suspended")
        else:
            now = asyncio.get_running_loop().time()
            refused = self._gate.refused(party, len(delivery.body), is_part=PART in delivery.headers, now=now)
        return _Caller(party, Credentials(member, delivery.headers.get(SIGNATURE)), refused)

    async def _arrival(self, delivery: Delivery, caller: _Caller) -> Arrival:
        if caller.refused is not None:
            # Nothing is decoded: a flood is not worth a thread.
            return arrive(delivery, self._limits, caller.credentials, caller.refused, caller.party)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, arrive, delivery, self._limits, caller.credentials, None, caller.party)

    async def _second_look(self, delivery: Delivery, caller: _Caller, arrival: Arrival) -> Arrival:
        """With the register's newest word, where the key that was known may have been given up."""
        newest = None if caller.party is None else self._members.get(caller.party)
        if not _is_unsigned(arrival) or newest == caller.credentials.membership:
            return arrival
        return await self._arrival(delivery, _Caller(caller.party, Credentials(newest, caller.credentials.signature), None))


def _is_unsigned(arrival: Arrival) -> bool:
    return isinstance(arrival.content, Refused) and arrival.content.reason == "signature"


def arrive(
    delivery: Delivery,
    limits: Limits,
    credentials: Credentials = ANONYMOUS,
    refused: Refused | None = None,
    party: str | None = None,
) -> Arrival:
    """Everything about a message that needs no state; for the threads that decode. One that is refused already is not decoded."""
    size = len(delivery.body)
    sender = identify(exchange=delivery.exchange, user_id=delivery.user_id, message_id=delivery.message_id, names=limits.names)
    if isinstance(sender, Refused):
        return Arrival(None, refused or sender, size, credentials, party)
    if refused is not None:
        return Arrival(sender, refused, size, credentials)
    try:
        place = part_of(delivery.headers)
    except DecodeError as exc:
        return Arrival(sender, Refused("parts", str(exc)), size, credentials)
    if place is not None:
        return Arrival(sender, PartBody(place, delivery.body), size, credentials)
    try:
        return Arrival(sender, examine(delivery.body, sender, limits, credentials), size, credentials)
    except Exception as exc:
        # A message that no check foresaw must not stop the aggregator.
        log.exception("a check failed on an update", party=sender.party, update_id=sender.update_id)
        return Arrival(sender, Refused("malformed", f"checking it failed: {exc}"), size, credentials)
