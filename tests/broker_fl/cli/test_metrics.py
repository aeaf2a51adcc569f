"""What is counted, from facts that are told, to the last number."""

import math
import random
from dataclasses import dataclass
from typing import get_args

import pytest
from metric_names import METRIC_NAMES, REGISTRIES, series_of, values_of

from aggregator.evaluator import Score
from aggregator.observer import Unobserved as UnobservedAggregator
from aggregator.records import FrameRow
from broker_fl.cli.metrics.aggregator import AggregatorMetrics
from broker_fl.cli.metrics.evaluator import EvaluatorMetrics
from broker_fl.cli.metrics.labels import MOST_PARTIES, OTHER, codec_label
from broker_fl.cli.metrics.worker import WorkerMetrics
from broker_fl.codecs.registry import QUANTIZERS, SPARSIFIERS
from schemas.event import UpdateFacts
from schemas.receipt import Reason, Receipt
from workers.observer import Unobserved as UnobservedWorker


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self):
        return self.now


def facts(
    outcome="merged", *, party="ann", staleness=0, weight=0.25, size=100, codec="topk:0.01+int4", reason=None, epsilon=None
):
    return UpdateFacts(
        party=party,
        outcome=outcome,
        staleness=staleness,
        weight=weight,
        bytes=size,
        codec=codec,
        reason=reason,
        epsilon=epsilon,
    )


def decided(metrics, *updates, waits_s=(), seconds=0.004, suspensions=0):
    metrics.decided(updates, waits_s=waits_s, seconds=seconds, suspensions=suspensions)


def frame(*, codec="topk:0.05+int8", size=500, keyframe=None, keyframe_codec=None):
    return FrameRow(
        number=1,
        at=0.0,
        version=1,
        base=None,
        digest="",
        model_digest="",
        codec=codec,
        rounding=None,
        plan="",
        over=False,
        size=size,
        log_bytes=0,
        keyframe=keyframe,
        keyframe_codec=keyframe_codec,
    )


# The aggregator


def test_updates_are_counted_by_outcome_and_refusals_by_reason():
    metrics = AggregatorMetrics()
    decided(metrics, facts(), facts("buffered"), facts("duplicate", reason="base"), facts("refused", reason="too_stale"))
    decided(metrics, facts("refused", reason="too_stale"), facts(reason="tier"))
    found = values_of(metrics.registry)
    by_outcome = {
        outcome: found[f'broker_fl_updates_total{{outcome="{outcome}"}}'] for outcome in ("merged", "buffered", "refused")
    }
    assert by_outcome == {"merged": 2, "buffered": 1, "refused": 2}
    assert found['broker_fl_updates_total{outcome="duplicate"}'] == 1
    refusals = {name: value for name, value in found.items() if name.startswith("broker_fl_refusals_total")}
    assert refusals['broker_fl_refusals_total{reason="too_stale"}'] == 2
    assert sum(refusals.values()) == 2


def test_outcomes_and_reasons_are_there_before_anything_happened():
    found = values_of(AggregatorMetrics().registry)
    reasons = {reason for reason in get_args(Reason) if f'broker_fl_refusals_total{{reason="{reason}"}}' in found}
    assert set(get_args(Reason)) - reasons == {"norm", "direction", "tier"}
    for outcome in ("merged", "buffered", "refused", "duplicate"):
        assert found[f'broker_fl_updates_total{{outcome="{outcome}"}}'] == 0


def test_staleness_and_weight_are_those_of_updates_that_were_taken():
    metrics = AggregatorMetrics()
    decided(metrics, facts(staleness=3, weight=0.15), facts("buffered", staleness=0, weight=120.0))
    decided(metrics, facts("refused", staleness=40, weight=0.0, reason="too_stale"), facts("duplicate", staleness=1))
    found = values_of(metrics.registry)
    assert (found["broker_fl_staleness_versions_count"], found["broker_fl_staleness_versions_sum"]) == (2, 3)
    assert found['broker_fl_staleness_versions_bucket{le="0.0"}'] == 1
    assert found['broker_fl_staleness_versions_bucket{le="4.0"}'] == 2
    assert (found["broker_fl_effective_weight_count"], found["broker_fl_effective_weight_sum"]) == (2, 120.15)
    assert found['broker_fl_effective_weight_bucket{le="0.2"}'] == 1


def test_a_commit_and_the_waits_of_its_updates_are_observed():
    metrics = AggregatorMetrics()
    decided(metrics, facts(), facts(), waits_s=[0.04, 90.0], seconds=0.02, suspensions=1)
    decided(metrics, seconds=0.002)
    found = values_of(metrics.registry)
    assert (found["broker_fl_commit_seconds_count"], found["broker_fl_commit_seconds_sum"]) == (2, 0.022)
    assert (found["broker_fl_queue_age_seconds_count"], found["broker_fl_queue_age_seconds_sum"]) == (2, 90.04)
    assert found['broker_fl_queue_age_seconds_bucket{le="60.0"}'] == 1
    assert found["broker_fl_suspensions_total"] == 1


def test_bytes_are_counted_by_direction_and_codec():
    metrics = AggregatorMetrics()
    decided(
        metrics, facts(size=100), facts(size=20, codec="topk:0.2+int4"), facts("refused", size=7, codec="", reason="malformed")
    )
    metrics.published(frame(size=500), seconds=0.3)
    metrics.published(frame(size=70, codec="float32", keyframe=b"k" * 900, keyframe_codec="float32"), seconds=None)
    found = {name: value for name, value in values_of(metrics.registry).items() if "_bytes_" in name}
    assert found == {
        'broker_fl_bytes_total{codec="topk+int4",direction="up"}': 120,
        'broker_fl_bytes_total{codec="other",direction="up"}': 7,
        'broker_fl_bytes_total{codec="topk+int8",direction="down"}': 500,
        'broker_fl_bytes_total{codec="float32",direction="down"}': 970,
    }


def test_only_frames_of_the_outbox_have_a_time_of_broadcasting():
    metrics = AggregatorMetrics()
    metrics.published(frame(), seconds=0.3)
    metrics.published(frame(), seconds=None)
    found = values_of(metrics.registry)
    assert (found["broker_fl_broadcast_seconds_count"], found["broker_fl_broadcast_seconds_sum"]) == (1, 0.3)


def test_version_and_lead_are_told_as_they_are():
    metrics = AggregatorMetrics()
    before = values_of(metrics.registry)
    assert math.isnan(before["broker_fl_version"])
    assert before["broker_fl_leading"] == 0
    metrics.leads(True)
    metrics.has_version(7)
    leading = values_of(metrics.registry)
    assert (leading["broker_fl_version"], leading["broker_fl_leading"]) == (7, 1)
    metrics.leads(False)
    assert values_of(metrics.registry)["broker_fl_leading"] == 0


def test_a_party_is_online_for_five_minutes_after_an_update_whatever_became_of_it():
    clock = Clock()
    metrics = AggregatorMetrics(clock=clock)

    def online():
        return values_of(metrics.registry)["broker_fl_parties_online"]

    assert online() == 0
    decided(
        metrics, facts(party="ann"), facts("refused", party="bob", reason="base"), facts("refused", party=None, reason="identity")
    )
    assert online() == 2
    clock.now += 200
    decided(metrics, facts("duplicate", party="ann"))
    assert online() == 2
    clock.now += 101
    assert online() == 1
    clock.now += 300
    assert online() == 0


def test_the_epsilon_of_a_party_is_the_last_one_that_was_told():
    metrics = AggregatorMetrics()
    decided(metrics, facts(party="ann", epsilon=0.5), facts(party="bob", epsilon=2.0), facts(party="cem"))
    decided(metrics, facts(party="ann", epsilon=0.75), facts("refused", party="ann", reason="privacy"))
    found = values_of(metrics.registry)
    epsilons = {name: value for name, value in found.items() if name.startswith("broker_fl_party_epsilon")}
    assert epsilons == {'broker_fl_party_epsilon{party="ann"}': 0.75, 'broker_fl_party_epsilon{party="bob"}': 2.0}


def test_names_of_parties_make_no_more_series_than_the_bound_and_what_is_left_out_is_counted():
    metrics = AggregatorMetrics(most_parties=3)
    for number in range(10):
        decided(metrics, facts(party=f"p{number}", epsilon=1.0))
    # Who is known is told on.
    decided(metrics, facts(party="p1", epsilon=9.0))
    found = values_of(metrics.registry)
    epsilons = {name: value for name, value in found.items() if name.startswith("broker_fl_party_epsilon")}
    assert len(epsilons) == 3
    assert epsilons['broker_fl_party_epsilon{party="p1"}'] == 9.0
    assert found["broker_fl_parties_online"] == 3
    assert found["broker_fl_parties_left_out_total"] == 7
    assert found['broker_fl_updates_total{outcome="merged"}'] == 11


def test_whatever_parties_say_the_number_of_series_is_bounded():
    metrics = AggregatorMetrics()
    generator = random.Random(6)
    quantizers = [f"{kind}:{argument}" for kind, entry in QUANTIZERS.items() for argument in entry.arguments or ()]
    quantizers += [kind for kind, entry in QUANTIZERS.items() if entry.arguments is None]
    for number in range(2 * MOST_PARTIES):
        valid = f"{generator.choice(list(SPARSIFIERS))}:{generator.random():.4f}1+{generator.choice(quantizers)}"
        noise = "".join(generator.choices('abc:+.{}"\\\n\0é', k=generator.randrange(64)))
        codec = generator.choice([valid, generator.choice(quantizers), noise, "topk:1e-9999+int4"])
        outcome, reason = generator.choice(
            [("merged", None), ("duplicate", None), ("refused", generator.choice(get_args(Reason)))]
        )
        decided(metrics, facts(outcome, party=f"p{number}", codec=codec, reason=reason, epsilon=1.0))
    names = list(values_of(metrics.registry))
    codecs = (len(SPARSIFIERS) + 1) * len(QUANTIZERS) + 1
    assert sum(name.startswith("broker_fl_bytes_total") for name in names) <= codecs
    assert sum(name.startswith("broker_fl_party_epsilon") for name in names) == MOST_PARTIES
    assert len(names) < MOST_PARTIES + codecs + 200


@pytest.mark.parametrize(
    ("codec", "label"),
    [
        ("float32", "float32"),
        ("topk:0.01+int4", "topk+int4"),
        ("topk-per-tensor:0.5+qsgd:16", "topk-per-tensor+qsgd"),
        ("threshold:0.001+sign", "threshold+sign"),
        ("eden:2", "eden"),
        ("", OTHER),
        ("gzip", OTHER),
        ("topk+int4", OTHER),
        ("topk:0.01", OTHER),
        ("eden:99", OTHER),
        ("x" * 10_000, OTHER),
    ],
)
def test_a_codec_is_labelled_without_its_numbers(codec, label):
    assert codec_label(codec) == label


# The worker and the evaluator


def test_what_a_worker_tells_is_counted():
    metrics = WorkerMetrics()
    before = values_of(metrics.registry)
    assert math.isnan(before["broker_fl_worker_version"])
    assert math.isnan(before["broker_fl_worker_epsilon"])
    metrics.connected(True)
    metrics.has_version(12)
    metrics.read("topk:0.05+int8", 300)
    metrics.read("", 5)
    metrics.trained(2.0)
    metrics.trained(0.5)
    metrics.sent("topk:0.01+int4", 40)
    metrics.sent("topk:0.01+int4", 40)
    for outcome in ("merged", "merged", "refused"):
        metrics.settled(
            Receipt(federation="f", party="p", update_id="0" * 32, outcome=outcome, version=1, staleness=0, weight=0.0)
        )
    metrics.has_unsettled(2)
    metrics.has_spent(1.5)
    found = {name: value for name, value in values_of(metrics.registry).items() if "_bucket" not in name}
    assert found == {
        "broker_fl_worker_version": 12,
        "broker_fl_worker_trainings_total": 2,
        "broker_fl_worker_training_seconds_count": 2,
        "broker_fl_worker_training_seconds_sum": 2.5,
        'broker_fl_worker_updates_total{outcome="merged"}': 2,
        'broker_fl_worker_updates_total{outcome="buffered"}': 0,
        'broker_fl_worker_updates_total{outcome="refused"}': 1,
        'broker_fl_bytes_total{codec="topk+int8",direction="down"}': 300,
        'broker_fl_bytes_total{codec="other",direction="down"}': 5,
        'broker_fl_bytes_total{codec="topk+int4",direction="up"}': 80,
        "broker_fl_worker_epsilon": 1.5,
        "broker_fl_worker_unsettled_updates": 2,
        "broker_fl_worker_connected": 1,
    }
    metrics.connected(False)
    assert values_of(metrics.registry)["broker_fl_worker_connected"] == 0


def test_what_an_evaluator_tells_is_counted():
    metrics = EvaluatorMetrics()
    assert math.isnan(values_of(metrics.registry)["broker_fl_accuracy"])
    metrics.evaluated(3, Score(accuracy=0.5, loss=1.25, count=10), seconds=0.75)
    # A clock that went back.
    metrics.evaluated(4, Score(accuracy=0.75, loss=0.5, count=10), seconds=-1.0)
    found = {name: value for name, value in values_of(metrics.registry).items() if "_bucket" not in name}
    assert found == {
        "broker_fl_evaluated_version": 4,
        "broker_fl_accuracy": 0.75,
        "broker_fl_loss": 0.5,
        "broker_fl_evaluation_seconds_count": 2,
        "broker_fl_evaluation_seconds_sum": 0.75,
    }


# All of them


def test_services_in_one_process_share_nothing():
    one, other = AggregatorMetrics(), AggregatorMetrics()
    decided(one, facts())
    assert values_of(other.registry)['broker_fl_updates_total{outcome="merged"}'] == 0


def test_every_series_is_ours_and_named_by_its_unit():
    assert all(name.startswith("broker_fl_") for name in METRIC_NAMES)
    assert "broker_fl_commit_seconds_bucket" in METRIC_NAMES
    shared = series_of(REGISTRIES["aggregator"]) & series_of(REGISTRIES["worker"])
    assert shared == {"broker_fl_bytes_total"}
    assert not series_of(REGISTRIES["evaluator"]) & (series_of(REGISTRIES["aggregator"]) | series_of(REGISTRIES["worker"]))


@pytest.mark.parametrize(
    ("quiet", "counting"),
    [(UnobservedAggregator, AggregatorMetrics), (UnobservedWorker, WorkerMetrics)],
    ids=["aggregator", "worker"],
)
def test_who_does_not_count_is_told_the_same(quiet, counting):
    told = {name for name in vars(quiet) if not name.startswith("_")}
    assert told == {name for name in vars(counting) if not name.startswith("_")}
