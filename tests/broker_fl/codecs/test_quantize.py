import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.quantize import BFLOAT16, BLOCK, FLOAT16, FLOAT32, SIGN, STC, qsgd, uniform
from broker_fl.codecs.reader import Reader
from broker_fl.errors import DecodeError

QUANTIZERS = {
    "float32": FLOAT32,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "int8": uniform(127),
    "int4": uniform(7),
    "ternary": uniform(1),
    "qsgd": qsgd(16),
    "sign": SIGN,
    "stc": STC,
}
NAMES = sorted(QUANTIZERS)
INTEGERS = {"int8": 127, "int4": 7, "ternary": 1}
FLOATS = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}
LARGEST = np.finfo(np.float32).max
TINY = np.finfo(np.float32).tiny
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def _of_bits(bits: bytes) -> np.ndarray:
    """Any finite float32 values: where all bits of the exponent are set, one is cleared."""
    words = np.frombuffer(bits[: len(bits) // 4 * 4], np.uint32).copy()
    words[words & 0x7F800000 == 0x7F800000] &= 0xBFFFFFFF
    return words.view(np.float32)


VECTORS = st.binary(max_size=200).map(_of_bits)


def _generator(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def _decoded(name: str, payload: bytes, count: int) -> np.ndarray:
    reader = Reader(payload)
    values = QUANTIZERS[name].decode(reader, count)
    reader.finish()
    return values


def _there_and_back(name: str, values: np.ndarray, seed: int | None = 3) -> np.ndarray:
    encoded = QUANTIZERS[name].encode(values, None if seed is None else _generator(seed))
    assert len(encoded) <= QUANTIZERS[name].length(values.size)
    return _decoded(name, encoded, values.size)


def _steps(name: str, values: np.ndarray) -> np.ndarray:
    """The distance between two levels, for each value."""
    blocks = [values[start : start + BLOCK] for start in range(0, values.size, BLOCK)]
    return np.concatenate([np.full(block.size, np.abs(block).max() / INTEGERS[name]) for block in blocks])


@pytest.mark.parametrize("name", NAMES)
@PROPERTY
@given(values=VECTORS)
def test_every_finite_vector_comes_back_finite_in_its_shape(name, values):
    decoded = _there_and_back(name, values)
    assert decoded.shape == values.shape
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


@PROPERTY
@given(values=VECTORS)
def test_float32_is_exact_to_the_last_bit(values):
    assert _there_and_back("float32", values).tobytes() == values.tobytes()


@PROPERTY
@given(values=VECTORS)
def test_bfloat16_is_within_half_a_step_of_eight_bits(values):
    bound = np.maximum(np.abs(values) * np.float32(2**-8), np.float32(TINY))
    cut_off = np.abs(values) > np.float32(3.38e38)
    assert (np.abs(_there_and_back("bfloat16", values) - values)[~cut_off] <= bound[~cut_off]).all()


def test_bfloat16_rounds_to_the_nearest_and_halves_to_even():
    values = np.array([0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0x3F817FFF, 0xBF818000], np.uint32).view(np.float32)
    decoded = _there_and_back("bfloat16", values).view(np.uint32)
    assert [hex(bits >> 16) for bits in decoded.tolist()] == ["0x3f80", "0x3f80", "0x3f81", "0x3f82", "0x3f81", "0xbf82"]


def test_bfloat16_cuts_off_what_would_round_to_infinity():
    largest = np.array([LARGEST, -LARGEST], np.float32)
    assert _there_and_back("bfloat16", largest).view(np.uint32).tolist() == [0x7F7F0000, 0xFF7F0000]


@pytest.mark.parametrize("name", sorted(INTEGERS))
@PROPERTY
@given(values=VECTORS.filter(len), copies=st.integers(1, 60), seed=st.integers(0, 9))
def test_an_integer_level_is_less_than_one_step_away(name, values, copies, seed):
    values = np.tile(values, copies)
    decoded = _there_and_back(name, values, seed)
    steps = _steps(name, values)
    assert (np.abs(decoded - values) <= np.maximum(steps * (1 + 1e-6), TINY * 127)).all()


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_the_mean_over_many_roundings_is_the_value(name):
    values = np.concatenate([np.linspace(-1, 1, 41, dtype=np.float32), np.float32([0.001, -0.001])])
    # Every block holds the largest value, and so has the same levels.
    roundings = 4 * BLOCK
    decoded = _there_and_back(name, np.tile(values, roundings)).reshape(roundings, -1).mean(axis=0, dtype=np.float64)
    # The standard deviation of one rounding is half a step at most: five standard errors.
    bound = 5 * 0.5 / INTEGERS[name] / np.sqrt(roundings)
    assert (np.abs(decoded - values) <= bound).all()


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_roundings_of_different_values_are_independent(name):
    values = np.full(BLOCK * 4, 0.5 / INTEGERS[name], np.float32)
    values[::BLOCK] = 1
    ups = _there_and_back(name, values)[1:BLOCK] > 0
    assert 0.4 < ups.mean() < 0.6
    assert abs(np.corrcoef(ups[1:], ups[:-1])[0, 1]) < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_the_same_generator_gives_the_same_bytes(name):
    values = _generator(1).normal(size=3000).astype(np.float32)
    assert QUANTIZERS[name].encode(values, _generator(4)) == QUANTIZERS[name].encode(values.copy(), _generator(4))


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_levels_themselves_come_back_exactly(name):
    levels = INTEGERS[name]
    values = np.arange(-levels, levels + 1, dtype=np.float32)
    assert _there_and_back(name, values).tolist() == values.tolist()


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_zeros_stay_zeros_beside_large_values(name):
    values = np.zeros(2 * BLOCK, np.float32)
    values[[5, BLOCK + 9]] = [3, -4]
    assert _there_and_back(name, values).tolist() == values.tolist()


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_a_block_has_its_own_scale(name):
    values = np.concatenate([np.full(BLOCK, 1e-20), np.full(BLOCK, 1e20), np.full(3, 1.0)]).astype(np.float32)
    assert _there_and_back(name, values) == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(1500),
        np.full(5, -0.0),
        np.full(1500, 0.1),
        np.full(1500, 1e-40),
        np.full(1500, 60_000.0),
        np.full(1500, -1e-45),
        np.full(1500, TINY),
        np.full(1500, TINY * 126.9),
        np.full(1500, LARGEST),
        np.full(1500, -LARGEST),
        np.where(np.arange(1500) % 2, LARGEST, -LARGEST),
        np.where(np.arange(1500) % 2, LARGEST, 1e-45),
        np.concatenate([np.full(BLOCK, 1e-45), np.full(BLOCK, LARGEST)]),
        np.full(1, 1.0),
        np.zeros(0),
    ],
)
def test_extreme_blocks_come_back_near_and_without_a_warning(name, values):
    values = values.astype(np.float32)
    decoded = _there_and_back(name, values)
    assert np.isfinite(decoded).all()
    relative = {**FLOATS, "bfloat16": 2**-7, "int8": 1 / 127, "int4": 1 / 7, "sign": 2, "stc": 2, "ternary": 1, "qsgd": 2}[name]
    most = float(np.abs(values).max(initial=0))
    if name == "float16":
        values = np.clip(values, -65504, 65504)
    # Blocks below the smallest normal number times the levels are sent as zeros.
    error = np.abs(decoded.astype(np.float64) - values)
    assert (error <= max(most * relative * 1.001, 2**-24 if name == "float16" else 127 * float(TINY))).all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(FLOATS)))
@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), -float("inf"), -1e-45])
def test_a_scale_that_cannot_be_is_a_decode_error(name, scale):
    count = 1000 if name == "stc" else 2000
    codes = bytes(QUANTIZERS[name].length(count) - 4 * (1 + (name != "stc")))
    for scales in ((scale, 1.0), (1.0, scale))[: 1 + (name != "stc")]:
        with pytest.raises(DecodeError, match="scale is negative or not finite"):
            _decoded(name, struct.pack("<2f", *scales)[: 4 * (1 + (name != "stc"))] + codes, count)


def test_scales_that_overflow_give_infinities_for_the_receiver_to_refuse():
    for name, highest in {"int8": b"\xfe\x00", "int4": b"\xe0"}.items():
        assert not np.isfinite(_decoded(name, struct.pack("<f", LARGEST) + b"\x00" + highest, 2)).any()


def test_zero_is_a_scale_of_any_sign_and_decodes_to_zeros():
    for zero in (0.0, -0.0):
        assert _decoded("int8", struct.pack("<f", zero) + b"\x00\xfe\x00", 2).tolist() == [0, 0]


def test_int4_has_the_first_value_in_the_high_half_of_a_byte():
    assert QUANTIZERS["int4"].encode(np.float32([7, -7, 1]), _generator()) == struct.pack("<f", 1.0) + b"\x00\xe0\x80"
    assert _decoded("int4", struct.pack("<f", 2.0) + b"\x00\x0e\x73", 4).tolist() == [-14, 14, 0, -8]


def test_int8_has_scales_first_and_then_a_byte_for_each_value():
    assert QUANTIZERS["int8"].encode(np.float32([127, -127, 1]), _generator()) == struct.pack("<f", 1.0) + b"\x00\xfe\x00\x80"
    values = np.concatenate([np.full(BLOCK, 127), np.full(2, 254)]).astype(np.float32)
    assert _there_and_back("int8", values).tolist() == values.tolist()


def test_ternary_has_two_bits_for_each_value():
    assert QUANTIZERS["ternary"].encode(np.float32([2, -2, 0]), _generator()) == struct.pack("<f", 2.0) + b"\x00\x84"


def test_signs_have_one_bit_for_each_value_and_their_mean_magnitude():
    values = np.float32([3, -1, 2, 0])
    for name in ("sign", "stc"):
        assert QUANTIZERS[name].encode(values, None) == struct.pack("<f", 1.5) + b"\x00\xb0"
        assert _there_and_back(name, values).tolist() == [1.5, -1.5, 1.5, 1.5]


def test_sign_has_a_scale_for_each_block_and_stc_one_for_all():
    values = np.concatenate([np.full(BLOCK, -1.0), np.full(BLOCK, 5.0), np.full(2, -3.0)]).astype(np.float32)
    assert _there_and_back("sign", values).tolist() == values.tolist()
    assert np.unique(np.abs(_there_and_back("stc", values))).tolist() == [
        np.abs(values).mean(dtype=np.float64).astype(np.float32)
    ]


def test_qsgd_rounds_to_levels_of_the_euclidean_norm():
    values = np.float32([3, -4])
    assert QUANTIZERS["qsgd"].encode(values, None)[:4] == struct.pack("<f", 5 / 16)
    assert _there_and_back("qsgd", values, seed=None).tolist() == [10 * 5 / 16, -13 * 5 / 16]


def test_without_a_generator_integers_are_rounded_to_the_nearest_and_halves_to_even():
    values = np.float32([127, 0.4, 0.5, 0.6, 1.5, -0.5, -0.6, -126.7])
    assert _there_and_back("int8", values, seed=None).tolist() == [127, 0, 0, 1, 2, 0, -1, -127]
    halves = np.arange(-127, 127.5, 0.5, dtype=np.float32)
    assert _there_and_back("int8", halves, seed=None).tolist() == np.rint(halves).tolist()


def test_float16_is_clipped_to_what_is_finite():
    values = np.float32([65504, 65519, 65520, 1e6, -1e38])
    assert _there_and_back("float16", values).tolist() == [65504, 65504, 65504, 65504, -65504]


def test_lengths_are_those_of_the_documentation():
    for count, blocks in ((0, 0), (1, 1), (1023, 1), (1024, 1), (1025, 2), (10_000, 10)):
        assert {name: quantizer.length(count) for name, quantizer in QUANTIZERS.items()} == {
            "float32": 4 * count,
            "float16": 2 * count,
            "bfloat16": 2 * count,
            "int8": 4 * blocks + 1 + count,
            "int4": 4 * blocks + 1 + (count + 1) // 2,
            "ternary": 4 * blocks + 1 + (count + 3) // 4,
            "qsgd": 4 * blocks + 1 + count,
            "sign": 4 * blocks + 1 + (count + 7) // 8,
            "stc": 4 * min(blocks, 1) + 1 + (count + 7) // 8,
        }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1, 1024, 65_536, 65_537, 70_000])
def test_pieces_and_blocks_meet_without_a_gap(name, count):
    values = _generator(2).normal(size=count).astype(np.float32)
    whole = _there_and_back(name, values, seed=None)
    if name != "stc":
        parts = [_there_and_back(name, values[start : start + BLOCK], seed=None) for start in range(0, count, BLOCK)]
        assert whole.tolist() == np.concatenate([values[:0], *parts]).tolist()
