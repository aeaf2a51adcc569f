import msgpack
import pytest
from sample_messages import SAMPLES

from schemas import wire
from schemas.errors import DecodeError
from schemas.receipt import Receipt


def _decoded(**changed: object) -> Receipt:
    return wire.decode(Receipt, msgpack.packb(msgpack.unpackb(wire.encode(SAMPLES["receipt"])) | changed))


@pytest.mark.parametrize("outcome", ["merged", "buffered", "refused"])
def test_there_are_three_outcomes(outcome):
    assert _decoded(outcome=outcome).outcome == outcome


def test_other_outcomes_and_reasons_are_refused():
    for wrong in ({"outcome": "lost"}, {"outcome": None}, {"reason": "bad luck"}, {"reason": ""}):
        with pytest.raises(DecodeError, match=next(iter(wrong))):
            _decoded(**wrong)


def test_without_a_reason_there_is_none():
    assert _decoded(reason=None).reason is None


@pytest.mark.parametrize("reason", ["signature", "rate", "outlier", "suspended", "norm", "direction", "tier"])
def test_a_receipt_says_what_signatures_and_trust_made_of_an_update(reason):
    assert _decoded(reason=reason).reason == reason


def test_a_detail_is_short():
    assert len(_decoded(detail="x" * 1000).detail) == 1000
    with pytest.raises(DecodeError, match="detail"):
        _decoded(detail="x" * 1001)


def test_a_receipt_of_an_older_aggregator_says_nothing_of_codec_and_bytes():
    fields = msgpack.unpackb(wire.encode(SAMPLES["receipt"]))
    del fields["codec"], fields["bytes"]
    receipt = wire.decode(Receipt, msgpack.packb(fields))
    assert (receipt.codec, receipt.bytes) == ("", 0)
    for wrong in ({"codec": "x" * 65}, {"bytes": -1}, {"bytes": 1.5}):
        with pytest.raises(DecodeError, match=next(iter(wrong))):
            _decoded(**wrong)
