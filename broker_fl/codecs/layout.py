"""Small tensors and large ones: the former are sent whole, of the latter a sparsifier chooses elements by rank.

Ranks count the elements of large tensors alone, in the order of the vector. A rank is below `large`, so that no rank can name an
element of a small tensor.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from broker_fl.parameters import Vector
from schemas.manifest import Manifest

SMALL_TENSOR = 1024
"""Tensors of up to this many elements are sent whole: biases, normalisation, first layers."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    size: int
    """Elements of the vector."""
    small: Indices
    """Positions of the elements of small tensors, ascending, shape (s,)."""
    spans: tuple[tuple[int, int], ...]
    """Where runs of large tensors begin and end in the vector."""
    large_tensors: tuple[tuple[int, int], ...]
    """Where each large tensor begins and ends in the vector."""

    @property
    def large(self) -> int:
        """Elements of large tensors."""
        return self.size - self.small.size

    def large_parts(self, vector: Vector) -> list[Vector]:
        """Views of the large elements, in order."""
        return [vector[start:end] for start, end in self.spans]

    def positions(self, ranks: Indices) -> Indices:
        """Where in the vector elements of these ascending ranks are, shape as `ranks`."""
        if len(self.spans) == 1:
            return ranks + self.spans[0][0] if self.spans[0][0] else ranks
        starts = np.array([start for start, _ in self.spans], dtype=np.int64)
        lengths = np.array([end - start for start, end in self.spans], dtype=np.int64)
        first_ranks = np.cumsum(lengths) - lengths
        chosen = np.diff(np.searchsorted(ranks, first_ranks), append=ranks.size)
        positions: Indices = ranks + np.repeat(starts - first_ranks, chosen)
        return positions


def layout_of(manifest: Manifest) -> Layout:
    return _layout(tuple(tensor.size for tensor in manifest.tensors))


@lru_cache(maxsize=8)
def _layout(sizes: tuple[int, ...]) -> Layout:
    small: list[Indices] = [np.empty(0, dtype=np.int64)]
    large: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for size in sizes:
        end = start + size
        if size <= SMALL_TENSOR:
            small.append(np.arange(start, end))
        else:
            large.append((start, end))
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        start = end
    positions = np.concatenate(small)
    positions.flags.writeable = False
    return Layout(start, positions, tuple(spans), tuple(large))
