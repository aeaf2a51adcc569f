import numpy as np
import pytest

from aggregator.merging.fold import Contribution, State
from aggregator.merging.immediate import FedAsync
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings


def _vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _from(base_version: int, *values: float, at: list[int] | None = None, size: int = 3) -> Contribution:
    indices = None if at is None else np.array(at)
    return Contribution("a", Delta(size, _vector(*values), indices), base_version, num_samples=5)


def _at(version: int, *model: float, **bases: np.ndarray) -> State:
    return State(version, _vector(*model), bases={int(name.removeprefix("v")): base for name, base in bases.items()})


def test_a_fresh_delta_is_added_with_the_mixing_rate():
    state, outcome = FedAsync(MergingSettings(mixing_rate=0.5)).apply(_at(0, 1, 2, 3), _from(0, 4, -2, 0.5))
    assert state.model.tolist() == [3, 1, 3.25]
    assert (outcome.kind, outcome.staleness, outcome.weight) == ("merged", 0, 0.5)


def test_a_late_delta_is_added_with_less():
    # s(3) = (1 + 3)^-1/2 = 1/2, a_t = 0.5 * 1/2.
    state, outcome = FedAsync(MergingSettings(mixing_rate=0.5)).apply(_at(10, 1, 2, 3), _from(7, 4, -2, 0.5))
    assert state.model.tolist() == [2, 1.5, 3.125]
    assert (outcome.staleness, outcome.weight) == (3, 0.25)


def test_delta_merging_is_float32_arithmetic_to_the_last_bit():
    settings = MergingSettings(mixing_rate=0.3, staleness="hinge", exponent=10, hinge=4)
    model, delta = [0.1, -2.7, 1e-8], [0.03, 1e-9, -123.456]
    state, _ = FedAsync(settings).apply(_at(6, *model), _from(0, *delta))
    weight = np.float32(0.3 / 21)
    assert state.model.tolist() == [float(np.float32(x) + np.float32(d) * weight) for x, d in zip(model, delta, strict=True)]


def test_a_sparse_delta_moves_only_what_was_sent():
    state, _ = FedAsync(MergingSettings(mixing_rate=0.5)).apply(_at(0, 1, 2, 3), _from(0, 4, at=[1]))
    assert state.model.tolist() == [1, 4, 3]


def test_mixing_goes_a_part_of_the_way_to_what_was_trained():
    # x = (1 - a) x + a (base + delta) with a = 0.25: 0.75 * 8 + 0.25 * (4 + 12).
    strategy = FedAsync(MergingSettings(mode="mixing", mixing_rate=0.5))
    state, outcome = strategy.apply(_at(5, 8, 0, -8, v2=_vector(4, 4, 4)), _from(2, 12, 0, -4))
    assert outcome.weight == 0.25
    assert state.model.tolist() == [10, 1, -6]


def test_mixing_with_a_sparse_delta_moves_every_parameter_towards_the_base():
    strategy = FedAsync(MergingSettings(mode="mixing", mixing_rate=0.5))
    state, _ = strategy.apply(_at(0, 8, 0, -8, v0=_vector(4, 4, 4)), _from(0, 12, at=[0]))
    assert state.model.tolist() == [12, 2, -2]


def test_mixing_with_all_weight_yields_what_was_trained():
    strategy = FedAsync(MergingSettings(mode="mixing", mixing_rate=1.0))
    state, _ = strategy.apply(_at(0, 8, 0, -8, v0=_vector(1, 2, 3)), _from(0, 0.5, 0.25, -0.5))
    assert state.model.tolist() == [1.5, 2.25, 2.5]


def test_mixing_is_float32_arithmetic_to_the_last_bit():
    model, base, delta = (np.random.default_rng(seed).normal(size=3).astype(np.float32) for seed in range(3))
    strategy = FedAsync(MergingSettings(mode="mixing", mixing_rate=0.3))
    state, _ = strategy.apply(State(4, model.copy(), bases={1: base}), _from(1, *delta))
    weight = 0.3 * 4**-0.5
    expected = model * np.float32(1 - weight)
    expected += base * np.float32(weight)
    expected += delta * np.float32(weight)
    assert state.model.tolist() == expected.tolist()


@pytest.mark.parametrize("mode", ["delta", "mixing"])
def test_the_mixing_rate_does_not_decay_over_time(mode):
    strategy = FedAsync(MergingSettings(mode=mode, mixing_rate=0.3))
    state = strategy.init(_vector(0, 0, 0))
    weights = []
    for version in range(500):
        state = State(state.version, state.model, bases={version: state.model.copy()})
        state, outcome = strategy.apply(state, _from(version, 1e-3, 0, 0))
        weights.append(outcome.weight)
        assert state.version == version + 1
    assert weights == [0.3] * 500


def test_every_merge_makes_the_next_version_and_staleness_is_counted_before_it():
    strategy = FedAsync(MergingSettings())
    state = strategy.init(_vector(0, 0, 0))
    stalenesses = []
    for base in (0, 0, 2, 0):
        state, outcome = strategy.apply(state, _from(base, 1, 1, 1))
        stalenesses.append(outcome.staleness)
    assert stalenesses == [0, 1, 0, 3]
    assert state.version == 4


def test_nothing_is_buffered():
    strategy = FedAsync(MergingSettings())
    state, _ = strategy.apply(strategy.init(_vector(0, 0, 0)), _from(0, 1, 1, 1))
    assert state.buffer is None
    assert strategy.flush(state) is state
