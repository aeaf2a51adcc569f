"""The two brokers that the contract suite runs over, and what its tests need of them beside a Transport."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol
from urllib.parse import quote

import httpx
from pydantic import SecretStr

from broker_fl.config import BrokerSettings
from broker_fl.management import Management
from broker_fl.topology import Policy, party_permissions
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.memory import MemoryBroker, MemoryTransport
from broker_fl.transports.transport import Delivery, Feed, Transport

MAX_MESSAGE_BYTES = 16 << 20
"""Of the node that the tests share, and of the broker in memory."""

PATIENCE_S = 15.0


class BrokerUnderTest(Protocol):
    @property
    def administrator(self) -> str: ...

    def connect(self, name: str = "contract", *, user: str | None = None) -> AbstractAsyncContextManager[Transport]:
        """As this user, else as the administrator."""

    async def add_party(self, federation: str) -> str:
        """A user with a new name, which is returned, and the rights of a party."""

    async def apply_policies(self, *policies: Policy) -> None: ...

    async def delete_queue(self, name: str) -> None: ...

    async def connection_names(self) -> set[str]: ...

    async def break_connections(self, name: str) -> None:
        """From the broker's side."""

    async def restart(self) -> None:
        """Where breaking connections meant to stop."""

    async def cut(self, transport: Transport, *, name: str) -> None:
        """This connection alone, which has that name, from the broker's side."""


class MemoryUnderTest:
    administrator = "admin"

    def __init__(self) -> None:
        self.broker = MemoryBroker(max_message_bytes=MAX_MESSAGE_BYTES)

    def connect(self, name: str = "contract", *, user: str | None = None) -> AbstractAsyncContextManager[Transport]:
        return self.broker.connect(name, user=user or self.administrator)

    async def add_party(self, federation: str) -> str:
        name = new_name()
        self.broker.users[name] = party_permissions(federation, name)
        return name

    async def apply_policies(self, *policies: Policy) -> None:
        self.broker.apply_policies(policies)

    async def delete_queue(self, name: str) -> None:
        self.broker.delete_queue(name)

    async def connection_names(self) -> set[str]:
        return set(self.broker.connections())

    async def break_connections(self, name: str) -> None:
        self.broker.stop()

    async def restart(self) -> None:
        self.broker.start()

    async def cut(self, transport: Transport, *, name: str) -> None:
        assert isinstance(transport, MemoryTransport)
        transport.cut()


class RabbitMQUnderTest:
    """A vhost of the shared node. Its users go with the node."""

    def __init__(self, *, url: str, management_url: str, management: Management) -> None:
        self._settings = BrokerSettings(url=SecretStr(url))
        self._management_url = management_url
        self._management = management

    @property
    def administrator(self) -> str:
        return self._settings.user()

    def connect(self, name: str = "contract", *, user: str | None = None) -> AbstractAsyncContextManager[Transport]:
        return amqp_connect(self._settings if user is None else login(self._settings, user, password_of(user)))(name)

    async def add_party(self, federation: str) -> str:
        name = new_name()
        await self._management.put_user(name, SecretStr(password_of(name)))
        await self._management.put_permissions(name, party_permissions(federation, name))
        return name

    async def apply_policies(self, *policies: Policy) -> None:
        await self._management.apply_policies(policies)

    async def delete_queue(self, name: str) -> None:
        await self._management.delete_queue(name)

    async def connection_names(self) -> set[str]:
        return {connection.name for connection in await self._management.connections()}

    async def break_connections(self, name: str) -> None:
        """A new connection takes a moment to appear in the list."""
        wanted, broken = {name, f"{name} (publish)"}, set()
        async with httpx.AsyncClient(base_url=f"{self._management_url}/api/", trust_env=False) as api, patience():
            while broken != wanted:
                for connection in (await api.get("connections")).json():
                    own_name = connection.get("client_properties", {}).get("connection_name")
                    if own_name in wanted - broken:
                        (await api.delete(f"connections/{quote(connection['name'], safe='')}")).raise_for_status()
                        broken.add(own_name)
                await asyncio.sleep(0.1)

    async def restart(self) -> None:
        """It only closed a connection."""

    async def cut(self, transport: Transport, *, name: str) -> None:
        await self.break_connections(name)


def login(settings: BrokerSettings, user: str, password: str) -> BrokerSettings:
    """The same broker and vhost as somebody else."""
    scheme, _, rest = settings.url.get_secret_value().partition("://")
    _, _, place = rest.rpartition("@")
    return settings.model_copy(update={"url": SecretStr(f"{scheme}://{user}:{password}@{place}")})


def new_name() -> str:
    """Users belong to the whole node, which all tests share."""
    return f"party-{secrets.token_hex(4)}"


def password_of(user: str) -> str:
    return f"password-of-{user}"


def patience() -> asyncio.Timeout:
    return asyncio.timeout(PATIENCE_S)


async def take(feed: Feed, count: int) -> list[Delivery]:
    async with patience():
        return [await feed.receive() for _ in range(count)]


async def take_until(feed: Feed, body: bytes) -> list[Delivery]:
    """Up to the one with this body."""
    taken: list[Delivery] = []
    async with patience():
        while not taken or taken[-1].body != body:
            taken.append(await feed.receive())
    return taken


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    """For what can only be asked again and again."""
    async with patience():
        while True:
            if await what():
                return
            await asyncio.sleep(0.02)


def bodies(deliveries: Iterable[Delivery]) -> list[bytes]:
    return [delivery.body for delivery in deliveries]
