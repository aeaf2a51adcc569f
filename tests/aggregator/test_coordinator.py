import uuid
from dataclasses import replace

import numpy as np
import pytest

from aggregator.admission import Refused, Sender
from aggregator.decisions import Arrival, Goal
from aggregator.spool import MAX_HALF_SENT
from broker_fl.codecs.chain import whole_model
from broker_fl.config import MergingSettings
from broker_fl.errors import ConfigurationError, ManifestMismatchError
from broker_fl.parameters import digest, fingerprint, manifest_of
from broker_fl.topology import Names
from schemas import wire
from schemas.frame import ModelFrame, TrainingPlan

FEDBUFF = MergingSettings(strategy="fedbuff", buffer_size=3)
FEDAVG = MergingSettings(strategy="fedavg", buffer_size=2)
HALF = MergingSettings(mixing_rate=0.5, staleness="constant")


def decide(bench, coordinator, *updates, user=None):
    return coordinator.decide([bench.arrival(update, user=user) for update in updates])


def outcomes(verdicts):
    return [verdict.receipt.outcome if verdict.receipt else None for verdict in verdicts]


def reasons(verdicts):
    return [verdict.refused.reason if verdict.refused else None for verdict in verdicts]


# The beginning


def test_first_opening_broadcasts_the_first_model_at_once(bench):
    with bench.coordinator() as coordinator:
        coordinator.open(bench.initial)
        assert coordinator.unpublished() is None
        coordinator.tick()
        row = coordinator.unpublished()
    announced, keyframe = (wire.decode(ModelFrame, body) for body in (row.body, row.keyframe))
    assert (announced.number, announced.version, announced.over, announced.payload) == (1, 0, False, b"")
    assert announced.digest == keyframe.digest == row.digest == digest(bench.initial)
    assert keyframe.payload == bench.initial.tobytes()


def test_start_that_was_killed_before_its_first_commit_is_made_again(bench):
    with bench.opened(every_versions=1) as coordinator:
        first = coordinator.model_digest()
    # As if the process had been killed between the first snapshot and the first transaction.
    bench.ledger_file.unlink()
    for log in bench.folder.glob("ledger.db-*"):
        log.unlink()
    with bench.opened() as coordinator:
        assert coordinator.model_digest() == first


def test_initial_model_is_taken_once_only(bench):
    with bench.opened() as coordinator:
        first = coordinator.model_digest()
    with bench.coordinator() as coordinator:
        coordinator.open(bench.initial + 1)
        assert coordinator.model_digest() == first


def test_ledger_of_another_federation_is_refused(bench):
    with bench.opened():
        pass
    bench.names = Names("clinic")
    with bench.coordinator() as coordinator, pytest.raises(ConfigurationError, match="federation 'ward', not 'clinic'"):
        coordinator.open(bench.initial)


def test_ledger_of_another_model_is_refused(bench):
    with bench.opened():
        pass
    bench.manifest = manifest_of({"other": np.zeros(5, np.float32)})
    with bench.coordinator() as coordinator, pytest.raises(ManifestMismatchError, match="holds another model"):
        coordinator.open(bench.initial)


# Merging once


def test_update_is_merged_with_its_weight_and_makes_a_version(bench):
    with bench.opened(merging=HALF) as coordinator:
        (base,) = bench.frames()
        (verdict,) = decide(bench, coordinator, bench.update(base=base, delta=2.0))
        assert coordinator.version == 1
        assert coordinator.model_digest() == digest(bench.initial + np.float32(1.0))
    assert verdict.receipt.outcome == "merged"
    assert (verdict.receipt.version, verdict.receipt.staleness, verdict.receipt.weight) == (1, 0, 0.5)
    assert coordinator.counts == {"merged": 1}


def test_late_update_counts_less(bench):
    with bench.opened(merging=MergingSettings(mixing_rate=0.5, exponent=1.0)) as coordinator:
        (base,) = bench.frames()
        verdicts = decide(bench, coordinator, *(bench.update(base=base, seed=seed) for seed in range(3)))
    assert [verdict.receipt.staleness for verdict in verdicts] == [0, 1, 2]
    assert [verdict.receipt.weight for verdict in verdicts] == [0.5, 0.25, pytest.approx(0.5 / 3)]


def test_duplicate_in_the_same_group_gets_the_same_receipt_and_changes_nothing(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        update = bench.update(base=base)
        first, second = decide(bench, coordinator, update, update)
        assert coordinator.version == 1
    assert first.receipt == second.receipt
    assert (first.is_duplicate, second.is_duplicate) == (False, True)
    assert len([entry for entry in bench.entries() if entry.kind == "update"]) == 1


def test_duplicate_gets_the_same_receipt_after_later_merges_and_after_a_restart(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        update = bench.update(base=base)
        (first,) = decide(bench, coordinator, update)
        decide(bench, coordinator, bench.update("bob", base=base, seed=1))
        model = coordinator.model_digest()
        (second,) = decide(bench, coordinator, update)
        assert coordinator.model_digest() == model
    with bench.opened() as coordinator:
        (third,) = decide(bench, coordinator, update)
        assert (coordinator.version, coordinator.model_digest()) == (2, model)
    assert first.receipt == second.receipt == third.receipt
    assert third.is_duplicate


def test_duplicate_with_another_content_is_still_a_duplicate(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        update = bench.update(base=base)
        (first,) = decide(bench, coordinator, update)
        model = coordinator.model_digest()
        (second,) = decide(bench, coordinator, bench.update(base=base, delta=9.0, update_id=update.update_id))
        assert coordinator.model_digest() == model
    assert second.receipt == first.receipt


def test_same_update_id_of_two_parties_is_two_updates(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        one = bench.update("ann", base=base)
        other = bench.update("bob", base=base, update_id=one.update_id)
        assert outcomes(decide(bench, coordinator, one, other)) == ["merged", "merged"]


class FailingClock:
    """Raises when it is asked for the time once more than it may be."""

    def __init__(self):
        self.calls_left = 1 << 30

    def __call__(self):
        if self.calls_left == 0:
            raise ZeroDivisionError
        self.calls_left -= 1
        return 1_000_000.0


def test_decision_and_frame_are_one_transaction(bench):
    with bench.opened():
        (base,) = bench.frames()
    arrival = bench.arrival(bench.update(base=base))
    interrupted = 0
    for calls in range(10):
        clock = FailingClock()
        with bench.coordinator(clock=clock) as coordinator:
            coordinator.open(bench.initial)
            clock.calls_left = calls
            try:
                coordinator.decide([arrival])
                break
            except ZeroDivisionError:
                interrupted += 1
        assert [row.version for row in bench.frames()] == [0]
        assert [entry.kind for entry in bench.entries()] == ["merging"]
    # Before the entry, before the frame, and while it was made.
    assert interrupted == 3
    assert [row.version for row in bench.frames()] == [0, 1]
    assert [entry.kind for entry in bench.entries()] == ["merging", "update"]


# Refusing


def test_refused_update_is_recorded_with_its_reason_and_without_its_payload(bench):
    with bench.opened(merging=MergingSettings(max_staleness=0)) as coordinator:
        (base,) = bench.frames()
        fresh, late = bench.update(base=base), bench.update("bob", base=base, seed=1)
        merged, refused = decide(bench, coordinator, fresh, late)
        assert coordinator.version == 1
    assert merged.receipt.outcome == "merged"
    assert (refused.receipt.outcome, refused.receipt.reason) == ("refused", "too_stale")
    assert (refused.receipt.version, refused.receipt.staleness, refused.receipt.weight) == (1, 1, 0.0)
    entry = bench.entries()[-1]
    assert (entry.party, entry.update_id, entry.outcome, entry.reason) == ("bob", late.update_id, "refused", "too_stale")
    assert entry.payload is None
    assert "1 versions late" in entry.detail


def test_refused_update_that_comes_again_is_a_duplicate_that_says_why(bench):
    # Whoever quarantines it may have been killed after the commit: the reason has to be there once more.
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        update = bench.update(base=base, base_digest="0" * 64)
        (first,) = decide(bench, coordinator, update)
    with bench.opened() as coordinator:
        (second,) = decide(bench, coordinator, update)
    assert second.is_duplicate
    assert first.receipt == second.receipt
    assert first.refused == second.refused


def test_message_of_nobody_is_refused_without_an_entry(bench):
    with bench.opened() as coordinator:
        before = len(bench.entries())
        (verdict,) = coordinator.decide([Arrival(None, Refused("identity", "came from nowhere"), 10)])
    assert verdict.receipt is None
    assert verdict.refused == Refused("identity", "came from nowhere")
    assert len(bench.entries()) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federation": "clinic"}, "federation"),
        ({"manifest_digest": "0" * 64}, "manifest"),
        ({"base_digest": "0" * 64}, "base"),
        ({"base_version": 5}, "base"),
        ({"codec": "float17"}, "codec"),
        ({"payload": b"short"}, "codec"),
        ({"delta": np.nan}, "non_finite"),
        ({"delta": np.inf}, "non_finite"),
        ({"delta": 1e30}, "bounds"),
    ],
)
def test_update_that_must_not_be_merged_is_refused_for_its_reason_and_changes_no_bit(bench, changes, reason):
    payload, codec = changes.pop("payload", None), changes.pop("codec", None)
    with bench.opened(max_update_norm=1e6) as coordinator:
        (base,) = bench.frames()
        update = bench.update(base=base, **changes)
        update = update.model_copy(
            update={key: value for key, value in {"payload": payload, "codec": codec}.items() if value is not None}
        )
        verdicts = coordinator.decide([bench.arrival(update, limits=bench.limits(max_update_norm=1e6))])
        assert coordinator.version == 0
        assert coordinator.model_digest() == digest(bench.initial)
    assert reasons(verdicts) == [reason]
    assert coordinator.counts == {"refused": 1}


# Frames


def test_frame_comes_after_so_many_versions(bench):
    with bench.opened(every_versions=3) as coordinator:
        for seed in range(7):
            base = bench.frames()[0]
            decide(bench, coordinator, bench.update(base=base, seed=seed))
            bench.publish(coordinator)
    assert [row.version for row in bench.frames()] == [0, 3, 6]


def test_frame_comes_after_so_much_time(bench):
    with bench.opened(every_versions=100, every_s=5.0) as coordinator:
        (base,) = bench.frames()
        decide(bench, coordinator, bench.update(base=base))
        bench.clock.now += 4.9
        coordinator.tick()
        assert len(bench.frames()) == 1
        bench.clock.now += 0.2
        coordinator.tick()
        assert [row.version for row in bench.frames()] == [0, 1]
        bench.publish(coordinator)
        bench.clock.now += 1000.0
        coordinator.tick()
    assert len(bench.frames()) == 2


def test_no_frame_is_made_while_one_waits_to_be_published(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        for seed in range(4):
            decide(bench, coordinator, bench.update(base=base, seed=seed))
        assert [row.version for row in bench.frames()] == [0, 1]
        bench.publish(coordinator)
        coordinator.tick()
    assert [row.version for row in bench.frames()] == [0, 1, 4]


def test_group_of_updates_has_one_frame(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        decide(bench, coordinator, *(bench.update(base=base, seed=seed) for seed in range(6)))
    assert [row.version for row in bench.frames()] == [0, 6]


def test_version_that_was_broadcast_to_a_share_of_the_parties_is_broadcast_again(bench):
    with bench.opened(fraction=0.1, every_s=1.0) as coordinator:
        bench.clock.now += 6.0
        coordinator.tick()
    assert [(row.number, row.version) for row in bench.frames()] == [(1, 0), (2, 0)]


@pytest.mark.parametrize("lossy", [{"down": "int4"}, {"keyframe": "int8", "keyframe_every_frames": 1}])
def test_frame_says_what_the_receivers_hold_when_its_codec_loses_bits(bench, lossy):
    with bench.opened(**lossy) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        bench.publish(coordinator)
        base = bench.frames()[-1]
        assert base.digest != base.model_digest
        assert base.model_digest == fingerprint(coordinator._state.model)
        assert outcomes(decide(bench, coordinator, bench.update("bob", base=base))) == ["merged"]


def test_frames_wait_in_order_and_none_is_left_out(bench):
    with bench.opened(goal=Goal(versions=9)) as coordinator:
        (base,) = bench.frames()
        decide(bench, coordinator, bench.update(base=base))
        # The federation ends, and its goal moves, while the broker is away.
        coordinator.finish()
        coordinator.close()
    with bench.coordinator(goal=Goal(versions=10)) as coordinator:
        coordinator.open(bench.initial)
        published = bench.publish(coordinator)
        assert coordinator.unpublished() is None
    assert [(row.number, row.over) for row in published] == [(2, False), (3, True), (4, False)]
    assert all(row.published_at for row in bench.frames())


@pytest.mark.parametrize("keyframe", ["float32", "int8", "float16"])
def test_receivers_hold_the_bits_that_the_ledger_calls_by_their_digest(bench, keyframe):
    follower = bench.follower()
    with bench.coordinator(down="topk:0.1+int4", keyframe=keyframe, keyframe_every_frames=3, fraction=0.5) as coordinator:
        coordinator.open(bench.initial)
        coordinator.tick()
        for seed in range(8):
            for row in bench.publish(coordinator):
                follower.take(row)
                assert follower.frame.digest == bench.frames()[-1].digest
            decide(bench, coordinator, bench.update(base=bench.frames()[-1], seed=seed))
            bench.clock.now += 4000.0 * (seed % 2)
            coordinator.tick()
    rows = bench.frames()
    assert [row.number for row in rows if row.keyframe_size] == [1, 4, 7]
    assert [row.base for row in rows] == [None, *range(1, len(rows))]


def test_repeated_version_has_an_empty_payload_and_the_digest_that_updates_name(bench):
    with bench.opened(fraction=0.1, every_s=1.0, keyframe="int8", keyframe_every_frames=1, down="int4") as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        bench.publish(coordinator)
        for _ in range(2):
            bench.clock.now += 6.0
            coordinator.tick()
            bench.publish(coordinator)
        first, second, third, fourth = bench.frames()
        assert second.digest == third.digest == fourth.digest != first.digest
        assert [bool(frame.payload) for frame in bench.bodies()] == [False, True, False, False]
        verdicts = decide(bench, coordinator, bench.update(base=second), bench.update("bob", base=fourth))
    assert outcomes(verdicts) == ["merged", "merged"]


def test_plan_that_changed_between_two_runs_comes_with_a_frame_of_its_own(bench):
    with bench.opened(training=TrainingPlan(epochs=1)) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        bench.publish(coordinator)
    for _ in range(2):
        with bench.opened(training=TrainingPlan(epochs=2)) as coordinator:
            coordinator.tick()
    plans = [frame.plan and frame.plan.training.epochs for frame in bench.bodies()]
    assert plans == [1, None, 2]
    assert [frame.version for frame in bench.bodies()] == [0, 1, 1]


def test_federation_that_is_over_has_no_frame_for_a_changed_plan(bench):
    for training in (TrainingPlan(epochs=1), TrainingPlan(epochs=2)):
        with bench.opened(goal=Goal(versions=1), training=training) as coordinator:
            coordinator.finish()
            coordinator.tick()
    assert [row.over for row in bench.frames()] == [False, True]


def test_newest_frame_stands_alone_with_an_exact_keyframe_that_is_kept(bench):
    with bench.opened(down="int4", keyframe="int8", keyframe_every_frames=4) as coordinator:
        follower = bench.follower()
        follower.take(coordinator.standing_alone())
        assert follower.frame.number == 1
        for seed in range(2):
            decide(bench, coordinator, bench.update(base=bench.frames()[-1], seed=seed))
            for row in bench.publish(coordinator):
                follower.take(row)
        alone = coordinator.standing_alone()
        # Nothing is made twice.
        assert coordinator.standing_alone() == alone
    keyframe = follower.take_keyframe(alone.keyframe)
    assert (alone.number, alone.keyframe_codec) == (3, "float32")
    assert whole_model(keyframe, manifest=bench.manifest).tobytes() == follower.model.tobytes()
    with bench.opened(down="int4", keyframe="int8", keyframe_every_frames=4) as coordinator:
        assert coordinator.standing_alone() == alone
        for seed in range(4):
            decide(bench, coordinator, bench.update(base=bench.frames()[-1], seed=seed))
            bench.publish(coordinator)
    frames = bench.bodies()
    assert [frame.keyframe.number for frame in frames] == [1, 1, 1, 3, 3, 3, 7]
    with bench.ledger() as ledger:
        number, _ = ledger.newest_keyframe()
    assert number == 7


def test_plan_that_only_an_announcement_said_is_taken_back_by_the_next_frame(bench):
    first, other = TrainingPlan(epochs=1), TrainingPlan(epochs=2)
    with bench.opened(training=first) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        bench.publish(coordinator)
    with bench.coordinator(training=other) as coordinator:
        coordinator.open(bench.initial)
        announced = wire.decode(ModelFrame, coordinator.standing_alone().keyframe)
        assert announced.plan.training == other
        # Killed before its next frame; and the operator goes back to the settings before.
    with bench.coordinator(training=first) as coordinator:
        coordinator.open(bench.initial)
        coordinator.tick()
        (row,) = bench.publish(coordinator)
        assert wire.decode(ModelFrame, row.body).plan.training == first
        coordinator.tick()
        assert coordinator.unpublished() is None


def test_nothing_stands_alone_before_the_first_frame(bench):
    with bench.coordinator() as coordinator:
        coordinator.open(bench.initial)
        assert coordinator.standing_alone() is None


def test_log_bytes_are_what_the_bodies_cost(bench):
    with bench.opened(down="topk:0.1+int8", keyframe_every_frames=2, fraction=0.5) as coordinator:
        for seed in range(5):
            decide(bench, coordinator, bench.update(base=bench.frames()[-1], seed=seed))
            bench.publish(coordinator)
            bench.clock.now += 4000.0
            coordinator.tick()
            bench.publish(coordinator)
    with bench.ledger() as ledger:
        sizes = [len(body) for _, body in ledger.bodies_after(0)]
    rows, frames = bench.frames(), bench.bodies()
    assert [row.size for row in rows] == sizes
    for number in range(1, len(rows)):
        assert rows[number].log_bytes == sum(sizes[1 : number + 1])
        assert frames[number].log_bytes == sum(sizes[1:number]) + len(frames[number].payload)
    places = {frame.number: frame.log_bytes for frame in frames}
    assert all(frame.keyframe.log_bytes == places[frame.keyframe.number] for frame in frames)


# Receipts


def test_receipt_says_the_codec_and_the_bytes_of_its_update(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        updates = [bench.update(base=base, codec="topk:0.1+int4"), bench.update("bob", base=base, base_digest="0" * 64)]
        merged, refused = decide(bench, coordinator, *updates)
        parts = bench.arrivals(bench.update("cem", base=base), part_bytes=1024, limit_bytes=1024)
        whole = coordinator.decide(parts)[-1]
        again = coordinator.decide(parts)[-1]
        (unread,) = coordinator.decide([Arrival(Sender("ann", "5" * 32), Refused("malformed", "no map"), 7)])
    assert (merged.receipt.codec, merged.receipt.bytes) == ("topk:0.1+int4", len(wire.encode(updates[0])))
    assert (refused.receipt.codec, refused.receipt.bytes) == ("float32", len(wire.encode(updates[1])))
    assert whole.receipt.bytes == whole.size > 8000
    assert again.receipt == whole.receipt
    assert (unread.receipt.codec, unread.receipt.bytes) == ("", 7)


# Buffers


def test_buffer_is_merged_when_it_is_full(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        (base,) = bench.frames()
        verdicts = decide(bench, coordinator, *(bench.update(base=base, delta=delta) for delta in (1.0, 2.0, 6.0)))
        assert coordinator.version == 1
        assert coordinator.model_digest() == digest(bench.initial + np.float32(9.0) * np.float32(1 / 3))
    assert outcomes(verdicts) == ["buffered", "buffered", "merged"]
    assert [verdict.receipt.version for verdict in verdicts] == [0, 0, 1]


def test_buffer_is_merged_as_it_is_after_its_timeout(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        (base,) = bench.frames()
        decide(bench, coordinator, bench.update(base=base, delta=1.0))
        bench.clock.now += 40.0
        decide(bench, coordinator, bench.update(base=base, delta=3.0))
        coordinator.tick()
        assert coordinator.version == 0
        bench.clock.now += 20.0
        coordinator.tick()
        assert coordinator.version == 1
        assert coordinator.model_digest() == digest(bench.initial + np.float32(2.0))
        coordinator.tick()
        assert coordinator.version == 1
    assert [entry.kind for entry in bench.entries()] == ["merging", "update", "update", "flush"]
    assert [row.version for row in bench.frames()] == [0, 1]


def test_buffer_survives_a_crash(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        (base,) = bench.frames()
        decide(bench, coordinator, bench.update(base=base, delta=1.0), bench.update("bob", base=base, delta=2.0))
    with bench.opened(merging=FEDBUFF) as coordinator:
        assert outcomes(decide(bench, coordinator, bench.update(base=base, delta=6.0))) == ["merged"]
        assert coordinator.model_digest() == digest(bench.initial + np.float32(9.0) * np.float32(1 / 3))


def test_timeout_of_a_buffer_counts_again_after_a_restart(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
    bench.clock.now += 1000.0
    with bench.opened(merging=FEDBUFF) as coordinator:
        assert coordinator.version == 0
        bench.clock.now += 61.0
        coordinator.tick()
        assert coordinator.version == 1


def test_fedavg_weighs_by_samples_and_takes_a_party_once_for_each_version(bench):
    with bench.opened(merging=FEDAVG) as coordinator:
        (base,) = bench.frames()
        verdicts = decide(
            bench,
            coordinator,
            bench.update("ann", base=base, delta=1.0, num_samples=30),
            bench.update("ann", base=base, delta=5.0, num_samples=30),
            bench.update("bob", base=base, delta=5.0, num_samples=10),
            bench.update("cem", base=base, delta=5.0, num_samples=10),
        )
        assert coordinator.version == 1
        assert coordinator.model_digest() == digest(bench.initial + np.float32(2.0))
    assert outcomes(verdicts) == ["buffered", "refused", "merged", "refused"]
    assert reasons(verdicts) == [None, "repeated", None, "too_stale"]


# Strategies that change


def test_buffer_of_the_old_strategy_is_merged_by_it_when_the_strategy_changes(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        (base,) = bench.frames()
        decide(bench, coordinator, bench.update(base=base, delta=1.0), bench.update("bob", base=base, delta=3.0))
    with bench.opened(merging=HALF) as coordinator:
        assert coordinator.version == 1
        assert coordinator.model_digest() == digest(bench.initial + np.float32(2.0))
        assert outcomes(decide(bench, coordinator, bench.update(base=base, delta=2.0))) == ["merged"]
        assert coordinator.model_digest() == digest(bench.initial + np.float32(2.0) + np.float32(1.0))
    assert [entry.kind for entry in bench.entries()] == ["merging", "update", "update", "flush", "merging", "update"]


def test_settings_that_stay_are_not_written_again(bench):
    for _ in range(3):
        with bench.opened(merging=FEDBUFF):
            pass
    assert [entry.kind for entry in bench.entries()] == ["merging"]


def test_change_to_mixing_takes_updates_from_the_newest_frame_on(bench):
    mixing = MergingSettings(mode="mixing", mixing_rate=0.5, staleness="constant")
    with bench.opened(merging=HALF, every_versions=2) as coordinator:
        (old,) = bench.frames()
        decide(bench, coordinator, bench.update(base=old), bench.update("bob", base=old))
        bench.publish(coordinator)
    new = bench.frames()[-1]
    assert new.version == 2
    with bench.opened(merging=mixing, every_versions=2) as coordinator:
        verdicts = decide(bench, coordinator, bench.update(base=old, seed=3), bench.update("bob", base=new, seed=4))
    assert reasons(verdicts) == ["base", None]
    assert "before mixing began" in verdicts[0].receipt.detail


# The end


def test_goal_reached_in_the_middle_of_a_group_leaves_the_rest_undecided(bench):
    with bench.opened(goal=Goal(versions=2)) as coordinator:
        (base,) = bench.frames()
        updates = [bench.update(base=base, seed=seed) for seed in range(5)]
        assert len(decide(bench, coordinator, *updates)) == 2
        assert coordinator.goal_reached()
        assert decide(bench, coordinator, *updates[2:]) == []
        coordinator.finish()
        assert coordinator.is_over
        assert [row.over for row in bench.publish(coordinator)] == [False, True]
    assert len(bench.entries()) == 3


def test_nothing_is_merged_after_the_last_frame(bench):
    # It would make a model that nobody is ever sent.
    with bench.opened(goal=Goal(target_accuracy=0.9)) as coordinator:
        (base,) = bench.frames()
        decide(bench, coordinator, bench.update(base=base))
        coordinator.finish()
        assert decide(bench, coordinator, bench.update("bob", base=base)) == []
        assert coordinator.version == 1
        model = fingerprint(coordinator._state.model)
    assert bench.frames()[-1].model_digest == bench.entries()[-1].model_digest == model


def test_finish_merges_the_buffer_and_comes_once(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0], delta=1.0))
        coordinator.finish()
        coordinator.finish()
        coordinator.tick()
        assert coordinator.version == 1
    assert [(row.version, row.over) for row in bench.frames()] == [(0, False), (1, True)]


def test_federation_that_is_over_stays_over(bench):
    goal = Goal(versions=1)
    with bench.opened(goal=goal) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        coordinator.finish()
        coordinator.close()
    with bench.opened(goal=goal) as coordinator:
        assert coordinator.is_over
        assert coordinator.standing_alone().over
    assert [row.over for row in bench.frames()] == [False, False, True]


def test_federation_whose_goal_moved_goes_on_with_the_same_model(bench):
    with bench.opened(goal=Goal(versions=1)) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        coordinator.finish()
        coordinator.close()
        model = fingerprint(coordinator._state.model)
    with bench.opened(goal=Goal(versions=2)) as coordinator:
        assert not coordinator.is_over
        newest = bench.frames()[-1]
        assert (newest.version, newest.over, newest.model_digest) == (1, False, model)
        assert outcomes(decide(bench, coordinator, bench.update(base=bench.frames()[-1]))) == ["merged"]
        assert coordinator.goal_reached()


def test_goal_that_moved_to_where_the_model_is_already_does_not_reopen(bench):
    with bench.opened(goal=Goal(versions=2)) as coordinator:
        base = bench.frames()[0]
        decide(bench, coordinator, bench.update(base=base), bench.update("bob", base=base))
        coordinator.finish()
    with bench.opened(goal=Goal(versions=1)) as coordinator:
        assert coordinator.is_over


# Parts


@pytest.fixture
def parted(bench):
    """An update in 9 parts, and its parts."""

    def make(party="ann", *, update_id=None, seed=0):
        base = bench.frames()[0]
        update = bench.update(party, base=base, seed=seed, update_id=update_id)
        return update, bench.arrivals(update, part_bytes=1024, limit_bytes=1024)

    return make


def test_update_in_parts_is_decided_with_its_last_part(bench, parted):
    with bench.opened() as coordinator:
        update, parts = parted()
        *first, last = coordinator.decide(parts)
        assert len(first) > 5
        assert outcomes(first) == [None] * len(first)
        assert last.receipt.outcome == "merged"
        assert last.size > 8000
    assert [entry.payload for entry in bench.entries()[1:]] == [update.payload]


def test_parts_may_come_in_any_order_and_twice(bench, parted):
    with bench.opened() as coordinator:
        _, parts = parted()
        verdicts = coordinator.decide([*reversed(parts[1:]), *parts[2:4], parts[0], parts[5]])
        assert coordinator.version == 1
    assert [verdict.is_duplicate for verdict in verdicts][-1]
    assert outcomes(verdicts[-2:]) == ["merged", "merged"]


def test_parts_are_put_together_over_a_restart(bench, parted):
    with bench.opened() as coordinator:
        _, parts = parted()
        coordinator.decide(parts[:4])
    with bench.opened() as coordinator:
        verdicts = coordinator.decide(parts[4:])
    assert outcomes(verdicts)[-1] == "merged"


def test_half_sent_updates_of_a_party_are_bounded(bench, parted):
    with bench.opened() as coordinator:
        for _ in range(MAX_HALF_SENT):
            assert outcomes(coordinator.decide(parted()[1][:2])) == [None, None]
        one_too_many = parted()[1]
        verdicts = coordinator.decide(one_too_many[:1])
        assert reasons(verdicts) == ["parts"]
        assert "half-sent" in verdicts[0].receipt.detail
        assert outcomes(coordinator.decide(parted("bob")[1]))[-1] == "merged"


def test_half_sent_update_that_is_refused_makes_no_room_for_more(bench, parted):
    with bench.opened() as coordinator:
        for _ in range(MAX_HALF_SENT):
            coordinator.decide(parted()[1][:2])
        for _ in range(3):
            assert reasons(coordinator.decide(parted()[1][:1])) == ["parts"]
    with bench.ledger() as ledger, ledger.transaction():
        assert len(ledger.half_sent("ann")) == MAX_HALF_SENT


def _lie(arrival, **changes):
    content = arrival.content
    return replace(arrival, content=replace(content, place=replace(content.place, **changes)))


def test_parts_that_give_another_body_than_they_promise_are_refused_and_gone(bench, parted):
    with bench.opened() as coordinator:
        _, parts = parted()
        verdicts = coordinator.decide([_lie(part, sha256="0" * 64) for part in parts])
        assert reasons(verdicts)[-1] == "parts"
        assert coordinator.version == 0
    with bench.ledger() as ledger, ledger.transaction():
        assert ledger.half_sent("ann") == {}


def test_parts_that_promise_more_than_may_be_are_refused_at_the_first(bench, parted):
    with bench.opened() as coordinator:
        _, parts = parted()
        assert reasons(coordinator.decide([_lie(parts[0], size=1 << 40)])) == ["bounds"]


def test_parts_that_hold_more_than_they_promise_are_refused(bench, parted):
    with bench.opened() as coordinator:
        _, parts = parted()
        verdicts = coordinator.decide([_lie(part, size=1500, parts=2) for part in parts[:2]])
    assert reasons(verdicts) == [None, "parts"]


def test_parts_so_small_that_they_only_make_work_are_refused(bench, parted):
    # Each part is a row and a transaction: nobody may send a megabyte in a million of them.
    with bench.opened() as coordinator:
        _, parts = parted()
        assert reasons(coordinator.decide([_lie(parts[0], parts=parts[0].content.place.size)])) == ["parts"]


def test_part_of_an_update_that_was_decided_is_a_duplicate_and_stays_nowhere(bench, parted):
    with bench.opened() as coordinator:
        _, parts = parted()
        coordinator.decide(parts)
        verdicts = coordinator.decide(parts[:3])
    assert [verdict.is_duplicate for verdict in verdicts] == [True] * 3
    with bench.ledger() as ledger, ledger.transaction():
        assert ledger.half_sent("ann") == {}


def test_refused_parts_are_refused_by_the_same_checks_as_a_whole_update(bench, parted):
    with bench.opened() as coordinator:
        update = bench.update(base=bench.frames()[0], delta=np.nan, update_id=uuid.uuid4().hex)
        verdicts = coordinator.decide(bench.arrivals(update, part_bytes=1024, limit_bytes=1024))
    assert reasons(verdicts)[-1] == "non_finite"


def test_half_sent_update_is_forgotten_when_no_part_came_for_long(bench, parted):
    with bench.opened(parts_expire_s=600.0) as coordinator:
        _, old = parted()
        coordinator.decide(old[:3])
        bench.clock.now += 400.0
        _, young = parted("bob")
        coordinator.decide(young[:3])
        bench.clock.now += 250.0
        coordinator.tick()
    with bench.ledger() as ledger, ledger.transaction():
        assert ledger.half_sent("ann") == {}
        assert len(ledger.half_sent("bob")) == 1
    with bench.opened() as coordinator:
        assert outcomes(coordinator.decide(old))[-1] == "merged"


# Snapshots


def test_snapshot_comes_after_so_many_versions_and_at_the_end(bench):
    with bench.opened(snapshot_every_versions=2) as coordinator:
        (base,) = bench.frames()
        for seed in range(5):
            decide(bench, coordinator, bench.update(base=base, seed=seed))
        coordinator.close()
    with bench.ledger() as ledger:
        assert [row.version for row in ledger.snapshots()] == [0, 2, 4, 5]


def test_snapshot_that_the_ledger_names_is_never_written_over(bench):
    # Its bytes differ each time: a crash between the file and the ledger would leave one that does not fit to the other.
    with bench.opened(merging=FEDBUFF) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        coordinator.close()
    files = {file: file.stat().st_mtime_ns for file in (bench.folder / "snapshots").iterdir()}
    for _ in range(2):
        with bench.opened(merging=FEDBUFF) as coordinator:
            coordinator.close()
    assert {file: file.stat().st_mtime_ns for file in (bench.folder / "snapshots").iterdir()} == files


def test_snapshot_that_an_earlier_leader_did_not_live_to_name_is_removed(bench):
    with bench.opened(snapshot_every_versions=1) as coordinator:
        decide(bench, coordinator, bench.update(base=bench.frames()[0]))
        named = {file.name for file in (bench.folder / "snapshots").iterdir()}
        coordinator._write_snapshot(seq=9)
        (unnamed,) = (file.name for file in (bench.folder / "snapshots").iterdir() if file.name not in named)
        (bench.folder / "snapshots" / f"{unnamed.replace('s00000009', 's00000010')}.part").write_bytes(b"half of one")
        others = bench.folder / "snapshots" / "model-00000000-v00000009-s00000009-e0001.safetensors"
        others.write_bytes(b"of another ledger")
    with bench.opened():
        pass
    assert {file.name for file in (bench.folder / "snapshots").iterdir()} == {*named, others.name}


@pytest.mark.parametrize(
    "name",
    [
        "{stem}.safetensors.bak",
        "{stem} (copy).safetensors",
        "model-{ledger}-best.safetensors",
        "best.safetensors",
    ],
)
def test_copy_that_somebody_put_beside_the_snapshots_is_left_alone(bench, name):
    with bench.opened():
        pass
    snapshot = bench.snapshot(0)
    copy = snapshot.with_name(name.format(stem=snapshot.stem, ledger=snapshot.stem.split("-")[1]))
    copy.write_bytes(snapshot.read_bytes())
    with bench.opened():
        pass
    assert copy.exists()


def test_clock_that_is_set_back_does_not_make_a_buffer_wait_for_the_old_time(bench):
    merging = MergingSettings(strategy="fedbuff", buffer_size=3, buffer_timeout_s=60.0)
    with bench.opened(merging=merging) as coordinator:
        (base,) = bench.frames()
        coordinator.decide([bench.arrival(bench.update(base=base))])
        coordinator.tick()
        assert coordinator.version == 0
        bench.clock.now -= 7 * 24 * 3600
        coordinator.tick()
        assert coordinator.version == 1


def test_clock_that_is_set_back_lets_half_sent_updates_expire(bench):
    with bench.opened(parts_expire_s=60.0) as coordinator:
        (base,) = bench.frames()
        first, *_ = bench.arrivals(bench.update(base=base), part_bytes=1024, limit_bytes=0)
        coordinator.decide([first])
        bench.clock.now -= 7 * 24 * 3600
        coordinator.tick()
        with bench.ledger() as ledger:
            assert ledger.parts_of("ann") == 0
