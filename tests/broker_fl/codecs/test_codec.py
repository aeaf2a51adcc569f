import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.codec import SMALL_TENSOR, Codec, decode, encode, parse_codec
from broker_fl.codecs.delta import Delta
from broker_fl.codecs.indices import decode_indices, encode_indices
from broker_fl.codecs.quantize import QUANTIZERS
from broker_fl.errors import ConfigurationError, DecodeError
from broker_fl.parameters import manifest_of
from schemas.manifest import Manifest

DENSE = ["float32", "bfloat16", "int8", "int4"]
SPARSE = [f"topk:0.01+{quantizer}" for quantizer in DENSE]
CODECS = [*DENSE, *SPARSE]
MORE_CODECS = [*CODECS, *(f"topk:{density}+{quantizer}" for density in ("0.3", "1") for quantizer in DENSE)]
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def _layout(**sizes: int) -> Manifest:
    return manifest_of({name: np.zeros(size, np.float32) for name, size in sizes.items()})


MANIFESTS = {
    "small and large": _layout(bias=10, weight=3000, norm=SMALL_TENSOR, next_weight=SMALL_TENSOR + 1, last_bias=1),
    "only large": _layout(weight=2000),
    "only small": _layout(bias=5, norm=1000),
    "one parameter": _layout(scale=1),
}
MIXED = MANIFESTS["small and large"]
LARGE_OF_MIXED = 3000 + SMALL_TENSOR + 1


def _vector(manifest: Manifest, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=manifest.size).astype(np.float32)


def _encoded(vector: np.ndarray, codec: str, manifest: Manifest, seed: int = 1) -> bytes:
    return encode(vector, parse_codec(codec), manifest=manifest, generator=np.random.default_rng(seed))


def _decoded(payload: bytes, codec: str, manifest: Manifest) -> Delta:
    return decode(payload, parse_codec(codec), manifest=manifest)


def _is_small(manifest: Manifest) -> np.ndarray:
    return np.concatenate([np.full(spec.size, spec.size <= 1024) for spec in manifest.tensors])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", sorted(MANIFESTS))
class TestEveryCodec:
    def test_a_vector_comes_back_in_its_shape_and_near(self, codec, layout):
        manifest = MANIFESTS[layout]
        vector = _vector(manifest)
        delta = _decoded(_encoded(vector, codec, manifest), codec, manifest)
        dense = delta.dense()
        assert dense.shape == vector.shape
        assert dense.dtype == delta.values.dtype == np.float32
        sent = np.ones(manifest.size, bool) if delta.indices is None else np.isin(np.arange(manifest.size), delta.indices)
        step = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[parse_codec(codec).quantizer]
        assert (np.abs(dense - vector)[sent] <= step * np.abs(vector).max() * (1 + 1e-6)).all()
        assert not dense[~sent].any()

    def test_small_tensors_are_sent_whole_with_eight_bits_at_least(self, codec, layout):
        manifest = MANIFESTS[layout]
        vector = _vector(manifest)
        small = _is_small(manifest)
        # What is small in every sense: next to these, top-k alone would choose none of them.
        vector[small] *= 1e-3
        dense = _decoded(_encoded(vector, codec, manifest), codec, manifest).dense()
        if parse_codec(codec).density is None:
            return
        most = np.abs(vector[small]).max(initial=0)
        assert (np.abs(dense - vector)[small] <= most / 127 * (1 + 1e-6)).all()

    def test_the_same_generator_gives_the_same_bytes(self, codec, layout):
        vector = _vector(MANIFESTS[layout])
        kept = vector.copy()
        payload = _encoded(vector, codec, MANIFESTS[layout])
        assert payload == _encoded(kept, codec, MANIFESTS[layout])
        assert vector.tobytes() == kept.tobytes()

    def test_decoding_needs_no_randomness(self, codec, layout):
        payload = _encoded(_vector(MANIFESTS[layout]), codec, MANIFESTS[layout])
        once, again = (_decoded(payload, codec, MANIFESTS[layout]) for _ in range(2))
        assert once.dense().tobytes() == again.dense().tobytes()

    def test_the_length_is_that_of_indices_small_values_and_values(self, codec, layout):
        manifest = MANIFESTS[layout]
        parsed = parse_codec(codec)
        payload = _encoded(_vector(manifest), codec, manifest)
        quantizer = QUANTIZERS[parsed.quantizer]
        if parsed.density is None:
            assert len(payload) == quantizer.length(manifest.size)
            return
        small = int(_is_small(manifest).sum())
        large = manifest.size - small
        k = min(large, max(1, round(parsed.density * large)))
        indices = decode_indices(payload, size=manifest.size)
        of_small = QUANTIZERS["int8" if parsed.quantizer == "int4" else parsed.quantizer]
        assert indices.indices.size == k
        assert len(payload) == indices.end + of_small.length(small) + quantizer.length(k)

    def test_a_byte_less_or_more_is_a_decode_error(self, codec, layout):
        manifest = MANIFESTS[layout]
        payload = _encoded(_vector(manifest), codec, manifest)
        for wrong in (payload[:-1], payload + b"\x00", b"", payload[: len(payload) // 2]):
            with pytest.raises(DecodeError):
                _decoded(wrong, codec, manifest)

    def test_a_vector_of_zeros_stays_one(self, codec, layout):
        manifest = MANIFESTS[layout]
        zeros = np.zeros(manifest.size, np.float32)
        assert not _decoded(_encoded(zeros, codec, manifest), codec, manifest).dense().any()

    def test_a_vector_of_one_value_comes_back_without_a_warning(self, codec, layout):
        manifest = MANIFESTS[layout]
        for value in (1e-45, 1e-40, 0.5, 3.4028235e38):
            decoded = _decoded(_encoded(np.full(manifest.size, value, np.float32), codec, manifest), codec, manifest)
            assert decoded.values == pytest.approx(np.float32(value), rel=2**-7, abs=1e-36)


def _expect_delta_or_decode_error(payload: bytes, codec: str, manifest: Manifest) -> None:
    try:
        delta = _decoded(payload, codec, manifest)
    except DecodeError:
        return
    assert delta.size == manifest.size
    if delta.indices is None:
        assert delta.values.shape == (manifest.size,)
    else:
        assert delta.values.shape == delta.indices.shape
        assert np.unique(delta.indices).size == delta.indices.size
        assert ((delta.indices >= 0) & (delta.indices < manifest.size)).all()


@PROPERTY
@given(payload=st.binary(max_size=400), codec=st.sampled_from(MORE_CODECS), layout=st.sampled_from(sorted(MANIFESTS)))
def test_random_bytes_decode_or_are_a_decode_error(payload, codec, layout):
    _expect_delta_or_decode_error(payload, codec, MANIFESTS[layout])


@settings(PROPERTY, max_examples=250)
@given(
    seed=st.integers(0, 2**32 - 1),
    flips=st.integers(1, 3),
    codec=st.sampled_from(MORE_CODECS),
    layout=st.sampled_from(sorted(MANIFESTS)),
)
def test_flipped_bits_decode_or_are_a_decode_error(seed, flips, codec, layout):
    payload = np.unpackbits(np.frombuffer(_encoded(_vector(MANIFESTS[layout]), codec, MANIFESTS[layout]), np.uint8))
    # Near the beginning are the header, the planes and the scales.
    payload[np.random.default_rng(seed).integers(0, min(payload.size, 600), flips)] ^= 1
    _expect_delta_or_decode_error(np.packbits(payload).tobytes(), codec, MANIFESTS[layout])


@PROPERTY
@given(data=st.data(), codec=st.sampled_from(MORE_CODECS), layout=st.sampled_from(sorted(MANIFESTS)))
def test_every_truncation_is_a_decode_error(data, codec, layout):
    payload = _encoded(_vector(MANIFESTS[layout]), codec, MANIFESTS[layout])
    with pytest.raises(DecodeError):
        _decoded(payload[: data.draw(st.integers(0, len(payload) - 1))], codec, MANIFESTS[layout])


@PROPERTY
@given(
    count=st.integers(0, 2**32 - 1),
    bits=st.integers(0, 255),
    high_bytes=st.integers(0, 2**32 - 1),
    codec=st.sampled_from(MORE_CODECS),
    rest=st.binary(max_size=100),
)
def test_any_header_decodes_or_is_a_decode_error(count, bits, high_bytes, codec, rest):
    _expect_delta_or_decode_error(struct.pack("<IBI", count, bits, high_bytes) + rest, codec, MIXED)


def test_the_payload_of_another_model_is_a_decode_error():
    for codec in CODECS:
        with pytest.raises(DecodeError):
            _decoded(_encoded(_vector(MIXED), codec, MIXED), codec, _layout(weight=3000, bias=10))


def test_decoding_takes_memory_for_the_payload_and_the_model_only():
    manifest = _layout(weight=200_000)
    dense_bytes = 4 * manifest.size
    every = encode_indices(np.arange(manifest.size))
    hostile = [
        every + bytes(dense_bytes),
        every,
        struct.pack("<IBI", manifest.size, 0, manifest.size // 4) + b"\xff" * (manifest.size // 4),
        struct.pack("<IBI", manifest.size, 31, 1) + bytes(dense_bytes),
        bytes(dense_bytes),
        b"\xff" * dense_bytes,
    ]
    for payload in hostile:
        for codec in ("topk:0.01+int4", "topk:1+float32", "float32", "int8"):
            tracemalloc.start()
            _expect_delta_or_decode_error(payload, codec, manifest)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 20 * dense_bytes


@pytest.mark.parametrize("quantizer", DENSE)
def test_only_the_largest_of_the_large_tensors_are_sent(quantizer):
    vector = _vector(MIXED)
    codec = f"topk:0.01+{quantizer}"
    delta = _decoded(_encoded(vector, codec, MIXED), codec, MIXED)
    large = np.flatnonzero(~_is_small(MIXED))
    k = round(0.01 * LARGE_OF_MIXED)
    expected = np.sort(large[np.argsort(np.abs(vector[large]))[-k:]])
    assert delta.indices[-k:].tolist() == expected.tolist()
    assert delta.indices[:-k].tolist() == np.flatnonzero(_is_small(MIXED)).tolist()


def test_what_float32_sends_is_exact():
    vector = _vector(MIXED)
    for codec in ("float32", "topk:0.3+float32", "topk:1+float32"):
        delta = _decoded(_encoded(vector, codec, MIXED), codec, MIXED)
        assert delta.values.tobytes() == (vector if delta.indices is None else vector[delta.indices]).tobytes()


def test_of_ties_exactly_k_are_sent():
    vector = np.full(MIXED.size, -0.5, np.float32)
    delta = _decoded(_encoded(vector, "topk:0.1+float32", MIXED), "topk:0.1+float32", MIXED)
    small = int(_is_small(MIXED).sum())
    assert delta.indices.size - small == round(0.1 * LARGE_OF_MIXED)


def test_one_element_is_sent_however_low_the_density():
    for density in ("1e-9", "1e-300"):
        delta = _decoded(_encoded(_vector(MIXED), f"topk:{density}+int8", MIXED), f"topk:{density}+int8", MIXED)
        assert delta.indices.size == int(_is_small(MIXED).sum()) + 1


def test_a_tensor_of_1024_elements_is_small_and_one_of_1025_is_not():
    for size, sent in ((1024, 1024), (1025, 10)):
        manifest = _layout(weight=size)
        assert _decoded(_encoded(_vector(manifest), "topk:0.01+int8", manifest), "topk:0.01+int8", manifest).indices.size == sent


def test_an_index_into_a_small_tensor_is_a_decode_error():
    codec = "topk:0.01+float32"
    small = int(_is_small(MIXED).sum())
    values = bytes(4 * (small + 2))
    assert _decoded(encode_indices(np.array([10, 3009])) + values, codec, MIXED).size == MIXED.size
    for wrong in ([0, 10], [9, 10], [10, 3010], [10, MIXED.size - 1]):
        with pytest.raises(DecodeError, match="in a small tensor, which is sent whole"):
            _decoded(encode_indices(np.array(wrong)) + values, codec, MIXED)


def test_not_a_number_is_decoded_for_the_receiver_to_refuse():
    payload = struct.pack("<2f", float("nan"), 1.0)
    assert not _decoded(payload, "float32", _layout(scale=2)).is_finite()


@pytest.mark.parametrize("quantizer", ["int8", "int4"])
@pytest.mark.parametrize("sparsifier", ["", "topk:0.3+"])
def test_the_mean_over_many_roundings_is_the_vector(quantizer, sparsifier):
    manifest = MANIFESTS["only large"]
    vector = _vector(manifest)
    codec = f"{sparsifier}{quantizer}"
    decoded = [_decoded(_encoded(vector, codec, manifest, seed), codec, manifest) for seed in range(200)]
    sent = slice(None) if decoded[0].indices is None else decoded[0].indices
    mean = np.mean([delta.dense()[sent] for delta in decoded], axis=0, dtype=np.float64)
    step = np.abs(vector).max() / {"int8": 127, "int4": 7}[quantizer]
    assert (np.abs(mean - vector[sent]) <= 5 * 0.5 * step / np.sqrt(200)).all()


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("float32", Codec("float32")),
        ("int4", Codec("int4")),
        ("topk:0.01+int4", Codec("int4", 0.01)),
        ("topk:1+bfloat16", Codec("bfloat16", 1.0)),
        ("topk:1e-3+int8", Codec("int8", 0.001)),
    ],
)
def test_a_codec_is_parsed(name, codec):
    assert parse_codec(name) == codec
    assert parse_codec(codec.name) == codec


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(density=st.floats(0, 1, exclude_min=True), quantizer=st.sampled_from(DENSE))
def test_the_name_of_a_codec_says_all_of_it(density, quantizer):
    codec = Codec(quantizer, density)
    assert parse_codec(codec.name) == codec
    assert len(codec.name) <= 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown quantizer ''"),
        ("int5", "unknown quantizer 'int5' in codec 'int5': did you mean"),
        ("INT8", "unknown quantizer 'INT8'"),
        ("topk:0.01", "unknown quantizer"),
        ("topk:0.01+", "unknown quantizer ''"),
        ("+int4", "names no sparsifier before"),
        ("topq:0.01+int4", "unknown sparsifier 'topq' in codec 'topq:0.01[+]int4': did you mean 'topk'"),
        ("topk+int4", "the density of top-k must be a number"),
        ("topk:+int4", "must be a number"),
        ("topk:much+int4", "must be a number"),
        ("topk:0+int4", "over 0 and at most 1, not 0"),
        ("topk:-0.1+int4", "over 0 and at most 1"),
        ("topk:1.01+int4", "over 0 and at most 1"),
        ("topk:nan+int4", "over 0 and at most 1"),
        ("topk:inf+int4", "over 0 and at most 1"),
        ("topk:1e-400+int4", "over 0 and at most 1"),
        ("topk:0.1+topk:0.1+int4", "must be a number"),
    ],
)
def test_a_codec_that_cannot_be_is_a_configuration_error(name, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_codec(name)


@PROPERTY
@given(st.text(max_size=64) | st.from_regex(r"(topk:[0-9.e+-]{0,8}\+)?(int4|int8|float32)", fullmatch=True))
def test_any_text_is_a_codec_or_a_configuration_error(name):
    try:
        codec = parse_codec(name)
    except ConfigurationError:
        return
    assert codec.density is None or 0 < codec.density <= 1
