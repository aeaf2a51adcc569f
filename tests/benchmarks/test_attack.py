import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from benchmarks.attack import canaries, inversion, membership
from benchmarks.attack.__main__ import Size, claims, run, subject_of
from benchmarks.attack.bounds import (
    advantage_bound,
    epsilon_at_least,
    p_value,
    replacing,
    tightest_advantage_bound,
    tpr_bound,
)
from benchmarks.attack.membership import LOSS, Crowd, confidence, crowd_of, scores_of
from benchmarks.attack.subject import subject
from benchmarks.attack.verdict import best_threshold, judged
from broker_fl.privacy.accounting import composed, epsilon_of
from broker_fl.privacy.policy import Mechanism

FULL_BATCH = Mechanism(noise_multiplier=4.0, sample_rate=1.0, steps=1, max_grad_norm=1.0, clipping="flat")
SAMPLED = Mechanism(noise_multiplier=4.0, sample_rate=0.25, steps=16, max_grad_norm=0.5, clipping="ghost")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mechanism", [FULL_BATCH, SAMPLED], ids=["full batch", "sampled"])
def test_an_accountant_that_forgets_is_caught_and_the_real_one_is_not_contradicted(mechanism):
    single, several = canaries.audit(mechanism, trainings=[1, 64], canaries=2000, seed=1)
    assert single.epsilon == single.forgetful_epsilon == several.forgetful_epsilon
    assert single.at_least <= single.epsilon, "one training costs what the accountant says"
    assert several.at_least > several.forgetful_epsilon, "64 trainings cost more than one"
    assert several.at_least <= several.epsilon, "and what the accountant says of all of them"
    assert several.advantage <= several.bound


def test_a_tenth_of_the_noise_contradicts_the_claim_after_one_training():
    claim = epsilon_of(composed([FULL_BATCH.cost]), delta=1e-5, accountant="rdp")
    (row,) = canaries.audit(replace(FULL_BATCH, noise_multiplier=0.4), trainings=[1], canaries=2000, seed=1)
    assert claim < row.at_least < row.epsilon


def test_the_advantage_is_bounded_as_in_randomised_response():
    assert advantage_bound(None, 1e-5) == 1.0
    assert advantage_bound(0.0, 0.0) == 0.0
    assert advantage_bound(0.0, 0.2) == pytest.approx(0.2)
    assert advantage_bound(math.log(3), 0.0) == pytest.approx(3 / 4 - 1 / 4)
    assert advantage_bound(1.0, 0.01) == pytest.approx((math.e - 1 + 0.02) / (math.e + 1))
    assert advantage_bound(1e6, 1e-5) == 1.0
    assert tpr_bound(None, 1e-5, fpr=0.01) == 1.0
    assert tpr_bound(1.0, 1e-5, fpr=0.01) == pytest.approx(math.e * 0.01 + 1e-5)
    assert tpr_bound(8.0, 1e-5, fpr=0.01) == pytest.approx(1 - math.exp(-8) * (0.99 - 1e-5))
    assert replacing(1.0, 1e-5) == (2.0, pytest.approx((1 + math.e) * 1e-5))
    assert replacing(None, 1e-5) == (None, 1e-5)


def test_the_tightest_bound_is_that_of_two_gaussians():
    """One full step is N(0, sigma) against N(1, sigma), whose total variation is erf(1 / (2 sqrt(2) sigma))."""
    true = math.erf(1 / (2 * math.sqrt(2) * 2.0))
    assert true <= tightest_advantage_bound({(2.0, 1.0): 1}) <= true + 0.03


def test_all_guesses_right_are_as_likely_as_in_randomised_response():
    assert p_value(math.log(3), delta=0.0, canaries=10, guesses=10, correct=10) == pytest.approx(0.75**10)
    assert p_value(1.0, delta=1e-5, canaries=10, guesses=10, correct=0) == 1.0
    with_delta = p_value(math.log(3), delta=1e-3, canaries=10, guesses=10, correct=10)
    assert 0.75**10 < with_delta <= 0.75**10 + 2 * 10 * 1e-3


def test_randomised_response_is_contradicted_no_more_often_than_the_confidence_says():
    random = np.random.default_rng(0)
    correct = random.binomial(200, 1 / (1 + math.exp(-1.0)), size=400)
    found = {
        each: epsilon_at_least(delta=0.0, canaries=200, guesses=200, correct=each, confidence=0.9)
        for each in set(correct.tolist())
    }
    wrong = np.mean([found[each] > 1.0 for each in correct.tolist()])
    assert 0.02 < wrong < 0.13
    assert epsilon_at_least(delta=0.0, canaries=200, guesses=200, correct=100, confidence=0.9) == 0.0


def test_thresholds_are_above_all_or_none_of_equal_scores():
    members = np.array([[True, True, False, True, False, False]])
    assert 1.0 < best_threshold(np.array([[3.0, 2.0, 1.0, 2.0, 0.0, 1.0]]), members) < 2.0
    scores = np.array([[2.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    assert best_threshold(scores, members) < 1.0, "of the equal ones two are members, and two are not"


def test_scores_that_know_nothing_gain_nothing_by_the_choice_of_a_threshold():
    random = np.random.default_rng(0)
    scores, members = random.standard_normal((20, 200)), random.random((20, 200)) < 0.5
    is_for_choosing = np.arange(200) < 100
    found = judged(scores, members, is_for_choosing=is_for_choosing, generator=random)
    assert found.low < 0 < found.high
    assert found.auc == pytest.approx(0.5, abs=0.04)
    assert found.tpr == pytest.approx(0.01, abs=0.02)
    knowing = judged(members.astype(np.float64), members, is_for_choosing=is_for_choosing, generator=random)
    assert (knowing.advantage, knowing.auc, knowing.tpr) == (1.0, 1.0, 1.0)


def test_confidence_is_the_logit_of_the_true_class():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 300.0, 0.0]], dtype=torch.float64)
    found = confidence(logits, torch.tensor([0, 1]))
    p = logits[0].softmax(0)[0].item()
    assert found[0].item() == pytest.approx(math.log(p / (1 - p)))
    assert found[1].item() == pytest.approx(300 - math.log(2)), "though 1 - p is 0 in floating point"


def test_a_target_is_judged_by_the_other_models_alone():
    random = np.random.default_rng(0)
    values, members = random.standard_normal((6, 40)), random.random((6, 40)) < 0.5
    members[:, 0], members[1:, 1], members[0, 1] = False, False, True
    crowd = Crowd(members, values, -values, 1.0, 1.0)
    scores = scores_of(crowd)
    assert set(scores) == {membership.LOSS, membership.OFFLINE, membership.ONLINE}
    assert all(np.isfinite(each).all() for each in scores.values())
    target, example = 2, 7
    others = np.arange(6) != target
    out = [values[others, i][~members[others, i]] for i in range(40)]
    spread = math.sqrt(
        sum(((each - each.mean()) ** 2).sum() for each in out if len(each)) / sum(max(len(each) - 1, 0) for each in out)
    )
    expected = (values[target, example] - out[example].mean()) / spread
    assert scores[membership.OFFLINE][target, example] == pytest.approx(expected, rel=1e-6)


def test_a_model_that_learnt_by_heart_gives_its_members_away_and_one_with_noise_does_not():
    of = subject("digits", None, pool=200, epochs=40)
    plain, private = membership.measure(of, [None, 1.0], models=4, seed=1)[::3]
    assert (plain.attack, private.attack) == (LOSS, LOSS)
    assert plain.train_accuracy > 0.99
    assert plain.low > 0.1 > private.low
    assert private.low <= private.tightest_bound < private.bound < plain.bound == 1.0


def test_models_are_the_same_for_the_same_seed():
    of = subject("digits", None, pool=60, epochs=1)
    one, two = (crowd_of(of, None, models=2, seed=3) for _ in range(2))
    assert np.array_equal(one.members, two.members)
    assert np.array_equal(one.confidences, two.confidences)


def test_one_update_gives_its_image_away_exactly_unless_it_is_noised(tmp_path):
    baseline, plain, private = inversion.measure("digits", None, [None, 8.0], images=20, seed=1, folder=tmp_path)
    assert (plain.correlation, plain.psnr_db, plain.advantage) == (pytest.approx(1.0), inversion.MOST_PSNR, 1.0)
    assert private.correlation < baseline.correlation < plain.correlation
    assert private.psnr_db < baseline.psnr_db
    assert (tmp_path / "inversion-digits.png").stat().st_size > 1000


def test_without_the_data_the_digits_are_attacked_and_the_reason_is_told(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(b"")
    size = Size(("fashion_mnist", "digits"), pool=50, epochs=1, models=2, images=2, canaries=200)
    of = subject_of(size, file / "folder")
    assert (of.name, len(of.pool)) == ("digits", 50)
    assert "fashion_mnist is left out: Fashion-MNIST's files" in capsys.readouterr().out


def test_rows_can_be_written_and_claims_that_fail_are_told(capsys):
    size = Size(("digits",), pool=60, epochs=1, models=3, images=4, canaries=400, epsilons=(None, 1.0))
    rows = []
    holds = run(size, None, seed=1, folder=None, shows=lambda _, some: rows.extend(some))
    assert not holds, "a model of one epoch has learnt nothing by heart"
    assert "FAILS: without DP, membership inference works" in capsys.readouterr().out
    records = json.loads(json.dumps([asdict(row) for row in rows], allow_nan=False))
    assert all({"attack", "task", "epsilon", "advantage", "bound"} <= set(record) for record in records)
    kinds = {record["attack"] for record in records}
    assert len(kinds) == 6
    members, images, trainings = rows[:6], rows[6:9], rows[9:]
    assert [claim for _, claim in claims(members, images, trainings)][-1].startswith("the accountant that composes")
