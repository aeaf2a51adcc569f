import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.delta import Delta


def _values(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.ldexp(generator.normal(size=count), generator.integers(-30, 30, count)).astype(np.float32)


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    size = draw(st.integers(1, 30))
    indices = draw(st.none() | st.sets(st.integers(0, size - 1)))
    values = _values(size if indices is None else len(indices), draw(st.integers(0, 2**32)))
    return Delta(size, values, None if indices is None else np.array(sorted(indices), dtype=np.int64))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(delta=deltas(), scale=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_adding_is_the_same_as_adding_the_dense_vector_in_float32(delta, scale, seed):
    vector = _values(delta.size, seed)
    added, expected = vector.copy(), vector + delta.dense() * np.float32(scale)
    delta.add_to(added, scale)
    assert added.dtype == np.float32
    assert added.tolist() == expected.tolist()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(delta=deltas())
def test_what_was_added_is_taken_away_by_subtracting(delta):
    vector = np.zeros(delta.size, np.float32)
    delta.add_to(vector)
    assert vector.tolist() == delta.dense().tolist()
    delta.subtract_from(vector)
    assert vector.tolist() == [0] * delta.size


def test_adding_and_subtracting_change_the_vector_in_place_and_not_the_delta():
    for indices in (None, np.array([0, 2, 1])):
        delta = Delta(3, np.float32([1, 2, 3]), indices)
        vector = np.zeros(3, np.float32)
        delta.add_to(vector, 0.5)
        delta.subtract_from(vector)
        assert vector.any()
        assert delta.values.tolist() == [1, 2, 3]


def test_dense_is_a_copy():
    delta = Delta(2, np.float32([1, 2]))
    delta.dense()[0] = 9
    assert delta.values.tolist() == [1, 2]


def test_the_norm_does_not_overflow():
    assert Delta(2, np.float32([3, 4])).norm() == 5
    assert Delta(2, np.float32([3e38, 0])).norm() == pytest.approx(3e38)
    assert Delta(3, np.zeros(0, np.float32), np.zeros(0, np.int64)).norm() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(value):
    assert Delta(2, np.float32([1, 2])).is_finite()
    assert not Delta(9, np.float32([1, value]), np.array([3, 4])).is_finite()
