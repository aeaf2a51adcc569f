"""The privacy record: with the outbox in one transaction, over crashes, and shared by all who use the same data."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from broker_fl.errors import ConfigurationError, DamagedError, StorageError
from broker_fl.privacy.record import Promise, Training
from workers.outbox import StoredUpdate, open_outbox
from workers.spending import open_spending, spending_file


@contextmanager
def opened(folder, file=None, *, party="ann", federation="ward"):
    with open_outbox(folder, party=party, federation=federation) as outbox:
        yield outbox, outbox.attach(file or spending_file(folder, party))


def training(number, **facts):
    given = {
        "at": float(number),
        "federation": "ward",
        "party": "ann",
        "outbox": "o" * 32,
        "ledger": "l" * 32,
        "base_version": number,
        "update_id": f"{number:032x}",
        "noise_multiplier": 1.5,
        "sample_rate": 0.125,
        "steps": 10,
        "max_grad_norm": 1.0,
        "num_examples": 80,
    }
    return Training(**{**given, **facts})


def update(sequence):
    return StoredUpdate(sequence, f"{sequence:032x}", b"body" * 10_000, 0, "float32")


def test_an_update_and_its_cost_are_there_together_or_not_at_all(tmp_path):
    with opened(tmp_path) as (outbox, spending):
        with outbox.transaction():
            outbox.add(update(1))
            spending.add(training(1))

        def _twice():
            outbox.add(update(2))
            spending.add(training(2))
            spending.add(training(2))

        with pytest.raises(DamagedError), outbox.transaction():
            _twice()
        assert [stored.sequence for stored in outbox.all_unsettled()] == [1]
        assert [one.base_version for one in spending.trainings()] == [1]
    with opened(tmp_path) as (outbox, spending):
        assert [stored.sequence for stored in outbox.all_unsettled()] == [1]
        assert spending.trainings() == [replace(training(1), number=1)]


KILLED = """
import sys
import numpy
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_spending import opened, training, update

with opened(Path({folder!r})) as (outbox, spending):
    sequence = outbox.next_sequence()
    print("ready", flush=True)
    while True:
        with outbox.transaction():
            outbox.add(update(sequence))
            outbox.set_residual("m", numpy.zeros(100_000, "float32"))
            spending.add(training(sequence))
        sequence += 1
"""


@pytest.mark.parametrize("after_ms", [5, 9, 14, 20, 33])
def test_a_worker_that_is_killed_in_a_commit_has_all_of_it_or_nothing_of_it(tmp_path, after_ms):
    code = KILLED.format(tests=str(__file__).rpartition("/")[0], folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(after_ms / 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with opened(tmp_path) as (outbox, spending):
        kept, paid = outbox.all_unsettled(), spending.trainings()
        assert [stored.update_id for stored in kept] == [one.update_id for one in paid]
        assert outbox.next_sequence() == len(paid) + 1
        with outbox.transaction():
            outbox.add(update(len(paid) + 1))
            spending.add(training(len(paid) + 1))


def test_neither_file_is_in_a_write_ahead_log_which_could_commit_without_the_other(tmp_path):
    with open_outbox(tmp_path, party="ann", federation="ward"):
        pass
    assert _journal(tmp_path / "outbox-ann.db") == "wal"
    with opened(tmp_path):
        assert _journal(tmp_path / "outbox-ann.db") == "delete"
        assert _journal(tmp_path / "privacy-ann.db") == "delete"


def _journal(file):
    connection = sqlite3.connect(file)
    try:
        return connection.execute("PRAGMA journal_mode").fetchone()[0]
    finally:
        connection.close()


def test_two_federations_on_the_same_data_share_one_record(tmp_path):
    file = tmp_path / "patients.db"
    with (
        opened(tmp_path / "a", file, federation="cardio", party="st-mary") as (first, one),
        opened(tmp_path / "b", file, federation="onco", party="hospital-7") as (second, other),
    ):
        with first.transaction():
            one.add(training(1, federation="cardio", noise_multiplier=2.0))
        with second.transaction():
            other.add(training(2, federation="onco"))
        with first.transaction():
            one.add(training(3, federation="cardio"))
        assert one.id == other.id
        assert one.history() == other.history() == {(2.0, 0.125): 10, (1.5, 0.125): 20}
        assert one.history(federation="cardio") == {(2.0, 0.125): 10, (1.5, 0.125): 10}
        assert one.history(federation="nobody") == {}


def test_a_worker_waits_for_the_transaction_of_another_one_on_the_same_record(tmp_path):
    file = tmp_path / "patients.db"
    with opened(tmp_path / "a", file) as (first, one), opened(tmp_path / "b", file, federation="onco") as (second, other):
        second._connection.exec_driver_sql("PRAGMA busy_timeout = 50")
        second._connection.rollback()
        with first.transaction():
            one.add(training(1))
            with pytest.raises(StorageError, match="holds"), second.transaction():
                other.add(training(2))
        with second.transaction():
            other.add(training(2))
        assert other.count() == 2


def test_a_record_that_was_replaced_or_is_an_older_copy_is_noticed(tmp_path):
    file, outbox_id = spending_file(tmp_path, "ann"), "o" * 32
    with opened(tmp_path) as (outbox, spending):
        with outbox.transaction():
            spending.add(training(1))
        first = spending.mark(outbox=outbox_id)
    shutil.copy(file, tmp_path / "older.db")
    with opened(tmp_path) as (outbox, spending):
        with outbox.transaction():
            spending.add(training(2))
        second = spending.mark(outbox=outbox_id)
        for known in (None, first, second):
            spending.expect_whole(known, outbox=outbox_id)
    shutil.copy(tmp_path / "older.db", file)
    with opened(tmp_path) as (_, spending):
        spending.expect_whole(first, outbox=outbox_id)
        with pytest.raises(DamagedError, match="knows of 1 of 2 trainings"):
            spending.expect_whole(second, outbox=outbox_id)
    file.unlink()
    with opened(tmp_path) as (_, spending), pytest.raises(DamagedError, match="not the privacy record"):
        spending.expect_whole(first, outbox=outbox_id)


def test_a_record_outlives_the_outbox(tmp_path):
    with opened(tmp_path) as (outbox, spending), outbox.transaction():
        spending.add(training(1))
    (tmp_path / "outbox-ann.db").unlink()
    with opened(tmp_path) as (outbox, spending):
        assert outbox.all_unsettled() == []
        assert spending.history() == {(1.5, 0.125): 10}


def test_one_update_is_paid_for_once(tmp_path):
    with opened(tmp_path) as (outbox, spending):
        with outbox.transaction():
            spending.add(training(1))
        with pytest.raises(DamagedError), outbox.transaction():
            spending.add(training(1))
        with outbox.transaction():
            spending.add(training(2, update_id=None))
            spending.add(training(3, update_id=None))
        assert spending.count() == 3


def test_promises_are_kept_where_they_change(tmp_path):
    first = Promise(1.0, "ward", "ann", limits='{"max_epsilon": 8.0}', plan="{}")
    with opened(tmp_path) as (outbox, spending):
        for promise in (first, Promise(2.0, "ward", "ann", first.limits, first.plan), Promise(3.0, "onco", "ann", "{}", "{}")):
            with outbox.transaction():
                spending.promise(promise)
        with outbox.transaction():
            spending.promise(Promise(4.0, "ward", "ann", '{"max_epsilon": 4.0}', "{}"))
        assert [promise.at for promise in spending.promises()] == [1.0, 3.0, 4.0]


def test_a_record_is_read_while_its_worker_works_and_after_it_was_killed(tmp_path):
    file = spending_file(tmp_path, "ann")
    with pytest.raises(ConfigurationError, match="there is no privacy record"), open_spending(file):
        pass
    with opened(tmp_path) as (outbox, spending):
        with outbox.transaction():
            spending.add(training(1))
        with open_spending(file) as reader:
            assert [one.number for one in reader.trainings()] == [1]
    with open_spending(file) as reader:
        assert reader.count(outbox="o" * 32) == 1


def test_a_record_of_another_format_or_that_is_damaged_is_left_as_it_is(tmp_path):
    file = spending_file(tmp_path, "ann")
    with opened(tmp_path) as (outbox, spending), outbox.transaction():
        spending.add(training(1))
    connection = sqlite3.connect(file)
    with connection:
        connection.execute("UPDATE facts SET value = '9' WHERE key = 'format'")
    connection.close()
    with pytest.raises(ConfigurationError, match="is of format '9', and this version reads '1'"), opened(tmp_path):
        pass
    file.write_bytes(b"SQLite format 3\0" + b"?" * 5000)
    before = file.read_bytes()
    with pytest.raises(DamagedError, match="restore it from a backup"), opened(tmp_path):
        pass
    assert file.read_bytes() == before
