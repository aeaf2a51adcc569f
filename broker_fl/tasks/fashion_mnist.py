"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): 70,000 images of clothes, 28x28, 10 classes."""

from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from broker_fl.tasks.downloads import fetch
from broker_fl.tasks.image_classification import BuildModel, ImageArrays, ImageClassification, Split
from broker_fl.tasks.models import small_cnn


def fashion_mnist(model: BuildModel = small_cnn) -> ImageClassification:
    """`data` is the folder that holds `FashionMNIST/raw`."""
    return ImageClassification(load=_load, model=model, image_shape=(1, 28, 28), classes=10, mean=(0.2860,), std=(0.3530,))


def _load(data: Path | None, split: Split) -> ImageArrays:
    loaded = fetch(FashionMNIST, data=data, train=split == "train", files="Fashion-MNIST's files, FashionMNIST/raw/*")
    return ImageArrays(images=np.asarray(loaded.data), labels=np.asarray(loaded.targets), source="Fashion-MNIST")
