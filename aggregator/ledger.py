"""The append-only record of all that the aggregator decided; everything else is derived from it.

One writer: whoever took the lead last. Whoever calls decides what belongs into one transaction; nothing is visible to others, or
survives a crash, before it commits.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, Select, delete, func, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from aggregator.chain import genesis, link
from aggregator.records import (
    BODIES,
    ENTRIES,
    FRAMES,
    LEAD,
    META,
    PARTS,
    SNAPSHOTS,
    Entry,
    FrameRow,
    FrameTotals,
    Lead,
    PartRow,
    SnapshotRow,
    Total,
)
from broker_fl.database import (
    end_session,
    give_room_back,
    limited_wait,
    reading,
    writing,
)
from broker_fl.errors import DamagedError, FencedError, StorageInUseError

LEAD_ROW = 1
NOISE_KEY = "noise_key"
FEDERATION_KEY = "federation_key"
"""The public key that frames and memberships are signed by."""
_WITHOUT_PAYLOAD = [column for column in ENTRIES.c if column.name != "payload"]
_NUMBERS = [column.name for column in ENTRIES.c if isinstance(column.type, Float)]
_READ_ENTRIES = 256
_READ_BYTES = 32 << 20


class Ledger:
    """Use inside `open_ledger`."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._epoch: int | None = None
        self._locks_rows = connection.dialect.name != "sqlite"
        self.name = name

    @contextmanager
    def transaction(self, *, led_in: int | None = None) -> Iterator[None]:
        """All or nothing, on the disk when it returns.

        Raises StorageFullError, StorageError, and FencedError if somebody took the lead since we did, or for one who does not
        lead, since the epoch `led_in`: then nothing is written.
        """
        epoch = self._epoch if led_in is None else led_in
        try:
            with writing(self._connection, self.name):
                if self._locks_rows:
                    self._confirm_lead(epoch)
                yield
                if not self._locks_rows:
                    self._confirm_lead(epoch)
        except DamagedError as exc:
            # Whoever leads now has written what we would have.
            if isinstance(exc.__cause__, IntegrityError) and self._epoch is not None and not self.is_leading():
                raise self._fenced() from exc
            raise

    def _confirm_lead(self, epoch: int | None) -> None:
        """In the transaction: from here to its end nobody can take the lead.

        PostgreSQL locks the row, so this comes first: whoever takes over waits for that row alone, and knows whom to end if it
        waits in vain. SQLite locks everything with the first write, so this comes last, when there is little left to do.
        """
        if epoch is None:
            return
        same = update(LEAD).where(LEAD.c.id == LEAD_ROW, LEAD.c.epoch == epoch).values(epoch=epoch)
        if not self._connection.execute(same).rowcount:
            raise self._fenced()

    def _fenced(self) -> FencedError:
        lead = self.lead()
        return FencedError(f"{self.name} is led by {lead.holder if lead else 'nobody'} now: nothing more is written here")

    def take_lead(self, holder: str, *, at: float, is_brief: bool = False) -> None:
        """From now on nobody who led before can write. What they committed is there.

        At a database server, a leader that was frozen in the middle of a commit is ended there. Of SQLite it keeps the lock:
        raises StorageInUseError.
        """
        facts = {"holder": holder, "at": at, "let_go": False, "is_brief": is_brief}
        try:
            self._take_lead(facts)
        except StorageInUseError:
            with self._reading():
                before = self._connection.execute(select(LEAD.c.session).where(LEAD.c.id == LEAD_ROW)).scalar_one()
            if not end_session(self._connection, self.name, session=before):
                raise
            self._take_lead(facts)

    def _take_lead(self, facts: dict[str, object]) -> None:
        with writing(self._connection, self.name):
            session = limited_wait(self._connection)
            same = update(LEAD).where(LEAD.c.id == LEAD_ROW)
            self._connection.execute(same.values(epoch=LEAD.c.epoch + 1, session=session, **facts))
            epoch = self._connection.execute(select(LEAD.c.epoch).where(LEAD.c.id == LEAD_ROW)).scalar_one()
        self._epoch = int(epoch)

    def let_go(self) -> None:
        """In order: it is known from now on that nobody is at work. Where somebody took the lead meanwhile, that stays."""
        if self._epoch is not None:
            with writing(self._connection, self.name):
                same = update(LEAD).where(LEAD.c.id == LEAD_ROW, LEAD.c.epoch == self._epoch)
                self._connection.execute(same.values(let_go=True))

    def lead(self) -> Lead | None:
        """Who led last; None before the first."""
        with self._reading():
            columns = (LEAD.c.epoch, LEAD.c.holder, LEAD.c.at, LEAD.c.let_go, LEAD.c.is_brief)
            row = self._connection.execute(select(*columns).where(LEAD.c.epoch > 0)).one_or_none()
        return None if row is None else Lead(*row)

    def is_leading(self) -> bool:
        """Whether we took the lead, did not let go, and nobody took it since."""
        lead = self.lead()
        return lead is not None and lead.epoch == self._epoch and not lead.let_go

    def expect_lead(self) -> None:
        """Raises FencedError if we do not lead any more."""
        if not self.is_leading():
            raise self._fenced()

    @property
    def epoch(self) -> int:
        """Under which we lead, or led last; 0 before that."""
        return self._epoch or 0

    def facts(self) -> dict[str, str]:
        """What this ledger is about: its id, federation, manifest. Not its key, which is for nobody to show."""
        with self._reading():
            return {row.key: row.value for row in self._connection.execute(select(META).where(META.c.key != NOISE_KEY))}

    def noise_key(self) -> bytes:
        """From which the noise of each version follows. Raises DamagedError."""
        with self._reading():
            key = self._connection.execute(select(META.c.value).where(META.c.key == NOISE_KEY)).scalar_one_or_none()
        if key is None or re.fullmatch(r"[0-9a-f]{64}", key) is None:
            raise DamagedError(f"{self.name} has lost its noise key; restore it from a backup")
        return bytes.fromhex(key)

    def set_fact(self, key: str, value: str) -> None:
        self._connection.execute(delete(META).where(META.c.key == key))
        self._connection.execute(insert(META).values(key=key, value=value))

    def last_seq(self) -> int:
        with self._reading():
            return int(self._connection.execute(select(func.coalesce(func.max(ENTRIES.c.seq), 0))).scalar_one())

    def append(self, entries: Sequence[Entry]) -> None:
        """At the end of the chain."""
        if not entries:
            return
        chain, rows = self.chain_after(entries[0].seq - 1), []
        for entry in map(_storable, entries):
            chain = link(chain, entry)
            rows.append({**asdict(entry), "chain": chain})
        self._connection.execute(insert(ENTRIES), rows)

    def chain_after(self, seq: int) -> str:
        """What the entry after this one goes on from; 0 is the beginning. Raises DamagedError if there is no such entry."""
        if seq == 0:
            facts = self.facts()
            return genesis(ledger=facts["ledger_id"], federation=facts["federation"], manifest=facts["manifest"])
        with self._reading():
            chain = self._connection.execute(select(ENTRIES.c.chain).where(ENTRIES.c.seq == seq)).scalar_one_or_none()
        if chain is None:
            raise DamagedError(f"{self.name}: entry {seq} is missing; restore it from a backup")
        return str(chain)

    def decided(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Entry]:
        """What was decided about these (party, update id), without payloads."""
        wanted = list(keys)
        query = select(*_WITHOUT_PAYLOAD).where(tuple_(ENTRIES.c.party, ENTRIES.c.update_id).in_(wanted))
        with self._reading():
            rows = self._connection.execute(query).mappings().all() if wanted else []
        return {(row["party"], row["update_id"]): Entry(**row) for row in rows}

    def entries_after(self, seq: int) -> Iterator[Entry]:
        """In order, with payloads, of which only so many are in memory at a time as fit `_READ_BYTES`."""
        while last := self._batch_after(seq):
            query = select(ENTRIES).where(ENTRIES.c.seq > seq, ENTRIES.c.seq <= last).order_by(ENTRIES.c.seq)
            with self._reading():
                rows = self._connection.execute(query).mappings().all()
            yield from (Entry(**row) for row in rows)
            seq = last

    def entries_without_payloads(self, *, after: int = 0) -> Iterator[Entry]:
        """Of those after this one, in order, some at a time."""
        seq = after
        while True:
            query = select(*_WITHOUT_PAYLOAD).where(ENTRIES.c.seq > seq).order_by(ENTRIES.c.seq).limit(_READ_ENTRIES)
            with self._reading():
                rows = self._connection.execute(query).mappings().all()
            if not rows:
                return
            yield from (Entry(**row) for row in rows)
            seq = rows[-1]["seq"]

    def _batch_after(self, seq: int) -> int | None:
        """The last entry of those that are read together; None if there are no more."""
        sizes = select(ENTRIES.c.seq, func.coalesce(func.length(ENTRIES.c.payload), 0))
        with self._reading():
            found = self._connection.execute(sizes.where(ENTRIES.c.seq > seq).order_by(ENTRIES.c.seq).limit(_READ_ENTRIES)).all()
        last, total = None, 0
        for number, size in found:
            total += size
            if last is not None and total > _READ_BYTES:
                break
            last = int(number)
        return last

    def spent_by_party(self) -> dict[str, dict[tuple[float, float], int]]:
        """Steps by (noise multiplier, sample rate) of all updates that said so, merged or refused: they were all sent."""
        # Counted here and not there: nobody's claims are to overflow the database's integers.
        kind = (ENTRIES.c.party, ENTRIES.c.noise_multiplier, ENTRIES.c.sample_rate, ENTRIES.c.num_steps)
        query = select(*kind, func.count()).where(ENTRIES.c.noise_multiplier.is_not(None)).group_by(*kind)
        spent: dict[str, dict[tuple[float, float], int]] = {}
        with self._reading():
            for party, noise, rate, steps, updates in self._connection.execute(query):
                history = spent.setdefault(party, {})
                history[noise, rate] = history.get((noise, rate), 0) + steps * updates
        return spent

    def entries_of(self, kind: str) -> list[Entry]:
        """In order, with payloads: `merging` say by which settings the ones after them were merged, `rollback` which versions
        count no more, `party` what is known of parties, `suspension` whom this ledger shut out."""
        query = select(ENTRIES).where(ENTRIES.c.kind == kind).order_by(ENTRIES.c.seq)
        with self._reading():
            return [Entry(**row) for row in self._connection.execute(query).mappings()]

    def last_entry(self, *, upto: int | None = None) -> Entry | None:
        """Without its payload; of those up to this one, where others may be written meanwhile."""
        query = select(*_WITHOUT_PAYLOAD).order_by(ENTRIES.c.seq.desc()).limit(1)
        if upto is not None:
            query = query.where(ENTRIES.c.seq <= upto)
        with self._reading():
            row = self._connection.execute(query).mappings().one_or_none()
        return None if row is None else Entry(**row)

    def first_merged(self, party: str) -> Entry | None:
        """The party's first update that went into the model, without its payload."""
        merged = (ENTRIES.c.party == party) & (ENTRIES.c.outcome.in_(("merged", "buffered")))
        with self._reading():
            row = (
                self._connection.execute(select(*_WITHOUT_PAYLOAD).where(merged).order_by(ENTRIES.c.seq).limit(1))
                .mappings()
                .one_or_none()
            )
        return None if row is None else Entry(**row)

    def parties(self) -> list[str]:
        """Those who ever sent an update, in alphabetical order."""
        query = select(ENTRIES.c.party).where(ENTRIES.c.kind == "update").distinct().order_by(ENTRIES.c.party)
        with self._reading():
            return list(self._connection.execute(query).scalars())

    def payload_bytes(self, *, upto: int) -> tuple[int, int]:
        """How many entries up to this one have a payload that compaction may drop, and their bytes."""
        query = select(func.count(), func.coalesce(func.sum(func.length(ENTRIES.c.payload)), 0)).where(_droppable(upto))
        with self._reading():
            count, size = self._connection.execute(query).one()
        return int(count), int(size)

    def drop_payloads(self, *, upto: int) -> None:
        """Of the updates up to this entry; their digests stay. Settings stay too: they are small, and say how to go on."""
        self._connection.execute(update(ENTRIES).where(_droppable(upto)).values(payload=None))

    def add_frame(self, frame: FrameRow) -> None:
        """With its bodies. The keyframe of a frame without a base is also what the frames after it go on from."""
        self._connection.execute(insert(FRAMES), [{column.name: getattr(frame, column.name) for column in FRAMES.c}])
        start = frame.keyframe if frame.base is None else None
        for kind, body in (("frame", frame.body), ("keyframe", frame.keyframe), ("start", start)):
            if body is not None:
                self._connection.execute(insert(BODIES).values(kind=kind, number=frame.number, body=body))

    def starts(self) -> list[int]:
        """The numbers of the frames that the chain of changes can begin with, in order."""
        query = select(BODIES.c.number).where(BODIES.c.kind == "start").order_by(BODIES.c.number)
        with self._reading():
            return [int(number) for number in self._connection.execute(query).scalars()]

    def start(self, number: int) -> bytes | None:
        """The whole model that this frame left behind, as a keyframe."""
        query = select(BODIES.c.body).where(BODIES.c.kind == "start", BODIES.c.number == number)
        with self._reading():
            body: bytes | None = self._connection.execute(query).scalar_one_or_none()
        return body

    def drop_bodies(self, *, upto: int, start: bytes) -> int:
        """Of the frames up to this number, whose model `start` holds from now on; gives how many that were. Keyframes that wait
        stay."""
        old = BODIES.c.number <= upto
        frames = self._connection.execute(delete(BODIES).where(BODIES.c.kind == "frame", old)).rowcount
        self._connection.execute(delete(BODIES).where(BODIES.c.kind == "start", old))
        self._connection.execute(insert(BODIES).values(kind="start", number=upto, body=start))
        return int(frames)

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
        """The number and body of the newest whole model, be it for the receivers or left by compaction."""
        keyframes = select(BODIES.c.number, BODIES.c.body).where(BODIES.c.kind.in_(("keyframe", "start")))
        with self._reading():
            # Of one number, what is published.
            newest = keyframes.order_by(BODIES.c.number.desc(), BODIES.c.kind).limit(1)
            row = self._connection.execute(newest).one_or_none()
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

    def drop_snapshots(self, *, before: int) -> None:
        """The rows of those that are of earlier entries; the files are left."""
        self._connection.execute(delete(SNAPSHOTS).where(SNAPSHOTS.c.seq < before))

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

    def parts_of(self, party: str) -> int:
        """How many parts of half-sent updates there are."""
        with self._reading():
            return int(
                self._connection.execute(select(func.count()).select_from(PARTS).where(PARTS.c.party == party)).scalar_one()
            )

    def drop_parts(self, party: str, update_id: str) -> None:
        self._connection.execute(delete(PARTS).where((PARTS.c.party == party) & (PARTS.c.update_id == update_id)))

    def expire_parts(self, *, before: float, after: float) -> int:
        """Drops updates whose newest part is older, or of a time that is still to come; returns how many updates that were."""
        newest = select(PARTS.c.party, PARTS.c.update_id).group_by(PARTS.c.party, PARTS.c.update_id)
        last = func.max(PARTS.c.at)
        stale = self._connection.execute(newest.having((last < before) | (last > after))).all()
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
            rows = self._connection.execute(query).all()
        # PostgreSQL adds integers up to decimals.
        return [
            Total(row.party, row.outcome, row.updates, int(row.size), float(row.mean_staleness), row.max_staleness)
            for row in rows
        ]

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
            frames, size, keyframes, keyframe_size = (int(value) for value in self._connection.execute(sums).one())
            codecs = [
                self._connection.execute(query).scalar_one_or_none() or ""
                for query in (codec, keyframe_codec.order_by(newest).limit(1))
            ]
        return FrameTotals(frames, size, keyframes, keyframe_size, *codecs)

    def give_room_back(self) -> None:
        """What was dropped takes no room on the disk any more. Takes as long as copying what is left."""
        give_room_back(self._connection, self.name)

    def latest_version(self) -> int:
        with self._reading():
            return int(self._connection.execute(select(func.coalesce(func.max(ENTRIES.c.version), 0))).scalar_one())

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._connection, self.name)


def _storable(entry: Entry) -> Entry:
    """SQLite keeps -0.0 as 0: the chain must not hold what cannot be read again."""
    zeros: dict[str, Any] = {name: 0.0 for name in _NUMBERS if getattr(entry, name) == 0}
    return replace(entry, **zeros) if zeros else entry


def _droppable(upto: int) -> ColumnElement[bool]:
    return (ENTRIES.c.seq <= upto) & (ENTRIES.c.kind == "update") & ENTRIES.c.payload.is_not(None)
