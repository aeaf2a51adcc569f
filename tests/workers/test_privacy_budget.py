"""Whether what a party spends adds up: over trainings, crashes, restarts, federations, and any order of them."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant, rdp

from broker_fl.errors import DamagedError
from broker_fl.privacy.accounting import epsilon_of
from broker_fl.privacy.policy import Limits, Mechanism
from schemas.frame import Plan, TrainingPlan
from schemas.privacy import PrivacyPlan
from workers.outbox import StoredUpdate, open_outbox
from workers.privacy import Declined, PlainTraining, PrivacyBudget
from workers.spending import open_spending

DELTA = 1e-5
NUM_EXAMPLES = 200
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where there is one, syncing costs nothing


def plan(noise=1.0, *, batch=20, steps=5, max_epsilon=None, **asked):
    given = {"noise_multiplier": noise, "max_grad_norm": 1.0, "delta": DELTA, "accountant": "rdp", "max_epsilon": max_epsilon}
    return Plan(
        training=TrainingPlan(steps=steps, batch_size=batch),
        update_codec="float32",
        fraction=1.0,
        repeat=False,
        privacy=PrivacyPlan(**{**given, **asked}),
    )


PLAIN = Plan(training=TrainingPlan(), update_codec="float32", fraction=1.0, repeat=False)


class KilledError(Exception):
    """In place of a kill, in the middle of a transaction."""


class Party:
    """The worker of one federation, as far as its budget is concerned, over its restarts."""

    def __init__(self, folder, record, *, federation, limits):
        self.folder, self.record, self.federation, self.limits = folder, record, federation, limits
        self.opened = ExitStack()
        self.start()

    def start(self):
        self.outbox = self.opened.enter_context(open_outbox(self.folder, party="ann", federation=self.federation))
        self.budget = PrivacyBudget(
            self.outbox,
            file=self.record,
            limits=self.limits,
            federation=self.federation,
            party="ann",
            num_examples=NUM_EXAMPLES,
            clock=lambda: 0.0,
        )

    def restart(self):
        self.opened.close()
        self.opened = ExitStack()
        self.start()

    def asks(self, by):
        return self.budget.mechanism_for(by, by.training)

    def spends(self, mechanism, by, *, killed=False, diverged=False):
        """Whether it was committed."""
        sequence = self.outbox.next_sequence()
        update_id = None if diverged else f"{self.federation.encode().hex():0>16}{sequence:016x}"
        try:
            with self.outbox.transaction():
                if update_id is not None:
                    self.outbox.add(StoredUpdate(sequence, update_id, b"", 0, "float32"))
                self.budget.record(mechanism, ledger="l", base_version=0, update_id=update_id)
                if killed or (not diverged and self.budget.passed(by.privacy) is not None):
                    raise KilledError
        except KilledError:
            return False
        return True


@pytest.fixture(autouse=True, scope="module")
def _remembered() -> Iterator[None]:
    """Opacus asks anew what each kind of step costs, which takes most of the time of these tests: once is enough."""
    asked, known = rdp.privacy_analysis.compute_rdp, {}

    def compute_rdp(*, q, noise_multiplier, steps, orders):
        key = (q, noise_multiplier)
        if key not in known:
            known[key] = asked(q=q, noise_multiplier=noise_multiplier, steps=1, orders=orders)
        return known[key] * steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rdp.privacy_analysis, "compute_rdp", compute_rdp)
        yield


@contextmanager
def parties(*, limits, federations=("cardio", "onco")) -> Iterator[dict[str, Party]]:
    fast = str(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast) as folder, ExitStack() as stack:
        found = {
            name: Party(Path(folder) / name, Path(folder) / "patients.db", federation=name, limits=limits) for name in federations
        }
        for party in found.values():
            stack.callback(lambda party=party: party.opened.close())
        yield found


EVENTS = st.tuples(
    st.sampled_from(["train", "train", "train", "killed", "diverged", "restart", "race"]),
    st.sampled_from(["cardio", "onco"]),
    st.sampled_from([0.7, 1.0, 1.3, 2.0]),
    st.sampled_from([10, 20, 50, 400]),
    st.integers(1, 8),
)


@settings(phases=[Phase.explicit, Phase.generate], max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=st.lists(EVENTS, min_size=1, max_size=12), limit=st.sampled_from([1.0, 4.0, 9.0, None]))
def test_over_any_schedule_epsilon_is_opacus_own_for_what_was_done_and_never_passes_the_limit(schedule, limit):
    limits = Limits(delta=DELTA, accountant="rdp", max_epsilon=limit)
    opacus = RDPAccountant()
    with parties(limits=limits) as by_name:
        for kind, name, noise, batch, steps in schedule:
            party, asked = by_name[name], plan(noise, batch=batch, steps=steps)
            if kind == "restart":
                party.restart()
                continue
            mechanism = party.asks(asked)
            if isinstance(mechanism, Declined):
                _expect_that_it_would_pass(opacus, asked, limit)
                continue
            if kind == "race":
                other = by_name["onco" if name == "cardio" else "cardio"]
                other.budget.open()
                _take_part(other, mechanism, asked, opacus)
            if kind == "killed":
                assert not party.spends(mechanism, asked, killed=True)
                party.restart()
            elif kind == "diverged":
                party.spends(mechanism, asked, diverged=True)
                _add(opacus, mechanism)
            else:
                _take_part(party, mechanism, asked, opacus)
        record = by_name["cardio"].record
        if record.exists():
            with open_spending(record) as spending:
                found = epsilon_of(spending.history(), delta=DELTA, accountant="rdp")
                assert [one.steps for one in spending.trainings()] == [steps for _, _, steps in opacus.history]
        else:
            found = 0.0
    assert found == pytest.approx(_epsilon(opacus), abs=1e-6)
    if limit is not None:
        assert found <= limit


def _take_part(party, mechanism, asked, opacus):
    before = _epsilon(opacus)
    if party.spends(mechanism, asked):
        _add(opacus, mechanism)
    else:
        _expect_that_it_would_pass(opacus, asked, party.limits.max_epsilon)
        assert _epsilon(opacus) == before


def _add(opacus, mechanism):
    opacus.history = [*opacus.history, (mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps)]


def _expect_that_it_would_pass(opacus, asked, limit):
    further = RDPAccountant()
    rate = min(1.0, asked.training.batch_size / NUM_EXAMPLES)
    further.history = [*opacus.history, (asked.privacy.noise_multiplier, rate, asked.training.steps)]
    assert _epsilon(further) > limit


def _epsilon(opacus):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That the best order is the largest one.
        return opacus.get_epsilon(DELTA) if opacus.history else 0.0


def test_the_prv_accountant_too_gives_what_opacus_gives_for_the_whole_history():
    with parties(limits=Limits(delta=DELTA, accountant="prv", max_epsilon=30.0), federations=("cardio",)) as by_name:
        party, opacus = by_name["cardio"], PRVAccountant()
        for noise, steps in ((1.0, 5), (1.5, 5), (1.0, 9)):
            asked = plan(noise, steps=steps)
            mechanism = party.asks(asked)
            assert party.spends(mechanism, asked)
            for _ in range(steps):
                opacus.step(noise_multiplier=noise, sample_rate=mechanism.sample_rate)
            party.restart()
        with open_spending(party.record) as spending:
            found = epsilon_of(spending.history(), delta=DELTA, accountant="prv")
        with np.errstate(all="ignore"):
            assert found == pytest.approx(opacus.get_epsilon(DELTA), abs=1e-6)


def test_with_its_budget_spent_a_party_declines_for_ever_and_says_the_figures():
    limits = Limits(delta=DELTA, accountant="rdp", max_epsilon=3.0)
    with parties(limits=limits) as by_name:
        cardio, onco = by_name.values()
        trainings = 0
        while not isinstance(mechanism := cardio.asks(plan(2.0)), Declined):
            assert cardio.spends(mechanism, plan(2.0))
            trainings += 1
        assert trainings > 3
        for party in (cardio, onco):
            party.restart()
            declined = party.asks(plan(2.0))
            assert "the privacy budget is spent: the next training would bring epsilon to 3." in declined.reason
            assert "this party allows 3 (delta 1e-05, accountant rdp)" in declined.reason
        # What costs less still fits.
        assert isinstance(cardio.asks(plan(8.0, batch=1, steps=1)), Mechanism)


def test_the_federations_limit_is_of_what_was_spent_on_it():
    with parties(limits=Limits(delta=DELTA, accountant="rdp")) as by_name:
        cardio, onco = by_name.values()
        while not isinstance(mechanism := cardio.asks(plan(max_epsilon=3.0)), Declined):
            assert cardio.spends(mechanism, plan(max_epsilon=3.0))
        assert "the federation allows 3" in mechanism.reason
        assert isinstance(onco.asks(plan(max_epsilon=3.0)), Mechanism)


def test_a_party_that_allows_no_plain_training_declines_it():
    with parties(limits=Limits(delta=DELTA, accountant="rdp", max_epsilon=3.0), federations=("cardio",)) as by_name:
        assert "asks for no differential privacy" in by_name["cardio"].asks(PLAIN).reason
    with parties(limits=Limits(delta=DELTA, accountant="rdp"), federations=("cardio",)) as by_name:
        party = by_name["cardio"]
        assert party.asks(PLAIN) == PlainTraining()
        assert not party.record.exists()
        # With a record there is a bound that a training without noise would end.
        assert party.spends(party.asks(plan()), plan())
        assert "would have no bound" in party.asks(PLAIN).reason


def test_a_party_raises_the_noise_to_its_own_least():
    with parties(limits=Limits(delta=DELTA, accountant="rdp", min_noise_multiplier=2.5), federations=("cardio",)) as by_name:
        assert by_name["cardio"].asks(plan(1.0)).noise_multiplier == 2.5
        assert by_name["cardio"].asks(plan(3.0)).noise_multiplier == 3.0


def test_a_target_is_reached_by_the_planned_trainings_and_not_passed():
    asked = plan(None, target_epsilon=2.0, planned_trainings=7, max_epsilon=2.0)
    with parties(limits=Limits(delta=DELTA, accountant="rdp"), federations=("cardio",)) as by_name:
        party, done = by_name["cardio"], 0
        while not isinstance(mechanism := party.asks(asked), Declined):
            assert party.spends(mechanism, asked)
            done += 1
        assert done == 7
        with open_spending(party.record) as spending:
            assert 1.99 < epsilon_of(spending.history(), delta=DELTA, accountant="rdp") <= 2.0


def test_a_target_that_no_noise_reaches_is_declined_with_the_reason():
    asked = plan(None, target_epsilon=0.01, planned_trainings=7)
    with parties(limits=Limits(delta=DELTA, accountant="rdp"), federations=("cardio",)) as by_name:
        assert "no noise makes 35 steps cost epsilon 0.01" in by_name["cardio"].asks(asked).reason


def test_a_worker_does_not_go_on_with_a_record_that_lacks_what_it_spent():
    with parties(limits=Limits(delta=DELTA, accountant="rdp"), federations=("cardio",)) as by_name:
        party = by_name["cardio"]
        assert party.spends(party.asks(plan()), plan())
        party.opened.close()
        party.record.unlink()
        party.start()
        with pytest.raises(DamagedError, match="Restore the newest one"):
            party.asks(plan())


def test_another_worker_that_was_faster_is_noticed_in_the_transaction():
    limits = Limits(delta=DELTA, accountant="rdp", max_epsilon=2.0)
    with parties(limits=limits) as by_name:
        cardio, onco = by_name.values()
        mine, theirs = cardio.asks(plan(2.0)), onco.asks(plan(2.0))
        while not isinstance(theirs, Declined):
            assert onco.spends(theirs, plan(2.0))
            theirs = onco.asks(plan(2.0))
        assert not cardio.spends(mine, plan(2.0))
        with open_spending(cardio.record) as spending:
            assert {one.federation for one in spending.trainings()} == {"onco"}
