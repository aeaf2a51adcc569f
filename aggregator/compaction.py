"""Dropping what is only needed to make old versions again: payloads, bodies of frames, snapshots. The chain stays whole.

What is left replays from the oldest snapshot that is kept. Each entry stays, with the digests of what was dropped, so that an
update that comes again after months is still known, and whoever kept a copy can prove what was in it.
"""

from dataclasses import dataclass, replace

from aggregator.ledger import Ledger
from aggregator.records import FrameRow, SnapshotRow
from aggregator.recovery import changed_by, manifest_of_ledger, snapshot_rows, start_of_chain
from aggregator.snapshots import Snapshots, Stored
from broker_fl.codecs.chain import rounded
from broker_fl.errors import DamagedError, StorageInUseError
from broker_fl.parameters import digest
from schemas import wire
from schemas.frame import ModelFrame
from schemas.manifest import Manifest

_EXACT = "float32"


@dataclass(frozen=True, slots=True)
class Compacted:
    payloads: int
    payload_bytes: int
    frames: int
    snapshots: int
    replays_from: int
    """The oldest version that can be made again."""
    room_is_back: bool
    """Else an aggregator was writing all the while: what was dropped is room for new entries, and the file has its size."""


def compact(ledger: Ledger, snapshots: Snapshots, *, keep: int) -> Compacted:
    """Keeps at least the payloads of the newest `keep` entries. An aggregator may be at work.

    Raises DamagedError if the snapshot that replay would begin with cannot be read: then nothing is dropped.
    """
    rows = snapshot_rows(ledger)
    before = [row for row in rows if row.seq <= ledger.last_seq() - keep]
    horizon = before[-1] if before else rows[0]
    # Nothing goes before what takes its place was seen to be whole.
    snapshots.read(Stored(horizon.file, horizon.sha256))
    payloads, size = ledger.payload_bytes(upto=horizon.seq)
    gone = before[:-1]
    start = _start(ledger, horizon)
    frames = 0 if start is None else start.number - next(iter(ledger.starts()), 1)
    with ledger.transaction():
        ledger.drop_payloads(upto=horizon.seq)
        ledger.drop_snapshots(before=horizon.seq)
        if start is not None:
            ledger.drop_bodies(upto=start.number, start=start.body or b"")
    for row in gone:
        snapshots.remove(row.file)
    return Compacted(payloads, size, frames, len(gone), horizon.version, room_is_back=_give_room_back(ledger))


def _give_room_back(ledger: Ledger) -> bool:
    try:
        ledger.give_room_back()
    except StorageInUseError:
        return False
    return True


def _start(ledger: Ledger, horizon: SnapshotRow) -> FrameRow | None:
    """The last frame of the snapshot's version or an earlier one, with what the receivers hold after it as its body; None if the
    chain of changes begins there already."""
    manifest = manifest_of_ledger(ledger)
    frames = [frame for frame in ledger.frames_from(0) if frame.version <= horizon.version and frame.published_at is not None]
    first = ledger.starts()
    if not frames or not first or frames[-1].number <= first[0]:
        return None
    last = frames[-1]
    return replace(last, body=_whole(ledger, last, first=max(n for n in first if n <= last.number), manifest=manifest))


def _whole(ledger: Ledger, row: FrameRow, *, first: int, manifest: Manifest) -> bytes:
    start, model = start_of_chain(ledger, first, manifest=manifest)
    frame: ModelFrame = start
    rules = start.plan
    for frame in changed_by(ledger, model, after=first, manifest=manifest):
        rules = frame.plan or rules
        if frame.number == row.number:
            break
    if digest(model) != row.digest or frame.number != row.number:
        raise DamagedError(f"{ledger.name}: frame {row.number} decodes to another model than its digest says")
    facts = {
        "base": None,
        "manifest": manifest,
        "plan": rules,
        "codec": _EXACT,
        "payload": rounded(model, _EXACT, manifest=manifest)[0],
    }
    return wire.encode(frame.model_copy(update=facts))
