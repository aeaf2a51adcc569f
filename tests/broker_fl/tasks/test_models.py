import pytest
import torch

from broker_fl.tasks.models import FederatedCNN, small_cnn

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 17, 31), (1, 64, 64), (3, 224, 224), (2, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_small_cnn_adapts_to_the_images(shape):
    assert small_cnn(*shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


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
