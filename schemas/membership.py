"""What an operator wrote down about a party when it was enrolled."""

from typing import Annotated

from pydantic import Field, StringConstraints

from schemas.ids import NAME_PATTERN, FederationId, PartyId, PublicKey, SchemaVersion, Signature
from schemas.wire import Message

GroupName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
DisplayName = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
NumSamples = Annotated[int, Field(ge=1, le=10**12)]

STANDARD_TIER = "standard"


class Membership(Message):
    """One party's place in one federation. It changes by a new one with the next revision."""

    schema_version: SchemaVersion = 1
    federation: FederationId
    party: PartyId
    revision: Annotated[int, Field(ge=1, lt=2**53)]
    at: float
    """Seconds since 1970, by the operator's clock."""
    public_key: PublicKey | None = None
    """Of the party's signatures; None where none are asked for."""
    display_name: DisplayName = ""
    group: GroupName | None = None
    num_samples: NumSamples | None = None
    """Of the party's data, as it was agreed."""
    tier: GroupName = STANDARD_TIER
    """How far the party is trusted; the federation's `[trust] tiers` says what that weighs."""
    suspended: bool = False
    reason: Annotated[str, Field(max_length=1000)] = ""
    """Of the suspension."""


class SignedMembership(Message):
    """As the register of parties keeps it: the federation's key vouches for it, wherever it is kept."""

    membership: Membership
    signature: Signature
