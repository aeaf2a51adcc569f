import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.merging.staleness import STALENESS
from broker_fl.config import MergingSettings

FUNCTIONS = sorted(STALENESS)


def _discount(name: str, staleness: int, **changed: float) -> float:
    return STALENESS[name](staleness, MergingSettings(staleness=name, **changed))


@pytest.mark.parametrize("staleness", [0, 1, 7, 10**6])
def test_constant_takes_nothing_off(staleness):
    assert _discount("constant", staleness) == 1.0


@pytest.mark.parametrize(
    ("staleness", "exponent", "expected"),
    [
        (0, 0.5, 1.0),
        (1, 0.5, 0.7071067811865476),
        (3, 0.5, 0.5),
        (8, 0.5, 1 / 3),
        (99, 0.5, 0.1),
        (1, 1.0, 0.5),
        (9, 1.0, 0.1),
        (1, 2.0, 0.25),
        (4, 0.0, 1.0),
    ],
)
def test_polynomial_is_one_plus_staleness_to_the_minus_a(staleness, exponent, expected):
    assert _discount("polynomial", staleness, exponent=exponent) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("staleness", "a", "b", "expected"),
    [
        (0, 10, 4, 1.0),
        (4, 10, 4, 1.0),
        (5, 10, 4, 1 / 11),
        (6, 10, 4, 1 / 21),
        (16, 10, 4, 1 / 121),
        (5, 0.5, 4, 1 / 1.5),
        (6, 0.5, 4, 0.5),
        (1, 1, 0, 0.5),
        (9, 0, 4, 1.0),
    ],
)
def test_hinge_takes_nothing_off_up_to_b_and_then_one_over_a_times_the_rest_plus_one(staleness, a, b, expected):
    assert _discount("hinge", staleness, exponent=a, hinge=b) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(staleness=st.integers(0, 2**53), exponent=st.floats(0, 10), hinge=st.integers(0, 1000))
def test_a_fresh_update_counts_fully_and_a_late_one_less_but_something(name, staleness, exponent, hinge):
    assert _discount(name, 0, exponent=exponent, hinge=hinge) == 1.0
    discount = _discount(name, staleness, exponent=exponent, hinge=hinge)
    assert 0 < discount <= 1
    assert _discount(name, staleness + 1, exponent=exponent, hinge=hinge) <= discount


def test_every_function_of_the_settings_is_there():
    for name in FUNCTIONS:
        assert MergingSettings(staleness=name).staleness == name
    with pytest.raises(ValueError, match="staleness"):
        MergingSettings(staleness="none")
