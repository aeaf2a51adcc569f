import inspect
import subprocess
import sys

import pytest
import torch

from broker_fl.errors import DataError
from broker_fl.tasks import Examples, Task
from broker_fl.tasks.own import TASK_METHODS


def test_examples_are_taken_by_position():
    examples = Examples(inputs=torch.arange(6.0).view(3, 2), targets=torch.tensor([7, 8, 9]))
    taken = examples.take(torch.tensor([2, 0]))
    assert len(examples) == 3
    assert taken.inputs.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert taken.targets.tolist() == [9, 7]


@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0], [1], [2]])])
def test_targets_that_do_not_fit_the_inputs_are_refused(targets):
    with pytest.raises(DataError, match=r"targets must be int64 of shape \(3,\)"):
        Examples(inputs=torch.zeros(3, 2), targets=targets)


def test_the_methods_that_an_own_task_is_checked_for_are_the_protocols():
    protocol = [name for name, value in vars(Task).items() if inspect.isfunction(value) and not name.startswith("_")]
    assert tuple(protocol) == TASK_METHODS


def test_the_package_and_its_registry_do_not_import_torch():
    code = "import sys, broker_fl.tasks, broker_fl.tasks.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_an_unknown_public_name_is_an_attribute_error():
    import broker_fl.tasks

    with pytest.raises(AttributeError, match="has no attribute 'Tusk'"):
        _ = broker_fl.tasks.Tusk
