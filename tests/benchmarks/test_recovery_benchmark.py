import pytest

from benchmarks.codec import model
from benchmarks.recovery import FRAME_EVERY, GROUP, Row, State, fill, measure, recovered, verdict
from broker_fl.config import MergingSettings

MERGING = MergingSettings(max_staleness=FRAME_EVERY + GROUP)


def test_a_row_for_every_codec_says_what_was_recovered():
    rows = measure(["topk:0.05+int4", "int8"], parameters=20_000, updates=FRAME_EVERY + GROUP + 1, rounds=1)
    assert [(row.codec, row.parameters, row.updates) for row in rows] == [("topk:0.05+int4", 20_000, 126), ("int8", 20_000, 126)]
    for row in rows:
        assert 0 < row.recover_s < row.start_s
        assert row.update_ms == pytest.approx(1e3 * row.recover_s / 126)
        assert row.ledger_bytes > 0


def test_a_model_of_other_bits_is_not_taken(tmp_path):
    state = State(tmp_path, model(20_000))
    found = fill(state, codec="topk:0.05+int4", updates=3, merging=MERGING)
    recovered(state, expected=found)
    with pytest.raises(AssertionError, match="not the bits"):
        recovered(state, expected="0" * 64)


def test_the_goal_is_judged_by_the_whole_start():
    row = Row("topk:0.01+int4", 11_000_000, 1000, 1, recover_s=4.8, update_ms=4.8, start_s=5.1)
    assert verdict(row).startswith("FAILS:")
