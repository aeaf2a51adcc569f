"""What the rules of trust are worth: whole federations with some hostile parties, with the rules and without.

Ten workers, an aggregator and an evaluator of the real kind share this process and the in-memory broker. What hostile parties
send is changed on its way: `flip` turns the delta around, `flip x10` makes it ten times as large too, `noise x10` replaces it by
Gaussian noise of ten times its norm, `boost x30` makes it thirty times as large. `accuracy` is the mean of the last five
evaluated versions; `honest less` and `hostile less` are the shares of the honest and of the hostile parties' updates that counted
less or not at all.

    python -m benchmarks.trust --data FOLDER [--json FILE] [--hostile 3] [--attack flip] [--partition iid]

FOLDER holds FashionMNIST/raw: 20,000 training images of it are used.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from aggregator.opening import open_ledger_for_reading
from benchmarks.report import parser, show
from benchmarks.wire import KINDS, LAST_EVALUATIONS, NAMES, PARTIES, PARTITIONS, Onlooker, live
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs
from broker_fl.cli.wiring import task_of
from broker_fl.codecs.codec import decode, encode, parse_codec
from broker_fl.config import Settings, load_settings
from broker_fl.database import sqlite_url
from broker_fl.parameters import Vector
from broker_fl.tasks.module import initial
from broker_fl.transports.transport import Connect, Message, Transport
from schemas import wire
from schemas.manifest import Manifest
from schemas.update import ModelUpdate

VERSIONS = 250
CODEC = "topk:0.02+int4"
NO_RULES = {"norm_factor": 0, "outlier_factor": 0, "direction": False, "suspend_below": 0}

Twist = Callable[[Vector, np.random.Generator], Vector]


def _noise(delta: Vector, generator: np.random.Generator) -> Vector:
    noise = generator.standard_normal(delta.size, dtype=np.float32)
    return noise * np.float32(10 * np.linalg.norm(delta) / np.linalg.norm(noise))


ATTACKS: dict[str, Twist] = {
    "none": lambda delta, _: delta,
    "flip": lambda delta, _: -delta,
    "flip x10": lambda delta, _: -10 * delta,
    "noise x10": _noise,
    "boost x30": lambda delta, _: 30 * delta,
}


@dataclass(frozen=True, slots=True)
class Row:
    partition: str
    attack: str
    hostile: int
    rules: bool
    accuracy: float
    honest_less: float
    hostile_less: float
    suspended: int
    seconds: float


def settings_for(partition: str, *, rules: bool, data: Path, folder: Path, worker: int | None = None) -> Settings:
    kind = KINDS["fashion_mnist"]
    flags: dict[str, Any] = {
        "federation": {"name": NAMES.federation},
        "task": {"name": kind.task, "data": data / kind.data},
        "partition": PARTITIONS[partition],
        "training": {**kind.training, "decay_versions": VERSIONS},
        "merging": {"mixing_rate": 0.4, "max_staleness": 64},
        "codec": {"up": CODEC, "down": "int8"},
        "aggregator": {"state": folder / "aggregator", "versions": VERSIONS, "broadcast_every_s": 60.0},
        "evaluation": {"device": "cpu"},
        "security": {"signatures": False},
        "trust": {"max_updates_per_minute": 0, **({} if rules else NO_RULES)},
        "worker": {
            "party": None if worker is None else PARTIES[worker],
            "share": None if worker is None else f"{worker + 1}/{len(PARTIES)}",
            "state": folder / "workers",
            "device": "cpu",
        },
    }
    return load_settings(flags=flags, environment={})


class _HostileTransport:
    """The worker's own, but for what goes up."""

    def __init__(self, transport: Transport, twist: Twist, manifest: Manifest, generator: np.random.Generator) -> None:
        self._transport = transport
        self._twist = twist
        self._manifest = manifest
        self._generator = generator

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of a transport
        return getattr(self._transport, name)

    async def publish(self, message: Message) -> None:
        body = await asyncio.to_thread(self._twisted, message.body)
        await self._transport.publish(replace(message, body=body))

    def _twisted(self, body: bytes) -> bytes:
        update = wire.decode(ModelUpdate, body)
        delta = decode(update.payload, parse_codec(update.codec), manifest=self._manifest).dense()
        # Noise is dense: thinning it out would make it another attack.
        codec = parse_codec("int8" if self._twist is _noise else update.codec)
        payload = encode(self._twist(delta, self._generator), codec, manifest=self._manifest, generator=self._generator)
        return wire.encode(update.model_copy(update={"payload": payload, "codec": codec.name}))


def hostile(connect: Connect, twist: Twist, manifest: Manifest, seed: int) -> Connect:
    generator = np.random.default_rng(seed)

    @asynccontextmanager
    async def opened(name: str) -> AsyncIterator[Any]:
        async with connect(name) as transport:
            yield _HostileTransport(transport, twist, manifest, generator)

    def connect_to_harm(name: str) -> AbstractAsyncContextManager[Transport]:
        return opened(name)

    return connect_to_harm


async def federate(partition: str, attack: str, *, count: int, rules: bool, data: Path, folder: Path) -> Row:
    of = partial(settings_for, partition, rules=rules, data=data, folder=folder)
    _, manifest, _ = initial(task_of(of()), of().task.data, 0)
    onlooker = Onlooker()
    began = time.perf_counter()

    def way(index: int, connect: Connect) -> Connect:
        return hostile(connect, ATTACKS[attack], manifest, index) if index < count else connect

    await live(of, onlooker, way=way)
    with open_ledger_for_reading(sqlite_url(folder / "aggregator" / "ledger.db")) as ledger:
        entries = [entry for entry in ledger.entries_without_payloads() if entry.kind == "update"]
        suspended = len(ledger.entries_of("suspension"))
    bad = set(PARTIES[:count])
    last = onlooker.points[-LAST_EVALUATIONS:]
    return Row(
        partition=partition,
        attack=attack,
        hostile=count,
        rules=rules,
        accuracy=sum(point.accuracy for point in last) / len(last),
        honest_less=_less([entry for entry in entries if entry.party not in bad]),
        hostile_less=_less([entry for entry in entries if entry.party in bad]),
        suspended=suspended,
        seconds=time.perf_counter() - began,
    )


def _less(entries: list[Any]) -> float:
    """The share that counted less, or was refused for what it was."""
    less = [entry for entry in entries if entry.reason in ("norm", "direction", "outlier", "bounds")]
    return len(less) / len(entries) if entries else 0.0


def measure(data: Path, *, attacks: list[str], partitions: list[str], count: int) -> list[Row]:
    rows = []
    for partition in partitions:
        for attack in attacks:
            for rules in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    made = federate(
                        partition, attack, count=0 if attack == "none" else count, rules=rules, data=data, folder=Path(folder)
                    )
                    rows.append(uvloop.run(made))
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__ or "")
    arguments.add_argument("--data", type=Path, required=True, help="folder with FashionMNIST/raw")
    arguments.add_argument("--attack", choices=list(ATTACKS), action="append", help="only this one; may be repeated")
    arguments.add_argument("--partition", choices=sorted(PARTITIONS), action="append", help="only this one; may be repeated")
    arguments.add_argument("--hostile", type=int, default=3, help="of the ten parties")
    given = arguments.parse_args()
    configure_logs(LogLevel.ERROR, LogFormat.CONSOLE)
    attacks, partitions = given.attack or list(ATTACKS), given.partition or ["iid"]
    rows = measure(given.data, attacks=attacks, partitions=partitions, count=given.hostile)
    show("Hostile parties, with the rules of trust and without", rows, json_file=given.json)


if __name__ == "__main__":
    main()
