"""Models whose examples do not mix: what DP-SGD needs, which clips the gradient of each example."""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from broker_fl.errors import ConfigurationError

_MOST_GROUPS = 32
"""As in Wu and He 2018 (Group Normalization), and in Opacus."""


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Each BatchNorm of C channels becomes a GroupNorm of gcd(32, C) groups, with the same epsilon and as freshly made.

    That is the rule for all who build a federation's model under differential privacy, so that all come to one manifest: the
    weights and biases keep their names, the running statistics are gone. Opacus' own validator and fixer pass over a BatchNorm
    without weights, and one whose weights are frozen; this one does not.
    """
    if isinstance(module, _BatchNorm):
        return _group_norm(module)
    replaced: dict[nn.Module, nn.GroupNorm] = {}
    # Each place of a layer that several share, and all get one layer again.
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, _BatchNorm):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, replaced.setdefault(layer, _group_norm(layer)))
    return module


def _group_norm(norm: _BatchNorm) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(_MOST_GROUPS, norm.num_features), norm.num_features, norm.eps, norm.affine)


def refuse_mixing(module: nn.Module) -> None:
    """Raises ConfigurationError for a model in training mode that DP-SGD cannot take, with what to do."""
    from opacus.validators import ModuleValidator

    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            raise ConfigurationError(
                f"{_place(name, layer)} mixes the examples of a batch, so that no gradient is one example's own: take GroupNorm, "
                'or have it replaced by [privacy] mechanism = "dp-sgd" with the aggregator and all parties'
            )
        if isinstance(layer, nn.LSTM | nn.GRU | nn.RNN | nn.MultiheadAttention):
            ours = f"opacus.layers.DP{type(layer).__name__}"
            raise ConfigurationError(
                f"{_place(name, layer)} gives no gradients by example: take {ours} in its place, with batch_first = True"
            )
        if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
            raise ConfigurationError(
                f"{_place(name, layer)} changes its weights or gradients by what the batch holds, which no noise covers: take it "
                "without max_norm, scale_grad_by_freq and sparse"
            )
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            raise ConfigurationError(
                f"{_place(name, layer)} has a padding_idx, whose vector noise would move like any other: take it without, and "
                "leave the padding out in the model"
            )
        if isinstance(layer, _ConvNd) and layer.padding_mode != "zeros":
            raise ConfigurationError(
                f"{_place(name, layer)} pads by {layer.padding_mode!r}, and gradients by example are those of padding by "
                "'zeros': take that"
            )
        # Of this layer alone: its children have their own turn, and their own names.
        for error in [] if list(layer.children()) else ModuleValidator.validate(layer, strict=False):
            raise ConfigurationError(f"{_place(name, layer)} cannot be trained with differential privacy: {_first_line(error)}")


def _place(name: str, layer: nn.Module) -> str:
    return f"layer {name or 'the model'!r} ({type(layer).__name__})"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
