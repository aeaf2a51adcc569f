import math

import numpy as np
import opacus.layers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from broker_fl.errors import ConfigurationError, DataError, ManifestMismatchError
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks import Examples
from broker_fl.tasks.evaluation import evaluate
from broker_fl.tasks.module import initial, manifest_of_module, vector_of
from broker_fl.tasks.registry import load_task
from broker_fl.tasks.seeding import seeded
from schemas.frame import TrainingPlan
from workers.dp import train_privately
from workers.trainer import train

CPU = torch.device("cpu")
SILENT = 1e-9
"""A noise multiplier of which nothing is seen."""
both = pytest.mark.parametrize("clipping", ["flat", "ghost"])


class Task:
    """Any loss; by default (w * x - y)^2 / 2, whose steps can be followed by hand. Keeps the batches that it was to augment."""

    def __init__(self, loss=None):
        self._loss = loss
        self.batches = []

    def prepare(self, inputs, generator):
        if generator is not None:
            self.batches.append(inputs.flatten().tolist())
        return inputs

    def loss(self, outputs, targets):
        if self._loss is not None:
            return self._loss(outputs, targets)
        return ((outputs.squeeze(1) - targets) ** 2).mean() / 2


class Classes(Task):
    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)


class Indifferent(Task):
    """No example has a gradient: what is learnt is noise."""

    def loss(self, outputs, targets):
        return outputs.mean() * 0


def _line():
    return nn.Linear(1, 1, bias=False)


def _line_examples(*inputs):
    return Examples(inputs=torch.tensor(inputs).view(-1, 1), targets=torch.zeros(len(inputs), dtype=torch.int64))


def _examples(*shape, count=6, classes=3, scale=1.0, words=None):
    generator = torch.Generator().manual_seed(1)
    size = (count, *shape)
    inputs = torch.randint(words, size, generator=generator) if words else scale * torch.randn(size, generator=generator)
    return Examples(inputs=inputs, targets=torch.arange(count) % classes)


def _mechanism(*, noise=SILENT, rate=1.0, steps=1, bound=1.0, clipping="flat"):
    return Mechanism(noise_multiplier=noise, sample_rate=rate, steps=steps, max_grad_norm=bound, clipping=clipping)


def _train(task, module, examples, *, base=None, chunk=None, seed=0, should_stop=lambda: False, plan=None, **of):
    return train_privately(
        task,
        module,
        examples,
        base=vector_of(module) if base is None else np.asarray(base, np.float32),
        manifest=manifest_of_module(module),
        plan=TrainingPlan(**{"learning_rate": 1.0, "momentum": 0.0, **(plan or {})}),
        mechanism=_mechanism(**of),
        device=CPU,
        chunk=chunk,
        seed=seed,
        should_stop=should_stop,
    )


def _built(build, *, seed=0):
    with seeded(seed):
        return build()


def _gradients(task, module, examples):
    """By torch.func, one example after the other: (n, parameters), in the order of the vector."""
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(values, inputs, target):
        return task.loss(torch.func.functional_call(module, values, (inputs,)), target)

    rows = []
    for position in range(len(examples)):
        one = examples.take(torch.tensor([position]))
        found = torch.func.grad(loss)(parameters, one.inputs, one.targets)
        rows.append(torch.cat([found[name].flatten() for name in parameters]))
    return torch.stack(rows).numpy().astype(np.float64)


def _clipped(gradients, bound):
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1.0, bound / np.maximum(norms, 1e-30))


def _expect_clean(module):
    for layer in module.modules():
        assert not {"activations", "max_batch_len", "autograd_grad_sample_hooks", "ft_compute_sample_grad"} & set(vars(layer))
        assert not layer._forward_hooks
        assert not layer._backward_hooks
    for parameter in module.parameters():
        assert not vars(parameter)
        assert parameter.grad is None


# One step by hand


@both
def test_one_step_is_the_rate_times_the_mean_of_the_clipped_gradients(clipping):
    """Gradients w * x^2 = 2, 8, 18, 32 at w = 2; what is over 10 is 10."""
    result = _train(
        Task(),
        _line(),
        _line_examples(1.0, 2.0, 3.0, 4.0),
        base=[2.0],
        bound=10.0,
        clipping=clipping,
        plan={"learning_rate": 0.1},
    )
    assert result.delta.dtype == np.float32
    assert result.delta == pytest.approx([-0.1 * (2 + 8 + 10 + 10) / 4], rel=1e-5)
    assert result.mean_loss == pytest.approx(np.mean([(2 * x) ** 2 / 2 for x in (1, 2, 3, 4)]))
    assert (result.num_samples, result.num_steps) == (4, 1)


@both
def test_the_norm_is_that_of_all_parameters_together_and_not_of_each_layer(clipping):
    module, task = _built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), Classes()
    examples = _examples(4, scale=2.0)
    gradients = _gradients(task, module, examples)
    norms = np.linalg.norm(gradients, axis=1)
    bound = float(np.median(norms))
    assert norms.min() < bound < norms.max()
    by_layer = np.concatenate([_clipped(part, bound) for part in np.split(gradients, [25], axis=1)], axis=1)
    result = _train(task, module, examples, bound=bound, clipping=clipping)
    expected = -_clipped(gradients, bound).mean(axis=0)
    assert result.delta == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert np.abs(expected + by_layer.mean(axis=0)).max() > 1e-2


@both
def test_a_loss_that_is_no_mean_over_the_batch_is_clipped_by_example_all_the_same(clipping):
    summed = Task(lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="sum"))
    examples = _examples(4, scale=2.0)
    mean, total = (
        _train(task, _built(lambda: nn.Linear(4, 3)), examples, bound=0.5, clipping=clipping) for task in (Classes(), summed)
    )
    assert np.array_equal(mean.delta, total.delta)
    assert np.any(mean.delta)


# What one example can do

NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def _sum_of_clipped(rows, *, clipping, bound):
    """(1, 2) -> what moved, times the number of examples: the sum of the clipped gradients."""
    examples = Examples(inputs=torch.tensor(rows, dtype=torch.float32), targets=torch.zeros(len(rows), dtype=torch.int64))
    delta = _train(Task(), nn.Linear(2, 1), examples, base=[0.5, -1.0, 0.25], bound=bound, clipping=clipping).delta
    return -delta.astype(np.float64) * len(rows)


@both
@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.floats(-9, 9, width=32)), min_size=1, max_size=4), NUMBERS, NUMBERS)
def test_an_example_of_whatever_size_moves_the_sum_by_the_bound_at_most(clipping, others, first, second):
    bound = 0.75
    without = _sum_of_clipped(others, clipping=clipping, bound=bound)
    with_it = _sum_of_clipped([*others, (first, second)], clipping=clipping, bound=bound)
    assert np.isfinite(with_it).all()
    assert np.linalg.norm(with_it - without) <= bound * (1 + 1e-4)


@both
@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_example_without_a_finite_gradient_counts_as_not_drawn(clipping, broken, place):
    inputs = [1.0, 2.0, 3.0]
    inputs.insert(place, broken)
    result = _train(Task(), _line(), _line_examples(*inputs), base=[2.0], bound=10.0, clipping=clipping, chunk=2)
    assert result.delta == pytest.approx([-(2 + 8 + 10) / 4], rel=1e-5)


@both
def test_where_no_example_has_a_finite_gradient_there_is_noise_only(clipping):
    broken, empty = (
        _train(Task(), _line(), _line_examples(*inputs), base=[2.0], noise=1.0, clipping=clipping)
        for inputs in ([math.nan, math.inf], [0.0, 0.0])
    )
    assert broken.delta != 0
    assert np.array_equal(broken.delta, empty.delta)


@both
def test_a_model_that_has_diverged_is_trained_to_an_end(clipping):
    result = _train(Classes(), nn.Linear(4, 3), _examples(4), base=np.full(15, 3e38), steps=2, clipping=clipping)
    assert result.num_steps == 2


# Noise


def _noise(clipping, *, noise=2.0, rate=0.25, bound=0.5, steps=1, count=40, seed=0, **plan):
    module = nn.Linear(100, 100)
    result = _train(
        Indifferent(),
        module,
        _examples(100, count=count),
        noise=noise,
        rate=rate,
        bound=bound,
        steps=steps,
        clipping=clipping,
        seed=seed,
        plan=plan,
    )
    return result.delta


@both
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 2.0 * 0.5 / 10),
        ({"noise": 4.0}, 4.0 * 0.5 / 10),
        ({"bound": 3.0}, 2.0 * 3.0 / 10),
        ({"rate": 1.0}, 2.0 * 0.5 / 40),
        ({"rate": 1e-9}, 2.0 * 0.5 / 4e-8),
        ({"learning_rate": 0.1}, 0.1 * 2.0 * 0.5 / 10),
        ({"steps": 4}, math.sqrt(4) * 2.0 * 0.5 / 10),
    ],
)
def test_noise_is_a_gaussian_of_rate_times_multiplier_times_bound_over_the_expected_batch(clipping, given, expected):
    delta = _noise(clipping, **given) / expected
    assert delta.std() == pytest.approx(1.0, abs=0.03)
    assert delta.mean() == pytest.approx(0.0, abs=0.04)
    assert np.mean(np.abs(delta) < 1) == pytest.approx(0.6827, abs=0.02)
    # Biases, the last tensor, have as much.
    assert delta[-100:].std() == pytest.approx(1.0, abs=0.3)


@both
def test_an_empty_sample_is_noised_as_any_other(clipping):
    task = Task()
    result = _train(task, _line(), _line_examples(1.0, 2.0), base=[2.0], rate=1e-9, noise=1.0, steps=3, clipping=clipping)
    assert task.batches == []
    assert result.delta.item() != 0
    assert (result.mean_loss, result.num_samples, result.num_steps) == (0.0, 2, 3)


def test_each_step_and_each_parameter_has_noise_of_its_own():
    once, twice = (_noise("flat", steps=steps) for steps in (1, 2))
    second = twice - once
    assert abs(np.corrcoef(once, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(once[:5000], once[5000:10_000])[0, 1]) < 0.05


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, 127])
def test_every_bit_of_the_seed_changes_the_noise(bit):
    """Else it could be searched for."""
    found = _noise("flat", seed=1 << bit)
    assert abs(np.corrcoef(found, _noise("flat", seed=0))[0, 1]) < 0.05


# Sampling


def test_sizes_of_samples_vary_and_each_example_is_drawn_as_often_as_the_rate_says():
    task = Task()
    _train(task, _line(), _line_examples(*map(float, range(1, 51))), base=[0.0], rate=0.2, steps=200, noise=1.0)
    sizes = [len(batch) for batch in task.batches]
    assert len(set(sizes)) > 5
    assert np.mean(sizes) == pytest.approx(10, abs=1)
    counts = np.bincount(np.concatenate([np.array(batch, int) for batch in task.batches]), minlength=51)[1:]
    assert counts.std() == pytest.approx(math.sqrt(200 * 0.2 * 0.8), rel=0.4)
    assert counts.min() > 15
    assert counts.max() < 65
    # In one sample no example is twice.
    assert all(len(set(batch)) == len(batch) for batch in task.batches)


@both
def test_the_divisor_is_the_expected_size_of_the_sample_and_not_the_drawn_one(clipping):
    """Each gradient here is over the bound, so that a sample of k moves the weight by k / expected."""
    moved, sizes = [], []
    for seed in range(6):
        task = Task()
        result = _train(task, _line(), _line_examples(*[9.0] * 20), base=[1.0], rate=0.25, clipping=clipping, seed=seed)
        moved.append(-result.delta.item())
        sizes.append(sum(map(len, task.batches)))
    assert len(set(sizes)) > 1
    assert moved == pytest.approx([size / 5 for size in sizes], rel=1e-5)


def test_with_a_rate_of_one_each_step_takes_every_example():
    task = Task()
    _train(task, _line(), _line_examples(3.0, 1.0, 2.0), base=[0.0], steps=3)
    assert task.batches == [[3.0, 1.0, 2.0]] * 3


# Seeds


def test_the_same_seed_gives_the_same_bits_and_another_one_other_noise():
    build = lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3))  # noqa: E731
    given = {"noise": 1.0, "rate": 0.5, "steps": 3}
    first, again, other = (_train(Classes(), _built(build), _examples(4), seed=seed, **given) for seed in (7, 7, 8))
    assert first.delta.tobytes() == again.delta.tobytes()
    assert first.mean_loss == again.mean_loss
    assert not np.any(first.delta == other.delta)


def test_global_generators_are_left_as_they_were():
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    _train(Classes(), _built(lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3))), _examples(4), noise=1.0, steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002


# Ways to the same result


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = opacus.layers.DPLSTM(5, 3, batch_first=True)
        self.out = nn.Linear(3, 3)

    def forward(self, inputs):
        return self.out(self.core(inputs)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)
        self.attention = opacus.layers.DPMultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs):
        normed = self.norm(inputs)
        return self.out((inputs + self.attention(normed, normed, normed)[0]).mean(dim=1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.out = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.out(inputs * self.scale)


MODELS = {
    "linear": (lambda: nn.Linear(4, 3), _examples(4)),
    "on sequences": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(16, 3)), _examples(4, 5)),
    "convolution and group norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        ),
        _examples(2, 8, 8),
    ),
    "convolution by groups, dilated": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding="same", dilation=2, groups=2), nn.Flatten(), nn.Linear(256, 3)),
        _examples(2, 8, 8),
    ),
    "convolution of one dimension": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), nn.InstanceNorm1d(6, affine=True), nn.Flatten(), nn.Linear(18, 3)),
        _examples(4, 5),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 3)),
        _examples(4, words=7),
    ),
    "recurrent": (Recurrent, _examples(4, 5)),
    "attention": (Attentive, _examples(6, 4)),
    "a parameter of its own": (Scaled, _examples(4)),
}


@both
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.5, 100.0])
def test_gradients_by_example_are_those_of_torch_func(name, share, clipping):
    build, examples = MODELS[name]
    module, task = _built(build), Classes()
    gradients = _gradients(task, module, examples)
    bound = share * float(np.median(np.linalg.norm(gradients, axis=1)))
    result = _train(task, module, examples, bound=bound, clipping=clipping)
    assert result.delta == pytest.approx(-_clipped(gradients, bound).mean(axis=0), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["convolution and group norm", "embedding"])
def test_neither_clipping_nor_chunks_change_the_result(name):
    build, examples = MODELS[name]
    given = {"bound": 0.5, "noise": 0.3, "rate": 0.7, "steps": 3, "seed": 5, "plan": {"learning_rate": 0.1, "momentum": 0.9}}
    expected = _train(Classes(), _built(build), examples, **given)
    for clipping in ("flat", "ghost"):
        for chunk in (1, 2, 5, 100):
            found = _train(Classes(), _built(build), examples, clipping=clipping, chunk=chunk, **given)
            assert found.delta == pytest.approx(expected.delta, rel=1e-3, abs=1e-5)
            assert found.mean_loss == pytest.approx(expected.mean_loss, rel=1e-4)


@both
def test_weights_and_inputs_whose_channels_come_last_in_memory_are_laid_out_anew(clipping):
    """Opacus' gradients of a convolution are wrong there."""

    class Last(Classes):
        def prepare(self, inputs, generator):
            return inputs.contiguous(memory_format=torch.channels_last)

    def build():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))

    examples = _examples(2, 8, 8)
    last = _built(build).to(memory_format=torch.channels_last)
    expected, found = (
        _train(task, module, examples, bound=0.5, clipping=clipping)
        for task, module in ((Classes(), _built(build)), (Last(), last))
    )
    assert found.delta == pytest.approx(expected.delta, rel=1e-4, abs=1e-6)


class TwiceThrough(nn.Module):
    """What flat clipping takes and ghost clipping does not."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.out = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, inputs):
        return self.out(self.layer(self.layer(inputs).tanh()))


def test_auto_clips_small_models_by_their_gradients_and_large_ones_by_norms():
    small = _built(lambda: TwiceThrough(4))
    gradients = _gradients(Classes(), small, _examples(4))
    result = _train(Classes(), small, _examples(4), bound=0.1, clipping="auto")
    assert result.delta == pytest.approx(-_clipped(gradients, 0.1).mean(axis=0), rel=1e-3, abs=1e-6)
    with pytest.raises(ConfigurationError, match="Ghost Clipping"):
        _train(Classes(), TwiceThrough(710), _examples(710, count=2), clipping="auto")


# What comes after the noise


@pytest.mark.parametrize(
    "given",
    [{"proximal": 3.0}, {"weight_decay": 0.5}, {"momentum": 0.6}, {"proximal": 2.0, "momentum": 0.5, "weight_decay": 0.25}],
)
@both
def test_the_pull_to_the_base_decay_and_momentum_come_after_clipping_and_noise(clipping, given):
    """Of no gradient but noise, and by a bound that would leave nothing of a decay which were clipped."""

    def moved(steps, **plan):
        of = {"noise": 1000.0, "bound": 1e-3, "steps": steps, "clipping": clipping}
        task, examples = Indifferent(), _line_examples(1.0, 2.0)
        return float(_train(task, _line(), examples, base=[5.0], plan={"learning_rate": 0.1, **plan}, **of).delta.item())

    first = -moved(1) / 0.1
    second = -moved(2) / 0.1 - first
    mu, decay, momentum = (given.get(name, 0.0) for name in ("proximal", "weight_decay", "momentum"))
    velocity = first + decay * 5.0
    weight = 5.0 - 0.1 * velocity
    velocity = momentum * velocity + second + mu * (weight - 5.0) + decay * weight
    assert moved(2, **given) == pytest.approx(weight - 0.1 * velocity - 5.0, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_steps_by_the_noised_gradient(optimizer):
    task, examples = Indifferent(), _line_examples(1.0, 2.0)
    result = _train(task, _line(), examples, base=[5.0], noise=1.0, plan={"optimizer": optimizer, "learning_rate": 0.1})
    assert abs(result.delta.item()) == pytest.approx(0.1, rel=1e-3)


def test_a_frozen_parameter_stays_where_it_is_and_has_no_part_in_the_norm():
    module = _built(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    module[0].requires_grad_(False)
    gradients = _gradients(Classes(), module, _examples(4))[:, 20:]
    for clipping in ("flat", "ghost"):
        result = _train(
            Classes(),
            module,
            _examples(4),
            base=vector_of(_built(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))),
            bound=0.5,
            clipping=clipping,
            plan={"weight_decay": 0.0},
        )
        assert not result.delta[:20].any()
        assert result.delta[20:] == pytest.approx(-_clipped(gradients, 0.5).mean(axis=0), rel=1e-3, abs=1e-6)


# Randomness of the model and of the task


@both
def test_dropout_works_and_follows_the_seed(clipping):
    build = lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
    first, again, other = (
        _train(Classes(), _built(build), _examples(4), clipping=clipping, steps=2, seed=seed) for seed in (1, 1, 2)
    )
    assert first.delta.tobytes() == again.delta.tobytes()
    assert np.abs(first.delta - other.delta).max() > 1e-3


@both
def test_augmentation_works_and_follows_the_seed(clipping):
    class Shaken(Task):
        def prepare(self, inputs, generator):
            return inputs if generator is None else inputs + torch.rand(inputs.shape, generator=generator)

    first, again, other = (
        _train(Shaken(), _line(), _line_examples(1.0, 2.0), base=[1.0], clipping=clipping, bound=50.0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.delta == again.delta
    assert abs(first.delta - other.delta) > 1e-3


# What cannot be trained so


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.used(inputs)


class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs):
        self.mean.lerp_(inputs.detach().mean(dim=0), 0.1)
        return self.out(inputs)


class RunningParameter(nn.Module):
    """Frozen, and changed all the same."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.mean = nn.ParameterList([nn.Parameter(torch.zeros(4), requires_grad=False)])

    def forward(self, inputs):
        with torch.no_grad():
            self.mean[0].lerp_(inputs.mean(dim=0), 0.1)
        return self.out(inputs)


class Mixed(nn.Module):
    """By hand: none of its layers does it."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.out, self.mix = nn.Linear(4, 4), nn.Linear(4, 3), mix

    def forward(self, inputs):
        return self.out(self.mix(self.first(inputs), self.training))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(4, 3)

    def forward(self, words):
        return functional.linear(self.words(words).mean(dim=1), self.words.weight)


class Patches(nn.Module):
    """Parts of examples where examples should be."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.layer(inputs.reshape(-1, 5)).reshape(len(inputs), -1, 3).mean(dim=1)


class Branching(nn.Module):
    """Of whose layers one is used for large examples only."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs):
        outputs = self.always(inputs)
        return outputs + self.sometimes(inputs) if inputs.abs().max() > 5 else outputs


class Turned(nn.Module):
    """A convolution of what is not contiguous, of which Opacus reads other places in memory."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Conv2d(2, 2, 3), nn.Linear(8, 3)

    def forward(self, images):
        return self.out(self.layer(images.permute(0, 3, 1, 2)).flatten(1))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs):
        return self.layer(inputs.transpose(0, 1)).mean(dim=0)


class WithBuffer(nn.Module):
    """In whose preparation Opacus fails, half way through the model."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = Buffered()

    def forward(self, inputs):
        return self.second(self.first(inputs))


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.ones(4))
        self.out = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.out(inputs * self.scale + self.shift)


class RandomWithin(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.out(self.drop(inputs * self.scale))


OF_THE_MODEL = "the model cannot be trained with differential privacy: "
DEPENDS = "the model's output for an example depends on the others of its batch"
NOT_AS_IT_IS = "Opacus does not find the gradient of an example as it is"

REFUSED = {
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), "layer '0' (BatchNorm1d) mixes the examples"),
    "lstm": (lambda: nn.Sequential(nn.LSTM(4, 3)), "layer '0' (LSTM) gives no gradients by example: take opacus.layers.DPLSTM"),
    "unused": (Unused, "there is no gradient by example of unused.weight, unused.bias: under differential privacy each trained"),
    "running mean": (RunningMean, "training changed 'mean', which no noise covers"),
    "running parameter": (RunningParameter, "training changed 'mean.0', which no noise covers"),
    "mixed by hand": (lambda: Mixed(lambda inputs, _: inputs - inputs.mean(dim=0)), DEPENDS),
    "mixed in training only": (lambda: Mixed(lambda inputs, on: inputs - on * inputs.mean(dim=0)), DEPENDS),
    "mixed in training only, a little": (lambda: Mixed(lambda inputs, on: inputs + on * 1e-6 * inputs.mean(dim=0)), DEPENDS),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), OF_THE_MODEL),
    "a buffer": (WithBuffer, OF_THE_MODEL),
    "random within a layer": (RandomWithin, OF_THE_MODEL),
}


def _expect_refusal(text, module, examples, *, task=None, **given):
    with pytest.raises(ConfigurationError) as caught:
        _train(task or Classes(), module, examples, **given)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    _expect_clean(module)


@both
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_trained_so_are_refused_in_one_line_and_left_clean(name, clipping):
    build, text = REFUSED[name]
    _expect_refusal(text, _built(build), _examples(4), clipping=clipping)


@both
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("build", [Patches, TimeFirst])
def test_parts_of_examples_are_not_taken_for_examples(build, chunk, clipping):
    """As many steps as examples, so that the numbers of rows give nothing away."""
    _expect_refusal(NOT_AS_IT_IS, _built(build), _examples(6, 5, count=6), chunk=chunk, clipping=clipping)


@both
def test_a_weight_that_is_used_outside_of_its_layer_is_refused(clipping):
    """Of which ghost clipping would bound a part, and add up all."""
    _expect_refusal(NOT_AS_IT_IS, _built(Tied), _examples(3, words=4), clipping=clipping)


@both
def test_a_layer_that_some_examples_do_not_use_is_refused_when_they_come(clipping):
    """And not given what an earlier chunk left."""
    large, small = _examples(4, count=1, scale=50.0), _examples(4, count=4)
    inputs = torch.cat([large.inputs, small.inputs.clamp(-4, 4), large.inputs])
    examples = Examples(inputs=inputs, targets=torch.zeros(6, dtype=torch.int64))
    text = "there is no gradient by example of sometimes.weight, sometimes.bias"
    _expect_refusal(text, _built(Branching), examples, chunk=1, clipping=clipping)


@both
def test_a_convolution_of_what_is_not_contiguous_is_refused(clipping):
    _expect_refusal(NOT_AS_IT_IS, _built(Turned), _examples(4, 4, 2), clipping=clipping)


def test_a_layer_that_is_used_twice_is_refused_by_ghost_clipping():
    _expect_refusal("Ghost Clipping", _built(lambda: TwiceThrough(4)), _examples(4), clipping="ghost")


@both
@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            lambda outputs, targets: outputs.sum() if outputs.max() > 0 else -outputs.sum(),
            "loss cannot be taken example by example",
        ),
        (lambda outputs, targets: outputs.sum() * targets.max().item(), "loss cannot be taken example by example"),
        (
            lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none"),
            "of one example must be a scalar",
        ),
    ],
)
def test_losses_that_cannot_be_taken_by_example_are_refused(loss, text, clipping):
    _expect_refusal(text, nn.Linear(4, 3), _examples(4), task=Task(loss), clipping=clipping)


def test_a_preparation_that_looks_at_the_batch_is_refused():
    class Centred(Classes):
        def prepare(self, inputs, generator):
            return inputs - inputs.mean(dim=0)

    _expect_refusal("prepares an example", nn.Linear(4, 3), _examples(4), task=Centred())


def test_no_examples_are_a_data_error():
    with pytest.raises(DataError, match="no examples"):
        _train(Task(), _line(), Examples(inputs=torch.zeros(0, 1), targets=torch.zeros(0, dtype=torch.int64)))


def test_another_models_base_is_refused():
    with pytest.raises(ManifestMismatchError):
        train_privately(
            Task(),
            _line(),
            _line_examples(1.0),
            base=np.zeros(2, np.float32),
            manifest=manifest_of_module(nn.Linear(1, 1)),
            plan=TrainingPlan(),
            mechanism=_mechanism(),
            device=CPU,
            seed=0,
            should_stop=lambda: False,
        )


@both
def test_a_single_example_is_enough(clipping):
    result = _train(Task(), _line(), _line_examples(1.0), base=[2.0], bound=50.0, clipping=clipping)
    assert result.delta == pytest.approx([-2.0], rel=1e-5)


# Stopping, and what is left on the module


@both
def test_stopping_is_heard_before_each_step_and_leaves_nothing(clipping):
    for allowed in range(3):
        task, module = Task(), _line()
        answers = iter([False] * allowed + [True] * 9)
        stop = lambda: next(answers)  # noqa: B023, E731
        assert _train(task, module, _line_examples(1.0, 2.0), base=[1.0], steps=3, clipping=clipping, should_stop=stop) is None
        assert len(task.batches) == allowed
        _expect_clean(module)


def test_stopping_after_the_last_step_is_too_late():
    answers = iter([False] * 3 + [True])
    assert _train(Task(), _line(), _line_examples(1.0), base=[1.0], steps=3, should_stop=lambda: next(answers)) is not None


class FailsOnceError(Exception):
    pass


class FailsInTheMiddle(Classes):
    """In a loss, when hooks have seen the way forward."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def loss(self, outputs, targets):
        self.left -= 1
        if self.left == 0:
            raise FailsOnceError
        return super().loss(outputs, targets)


@both
@pytest.mark.parametrize("name", MODELS)
def test_afterwards_the_module_can_be_trained_plainly_as_if_nothing_had_been(name, clipping):
    build, examples = MODELS[name]
    used = _built(build)
    base = vector_of(used)
    _train(Classes(), used, examples, noise=1.0, steps=2, clipping=clipping)
    _expect_clean(used)
    assert _plainly(used, examples, base) == _plainly(_built(build), examples, base)


@both
@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_an_error_inside_leaves_nothing_that_a_later_training_would_feel(at, clipping):
    build, examples = MODELS["convolution and group norm"]
    used = _built(build)
    base = vector_of(used)
    with pytest.raises(FailsOnceError):
        _train(FailsInTheMiddle(at), used, examples, chunk=2, steps=3, clipping=clipping)
    _expect_clean(used)
    fresh = _built(build)
    given = {"base": base, "noise": 1.0, "rate": 0.5, "steps": 2, "clipping": clipping, "chunk": 1}
    assert np.array_equal(_train(Classes(), used, examples, **given).delta, _train(Classes(), fresh, examples, **given).delta)
    assert _plainly(used, examples, base) == _plainly(_built(build), examples, base)


def _plainly(module, examples, base):
    result = train(
        Classes(),
        module,
        examples,
        base=base,
        manifest=manifest_of_module(module),
        plan=TrainingPlan(steps=2),
        device=CPU,
        seed=0,
        should_stop=lambda: False,
    )
    return result.delta.tobytes()


# And it learns


@both
def test_digits_are_learnt_under_moderate_noise(clipping):
    task = load_task("digits", model="tanh_cnn")
    module, manifest, base = initial(task, None, seed=0, by_example=True)
    examples = task.train_examples(None)
    train_privately(
        task,
        module,
        examples,
        base=base,
        manifest=manifest,
        plan=TrainingPlan(learning_rate=1.0),
        mechanism=_mechanism(noise=1.0, rate=64 / len(examples), steps=25, bound=0.5, clipping=clipping),
        device=CPU,
        seed=0,
        should_stop=lambda: False,
    )
    assert evaluate(task, module, task.test_examples(None), device=CPU).accuracy > 0.5


def test_the_federated_cnn_is_trained_with_group_norm_and_dropout():
    task = load_task("digits", model="federated_cnn")
    module, manifest, base = initial(task, None, seed=0, by_example=True)
    examples = task.train_examples(None).take(torch.arange(8))
    result = _train(task, module, examples, base=base, noise=0.1, clipping="auto")
    assert np.isfinite(result.delta).all()
    for spec in manifest.tensors:
        assert np.any(result.delta[spec.offset : spec.offset + spec.size]), spec.name
