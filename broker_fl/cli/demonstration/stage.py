"""Where a demo plays: a given RabbitMQ, a private one, or the broker in this process."""

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from broker_fl import topology
from broker_fl.certificates import Certificates
from broker_fl.cli.demonstration.members import Member, ProcessMember, TaskMember
from broker_fl.cli.demonstration.plan import Demo, merged
from broker_fl.cli.options import Flags
from broker_fl.config import PEM_KEYS, BrokerSettings, load_settings
from broker_fl.enrolment import (
    Certificate,
    Issue,
    Office,
    PartyFiles,
    add_parties,
    list_parties,
    open_office,
    party_facts,
    remove_party,
)
from broker_fl.errors import ConfigurationError
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import NodeTls, find_rabbitmq, local_rabbitmq
from broker_fl.transports.memory import MemoryBroker
from broker_fl.transports.transport import Connect

URL_VARIABLE = "BROKER_FL_BROKER__URL"
MANAGEMENT_VARIABLE = "BROKER_FL_BROKER__MANAGEMENT_URL"

_LOG_SEGMENT_BYTES = 64 << 20
"""Of the in-memory model log."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stage:
    demo: Demo
    broker: str
    """What it is, for people and for the summary."""
    federation: str
    connect: Connect
    """As one who may listen to the events."""
    aggregator: Member
    workers: dict[str, Member]
    beside: tuple[Member, ...]
    """Who ends with the federation: the evaluator, where it is no child of the aggregator."""
    online: Callable[[], Awaitable[set[str]]]
    """The parties that are connected."""


@asynccontextmanager
async def set_stage(
    demo: Demo, broker: str, *, amqp_port: int | None, management_port: int | None, say: Say
) -> AsyncIterator[Stage]:
    """`broker` is auto, memory or an AMQP URL. Everything that was made goes at the end, unless the demo keeps it."""
    given = os.environ.get(URL_VARIABLE) if broker == "auto" and not demo.tls else broker
    if demo.tls and (broker != "auto" or find_rabbitmq() is None):
        raise ConfigurationError("--tls sets up a private RabbitMQ node, which must be installed: it goes without --broker")
    if given is not None and given.startswith(("amqp://", "amqps://")):
        async with _given_rabbitmq(demo, given, say=say) as stage:
            yield stage
    elif broker == "auto" and find_rabbitmq() is not None:
        async with _private_rabbitmq(demo, amqp_port=amqp_port, management_port=management_port, say=say) as stage:
            yield stage
    elif broker in ("auto", "memory"):
        if broker == "auto":
            say("RabbitMQ is not installed here: the broker is an in-memory one, and everything runs in this one process.")
        yield _in_memory(demo)
    else:
        raise ConfigurationError(f"--broker {broker!r}: expected auto, memory or amqp://user:password@host:port/vhost")


@asynccontextmanager
async def _private_rabbitmq(demo: Demo, *, amqp_port: int | None, management_port: int | None, say: Say) -> AsyncIterator[Stage]:
    say("starting a private RabbitMQ node ...")
    authority = Certificates.make(demo.folder / "certs") if demo.tls else None
    tls = None if authority is None else _tls_of_node(authority)
    async with local_rabbitmq(amqp_port=amqp_port, management_port=management_port, keep=demo.keep, tls=tls) as node:
        settings = BrokerSettings(url=SecretStr(node.url), management_url=SecretStr(node.management_url))
        console = f"{'http' if authority is None else 'https'}://127.0.0.1:{node.management_port}"
        if authority is not None:
            settings = settings.model_copy(update=_login(authority, node.user))
            say(f"mutual TLS: everyone logs in by a certificate, and the console has one of the same CA, {settings.ca}")
        say(f"management console: {console}  login {node.user}  password {node.password.get_secret_value()}")
        issue = None if authority is None else _issuer(authority)
        async with _enrolled(demo, settings, federation="demo", kind="private RabbitMQ", issue=issue) as stage:
            yield stage
        if demo.keep:
            say(f"the broker stays up: {console}. End it by `kill {node.pid} {node.epmd_pid}`, then delete {node.folder}")


def _tls_of_node(authority: Certificates) -> NodeTls:
    certificate, key = authority.keep(authority.issue("broker", hosts=("127.0.0.1", "localhost")))
    return NodeTls(authority.folder / "ca.pem", certificate, key, authority.revocations)


def _login(authority: Certificates, user: str) -> dict[str, object]:
    """As settings."""
    certificate, key = authority.keep(authority.issue(user))
    ca = authority.folder / "ca.pem"
    return {"ca": str(ca), "certificate": str(certificate), "certificate_key": SecretStr(str(key))}


def _issuer(authority: Certificates) -> Issue:
    def issue(name: str) -> Certificate:
        issued = authority.issue(name)
        return Certificate(issued.certificate_pem, issued.key_pem)

    return issue


@asynccontextmanager
async def _given_rabbitmq(demo: Demo, url: str, *, say: Say) -> AsyncIterator[Stage]:
    management = os.environ.get(MANAGEMENT_VARIABLE)
    settings = load_settings(flags={"broker": {"url": url, "management_url": management}}, environment={}).broker
    federation = f"demo-{secrets.token_hex(3)}"
    say(f"using the RabbitMQ at {settings.address()}, federation {federation}")
    # Logins are the whole broker's: a party of the demo must not be mistaken for one of somebody else's.
    own = replace(demo, prefix=f"{federation}-")
    try:
        async with _enrolled(own, settings, federation=federation, kind="RabbitMQ") as stage:
            yield stage
    finally:
        if not demo.keep:
            await _clean(settings, federation)


@asynccontextmanager
async def _enrolled(
    demo: Demo, broker: BrokerSettings, *, federation: str, kind: str, issue: Issue | None = None
) -> AsyncIterator[Stage]:
    """Parties are enrolled as `broker-fl party add` does it, and the workers read the files that it writes."""
    urls = {"url": broker.url.get_secret_value(), "management_url": broker.management().get_secret_value()}
    access: Flags = {"broker": {**urls, **{key: broker.written(key) or None for key in PEM_KEYS}}}
    common = demo.settings(federation=federation)
    settings = load_settings(flags=merged(common, access), environment={})
    async with open_office(settings) as office:
        management = office.management
        version = (await management.overview()).rabbitmq_version
        enrolments = await _enrol(office, demo, issue)
        aggregator = ProcessMember(
            "aggregator", command="aggregator", flags=merged(common, access), log_file=demo.folder / "aggregator.log"
        )
        workers: dict[str, Member] = {
            name: ProcessMember(
                name,
                command="worker",
                flags=merged(common, demo.of_party(name)),
                arguments=("--enrolment", str(file)),
                log_file=demo.folder / f"{name}.log",
            )
            for name, file in enrolments.items()
        }

        async def online() -> set[str]:
            kinds = [connection.name.partition(":") for connection in await management.connections()]
            return {name for role, _, name in kinds if role == "worker" and name in workers}

        yield Stage(
            demo=demo,
            broker=f"{kind} {version}{'' if issue is None else ' over mutual TLS'}",
            federation=federation,
            connect=amqp_connect(settings.broker),
            aggregator=aggregator,
            workers=workers,
            beside=(),
            online=online,
        )


async def _enrol(office: Office, demo: Demo, issue: Issue | None) -> dict[str, Path]:
    files = {name: demo.folder / f"{name}.toml" for name in demo.names}
    keeper = PartyFiles(office.settings, aggregator_key=office.signing_key().public, file_of=files.__getitem__)
    await add_parties(office, [party_facts(name) for name in demo.names], keeper, issue=issue)
    return files


async def _clean(broker: BrokerSettings, federation: str) -> None:
    settings = load_settings(flags={"federation": {"name": federation}}, environment={})
    async with open_office(settings.model_copy(update={"broker": broker}), signs=False) as office:
        management = office.management
        for party in await list_parties(management, settings):
            await remove_party(office, party)
        for made in (topology.shared(federation), topology.leadership(federation)):
            for queue in made.queues:
                await management.delete_queue(queue.name)
            for exchange in made.exchanges:
                await management.delete_exchange(exchange.name)
        for policy in topology.policies(federation, model_bytes=0):
            await management.delete_policy(policy.name)
        for policy in topology.operator_policies(federation):
            await management.delete_operator_policy(policy.name)
        await management.delete_global_parameter(office.shelf.key_name)


def _in_memory(demo: Demo) -> Stage:
    from broker_fl.cli.wiring import built_aggregator, built_evaluator, built_worker, use_threads

    federation = "demo"
    # The broker is this process, and has no register: there is nobody in between to be kept honest.
    common = merged(demo.settings(federation=federation), {"security": {"signatures": False}})
    broker = MemoryBroker()
    broker.declare(topology.shared(federation))
    broker.apply_policies(topology.policies(federation, model_bytes=_LOG_SEGMENT_BYTES))
    for name in demo.names:
        broker.users[name] = topology.party_permissions(federation, name)
        broker.declare(topology.party(federation, name))

    def connect_as(user: str) -> Connect:
        return lambda name: broker.connect(name, user=user)

    async def aggregate() -> None:
        settings = load_settings(flags=merged(common), environment={})
        use_threads(settings)
        with built_aggregator(settings, connect_as("admin")) as built:
            await built.service.run(built.open_state)

    async def evaluate() -> None:
        await built_evaluator(load_settings(flags=merged(common), environment={}), connect_as("admin")).run()

    def work(name: str) -> Callable[[], Coroutine[Any, Any, None]]:
        async def serve() -> None:
            settings = load_settings(flags=merged(common, demo.of_party(name)), environment={})
            with built_worker(settings, connect_as(name)) as worker:
                await worker.run()

        return serve

    async def online() -> set[str]:
        kinds = [name.partition(":") for name in broker.connections()]
        return {name for role, _, name in kinds if role == "worker"}

    return Stage(
        demo=demo,
        broker="in-memory broker (one process)",
        federation=federation,
        connect=connect_as("admin"),
        aggregator=TaskMember("aggregator", aggregate),
        workers={name: TaskMember(name, work(name)) for name in demo.names},
        beside=(TaskMember("evaluator", evaluate),),
        online=online,
    )
