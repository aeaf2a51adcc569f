"""Data sets that torchvision can fetch."""

from pathlib import Path
from typing import Protocol

from broker_fl.errors import DataError

CACHE = Path("~/.cache/broker-fl")
"""Where they are kept if `--data` does not say."""


class _Dataset(Protocol):
    """What `torchvision.datasets.CIFAR10` and `FashionMNIST` are: classes that are called like this."""

    def __call__(self, root: Path, *, train: bool, download: bool) -> "Loaded": ...


class Loaded(Protocol):
    """A loaded split: `data`, `targets`; arrays, tensors or lists, as the data set likes it."""

    @property
    def data(self) -> object: ...

    @property
    def targets(self) -> object: ...


def fetch(dataset: _Dataset, *, data: Path | None, train: bool, files: str) -> Loaded:
    """The split from the folder `data`, downloaded into it if it is not there.

    Raises DataError if it can't be had; `files` says what should lie in the folder.
    """
    root = data if data is not None else CACHE.expanduser()
    try:
        return dataset(root, train=train, download=False)
    except (RuntimeError, OSError, ValueError):
        # Missing or damaged; which of them, torchvision does not say. The download checks what is there by its MD5.
        pass
    try:
        return dataset(root, train=train, download=True)
    except (RuntimeError, OSError, ValueError, EOFError) as exc:
        reason = " ".join(str(exc).split())
        raise DataError(
            f"{files} are not in {root}, and downloading them failed ({type(exc).__name__}: {reason});"
            f" put them there, or name their folder with --data PATH"
        ) from exc
