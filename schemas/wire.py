"""Messages to bytes and back: msgpack maps with the field names as keys, checked by pydantic.

Unknown fields are ignored, so that a newer peer may say more; a missing or malformed one is a DecodeError.
"""

from typing import ClassVar, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import DecodeError


class Message(BaseModel):
    """What crosses a wire: frozen, strictly typed, finite."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


AnyMessage = TypeVar("AnyMessage", bound=Message)

MAX_CONTAINER_LENGTH = 100_000
"""Entries of one list or map: more than the tensors of any model, small enough to be harmless."""


def encode(message: Message) -> bytes:
    """Deterministic: fields in the order of their declaration."""
    packed: bytes = msgpack.packb(message.model_dump(mode="python"), use_bin_type=True)
    return packed


def decode(kind: type[AnyMessage], body: bytes) -> AnyMessage:
    """Raises DecodeError for anything but one well-formed message of the kind."""
    # Room for a list is taken when its length is read; and an entry has a byte at least.
    most = min(MAX_CONTAINER_LENGTH, len(body))
    try:
        fields = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_str_len=65_536,
            max_bin_len=len(body),
            max_array_len=most,
            max_map_len=most,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError, RecursionError) as exc:
        raise DecodeError(f"a {kind.__name__} must be one msgpack map; got {len(body)} bytes that are not: {exc}") from exc
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "message"
        raise DecodeError(f"{kind.__name__}.{where}: {first['msg']}") from exc
