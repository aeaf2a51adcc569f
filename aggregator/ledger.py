"""The append-only record of all that the aggregator decided; everything else is derived from it.

One writer. Whoever calls decides what belongs into one transaction; nothing is visible to others, or survives a crash, before it
commits.
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)

from broker_fl.database import display_name, open_database, open_for_reading, reading, storage_errors, writing
from broker_fl.errors import ConfigurationError

_TABLES = MetaData()
_Counter = BigInteger().with_variant(Integer, "sqlite")

META = Table("meta", _TABLES, Column("key", String(64), primary_key=True), Column("value", String, nullable=False))

ENTRIES = Table(
    "entries",
    _TABLES,
    Column("seq", _Counter, primary_key=True),
    Column("kind", String(16), nullable=False),  # update | flush | merging
    Column("at", Float, nullable=False),
    Column("version", _Counter, nullable=False),  # of the model after this entry
    Column("party", String(64)),
    Column("update_id", String(32)),
    Column("sequence", _Counter),
    Column("base_version", _Counter),
    Column("num_samples", _Counter),
    Column("train_loss", Float),
    Column("codec", String(64)),
    Column("size", _Counter),
    Column("outcome", String(16)),
    Column("reason", String(32)),
    Column("detail", String(1000)),
    Column("staleness", _Counter),
    Column("weight", Float),
    Column("payload_digest", String(64)),
    Column("payload", LargeBinary),  # of what was merged or buffered; settings in JSON for kind = merging
    UniqueConstraint("party", "update_id"),
)

FRAMES = Table(
    "frames",
    _TABLES,
    Column("number", _Counter, primary_key=True),
    Column("at", Float, nullable=False),
    Column("version", _Counter, nullable=False, index=True),
    Column("digest", String(64), nullable=False),  # of what the frame decodes to
    Column("model_digest", String(64), nullable=False),  # of the model that it was made from
    Column("codec", String(64), nullable=False),
    Column("over", Boolean, nullable=False),
    Column("size", _Counter, nullable=False),
    Column("body", LargeBinary),  # of the newest, and of those that wait to be published
    Column("published_at", Float),
)

SNAPSHOTS = Table(
    "snapshots",
    _TABLES,
    Column("seq", _Counter, primary_key=True),  # the last entry that is in it
    Column("version", _Counter, nullable=False),
    Column("file", String, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("at", Float, nullable=False),
)

PARTS = Table(
    "parts",
    _TABLES,
    Column("party", String(64), primary_key=True),
    Column("update_id", String(32), primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("parts", Integer, nullable=False),
    Column("size", _Counter, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("body", LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Entry:
    seq: int
    kind: str
    at: float
    version: int
    party: str | None = None
    update_id: str | None = None
    sequence: int | None = None
    base_version: int | None = None
    num_samples: int | None = None
    train_loss: float | None = None
    codec: str | None = None
    size: int | None = None
    outcome: str | None = None
    reason: str | None = None
    detail: str | None = None
    staleness: int | None = None
    weight: float | None = None
    payload_digest: str | None = None
    payload: bytes | None = None


@dataclass(frozen=True, slots=True)
class FrameRow:
    number: int
    at: float
    version: int
    digest: str
    model_digest: str
    codec: str
    over: bool
    size: int
    body: bytes | None
    published_at: float | None = None


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    seq: int
    version: int
    file: str
    sha256: str
    at: float


@dataclass(frozen=True, slots=True)
class PartRow:
    party: str
    update_id: str
    part: int
    parts: int
    size: int
    sha256: str
    at: float
    body: bytes


@dataclass(frozen=True, slots=True)
class Total:
    """One party's updates of one outcome; `size` in bytes."""

    party: str
    outcome: str
    updates: int
    size: int
    mean_staleness: float
    max_staleness: int


class Ledger:
    """Use inside `open_ledger`."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self.name = name

    def transaction(self) -> AbstractContextManager[None]:
        """All or nothing, on the disk when it returns. Raises StorageFullError, StorageError."""
        return writing(self._connection, self.name)

    def facts(self) -> dict[str, str]:
        """What this ledger is about: its id, federation, manifest."""
        with self._reading():
            return {row.key: row.value for row in self._connection.execute(select(META))}

    def set_fact(self, key: str, value: str) -> None:
        self._connection.execute(delete(META).where(META.c.key == key))
        self._connection.execute(insert(META).values(key=key, value=value))

    def last_seq(self) -> int:
        with self._reading():
            return int(self._connection.execute(select(func.coalesce(func.max(ENTRIES.c.seq), 0))).scalar_one())

    def append(self, entries: Sequence[Entry]) -> None:
        if entries:
            self._connection.execute(insert(ENTRIES), [asdict(entry) for entry in entries])

    def decided(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Entry]:
        """What was decided about these (party, update id), without payloads."""
        wanted = list(keys)
        columns = [column for column in ENTRIES.c if column.name != "payload"]
        query = select(*columns).where(tuple_(ENTRIES.c.party, ENTRIES.c.update_id).in_(wanted))
        with self._reading():
            rows = self._connection.execute(query).mappings().all() if wanted else []
        return {(row["party"], row["update_id"]): Entry(**row) for row in rows}

    def entries_after(self, seq: int, *, batch: int = 256) -> Iterator[Entry]:
        """In order, with payloads."""
        while True:
            query = select(ENTRIES).where(ENTRIES.c.seq > seq).order_by(ENTRIES.c.seq).limit(batch)
            with self._reading():
                rows = self._connection.execute(query).mappings().all()
            yield from (Entry(**row) for row in rows)
            if len(rows) < batch:
                return
            seq = rows[-1]["seq"]

    def strategies(self) -> list[Entry]:
        """The entries that say by which settings the ones after them were merged."""
        query = select(ENTRIES).where(ENTRIES.c.kind == "merging").order_by(ENTRIES.c.seq)
        with self._reading():
            return [Entry(**row) for row in self._connection.execute(query).mappings()]

    def add_frame(self, frame: FrameRow) -> None:
        self._connection.execute(insert(FRAMES), [asdict(frame)])

    def last_frame(self) -> FrameRow | None:
        query = select(FRAMES).order_by(FRAMES.c.number.desc()).limit(1)
        with self._reading():
            row = self._connection.execute(query).mappings().one_or_none()
        return FrameRow(**row) if row else None

    def frames_from(self, version: int) -> list[FrameRow]:
        """In order, without bodies."""
        columns = [column for column in FRAMES.c if column.name != "body"]
        query = select(*columns).where(FRAMES.c.version >= version).order_by(FRAMES.c.number)
        with self._reading():
            return [FrameRow(**row, body=None) for row in self._connection.execute(query).mappings()]

    def frame_body(self, number: int) -> bytes | None:
        with self._reading():
            body: bytes | None = self._connection.execute(select(FRAMES.c.body).where(FRAMES.c.number == number)).scalar_one()
        return body

    def mark_published(self, number: int, *, at: float) -> None:
        """Drops the bodies of the frames before this one: a newer keyframe stands for all of them."""
        self._connection.execute(update(FRAMES).where(FRAMES.c.number == number).values(published_at=at))
        superseded = (FRAMES.c.number < number) & FRAMES.c.body.is_not(None)
        self._connection.execute(update(FRAMES).where(superseded).values(body=None))

    def add_snapshot(self, snapshot: SnapshotRow) -> None:
        self._connection.execute(delete(SNAPSHOTS).where(SNAPSHOTS.c.seq == snapshot.seq))
        self._connection.execute(insert(SNAPSHOTS), [asdict(snapshot)])

    def snapshots(self) -> list[SnapshotRow]:
        with self._reading():
            rows = self._connection.execute(select(SNAPSHOTS).order_by(SNAPSHOTS.c.seq)).mappings().all()
        return [SnapshotRow(**row) for row in rows]

    def add_part(self, part: PartRow) -> None:
        """Once: a part that was sent again changes nothing."""
        same = (PARTS.c.party == part.party) & (PARTS.c.update_id == part.update_id)
        if not self._connection.execute(select(PARTS.c.part).where(same, PARTS.c.part == part.part)).first():
            self._connection.execute(insert(PARTS), [asdict(part)])

    def parts(self, party: str, update_id: str) -> list[PartRow]:
        same = (PARTS.c.party == party) & (PARTS.c.update_id == update_id)
        rows = self._connection.execute(select(PARTS).where(same).order_by(PARTS.c.part)).mappings().all()
        return [PartRow(**row) for row in rows]

    def parts_held(self, party: str, update_id: str) -> int:
        same = (PARTS.c.party == party) & (PARTS.c.update_id == update_id)
        return int(self._connection.execute(select(func.count()).select_from(PARTS).where(same)).scalar_one())

    def half_sent(self, party: str) -> dict[str, dict[int, int]]:
        """Bytes spooled by part, by update id."""
        query = select(PARTS.c.update_id, PARTS.c.part, func.length(PARTS.c.body)).where(PARTS.c.party == party)
        spooled: dict[str, dict[int, int]] = {}
        for update_id, part, size in self._connection.execute(query):
            spooled.setdefault(update_id, {})[part] = size
        return spooled

    def drop_parts(self, party: str, update_id: str) -> None:
        self._connection.execute(delete(PARTS).where((PARTS.c.party == party) & (PARTS.c.update_id == update_id)))

    def expire_parts(self, *, before: float) -> int:
        """Drops updates whose newest part is older; returns how many updates that were."""
        newest = select(PARTS.c.party, PARTS.c.update_id).group_by(PARTS.c.party, PARTS.c.update_id)
        stale = self._connection.execute(newest.having(func.max(PARTS.c.at) < before)).all()
        for party, update_id in stale:
            self.drop_parts(party, update_id)
        return len(stale)

    def totals(self) -> list[Total]:
        """By party and outcome."""
        query = (
            select(
                ENTRIES.c.party,
                ENTRIES.c.outcome,
                func.count().label("updates"),
                func.coalesce(func.sum(ENTRIES.c.size), 0).label("size"),
                func.coalesce(func.avg(ENTRIES.c.staleness), 0.0).label("mean_staleness"),
                func.coalesce(func.max(ENTRIES.c.staleness), 0).label("max_staleness"),
            )
            .where(ENTRIES.c.kind == "update")
            .group_by(ENTRIES.c.party, ENTRIES.c.outcome)
            .order_by(ENTRIES.c.party)
        )
        with self._reading():
            return [Total(**row) for row in self._connection.execute(query).mappings()]

    def frame_totals(self) -> tuple[int, int]:
        """Frames and bytes broadcast."""
        query = select(func.count(), func.coalesce(func.sum(FRAMES.c.size), 0)).where(FRAMES.c.published_at.is_not(None))
        with self._reading():
            frames, size = self._connection.execute(query).one()
        return int(frames), int(size)

    def latest_version(self) -> int:
        with self._reading():
            return int(self._connection.execute(select(func.coalesce(func.max(ENTRIES.c.version), 0))).scalar_one())

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._connection, self.name)


@contextmanager
def open_ledger_for_reading(file: Path) -> Iterator[Ledger]:
    """An SQLite ledger, while its aggregator works or after. Raises ConfigurationError where there is none."""
    if not file.exists():
        raise ConfigurationError(f"there is no ledger at {file}: name the aggregator's folder by --state")
    engine = open_for_reading(file)
    try:
        with storage_errors(str(file)):
            connection = engine.connect()
        with connection:
            yield Ledger(connection, str(file))
    finally:
        engine.dispose()


@contextmanager
def open_ledger(url: str) -> Iterator[Ledger]:
    """Raises DamagedError, StorageError. The first opening gives the ledger its id."""
    engine = open_database(url, _TABLES)
    name = display_name(url)
    try:
        # Not around the yield: whoever uses the ledger has errors of the file system of their own.
        with storage_errors(name):
            connection = engine.connect()
        with connection:
            ledger = Ledger(connection, name)
            if "ledger_id" not in ledger.facts():
                with ledger.transaction():
                    ledger.set_fact("ledger_id", uuid.uuid4().hex)
            yield ledger
    finally:
        engine.dispose()
