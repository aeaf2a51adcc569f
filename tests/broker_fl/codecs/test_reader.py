import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_fl.codecs.reader import Reader, varint
from broker_fl.errors import DecodeError


@given(st.integers(0, 2**35 - 1), st.binary(max_size=3))
def test_a_number_comes_back_as_it_was(value, following):
    reader = Reader(varint(value) + following)
    assert reader.varint("count", most=2**35) == value
    assert reader.at == len(varint(value))


def test_small_numbers_take_a_byte_and_others_one_for_each_seven_bits():
    assert [varint(value) for value in (0, 127, 128, 300)] == [b"\x00", b"\x7f", b"\x80\x01", b"\xac\x02"]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "count: 1 bytes expected, 0 are left"),
        (b"\x80", "count: 1 bytes expected, 0 are left"),
        (b"\x80\x00", "in more bytes than it needs"),
        (b"\x80\x80\x80\x80\x80\x01", "of more than 5 bytes"),
        (b"\x65", "count: at most 100 expected, not 101"),
    ],
)
def test_a_number_that_cannot_be_is_a_decode_error(payload, message):
    with pytest.raises(DecodeError, match=message):
        Reader(payload).varint("count", most=100)


def test_bytes_that_are_not_there_are_not_taken():
    reader = Reader(b"abc")
    assert reader.take(2, "values").tobytes() == b"ab"
    with pytest.raises(DecodeError, match="values: 1000000000000 bytes expected, 1 are left of the payload"):
        reader.take(10**12, "values")


def test_bytes_that_are_left_over_are_a_decode_error():
    reader = Reader(b"abc")
    with pytest.raises(DecodeError, match="the payload should have 0 bytes, not 3"):
        reader.finish()
    reader.take(3, "values")
    reader.finish()
