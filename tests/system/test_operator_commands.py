"""What an operator does beside the runs: init, party, status, and reading the help."""

import asyncio
import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Running, environment
from small_federation import SmallFederation

from broker_fl.cli.main import app
from broker_fl.config import Settings, load_settings

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


@pytest.mark.rabbitmq
async def test_init_writes_settings_that_load_and_never_writes_over_them(federation: SmallFederation) -> None:
    folder = federation.folder
    said = await federation.succeeds("init", folder=folder)
    assert said.startswith("wrote federation.toml\nnext: broker-fl party add NAME")
    file = folder / "federation.toml"
    assert isinstance(load_settings(file, environment={}), Settings)
    written = file.read_text()
    line = await federation.run("init", folder=folder).ends_with_one_line()
    assert line.startswith("federation.toml exists already")
    assert file.read_text() == written


@pytest.mark.rabbitmq
async def test_party_is_added_listed_and_removed(federation: SmallFederation) -> None:
    await federation.enrol("a", "b")
    file = federation.home("a") / "a.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load_settings(file, environment={}).worker.party == "a"
    assert await federation.succeeds("party", "list") == "a\nb\n"
    mistakes = {
        ("add", "Not A Name"): "'Not A Name' cannot be a party",
        ("add", "c", "--out", str(file)): "c: there is a file of an earlier enrolment",
        ("add", "c", "--tier", "trustd"): "tier 'trustd': did you mean 'trusted'?",
        ("set", "c", "--group", "north"): "no party 'c' in federation 'blobs': `broker-fl party list` shows all",
        ("show", "c"): "no party 'c' in federation 'blobs'",
        ("rotate", "c"): "no party 'c' in federation 'blobs'",
        ("suspend", "c"): "no party 'c' in federation 'blobs'",
        ("resume", "c"): "no party 'c' in federation 'blobs'",
        ("remove", "c"): "no party 'c' in federation 'blobs': `broker-fl party list` shows all",
    }
    started = {expected: federation.run("party", *arguments) for arguments, expected in mistakes.items()}
    for expected, running in started.items():
        assert expected in await running.ends_with_one_line()
    assert await federation.succeeds("party", "remove", "a") == "party a is removed\n"
    assert await federation.succeeds("party", "list") == "b\n"
    assert not await federation.management.user_exists("a")


@pytest.mark.rabbitmq
async def test_status_tells_of_versions_parties_and_queues_and_a_removed_party_is_out_at_once(
    federation: SmallFederation,
) -> None:
    await federation.enrol("a")
    before = json.loads(await federation.succeeds("status", "--json"))
    assert (before["version"], before["aggregator_online"], list(before["parties"])) == (None, False, ["a"])
    assert [missing for missing in before["missing"] if missing.startswith("versions, bytes and staleness: no ledger at")]

    aggregator, worker = federation.aggregator(), federation.worker("a")
    await federation.reaches(5, aggregator, worker)
    await until_connections_are_counted(federation)
    status = json.loads(await federation.succeeds("status", "--json"))
    assert status["federation"] == "blobs"
    assert status["broker"].startswith("RabbitMQ ")
    assert status["version"] >= 5
    assert status["frames"] >= 5
    assert status["frame_bytes"] > 0
    assert status["frame_codec"] == "topk:0.05+int8"
    assert status["keyframes"] >= 1
    assert status["keyframe_bytes"] > 0
    assert status["keyframe_codec"] == "float32"
    assert (status["aggregator_online"], status["is_over"], status["missing"]) == (True, False, [])
    assert re.fullmatch(r"aggregator on .+, pid \d+", status["leader"])
    party = status["parties"]["a"]
    assert party["online"]
    assert party["merged"] >= 5
    assert party["refused"] == 0
    assert party["bytes_up"] > 0
    kinds = {queue["name"]: queue["kind"] for queue in status["queues"]}
    expected = {
        "fl.blobs.updates": "quorum",
        "fl.blobs.model.log": "stream",
        "fl.blobs.keyframes.log": "stream",
        "fl.blobs.inbox.a": "classic",
    }
    assert {name: kinds.get(name) for name in expected} == expected
    shown = await federation.succeeds("status")
    assert all(text in shown for text in ("blobs on RabbitMQ", "aggregator online", "Parties", "fl.blobs.updates"))

    await federation.succeeds("party", "remove", "a")
    assert "refuses the login of 'a': wrong password, or not enrolled" in await worker.ends_with_one_line()
    assert aggregator.is_alive


async def until_connections_are_counted(federation: SmallFederation) -> None:
    """The management API knows of a connection some seconds after it was opened."""
    async with asyncio.timeout(60):
        names: set[str] = set()
        while not {"aggregator:blobs", "worker:a"} <= names:
            await asyncio.sleep(0.2)
            names = {connection.name for connection in await federation.management.connections()}


def commands_of(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands and groups by what a user types."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands_of(command, (*path, name))


async def test_help_of_every_command_names_every_option_and_what_it_does(tmp_path: Path) -> None:
    commands = dict(commands_of(typer.main.get_command(app)))
    assert {("demo",), ("party", "add"), ("ledger", "verify")} <= set(commands)
    narrow = {"COLUMNS": "80", "TERM": "dumb"}
    asked = {
        path: Running(*path, "--help", name="-".join(("help", *path)), logs=tmp_path, folder=tmp_path, variables=narrow)
        for path in commands
    }
    for path, running in asked.items():
        await running.ends_well()
        said = " ".join(running.out.split())
        assert "…" not in said
        for parameter in commands[path].params:
            if getattr(parameter, "hidden", False):
                continue
            assert all(name in said for name in (*parameter.opts, *parameter.secondary_opts)), (path, parameter.name)
            assert parameter.help, (path, parameter.name)
            assert " ".join(parameter.help.split()) in said, (path, parameter.name)


def test_importing_the_package_and_the_command_line_loads_no_torch() -> None:
    for module in ("broker_fl", "broker_fl.cli.main"):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
        assert subprocess.run([sys.executable, "-P", "-c", code], env=environment()).returncode == 0
