"""Opening the databases of the two stores (ledger and outbox), and their errors as ours."""

import errno
import fcntl
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import StaticPool

from broker_fl.errors import (
    ConfigurationError,
    DamagedError,
    StorageError,
    StorageFullError,
    StorageInUseError,
    StorageUnavailableError,
)

_BUSY_TIMEOUT_S = 30
_CREATIONS, _CREATION_PAUSE_S = 50, 0.1
_CONNECT_TIMEOUT_S = 10
_IDLE_TRANSACTION_MS = 60_000
"""PostgreSQL ends a transaction whose client fell silent in the middle, as a frozen process does, and lets go of its locks. A
leader that merges large updates is silent for seconds."""

_LOCK_WAIT_S = 3
_LOCK_NOT_AVAILABLE = "55P03"

_GONE = ("08", "57P")
"""SQLSTATE classes: the connection failed; an administrator or a crash ended it, or the server is starting."""
_NO_ROOM = "53100"
_DAMAGED = ("22", "23", "XX")
"""Data that cannot be, constraints that do not hold, files that are broken; the others are of rights, settings and limits."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sqlite_url(file: Path) -> str:
    return URL.create("sqlite", database=str(file)).render_as_string()


def open_database(url: str, tables: MetaData) -> Engine:
    """An engine with one connection, the tables made where they are missing. SQLite: write-ahead log, fsync at every commit.

    Raises ConfigurationError for a URL that is none or whose driver is not installed, StorageError.
    """
    with _driver(url):
        engine = _sqlite(url) if is_sqlite(url) else _server(url)
    try:
        with storage_errors(display_name(url)):
            _make_tables(engine, tables)
            if is_sqlite(url):
                _check_sqlite(engine, url)
    except StorageError:
        engine.dispose()
        raise
    return engine


def _make_tables(engine: Engine, tables: MetaData) -> None:
    """Two processes may do it at the same moment: each table is a transaction of its own, SQLite's switch to its log waits for
    nobody, and PostgreSQL finds two tables of one name only when the second one is there."""
    for _ in range(_CREATIONS):
        try:
            tables.create_all(engine)
        except DatabaseError as exc:
            if not any(sign in str(exc.orig) for sign in ("already exists", "locked", "pg_type_typname_nsp_index")):
                raise
            time.sleep(_CREATION_PAUSE_S)
        else:
            return
    tables.create_all(engine)


def attach(connection: Connection, name: str, file: Path, tables: MetaData) -> None:
    """A second SQLite file under the schema of these tables, which are made where they are missing: from now on one transaction
    may write to both, and all of it is there afterwards or nothing.

    Both leave the write-ahead log, since SQLite commits to several files as one only with rollback journals, and sync the folder
    too, so that a commit survives a power cut. Not within a transaction. Raises StorageError, DamagedError.
    """
    schema = tables.schema
    make_folder(file.parent)
    with storage_errors(f"{name} with {file}"):
        connection.exec_driver_sql(f"ATTACH DATABASE ? AS {schema}", (str(file),))
        verdict = connection.exec_driver_sql(f"PRAGMA {schema}.quick_check(1)").scalar_one()
        if verdict != "ok":
            raise DamagedError(f"{file} is damaged ({' '.join(str(verdict).split())}): restore it from a backup")
        for database in ("main", str(schema)):
            _leave_log(connection, database)
        connection.rollback()
    with writing_alone(connection, str(file)):
        tables.create_all(connection)


@contextmanager
def attached_for_reading(file: Path, tables: MetaData) -> Iterator[Connection]:
    """The file under the schema of these tables, and nothing else; nothing of it is changed. Raises StorageError."""
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(":memory:", uri=True), poolclass=StaticPool)
    try:
        with engine.connect() as connection:
            with storage_errors(str(file)):
                address = f"file:{quote(str(file.absolute()))}?mode=ro"
                connection.exec_driver_sql(f"ATTACH DATABASE ? AS {tables.schema}", (address,))
                connection.rollback()
            yield connection
    finally:
        engine.dispose()


@contextmanager
def writing_alone(connection: Connection, name: str) -> Iterator[None]:
    """As `writing`; of SQLite, others that want to write wait from the beginning, and not from the first write."""
    with writing(connection, name):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield


def _leave_log(connection: Connection, database: str) -> None:
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    # Not while another process reads it, and SQLite does not wait here.
    while True:
        try:
            mode = connection.exec_driver_sql(f"PRAGMA {database}.journal_mode = DELETE").scalar_one()
        except OperationalError:
            mode = ""
            if time.monotonic() > deadline:
                raise
        if mode in ("delete", "memory"):
            break
        if time.monotonic() > deadline:
            raise StorageInUseError(f"another process reads {database} for long: its write-ahead log cannot be left")
        time.sleep(_CREATION_PAUSE_S)
    connection.exec_driver_sql(f"PRAGMA {database}.synchronous = EXTRA")


def open_for_reading(url: str) -> Engine:
    """A database that another process may be writing; its tables may not be there yet. SQLite: the file must be there."""
    with _driver(url):
        if not is_sqlite(url):
            return _server(url)
    address = f"file:{quote(make_url(url).database or '')}?mode=ro"
    return create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=StaticPool)


def is_there(url: str) -> bool:
    """Of an SQLite database, whether there is such a file; a server is asked when it is opened."""
    return not is_sqlite(url) or Path(make_url(url).database or "").exists()


def is_sqlite(url: str) -> bool:
    return _parsed(url).get_backend_name() == "sqlite"


def display_name(url: str) -> str:
    """A file's path, or a server's address without its password."""
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        return parsed.database or url
    # The query may hold a password too.
    return parsed.set(query={}).render_as_string()


def _parsed(url: str) -> URL:
    expected = "expected a database URL, as in postgresql+psycopg://user:password@host/database (in a password, @ is %40)"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Its message could show a part of the password.
        raise ConfigurationError(expected) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql") or "@" in (parsed.host or ""):
        raise ConfigurationError(expected)
    return parsed


def _server(url: str) -> Engine:
    arguments = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "options": f"-c idle_in_transaction_session_timeout={_IDLE_TRANSACTION_MS}",
        # Nobody else's, so that `end_session` ends nobody else.
        "application_name": f"broker-fl-{uuid.uuid4().hex}",
    }
    return create_engine(url, poolclass=StaticPool, connect_args=arguments, hide_parameters=True)


@contextmanager
def _driver(url: str) -> Iterator[None]:
    try:
        yield
    except (NoSuchModuleError, ModuleNotFoundError) as exc:
        raise ConfigurationError(
            f"{display_name(url)} needs a driver that is not installed ({exc}): pip install 'broker-fl[postgres]'"
        ) from exc


def _sqlite(url: str) -> Engine:
    engine = create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: object) -> None:
        # Updates and residuals are large: with pages of 4 KiB writing them takes three times as long.
        connection.execute("PRAGMA page_size = 65536")
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
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


def limited_wait(connection: Connection) -> str:
    """In a transaction: whoever holds a lock for long makes it a StorageInUseError. Gives this session's name; none of SQLite."""
    if connection.dialect.name != "postgresql":
        return ""
    connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_WAIT_S}s'"))
    return str(connection.execute(text("SELECT current_setting('application_name')")).scalar_one())


def end_session(connection: Connection, name: str, *, session: str) -> bool:
    """Ends another one's session at the server, with its transaction and its locks; False where there is none to end."""
    if connection.dialect.name != "postgresql" or not session:
        return False
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name AND pid <> pg_backend_pid()"
    with reading(connection, name):
        return any(connection.execute(text(others), {"name": session}).scalars().all())


def give_room_back(connection: Connection, name: str) -> None:
    """SQLite keeps what was deleted as room for more; PostgreSQL sees to that by itself. Raises StorageError."""
    if connection.dialect.name == "sqlite":
        with storage_errors(name):
            # Not within a transaction, which SQLAlchemy would begin.
            cursor = connection.connection.cursor()
            try:
                cursor.execute("VACUUM")
            except sqlite3.Error as exc:
                raise OperationalError("VACUUM", None, exc) from exc


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Errors of the database and of the file system, with the file's name and what to do."""
    try:
        yield
    except (OperationalError, InterfaceError) as exc:
        raise _ours(what, exc) from exc
    except DatabaseError as exc:
        if exc.connection_invalidated:
            raise _gone(what, exc) from exc
        state = getattr(exc.orig, "sqlstate", None)
        if state is not None and not state.startswith(_DAMAGED):
            raise StorageError(f"{what} cannot be used: {' '.join(str(exc.orig).split())}") from exc
        raise DamagedError(f"{what} is damaged ({exc.orig}): restore it from a backup; it is left as it is") from exc
    except OSError as exc:
        if exc.errno in _FULL:
            raise StorageFullError(_no_space(what)) from exc
        raise StorageError(f"{what} cannot be used: {exc}") from exc


def _ours(what: str, exc: OperationalError | InterfaceError) -> StorageError:
    reason = " ".join(str(exc.orig).split())
    is_server = not isinstance(exc.orig, sqlite3.Error)
    state = getattr(exc.orig, "sqlstate", None)
    if state == _NO_ROOM or (not is_server and "full" in reason):
        return StorageFullError(_no_space(what))
    if not is_server and "readonly" in reason:
        # A process that was killed in the middle of a commit left a journal, which only a writer takes back.
        return StorageError(f"{what} is readonly here, or was left in the middle of a commit: start its process once")
    if state == _LOCK_NOT_AVAILABLE or (not is_server and "locked" in reason):
        return StorageInUseError(f"another process holds {what}")
    # A server that could not be reached has given no state.
    if is_server and (exc.connection_invalidated or state is None or state.startswith(_GONE)):
        return _gone(what, exc)
    return StorageError(f"{what} cannot be used: {reason}")


def _gone(what: str, exc: DatabaseError | InterfaceError) -> StorageUnavailableError:
    return StorageUnavailableError(f"{what} does not answer: {' '.join(str(exc.orig).split())}")


def _no_space(what: str) -> str:
    return f"no space left for {what}: make room and start again; nothing that was confirmed is lost"


def make_folder(folder: Path) -> None:
    """Raises StorageError."""
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def held_alone(file: Path, *, message: str) -> Iterator[None]:
    """Holds a lock file while inside; the system lets go of it however the process ends. Raises StorageInUseError(message)."""
    make_folder(file.parent)
    with storage_errors(str(file.parent)):
        handle = file.open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StorageInUseError(message) from exc
        yield
