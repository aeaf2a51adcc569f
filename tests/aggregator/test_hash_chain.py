import hashlib
import json
from dataclasses import fields, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aggregator.chain import canonical, genesis, header, line, link
from aggregator.records import Entry
from aggregator.recovery import checked_entries

HEADER = '{"federation":"ward","format":"5","kind":"ledger","ledger":"0a1b","manifest":"c0ffee"}'

MERGED = Entry(
    seq=2,
    kind="update",
    at=1000000.5,
    version=1,
    party="ann",
    update_id="0123456789abcdef0123456789abcdef",
    sequence=7,
    base_version=0,
    base_digest="cc",
    num_samples=10,
    num_steps=4,
    noise_multiplier=1.5,
    sample_rate=0.125,
    train_loss=0.25,
    codec="float32",
    size=8200,
    outcome="merged",
    staleness=0,
    weight=0.3,
    factor=0.5,
    norm=2.5,
    cosine=-0.25,
    signature="ee",
    payload_digest="aa",
    model_digest="bb",
    chain="not bound",
    payload=b"not bound either",
)
MERGED_LINE = (
    '{"at":1000000.5,"base_digest":"cc","base_version":0,"codec":"float32","cosine":-0.25,"factor":0.5,"kind":"update",'
    '"model_digest":"bb","noise_multiplier":1.5,"norm":2.5,"num_samples":10,"num_steps":4,"outcome":"merged","party":"ann",'
    '"payload_digest":"aa","sample_rate":0.125,"seq":2,"sequence":7,"signature":"ee","size":8200,"staleness":0,"train_loss":0.25,'
    '"update_id":"0123456789abcdef0123456789abcdef","version":1,"weight":0.3}'
)
REFUSED = replace(MERGED, outcome="refused", reason="bounds", detail="too large")


def test_chain_begins_with_the_digest_of_what_the_ledger_is_of():
    facts = {"ledger": "0a1b", "federation": "ward", "manifest": "c0ffee"}
    assert header(**facts) == HEADER
    assert genesis(**facts) == hashlib.sha256(HEADER.encode()).hexdigest()


@pytest.mark.parametrize("changed", ["ledger", "federation", "manifest"])
def test_chain_of_another_ledger_federation_or_layout_begins_elsewhere(changed):
    facts = {"ledger": "0a1b", "federation": "ward", "manifest": "c0ffee"}
    assert genesis(**{**facts, changed: "other"}) != genesis(**facts)


def test_entry_is_written_in_alphabetical_order_without_spaces_payload_and_chain():
    assert canonical(MERGED) == MERGED_LINE


def test_link_is_the_digest_of_the_one_before_and_the_entry():
    before = hashlib.sha256(HEADER.encode()).digest()
    assert link(before.hex(), MERGED) == hashlib.sha256(before + MERGED_LINE.encode()).hexdigest()


def test_fields_that_are_not_given_are_left_out_and_zeros_are_not():
    flush = Entry(seq=3, kind="flush", at=5.0, version=2, model_digest="bb")
    assert canonical(flush) == '{"at":5.0,"kind":"flush","model_digest":"bb","seq":3,"version":2}'
    assert canonical(replace(flush, weight=0.0, staleness=0)).endswith('"seq":3,"staleness":0,"version":2,"weight":0.0}')


def test_text_beyond_ascii_is_written_as_escapes():
    entry = Entry(seq=3, kind="update", at=5.0, version=2, model_digest="bb", detail='a "\n\u00e9\U0001f600')
    assert canonical(entry).startswith(r'{"at":5.0,"detail":"a \"\n\u00e9\ud83d\ude00","kind"')


def test_exported_line_is_the_canonical_entry_with_the_chain_put_last():
    assert line(replace(MERGED, chain="dd")) == MERGED_LINE[:-1] + ',"chain":"dd"}'


@pytest.mark.parametrize("name", [field.name for field in fields(Entry) if field.name not in ("payload", "chain")])
def test_every_field_is_bound(name):
    value = getattr(REFUSED, name)
    other = f"{value}x" if isinstance(value, str) else value + 1
    before = "00" * 32
    assert link(before, replace(REFUSED, **{name: other})) != link(before, REFUSED)
    assert link(before, replace(REFUSED, **{name: None})) != link(before, REFUSED)
    assert link("11" * 32, REFUSED) != link(before, REFUSED)


@pytest.mark.parametrize("name", ["payload", "chain"])
def test_payload_is_bound_by_its_digest_only_so_that_it_can_be_dropped(name):
    assert link("00" * 32, replace(MERGED, **{name: None})) == link("00" * 32, MERGED)


_COUNTS = st.integers(min_value=0, max_value=2**63 - 1)
_NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
_TEXTS = st.text(max_size=20)
_ENTRIES = st.builds(
    Entry,
    seq=_COUNTS,
    kind=st.sampled_from(["update", "flush", "merging", "rollback", "party", "suspension"]),
    at=_NUMBERS,
    version=_COUNTS,
    party=st.none() | _TEXTS,
    sequence=st.none() | _COUNTS,
    base_version=st.none() | _COUNTS,
    num_steps=st.none() | _COUNTS,
    noise_multiplier=st.none() | _NUMBERS,
    sample_rate=st.none() | _NUMBERS,
    train_loss=st.none() | _NUMBERS,
    outcome=st.none() | _TEXTS,
    detail=st.none() | _TEXTS,
    staleness=st.none() | _COUNTS,
    weight=st.none() | _NUMBERS,
    factor=st.none() | _NUMBERS,
    norm=st.none() | _NUMBERS,
    cosine=st.none() | _NUMBERS,
    signature=st.none() | _TEXTS,
    model_digest=_TEXTS,
)


@given(_ENTRIES)
def test_canonical_entry_is_json_that_holds_every_field_exactly(entry):
    said = json.loads(canonical(entry))
    assert list(said) == sorted(said)
    assert Entry(**said) == entry


@given(_ENTRIES, _ENTRIES)
def test_different_entries_are_written_differently(one, other):
    assert one == other or canonical(one) != canonical(other)


@settings(max_examples=25, deadline=None)
@given(st.lists(_ENTRIES, min_size=1, max_size=6))
@example([Entry(seq=1, kind="update", at=0.0, version=0, train_loss=-0.0)])
@example([Entry(seq=1, kind="update", at=0.0, version=0, train_loss=5e-324, weight=1.7976931348623157e308)])
@example([Entry(seq=1, kind="update", at=0.0, version=0, factor=-0.0, norm=-0.0, cosine=-0.0)])
def test_whatever_an_entry_says_the_ledger_gives_it_back_in_its_place(new_bench, entries):
    entries = [replace(entry, seq=seq) for seq, entry in enumerate(entries, start=1)]
    with new_bench().ledger() as ledger:
        with ledger.transaction():
            ledger.set_fact("federation", "ward")
            ledger.set_fact("manifest", "c0ffee")
            ledger.append(entries[:2])
        with ledger.transaction():
            ledger.append(entries[2:])
        read = list(checked_entries(ledger, after=0))
        assert [replace(entry, chain="") for entry in read] == entries
        chain = genesis(ledger=ledger.facts()["ledger_id"], federation="ward", manifest="c0ffee")
        for entry in read:
            chain = link(chain, entry)
            assert entry.chain == chain


def test_loss_of_minus_zero_which_sqlite_keeps_as_zero_does_not_damage_the_ledger(bench):
    """Any party may send one, and SQLite knows no minus zero."""
    with bench.opened() as coordinator:
        update = bench.update(base=bench.frames()[0], train_loss=-0.0)
        (verdict,) = coordinator.decide([bench.arrival(update)])
        assert verdict.receipt.outcome == "merged"
    with bench.opened() as coordinator:
        assert coordinator.version == 1
