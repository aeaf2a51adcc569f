"""A task whose every training is known beforehand: so that it can be told afterwards what became of each.

The gradient does not depend on the weights, but only on numbers drawn from the training's seed, which follows from the party
and the sequence number. Whoever knows these makes every delta again, and can add up what ought to have gone into the model.
"""

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from broker_fl.tasks import Examples

FEATURES, OUTPUTS, EXAMPLES = 40, 1000, 4

PAUSE_S = 0.02
"""Of each training: a run has a middle to be killed in, and leaves the processor to the others."""


class Drift:
    def __init__(self, *, pause_s: float) -> None:
        self._pause_s = pause_s
        # Of very different sizes, so that top-k has something to choose.
        self._slopes = torch.logspace(0, -3, OUTPUTS)

    def build_model(self, data: Path | None) -> nn.Module:
        return nn.Linear(FEATURES, OUTPUTS, bias=False)

    def train_examples(self, data: Path | None) -> Examples:
        return Examples(torch.zeros(EXAMPLES, FEATURES), torch.zeros(EXAMPLES, dtype=torch.int64))

    def test_examples(self, data: Path | None) -> Examples:
        return self.train_examples(data)

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return inputs
        time.sleep(self._pause_s)
        return torch.randn(inputs.shape, generator=generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * self._slopes).sum(1).mean()

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return 0


TASK = Drift(pause_s=PAUSE_S)

KNOWN = Drift(pause_s=0.0)
"""The same, for whoever makes the deltas again."""
