"""What (epsilon, delta) leaves to an attacker, and what an attack's success says about epsilon. Pure."""

import math

import numpy as np
from scipy.stats import binom

from broker_fl.privacy.accounting import History, epsilon_of

DELTAS = (1e-3, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Where a history's privacy is looked at for its tightest bound."""


def advantage_bound(epsilon: float | None, delta: float) -> float:
    """The most that TPR - FPR can be in telling two neighbouring data sets apart; 1 without differential privacy.

    The corner of the region TPR <= e^epsilon FPR + delta, 1 - FPR <= e^epsilon (1 - TPR) + delta (Kairouz, Oh, Viswanath 2015;
    Humphries et al. 2020): (e^epsilon - 1 + 2 delta) / (e^epsilon + 1).
    """
    if epsilon is None:
        return 1.0
    pure = math.tanh(epsilon / 2)
    return pure + delta * (1 - pure)


def tightest_advantage_bound(history: History) -> float:
    """The least of these bounds that the history has at any delta, by privacy loss distributions: where the one at the delta that
    an epsilon is stated for is loose, this one is nearly what the best of attackers reaches.
    """
    return min(advantage_bound(max(0.0, epsilon_of(history, delta=delta, accountant="prv")), delta) for delta in DELTAS)


def tpr_bound(epsilon: float | None, delta: float, *, fpr: float) -> float:
    """The most that TPR can be at this FPR, in the same region."""
    if epsilon is None:
        return 1.0
    return min(math.exp(epsilon) * fpr + delta, 1 - math.exp(-epsilon) * (1 - delta - fpr))


def replacing(epsilon: float | None, delta: float) -> tuple[float | None, float]:
    """The epsilon and delta of replacing an example, where the given ones are of adding or removing it: that is both in turn."""
    if epsilon is None:
        return None, delta
    return 2 * epsilon, (1 + math.exp(epsilon)) * delta


def p_value(epsilon: float, *, delta: float, canaries: int, guesses: int, correct: int) -> float:
    """At most how likely so many correct guesses were, were the mechanism (epsilon, delta)-DP.

    Each of the canaries was included by a fair coin of its own, and the auditor guessed for some of them. Steinke, Nasr,
    Jagielski 2023 (Privacy auditing with one training run): where W ~ Binomial(guesses, 1 / (1 + e^-epsilon)),

        Pr[correct >= v] <= Pr[W >= v] + delta canaries max_i (2 / i) Pr[v > W >= v - i]
    """
    right = 1 / (1 + math.exp(-epsilon))
    beta = binom.sf(correct - 1, guesses, right)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    alpha = np.max(2 * below / np.arange(1, correct + 1), initial=0.0)
    return min(1.0, float(beta + delta * canaries * alpha))


def epsilon_at_least(*, delta: float, canaries: int, guesses: int, correct: int, confidence: float) -> float:
    """The largest epsilon, to 0.001, that so many correct guesses contradict with this confidence; 0 for none."""
    low, high = 0.0, 64.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        is_contradicted = p_value(middle, delta=delta, canaries=canaries, guesses=guesses, correct=correct) <= 1 - confidence
        low, high = (middle, high) if is_contradicted else (low, middle)
    return low
