"""What the parties' updates have cost: as Opacus counts it, over restarts, and where it ends."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant

from aggregator.messages import update_facts
from aggregator.party_spending import MOST_KINDS, PartySpending
from broker_fl.config import MergingSettings
from broker_fl.privacy.policy import Demands
from schemas import wire
from schemas.event import Event
from schemas.privacy import PrivacyFacts, PrivacyPlan

MOST_EPSILON = 3.0
DELTA = 1e-5
FACTS = PrivacyFacts(noise_multiplier=1.0, sample_rate=0.01, max_grad_norm=0.5)
STEPS = 600
"""Three times so many cost epsilon 2.7, and four times 3.1: three updates are within what a party may spend, and no more."""
KINDS = [(1.0, 0.01), (1.0, 0.02), (1.5, 0.01), (4.0, 1.0)]


def _demands(**changed):
    given = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "delta": DELTA, "accountant": "rdp", "max_epsilon": MOST_EPSILON}
    return Demands(PrivacyPlan(**(given | changed)), min_noise_multiplier=None)


DEMANDS = _demands()


def _by_opacus(updates):
    accountant = RDPAccountant()
    accountant.history = [(update.privacy.noise_multiplier, update.privacy.sample_rate, update.num_steps) for update in updates]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=DELTA))


def _noised(bench, party="ann", *, base=None, privacy=FACTS, num_steps=STEPS, **changes):
    base = base or bench.frames()[-1]
    return bench.update(party, base=base, privacy=privacy, num_steps=num_steps, train_loss=None, **changes)


def _decide(bench, coordinator, *updates, demands=DEMANDS):
    verdicts = coordinator.decide([bench.arrival(update, limits=bench.limits(privacy=demands)) for update in updates])
    bench.publish(coordinator)
    return verdicts


def _expect_overspent(verdict, epsilon):
    assert (verdict.receipt.outcome, verdict.receipt.reason) == ("refused", "privacy")
    assert verdict.receipt.detail == (
        f"its party has spent epsilon {epsilon:.4g} with it, and this federation allows 3 (delta 1e-05)"
    )


# A worker that forgets what it spent


def test_worker_that_goes_on_past_the_budget_is_refused_from_there_on_and_others_are_not(bench):
    with bench.opened(privacy=DEMANDS) as coordinator:
        sent, outcomes = [], []
        for number in range(6):
            sent.append(_noised(bench, seed=number))
            (verdict,) = _decide(bench, coordinator, sent[-1])
            epsilon = _by_opacus(sent)
            assert verdict.epsilon == pytest.approx(epsilon, abs=1e-9)
            outcomes.append(verdict.receipt.outcome)
            if epsilon > MOST_EPSILON:
                _expect_overspent(verdict, epsilon)
            (of_bob,) = _decide(bench, coordinator, _noised(bench, "bob", num_steps=10, seed=number))
            assert of_bob.receipt.outcome == "merged"
        assert outcomes == ["merged"] * 3 + ["refused"] * 3
        assert coordinator.version == 9
    refused = [entry for entry in bench.entries() if entry.outcome == "refused"]
    assert [(entry.party, entry.reason, entry.num_steps) for entry in refused] == [("ann", "privacy", STEPS)] * 3
    assert all(entry.payload is None for entry in refused)


@pytest.mark.parametrize("bench", ["sqlite", "postgresql"], indirect=True)
def test_budget_is_counted_over_restarts_of_the_aggregator(bench):
    sent, outcomes = [], []
    for number in range(5):
        with bench.opened(privacy=DEMANDS) as coordinator:
            sent.append(_noised(bench, seed=number))
            (verdict,) = _decide(bench, coordinator, sent[-1])
            assert verdict.epsilon == pytest.approx(_by_opacus(sent), abs=1e-9)
            outcomes.append(verdict.receipt.reason)
            if number % 2:
                coordinator.close()
    assert outcomes == [None] * 3 + ["privacy"] * 2


def test_updates_that_are_refused_for_other_reasons_are_counted_too(bench):
    """They were sent: whoever reads the queue has them."""
    rules = {"merging": MergingSettings(max_staleness=0), "privacy": DEMANDS}
    sent = []
    for number in range(4):
        with bench.opened(**rules) as coordinator:
            old = bench.frames()[-1]
            assert _decide(bench, coordinator, _noised(bench, "bob", num_steps=10))[0].receipt.outcome == "merged"
            sent.append(_noised(bench, base=old, seed=number))
            (verdict,) = _decide(bench, coordinator, sent[-1])
            assert verdict.receipt.reason == "too_stale"
            assert verdict.epsilon == pytest.approx(_by_opacus(sent), abs=1e-9)
    with bench.opened(**rules) as coordinator:
        sent.append(_noised(bench))
        (verdict,) = _decide(bench, coordinator, sent[-1])
        _expect_overspent(verdict, _by_opacus(sent))


def test_update_that_comes_again_is_counted_once(bench):
    with bench.opened(privacy=DEMANDS) as coordinator:
        first = _noised(bench)
        verdicts = [verdict for _ in range(5) for verdict in _decide(bench, coordinator, first)]
        assert [verdict.is_duplicate for verdict in verdicts] == [False] + [True] * 4
        assert [verdict.epsilon for verdict in verdicts[1:]] == [None] * 4
        second = _noised(bench, seed=1)
        (verdict,) = _decide(bench, coordinator, second)
        assert verdict.epsilon == pytest.approx(_by_opacus([first, second]), abs=1e-9)


def test_update_in_parts_is_counted_once_and_refused_by_the_same_budget(bench):
    limits = bench.limits(privacy=DEMANDS)
    with bench.opened(privacy=DEMANDS) as coordinator:
        sent = []
        for number in range(4):
            sent.append(_noised(bench, seed=number))
            *first, last = coordinator.decide(bench.arrivals(sent[-1], limits=limits, part_bytes=1024, limit_bytes=1024))
            bench.publish(coordinator)
            assert {verdict.epsilon for verdict in first} == {None}
            assert last.epsilon == pytest.approx(_by_opacus(sent), abs=1e-9)
        _expect_overspent(last, _by_opacus(sent))


def test_group_of_updates_is_counted_one_by_one(bench):
    with bench.opened(privacy=DEMANDS) as coordinator:
        sent = [_noised(bench, seed=number) for number in range(5)]
        verdicts = _decide(bench, coordinator, *sent)
    assert [verdict.receipt.reason for verdict in verdicts] == [None] * 3 + ["privacy"] * 2
    for number, verdict in enumerate(verdicts, start=1):
        assert verdict.epsilon == pytest.approx(_by_opacus(sent[:number]), abs=1e-9)


def test_group_that_was_not_committed_is_not_counted(bench):
    sent = [_noised(bench, base=base) for base in _first_frames(bench)]
    for _ in range(2):
        with bench.opened(privacy=DEMANDS) as coordinator:
            with bench.ledger() as ledger:
                ledger.take_lead("another", at=1.0)
            arrival = bench.arrival(sent[0], limits=bench.limits(privacy=DEMANDS))
            with pytest.raises(Exception, match="nothing more is written here"):
                coordinator.decide([arrival])
            coordinator.open(bench.initial)
    with bench.opened(privacy=DEMANDS) as coordinator:
        (verdict,) = _decide(bench, coordinator, *sent)
        assert verdict.epsilon == pytest.approx(_by_opacus(sent), abs=1e-9)


def _first_frames(bench):
    with bench.opened(privacy=DEMANDS):
        return bench.frames()


def test_budget_that_is_raised_lets_the_party_go_on(bench):
    with bench.opened(privacy=DEMANDS) as coordinator:
        sent = [_noised(bench, seed=number) for number in range(4)]
        assert _decide(bench, coordinator, *sent)[-1].receipt.reason == "privacy"
    higher = _demands(max_epsilon=4.0)
    with bench.opened(privacy=higher) as coordinator:
        sent.append(_noised(bench, seed=9))
        (verdict,) = _decide(bench, coordinator, sent[-1], demands=higher)
        assert verdict.receipt.outcome == "merged"
        assert verdict.epsilon == pytest.approx(_by_opacus(sent), abs=1e-9)


def test_without_a_budget_the_epsilon_is_told_and_nobody_is_refused_for_it(bench):
    boundless = _demands(max_epsilon=None)
    with bench.opened(privacy=boundless) as coordinator:
        sent = [_noised(bench, seed=number, num_steps=5000) for number in range(3)]
        verdicts = _decide(bench, coordinator, *sent, demands=boundless)
    assert [verdict.receipt.outcome for verdict in verdicts] == ["merged"] * 3
    assert verdicts[-1].epsilon == pytest.approx(_by_opacus(sent), abs=1e-9)
    assert verdicts[-1].epsilon > MOST_EPSILON


def test_where_no_noise_is_asked_for_none_is_counted(bench):
    with bench.opened() as coordinator:
        verdicts = _decide(bench, coordinator, _noised(bench), bench.update("bob", base=bench.frames()[-1]), demands=None)
    assert [(verdict.receipt.outcome, verdict.epsilon) for verdict in verdicts] == [("merged", None)] * 2


def test_what_was_sent_before_noise_was_asked_for_counts_where_it_was_noised(bench):
    with bench.opened() as coordinator:
        sent = [_noised(bench, seed=number) for number in range(3)]
        _decide(bench, coordinator, *sent, bench.update(base=bench.frames()[-1], num_steps=10**6), demands=None)
    with bench.opened(privacy=DEMANDS) as coordinator:
        sent.append(_noised(bench, seed=9))
        (verdict,) = _decide(bench, coordinator, sent[-1])
        _expect_overspent(verdict, _by_opacus(sent))


def test_other_accountants_bound_counts_where_it_is_lower(bench):
    """`prv` needs less for the same steps: what it allows must not be refused by `rdp`."""
    demands = _demands(accountant="prv")
    with bench.opened(privacy=demands) as coordinator:
        sent = [_noised(bench, seed=number) for number in range(8)]
        verdicts = _decide(bench, coordinator, *sent, demands=demands)
    reasons = [verdict.receipt.reason for verdict in verdicts]
    merged = reasons.count(None)
    assert reasons == [None] * merged + ["privacy"] * (8 - merged)
    assert 3 < merged < 8
    assert verdicts[merged - 1].epsilon > MOST_EPSILON
    for number, verdict in enumerate(verdicts, start=1):
        assert verdict.epsilon == pytest.approx(_by_opacus(sent[:number]), abs=1e-9)


@settings(max_examples=6, deadline=None)
@given(
    history=st.lists(
        st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from(KINDS), st.integers(1, 300), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_every_epsilon_is_that_of_opacus_whatever_the_history_and_the_restarts(new_bench, history):
    bench, sent = new_bench(), []
    for party, (noise, rate), steps, is_refused in history:
        with bench.opened(privacy=DEMANDS) as coordinator:
            changes = {"base_digest": "0" * 64} if is_refused else {}
            facts = PrivacyFacts(noise_multiplier=noise, sample_rate=rate, max_grad_norm=0.5)
            update = _noised(bench, party, privacy=facts, num_steps=steps, **changes)
            sent.append(update)
            (verdict,) = _decide(bench, coordinator, update)
            epsilon = _by_opacus([one for one in sent if one.party == party])
            assert verdict.epsilon == pytest.approx(epsilon, abs=1e-9)
            expected = "base" if is_refused else "privacy" if epsilon > MOST_EPSILON else None
            assert verdict.receipt.reason == expected


# What is told


def test_event_says_what_each_party_has_spent(bench):
    with bench.opened(privacy=DEMANDS) as coordinator:
        sent = [_noised(bench, seed=number) for number in range(4)]
        verdicts = _decide(bench, coordinator, *sent, sent[0], _noised(bench, "bob", num_steps=1))
    event = Event(kind="updates.decided", federation="ward", at=1.0, version=3, updates=update_facts(verdicts), facts={})
    told = wire.decode(Event, wire.encode(event)).updates
    assert [(facts.party, facts.outcome, facts.reason) for facts in told] == [
        *[("ann", "merged", None)] * 3,
        ("ann", "refused", "privacy"),
        ("ann", "duplicate", None),
        ("bob", "merged", None),
    ]
    for number in range(4):
        assert told[number].epsilon == pytest.approx(_by_opacus(sent[: number + 1]), abs=1e-9)
    assert told[4].epsilon is None
    assert 0 < told[5].epsilon < told[0].epsilon


def test_plan_that_asks_for_noise_from_now_on_is_broadcast_at_once(bench):
    with bench.opened() as coordinator:
        _decide(bench, coordinator, bench.update(base=bench.frames()[-1]), demands=None)
    assert [frame.plan is None or frame.plan.privacy is None for frame in bench.bodies()] == [True] * 2
    with bench.opened(privacy=DEMANDS):
        pass
    assert len(bench.bodies()) == 3
    assert bench.bodies()[-1].plan.privacy == DEMANDS.plan


async def test_party_and_onlooker_are_told_over_the_broker(ward):
    rules = {"privacy": DEMANDS, "limits": ward.bench.limits(privacy=DEMANDS)}
    async with ward.party() as ann, ward.events("updates.decided") as onlooker, ward.running(**rules):
        frame = (await ann.frame()).frame
        assert frame.plan.privacy == DEMANDS.plan
        update = await ann.send(frame, privacy=FACTS, num_steps=4 * STEPS, train_loss=None)
        receipt = await ann.receipt()
        (facts,) = (await onlooker.next("updates.decided")).updates
        assert (receipt.outcome, receipt.reason, facts.reason) == ("refused", "privacy", "privacy")
        assert facts.epsilon == pytest.approx(_by_opacus([update]), abs=1e-9)
        await ann.send(frame)
        receipt = await ann.receipt()
        (facts,) = (await onlooker.next("updates.decided")).updates
        assert (receipt.reason, facts.reason, facts.epsilon) == ("privacy", "privacy", None)
        assert "without differential privacy" in receipt.detail


# What no party may do by what it says of itself


def _says(bench, noise_multiplier, sample_rate, num_steps=1):
    """Whatever it is: a worker of another make checks nothing before it sends."""
    facts = FACTS.model_copy(update={"noise_multiplier": noise_multiplier, "sample_rate": sample_rate})
    return _noised(bench, privacy=facts, num_steps=num_steps)


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "num_steps"),
    [(1e-200, 0.1, 1), (1e-158, 1.0, 1), (0.05, 0.1, 10), (1e6, 5e-324, 1), (1.0, 1.0, 2**53 - 1)],
)
@pytest.mark.parametrize("accountant", ["rdp", "gdp"])
def test_facts_that_no_accountant_can_bear_stop_nobody_else(bench, noise_multiplier, sample_rate, num_steps, accountant):
    demands = _demands(accountant=accountant)
    with bench.opened(privacy=demands) as coordinator:
        (verdict,) = _decide(bench, coordinator, _says(bench, noise_multiplier, sample_rate, num_steps), demands=demands)
        assert verdict.receipt.outcome in ("merged", "refused")
        assert verdict.epsilon is None or math.isfinite(verdict.epsilon)
        assert update_facts([verdict])[0].party == "ann"
        (of_bob,) = _decide(bench, coordinator, _noised(bench, "bob", num_steps=1), demands=demands)
        assert of_bob.receipt.outcome == "merged"
    with bench.opened(privacy=demands) as coordinator:
        (of_bob,) = _decide(bench, coordinator, _noised(bench, "bob", num_steps=1, seed=1), demands=demands)
        assert of_bob.receipt.outcome == "merged"


def test_party_of_two_kinds_of_noise_is_refused_where_the_accountant_takes_one(bench):
    """As when its data grew: the sample rate is another one."""
    demands = _demands(accountant="gdp")
    with bench.opened(privacy=demands) as coordinator:
        kinds = [FACTS.model_copy(update={"sample_rate": rate}) for rate in (0.01, 0.02)]
        sent = [_noised(bench, privacy=kinds[number % 2], seed=number) for number in range(6)]
        verdicts = _decide(bench, coordinator, *sent, demands=demands)
        assert verdicts[-1].receipt.reason == "privacy"
        assert _decide(bench, coordinator, _noised(bench, "bob"), demands=demands)[0].receipt.outcome == "merged"


def test_updates_of_more_steps_than_a_database_counts_to_do_not_keep_the_aggregator_from_starting(bench):
    """Below 2^53 in each of them, as a party may say."""
    with bench.opened(privacy=DEMANDS) as coordinator:
        update = _noised(bench, num_steps=2**53 - 1, delta=0.0)
        arrivals = [
            bench.arrival(update.model_copy(update={"update_id": f"{number:032x}"}), limits=bench.limits(privacy=DEMANDS))
            for number in range(1100)
        ]
        verdicts = coordinator.decide(arrivals)
        assert {verdict.receipt.reason for verdict in verdicts} == {"privacy"}
    with bench.opened(privacy=DEMANDS) as coordinator:
        assert _decide(bench, coordinator, _noised(bench, "bob"))[0].receipt.outcome == "merged"


# By itself


def test_history_that_the_ledger_had_is_gone_on_from_and_not_changed():
    known = {"ann": {(1.0, 0.01): 2 * STEPS}}
    spending = PartySpending(DEMANDS, known)
    assert spending.overspent("ann") is None
    assert spending.overspent("nobody") is None
    assert known == {"ann": {(1.0, 0.01): 2 * STEPS}}


def test_party_that_claims_trainings_of_ever_new_kinds_is_refused_before_they_cost_time(bench):
    spending = PartySpending(DEMANDS, {"ann": {(1.0 + number / 1000, 0.01): 1 for number in range(MOST_KINDS)}})
    with bench.opened(privacy=DEMANDS):
        update = _noised(bench, privacy=PrivacyFacts(noise_multiplier=7.0, sample_rate=0.5, max_grad_norm=1.0))
    assert spending.add(update) is None
    refused = spending.overspent("ann")
    assert refused is not None
    assert refused.detail == "its party has said of more than 256 kinds of trainings that it did them"
    assert spending.overspent("bob") is None
