"""A user's own task: three cultivars of wine told apart by 13 chemical measurements."""

from pathlib import Path

import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn
from torch.nn import functional

from broker_fl.tasks import Examples


class Wine:
    def build_model(self, data: Path | None) -> nn.Module:
        return nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))

    def train_examples(self, data: Path | None) -> Examples:
        return self._every_fifth(is_test=False)

    def test_examples(self, data: Path | None) -> Examples:
        return self._every_fifth(is_test=True)

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, std = MOMENTS
        return ((inputs - mean) / std).float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return int((outputs.argmax(dim=1) == targets).sum())

    def _every_fifth(self, *, is_test: bool) -> Examples:
        chosen = (torch.arange(len(TARGETS)) % 5 == 0) == is_test
        return Examples(inputs=INPUTS[chosen], targets=TARGETS[chosen])


INPUTS, TARGETS = (torch.from_numpy(array) for array in load_wine(return_X_y=True))
TARGETS = TARGETS.long()
MOMENTS = (INPUTS.mean(dim=0), INPUTS.std(dim=0))
