"""How well scores tell members from others, by thresholds that were chosen elsewhere."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

FPR = 0.01
RESAMPLES = 2000
CONFIDENCE = 0.95

Scores = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Verdict:
    advantage: float
    """TPR - FPR at the threshold where it was largest on the other half."""
    low: float
    high: float
    """Of the advantage: 95 %, by bootstrap over models."""
    auc: float
    tpr: float
    """At the threshold that had an FPR of 1 % on the other half."""
    tpr_low: float
    tpr_high: float


def judged(scores: Scores, members: Flags, *, is_for_choosing: Flags, generator: np.random.Generator) -> Verdict:
    """`scores` and `members`, (models, examples): higher speaks for a member. Thresholds are chosen by the examples that
    `is_for_choosing`, (examples,), and everything that is reported is of the others, so that no choice flatters the attack.
    """
    chosen_scores, chosen_members = scores[:, is_for_choosing], members[:, is_for_choosing]
    scores, members = scores[:, ~is_for_choosing], members[:, ~is_for_choosing]
    best = best_threshold(chosen_scores, chosen_members)
    strict = float(np.quantile(chosen_scores[~chosen_members], 1 - FPR, method="higher"))
    advantage, advantages = _with_resamples(scores > best, members, generator, with_fpr=True)
    tpr, tprs = _with_resamples(scores > strict, members, generator, with_fpr=False)
    auc = float(roc_auc_score(members.ravel(), scores.ravel()))
    return Verdict(advantage, *_interval(advantages), auc, tpr, *_interval(tprs))


def best_threshold(scores: Scores, members: Flags) -> float:
    """Where TPR - FPR of what is above it is largest."""
    order = np.argsort(-scores, axis=None)
    descending, is_member = scores.ravel()[order], members.ravel()[order]
    gain = np.cumsum(is_member) / is_member.sum() - np.cumsum(~is_member) / (~is_member).sum()
    # Of equal scores, all or none are above a threshold.
    gain[:-1][descending[:-1] == descending[1:]] = -np.inf
    at = int(np.argmax(gain))
    return float(np.nextafter(descending[at], -np.inf))


def _with_resamples(
    guessed: Flags, members: Flags, generator: np.random.Generator, *, with_fpr: bool
) -> tuple[float, NDArray[np.float64]]:
    """TPR, less FPR where that is asked for: of all models, and of models drawn with replacement."""
    counts = np.stack(
        [(guessed & members).sum(axis=1), members.sum(axis=1), (guessed & ~members).sum(axis=1), (~members).sum(axis=1)]
    )
    drawn = generator.integers(counts.shape[1], size=(RESAMPLES, counts.shape[1]))
    # The first column is of each model once.
    sums = np.concatenate([counts.sum(axis=1)[:, None], counts[:, drawn].sum(axis=2)], axis=1)
    rates = sums[0] / sums[1] - (sums[2] / sums[3] if with_fpr else 0)
    return float(rates[0]), rates[1:]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
