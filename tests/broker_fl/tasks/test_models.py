import pytest
import torch
from torch.func import functional_call, grad, vmap

from broker_fl.tasks.models import GREYSCALE_FEATURES, FederatedCNN, feature_cnn, linear, small_cnn, tanh_cnn
from broker_fl.tasks.module import manifest_of_module
from broker_fl.tasks.scattering import CHANNELS

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 17, 31), (1, 64, 64), (3, 224, 224), (2, 1, 5)]


FEATURE_SHAPES = [(81, 2, 2), (81, 7, 7), (243, 8, 8), (162, 1, 2)]


@pytest.mark.parametrize("build", [small_cnn, tanh_cnn, linear, feature_cnn])
@pytest.mark.parametrize("shape", [*SHAPES, *FEATURE_SHAPES])
def test_small_models_adapt_to_images_and_features(build, shape):
    assert build(*shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] < 64])
def test_federated_cnn_adapts_to_the_images(shape):
    assert FederatedCNN(*shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [((1, 8, 8), 10_000, 15_000), ((1, 28, 28), 10_000, 60_000), ((3, 32, 32), 10_000, 60_000)],
)
def test_small_cnn_is_small(shape, low, high):
    model = small_cnn(*shape, 10)
    assert low <= sum(parameter.numel() for parameter in model.parameters()) <= high
    assert not list(model.buffers())


def test_federated_cnn_has_the_layers_that_the_name_stands_for():
    model = FederatedCNN(3, 32, 32, 10)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert shapes == {
        "conv1.weight": (64, 3, 3, 3),
        "conv2.weight": (128, 64, 3, 3),
        "hidden.weight": (512, 8192),
        "out.weight": (10, 512),
    }
    assert [name for name, _ in model.named_buffers() if "running" in name] == [
        "norm1.running_mean",
        "norm1.running_var",
        "norm2.running_mean",
        "norm2.running_var",
    ]
    assert model.dropout.p == 0.5


def test_federated_cnn_drops_out_in_training_only():
    model = FederatedCNN(1, 8, 8, 3)
    images = torch.rand(4, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("build", "shape", "size"),
    [
        (linear, (243, 8, 8), 155_530),
        (linear, (81, 7, 7), 39_700),
        (linear, (81, 2, 2), 3_250),
        (linear, (3, 32, 32), 30_730),
        (feature_cnn, (243, 8, 8), 187_210),
        (feature_cnn, (81, 7, 7), 37_738),
        (feature_cnn, (81, 2, 2), 33_898),
        (tanh_cnn, (1, 28, 28), 26_010),
        (tanh_cnn, (3, 32, 32), 550_570),
        (tanh_cnn, (1, 8, 8), 21_546),
    ],
)
def test_models_are_of_the_size_that_they_say(build, shape, size):
    assert manifest_of_module(build(*shape, 10)).size == size


def test_tanh_cnn_has_the_layers_of_the_paper():
    grey, colour = tanh_cnn(1, 28, 28, 10), tanh_cnn(3, 32, 32, 10)
    assert _shapes(grey) == [(16, 1, 8, 8), (32, 16, 4, 4), (32, 512), (10, 32)]
    pairs = [(32, 3), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)]
    assert _shapes(colour) == [*((out, into, 3, 3) for out, into in pairs), (128, 2048), (10, 128)]


def test_large_images_are_pooled_to_few_positions():
    assert tanh_cnn(3, 224, 224, 10).hidden.in_features == 128 * 16
    assert tanh_cnn(1, 64, 64, 10).hidden.in_features == 32 * 16
    assert feature_cnn(243, 56, 56, 10).out.in_features == 64 * 16


@pytest.mark.parametrize(("channels", "groups"), [(81, 27), (243, 27), (162, 27), (1, 1), (3, 3), (4, 1), (18, 9)])
def test_groups_are_27_where_that_divides(channels, groups):
    assert linear(channels, 4, 4, 10).norm.num_groups == groups


def test_feature_cnn_knows_how_many_channels_a_greyscale_image_has():
    assert GREYSCALE_FEATURES == CHANNELS


@pytest.mark.parametrize("build", [linear, feature_cnn])
def test_heads_do_not_mind_the_scale_and_level_of_features(build):
    head = build(81, 7, 7, 10)
    features = torch.rand(4, 81, 7, 7)
    torch.testing.assert_close(head(5 * features + 3), head(features), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("build", "shape"), [(linear, (81, 2, 2)), (feature_cnn, (81, 2, 2)), (tanh_cnn, (1, 8, 8))])
def test_gradients_of_single_examples_add_up_to_that_of_the_batch(build, shape):
    """No layer mixes the examples of a batch, and each has a rule for its gradients one by one."""
    module = build(*shape, 10)
    parameters = dict(module.named_parameters())
    inputs, targets = torch.rand(5, *shape), torch.arange(5)

    def loss(values, one, target):
        return torch.nn.functional.cross_entropy(functional_call(module, values, one[None]), target[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))({name: value.detach() for name, value in parameters.items()}, inputs, targets)
    torch.nn.functional.cross_entropy(module(inputs), targets).backward()
    for name, value in parameters.items():
        torch.testing.assert_close(found[name].mean(dim=0), value.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [linear, feature_cnn, tanh_cnn])
def test_models_for_privacy_keep_no_statistics_and_change_nothing_in_place(build):
    module = build(3, 16, 16, 10)
    assert not list(module.buffers())
    assert not any(getattr(layer, "inplace", False) for layer in module.modules())


def _shapes(module):
    return [tuple(parameter.shape) for parameter in module.parameters() if parameter.ndim > 1]
