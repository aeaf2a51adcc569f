"""`broker-fl demo`: what it comes to, and that nothing stays behind however it ends."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from command_line import ProcessId, Running, descendants, until
from small_federation import TASKS, SmallFederation

from broker_fl.config import load_settings
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]

SMALL = ("--task", f"{TASKS}:TASK", "--set", "evaluation.enabled=false", "--set", "aggregator.broadcast_every_merges=1")

SUMMARY = {
    "task",
    "broker",
    "parties",
    "parameters",
    "versions",
    "updates_merged",
    "updates_refused",
    "refused_for",
    "duplicates",
    "accuracy",
    "bytes_up",
    "bytes_down",
    "bytes_up_dense_float32",
    "bytes_down_dense_float32",
    "max_staleness_seen",
    "seconds",
    "epsilon_spent",
    "max_epsilon",
    "delta",
}


class WatchedDemo:
    """A demo whose temporary files go to one folder, and all of whose processes are remembered."""

    def __init__(self, running: Running, temporary: Path) -> None:
        self.running = running
        self.temporary = temporary
        self.seen: set[ProcessId] = set()

    def look(self) -> bool:
        """Whether it has ended."""
        self.seen |= descendants(self.running.pid)
        return not self.running.is_alive

    async def gets_under_way(self) -> None:
        await until(lambda: self.look() or re.search(r"version [1-9]", self.running.out), "the demo makes versions")
        assert self.running.is_alive, self.running.report()

    async def ends_well(self) -> None:
        await until(self.look, "the demo ends")
        await self.running.ends_well()

    async def leaves_no_process(self) -> None:
        assert self.seen
        await until(lambda: not self.left(), "the last process of the demo ends", within_s=60)

    def left(self) -> set[ProcessId]:
        return {process for process in self.seen if process.is_alive}


def demo(federation: SmallFederation, temporary: Path, *arguments: str, **variables: str) -> WatchedDemo:
    # Where temporary files go is asked once in a process.
    variables = {"TMPDIR": str(temporary), **variables}
    running = federation.run("demo", *arguments, folder=federation.folder, variables=variables, afresh=True)
    return WatchedDemo(running, temporary)


def left_in(folder: Path) -> list[str]:
    """Without the folder that torch makes when its first optimizer is made."""
    return [str(path) for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


def summary_of(file: Path) -> dict[str, object]:
    summary = json.loads(file.read_text())
    assert set(summary) == SUMMARY
    return summary


async def test_demo_on_a_private_broker_sums_up_and_leaves_nothing(federation: SmallFederation, temporary: Path) -> None:
    file = federation.folder / "summary.json"
    played = demo(federation, temporary, "--parties", "3", "--versions", "24", "--json", str(file))
    await played.ends_well()
    assert played.running.err == ""
    summary = summary_of(file)
    # The same as the tests', wherever that is from.
    assert summary["broker"] == f"private RabbitMQ {(await federation.management.overview()).rabbitmq_version}"
    assert (summary["task"], summary["parties"], summary["versions"], summary["updates_merged"]) == ("digits", 3, 24, 24)
    assert (summary["updates_refused"], summary["refused_for"]) == (0, {})
    assert 0.2 < summary["accuracy"] <= 1
    assert 0 < 5 * summary["bytes_up"] < summary["bytes_up_dense_float32"]
    assert 0 < 5 * summary["bytes_down"] < summary["bytes_down_dense_float32"]
    assert summary["max_staleness_seen"] >= 1
    assert summary["seconds"] > 0
    for sentence in ("party-3 comes late", "party-2 is killed (kill -9)", "party-2 comes back, with what its outbox held"):
        assert sentence in played.running.out
    assert len(played.seen) >= 7
    await played.leaves_no_process()
    assert left_in(temporary) == []


async def test_demo_over_tls_has_no_port_in_the_clear_and_no_password_in_its_files(
    federation: SmallFederation, temporary: Path
) -> None:
    folder, file = federation.folder / "demo", federation.folder / "summary.json"
    arguments = ("--tls", "--parties", "2", "--versions", "6", "--folder", str(folder), "--json", str(file))
    played = demo(federation, temporary, *arguments, *SMALL)
    await played.ends_well()
    summary = summary_of(file)
    assert summary["broker"].startswith("private RabbitMQ ")
    assert summary["broker"].endswith(" over mutual TLS")
    assert (summary["versions"], summary["updates_refused"]) == (6, 0)
    enrolled = load_settings(folder / "party-1.toml", environment={}).broker
    assert enrolled.url.get_secret_value().startswith("amqps://127.0.0.1:")
    assert (enrolled.user(), enrolled.logs_in_by_certificate) == ("party-1", True)
    assert "https://127.0.0.1:" in played.running.out
    await played.leaves_no_process()
    assert left_in(temporary) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("--broker", "memory"), "--tls sets up a private RabbitMQ node"), (("--keep",), "goes with --tls only")],
)
async def test_demo_over_tls_needs_a_node_and_a_folder_that_stay(federation: SmallFederation, arguments, expected) -> None:
    played = federation.run("demo", "--tls", *arguments, folder=federation.folder)
    assert await played.ends() == 2
    assert expected in played.err


def test_demo_in_memory_sums_up_the_same(played: Path) -> None:
    summary = summary_of(played / "summary.json")
    assert summary["broker"] == "in-memory broker (one process)"
    assert (summary["parties"], summary["versions"], summary["updates_merged"]) == (3, 30, 30)
    assert summary["accuracy"] > 0.5
    assert summary["bytes_up"] > 0
    assert summary["bytes_down"] > 0
    assert "The federation is over" in (played / "said").read_text()
    assert sorted(folder.name for folder in (played / "demo").iterdir()) == ["aggregator", "workers"]


async def test_demo_with_a_budget_shows_what_each_party_has_spent(federation: SmallFederation) -> None:
    file = federation.folder / "summary.json"
    budget = ("--epsilon", "8", "--parties", "2", "--versions", "12")
    played = federation.run("demo", "--broker", "memory", *SMALL, *budget, "--json", str(file), folder=federation.folder)
    await played.ends_well()
    summary = summary_of(file)
    assert (summary["max_epsilon"], summary["delta"], summary["updates_refused"]) == (8.0, 1e-5, 0)
    assert set(summary["epsilon_spent"]) == {"party-1", "party-2"}
    assert all(0 < spent <= 8 for spent in summary["epsilon_spent"].values())
    assert re.search(r"epsilon \d\.\d\d to \d\.\d\d of 8", played.out)
    assert "epsilon spent, of 8" in played.out


async def test_demo_that_is_interrupted_leaves_nothing(federation: SmallFederation, temporary: Path) -> None:
    played = demo(federation, temporary, "--parties", "1", *SMALL)
    await played.gets_under_way()
    played.running.interrupt()
    await until(played.look, "the demo ends")
    assert await played.running.ends() == 128 + signal.SIGINT
    assert "Traceback" not in played.running.err
    await played.leaves_no_process()
    assert left_in(temporary) == []


async def test_demo_that_is_killed_leaves_no_process(federation: SmallFederation, temporary: Path) -> None:
    played = demo(federation, temporary, "--parties", "1", *SMALL)
    await played.gets_under_way()
    assert len(played.left()) >= 4
    played.running.kill()
    await played.leaves_no_process()


async def test_demo_that_keeps_its_broker_says_how_to_end_it(federation: SmallFederation, temporary: Path) -> None:
    played = demo(federation, temporary, "--parties", "1", "--versions", "3", "--keep", *SMALL)
    try:
        await played.ends_well()
        said = re.search(r"the broker stays up: (\S+)\. End it by `kill (\d+) (\d+)`, then delete (\S+)", played.running.out)
        assert said is not None
        pids = {int(said[2]), int(said[3])}
        assert pids <= {process.pid for process in played.left()}
        assert left_in(temporary) == [said[4]]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        await played.leaves_no_process()
    finally:
        for process in played.left():
            os.kill(process.pid, signal.SIGKILL)


async def test_demo_on_a_given_broker_tidies_up_after_itself(
    federation: SmallFederation, vhost, rabbitmq: LocalRabbitMQ, temporary: Path
) -> None:
    file = federation.folder / "summary.json"
    given = {"BROKER_FL_BROKER__URL": vhost.url, "BROKER_FL_BROKER__MANAGEMENT_URL": vhost.management_url}
    users = await vhost.management.list_users()
    played = demo(federation, temporary, "--parties", "1", "--versions", "3", "--json", str(file), *SMALL, **given)
    await played.ends_well()
    assert summary_of(file)["broker"].startswith("RabbitMQ ")
    assert f"using the RabbitMQ at 127.0.0.1:{rabbitmq.amqp_port}" in played.running.out
    assert await vhost.management.queues() == ()
    assert await vhost.management.list_users() == users
    assert await vhost.management.global_parameters(f"{vhost.name}:") == {}
    await played.leaves_no_process()
    assert left_in(temporary) == []
