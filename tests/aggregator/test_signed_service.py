"""The aggregator at work where signatures are asked for, with a register of its parties."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from enrolled_parties import FEDERATION_KEY, RegisterInMemory, key_of
from structlog.testing import capture_logs

import aggregator.register
import aggregator.service
from aggregator.gate import QUARANTINED_PER_MINUTE
from aggregator.opening import open_ledger_for_reading
from aggregator.verification import verify
from broker_fl.config import MergingSettings, TrustSettings
from broker_fl.signing import SIGNATURE, body_statement, is_signed
from broker_fl.transports.parts import Assembler
from schemas import wire
from schemas.frame import ModelFrame

ALL = ("ann", "bob", "cem")
LENIENT = TrustSettings(suspend_below=0.85)
"""Two hostile updates, and a party is out."""


@pytest.fixture
def register():
    return RegisterInMemory(*ALL)


@pytest.fixture
def at_work(ward, register):
    """A function that runs an aggregator that asks for signatures."""

    def running(**changes):
        return ward.running(**{**ward.signing(register), "merging": MergingSettings(mixing_rate=1.0), **changes})

    return running


def verified(ward):
    with open_ledger_for_reading(ward.bench.url) as ledger:
        return verify(ledger, ward.bench.snapshots())


async def hostile(party, base, count=2):
    """Updates that nobody signed."""
    for seed in range(count):
        await party.send(base, seed=100 + seed, ledger=base.ledger)
        assert (await party.receipt()).reason == "signature"


def kinds(ward):
    return [entry.kind for entry in ward.bench.entries()]


@asynccontextmanager
async def raw(ward, queue):
    async with ward.connect("reader") as transport, transport.follow(queue, start="first", name="reader") as feed:
        yield feed


async def test_signed_updates_are_merged_whole_and_in_parts_and_the_ledger_can_prove_it(ward, at_work):
    async with ward.party() as ann, ward.party("bob") as bob, at_work():
        base = (await ann.frame()).frame
        await ann.send_signed(base)
        await bob.send_signed(base, parts_of=1500)
        for party in (ann, bob):
            assert (await party.receipt()).outcome == "merged"
    found = verified(ward)
    assert (found.signed, found.unsigned) == (2, 0)


async def test_updates_that_are_unsigned_forged_or_of_another_ledger_are_refused_and_change_nothing(ward, at_work):
    async with ward.party() as ann, at_work() as running:
        base = (await ann.frame()).frame
        before = running.coordinator.model_digest()
        await ann.send(base, ledger=base.ledger)
        await ann.send_signed(base, key=key_of("bob"))
        await ann.send_signed(base, key=key_of("bob"), parts_of=1500)
        await ann.send_signed(base, ledger="0" * 32)
        receipts = await ann.receipts(4)
        assert sorted(receipt.reason for receipt in receipts) == ["base", "signature", "signature", "signature"]
        assert running.coordinator.model_digest() == before
    assert [entry.payload for entry in ward.bench.entries() if entry.outcome == "refused"] == [None] * 4


async def test_update_that_somebody_sends_again_in_anothers_name_settles_nothing_twice(ward, at_work):
    """Its bytes are signed; what counts is that they were decided."""
    async with ward.party() as ann, ward.party("bob") as bob, at_work():
        base = (await ann.frame()).frame
        update = await ann.send_signed(base)
        merged = await ann.receipt()
        await bob.send_again(update, signature=None)
        assert (await bob.receipt()).reason == "identity"
        for _ in range(2):
            await ann.send_again(update, signature=None)
            assert await ann.receipt() == merged
    assert len(ward.merged()) == 1


async def test_party_that_is_in_no_register_is_refused_until_it_is_enrolled(ward, at_work, register, monkeypatch):
    monkeypatch.setattr(aggregator.register, "_ASK_AGAIN_S", 0.0)
    del register.members["ann"]
    async with ward.party() as ann, at_work():
        base = (await ann.frame()).frame
        await ann.send_signed(base)
        receipt = await ann.receipt()
        assert (receipt.reason, "party add" in receipt.detail) == ("signature", True)
        register.enrol("ann")
        await ann.send_signed(base)
        assert (await ann.receipt()).outcome == "merged"


async def test_new_key_counts_as_soon_as_it_signs_and_the_old_one_no_more(ward, at_work, register, monkeypatch):
    monkeypatch.setattr(aggregator.register, "_ASK_AGAIN_S", 0.0)
    async with ward.party() as ann, at_work():
        base = (await ann.frame()).frame
        await ann.send_signed(base)
        assert (await ann.receipt()).outcome == "merged"
        register.enrol("ann", public_key=key_of("ann", 2).public)
        await ann.send_signed(base, key=key_of("ann", 2))
        assert (await ann.receipt()).outcome == "merged"
        await ann.send_signed(base)
        assert (await ann.receipt()).reason == "signature"
    assert verified(ward).signed == 2


async def test_register_that_is_away_stops_nobody_whom_the_ledger_knows(ward, at_work, register):
    async with ward.party() as ann, at_work():
        base = (await ann.frame()).frame
        await ann.send_signed(base)
        await ann.receipt()
    register.is_away = True
    async with ward.party() as ann, ward.party("bob") as bob, at_work():
        await ann.send_signed(base)
        assert (await ann.receipt()).outcome == "merged"
        await bob.send_signed(base)
        assert (await bob.receipt()).reason == "signature"


async def test_all_that_the_aggregator_says_is_signed_by_the_federation(ward, at_work):
    async with ward.party() as ann, at_work(keyframe_every_frames=1), raw(ward, ward.names.model_log) as log:
        base = (await ann.frame()).frame
        update = ward.bench.update(base=base, ledger=base.ledger)
        await ann.send_again(update)
        delivery = await ann._inbox.receive()
        assert is_signed("receipt", body_statement(delivery.body), delivery.headers[SIGNATURE], by=FEDERATION_KEY.public)
        assert not is_signed("frame", body_statement(delivery.body), delivery.headers[SIGNATURE], by=FEDERATION_KEY.public)
        await ann.send_signed(base)
        async with raw(ward, ward.names.keyframe_log) as keyframes:
            for feed, count in ((log, 2), (keyframes, 2)):
                for _ in range(count):
                    body, signatures = await _whole(feed)
                    assert wire.decode(ModelFrame, body).ledger == base.ledger
                    (signature,) = signatures
                    assert is_signed("frame", body_statement(body), signature, by=FEDERATION_KEY.public)


async def _whole(feed):
    """A body, and the signatures that its parts say."""
    assembler, signatures = Assembler(), set()
    while True:
        delivery = await feed.receive()
        signatures.add(delivery.headers[SIGNATURE])
        body = assembler.add(delivery)
        if body is not None:
            return body, signatures


async def test_without_a_key_nothing_is_signed(ward):
    async with ward.party() as ann, ward.running(), raw(ward, ward.names.model_log) as log:
        base = (await ann.frame()).frame
        assert SIGNATURE not in (await log.receive()).headers
        await ann.send(base)
        assert SIGNATURE not in (await ann._inbox.receive()).headers


async def test_event_and_receipt_say_why_an_update_weighs_less(ward, at_work, register):
    register.enrol("ann", tier="probation")
    async with ward.party() as ann, ward.events("updates.decided") as onlooker, at_work():
        base = (await ann.frame()).frame
        await ann.send_signed(base)
        receipt = await ann.receipt()
        assert (receipt.outcome, receipt.weight, receipt.reason) == ("merged", 0.25, "tier")
        event = await onlooker.next("updates.decided")
        assert [(facts.party, facts.weight, facts.reason) for facts in event.updates] == [("ann", 0.25, "tier")]


async def test_hostile_party_is_suspended_told_of_and_heard_no_more(ward, at_work, register):
    async with (
        ward.party() as ann,
        ward.party("bob") as bob,
        ward.events() as onlooker,
        ward.quarantine() as quarantine,
        at_work(trust=LENIENT),
    ):
        base = (await ann.frame()).frame
        await hostile(ann, base)
        event = await onlooker.next("party.suspended")
        assert (event.facts["party"], event.facts["reason"][:20]) == ("ann", "its score fell to 0.")
        await ward.until(lambda: register.suspended)
        assert register.suspended == [("ann", event.facts["reason"])]
        assert register.members["ann"].membership.suspended
        entries = ward.bench.entries()
        for seed in range(5):
            await ann.send_signed(base, seed=seed)
        await bob.send_signed(base)
        assert (await bob.receipt()).outcome == "merged"
        await ward.until(lambda: ward.queued() == 0)
        assert not ann.has_more_receipts()
        assert [delivery.headers["x-fl-reason"] for delivery in await _drained(quarantine)] == ["signature"] * 2
    assert [entry.kind for entry in ward.bench.entries()[len(entries) :]] == ["party", "update"]
    assert kinds(ward).count("suspension") == 1
    verified(ward)


async def _drained(subscription):
    deliveries = []
    while (delivery := subscription.receive_nowait()) is not None:
        deliveries.append(delivery)
    return deliveries


async def test_suspension_is_done_on_the_broker_when_the_register_is_back(ward, at_work, register, monkeypatch):
    monkeypatch.setattr(aggregator.service, "_SHUT_OUT_AGAIN_S", 0.01)
    async with ward.party() as ann, at_work(trust=LENIENT):
        base = (await ann.frame()).frame
        await ann.send_signed(base)
        await ann.receipt()
        register.is_away = True
        with capture_logs() as logs:
            await hostile(ann, base)
            await ward.until(lambda: sum("keeps its login" in told["event"] for told in logs) >= 2)
        assert register.suspended == []
        register.is_away = False
        await ward.until(lambda: register.suspended)
        tries = len(register.asked)
        await asyncio.sleep(0.05)
        assert len(register.asked) == tries
    assert len(register.suspended) == 1


async def test_suspension_that_an_aggregator_did_not_live_to_carry_out_is_carried_out_by_the_next(ward, at_work, register):
    async with ward.party() as ann, ward.events("party.suspended") as onlooker:
        async with at_work(trust=LENIENT):
            base = (await ann.frame()).frame
            await ann.send_signed(base)
            await ann.receipt()
            register.is_away = True
            await hostile(ann, base)
            assert (await onlooker.next("party.suspended")).facts["party"] == "ann"
        assert register.suspended == []
        register.is_away = False
        async with at_work(trust=LENIENT):
            await ward.until(lambda: register.suspended)
            assert (await onlooker.next("party.suspended")).facts["party"] == "ann"
            await ann.send_signed(base)
            await ward.until(lambda: ward.queued() == 0)
        assert not ann.has_more_receipts()
    assert [party for party, _ in register.suspended] == ["ann"]


async def test_party_that_an_operator_takes_back_is_merged_again_and_stays_in(ward, at_work, register, monkeypatch):
    monkeypatch.setattr(aggregator.service, "_SHUT_OUT_AGAIN_S", 0.01)
    monkeypatch.setattr(aggregator.register, "_REFRESH_S", 0.01)
    async with ward.party() as ann, at_work(trust=LENIENT) as running:
        base = (await ann.frame()).frame
        await hostile(ann, base)
        await ward.until(lambda: register.suspended)
        register.enrol("ann", suspended=False, reason="")
        asked = len(register.asked)
        # Before it has sent anything: the ledger still has it suspended.
        await ward.until(lambda: len(register.asked) > asked + 5)
        assert running.coordinator.shut_out()
        assert len(register.suspended) == 1
        await ann.send_signed(base)
        assert (await ann.receipt()).outcome == "merged"
        assert running.coordinator.shut_out() == {}
        assert not register.members["ann"].membership.suspended
    verified(ward)


async def test_aggregator_that_starts_anew_does_not_shut_out_again_whom_an_operator_took_back(ward, at_work, register):
    async with ward.party() as ann:
        async with at_work(trust=LENIENT):
            base = (await ann.frame()).frame
            await hostile(ann, base)
            await ward.until(lambda: register.suspended)
        register.enrol("ann", suspended=False, reason="")
        asked = len(register.asked)
        async with at_work(trust=LENIENT):
            await ward.until(lambda: len(register.asked) > asked)
            await ann.send_signed(base)
            assert (await ann.receipt()).outcome in ("merged", "refused")
            await ann.send_signed(base, seed=1)
            assert (await ann.receipt()).outcome == "merged"
    assert len(register.suspended) == 1


async def test_party_that_an_operator_suspended_is_not_heard(ward, at_work, register):
    register.enrol("ann", suspended=True, reason="by hand")
    async with ward.party() as ann, ward.party("bob") as bob, at_work():
        base = (await ann.frame()).frame
        await ann.send_signed(base)
        await bob.send_signed(base)
        assert (await bob.receipt()).outcome == "merged"
        await ward.until(lambda: ward.queued() == 0)
        assert not ann.has_more_receipts()
        # It is out already.
        assert register.suspended == []
    assert [entry.party for entry in ward.merged()] == ["bob"]


async def test_flood_is_refused_unread_with_receipts_and_none_of_it_is_kept_in_quarantine(ward, at_work):
    forbearing = TrustSettings(suspend_below=0)
    async with ward.party() as ann, ward.party("bob") as bob, ward.quarantine() as quarantine:
        async with at_work(per_minute=5, trust=forbearing):
            base = (await ann.frame()).frame
            for seed in range(20):
                await ann.send_signed(base, seed=seed)
            receipts = await ann.receipts(20)
            assert sum(receipt.outcome == "merged" for receipt in receipts) in (5, 6)
            assert {receipt.reason for receipt in receipts if receipt.outcome == "refused"} == {"rate"}
            await bob.send_signed(base)
            assert (await bob.receipt()).outcome == "merged"
        assert await _drained(quarantine) == []


async def test_flood_of_what_is_refused_does_not_drive_out_of_quarantine_what_others_sent(ward, at_work):
    forbearing = TrustSettings(suspend_below=0)
    count = QUARANTINED_PER_MINUTE + 15
    async with ward.party() as ann, ward.party("bob") as bob, ward.quarantine() as quarantine:
        async with at_work(trust=forbearing):
            base = (await ann.frame()).frame
            await hostile(ann, base, count)
            await hostile(bob, base, 1)
        kept = [delivery.headers["x-fl-user"] for delivery in await _drained(quarantine)]
    assert (kept.count("ann"), kept.count("bob")) == (QUARANTINED_PER_MINUTE, 1)
