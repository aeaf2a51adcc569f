import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.sparsify import kept, stratified, top_k
from broker_fl.codecs.splitmix import splitmix64

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
    chosen = top_k([magnitudes], k)
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
    assert top_k([np.float32([3, 1, 2])], 3).tolist() == [0, 1, 2]
    assert top_k([np.float32([3, 1, 2])], 9).tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [0, -1])
def test_none_are_chosen_where_k_is_zero(k):
    assert top_k([np.float32([3, 1, 2])], k).size == 0
    assert top_k([np.zeros(0, np.float32)], k).size == 0


@pytest.mark.parametrize("name", sorted(ADVERSARIAL))
def test_the_same_magnitudes_give_the_same_choice(name):
    magnitudes = ADVERSARIAL[name]
    assert top_k([magnitudes], 1000).tolist() == top_k([magnitudes.copy()], 1000).tolist()


def test_magnitudes_are_only_read():
    magnitudes = ADVERSARIAL["normal"].copy()
    magnitudes.flags.writeable = False
    top_k([magnitudes], 100)


@pytest.mark.parametrize("name", sorted(ADVERSARIAL))
def test_parts_are_looked_at_as_one(name):
    values = ADVERSARIAL[name] * np.where(np.arange(LARGE) % 3, 1, -1).astype(np.float32)
    cuts = [1, 7, 70_000, 70_001, 150_000]
    for k in (1, 2000, 150_000):
        chosen = top_k(np.split(values, cuts), k)
        assert (np.diff(chosen) > 0).all()
        assert np.sort(np.abs(values)[chosen]).tolist() == np.sort(np.abs(values))[LARGE - k :].tolist()
    assert top_k([values[:0], values[:5], values[:0]], 5).tolist() == list(range(5))


def test_of_equal_magnitudes_the_first_are_chosen():
    assert top_k([np.float32([1, -2, 2, 2, 3, -2])], 3).tolist() == [1, 2, 4]


def test_what_is_not_a_number_is_not_chosen_but_an_error():
    with pytest.raises(ValueError, match="only 1 of 3 values are numbers"):
        top_k([np.float32([np.nan, 1, np.nan])], 2)


def test_at_least_one_element_is_kept_where_there_is_one():
    assert [kept(count, 0.01) for count in (0, 1, 149, 151, 1000)] == [0, 1, 1, 2, 10]
    assert kept(7, 1.0) == 7


@settings(deadline=None, max_examples=200)
@given(size=st.integers(0, 10**5) | st.just(2**31 - 1), share=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_one_element_of_each_stratum_is_drawn(size, share, seed):
    k = min(round(share * size), 5000)
    chosen = stratified(size, k, seed=seed)
    assert chosen.shape == (k,)
    assert (np.diff(chosen, prepend=-1) > 0).all()
    assert all(index * size // k <= rank < (index + 1) * size // k for index, rank in enumerate(chosen.tolist()))


def test_the_drawn_elements_are_those_of_the_documentation():
    high = [number >> 32 for number in splitmix64(99, start=0, count=3).tolist()]
    edges = [0, 33, 66, 100]
    expected = [edges[i] + (high[i] * (edges[i + 1] - edges[i]) >> 32) for i in range(3)]
    assert stratified(100, 3, seed=99).tolist() == expected


def test_long_draws_are_made_in_pieces_and_take_little_more_than_their_ranks():
    size, k = 2**31 - 1, 150_001
    tracemalloc.start()
    chosen = stratified(size, k, seed=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < chosen.nbytes + (8 << 20)
    high = (splitmix64(5, start=0, count=k) >> np.uint64(32)).tolist()
    for i in (0, 65_535, 65_536, 131_072, k - 1):
        first, end = i * size // k, (i + 1) * size // k
        assert chosen[i] == first + (high[i] * (end - first) >> 32)


def test_every_element_is_drawn_about_as_often_as_every_other():
    drawn = np.bincount(np.concatenate([stratified(100, 7, seed=seed) for seed in range(20_000)]), minlength=100)
    assert drawn.min() > 0.9 * 1400 * 0.93
    assert drawn.max() < 1.1 * 1400 * 1.08
