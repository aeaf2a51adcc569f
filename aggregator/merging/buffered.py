"""FedBuff and FedAvg: updates gather in a buffer, whose weighted mean makes a version.

FedBuff (Nguyen et al. 2022, algorithm 1): x <- x + eta_g * (1 / K) * sum s(t_i) * delta_i.
FedAvg (McMahan et al. 2017, algorithm 1, on deltas): x <- x + eta_g * sum n_i * delta_i / sum n_i, all from the current version.

With noise, either of them is DP-FedAvg (McMahan et al. 2018, algorithm 1, with the estimator of a fixed denominator): each delta
is clipped to the norm S, all weigh at most 1, a party has one in a buffer, and

    x <- x + eta_g * (sum w_i * clip(delta_i, S) + N(0, (z S)^2)) / K
"""

from dataclasses import dataclass, replace

import numpy as np

from aggregator.merging.fold import Buffer, Contribution, Outcome, State
from aggregator.merging.noise import Noise, noise_of
from aggregator.merging.staleness import STALENESS
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings
from broker_fl.parameters import Vector


@dataclass(frozen=True, slots=True)
class Buffered:
    settings: MergingSettings
    by_samples: bool
    """Weigh by the number of samples and divide by their sum (FedAvg), or by staleness and divide by the count (FedBuff)."""
    max_staleness: int
    one_per_version: bool
    noise: Noise | None = None

    @property
    def one_per_buffer(self) -> bool:
        return self.one_per_version or self.noise is not None

    @property
    def keeps_bases(self) -> bool:
        return False

    @property
    def may_repeat(self) -> bool:
        return not self.one_per_buffer

    def init(self, model: Vector) -> State:
        return State(version=0, model=model)

    def apply(self, state: State, contribution: Contribution) -> tuple[State, Outcome]:
        staleness = state.version - contribution.base_version
        discount = STALENESS[self.settings.staleness](staleness, self.settings)
        # A count of samples is no bound of what a party may add.
        weight = discount if not self.by_samples else 1.0 if self.noise is not None else float(contribution.num_samples)
        buffer = state.buffer or Buffer(np.zeros_like(state.model), 0.0, ())
        parties = (*buffer.parties, contribution.party)
        if contribution.is_void:
            buffer = replace(buffer, parties=parties)
        else:
            # The denominator stays: a delta that is trusted less adds less.
            factor = _clipping(contribution.delta, self.settings.clip_norm) * contribution.factor
            contribution.delta.add_to(buffer.total, weight * factor)
            buffer = Buffer(buffer.total, buffer.weight + (weight if self.by_samples else 1.0), parties)
        state = replace(state, buffer=buffer)
        if len(buffer.parties) < self.settings.buffer_size:
            return state, Outcome("buffered", staleness, weight * contribution.factor)
        return self.flush(state), Outcome("merged", staleness, weight * contribution.factor)

    def flush(self, state: State) -> State:
        buffer = state.buffer
        if buffer is None:
            return state
        version = state.version + 1
        if self.noise is not None:
            total = buffer.total + self.noise.for_version(version, covers=buffer.total)
            weight = float(self.settings.buffer_size)
        else:
            total, weight = buffer.total, buffer.weight
        if weight:  # Without, all of it was void.
            np.add(state.model, total * np.float32(self.settings.server_learning_rate / weight), out=state.model)
        return replace(state, version=version, buffer=None)


def _clipping(delta: Delta, most: float | None) -> float:
    if most is None:
        return 1.0
    norm = delta.norm()
    return 1.0 if norm <= most else most / norm


def fedbuff(settings: MergingSettings, noise_key: bytes = b"") -> Buffered:
    noise = noise_of(settings, noise_key)
    return Buffered(settings, by_samples=False, max_staleness=settings.max_staleness, one_per_version=False, noise=noise)


def fedavg(settings: MergingSettings, noise_key: bytes = b"") -> Buffered:
    """The staleness bound is 0: who missed a version is refused, and its delta goes back to its residual."""
    return Buffered(settings, by_samples=True, max_staleness=0, one_per_version=True, noise=noise_of(settings, noise_key))
