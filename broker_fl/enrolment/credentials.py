"""What lets a party in: a password or a certificate, and the key of its signatures; and the file that its worker reads.

The file is begun (NAME.toml.part) before anything is made on the broker, and gets its name when all is made: a party that was
half made, by somebody who was interrupted, goes on with the credentials that it began with.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pydantic import SecretStr

from broker_fl.config import Settings
from broker_fl.definitions import SALT_BYTES, password_hash
from broker_fl.errors import ConfigurationError
from broker_fl.keys import key_of
from broker_fl.management import User
from broker_fl.signing import SigningKey

MODE = 0o600
FOLDER_MODE = 0o700

_HASHES = {"rabbit_password_hashing_sha256": hashlib.sha256, "rabbit_password_hashing_sha512": hashlib.sha512}


@dataclass(frozen=True, slots=True)
class Certificate:
    """As PEM texts."""

    certificate: str
    key: SecretStr


@dataclass(frozen=True, slots=True)
class Credentials:
    """Without a password the party logs in by a certificate, which may be none of ours. `key` is None where it made its own, or
    where nothing is signed."""

    password: SecretStr | None
    key: SigningKey | None
    certificate: Certificate | None = None

    def hash(self) -> str:
        """For the broker; "" lets no password in."""
        if self.password is None:
            return ""
        return password_hash(self.password.get_secret_value(), salt=secrets.token_bytes(SALT_BYTES))

    def opens(self, user: User) -> bool:
        """Whether the broker's user has this password."""
        if self.password is None:
            return user.password_hash == ""
        kind = _HASHES.get(user.hashing)
        try:
            kept = base64.b64decode(user.password_hash, validate=True)
        except binascii.Error:
            return False
        if kind is None or len(kept) <= SALT_BYTES:
            return False
        salt, digest = kept[:SALT_BYTES], kept[SALT_BYTES:]
        return hmac.compare_digest(kind(salt + self.password.get_secret_value().encode()).digest(), digest)


Issue = Callable[[str], Certificate | None]
"""A certificate for the party of this name; None where it has one from elsewhere."""


def new_credentials(name: str, *, has_own_key: bool = False, issue: Issue | None = None) -> Credentials:
    """A password, or what `issue` gives. Raises what that raises."""
    key = None if has_own_key else SigningKey.generate()
    if issue is None:
        return Credentials(SecretStr(secrets.token_urlsafe(24)), key)
    return Credentials(None, key, issue(name))


class Keeper(Protocol):
    """Where the credentials of new parties are kept. All raise ConfigurationError."""

    def begun(self, name: str) -> Credentials | None:
        """Of somebody who was interrupted."""

    def finished(self, name: str) -> Credentials | None: ...

    def begin(self, name: str, credentials: Credentials, *, over: bool = False) -> None:
        """`over`: in place of what was begun; else nothing may be."""

    def finish(self, name: str, *, over: bool = False) -> None:
        """`over`: in place of what was finished before."""


class Unkept:
    """For whoever takes them from memory."""

    def __init__(self) -> None:
        self.credentials: dict[str, Credentials] = {}

    def begun(self, name: str) -> Credentials | None:
        return self.credentials.get(name)

    def finished(self, name: str) -> Credentials | None:
        return self.credentials.get(name)

    def begin(self, name: str, credentials: Credentials, *, over: bool = False) -> None:  # noqa: ARG002
        self.credentials[name] = credentials

    def finish(self, name: str, *, over: bool = False) -> None:
        pass


class PartyFiles:
    """A file for each party."""

    def __init__(self, settings: Settings, *, aggregator_key: str, file_of: Callable[[str], Path]) -> None:
        self._settings = settings
        self._aggregator_key = aggregator_key
        self._file_of = file_of

    def begun(self, name: str) -> Credentials | None:
        return read_credentials(self._part_of(name))

    def finished(self, name: str) -> Credentials | None:
        return read_credentials(self._file_of(name))

    def begin(self, name: str, credentials: Credentials, *, over: bool = False) -> None:
        text = party_file(self._settings, name=name, credentials=credentials, aggregator_key=self._aggregator_key)
        _write(self._part_of(name), text, over=over)

    def finish(self, name: str, *, over: bool = False) -> None:
        part, file = self._part_of(name), self._file_of(name)
        try:
            if over:
                part.replace(file)
            elif part.exists() or not file.exists():
                os.link(part, file)
                part.unlink(missing_ok=True)
            # Else somebody who does the same was faster.
        except FileExistsError as exc:
            raise ConfigurationError(f"{file} exists already: move it away first") from exc
        except OSError as exc:
            raise ConfigurationError(f"{file} cannot be written: {exc.strerror}") from exc

    def _part_of(self, name: str) -> Path:
        file = self._file_of(name)
        return file.with_name(f"{file.name}.part")


def make_folder_of_files(folder: Path) -> None:
    """For its owner alone, where it is not there. Raises ConfigurationError."""
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"{folder} cannot be a folder for the parties' files: {exc.strerror}") from exc


def party_file(settings: Settings, *, name: str, credentials: Credentials, aggregator_key: str) -> str:
    """All that a worker needs beside its data, as TOML. Raises ConfigurationError where the file of the CA cannot be read."""
    broker, certificate = settings.broker, credentials.certificate
    task = settings.task.model_dump(
        mode="json", include={"name", "model", "features", "classes", "image_shape"}, exclude_none=True
    )
    connection: dict[str, object] = {"url": _own_url(settings, name, credentials.password)}
    if broker.ca is not None:
        connection["ca"] = broker.pem("ca")
    if certificate is not None:
        connection |= {"certificate": certificate.certificate, "certificate_key": certificate.key.get_secret_value()}
    connection |= {"max_message_bytes": broker.max_message_bytes, "part_bytes": broker.part_bytes}
    security: dict[str, object] = {"signatures": False}
    if settings.security.signatures:
        security = {"aggregator_key": aggregator_key}
        if credentials.key is not None:
            security["party_key"] = credentials.key.text()
    sections: dict[str, Mapping[str, object]] = {
        "federation": {"name": settings.federation.name},
        "broker": connection,
        "task": task,
        "worker": {"party": name},
        "security": security,
    }
    if settings.privacy.is_asked_for:
        sections["privacy"] = {"mechanism": settings.privacy.mechanism}
    lines = [f"# Party {name!r} of federation {settings.federation.name!r}. This file lets it in: keep it from others."]
    for section, keys in sections.items():
        lines += [f"[{section}]", *(_toml(key, value) for key, value in keys.items()), ""]
    return "\n".join(lines)


def read_credentials(file: Path) -> Credentials | None:
    """Of a party's file; None where there is none. Raises ConfigurationError."""
    # A link that leads nowhere is something, too.
    if not os.path.lexists(file):
        return None
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(f"{file} cannot be read: move it away ({exc})") from exc
    try:
        # One from before there were keys has no [security].
        broker, key = values["broker"], values.get("security", {}).get("party_key")
        password = urlsplit(broker["url"]).password
        has_certificate = "certificate" in broker
        certificate = Certificate(broker["certificate"], SecretStr(broker["certificate_key"])) if has_certificate else None
    except (KeyError, TypeError, ValueError, AttributeError):
        # Their messages could show a secret.
        raise ConfigurationError(f"{file} is no party's file: move it away") from None
    return Credentials(
        None if password is None else SecretStr(unquote(password)),
        None if key is None else key_of(key, what=str(file)),
        certificate,
    )


def _own_url(settings: Settings, name: str, password: SecretStr | None) -> str:
    url = urlsplit(settings.broker.url.get_secret_value())
    _, _, host = url.netloc.rpartition("@")
    login = "" if password is None else f"{name}:{quote(password.get_secret_value(), safe='')}@"
    return urlunsplit(url._replace(netloc=f"{login}{host}"))


def _write(file: Path, text: str, *, over: bool) -> None:
    """Whole or not at all, for its owner alone."""
    partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
        with os.fdopen(handle, "w", encoding="utf-8") as sink:
            sink.write(text)
            sink.flush()
            os.fsync(sink.fileno())
        if over:
            partial.replace(file)
        else:
            os.link(partial, file)
            partial.unlink()
    except FileExistsError as exc:
        partial.unlink(missing_ok=True)
        raise ConfigurationError(f"{file} was just made by somebody else, who enrols the same party: try again") from exc
    except OSError as exc:
        raise ConfigurationError(f"{file} cannot be written: {exc.strerror}") from exc


def _toml(key: str, value: object) -> str:
    # Strings, numbers, booleans and lists of numbers are written in TOML as they are in JSON.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"
