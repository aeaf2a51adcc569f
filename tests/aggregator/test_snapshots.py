import hashlib
import re

import fsspec
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from aggregator.merging.fold import Buffer, Contribution, State
from aggregator.merging.strategies import build_strategy
from aggregator.snapshots import Snapshots, Stored, epoch_of
from broker_fl.codecs.delta import Delta
from broker_fl.config import MergingSettings
from broker_fl.errors import DamagedError, StorageError
from broker_fl.parameters import manifest_of

TENSORS = {
    "features.0.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "features.0.bias": np.array([0.5, -0.0], np.float32),
    "temperature": np.array([np.float32(1e-45)], np.float32),
}
MANIFEST = manifest_of(TENSORS)
MODEL = np.concatenate([tensor.reshape(-1) for tensor in TENSORS.values()])


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(str(tmp_path), MANIFEST)


def vector(seed):
    return np.random.default_rng(seed).standard_normal(MANIFEST.size).astype(np.float32)


def full_state():
    return State(7, MODEL.copy(), Buffer(vector(1), 1 / 3, ("ann", "bob", "ann")), {5: vector(2), 7: vector(3)})


def assert_same(found, expected):
    assert found.version == expected.version
    assert found.model.tobytes() == expected.model.tobytes()
    assert found.model.dtype == np.float32
    assert {version: base.tobytes() for version, base in found.bases.items()} == {
        version: base.tobytes() for version, base in expected.bases.items()
    }
    if expected.buffer is None:
        assert found.buffer is None
    else:
        assert found.buffer.total.tobytes() == expected.buffer.total.tobytes()
        assert found.buffer.weight == expected.buffer.weight
        assert found.buffer.parties == expected.buffer.parties


def test_model_comes_back_to_the_last_bit(snapshots):
    state = State(3, MODEL.copy())
    assert_same(snapshots.read(snapshots.write(state, seq=4, ledger="ab" * 16, epoch=3)), state)


def test_buffer_and_bases_come_back_to_the_last_bit(snapshots):
    state = full_state()
    assert_same(snapshots.read(snapshots.write(state, seq=9, ledger="ab" * 16, epoch=3)), state)


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff", "fedavg"])
def test_state_that_was_read_can_be_merged_into(snapshots, strategy):
    # Strategies work in place, so that no array may be read-only.
    fold = build_strategy(MergingSettings(strategy=strategy, buffer_size=9))
    state = State(7, MODEL.copy(), None if strategy == "fedasync" else Buffer(vector(1), 2.0, ("ann",)))
    read = snapshots.read(snapshots.write(state, seq=9, ledger="ab" * 16, epoch=3))
    fold.apply(read, Contribution("bob", Delta(MANIFEST.size, vector(4)), 7, 10))


def test_any_tool_finds_the_models_own_names_in_the_file(snapshots, tmp_path):
    stored = snapshots.write(full_state(), seq=9, ledger="ab" * 16, epoch=3)
    tensors = load_file(tmp_path / stored.file)
    for name, tensor in TENSORS.items():
        assert np.array_equal(tensors[name], tensor)
        assert tensors[name].shape == tensor.shape
    with safe_open(tmp_path / stored.file, framework="np") as opened:
        assert opened.metadata()["version"] == "7"


def test_file_is_named_after_its_version_and_entry(snapshots):
    files = [snapshots.write(full_state(), seq=9, ledger="ab" * 16, epoch=3).file for _ in range(2)]
    for file in files:
        assert re.fullmatch(r"model-abababab-v00000007-s00000009-e0003-[0-9a-f]{8}\.safetensors", file)
        assert epoch_of(file) == 3
    assert files[0] != files[1]
    assert snapshots.files("ab" * 16) == sorted(files)
    assert snapshots.files("cd" * 16) == []


def test_no_half_written_file_is_left(snapshots, tmp_path):
    stored = snapshots.write(full_state(), seq=9, ledger="ab" * 16, epoch=3)
    assert [file.name for file in tmp_path.iterdir()] == [stored.file]


def _missing(file):
    file.unlink()


def _truncated(file):
    file.write_bytes(file.read_bytes()[:-40])


def _empty(file):
    file.write_bytes(b"")


def _one_bit_off(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_missing, _truncated, _empty, _one_bit_off])
def test_damaged_snapshot_is_named(snapshots, tmp_path, damage):
    stored = snapshots.write(full_state(), seq=9, ledger="ab" * 16, epoch=3)
    damage(tmp_path / stored.file)
    with pytest.raises(
        DamagedError, match=r"model-abababab-v00000007-s00000009-e0003-\w{8}\.safetensors.*restore it from a backup"
    ):
        snapshots.read(stored)


def test_file_of_another_kind_with_the_right_digest_is_damaged(snapshots, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DamagedError, match=r"model\.safetensors is not a safetensors file"):
        snapshots.read(Stored("model.safetensors", hashlib.sha256(b"not tensors").hexdigest()))


def test_snapshot_in_the_place_of_a_folder_is_a_storage_error(snapshots, tmp_path):
    stored = snapshots.write(full_state(), seq=9, ledger="ab" * 16, epoch=3)
    (tmp_path / stored.file).unlink()
    (tmp_path / stored.file).mkdir()
    with pytest.raises(StorageError, match=r"model-abababab-v00000007"):
        snapshots.read(stored)


def test_folder_that_cannot_be_written_is_a_storage_error_that_names_the_file(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"file/model-abababab-v00000007-s00000009-e0003-\w{8}\.safetensors"):
        Snapshots(str(tmp_path / "file"), MANIFEST).write(full_state(), seq=9, ledger="ab" * 16, epoch=3)


def test_url_of_fsspec_is_written_and_read():
    root = "memory://federation/snapshots"
    snapshots = Snapshots(root + "/", MANIFEST)
    stored = snapshots.write(full_state(), seq=9, ledger="ab" * 16, epoch=3)
    try:
        assert_same(snapshots.read(stored), full_state())
        with fsspec.open(f"{root}/{stored.file}", "wb") as file:
            file.write(b"something else")
        with pytest.raises(DamagedError, match=r"memory://federation/snapshots/model-abababab-v00000007"):
            snapshots.read(stored)
    finally:
        fsspec.filesystem("memory").rm("/federation", recursive=True)
    with pytest.raises(DamagedError, match="is missing"):
        snapshots.read(stored)
