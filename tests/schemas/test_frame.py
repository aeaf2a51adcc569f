import msgpack
import pytest
from sample_messages import SAMPLES

from schemas import wire
from schemas.errors import DecodeError
from schemas.frame import ModelFrame, TrainingPlan


def _frame(**changed: object) -> ModelFrame:
    return wire.decode(ModelFrame, msgpack.packb(msgpack.unpackb(wire.encode(SAMPLES["frame"])) | changed))


def _plan(**changed: object) -> TrainingPlan:
    return wire.decode(TrainingPlan, msgpack.packb(changed))


def test_frames_count_from_one():
    assert _frame(number=1).number == 1
    for wrong in (0, 2**53):
        with pytest.raises(DecodeError, match="number"):
            _frame(number=wrong)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.0001])
def test_a_fraction_is_over_zero_and_at_most_one(wrong):
    assert _frame(fraction=1).fraction == 1.0
    with pytest.raises(DecodeError, match="fraction"):
        _frame(fraction=wrong)


def test_a_frame_whose_manifest_has_gaps_is_refused():
    tensors = [{"name": "a", "shape": [2], "offset": 0}, {"name": "b", "shape": [2], "offset": 3}]
    with pytest.raises(DecodeError, match=r"ModelFrame.manifest: .*should start at 2, not 3"):
        _frame(manifest={"tensors": tensors})


def test_a_plan_without_fields_is_one_epoch_of_sgd():
    assert _plan() == TrainingPlan(epochs=1, steps=None, batch_size=32, optimizer="sgd", learning_rate=0.05, momentum=0.9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 10_001},
        {"steps": 0},
        {"steps": 10_000_001},
        {"batch_size": 0},
        {"batch_size": 1_000_001},
        {"optimizer": "lbfgs"},
        {"learning_rate": 0.0},
        {"learning_rate": 101.0},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"weight_decay": 10.5},
        {"proximal": 1000.5},
        {"proximal": -1e-9},
    ],
)
def test_a_plan_out_of_bounds_is_refused(wrong):
    with pytest.raises(DecodeError, match=next(iter(wrong))):
        _plan(**wrong)
    with pytest.raises(DecodeError, match=rf"training.{next(iter(wrong))}"):
        _frame(training=wrong)
