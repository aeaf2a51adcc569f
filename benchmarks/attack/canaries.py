"""Whether the accountant adds up what trainings cost together.

One auditing run (Steinke, Nasr, Jagielski 2023): thousands of canaries, of which coins choose about half, are all that a party
has, and it trains again and again from the same base. The model has a weight for each canary, and a canary's gradient is along
its own weight only, many times as long as the clipping norm: no example can move the model more, and none is in another's way.
The auditor adds up the updates, and guesses for the canaries with the largest and the smallest totals. How many guesses are right
contradicts each epsilon below some value, which an honest accountant's claim must not be: one that starts anew with each training
is caught as soon as the trainings add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.attack.bounds import advantage_bound, epsilon_at_least
from benchmarks.attack.subject import CPU, DELTA
from broker_fl.privacy.accounting import composed, epsilon_of
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks.module import initial
from broker_fl.tasks.task import Examples
from schemas.frame import TrainingPlan
from workers.dp import train_privately

STEEPNESS = 10.0
GUESSED_OF = 20
"""One canary in so many is guessed: the likeliest ones, and the least likely ones. Chosen before any run was seen."""
CONFIDENCE = 0.99
PLAN = TrainingPlan(optimizer="sgd", learning_rate=1.0, momentum=0.0)


@dataclass(frozen=True, slots=True)
class CanaryRow:
    attack: str
    task: str
    epsilon: float
    """What the product's accountant claims of all these trainings."""
    trainings: int
    forgetful_epsilon: float
    """What one claims that starts anew with each training."""
    at_least: float
    """What epsilon is at least, with 99 % confidence."""
    guesses: int
    correct: int
    advantage: float
    """TPR - FPR over all canaries, at half of what an included one's total should be."""
    bound: float
    forgetful_bound: float
    clipping: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    canaries: int


@dataclass(frozen=True, slots=True)
class Canaries:
    """A Task. An input is a canary's number, int64, (n, 1)."""

    count: int

    def build_model(self, data: Path | None) -> nn.Module:
        layer = nn.Linear(self.count, 1, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    def train_examples(self, data: Path | None) -> Examples:
        return Examples(torch.arange(self.count)[:, None], torch.zeros(self.count, dtype=torch.int64))

    def test_examples(self, data: Path | None) -> Examples:
        return self.train_examples(data)

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return functional.one_hot(inputs[:, 0], self.count).float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -STEEPNESS * outputs.mean()

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return 0


def audit(mechanism: Mechanism, *, trainings: Sequence[int], canaries: int, seed: int) -> list[CanaryRow]:
    """A row for each of these numbers of trainings, in ascending order; they are the first ones of one run."""
    included = torch.randint(2, (canaries,), generator=torch.Generator().manual_seed(seed)) == 1
    updates = _updates(mechanism, included, count=max(trainings), seed=seed)
    return [_row(mechanism, included.numpy(), updates[:number].sum(axis=0), number) for number in trainings]


def _updates(mechanism: Mechanism, included: Tensor, *, count: int, seed: int) -> NDArray[np.float64]:
    """What the party sends, (trainings, canaries): each training starts from the same base, with a seed of its own."""
    task = Canaries(len(included))
    module, manifest, base = initial(task, None, seed, by_example=True)
    chosen = task.train_examples(None).take(included.nonzero().flatten())
    deltas = []
    for number in range(count):
        result = train_privately(
            task,
            module,
            chosen,
            base=base,
            manifest=manifest,
            plan=PLAN,
            mechanism=mechanism,
            device=CPU,
            seed=seed + 1 + number,
            should_stop=lambda: False,
        )
        assert result is not None
        # In units of the clipping norm: an example that takes part in a step adds 1.
        deltas.append(result.delta * (mechanism.sample_rate * len(chosen) / (PLAN.learning_rate * mechanism.max_grad_norm)))
    return np.stack(deltas).astype(np.float64)


def _row(mechanism: Mechanism, included: NDArray[np.bool_], totals: NDArray[np.float64], trainings: int) -> CanaryRow:
    canaries = len(included)
    by_total = included[np.argsort(totals)]
    half = canaries // GUESSED_OF // 2
    correct = int((~by_total[:half]).sum() + by_total[-half:].sum())
    guessed = totals > trainings * mechanism.steps * mechanism.sample_rate / 2
    epsilon = epsilon_of(composed([mechanism.cost] * trainings), delta=DELTA, accountant="rdp")
    forgetful = epsilon_of(composed([mechanism.cost]), delta=DELTA, accountant="rdp")
    return CanaryRow(
        attack="canaries, one run",
        task=f"{canaries} canaries",
        epsilon=epsilon,
        trainings=trainings,
        forgetful_epsilon=forgetful,
        at_least=epsilon_at_least(delta=DELTA, canaries=canaries, guesses=2 * half, correct=correct, confidence=CONFIDENCE),
        guesses=2 * half,
        correct=correct,
        advantage=float(guessed[included].mean() - guessed[~included].mean()),
        bound=advantage_bound(epsilon, DELTA),
        forgetful_bound=advantage_bound(forgetful, DELTA),
        clipping=mechanism.clipping,
        noise_multiplier=mechanism.noise_multiplier,
        sample_rate=mechanism.sample_rate,
        steps=mechanism.steps,
        canaries=canaries,
    )
