import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_fl.codecs.entropy import decode_symbols
from broker_fl.codecs.quantize import BLOCK
from broker_fl.codecs.reader import Reader
from broker_fl.codecs.rotation import eden, hadamard
from broker_fl.codecs.splitmix import splitmix64
from broker_fl.errors import ConfigurationError, DecodeError

BITS = [1, 2, 3, 4]


def _generator(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def _there_and_back(values: np.ndarray, bits: int, seed: int = 3) -> np.ndarray:
    encoded = eden(bits).encode(values, _generator(seed))
    assert len(encoded) <= eden(bits).length(values.size)
    reader = Reader(encoded)
    decoded = eden(bits).decode(reader, values.size)
    reader.finish()
    return decoded


def _matrix(width: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix


@pytest.mark.parametrize("width", [1, 2, 4, 32, 64, 512, 1024])
def test_butterflies_multiply_by_the_hadamard_matrix(width):
    rows = _generator().integers(-9, 10, (3, width)).astype(np.float32)
    expected = rows @ _matrix(width)
    hadamard(rows)
    assert rows.tolist() == expected.tolist()


def test_butterflies_are_added_in_the_order_of_the_documentation():
    values = _generator().normal(size=(2, BLOCK)).astype(np.float32)
    expected, step = values.copy(), 1
    while step < BLOCK:
        for start in range(0, BLOCK, 2 * step):
            left, right = expected[:, start : start + step].copy(), expected[:, start + step : start + 2 * step].copy()
            expected[:, start : start + step], expected[:, start + step : start + 2 * step] = left + right, left - right
        step *= 2
    hadamard(values)
    assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_centroids_are_those_of_lloyd_and_max(bits):
    """Each is the mean of the normal distribution between the edges half-way to its neighbours."""
    centroids = eden(bits).centroids.astype(np.float64)
    grid = np.linspace(-12, 12, 2_400_001)
    density = np.exp(-np.square(grid) / 2)
    cell = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, grid)
    means = np.bincount(cell, grid * density) / np.bincount(cell, density)
    assert means == pytest.approx(centroids, abs=2e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100, 513, 1024, 1030, 70_000])
def test_values_come_back_in_their_number_and_near(bits, count):
    values = _generator(1).laplace(size=count).astype(np.float32)
    decoded = _there_and_back(values, bits)
    assert decoded.shape == values.shape
    assert decoded.dtype == np.float32
    if count >= 100:
        # The distortion of Lloyd-Max d, unbiased: d / (1 - d). (Max 1960, table 1.)
        expected = {1: 0.571, 2: 0.1331, 3: 0.0358, 4: 0.00959}[bits]
        assert np.square(decoded - values).sum() / np.square(values).sum() == pytest.approx(
            expected, rel=0.5 if count < 1000 else 0.1
        )


@pytest.mark.parametrize("bits", BITS)
def test_the_projection_on_what_was_encoded_is_kept(bits):
    for seed in range(5):
        values = _generator(seed).normal(size=3000).astype(np.float32)
        assert np.dot(_there_and_back(values, bits, seed), values) == pytest.approx(np.dot(values, values), rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_decoding_is_what_the_documentation_says(bits):
    values = _generator(1).normal(size=1024 + 5).astype(np.float32)
    encoded = eden(bits).encode(values, _generator())
    seed, *scales = struct.unpack_from("<Q2f", encoded)
    symbols = decode_symbols(Reader(encoded, 16), 1024 + 8, alphabet=2**bits)
    expected = eden(bits).centroids[symbols] * np.repeat(np.float32(scales), [1024, 8])
    for block in (expected[:1024], expected[1024:]):
        row = block.reshape(1, -1).copy()
        hadamard(row)
        block[:] = row[0]
    words = splitmix64(seed, start=0, count=17).tolist()
    for element in range(1032):
        if words[element // 64] >> (element % 64) & 1:
            expected[element] = -expected[element]
    assert eden(bits).decode(Reader(encoded), 1029).tobytes() == expected[:1029].tobytes()


def test_another_seed_gives_another_rotation():
    values = _generator(1).normal(size=500).astype(np.float32)
    assert _there_and_back(values, 1, seed=1).tolist() != _there_and_back(values, 1, seed=2).tolist()


@settings(deadline=None, max_examples=100)
@given(
    bits=st.sampled_from(BITS),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=80),
    copies=st.integers(1, 30),
)
def test_every_finite_vector_comes_back_finite_without_a_warning(bits, values, copies):
    values = np.tile(np.array(values, dtype=np.float32), copies)
    assert np.isfinite(_there_and_back(values, bits)).all()


@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_one_value_alone_come_back_exactly(bits):
    assert not _there_and_back(np.zeros(2000, np.float32), bits).any()
    alone = np.zeros(1024, np.float32)
    alone[77] = -3.5
    assert _there_and_back(alone, 1) == pytest.approx(alone, abs=1e-5)


def test_it_takes_its_bits_a_value_and_a_scale_for_each_block():
    values = _generator().normal(size=102_400).astype(np.float32)
    lengths = [len(eden(bits).encode(values, _generator())) for bits in BITS]
    assert lengths[0] == 8 + 400 + 1 + 12_800
    # Centroids of normal values are not equally often used.
    assert [round(8 * length / values.size, 1) for length in lengths] == [1.0, 1.9, 2.9, 3.8]


def test_without_a_generator_there_is_no_rotation():
    with pytest.raises(ConfigurationError, match="eden draws a seed"):
        eden(1).encode(np.ones(3, np.float32), None)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_is_a_decode_error(scale):
    with pytest.raises(DecodeError, match="scale is negative or not finite"):
        eden(1).decode(Reader(bytes(8) + struct.pack("<f", scale) + bytes(10)), 64)


def test_scales_that_overflow_give_infinities_for_the_receiver_to_refuse():
    payload = bytes(8) + struct.pack("<f", 3.4e38) + b"\x00" + b"\xff" * 8
    assert not np.isfinite(eden(1).decode(Reader(payload), 64)).all()
