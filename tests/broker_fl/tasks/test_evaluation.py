import pytest
import torch
from torch import nn

from broker_fl.errors import DataError
from broker_fl.tasks import Examples
from broker_fl.tasks.evaluation import evaluate
from broker_fl.tasks.module import initial
from broker_fl.tasks.registry import load_task

CPU = torch.device("cpu")


class _Fixed(nn.Module):
    """Says class 1 for each row, as sure as the row's number says."""

    def forward(self, inputs):
        return torch.stack([torch.zeros(len(inputs)), inputs.reshape(len(inputs))], dim=1)


def _examples():
    inputs = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(5, 1, 1, 1) * 0.25 + 0.5
    return Examples(inputs=inputs, targets=torch.tensor([1, 1, 0, 1, 0]))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_accuracy_and_loss_are_means_over_the_examples_whatever_the_batches(batch_size):
    task = load_task("npz", classes=2, image_shape=(1, 1, 1))
    evaluation = evaluate(task, _Fixed(), _examples(), device=CPU, batch_size=batch_size)
    logits = torch.tensor([[0.0, n] for n in (1.0, 2.0, 3.0, 4.0, 5.0)])
    assert evaluation.accuracy == pytest.approx(3 / 5)
    assert evaluation.loss == pytest.approx(nn.functional.cross_entropy(logits, _examples().targets).item(), rel=1e-5)
    assert evaluation.count == 5


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"precision": "bfloat16"}])
def test_evaluating_changes_nothing_and_follows_no_chance(options):
    task = load_task("digits", model="federated_cnn")
    module, _, _ = initial(task, None, seed=0)
    module.train()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    examples = task.test_examples(None).take(torch.arange(64))
    first = evaluate(task, module, examples, device=CPU, **options)
    assert first == evaluate(task, module, examples, device=CPU, **options)
    assert first.loss == pytest.approx(evaluate(task, module, examples, device=CPU).loss, rel=0.02)
    assert module.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_no_examples_are_a_data_error():
    task = load_task("digits")
    empty = Examples(inputs=torch.zeros(0, 1, 8, 8), targets=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(DataError, match="no examples"):
        evaluate(task, nn.Flatten(), empty, device=CPU)
