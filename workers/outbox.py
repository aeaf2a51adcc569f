"""A party's own record, in SQLite: updates that are not settled, the residual, sequence numbers, counters, the model it holds.

An update and the residual that it leaves behind are one transaction: after a crash either both are there or neither is.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)

from broker_fl.database import held_alone, open_database, open_for_reading, reading, sqlite_url, storage_errors, writing
from broker_fl.errors import ConfigurationError
from broker_fl.parameters import Vector
from workers.spending import Spending

_TABLES = MetaData()
_FACTS = Table("facts", _TABLES, Column("key", String, primary_key=True), Column("value", String, nullable=False))
_COUNTERS = Table("counters", _TABLES, Column("name", String, primary_key=True), Column("value", Integer, nullable=False))
_RESIDUAL = Table(
    "residual", _TABLES, Column("manifest", String, primary_key=True), Column("vector", LargeBinary, nullable=False)
)
_VELOCITY = Table(
    "velocity", _TABLES, Column("manifest", String, primary_key=True), Column("vector", LargeBinary, nullable=False)
)
_HELD = Table(
    "held_model",
    _TABLES,
    Column("manifest", String, primary_key=True),
    Column("ledger", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("over", Boolean, nullable=False),
    Column("log_bytes", Integer, nullable=False),
    Column("plan", LargeBinary, nullable=False),
    Column("vector", LargeBinary, nullable=False),
)
_HELD_FRAMES = Table(
    "held_frames", _TABLES, Column("position", Integer, primary_key=True), Column("body", LargeBinary, nullable=False)
)
_UPDATES = Table(
    "updates",
    _TABLES,
    Column("sequence", Integer, primary_key=True),
    Column("update_id", String, nullable=False, unique=True),
    Column("body", LargeBinary, nullable=False),
    Column("base_version", Integer, nullable=False),
    Column("codec", String, nullable=False),
    Column("sent_at", Float),  # when the broker last confirmed it
)


@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """The very bytes that are sent, however often, until a receipt settles them."""

    sequence: int
    update_id: str
    body: bytes
    base_version: int
    codec: str
    sent_at: float | None = None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model and the facts of the frame that left it behind; `plan` as a message, `vector` as little-endian float32."""

    manifest: str
    ledger: str
    number: int
    version: int
    digest: str
    over: bool
    log_bytes: int
    plan: bytes
    vector: bytes


class Outbox:
    """Use inside `open_outbox`; one thread at a time."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self.name = name

    def transaction(self) -> AbstractContextManager[None]:
        """All or nothing, on the disk when it returns. Raises StorageFullError, StorageError."""
        return writing(self._connection, self.name)

    def attach(self, file: Path) -> Spending:
        """The record of what training cost, in the transactions of this outbox from now on. Raises StorageError, DamagedError."""
        return Spending.attached(self._connection, self.name, file)

    def fact(self, key: str) -> str | None:
        with self._reading():
            value: str | None = self._connection.execute(select(_FACTS.c.value).where(_FACTS.c.key == key)).scalar_one_or_none()
        return value

    def set_fact(self, key: str, value: str) -> None:
        self._connection.execute(delete(_FACTS).where(_FACTS.c.key == key))
        self._connection.execute(insert(_FACTS).values(key=key, value=value))

    def count(self, added: Mapping[str, int]) -> None:
        for name, value in added.items():
            changed = self._connection.execute(
                update(_COUNTERS).where(_COUNTERS.c.name == name).values(value=_COUNTERS.c.value + value)
            )
            if not changed.rowcount:
                self._connection.execute(insert(_COUNTERS).values(name=name, value=value))

    def counters(self) -> dict[str, int]:
        with self._reading():
            return {row.name: row.value for row in self._connection.execute(select(_COUNTERS))}

    def next_sequence(self) -> int:
        return int(self.fact("sequence") or 0) + 1

    def residual(self, manifest: str) -> Vector | None:
        """What earlier updates of this model left out, writable; None if there is none."""
        return self._vector(_RESIDUAL, manifest)

    def set_residual(self, manifest: str, vector: Vector) -> None:
        """Of the one model that the party trains: another model's residual goes."""
        self._set_vector(_RESIDUAL, manifest, vector)

    def velocity(self, manifest: str) -> Vector | None:
        """The momentum of earlier updates of this model (DGC), writable; None if there is none."""
        return self._vector(_VELOCITY, manifest)

    def set_velocity(self, manifest: str, vector: Vector | None) -> None:
        """Of the one model that the party trains, as with the residual; None where the federation wants none."""
        self._set_vector(_VELOCITY, manifest, vector)

    def clear_carried(self) -> None:
        """Residual and velocity, of whichever model."""
        for table in (_RESIDUAL, _VELOCITY):
            self._connection.execute(delete(table))

    def _vector(self, table: Table, manifest: str) -> Vector | None:
        with self._reading():
            stored = self._connection.execute(select(table.c.vector).where(table.c.manifest == manifest)).scalar_one_or_none()
        return None if stored is None else np.frombuffer(stored, dtype="<f4").astype(np.float32)

    def _set_vector(self, table: Table, manifest: str, vector: Vector | None) -> None:
        self._connection.execute(delete(table))
        if vector is not None:
            self._connection.execute(insert(table).values(manifest=manifest, vector=vector.astype("<f4", copy=False).tobytes()))

    def held_model(self) -> StoredModel | None:
        """The last one that was kept whole; `held_frames` are those that changed it since."""
        with self._reading():
            row = self._connection.execute(select(_HELD)).mappings().one_or_none()
        return StoredModel(**row) if row else None

    def held_frames(self) -> list[bytes]:
        with self._reading():
            return list(self._connection.execute(select(_HELD_FRAMES.c.body).order_by(_HELD_FRAMES.c.position)).scalars())

    def set_held_model(self, model: StoredModel | None) -> None:
        """The only one, with no frames yet."""
        self._connection.execute(delete(_HELD_FRAMES))
        self._connection.execute(delete(_HELD))
        if model is not None:
            self._connection.execute(insert(_HELD).values(**asdict(model)))

    def add_held_frame(self, body: bytes) -> None:
        self._connection.execute(insert(_HELD_FRAMES).values(body=body))

    def add(self, stored: StoredUpdate) -> None:
        self.set_fact("sequence", str(stored.sequence))
        self._connection.execute(
            insert(_UPDATES).values(
                sequence=stored.sequence,
                update_id=stored.update_id,
                body=stored.body,
                base_version=stored.base_version,
                codec=stored.codec,
            )
        )

    def to_send(self, *, sent_before: float, now: float) -> StoredUpdate | None:
        """The first one that the broker never confirmed, or confirmed before that time without a receipt since, or by a clock
        that was ahead."""
        due = _UPDATES.c.sent_at.is_(None) | (_UPDATES.c.sent_at < sent_before) | (_UPDATES.c.sent_at > now)
        with self._reading():
            row = (
                self._connection.execute(select(_UPDATES).where(due).order_by(_UPDATES.c.sequence).limit(1))
                .mappings()
                .one_or_none()
            )
        return StoredUpdate(**row) if row else None

    def mark_sent(self, update_id: str, *, at: float) -> None:
        self._connection.execute(update(_UPDATES).where(_UPDATES.c.update_id == update_id).values(sent_at=at))

    def unsettled(self, update_id: str) -> StoredUpdate | None:
        with self._reading():
            row = self._connection.execute(select(_UPDATES).where(_UPDATES.c.update_id == update_id)).mappings().one_or_none()
        return StoredUpdate(**row) if row else None

    def all_unsettled(self) -> list[StoredUpdate]:
        """In order."""
        with self._reading():
            rows = self._connection.execute(select(_UPDATES).order_by(_UPDATES.c.sequence)).mappings().all()
        return [StoredUpdate(**row) for row in rows]

    def unsettled_count(self) -> int:
        with self._reading():
            return int(self._connection.execute(select(func.count()).select_from(_UPDATES)).scalar_one())

    def settle(self, update_id: str) -> None:
        self._connection.execute(delete(_UPDATES).where(_UPDATES.c.update_id == update_id))

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._connection, self.name)


def read_counters(folder: Path, party: str) -> dict[str, int]:
    """While its worker runs or after; empty if it never did."""
    with _for_reading(outbox_file(folder, party)) as outbox:
        return {} if outbox is None else outbox.counters()


def read_unsettled(folder: Path, party: str) -> list[StoredUpdate]:
    """In order, while its worker runs or after; none if it never did."""
    with _for_reading(outbox_file(folder, party)) as outbox:
        return [] if outbox is None else outbox.all_unsettled()


@contextmanager
def _for_reading(file: Path) -> Iterator[Outbox | None]:
    """None where there is none yet, or its tables are being made."""
    if not file.exists():
        yield None
        return
    engine = open_for_reading(sqlite_url(file))
    try:
        with storage_errors(str(file)):
            connection = engine.connect()
        with connection:
            with storage_errors(str(file)):
                is_made = inspect(connection).has_table(_UPDATES.name)
            yield Outbox(connection, str(file)) if is_made else None
    finally:
        engine.dispose()


def outbox_file(folder: Path, party: str) -> Path:
    return folder / f"outbox-{party}.db"


@contextmanager
def open_outbox(folder: Path, *, party: str, federation: str) -> Iterator[Outbox]:
    """Raises StorageInUseError if another worker on this machine serves the party, DamagedError, ConfigurationError if the folder
    is another federation's."""
    file = outbox_file(folder, party)
    busy = f"another worker on this machine already serves party {party!r} ({file})"
    with held_alone(folder / f"outbox-{party}.lock", message=busy):
        engine = open_database(sqlite_url(file), _TABLES)
        try:
            # Not around the yield: whoever uses the outbox has errors of the file system of their own.
            with storage_errors(str(file)):
                connection = engine.connect()
            with connection:
                outbox = Outbox(connection, str(file))
                known = outbox.fact("federation")
                if known is None:
                    with outbox.transaction():
                        outbox.set_fact("federation", federation)
                elif known != federation:
                    raise ConfigurationError(
                        f"{file} belongs to federation {known!r}, not {federation!r}: name another state folder"
                    )
                yield outbox
        finally:
            engine.dispose()
