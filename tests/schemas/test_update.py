import msgpack
import pytest
from sample_messages import SAMPLES

from schemas import wire
from schemas.errors import DecodeError
from schemas.update import ModelUpdate


def _decoded(**changed: object) -> ModelUpdate:
    return wire.decode(ModelUpdate, msgpack.packb(msgpack.unpackb(wire.encode(SAMPLES["update"])) | changed))


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("sequence", 1, 2**53 - 1),
        ("base_version", 0, 2**53 - 1),
        ("num_samples", 1, 10**12),
        ("num_steps", 1, 2**53 - 1),
    ],
)
def test_counters_have_bounds(field, least, most):
    assert getattr(_decoded(**{field: least}), field) == least
    assert getattr(_decoded(**{field: most}), field) == most
    for beyond in (least - 1, most + 1):
        with pytest.raises(DecodeError, match=field):
            _decoded(**{field: beyond})


def test_a_loss_is_said_or_said_to_be_left_out():
    assert _decoded(train_loss=None).train_loss is None
    assert _decoded(train_loss=1).train_loss == 1.0
    fields = msgpack.unpackb(wire.encode(SAMPLES["update"]))
    del fields["train_loss"]
    with pytest.raises(DecodeError, match=r"train_loss: Field required"):
        wire.decode(ModelUpdate, msgpack.packb(fields))


def test_an_update_of_an_older_party_says_nothing_of_noise():
    fields = msgpack.unpackb(wire.encode(SAMPLES["update"]))
    del fields["privacy"]
    assert wire.decode(ModelUpdate, msgpack.packb(fields)) == SAMPLES["update"]
    assert SAMPLES["update"].privacy is None


def test_an_update_of_an_older_party_names_no_ledger():
    fields = msgpack.unpackb(wire.encode(SAMPLES["update"]))
    del fields["ledger"]
    assert wire.decode(ModelUpdate, msgpack.packb(fields)) == SAMPLES["update"].model_copy(update={"ledger": None})
    with pytest.raises(DecodeError, match="ledger"):
        _decoded(ledger="")


def test_the_name_of_a_codec_is_short():
    assert _decoded(codec="x" * 64).codec == "x" * 64
    with pytest.raises(DecodeError, match="codec"):
        _decoded(codec="x" * 65)


def test_a_payload_is_binary_and_not_text():
    assert _decoded(payload=bytes(70_000)).payload == bytes(70_000)
    with pytest.raises(DecodeError, match="payload"):
        _decoded(payload="text")


def test_another_kind_or_schema_is_refused():
    for wrong in ({"kind": "receipt"}, {"kind": None}, {"schema_version": 2}, {"schema_version": 0}):
        with pytest.raises(DecodeError, match=next(iter(wrong))):
            _decoded(**wrong)
