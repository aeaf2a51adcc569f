"""Models that adapt to the images, or maps of features, that they get."""

import math
from collections import OrderedDict

from torch import Tensor, nn

GREYSCALE_FEATURES = 81
"""Channels: broker_fl/tasks/scattering.py."""


def small_cnn(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Two convolutions (16, 32), a hidden layer of 64, no BatchNorm: 14 k parameters for 1x8x8, 38 k for 3x32x32.

    Takes (n, channels, height, width), float32; gives logits, (n, classes). Larger images are pooled to about 4x4
    before the hidden layer. The pooling is a plain one, since MPS has no adaptive one for all sizes.
    """
    height, width = math.ceil(height / 4), math.ceil(width / 4)
    last_pool = (math.ceil(height / 4), math.ceil(width / 4))
    features = 32 * math.ceil(height / last_pool[0]) * math.ceil(width / last_pool[1])
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, 16, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2, ceil_mode=True),
            conv2=nn.Conv2d(16, 32, kernel_size=3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2, ceil_mode=True),
            pool3=nn.MaxPool2d(last_pool, ceil_mode=True),
            flatten=nn.Flatten(),
            hidden=nn.Linear(features, 64),
            relu3=nn.ReLU(),
            out=nn.Linear(64, classes),
        )
    )


class FederatedCNN(nn.Module):
    """Two convolutions (64, 128) with BatchNorm and a hidden layer of 512 with dropout: 4.28 M parameters for 3x32x32.

    Takes (n, channels, height, width), float32; gives logits, (n, classes).
    """

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(128)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.hidden = nn.Linear(128 * math.ceil(height / 4) * math.ceil(width / 4), 512)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.norm1(self.conv1(images)).relu())
        maps = self.pool(self.norm2(self.conv2(maps)).relu())
        logits: Tensor = self.out(self.dropout(self.hidden(maps.flatten(1)).relu()))
        return logits


def linear(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Logistic regression on values that are normalised in groups of channels: 155,530 parameters for 243x8x8, 39,700 for 81x7x7.

    Takes (n, channels, height, width), float32; gives logits, (n, classes). See `_group_norm`.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            norm=_group_norm(channels),
            flatten=nn.Flatten(),
            out=nn.Linear(channels * height * width, classes),
        )
    )


def feature_cnn(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """Two convolutions with tanh on normalised maps of features: 187 k parameters for 243x8x8, 38 k for 81x7x7. No BatchNorm.

    After Tramèr & Boneh 2021 (arXiv 2011.11660): 64 filters each, pooled to at most 4x4 in between; 32 where there are no more
    channels than a greyscale image has features. Takes (n, channels, height, width), float32; gives logits, (n, classes).
    """
    filters = 64 if channels > GREYSCALE_FEATURES else 32
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            norm=_group_norm(channels),
            conv1=nn.Conv2d(channels, filters, kernel_size=3, padding=1),
            tanh1=nn.Tanh(),
            pool=_last_pool(height, width),
            conv2=nn.Conv2d(filters, filters, kernel_size=3, padding=1),
            tanh2=nn.Tanh(),
            flatten=nn.Flatten(),
            out=nn.Linear(filters * _positions(height, width), classes),
        )
    )


def tanh_cnn(channels: int, height: int, width: int, classes: int) -> nn.Module:
    """The networks of Papernot et al. 2020 (arXiv 2007.14191) for training under differential privacy. No BatchNorm.

    Bounded activations keep gradients small, so that less is clipped. Colour images (3 channels or more) get the paper's network
    for CIFAR-10: three pairs of convolutions and a hidden layer of 128, 550,570 parameters for 3x32x32. Others get the one for
    MNIST: two convolutions and a hidden layer of 32, 26,010 parameters for 1x28x28; below 16 pixels, its windows shrink to 3x3.
    Larger images are pooled to at most 4x4 before the hidden layer.

    Takes (n, channels, height, width), float32; gives logits, (n, classes).
    """
    if channels >= 3:
        return _tanh_cnn_for_colour(channels, height, width, classes)
    return _tanh_cnn_for_greyscale(channels, height, width, classes)


def _tanh_cnn_for_colour(channels: int, height: int, width: int, classes: int) -> nn.Module:
    layers = OrderedDict[str, nn.Module]()
    for block, filters in enumerate((32, 64, 128), start=1):
        for part in "ab":
            layers[f"conv{block}{part}"] = nn.Conv2d(channels, filters, kernel_size=3, padding=1)
            layers[f"tanh{block}{part}"] = nn.Tanh()
            channels = filters
        layers[f"pool{block}"] = nn.MaxPool2d(2, ceil_mode=True)
    return nn.Sequential(layers | _tanh_head(channels, math.ceil(height / 8), math.ceil(width / 8), hidden=128, classes=classes))


def _tanh_cnn_for_greyscale(channels: int, height: int, width: int, classes: int) -> nn.Module:
    if min(height, width) < 16:
        conv1 = nn.Conv2d(channels, 16, kernel_size=3, padding=1)
        conv2 = nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1)
        pool = nn.MaxPool2d(3, stride=1, padding=1)
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    else:
        conv1 = nn.Conv2d(channels, 16, kernel_size=8, stride=2, padding=2)
        conv2 = nn.Conv2d(16, 32, kernel_size=4, stride=2)
        pool = nn.MaxPool2d(2, stride=1)
        height, width = (((size - 4) // 2 - 4) // 2 for size in (height, width))
    layers = OrderedDict[str, nn.Module](conv1=conv1, tanh1=nn.Tanh(), pool1=pool, conv2=conv2, tanh2=nn.Tanh(), pool2=pool)
    return nn.Sequential(layers | _tanh_head(32, height, width, hidden=32, classes=classes))


def _tanh_head(channels: int, height: int, width: int, *, hidden: int, classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict[str, nn.Module](
        last_pool=_last_pool(height, width),
        flatten=nn.Flatten(),
        hidden=nn.Linear(channels * _positions(height, width), hidden),
        tanh=nn.Tanh(),
        out=nn.Linear(hidden, classes),
    )


def _group_norm(channels: int) -> nn.GroupNorm:
    """Nothing learnt. 27 groups as in Tramèr & Boneh 2021, which any image's 81 c features allow; else as many as divide both."""
    return nn.GroupNorm(math.gcd(channels, 27), channels, affine=False)


def _last_pool(height: int, width: int) -> nn.MaxPool2d:
    """To at most 4x4; nothing where it is no more already."""
    return nn.MaxPool2d((math.ceil(height / 4), math.ceil(width / 4)), ceil_mode=True)


def _positions(height: int, width: int) -> int:
    """How many `_last_pool` leaves."""
    return math.ceil(height / math.ceil(height / 4)) * math.ceil(width / math.ceil(width / 4))
