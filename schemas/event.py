"""What happened, for people, dashboards and the demo: published on a topic exchange, its kind as the routing key."""

from typing import Annotated, Literal

from pydantic import Field

from schemas.ids import FederationId, PartyId, SchemaVersion, Version
from schemas.receipt import Reason
from schemas.wire import Message

EventKind = Literal[
    "aggregator.started",
    "aggregator.stopped",
    "updates.decided",
    "frame.published",
    "model.evaluated",
    "party.suspended",
]


class UpdateFacts(Message):
    """What became of one update. A message whose sender the broker does not vouch for has no party."""

    party: PartyId | None
    outcome: Literal["merged", "buffered", "refused", "duplicate"]
    staleness: Annotated[int, Field(ge=0)]
    weight: float
    bytes: Annotated[int, Field(ge=0)]
    codec: Annotated[str, Field(max_length=64)]
    reason: Reason | None
    epsilon: float | None = None
    """What the party has spent on this federation, by the updates that the aggregator saw; None without differential privacy."""


class Event(Message):
    """`facts` holds numbers and short texts by name; docs/protocol.md lists them by kind."""

    kind: EventKind
    schema_version: SchemaVersion = 1
    federation: FederationId
    at: float
    """Seconds since 1970 by the sender's clock."""
    version: Version
    facts: Annotated[dict[str, int | float | str | bool], Field(max_length=64)]
    updates: Annotated[tuple[UpdateFacts, ...], Field(strict=False, max_length=10_000, fail_fast=True)] = ()
    """Of `updates.decided`: all that one commit held."""
