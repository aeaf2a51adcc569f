import os
import sqlite3

import pytest
from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, insert, select

from broker_fl.database import display_name, held_alone, open_database, open_for_reading, sqlite_url, storage_errors
from broker_fl.errors import DamagedError, StorageError, StorageFullError, StorageInUseError

TABLES = MetaData()
BLOBS = Table("blobs", TABLES, Column("number", Integer, primary_key=True), Column("body", LargeBinary, nullable=False))


@pytest.fixture
def database(tmp_path):
    file = tmp_path / "store.db"
    engine = open_database(sqlite_url(file), TABLES)
    yield engine, file
    engine.dispose()


def _write(engine, file, *, size, number=1):
    with storage_errors(str(file)), engine.begin() as connection:
        connection.execute(insert(BLOBS).values(number=number, body=b"x" * size))


def _numbers(engine):
    with engine.connect() as connection:
        return list(connection.execute(select(BLOBS.c.number)).scalars())


def test_database_is_made_with_its_tables_a_write_ahead_log_and_full_synchronisation(database):
    engine, _ = database
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
    assert _numbers(engine) == []


def test_full_disk_is_a_storage_full_error_that_names_the_file_and_changes_nothing(database):
    engine, file = database
    _write(engine, file, size=10)
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageFullError, match=r"store\.db.*make room"):
        _write(engine, file, size=1 << 20, number=2)
    assert _numbers(engine) == [1]


def test_full_disk_of_the_file_system_is_a_storage_full_error():
    with pytest.raises(StorageFullError, match="no space left for model"), storage_errors("model"):
        raise OSError(28, os.strerror(28))


def test_other_failures_of_the_file_system_are_storage_errors():
    with pytest.raises(StorageError, match="model cannot be used"), storage_errors("model"):
        raise PermissionError(13, os.strerror(13), "model")


def test_database_that_another_holds_is_a_storage_in_use_error(database):
    engine, file = database
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(file, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageInUseError, match=r"another process holds .*store\.db"):
            _write(engine, file, size=10)
        other.execute("ROLLBACK")
        _write(engine, file, size=10)
    finally:
        other.close()
    assert _numbers(engine) == [1]


def test_file_that_is_no_database_is_damaged_and_left_as_it_is(tmp_path):
    file = tmp_path / "store.db"
    file.write_bytes(b"not a database at all, " * 400)
    with pytest.raises(DamagedError, match=r"store\.db is damaged .*restore it from a backup"):
        open_database(sqlite_url(file), TABLES)
    assert file.read_bytes() == b"not a database at all, " * 400


def test_database_with_a_damaged_page_is_damaged(database):
    engine, file = database
    for number in range(50):
        _write(engine, file, size=3000, number=number)
    engine.dispose()
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = b"\xff" * 4096
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"store\.db is damaged"):
        open_database(sqlite_url(file), TABLES)


def test_truncated_database_is_damaged(database):
    engine, file = database
    for number in range(20):
        _write(engine, file, size=3000, number=number)
    engine.dispose()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedError, match=r"store\.db is damaged"):
        open_database(sqlite_url(file), TABLES)


def test_database_in_a_folder_that_is_not_there_is_a_storage_error_that_names_it(tmp_path):
    with pytest.raises(StorageError, match=r"nowhere/store\.db cannot be used"):
        open_database(sqlite_url(tmp_path / "nowhere" / "store.db"), TABLES)


def test_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    # A file in the place of a folder: no rights are strong enough to write into it, not even root's.
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StorageError, match="state cannot be used"), held_alone(tmp_path / "state" / "x.lock", message="busy"):
        pytest.fail("the lock was taken")


def test_lock_is_held_by_one_at_a_time_and_free_again_afterwards(tmp_path):
    lock = tmp_path / "made" / "x.lock"
    with held_alone(lock, message="busy"), pytest.raises(StorageInUseError, match="busy"), held_alone(lock, message="busy"):
        pytest.fail("the lock was taken twice")
    with held_alone(lock, message="busy"):
        pass


def test_errors_raised_while_the_lock_is_held_go_through_unchanged(tmp_path):
    with pytest.raises(ConnectionResetError), held_alone(tmp_path / "x.lock", message="busy"):
        raise ConnectionResetError("somebody else's trouble")


def test_a_servers_password_is_not_in_its_name():
    name = display_name("postgresql://broker:secret@db.example/ledger")
    assert "secret" not in name
    assert "db.example" in name


@pytest.mark.parametrize("name", ["a b", "50%", "a%20b", "#1", "what?", "läden", "file:x"])
def test_folder_of_any_name_holds_its_own_database_for_writing_and_reading(tmp_path, name):
    file = tmp_path / name / "store.db"
    file.parent.mkdir()
    engine = open_database(sqlite_url(file), TABLES)
    _write(engine, file, size=10, number=7)
    reader = open_for_reading(sqlite_url(file))
    assert _numbers(reader) == [7]
    reader.dispose()
    engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.exists()
    assert display_name(sqlite_url(file)) == str(file)


def test_database_that_is_read_is_not_written(database):
    engine, file = database
    reader = open_for_reading(sqlite_url(file))
    with pytest.raises(StorageError, match="readonly"):
        _write(reader, file, size=10)
    reader.dispose()
    assert _numbers(engine) == []
