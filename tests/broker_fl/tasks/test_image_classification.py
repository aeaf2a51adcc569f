import numpy as np
import pytest
import torch

from broker_fl.errors import DataError
from broker_fl.tasks.image_classification import ImageArrays, ImageClassification, crop_and_flip


def _task(images, labels, **settings):
    return ImageClassification(load=lambda _data, _split: ImageArrays(images=images, labels=labels), **settings)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greyscale_and_colour_images_become_channels_first():
    grey = _task(np.zeros((2, 5, 6), np.uint8), np.array([0, 1])).train_examples(None)
    images = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    colour = _task(images, np.array([[0], [1]], dtype=np.uint8)).test_examples(None)
    assert grey.inputs.shape == (2, 1, 5, 6)
    assert colour.inputs.shape == (2, 3, 5, 6)
    assert colour.inputs[1, 2, 3, 4] == images[1, 3, 4, 2]
    assert colour.inputs.dtype == torch.uint8
    assert colour.targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 5), np.uint8), np.array([0, 1]), r"images must be \(n, height, width\)"),
        (np.zeros((0, 5, 5), np.uint8), np.array([], dtype=int), r"images must be \(n, height, width\)"),
        (np.zeros((2, 5, 5), np.int64), np.array([0, 1]), "images must be uint8, or floats"),
        (np.zeros((2, 5, 5), np.uint8), np.array([0, 1, 2]), r"labels must be \(2,\) or \(2, 1\)"),
        (np.zeros((2, 5, 5), np.uint8), np.array([0.0, 1.0]), "labels must be integers"),
        (np.zeros((2, 5, 5), np.uint8), np.array([0, -1]), "labels must count from 0; the lowest is -1"),
        (np.zeros((2, 5, 5), np.uint8), np.array([0, 3]), r"labels must be in 0..2 for 3 classes; the highest is 3"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, 1]), r"images are \(1, 4, 4\), but the task says \(1, 5, 5\)"),
    ],
)
def test_data_that_cannot_be_is_refused(images, labels, message):
    task = _task(images, labels, image_shape=(1, 5, 5), classes=3)
    with pytest.raises(DataError, match=message):
        task.train_examples(None)


def test_pixels_are_normalised_per_channel():
    task = _task(None, None, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    prepared = task.prepare(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), None)
    assert prepared.dtype == torch.float32
    assert prepared.flatten().tolist() == [1.0, 1.0, 0.0]
    assert torch.equal(task.prepare(torch.ones(1, 3, 1, 1), None), prepared)


def test_only_colour_images_are_augmented_and_only_with_a_generator():
    task = _task(None, None, mean=(0.0,), std=(1.0,))
    colour = torch.rand(8, 3, 16, 16)
    grey = torch.rand(8, 1, 16, 16)
    assert torch.equal(task.prepare(colour, None), colour)
    assert not torch.equal(task.prepare(colour, _generator()), colour)
    assert torch.equal(task.prepare(grey, _generator()), grey)
    assert torch.equal(_task(None, None, mean=(0.0,), std=(1.0,), augment=False).prepare(colour, _generator()), colour)


def test_an_augmented_image_is_a_window_of_the_padded_one_perhaps_mirrored():
    images = torch.randint(1, 256, (64, 3, 10, 12), dtype=torch.uint8, generator=_generator(1))
    changed = crop_and_flip(images, _generator(2))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    found = []
    for before, after in zip(padded, changed, strict=True):
        windows = {
            (top, left, mirrored): before[:, top : top + 10, left : left + 12].flip(2)
            if mirrored
            else before[:, top : top + 10, left : left + 12]
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
        }
        [place] = [place for place, window in windows.items() if torch.equal(window, after)]
        found.append(place)
    tops, lefts, mirrored = zip(*found, strict=True)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 8, 0, 8)
    assert 16 < sum(mirrored) < 48
    assert tops != lefts


def test_augmentation_follows_from_the_generator():
    images = torch.rand(16, 3, 8, 8)
    assert torch.equal(crop_and_flip(images, _generator(3)), crop_and_flip(images, _generator(3)))
    assert not torch.equal(crop_and_flip(images, _generator(3)), crop_and_flip(images, _generator(4)))


def test_shape_and_classes_are_read_off_the_data_if_nobody_says():
    task = _task(np.zeros((3, 9, 7, 3), np.uint8), np.array([0, 4, 2]))
    assert task.build_model(None)(torch.zeros(2, 3, 9, 7)).shape == (2, 5)


def test_loss_is_the_mean_cross_entropy_and_correct_counts_hits():
    task = _task(None, None)
    outputs = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    targets = torch.tensor([0, 1, 1])
    expected = np.mean([np.log(1 + np.exp(-2.0)), np.log(2.0), np.log(1 + np.exp(-5.0))])
    assert task.loss(outputs, targets).item() == pytest.approx(expected, rel=1e-5)
    assert task.correct(outputs, targets) == 2
