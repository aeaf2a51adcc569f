import inspect

import pytest

from broker_fl.cli.wiring import task_of
from broker_fl.config import TaskSettings, load_settings
from broker_fl.errors import ConfigurationError
from broker_fl.tasks.models import FederatedCNN
from broker_fl.tasks.own import TASK_METHODS
from broker_fl.tasks.registry import DEFAULT_MODELS, FEATURES, MODELS, TASKS, load_task
from broker_fl.tasks.scattered_images import ScatteredImages


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", [None, *MODELS])
@pytest.mark.parametrize("features", DEFAULT_MODELS)
def test_every_name_in_the_registry_gives_a_task(name, model, features):
    task = load_task(name, model=model, features=features)
    assert all(inspect.ismethod(getattr(task, method)) for method in TASK_METHODS)


def test_the_model_is_the_one_asked_for():
    assert isinstance(load_task("digits", model="federated_cnn").build_model(None), FederatedCNN)
    assert not isinstance(load_task("digits").build_model(None), FederatedCNN)


def test_an_unknown_task_is_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no task 'digit': did you mean 'digits'\?.*path/to/file.py:NAME"):
        load_task("digit")


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no model 'smal_cnn': did you mean 'small_cnn'\?"):
        load_task("digits", model="smal_cnn")


def test_without_a_model_features_get_a_linear_one():
    assert next(name for name, _ in load_task("digits").build_model(None).named_parameters()) == "conv1.weight"
    on_features = load_task("digits", features="scattering").build_model(None)
    assert {name: tuple(parameter.shape) for name, parameter in on_features.named_parameters()} == {
        "out.weight": (10, 324),
        "out.bias": (10,),
    }


def test_the_model_asked_for_is_built_for_the_features():
    task = load_task("npz", model="feature_cnn", classes=7, image_shape=(3, 32, 32), features="scattering")
    assert isinstance(task, ScatteredImages)
    assert sum(parameter.numel() for parameter in task.build_model(None).parameters()) == 187_210 - 3 * 1025


def test_unknown_features_are_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no features 'scatering': did you mean 'scattering'\?") as caught:
        load_task("digits", features="scatering")
    assert "\n" not in str(caught.value)


def test_an_own_task_takes_no_features():
    with pytest.raises(ConfigurationError, match=r"features = 'scattering' is for built-in tasks: somewhere.py:Task") as caught:
        load_task("somewhere.py:Task", features="scattering")
    assert "\n" not in str(caught.value)


def test_the_settings_have_the_features_of_the_registry():
    assert list(DEFAULT_MODELS) == [TaskSettings().features, *FEATURES]
    task = task_of(load_settings(flags={"task": {"features": "scattering"}}, environment={}))
    assert isinstance(task, ScatteredImages)
    with pytest.raises(ConfigurationError, match=r"the flags: task.features") as caught:
        load_settings(flags={"task": {"features": "wavelets"}}, environment={})
    assert "\n" not in str(caught.value)


def test_an_own_task_takes_no_model():
    with pytest.raises(ConfigurationError, match="builds its own model"):
        load_task("somewhere.py:Task", model="small_cnn")


@pytest.mark.parametrize("given", [{"classes": 3}, {"image_shape": (1, 8, 8)}])
@pytest.mark.parametrize("spec", ["digits", "somewhere.py:Task"])
def test_only_npz_takes_classes_and_image_shape(spec, given):
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))} is for the task npz"):
        load_task(spec, **given)
