"""Whether a ledger tells the truth: every version from the first on, made again and compared."""

from collections.abc import Iterator
from dataclasses import dataclass

from aggregator.broadcast import received_model
from aggregator.ledger import FrameRow, Ledger, SnapshotRow
from aggregator.recovery import Recovered, check_payload, expect_digest, manifest_of_ledger, merging_at, replay
from aggregator.snapshots import Snapshots, Stored
from broker_fl.errors import DamagedError
from broker_fl.parameters import Vector, digest
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
    rows = ledger.snapshots()
    if not rows:
        raise DamagedError(f"{ledger.name} has lost its snapshots; restore it from a backup")
    first = rows[0]
    state = snapshots.read(Stored(first.file, first.sha256))
    start = Recovered(state, first.seq, merging_at(ledger, first.seq), state.version, first.seq)
    frames = ledger.frames_from(0)
    pending = _Pending(iter(rows), iter(frames))
    last = start
    for reached in replay(ledger, manifest, start=start):
        pending.check(ledger, snapshots, manifest, reached)
        last = reached
    pending.expect_nothing_left(ledger)
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


class _Pending:
    """The snapshots and frames that replay has not reached yet, in order."""

    def __init__(self, snapshots: Iterator[SnapshotRow], frames: Iterator[FrameRow]) -> None:
        self._snapshots = snapshots
        self._frames = frames
        self._snapshot = next(snapshots, None)
        self._frame = next(frames, None)

    def check(self, ledger: Ledger, snapshots: Snapshots, manifest: Manifest, reached: Recovered) -> None:
        model = reached.state.model
        while self._frame is not None and self._frame.version == reached.state.version:
            expect_digest(ledger, self._frame.version, expected=self._frame.model_digest, model=model)
            _expect_received(ledger, self._frame, model, manifest)
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


def _expect_received(ledger: Ledger, frame: FrameRow, model: Vector, manifest: Manifest) -> None:
    received = received_model(model, frame.codec, version=frame.version, manifest=manifest)
    if digest(received) != frame.digest:
        raise DamagedError(f"{ledger.name}: frame {frame.number} decodes to another model than its digest says")


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
