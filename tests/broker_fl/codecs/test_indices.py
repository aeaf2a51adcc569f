import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.indices import GAPS, decode_indices, encode_indices, entropy_bits_per_index
from broker_fl.codecs.reader import Reader, varint
from broker_fl.errors import DecodeError

PROPERTY = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def _drawn(size: int, density: float, seed: int = 5) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(size, round(size * density), replace=False))


def _decoded(payload: bytes, size: int) -> np.ndarray:
    reader = Reader(payload)
    indices = decode_indices(reader, size=size)
    reader.finish()
    return indices


def _bits_per_index(indices: np.ndarray) -> float:
    """All bytes counted."""
    return 8 * len(encode_indices(indices)) / indices.size


@PROPERTY
@given(st.sets(st.integers(0, 2**31 - 2), max_size=50), st.integers(0, 100), st.binary(max_size=20))
def test_indices_come_back_as_they_were(numbers, beyond, following):
    indices = np.array(sorted(numbers), dtype=np.int64)
    size = (int(indices[-1]) if indices.size else 0) + 1 + beyond
    encoded = encode_indices(indices, size=size)
    reader = Reader(encoded + following)
    decoded = decode_indices(reader, size=size)
    assert decoded.dtype == np.int64
    assert decoded.tolist() == indices.tolist()
    assert reader.at == len(encoded)


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 1500)), min_size=1, max_size=6), st.integers(0, 99))
def test_blocks_of_different_gaps_come_back_as_they_were(runs, seed):
    generator = np.random.default_rng(seed)
    gaps = np.concatenate([generator.integers(1, 2 + 2**bits, count) for bits, count in runs])
    indices = np.cumsum(gaps) - 1
    size = int(indices[-1]) + 1
    assert _decoded(encode_indices(indices, size=size), size).tolist() == indices.tolist()


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
    assert _decoded(encode_indices(indices), 2**31 - 1).tolist() == indices.tolist()


def test_all_or_none_cost_only_their_number():
    assert encode_indices(np.arange(8000), size=8000) == varint(8000)
    assert _decoded(varint(8000), 8000).tolist() == list(range(8000))
    assert encode_indices(np.arange(0), size=8000) == b"\x00"
    assert _decoded(b"\x00", 8000).tolist() == []


def test_dense_choices_cost_a_bit_for_each_element_as_in_a_bitmap():
    indices = _drawn(80_000, 0.5)
    encoded = encode_indices(indices, size=80_000)
    blocks = -(-indices.size // GAPS)
    assert encoded[3 : 3 + blocks] == bytes(blocks)
    assert len(encoded) <= 10_000 + blocks + 10
    assert np.unpackbits(np.frombuffer(encoded[-10_000:], np.uint8))[: indices[-1] + 1].nonzero()[0].tolist() == indices.tolist()


def test_the_layout_is_number_then_parameters_then_planes_then_high_stream():
    # Gaps 3, 0, 5 at one low bit: low bits 1 0 1; high parts 1, 0, 2 in unary: 01 1 001.
    assert encode_indices(np.array([3, 4, 10])) == bytes([3, 1, 1, 0b101_00000, 0b01_1_001_00])


def test_a_plane_has_bits_only_of_blocks_whose_parameter_is_above_it():
    indices = np.concatenate([np.arange(GAPS), np.array([GAPS + 976, GAPS + 1976])])
    encoded = encode_indices(indices)
    # Two gaps in the second block, 976 and 999 = 0b1111010000 and 0b1111100111 at nine low bits: nine planes of two bits.
    assert encoded[:5] == varint(GAPS + 2) + bytes([0, 9]) + varint((GAPS + 4 + 7) // 8)
    assert encoded[5:14] == bytes([0b01000000, 0b01000000, 0b01000000, 0, 0b10000000, 0b01000000, *[0b11000000] * 3])
    assert _decoded(encoded, 3001).tolist() == indices.tolist()


@pytest.mark.parametrize("density", [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1])
@pytest.mark.parametrize("size", [10**6, 11 * 10**6])
def test_an_index_costs_at_most_two_percent_over_the_limit(size, density):
    indices = _drawn(size, density)
    assert _bits_per_index(indices) <= 1.02 * entropy_bits_per_index(size=size, count=indices.size)


def test_no_density_costs_more_than_two_and_a_half_percent_over_the_limit():
    for density in np.geomspace(0.001, 0.1, 50):
        indices = _drawn(10**6, density)
        assert _bits_per_index(indices) <= 1.025 * entropy_bits_per_index(size=10**6, count=indices.size)


def test_uneven_choices_cost_less_than_the_limit_for_even_ones():
    uneven = np.concatenate([_drawn(10**6, 0.001), 10**6 + _drawn(10**5, 0.09)])
    assert _bits_per_index(uneven) <= 0.75 * entropy_bits_per_index(size=1_100_000, count=uneven.size)


def test_the_limit_is_that_of_counting():
    assert entropy_bits_per_index(size=4, count=2) == pytest.approx(np.log2(6) / 2)
    assert entropy_bits_per_index(size=10**7, count=10**5) == pytest.approx(8.08, abs=0.005)


def test_the_same_indices_give_the_same_bytes():
    indices = _drawn(10**5, 0.03)
    assert encode_indices(indices) == encode_indices(indices.copy())


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "number of indices: 1 bytes expected"),
        (varint(101), "number of indices: at most 100 expected, not 101"),
        (varint(2**32 - 1), "number of indices: at most 100 expected"),
        (b"\x01", "Rice parameters: 1 bytes expected, 0 are left"),
        (bytes([1, 25, 1]) + b"\x80" * 40, "a Rice parameter of 25 is over 24"),
        (bytes([1, 0]) + varint(2**32), "bytes of the high stream: at most 13 expected, not 4294967296"),
        (bytes([1, 0, 14]) + bytes(14), "bytes of the high stream: at most 13 expected, not 14"),
        (bytes([2, 0, 1]), "high stream: 1 bytes expected, 0 are left"),
        (bytes([2, 1, 1]), "plane 0 of the indices: 1 bytes expected, 0 are left"),
        (bytes([2, 0, 1, 0x80]), "ends 1 gaps, not 2"),
        (bytes([2, 0, 1, 0xE0]), "ends 3 gaps, not 2"),
        (bytes([1, 7, 1]) + b"\x80" * 7 + b"\x80", "index 127 is beyond 100"),
        (bytes([1, 24, 1]) + b"\x80" * 24 + b"\x80", "index 16777215 is beyond 100"),
        (bytes([2, 6, 1]) + b"\xc0" * 6 + b"\xc0", "index 127 is beyond 100"),
    ],
)
def test_an_encoding_that_cannot_be_is_a_decode_error(payload, message):
    with pytest.raises(DecodeError, match=message):
        _decoded(payload, 100)


def test_the_last_index_of_a_vector_is_within_and_the_next_beyond():
    encoded = encode_indices(np.array([99]))
    assert _decoded(encoded, 100).tolist() == [99]
    with pytest.raises(DecodeError, match="index 99 is beyond 99"):
        _decoded(encoded, 99)


@settings(PROPERTY, max_examples=300)
@given(
    count=st.integers(0, 300),
    bits=st.integers(0, 25),
    high_bytes=st.integers(0, 60),
    rest=st.binary(max_size=300),
    size=st.integers(1, 300) | st.just(2**31 - 1),
)
def test_whatever_decodes_is_ascending_and_within_the_vector(count, bits, high_bytes, rest, size):
    reader = Reader(varint(count) + bytes([bits]) + varint(high_bytes) + rest)
    try:
        decoded = decode_indices(reader, size=size)
    except DecodeError:
        return
    assert decoded.size == count
    assert (np.diff(decoded, prepend=-1) > 0).all()
    assert (decoded < size).all()
    assert reader.at <= len(reader.payload)


def test_the_largest_gaps_do_not_overflow():
    size = 2**31 - 1
    high = b"\xff" * (GAPS // 8) + bytes(2**20) + b"\x01"
    with pytest.raises(DecodeError, match=r"index \d+ is beyond"):
        _decoded(varint(GAPS + 1) + bytes([0, 24]) + varint(len(high)) + b"\x80" * 24 + high, size)


def test_nonsense_takes_no_memory():
    tracemalloc.start()
    for payload in (varint(2**31 - 1) + bytes(1000), varint(2**30) + bytes(1000), b"\xff" * 1000):
        with pytest.raises(DecodeError):
            _decoded(payload, 2**31 - 1 + 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
