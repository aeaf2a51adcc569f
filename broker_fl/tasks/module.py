"""A torch module as one flat float32 vector, and back.

In the vector are the floating parameters and the floating buffers that a state dict holds, each tensor once, even where
two layers share it. Integer buffers, such as BatchNorm's `num_batches_tracked`, stay local.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from broker_fl.errors import ConfigurationError, ManifestMismatchError
from broker_fl.parameters import Vector, flatten, manifest_of, mismatch, unflatten
from broker_fl.tasks.per_example import refuse_mixing, without_batch_norm
from broker_fl.tasks.seeding import seeded
from broker_fl.tasks.task import Task
from schemas.manifest import Manifest

MIN_RUNNING_VARIANCE = 1e-5
"""BatchNorm's usual epsilon."""


def manifest_of_module(module: nn.Module) -> Manifest:
    """The layout of this module's vector. Raises ConfigurationError for a module that has none."""
    return manifest_of(_arrays(module))


def vector_of(module: nn.Module) -> Vector:
    """A copy of the floating tensors, shape (manifest.size,), float32."""
    arrays = _arrays(module)
    return flatten(arrays, manifest_of(arrays))


def load_vector(module: nn.Module, vector: Vector, manifest: Manifest) -> None:
    """Copies the vector into the module, each tensor keeping its device and dtype.

    Running variances are kept above zero: deltas are added up, compressed and stale, so that a merged model may well
    hold a slightly negative one, whose square root would turn every output into NaN. Only the module is mended; the
    vector remains the federation's, and the difference goes into the next delta, which so repairs the model.

    Raises ManifestMismatchError if the module is not of this layout.
    """
    ours = manifest_of_module(module)
    if ours.digest != manifest.digest:
        raise ManifestMismatchError(mismatch(ours, manifest))
    tensors = _floating_tensors(module)
    with torch.no_grad():
        for name, values in unflatten(vector, manifest).items():
            # torch.tensor copies; from_numpy would warn of a vector that is read-only, as decoded ones may be.
            tensors[name].copy_(torch.tensor(values).view(tensors[name].shape))
            if name.rpartition(".")[2] == "running_var":
                tensors[name].clamp_(min=MIN_RUNNING_VARIANCE)


def initial(task: Task, data: Path | None, seed: int, *, by_example: bool = False) -> tuple[nn.Module, Manifest, Vector]:
    """A new model on the CPU: the same bits for the same seed. torch's global generator is left as it was.

    `by_example`: without BatchNorm (see per_example.py), for DP-SGD. Raises ConfigurationError where it cannot take the model.
    """
    with seeded(seed):
        module = task.build_model(data)
    if by_example:
        module = without_batch_norm(module).train()
        refuse_mixing(module)
    return module, manifest_of_module(module), vector_of(module)


def _arrays(module: nn.Module) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    arrays = {name: tensor.detach().to("cpu", torch.float32).numpy() for name, tensor in _floating_tensors(module).items()}
    if not arrays:
        raise ConfigurationError(f"the model {type(module).__name__} has no floating parameters to learn")
    return arrays


def _floating_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By their name in the state dict, in its order; of several names for one tensor, the first."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    # keep_vars gives the tensors themselves, by which shared ones are known.
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.numel() == 0 or id(tensor) in seen:
            continue
        if tensor.is_complex():
            raise ConfigurationError(f"{name} is complex: a model's vector is float32")
        if tensor.is_floating_point():
            tensors[name] = tensor
            seen.add(id(tensor))
    return tensors
