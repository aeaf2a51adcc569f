"""Looking back: versions made again, the model as if a party had never taken part, and going back to an earlier version."""

from dataclasses import dataclass, replace

from aggregator.ledger import Ledger
from aggregator.merging.fold import State
from aggregator.records import Entry, SnapshotRow
from aggregator.recovery import Recovered, begin, manifest_of_ledger, recover, replay, rolled_back, snapshot_rows, state_at
from aggregator.snapshots import Snapshots
from broker_fl.errors import ConfigurationError
from broker_fl.parameters import digest, fingerprint


@dataclass(frozen=True, slots=True)
class Version:
    """What is known of a version that was broadcast, kept as a snapshot, or made by a rollback."""

    version: int
    at: float
    frame: int | None = None
    digest: str = ""
    """Of what the receivers hold after its frame."""
    snapshot: str = ""
    goes_back_to: int | None = None
    is_rolled_back: bool = False


def versions(ledger: Ledger) -> list[Version]:
    """In order. Others can be made again too: all since the first snapshot."""
    found: dict[int, Version] = {}
    for row in ledger.snapshots():
        found[row.version] = Version(row.version, row.at, snapshot=row.file)
    for frame in ledger.frames_from(0):
        known = found.get(frame.version, Version(frame.version, frame.at))
        found[frame.version] = replace(known, at=min(known.at, frame.at), frame=frame.number, digest=frame.digest)
    rollbacks = ledger.entries_of("rollback")
    for entry in rollbacks:
        known = found.get(entry.version, Version(entry.version, entry.at))
        found[entry.version] = replace(known, goes_back_to=entry.base_version)
    ranges = [range((entry.base_version or 0) + 1, entry.version) for entry in rollbacks]
    gone = {version for version in found if any(version in taken_back for taken_back in ranges)}
    return [replace(found[version], is_rolled_back=version in gone) for version in sorted(found)]


def model_of(ledger: Ledger, snapshots: Snapshots, *, version: int | None) -> State:
    """The state that a version was; None for the newest. Raises ConfigurationError for one that cannot be made."""
    newest = ledger.latest_version()
    wanted = newest if version is None else version
    oldest = snapshot_rows(ledger)[0].version
    if not oldest <= wanted <= newest:
        what = "was compacted away" if 0 <= wanted < oldest else "was never made"
        raise ConfigurationError(f"version {wanted} {what}: {ledger.name} has versions {oldest} to {newest}")
    return state_at(ledger, snapshots, manifest_of_ledger(ledger), version=wanted)


def without(ledger: Ledger, snapshots: Snapshots, *, party: str) -> State:
    """The newest version as if a party had never taken part: its updates left out, all others merged as they were, at the
    versions and with the weights on record. What the others would have trained from that model, nobody can know.

    Raises ConfigurationError where the party has merged nothing, or where what it merged first was compacted away.
    """
    first = snapshot_rows(ledger)[0]
    merged = ledger.first_merged(party)
    if merged is None:
        raise ConfigurationError(f"no update of party {party!r} went into the model of {ledger.name}")
    if merged.seq <= first.seq:
        raise ConfigurationError(
            f"the updates of party {party!r} begin with entry {merged.seq}, and all before entry {first.seq} was compacted away"
        )
    start = begin(ledger, snapshots, [first])
    *_, reached = (step.state for step in replay(ledger, snapshots, manifest_of_ledger(ledger), start=start, skip=party))
    return reached


@dataclass(frozen=True, slots=True)
class RollBack:
    """What a rollback did."""

    version: int
    """The new one, which has the model of the earlier one."""
    to: int
    dropped: int
    """Updates that were in the buffer."""
    model_digest: str


def roll_back(ledger: Ledger, snapshots: Snapshots, *, to: int, holder: str, at: float) -> RollBack:
    """Appends an entry that makes a new version of an earlier one's model.

    Takes the ledger's lead for it: an aggregator at work notices, opens the ledger again, and broadcasts the new version as a
    keyframe. Raises ConfigurationError for a version that cannot be made again.
    """
    if to == ledger.latest_version():
        raise ConfigurationError(f"version {to} is the newest one: there is nothing to go back from")
    target = model_of(ledger, snapshots, version=to)
    manifest = manifest_of_ledger(ledger)
    now = recover(ledger, snapshots, manifest)
    ledger.take_lead(holder, at=at, is_brief=True)
    try:
        # What was merged since, which is little: an aggregator at work waits for us.
        *_, last = replay(ledger, snapshots, manifest, start=now)
        return _append_rollback(ledger, snapshots, last, target, at=at)
    finally:
        ledger.let_go()


def _append_rollback(ledger: Ledger, snapshots: Snapshots, now: Recovered, target: State, *, at: float) -> RollBack:
    state = rolled_back(now.state, target)
    buffer = now.state.buffer
    dropped = 0 if buffer is None else len(buffer.parties)
    what = f"back to version {target.version}"
    entry = Entry(
        seq=now.seq + 1,
        kind="rollback",
        at=at,
        version=state.version,
        base_version=target.version,
        detail=f"{what}; {dropped} buffered updates dropped" if dropped else what,
        model_digest=fingerprint(state.model),
    )
    stored = snapshots.write(state, seq=entry.seq, ledger=ledger.facts()["ledger_id"], epoch=ledger.epoch)
    with ledger.transaction():
        ledger.append([entry])
        ledger.add_snapshot(SnapshotRow(entry.seq, state.version, stored.file, stored.sha256, at))
    return RollBack(state.version, target.version, dropped, digest(state.model))
