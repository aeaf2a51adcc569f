import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.feedback import compensate, corrected, give_back, left_over, masked
from broker_fl.parameters import manifest_of

CODECS = [
    *("topk:0.01+int4", "topk:0.05+float32", "topk:0.2+bfloat16", "int8", "int4", "bfloat16", "float32"),
    *(
        "float16",
        "topk-per-tensor:0.05+sign",
        "randomk:0.05+int8",
        "threshold:0.02+stc",
        "topk:0.1+eden:2",
        "eden:3",
        "sign",
        "stc",
    ),
]
MANIFEST = manifest_of({"large": np.zeros((60, 50), np.float32), "bias": np.zeros(60, np.float32)})


def _deltas(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(2)
    return [generator.normal(scale=0.01, size=MANIFEST.size).astype(np.float32) for _ in range(count)]


def _sent_and_residual(codec: str, deltas: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    parsed, generator = parse_codec(codec), np.random.default_rng(3)
    residual: np.ndarray | None = None
    total = np.zeros(MANIFEST.size)
    for delta in deltas:
        target = compensate(delta.copy(), residual)
        sent = decode(encode(target, parsed, manifest=MANIFEST, generator=generator), parsed, manifest=MANIFEST)
        total += sent.dense()
        residual = left_over(target, sent)
    return total, residual


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_sent_and_what_is_left_over_are_all_that_was_learnt(codec):
    deltas = _deltas(20)
    total, residual = _sent_and_residual(codec, deltas)
    assert np.abs(total + residual - np.sum(deltas, axis=0, dtype=np.float64)).max() < 1e-6


@pytest.mark.parametrize("codec", CODECS)
def test_one_direction_is_sent_in_the_end_however_little_fits_into_one_update(codec):
    (delta,) = _deltas(1)
    total, residual = _sent_and_residual(codec, [delta] * 200)
    learnt = 200 * delta.astype(np.float64)
    assert np.linalg.norm(residual) < 0.3 * np.linalg.norm(learnt)
    assert np.dot(total, learnt) / np.linalg.norm(total) / np.linalg.norm(learnt) > 0.95


@pytest.mark.parametrize("codec", ["ternary", "qsgd:8", "topk:0.05+ternary", "randomk:0.1+qsgd:32", "topk:0.1+eden:1"])
def test_the_residual_of_coarse_codecs_loses_nothing(codec):
    deltas = _deltas(5)
    total, residual = _sent_and_residual(codec, deltas)
    learnt = np.sum(deltas, axis=0, dtype=np.float64)
    assert np.abs(total + residual - learnt).max() < 1e-5 * max(1, np.abs(residual).max())


def test_nothing_is_left_over_of_float32():
    _, residual = _sent_and_residual("float32", _deltas(3))
    assert not residual.any()


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(codec=st.sampled_from(CODECS), seed=st.integers(0, 1000))
def test_a_refused_update_returns_to_the_residual(codec, seed):
    target = np.random.default_rng(seed).normal(size=MANIFEST.size).astype(np.float32)
    parsed = parse_codec(codec)
    sent = decode(encode(target, parsed, manifest=MANIFEST, generator=np.random.default_rng(seed)), parsed, manifest=MANIFEST)
    residual = give_back(left_over(target.copy(), sent), sent)
    assert residual == pytest.approx(target, abs=1e-6)


def test_the_first_delta_has_nothing_to_be_compensated_for():
    delta = np.ones(4, np.float32)
    assert compensate(delta, None) is delta
    assert compensate(delta, np.full(4, 0.5, np.float32)).tolist() == [1.5] * 4
    assert delta.tolist() == [1.0] * 4


class TestMomentumCorrection:
    def test_without_momentum_it_is_error_feedback_and_has_no_velocity(self):
        delta, residual = np.ones(4, np.float32), np.full(4, 0.5, np.float32)
        target, velocity = corrected(delta, residual=residual, velocity=None, momentum=0.0)
        assert velocity is None
        assert target.tolist() == compensate(delta, residual).tolist()
        assert corrected(delta, residual=None, velocity=None, momentum=0)[0] is delta
        assert masked(None, decode(_payload(), parse_codec("topk:0.01+float32"), manifest=MANIFEST)) is None

    def test_the_equations_are_those_of_the_paper(self):
        generator = np.random.default_rng(4)
        delta, residual, velocity = (generator.normal(size=50).astype(np.float32) for _ in range(3))
        target, moved = corrected(delta, residual=residual, velocity=velocity, momentum=0.9)
        assert moved == pytest.approx(0.9 * velocity + delta, abs=1e-6)
        assert target == pytest.approx(residual + moved, abs=1e-6)
        assert target.dtype == moved.dtype == np.float32

    def test_what_it_returns_shares_no_memory(self):
        delta, residual, velocity = (np.ones(3, np.float32) for _ in range(3))
        for one, other in ((residual, velocity), (residual, None), (None, velocity), (None, None)):
            arrays = [*corrected(delta, residual=one, velocity=other, momentum=0.5), delta, residual, velocity]
            assert not any(np.shares_memory(arrays[i], arrays[j]) for i in range(2) for j in range(i + 1, 5))
        assert [delta.sum(), residual.sum(), velocity.sum()] == [3, 3, 3]

    def test_velocity_starts_anew_where_it_was_sent(self):
        velocity = np.ones(MANIFEST.size, np.float32)
        sent = decode(_payload(), parse_codec("topk:0.01+float32"), manifest=MANIFEST)
        assert not masked(velocity, sent)[sent.indices].any()
        assert velocity.sum() == MANIFEST.size - sent.indices.size
        dense = decode(encode(velocity, parse_codec("float32"), manifest=MANIFEST), parse_codec("float32"), manifest=MANIFEST)
        assert masked(np.ones(3, np.float32), dense).tolist() == [1, 1, 1]

    def test_an_element_that_waits_arrives_as_in_a_dense_run_with_momentum(self):
        # The paper's argument: of a gradient g in each of T steps, momentum m makes sum over t of sum over s <= t of m^(t-s) g.
        velocity = residual = None
        dense, dense_velocity = 0.0, 0.0
        for _ in range(6):
            target, velocity = corrected(np.full(1, 0.1, np.float32), residual=residual, velocity=velocity, momentum=0.9)
            residual = target
            dense_velocity = 0.9 * dense_velocity + 0.1
            dense += dense_velocity
        assert residual[0] == pytest.approx(dense, rel=1e-6)


def _payload() -> bytes:
    values = np.random.default_rng(8).normal(size=MANIFEST.size).astype(np.float32)
    return encode(values, parse_codec("topk:0.01+float32"), manifest=MANIFEST)
