"""Whether anything was lost or doubled: what the workers have on record, against the ledger, to the last update and the last
bit.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from aggregator.ledger import Ledger
from aggregator.opening import open_ledger_for_reading
from aggregator.records import Entry
from aggregator.recovery import manifest_of_ledger
from aggregator.verification import verify
from benchmarks.chaos.drift import KNOWN
from benchmarks.chaos.stage import FEDERATION, PARTIES, SETTINGS, Stage
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.config import TrainingSettings
from broker_fl.errors import BrokerFLError
from broker_fl.parameters import digest
from broker_fl.tasks.module import initial
from schemas.manifest import Manifest
from workers.held import HeldModel
from workers.outbox import open_outbox
from workers.service import seed_of
from workers.trainer import train

TOLERANCE = 2e-3
"""Of a coordinate's sum over a campaign, in which float32 rounds some thousand times; one training moves some by 0.1."""


@dataclass(slots=True)
class Audit:
    confirmed: int = 0
    """Updates that the workers made and sent, by their own records."""
    merged: int = 0
    refused: int = 0
    lost: int = 0
    doubled: int = 0
    replay_identical: bool = False
    versions: int = 0
    frames: int = 0
    largest_mass_error: float = 0.0
    """Over parties and coordinates: of what was trained, against what went into the model and what is still to be sent."""
    violations: list[str] = field(default_factory=list)


def audit(stage: Stage) -> Audit:
    """After all processes have ended."""
    found = Audit()
    with open_ledger_for_reading(stage.ledger_url) as ledger:
        manifest = manifest_of_ledger(ledger)
        _replay(stage, ledger, manifest, found)
        entries = [entry for entry in ledger.entries_after(0) if entry.kind == "update"]
        last = ledger.last_frame()
        for party in PARTIES:
            own = [entry for entry in entries if entry.party == party]
            _party(stage, party, own, manifest, found, last_frame=last.digest if last else "")
        strangers = {entry.party for entry in entries} - set(PARTIES)
        if strangers:
            found.violations.append(f"the ledger has updates of {strangers}")
        half_sent = sum(ledger.parts_of(party) for party in PARTIES)
        found.versions = ledger.latest_version()
    if half_sent:
        found.violations.append(f"{half_sent} parts are left in the ledger")
    found.violations += _left_behind(stage)
    return found


def _replay(stage: Stage, ledger: Ledger, manifest: Manifest, found: Audit) -> None:
    """Each entry has the digest of the model that the aggregator held when it wrote it; replay has to come to the same ones."""
    try:
        verified = verify(ledger, stage.snapshots(manifest))
    except BrokerFLError as exc:
        found.violations.append(f"replay: {exc}")
        return
    found.replay_identical = verified.replayed_from == 0
    found.frames = verified.frames


def _party(stage: Stage, party: str, entries: list[Entry], manifest: Manifest, found: Audit, *, last_frame: str) -> None:
    with open_outbox(stage.outbox_folder(party), party=party, federation=FEDERATION) as outbox:
        made = outbox.next_sequence() - 1
        counters = outbox.counters()
        unsettled = outbox.all_unsettled()
        residual = outbox.residual(manifest.digest)
        held = HeldModel(outbox, federation=FEDERATION, manifest=manifest).load()
    times = Counter(entry.sequence for entry in entries)
    doubled = sum(count - 1 for count in times.values())
    lost = set(range(1, made + 1)) - set(times)
    found.confirmed += made - len(unsettled)
    found.merged += sum(entry.outcome == "merged" for entry in entries)
    found.refused += sum(entry.outcome == "refused" for entry in entries)
    found.lost += len(lost)
    found.doubled += doubled
    say = found.violations.append
    if lost or doubled:
        say(f"{party}: of {made} updates, lost {sorted(lost)}, doubled {[n for n, count in times.items() if count > 1]}")
    if unsettled:
        say(f"{party}: updates {[stored.sequence for stored in unsettled]} were never settled")
    if set(times) - set(range(1, made + 1)):
        say(f"{party}: the ledger has updates that were never made: {sorted(set(times) - set(range(1, made + 1)), key=str)}")
    for outcome in ("merged", "refused"):
        recorded, decided = counters.get(f"updates_{outcome}", 0), sum(entry.outcome == outcome for entry in entries)
        if recorded != decided:
            say(f"{party}: {recorded} receipts say {outcome}, the ledger {decided}")
    if counters.get("trainings", 0) != made:
        say(f"{party}: {counters.get('trainings', 0)} trainings gave {made} updates")
    if held is None or held.digest != last_frame or digest(held.model) != last_frame:
        say(f"{party}: holds another model than the last frame's")
    error = _mass_error(party, made, entries, residual, manifest)
    found.largest_mass_error = max(found.largest_mass_error, error)
    if error > TOLERANCE:
        say(f"{party}: {error:.3g} of what was trained is neither in the model nor in the residual")


def _mass_error(party: str, made: int, entries: list[Entry], residual: NDArray[np.float32] | None, manifest: Manifest) -> float:
    """The largest coordinate of: all trainings - all that was merged - what is left over. Refused updates are in what is left
    over.
    """
    total = np.zeros(manifest.size)
    for delta in _trainings(party, made, manifest):
        total += delta
    for entry in entries:
        if entry.outcome == "merged" and entry.payload is not None and entry.codec is not None:
            total -= decode(entry.payload, parse_codec(entry.codec), manifest=manifest).dense()
    if residual is not None:
        total -= residual
    return float(np.abs(total).max())


def _trainings(party: str, made: int, manifest: Manifest) -> Iterator[NDArray[np.float32]]:
    """Every delta that the party's worker computed, made again from its seed."""
    module, _, _ = initial(KNOWN, None, 0)
    examples = KNOWN.train_examples(None)
    plan = TrainingSettings.model_validate(SETTINGS["training"]).plan()
    for sequence in range(1, made + 1):
        result = train(
            KNOWN,
            module,
            examples,
            base=np.zeros(manifest.size, np.float32),
            manifest=manifest,
            plan=plan,
            device=torch.device("cpu"),
            seed=seed_of(party, sequence),
            should_stop=lambda: False,
        )
        if result is not None:
            yield result.delta


def _left_behind(stage: Stage) -> list[str]:
    """Files that nobody will ever read, and processes that nobody will ever end."""
    with open_ledger_for_reading(stage.ledger_url) as ledger:
        known = {row.file for row in ledger.snapshots()}
    snapshots = {file.name for file in (stage.state / "snapshots").iterdir()}
    left = [f"the ledger does not name the snapshot {name}" for name in sorted(snapshots - known)]
    left += [f"{member.name} still runs as process {member.pid}" for member in stage.members.values() if member.pid is not None]
    return left
