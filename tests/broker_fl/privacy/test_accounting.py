import math
import random
import warnings
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant

from broker_fl.errors import PrivacyError
from broker_fl.privacy.accounting import Steps, composed, epsilon_of, noise_multiplier_for, total

DELTA = 1e-5
OPACUS = {"rdp": RDPAccountant, "prv": PRVAccountant, "gdp": GaussianAccountant}
FAST = settings(deadline=None, max_examples=8)

ONE_KIND = {
    "a short training": [(1.0, 0.05, 20)],
    "much noise and the whole data": [(20.0, 1.0, 7)],
    "a single step": [(0.7, 0.2, 1)],
    "many steps": [(1.1, 0.01, 5000)],
}
MORE_KINDS = {
    "other noise": [(1.0, 0.05, 20), (1.5, 0.05, 30)],
    "another rate": [(1.0, 0.05, 20), (1.0, 0.1, 5)],
    "three kinds": [(1.0, 0.05, 20), (2.0, 1.0, 3), (0.8, 0.01, 100)],
    "the same kinds again, not adjacent": [(1.0, 0.05, 20), (1.5, 0.1, 10), (1.0, 0.05, 5), (1.5, 0.1, 1), (1.0, 0.05, 7)],
}


def _by_opacus(runs, accountant, *, delta=DELTA):
    """Step by step where Opacus counts so, and by its history where it would take too long."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        theirs = OPACUS[accountant]()
        for noise, rate, steps in runs:
            for _ in range(steps):
                theirs.step(noise_multiplier=noise, sample_rate=rate)
        return theirs.get_epsilon(delta=delta)


def _ours(runs, accountant, *, delta=DELTA):
    return epsilon_of(composed(Steps(*run) for run in runs), delta=delta, accountant=accountant)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
@pytest.mark.parametrize("name", ONE_KIND)
def test_epsilon_of_one_kind_is_what_opacus_says_step_by_step(name, accountant):
    runs = ONE_KIND[name]
    assert _ours(runs, accountant) == pytest.approx(_by_opacus(runs, accountant), rel=1e-9)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize("name", MORE_KINDS)
def test_epsilon_of_several_kinds_is_what_opacus_says_step_by_step(name, accountant):
    runs = MORE_KINDS[name]
    # A kind that comes again is one kind to us: PRV rounds the composed grid elsewhere then.
    assert _ours(runs, accountant) == pytest.approx(_by_opacus(runs, accountant), rel=1e-9 if accountant == "rdp" else 1e-4)


@pytest.mark.parametrize("delta", [1e-12, 1e-3])
@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_delta_is_handed_on(accountant, delta):
    runs = ONE_KIND["a short training"]
    assert _ours(runs, accountant, delta=delta) == pytest.approx(_by_opacus(runs, accountant, delta=delta), rel=1e-9)


@pytest.mark.parametrize(("accountant", "tolerance"), [("rdp", 1e-12), ("prv", 1e-4)])
def test_the_order_of_trainings_does_not_matter(accountant, tolerance):
    runs = MORE_KINDS["three kinds"]
    shuffled = random.Random(1).sample(runs, len(runs))
    assert shuffled != runs
    assert _ours(shuffled, accountant) == pytest.approx(_ours(runs, accountant), rel=tolerance)


def test_a_history_counts_steps_of_the_same_kind_together():
    runs = [Steps(1.0, 0.1, 3), Steps(2.0, 0.1, 1), Steps(1.0, 0.1, 4)]
    assert composed(runs) == {(1.0, 0.1): 7, (2.0, 0.1): 1}


def test_a_further_training_is_added_and_the_history_is_left_as_it_was():
    history = composed([Steps(1.0, 0.1, 3)])
    assert total(history, Steps(1.0, 0.1, 4)) == {(1.0, 0.1): 7}
    assert total(history, Steps(2.0, 0.1, 4)) == {(1.0, 0.1): 3, (2.0, 0.1): 4}
    assert total(history, None) == history == {(1.0, 0.1): 3}


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_nothing_costs_nothing(accountant):
    assert epsilon_of({}, delta=DELTA, accountant=accountant) == 0.0


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
@pytest.mark.parametrize("delta", [0.1, 0.5, 0.9])
def test_epsilon_is_never_below_zero_however_large_delta_is(accountant, delta):
    assert epsilon_of({(1.0, 0.01): 10}, delta=delta, accountant=accountant) == 0.0


def test_gdp_refuses_two_kinds_of_trainings_in_one_line():
    with pytest.raises(PrivacyError, match="gdp takes trainings of one kind only, and here are 2: take rdp or prv") as caught:
        _ours(MORE_KINDS["other noise"], "gdp")
    assert "\n" not in str(caught.value)


def test_gdp_says_zero_where_opacus_finds_no_root_since_delta_is_enough():
    assert epsilon_of({(1.0, 1e-9): 1}, delta=DELTA, accountant="gdp") == 0.0
    assert epsilon_of({(1e6, 0.1): 1}, delta=DELTA, accountant="gdp") == 0.0


@pytest.mark.parametrize("accountant", ["prv", "gdp"])
@pytest.mark.parametrize("noise", [0.3, 0.1, 0.01, 1e-3, 1e-160, 1e-300])
@pytest.mark.parametrize("rate", [1e-300, 0.01, 1.0])
def test_absurdly_little_noise_has_a_finite_epsilon_or_none_in_one_line(accountant, noise, rate):
    try:
        found = math.isfinite(epsilon_of({(noise, rate): 3}, delta=DELTA, accountant=accountant))
    except PrivacyError as exc:
        found = "take rdp" in str(exc) and "\n" not in str(exc)
    assert found


@pytest.mark.parametrize("history", [{(1e-3, 1.0): 10}, {(1.0, 0.5): 10**12}, {(1.0 + n, 1.0): 10**4 for n in range(9)}])
def test_prv_refuses_what_would_fill_the_memory(history):
    with pytest.raises(PrivacyError, match="too much memory for this history: take rdp"):
        epsilon_of(history, delta=DELTA, accountant="prv")


@pytest.mark.parametrize("noise", [1e-300, 1e-160, 1e-7])
def test_rdp_says_infinity_for_next_to_no_noise_and_does_not_hang(noise):
    assert epsilon_of({(noise, 0.3): 1, (1.0, 0.3): 1}, delta=DELTA, accountant="rdp") == math.inf


@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1 - 1e-16])
@pytest.mark.parametrize("noise", [1e-6, 1.0, 1e6])
def test_rdp_has_an_answer_to_every_rate(noise, rate):
    epsilon = epsilon_of({(noise, rate): 2**53}, delta=DELTA, accountant="rdp")
    assert 0 < epsilon < math.inf


def test_rounding_in_the_cost_of_a_step_never_makes_many_steps_cheaper():
    few, many = (epsilon_of({(1e6, 0.3): steps}, delta=DELTA, accountant="rdp") for steps in (1, 2**53))
    assert many >= few > 0


NOISE = st.floats(0.3, 20.0)
RATE = st.floats(1e-4, 0.4)
HISTORIES = st.dictionaries(st.tuples(NOISE, RATE), st.integers(1, 2000), min_size=1, max_size=2)


def _rdp(history):
    return epsilon_of(history, delta=DELTA, accountant="rdp")


@FAST
@given(HISTORIES, st.tuples(NOISE, RATE), st.integers(1, 2000))
def test_more_steps_never_cost_less(history, kind, steps):
    before, after = _rdp(history), _rdp(total(history, Steps(*kind, steps)))
    assert after >= before * (1 - 1e-9)


@FAST
@given(NOISE, RATE, st.floats(1.0, 2.0), st.integers(1, 2000))
def test_a_higher_rate_never_costs_less(noise, rate, factor, steps):
    assert _rdp({(noise, rate * factor): steps}) >= _rdp({(noise, rate): steps}) * (1 - 1e-9)


@FAST
@given(NOISE, RATE, st.floats(1.0, 2.0), st.integers(1, 2000))
def test_less_noise_never_costs_less(noise, rate, factor, steps):
    assert _rdp({(noise, rate): steps}) >= _rdp({(noise * factor, rate): steps}) * (1 - 1e-9)


@FAST
@given(HISTORIES)
def test_a_smaller_delta_never_costs_less(history):
    costs = [epsilon_of(history, delta=delta, accountant="rdp") for delta in (1e-3, 1e-5, 1e-7)]
    assert costs == sorted(costs)


@pytest.mark.parametrize("history", [{(1.0, 0.05): 20}, {(0.8, 0.01): 500, (2.0, 0.3): 9}])
def test_prv_is_a_lower_bound_than_rdp(history):
    assert epsilon_of(history, delta=DELTA, accountant="prv") < _rdp(history)


def _cost(noise, *, rate, steps, accountant):
    return epsilon_of({(noise, rate): steps}, delta=DELTA, accountant=accountant)


@pytest.mark.parametrize(
    ("accountant", "target", "rate", "steps"),
    [
        *product(["rdp"], [0.5, 3.0, 50.0], [1.0], [1, 100, 10_000]),
        *[("rdp", 0.5, 0.001, 10_000), ("rdp", 3.0, 0.05, 100), ("rdp", 50.0, 0.3, 1)],
        # Low targets, where gdp finds no root for more noise, and high ones, where it finds none for less.
        *product(["gdp"], [0.5, 3.0, 50.0], [0.001, 0.05, 1.0], [1, 100, 10_000]),
    ],
)
def test_the_noise_for_a_target_is_enough_and_a_thousandth_less_is_not(accountant, target, rate, steps):
    noise = noise_multiplier_for(target, delta=DELTA, sample_rate=rate, steps=steps, accountant=accountant)
    assert _cost(noise, rate=rate, steps=steps, accountant=accountant) <= target
    assert _cost(noise * 0.999, rate=rate, steps=steps, accountant=accountant) > target


@pytest.mark.parametrize(("target", "steps"), [(3.0, 1), (40.0, 10)])
def test_prv_finds_less_noise_than_rdp(target, steps):
    given = {"delta": DELTA, "sample_rate": 1.0, "steps": steps}
    noise = noise_multiplier_for(target, **given, accountant="prv")
    assert _cost(noise, rate=1.0, steps=steps, accountant="prv") <= target
    assert _cost(noise * 0.999, rate=1.0, steps=steps, accountant="prv") > target
    assert noise < noise_multiplier_for(target, **given, accountant="rdp")


@settings(deadline=None, max_examples=2)
@given(st.floats(0.5, 50.0), st.floats(1e-3, 0.3), st.integers(1, 10_000))
def test_any_target_is_met_closely(target, rate, steps):
    noise = noise_multiplier_for(target, delta=DELTA, sample_rate=rate, steps=steps)
    assert _rdp({(noise, rate): steps}) <= target < _rdp({(noise * 0.999, rate): steps})


@pytest.mark.parametrize("target", [1e-9, 0.01, 0.1])
def test_a_target_below_what_rdp_can_say_is_refused_in_one_line(target):
    with pytest.raises(PrivacyError, match=f"no noise makes 100 steps cost epsilon {target:g} at delta 1e-05") as caught:
        noise_multiplier_for(target, delta=DELTA, sample_rate=0.01, steps=100)
    assert "\n" not in str(caught.value)


def test_a_target_that_takes_more_noise_than_can_be_asked_for_is_refused():
    with pytest.raises(PrivacyError, match="fewer steps, or a higher target"):
        noise_multiplier_for(0.5, delta=DELTA, sample_rate=1.0, steps=10**13)
