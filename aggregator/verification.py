"""Whether a ledger tells the truth: every version and every frame from the first on, made again and compared."""

from collections.abc import Iterator
from dataclasses import dataclass

from aggregator.ledger import FrameRow, Ledger, SnapshotRow
from aggregator.recovery import (
    Recovered,
    changed_by,
    check_payload,
    expect_digest,
    first_held,
    manifest_of_ledger,
    merging_at,
    replay,
    snapshot_rows,
)
from aggregator.snapshots import Snapshots, Stored
from broker_fl.codecs.chain import whole_model
from broker_fl.errors import BrokerFLError, DamagedError
from broker_fl.parameters import Vector, digest
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
    model_digest: str


def verify(ledger: Ledger, snapshots: Snapshots) -> Verified:
    """Replays from the first snapshot; raises DamagedError naming the first entry, frame or snapshot that is not as recorded."""
    manifest = manifest_of_ledger(ledger)
    rows = snapshot_rows(ledger)
    first = rows[0]
    state = snapshots.read(Stored(first.file, first.sha256))
    start = Recovered(state, first.seq, merging_at(ledger, first.seq), state.version, first.seq)
    frames = ledger.frames_from(0)
    keyframe = ledger.newest_keyframe()
    pending = _Pending(iter(rows), iter(frames), _Chain(ledger, manifest))
    last = start
    for reached in replay(ledger, snapshots, manifest, start=start):
        pending.check(ledger, snapshots, reached)
        last = reached
    pending.expect_nothing_left(ledger)
    if keyframe is not None:
        _expect_whole(ledger, frames, manifest, number=keyframe[0], body=keyframe[1])
    counts = _count(ledger)
    return Verified(
        entries=sum(counts.values()),
        merged=counts.get("merged", 0),
        buffered=counts.get("buffered", 0),
        refused=counts.get("refused", 0),
        version=last.state.version,
        frames=len(frames),
        snapshots=len(rows),
        model_digest=digest(last.state.model),
    )


class _Chain:
    """What the receivers hold, frame by frame, by decoding alone."""

    def __init__(self, ledger: Ledger, manifest: Manifest) -> None:
        self._ledger = ledger
        self._manifest = manifest
        self._model: Vector | None = None
        self._frames: Iterator[ModelFrame] = iter(())
        self._log_bytes = 0

    def check(self, row: FrameRow, version_model: Vector) -> None:
        """The next frame, which was made from this model."""
        if self._model is None:
            self._model = first_held(row, version_model, manifest=self._manifest)
            frame = self._first(row)
            self._frames = changed_by(self._ledger, self._model, after=row.number, manifest=self._manifest)
        else:
            found = next(self._frames, None)
            if found is None:
                raise DamagedError(f"{self._ledger.name}: frame {row.number} has lost its body; restore it from a backup")
            frame = found
        if frame.number != row.number:
            raise DamagedError(f"{self._ledger.name}: frame {frame.number} has lost its row; restore it from a backup")
        if digest(self._model) != row.digest:
            raise DamagedError(f"{self._ledger.name}: frame {row.number} decodes to another model than its digest says")
        self._expect_as_recorded(frame, row)

    def _first(self, row: FrameRow) -> ModelFrame:
        number, body = next(self._ledger.bodies_after(0), (0, b""))
        if number != row.number:
            raise DamagedError(f"{self._ledger.name}: frame {row.number} has lost its body; restore it from a backup")
        try:
            return wire.decode(ModelFrame, body)
        except BrokerFLError as exc:
            raise DamagedError(f"{self._ledger.name}: the body of frame {row.number} is damaged: {exc}") from exc

    def _expect_as_recorded(self, frame: ModelFrame, row: FrameRow) -> None:
        said = (frame.number, frame.base, frame.version, frame.digest, frame.codec, frame.rounding, frame.over, frame.log_bytes)
        log_bytes = self._log_bytes + len(frame.payload)
        if said != (row.number, row.base, row.version, row.digest, row.codec, row.rounding, row.over, log_bytes):
            raise DamagedError(f"{self._ledger.name}: the body of frame {row.number} says something else than its row")
        self._log_bytes += row.size if row.base is not None else 0
        if row.log_bytes != self._log_bytes:
            raise DamagedError(
                f"{self._ledger.name}: frame {row.number} should count {self._log_bytes} bytes, not {row.log_bytes}"
            )


class _Pending:
    """The snapshots and frames that replay has not reached yet, in order."""

    def __init__(self, snapshots: Iterator[SnapshotRow], frames: Iterator[FrameRow], chain: _Chain) -> None:
        self._snapshots = snapshots
        self._frames = frames
        self._chain = chain
        self._snapshot = next(snapshots, None)
        self._frame = next(frames, None)

    def check(self, ledger: Ledger, snapshots: Snapshots, reached: Recovered) -> None:
        model = reached.state.model
        while self._frame is not None and self._frame.version == reached.state.version:
            expect_digest(ledger, self._frame.version, expected=self._frame.model_digest, model=model)
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
    try:
        model = whole_model(wire.decode(ModelFrame, body), manifest=manifest)
    except BrokerFLError as exc:
        raise DamagedError(f"{ledger.name}: the keyframe of frame {number} is damaged: {exc}") from exc
    # One that came after the frames were listed, while the aggregator works, is not among them.
    if digests.get(number, digest(model)) != digest(model):
        raise DamagedError(f"{ledger.name}: the keyframe of frame {number} decodes to another model than its digest says")


def _count(ledger: Ledger) -> dict[str, int]:
    counts: dict[str, int] = {}
    expected = 1
    for entry in ledger.entries_after(0):
        if entry.seq != expected:
            raise DamagedError(f"{ledger.name}: entry {expected} is missing; restore it from a backup")
        check_payload(ledger, entry)
        counts[entry.outcome or entry.kind] = counts.get(entry.outcome or entry.kind, 0) + 1
        expected += 1
    return counts
