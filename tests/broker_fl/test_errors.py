import inspect

import pytest

from broker_fl import errors
from broker_fl.errors import BrokerFLError, first_of, nearest


def _drawn_tree() -> dict[str, str]:
    """The parent of each class in the drawing; four columns are one generation."""
    lines = [line for line in inspect.getdoc(errors).splitlines() if "Error " in line]
    ancestors: list[str] = []
    parents: dict[str, str] = {}
    for line in lines:
        name = line.strip("│├└─ ").split()[0]
        generation = line.index(name) // 4
        del ancestors[generation:]
        parents[name] = ancestors[-1] if ancestors else "Exception"
        ancestors.append(name)
    return parents


def _classes() -> dict[str, type[BaseException]]:
    return {name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, BaseException)}


def test_the_drawn_tree_is_the_tree_of_the_classes():
    assert _drawn_tree() == {name: error.__base__.__name__ for name, error in _classes().items()}


def test_every_error_is_public():
    assert set(_classes()) | {"first_of", "nearest"} == set(errors.__all__)


@pytest.mark.parametrize("name", sorted(_classes()))
def test_every_error_has_one_parent_and_keeps_its_message(name):
    error = _classes()[name]
    assert issubclass(error, BrokerFLError)
    assert len(error.__bases__) == 1
    assert str(error("what to do")) == "what to do"


def test_the_nearest_right_name_comes_first_and_then_all():
    assert nearest("fedasinc", ["fedbuff", "fedasync"]) == "did you mean 'fedasync'? (known: fedasync, fedbuff)"


def test_a_name_like_no_other_gets_the_list_alone():
    assert nearest("xyz", ["fedbuff", "fedasync"]) == "(known: fedasync, fedbuff)"
    assert nearest("xyz", []) == "(known: )"


def test_the_first_error_of_nested_groups_is_found():
    first, second = ValueError("first"), OSError("second")
    assert first_of(ExceptionGroup("outer", [ExceptionGroup("inner", [first]), second])) is first
    assert first_of(second) is second
    cancelled = BaseExceptionGroup("outer", [KeyboardInterrupt(), first])
    assert isinstance(first_of(cancelled), KeyboardInterrupt)
