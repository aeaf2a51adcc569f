import math
from collections import deque
from dataclasses import replace
from statistics import fmean, median

import numpy as np
import pytest
from enrolled_parties import membership
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_rows import entry

from aggregator.admission import Examined, Refused
from aggregator.decisions import party_entry, suspension_entry
from aggregator.trust import Direction, Judgement, Suspension, Trust, signed_membership_of
from broker_fl.codecs.delta import Delta
from broker_fl.config import TrustSettings
from broker_fl.errors import DamagedError
from schemas.receipt import Reason
from schemas.update import ModelUpdate

SIZE = 50
PLAIN = TrustSettings(norm_factor=0, outlier_factor=0, direction=False, tiers={}, suspend_below=0)
"""No rule at all."""
HOSTILE = (
    "malformed",
    "identity",
    "federation",
    "manifest",
    "codec",
    "non_finite",
    "bounds",
    "parts",
    "signature",
    "outlier",
    "rate",
)
HARMLESS = ("rolled_back", "base", "samples", "too_stale", "repeated", "privacy", "suspended")
TIERS = {"trusted": 1.0, "standard": 0.5, "probation": 0.125}


def examined(party="ann", values=(1.0,), *, indices=None, size=SIZE):
    values = np.asarray(values, np.float32)
    indices = np.arange(len(values)) if indices is None and len(values) != size else indices
    delta = Delta(size, values, indices)
    return Examined(ModelUpdate.model_construct(party=party), delta, "0" * 64, delta.norm())


def merged(party="ann", **changes):
    return entry(1, party, **{"norm": 1.0, "factor": 1.0, "payload": None, **changes})


def refused(party="ann", reason="bounds"):
    return merged(party, outcome="refused", reason=reason, norm=None, factor=None)


def enrolled(party="ann", **changes):
    return party_entry(1, membership(party, **changes), at=1.0, version=0)


def trusting(settings=None, *entries, size=SIZE, **changes):
    trust = Trust((settings or PLAIN).model_copy(update=changes), size=size)
    trust.remember(entries)
    return trust


def norms(party, *values):
    return [merged(party, norm=value) for value in values]


OTHERS = norms("bob", *[1.0] * 5) + norms("cem", *[1.0] * 5)
"""What is usual is 1."""


class TestNorms:
    def test_before_anything_is_usual_an_outlier_outweighs_the_model_itself(self):
        trust, model = trusting(outlier_factor=40.0), np.array([3.0, 4.0], np.float32)
        assert trust.judge(examined(values=[200.0]), model) == Judgement()
        assert trust.judge(examined(values=[201.0]), model) == Refused(
            "outlier", "its norm 201 is over 200, 40 times the model's own"
        )
        assert trust.judge(examined(values=[201.0]), np.zeros(2, np.float32)) == Judgement()

    def test_what_is_at_the_bound_is_merged_whole_and_what_is_over_it_is_scaled_down_to_it(self):
        trust = trusting(None, *OTHERS, norm_factor=4.0)
        assert trust.judge(examined(values=[4.0])) == Judgement()
        above = float(np.nextafter(np.float32(4.0), np.float32(5.0)))
        assert trust.judge(examined(values=[above])).factor == 4.0 / above < 1.0
        judgement = trust.judge(examined(values=[16.0]))
        assert (judgement.factor, judgement.reason) == (0.25, "norm")
        assert judgement.detail == "its norm 16 was scaled down to 4, 4 times the usual"
        assert judgement.factor * 16.0 == 4.0

    def test_what_is_far_over_is_refused_and_what_is_at_that_bound_is_not(self):
        trust = trusting(None, *OTHERS, norm_factor=4.0, outlier_factor=40.0)
        at_most = trust.judge(examined(values=[40.0]))
        assert (at_most.factor, at_most.reason) == (0.1, "norm")
        above = float(np.nextafter(np.float32(40.0), np.float32(50.0)))
        assert trust.judge(examined(values=[above])) == Refused("outlier", "its norm 40 is over 40, 40 times the usual")

    def test_without_factors_any_norm_goes(self):
        huge = examined(values=[1e6])
        assert trusting(None, *OTHERS).judge(huge) == Judgement()
        assert trusting(None, *OTHERS, norm_factor=2.0).judge(huge).factor == 2e-6
        assert trusting(None, *OTHERS, outlier_factor=2.0).judge(huge).reason == "outlier"

    def test_nobody_is_judged_before_ten_norms_of_others(self):
        trust = trusting(None, *norms("bob", *[1.0] * 5), *norms("cem", *[1.0] * 4), norm_factor=4.0, outlier_factor=40.0)
        # One's own say nothing.
        trust.remember(norms("ann", *[1.0] * 20))
        assert trust.judge(examined(values=[1e6])) == Judgement()
        trust.remember(norms("cem", 1.0))
        assert trust.judge(examined(values=[1e6])).reason == "outlier"

    @pytest.mark.parametrize(("mean", "expected"), [(-0.199, None), (-0.201, "direction")])
    def test_a_party_is_found_only_where_it_pulls_half_as_much_as_the_others(self, mean, expected):
        others = [merged(party, cosine=0.4) for party in ("bob", "cem")]
        trust = trusting(None, *[merged(cosine=mean)] * 32, *others * 5, direction=True)
        for _ in range(10):
            trust.merged(examined("bob"), Judgement())
        assert trust.judge(examined()).reason == expected

    def test_one_other_party_alone_does_not_say_what_is_usual(self):
        """Else, of two, the one that sends next to nothing would shut out the other."""
        trust = trusting(None, *norms("bob", *[1e-9] * 50), norm_factor=4.0, outlier_factor=40.0)
        assert trust.judge(examined(values=[1.0])) == Judgement()
        trust.remember([refused("cem")])
        assert trust.judge(examined(values=[1.0])) == Judgement()

    def test_the_usual_is_the_median_of_the_others_medians(self):
        others = norms("bob", 1.0, 1.0, 9.0, 1.0, 1.0) + norms("cem", 3.0, 3.0, 5.0) + norms("dan", 2.0, 7.0, 2.0)
        trust = trusting(None, *others, *norms("ann", *[100.0] * 9), norm_factor=1.5)
        # 1, 3 and 2.
        assert trust.judge(examined(values=[6.0])).factor == 0.5
        # Of bob's others: 100, 3 and 2.
        assert trust.judge(examined("bob", values=[9.0])).factor == 0.5

    def test_a_party_that_floods_huge_norms_raises_not_its_own_bound_and_lowers_nobodys(self):
        trust = trusting(None, *OTHERS, norm_factor=4.0, outlier_factor=40.0)
        for _ in range(500):
            judgement = trust.judge(examined(values=[30.0]))
            assert judgement.factor == pytest.approx(4.0 / 30.0)
            trust.remember(norms("ann", 30.0))
        for honest in ("bob", "cem"):
            assert trust.judge(examined(honest, values=[1.0])) == Judgement()

    def test_a_party_that_floods_next_to_nothing_shuts_nobody_out(self):
        trust = trusting(None, *OTHERS, *norms("ann", *[1e-12] * 500), norm_factor=4.0, outlier_factor=40.0)
        for honest in ("bob", "cem"):
            assert trust.judge(examined(honest, values=[1.0])) == Judgement()

    def test_only_the_newest_norms_count_so_that_a_model_may_converge(self):
        trust = trusting(None, *norms("bob", *[100.0] * 40), *norms("cem", *[100.0] * 40), norm_factor=4.0)
        assert trust.judge(examined(values=[10.0])) == Judgement()
        trust.remember(norms("bob", *[1.0] * 32) + norms("cem", *[1.0] * 32))
        assert trust.judge(examined(values=[10.0])).factor == 0.4

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["ann", "bob", "cem", "dan", "eve"]), st.sampled_from([0.0, 1.0, 2.0, 2.5, 7.0]))))
    def test_the_usual_is_that_after_any_updates_of_any_parties(self, updates):
        trust, known = trusting(None, norm_factor=1.0), {}
        for party, norm in updates:
            trust.remember(norms(party, norm))
            known.setdefault(party, deque(maxlen=32)).append(norm)
            for judged in ("ann", "bob", "new"):
                others = [values for name, values in known.items() if name != judged]
                usual = median(map(median, others)) if len(others) > 1 and sum(map(len, others)) >= 10 else 0.0
                assert trust.judge(examined(judged, values=[8.0])).factor == (usual / 8.0 if usual else 1.0)

    def test_what_a_suspended_party_sent_is_not_usual_any_more(self):
        trust = trusting(None, *OTHERS, *norms("dan", *[9.0] * 9), *norms("eve", *[9.0] * 9), norm_factor=1.0)
        assert trust.judge(examined(values=[10.0])).factor == 0.5
        trust.remember([suspension("dan"), suspension("eve")])
        assert trust.judge(examined(values=[10.0])).factor == 0.1

    def test_where_the_others_send_nothing_nothing_is_usual(self):
        trust = trusting(None, *norms("bob", *[0.0] * 9), *norms("cem", *[0.0] * 9), norm_factor=4.0, outlier_factor=40.0)
        assert trust.judge(examined(values=[1.0])) == Judgement()

    def test_what_was_refused_is_not_usual(self):
        of_bob = [merged("bob", outcome="refused", reason="outlier", norm=1e6)] * 20
        trust = trusting(None, *of_bob, *OTHERS, norm_factor=4.0)
        assert trust.judge(examined(values=[8.0])).factor == 0.5

    def test_what_waits_in_a_buffer_is(self):
        others = [replace(known, outcome="buffered") for known in OTHERS]
        assert trusting(None, *others, norm_factor=4.0).judge(examined(values=[8.0])).factor == 0.5


class TestTiers:
    @pytest.mark.parametrize(("tier", "weight"), TIERS.items())
    def test_an_update_weighs_what_its_partys_tier_does(self, tier, weight):
        judgement = trusting(None, enrolled(tier=tier), tiers=TIERS).judge(examined())
        expected = (weight, "tier", f"its tier '{tier}' weighs {weight:g}") if weight < 1 else (1.0, None, "")
        assert (judgement.factor, judgement.reason, judgement.detail) == expected

    def test_a_party_that_is_in_no_register_is_a_standard_one(self):
        assert trusting(None, tiers=TIERS).judge(examined()).factor == 0.5

    def test_a_tier_that_nobody_knows_weighs_the_least(self):
        assert trusting(None, enrolled(tier="friends"), tiers=TIERS).judge(examined()).factor == 0.125

    def test_without_tiers_all_weigh_the_same(self):
        assert trusting(None, enrolled(tier="friends"), tiers={}).judge(examined()) == Judgement()

    def test_a_newer_membership_changes_the_tier(self):
        trust = trusting(None, enrolled(tier="probation"), tiers=TIERS)
        trust.remember([enrolled(tier="trusted", revision=2)])
        assert trust.judge(examined()) == Judgement()
        assert trust.member("ann").tier == "trusted"
        assert trust.member("bob") is None


def _cosine(one, other):
    return float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


class TestDirections:
    @pytest.mark.parametrize("density", [1.0, 0.05, None])
    def test_the_running_direction_is_the_exponential_mean_of_unit_vectors(self, density):
        """Over several times that its scale is folded in; None mixes dense and sparse ones."""
        generator, size = np.random.default_rng(3), 400
        direction, naive = Direction(size), np.zeros(size)
        for turn in range(600):
            share = density or (1.0 if turn % 3 == 0 else 0.1)
            indices = None if share == 1.0 else np.sort(generator.choice(size, int(share * size), replace=False))
            values = (generator.standard_normal(size if indices is None else len(indices)) + 0.3).astype(np.float32)
            values *= np.float32(10.0 ** generator.uniform(-6, 6))
            delta = Delta(size, values, indices)
            dense, factor = delta.dense().astype(float), float(generator.uniform(0.05, 1.0))
            expected = None if turn < 10 else _cosine(naive, dense)
            found = direction.cosine(delta, delta.norm())
            assert found == (None if expected is None else pytest.approx(expected, abs=1e-4))
            direction.add(delta, delta.norm(), factor)
            naive = 0.9 * naive + factor * dense / np.linalg.norm(dense)
        assert direction._scale != 0.9**600
        assert np.allclose(direction._scale * direction._vector, naive, atol=1e-4)

    def test_it_says_nothing_before_ten_merges_and_nothing_of_an_update_of_zeros(self):
        direction, one, zeros = Direction(4), Delta(4, np.ones(4, np.float32)), Delta(4, np.zeros(4, np.float32))
        for _ in range(10):
            assert direction.cosine(one, one.norm()) is None
            direction.add(zeros, 0.0, 1.0)
            direction.add(one, one.norm(), 1.0)
        assert direction.cosine(one, one.norm()) == pytest.approx(1.0)
        assert direction.cosine(zeros, 0.0) is None
        against = Delta(4, -np.ones(4, np.float32))
        assert -1.0 <= direction.cosine(against, against.norm()) == pytest.approx(-1.0)

    @pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1e-30, 1e-21, 1e-18, 1e6])
    def test_updates_of_any_size_leave_it_a_direction(self, value):
        """One that is next to nothing would become infinite as a unit vector, and all cosines with it."""
        direction, ones = Direction(4), Delta(4, np.ones(4, np.float32))
        strange = Delta(4, np.full(4, value, np.float32))
        for _ in range(400):
            direction.add(ones, ones.norm(), 1.0)
            with np.errstate(all="raise", under="ignore"):
                direction.add(strange, strange.norm(), 1.0)
                cosine = direction.cosine(strange, strange.norm())
            assert cosine is None or cosine == pytest.approx(1.0, abs=1e-4)
            assert np.isfinite(direction._vector).all()
        assert direction.cosine(ones, ones.norm()) == pytest.approx(1.0, abs=1e-4)

    def test_what_goes_against_itself_again_and_again_is_no_direction(self):
        direction = Direction(1)
        for turn in range(300):
            delta = Delta(1, np.array([1.0 if turn % 2 else -1.0], np.float32))
            direction.add(delta, 1.0, 1.0)
            assert abs(direction._scale * direction._vector[0]) <= 1.0
            assert direction._squared >= 0

    def test_without_the_rule_there_is_no_vector_and_no_cosine(self):
        trust = trusting(direction=False)
        assert trust._direction is None
        for _ in range(20):
            trust.merged(examined(), Judgement())
        assert trust.judge(examined()) == Judgement()


class Crowd:
    """Parties that each go their own way, seen by a federation that merges what they send."""

    def __init__(self, seed, parties, *, settings=None, size=300, sparse=False):
        self.generator = np.random.default_rng(seed)
        self.trust = trusting(settings or TrustSettings(), size=size)
        self.size, self.sparse = size, sparse
        self.common = self._unit()
        self.own = {party: self._unit() for party in parties}
        self.pull = {party: self.generator.uniform(0.15, 1.0) for party in parties}
        self.judgements = {party: [] for party in parties}

    def _unit(self):
        vector = self.generator.standard_normal(self.size)
        return vector / np.linalg.norm(vector)

    def delta(self, party, sign=1.0):
        """Towards what all want, towards what only this party wants, and noise."""
        vector = self.pull[party] * self.common + self.own[party] + self.generator.uniform(0.5, 2.0) * self._unit()
        vector *= sign * np.exp(self.generator.normal(0.0, 0.3))
        if not self.sparse:
            return examined(party, vector, size=self.size)
        indices = np.sort(np.argsort(-np.abs(vector))[: self.size // 10])
        return examined(party, vector[indices], indices=indices, size=self.size)

    def send(self, party, sign=1.0):
        update = self.delta(party, sign)
        judgement = self.trust.judge(update)
        assert isinstance(judgement, Judgement)
        self.trust.merged(update, judgement)
        self.trust.remember([merged(party, norm=update.norm, cosine=judgement.cosine, reason=judgement.reason)])
        self.judgements[party].append(judgement)
        return judgement


class TestPullingAgainst:
    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_honest_parties_that_go_their_own_ways_are_never_found(self, seed, sparse):
        parties = [f"party-{number}" for number in range(10)]
        crowd = Crowd(seed, parties, sparse=sparse)
        for _ in range(2000):
            crowd.send(str(crowd.generator.choice(parties)))
        reasons = {judgement.reason for judgements in crowd.judgements.values() for judgement in judgements}
        assert "direction" not in reasons
        means = {party: fmean(crowd.trust.records()[party].cosines) for party in parties}
        assert min(means.values()) > 0

    @pytest.mark.parametrize("sparse", [False, True])
    def test_a_party_that_sends_the_opposite_is_found_soon_and_the_others_are_not(self, sparse):
        parties = [f"party-{number}" for number in range(10)]
        crowd = Crowd(7, parties, sparse=sparse)
        for _ in range(100):
            for party in parties:
                crowd.send(party, -1.0 if party == "party-3" else 1.0)
        found = [judgement.reason == "direction" for judgement in crowd.judgements["party-3"]]
        assert found.index(True) < 30
        assert all(found[found.index(True) :])
        late = crowd.judgements["party-3"][-1]
        assert (late.factor, late.detail.startswith("its updates have a mean cosine of -")) == (0.1, True)
        honest = [judgement for party in parties if party != "party-3" for judgement in crowd.judgements[party]]
        assert not any(judgement.reason == "direction" for judgement in honest)

    @pytest.mark.parametrize("order", ["in turn", "at random"])
    @pytest.mark.parametrize("count", [2, 3, 10])
    def test_honest_parties_that_have_come_to_a_compromise_are_never_found(self, count, order):
        """Each wants another model, and what they send adds up to nothing where the model is: each pulls against the others."""
        generator, size = np.random.default_rng(5), 300
        wanted = generator.standard_normal((count, size)) / np.sqrt(size)
        model, trust = wanted.mean(axis=0), trusting(TrustSettings(), size=size)
        reasons, alone = set(), set()
        for turn in range(100 * count):
            index = turn % count if order == "in turn" else int(generator.integers(count))
            delta = 0.5 * (wanted[index] - model)
            delta += 0.5 * np.linalg.norm(delta) * generator.standard_normal(size) / np.sqrt(size)
            update = examined(f"party-{index}", delta, size=size)
            judgement = trust.judge(update)
            reasons.add(judgement.reason)
            trust.merged(update, judgement)
            trust.remember([merged(f"party-{index}", norm=update.norm, cosine=judgement.cosine, reason=judgement.reason)])
            alone |= {party for party, record in trust.records().items() if record.pulls_against()}
            model = model + 0.3 * judgement.factor * delta
        assert reasons == {None}
        # Alone, each would look like one that turns its updates around.
        assert len(alone) >= count / 2

    @pytest.mark.parametrize(
        ("common", "expected"), [(0.1 / math.sqrt(2) - 1e-3, None), (0.1 / math.sqrt(2) + 1e-3, "direction")]
    )
    def test_a_party_is_found_only_while_most_others_go_somewhere_together(self, common, expected):
        """The more they are, the surer it is where they go: these are four."""
        cosines = {"bob": common, "cem": 0.9, "dan": common, "eve": 0.0}
        others = [merged(party, cosine=cosine) for party, cosine in cosines.items()]
        trust = trusting(None, *[merged(cosine=-0.5)] * 32, *others * 3, direction=True)
        for _ in range(10):
            trust.merged(examined("bob"), Judgement())
        assert trust.judge(examined()).reason == expected

    def test_one_other_party_alone_does_not_say_where_the_model_goes(self):
        trust = trusting(None, *[merged(cosine=-0.5)] * 32, *[merged("bob", cosine=0.9)] * 32, direction=True)
        for _ in range(10):
            trust.merged(examined("bob"), Judgement())
        assert trust.judge(examined()) == Judgement(cosine=pytest.approx(1.0))

    def test_a_party_that_becomes_honest_is_trusted_again(self):
        parties = [f"party-{number}" for number in range(10)]
        crowd = Crowd(11, parties)
        for turn in range(150):
            for party in parties:
                crowd.send(party, -1.0 if party == "party-3" and turn < 60 else 1.0)
        reasons = [judgement.reason for judgement in crowd.judgements["party-3"]]
        assert reasons[59] == "direction"
        assert reasons[-1] is None

    @pytest.mark.parametrize("rule", [{"direction": False}, {"direction_weight": 1.0}])
    def test_without_the_rule_nobody_loses_weight(self, rule):
        parties = [f"party-{number}" for number in range(10)]
        crowd = Crowd(7, parties, settings=TrustSettings(**rule))
        for _ in range(60):
            for party in parties:
                crowd.send(party, -1.0 if party == "party-3" else 1.0)
        assert {judgement.factor for judgement in crowd.judgements["party-3"]} == {1.0}

    @pytest.mark.parametrize(
        ("cosines", "expected"),
        [
            ([-1.0] * 9, False),
            ([-1.0] * 10, True),
            ([-0.02] * 32, False),
            ([-0.021] * 32, True),
            ([0.0] * 32, False),
            ([1.0] * 32, False),
            # Of mean -0.1 and a standard error of 0.0254 and 0.0245.
            ([-0.1 + 0.0254 * math.sqrt(31) * (1 if turn % 2 else -1) for turn in range(32)], False),
            ([-0.1 + 0.0245 * math.sqrt(31) * (1 if turn % 2 else -1) for turn in range(32)], True),
        ],
    )
    def test_the_mean_has_to_be_below_zero_beyond_doubt(self, cosines, expected):
        trust = trusting(None, *(merged(cosine=cosine) for cosine in cosines))
        assert trust.records()["ann"].pulls_against() == expected

    def test_only_what_was_merged_counts(self):
        trust = trusting(None, *[merged(outcome="refused", reason="too_stale", cosine=-1.0)] * 50)
        assert not trust.records()["ann"].cosines


def test_factors_multiply_and_the_heaviest_says_why():
    against = [merged(cosine=-0.5)] * 10
    changes = {"norm_factor": 4.0, "direction": True, "direction_weight": 0.25, "tiers": {"probation": 0.5}}
    others = [replace(known, cosine=0.5) for known in OTHERS]
    trust = trusting(None, *others, *against, enrolled(tier="probation"), **changes)
    for _ in range(10):
        trust.merged(examined("bob", values=[1.0]), Judgement())
    judgement = trust.judge(examined(values=[-32.0]))
    assert (judgement.factor, judgement.reason) == (0.5 * 0.125 * 0.25, "norm")
    assert judgement.cosine == pytest.approx(-1.0)
    judgement = trust.judge(examined(values=[-8.0]))
    assert (judgement.factor, judgement.reason) == (0.5 * 0.5 * 0.25, "direction")


class TestScores:
    def test_a_party_is_suspended_after_exactly_so_many_hostile_refusals(self):
        trust = trusting(suspend_below=0.3)
        for _ in range(11):
            trust.remember([refused()])
            assert trust.below_threshold("ann") is None
        trust.remember([refused()])
        assert trust.below_threshold("ann") == pytest.approx(0.9**12)
        assert 0.9**12 < 0.3 < 0.9**11

    @pytest.mark.parametrize("reason", HOSTILE)
    def test_these_reasons_lower_a_score(self, reason):
        assert trusting(None, enrolled(), refused(reason=reason)).records()["ann"].score == pytest.approx(0.9)

    def test_a_signature_says_nothing_of_a_party_whose_key_nobody_knows(self):
        assert trusting(None, refused(reason="signature")).records()["ann"].score == 1.0

    @pytest.mark.parametrize("reason", HARMLESS)
    def test_these_say_nothing_of_a_party(self, reason):
        trust = trusting(None, *[refused(reason=reason)] * 100, suspend_below=0.3)
        assert trust.records()["ann"].score == 1.0
        assert trust.below_threshold("ann") is None

    def test_every_reason_is_one_or_the_other(self):
        assert set(HOSTILE) | set(HARMLESS) | {"norm", "direction", "tier"} == set(Reason.__args__)

    def test_what_is_merged_mends_a_score(self):
        trust = trusting(None, *[refused()] * 11, merged(), suspend_below=0.3)
        assert trust.records()["ann"].score == pytest.approx(0.9 * 0.9**11 + 0.1)
        trust.remember([refused(), refused()])
        assert trust.below_threshold("ann") is None

    @pytest.mark.parametrize("reason", ["norm", "direction"])
    def test_less_weight_alone_is_never_a_suspension(self, reason):
        trust = trusting(None, *[merged(reason=reason)] * 1000, suspend_below=0.59)
        assert trust.below_threshold("ann") is None
        assert trust.records()["ann"].score == pytest.approx(0.6)

    def test_the_tier_says_nothing_of_an_update(self):
        assert trusting(None, *[merged(reason="tier")] * 100).records()["ann"].score == 1.0

    def test_without_a_threshold_nobody_is_suspended(self):
        assert trusting(None, *[refused()] * 1000, suspend_below=0).below_threshold("ann") is None

    def test_a_party_that_never_sent_anything_has_no_score(self):
        assert trusting(suspend_below=0.3).below_threshold("ann") is None

    def test_a_message_that_makes_no_entry_counts_for_the_score_too(self):
        trust = trusting(suspend_below=0.3)
        for _ in range(11):
            trust.strike("ann", "identity")
        assert trust.below_threshold("ann") is None
        trust.strike("ann", "too_stale")
        assert trust.below_threshold("ann") is None
        trust.strike("ann", "rate")
        assert trust.below_threshold("ann") == pytest.approx(0.9**12)

    def test_of_one_party_nothing_follows_for_another(self):
        trust = trusting(None, *[refused("ann")] * 50, suspend_below=0.3)
        assert trust.below_threshold("bob") is None
        assert trust.suspended("bob") is None


def suspension(party="ann", *, revision=1, detail="its score fell"):
    return suspension_entry(2, party, revision=revision, detail=detail, at=1.0, version=0)


class TestSuspensions:
    def test_a_suspension_says_why_and_whom_it_ends(self):
        trust = trusting(None, enrolled(), suspension())
        assert trust.suspended("ann") == "its score fell"
        assert trust.shut_out() == {"ann": Suspension(1, "its score fell")}

    def test_a_newer_membership_ends_it_and_the_party_begins_anew(self):
        trust = trusting(None, enrolled(), *[refused()] * 20, suspension(), suspend_below=0.3)
        assert trust.below_threshold("ann") is not None
        trust.remember([enrolled(revision=2)])
        assert trust.suspended("ann") is None
        assert trust.shut_out() == {}
        assert trust.below_threshold("ann") is None
        assert "ann" not in trust.records()

    def test_a_membership_that_is_not_newer_ends_nothing(self):
        trust = trusting(None, enrolled(revision=3), suspension(revision=3), enrolled(revision=3), enrolled(revision=2))
        assert trust.suspended("ann") == "its score fell"

    def test_a_party_without_a_membership_is_out_until_it_has_one(self):
        trust = trusting(None, suspension(revision=0))
        assert trust.suspended("ann") is not None
        trust.remember([enrolled(revision=1)])
        assert trust.suspended("ann") is None

    def test_a_newer_membership_that_is_suspended_itself_keeps_the_party_out(self):
        trust = trusting(None, enrolled(), suspension(), enrolled(revision=2, suspended=True, reason="by the aggregator"))
        assert trust.suspended("ann") == "by the aggregator"
        # It is the operators' from here on.
        assert trust.shut_out() == {}
        trust.remember([enrolled(revision=3)])
        assert trust.suspended("ann") is None

    @pytest.mark.parametrize(("reason", "expected"), [("holidays", "holidays"), ("", "by an operator")])
    def test_what_an_operator_suspended_is_suspended(self, reason, expected):
        trust = trusting(None, enrolled(suspended=True, reason=reason))
        assert trust.suspended("ann") == expected
        assert trust.shut_out() == {}

    def test_a_newer_membership_of_a_party_that_is_in_keeps_its_record(self):
        trust = trusting(None, enrolled(), *[refused()] * 5, enrolled(revision=2))
        assert trust.records()["ann"].score == pytest.approx(0.9**5)


PARTIES = st.sampled_from(["ann", "bob", "cem"])
COSINES = st.none() | st.floats(-1, 1)
ENTRIES = st.one_of(
    st.builds(
        merged,
        PARTIES,
        norm=st.none() | st.floats(0, 1e10),
        cosine=COSINES,
        outcome=st.sampled_from(["merged", "buffered"]),
        reason=st.none() | st.sampled_from(["norm", "direction", "tier"]),
    ),
    st.builds(refused, PARTIES, st.sampled_from(HOSTILE + HARMLESS)),
    st.builds(lambda party, revision, **facts: enrolled(party, revision=revision, **facts), PARTIES, st.integers(1, 4),
              suspended=st.booleans(), tier=st.sampled_from(["standard", "probation", "friends"])),
    st.builds(lambda party, revision: suspension(party, revision=revision), PARTIES, st.integers(0, 3)),
    st.just(entry(1, None, kind="flush", outcome=None, payload=None)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(entries=st.lists(ENTRIES, max_size=60), data=st.data())
def test_what_is_known_of_parties_is_the_same_in_one_go_and_one_by_one(entries, data):
    """And so the same after a restart as before it."""
    cut = data.draw(st.integers(0, len(entries)))
    whole, parted, single = (trusting(TrustSettings()) for _ in range(3))
    whole.remember(entries)
    parted.remember(entries[:cut])
    parted.remember(entries[cut:])
    for one in entries:
        single.remember([one])
    update = examined("ann", values=[3.0])
    for other in (parted, single):
        assert other.records() == whole.records()
        assert other.shut_out() == whole.shut_out()
        for party in ("ann", "bob", "cem"):
            assert other.member(party) == whole.member(party)
            assert other.suspended(party) == whole.suspended(party)
            assert other.below_threshold(party) == whole.below_threshold(party)
        assert other.judge(update) == whole.judge(update)
    for record in whole.records().values():
        assert 0 <= record.score <= 1
        assert isinstance(record.norms, deque)
        assert len(record.norms) <= 32
        assert len(record.cosines) <= 32


def test_an_entry_that_holds_no_membership_is_damaged():
    whole = enrolled()
    assert signed_membership_of(whole).membership.party == "ann"
    for payload in (None, b"", b"{}", whole.payload[:-1], whole.payload.replace(b'"revision":1', b'"revision":0')):
        with pytest.raises(DamagedError, match="entry 1 of the ledger holds no membership"):
            signed_membership_of(replace(whole, payload=payload))
