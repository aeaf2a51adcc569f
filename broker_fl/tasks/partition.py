"""One labelled data set split among parties, for simulations and demonstrations. Pure numpy."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from broker_fl.errors import ConfigurationError, nearest

Scheme = Literal["iid", "dirichlet", "shards"]
SCHEMES = ("iid", "dirichlet", "shards")

Labels = NDArray[np.integer]
Indices = NDArray[np.int64]


def split(
    labels: Labels,
    *,
    parties: int,
    scheme: Scheme,
    seed: int,
    alpha: float = 0.5,
    shards_per_party: int = 2,
    sizes: Sequence[float] | None = None,
) -> list[Indices]:
    """The positions that each party holds, ascending, int64: every one of `labels`, shape (n,), with just one party.

    - iid: a random share each. `sizes` are the ratios of the shares.
    - dirichlet: label skew; see `_by_dirichlet`. `sizes` are the ratios of the shares on average.
    - shards: few labels each; see `_by_shards`. Refuses `sizes`.

    No party is left without samples. The same seed gives the same split. Raises ConfigurationError for arguments that
    cannot be met.
    """
    ratios = _ratios(sizes, parties=parties)
    if labels.ndim != 1 or len(labels) < parties:
        raise ConfigurationError(f"{parties} parties need as many labels in one row; got shape {labels.shape}")
    generator = np.random.default_rng(seed)
    match scheme:
        case "iid":
            shares = _evenly(generator, len(labels), ratios)
        case "dirichlet":
            shares = _by_dirichlet(generator, labels, alpha=alpha, ratios=ratios)
        case "shards":
            if sizes is not None:
                raise ConfigurationError("sizes cannot be had with shards, which are equal; use iid or dirichlet")
            shares = _by_shards(generator, labels, parties=parties, shards_per_party=shards_per_party)
        case _:
            raise ConfigurationError(f"there is no way to split called {scheme!r}: {nearest(scheme, SCHEMES)}")
    return [np.sort(share).astype(np.int64) for share in shares]


def _ratios(sizes: Sequence[float] | None, *, parties: int) -> NDArray[np.float64]:
    """Shares that sum to 1, shape (parties,)."""
    if parties < 1:
        raise ConfigurationError(f"parties must be 1 or more; got {parties}")
    ratios = np.asarray([1.0] * parties if sizes is None else sizes, dtype=np.float64)
    if ratios.shape != (parties,) or not np.all(np.isfinite(ratios)) or np.any(ratios <= 0):
        raise ConfigurationError(f"sizes must be {parties} positive numbers, one for each party; got {list(ratios)}")
    total: np.float64 = ratios.sum()
    return ratios / total


def _evenly(generator: np.random.Generator, count: int, ratios: NDArray[np.float64]) -> list[Indices]:
    return _topped_up(generator, _cut(generator.permutation(count), ratios), minimum=1)


def _by_dirichlet(generator: np.random.Generator, labels: Labels, *, alpha: float, ratios: NDArray[np.float64]) -> list[Indices]:
    """Each class is dealt out in proportions drawn from Dirichlet(alpha * parties * ratios).

    With equal ratios that is Dir(alpha) as in NIID-Bench (Li et al. 2022, "distribution-based label imbalance"), after
    Hsu et al. 2019 (arXiv 1909.06335), who draw for each party instead of each class. The smaller alpha, the more skew.
    NIID-Bench draws again until each party has 10 samples, which may take for ever; here who has fewer than 10, or
    than a tenth of an equal share, gets some from whoever has most.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigurationError(f"alpha must be a positive number; got {alpha}")
    parties = len(ratios)
    dealt: list[list[Indices]] = [[] for _ in range(parties)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        for party, share in enumerate(_cut(members, generator.dirichlet(alpha * parties * ratios))):
            dealt[party].append(share)
    minimum = max(1, min(10, len(labels) // (10 * parties)))
    return _topped_up(generator, [np.concatenate(shares) for shares in dealt], minimum=minimum)


def _by_shards(generator: np.random.Generator, labels: Labels, *, parties: int, shards_per_party: int) -> list[Indices]:
    """Sorted by label, cut into equal shards, a few for each party (McMahan et al. 2017, arXiv 1602.05629)."""
    shards = parties * shards_per_party
    if shards_per_party < 1 or shards > len(labels):
        raise ConfigurationError(
            f"shards_per_party must be from 1 to {len(labels) // parties} for {len(labels)} samples; got {shards_per_party}"
        )
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, shards)
    dealt = generator.permutation(shards).reshape(parties, shards_per_party)
    return [np.concatenate([pieces[shard] for shard in own]) for own in dealt]


def _cut(order: Indices, proportions: NDArray[np.float64]) -> list[Indices]:
    """Consecutive pieces in these proportions, to the nearest whole number."""
    ends = np.rint(np.cumsum(proportions)[:-1] * len(order)).astype(np.int64)
    return np.split(order, ends)


def _topped_up(generator: np.random.Generator, shares: list[Indices], *, minimum: int) -> list[Indices]:
    """Nobody below the minimum: samples at random from the largest share, one by one. n >= parties * minimum."""
    shares = list(shares)
    for poor in range(len(shares)):
        while len(shares[poor]) < minimum:
            rich = max(range(len(shares)), key=lambda party: len(shares[party]))
            taken = int(generator.integers(len(shares[rich])))
            shares[poor] = np.append(shares[poor], shares[rich][taken])
            shares[rich] = np.delete(shares[rich], taken)
    return shares
