"""Tasks that learn from the scattering features of images, instead of the images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from broker_fl.tasks.image_classification import BuildModel, ImageClassification
from broker_fl.tasks.models import linear
from broker_fl.tasks.scattering import features_shape, scattering
from broker_fl.tasks.task import Examples

BATCH = 256
"""Images that are normalised and transformed at once."""


@dataclass(frozen=True, slots=True)
class ScatteredImages:
    """A Task whose inputs are the features of another task's images, float32, normalised and transformed when they are loaded.

    They take 81 / 16 times the memory of the images as float32, 20 times that of bytes. There are no images any more that
    could be augmented.
    """

    images: ImageClassification
    """What its own `model` is does not matter."""
    model: BuildModel = linear
    """Built for (81 channels, height / 4, width / 4, classes)."""

    def build_model(self, data: Path | None) -> nn.Module:
        image_shape, classes = self.images.shape_and_classes(data)
        return self.model(*features_shape(*image_shape), classes)

    def train_examples(self, data: Path | None) -> Examples:
        return self._scattered(self.images.train_examples(data))

    def test_examples(self, data: Path | None) -> Examples:
        return self._scattered(self.images.test_examples(data))

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:  # noqa: ARG002
        """Features as they are: (n, 81 channels, height / 4, width / 4), float32."""
        return inputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.images.loss(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> int:
        return self.images.correct(outputs, targets)

    def _scattered(self, examples: Examples) -> Examples:
        count, channels, height, width = examples.inputs.shape
        # Filled batch by batch: to join batches at the end would take the memory twice.
        features = torch.empty(count, *features_shape(channels, height, width))
        for start in range(0, count, BATCH):
            images = examples.inputs[start : start + BATCH]
            features[start : start + BATCH] = scattering(self.images.prepare(images, None))
        return Examples(inputs=features, targets=examples.targets)
