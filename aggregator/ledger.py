"""The append-only record of all that the aggregator decided; everything else is derived from it.

One writer. Whoever calls decides what belongs into one transaction; nothing is visible to others, or survives a crash, before it
commits.
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Select,
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

FORMAT = "2"
"""Of the tables. Format 1 kept whole models as frames, from which no chain of changes can be made."""

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
    Column("base", _Counter),  # the frame that it changes; none for the first
    Column("digest", String(64), nullable=False),  # of what the receivers hold after it
    Column("model_digest", String(64), nullable=False),  # of the model that it was made from
    Column("codec", String(64), nullable=False),  # of the payload
    Column("rounding", String(64)),
    Column("plan", String(64), nullable=False),  # digest of the plan in force; "" where a keyframe of it said another one
    Column("over", Boolean, nullable=False),
    Column("size", _Counter, nullable=False),  # of the body
    Column("log_bytes", _Counter, nullable=False),  # of the bodies of all delta frames up to this one
    Column("keyframe_codec", String(64)),
    Column("keyframe_size", _Counter),  # of the body in the keyframe log, where there is one
    Column("published_at", Float, index=True),
)

BODIES = Table(
    # Beside the frames, so that marking one as published does not write its body again.
    "bodies",
    _TABLES,
    Column("kind", String(8), primary_key=True),  # frame: all of them | keyframe: the newest, and those that wait
    Column("number", _Counter, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
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
    base: int | None
    digest: str
    model_digest: str
    codec: str
    rounding: str | None
    plan: str
    over: bool
    size: int
    log_bytes: int
    """Of the bodies of all delta frames up to this one, its own included."""
    keyframe_codec: str | None = None
    keyframe_size: int | None = None
    published_at: float | None = None
    body: bytes | None = None
    """For the model log. This one and the next are read only where they are asked for."""
    keyframe: bytes | None = None
    """For the keyframe log; None where there is none, or a newer one stands for it."""


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


@dataclass(frozen=True, slots=True)
class FrameTotals:
    """What was published; sizes in bytes, codecs as of the newest."""

    frames: int
    size: int
    """Of the bodies in the model log."""
    keyframes: int
    keyframe_size: int
    codec: str
    keyframe_codec: str


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
        """With its bodies."""
        self._connection.execute(insert(FRAMES), [{column.name: getattr(frame, column.name) for column in FRAMES.c}])
        for kind, body in (("frame", frame.body), ("keyframe", frame.keyframe)):
            if body is not None:
                self._connection.execute(insert(BODIES).values(kind=kind, number=frame.number, body=body))

    def last_frame(self) -> FrameRow | None:
        """Without bodies."""
        return self._frame(select(FRAMES).order_by(FRAMES.c.number.desc()).limit(1))

    def oldest_unpublished(self) -> FrameRow | None:
        """With its bodies. The others wait for it: a receiver can't leave out a change."""
        query = select(FRAMES).where(FRAMES.c.published_at.is_(None)).order_by(FRAMES.c.number).limit(1)
        frame = self._frame(query)
        return None if frame is None else self.with_bodies(frame)

    def frames_from(self, version: int) -> list[FrameRow]:
        """In order, without bodies."""
        query = select(FRAMES).where(FRAMES.c.version >= version).order_by(FRAMES.c.number)
        with self._reading():
            return [FrameRow(**row) for row in self._connection.execute(query).mappings()]

    def with_bodies(self, frame: FrameRow) -> FrameRow:
        query = select(BODIES.c.kind, BODIES.c.body).where(BODIES.c.number == frame.number)
        with self._reading():
            bodies: dict[str, bytes] = {row.kind: row.body for row in self._connection.execute(query)}
        return replace(frame, body=bodies.get("frame"), keyframe=bodies.get("keyframe"))

    def bodies_after(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Of the frames, by number, one at a time."""
        while True:
            later = (BODIES.c.kind == "frame") & (BODIES.c.number > number)
            query = select(BODIES.c.number, BODIES.c.body).where(later).order_by(BODIES.c.number).limit(1)
            with self._reading():
                row = self._connection.execute(query).one_or_none()
            if row is None:
                return
            number = row.number
            yield number, row.body

    def newest_keyframe(self) -> tuple[int, bytes] | None:
        """Its number and body."""
        keyframes = select(BODIES.c.number, BODIES.c.body).where(BODIES.c.kind == "keyframe")
        with self._reading():
            row = self._connection.execute(keyframes.order_by(BODIES.c.number.desc()).limit(1)).one_or_none()
        return None if row is None else (row.number, row.body)

    def add_keyframe(self, number: int, *, codec: str, body: bytes, plan: str) -> None:
        """To a frame that had none. It stands for all earlier ones."""
        facts = {"keyframe_codec": codec, "keyframe_size": len(body), "plan": plan}
        self._connection.execute(update(FRAMES).where(FRAMES.c.number == number).values(facts))
        self._connection.execute(insert(BODIES).values(kind="keyframe", number=number, body=body))
        self._drop_keyframes(before=number)

    def mark_published(self, number: int, *, at: float) -> None:
        """A keyframe that is out stands for all earlier ones."""
        self._connection.execute(update(FRAMES).where(FRAMES.c.number == number).values(published_at=at))
        keyframe = select(BODIES.c.number).where(BODIES.c.kind == "keyframe", BODIES.c.number == number)
        if self._connection.execute(keyframe).first():
            self._drop_keyframes(before=number)

    def _drop_keyframes(self, *, before: int) -> None:
        self._connection.execute(delete(BODIES).where(BODIES.c.kind == "keyframe", BODIES.c.number < before))

    def _frame(self, query: Select[Any]) -> FrameRow | None:
        with self._reading():
            row = self._connection.execute(query).mappings().one_or_none()
        return FrameRow(**row) if row else None

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

    def last_codecs(self) -> dict[str, str]:
        """The codec of each party's newest update that could be read."""
        newest = select(func.max(ENTRIES.c.seq)).where(ENTRIES.c.kind == "update", ENTRIES.c.codec.is_not(None))
        query = select(ENTRIES.c.party, ENTRIES.c.codec).where(ENTRIES.c.seq.in_(newest.group_by(ENTRIES.c.party)))
        with self._reading():
            return {row.party: row.codec for row in self._connection.execute(query)}

    def frame_totals(self) -> FrameTotals:
        published = FRAMES.c.published_at.is_not(None)
        sums = select(
            func.count(),
            func.coalesce(func.sum(FRAMES.c.size), 0),
            func.count(FRAMES.c.keyframe_size),
            func.coalesce(func.sum(FRAMES.c.keyframe_size), 0),
        ).where(published)
        newest = FRAMES.c.number.desc()
        codec = select(FRAMES.c.codec).where(published).order_by(newest).limit(1)
        keyframe_codec = select(FRAMES.c.keyframe_codec).where(published, FRAMES.c.keyframe_codec.is_not(None))
        with self._reading():
            totals = self._connection.execute(sums).one()
            codecs = [
                self._connection.execute(query).scalar_one_or_none() or ""
                for query in (codec, keyframe_codec.order_by(newest).limit(1))
            ]
        return FrameTotals(*totals, *codecs)

    def latest_version(self) -> int:
        with self._reading():
            return int(self._connection.execute(select(func.coalesce(func.max(ENTRIES.c.version), 0))).scalar_one())

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._connection, self.name)


@contextmanager
def open_ledger_for_reading(file: Path) -> Iterator[Ledger]:
    """An SQLite ledger, while its aggregator works or after. Raises ConfigurationError where there is none that it can read."""
    if not file.exists():
        raise ConfigurationError(f"there is no ledger at {file}: name the aggregator's folder by --state")
    engine = open_for_reading(file)
    try:
        with storage_errors(str(file)):
            connection = engine.connect()
        with connection:
            ledger = Ledger(connection, str(file))
            _check_format(ledger)
            yield ledger
    finally:
        engine.dispose()


@contextmanager
def open_ledger(url: str) -> Iterator[Ledger]:
    """Raises ConfigurationError, DamagedError, StorageError. The first opening gives the ledger its id."""
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
                    ledger.set_fact("format", FORMAT)
            _check_format(ledger)
            yield ledger
    finally:
        engine.dispose()


def _check_format(ledger: Ledger) -> None:
    facts = ledger.facts()
    found = facts.get("format", "1")
    if "ledger_id" in facts and found != FORMAT:
        raise ConfigurationError(
            f"{ledger.name} is in format {found}, this broker-fl writes format {FORMAT}: go on with the version that made it, "
            "or name another state folder"
        )
