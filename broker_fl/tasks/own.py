"""A user's own task: any file or module that holds an object with the methods of a Task."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from broker_fl.errors import BrokerFLError, ConfigurationError, nearest

if TYPE_CHECKING:
    from broker_fl.tasks.task import Task

TASK_METHODS = ("build_model", "train_examples", "test_examples", "prepare", "loss", "correct")
"""Of the Protocol; spelt out, since reading them off it would import torch."""


def load_own_task(place: str, name: str) -> "Task":
    """The Task called `name` at `place`: a path that ends in `.py`, or the dotted name of a module.

    `name` is a Task, or a class or function that gives one when called without arguments. Raises ConfigurationError,
    in one line, for whatever is wrong with the user's file; an error of our own family passes as it is.
    """
    spec = f"{place}:{name}"
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigurationError(f"{place} has no {name!r}: {nearest(name, public)}")
    found = getattr(module, name)
    if isinstance(found, type) or (callable(found) and _missing(found)):
        found = _attempt(found, what=spec)
    if missing := _missing(found):
        raise ConfigurationError(f"{spec} is no task: it lacks {', '.join(missing)}")
    return cast("Task", found)


def _missing(candidate: object) -> list[str]:
    return [method for method in TASK_METHODS if not callable(getattr(candidate, method, None))]


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigurationError(f"there is no task file {path}")
    _append_to_path(path.resolve().parent)
    # A name of its own, so that a file called `schemas.py` or `random.py` cannot stand in for that module.
    name = f"own_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Before it runs, since a dataclass looks its own module up there.
    sys.modules[name] = module
    loader = spec.loader
    _attempt(lambda: loader.exec_module(module), what=str(path))
    return module


def _module_by_name(name: str) -> ModuleType:
    _append_to_path(Path.cwd())
    return cast("ModuleType", _attempt(lambda: importlib.import_module(name), what=name))


def _append_to_path(folder: Path) -> None:
    """Never to the front: a folder called `schemas` or `workers` beside a task must not hide ours."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _attempt(run: Callable[[], object], *, what: str) -> object:
    try:
        return run()
    except BrokerFLError:
        raise
    except (Exception, SystemExit) as exc:
        # The innermost frame, so that one line is enough to find the mistake.
        frames = traceback.extract_tb(exc.__traceback__)
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
        reason = " ".join(str(exc).split())
        raise ConfigurationError(f"{what} cannot be loaded: {type(exc).__name__}: {reason}{where}") from exc
