"""Parties are made, changed and unmade on the real broker, and their files let them in."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from enrolling import OPERATOR_PASSWORD, Site, new_name, settings_of
from pydantic import SecretStr

from broker_fl.definitions import User, render
from broker_fl.enrolment import (
    Certificate,
    add_parties,
    add_party,
    change_party,
    list_parties,
    open_office,
    party_facts,
    remove_party,
    resume_party,
    rotate_party,
    suspend_party,
)
from broker_fl.enrolment.credentials import new_credentials
from broker_fl.errors import (
    AccessRefusedError,
    AuthenticationError,
    BrokerUnavailableError,
    ConfigurationError,
    ManagementError,
    NotFoundError,
    TopologyConflictError,
)
from broker_fl.management import Management
from broker_fl.signing import SigningKey
from broker_fl.topology import Binding, Exchange, Names, Permissions, Topology, party_permissions, shared
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.transport import Delivery, Feed, Message, Transport

pytestmark = pytest.mark.rabbitmq

NAMES = Names("digits")
SOON_S = 5.0
MANY = 20
"""More than are asked for one by one."""


async def take(feed: Feed) -> Delivery:
    async with asyncio.timeout(15):
        return await feed.receive()


async def publish_for_ever(transport: Transport, exchange: str, is_busy: asyncio.Event) -> None:
    while True:
        await transport.publish(Message(exchange, b"again", mandatory=False))
        is_busy.set()


async def may_publish(site: Site, name: str) -> None:
    async with amqp_connect(site.party(name).broker)("worker") as party:
        await party.publish(Message(NAMES.up(name), b"update"))


@asynccontextmanager
async def busy(site: Site, name: str) -> AsyncIterator[asyncio.Task[None]]:
    """A party that publishes and consumes all the time; the task ends when it is cut off."""
    async with (
        amqp_connect(site.party(name).broker)(f"worker:{name}") as party,
        party.consume(NAMES.inbox(name), prefetch=1, name="worker", exclusive=True) as inbox,
    ):
        is_busy = asyncio.Event()

        async def work() -> None:
            with pytest.raises((BrokerUnavailableError, AccessRefusedError)):
                await publish_for_ever(party, NAMES.up(name), is_busy)
            with pytest.raises(BrokerUnavailableError):
                await take(inbox)

        working = asyncio.create_task(work())
        await is_busy.wait()
        try:
            yield working
        finally:
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


# One


async def test_enrolled_party_logs_in_by_its_file_with_the_rights_of_a_party(site):
    alice, bob = new_name("alice"), new_name("bob")
    assert await site.add(alice) == "new"
    assert await site.add(bob) == "new"
    enrolled = site.party(alice)
    assert (enrolled.worker.party, enrolled.broker.user(), enrolled.federation.name) == (alice, alice, "digits")
    async with amqp_connect(site.office.settings.broker)("admin") as admin:
        await admin.declare(shared("digits"))
        await admin.publish(Message(NAMES.receipts, b"receipt", routing_key=alice))
    async with amqp_connect(enrolled.broker)("worker") as party:
        await party.publish(Message(NAMES.up(alice), b"update"))
        async with party.consume(NAMES.inbox(alice), prefetch=1, name="worker", exclusive=True) as inbox:
            assert (await take(inbox)).body == b"receipt"
        for exchange, log in ((NAMES.model, NAMES.model_log), (NAMES.keyframes, NAMES.keyframe_log)):
            async with party.follow(log, start="last", name="worker") as frames:
                async with amqp_connect(site.office.settings.broker)("admin") as admin:
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
        amqp_connect(site.office.settings.broker)("admin") as admin,
        admin.consume(NAMES.updates, prefetch=1, name="aggregator") as updates,
    ):
        assert (await take(updates)).user_id == alice


async def test_membership_says_what_was_said_and_the_key_of_the_file(site):
    alice = new_name("alice")
    await site.add(alice, display_name="Spital Zürich 😀", group="north", num_samples=10**12, tier="trusted")
    member = await site.member(alice)
    assert (member.federation, member.party, member.suspended) == ("digits", alice, False)
    assert (member.display_name, member.group, member.num_samples, member.tier) == (
        "Spital Zürich 😀",
        "north",
        10**12,
        "trusted",
    )
    key = SigningKey.from_text(site.party(alice).security.party_key.get_secret_value())
    assert member.public_key == key.public
    assert site.party(alice).security.aggregator_key == site.office.public_key


async def test_parties_of_a_federation_are_listed_by_name(site):
    first, second, third = new_name("c"), new_name("a"), new_name("b")
    other = site.of("digits-2")
    management, settings = site.office.management, site.office.settings
    assert await list_parties(management, settings) == []
    await site.add(first)
    await site.add(second)
    await other.add(third)
    assert await list_parties(management, settings) == [second, first]
    assert await list_parties(management, other.office.settings) == [third]
    await other.empty()


async def test_adding_a_party_again_changes_nothing(site):
    alice = new_name("alice")
    await site.add(alice, group="north")
    file, member = site.file(alice).read_bytes(), await site.member(alice)
    user = await site.office.management.user(alice)
    for _ in range(2):
        assert await site.add(alice, group="north") == "unchanged"
        assert await site.add(alice) == "unchanged"
    assert site.file(alice).read_bytes() == file
    assert await site.member(alice) == member
    assert await site.office.management.user(alice) == user


async def test_facts_that_are_said_anew_make_the_next_revision_and_leave_the_rest(site):
    alice = new_name("alice")
    await site.add(alice, group="north", tier="trusted")
    before = await site.member(alice)
    user = await site.office.management.user(alice)
    assert await site.add(alice, group="south", num_samples=7) == "changed"
    after = await site.member(alice)
    assert after.revision > before.revision
    assert (after.group, after.num_samples, after.tier, after.public_key) == ("south", 7, "trusted", before.public_key)
    assert await site.office.management.user(alice) == user
    assert await change_party(site.office, party_facts(alice, {"group": None})) == await site.member(alice)
    last = await site.member(alice)
    assert (last.group, last.num_samples) == (None, 7)
    assert last.revision > after.revision
    assert await change_party(site.office, party_facts(alice, {"num_samples": 7})) == last
    await may_publish(site, alice)


@pytest.mark.parametrize("count", [1, MANY])
async def test_what_a_party_lacks_is_made_again(site, count: int):
    names = [new_name(f"p{number}") for number in range(count)]
    roster = [party_facts(name) for name in names]
    await site.add_all(roster)
    management, alice = site.office.management, names[-1]
    wanted = await management.found(), await management.permissions_of(alice), await management.user(alice)
    await management.delete_queue(NAMES.inbox(alice))
    await management.delete_exchange(NAMES.up(alice))
    await management.delete_permissions(alice)
    await management.put_user_limits(alice, {"max-connections": 100, "max-channels": 1})
    for name in names[:2]:
        await management.put_permissions(name, Permissions(".*", ".*", ".*"))
    assert set((await site.add_all(roster)).values()) == {"unchanged"}
    assert await management.permissions_of(names[0]) == {management.vhost: party_permissions("digits", names[0])}
    assert (await management.found(), await management.permissions_of(alice), await management.user(alice)) == wanted
    await may_publish(site, alice)


@pytest.mark.parametrize("count", [1, MANY])
async def test_something_of_another_kind_in_the_place_of_a_partys_own_is_said(site, count: int):
    names = [new_name(f"p{number}") for number in range(count)]
    await site.office.management.apply(Topology((Exchange(NAMES.up(names[0]), "direct"),)))
    try:
        with pytest.raises(TopologyConflictError, match=NAMES.up(names[0]).replace(".", r"\.")):
            await site.add_all([party_facts(name) for name in names])
    finally:
        await remove_party(site.office, names[0])


async def test_party_with_a_key_of_its_own_tells_the_public_one_alone(site):
    alice, key, other = new_name("alice"), SigningKey.generate(), SigningKey.generate()
    await site.add(alice, public_key=key.public)
    assert site.party(alice).security.party_key is None
    assert (await site.member(alice)).public_key == key.public
    assert await site.add(alice) == "unchanged"
    assert await site.add(alice, public_key=other.public) == "changed"
    assert (await site.member(alice)).public_key == other.public
    await site.rotate(alice, public_key=key.public)
    assert site.party(alice).security.party_key is None
    assert (await site.member(alice)).public_key == key.public


async def test_federation_without_signatures_gives_no_keys(site, vhost, tmp_path):
    settings = settings_of(vhost.url, vhost.management_url, tmp_path, security={"signatures": False})
    site = dataclasses.replace(site, office=dataclasses.replace(site.office, settings=settings))
    alice = new_name("alice")
    assert await site.add(alice) == "new"
    assert (await site.member(alice)).public_key is None
    assert await site.add(alice) == "unchanged"
    await may_publish(site, alice)


async def test_party_with_a_certificate_has_a_user_without_a_password(site):
    """How it logs in by it, the tests of TLS say."""
    alice, bob = new_name("alice"), new_name("bob")
    settings = site.office.settings
    broker = settings.broker.model_copy(update={"url": SecretStr("amqps://admin:secret@broker.example/v")})
    office = dataclasses.replace(site.office, settings=settings.model_copy(update={"broker": broker}))
    secure = dataclasses.replace(site, office=office)
    pem = Certificate("-----BEGIN CERTIFICATE-----", SecretStr("-----BEGIN PRIVATE KEY-----"))
    await add_parties(office, [party_facts(alice)], secure.files, issue=lambda _: pem)
    await add_parties(office, [party_facts(bob)], secure.files, issue=lambda _: None)
    for name in (alice, bob):
        assert (await office.management.user(name)).password_hash == ""
        assert (await add_parties(office, [party_facts(name)], secure.files))[name] == "unchanged"
        with pytest.raises(ConfigurationError, match="logs in by certificate: --certificate"):
            await rotate_party(office, party_facts(name), secure.files)
        await rotate_party(office, party_facts(name), secure.files, issue=lambda _: pem)
    assert 'url = "amqps://broker.example/v"' in secure.file(bob).read_text()


async def test_one_for_a_benchmark_is_given_its_credentials(site):
    alice = new_name("alice")
    credentials = await add_party(site.office.management, site.office.settings, alice)
    assert credentials.opens(await site.office.management.user(alice))
    assert (await site.member(alice)).public_key == credentials.key.public
    with pytest.raises(ConfigurationError, match="enrolled already"):
        await add_party(site.office.management, site.office.settings, alice)


async def test_enrolment_leaves_the_logs_to_the_aggregator_which_makes_their_policies_first(site):
    """The size of a log's segments is fixed when it is made, and only whole segments are ever dropped."""
    await site.add(new_name("alice"))
    made = {queue.name for queue in await site.office.management.queues("fl.digits.")}
    assert NAMES.updates in made
    assert not made & {NAMES.model_log, NAMES.keyframe_log}


# Who cannot be enrolled


async def test_users_that_are_no_parties_keep_what_they_have(site, add_user, elsewhere):
    everything = Permissions(".*", ".*", ".*")
    strangers = [
        await add_user(),
        await add_user(tags=("monitoring",)),
        await add_user(permissions=everything),
        await add_user(permissions=party_permissions("digits-2", "x")),
    ]
    abroad = await add_user()
    await elsewhere.put_permissions(abroad, party_permissions("digits", abroad))
    management = site.office.management
    for name in (*strangers, abroad):
        before = await management.user(name), await management.permissions_of(name)
        with pytest.raises(
            ConfigurationError, match=f"{name}: the broker has such a user, which is no party.*choose another name"
        ):
            await site.add(name)
        with pytest.raises(NotFoundError):
            await remove_party(site.office, name)
        with pytest.raises(NotFoundError):
            await site.rotate(name)
        with pytest.raises(NotFoundError):
            await suspend_party(site.office, name)
        assert (await management.user(name), await management.permissions_of(name)) == before
    names = [*strangers, abroad, *(new_name() for _ in range(MANY))]
    with pytest.raises(ConfigurationError, match=f"^{', '.join(names[:5])}: the broker has such a user"):
        await site.add_all([party_facts(name) for name in names])
    assert await list_parties(management, site.office.settings) == []


async def test_party_of_another_federation_of_the_same_vhost_is_not_taken_over(site):
    alice, other = new_name("alice"), site.of("digits-2")
    await other.add(alice)
    with pytest.raises(ConfigurationError, match="no party of this federation"):
        await site.add(alice)
    with pytest.raises(NotFoundError):
        await remove_party(site.office, alice)
    async with amqp_connect(other.party(alice).broker)("worker") as party:
        await party.publish(Message(Names("digits-2").up(alice), b"update"))
    await other.empty()


async def test_file_of_an_earlier_enrolment_stands_in_the_way_of_a_new_one(site):
    """Its password and key were given up; they do not come back unseen."""
    alice, bob = new_name("alice"), new_name("bob")
    await site.add(alice)
    await remove_party(site.office, alice)
    with pytest.raises(ConfigurationError, match=f"{alice}: there is a file of an earlier enrolment.*move the file away"):
        await site.add_all([party_facts(bob), party_facts(alice)])
    assert not await site.office.management.user_exists(bob)
    assert not site.part(bob).exists()
    old = site.party(alice)
    site.file(alice).unlink()
    await site.add(alice)
    assert old.broker.url != site.party(alice).broker.url
    with pytest.raises(AuthenticationError):
        async with amqp_connect(old.broker)("worker"):
            pass
    await may_publish(site, alice)


async def test_file_with_other_credentials_than_the_broker_knows_is_said(site):
    alice, elsewhere = new_name("alice"), site.folder / "elsewhere"
    await site.add(alice)
    elsewhere.mkdir()
    await dataclasses.replace(site, folder=elsewhere).rotate(alice)
    with pytest.raises(ConfigurationError, match=f"{alice}: the file holds other credentials.*party rotate"):
        await site.add(alice)


async def test_party_without_its_file_stays_as_it_is(site):
    alice = new_name("alice")
    await site.add(alice)
    user = await site.office.management.user(alice)
    site.file(alice).unlink()
    assert await site.add(alice) == "unchanged"
    assert await site.office.management.user(alice) == user
    assert not site.file(alice).exists()


async def test_party_from_before_the_register_is_told_to_rotate_which_gives_it_an_entry(site):
    alice = new_name("alice")
    await site.add(alice)
    old = site.party(alice)
    await site.office.shelf.delete(alice)
    site.file(alice).unlink()
    for refused in (site.add(alice), change_party(site.office, party_facts(alice, {"group": "a"}))):
        with pytest.raises(ConfigurationError, match=r"register that counts: `broker-fl party rotate"):
            await refused
    await site.rotate(alice)
    assert (await site.member(alice)).public_key is not None
    await may_publish(site, alice)
    with pytest.raises(AuthenticationError):
        async with amqp_connect(old.broker)("worker"):
            pass


@pytest.mark.parametrize("tags", [(), ("monitoring",), ("policymaker",)])
async def test_without_the_rights_nothing_is_made(site, add_user, vhost, tags):
    user, alice = await add_user(tags=tags), new_name("alice")
    url = vhost.management_url.replace(vhost.management_url.split("//")[1].split("@")[0], f"{user}:{OPERATOR_PASSWORD}")
    async with Management(url, vhost=vhost.name) as management:
        poor = dataclasses.replace(site, office=dataclasses.replace(site.office, management=management))
        with pytest.raises(AccessRefusedError, match=user):
            await poor.add(alice)
    assert not site.part(alice).exists()
    assert await site.office.management.queues() == ()


async def test_wrong_url_of_the_management_api_is_one_line(vhost, rabbitmq, tmp_path):
    settings = settings_of(vhost.url, f"http://a:b@127.0.0.1:{rabbitmq.amqp_port}", tmp_path)
    with pytest.raises(BrokerUnavailableError, match="15672"):
        async with open_office(settings):
            pass
    assert not settings.key_file.exists()


# Interrupted


async def test_enrolment_that_only_began_its_file_goes_on_with_what_is_in_it(site):
    alice, credentials = new_name("alice"), new_credentials("alice")
    site.files.begin(alice, credentials)
    assert await site.add(alice, group="north") == "new"
    assert site.files.finished(alice).password == credentials.password
    assert not site.part(alice).exists()
    assert (await site.member(alice)).public_key == credentials.key.public
    await may_publish(site, alice)


@pytest.mark.parametrize("rights", [False, True])
async def test_enrolment_that_made_the_user_goes_on_with_its_password(site, rights: bool):
    alice, credentials = new_name("alice"), new_credentials("alice")
    site.files.begin(alice, credentials)
    users = [User(alice, credentials.hash())]
    granted = {alice: party_permissions("digits", alice)} if rights else {}
    await site.office.management.import_definitions(render(site.office.management.vhost, users=users, permissions=granted))
    assert await site.add(alice) == "new"
    assert (await site.member(alice)).public_key == credentials.key.public
    assert (await site.office.management.user(alice)).limits == site.office.limits
    await may_publish(site, alice)


async def test_user_that_somebody_else_made_meanwhile_is_not_taken_for_ones_own(site, elsewhere):
    """No password opens either of them."""
    alice, management = new_name("alice"), site.office.management
    site.files.begin(alice, new_credentials(alice, issue=lambda _: None))
    await management.import_definitions(render(management.vhost, users=[User(alice)]))
    await elsewhere.put_permissions(alice, Permissions(".*", ".*", ".*"))
    with pytest.raises(ConfigurationError, match="no party of this federation"):
        await site.add(alice)
    assert list(await management.permissions_of(alice)) == [elsewhere.vhost]
    await management.delete_user(alice)


async def test_enrolment_that_only_lacked_the_name_of_its_file_gets_it(site):
    alice = new_name("alice")
    await site.add(alice)
    member = await site.member(alice)
    site.file(alice).rename(site.part(alice))
    assert await site.add(alice) == "unchanged"
    assert await site.member(alice) == member
    await may_publish(site, alice)


async def test_many_that_were_interrupted_in_the_middle_are_finished(site):
    names = [new_name(f"p{number}") for number in range(3 * MANY)]
    roster = [party_facts(name, {"group": "g"}) for name in names]
    await site.add_all(roster[:MANY])
    before = {name: site.file(name).read_bytes() for name in names[:MANY]}
    for name in names[MANY : 2 * MANY]:
        site.files.begin(name, new_credentials(name))
    outcomes = await site.add_all(roster)
    assert [outcomes[name] for name in names] == ["unchanged"] * MANY + ["new"] * 2 * MANY
    assert {name: site.file(name).read_bytes() for name in names[:MANY]} == before
    assert set(await site.add_all(roster)) == set(names)
    signed, planted = await site.office.shelf.all()
    assert (set(signed), planted) == (set(names), [])
    for name in (names[0], names[MANY], names[-1]):
        await may_publish(site, name)
    users = {user.name: user.limits for user in await site.office.management.list_users()}
    assert all(users[name] == site.office.limits for name in names)
    found = await site.office.management.found()
    for name in names:
        assert {Binding(NAMES.up(name), NAMES.updates), Binding(NAMES.receipts, NAMES.inbox(name), name)} <= found.bindings
    assert not list(site.folder.glob("*.part"))


# Rotation, suspension, removal


async def test_rotation_ends_the_old_credentials_and_their_connections(site):
    alice = new_name("alice")
    await site.add(alice, group="north")
    old, before = site.party(alice), await site.member(alice)
    async with busy(site, alice) as working, asyncio.timeout(SOON_S):
        await site.rotate(alice)
        await working
    with pytest.raises(AuthenticationError):
        async with amqp_connect(old.broker)("worker"):
            pass
    after = await site.member(alice)
    assert (after.revision > before.revision, after.group) == (True, "north")
    assert after.public_key == SigningKey.from_text(site.party(alice).security.party_key.get_secret_value()).public
    assert after.public_key != before.public_key
    assert not site.part(alice).exists()
    await may_publish(site, alice)
    assert await site.add(alice) == "unchanged"


async def test_rotation_that_was_interrupted_is_done_again(site):
    alice = new_name("alice")
    await site.add(alice)
    site.files.begin(alice, new_credentials(alice))
    with pytest.raises(ConfigurationError, match=r"other credentials.*party rotate"):
        await site.add(alice)
    await site.rotate(alice)
    await may_publish(site, alice)
    await site.office.management.delete_user(alice)
    await site.rotate(alice)
    await may_publish(site, alice)


async def test_suspended_party_is_cut_off_at_once_and_let_in_again_with_what_it_has(site):
    alice = new_name("alice")
    await site.add(alice, tier="trusted")
    before = await site.member(alice)
    async with busy(site, alice) as working, asyncio.timeout(SOON_S):
        assert await suspend_party(site.office, alice, "sends rubbish") == 2
        await working
    member = await site.member(alice)
    assert (member.suspended, member.reason, member.tier) == (True, "sends rubbish", "trusted")
    assert member.revision > before.revision
    with pytest.raises(NotFoundError, match="suspended"):
        await may_publish(site, alice)
    assert await suspend_party(site.office, alice) == 0
    assert await site.member(alice) == member
    await suspend_party(site.office, alice, "still")
    assert (await site.member(alice)).reason == "still"
    for _ in range(2):
        await resume_party(site.office, alice)
        resumed = await site.member(alice)
        assert (resumed.suspended, resumed.reason, resumed.public_key) == (False, "", before.public_key)
        await may_publish(site, alice)


async def test_suspended_party_stays_so_whatever_else_is_changed(site):
    alice = new_name("alice")
    await site.add(alice)
    await suspend_party(site.office, alice, "why")
    assert await site.add(alice, group="north") == "changed"
    await site.rotate(alice)
    member = await site.member(alice)
    assert (member.suspended, member.reason, member.group) == (True, "why", "north")
    with pytest.raises(NotFoundError):
        await may_publish(site, alice)
    # An interrupted suspension, of which only the entry was written.
    await site.office.management.put_user_limits(alice, site.office.limits)
    await site.add(alice)
    with pytest.raises(NotFoundError):
        await may_publish(site, alice)
    await resume_party(site.office, alice)
    await may_publish(site, alice)


async def test_client_that_does_not_let_itself_be_closed_is_heard_no_more(site, rabbitmq):
    alice = new_name("alice")
    await site.add(alice)
    async with stubborn(site, rabbitmq.amqp_port, alice) as publish:
        await publish(b"before")
        await asyncio.sleep(0.5)
        began = time.monotonic()
        await suspend_party(site.office, alice)
        with suppress(OSError):
            await publish(b"after")
        assert time.monotonic() - began < SOON_S
        await asyncio.sleep(0.5)
        async with (
            amqp_connect(site.office.settings.broker)("admin") as admin,
            admin.consume(NAMES.updates, prefetch=16, name="aggregator") as updates,
        ):
            assert (await take(updates)).body == b"before"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await updates.receive()


@asynccontextmanager
async def stubborn(site: Site, port: int, name: str):
    """A client that writes AMQP by hand, and reads nothing once it is in."""
    settings = site.party(name)
    password = settings.broker.url.get_secret_value().split(":")[2].split("@")[0]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def method(channel: int, class_id: int, method_id: int, arguments: bytes) -> bytes:
        payload = class_id.to_bytes(2, "big") + method_id.to_bytes(2, "big") + arguments
        return frame(1, channel, payload)

    def frame(kind: int, channel: int, payload: bytes) -> bytes:
        return bytes([kind]) + channel.to_bytes(2, "big") + len(payload).to_bytes(4, "big") + payload + b"\xce"

    def short(text: str) -> bytes:
        return bytes([len(text)]) + text.encode()

    async def answer() -> None:
        head = await reader.readexactly(7)
        await reader.readexactly(int.from_bytes(head[3:7], "big") + 1)

    login = f"\0{name}\0{password}".encode()
    writer.write(b"AMQP\x00\x00\x09\x01")
    await answer()
    start = b"\0\0\0\0" + short("PLAIN") + len(login).to_bytes(4, "big") + login + short("en_US")
    writer.write(method(0, 10, 11, start))
    await answer()
    writer.write(method(0, 10, 31, (2047).to_bytes(2, "big") + (131072).to_bytes(4, "big") + (0).to_bytes(2, "big")))
    writer.write(method(0, 10, 40, short(site.office.management.vhost) + b"\0\0"))
    await answer()
    writer.write(method(1, 20, 10, b"\0"))
    await answer()

    async def publish(body: bytes) -> None:
        writer.write(method(1, 60, 40, b"\0\0" + short(NAMES.up(name)) + short("") + b"\0"))
        writer.write(frame(2, 1, (60).to_bytes(2, "big") + b"\0\0" + len(body).to_bytes(8, "big") + b"\0\0"))
        writer.write(frame(3, 1, body))
        await writer.drain()

    try:
        yield publish
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def test_removing_a_party_closes_its_live_connections_and_keeps_its_updates(site):
    alice = new_name("alice")
    await site.add(alice)
    async with busy(site, alice) as working, asyncio.timeout(SOON_S):
        assert await remove_party(site.office, alice)
        await working
    assert await list_parties(site.office.management, site.office.settings) == []
    assert await site.member(alice) is None
    with pytest.raises(AuthenticationError, match=alice):
        async with amqp_connect(site.party(alice).broker)("worker"):
            pass
    async with amqp_connect(site.office.settings.broker)("admin") as admin:
        async with admin.consume(NAMES.updates, prefetch=1, name="aggregator") as updates:
            update = await take(updates)
        with pytest.raises(NotFoundError):
            await admin.publish(Message(NAMES.up(alice), b""))
    assert (update.body, update.user_id) == (b"again", alice)


async def test_revisions_go_up_beyond_a_removal(site):
    """What the aggregator knew of the first one must not count as newer."""
    alice = new_name("alice")
    await site.add(alice)
    await suspend_party(site.office, alice)
    before = await site.member(alice)
    await remove_party(site.office, alice)
    site.file(alice).unlink()
    await asyncio.sleep(0.002)
    await site.add(alice)
    assert (await site.member(alice)).revision > before.revision


async def test_party_that_nobody_knows_cannot_be_removed_nor_anything_else(site):
    alice = new_name("alice")
    await site.add(alice)
    for attempt in (
        remove_party(site.office, "nobody"),
        suspend_party(site.office, "nobody"),
        resume_party(site.office, "nobody"),
        site.rotate("nobody"),
        change_party(site.office, party_facts("nobody", {"group": "g"})),
        remove_party(site.office, "No Name/At.All"),
    ):
        with pytest.raises(NotFoundError, match=r"no party '.*' in federation 'digits'.*party list"):
            await attempt
    assert await list_parties(site.office.management, site.office.settings) == [alice]
    assert not site.part("nobody").exists()


async def test_user_who_is_no_party_is_not_removed(site, rabbitmq):
    for name in (rabbitmq.user, new_name("operator")):
        with pytest.raises(NotFoundError):
            await remove_party(site.office, name)
    assert await site.office.management.user_exists(rabbitmq.user)


@pytest.mark.parametrize("gone", ["user", "exchange", "inbox", "all but the inbox", "all but the entry"])
async def test_removal_that_was_interrupted_is_finished_by_another_one(site, gone: str):
    alice, management = new_name("alice"), site.office.management
    await site.add(alice)
    await management.delete_user(alice)
    if gone in ("exchange", "all but the inbox", "all but the entry"):
        await management.delete_exchange(NAMES.up(alice))
    if gone in ("inbox", "all but the entry"):
        await management.delete_queue(NAMES.inbox(alice))
    if gone == "all but the inbox":
        await site.office.shelf.delete(alice)
    await remove_party(site.office, alice)
    assert await site.office.shelf.one(alice) == (None, False)
    found = await management.found()
    assert not {NAMES.up(alice), NAMES.inbox(alice)} & {*found.exchanges, *found.queues}
    with pytest.raises(NotFoundError):
        await remove_party(site.office, alice)


async def test_login_that_is_used_elsewhere_loses_its_rights_here_alone(site, elsewhere):
    alice, everything = new_name("alice"), Permissions(".*", ".*", ".*")
    await site.add(alice)
    await elsewhere.put_permissions(alice, everything)
    broker = site.party(alice).broker
    url = broker.url.get_secret_value().replace(site.office.management.vhost, elsewhere.vhost)
    async with busy(site, alice) as working, asyncio.timeout(SOON_S):
        assert not await remove_party(site.office, alice)
        await working
    assert await elsewhere.permissions_of(alice) == {elsewhere.vhost: everything}
    assert await site.member(alice) is None
    async with amqp_connect(broker.model_copy(update={"url": SecretStr(url)}))("worker") as there:
        await there.declare(Topology((Exchange("x", "fanout"),)))
    with pytest.raises(NotFoundError):
        await may_publish(site, alice)
    with pytest.raises(NotFoundError):
        await remove_party(site.office, alice)
    await elsewhere.delete_user(alice)


async def test_login_that_is_used_elsewhere_is_suspended_here_alone(site, elsewhere):
    alice, everything = new_name("alice"), Permissions(".*", ".*", ".*")
    await site.add(alice)
    await elsewhere.put_permissions(alice, everything)
    async with busy(site, alice) as working, asyncio.timeout(SOON_S):
        await suspend_party(site.office, alice)
        await working
    for again in (suspend_party(site.office, alice), site.add(alice, group="north"), site.rotate(alice)):
        await again
        with pytest.raises(NotFoundError, match="suspended"):
            await may_publish(site, alice)
    broker = site.party(alice).broker
    url = broker.url.get_secret_value().replace(site.office.management.vhost, elsewhere.vhost)
    async with amqp_connect(broker.model_copy(update={"url": SecretStr(url)}))("worker") as there:
        await there.declare(Topology((Exchange("x", "fanout"),)))
    await resume_party(site.office, alice)
    await may_publish(site, alice)
    await site.office.management.delete_user(alice)


async def test_two_who_enrol_the_same_party_at_the_same_time_give_it_one_password(site):
    """Or one of them is told so; the file that there is lets the party in."""
    for _ in range(5):
        alice = new_name("alice")
        ended = await asyncio.gather(*(site.add(alice) for _ in range(4)), return_exceptions=True)
        assert "new" in ended
        assert {str(one) for one in ended if isinstance(one, Exception)} <= {
            f"{site.part(alice)} was just made by somebody else, who enrols the same party: try again",
            f"{site.file(alice)} exists already: move it away first",
        }
        await may_publish(site, alice)
        key = SigningKey.from_text(site.party(alice).security.party_key.get_secret_value())
        assert (await site.member(alice)).public_key == key.public


# Limits


async def test_party_has_no_more_connections_and_channels_than_it_was_given(vhost, tmp_path):
    enrolment = {"max_connections": 3, "max_channels": 5}
    async with open_office(settings_of(vhost.url, vhost.management_url, tmp_path, enrolment=enrolment)) as office:
        site, alice = Site(office, tmp_path), new_name("alice")
        await site.add(alice)
        connect = amqp_connect(site.party(alice).broker)
        async with connect("worker"):
            with pytest.raises(NotFoundError, match="too many connections"):
                async with connect("worker"):
                    pass
        async with connect("worker") as party:
            with pytest.raises(BrokerUnavailableError, match=r"NOT_ALLOWED - number of channels.*limit of \(5\)"):
                await fill_with_channels(party, alice)
        await site.empty()


async def fill_with_channels(party: Transport, name: str) -> None:
    async with party.consume(NAMES.inbox(name), prefetch=1, name=new_name()):
        await fill_with_channels(party, name)


async def test_inbox_keeps_the_newest_receipts_up_to_its_limits(vhost, tmp_path):
    enrolment = {"inbox_messages": 3, "inbox_ttl_s": 1000}
    async with open_office(settings_of(vhost.url, vhost.management_url, tmp_path, enrolment=enrolment)) as office:
        site, alice = Site(office, tmp_path), new_name("alice")
        await site.add(alice)
        async with amqp_connect(office.settings.broker)("admin") as admin:
            for number in range(5):
                await admin.publish(Message(NAMES.receipts, b"%d" % number, routing_key=alice))
        async with (
            amqp_connect(site.party(alice).broker)("worker") as party,
            party.consume(NAMES.inbox(alice), prefetch=16, name="worker") as inbox,
        ):
            assert [(await take(inbox)).body for _ in range(3)] == [b"2", b"3", b"4"]
        await site.empty()


async def test_vhost_is_limited_only_where_that_is_asked_for(site, vhost, tmp_path):
    await site.add(new_name("alice"))
    # With what all parties share, room for one more.
    enrolment = {"vhost_max_connections": 2, "vhost_max_queues": 4}
    settings = settings_of(vhost.url, vhost.management_url, tmp_path, enrolment=enrolment)
    limited = dataclasses.replace(site, office=dataclasses.replace(site.office, settings=settings))
    bob = new_name("bob")
    await limited.add(bob)
    with pytest.raises(ManagementError, match=r"queue limit in vhost .* is reached"):
        await limited.add(new_name("carl"))
    connect = amqp_connect(site.party(bob).broker)
    async with connect("worker"):
        with pytest.raises(NotFoundError, match="too many connections"):
            async with connect("worker"):
                pass
