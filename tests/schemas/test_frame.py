import msgpack
import pytest
from sample_messages import SAMPLES

from schemas import wire
from schemas.errors import DecodeError
from schemas.frame import ModelFrame, Plan, TrainingPlan


def _frame(kind: str = "frame", /, **changed: object) -> ModelFrame:
    return wire.decode(ModelFrame, msgpack.packb(msgpack.unpackb(wire.encode(SAMPLES[kind])) | changed))


def _plan(**changed: object) -> Plan:
    return wire.decode(Plan, msgpack.packb(msgpack.unpackb(wire.encode(SAMPLES["plan"])) | changed))


def _training(**changed: object) -> TrainingPlan:
    return wire.decode(TrainingPlan, msgpack.packb(changed))


@pytest.mark.parametrize("kind", ["frame", "announcement"])
def test_frames_count_from_one(kind):
    assert _frame(kind, number=9).number == 9
    for wrong in (0, 2**53):
        with pytest.raises(DecodeError, match="number"):
            _frame(kind, number=wrong)


def test_a_frame_changes_one_that_comes_before_it():
    assert _frame(number=3, base=1).base == 1
    for wrong in (3, 4):
        with pytest.raises(DecodeError, match=f"frame 3 cannot change frame {wrong}, which does not come before it"):
            _frame(number=3, base=wrong)
    for wrong in (0, -1):
        with pytest.raises(DecodeError, match=r"base"):
            _frame(base=wrong)


@pytest.mark.parametrize("missing", ["manifest", "plan"])
def test_a_frame_without_a_base_says_all_that_a_newcomer_needs(missing):
    assert _frame("announcement").base is None
    with pytest.raises(DecodeError, match="without a base needs a manifest and a plan"):
        _frame("announcement", **{missing: None})


def test_a_frame_has_to_say_that_it_has_no_base():
    fields = msgpack.unpackb(wire.encode(SAMPLES["announcement"]))
    del fields["base"]
    with pytest.raises(DecodeError, match=r"ModelFrame.base: Field required"):
        wire.decode(ModelFrame, msgpack.packb(fields))


@pytest.mark.parametrize("wrong", [{"number": 0}, {"bytes": -1}, {"bytes": 2**53}, {"log_bytes": -1}, {"log_bytes": 1.5}])
def test_the_place_of_a_keyframe_is_checked(wrong):
    place = {"number": 1, "bytes": 10, "log_bytes": 0}
    assert _frame(keyframe=place).keyframe.bytes == 10
    with pytest.raises(DecodeError, match=rf"ModelFrame.keyframe.{next(iter(wrong))}"):
        _frame(keyframe=place | wrong)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.0001])
def test_a_fraction_is_over_zero_and_at_most_one(wrong):
    assert _plan(fraction=1).fraction == 1.0
    with pytest.raises(DecodeError, match="fraction"):
        _plan(fraction=wrong)
    with pytest.raises(DecodeError, match=r"plan.fraction"):
        _frame(plan=SAMPLES["plan"].model_dump() | {"fraction": wrong})


@pytest.mark.parametrize("wrong", [-0.1, 1.0, float("nan")])
def test_a_momentum_correction_is_below_one(wrong):
    assert _plan(momentum_correction=0.9).momentum_correction == 0.9
    with pytest.raises(DecodeError, match="momentum_correction"):
        _plan(momentum_correction=wrong)


def test_a_frame_whose_manifest_has_gaps_is_refused():
    tensors = [{"name": "a", "shape": [2], "offset": 0}, {"name": "b", "shape": [2], "offset": 3}]
    with pytest.raises(DecodeError, match=r"ModelFrame.manifest: .*should start at 2, not 3"):
        _frame("announcement", manifest={"tensors": tensors})


def test_a_training_plan_without_fields_is_one_epoch_of_sgd():
    assert _training() == TrainingPlan(epochs=1, steps=None, batch_size=32, optimizer="sgd", learning_rate=0.05, momentum=0.9)


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
        {"decay_versions": 0},
        {"decay_to": 0.0},
        {"decay_to": 1.5},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"weight_decay": 10.5},
        {"proximal": 1000.5},
        {"proximal": -1e-9},
    ],
)
def test_a_training_plan_out_of_bounds_is_refused(wrong):
    with pytest.raises(DecodeError, match=next(iter(wrong))):
        _training(**wrong)
    with pytest.raises(DecodeError, match=rf"plan.training.{next(iter(wrong))}"):
        _frame(plan=SAMPLES["plan"].model_dump() | {"training": wrong})


def test_a_learning_rate_falls_linearly_with_the_versions_and_stays_at_its_end():
    plan = _training(learning_rate=0.5, decay_versions=100, decay_to=0.2)
    rates = [plan.at(version).learning_rate for version in (0, 50, 100, 1000)]
    assert rates == pytest.approx([0.5, 0.3, 0.1, 0.1])
    assert _training(learning_rate=0.5).at(1000).learning_rate == 0.5
