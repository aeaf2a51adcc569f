"""deploy/rabbitmq on a real node: who gets in, what is made, and what Prometheus reads."""

import asyncio
import json
import os
import re
import ssl
import urllib.request
from collections.abc import Iterator

import pytest
from deployed_node import HOST, DeployedNode, deployed_node
from deployment import DEPLOY, document, make_secrets, metrics_in, settings_of_conf

from broker_fl.certificates import Certificates
from broker_fl.config import BrokerSettings
from broker_fl.enrolment import management_of
from broker_fl.errors import AccessRefusedError, AuthenticationError, MessageTooLargeError
from broker_fl.topology import Names, leadership, policies, shared
from broker_fl.transports.amqp import amqp_connect
from broker_fl.transports.local_rabbitmq import find_rabbitmq
from broker_fl.transports.transport import Message

NAMES = Names("federation")
MODEL_BYTES = 64 << 20
CONF = settings_of_conf((DEPLOY / "rabbitmq" / "rabbitmq.conf").read_text())

real = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[DeployedNode]:
    if find_rabbitmq() is None:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent("RabbitMQ is not installed: apt install rabbitmq-server, or brew install rabbitmq")
    folder = tmp_path_factory.mktemp("deployed")
    assert make_secrets(folder, "broker.example.org").returncode == 0
    authority = Certificates.open(folder / "secrets" / "authority")
    for name in ("stranger", "operator", "supervisor"):
        authority.keep(authority.issue(name))
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        opened = deployed_node(folder / "secrets")
        found = runner.run(opened.__aenter__())
        try:
            yield found
        finally:
            runner.run(opened.__aexit__(None, None, None))


def _read(node: DeployedNode, path: str) -> str:
    """What Prometheus gets."""
    context = ssl.create_default_context(cafile=node.secrets / "ca.pem")
    with urllib.request.urlopen(f"https://{HOST}:{node.prometheus_port}{path}", context=context, timeout=30) as answer:
        return answer.read().decode()


def test_messages_have_the_size_that_the_settings_take_them_to_have():
    assert int(CONF["max_message_size"]) == BrokerSettings().max_message_bytes
    assert int(CONF["heartbeat"]) == BrokerSettings().heartbeat_s


def test_no_user_has_a_password_in_what_is_committed():
    definitions = json.loads((DEPLOY / "rabbitmq" / "definitions.json").read_text())
    assert {user["name"]: user["password_hash"] for user in definitions["users"]} == {"aggregator": "", "evaluator": ""}
    assert [user["tags"] for user in definitions["users"]] == [[], []]


def test_what_only_4_knows_is_in_a_file_of_its_own():
    four = settings_of_conf((DEPLOY / "rabbitmq" / "rabbitmq-4.conf").read_text())
    assert not four.keys() & CONF.keys()
    assert not any("ssl_options" in key for key in (*four, *CONF)), "advanced.config would replace them"


@real
async def test_nothing_listens_but_tls(node):
    async with management_of(node.operator()) as management:
        answer = (await management._request("GET", "overview")).json()
    assert {listener["protocol"] for listener in answer["listeners"]} == {
        "amqp/ssl",
        "clustering",
        "https",
        "https/prometheus",
    }


@real
async def test_the_aggregator_finds_all_that_it_declares(node):
    async with amqp_connect(node.broker("aggregator"))("test") as transport:
        await transport.declare(leadership("federation"))
        await transport.declare(shared("federation"))
        assert transport.user == "aggregator"
        await transport.publish(Message(NAMES.quarantine, b"", mandatory=True))
        async with transport.listen(NAMES.model, name="test", queue=NAMES.own_of("evaluator")):
            pass
        with pytest.raises(AccessRefusedError):
            await transport.publish(Message("amq.topic", b"", mandatory=False))


@real
async def test_the_evaluator_listens_and_tells_and_does_nothing_else(node):
    async with amqp_connect(node.broker("evaluator"))("test") as transport:
        listening = transport.listen(NAMES.model, name="test", queue=NAMES.own_of("evaluator"))
        async with listening, transport.follow(NAMES.model_log, start="last", name="log"):
            pass
        await transport.publish(Message(NAMES.events, b"", routing_key="model.evaluated", mandatory=False))
    for forbidden in (NAMES.model, NAMES.receipts, NAMES.quarantine):
        async with amqp_connect(node.broker("evaluator"))("test") as transport:
            with pytest.raises(AccessRefusedError):
                await transport.publish(Message(forbidden, b"", mandatory=False))
    async with amqp_connect(node.broker("evaluator"))("test") as transport:
        with pytest.raises(AccessRefusedError):
            async with transport.consume(NAMES.updates, prefetch=1, name="test"):
                pass


@real
@pytest.mark.parametrize("user", ["stranger", None], ids=["not-enrolled", "no-certificate"])
async def test_who_has_no_user_or_no_certificate_stays_out(node, user):
    with pytest.raises(AuthenticationError):
        async with amqp_connect(node.broker(user))("test"):
            pass


@real
async def test_a_password_opens_the_management_api_and_not_the_broker(node):
    password = (node.secrets / "operator.password").read_text()
    async with management_of(node.operator()) as management:
        assert {user.name for user in await management.list_users()} == {"aggregator", "evaluator", "operator", "supervisor"}
    url = f"amqps://operator:{password}@{HOST}:{node.amqp_port}/federation"
    with pytest.raises(AuthenticationError):
        async with amqp_connect(node.broker("operator", url=url))("test"):
            pass


@real
async def test_a_message_over_the_limit_is_refused(node):
    async with amqp_connect(node.broker("aggregator"))("test") as transport:
        with pytest.raises(MessageTooLargeError):
            await transport.publish(Message(NAMES.quarantine, bytes(int(CONF["max_message_size"]) + 1)))


@real
async def test_policies_are_there_before_the_logs(node):
    """As the aggregator would make them: it finds nothing missing, and the logs have their segments."""
    wanted = {policy.name: policy for policy in policies("federation", model_bytes=MODEL_BYTES)}
    async with management_of(node.operator()) as management:
        found = (await management._request("GET", "policies/federation")).json()
        assert {one["name"]: one["definition"] for one in found} == {name: dict(one.definition) for name, one in wanted.items()}
        async with asyncio.timeout(30):
            while True:
                queues = (await management._request("GET", "queues/federation")).json()
                effective = {queue["name"]: queue.get("effective_policy_definition") for queue in queues}
                if effective[NAMES.model_log]:
                    break
                await asyncio.sleep(0.2)
    assert effective[NAMES.model_log]["stream-max-segment-size-bytes"] == MODEL_BYTES
    assert effective[NAMES.updates]["overflow"] == "reject-publish"


@real
async def test_series_that_rules_and_dashboard_ask_for_are_there(node):
    rules = [rule["expr"] for group in document(DEPLOY / "prometheus" / "rules.yml")["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "broker-fl.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    wanted = {name for expression in (*rules, *shown) for name in metrics_in(expression) if name.startswith("rabbitmq_")}
    assert len(wanted) > 15
    (job,) = [job for job in document(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"] if "params" in job]
    query = "&".join(f"{name}={value}" for name, values in job["params"].items() for value in values)
    texts = [await asyncio.to_thread(_read, node, path) for path in ("/metrics", f"{job['metrics_path']}?{query}")]
    there = {name for text in texts for name in re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)}
    assert wanted <= there


@real
async def test_what_an_operator_edits_survives_a_restart_and_so_does_what_was_declared(node):
    name = "fl.federation.inbox"
    async with management_of(node.operator()) as management:
        path = f"policies/federation/{name}"
        policy = (await management._request("GET", path)).json()
        policy["definition"]["max-length"] = 77
        await management._request("PUT", path, policy)
        before = await management.found()
        await node.start_again()
        assert (await management._request("GET", path)).json() == policy
        # RabbitMQ 4 lists a stream when its leader is up again.
        async with asyncio.timeout(30):
            while await management.found() != before:  # noqa: ASYNC110 - it happens in the broker
                await asyncio.sleep(0.1)
        policy["definition"]["max-length"] = 10_000
        await management._request("PUT", path, policy)


@real
async def test_a_certificate_that_is_revoked_is_worth_nothing_from_then_on(node):
    async with amqp_connect(node.broker("supervisor"))("test"):
        pass
    Certificates.open(node.secrets / "authority").revoke("supervisor")
    with pytest.raises(AuthenticationError, match="revoked"):
        async with amqp_connect(node.broker("supervisor"))("test"):
            pass
