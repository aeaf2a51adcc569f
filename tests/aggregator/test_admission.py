import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from enrolled_parties import membership
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregator.admission import (
    MAX_MAGNITUDE,
    Credentials,
    Examined,
    Limits,
    Refused,
    RolledBack,
    Sender,
    admit,
    examine,
    identify,
)
from aggregator.merging.fold import Buffer, State
from aggregator.merging.strategies import build_strategy
from broker_fl.codecs.codec import encode, parse_codec
from broker_fl.codecs.indices import encode_indices
from broker_fl.config import MergingSettings
from broker_fl.errors import DecodeError
from broker_fl.parameters import manifest_of
from broker_fl.privacy.policy import Demands
from broker_fl.topology import Names
from broker_fl.transports.parts import part_of
from schemas import wire
from schemas.privacy import PrivacyFacts, PrivacyPlan
from schemas.receipt import Reason
from schemas.update import ModelUpdate

NAMES = Names("hospitals")
MANIFEST = manifest_of({"weight": np.zeros((40, 50), np.float32), "bias": np.zeros(40, np.float32)})
LIMITS = Limits(NAMES, MANIFEST, max_update_bytes=4 * MANIFEST.size + 4096, max_update_norm=None)
UPDATE_ID = "0123456789abcdef" * 2
SENDER = Sender("a", UPDATE_ID)
LEAST_NOISE = 1.1
DEMANDS = Demands(
    PrivacyPlan(noise_multiplier=LEAST_NOISE, max_grad_norm=1.0, delta=1e-5, accountant="rdp"), min_noise_multiplier=LEAST_NOISE
)
DIGESTS = {version: f"{version:064x}" for version in range(100)}


def _payload(codec: str = "topk:0.05+int4", scale: float = 1.0) -> bytes:
    generator = np.random.default_rng(1)
    vector = (scale * generator.normal(size=MANIFEST.size)).astype(np.float32)
    return encode(vector, parse_codec(codec), manifest=MANIFEST, generator=generator)


def _update(**changed: object) -> ModelUpdate:
    fields = {
        "federation": "hospitals",
        "party": "a",
        "update_id": UPDATE_ID,
        "sequence": 1,
        "base_version": 7,
        "base_digest": DIGESTS[7],
        "manifest_digest": MANIFEST.digest,
        "codec": "topk:0.05+int4",
        "num_samples": 100,
        "num_steps": 10,
        "train_loss": 0.5,
        "payload": _payload(),
    }
    return ModelUpdate.model_validate(fields | changed)


def _noised(noise_multiplier: float) -> ModelUpdate:
    facts = PrivacyFacts(noise_multiplier=noise_multiplier, sample_rate=0.1, max_grad_norm=1.0)
    return _update(train_loss=None, privacy=facts)


def _examined(**changed: object) -> Examined | Refused:
    return examine(wire.encode(_update(**changed)), SENDER, LIMITS)


def _reason(found: object) -> str:
    assert isinstance(found, Refused), found
    assert found.detail
    assert "\n" not in found.detail
    return found.reason


def _admitted(
    version: int,
    *,
    state: State | None = None,
    merging: MergingSettings | None = None,
    rolled_back: Sequence[RolledBack] = (),
    **changed: object,
) -> Refused | None:
    examined = _examined(**changed)
    assert isinstance(examined, Examined), examined
    state = state or State(version, np.zeros(MANIFEST.size, np.float32))
    strategy = build_strategy(merging or MergingSettings())
    return admit(examined, state, strategy=strategy, frame_digests=DIGESTS, rolled_back=rolled_back)


class TestWhoSentIt:
    def test_a_party_is_known_by_its_exchange_and_its_login(self):
        assert identify(exchange="fl.hospitals.up.a", user_id="a", message_id=UPDATE_ID, names=NAMES) == SENDER

    @pytest.mark.parametrize(
        ("exchange", "user_id"),
        [
            ("fl.hospitals.up.a", None),
            ("fl.hospitals.up.a", "b"),
            ("fl.hospitals.up.a", ""),
            ("fl.hospitals.up.a", "A"),
            ("fl.hospitals.model", "a"),
            ("fl.other.up.a", "a"),
            ("", "a"),
            ("", "updates"),
        ],
    )
    def test_anyone_else_is_refused_for_identity(self, exchange, user_id):
        assert _reason(identify(exchange=exchange, user_id=user_id, message_id=UPDATE_ID, names=NAMES)) == "identity"

    @pytest.mark.parametrize("party", ["", "a.b", "Hospital", "a b", "x" * 64])
    def test_a_login_that_no_receipt_could_name_is_refused_for_identity(self, party):
        found = identify(exchange=f"fl.hospitals.up.{party}", user_id=party, message_id=UPDATE_ID, names=NAMES)
        assert _reason(found) == "identity"

    @pytest.mark.parametrize("message_id", ["", "1", UPDATE_ID.upper(), UPDATE_ID + "0", UPDATE_ID + "\n", "g" * 32])
    def test_a_message_id_that_is_no_update_id_is_malformed(self, message_id):
        assert _reason(identify(exchange="fl.hospitals.up.a", user_id="a", message_id=message_id, names=NAMES)) == "malformed"


class TestExamination:
    def test_a_good_update_is_decoded(self):
        examined = _examined()
        assert isinstance(examined, Examined)
        assert examined.update == _update()
        assert examined.delta.size == MANIFEST.size

    @pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4", "topk:0.5+float32", "topk:1e-4+int8"])
    def test_any_codec_is_taken(self, codec):
        assert isinstance(_examined(codec=codec, payload=_payload(codec)), Examined)

    @pytest.mark.parametrize(
        "body", [b"", b"\x00", b"not msgpack", wire.encode(_update())[:-1], wire.encode(_update()) + b"\x00"]
    )
    def test_what_is_no_update_is_malformed(self, body):
        assert _reason(examine(body, SENDER, LIMITS)) == "malformed"

    def test_a_receipt_is_no_update(self):
        assert _reason(examine(wire.encode(MANIFEST), SENDER, LIMITS)) == "malformed"

    def test_another_update_id_than_the_propertys_is_malformed(self):
        assert _reason(_examined(update_id="f" * 32)) == "malformed"

    def test_another_party_than_the_sender_is_refused_for_identity(self):
        assert _reason(_examined(party="b")) == "identity"

    def test_another_federation_is_refused(self):
        assert _reason(_examined(federation="banks")) == "federation"

    def test_another_model_is_refused_for_its_manifest(self):
        assert _reason(_examined(manifest_digest="0" * 64)) == "manifest"

    @pytest.mark.parametrize("codec", ["", "int5", "topk:2+int4", "topk:nan+int4", "gzip", "float32\n"])
    def test_a_codec_that_is_not_known_is_refused(self, codec):
        assert _reason(_examined(codec=codec)) == "codec"

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            _payload()[:-1],
            _payload() + b"\x00",
            _payload("int8"),
            bytes(100),
            encode_indices(np.array([MANIFEST.size])) + bytes(8000),
        ],
    )
    def test_a_payload_that_is_not_in_its_codec_is_refused(self, payload):
        assert _reason(_examined(payload=payload)) == "codec"

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_value_that_is_not_finite_is_refused(self, value):
        payload = bytearray(_payload("float32"))
        payload[400:404] = struct.pack("<f", value)
        assert _reason(_examined(codec="float32", payload=bytes(payload))) == "non_finite"

    def test_a_scale_that_makes_infinities_is_refused(self):
        blocks = -(-MANIFEST.size // 1024)
        payload = struct.pack("<f", 3e38) * blocks + b"\x7f" * MANIFEST.size
        assert _reason(_examined(codec="int8", payload=payload)) == "codec"

    def test_values_that_could_make_the_model_overflow_are_refused_even_without_a_bound_on_the_norm(self):
        at_most = np.full(MANIFEST.size, MAX_MAGNITUDE, np.float32)
        assert isinstance(_examined(codec="float32", payload=at_most.tobytes()), Examined)
        for value in (1.01 * MAX_MAGNITUDE, -1.01 * MAX_MAGNITUDE, 3e38):
            payload = np.where(np.arange(MANIFEST.size) == 1, value, at_most / 2).astype(np.float32).tobytes()
            refused = _examined(codec="float32", payload=payload)
            assert isinstance(refused, Refused)
            assert refused.reason == "bounds"

    def test_a_message_over_the_bound_is_refused_before_it_is_read(self):
        assert _reason(examine(b"\xff" * (LIMITS.max_update_bytes + 1), SENDER, LIMITS)) == "bounds"
        assert _reason(examine(b"\xff" * LIMITS.max_update_bytes, SENDER, LIMITS)) == "malformed"

    def test_a_dense_update_is_within_the_bound(self):
        assert isinstance(_examined(codec="float32", payload=_payload("float32")), Examined)

    def test_a_norm_over_the_bound_is_refused_and_one_at_it_is_taken(self):
        examined = _examined()
        assert isinstance(examined, Examined)
        norm = examined.delta.norm()
        body = wire.encode(_update())
        assert isinstance(examine(body, SENDER, replace(LIMITS, max_update_norm=norm)), Examined)
        assert _reason(examine(body, SENDER, replace(LIMITS, max_update_norm=norm * 0.999))) == "bounds"

    def test_an_update_without_the_noise_that_is_asked_for_is_refused_and_told_what_is_missing(self):
        found = examine(wire.encode(_update()), SENDER, replace(LIMITS, privacy=DEMANDS))
        assert _reason(found) == "privacy"
        assert found.detail == "was trained without differential privacy, and this federation asks for dp-sgd"

    def test_a_noise_below_the_least_is_refused_and_the_least_itself_is_taken(self):
        limits = replace(LIMITS, privacy=DEMANDS)
        for noise in (LEAST_NOISE, math.nextafter(LEAST_NOISE, 2), 50.0):
            assert isinstance(examine(wire.encode(_noised(noise)), SENDER, limits), Examined)
        found = examine(wire.encode(_noised(math.nextafter(LEAST_NOISE, 0))), SENDER, limits)
        assert _reason(found) == "privacy"
        found = examine(wire.encode(_noised(0.5)), SENDER, limits)
        assert found == Refused("privacy", "its noise multiplier 0.5 is below this federation's 1.1")

    def test_any_noise_is_taken_where_no_least_one_is_asked_for_but_some_is(self):
        limits = replace(LIMITS, privacy=replace(DEMANDS, min_noise_multiplier=None))
        assert isinstance(examine(wire.encode(_noised(0.5)), SENDER, limits), Examined)
        assert _reason(examine(wire.encode(_update()), SENDER, limits)) == "privacy"

    def test_updates_with_and_without_noise_are_taken_where_none_is_asked_for(self):
        for update in (_update(), _noised(0.5), _update(train_loss=None)):
            examined = examine(wire.encode(update), SENDER, LIMITS)
            assert isinstance(examined, Examined)
            assert examined.update == update

    @settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 5))
    def test_flipped_bits_are_taken_or_refused(self, seed, flips):
        bits = np.unpackbits(np.frombuffer(wire.encode(_update()), np.uint8))
        bits[np.random.default_rng(seed).integers(0, bits.size, flips)] ^= 1
        found = examine(np.packbits(bits).tobytes(), SENDER, LIMITS)
        assert isinstance(found, Examined) or _reason(found) in get_args(Reason)


class TestAdmission:
    @pytest.mark.parametrize("version", [7, 8, 39])
    def test_an_update_within_the_bound_is_admitted(self, version):
        assert _admitted(version) is None

    def test_an_update_past_the_bound_is_too_stale(self):
        assert _reason(_admitted(40)) == "too_stale"
        assert _reason(_admitted(8, merging=MergingSettings(max_staleness=0))) == "too_stale"

    def test_an_update_from_a_version_to_come_has_no_base(self):
        assert _reason(_admitted(6)) == "base"

    def test_an_update_from_a_version_that_was_never_broadcast_has_no_base(self):
        assert _reason(_admitted(8, base_digest=DIGESTS[8])) == "base"
        assert _reason(_admitted(110, base_version=100, base_digest="0" * 64)) == "base"

    def test_an_update_that_is_too_stale_is_that_even_if_its_base_is_forgotten(self):
        assert _reason(_admitted(200, base_version=101, base_digest="0" * 64)) == "too_stale"

    def test_an_update_from_a_version_that_was_taken_back_is_rolled_back(self):
        # Version 9 went back to version 6: 7 and 8 count no more, 6 and 9 do.
        gone = [RolledBack(to=6, by=9)]
        for base_version, expected in ((6, None), (7, "rolled_back"), (8, "rolled_back"), (9, None)):
            found = _admitted(12, rolled_back=gone, base_version=base_version, base_digest=DIGESTS[base_version])
            assert (found.reason if found else None) == expected
        assert "version 9 went back to 6" in _admitted(12, rolled_back=gone).detail

    def test_an_update_from_a_version_that_was_taken_back_is_that_even_if_it_is_too_stale(self):
        assert _reason(_admitted(90, rolled_back=[RolledBack(to=20, by=30), RolledBack(to=6, by=9)])) == "rolled_back"

    def test_a_rollback_within_another_takes_all_versions_of_both_back(self):
        gone = [RolledBack(to=6, by=9), RolledBack(to=2, by=12)]
        for base_version in range(3, 12):
            found = _admitted(15, rolled_back=gone, base_version=base_version, base_digest=DIGESTS[base_version])
            assert _reason(found) == "rolled_back"
        assert _admitted(15, rolled_back=gone, base_version=12, base_digest=DIGESTS[12]) is None

    def test_mixing_needs_the_base_itself(self):
        mixing = MergingSettings(mode="mixing")
        model = np.zeros(MANIFEST.size, np.float32)
        assert _admitted(8, merging=mixing, state=State(8, model, bases={7: model})) is None
        assert _reason(_admitted(8, merging=mixing, state=State(8, model, bases={8: model}))) == "base"

    def test_a_second_update_of_a_party_for_one_version_is_repeated_where_the_strategy_takes_one(self):
        model = np.zeros(MANIFEST.size, np.float32)
        waiting = State(7, model, buffer=Buffer(model.copy(), 100.0, ("b", "a")))
        assert _reason(_admitted(7, merging=MergingSettings(strategy="fedavg"), state=waiting)) == "repeated"
        assert _admitted(7, merging=MergingSettings(strategy="fedbuff"), state=waiting) is None
        others = replace(waiting, buffer=Buffer(model.copy(), 100.0, ("b",)))
        assert _admitted(7, merging=MergingSettings(strategy="fedavg"), state=others) is None

    @pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
    def test_a_second_update_of_a_party_in_a_buffer_that_gets_noise_is_repeated(self, strategy):
        model = np.zeros(MANIFEST.size, np.float32)
        waiting = State(7, model, buffer=Buffer(model.copy(), 2.0, ("b", "a")))
        noisy = MergingSettings(strategy=strategy, clip_norm=1.0, noise_multiplier=1.0)
        found = _admitted(7, merging=noisy, state=waiting)
        assert _reason(found) == "repeated"
        assert found.detail == "there is an update of 'a' in the buffer already"
        others = replace(waiting, buffer=Buffer(model.copy(), 1.0, ("b",)))
        assert _admitted(7, merging=noisy, state=others) is None
        assert _admitted(7, merging=noisy, state=State(7, model)) is None

    def test_a_second_update_of_a_party_in_a_buffer_that_is_only_clipped_is_taken(self):
        model = np.zeros(MANIFEST.size, np.float32)
        waiting = State(7, model, buffer=Buffer(model.copy(), 2.0, ("b", "a")))
        assert _admitted(7, merging=MergingSettings(strategy="fedbuff", clip_norm=1.0), state=waiting) is None

    def test_the_bound_of_fedavg_is_the_current_version(self):
        assert _admitted(7, merging=MergingSettings(strategy="fedavg")) is None
        assert _reason(_admitted(8, merging=MergingSettings(strategy="fedavg"))) == "too_stale"

    def test_asking_changes_nothing(self):
        state = State(9, np.ones(MANIFEST.size, np.float32))
        _admitted(9, state=state)
        assert state.version == 9
        assert (state.model == 1).all()


def test_who_says_more_examples_than_it_was_enrolled_with_is_refused():
    credentials = Credentials(membership("a", num_samples=100))
    assert isinstance(examine(wire.encode(_update(num_samples=100)), SENDER, LIMITS, credentials), Examined)
    found = examine(wire.encode(_update(num_samples=101)), SENDER, LIMITS, credentials)
    assert _reason(found) == "samples"
    assert found.detail.startswith("says 101 examples, and its party was enrolled with 100")
    assert found.update is not None
    anyone = examine(wire.encode(_update(num_samples=101)), SENDER, LIMITS, Credentials(membership("a")))
    assert isinstance(anyone, Examined)


def test_every_reason_is_found_here_but_for_parts_floods_and_what_trust_says():
    with pytest.raises(DecodeError):
        part_of({"x-fl-part": 0})
    found_here = {
        "malformed",
        "identity",
        "federation",
        "manifest",
        "codec",
        "non_finite",
        "bounds",
        "base",
        "rolled_back",
        "too_stale",
        "repeated",
        "privacy",
        "signature",
        "samples",
    }
    of_trust = {"outlier", "suspended", "norm", "direction", "tier"}
    assert set(get_args(Reason)) == found_here | of_trust | {"parts", "rate"}
