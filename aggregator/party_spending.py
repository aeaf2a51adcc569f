"""What each party's updates have cost its examples, by what the parties say of their noise.

A party's own record is the one that counts: this one finds a worker that forgets its own.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from aggregator.admission import Refused
from broker_fl.privacy.accounting import History, Steps, epsilon_of_rdp, rdp_of, total
from broker_fl.privacy.policy import Demands
from schemas.update import ModelUpdate

MOST_KINDS = 256
"""Of trainings that a party may say it did: each new noise or sample rate costs the aggregator tens of milliseconds."""


class PartySpending:
    """Of all updates that were decided, refused ones too: they were sent. What a party claims costs one sum at most."""

    def __init__(self, demands: Demands, spent: Mapping[str, History]) -> None:
        self._demands = demands
        self._spent = dict(spent)
        self._rdp: dict[str, NDArray[np.float64]] = {}
        self._over: set[str] = set()
        """Parties that are sent away for good: what was spent only grows."""

    def add(self, update: ModelUpdate) -> float | None:
        """The epsilon of the party with this update, by RDP; None for an update without noise, or with next to none (an event
        holds no infinity), or where the party's claims are of too many kinds."""
        facts, party = update.privacy, update.party
        if facts is None:
            return None
        before = self._spent.get(party, {})
        cost = Steps(facts.noise_multiplier, facts.sample_rate, update.num_steps)
        history = self._spent[party] = total(before, cost)
        if len(history) > MOST_KINDS:
            return None
        known = self._rdp.get(party)
        self._rdp[party] = (
            rdp_of(history) if known is None else known + rdp_of({(cost.noise_multiplier, cost.sample_rate): cost.steps})
        )
        epsilon = epsilon_of_rdp(self._rdp[party], delta=self._demands.plan.delta)
        return epsilon if math.isfinite(epsilon) else None

    def overspent(self, party: str) -> Refused | None:
        history = self._spent.get(party, {})
        if len(history) > MOST_KINDS:
            return Refused("privacy", f"its party has said of more than {MOST_KINDS} kinds of trainings that it did them")
        text = self._demands.overspent(history, was_over=party in self._over)
        if text is None:
            return None
        self._over.add(party)
        return Refused("privacy", text)
