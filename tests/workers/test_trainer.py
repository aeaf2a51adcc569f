from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn

from broker_fl.errors import ConfigurationError, DataError, ManifestMismatchError
from broker_fl.tasks import Examples
from broker_fl.tasks.evaluation import evaluate
from broker_fl.tasks.module import initial, manifest_of_module, vector_of
from broker_fl.tasks.registry import load_task
from schemas.frame import TrainingPlan
from workers.trainer import train

CPU = torch.device("cpu")


class Line:
    """One weight, loss (w * x - y)^2 / 2: every step can be followed by hand. Counts the batches it is shown."""

    def __init__(self, layers=None):
        self.layers = layers
        self.batches = []
        self.generators = []

    def build_model(self, data):
        return self.layers() if self.layers else nn.Linear(1, 1, bias=False)

    def prepare(self, inputs, generator):
        self.batches.append(inputs.flatten().tolist())
        self.generators.append(generator)
        return inputs

    def loss(self, outputs, targets):
        return ((outputs.squeeze(1) - targets) ** 2).mean() / 2


def _line_examples(count):
    return Examples(inputs=torch.arange(1.0, count + 1).view(count, 1), targets=torch.zeros(count, dtype=torch.int64))


def _train(task, examples, *, module=None, base=None, seed=0, should_stop=lambda: False, **plan):
    if module is None:
        module, _, _ = initial(task, None, seed=0)
    base = vector_of(module) if base is None else np.asarray(base, dtype=np.float32)
    options = {key: plan.pop(key) for key in ("precision", "channels_last") if key in plan}
    return train(
        task,
        module,
        examples,
        base=base,
        manifest=manifest_of_module(module),
        plan=TrainingPlan(**plan),
        device=CPU,
        seed=seed,
        should_stop=should_stop,
        **options,
    )


@pytest.fixture(scope="module")
def digits():
    task = load_task("digits", model="federated_cnn")
    return task, task.train_examples(None).take(torch.arange(48))


def test_one_step_of_sgd_is_the_gradient_times_the_rate():
    result = _train(Line(), _line_examples(1), base=[2.0], learning_rate=0.1, momentum=0.0)
    assert result.delta.dtype == np.float32
    assert result.delta == pytest.approx([-0.1 * 2.0])
    assert result.mean_loss == pytest.approx(2.0)
    assert (result.num_samples, result.num_steps) == (1, 1)


def test_momentum_and_weight_decay_are_used():
    result = _train(Line(), _line_examples(1), base=[2.0], epochs=2, learning_rate=0.1, momentum=0.5, weight_decay=1.0)
    first = 2.0 + 2.0
    second = 0.5 * first + 2 * (2.0 - 0.1 * first)
    assert result.delta == pytest.approx([-0.1 * (first + second)])


@pytest.mark.parametrize(("optimizer", "expected"), [("adam", -0.1), ("adamw", -0.1 - 0.1 * 0.5 * 2.0)])
def test_the_first_step_of_adam_is_the_rate_and_adamw_decays_apart_from_it(optimizer, expected):
    result = _train(Line(), _line_examples(1), base=[2.0], optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    assert result.delta == pytest.approx([expected], rel=1e-4)


def test_the_proximal_term_pulls_back_to_the_base():
    result = _train(Line(), _line_examples(1), base=[2.0], epochs=2, learning_rate=0.1, momentum=0.0, proximal=3.0)
    first = -0.1 * 2.0
    second = first - 0.1 * ((2.0 + first) + 3.0 * first)
    assert result.delta == pytest.approx([second])


def test_a_stronger_pull_means_a_shorter_way(digits):
    task, examples = digits
    free, held = (_train(task, examples, epochs=2, proximal=mu) for mu in (0.0, 10.0))
    assert np.linalg.norm(held.delta) < np.linalg.norm(free.delta)


def test_an_epoch_shows_each_example_once_and_epochs_are_shuffled_anew():
    task = Line()
    result = _train(task, _line_examples(10), epochs=2, batch_size=4, learning_rate=1e-6)
    assert [len(batch) for batch in task.batches] == [4, 4, 2] * 2
    first, second = list(chain(*task.batches[:3])), list(chain(*task.batches[3:]))
    assert sorted(first) == sorted(second) == list(range(1, 11))
    assert first != second
    assert result.num_steps == 6


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_steps_go_over_the_data_as_often_as_it_takes(steps):
    task = Line()
    result = _train(task, _line_examples(10), epochs=50, steps=steps, batch_size=4, learning_rate=1e-6)
    assert result.num_steps == len(task.batches) == steps
    assert result.num_samples == 10


def test_the_mean_loss_counts_each_example_alike():
    result = _train(Line(), _line_examples(5), base=[1.0], batch_size=4, learning_rate=1e-9)
    assert result.mean_loss == pytest.approx(np.mean([n**2 / 2 for n in range(1, 6)]), rel=1e-5)


def test_batches_are_prepared_with_a_generator_so_that_they_are_augmented():
    task = Line()
    _train(task, _line_examples(3))
    assert isinstance(task.generators[0], torch.Generator)


def test_the_delta_leads_from_the_base_to_the_trained_model_with_its_statistics(digits):
    task, examples = digits
    module, manifest, base = initial(task, None, seed=0)
    result = _train(task, examples, module=module, epochs=1)
    assert np.array_equal(result.delta, vector_of(module) - base)
    for spec in manifest.tensors:
        assert np.any(result.delta[spec.offset : spec.offset + spec.size]), spec.name


def test_the_module_starts_from_the_base_and_not_from_what_it_held(digits):
    task, examples = digits
    module, _, base = initial(task, None, seed=0)
    first = _train(task, examples, module=module, base=base)
    again = _train(task, examples, module=module, base=base)
    assert first.delta.tobytes() == again.delta.tobytes()


@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16"}, {"channels_last": True}])
def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator(digits, options):
    task, examples = digits
    before = torch.get_rng_state()
    first = _train(task, examples, seed=7, **options)
    torch.set_rng_state(before)
    torch.rand(5)
    moved = torch.get_rng_state()
    second = _train(task, examples, seed=7, **options)
    assert torch.equal(torch.get_rng_state(), moved)
    assert first.delta.tobytes() == second.delta.tobytes()
    assert first.mean_loss == second.mean_loss
    assert first.delta.tobytes() != _train(task, examples, seed=8, **options).delta.tobytes()


def test_dropout_follows_the_seed_even_where_the_order_cannot_matter():
    task = Line(layers=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False)))
    deltas = {_train(task, _line_examples(1), base=[1.0], steps=8, seed=seed).delta.item() for seed in range(6)}
    assert len(deltas) > 1


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"channels_last": True}])
def test_precision_and_layout_change_the_way_and_not_the_goal(digits, options):
    task, examples = digits
    task = load_task("digits")
    plain, other = _train(task, examples, steps=3), _train(task, examples, steps=3, **options)
    cosine = plain.delta @ other.delta / np.linalg.norm(plain.delta) / np.linalg.norm(other.delta)
    assert cosine > 0.99


def test_stopping_is_heard_before_every_batch():
    for allowed in range(3):
        task = Line()
        answers = iter([False] * allowed + [True] * 9)
        assert _train(task, _line_examples(12), batch_size=4, should_stop=lambda: next(answers)) is None  # noqa: B023
        assert len(task.batches) == allowed


def test_stopping_after_the_last_batch_is_too_late():
    answers = iter([False] * 3 + [True])
    assert _train(Line(), _line_examples(12), batch_size=4, should_stop=lambda: next(answers)) is not None


def _normed():
    return nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))


def test_a_last_batch_of_one_is_left_out_under_batch_norm_only():
    normed, plain = Line(layers=_normed), Line()
    assert _train(normed, _line_examples(9), epochs=2, batch_size=4).num_steps == 4
    assert [len(batch) for batch in normed.batches] == [4, 4, 4, 4]
    assert _train(plain, _line_examples(9), batch_size=4).num_steps == 3


def test_steps_too_leave_out_a_last_batch_of_one():
    normed = Line(layers=_normed)
    _train(normed, _line_examples(9), steps=3, batch_size=4)
    assert [len(batch) for batch in normed.batches] == [4, 4, 4]


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (9, 1)])
def test_batch_norm_cannot_learn_from_single_examples(count, batch_size):
    with pytest.raises(ConfigurationError, match="batches of 2 or more"):
        _train(Line(layers=_normed), _line_examples(count), batch_size=batch_size)


def test_no_examples_are_a_data_error():
    with pytest.raises(DataError, match="no examples"):
        _train(Line(), _line_examples(0))


def test_another_models_base_is_refused():
    task = Line()
    module, _, _ = initial(task, None, seed=0)
    with pytest.raises(ManifestMismatchError):
        train(
            task,
            module,
            _line_examples(2),
            base=np.zeros(2, np.float32),
            manifest=manifest_of_module(nn.Linear(1, 1)),
            plan=TrainingPlan(),
            device=CPU,
            seed=0,
            should_stop=lambda: False,
        )


def test_a_diverged_training_is_returned_as_it_is():
    result = _train(Line(), _line_examples(4), base=[1.0], epochs=40, learning_rate=100.0)
    assert not np.isfinite(result.delta).all()
    assert not np.isfinite(result.mean_loss)


def test_a_frozen_parameter_stays_where_it_is():
    task = Line()
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module[0].requires_grad_(False)
    result = _train(task, _line_examples(4), module=module, proximal=0.1, weight_decay=0.1)
    assert result.delta[:2].tolist() == [0.0, 0.0]
    assert np.any(result.delta[2:])


def test_training_learns_digits():
    task = load_task("digits")
    module, manifest, base = initial(task, None, seed=0)
    train(
        task,
        module,
        task.train_examples(None),
        base=base,
        manifest=manifest,
        plan=TrainingPlan(epochs=3),
        device=CPU,
        seed=0,
        should_stop=lambda: False,
    )
    assert evaluate(task, module, task.test_examples(None), device=CPU).accuracy > 0.93
