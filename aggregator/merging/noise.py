"""The noise of client-level differential privacy: of a version, and the same again in a replay."""

import hashlib
import hmac
from dataclasses import dataclass

import numpy as np

from broker_fl.config import MergingSettings
from broker_fl.parameters import Vector

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Noise:
    """Gaussian, with a seed for each version from the ledger's key, which never leaves the ledger: HMAC-SHA256(key, version).

    Versions are never made twice, not even after a rollback, so that no noise is used for two buffers.
    """

    key: bytes
    std: float

    def for_version(self, version: int, *, size: int) -> Vector:
        """Shape (size,), float32. Raises ValueError without a key."""
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(self.key)}")
        seed = hmac.digest(self.key, str(version).encode(), hashlib.sha256)
        # Not numpy's newer generators: what this one draws is the same in all of numpy's versions (NEP 19).
        draws = np.random.RandomState(np.frombuffer(seed, dtype="<u4").astype(np.uint32))
        drawn: Vector = (draws.standard_normal(size) * self.std).astype(np.float32)
        return drawn


def noise_of(settings: MergingSettings, key: bytes) -> Noise | None:
    """None where the settings ask for none."""
    if settings.noise_multiplier is None or settings.clip_norm is None:
        return None
    return Noise(key, settings.noise_multiplier * settings.clip_norm)
