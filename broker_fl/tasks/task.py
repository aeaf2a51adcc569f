"""What a federation learns: the model, each party's examples, and how outputs are judged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from broker_fl.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Labelled data as it is stored. Raises DataError for targets that do not fit the inputs."""

    inputs: Tensor
    """Shape (n, ...), any dtype: `Task.prepare` turns a batch into what the model takes."""
    targets: Tensor
    """Shape (n,), int64."""

    def __post_init__(self) -> None:
        if self.targets.dtype != torch.int64 or self.targets.shape != self.inputs.shape[:1]:
            raise DataError(
                f"targets must be int64 of shape ({len(self.inputs)},), one for each input;"
                f" got {self.targets.dtype} of shape {tuple(self.targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> Self:
        """A copy of the examples at these positions, shape (k,), int64."""
        return type(self)(inputs=self.inputs[indices], targets=self.targets[indices])


class Task(Protocol):
    """A user's own task is any object with these methods; `data` is what `--data` says, None if it says nothing."""

    def build_model(self, data: Path | None) -> nn.Module:
        """A new model, its weights drawn from torch's global generator, which the caller seeds.

        Every party and the aggregator must come to the same names and shapes. BatchNorm statistics are part of them.
        """
        ...

    def train_examples(self, data: Path | None) -> Examples: ...

    def test_examples(self, data: Path | None) -> Examples: ...

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """A batch as stored -> what the model takes: float32, normalised, on the device where it came.

        Augmented only when a generator is given; it lives on the CPU.
        """
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch: a scalar, float32."""
        ...

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        """How many examples of the batch the model got right."""
        ...
