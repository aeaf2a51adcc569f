"""Tasks and models by name, and tasks of one's own by `path/to/file.py:NAME` or `package.module:NAME`.

Nothing here imports torch before a task is asked for, so that the command line answers at once.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from broker_fl.errors import ConfigurationError, nearest
from broker_fl.tasks.own import load_own_task

if TYPE_CHECKING:
    from broker_fl.tasks.task import Task

TASKS = {
    "cifar10": "broker_fl.tasks.cifar10:cifar10",
    "digits": "broker_fl.tasks.digits:digits",
    "fashion_mnist": "broker_fl.tasks.fashion_mnist:fashion_mnist",
    "npz": "broker_fl.tasks.npz:npz",
}
MODELS = {
    "feature_cnn": "broker_fl.tasks.models:feature_cnn",
    "federated_cnn": "broker_fl.tasks.models:FederatedCNN",
    "linear": "broker_fl.tasks.models:linear",
    "small_cnn": "broker_fl.tasks.models:small_cnn",
    "tanh_cnn": "broker_fl.tasks.models:tanh_cnn",
}
FEATURES = {
    "scattering": "broker_fl.tasks.scattered_images:ScatteredImages",
}
"""What a built-in task's images can be replaced by; the entry makes a task of the task and the model."""
NO_FEATURES = "none"
DEFAULT_MODELS = {NO_FEATURES: "small_cnn", "scattering": "linear"}
"""By features."""


def load_task(
    spec: str,
    *,
    model: str | None = None,
    classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    features: str = NO_FEATURES,
) -> "Task":
    """The task that `spec` names.

    `model` and `features` are for built-in tasks; `classes` and `image_shape` (channels, height, width) are for npz, whose data
    would tell them otherwise. Raises ConfigurationError for names, combinations and files that cannot be.
    """
    if spec in TASKS:
        return _built_in(spec, model=model, classes=classes, image_shape=image_shape, features=features)
    place, colon, name = spec.rpartition(":")
    if not (place and colon and name):
        raise ConfigurationError(
            f"there is no task {spec!r}: {nearest(spec, TASKS)}; one of your own is path/to/file.py:NAME or package.module:NAME"
        )
    if model is not None:
        raise ConfigurationError(f"model = {model!r} is for built-in tasks: {spec} builds its own model")
    if features != NO_FEATURES:
        raise ConfigurationError(
            f"features = {features!r} is for built-in tasks: {spec} can be a broker_fl.tasks.ScatteredImages of its images"
        )
    _refuse_npz_settings(spec, classes=classes, image_shape=image_shape)
    return load_own_task(place, name)


def _built_in(
    spec: str, *, model: str | None, classes: int | None, image_shape: tuple[int, int, int] | None, features: str
) -> "Task":
    if features not in DEFAULT_MODELS:
        raise ConfigurationError(f"there are no features {features!r}: {nearest(features, DEFAULT_MODELS)}")
    model = model or DEFAULT_MODELS[features]
    if model not in MODELS:
        raise ConfigurationError(f"there is no model {model!r}: {nearest(model, MODELS)}")
    build_task, build_model = _found(TASKS[spec]), _found(MODELS[model])
    if spec == "npz":
        task = build_task(build_model, classes=classes, image_shape=image_shape)
    else:
        _refuse_npz_settings(spec, classes=classes, image_shape=image_shape)
        task = build_task(build_model)
    if features == NO_FEATURES:
        return cast("Task", task)
    return cast("Task", _found(FEATURES[features])(task, build_model))


def _found(entry: str) -> Callable[..., object]:
    module, _, name = entry.partition(":")
    return cast("Callable[..., object]", getattr(importlib.import_module(module), name))


def _refuse_npz_settings(spec: str, *, classes: int | None, image_shape: tuple[int, int, int] | None) -> None:
    if classes is not None or image_shape is not None:
        given = "classes" if classes is not None else "image_shape"
        raise ConfigurationError(f"{given} is for the task npz: {spec} knows its own")
