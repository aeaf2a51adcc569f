"""What the aggregator sends down."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.ids import Digest, FederationId, LedgerId, SchemaVersion, Version
from schemas.manifest import Manifest
from schemas.privacy import PrivacyPlan
from schemas.wire import Message

FrameNumber = Annotated[int, Field(ge=1, lt=2**53)]
ByteCount = Annotated[int, Field(ge=0, lt=2**53)]


class TrainingPlan(Message):
    """What the next local training should use. It is the `[training]` section of federation.toml, and rides in the frames."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Passes over the party's data; not used when `steps` is given."""
    steps: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    """Optimizer steps, over the data as often as it takes."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.05
    decay_versions: Annotated[int | None, Field(ge=1, lt=2**53)] = None
    """The learning rate falls linearly over so many versions of the model, to `decay_to` of itself, and stays there."""
    decay_to: Annotated[float, Field(gt=0, le=1)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    proximal: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """The mu of FedProx and rho of FedAsync: adds (mu / 2) * ||x - x_base||^2 to the loss."""

    def at(self, version: int) -> Self:
        """The plan of a training from this version: the same, with its learning rate."""
        if self.decay_versions is None:
            return self
        share = min(1.0, version / self.decay_versions)
        rate = self.learning_rate * (1 - share * (1 - self.decay_to))
        return self.model_copy(update={"learning_rate": rate, "decay_versions": None})


class Plan(Message):
    """All that a worker needs to know, beside the model, to take part."""

    training: TrainingPlan
    update_codec: Annotated[str, Field(max_length=64)]
    """The codec that updates should come in."""
    momentum_correction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The momentum of DGC (Lin et al. 2018) that workers keep over their updates; 0 is plain error feedback."""
    fraction: Annotated[float, Field(gt=0, le=1)]
    """The share of parties that train from each frame; see workers/participation.py."""
    repeat: bool
    """Whether a party may train from one version more than once."""
    privacy: PrivacyPlan | None = None
    """How each training has to be noised; None where none has to."""


class KeyframePlace(Message):
    """The newest keyframe that a frame knows of, for whoever has to choose between it and the deltas.

    Where a keyframe of the frame's own number was made, that one: it is published before the frame.
    """

    number: FrameNumber
    bytes: ByteCount
    """Of its payload; a keyframe says this of itself too, and its body cannot count itself."""
    log_bytes: ByteCount
    """The `log_bytes` of the frame that it holds whole."""


class ModelFrame(Message):
    """One broadcast: the state `number` of what the receivers hold.

    With a `base` it is a delta frame: `payload` is the change to frame `base`, none where it is empty. Without, it begins anew:
    in the keyframe log the payload is the whole model; in the model log it is empty, and the model is that of the keyframe of
    this number. So begin the first frame, and the one that an operator's rollback makes.
    """

    kind: Literal["frame"] = "frame"
    schema_version: SchemaVersion = 1
    federation: FederationId
    ledger: LedgerId
    """The ledger that numbers these frames; another one starts again from frame 1."""
    number: FrameNumber
    """Counts the frames of a ledger. A repeated number is a repeated frame."""
    base: FrameNumber | None
    version: Version
    digest: Digest
    """SHA-256 of the little-endian float32 vector that the frame yields."""
    codec: Annotated[str, Field(max_length=64)]
    """Of the payload."""
    rounding: Annotated[str | None, Field(max_length=64)] = None
    """A keyframe of this number was made in this codec: after the change, the model is rounded by it, to nearest."""
    keyframe: KeyframePlace
    log_bytes: ByteCount
    """Bytes of the bodies of all delta frames of this ledger before this one, and of this one's payload if it is a delta frame.

    The difference of two frames is what the changes between them cost. A keyframe and an announcement say what the delta frame
    of their number says; 0 for frame 1. A later frame that begins anew adds more than any keyframe has: no changes lead past it.
    """
    over: bool
    """Whether the federation has ended: this is the final model."""
    manifest: Manifest | None = None
    """Given where the frame has no base; a delta frame's is that of its base."""
    plan: Plan | None = None
    """Given where the frame has no base, and where it differs from the plan before."""
    payload: bytes

    @model_validator(mode="after")
    def _stands_alone_or_changes(self) -> Self:
        if self.base is None:
            if self.manifest is None or self.plan is None:
                raise ValueError("a frame without a base needs a manifest and a plan")
        elif self.base >= self.number:
            raise ValueError(f"frame {self.number} cannot change frame {self.base}, which does not come before it")
        return self
