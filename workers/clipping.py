"""Sums of clipped gradients by example, as Opacus makes them, and whether it can of a model. Pure."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor, nn

from broker_fl.errors import ConfigurationError
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks.seeding import seeded
from broker_fl.tasks.task import Task

_GHOST_FROM_PARAMETERS = 500_000
"""From so many on, `auto` clips without keeping each example's gradient: two passes back instead of the memory."""

_TOLERANCE = 1e-3
"""Relative, of a gradient by example to the same example's own."""

_NOT_TAKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Opacus and torch raise of layers that they take no gradients by example of."""

_MIXED = "the model's output for an example depends on the others of its batch: differential privacy needs each for itself"


class ClippedSum:
    """Of one step: examples are added, then noise, then the optimizer steps. Only while inside are gradients taken by example."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, mechanism: Mechanism, *, expected_examples: float
    ) -> None:
        parameters = sum(parameter.numel() for parameter in module.parameters())
        self._is_ghost = mechanism.clipping == "ghost" or (mechanism.clipping == "auto" and parameters >= _GHOST_FROM_PARAMETERS)
        self._module = module
        self._std = mechanism.noise_multiplier * mechanism.max_grad_norm / expected_examples
        try:
            # Losses are added up, so that each gradient is one example's own whatever the task's mean does.
            if self._is_ghost:
                self._wrapped: Any = GradSampleModuleFastGradientClipping(
                    module, loss_reduction="sum", strict=False, max_grad_norm=mechanism.max_grad_norm, use_ghost_clipping=True
                )
            else:
                self._wrapped = GradSampleModule(module, loss_reduction="sum", strict=False)
        except _NOT_TAKEN as exc:
            _take_off(module)
            raise _not_taken(exc) from exc
        kind = DPOptimizerFastGradientClipping if self._is_ghost else DPOptimizer
        self._optimizer: Any = kind(
            optimizer,
            noise_multiplier=0.0,  # Ours is drawn from a generator with a longer key than torch's have.
            max_grad_norm=mechanism.max_grad_norm,
            expected_batch_size=expected_examples,
            loss_reduction="mean",
        )

    def __enter__(self) -> "ClippedSum":
        return self

    def __exit__(self, *_: object) -> None:
        self._wrapped.to_standard_module()
        _take_off(self._module)

    def add(self, task: Task, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the sum of their losses. An example whose loss or gradient is not finite counts as one that was not drawn."""
        losses, is_finite = self._pass_back(task, inputs, targets)
        if not bool(is_finite.all()):
            self._optimizer.zero_grad()
            if not bool(is_finite.any()):
                return losses.new_zeros(())
            # What comes out for one example must not depend on another one's infinities, so it is as if they had never come.
            return self.add(task, inputs[is_finite], targets[is_finite])
        self._optimizer.signal_skip_step(do_skip=True)
        self._optimizer.pre_step()
        self._optimizer.zero_grad()
        return losses.detach().sum()

    def _pass_back(self, task: Task, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses by example, and of which all is finite, both of shape (n,)."""
        losses = losses_of(task, self._wrapped(inputs), targets)
        if self._is_ghost:
            norms = self._ghost_backward(losses)
        else:
            losses.sum().backward()  # type: ignore[no-untyped-call]
            norms = self._flat_norms()
        return losses, torch.isfinite(losses.detach()) & torch.isfinite(norms)

    def _flat_norms(self) -> Tensor:
        """Of the gradients by example, shape (n,)."""
        samples = self._kept("grad_sample")
        norms: Tensor = torch.stack([sample.flatten(start_dim=1).norm(dim=1) for sample in samples]).norm(dim=0)
        return norms

    def _ghost_backward(self, losses: Tensor) -> Tensor:
        """Norms by example in one pass back, which it returns, and the sum of what they leave in a second one."""
        for parameter in self._optimizer.params:
            parameter._norm_sample = None  # noqa: SLF001 - Opacus leaves that of the last pass.
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        norms: Tensor = torch.stack(self._kept("_norm_sample")).norm(dim=0)
        self._optimizer.zero_grad()
        coefficients = self._wrapped.get_clipping_coef()
        self._wrapped.disable_hooks()
        (coefficients * losses).sum().backward()
        self._wrapped.enable_hooks()
        return norms

    def _kept(self, name: str) -> list[Tensor]:
        """What Opacus keeps of each trained parameter. Raises ConfigurationError where it found nothing."""
        trained = [(parameter_name, one) for parameter_name, one in self._module.named_parameters() if one.requires_grad]
        missing = [parameter_name for parameter_name, one in trained if getattr(one, name, None) is None]
        if missing:
            raise ConfigurationError(
                f"there is no gradient by example of {', '.join(missing[:3])}: under differential privacy each trained parameter "
                "must take part in each forward pass, within a layer that Opacus knows, or have requires_grad = False"
            )
        return [getattr(one, name) for _, one in trained]

    def add_noise(self, generator: np.random.Generator) -> None:
        """To the sum of this step, also where no example was drawn, and divides by the expected number of examples."""
        for parameter in self._optimizer.params:
            if self._is_ghost:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad_sample = torch.zeros((0, *parameter.shape), device=parameter.device)
        self._optimizer.signal_skip_step(do_skip=False)
        self._optimizer.pre_step()
        for parameter in self._optimizer.params:
            drawn = torch.from_numpy(generator.standard_normal(parameter.shape, dtype=np.float32))
            parameter.grad.add_(drawn.to(parameter.device, parameter.dtype), alpha=self._std)

    def step(self) -> None:
        self._optimizer.original_optimizer.step()
        self._optimizer.zero_grad()

    def expect_own_gradients(self, task: Task, inputs: Tensor, targets: Tensor) -> None:
        """Compares the gradient of the first of these examples, two at least, with what autograd says of it alone.

        Raises ConfigurationError where they differ, where its output depends on the others, or where Opacus fails: it looks at
        layers, and sees neither a weight that is used outside of its layer nor a batch that is mixed by hand.
        """
        try:
            self._expect_unmixed(inputs)
            self._expect_own_gradient(task, inputs, targets)
            self._expect_no_gradient_of_another(task, inputs, targets)
        except _NOT_TAKEN as exc:
            raise _not_taken(exc) from exc
        finally:
            self._optimizer.zero_grad()
            self._module.train()

    def _expect_unmixed(self, inputs: Tensor) -> None:
        # Without dropout, which draws anew for each shape.
        self._module.eval()
        with torch.no_grad():
            together, alone = self._module(inputs)[:1], self._module(inputs[:1])
        self._module.train()
        # Infinities, of a diverged model or a broken example, say nothing; they count as not drawn.
        if not torch.isfinite(together).all() or not torch.isfinite(alone).all():
            return
        if not torch.allclose(together, alone, rtol=_TOLERANCE, atol=_TOLERANCE * float(alone.abs().max())):
            raise ConfigurationError(_MIXED)

    def _expect_own_gradient(self, task: Task, inputs: Tensor, targets: Tensor) -> None:
        trained = [one for one in self._module.parameters() if one.requires_grad]
        self._wrapped.disable_hooks()
        with seeded(0, inputs.device):
            loss = losses_of(task, self._module(inputs[:1]), targets[:1]).sum()
            own = torch.autograd.grad(loss, trained, allow_unused=True)
        self._wrapped.enable_hooks()
        with seeded(0, inputs.device):
            self._pass_back(task, inputs[:1], targets[:1])
        expected = [torch.zeros_like(one) if gradient is None else gradient for one, gradient in zip(trained, own, strict=True)]
        if self._is_ghost:
            found = torch.stack([one.reshape(-1)[0] for one in self._kept("_norm_sample")]).norm()
            difference = (found - _norm(expected)).abs()
        else:
            samples = self._kept("grad_sample")
            difference = _norm(sample[0] - gradient for sample, gradient in zip(samples, expected, strict=True))
        if bool(difference > _TOLERANCE * _norm(expected) + 1e-6):
            raise ConfigurationError(
                "Opacus does not find the gradient of an example as it is: a weight is used outside of its layer, or in two, or "
                "what a convolution takes is not contiguous, or Opacus takes a layer for another one. With [privacy] clipping = "
                '"flat" more models go than with "ghost"'
            )

    def _expect_no_gradient_of_another(self, task: Task, inputs: Tensor, targets: Tensor) -> None:
        """In training mode, and with dropout: of the loss of one example alone, the other has none, not even by rounding."""
        self._optimizer.zero_grad()
        losses_of(task, self._wrapped(inputs[:2]), targets[:2])[0].backward()  # type: ignore[no-untyped-call]
        kept = self._kept("_norm_sample" if self._is_ghost else "grad_sample")
        if any(len(one) != 2 for one in kept) or any(bool((one[1].abs() > 0).any()) for one in kept):
            raise ConfigurationError(_MIXED)


def _not_taken(exc: Exception) -> ConfigurationError:
    said = str(exc).splitlines()[0].split(". ")[0] if str(exc) else type(exc).__name__
    return ConfigurationError(f"the model cannot be trained with differential privacy: {said}")


def _take_off(module: nn.Module) -> None:
    """What Opacus leaves on a module: some always, more after an error, and all after one in its own constructor."""
    for handle in vars(module).pop("autograd_grad_sample_hooks", []):
        handle.remove()
    for layer in module.modules():
        for left in ("activations", "max_batch_len", "ft_compute_sample_grad"):
            vars(layer).pop(left, None)
    for parameter in module.parameters():
        parameter.grad = None
        for left in ("summed_grad", "grad_sample", "_norm_sample", "_forward_counter", "_current_grad_sample"):
            vars(parameter).pop(left, None)


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    norm: Tensor = torch.stack([one.norm() for one in tensors]).norm()
    return norm


def losses_of(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example's own, shape (n,). Raises ConfigurationError for a loss that cannot be taken so."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return task.loss(output.unsqueeze(0), target.unsqueeze(0))

    try:
        losses: Tensor = torch.func.vmap(loss, randomness="different")(outputs, targets)
    except RuntimeError as exc:
        raise ConfigurationError(
            f"the task's loss cannot be taken example by example, as differential privacy needs it ({str(exc).splitlines()[0]})"
        ) from exc
    if losses.shape != targets.shape:
        raise ConfigurationError(f"the task's loss of one example must be a scalar, and has shape {tuple(losses.shape[1:])}")
    return losses
