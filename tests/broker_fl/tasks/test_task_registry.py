import inspect

import pytest

from broker_fl.errors import ConfigurationError
from broker_fl.tasks.models import FederatedCNN
from broker_fl.tasks.own import TASK_METHODS
from broker_fl.tasks.registry import MODELS, TASKS, load_task


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", [None, *MODELS])
def test_every_name_in_the_registry_gives_a_task(name, model):
    task = load_task(name, model=model)
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


def test_an_own_task_takes_no_model():
    with pytest.raises(ConfigurationError, match="builds its own model"):
        load_task("somewhere.py:Task", model="small_cnn")


@pytest.mark.parametrize("given", [{"classes": 3}, {"image_shape": (1, 8, 8)}])
@pytest.mark.parametrize("spec", ["digits", "somewhere.py:Task"])
def test_only_npz_takes_classes_and_image_shape(spec, given):
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))} is for the task npz"):
        load_task(spec, **given)
