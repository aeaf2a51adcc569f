"""Updates that come in parts: put by durably until the last part is there."""

from aggregator.admission import Refused, Sender
from aggregator.decisions import PartBody
from aggregator.ledger import Ledger
from aggregator.records import PartRow
from broker_fl.errors import DecodeError
from broker_fl.transports.parts import join

MAX_HALF_SENT = 4
"""Updates that a party may have sent in part at a time."""

_SMALLEST_PART = 1024
"""Bytes, except for a last part: the least that broker.part_bytes may be. Each part is a transaction of its own."""


class Spool:
    """Works inside the ledger's transactions."""

    def __init__(self, ledger: Ledger, *, max_update_bytes: int) -> None:
        self._ledger = ledger
        self._max_update_bytes = max_update_bytes

    def take(self, sender: Sender, part: PartBody, *, now: float) -> bytes | Refused | None:
        """The whole update when its last part came; None while some are missing; refused parts take the others with them."""
        refused = self._out_of_bounds(sender, part)
        if refused is not None:
            self.drop(sender)
            return refused
        place = part.place
        self._ledger.add_part(
            PartRow(
                party=sender.party,
                update_id=sender.update_id,
                part=place.index,
                parts=place.parts,
                size=place.size,
                sha256=place.sha256,
                at=now,
                body=part.body,
            )
        )
        if self._ledger.parts_held(sender.party, sender.update_id) < place.parts:
            return None
        rows = self._ledger.parts(sender.party, sender.update_id)
        self.drop(sender)
        try:
            return join([row.body for row in rows], place)
        except DecodeError as exc:
            return Refused("parts", str(exc))

    def drop(self, sender: Sender) -> None:
        self._ledger.drop_parts(sender.party, sender.update_id)

    def _out_of_bounds(self, sender: Sender, part: PartBody) -> Refused | None:
        place = part.place
        if place.size > self._max_update_bytes:
            return Refused("bounds", f"{place.size} bytes in parts are over this federation's {self._max_update_bytes}")
        if (place.parts - 1) * _SMALLEST_PART >= place.size:
            return Refused("parts", f"{place.parts} parts for {place.size} bytes: a part has {_SMALLEST_PART} bytes at least")
        others = self._ledger.half_sent(sender.party)
        mine = others.pop(sender.update_id, {})
        if len(others) >= MAX_HALF_SENT:
            return Refused("parts", f"{len(others)} updates are half-sent already, {MAX_HALF_SENT} is the most")
        spooled = sum(size for index, size in mine.items() if index != place.index)
        if spooled + len(part.body) > place.size:
            return Refused("parts", f"its parts hold more than the {place.size} bytes that they promise")
        return None
