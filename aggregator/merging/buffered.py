"""FedBuff and FedAvg: updates gather in a buffer, whose weighted mean makes a version.

FedBuff (Nguyen et al. 2022, algorithm 1): x <- x + eta_g * (1 / K) * sum s(t_i) * delta_i.
FedAvg (McMahan et al. 2017, algorithm 1, on deltas): x <- x + eta_g * sum n_i * delta_i / sum n_i, all from the current version.
"""

from dataclasses import dataclass, replace

import numpy as np

from aggregator.merging.fold import Buffer, Contribution, Outcome, State
from aggregator.merging.staleness import STALENESS
from broker_fl.config import MergingSettings
from broker_fl.parameters import Vector


@dataclass(frozen=True, slots=True)
class Buffered:
    settings: MergingSettings
    by_samples: bool
    """Weigh by the number of samples and divide by their sum (FedAvg), or by staleness and divide by the count (FedBuff)."""
    max_staleness: int
    one_per_version: bool

    @property
    def keeps_bases(self) -> bool:
        return False

    @property
    def may_repeat(self) -> bool:
        return not self.one_per_version

    def init(self, model: Vector) -> State:
        return State(version=0, model=model)

    def apply(self, state: State, contribution: Contribution) -> tuple[State, Outcome]:
        staleness = state.version - contribution.base_version
        discount = STALENESS[self.settings.staleness](staleness, self.settings)
        weight = float(contribution.num_samples) if self.by_samples else discount
        buffer = state.buffer or Buffer(np.zeros_like(state.model), 0.0, ())
        parties = (*buffer.parties, contribution.party)
        if contribution.is_void:
            buffer = replace(buffer, parties=parties)
        else:
            contribution.delta.add_to(buffer.total, weight)
            buffer = Buffer(buffer.total, buffer.weight + (weight if self.by_samples else 1.0), parties)
        state = replace(state, buffer=buffer)
        if len(buffer.parties) < self.settings.buffer_size:
            return state, Outcome("buffered", staleness, weight)
        return self.flush(state), Outcome("merged", staleness, weight)

    def flush(self, state: State) -> State:
        buffer = state.buffer
        if buffer is None:
            return state
        if buffer.weight:  # Without, all of it was void.
            step = np.float32(self.settings.server_learning_rate / buffer.weight)
            np.add(state.model, buffer.total * step, out=state.model)
        return replace(state, version=state.version + 1, buffer=None)


def fedbuff(settings: MergingSettings) -> Buffered:
    return Buffered(settings, by_samples=False, max_staleness=settings.max_staleness, one_per_version=False)


def fedavg(settings: MergingSettings) -> Buffered:
    """The staleness bound is 0: who missed a version is refused, and its delta goes back to its residual."""
    return Buffered(settings, by_samples=True, max_staleness=0, one_per_version=True)
