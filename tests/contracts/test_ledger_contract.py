"""What a ledger promises, on SQLite and on a real PostgreSQL."""

import random
import struct
import threading
import time
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_rows import READS, add_frames, append, begun_ledger, entry, frame, part, publish, with_keyframe
from sqlalchemy import event, make_url

from aggregator import ledger as ledger_module
from aggregator.chain import genesis, link
from aggregator.ledger import NOISE_KEY
from aggregator.merging.noise import KEY_BYTES
from aggregator.opening import open_ledger, open_ledger_for_reading
from aggregator.records import BODIES, ENTRIES, FRAMES, META, PARTS, SNAPSHOTS, Entry, FrameTotals, SnapshotRow
from aggregator.recovery import checked_entries
from broker_fl.database import sqlite_url
from broker_fl.errors import ConfigurationError, DamagedError, FencedError, StorageError, StorageUnavailableError
from broker_fl.signing import payload_digest

ALL_READS = READS | {
    "noise_key": lambda ledger: ledger.noise_key(),
    "spent_by_party": lambda ledger: ledger.spent_by_party(),
    "entries_without_payloads": lambda ledger: list(ledger.entries_without_payloads()),
    "first of entries_without_payloads": lambda ledger: next(ledger.entries_without_payloads()),
}

PATIENCE_S = 60.0
"""The bound of every wait; SQLite's own is half of it."""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """Of a database in which nothing is yet."""
    return sqlite_url(tmp_path / "ledger.db") if request.param == "sqlite" else request.getfixturevalue("postgresql_url")


@pytest.fixture
def ledger(url):
    with begun_ledger(url) as opened:
        yield opened


@pytest.fixture
def pair(url):
    """Two aggregators' ledgers, on one database."""
    with begun_ledger(url) as first, begun_ledger(url) as second:
        yield first, second


@contextmanager
def in_a_thread(work):
    """Ends when the work has; what it fails with is raised here."""
    failed = []

    def run():
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - raised again by whoever waits
            failed.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def everything(ledger):
    """All rows of all tables, but for who leads."""
    tables = (META, ENTRIES, FRAMES, BODIES, SNAPSHOTS, PARTS)
    with ledger._reading():
        return {table.name: [tuple(row) for row in ledger._connection.execute(table.select())] for table in tables}


# Opening


def test_ledger_keeps_the_id_of_its_first_opening(url):
    ids = []
    for _ in range(2):
        with open_ledger(url) as ledger:
            ids.append(ledger.facts()["ledger_id"])
    assert ids[0] == ids[1]
    assert len(ids[0]) == 32


@pytest.mark.parametrize("_again", range(5))
def test_ledger_that_two_open_at_the_same_moment_has_one_id(url, _again):
    ids, start = [], threading.Barrier(2)

    def opening():
        start.wait(PATIENCE_S)
        with open_ledger(url) as ledger:
            ids.append(ledger.facts()["ledger_id"])

    with in_a_thread(opening), in_a_thread(opening):
        pass
    assert len(ids) == 2
    assert len(set(ids)) == 1


def test_ledger_keeps_the_noise_key_of_its_first_opening(url):
    keys = []
    for opening in (open_ledger, open_ledger, open_ledger_for_reading):
        with opening(url) as ledger:
            keys.append(ledger.noise_key())
    assert len(set(keys)) == 1
    assert (type(keys[0]), len(keys[0])) == (bytes, KEY_BYTES)


def test_every_ledger_has_a_noise_key_of_its_own(url, tmp_path):
    with open_ledger(url) as one, open_ledger(sqlite_url(tmp_path / "other.db")) as other:
        assert one.noise_key() != other.noise_key()


def test_noise_key_that_two_open_at_the_same_moment_is_one(url):
    keys, start = [], threading.Barrier(2)

    def opening():
        start.wait(PATIENCE_S)
        with open_ledger(url) as ledger:
            keys.append(ledger.noise_key())

    with in_a_thread(opening), in_a_thread(opening):
        pass
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_noise_key_is_none_of_the_facts(ledger):
    key = ledger.noise_key()
    facts = ledger.facts()
    assert NOISE_KEY not in facts
    assert {"ledger_id", "format", "federation", "manifest"} <= set(facts)
    assert not any(key.hex() in value for value in facts.values())


def test_ledger_that_lost_its_noise_key_is_damaged_and_gets_no_other_one(url):
    with open_ledger(url) as ledger, ledger.transaction():
        ledger._connection.execute(META.delete().where(META.c.key == NOISE_KEY))
    for opening in (open_ledger, open_ledger_for_reading):
        with opening(url) as ledger, pytest.raises(DamagedError, match="has lost its noise key; restore it from a backup"):
            ledger.noise_key()


def test_ledger_of_an_earlier_format_is_named_and_left_as_it_is(url):
    with open_ledger(url) as ledger, ledger.transaction():
        ledger._connection.exec_driver_sql("DELETE FROM meta WHERE key = 'format'")
    for opening in (lambda: open_ledger(url), lambda: open_ledger_for_reading(url)):
        with pytest.raises(ConfigurationError, match=r"is in format 1, this broker-fl writes format 5"), opening():
            pass
    # Nor was its format added.
    with pytest.raises(ConfigurationError, match="format 1"), open_ledger(url):
        pass


def test_errors_of_whoever_uses_the_ledger_go_through_unchanged(url):
    # A timeout and a lost connection are OSErrors too, but none of the ledger's.
    for error in (TimeoutError("too late"), ConnectionResetError("gone")):
        for opening in (open_ledger, open_ledger_for_reading):
            with pytest.raises(type(error)), opening(url):
                raise error


def test_ledger_is_read_while_another_one_writes_it(url):
    with begun_ledger(url) as writer, open_ledger_for_reading(url) as reader:
        append(writer, entry(1))
        assert reader.last_seq() == 1
        append(writer, entry(2))
        assert [found.seq for found in reader.entries_after(0)] == [1, 2]


@pytest.mark.parametrize("opening", [open_ledger, open_ledger_for_reading])
def test_opening_leaves_no_transaction_open(url, opening):
    with open_ledger(url) as ledger:
        assert not ledger._connection.in_transaction()
    with opening(url) as ledger:
        assert not ledger._connection.in_transaction()
        ledger.last_seq()
        assert not ledger._connection.in_transaction()


# Transactions


def test_transaction_that_fails_in_the_middle_leaves_nothing(ledger):
    before = everything(ledger)

    def fail():
        with ledger.transaction():
            ledger.append([entry(1)])
            ledger.add_frame(with_keyframe(1))
            ledger.add_part(part(0))
            ledger.add_snapshot(SnapshotRow(1, 1, "one.safetensors", "a" * 64, 1.0))
            ledger.set_fact("over", "yes")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert everything(ledger) == before
    append(ledger, entry(1))


def test_transaction_of_which_the_database_refuses_a_part_leaves_nothing(ledger):
    append(ledger, entry(1, update_id="a" * 32))
    before = everything(ledger)

    def fail():
        with ledger.transaction():
            ledger.add_frame(frame(1))
            ledger.append([entry(2), entry(3, update_id="a" * 32)])

    with pytest.raises(StorageError):
        fail()
    assert everything(ledger) == before
    append(ledger, entry(2))
    assert ledger.last_seq() == 2


def test_others_see_a_transaction_only_when_it_is_over(ledger, url):
    with open_ledger_for_reading(url) as reader:
        with ledger.transaction():
            ledger.append([entry(1)])
            assert reader.last_seq() == 0
        assert reader.last_seq() == 1


@pytest.mark.parametrize("read", ALL_READS.values(), ids=ALL_READS.keys())
def test_reading_leaves_no_transaction_open(ledger, read):
    with ledger.transaction():
        ledger.append([entry(1), entry(2)])
        ledger.add_frame(with_keyframe(1))
    read(ledger)
    assert not ledger._connection.in_transaction()
    append(ledger, entry(3))


@pytest.mark.parametrize("read", ALL_READS.values(), ids=ALL_READS.keys())
def test_reading_inside_a_transaction_sees_it_and_leaves_it_open(ledger, read):
    with ledger.transaction():
        ledger.append([entry(1), entry(2)])
        ledger.add_frame(with_keyframe(1))
        read(ledger)
        assert ledger.last_seq() == 2
        ledger.append([entry(3)])
    assert ledger.last_seq() == 3


# Facts and entries


def test_fact_that_is_set_again_is_replaced(ledger):
    for value in ("one", "two"):
        with ledger.transaction():
            ledger.set_fact("over", value)
    assert ledger.facts()["over"] == "two"


def test_fact_may_be_long(ledger):
    layout = '{"tensors": []}' * 100_000
    with ledger.transaction():
        ledger.set_fact("layout", layout)
    assert ledger.facts()["layout"] == layout


def test_empty_ledger_has_no_entries_frames_or_snapshots(ledger):
    assert list(ledger.entries_after(0)) == []
    assert ledger.last_seq() == ledger.latest_version() == 0
    assert ledger.last_entry() is ledger.last_frame() is ledger.lead() is None
    assert ledger.snapshots() == ledger.totals() == ledger.entries_of("merging") == ledger.parties() == ledger.starts() == []
    assert ledger.oldest_unpublished() is None
    assert ledger.newest_keyframe() is None
    assert list(ledger.bodies_after(0)) == []
    assert ledger.last_codecs() == {}
    assert ledger.frame_totals() == FrameTotals(0, 0, 0, 0, "", "")
    assert ledger.payload_bytes(upto=9) == (0, 0)


def chained(ledger, entries):
    """As they should come back: each with its place in the chain, worked out by hand."""
    facts = ledger.facts()
    chain = genesis(ledger=facts["ledger_id"], federation=facts["federation"], manifest=facts["manifest"])
    found = []
    for one in entries:
        chain = link(chain, one)
        found.append(replace(one, chain=chain))
    return found


def test_entries_come_back_in_order_with_all_that_was_written(ledger):
    written = [
        Entry(1, "merging", 1.5, 0, model_digest="1" * 64, payload=b"{}", payload_digest=payload_digest(b"{}")),
        Entry(
            seq=2,
            kind="update",
            at=1_700_000_000.123456,
            version=2**53 - 1,
            party="ann",
            update_id="a" * 32,
            sequence=2**53 - 1,
            base_version=2**40,
            num_samples=10**12,
            num_steps=2**53 - 1,
            noise_multiplier=1 / 3,
            sample_rate=5e-324,
            train_loss=0.1,
            codec="topk:0.01+int8",
            size=2**40,
            outcome="merged",
            staleness=2**33,
            weight=0.3,
            payload_digest=payload_digest(b"content"),
            model_digest="4" * 64,
            payload=b"content",
        ),
        entry(3, outcome="refused", reason="base", detail="trained from elsewhere", payload=None),
        Entry(4, "rollback", 2.5, 5, base_version=0, detail="back to version 0", model_digest="5" * 64),
    ]
    append(ledger, *written)
    assert list(ledger.entries_after(0)) == chained(ledger, written)
    assert list(ledger.entries_after(2)) == chained(ledger, written)[2:]
    assert list(ledger.entries_after(4)) == []
    assert list(checked_entries(ledger, after=0)) == chained(ledger, written)
    assert ledger.last_seq() == 4
    assert ledger.last_entry() == chained(ledger, written)[3]
    assert [found.kind for found in ledger.entries_of("rollback")] == ["rollback"]


def test_types_come_back_as_they_were_written(ledger):
    append(ledger, entry(1, at=2.0, train_loss=3.0, sequence=7, num_steps=4, noise_multiplier=1.0, sample_rate=1.0))
    (found,) = ledger.entries_after(0)
    for field in fields(Entry):
        value = getattr(found, field.name)
        assert type(value) in (int, float, str, bytes, type(None)), field.name
    numbers = (found.at, found.train_loss, found.weight, found.noise_multiplier, found.sample_rate)
    assert [type(value) for value in numbers] == [float] * 5
    assert [type(value) for value in (found.seq, found.version, found.sequence, found.num_steps)] == [int] * 4


AWKWARD_FLOATS = [
    0.1,
    1 / 3,
    1e-300,
    5e-324,
    2.2250738585072014e-308,
    1.7976931348623157e308,
    9007199254740992.0,
    1e22,
    3.0,
    -7.25,
    0.0,
]


def bits(number):
    return struct.pack("<d", number)


@pytest.mark.parametrize("number", AWKWARD_FLOATS)
def test_float_comes_back_bit_for_bit_and_the_chain_holds(ledger, number):
    append(ledger, entry(1, at=abs(number), weight=number, train_loss=number, noise_multiplier=number, sample_rate=number))
    assert [found.seq for found in checked_entries(ledger, after=0)] == [1]
    (found,) = ledger.entries_after(0)
    assert bits(found.at) == bits(abs(number))
    assert bits(found.weight) == bits(found.train_loss) == bits(number)
    assert bits(found.noise_multiplier) == bits(found.sample_rate) == bits(number)


def test_minus_zero_comes_back_as_zero_and_the_chain_holds(ledger):
    """SQLite keeps no -0.0, and the chain must not hold what cannot be read again."""
    append(ledger, entry(1, at=-0.0, weight=-0.0, train_loss=-0.0))
    assert [found.seq for found in checked_entries(ledger, after=0)] == [1]
    (found,) = ledger.entries_after(0)
    assert [bits(value) for value in (found.at, found.weight, found.train_loss)] == [bits(0.0)] * 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0),
            st.floats(min_value=0, allow_infinity=False).map(lambda number: number + 0.0),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=1000),
            st.binary(max_size=100),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_is_written_comes_back_and_the_chain_holds(ledger, rows):
    first = ledger.last_seq() + 1
    written = [
        entry(seq, train_loss=loss, at=at, weight=at / 3, detail=detail, payload=payload)
        for seq, (loss, at, detail, payload) in enumerate(rows, start=first)
    ]
    append(ledger, *written)
    found = list(ledger.entries_after(first - 1))
    assert [replace(one, chain="") for one in found] == written
    assert [bits(one.train_loss) for one in found] == [bits(one.train_loss) for one in written]
    assert list(checked_entries(ledger, after=first - 1)) == found


def test_steps_are_counted_by_party_and_by_noise_and_sample_rate(ledger):
    noised = {"noise_multiplier": 1.1, "sample_rate": 0.1}
    append(
        ledger,
        Entry(1, "merging", 1.0, 0, payload=b"{}"),
        entry(2, num_steps=10, **noised),
        entry(3, num_steps=5, noise_multiplier=1.1, sample_rate=0.2),
        entry(4, num_steps=7, noise_multiplier=1.2, sample_rate=0.1),
        entry(5, num_steps=3, **noised),
        entry(6, "bob", num_steps=100, **noised),
        entry(7, "cem", num_steps=100),
        entry(8, "dan", outcome="refused", reason="malformed", payload=None),
        Entry(9, "flush", 1.0, 9),
    )
    assert ledger.spent_by_party() == {
        "ann": {(1.1, 0.1): 13, (1.1, 0.2): 5, (1.2, 0.1): 7},
        "bob": {(1.1, 0.1): 100},
    }


def test_steps_of_refused_buffered_and_compacted_updates_are_counted_too(ledger):
    noised = {"noise_multiplier": 1 / 3, "sample_rate": 5e-324}
    append(
        ledger,
        entry(1, num_steps=1, **noised),
        entry(2, num_steps=2, outcome="buffered", **noised),
        entry(3, num_steps=4, outcome="refused", reason="too_stale", payload=None, **noised),
    )
    with ledger.transaction():
        ledger.drop_payloads(upto=3)
    assert ledger.spent_by_party() == {"ann": {(1 / 3, 5e-324): 7}}
    ((noise, rate), steps) = next(iter(ledger.spent_by_party()["ann"].items()))
    assert [type(value) for value in (noise, rate, steps)] == [float, float, int]


def test_nobody_has_spent_anything_in_a_new_ledger(ledger):
    assert ledger.spent_by_party() == {}


def test_steps_add_up_past_what_a_database_counts_to(ledger):
    """A party may say any number below 2^53 in each of its updates: that must not keep the ledger from being read."""
    most = 2**53 - 1
    append(ledger, *(entry(seq, num_steps=most, noise_multiplier=1.0, sample_rate=0.1) for seq in range(1, 1100)))
    assert ledger.spent_by_party() == {"ann": {(1.0, 0.1): 1099 * most}}


def test_bytes_come_back_with_all_their_values(ledger):
    content = bytes(range(256)) * 3 + b"\0" * 5
    append(ledger, entry(1, payload=content), entry(2, payload=b""), entry(3, payload=b"\0"))
    assert [found.payload for found in ledger.entries_after(0)] == [content, b"", b"\0"]
    assert ledger.payload_bytes(upto=3) == (3, len(content) + 1)


def test_large_payload_comes_back(ledger):
    content = random.Random(7).randbytes(8 << 20)
    append(ledger, entry(1, payload=content))
    (found,) = ledger.entries_after(0)
    assert found.payload == content
    assert ledger.payload_bytes(upto=1) == (1, 8 << 20)


def test_detail_of_any_language_comes_back(ledger):
    detail = "Größe überschritten: 模型太大 \U0001f9ea e\u0301 \u200b \ufffd \x01\x7f 'quoted' \"twice\" \\ %s :name {}"
    append(ledger, entry(1, outcome="refused", reason="bounds", detail=detail), entry(2, detail="ß" * 1000))
    assert [found.detail for found in ledger.entries_after(0)] == [detail, "ß" * 1000]
    assert len(list(checked_entries(ledger, after=0))) == 2


def test_second_entry_for_an_update_of_a_party_is_impossible(ledger):
    append(ledger, entry(1, update_id="a" * 32))
    with pytest.raises(StorageError):
        append(ledger, entry(2, update_id="a" * 32))
    append(ledger, entry(2, party="bob", update_id="a" * 32))
    assert [found.party for found in ledger.entries_after(0)] == ["ann", "bob"]


def test_entries_without_an_update_need_no_party(ledger):
    append(
        ledger,
        Entry(1, "merging", 1.0, 0, payload=b"{}"),
        Entry(2, "flush", 1.0, 1),
        Entry(3, "flush", 1.0, 2),
    )
    assert [found.kind for found in ledger.entries_of("merging")] == ["merging"]
    assert ledger.latest_version() == 2
    assert ledger.parties() == []


def test_decided_finds_exactly_the_updates_asked_for_without_their_payloads(ledger):
    ours, theirs, refused = "a" * 32, "b" * 32, "c" * 32
    append(
        ledger, entry(1, update_id=ours), entry(2, "bob", theirs), entry(3, update_id=refused, outcome="refused", reason="base")
    )
    found = ledger.decided([("ann", ours), ("ann", theirs), ("bob", theirs), ("ann", refused), ("eve", ours)])
    assert set(found) == {("ann", ours), ("bob", theirs), ("ann", refused)}
    assert found["ann", ours].payload is None
    assert found["ann", ours].weight == 0.3
    assert found["ann", refused].reason == "base"
    assert ledger.decided([]) == {}


def test_decided_takes_a_large_group_at_once(ledger):
    keys = [("ann", uuid.uuid4().hex) for _ in range(4096)]
    append(ledger, *(entry(seq, *key) for seq, key in enumerate(keys[:50], start=1)))
    assert set(ledger.decided(keys)) == set(keys[:50])


def test_parties_and_what_they_merged_first_are_known(ledger):
    append(
        ledger,
        entry(1, "cem", outcome="refused", reason="base", payload=None),
        entry(2, "ann", outcome="buffered"),
        entry(3, "ann"),
        entry(4, "cem"),
        Entry(5, "flush", 1.0, 5),
    )
    assert ledger.parties() == ["ann", "cem"]
    assert [ledger.first_merged(name).seq for name in ("ann", "cem")] == [2, 4]
    assert ledger.first_merged("ann").payload is None
    assert ledger.first_merged("bob") is None


# The chain


def test_append_fills_the_chain_in_as_whoever_links_by_hand(ledger):
    written = [entry(seq, payload=bytes([seq])) for seq in range(1, 6)]
    append(ledger, *written[:2])
    append(ledger, *written[2:3])
    with ledger.transaction():
        ledger.append(written[3:4])
        ledger.append([])
        ledger.append(written[4:])
    expected = chained(ledger, written)
    assert [found.chain for found in ledger.entries_after(0)] == [one.chain for one in expected]
    assert len({one.chain for one in expected}) == 5
    facts = ledger.facts()
    assert ledger.chain_after(0) == genesis(ledger=facts["ledger_id"], federation="ward", manifest="e" * 64)
    assert [ledger.chain_after(one.seq) for one in expected] == [one.chain for one in expected]


def test_chain_goes_on_after_the_ledger_was_opened_again(url):
    written = [entry(1), entry(2)]
    for one in written:
        with begun_ledger(url) as ledger:
            append(ledger, one)
    with begun_ledger(url) as ledger:
        assert list(ledger.entries_after(0)) == chained(ledger, written)


@pytest.mark.parametrize("seq", [3, -1])
def test_chain_after_an_entry_that_is_not_there_is_damage(ledger, seq):
    append(ledger, entry(1), entry(2))
    with pytest.raises(DamagedError, match=f"entry {seq} is missing"):
        ledger.chain_after(seq)
    with pytest.raises(DamagedError, match="entry 3 is missing"):
        append(ledger, entry(4))
    assert ledger.last_seq() == 2


def test_chain_holds_what_was_dropped(ledger):
    append(ledger, entry(1), entry(2))
    before = [replace(found, payload=None) for found in ledger.entries_after(0)]
    with ledger.transaction():
        ledger.drop_payloads(upto=2)
    assert list(checked_entries(ledger, after=0)) == before


def test_entry_that_was_changed_and_all_after_it_are_found_out(ledger):
    append(ledger, entry(1), entry(2), entry(3))
    with ledger.transaction():
        ledger._connection.exec_driver_sql("UPDATE entries SET weight = 0.4 WHERE seq = 2")
    with pytest.raises(DamagedError, match="entry 2 is not what was written: its hash differs"):
        list(checked_entries(ledger, after=0))


# Reading much


def in_memory_at_once(ledger, last_seq):
    """How many entries are read together with the first one: those whose payloads are still there when all were dropped since."""
    reading = ledger.entries_after(0)
    found = [next(reading)]
    with ledger.transaction():
        ledger.drop_payloads(upto=last_seq)
    found += reading
    assert [one.seq for one in found] == list(range(1, last_seq + 1))
    return sum(one.payload is not None for one in found)


def test_entries_are_read_in_batches_of_so_many_bytes(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_READ_BYTES", 300)
    append(ledger, *(entry(seq, payload=b"x" * 100) for seq in range(1, 9)))
    assert in_memory_at_once(ledger, 8) == 3


def test_entry_over_the_bound_is_read_alone(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_READ_BYTES", 300)
    append(ledger, *(entry(seq, payload=b"x" * size) for seq, size in enumerate((400, 1, 299, 1000, 0, 5), start=1)))
    assert [found.seq for found in ledger.entries_after(0)] == [1, 2, 3, 4, 5, 6]
    assert in_memory_at_once(ledger, 6) == 1


def test_entries_without_payloads_are_read_in_batches_of_so_many(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_READ_ENTRIES", 4)
    append(ledger, *(entry(seq, payload=b"" if seq % 2 else None) for seq in range(1, 12)))
    assert [found.seq for found in ledger.entries_after(0)] == list(range(1, 12))
    assert [found.seq for found in ledger.entries_after(6)] == list(range(7, 12))


def test_writing_goes_on_while_entries_are_read(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_READ_ENTRIES", 2)
    append(ledger, *(entry(seq) for seq in range(1, 6)))
    seen = []
    for found in ledger.entries_after(0):
        seen.append(found.seq)
        if found.seq == 5:
            append(ledger, entry(6))
    assert seen == [1, 2, 3, 4, 5, 6]


# Frames


def test_frame_comes_back_with_all_that_was_written(ledger):
    written = with_keyframe(1), frame(2, rounding="int8", over=True), frame(3, base=2)
    add_frames(ledger, *written)
    rows = ledger.frames_from(0)
    assert rows == [replace(row, body=None, keyframe=None) for row in written]
    assert [type(row.over) for row in rows] == [bool] * 3
    assert [ledger.with_bodies(row) for row in rows] == list(written)
    assert ledger.last_frame() == rows[-1]


def test_bodies_of_all_frames_are_kept_and_come_in_order(ledger):
    add_frames(ledger, *(frame(number, body=b"%d\0" % number) for number in range(1, 12)))
    publish(ledger, *range(1, 12))
    assert list(ledger.bodies_after(0)) == [(number, b"%d\0" % number) for number in range(1, 12)]
    assert [number for number, _ in ledger.bodies_after(9)] == [10, 11]


def test_frames_wait_in_order_with_their_bodies(ledger):
    written = [frame(1), with_keyframe(2), frame(3)]
    add_frames(ledger, *written)
    assert ledger.oldest_unpublished() == written[0]
    publish(ledger, 1)
    assert ledger.oldest_unpublished() == written[1]
    publish(ledger, 2, 3)
    assert ledger.oldest_unpublished() is None
    assert [row.published_at for row in ledger.frames_from(0)] == [7.0] * 3


def test_keyframe_is_dropped_when_a_newer_one_is_out_and_no_sooner(ledger):
    add_frames(ledger, with_keyframe(1, body=b"first"), frame(2), with_keyframe(3, body=b"third"), frame(4))
    publish(ledger, 1, 2)
    assert ledger.oldest_unpublished().keyframe == b"third"
    assert [ledger.with_bodies(row).keyframe for row in ledger.frames_from(0)] == [b"first", None, b"third", None]
    publish(ledger, 3, 4)
    assert [ledger.with_bodies(row).keyframe for row in ledger.frames_from(0)] == [None, None, b"third", None]
    assert ledger.newest_keyframe() == (3, b"third")
    # What it was is still known.
    assert ledger.frames_from(0)[0].keyframe_size == 5


def test_keyframe_that_a_frame_gets_later_stands_for_those_before_it(ledger):
    add_frames(ledger, with_keyframe(1), frame(2))
    publish(ledger, 1, 2)
    with ledger.transaction():
        ledger.add_keyframe(2, codec="int8", body=b"later", plan="")
    assert ledger.newest_keyframe() == (2, b"later")
    row = ledger.with_bodies(ledger.last_frame())
    assert (row.keyframe_codec, row.keyframe_size, row.keyframe, row.body) == ("int8", 5, b"later", b"frame")
    assert row.plan == ""
    assert ledger.with_bodies(ledger.frames_from(0)[0]).keyframe is None


def test_keyframe_of_a_frame_without_a_base_is_kept_for_the_frames_after_it(ledger):
    add_frames(ledger, with_keyframe(1, body=b"first"), frame(2), with_keyframe(3, body=b"third"))
    add_frames(ledger, with_keyframe(4, body=b"anew", base=None), frame(5), with_keyframe(6, body=b"sixth"))
    publish(ledger, *range(1, 7))
    assert ledger.starts() == [1, 4]
    assert [ledger.start(number) for number in (1, 3, 4)] == [b"first", None, b"anew"]
    assert ledger.newest_keyframe() == (6, b"sixth")


def test_bodies_up_to_a_frame_are_dropped_for_what_they_made(ledger):
    add_frames(ledger, with_keyframe(1, body=b"first"), frame(2), frame(3), with_keyframe(4, body=b"anew", base=None), frame(5))
    publish(ledger, *range(1, 6))
    with ledger.transaction():
        ledger.drop_bodies(upto=3, start=b"third")
    assert ledger.starts() == [3, 4]
    assert ledger.start(3) == b"third"
    assert [number for number, _ in ledger.bodies_after(0)] == [4, 5]
    assert ledger.newest_keyframe() == (4, b"anew")
    assert [row.number for row in ledger.frames_from(0)] == [1, 2, 3, 4, 5]
    with ledger.transaction():
        ledger.drop_bodies(upto=5, start=b"fifth")
    assert ledger.starts() == [5]
    assert ledger.newest_keyframe() == (5, b"fifth")


def test_frames_are_counted_when_they_are_published(ledger):
    add_frames(
        ledger, with_keyframe(1), frame(2), replace(with_keyframe(3, body=b"w" * 9), keyframe_codec="int8"), frame(4, size=7)
    )
    publish(ledger, 1)
    assert ledger.frame_totals() == FrameTotals(1, 5, 1, 5, "int8", "float32")
    publish(ledger, 2, 3, 4)
    assert ledger.frame_totals() == FrameTotals(4, 22, 2, 14, "int8", "int8")


def test_frames_are_listed_from_a_version_on(ledger):
    with ledger.transaction():
        for number, version in ((1, 0), (2, 4), (3, 4), (4, 9)):
            ledger.add_frame(frame(number, version=version))
    assert [row.number for row in ledger.frames_from(4)] == [2, 3, 4]
    assert [row.number for row in ledger.frames_from(-5)] == [1, 2, 3, 4]


# Snapshots, parts, totals


def test_snapshot_of_an_entry_replaces_the_one_before(ledger):
    row = SnapshotRow(4, 3, "one.safetensors", "a" * 64, 1.0)
    with ledger.transaction():
        ledger.add_snapshot(SnapshotRow(9, 8, "late.safetensors", "b" * 64, 1.0))
        ledger.add_snapshot(row)
    with ledger.transaction():
        ledger.add_snapshot(replace(row, file="two.safetensors"))
    assert [(found.seq, found.file) for found in ledger.snapshots()] == [(4, "two.safetensors"), (9, "late.safetensors")]


def test_snapshots_before_an_entry_are_dropped(ledger):
    with ledger.transaction():
        for seq in (1, 4, 9):
            ledger.add_snapshot(SnapshotRow(seq, seq, f"{seq}.safetensors", "a" * 64, 1.0))
        ledger.drop_snapshots(before=4)
    assert [found.seq for found in ledger.snapshots()] == [4, 9]


def test_payloads_of_updates_are_dropped_up_to_an_entry_and_settings_stay(ledger):
    append(
        ledger,
        Entry(1, "merging", 1.0, 0, payload=b"{}"),
        entry(2, payload=b"12345"),
        entry(3, outcome="refused", reason="base", payload=None),
        entry(4, payload=b"1234567"),
        entry(5, payload=b"123"),
    )
    assert ledger.payload_bytes(upto=4) == (2, 12)
    assert all(type(number) is int for number in ledger.payload_bytes(upto=4))
    with ledger.transaction():
        ledger.drop_payloads(upto=4)
    assert [found.payload for found in ledger.entries_after(0)] == [b"{}", None, None, None, b"123"]
    assert ledger.payload_bytes(upto=4) == (0, 0)
    assert ledger.payload_bytes(upto=5) == (1, 3)
    ledger.give_room_back()
    assert ledger.last_seq() == 5


def test_part_that_is_sent_again_changes_nothing(ledger):
    with ledger.transaction():
        ledger.add_part(part(1, body=b"def"))
        ledger.add_part(part(0, body=b"abc"))
        ledger.add_part(part(0, body=b"???"))
        assert [row.body for row in ledger.parts("ann", "u" * 32)] == [b"abc", b"def"]
        assert ledger.parts_held("ann", "u" * 32) == 2


def test_half_sent_updates_are_counted_by_party(ledger):
    with ledger.transaction():
        ledger.add_part(part(0, update_id="u" * 32))
        ledger.add_part(part(2, update_id="u" * 32, body=b"12345"))
        ledger.add_part(part(0, update_id="v" * 32))
        ledger.add_part(part(0, party="bob", update_id="w" * 32))
        assert ledger.half_sent("ann") == {"u" * 32: {0: 3, 2: 5}, "v" * 32: {0: 3}}
        ledger.drop_parts("ann", "u" * 32)
        assert ledger.half_sent("ann") == {"v" * 32: {0: 3}}
        assert ledger.half_sent("bob") == {"w" * 32: {0: 3}}


def test_parts_survive_the_end_of_the_process(url):
    with open_ledger(url) as ledger, ledger.transaction():
        ledger.add_part(part(0, body=b"\0\1\2"))
    with open_ledger(url) as ledger, ledger.transaction():
        assert ledger.parts("ann", "u" * 32) == [part(0, body=b"\0\1\2")]


def test_half_sent_update_expires_by_its_newest_part(ledger):
    with ledger.transaction():
        ledger.add_part(part(0, update_id="u" * 32, at=10.0))
        ledger.add_part(part(1, update_id="u" * 32, at=30.0))
        ledger.add_part(part(0, update_id="v" * 32, at=10.0))
        ledger.add_part(part(1, update_id="v" * 32, at=15.0))
        assert ledger.expire_parts(before=20.0, after=1e12) == 1
        assert set(ledger.half_sent("ann")) == {"u" * 32}
        assert ledger.expire_parts(before=20.0, after=1e12) == 0
        assert ledger.expire_parts(before=31.0, after=1e12) == 1


def test_last_codec_of_a_party_is_that_of_its_newest_update_that_could_be_read(ledger):
    append(
        ledger,
        entry(1, codec="float32"),
        entry(2, codec="int8"),
        entry(3, "bob", codec="int4"),
        entry(4, codec=None, outcome="refused", reason="malformed"),
        entry(5, "cem", codec=None, outcome="refused", reason="malformed"),
    )
    assert ledger.last_codecs() == {"ann": "int8", "bob": "int4"}


def add_some_of_all(ledger):
    append(
        ledger,
        entry(1, staleness=0),
        entry(2, staleness=4, size=300),
        entry(3, outcome="refused", reason="base", staleness=0),
        entry(4, "bob"),
        Entry(5, "flush", 1.0, 5),
    )


def test_totals_add_up_by_party_and_outcome(ledger):
    add_some_of_all(ledger)
    totals = {(total.party, total.outcome): total for total in ledger.totals()}
    assert set(totals) == {("ann", "merged"), ("ann", "refused"), ("bob", "merged")}
    merged = totals["ann", "merged"]
    assert (merged.updates, merged.size, merged.mean_staleness, merged.max_staleness) == (2, 400, 2.0, 4)


def test_totals_are_plain_numbers(ledger):
    """`broker-fl status --json` writes them."""
    add_some_of_all(ledger)
    add_frames(ledger, with_keyframe(1), frame(2))
    publish(ledger, 1, 2)
    for total in ledger.totals():
        assert [type(value) for value in (total.updates, total.size, total.max_staleness)] == [int] * 3
        assert type(total.mean_staleness) is float
    frames = ledger.frame_totals()
    assert [type(value) for value in (frames.frames, frames.size, frames.keyframes, frames.keyframe_size)] == [int] * 4


# Who leads


def test_whoever_takes_the_lead_is_known_to_all(pair):
    first, second = pair
    assert first.lead() is None
    assert not first.is_leading()
    assert first.epoch == 0
    first.take_lead("the first", at=5.0)
    for ledger in pair:
        lead = ledger.lead()
        assert (lead.epoch, lead.holder, lead.at, lead.let_go) == (1, "the first", 5.0, False)
    assert (first.is_leading(), second.is_leading()) == (True, False)
    second.take_lead("the second", at=6.0)
    assert first.lead() == second.lead()
    assert (first.lead().epoch, first.lead().holder, first.lead().at) == (2, "the second", 6.0)
    assert (first.is_leading(), second.is_leading()) == (False, True)
    assert (first.epoch, second.epoch) == (1, 2)


def test_lead_that_is_taken_again_is_another_one(pair):
    first, _ = pair
    for expected in (1, 2, 3):
        first.take_lead("the first", at=5.0)
        assert (first.epoch, first.lead().epoch, first.is_leading()) == (expected, expected, True)
    append(first, entry(1))


def test_leader_that_lets_go_is_known_to_have_ended(pair):
    first, second = pair
    first.take_lead("the first", at=5.0)
    first.let_go()
    assert (second.lead().epoch, second.lead().let_go) == (1, True)
    assert not first.is_leading()
    second.take_lead("the second", at=6.0)
    assert (second.lead().epoch, second.lead().let_go) == (2, False)


def test_leader_that_was_replaced_cannot_let_go_for_the_new_one(pair):
    first, second = pair
    first.take_lead("the first", at=5.0)
    second.take_lead("the second", at=6.0)
    first.let_go()
    assert (second.lead().holder, second.lead().let_go) == ("the second", False)
    append(second, entry(1))


def test_lead_outlives_the_process(url):
    with begun_ledger(url) as ledger:
        ledger.take_lead("the first", at=5.0)
    with begun_ledger(url) as ledger:
        assert (ledger.lead().holder, ledger.lead().let_go) == ("the first", False)
        assert not ledger.is_leading()


@pytest.mark.parametrize("_again", range(3))
def test_two_who_take_the_first_lead_at_the_same_moment_lead_one_after_the_other(url, _again):
    with begun_ledger(url) as first, begun_ledger(url) as second:
        start = threading.Barrier(2)

        def taking(ledger, holder):
            start.wait(PATIENCE_S)
            ledger.take_lead(holder, at=5.0)

        with in_a_thread(lambda: taking(first, "the first")), in_a_thread(lambda: taking(second, "the second")):
            pass
        assert {first.epoch, second.epoch} == {1, 2}
        assert [ledger.is_leading() for ledger in (first, second)].count(True) == 1


# Fencing

WRITES = {
    "nothing": lambda _: None,
    "an entry": lambda ledger: ledger.append([entry(3)]),
    "a frame": lambda ledger: ledger.add_frame(with_keyframe(2)),
    "a keyframe": lambda ledger: ledger.add_keyframe(1, codec="int8", body=b"later", plan=""),
    "that a frame is out": lambda ledger: ledger.mark_published(1, at=9.0),
    "a snapshot": lambda ledger: ledger.add_snapshot(SnapshotRow(1, 1, "mine.safetensors", "c" * 64, 9.0)),
    "a part": lambda ledger: ledger.add_part(part(1)),
    "that parts expired": lambda ledger: ledger.expire_parts(before=100.0, after=1e12),
    "a fact": lambda ledger: ledger.set_fact("over", "yes"),
    "no payloads any more": lambda ledger: ledger.drop_payloads(upto=2),
    "no snapshots any more": lambda ledger: ledger.drop_snapshots(before=9),
    "no bodies any more": lambda ledger: ledger.drop_bodies(upto=1, start=b"start"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_leader_that_was_replaced_writes_nothing_more(pair, write):
    first, second = pair
    first.take_lead("the first", at=5.0)
    with first.transaction():
        first.append([entry(1), entry(2)])
        first.add_frame(frame(1))
        first.add_part(part(0))
        first.add_snapshot(SnapshotRow(1, 1, "ours.safetensors", "b" * 64, 1.0))
    second.take_lead("the second", at=6.0)
    before = everything(second)
    for _ in range(2):
        with pytest.raises(FencedError, match="is led by the second now"), first.transaction():
            write(first)
        assert everything(second) == before
    with second.transaction():
        write(second)


@pytest.mark.parametrize("number", [2, 3])
def test_leader_that_was_replaced_is_fenced_also_where_the_new_one_wrote_the_same_rows(pair, number):
    first, second = pair
    first.take_lead("the first", at=5.0)
    append(first, entry(1))
    add_frames(first, with_keyframe(1))
    second.take_lead("the second", at=6.0)
    append(second, entry(2, "bob"), entry(3, "bob"))
    add_frames(second, frame(2))
    before = everything(second)
    with pytest.raises(FencedError, match="is led by the second now"):
        append(first, entry(number))
    with pytest.raises(FencedError, match="is led by the second now"):
        add_frames(first, frame(2))
    # The same update, which both decided.
    again = entry(4, "bob", next(second.entries_after(1)).update_id)
    with pytest.raises(FencedError, match="is led by the second now"):
        append(first, again)
    assert everything(second) == before
    append(second, entry(4))


def test_leader_itself_is_told_of_a_row_that_is_there_already(pair):
    """What is not another leader's doing is damage still."""
    first, second = pair
    first.take_lead("the first", at=5.0)
    append(first, entry(1), entry(2))
    with pytest.raises(DamagedError) as raised:
        append(first, entry(2))
    assert not isinstance(raised.value, FencedError)
    assert [found.seq for found in second.entries_after(0)] == [1, 2]


def test_take_over_between_the_reads_and_the_writes_of_a_transaction_fences_it(pair):
    first, second = pair
    first.take_lead("the first", at=5.0)
    append(first, entry(1))

    def decide():
        with first.transaction():
            assert first.decided([("ann", "a" * 32)]) == {}
            second.take_lead("the second", at=6.0)
            append(second, entry(2, "bob"))
            first.append([entry(2)])

    # Where rows are locked, the one who takes over ends the other's session after a while.
    with pytest.raises(StorageUnavailableError if first._locks_rows else FencedError):
        decide()
    assert [found.party for found in second.entries_after(0)] == ["ann", "bob"]


def test_leader_that_took_the_lead_back_writes_again(pair):
    first, second = pair
    first.take_lead("the first", at=5.0)
    append(first, entry(1))
    second.take_lead("the second", at=6.0)
    append(second, entry(2))
    first.take_lead("the first", at=7.0)
    append(first, entry(3))
    with pytest.raises(FencedError, match="is led by the first now"):
        append(second, entry(4))
    assert len(list(checked_entries(first, after=0))) == 3


def test_failure_of_a_fenced_leaders_own_is_told_as_it_is(pair):
    first, second = pair
    first.take_lead("the first", at=5.0)
    second.take_lead("the second", at=6.0)
    # Where rows are locked it finds out before it begins.
    expected = FencedError if first._locks_rows else ZeroDivisionError
    with pytest.raises(expected), first.transaction():
        raise ZeroDivisionError


def test_take_over_while_a_transaction_is_being_written_finds_all_of_it_or_fences_it(pair):
    first, second = pair
    first.take_lead("the first", at=5.0)
    append(first, entry(1))
    found = []

    def take_over():
        second.take_lead("the second", at=6.0)
        found.extend(one.seq for one in second.entries_after(0))

    fenced = False
    with in_a_thread(lambda: None) as nothing, ExitStack() as at_the_end:
        nothing.join()
        try:
            with first.transaction():
                first.append([entry(2)])
                taking = at_the_end.enter_context(in_a_thread(take_over))
                taking.join(0.3)
                first.append([entry(3)])
        except FencedError:
            fenced = True
    assert found == ([1] if fenced else [1, 2, 3])
    assert [one.seq for one in second.entries_after(0)] == found


def test_leads_that_change_hands_all_the_time_leave_one_chain_of_what_was_committed(url):
    """Each takes the lead, reads where the ledger is, and writes until it is fenced."""
    committed, lock = {}, threading.Lock()

    def lives(name, lives_left, pauses):
        with begun_ledger(url) as ledger:
            while lives_left:
                ledger.take_lead(name, at=5.0)
                seq = ledger.last_seq()
                try:
                    for _ in range(6):
                        seq += 1
                        written = entry(seq, name)
                        append(ledger, written)
                        with lock:
                            assert seq not in committed
                            committed[seq] = (name, written.update_id)
                        time.sleep(pauses.random() * 0.01)
                except FencedError:
                    pass
                lives_left -= 1

    with begun_ledger(url) as ledger:
        ledger.take_lead("nobody", at=1.0)
        with ExitStack() as threads:
            for number, name in enumerate(("ann", "bob", "cem")):
                threads.enter_context(in_a_thread(lambda name=name, n=number: lives(name, 8, random.Random(n))))
        entries = list(checked_entries(ledger, after=0))
        assert {found.seq: (found.party, found.update_id) for found in entries} == committed
        assert ledger.lead().epoch == 25


# PostgreSQL alone


@pytest.fixture
def served(postgresql_url):
    with begun_ledger(postgresql_url) as opened:
        yield opened


def test_take_over_waits_for_a_commit_that_has_begun(postgresql_url):
    """From the fence to the end of the commit nobody can take the lead."""
    with begun_ledger(postgresql_url) as first, begun_ledger(postgresql_url) as second, begun_ledger(postgresql_url) as onlooker:
        first.take_lead("the first", at=5.0)
        found, threads = [], ExitStack()

        def take_over():
            second.take_lead("the second", at=6.0)
            found.extend(one.seq for one in second.entries_after(0))

        def waits_for_a_lock():
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            with onlooker._reading():
                return onlooker._connection.exec_driver_sql(waiting).scalar_one() > 0

        def before_the_commit(_connection):
            threads.enter_context(in_a_thread(take_over))
            until(waits_for_a_lock)
            assert found == []

        event.listen(first._connection.engine, "commit", before_the_commit)
        with threads:
            append(first, entry(1))
            event.remove(first._connection.engine, "commit", before_the_commit)
        assert found == [1]
        with pytest.raises(FencedError):
            append(first, entry(2))


def test_transaction_whose_client_fell_silent_is_ended_by_whoever_takes_over(served, postgresql_url):
    served.take_lead("the first", at=5.0)

    def fall_silent():
        with served.transaction():
            served.append([entry(1)])
            with begun_ledger(postgresql_url) as second:
                second.take_lead("the second", at=6.0)
                append(second, entry(1, "bob"))
            served.append([entry(2)])

    with pytest.raises(StorageUnavailableError, match="administrator command"):
        fall_silent()
    # It goes on with a new connection, and finds out.
    with pytest.raises(FencedError, match="the second"):
        append(served, entry(1))
    assert [found.party for found in served.entries_after(0)] == ["bob"]


def test_silent_client_that_nobody_replaces_is_ended_by_the_server(served):
    assert served._connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar_one() == "1min"


@pytest.fixture
def mortal(postgresql):
    """The server, which runs again at the end."""
    yield postgresql
    if not postgresql.runs:
        postgresql.start_again()


def test_connection_that_the_server_ended_is_unavailable_once_and_then_made_anew(served, postgresql_url):
    append(served, entry(1), entry(2))
    add_frames(served, with_keyframe(1))
    asking = {name: read for name, read in ALL_READS.items() if name != "nothing decided"}
    with begun_ledger(postgresql_url) as other:
        for read in asking.values():
            with served._reading():
                pid = served._connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            with other._reading():
                other._connection.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 5000)")
            with pytest.raises(StorageUnavailableError, match="does not answer"):
                read(served)
            read(served)
    append(served, entry(3))


def test_server_that_is_killed_is_unavailable_and_the_same_ledger_works_again_when_it_is_back(served, mortal):
    served.take_lead("the first", at=5.0)
    append(served, entry(1))
    mortal.kill()
    failing = (
        served.last_seq,
        lambda: append(served, entry(2)),
        lambda: next(served.entries_after(0)),
        lambda: served.take_lead("the first", at=6.0),
        served.lead,
        served.let_go,
    )
    for trying in failing:
        with pytest.raises(StorageUnavailableError) as raised:
            trying()
        assert mortal.password.get_secret_value() not in str(raised.value)
    mortal.start_again()
    assert [found.seq for found in served.entries_after(0)] == [1]
    served.take_lead("the first", at=6.0)
    assert served.epoch == 2
    append(served, entry(2))
    assert len(list(checked_entries(served, after=0))) == 2


def test_server_that_is_killed_in_the_middle_of_a_transaction_leaves_nothing_of_it(served, mortal):
    served.take_lead("the first", at=5.0)
    append(served, entry(1))

    def interrupted():
        with served.transaction():
            served.append([entry(2)])
            mortal.kill()
            served.append([entry(3)])

    with pytest.raises(StorageUnavailableError):
        interrupted()
    mortal.start_again()
    assert served.last_seq() == 1
    assert served.is_leading()
    append(served, entry(2))


def test_server_that_is_killed_before_the_commit_leaves_nothing_of_it(served, mortal):
    append(served, entry(1))

    def interrupted():
        with served.transaction():
            served.append([entry(2)])
            mortal.kill()

    with pytest.raises(StorageUnavailableError):
        interrupted()
    mortal.start_again()
    assert served.last_seq() == 1
    append(served, entry(2))


def test_failure_in_a_transaction_whose_server_went_away_leaves_nothing_and_harms_nothing(served, mortal):
    def interrupted():
        with served.transaction():
            served.append([entry(1)])
            mortal.kill()
            raise ZeroDivisionError

    with pytest.raises((ZeroDivisionError, StorageUnavailableError)):
        interrupted()
    mortal.start_again()
    assert served.last_seq() == 0
    append(served, entry(1))


def test_what_was_committed_outlives_a_kill_of_the_server(served, mortal):
    content = random.Random(3).randbytes(3 << 20)
    append(served, entry(1, payload=content))
    mortal.kill()
    mortal.start_again()
    with pytest.raises(StorageUnavailableError):
        served.last_seq()
    assert next(served.entries_after(0)).payload == content


def changed(url, **parts):
    return make_url(url).set(**parts).render_as_string(hide_password=False)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"port": 1}, "does not answer"),
        ({"password": "hunter22"}, "password authentication failed"),
        ({"database": "nothing"}, "does not exist"),
        ({"username": "nobody"}, "nobody"),
        ({"host": "nowhere.invalid"}, "nowhere.invalid"),
    ],
)
@pytest.mark.parametrize("opening", [open_ledger, open_ledger_for_reading])
def test_server_that_cannot_be_used_is_named_without_the_password(postgresql, postgresql_url, parts, expected, opening):
    url = changed(postgresql_url, **parts)
    with pytest.raises(StorageUnavailableError, match=expected) as raised, opening(url):
        pass
    for told in (str(raised.value), str(raised.value.__cause__)):
        assert postgresql.password.get_secret_value() not in told
        assert "hunter22" not in told
    assert "broker_fl:***@" in str(raised.value) or "nobody:***@" in str(raised.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("here or there", "expected a database URL"),
        ("", "expected a database URL"),
        ("user:hunter22@host/database", "expected a database URL"),
        ("postgresql+asyncpg://user:hunter22@host/database", "a driver that is not installed"),
        ("nosql://user:hunter22@host/database", "expected a database URL"),
        ("mysql://user:hunter22@host/database", "expected a database URL"),
        ("postgresql+psycopg://user:hunt@er22@host/database", "in a password, @ is %40"),
        ("postgresql+psycopg://user:hunter22@host:port/database", "expected a database URL"),
    ],
)
@pytest.mark.parametrize("opening", [open_ledger, open_ledger_for_reading])
def test_url_that_is_none_is_a_mistake_in_the_configuration(url, expected, opening):
    with pytest.raises(ConfigurationError, match=expected) as raised, opening(url):
        pass
    assert "hunter22" not in str(raised.value)


def test_server_without_a_ledger_is_told_to_have_none(postgresql_url):
    with pytest.raises(ConfigurationError, match="there is no ledger at"), open_ledger_for_reading(postgresql_url):
        pass
