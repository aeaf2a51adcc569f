"""One private RabbitMQ node and one private PostgreSQL server for all tests of a session; a vhost or a database of its own
for each test that asks for one."""

import asyncio
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from local_postgresql import LocalPostgreSQL, find_postgresql, local_postgresql

from broker_fl.management import Management
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ, find_rabbitmq, local_rabbitmq

VERSION_VARIABLE = "TESTS_RABBITMQ_VERSION"
"""The environment variable that names the version of RabbitMQ which the tests are to run on, and no other."""

DEPRECATED = re.compile(rb"Deprecated features: `(\w+)`")
"""How RabbitMQ (since 3.13) warns of what a later version will not have. Its management plugin is the first to be warned."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every other file of the slow system tests first: jobs begin with equal halves of the list."""
    slow = sorted({item.path for item in items if item.path.parent.name == "system"})
    first = set(slow[::2])
    items.sort(key=lambda item: item.path not in first)


@dataclass(frozen=True, slots=True)
class Vhost:
    name: str
    url: str
    management_url: str
    management: Management
    """As the node's administrator, seeing this vhost."""


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[LocalRabbitMQ]:
    if find_rabbitmq() is None:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent("RabbitMQ is not installed: apt install rabbitmq-server, or brew install rabbitmq")
    # The node belongs to no loop, so one that is at hand for its start and end is enough, and every test has its own.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        opened = local_rabbitmq(max_message_size_bytes=16 << 20, stop_timeout_s=0)
        node = runner.run(opened.__aenter__())
        try:
            runner.run(check_version(node))
            yield node
            assert set(DEPRECATED.findall(node.log.read_bytes())) <= {b"management_metrics_collection"}
        finally:
            runner.run(opened.__aexit__(None, None, None))


async def check_version(node: LocalRabbitMQ) -> None:
    async with Management(node.management_url) as management:
        version = (await management.overview()).rabbitmq_version
    assert version == os.environ.get(VERSION_VARIABLE, version), f"the tests run on RabbitMQ {version}"


@pytest.fixture
async def vhost(rabbitmq: LocalRabbitMQ) -> AsyncIterator[Vhost]:
    name = f"test-{secrets.token_hex(4)}"
    async with Management(rabbitmq.management_url, vhost=name) as management:
        await management.put_vhost()
        try:
            yield Vhost(name, f"{rabbitmq.url}{name}", rabbitmq.management_url, management)
        finally:
            await management.delete_vhost()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[LocalPostgreSQL]:
    if find_postgresql() is None:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent("PostgreSQL is not installed: apt install postgresql, or brew install postgresql@17")
    with local_postgresql() as server:
        yield server


@pytest.fixture
def postgresql_url(postgresql: LocalPostgreSQL) -> Iterator[str]:
    """Of a new and empty database, dropped after the test."""
    with postgresql.database() as url:
        yield url


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Short, since the name of a socket is."""
    folder = Path(tempfile.mkdtemp(prefix="fl-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
