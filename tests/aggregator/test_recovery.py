"""Version v = a snapshot + the ledger's updates after it, to the last bit, wherever the process was killed."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from aggregator.coordinator import Coordinator
from aggregator.decisions import Goal
from aggregator.ledger import NOISE_KEY
from aggregator.merging.noise import KEY_BYTES
from aggregator.recovery import manifest_of_ledger, recover
from aggregator.snapshots import Stored
from aggregator.verification import verify
from broker_fl.codecs.chain import change, rounded
from broker_fl.config import MergingSettings
from broker_fl.errors import DamagedError, FencedError, StorageFullError
from broker_fl.parameters import digest

MERGING = {
    "fedasync delta": MergingSettings(mixing_rate=0.6, max_staleness=4),
    "fedasync mixing": MergingSettings(mode="mixing", mixing_rate=0.6, staleness="hinge", hinge=1, max_staleness=4),
    "fedbuff": MergingSettings(strategy="fedbuff", buffer_size=3, max_staleness=2, server_learning_rate=0.7),
    "fedavg": MergingSettings(strategy="fedavg", buffer_size=2),
    "fedbuff with noise": MergingSettings(
        strategy="fedbuff", buffer_size=2, max_staleness=2, server_learning_rate=0.7, clip_norm=1.0, noise_multiplier=0.5
    ),
    "fedavg with noise": MergingSettings(strategy="fedavg", buffer_size=2, clip_norm=1.0, noise_multiplier=0.5),
}

UPDATES = st.tuples(
    st.just("update"),
    st.sampled_from(["ann", "bob", "cem"]),
    st.integers(0, 4),  # how many frames ago it began
    st.sampled_from(["float32", "int8", "topk:0.1+int4"]),
)
STEPS = st.one_of(
    st.tuples(st.just("group"), st.lists(UPDATES, min_size=1, max_size=4)),
    st.tuples(st.just("again")),  # an update that was decided before
    st.tuples(st.just("publish")),
    st.tuples(st.just("session")),
    st.tuples(st.just("tick"), st.sampled_from([0.5, 3.0])),
)
CRASHES = st.sampled_from(["none", "none", "killed", "stopped"])
PACES = st.fixed_dictionaries(
    {
        "every_versions": st.integers(1, 3),
        "snapshot_every_versions": st.integers(1, 5),
        "down": st.sampled_from(["float32", "int8", "topk:0.05+int4"]),
        "keyframe": st.sampled_from(["float32", "float16", "int8"]),
        "keyframe_every_frames": st.integers(1, 6),
        "warm_up_versions": st.sampled_from([0, 5]),
        "up": st.just("topk:0.01+int8"),
        "fraction": st.sampled_from([0.5, 1.0]),
    }
)


@dataclass
class Life:
    """One aggregator's, over its restarts."""

    bench: object
    rules: dict
    sent: list = field(default_factory=list)
    digests: list = field(default_factory=list)

    def begin(self):
        with self.bench.ledger() as ledger, ledger.transaction():
            # Frames name their ledger: the same name, for the same bytes. And the same key, for the same noise.
            ledger.set_fact("ledger_id", "ab" * 16)
            ledger.set_fact(NOISE_KEY, "cd" * KEY_BYTES)
        self._context = self.bench.opened(every_s=2.0, **self.rules)
        self.coordinator = self._context.__enter__()
        return self

    def end(self, how):
        if how == "stopped":
            self.coordinator.close()
        self._context.__exit__(None, None, None)

    def restart(self, how, **rules):
        before = (self.coordinator.version, self.coordinator.model_digest())
        self.end(how)
        self.rules |= rules
        self.begin()
        if not rules:
            assert (self.coordinator.version, self.coordinator.model_digest()) == before

    def do(self, step):
        kind, *rest = step
        if kind == "group":
            self._decide([self._update(*update[1:]) for update in rest[0]])
        elif kind == "again" and self.sent:
            self._decide(self.sent[-2:])
        elif kind == "publish":
            self.bench.publish(self.coordinator)
        elif kind == "session":
            self.bench.publish(self.coordinator)
            self.coordinator.standing_alone()
        elif kind == "tick":
            self.bench.clock.now += rest[0]
            self.coordinator.tick()

    def _update(self, party, frames_ago, codec):
        frames = self.bench.frames()
        base = frames[max(0, len(frames) - 1 - frames_ago)]
        number = len(self.sent)
        made = self.bench.update(
            party, base=base, codec=codec, seed=number, update_id=f"{number:032x}", num_samples=1 + number * 7 % 13
        )
        self.sent.append(made)
        return made

    def _decide(self, updates):
        self.coordinator.decide([self.bench.arrival(update) for update in updates])
        self.digests.append(self.coordinator.model_digest())


def _verified(bench):
    with bench.ledger() as ledger:
        return verify(ledger, bench.snapshots())


def _recovered(bench):
    with bench.ledger() as ledger:
        return recover(ledger, bench.snapshots(), manifest_of_ledger(ledger)).state


BOTH = pytest.mark.parametrize("bench", ["sqlite", "postgresql"], indirect=True)


@BOTH
@pytest.mark.parametrize("merging", MERGING.values(), ids=MERGING.keys())
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_aggregator_goes_on_from_any_database_with_the_same_model(bench, merging, how):
    rules = {"merging": merging, "down": "topk:0.1+int4", "snapshot_every_versions": 2, "every_versions": 1}
    life = Life(bench, rules).begin()
    for number in range(6):
        life.do(("group", [("update", party, number % 2, "int8") for party in ("ann", "bob")]))
        life.do(("publish",))
        life.restart(how)
    life.do(("again",))
    life.end(how)
    recovered, verified = _recovered(bench), _verified(bench)
    assert recovered.version == verified.version == life.coordinator.version > 2
    assert digest(recovered.model) == verified.model_digest == life.coordinator.model_digest()
    assert _followed(bench) == bench.frames()[-1].digest


@pytest.mark.parametrize("merging", MERGING.values(), ids=MERGING.keys())
@settings(max_examples=5, deadline=None)
@given(pace=PACES, steps=st.lists(st.tuples(STEPS, CRASHES), min_size=6, max_size=16))
def test_aggregator_that_is_killed_and_restarted_makes_the_same_bits_as_one_that_is_not(new_bench, merging, pace, steps):
    undisturbed = Life(new_bench(), {"merging": merging, **pace}).begin()
    disturbed = Life(new_bench(), {"merging": merging, **pace}).begin()
    for step, crash in steps:
        undisturbed.do(step)
        disturbed.do(step)
        if crash != "none":
            disturbed.restart(crash)
            # What every start does.
            undisturbed.coordinator.tick()
            undisturbed.bench.publish(undisturbed.coordinator)
    undisturbed.end("killed")
    disturbed.end("killed")
    assert disturbed.digests == undisturbed.digests
    live = disturbed.coordinator
    recovered = _recovered(disturbed.bench)
    verified = _verified(disturbed.bench)
    assert recovered.version == verified.version == live.version
    assert digest(recovered.model) == verified.model_digest == live.model_digest()
    assert _frames(disturbed.bench) == _frames(undisturbed.bench)
    assert _followed(disturbed.bench) == disturbed.bench.frames()[-1].digest


@settings(max_examples=8, deadline=None)
@given(
    pace=PACES,
    lives=st.lists(
        st.tuples(
            st.sampled_from(sorted(MERGING)),
            st.sampled_from(["float32", "int8", "topk:0.05+int4"]),
            st.sampled_from(["float32", "int8"]),
            st.lists(STEPS, max_size=5),
            st.booleans(),
            st.sampled_from(["killed", "stopped"]),
        ),
        min_size=2,
        max_size=5,
    ),
)
def test_changing_strategies_codecs_and_goals_between_restarts_is_replayed_to_the_same_bits(new_bench, pace, lives):
    life = Life(new_bench(), {"merging": MERGING[lives[0][0]], "goal": Goal(), **pace}).begin()
    for number, (merging, down, keyframe, steps, finishes, how) in enumerate(lives):
        # A goal of its own for every life, so that a federation that was over goes on.
        life.restart(how, merging=MERGING[merging], down=down, keyframe=keyframe, goal=Goal(versions=1000 + number))
        for step in steps:
            life.do(step)
        if finishes:
            life.coordinator.finish()
        life.restart(how)
    life.end("killed")
    recovered, verified = _recovered(life.bench), _verified(life.bench)
    assert digest(recovered.model) == verified.model_digest == life.coordinator.model_digest()
    assert recovered.version == verified.version == life.coordinator.version
    assert _followed(life.bench) == life.bench.frames()[-1].digest


def _frames(bench):
    """All that was ever sent, to the last byte; of keyframes the newest."""
    with bench.ledger() as ledger:
        return list(ledger.bodies_after(0)), ledger.newest_keyframe()


def _followed(bench):
    """The digest of what whoever followed the log from its beginning holds."""
    first, *changes = bench.bodies()
    with bench.ledger() as ledger:
        start = bench.snapshots().read(Stored(ledger.snapshots()[0].file, ledger.snapshots()[0].sha256))
    model = start.model if first.rounding is None else rounded(start.model, first.rounding, manifest=bench.manifest)[1]
    for frame in changes:
        change(model, frame, manifest=bench.manifest)
    return digest(model)


@pytest.mark.parametrize("name", ["fedbuff with noise", "fedavg with noise"])
def test_version_that_was_made_and_never_committed_is_made_again_with_the_same_noise(bench, name):
    digests = []
    for _ in range(3):
        with bench.opened(merging=MERGING[name]) as coordinator:
            (base,) = bench.frames()
            arrivals = [bench.arrival(bench.update(party, base=base, seed=3)) for party in ("ann", "bob")]
            with bench.ledger() as ledger:
                ledger.take_lead("another", at=1.0)
            with pytest.raises(FencedError):
                coordinator.decide(arrivals)
            assert coordinator.version == 1
            digests.append(coordinator.model_digest())
    assert bench.entries()[-1].version == 0
    assert len(set(digests)) == 1


def test_ledger_that_lost_its_noise_key_is_damaged_even_where_no_noise_was_ever_added(bench):
    with bench.opened():
        pass
    bench.execute(f"DELETE FROM meta WHERE key = '{NOISE_KEY}'")
    lost = pytest.raises(DamagedError, match="has lost its noise key; restore it from a backup")
    with lost, bench.opened():
        pass
    with lost:
        _verified(bench)


@pytest.mark.parametrize("after", ["snapshot", "replay"])
def test_recovery_by_another_key_is_found_out(bench, after):
    with bench.opened(merging=MERGING["fedbuff with noise"]) as coordinator:
        (base,) = bench.frames()
        coordinator.decide([bench.arrival(bench.update(party, base=base)) for party in ("ann", "bob")])
        if after == "snapshot":
            coordinator.close()
    bench.execute(f"UPDATE meta SET value = '{'ef' * KEY_BYTES}' WHERE key = '{NOISE_KEY}'")
    with pytest.raises(DamagedError, match="entry 3 says another model than replay makes of version 1"):
        _verified(bench)
    if after == "replay":
        with pytest.raises(DamagedError, match="entry 3 says another model"), bench.opened():
            pass


MIXING = MergingSettings(mode="mixing", mixing_rate=0.5, staleness="constant")


def test_bases_are_made_from_the_first_frame_on_where_no_snapshot_has_one(bench):
    """As after a kill between the change of strategy and its snapshot."""
    with bench.opened(down="topk:0.1+int4", keyframe="int8", keyframe_every_frames=2) as coordinator:
        for seed in range(5):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1], seed=seed))])
            bench.publish(coordinator)
    with bench.opened(merging=MIXING, down="topk:0.1+int4") as coordinator:
        base = bench.frames()[-1]
        (verdict,) = coordinator.decide([bench.arrival(bench.update(base=base, seed=9))])
        assert verdict.receipt.outcome == "merged"
        live = coordinator.model_digest()
    bench.execute("DELETE FROM snapshots WHERE version > 0")
    assert digest(_recovered(bench).model) == live
    assert _verified(bench).model_digest == live


def test_bases_are_made_from_the_newest_one_of_the_snapshot(bench):
    with bench.opened(merging=MIXING, down="topk:0.1+int4", snapshot_every_versions=3) as coordinator:
        for seed in range(7):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1], seed=seed))])
            bench.publish(coordinator)
        live = coordinator.model_digest()
    with bench.ledger() as ledger:
        (bench.folder / "snapshots" / ledger.snapshots()[0].file).unlink()
    assert digest(_recovered(bench).model) == live


def test_base_of_a_version_that_was_broadcast_again_under_other_settings_is_the_same(bench):
    mixing = MergingSettings(mode="mixing", mixing_rate=0.5, staleness="constant")
    with bench.opened(merging=mixing, goal=Goal(versions=1)) as coordinator:
        coordinator.decide([bench.arrival(bench.update(base=bench.frames()[0]))])
        coordinator.finish()
        coordinator.close()
    with bench.opened(merging=mixing, goal=Goal(versions=9), down="int4") as coordinator:
        base = bench.frames()[-1]
        assert (base.version, base.codec, base.number) == (1, "int4", 4)
        (verdict,) = coordinator.decide([bench.arrival(bench.update("bob", base=base))])
        assert verdict.receipt.outcome == "merged"
        live = coordinator.model_digest()
    assert digest(_recovered(bench).model) == live
    assert _verified(bench).model_digest == live


def test_recovery_begins_at_the_newest_snapshot(bench):
    with bench.opened(snapshot_every_versions=2) as coordinator:
        (base,) = bench.frames()
        for seed in range(5):
            coordinator.decide([bench.arrival(bench.update(base=base, seed=seed))])
    with bench.ledger() as ledger:
        first, *_, newest = ledger.snapshots()
        (bench.folder / "snapshots" / first.file).unlink()
        recovered = recover(ledger, bench.snapshots(), bench.manifest)
    assert newest.version == 4
    assert (recovered.snapshot_version, recovered.state.version, recovered.seq) == (4, 5, 6)


def _missing(file):
    file.unlink()


def _truncated(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", [_missing, _truncated])
@pytest.mark.parametrize("merging", [MergingSettings(), MIXING], ids=["delta", "mixing"])
def test_start_from_a_damaged_snapshot_names_it_aloud_and_goes_back_to_an_older_one(bench, merging, damage):
    rules = {"merging": merging, "snapshot_every_versions": 2, "down": "int4"}
    with bench.opened(**rules) as coordinator:
        for seed in range(4):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1], seed=seed))])
            bench.publish(coordinator)
        live = coordinator.model_digest()
    newest, older = bench.snapshot(4), bench.snapshot(2)
    damage(newest)
    with bench.coordinator(**rules) as coordinator:
        with capture_logs() as logs:
            coordinator.open(bench.initial)
        assert (coordinator.version, coordinator.model_digest()) == (4, live)
        coordinator.close()
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert newest.name in line["reason"]
    assert line["older"] == older.name
    # The end of the run has put a whole one in its place.
    with capture_logs() as logs, bench.coordinator(**rules) as coordinator:
        coordinator.open(bench.initial)
    assert [line for line in logs if line["log_level"] == "error"] == []


def test_start_from_damaged_snapshots_alone_fails_and_names_the_newest(bench):
    with bench.opened() as coordinator:
        coordinator.decide([bench.arrival(bench.update(base=bench.frames()[0]))])
        coordinator.close()
    for file in (bench.folder / "snapshots").iterdir():
        _truncated(file)
    with (
        bench.coordinator() as coordinator,
        pytest.raises(DamagedError, match=r"model-\w{8}-v00000001-s00000002-e0001-\w{8}\.safetensors"),
    ):
        coordinator.open(bench.initial)


def test_older_snapshot_does_not_do_where_the_ledger_lost_an_entry_since(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        coordinator.decide([bench.arrival(bench.update(base=base, seed=seed)) for seed in range(3)])
        coordinator.close()
    _missing(bench.snapshot(3))
    bench.execute("DELETE FROM entries WHERE seq = 2")
    with bench.coordinator() as coordinator, pytest.raises(DamagedError, match="entry 2 is missing"):
        coordinator.open(bench.initial)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM bodies WHERE kind IN ('keyframe', 'start')", "lost its keyframe"),
        ("UPDATE bodies SET body = zeroblob(length(body)) WHERE kind IN ('keyframe', 'start')", "keyframe of frame 1 is damaged"),
        ("UPDATE bodies SET body = zeroblob(length(body)) WHERE kind = 'frame' AND number = 3", "body of frame 3 is damaged"),
        ("DELETE FROM bodies WHERE kind = 'frame' AND number = 3", "frame 3 has lost its body"),
        ("DELETE FROM bodies WHERE kind = 'frame' AND number = 4", "what its frame 4 says"),
        ("UPDATE frames SET digest = 'ab' || substr(digest, 3) WHERE number = 4", "what its frame 4 says"),
    ],
)
def test_start_from_frames_that_are_damaged_fails_and_says_what_is(bench, statement, message):
    with bench.opened(down="topk:0.1+int4") as coordinator:
        for seed in range(3):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1], seed=seed))])
            bench.publish(coordinator)
    assert [row.number for row in bench.frames()] == [1, 2, 3, 4]
    bench.execute(statement)
    with bench.coordinator() as coordinator, pytest.raises(DamagedError, match=message):
        coordinator.open(bench.initial)


def test_whole_model_that_the_frames_go_on_from_stands_for_a_keyframe_that_is_gone(bench):
    with bench.opened(down="topk:0.1+int4") as coordinator:
        coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1]))])
        live = coordinator.model_digest()
    bench.execute("DELETE FROM bodies WHERE kind = 'keyframe'")
    with bench.opened(down="topk:0.1+int4") as coordinator:
        assert coordinator.model_digest() == live
        follower = bench.follower()
        follower.take(coordinator.standing_alone())
        assert follower.frame.digest == bench.frames()[-1].digest


def test_start_from_a_ledger_whose_entry_changed_fails_and_names_it(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        for seed in range(3):
            coordinator.decide([bench.arrival(bench.update(base=base, seed=seed))])
    bench.execute("UPDATE entries SET num_samples = 11 WHERE seq = 3")
    with bench.coordinator() as coordinator, pytest.raises(DamagedError, match="entry 3 is not what was written: its hash"):
        coordinator.open(bench.initial)


def test_start_from_a_ledger_whose_last_model_was_forged_fails_and_names_the_entry(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        for seed in range(3):
            coordinator.decide([bench.arrival(bench.update(base=base, seed=seed))])
    bench.forge("UPDATE entries SET model_digest = 'ab' || substr(model_digest, 3) WHERE seq = 4")
    with bench.coordinator() as coordinator, pytest.raises(DamagedError, match="entry 4 says another model than replay makes"):
        coordinator.open(bench.initial)


def test_start_from_a_ledger_whose_payload_changed_fails_and_names_the_entry(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        for seed in range(3):
            coordinator.decide([bench.arrival(bench.update(base=base, seed=seed))])
    bench.execute("UPDATE entries SET payload = zeroblob(length(payload)) WHERE seq = 3")
    with bench.coordinator() as coordinator, pytest.raises(DamagedError, match="payload of entry 3"):
        coordinator.open(bench.initial)


@BOTH
def test_loss_of_minus_zero_is_recorded_so_that_it_can_be_read_again(bench):
    """A party may send any finite number; nobody may stop the aggregator."""
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        (verdict,) = coordinator.decide([bench.arrival(bench.update(base=base, train_loss=-0.0))])
        assert verdict.receipt.outcome == "merged"
        live = coordinator.model_digest()
    with bench.coordinator() as coordinator:
        coordinator.open(bench.initial)
        assert coordinator.model_digest() == live


def test_start_from_a_ledger_that_lost_an_entry_fails_and_names_it(bench):
    with bench.opened() as coordinator:
        update = bench.update(base=bench.frames()[0], base_digest="0" * 64)
        coordinator.decide([bench.arrival(update)])
        coordinator.decide([bench.arrival(bench.update(base=bench.frames()[0]))])
    bench.execute("DELETE FROM entries WHERE seq = 2")
    with bench.coordinator() as coordinator, pytest.raises(DamagedError, match="entry 2 is missing"):
        coordinator.open(bench.initial)


def test_start_without_any_snapshot_in_the_ledger_fails(bench):
    with bench.opened():
        pass
    bench.execute("DELETE FROM snapshots")
    with bench.coordinator() as coordinator, pytest.raises(DamagedError, match="lost its snapshots"):
        coordinator.open(bench.initial)


def test_commit_that_finds_no_space_is_undone_and_decided_again_at_the_next_start(bench):
    with bench.ledger() as ledger:
        rules = bench.rules(ledger.facts()["ledger_id"])
        coordinator = Coordinator(ledger, bench.snapshots(), rules, clock=bench.clock)
        coordinator.open(bench.initial)
        coordinator.tick()
        bench.publish(coordinator)
        arrivals = [bench.arrival(bench.update(base=bench.frames()[0], seed=seed)) for seed in range(20)]
        ledger._connection.exec_driver_sql("PRAGMA max_page_count = 1")
        ledger._connection.rollback()
        with pytest.raises(StorageFullError):
            coordinator.decide(arrivals)
    with bench.opened() as coordinator:
        assert coordinator.version == 0
        assert [verdict.receipt.outcome for verdict in coordinator.decide(arrivals)] == ["merged"] * 20
    assert _verified(bench).merged == 20


def test_model_of_the_first_start_is_the_one_that_was_given(bench):
    with bench.opened():
        pass
    assert np.array_equal(_recovered(bench).model, bench.initial)


class _Overtaken:
    """A ledger to which somebody writes just after its entries were read."""

    def __init__(self, ledger, write):
        self._ledger, self._write = ledger, write

    def __getattr__(self, name):
        return getattr(self._ledger, name)

    def entries_after(self, seq):
        yield from self._ledger.entries_after(seq)
        self._write()


def test_recovery_beside_an_aggregator_at_work_is_not_taken_for_damage(bench):
    with bench.opened() as coordinator:
        coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1]))])
    # The newest snapshot holds all of it: replay finds no entry behind it, and then there is one.
    with bench.opened() as coordinator, bench.ledger() as ledger:
        base = bench.frames()[-1]
        overtaken = _Overtaken(ledger, lambda: coordinator.decide([bench.arrival(bench.update(base=base, seed=3))]))
        recovered = recover(overtaken, bench.snapshots(), bench.manifest)
        assert ledger.last_seq() == recovered.seq + 1
