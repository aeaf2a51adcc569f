"""Opening the databases of the two stores (ledger and outbox), and their errors as ours."""

import errno
import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, make_url, text
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import StaticPool

from broker_fl.errors import DamagedError, StorageError, StorageFullError, StorageInUseError

_BUSY_TIMEOUT_S = 30
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sqlite_url(file: Path) -> str:
    return URL.create("sqlite", database=str(file)).render_as_string()


def open_database(url: str, tables: MetaData) -> Engine:
    """An engine with one connection, the tables made where they are missing. SQLite: write-ahead log, fsync at every commit."""
    is_sqlite = make_url(url).get_backend_name() == "sqlite"
    engine = _sqlite(url) if is_sqlite else create_engine(url, poolclass=StaticPool)
    try:
        with storage_errors(display_name(url)):
            tables.create_all(engine)
            if is_sqlite:
                _check_sqlite(engine, url)
    except StorageError:
        engine.dispose()
        raise
    return engine


def open_for_reading(file: Path) -> Engine:
    """An SQLite file that another process may be writing; its tables may not be there yet."""
    address = f"file:{quote(str(file))}?mode=ro"
    return create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=StaticPool)


def display_name(url: str) -> str:
    """A file's path, or a server's address without its password."""
    parsed = make_url(url)
    return parsed.database or url if parsed.get_backend_name() == "sqlite" else parsed.render_as_string()


def _sqlite(url: str) -> Engine:
    engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        # Updates and residuals are large: with pages of 4 KiB writing them takes three times as long.
        connection.execute("PRAGMA page_size = 65536")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    return engine


def _check_sqlite(engine: Engine, url: str) -> None:
    with engine.connect() as connection:
        verdict = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
    if verdict != "ok":
        # SQLite says it in several lines.
        found = " ".join(str(verdict).split())
        raise DamagedError(f"{display_name(url)} is damaged ({found}): restore it from a backup; it is left as it is")


@contextmanager
def writing(connection: Connection, name: str) -> Iterator[None]:
    """One transaction: all or nothing, on the disk when it returns. Raises StorageFullError, StorageError."""
    with storage_errors(name), connection.begin():
        yield


@contextmanager
def reading(connection: Connection, name: str) -> Iterator[None]:
    """Reads outside of a transaction must not leave one open: a write-ahead log can't shrink below an open read."""
    inside = connection.in_transaction()
    with storage_errors(name):
        try:
            yield
        finally:
            if not inside:
                connection.rollback()


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Errors of the database and of the file system, with the file's name and what to do."""
    try:
        yield
    except OperationalError as exc:
        reason = str(exc.orig)
        if "full" in reason:
            raise StorageFullError(_no_space(what)) from exc
        if "locked" in reason:
            raise StorageInUseError(f"another process holds {what}") from exc
        raise StorageError(f"{what} cannot be used: {reason}") from exc
    except DatabaseError as exc:
        raise DamagedError(f"{what} is damaged ({exc.orig}): restore it from a backup; it is left as it is") from exc
    except OSError as exc:
        if exc.errno in _FULL:
            raise StorageFullError(_no_space(what)) from exc
        raise StorageError(f"{what} cannot be used: {exc}") from exc


def _no_space(what: str) -> str:
    return f"no space left for {what}: make room and start again; nothing that was confirmed is lost"


@contextmanager
def held_alone(file: Path, *, message: str) -> Iterator[None]:
    """Holds a lock file while inside; the system lets go of it however the process ends. Raises StorageInUseError(message)."""
    with storage_errors(str(file.parent)):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StorageInUseError(message) from exc
        yield
