import torch

from broker_fl.tasks.seeding import seeded


def test_the_seed_decides_inside_and_the_generator_is_as_before_outside():
    torch.rand(1)
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    with seeded(3):
        second = torch.rand(4)
    with seeded(4):
        other = torch.rand(4)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
