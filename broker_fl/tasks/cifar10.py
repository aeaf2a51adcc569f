"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images, 32x32, 10 classes."""

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

from broker_fl.tasks.downloads import fetch
from broker_fl.tasks.image_classification import BuildModel, ImageArrays, ImageClassification, Split
from broker_fl.tasks.models import small_cnn

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def cifar10(model: BuildModel = small_cnn) -> ImageClassification:
    """`data` is the folder that holds `cifar-10-batches-py`, or the archive that torchvision downloads."""
    return ImageClassification(load=_load, model=model, image_shape=(3, 32, 32), classes=10, mean=MEAN, std=STD)


def _load(data: Path | None, split: Split) -> ImageArrays:
    # The batches are pickles; torchvision opens only those whose MD5 is the official one.
    loaded = fetch(CIFAR10, data=data, train=split == "train", files="CIFAR-10's files, cifar-10-batches-py/*")
    return ImageArrays(images=np.asarray(loaded.data), labels=np.asarray(loaded.targets), source="CIFAR-10")
