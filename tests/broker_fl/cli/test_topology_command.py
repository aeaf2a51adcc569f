import base64
import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker_fl.cli.main import app
from broker_fl.config import load_settings
from broker_fl.definitions import federation_definitions
from broker_fl.errors import ConfigurationError

DEPLOY = Path(__file__).parents[3] / "deploy"
BROKER = "amqps://broker.example.org:5671/federation"
AGAIN = f"broker-fl topology definitions --config federation/federation.toml --broker {BROKER} --model-bytes 64MiB"


def _said(*words: str) -> str:
    ended = CliRunner().invoke(app, ["topology", *words], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_what_is_committed_is_what_is_printed(monkeypatch):
    monkeypatch.chdir(DEPLOY)
    printed = _said(*AGAIN.split()[2:])
    committed = (DEPLOY / "rabbitmq" / "definitions.json").read_text(encoding="utf-8")
    assert printed == committed, f"in deploy/: {AGAIN} > rabbitmq/definitions.json"
    assert "--model-bytes 64MiB" in (DEPLOY / "README.md").read_text()


def test_definitions_are_of_the_federation_and_the_virtual_host_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "federation.toml"
    broker, enrolment = 'url = "amqp://x:y@host/one%2Ftwo"', "inbox_messages = 7\nvhost_max_queues = 9"
    file.write_text(f'[federation]\nname = "a"\n[broker]\n{broker}\n[enrolment]\n{enrolment}\n')
    printed = json.loads(_said("definitions", "--config", str(file), "--model-bytes", "1MiB"))
    assert printed["vhosts"] == [{"name": "one/two"}]
    assert all(queue["name"].startswith("fl.a.") for queue in printed["queues"])
    (inbox,) = [one["value"]["definition"] for one in printed["parameters"] if one["name"] == "fl.a.inbox"]
    assert inbox["max-length"] == 7
    assert [one["value"] for one in printed["parameters"] if one["component"] == "vhost-limits"] == [{"max-queues": 9}]
    other = json.loads(_said("definitions", "--config", str(file), "--federation", "b", "--model-bytes", "1MiB"))
    assert all(queue["name"].startswith("fl.b.") for queue in other["queues"])


def test_without_a_size_the_tasks_own_model_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = json.loads(_said("definitions", "--set", "task.name=digits"))
    settings = load_settings(environment={})
    # The smallest segment holds it.
    assert printed == federation_definitions("federation", vhost=settings.broker.vhost(), model_bytes=1 << 20)


def test_users_have_the_names_that_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = json.loads(_said("definitions", "--model-bytes", "1MiB", "--aggregator", "leader", "--evaluator", "judge"))
    assert [user["name"] for user in printed["users"]] == ["leader", "judge"]
    assert [granted["user"] for granted in printed["permissions"]] == ["leader", "judge"]


def test_logins_are_salted_and_hashed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).write_text("correct horse\n")
    printed = json.loads(_said("logins", "x=a", "y=b", "--broker", BROKER, "--tag", "monitoring", "--tag", "policymaker"))
    assert [user["tags"] for user in printed["users"]] == [["monitoring", "policymaker"]] * 2
    kept = [base64.b64decode(user["password_hash"]) for user in printed["users"]]
    assert [one[4:] for one in kept] == [hashlib.sha256(one[:4] + b"correct horse").digest() for one in kept]
    assert kept[0] != kept[1]
    assert printed["vhosts"] == [{"name": "federation"}]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("definitions", "--model-bytes", "many"), "expected a size, as in 64MiB, not 'many'"),
        (("logins", "operator"), "expected NAME=FILE, not 'operator'"),
    ],
)
def test_a_mistake_is_told_in_a_line(words, said):
    ended = CliRunner().invoke(app, ["topology", *words])
    assert ended.exit_code == 2
    assert said in ended.output


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("\n", "is empty"), (b"\xff", "cannot be read")])
def test_a_password_that_is_none_is_a_mistake(tmp_path, content, said):
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=f"the password of 'operator': .*{said}"):
        CliRunner().invoke(app, ["topology", "logins", f"operator={file}"], catch_exceptions=False)
