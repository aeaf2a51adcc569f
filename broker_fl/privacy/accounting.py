"""What trainings cost together, by Opacus' accountants. Pure.

One step of DP-SGD is a Gaussian mechanism on a Poisson sample; a history is many of them. Three ways of composing them:

- `rdp`: Rényi differential privacy (Mironov 2017; of the sampled Gaussian: Mironov, Talwar, Zhang 2019). An upper bound, and one
  that holds where later parameters are chosen by what earlier trainings showed (Feldman, Zrnic 2021): what a limit needs.
- `prv`: privacy loss random variables (Gopi, Lee, Wutschitz 2021). An upper bound too, a tenth lower, and dear for a history of
  many different parameters.
- `gdp`: Gaussian differential privacy by its central limit theorem (Bu et al. 2020). An approximation, which may be too low, and
  Opacus has it for histories of one noise and one sample rate only.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from broker_fl.errors import PrivacyError
from schemas.privacy import Accountant

if TYPE_CHECKING:
    from opacus.accountants.accountant import IAccountant

__all__ = [
    "Accountant",
    "History",
    "Steps",
    "composed",
    "epsilon_of",
    "epsilon_of_rdp",
    "noise_multiplier_for",
    "rdp_of",
    "total",
]

_NOISE_TOLERANCE = 1e-4
"""Relative, of a noise that is searched for: it is rounded up by that much."""
_MOST_NOISE = 1000.0
_LEAST_NOISE = 1e-6
"""Below it, Opacus' sums overflow, and may never end: it hides nothing."""
_LEAST_RATE = 1e-12
"""Rarer samples are counted as such: a higher rate costs no less."""
_MOST_PRV_POINTS = 2**23
"""Of the grid, over all kinds of steps: some 2 GB and 10 seconds."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of DP-SGD that had the same parameters."""

    noise_multiplier: float
    sample_rate: float
    steps: int


History = Mapping[tuple[float, float], int]
"""Steps by (noise multiplier, sample rate): the order of steps changes no accountant's answer."""


def composed(runs: Iterable[Steps]) -> dict[tuple[float, float], int]:
    history: dict[tuple[float, float], int] = {}
    for run in runs:
        key = (run.noise_multiplier, run.sample_rate)
        history[key] = history.get(key, 0) + run.steps
    return history


def total(history: History, further: Steps | None) -> History:
    if further is None:
        return history
    key = (further.noise_multiplier, further.sample_rate)
    return {**history, key: history.get(key, 0) + further.steps}


def epsilon_of(history: History, *, delta: float, accountant: Accountant) -> float:
    """The epsilon that the history spent at this delta; 0 for none, and by `rdp` infinity for next to no noise.

    Raises PrivacyError where the accountant has no answer: `gdp` for a history of different parameters, `prv` where its numbers
    overflow or would fill the memory, which happens for noise multipliers far below 1 and for very many steps.
    """
    if not history:
        return 0.0
    if accountant == "rdp":
        return _epsilon_by_rdp(history, delta)
    if accountant == "gdp" and len(history) > 1:
        raise PrivacyError(f"accountant gdp takes trainings of one kind only, and here are {len(history)}: take rdp or prv")
    if accountant == "prv" and _prv_points(history, delta) > _MOST_PRV_POINTS:
        raise PrivacyError("accountant prv would need too much memory for this history: take rdp")
    return _epsilon_by_opacus(history, delta, accountant)


def _epsilon_by_rdp(history: History, delta: float) -> float:
    """As Opacus' RDPAccountant does it; what one step costs is asked once for each kind of step."""
    return epsilon_of_rdp(rdp_of(history), delta=delta)


def rdp_of(history: History) -> NDArray[np.float64]:
    """Rényi divergences by order, shape (109,): those of two histories are added up. The orders are Opacus'."""
    return sum((_rdp_of_a_step(noise, rate) * steps for (noise, rate), steps in history.items()), np.zeros(len(_orders())))


def epsilon_of_rdp(spent: NDArray[np.float64], *, delta: float) -> float:
    """Of what `rdp_of` gives. Raises PrivacyError where it comes to no number."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with warnings.catch_warnings():
        # That the best order is the smallest or the largest: the bound is then not the tightest, and a bound all the same.
        warnings.simplefilter("ignore")
        epsilon, _ = get_privacy_spent(orders=_orders(), rdp=spent, delta=delta)
    if math.isnan(epsilon):
        raise PrivacyError("accountant rdp has no answer for this history")
    return max(0.0, float(epsilon))


def _orders() -> list[float]:
    from opacus.accountants import RDPAccountant

    return list(RDPAccountant.DEFAULT_ALPHAS)


@lru_cache(maxsize=16_384)
def _rdp_of_a_step(noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    from opacus.accountants.analysis.rdp import compute_rdp

    if noise_multiplier < _LEAST_NOISE:
        return np.full(len(_orders()), np.inf)
    rate = max(sample_rate, _LEAST_RATE)
    cost = np.asarray(compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=_orders()), dtype=np.float64)
    # Rounding can leave it below 0, and steps multiply that.
    return np.maximum(cost, 0.0)


def _is_free_by_gdp(history: History, delta: float) -> bool:
    """Whether it is (0, delta)-private already, where Opacus finds no root."""
    from opacus.accountants.analysis.gdp import compute_mu_poisson, delta_eps_mu

    ((noise, rate), steps) = next(iter(history.items()))
    mu = compute_mu_poisson(steps=steps, noise_multiplier=noise, sample_rate=rate)
    return bool(mu == 0 or delta_eps_mu(eps=0.0, mu=mu) <= delta)


def _prv_points(history: History, delta: float) -> float:
    """Of the grid that Opacus would choose, with each kind's own: PRVAccountant._get_domain."""
    reach = 3 + _epsilon_by_rdp(history, delta / 4000)
    return len(history) * 2 * reach / 0.01 * math.sqrt(sum(history.values()) * math.log(12_000 / delta) / 2)


def _epsilon_by_opacus(history: History, delta: float, accountant: Accountant) -> float:
    opacus = _opacus(accountant)
    opacus.history = [(noise, rate, steps) for (noise, rate), steps in history.items()]
    try:
        # Opacus takes logarithms of 0 on its way, and says of gdp what we say in the docstring above.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            is_free = accountant == "gdp" and _is_free_by_gdp(history, delta)
            epsilon = 0.0 if is_free else float(opacus.get_epsilon(delta=delta))
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as exc:
        raise PrivacyError(f"accountant {accountant} has no answer for this history ({exc}): take rdp") from exc
    if not math.isfinite(epsilon):
        raise PrivacyError(f"accountant {accountant} has no answer for this history (it says {epsilon}): take rdp")
    return max(0.0, epsilon)


def _opacus(accountant: Accountant) -> "IAccountant":
    from opacus.accountants import create_accountant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        created: Any = create_accountant(mechanism=accountant)
    found: IAccountant = created
    return found


@lru_cache(maxsize=256)
def noise_multiplier_for(
    target_epsilon: float, *, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp"
) -> float:
    """The least noise, to one part in 10,000, with which so many steps cost at most `target_epsilon`.

    Raises PrivacyError where no noise is enough.
    """

    def cost(noise: float) -> float:
        try:
            return epsilon_of({(noise, sample_rate): steps}, delta=delta, accountant=accountant)
        except PrivacyError:
            # There is far too little noise for this accountant.
            return math.inf

    enough = 1.0
    while cost(enough) > target_epsilon:
        enough = min(2 * enough, _MOST_NOISE)
        if enough == _MOST_NOISE and cost(enough) > target_epsilon:
            raise PrivacyError(
                f"no noise makes {steps} steps cost epsilon {target_epsilon:g} at delta {delta:g} (accountant {accountant}): "
                "take fewer steps, or a higher target"
            )
    too_little = enough / 2
    while too_little > 1 / 64 and cost(too_little) <= target_epsilon:
        enough, too_little = too_little, too_little / 2
    while enough - too_little > _NOISE_TOLERANCE * enough:
        middle = (enough + too_little) / 2
        if cost(middle) <= target_epsilon:
            enough = middle
        else:
            too_little = middle
    return enough
