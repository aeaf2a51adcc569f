import pytest

from broker_fl.errors import PrivacyError
from broker_fl.privacy.accounting import Steps, epsilon_of
from broker_fl.privacy.policy import Demands, Limits, Mechanism, Spent, exhausted_by, mechanism_for
from schemas.privacy import PrivacyFacts, PrivacyPlan

NOTHING = Spent(on_data={}, on_federation={})
NO_LIMITS = Limits(delta=1e-5, accountant="rdp")
STEPS = Steps(1.0, 0.05, 20)
HISTORY = {(1.0, 0.05): 20}


def _plan(**given):
    if "target_epsilon" not in given:
        given.setdefault("noise_multiplier", 1.0)
    return PrivacyPlan(**{"max_grad_norm": 1.0, "delta": 1e-5, "accountant": "rdp", **given})


def _mechanism(plan, limits=NO_LIMITS, *, num_examples=200, batch_size=10, steps=20):
    return mechanism_for(plan, limits, num_examples=num_examples, batch_size=batch_size, steps=steps)


def test_the_sample_rate_is_the_batch_over_the_data():
    found = _mechanism(_plan(noise_multiplier=1.5, max_grad_norm=0.7, clipping="ghost"))
    assert found == Mechanism(noise_multiplier=1.5, sample_rate=0.05, steps=20, max_grad_norm=0.7, clipping="ghost")


@pytest.mark.parametrize("num_examples", [1, 7, 10])
def test_a_batch_larger_than_the_data_is_all_of_it(num_examples):
    assert _mechanism(_plan(), num_examples=num_examples, batch_size=10).sample_rate == 1.0


@pytest.mark.parametrize(("least", "noise"), [(None, 1.0), (0.5, 1.0), (1.0, 1.0), (2.5, 2.5)])
def test_the_partys_least_noise_raises_what_the_federation_asks_for_and_never_lowers_it(least, noise):
    limits = Limits(delta=1e-5, accountant="rdp", min_noise_multiplier=least)
    assert _mechanism(_plan(), limits).noise_multiplier == noise


@pytest.mark.parametrize("accountant", ["rdp", "gdp"])
def test_a_target_is_met_by_all_planned_trainings_together_and_closely(accountant):
    plan = _plan(target_epsilon=4.0, planned_trainings=30, accountant=accountant, delta=1e-6)
    found = _mechanism(plan)
    history = {(found.noise_multiplier, found.sample_rate): 30 * found.steps}
    assert 0.99 * 4.0 < epsilon_of(history, delta=1e-6, accountant=accountant) <= 4.0


def test_a_party_with_more_examples_needs_less_noise_for_the_target():
    plan = _plan(target_epsilon=4.0, planned_trainings=30)
    small, large = (_mechanism(plan, num_examples=count).noise_multiplier for count in (100, 1000))
    assert large < small


def test_the_partys_least_noise_raises_that_of_a_target_too():
    limits = Limits(delta=1e-5, accountant="rdp", min_noise_multiplier=90.0)
    assert _mechanism(_plan(target_epsilon=4.0, planned_trainings=2), limits).noise_multiplier == 90.0


def test_a_target_that_no_noise_reaches_is_a_privacy_error():
    with pytest.raises(PrivacyError, match=r"no noise makes 40 steps cost epsilon 0\.001"):
        _mechanism(_plan(target_epsilon=0.001, planned_trainings=2))


def test_a_mechanism_says_its_cost_and_its_facts():
    mechanism = Mechanism(noise_multiplier=1.5, sample_rate=0.05, steps=20, max_grad_norm=0.7)
    assert mechanism.cost == Steps(1.5, 0.05, 20)
    assert mechanism.facts == PrivacyFacts(noise_multiplier=1.5, sample_rate=0.05, max_grad_norm=0.7)


def _exhausted(cost=STEPS, *, spent=NOTHING, most=None, party_most=None, plan=None, limits=None):
    plan = _plan(max_epsilon=most, **(plan or {}))
    limits = Limits(**{"delta": 1e-5, "accountant": "rdp", "max_epsilon": party_most, **(limits or {})})
    return exhausted_by(cost, spent=spent, plan=plan, limits=limits)


def test_without_limits_nothing_is_ever_exhausted():
    assert _exhausted(Steps(1e-9, 1.0, 10**9)) is None


@pytest.mark.parametrize(("whose", "name"), [("most", "the federation"), ("party_most", "this party")])
def test_exactly_at_a_limit_is_allowed_and_just_below_it_is_not(whose, name):
    epsilon = epsilon_of(HISTORY, delta=1e-5, accountant="rdp")
    assert _exhausted(**{whose: epsilon}) is None
    found = _exhausted(**{whose: epsilon * (1 - 1e-12)})
    assert (found.whose, found.epsilon) == (name, epsilon)


def test_the_partys_limit_counts_all_federations_and_the_federations_limit_its_own_only():
    spent = Spent(on_data={(1.0, 0.05): 2000}, on_federation={(1.0, 0.05): 20})
    on_data, on_federation = (epsilon_of({(1.0, 0.05): steps}, delta=1e-5, accountant="rdp") for steps in (2000 + 20, 20 + 20))
    found = _exhausted(spent=spent, most=on_federation, party_most=on_data * 0.99)
    assert (found.whose, found.epsilon) == ("this party", on_data)
    found = _exhausted(spent=spent, most=on_federation * 0.99, party_most=on_data)
    assert (found.whose, found.epsilon) == ("the federation", on_federation)
    assert _exhausted(spent=spent, most=on_federation, party_most=on_data) is None


def test_where_both_limits_are_passed_the_partys_is_named():
    assert _exhausted(most=1e-3, party_most=1e-3).whose == "this party"


def test_each_limit_is_counted_with_its_own_delta_and_accountant():
    plan = {"delta": 1e-7, "accountant": "rdp"}
    limits = {"delta": 1e-3, "accountant": "gdp"}
    by_plan = epsilon_of(HISTORY, delta=1e-7, accountant="rdp")
    by_party = epsilon_of(HISTORY, delta=1e-3, accountant="gdp")
    assert _exhausted(plan=plan, limits=limits, most=by_plan, party_most=by_party) is None
    party = _exhausted(plan=plan, limits=limits, party_most=by_party * 0.99)
    assert (party.delta, party.accountant, party.epsilon) == (1e-3, "gdp", by_party)
    federation = _exhausted(plan=plan, limits=limits, most=by_plan * 0.99)
    assert (federation.delta, federation.accountant, federation.epsilon) == (1e-7, "rdp", by_plan)


def test_what_is_spent_is_looked_at_without_a_further_training_too():
    spent = Spent(on_data=HISTORY, on_federation=HISTORY)
    epsilon = epsilon_of(HISTORY, delta=1e-5, accountant="rdp")
    assert _exhausted(None, spent=spent, most=epsilon) is None
    assert _exhausted(None, spent=spent, most=epsilon * 0.999).epsilon == epsilon
    assert _exhausted(None, most=1e-6) is None


def test_next_to_no_noise_is_over_any_limit():
    assert _exhausted(Steps(1e-200, 0.5, 1), party_most=1e6).whose == "this party"


def test_a_limit_whose_accountant_has_no_answer_is_an_error_and_not_a_leave():
    spent = Spent(on_data={(2.0, 0.05): 1}, on_federation={})
    with pytest.raises(PrivacyError, match="gdp takes trainings of one kind only"):
        _exhausted(spent=spent, limits={"accountant": "gdp"}, party_most=1e6)


def test_an_exhausted_limit_says_whose_it_is_and_by_how_much_in_one_line():
    text = str(_exhausted(Steps(1.0, 0.05, 1000), party_most=2.0))
    epsilon = epsilon_of({(1.0, 0.05): 1000}, delta=1e-5, accountant="rdp")
    assert text == (
        f"the next training would bring epsilon to {epsilon:.4g}, and this party allows 2 (delta 1e-05, accountant rdp)"
    )


@pytest.mark.parametrize(
    ("given", "refuses"),
    [
        ({}, False),
        ({"must_be_noised": True}, True),
        ({"max_epsilon": 8.0}, True),
        ({"min_noise_multiplier": 0.5}, True),
    ],
)
def test_any_limit_of_a_party_refuses_plain_training(given, refuses):
    assert Limits(delta=1e-5, accountant="rdp", **given).refuses_plain_training is refuses


def _facts(noise):
    return PrivacyFacts(noise_multiplier=noise, sample_rate=0.05, max_grad_norm=1.0)


def test_an_update_without_noise_is_short_of_what_is_demanded():
    text = Demands(_plan(), min_noise_multiplier=None).shortfall(None)
    assert text == "was trained without differential privacy, and this federation asks for dp-sgd"


@pytest.mark.parametrize(("least", "is_short"), [(None, False), (0.5, False), (1.0, False), (1.0000001, True), (2.0, True)])
def test_an_update_with_less_than_the_least_noise_is_short_of_it(least, is_short):
    text = Demands(_plan(), min_noise_multiplier=least).shortfall(_facts(1.0))
    assert (text is not None) is is_short


def test_a_shortfall_of_noise_says_both_numbers():
    text = Demands(_plan(), min_noise_multiplier=2.0).shortfall(_facts(0.5))
    assert text == "its noise multiplier 0.5 is below this federation's 2"


def _overspent(history=HISTORY, **plan):
    return Demands(_plan(**plan), min_noise_multiplier=None).overspent(history)


def test_a_party_may_spend_up_to_the_limit():
    epsilon = epsilon_of(HISTORY, delta=1e-5, accountant="rdp")
    assert _overspent(max_epsilon=epsilon) is None
    text = _overspent(max_epsilon=epsilon * 0.999)
    assert text == (
        f"its party has spent epsilon {epsilon:.4g} with it, and this federation allows {epsilon * 0.999:g} (delta 1e-05)"
    )


def test_without_a_limit_a_party_never_overspends():
    assert _overspent({(1e-300, 1.0): 2**53}) is None


@pytest.mark.parametrize("accountant", ["prv", "gdp"])
def test_what_is_over_by_rdp_and_within_by_the_plans_own_accountant_is_taken(accountant):
    by_rdp, by_other = (epsilon_of(HISTORY, delta=1e-5, accountant=one) for one in ("rdp", accountant))
    assert by_other < by_rdp
    assert _overspent(accountant=accountant, max_epsilon=(by_rdp + by_other) / 2) is None
    assert f"epsilon {by_other:.4g}" in _overspent(accountant=accountant, max_epsilon=by_other * 0.99)


@pytest.mark.parametrize(
    ("accountant", "history"),
    [
        ("gdp", {**HISTORY, (2.0, 0.05): 1}),
        ("prv", {(20.0, 1.0): 10**7}),
        ("rdp", HISTORY),
    ],
)
def test_what_the_plans_accountant_has_no_answer_to_is_judged_by_rdp(accountant, history):
    """A party says these numbers, and nobody else's update may suffer from them."""
    epsilon = epsilon_of(history, delta=1e-5, accountant="rdp")
    text = _overspent(history, accountant=accountant, max_epsilon=0.9 * epsilon)
    assert f"has spent epsilon {epsilon:.4g}" in text
    assert "\n" not in text


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_next_to_no_noise_is_overspent_by_any_accountant(accountant):
    assert "has spent epsilon inf" in _overspent({(1e-300, 0.5): 2**53}, accountant=accountant, max_epsilon=1e6)
