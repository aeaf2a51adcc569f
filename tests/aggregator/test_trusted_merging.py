"""What trust makes of an update, all the way: model, entry, receipt, event; over restarts and replays."""

import math
from dataclasses import replace

import numpy as np
import pytest
from enrolled_parties import FEDERATION_KEY, membership
from hypothesis import given, settings
from hypothesis import strategies as st

import aggregator.coordinator
from aggregator.admission import Credentials, Refused
from aggregator.decisions import Arrival
from aggregator.merging.fold import Contribution
from aggregator.merging.strategies import build_strategy
from aggregator.messages import update_facts
from aggregator.opening import open_ledger_for_reading
from aggregator.recovery import manifest_of_ledger, recover
from aggregator.trust import Suspension
from aggregator.verification import verify
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings, TrustSettings
from broker_fl.errors import DamagedError
from broker_fl.parameters import digest
from broker_fl.privacy.policy import Demands
from schemas.privacy import PrivacyPlan

BOTH = pytest.mark.parametrize("bench", ["sqlite", "postgresql"], indirect=True)
WHOLE = MergingSettings(mixing_rate=1.0, staleness="constant")
TRUSTED = {"trust": TrustSettings(direction=False), "federation_key": FEDERATION_KEY.public}
NOBODY = Credentials()


def enrolled(party="ann", **changes):
    """Without a key: who signed what is another matter."""
    return Credentials(membership(party, **{"public_key": None, **changes}))


def send(bench, coordinator, party="ann", *, credentials=NOBODY, **changes):
    """One update from the first frame, decided alone."""
    update = bench.update(party, base=bench.frames()[0], **changes)
    (verdict,) = coordinator.decide([bench.arrival(update, credentials=credentials)])
    return verdict


def refused(bench, coordinator, party="ann", *, reason="bounds", credentials=NOBODY, **changes):
    """What the door refused, with a reason of the test's choice."""
    arrival = bench.arrival(bench.update(party, base=bench.frames()[0], **changes), credentials=credentials)
    (verdict,) = coordinator.decide([replace(arrival, content=Refused(reason, "as the test has it"))])
    return verdict


def usual(bench, coordinator, norm=1.0):
    """Ten updates of two others, each of this norm."""
    delta = np.zeros(bench.manifest.size, np.float32)
    delta[0] = norm
    for turn in range(10):
        assert send(bench, coordinator, ("bob", "cem")[turn % 2], delta=delta, seed=turn).receipt.outcome == "merged"


def spike(bench, norm, at=1):
    delta = np.zeros(bench.manifest.size, np.float32)
    delta[at] = norm
    return delta


def updates(bench):
    return [entry for entry in bench.entries() if entry.kind == "update"]


def verified(bench):
    with open_ledger_for_reading(bench.url) as ledger:
        return verify(ledger, bench.snapshots())


def replayed(bench):
    with open_ledger_for_reading(bench.url) as ledger:
        return digest(recover(ledger, bench.snapshots(), manifest_of_ledger(ledger)).state.model)


def model_of(coordinator):
    return coordinator._state.model


class TestTheWayOfAFactor:
    @BOTH
    def test_it_reaches_model_entry_receipt_and_event(self, bench):
        with bench.opened(**TRUSTED, merging=WHOLE) as coordinator:
            verdict = send(bench, coordinator, credentials=enrolled(tier="probation"), delta=spike(bench, 8.0))
            model = model_of(coordinator).copy()
        expected = bench.initial
        expected[1] += np.float32(8.0 * 0.25)
        assert np.array_equal(model, expected)
        (entry,) = updates(bench)
        assert (entry.outcome, entry.factor, entry.weight, entry.norm) == ("merged", 0.25, 0.25, 8.0)
        assert (entry.reason, entry.detail) == ("tier", "its tier 'probation' weighs 0.25")
        receipt = verdict.receipt
        assert (receipt.outcome, receipt.weight, receipt.reason, receipt.detail) == ("merged", 0.25, "tier", entry.detail)
        (facts,) = update_facts([verdict])
        assert (facts.party, facts.outcome, facts.weight, facts.reason) == ("ann", "merged", 0.25, "tier")

    def test_it_is_part_of_the_weight_beside_mixing_rate_and_staleness(self, bench):
        merging = MergingSettings(mixing_rate=0.5, staleness="polynomial", exponent=0.5)
        with bench.opened(**TRUSTED, merging=merging) as coordinator:
            for turn in range(3):
                verdict = send(bench, coordinator, "bob", seed=turn)
            assert verdict.receipt.weight == 0.5 * 3**-0.5
            verdict = send(bench, coordinator, credentials=enrolled(tier="probation"))
        assert verdict.receipt.weight == 0.5 * 4**-0.5 * 0.25

    def test_one_that_is_trusted_has_none_of_it_and_no_reason(self, bench):
        with bench.opened(**TRUSTED, merging=WHOLE) as coordinator:
            verdict = send(bench, coordinator, credentials=enrolled())
        (entry,) = updates(bench)
        assert (entry.factor, entry.reason, entry.detail) == (1.0, None, None)
        assert (verdict.receipt.weight, verdict.receipt.reason, verdict.receipt.detail) == (1.0, None, "")

    def test_what_is_too_large_is_scaled_down_to_the_bound_exactly(self, bench):
        with bench.opened(**TRUSTED, merging=WHOLE) as coordinator:
            usual(bench, coordinator)
            before = model_of(coordinator).copy()
            verdict = send(bench, coordinator, delta=spike(bench, 16.0))
            assert model_of(coordinator)[1] - before[1] == pytest.approx(4.0, rel=1e-6)
        assert (verdict.receipt.weight, verdict.receipt.reason) == (0.25, "norm")
        assert (updates(bench)[-1].norm, updates(bench)[-1].factor) == (16.0, 0.25)

    def test_what_is_far_too_large_is_refused_and_moves_nothing(self, bench):
        with bench.opened(**TRUSTED, merging=WHOLE) as coordinator:
            usual(bench, coordinator)
            before = coordinator.model_digest()
            verdict = send(bench, coordinator, delta=spike(bench, 41.0))
            assert coordinator.model_digest() == before
        assert (verdict.receipt.outcome, verdict.receipt.reason) == ("refused", "outlier")
        entry = updates(bench)[-1]
        assert (entry.outcome, entry.weight, entry.norm, entry.payload, entry.factor) == ("refused", 0.0, 41.0, None, None)

    def test_a_party_that_pulls_against_the_others_weighs_less(self, bench):
        trust = TrustSettings(norm_factor=0, outlier_factor=0)
        with bench.opened(trust=trust, merging=WHOLE.model_copy(update={"max_staleness": 60})) as coordinator:
            verdicts = []
            for turn in range(60):
                party = ("bob", "cem", "ann")[turn % 3]
                delta = np.full(bench.manifest.size, -0.01 if party == "ann" else 0.01)
                delta += 0.001 * np.random.default_rng(turn).standard_normal(bench.manifest.size)
                verdicts.append((party, send(bench, coordinator, party, delta=delta)))
        reasons = [verdict.receipt.reason for party, verdict in verdicts if party == "ann"]
        assert set(reasons[-5:]) == {"direction"}
        assert {verdict.receipt.reason for party, verdict in verdicts if party != "ann"} == {None}
        last = [entry for entry in updates(bench) if entry.party == "ann"][-1]
        assert last.factor == 0.1
        assert last.cosine < -0.9
        assert verified(bench).merged == 60

    def test_without_trust_all_weigh_the_same_and_nothing_is_known_of_them(self, bench):
        with bench.opened(merging=WHOLE) as coordinator:
            usual(bench, coordinator)
            verdict = send(bench, coordinator, delta=spike(bench, 1e5), credentials=enrolled(tier="probation", suspended=True))
        assert (verdict.receipt.weight, verdict.receipt.reason) == (1.0, None)
        assert {entry.kind for entry in bench.entries()} == {"merging", "update"}


BUFFERED = [
    MergingSettings(strategy="fedbuff", buffer_size=4),
    MergingSettings(strategy="fedavg", buffer_size=4),
    MergingSettings(strategy="fedbuff", buffer_size=4, clip_norm=0.5),
]


class TestBuffers:
    @pytest.mark.parametrize("merging", BUFFERED, ids=["fedbuff", "fedavg", "clipped"])
    def test_a_delta_that_is_trusted_less_adds_less_and_the_others_do_not_add_more(self, bench, merging):
        weights = {"ann": 0.25, "bob": 1.0, "cem": 1.0, "dan": 1.0}
        samples = {"ann": 40, "bob": 10, "cem": 20, "dan": 30}
        with bench.opened(**TRUSTED, merging=merging) as coordinator:
            for index, party in enumerate(weights):
                credentials = enrolled(party, tier="probation" if party == "ann" else "standard")
                change = spike(bench, 2.0 * (index + 1), at=index)
                verdict = send(bench, coordinator, party, credentials=credentials, delta=change, num_samples=samples[party])
            moved = model_of(coordinator) - bench.initial
        assert verdict.receipt.outcome == "merged"
        clip, shares = merging.clip_norm or math.inf, samples if merging.strategy == "fedavg" else dict.fromkeys(samples, 1)
        for index, party in enumerate(weights):
            size = min(2.0 * (index + 1), clip)
            assert moved[index] == pytest.approx(size * weights[party] * shares[party] / sum(shares.values()), rel=1e-5)
        recorded = [(entry.outcome, entry.factor, entry.weight) for entry in updates(bench)]
        share = samples["ann"] if merging.strategy == "fedavg" else 1.0
        assert recorded[0] == ("buffered", 0.25, share * 0.25)
        assert verified(bench).version == 1

    @settings(max_examples=80, deadline=None)
    @given(
        factor=st.floats(1e-6, 1.0),
        norm=st.floats(1e-3, 1e6),
        num_samples=st.integers(1, 10**12),
        strategy=st.sampled_from(["fedbuff", "fedavg"]),
        staleness=st.integers(0, 5),
    )
    def test_with_noise_no_factor_makes_anybody_add_more_than_the_noise_covers(
        self, factor, norm, num_samples, strategy, staleness
    ):
        """Client-level privacy: one update moves the sum by at most the clipping norm."""
        merging = MergingSettings(strategy=strategy, buffer_size=10, clip_norm=0.5, noise_multiplier=1.0)
        fold = build_strategy(merging, noise_key=b"k" * 32)
        late = staleness if strategy == "fedbuff" else 0
        state = replace(fold.init(np.zeros(64, np.float32)), version=late)
        values = np.full(64, norm / 8.0, np.float32)
        state, outcome = fold.apply(state, Contribution("ann", Delta(64, values), 0, num_samples, factor))
        assert np.linalg.norm(state.buffer.total.astype(float)) <= 0.5 * (1 + 1e-5)
        assert 0 < outcome.weight <= 1

    def test_with_noise_the_ledger_is_true(self, bench):
        noisy = MergingSettings(strategy="fedbuff", buffer_size=2, clip_norm=0.5, noise_multiplier=0.1)
        with bench.opened(**TRUSTED, merging=noisy) as coordinator:
            for party in ("ann", "bob"):
                send(bench, coordinator, party, credentials=enrolled(party, tier="probation"))
            model = coordinator.model_digest()
        assert verified(bench).model_digest == replayed(bench) == model


class TestReplay:
    @BOTH
    @pytest.mark.parametrize(
        "merging",
        [MergingSettings(), MergingSettings(mode="mixing"), *BUFFERED],
        ids=["fedasync", "mixing", "fedbuff", "fedavg", "clipped"],
    )
    def test_replay_makes_the_same_bits_with_factors(self, bench, merging):
        """Without judging again: what it needs is in the entries."""
        tiers = TrustSettings(tiers={"standard": 1 / 3, "probation": 0.7}, norm_factor=1.5)
        with bench.opened(**{**TRUSTED, "trust": tiers}, merging=merging, snapshot_every_versions=5) as coordinator:
            for turn in range(26):
                party = ("ann", "bob", "cem", "dan")[turn % 4]
                tier = "probation" if party == "bob" else "standard"
                delta = (1 + turn % 3) * np.random.default_rng(turn).standard_normal(bench.manifest.size)
                codec = ("float32", "topk:0.1+int8")[turn % 2]
                update = bench.update(party, base=bench.frames()[-1], delta=delta, codec=codec, num_samples=1 + turn)
                coordinator.decide([bench.arrival(update, credentials=enrolled(party, tier=tier))])
                bench.publish(coordinator)
            coordinator.finish()
            model = coordinator.model_digest()
        assert len({entry.factor for entry in updates(bench) if entry.outcome != "refused"}) > 2
        assert verified(bench).model_digest == replayed(bench) == model
        # Rules that judge otherwise today change nothing of what was.
        rules = {**TRUSTED, "trust": TrustSettings(tiers={"standard": 0.01})}
        with bench.opened(**rules, merging=merging) as coordinator:
            assert coordinator.model_digest() == model

    def test_an_entry_without_a_factor_was_merged_whole(self, bench):
        with bench.opened(merging=WHOLE) as coordinator:
            send(bench, coordinator)
            model = coordinator.model_digest()
        bench.forge("UPDATE entries SET factor = NULL WHERE seq = 2")
        assert verified(bench).model_digest == model

    @pytest.mark.parametrize("forged", ["0.5", "NULL", "1.0"])
    def test_a_factor_that_was_forged_is_found(self, bench, forged):
        with bench.opened(**TRUSTED, merging=WHOLE) as coordinator:
            send(bench, coordinator, credentials=enrolled(tier="probation"))
        bench.forge(f"UPDATE entries SET factor = {forged} WHERE seq = 3")
        with pytest.raises(DamagedError, match="entry 3 was not merged as it says"):
            verified(bench)


def known(coordinator):
    trust = coordinator._trust
    return trust.records(), trust.shut_out(), dict(trust._members)


ACTIONS = st.tuples(
    st.sampled_from(["merge", "merge", "huge", "hostile", "late", "enrol", "probation", "suspend"]),
    st.sampled_from(["ann", "bob", "cem"]),
)


class TestWhatIsKnownOfParties:
    @settings(max_examples=12, deadline=None)
    @given(actions=st.lists(ACTIONS, max_size=60), cut=st.integers(0, 60))
    def test_it_is_the_same_after_a_restart(self, new_bench, actions, cut):
        bench, revisions, arrivals = new_bench(), {}, []
        lenient = {**TRUSTED, "trust": TrustSettings(suspend_below=0.7)}
        with bench.opened(**lenient) as coordinator:
            (base,) = bench.frames()
            for turn, (action, party) in enumerate(actions):
                if action in ("enrol", "probation", "suspend"):
                    revisions[party] = revisions.get(party, 0) + 1
                tier, suspended = "probation" if action == "probation" else "standard", action == "suspend"
                has = party in revisions
                credentials = enrolled(party, revision=revisions[party], tier=tier, suspended=suspended) if has else NOBODY
                delta = spike(bench, 20.0 if action == "huge" else 1.0)
                arrival = bench.arrival(bench.update(party, base=base, delta=delta, seed=turn), credentials=credentials)
                reasons = {"hostile": "bounds", "late": "too_stale"}
                content = Refused(reasons[action], "") if action in reasons else arrival.content
                arrivals.append(replace(arrival, content=content))
            coordinator.decide(arrivals[:cut])
            coordinator.decide(arrivals[cut:])
            before = known(coordinator)
        with bench.opened(**lenient) as coordinator:
            assert known(coordinator) == before
        verified(bench)

    def test_members_and_suspensions_are_known_however_long_ago_they_were_written_down(self, bench, monkeypatch):
        monkeypatch.setattr(aggregator.coordinator, "REMEMBERED_ENTRIES", 3)
        with bench.opened(**TRUSTED) as coordinator:
            for turn in range(12):
                refused(bench, coordinator, credentials=enrolled(revision=4), seed=turn)
            send(bench, coordinator, "bob", credentials=enrolled("bob", tier="probation"))
            for turn in range(5):
                send(bench, coordinator, "cem", seed=turn)
        with bench.opened(**TRUSTED) as coordinator:
            records, out, members = known(coordinator)
            assert set(records) == {"cem"}
            assert len(records["cem"].norms) == 3
            assert out["ann"].revision == 4
            assert (members["ann"].revision, members["bob"].tier) == (4, "probation")
            assert send(bench, coordinator, "bob", seed=9).receipt.reason == "tier"

    def test_a_membership_is_written_down_once_and_before_the_update_that_it_decided(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            for revision in (1, 1, 3, 3, 2, 1):
                send(bench, coordinator, credentials=enrolled(revision=revision), seed=revision)
            assert coordinator.members() == [enrolled(revision=3).membership]
            assert coordinator.parties() == ["ann"]
        kinds = [(entry.kind, entry.sequence if entry.kind == "party" else None) for entry in bench.entries()]
        assert kinds[1:] == [
            ("party", 1),
            ("update", None),
            ("update", None),
            ("party", 3),
            ("update", None),
            ("update", None),
            ("update", None),
            ("update", None),
        ]
        verified(bench)

    def test_where_nothing_is_signed_they_count_and_are_not_written_down(self, bench):
        """Nobody could check later whose word they were."""
        unsigned = {"trust": TrustSettings(direction=False)}
        probation = Credentials(membership("ann", tier="probation"))
        with bench.opened(**unsigned) as coordinator:
            assert send(bench, coordinator, credentials=probation).receipt.reason == "tier"
            for turn in range(14):
                refused(bench, coordinator, credentials=probation, seed=turn)
            assert list(coordinator.shut_out()) == ["ann"]
        assert {entry.kind for entry in bench.entries()} == {"merging", "update", "suspension"}
        assert (verified(bench).signed, verified(bench).unsigned) == (0, 1)
        with bench.opened(**unsigned) as coordinator:
            assert send(bench, coordinator, credentials=probation).refused.reason == "suspended"
            again = Credentials(membership("ann", revision=2, tier="probation"))
            assert send(bench, coordinator, credentials=again).receipt.reason == "tier"

    def test_members_without_updates_are_no_parties_that_sent_any(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            update = bench.update(base=bench.frames()[0])
            first, *_ = bench.arrivals(update, credentials=enrolled(), part_bytes=1024, limit_bytes=0)
            (verdict,) = coordinator.decide([first])
            assert (verdict.receipt, verdict.refused) == (None, None)
            assert coordinator.parties() == []
            assert coordinator.members() == [enrolled().membership]


class TestSuspensions:
    @BOTH
    def test_hostile_updates_end_in_an_entry_and_the_next_ones_are_dropped_without_a_trace(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            verdicts = [refused(bench, coordinator, credentials=enrolled(revision=5), seed=turn) for turn in range(12)]
            assert [verdict.suspends for verdict in verdicts] == [False] * 11 + [True]
            assert all(verdict.receipt.outcome == "refused" for verdict in verdicts)
            why = "its score fell to 0.28; the last update was refused: bounds, as the test has it"
            assert coordinator.shut_out() == {"ann": Suspension(5, why)}
            last = bench.entries()[-1]
            assert (last.kind, last.party, last.sequence, last.detail) == ("suspension", "ann", 5, why)
            dropped = send(bench, coordinator, credentials=enrolled(revision=5))
            assert (dropped.receipt, dropped.refused, dropped.party) == (None, Refused("suspended", why), "ann")
            assert not dropped.suspends
            (facts,) = update_facts([dropped])
            assert (facts.party, facts.outcome, facts.reason) == ("ann", "refused", "suspended")
            assert bench.entries()[-1] == last
            assert (coordinator.counts["dropped"], coordinator.counts["suspended"]) == (1, 1)
            assert send(bench, coordinator, "bob").receipt.outcome == "merged"
        verified(bench)

    def test_within_one_commit_what_comes_after_it_is_dropped(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            base = bench.frames()[0]
            arrivals = [bench.arrival(bench.update(base=base, seed=seed)) for seed in range(15)]
            arrivals = [replace(arrival, content=Refused("codec", "")) for arrival in arrivals]
            others = [bench.arrival(bench.update("bob", base=base))]
            verdicts = coordinator.decide([*arrivals, *others])
            assert [verdict.receipt is None for verdict in verdicts] == [False] * 12 + [True] * 3 + [False]
        assert [entry.kind for entry in bench.entries()] == ["merging", *["update"] * 12, "suspension", "update"]
        verified(bench)

    def test_it_holds_over_a_restart(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            for turn in range(12):
                refused(bench, coordinator, credentials=enrolled(), seed=turn)
            before = coordinator.shut_out()
        with bench.opened(**TRUSTED) as coordinator:
            assert coordinator.shut_out() == before
            assert send(bench, coordinator, credentials=enrolled()).refused.reason == "suspended"

    def test_a_newer_membership_lifts_it_with_the_first_update(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            for turn in range(12):
                refused(bench, coordinator, credentials=enrolled(), seed=turn)
            verdict = send(bench, coordinator, credentials=enrolled(revision=2))
            assert verdict.receipt.outcome == "merged"
            assert coordinator.shut_out() == {}
            # It begins anew.
            for turn in range(11):
                assert not refused(bench, coordinator, credentials=enrolled(revision=2), seed=20 + turn).suspends
        with bench.opened(**TRUSTED) as coordinator:
            assert coordinator.shut_out() == {}

    def test_the_door_that_was_late_to_learn_of_it_does_the_party_no_harm(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            for turn in range(12):
                refused(bench, coordinator, credentials=enrolled(), seed=turn)
            verdict = refused(bench, coordinator, reason="suspended", credentials=enrolled(revision=2))
            assert (verdict.receipt.outcome, verdict.receipt.reason) == ("refused", "suspended")
            assert verdict.is_late_suspension
            assert coordinator._trust.records()["ann"].score == 1.0

    def test_what_an_operator_suspended_is_dropped(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            verdict = send(bench, coordinator, credentials=enrolled(suspended=True, reason="holidays"))
            assert (verdict.receipt, verdict.refused) == (None, Refused("suspended", "holidays"))
            assert coordinator.shut_out() == {}
        assert [entry.kind for entry in bench.entries()] == ["merging", "party"]

    def test_messages_that_make_no_entry_end_in_one_too(self, bench):
        """Of who leaves out its login or its id there is nothing to write down; its exchange says whose they are."""
        nobody = Arrival(None, Refused("identity", "has no user_id property"), 10, enrolled(revision=7), "ann")
        with bench.opened(**TRUSTED) as coordinator:
            verdicts = [coordinator.decide([nobody])[0] for _ in range(12)]
            assert [verdict.suspends for verdict in verdicts] == [False] * 11 + [True]
            assert all(verdict.receipt is None for verdict in verdicts)
            assert coordinator.shut_out()["ann"].revision == 7
            assert coordinator.decide([nobody])[0].refused.reason == "suspended"
        assert [entry.kind for entry in bench.entries()] == ["merging", "party", "suspension"]
        verified(bench)

    def test_a_message_that_the_broker_vouches_for_nobody_by_counts_against_nobody(self, bench):
        nobody = Arrival(None, Refused("identity", ""), 10)
        with bench.opened(**TRUSTED) as coordinator:
            for _ in range(20):
                coordinator.decide([nobody])
            assert known(coordinator) == ({}, {}, {})
        assert len(bench.entries()) == 1

    def test_without_a_threshold_and_without_trust_nobody_is(self, bench):
        for trust in (None, TrustSettings(suspend_below=0)):
            with bench.opened(trust=trust) as coordinator:
                assert not any(refused(bench, coordinator, seed=turn).suspends for turn in range(30))
                assert coordinator.shut_out() == {}

    def test_a_detail_as_long_as_may_be_is_cut(self, bench):
        with bench.opened(**TRUSTED) as coordinator:
            arrival = bench.arrival(bench.update(base=bench.frames()[0]))
            for seed in range(12):
                update = bench.update(base=bench.frames()[0], seed=seed)
                arrival = replace(bench.arrival(update), content=Refused("codec", "\0" + "x" * 5000))
                coordinator.decide([arrival])
            assert len(coordinator.shut_out()["ann"].reason) == 1000

    def test_refusals_of_the_flood_cost_no_privacy_and_those_of_content_do(self, bench):
        plan = PrivacyPlan(noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5, accountant="rdp")
        with bench.opened(**TRUSTED, privacy=Demands(plan, min_noise_multiplier=1.0)) as coordinator:
            assert refused(bench, coordinator, reason="rate").epsilon is None
            assert refused(bench, coordinator, reason="signature").epsilon is None
