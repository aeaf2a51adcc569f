import time

import pytest
from ledger_rows import begun_ledger, entry

from benchmarks.failover import FAILURES, POSTGRESQL, SHORT_HEARTBEAT_S, SQLITE, measure, standstill_s
from broker_fl.database import sqlite_url

FROZEN = f"frozen, heartbeat {SHORT_HEARTBEAT_S} s"


def append(ledger, *entries):
    with ledger.transaction():
        ledger.append(entries)


def test_what_the_old_leader_still_gets_in_is_no_end_of_the_standstill(tmp_path):
    url = sqlite_url(tmp_path / "ledger.db")
    with begun_ledger(url) as ledger:
        ledger.take_lead("the old one", at=1.0)
        append(ledger, entry(1))
        assert standstill_s(url, epoch=ledger.epoch, since=time.monotonic(), within_s=0.05) is None


def test_an_entry_that_is_there_when_the_new_lead_is_seen_is_no_end_of_the_standstill(tmp_path):
    url = sqlite_url(tmp_path / "ledger.db")
    with begun_ledger(url) as ledger:
        ledger.take_lead("the old one", at=1.0)
        old = ledger.epoch
        append(ledger, entry(1))
        ledger.take_lead("the new one", at=2.0)
        assert standstill_s(url, epoch=old, since=time.monotonic(), within_s=0.05) is None


@pytest.mark.system
@pytest.mark.rabbitmq
async def test_standby_on_sqlite_takes_over_from_a_leader_that_is_killed_or_cut_off(rabbitmq):
    failures = {name: FAILURES[name] for name in ("kill -9", "link cut")}
    rows = await measure(rabbitmq, {SQLITE: None}, failures, rounds=1)
    assert [(row.ledger, row.failure, row.rounds, row.held) for row in rows] == [(SQLITE, name, 1, 0) for name in failures]
    assert all(0 < row.median_s == row.longest_s for row in rows)


@pytest.mark.system
@pytest.mark.rabbitmq
async def test_standby_on_postgresql_takes_over_from_a_leader_that_is_frozen(rabbitmq, postgresql_url):
    (row,) = await measure(rabbitmq, {POSTGRESQL: postgresql_url}, {FROZEN: FAILURES[FROZEN]}, rounds=1)
    assert (row.ledger, row.failure, row.rounds) == (POSTGRESQL, FROZEN, 1)
    # Now and then a leader is frozen in the middle of a commit.
    assert row.held + (row.median_s is not None) == 1
