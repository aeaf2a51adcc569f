import numpy as np
import pytest
from structlog.testing import capture_logs

from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.errors import ConfigurationError
from broker_fl.parameters import manifest_of
from schemas import wire
from schemas.frame import Plan, TrainingPlan
from schemas.update import ModelUpdate
from workers.encoding import Budget, check_budget, encode_update, fields_bytes

MANIFEST = manifest_of({"hidden.weight": np.zeros((400, 500), np.float32), "hidden.bias": np.zeros(8, np.float32)})
DELTA = np.random.default_rng(0).standard_normal(MANIFEST.size).astype(np.float32)
FIELDS = fields_bytes(federation="ward", party="ann", is_noised=False)


def encoded(*, up="topk:0.01+int4", momentum=0.0, delta=DELTA, **given):
    arguments = {
        "residual": None,
        "velocity": None,
        "budget": Budget(),
        "uplink_bytes_per_s": None,
        "generator": np.random.default_rng(1),
    }
    plan = Plan(training=TrainingPlan(), update_codec=up, momentum_correction=momentum, fraction=1.0, repeat=False)
    return encode_update(delta.copy(), plan=plan, manifest=MANIFEST, fields_bytes=FIELDS, **{**arguments, **given})


def message_bytes(found):
    update = ModelUpdate(
        federation="ward",
        party="ann",
        update_id="0" * 32,
        sequence=1,
        base_version=1,
        base_digest="0" * 64,
        manifest_digest="0" * 64,
        codec=found.codec.name,
        num_samples=1,
        num_steps=1,
        train_loss=0.1,
        payload=found.payload,
    )
    return len(wire.encode(update))


def content(found):
    return decode(found.payload, found.codec, manifest=MANIFEST).dense()


def test_what_is_sent_and_what_stays_add_up():
    residual = np.ones(MANIFEST.size, np.float32)
    found = encoded(residual=residual)
    assert found.codec == parse_codec("topk:0.01+int4")
    assert found.velocity is None
    assert np.allclose(content(found) + found.residual, DELTA + 1, atol=1e-5)


@pytest.mark.parametrize("budget", [700, 1000, 2000, 3000])
def test_update_stays_within_its_budget_with_all_its_fields(budget):
    with capture_logs() as logs:
        found = encoded(budget=Budget(bytes=budget))
    assert 0.6 * budget < message_bytes(found) <= budget
    assert found.codec.density < 0.01
    assert [line["codec"] for line in logs] == [found.codec.name]
    assert np.allclose(content(found) + found.residual, DELTA, atol=1e-5)


def test_budget_makes_no_update_denser_than_the_federation_asks():
    assert encoded(budget=Budget(bytes=1 << 20)).codec == parse_codec("topk:0.01+int4")


def test_seconds_are_a_budget_once_the_line_is_measured():
    budget = Budget(seconds=0.5)
    assert encoded(budget=budget).codec == parse_codec("topk:0.01+int4")
    found = encoded(budget=budget, uplink_bytes_per_s=3000.0)
    assert 900 < message_bytes(found) <= 1500
    both = encoded(budget=Budget(bytes=1000, seconds=0.5), uplink_bytes_per_s=3000.0)
    assert message_bytes(both) <= 1000


def test_time_without_end_is_no_bound():
    assert encoded(budget=Budget(seconds=1e308), uplink_bytes_per_s=1e9).codec == parse_codec("topk:0.01+int4")


def test_line_that_is_too_slow_for_any_update_gets_the_sparsest_with_a_warning():
    with capture_logs() as logs:
        found = encoded(budget=Budget(seconds=0.5), uplink_bytes_per_s=1.0)
    assert len(found.payload) < 100
    assert "warning" in [line["log_level"] for line in logs]


def test_budget_that_no_update_stays_within_is_refused():
    with pytest.raises(ConfigurationError, match="too small"):
        encoded(budget=Budget(bytes=FIELDS + 5))
    with pytest.raises(ConfigurationError, match=r"\[worker\] budget: .*too small"):
        check_budget(Budget(bytes=FIELDS + 5), codec="topk:0.01+int4", manifest=MANIFEST, fields_bytes=FIELDS)
    check_budget(Budget(bytes=1000, seconds=1e-9), codec="topk:0.01+int4", manifest=MANIFEST, fields_bytes=FIELDS)
    check_budget(Budget(bytes=5), codec="int8", manifest=MANIFEST, fields_bytes=FIELDS)


def test_codec_without_a_density_cannot_keep_a_budget_and_says_so():
    with capture_logs() as logs:
        found = encoded(up="int8", budget=Budget(bytes=1000))
    assert found.codec == parse_codec("int8")
    assert [line["log_level"] for line in logs] == ["warning"]


def test_momentum_is_kept_for_what_was_not_sent():
    first = encoded(momentum=0.5)
    sent = content(first) != 0
    assert np.array_equal(first.velocity[~sent], DELTA[~sent])
    assert not first.velocity[sent].any()
    second = encoded(momentum=0.5, residual=first.residual, velocity=first.velocity)
    # m * DELTA + DELTA, and the residual DELTA.
    waited = ~sent & (content(second) == 0)
    assert np.allclose(second.residual[waited], 2.5 * DELTA[waited], atol=1e-5)
