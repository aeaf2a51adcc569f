"""Which elements of the large tensors are sent, by rank (see layout.py), and how the receiver learns which.

No sparsifier scales what it sends: what is left out stays in the residual of error feedback.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from broker_fl.codecs.indices import decode_indices, encode_indices
from broker_fl.codecs.layout import Indices, Layout
from broker_fl.codecs.reader import Reader
from broker_fl.codecs.splitmix import draw_seed, read_seed, seed_bytes, splitmix64
from broker_fl.parameters import Vector

_CHUNK = 1 << 16
"""Elements that are looked at in one go, so that their magnitudes stay in the cache."""
_SAMPLE = 1 << 15
_OVERSHOOT = 1.25


@dataclass(frozen=True, slots=True)
class Sparsifier:
    """`encode(vector, layout, argument, generator)` to bytes and the ranks that they stand for; `decode` to the same ranks."""

    encode: Callable[[Vector, Layout, float, np.random.Generator | None], tuple[bytes, Indices]]
    decode: Callable[[Reader, Layout, float], Indices]


def kept(count: int, density: float) -> int:
    """How many of `count` elements are sent: at least one, where there is one."""
    return min(count, max(1, round(density * count)))


def _by_indices(choose: Callable[[Vector, Layout, float], Indices]) -> Sparsifier:
    def encode(vector: Vector, layout: Layout, argument: float, _: np.random.Generator | None) -> tuple[bytes, Indices]:
        ranks = choose(vector, layout, argument)
        return encode_indices(ranks, size=layout.large), ranks

    return Sparsifier(encode, lambda reader, layout, _: decode_indices(reader, size=layout.large))


def _top_k(vector: Vector, layout: Layout, density: float) -> Indices:
    return top_k(layout.large_parts(vector), kept(layout.large, density))


def _top_k_per_tensor(vector: Vector, layout: Layout, density: float) -> Indices:
    chosen = [np.empty(0, dtype=np.int64)]
    first_rank = 0
    for start, end in layout.large_tensors:
        chosen.append(top_k([vector[start:end]], kept(end - start, density)) + first_rank)
        first_rank += end - start
    return np.concatenate(chosen)


def _over_threshold(vector: Vector, layout: Layout, threshold: float) -> Indices:
    return _at_least(layout.large_parts(vector), np.float32(threshold))[0]


def _encode_random(_: Vector, layout: Layout, density: float, generator: np.random.Generator | None) -> tuple[bytes, Indices]:
    seed = draw_seed(generator, used_for="randomk")
    return seed_bytes(seed), stratified(layout.large, kept(layout.large, density), seed=seed)


def _decode_random(reader: Reader, layout: Layout, density: float) -> Indices:
    return stratified(layout.large, kept(layout.large, density), seed=read_seed(reader))


TOP_K = _by_indices(_top_k)
"""The largest magnitudes of all large tensors together (Aji, Heafield 2017)."""
TOP_K_PER_TENSOR = _by_indices(_top_k_per_tensor)
"""The largest magnitudes of each large tensor (DGC, Lin et al. 2018)."""
THRESHOLD = _by_indices(_over_threshold)
"""Magnitudes of at least the threshold, however many (Strom 2015)."""
RANDOM_K = Sparsifier(_encode_random, _decode_random)
"""One element of each of k strata, drawn from a seed that is sent instead of indices (Konecny et al. 2016, random mask)."""


def top_k(parts: Sequence[Vector], k: int) -> Indices:
    """Ranks, in the concatenation of the parts, of exactly k largest magnitudes, shape (k,), ascending; of equal ones the first.

    A strided sample gives a threshold that a few more than k should pass; the exact selection is among those. Sorting or
    torch.topk over the whole vector is 10 to 40 times slower on a CPU. Where the sample misled, the selection is over everything.
    """
    size = sum(part.size for part in parts)
    if k >= size:
        return np.arange(size)
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    ranks, magnitudes = _at_least(parts, _sampled_threshold(parts, size, k))
    if ranks.size < k:
        ranks, magnitudes = _at_least(parts, np.float32(0))
        if ranks.size < k:
            raise ValueError(f"only {ranks.size} of {size} values are numbers: a vector that is encoded must be finite")
    least = np.partition(magnitudes, ranks.size - k)[ranks.size - k]
    chosen = magnitudes > least
    ties = np.flatnonzero(magnitudes == least)
    chosen[ties[: k - int(np.count_nonzero(chosen))]] = True
    largest: Indices = ranks[chosen]
    return largest


def stratified(size: int, k: int, *, seed: int) -> Indices:
    """k of `size` ranks, ascending: stratum i is [i size / k, (i + 1) size / k), rounded down, and its element is the one at
    floor(h width / 2^32) of it, h the upper 32 bits of splitmix64's output i."""
    ranks = np.empty(k, dtype=np.int64)
    for start in range(0, k, _CHUNK):
        count = min(_CHUNK, k - start)
        edges = np.arange(start, start + count + 1, dtype=np.int64) * size // k
        high = splitmix64(seed, start=start, count=count) >> np.uint64(32)
        high *= np.diff(edges).astype(np.uint64)
        np.add(edges[:-1], (high >> np.uint64(32)).astype(np.int64), out=ranks[start : start + count])
    return ranks


def _at_least(parts: Sequence[Vector], threshold: np.float32) -> tuple[Indices, Vector]:
    """Ranks of the magnitudes from `threshold` on, ascending, and these magnitudes."""
    magnitudes = np.empty(_CHUNK, dtype=np.float32)
    passed = np.empty(_CHUNK, dtype=np.bool_)
    found, found_magnitudes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)]
    first_rank = 0
    for part in parts:
        for start in range(0, part.size, _CHUNK):
            chunk = part[start : start + _CHUNK]
            near = np.abs(chunk, out=magnitudes[: chunk.size])
            at = np.flatnonzero(np.greater_equal(near, threshold, out=passed[: chunk.size]))
            found_magnitudes.append(near[at])
            at += first_rank + start
            found.append(at)
        first_rank += part.size
    return np.concatenate(found), np.concatenate(found_magnitudes)


def _sampled_threshold(parts: Sequence[Vector], size: int, k: int) -> np.float32:
    if size <= 2 * _SAMPLE:
        return np.float32(0)
    stride = size // _SAMPLE
    sample = np.abs(np.concatenate([part[::stride] for part in parts]))
    keep = int(sample.size * k / size * _OVERSHOOT) + 32
    if keep >= sample.size:
        return np.float32(0)
    return np.float32(np.partition(sample, sample.size - keep)[sample.size - keep])
