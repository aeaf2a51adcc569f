"""Clipping and noise of buffers: what one party may add, and what covers it."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from aggregator.merging.buffered import Buffered
from aggregator.merging.fold import Contribution, State
from aggregator.merging.noise import KEY_BYTES, Noise, noise_of
from aggregator.merging.strategies import build_strategy
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings

KEY = bytes(range(KEY_BYTES))
SIZE = 500
NOTHING = np.zeros(SIZE, np.float32)
BUFFERED = pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])


def _noisy(strategy: str, **changed: object) -> MergingSettings:
    given = {"strategy": strategy, "buffer_size": 4, "clip_norm": 0.5, "noise_multiplier": 2.0}
    return MergingSettings.model_validate(given | changed)


def _clipping(strategy: str, **changed: object) -> MergingSettings:
    return _noisy(strategy, noise_multiplier=None, **changed)


def _built(merging: MergingSettings, key: bytes = KEY) -> Buffered:
    built = build_strategy(merging, noise_key=key)
    assert isinstance(built, Buffered)
    return built


def _vector(seed: int, *, norm: float, size: int = SIZE) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=size)
    return (drawn * (norm / np.linalg.norm(drawn))).astype(np.float32)


def _norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


def _contribution(
    values: np.ndarray, *, at: np.ndarray | None = None, size: int = SIZE, party: str = "a", base: int = 0, samples: int = 1
) -> Contribution:
    return Contribution(party, Delta(size, values, at), base, num_samples=samples)


def _total(merging: MergingSettings, *contributions: Contribution, version: int = 0) -> np.ndarray:
    """What a buffer that is not full holds of them."""
    strategy, size = _built(merging), contributions[0].delta.size
    state = State(version, np.zeros(size, np.float32))
    for contribution in contributions:
        state, outcome = strategy.apply(state, contribution)
        assert outcome.kind == "buffered"
    assert state.buffer is not None
    return state.buffer.total


# Clipping


@BUFFERED
@pytest.mark.parametrize("noise_multiplier", [None, 2.0])
@pytest.mark.parametrize("norm", [0.50001, 1.0, 37.0, 1e6])
def test_delta_over_the_norm_is_clipped_to_it_and_keeps_its_direction(strategy, noise_multiplier, norm):
    values = _vector(1, norm=norm)
    total = _total(_noisy(strategy, noise_multiplier=noise_multiplier), _contribution(values))
    assert _norm(total) == pytest.approx(0.5, rel=1e-6)
    assert total == pytest.approx(values * (0.5 / norm), rel=1e-6)


@BUFFERED
@pytest.mark.parametrize("norm", [1e-30, 0.1, 0.49999])
def test_delta_below_the_norm_stays_bit_for_bit(strategy, norm):
    values = _vector(2, norm=norm)
    assert _total(_noisy(strategy), _contribution(values)).tobytes() == values.tobytes()


@BUFFERED
def test_delta_at_the_norm_stays_bit_for_bit(strategy):
    values = _vector(3, norm=1.0)
    at_the_norm = Delta(SIZE, values).norm()
    assert _total(_noisy(strategy, clip_norm=at_the_norm), _contribution(values)).tobytes() == values.tobytes()
    shorter = _total(_noisy(strategy, clip_norm=math.nextafter(at_the_norm, 0)), _contribution(values))
    assert _norm(shorter) == pytest.approx(at_the_norm, rel=1e-6)


@BUFFERED
def test_delta_of_nothing_stays_nothing(strategy):
    assert not _total(_noisy(strategy), _contribution(np.zeros(SIZE, np.float32))).any()


@BUFFERED
def test_sparse_delta_is_clipped_as_the_same_dense_one(strategy):
    at = np.sort(np.random.default_rng(4).choice(SIZE, 40, replace=False))
    values = _vector(4, norm=3.0, size=40)
    dense = np.zeros(SIZE, np.float32)
    dense[at] = values
    sparse = _total(_noisy(strategy), _contribution(values, at=at))
    assert sparse.tobytes() == _total(_noisy(strategy), _contribution(dense)).tobytes()
    assert _norm(sparse) == pytest.approx(0.5, rel=1e-6)


def test_late_delta_is_clipped_first_and_discounted_then():
    # s(3) = (1 + 3)^-1/2 = 1/2.
    late = _contribution(_vector(5, norm=9.0), base=7)
    assert _norm(_total(_noisy("fedbuff"), late, version=10)) == pytest.approx(0.25, rel=1e-6)


def test_fedavg_that_only_clips_weighs_by_samples_still():
    total = _total(_clipping("fedavg"), _contribution(_vector(6, norm=9.0), samples=30))
    assert _norm(total) == pytest.approx(30 * 0.5, rel=1e-6)


@BUFFERED
def test_without_noise_a_buffer_is_divided_by_what_is_in_it(strategy):
    built = _built(_clipping(strategy))
    state, _ = built.apply(built.init(np.zeros(SIZE, np.float32)), _contribution(_vector(7, norm=9.0), samples=5))
    assert _norm(built.flush(state).model) == pytest.approx(0.5, rel=1e-6)


# What one party may change

_SMALL = 6
_VALUES = arrays(np.float32, _SMALL, elements=st.floats(-1e6, 1e6, width=32))
_SAMPLES = st.integers(1, 10**12)
_CONTRIBUTIONS = st.tuples(_VALUES, _SAMPLES, st.integers(0, 20))


@BUFFERED
@settings(deadline=None)
@given(
    others=st.lists(_CONTRIBUTIONS, max_size=3),
    one=_CONTRIBUTIONS,
    clip_norm=st.floats(1e-3, 1e3),
    staleness=st.sampled_from(["constant", "polynomial", "hinge"]),
)
def test_one_party_moves_the_sum_by_at_most_the_norm(strategy, others, one, clip_norm, staleness):
    built = _built(_noisy(strategy, buffer_size=9, clip_norm=clip_norm, staleness=staleness))
    state = State(20, np.zeros(_SMALL, np.float32))
    for number, (values, samples, base) in enumerate(others):
        state, _ = built.apply(state, _contribution(values, size=_SMALL, party=f"other-{number}", base=base, samples=samples))
    before = np.zeros(_SMALL, np.float32) if state.buffer is None else state.buffer.total.copy()
    values, samples, base = one
    state, outcome = built.apply(state, _contribution(values, size=_SMALL, base=base, samples=samples))
    assert state.buffer is not None
    assert _norm(state.buffer.total.astype(np.float64) - before) <= clip_norm * (1 + 1e-6)
    assert outcome.weight <= 1.0


@BUFFERED
@settings(deadline=None)
@given(one=_CONTRIBUTIONS, clip_norm=st.floats(1e-3, 1e3))
def test_one_party_moves_the_model_by_at_most_its_share_of_the_norm(strategy, one, clip_norm):
    """But for the noise, which depends on the sum: what others may learn of it is in this difference."""
    built = _built(_noisy(strategy, clip_norm=clip_norm, noise_multiplier=0.1, server_learning_rate=0.75))
    models = []
    for is_void in (False, True):
        values, samples, base = one
        state = State(20, np.zeros(_SMALL, np.float32))
        given_in = Contribution("a", Delta(_SMALL, values), base, samples, is_void=is_void)
        state, _ = built.apply(state, given_in)
        noise = built.noise.for_version(21, covers=state.buffer.total).astype(np.float64) * 0.75 / 4
        models.append(built.flush(state).model.astype(np.float64) - noise)
    assert _norm(models[0] - models[1]) <= 0.75 / 4 * clip_norm * (1 + 1e-6) + 1e-6


def test_all_weigh_the_same_in_fedavg_with_noise_whatever_their_samples():
    built = _built(_noisy("fedavg"))
    state = built.init(np.zeros(SIZE, np.float32))
    for party, samples in (("a", 1), ("b", 10**12)):
        state, outcome = built.apply(state, _contribution(_vector(8, norm=9.0), party=party, samples=samples))
        assert outcome.weight == 1.0
    assert _norm(state.buffer.total) == pytest.approx(2 * 0.5, rel=1e-6)


@BUFFERED
def test_party_may_have_one_update_in_a_buffer_with_noise_and_trains_once_from_a_version(strategy):
    built = _built(_noisy(strategy))
    assert (built.one_per_buffer, built.may_repeat) == (True, False)


def test_clipping_alone_lets_fedbuff_take_what_it_took():
    built = _built(_clipping("fedbuff"))
    assert (built.one_per_buffer, built.may_repeat) == (False, True)


# The noise


def test_noise_of_a_version_is_the_same_when_it_is_drawn_again():
    noise = Noise(KEY, 1.0)
    first = noise.for_version(7, covers=NOTHING)
    assert (first.dtype, first.shape) == (np.float32, (SIZE,))
    noise.for_version(8, covers=NOTHING)
    assert noise.for_version(7, covers=NOTHING).tobytes() == first.tobytes()
    assert Noise(bytes(KEY), 1.0).for_version(7, covers=NOTHING).tobytes() == first.tobytes()


def test_noise_does_not_change_with_the_library_that_draws_it():
    """Ledgers are replayed by what comes later: these numbers must stay."""
    assert Noise(KEY, 1.0).for_version(7, covers=np.zeros(4, np.float32)).tolist() == [
        0.7607613205909729,
        0.006360393483191729,
        0.7341577410697937,
        0.4356100857257843,
    ]


def test_noise_leaves_numpys_own_generator_as_it_is():
    np.random.seed(5)  # noqa: NPY002 - the global one is what must not be touched
    expected = np.random.random(3).tolist()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    Noise(KEY, 1.0).for_version(7, covers=NOTHING)
    assert np.random.random(3).tolist() == expected  # noqa: NPY002


def _expect_unrelated(drawn: list[np.ndarray]) -> None:
    for one, other in combinations(drawn, 2):
        assert not np.array_equal(one, other)
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / math.sqrt(one.size)


def test_noise_of_different_versions_has_nothing_in_common():
    _expect_unrelated(
        [Noise(KEY, 1.0).for_version(version, covers=np.zeros(5000, np.float32)) for version in (1, 2, 3, 11, 12, 111, 2**40)]
    )


def test_noise_of_different_sums_has_nothing_in_common():
    """A version that is made twice, after a ledger was restored, is of other updates: the difference must not show them."""
    sums = [np.zeros(5000, np.float32), np.full(5000, 1e-6, np.float32), np.arange(5000, dtype=np.float32)]
    _expect_unrelated([Noise(KEY, 1.0).for_version(1, covers=covered) for covered in sums])


def test_noise_of_different_keys_has_nothing_in_common():
    keys = [KEY, bytes(KEY_BYTES), KEY[::-1], KEY[:-1] + b"\0", b"\1" + KEY[1:]]
    _expect_unrelated([Noise(key, 1.0).for_version(1, covers=np.zeros(5000, np.float32)) for key in keys])


@pytest.mark.parametrize(("multiplier", "clip_norm"), [(1.0, 1.0), (0.3, 5.0), (4.0, 1e-3)])
def test_noise_is_gaussian_of_the_multiplier_times_the_norm(multiplier, clip_norm):
    noise = noise_of(_noisy("fedbuff", noise_multiplier=multiplier, clip_norm=clip_norm), KEY)
    assert noise is not None
    drawn = noise.for_version(1, covers=np.zeros(200_000, np.float32)).astype(np.float64) / (multiplier * clip_norm)
    assert drawn.std() == pytest.approx(1.0, rel=0.02)
    assert abs(drawn.mean()) < 0.02
    for deviations, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert (np.abs(drawn) > deviations).mean() == pytest.approx(share, rel=0.15)


def test_settings_without_noise_have_none():
    assert noise_of(MergingSettings(strategy="fedbuff"), KEY) is None
    assert noise_of(_clipping("fedbuff"), KEY) is None


# Merging


def _expected(merging: MergingSettings, total: np.ndarray, *, version: int, key: bytes = KEY) -> np.ndarray:
    """x + eta / K * (total + N(0, (z S)^2)), from x = 1."""
    noise = Noise(key, merging.noise_multiplier * merging.clip_norm).for_version(version, covers=total)
    return np.ones(SIZE, np.float32) + (total + noise) * np.float32(merging.server_learning_rate / merging.buffer_size)


@BUFFERED
def test_full_buffer_is_the_noised_mean_of_the_clipped_deltas(strategy):
    merging = _noisy(strategy, server_learning_rate=0.7)
    built = _built(merging)
    state, total = State(6, np.ones(SIZE, np.float32)), np.zeros(SIZE, np.float32)
    for number, party in enumerate("abcd"):
        values = _vector(number, norm=0.25)  # Below the norm: the same bits go in.
        total += values
        state, outcome = built.apply(state, _contribution(values, party=party, base=6, samples=10**number))
    assert (outcome.kind, state.version, state.buffer) == ("merged", 7, None)
    assert state.model.tobytes() == _expected(merging, total, version=7).tobytes()


@BUFFERED
@pytest.mark.parametrize("count", [1, 2, 3])
def test_buffer_that_is_merged_early_is_divided_by_its_size_and_has_the_full_noise(strategy, count):
    merging = _noisy(strategy)
    built = _built(merging)
    state, total = State(6, np.ones(SIZE, np.float32)), np.zeros(SIZE, np.float32)
    for number in range(count):
        values = _vector(number, norm=0.25)
        total += values
        state, _ = built.apply(state, _contribution(values, party=str(number), base=6, samples=100))
    state = built.flush(state)
    assert (state.version, state.buffer) == (7, None)
    assert state.model.tobytes() == _expected(merging, total, version=7).tobytes()
    left = (state.model - 1) * 4 - total
    assert left.std() == pytest.approx(2.0 * 0.5, rel=0.15)


@BUFFERED
def test_buffer_of_nothing_but_void_contributions_has_the_noise_all_the_same(strategy):
    """Or it would tell that all of it came from the party that is left out."""
    merging = _noisy(strategy, buffer_size=1)
    built = _built(merging)
    void = Contribution("a", Delta(SIZE, np.empty(0, np.float32), np.empty(0, np.int64)), 6, 1, is_void=True)
    state, _ = built.apply(State(6, np.ones(SIZE, np.float32)), void)
    assert state.model.tobytes() == _expected(merging, np.zeros(SIZE, np.float32), version=7).tobytes()


@BUFFERED
def test_each_version_has_a_noise_of_its_own(strategy):
    built = _built(_noisy(strategy, buffer_size=1))
    state, steps = built.init(np.zeros(5000, np.float32)), []
    for _ in range(4):
        before = state.model.copy()
        state, _ = built.apply(state, _contribution(np.zeros(5000, np.float32), size=5000, base=state.version))
        steps.append(state.model - before)
    _expect_unrelated(steps)


@BUFFERED
def test_flushing_no_buffer_makes_no_version_and_no_noise(strategy):
    built = _built(_noisy(strategy))
    state = built.init(np.ones(SIZE, np.float32))
    assert built.flush(state) is state


@BUFFERED
def test_same_contributions_under_the_same_key_give_the_same_bits_and_under_another_one_not(strategy):
    models = []
    for key in (KEY, bytes(KEY), KEY[::-1]):
        built = _built(_noisy(strategy, buffer_size=2), key)
        state = built.init(np.zeros(SIZE, np.float32))
        for number in range(5):
            party = str(number)
            state, _ = built.apply(state, _contribution(_vector(number, norm=3.0), party=party, base=state.version))
        models.append(built.flush(state).model.tobytes())
    assert models[0] == models[1] != models[2]


# The key


@BUFFERED
@pytest.mark.parametrize("key", [b"", KEY[:-1], KEY + b"\0"])
def test_nothing_is_merged_without_a_whole_key(strategy, key):
    built = build_strategy(_noisy(strategy, buffer_size=1), noise_key=key)
    state = built.init(np.zeros(SIZE, np.float32))
    with pytest.raises(ValueError, match="a key has 32 bytes"):
        built.apply(state, _contribution(_vector(1, norm=1.0)))
    waiting = build_strategy(_noisy(strategy), noise_key=key)
    state, _ = waiting.apply(waiting.init(np.zeros(SIZE, np.float32)), _contribution(_vector(1, norm=1.0)))
    with pytest.raises(ValueError, match="a key has 32 bytes"):
        waiting.flush(state)


def test_strategy_without_a_key_says_what_it_takes():
    built = build_strategy(_noisy("fedbuff"))
    assert (built.one_per_buffer, built.may_repeat, built.keeps_bases) == (True, False, False)


def test_strategies_without_noise_need_no_key():
    for merging in (MergingSettings(), _clipping("fedbuff", buffer_size=1), _clipping("fedavg", buffer_size=1)):
        built = build_strategy(merging)
        state, outcome = built.apply(built.init(np.zeros(SIZE, np.float32)), _contribution(_vector(1, norm=1.0)))
        assert (outcome.kind, state.version) == ("merged", 1)


@BUFFERED
def test_key_is_not_shown(strategy):
    shown = repr(_built(_noisy(strategy)))
    assert "std=1.0" in shown
    assert not any(secret in shown for secret in (KEY.hex(), repr(KEY), repr(KEY)[2:-1]))


# Settings that cannot be


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff", "fedavg"])
def test_noise_without_a_norm_is_refused(strategy):
    with pytest.raises(ValidationError, match="noise_multiplier needs a clip_norm: without it no noise covers"):
        MergingSettings(strategy=strategy, noise_multiplier=1.0)


@pytest.mark.parametrize("noise_multiplier", [None, 1.0])
def test_norm_of_a_strategy_without_buffers_is_refused(noise_multiplier):
    with pytest.raises(ValidationError, match=r"clip_norm goes with a buffer .*: fedasync merges each update alone"):
        MergingSettings(strategy="fedasync", clip_norm=1.0, noise_multiplier=noise_multiplier)


@pytest.mark.parametrize(
    "wrong",
    [{"clip_norm": 0.0}, {"clip_norm": -1.0}, {"noise_multiplier": 0.0}, {"noise_multiplier": -1.0}, {"clip_norm": math.nan}],
)
def test_norms_and_noise_are_over_zero(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        _noisy("fedbuff", **wrong)
