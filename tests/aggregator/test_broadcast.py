from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.broadcast import Broadcast, BroadcastPlan, is_due, make_frame, received_model
from aggregator.ledger import FrameRow
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.parameters import digest, manifest_of
from schemas import wire
from schemas.frame import ModelFrame, TrainingPlan

MANIFEST = manifest_of({"weight": np.zeros((40, 50), np.float32), "bias": np.zeros(40, np.float32)})
MODEL = np.random.default_rng(2).normal(size=MANIFEST.size).astype(np.float32)
PLAN = BroadcastPlan(
    federation="hospitals",
    ledger_id="0123456789abcdef" * 2,
    manifest=MANIFEST,
    codec="float32",
    update_codec="topk:0.01+int4",
    training=TrainingPlan(steps=50),
    fraction=1.0,
    repeat=False,
    every_versions=5,
    every_s=10.0,
)
CODECS = ["float32", "bfloat16", "int8"]


def _frame(codec: str = "float32", *, version: int = 7, number: int = 3, over: bool = False) -> Broadcast:
    return make_frame(replace(PLAN, codec=codec), MODEL, version=version, number=number, over=over, at=100.0)


def _opened(broadcast: Broadcast) -> ModelFrame:
    return wire.decode(ModelFrame, broadcast.row.body)


@pytest.mark.parametrize("codec", CODECS)
def test_a_frame_decodes_to_the_model_of_its_digest(codec):
    broadcast = _frame(codec)
    frame = _opened(broadcast)
    received = decode(frame.payload, parse_codec(frame.codec), manifest=frame.manifest).dense()
    assert digest(received) == frame.digest == broadcast.row.digest
    assert received.tobytes() == broadcast.model.tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_a_version_always_decodes_to_the_same_bits(codec):
    first, again = _frame(codec), _frame(codec, number=9)
    assert first.model.tobytes() == again.model.tobytes()
    assert first.row.digest == again.row.digest
    assert received_model(MODEL, codec, version=7, manifest=MANIFEST).tobytes() == first.model.tobytes()


def test_another_version_of_the_same_model_is_rounded_anew():
    assert _frame("int8", version=7).row.digest != _frame("int8", version=8).row.digest
    assert _frame("float32", version=7).row.digest == _frame("float32", version=8).row.digest


def test_a_frame_says_all_that_a_worker_needs():
    frame = _opened(_frame(version=7, number=3, over=True))
    assert frame == ModelFrame(
        federation="hospitals",
        ledger=PLAN.ledger_id,
        number=3,
        version=7,
        digest=digest(MODEL),
        manifest=MANIFEST,
        codec="float32",
        training=TrainingPlan(steps=50),
        update_codec="topk:0.01+int4",
        fraction=1.0,
        repeat=False,
        over=True,
        payload=MODEL.tobytes(),
    )


def test_the_ledgers_row_tells_what_was_sent_and_what_it_was_made_from():
    broadcast = _frame("int8")
    row = broadcast.row
    assert (row.number, row.version, row.at, row.over, row.codec) == (3, 7, 100.0, False, "int8")
    assert row.size == len(row.body)
    assert row.model_digest == digest(MODEL)
    assert row.digest == digest(broadcast.model)
    assert row.published_at is None


def test_making_a_frame_does_not_change_the_model_nor_share_its_memory():
    kept = MODEL.copy()
    broadcast = _frame()
    assert MODEL.tobytes() == kept.tobytes()
    assert not np.shares_memory(broadcast.model, MODEL)


def _last(*, version: int = 10, at: float = 100.0, published: bool = True) -> FrameRow:
    row = _frame(version=version).row
    return replace(row, at=at, published_at=at + 0.1 if published else None)


def test_the_first_frame_is_due_at_once():
    assert is_due(PLAN, None, version=0, now=0.0)


@pytest.mark.parametrize(
    ("version", "now", "due"),
    [
        (11, 100.5, False),
        (14, 100.5, False),
        (15, 100.5, True),
        (40, 100.5, True),
        (11, 109.9, False),
        (11, 110.0, True),
        (10, 110.0, False),
        (10, 1e9, False),
    ],
)
def test_a_frame_is_due_after_enough_merges_or_enough_time(version, now, due):
    assert is_due(PLAN, _last(), version=version, now=now) is due


def test_no_frame_is_due_while_the_last_one_waits_to_be_published():
    for version, now in ((10, 1e9), (15, 100.5), (1000, 1e9)):
        assert not is_due(PLAN, _last(published=False), version=version, now=now)


@pytest.mark.parametrize(
    ("every_s", "now", "due"), [(1.0, 104.9, False), (1.0, 105.0, True), (20.0, 119.0, False), (20.0, 120.0, True)]
)
def test_a_version_is_broadcast_again_where_only_some_parties_train_from_a_frame(every_s, now, due):
    some = replace(PLAN, fraction=0.2, every_s=every_s)
    assert is_due(some, _last(), version=10, now=now) is due
    assert not is_due(replace(some, fraction=1.0), _last(), version=10, now=now)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(version=st.integers(10, 100), seconds=st.floats(0, 100), more=st.integers(0, 10), longer=st.floats(0, 50))
def test_what_is_due_stays_due(version, seconds, more, longer):
    last = _last()
    if is_due(PLAN, last, version=version, now=100 + seconds):
        assert is_due(PLAN, last, version=version + more, now=100 + seconds + longer)
