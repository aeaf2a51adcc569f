"""Which elements of a vector are sent."""

import numpy as np

from broker_fl.codecs.indices import Indices
from broker_fl.parameters import Vector

_SAMPLE = 32_768
_OVERSHOOT = 1.25


def top_k(magnitudes: Vector, k: int) -> Indices:
    """Indices of exactly k largest magnitudes, shape (k,), ascending; deterministic.

    A strided sample gives a threshold that a few more than k should pass; the exact selection is among those. Sorting or
    torch.topk over the whole vector is 10 to 40 times slower on a CPU. Where the sample misled, the selection is over everything.
    """
    if k >= magnitudes.size:
        return np.arange(magnitudes.size)
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    candidates = _candidates(magnitudes, k)
    if candidates.size < k:
        candidates = np.arange(magnitudes.size)
    surplus = candidates.size - k
    chosen = candidates[np.argpartition(magnitudes[candidates], surplus)[surplus:]] if surplus else candidates
    return np.sort(chosen)


def _candidates(magnitudes: Vector, k: int) -> Indices:
    if magnitudes.size <= 2 * _SAMPLE:
        return np.arange(magnitudes.size)
    sample = magnitudes[:: magnitudes.size // _SAMPLE]
    keep = int(sample.size * k / magnitudes.size * _OVERSHOOT) + 32
    if keep >= sample.size:
        return np.arange(magnitudes.size)
    threshold = np.partition(sample, sample.size - keep)[sample.size - keep]
    return np.flatnonzero(magnitudes >= threshold)
