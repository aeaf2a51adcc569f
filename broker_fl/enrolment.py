"""Making and unmaking parties on the broker, and the file that a party's worker reads."""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pydantic import SecretStr

from broker_fl.config import BrokerSettings, Settings
from broker_fl.errors import ConfigurationError, NotFoundError
from broker_fl.management import Management
from broker_fl.topology import Names, party, party_permissions, shared_without_logs
from schemas.ids import is_name


def management_of(broker: BrokerSettings) -> Management:
    """The management API of the broker and vhost that the settings name."""
    path = urlsplit(broker.url.get_secret_value()).path.removeprefix("/")
    return Management(broker.management().get_secret_value(), vhost=unquote(path) or "/")


async def add_party(management: Management, settings: Settings, name: str) -> SecretStr:
    """User, permissions, exchange, binding and inbox; returns the password. Raises ConfigurationError for a name in use."""
    federation = settings.federation.name
    if not is_name(name):
        raise ConfigurationError(f"{name!r} cannot be a party: use lower-case letters, digits, - and _, at most 63 of them")
    if await management.user_exists(name):
        raise ConfigurationError(
            f"the broker has a user {name!r} already: `broker-fl party remove {name}` first, or choose another"
        )
    password = SecretStr(secrets.token_urlsafe(24))
    await management.apply(shared_without_logs(federation))
    await management.apply(party(federation, name))
    await management.put_user(name, password)
    await management.put_permissions(name, party_permissions(federation, name))
    return password


async def list_parties(management: Management, settings: Settings) -> list[str]:
    """By their inboxes."""
    prefix = Names(settings.federation.name).inbox("")
    return sorted(queue.name.removeprefix(prefix) for queue in await management.queues(prefix))


async def ask_parties(settings: Settings) -> list[str]:
    """Of the broker, on a connection of its own. Raises BrokerError."""
    async with management_of(settings.broker) as management:
        return await list_parties(management, settings)


async def remove_party(management: Management, settings: Settings, name: str) -> None:
    """The user first, which closes its connections; then what was its own. Its updates in the queue are still merged."""
    if name not in await list_parties(management, settings):
        raise NotFoundError(f"no party {name!r} in federation {settings.federation.name!r}: `broker-fl party list` shows all")
    names = Names(settings.federation.name)
    # A removal that was interrupted goes on where it was.
    with suppress(NotFoundError):
        await management.delete_user(name)
    with suppress(NotFoundError):
        await management.delete_exchange(names.up(name))
    await management.delete_queue(names.inbox(name))


def write_enrolment(file: Path, settings: Settings, *, name: str, password: SecretStr) -> None:
    """All that a worker needs beside its data, mode 0600. Raises ConfigurationError rather than write over a file."""
    url = urlsplit(settings.broker.url.get_secret_value())
    _, _, host = url.netloc.rpartition("@")
    own = urlunsplit(url._replace(netloc=f"{name}:{quote(password.get_secret_value(), safe='')}@{host}"))
    task = settings.task.model_dump(
        mode="json", include={"name", "model", "features", "classes", "image_shape"}, exclude_none=True
    )
    lines = [
        f"# Party {name!r} of federation {settings.federation.name!r}. This file holds its password: keep it from others.",
        "[federation]",
        _toml("name", settings.federation.name),
        "",
        "[broker]",
        _toml("url", own),
        _toml("max_message_bytes", settings.broker.max_message_bytes),
        _toml("part_bytes", settings.broker.part_bytes),
        "",
        "[task]",
        *(_toml(key, value) for key, value in task.items()),
        "",
        "[worker]",
        _toml("party", name),
    ]
    if settings.privacy.is_asked_for:
        lines += ["", "[privacy]", _toml("mechanism", settings.privacy.mechanism)]
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as exc:
        raise ConfigurationError(f"{file} exists already: move it away first") from exc
    except OSError as exc:
        raise ConfigurationError(f"{file} cannot be written: {exc}") from exc
    with os.fdopen(handle, "w", encoding="utf-8") as sink:
        sink.write("\n".join(lines) + "\n")


def _toml(key: str, value: object) -> str:
    # Strings, numbers and lists of numbers are written in TOML as they are in JSON.
    return f"{key} = {json.dumps(value)}"
