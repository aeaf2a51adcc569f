import gzip
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from broker_fl.errors import DataError
from broker_fl.tasks.cifar10 import cifar10
from broker_fl.tasks.downloads import CACHE, fetch
from broker_fl.tasks.fashion_mnist import fashion_mnist

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data" / "FashionMNIST" / "raw"


class _Missing:
    """A torchvision data set that is not there, and can't be had, as on a machine without a network."""

    def __init__(self, *, comes: bool) -> None:
        self.comes = comes
        self.calls = []
        self.data = [[0]]
        self.targets = [0]

    def __call__(self, root, *, train, download):
        self.calls.append((root, train, download))
        if not (download and self.comes):
            raise RuntimeError("Dataset not found.\nUse download=True" if not download else "no\nnetwork")
        return self


def test_what_is_missing_is_downloaded(tmp_path):
    dataset = _Missing(comes=True)
    assert fetch(dataset, data=tmp_path, train=True, files="it") is dataset
    assert dataset.calls == [(tmp_path, True, False), (tmp_path, True, True)]


def test_a_failed_download_is_one_line_that_says_where_to_put_the_files(tmp_path):
    with pytest.raises(DataError) as caught:
        fetch(_Missing(comes=False), data=tmp_path, train=False, files="digits/raw")
    assert "\n" not in str(caught.value)
    for part in ("digits/raw", str(tmp_path), "no network", "--data PATH"):
        assert part in str(caught.value)


def test_the_cache_is_used_without_data():
    dataset = _Missing(comes=True)
    fetch(dataset, data=None, train=True, files="it")
    assert dataset.calls[0][0] == CACHE.expanduser()
    assert "~" not in str(dataset.calls[0][0])


@pytest.mark.parametrize("task", [cifar10(), fashion_mnist()])
def test_a_folder_that_cannot_be_made_is_a_data_error(task, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(DataError, match="downloading them failed"):
        task.train_examples(file / "folder")


def test_fashion_mnist_is_read_as_torchvision_keeps_it(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("needs Fashion-MNIST in ../shared/data")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in SHARED.glob("*.gz"):
        with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    task = fashion_mnist()
    train, test = task.train_examples(tmp_path), task.test_examples(tmp_path)
    assert (train.inputs.shape, test.inputs.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert test.targets.bincount().tolist() == [1000] * 10
    prepared = task.prepare(train.inputs[:10_000], None)
    assert abs(prepared.mean().item()) < 0.02
    assert abs(prepared.std().item() - 1) < 0.02


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]}))
    # The real batches are too large to ship and have an official MD5, which is torchvision's to check.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_args: True)
    train = cifar10().train_examples(tmp_path)
    assert train.inputs.shape == (10, 3, 32, 32)
    assert train.inputs[1, 2, 0, 1] == pixels[1, 2 * 1024 + 1]
    assert train.targets.tolist() == [3, 9] * 5
