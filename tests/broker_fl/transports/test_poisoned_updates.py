"""A message that kills whoever takes it, again and again, is laid aside by the broker."""

import asyncio
import subprocess
import sys

import aio_pika
import pytest
from pydantic import SecretStr

from broker_fl import topology
from broker_fl.config import BrokerSettings
from broker_fl.topology import Names
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.transport import Message

pytestmark = pytest.mark.rabbitmq

NAMES = Names("digits")
POLICIES = topology.policies("digits", model_bytes=1)

NAIVE_AND_STARTED_AGAIN = """
import asyncio, os, signal, sys
import aio_pika

async def consume(url, queue):
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=1)
    async with (await channel.get_queue(queue, ensure=False)).iterator() as messages:
        async for message in messages:
            print(message.body.decode(), flush=True)
            if message.body == b"poison":
                os.kill(os.getpid(), signal.SIGKILL)
            await message.ack()
            break
    await connection.close()

while True:
    child = os.fork()
    if child == 0:
        asyncio.run(consume(*sys.argv[1:]))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


async def test_update_that_kills_its_consumer_again_and_again_ends_in_quarantine(vhost):
    (limit,) = [policy.definition["delivery-limit"] for policy in POLICIES if "delivery-limit" in policy.definition]
    await vhost.management.apply_policies(POLICIES)
    async with amqp_connect(BrokerSettings(url=SecretStr(vhost.url)))("test") as transport:
        await transport.declare(topology.shared("digits"))
        await transport.declare(topology.party("digits", "alice"))
        for body in (b"poison", b"harmless"):
            await transport.publish(Message(NAMES.up("alice"), body))
    command = [sys.executable, "-c", NAIVE_AND_STARTED_AGAIN, vhost.url, NAMES.updates]
    ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["poison"] * (limit + 1) + ["harmless"], ended.stderr
    async with await aio_pika.connect(vhost.url) as connection, connection.channel() as channel:
        quarantine = await channel.get_queue(NAMES.quarantine, ensure=False)
        async with asyncio.timeout(15), quarantine.iterator(no_ack=True) as messages:
            laid_aside = await anext(messages)
    assert laid_aside.body == b"poison"
    (death,) = laid_aside.headers["x-death"]
    assert (death["reason"], death["queue"], death["count"]) == ("delivery_limit", NAMES.updates, 1)
