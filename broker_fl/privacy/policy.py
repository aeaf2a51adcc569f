"""From what a federation asks for and what a party allows to the noise of one training. Pure."""

from contextlib import suppress
from dataclasses import dataclass

from broker_fl.errors import PrivacyError
from broker_fl.privacy.accounting import Accountant, History, Steps, epsilon_of, noise_multiplier_for, total
from schemas.privacy import Clipping, PrivacyFacts, PrivacyPlan

_WORTH_ASKING = 3.0
"""No bound is lower than that of rdp by as much."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a party allows, whatever any federation asks for."""

    delta: float
    accountant: Accountant
    max_epsilon: float | None = None
    """Of all trainings on its data, those of other federations among them."""
    min_noise_multiplier: float | None = None
    must_be_noised: bool = False
    """Whether it never trains without noise; any of the two limits above comes to that."""

    @property
    def refuses_plain_training(self) -> bool:
        return self.must_be_noised or self.max_epsilon is not None or self.min_noise_multiplier is not None


@dataclass(frozen=True, slots=True)
class Mechanism:
    """DP-SGD (Abadi et al. 2016, algorithm 1), as one training does it."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    clipping: Clipping = "auto"

    @property
    def cost(self) -> Steps:
        return Steps(self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def facts(self) -> PrivacyFacts:
        return PrivacyFacts(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, max_grad_norm=self.max_grad_norm
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """So far, by the party's own record."""

    on_data: History
    """Of all federations."""
    on_federation: History


@dataclass(frozen=True, slots=True)
class Exhausted:
    """A limit that the next training would pass."""

    whose: str
    epsilon: float
    """With the next training."""
    max_epsilon: float
    delta: float
    accountant: Accountant

    def __str__(self) -> str:
        return (
            f"the next training would bring epsilon to {self.epsilon:.4g}, and {self.whose} allows {self.max_epsilon:g} "
            f"(delta {self.delta:g}, accountant {self.accountant})"
        )


def mechanism_for(plan: PrivacyPlan, limits: Limits, *, num_examples: int, batch_size: int, steps: int) -> Mechanism:
    """The sample rate is the batch size over the party's examples; the noise what the plan asks for, or the party's least if that
    is more. Raises PrivacyError for a target that no noise reaches.
    """
    rate = min(1.0, batch_size / num_examples)
    if plan.noise_multiplier is not None:
        noise = plan.noise_multiplier
    elif plan.target_epsilon is not None and plan.planned_trainings is not None:
        noise = noise_multiplier_for(
            plan.target_epsilon,
            delta=plan.delta,
            sample_rate=rate,
            steps=steps * plan.planned_trainings,
            accountant=plan.accountant,
        )
    else:
        raise PrivacyError("the federation says neither how much noise to add nor what trainings may cost")
    return Mechanism(max(noise, limits.min_noise_multiplier or 0.0), rate, steps, plan.max_grad_norm, plan.clipping)


def exhausted_by(cost: Steps | None, *, spent: Spent, plan: PrivacyPlan, limits: Limits) -> Exhausted | None:
    """The first limit that is passed with this further cost; None where both bear it. Raises PrivacyError."""
    bounds = (
        ("this party", limits.max_epsilon, spent.on_data, limits.delta, limits.accountant),
        ("the federation", plan.max_epsilon, spent.on_federation, plan.delta, plan.accountant),
    )
    for whose, most, history, delta, accountant in bounds:
        if most is None:
            continue
        epsilon = epsilon_of(total(history, cost), delta=delta, accountant=accountant)
        if epsilon > most:
            return Exhausted(whose, epsilon, most, delta, accountant)
    return None


@dataclass(frozen=True, slots=True)
class Demands:
    """Without which an aggregator takes no update. What a party says of its noise is its own word: nobody else can check it."""

    plan: PrivacyPlan
    min_noise_multiplier: float | None

    def shortfall(self, facts: PrivacyFacts | None) -> str | None:
        """What is missing; None if nothing is."""
        if facts is None:
            return f"was trained without differential privacy, and this federation asks for {self.plan.mechanism}"
        if self.min_noise_multiplier is not None and facts.noise_multiplier < self.min_noise_multiplier:
            return f"its noise multiplier {facts.noise_multiplier:g} is below this federation's {self.min_noise_multiplier:g}"
        return None

    def overspent(self, history: History, *, was_over: bool = False) -> str | None:
        """`history` is the party's, with the update in question; None while it is within what a party may spend. What was over
        stays over: nothing dear is asked again."""
        most = self.plan.max_epsilon
        if most is None:
            return None
        epsilon = epsilon_of(history, delta=self.plan.delta, accountant="rdp")
        if not was_over and most < epsilon < _WORTH_ASKING * most:
            # The other bounds are lower, and dearer, and may have no answer to what a party says.
            with suppress(PrivacyError):
                epsilon = epsilon_of(history, delta=self.plan.delta, accountant=self.plan.accountant)
        if epsilon <= most:
            return None
        return (
            f"its party has spent epsilon {epsilon:.4g} with it, and this federation allows {most:g} (delta {self.plan.delta:g})"
        )
