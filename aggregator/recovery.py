"""Version v = a snapshot + the ledger's updates after it; what receivers hold = a keyframe + the frames after it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog

from aggregator.broadcast import Held
from aggregator.chain import link
from aggregator.frames import Bases, BroadcastBases, OwnBases, changed_by, open_whole
from aggregator.ledger import Ledger
from aggregator.merging.fold import Contribution, State, Strategy
from aggregator.merging.strategies import build_strategy
from aggregator.records import Entry, SnapshotRow
from aggregator.snapshots import Snapshots, Stored
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings
from broker_fl.errors import BrokerFLError, DamagedError
from broker_fl.parameters import Vector, digest, fingerprint
from broker_fl.signing import payload_digest
from schemas.manifest import Manifest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    state: State
    seq: int
    merging: MergingSettings
    snapshot_version: int
    snapshot_seq: int
    entry: Entry | None = None
    """The one that was applied last; None at the start."""


def recover(ledger: Ledger, snapshots: Snapshots, manifest: Manifest) -> Recovered:
    """From the newest snapshot that can be read.

    Raises DamagedError if there is none, or if the result is not the model that the last entry says.
    """
    recovered = begin(ledger, snapshots, snapshot_rows(ledger))
    for reached in replay(ledger, snapshots, manifest, start=recovered):
        recovered = reached
    # An aggregator at work may have written more since.
    last = recovered.entry or ledger.last_entry(upto=recovered.seq)
    if last is not None:
        expect_model(ledger, last, recovered.state.model)
    return recovered


def begin(ledger: Ledger, snapshots: Snapshots, rows: Sequence[SnapshotRow]) -> Recovered:
    """At the newest of these snapshots that can be read. Raises DamagedError if there is none."""
    row, state = _newest_readable(snapshots, rows)
    return Recovered(state, row.seq, merging_at(ledger, row.seq), state.version, row.seq)


def state_at(
    ledger: Ledger, snapshots: Snapshots, manifest: Manifest, *, version: int, before: int | None = None, skip: str | None = None
) -> State:
    """When the version was made; `before` this entry, since a ledger that goes on may make others of that number never again.

    `skip`: as if this party had never taken part. Raises DamagedError if the ledger has not all that it takes.
    """
    rows = [row for row in snapshot_rows(ledger) if row.version <= version and (before is None or row.seq < before)]
    if not rows:
        raise DamagedError(f"{ledger.name} has no snapshot from which version {version} could be made again")
    start = begin(ledger, snapshots, rows[:1] if skip is not None else rows)
    for reached in replay(ledger, snapshots, manifest, start=start, skip=skip):
        if reached.state.version == version:
            return reached.state
    raise DamagedError(f"{ledger.name} has never made a version {version}")


def _newest_readable(snapshots: Snapshots, rows: Sequence[SnapshotRow]) -> tuple[SnapshotRow, State]:
    """An older one makes the same bits: what came after it is all in the ledger, and replay checks that."""
    newest, *older = reversed(rows)
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
    keyframe, model = open_whole(ledger, number, body, manifest=manifest)
    for frame in changed_by(ledger, model, after=number, manifest=manifest):
        number = frame.number
    if number != last.number or digest(model) != last.digest:
        raise DamagedError(
            f"{ledger.name}: its frames do not give what its frame {last.number} says; `broker-fl ledger verify` names the "
            "first one that is damaged; restore the ledger from a backup"
        )
    return Held(last, model, keyframe.keyframe)


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


def expect_model(ledger: Ledger, entry: Entry, model: Vector) -> None:
    if fingerprint(model) != entry.model_digest:
        raise DamagedError(
            f"{ledger.name}: entry {entry.seq} says another model than replay makes of version {entry.version}; restore ledger "
            "and snapshots together from a backup"
        )


def merging_at(ledger: Ledger, seq: int) -> MergingSettings:
    """The settings that entries after `seq` were merged by."""
    found: MergingSettings | None = None
    for entry in ledger.entries_of("merging"):
        if entry.seq <= seq:
            found = MergingSettings.model_validate_json(entry.payload or b"")
    if found is None:
        raise DamagedError(f"{ledger.name}: entry {seq} has no merging settings before it; restore it from a backup")
    return found


def checked_entries(ledger: Ledger, *, after: int, upto: int | None = None) -> Iterator[Entry]:
    """In order, each with its place in the chain confirmed. Raises DamagedError naming the first that is not as it was
    written.
    """
    seq, chain = after, ledger.chain_after(after)
    for entry in ledger.entries_after(after):
        if upto is not None and entry.seq > upto:
            return
        if entry.seq != seq + 1:
            raise DamagedError(f"{ledger.name}: entry {seq + 1} is missing; restore it from a backup")
        check_payload(ledger, entry)
        seq, chain = entry.seq, link(chain, entry)
        if chain != entry.chain:
            raise DamagedError(f"{ledger.name}: entry {seq} is not what was written: its hash differs; restore it from a backup")
        yield entry


def replay(
    ledger: Ledger, snapshots: Snapshots, manifest: Manifest, *, start: Recovered, skip: str | None = None
) -> Iterator[Recovered]:
    """The state at the start, then after each entry. The arrays of what was yielded before are overwritten.

    `skip`: the updates of this party keep their place, and add nothing. Versions and weights stay as recorded; what the others
    would have trained from another model, nobody can know.
    """
    noise_key = ledger.noise_key()
    strategy = build_strategy(start.merging, noise_key=noise_key)
    current = start
    bases: Bases = OwnBases(ledger) if skip is not None else BroadcastBases(ledger, manifest)
    targets = _Targets(ledger, after=start.seq)
    current = replace(current, state=bases.add(strategy, current.state))
    targets.pass_by(current.state)
    yield current
    for entry in checked_entries(ledger, after=start.seq):
        state, merging = current.state, current.merging
        if entry.kind == "merging":
            merging = MergingSettings.model_validate_json(entry.payload or b"")
            strategy = build_strategy(merging, noise_key=noise_key)
            state = replace(state, bases={})
        elif entry.kind == "flush":
            state = strategy.flush(state)
        elif entry.kind == "rollback":
            target = targets.take(entry) or _earlier_target(ledger, snapshots, manifest, entry, skip=skip)
            state = rolled_back(state, target)
        elif entry.outcome in ("merged", "buffered"):
            state = _apply(strategy, state, entry, manifest, ledger, is_void=entry.party == skip)
        if state.version != entry.version:
            raise DamagedError(f"{ledger.name}: entry {entry.seq} should make version {entry.version}, not {state.version}")
        state = bases.add(strategy, state)
        targets.pass_by(state)
        current = replace(current, state=state, seq=entry.seq, merging=merging, entry=entry)
        yield current


class _Targets:
    """The models that later rollbacks go back to, kept from when replay passes them until the last of those rollbacks."""

    def __init__(self, ledger: Ledger, *, after: int) -> None:
        rollbacks = [entry for entry in ledger.entries_of("rollback") if entry.seq > after]
        self._last_use = {entry.base_version: entry.seq for entry in rollbacks}
        self._kept: dict[int, State] = {}

    def pass_by(self, state: State) -> None:
        if state.version in self._last_use and state.version not in self._kept:
            self._kept[state.version] = State(version=state.version, model=state.model.copy())

    def take(self, entry: Entry) -> State | None:
        """None where replay began after it."""
        version = entry.base_version or 0
        is_last = self._last_use.get(version) == entry.seq
        return self._kept.pop(version, None) if is_last else self._kept.get(version)


def rolled_back(state: State, target: State) -> State:
    """The next version, with the model of an earlier one. What was gathered and not merged is dropped."""
    return State(version=state.version + 1, model=target.model.copy())


def _earlier_target(ledger: Ledger, snapshots: Snapshots, manifest: Manifest, entry: Entry, *, skip: str | None) -> State:
    """What a rollback went back to: made again, or where compaction took away what that needs, as it was kept."""
    version = entry.base_version or 0
    rows = snapshot_rows(ledger)
    if rows[0].version <= version:
        return state_at(ledger, snapshots, manifest, version=version, before=entry.seq, skip=skip)
    kept = next((row for row in rows if row.seq == entry.seq), None)
    if kept is None:
        raise DamagedError(f"{ledger.name} has lost the snapshot of entry {entry.seq}, a rollback; restore it from a backup")
    return snapshots.read(Stored(kept.file, kept.sha256))


def _apply(strategy: Strategy, state: State, entry: Entry, manifest: Manifest, ledger: Ledger, *, is_void: bool) -> State:
    if entry.codec is None or entry.base_version is None or entry.party is None:
        raise DamagedError(f"{ledger.name}: entry {entry.seq} lacks what was merged; restore it from a backup")
    delta = _nothing(manifest) if is_void else _delta(entry, manifest, ledger)
    factor = 1.0 if entry.factor is None else entry.factor
    contribution = Contribution(entry.party, delta, entry.base_version, entry.num_samples or 1, factor=factor, is_void=is_void)
    state, outcome = strategy.apply(state, contribution)
    recorded = (entry.outcome, entry.staleness, entry.weight)
    if recorded != (outcome.kind, outcome.staleness, outcome.weight):
        raise DamagedError(f"{ledger.name}: entry {entry.seq} was not merged as it says; restore it from a backup")
    return state


def _nothing(manifest: Manifest) -> Delta:
    return Delta(manifest.size, np.empty(0, np.float32), np.empty(0, np.int64))


def _delta(entry: Entry, manifest: Manifest, ledger: Ledger) -> Delta:
    if entry.payload is None:
        raise DamagedError(f"{ledger.name}: entry {entry.seq} lacks what was merged; restore it from a backup")
    try:
        return decode(entry.payload, parse_codec(entry.codec or ""), manifest=manifest)
    except BrokerFLError as exc:
        raise DamagedError(f"{ledger.name}: the payload of entry {entry.seq} is damaged: {exc}") from exc


def check_payload(ledger: Ledger, entry: Entry) -> None:
    """Where there is one: compaction drops payloads, and leaves the digests, which the chain holds."""
    if entry.payload is not None and payload_digest(entry.payload) != entry.payload_digest:
        raise DamagedError(f"{ledger.name}: the payload of entry {entry.seq} differs from its digest; restore it from a backup")
