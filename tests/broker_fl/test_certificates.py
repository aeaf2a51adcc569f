"""The authority in a folder: what it issues, what it refuses, and that nothing is ever written over."""

import json
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

from broker_fl.certificates import Certificates, common_name, subject_hash
from broker_fl.cli.main import app
from broker_fl.errors import BrokerFLError, ConfigurationError, DamagedError, StorageError

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "certs"


@pytest.fixture
def certificates(folder: Path) -> Certificates:
    return Certificates.make(folder, clock=lambda: NOW)


def later(certificates: Certificates, days: int) -> Certificates:
    return Certificates.open(certificates.folder, clock=lambda: NOW + timedelta(days=days))


def loaded(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def extension(certificate: x509.Certificate, kind: type) -> x509.Extension:
    return certificate.extensions.get_extension_for_class(kind)


def revoked_serials(file: Path) -> set[int]:
    return {revoked.serial_number for revoked in x509.load_pem_x509_crl(file.read_bytes())}


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


# The authority


def test_a_new_authority_has_a_key_for_its_owner_alone_and_an_empty_list_of_revoked_ones(certificates, folder):
    assert mode_of(folder / "ca-key.pem") == 0o600
    assert revoked_serials(folder / "crl.pem") == set()
    authority = loaded((folder / "ca.pem").read_text())
    assert extension(authority, x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    assert extension(authority, x509.BasicConstraints).critical
    usage = extension(authority, x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert certificates.expires == NOW + timedelta(days=3650)
    assert sorted(file.name for file in certificates.revocations.iterdir()) == [f"{subject_hash(authority.subject)}.r0"]


def test_an_authority_is_made_once(certificates, folder):
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(ConfigurationError, match="holds an authority already"):
        Certificates.make(folder)
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_an_authority_whose_making_was_interrupted_keeps_its_key(folder):
    Certificates.make(folder)
    (folder / "ca.pem").unlink()
    key = (folder / "ca-key.pem").read_bytes()
    Certificates.make(folder).issue("alice")
    assert (folder / "ca-key.pem").read_bytes() == key


def test_two_authorities_have_two_names(tmp_path):
    first, second = (Certificates.make(tmp_path / name) for name in ("a", "b"))
    assert loaded(first.ca_pem).subject != loaded(second.ca_pem).subject


def test_a_folder_without_an_authority_says_how_to_make_one(folder):
    with pytest.raises(ConfigurationError, match="broker-fl certs init"):
        Certificates.open(folder)


def test_a_key_of_another_authority_is_found_out(certificates, folder, tmp_path):
    Certificates.make(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca-key.pem", folder / "ca-key.pem")
    with pytest.raises(ConfigurationError, match="is not the key of"):
        Certificates.open(folder)


@pytest.mark.parametrize("text", ["", "junk", "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"])
def test_a_key_that_is_none_is_not_shown(certificates, folder, text):
    (folder / "ca-key.pem").write_text(text)
    with pytest.raises(ConfigurationError, match="holds no private key in PEM") as caught:
        Certificates.open(folder)
    assert "c2VjcmV0" not in str(caught.value)


def test_a_key_that_is_encrypted_or_of_another_kind_is_named(certificates, folder):
    encrypted = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"password")
    )
    (folder / "ca-key.pem").write_bytes(encrypted)
    with pytest.raises(ConfigurationError, match="without a password"):
        Certificates.open(folder)


def test_a_missing_key_is_a_storage_error(certificates, folder):
    (folder / "ca-key.pem").unlink()
    with pytest.raises(StorageError, match=r"ca-key\.pem"):
        Certificates.open(folder)


# Issuing


def test_a_client_s_certificate_names_a_user_and_is_for_clients(certificates):
    issued = certificates.issue("alice", days=10)
    certificate = loaded(issued.certificate_pem)
    assert common_name(issued.certificate_pem, what="it") == "alice"
    assert certificate.not_valid_after_utc == issued.expires == NOW + timedelta(days=10)
    assert certificate.not_valid_before_utc < NOW
    assert list(extension(certificate, x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert extension(certificate, x509.BasicConstraints).value.ca is False
    assert extension(certificate, x509.KeyUsage).value.digital_signature
    authority = loaded(certificates.ca_pem)
    assert (
        extension(certificate, x509.AuthorityKeyIdentifier).value.key_identifier
        == extension(authority, x509.SubjectKeyIdentifier).value.digest
    )
    certificate.verify_directly_issued_by(authority)
    with pytest.raises(x509.ExtensionNotFound):
        extension(certificate, x509.SubjectAlternativeName)


def test_a_server_s_certificate_holds_its_names_and_is_for_servers(certificates):
    issued = certificates.issue("broker", hosts=("localhost", "rabbit.example.org", "127.0.0.1", "::1"))
    certificate = loaded(issued.certificate_pem)
    names = extension(certificate, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "rabbit.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("::1")]
    assert list(extension(certificate, x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_the_key_belongs_to_the_certificate_and_is_shown_by_no_repr(certificates):
    issued = certificates.issue("alice")
    secret = issued.key_pem.get_secret_value()
    key = serialization.load_pem_private_key(secret.encode(), password=None)
    assert key.public_key() == loaded(issued.certificate_pem).public_key()
    assert secret.splitlines()[1] not in repr(issued)


def test_what_the_library_issues_leaves_no_key_in_the_folder(certificates, folder):
    certificates.issue("alice")
    assert sorted(file.name for file in folder.rglob("*") if file.is_file() and "PRIVATE" in file.read_text()) == ["ca-key.pem"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../alice", "a/b", "-a", "_a", "a b", "a\n", "é", "x" * 64, "ca", "ca-key", "crl"]
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_noted(certificates, name):
    with pytest.raises(ConfigurationError, match="cannot be the name of a certificate"):
        certificates.issue(name)
    assert certificates.records() == []


@pytest.mark.parametrize("name", ["a", "admin.local", "hospital-a", "X_1", "x" * 63])
def test_names_of_users_are_names(certificates, name):
    assert common_name(certificates.issue(name).certificate_pem, what="it") == name


@pytest.mark.parametrize("host", ["", "a b", "http://a", "a..b", "-a", "a:5671", "x" * 300, "é"])
def test_a_host_that_cannot_be_is_refused(certificates, host):
    with pytest.raises(ConfigurationError, match="is no host"):
        certificates.issue("broker", hosts=(host,))
    assert certificates.records() == []


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_a_certificate_ends_before_its_authority_and_not_before_it_begins(certificates, days):
    with pytest.raises(ConfigurationError, match="cannot be valid for"):
        certificates.issue("alice", days=days)
    assert certificates.records() == []


def test_a_second_certificate_of_a_name_is_made_only_where_it_is_wanted(certificates):
    first = certificates.issue("alice", days=10)
    with pytest.raises(ConfigurationError, match=r"valid until 2026-12-05: renew it"):
        certificates.issue("alice")
    second = certificates.issue("alice", renew=True)
    assert loaded(first.certificate_pem).serial_number != loaded(second.certificate_pem).serial_number
    assert first.key_pem != second.key_pem


def test_after_its_end_a_name_gets_a_new_one_without_asking(certificates):
    certificates.issue("alice", days=10)
    assert later(certificates, 11).issue("alice").expires == NOW + timedelta(days=11 + 365)


def test_files_are_written_once_keys_for_their_owner_alone_and_earlier_ones_are_kept(certificates, folder):
    issued = [certificates.issue("alice", renew=True) for _ in range(3)]
    for one in issued:
        files = certificates.keep(one)
    assert files == (folder / "alice.pem", folder / "alice.key")
    assert (folder / "alice.pem").read_text() == issued[2].certificate_pem
    assert (folder / "alice.key").read_text() == issued[2].key_pem.get_secret_value()
    for number in (1, 2):
        assert (folder / "old" / f"alice.pem.{number}").read_text() == issued[number - 1].certificate_pem
        assert mode_of(folder / "old" / f"alice.key.{number}") == 0o600
    assert (mode_of(folder / "alice.key"), mode_of(folder / "alice.pem")) == (0o600, 0o644)


def test_many_at_the_same_time_are_all_noted(certificates):
    def issue(number: int) -> None:
        Certificates.open(certificates.folder, clock=lambda: NOW).issue(f"party-{number}")

    threads = [threading.Thread(target=issue, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.name for record in certificates.records()) == [f"party-{number}" for number in range(8)]


# Revoking


def test_all_certificates_of_a_revoked_name_are_on_both_lists(certificates, folder):
    issued = [certificates.issue("alice"), certificates.issue("alice", renew=True)]
    certificates.issue("bob")
    assert [record.name for record in certificates.revoke("alice")] == ["alice", "alice"]
    serials = {loaded(one.certificate_pem).serial_number for one in issued}
    for file in (folder / "crl.pem", next(certificates.revocations.iterdir())):
        assert revoked_serials(file) == serials
    crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
    assert crl.is_signature_valid(loaded(certificates.ca_pem).public_key())
    assert crl.next_update_utc == certificates.expires


def test_revoking_again_changes_nothing_but_makes_the_lists_anew(certificates, folder):
    certificates.issue("alice")
    certificates.revoke("alice")
    (folder / "crl.pem").unlink()
    assert certificates.revoke("alice") == ()
    assert len(revoked_serials(folder / "crl.pem")) == 1
    assert [record.state(NOW) for record in certificates.records()] == ["revoked"]


def test_a_revoked_name_gets_a_new_certificate_without_asking(certificates, folder):
    old = certificates.issue("alice")
    certificates.revoke("alice")
    new = certificates.issue("alice")
    assert revoked_serials(folder / "crl.pem") == {loaded(old.certificate_pem).serial_number}
    assert loaded(new.certificate_pem).serial_number not in revoked_serials(folder / "crl.pem")


def test_an_unknown_name_is_told_with_the_nearest_one(certificates):
    certificates.issue("alice")
    with pytest.raises(ConfigurationError, match="did you mean 'alice'"):
        certificates.revoke("alise")


def test_each_list_has_a_higher_number_than_the_one_before(certificates, folder):
    def number() -> int:
        crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number

    numbers = [number()]
    for name in ("alice", "bob"):
        certificates.issue(name)
        certificates.revoke(name)
        numbers.append(number())
    assert numbers == sorted(set(numbers))


# The index


def test_the_index_tells_what_was_issued_and_until_when(certificates):
    certificates.issue("broker", hosts=("localhost",))
    certificates.issue("alice", days=10)
    certificates.issue("bob")
    certificates.revoke("bob")
    later_records = later(certificates, 20).records()
    states = [(record.name, record.hosts, record.state(NOW + timedelta(days=20))) for record in later_records]
    assert states == [("broker", ("localhost",), "valid"), ("alice", (), "expired"), ("bob", (), "revoked")]


@pytest.mark.parametrize("line", ["{", '{"event": "issued"}', '{"event": "lost", "at": "2026-11-25T12:00:00Z"}', "\x00"])
def test_a_damaged_index_is_told_with_its_line_and_nothing_is_issued(certificates, folder, line):
    certificates.issue("alice")
    with (folder / "index.jsonl").open("a") as sink:
        sink.write(line + "\n")
    with pytest.raises(DamagedError, match="line 2"):
        certificates.issue("bob")
    with pytest.raises(DamagedError, match="line 2"):
        certificates.revoke("alice")


def test_the_index_holds_no_key(certificates, folder):
    issued = certificates.issue("alice")
    text = (folder / "index.jsonl").read_text()
    assert json.loads(text)["name"] == "alice"
    assert issued.key_pem.get_secret_value().splitlines()[1] not in text


# Reading


@pytest.mark.parametrize("text", ["", "junk", "-----BEGIN CERTIFICATE-----\njunk\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_named(text):
    with pytest.raises(ConfigurationError, match=r"\[broker\] certificate holds no certificate in PEM"):
        common_name(text, what="[broker] certificate")


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_a_certificate_without_one_common_name_is_no_login(names):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in names])
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + timedelta(days=1)).sign(key, SHA256())
    with pytest.raises(ConfigurationError, match=f"{len(names)} common names"):
        common_name(certificate.public_bytes(serialization.Encoding.PEM).decode(), what="it")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to compare with")
def test_the_hash_of_a_name_is_openssl_s(certificates, folder):
    command = ["openssl", "x509", "-in", str(folder / "ca.pem"), "-noout", "-subject_hash"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert subject_hash(loaded(certificates.ca_pem).subject) == said


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to ask")
def test_openssl_verifies_what_was_issued_by_its_strictest_rules(folder):
    certificates = Certificates.make(folder)
    certificates.keep(certificates.issue("broker", hosts=("localhost",)))
    certificates.keep(certificates.issue("alice"))
    certificates.keep(certificates.issue("bob"))
    certificates.revoke("bob")

    def verified(name: str, purpose: str) -> str:
        lists = ["-CAfile", str(folder / "ca.pem"), "-CRLfile", str(folder / "crl.pem"), "-crl_check", "-x509_strict"]
        command = ["openssl", "verify", *lists, "-purpose", purpose, str(folder / f"{name}.pem")]
        ended = subprocess.run(command, capture_output=True, text=True)
        return ended.stdout + ended.stderr

    assert verified("broker", "sslserver").endswith(": OK\n")
    assert verified("alice", "sslclient").endswith(": OK\n")
    assert "certificate revoked" in verified("bob", "sslclient")
    assert "unsuitable certificate purpose" in verified("alice", "sslserver")
    assert "unsuitable certificate purpose" in verified("broker", "sslclient")


# The command line


@pytest.fixture
def run(folder: Path) -> Callable[..., str]:
    """What a command says; raises what it raises."""

    def invoke(*arguments: str) -> str:
        ended = CliRunner().invoke(app, ["certs", arguments[0], "--folder", str(folder), *arguments[1:]])
        if isinstance(ended.exception, BrokerFLError):
            raise ended.exception
        return ended.output

    return invoke


def test_init_twice_changes_nothing(run, folder):
    assert "made an authority" in run("init")
    before = (folder / "ca.pem").read_bytes()
    assert "nothing was changed" in run("init")
    assert (folder / "ca.pem").read_bytes() == before


def test_certificates_are_issued_shown_renewed_and_revoked(run, folder):
    run("init")
    assert "for the server localhost, 127.0.0.1" in run("issue", "local", "--server")
    assert "for the server rabbit.example.org, valid until" in run("issue", "broker", "--server", "--host", "rabbit.example.org")
    assert "for the user alice" in run("issue", "alice", "--days", "10")
    assert "for the server rabbit.example.org" in run("issue", "broker", "--server", "--renew")
    assert "valid, for 9 more days" in run("list")
    assert "revoked 1 of alice" in run("revoke", "alice")
    assert "revoked before" in run("revoke", "alice")
    shown = run("list")
    assert "revoked" in shown
    assert "rabbit.example.org" in shown
    assert (folder / "old" / "broker.pem.1").exists()


def test_hosts_go_with_servers(run):
    run("init")
    assert "goes with --server" in run("issue", "alice", "--host", "a")


def test_a_second_one_is_refused_before_anything_is_written(run, folder):
    run("init")
    run("issue", "alice")
    before = (folder / "alice.key").read_bytes()
    with pytest.raises(ConfigurationError, match="--renew"):
        run("issue", "alice")
    assert (folder / "alice.key").read_bytes() == before
    assert not (folder / "old").exists()
