"""How each model is trained for each epsilon, and what others reached.

Chosen by training images that were held out: samples of 2 to 10 % of all examples and 10 to 20 passes or so over them, clipping
to 1, a learning rate that falls to a tenth, and the smaller the epsilon, the lower the rate.
"""

from dataclasses import dataclass

from schemas.frame import TrainingPlan


@dataclass(frozen=True, slots=True)
class Recipe:
    trainings: int
    """Of each party."""
    steps: int
    """Of each training."""
    batch: int
    """Expected, of a party's examples."""
    learning_rate: float
    max_grad_norm: float = 1.0
    """What the gradient of one example is clipped to; not used without noise."""
    momentum: float = 0.9
    decay_to: float = 1.0

    def plan(self, *, versions: int) -> TrainingPlan:
        return TrainingPlan(
            steps=self.steps,
            batch_size=self.batch,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            decay_versions=versions,
            decay_to=self.decay_to,
        )


PARTIES = {"central": 1, "10 parties": 10}

_EPSILONS = (1.0, 2.0, 4.0, 8.0, None)


def _central(rates: tuple[float, ...], *, batch: int, plain_rate: float) -> dict[float | None, Recipe]:
    """A learning rate for each epsilon; without noise the same number of steps."""
    noised = [Recipe(10, 20, batch, rate, decay_to=0.1) for rate in rates]
    return dict(zip(_EPSILONS, [*noised, Recipe(10, 20, batch, plain_rate, decay_to=0.1)], strict=True))


def _ten(rates: tuple[float, ...], *, steps: int, batch: int, plain_rate: float) -> dict[float | None, Recipe]:
    noised = [Recipe(20, steps, batch, rate, decay_to=0.1) for rate in rates]
    return dict(zip(_EPSILONS, [*noised, Recipe(20, steps, batch, plain_rate, decay_to=0.1)], strict=True))


RECIPES: dict[tuple[str, str, str], dict[float | None, Recipe]] = {
    # task, model, setting
    ("fashion_mnist", "tanh_cnn", "central"): _central((0.5, 1.0, 1.0, 1.0), batch=1024, plain_rate=0.1),
    ("fashion_mnist", "tanh_cnn", "10 parties"): _ten((0.25, 0.5, 0.5, 0.5), steps=10, batch=100, plain_rate=0.1),
    ("fashion_mnist", "linear", "central"): _central((0.125, 0.25, 0.5, 0.5), batch=1024, plain_rate=0.001),
    ("fashion_mnist", "linear", "10 parties"): _ten((0.25, 0.25, 0.5, 0.5), steps=5, batch=200, plain_rate=0.001),
    ("cifar10", "small_cnn", "central"): _central((0.5, 0.5, 1.0, 1.0), batch=512, plain_rate=0.05),
    ("cifar10", "small_cnn", "10 parties"): _ten((0.25, 0.5, 0.5, 0.5), steps=5, batch=100, plain_rate=0.05),
    ("cifar10", "linear", "central"): _central((0.125, 0.125, 0.25, 0.5), batch=1024, plain_rate=0.001),
    ("cifar10", "linear", "10 parties"): _ten((0.125, 0.25, 0.25, 0.25), steps=5, batch=200, plain_rate=0.001),
    ("digits", "linear", "central"): {8.0: Recipe(4, 10, 128, 0.25), None: Recipe(4, 10, 128, 0.01)},
    ("digits", "linear", "10 parties"): {8.0: Recipe(2, 4, 48, 0.5), None: Recipe(2, 4, 48, 0.01)},
}

KNOWN = {
    # Of all training images, central, at delta 1e-5; the sources' own figures, quoted and not measured here.
    ("fashion_mnist", "tanh_cnn"): "about 86 % at epsilon 2.7 (tempered sigmoids, Papernot et al. 2021; from memory)",
    ("fashion_mnist", "linear"): "about 89 % at epsilon 3 (ScatterNet + linear, Tramer and Boneh 2021; from memory)",
    ("cifar10", "small_cnn"): "66.2 % at epsilon 7.5 (tempered sigmoids, Papernot et al. 2021)",
    ("cifar10", "linear"): "67.0 % at epsilon 3 (ScatterNet + linear, Tramer and Boneh 2021)",
}
