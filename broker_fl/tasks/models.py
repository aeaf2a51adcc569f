"""Convolutional networks that adapt to the images they get."""

import math
from collections import OrderedDict

from torch import Tensor, nn


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
