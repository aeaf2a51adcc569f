"""Whether one update shows the image that it was trained on.

A model whose first layer is linear, one step of SGD, one image. The gradient of a linear layer for one example is the outer
product of the gradient by its outputs and (image, 1), so that it gives the image away exactly and in closed form (Phong et al.
2018, Privacy-preserving deep learning via additively homomorphic encryption; Geiping et al. 2020, Inverting gradients; Zhu et al.
2019, Deep leakage from gradients, come to the same by optimisation). Of a noised gradient the best outer product, by least
squares, is its first singular pair (Eckart and Young 1936), which is what is most likely under Gaussian noise.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.attack.bounds import advantage_bound, replacing
from benchmarks.attack.subject import CPU, DELTA, first, mechanism_of
from broker_fl.parameters import Vector, unflatten
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks.digits import digits
from broker_fl.tasks.fashion_mnist import fashion_mnist
from broker_fl.tasks.image_classification import BuildModel
from broker_fl.tasks.module import initial
from broker_fl.tasks.task import Examples, Task
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest
from workers.dp import train_privately
from workers.trainer import train

BASELINE = "the mean image"
"""Without a look at the update."""
INVERSION = "first singular pair of the first layer"

TASKS: dict[str, Callable[[BuildModel], Task]] = {"digits": digits, "fashion_mnist": fashion_mnist}
PLAN = TrainingPlan(steps=1, batch_size=1, optimizer="sgd", learning_rate=0.1, momentum=0.0)
HIDDEN = 64
MOST_PSNR = 120.0
SHOWN = 6

Pictures = NDArray[np.float64]
"""(n, pixels), in 0..1."""


@dataclass(frozen=True, slots=True)
class InversionRow:
    attack: str
    task: str
    epsilon: float | None
    """0 where the update is not looked at."""
    advantage: float
    """Of telling the image from another one by what was reconstructed: right less wrong."""
    bound: float
    """Of that: as two images are replaced by each other, it is of twice the epsilon."""
    correlation: float
    """Of the pixels with the true ones: the median image's."""
    psnr_db: float
    """Likewise."""
    noise_multiplier: float | None
    images: int


def perceptron(channels: int, height: int, width: int, classes: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            flatten=nn.Flatten(),
            first=nn.Linear(channels * height * width, HIDDEN),
            relu=nn.ReLU(),
            out=nn.Linear(HIDDEN, classes),
        )
    )


def measure(
    name: str, data: Path | None, epsilons: Sequence[float | None], *, images: int, seed: int, folder: Path | None
) -> list[InversionRow]:
    """Raises DataError where the data cannot be had."""
    task = TASKS[name](perceptron)
    test = task.test_examples(data)
    victims, decoys = _two_draws(test, images, seed=seed)
    true, others = _pictures(task, victims), _pictures(task, decoys)
    mean = np.broadcast_to(_pictures(task, first(task.train_examples(data), 1000)).mean(axis=0), true.shape)
    row = partial(_row, name, true, others)
    rows, reconstructed, seeds = [row(BASELINE, 0.0, None, mean)], {}, count(seed)
    for epsilon in epsilons:
        mechanism = mechanism_of(epsilon, sample_rate=1.0, steps=1)
        found = np.concatenate([_attacked(task, data, victims, at, mechanism, seed=next(seeds)) for at in range(len(victims))])
        rows.append(row(INVERSION, epsilon, mechanism, found))
        reconstructed[epsilon] = found
    if folder is not None:
        _draw(folder / f"inversion-{name}.png", true, reconstructed, shape=tuple(victims.inputs.shape[-2:]))
    return rows


def _two_draws(examples: Examples, most: int, *, seed: int) -> tuple[Examples, Examples]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    half = min(most, len(examples) // 2)
    return examples.take(order[:half]), examples.take(order[half : 2 * half])


def _attacked(task: Task, data: Path | None, victims: Examples, at: int, mechanism: Mechanism | None, *, seed: int) -> Pictures:
    """The image at this place, as its update shows it."""
    module, manifest, base = initial(task, data, seed)
    one = victims.take(torch.tensor([at]))
    delta = _update(task, module, one, base=base, manifest=manifest, mechanism=mechanism, seed=seed)
    return _pixels(task, inverted(delta, manifest, learning_rate=PLAN.learning_rate), like=one.inputs)


def _update(
    task: Task, module: nn.Module, one: Examples, *, base: Vector, manifest: Manifest, mechanism: Mechanism | None, seed: int
) -> Vector:
    training = train if mechanism is None else partial(train_privately, mechanism=mechanism)
    result = training(
        task, module, one, base=base, manifest=manifest, plan=PLAN, device=CPU, seed=seed, should_stop=lambda: False
    )
    assert result is not None
    return result.delta


def inverted(delta: Vector, manifest: Manifest, *, learning_rate: float) -> Tensor:
    """The first layer's input, (1, features), float64, from one step of SGD on one example."""
    tensors = unflatten(delta, manifest)
    layer = np.concatenate([tensors["first.weight"], tensors["first.bias"][:, None]], axis=1).astype(np.float64) / -learning_rate
    direction = torch.linalg.svd(torch.from_numpy(layer), full_matrices=False).Vh[:1]
    features: Tensor = direction[:, :-1] / direction[:, -1:]
    return features


def _pixels(task: Task, prepared: Tensor, *, like: Tensor) -> Pictures:
    """Undoes `prepare`, which scales and shifts the pixels of greyscale images; what is out of range is cut off."""
    black, white = (task.prepare(torch.full(like.shape, value), None).flatten(1) for value in (0.0, 1.0))
    pixels: Pictures = ((prepared.reshape(len(prepared), -1) - black) / (white - black)).clamp(0, 1).double().numpy()
    return pixels


def _pictures(task: Task, examples: Examples) -> Pictures:
    return _pixels(task, task.prepare(examples.inputs, None), like=examples.inputs)


def _row(
    name: str,
    true: Pictures,
    others: Pictures,
    attack: str,
    epsilon: float | None,
    mechanism: Mechanism | None,
    found: Pictures,
) -> InversionRow:
    right, wrong = _correlations(found, true), _correlations(found, others)
    return InversionRow(
        attack=attack,
        task=name,
        epsilon=epsilon,
        advantage=float(np.mean(np.sign(right - wrong))),
        bound=advantage_bound(*replacing(epsilon, DELTA if epsilon else 0.0)),
        correlation=float(np.median(right)),
        psnr_db=float(np.median(_psnr_db(found, true))),
        noise_multiplier=None if mechanism is None else mechanism.noise_multiplier,
        images=len(true),
    )


def _correlations(found: Pictures, true: Pictures) -> NDArray[np.float64]:
    """Pearson's, of each pair of pictures; 0 for one without contrast."""
    a, b = (each - each.mean(axis=1, keepdims=True) for each in (found, true))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products: NDArray[np.float64] = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return products


def _psnr_db(found: Pictures, true: Pictures) -> NDArray[np.float64]:
    error = np.maximum(np.mean((found - true) ** 2, axis=1), 10 ** (-MOST_PSNR / 10))
    decibels: NDArray[np.float64] = -10 * np.log10(error)
    return decibels


def _draw(file: Path, true: Pictures, reconstructed: dict[float | None, Pictures], *, shape: tuple[int, ...]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = {"true": true} | {
        "no DP" if epsilon is None else f"epsilon {epsilon:g}": found for epsilon, found in reconstructed.items()
    }
    rows = min(SHOWN, len(true))
    figure, axes = plt.subplots(rows, len(columns), figsize=(1.4 * len(columns), 1.4 * rows), squeeze=False, layout="constrained")
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row in range(rows):
            axes[row, column].imshow(pictures[row].reshape(shape), cmap="gray", vmin=0, vmax=1)
            axes[row, column].axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
