import math
from collections import OrderedDict

import numpy as np
import opacus.layers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from broker_fl.errors import ConfigurationError
from broker_fl.tasks.module import initial, manifest_of_module, vector_of
from broker_fl.tasks.per_example import refuse_mixing, without_batch_norm
from broker_fl.tasks.registry import load_task

SHAPES = {nn.BatchNorm1d: (2,), nn.BatchNorm2d: (2, 3), nn.BatchNorm3d: (2, 3, 2)}
"""Of what follows the channels."""


def _built(layers):
    return nn.Sequential(OrderedDict(layers))


class _BuildsIt:
    """As much of a task as a first model takes."""

    def __init__(self, build):
        self._build = build

    def build_model(self, data):
        return self._build()


@given(st.integers(1, 300))
@settings(deadline=None)
def test_a_batch_norm_becomes_a_group_norm_of_as_many_groups_as_divide_both_32_and_the_channels(channels):
    replaced = without_batch_norm(nn.BatchNorm2d(channels))
    assert type(replaced) is nn.GroupNorm
    assert (replaced.num_channels, replaced.num_groups) == (channels, math.gcd(32, channels))


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (32, 32), (48, 16), (10, 2), (7, 1), (1, 1)])
def test_groups_are_32_where_that_divides(channels, groups):
    assert without_batch_norm(nn.BatchNorm1d(channels)).num_groups == groups


@pytest.mark.parametrize("kind", [*SHAPES, nn.SyncBatchNorm])
def test_epsilon_and_whether_there_are_weights_are_kept(kind):
    replaced = without_batch_norm(kind(6, eps=0.125))
    assert (replaced.eps, replaced.affine) == (0.125, True)
    replaced = without_batch_norm(kind(6, affine=False))
    assert (replaced.eps, replaced.affine) == (1e-5, False)
    assert not list(replaced.parameters())


def test_weights_begin_as_freshly_made_and_are_trained_even_where_they_were_frozen():
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.weight, 7.0)
    norm.requires_grad_(False)
    replaced = without_batch_norm(norm)
    assert replaced.weight.tolist() == [1.0] * 4
    assert replaced.bias.tolist() == [0.0] * 4
    assert all(parameter.requires_grad for parameter in replaced.parameters())


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_what_has_no_weights_or_no_statistics_is_replaced_too(affine, track):
    module = _built([("norm", nn.BatchNorm2d(4, affine=affine, track_running_stats=track))])
    assert type(without_batch_norm(module).norm) is nn.GroupNorm
    assert not list(module.buffers())


def test_nested_layers_are_replaced_where_they_are_and_others_are_left():
    inner = _built([("conv", nn.Conv2d(3, 8, 3)), ("norm", nn.BatchNorm2d(8))])
    module = _built([("body", nn.ModuleList([inner, nn.ModuleDict({"deep": nn.BatchNorm1d(5)})])), ("out", nn.Linear(2, 2))])
    conv, out = inner.conv, module.out
    assert without_batch_norm(module) is module
    assert type(module.body[0].norm) is nn.GroupNorm
    assert type(module.body[1]["deep"]) is nn.GroupNorm
    assert module.body[0].conv is conv
    assert module.out is out
    refuse_mixing(module)


def test_a_model_without_batch_norm_comes_back_as_it_was():
    module = _built([("conv", nn.Conv2d(3, 8, 3)), ("norm", nn.GroupNorm(2, 8))])
    layers = list(module.children())
    assert list(without_batch_norm(module).children()) == layers


def test_names_of_weights_are_kept_and_running_statistics_are_gone_from_the_manifest():
    def build():
        return _built([("conv", nn.Conv2d(3, 8, 3)), ("norm", nn.BatchNorm2d(8)), ("flat", nn.BatchNorm1d(4, affine=False))])

    before = {spec.name: spec.shape for spec in manifest_of_module(build()).tensors}
    after = {spec.name: spec.shape for spec in manifest_of_module(without_batch_norm(build())).tensors}
    assert after == {name: shape for name, shape in before.items() if "running" not in name}
    assert list(after) == ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]


def test_two_parties_and_the_aggregator_come_to_one_model_and_one_manifest():
    models = [initial(load_task("digits", model="federated_cnn"), None, seed=5, by_example=True) for _ in range(3)]
    assert len({manifest.digest for _, manifest, _ in models}) == 1
    assert len({vector.tobytes() for _, _, vector in models}) == 1
    module, manifest, vector = models[0]
    assert manifest.digest == manifest_of_module(module).digest
    assert np.array_equal(vector, vector_of(module))
    plain = initial(load_task("digits", model="federated_cnn"), None, seed=5)[1]
    assert plain.digest != manifest.digest
    assert not any("running" in spec.name for spec in manifest.tensors)


def test_the_other_weights_of_a_first_model_are_the_same_with_and_without_batch_norm():
    task = load_task("digits", model="federated_cnn")
    plain, by_example = (initial(task, None, seed=5, by_example=one)[0].state_dict() for one in (False, True))
    assert by_example
    assert all(torch.equal(plain[name], values) for name, values in by_example.items())


def test_a_first_model_of_plain_training_keeps_its_batch_norm():
    task = load_task("digits", model="federated_cnn")
    module, manifest, _ = initial(task, None, seed=5, by_example=False)
    assert type(module.norm1) is nn.BatchNorm2d
    assert "norm1.running_mean" in [spec.name for spec in manifest.tensors]
    assert manifest.digest == initial(task, None, seed=5)[1].digest


@pytest.mark.parametrize("model", ["small_cnn", "tanh_cnn", "linear", "feature_cnn", "federated_cnn"])
def test_every_built_in_model_can_be_trained_by_example(model):
    module, _, _ = initial(load_task("digits", model=model), None, seed=0, by_example=True)
    refuse_mixing(module.train())
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_the_output_of_an_example_does_not_depend_on_its_batch_afterwards(kind, affine):
    module = _built([("norm", kind(6, affine=affine))]).train()
    batch = torch.randn(5, 6, *SHAPES[kind], generator=torch.Generator().manual_seed(0))
    other = torch.cat([batch[:1], 100 * batch[1:]])
    assert not torch.allclose(module(batch)[0], module(other)[0])
    without_batch_norm(module).train()
    torch.testing.assert_close(module(batch)[0], module(other)[0])
    torch.testing.assert_close(module(batch)[0], module(batch[:1])[0])


def test_a_batch_norm_that_two_places_share_is_replaced_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(4)

    module = without_batch_norm(Twice()).train()
    assert type(module.first) is nn.GroupNorm
    assert module.second is module.first


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_batch_norm_that_is_left_is_refused_with_what_to_do(affine, frozen):
    module = _built([("body", _built([("norm", nn.BatchNorm2d(4, affine=affine))]))]).requires_grad_(not frozen)
    _expect_refusal(
        module,
        "layer 'body.norm' (BatchNorm2d) mixes the examples of a batch, so that no gradient is one example's own: "
        'take GroupNorm, or have it replaced by [privacy] mechanism = "dp-sgd" with the aggregator and all parties',
    )


def test_a_model_that_is_nothing_but_a_batch_norm_is_named_so():
    _expect_refusal(nn.BatchNorm1d(3), "layer 'the model' (BatchNorm1d) mixes the examples")


@pytest.mark.parametrize(
    "layer", [nn.LSTM(3, 4), nn.GRU(3, 4), nn.RNN(3, 4), nn.MultiheadAttention(4, 2)], ids=lambda layer: type(layer).__name__
)
def test_layers_without_gradients_by_example_are_refused_with_opacus_layer_in_their_place(layer):
    name = type(layer).__name__
    _expect_refusal(
        _built([("core", layer)]),
        f"layer 'core' ({name}) gives no gradients by example: take opacus.layers.DP{name} in its place",
    )
    assert hasattr(opacus.layers, f"DP{name}")


def test_attention_within_another_layer_is_named_by_its_path():
    _expect_refusal(nn.TransformerEncoderLayer(4, 2), "layer 'self_attn' (MultiheadAttention)")


def test_an_instance_norm_with_running_statistics_is_refused():
    _expect_refusal(
        _built([("norm", nn.InstanceNorm2d(4, affine=True, track_running_stats=True))]),
        "layer 'norm' (InstanceNorm2d) cannot be trained with differential privacy: ",
    )


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_that_looks_at_its_batch_is_refused(option):
    _expect_refusal(
        _built([("words", nn.Embedding(9, 2, **option))]),
        "layer 'words' (Embedding) changes its weights or gradients by what the batch holds",
    )


def test_an_embedding_with_padding_is_refused():
    _expect_refusal(_built([("words", nn.Embedding(9, 2, padding_idx=0))]), "layer 'words' (Embedding) has a padding_idx")


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_opacus_takes_for_another_is_refused(kind, mode):
    _expect_refusal(_built([("conv", kind(2, 2, 3, padding=1, padding_mode=mode))]), f"({kind.__name__}) pads by '{mode}'")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Embedding(9, 2),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        opacus.layers.DPLSTM(3, 4),
        opacus.layers.DPMultiheadAttention(4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_opacus_takes_are_let_pass(layer):
    refuse_mixing(_built([("layer", layer)]).train())
    # Refused is only what is refused by name: the same layer beside a BatchNorm is.
    _expect_refusal(_built([("layer", layer), ("norm", nn.BatchNorm1d(2))]), "layer 'norm' (BatchNorm1d)")


def test_a_first_model_by_example_is_refused_at_once_where_it_cannot_be():
    task = _BuildsIt(lambda: _built([("core", nn.LSTM(3, 4)), ("norm", nn.BatchNorm1d(4))]))
    assert "core.weight_ih_l0" in [spec.name for spec in initial(task, None, seed=0)[1].tensors]
    with pytest.raises(ConfigurationError, match=r"opacus\.layers\.DPLSTM"):
        initial(task, None, seed=0, by_example=True)


def _expect_refusal(module, text):
    with pytest.raises(ConfigurationError) as caught:
        refuse_mixing(module.train())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
