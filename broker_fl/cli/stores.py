"""Where a federation's ledger and snapshots are, by its settings."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aggregator.ledger import Ledger
from aggregator.opening import open_ledger, open_ledger_for_reading
from aggregator.recovery import manifest_of_ledger
from aggregator.snapshots import Snapshots
from broker_fl.config import Settings
from broker_fl.database import sqlite_url
from schemas.manifest import Manifest


def ledger_url(settings: Settings) -> str:
    given = settings.aggregator.ledger
    return sqlite_url(settings.aggregator.state / "ledger.db") if given is None else given.get_secret_value()


def snapshots_of(settings: Settings, manifest: Manifest) -> Snapshots:
    return Snapshots(settings.aggregator.snapshots or str(settings.aggregator.state / "snapshots"), manifest)


@contextmanager
def stores_for_reading(settings: Settings) -> Iterator[tuple[Ledger, Snapshots]]:
    """While an aggregator works or after. Raises ConfigurationError where there is no ledger, DamagedError where it is empty."""
    with open_ledger_for_reading(ledger_url(settings)) as ledger:
        yield ledger, snapshots_of(settings, manifest_of_ledger(ledger))


@contextmanager
def stores_for_writing(settings: Settings) -> Iterator[tuple[Ledger, Snapshots]]:
    """The same, to change something; never makes a ledger."""
    with open_ledger(ledger_url(settings), may_create=False) as ledger:
        yield ledger, snapshots_of(settings, manifest_of_ledger(ledger))


def holder(role: str) -> str:
    """What others read about who leads the ledger."""
    return f"{role} on {socket.gethostname()}, pid {os.getpid()}"
