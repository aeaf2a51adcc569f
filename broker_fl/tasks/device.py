"""Where a model computes, and in which precision."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from broker_fl.errors import ConfigurationError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16"]


def choose_device(name: DeviceName = "auto") -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises ConfigurationError for one that this machine lacks."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in available.items() if here))
    if name not in available:
        raise ConfigurationError(f"there is no device {name!r} (known: auto, {', '.join(available)})")
    if not available[name]:
        here = ", ".join(kind for kind, is_here in available.items() if is_here)
        raise ConfigurationError(f"torch finds no {name} device on this machine (it has: {here}); auto takes the best")
    return torch.device(name)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Weights stay float32 either way; bfloat16 is for the arithmetic of the forward pass."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def place(module: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Moves the module; its convolutions' weights then lie in the order that `laid_out` gives images."""
    module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)


def laid_out(inputs: Tensor, *, channels_last: bool) -> Tensor:
    """Images, (n, channels, height, width), in the order of memory asked for; anything else as it is."""
    if channels_last and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs
