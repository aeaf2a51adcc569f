import copy
import struct
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from codec_samples import (
    CODECS,
    EDEN,
    FLOATS,
    MANIFESTS,
    MIXED,
    QUANTIZERS,
    SIGNS,
    SPARSE,
    SPARSIFIERS,
    UNIFORM,
    decoded,
    encoded,
    is_small,
    layout,
    round_trip,
    vector,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs import codec as codec_module
from broker_fl.codecs.codec import Codec, Stage, encode, parse_codec, quantizers_of
from broker_fl.codecs.reader import varint
from broker_fl.codecs.registry import QUANTIZERS as QUANTIZER_ENTRIES
from broker_fl.codecs.registry import SPARSIFIERS as SPARSIFIER_ENTRIES
from broker_fl.errors import ConfigurationError, DecodeError, ManifestMismatchError
from broker_fl.parameters import manifest_of

LARGE_OF_MIXED = int((~is_small(MIXED)).sum())
SMALL_OF_MIXED = MIXED.size - LARGE_OF_MIXED
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def _expect_near(quantizer: str, values: np.ndarray, received: np.ndarray) -> None:
    most = float(np.abs(values).max(initial=0))
    error = np.abs(received.astype(np.float64) - values)
    if quantizer in FLOATS:
        assert (error <= {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[quantizer] * np.abs(values) + 1e-7).all()
    elif quantizer in UNIFORM:
        assert (error <= most / UNIFORM[quantizer] * (1 + 1e-6)).all()
    elif quantizer in SIGNS:
        assert (np.sign(received) == np.sign(values)).all()
        assert np.abs(received).max(initial=0) <= most
    elif quantizer in EDEN:
        assert np.linalg.norm(error) <= 1.2 * np.linalg.norm(values)
    else:
        assert (error <= np.linalg.norm(values) / 16 * (1 + 1e-6)).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
class TestEveryCodec:
    def test_a_vector_comes_back_in_its_shape_and_near(self, codec, manifest):
        values, quantizer = vector(manifest), parse_codec(codec).quantizer.name
        delta = round_trip(values, codec, manifest)
        dense = delta.dense()
        assert dense.shape == values.shape
        assert dense.dtype == delta.values.dtype == np.float32
        sent = np.ones(manifest.size, bool) if delta.indices is None else np.isin(np.arange(manifest.size), delta.indices)
        assert (delta.indices is None) == (parse_codec(codec).sparsifier is None)
        assert not dense[~sent].any()
        small = is_small(manifest)
        assert sent[small].all()
        _expect_near("int8" if quantizer not in FLOATS else quantizer, values[small], dense[small])
        _expect_near(quantizer, values[~small & sent], dense[~small & sent])

    def test_small_tensors_are_sent_whole_with_eight_bits_at_least(self, codec, manifest):
        values, small = vector(manifest), is_small(manifest)
        if parse_codec(codec) == parse_codec("int8"):
            return
        # What is small in every sense: next to these, the largest alone would choose none of them.
        values[small] *= 1e-3
        dense = round_trip(values, codec, manifest).dense()
        assert (np.abs(dense - values)[small] <= np.abs(values[small]).max(initial=0) / 127 * (1 + 1e-6)).all()

    def test_the_same_generator_gives_the_same_bytes_and_the_vector_stays(self, codec, manifest):
        values = vector(manifest)
        kept = values.copy()
        values.flags.writeable = False
        assert encoded(values, codec, manifest) == encoded(kept, codec, manifest)
        assert values.tobytes() == kept.tobytes()

    def test_decoding_needs_no_randomness(self, codec, manifest):
        payload = encoded(vector(manifest), codec, manifest)
        once, again = (decoded(payload, codec, manifest) for _ in range(2))
        assert once.dense().tobytes() == again.dense().tobytes()

    def test_a_byte_less_or_more_is_a_decode_error(self, codec, manifest):
        payload = encoded(vector(manifest), codec, manifest)
        for wrong in (payload[:-1], payload + b"\x00", b"", payload[: len(payload) // 2]):
            with pytest.raises(DecodeError):
                decoded(wrong, codec, manifest)

    def test_a_vector_of_zeros_stays_one(self, codec, manifest):
        assert not round_trip(np.zeros(manifest.size, np.float32), codec, manifest).dense().any()

    def test_extreme_values_come_back_finite_and_without_a_warning(self, codec, manifest):
        for value in (1e-45, 1e-40, 0.5, -1e30, 3.4028235e38):
            delta = round_trip(np.full(manifest.size, value, np.float32), codec, manifest)
            assert delta.is_finite()
            if not {"eden", "float16", "qsgd"} & {parse_codec(codec).quantizer.kind}:
                assert delta.values == pytest.approx(np.float32(value), rel=2**-7, abs=1e-36)

    def test_the_values_take_no_more_than_the_quantizers_say(self, codec, manifest):
        delta = round_trip(vector(manifest), codec, manifest)
        small, large = quantizers_of(parse_codec(codec))
        of_small = int(is_small(manifest).sum())
        if parse_codec(codec).sparsifier is None:
            assert len(encoded(vector(manifest), codec, manifest)) <= small.length(of_small) + large.length(
                manifest.size - of_small
            )
        else:
            sent = delta.values.size - of_small
            most_indices = 16 + 4 * sent
            assert len(encoded(vector(manifest), codec, manifest)) <= most_indices + small.length(of_small) + large.length(sent)


def _expect_delta_or_decode_error(payload: bytes, codec: str, manifest) -> None:
    try:
        delta = decoded(payload, codec, manifest)
    except DecodeError:
        return
    assert delta.size == manifest.size
    assert delta.values.dtype == np.float32
    if delta.indices is None:
        assert delta.values.shape == (manifest.size,)
    else:
        assert delta.values.shape == delta.indices.shape
        assert np.unique(delta.indices).size == delta.indices.size
        assert ((delta.indices >= 0) & (delta.indices < manifest.size)).all()


@settings(PROPERTY, max_examples=400)
@given(payload=st.binary(max_size=400), codec=st.sampled_from(CODECS), name=st.sampled_from(sorted(MANIFESTS)))
def test_random_bytes_decode_or_are_a_decode_error(payload, codec, name):
    _expect_delta_or_decode_error(payload, codec, MANIFESTS[name])


@settings(PROPERTY, max_examples=1000)
@given(
    seed=st.integers(0, 2**32 - 1),
    flips=st.integers(1, 3),
    codec=st.sampled_from(CODECS),
    name=st.sampled_from(sorted(MANIFESTS)),
)
def test_flipped_bits_decode_or_are_a_decode_error(seed, flips, codec, name):
    payload = np.unpackbits(np.frombuffer(encoded(vector(MANIFESTS[name]), codec, MANIFESTS[name]), np.uint8))
    generator = np.random.default_rng(seed)
    # Near the beginning are the header, the planes and the scales; near the end the words of the entropy coder.
    at = generator.integers(0, min(payload.size, 800), flips)
    payload[at if generator.random() < 0.6 else payload.size - 1 - at] ^= 1
    _expect_delta_or_decode_error(np.packbits(payload).tobytes(), codec, MANIFESTS[name])


@settings(PROPERTY, max_examples=200)
@given(data=st.data(), codec=st.sampled_from(CODECS), name=st.sampled_from(sorted(MANIFESTS)))
def test_every_truncation_is_a_decode_error(data, codec, name):
    payload = encoded(vector(MANIFESTS[name]), codec, MANIFESTS[name])
    with pytest.raises(DecodeError):
        decoded(payload[: data.draw(st.integers(0, len(payload) - 1))], codec, MANIFESTS[name])


@settings(PROPERTY, max_examples=200)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_pieces_of_two_payloads_decode_or_are_a_decode_error(data, codec):
    one, other = (encoded(vector(MIXED, seed), codec, MIXED) for seed in (0, 1))
    cut, join = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(other)))
    _expect_delta_or_decode_error(one[:cut] + other[join:], codec, MIXED)


def test_the_payload_of_another_model_is_a_decode_error():
    for codec in CODECS:
        with pytest.raises(DecodeError):
            decoded(encoded(vector(MIXED), codec, MIXED), codec, layout(weight=3100, bias=10))


def test_decoding_takes_memory_for_the_payload_and_the_model_only():
    manifest = layout(weight=200_000)
    dense_bytes = 4 * manifest.size
    all_of_it = varint(manifest.size)
    a_bomb = bytes([1, 0, 1, 255, 0, 0])
    hostile = [
        all_of_it + bytes(dense_bytes),
        all_of_it,
        struct.pack("<f", 1.0) + a_bomb,
        all_of_it + b"\x00\x00" + struct.pack("<f", 1.0) + a_bomb,
        varint(manifest.size - 1) + bytes(200) + varint(25_000) + b"\xff" * 25_000,
        varint(2**31 - 1) + bytes(dense_bytes),
        bytes(dense_bytes),
        b"\xff" * dense_bytes,
    ]
    for payload in hostile:
        for codec in ("topk:0.01+int4", "topk:1+float32", "randomk:1+stc", "threshold:1+stc", "stc", "eden:1", "float32", "int8"):
            tracemalloc.start()
            _expect_delta_or_decode_error(payload, codec, manifest)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 20 * dense_bytes


def test_a_payload_for_a_model_of_any_size_takes_no_memory_before_it_is_known_to_be_there():
    huge = manifest_of({"weight": np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**31 - 1,), (0,))})
    for codec in ("float32", "int8", "eden:2", "topk:0.5+int4", "topk:0.5+float32", "threshold:1+int8"):
        for payload in (bytes(20), varint(2**30) + bytes(100), b"\xff" * 50):
            tracemalloc.start()
            with pytest.raises(DecodeError):
                decoded(payload, codec, huge)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 1 << 20


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_only_the_largest_of_the_large_tensors_are_sent(quantizer):
    values = vector(MIXED)
    delta = round_trip(values, f"topk:0.01+{quantizer}", MIXED)
    large = np.flatnonzero(~is_small(MIXED))
    k = round(0.01 * LARGE_OF_MIXED)
    expected = np.sort(large[np.argsort(np.abs(values[large]))[-k:]])
    assert delta.indices[-k:].tolist() == expected.tolist()
    assert delta.indices[:-k].tolist() == np.flatnonzero(is_small(MIXED)).tolist()


def test_each_large_tensor_sends_its_largest():
    values = vector(MIXED)
    delta = round_trip(values, "topk-per-tensor:0.01+float32", MIXED)
    for spec in MIXED.tensors:
        within = delta.indices[(delta.indices >= spec.offset) & (delta.indices < spec.offset + spec.size)]
        if spec.size > 1024:
            magnitudes = np.abs(values[spec.offset : spec.offset + spec.size])
            assert (within - spec.offset).tolist() == np.sort(np.argsort(magnitudes)[-round(0.01 * spec.size) :]).tolist()


def test_a_threshold_sends_all_that_reach_it():
    values = vector(MIXED)
    delta = round_trip(values, "threshold:1.5+float32", MIXED)
    expected = np.flatnonzero((np.abs(values) >= 1.5) & ~is_small(MIXED))
    assert delta.indices[SMALL_OF_MIXED:].tolist() == expected.tolist()
    assert round_trip(values, "threshold:100+int4", MIXED).indices.size == SMALL_OF_MIXED


def test_random_choices_differ_by_seed_and_take_eight_bytes():
    first, second = (round_trip(vector(MIXED), "randomk:0.05+float32", MIXED, seed).indices[SMALL_OF_MIXED:] for seed in (1, 2))
    k = round(0.05 * LARGE_OF_MIXED)
    assert first.size == second.size == k
    assert first.tolist() != second.tolist()
    assert not is_small(MIXED)[first].any()
    assert len(encoded(vector(MIXED), "randomk:0.05+float32", MIXED)) == 8 + 4 * (SMALL_OF_MIXED + k)


def test_what_float32_sends_is_exact():
    values = vector(MIXED)
    for codec in ("float32", *(f"{sparsifier}+float32" for sparsifier in SPARSIFIERS), "topk:1+float32"):
        delta = round_trip(values, codec, MIXED)
        assert delta.values.tobytes() == (values if delta.indices is None else values[delta.indices]).tobytes()


def test_of_ties_exactly_k_are_sent():
    delta = round_trip(np.full(MIXED.size, -0.5, np.float32), "topk:0.1+float32", MIXED)
    assert delta.indices.size - SMALL_OF_MIXED == round(0.1 * LARGE_OF_MIXED)


def test_one_element_is_sent_however_low_the_density():
    for codec, sent in (
        ("topk:1e-9+int8", 1),
        ("topk:1e-300+int8", 1),
        ("randomk:1e-9+int8", 1),
        ("topk-per-tensor:1e-9+int8", 3),
    ):
        assert round_trip(vector(MIXED), codec, MIXED).indices.size == SMALL_OF_MIXED + sent


def test_a_tensor_of_1024_elements_is_small_and_one_of_1025_is_not():
    for size, sent in ((1024, 1024), (1025, 10)):
        assert round_trip(vector(layout(weight=size)), "topk:0.01+int8", layout(weight=size)).indices.size == sent


def test_no_rank_reaches_into_a_small_tensor():
    everything = encoded(vector(MIXED), "topk:1+float32", MIXED)
    assert everything.startswith(varint(LARGE_OF_MIXED))
    indices = decoded(everything, "topk:1+float32", MIXED).indices
    assert indices[:SMALL_OF_MIXED].tolist() == np.flatnonzero(is_small(MIXED)).tolist()
    assert indices[SMALL_OF_MIXED:].tolist() == np.flatnonzero(~is_small(MIXED)).tolist()
    with pytest.raises(DecodeError, match=f"at most {LARGE_OF_MIXED} expected, not {LARGE_OF_MIXED + 1}"):
        decoded(varint(LARGE_OF_MIXED + 1) + everything[2:], "topk:1+float32", MIXED)


def test_not_a_number_is_decoded_for_the_receiver_to_refuse():
    payload = struct.pack("<2f", float("nan"), 1.0)
    assert not decoded(payload, "float32", layout(scale=2)).is_finite()


def test_a_vector_of_another_size_is_not_encoded():
    with pytest.raises(ManifestMismatchError, match="has 2 elements, not 3"):
        encode(np.zeros(3, np.float32), parse_codec("int8"), manifest=layout(scale=2))


UNBIASED = [name for name in QUANTIZERS if QUANTIZER_ENTRIES[parse_codec(name).quantizer.kind].is_unbiased]


@pytest.mark.parametrize("quantizer", UNBIASED)
@pytest.mark.parametrize("sparsifier", ["", "topk:0.3+"])
def test_the_mean_over_many_roundings_is_the_vector(quantizer, sparsifier):
    manifest, rounds = MANIFESTS["only large"], 400
    values = vector(manifest) * np.random.default_rng(9).exponential(size=manifest.size).astype(np.float32)
    received = [round_trip(values, sparsifier + quantizer, manifest, seed) for seed in range(rounds)]
    sent = slice(None) if received[0].indices is None else received[0].indices
    every = np.array([delta.dense()[sent] for delta in received], dtype=np.float64)
    errors = every.mean(axis=0) - values[sent]
    # A bias would come on top of what the variance leaves of the mean's error.
    assert np.square(errors).sum() <= 1.3 * every.var(axis=0).sum() / rounds + 1e-12
    assert np.abs(np.dot(errors, values[sent])) <= 5 * np.sqrt(every.var(axis=0) @ np.square(values[sent]) / rounds) + 1e-6


class TestWithoutAGenerator:
    @pytest.mark.parametrize("quantizer", ["float32", "float16", "bfloat16", "int8", "int4", "ternary", "qsgd:16", "sign", "stc"])
    def test_values_are_rounded_to_the_nearest(self, quantizer):
        values = vector(MIXED)
        payload = encode(values, parse_codec(quantizer), manifest=MIXED)
        assert payload == encode(values.copy(), parse_codec(quantizer), manifest=MIXED)
        error = np.abs(decoded(payload, quantizer, MIXED).values - values)
        if quantizer in UNIFORM:
            assert (error[~is_small(MIXED)] <= np.abs(values).max() / UNIFORM[quantizer] * 0.5 * (1 + 1e-5)).all()

    @pytest.mark.parametrize("codec", ["eden:1", "topk:0.01+eden:4", "randomk:0.1+float32"])
    def test_a_codec_that_sends_a_seed_is_a_configuration_error(self, codec):
        with pytest.raises(ConfigurationError, match="draws a seed: pass a generator"):
            encode(vector(MIXED), parse_codec(codec), manifest=MIXED)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("float32", Codec(Stage("float32"))),
        ("topk:0.01+int4", Codec(Stage("int4"), Stage("topk", 0.01))),
        ("topk:1+bfloat16", Codec(Stage("bfloat16"), Stage("topk", 1.0))),
        ("topk:1e-3+int8", Codec(Stage("int8"), Stage("topk", 0.001))),
        ("topk:1e+0+int8", Codec(Stage("int8"), Stage("topk", 1.0))),
        ("topk-per-tensor:.5+sign", Codec(Stage("sign"), Stage("topk-per-tensor", 0.5))),
        ("randomk:0.05+qsgd:16", Codec(Stage("qsgd", 16), Stage("randomk", 0.05))),
        ("threshold:12+eden:4", Codec(Stage("eden", 4), Stage("threshold", 12.0))),
    ],
)
def test_a_codec_is_parsed(name, codec):
    assert parse_codec(name) == codec
    assert parse_codec(codec.name) == codec


@settings(deadline=None, max_examples=300)
@given(
    argument=st.floats(1e-300, 1) | st.floats(0, 1, exclude_min=True),
    sparsifier=st.none() | st.sampled_from([kind for kind, entry in SPARSIFIER_ENTRIES.items() if entry.argument == "density"]),
    quantizer=st.sampled_from([*QUANTIZERS, "qsgd:127"]),
)
def test_the_name_of_a_codec_says_all_of_it_in_64_characters(argument, sparsifier, quantizer):
    codec = Codec(parse_codec(quantizer).quantizer, None if sparsifier is None else Stage(sparsifier, argument))
    assert parse_codec(codec.name) == codec
    assert len(codec.name) <= 64


def test_every_entry_of_the_registry_is_tested():
    assert {parse_codec(name).quantizer.kind for name in QUANTIZERS} == set(QUANTIZER_ENTRIES)
    assert {parse_codec(name).sparsifier.kind for name in SPARSE} == set(SPARSIFIER_ENTRIES)
    for kind, entry in SPARSIFIER_ENTRIES.items():
        assert parse_codec(f"{entry.example}+int4").sparsifier.kind == kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown quantizer ''"),
        ("int5", "unknown quantizer 'int5' in codec 'int5': did you mean"),
        ("INT8", "unknown quantizer 'INT8'"),
        ("topk:0.01", "names no quantizer: expected one behind it, as in topk:0.01[+]int4"),
        ("topk:0.01+", "unknown quantizer ''"),
        ("+int4", "names no sparsifier before"),
        ("topq:0.01+int4", "unknown sparsifier 'topq' in codec 'topq:0.01[+]int4': did you mean 'topk'"),
        ("topk+int4", "the density of topk must be a number, as in topk:0.01"),
        ("topk:+int4", "must be a number"),
        ("topk:much+int4", "must be a number"),
        ("topk:0_1+int4", "must be a number"),
        ("topk: 0.1+int4", "must be a number"),
        ("topk:0+int4", "over 0 and at most 1, not 0"),
        ("topk:-0.1+int4", "must be a number"),
        ("topk:1.01+int4", "over 0 and at most 1"),
        ("topk:nan+int4", "must be a number"),
        ("topk:1e-400+int4", "over 0 and at most 1"),
        ("topk:0.1+topk:0.1+int4", "must be a number"),
        ("randomk:2+int4", "over 0 and at most 1"),
        ("threshold+int4", "the threshold of threshold must be a number, as in threshold:0.001"),
        ("threshold:0+int4", "a threshold must be a float32 over 0"),
        ("threshold:1e39+int4", "a threshold must be a float32 over 0"),
        ("int4:3", "int4 takes no argument"),
        ("int4:", "int4 takes no argument"),
        ("qsgd", "qsgd takes a number from 1 to 127, as in qsgd:1"),
        ("qsgd:128", "qsgd takes a number from 1 to 127"),
        ("qsgd:0", "qsgd takes a number"),
        ("qsgd:1.5", "qsgd takes a number"),
        ("qsgd:016", "qsgd takes a number"),
        ("eden:5", "eden takes a number from 1 to 4"),
        ("topk:0.01" + "0" * 60 + "+int4", "at most 64 characters"),
    ],
)
def test_a_codec_that_cannot_be_is_a_configuration_error(name, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_codec(name)


@PROPERTY
@given(
    st.text(max_size=70)
    | st.from_regex(r"((topk|randomk|threshold):[0-9.e+-]{0,8}\+)?(int4|int8|float32|qsgd:[0-9]{1,4}|eden:[0-9])", fullmatch=True)
)
def test_any_text_is_a_codec_or_a_configuration_error(name):
    try:
        codec = parse_codec(name)
    except ConfigurationError:
        return
    assert codec.density is None or 0 < codec.density <= 1
    assert parse_codec(codec.name) == codec


def test_the_density_of_a_codec_can_be_set_where_it_has_one():
    assert parse_codec("topk:0.01+int4").with_density(0.25).name == "topk:0.25+int4"
    assert parse_codec("randomk:0.01+eden:1").with_density(1).name == "randomk:1+eden:1"
    for name in ("int4", "threshold:0.1+int4"):
        with pytest.raises(ConfigurationError, match="has no density to set: name a sparsifier that has one"):
            parse_codec(name).with_density(0.1)
    for density in (0, -1, 1.1, float("nan")):
        with pytest.raises(ConfigurationError, match="over 0 and at most 1"):
            parse_codec("topk:0.01+int4").with_density(density)


@pytest.mark.parametrize("name", ["int8", "float32", "float16"])
def test_threads_that_ask_for_a_codec_at_the_same_moment_get_one_that_is_whole(name):
    """A cache that several threads find empty gives each an object of its own."""
    codec_module._built.cache_clear()
    together = threading.Barrier(8)

    def asks(_):
        together.wait()
        small, large = codec_module.quantizers_of(parse_codec(name))
        return small is large

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(asks, range(8)))


def test_small_and_large_tensors_of_a_dense_codec_are_one_however_often_it_is_built(monkeypatch):
    build = codec_module._built.__wrapped__
    monkeypatch.setattr(codec_module, "_built", lambda stage: copy.copy(build(stage)))
    small, large = codec_module.quantizers_of(parse_codec("int8"))
    assert small is large
    small, large = codec_module.quantizers_of(parse_codec("int4"))
    assert small is not large
