"""The layout of a model's parameter vector."""

import hashlib
import math
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.ids import Digest
from schemas.wire import Message

MAX_PARAMETERS = 2**31 - 1


class TensorSpec(Message):
    """One named float32 tensor in the vector: `offset` counts elements from its start."""

    name: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\n]+$")]
    """Without line breaks, since the manifest's digest is taken over lines."""
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, max_length=16)]
    offset: Annotated[int, Field(ge=0)]

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)


class Manifest(Message):
    """Names, shapes and offsets of the tensors that make up the vector, in order and without gaps."""

    tensors: Annotated[tuple[TensorSpec, ...], Field(strict=False, min_length=1, max_length=100_000, fail_fast=True)]
    dtype: Literal["float32"] = "float32"

    @model_validator(mode="after")
    def _is_contiguous(self) -> Self:
        expected = 0
        for tensor in self.tensors:
            if tensor.offset != expected:
                raise ValueError(f"tensor {tensor.name!r} should start at {expected}, not {tensor.offset}")
            expected += tensor.size
        if expected > MAX_PARAMETERS:
            raise ValueError(f"{expected} parameters are more than the {MAX_PARAMETERS} that a vector may have")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ValueError("two tensors share a name")
        return self

    @cached_property
    def size(self) -> int:
        """Elements of the whole vector."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 of the lines `name:dim,dim,...` in order: equal for equal layouts, in any language."""
        lines = "\n".join(f"{tensor.name}:{','.join(map(str, tensor.shape))}" for tensor in self.tensors)
        return hashlib.sha256(lines.encode()).hexdigest()
