"""Parties are made and unmade on the real broker, and their files let them in."""

import asyncio
import secrets
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker_fl.config import Settings, load_settings
from broker_fl.enrolment import add_party, list_parties, management_of, remove_party, write_enrolment
from broker_fl.errors import AccessRefusedError, AuthenticationError, BrokerUnavailableError, ConfigurationError, NotFoundError
from broker_fl.management import Management
from broker_fl.topology import Names, shared
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.transport import Delivery, Feed, Message, Transport

NAMES = Names("digits")


@dataclass(frozen=True, slots=True)
class Office:
    """Who enrols: the settings and the management API of an administrator."""

    settings: Settings
    management: Management
    folder: Path

    async def enrol(self, name: str) -> Settings:
        """What the party's worker reads."""
        password = await add_party(self.management, self.settings, name)
        file = self.folder / f"{name}.toml"
        write_enrolment(file, self.settings, name=name, password=password)
        return load_settings(file, environment={})


@pytest.fixture
async def office(vhost, tmp_path) -> AsyncIterator[Office]:
    settings = settings_for(url=vhost.url, management_url=vhost.management_url)
    async with management_of(settings.broker) as management:
        yield Office(settings, management, tmp_path)
        for name in await list_parties(management, settings):
            await remove_party(management, settings, name)


def settings_for(federation: str = "digits", **broker: object) -> Settings:
    return load_settings(flags={"federation": {"name": federation}, "broker": broker}, environment={})


def new_name(prefix: str = "party") -> str:
    """Users belong to the whole node, which all tests share."""
    return f"{prefix}-{secrets.token_hex(4)}"


async def take(feed: Feed) -> Delivery:
    async with asyncio.timeout(15):
        return await feed.receive()


# On the broker


@pytest.mark.rabbitmq
async def test_enrolled_party_logs_in_by_its_file_with_the_rights_of_a_party(office):
    alice, bob = new_name("alice"), new_name("bob")
    enrolled = await office.enrol(alice)
    await office.enrol(bob)
    assert (enrolled.worker.party, enrolled.broker.user(), enrolled.federation.name) == (alice, alice, "digits")
    async with amqp_connect(office.settings.broker)("admin") as admin:
        await admin.declare(shared("digits"))
        await admin.publish(Message(NAMES.receipts, b"receipt", routing_key=alice))
    async with amqp_connect(enrolled.broker)("worker") as party:
        await party.publish(Message(NAMES.up(alice), b"update"))
        async with party.consume(NAMES.inbox(alice), prefetch=1, name="worker", exclusive=True) as inbox:
            assert (await take(inbox)).body == b"receipt"
        for exchange, log in ((NAMES.model, NAMES.model_log), (NAMES.keyframes, NAMES.keyframe_log)):
            async with party.follow(log, start="last", name="worker") as frames:
                async with amqp_connect(office.settings.broker)("admin") as admin:
                    await admin.publish(Message(exchange, log.encode()))
                assert (await take(frames)).body == log.encode()
            # A refusal closes the channel that was published on.
            async with amqp_connect(enrolled.broker)("forger") as forger:
                with pytest.raises(AccessRefusedError):
                    await forger.publish(Message(exchange, b"forged"))
        with pytest.raises(AccessRefusedError):
            async with party.consume(NAMES.inbox(bob), prefetch=1, name="worker"):
                pass
        with pytest.raises(AccessRefusedError):
            await party.declare(shared("digits"))
        with pytest.raises(AccessRefusedError):
            await party.publish(Message(NAMES.up(bob), b"forged"))
    async with (
        amqp_connect(office.settings.broker)("admin") as admin,
        admin.consume(NAMES.updates, prefetch=1, name="aggregator") as updates,
    ):
        assert (await take(updates)).user_id == alice


@pytest.mark.rabbitmq
async def test_parties_of_a_federation_are_listed_by_name(office, vhost):
    first, second, third = new_name("c"), new_name("a"), new_name("b")
    other = Office(settings_for("digits-2", url=vhost.url, management_url=vhost.management_url), office.management, office.folder)
    assert await list_parties(office.management, office.settings) == []
    await office.enrol(first)
    await office.enrol(second)
    await other.enrol(third)
    assert await list_parties(office.management, office.settings) == [second, first]
    assert await list_parties(other.management, other.settings) == [third]
    await remove_party(other.management, other.settings, third)


@pytest.mark.rabbitmq
async def test_name_of_an_existing_user_is_refused_and_the_user_keeps_its_password(office):
    alice = new_name("alice")
    enrolled = await office.enrol(alice)
    with pytest.raises(ConfigurationError, match=f"{alice}.*already"):
        await add_party(office.management, office.settings, alice)
    async with amqp_connect(enrolled.broker)("worker") as party:
        await party.publish(Message(NAMES.up(alice), b"update"))


@pytest.mark.rabbitmq
@pytest.mark.parametrize("name", ["", "Alice", "a.b", "-a", "a b", "ä", "a" * 64, "admin.local", "a\n"])
async def test_name_that_cannot_be_a_party_is_refused_before_anything_is_made(office, name: str):
    with pytest.raises(ConfigurationError, match="cannot be a party"):
        await add_party(office.management, office.settings, name)
    assert await office.management.queues() == ()


@pytest.mark.rabbitmq
async def test_removing_a_party_closes_its_live_connections_and_keeps_its_updates(office):
    alice = new_name("alice")
    enrolled = await office.enrol(alice)
    async with amqp_connect(enrolled.broker)("worker") as party:
        await party.publish(Message(NAMES.up(alice), b"update"))
        async with party.consume(NAMES.inbox(alice), prefetch=1, name="worker", exclusive=True) as inbox:
            waiting = asyncio.create_task(inbox.receive())
            await remove_party(office.management, office.settings, alice)
            async with asyncio.timeout(5):
                with pytest.raises(BrokerUnavailableError):
                    await waiting
                with pytest.raises(BrokerUnavailableError):
                    await publish_for_ever(party, NAMES.up(alice))
    assert await list_parties(office.management, office.settings) == []
    with pytest.raises(AuthenticationError, match=alice):
        async with amqp_connect(enrolled.broker)("worker"):
            pass
    async with amqp_connect(office.settings.broker)("admin") as admin:
        async with admin.consume(NAMES.updates, prefetch=1, name="aggregator") as updates:
            update = await take(updates)
        with pytest.raises(NotFoundError):
            await admin.publish(Message(NAMES.up(alice), b""))
    assert (update.body, update.user_id) == (b"update", alice)


async def publish_for_ever(transport: Transport, exchange: str) -> None:
    while True:
        await transport.publish(Message(exchange, b"too late", mandatory=False))


@pytest.mark.rabbitmq
async def test_removed_party_is_enrolled_again_with_another_password(office):
    alice = new_name("alice")
    before = await office.enrol(alice)
    await remove_party(office.management, office.settings, alice)
    (office.folder / f"{alice}.toml").unlink()
    after = await office.enrol(alice)
    assert before.broker.url != after.broker.url
    async with amqp_connect(after.broker)("worker") as party:
        await party.publish(Message(NAMES.up(alice), b"update"))
    with pytest.raises(AuthenticationError):
        async with amqp_connect(before.broker)("worker"):
            pass


@pytest.mark.rabbitmq
async def test_party_that_nobody_knows_cannot_be_removed(office):
    alice = new_name("alice")
    await office.enrol(alice)
    with pytest.raises(NotFoundError, match=r"no party 'nobody' in federation 'digits'.*party list"):
        await remove_party(office.management, office.settings, "nobody")
    assert await list_parties(office.management, office.settings) == [alice]


@pytest.mark.rabbitmq
async def test_user_who_is_no_party_is_not_removed(office, rabbitmq):
    for name in (rabbitmq.user, new_name("operator")):
        with pytest.raises(NotFoundError):
            await remove_party(office.management, office.settings, name)
    assert await office.management.user_exists(rabbitmq.user)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("gone", ["user", "exchange"])
async def test_removal_that_was_interrupted_is_finished_by_another_one(office, gone: str):
    alice = new_name("alice")
    await office.enrol(alice)
    await office.management.delete_user(alice)
    if gone == "exchange":
        await office.management.delete_exchange(NAMES.up(alice))
    try:
        await remove_party(office.management, office.settings, alice)
    finally:
        left = await list_parties(office.management, office.settings)
        for name in left:
            await office.management.delete_queue(NAMES.inbox(name))
    assert left == []


# The file


ADMINISTRATOR = "amqps://admin:secret-of-admin@broker.example:5671/my%2Fvhost?cafile=ca.pem"


def written(file: Path, settings: Settings) -> Settings:
    write_enrolment(file, settings, name="alice", password=SecretStr("correct-horse_1"))
    return load_settings(file, environment={})


def test_file_is_for_its_owner_alone_and_does_not_hold_the_administrators_login(tmp_path):
    file = tmp_path / "alice.toml"
    enrolled = written(file, settings_for(url=ADMINISTRATOR))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "admin" not in file.read_text()
    assert enrolled.broker.url.get_secret_value() == (
        "amqps://alice:correct-horse_1@broker.example:5671/my%2Fvhost?cafile=ca.pem"
    )
    assert enrolled.worker.party == "alice"


def test_file_says_what_the_federation_trains_and_not_where_the_administrators_data_is(tmp_path):
    flags = {
        "federation": {"name": "scans"},
        "broker": {"url": ADMINISTRATOR},
        "task": {"name": "npz", "model": "resnet18", "classes": 7, "image_shape": [1, 28, 28], "data": "/private/data"},
    }
    settings = load_settings(flags=flags, environment={})
    enrolled = written(tmp_path / "alice.toml", settings)
    assert enrolled.federation == settings.federation
    assert enrolled.task == settings.task.model_copy(update={"data": None})


@pytest.mark.parametrize(
    ("host", "expected"), [("[::1]:5672", "[::1]:5672"), ("broker", "broker"), ("broker:1234", "broker:1234")]
)
def test_file_keeps_the_brokers_address(tmp_path, host: str, expected: str):
    enrolled = written(tmp_path / "alice.toml", settings_for(url=f"amqp://admin:secret@{host}/"))
    assert enrolled.broker.url.get_secret_value() == f"amqp://alice:correct-horse_1@{expected}/"


def test_file_of_a_broker_with_a_small_limit_loads(tmp_path):
    settings = settings_for(url=ADMINISTRATOR, max_message_bytes=262_144, part_bytes=65_536)
    enrolled = written(tmp_path / "alice.toml", settings)
    assert enrolled.broker.max_message_bytes == 262_144
    assert enrolled.broker.part_bytes == 65_536


def test_file_that_exists_is_never_written_over(tmp_path):
    file, target = tmp_path / "alice.toml", tmp_path / "elsewhere"
    file.write_text("precious")
    with pytest.raises(ConfigurationError, match=r"alice\.toml exists already"):
        written(file, settings_for(url=ADMINISTRATOR))
    assert file.read_text() == "precious"
    file.unlink()
    file.symlink_to(target)
    with pytest.raises(ConfigurationError, match=r"alice\.toml exists already"):
        written(file, settings_for(url=ADMINISTRATOR))
    assert not target.exists()


def test_file_that_cannot_be_written_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be written"):
        written(tmp_path / "nowhere" / "alice.toml", settings_for(url=ADMINISTRATOR))


async def test_enrolment_leaves_the_logs_to_the_aggregator_which_makes_their_policies_first(office):
    """The size of a log's segments is fixed when it is made, and only whole segments are ever dropped."""
    await office.enrol(new_name("alice"))
    made = {queue.name for queue in await office.management.queues("fl.digits.")}
    assert NAMES.updates in made
    assert not made & {NAMES.model_log, NAMES.keyframe_log}
