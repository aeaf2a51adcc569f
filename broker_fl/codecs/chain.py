"""What a frame makes of a model. The aggregator and all who follow it compute this, to the same bits.

Additions and roundings are element by element in float32, so that they do not depend on the machine.
"""

from broker_fl.codecs.codec import Codec, decode, encode, parse_codec
from broker_fl.errors import ConfigurationError, DecodeError
from broker_fl.parameters import Vector
from schemas.frame import ModelFrame
from schemas.manifest import Manifest


def whole_model(frame: ModelFrame, *, manifest: Manifest) -> Vector:
    """The model that a keyframe holds, shape (manifest.size,). Raises DecodeError."""
    return decode(frame.payload, _codec(frame.codec, frame), manifest=manifest).dense()


def change(model: Vector, frame: ModelFrame, *, manifest: Manifest) -> None:
    """The model of the frame's base becomes the frame's, in place. Raises DecodeError, and the model is then as it was."""
    rounding = None if frame.rounding is None else _codec(frame.rounding, frame)
    if frame.payload:
        decode(frame.payload, _codec(frame.codec, frame), manifest=manifest).add_to(model)
    if rounding is not None:
        model[:] = decode(encode(model, rounding, manifest=manifest), rounding, manifest=manifest).values


def rounded(model: Vector, codec: str, *, manifest: Manifest) -> tuple[bytes, Vector]:
    """A keyframe's payload, rounded to nearest, and the model that it holds."""
    parsed = parse_codec(codec)
    payload = encode(model, parsed, manifest=manifest)
    return payload, decode(payload, parsed, manifest=manifest).dense()


def _codec(name: str, frame: ModelFrame) -> Codec:
    try:
        return parse_codec(name)
    except ConfigurationError as exc:
        raise DecodeError(f"frame {frame.number} is in a codec that this version does not know: {exc}") from exc
