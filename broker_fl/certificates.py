"""A private certificate authority in a folder: it says who may connect to the broker, and which broker is the right one.

    ca.pem          the authority's own certificate, for everyone: what the others are checked against
    ca-key.pem      its private key, mode 0600: whoever has it can be anyone
    index.jsonl     what was issued and revoked, a line each, in order; the rest of the folder follows from it
    crl.pem         what is revoked, for OpenSSL; crl/HASH.r0 is the same for Erlang, which looks for it by the issuer's name
    NAME.pem, NAME.key, old/   what `broker-fl certs issue` wrote, and what that was before

Keys are ECDSA on P-256, which every TLS library takes. A certificate's common name is a user of the broker (RabbitMQ's
`ssl_cert_login_from = common_name`); a server's hosts are its alternative names.
"""

import fcntl
import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import AwareDatetime, BaseModel, ConfigDict, SecretStr, ValidationError

from broker_fl.errors import ConfigurationError, DamagedError, StorageError, nearest

AUTHORITY_DAYS = 3650
DAYS = 365

_BACKDATED = timedelta(minutes=5)
"""Clocks differ: a certificate that is valid from now on would be refused where it is a minute earlier."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""At most 63 of the 64 characters that X.509 allows a common name; and no path."""
_TAKEN = ("ca", "ca-key", "crl")
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")

Clock = Callable[[], datetime]
Event = Literal["issued", "revoked"]


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its private key, both as PEM text. The authority keeps neither."""

    name: str
    expires: datetime
    certificate_pem: str
    key_pem: SecretStr


@dataclass(frozen=True, slots=True)
class Record:
    """What the index knows of a certificate."""

    name: str
    serial: int
    hosts: tuple[str, ...]
    """Of a server; a client has none."""
    issued: datetime
    expires: datetime
    revoked: datetime | None = None

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "valid" if now < self.expires else "expired"


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    event: Event
    at: AwareDatetime
    serial: str
    """In hexadecimal, since it has 160 bits."""
    name: str
    hosts: tuple[str, ...] = ()
    expires: AwareDatetime | None = None


def _now() -> datetime:
    return datetime.now(UTC)


class Certificates:
    """The authority of a folder. Several processes may use it at the same time: what writes waits for the others."""

    def __init__(self, folder: Path, authority: x509.Certificate, key: ec.EllipticCurvePrivateKey, clock: Clock) -> None:
        self.folder = folder
        self._authority = authority
        self._key = key
        self._clock = clock

    @classmethod
    def make(cls, folder: Path, *, days: int = AUTHORITY_DAYS, clock: Clock = _now) -> "Certificates":
        """A new authority in a folder that has none. What was interrupted goes on: a key that is there is never replaced.

        Raises ConfigurationError where there is an authority already, StorageError.
        """
        with _storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "ca.pem").exists():
                raise ConfigurationError(f"{folder} holds an authority already: name another folder for a new one")
            if not (folder / "ca-key.pem").exists():
                _write_new(folder / "ca-key.pem", _pem_of_key(ec.generate_private_key(ec.SECP256R1())), mode=0o600)
            key = _load_key(folder / "ca-key.pem")
            authority = _self_signed(key, days=days, now=clock())
            made = cls(folder, authority, key, clock)
            with made._alone():
                made._write_revocations()
            _replace(folder / "ca.pem", _pem(authority))
        return made

    @classmethod
    def open(cls, folder: Path, *, clock: Clock = _now) -> "Certificates":
        """Raises ConfigurationError where there is none, or where key and certificate are not one pair."""
        if not (folder / "ca.pem").exists():
            raise ConfigurationError(f"{folder} holds no authority: `broker-fl certs init` makes one")
        with _storage(folder):
            authority = _certificate((folder / "ca.pem").read_text(encoding="ascii"), what=str(folder / "ca.pem"))
            key = _load_key(folder / "ca-key.pem")
        if authority.public_key() != key.public_key():
            raise ConfigurationError(f"{folder / 'ca-key.pem'} is not the key of {folder / 'ca.pem'}")
        return cls(folder, authority, key, clock)

    @property
    def ca_pem(self) -> str:
        return _pem(self._authority)

    @property
    def expires(self) -> datetime:
        return self._authority.not_valid_after_utc

    @property
    def revocations(self) -> Path:
        """The folder for Erlang's ssl_crl_hash_dir. The broker reads it at every handshake."""
        return self.folder / "crl"

    def issue(self, name: str, *, hosts: Sequence[str] = (), days: int = DAYS, renew: bool = False) -> Issued:
        """A certificate for a client, the user `name` of the broker; or, with hosts (names or addresses), for a server.

        Key and certificate are in what is returned and nowhere else. `renew`: although one is still valid, which stays so.
        Raises ConfigurationError for a name or host that cannot be, a validity beyond the authority's own, or where a valid
        certificate of the name is out.
        """
        _check_name(name)
        alternatives = [_alternative(host) for host in hosts]
        with _storage(self.folder), self._alone():
            now = self._clock()
            valid = [record for record in self.records() if record.name == name and record.state(now) == "valid"]
            if valid and not renew:
                raise ConfigurationError(
                    f"{name!r} has a certificate that is valid until {valid[-1].expires:%Y-%m-%d}: renew it (--renew), or revoke "
                    "it first if it is lost"
                )
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._signed(name, key.public_key(), alternatives, expires=self._end(days, now), now=now)
            expires = certificate.not_valid_after_utc
            # Noted first: there is no certificate that cannot be revoked.
            self._note("issued", certificate.serial_number, name, hosts=tuple(hosts), expires=expires)
        return Issued(name, expires, _pem(certificate), SecretStr(_pem_of_key(key)))

    def revoke(self, name: str) -> tuple[Record, ...]:
        """All of the name's certificates that are not yet, and renews the lists in the folder. Returns those; none of them is
        left where it was revoked before.

        Who is connected stays connected: revocation is for handshakes. Raises ConfigurationError for an unknown name.
        """
        with _storage(self.folder), self._alone():
            records = self.records()
            if not any(record.name == name for record in records):
                known = {record.name for record in records}
                raise ConfigurationError(f"no certificate was issued to {name!r}: {nearest(name, known)}")
            open_ones = tuple(record for record in records if record.name == name and record.revoked is None)
            for record in open_ones:
                self._note("revoked", record.serial, name)
            self._write_revocations()
        return open_ones

    def records(self) -> list[Record]:
        """Of all that were issued, in order. Raises DamagedError."""
        records: dict[int, Record] = {}
        for line in self._lines():
            serial = int(line.serial, 16)
            if line.event == "issued" and line.expires is not None:
                records[serial] = Record(line.name, serial, line.hosts, line.at, line.expires)
            elif serial in records:
                old = records[serial]
                records[serial] = Record(old.name, serial, old.hosts, old.issued, old.expires, revoked=line.at)
        return list(records.values())

    def keep(self, issued: Issued) -> tuple[Path, Path]:
        """Writes NAME.pem and NAME.key (mode 0600) into the folder; those of an earlier certificate move to old/."""
        certificate, key = self.folder / f"{issued.name}.pem", self.folder / f"{issued.name}.key"
        with _storage(self.folder):
            self._put_by(certificate, key)
            _write_new(key, issued.key_pem.get_secret_value(), mode=0o600)
            _write_new(certificate, issued.certificate_pem, mode=0o644)
        return certificate, key

    def _put_by(self, *files: Path) -> None:
        for file in files:
            if file.exists():
                old = self.folder / "old"
                old.mkdir(exist_ok=True)
                number = sum(1 for _ in old.glob(f"{file.name}.*")) + 1
                file.rename(old / f"{file.name}.{number}")

    def _signed(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        alternatives: list[x509.GeneralName],
        *,
        expires: datetime,
        now: datetime,
    ) -> x509.Certificate:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if alternatives else ExtendedKeyUsageOID.CLIENT_AUTH
        authority = self._authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            _builder(_name(name), self._authority.subject, key, expires=expires, now=now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _end(self, days: int, now: datetime) -> datetime:
        end = now + timedelta(days=days)
        if days < 1 or end > self.expires:
            raise ConfigurationError(
                f"a certificate cannot be valid for {days} days: at least one, and the authority's own ends on "
                f"{self.expires:%Y-%m-%d}"
            )
        return end

    def _write_revocations(self) -> None:
        """It holds until the next one is written: a list that ran out would shut everyone out."""
        now = self._clock()
        authority = self._authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        number = len(self._lines()) + 1
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._authority.subject)
            .last_update(now - _BACKDATED)
            .next_update(self.expires)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for record in self.records():
            if record.revoked is not None:
                revoked = x509.RevokedCertificateBuilder().serial_number(record.serial).revocation_date(record.revoked)
                builder = builder.add_revoked_certificate(revoked.build())
        pem = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode("ascii")
        self.revocations.mkdir(exist_ok=True)
        _replace(self.folder / "crl.pem", pem)
        _replace(self.revocations / f"{subject_hash(self._authority.subject)}.r0", pem)

    def _lines(self) -> list[_Line]:
        file = self.folder / "index.jsonl"
        lines = []
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), start=1):
            try:
                lines.append(_Line.model_validate_json(text))
            except ValidationError as exc:
                raise DamagedError(f"{file} is damaged in line {number}: restore it from a backup") from exc
        return lines

    def _note(
        self, event: Event, serial: int, name: str, *, hosts: tuple[str, ...] = (), expires: datetime | None = None
    ) -> None:
        line = _Line(event=event, at=self._clock(), serial=f"{serial:x}", name=name, hosts=hosts, expires=expires)
        with (self.folder / "index.jsonl").open("a", encoding="utf-8") as sink:
            sink.write(line.model_dump_json(exclude_defaults=True) + "\n")
            sink.flush()
            os.fsync(sink.fileno())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / "index.jsonl").open("a", encoding="utf-8") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield


def common_name(certificate_pem: str, *, what: str) -> str:
    """Of the first certificate in the text: the user of the broker as which it logs in. Raises ConfigurationError."""
    names = _certificate(certificate_pem, what=what).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise ConfigurationError(f"{what} has {len(names)} common names, and the broker takes one for the user")
    return str(names[0].value)


def subject_hash(name: x509.Name) -> str:
    """As `openssl x509 -subject_hash`, which OpenSSL and Erlang name files in a folder by (X509_NAME_hash: SHA-1 of the canonical
    name, of which the first 4 bytes count, the lowest first). Canonical: UTF-8, lower case, single spaces, no outer header."""
    sets = []
    for rdn in name.rdns:
        attributes = [x509.NameAttribute(one.oid, " ".join(str(one.value).split()).lower()) for one in rdn]
        whole = x509.Name([x509.RelativeDistinguishedName(attributes)]).public_bytes()
        sets.append(_contents(whole))
    digest = hashlib.sha1(b"".join(sets), usedforsecurity=False).digest()
    return f"{int.from_bytes(digest[:4], 'little'):08x}"


def _contents(der: bytes) -> bytes:
    """Without tag and length."""
    return der[2:] if der[1] < 0x80 else der[2 + (der[1] & 0x7F) :]


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise ConfigurationError(
            f"{name!r} cannot be the name of a certificate: use letters, digits, ., - and _, at most 63 of them, and not "
            f"{', '.join(_TAKEN)}"
        )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host) or len(host) > 253:
            raise ConfigurationError(f"{host!r} is no host: expected a name such as broker.example.org, or an address") from None
        return x509.DNSName(host)


def _self_signed(key: ec.EllipticCurvePrivateKey, *, days: int, now: datetime) -> x509.Certificate:
    if days < 1:
        raise ConfigurationError(f"an authority cannot be valid for {days} days")
    # Two authorities of one name would be taken for each other, and the error would be a bad signature, not an unknown CA.
    name = _name(f"broker-fl CA {os.urandom(4).hex()}")
    return (
        _builder(name, name, key.public_key(), expires=now + timedelta(days=days), now=now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, expires: datetime, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate(pem: str, *, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as exc:
        raise ConfigurationError(f"{what} holds no certificate in PEM: expected -----BEGIN CERTIFICATE-----") from exc


def _load_key(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError):
        # Its message could show a part of the key. TypeError: it is encrypted.
        raise ConfigurationError(f"{file} holds no private key in PEM that can be read without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(f"{file} holds a key of another kind: expected ECDSA")
    return key


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> str:
    encoding, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, kind, serialization.NoEncryption()).decode("ascii")


def _write_new(file: Path, text: str, *, mode: int) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as sink:
        sink.write(text)
        sink.flush()
        os.fsync(sink.fileno())


def _replace(file: Path, text: str) -> None:
    """Whole or not at all: a broker may be reading it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    _write_new(partial, text, mode=0o644)
    partial.replace(file)


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(f"the certificates in {folder} cannot be read or written: {exc}") from exc
