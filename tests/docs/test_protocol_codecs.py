"""The section "Codecs" of docs/protocol.md against the code: a decoder written from it alone reads and refuses the same."""

import struct
from collections import Counter
from itertools import accumulate

import by_the_document
import numpy as np
import pytest
from by_the_document import Bytes, RefusedError, as_bits
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.chain import rounded
from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.codecs.entropy import ANS, FIXED, decode_symbols, encode_symbols
from broker_fl.codecs.reader import Reader
from broker_fl.codecs.registry import QUANTIZERS, SPARSIFIERS
from broker_fl.config import KEYFRAME_CODECS
from broker_fl.errors import DecodeError
from schemas.manifest import Manifest, TensorSpec

QUANTIZER_NAMES = [
    *("float32", "float16", "bfloat16", "int8", "int4", "ternary", "sign", "stc"),
    *("qsgd:1", "qsgd:3", "qsgd:127", "eden:1", "eden:2", "eden:3", "eden:4"),
]
SPARSIFIER_NAMES = ["topk:0.03", "topk:.6", "topk:1", "topk-per-tensor:0.2", "threshold:0.5", "threshold:1e6", "randomk:0.3"]
CODECS = [*QUANTIZER_NAMES, *(f"{sparsifier}+{quantizer}" for sparsifier in SPARSIFIER_NAMES for quantizer in QUANTIZER_NAMES)]

SIZES = st.lists(st.integers(1, 40) | st.sampled_from([1024, 1025]) | st.integers(1025, 2600), min_size=1, max_size=3)
PROPERTY = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])


def _manifest(sizes):
    offsets = [0, *accumulate(sizes)]
    return Manifest(tensors=tuple(TensorSpec(name=str(i), shape=(size,), offset=offsets[i]) for i, size in enumerate(sizes)))


def _vector(sizes, seed):
    """Uneven, and with a few large values, so that blocks of gaps differ, and the histogram is worth its bytes."""
    drawn = np.random.default_rng(seed)
    return (drawn.standard_t(3, sum(sizes)) * np.geomspace(0.1, 10, sum(sizes))).astype(np.float32)


def _encoded(codec, sizes, seed):
    generator = np.random.default_rng(seed)
    return encode(_vector(sizes, seed), parse_codec(codec), manifest=_manifest(sizes), generator=generator)


def _by_the_code(payload, codec, sizes):
    """Values by index; None where it is refused."""
    try:
        delta = decode(payload, parse_codec(codec), manifest=_manifest(sizes))
    except DecodeError:
        return None
    indices = range(delta.size) if delta.indices is None else delta.indices.tolist()
    return dict(zip(indices, as_bits(delta.values.tolist()), strict=True))


def _by_the_document(payload, codec, sizes):
    try:
        found = by_the_document.decoded(payload, codec, sizes)
    except RefusedError:
        return None
    return dict(zip(found, as_bits(found.values()), strict=True))


def _expect_the_same(payload, codec, sizes):
    by_the_code = _by_the_code(payload, codec, sizes)
    assert _by_the_document(payload, codec, sizes) == by_the_code
    return by_the_code


def test_every_sparsifier_and_quantizer_is_among_the_codecs():
    parsed = [parse_codec(codec) for codec in CODECS]
    assert {codec.quantizer.kind for codec in parsed} == set(QUANTIZERS)
    assert {codec.sparsifier.kind for codec in parsed if codec.sparsifier} == set(SPARSIFIERS)


@pytest.mark.parametrize("codec", CODECS)
@PROPERTY
@given(seed=st.integers(0, 2**32), sizes=SIZES)
@example(seed=1, sizes=[3, 2600, 1025])
@example(seed=1, sizes=[7])
def test_the_document_alone_is_enough_to_decode_what_the_code_encodes(codec, seed, sizes):
    assert _expect_the_same(_encoded(codec, sizes, seed), codec, sizes) is not None


@pytest.mark.parametrize("codec", CODECS)
@settings(PROPERTY, max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 40) | st.sampled_from([1025, 1300]), min_size=1, max_size=2),
    changes=st.lists(st.tuples(st.integers(0, 60) | st.integers(0, 2**20), st.integers(1, 255)), max_size=3),
    cut=st.sampled_from([0, 0, 0, 0, 1, 4, 400]),
    more=st.sampled_from([b"", b"", b"", b"\x00", b"\x00\x00\x00\x01"]),
)
def test_what_the_document_refuses_is_what_the_code_refuses(codec, seed, sizes, changes, cut, more):
    payload = bytearray(_encoded(codec, sizes, seed))
    for at, change in changes:
        payload[at % len(payload)] ^= change
    _expect_the_same(bytes(payload[: len(payload) - cut]) + more, codec, sizes)


@settings(PROPERTY, max_examples=300)
@given(payload=st.binary(max_size=80), codec=st.sampled_from(CODECS), sizes=st.sampled_from([[2], [1025], [3, 1100]]))
def test_random_bytes_are_refused_by_both_or_read_alike(payload, codec, sizes):
    _expect_the_same(payload, codec, sizes)


ONES = b"\x00\x00\x80\x3f"
"""The float32 1."""


@pytest.mark.parametrize(
    ("payload", "codec", "sizes", "is_taken"),
    [
        (b"\x00", "topk:0.5+float32", [1025], True),
        (b"\x80\x00", "topk:0.5+float32", [1025], False),
        (b"\x81\x80\x80\x80\x80\x00", "topk:0.5+float32", [1025], False),
        (b"\x82\x08" + ONES * 1026, "topk:0.5+float32", [1025], False),
        (b"\x81\x08" + ONES * 1025, "topk:0.5+float32", [1025], True),
        (b"\x01\x00\x01\x80" + ONES, "topk:0.5+float32", [1025], True),
        (b"\x01\x00\x02\x80\x00" + ONES, "topk:0.5+float32", [1025], True),
        (b"\x01\x00\x01\xc0" + ONES, "topk:0.5+float32", [1025], False),
        (b"\x01\x00\x81\x01\x80" + bytes(128) + ONES, "topk:0.5+float32", [1025], True),
        (b"\x01\x00\x82\x01\x80" + bytes(129) + ONES, "topk:0.5+float32", [1025], False),
        (b"\x01\x00\x81\x01" + bytes(128) + b"\x80" + ONES, "topk:0.5+float32", [1025], True),
        (b"\x01\x00\x81\x01" + bytes(128) + b"\x40" + ONES, "topk:0.5+float32", [1025], False),
        (b"\x01\x01\x01\xff\x80" + ONES, "topk:0.5+float32", [1025], True),
        (b"\x01\x18\x01" + bytes(24) + b"\x80" + ONES, "topk:0.5+float32", [1025], True),
        (b"\x01\x19\x01" + bytes(25) + b"\x80" + ONES, "topk:0.5+float32", [1025], False),
        (b"\x00" * 8 + ONES, "randomk:1e-9+float32", [1025], True),
        (b"\x00\x00\x80\xff" + b"\x00\x07", "int8", [1], False),
        (b"\x00\x00\x80\x7f" + b"\x00\x07", "int8", [1], False),
        (b"\x00\x00\x00\x80" + b"\x00\x07", "int8", [1], True),
        (ONES + b"\x00\xfe", "int8", [1], True),
        (ONES + b"\x00\xff", "int8", [1], False),
        (ONES + b"\x02\xfe", "int8", [1], False),
        (ONES + b"\x01\x05\x06\x01\x01\x00", "int8", [1], True),
        (ONES + b"\x01\x05\x05\x01\x00", "int8", [1], False),
        (ONES + b"\x01\x05\x06\x00\x00\x00", "int8", [1], False),
        (b"\x00" * 9 + b"\x00", "eden:1", [1], False),
        (ONES + b"\x00\x7f" + b"\x00" * 8 + b"\x00", "eden:1", [1], True),
        (ONES + b"\x00\x7f" + b"\x00" * 8, "eden:1", [1], False),
        (ONES + b"\x00\x7f" + b"\x00", "ternary", [1], True),
        (ONES + b"\x00\x7f", "ternary", [1], False),
        (ONES + b"\x00\x7f" + ONES + b"\x00", "stc", [1], False),
        (ONES + b"\x00\x7f" + b"\x00", "stc", [1], True),
    ],
)
def test_the_edges_of_what_is_taken_are_those_of_the_document(payload, codec, sizes, is_taken):
    assert (_expect_the_same(payload, codec, sizes) is not None) == is_taken


@settings(PROPERTY, max_examples=200)
@given(written=st.binary(max_size=7) | st.integers(0, 2**36).map(by_the_document.varint), most=st.integers(0, 2**36))
def test_numbers_of_any_length_read_alike(written, most):
    data, reader = Bytes(written), Reader(written)
    try:
        by_the_code = reader.varint("a number", most=most)
        reader.finish()
    except DecodeError:
        by_the_code = None
    try:
        by_document = data.varint(most=most)
        data.end()
    except RefusedError:
        by_document = None
    assert by_document == by_the_code


@settings(PROPERTY, max_examples=60)
@given(data=st.data(), size=st.integers(1025, 4000))
def test_ranks_cut_anywhere_up_to_24_bits_decode(data, size):
    k = data.draw(st.integers(1, size - 1))
    ranks = sorted(np.random.default_rng(k).choice(size, k, replace=False).tolist())
    cuts = [data.draw(st.integers(0, 12) | st.integers(13, 25)) for _ in range(-(-k // 512))]
    values = np.arange(k, dtype=np.float32)
    payload = by_the_document.ranks_encoded(ranks, cuts) + values.tobytes()
    found = _expect_the_same(payload, "topk:0.5+float32", [size])
    assert found == (dict(zip(ranks, as_bits(values.tolist()), strict=True)) if max(cuts) <= 24 else None)


@settings(PROPERTY, max_examples=200)
@given(data=st.data(), first=st.integers(0, 200), weights=st.binary(min_size=2, max_size=40).filter(any))
def test_any_histogram_and_words_read_alike(data, first, weights):
    alphabet = first + len(weights) + data.draw(st.integers(-1, 2))
    count = data.draw(st.integers(0, 60))
    words = data.draw(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**24, 2**32 - 1]), max_size=6))
    head = bytes([ANS, first, first + len(weights) - 1]) + weights
    payload = head + by_the_document.varint(len(words)) + struct.pack(f"<{len(words)}I", *words)
    _expect_the_same_symbols(payload, count, alphabet)


def _expect_the_same_symbols(payload, count, alphabet):
    data, reader = Bytes(payload), Reader(payload)
    try:
        by_the_code = decode_symbols(reader, count, alphabet=alphabet).tolist()
        reader.finish()
    except DecodeError:
        by_the_code = None
    try:
        by_document = by_the_document.symbols(data, count, alphabet)
        data.end()
    except RefusedError:
        by_document = None
    assert by_document == by_the_code
    return by_the_code


@settings(PROPERTY, max_examples=100)
@given(data=st.data(), first=st.integers(0, 200), weights=st.binary(min_size=2, max_size=40).filter(any))
def test_symbols_that_are_encoded_by_the_document_decode(data, first, weights):
    last = first + len(weights) - 1
    found = data.draw(st.lists(st.integers(first, last), max_size=60)) * data.draw(st.integers(1, 5))
    payload = by_the_document.ans_encoded(found, first, weights)
    if len(payload) - len(weights) - 4 <= 4 * (-(-3 * len(found) // 4) + 2):
        assert _expect_the_same_symbols(payload, len(found), last + 1) == found


@pytest.mark.parametrize("alphabet", [2, 3, 4, 8, 15, 16, 33, 200, 256])
@pytest.mark.parametrize("count", [2000, 5001])
def test_the_code_encodes_symbols_to_the_bytes_that_the_document_says(alphabet, count):
    drawn = np.random.default_rng(count).normal(alphabet / 3, alphabet / 12, count)
    found = np.clip(drawn, 0, alphabet - 1).astype(np.uint8)
    payload = encode_symbols(found, alphabet=alphabet)
    mode, first, last = payload[:3]
    assert mode == ANS
    assert payload == by_the_document.ans_encoded(found.tolist(), first, payload[3 : 4 + last - first])
    assert _expect_the_same_symbols(payload, count, alphabet) == found.tolist()


def test_both_modes_and_uneven_blocks_of_gaps_are_among_what_is_compared():
    modes = Counter()
    for alphabet in (2, 3, 15, 255):
        for count in (5, 2600):
            drawn = np.random.default_rng(0).standard_t(3, count) * alphabet / 20 + alphabet / 2
            modes[encode_symbols(np.clip(drawn, 0, alphabet - 1).astype(np.uint8), alphabet=alphabet)[0]] += 1
    assert set(modes) == {FIXED, ANS}
    payload = _encoded("topk:.6+int4", [3, 2600, 1025], 1)
    assert len(set(payload[2:7])) > 1


@PROPERTY
@given(counts=st.lists(st.integers(0, 10) | st.integers(0, 3000), min_size=2, max_size=60).filter(any))
@example(counts=[0, 400, 1])
@example(counts=[9000, 0, 0, 1])
def test_any_histogram_is_coded_by_integers_that_the_document_says(counts):
    found = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.uint8)
    payload = encode_symbols(found, alphabet=256)
    assert _expect_the_same_symbols(payload, found.size, 256) == found.tolist()
    mode, first, *_ = payload
    if mode == ANS:
        assert payload == by_the_document.ans_encoded(found.tolist(), first, payload[3 : 4 + payload[2] - first])


@pytest.mark.parametrize("codec", KEYFRAME_CODECS)
@settings(PROPERTY, max_examples=100)
@given(
    vector=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    times=st.sampled_from([1, 1, 60]),
    scale=st.sampled_from([1.0, 1e-38, 2.0**-133]),
)
@example(vector=[3.4028234663852886e38, -1.0], times=1, scale=1.0)
@example(vector=[65519.0, -65520.0, -0.0, 2.0**-25], times=1, scale=1.0)
@example(vector=[127.0, 0.5, 1.5, -2.5], times=1, scale=1.0)
def test_a_vector_is_rounded_to_the_bits_that_the_document_says(codec, vector, times, scale):
    values = (np.array(vector * times, np.float32) * np.float32(scale)).astype(np.float32)
    found = rounded(values, codec, manifest=_manifest([values.size]))[1]
    assert as_bits(by_the_document.rounded(values.tolist(), codec)) == as_bits(found.tolist())


@pytest.mark.parametrize(("codec", "is_untouched"), [("topk:0.1+int8", True), ("int8", False)])
def test_an_element_that_a_sparse_payload_leaves_out_keeps_its_sign_of_zero(codec, is_untouched):
    model = np.full(2000, -0.0, np.float32)
    payload = encode(np.zeros(2000, np.float32), parse_codec(codec), manifest=_manifest([2000]))
    delta = decode(payload, parse_codec(codec), manifest=_manifest([2000]))
    delta.add_to(model)
    assert np.signbit(model).sum() == (2000 - 200 if is_untouched else 0)
