"""A worker with keys: it signs what it sends, and believes nothing that the federation did not sign."""

import asyncio
import struct

import pytest
from enrolled_parties import FEDERATION_KEY, RegisterInMemory, key_of, signature_of
from structlog.testing import capture_logs

from broker_fl.signing import SIGNATURE, body_statement, is_signed, payload_digest, update_statement
from broker_fl.transports.parts import Assembler
from schemas import wire
from schemas.receipt import Receipt
from schemas.update import ModelUpdate

KEYS = {"federation_key": FEDERATION_KEY.public, "key": key_of("ann")}
MALLORY = key_of("mallory")
MANIFEST_SIZE = 2008


def is_anns(update, signature, *, generation=1):
    statement = update_statement(update, payload_digest=payload_digest(update.payload))
    return is_signed("update", statement, signature, by=key_of("ann", generation).public)


def receipt(update, **changes):
    facts = {
        "federation": "ward",
        "party": "ann",
        "update_id": update.update_id,
        "outcome": "merged",
        "version": 5,
        "staleness": 0,
        "weight": 0.25,
    }
    return wire.encode(Receipt(**{**facts, **changes}))


async def told(logs, event, count=1):
    async with asyncio.timeout(10):
        while sum(entry["event"] == event for entry in logs) < count:  # noqa: ASYNC110 - it happens in other tasks
            await asyncio.sleep(0.001)


def settled(home):
    return home.counters().get("updates_merged", 0), home.counters().get("updates_refused", 0)


@pytest.fixture
def logs():
    with capture_logs() as captured:
        yield captured


async def test_an_update_is_signed_by_its_partys_key_and_names_the_ledger_of_its_frame(home, centre, new_trainer):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS):
        frame = await hub.broadcast(4)
        delivery = await hub.delivery()
    update = wire.decode(ModelUpdate, delivery.body)
    assert update.ledger == frame.ledger
    assert is_anns(update, delivery.headers[SIGNATURE])
    assert delivery.headers[SIGNATURE] == signature_of(update)


async def test_parts_of_an_update_carry_the_signature_of_the_whole(home, centre, new_trainer):
    small = {"part_bytes": 1024, "max_message_bytes": 2048}
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), link=small, **KEYS):
        await hub.broadcast(4)
        assembler, signatures, body = Assembler(), set(), None
        while body is None:
            delivery = await hub.delivery()
            signatures.add(delivery.headers[SIGNATURE])
            body = assembler.add(delivery)
    (signature,) = signatures
    assert is_anns(wire.decode(ModelUpdate, body), signature)


async def test_without_a_key_nothing_is_signed(home, centre, new_trainer):
    async with centre() as hub, home.running(new_trainer(0.5)):
        await hub.broadcast(4)
        assert SIGNATURE not in (await hub.delivery()).headers


async def test_an_update_that_is_sent_again_is_signed_by_the_key_that_its_party_has_then(home, centre, new_trainer):
    clock = [1000.0]
    async with centre(FEDERATION_KEY) as hub:
        async with home.running(new_trainer(0.5), clock=lambda: clock[0], **KEYS):
            await hub.broadcast(4)
            first = await hub.delivery()
            await home.counts("updates_sent")
        clock[0] += 1000.0
        async with home.running(new_trainer(0.5), clock=lambda: clock[0], **{**KEYS, "key": key_of("ann", 2)}):
            again = await hub.delivery()
    assert again.body == first.body
    update = wire.decode(ModelUpdate, again.body)
    assert is_anns(update, again.headers[SIGNATURE], generation=2)
    assert not is_anns(update, again.headers[SIGNATURE])


@pytest.mark.parametrize("key", [None, MALLORY], ids=["unsigned", "by another key"])
async def test_nothing_is_trained_from_a_frame_that_the_federation_did_not_sign(home, centre, new_trainer, logs, key):
    train = new_trainer(0.5)
    async with centre(FEDERATION_KEY) as hub, home.running(train, **KEYS):
        hub.key = key
        await hub.broadcast(4)
        await told(logs, "broadcast left out")
        assert train.bases == []
        hub.key = FEDERATION_KEY
        await hub.broadcast(7, ledger="b" * 32)
        assert (await hub.update()).base_version == 7
    assert len(train.bases) == 1


async def test_a_frame_that_says_it_is_over_ends_nobody_unless_it_is_signed(home, centre, new_trainer):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS) as running:
        await hub.broadcast(4)
        await hub.update()
        hub.key = MALLORY
        await hub.broadcast(4, number=1, over=True)
        await hub.broadcast(5, over=True, ledger="b" * 32)
        hub.key = FEDERATION_KEY
        await hub.broadcast(6, ledger="c" * 32)
        assert (await hub.update()).base_version == 6
        assert not running.task.done()
        await hub.broadcast(7, over=True, ledger="c" * 32)
        await running.ended()


@pytest.mark.parametrize(
    "signature",
    [
        lambda _: "",
        lambda body: MALLORY.sign("receipt", body_statement(body)),
        lambda body: key_of("ann").sign("receipt", body_statement(body)),
        lambda body: FEDERATION_KEY.sign("frame", body_statement(body)),
        lambda body: FEDERATION_KEY.sign("receipt", body_statement(body + b"\x00")),
        lambda body: FEDERATION_KEY.sign("receipt", body_statement(body)).upper(),
    ],
    ids=["empty", "by somebody else", "by the party itself", "of a frame", "of another body", "upper case"],
)
async def test_a_receipt_that_the_federation_did_not_sign_settles_nothing(home, centre, new_trainer, logs, signature):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS):
        await hub.broadcast(4)
        update = await hub.update()
        for outcome, reason in (("merged", None), ("refused", "bounds")):
            body = receipt(update, outcome=outcome, reason=reason)
            await hub.send_receipt("ann", body, signature=signature(body))
        await told(logs, "receipt left out", 2)
        assert settled(home) == (0, 0)
        await hub.answer(update)
        await home.counts("updates_merged")


async def test_a_receipt_without_a_signature_settles_nothing(home, centre, new_trainer, logs):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS):
        await hub.broadcast(4)
        update = await hub.update()
        hub.key = None
        await hub.answer(update)
        await told(logs, "receipt left out")
        assert settled(home) == (0, 0)


@pytest.mark.parametrize("changes", [{"party": "bob"}, {"federation": "banks"}], ids=["another party", "another federation"])
@pytest.mark.parametrize("key", [FEDERATION_KEY, None], ids=["signed", "without keys"])
async def test_a_receipt_for_somebody_else_settles_nothing(home, centre, new_trainer, logs, changes, key):
    """The broker could deliver it here, though it was signed for somebody whose update has the same id."""
    async with centre(key) as hub, home.running(new_trainer(0.5), **(KEYS if key else {})):
        await hub.broadcast(4)
        update = await hub.update()
        await hub.send_receipt("ann", receipt(update, **changes))
        await told(logs, "receipt left out")
        assert settled(home) == (0, 0)
        await hub.answer(update)
        await home.counts("updates_merged")


async def test_a_receipt_that_comes_twice_settles_once(home, centre, new_trainer, logs):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS):
        await hub.broadcast(4)
        update = await hub.update()
        for _ in range(2):
            await hub.answer(update)
        # They are taken in order.
        await hub.send_receipt("ann", receipt(update), signature="")
        await told(logs, "receipt left out")
        assert settled(home) == (1, 0)


async def test_why_an_update_weighs_less_is_told_and_it_is_settled(home, centre, new_trainer, logs):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS):
        await hub.broadcast(4)
        update = await hub.update()
        await hub.send_receipt("ann", receipt(update, reason="norm", detail="its norm 9 was scaled down to 4"))
        await home.counts("updates_merged")
    (said,) = [entry for entry in logs if entry["event"] == "update merged"]
    assert (said["reason"], said["detail"]) == ("norm", "its norm 9 was scaled down to 4")


async def test_content_that_is_far_outside_of_what_others_send_is_dropped_and_rides_in_no_later_update(home, centre, new_trainer):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS):
        await hub.broadcast(4)
        await hub.answer(await hub.update(), outcome="refused", reason="outlier")
        await home.counts("updates_dropped")
        await hub.broadcast(5)
        second = await hub.update()
    assert second.payload == struct.pack("<f", 0.5) * MANIFEST_SIZE


@pytest.mark.parametrize("reason", ["rate", "signature", "suspended", "base"])
async def test_content_of_what_was_refused_for_no_fault_of_its_own_stays_with_the_party(home, centre, new_trainer, reason):
    async with centre(FEDERATION_KEY) as hub, home.running(new_trainer(0.5), **KEYS):
        await hub.broadcast(4)
        await hub.answer(await hub.update(), outcome="refused", reason=reason)
        await home.counts("updates_refused")
        await hub.broadcast(5)
        second = await hub.update()
    assert second.payload == struct.pack("<f", 1.0) * MANIFEST_SIZE


async def test_with_a_real_aggregator_all_of_it_is_signed_and_merged(home, new_home, tmp_path, aggregator, new_trainer):
    register = RegisterInMemory("ann", "bob")
    bob = new_home(tmp_path / "bob", "bob")
    async with (
        aggregator(register=register, key=FEDERATION_KEY) as (coordinator, _),
        home.running(new_trainer(0.5), **KEYS),
        # Enrolled, and not with this key.
        bob.running(new_trainer(0.5), federation_key=FEDERATION_KEY.public, key=MALLORY),
    ):
        await home.counts("updates_merged", 3)
        await bob.counts("updates_refused")
        assert coordinator.version >= 3
    assert bob.counters().get("updates_merged", 0) == 0
    assert home.counters().get("updates_refused", 0) == 0
