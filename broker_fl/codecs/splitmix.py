"""Numbers that both sides draw from eight bytes, in any language (Steele, Lea, Flood 2014, SplitMix64; Vigna's constants)."""

import numpy as np
from numpy.typing import NDArray

from broker_fl.codecs.reader import Reader
from broker_fl.errors import ConfigurationError

SEED_BYTES = 8


def splitmix64(seed: int, *, start: int, count: int) -> NDArray[np.uint64]:
    """Outputs start, start + 1, ... of the sequence of `seed`, shape (count,)."""
    z = np.arange(start + 1, start + 1 + count, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def draw_seed(generator: np.random.Generator | None, *, used_for: str) -> int:
    """Raises ConfigurationError without a generator: who rounds to nearest has no seed to send."""
    if generator is None:
        raise ConfigurationError(f"{used_for} draws a seed: pass a generator, or choose a codec without randomness")
    return int(generator.integers(0, 2**64, dtype=np.uint64))


def seed_bytes(seed: int) -> bytes:
    return seed.to_bytes(SEED_BYTES, "little")


def read_seed(reader: Reader) -> int:
    return int.from_bytes(reader.take(SEED_BYTES, "seed").tobytes(), "little")
