"""A task of the user's own that is learnt in milliseconds: three clouds of points, far from each other."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from broker_fl.tasks import Examples

FEATURES, CLASSES, EXAMPLES = 8, 3, 240

PAUSE_S = 0.01
"""Of each training step: a run has a middle to be killed in, and leaves the processor to the others."""


class Blobs:
    def __init__(self, *, hidden: int) -> None:
        self._hidden = hidden

    def build_model(self, data: Path | None) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, self._hidden), nn.ReLU(), nn.Linear(self._hidden, CLASSES))

    def train_examples(self, data: Path | None) -> Examples:
        return _drawn(seed=1)

    def test_examples(self, data: Path | None) -> Examples:
        return _drawn(seed=2)

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is not None:
            time.sleep(PAUSE_S)
        return inputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return int((outputs.argmax(dim=1) == targets).sum())


def _drawn(*, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.eye(CLASSES, FEATURES)
    targets = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    return Examples(inputs=centres[targets] + torch.randn(EXAMPLES, FEATURES, generator=generator), targets=targets)


TASK = Blobs(hidden=16)

WIDE = Blobs(hidden=2048)
"""Its model has about 100 kB."""
