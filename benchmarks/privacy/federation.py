"""A federation in this process, without a broker: parties train by turns, and the product's own codec and fold do the rest."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from aggregator.merging.fold import Contribution
from aggregator.merging.strategies import build_strategy
from benchmarks.privacy.recipes import Recipe
from benchmarks.privacy.subjects import Subject
from broker_fl.cli.demonstration.plan import mixing_rate_for
from broker_fl.codecs.codec import decode
from broker_fl.codecs.delta import Delta
from broker_fl.config import NOISED_UPDATE_CODEC, MergingSettings
from broker_fl.parameters import Vector
from broker_fl.privacy.accounting import Steps, composed, epsilon_of, noise_multiplier_for
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks.evaluation import evaluate
from broker_fl.tasks.module import initial, load_vector
from broker_fl.tasks.task import Examples
from schemas.frame import Plan, TrainingPlan
from schemas.manifest import Manifest
from workers.dp import train_privately
from workers.encoding import Budget, encode_update
from workers.trainer import train

DELTA = 1e-5
CODEC = NOISED_UPDATE_CODEC
CPU = torch.device("cpu")
CHUNK = 64
"""Examples at once: on one core faster than more of them."""


@dataclass(slots=True)
class Party:
    examples: Examples
    mechanism: Mechanism | None
    base: Vector
    base_version: int = 0
    residual: Vector | None = None
    spent: list[Steps] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    accuracy: float
    noise_multiplier: float | None
    epsilon_spent: float | None
    """The most of all parties."""


def federated(of: Subject, recipe: Recipe, *, parties: int, epsilon: float | None, seed: int) -> Outcome:
    """All parties are at work at once: each trains from the model that its last update made, and in each turn their updates come
    in random order. They are merged by FedAsync, one by one, so that one turn makes a whole step, however many parties.
    """
    module, manifest, start = initial(of.task, of.data, seed, by_example=True)
    merging = MergingSettings(strategy="fedasync", mixing_rate=mixing_rate_for(parties))
    strategy = build_strategy(merging)
    state = strategy.init(start.copy())
    members = [Party(share, _mechanism(recipe, epsilon, len(share)), start) for share in _shares(of.train, parties)]
    plan = recipe.plan(versions=parties * recipe.trainings)
    generator = np.random.default_rng(seed)
    for _ in range(recipe.trainings):
        for number in generator.permutation(parties):
            party = members[number]
            delta = _update(of, module, party, plan=plan.at(party.base_version), manifest=manifest, generator=generator)
            state, _ = strategy.apply(state, Contribution(str(number), delta, party.base_version, len(party.examples)))
            party.base, party.base_version = state.model.copy(), state.version
    load_vector(module, state.model, manifest)
    accuracy = evaluate(of.task, module, of.test, device=CPU, batch_size=CHUNK).accuracy
    if epsilon is None:
        return Outcome(accuracy, None, None)
    spent = max(epsilon_of(composed(party.spent), delta=DELTA, accountant="rdp") for party in members)
    assert spent <= epsilon, f"{spent} was spent of {epsilon}"
    return Outcome(accuracy, max(party.mechanism.noise_multiplier for party in members if party.mechanism is not None), spent)


def _shares(examples: Examples, parties: int) -> list[Examples]:
    """Equal ones, of examples in random order. They are views: features are large."""
    inputs, targets = (tensor.tensor_split(parties) for tensor in (examples.inputs, examples.targets))
    return [Examples(*share) for share in zip(inputs, targets, strict=True)]


def _mechanism(recipe: Recipe, epsilon: float | None, count: int) -> Mechanism | None:
    """The least noise with which all trainings of a party cost so much."""
    if epsilon is None:
        return None
    rate = min(1.0, recipe.batch / count)
    noise = noise_multiplier_for(epsilon, delta=DELTA, sample_rate=rate, steps=recipe.trainings * recipe.steps)
    return Mechanism(noise, rate, recipe.steps, recipe.max_grad_norm, "ghost")


def _update(
    of: Subject, module: nn.Module, party: Party, *, plan: TrainingPlan, manifest: Manifest, generator: np.random.Generator
) -> Delta:
    """As the federation decodes it. What the codec leaves out goes into the party's next one."""
    seed = int(generator.integers(2**62))
    if party.mechanism is None:
        result = train(
            of.task,
            module,
            party.examples,
            base=party.base,
            manifest=manifest,
            plan=plan,
            device=CPU,
            seed=seed,
            should_stop=lambda: False,
        )
    else:
        result = train_privately(
            of.task,
            module,
            party.examples,
            base=party.base,
            manifest=manifest,
            plan=plan,
            mechanism=party.mechanism,
            device=CPU,
            chunk=CHUNK,
            seed=seed,
            should_stop=lambda: False,
        )
        party.spent.append(party.mechanism.cost)
    assert result is not None
    encoded = encode_update(
        result.delta,
        residual=party.residual,
        velocity=None,
        plan=Plan(training=plan, update_codec=CODEC, fraction=1, repeat=False),
        manifest=manifest,
        budget=Budget(),
        uplink_bytes_per_s=None,
        fields_bytes=0,
        generator=generator,
    )
    party.residual = encoded.residual
    return decode(encoded.payload, encoded.codec, manifest=manifest)
