"""One local training by DP-SGD (Abadi et al. 2016, algorithm 1), with Opacus' gradients, clipping and noise.

Each step draws a Poisson sample, clips the gradient of each of its examples to an L2 norm, adds them up, adds Gaussian noise
to the sum, and divides by the expected size of the sample. What leaves the function is covered by the noise, except for the
loss and the number of examples.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from broker_fl.errors import ConfigurationError, DataError
from broker_fl.parameters import Vector
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks.device import place
from broker_fl.tasks.module import load_vector, vector_of
from broker_fl.tasks.per_example import refuse_mixing
from broker_fl.tasks.seeding import seeded
from broker_fl.tasks.task import Examples, Task
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest
from workers.clipping import ClippedSum
from workers.trainer import TrainResult, optimizer_of, proximal_pull

_DEFAULT_CHUNK = 256
_USUAL = 10
"""No prepared value is much larger in magnitude."""


def train_privately(
    task: Task,
    module: nn.Module,
    examples: Examples,
    *,
    base: Vector,
    manifest: Manifest,
    plan: TrainingPlan,
    mechanism: Mechanism,
    device: torch.device,
    chunk: int | None = None,
    seed: int,
    should_stop: Callable[[], bool],
) -> TrainResult | None:
    """Trains the module from `base`, shape (manifest.size,), by the plan and the mechanism; None once `should_stop` says so.

    Sampling, noise, augmentation and dropout follow from the seed of 128 bits, which must be drawn anew for each training and
    told to nobody: whoever knows it can take the noise off. It is the key of a Philox generator (Salmon et al. 2011), since
    torch's own on a CPU keep 32 bits of a seed, which can be tried one by one. On the CPU the same call gives the same bits. A
    sample is worked through in chunks of at most `chunk` examples, which bounds the memory and changes nothing else.

    The loss that is reported is not covered by the noise. Raises ManifestMismatchError for another model's vector, DataError
    without examples, and ConfigurationError for a model or a loss of which there are no gradients by example.
    """
    if not len(examples):
        raise DataError("there are no examples to train on")
    place(module, device, channels_last=False)
    # Opacus' gradients of convolutions are others, and wrong, where the channels come last in memory.
    module.to(memory_format=torch.contiguous_format)
    load_vector(module, base, manifest)
    module.train()
    refuse_mixing(module)
    generator = np.random.Generator(np.random.Philox(key=seed))
    # Of augmentation and dropout: no privacy rests on them.
    torch_seed = int(generator.integers(2**62))
    torchs = torch.Generator().manual_seed(torch_seed)
    untrained = {name: tensor.detach().clone() for name, tensor in _untrained(module)}
    expected = mechanism.sample_rate * len(examples)
    with (
        ClippedSum(module, optimizer_of(plan, module), mechanism, expected_examples=expected) as clipped,
        seeded(torch_seed, device),
        warnings.catch_warnings(),
    ):
        # The examples need no gradients, and Opacus' hooks on the first layer get what they need.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        _probe(clipped, task, examples, device=device)
        pull = proximal_pull(module, mu=plan.proximal)
        total_loss, seen = torch.zeros((), device=device), 0
        for _ in range(mechanism.steps):
            if should_stop():
                return None
            drawn = np.flatnonzero(generator.random(len(examples)) < mechanism.sample_rate)
            for batch in _chunks(torch.from_numpy(drawn), chunk or _DEFAULT_CHUNK):
                chosen = examples.take(batch.to(examples.inputs.device))
                inputs = task.prepare(chosen.inputs.to(device), torchs).contiguous()
                total_loss += clipped.add(task, inputs, chosen.targets.to(device))
                seen += len(chosen)
            clipped.add_noise(generator)
            pull()
            clipped.step()
    _refuse_changed(module, untrained)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = vector_of(module) - base
    loss = float(total_loss.item()) / seen if seen else 0.0
    return TrainResult(delta=delta, num_samples=len(examples), num_steps=mechanism.steps, mean_loss=loss)


def _probe(clipped: ClippedSum, task: Task, examples: Examples, *, device: torch.device) -> None:
    """Before anything is learnt. A party's only example is taken twice, and values out of the way are left out: what this finds
    should be of the model, and not of an example."""
    chosen = examples.take(torch.tensor([0, len(examples) - 1], device=examples.inputs.device))
    raw = torch.nan_to_num(chosen.inputs.to(device), nan=0.0, posinf=0.0, neginf=0.0)
    together, alone = task.prepare(raw, None), task.prepare(raw[:1], None)
    if not torch.allclose(together[:1], alone, equal_nan=True):
        raise ConfigurationError(
            "the task prepares an example otherwise when others are there: differential privacy needs each for itself"
        )
    usual = together.clamp(-_USUAL, _USUAL)
    clipped.expect_own_gradients(task, usual.contiguous(), chosen.targets.to(device))


def _chunks(drawn: Tensor, size: int) -> Sequence[Tensor]:
    """Positions, int64, on the CPU; none of an empty sample."""
    return torch.split(drawn, size) if len(drawn) else ()


def _untrained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the delta holds and no noise covers."""
    yield from ((name, one) for name, one in module.named_parameters() if not one.requires_grad)
    yield from ((name, one) for name, one in module.named_buffers() if one.is_floating_point())


def _refuse_changed(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in _untrained(module):
        if name not in before or not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()):
            raise ConfigurationError(
                f"training changed {name!r}, which no noise covers: under differential privacy a model may learn by its trained "
                "parameters only"
            )
