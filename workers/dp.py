"""One local training by DP-SGD (Abadi et al. 2016, algorithm 1), with Opacus' gradients, clipping and noise.

Each step draws a Poisson sample, clips the gradient of each of its examples to an L2 norm, adds them up, adds Gaussian noise
to the sum, and divides by the expected size of the sample. What leaves the function is covered by the noise, except for the
loss and the number of examples.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from broker_fl.errors import ConfigurationError, DataError
from broker_fl.parameters import Vector
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks.device import laid_out, place
from broker_fl.tasks.module import load_vector, vector_of
from broker_fl.tasks.per_example import refuse_mixing
from broker_fl.tasks.seeding import seeded
from broker_fl.tasks.task import Examples, Task
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest
from workers.trainer import TrainResult, optimizer_of, proximal_pull

_GHOST_FROM_PARAMETERS = 500_000
"""From so many on, `auto` clips without keeping each example's gradient: two passes back instead of the memory."""

_DEFAULT_CHUNK = 256


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
    channels_last: bool = False,
    chunk: int | None = None,
    seed: int,
    should_stop: Callable[[], bool],
) -> TrainResult | None:
    """Trains the module from `base`, shape (manifest.size,), by the plan and the mechanism; None once `should_stop` says so.

    Sampling, noise, augmentation and dropout follow from the seed, which must be drawn anew for each training and told to nobody:
    whoever knows it can take the noise off. On the CPU the same call gives the same bits. A sample is worked through in chunks of
    at most `chunk` examples, which bounds the memory and changes nothing else.

    The loss that is reported is not covered by the noise. Raises ManifestMismatchError for another model's vector, DataError
    without examples, and ConfigurationError for a model or a loss of which there are no gradients by example.
    """
    if not len(examples):
        raise DataError("there are no examples to train on")
    place(module, device, channels_last=channels_last)
    load_vector(module, base, manifest)
    module.train()
    refuse_mixing(module)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(_seed_of_noise(generator))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    with (
        _Clipped(module, mechanism, plan, count=len(examples), noise=noise, manifest=manifest) as clipped,
        seeded(seed, device),
        warnings.catch_warnings(),
    ):
        # The examples need no gradients, and Opacus' hooks on the first layer get what they need.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        pull = proximal_pull(module, mu=plan.proximal)
        total_loss, seen = torch.zeros((), device=device), 0
        sampler = UniformWithReplacementSampler(
            num_samples=len(examples), sample_rate=mechanism.sample_rate, generator=generator, steps=mechanism.steps
        )
        for drawn in sampler:
            if should_stop():
                return None
            for batch in _chunks(drawn, chunk or _DEFAULT_CHUNK):
                chosen = examples.take(batch.to(examples.inputs.device))
                inputs = laid_out(task.prepare(chosen.inputs.to(device), generator), channels_last=channels_last)
                total_loss += clipped.add(task, inputs, chosen.targets.to(device))
                seen += len(chosen)
            clipped.noise()
            pull()
            clipped.step()
    _refuse_changed(module, buffers)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = vector_of(module) - base
    loss = float(total_loss.item()) / seen if seen else 0.0
    return TrainResult(delta=delta, num_samples=len(examples), num_steps=mechanism.steps, mean_loss=loss)


def _seed_of_noise(generator: torch.Generator) -> int:
    """A stream of its own, on the device's generator."""
    return int(torch.randint(2**62, (), generator=generator).item())


def _chunks(drawn: list[int], size: int) -> Iterator[Tensor]:
    """Positions, int64, on the CPU; none of an empty sample."""
    positions = torch.tensor(drawn, dtype=torch.int64)
    return iter(torch.split(positions, size)) if len(positions) else iter(())


class _Clipped:
    """A module whose gradients are taken by example while inside, and whose sums are clipped and noised."""

    def __init__(
        self,
        module: nn.Module,
        mechanism: Mechanism,
        plan: TrainingPlan,
        *,
        count: int,
        noise: torch.Generator,
        manifest: Manifest,
    ) -> None:
        is_large = manifest.size >= _GHOST_FROM_PARAMETERS
        self._is_ghost = mechanism.clipping == "ghost" or (mechanism.clipping == "auto" and is_large)
        self._module = module
        # Losses are added up here, so that each gradient is one example's own, whatever the task's mean does.
        if self._is_ghost:
            self._wrapped: Any = GradSampleModuleFastGradientClipping(
                module, loss_reduction="sum", strict=False, max_grad_norm=mechanism.max_grad_norm, use_ghost_clipping=True
            )
        else:
            self._wrapped = GradSampleModule(module, loss_reduction="sum", strict=False)
        kind = DPOptimizerFastGradientClipping if self._is_ghost else DPOptimizer
        self._optimizer: Any = kind(
            optimizer_of(plan, module),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_grad_norm,
            expected_batch_size=mechanism.sample_rate * count,
            loss_reduction="mean",
            generator=noise,
        )

    def __enter__(self) -> "_Clipped":
        return self

    def __exit__(self, *_: object) -> None:
        self._wrapped.to_standard_module()
        for parameter in self._module.parameters():
            parameter.grad = None
            for left in ("summed_grad", "grad_sample", "_norm_sample"):
                if hasattr(parameter, left):
                    delattr(parameter, left)

    def add(self, task: Task, inputs: Tensor, targets: Tensor) -> Tensor:
        """Clips the gradients of these examples and adds them to the sum of this step. Returns the sum of their losses."""
        losses = _losses(task, self._wrapped(inputs), targets)
        if self._is_ghost:
            self._ghost_backward(losses)
        else:
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self._refuse_missing("grad_sample")
        self._optimizer.signal_skip_step(do_skip=True)
        self._optimizer.pre_step()
        self._optimizer.zero_grad()
        return losses.detach().sum()

    def _ghost_backward(self, losses: Tensor) -> None:
        """Norms by example in one pass back, and the sum of what they leave in a second one."""
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        self._refuse_missing("_norm_sample")
        self._optimizer.zero_grad()
        coefficients = self._wrapped.get_clipping_coef()
        self._wrapped.disable_hooks()
        (coefficients * losses).sum().backward()
        self._wrapped.enable_hooks()

    def noise(self) -> None:
        """To the sum of this step, also where no example was drawn."""
        for parameter in self._optimizer.params:
            if self._is_ghost:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad_sample = torch.zeros((0, *parameter.shape), device=parameter.device)
        self._optimizer.signal_skip_step(do_skip=False)
        self._optimizer.pre_step()

    def _refuse_missing(self, kept: str) -> None:
        """After a pass back, before Opacus fails on it."""
        trained = [(name, one) for name, one in self._module.named_parameters() if one.requires_grad]
        missing = [name for name, one in trained if getattr(one, kept, None) is None]
        if missing:
            raise ConfigurationError(
                f"there is no gradient by example of {', '.join(missing[:3])}: under differential privacy each trained parameter "
                "must take part in each forward pass, within a layer that Opacus knows, or have requires_grad = False"
            )

    def step(self) -> None:
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad()


def _losses(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example's own, shape (n,)."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return task.loss(output.unsqueeze(0), target.unsqueeze(0))

    try:
        losses: Tensor = torch.func.vmap(loss, randomness="different")(outputs, targets)
    except RuntimeError as exc:
        raise ConfigurationError(
            f"the task's loss cannot be taken example by example, as differential privacy needs it ({str(exc).splitlines()[0]})"
        ) from exc
    return losses


def _refuse_changed(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            raise ConfigurationError(
                f"training changed the buffer {name!r}, which no noise covers: under differential privacy a model may learn "
                "by its parameters only"
            )
