import pytest

from benchmarks.bounds import COMPLETED_OF, PREFETCH, late_growth, measure

HALF_SENT, QUEUED, SLOW = 20, 600, 800
PARTS = 4
"""Of an update of 256 kB."""

GENEROUS_MB = 150
"""Twice what 64 updates of 256 kB take, decoded and on their way into the ledger."""


def test_late_growth_compares_the_two_halves_of_the_time():
    assert late_growth([(0.0, 10.0), (1.0, 30.0), (2.0, 20.0), (9.0, 34.0), (10.0, 12.0)]) == 4.0
    assert late_growth([(0.0, 10.0)]) == 0.0
    assert late_growth([(0.0, 10.0), (4.0, 30.0), (10.0, 20.0)]) == -10.0


@pytest.mark.system
@pytest.mark.rabbitmq
async def test_half_sent_updates_wait_on_the_disk_and_a_tenth_of_them_is_completed(rabbitmq):
    (row,) = await measure(rabbitmq, half_sent_updates=HALF_SENT, queued_updates=0, slow_updates=0, slow_s=0)
    assert row.messages == (PARTS - 1) * HALF_SENT + HALF_SENT // COMPLETED_OF
    assert row.bytes_sent > HALF_SENT * (PARTS - 1) * 65_536
    assert (row.left, row.growth_mb < GENEROUS_MB) == (0, True)
    assert row.most_unacknowledged <= PREFETCH


@pytest.mark.system
@pytest.mark.rabbitmq
async def test_queued_updates_are_all_decided_once(rabbitmq):
    (row,) = await measure(rabbitmq, half_sent_updates=0, queued_updates=QUEUED, slow_updates=0, slow_s=0)
    assert (row.messages, row.left, row.growth_mb < GENEROUS_MB) == (QUEUED, 0, True)
    assert row.most_unacknowledged <= PREFETCH


@pytest.mark.system
@pytest.mark.rabbitmq
async def test_what_a_slow_disk_cannot_take_waits_in_the_queue(rabbitmq):
    (row,) = await measure(rabbitmq, half_sent_updates=0, queued_updates=0, slow_updates=SLOW, slow_s=2.0)
    decided = round(row.decided_per_s * row.seconds)
    assert 0 < decided < SLOW
    assert SLOW - decided >= row.left > 0  # Some more are decided while the broker counts.
    assert 0 < row.most_unacknowledged <= PREFETCH
    assert row.growth_mb * 1e6 < row.bytes_sent, "what waits in the queue is not in memory"
