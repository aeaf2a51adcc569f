import secrets
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from enrolling import OPERATOR_PASSWORD, AddUser, Site, new_name, settings_of
from pydantic import SecretStr

from broker_fl.enrolment import open_office
from broker_fl.errors import NotFoundError
from broker_fl.management import Management
from broker_fl.topology import Permissions


@pytest.fixture
async def site(vhost, tmp_path) -> AsyncIterator[Site]:
    async with open_office(settings_of(vhost.url, vhost.management_url, tmp_path)) as office:
        site = Site(office, tmp_path)
        yield site
        await site.empty()


@pytest.fixture
async def add_user(vhost) -> AsyncIterator[AddUser]:
    """Users that are no parties."""
    added: list[str] = []

    async def add(*, tags: tuple[str, ...] = (), permissions: Permissions | None = None) -> str:
        name = new_name("user")
        await vhost.management.put_user(name, SecretStr(OPERATOR_PASSWORD), tags)
        added.append(name)
        if permissions is not None:
            await vhost.management.put_permissions(name, permissions)
        return name

    yield add
    for name in added:
        with suppress(NotFoundError):
            await vhost.management.delete_user(name)


@pytest.fixture
async def elsewhere(rabbitmq) -> AsyncIterator[Management]:
    """Another vhost of the same broker."""
    async with Management(rabbitmq.management_url, vhost=f"test-{secrets.token_hex(4)}") as management:
        await management.put_vhost()
        yield management
        await management.delete_vhost()
