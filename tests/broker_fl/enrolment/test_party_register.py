"""The register on the broker says who is enrolled; what the federation's key did not sign is as good as not there."""

import asyncio
import dataclasses
import json
import random

import pytest
from enrolling import Site, new_name, settings_of
from structlog.testing import capture_logs

from broker_fl.enrolment import (
    Register,
    Shelf,
    claim_key,
    fingerprint,
    list_members,
    management_of,
    open_office,
    party_facts,
    remove_party,
    see_party,
)
from broker_fl.enrolment.shelf import next_membership
from broker_fl.errors import BrokerUnavailableError, ConfigurationError, NotFoundError
from broker_fl.management import Management
from broker_fl.signing import SigningKey, sign_membership
from broker_fl.topology import Names, operator_policies, policies_without_logs
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.transport import Message
from schemas.membership import Membership, SignedMembership

pytestmark = pytest.mark.rabbitmq

NAMES = Names("digits")


def register_of(site: Site) -> Register:
    return Register(site.office.settings)


async def plant(site: Site, name: str, value: object) -> None:
    await site.office.management.put_global_parameter(site.office.shelf.name_of(name), value)


async def test_register_gives_the_memberships_of_all_and_of_one(site):
    alice, bob = new_name("alice"), new_name("bob")
    await site.add(alice, group="north")
    await site.add(bob)
    other = site.of("digits-2")
    await other.add(new_name("carl"))
    register = register_of(site)
    found = await register.all()
    assert set(found) == {alice, bob}
    assert found[alice].membership.group == "north"
    assert await register.one(alice) == found[alice]
    assert await register.one(new_name("nobody")) is None
    await other.empty()


async def test_memberships_survive_the_brokers_json_to_the_last_bit(site):
    """Their signature is over the bytes of ours."""
    dice = random.Random(1)
    texts = ["", "Spital Zürich 😀", '"quoted" \\ /', "\u2028\u202e\u0644\u0627", "x" * 200]
    for number in range(60):
        member = Membership(
            federation="digits",
            party="p",
            revision=dice.choice([1, 2**53 - 1, 1_795_635_472_849]),
            at=dice.choice([0.0, 1.0, 1764028800.0, dice.random() * 10 ** dice.randint(-10, 20), round(dice.random() * 2e9, 3)]),
            public_key=dice.choice([None, "ab" * 32]),
            display_name=texts[number % len(texts)],
            num_samples=dice.choice([None, 1, 10**12]),
            suspended=dice.choice([True, False]),
            reason=texts[number % len(texts)],
        )
        signed = sign_membership(site.office.signing_key(), member)
        await site.office.shelf.put(signed)
        assert await site.office.shelf.one("p") == (signed, False)


async def test_memberships_survive_export_and_import(site):
    alice = new_name("alice")
    await site.add(alice, display_name="Spital Zürich 😀", num_samples=10**12)
    member, management = await site.member(alice), site.office.management
    whole = await management.global_parameters()
    name = site.office.shelf.name_of(alice)
    await site.office.shelf.delete(alice)
    # As a backup has them.
    await management.import_definitions({"global_parameters": [{"name": name, "value": json.loads(json.dumps(whole[name]))}]})
    assert await site.member(alice) == member


async def test_what_the_federations_key_did_not_sign_is_left_out_and_told_once(site):
    alice, bob, carl = new_name("alice"), new_name("bob"), new_name("carl")
    await site.add(alice)
    await site.add(bob)
    signed, _ = await site.office.shelf.one(alice)
    forged = signed.membership.model_copy(update={"public_key": SigningKey.generate().public, "revision": 2**53 - 1})
    value = signed.model_dump(mode="json")
    register, is_first = register_of(site), True
    assert set(await register.all()) == {alice, bob}
    for planted in (
        sign_membership(SigningKey.generate(), forged).model_dump(mode="json"),
        {"membership": forged.model_dump(mode="json"), "signature": signed.signature},
        {"membership": {**value["membership"], "tier": "trusted"}, "signature": signed.signature},
        {**value, "signature": "00" * 64},
        {"membership": value["membership"]},
        value["membership"],
        "text",
        7,
        None,
        [],
        {"deep": {"er": [1, 2.5, None]}},
    ):
        await plant(site, alice, planted)
        with capture_logs() as told:
            for _ in range(2):
                assert set(await register.all()) == {bob}
                assert await register.one(alice) is None
        assert [(line["party"], line["log_level"]) for line in told] == [(alice, "warning")] * (1 if is_first else 0)
        is_first = False
        members, left_out = await list_members(site.office)
        assert [(one.name, one.state) for one in members] == [(alice, "unregistered"), (bob, "enrolled")]
        assert left_out == [alice]
    # One that is signed, and another's.
    await plant(site, carl, value)
    await plant(site, alice, value)
    assert set(await register.all()) == {alice, bob}
    await plant(site.of("digits-2"), alice, value)
    assert await Register(site.of("digits-3").office.settings).all() == {}
    await remove_party(site.office, carl)
    await site.office.management.delete_global_parameter(f"{site.office.management.vhost}:fl.digits-2.party.{alice}")
    await site.office.management.delete_global_parameter(f"{site.office.management.vhost}:fl.digits-3.key")


async def test_planted_entry_gives_way_to_an_enrolment_and_to_a_rotation(site):
    alice, bob, false = new_name("alice"), new_name("bob"), SigningKey.generate()
    planted = next_membership(false, None, federation="digits", party=alice, now=9e9, changes={"public_key": false.public})
    await plant(site, alice, planted.model_dump(mode="json"))
    assert await site.add(alice) == "new"
    assert (await site.member(alice)).public_key != false.public
    await site.add(bob)
    await plant(site, bob, planted.model_dump(mode="json"))
    with pytest.raises(ConfigurationError, match="register that counts"):
        await site.add(bob)
    await site.rotate(bob)
    assert (await site.member(bob)).public_key != false.public


async def test_suspension_by_an_aggregator_closes_the_connections(site):
    alice, bob = new_name("alice"), new_name("bob")
    await site.add(alice)
    await site.add(bob)
    register = register_of(site)
    async with amqp_connect(site.party(alice).broker)("worker") as party, amqp_connect(site.party(bob).broker)("worker") as other:
        async with party.consume(NAMES.inbox(alice), prefetch=1, name="worker") as inbox:
            await register.suspend(alice, "a score of 0.2")
            async with asyncio.timeout(5):
                with pytest.raises(BrokerUnavailableError):
                    await inbox.receive()
        await other.publish(Message(NAMES.up(bob), b"update"))
    member = (await register.one(alice)).membership
    assert (member.suspended, member.reason) == (True, "a score of 0.2")
    assert not (await register.one(bob)).membership.suspended
    with pytest.raises(NotFoundError):
        await register.suspend(new_name("nobody"), "?")


async def test_register_of_a_broker_that_is_not_there(vhost, tmp_path, rabbitmq):
    settings = settings_of(vhost.url, f"http://a:b@127.0.0.1:{rabbitmq.amqp_port}", tmp_path)
    register = Register(settings)
    for attempt in (register.all(), register.one("a"), register.suspend("a", "")):
        with pytest.raises(BrokerUnavailableError):
            await attempt


async def test_second_key_of_a_federation_is_not_made_by_mistake(site, vhost, tmp_path):
    """By who enrols on a laptop, while the aggregator's machine has the key; or the other way round."""
    await site.add(new_name("alice"))
    laptop = settings_of(vhost.url, vhost.management_url, tmp_path / "laptop")
    pinned = site.office.public_key[:12]
    for attempt in (claim(laptop), Register(laptop).all(), Register(laptop).one("a"), Register(laptop).suspend("a", "")):
        with pytest.raises(ConfigurationError, match=rf"signed by the key {pinned}\.\.\., and there is no .*\[security\] key"):
            await attempt
    assert not laptop.key_file.exists()
    laptop.key_file.parent.mkdir(parents=True)
    own = SigningKey.generate()
    laptop.key_file.write_text(own.text())
    with pytest.raises(ConfigurationError, match=rf"{pinned}\.\.\., and .* holds {own.public[:12]}"):
        await claim(laptop)
    laptop.key_file.write_text(site.office.signing_key().text())
    assert (await claim(laptop)).public == site.office.public_key


async def claim(settings) -> SigningKey:
    async with management_of(settings.broker) as management:
        return await claim_key(management, settings)


async def test_who_reads_needs_no_private_key(site, vhost, tmp_path):
    alice = new_name("alice")
    await site.add(alice)
    for security in ({}, {"aggregator_key": site.office.public_key}):
        settings = settings_of(vhost.url, vhost.management_url, tmp_path / "desk", security=security)
        async with open_office(settings, signs=False) as office:
            assert [one.name for one in (await list_members(office))[0]] == [alice]
            with pytest.raises(ConfigurationError, match="private key"):
                office.signing_key()
        assert not settings.key_file.exists()
    wrong = settings_of(vhost.url, vhost.management_url, tmp_path, security={"aggregator_key": "ab" * 32})
    async with open_office(wrong, signs=False) as office:
        assert (await list_members(office))[1] == [alice]


async def test_parties_are_listed_with_what_is_wrong_with_them(site):
    names = [f"{letter}-{new_name()}" for letter in "abcd"]
    whole, suspended, unregistered, incomplete = names
    for name in names:
        await site.add(name)
    register = register_of(site)
    await register.suspend(suspended, "why")
    await site.office.shelf.delete(unregistered)
    await site.office.management.delete_exchange(NAMES.up(incomplete))
    members, planted = await list_members(site.office)
    states = {one.name: one.state for one in members}
    assert states == {whole: "enrolled", suspended: "suspended", unregistered: "unregistered", incomplete: "incomplete"}
    assert list(states) == names
    assert planted == []
    for name, state in states.items():
        assert (await see_party(site.office, name)).state == state


async def test_one_party_is_seen_with_its_connections_and_without_secrets(site, elsewhere):
    alice = new_name("alice")
    await site.add(alice, group="north")
    await elsewhere.put_permissions(alice, (await site.office.management.permissions_of(alice))[site.office.management.vhost])
    async with amqp_connect(site.office.settings.broker)("admin") as admin:
        await admin.publish(Message(NAMES.receipts, b"receipt", routing_key=alice))
    async with amqp_connect(site.party(alice).broker)(f"worker:{alice}"):
        seen = await see_party(site.office, alice)
        async with asyncio.timeout(15):
            while len(seen.connections) < 2 or seen.inbox != 1 or None in {one.since for one in seen.connections}:
                await asyncio.sleep(0.1)
                seen = await see_party(site.office, alice)
    assert {one.name for one in seen.connections} == {f"worker:{alice}", f"worker:{alice} (publish)"}
    assert all(one.peer.startswith("127.0.0.1:") for one in seen.connections)
    assert (seen.login, seen.elsewhere, seen.membership.group) == ("password", (elsewhere.vhost,), "north")
    assert seen.limits == {"max-connections": 4, "max-channels": 16}
    password = site.files.finished(alice).password.get_secret_value()
    user = await site.office.management.user(alice)
    for secret in (password, user.password_hash, site.files.finished(alice).key.text()):
        assert secret not in repr(seen)
    with pytest.raises(NotFoundError):
        await see_party(site.office, "nobody")
    await site.office.management.delete_user(alice)


def test_fingerprint_is_for_people():
    assert fingerprint("00" * 32) == "6668 7aad f862 bd77 6c8f c18b 8e9f 8e20"


async def test_register_of_the_default_vhost(rabbitmq, tmp_path):
    """Whose name is a slash."""
    async with open_office(settings_of(rabbitmq.url, rabbitmq.management_url, tmp_path)) as office:
        site, alice = Site(dataclasses.replace(office), tmp_path), new_name("alice")
        assert await site.add(alice) == "new"
        assert office.shelf.name_of(alice) == f"/:fl.digits.party.{alice}"
        assert set(await register_of(site).all()) == {alice}
        assert isinstance((await office.shelf.one(alice))[0], SignedMembership)
        await remove_party(office, alice)
        await site.empty()
        for queue in await office.management.queues("fl.digits."):
            await office.management.delete_queue(queue.name)
        for exchange in await office.management.exchanges("fl.digits."):
            await office.management.delete_exchange(exchange)
        for policy in policies_without_logs("digits"):
            await office.management.delete_policy(policy.name)
        for policy in operator_policies("digits"):
            await office.management.delete_operator_policy(policy.name)


async def test_names_of_vhosts_that_look_like_a_register(rabbitmq, site):
    """A vhost may be called anything."""
    vhost = f"{site.office.management.vhost}:fl.digits.party.x"
    async with Management(rabbitmq.management_url, vhost=vhost) as other:
        await other.put_vhost()
        shelf, alice = Shelf(other, "digits", site.office.public_key), new_name("alice")
        signed = next_membership(site.office.signing_key(), None, federation="digits", party=alice, now=1.0, changes={})
        await shelf.put(signed)
        assert await site.office.shelf.all() == ({}, [])
        assert await shelf.all() == ({alice: signed}, [])
        await shelf.delete(alice)
        await other.delete_vhost()


async def test_many_are_read_in_one_go(site):
    names = [new_name(f"p{number}") for number in range(40)]
    await site.add_all([party_facts(name, {"group": "g"}) for name in names])
    assert set(await register_of(site).all()) == set(names)
