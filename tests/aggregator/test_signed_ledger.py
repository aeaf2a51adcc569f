"""Whose word the entries are: what verification finds though somebody made the hash chain again."""

import uuid
from dataclasses import replace

import pytest
from enrolled_parties import FEDERATION_KEY, key_of, membership, signature_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import update as sql_update

from aggregator.admission import Examined
from aggregator.compaction import compact
from aggregator.decisions import accepted_entry
from aggregator.ledger import FEDERATION_KEY as FEDERATION_KEY_FACT
from aggregator.merging.fold import Outcome
from aggregator.opening import open_ledger_for_reading
from aggregator.records import ENTRIES
from aggregator.signatures import Signatures
from aggregator.trust import Judgement
from aggregator.verification import verify
from broker_fl.codecs.delta import Delta
from broker_fl.config import TrustSettings
from broker_fl.errors import ConfigurationError, DamagedError
from broker_fl.signing import SigningKey, is_signed, payload_digest, sign_membership, update_statement
from schemas.membership import SignedMembership
from schemas.privacy import PrivacyFacts
from schemas.update import ModelUpdate

BOTH = pytest.mark.parametrize("bench", ["sqlite", "postgresql"], indirect=True)
NEW_KEY = key_of("ann", 2)
ROTATED = membership("ann", revision=2, public_key=NEW_KEY.public)


def rules(bench):
    return {"signed_for": bench.ledger_id, "federation_key": FEDERATION_KEY.public, "trust": TrustSettings()}


def verified(bench, **party_keys):
    with open_ledger_for_reading(bench.url) as ledger:
        return verify(ledger, bench.snapshots(), party_keys=party_keys or None)


@pytest.fixture
def life(bench):
    """Entry 2 is bob's and unsigned; 3 enrols ann, who signs 4 to 6, of which 6 is refused; 7 is her new key, which signs 8; 9
    enrols bob, who signs 10."""
    with bench.opened() as coordinator:
        base = bench.frames()[0]
        coordinator.decide([bench.arrival(bench.update("bob", base=base))])
    with bench.opened(**rules(bench)) as coordinator:

        def decide(party="ann", *, member=None, key=None, **changes):
            update = bench.update(party, base=base, **changes)
            (verdict,) = coordinator.decide(bench.signed_arrivals(update, member=member or membership(party), key=key))
            assert verdict.receipt is not None

        decide(seed=1)
        decide(seed=2)
        decide(seed=3, base_digest="0" * 64)
        decide(seed=4, member=ROTATED, key=NEW_KEY)
        decide("bob", seed=5, codec="topk:0.1+int8")
        bench.model = coordinator.model_digest()
    return bench


@BOTH
def test_honest_ledger_is_verified_by_the_keys_that_the_federation_vouches_for(life):
    kinds = [entry.kind for entry in life.entries()]
    assert kinds == ["merging", "update", "party", "update", "update", "update", "party", "update", "party", "update"]
    found = verified(life)
    assert (found.signed, found.unsigned, found.merged, found.refused) == (4, 1, 5, 1)
    assert found.model_digest == life.model


@BOTH
def test_keys_of_the_parties_themselves_do_as_well_with_those_that_they_gave_up(life):
    keys = {"ann": [key_of("ann").public, NEW_KEY.public]}
    with pytest.raises(DamagedError, match="entry 10 is signed, and nobody says by which key of party 'bob'"):
        verified(life, **keys)
    with pytest.raises(DamagedError, match="entry 2 lacks the signature of party 'bob', which has a key"):
        verified(life, **keys, bob=[key_of("bob").public])
    with pytest.raises(DamagedError, match="entry 4 is not signed by the key of party 'ann'"):
        verified(life, ann=[NEW_KEY.public])
    with pytest.raises(DamagedError, match="entry 8 is not signed by the key of party 'ann'"):
        verified(life, ann=[key_of("ann").public])


def test_ledger_without_signatures_is_verified_as_before(bench):
    with bench.opened() as coordinator:
        coordinator.decide([bench.arrival(bench.update(base=bench.frames()[0]))])
    found = verified(bench)
    assert (found.signed, found.unsigned) == (0, 1)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("SET train_loss = 0.1 WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        ("SET num_samples = 11 WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        ("SET num_steps = 2 WHERE seq = 5", "entry 5 is not signed by the key of party 'ann'"),
        ("SET sequence = 2 WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        ("SET update_id = 'ab' || substr(update_id, 3) WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        ("SET base_digest = 'ab' || substr(base_digest, 3) WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        ("SET noise_multiplier = 1.0, sample_rate = 0.1 WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        ("SET party = 'bob' WHERE seq = 4", "entry 4 is signed, and nobody says by which key of party 'bob'"),
        ("SET signature = NULL WHERE seq = 4", "entry 4 lacks the signature of party 'ann', which has a key"),
        ("SET signature = upper(signature) WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        ("SET signature = '' WHERE seq = 4", "entry 4 is not signed by the key of party 'ann'"),
        (
            "SET signature = (SELECT signature FROM entries WHERE seq = 5) WHERE seq = 4",
            "entry 4 is not signed by the key of party 'ann'",
        ),
        ("SET factor = 0.5 WHERE seq = 4", "entry 4 was not merged as it says"),
        ("SET weight = 0.5 WHERE seq = 4", "entry 4 was not merged as it says"),
        ("SET factor = 0.5, weight = weight / 2 WHERE seq = 4", "entry 4 says another model than replay makes"),
        ("SET payload = NULL WHERE seq = 3", "entry 3 of the ledger holds no membership"),
        ("SET party = 'cem' WHERE seq = 9", "entry 9 holds a membership that the federation's key did not sign"),
    ],
)
def test_entry_that_was_forged_with_its_hash_chain_is_found_by_its_partys_signature_or_by_replay(life, statement, message):
    life.forge(f"UPDATE entries {statement}")
    with pytest.raises(DamagedError, match=message):
        verified(life)


def test_payload_that_was_forged_with_its_digest_and_the_model_after_it_is_found(life):
    """Each model after it would have to be made again; the signature tells first."""
    payload = next(entry.payload for entry in life.entries() if entry.seq == 4)
    digest = payload_digest(bytes(len(payload)))
    life.forge(f"UPDATE entries SET payload = zeroblob({len(payload)}), payload_digest = '{digest}' WHERE seq = 4")
    with pytest.raises(DamagedError, match="entry 4 is not signed by the key of party 'ann'"):
        verified(life)


def _planted(bench, seq, signed):
    """As somebody writes it who knows how."""
    content = signed.model_dump_json().encode()
    bench.forge(
        f"UPDATE entries SET payload = X'{content.hex()}', payload_digest = '{payload_digest(content)}' WHERE seq = {seq}"
    )


MALLORY = SigningKey.from_text("ba" * 32)


@pytest.mark.parametrize(
    ("seq", "planted", "message"),
    [
        (
            3,
            membership("ann", by=MALLORY, public_key=MALLORY.public),
            "entry 3 holds a membership that the federation's key did not",
        ),
        (3, membership("ann", by=MALLORY), "entry 3 holds a membership that"),
        (3, membership("bob"), "entry 3 holds a membership that"),
        (3, membership("ann", federation="banks"), "entry 3 holds a membership that"),
        (3, ROTATED, "entry 4 is not signed by the key of party 'ann'"),
        (7, membership("ann"), "entry 7 goes back to an older membership of 'ann'"),
        (3, membership("ann", revision=2), "entry 7 goes back to an older membership of 'ann'"),
        (7, membership("ann", revision=2, public_key=None), "entry 8 is signed, and nobody says by which key"),
    ],
)
def test_membership_that_was_planted_is_found(life, seq, planted, message):
    _planted(life, seq, planted)
    with pytest.raises(DamagedError, match=message):
        verified(life)


@pytest.mark.parametrize("statement", [f"UPDATE meta SET value = '{MALLORY.public}'", "DELETE FROM meta"])
def test_other_key_of_the_federation_vouches_for_nobody(life, statement):
    life.forge(f"{statement} WHERE key = '{FEDERATION_KEY_FACT}'")
    with pytest.raises(DamagedError, match="entry 3 holds a membership that the federation's key did not sign"):
        verified(life)


def test_whoever_makes_all_of_it_again_with_keys_of_his_own_is_found_by_those_of_the_parties(life):
    """An aggregator could: its ledger, its key. The keys that the parties give an auditor are not its."""
    with life.ledger() as ledger:
        signatures = Signatures(ledger.facts(), name="forged")
        with ledger.transaction():
            ledger.set_fact(FEDERATION_KEY_FACT, MALLORY.public)
            for entry in list(ledger.entries_after(0)):
                changes = {}
                if entry.kind == "party":
                    member = SignedMembership.model_validate_json(entry.payload).membership
                    forged = sign_membership(MALLORY, member.model_copy(update={"public_key": MALLORY.public}))
                    content = forged.model_dump_json().encode()
                    changes = {"payload": content, "payload_digest": payload_digest(content)}
                elif entry.signature is not None:
                    facts = {"train_loss": 0.125}
                    changes = {**facts, "signature": MALLORY.sign("update", signatures.statement(replace(entry, **facts)))}
                if changes:
                    ledger._connection.execute(sql_update(ENTRIES).where(ENTRIES.c.seq == entry.seq).values(**changes))
    life.forge("UPDATE entries SET at = at WHERE seq = 1")
    assert verified(life).signed == 4
    with pytest.raises(DamagedError, match="entry 4 is not signed by the key of party 'ann'"):
        verified(life, ann=[key_of("ann").public, NEW_KEY.public])


@BOTH
def test_signatures_are_verified_after_compaction_too(life):
    with life.ledger() as ledger:
        assert compact(ledger, life.snapshots(), keep=0).payloads == 5
    assert [entry.seq for entry in life.entries() if entry.payload is not None] == [1, 3, 7, 9]
    found = verified(life)
    assert (found.signed, found.unsigned, found.replayed_from) == (4, 1, 5)
    assert found.model_digest == life.model


def test_forged_entry_is_found_after_compaction_too(life):
    """There is no payload to replay any more: what it was is in the signed statement."""
    with life.ledger() as ledger:
        compact(ledger, life.snapshots(), keep=0)
    life.forge(f"UPDATE entries SET payload_digest = '{'ab' * 32}' WHERE seq = 4")
    with pytest.raises(DamagedError, match="entry 4 is not signed by the key of party 'ann'"):
        verified(life)


def test_compacted_ledger_leads_on_with_what_it_knew_of_its_parties(life):
    with life.ledger() as ledger:
        compact(ledger, life.snapshots(), keep=0)
    with life.opened(**rules(life)) as coordinator:
        assert coordinator.members() == [ROTATED, membership("bob")]
        assert coordinator.model_digest() == life.model


def test_update_whose_key_was_given_up_before_its_turn_is_refused_so_that_the_ledger_stays_true(bench):
    """It was looked at before the register told of the new key, and comes after an update that brought that."""
    with bench.opened(**rules(bench)) as coordinator:
        base = bench.frames()[0]
        late = bench.signed_arrivals(bench.update(base=base, seed=1), member=membership("ann"))
        in_parts = bench.signed_arrivals(
            bench.update(base=base, seed=2), member=membership("ann"), part_bytes=4096, limit_bytes=0
        )
        assert len(in_parts) > 1
        coordinator.decide(bench.signed_arrivals(bench.update(base=base), member=ROTATED, key=NEW_KEY))
        *_, of_parts = coordinator.decide([*late, *in_parts])
        assert (of_parts.refused.reason, of_parts.refused.detail) == (
            "signature",
            "is signed by a key that its party has given up",
        )
        # A revision that changed something else is no other key.
        older = membership("ann", revision=1, public_key=NEW_KEY.public)
        (merged,) = coordinator.decide(bench.signed_arrivals(bench.update(base=base, seed=3), member=older, key=NEW_KEY))
        assert merged.receipt.outcome == "merged"
    reasons = [entry.reason for entry in bench.entries() if entry.kind == "update"]
    assert reasons == [None, "signature", "signature", None]
    assert verified(bench).signed == 2


def test_key_of_the_federation_is_pinned_and_no_other_one_goes_on(bench):
    with bench.opened(**rules(bench)):
        pass
    other = {**rules(bench), "federation_key": MALLORY.public}
    with bench.coordinator(**other) as coordinator, pytest.raises(ConfigurationError, match="belongs to the federation's key"):
        coordinator.open(bench.initial)
    with bench.ledger() as ledger:
        assert ledger.facts()[FEDERATION_KEY_FACT] == FEDERATION_KEY.public

    none = {**other, "federation_key": None}
    forged = "an unsigned one among them would look forged"
    with bench.coordinator(**none) as coordinator, pytest.raises(ConfigurationError, match=forged):
        coordinator.open(bench.initial)


def test_key_that_comes_later_is_pinned_from_then_on(bench):
    with bench.opened():
        pass
    with bench.ledger() as ledger:
        assert FEDERATION_KEY_FACT not in ledger.facts()
    with bench.opened(**rules(bench)):
        pass
    with bench.ledger() as ledger:
        assert ledger.facts()[FEDERATION_KEY_FACT] == FEDERATION_KEY.public


NOISES = st.none() | st.builds(
    PrivacyFacts,
    noise_multiplier=st.floats(0.01, 1000),
    sample_rate=st.floats(0, 1, exclude_min=True),
    max_grad_norm=st.just(1.0),
)
UPDATES = st.builds(
    ModelUpdate,
    federation=st.just("ward"),
    ledger=st.none(),
    party=st.sampled_from(["ann", "b-0_c"]),
    update_id=st.just("0" * 32),
    sequence=st.integers(1, 2**53 - 1),
    base_version=st.integers(0, 2**53 - 1),
    base_digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    manifest_digest=st.just("e" * 64),
    codec=st.sampled_from(["float32", "topk:1e-05+int4"]),
    num_samples=st.integers(1, 10**12),
    num_steps=st.integers(1, 2**53 - 1),
    train_loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    privacy=NOISES,
    payload=st.binary(max_size=40),
)
EXTREMES = {
    "federation": "ward",
    "party": "ann",
    "update_id": "0" * 32,
    "sequence": 2**53 - 1,
    "base_version": 2**53 - 1,
    "base_digest": "a" * 64,
    "manifest_digest": "e" * 64,
    "codec": "float32",
    "num_samples": 10**12,
    "num_steps": 2**53 - 1,
    "payload": b"\x00",
}


@BOTH
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(updates=st.lists(UPDATES, min_size=1, max_size=8))
@example(
    updates=[
        ModelUpdate(train_loss=loss, **EXTREMES) for loss in [-0.0, 5e-324, 1.7976931348623157e308, 0.1, 1e16, 1e22, 1 / 3, None]
    ]
)
def test_statement_is_the_same_from_the_update_and_from_what_the_ledger_kept_of_it(new_ledger, updates):
    with new_ledger() as ledger:
        facts = ledger.facts()
        ours = {"ledger": facts["ledger_id"]}
        updates = [update.model_copy(update={**ours, "update_id": uuid.uuid4().hex}) for update in updates]
        first = ledger.last_seq() + 1
        entries = []
        for seq, update in enumerate(updates, start=first):
            examined = Examined(update, Delta(1, b"", None), payload_digest(update.payload), 1.0, signature_of(update))
            entries.append(accepted_entry(seq, examined, Judgement(), Outcome("merged", 0, 0.5), at=1.0, version=seq, size=9))
        with ledger.transaction():
            ledger.append([replace(entry, model_digest="") for entry in entries])
        signatures = Signatures(facts, name=ledger.name)
        kept = list(ledger.entries_after(first - 1))
        for entry, update in zip(kept, updates, strict=True):
            statement = update_statement(update, payload_digest=payload_digest(update.payload))
            assert signatures.statement(entry) == statement
            assert is_signed("update", statement, entry.signature, by=key_of(update.party).public)


@pytest.fixture
def new_ledger(bench):
    """Opens the bench's ledger, each time as it was left; it is of a federation."""

    def opened():
        with bench.ledger() as ledger:
            if "federation" not in ledger.facts():
                with ledger.transaction():
                    ledger.set_fact("federation", "ward")
                    ledger.set_fact("manifest", "e" * 64)
        return bench.ledger()

    return opened
