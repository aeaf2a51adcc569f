from typing import get_args

import msgpack
import pytest
from sample_messages import SAMPLES

from schemas import wire
from schemas.errors import DecodeError
from schemas.event import Event, EventKind


def _decoded(**changed: object) -> Event:
    return wire.decode(Event, msgpack.packb(msgpack.unpackb(wire.encode(SAMPLES["event"])) | changed))


@pytest.mark.parametrize("kind", get_args(EventKind))
def test_a_kind_is_a_routing_key_of_two_words(kind):
    assert _decoded(kind=kind).kind.count(".") == 1


def test_other_kinds_are_refused():
    with pytest.raises(DecodeError, match="kind"):
        _decoded(kind="update.lost")


def test_facts_keep_their_types():
    facts = {"whole": 1, "fraction": 1.0, "text": "1", "truth": True}
    assert [type(value) for value in _decoded(facts=facts).facts.values()] == [int, float, str, bool]


@pytest.mark.parametrize("wrong", [{"a": None}, {"a": [1]}, {"a": {}}, {"a": b"x"}, {"a": float("nan")}, {b"a": 1}, [1], "a"])
def test_facts_are_numbers_and_short_texts_by_name(wrong):
    with pytest.raises(DecodeError, match="facts"):
        _decoded(facts=wrong)


def test_an_event_about_no_updates_holds_none():
    fields = msgpack.unpackb(wire.encode(SAMPLES["event"]))
    del fields["updates"]
    assert wire.decode(Event, msgpack.packb(fields)).updates == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"party": ""},
        {"outcome": "lost"},
        {"staleness": -1},
        {"weight": float("inf")},
        {"bytes": True},
        {"codec": "x" * 65},
        {"reason": ""},
        {"epsilon": float("inf")},
        {"epsilon": "1"},
    ],
)
def test_what_became_of_an_update_is_checked_field_by_field(wrong):
    good = msgpack.unpackb(wire.encode(SAMPLES["event"]))["updates"][0]
    assert _decoded(updates=[good]).updates[0].outcome == "merged"
    with pytest.raises(DecodeError, match=rf"updates.0.{next(iter(wrong))}"):
        _decoded(updates=[good | wrong])


def test_there_are_64_facts_at_most():
    assert len(_decoded(facts={str(number): number for number in range(64)}).facts) == 64
    with pytest.raises(DecodeError, match="facts"):
        _decoded(facts={str(number): number for number in range(65)})
