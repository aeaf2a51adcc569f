"""`broker-fl ledger` and `broker-fl model`, on copies of a ledger whose federation is over."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from command_line import COMMAND, environment
from safetensors.numpy import load_file

from broker_fl.cli.main import main

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

DIGEST = r"[0-9a-f]{64}"


class Operator:
    """At a folder with a ledger in `state`. Commands run in this process, but for those that tell how a process ends."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments, state=True):
        """Its exit code, and what it said on standard output and standard error."""
        where = ("--state", "state") if state else ()
        self._monkeypatch.setattr(sys, "argv", ["broker-fl", *arguments, *where])
        self._capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, *self._capsys.readouterr()

    def says(self, *arguments, **more):
        code, out, err = self.run(*arguments, **more)
        assert (code, err) == (0, ""), out + err
        return out

    def mistakes(self, *arguments, **more):
        """The one line on standard error."""
        code, out, err = self.run(*arguments, **more)
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        return err.removeprefix("error: ").rstrip()


@pytest.fixture
def operator(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Operator:
    (ledger,) = (played / "demo").rglob("ledger.db")
    shutil.copytree(ledger.parent, tmp_path / "state")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("BROKER_FL_")]:
        monkeypatch.delenv(name)
    return Operator(tmp_path, monkeypatch, capsys)


def tensors_digest(file):
    """SHA-256 over all tensors in the order of the ledger's layout, as little-endian float32; and the file's metadata."""
    data = Path(file).read_bytes()
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load_file(file)
    with closing(sqlite3.connect("state/ledger.db")) as connection:
        ((layout,),) = connection.execute("SELECT value FROM meta WHERE key = 'layout'").fetchall()
    names = [tensor["name"] for tensor in json.loads(layout)["tensors"]]
    assert sorted(names) == sorted(tensors)
    return hashlib.sha256(b"".join(np.ascontiguousarray(tensors[name], "<f4").tobytes() for name in names)).hexdigest(), about


def first_party(operator):
    return re.findall(r'"party":"([^"]+)"', operator.says("ledger", "export"))[0]


def listed(operator):
    return {row["version"]: row for row in map(json.loads, operator.says("model", "list", "--json").splitlines())}


def test_ledger_of_a_federation_that_is_over_is_verified(operator):
    said = operator.says("ledger", "verify").splitlines()
    assert re.fullmatch(
        r"state/ledger.db: \d+ entries \(30 merged, 0 buffered, \d+ refused\), \d+ frames, \d+ snapshots: .*", said[0]
    )
    assert said[1] == "0 updates are signed by their parties, by keys that the federation vouches for; 30 are unsigned"
    assert re.fullmatch(rf"chain {DIGEST}", said[2])
    assert re.fullmatch(rf"version 30 is {DIGEST}", said[3])
    assert len(said) == 4


def test_exported_ledger_is_confirmed_by_sha256_and_text_alone(operator):
    assert operator.says("ledger", "export", "--out", "ledger.jsonl") == "wrote ledger.jsonl\n"
    text = (operator.folder / "ledger.jsonl").read_text()
    assert text == operator.says("ledger", "export")
    first, *entries = text.splitlines()
    place = hashlib.sha256(first.encode()).digest()
    for entry in entries:
        said, _, chain = entry.rpartition(',"chain":"')
        place = hashlib.sha256(place + f"{said}}}".encode()).digest()
        assert chain == f'{place.hex()}"}}'
    assert f"chain {place.hex()}" in operator.says("ledger", "verify")


def test_versions_are_listed_for_people_and_for_programs(operator):
    found = listed(operator)
    assert {0, 30} <= set(found)
    assert found[30]["frame"]
    assert re.fullmatch(DIGEST, found[30]["digest"])
    shown = operator.says("model", "list", "--last", "1")
    assert "30" in shown
    assert f"and {len(found) - 1} before them: --last {len(found)} shows all" in shown


@pytest.mark.parametrize("version", [0, 17, 30, None])
def test_exported_version_is_a_safetensors_file_whose_tensors_have_the_digest_that_was_said(operator, version):
    which = () if version is None else ("--version", str(version))
    said = operator.says("model", "export", *which, "--out", "model.safetensors")
    model, about = tensors_digest("model.safetensors")
    assert said == f"wrote model.safetensors: version {30 if version is None else version}, {model}\n"
    assert about["version"] == str(30 if version is None else version)
    assert all(tensor.dtype == np.float32 for tensor in load_file("model.safetensors").values())
    if version in (30, None):
        assert f"version 30 is {model}" in operator.says("ledger", "verify")
    if version == 0:
        assert model == listed(operator)[0]["digest"]


def test_without_a_name_the_exported_file_is_named_by_its_version(operator):
    assert operator.says("model", "export", "--version", "3").startswith("wrote model-v3.safetensors: ")
    assert (operator.folder / "model-v3.safetensors").exists()


def test_model_without_a_party_is_written_with_its_name(operator):
    party = first_party(operator)
    said = operator.says("model", "replay", "--without", party)
    file = f"model-v30-without-{party}.safetensors"
    model, about = tensors_digest(file)
    assert said == f"wrote {file}: version 30, {model}\n"
    assert about["without"] == party
    assert f"version 30 is {model}" not in operator.says("ledger", "verify")


def test_rolled_back_version_is_the_newest_one_and_can_be_verified_exported_and_listed(operator):
    operator.says("model", "export", "--version", "12", "--out", "12.safetensors")
    model, _ = tensors_digest("12.safetensors")
    said = operator.says("model", "rollback", "--to", "12").splitlines()
    assert said[0] == f"version 31 has the model of version 12, which is {model}"
    assert said[1].startswith("updates trained from the versions in between will be refused")
    operator.says("model", "export", "--out", "31.safetensors")
    assert tensors_digest("31.safetensors")[0] == model
    assert f"version 31 is {model}" in operator.says("ledger", "verify")
    found = listed(operator)
    assert found[31]["goes_back_to"] == 12
    assert found[30]["is_rolled_back"]
    assert not found[31]["is_rolled_back"]
    shown = operator.says("model", "list")
    assert "back to 12" in shown
    assert "rolled back" in shown


def test_compacted_ledger_says_what_is_left_and_keeps_its_chain(operator):
    before = operator.says("ledger", "verify").splitlines()
    export = operator.says("ledger", "export")
    said = operator.says("ledger", "compact", "--keep", "0")
    assert re.fullmatch(
        r"state/ledger.db: dropped \d+ payloads \([\d,]+ bytes\), \d+ frames and 1 snapshots; versions from 30 on can still be "
        r"made again\n",
        said,
    )
    after = operator.says("ledger", "verify").splitlines()
    assert after[1] == "replayed from version 30: what came before was compacted, and is in the chain only"
    assert after[2:] == before[1:]
    assert operator.says("ledger", "export") == export
    assert "version 29 was compacted away" in operator.mistakes("model", "export", "--version", "29")
    assert "was compacted away" in operator.mistakes("model", "rollback", "--to", "12")
    assert "all before entry" in operator.mistakes("model", "replay", "--without", first_party(operator))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("model", "export", "--version", "31"), "version 31 was never made: state/ledger.db has versions 0 to 30"),
        (("model", "rollback", "--to", "31"), "version 31 was never made: state/ledger.db has versions 0 to 30"),
        (("model", "rollback", "--to", "30"), "version 30 is the newest one: there is nothing to go back from"),
        (("model", "replay", "--without", "nobody"), "no update of party 'nobody' went into the model of state/ledger.db"),
        (("ledger", "export", "--out", "no-folder/ledger.jsonl"), "no-folder/ledger.jsonl cannot be written"),
        (("model", "export", "--out", "no-folder/model.safetensors"), "no-folder/model.safetensors cannot be used"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(operator, arguments, expected):
    before = operator.says("ledger", "export")
    assert expected in operator.mistakes(*arguments)
    assert operator.says("ledger", "export") == before
    assert [file.name for file in operator.folder.iterdir()] == ["state"]


@pytest.mark.parametrize(
    "command", [("ledger", "export"), ("model", "export"), ("model", "replay", "--without", "party-1")], ids=" ".join
)
def test_file_that_exists_is_never_written_over(operator, command):
    if "replay" in command:
        command = (*command[:-1], first_party(operator))
    file = operator.folder / "out"
    file.write_text("precious")
    assert operator.mistakes(*command, "--out", "out") == "out exists already: move it away first"
    assert file.read_text() == "precious"


COMMANDS = (
    ("ledger", "verify"),
    ("ledger", "export"),
    ("ledger", "compact", "--keep", "5"),
    ("model", "list"),
    ("model", "export"),
    ("model", "rollback", "--to", "1"),
    ("model", "replay", "--without", "a"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_ledger_there_is_said_and_none_is_made(operator, command):
    said = operator.mistakes(*command, "--state", "elsewhere", state=False)
    assert said == "there is no ledger at elsewhere/ledger.db: name the aggregator's folder by --state, or its --ledger"
    assert [file.name for file in operator.folder.iterdir()] == ["state"]


@pytest.mark.parametrize("command", [("ledger", "verify"), ("model", "rollback", "--to", "1")], ids=" ".join)
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ledger.db", "expected a database URL"),
        (
            "postgresql+nosuch://a:hidden@127.0.0.1/fl",
            "postgresql+nosuch://a:***@127.0.0.1/fl needs a driver that is not installed",
        ),
        ("nosuch://a:hidden@127.0.0.1/fl", "expected a database URL"),
        ("postgresql+psycopg://a:hidden@127.0.0.1:port/fl", "expected a database URL"),
        ("postgresql+psycopg://a:hidden:more@127.0.0.1:1/fl", "postgresql+psycopg://a:***@127.0.0.1:1/fl does not answer"),
    ],
)
def test_ledger_that_cannot_be_opened_is_named_without_its_password(operator, command, url, expected):
    said = operator.mistakes(*command, "--ledger", url, state=False)
    assert said.startswith(expected)
    assert "hidden" not in said


def test_sqlite_by_a_driver_that_is_not_there_is_named(operator):
    said = operator.mistakes("model", "rollback", "--to", "1", "--ledger", "sqlite+nosuch:///state/ledger.db")
    assert "needs a driver that is not installed" in said


def test_file_of_another_kind_is_no_ledger(operator):
    (operator.folder / "state" / "ledger.db").write_bytes(b"This is no database." * 1000)
    for command in COMMANDS:
        assert "ledger.db" in operator.mistakes(*command)


def test_ledger_that_was_changed_is_named_and_no_file_is_left_behind(operator):
    with closing(sqlite3.connect("state/ledger.db")) as connection, connection:
        connection.execute("UPDATE entries SET weight = 1.0 WHERE seq = 9")
    for command in (("ledger", "verify"), ("model", "export", "--version", "17"), ("ledger", "export", "--out", "ledger.jsonl")):
        assert "entry 9 is not what was written" in operator.mistakes(*command)
    assert [file.name for file in operator.folder.iterdir()] == ["state"]


def test_processes_end_with_0_where_all_is_well_and_with_2_and_one_line_where_it_is_not(operator):
    def told(*arguments):
        return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment(), cwd=operator.folder)

    good = told("model", "export", "--state", "state", "--out", "model.safetensors")
    assert (good.returncode, good.stderr) == (0, "")
    assert tensors_digest("model.safetensors")[0] in good.stdout
    bad = told("model", "export", "--state", "state", "--out", "model.safetensors")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: model.safetensors exists already: move it away first\n"
