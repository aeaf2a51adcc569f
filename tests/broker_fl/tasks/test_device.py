import pytest
import torch

from broker_fl.errors import ConfigurationError
from broker_fl.tasks.device import autocast, choose_device, laid_out, place

HERE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def test_auto_takes_the_best_that_is_there():
    assert choose_device().type == next(name for name, here in HERE.items() if here)


@pytest.mark.parametrize("name", HERE)
def test_a_device_is_given_if_it_is_there_and_refused_if_not(name):
    if HERE[name]:
        assert choose_device(name).type == name
    else:
        with pytest.raises(ConfigurationError, match=f"torch finds no {name} device on this machine"):
            choose_device(name)


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigurationError, match="there is no device 'gpu'"):
        choose_device("gpu")


def test_bfloat16_is_for_the_arithmetic_and_not_for_the_weights():
    layer = torch.nn.Linear(4, 4)
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert layer(torch.ones(2, 4)).dtype == expected
    assert layer.weight.dtype == torch.float32


def test_channels_last_is_for_images_only():
    images, rows = torch.rand(2, 3, 4, 4), torch.rand(2, 3)
    assert laid_out(images, channels_last=True).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out(images, channels_last=True), images)
    assert laid_out(images, channels_last=False) is images
    assert laid_out(rows, channels_last=True) is rows
    layer = torch.nn.Conv2d(3, 4, 3)
    place(layer, torch.device("cpu"), channels_last=True)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
