"""`broker-fl party` as operators use it, by hand and by scripts; and what a worker notices of it."""

import json
import os
import pty
import stat
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import COMMAND, environment
from small_federation import SmallFederation

from broker_fl.config import load_settings

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]

FACTS = ("--display-name", "Spital Zürich", "--group", "north", "--num-samples", "1200", "--tier", "trusted")


async def test_party_that_is_added_again_stays_as_it_is_or_changes(federation: SmallFederation) -> None:
    await federation.enrol("a")
    file = federation.home("a") / "a.toml"
    before = file.read_bytes()
    add = ("party", "add", "a", "--out", str(federation.home("a")))
    assert await federation.succeeds(*add) == "party a is enrolled already: it stays as it is\n"
    assert await federation.succeeds(*add, *FACTS) == "party a is enrolled already: it has changed\n"
    assert file.read_bytes() == before
    elsewhere = federation.run("party", "add", "a")
    await elsewhere.ends_well()
    assert "there is no a.toml: `broker-fl party rotate a` writes one" in elsewhere.err
    (listed,) = json.loads(await federation.succeeds("party", "list", "--json"))
    facts = {key: listed[key] for key in ("name", "display_name", "group", "num_samples", "tier", "state")}
    assert facts == {
        "name": "a",
        "display_name": "Spital Zürich",
        "group": "north",
        "num_samples": 1200,
        "tier": "trusted",
        "state": "enrolled",
    }
    assert await federation.succeeds("party", "set", "a", "--group", "", "--tier", "probation") == "party a is changed\n"
    shown = json.loads(await federation.succeeds("party", "show", "a", "--json"))
    assert (shown["group"], shown["tier"], shown["num_samples"]) == (None, "probation", 1200)
    wrong = federation.run("party", "set", "a")
    assert await wrong.ends() == 2
    assert "say what to change" in wrong.err


async def test_show_tells_everything_but_secrets(federation: SmallFederation) -> None:
    await federation.enrol("a")
    settings = load_settings(federation.home("a") / "a.toml", environment={})
    password = settings.broker.url.get_secret_value().split(":")[2].split("@")[0]
    user = await federation.management.user("a")
    shown = [await federation.succeeds("party", "show", "a"), await federation.succeeds("party", "show", "a", "--json")]
    for text in shown:
        assert settings.security.aggregator_key in "".join(text.split()).replace("│", "")
        for secret in (password, settings.security.party_key.get_secret_value(), user.password_hash):
            assert secret not in text
    facts = json.loads(shown[1])
    assert (facts["login"], facts["inbox"], facts["connections"]) == ("password", 0, [])
    assert facts["limits"] == {"max-connections": 4, "max-channels": 16}
    assert facts["permissions"]["write"] == r"^fl\.blobs\.up\.a$"


async def test_many_are_added_from_a_file_and_listed_for_people_and_for_scripts(federation: SmallFederation) -> None:
    names = [f"p{number:02}" for number in range(30)]
    federation.enrolled.update(names)
    roster, folder = federation.server / "parties.csv", federation.folder / "files"
    lines = [f"{name},Hospital {name},{'north' if name < 'p10' else 'south'}" for name in names]
    roster.write_text("\n".join(("name,display_name,group", *lines, "")), encoding="utf-8-sig")
    add = ("party", "add", "--from", str(roster), "--out", str(folder))
    said = await federation.succeeds(*add)
    assert said == f"30 parties are enrolled: 30 new, 0 changed, 0 as they were. Their files are in {folder}\n"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(files) == {f"{name}.toml" for name in names}
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}

    (folder / "p29.toml").unlink()
    roster.write_text(roster.read_text().replace("Hospital p00,north", "Hospital p00,west"))
    again = federation.run(*add)
    await again.ends_well()
    assert again.out.startswith("30 parties are enrolled: 0 new, 1 changed, 29 as they were.")
    assert f"1 have no file in {folder}: p29." in again.err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: text for name, text in files.items() if name != "p29.toml"
    }

    assert await federation.succeeds("party", "list") == "".join(f"{name}\n" for name in names)
    assert await federation.succeeds("party", "list", "--group", "west") == "p00\n"
    assert await federation.succeeds("party", "list", "--group", "nobody") == ""
    assert len(json.loads(await federation.succeeds("party", "list", "--json", "--group", "south"))) == 20
    assert "Hospital p17" in on_a_terminal(federation.server, "party", "list")
    status = json.loads(await federation.succeeds("status", "--json"))
    assert {key: status["parties"]["p01"][key] for key in ("display_name", "group", "tier", "suspended")} == {
        "display_name": "Hospital p01",
        "group": "north",
        "tier": "standard",
        "suspended": False,
    }


def on_a_terminal(folder: Path, *arguments: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen((*COMMAND, *arguments), cwd=folder, env=environment({"COLUMNS": "120"}), stdout=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # How Linux says that nobody writes any more.
        while chunk := os.read(ours, 65_536):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0
    return shown.decode()


async def test_file_with_a_mistake_makes_nothing(federation: SmallFederation) -> None:
    roster, folder = federation.server / "parties.csv", federation.folder / "files"
    roster.write_text("name\na\nB\na\n")
    line = await federation.run("party", "add", "--from", str(roster), "--out", str(folder)).ends_with_one_line()
    assert line.startswith(f"{roster}, line 3: 'B' cannot be a party")
    assert line.endswith("; and 1 more wrong lines")
    assert not folder.exists()
    assert not await federation.management.user_exists("a")
    both = federation.run("party", "add", "a", "--from", str(roster))
    assert await both.ends() == 2
    neither = federation.run("party", "add")
    assert await neither.ends() == 2
    assert "name a party" in neither.err


async def test_worker_of_a_suspended_party_waits_and_goes_on_when_it_is_let_in_again(federation: SmallFederation) -> None:
    await federation.enrol("a", "b")
    aggregator, worker, other = federation.aggregator(), federation.worker("a"), federation.worker("b")
    await federation.reaches(10, aggregator, worker, other)
    began = time.monotonic()
    assert (await federation.succeeds("party", "suspend", "a", "--reason", "sends rubbish")).startswith("party a is suspended")
    await worker.says("is suspended or has too many connections")
    assert time.monotonic() - began < 60
    (listed,) = [one for one in json.loads(await federation.succeeds("party", "list", "--json")) if one["name"] == "a"]
    assert (listed["state"], listed["reason"]) == ("suspended", "sends rubbish")
    status = json.loads(await federation.succeeds("status", "--json"))
    assert (status["parties"]["a"]["suspended"], status["parties"]["b"]["suspended"]) == (True, False)
    sent = len(federation.updates("a"))
    await federation.reaches(federation.version + 5, aggregator, worker, other)
    assert len(federation.updates("a")) <= sent + 1
    late = federation.worker("a", "--state", "another")
    assert "is suspended or has too many connections" in await late.ends_with_one_line()
    assert await federation.succeeds("party", "resume", "a") == "party a may log in\n"
    await worker.says("connected", times=2)
    resumed = len(federation.updates("a"))
    while len(federation.updates("a")) < resumed + 3:
        await federation.reaches(federation.version + 1, aggregator, worker, other)
    assert aggregator.is_alive


async def test_rotated_party_goes_on_with_its_new_file_alone(federation: SmallFederation) -> None:
    await federation.enrol("a", "b")
    aggregator, worker, other = federation.aggregator(), federation.worker("a"), federation.worker("b")
    await federation.reaches(5, aggregator, worker, other)
    file = federation.home("a") / "a.toml"
    said = await federation.succeeds("party", "rotate", "a", "--out", str(file))
    assert said == f"party a has new credentials, in {file}; the old ones are no good any more\n"
    assert "refuses the login of 'a'" in await worker.ends_with_one_line()
    sent = len(federation.updates("a"))
    again = federation.worker("a")
    while len(federation.updates("a")) < sent + 3:
        await federation.reaches(federation.version + 1, aggregator, again, other)
    refused = [entry for entry in federation.updates("a")[sent:] if entry.outcome == "refused"]
    # What the old key had signed and nobody had answered.
    assert len(refused) <= 1


async def test_laptop_without_the_federations_key_makes_no_second_one(federation: SmallFederation) -> None:
    await federation.enrol("a")
    laptop = federation.folder / "laptop"
    laptop.mkdir()
    (laptop / "federation.toml").write_text((federation.server / "federation.toml").read_text())
    line = await federation.run("party", "add", "b", folder=laptop).ends_with_one_line()
    assert "is signed by the key" in line
    assert "[security] key" in line
    assert not list(laptop.glob("**/*.key"))
    listing = federation.run("party", "list", folder=laptop)
    await listing.ends_well()
    assert (listing.out, "signatures were not checked" in listing.err) == ("a\n", True)
