"""What happened, for people, dashboards and the demo: published on a topic exchange, its kind as the routing key."""

from typing import Annotated, Literal

from pydantic import Field

from schemas.ids import FederationId, Version
from schemas.wire import Message

EventKind = Literal[
    "aggregator.started",
    "aggregator.stopped",
    "update.merged",
    "update.buffered",
    "update.refused",
    "update.duplicate",
    "frame.published",
    "model.evaluated",
]


class Event(Message):
    """`facts` holds numbers and short texts by name; docs/protocol.md lists them by kind."""

    kind: EventKind
    schema_version: Literal[1] = 1
    federation: FederationId
    at: float
    """Seconds since 1970 by the sender's clock."""
    version: Version
    facts: Annotated[dict[str, int | float | str | bool], Field(max_length=64)]
