"""FedAsync (Xie, Koyejo, Gupta 2019): each update is merged when it comes, and makes a version."""

from dataclasses import dataclass, replace

import numpy as np

from aggregator.merging.fold import Contribution, Outcome, State
from aggregator.merging.staleness import STALENESS
from broker_fl.config import MergingSettings
from broker_fl.parameters import Vector


@dataclass(frozen=True, slots=True)
class FedAsync:
    """a_t = mixing_rate * s(staleness), and then one of

    delta:   x <- x + a_t * delta
    mixing:  x <- (1 - a_t) * x + a_t * (x_base + delta)      (the paper's equation, algorithm 1)

    Mixing with a sparse delta moves every parameter towards the base; deltas only what was sent, and at its cost.
    """

    settings: MergingSettings

    @property
    def max_staleness(self) -> int:
        return self.settings.max_staleness

    @property
    def keeps_bases(self) -> bool:
        return self.settings.mode == "mixing"

    @property
    def one_per_version(self) -> bool:
        return False

    @property
    def one_per_buffer(self) -> bool:
        return False

    @property
    def may_repeat(self) -> bool:
        return False

    def init(self, model: Vector) -> State:
        return State(version=0, model=model)

    def apply(self, state: State, contribution: Contribution) -> tuple[State, Outcome]:
        staleness = state.version - contribution.base_version
        weight = self.settings.mixing_rate * STALENESS[self.settings.staleness](staleness, self.settings) * contribution.factor
        merged = Outcome("merged", staleness, weight)
        if contribution.is_void:
            return replace(state, version=state.version + 1), merged
        if self.settings.mode == "mixing":
            np.multiply(state.model, np.float32(1.0 - weight), out=state.model)
            np.add(state.model, state.bases[contribution.base_version] * np.float32(weight), out=state.model)
        contribution.delta.add_to(state.model, weight)
        return replace(state, version=state.version + 1), merged

    def flush(self, state: State) -> State:
        return state
