"""What a party sends up."""

from typing import Annotated, Literal

from pydantic import Field

from schemas.ids import Digest, FederationId, LedgerId, PartyId, SchemaVersion, UpdateId, Version
from schemas.privacy import PrivacyFacts
from schemas.wire import Message


class ModelUpdate(Message):
    """An encoded delta (trained weights - base weights, with what was left over before) and the facts about it."""

    kind: Literal["update"] = "update"
    schema_version: SchemaVersion = 1
    federation: FederationId
    ledger: LedgerId | None = None
    """Of the frame that the party trained from. A signed update must name it, so that it counts in one ledger alone."""
    party: PartyId
    update_id: UpdateId
    sequence: Annotated[int, Field(ge=1, lt=2**53)]
    """The party's own count of its updates, from 1, without gaps."""
    base_version: Version
    base_digest: Digest
    """The digest of the frame that the party trained from."""
    manifest_digest: Digest
    codec: Annotated[str, Field(max_length=64)]
    num_samples: Annotated[int, Field(ge=1, le=10**12)]
    num_steps: Annotated[int, Field(ge=1, lt=2**53)]
    train_loss: float | None
    """None under differential privacy: it is a fact about the examples that no noise covers."""
    privacy: PrivacyFacts | None = None
    """None where the training was not noised."""
    payload: bytes
