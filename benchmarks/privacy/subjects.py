"""What is learnt: some thousand images of a data set, and one of two kinds of models."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from broker_fl.tasks.image_classification import ImageArrays, ImageClassification, Split
from broker_fl.tasks.registry import load_task
from broker_fl.tasks.scattered_images import ScatteredImages
from broker_fl.tasks.task import Examples, Task

VALIDATION_EXAMPLES = 5_000
"""Those of the training images that come next: settings are chosen by them."""


@dataclass(frozen=True, slots=True)
class Source:
    """The first so many images of a task, which come in random order."""

    task: str
    path: str | None
    """Within the folder of the data; None where it comes with the package."""
    train_count: int
    test_count: int


SOURCES = {
    "digits": Source("digits", None, 1_437, 360),
    "fashion_mnist": Source("fashion_mnist", ".", 20_000, 10_000),
    "cifar10": Source("npz", "cifar10.npz", 20_000, 5_000),
}
FEATURES = {"small_cnn": "none", "tanh_cnn": "none", "linear": "scattering"}
"""By model."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    name: str
    model: str
    task: Task
    data: Path | None
    train: Examples
    test: Examples


def load_subject(name: str, model: str, *, folder: Path | None, validate: bool) -> Subject:
    """Without augmentation, which needs more epochs than there are here. `validate`: with training images in the place of the
    test images. Raises ConfigurationError or DataError where the data cannot be had.
    """
    source = SOURCES[name]
    data = None if source.path is None or folder is None else folder / source.path
    task = _shortened(load_task(source.task, model=model, features=FEATURES[model]), source, validate=validate)
    return Subject(name, model, task, data, task.train_examples(data), task.test_examples(data))


def _shortened(task: Task, source: Source, *, validate: bool) -> Task:
    if isinstance(task, ScatteredImages):
        return replace(task, images=cast("ImageClassification", _shortened(task.images, source, validate=validate)))
    images = cast("ImageClassification", task)
    return replace(images, load=partial(_load, images.load, source, validate), augment=False)


def _load(
    load: Callable[[Path | None, Split], ImageArrays], source: Source, validate: bool, data: Path | None, split: Split
) -> ImageArrays:
    if split == "train":
        return _cut(load(data, "train"), slice(source.train_count))
    if validate:
        return _cut(load(data, "train"), slice(source.train_count, source.train_count + VALIDATION_EXAMPLES))
    return _cut(load(data, "test"), slice(source.test_count))


def _cut(arrays: ImageArrays, which: slice) -> ImageArrays:
    return replace(arrays, images=arrays.images[which], labels=arrays.labels[which])
