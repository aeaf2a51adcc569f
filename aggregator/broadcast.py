"""Making frames, and when the next one is due. Pure."""

from dataclasses import dataclass

import numpy as np

from aggregator.ledger import FrameRow
from broker_fl.codecs.codec import Codec, decode, encode, parse_codec
from broker_fl.parameters import Vector, digest
from schemas import wire
from schemas.frame import ModelFrame, TrainingPlan
from schemas.manifest import Manifest

_EXACT = parse_codec("float32")


@dataclass(frozen=True, slots=True)
class BroadcastPlan:
    """What every frame of this federation says beside the model, and how often there is one."""

    federation: str
    ledger_id: str
    manifest: Manifest
    codec: str
    update_codec: str
    training: TrainingPlan
    fraction: float
    repeat: bool
    every_versions: int
    every_s: float


@dataclass(frozen=True, slots=True)
class Broadcast:
    row: FrameRow
    model: Vector
    """What the receivers will hold."""


def make_frame(plan: BroadcastPlan, model: Vector, *, version: int, number: int, over: bool, at: float) -> Broadcast:
    """A keyframe. The rounding of a lossy codec is drawn from the version, so that a version always decodes to the same bits."""
    codec = parse_codec(plan.codec)
    payload = _payload(model, codec, version=version, manifest=plan.manifest)
    received = decode(payload, codec, manifest=plan.manifest).dense()
    frame = ModelFrame(
        federation=plan.federation,
        ledger=plan.ledger_id,
        number=number,
        version=version,
        digest=digest(received),
        manifest=plan.manifest,
        codec=codec.name,
        training=plan.training,
        update_codec=plan.update_codec,
        fraction=plan.fraction,
        repeat=plan.repeat,
        over=over,
        payload=payload,
    )
    body = wire.encode(frame)
    row = FrameRow(
        number=number,
        at=at,
        version=version,
        digest=frame.digest,
        model_digest=frame.digest if codec == _EXACT else digest(model),
        codec=codec.name,
        over=over,
        size=len(body),
        body=body,
    )
    return Broadcast(row, received)


def received_model(model: Vector, codec: str, *, version: int, manifest: Manifest) -> Vector:
    """What receivers hold of this version: for replay, which needs no frame to know it."""
    parsed = parse_codec(codec)
    return decode(_payload(model, parsed, version=version, manifest=manifest), parsed, manifest=manifest).dense()


def _payload(model: Vector, codec: Codec, *, version: int, manifest: Manifest) -> bytes:
    return encode(model, codec, manifest=manifest, generator=np.random.default_rng(version))


def is_due(plan: BroadcastPlan, last: FrameRow | None, *, version: int, now: float) -> bool:
    """Whether enough was merged, or enough time went by since the last frame; never while that one waits to be published."""
    if last is None:
        return True
    if last.published_at is None:
        return False
    if version == last.version:
        # Where only a share of the parties trains from each frame, a frame that drew none must not be the last.
        return plan.fraction < 1 and now - last.at >= max(plan.every_s, 5.0)
    return version - last.version >= plan.every_versions or now - last.at >= plan.every_s
