import re

import pytest

from broker_fl.topology import (
    InboxLimits,
    Names,
    leadership,
    operator_policies,
    party,
    party_limits,
    party_permissions,
    policies,
    policies_without_logs,
    shared,
)

NAMES = Names("hospitals")


def _allowed(expression: str, name: str) -> bool:
    """As RabbitMQ reads permissions: a search, anchored only where the expression says so."""
    return re.search(expression, name) is not None


def _parts():
    return shared("hospitals"), party("hospitals", "b"), leadership("hospitals")


def _everything() -> list[str]:
    return [
        *(exchange.name for topology in _parts() for exchange in topology.exchanges),
        *(queue.name for topology in _parts() for queue in topology.queues),
        "",
        "amq.default",
        "amq.topic",
    ]


def test_everything_of_a_federation_begins_with_its_name():
    for topology in _parts():
        for thing in (*topology.exchanges, *topology.queues):
            assert thing.name.startswith("fl.hospitals.")


def test_bindings_join_only_what_is_declared():
    exchanges = {exchange.name for topology in _parts() for exchange in topology.exchanges}
    queues = {queue.name for topology in _parts() for queue in topology.queues}
    for topology in _parts():
        for binding in topology.bindings:
            assert binding.exchange in exchanges
            assert binding.queue in queues


def test_who_leads_is_a_message_in_a_quorum_queue_that_one_consumer_at_a_time_gets():
    """It is declared alone, by aggregators that do not lead yet; and outlives them, and the broker."""
    topology = leadership("hospitals")
    (exchange,), (queue,), (binding,) = topology.exchanges, topology.queues, topology.bindings
    assert (exchange.name, exchange.kind) == (NAMES.leader, "fanout")
    assert queue.name == NAMES.leader
    assert queue.all_arguments() == {"x-queue-type": "quorum", "x-single-active-consumer": True, "x-max-length": 4}
    assert (binding.exchange, binding.queue) == (NAMES.leader, NAMES.leader)


def test_no_policy_drops_or_expires_who_leads():
    assert not any(_allowed(policy.pattern, NAMES.leader) for policy in policies("hospitals", model_bytes=1000))


def test_updates_wait_in_a_quorum_queue_with_one_consumer_and_a_way_out_for_what_nobody_takes():
    (updates,) = (queue for queue in shared("hospitals").queues if queue.name == NAMES.updates)
    assert updates.all_arguments() == {
        "x-queue-type": "quorum",
        "x-single-active-consumer": True,
        "x-dead-letter-exchange": NAMES.quarantine,
    }


@pytest.mark.parametrize(
    ("exchange", "log"), [(NAMES.model, NAMES.model_log), (NAMES.keyframes, NAMES.keyframe_log)], ids=["frames", "keyframes"]
)
def test_frames_and_keyframes_go_through_a_fanout_exchange_into_a_stream_of_their_own(exchange, log):
    topology = shared("hospitals")
    assert {declared.name: declared.kind for declared in topology.exchanges}[exchange] == "fanout"
    assert {queue.name: queue.kind for queue in topology.queues}[log] == "stream"
    assert {binding.exchange for binding in topology.bindings if binding.queue == log} == {exchange}
    assert {binding.queue for binding in topology.bindings if binding.exchange == exchange} == {log}


def test_a_party_has_a_fanout_exchange_into_the_updates_queue_and_an_inbox_by_its_name():
    own = party("hospitals", "a")
    assert [(exchange.name, exchange.kind) for exchange in own.exchanges] == [("fl.hospitals.up.a", "fanout")]
    assert {(binding.exchange, binding.queue, binding.routing_key) for binding in own.bindings} == {
        ("fl.hospitals.up.a", "fl.hospitals.updates", ""),
        ("fl.hospitals.receipts", "fl.hospitals.inbox.a", "a"),
    }


def test_a_party_configures_nothing():
    for name in _everything():
        assert not _allowed(party_permissions("hospitals", "a").configure, name) or name == ""


@pytest.mark.parametrize("name", ["a", "a-1", "a_b", "x" * 63])
def test_a_party_writes_to_its_own_exchange_alone(name):
    write = party_permissions("hospitals", name).write
    assert _allowed(write, NAMES.up(name))
    others = [NAMES.up("b"), NAMES.up(name + "x"), NAMES.up("x" + name), f"x{NAMES.up(name)}", f"{NAMES.up(name)}.x"]
    for other in [*_everything(), *others, Names("other").up(name), NAMES.up(name).replace(".", "x")]:
        assert not _allowed(write, other)


def test_a_party_reads_the_two_logs_of_the_model_and_its_own_inbox_alone():
    read = party_permissions("hospitals", "a").read
    may = {name for name in [*_everything(), NAMES.inbox("a"), NAMES.inbox("a2"), NAMES.inbox("")] if _allowed(read, name)}
    assert may == {NAMES.model_log, NAMES.keyframe_log, NAMES.inbox("a")}


def test_the_party_of_an_exchange_is_found():
    assert NAMES.party_of(NAMES.up("a")) == "a"
    for other in (NAMES.model, NAMES.updates, "", "fl.other.up.a", "xfl.hospitals.up.a", "fl.hospitals.up"):
        assert NAMES.party_of(other) is None


@pytest.mark.parametrize("federation", ["hospitals", "a-b_c"])
def test_each_policy_holds_for_the_queues_that_it_is_named_after(federation):
    names = Names(federation)
    queues = {
        "updates": names.updates,
        "model.log": names.model_log,
        "keyframes.log": names.keyframe_log,
        "quarantine": names.quarantine,
        "inbox": names.inbox("a"),
        "leader": names.leader,
    }
    for policy in policies(federation, model_bytes=1000):
        held = {name for name in [*queues.values(), *(f"x{name}" for name in queues.values())] if _allowed(policy.pattern, name)}
        assert held == {queues[policy.name.removeprefix(f"fl.{federation}.")]}


def test_a_policy_does_not_reach_into_another_federation():
    for policy in policies("a", model_bytes=1000):
        for names in (Names("b"), Names("aa"), Names("a-b")):
            queues = (names.updates, names.model_log, names.keyframe_log, names.inbox("a"))
            assert not any(_allowed(policy.pattern, name) for name in queues)


def test_a_party_named_like_a_queue_gets_the_policy_of_an_inbox_alone():
    for name in ("updates", "quarantine", "log", "keyframes"):
        inbox = NAMES.inbox(name)
        held = [policy.name for policy in policies("hospitals", model_bytes=1000) if _allowed(policy.pattern, inbox)]
        assert held == ["fl.hospitals.inbox"]


@pytest.mark.parametrize("model_bytes", [1, 1 << 20, 40 << 20])
@pytest.mark.parametrize(("log", "models"), [("model.log", 8), ("keyframes.log", 4)])
def test_the_logs_keep_as_many_bytes_as_several_models(model_bytes, log, models):
    (policy,) = (policy for policy in policies("hospitals", model_bytes=model_bytes) if policy.name.endswith(log))
    assert policy.definition["max-length-bytes"] >= models * model_bytes
    assert policy.definition["stream-max-segment-size-bytes"] >= model_bytes


def test_enrolment_makes_the_policies_that_need_to_know_no_model():
    made = {policy.name: policy for policy in policies_without_logs("hospitals")}
    assert set(made) == {"fl.hospitals.updates", "fl.hospitals.quarantine", "fl.hospitals.inbox"}
    assert all(made[policy.name] == policy for policy in policies("hospitals", model_bytes=1 << 30) if policy.name in made)


def test_operator_policies_bound_updates_inboxes_and_the_queues_of_others():
    held = {
        policy.name: {
            name
            for name in (
                NAMES.updates,
                NAMES.inbox("a"),
                f"{NAMES.own}dashboard",
                NAMES.model_log,
                NAMES.keyframe_log,
                NAMES.quarantine,
                NAMES.leader,
                f"x{NAMES.updates}",
                f"{NAMES.updates}.x",
                Names("other").inbox("a"),
            )
            if _allowed(policy.pattern, name)
        }
        for policy in operator_policies("hospitals")
    }
    assert held == {
        "fl.hospitals.updates": {NAMES.updates},
        "fl.hospitals.inbox": {NAMES.inbox("a")},
        "fl.hospitals.own": {f"{NAMES.own}dashboard"},
    }


def test_what_bounds_the_updates_has_them_refused_and_not_dropped():
    """An operator policy knows no overflow, and what it bounds would else lose its oldest."""
    (operator,) = (policy for policy in operator_policies("hospitals") if policy.name.endswith("updates"))
    for policy in (*policies("hospitals", model_bytes=1), *policies_without_logs("hospitals")):
        if policy.name == operator.name:
            assert policy.definition["overflow"] == "reject-publish"


def test_inboxes_are_bounded_as_the_settings_say():
    (inbox,) = (
        policy
        for policy in operator_policies("hospitals", InboxLimits(messages=5, bytes=6, ttl_s=7))
        if policy.name == "fl.hospitals.inbox"
    )
    assert inbox.definition == {"max-length": 5, "max-length-bytes": 6, "message-ttl": 7000}


def test_limits_of_a_party_are_those_of_a_user():
    assert party_limits(connections=4, channels=16) == {"max-connections": 4, "max-channels": 16}
