import numpy as np
import torch

from broker_fl.tasks.digits import digits


def test_one_image_in_five_of_each_class_is_for_testing():
    task = digits()
    train, test = task.train_examples(None), task.test_examples(None)
    assert len(train) + len(test) == 1797
    counts = np.bincount(torch.cat([train.targets, test.targets]).numpy())
    assert np.bincount(test.targets.numpy()).tolist() == [-(-count // 5) for count in counts]


def test_the_split_is_the_same_every_time_and_shares_no_image():
    first, second = digits().test_examples(None), digits().test_examples(None)
    assert torch.equal(first.inputs, second.inputs)
    train = {image.numpy().tobytes() for image in digits().train_examples(None).inputs}
    assert not train & {image.numpy().tobytes() for image in first.inputs}


def test_prepared_pixels_have_about_zero_mean_and_unit_variance():
    task = digits()
    prepared = task.prepare(task.train_examples(None).inputs, None)
    assert abs(prepared.mean().item()) < 0.02
    assert abs(prepared.std().item() - 1) < 0.02
