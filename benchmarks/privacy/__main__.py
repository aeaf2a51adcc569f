"""Accuracy against epsilon: what differential privacy costs one party that has all examples, and ten that have a tenth each.

Each row is a whole federation, without a broker: trainings by DP-SGD as workers do them, with the least noise with which all of
a party's trainings together cost `epsilon` (delta 1e-5, by Rényi differential privacy), each party with noise and a budget of its
own; updates in the codec that is the default under noise, error feedback included; merged by FedAsync. Parties are all at work at
once: in each turn their updates come in random order, so that each is about nine versions late. They train from the exact model:
broadcasts are not compressed. Without epsilon, there is neither noise nor clipping. The models are an end-to-end network
(`tanh_cnn`; for CIFAR-10 `small_cnn`, for time) and a linear one on fixed scattering features.

Of Fashion-MNIST, the first 20,000 training images and all test images; of CIFAR-10, the first 20,000 and the first 5,000. The
settings in recipes.py were chosen by the 5,000 training images after those (`--validate` measures on them) where they were
chosen, without accounting for what such a choice costs in privacy.
`accuracy` is the last model's. `known` are published results, of all training images and central.

    python -m benchmarks.privacy --data FOLDER [--json FILE] [--only task=fashion_mnist epsilon=2 ...] [--validate]
    python -m benchmarks.privacy --quick

FOLDER holds FashionMNIST/raw and cifar10.npz; what is not there is left out. --quick takes scikit-learn's digits, without a
folder. About half an hour on one core.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.privacy.federation import CODEC, DELTA, federated
from benchmarks.privacy.recipes import KNOWN, PARTIES, RECIPES, Recipe
from benchmarks.privacy.subjects import Subject, load_subject
from benchmarks.report import parser, show
from broker_fl.errors import ConfigurationError, DataError

QUICK_TASK = "digits"
FILTERS = ("task", "model", "setting", "epsilon")
SEED = 1


@dataclass(frozen=True, slots=True)
class Row:
    task: str
    model: str
    setting: str
    epsilon: float | None
    accuracy: float
    epsilon_spent: float | None
    """By the party that spent most, of all its trainings."""
    noise_multiplier: float | None
    examples: int
    """Of all parties together."""
    trainings: int
    """Of each party."""
    steps: int
    """Of each party, in all its trainings."""
    batch: int
    """Of a party, as expected."""
    learning_rate: float
    max_grad_norm: float | None
    seconds: float
    codec: str
    known: str


@dataclass(frozen=True, slots=True)
class Case:
    """One row to be measured."""

    task: str
    model: str
    setting: str
    epsilon: float | None
    recipe: Recipe

    def is_meant(self, only: Mapping[str, str]) -> bool:
        told = {"task": self.task, "model": self.model, "setting": self.setting, "epsilon": "none"}
        if self.epsilon is not None:
            told["epsilon"] = f"{self.epsilon:g}"
        return all(told[name] == value for name, value in only.items())


def cases(only: Mapping[str, str], *, quick: bool) -> Iterator[Case]:
    """Those of a task and a model come together."""
    for (task, model, setting), recipes in RECIPES.items():
        for epsilon, recipe in recipes.items():
            case = Case(task, model, setting, epsilon, recipe)
            if quick == (task == QUICK_TASK) and case.is_meant(only):
                yield case


def measured(of: Subject, case: Case, *, seed: int) -> Row:
    recipe, began = case.recipe, time.perf_counter()
    outcome = federated(of, recipe, parties=PARTIES[case.setting], epsilon=case.epsilon, seed=seed)
    return Row(
        task=case.task,
        model=case.model,
        setting=case.setting,
        epsilon=case.epsilon,
        accuracy=outcome.accuracy,
        epsilon_spent=outcome.epsilon_spent,
        noise_multiplier=outcome.noise_multiplier,
        examples=len(of.train),
        trainings=recipe.trainings,
        steps=recipe.trainings * recipe.steps,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        max_grad_norm=None if case.epsilon is None else recipe.max_grad_norm,
        seconds=time.perf_counter() - began,
        codec=CODEC,
        known=KNOWN.get((case.task, case.model), ""),
    )


def measure(planned: Sequence[Case], *, folder: Path | None, seed: int, validate: bool) -> Iterator[Row]:
    """Images are loaded, and their features made, once for all cases of a task and a model."""
    for (task, model), group in groupby(planned, key=lambda case: (case.task, case.model)):
        try:
            subject = load_subject(task, model, folder=folder, validate=validate)
        except (ConfigurationError, DataError) as exc:
            print(f"{task}, {model}: left out, since {exc}")
            continue
        for case in group:
            row = measured(subject, case, seed=seed)
            print(
                f"{task}, {model}, {case.setting}, epsilon {case.epsilon}: {row.accuracy:.4f} in {row.seconds:.0f} s", flush=True
            )
            yield row


def _filter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in FILTERS:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, where NAME is one of {', '.join(FILTERS)}; not {text!r}")
    return name, value.lower()


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--data", type=Path, help="folder with FashionMNIST/raw and cifar10.npz")
    arguments.add_argument("--quick", action="store_true", help="scikit-learn's digits only, in less than a minute")
    arguments.add_argument("--only", nargs="+", type=_filter, default=[], metavar="NAME=VALUE", help="of " + ", ".join(FILTERS))
    arguments.add_argument("--validate", action="store_true", help="measure on training images that were held out")
    arguments.add_argument("--seed", type=int, default=SEED)
    given = arguments.parse_args()
    if not given.quick and given.data is None:
        arguments.error("give --data FOLDER, or --quick")
    planned = list(cases(dict(given.only), quick=given.quick))
    torch.set_num_threads(1)
    rows = list(measure(planned, folder=given.data, seed=given.seed, validate=given.validate))
    if not rows:
        arguments.error("there is nothing to measure")
    hidden = ("codec", "known", "learning_rate", "max_grad_norm")
    show(f"Accuracy against epsilon, delta {DELTA:g}, codec {CODEC}, one thread", rows, json_file=given.json, hidden=hidden)


if __name__ == "__main__":
    main()
