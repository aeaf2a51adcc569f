import sys
from pathlib import Path

import pytest
import torch

from broker_fl.errors import ConfigurationError, DataError
from broker_fl.tasks.evaluation import evaluate
from broker_fl.tasks.module import initial
from broker_fl.tasks.own import TASK_METHODS
from broker_fl.tasks.registry import load_task
from schemas.frame import TrainingPlan
from workers.trainer import train

OWN_TASK = Path(__file__).parent / "own_task.py"

COMPLETE = "class Complete:\n" + "\n".join(f"    def {name}(self, *args): ..." for name in TASK_METHODS) + "\n"


@pytest.fixture(autouse=True)
def _leave_imports_alone(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_task_") or name in {"mine", "sibling_of_mine"}:
            del sys.modules[name]


def _written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_of_ones_own_loads_by_its_path_and_learns():
    task = load_task(f"{OWN_TASK}:Wine")
    module, manifest, vector = initial(task, None, seed=0)
    result = train(
        task,
        module,
        task.train_examples(None),
        base=vector,
        manifest=manifest,
        plan=TrainingPlan(epochs=10),
        device=torch.device("cpu"),
        seed=0,
        should_stop=lambda: False,
    )
    assert result is not None
    assert evaluate(task, module, task.test_examples(None), device=torch.device("cpu")).accuracy > 0.9


def test_a_user_needs_few_lines():
    assert len([line for line in OWN_TASK.read_text().splitlines() if line.strip()]) <= 40


def test_a_module_in_the_current_directory_is_found(tmp_path, monkeypatch):
    _written(tmp_path, COMPLETE)
    monkeypatch.chdir(tmp_path)
    assert type(load_task("mine:Complete")).__name__ == "Complete"


@pytest.mark.parametrize("name", ["Complete", "instance", "factory"])
def test_a_class_an_object_and_a_function_will_do(tmp_path, name):
    path = _written(tmp_path, COMPLETE + "instance = Complete()\ndef factory(): return Complete()\n")
    assert type(load_task(f"{path}:{name}")).__name__ == "Complete"


def test_a_file_may_import_its_neighbours_and_hold_dataclasses(tmp_path):
    _written(tmp_path, COMPLETE, name="sibling_of_mine.py")
    path = _written(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom sibling_of_mine import Complete\n"
        "@dataclass(frozen=True)\nclass Mine(Complete):\n    rate: float = 1.0\n",
    )
    assert load_task(f"{path}:Mine").rate == 1.0


def test_the_tasks_folder_cannot_shadow_anything(tmp_path):
    _written(tmp_path, COMPLETE)
    front = list(sys.path)
    load_task(f"{tmp_path / 'mine.py'}:Complete")
    assert sys.path == [*front, str(tmp_path)]


def test_a_task_file_named_like_one_of_our_packages_replaces_nothing(tmp_path):
    import schemas

    path = _written(tmp_path, COMPLETE, name="schemas.py")
    load_task(f"{path}:Complete")
    assert sys.modules["schemas"] is schemas


def test_missing_methods_are_named(tmp_path):
    path = _written(tmp_path, COMPLETE.replace("def prepare", "def prepared").replace("def loss", "def lost"))
    with pytest.raises(ConfigurationError, match=r"is no task: it lacks prepare, loss$"):
        load_task(f"{path}:Complete")


def test_a_missing_name_is_answered_with_the_nearest(tmp_path):
    path = _written(tmp_path, COMPLETE)
    with pytest.raises(ConfigurationError, match="has no 'Complet': did you mean 'Complete'"):
        load_task(f"{path}:Complet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise ValueError('two\\nlines')", r"ValueError: two lines \(mine.py, line 2\)"),
        ("import no_such_package_at_all", "ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def Complete(): return 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_mistake_in_the_users_file_is_one_line(tmp_path, text, message):
    path = _written(tmp_path, text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_task(f"{path}:Complete")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_an_error_of_our_own_passes_as_it_is(tmp_path):
    path = _written(tmp_path, "from broker_fl.errors import DataError\nraise DataError('no wine')")
    with pytest.raises(DataError, match=r"^no wine$"):
        load_task(f"{path}:Complete")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"there is no task file .*absent.py"):
        load_task(f"{tmp_path / 'absent.py'}:Complete")


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(ConfigurationError, match=r"no_such\.module cannot be loaded: ModuleNotFoundError"):
        load_task("no_such.module:Complete")
