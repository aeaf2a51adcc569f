import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import pytest

from broker_fl.errors import LocalBrokerError
from broker_fl.management import Management
from broker_fl.topology import Queue, Topology
from broker_fl.transports.local_rabbitmq import BOOT_ATTEMPTS, SERVER_VARIABLE, find_rabbitmq, local_rabbitmq

STARTS_A_NODE = """
import asyncio, json
from broker_fl.transports.local_rabbitmq import local_rabbitmq

async def main():
    async with local_rabbitmq(keep={keep}) as node:
        print(json.dumps([str(node.folder), node.pid, node.epmd_pid]), flush=True)
        if not {keep}:
            await asyncio.sleep(600)

asyncio.run(main())
"""


def runs(pid: int) -> bool:
    """A process that ended, and that nobody has waited for yet, runs no more."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in {"", "Z"}


def until(what: Callable[[], bool], *, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not what() and time.monotonic() < deadline:
        time.sleep(0.1)
    return what()


@dataclass(frozen=True, slots=True)
class Started:
    """A program of its own that started a node, and where that node is."""

    program: subprocess.Popen[str]
    folder: Path
    pids: tuple[int, int]


@pytest.fixture(scope="module")
def started(rabbitmq) -> Iterator[dict[str, Started]]:
    """One program that waits within its node, and one that keeps its node; they boot side by side, to save time."""
    with ExitStack() as stack:
        programs = {name: stack.enter_context(python(keep=name == "keeps")) for name in ("waits", "keeps")}
        for program in programs.values():
            stack.callback(program.kill)
        nodes = {name: started_by(program) for name, program in programs.items()}
        for node in nodes.values():
            stack.callback(clean_up, node)
        yield nodes


def python(*, keep: bool) -> subprocess.Popen[str]:
    program = STARTS_A_NODE.format(keep=keep)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def started_by(program: subprocess.Popen[str]) -> Started:
    folder, *pids = json.loads(program.stdout.readline())
    return Started(program, Path(folder), tuple(pids))


def clean_up(node: Started) -> None:
    for pid in node.pids:
        if runs(pid):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(node.folder, ignore_errors=True)


@pytest.mark.rabbitmq
async def test_node_answers_amqp_and_management_on_loopback(rabbitmq):
    reader, writer = await asyncio.open_connection("127.0.0.1", rabbitmq.amqp_port)
    writer.write(b"AMQP\0\0\x09\x01")
    assert await reader.readexactly(1) == b"\x01"
    writer.close()
    await writer.wait_closed()
    async with await aio_pika.connect(rabbitmq.url):
        pass
    async with Management(rabbitmq.management_url) as management:
        (user,) = [user for user in await management.list_users() if user.name == rabbitmq.user]
    assert user.tags == ("administrator",)


@pytest.mark.rabbitmq
def test_child_is_the_erlang_vm_itself(rabbitmq):
    command = subprocess.run(["ps", "-o", "comm=", "-p", str(rabbitmq.pid)], capture_output=True, text=True)
    assert "beam" in command.stdout


@pytest.mark.rabbitmq
def test_repr_does_not_show_the_password(rabbitmq):
    assert rabbitmq.password.get_secret_value() not in repr(rabbitmq)


@pytest.mark.rabbitmq
async def test_node_keeps_what_is_durable_when_killed_and_leaves_nothing_when_closed():
    async with local_rabbitmq() as node:
        async with Management(node.management_url) as management:
            await management.apply(Topology(queues=(Queue("kept", "quorum"),)))
        await publish_to(node.url, "kept")
        # RabbitMQ 3.10 forgets where a quorum queue's log is when it is killed within a second of the declaration.
        await asyncio.sleep(2)
        killed = node.pid
        node.kill()
        assert not runs(killed)
        await node.start_again()
        assert node.pid != killed
        assert await first_message_in(node.url, "kept") == b"kept"
        pids = (node.pid, node.epmd_pid)
        assert all(runs(pid) for pid in pids)
    assert not any(runs(pid) for pid in pids)
    assert not node.folder.exists()


async def publish_to(url: str, queue: str) -> None:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        message = aio_pika.Message(b"kept", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, queue)


async def first_message_in(url: str, queue: str) -> bytes:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        kept = await channel.get_queue(queue)
        # Right after a restart, a quorum queue's count still says 0.
        async with asyncio.timeout(15), kept.iterator(no_ack=True) as messages:
            return (await anext(messages)).body


@pytest.mark.rabbitmq
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_node_ends_with_the_process_that_started_it_when_that_is_killed(started):
    node = started["waits"]
    assert all(runs(pid) for pid in node.pids)
    node.program.kill()
    assert until(lambda: not any(runs(pid) for pid in node.pids), timeout_s=20)


@pytest.mark.rabbitmq
def test_kept_node_outlives_the_process_that_started_it(started):
    node = started["keeps"]
    assert node.program.wait(10) == 0
    assert all(runs(pid) for pid in node.pids)
    assert (node.folder / "rabbitmq.conf").exists()


@pytest.mark.rabbitmq
async def test_cancelled_start_leaves_nothing(rabbitmq, temporary, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    async def start() -> None:
        async with local_rabbitmq():
            pytest.fail("it must not come so far")

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(start(), 1)
    assert list(temporary.iterdir()) == []
    assert children_with(str(temporary)) == []


def children_with(text: str) -> list[str]:
    processes = subprocess.run(["ps", "-eo", "ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    return [line for line in processes if text in line]


@pytest.mark.rabbitmq
@pytest.mark.parametrize("name", ["amqp_port", "management_port"])
async def test_port_in_use_is_named_at_once(rabbitmq, name):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(LocalBrokerError, match=f"port {port} .*in use"):
            async with local_rabbitmq(**{name: port}):
                pass


@pytest.mark.rabbitmq
async def test_node_that_is_not_ready_in_time_says_how_far_it_came(rabbitmq, temporary, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(LocalBrokerError, match=r"not ready after 0\.1 s") as caught:
        async with local_rabbitmq(boot_timeout_s=0.1):
            pass
    assert "\n" not in str(caught.value)
    assert list(temporary.iterdir()) == []


@pytest.mark.rabbitmq
async def test_server_that_ends_at_once_is_quoted(rabbitmq, tmp_path, monkeypatch):
    server = tmp_path / "rabbitmq-server"
    server.write_text("#!/bin/sh\necho 'no Erlang today' >&2\nexit 3\n")
    server.chmod(0o755)
    monkeypatch.setenv(SERVER_VARIABLE, str(server))
    with pytest.raises(LocalBrokerError, match="status 3 while it started: no Erlang today"):
        async with local_rabbitmq():
            pass


@pytest.mark.rabbitmq
@pytest.mark.parametrize("sign", ["eaddrinuse", "dist_port_already_used", "{'EXIT',nodistribution}"])
async def test_boot_whose_port_somebody_else_took_is_tried_again_with_others(rabbitmq, tmp_path, monkeypatch, sign):
    server, starts = tmp_path / "rabbitmq-server", tmp_path / "starts"
    server.write_text(f'#!/bin/sh\necho started >>"{starts}"\necho "{sign}" >&2\nexit 1\n')
    server.chmod(0o755)
    monkeypatch.setenv(SERVER_VARIABLE, str(server))
    with pytest.raises(LocalBrokerError, match="status 1 while it started"):
        async with local_rabbitmq():
            pass
    assert len(starts.read_text().splitlines()) == BOOT_ATTEMPTS


async def test_missing_server_is_an_error_that_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv(SERVER_VARIABLE, str(tmp_path / "nowhere"))
    assert find_rabbitmq() is None
    with pytest.raises(LocalBrokerError, match=r"apt install rabbitmq-server.*nowhere"):
        async with local_rabbitmq():
            pass
