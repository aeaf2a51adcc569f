"""What RabbitMQ imports in one piece is what it would have been told piece by piece."""

import base64
import hashlib
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import SecretStr

from broker_fl import definitions
from broker_fl.config import BrokerSettings
from broker_fl.definitions import User, federation_definitions, login_definitions, password_hash, render
from broker_fl.errors import NotFoundError
from broker_fl.management import Management
from broker_fl.topology import (
    InboxLimits,
    Names,
    Permissions,
    leadership,
    operator_policies,
    party,
    party_permissions,
    policies,
    shared,
)
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.transport import Message

MIB = 1 << 20
NAMES = Names("digits")
CATEGORIES = {
    "users",
    "vhosts",
    "permissions",
    "parameters",
    "global_parameters",
    "policies",
    "exchanges",
    "queues",
    "bindings",
}


@pytest.fixture
async def users(vhost) -> AsyncIterator[list[str]]:
    """Names of an aggregator and an evaluator that no other test has: users belong to the whole node."""
    names = [f"{kind}-{secrets.token_hex(4)}" for kind in ("aggregator", "evaluator")]
    yield names
    for name in names:
        with suppress(NotFoundError):
            await vhost.management.delete_user(name)


def _federation(vhost: str, users: list[str], *, model_bytes: int = 64 * MIB):
    aggregator, evaluator = users
    return federation_definitions("digits", vhost=vhost, model_bytes=model_bytes, aggregator=aggregator, evaluator=evaluator)


async def _exported(management: Management) -> dict[str, list[str]]:
    """What is in the vhost, as RabbitMQ says it, in an order of its own."""
    answer = (await management._request("GET", f"definitions/{management.vhost}")).json()
    return {key: sorted(json.dumps(one, sort_keys=True) for one in answer[key]) for key in CATEGORIES & answer.keys()}


def test_it_is_json_with_the_categories_that_rabbitmq_imports():
    rendered = federation_definitions("digits", vhost="v", model_bytes=MIB)
    assert json.loads(json.dumps(rendered)) == rendered
    assert rendered.keys() == CATEGORIES
    assert all(one["vhost"] == "v" for key in CATEGORIES - {"users", "vhosts", "global_parameters"} for one in rendered[key])


def test_all_of_the_topology_is_in_it():
    rendered = federation_definitions("digits", vhost="v", model_bytes=MIB)
    topologies = (leadership("digits"), shared("digits"))
    assert {one["name"] for one in rendered["exchanges"]} == {one.name for all_ in topologies for one in all_.exchanges}
    assert {one["name"]: one["arguments"] for one in rendered["queues"]} == {
        one.name: one.all_arguments() for all_ in topologies for one in all_.queues
    }
    assert {(one["source"], one["destination"], one["routing_key"]) for one in rendered["bindings"]} == {
        (one.exchange, one.queue, one.routing_key) for all_ in topologies for one in all_.bindings
    }
    assert {one["name"] for one in rendered["policies"]} == {one.name for one in policies("digits", model_bytes=MIB)}
    assert {one["name"] for one in rendered["parameters"]} == {one.name for one in operator_policies("digits")}


def test_limits_of_inboxes_and_of_the_virtual_host_are_what_is_asked_for():
    limits = InboxLimits(messages=7)
    rendered = federation_definitions("digits", vhost="v", model_bytes=MIB, inbox=limits, vhost_limits={"max-queues": 9})
    values = {(one["component"], one["name"]): one["value"] for one in rendered["parameters"]}
    assert values["operator_policy", "fl.digits.inbox"]["definition"]["max-length"] == 7
    assert values["vhost-limits", "limits"] == {"max-queues": 9}


def test_a_password_is_kept_as_salt_and_digest():
    kept = base64.b64decode(password_hash("correct horse", salt=b"salt"))
    assert kept == b"salt" + hashlib.sha256(b"saltcorrect horse").digest()
    with pytest.raises(ValueError, match="4 bytes"):
        password_hash("x", salt=b"too long")


def test_a_password_is_in_no_definition_and_its_hash_in_no_repr():
    hashed = password_hash("correct horse", salt=b"salt")
    user = User("a", hashed)
    assert hashed not in repr(user)
    assert "correct horse" not in json.dumps(login_definitions([user], vhost="v"))


@pytest.mark.rabbitmq
async def test_an_aggregator_finds_nothing_to_make_after_an_import(vhost, users):
    management = vhost.management
    await management.import_definitions(_federation(vhost.name, users))
    before = await _exported(management)
    await management.apply(leadership("digits"))
    await management.apply(shared("digits"))
    await management.apply_policies(policies("digits", model_bytes=MIB))
    await management.apply_operator_policies(operator_policies("digits"))
    async with amqp_connect(BrokerSettings(url=vhost.url))("test") as transport:
        await transport.declare(leadership("digits"))
        await transport.declare(shared("digits"))
    assert await _exported(management) == before


@pytest.mark.rabbitmq
async def test_an_import_says_the_same_as_one_request_after_the_other(vhost, users):
    management = vhost.management
    await management.apply_policies(policies("digits", model_bytes=64 * MIB))
    await management.apply_operator_policies(operator_policies("digits"))
    await management.apply(leadership("digits"))
    await management.apply(shared("digits"))
    before = await _exported(management)
    await management.import_definitions(_federation(vhost.name, users))
    after = await _exported(management)
    assert {key: after[key] for key in after if key != "permissions"} == {
        key: before[key] for key in before if key != "permissions"
    }


def _segments(folder: Path, log: str) -> int:
    return sum(1 for file in folder.rglob("*.segment") if log in str(file))


@pytest.mark.rabbitmq
async def test_the_logs_are_cut_by_the_policies_that_came_with_them(vhost, users, rabbitmq):
    """A log's segments are fixed when it is made; by default they have 500 MB."""
    await vhost.management.import_definitions(_federation(vhost.name, users, model_bytes=MIB))
    async with amqp_connect(BrokerSettings(url=vhost.url))("test") as transport:
        for _ in range(4):
            await transport.publish(Message(NAMES.model, bytes(MIB)))
    assert _segments(rabbitmq.folder, f"{vhost.name}_fl_digits_model_log_") > 2


@pytest.mark.rabbitmq
async def test_the_users_of_a_federation_have_no_password(vhost, users):
    await vhost.management.import_definitions(_federation(vhost.name, users))
    known = {user.name: user for user in await vhost.management.list_users()}
    assert [(known[name].password_hash, known[name].tags) for name in users] == [("", ()), ("", ())]


@pytest.mark.rabbitmq
async def test_a_login_opens_the_management_api(vhost, users):
    name, _ = users
    hashed = password_hash("correct horse", salt=b"salt")
    await vhost.management.import_definitions(login_definitions([User(name, hashed, ("administrator",))], vhost=vhost.name))
    url = vhost.management_url.replace(vhost.management_url.split("//")[1].split("@")[0], f"{name}:correct%20horse")
    async with Management(url, vhost=vhost.name) as management:
        await management.apply(shared("digits"))
        assert name in {user.name for user in await management.list_users()}


@pytest.mark.rabbitmq
async def test_a_party_comes_whole_with_its_limits_and_what_is_written_down_about_it(vhost, users):
    name, _ = users
    management = vhost.management
    await management.import_definitions(_federation(vhost.name, ["aggregator-of-" + name, "evaluator-of-" + name]))
    parameter = f"{vhost.name}:fl.digits.party.{name}"
    try:
        await management.import_definitions(
            render(
                vhost.name,
                party("digits", name),
                users=[definitions.User(name, password_hash("x", salt=b"salt"), limits={"max-connections": 2})],
                permissions={name: party_permissions("digits", name)},
                global_parameters={parameter: {"membership": {"revision": 1}, "signature": "00"}},
            )
        )
        user = await management.user(name)
        assert user is not None
        assert dict(user.limits) == {"max-connections": 2}
        assert await management.permissions_of(name) == {vhost.name: party_permissions("digits", name)}
        assert await management.global_parameter(parameter) == {"membership": {"revision": 1}, "signature": "00"}
        assert [queue.name for queue in await management.queues(NAMES.inbox(""))] == [NAMES.inbox(name)]
    finally:
        await management.delete_global_parameter(parameter)
        for other in ("aggregator-of-" + name, "evaluator-of-" + name):
            await management.delete_user(other)


@pytest.mark.rabbitmq
async def test_an_import_takes_the_place_of_users_and_permissions_that_were_there(vhost, users):
    name, other = users
    await vhost.management.put_user(name, SecretStr("before"), ("monitoring",))
    await vhost.management.put_permissions(name, Permissions("a", "b", "c"))
    await vhost.management.import_definitions(_federation(vhost.name, [name, other]))
    found = {user.name: user for user in await vhost.management.list_users()}[name]
    assert (found.password_hash, found.tags) == ("", ())
    assert (await vhost.management.permissions_of(name))[vhost.name].configure.startswith("^fl")
