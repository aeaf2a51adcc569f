"""Dropping what is only needed to make old versions again: payloads, bodies of frames, snapshots. The chain stays whole.

What is left replays from the oldest snapshot that is kept. Each entry stays, with the digests of what was dropped, so that an
update that comes again after months is still known, and whoever kept a copy can prove what was in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aggregator.broadcast import EXACT
from aggregator.frames import changed_by, start_of_chain
from aggregator.ledger import Ledger
from aggregator.records import FrameRow, SnapshotRow
from aggregator.recovery import begin, manifest_of_ledger, replay, snapshot_rows
from aggregator.snapshots import Snapshots, Stored
from broker_fl.codecs.chain import rounded
from broker_fl.errors import DamagedError, FencedError, StorageInUseError
from broker_fl.parameters import digest
from schemas import wire


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
    """Keeps the payloads of the newest `keep` entries, and a snapshot before them. An aggregator may be at work.

    Nothing is dropped where it raises: DamagedError if that snapshot cannot be made or read, FencedError if an aggregator took
    the lead meanwhile (which removes snapshots that the ledger does not name), or another compaction was faster.
    """
    epoch, rows = _epoch(ledger), snapshot_rows(ledger)
    seq = max(ledger.last_seq() - keep, rows[0].seq)
    horizon = next((row for row in rows if row.seq == seq), None) or _snapshot(ledger, snapshots, seq=seq, epoch=epoch)
    # Nothing goes before what takes its place was seen to be whole.
    snapshots.read(Stored(horizon.file, horizon.sha256))
    payloads, size = ledger.payload_bytes(upto=horizon.seq)
    gone = [row for row in rows if row.seq < horizon.seq]
    start = _start(ledger, horizon)
    with _led_in(ledger, epoch):
        if rows[0] not in ledger.snapshots():
            raise FencedError("another compaction was faster")
        ledger.add_snapshot(horizon)
        ledger.drop_payloads(upto=horizon.seq)
        ledger.drop_snapshots(before=horizon.seq)
        frames = 0 if start is None else ledger.drop_bodies(upto=start[0], start=start[1])
    for row in gone:
        snapshots.remove(row.file)
    return Compacted(payloads, size, frames, len(gone), horizon.version, room_is_back=_give_room_back(ledger))


@contextmanager
def _led_in(ledger: Ledger, epoch: int) -> Iterator[None]:
    try:
        with ledger.transaction(led_in=epoch):
            yield
    except FencedError as exc:
        raise FencedError(f"{ledger.name} changed hands meanwhile, and nothing was dropped: run it again ({exc})") from exc


def _epoch(ledger: Ledger) -> int:
    lead = ledger.lead()
    return 0 if lead is None else lead.epoch


def _snapshot(ledger: Ledger, snapshots: Snapshots, *, seq: int, epoch: int) -> SnapshotRow:
    """Of the state after this entry. The ledger does not name it yet."""
    rows = [row for row in snapshot_rows(ledger) if row.seq < seq]
    steps = replay(ledger, snapshots, manifest_of_ledger(ledger), start=begin(ledger, snapshots, rows))
    reached = next((step for step in steps if step.seq == seq), None)
    if reached is None or reached.entry is None:
        raise DamagedError(f"{ledger.name}: entry {seq} is missing; restore it from a backup")
    stored = snapshots.write(reached.state, seq=seq, ledger=ledger.facts()["ledger_id"], epoch=epoch)
    return SnapshotRow(seq, reached.state.version, stored.file, stored.sha256, reached.entry.at)


def _give_room_back(ledger: Ledger) -> bool:
    try:
        ledger.give_room_back()
    except StorageInUseError:
        return False
    return True


def _start(ledger: Ledger, horizon: SnapshotRow) -> tuple[int, bytes] | None:
    """The number of the last frame that may go, and what the receivers hold after it, as a keyframe; None where none may.

    The newest one stays, since it is announced again, and with it all that wait to be published.
    """
    newest = ledger.last_frame()
    starts = ledger.starts()
    if newest is None or not starts:
        return None
    frames = [frame for frame in ledger.frames_from(0) if starts[0] < frame.number < newest.number]
    old = [frame for frame in frames if frame.version <= horizon.version and frame.published_at is not None]
    if not old:
        return None
    last = old[-1]
    first = max(number for number in starts if number <= last.number)
    body = ledger.start(first) if first == last.number else _whole(ledger, last, first=first)
    return (last.number, body) if body is not None else None


def _whole(ledger: Ledger, row: FrameRow, *, first: int) -> bytes:
    manifest = manifest_of_ledger(ledger)
    frame, model = start_of_chain(ledger, first, manifest=manifest)
    rules = frame.plan
    for frame in changed_by(ledger, model, after=first, manifest=manifest):
        rules = frame.plan or rules
        if frame.number == row.number:
            break
    if digest(model) != row.digest or frame.number != row.number:
        raise DamagedError(f"{ledger.name}: frame {row.number} decodes to another model than its digest says")
    whole = rounded(model, EXACT, manifest=manifest)[0]
    facts = {"base": None, "manifest": manifest, "plan": rules, "codec": EXACT, "payload": whole}
    return wire.encode(frame.model_copy(update=facts))
