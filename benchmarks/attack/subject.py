"""What is attacked: a task, how its models are trained, and the examples that may have been trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from broker_fl.privacy.accounting import noise_multiplier_for
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks.module import initial
from broker_fl.tasks.registry import load_task
from broker_fl.tasks.task import Examples, Task
from schemas.frame import TrainingPlan
from workers.dp import train_privately
from workers.trainer import train

DELTA = 1e-5
TEST_EXAMPLES = 1000
CPU = torch.device("cpu")

PRIVATE_PLAN = TrainingPlan(optimizer="adam", learning_rate=0.01)
SAMPLE_RATE, STEPS, MAX_GRAD_NORM = 0.25, 80, 0.5
"""As fits some hundred examples: on Fashion-MNIST the best of ten that were tried."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    name: str
    task: Task
    data: Path | None
    pool: Examples
    """Each model learns about half of them."""
    test: Examples
    plan: TrainingPlan
    """Without differential privacy: many passes, so that the model learns its examples by heart."""


def subject(name: str, data: Path | None, *, pool: int, epochs: int) -> Subject:
    """Raises DataError where the data cannot be had."""
    task = load_task(name)
    plan = TrainingPlan(optimizer="adam", learning_rate=2e-3, epochs=epochs, batch_size=32)
    test = task.test_examples(data)
    return Subject(name, task, data, first(task.train_examples(data), pool), first(test, TEST_EXAMPLES), plan)


def first(examples: Examples, count: int) -> Examples:
    return examples.take(torch.arange(min(count, len(examples))))


def mechanism_of(epsilon: float | None, *, sample_rate: float = SAMPLE_RATE, steps: int = STEPS) -> Mechanism | None:
    """The least noise with which one training costs so much."""
    if epsilon is None:
        return None
    noise = noise_multiplier_for(epsilon, delta=DELTA, sample_rate=sample_rate, steps=steps)
    return Mechanism(noise, sample_rate, steps, MAX_GRAD_NORM)


def trained(of: Subject, members: Tensor, *, mechanism: Mechanism | None, seed: int) -> nn.Module:
    """A model, in evaluation mode, that was trained on these members of the pool: bool, shape (len(of.pool),)."""
    module, manifest, base = initial(of.task, of.data, seed, by_example=mechanism is not None)
    chosen = of.pool.take(members.nonzero().flatten())
    if mechanism is None:
        train(
            of.task, module, chosen, base=base, manifest=manifest, plan=of.plan, device=CPU, seed=seed, should_stop=lambda: False
        )
    else:
        train_privately(
            of.task,
            module,
            chosen,
            base=base,
            manifest=manifest,
            plan=PRIVATE_PLAN,
            mechanism=mechanism,
            device=CPU,
            seed=seed,
            should_stop=lambda: False,
        )
    return module.eval()


def outputs(of: Subject, module: nn.Module, examples: Examples) -> Tensor:
    """Logits, (n, classes)."""
    with torch.no_grad():
        logits: Tensor = module(of.task.prepare(examples.inputs, None))
    return logits


def accuracy(of: Subject, module: nn.Module, examples: Examples) -> float:
    return of.task.correct(outputs(of, module, examples), examples.targets) / len(examples)
