import sqlite3

import pytest

from aggregator.opening import open_ledger_for_reading
from aggregator.recovery import manifest_of_ledger
from aggregator.verification import verify
from broker_fl.config import MergingSettings
from broker_fl.errors import ConfigurationError, DamagedError
from broker_fl.signing import payload_digest
from schemas import wire
from schemas.frame import ModelFrame

BOTH = pytest.mark.parametrize("bench", ["sqlite", "postgresql"], indirect=True)


def _verify(bench):
    with open_ledger_for_reading(bench.url) as ledger:
        return verify(ledger, bench.snapshots())


@pytest.fixture
def life(bench):
    """Versions 1 to 6 with frames at even ones and snapshots at 0, 3 and 6; entry 5 is refused. Frame 3 has a keyframe."""
    rules = {"every_versions": 2, "snapshot_every_versions": 3}
    with bench.opened(**rules, down="topk:0.1+int8", keyframe="int8", keyframe_every_frames=2) as coordinator:
        base = bench.frames()[0]
        for seed in range(7):
            changes = {"base_digest": "0" * 64} if seed == 3 else {}
            update = bench.update(base=base, seed=seed, update_id=f"{seed:032x}", **changes)
            coordinator.decide([bench.arrival(update)])
            bench.publish(coordinator)
        bench.model = coordinator.model_digest()
    return bench


@BOTH
def test_honest_ledger_is_verified_and_counted(life):
    found = _verify(life)
    assert (found.entries, found.merged, found.buffered, found.refused) == (8, 6, 0, 1)
    assert (found.version, found.frames, found.snapshots) == (6, 4, 3)
    assert found.model_digest == life.model


@BOTH
def test_ledger_is_verified_while_its_aggregator_works(bench):
    with bench.opened() as coordinator:
        (base,) = bench.frames()
        for seed in range(3):
            coordinator.decide([bench.arrival(bench.update(base=base, seed=seed))])
            assert _verify(bench).model_digest == coordinator.model_digest()


@BOTH
def test_flushes_buffers_and_changes_of_strategy_are_verified(bench):
    with bench.opened(merging=MergingSettings(strategy="fedbuff", buffer_size=2)) as coordinator:
        (base,) = bench.frames()
        coordinator.decide([bench.arrival(bench.update(base=base, seed=seed)) for seed in range(3)])
        bench.clock.now += 100.0
        coordinator.tick()
        coordinator.decide([bench.arrival(bench.update(base=base, seed=3))])
        coordinator.close()
    with bench.opened(merging=MergingSettings(mode="mixing")) as coordinator:
        model = coordinator.model_digest()
    found = _verify(bench)
    assert (found.merged, found.buffered, found.version) == (1, 3, 3)
    assert found.model_digest == model


@BOTH
@pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
def test_noise_of_full_and_early_buffers_is_verified(bench, strategy):
    noisy = MergingSettings(strategy=strategy, buffer_size=2, clip_norm=1.0, noise_multiplier=0.5)
    with bench.opened(merging=noisy) as coordinator:
        for party in ("ann", "bob", "cem"):
            coordinator.decide([bench.arrival(bench.update(party, base=bench.frames()[-1]))])
            bench.publish(coordinator)
        bench.clock.now += 100.0
        coordinator.tick()
        coordinator.decide([bench.arrival(bench.update("ann", base=bench.frames()[-1], seed=3))])
        coordinator.close()
    # A buffer that the noise is left out of from now on gets it still.
    with bench.opened(merging=MergingSettings()) as coordinator:
        model = coordinator.model_digest()
    found = _verify(bench)
    assert (found.merged, found.buffered, found.version) == (1, 3, 3)
    assert found.model_digest == model


@BOTH
def test_lost_body_is_named_where_replay_needs_the_frames_as_bases(bench):
    with bench.opened(merging=MergingSettings(mode="mixing")) as coordinator:
        for seed in range(2):
            coordinator.decide([bench.arrival(bench.update(base=bench.frames()[-1], seed=seed))])
            bench.publish(coordinator)
    bench.execute("DELETE FROM bodies WHERE kind = 'frame' AND number = 3")
    with pytest.raises(DamagedError, match="frame 3 has lost its body"):
        _verify(bench)


def test_empty_ledger_holds_no_federation(bench):
    with bench.ledger() as ledger, pytest.raises(DamagedError, match="holds no federation yet"):
        manifest_of_ledger(ledger)


def test_ledger_that_is_not_there_is_named(bench):
    with pytest.raises(ConfigurationError, match=r"no ledger at .*ledger\.db"):
        _verify(bench)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        # zeroblob is a payload that can be decoded: only its digest, and the models from there on, tell.
        ("UPDATE entries SET payload = zeroblob(length(payload)) WHERE seq = 4", "payload of entry 4"),
        ("UPDATE entries SET payload = substr(payload, 1, 100) WHERE seq = 4", "payload of entry 4"),
        ("UPDATE entries SET payload = NULL WHERE seq = 4", "entry 4 lacks what was merged"),
        ("UPDATE entries SET payload = zeroblob(length(payload)) WHERE seq = 8", "payload of entry 8"),
        ("UPDATE entries SET weight = 0.5 WHERE seq = 4", "entry 4 is not what was written: its hash differs"),
        ("UPDATE entries SET base_version = 1 WHERE seq = 4", "entry 4 is not what was written: its hash differs"),
        ("UPDATE entries SET version = 9 WHERE seq = 4", "entry 4 is not what was written: its hash differs"),
        ("UPDATE entries SET party = 'bob' WHERE seq = 2", "entry 2 is not what was written: its hash differs"),
        ("UPDATE entries SET at = at + 1 WHERE seq = 2", "entry 2 is not what was written: its hash differs"),
        ("UPDATE entries SET detail = 'no' WHERE seq = 5", "entry 5 is not what was written: its hash differs"),
        ("UPDATE entries SET model_digest = 'ab' || substr(model_digest, 3) WHERE seq = 8", "entry 8 is not what was written"),
        ("UPDATE entries SET chain = 'ab' || substr(chain, 3) WHERE seq = 1", "entry 1 is not what was written"),
        ("UPDATE entries SET chain = 'ab' || substr(chain, 3) WHERE seq = 8", "entry 8 is not what was written"),
        ("UPDATE meta SET value = 'war' WHERE key = 'federation'", "entry 1 is not what was written"),
        ("UPDATE meta SET value = 'ab' || substr(value, 3) WHERE key = 'ledger_id'", "entry 1 is not what was written"),
        ("DELETE FROM entries WHERE seq = 4", "entry 4 is missing"),
        ("DELETE FROM entries WHERE seq = 5", "entry 5 is missing"),
        ("DELETE FROM entries WHERE seq = 8", r"frame 4 is of version 6|snapshot model-\w{8}-v00000006.* which is missing"),
        ("UPDATE frames SET digest = 'ab' || substr(digest, 3) WHERE number = 3", "frame 3"),
        ("UPDATE frames SET model_digest = 'ab' || substr(model_digest, 3) WHERE number = 3", "frame 3 was made from another"),
        ("UPDATE frames SET version = 5 WHERE number = 3", "frame 3 was made from another model than its version has"),
        ("UPDATE frames SET version = 7 WHERE number = 4", "frame 4 is of version 7, which replay never made"),
        ("UPDATE frames SET base = 1 WHERE number = 3", "body of frame 3 says something else than its row"),
        ("UPDATE frames SET over = 1 WHERE number = 3", "body of frame 3 says something else than its row"),
        ("UPDATE frames SET rounding = NULL WHERE number = 3", "body of frame 3 says something else than its row"),
        ("UPDATE frames SET codec = 'int4' WHERE number = 1", "body of frame 1 says something else than its row"),
        ("UPDATE frames SET size = size + 1 WHERE number = 3", "frame 3 should count"),
        ("UPDATE frames SET log_bytes = log_bytes + 1 WHERE number = 3", "frame 3 should count"),
        ("DELETE FROM frames WHERE number = 3", "frame 3 has lost its row"),
        ("DELETE FROM bodies WHERE kind = 'frame' AND number = 1", "frame 1 has lost its body"),
        ("DELETE FROM bodies WHERE kind = 'frame' AND number = 3", "frame 3 has lost its body"),
        ("DELETE FROM bodies WHERE kind = 'frame' AND number = 4", "frame 4 has lost its body"),
        ("UPDATE bodies SET body = zeroblob(length(body)) WHERE kind = 'frame' AND number = 1", "body of frame 1 is damaged"),
        ("UPDATE bodies SET body = zeroblob(length(body)) WHERE kind = 'frame' AND number = 3", "body of frame 3 is damaged"),
        ("UPDATE bodies SET body = zeroblob(length(body)) WHERE kind = 'keyframe'", "keyframe of frame 3 is damaged"),
        (
            "UPDATE snapshots SET sha256 = 'ab' || substr(sha256, 3) WHERE version = 3",
            r"model-\w{8}-v00000003-s00000004-e0001-\w{8}\.safetensors",
        ),
        (
            "UPDATE snapshots SET seq = 3 WHERE version = 3",
            r"snapshot model-\w{8}-v00000003-s00000004-e0001-\w{8}\.safetensors",
        ),
    ],
)
def test_ledger_that_was_changed_is_found_out(life, statement, message):
    life.execute(statement)
    with pytest.raises(DamagedError, match=message):
        _verify(life)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE entries SET weight = 0.5 WHERE seq = 4", "entry 4 was not merged as it says"),
        ("UPDATE entries SET staleness = 5 WHERE seq = 4", "entry 4 was not merged as it says"),
        ("UPDATE entries SET outcome = 'buffered' WHERE seq = 4", "entry 4 was not merged as it says"),
        ("UPDATE entries SET base_version = 1 WHERE seq = 4", "entry 4 was not merged as it says"),
        ("UPDATE entries SET base_version = NULL WHERE seq = 4", "entry 4 lacks what was merged"),
        ("UPDATE entries SET codec = 'int3' WHERE seq = 4", "payload of entry 4 is damaged"),
        ("UPDATE entries SET version = 9 WHERE seq = 4", "entry 4 should make version 9, not 3"),
        ("UPDATE entries SET outcome = 'refused' WHERE seq = 4", "entry 4 should make version 3, not 2"),
        ("UPDATE entries SET outcome = 'refused' WHERE seq = 8", "entry 8 should make version 6, not 5"),
        ("UPDATE entries SET model_digest = 'ab' || substr(model_digest, 3) WHERE seq = 1", "entry 1 says another model than"),
        ("UPDATE entries SET model_digest = 'ab' || substr(model_digest, 3) WHERE seq = 4", "entry 4 says another model than"),
        (
            "UPDATE entries SET model_digest = 'ab' || substr(model_digest, 3) WHERE seq = 5",
            "entry 5 says another model than the entry before it, and changed none",
        ),
        ("UPDATE entries SET payload_digest = 'ab' || substr(payload_digest, 3) WHERE seq = 4", "payload of entry 4 differs"),
    ],
)
def test_ledger_that_was_changed_with_its_hash_chain_is_found_out_where_replay_makes_something_else(life, statement, message):
    life.forge(statement)
    with pytest.raises(DamagedError, match=message):
        _verify(life)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET train_loss = 0.1 WHERE seq = 4",
        "UPDATE entries SET party = 'bob' WHERE seq = 4",
        "UPDATE entries SET at = at + 1 WHERE seq = 8",
    ],
)
def test_chain_tells_whoever_noted_it_down_what_replay_cannot(life, statement):
    before = _verify(life)
    life.forge(statement)
    after = _verify(life)
    assert after.model_digest == before.model_digest
    assert after.chain != before.chain


def test_payload_that_was_forged_with_its_digest_and_chain_is_found_out_by_the_model(life):
    payload = next(entry.payload for entry in life.entries() if entry.seq == 4)
    other = payload_digest(bytes(len(payload)))
    life.forge(f"UPDATE entries SET payload = zeroblob({len(payload)}), payload_digest = '{other}' WHERE seq = 4")
    with pytest.raises(DamagedError, match="entry 4 says another model than replay makes of version 3"):
        _verify(life)


def test_chain_of_the_last_entry_is_what_verification_gives(life):
    assert _verify(life).chain == life.entries()[-1].chain


def test_keyframe_beside_the_whole_model_of_the_same_frame_is_verified_too(bench):
    with bench.opened():
        pass
    bench.execute("UPDATE bodies SET body = zeroblob(length(body)) WHERE kind = 'keyframe' AND number = 1")
    with pytest.raises(DamagedError, match="keyframe of frame 1 is damaged"):
        _verify(bench)


@pytest.mark.parametrize(
    ("kind", "number", "changes", "message"),
    [
        ("frame", 4, {"payload": None}, "frame 4 decodes to another model"),
        ("frame", 3, {"number": 4}, "body of frame 3 is damaged: it says that it changes frame 2 to 4"),
        ("frame", 3, {"base": 1}, "body of frame 3 is damaged: it says that it changes frame 1 to 3"),
        ("frame", 2, {"payload": b""}, "frame 2 decodes to another model"),
        ("frame", 4, {"rounding": "int8"}, "frame 4 decodes to another model"),
        ("frame", 3, {"codec": "topk:0.1+int4"}, "body of frame 3 is damaged"),
        ("frame", 3, {"digest": "0" * 64}, "body of frame 3 says something else than its row"),
        ("frame", 1, {"over": True}, "body of frame 1 says something else than its row"),
        ("frame", 4, {"log_bytes": 7}, "body of frame 4 says something else than its row"),
        ("keyframe", 3, {"payload": None}, "keyframe of frame 3 decodes to another model"),
    ],
)
def test_body_that_can_be_read_and_is_not_what_was_sent_is_named(life, kind, number, changes, message):
    connection = sqlite3.connect(life.ledger_file)
    try:
        where = "kind = ? AND number = ?"
        (body,) = connection.execute(f"SELECT body FROM bodies WHERE {where}", (kind, number)).fetchone()
        frame = wire.decode(ModelFrame, body)
        # One value is another one: everything can still be decoded.
        changes = {
            name: frame.payload[:-1] + bytes([frame.payload[-1] ^ 1]) if new is None else new for name, new in changes.items()
        }
        body = wire.encode(frame.model_copy(update=changes))
        connection.execute(f"UPDATE bodies SET body = ? WHERE {where}", (body, kind, number))
        connection.commit()
    finally:
        connection.close()
    with pytest.raises(DamagedError, match=message):
        _verify(life)


def test_snapshot_file_that_was_swapped_for_another_is_found_out(life):
    life.snapshot(3).write_bytes(life.snapshot(6).read_bytes())
    with pytest.raises(DamagedError, match=f"{life.snapshot(3).name} is damaged"):
        _verify(life)


def test_snapshot_that_was_swapped_with_its_row_is_found_out(life):
    life.execute(
        "UPDATE snapshots SET file = (SELECT file FROM snapshots WHERE version = 6), "
        "sha256 = (SELECT sha256 FROM snapshots WHERE version = 6) WHERE version = 3",
    )
    with pytest.raises(DamagedError, match=f"snapshot {life.snapshot(6).name} is not of version 3"):
        _verify(life)


def test_missing_snapshot_is_named_though_the_newest_would_do(life):
    missing = life.snapshot(3)
    missing.unlink()
    with pytest.raises(DamagedError, match=f"{missing.name} is missing"):
        _verify(life)
