import numpy as np
import pytest
from codec_samples import MIXED, decoded, encoded, vector

from broker_fl.codecs.chain import change, rounded, whole_model
from broker_fl.errors import DecodeError
from schemas.frame import KeyframePlace, ModelFrame, Plan, TrainingPlan

LOSSY = ["float16", "bfloat16", "int8"]
PLAN = Plan(training=TrainingPlan(), update_codec="int8", fraction=1.0, repeat=False)


def _frame(payload: bytes, codec: str = "topk:0.02+int4", **changes) -> ModelFrame:
    fields = {"number": 2, "base": 1} | changes
    return ModelFrame(
        federation="hospitals",
        ledger="0" * 32,
        version=1,
        digest="0" * 64,
        codec=codec,
        keyframe=KeyframePlace(number=1, bytes=1, log_bytes=0),
        log_bytes=0,
        over=False,
        payload=payload,
        **fields,
    )


def _changed(model: np.ndarray, frame: ModelFrame) -> np.ndarray:
    changed = model.copy()
    change(changed, frame, manifest=MIXED)
    return changed


@pytest.mark.parametrize("codec", ["float32", "int8", "topk:0.02+int4"])
def test_a_change_adds_its_payload(codec):
    model, payload = vector(MIXED), encoded(vector(MIXED, seed=1), codec, MIXED)
    expected = model + decoded(payload, codec, MIXED).dense()
    assert _changed(model, _frame(payload, codec)).tobytes() == expected.tobytes() != model.tobytes()


def test_an_empty_payload_changes_nothing():
    model = vector(MIXED)
    assert _changed(model, _frame(b"")).tobytes() == model.tobytes()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_model_is_rounded_after_the_change(codec, is_empty):
    model, payload = vector(MIXED), b"" if is_empty else encoded(vector(MIXED, seed=1), "topk:0.02+int4", MIXED)
    _, expected = rounded(_changed(model, _frame(payload)), codec, manifest=MIXED)
    assert _changed(model, _frame(payload, rounding=codec)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("codec", ["float32", *LOSSY])
def test_a_keyframe_holds_the_model_that_rounding_gives(codec):
    payload, model = rounded(vector(MIXED), codec, manifest=MIXED)
    keyframe = _frame(payload, codec, base=None, manifest=MIXED, plan=PLAN)
    assert whole_model(keyframe, manifest=MIXED).tobytes() == model.tobytes()


GOOD = encoded(vector(MIXED, seed=1), "float32", MIXED)
NOT_FINITE = {str(value): np.full(MIXED.size, value, "<f4").tobytes() for value in (np.nan, np.inf, -np.inf)}


@pytest.mark.parametrize(
    ("payload", "codec"),
    [
        pytest.param(GOOD, "float33", id="unknown codec"),
        pytest.param(GOOD, "", id="no codec"),
        *(pytest.param(payload, "float32", id=value) for value, payload in NOT_FINITE.items()),
        pytest.param(GOOD[:-1], "float32", id="too short"),
        pytest.param(GOOD + b"\x00", "float32", id="too long"),
        pytest.param(GOOD, "topk:0.02+int4", id="another codec's"),
        pytest.param(b"", "float32", id="empty"),
    ],
)
def test_a_payload_that_cannot_be_decoded_is_refused_and_leaves_the_model_as_it_was(payload, codec):
    model = vector(MIXED)
    before = model.tobytes()
    with pytest.raises(DecodeError):
        whole_model(_frame(payload, codec), manifest=MIXED)
    if payload:
        with pytest.raises(DecodeError):
            change(model, _frame(payload, codec, rounding="int8"), manifest=MIXED)
    assert model.tobytes() == before


@pytest.mark.parametrize("rounding", ["float33", "", "topk:0.02+int8", "randomk:0.05+int8", "eden:1", "int4"])
def test_only_codecs_of_keyframes_round(rounding):
    model = vector(MIXED)
    before = model.tobytes()
    with pytest.raises(DecodeError, match="rounds by"):
        change(model, _frame(GOOD, "float32", rounding=rounding), manifest=MIXED)
    assert model.tobytes() == before


@pytest.mark.parametrize("codec", ["float32", *LOSSY])
def test_a_follower_holds_the_aggregators_bits_after_every_frame(codec):
    down = "topk:0.02+int4"
    keyframe, held = rounded(vector(MIXED), codec, manifest=MIXED)
    model = whole_model(_frame(keyframe, codec), manifest=MIXED)
    for number in range(2, 8):
        payload, rounding = encoded(vector(MIXED, seed=number) - held, down, MIXED), codec if number % 3 == 0 else None
        decoded(payload, down, MIXED).add_to(held)
        if rounding is not None:
            _, held = rounded(held, rounding, manifest=MIXED)
        change(model, _frame(payload, down, number=number, base=number - 1, rounding=rounding), manifest=MIXED)
        assert model.tobytes() == held.tobytes()
