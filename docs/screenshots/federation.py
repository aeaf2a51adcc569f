"""A federation to take pictures of: a private RabbitMQ, two aggregators, three parties at work, one away and one hostile."""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain, cycle
from pathlib import Path

import numpy as np
from pydantic import SecretStr

from broker_fl.config import load_settings
from broker_fl.errors import BrokerError
from broker_fl.keys import key_of
from broker_fl.management import Management
from broker_fl.signing import SIGNATURE, SigningKey, payload_digest, update_statement
from broker_fl.tasks.module import initial
from broker_fl.tasks.registry import load_task
from broker_fl.topology import Binding, Names, Queue, Topology, aggregator_permissions
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ, local_rabbitmq
from broker_fl.transports.transport import Delivery, Header, Message
from schemas import wire
from schemas.manifest import Manifest
from schemas.update import ModelUpdate

NAMES = Names("hospitals")
LOOK = NAMES.own_of("look")
"""A queue that an operator bound to one party's exchange, to see what it sends."""

HOSTILE = "hospital-x"
AT_WORK = ("hospital-a", "hospital-b", "hospital-c")

_PARTIES = (
    ("hospital-a", "St. Anna, radiology", "north"),
    ("hospital-b", "City hospital", "north"),
    ("hospital-c", "Lake clinic", "south"),
    ("hospital-d", "Hill clinic", "south"),
    (HOSTILE, "Joined last week", "south"),
)
_BEGINS_WELL = ("good", "good")
_THEN = ("non_finite", "outlier", "signature", "codec", "malformed")
_FIRST_ATTACK_VERSION = 20
"""By then the aggregator knows how large updates usually are."""

_PATIENCE_S = 900.0
_STATISTICS_MS = 5000
"""As RabbitMQ has it: from figures that are 1 s apart the console computes no rates for its lists."""


@asynccontextmanager
async def hospitals(folder: Path) -> AsyncIterator[LocalRabbitMQ]:
    """When its body starts, all are at work but the one that is away, and the hostile one, who was suspended. `folder` is where
    `broker-fl` finds the settings. Everything ends with the body."""
    async with (
        local_rabbitmq(statistics_interval_ms=_STATISTICS_MS) as node,
        Management(node.management_url, vhost=NAMES.federation) as management,
    ):
        await management.put_vhost()
        await _configure(folder, node, management)
        for name, display_name, group in _PARTIES:
            await _broker_fl(folder, "party", "add", name, "--display-name", display_name, "--group", group)
        await management.apply(Topology((), (Queue(LOOK, "classic"),), (Binding(NAMES.up(AT_WORK[0]), LOOK),)))
        async with AsyncExitStack() as running:
            for name, says in (("leader", "aggregator is up"), ("standby", "standing by")):
                await running.enter_async_context(_running(folder, name, "aggregator"))
                await _until_it_says(folder / f"{name}.log", says)
            for number, name in enumerate(AT_WORK, start=1):
                worker = ("worker", "--enrolment", f"{name}.toml", "--share", f"{number}/{len(AT_WORK)}", "--threads", "1")
                own = ("--set", "partition.scheme=iid", "--set", "worker.throttle=12")
                await running.enter_async_context(_running(folder, name, *worker, *own))
            await _attack(folder / f"{HOSTILE}.toml")
            yield node


async def _configure(folder: Path, node: LocalRabbitMQ, management: Management) -> None:
    user, password = "aggregator", secrets.token_hex(16)
    await management.put_user(user, SecretStr(password))
    await management.put_permissions(user, aggregator_permissions(NAMES.federation))
    url = f"amqp://{user}:{password}@127.0.0.1:{node.amqp_port}/{management.vhost}"
    settings: dict[str, dict[str, object]] = {
        "federation": {"name": NAMES.federation},
        "broker": {"url": url, "management_url": node.management_url},
        "training": {"epochs": 1},
        "merging": {"max_staleness": 8},
        "aggregator": {"broadcast_every_merges": 3},
    }
    lines: list[str] = []
    for section, keys in settings.items():
        # Strings and numbers are written in TOML as they are in JSON.
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    await asyncio.to_thread((folder / "federation.toml").write_text, "\n".join(lines))


async def _broker_fl(folder: Path, *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(*_command(*arguments), cwd=folder)
    if await process.wait():
        raise RuntimeError(f"broker-fl {' '.join(arguments)} ended with {process.returncode}")


def _command(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-P", "-m", "broker_fl", *arguments


@asynccontextmanager
async def _running(folder: Path, name: str, *arguments: str) -> AsyncIterator[None]:
    output = await asyncio.to_thread((folder / f"{name}.log").open, "wb")
    with output:
        process = await asyncio.create_subprocess_exec(*_command(*arguments), cwd=folder, stdout=output, stderr=output)
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_it_says(file: Path, text: str) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            if text in await asyncio.to_thread(file.read_text):
                return
            await asyncio.sleep(0.2)


async def _attack(party_file: Path) -> None:
    """Two updates as they should be, and then worse and worse ones, until the aggregator has had enough of them."""
    settings = load_settings(party_file, environment={})
    if settings.security.party_key is None:
        raise ValueError(f"{party_file} holds no key")
    key = key_of(settings.security.party_key.get_secret_value(), what=str(party_file))
    _, manifest, _ = initial(load_task(settings.task.name), None, settings.task.seed)
    try:
        async with (
            amqp_connect(settings.broker)(f"worker:{HOSTILE}") as transport,
            transport.follow(NAMES.model_log, start="last", name=f"worker:{HOSTILE}") as feed,
            asyncio.timeout(_PATIENCE_S),
        ):
            kinds = enumerate(chain(_BEGINS_WELL, cycle(_THEN)), start=1)
            while True:
                newest = await feed.receive()
                while (newer := feed.receive_nowait()) is not None:
                    newest = newer
                if int(newest.headers["x-fl-version"]) >= _FIRST_ATTACK_VERSION:
                    sequence, kind = next(kinds)
                    await transport.publish(_update(kind, newest, manifest, key, sequence=sequence))
                await asyncio.sleep(1)
    except* BrokerError:
        # Suspended: its connections were closed.
        pass


def _update(kind: str, newest: Delivery, manifest: Manifest, key: SigningKey, *, sequence: int) -> Message:
    vector = np.random.default_rng(sequence).normal(0, 100 if kind == "outlier" else 1e-4, manifest.size).astype(np.float32)
    if kind == "non_finite":
        vector[0] = np.nan
    payload = vector.tobytes()
    update = ModelUpdate(
        federation=NAMES.federation,
        ledger=str(newest.headers["x-fl-ledger"]),
        party=HOSTILE,
        update_id=secrets.token_hex(16),
        sequence=sequence,
        base_version=int(newest.headers["x-fl-version"]),
        base_digest=str(newest.headers["x-fl-digest"]),
        manifest_digest=manifest.digest,
        codec="zip" if kind == "codec" else "float32",
        num_samples=400,
        num_steps=12,
        train_loss=0.1,
        payload=payload,
    )
    body = b"DROP TABLE models" if kind == "malformed" else wire.encode(update)
    signer = SigningKey.generate() if kind == "signature" else key
    headers: dict[str, Header] = {
        "x-fl-party": HOSTILE,
        "x-fl-sequence": sequence,
        "x-fl-base-version": update.base_version,
        "x-fl-codec": update.codec,
        "x-fl-bytes": len(body),
        "x-fl-at": int(time.time() * 1000),
        SIGNATURE: signer.sign("update", update_statement(update, payload_digest=payload_digest(payload))),
    }
    return Message(NAMES.up(HOSTILE), body, message_id=update.update_id, headers=headers)
