"""Whether a trained model tells who was in its data.

Many models are trained, each on the examples of a pool for which its own coins fell so; each of them is the target once, and then
the others are the attacker's shadow models, who knows all but the target's coins. Coins, not halves of equal size: the bound of
(epsilon, delta) is of one example more or less, the others being what they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.attack.bounds import advantage_bound, tightest_advantage_bound, tpr_bound
from benchmarks.attack.subject import DELTA, Subject, accuracy, mechanism_of, outputs, trained
from benchmarks.attack.verdict import FPR, Flags, Scores, Verdict, judged
from broker_fl.privacy.accounting import composed
from broker_fl.privacy.policy import Mechanism

LOSS = "loss threshold"
"""Yeom et al. 2018 (Privacy risk in machine learning): a small loss speaks for a member. No shadow models."""
OFFLINE = "likelihood ratio, offline"
"""Carlini et al. 2022 (Membership inference attacks from first principles): how far the confidence is above what models without
the example have."""
ONLINE = "likelihood ratio, online"
"""The same paper's algorithm 1: how likely the confidence is with the example in the data, against without it."""


@dataclass(frozen=True, slots=True)
class MembershipRow:
    attack: str
    task: str
    epsilon: float | None
    advantage: float
    low: float
    high: float
    bound: float
    """Of the advantage, by (epsilon, delta)."""
    tightest_bound: float
    """Of the advantage, by all that is known of the mechanism."""
    auc: float
    tpr_at_1_percent: float
    tpr_low: float
    tpr_high: float
    tpr_bound: float
    train_accuracy: float
    test_accuracy: float
    noise_multiplier: float | None
    models: int
    pool: int


@dataclass(frozen=True, slots=True, eq=False)
class Crowd:
    """Models that were trained alike."""

    members: Flags
    """(models, examples of the pool)."""
    confidences: Scores
    """Likewise: log(p / (1 - p)), where p is the probability of the true class."""
    losses: Scores
    train_accuracy: float
    test_accuracy: float


def measure(of: Subject, epsilons: Sequence[float | None], *, models: int, seed: int) -> list[MembershipRow]:
    rows = []
    for epsilon in epsilons:
        mechanism = mechanism_of(epsilon)
        crowd = crowd_of(of, mechanism, models=models, seed=seed)
        tightest = 1.0 if mechanism is None else tightest_advantage_bound(composed([mechanism.cost]))
        for attack, scores in scores_of(crowd).items():
            generator = np.random.default_rng(seed)
            is_for_choosing = generator.permutation(len(of.pool)) < len(of.pool) // 2
            found = judged(scores, crowd.members, is_for_choosing=is_for_choosing, generator=generator)
            rows.append(_row(attack, of, crowd, found, epsilon=epsilon, mechanism=mechanism, tightest=tightest))
    return rows


def crowd_of(of: Subject, mechanism: Mechanism | None, *, models: int, seed: int) -> Crowd:
    coins = torch.randint(2, (models, len(of.pool)), generator=torch.Generator().manual_seed(seed)) == 1
    confidences, losses, train_accuracies, test_accuracies = [], [], [], []
    for number, members in enumerate(coins):
        module = trained(of, members, mechanism=mechanism, seed=seed + number)
        logits = outputs(of, module, of.pool).double()
        confidences.append(confidence(logits, of.pool.targets))
        losses.append(-logits.log_softmax(dim=1).gather(1, of.pool.targets[:, None])[:, 0])
        train_accuracies.append(accuracy(of, module, of.pool.take(members.nonzero().flatten())))
        test_accuracies.append(accuracy(of, module, of.test))
    return Crowd(
        coins.numpy(),
        torch.stack(confidences).numpy(),
        torch.stack(losses).numpy(),
        float(np.mean(train_accuracies)),
        float(np.mean(test_accuracies)),
    )


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) of the true class, (n,): what Carlini et al. find to be about Gaussian. Also where p is nearly 1."""
    true = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(dim=1)
    return true - others


def scores_of(crowd: Crowd) -> dict[str, Scores]:
    """By attack, (models, examples): higher speaks for a member."""
    value = crowd.confidences
    mean_in, deviation_in = _fits(value, crowd.members)
    mean_out, deviation_out = _fits(value, ~crowd.members)
    distance_in, distance_out = (value - mean_in) / deviation_in, (value - mean_out) / deviation_out
    ratio = (distance_out**2 - distance_in**2) / 2 + np.log(deviation_out / deviation_in)
    return {LOSS: -crowd.losses, OFFLINE: distance_out, ONLINE: ratio}


def _fits(values: Scores, counted: Flags) -> tuple[Scores, NDArray[np.float64]]:
    """Gaussians for each target model, of the other models that are counted: means, (models, examples), and one standard
    deviation for all examples, (models, 1), as the paper has it for few shadow models.

    An example that no shadow model counts gets the mean of all examples.
    """
    weights = counted.astype(np.float64)
    numbers = weights.sum(axis=0) - weights
    sums = (weights * values).sum(axis=0) - weights * values
    squares = (weights * values**2).sum(axis=0) - weights * values**2
    overall = sums.sum(axis=1, keepdims=True) / numbers.sum(axis=1, keepdims=True)
    means = np.where(numbers > 0, sums / np.maximum(numbers, 1), overall)
    residual = np.maximum(squares - numbers * means**2, 0).sum(axis=1, keepdims=True)
    freedom = np.maximum(numbers - 1, 0).sum(axis=1, keepdims=True)
    return means, np.sqrt(residual / np.maximum(freedom, 1)) + 1e-9


def _row(
    attack: str,
    of: Subject,
    crowd: Crowd,
    found: Verdict,
    *,
    epsilon: float | None,
    mechanism: Mechanism | None,
    tightest: float,
) -> MembershipRow:
    models, pool = crowd.members.shape
    return MembershipRow(
        attack=attack,
        task=of.name,
        epsilon=epsilon,
        advantage=found.advantage,
        low=found.low,
        high=found.high,
        bound=advantage_bound(epsilon, DELTA),
        tightest_bound=tightest,
        auc=found.auc,
        tpr_at_1_percent=found.tpr,
        tpr_low=found.tpr_low,
        tpr_high=found.tpr_high,
        tpr_bound=tpr_bound(epsilon, DELTA, fpr=FPR),
        train_accuracy=crowd.train_accuracy,
        test_accuracy=crowd.test_accuracy,
        noise_multiplier=None if mechanism is None else mechanism.noise_multiplier,
        models=models,
        pool=pool,
    )
