import pytest

from benchmarks.catch_up import BEHIND, KEYFRAME_EVERY, last_number, row_of, way_of
from schemas.frame import KeyframePlace, ModelFrame

NEWEST = ModelFrame(
    federation="bench",
    ledger="0" * 32,
    number=151,
    base=150,
    version=150,
    digest="0" * 64,
    codec="int4",
    keyframe=KeyframePlace(number=101, bytes=8000, log_bytes=10_000),
    log_bytes=15_000,
    over=False,
    payload=b"",
)


@pytest.mark.parametrize("behind", [1, 99, 100, 101, *BEHIND])
def test_the_last_keyframe_is_half_way_back_from_the_last_frame(behind):
    last = last_number(behind)
    assert last > behind
    assert (last - 1) % KEYFRAME_EVERY == KEYFRAME_EVERY // 2


def test_a_keyframe_is_taken_by_its_price_or_because_the_log_is_too_short():
    assert way_of(None, NEWEST, keyframes=0, oldest=1) == "deltas"
    assert way_of(None, NEWEST, keyframes=1, oldest=1) == "keyframe"
    cheap = NEWEST.model_copy(update={"keyframe": KeyframePlace(number=101, bytes=10_000, log_bytes=10_000)})
    assert way_of(None, cheap, keyframes=1, oldest=2) == "keyframe: deltas gone"
    assert way_of(None, cheap, keyframes=1, oldest=1) == "keyframe: against its price"


def test_a_row_puts_what_was_read_beside_what_the_ways_cost():
    counts = {"bytes_down": 14_000, "frames_received": 60, "keyframes_received": 1}
    row = row_of("newcomer", None, NEWEST, counts=counts, seconds=0.5, oldest=1, dense=28_000)
    assert (row.behind, row.way, row.frames, row.keyframes, row.seconds) == ("newcomer", "keyframe", 60, 1, 0.5)
    assert (row.bytes, row.delta_way_bytes, row.keyframe_way_bytes, row.of_dense) == (14_000, 15_000, 13_000, 0.5)
