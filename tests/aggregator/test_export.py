"""What an auditor does with the exported lines: with SHA-256, text and RFC 8032 alone, as the words in `aggregator/chain.py` and
`broker_fl/signing.py` say it."""

import hashlib
import json
import sqlite3
from contextlib import closing

import ed25519_by_the_rfc as rfc8032
import pytest
from enrolled_parties import FEDERATION_KEY, key_of, membership
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aggregator.compaction import compact
from aggregator.export import lines
from aggregator.history import roll_back
from broker_fl.config import MergingSettings, TrustSettings
from broker_fl.errors import DamagedError
from schemas.privacy import PrivacyFacts


def audit(text):
    """The last place in the chain. Raises ValueError with the number of the first line that is not as it was written."""
    first, *entries = text.splitlines()
    place = hashlib.sha256(first.encode("ascii")).digest()
    for number, entry in enumerate(entries, start=2):
        said, mark, chain = entry.rpartition(',"chain":"')
        place = hashlib.sha256(place + said.encode("ascii") + b"}").digest()
        if not mark or chain != place.hex() + '"}':
            raise ValueError(number)
    return place.hex()


STATED = (
    "base_digest",
    "base_version",
    "codec",
    "noise_multiplier",
    "num_samples",
    "num_steps",
    "party",
    "payload_digest",
    "sample_rate",
    "sequence",
    "train_loss",
    "update_id",
)


def is_signed(text, number, public_key):
    """Whether the party with this key signed the update in this line, counted from 0, the header."""
    lines = text.splitlines()
    header, entry = json.loads(lines[0]), json.loads(lines[number])
    stated = {name: entry[name] for name in STATED if name in entry}
    stated |= {name: header[name] for name in ("federation", "ledger", "manifest")}
    statement = json.dumps(stated, sort_keys=True, separators=(",", ":")).encode("ascii")
    signed = b"broker-fl/update/1" + bytes([0]) + statement
    return rfc8032.is_signed(bytes.fromhex(public_key), signed, bytes.fromhex(entry["signature"]))


def _export(bench):
    with bench.ledger() as ledger:
        return "".join(f"{line}\n" for line in lines(ledger))


@pytest.fixture(scope="module")
def life(new_bench):
    """Merged, buffered, refused, flushed, gone back, suspended, other settings; one of the updates is noised. What ann sends is
    signed, and what bob sends comes before signatures were asked for."""
    bench = new_bench()
    signed = {"signed_for": bench.ledger_id, "federation_key": FEDERATION_KEY.public, "trust": TrustSettings(suspend_below=0.95)}
    with bench.opened(merging=MergingSettings(strategy="fedbuff", buffer_size=5)) as coordinator:
        for seed in range(2):
            coordinator.decide([bench.arrival(bench.update("bob", base=bench.frames()[-1], seed=seed))])
    with bench.opened(snapshot_every_versions=2, **signed) as coordinator:
        base = bench.frames()[-1]

        def decide(**changes):
            coordinator.decide(bench.signed_arrivals(bench.update(base=base, **changes), member=membership("ann")))

        for seed in range(4):
            decide(seed=seed, train_loss=0.1 * seed)
        decide(base_digest="0" * 64)
        noised = PrivacyFacts(noise_multiplier=1.1, sample_rate=0.0625, max_grad_norm=0.5)
        decide(num_steps=40, train_loss=None, privacy=noised)
        bench.publish(coordinator)
        decide(codec="float32", payload=b"none")
        coordinator.finish()
    with bench.ledger() as ledger:
        roll_back(ledger, bench.snapshots(), to=1, holder="an operator", at=7.0)
    return bench


@pytest.fixture(scope="module")
def exported(life):
    return _export(life)


def test_auditor_confirms_an_honest_export(life, exported):
    with life.ledger() as ledger:
        newest = ledger.last_entry()
        facts = ledger.facts()
    assert audit(exported) == newest.chain
    first, *entries = map(json.loads, exported.splitlines())
    assert first == {
        "federation": "ward",
        "format": "5",
        "kind": "ledger",
        "ledger": facts["ledger_id"],
        "manifest": facts["manifest"],
    }
    assert [entry["seq"] for entry in entries] == list(range(1, newest.seq + 1))
    assert {entry["kind"] for entry in entries} == {"update", "flush", "merging", "rollback", "party", "suspension"}
    assert {entry.get("outcome") for entry in entries} == {None, "merged", "buffered", "refused"}


def test_auditor_confirms_who_signed_the_updates_by_the_keys_that_the_parties_gave_him(exported):
    entries = list(map(json.loads, exported.splitlines()))
    signed = [number for number, entry in enumerate(entries) if "signature" in entry]
    assert [number for number in signed if is_signed(exported, number, key_of("ann").public)] == signed
    merged = {number for number, entry in enumerate(entries) if entry.get("outcome") in ("merged", "buffered")}
    unsigned = merged - set(signed)
    assert ({entries[number]["party"] for number in unsigned}, len(unsigned)) == ({"bob"}, 2)
    # That of another base was refused, and is signed.
    assert [entries[number]["reason"] for number in signed if number not in merged] == ["base"]
    assert not is_signed(exported, signed[0], key_of("bob").public)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_auditor_finds_a_fact_of_an_update_that_was_changed_though_the_chain_was_made_again(exported, data):
    lines = exported.splitlines()
    number = data.draw(st.sampled_from([number for number, line in enumerate(lines) if '"signature"' in line]))
    entry = json.loads(lines[number])
    name = data.draw(st.sampled_from([name for name in STATED if name in entry]))
    entry[name] = f"{entry[name][:-1]}~" if isinstance(entry[name], str) else entry[name] + 1
    lines[number] = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    assert not is_signed("\n".join(lines), number, key_of("ann").public)


@pytest.mark.parametrize("name", ["federation", "ledger", "manifest"])
def test_auditor_finds_an_update_that_was_signed_for_another_ledger_federation_or_layout(exported, name):
    lines = exported.splitlines()
    number = next(number for number, line in enumerate(lines) if '"signature"' in line)
    lines[0] = json.dumps({**json.loads(lines[0]), name: "0" * 32})
    assert not is_signed("\n".join(lines), number, key_of("ann").public)


def test_export_says_what_an_update_cost_its_partys_privacy(exported):
    entries = [json.loads(line) for line in exported.splitlines()[1:]]
    (noised,) = [entry for entry in entries if "noise_multiplier" in entry]
    assert (noised["num_steps"], noised["noise_multiplier"], noised["sample_rate"]) == (40, 1.1, 0.0625)
    assert "train_loss" not in noised


def test_payload_digests_of_the_export_are_those_of_the_updates(life, exported):
    entries = life.entries()
    said = [json.loads(line).get("payload_digest") for line in exported.splitlines()[1:]]
    assert said == [entry.payload_digest for entry in entries]
    assert all(digest is not None for digest, entry in zip(said, entries, strict=True) if entry.payload is not None)


@settings(max_examples=200)
@given(data=st.data())
def test_auditor_finds_a_line_that_was_changed_in_one_character(exported, data):
    text = exported.splitlines()
    number = data.draw(st.integers(0, len(text) - 1))
    at = data.draw(st.integers(0, len(text[number]) - 1))
    other = data.draw(st.characters(min_codepoint=32, max_codepoint=126))
    assume(other != text[number][at])
    text[number] = text[number][:at] + other + text[number][at + 1 :]
    with pytest.raises(ValueError, match=f"^{max(number + 1, 2)}$"):
        audit("\n".join(text))


@given(data=st.data())
def test_auditor_finds_a_line_that_was_taken_out(exported, data):
    text = exported.splitlines()
    number = data.draw(st.integers(0, len(text) - 2))
    del text[number]
    with pytest.raises(ValueError, match=f"^{max(number + 1, 2)}$"):
        audit("\n".join(text))


@given(data=st.data())
def test_auditor_finds_two_lines_that_changed_places(exported, data):
    text = exported.splitlines()
    one, other = sorted(data.draw(st.lists(st.integers(1, len(text) - 1), min_size=2, max_size=2, unique=True)))
    text[one], text[other] = text[other], text[one]
    with pytest.raises(ValueError, match=f"^{one + 1}$"):
        audit("\n".join(text))


@given(data=st.data())
def test_auditor_finds_a_line_that_was_put_in_even_where_it_is_linked_to_the_one_before(exported, data):
    text = exported.splitlines()
    number = data.draw(st.integers(1, len(text) - 1))
    before = audit("\n".join(text[:number]))
    said = '{"at":1.0,"kind":"flush","model_digest":"bb","seq":3,"version":2}'
    chain = hashlib.sha256(bytes.fromhex(before) + said.encode()).hexdigest()
    text.insert(number, f'{said[:-1]},"chain":"{chain}"}}')
    with pytest.raises(ValueError, match=f"^{number + 2}$"):
        audit("\n".join(text))


def test_lines_that_are_missing_at_the_end_are_found_by_the_place_that_was_noted_down(exported):
    noted = audit(exported)
    shorter = "\n".join(exported.splitlines()[:-1])
    assert audit(shorter) != noted
    forged = '{"at":1.0,"kind":"flush","model_digest":"bb","seq":99,"version":2}'
    chain = hashlib.sha256(bytes.fromhex(audit(shorter)) + forged.encode()).hexdigest()
    assert audit(f'{shorter}\n{forged[:-1]},"chain":"{chain}"}}') != noted


def test_export_is_the_same_after_compaction(bench):
    with bench.opened() as coordinator:
        for seed in range(3):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[0], seed=seed))])
        bench.publish(coordinator)
        coordinator.close()
    before = _export(bench)
    with bench.ledger() as ledger:
        assert compact(ledger, bench.snapshots(), keep=0).payloads == 3
    assert _export(bench) == before


def test_ledger_that_was_changed_is_not_exported_past_the_change(bench):
    with bench.opened() as coordinator:
        for seed in range(3):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[0], seed=seed))])
    whole = _export(bench).splitlines()
    with closing(sqlite3.connect(bench.ledger_file)) as connection, connection:
        assert connection.execute("UPDATE entries SET weight = 0.5 WHERE seq = 3").rowcount == 1
    with bench.ledger() as ledger:
        given_out = []
        with pytest.raises(DamagedError, match="entry 3 is not what was written"):
            given_out.extend(lines(ledger))
    assert given_out == whole[:3]
