"""The tasks of benchmarks.wire: real images, a model that trains in seconds, and fewer examples than there are.

PYTHONPATH=. broker-fl ... --task benchmarks.tasks:FASHION_MNIST --data FOLDER     (FOLDER holds FashionMNIST/raw)
PYTHONPATH=. broker-fl ... --task benchmarks.tasks:CIFAR10 --data cifar10.npz

Without PYTHONPATH, the `benchmarks` that Opacus installs is found.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from broker_fl.tasks.fashion_mnist import fashion_mnist
from broker_fl.tasks.npz import npz
from broker_fl.tasks.task import Examples, Task

FASHION_MNIST_EXAMPLES = 20_000
CIFAR10_EXAMPLES = 10_000
CIFAR10_TEST_EXAMPLES = 5_000


def strided_cnn(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Strided convolutions of 16 and 32, a hidden layer of 128: 207 k parameters for 1x28x28, 270 k for 3x32x32. No BatchNorm.

    Strides instead of pooling, since pooling takes as long as everything else here.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, 16, kernel_size=5, stride=2, padding=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(32 * (height // 4) * (width // 4), 128),
            relu3=nn.ReLU(),
            out=nn.Linear(128, classes),
        )
    )


@dataclass(frozen=True)
class Subset:
    """The first so many examples of a task, loaded once for all parties of the process."""

    task: Task
    train_count: int
    test_count: int

    def build_model(self, data: Path | None) -> nn.Module:
        return self.task.build_model(data)

    def train_examples(self, data: Path | None) -> Examples:
        return _first(self, data, "train")

    def test_examples(self, data: Path | None) -> Examples:
        return _first(self, data, "test")

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.task.prepare(inputs, generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return self.task.correct(outputs, targets)


@cache
def _first(subset: Subset, data: Path | None, split: str) -> Examples:
    if split == "train":
        examples, count = subset.task.train_examples(data), subset.train_count
    else:
        examples, count = subset.task.test_examples(data), subset.test_count
    return examples.take(torch.arange(min(count, len(examples))))


FASHION_MNIST = Subset(fashion_mnist(strided_cnn), FASHION_MNIST_EXAMPLES, 10_000)
CIFAR10 = Subset(npz(strided_cnn), CIFAR10_EXAMPLES, CIFAR10_TEST_EXAMPLES)
