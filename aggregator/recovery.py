"""Version v = a snapshot + the ledger's updates after it; what receivers hold = a keyframe + the frames after it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import structlog

from aggregator.admission import payload_digest
from aggregator.broadcast import Held
from aggregator.ledger import Entry, FrameRow, Ledger, SnapshotRow
from aggregator.merging.fold import Contribution, State, Strategy, remember_base
from aggregator.merging.strategies import build_strategy
from aggregator.snapshots import Snapshots, Stored
from broker_fl.codecs.chain import change, rounded, whole_model
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.config import MergingSettings
from broker_fl.errors import BrokerFLError, DamagedError, DecodeError
from broker_fl.parameters import Vector, digest
from schemas import wire
from schemas.frame import ModelFrame
from schemas.manifest import Manifest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    state: State
    seq: int
    merging: MergingSettings
    snapshot_version: int
    snapshot_seq: int


def recover(ledger: Ledger, snapshots: Snapshots, manifest: Manifest) -> Recovered:
    """From the newest snapshot that can be read.

    Raises DamagedError if there is none, or if the result is not the model that the newest frame was made from.
    """
    last, state = _newest_readable(ledger, snapshots)
    start = Recovered(state, last.seq, merging_at(ledger, last.seq), state.version, last.seq)
    *_, recovered = replay(ledger, snapshots, manifest, start=start)
    frame = ledger.last_frame()
    if frame is not None and frame.version == recovered.state.version:
        expect_digest(ledger, frame.version, expected=frame.model_digest, model=recovered.state.model)
    return recovered


def _newest_readable(ledger: Ledger, snapshots: Snapshots) -> tuple[SnapshotRow, State]:
    """An older one makes the same bits: what came after it is all in the ledger, and replay checks that."""
    newest, *older = reversed(snapshot_rows(ledger))
    found = _read(snapshots, newest)
    if isinstance(found, State):
        return newest, found
    for row in older:
        log.error("the newest snapshot cannot be used, going back to an older one", reason=str(found), older=row.file)
        state = _read(snapshots, row)
        if isinstance(state, State):
            return row, state
    raise found


def _read(snapshots: Snapshots, row: SnapshotRow) -> State | DamagedError:
    try:
        return snapshots.read(Stored(row.file, row.sha256))
    except DamagedError as exc:
        return exc


def recover_held(ledger: Ledger, manifest: Manifest) -> Held | None:
    """What the receivers hold after the newest frame; None before the first. Raises DamagedError."""
    last = ledger.last_frame()
    if last is None:
        return None
    newest = ledger.newest_keyframe()
    if newest is None:
        raise DamagedError(f"{ledger.name} has lost its keyframe; restore it from a backup")
    number, body = newest
    try:
        keyframe = wire.decode(ModelFrame, body)
        model = whole_model(keyframe, manifest=manifest)
    except BrokerFLError as exc:
        raise DamagedError(f"{ledger.name}: the keyframe of frame {number} is damaged: {exc}") from exc
    for frame in changed_by(ledger, model, after=number, manifest=manifest):
        number = frame.number
    if number != last.number or digest(model) != last.digest:
        raise DamagedError(
            f"{ledger.name}: its frames do not give what its frame {last.number} says; `broker-fl ledger verify` names the "
            "first one that is damaged; restore the ledger from a backup"
        )
    return Held(last, model, keyframe.keyframe)


def changed_by(ledger: Ledger, model: Vector, *, after: int, manifest: Manifest) -> Iterator[ModelFrame]:
    """Each frame after that number, when it has changed the model, in place. Raises DamagedError naming the frame."""
    for number, body in ledger.bodies_after(after):
        if number != after + 1:
            raise DamagedError(f"{ledger.name}: frame {after + 1} has lost its body; restore it from a backup")
        try:
            frame = wire.decode(ModelFrame, body)
            if (frame.number, frame.base) != (number, after):
                raise DecodeError(f"it says that it changes frame {frame.base} to {frame.number}")
            change(model, frame, manifest=manifest)
        except BrokerFLError as exc:
            raise DamagedError(f"{ledger.name}: the body of frame {number} is damaged: {exc}") from exc
        after = number
        yield frame


def first_held(first: FrameRow, model: Vector, *, manifest: Manifest) -> Vector:
    """What the receivers hold after the first frame, of the first model; a new vector."""
    return model.copy() if first.rounding is None else rounded(model, first.rounding, manifest=manifest)[1]


def snapshot_rows(ledger: Ledger) -> list[SnapshotRow]:
    rows = ledger.snapshots()
    if not rows:
        raise _lost_snapshots(ledger)
    return rows


def _lost_snapshots(ledger: Ledger) -> DamagedError:
    return DamagedError(f"{ledger.name} has lost its snapshots; restore it from a backup")


def manifest_of_ledger(ledger: Ledger) -> Manifest:
    """The layout of its model, so that a ledger can be read without the task that it began with."""
    facts = ledger.facts()
    if "layout" not in facts:
        raise DamagedError(f"{ledger.name} holds no federation yet")
    return Manifest.model_validate_json(facts["layout"])


def expect_digest(ledger: Ledger, version: int, *, expected: str, model: Vector) -> None:
    if digest(model) != expected:
        raise DamagedError(
            f"{ledger.name}: replaying its updates does not give its version {version}; restore ledger and snapshots "
            "together from a backup"
        )


def merging_at(ledger: Ledger, seq: int) -> MergingSettings:
    """The settings that entries after `seq` were merged by."""
    found: MergingSettings | None = None
    for entry in ledger.strategies():
        if entry.seq <= seq:
            found = MergingSettings.model_validate_json(entry.payload or b"")
    if found is None:
        raise DamagedError(f"{ledger.name}: entry {seq} has no merging settings before it; restore it from a backup")
    return found


def replay(ledger: Ledger, snapshots: Snapshots, manifest: Manifest, *, start: Recovered) -> Iterator[Recovered]:
    """The state at the start, then after each entry that changed it. The arrays of what was yielded before are overwritten."""
    strategy = build_strategy(start.merging)
    current = start
    bases = _Bases(ledger, snapshots, manifest)
    current = replace(current, state=bases.add(strategy, current.state))
    yield current
    for entry in ledger.entries_after(start.seq):
        if entry.seq != current.seq + 1:
            raise DamagedError(f"{ledger.name}: entry {current.seq + 1} is missing; restore it from a backup")
        state, merging = current.state, current.merging
        if entry.kind == "merging":
            merging = MergingSettings.model_validate_json(entry.payload or b"")
            strategy = build_strategy(merging)
            state = replace(state, bases={})
        elif entry.kind == "flush":
            state = strategy.flush(state)
        elif entry.outcome in ("merged", "buffered"):
            state = _apply(strategy, state, entry, manifest, ledger)
        if state.version != entry.version:
            raise DamagedError(f"{ledger.name}: entry {entry.seq} should make version {entry.version}, not {state.version}")
        state = bases.add(strategy, state)
        current = replace(current, state=state, seq=entry.seq, merging=merging)
        yield current


def _apply(strategy: Strategy, state: State, entry: Entry, manifest: Manifest, ledger: Ledger) -> State:
    if entry.payload is None or entry.codec is None or entry.base_version is None or entry.party is None:
        raise DamagedError(f"{ledger.name}: entry {entry.seq} lacks what was merged; restore it from a backup")
    check_payload(ledger, entry)
    try:
        delta = decode(entry.payload, parse_codec(entry.codec), manifest=manifest)
    except BrokerFLError as exc:
        raise DamagedError(f"{ledger.name}: the payload of entry {entry.seq} is damaged: {exc}") from exc
    contribution = Contribution(entry.party, delta, entry.base_version, entry.num_samples or 1)
    state, outcome = strategy.apply(state, contribution)
    recorded = (entry.outcome, entry.staleness, entry.weight)
    if recorded != (outcome.kind, outcome.staleness, outcome.weight):
        raise DamagedError(f"{ledger.name}: entry {entry.seq} was not merged as it says; restore it from a backup")
    return state


def check_payload(ledger: Ledger, entry: Entry) -> None:
    if entry.payload_digest is not None and payload_digest(entry.payload or b"") != entry.payload_digest:
        raise DamagedError(f"{ledger.name}: the payload of entry {entry.seq} differs from its digest; restore it from a backup")


class _Bases:
    """The broadcast models that model mixing needs again, made anew where replay passes a version that was broadcast."""

    def __init__(self, ledger: Ledger, snapshots: Snapshots, manifest: Manifest) -> None:
        self._ledger = ledger
        self._snapshots = snapshots
        self._manifest = manifest
        self._numbers: dict[int, int] | None = None
        self._model: Vector | None = None
        self._frames: Iterator[ModelFrame] = iter(())
        self._number = 0

    def add(self, strategy: Strategy, state: State) -> State:
        if not strategy.keeps_bases or state.version in state.bases:
            return state
        if self._numbers is None:
            self._numbers = {frame.version: frame.number for frame in self._ledger.frames_from(0)}
        number = self._numbers.get(state.version)
        if number is None:
            return state
        model = self._model
        if model is None:
            model = self._model = self._begin(state, self._numbers)
        while self._number < number:
            frame = next(self._frames, None)
            if frame is None:
                raise DamagedError(f"{self._ledger.name}: frame {number} has lost its body; restore it from a backup")
            self._number = frame.number
        return remember_base(strategy, state, broadcast=model.copy())

    def _begin(self, state: State, numbers: dict[int, int]) -> Vector:
        """At the newest base of the snapshot; where it has none, as after a change of strategy, at the first frame."""
        known = max((version for version in state.bases if version in numbers), default=None)
        if known is not None:
            self._number, model = numbers[known], state.bases[known].copy()
        else:
            first_row, first_snapshot = self._ledger.frames_from(0)[0], snapshot_rows(self._ledger)[0]
            first = self._snapshots.read(Stored(first_snapshot.file, first_snapshot.sha256))
            self._number, model = 1, first_held(first_row, first.model, manifest=self._manifest)
        self._frames = changed_by(self._ledger, model, after=self._number, manifest=self._manifest)
        return model
