"""How good a model is on some examples."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from broker_fl.errors import DataError
from broker_fl.tasks.device import Precision, autocast, laid_out, place
from broker_fl.tasks.task import Examples, Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    accuracy: float
    """The share of examples that the task counts as correct, in 0..1."""
    loss: float
    """The mean over the examples."""
    count: int


def evaluate(
    task: Task,
    module: nn.Module,
    examples: Examples,
    *,
    device: torch.device,
    batch_size: int = 512,
    channels_last: bool = False,
    precision: Precision = "float32",
) -> Evaluation:
    """Moves the module to the device; its train or eval mode is left as it was. Raises DataError for no examples."""
    if not len(examples):
        raise DataError("there are no examples to evaluate on")
    place(module, device, channels_last=channels_last)
    was_training = module.training
    module.eval()
    correct, losses = 0, []
    try:
        with torch.no_grad(), autocast(device, precision):
            for start in range(0, len(examples), batch_size):
                inputs = examples.inputs[start : start + batch_size].to(device)
                targets = examples.targets[start : start + batch_size].to(device)
                outputs: Tensor = module(laid_out(task.prepare(inputs, None), channels_last=channels_last))
                losses.append(task.loss(outputs, targets).float() * len(targets))
                correct += task.correct(outputs, targets)
    finally:
        module.train(was_training)
    loss = float(torch.stack(losses).sum().item()) / len(examples)
    return Evaluation(accuracy=correct / len(examples), loss=loss, count=len(examples))
