import sqlite3

import numpy as np
import pytest

from broker_fl.errors import ConfigurationError, DamagedError, StorageFullError, StorageInUseError
from workers.outbox import StoredUpdate, open_outbox, outbox_file, read_counters


@pytest.fixture
def open_here(tmp_path):
    return lambda federation="ward", party="ann": open_outbox(tmp_path, party=party, federation=federation)


def update(sequence, **changes):
    facts = {"update_id": f"{sequence:032x}", "body": b"update %d" % sequence, "base_version": sequence, "codec": "float32"}
    return StoredUpdate(sequence, **{**facts, **changes})


def add(outbox, *updates):
    with outbox.transaction():
        for one in updates:
            outbox.add(one)


def test_empty_outbox_has_nothing_to_send_and_begins_with_sequence_one(open_here):
    with open_here() as outbox:
        assert outbox.to_send(sent_before=1e12, now=1e12) is None
        assert outbox.next_sequence() == 1
        assert outbox.residual("m") is None
        assert outbox.counters() == {}
        assert outbox.unsettled_count() == 0


def test_update_comes_back_byte_by_byte_after_the_process_ended(open_here):
    stored = update(1, body=bytes(range(256)))
    with open_here() as outbox:
        add(outbox, stored)
    with open_here() as outbox:
        assert outbox.to_send(sent_before=0.0, now=1e12) == stored
        assert outbox.unsettled(stored.update_id) == stored
        assert outbox.next_sequence() == 2


def test_updates_are_sent_in_the_order_of_their_sequence(open_here):
    with open_here() as outbox:
        add(outbox, update(1), update(2), update(3))
        order = []
        while (stored := outbox.to_send(sent_before=0.0, now=1e12)) is not None:
            order.append(stored.sequence)
            with outbox.transaction():
                outbox.mark_sent(stored.update_id, at=50.0)
    assert order == [1, 2, 3]


def test_update_that_was_sent_long_ago_without_a_receipt_is_sent_again(open_here):
    with open_here() as outbox:
        add(outbox, update(1))
        with outbox.transaction():
            outbox.mark_sent(update(1).update_id, at=50.0)
        assert outbox.to_send(sent_before=50.0, now=1e12) is None
        assert outbox.to_send(sent_before=50.1, now=1e12).body == b"update 1"


def test_settled_update_is_gone_and_its_sequence_is_not_used_again(open_here):
    with open_here() as outbox:
        add(outbox, update(1))
        with outbox.transaction():
            outbox.settle(update(1).update_id)
            outbox.settle("f" * 32)
        assert outbox.unsettled(update(1).update_id) is None
        assert outbox.to_send(sent_before=1e12, now=1e12) is None
        assert outbox.next_sequence() == 2


def test_residual_comes_back_to_the_last_bit_and_may_be_written(open_here):
    residual = np.array([1e-45, -0.0, 3.0e38, np.pi], np.float32)
    with open_here() as outbox, outbox.transaction():
        outbox.set_residual("m" * 64, residual)
    with open_here() as outbox:
        read = outbox.residual("m" * 64)
    assert read.tobytes() == residual.tobytes()
    read += 1


def test_residual_of_another_model_is_not_used_and_goes_with_the_next(open_here):
    with open_here() as outbox:
        for manifest in ("m" * 64, "n" * 64):
            with outbox.transaction():
                outbox.set_residual(manifest, np.ones(3, np.float32))
        assert outbox.residual("m" * 64) is None
        assert outbox.residual("n" * 64) is not None


def test_velocity_is_kept_like_the_residual_and_goes_where_none_is_wanted(open_here):
    with open_here() as outbox:
        for vector in (np.arange(3, dtype=np.float32), None):
            with outbox.transaction():
                outbox.set_velocity("m" * 64, vector)
            assert np.array_equal(outbox.velocity("m" * 64), vector) if vector is not None else True
        assert outbox.velocity("m" * 64) is None


def test_counters_add_up(open_here, tmp_path):
    with open_here() as outbox:
        for _ in range(3):
            with outbox.transaction():
                outbox.count({"updates_sent": 1, "bytes_up": 1 << 40})
        # While the worker runs, and afterwards.
        assert read_counters(tmp_path, "ann") == {"updates_sent": 3, "bytes_up": 3 << 40}
    assert read_counters(tmp_path, "ann") == {"updates_sent": 3, "bytes_up": 3 << 40}
    assert read_counters(tmp_path, "bob") == {}


def test_update_residual_and_counters_are_there_together_or_not_at_all(open_here):
    def fail():
        with open_here() as outbox, outbox.transaction():
            outbox.add(update(1))
            outbox.set_residual("m" * 64, np.ones(3, np.float32))
            outbox.set_fact("trained_from", "ledger/1")
            outbox.count({"trainings": 1})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with open_here() as outbox:
        assert outbox.next_sequence() == 1
        assert outbox.to_send(sent_before=1e12, now=1e12) is None
        assert outbox.residual("m" * 64) is None
        assert outbox.fact("trained_from") is None
        assert outbox.counters() == {}


def test_full_disk_leaves_what_was_there(open_here):
    with open_here() as outbox:
        add(outbox, update(1))
        outbox._connection.exec_driver_sql("PRAGMA max_page_count = 1")
        outbox._connection.rollback()
        with pytest.raises(StorageFullError, match=r"outbox-ann\.db"):
            add(outbox, update(2, body=b"x" * (1 << 20)))
        assert outbox.next_sequence() == 2
        assert outbox.unsettled_count() == 1


READS = {
    "fact": lambda outbox: outbox.fact("federation"),
    "counters": lambda outbox: outbox.counters(),
    "next_sequence": lambda outbox: outbox.next_sequence(),
    "residual": lambda outbox: outbox.residual("m"),
    "velocity": lambda outbox: outbox.velocity("m"),
    "held_model": lambda outbox: outbox.held_model(),
    "held_frames": lambda outbox: outbox.held_frames(),
    "to_send": lambda outbox: outbox.to_send(sent_before=1.0, now=1e12),
    "unsettled": lambda outbox: outbox.unsettled("0" * 32),
    "unsettled_count": lambda outbox: outbox.unsettled_count(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_leaves_no_transaction_open(open_here, tmp_path, read):
    with open_here() as outbox:
        add(outbox, update(1))
        read(outbox)
        other = sqlite3.connect(outbox_file(tmp_path, "ann"))
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        other.close()
        add(outbox, update(2))


def test_second_worker_of_a_party_on_one_machine_is_refused(open_here):
    with (
        open_here(),
        pytest.raises(StorageInUseError, match="another worker on this machine already serves party 'ann'"),
        open_here(),
    ):
        pytest.fail("two workers share an outbox")
    with open_here(), open_here(party="bob"):
        pass


def test_folder_of_another_federation_is_refused(open_here):
    with open_here():
        pass
    with pytest.raises(ConfigurationError, match="belongs to federation 'ward', not 'clinic'"), open_here("clinic"):
        pytest.fail("the outbox was opened")


def test_damaged_outbox_is_named_and_left_as_it_is(open_here, tmp_path):
    outbox_file(tmp_path, "ann").write_bytes(b"no database " * 1000)
    with pytest.raises(DamagedError, match=r"outbox-ann\.db is damaged"), open_here():
        pytest.fail("the outbox was opened")
    assert outbox_file(tmp_path, "ann").read_bytes() == b"no database " * 1000
    with pytest.raises(DamagedError, match=r"outbox-ann\.db is damaged"):
        read_counters(tmp_path, "ann")


def test_errors_of_whoever_uses_the_outbox_go_through_unchanged(open_here):
    for error in (TimeoutError("too late"), ConnectionResetError("gone")):
        with pytest.raises(type(error)), open_here():
            raise error


def test_update_that_was_sent_by_a_clock_that_was_ahead_is_sent_again(open_here):
    with open_here() as outbox:
        stored = update(1)
        with outbox.transaction():
            outbox.add(stored)
            outbox.mark_sent(stored.update_id, at=2000.0)
        assert outbox.to_send(sent_before=500.0, now=3000.0) is None
        assert outbox.to_send(sent_before=500.0, now=1000.0).update_id == stored.update_id
