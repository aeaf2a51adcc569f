"""A decoded payload: values, and where they belong."""

from dataclasses import dataclass

import numpy as np

from broker_fl.codecs.layout import Indices
from broker_fl.parameters import Vector


@dataclass(frozen=True, slots=True)
class Delta:
    """`values` float32, shape (k,), at `indices` of a vector of `size` elements; without indices, the whole vector."""

    size: int
    values: Vector
    indices: Indices | None = None

    def add_to(self, vector: Vector, scale: float = 1.0) -> None:
        """vector += scale * delta, in place, in float32."""
        scaled = self.values if scale == 1.0 else self.values * np.float32(scale)
        if self.indices is None:
            vector += scaled
        else:
            np.add.at(vector, self.indices, scaled)  # One pass over scattered memory; `vector[indices] += ` makes two.

    def subtract_from(self, vector: Vector) -> None:
        if self.indices is None:
            vector -= self.values
        else:
            vector[self.indices] -= self.values

    def dense(self) -> Vector:
        """A new vector, shape (size,)."""
        if self.indices is None:
            return self.values.copy()
        vector = np.zeros(self.size, dtype=np.float32)
        vector[self.indices] = self.values
        return vector

    def norm(self) -> float:
        """Euclidean, accumulated in float64 and in the same order on every machine, as BLAS would not."""
        return float(np.sqrt(np.square(self.values, dtype=np.float64).sum()))

    def largest(self) -> float:
        """The largest magnitude."""
        return float(max(self.values.max(initial=0.0), -self.values.min(initial=0.0)))

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.values).all())
