"""Parties that come late, stay away for long, or are too late with an update."""

import numpy as np
import pytest
from command_line import until
from small_federation import SmallFederation, quarantined

from aggregator.recovery import manifest_of_ledger
from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.management import Management
from broker_fl.topology import Permissions, party_permissions
from broker_fl.transports.amqp import amqp_connect
from schemas import wire
from schemas.update import ModelUpdate

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]


async def test_party_that_comes_late_or_was_away_goes_on_from_the_newest_model(federation: SmallFederation) -> None:
    await federation.enrol("steady", "late")
    aggregator, steady = federation.aggregator(), federation.worker("steady")
    await federation.reaches(20, aggregator, steady)
    late = federation.worker("late")
    await until(lambda: len(federation.updates("late")) >= 5, "the late party takes part")
    late.terminate()
    await late.ends_well()
    left_at, made = federation.version, federation.outbox("late").last_sequence
    await federation.reaches(left_at + 15, aggregator, steady)
    late = federation.worker("late")
    await until(lambda: len(federation.updates("late")) >= made + 5, "the party that was away takes part again")
    steady.terminate()
    await steady.ends_well()
    late.terminate()
    await late.ends_well()
    aggregator.terminate()
    await aggregator.ends_well()
    bases = {entry.sequence: entry.base_version for entry in federation.updates("late")}
    assert bases[1] >= 20
    assert bases[made + 1] >= left_at + 15
    federation.expect_exactly_once("steady", "late")


async def test_party_that_was_away_for_ten_versions_reads_only_what_changed_and_holds_the_aggregators_bits(
    federation: SmallFederation,
) -> None:
    federation.task = federation.task.replace(":TASK", ":WIDE")
    # A hundredth of the model for each frame: tens of them cost less than the model.
    federation.configure(codec={"down": "topk:0.01+int8"})
    await federation.enrol("steady", "away")
    aggregator, steady, away = federation.aggregator(), federation.worker("steady"), federation.worker("away")
    await federation.reaches(1, aggregator, steady, away)
    await until(lambda: federation.updates("steady") and federation.updates("away"), "both take part")
    away.terminate()
    await away.ends_well()
    before, left_with = federation.outbox("away").counters, federation.held("away")
    # A frame may bring two versions: what is asked for below are frames.
    await federation.reaches(left_with.version + 20, aggregator, steady)
    steady.terminate()
    await steady.ends_well()
    away = federation.worker("away")
    await away.says("model received")
    after = federation.outbox("away").counters
    made = len(federation.updates("away"))
    await until(lambda: len(federation.updates("away")) > made, "it takes part again")
    for running in (away, aggregator):
        running.terminate()
        await running.ends_well()

    read = {name: after[name] - before.get(name, 0) for name in ("deltas_received", "bytes_down")}
    assert read["deltas_received"] >= 10
    assert "keyframes_received" not in after
    held = federation.expect_held("away")
    assert read["bytes_down"] < held.model.nbytes / 2
    assert held.number >= left_with.number + 10
    federation.expect_exactly_once("steady", "away")


@pytest.mark.parametrize("aggregator_is", ["away", "up"])
async def test_broker_that_lost_its_logs_serves_a_newcomer_and_those_who_are_there(
    federation: SmallFederation, aggregator_is: str
) -> None:
    # Below 1, a frame comes every 5 s though nobody sends: only what is published shows that a log is gone.
    federation.configure(aggregator={"fraction": 0.99})
    await federation.enrol("steady", "new")
    aggregator, steady = federation.aggregator(), federation.worker("steady")
    await federation.reaches(10, aggregator, steady)
    if aggregator_is == "away":
        aggregator.terminate()
        await aggregator.ends_well()
    for log in (federation.names.keyframe_log, federation.names.model_log):
        await federation.management.delete_queue(log)
    if aggregator_is == "away":
        aggregator = federation.aggregator()
    lost_at = federation.version
    new = federation.worker("new")
    await until(lambda: len(federation.updates("new")) >= 3, "the newcomer takes part")
    made = federation.outbox("steady").last_sequence
    await until(lambda: federation.outbox("steady").last_sequence >= made + 3, "the other one goes on")
    for running in (new, steady, aggregator):
        running.terminate()
        await running.ends_well()
    assert federation.updates("new")[0].base_version >= lost_at
    assert federation.outbox("new").counters["keyframes_received"] == 1
    for party in ("new", "steady"):
        federation.expect_held(party)
    federation.expect_exactly_once("steady", "new")


async def test_update_beyond_the_staleness_bound_is_refused_and_its_content_returns_to_the_residual(
    federation: SmallFederation, vhost
) -> None:
    federation.configure(merging={"max_staleness": 5})
    await federation.enrol("a", "b")
    # An update that is made, kept, and can't be sent.
    await permit(vhost.management, "a", write="^$")
    # Alone, so that there is one version only, and it makes no second update before it is shut out.
    aggregator, shut_out = federation.aggregator(), federation.worker("a")
    assert "fl.blobs.up.a" in await shut_out.ends_with_one_line()
    before = federation.outbox("a")
    assert list(before.unsettled) == [1]
    update = wire.decode(ModelUpdate, before.bodies[1])

    b = federation.worker("b")
    await federation.reaches(update.base_version + 10, aggregator, b)
    b.terminate()
    await b.ends_well()
    await permit(vhost.management, "a", write=party_permissions("blobs", "a").write)
    # So slow that what it makes next comes long after the receipt, and after we looked.
    a = federation.worker("a", "--set", "worker.throttle=4")
    await until(lambda: federation.outbox("a").counters.get("updates_refused"), "the refusal's receipt is settled")
    after = federation.outbox("a")
    assert after.last_sequence == 1
    assert after.unsettled == {}
    with federation.ledger() as ledger:
        manifest = manifest_of_ledger(ledger)
    expected = before.residual.copy()
    decode(update.payload, parse_codec(update.codec), manifest=manifest).add_to(expected)
    np.testing.assert_array_equal(after.residual, expected)
    assert not np.array_equal(after.residual, before.residual)

    assert [line for line in a.lines("update refused") if "too_stale" in line]
    await until(lambda: len(federation.updates("a")) >= 2, "it goes on and is merged")
    refused, merged, *_ = federation.updates("a")
    assert (refused.outcome, refused.reason, refused.update_id) == ("refused", "too_stale", update.update_id)
    assert merged.outcome == "merged"

    async with amqp_connect(federation.settings.broker)("test") as transport:
        message = await quarantined(transport, federation.names)
    assert message.message_id == update.update_id
    assert message.body == before.bodies[1]
    assert message.headers["x-fl-reason"] == "too_stale"
    assert "the bound is 5" in str(message.headers["x-fl-detail"])
    assert (message.headers["x-fl-exchange"], message.headers["x-fl-user"]) == ("fl.blobs.up.a", "a")

    a.terminate()
    await a.ends_well()
    federation.expect_exactly_once("a", "b")


async def permit(management: Management, party: str, *, write: str) -> None:
    permissions = party_permissions("blobs", party)
    await management.put_permissions(party, Permissions(permissions.configure, write, permissions.read))
