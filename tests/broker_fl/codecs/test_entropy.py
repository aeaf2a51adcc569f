import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.codecs.entropy import ANS, FIXED, decode_symbols, encode_symbols, fixed_length
from broker_fl.codecs.reader import Reader, varint
from broker_fl.errors import DecodeError

PROPERTY = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
ALPHABETS = [2, 3, 4, 8, 15, 16, 17, 33, 255, 256]


def _skewed(alphabet: int, count: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(alphabet / 2, alphabet / 12, count)
    return np.clip(drawn, 0, alphabet - 1).astype(np.uint8)


def _decoded(payload: bytes, count: int, alphabet: int) -> np.ndarray:
    reader = Reader(payload)
    symbols = decode_symbols(reader, count, alphabet=alphabet)
    reader.finish()
    return symbols


@PROPERTY
@given(data=st.data(), alphabet=st.sampled_from(ALPHABETS))
def test_symbols_come_back_as_they_were(data, alphabet):
    symbols = np.array(data.draw(st.lists(st.integers(0, alphabet - 1), max_size=100)), dtype=np.uint8)
    symbols = np.tile(symbols, data.draw(st.integers(1, 50)))
    payload = encode_symbols(symbols, alphabet=alphabet)
    assert _decoded(payload, symbols.size, alphabet).tolist() == symbols.tolist()
    assert len(payload) <= fixed_length(symbols.size, alphabet=alphabet)


@pytest.mark.parametrize("alphabet", ALPHABETS[1:])
def test_what_is_skewed_is_coded_by_its_histogram_near_the_limit(alphabet):
    symbols = _skewed(alphabet, 50_000)
    payload = encode_symbols(symbols, alphabet=alphabet)
    chances = np.bincount(symbols)[np.bincount(symbols) > 0] / symbols.size
    limit = -(chances * np.log2(chances)).sum() * symbols.size / 8
    assert payload[0] == ANS
    assert len(payload) <= 1.005 * limit + alphabet + 16
    assert _decoded(payload, symbols.size, alphabet).tolist() == symbols.tolist()


@pytest.mark.parametrize("alphabet", [2, 4, 16, 256])
def test_what_is_even_takes_a_fixed_number_of_bits(alphabet):
    symbols = np.random.default_rng(0).integers(0, alphabet, 9001).astype(np.uint8)
    payload = encode_symbols(symbols, alphabet=alphabet)
    assert payload[0] == FIXED
    assert len(payload) == fixed_length(9001, alphabet=alphabet) == 1 + -(-9001 * int(np.log2(alphabet)) // 8)


def test_the_histogram_is_not_worth_it_for_a_few():
    assert encode_symbols(_skewed(255, 300), alphabet=255)[0] == FIXED
    assert encode_symbols(np.zeros(20, np.uint8), alphabet=15)[0] == FIXED


def test_fixed_symbols_fill_bytes_from_the_highest_bits():
    assert encode_symbols(np.uint8([1, 0, 1]), alphabet=2) == bytes([FIXED, 0b101_00000])
    assert encode_symbols(np.uint8([2, 0, 1, 2, 1]), alphabet=3) == bytes([FIXED, 0b10_00_01_10, 0b01_000000])
    assert encode_symbols(np.uint8([14, 0, 7]), alphabet=15) == bytes([FIXED, 0xE0, 0x70])
    assert encode_symbols(np.uint8([254, 0, 7]), alphabet=255) == bytes([FIXED, 254, 0, 7])
    assert encode_symbols(np.uint8([]), alphabet=255) == bytes([FIXED])


def test_all_the_same_takes_a_few_bytes():
    for symbol in (0, 7, 14):
        payload = encode_symbols(np.full(10**5, symbol, np.uint8), alphabet=15)
        assert len(payload) < 20
        assert _decoded(payload, 10**5, 15).tolist() == [symbol] * 10**5


def _words(*words: int) -> bytes:
    return varint(len(words)) + struct.pack(f"<{len(words)}I", *words)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "mode of the values: 1 bytes expected"),
        (b"\x02", "an unknown mode, 2"),
        (b"\x00\xff", "values: 2 bytes expected, 1 are left"),
        (b"\x00\xf0\x00", "a value of 15 is not below 15"),
        (b"\x01\x05\x05\x01", "a histogram from 5 to 5 of 15 symbols"),
        (b"\x01\x00\x0f" + b"\x01" * 16, "a histogram from 0 to 15 of 15 symbols"),
        (b"\x01\x07\x05\x01", "a histogram from 7 to 5"),
        (b"\x01\x00\x0e\x01", "histogram: 15 bytes expected, 1 are left"),
        (b"\x01\x00\x01\x00\x00", "a histogram of nothing but zeros"),
        (b"\x01\x00\x01\x01\x01" + varint(6), "words of the values: at most 5 expected, not 6"),
        (b"\x01\x00\x01\x01\x01" + varint(2**31), "words of the values: at most 5"),
        (b"\x01\x00\x01\x01\x01\x02abcd", "values: 8 bytes expected, 4 are left"),
        (b"\x01\x00\x01\x01\x01" + _words(1, 0), "the last word of the values is zero"),
        (b"\x01\x00\x01\x01\x01" + _words(0), "the last word of the values is zero"),
        (b"\x01\x00\x01\x01\x01" + _words(2**32 - 1, 2**32 - 1), "the values do not end after 4 symbols"),
        (b"\x01\x00\x01\x01\x01" + _words(255), "the values do not end after 4 symbols"),
    ],
)
def test_symbols_that_cannot_be_are_a_decode_error(payload, message):
    with pytest.raises(DecodeError, match=message):
        _decoded(payload, 4, 15)


@settings(PROPERTY, max_examples=500)
@given(
    weights=st.binary(min_size=2, max_size=256),
    words=st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**24, 2**32 - 1]), max_size=8),
    first=st.integers(0, 255),
    count=st.integers(0, 5000),
)
def test_any_histogram_and_words_decode_or_are_a_decode_error(weights, words, first, count):
    payload = bytes([ANS, first, min(first + len(weights) - 1, 255)]) + weights + _words(*words)
    try:
        symbols = decode_symbols(Reader(payload), count, alphabet=255)
    except DecodeError:
        return
    assert symbols.shape == (count,)
    assert symbols.max(initial=0) < 255
