import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from broker_fl.errors import ConfigurationError, DataError
from broker_fl.tasks.npz import inspect, npz

PNEUMONIA = Path(__file__).parents[3] / ".." / "shared" / "data" / "pneumoniamnist.npz"


def _arrays(**changed):
    arrays = {
        "train_images": np.full((6, 9, 8, 3), 7, np.uint8),
        "train_labels": np.array([[0], [1], [2], [0], [1], [2]], dtype=np.uint8),
        "test_images": np.zeros((4, 9, 8, 3), np.uint8),
        "test_labels": np.array([0, 1, 2, 4]),
    }
    return arrays | changed


@pytest.fixture
def path(tmp_path):
    np.savez_compressed(tmp_path / "data.npz", **_arrays())
    return tmp_path / "data.npz"


def test_images_and_labels_are_read(path):
    train, test = npz().train_examples(path), npz().test_examples(path)
    assert train.inputs.shape == (6, 3, 9, 8)
    assert train.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert test.targets.tolist() == [0, 1, 2, 4]


def test_shape_and_classes_come_from_the_file(path):
    assert inspect(path) == ((3, 9, 8), 5)
    assert npz().build_model(path)(torch.zeros(2, 3, 9, 8)).shape == (2, 5)


def test_what_is_given_goes_before_what_the_file_says(path):
    assert npz(classes=7).build_model(path)(torch.zeros(2, 3, 9, 8)).shape == (2, 7)
    assert npz(classes=7, image_shape=(1, 28, 28)).build_model(None)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_the_images_are_not_unpacked_for_their_shape(path, tmp_path):
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "cut.npz", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[:150] if name == "train_images.npy" else content)
    assert inspect(tmp_path / "cut.npz") == ((3, 9, 8), 5)
    with pytest.raises(DataError, match=r"cut.npz cannot be read as a .npz archive"):
        npz().train_examples(tmp_path / "cut.npz")


def test_without_data_the_flag_is_named():
    for call in (npz().build_model, npz().train_examples):
        with pytest.raises(ConfigurationError, match="--data PATH"):
            call(None)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*absent.npz"):
        npz().train_examples(tmp_path / "absent.npz")


@pytest.mark.parametrize("content", [b"", b"certainly not an archive", b"PK\x03\x04 hardly one either"])
def test_other_bytes_are_a_data_error(tmp_path, content):
    file = tmp_path / "other.npz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"other.npz cannot be read as a .npz archive") as caught:
        npz().train_examples(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_truncated_archive_is_a_data_error(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="cannot be read"):
        npz().train_examples(path)


def test_damaged_contents_are_a_data_error(path):
    content = bytearray(path.read_bytes())
    content[120:140] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        npz().train_examples(path)


def test_a_single_array_is_a_data_error(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match="holds a single array"):
        npz().train_examples(tmp_path / "one.npy")


def test_missing_keys_are_named_with_what_is_there(tmp_path):
    np.savez(tmp_path / "data.npz", train_images=np.zeros(1), x=np.zeros(1))
    with pytest.raises(DataError, match="lacks train_labels, test_images, test_labels; it has train_images, x"):
        npz().train_examples(tmp_path / "data.npz")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "data.npz", **_arrays(train_labels=np.array([{}], dtype=object)))
    for call in (npz().train_examples, npz().build_model):
        with pytest.raises(DataError, match="cannot be read"):
            call(tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({"train_images": np.zeros((6, 9, 8))}, {}, "train_images must be uint8"),
        ({"train_images": np.zeros((6, 72), np.uint8)}, {}, r"\(train\): images must be \(n, height, width\)"),
        ({"train_labels": np.zeros(5, int)}, {}, r"labels must be \(6,\) or \(6, 1\)"),
        ({"train_labels": np.zeros(6)}, {}, "labels must be integers"),
        ({"train_labels": np.arange(6) - 1}, {}, "labels must count from 0"),
        ({}, {"classes": 2}, r"labels must be in 0..1 for 2 classes; the highest is 2"),
        ({}, {"image_shape": (1, 9, 8)}, r"images are \(3, 9, 8\), but the task says \(1, 9, 8\)"),
    ],
)
def test_what_does_not_fit_is_a_data_error(tmp_path, changed, settings, message):
    np.savez(tmp_path / "data.npz", **_arrays(**changed))
    with pytest.raises(DataError, match=message):
        npz(**settings).train_examples(tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((6, 72), np.uint8)}, "train_images must be uint8, "),
        ({"train_labels": np.zeros(6, int), "test_labels": np.zeros(4, int)}, "fewer than two classes"),
    ],
)
def test_a_model_cannot_be_built_from_what_does_not_fit(tmp_path, changed, message):
    np.savez(tmp_path / "data.npz", **_arrays(**changed))
    with pytest.raises(DataError, match=message):
        npz().build_model(tmp_path / "data.npz")


def test_medmnist_is_read_as_it_is_published():
    if not PNEUMONIA.is_file():
        pytest.skip("needs pneumoniamnist.npz in ../shared/data")
    assert inspect(PNEUMONIA) == ((1, 28, 28), 2)
    train, test = npz().train_examples(PNEUMONIA), npz().test_examples(PNEUMONIA)
    assert (len(train), len(test)) == (4708, 624)
    assert train.targets.bincount()[0] == 1214
