import tracemalloc
from itertools import product

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_messages import MESSAGES, SAMPLES

from schemas import wire
from schemas.errors import BrokerFLError, DecodeError
from schemas.frame import ModelFrame, TrainingPlan
from schemas.manifest import Manifest
from schemas.receipt import Receipt
from schemas.update import ModelUpdate

KINDS = sorted(SAMPLES)
PROPERTY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def _fields(kind: str) -> dict[str, object]:
    return msgpack.unpackb(wire.encode(SAMPLES[kind]))


def _decoded(kind: str, /, **changed: object) -> wire.Message:
    return wire.decode(type(SAMPLES[kind]), msgpack.packb(_fields(kind) | changed))


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(data=st.data())
def test_every_message_comes_back_as_it_was(kind, data):
    message = data.draw(MESSAGES[kind])
    assert wire.decode(type(message), wire.encode(message)) == message


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_message_gives_the_same_bytes(kind):
    message = SAMPLES[kind]
    assert wire.encode(message) == wire.encode(message.model_copy())


@pytest.mark.parametrize("kind", KINDS)
def test_fields_travel_under_their_names_in_the_order_of_their_declaration(kind):
    assert list(_fields(kind)) == list(type(SAMPLES[kind]).model_fields)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_hashed_before_does_not_change_what_is_sent(kind):
    before = wire.encode(SAMPLES[kind])
    if isinstance(SAMPLES[kind], Manifest):
        assert SAMPLES[kind].digest
        assert SAMPLES[kind].size
    assert wire.encode(SAMPLES[kind]) == before


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_a_newer_peer_adds_are_ignored(kind):
    later = {"later": [1, {"deep": "er"}], "": None, "payload_2": b"x"}
    assert _decoded(kind, **later) == SAMPLES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_fields_does_not_matter(kind):
    backwards = dict(reversed(_fields(kind).items()))
    assert wire.decode(type(SAMPLES[kind]), msgpack.packb(backwards)) == SAMPLES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_field_without_a_default_is_named(kind):
    for name, field in type(SAMPLES[kind]).model_fields.items():
        fields = _fields(kind)
        del fields[name]
        if field.is_required():
            with pytest.raises(DecodeError, match=rf"{name}: Field required"):
                wire.decode(type(SAMPLES[kind]), msgpack.packb(fields))
        elif kind == "announcement" and name in ("manifest", "plan"):
            with pytest.raises(DecodeError, match=f"without a base needs .*{name}"):
                wire.decode(ModelFrame, msgpack.packb(fields))
        else:
            assert getattr(wire.decode(type(SAMPLES[kind]), msgpack.packb(fields)), name) == field.default


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_a_decode_error(kind):
    body = wire.encode(SAMPLES[kind])
    for length in range(len(body)):
        with pytest.raises(DecodeError):
            wire.decode(type(SAMPLES[kind]), body[:length])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_after_the_message_are_a_decode_error(kind):
    with pytest.raises(DecodeError, match="extra data"):
        wire.decode(type(SAMPLES[kind]), wire.encode(SAMPLES[kind]) + b"\x00")


@pytest.mark.parametrize("kind", KINDS)
def test_anything_but_a_map_is_a_decode_error(kind):
    for body in (b"", b"\xc0", b"\x00", b"\xa3abc", b"\x90", b"\x93\x01\x02\x03", b"\xc4\x01x", b"\xc1", b"\xc3"):
        with pytest.raises(DecodeError):
            wire.decode(type(SAMPLES[kind]), body)


@pytest.mark.parametrize(
    "extension",
    [
        b"\xd4\x01a",
        b"\xc7\x00\x01",
        b"\xc7\x03\x05abc",
        b"\xd6\xff\x00\x00\x00\x01",
        b"\xd7\xff" + b"\xff" * 8,
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\xc9\xff\xff\xff\xff\x01",
    ],
)
def test_extension_types_and_timestamps_are_a_decode_error(extension):
    for field in (b"\xa5party", b"\xa6tensor"):
        with pytest.raises(DecodeError):
            wire.decode(Receipt, b"\x81" + field + extension)
    with pytest.raises(DecodeError):
        wire.decode(Manifest, b"\x81\xa7tensors" + extension)


@pytest.mark.parametrize(
    "opening",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x00",
        b"\xdd\x00\x01\x86\xa0",
        b"\xdc\xff\xff",
        b"\xde\xff\xff",
    ],
)
def test_containers_that_promise_more_than_came_take_no_memory(opening):
    for body in (opening, b"\x81\xa1x" + opening, opening * 200):
        tracemalloc.start()
        with pytest.raises(DecodeError):
            wire.decode(ModelUpdate, body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20


@pytest.mark.parametrize("depth", [100, 500, 600, 5_000, 200_000])
@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1x"])
def test_deep_nesting_is_a_decode_error(depth, level):
    with pytest.raises(DecodeError):
        wire.decode(ModelUpdate, level * depth + b"\xc0")


def test_deep_nesting_in_an_ignored_field_is_ignored_or_a_decode_error():
    body = wire.encode(SAMPLES["receipt"])
    for depth in (10, 400, 20_000):
        nested = bytes([body[0] + 1]) + body[1:] + b"\xa1x" + b"\x91" * depth + b"\xc0"
        try:
            assert wire.decode(Receipt, nested) == SAMPLES["receipt"]
        except DecodeError:
            assert depth > 400


def test_more_entries_than_any_model_has_are_a_decode_error():
    longest = wire.MAX_CONTAINER_LENGTH
    assert _decoded("receipt", later=[0] * longest) == SAMPLES["receipt"]
    with pytest.raises(DecodeError, match="exceeds max_array_len"):
        _decoded("receipt", later=[0] * (longest + 1))


def test_an_overlong_text_is_a_decode_error():
    with pytest.raises(DecodeError, match="exceeds max_str_len"):
        _decoded("receipt", later="x" * 65_537)


def test_text_that_is_not_utf_8_is_a_decode_error():
    with pytest.raises(DecodeError, match="utf-8"):
        wire.decode(Receipt, b"\x81\xa5party\xa2\xff\xfe")


@pytest.mark.parametrize("key", [b"\x01", b"\xc0", b"\xc3", b"\x90", b"\x80", b"\xca\x00\x00\x00\x00"])
def test_keys_that_are_not_text_are_a_decode_error(key):
    with pytest.raises(DecodeError):
        wire.decode(Receipt, b"\x81" + key + b"\x01")


def test_a_field_under_a_binary_key_is_not_that_field():
    fields = _fields("receipt")
    fields[b"party"] = fields.pop("party")
    with pytest.raises(DecodeError, match=r"Receipt.party: Field required"):
        wire.decode(Receipt, msgpack.packb(fields))


_ODD_VALUES = [None, True, -1, 2**53, 2**63, 1.5, float("nan"), float("inf"), "", "\n", b"x", [], [[]], {}, {"a": 1}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_taken_as_it_is_or_refused_with_the_name_of_its_field(kind):
    for name, value in product(type(SAMPLES[kind]).model_fields, _ODD_VALUES):
        try:
            taken = getattr(_decoded(kind, **{name: value}), name)
        except DecodeError as exc:
            refused = str(exc)
        else:
            refused = ""
            # All fields of a plan have defaults, so that any map is one.
            expected = TrainingPlan() if isinstance(taken, TrainingPlan) else tuple(value) if isinstance(value, list) else value
            assert taken == expected
            assert isinstance(taken, bool) == isinstance(value, bool)
        # What is wrong with two fields together is said of the message.
        assert not refused or f".{name}" in refused or (".message: " in refused and name in refused)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", [True, False])
def test_truth_values_are_no_numbers(kind, flag):
    for name, value in _fields(kind).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(DecodeError, match=name):
                _decoded(kind, **{name: flag})


@pytest.mark.parametrize("kind", KINDS)
def test_fractions_are_no_counters(kind):
    for name, value in _fields(kind).items():
        if type(value) is int:
            with pytest.raises(DecodeError, match=name):
                _decoded(kind, **{name: float(value)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_are_finite(kind, value):
    for name, before in _fields(kind).items():
        if isinstance(before, float):
            with pytest.raises(DecodeError, match=name):
                _decoded(kind, **{name: value})


def test_messages_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        SAMPLES["receipt"].version = 3


def test_a_decode_error_is_one_line_and_in_the_tree():
    with pytest.raises(BrokerFLError) as caught:
        _decoded("frame", manifest={"tensors": []})
    assert str(caught.value).startswith("ModelFrame.manifest.tensors: ")
    assert "\n" not in str(caught.value)


@PROPERTY
@given(body=st.binary(max_size=300))
def test_random_bytes_are_a_decode_error(body):
    for kind in ("update", "frame", "receipt", "event"):
        with pytest.raises(DecodeError):
            wire.decode(type(SAMPLES[kind]), body)


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(st.characters(codec="utf-8"))
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")) | st.binary(), inner, max_size=4)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(data=st.data())
def test_a_message_with_one_field_replaced_decodes_or_is_a_decode_error(kind, data):
    field = data.draw(st.sampled_from(sorted(type(SAMPLES[kind]).model_fields)))
    try:
        message = _decoded(kind, **{field: data.draw(_ANYTHING)})
    except DecodeError:
        return
    assert wire.decode(type(message), wire.encode(message)) == message


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(data=st.data())
def test_a_message_with_flipped_bits_decodes_or_is_a_decode_error(kind, data):
    body = bytearray(wire.encode(SAMPLES[kind]))
    for position in data.draw(st.lists(st.integers(0, 8 * len(body) - 1), min_size=1, max_size=4)):
        body[position // 8] ^= 1 << position % 8
    try:
        wire.decode(type(SAMPLES[kind]), bytes(body))
    except DecodeError:
        return
