"""What the aggregator sends down."""

from typing import Annotated, Literal

from pydantic import Field

from schemas.ids import Digest, FederationId, LedgerId, SchemaVersion, Version
from schemas.manifest import Manifest
from schemas.wire import Message


class TrainingPlan(Message):
    """What the next local training should use. It is the `[training]` section of federation.toml, and rides in each frame."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Passes over the party's data; not used when `steps` is given."""
    steps: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    """Optimizer steps, over the data as often as it takes."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    proximal: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """The mu of FedProx and rho of FedAsync: adds (mu / 2) * ||x - x_base||^2 to the loss."""


class ModelFrame(Message):
    """One broadcast. A keyframe holds a whole model, and all that a worker needs to take part."""

    kind: Literal["keyframe"] = "keyframe"
    schema_version: SchemaVersion = 1
    federation: FederationId
    ledger: LedgerId
    """The ledger that numbers these frames; another one starts again from frame 1."""
    number: Annotated[int, Field(ge=1, lt=2**53)]
    """Counts the frames of a ledger. A repeated number is a repeated frame."""
    version: Version
    digest: Digest
    """SHA-256 of the little-endian float32 vector that the payload decodes to."""
    manifest: Manifest
    codec: Annotated[str, Field(max_length=64)]
    training: TrainingPlan
    update_codec: Annotated[str, Field(max_length=64)]
    """The codec that updates should come in."""
    fraction: Annotated[float, Field(gt=0, le=1)]
    """The share of parties that train from this frame; see workers/participation.py."""
    repeat: bool
    """Whether a party may train from one version more than once."""
    over: bool
    """Whether the federation has ended: this is the final model."""
    payload: bytes
