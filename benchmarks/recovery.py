"""How soon an aggregator that was killed has its model back, from a snapshot and the updates after it.

The aggregator's own code fills a ledger: it merges the updates one by one, with a frame every `FRAME_EVERY` versions, and ends
without a snapshot. What is recovered must have the digest that those merges ended with. The updates repeat `DISTINCT` ones, each
like the delta of benchmarks.codec with other scales.

`recover_s` is for the model (`recover()`), `start_s` for all that a start reads from the disk: opening and checking the ledger,
what the receivers hold, and the model. Both are medians of rounds after one that does not count. The model comes out of the
system's cache, as after a kill; after a power cut the disk has to be added.

    python -m benchmarks.recovery [--json FILE] [--parameters 11000000] [--updates 1000] [--rounds 5] [--codecs NAME ...]
"""

import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregator.admission import Examined, Limits, Sender
from aggregator.broadcast import BroadcastPlan
from aggregator.coordinator import Coordinator, Rules
from aggregator.decisions import Arrival, Goal
from aggregator.ledger import FrameRow, Ledger
from aggregator.opening import open_ledger
from aggregator.recovery import recover, recover_held
from aggregator.snapshots import Snapshots
from benchmarks.codec import delta, model
from benchmarks.report import parser, show
from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.config import MergingSettings
from broker_fl.database import sqlite_url
from broker_fl.parameters import digest
from broker_fl.signing import payload_digest
from broker_fl.topology import Names
from schemas.frame import TrainingPlan
from schemas.manifest import Manifest
from schemas.update import ModelUpdate

FEDERATION = "bench"
PARTY = "bench"
CODECS = ("topk:0.01+int4", "topk:0.01+int8", "randomk:0.01+int4")
DISTINCT = 16
GROUP = 25
"""Updates that are decided in one transaction."""
FRAME_EVERY = 100
"""Versions, so that staleness goes up to this."""

GOAL_S = 5.0
GOAL_PARAMETERS, GOAL_UPDATES = 11_000_000, 1000


@dataclass(frozen=True, slots=True)
class Row:
    codec: str
    parameters: int
    updates: int
    ledger_bytes: int
    recover_s: float
    update_ms: float
    """Of `recover_s`, for each update."""
    start_s: float


@dataclass(frozen=True, slots=True)
class State:
    """An aggregator's, on the disk."""

    folder: Path
    manifest: Manifest

    @property
    def ledger_url(self) -> str:
        return sqlite_url(self.folder / "ledger.db")

    @property
    def ledger_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("ledger.db*"))

    def snapshots(self) -> Snapshots:
        return Snapshots(str(self.folder / "snapshots"), self.manifest)


def payloads(codec: str, manifest: Manifest, *, count: int) -> list[bytes]:
    return [
        encode(delta(manifest, seed=seed), parse_codec(codec), manifest=manifest, generator=np.random.default_rng(seed))
        for seed in range(1, count + 1)
    ]


def coordinator(ledger: Ledger, state: State, *, codec: str, merging: MergingSettings) -> Coordinator:
    plan = BroadcastPlan(
        federation=FEDERATION,
        ledger_id=ledger.facts()["ledger_id"],
        manifest=state.manifest,
        down=codec,
        keyframe="float32",
        keyframe_every_frames=100,
        up=codec,
        warm_up_versions=0,
        warm_up_density=0.25,
        momentum_correction=0.0,
        training=TrainingPlan(),
        fraction=1.0,
        repeat=True,
        every_versions=FRAME_EVERY,
        every_s=1e9,
    )
    limits = Limits(Names(FEDERATION), state.manifest, 4 * state.manifest.size + 65_536, None)
    rules = Rules(limits, merging, plan, Goal(), 1_000_000, 3600.0)
    return Coordinator(ledger, state.snapshots(), rules, clock=time.time)


def arrival(payload: bytes, *, codec: str, manifest: Manifest, base: FrameRow, sequence: int) -> Arrival:
    update = ModelUpdate(
        federation=FEDERATION,
        party=PARTY,
        update_id=uuid.uuid4().hex,
        sequence=sequence,
        base_version=base.version,
        base_digest=base.digest,
        manifest_digest=manifest.digest,
        codec=codec,
        num_samples=1,
        num_steps=1,
        train_loss=0.0,
        payload=payload,
    )
    decoded = decode(payload, parse_codec(codec), manifest=manifest)
    return Arrival(
        Sender(PARTY, update.update_id), Examined(update, decoded, payload_digest(payload), decoded.norm()), len(payload)
    )


def fill(state: State, *, codec: str, updates: int, merging: MergingSettings) -> str:
    """The digest of the model that merging all of them gave."""
    encoded = payloads(codec, state.manifest, count=min(updates, DISTINCT))
    initial = np.random.default_rng(0).standard_normal(state.manifest.size, dtype=np.float32) * np.float32(0.05)
    with open_ledger(state.ledger_url) as ledger:
        filling = coordinator(ledger, state, codec=codec, merging=merging)
        filling.open(initial)
        filling.tick()
        for start in range(0, updates, GROUP):
            base = ledger.last_frame()
            assert base is not None
            verdicts = filling.decide(
                [
                    arrival(encoded[at % len(encoded)], codec=codec, manifest=state.manifest, base=base, sequence=at + 1)
                    for at in range(start, min(start + GROUP, updates))
                ]
            )
            assert all(verdict.refused is None for verdict in verdicts), verdicts
            while (frame := filling.unpublished()) is not None:
                filling.published(frame.number)
        return filling.model_digest()


def recovered(state: State, *, expected: str) -> tuple[float, float]:
    """Seconds for the model, and for the whole start."""
    began = time.perf_counter()
    with open_ledger(state.ledger_url) as ledger:
        recover_held(ledger, state.manifest)
        model_began = time.perf_counter()
        found = recover(ledger, state.snapshots(), state.manifest)
        ended = time.perf_counter()
    assert digest(found.state.model) == expected, "not the bits that merging one by one gave"
    return ended - model_began, ended - began


def measure(codecs: Sequence[str], *, parameters: int, updates: int, rounds: int) -> list[Row]:
    manifest = model(parameters)
    merging = MergingSettings(max_staleness=FRAME_EVERY + GROUP)
    rows = []
    for codec in codecs:
        with tempfile.TemporaryDirectory() as folder:
            state = State(Path(folder), manifest)
            expected = fill(state, codec=codec, updates=updates, merging=merging)
            found = [recovered(state, expected=expected) for _ in range(rounds + 1)][1:]
            recover_s, start_s = (statistics.median(times) for times in zip(*found, strict=True))
            rows.append(
                Row(codec, parameters, updates, state.ledger_bytes, recover_s, 1e3 * recover_s / max(updates, 1), start_s)
            )
    return rows


def verdict(row: Row) -> str:
    holds = "holds" if row.start_s < GOAL_S else "FAILS"
    return f"{holds}: {row.codec}, {row.updates} updates after the snapshot in {row.start_s:.1f} s, less than {GOAL_S:g} s"


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--parameters", type=int, default=GOAL_PARAMETERS, help="of the model")
    arguments.add_argument("--updates", type=int, default=GOAL_UPDATES, help="after the snapshot")
    arguments.add_argument("--rounds", type=int, default=5, help="of each codec; the row has their medians")
    arguments.add_argument("--codecs", nargs="+", default=CODECS)
    given = arguments.parse_args()
    rows = measure(given.codecs, parameters=given.parameters, updates=given.updates, rounds=given.rounds)
    show("Recovery of a model to the last bit", rows, json_file=given.json)
    for row in rows:
        if (row.parameters, row.updates) == (GOAL_PARAMETERS, GOAL_UPDATES):
            print(verdict(row))


if __name__ == "__main__":
    main()
