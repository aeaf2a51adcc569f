"""Signatures by RFC 8032, and statements by hand, as the words in `broker_fl/signing.py` say them."""

import hashlib
import json
import struct

import blake3
import ed25519_by_the_rfc as rfc8032
import pytest
from enrolled_parties import FEDERATION_KEY, key_of, membership, signature_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker_fl.signing import (
    SigningKey,
    body_statement,
    canonical,
    is_signed,
    is_vouched_for,
    membership_statement,
    payload_digest,
    sign_membership,
    update_statement,
)
from schemas import wire
from schemas.membership import Membership, SignedMembership
from schemas.privacy import PrivacyFacts
from schemas.update import ModelUpdate

# Section 7.1, tests 1 and 3.
RFC_SECRETS = {
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60": (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        b"",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7": (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        b"\xaf\x82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
}
KINDS = ("frame", "receipt", "update", "membership")
KEY = key_of("ann")


def _update(**changes):
    facts = {
        "federation": "ward",
        "ledger": "ab" * 16,
        "party": "ann",
        "update_id": "0123456789abcdef" * 2,
        "sequence": 7,
        "base_version": 41,
        "base_digest": "cd" * 32,
        "manifest_digest": "ef" * 32,
        "codec": "topk:0.01+int4",
        "num_samples": 4708,
        "num_steps": 735,
        "train_loss": 0.1,
        "payload": b"\x00\x01\xff",
    }
    return ModelUpdate(**{**facts, **changes})


def _statement(update):
    return update_statement(update, payload_digest=payload_digest(update.payload))


class TestSignatures:
    @pytest.mark.parametrize("secret", RFC_SECRETS)
    def test_the_checker_of_these_tests_is_that_of_the_rfc(self, secret):
        public, message, signature = RFC_SECRETS[secret]
        assert rfc8032.public_key(bytes.fromhex(secret)).hex() == public
        assert rfc8032.sign(bytes.fromhex(secret), message).hex() == signature
        assert rfc8032.is_signed(bytes.fromhex(public), message, bytes.fromhex(signature))
        assert not rfc8032.is_signed(bytes.fromhex(public), message + b"x", bytes.fromhex(signature))

    @pytest.mark.parametrize("secret", RFC_SECRETS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_signature_is_ed25519_over_the_kind_a_zero_and_the_statement(self, secret, kind):
        key = SigningKey.from_text(secret)
        assert key.public == RFC_SECRETS[secret][0]
        by_hand = rfc8032.sign(bytes.fromhex(secret), f"broker-fl/{kind}/1".encode() + b"\x00" + b"statement")
        assert key.sign(kind, b"statement") == by_hand.hex()
        assert is_signed(kind, b"statement", by_hand.hex(), by=key.public)

    @pytest.mark.parametrize("secret", RFC_SECRETS)
    def test_a_signature_over_something_else_by_the_same_key_is_none_of_ours(self, secret):
        public, message, signature = RFC_SECRETS[secret]
        assert not any(is_signed(kind, message, signature, by=public) for kind in KINDS)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_signature_of_one_kind_does_not_pass_for_another(self, kind):
        signature = KEY.sign(kind, b"statement")
        assert [other for other in KINDS if is_signed(other, b"statement", signature, by=KEY.public)] == [kind]

    def test_a_statement_cannot_be_cut_elsewhere_so_that_it_passes_for_another_kind(self):
        signature = KEY.sign("frame", b"/1\x00statement")
        assert not any(is_signed(kind, b"statement", signature, by=KEY.public) for kind in KINDS)

    def test_another_keys_signature_does_not_pass(self):
        assert not is_signed("frame", b"statement", key_of("bob").sign("frame", b"statement"), by=KEY.public)

    @settings(max_examples=60)
    @given(data=st.data())
    def test_no_bit_of_signature_statement_or_key_can_be_changed(self, data):
        texts = {"signature": bytes.fromhex(KEY.sign("update", b"statement")), "statement": b"statement"}
        texts["key"] = bytes.fromhex(KEY.public)
        name = data.draw(st.sampled_from(sorted(texts)))
        bit = data.draw(st.integers(0, 8 * len(texts[name]) - 1))
        changed = bytearray(texts[name])
        changed[bit // 8] ^= 1 << bit % 8
        texts[name] = bytes(changed)
        assert not is_signed("update", texts["statement"], texts["signature"].hex(), by=texts["key"].hex())

    @pytest.mark.parametrize(
        "garbage",
        [
            None,
            "",
            0,
            1 << 511,
            True,
            0.5,
            b"",
            b"\x00" * 64,
            [],
            {},
            "0" * 127,
            "0" * 128,
            "0" * 129,
            "g" * 128,
            "\u0660" * 128,
            "\uff11" * 128,
            "\ud800" * 128,
            "\x00" * 128,
        ],
        ids=repr,
    )
    def test_what_is_no_signature_is_none_whatever_it_is(self, garbage):
        assert not is_signed("frame", b"statement", garbage, by=KEY.public)

    @pytest.mark.parametrize(
        "written",
        [str.upper, lambda text: f"{text}\n", lambda text: f" {text}", lambda text: text[:64] + " " + text[64:], bytes.fromhex],
        ids=["upper case", "line feed", "space before", "space within", "bytes"],
    )
    def test_a_signature_has_one_way_to_be_written(self, written):
        signature = KEY.sign("frame", b"statement")
        assert is_signed("frame", b"statement", signature, by=KEY.public)
        assert not is_signed("frame", b"statement", written(signature), by=KEY.public)

    def test_a_key_that_is_no_point_of_the_curve_signed_nothing(self):
        signature = KEY.sign("frame", b"statement")
        assert not any(is_signed("frame", b"statement", signature, by=key) for key in ("ff" * 32, "00" * 31, "zz" * 32, ""))

    def test_the_private_key_is_not_shown(self):
        assert KEY.text() not in repr(KEY)
        assert KEY.public in repr(KEY)
        assert repr(vars(KEY)).count(KEY.text()) == 0

    def test_a_key_is_the_same_from_its_text(self):
        key = SigningKey.generate()
        assert SigningKey.from_text(key.text()).public == key.public
        assert len(key.text()) == len(key.public) == 64
        assert SigningKey.generate().public != key.public

    @pytest.mark.parametrize("text", ["", "00", "zz" * 32, "00" * 31, "00" * 33])
    def test_a_text_that_is_no_key_is_refused(self, text):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever it says, it is not shown
            SigningKey.from_text(text)


def test_a_body_is_stated_by_its_sha256():
    assert body_statement(b"body") == hashlib.sha256(b"body").digest()


class TestUpdateStatements:
    def test_the_statement_of_an_update_is_this(self):
        digests = {"BASE": "cd" * 32, "LEDGER": "ab" * 16, "MANIFEST": "ef" * 32, "ID": "0123456789abcdef" * 2}
        digests["PAYLOAD"] = blake3.blake3(b"\x00\x01\xff").hexdigest()

        def expect(update, said):
            for name, digest in digests.items():
                said = said.replace(f'"{name}"', f'"{digest}"')
            assert _statement(update).decode("ascii") == said

        expect(
            _update(),
            '{"base_digest":"BASE","base_version":41,"codec":"topk:0.01+int4","federation":"ward","ledger":"LEDGER",'
            '"manifest":"MANIFEST","num_samples":4708,"num_steps":735,"party":"ann","payload_digest":"PAYLOAD","sequence":7,'
            '"train_loss":0.1,"update_id":"ID"}',
        )
        noise = PrivacyFacts(noise_multiplier=1.1, sample_rate=0.0625, max_grad_norm=0.5)
        expect(
            _update(train_loss=None, privacy=noise),
            '{"base_digest":"BASE","base_version":41,"codec":"topk:0.01+int4","federation":"ward","ledger":"LEDGER",'
            '"manifest":"MANIFEST","noise_multiplier":1.1,"num_samples":4708,"num_steps":735,"party":"ann",'
            '"payload_digest":"PAYLOAD","sample_rate":0.0625,"sequence":7,"update_id":"ID"}',
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"federation": "ward2"},
            {"ledger": "ac" * 16},
            {"ledger": None},
            {"party": "bob"},
            {"update_id": "1123456789abcdef" * 2},
            {"sequence": 8},
            {"base_version": 42},
            {"base_digest": "ce" * 32},
            {"manifest_digest": "ee" * 32},
            {"codec": "topk:0.01+int8"},
            {"num_samples": 4709},
            {"num_steps": 736},
            {"train_loss": 0.2},
            {"train_loss": None},
            {"train_loss": -0.1},
            {"privacy": PrivacyFacts(noise_multiplier=1.0, sample_rate=0.5, max_grad_norm=1.0)},
            {"payload": b"\x00\x01\xfe"},
            {"payload": b"\x00\x01\xff\x00"},
            {"payload": b""},
        ],
        ids="-".join,
    )
    def test_every_field_that_counts_changes_it(self, changes):
        known = _update()
        assert _statement(known.model_copy(update=changes)) != _statement(known)
        assert not is_signed("update", _statement(known.model_copy(update=changes)), signature_of(known), by=KEY.public)

    @pytest.mark.parametrize("changes", [{"noise_multiplier": 1.2}, {"sample_rate": 0.25}])
    def test_a_noise_that_is_said_otherwise_changes_it(self, changes):
        noise = PrivacyFacts(noise_multiplier=1.1, sample_rate=0.5, max_grad_norm=1.0)
        one, other = (_update(train_loss=None, privacy=facts) for facts in (noise, noise.model_copy(update=changes)))
        assert _statement(one) != _statement(other)

    def test_a_loss_of_minus_zero_is_one_of_zero(self):
        assert _statement(_update(train_loss=-0.0)) == _statement(_update(train_loss=0.0))
        assert b'"train_loss":0.0' in _statement(_update(train_loss=-0.0))

    def test_a_loss_that_came_as_an_integer_is_stated_as_the_number_that_it_is(self):
        """Clients of other languages may pack 1.0 so."""
        assert b'"train_loss":1.0,' in _statement(_update(train_loss=1))

    @settings(max_examples=60)
    @given(
        loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        num_samples=st.integers(1, 10**12),
        sequence=st.integers(1, 2**53 - 1),
        payload=st.binary(max_size=50),
    )
    @example(loss=5e-324, num_samples=1, sequence=1, payload=b"")
    @example(loss=1e22, num_samples=1, sequence=1, payload=b"")
    def test_the_statement_survives_the_wire(self, loss, num_samples, sequence, payload):
        update = _update(train_loss=loss, num_samples=num_samples, sequence=sequence, payload=payload)
        received = wire.decode(ModelUpdate, wire.encode(update))
        assert _statement(received) == _statement(update)
        said = json.loads(_statement(received))
        assert said.get("train_loss") == loss
        if loss is not None:
            # Bit by bit, but for the sign of a zero.
            assert struct.pack("<d", said["train_loss"]) == struct.pack("<d", loss + 0.0)


def test_canonical_json_is_sorted_without_spaces_and_says_nothing_of_what_is_not_given():
    assert canonical({"b": 1.5, "a": "\u00e9\n", "c": None, "d": False, "e": 0}) == b'{"a":"\\u00e9\\n","b":1.5,"d":false,"e":0}'


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_signed(number):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"train_loss": number})


NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)
MEMBERSHIPS = st.builds(
    Membership,
    federation=NAMES,
    party=NAMES,
    revision=st.integers(1, 2**53 - 1),
    at=st.floats(0, 1e12),
    public_key=st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    display_name=st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=30),
    group=st.none() | NAMES,
    num_samples=st.none() | st.integers(1, 10**12),
    tier=NAMES,
    suspended=st.booleans(),
    reason=st.text(st.characters(codec="utf-8"), max_size=30),
)


class TestMemberships:
    def test_the_statement_of_a_membership_is_this(self):
        member = Membership(federation="ward", party="ann", revision=2, at=5.5, display_name="Charit\u00e9", num_samples=10)
        assert membership_statement(member) == (
            b'{"at":5.5,"display_name":"Charit\\u00e9","federation":"ward","num_samples":10,"party":"ann","reason":"",'
            b'"revision":2,"schema_version":1,"suspended":false,"tier":"standard"}'
        )

    @settings(max_examples=50)
    @given(member=MEMBERSHIPS)
    def test_what_the_federation_signed_is_vouched_for_after_the_way_through_json(self, member):
        signed = sign_membership(FEDERATION_KEY, member)
        kept = json.loads(json.dumps(signed.model_dump(mode="json")))
        read = SignedMembership.model_validate(kept)
        assert read == signed
        assert is_vouched_for(read, by=FEDERATION_KEY.public)
        assert not is_vouched_for(read, by=key_of(member.party).public)

    @settings(max_examples=50)
    @given(one=MEMBERSHIPS, other=MEMBERSHIPS, data=st.data())
    def test_a_signature_is_of_one_membership_alone(self, one, other, data):
        fields = data.draw(st.lists(st.sampled_from(sorted(set(Membership.model_fields) - {"schema_version"})), min_size=1))
        changed = one.model_copy(update={name: getattr(other, name) for name in fields})
        signed = sign_membership(FEDERATION_KEY, one).model_copy(update={"membership": changed})
        assert is_vouched_for(signed, by=FEDERATION_KEY.public) == (changed == one)

    def test_a_membership_is_not_made_by_its_party(self):
        planted = membership("ann", by=key_of("ann"), tier="trusted")
        assert not is_vouched_for(planted, by=FEDERATION_KEY.public)

    def test_a_frame_that_says_what_a_membership_says_vouches_for_none(self):
        member = membership("ann").membership
        as_a_frame = FEDERATION_KEY.sign("frame", membership_statement(member))
        assert not is_vouched_for(SignedMembership(membership=member, signature=as_a_frame), by=FEDERATION_KEY.public)
