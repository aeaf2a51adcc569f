"""What is SQLite's own about a ledger; what every ledger promises is in tests/contracts/test_ledger_contract.py."""

import sqlite3
import threading

import pytest
from ledger_rows import READS, append, begun_ledger, entry, part, with_keyframe

from aggregator.opening import open_ledger, open_ledger_for_reading
from broker_fl import database
from broker_fl.database import sqlite_url
from broker_fl.errors import ConfigurationError, DamagedError, FencedError, StorageError, StorageFullError, StorageInUseError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(file):
    with begun_ledger(sqlite_url(file)) as opened:
        yield opened


def pragma(ledger, what):
    with ledger._reading():
        return ledger._connection.exec_driver_sql(f"PRAGMA {what}").scalar_one()


def is_closed_for_reading(file):
    """Whether nobody reads: only then can the write-ahead log be emptied."""
    connection = sqlite3.connect(file)
    try:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.close()
    return busy == 0


def test_every_commit_reaches_the_disk_through_a_write_ahead_log_with_large_pages(ledger):
    full = 2
    assert [pragma(ledger, what) for what in ("journal_mode", "synchronous", "page_size")] == ["wal", full, 65536]


def test_full_disk_rolls_the_whole_transaction_back_and_the_ledger_can_still_be_read(ledger, file):
    append(ledger, entry(1))
    with open_ledger(sqlite_url(file)):
        pages = ledger._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        ledger._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1}")
        ledger._connection.rollback()
    with pytest.raises(StorageFullError, match=r"ledger\.db"):
        append(ledger, entry(2), entry(3, payload=b"x" * (1 << 20)))
    assert [found.seq for found in ledger.entries_after(0)] == [1]


def test_ledger_that_is_not_there_is_not_made_by_whoever_reads_it(file):
    with (
        pytest.raises(ConfigurationError, match=r"there is no ledger at .*ledger\.db"),
        open_ledger_for_reading(sqlite_url(file)),
    ):
        pass
    assert not file.exists()


def test_file_that_is_no_database_is_damaged_and_left_as_it_is(file):
    file.write_bytes(b"something else " * 10_000)
    for opening in (open_ledger, open_ledger_for_reading):
        with pytest.raises(DamagedError, match=r"ledger\.db is damaged"), opening(sqlite_url(file)):
            pass
    assert file.read_bytes() == b"something else " * 10_000


def test_ledger_that_is_read_is_not_written(ledger, file):
    append(ledger, entry(1))
    with (
        open_ledger_for_reading(sqlite_url(file)) as reader,
        pytest.raises(StorageError, match="readonly"),
        reader.transaction(),
    ):
        reader.add_part(part(0))


def test_take_over_waits_for_a_transaction_that_has_written_and_finds_it(ledger, file):
    ledger.take_lead("the first", at=1.0)
    found = []
    with begun_ledger(sqlite_url(file)) as second:

        def take_over():
            second.take_lead("the second", at=2.0)
            found.append(second.last_seq())

        taking = threading.Thread(target=take_over)
        with ledger.transaction():
            ledger.append([entry(1)])
            taking.start()
            taking.join(0.3)
            assert found == []
            assert ledger.lead().holder == "the first"
            ledger.append([entry(2)])
        taking.join()
    assert found == [2]
    with pytest.raises(FencedError):
        append(ledger, entry(3))


def test_file_that_another_process_goes_on_holding_is_told_to_be_in_use(ledger, file, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.05)
    with begun_ledger(sqlite_url(file)) as second:
        with ledger.transaction():
            ledger.append([entry(1)])
            with pytest.raises(StorageInUseError, match=r"another process holds .*ledger\.db"):
                second.take_lead("the second", at=2.0)
        second.take_lead("the second", at=2.0)


def test_room_of_what_was_dropped_is_given_back(ledger, file):
    append(ledger, *(entry(seq, payload=b"x" * (1 << 20)) for seq in range(1, 5)))
    with ledger.transaction():
        ledger.drop_payloads(upto=4)
    before = pragma(ledger, "page_count")
    ledger.give_room_back()
    assert pragma(ledger, "page_count") * 4 < before
    assert len(list(ledger.entries_after(0))) == 4


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_keeps_the_write_ahead_log_from_being_emptied_no_longer_than_it_takes(ledger, file, read):
    with ledger.transaction():
        ledger.append([entry(1), entry(2)])
        ledger.add_frame(with_keyframe(1))
    read(ledger)
    assert is_closed_for_reading(file)
    append(ledger, entry(3))
