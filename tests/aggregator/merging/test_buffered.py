import numpy as np
import pytest

from aggregator.merging.buffered import fedavg, fedbuff
from aggregator.merging.fold import Contribution, State
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings


def _vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _from(party: str, base_version: int, *values: float, samples: int = 1, at: list[int] | None = None) -> Contribution:
    indices = None if at is None else np.array(at)
    return Contribution(party, Delta(2, _vector(*values), indices), base_version, num_samples=samples)


def test_fedbuff_adds_the_mean_of_the_discounted_deltas():
    # x + eta / K * (s(0) d1 + s(3) d2 + s(8) d3) with s = (1 + t)^-1/2: 1, 1/2, 1/3.
    strategy = fedbuff(MergingSettings(strategy="fedbuff", buffer_size=3, server_learning_rate=1.5))
    state = State(8, _vector(1, -1))
    state, first = strategy.apply(state, _from("a", 8, 2, 0))
    state, second = strategy.apply(state, _from("b", 5, 4, 8))
    assert (first.kind, second.kind) == ("buffered", "buffered")
    assert state.model.tolist() == [1, -1]
    assert state.version == 8
    state, third = strategy.apply(state, _from("a", 0, 6, -3))
    assert [(o.kind, o.staleness, o.weight) for o in (first, second, third)] == [
        ("buffered", 0, 1.0),
        ("buffered", 3, 0.5),
        ("merged", 8, pytest.approx(1 / 3)),
    ]
    assert state.model == pytest.approx(_vector(1 + 0.5 * (2 + 2 + 2), -1 + 0.5 * (0 + 4 - 1)), rel=1e-6)
    assert state.version == 9
    assert state.buffer is None


def test_fedbuff_divides_by_the_count_and_not_by_the_sum_of_discounts():
    strategy = fedbuff(MergingSettings(strategy="fedbuff", buffer_size=2))
    state = State(3, _vector(0, 0))
    for party in ("a", "b"):
        state, _ = strategy.apply(state, _from(party, 0, 8, 8))
    assert state.model.tolist() == [4, 4]


def test_fedavg_adds_the_mean_weighted_by_samples():
    # (10 * 1 + 30 * 5) / 40 = 4; (10 * 2 - 30 * 2) / 40 = -1.
    strategy = fedavg(MergingSettings(strategy="fedavg", buffer_size=2))
    state = State(4, _vector(0.5, 0))
    state, first = strategy.apply(state, _from("a", 4, 1, 2, samples=10))
    state, second = strategy.apply(state, _from("b", 4, 5, -2, samples=30))
    assert (first.kind, first.weight) == ("buffered", 10.0)
    assert (second.kind, second.weight) == ("merged", 30.0)
    assert state.model.tolist() == [4.5, -1]
    assert state.version == 5


def test_fedavg_of_parties_with_equal_deltas_is_that_delta():
    strategy = fedavg(MergingSettings(strategy="fedavg", buffer_size=3))
    state = strategy.init(_vector(1, 1))
    for party, samples in (("a", 1), ("b", 1000), ("c", 7)):
        state, _ = strategy.apply(state, _from(party, 0, 0.25, -0.5, samples=samples))
    assert state.model == pytest.approx(_vector(1.25, 0.5), rel=1e-6)


@pytest.mark.parametrize("make", [fedbuff, fedavg])
def test_the_server_learning_rate_scales_the_step(make):
    models = []
    for rate in (1.0, 0.5):
        strategy = make(MergingSettings(buffer_size=1, server_learning_rate=rate))
        state, _ = strategy.apply(strategy.init(_vector(0, 0)), _from("a", 0, 4, -8))
        models.append(state.model)
    assert models[0].tolist() == [4, -8]
    assert models[1].tolist() == [2, -4]


def test_fedbuff_flushes_what_is_there_divided_by_how_many_there_are():
    strategy = fedbuff(MergingSettings(strategy="fedbuff", buffer_size=10))
    state = State(3, _vector(0, 0))
    state, _ = strategy.apply(state, _from("a", 3, 2, 2))
    state, _ = strategy.apply(state, _from("b", 0, 4, 8))
    state = strategy.flush(state)
    assert state.model.tolist() == [(2 + 2) / 2, (2 + 4) / 2]
    assert state.version == 4
    assert state.buffer is None


def test_fedavg_flushes_what_is_there_divided_by_its_samples():
    strategy = fedavg(MergingSettings(strategy="fedavg", buffer_size=10))
    state = strategy.init(_vector(0, 0))
    state, _ = strategy.apply(state, _from("a", 0, 4, 0, samples=1))
    state, _ = strategy.apply(state, _from("b", 0, 8, 4, samples=3))
    assert strategy.flush(state).model.tolist() == [7, 3]


@pytest.mark.parametrize("make", [fedbuff, fedavg])
def test_flushing_nothing_changes_nothing(make):
    strategy = make(MergingSettings())
    state = strategy.init(_vector(1, 2))
    assert strategy.flush(state) is state


def test_sparse_deltas_are_averaged_over_all_and_not_over_who_sent_the_element():
    strategy = fedbuff(MergingSettings(strategy="fedbuff", buffer_size=2))
    state = strategy.init(_vector(0, 0))
    state, _ = strategy.apply(state, _from("a", 0, 4, at=[0]))
    state, _ = strategy.apply(state, _from("b", 0, 8, at=[1]))
    assert state.model.tolist() == [2, 4]


def test_fedbuff_takes_several_updates_of_one_party_and_a_straggler_counts():
    strategy = fedbuff(MergingSettings(strategy="fedbuff", buffer_size=3, max_staleness=5))
    assert (strategy.max_staleness, strategy.one_per_version, strategy.may_repeat) == (5, False, True)
    state = strategy.init(_vector(0, 0))
    for _ in range(2):
        state, _ = strategy.apply(state, _from("a", 0, 3, 3))
    assert state.buffer.parties == ("a", "a")


def test_fedavg_takes_one_update_of_a_party_for_each_version_and_none_that_is_late():
    strategy = fedavg(MergingSettings(strategy="fedavg", max_staleness=5))
    assert (strategy.max_staleness, strategy.one_per_version, strategy.may_repeat) == (0, True, False)


def test_the_next_buffer_begins_empty():
    strategy = fedbuff(MergingSettings(strategy="fedbuff", buffer_size=2, staleness="constant"))
    state = strategy.init(_vector(0, 0))
    for number in range(6):
        state, _ = strategy.apply(state, _from("a", state.version, 2, 4))
        assert state.version == (number + 1) // 2
    assert state.model.tolist() == [6, 12]
