"""The file that lets a party in."""

import base64
import hashlib
import os
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker_fl.config import Settings, load_settings
from broker_fl.enrolment import Certificate, Credentials, PartyFiles, make_folder_of_files
from broker_fl.enrolment.credentials import new_credentials, read_credentials
from broker_fl.errors import ConfigurationError
from broker_fl.management import User
from broker_fl.signing import SigningKey

ADMINISTRATOR = "amqps://admin:secret-of-admin@broker.example:5671/my%2Fvhost?cafile=ca.pem"
CONSOLE = "https://admin:secret-of-admin@broker.example:15671"
FEDERATION_KEY = "ab" * 32
KEY = SigningKey.generate()
PASSWORD = "correct-horse_1/ä"
PEM = "-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n"


def files(folder: Path, url: str = ADMINISTRATOR, **sections: dict[str, object]) -> PartyFiles:
    broker = {"url": url, "management_url": CONSOLE, **sections.pop("broker", {})}
    flags = {"federation": {"name": "scans"}, "broker": broker, **sections}
    return PartyFiles(
        load_settings(flags=flags, environment={}),
        aggregator_key=FEDERATION_KEY,
        file_of=lambda name: folder / f"{name}.toml",
    )


def written(folder: Path, credentials: Credentials | None = None, keeper: PartyFiles | None = None) -> Settings:
    keeper = keeper or files(folder)
    keeper.begin("alice", credentials or Credentials(SecretStr(PASSWORD), KEY), over=True)
    keeper.finish("alice")
    return load_settings(folder / "alice.toml", environment={})


def test_file_is_for_its_owner_alone_and_holds_nothing_of_the_administrators(tmp_path):
    party = written(tmp_path)
    file = tmp_path / "alice.toml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert "admin" not in text
    assert "1567" not in text
    assert str(tmp_path) not in text
    assert party.broker.url.get_secret_value() == (
        "amqps://alice:correct-horse_1%2F%C3%A4@broker.example:5671/my%2Fvhost?cafile=ca.pem"
    )
    assert party.broker.management_url is None
    assert (party.worker.party, party.federation.name) == ("alice", "scans")
    assert party.security.aggregator_key == FEDERATION_KEY
    assert party.security.party_key.get_secret_value() == KEY.text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["alice.toml"]


def test_modes_do_not_depend_on_the_umask(tmp_path):
    old = os.umask(0)
    try:
        make_folder_of_files(tmp_path / "parties")
        written(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "parties").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "alice.toml").stat().st_mode) == 0o600


def test_file_says_what_the_federation_trains_and_not_where_the_administrators_data_is(tmp_path):
    task = {"name": "npz", "model": "resnet18", "classes": 7, "image_shape": [1, 28, 28], "data": "/private/data"}
    party = written(tmp_path, keeper=files(tmp_path, task=task))
    assert party.task.data is None
    assert (party.task.name, party.task.model, party.task.classes, party.task.image_shape) == ("npz", "resnet18", 7, (1, 28, 28))


@pytest.mark.parametrize(
    ("host", "expected"), [("[::1]:5672", "[::1]:5672"), ("broker", "broker"), ("broker:1234", "broker:1234")]
)
def test_file_keeps_the_brokers_address(tmp_path, host: str, expected: str):
    party = written(tmp_path, keeper=files(tmp_path, f"amqp://admin:secret@{host}/"))
    assert party.broker.url.get_secret_value() == f"amqp://alice:correct-horse_1%2F%C3%A4@{expected}/"


def test_file_of_a_broker_with_a_small_limit_loads(tmp_path):
    party = written(tmp_path, keeper=files(tmp_path, broker={"max_message_bytes": 262_144, "part_bytes": 65_536}))
    assert (party.broker.max_message_bytes, party.broker.part_bytes) == (262_144, 65_536)


def test_file_of_a_party_with_its_own_key_has_none_and_one_without_signatures_says_so(tmp_path):
    own = written(tmp_path, Credentials(SecretStr(PASSWORD), None))
    assert own.security.party_key is None
    assert own.security.aggregator_key == FEDERATION_KEY
    (tmp_path / "alice.toml").unlink()
    unsigned = written(tmp_path, keeper=files(tmp_path, security={"signatures": False}))
    assert (unsigned.security.signatures, unsigned.security.aggregator_key, unsigned.security.party_key) == (False, None, None)


def test_file_with_a_certificate_holds_its_texts_and_no_password(tmp_path):
    credentials = Credentials(None, KEY, Certificate(PEM, SecretStr(PEM.replace("CERTIFICATE", "PRIVATE KEY"))))
    (tmp_path / "ca.pem").write_text(PEM)
    party = written(tmp_path, credentials, files(tmp_path, broker={"ca": str(tmp_path / "ca.pem")}))
    assert party.broker.url.get_secret_value() == "amqps://broker.example:5671/my%2Fvhost?cafile=ca.pem"
    assert (party.broker.ca, party.broker.certificate) == (PEM, PEM)
    assert party.broker.certificate_key.get_secret_value() == PEM.replace("CERTIFICATE", "PRIVATE KEY")


def test_file_of_an_earlier_enrolment_is_never_written_over(tmp_path):
    file, target = tmp_path / "alice.toml", tmp_path / "elsewhere"
    file.write_text("precious")
    with pytest.raises(ConfigurationError, match=r"alice\.toml exists already"):
        written(tmp_path)
    assert file.read_text() == "precious"
    file.unlink()
    file.symlink_to(target)
    with pytest.raises(ConfigurationError, match=r"alice\.toml exists already"):
        written(tmp_path)
    assert not target.exists()
    with pytest.raises(ConfigurationError, match=r"alice\.toml cannot be read: move it away"):
        files(tmp_path).finished("alice")


def test_file_is_replaced_in_one_piece_where_that_is_wanted(tmp_path):
    written(tmp_path)
    keeper, other = files(tmp_path), SigningKey.generate()
    keeper.begin("alice", Credentials(SecretStr("another"), other))
    with pytest.raises(ConfigurationError, match=r"alice\.toml\.part was just made by somebody else"):
        keeper.begin("alice", new_credentials("alice"))
    assert keeper.finished("alice").key.public == KEY.public
    keeper.finish("alice", over=True)
    assert keeper.finished("alice").key.public == other.public
    assert keeper.begun("alice") is None


def test_what_was_begun_is_read_again(tmp_path):
    keeper = files(tmp_path)
    assert keeper.begun("alice") is None
    for credentials in (
        new_credentials("alice"),
        new_credentials("alice", has_own_key=True),
        new_credentials("alice", issue=lambda _: Certificate(PEM, SecretStr("key"))),
    ):
        keeper.begin("alice", credentials, over=True)
        begun = keeper.begun("alice")
        assert begun.password == credentials.password
        assert begun.certificate == credentials.certificate
        assert (begun.key and begun.key.text()) == (credentials.key and credentials.key.text())
    assert stat.S_IMODE((tmp_path / "alice.toml.part").stat().st_mode) == 0o600


def test_folder_that_is_not_there_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        files(tmp_path / "nowhere").begin("alice", new_credentials("alice"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be a folder"):
        make_folder_of_files(tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    [
        "not TOML",
        "",
        '[security]\nparty_key = "secret-word"\n',
        "[broker]\nurl = 5\n[security]\n",
        '[broker]\nurl = "amqp://a:secret-word@h/"\n[security]\nparty_key = "secret-word"\n',
        '[broker]\nurl = "amqp://a:secret-word@[h/"\n[security]\n',
        '[broker]\nurl = "amqp://h/"\ncertificate = "x"\n[security]\n',
        'broker = "secret-word"\nsecurity = 1\n',
    ],
)
def test_file_that_is_none_of_a_party_is_told_of_without_its_secrets(tmp_path, text: str):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=r"a\.toml") as caught:
        read_credentials(file)
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sha256", "sha512"])
def test_credentials_know_whether_they_open_a_user(kind: str):
    salt = b"\x01\x02\x03\x04"
    kept = base64.b64encode(salt + hashlib.new(kind, salt + PASSWORD.encode()).digest()).decode()
    user = User("alice", (), kept, f"rabbit_password_hashing_{kind}")
    assert Credentials(SecretStr(PASSWORD), None).opens(user)
    assert not Credentials(SecretStr("another"), None).opens(user)
    assert not Credentials(None, None).opens(user)
    for damaged in ("", "!", "AAAA", "AAAAAA=="):
        assert not Credentials(SecretStr(PASSWORD), None).opens(User("alice", (), damaged, user.hashing))
    assert not Credentials(SecretStr(PASSWORD), None).opens(User("alice", (), kept, "rabbit_password_hashing_md5"))
    assert Credentials(None, None).opens(User("alice", (), "", user.hashing))


def test_no_secret_is_shown():
    credentials = Credentials(SecretStr(PASSWORD), KEY, Certificate(PEM, SecretStr("key-text")))
    for secret in (PASSWORD, KEY.text(), "key-text"):
        assert secret not in repr(credentials)
    assert "hash-text" not in repr(User("a", (), "hash-text"))
