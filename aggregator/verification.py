"""Whether a ledger tells the truth: every version from the first on, made again and compared."""

from collections.abc import Iterator
from dataclasses import dataclass

from aggregator.admission import payload_digest
from aggregator.ledger import Entry, FrameRow, Ledger, SnapshotRow
from aggregator.recovery import Recovered, expect_digest, manifest_of_ledger, merging_at, replay
from aggregator.snapshots import Snapshots, Stored
from broker_fl.errors import DamagedError
from broker_fl.parameters import digest


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
        pending.check(ledger, snapshots, reached)
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

    def check(self, ledger: Ledger, snapshots: Snapshots, reached: Recovered) -> None:
        model = reached.state.model
        while self._frame is not None and self._frame.version == reached.state.version:
            expect_digest(ledger, self._frame.version, expected=self._frame.model_digest, model=model)
            self._frame = next(self._frames, None)
        while self._snapshot is not None and self._snapshot.seq == reached.seq:
            stored = snapshots.read(Stored(self._snapshot.file, self._snapshot.sha256))
            expect_digest(ledger, stored.version, expected=digest(stored.model), model=model)
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


def _count(ledger: Ledger) -> dict[str, int]:
    counts: dict[str, int] = {}
    expected = 1
    for entry in ledger.entries_after(0):
        if entry.seq != expected:
            raise DamagedError(f"{ledger.name}: entry {expected} is missing; restore it from a backup")
        _check_payload(ledger, entry)
        counts[entry.outcome or entry.kind] = counts.get(entry.outcome or entry.kind, 0) + 1
        expected += 1
    return counts


def _check_payload(ledger: Ledger, entry: Entry) -> None:
    if entry.payload_digest is not None and payload_digest(entry.payload or b"") != entry.payload_digest:
        raise DamagedError(f"{ledger.name}: the payload of entry {entry.seq} differs from its digest; restore it from a backup")
