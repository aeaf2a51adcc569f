"""Images in, one label out: what the built-in tasks have in common, and most tasks of one's own too."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from broker_fl.errors import DataError
from broker_fl.tasks.models import small_cnn
from broker_fl.tasks.task import Examples

Split = Literal["train", "test"]
ImageShape = tuple[int, int, int]
"""(channels, height, width)."""
BuildModel = Callable[[int, int, int, int], nn.Module]
"""(channels, height, width, classes) -> a randomly initialised model that gives logits of shape (n, classes)."""

CROP_PADDING = 4


@dataclass(frozen=True, slots=True, eq=False)
class ImageArrays:
    """One split, as it lies in a file."""

    images: NDArray[np.uint8] | NDArray[np.float32]
    """(n, height, width) or (n, height, width, channels): uint8 in 0..255, or floats in 0..1."""
    labels: NDArray[np.integer]
    """(n,) or (n, 1), from 0."""
    source: str = "the data"
    """Where they come from, for messages."""


@dataclass(frozen=True, slots=True)
class ImageClassification:
    """A Task of labelled images, with cross-entropy on logits."""

    load: Callable[[Path | None, Split], ImageArrays]
    model: BuildModel = small_cnn
    image_shape: ImageShape | None = None
    """None: asked of `inspect`, or else of the training images."""
    classes: int | None = None
    """None: likewise; then the highest label of the data decides, which must be the same with every party."""
    mean: tuple[float, ...] = (0.5,)
    """Of pixels in 0..1: one for each channel, or one for all."""
    std: tuple[float, ...] = (0.25,)
    augment: bool = True
    """Random crops (padding 4) and horizontal flips of colour images. Greyscale images are never augmented."""
    inspect: Callable[[Path | None], tuple[ImageShape, int]] | None = None
    """Image shape and number of classes of the data, without loading it."""

    def build_model(self, data: Path | None) -> nn.Module:
        image_shape, classes = self.shape_and_classes(data)
        return self.model(*image_shape, classes)

    def shape_and_classes(self, data: Path | None) -> tuple[ImageShape, int]:
        if self.image_shape is not None and self.classes is not None:
            return self.image_shape, self.classes
        found_shape, found_classes = (self.inspect or self._inspect)(data)
        return self.image_shape or found_shape, self.classes or found_classes

    def train_examples(self, data: Path | None) -> Examples:
        return self._examples(self.load(data, "train"))

    def test_examples(self, data: Path | None) -> Examples:
        return self._examples(self.load(data, "test"))

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """(n, channels, height, width), uint8 or floats in 0..1 -> float32, cropped and flipped, then normalised."""
        if self.augment and generator is not None and inputs.shape[1] == 3:
            inputs = crop_and_flip(inputs, generator)
        scale = 255.0 if inputs.dtype == torch.uint8 else 1.0
        mean = torch.tensor(self.mean, device=inputs.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=inputs.device).view(1, -1, 1, 1)
        return (inputs.to(torch.float32) / scale - mean) / std

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.float(), targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return int((outputs.argmax(dim=1) == targets).sum().item())

    def _inspect(self, data: Path | None) -> tuple[ImageShape, int]:
        examples = self.train_examples(data)
        channels, height, width = examples.inputs.shape[1:]
        return (channels, height, width), int(examples.targets.max().item()) + 1

    def _examples(self, arrays: ImageArrays) -> Examples:
        images = _channels_first(arrays)
        labels = _flat_labels(arrays, count=len(images))
        shape = images.shape[1:]
        if self.image_shape is not None and shape != self.image_shape:
            raise DataError(f"{arrays.source}: images are {shape}, but the task says {self.image_shape}")
        if self.classes is not None and labels.max() >= self.classes:
            raise DataError(
                f"{arrays.source}: labels must be in 0..{self.classes - 1} for {self.classes} classes;"
                f" the highest is {labels.max()}"
            )
        return Examples(inputs=torch.from_numpy(images), targets=torch.from_numpy(labels))


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels over a black border, and mirrored half of the time.

    Takes and gives (n, channels, height, width); the whole batch is one gather.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (CROP_PADDING,) * 4)
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    rows = top + torch.arange(height)
    forward = torch.arange(width)
    columns = left + torch.where(mirrored, forward.flip(0), forward)
    return padded[
        torch.arange(count, device=images.device).view(-1, 1, 1, 1),
        torch.arange(channels, device=images.device).view(1, -1, 1, 1),
        rows.to(images.device).view(count, 1, height, 1),
        columns.to(images.device).view(count, 1, 1, width),
    ]


def _channels_first(arrays: ImageArrays) -> NDArray[np.uint8] | NDArray[np.float32]:
    """(n, channels, height, width), contiguous and writable, as torch wants it."""
    images = arrays.images
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"{arrays.source}: images must be (n, height, width) or (n, height, width, channels); got {images.shape}")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{arrays.source}: images must be uint8, or floats in 0..1; got {images.dtype}")
    stacked = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    dtype = np.uint8 if images.dtype == np.uint8 else np.float32
    return np.require(stacked, dtype=dtype, requirements=["C", "W"])


def _flat_labels(arrays: ImageArrays, *, count: int) -> NDArray[np.int64]:
    labels = arrays.labels
    if labels.shape not in ((count,), (count, 1)):
        raise DataError(f"{arrays.source}: labels must be ({count},) or ({count}, 1), one for each image; got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{arrays.source}: labels must be integers; got {labels.dtype}")
    flat = np.array(labels.reshape(-1), dtype=np.int64)
    if flat.min() < 0:
        raise DataError(f"{arrays.source}: labels must count from 0; the lowest is {flat.min()}")
    return flat
