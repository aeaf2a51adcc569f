"""A federation of its own for each test, with what its processes said where the test fails."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from command_line import COMMAND, environment
from small_federation import TASKS, SmallFederation

from broker_fl.management import Management
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ, local_rabbitmq


@pytest.fixture
async def federation(vhost, tmp_path: Path) -> AsyncIterator[SmallFederation]:
    small = SmallFederation(tmp_path, url=vhost.url, management_url=vhost.management_url, management=vhost.management)
    try:
        yield small
    finally:
        await small.end()
        sys.stdout.write(small.report())  # pytest shows it where the test failed.


@pytest.fixture(scope="module")
def own_node(rabbitmq: LocalRabbitMQ) -> Iterator[LocalRabbitMQ]:
    """A node that tests may kill, which the others' must not be."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        opened = local_rabbitmq(stop_timeout_s=0)
        node = runner.run(opened.__aenter__())
        try:
            yield node
        finally:
            runner.run(opened.__aexit__(None, None, None))


@pytest.fixture
async def federation_on_own_node(own_node: LocalRabbitMQ, tmp_path: Path) -> AsyncIterator[SmallFederation]:
    async with Management(own_node.management_url, vhost="test") as management:
        await management.put_vhost()
        url = f"{own_node.url}test"
        small = SmallFederation(tmp_path, url=url, management_url=own_node.management_url, management=management)
        try:
            yield small
        finally:
            await small.end()
            await management.delete_vhost()
            sys.stdout.write(small.report())


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a demo that was played in memory: the folder `demo`, and the files `summary.json` and `said`. Only to read and copy."""
    folder = tmp_path_factory.mktemp("played")
    arguments = ["--broker", "memory", "--task", f"{TASKS}:TASK", "--parties", "3", "--versions", "30", "--partition", "iid"]
    files = ["--folder", str(folder / "demo"), "--json", str(folder / "summary.json")]
    told = subprocess.run([*COMMAND, "demo", *arguments, *files], capture_output=True, text=True, env=environment(), cwd=folder)
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stderr == ""
    (folder / "said").write_text(told.stdout)
    return folder
