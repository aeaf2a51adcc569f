"""What is written down of trainings with differential privacy."""

from dataclasses import dataclass

from broker_fl.privacy.accounting import Steps


@dataclass(frozen=True, slots=True)
class Training:
    """One of which something may have left the party. `at` in seconds since 1970 by the worker's clock."""

    at: float
    federation: str
    party: str
    outbox: str
    """Of the outbox that it went through."""
    ledger: str
    base_version: int
    update_id: str | None
    """None where it diverged, and nothing was sent but silence."""
    noise_multiplier: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    num_examples: int
    number: int | None = None
    """The record counts them, from 1."""

    @property
    def cost(self) -> Steps:
        return Steps(self.noise_multiplier, self.sample_rate, self.steps)


@dataclass(frozen=True, slots=True)
class Promise:
    """From when on which limits and which plan were in force."""

    at: float
    federation: str
    party: str
    limits: str
    """The party's own (policy.Limits), as JSON."""
    plan: str
    """The federation's (schemas.privacy.PrivacyPlan), as JSON."""
