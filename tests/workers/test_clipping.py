"""Models that would be trained with less privacy than was promised, and do not look like it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from broker_fl.errors import ConfigurationError
from broker_fl.privacy.policy import Mechanism
from broker_fl.tasks import Examples
from broker_fl.tasks.module import manifest_of_module, vector_of
from schemas.frame import TrainingPlan
from workers.dp import train_privately

FEATURES, CLASSES = 6, 3
MODES = ("flat", "ghost")


class Points:
    def prepare(self, inputs, _generator):
        return inputs

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)


class Centred(Points):
    def prepare(self, inputs, _generator):
        return inputs - inputs.mean(0)


def model_of(forward, **layers):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

        def forward(self, inputs):
            return forward(self, inputs)

    return Model()


def delta_of(module, *, clipping="flat", inputs=None, seed=1, noise=1e-9, task=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, FEATURES, generator=generator) if inputs is None else inputs
    targets = torch.arange(len(inputs)) % CLASSES
    result = train_privately(
        task or Points(),
        module,
        Examples(inputs, targets),
        base=vector_of(module),
        manifest=manifest_of_module(module),
        plan=TrainingPlan(steps=1, learning_rate=1.0, momentum=0.0),
        mechanism=Mechanism(noise, 1.0, 1, 1.0, clipping),
        device=torch.device("cpu"),
        seed=seed,
        should_stop=lambda: False,
    )
    return result.delta


def out():
    return nn.Linear(FEATURES, CLASSES)


def _outside_of_its_layer():
    return model_of(
        lambda self, x: self.out(functional.linear(self.first(x).tanh(), self.first.weight)),
        first=nn.Linear(FEATURES, FEATURES),
        out=out(),
    )


def _circular():
    return model_of(
        lambda self, x: self.out(self.conv(x[:, None]).flatten(1)),
        conv=nn.Conv1d(1, CLASSES, 3, padding=1, padding_mode="circular"),
        out=nn.Linear(FEATURES * CLASSES, CLASSES),
    )


def _mixed():
    return model_of(lambda self, x: self.out(x - x.mean(0)), out=out())


REFUSED = {
    "a weight outside of its layer": (_outside_of_its_layer, "does not find the gradient of an example"),
    "circular padding": (_circular, "pads by 'circular', and gradients by example are those"),
    "a batch that is mixed by hand": (_mixed, "depends on the others of its batch"),
    "in place": (
        lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(inplace=True), out()),
        "cannot be trained with differential privacy: .*inplace",
    ),
}


@pytest.mark.parametrize("clipping", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_models_of_which_opacus_finds_no_gradients_by_example_are_refused(name, clipping):
    build, said = REFUSED[name]
    with pytest.raises(ConfigurationError, match=said) as refused:
        delta_of(build(), clipping=clipping)
    assert "\n" not in str(refused.value)


def _reusing():
    return model_of(lambda self, x: self.out(self.first(self.first(x).tanh())), first=nn.Linear(FEATURES, FEATURES), out=out())


def test_a_layer_that_is_used_twice_goes_flat_and_is_refused_by_ghost_clipping():
    assert np.linalg.norm(delta_of(_reusing())) <= 1
    with pytest.raises(ConfigurationError, match="tying is not supported with Ghost"):
        delta_of(_reusing(), clipping="ghost")


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embeddings_that_change_by_what_the_batch_holds_are_refused(options):
    module = model_of(
        lambda self, x: self.out(self.embedding(x).flatten(1)),
        embedding=nn.Embedding(5, 2, **options),
        out=nn.Linear(2 * FEATURES, CLASSES),
    )
    with pytest.raises(ConfigurationError, match="changes its weights or gradients by what the batch holds"):
        delta_of(module, inputs=torch.zeros(8, FEATURES, dtype=torch.int64))


def test_a_task_that_prepares_by_the_batch_is_refused():
    with pytest.raises(ConfigurationError, match="prepares an example otherwise when others are there"):
        delta_of(out(), task=Centred())


@pytest.mark.parametrize("clipping", MODES)
def test_dropout_of_both_kinds_is_no_reason_to_refuse(clipping):
    module = model_of(
        lambda self, x: self.out(functional.dropout(self.drop(self.first(x)).relu(), 0.3, training=self.training)),
        first=nn.Linear(FEATURES, FEATURES),
        drop=nn.Dropout(0.5),
        out=out(),
    )
    assert 0 < np.linalg.norm(delta_of(module, clipping=clipping)) <= 1


@pytest.mark.parametrize("clipping", MODES)
@pytest.mark.parametrize("where", [0, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_example_with_infinities_is_as_if_it_had_not_been_drawn(value, where, clipping):
    torch.manual_seed(3)
    module = out()
    inputs = torch.randn(8, FEATURES)
    inputs[where] = value
    found = delta_of(module, clipping=clipping, inputs=inputs)
    assert np.isfinite(found).all()
    # Of no gradient at all: what a loss that does not see it leaves.
    inputs[where], targets = 0.0, torch.arange(8) % CLASSES
    torch.manual_seed(3)
    expected = _clipped_mean(out(), inputs, targets, without=where)
    np.testing.assert_allclose(found, -expected, atol=1e-5)


def _clipped_mean(module, inputs, targets, *, without):
    total = np.zeros(sum(one.numel() for one in module.parameters()))
    for position in range(len(inputs)):
        if position == without:
            continue
        module.zero_grad()
        functional.cross_entropy(module(inputs[position : position + 1]), targets[position : position + 1]).backward()
        gradient = np.concatenate([one.grad.numpy().ravel() for one in module.parameters()])
        total += gradient * min(1.0, 1.0 / np.linalg.norm(gradient))
    return total / len(inputs)


def test_all_128_bits_of_a_seed_make_the_noise():
    """torch's generators on a CPU keep 32 of them, which can be searched through in hours."""
    torch.manual_seed(3)
    module = out()
    seeds = (7, 7 + 2**32, 7 + 2**64, 7 + 2**127)
    bodies = set()
    for seed in seeds:
        torch.manual_seed(3)
        module = out()
        bodies.add(delta_of(module, seed=seed, noise=1.0).tobytes())
    assert len(bodies) == len(seeds)


def test_no_examples_with_a_finite_loss_leave_noise_alone():
    torch.manual_seed(3)
    delta = delta_of(out(), inputs=torch.full((8, FEATURES), torch.nan), noise=1.0)
    assert np.isfinite(delta).all()
    assert delta.std() == pytest.approx(1 / 8, rel=0.5)
