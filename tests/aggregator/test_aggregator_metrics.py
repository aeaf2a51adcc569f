"""The service with an observer that counts, on the broker in memory."""

import asyncio
import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_names import values_of

from aggregator.observer import SENT_AT, waited_s
from broker_fl.cli.metrics.aggregator import AggregatorMetrics
from broker_fl.config import MergingSettings
from broker_fl.transports.transport import Message

NOW = 1_700_000_000.0


def counted(metrics, name, **labels):
    text = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return values_of(metrics.registry).get(f"{name}{{{text}}}" if text else name, 0.0)


async def send(ward, party, base, *, sent_at=None, size=None, **changes):
    """With the header that says when; gives the size of the message."""
    message = ward.bench.message(ward.bench.update(party.name, base=base, **changes))
    headers = {} if sent_at is None else {SENT_AT: sent_at}
    await party.transport.publish(Message(message.exchange, message.body, message_id=message.message_id, headers=headers))
    return len(message.body)


async def test_what_the_aggregator_does_is_what_its_metrics_say(ward):
    metrics = AggregatorMetrics()
    async with ward.running(observer=metrics) as running, ward.party() as ann:
        base = (await ann.frame()).frame
        await ward.until(lambda: counted(metrics, "broker_fl_leading") == 1)
        assert counted(metrics, "broker_fl_version") == 0
        at = int((time.time() - 30) * 1000)
        sizes = [await send(ward, ann, base, sent_at=at, seed=seed, codec="topk:0.5+int8") for seed in range(3)]
        receipts = await ann.receipts(3)
        refused = await send(ward, ann, base, sent_at=at, base_digest="0" * 64)
        again = ward.bench.update("ann", base=base)
        for _ in range(2):
            await ann.send_again(again)
        await ann.receipts(3)
        await ward.until(lambda: counted(metrics, "broker_fl_broadcast_seconds_count") == len(ward.bench.frames()))
        assert counted(metrics, "broker_fl_version") == running.coordinator.version == 4
    assert counted(metrics, "broker_fl_leading") == 0
    frames = ward.bench.frames()

    by_outcome = {name: counted(metrics, "broker_fl_updates_total", outcome=name) for name in ("merged", "refused", "duplicate")}
    assert by_outcome == {"merged": 4, "refused": 1, "duplicate": 1}
    assert counted(metrics, "broker_fl_refusals_total", reason="base") == 1
    assert counted(metrics, "broker_fl_staleness_versions_count") == 4
    assert counted(metrics, "broker_fl_staleness_versions_sum") == sum(range(4))
    assert counted(metrics, "broker_fl_effective_weight_sum") == pytest.approx(
        sum(entry.weight for entry in ward.merged()), rel=1e-6
    )
    assert receipts[0].weight == pytest.approx(0.3)
    assert counted(metrics, "broker_fl_bytes_total", direction="up", codec="topk+int8") == sum(sizes)
    # What is refused after a look inside has its codec too.
    dense = counted(metrics, "broker_fl_bytes_total", direction="up", codec="float32")
    assert dense == refused + 2 * len(ward.bench.message(again).body)
    # Four waited half a minute; the two without a header are not among them.
    assert counted(metrics, "broker_fl_queue_age_seconds_count") == 4
    assert 4 * 30 <= counted(metrics, "broker_fl_queue_age_seconds_sum") < 4 * 60
    assert 1 <= counted(metrics, "broker_fl_commit_seconds_count") <= 6
    assert counted(metrics, "broker_fl_commit_seconds_sum") > 0
    assert counted(metrics, "broker_fl_parties_online") == 1
    assert counted(metrics, "broker_fl_broadcast_seconds_count") == len(frames)
    keyframes = sum(frame.keyframe_size or 0 for frame in frames)
    assert counted(metrics, "broker_fl_bytes_total", direction="down", codec="float32") == (
        sum(frame.size for frame in frames) + keyframes
    )


async def test_an_announcement_for_newcomers_costs_bytes_and_has_no_time_of_broadcasting(ward):
    async with ward.running(), ward.party() as ann:
        await ann.send((await ann.frame()).frame)
        await ann.receipt()
        await ann.frames_until(lambda frame: frame.version == 1)
    metrics = AggregatorMetrics()
    async with ward.events("frame.published") as onlooker, ward.running(observer=metrics):
        announced = await onlooker.next("frame.published")
    facts = announced.facts
    down = counted(metrics, "broker_fl_bytes_total", direction="down", codec="float32")
    assert down == facts["bytes"] + facts["keyframe_bytes"]
    assert counted(metrics, "broker_fl_broadcast_seconds_count") == 0
    assert counted(metrics, "broker_fl_version") == 1


async def test_a_buffer_that_is_merged_by_the_clock_is_seen(ward):
    metrics = AggregatorMetrics()
    merging = MergingSettings(strategy="fedbuff", buffer_size=3, buffer_timeout_s=0.05)
    async with ward.running(observer=metrics, merging=merging), ward.party() as ann:
        await ann.send((await ann.frame()).frame)
        assert (await ann.receipt()).outcome == "buffered"
        await ward.until(lambda: counted(metrics, "broker_fl_version") == 1)
    assert counted(metrics, "broker_fl_updates_total", outcome="buffered") == 1


async def test_a_lost_broker_is_no_lead(ward):
    metrics = AggregatorMetrics()
    async with ward.running(observer=metrics):
        await ward.until(lambda: counted(metrics, "broker_fl_leading") == 1)
        ward.broker.stop()
        await ward.until(lambda: counted(metrics, "broker_fl_leading") == 0)
        ward.broker.start()
        await ward.until(lambda: counted(metrics, "broker_fl_leading") == 1)


async def test_a_commit_whose_session_was_lost_meanwhile_is_counted(ward):
    """The clock is asked for the time within the transaction. What comes again afterwards is a duplicate."""
    metrics, loop = AggregatorMetrics(), asyncio.get_running_loop()
    armed, stopped = threading.Event(), threading.Event()

    def stop():
        ward.broker.stop()
        stopped.set()

    def clock():
        if armed.is_set() and threading.current_thread().name.startswith("ledger"):
            armed.clear()
            loop.call_soon_threadsafe(stop)
            assert stopped.wait(10)
        return time.time()

    async with ward.running(observer=metrics, clock=clock, pace={"tick_s": 60.0}), ward.party() as ann:
        base = (await ann.frame()).frame
        await ward.until(lambda: ward.bench.frames()[-1].published_at is not None)
        armed.set()
        await ann.send(base)
        await ward.until(stopped.is_set)
        ward.broker.start()
        await ward.until(lambda: counted(metrics, "broker_fl_updates_total", outcome="duplicate") == 1)
    assert counted(metrics, "broker_fl_updates_total", outcome="merged") == len(ward.merged()) == 1


async def test_hostile_messages_make_no_series(ward):
    metrics = AggregatorMetrics()
    before = set(values_of(metrics.registry))
    codecs = [f"{kind}:{number}" for kind in ("topk", "x{", 'a="', "\n") for number in range(20)]
    times = itertools.cycle([True, -1, 2**62, "now", 1.5, "\0"])
    async with ward.running(observer=metrics), ward.party() as ann:
        base = (await ann.frame()).frame
        for codec, at in zip(codecs, times, strict=False):
            update = ward.bench.update("ann", base=base)
            message = ward.bench.message(update.model_copy(update={"codec": codec}))
            headers = {SENT_AT: at, "x-fl-codec": codec, "x-fl-party": codec}
            await ann.transport.publish(Message(message.exchange, message.body, message_id=message.message_id, headers=headers))
        for number in range(20):
            await ann.transport.publish(Message(ward.names.up("ann"), b"\xff" * number, message_id=f"no id {number}"))
        receipts = await ann.receipts(len(codecs))
        # Those without an id get none.
        await ward.until(lambda: counted(metrics, "broker_fl_updates_total", outcome="refused") == len(codecs) + 20)
    assert {receipt.reason for receipt in receipts} == {"codec"}
    made = set(values_of(metrics.registry)) - before
    assert made == {
        f'broker_fl_bytes_total{{codec="{codec}",direction="{way}"}}' for codec, way in (("other", "up"), ("float32", "down"))
    }
    assert counted(metrics, "broker_fl_queue_age_seconds_count") == 0


# When an update was sent


@pytest.mark.parametrize(
    ("sent_ms", "waited"),
    [
        (int(NOW * 1000) - 1500, 1.5),
        (int(NOW * 1000), 0.0),
        (int(NOW * 1000) + 60_000, 0.0),
        (int(NOW * 1000) + 60_001, None),
        (int(NOW * 1000) - 30 * 86_400_000, 30 * 86_400.0),
        (int(NOW * 1000) - 30 * 86_400_000 - 1, None),
        (0, None),
        (-(10**400), None),
        (10**400, None),
        (True, None),
        (NOW * 1000, None),
        (float("nan"), None),
        (str(int(NOW * 1000)), None),
    ],
)
def test_how_long_an_update_waited_is_its_partys_word_within_reason(sent_ms, waited):
    assert waited_s({SENT_AT: sent_ms}, now=NOW) == waited


def test_an_update_that_says_nothing_of_its_sending_has_no_wait():
    assert waited_s({}, now=NOW) is None


@given(st.one_of(st.integers(), st.floats(), st.text(), st.booleans()))
def test_whatever_is_said_of_the_sending_a_wait_is_within_its_bounds(said):
    waited = waited_s({SENT_AT: said}, now=NOW)
    assert waited is None or 0 <= waited <= 30 * 86_400
