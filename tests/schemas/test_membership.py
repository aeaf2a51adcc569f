import json

import msgpack
import pytest
from pydantic import ValidationError
from sample_messages import SAMPLES

from schemas import wire
from schemas.errors import DecodeError
from schemas.membership import STANDARD_TIER, Membership, SignedMembership

LEAST = {"federation": "hospitals", "party": "charite-2", "revision": 1, "at": 0.0}


def _decoded(**changed: object) -> Membership:
    return wire.decode(Membership, msgpack.packb(msgpack.unpackb(wire.encode(SAMPLES["membership"].membership)) | changed))


def test_a_membership_of_which_little_is_known_is_of_a_standard_party_without_a_key():
    member = Membership(**LEAST)
    assert (member.public_key, member.display_name, member.group, member.num_samples) == (None, "", None, None)
    assert (member.tier, member.suspended, member.reason) == (STANDARD_TIER, False, "")


def test_numbers_have_bounds():
    for field, least, most in (("revision", 1, 2**53 - 1), ("num_samples", 1, 10**12)):
        for within in (least, most):
            assert getattr(_decoded(**{field: within}), field) == within
        for beyond in (least - 1, most + 1):
            with pytest.raises(DecodeError, match=field):
                _decoded(**{field: beyond})


@pytest.mark.parametrize(
    "wrong",
    [
        {"party": "Charite"},
        {"federation": "a.b"},
        {"public_key": "AB" * 32},
        {"public_key": "ab" * 31},
        {"public_key": ""},
        {"group": ""},
        {"group": "a b"},
        {"tier": None},
        {"tier": ""},
        {"suspended": 1},
        {"suspended": None},
        {"reason": "x" * 1001},
        {"display_name": "x" * 201},
        {"display_name": "two\nlines"},
        {"display_name": "\x1b[31mred"},
        {"display_name": "\x7f"},
        {"at": "yesterday"},
        {"schema_version": 2},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(DecodeError, match=next(iter(wrong))):
        _decoded(**wrong)


def test_a_name_to_be_shown_may_be_in_any_script():
    assert _decoded(display_name="Charité, 東京 \U0001f3e5").display_name == "Charité, 東京 \U0001f3e5"


def test_a_membership_is_read_from_the_json_that_the_register_keeps():
    signed = SAMPLES["membership"]
    kept = json.loads(json.dumps(signed.model_dump(mode="json")))
    assert SignedMembership.model_validate(kept) == signed
    assert SignedMembership.model_validate_json(signed.model_dump_json()) == signed
    # Erlang writes 5.0 as 5 or 5.0.
    assert Membership.model_validate(LEAST | {"at": 5}).at == 5.0


@pytest.mark.parametrize("signature", ["", "ab" * 63, "AB" * 64, None, b"ab" * 64])
def test_a_membership_without_a_signature_is_not_a_signed_one(signature):
    with pytest.raises(ValidationError, match="signature"):
        SignedMembership(membership=SAMPLES["membership"].membership, signature=signature)
