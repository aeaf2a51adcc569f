"""Parties that come late, stay away for long, or are too late with an update."""

import numpy as np
import pytest
from command_line import until
from small_federation import SmallFederation, quarantined

from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.management import Management
from broker_fl.topology import Permissions, party_permissions
from broker_fl.transports.amqp import amqp_connect
from schemas import wire
from schemas.frame import ModelFrame
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


async def test_update_beyond_the_staleness_bound_is_refused_and_its_content_returns_to_the_residual(
    federation: SmallFederation, vhost
) -> None:
    federation.configure(merging={"max_staleness": 5})
    await federation.enrol("a", "b")
    # An update that is made, kept, and can't be sent.
    await permit(vhost.management, "a", write="^$")
    aggregator, b, shut_out = federation.aggregator(), federation.worker("b"), federation.worker("a")
    assert "fl.blobs.up.a" in await shut_out.ends_with_one_line()
    before = federation.outbox("a")
    assert list(before.unsettled) == [1]
    update = wire.decode(ModelUpdate, before.bodies[1])

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
        body = ledger.frame_body(ledger.last_frame().number)
    manifest = wire.decode(ModelFrame, body).manifest
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
