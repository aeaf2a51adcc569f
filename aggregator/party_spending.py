"""What each party's updates have cost its examples, by what the parties say of their noise.

A party's own record is the one that counts: this one finds a worker that forgets its own.
"""

import math
from collections.abc import Mapping

from aggregator.admission import Refused
from broker_fl.privacy.accounting import History, Steps, epsilon_of, total
from broker_fl.privacy.policy import Demands
from schemas.update import ModelUpdate


class PartySpending:
    """Of all updates that were decided, refused ones too: they were sent."""

    def __init__(self, demands: Demands, spent: Mapping[str, History]) -> None:
        self._demands = demands
        self._spent = dict(spent)

    def add(self, update: ModelUpdate) -> float | None:
        """The epsilon of the party with this update, by RDP; None for an update without noise, or with next to none: an event
        holds no infinity."""
        facts = update.privacy
        if facts is None:
            return None
        cost = Steps(facts.noise_multiplier, facts.sample_rate, update.num_steps)
        history = self._spent[update.party] = total(self._spent.get(update.party, {}), cost)
        epsilon = epsilon_of(history, delta=self._demands.plan.delta, accountant="rdp")
        return epsilon if math.isfinite(epsilon) else None

    def overspent(self, party: str) -> Refused | None:
        text = self._demands.overspent(self._spent.get(party, {}))
        return None if text is None else Refused("privacy", text)
