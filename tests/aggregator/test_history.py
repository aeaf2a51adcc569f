from contextlib import ExitStack, contextmanager
from itertools import combinations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from aggregator.compaction import compact
from aggregator.decisions import Goal
from aggregator.history import model_of, roll_back, versions, without
from aggregator.merging.noise import noise_of
from aggregator.recovery import recover
from aggregator.verification import verify
from broker_fl.config import MergingSettings
from broker_fl.errors import ConfigurationError, FencedError
from broker_fl.parameters import digest

DELTA = MergingSettings(max_staleness=100)
MIXING = MergingSettings(mode="mixing", mixing_rate=0.5, max_staleness=100)
FEDBUFF = MergingSettings(strategy="fedbuff", buffer_size=3, max_staleness=100)
FEDAVG = MergingSettings(strategy="fedavg", buffer_size=3)
NOISY_FEDBUFF = MergingSettings(strategy="fedbuff", buffer_size=3, max_staleness=100, clip_norm=1.0, noise_multiplier=0.5)
NOISY_FEDAVG = MergingSettings(strategy="fedavg", buffer_size=3, clip_norm=1.0, noise_multiplier=0.5)
SWIFT = set(Phase) - {Phase.shrink}
"""Shrinking a life takes minutes."""
MERGING = {
    "delta": DELTA,
    "mixing": MIXING,
    "fedbuff": FEDBUFF,
    "fedavg": FEDAVG,
    "fedbuff with noise": NOISY_FEDBUFF,
    "fedavg with noise": NOISY_FEDAVG,
}


def _back(bench, to):
    with bench.ledger() as ledger:
        return roll_back(ledger, bench.snapshots(), to=to, holder="an operator", at=bench.clock.now)


def _model_of(bench, version):
    with bench.ledger() as ledger:
        return model_of(ledger, bench.snapshots(), version=version).model


def _without(bench, party):
    with bench.ledger() as ledger:
        return without(ledger, bench.snapshots(), party=party)


def _versions(bench):
    with bench.ledger() as ledger:
        return versions(ledger)


def _verify(bench):
    with bench.ledger() as ledger:
        return verify(ledger, bench.snapshots())


def _recover(bench):
    with bench.ledger() as ledger:
        return recover(ledger, bench.snapshots(), bench.manifest)


def _send(bench, coordinator, party="ann", *, base=None, seed=0, **changes):
    """From the newest frame, where none is given. The frame that it makes is published."""
    update = bench.update(party, base=base or bench.frames()[-1], seed=seed, **changes)
    (verdict,) = coordinator.decide([bench.arrival(update)])
    bench.publish(coordinator)
    return verdict.receipt


def _six_versions(bench, **rules):
    """And the digest of each."""
    with bench.opened(**{"merging": DELTA, **rules}) as coordinator:
        digests = {0: coordinator.model_digest()}
        for seed in range(6):
            _send(bench, coordinator, seed=seed)
            digests[coordinator.version] = coordinator.model_digest()
    return digests


class Story:
    """What became of a bench, with the digest of each version as its coordinator had it."""

    def __init__(self, bench, **rules):
        self.bench = bench
        self.rules = rules
        self.digests = {}
        self.dropped = 0
        self._open()

    def _open(self):
        self._stack = ExitStack()
        self.coordinator = self._stack.enter_context(self.bench.opened(**self.rules))
        self._note()

    def _note(self):
        known = self.digests.setdefault(self.coordinator.version, self.coordinator.model_digest())
        assert known == self.coordinator.model_digest()

    def do(self, step):
        what, *details = step
        getattr(self, what)(*details)
        self._note()

    def send(self, party, seed, late):
        frames = self.bench.frames()
        _send(self.bench, self.coordinator, party, base=frames[max(0, len(frames) - 1 - late)], seed=seed)

    def wait(self):
        self.bench.clock.now += 100.0
        self.coordinator.tick()
        self.bench.publish(self.coordinator)

    def restart(self, is_killed):
        if not is_killed:
            self.coordinator.close()
        self._stack.close()
        self._open()

    def back(self, share):
        newest = self.coordinator.version
        if newest:
            to = int(share * newest)
            self._stack.close()
            done = _back(self.bench, to)
            assert (done.version, done.to, done.model_digest) == (newest + 1, to, self.digests[to])
            self.dropped += done.dropped
            self._open()
            assert self.coordinator.version == newest + 1

    def end(self):
        self._stack.close()


STEPS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(["ann", "bob", "cem"]), st.integers(0, 99), st.integers(0, 3)),
    st.tuples(st.just("send"), st.sampled_from(["ann", "bob", "cem"]), st.integers(0, 99), st.just(0)),
    st.just(("wait",)),
    st.tuples(st.just("restart"), st.booleans()),
    st.tuples(st.just("back"), st.floats(0, 0.99)),
)
PACES = st.fixed_dictionaries(
    {
        "every_versions": st.integers(1, 3),
        "snapshot_every_versions": st.sampled_from([1, 3, 1000]),
        "down": st.sampled_from(["float32", "topk:0.1+int8"]),
        "keyframe": st.sampled_from(["float32", "int8"]),
        "keyframe_every_frames": st.sampled_from([2, 100]),
    }
)


@settings(max_examples=12, deadline=None, phases=SWIFT)
@given(merging=st.sampled_from(sorted(MERGING)), pace=PACES, steps=st.lists(STEPS, min_size=4, max_size=14))
def test_every_version_is_made_again_to_the_bits_that_the_coordinator_had(new_bench, merging, pace, steps):
    story = Story(new_bench(), merging=MERGING[merging], **pace)
    for step in steps:
        story.do(step)
    story.end()
    bench = story.bench
    assert sorted(story.digests) == list(range(max(story.digests) + 1))
    assert {version: digest(_model_of(bench, version)) for version in story.digests} == story.digests
    newest = story.digests[max(story.digests)]
    assert digest(_model_of(bench, None)) == digest(_recover(bench).state.model) == _verify(bench).model_digest == newest
    _expect_follower_gets_there(bench)


def _expect_follower_gets_there(bench):
    """Whoever followed the log of changes from its beginning, and asked for a keyframe where it had to."""
    follower = bench.follower()
    with bench.ledger() as ledger:
        for number in ledger.starts():
            follower.take_keyframe(ledger.start(number))
        for _, body in ledger.bodies_after(0):
            follower.take_body(body)
    assert digest(follower.model) == bench.frames()[-1].digest


@pytest.mark.parametrize("version", [-1, 7, 100])
def test_version_that_was_never_made_is_refused_with_those_that_were(bench, version):
    _six_versions(bench)
    with pytest.raises(ConfigurationError, match=f"version {version} was never made: .* has versions 0 to 6"):
        _model_of(bench, version)


def test_version_that_was_compacted_away_is_refused_with_those_that_are_left(bench):
    _six_versions(bench, snapshot_every_versions=4)
    with bench.ledger() as ledger:
        compact(ledger, bench.snapshots(), keep=2)
    with pytest.raises(ConfigurationError, match=r"version 3 was compacted away: .* has versions 4 to 6"):
        _model_of(bench, 3)
    with pytest.raises(ConfigurationError, match="version 3 was compacted away"):
        _back(bench, 3)


def test_frames_snapshots_and_rollbacks_are_listed_and_what_was_rolled_back(bench):
    _six_versions(bench, every_versions=2, snapshot_every_versions=3)
    _back(bench, 3)
    with bench.opened(merging=DELTA, every_versions=2) as coordinator:
        _send(bench, coordinator)
    listed = {found.version: found for found in _versions(bench)}
    frames = {frame.version: frame for frame in bench.frames()}
    assert sorted(listed) == [0, 2, 3, 4, 6, 7]
    assert {version: found.frame for version, found in listed.items() if found.frame} == {
        version: frame.number for version, frame in frames.items()
    }
    assert sorted(frames) == [0, 2, 4, 6, 7]
    assert all(listed[version].digest == frame.digest for version, frame in frames.items())
    assert [version for version, found in listed.items() if found.snapshot] == [0, 3, 6, 7]
    assert {version: found.goes_back_to for version, found in listed.items() if found.goes_back_to is not None} == {7: 3}
    assert [version for version, found in listed.items() if found.is_rolled_back] == [4, 6]


def test_rollback_appends_one_entry_and_makes_a_new_version_of_the_old_ones_model(bench):
    digests = _six_versions(bench)
    before = bench.entries()
    done = _back(bench, 2)
    *kept, entry = bench.entries()
    assert kept == before
    assert (entry.kind, entry.version, entry.base_version, entry.detail) == ("rollback", 7, 2, "back to version 2")
    assert (done.version, done.to, done.dropped, done.model_digest) == (7, 2, 0, digests[2])
    assert digest(_recover(bench).state.model) == digest(_model_of(bench, 7)) == digests[2]
    assert _verify(bench).version == 7


def test_rollback_drops_the_buffer_and_counts_what_was_in_it(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        for seed in range(5):
            _send(bench, coordinator, seed=seed)
        coordinator.close()
    done = _back(bench, 0)
    assert (done.version, done.dropped) == (2, 2)
    assert bench.entries()[-1].detail == "back to version 0; 2 buffered updates dropped"
    assert _recover(bench).state.buffer is None
    with bench.opened(merging=FEDBUFF) as coordinator:
        outcomes = [_send(bench, coordinator, seed=seed).outcome for seed in range(3)]
    assert outcomes == ["buffered", "buffered", "merged"]
    assert _verify(bench).version == 3


@contextmanager
def _followed(bench, follower, **rules):
    with bench.coordinator(**{"merging": DELTA, **rules}) as coordinator:
        coordinator.open(bench.initial)
        coordinator.tick()
        for row in bench.publish(coordinator):
            follower.take(row)
        yield coordinator


@pytest.mark.parametrize("keyframe", ["float32", "int8"])
@pytest.mark.parametrize("down", ["float32", "topk:0.1+int8"])
def test_receivers_get_the_version_that_was_gone_back_to_as_a_keyframe_and_go_on_from_it(bench, down, keyframe):
    follower, rules = bench.follower(), {"down": down, "keyframe": keyframe}
    with _followed(bench, follower, **rules) as coordinator:
        for seed in range(4):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1], seed=seed))])
            for row in bench.publish(coordinator):
                follower.take(row)
    _back(bench, 2)
    with _followed(bench, follower, **rules) as coordinator:
        frame = follower.frame
        assert (frame.version, frame.base, frame.over) == (5, None, False)
        assert frame.keyframe.number == frame.number == 6
        if keyframe == "float32":
            assert digest(follower.model) == digest(_model_of(bench, 2))
        assert bench.publish(coordinator) == []
        coordinator.decide([bench.arrival(bench.update(base=frame, seed=9))])
        (row,) = bench.publish(coordinator)
        assert (row.base, row.version) == (6, 6)
        follower.take(row)
    assert digest(follower.model) == bench.frames()[-1].digest
    assert _verify(bench).frames == 7


def test_rollback_is_told_once_however_often_the_aggregator_starts_again(bench):
    _six_versions(bench)
    _back(bench, 2)
    for _ in range(3):
        with bench.opened(merging=DELTA):
            pass
    assert [frame.base for frame in bench.frames()][-2:] == [6, None]
    assert len(bench.frames()) == 8


def test_updates_from_the_versions_in_between_are_refused_and_older_ones_are_merged(bench):
    digests = _six_versions(bench)
    frames = {frame.version: frame for frame in bench.frames()}
    _back(bench, 3)
    with bench.opened(merging=DELTA) as coordinator:
        for version in (4, 5, 6):
            receipt = _send(bench, coordinator, base=frames[version], seed=version)
            assert (receipt.outcome, receipt.reason, receipt.version) == ("refused", "rolled_back", 7)
            assert receipt.detail == f"trained from version {version}, and version 7 went back to 3"
        assert coordinator.model_digest() == digests[3]
        for number, version in enumerate((3, 2, 0)):
            receipt = _send(bench, coordinator, base=frames[version], seed=version)
            assert (receipt.outcome, receipt.staleness) == ("merged", 7 + number - version)
        assert _send(bench, coordinator, base={f.version: f for f in bench.frames()}[7]).outcome == "merged"
    assert _verify(bench).version == 11


def test_two_rollbacks_in_a_row_are_told_as_one_and_both_count(bench):
    digests = _six_versions(bench)
    frames = {frame.version: frame for frame in bench.frames()}
    assert _back(bench, 4).version == 7
    assert _back(bench, 1).version == 8
    with bench.opened(merging=DELTA) as coordinator:
        assert coordinator.model_digest() == digests[1]
        assert [(frame.version, frame.base) for frame in bench.frames()][-2:] == [(6, 6), (8, None)]
        refused = [_send(bench, coordinator, base=frames[version], seed=version).reason for version in (2, 3, 4, 5, 6)]
        assert refused == ["rolled_back"] * 5
        assert _send(bench, coordinator, base=frames[1]).outcome == "merged"
    assert _verify(bench).version == 9
    assert digest(_model_of(bench, 7)) == digests[4]


def test_rollback_to_a_version_that_was_rolled_back_itself_takes_its_model(bench):
    digests = _six_versions(bench)
    _back(bench, 2)
    with bench.opened(merging=DELTA) as coordinator:
        _send(bench, coordinator, seed=70)
    assert _back(bench, 5).version == 9
    with bench.opened(merging=DELTA) as coordinator:
        assert coordinator.model_digest() == digests[5]
        _send(bench, coordinator, seed=90)
    assert digest(_model_of(bench, 9)) == digests[5]
    assert [found.version for found in _versions(bench) if found.is_rolled_back] == [3, 4, 5, 6, 7, 8]
    assert _verify(bench).version == 10


def test_rollback_to_a_rollback_takes_the_model_that_that_one_took(bench):
    digests = _six_versions(bench)
    _back(bench, 2)
    with bench.opened(merging=DELTA) as coordinator:
        _send(bench, coordinator, seed=70)
    assert _back(bench, 7).model_digest == digests[2]
    assert _verify(bench).version == 9


def test_federation_that_is_over_stays_over_with_a_new_last_frame(bench):
    goal = Goal(versions=6)
    digests = _six_versions(bench)
    with bench.opened(merging=DELTA, goal=goal) as coordinator:
        coordinator.finish()
        bench.publish(coordinator)
        coordinator.close()
    _back(bench, 3)
    with bench.opened(merging=DELTA, goal=goal) as coordinator:
        assert coordinator.is_over
        assert coordinator.model_digest() == digests[3]
        assert coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1]))]) == []
    newest = bench.frames()[-1]
    assert (newest.version, newest.base, newest.over, newest.digest) == (7, None, True, digests[3])
    assert _verify(bench).version == 7


def test_federation_that_is_over_goes_on_from_a_rollback_where_the_goal_moved(bench):
    digests = _six_versions(bench)
    with bench.opened(merging=DELTA, goal=Goal(versions=6)) as coordinator:
        coordinator.finish()
        bench.publish(coordinator)
    _back(bench, 3)
    with bench.opened(merging=DELTA, goal=Goal(versions=9)) as coordinator:
        assert not coordinator.is_over
        assert coordinator.model_digest() == digests[3]
        assert _send(bench, coordinator).outcome == "merged"
    assert not bench.frames()[-1].over
    assert _verify(bench).version == 8


def test_leader_at_work_cannot_decide_after_a_rollback(bench):
    with bench.opened(merging=DELTA) as coordinator:
        for seed in range(3):
            _send(bench, coordinator, seed=seed)
        base = bench.frames()[-1]
        _back(bench, 1)
        before = bench.entries()
        with pytest.raises(FencedError, match="nothing more is written here"):
            _send(bench, coordinator, base=base, seed=9)
    assert bench.entries() == before


def test_leader_at_work_with_nothing_to_do_notices_a_rollback_within_some_seconds(bench):
    with bench.opened(merging=DELTA) as coordinator:
        for seed in range(3):
            _send(bench, coordinator, seed=seed)
        bench.clock.now += 10.0
        coordinator.tick()
        _back(bench, 1)
        bench.clock.now += 5.0
        with pytest.raises(FencedError):
            coordinator.tick()


def test_leader_that_was_fenced_opens_its_state_again_and_goes_on_from_the_rollback(bench):
    with bench.opened(merging=DELTA) as coordinator:
        for seed in range(3):
            _send(bench, coordinator, seed=seed)
        _back(bench, 1)
        with pytest.raises(FencedError):
            _send(bench, coordinator, seed=9)
        coordinator.open(bench.initial)
        (row,) = bench.publish(coordinator)
        assert (row.version, row.base) == (4, None)
        assert _send(bench, coordinator, seed=9).outcome == "merged"
    assert _verify(bench).version == 5


@pytest.mark.parametrize(("to", "expected"), [(3, "is the newest one"), (4, "was never made"), (-1, "was never made")])
def test_rollback_that_cannot_be_changes_nothing_and_leaves_the_leader_at_work(bench, to, expected):
    with bench.opened(merging=DELTA) as coordinator:
        for seed in range(3):
            _send(bench, coordinator, seed=seed)
        before = bench.entries()
        with pytest.raises(ConfigurationError, match=expected):
            _back(bench, to)
        assert bench.entries() == before
        assert _send(bench, coordinator, seed=9).outcome == "merged"


def test_rollback_that_cannot_be_leaves_no_leader_behind_that_is_not_there(bench):
    with bench.opened() as coordinator:
        coordinator.close()
    with pytest.raises(ConfigurationError):
        _back(bench, 7)
    with bench.ledger() as ledger:
        assert ledger.lead().let_go


@pytest.mark.parametrize("merging", sorted(MERGING))
def test_rollback_is_replayed_to_the_same_bits_without_the_snapshot_that_it_wrote(bench, merging):
    story = Story(bench, merging=MERGING[merging], snapshot_every_versions=2)
    for seed in range(9):
        story.do(("send", ["ann", "bob", "cem"][seed % 3], seed, 0))
    story.do(("back", 0.5))
    for seed in range(4):
        story.do(("send", ["ann", "bob", "cem"][seed % 3], 50 + seed, 0))
    story.end()
    (rollback,) = [entry for entry in bench.entries() if entry.kind == "rollback"]
    with bench.ledger() as ledger:
        for row in ledger.snapshots():
            if row.seq >= rollback.seq:
                (bench.folder / "snapshots" / row.file).unlink()
    newest = max(story.digests)
    assert rollback.version < newest
    assert digest(_recover(bench).state.model) == story.digests[newest]
    assert {version: digest(_model_of(bench, version)) for version in story.digests} == story.digests
    with bench.opened(merging=MERGING[merging]) as coordinator:
        assert coordinator.model_digest() == story.digests[newest]


SIZE = 2008


def _vector(seed):
    """As bench.update draws it."""
    return (0.1 * np.random.default_rng(seed).standard_normal(SIZE)).astype(np.float32)


def _by_hand(bench, seeds, *, party):
    """x <- x + weight * delta in float32 over the entries of the others; a rollback takes the model of its target."""
    x = bench.initial
    models = {0: x.copy()}
    for entry in bench.entries():
        if entry.kind == "rollback":
            x = models[entry.base_version].copy()
        elif entry.outcome == "merged" and entry.party != party:
            x += _vector(seeds[entry.update_id]) * np.float32(entry.weight)
        models[entry.version] = x.copy()
    return x


@settings(max_examples=10, deadline=None, phases=SWIFT)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["ann", "bob", "cem"]), st.integers(0, 3)),
            st.tuples(st.just("back"), st.floats(0, 0.99)),
        ),
        min_size=3,
        max_size=14,
    ),
    snapshot_every_versions=st.sampled_from([2, 1000]),
)
def test_model_without_a_party_is_the_first_one_and_what_all_others_added(new_bench, steps, snapshot_every_versions):
    bench = new_bench()
    story = Story(bench, merging=DELTA, snapshot_every_versions=snapshot_every_versions)
    seeds = {}
    story.do(("send", "bob", 1000, 0))
    seeds[bench.entries()[-1].update_id] = 1000
    for seed, (what, detail) in enumerate(steps):
        if what == "back":
            story.do((what, detail))
        else:
            story.do(("send", what, seed, detail))
            seeds[bench.entries()[-1].update_id] = seed
    story.end()
    for party in {entry.party for entry in bench.entries() if entry.outcome == "merged"}:
        found = _without(bench, party)
        assert found.version == story.coordinator.version
        assert digest(found.model) == digest(_by_hand(bench, seeds, party=party))
    assert digest(_by_hand(bench, seeds, party=None)) == story.coordinator.model_digest()


@pytest.mark.parametrize("merging", [FEDBUFF, FEDAVG], ids=["fedbuff", "fedavg"])
def test_model_without_a_party_has_the_mean_over_those_that_are_left(bench, merging):
    samples = {"ann": 10, "bob": 30, "cem": 7}
    x = bench.initial
    with bench.opened(merging=merging) as coordinator:
        for turn in range(2):
            base = bench.frames()[-1]
            for number, party in enumerate(samples):
                _send(bench, coordinator, party, base=base, seed=3 * turn + number, num_samples=samples[party])
        assert coordinator.version == 2
    by_samples = merging.strategy == "fedavg"
    for turn in range(2):
        weights = {
            party: np.float32(count) if by_samples else np.float32(1) for party, count in samples.items() if party != "bob"
        }
        total = np.zeros(SIZE, np.float32)
        for number, party in enumerate(samples):
            if party != "bob":
                total += _vector(3 * turn + number) * weights[party]
        x += total * np.float32(1.0 / float(sum(weights.values())))
    found = _without(bench, "bob")
    assert (found.version, digest(found.model)) == (2, digest(x))


def _noise(bench, merging, version, total):
    with bench.ledger() as ledger:
        return noise_of(merging, ledger.noise_key()).for_version(version, covers=total)


@pytest.mark.parametrize("merging", [NOISY_FEDBUFF, NOISY_FEDAVG], ids=["fedbuff", "fedavg"])
def test_model_without_a_party_has_the_noise_of_each_version_and_the_same_denominator(bench, merging):
    with bench.opened(merging=merging) as coordinator:
        for turn in range(2):
            base = bench.frames()[-1]
            for number, party in enumerate(("ann", "bob", "cem")):
                _send(bench, coordinator, party, base=base, delta=0.001 * (3 * turn + number + 1), num_samples=10**number)
        assert coordinator.version == 2
        model = coordinator.model_digest()
    for left_out in ("bob", None):
        x = bench.initial
        for turn in range(2):
            total = np.zeros(SIZE, np.float32)
            for number, party in enumerate(("ann", "bob", "cem")):
                if party != left_out:
                    total += np.float32(0.001 * (3 * turn + number + 1))
            x += (total + _noise(bench, merging, turn + 1, total)) * np.float32(1.0 / 3.0)
        if left_out is None:
            assert digest(x) == model
        else:
            found = _without(bench, left_out)
            assert (found.version, digest(found.model)) == (2, digest(x))
            assert digest(_without(bench, left_out).model) == digest(x)


@pytest.mark.parametrize("merging", [NOISY_FEDBUFF, NOISY_FEDAVG], ids=["fedbuff", "fedavg"])
def test_rollback_adds_no_noise_and_no_noise_is_used_for_two_versions(bench, merging):
    """Deltas of nothing, so that what a version changes is its noise."""
    rules = {"merging": merging, "snapshot_every_versions": 2}
    models = {}

    def live(versions):
        with bench.opened(**rules) as coordinator:
            models[coordinator.version] = _recover(bench).state.model.copy()
            for _ in range(versions):
                base = bench.frames()[-1]
                for party in ("ann", "bob", "cem"):
                    receipt = _send(bench, coordinator, party, base=base, delta=0.0)
                assert receipt.outcome == "merged"
                models[coordinator.version] = _recover(bench).state.model.copy()
            # One more that is dropped by the rollback.
            _send(bench, coordinator, "ann", delta=0.0)

    live(4)
    assert _back(bench, 2).version == 5
    live(2)
    assert _back(bench, 6).version == 8
    live(2)
    assert digest(models[5]) == digest(models[2])
    assert digest(models[8]) == digest(models[6])
    noised = [1, 2, 3, 4, 6, 7, 9, 10]
    assert sorted(models) == list(range(11))
    steps = {version: models[version] - models[version - 1] for version in noised}
    for version, step in steps.items():
        assert step == pytest.approx(_noise(bench, merging, version, np.zeros(SIZE, np.float32)) / 3, abs=1e-5)
        assert step.std() == pytest.approx(0.5 / 3, rel=0.15)
    for one, other in combinations(noised, 2):
        assert abs(np.corrcoef(steps[one], steps[other])[0, 1]) < 6 / SIZE**0.5
    assert _verify(bench).version == 10
    assert {version: digest(_model_of(bench, version)) for version in models} == {
        version: digest(model) for version, model in models.items()
    }


def test_version_whose_updates_were_all_of_the_party_that_is_left_out_changes_nothing(bench):
    with bench.opened(merging=FEDBUFF) as coordinator:
        for seed in range(3):
            _send(bench, coordinator, "bob", seed=seed)
        for seed in range(3):
            _send(bench, coordinator, "ann", seed=10 + seed)
    found = _without(bench, "ann")
    assert (found.version, digest(found.model)) == (2, digest(_model_of(bench, 1)))
    total = sum((_vector(10 + seed) for seed in range(3)), start=np.zeros(SIZE, np.float32))
    expected = bench.initial + total * np.float32(1 / 3)
    assert digest(_without(bench, "bob").model) == digest(expected)


def test_model_without_a_party_in_mixing_is_the_model_of_a_federation_that_it_was_never_in(bench, new_bench):
    """Where it was the last one to join: all that came before it is as it was, and what others mixed in came from their bases."""
    alone = new_bench()
    for federation, parties in ((bench, ("ann", "bob")), (alone, ("ann",))):
        with federation.opened(merging=MIXING) as coordinator:
            for party in parties:
                for seed in range(3):
                    _send(federation, coordinator, party, seed=seed)
    found = _without(bench, "bob")
    assert (found.version, digest(found.model)) == (6, digest(_model_of(alone, 3)))


def test_party_that_merged_nothing_cannot_be_left_out(bench):
    with bench.opened(merging=DELTA) as coordinator:
        _send(bench, coordinator)
        assert _send(bench, coordinator, "bob", base_digest="0" * 64).outcome == "refused"
    for party in ("bob", "nobody"):
        with pytest.raises(ConfigurationError, match=f"no update of party '{party}' went into the model"):
            _without(bench, party)


def test_party_whose_first_update_was_compacted_away_cannot_be_left_out_and_others_can(bench):
    with bench.opened(merging=DELTA, snapshot_every_versions=3) as coordinator:
        for seed, party in enumerate(["ann", "bob", "ann", "cem", "bob"]):
            _send(bench, coordinator, party, seed=seed)
    with bench.ledger() as ledger:
        assert compact(ledger, bench.snapshots(), keep=2).replays_from == 3
    for party, first in (("ann", 2), ("bob", 3)):
        with pytest.raises(ConfigurationError, match=f"'{party}' begin with entry {first}, and all before entry 4 was compacted"):
            _without(bench, party)
    expected = _model_of(bench, 3)
    expected += _vector(4) * np.float32(bench.entries()[-1].weight)
    assert digest(_without(bench, "cem").model) == digest(expected)


def test_party_that_came_after_the_horizon_is_left_out_where_a_rollback_went_back_before_it(bench):
    _six_versions(bench, snapshot_every_versions=4)
    target = digest(_model_of(bench, 2))
    _back(bench, 2)
    with bench.opened(merging=DELTA) as coordinator:
        _send(bench, coordinator, "bob", seed=50)
    with bench.ledger() as ledger:
        assert compact(ledger, bench.snapshots(), keep=4).replays_from == 4
    assert _verify(bench).version == 8
    assert digest(_without(bench, "bob").model) == target
