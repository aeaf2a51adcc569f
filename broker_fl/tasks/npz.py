"""Images and labels in one NumPy archive, as MedMNIST publishes them: a task for data of one's own without any code."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile

from broker_fl.errors import ConfigurationError, DataError
from broker_fl.tasks.image_classification import BuildModel, ImageArrays, ImageClassification, ImageShape, Split
from broker_fl.tasks.models import small_cnn

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
"""Images are uint8, (n, height, width) or (n, height, width, channels); labels are integers, (n,) or (n, 1)."""


def npz(
    model: BuildModel = small_cnn, *, classes: int | None = None, image_shape: ImageShape | None = None
) -> ImageClassification:
    """`data` is the file. Where parties may lack a class, `classes` must be given, or their models would differ."""
    return ImageClassification(
        load=_load, model=model, classes=classes, image_shape=image_shape, inspect=partial(inspect, classes=classes)
    )


def inspect(data: Path | None, *, classes: int | None = None) -> tuple[ImageShape, int]:
    """Image shape and number of classes, without unpacking the images: their shape stands in a header."""
    with _opened(data) as archive:
        shape = _image_shape(archive, source=f"{data}: train_images")
        if classes is not None:
            return shape, classes
        labels = [archive["train_labels"], archive["test_labels"]]
    highest = max((int(split.max()) for split in labels if split.size), default=0)
    if highest < 1:
        raise DataError(f"{data}: fewer than two classes in train_labels and test_labels; say how many there are")
    return shape, highest + 1


def _load(data: Path | None, split: Split) -> ImageArrays:
    with _opened(data) as archive:
        images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    if images.dtype != np.uint8:
        raise DataError(f"{data}: {split}_images must be uint8; got {images.dtype}")
    return ImageArrays(images=images, labels=labels, source=f"{data} ({split})")


@contextmanager
def _opened(data: Path | None) -> Iterator[NpzFile]:
    """The archive with all its keys; whatever goes wrong with the bytes inside the `with` is a DataError."""
    if data is None:
        raise ConfigurationError("the task npz needs a file: give --data PATH")
    if not data.is_file():
        raise DataError(f"there is no file {data}")
    try:
        # Opened here, since np.load leaves a file of its own open when the archive is damaged.
        with data.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, NpzFile):
                raise DataError(f"{data} holds a single array; a .npz archive with {', '.join(KEYS)} was expected")
            if missing := [key for key in KEYS if key not in archive.files]:
                raise DataError(f"{data} lacks {', '.join(missing)}; it has {', '.join(archive.files) or 'nothing'}")
            with archive:
                yield archive
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        reason = " ".join(str(exc).split())
        raise DataError(f"{data} cannot be read as a .npz archive: {reason}") from exc


def _image_shape(archive: NpzFile, *, source: str) -> ImageShape:
    with cast("zipfile.ZipFile", archive.zip).open("train_images.npy") as member:
        read_header = npy.read_array_header_1_0 if npy.read_magic(member) == (1, 0) else npy.read_array_header_2_0
        shape, _is_fortran, dtype = read_header(member)
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise DataError(f"{source} must be uint8, (n, height, width) or (n, height, width, channels); got {dtype} {shape}")
    _count, height, width, *channels = shape
    return (channels[0] if channels else 1, height, width)
