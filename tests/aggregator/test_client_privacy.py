"""What each party's part in the models has cost it, under client-level differential privacy."""

import pytest
from structlog.testing import capture_logs

from aggregator.client_privacy import WARNING, spent_as_clients
from aggregator.compaction import compact
from aggregator.history import roll_back
from broker_fl.config import MergingSettings


def _merging(noise_multiplier, strategy="fedbuff"):
    clip_norm = None if noise_multiplier is None else 1.0
    return MergingSettings(strategy=strategy, buffer_size=2, clip_norm=clip_norm, noise_multiplier=noise_multiplier)


def _live(bench, *parties, noise=0.5, strategy="fedbuff", is_stopped=True):
    """One update of each, from the newest frame."""
    with bench.opened(merging=_merging(noise, strategy)) as coordinator:
        for party in parties:
            coordinator.decide([bench.arrival(bench.update(party, base=bench.frames()[-1]))])
            bench.publish(coordinator)
        if is_stopped:
            coordinator.close()


def _wait(bench, noise=0.5):
    """Until the buffer is merged early."""
    with bench.opened(merging=_merging(noise)) as coordinator:
        bench.clock.now += 100.0
        coordinator.tick()
        bench.publish(coordinator)


def _spent(bench):
    with bench.ledger() as ledger:
        return spent_as_clients(ledger)


@pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
def test_party_pays_for_each_merge_that_it_had_a_part_in(bench, strategy):
    _live(bench, "ann", "bob", "ann", "cem", "bob", "ann", strategy=strategy)
    assert _spent(bench) == {"ann": {(0.5, 1.0): 3}, "bob": {(0.5, 1.0): 2}, "cem": {(0.5, 1.0): 1}}


def test_nobody_pays_before_the_merge(bench):
    _live(bench, "ann")
    assert _spent(bench) == {}
    _wait(bench)
    assert _spent(bench) == {"ann": {(0.5, 1.0): 1}}


def test_update_that_was_refused_costs_nothing(bench):
    _live(bench, "ann", "ann", "bob")
    decided = [(entry.outcome, entry.reason) for entry in bench.entries()[1:]]
    assert decided == [("buffered", None), ("refused", "repeated"), ("merged", None)]
    assert _spent(bench) == {"ann": {(0.5, 1.0): 1}, "bob": {(0.5, 1.0): 1}}


def test_buffer_that_a_rollback_dropped_costs_nothing_and_what_it_went_back_from_does(bench):
    _live(bench, "ann", "bob", "cem")
    with bench.ledger() as ledger:
        assert roll_back(ledger, bench.snapshots(), to=0, holder="an operator", at=7.0).dropped == 1
    _live(bench, "ann", "cem")
    assert _spent(bench) == {"ann": {(0.5, 1.0): 2}, "bob": {(0.5, 1.0): 1}, "cem": {(0.5, 1.0): 1}}


def test_buffer_is_charged_by_the_noise_that_it_was_merged_with(bench):
    _live(bench, "ann", "bob", "ann", noise=0.5)
    _live(bench, "bob", "ann", noise=2.0)
    assert _spent(bench) == {"ann": {(0.5, 1.0): 2, (2.0, 1.0): 1}, "bob": {(0.5, 1.0): 1, (2.0, 1.0): 1}}


@pytest.mark.parametrize("noises", [(0.5, None), (None, 0.5)])
def test_party_that_went_into_a_model_without_noise_is_not_hidden_by_any(bench, noises):
    for noise, parties in zip(noises, (("ann", "bob"), ("ann", "bob")), strict=True):
        _live(bench, *parties, noise=noise)
    _live(bench, "cem", "dan")
    assert _spent(bench) == {"ann": None, "bob": None, "cem": {(0.5, 1.0): 1}, "dan": {(0.5, 1.0): 1}}


def test_without_any_noise_nothing_is_counted(bench):
    _live(bench, "ann", "bob", noise=None)
    assert _spent(bench) == {}


def test_cost_is_the_same_after_compaction(bench):
    _live(bench, "ann", "bob", "ann", "cem", "bob")
    before = _spent(bench)
    with bench.ledger() as ledger:
        assert compact(ledger, bench.snapshots(), keep=0).payloads == 5
    assert _spent(bench) == before == {"ann": {(0.5, 1.0): 2}, "bob": {(0.5, 1.0): 1}, "cem": {(0.5, 1.0): 1}}


@pytest.mark.parametrize("noise", [None, 0.5])
def test_aggregator_says_at_each_start_what_such_noise_is_good_for(bench, noise):
    with capture_logs() as logs:
        _live(bench, noise=noise)
    assert [line["warning"] for line in logs if "warning" in line] == ([] if noise is None else [WARNING])
