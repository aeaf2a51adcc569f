import asyncio
import dataclasses
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aio_pika
import pytest
from aio_pika.exceptions import AMQPError, DeliveryError
from aiormq.exceptions import ChannelAccessRefused
from pydantic import SecretStr

from broker_fl import topology
from broker_fl.definitions import User, password_hash, render
from broker_fl.errors import (
    AccessRefusedError,
    AuthenticationError,
    BrokerError,
    BrokerUnavailableError,
    ConfigurationError,
    ManagementError,
    NotFoundError,
    TopologyConflictError,
)
from broker_fl.management import Found, Management
from broker_fl.topology import Binding, Exchange, Names, Permissions, Policy, Queue, Topology

SECRET = "correct-horse"
NAMES = Names("digits")

AddUser = Callable[..., Awaitable[str]]


@pytest.fixture
async def add_user(vhost) -> AsyncIterator[AddUser]:
    """Users belong to the whole broker, so each gets a name of its own."""
    added: list[str] = []

    async def add(*, tags: tuple[str, ...] = (), permissions: Permissions | None = None) -> str:
        name = f"party-{secrets.token_hex(4)}"
        await vhost.management.put_user(name, SecretStr(SECRET), tags)
        added.append(name)
        if permissions is not None:
            await vhost.management.put_permissions(name, permissions)
        return name

    yield add
    for name in added:
        with suppress(NotFoundError):
            await vhost.management.delete_user(name)


def as_user(url: str, user: str, password: str = SECRET) -> str:
    scheme, rest = url.split("://")
    return f"{scheme}://{user}:{password}@{rest.split('@')[1]}"


@asynccontextmanager
async def answering(status: int, body: bytes) -> AsyncIterator[str]:
    """The URL of a server that answers with this, whatever it is asked."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://somebody:{SECRET}@127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def eventually(what: Callable[[], Awaitable[bool]], *, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


@pytest.mark.rabbitmq
async def test_overview_names_the_versions(vhost):
    overview = await vhost.management.overview()
    assert int(overview.rabbitmq_version.split(".")[0]) >= 3
    assert overview.management_version


@pytest.mark.rabbitmq
async def test_topology_applied_twice_is_there_once(vhost):
    wanted = topology.shared("digits")
    await vhost.management.apply(wanted)
    await vhost.management.apply(wanted)
    queues = {queue.name: queue.type for queue in await vhost.management.queues("fl.digits.")}
    assert queues == {queue.name: queue.kind for queue in wanted.queues}


@pytest.mark.rabbitmq
async def test_queue_with_other_arguments_is_a_conflict(vhost):
    await vhost.management.apply(Topology(queues=(Queue("fl.digits.updates", "classic"),)))
    with pytest.raises(TopologyConflictError, match=r"fl\.digits\.updates"):
        await vhost.management.apply(topology.shared("digits"))


@pytest.mark.rabbitmq
async def test_exchange_of_another_kind_is_a_conflict(vhost):
    await vhost.management.apply(Topology(exchanges=(Exchange("x", "fanout"),)))
    with pytest.raises(TopologyConflictError):
        await vhost.management.apply(Topology(exchanges=(Exchange("x", "direct"),)))


@pytest.mark.rabbitmq
async def test_policies_applied_twice_are_accepted(vhost):
    for _ in range(2):
        await vhost.management.apply_policies(topology.policies("digits", model_bytes=1 << 20))


@pytest.mark.rabbitmq
async def test_policy_the_broker_does_not_know_is_a_management_error_of_one_line(vhost):
    with pytest.raises(ManagementError, match="not recognised") as caught:
        await vhost.management.apply_policies([Policy("p", ".*", "queues", {"no-such-setting": 1})])
    assert "\n" not in str(caught.value)


@pytest.mark.rabbitmq
async def test_binding_from_an_exchange_that_is_not_there_is_not_found(vhost):
    with pytest.raises(NotFoundError, match="nowhere"):
        await vhost.management.apply(
            Topology(queues=(Queue("q", "classic"),), bindings=(Binding("nowhere", "q"),)),
        )


@pytest.mark.rabbitmq
async def test_message_published_to_a_party_exchange_is_counted_in_the_updates_queue(vhost):
    await vhost.management.apply(topology.shared("digits"))
    await vhost.management.apply(topology.party("digits", "alice"))
    async with await aio_pika.connect(vhost.url) as connection, connection.channel() as channel:
        exchange = await channel.get_exchange(NAMES.up("alice"), ensure=False)
        await exchange.publish(aio_pika.Message(b"update"), "")

    async def counted() -> bool:
        with_figures = await vhost.management.queues(NAMES.updates)
        totals = await vhost.management.queues(NAMES.updates, only_totals=True)
        return [queue.ready for queue in (*with_figures, *totals)] == [1, 1]

    await eventually(counted)
    (state,) = await vhost.management.queues(NAMES.updates, only_totals=True)
    assert dataclasses.replace(state, bytes=None, consumers=None) == state


@pytest.mark.rabbitmq
async def test_queues_are_read_over_all_pages_and_by_their_literal_prefix(vhost):
    wanted = [Queue(f"fl.a.inbox.{number:03}", "classic") for number in range(501)]
    await vhost.management.import_definitions(render(vhost.name, Topology(queues=(*wanted, Queue("flxa.inbox.000", "classic")))))
    names = [queue.name for queue in await vhost.management.queues("fl.a.", only_totals=True)]
    assert sorted(names) == [queue.name for queue in wanted]
    assert len(await vhost.management.queues()) == 502
    assert await vhost.management.queues("fl.b.") == ()


@pytest.mark.rabbitmq
async def test_party_publishes_to_its_own_exchange_alone(vhost, add_user):
    await vhost.management.apply(topology.shared("digits"))
    alice, bob = await add_user(), await add_user()
    for party in (alice, bob):
        await vhost.management.apply(topology.party("digits", party))
        await vhost.management.put_permissions(party, topology.party_permissions("digits", party))
    async with await aio_pika.connect(as_user(vhost.url, alice)) as connection:
        channel = await connection.channel()
        own = await channel.get_exchange(NAMES.up(alice), ensure=False)
        await own.publish(aio_pika.Message(b"mine"), "")
        foreign = await channel.get_exchange(NAMES.up(bob), ensure=False)
        with pytest.raises(ChannelAccessRefused):
            await foreign.publish(aio_pika.Message(b"forged"), "")


@pytest.mark.rabbitmq
async def test_deleted_user_is_disconnected(vhost, add_user):
    alice = await add_user(permissions=Permissions("", "", ""))
    assert await vhost.management.user_exists(alice)
    connection = await aio_pika.connect(as_user(vhost.url, alice))
    closed = asyncio.Event()
    connection.close_callbacks.add(lambda *_: closed.set())
    await vhost.management.delete_user(alice)
    await asyncio.wait_for(closed.wait(), 15)
    with suppress(AMQPError):
        await connection.close()
    assert not await vhost.management.user_exists(alice)
    with pytest.raises(NotFoundError):
        await vhost.management.delete_user(alice)


@pytest.mark.rabbitmq
async def test_users_are_listed_with_their_tags(vhost, add_user):
    watcher, party = await add_user(tags=("monitoring", "policymaker")), await add_user()
    tags = {user.name: set(user.tags) for user in await vhost.management.list_users()}
    assert (tags[watcher], tags[party]) == ({"monitoring", "policymaker"}, set())


@pytest.mark.rabbitmq
async def test_user_by_its_password_hash_has_tags_and_limits(vhost, add_user):
    name = await add_user()
    limits = {"max-connections": 3, "max-channels": 7}
    hashed = password_hash(SECRET, salt=b"salt")
    await vhost.management.import_definitions(render(vhost.name, users=[User(name, hashed, ("management",), limits)]))
    user = await vhost.management.user(name)
    assert (user.tags, user.password_hash, user.limits) == (("management",), hashed, limits)
    assert user.hashing == "rabbit_password_hashing_sha256"
    assert hashed not in repr(user)
    assert user in await vhost.management.list_users()
    async with Management(as_user(vhost.management_url, name), vhost=vhost.name) as management:
        assert await management.overview()


@pytest.mark.rabbitmq
async def test_user_without_a_password_hash_is_let_in_by_no_password(vhost, add_user):
    name = await add_user()
    await vhost.management.import_definitions(render(vhost.name, users=[User(name, tags=("administrator",))]))
    assert (await vhost.management.user(name)).password_hash == ""
    async with Management(as_user(vhost.management_url, name), vhost=vhost.name) as management:
        with pytest.raises(AuthenticationError):
            await management.overview()


@pytest.mark.rabbitmq
async def test_user_limits_take_hold_and_end(vhost, add_user):
    name = await add_user(permissions=Permissions("", "", ""))
    url = as_user(vhost.url, name)
    await vhost.management.put_user_limits(name, {"max-connections": 0, "max-channels": 5})
    assert (await vhost.management.user(name)).limits == {"max-connections": 0, "max-channels": 5}
    with pytest.raises(AMQPError):
        await aio_pika.connect(url)
    await vhost.management.put_user_limits(name, {"max-connections": 1})
    async with await aio_pika.connect(url):
        with pytest.raises(AMQPError):
            await aio_pika.connect(url)
    with pytest.raises(NotFoundError):
        await vhost.management.put_user_limits("nobody-at-all", {"max-connections": 1})


@pytest.mark.rabbitmq
async def test_vhost_limits_take_hold(vhost):
    await vhost.management.put_vhost_limits({"max-queues": 1, "max-connections": 1})
    await vhost.management.apply(Topology(queues=(Queue("a", "classic"),)))
    with pytest.raises(ManagementError, match="queue limit"):
        await vhost.management.apply(Topology(queues=(Queue("b", "classic"),)))
    async with await aio_pika.connect(vhost.url):
        with pytest.raises(AMQPError):
            await aio_pika.connect(vhost.url)


@pytest.mark.rabbitmq
async def test_permissions_are_read_by_user_and_by_vhost(vhost, add_user):
    granted = Permissions("^$", "^a$", "^(b|c)$")
    alice, bob = await add_user(permissions=granted), await add_user()
    assert await vhost.management.permissions_of(alice) == {vhost.name: granted}
    assert await vhost.management.permissions_of(bob) == {}
    assert await vhost.management.permissions_of("nobody-at-all") == {}
    everybody = await vhost.management.permissions()
    assert everybody[alice] == {vhost.name: granted}
    assert bob not in everybody
    await vhost.management.delete_permissions(alice)
    assert await vhost.management.permissions_of(alice) == {}
    with pytest.raises(NotFoundError):
        await vhost.management.delete_permissions(alice)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("value", [{"a": {"b": [1, 2.5, None, "é😀"]}}, "text", 7, []])
async def test_global_parameters_are_kept_as_they_are(vhost, value):
    management, name = vhost.management, f"/ {vhost.name}:é.x"
    assert await management.global_parameter(name) is None
    await management.put_global_parameter(name, value)
    assert await management.global_parameter(name) == value
    assert await management.global_parameters(f"/ {vhost.name}:") == {"é.x": value}
    assert await management.global_parameters("/ no such") == {}
    await management.put_global_parameter(name, "another")
    assert await management.global_parameter(name) == "another"
    await management.delete_global_parameter(name)
    with pytest.raises(NotFoundError):
        await management.delete_global_parameter(name)


@pytest.mark.rabbitmq
async def test_what_is_there_by_declaration_is_found(vhost):
    wanted = topology.shared("digits")
    await vhost.management.apply(wanted)
    await vhost.management.apply(topology.party("digits", "alice"))
    found = await vhost.management.found()
    made = (wanted, topology.party("digits", "alice"))
    assert found == Found(
        exchanges={exchange.name: exchange.kind for one in made for exchange in one.exchanges},
        queues={queue.name: queue.kind for one in made for queue in one.queues},
        bindings=frozenset(binding for one in made for binding in one.bindings),
    )
    assert await vhost.management.exchanges("fl.digits.up.") == {NAMES.up("alice"): "fanout"}
    assert (await vhost.management.queue(NAMES.inbox("alice"))).name == NAMES.inbox("alice")
    assert await vhost.management.queue("nothing") is None


@pytest.mark.rabbitmq
async def test_operator_policies_bound_what_the_queue_and_its_policy_say(vhost):
    management = vhost.management
    await management.apply(Topology(queues=(Queue("q", "quorum", {"x-max-length": 5}),)))
    await management.apply_policies([Policy("p", "^q$", "queues", {"max-length": 4, "overflow": "reject-publish"})])
    for most in (2, 100):  # The second is too late: the policy is there.
        await management.apply_operator_policies([Policy("o", "^q$", "queues", {"max-length": most})])
    async with await aio_pika.connect(vhost.url) as connection, connection.channel() as channel:
        publish = channel.default_exchange.publish
        answers = [await asyncio.gather(publish(aio_pika.Message(b"x"), "q"), return_exceptions=True) for _ in range(20)]
    taken = [answer for (answer,) in answers if not isinstance(answer, DeliveryError)]
    # A quorum queue takes one or two more before it says no.
    assert 2 <= len(taken) <= 4
    await management.delete_operator_policy("o")
    with pytest.raises(NotFoundError):
        await management.delete_operator_policy("o")


@pytest.mark.rabbitmq
async def test_every_operator_policy_of_a_federation_is_one_that_rabbitmq_knows(vhost):
    for _ in range(2):
        await vhost.management.apply_operator_policies(topology.operator_policies("digits"))


@pytest.mark.rabbitmq
async def test_connections_of_one_user_are_closed_also_those_that_were_just_opened(vhost, add_user):
    alice, bob = [await add_user(permissions=Permissions("", "", "")) for _ in range(2)]
    async with await aio_pika.connect(as_user(vhost.url, bob)) as other:
        await vhost.management.put_user_limits(alice, {"max-connections": 3})
        closed = asyncio.Event()
        opened = [await aio_pika.connect(as_user(vhost.url, alice)) for _ in range(3)]
        opened[-1].close_callbacks.add(lambda *_: closed.set())
        async with asyncio.timeout(5):
            assert await vhost.management.close_connections(alice, "a test") <= 3
            await closed.wait()
        assert await vhost.management.connections_of(alice) == {}
        assert list((await vhost.management.connections_of(bob)).values()) == [vhost.name]
        await other.channel()
    for connection in opened:
        with suppress(AMQPError):
            await connection.close()
    assert await vhost.management.close_connections("nobody-at-all", "a test") == 0
    assert await vhost.management.connection("nothing") is None


@pytest.mark.rabbitmq
async def test_connection_is_listed_by_the_name_it_gives_itself(vhost, rabbitmq):
    properties = {"connection_name": "worker:alice"}
    async with await aio_pika.connect(vhost.url, client_properties=properties):
        seen = vhost.management.connections

        async def listed() -> bool:
            return any(connection.name == "worker:alice" for connection in await seen())

        await eventually(listed)
        (connection,) = await seen()
    assert connection.user == rabbitmq.user
    assert connection.peer.startswith("127.0.0.1:")
    assert connection.connected_at.year > 2000


@pytest.mark.rabbitmq
async def test_exchange_queue_and_policy_are_deleted_once(vhost):
    management = vhost.management
    policy = Policy("p", ".*", "queues", {"max-length": 1})
    await management.apply(Topology((Exchange("x", "fanout"),), (Queue("q", "classic"),)))
    await management.apply_policies([policy])
    for delete, name in (
        (management.delete_exchange, "x"),
        (management.delete_queue, "q"),
        (management.delete_policy, "p"),
    ):
        await delete(name)
        with pytest.raises(NotFoundError):
            await delete(name)


@pytest.mark.rabbitmq
async def test_default_vhost_is_reached_by_its_slash(rabbitmq):
    async with Management(rabbitmq.management_url) as management:
        await management.apply(Topology(queues=(Queue("a/b c", "classic"),)))
        assert "a/b c" in [queue.name for queue in await management.queues()]
        await management.delete_queue("a/b c")


@pytest.mark.rabbitmq
async def test_vhost_that_is_not_there_is_not_found(rabbitmq):
    async with Management(rabbitmq.management_url, vhost="nowhere") as management:
        with pytest.raises(NotFoundError):
            await management.apply(topology.shared("digits"))
        with pytest.raises(NotFoundError):
            await management.queues()


@pytest.mark.rabbitmq
async def test_permissions_of_nobody_are_not_found(vhost):
    with pytest.raises(NotFoundError, match="vhost_or_user_not_found"):
        await vhost.management.put_permissions("nobody-at-all", Permissions("", "", ""))


@pytest.mark.rabbitmq
async def test_wrong_password_is_an_authentication_error_that_does_not_tell_it(vhost, rabbitmq):
    url = as_user(vhost.management_url, rabbitmq.user, "wrong-horse")
    async with Management(url, vhost=vhost.name) as management:
        with pytest.raises(AuthenticationError, match="wrong name or password") as caught:
            await management.overview()
    assert "wrong-horse" not in f"{caught.value!r} {management!r}"


@pytest.mark.rabbitmq
@pytest.mark.parametrize("tags", [(), ("monitoring",)])
async def test_user_without_the_right_is_refused_access(vhost, add_user, tags):
    user = await add_user(tags=tags)
    async with Management(as_user(vhost.management_url, user), vhost=vhost.name) as management:
        with pytest.raises(AccessRefusedError, match=user):
            await management.list_users()


@pytest.mark.rabbitmq
async def test_amqp_port_in_place_of_the_management_port_is_unavailable(rabbitmq):
    async with Management(f"http://somebody:{SECRET}@127.0.0.1:{rabbitmq.amqp_port}") as management:
        with pytest.raises(BrokerUnavailableError, match="15672"):
            await management.overview()


async def test_no_broker_is_unavailable_in_one_line_that_says_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    async with Management(f"http://somebody:{SECRET}@127.0.0.1:{port}") as management:
        with pytest.raises(BrokerUnavailableError, match="rabbitmq-plugins enable rabbitmq_management") as caught:
            await management.overview()
    message = str(caught.value)
    assert f"127.0.0.1:{port}" in message
    assert "\n" not in message
    assert SECRET not in message


async def test_broker_that_never_answers_is_unavailable():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://somebody:{SECRET}@127.0.0.1:{silent.getsockname()[1]}"
        async with Management(url, timeout_s=0.2) as management:
            with pytest.raises(BrokerUnavailableError, match="ReadTimeout"):
                await management.overview()


@asynccontextmanager
async def hanging_up(times: int) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that closes its first connections without an answer; and the methods that it was asked for."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split()[0].decode())
        if len(asked) > times:
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://somebody:{SECRET}@127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


async def test_what_was_not_answered_is_asked_once_more_but_for_what_is_posted():
    async with hanging_up(1) as (url, asked), Management(url) as management:
        await management.delete_user("a")
        assert asked == ["DELETE"] * 2
    async with hanging_up(2) as (url, asked), Management(url) as management:
        with pytest.raises(BrokerUnavailableError):
            await management.put_vhost()
        assert asked == ["PUT"] * 2
    async with hanging_up(1) as (url, asked), Management(url) as management:
        with pytest.raises(BrokerUnavailableError):
            await management.import_definitions({})
        assert asked == ["POST"]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, b"<html>", ManagementError),
        (200, b'{"rabbitmq_version": 4}', ManagementError),
        (301, b"", ManagementError),
        (400, b'{"reason": {"why": "unknown"}}', ManagementError),
        (400, b'{"reason": "inequivalent arg"}', TopologyConflictError),
        (401, b"not even JSON", AuthenticationError),
        (403, b"", AccessRefusedError),
        (404, b"[]", NotFoundError),
        (500, b"\xff", ManagementError),
        (503, json.dumps({"reason": "a\nb" * 1000}).encode(), ManagementError),
    ],
)
async def test_every_answer_becomes_one_of_our_errors(status: int, body: bytes, error: type[BrokerError]):
    async with answering(status, body) as url, Management(url) as management:
        with pytest.raises(BrokerError) as caught:
            await management.overview()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:15672",
        "amqp://a:b@127.0.0.1",
        "http://127.0.0.1:15672",
        "http://alice@127.0.0.1",
        "http://a:b@h:c/d",
    ],
)
def test_url_without_a_host_or_a_login_is_a_configuration_error(url: str):
    with pytest.raises(ConfigurationError, match="http://USER:PASSWORD@HOST:15672"):
        Management(url)


def test_repr_does_not_show_the_password():
    assert SECRET not in repr(Management(f"http://alice:{SECRET}@127.0.0.1:15672"))
