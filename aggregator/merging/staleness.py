"""How much a late update still counts: s(t) for a staleness of t versions, with s(0) = 1 and 0 < s <= 1.

Xie, Koyejo, Gupta 2019 (FedAsync, arXiv 1903.03934), section 5.2.
"""

from collections.abc import Callable

from broker_fl.config import MergingSettings


def constant(_staleness: int, _settings: MergingSettings) -> float:
    return 1.0


def polynomial(staleness: int, settings: MergingSettings) -> float:
    """(1 + t)^-a. FedBuff's 1 / sqrt(1 + t) is a = 0.5."""
    return float((1 + staleness) ** -settings.exponent)


def hinge(staleness: int, settings: MergingSettings) -> float:
    """1 if t <= b, else 1 / (a (t - b) + 1)."""
    late = max(0, staleness - settings.hinge)
    return 1.0 / (settings.exponent * late + 1.0)


STALENESS: dict[str, Callable[[int, MergingSettings], float]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
}
