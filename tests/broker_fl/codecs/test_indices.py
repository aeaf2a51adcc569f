import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.indices import decode_indices, encode_indices, entropy_bits_per_index
from broker_fl.errors import DecodeError

PROPERTY = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
HEADER_BYTES = 9


def _drawn(size: int, density: float) -> np.ndarray:
    return np.sort(np.random.default_rng(5).choice(size, round(size * density), replace=False))


def _bits_per_index(indices: np.ndarray) -> float:
    return 8 * (len(encode_indices(indices)) - HEADER_BYTES) / indices.size


@PROPERTY
@given(st.sets(st.integers(0, 2**31 - 2), max_size=50), st.integers(0, 100), st.binary(max_size=20))
def test_indices_come_back_as_they_were(numbers, beyond, following):
    indices = np.array(sorted(numbers), dtype=np.int64)
    encoded = encode_indices(indices)
    size = (int(indices[-1]) if indices.size else 0) + 1 + beyond
    decoded = decode_indices(encoded + following, size=size)
    assert decoded.indices.dtype == np.int64
    assert decoded.indices.tolist() == indices.tolist()
    assert decoded.end == len(encoded)


@pytest.mark.parametrize(
    "indices",
    [
        [],
        [0],
        [2**31 - 2],
        [0, 2**31 - 2],
        range(100),
        range(0, 10_000, 37),
        [*range(500), 10**9],
        [0, *range(10**6, 10**6 + 500)],
    ],
)
def test_uneven_gaps_come_back_as_they_were(indices):
    indices = np.array(indices, dtype=np.int64)
    assert decode_indices(encode_indices(indices), size=2**31 - 1).indices.tolist() == indices.tolist()


def test_all_indices_of_a_vector_cost_one_bit_each():
    encoded = encode_indices(np.arange(8000))
    assert len(encoded) == HEADER_BYTES + 1000
    assert decode_indices(encoded, size=8000).indices.tolist() == list(range(8000))


def test_the_layout_is_header_then_low_planes_then_unary_high_stream():
    # Gaps 3, 0, 5 at one low bit: low bits 1 0 1; high parts 1, 0, 2 in unary: 01 1 001.
    encoded = encode_indices(np.array([3, 4, 10]))
    assert encoded == struct.pack("<IBI", 3, 1, 1) + bytes([0b101_00000, 0b01_1_001_00])


@pytest.mark.parametrize("density", [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1])
def test_an_index_costs_at_most_two_percent_over_the_limit(density):
    indices = _drawn(10**6, density)
    assert _bits_per_index(indices) <= 1.02 * entropy_bits_per_index(size=10**6, count=indices.size)


def test_no_density_costs_more_than_two_and_a_half_percent_over_the_limit():
    for density in np.geomspace(0.001, 0.1, 50):
        indices = _drawn(10**6, density)
        assert _bits_per_index(indices) <= 1.025 * entropy_bits_per_index(size=10**6, count=indices.size)


def test_the_limit_is_that_of_counting():
    assert entropy_bits_per_index(size=4, count=2) == pytest.approx(np.log2(6) / 2)
    assert entropy_bits_per_index(size=10**7, count=10**5) == pytest.approx(8.08, abs=0.005)


def test_the_same_indices_give_the_same_bytes():
    indices = _drawn(10**5, 0.03)
    assert encode_indices(indices) == encode_indices(indices.copy())


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "the index header has 9 bytes"),
        (struct.pack("<IBI", 1, 0, 1)[:-1], "the index header has 9 bytes"),
        (struct.pack("<IBI", 101, 0, 13), "101 indices into 100 parameters"),
        (struct.pack("<IBI", 2**32 - 1, 31, 2**32 - 1), "indices into 100 parameters"),
        (struct.pack("<IBI", 1, 32, 1) + b"\x80" * 40, "a Rice parameter of 32"),
        (struct.pack("<IBI", 1, 0, 2**32 - 1), "high stream of 4294967295 bytes is longer"),
        (struct.pack("<IBI", 1, 0, 14) + bytes(14), "longer than 1 indices below 100 can need"),
        (struct.pack("<IBI", 2, 0, 1), "the indices need 10 bytes, the payload has 9"),
        (struct.pack("<IBI", 2, 1, 1) + b"\xc0", "the indices need 11 bytes, the payload has 10"),
        (struct.pack("<IBI", 2, 0, 1) + b"\x80", "ends 1 gaps, not 2"),
        (struct.pack("<IBI", 2, 0, 1) + b"\xe0", "ends 3 gaps, not 2"),
        (struct.pack("<IBI", 0, 0, 1) + b"\x01", "ends 1 gaps, not 0"),
        (struct.pack("<IBI", 1, 7, 1) + b"\x80" * 7 + b"\x80", "index 127 is beyond 100"),
        (struct.pack("<IBI", 1, 31, 1) + b"\x80" * 31 + b"\x80", "index 2147483647 is beyond 100"),
    ],
)
def test_an_encoding_that_cannot_be_is_a_decode_error(payload, message):
    with pytest.raises(DecodeError, match=message):
        decode_indices(payload, size=100)


def test_the_last_index_of_a_vector_is_within_and_the_next_beyond():
    encoded = encode_indices(np.array([99]))
    assert decode_indices(encoded, size=100).indices.tolist() == [99]
    with pytest.raises(DecodeError, match="index 99 is beyond 99"):
        decode_indices(encoded, size=99)


@PROPERTY
@given(
    header=st.tuples(st.integers(0, 300), st.integers(0, 40), st.integers(0, 60)),
    rest=st.binary(max_size=300),
    size=st.integers(1, 300),
)
def test_whatever_decodes_is_ascending_and_within_the_vector(header, rest, size):
    try:
        decoded = decode_indices(struct.pack("<IBI", *header) + rest, size=size)
    except DecodeError:
        return
    assert decoded.indices.size == header[0]
    assert (np.diff(decoded.indices, prepend=-1) > 0).all()
    assert (decoded.indices < size).all()
    assert decoded.end <= HEADER_BYTES + len(rest)


def test_nonsense_takes_no_memory():
    tracemalloc.start()
    for payload in (struct.pack("<IBI", 2**31 - 1, 31, 2**28), struct.pack("<IBI", 2**31 - 1, 0, 2**28) + bytes(1000)):
        with pytest.raises(DecodeError):
            decode_indices(payload, size=2**31 - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
