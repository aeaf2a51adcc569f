"""What a federation asks of its parties' privacy, and what a party says that it did."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.wire import Message

Accountant = Literal["rdp", "prv", "gdp"]
Clipping = Literal["auto", "flat", "ghost"]
NoiseMultiplier = Annotated[float, Field(ge=0.01, le=1000)]
"""Less hides nothing, more leaves nothing; and accountants take seconds for either."""
Epsilon = Annotated[float, Field(gt=0, le=1e6)]
Delta = Annotated[float, Field(gt=0, lt=1)]


class PrivacyPlan(Message):
    """Example-level DP-SGD (Abadi et al. 2016, algorithm 1), as every local training has to do it.

    Either the noise is given, or a target: then each party finds the noise with which `planned_trainings` of its own cost
    `target_epsilon`.
    """

    mechanism: Literal["dp-sgd"] = "dp-sgd"
    noise_multiplier: NoiseMultiplier | None = None
    """Standard deviation of the noise over the clipping norm: the paper's sigma."""
    target_epsilon: Epsilon | None = None
    planned_trainings: Annotated[int | None, Field(ge=1, lt=2**53)] = None
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)]
    """What the gradient of one example is clipped to, in L2: the paper's C."""
    clipping: Clipping = "auto"
    delta: Delta
    accountant: Accountant
    max_epsilon: Epsilon | None = None
    """What a party may spend on this federation; then it trains no more."""

    @model_validator(mode="after")
    def _says_how_much_noise(self) -> Self:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("either a noise_multiplier or a target_epsilon")
        if (self.target_epsilon is None) != (self.planned_trainings is None):
            raise ValueError("a target_epsilon goes with planned_trainings, and only then")
        return self


class PrivacyFacts(Message):
    """How the training of an update was noised. With its number of steps it is what an accountant needs."""

    mechanism: Literal["dp-sgd"] = "dp-sgd"
    noise_multiplier: NoiseMultiplier
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """The chance of each example to be in a batch, drawn anew for each step (Poisson sampling)."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)]
