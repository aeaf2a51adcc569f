import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.sparsify import top_k

LARGE = 200_000
"""More than what is looked at whole, so that a sample decides first."""


def _adversarial() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    stride = LARGE // 32_768
    hidden = generator.random(LARGE).astype(np.float32)
    hidden[::stride] = 0
    shown = np.zeros(LARGE, np.float32)
    shown[::stride] = 1
    rare = np.zeros(LARGE, np.float32)
    rare[generator.choice(LARGE, 150, replace=False)] = generator.random(150)
    return {
        "normal": np.abs(generator.normal(size=LARGE)).astype(np.float32),
        "heavy tails": np.abs(generator.standard_cauchy(LARGE)).astype(np.float32),
        "the sample sees only zeros": hidden,
        "the sample sees all that there is": shown,
        "few that count": rare,
        "all equal": np.full(LARGE, 0.5, np.float32),
        "all zero": np.zeros(LARGE, np.float32),
        "ascending": np.arange(LARGE, dtype=np.float32),
        "two values": (np.arange(LARGE) % 2).astype(np.float32),
        "the largest come last": np.where(np.arange(LARGE) > LARGE - 3000, 5, 1).astype(np.float32),
        "denormals": np.full(LARGE, 1e-45, np.float32),
        "the largest numbers": np.full(LARGE, np.finfo(np.float32).max),
    }


ADVERSARIAL = _adversarial()


def _expect_top(magnitudes: np.ndarray, k: int) -> None:
    chosen = top_k(magnitudes, k)
    assert chosen.shape == (k,)
    assert (np.diff(chosen) > 0).all()
    assert np.sort(magnitudes[chosen]).tolist() == np.sort(magnitudes)[magnitudes.size - k :].tolist()


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    magnitudes=st.binary(min_size=1, max_size=60).map(lambda drawn: np.frombuffer(drawn, np.uint8).astype(np.float32)),
    k=st.integers(1, 60),
)
def test_exactly_the_k_largest_are_chosen_in_ascending_order(magnitudes, k):
    _expect_top(magnitudes, min(k, magnitudes.size))


@pytest.mark.parametrize("name", sorted(ADVERSARIAL))
def test_the_sample_never_changes_what_is_chosen(name):
    for k in (1, 200, 2000, 20_000, 150_000, LARGE - 1):
        _expect_top(ADVERSARIAL[name], k)


def test_all_are_chosen_where_k_is_the_size_or_more():
    assert top_k(np.float32([3, 1, 2]), 3).tolist() == [0, 1, 2]
    assert top_k(np.float32([3, 1, 2]), 9).tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [0, -1])
def test_none_are_chosen_where_k_is_zero(k):
    assert top_k(np.float32([3, 1, 2]), k).size == 0
    assert top_k(np.zeros(0, np.float32), k).size == 0


@pytest.mark.parametrize("name", sorted(ADVERSARIAL))
def test_the_same_magnitudes_give_the_same_choice(name):
    magnitudes = ADVERSARIAL[name]
    assert top_k(magnitudes, 1000).tolist() == top_k(magnitudes.copy(), 1000).tolist()


def test_magnitudes_are_only_read():
    magnitudes = ADVERSARIAL["normal"].copy()
    magnitudes.flags.writeable = False
    top_k(magnitudes, 100)
