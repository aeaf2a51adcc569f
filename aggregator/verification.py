"""Whether a ledger tells the truth: every entry, version and frame from the first on, made again and compared."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from aggregator.frames import changed_by, held_anew, open_whole, start_of_chain
from aggregator.ledger import Ledger
from aggregator.records import Entry, FrameRow, SnapshotRow
from aggregator.recovery import Recovered, checked_entries, expect_model, manifest_of_ledger, merging_at, replay, snapshot_rows
from aggregator.signatures import Signatures
from aggregator.snapshots import Snapshots, Stored
from broker_fl.errors import BrokerFLError, DamagedError
from broker_fl.parameters import Vector, digest, fingerprint
from schemas import wire
from schemas.frame import ModelFrame
from schemas.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found to be true."""

    entries: int
    merged: int
    buffered: int
    refused: int
    version: int
    frames: int
    snapshots: int
    replayed_from: int
    """The version of the first snapshot; what came before it was dropped, but for its place in the chain."""
    model_digest: str
    chain: str
    """Of the last entry: whoever notes it down can tell later whether anything before it was changed."""
    signed: int
    """Merged and buffered updates, each with the signature of its party's key."""
    unsigned: int
    """Those that came before signatures were asked for, or where none are."""


def verify(ledger: Ledger, snapshots: Snapshots, *, party_keys: Mapping[str, Collection[str]] | None = None) -> Verified:
    """Replays from the first snapshot; raises DamagedError naming the first entry, frame or snapshot that is not as recorded.

    `party_keys`: public keys that came from the parties themselves, with those that were given up. Without, those count that the
    federation's key vouches for.
    """
    manifest = manifest_of_ledger(ledger)
    rows = snapshot_rows(ledger)
    first = rows[0]
    frames = ledger.frames_from(0)
    keyframe = ledger.newest_keyframe()
    counts: Counter[str] = Counter()
    signatures = Signatures(ledger.facts(), name=ledger.name, party_keys=party_keys)
    last: Entry | None = None
    for last in checked_entries(ledger, after=0, upto=first.seq):
        counts[_kind(last)] += 1
        signatures.check(last)
    state = snapshots.read(Stored(first.file, first.sha256))
    start = Recovered(state, first.seq, merging_at(ledger, first.seq), state.version, first.seq)
    chain = _Chain(ledger, manifest, frames, version=state.version)
    pending = _Pending(rows, chain.due, chain)
    reached = start
    for reached in replay(ledger, snapshots, manifest, start=start):
        entry = reached.entry
        if entry is not None:
            counts[_kind(entry)] += 1
            signatures.check(entry)
            pending.check_model(ledger, entry, reached.state.model)
            last = entry
        elif last is not None:
            pending.check_model(ledger, last, reached.state.model)
        pending.check(ledger, snapshots, reached)
    pending.expect_nothing_left(ledger)
    if keyframe is not None:
        _expect_whole(ledger, frames, manifest, number=keyframe[0], body=keyframe[1])
    return Verified(
        entries=counts.total(),
        merged=counts["merged"],
        buffered=counts["buffered"],
        refused=counts["refused"],
        version=reached.state.version,
        frames=len(frames),
        snapshots=len(rows),
        replayed_from=first.version,
        model_digest=digest(reached.state.model),
        chain=last.chain if last is not None else "",
        signed=signatures.signed,
        unsigned=signatures.unsigned,
    )


def _kind(entry: Entry) -> str:
    return entry.outcome or entry.kind


class _Chain:
    """What the receivers hold, frame by frame, by decoding alone."""

    def __init__(self, ledger: Ledger, manifest: Manifest, rows: Sequence[FrameRow], *, version: int) -> None:
        """Of a replay that begins with this version. Compaction may have left older frames, of which nothing but what they make
        can be checked, and frames without bodies before those."""
        self._ledger = ledger
        self._manifest = manifest
        self._rows = rows
        self._first = next(iter(ledger.starts()), 1)
        later = [row for row in rows if row.number >= self._first]
        self.due = [row for row in later if row.version >= version]
        self._passed = {row.number: row for row in later if row.version < version}
        self._model: Vector | None = None
        self._frames: Iterator[ModelFrame] = iter(())
        self._log_bytes = 0

    def check(self, row: FrameRow, version_model: Vector) -> None:
        """The next frame, which was made from this model."""
        if self._model is None:
            self._begin()
        # Where the chain does not begin with frame 1, compaction took the body of the one that it begins with.
        has_body = row.number != self._first or self._first == 1
        frame = self._next(row) if has_body else None
        held = self._model
        if held is None or digest(held) != row.digest:
            raise DamagedError(f"{self._ledger.name}: frame {row.number} decodes to another model than its digest says")
        if row.base is None and digest(held_anew(row, version_model, manifest=self._manifest)) != row.digest:
            raise DamagedError(f"{self._ledger.name}: frame {row.number} holds another model than that of version {row.version}")
        if frame is not None:
            self._expect_as_recorded(frame, row)

    def _next(self, row: FrameRow) -> ModelFrame:
        frame = self._body_of_first() if row.number == self._first else next(self._frames, None)
        while frame is not None and frame.number in self._passed:
            self._log_bytes = self._passed[frame.number].log_bytes
            frame = next(self._frames, None)
        if frame is None:
            raise DamagedError(f"{self._ledger.name}: frame {row.number} has lost its body; restore it from a backup")
        if frame.number != row.number:
            raise DamagedError(f"{self._ledger.name}: frame {frame.number} has lost its row; restore it from a backup")
        return frame

    def _body_of_first(self) -> ModelFrame | None:
        number, body = next(self._ledger.bodies_after(self._first - 1), (0, b""))
        if number != self._first:
            return None
        try:
            return wire.decode(ModelFrame, body)
        except BrokerFLError as exc:
            raise DamagedError(f"{self._ledger.name}: the body of frame {number} is damaged: {exc}") from exc

    def _begin(self) -> None:
        first = next((row for row in self._rows if row.number == self._first), None)
        if first is None:
            raise DamagedError(f"{self._ledger.name}: frame {self._first} has lost its row; restore it from a backup")
        self._log_bytes = first.log_bytes
        self._model = start_of_chain(self._ledger, self._first, manifest=self._manifest)[1]
        self._frames = changed_by(self._ledger, self._model, after=self._first, manifest=self._manifest)

    def _expect_as_recorded(self, frame: ModelFrame, row: FrameRow) -> None:
        said = (frame.number, frame.base, frame.version, frame.digest, frame.codec, frame.rounding, frame.over)
        if said != (row.number, row.base, row.version, row.digest, row.codec, row.rounding, row.over):
            raise DamagedError(f"{self._ledger.name}: the body of frame {row.number} says something else than its row")
        before, self._log_bytes = self._log_bytes, row.log_bytes
        added = row.log_bytes - before
        if frame.log_bytes != (row.log_bytes if row.base is None else before + len(frame.payload)):
            raise DamagedError(f"{self._ledger.name}: the body of frame {row.number} says something else than its row")
        if row.base is not None and added != row.size:
            raise DamagedError(
                f"{self._ledger.name}: frame {row.number} should count {before + row.size} bytes, not {row.log_bytes}"
            )


class _Pending:
    """The snapshots and frames that replay has not reached yet, in order."""

    def __init__(self, snapshots: Sequence[SnapshotRow], frames: Sequence[FrameRow], chain: _Chain) -> None:
        self._snapshots = iter(snapshots)
        self._frames = iter(frames)
        self._chain = chain
        self._snapshot = next(self._snapshots, None)
        self._frame = next(self._frames, None)
        self._known: tuple[int, str] | None = None

    def check_model(self, ledger: Ledger, entry: Entry, model: Vector) -> None:
        """Of the model after each entry; one that made no version has not changed it."""
        if self._known is None or self._known[0] != entry.version:
            expect_model(ledger, entry, model)
            self._known = (entry.version, entry.model_digest)
        elif self._known[1] != entry.model_digest:
            raise DamagedError(f"{ledger.name}: entry {entry.seq} says another model than the entry before it, and changed none")

    def check(self, ledger: Ledger, snapshots: Snapshots, reached: Recovered) -> None:
        model = reached.state.model
        while self._frame is not None and self._frame.version == reached.state.version:
            if fingerprint(model) != self._frame.model_digest:
                raise DamagedError(f"{ledger.name}: frame {self._frame.number} was made from another model than its version has")
            self._chain.check(self._frame, model)
            self._frame = next(self._frames, None)
        while self._snapshot is not None and self._snapshot.seq == reached.seq:
            stored = snapshots.read(Stored(self._snapshot.file, self._snapshot.sha256))
            if digest(stored.model) != digest(model):
                raise DamagedError(f"{ledger.name}: snapshot {self._snapshot.file} is not of version {reached.state.version}")
            self._snapshot = next(self._snapshots, None)

    def expect_nothing_left(self, ledger: Ledger) -> None:
        if self._frame is not None:
            raise DamagedError(
                f"{ledger.name}: frame {self._frame.number} is of version {self._frame.version}, which replay never made"
            )
        if self._snapshot is not None:
            raise DamagedError(
                f"{ledger.name}: snapshot {self._snapshot.file} is of entry {self._snapshot.seq}, which is missing"
            )


def _expect_whole(ledger: Ledger, frames: list[FrameRow], manifest: Manifest, *, number: int, body: bytes) -> None:
    digests = {frame.number: frame.digest for frame in frames}
    model = open_whole(ledger, number, body, manifest=manifest)[1]
    # One that came after the frames were listed, while the aggregator works, is not among them.
    if digests.get(number, digest(model)) != digest(model):
        raise DamagedError(f"{ledger.name}: the keyframe of frame {number} decodes to another model than its digest says")
