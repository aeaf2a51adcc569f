"""Version v = a snapshot + the ledger's updates after it, to the last bit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from aggregator.admission import payload_digest
from aggregator.broadcast import received_model
from aggregator.ledger import Entry, Ledger
from aggregator.merging.fold import Contribution, State, Strategy, remember_base
from aggregator.merging.strategies import build_strategy
from aggregator.snapshots import Snapshots, Stored
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.config import MergingSettings
from broker_fl.errors import BrokerFLError, DamagedError
from broker_fl.parameters import Vector, digest
from schemas.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Recovered:
    state: State
    seq: int
    merging: MergingSettings
    snapshot_version: int
    snapshot_seq: int


def recover(ledger: Ledger, snapshots: Snapshots, manifest: Manifest) -> Recovered:
    """From the newest snapshot. Raises DamagedError if the result is not the model that the newest frame was made from."""
    rows = ledger.snapshots()
    if not rows:
        raise DamagedError(f"{ledger.name} has lost its snapshots; restore it from a backup")
    last = rows[-1]
    state = snapshots.read(Stored(last.file, last.sha256))
    merging = merging_at(ledger, last.seq)
    *_, recovered = replay(ledger, manifest, start=Recovered(state, last.seq, merging, state.version, last.seq))
    frame = ledger.last_frame()
    if frame is not None and frame.version == recovered.state.version:
        expect_digest(ledger, frame.version, expected=frame.model_digest, model=recovered.state.model)
    return recovered


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


def replay(ledger: Ledger, manifest: Manifest, *, start: Recovered) -> Iterator[Recovered]:
    """The state at the start, then after each entry that changed it. The arrays of what was yielded before are overwritten."""
    strategy = build_strategy(start.merging)
    current = start
    bases = _Bases(ledger, manifest)
    current = replace(current, state=bases.renew(strategy, current.state))
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

    def __init__(self, ledger: Ledger, manifest: Manifest) -> None:
        self._manifest = manifest
        self._codecs = {frame.version: frame.codec for frame in ledger.frames_from(0)}

    def renew(self, strategy: Strategy, state: State) -> State:
        """A snapshot's base of its own version is that of the frame before it; a later one may have had another codec."""
        return self.add(strategy, replace(state, bases={v: base for v, base in state.bases.items() if v != state.version}))

    def add(self, strategy: Strategy, state: State) -> State:
        codec = self._codecs.get(state.version)
        if codec is None or not strategy.keeps_bases or state.version in state.bases:
            return state
        broadcast = received_model(state.model, codec, version=state.version, manifest=self._manifest)
        return remember_base(strategy, state, broadcast=broadcast)
