"""One suite over all strategies."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.merging.fold import Contribution, Outcome, State, Strategy, remember_base
from aggregator.merging.strategies import STRATEGIES, build_strategy
from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings
from broker_fl.parameters import digest, manifest_of

SIZE = 2000
SETTINGS = {
    "fedasync": MergingSettings(strategy="fedasync"),
    "fedasync, hinge": MergingSettings(strategy="fedasync", staleness="hinge", hinge=2),
    "fedasync, mixing": MergingSettings(strategy="fedasync", mode="mixing", max_staleness=8),
    "fedbuff": MergingSettings(strategy="fedbuff", buffer_size=4),
    "fedbuff, clipped": MergingSettings(strategy="fedbuff", buffer_size=4, clip_norm=20.0),
    "fedavg": MergingSettings(strategy="fedavg", buffer_size=4),
    "fedavg, clipped": MergingSettings(strategy="fedavg", buffer_size=4, clip_norm=20.0),
}
CODECS = ["float32", "int8", "topk:0.05+float32", "topk:0.05+int4"]
PROPERTY = settings(deadline=None, max_examples=3, suppress_health_check=[HealthCheck.too_slow])


def _delta(seed: int, codec: str) -> Delta:
    manifest = manifest_of({"weight": np.zeros(SIZE, np.float32)})
    generator = np.random.default_rng(seed)
    parsed = parse_codec(codec)
    values = generator.normal(size=SIZE).astype(np.float32)
    return decode(encode(values, parsed, manifest=manifest, generator=generator), parsed, manifest=manifest)


def _fold(strategy: Strategy, *, codec: str, seed: int, count: int = 12) -> tuple[State, list[Outcome]]:
    """Updates from versions of any admissible age, each version broadcast as it is made."""
    generator = np.random.default_rng(seed)
    state = strategy.init(generator.normal(size=SIZE).astype(np.float32))
    state = remember_base(strategy, state, broadcast=state.model.copy())
    outcomes = []
    for number in range(count):
        late = int(generator.integers(0, min(state.version, strategy.max_staleness) + 1))
        before = state.version
        contribution = Contribution(
            f"party-{number}", _delta(seed + number, codec), before - late, int(generator.integers(1, 99))
        )
        state, outcome = strategy.apply(state, contribution)
        if state.version != before:
            state = remember_base(strategy, state, broadcast=state.model.copy())
        outcomes.append(outcome)
    return state, outcomes


@pytest.mark.parametrize("name", sorted(SETTINGS))
class TestEveryStrategy:
    @pytest.mark.parametrize("codec", CODECS)
    @PROPERTY
    @given(seed=st.integers(0, 10_000))
    def test_the_same_contributions_in_the_same_order_give_the_same_bits(self, name, codec, seed):
        (once, outcomes), (again, same) = (_fold(build_strategy(SETTINGS[name]), codec=codec, seed=seed) for _ in range(2))
        assert digest(once.model) == digest(again.model)
        assert once.version == again.version
        assert outcomes == same

    def test_the_first_model_is_version_zero_as_it_is(self, name):
        model = np.arange(5, dtype=np.float32)
        state = build_strategy(SETTINGS[name]).init(model)
        assert state.version == 0
        assert state.model.tolist() == [0, 1, 2, 3, 4]
        assert state.buffer is None

    def test_a_version_is_made_by_a_merge_and_by_nothing_else(self, name):
        state, outcomes = _fold(build_strategy(SETTINGS[name]), codec="int8", seed=1)
        assert state.version == sum(outcome.kind == "merged" for outcome in outcomes)

    def test_the_model_stays_finite_float32_in_its_shape(self, name):
        state, _ = _fold(build_strategy(SETTINGS[name]), codec="topk:0.05+int4", seed=2)
        assert state.model.dtype == np.float32
        assert state.model.shape == (SIZE,)
        assert np.isfinite(state.model).all()

    def test_a_delta_of_nothing_changes_nothing_but_the_version(self, name):
        strategy = build_strategy(SETTINGS[name])
        state = strategy.init(np.ones(SIZE, np.float32))
        for number in range(4):
            state = remember_base(strategy, state, broadcast=state.model.copy())
            nothing = Contribution(str(number), Delta(SIZE, np.zeros(SIZE, np.float32)), state.version, 1)
            state, _ = strategy.apply(state, nothing)
        assert state.version > 0
        assert state.model == pytest.approx(np.ones(SIZE, np.float32), rel=1e-6)

    def test_a_dense_delta_and_the_same_one_by_its_indices_merge_to_the_same_bits(self, name):
        generator = np.random.default_rng(3)
        values = generator.normal(size=SIZE).astype(np.float32)
        models = []
        for indices in (None, np.arange(SIZE)):
            strategy = build_strategy(SETTINGS[name])
            state = strategy.init(np.ones(SIZE, np.float32))
            state = remember_base(strategy, state, broadcast=state.model.copy())
            for party in "abcd":
                if state.version == 0:
                    state, _ = strategy.apply(state, Contribution(party, Delta(SIZE, values, indices), 0, 3))
            models.append(state.model)
        assert digest(models[0]) == digest(models[1])

    def test_a_contribution_is_only_read(self, name):
        strategy = build_strategy(SETTINGS[name])
        state = strategy.init(np.ones(SIZE, np.float32))
        state = remember_base(strategy, state, broadcast=state.model.copy())
        delta = _delta(1, "topk:0.05+int4")
        delta.values.flags.writeable = delta.indices.flags.writeable = False
        strategy.apply(state, Contribution("a", delta, 0, 1))

    def test_flushing_leaves_no_buffer_and_twice_is_once(self, name):
        strategy = build_strategy(SETTINGS[name])
        state, _ = _fold(strategy, codec="int8", seed=4, count=6)
        flushed = strategy.flush(state)
        assert flushed.buffer is None
        assert flushed.version == state.version + (state.buffer is not None)
        assert strategy.flush(flushed) is flushed

    @pytest.mark.parametrize("codec", CODECS)
    def test_parties_that_all_want_the_same_model_get_there(self, name, codec):
        strategy = build_strategy(SETTINGS[name])
        manifest = manifest_of({"weight": np.zeros(SIZE, np.float32)})
        generator = np.random.default_rng(5)
        target = generator.normal(size=SIZE).astype(np.float32)
        state = strategy.init(np.zeros(SIZE, np.float32))
        state = remember_base(strategy, state, broadcast=state.model.copy())
        base = state.model.copy()
        parsed = parse_codec(codec)
        for number in range(250 if parsed.density else 100):
            payload = encode(target - base, parsed, manifest=manifest, generator=generator)
            contribution = Contribution(f"party-{number % 4}", decode(payload, parsed, manifest=manifest), state.version, 10)
            before = state.version
            state, _ = strategy.apply(state, contribution)
            if state.version != before:
                base = state.model.copy()
                state = remember_base(strategy, state, broadcast=base)
        assert np.linalg.norm(state.model - target) < 0.05 * np.linalg.norm(target)


def test_every_strategy_of_the_settings_can_be_built():
    assert set(get_args(MergingSettings.model_fields["strategy"].annotation)) == set(STRATEGIES)
    assert {settings.strategy for settings in SETTINGS.values()} == set(STRATEGIES)


def test_only_mixing_keeps_bases():
    keeping = {name for name, settings in SETTINGS.items() if build_strategy(settings).keeps_bases}
    assert keeping == {"fedasync, mixing"}


def test_bases_within_the_bound_are_kept_and_older_ones_dropped():
    strategy = build_strategy(SETTINGS["fedasync, mixing"])
    state = strategy.init(np.zeros(3, np.float32))
    for version in range(20):
        state = remember_base(strategy, State(version, state.model, bases=state.bases), broadcast=np.full(3, version, np.float32))
    assert sorted(state.bases) == list(range(19 - 8, 20))
    assert all(base.tolist() == [version] * 3 for version, base in state.bases.items())


def test_a_strategy_without_bases_remembers_none():
    strategy = build_strategy(SETTINGS["fedasync"])
    state = strategy.init(np.zeros(3, np.float32))
    assert remember_base(strategy, state, broadcast=state.model) is state
