"""What a demo knows while it runs: from the events, and from the parties' own counters."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from broker_fl.topology import Names
from broker_fl.transports.transport import Connect
from schemas import wire
from schemas.event import Event, UpdateFacts
from workers.outbox import read_counters


@dataclass(slots=True)
class PartyFigures:
    merged: int = 0
    refused: int = 0
    staleness_sum: int = 0
    last_staleness: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    epsilon: float | None = None
    """What it has spent, by the aggregator's count; None without differential privacy."""
    note: str = ""


@dataclass(slots=True)
class Figures:
    parties: dict[str, PartyFigures]
    began: float = field(default_factory=time.monotonic)
    version: int = 0
    accuracy: float | None = None
    accuracy_version: int = 0
    is_final: bool = False
    """Whether the accuracy is the last model's."""
    merged: int = 0
    refused: int = 0
    refused_for: Counter[str] = field(default_factory=Counter)
    """By reason."""
    duplicates: int = 0
    max_staleness: int = 0
    broadcasts: int = 0
    online: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def bytes_up(self) -> int:
        return sum(party.bytes_up for party in self.parties.values())

    @property
    def bytes_down(self) -> int:
        return sum(party.bytes_down for party in self.parties.values())

    def take(self, event: Event) -> None:
        self.version = max(self.version, event.version)
        facts = event.facts
        match event.kind:
            case "updates.decided":
                for update in event.updates:
                    self._take_update(update)
            case "frame.published":
                self.broadcasts += 1
            case "model.evaluated":
                self.accuracy, self.accuracy_version = float(facts["accuracy"]), event.version
                self.is_final = bool(facts["over"])
            case _:
                pass
        self.changed.set()

    def _take_update(self, update: UpdateFacts) -> None:
        party = self.parties.get(update.party or "", PartyFigures())
        if update.epsilon is not None:
            party.epsilon = update.epsilon
        match update.outcome:
            case "duplicate":
                self.duplicates += 1
            case "refused":
                self.refused += 1
                self.refused_for[update.reason or "unknown"] += 1
                party.refused += 1
            case "merged" | "buffered":
                self.merged += 1
                self.max_staleness = max(self.max_staleness, update.staleness)
                party.merged += 1
                party.staleness_sum += update.staleness
                party.last_staleness = update.staleness

    def read_counters(self, folder: Path) -> None:
        for name, party in self.parties.items():
            counters = read_counters(folder, name)
            party.bytes_up = counters.get("bytes_up", 0)
            party.bytes_down = counters.get("bytes_down", 0)


async def watch_events(connect: Connect, federation: str, figures: Figures, *, listening: asyncio.Event) -> None:
    """For ever; sets `listening` once nothing can be missed any more."""
    names = Names(federation)
    own = names.own_of("demo")
    async with connect("demo") as transport, transport.listen(names.events, routing_key="#", name="demo", queue=own) as feed:
        listening.set()
        while True:
            figures.take(wire.decode(Event, (await feed.receive()).body))
