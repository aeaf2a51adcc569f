import numpy as np
import pytest
import torch

from broker_fl.tasks import ImageArrays, ImageClassification, ScatteredImages
from broker_fl.tasks.digits import digits
from broker_fl.tasks.evaluation import evaluate
from broker_fl.tasks.models import feature_cnn
from broker_fl.tasks.module import initial
from broker_fl.tasks.npz import npz
from broker_fl.tasks.registry import load_task
from broker_fl.tasks.scattering import scattering
from schemas.frame import TrainingPlan
from workers.trainer import train

CPU = torch.device("cpu")


def test_examples_are_the_features_of_the_prepared_images():
    scattered, images = ScatteredImages(digits()), digits()
    found, expected = scattered.test_examples(None), images.test_examples(None)
    assert found.inputs.shape == (len(expected), 81, 2, 2)
    assert found.inputs.dtype == torch.float32
    assert torch.equal(found.targets, expected.targets)
    torch.testing.assert_close(found.inputs[-3:], scattering(images.prepare(expected.inputs[-3:], None)), rtol=0, atol=1e-5)


def test_features_are_neither_augmented_nor_normalised_again():
    arrays = ImageArrays(images=np.random.default_rng(0).random((4, 9, 8, 3), np.float32), labels=np.array([0, 1, 0, 1]))
    task = ScatteredImages(ImageClassification(load=lambda _data, _split: arrays))
    features = task.train_examples(None).inputs
    assert features.shape == (4, 243, 3, 2)
    assert torch.equal(task.prepare(features, torch.Generator()), features)
    assert torch.equal(task.train_examples(None).inputs, features)


def test_the_model_is_built_for_the_features_even_without_the_images():
    shapes = {name: spec.shape for name, spec in _tensors(ScatteredImages(digits()), None).items()}
    assert shapes == {"out.weight": (10, 324), "out.bias": (10,)}
    known = ScatteredImages(npz(classes=7, image_shape=(3, 17, 31)), feature_cnn)
    assert known.build_model(None)(torch.zeros(2, 243, 5, 8)).shape == (2, 7)


def test_the_shape_of_an_archive_is_read_from_it(tmp_path):
    images, labels = np.zeros((3, 12, 20), np.uint8), np.array([0, 4, 2])
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    assert _tensors(ScatteredImages(npz()), tmp_path / "data.npz")["out.weight"].shape == (5, 81 * 3 * 5)


@pytest.mark.parametrize(("model", "least"), [(None, 0.95), ("feature_cnn", 0.93)])
def test_the_heads_learn_the_digits(model, least):
    task = load_task("digits", features="scattering", model=model)
    module, manifest, vector = initial(task, None, seed=0)
    result = train(
        task,
        module,
        task.train_examples(None),
        base=vector,
        manifest=manifest,
        plan=TrainingPlan(epochs=3, learning_rate=0.05, momentum=0.9),
        device=CPU,
        seed=0,
        should_stop=lambda: False,
    )
    assert result is not None
    found = evaluate(task, module, task.test_examples(None), device=CPU)
    assert found.accuracy > least


def _tensors(task, data):
    return {spec.name: spec for spec in initial(task, data, seed=0)[1].tensors}
