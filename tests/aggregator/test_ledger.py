import sqlite3
import uuid
from dataclasses import replace

import pytest

from aggregator.ledger import open_ledger, open_ledger_for_reading
from aggregator.records import Entry, FrameRow, FrameTotals, PartRow, SnapshotRow
from broker_fl.database import sqlite_url
from broker_fl.errors import ConfigurationError, StorageError, StorageFullError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(file):
    with open_ledger(sqlite_url(file)) as opened:
        yield opened


def entry(seq, party="ann", update_id=None, **changes):
    facts = {
        "kind": "update",
        "at": 1.0,
        "version": seq,
        "party": party,
        "update_id": update_id or uuid.uuid4().hex,
        "size": 100,
        "outcome": "merged",
        "staleness": 1,
        "weight": 0.3,
        "payload": b"content",
    }
    return Entry(seq, **{**facts, **changes})


def frame(number, *, body=b"frame", version=None, **changes):
    facts = {
        "at": 1.0,
        "base": number - 1 or None,
        "digest": "d" * 64,
        "model_digest": "m" * 64,
        "codec": "int8",
        "rounding": None,
        "plan": "p" * 64,
        "over": False,
        "size": 5,
        "log_bytes": 5 * (number - 1),
    }
    return FrameRow(**{"number": number, "version": number if version is None else version, "body": body, **facts, **changes})


def with_keyframe(number, *, body=b"whole"):
    return frame(number, keyframe_codec="float32", keyframe_size=len(body), keyframe=body)


def part(index, *, party="ann", update_id="u" * 32, at=1.0, body=b"abc", parts=3):
    return PartRow(party, update_id, index, parts, 9, "s" * 64, at, body)


def append(ledger, *entries):
    with ledger.transaction():
        ledger.append(entries)


def is_closed_for_reading(file):
    """Whether nobody reads: only then can the write-ahead log be emptied."""
    connection = sqlite3.connect(file)
    try:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.close()
    return busy == 0


def test_ledger_keeps_the_id_of_its_first_opening(file):
    ids = []
    for _ in range(2):
        with open_ledger(sqlite_url(file)) as ledger:
            ids.append(ledger.facts()["ledger_id"])
    assert ids[0] == ids[1]
    assert len(ids[0]) == 32


def test_fact_that_is_set_again_is_replaced(ledger):
    for value in ("one", "two"):
        with ledger.transaction():
            ledger.set_fact("over", value)
    assert ledger.facts()["over"] == "two"


def test_entries_come_back_in_order_with_all_that_was_written(ledger):
    written = [entry(seq, payload=bytes([seq]), reason=None, detail="") for seq in range(1, 8)]
    append(ledger, *written)
    assert list(ledger.entries_after(0, batch=3)) == written
    assert list(ledger.entries_after(3, batch=2)) == written[3:]
    assert list(ledger.entries_after(7)) == []
    assert ledger.last_seq() == 7


def test_empty_ledger_has_no_entries_frames_or_snapshots(ledger):
    assert list(ledger.entries_after(0)) == []
    assert ledger.last_seq() == ledger.latest_version() == 0
    assert ledger.last_frame() is None
    assert ledger.snapshots() == ledger.totals() == ledger.entries_of("merging") == []
    assert ledger.oldest_unpublished() is None
    assert ledger.newest_keyframe() is None
    assert list(ledger.bodies_after(0)) == []
    assert ledger.last_codecs() == {}
    assert ledger.frame_totals() == FrameTotals(0, 0, 0, 0, "", "")


def test_second_entry_for_an_update_of_a_party_is_impossible(ledger):
    append(ledger, entry(1, update_id="a" * 32))
    with pytest.raises(StorageError):
        append(ledger, entry(2, update_id="a" * 32))
    append(ledger, entry(2, party="bob", update_id="a" * 32))
    assert [found.party for found in ledger.entries_after(0)] == ["ann", "bob"]


def test_entries_without_an_update_need_no_party(ledger):
    append(ledger, Entry(1, "merging", 1.0, 0, payload=b"{}"), Entry(2, "flush", 1.0, 1), Entry(3, "flush", 1.0, 2))
    assert [found.kind for found in ledger.entries_of("merging")] == ["merging"]
    assert ledger.latest_version() == 2


def test_transaction_that_fails_in_the_middle_leaves_nothing(ledger, file):
    def fail():
        with ledger.transaction():
            ledger.append([entry(1)])
            ledger.add_frame(frame(1))
            ledger.add_part(part(0))
            ledger.set_fact("over", "yes")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(ledger.entries_after(0)) == []
    assert ledger.last_frame() is None
    assert "over" not in ledger.facts()
    with ledger.transaction():
        assert ledger.parts("ann", "u" * 32) == []


def test_others_see_a_transaction_only_when_it_is_over(ledger, file):
    with ledger.transaction():
        ledger.append([entry(1)])
        with open_ledger(sqlite_url(file)) as reader:
            assert reader.last_seq() == 0
    with open_ledger(sqlite_url(file)) as reader:
        assert reader.last_seq() == 1


def test_full_disk_rolls_the_whole_transaction_back_and_the_ledger_can_still_be_read(ledger, file):
    append(ledger, entry(1))
    with open_ledger(sqlite_url(file)):
        pages = ledger._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        ledger._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1}")
        ledger._connection.rollback()
    with pytest.raises(StorageFullError, match=r"ledger\.db"):
        append(ledger, entry(2), entry(3, payload=b"x" * (1 << 20)))
    assert [found.seq for found in ledger.entries_after(0)] == [1]


def test_errors_of_whoever_uses_the_ledger_go_through_unchanged(file):
    # A timeout and a lost connection are OSErrors too, but none of the ledger's.
    for error in (TimeoutError("too late"), ConnectionResetError("gone")):
        with pytest.raises(type(error)), open_ledger(sqlite_url(file)):
            raise error


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


def test_part_that_is_sent_again_changes_nothing(ledger):
    with ledger.transaction():
        ledger.add_part(part(1, body=b"def"))
        ledger.add_part(part(0, body=b"abc"))
        ledger.add_part(part(0, body=b"???"))
        assert [row.body for row in ledger.parts("ann", "u" * 32)] == [b"abc", b"def"]


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


def test_parts_survive_the_end_of_the_process(file):
    with open_ledger(sqlite_url(file)) as ledger, ledger.transaction():
        ledger.add_part(part(0))
    with open_ledger(sqlite_url(file)) as ledger, ledger.transaction():
        assert ledger.parts("ann", "u" * 32) == [part(0)]


def test_half_sent_update_expires_by_its_newest_part(ledger):
    with ledger.transaction():
        ledger.add_part(part(0, update_id="u" * 32, at=10.0))
        ledger.add_part(part(1, update_id="u" * 32, at=30.0))
        ledger.add_part(part(0, update_id="v" * 32, at=10.0))
        ledger.add_part(part(1, update_id="v" * 32, at=15.0))
        assert ledger.expire_parts(before=20.0) == 1
        assert set(ledger.half_sent("ann")) == {"u" * 32}
        assert ledger.expire_parts(before=20.0) == 0
        assert ledger.expire_parts(before=31.0) == 1


def add_frames(ledger, *frames):
    with ledger.transaction():
        for added in frames:
            ledger.add_frame(added)


def publish(ledger, *numbers):
    with ledger.transaction():
        for number in numbers:
            ledger.mark_published(number, at=7.0)


def test_frame_comes_back_with_all_that_was_written(ledger):
    written = with_keyframe(1), frame(2, rounding="int8", over=True), frame(3, base=2)
    add_frames(ledger, *written)
    rows = ledger.frames_from(0)
    assert rows == [replace(row, body=None, keyframe=None) for row in written]
    assert [ledger.with_bodies(row) for row in rows] == list(written)
    assert ledger.last_frame() == rows[-1]


def test_bodies_of_all_frames_are_kept_and_come_in_order(ledger):
    add_frames(ledger, *(frame(number, body=b"%d" % number) for number in range(1, 12)))
    publish(ledger, *range(1, 12))
    assert list(ledger.bodies_after(0)) == [(number, b"%d" % number) for number in range(1, 12)]
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


def test_frames_are_counted_when_they_are_published(ledger):
    add_frames(
        ledger, with_keyframe(1), frame(2), replace(with_keyframe(3, body=b"w" * 9), keyframe_codec="int8"), frame(4, size=7)
    )
    publish(ledger, 1)
    assert ledger.frame_totals() == FrameTotals(1, 5, 1, 5, "int8", "float32")
    publish(ledger, 2, 3, 4)
    assert ledger.frame_totals() == FrameTotals(4, 22, 2, 14, "int8", "int8")


def test_ledger_of_an_earlier_format_is_named_and_left_as_it_is(file):
    with open_ledger(sqlite_url(file)) as ledger, ledger.transaction():
        ledger._connection.exec_driver_sql("DELETE FROM meta WHERE key = 'format'")
    for opening in (lambda: open_ledger(sqlite_url(file)), lambda: open_ledger_for_reading(sqlite_url(file))):
        with pytest.raises(ConfigurationError, match=r"ledger\.db is in format 1, this broker-fl writes format 2"), opening():
            pass


def test_frames_are_listed_from_a_version_on(ledger):
    with ledger.transaction():
        for number, version in ((1, 0), (2, 4), (3, 4), (4, 9)):
            ledger.add_frame(frame(number, version=version))
    assert [row.number for row in ledger.frames_from(4)] == [2, 3, 4]
    assert [row.number for row in ledger.frames_from(-5)] == [1, 2, 3, 4]


def test_snapshot_of_an_entry_replaces_the_one_before(ledger):
    row = SnapshotRow(4, 3, "one.safetensors", "a" * 64, 1.0)
    with ledger.transaction():
        ledger.add_snapshot(SnapshotRow(9, 8, "late.safetensors", "b" * 64, 1.0))
        ledger.add_snapshot(row)
    with ledger.transaction():
        ledger.add_snapshot(replace(row, file="two.safetensors"))
    assert [(found.seq, found.file) for found in ledger.snapshots()] == [(4, "two.safetensors"), (9, "late.safetensors")]


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


def test_totals_add_up_by_party_and_outcome(ledger):
    append(
        ledger,
        entry(1, staleness=0),
        entry(2, staleness=4, size=300),
        entry(3, outcome="refused", reason="base", staleness=0),
        entry(4, "bob"),
        Entry(5, "flush", 1.0, 5),
    )
    totals = {(total.party, total.outcome): total for total in ledger.totals()}
    assert set(totals) == {("ann", "merged"), ("ann", "refused"), ("bob", "merged")}
    merged = totals["ann", "merged"]
    assert (merged.updates, merged.size, merged.mean_staleness, merged.max_staleness) == (2, 400, 2.0, 4)


READS = {
    "facts": lambda ledger: ledger.facts(),
    "last_seq": lambda ledger: ledger.last_seq(),
    "decided": lambda ledger: ledger.decided([("ann", "a" * 32)]),
    "nothing decided": lambda ledger: ledger.decided([]),
    "entries_after": lambda ledger: list(ledger.entries_after(0)),
    "first of entries_after": lambda ledger: next(ledger.entries_after(0, batch=1)),
    "strategies": lambda ledger: ledger.entries_of("merging"),
    "last_frame": lambda ledger: ledger.last_frame(),
    "frames_from": lambda ledger: ledger.frames_from(0),
    "oldest_unpublished": lambda ledger: ledger.oldest_unpublished(),
    "with_bodies": lambda ledger: ledger.with_bodies(frame(1)),
    "bodies_after": lambda ledger: list(ledger.bodies_after(0)),
    "first of bodies_after": lambda ledger: next(ledger.bodies_after(0)),
    "newest_keyframe": lambda ledger: ledger.newest_keyframe(),
    "last_codecs": lambda ledger: ledger.last_codecs(),
    "snapshots": lambda ledger: ledger.snapshots(),
    "totals": lambda ledger: ledger.totals(),
    "frame_totals": lambda ledger: ledger.frame_totals(),
    "latest_version": lambda ledger: ledger.latest_version(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_leaves_no_transaction_open(ledger, file, read):
    with ledger.transaction():
        ledger.append([entry(1), entry(2)])
        ledger.add_frame(with_keyframe(1))
    read(ledger)
    assert is_closed_for_reading(file)
    append(ledger, entry(3))


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_inside_a_transaction_sees_it_and_leaves_it_open(ledger, read):
    with ledger.transaction():
        ledger.append([entry(1), entry(2)])
        ledger.add_frame(with_keyframe(1))
        read(ledger)
        assert ledger.last_seq() == 2
        ledger.append([entry(3)])
    assert ledger.last_seq() == 3
