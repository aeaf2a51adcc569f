"""TLS with a real node that takes logins by certificate alone, and with servers whose certificates are wrong: who is refused is
told which certificate, why, and what to do."""

import asyncio
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from pydantic import SecretStr

from broker_fl.certificates import Certificates, Issued
from broker_fl.config import BrokerSettings
from broker_fl.errors import (
    AuthenticationError,
    BrokerError,
    BrokerUnavailableError,
    ConfigurationError,
    UntrustedBrokerError,
)
from broker_fl.management import Management
from broker_fl.tls import management_tls, tls_context
from broker_fl.topology import Binding, Exchange, Permissions, Queue, Topology
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ, NodeTls, find_rabbitmq, local_rabbitmq
from broker_fl.transports.transport import Message

TOPOLOGY = Topology((Exchange("x", "fanout"),), (Queue("q", "classic"),), (Binding("x", "q"),))
ALL = Permissions(".*", ".*", ".*")
LONG_AGO = timedelta(days=800)

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Both loops have a TLS of their own."""
    return request.param


@dataclass(frozen=True, slots=True)
class Authority:
    certificates: Certificates
    past: Certificates = field(init=False)
    """The same one, long ago: what it issues for a year has expired."""

    def __post_init__(self) -> None:
        past = Certificates.open(self.certificates.folder, clock=lambda: datetime.now(UTC) - LONG_AGO)
        object.__setattr__(self, "past", past)

    @property
    def ca(self) -> str:
        return self.certificates.ca_pem

    @property
    def ca_and_revoked(self) -> str:
        return self.ca + (self.certificates.folder / "crl.pem").read_text()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(Certificates.make(tmp_path_factory.mktemp("tls") / "certs"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(Certificates.make(tmp_path_factory.mktemp("tls") / "other"))


@pytest.fixture(scope="module")
def node(authority: Authority) -> Iterator[LocalRabbitMQ]:
    if find_rabbitmq() is None:
        pytest.skip("RabbitMQ is not installed: apt install rabbitmq-server, or brew install rabbitmq")
    folder = authority.certificates.folder
    certificate, key = authority.certificates.keep(authority.certificates.issue("broker", hosts=("127.0.0.1",)))
    tls = NodeTls(folder / "ca.pem", certificate, key, authority.certificates.revocations)
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        opened = local_rabbitmq(tls=tls, stop_timeout_s=0)
        started = runner.run(opened.__aenter__())
        try:
            runner.run(make_users(started, authority, "alice", "bob", "carol"))
            yield started
        finally:
            runner.run(opened.__aexit__(None, None, None))


async def make_users(node: LocalRabbitMQ, authority: Authority, *names: str) -> None:
    async with management_of(node, authority.ca) as management:
        for name in names:
            await management.put_user(name, None)
            await management.put_permissions(name, ALL)


def management_of(node: LocalRabbitMQ, ca: str) -> Management:
    settings = BrokerSettings(url=SecretStr(node.url), management_url=SecretStr(node.management_url), ca=ca)
    return Management(node.management_url, tls=management_tls(settings))


def shown(issued: Issued | None) -> dict[str, object]:
    """As settings."""
    return {} if issued is None else {"certificate": issued.certificate_pem, "certificate_key": issued.key_pem}


async def opens(url: str, *, ca: str | None, own: Issued | None = None) -> str:
    """Who we are to the broker."""
    async with amqp_connect(BrokerSettings(url=SecretStr(url), ca=ca, **shown(own)))("test") as transport:
        return transport.user


async def refused(url: str, kind: type[BrokerError], expected: str, *, ca: str | None, own: Issued | None = None) -> None:
    with pytest.raises(BrokerError) as caught:
        await opens(url, ca=ca, own=own)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert re.search(expected, text), text
    assert "\n" not in text
    if own is not None:
        assert own.key_pem.get_secret_value().splitlines()[1] not in text


# A node that takes logins by certificate


@pytest.mark.rabbitmq
async def test_a_certificate_is_the_login_and_its_name_is_the_sender(node, authority):
    settings = BrokerSettings(url=SecretStr(node.url), ca=authority.ca, **shown(authority.certificates.issue("carol")))
    async with amqp_connect(settings)("test") as transport:
        assert transport.user == "carol"
        await transport.declare(TOPOLOGY)
        async with transport.consume("q", prefetch=1, name="c") as subscription:
            await transport.publish(Message("x", b"by carol"))
            async with asyncio.timeout(15):
                delivery = await subscription.receive()
    assert (delivery.body, delivery.user_id) == (b"by carol", "carol")


@pytest.mark.rabbitmq
async def test_files_do_as_well_as_texts(node, authority):
    certificate, key = authority.certificates.keep(authority.certificates.issue("bob", renew=True))
    ca = authority.certificates.folder / "ca.pem"
    settings = BrokerSettings(
        url=SecretStr(node.url), ca=str(ca), certificate=str(certificate), certificate_key=SecretStr(str(key))
    )
    async with amqp_connect(settings)("test") as transport:
        assert transport.user == "bob"


@pytest.mark.rabbitmq
def test_an_expired_certificate_is_refused_as_such(node, authority, run):
    own = authority.past.issue("alice", renew=True)
    expected = "refuses the certificate of 'alice': it has expired"
    run(refused(node.url, AuthenticationError, expected, ca=authority.ca, own=own))


@pytest.mark.rabbitmq
def test_a_certificate_of_another_authority_is_refused_as_such(node, authority, other, run):
    own = other.certificates.issue("alice", renew=True)
    expected = "refuses the certificate of 'alice': it is from an unknown CA"
    run(refused(node.url, AuthenticationError, expected, ca=authority.ca, own=own))


@pytest.mark.rabbitmq
def test_a_certificate_that_signs_itself_is_refused_as_such(node, authority, tmp_path, run):
    """A stolen name and nothing else."""
    own = self_signed("alice")
    expected = "refuses the certificate of 'alice': it cannot be checked; it signs itself, or"
    run(refused(node.url, BrokerUnavailableError, expected, ca=authority.ca, own=own))


@pytest.mark.rabbitmq
@pytest.mark.parametrize("which", ["missing", "damaged", "of another authority"])
def test_a_node_whose_list_of_revoked_ones_is_wrong_takes_nobody_and_is_worth_another_try(node, authority, other, run, which):
    own = authority.certificates.issue("bob", renew=True)
    (file,) = authority.certificates.revocations.iterdir()
    kept = file.read_bytes()

    async def scenario() -> None:
        expected = "refuses the certificate of 'bob': it cannot be checked"
        await refused(node.url, BrokerUnavailableError, expected, ca=authority.ca, own=own)

    file.unlink()
    try:
        if which != "missing":
            file.write_bytes(b"junk" if which == "damaged" else (other.certificates.folder / "crl.pem").read_bytes())
        run(scenario())
    finally:
        file.write_bytes(kept)
    assert asyncio.run(opens(node.url, ca=authority.ca, own=own)) == "bob"


@pytest.mark.rabbitmq
def test_a_revoked_certificate_is_refused_from_the_next_handshake_on_and_a_new_one_is_not(node, authority, run):
    own = authority.certificates.issue("alice", renew=True)

    async def scenario() -> None:
        assert await opens(node.url, ca=authority.ca, own=own) == "alice"
        authority.certificates.revoke("alice")
        expected = "refuses the certificate of 'alice': it is revoked"
        await refused(node.url, AuthenticationError, expected, ca=authority.ca, own=own)
        assert await opens(node.url, ca=authority.ca, own=authority.certificates.issue("alice")) == "alice"

    run(scenario())


@pytest.mark.rabbitmq
def test_a_server_s_certificate_is_no_login(node, authority, run):
    own = authority.certificates.issue("alice", hosts=("127.0.0.1",), renew=True)
    expected = "refuses the certificate of 'alice': it is none for a client"
    run(refused(node.url, AuthenticationError, expected, ca=authority.ca, own=own))


@pytest.mark.rabbitmq
def test_a_certificate_of_nobody_that_the_broker_knows_is_no_login(node, authority, run):
    own = authority.certificates.issue("mallory", renew=True)
    expected = "refuses the login of 'mallory': the broker has no user of this certificate's name"
    run(refused(node.url, AuthenticationError, expected, ca=authority.ca, own=own))


@pytest.mark.rabbitmq
@pytest.mark.parametrize("login", ["", "admin"])
def test_without_a_certificate_nobody_gets_in(node, authority, run, login):
    """Not even the administrator with the right password."""
    url = node.url if not login else node.url.replace("//", f"//{node.user}:{node.password.get_secret_value()}@")
    expected = r"asks for a certificate, and none came: set \[broker\] certificate"
    run(refused(url, AuthenticationError, expected, ca=authority.ca))


@pytest.mark.rabbitmq
async def test_a_password_is_not_taken_beside_a_certificate(node, authority):
    url = node.url.replace("//", f"//{node.user}:{node.password.get_secret_value()}@")
    own = authority.certificates.issue("bob", renew=True)
    await refused(url, AuthenticationError, "takes no passwords", ca=authority.ca, own=own)


@pytest.mark.rabbitmq
async def test_nothing_is_spoken_in_the_clear(node):
    await refused(node.url.replace("amqps:", "amqp:"), BrokerUnavailableError, "amqps:// for TLS", ca=None)


@pytest.mark.rabbitmq
def test_a_session_from_before_the_revocation_does_not_come_back(node, authority):
    """TLS 1.2 can go on with an old session, in which no certificate is shown."""
    settings = BrokerSettings(url=SecretStr(node.url), ca=authority.ca, **shown(authority.certificates.issue("dora", renew=True)))
    context = tls_context(settings)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def handshake(session: ssl.SSLSession | None) -> ssl.SSLSession | None:
        with (
            socket.create_connection(("127.0.0.1", node.amqp_port)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as wrapped,
        ):
            return wrapped.session

    session = handshake(None)
    authority.certificates.revoke("dora")
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate revoked"):
        handshake(session)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_are_spoken(node, authority, version):
    own = authority.certificates.issue("bob", renew=True)
    context = tls_context(BrokerSettings(url=SecretStr(node.url), ca=authority.ca, **shown(own)))
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", node.amqp_port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
    ):
        wrapped.sendall(b"AMQP\0\0\x09\x01")
        assert wrapped.recv(1) == b"\x01"


# We refuse the node


@pytest.mark.rabbitmq
def test_a_node_of_an_unknown_authority_is_not_trusted(node, authority, other, run):
    own = authority.certificates.issue("bob", renew=True)
    expected = r"certificate of the broker at 127\.0\.0\.1:\d+ is from an unknown CA: .* \[broker\] ca"
    run(refused(node.url, UntrustedBrokerError, expected, ca=other.ca, own=own))
    run(refused(node.url, UntrustedBrokerError, expected, ca=None, own=own))


@pytest.mark.rabbitmq
def test_a_node_by_another_name_is_not_trusted(node, authority, run):
    url = node.url.replace("127.0.0.1", "localhost")
    expected = r"is for another host \(.*'localhost'\): connect by a name that is in it, or issue one"
    run(refused(url, UntrustedBrokerError, expected, ca=authority.ca))


@pytest.mark.rabbitmq
async def test_a_node_is_checked_against_the_list_of_revoked_ones_that_comes_with_the_ca(node, authority):
    own = authority.certificates.issue("bob", renew=True)
    assert await opens(node.url, ca=authority.ca_and_revoked, own=own) == "bob"


# Management


@pytest.mark.rabbitmq
async def test_management_is_asked_over_tls(node, authority, other):
    async with management_of(node, authority.ca) as management:
        assert node.user in {user.name for user in await management.list_users()}
    async with management_of(node, other.ca) as management:
        with pytest.raises(UntrustedBrokerError, match=r"the management API at https://127\.0\.0\.1:\d+ is from an unknown CA"):
            await management.overview()
    async with Management(node.management_url) as management:
        with pytest.raises(UntrustedBrokerError, match="unknown CA"):
            await management.overview()
    async with Management(node.management_url.replace("https:", "http:")) as management:
        with pytest.raises(BrokerError):
            await management.overview()


@pytest.mark.rabbitmq
async def test_a_password_of_nobody_is_refused_by_management(node, authority):
    """Users without a password have none that fits, the empty one included."""
    for password in ("%20", "alice", '""'):
        settings = BrokerSettings(url=SecretStr(node.url), management_url=SecretStr(node.management_url), ca=authority.ca)
        url = f"https://alice:{password}@127.0.0.1:{node.management_port}"
        async with Management(url, tls=management_tls(settings)) as management:
            with pytest.raises(AuthenticationError):
                await management.overview()


# Servers whose certificates are wrong


def server_context(issued: Issued, folder: Path) -> ssl.SSLContext:
    for name, text in (("certificate", issued.certificate_pem), ("key", issued.key_pem.get_secret_value())):
        (folder / name).write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return context


@asynccontextmanager
async def server(issued: Issued, folder: Path) -> AsyncIterator[int]:
    """The port of one that shows this certificate and ends every connection."""
    context = server_context(issued, folder)

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    # Python reports handshakes that fail to the loop.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as listening:
        yield listening.sockets[0].getsockname()[1]


@contextmanager
def server_that_asks(issued: Issued, folder: Path, *, clients_of: Authority) -> Iterator[int]:
    """Likewise, and it takes only clients of an authority. In a thread: asyncio's servers do not tell why they refuse."""
    context = server_context(issued, folder)
    context.load_verify_locations(cadata=clients_of.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                context.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def self_signed(name: str) -> Issued:
    """A leaf that is its own authority."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 7, now, now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    pem = builder.sign(key, SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Issued(name, now, pem, SecretStr(key.private_bytes(*plain).decode()))


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("expired", "has expired, or this machine's clock is wrong: renew it"),
        ("not yet valid", "is not valid yet: is this machine's clock right"),
        ("for another host", r"is for another host \(.*'127\.0\.0\.1'\)"),
        ("self-signed", r"is self-signed, and not the one of \[broker\] ca"),
        ("of another authority", "is from an unknown CA"),
        ("revoked", "is revoked: it needs a new one"),
        ("of a client", "is none for a server: issue one by"),
    ],
)
def test_a_broker_is_refused_for_what_is_wrong_with_its_certificate(authority, other, tmp_path, run, which, expected):
    hosts = ("127.0.0.1",)
    future = Certificates.open(authority.certificates.folder, clock=lambda: datetime.now(UTC) + timedelta(days=90))
    issued = {
        "expired": lambda: authority.past.issue("old", hosts=hosts, renew=True),
        "not yet valid": lambda: future.issue("new", hosts=hosts, renew=True),
        "for another host": lambda: authority.certificates.issue("elsewhere", hosts=("rabbit.example.org",), renew=True),
        "self-signed": lambda: self_signed("127.0.0.1"),
        "of another authority": lambda: other.certificates.issue("theirs", hosts=hosts, renew=True),
        "revoked": lambda: authority.certificates.issue("stolen", hosts=hosts, renew=True),
        "of a client": lambda: authority.certificates.issue("client", renew=True),
    }[which]()
    if which == "revoked":
        authority.certificates.revoke("stolen")

    async def scenario() -> None:
        async with server(issued, tmp_path) as port:
            await refused(f"amqps://127.0.0.1:{port}/", UntrustedBrokerError, expected, ca=authority.ca_and_revoked)
            settings = BrokerSettings(url=SecretStr(f"amqps://a:a@127.0.0.1:{port}/"), ca=authority.ca_and_revoked)
            url = f"https://a:a@127.0.0.1:{port}"
            async with Management(url, tls=tls_context(settings)) as management:
                with pytest.raises(UntrustedBrokerError, match=f"the management API at https://127.*{expected}"):
                    await management.overview()

    run(scenario())


def test_a_list_of_revoked_ones_of_another_authority_does_not_do(authority, other, tmp_path, run):
    issued = authority.certificates.issue("broker-2", hosts=("127.0.0.1",), renew=True)
    mixed = authority.ca + (other.certificates.folder / "crl.pem").read_text()

    async def scenario() -> None:
        async with server(issued, tmp_path) as port:
            await refused(f"amqps://127.0.0.1:{port}/", UntrustedBrokerError, "cannot be checked", ca=mixed)

    run(scenario())


def test_management_that_asks_for_a_certificate_says_so(authority, other, tmp_path, run):
    issued = authority.certificates.issue("console", hosts=("127.0.0.1",), renew=True)

    async def ask(url: str, expected: str, own: Issued | None) -> None:
        settings = BrokerSettings(url=SecretStr("amqps://127.0.0.1/"), ca=authority.ca, **shown(own))
        async with Management(url, tls=tls_context(settings)) as management:
            with pytest.raises(AuthenticationError, match=expected):
                await management.overview()

    async def scenario() -> None:
        with server_that_asks(issued, tmp_path, clients_of=authority) as port:
            url = f"https://a:a@127.0.0.1:{port}"
            await ask(url, "asks for a certificate, and none came", None)
            await ask(url, "refuses our certificate: it is from an unknown CA", other.certificates.issue("alice", renew=True))

    run(scenario())


def test_a_port_that_does_not_speak_tls_is_named(run):
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"AMQP\0\0\x09\x01")
        writer.close()

    async def scenario() -> None:
        async with await asyncio.start_server(greet, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            await refused(f"amqps://127.0.0.1:{port}/", BrokerUnavailableError, "does not speak TLS: is the port right", ca=None)

    run(scenario())


# What is wrong with our own


def context_of(**given: object) -> ssl.SSLContext:
    return tls_context(BrokerSettings(url=SecretStr("amqps://127.0.0.1/"), **given))


def test_our_own_part_is_safe(authority):
    context = context_of(ca=authority.ca)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert not context.hostname_checks_common_name
    assert len(context.get_ca_certs()) == 1
    assert not context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    assert context_of(ca=authority.ca_and_revoked).verify_flags & ssl.VERIFY_CRL_CHECK_LEAF


def test_a_key_that_came_as_a_text_leaves_no_file(authority, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    context_of(ca=authority.ca, **shown(authority.certificates.issue("erin", renew=True)))
    with pytest.raises(ConfigurationError):
        context_of(certificate=authority.ca, certificate_key=SecretStr("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_pair_is_told_without_the_key(authority):
    one, two = (authority.certificates.issue(name, renew=True) for name in ("frank", "grace"))
    with pytest.raises(
        ConfigurationError, match=r"\[broker\] certificate and certificate_key are not .*KEY_VALUES_MISMATCH"
    ) as caught:
        context_of(certificate=one.certificate_pem, certificate_key=two.key_pem)
    assert two.key_pem.get_secret_value().splitlines()[1] not in str(caught.value)


def test_an_encrypted_key_is_not_asked_for_on_the_terminal(authority):
    issued = authority.certificates.issue("heidi", renew=True)
    key = serialization.load_pem_private_key(issued.key_pem.get_secret_value().encode(), password=None)
    encryption = serialization.BestAvailableEncryption(b"password")
    locked = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption).decode()
    with pytest.raises(ConfigurationError, match="certificate_key is encrypted"):
        context_of(certificate=issued.certificate_pem, certificate_key=SecretStr(locked))


@pytest.mark.parametrize("text", ["-----BEGIN CERTIFICATE-----\njunk\n-----END CERTIFICATE-----\n", "nowhere/ca.pem"])
def test_a_ca_that_is_none_is_named(text):
    with pytest.raises(ConfigurationError, match=r"^\[broker\] ca"):
        context_of(ca=text)
