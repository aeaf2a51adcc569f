import json
import stat
from pathlib import Path

import pytest
from deployment import DEPLOY, make_secrets

from broker_fl.certificates import Certificates
from broker_fl.config import load_settings
from broker_fl.keys import load_key


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_folder_is_its_owners_and_each_file_in_it_readable_by_a_container(secrets_folder):
    assert stat.S_IMODE(secrets_folder.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in secrets_folder.iterdir() if file.is_file()}
    for_people = {name for name, mode in modes.items() if mode == 0o400}
    assert for_people == {"operator.password", "supervisor.password", "operator.env"}
    assert {mode for name, mode in modes.items() if name not in for_people} == {0o444}
    assert stat.S_IMODE((secrets_folder / "authority" / "ca-key.pem").stat().st_mode) == 0o600
    revocations = list((secrets_folder / "authority" / "crl").iterdir())
    assert [stat.S_IMODE(file.stat().st_mode) for file in revocations] == [0o644]


def test_the_brokers_certificate_is_for_every_name_that_it_is_called_by(secrets_folder):
    records = {record.name: record for record in Certificates.open(secrets_folder / "authority").records()}
    assert set(records["server"].hosts) == {"broker.example.org", "rabbitmq", "localhost", "127.0.0.1"}
    assert records["aggregator"].hosts == records["evaluator"].hosts == ()


def test_no_password_is_in_what_the_broker_gets(secrets_folder):
    logins = (secrets_folder / "logins.json").read_text()
    assert [user["name"] for user in json.loads(logins)["users"]] == ["operator", "supervisor"]
    for name in ("operator", "supervisor"):
        assert (secrets_folder / f"{name}.password").read_text() not in logins


def test_passwords_are_long_and_each_its_own(secrets_folder):
    names = ("postgres_password", "grafana_password", "operator.password", "supervisor.password", "federation.key")
    secrets = [(secrets_folder / name).read_text() for name in names]
    assert [len(secret) for secret in secrets] == [48, 48, 48, 48, 64]
    assert len(set(secrets)) == len(names)
    load_key(secrets_folder / "federation.key")


def test_an_operators_settings_load(secrets_folder, monkeypatch):
    monkeypatch.chdir(secrets_folder.parent)
    lines = (secrets_folder / "operator.env").read_text().splitlines()
    settings = load_settings(environment=dict(line.split("=", 1) for line in lines))
    assert settings.broker.vhost() == "federation"
    assert settings.broker.pem("ca").startswith("-----BEGIN CERTIFICATE-----")
    assert settings.key_file.exists()
    password = (secrets_folder / "operator.password").read_text()
    assert settings.broker.management().get_secret_value() == f"https://operator:{password}@localhost:15671"


def test_said_again_it_keeps_what_is_there_and_makes_what_is_missing(tmp_path):
    assert make_secrets(tmp_path, "a.example.org", "inside.example.org", LEDGER_HOST="db.example.org").returncode == 0
    before = _contents(tmp_path / "secrets")
    assert b"@inside.example.org:15671" in before["management_url"]
    assert b"@db.example.org/" in before["ledger_url"]
    (tmp_path / "secrets" / "grafana_password").unlink()
    assert make_secrets(tmp_path, "b.example.org").returncode == 0
    after = _contents(tmp_path / "secrets")
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["grafana_password"]


@pytest.mark.parametrize("hosts", [(), ("a b",), ("amqps://a.example.org",), ("a.example.org", "b/c")])
def test_what_is_no_host_is_refused_before_anything_is_made(tmp_path, hosts):
    ended = make_secrets(tmp_path, *hosts)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["make_secrets.sh"]


def test_a_command_that_fails_leaves_nothing_half_made(tmp_path):
    ended = make_secrets(tmp_path, "a.example.org", BROKER_FL="false")
    assert ended.returncode != 0
    assert _contents(tmp_path / "secrets") == {}


def test_git_leaves_secrets_alone():
    ignored = (DEPLOY.parent / ".gitignore").read_text().splitlines()
    assert {"deploy/secrets/", "deploy/enrolments/", "deploy/.env"} <= set(ignored)
