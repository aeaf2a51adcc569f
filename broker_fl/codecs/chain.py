"""What a frame makes of a model. The aggregator and all who follow it compute this, to the same bits.

Additions and roundings are element by element in float32, so that they do not depend on the machine.
"""

import numpy as np

from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.delta import Delta
from broker_fl.config import KEYFRAME_CODECS
from broker_fl.errors import ConfigurationError, DecodeError, nearest
from broker_fl.parameters import Vector
from schemas.frame import ModelFrame
from schemas.manifest import Manifest


def whole_model(frame: ModelFrame, *, manifest: Manifest) -> Vector:
    """The model that a keyframe holds, shape (manifest.size,), finite. Raises DecodeError."""
    return _decoded(frame, manifest).dense()


def change(model: Vector, frame: ModelFrame, *, manifest: Manifest) -> None:
    """The model of the frame's base becomes the frame's, in place. Raises DecodeError, and the model is then as it was.

    Finite changes that overflow leave infinities, which no aggregator broadcasts: the digest tells.
    """
    if frame.rounding is not None and frame.rounding not in KEYFRAME_CODECS:
        raise DecodeError(f"frame {frame.number} rounds by {frame.rounding!r}: {nearest(frame.rounding, KEYFRAME_CODECS)}")
    if frame.payload:
        with np.errstate(over="ignore"):
            _decoded(frame, manifest).add_to(model)
    if frame.rounding is not None:
        model[:] = rounded(model, frame.rounding, manifest=manifest)[1]


def rounded(model: Vector, codec: str, *, manifest: Manifest) -> tuple[bytes, Vector]:
    """A keyframe's payload, rounded to nearest, and the model that it holds."""
    parsed = parse_codec(codec)
    payload = encode(model, parsed, manifest=manifest)
    return payload, decode(payload, parsed, manifest=manifest).dense()


def _decoded(frame: ModelFrame, manifest: Manifest) -> Delta:
    try:
        codec = parse_codec(frame.codec)
    except ConfigurationError as exc:
        raise DecodeError(f"frame {frame.number} is in a codec that this version does not know: {exc}") from exc
    delta = decode(frame.payload, codec, manifest=manifest)
    if not delta.is_finite():
        raise DecodeError(f"frame {frame.number} holds NaN or infinity")
    return delta
