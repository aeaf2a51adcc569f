import numpy as np
import pytest
import torch
from torch import nn

from broker_fl.errors import ConfigurationError, ManifestMismatchError
from broker_fl.tasks.models import FederatedCNN
from broker_fl.tasks.module import MIN_RUNNING_VARIANCE, initial, load_vector, manifest_of_module, vector_of
from broker_fl.tasks.registry import load_task


def _with_batch_norm():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_floating_parameters_and_buffers_are_in_the_vector_and_counters_are_not():
    names = [spec.name for spec in manifest_of_module(_with_batch_norm()).tensors]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]


def test_a_vector_survives_the_way_through_a_module_to_the_last_bit():
    module = FederatedCNN(1, 8, 8, 3)
    manifest = manifest_of_module(module)
    vector = np.random.default_rng(0).standard_normal(manifest.size).astype(np.float32) ** 2 + 1
    vector.flags.writeable = False
    load_vector(module, vector, manifest)
    again = vector_of(module)
    assert again.dtype == np.float32
    assert again.tobytes() == vector.tobytes()
    assert torch.equal(module.out.bias.detach(), torch.tensor(vector[-3:]))


def test_the_vector_is_a_copy():
    module = nn.Linear(2, 2)
    vector = vector_of(module)
    vector += 1
    assert not np.array_equal(vector, vector_of(module))
    load_vector(module, vector, manifest_of_module(module))
    loaded = vector_of(module)
    vector += 1
    assert np.array_equal(vector_of(module), loaded)


def test_memory_formats_and_other_dtypes_do_not_change_the_layout():
    module = FederatedCNN(3, 8, 8, 3)
    vector = vector_of(module)
    manifest = manifest_of_module(module)
    module.to(memory_format=torch.channels_last)
    assert vector_of(module).tobytes() == vector.tobytes()
    load_vector(module, vector, manifest)
    assert module.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert vector_of(module).tobytes() == vector.tobytes()
    half = nn.Linear(2, 2).to(torch.float64)
    load_vector(half, np.arange(6, dtype=np.float32), manifest_of_module(half))
    assert half.weight.dtype == torch.float64
    assert vector_of(half).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_scalar_parameter_keeps_its_shape():
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(2.0))
    load_vector(module, np.array([3.0], dtype=np.float32), manifest_of_module(module))
    assert module.scale.shape == ()
    assert module.scale.item() == 3.0


def test_a_shared_tensor_is_in_the_vector_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    module = nn.Sequential(first, second)
    assert [spec.name for spec in manifest_of_module(module).tensors] == ["0.weight"]
    load_vector(module, np.arange(9, dtype=np.float32), manifest_of_module(module))
    assert torch.equal(second.weight, torch.arange(9.0).view(3, 3))


def test_another_models_vector_is_refused_with_the_first_difference():
    with pytest.raises(ManifestMismatchError, match=r"expected weight \[4, 2\], this model has weight \[2, 2\]"):
        load_vector(nn.Linear(2, 2), np.zeros(12, np.float32), manifest_of_module(nn.Linear(2, 4)))


def test_a_vector_of_another_length_is_refused():
    module = nn.Linear(2, 2)
    with pytest.raises(ManifestMismatchError, match="has 6 elements, not 5"):
        load_vector(module, np.zeros(5, np.float32), manifest_of_module(module))


def test_a_running_variance_below_zero_cannot_poison_the_model():
    module = _with_batch_norm().eval()
    vector = vector_of(module)
    vector[-2:] = [-0.5, 0.25]
    before = vector.copy()
    load_vector(module, vector, manifest_of_module(module))
    assert module[1].running_var.tolist() == pytest.approx([MIN_RUNNING_VARIANCE, 0.25])
    assert torch.isfinite(module(torch.ones(2, 3))).all()
    assert np.array_equal(vector, before)


def test_loading_leaves_the_counters_alone():
    module = _with_batch_norm()
    module(torch.rand(4, 3))
    load_vector(module, vector_of(module), manifest_of_module(module))
    assert module[1].num_batches_tracked.item() == 1


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Embedding(2, 2, dtype=torch.complex64)])
def test_a_module_without_a_vector_is_refused(module):
    with pytest.raises(ConfigurationError):
        manifest_of_module(module)


def test_the_initial_model_follows_from_the_seed_to_the_last_bit():
    task = load_task("digits")
    _, manifest, first = initial(task, None, seed=5)
    torch.rand(3)
    module, same_manifest, second = initial(task, None, seed=5)
    _, _, other = initial(task, None, seed=6)
    assert first.tobytes() == second.tobytes() == vector_of(module).tobytes()
    assert manifest == same_manifest
    assert first.tobytes() != other.tobytes()


def test_building_the_initial_model_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    initial(load_task("digits"), None, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
