"""What a federation costs beside its training: the demo's wall time, and the same steps trained bare in one process.

`demo_s` is the whole demo, processes starting included; `active_s` goes from the first merge to the last; `bare_s` is the same
number of steps of the same model on the same data, one thread, one after the other. With p parties on c cores the bare work would
take bare_s / min(p, c) at best: `overhead` is active_s over that.

    python -m benchmarks.overhead [--json FILE] [--parties 5] [--versions 150]
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from aggregator.opening import open_ledger_for_reading
from benchmarks.report import cores, parser, show
from broker_fl.cli.demonstration.plan import DIGITS_EPOCHS
from broker_fl.database import sqlite_url
from broker_fl.tasks.module import initial
from broker_fl.tasks.partition import split
from broker_fl.tasks.registry import load_task
from schemas.frame import TrainingPlan
from workers.outbox import read_counters
from workers.trainer import train


@dataclass(frozen=True, slots=True)
class Row:
    parties: int
    versions: int
    trainings: int
    steps: int
    demo_s: float
    active_s: float
    bare_s: float
    overhead: float


@dataclass(frozen=True, slots=True)
class Played:
    seconds: float
    active_s: float
    trainings: int
    steps: int


def play(parties: int, versions: int) -> Played:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "demo"
        command = ["demo", "--steady", "--parties", str(parties), "--versions", str(versions), "--folder", str(folder)]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-m", "broker_fl", *command], check=True)
        seconds = time.perf_counter() - began
        with open_ledger_for_reading(sqlite_url(folder / "aggregator" / "ledger.db")) as ledger:
            times = [entry.at for entry in ledger.entries_after(0) if entry.outcome == "merged"]
        counters = [read_counters(folder / "workers", f"party-{number + 1}") for number in range(parties)]
    trainings = sum(counter["trainings"] for counter in counters)
    steps = sum(counter["steps"] for counter in counters)
    return Played(seconds, times[-1] - times[0], trainings, steps)


def train_bare(parties: int, trainings: int) -> float:
    """Seconds that so many local trainings take, party after party."""
    torch.set_num_threads(1)
    task = load_task("digits")
    examples = task.train_examples(None)
    module, manifest, base = initial(task, None, 0)
    shares = split(examples.targets.numpy(), parties=parties, scheme="iid", seed=0)
    parts = [examples.take(torch.from_numpy(share)) for share in shares]
    plan = TrainingPlan(epochs=DIGITS_EPOCHS)

    def one(number: int) -> None:
        train(
            task,
            module,
            parts[number % parties],
            base=base,
            manifest=manifest,
            plan=plan,
            device=torch.device("cpu"),
            seed=number,
            should_stop=lambda: False,
        )

    one(0)  # torch loads its optimizers with the first step.
    began = time.perf_counter()
    for number in range(trainings):
        one(number)
    return time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--parties", type=int, default=5)
    arguments.add_argument("--versions", type=int, default=150)
    given = arguments.parse_args()
    played = play(given.parties, given.versions)
    bare_s = train_bare(given.parties, played.trainings)
    best_s = bare_s / min(given.parties, cores())
    row = Row(
        parties=given.parties,
        versions=given.versions,
        trainings=played.trainings,
        steps=played.steps,
        demo_s=played.seconds,
        active_s=played.active_s,
        bare_s=bare_s,
        overhead=played.active_s / best_s,
    )
    show("A federation beside its bare training", [row], json_file=given.json)


if __name__ == "__main__":
    main()
