"""Bytes on the wire for the same accuracy: whole federations, dense float32 against codec pairs, with the same seeds and steps.

Ten workers, an aggregator and an evaluator of the real kind share this process and the in-memory broker; parties train from what
they decoded, and bytes are those of the bodies that they sent and read, parts, repeats and keyframes included. The first model is
nobody's download: every party draws it from the same seed. `accuracy` is the mean of the last five evaluated versions;
`percent_of_dense` compares both directions together with the dense run of the same task and partition. With --fedavg, synchronous
dense FedAvg of as many updates runs beside them: it broadcasts once for ten updates, where the others do so once for five.

    python -m benchmarks.wire --data FOLDER [--json FILE] [--plot FILE] [--task fashion_mnist] [--partition iid] [--fedavg]
    python -m benchmarks.wire --join FILE ... [--json FILE] [--plot FILE]

FOLDER holds FashionMNIST/raw and cifar10.npz. Subsets, for time: 20,000 training images of Fashion-MNIST, 10,000 of CIFAR-10.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvloop

from benchmarks.report import parser, show
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs
from broker_fl.cli.wiring import built_aggregator, built_evaluator, built_worker
from broker_fl.config import Settings, load_settings
from broker_fl.topology import Names, party, party_permissions, policies, shared
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.transport import Connect
from schemas import wire
from schemas.event import Event
from workers.outbox import read_counters

FEDERATION = "wire"
NAMES = Names(FEDERATION)
PARTIES = tuple(f"party-{number}" for number in range(10))
LAST_EVALUATIONS = 5
DENSE = ("float32", "float32")


@dataclass(frozen=True, slots=True)
class Kind:
    """A task, and how it is trained."""

    task: str
    data: str
    versions: int
    training: dict[str, Any]


KINDS = {
    "fashion_mnist": Kind(
        "benchmarks.tasks:FASHION_MNIST", ".", 400, {"epochs": 1, "batch_size": 50, "learning_rate": 0.05, "momentum": 0.9}
    ),
    "cifar10": Kind(
        "benchmarks.tasks:CIFAR10", "cifar10.npz", 300, {"epochs": 1, "batch_size": 50, "learning_rate": 0.03, "momentum": 0.9}
    ),
}
PARTITIONS: dict[str, dict[str, Any]] = {"iid": {"scheme": "iid"}, "dirichlet": {"scheme": "dirichlet", "alpha": 0.5}}
PAIRS = (("topk:0.02+int4", "topk:0.02+int4"), ("topk:0.03+stc", "topk:0.03+stc"), ("topk:0.005+int4", "topk:0.01+int4"))
WARM_UP_VERSIONS = 40
FEDASYNC = {"strategy": "fedasync", "mixing_rate": 0.4, "staleness": "polynomial", "exponent": 0.5, "max_staleness": 64}
FEDAVG = {"strategy": "fedavg", "buffer_size": len(PARTIES), "buffer_timeout_s": 3600.0}
BROADCAST_EVERY_MERGES = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One federation."""

    kind: Kind
    partition: str
    up: str
    down: str
    merging: dict[str, Any]
    versions: int
    warm_up_versions: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """A version that was evaluated, and the bytes of both directions until then."""

    version: int
    accuracy: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    points: list[Point]
    updates: int
    bytes_up: int
    bytes_down: int
    seconds: float

    @property
    def bytes(self) -> int:
        return self.bytes_up + self.bytes_down

    @property
    def accuracy(self) -> float:
        last = self.points[-LAST_EVALUATIONS:]
        return sum(point.accuracy for point in last) / len(last)


@dataclass(frozen=True, slots=True)
class Row:
    task: str
    partition: str
    strategy: str
    codec_up: str
    codec_down: str
    versions: int
    accuracy: float
    dense_accuracy: float
    bytes_up: int
    bytes_down: int
    percent_of_dense: float
    seconds: float
    curve: list[Point]


@dataclass(slots=True)
class Onlooker:
    """Counts what the events tell."""

    points: list[Point] = field(default_factory=list)
    bytes: int = 0

    async def watch(self, broker: MemoryBroker, listening: asyncio.Event) -> None:
        async with (
            broker.connect("onlooker") as transport,
            transport.listen(NAMES.events, routing_key="#", name="onlooker") as feed,
        ):
            listening.set()
            while True:
                event = wire.decode(Event, (await feed.receive()).body)
                if event.kind == "updates.decided":
                    self.bytes += sum(update.bytes for update in event.updates)
                elif event.kind == "frame.published":
                    self.bytes += int(event.facts["bytes"]) * len(PARTIES)
                elif event.kind == "model.evaluated":
                    self.points.append(Point(event.version, float(event.facts["accuracy"]), self.bytes))
                    if event.facts["over"]:
                        return


def settings_for(case: Case, *, data: Path, folder: Path, worker: int | None = None) -> Settings:
    flags = {
        "federation": {"name": FEDERATION},
        "task": {"name": case.kind.task, "data": data / case.kind.data},
        "partition": PARTITIONS[case.partition],
        "training": {**case.kind.training, "decay_versions": case.versions},
        "merging": case.merging,
        "codec": {"up": case.up, "down": case.down, "warm_up_versions": case.warm_up_versions},
        "aggregator": {
            "state": folder / "aggregator",
            "versions": case.versions,
            "broadcast_every_merges": BROADCAST_EVERY_MERGES,
            "broadcast_every_s": 60.0,
        },
        "evaluation": {"device": "cpu"},
        "worker": {
            "party": None if worker is None else PARTIES[worker],
            "share": None if worker is None else f"{worker + 1}/{len(PARTIES)}",
            "state": folder / "workers",
            "device": "cpu",
        },
        "security": {"signatures": False},
        # What is compared are the codecs.
        "trust": {"max_updates_per_minute": 0, "norm_factor": 0, "outlier_factor": 0, "direction": False},
    }
    return load_settings(flags=flags, environment={})


def stage() -> MemoryBroker:
    broker = MemoryBroker()
    broker.declare(shared(FEDERATION))
    broker.apply_policies(policies(FEDERATION, model_bytes=64 << 20))
    for name in PARTIES:
        broker.declare(party(FEDERATION, name))
        broker.users[name] = party_permissions(FEDERATION, name)
    return broker


async def live(of: Callable[..., Settings], onlooker: Onlooker, *, way: Callable[[int, Connect], Connect] | None = None) -> int:
    """A federation of all parties; gives how many updates were decided. `of` makes the settings, those of a worker by its number;
    `way` may change how a worker connects."""
    broker = stage()
    with ExitStack() as stack:
        built = stack.enter_context(built_aggregator(of(), broker.connect))
        workers = []
        for index, name in enumerate(PARTIES):
            connect: Connect = partial(broker.connect, user=name)
            workers.append(stack.enter_context(built_worker(of(worker=index), way(index, connect) if way else connect)))
        evaluator = built_evaluator(of(), broker.connect)
        async with asyncio.TaskGroup() as group:
            listening = asyncio.Event()
            group.create_task(onlooker.watch(broker, listening))
            await listening.wait()
            group.create_task(built.service.run(built.open_state))
            for service in (*workers, evaluator):
                group.create_task(service.run())
        return sum(built.coordinator.counts.values())


async def federate(case: Case, *, data: Path, folder: Path) -> Run:
    """A federation from its first model to its last."""
    of = partial(settings_for, case, data=data, folder=folder)
    onlooker = Onlooker()
    began = time.perf_counter()
    updates = await live(of, onlooker)
    counters = [read_counters(folder / "workers", name) for name in PARTIES]
    return Run(
        points=onlooker.points,
        updates=updates,
        bytes_up=sum(counter["bytes_up"] for counter in counters),
        bytes_down=sum(counter["bytes_down"] for counter in counters),
        seconds=time.perf_counter() - began,
    )


def cases_of(task: str, partition: str, *, pairs: Sequence[tuple[str, str]], fedavg: bool) -> list[Case]:
    """The dense one first."""
    kind = KINDS[task]
    updates = kind.versions
    cases = [Case(kind, partition, *DENSE, FEDASYNC, updates)]
    cases += [Case(kind, partition, *pair, FEDASYNC, updates, WARM_UP_VERSIONS) for pair in pairs]
    if fedavg:
        cases.append(Case(kind, partition, *DENSE, FEDAVG, updates // len(PARTIES)))
    return cases


def measure(task: str, partition: str, *, data: Path, pairs: Sequence[tuple[str, str]], fedavg: bool) -> list[Row]:
    rows: list[Row] = []
    dense: Run | None = None
    for case in cases_of(task, partition, pairs=pairs, fedavg=fedavg):
        with tempfile.TemporaryDirectory() as folder:
            run = uvloop.run(federate(case, data=data, folder=Path(folder)))
        dense = dense or run
        row = Row(
            task=task,
            partition=partition,
            strategy=case.merging["strategy"],
            codec_up=case.up,
            codec_down=case.down,
            versions=run.points[-1].version,
            accuracy=run.accuracy,
            dense_accuracy=dense.accuracy,
            bytes_up=run.bytes_up,
            bytes_down=run.bytes_down,
            percent_of_dense=100 * run.bytes / dense.bytes,
            seconds=run.seconds,
            curve=run.points,
        )
        rows.append(row)
        print({name: value for name, value in asdict(row).items() if name != "curve"}, flush=True)
    return rows


def joined(files: Sequence[Path]) -> list[Row]:
    """The rows of earlier runs."""
    records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    return [
        Row(**{"strategy": "fedasync", **record, "curve": [Point(**point) for point in record["curve"]]}) for record in records
    ]


def plot(rows: list[Row], file: Path) -> None:
    """Accuracy against bytes, one panel for each task and partition."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((row.task, row.partition) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, (task, partition) in zip(axes[0], panels, strict=True):
        for row in rows:
            if (row.task, row.partition) == (task, partition):
                label = f"{row.strategy}: {row.codec_up} up, {row.codec_down} down ({row.percent_of_dense:.3g} %)"
                points = [point for point in row.curve if point.version]
                axis.plot([p.bytes / 1e6 for p in points], [100 * p.accuracy for p in points], label=label, linewidth=1.4)
        axis.set_xscale("log")
        axis.set_ylim(bottom=max(0, 100 * max(row.dense_accuracy for row in rows if row.task == task) - 40))
        axis.set_title(f"{task}, {partition}, {len(PARTIES)} parties")
        axis.set_xlabel("MB up and down, all parties together")
        axis.set_ylabel("accuracy on held-out images, %")
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(file)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--data", type=Path, help="folder with FashionMNIST/raw and cifar10.npz")
    arguments.add_argument("--task", choices=sorted(KINDS), action="append", help="only this one; may be repeated")
    arguments.add_argument("--partition", choices=sorted(PARTITIONS), action="append", help="only this one; may be repeated")
    arguments.add_argument(
        "--pair", action="append", metavar="UP,DOWN", help="instead of the pairs of this file; may be repeated"
    )
    arguments.add_argument("--fedavg", action="store_true", help="dense synchronous FedAvg too")
    arguments.add_argument("--plot", type=Path, help="write a picture here, as .svg or .png")
    arguments.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="run nothing: put rows of earlier runs together")
    given = arguments.parse_args()
    if given.join is None and given.data is None:
        arguments.error("say by --data where the images are")
    configure_logs(LogLevel.ERROR, LogFormat.CONSOLE)
    torch.set_num_threads(1)
    pairs = PAIRS if given.pair is None else tuple(tuple(pair.split(",")) for pair in given.pair)
    rows = (
        joined(given.join)
        if given.join
        else [
            row
            for task in given.task or KINDS
            for partition in given.partition or PARTITIONS
            for row in measure(task, partition, data=given.data, pairs=pairs, fedavg=given.fedavg)
        ]
    )
    show("Bytes for the same accuracy", rows, json_file=given.json, hidden=("curve",))
    if given.plot is not None:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
