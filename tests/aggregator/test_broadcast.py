from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.broadcast import (
    BroadcastPlan,
    Held,
    announcement,
    exact_keyframe,
    is_due,
    keyframe_is_due,
    make_frame,
    plan_digest,
)
from aggregator.records import FrameRow
from broker_fl.codecs.chain import change, rounded, whole_model
from broker_fl.errors import ConfigurationError
from broker_fl.parameters import digest, fingerprint, manifest_of
from schemas import wire
from schemas.frame import KeyframePlace, ModelFrame, Plan, TrainingPlan

MANIFEST = manifest_of({"weight": np.zeros((40, 50), np.float32), "bias": np.zeros(40, np.float32)})
PLAN = BroadcastPlan(
    federation="hospitals",
    ledger_id="0123456789abcdef" * 2,
    manifest=MANIFEST,
    down="topk:0.05+int8",
    keyframe="float32",
    keyframe_every_frames=100,
    up="topk:0.01+int4",
    warm_up_versions=0,
    warm_up_density=0.25,
    momentum_correction=0.0,
    training=TrainingPlan(steps=50),
    fraction=1.0,
    repeat=False,
    every_versions=5,
    every_s=10.0,
)
DOWN = ["float32", "int8", "int4", "topk:0.05+int8", "topk:0.01+float32"]
KEYFRAMES = ["float32", "float16", "bfloat16", "int8"]


def _model(version: int) -> np.ndarray:
    """A model that walks about, a little with each version."""
    generator = np.random.default_rng(2)
    start = generator.normal(size=MANIFEST.size)
    steps = 0.01 * generator.normal(size=(64, MANIFEST.size))
    return (start + steps[:version].sum(axis=0)).astype(np.float32)


def _first(plan: BroadcastPlan = PLAN) -> tuple[FrameRow, Held]:
    return make_frame(plan, None, _model(0), version=0, over=False, at=100.0)


def _next(
    held: Held, *, version: int, plan: BroadcastPlan = PLAN, over: bool = False, at: float = 101.0
) -> tuple[FrameRow, Held]:
    return make_frame(plan, held, _model(version), version=version, over=over, at=at)


def _chain(*versions: int, plan: BroadcastPlan = PLAN) -> tuple[list[FrameRow], Held]:
    """Frames of version 0 and of these."""
    row, held = _first(plan)
    rows = [row]
    for version in versions:
        row, held = _next(held, version=version, plan=plan)
        rows.append(row)
    return rows, held


def _opened(row: FrameRow) -> ModelFrame:
    return wire.decode(ModelFrame, row.body)


def _whole(row: FrameRow) -> ModelFrame:
    return wire.decode(ModelFrame, row.keyframe)


def _payload(row: FrameRow) -> bytes:
    return _opened(row).payload


# The first frame


@pytest.mark.parametrize("keyframe", KEYFRAMES)
def test_the_first_frame_announces_a_keyframe_of_the_rounded_model(keyframe):
    row, held = _first(replace(PLAN, keyframe=keyframe))
    announced, whole = _opened(row), _whole(row)
    assert (announced.number, announced.base, announced.payload) == (1, None, b"")
    assert announced.rounding == (None if keyframe == "float32" else keyframe)
    assert whole.model_copy(update={"payload": b""}) == announced
    payload, model = rounded(_model(0), keyframe, manifest=MANIFEST)
    assert (whole.payload, whole.codec) == (payload, keyframe)
    assert whole_model(whole, manifest=MANIFEST).tobytes() == model.tobytes() == held.model.tobytes()
    assert announced.digest == row.digest == digest(model)
    assert announced.keyframe == KeyframePlace(number=1, bytes=len(payload), log_bytes=0)
    assert row.model_digest == fingerprint(_model(0))


def test_the_first_frame_says_all_that_a_newcomer_needs():
    frame = _opened(_first()[0])
    assert (frame.federation, frame.ledger, frame.version, frame.over) == ("hospitals", PLAN.ledger_id, 0, False)
    assert frame.manifest == MANIFEST
    assert frame.plan == Plan(training=TrainingPlan(steps=50), update_codec="topk:0.01+int4", fraction=1.0, repeat=False)


# Changes


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    down=st.sampled_from(DOWN),
    keyframe=st.sampled_from(KEYFRAMES),
    every=st.integers(1, 5),
    steps=st.lists(st.integers(0, 3), min_size=1, max_size=12),
)
def test_a_follower_computes_the_very_bits_of_every_frame(down, keyframe, every, steps):
    plan = replace(PLAN, down=down, keyframe=keyframe, keyframe_every_frames=every)
    row, held = _first(plan)
    followed = whole_model(_whole(row), manifest=MANIFEST)
    version = bodies = 0
    newest = _opened(row).keyframe
    for step in steps:
        version += step
        row, held = _next(held, version=version, plan=plan)
        frame = _opened(row)
        change(followed, frame, manifest=MANIFEST)
        assert followed.tobytes() == held.model.tobytes()
        assert digest(followed) == frame.digest == row.digest
        assert frame.log_bytes == bodies + len(frame.payload)
        bodies += len(row.body)
        assert row.log_bytes == bodies
        if row.keyframe is not None:
            whole = _whole(row)
            newest = KeyframePlace(number=frame.number, bytes=len(whole.payload), log_bytes=frame.log_bytes)
            assert whole_model(whole, manifest=MANIFEST).tobytes() == followed.tobytes()
            assert (whole.base, whole.number, whole.version, whole.digest) == (None, frame.number, version, frame.digest)
            assert (whole.keyframe, whole.log_bytes) == (newest, frame.log_bytes)
            assert (whole.manifest, whole.plan) == (MANIFEST, plan.at(version))
        assert frame.keyframe == held.keyframe == newest
        # A repeat changes nothing: its keyframe is exact.
        rounds = row.keyframe is not None and keyframe != "float32" and step > 0
        assert frame.rounding == (keyframe if rounds else None)


def test_a_change_names_its_base_and_leaves_out_what_its_receiver_knows():
    frame = _opened(_chain(3)[0][1])
    assert (frame.number, frame.base, frame.version, frame.codec) == (2, 1, 3, "topk:0.05+int8")
    assert (frame.manifest, frame.plan, frame.rounding) == (None, None, None)


def test_the_same_frame_is_made_twice_and_another_number_draws_another_rounding():
    _, held = _chain(1)
    assert _next(held, version=2)[0] == _next(held, version=2)[0]
    later = replace(held, frame=replace(held.frame, number=17))
    assert _payload(_next(held, version=2)[0]) != _payload(_next(later, version=2)[0])


def test_what_a_change_leaves_out_comes_with_later_ones():
    """The server's residual is the difference itself: with a model that stays, it vanishes."""
    _, held = _first()
    missing = []
    for version in range(1, 40):
        _, held = make_frame(PLAN, held, _model(20), version=version, over=False, at=1.0)
        missing.append(float(np.abs(_model(20) - held.model).max()))
    assert missing[0] > 0.02
    assert missing[-1] < 1e-4


def test_making_a_frame_does_not_change_the_model_nor_what_was_held():
    model = _model(1)
    kept = model.copy()
    _, held = _first()
    before = held.model.copy()
    _, after = make_frame(PLAN, held, model, version=1, over=False, at=1.0)
    assert model.tobytes() == kept.tobytes()
    assert held.model.tobytes() == before.tobytes()
    assert not np.shares_memory(after.model, held.model)
    assert not np.shares_memory(after.model, model)


def test_the_ledgers_row_tells_what_was_sent_and_what_it_was_made_from():
    rows, held = _chain(2, plan=replace(PLAN, keyframe="int8", keyframe_every_frames=1))
    row = rows[1]
    assert (row.number, row.base, row.version, row.at, row.over) == (2, 1, 2, 101.0, False)
    assert (row.codec, row.rounding, row.keyframe_codec) == ("topk:0.05+int8", "int8", "int8")
    assert (row.size, row.keyframe_size) == (len(row.body), len(row.keyframe))
    assert (row.model_digest, row.digest) == (fingerprint(_model(2)), digest(held.model))
    assert row.plan == plan_digest(PLAN.at(2))
    assert row.published_at is None
    assert held.frame == replace(row, body=None, keyframe=None)


# Frames that repeat a version


@pytest.mark.parametrize("keyframe", KEYFRAMES)
def test_a_repeated_version_is_an_empty_change_to_the_same_bits(keyframe):
    # A keyframe would be due, but to round would change the version's bits.
    plan = replace(PLAN, keyframe=keyframe, keyframe_every_frames=1)
    rows, held = _chain(3, plan=plan)
    row, after = _next(held, version=3, plan=plan, over=True)
    frame = _opened(row)
    assert (frame.number, frame.base, frame.payload, frame.rounding, frame.over) == (3, 2, b"", None, True)
    assert frame.digest == rows[1].digest
    assert (row.keyframe, frame.log_bytes) == (None, rows[1].log_bytes)
    assert row.model_digest == rows[1].model_digest
    assert after.model is held.model
    assert _next(after, version=4, plan=plan)[0].keyframe is not None


# Keyframes


def test_a_keyframe_comes_after_so_many_frames():
    rows, _ = _chain(*range(1, 10), plan=replace(PLAN, keyframe_every_frames=4))
    assert [row.number for row in rows if row.keyframe is not None] == [1, 5, 9]


def test_a_keyframe_comes_when_the_changes_cost_more_than_one():
    # A dense change costs as much as a keyframe, and its header: every second frame is one.
    rows, _ = _chain(*range(1, 8), plan=replace(PLAN, down="float32"))
    assert [row.number for row in rows if row.keyframe is not None] == [1, 3, 5, 7]
    rows, _ = _chain(*range(1, 12), plan=replace(PLAN, down="int8"))
    dear = [row.number for row in rows if row.keyframe is not None]
    spent = [row.log_bytes for row in rows]
    for earlier, later in pairwise(dear):
        bound = _whole(rows[later - 1]).keyframe.bytes
        assert spent[later - 2] - _whole(rows[earlier - 1]).log_bytes > bound
        assert spent[later - 3] - _whole(rows[earlier - 1]).log_bytes <= bound
    assert len(dear) > 2


def test_a_keyframe_that_was_due_at_a_repeat_comes_with_the_next_change():
    plan = replace(PLAN, keyframe_every_frames=2)
    rows, _ = _chain(1, 1, 1, 2, 3, plan=plan)
    assert [row.number for row in rows if row.keyframe is not None] == [1, 5]


@pytest.mark.parametrize("keyframe", KEYFRAMES)
def test_repeats_that_cost_more_than_a_model_come_with_one_to_the_last_bit(keyframe):
    plan = replace(PLAN, keyframe=keyframe)
    rows, held = _chain(1, *[1] * 60, plan=plan)
    whole = [row for row in rows[1:] if row.keyframe is not None]
    assert whole
    for row in whole:
        frame, standing = _opened(row), _whole(row)
        assert (frame.payload, frame.rounding, frame.digest) == (b"", None, rows[1].digest)
        assert whole_model(standing, manifest=MANIFEST).tobytes() == held.model.tobytes()
        assert frame.keyframe == standing.keyframe
        assert (frame.keyframe.number, frame.keyframe.bytes) == (row.number, len(standing.payload))
        assert (row.keyframe_codec, row.keyframe_size) == (standing.codec, len(row.keyframe))
    for earlier, later in pairwise([rows[0], *whole]):
        assert rows[later.number - 2].log_bytes - _whole(earlier).log_bytes > _whole(earlier).keyframe.bytes
        assert rows[later.number - 3].log_bytes - _whole(earlier).log_bytes <= _whole(earlier).keyframe.bytes


def test_another_codec_of_the_settings_takes_effect_at_the_next_frame():
    _, held = _chain(1, plan=replace(PLAN, keyframe_every_frames=2))
    row, _ = _next(held, version=2, plan=replace(PLAN, down="int4", keyframe="bfloat16", keyframe_every_frames=2))
    assert (row.codec, row.rounding, row.keyframe_codec) == ("int4", "bfloat16", "bfloat16")


@pytest.mark.parametrize("codec", KEYFRAMES)
def test_an_exact_keyframe_holds_what_the_receivers_hold_to_the_last_bit(codec):
    plan = replace(PLAN, keyframe=codec)
    rows, held = _chain(1, 2, plan=plan)
    row, after = exact_keyframe(plan, held, body=rows[-1].body)
    whole, delta = _whole(row), _opened(rows[-1])
    # Something between was added: no lossy codec holds it.
    assert whole.codec == row.keyframe_codec == "float32"
    assert whole_model(whole, manifest=MANIFEST).tobytes() == held.model.tobytes() == after.model.tobytes()
    assert (whole.base, whole.number, whole.version, whole.digest) == (None, 3, 2, delta.digest)
    assert whole.log_bytes == delta.log_bytes
    assert whole.keyframe == after.keyframe == KeyframePlace(number=3, bytes=4 * MANIFEST.size, log_bytes=delta.log_bytes)
    assert not keyframe_is_due(replace(plan, keyframe_every_frames=2), after)
    assert _opened(_next(after, version=3, plan=plan)[0]).keyframe == after.keyframe


@pytest.mark.parametrize("codec", ["float16", "bfloat16"])
def test_an_exact_keyframe_is_in_the_plans_codec_where_that_loses_nothing(codec):
    plan = replace(PLAN, keyframe=codec)
    row, held = _first(plan)
    again, _ = exact_keyframe(plan, held, body=row.body)
    assert again.keyframe_codec == codec
    assert again.keyframe == row.keyframe


def test_an_announcement_is_its_keyframe_without_the_model():
    rows, _ = _chain(1, 2, plan=replace(PLAN, keyframe_every_frames=1))
    announced = wire.decode(ModelFrame, announcement(rows[2].keyframe))
    assert announced == _whole(rows[2]).model_copy(update={"payload": b""})
    assert (announced.number, announced.base) == (3, None)


# The plan


def test_a_plan_is_said_where_it_differs_from_the_frame_before():
    _, held = _chain(1)
    other = replace(PLAN, training=TrainingPlan(steps=9))
    row, held = _next(held, version=2, plan=other)
    assert _opened(row).plan == other.at(2)
    row, held = _next(held, version=3, plan=other)
    assert _opened(row).plan is None
    row, _ = _next(held, version=3)
    assert _opened(row).plan == PLAN.at(3)


def test_a_warm_up_makes_the_plan_of_each_version_until_it_is_over():
    plan = replace(PLAN, warm_up_versions=3)
    rows, _ = _chain(1, 1, 2, 3, 4, plan=plan)
    said = [frame.plan and frame.plan.update_codec for frame in map(_opened, rows)]
    assert said[0] == "topk:0.25+int4"
    # The repeated version has the same plan.
    assert said[2] is None
    densities = [float(codec.removeprefix("topk:").removesuffix("+int4")) for codec in said if codec]
    assert densities == sorted(densities, reverse=True)
    assert said[4:] == ["topk:0.01+int4", None]
    assert plan.at(3) == plan.at(300) == PLAN.at(0)


def test_changes_warm_up_too_where_their_codec_has_a_density():
    rows, _ = _chain(1, 2, 3, plan=replace(PLAN, warm_up_versions=3))
    densities = [float(row.codec.removeprefix("topk:").removesuffix("+int8")) for row in rows[1:]]
    assert 0.25 > densities[0] > densities[1] > densities[2] == 0.05
    assert [_opened(row).codec for row in rows] == [row.codec for row in rows]
    assert replace(PLAN, down="int8", warm_up_versions=3).down_at(0).name == "int8"


def test_a_codec_that_cannot_warm_up_is_a_mistake_in_the_settings():
    with pytest.raises(ConfigurationError, match="int8"):
        replace(PLAN, up="int8", warm_up_versions=3).at(0)
    assert replace(PLAN, up="int8").at(0).update_codec == "int8"


def test_momentum_correction_rides_in_the_plan():
    assert replace(PLAN, momentum_correction=0.9).at(5).momentum_correction == 0.9


# When


def _last(*, version: int = 10, at: float = 100.0, published: bool = True, plan: BroadcastPlan = PLAN) -> FrameRow:
    row = _chain(version, plan=plan)[0][-1]
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
    assert is_due(some, _last(plan=some), version=10, now=now) is due
    assert not is_due(replace(some, fraction=1.0), _last(), version=10, now=now)


def test_a_frame_is_due_when_the_plan_changed_and_the_last_one_is_out():
    other = replace(PLAN, training=TrainingPlan(steps=9))
    assert is_due(other, _last(), version=10, now=100.2)
    assert not is_due(other, _last(published=False), version=10, now=100.2)
    warming_up = replace(PLAN, warm_up_versions=50)
    last = replace(_last(), plan=plan_digest(warming_up.at(10)))
    assert not is_due(warming_up, last, version=10, now=1e9)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(version=st.integers(10, 100), seconds=st.floats(0, 100), more=st.integers(0, 10), longer=st.floats(0, 50))
def test_what_is_due_stays_due(version, seconds, more, longer):
    last = _last()
    if is_due(PLAN, last, version=version, now=100 + seconds):
        assert is_due(PLAN, last, version=version + more, now=100 + seconds + longer)
