"""What became of an update."""

from typing import Annotated, Literal

from pydantic import Field

from schemas.ids import FederationId, PartyId, SchemaVersion, UpdateId, Version
from schemas.wire import Message

Reason = Literal[
    "malformed",  # not a well-formed ModelUpdate of a schema that we know
    "identity",  # user_id missing, or the exchange, the user and the message name different parties
    "federation",  # meant for another federation
    "manifest",  # another model's layout
    "codec",  # a codec that we do not know, or a payload that is not in it
    "non_finite",  # NaN or infinity
    "bounds",  # larger than the limits of this federation
    "base",  # trained from a frame that this ledger never published
    "rolled_back",  # trained from a version that an operator took back
    "too_stale",  # past the staleness bound
    "repeated",  # a second update from one version where the strategy takes one
    "privacy",  # without the noise that this federation asks for, or over what a party may spend
    "parts",  # parts that do not fit together
    "signature",  # not signed by the key that its party was enrolled with
    "samples",  # says more examples than its party was enrolled with
    "rate",  # more updates than a party may send in this time
    "outlier",  # far outside of what the others send: held in quarantine
    "suspended",  # its party is suspended
    "norm",  # merged at less weight: larger than what the others send
    "direction",  # merged at less weight: its party pulls against where the model goes
    "tier",  # merged at less weight: its party's tier weighs less
]
"""Why an update was refused; the last three: why it was merged at less weight."""


class Receipt(Message):
    """merged at a version with a weight, buffered, or refused for a reason."""

    kind: Literal["receipt"] = "receipt"
    schema_version: SchemaVersion = 1
    federation: FederationId
    party: PartyId
    update_id: UpdateId
    outcome: Literal["merged", "buffered", "refused"]
    version: Version
    """The global version after the decision."""
    staleness: Annotated[int, Field(ge=0)]
    weight: float
    """The factor that the delta was added with: a_t for FedAsync, the share before averaging for buffers, 0 if refused."""
    codec: Annotated[str, Field(max_length=64)] = ""
    """Of the update; empty where it could not be read."""
    bytes: Annotated[int, Field(ge=0)] = 0
    """Of the update's message, or of all its parts."""
    reason: Reason | None = None
    detail: Annotated[str, Field(max_length=1000)] = ""
