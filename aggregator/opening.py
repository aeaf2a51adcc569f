"""Opening ledgers: to write, to read, and which of them are none of ours."""

import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, insert, inspect
from sqlalchemy.exc import IntegrityError

from aggregator.ledger import LEAD_ROW, NOISE_KEY, Ledger
from aggregator.merging.noise import KEY_BYTES
from aggregator.records import FORMAT, LEAD, META, TABLES
from broker_fl.database import display_name, is_there, open_database, open_for_reading, reading, storage_errors
from broker_fl.errors import ConfigurationError, DamagedError


@contextmanager
def open_ledger_for_reading(url: str) -> Iterator[Ledger]:
    """While its aggregator works or after. Raises ConfigurationError where there is none that it can read, StorageError."""
    name = display_name(url)
    if not is_there(url):
        raise ConfigurationError(f"there is no ledger at {name}: name the aggregator's folder by --state, or its --ledger")
    engine = open_for_reading(url)
    try:
        with storage_errors(name):
            connection = engine.connect()
        with connection:
            with reading(connection, name):
                is_made = inspect(connection).has_table(META.name)
            if not is_made:
                raise ConfigurationError(
                    f"there is no ledger at {name}: name the aggregator's folder by --state, or its --ledger"
                )
            ledger = Ledger(connection, name)
            _check_format(ledger)
            yield ledger
    finally:
        engine.dispose()


@contextmanager
def open_ledger(url: str, *, may_create: bool = True) -> Iterator[Ledger]:
    """Raises ConfigurationError, DamagedError, StorageError. The first opening gives the ledger its id."""
    if not may_create:
        with open_ledger_for_reading(url):
            pass  # It is there.
    engine = open_database(url, TABLES)
    name = display_name(url)
    try:
        # Not around the yield: whoever uses the ledger has errors of the file system of their own.
        with storage_errors(name):
            connection = engine.connect()
        with connection:
            ledger = Ledger(connection, name)
            if "ledger_id" not in ledger.facts():
                _begin(connection, ledger)
            _check_format(ledger)
            yield ledger
    finally:
        engine.dispose()


def _begin(connection: Connection, ledger: Ledger) -> None:
    """A standby that starts at the same moment may be the one that does it."""
    facts = {"ledger_id": uuid.uuid4().hex, "format": FORMAT, NOISE_KEY: secrets.token_hex(KEY_BYTES)}
    try:
        with ledger.transaction():
            connection.execute(insert(META), [{"key": key, "value": value} for key, value in facts.items()])
            nobody = {"id": LEAD_ROW, "epoch": 0, "holder": "", "at": 0.0, "let_go": True, "is_brief": False, "session": ""}
            connection.execute(insert(LEAD).values(**nobody))
    except DamagedError as exc:
        if not isinstance(exc.__cause__, IntegrityError):
            raise


def _check_format(ledger: Ledger) -> None:
    facts = ledger.facts()
    found = facts.get("format", "1")
    if "ledger_id" in facts and found != FORMAT:
        raise ConfigurationError(
            f"{ledger.name} is in format {found}, this broker-fl writes format {FORMAT}: go on with the version that made it, "
            "or name another state folder"
        )
