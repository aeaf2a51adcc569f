import hashlib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_fl.errors import DecodeError
from broker_fl.transports.parts import Assembler, GapError, Part, join, part_of, split
from broker_fl.transports.transport import Delivery, Message

PROPERTY = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
BODIES = st.binary(min_size=1, max_size=500)


def _message(body: bytes, message_id: str = "m-1") -> Message:
    return Message("fl.f.model", body, routing_key="k", message_id=message_id, headers={"x-fl-version": 7})


def _parts(body: bytes, part_bytes: int = 10, message_id: str = "m-1") -> list[Message]:
    return list(split(_message(body, message_id), part_bytes=part_bytes, limit_bytes=0))


def _delivered(message: Message) -> Delivery:
    return Delivery(
        body=message.body,
        headers=message.headers,
        message_id=message.message_id,
        user_id="a",
        exchange=message.exchange,
        routing_key=message.routing_key,
        redelivered=False,
        tag=1,
        offset=None,
    )


def _assembled(messages: list[Message]) -> list[bytes]:
    assembler = Assembler()
    bodies = [assembler.add(_delivered(message)) for message in messages]
    return [body for body in bodies if body is not None]


@PROPERTY
@given(body=BODIES, part_bytes=st.integers(1, 600))
def test_parts_give_the_whole_body_again(body, part_bytes):
    parts = _parts(body, part_bytes)
    place = part_of(parts[-1].headers)
    assert join([part.body for part in parts], place) == body
    assert _assembled(parts) == [body]


@PROPERTY
@given(body=BODIES, part_bytes=st.integers(1, 600))
def test_parts_say_their_place_and_carry_the_messages_own_headers(body, part_bytes):
    parts = _parts(body, part_bytes)
    assert len(parts) == -(-len(body) // part_bytes)
    for index, part in enumerate(parts):
        assert 1 <= len(part.body) <= part_bytes
        assert part_of(part.headers) == Part(index, len(parts), len(body), hashlib.sha256(body).hexdigest())
        assert part.headers["x-fl-version"] == 7
        assert (part.exchange, part.routing_key, part.message_id, part.mandatory) == ("fl.f.model", "k", "m-1", True)


@pytest.mark.parametrize("body", [b"", b"x" * 99, b"x" * 100])
def test_what_is_within_the_limit_travels_whole(body):
    message = _message(body)
    assert list(split(message, part_bytes=10, limit_bytes=100)) == [message]
    assert part_of(message.headers) is None


def test_what_is_over_the_limit_travels_in_parts():
    assert len(list(split(_message(b"x" * 101), part_bytes=10, limit_bytes=100))) == 11


@PROPERTY
@given(body=BODIES, data=st.data())
def test_a_body_that_is_not_what_the_parts_promised_is_a_decode_error(body, data):
    parts = _parts(body, 50)
    chunks = [part.body for part in parts]
    place = part_of(parts[0].headers)
    damaged = data.draw(
        st.sampled_from(
            [
                chunks[:-1],
                [*chunks, b"x"],
                [*chunks[:-1], chunks[-1] + b"\x00"],
                [bytes([chunks[0][0] ^ 1]) + chunks[0][1:], *chunks[1:]],
            ]
        )
    )
    with pytest.raises(DecodeError, match="that are not the"):
        join(damaged, place)


def test_parts_that_lie_about_size_or_digest_are_a_decode_error():
    body = b"0123456789"
    place = Part(0, 1, 10, hashlib.sha256(body).hexdigest())
    assert join([body], place) == body
    for lie in (replace(place, size=9), replace(place, size=11), replace(place, sha256="0" * 64)):
        with pytest.raises(DecodeError):
            join([body], lie)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x-fl-part": -1},
        {"x-fl-part": 3},
        {"x-fl-part": 2**62},
        {"x-fl-part": "0"},
        {"x-fl-part": True},
        {"x-fl-part": 0.0},
        {"x-fl-parts": 0},
        {"x-fl-parts": -3},
        {"x-fl-parts": 11},
        {"x-fl-parts": "3"},
        {"x-fl-parts": True},
        {"x-fl-size": 2},
        {"x-fl-size": 0},
        {"x-fl-size": -10},
        {"x-fl-size": 10.0},
        {"x-fl-sha256": ""},
        {"x-fl-sha256": "0" * 63},
        {"x-fl-sha256": "0" * 65},
        {"x-fl-sha256": "A" * 64},
        {"x-fl-sha256": "0" * 64 + "\n"},
        {"x-fl-sha256": "x" * 100_000},
        {"x-fl-sha256": 5},
    ],
)
def test_a_place_that_cannot_be_is_a_decode_error(wrong):
    place = {"x-fl-part": 0, "x-fl-parts": 3, "x-fl-size": 10, "x-fl-sha256": "0" * 64}
    assert part_of(place) == Part(0, 3, 10, "0" * 64)
    with pytest.raises(DecodeError):
        part_of(place | wrong)


@pytest.mark.parametrize("missing", ["x-fl-parts", "x-fl-size", "x-fl-sha256"])
def test_half_a_place_is_a_decode_error(missing):
    place = {"x-fl-part": 0, "x-fl-parts": 3, "x-fl-size": 10, "x-fl-sha256": "0" * 64}
    del place[missing]
    with pytest.raises(DecodeError, match="a part needs"):
        part_of(place)


HEADERS = st.dictionaries(
    st.sampled_from(["x-fl-part", "x-fl-parts", "x-fl-size", "x-fl-sha256", "x-fl-bytes"]),
    st.integers(-(2**63), 2**63 - 1)
    | st.integers(-1, 5)
    | st.booleans()
    | st.floats()
    | st.text(max_size=70)
    | st.just("a" * 64),
)


@PROPERTY
@given(HEADERS)
def test_any_headers_are_a_place_or_none_or_a_decode_error(headers):
    try:
        place = part_of(headers)
    except DecodeError:
        return
    assert (place is None) == ("x-fl-part" not in headers)
    assert place is None or 0 <= place.index < place.parts <= place.size


def test_a_whole_message_passes_the_assembler_as_it_is():
    assert _assembled([_message(b"one"), _message(b"")]) == [b"one", b""]


def test_messages_that_follow_each_other_are_put_together_each():
    first, second = _parts(b"a" * 25, message_id="m-1"), _parts(b"b" * 35, message_id="m-2")
    assert _assembled([*first, _message(b"whole", "m-3"), *second]) == [b"a" * 25, b"whole", b"b" * 35]


@PROPERTY
@given(body=BODIES, part_bytes=st.integers(1, 200), data=st.data())
def test_parts_that_are_sent_again_change_nothing(body, part_bytes, data):
    parts = _parts(body, part_bytes)
    again = [part for index, part in enumerate(parts) for part in [part, *parts[1 : data.draw(st.integers(0, index + 1))]]]
    last = again.index(parts[-1])
    assert _assembled(again[: last + 1]) == [body]


def test_a_message_that_is_sent_again_from_its_beginning_starts_anew():
    parts = _parts(b"0123456789" * 3)
    assert _assembled([*parts[:2], *parts]) == [b"0123456789" * 3]


def test_a_whole_message_between_the_parts_of_another_disturbs_nothing():
    parts = _parts(b"0123456789" * 3)
    assert _assembled([parts[0], _message(b"whole", "m-2"), *parts[1:]]) == [b"whole", b"0123456789" * 3]


@pytest.mark.parametrize("first", [1, 2])
def test_a_part_whose_beginning_was_not_seen_is_a_gap(first):
    assembler = Assembler()
    with pytest.raises(GapError, match=f"part {first} of 3 of m-1"):
        assembler.add(_delivered(_parts(b"0123456789" * 3)[first]))


def test_a_part_that_was_left_out_is_a_gap_and_the_next_beginning_mends_it():
    parts = _parts(b"0123456789" * 3)
    assembler = Assembler()
    assert assembler.add(_delivered(parts[0])) is None
    with pytest.raises(GapError):
        assembler.add(_delivered(parts[2]))
    assert [assembler.add(_delivered(part)) for part in parts][-1] == b"0123456789" * 3


def test_parts_of_another_message_are_a_gap():
    assembler = Assembler()
    assembler.add(_delivered(_parts(b"a" * 30, message_id="m-1")[0]))
    with pytest.raises(GapError):
        assembler.add(_delivered(_parts(b"b" * 30, message_id="m-2")[1]))


def test_parts_of_different_bodies_under_one_id_are_a_decode_error_and_forgotten():
    mixed = [_parts(b"a" * 20)[0], _parts(b"b" * 20)[1]]
    assembler = Assembler()
    assembler.add(_delivered(mixed[0]))
    with pytest.raises(DecodeError, match="that are not the 20 promised"):
        assembler.add(_delivered(mixed[1]))
    assert [assembler.add(_delivered(part)) for part in _parts(b"c" * 20)] == [None, b"c" * 20]


def test_a_gap_is_a_decode_error():
    assert issubclass(GapError, DecodeError)


@PROPERTY
@given(
    st.lists(
        st.builds(
            lambda body, headers, message_id: replace(_message(body, message_id), headers=headers),
            st.binary(max_size=5),
            HEADERS,
            st.sampled_from(["m-1", "m-2"]),
        ),
        max_size=8,
    )
)
def test_any_messages_give_bodies_or_decode_errors(messages):
    assembler = Assembler()
    for message in messages:
        try:
            assembler.add(_delivered(message))
        except DecodeError:
            continue
