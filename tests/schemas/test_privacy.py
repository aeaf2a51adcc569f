import msgpack
import pytest
from hypothesis import given
from sample_messages import SAMPLES, privacy_plans

from schemas import wire
from schemas.errors import DecodeError
from schemas.frame import ModelFrame
from schemas.privacy import PrivacyFacts, PrivacyPlan
from schemas.update import ModelUpdate

FIXED = {"noise_multiplier": 1.1, "max_grad_norm": 0.5, "delta": 1e-5, "accountant": "rdp"}
TARGET = {"target_epsilon": 8.0, "planned_trainings": 40, "max_grad_norm": 0.5, "delta": 1e-5, "accountant": "prv"}


def _plan(fields: dict[str, object], /, **changed: object) -> PrivacyPlan:
    return wire.decode(PrivacyPlan, msgpack.packb(fields | changed))


def _facts(**changed: object) -> PrivacyFacts:
    return wire.decode(PrivacyFacts, msgpack.packb(SAMPLES["privacy facts"].model_dump() | changed))


@given(plan=privacy_plans())
def test_a_plan_comes_back_as_it_was(plan):
    assert wire.decode(PrivacyPlan, wire.encode(plan)) == plan


def test_a_plan_gives_the_noise_or_what_so_many_trainings_may_cost():
    assert _plan(FIXED).noise_multiplier == 1.1
    assert (_plan(TARGET).target_epsilon, _plan(TARGET).planned_trainings) == (8.0, 40)
    defaults = _plan(FIXED)
    assert (defaults.mechanism, defaults.clipping, defaults.max_epsilon) == ("dp-sgd", "auto", None)


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        (FIXED, {"noise_multiplier": None}),
        (FIXED, {"target_epsilon": 8.0, "planned_trainings": 40}),
        (FIXED, {"target_epsilon": 8.0}),
        (TARGET, {"noise_multiplier": 1.1}),
        (TARGET, {"target_epsilon": None, "planned_trainings": None}),
    ],
)
def test_a_plan_with_neither_noise_nor_target_or_with_both_is_refused(fields, changed):
    with pytest.raises(DecodeError, match="either a noise_multiplier or a target_epsilon"):
        _plan(fields, **changed)


@pytest.mark.parametrize(("fields", "changed"), [(TARGET, {"planned_trainings": None}), (FIXED, {"planned_trainings": 40})])
def test_trainings_are_planned_with_a_target_and_only_then(fields, changed):
    with pytest.raises(DecodeError, match="a target_epsilon goes with planned_trainings, and only then"):
        _plan(fields, **changed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mechanism": "laplace"},
        {"mechanism": None},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": 1e6 + 1},
        {"noise_multiplier": float("nan")},
        {"target_epsilon": 0.0},
        {"target_epsilon": float("inf")},
        {"planned_trainings": 0},
        {"planned_trainings": 2**53},
        {"planned_trainings": 1.5},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("inf")},
        {"max_grad_norm": None},
        {"clipping": "none"},
        {"delta": 0.0},
        {"delta": 1.0},
        {"accountant": "moments"},
        {"accountant": None},
        {"max_epsilon": 0.0},
        {"max_epsilon": True},
    ],
)
def test_a_plan_out_of_bounds_is_refused_wherever_it_is(wrong):
    name = next(iter(wrong))
    with pytest.raises(DecodeError, match=rf"PrivacyPlan.{name}"):
        _plan(TARGET, **wrong)
    plan = SAMPLES["plan"].model_dump() | {"privacy": TARGET | wrong}
    frame = msgpack.unpackb(wire.encode(SAMPLES["frame"])) | {"plan": plan}
    with pytest.raises(DecodeError, match=rf"ModelFrame.plan.privacy.{name}"):
        wire.decode(ModelFrame, msgpack.packb(frame))


@pytest.mark.parametrize(
    "wrong",
    [
        {"mechanism": "none"},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": None},
        {"noise_multiplier": float("inf")},
        {"sample_rate": 0.0},
        {"sample_rate": 1.0001},
        {"sample_rate": float("nan")},
        {"max_grad_norm": 0},
        {"max_grad_norm": "1"},
    ],
)
def test_facts_out_of_bounds_are_refused_wherever_they_are(wrong):
    name = next(iter(wrong))
    assert _facts(sample_rate=1).sample_rate == 1.0
    with pytest.raises(DecodeError, match=rf"PrivacyFacts.{name}"):
        _facts(**wrong)
    update = msgpack.unpackb(wire.encode(SAMPLES["noised update"]))
    with pytest.raises(DecodeError, match=rf"ModelUpdate.privacy.{name}"):
        wire.decode(ModelUpdate, msgpack.packb(update | {"privacy": update["privacy"] | wrong}))
