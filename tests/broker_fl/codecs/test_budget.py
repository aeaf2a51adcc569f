import contextlib

import numpy as np
import pytest
from codec_samples import QUANTIZERS, layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.budget import encode_within, fitted, modelled_bytes, warmed_up
from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.errors import ConfigurationError

MODEL = layout(weight=150_000, bias=100, head=50_000)
WITH_DENSITY = [f"{kind}:0.01+{quantizer}" for kind in ("topk", "topk-per-tensor", "randomk") for quantizer in QUANTIZERS]


def _generator() -> np.random.Generator:
    return np.random.default_rng(7)


def _delta(kind: str = "laplace") -> np.ndarray:
    drawn = {
        "laplace": lambda: _generator().laplace(size=MODEL.size),
        "normal": lambda: _generator().normal(size=MODEL.size),
        "heavy": lambda: _generator().standard_cauchy(MODEL.size),
        "even": lambda: np.full(MODEL.size, 0.5),
        "in one place": lambda: _generator().normal(size=MODEL.size) * np.geomspace(1, 1e-9, MODEL.size),
    }
    return drawn[kind]().astype(np.float32)


@pytest.mark.parametrize("name", WITH_DENSITY)
@pytest.mark.parametrize("budget", [1500, 20_000])
def test_a_fitted_density_uses_most_of_the_budget(name, budget):
    codec = fitted(parse_codec(name), budget, manifest=MODEL)
    assert len(codec.name) < 40
    size = len(encode(_delta(), codec, manifest=MODEL, generator=_generator()))
    assert 0.85 * budget <= size <= 1.1 * budget


@pytest.mark.parametrize("name", [*WITH_DENSITY, *QUANTIZERS])
def test_the_model_is_near_the_size_of_laplace_values(name):
    size = len(encode(_delta(), parse_codec(name), manifest=MODEL, generator=_generator()))
    assert modelled_bytes(parse_codec(name), manifest=MODEL) == pytest.approx(size, rel=0.15)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(WITH_DENSITY),
    budget=st.integers(0, 30_000),
    kind=st.sampled_from(["laplace", "normal", "heavy", "even", "in one place"]),
)
def test_the_budget_is_never_exceeded(name, budget, kind):
    values, codec = _delta(kind), parse_codec(name).with_density(0.05)
    if budget < 450:
        with contextlib.suppress(ConfigurationError):
            assert len(encode_within(values, codec, budget, manifest=MODEL, generator=_generator())[0]) <= budget
        return
    payload, used = encode_within(values, codec, budget, manifest=MODEL, generator=_generator())
    assert len(payload) <= budget
    assert used.density <= codec.density
    assert (used.quantizer, used.sparsifier.kind) == (codec.quantizer, codec.sparsifier.kind)
    decode(payload, parse_codec(used.name), manifest=MODEL)


def test_what_fits_is_sent_at_its_own_density():
    codec = parse_codec("topk:0.01+int4")
    payload, used = encode_within(_delta(), codec, 10**6, manifest=MODEL, generator=_generator())
    assert used is codec
    assert payload == encode(_delta(), codec, manifest=MODEL, generator=_generator())


def test_a_shrunk_payload_uses_most_of_the_budget():
    for kind in ("laplace", "normal", "heavy"):
        payload, used = encode_within(_delta(kind), parse_codec("topk:0.1+int8"), 5000, manifest=MODEL, generator=_generator())
        assert 4300 <= len(payload) <= 5000
        assert len(used.name) <= len("topk:0.00123+int8")


def test_the_least_size_is_named_where_nothing_fits():
    with pytest.raises(
        ConfigurationError, match=r"a budget of 100 bytes is too small: topk[+]int4 takes at least (\d+) bytes"
    ) as raised:
        encode_within(_delta(), parse_codec("topk:0.01+int4"), 100, manifest=MODEL, generator=_generator())
    least = int(str(raised.value).split("at least ")[1].split()[0])
    payload, _ = encode_within(_delta(), parse_codec("topk:0.01+int4"), least, manifest=MODEL, generator=_generator())
    assert len(payload) <= least
    with pytest.raises(ConfigurationError, match=r"is too small: topk[+]int4 takes at least"):
        fitted(parse_codec("topk:0.01+int4"), 100, manifest=MODEL)


def test_a_dense_codec_that_does_not_fit_needs_a_sparsifier():
    for name in ("int4", "float32", "eden:1"):
        with pytest.raises(ConfigurationError, match=r"bytes, the budget is 1000: name a sparsifier, as in topk:0.01[+]int4"):
            fitted(parse_codec(name), 1000, manifest=MODEL)
        with pytest.raises(ConfigurationError, match="name a sparsifier"):
            encode_within(_delta(), parse_codec(name), 1000, manifest=MODEL, generator=_generator())
        assert fitted(parse_codec(name), 10**6, manifest=MODEL).name == name


def test_a_threshold_is_sent_where_it_fits_and_has_no_density_to_fit():
    codec = parse_codec("threshold:5+int4")
    payload, used = encode_within(_delta(), codec, 10**5, manifest=MODEL, generator=_generator())
    assert used is codec
    with pytest.raises(ConfigurationError, match="name a sparsifier with a density"):
        encode_within(_delta(), codec, len(payload) - 1, manifest=MODEL, generator=_generator())
    with pytest.raises(ConfigurationError, match="no density"):
        fitted(codec, 10**5, manifest=MODEL)


def test_a_budget_for_everything_sends_everything():
    assert fitted(parse_codec("topk:0.01+int4"), 10**6, manifest=MODEL).name == "topk:1.0+int4"


def test_only_small_tensors_fit_whatever_the_density():
    manifest = layout(bias=100)
    payload, _ = encode_within(
        np.ones(100, np.float32), parse_codec("topk:0.5+int8"), 200, manifest=manifest, generator=_generator()
    )
    assert len(payload) <= 200
    assert fitted(parse_codec("topk:0.5+int8"), 200, manifest=manifest).density == 1


def test_the_density_falls_exponentially_to_its_own():
    codec = parse_codec("topk:0.001+int4")
    names = [warmed_up(codec, version, over_versions=4, from_density=0.25).name for version in range(6)]
    assert names == ["topk:0.25+int4", "topk:0.0628+int4", "topk:0.0158+int4", "topk:0.00397+int4", codec.name, codec.name]


def test_a_warm_up_never_goes_below_the_density_or_beyond_its_end():
    codec = parse_codec("randomk:0.3+int4")
    assert warmed_up(codec, 0, over_versions=10, from_density=0.25) == codec
    assert warmed_up(codec, 0, over_versions=0, from_density=1.0) == codec
    for version in range(20):
        assert 0.3 <= warmed_up(codec, version, over_versions=10, from_density=0.9).density <= 0.9


def test_a_codec_without_a_density_cannot_be_warmed_up():
    for name in ("int4", "threshold:0.1+int4"):
        with pytest.raises(ConfigurationError, match="has no density to set"):
            warmed_up(parse_codec(name), 3, over_versions=10, from_density=0.5)
