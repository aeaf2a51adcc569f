import sqlite3
from contextlib import contextmanager

import numpy as np
import pytest
from broadcasting import PLAN, Broadcaster
from structlog.testing import capture_logs

from broker_fl.parameters import manifest_of
from broker_fl.transports.following import Progress, advance, received_by
from schemas import wire
from workers.held import HeldModel, Unkept
from workers.outbox import open_outbox, outbox_file

MANIFEST = manifest_of({"hidden.weight": np.zeros((40, 50), np.float32), "hidden.bias": np.zeros(8, np.float32)})
RNG = np.random.default_rng(0)


class Life:
    """Frames that are followed, and a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.frames = Broadcaster("ward", MANIFEST, down="topk:0.05+int8", keyframe="bfloat16")
        self.received = received_by(self.frames.first(random())[1], self.frames.model)

    def change(self, **facts):
        """The next frame, followed: as `keep` takes it."""
        _, frame = self.frames.next(self.frames.model + random(), **facts)
        self.received = advance(self.received, [frame], manifest=MANIFEST)
        return self.received, [wire.encode(frame)]

    @contextmanager
    def disk(self, manifest=MANIFEST):
        with open_outbox(self.folder, party="ann", federation="ward") as outbox:
            yield HeldModel(outbox, federation="ward", manifest=manifest), outbox

    def loaded(self):
        with self.disk() as (held, _):
            return held.load()

    def damage(self, statement):
        connection = sqlite3.connect(outbox_file(self.folder, "ann"))
        connection.execute(statement)
        connection.commit()
        connection.close()

    def assert_loaded(self):
        loaded = self.loaded()
        assert loaded.model.tobytes() == self.received.model.tobytes()
        for fact in ("ledger", "number", "version", "digest", "over", "log_bytes", "plan"):
            assert getattr(loaded, fact) == getattr(self.received, fact)


def random():
    return RNG.standard_normal(MANIFEST.size).astype(np.float32)


@pytest.fixture
def life(tmp_path):
    return Life(tmp_path)


def test_there_is_no_model_on_an_empty_disk(life):
    assert life.loaded() is None


def test_model_comes_back_to_the_last_bit_with_what_changed_it_since(life):
    with life.disk() as (held, _):
        held.keep(life.received, None)
    life.assert_loaded()
    for facts in ({}, {"with_keyframe": True}, {"plan": PLAN.model_copy(update={"fraction": 0.5})}, {"over": True}):
        with life.disk() as (held, outbox):
            assert held.load() is not None
            held.keep(*life.change(**facts))
            held.keep(life.received, [])
        life.assert_loaded()
    with life.disk() as (_, outbox):
        assert len(outbox.held_frames()) == 4


def test_first_model_is_kept_whole_whatever_led_to_it(life):
    with life.disk() as (held, _):
        held.keep(*life.change())
    life.assert_loaded()


def test_model_is_kept_whole_again_before_its_changes_cost_more(life):
    counts = []
    with life.disk() as (held, outbox):
        held.keep(life.received, None)
        for _ in range(40):
            held.keep(*life.change())
            kept = outbox.held_frames()
            counts.append(len(kept))
            assert sum(map(len, kept)) <= 4 * MANIFEST.size
    assert counts.count(0) > 1
    assert max(counts) > 5
    life.assert_loaded()


def test_many_small_changes_are_not_applied_for_ever(life):
    with life.disk() as (held, outbox):
        held.keep(life.received, None)
        held.keep(life.received, [b""] * 256)
        assert len(outbox.held_frames()) == 256
        held.keep(life.received, [b""])
        assert outbox.held_frames() == []


DAMAGES = {
    "other weights": "UPDATE held_model SET vector = zeroblob(8032)",
    "too few weights": "UPDATE held_model SET vector = zeroblob(8031)",
    "no plan": "UPDATE held_model SET plan = x'00'",
    "another digest": "UPDATE held_model SET digest = 'x'",
    "no frame": "UPDATE held_frames SET body = x'00' WHERE position = 1",
    "a frame too few": "DELETE FROM held_frames WHERE position = 1",
}


@pytest.mark.parametrize(
    ("damage", "frames"),
    [
        *((damage, 0) for damage in ("other weights", "too few weights", "no plan", "another digest")),
        *((damage, 2) for damage in ("other weights", "too few weights", "no plan", "no frame", "a frame too few")),
    ],
)
def test_damaged_model_is_reported_and_left_out(life, damage, frames):
    with life.disk() as (held, _):
        held.keep(life.received, None)
        for _ in range(frames):
            held.keep(*life.change())
    life.damage(DAMAGES[damage])
    with capture_logs() as logs:
        assert life.loaded() is None
    assert [line["log_level"] for line in logs] == ["warning"]
    assert life.loaded() is None
    with life.disk() as (held, _):
        held.keep(*life.change())
    life.assert_loaded()


def test_model_of_another_task_is_dropped(life):
    with life.disk() as (held, _):
        held.keep(life.received, None)
    with life.disk(manifest_of({"other": np.zeros(3, np.float32)})) as (held, _):
        assert held.load() is None
    assert life.loaded() is None


def test_transaction_that_fails_leaves_what_was_kept(life):
    def fail():
        with life.disk() as (held, outbox), outbox.transaction():
            held.load()
            outbox.set_held_model(None)
            raise ZeroDivisionError

    with life.disk() as (held, _):
        held.keep(life.received, None)
        held.keep(*life.change())
    with pytest.raises(ZeroDivisionError):
        fail()
    life.assert_loaded()


async def test_unkept_changes_gather_until_they_are_taken(life):
    unkept = Unkept(most_bytes=5000)
    assert unkept.take() is None
    unkept.add(Progress(life.received, (), is_anew=True))
    assert unkept.take() == (life.received, None)
    unkept.add(Progress(life.received, (), is_anew=False))
    assert unkept.take() is None
    for body in (b"1", b"2"):
        unkept.add(Progress(life.received, (body,), is_anew=False))
    assert unkept.take() == (life.received, [b"1", b"2"])
    unkept.add(Progress(life.received, (bytes(3000),), is_anew=False))
    unkept.add(Progress(life.received, (bytes(3000),), is_anew=False))
    unkept.add(Progress(life.received, (b"3",), is_anew=False))
    assert unkept.take() == (life.received, None)
    assert unkept.take() is None
