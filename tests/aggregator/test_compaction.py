from contextlib import ExitStack

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from aggregator.compaction import compact
from aggregator.history import model_of, roll_back
from aggregator.records import SNAPSHOTS
from aggregator.recovery import recover
from aggregator.snapshots import Snapshots
from aggregator.verification import verify
from broker_fl.config import MergingSettings
from broker_fl.errors import DamagedError, FencedError
from broker_fl.parameters import digest

DELTA = MergingSettings(max_staleness=100)
MIXING = MergingSettings(mode="mixing", mixing_rate=0.5, max_staleness=100)
FEDBUFF = MergingSettings(strategy="fedbuff", buffer_size=2, max_staleness=100)
MERGING = {"delta": DELTA, "mixing": MIXING, "fedbuff": FEDBUFF}


def _compact(bench, keep):
    with bench.ledger() as ledger:
        return compact(ledger, bench.snapshots(), keep=keep)


def _back(bench, to):
    with bench.ledger() as ledger:
        return roll_back(ledger, bench.snapshots(), to=to, holder="an operator", at=bench.clock.now)


def _verify(bench):
    with bench.ledger() as ledger:
        return verify(ledger, bench.snapshots())


def _send(bench, coordinator, seed, *, party="ann", base=None, **changes):
    update = bench.update(party, base=base or bench.frames()[-1], seed=seed, **changes)
    (verdict,) = coordinator.decide([bench.arrival(update)])
    return verdict.receipt


def _ten_versions(bench, **rules):
    with bench.opened(**{"merging": DELTA, "snapshot_every_versions": 3, **rules}) as coordinator:
        for seed in range(10):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        return coordinator.model_digest()


def _payloads(bench):
    """The entries that have one, settings left out."""
    return [entry.seq for entry in bench.entries() if entry.kind == "update" and entry.payload is not None]


def _bodies(bench):
    with bench.ledger() as ledger:
        return [number for number, _ in ledger.bodies_after(0)]


def _snapshots(bench):
    """Those that the ledger names; the folder has no others."""
    with bench.ledger() as ledger:
        rows = ledger.snapshots()
    assert sorted(file.name for file in (bench.folder / "snapshots").iterdir()) == sorted(row.file for row in rows)
    return [row.version for row in rows]


def _facts_and_chain(bench):
    return [(entry.seq, entry.payload_digest, entry.chain) for entry in bench.entries()]


@pytest.mark.parametrize("keep", [0, 1, 2, 4, 7, 9, 10, 1000])
def test_payloads_of_so_many_entries_are_kept_and_what_is_needed_to_make_older_versions_is_dropped(bench, keep):
    """Snapshots are of versions 0, 3, 6 and 9; version v is entry v + 1, since the first entry says the settings."""
    version = dropped = max(0, 10 - keep)
    live = _ten_versions(bench)
    before, files = _facts_and_chain(bench), _snapshots(bench)
    done = _compact(bench, keep)
    assert (done.replays_from, done.payloads, done.room_is_back) == (version, dropped, True)
    assert done.payload_bytes == sum(len(bench.update(base=bench.frames()[0]).payload) for _ in range(dropped))
    assert _payloads(bench) == list(range(version + 2, 12))
    assert len(_payloads(bench)) == min(keep, 10)
    assert _snapshots(bench) == sorted({version} | {kept for kept in files if kept > version})
    assert done.snapshots == len([older for older in files if older < version])
    # Frame number v + 1 is of version v. Where the chain of changes begins, what it made is kept in place of its body. The
    # newest one stays, since it may have to be announced again.
    assert _bodies(bench) == (list(range(min(version + 2, 11), 12)) if version else list(range(1, 12)))
    assert _facts_and_chain(bench) == before
    found = _verify(bench)
    assert (found.replayed_from, found.version, found.model_digest) == (version, 10, live)
    assert (found.entries, found.merged, found.frames) == (11, 10, 11)
    assert found.chain == before[-1][2]


def test_file_is_smaller_afterwards(bench):
    _ten_versions(bench)
    before = bench.ledger_file.stat().st_size
    _compact(bench, 0)
    assert bench.ledger_file.stat().st_size < before


def test_damaged_snapshot_at_the_horizon_drops_nothing(bench):
    _ten_versions(bench)
    with bench.ledger() as ledger:
        horizon = bench.folder / "snapshots" / ledger.snapshots()[-1].file
    whole = horizon.read_bytes()
    horizon.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    payloads, bodies, snapshots = _payloads(bench), _bodies(bench), _snapshots(bench)
    with pytest.raises(DamagedError, match="is damaged"):
        _compact(bench, 1)
    assert (_payloads(bench), _bodies(bench), _snapshots(bench)) == (payloads, bodies, snapshots)
    horizon.write_bytes(whole)
    assert _verify(bench).replayed_from == 0


def test_damaged_frame_that_the_new_start_is_made_of_drops_nothing(bench):
    _ten_versions(bench)
    with bench.ledger() as ledger, ledger.transaction():
        start = ledger.start(1)
        ledger.drop_bodies(upto=3, start=start)
    payloads, bodies, snapshots = _payloads(bench), _bodies(bench), _snapshots(bench)
    with pytest.raises(DamagedError, match="frame"):
        _compact(bench, 1)
    assert (_payloads(bench), _bodies(bench), _snapshots(bench)) == (payloads, bodies, snapshots)


def test_versions_from_the_horizon_on_are_made_again_to_the_same_bits(bench):
    _ten_versions(bench)
    with bench.ledger() as ledger:
        before = [digest(model_of(ledger, bench.snapshots(), version=version).model) for version in range(11)]
    assert _compact(bench, 7).replays_from == 3
    with bench.ledger() as ledger:
        after = [digest(model_of(ledger, bench.snapshots(), version=version).model) for version in range(3, 11)]
    assert after == before[3:]


def test_compaction_twice_in_a_row_drops_nothing_more_and_later_again_what_became_old(bench):
    _ten_versions(bench)
    _compact(bench, 4)
    again = _compact(bench, 4)
    assert (again.payloads, again.frames, again.snapshots, again.replays_from) == (0, 0, 0, 6)
    with bench.opened(merging=DELTA, snapshot_every_versions=3) as coordinator:
        for seed in range(10, 20):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        live = coordinator.model_digest()
    # Those at versions 6, 9, 12 and 15 make room for one at 16.
    later = _compact(bench, 4)
    assert (later.payloads, later.frames, later.snapshots, later.replays_from) == (10, 10, 4, 16)
    found = _verify(bench)
    assert (found.model_digest, found.replayed_from, found.entries) == (live, 16, 21)


@pytest.mark.parametrize("down", ["float32", "topk:0.02+int8"])
@pytest.mark.parametrize("keyframe", ["float32", "int8"])
@pytest.mark.parametrize("merging", sorted(MERGING))
def test_aggregator_that_was_stopped_goes_on_after_all_was_compacted(bench, merging, keyframe, down):
    """Its newest frame has no body any more, and a newcomer asks for a keyframe of it."""
    rules = {"merging": MERGING[merging], "keyframe": keyframe, "down": down}
    with bench.opened(**rules) as coordinator:
        for seed in range(5):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        coordinator.close()
        live = coordinator.model_digest()
    assert _compact(bench, 0).replays_from == coordinator.version
    assert _payloads(bench) == []
    with bench.opened(**rules) as coordinator:
        assert coordinator.model_digest() == live
        follower = bench.follower()
        newest = coordinator.standing_alone()
        follower.take_keyframe(newest.keyframe)
        follower.take_body(newest.keyframe)
        for seed in range(5, 9):
            assert _send(bench, coordinator, seed).outcome in ("merged", "buffered")
            for row in bench.publish(coordinator):
                follower.take(row)
        live = coordinator.model_digest()
        assert digest(follower.model) == bench.frames()[-1].digest
    with bench.opened(**rules) as coordinator:
        assert coordinator.model_digest() == live
    assert _verify(bench).model_digest == live


@pytest.mark.parametrize("merging", sorted(MERGING))
def test_aggregator_at_work_is_not_disturbed(bench, merging):
    rules = {"merging": MERGING[merging], "snapshot_every_versions": 2, "down": "topk:0.1+int8", "keyframe": "int8"}
    with bench.opened(**rules, keyframe_every_frames=3) as coordinator:
        base = bench.frames()[0]
        for seed in range(12):
            _send(bench, coordinator, seed, base=None if seed % 3 else base)
            bench.publish(coordinator)
            if seed % 4 == 3:
                assert _compact(bench, 3).room_is_back
                assert _verify(bench).model_digest == coordinator.model_digest()
                base = bench.frames()[-1]
        live = coordinator.model_digest()
        coordinator.close()
    assert len(_payloads(bench)) >= 3
    with bench.opened(**rules) as coordinator:
        assert coordinator.model_digest() == live


def test_compaction_while_a_frame_waits_to_be_published_leaves_what_can_be_verified(bench):
    with bench.opened(merging=DELTA, snapshot_every_versions=5) as coordinator:
        for seed in range(3):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        base = bench.frames()[-1]
        for seed in range(3, 5):
            _send(bench, coordinator, seed, base=base)
        waiting = bench.frames()[-1]
        assert (waiting.version, waiting.published_at, coordinator.version) == (4, None, 5)
        assert _compact(bench, 0).replays_from == 5
        assert bench.publish(coordinator)[0].number == waiting.number
        _send(bench, coordinator, 5)
        bench.publish(coordinator)
        live = coordinator.model_digest()
    assert _verify(bench).model_digest == live


def test_compaction_while_an_older_frame_and_a_rollback_wait_to_be_published_leaves_what_can_be_verified(bench):
    with bench.opened(merging=DELTA) as coordinator:
        for seed in range(3):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        _send(bench, coordinator, 3)
        assert bench.frames()[-1].published_at is None
    _back(bench, 1)
    with bench.coordinator(merging=DELTA) as coordinator:
        coordinator.open(bench.initial)
        assert _compact(bench, 0).replays_from == 5
        _verify(bench)
        assert [row.base for row in bench.publish(coordinator)] == [4, None]
        _send(bench, coordinator, 4)
        bench.publish(coordinator)
        live = coordinator.model_digest()
    assert _verify(bench).model_digest == live


def test_update_that_comes_again_after_its_payload_was_dropped_is_still_known(bench):
    with bench.opened(merging=DELTA) as coordinator:
        base = bench.frames()[0]
        update = bench.update(base=base)
        (first,) = coordinator.decide([bench.arrival(update)])
        bench.publish(coordinator)
        coordinator.close()
    assert _compact(bench, 0).payloads == 1
    with bench.opened(merging=DELTA) as coordinator:
        (again,) = coordinator.decide([bench.arrival(update)])
        assert (again.is_duplicate, again.receipt, coordinator.version) == (True, first.receipt, 1)
    assert len(bench.entries()) == 2


@pytest.mark.parametrize("more", [0, 1, 4])
@pytest.mark.parametrize("keyframe", ["float32", "int8"])
def test_horizon_at_a_rollback_leaves_what_goes_on(bench, keyframe, more):
    """The chain of changes begins anew at the frame of a rollback, which is no change of the one before it."""
    rules = {"merging": DELTA, "keyframe": keyframe}
    _ten_versions(bench, **rules)
    _back(bench, 4)
    with bench.opened(**rules) as coordinator:
        for seed in range(20, 20 + more):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        live = coordinator.model_digest()
    assert _compact(bench, more).replays_from == 11
    assert _verify(bench).model_digest == live
    with bench.opened(**rules) as coordinator:
        _send(bench, coordinator, 30)
        bench.publish(coordinator)
        live = coordinator.model_digest()
        coordinator.close()
    assert _verify(bench).model_digest == live
    _compact(bench, 0)
    assert _verify(bench).model_digest == live


def test_rollback_to_a_version_older_than_the_horizon_is_replayed_from_what_was_kept_of_it(bench):
    _ten_versions(bench)
    with bench.ledger() as ledger:
        target = digest(model_of(ledger, bench.snapshots(), version=1).model)
    _back(bench, 1)
    with bench.opened(merging=DELTA, snapshot_every_versions=1000) as coordinator:
        for seed in range(20, 24):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        live = coordinator.model_digest()
    # The newest five entries are the rollback and what came after it.
    assert _compact(bench, 5).replays_from == 10
    assert _verify(bench).model_digest == live
    with bench.ledger() as ledger:
        assert digest(model_of(ledger, bench.snapshots(), version=11).model) == target
        assert digest(recover(ledger, bench.snapshots(), bench.manifest).state.model) == live


def test_lost_snapshot_of_a_rollback_is_named_where_its_target_was_compacted_away(bench):
    _ten_versions(bench)
    _back(bench, 1)
    assert _compact(bench, 1).replays_from == 10
    with bench.ledger() as ledger:
        (bench.folder / "snapshots" / ledger.snapshots()[-1].file).unlink()
    with pytest.raises(DamagedError, match="is missing"):
        _verify(bench)


def test_mixing_goes_on_where_the_snapshot_at_the_horizon_is_older_than_the_frame_of_its_version(bench):
    """As after a stop between two frames: the version is broadcast by the clock, at the next start."""
    rules = {"merging": MIXING, "every_versions": 3}
    with bench.opened(**rules) as coordinator:
        for seed in range(4):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        assert (bench.frames()[-1].version, coordinator.version) == (3, 4)
        coordinator.close()
    bench.clock.now += 10_000.0
    with bench.opened(**rules) as coordinator:
        assert bench.frames()[-1].version == 4
        assert _compact(bench, 0).replays_from == 4
        live = coordinator.model_digest()
    assert _verify(bench).model_digest == live
    with bench.opened(**rules) as coordinator:
        assert _send(bench, coordinator, 9).outcome == "merged"


class Interrupted(Snapshots):
    """When compaction has written its snapshot and seen that it is whole, and the ledger does not name it yet."""

    then = None
    is_written = False

    def write(self, *arguments, **facts):
        self.is_written = True
        return super().write(*arguments, **facts)

    def read(self, stored):
        state = super().read(stored)
        if self.is_written:
            self.then()
        return state


def test_aggregator_that_starts_during_a_compaction_does_not_sweep_its_snapshot_away(bench):
    live = _ten_versions(bench)
    with bench.coordinator(merging=DELTA) as coordinator, bench.ledger() as ledger:
        snapshots = Interrupted(str(bench.folder / "snapshots"), bench.manifest)
        snapshots.then = lambda: coordinator.open(bench.initial)
        with pytest.raises(FencedError, match="changed hands meanwhile, and nothing was dropped: run it again"):
            compact(ledger, snapshots, keep=2)
        assert len(_payloads(bench)) == 10
        assert _lead_was_taken(bench)
        assert _verify(bench).model_digest == live
        # What the interrupted one left behind goes with the next start.
        coordinator.open(bench.initial)
        assert {file.name for file in (bench.folder / "snapshots").iterdir()} == {row.file for row in ledger.snapshots()}
        snapshots.then = lambda: None
        assert compact(ledger, snapshots, keep=2).payloads == 8
    assert _verify(bench).model_digest == live


def test_leader_that_ends_after_all_was_compacted_under_it_leaves_the_snapshot_that_is_left_alone(bench):
    with bench.opened(merging=DELTA, snapshot_every_versions=1000) as coordinator:
        for seed in range(4):
            _send(bench, coordinator, seed)
            bench.publish(coordinator)
        assert _compact(bench, 0).replays_from == 4
        (left,) = (bench.folder / "snapshots").iterdir()
        before = left.read_bytes()
        coordinator.close()
        assert left.read_bytes() == before
    assert _verify(bench).version == 4


def test_aggregator_whose_start_is_overtaken_by_a_compaction_goes_on_from_what_that_left(bench):
    live = _ten_versions(bench)

    class Overtaken(Snapshots):
        is_first = True

        def read(self, stored):
            state = super().read(stored)
            if self.is_first:
                Overtaken.is_first = False
                _compact(bench, 0)
            return state

    for file in sorted((bench.folder / "snapshots").iterdir())[1:]:
        file.unlink()  # So that replay begins far back.
    with bench.ledger() as ledger:
        for row in ledger.snapshots()[1:]:
            with ledger.transaction():
                ledger._connection.execute(delete(SNAPSHOTS).where(SNAPSHOTS.c.seq == row.seq))
    with bench.coordinator(merging=DELTA) as coordinator:
        coordinator._snapshots = Overtaken(str(bench.folder / "snapshots"), bench.manifest)
        coordinator.open(bench.initial)
        assert not Overtaken.is_first
        assert coordinator.model_digest() == live


def _lead_was_taken(bench):
    with bench.ledger() as ledger:
        return ledger.lead().epoch == 2


class Story:
    """A bench that is compacted and rolled back in between, and what its coordinator had after each step."""

    def __init__(self, bench, **rules):
        self.bench = bench
        self.rules = rules
        self._open()

    def _open(self):
        self._stack = ExitStack()
        self.coordinator = self._stack.enter_context(self.bench.opened(**self.rules))

    def do(self, step):
        what, detail = step
        getattr(self, what)(detail)
        assert _verify(self.bench).model_digest == self.coordinator.model_digest(), step

    def send(self, seed):
        _send(self.bench, self.coordinator, seed)
        self.bench.publish(self.coordinator)

    def send_and_leave(self, seed):
        """The frame that it makes waits."""
        _send(self.bench, self.coordinator, seed)

    def restart(self, is_killed):
        if not is_killed:
            self.coordinator.close()
        self._stack.close()
        self._open()

    def compact(self, keep):
        known = _facts_and_chain(self.bench)
        sizes = [len(entry.payload) for entry in self.bench.entries()[-keep:] if entry.payload] if keep else []
        _compact(self.bench, keep)
        assert [len(entry.payload) for entry in self.bench.entries()[-keep:] if entry.payload][: len(sizes)] == sizes or not keep
        assert _facts_and_chain(self.bench) == known

    def back(self, share):
        with self.bench.ledger() as ledger:
            oldest, newest = ledger.snapshots()[0].version, self.coordinator.version
        if oldest < newest:
            self._stack.close()
            _back(self.bench, oldest + int(share * (newest - oldest)))
            self._open()

    def end(self):
        self._stack.close()


@settings(max_examples=12, deadline=None, phases=set(Phase) - {Phase.shrink})  # Shrinking a life takes minutes.
@given(
    merging=st.sampled_from(sorted(MERGING)),
    rules=st.fixed_dictionaries(
        {
            "every_versions": st.integers(1, 3),
            "snapshot_every_versions": st.sampled_from([1, 3]),
            "down": st.sampled_from(["float32", "topk:0.1+int8"]),
            "keyframe": st.sampled_from(["float32", "int8"]),
            "keyframe_every_frames": st.sampled_from([2, 100]),
        }
    ),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(0, 99)),
            st.tuples(st.just("send"), st.integers(100, 199)),
            st.tuples(st.just("send_and_leave"), st.integers(0, 99)),
            st.tuples(st.just("restart"), st.booleans()),
            st.tuples(st.just("compact"), st.integers(0, 5)),
            st.tuples(st.just("back"), st.floats(0, 0.99)),
        ),
        min_size=5,
        max_size=14,
    ),
)
@example(
    merging="mixing",
    rules={"every_versions": 1, "snapshot_every_versions": 1},
    steps=[("send", 1), ("send", 2), ("compact", 0), ("send", 3), ("back", 0.5), ("send", 4), ("compact", 0), ("send", 5)],
)
def test_ledger_can_be_verified_after_each_step_of_a_life_with_compactions_and_rollbacks(new_bench, merging, rules, steps):
    story = Story(new_bench(), merging=MERGING[merging], **rules)
    for step in steps:
        story.do(step)
    story.end()
