"""Randomness that torch draws from its global generators: initial weights and dropout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Inside, the generators of the CPU and of this device start from `seed`; afterwards they are as before.

    Not `torch.manual_seed`, which seeds every device and so would change those that are not put back.
    """
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            # MPS has one generator, that fork_rng doesn't know: it stays seeded.
            torch.mps.manual_seed(seed)
        yield
