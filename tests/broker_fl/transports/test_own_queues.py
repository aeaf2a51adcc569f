"""What listeners call their queues, and within which rights, on a real RabbitMQ."""

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from broker_fl.config import BrokerSettings
from broker_fl.errors import AccessRefusedError
from broker_fl.topology import EVALUATOR, Names, Permissions, aggregator_permissions, evaluator_permissions, shared
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.transport import Connect, Message

pytestmark = pytest.mark.rabbitmq

NAMES = Names("digits")
OTHERS = Names("letters")


async def user(vhost, name: str, permissions: Permissions) -> Connect:
    """Users belong to the whole node."""
    name = f"{name}-{vhost.name}"
    await vhost.management.put_user(name, SecretStr(name))
    await vhost.management.put_permissions(name, permissions)
    host = urlsplit(vhost.url).netloc.rpartition("@")[2]
    return amqp_connect(BrokerSettings(url=SecretStr(f"amqp://{name}:{name}@{host}/{vhost.name}")))


def shown(found: Iterable) -> list[str]:
    return sorted(re.sub(r"[0-9a-f]{8}$", "...", queue.name) for queue in found)


@pytest.fixture
async def administrator(vhost) -> Connect:
    connect = amqp_connect(BrokerSettings(url=SecretStr(vhost.url)))
    async with connect("test") as transport:
        await transport.declare(shared(NAMES.federation))
    return connect


async def test_listeners_queues_are_called_by_the_federation_and_the_listener(vhost, administrator):
    async with (
        administrator("test") as transport,
        transport.listen(NAMES.model, name="one", queue=NAMES.own_of("demo")),
        transport.listen(NAMES.events, routing_key="#", name="two", queue=NAMES.own_of("demo")),
        transport.listen(NAMES.events, routing_key="#", name="three"),
    ):
        assert shown(await vhost.management.queues(NAMES.own)) == ["fl.digits.own.demo....", "fl.digits.own.demo...."]
        assert len(await vhost.management.queues("amq.gen-")) == 1
    assert await vhost.management.queues(NAMES.own) == ()


async def test_evaluators_rights_are_enough_to_hear_the_model_and_to_tell_of_it(vhost, administrator):
    evaluator = await user(vhost, "evaluator", evaluator_permissions(NAMES.federation))
    own = NAMES.own_of(EVALUATOR)
    async with administrator("test") as transport, evaluator("evaluator:digits") as listening:
        async with listening.listen(NAMES.model, name=EVALUATOR, queue=own) as feed:
            await transport.publish(Message(NAMES.model, b"frame"))
            assert (await feed.receive()).body == b"frame"
        await listening.publish(Message(NAMES.events, b"event", routing_key="model.evaluated", mandatory=False))


@pytest.mark.parametrize(
    ("exchange", "queue"),
    [
        (NAMES.model, ""),
        (NAMES.model, NAMES.own_of("aggregator")),
        (NAMES.model, NAMES.updates),
        (NAMES.receipts, NAMES.own_of(EVALUATOR)),
        (NAMES.up("a"), NAMES.own_of(EVALUATOR)),
    ],
)
async def test_evaluator_hears_nothing_else(vhost, administrator, exchange, queue):
    evaluator = await user(vhost, "evaluator", evaluator_permissions(NAMES.federation))
    async with evaluator("evaluator:digits") as transport:
        with pytest.raises(AccessRefusedError):
            async with transport.listen(exchange, name=EVALUATOR, queue=queue):
                pass


async def test_aggregators_rights_end_with_its_federation(vhost, administrator):
    aggregator = await user(vhost, "aggregator", aggregator_permissions(NAMES.federation))
    async with aggregator("aggregator:digits") as transport:
        async with transport.listen(NAMES.events, routing_key="#", name="a", queue=NAMES.own_of("aggregator")):
            pass
        for queue in (OTHERS.own_of("aggregator"), ""):
            with pytest.raises(AccessRefusedError):
                async with transport.listen(NAMES.events, routing_key="#", name="a", queue=queue):
                    pass
