"""One local training: from the federation's vector to a party's delta."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from broker_fl.errors import ConfigurationError, DataError
from broker_fl.parameters import Vector
from broker_fl.tasks.device import Precision, autocast, laid_out, place
from broker_fl.tasks.module import load_vector, vector_of
from broker_fl.tasks.seeding import seeded
from broker_fl.tasks.task import Examples, Task
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    delta: Vector
    """Trained weights - base, BatchNorm statistics among them. NaN or infinite where training diverged."""
    num_samples: int
    """The party's examples, whether or not a few steps saw them all: FedAvg's n_k."""
    num_steps: int
    mean_loss: float
    """Of the examples seen, each at the moment when it was seen."""


def train(
    task: Task,
    module: nn.Module,
    examples: Examples,
    *,
    base: Vector,
    manifest: Manifest,
    plan: TrainingPlan,
    device: torch.device,
    precision: Precision = "float32",
    channels_last: bool = False,
    seed: int,
    should_stop: Callable[[], bool],
) -> TrainResult | None:
    """Trains the module from `base`, shape (manifest.size,), by the plan; None once `should_stop` says so.

    The module is moved to the device and holds the trained weights afterwards. Order, augmentation and dropout follow
    from the seed; torch's global generators are left as they were. On the CPU the same call gives the same bits.

    A diverged result is returned as it is: it is for the caller to look and for admission to refuse. Raises
    ManifestMismatchError for another model's vector, DataError without examples, ConfigurationError where BatchNorm
    would have to learn from single examples.
    """
    if not len(examples):
        raise DataError("there are no examples to train on")
    _refuse_lone_examples(module, batch=min(plan.batch_size, len(examples)))
    place(module, device, channels_last=channels_last)
    load_vector(module, base, manifest)
    module.train()
    optimizer = optimizer_of(plan, module)
    pull = proximal_pull(module, mu=plan.proximal)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = _batches_per_epoch(module, count=len(examples), batch_size=plan.batch_size)
    num_steps = plan.steps if plan.steps is not None else plan.epochs * per_epoch
    batches = _batches(len(examples), batch_size=plan.batch_size, per_epoch=per_epoch, generator=generator)
    # Summed on the device, since reading each loss would wait for each step.
    total_loss = torch.zeros((), device=device)
    seen = 0
    with seeded(seed, device):
        for batch in islice(batches, num_steps):
            if should_stop():
                return None
            chosen = examples.take(batch.to(examples.inputs.device))
            inputs, targets = chosen.inputs.to(device), chosen.targets.to(device)
            with autocast(device, precision):
                outputs = module(laid_out(task.prepare(inputs, generator), channels_last=channels_last))
                loss = task.loss(outputs, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            pull()
            optimizer.step()
            total_loss += loss.detach() * len(targets)
            seen += len(targets)
    # A diverged model subtracts infinity from infinity; the result says so, numpy need not.
    with np.errstate(invalid="ignore", over="ignore"):
        delta = vector_of(module) - base
    return TrainResult(delta=delta, num_samples=len(examples), num_steps=num_steps, mean_loss=float(total_loss.item()) / seen)


def optimizer_of(plan: TrainingPlan, module: nn.Module) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    match plan.optimizer:
        case "sgd":
            return torch.optim.SGD(trainable, lr=plan.learning_rate, momentum=plan.momentum, weight_decay=plan.weight_decay)
        case "adam":
            return torch.optim.Adam(trainable, lr=plan.learning_rate, weight_decay=plan.weight_decay)
        case "adamw":
            return torch.optim.AdamW(trainable, lr=plan.learning_rate, weight_decay=plan.weight_decay)


def proximal_pull(module: nn.Module, *, mu: float) -> Callable[[], None]:
    """Adds mu * (w - w_base) to the gradients of the trainable parameters, as they are when this is called.

    The gradient of (mu / 2) * ||w - w_base||^2: FedProx (Li et al. 2020, eq. 2) and FedAsync's rho (Xie et al. 2019).
    """
    if mu == 0:
        return lambda: None
    anchors = [(parameter, parameter.detach().clone()) for parameter in module.parameters() if parameter.requires_grad]

    def pull() -> None:
        for parameter, anchor in anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=mu)

    return pull


def _batches(count: int, *, batch_size: int, per_epoch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions, int64, on the CPU: shuffled epoch after shuffled epoch, without end."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order, batch_size)[:per_epoch]


def _batches_per_epoch(module: nn.Module, *, count: int, batch_size: int) -> int:
    """A last batch of one is left out under BatchNorm, which finds no variance in it; the next epoch reshuffles."""
    batches = math.ceil(count / batch_size)
    ends_alone = count % batch_size == 1 and batch_size > 1 and batches > 1
    return batches - 1 if ends_alone and _has_batch_norm(module) else batches


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def _refuse_lone_examples(module: nn.Module, *, batch: int) -> None:
    """Of features, BatchNorm1d would fail with a ValueError; images have many pixels each, and go."""
    if batch == 1 and any(isinstance(layer, nn.BatchNorm1d) for layer in module.modules()):
        raise ConfigurationError("BatchNorm1d cannot learn from one example at a time: take batches of 2 or more")
