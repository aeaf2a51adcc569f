import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.feedback import compensate, give_back, left_over
from broker_fl.parameters import manifest_of

CODECS = ["topk:0.01+int4", "topk:0.05+float32", "topk:0.2+bfloat16", "int8", "int4", "bfloat16", "float32"]
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
