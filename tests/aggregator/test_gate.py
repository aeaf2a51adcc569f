import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.gate import ANSWERED_AGAIN_PER_MINUTE, QUARANTINED_PER_MINUTE, Bucket, Gate


def gate(per_minute=60, *, part_bytes=1024, max_update_bytes=8192):
    return Gate(per_minute=per_minute, part_bytes=part_bytes, max_update_bytes=max_update_bytes)


def passed(one, party="ann", *, times, now, size=500, is_part=False):
    return sum(one.refused(party, size, is_part=is_part, now=now) is None for _ in range(times))


class TestBuckets:
    def test_as_many_as_a_minute_has_may_come_at_once_and_then_as_many_as_time_brings(self):
        bucket = Bucket(60)
        assert sum(bucket.take("ann", 1.0, now=100.0) for _ in range(100)) == 60
        assert not bucket.take("ann", 1.0, now=100.999)
        assert bucket.take("ann", 1.0, now=101.0)
        assert not bucket.take("ann", 1.0, now=101.0)
        assert sum(bucket.take("ann", 1.0, now=111.0) for _ in range(100)) == 10

    def test_a_pause_fills_it_and_no_more(self):
        bucket = Bucket(6)
        assert sum(bucket.take("ann", 1.0, now=0.0) for _ in range(10)) == 6
        assert sum(bucket.take("ann", 1.0, now=1e9) for _ in range(10)) == 6

    def test_what_is_refused_costs_nothing(self):
        bucket = Bucket(1)
        assert bucket.take("ann", 0.75, now=0.0)
        assert not bucket.take("ann", 0.5, now=0.0)
        assert bucket.take("ann", 0.25, now=0.0)

    def test_everyone_has_their_own(self):
        bucket = Bucket(1)
        assert [bucket.take(party, 1.0, now=0.0) for party in ("ann", "bob", "ann", "bob")] == [True, True, False, False]

    def test_a_clock_that_went_back_brings_nothing(self):
        bucket = Bucket(60)
        assert sum(bucket.take("ann", 1.0, now=1000.0) for _ in range(60)) == 60
        assert not bucket.take("ann", 1.0, now=10.0)
        assert not bucket.take("ann", 1.0, now=10.5)
        assert bucket.take("ann", 1.0, now=11.0)

    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from([0.1, 0.5, 1.0])), max_size=60), st.integers(1, 20))
    def test_no_more_passes_than_was_there_at_first_and_came_since(self, steps, per_minute):
        bucket, now, spent = Bucket(per_minute), 50.0, 0.0
        for pause, cost in steps:
            now += pause
            spent += cost if bucket.take("ann", cost, now=now) else 0.0
            assert spent <= per_minute + (now - 50.0) * per_minute / 60 + 1e-6


class TestGates:
    def test_what_is_over_a_partys_share_is_refused_and_told_how_much_that_is(self):
        one = gate(5)
        assert passed(one, times=5, now=0.0) == 5
        refused = one.refused("ann", 500, is_part=False, now=0.0)
        assert (refused.reason, refused.detail) == ("rate", "more than 5 updates a minute")
        assert one.refused("bob", 500, is_part=False, now=0.0) is None
        assert one.refused("ann", 500, is_part=False, now=12.0) is None

    def test_without_a_limit_anything_passes(self):
        assert passed(gate(0), times=10_000, now=0.0) == 10_000

    @pytest.mark.parametrize("size", [0, 500, 10_000, 1 << 30])
    def test_a_whole_message_costs_one_whatever_its_size(self, size):
        assert passed(gate(5), times=10, now=0.0, size=size) == 5

    def test_the_parts_of_the_largest_update_cost_what_one_whole_message_does(self):
        assert passed(gate(3), times=1000, now=0.0, size=1024, is_part=True) == 3 * 8

    def test_a_small_part_costs_as_much_as_one_of_the_usual_size(self):
        """Else many tiny ones would be a flood at no cost; the last one of an update is small, too."""
        assert passed(gate(3), times=1000, now=0.0, size=1, is_part=True) == 3 * 8

    def test_a_larger_part_costs_its_share_and_none_more_than_a_whole_message(self):
        assert passed(gate(3), times=1000, now=0.0, size=4096, is_part=True) == 3 * 2
        assert passed(gate(3), times=1000, now=0.0, size=1 << 30, is_part=True) == 3
        assert passed(gate(3, part_bytes=20_000), times=1000, now=0.0, size=1, is_part=True) == 3

    @pytest.mark.parametrize(("part_bytes", "max_update_bytes"), [(1 << 20, 65_536 + 4000), (1024, 1024), (1, 1)])
    def test_an_update_that_fits_one_part_is_one_message(self, part_bytes, max_update_bytes):
        one = gate(7, part_bytes=part_bytes, max_update_bytes=max_update_bytes)
        assert passed(one, times=100, now=0.0, size=math.ceil(max_update_bytes / 2), is_part=True) == 7

    def test_so_much_of_what_is_refused_of_each_is_kept(self):
        one = gate()
        assert sum(one.may_quarantine("ann", now=0.0) for _ in range(100)) == QUARANTINED_PER_MINUTE
        assert one.may_quarantine("bob", now=0.0)
        assert sum(one.may_quarantine("ann", now=30.0) for _ in range(100)) == QUARANTINED_PER_MINUTE / 2

    def test_so_many_receipts_of_each_are_sent_once_more_unless_there_is_no_limit_at_all(self):
        one = gate()
        assert sum(one.may_answer_again("ann", now=0.0) for _ in range(100)) == ANSWERED_AGAIN_PER_MINUTE
        assert one.may_answer_again("bob", now=0.0)
        assert sum(gate(0).may_answer_again("ann", now=0.0) for _ in range(1000)) == 1000

    def test_what_is_kept_costs_nothing_of_what_may_come(self):
        one = gate(5)
        for _ in range(50):
            one.may_quarantine("ann", now=0.0)
        assert passed(one, times=10, now=0.0) == 5
