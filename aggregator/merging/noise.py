"""The noise of client-level differential privacy: of a version, and the same again in a replay."""

import hashlib
import hmac
from dataclasses import dataclass, field

import numpy as np

from broker_fl.config import MergingSettings
from broker_fl.parameters import Vector

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Noise:
    """Gaussian, from a key of the ledger that never leaves it: the seed is HMAC-SHA256(key, version || SHA-256(sum)).

    The sum that it covers is part of the seed: a version that is made twice, of other updates, as after a ledger was restored
    from a backup, gets other noise, and two models with the same noise, whose difference would show what it covers, never are.
    """

    key: bytes = field(repr=False)
    std: float

    def for_version(self, version: int, *, covers: Vector) -> Vector:
        """Shape and dtype of `covers`, the sum without noise. Raises ValueError without a key."""
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        summed = hashlib.sha256(covers.astype("<f4", copy=False).tobytes()).digest()
        seed = hmac.digest(self.key, str(version).encode() + b"/" + summed, hashlib.sha256)
        # Where the sum is known, as where nobody moves a parameter, noise shows as it is: of Philox (Salmon et al. 2011), unlike
        # of a Mersenne Twister, that tells nothing of the rest.
        draws = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))
        return draws.standard_normal(covers.size, dtype=np.float32) * np.float32(self.std)


def noise_of(settings: MergingSettings, key: bytes) -> Noise | None:
    """None where the settings ask for none."""
    if settings.noise_multiplier is None or settings.clip_norm is None:
        return None
    return Noise(key, settings.noise_multiplier * settings.clip_norm)
