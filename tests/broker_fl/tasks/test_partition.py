import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_fl.errors import ConfigurationError
from broker_fl.tasks.partition import SCHEMES, split

LABELS = np.repeat(np.arange(10), 200)


@st.composite
def _splits(draw):
    parties = draw(st.integers(1, 12))
    scheme = draw(st.sampled_from(SCHEMES))
    shards = draw(st.integers(1, 4))
    count = draw(st.integers(parties * shards, 400))
    labels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, draw(st.integers(1, 12)), size=count)
    sizes = None
    if scheme != "shards" and draw(st.booleans()):
        sizes = draw(st.lists(st.floats(0.01, 100), min_size=parties, max_size=parties))
    alpha = draw(st.floats(1e-3, 100))
    settings = {"parties": parties, "scheme": scheme, "alpha": alpha, "shards_per_party": shards, "sizes": sizes}
    return labels, settings | {"seed": draw(st.integers(0, 2**32))}


@given(_splits())
def test_every_sample_has_one_party_and_no_party_is_without(drawn):
    labels, settings = drawn
    shares = split(labels, **settings)
    assert len(shares) == settings["parties"]
    assert all(len(share) for share in shares)
    assert all(share.dtype == np.int64 for share in shares)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(labels)))


@given(_splits())
def test_the_same_seed_gives_the_same_split(drawn):
    labels, settings = drawn
    first, second = split(labels, **settings), split(labels, **settings)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_split(scheme):
    first, second = (split(LABELS, parties=5, scheme=scheme, seed=seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_iid_shares_are_equal_and_hold_every_class():
    shares = split(LABELS, parties=7, scheme="iid", seed=0)
    assert {len(share) for share in shares} <= {285, 286}
    assert all(np.bincount(LABELS[share], minlength=10).min() > 10 for share in shares)


def test_iid_honours_sizes():
    shares = split(LABELS, parties=3, scheme="iid", seed=0, sizes=[1, 2, 7])
    assert [len(share) for share in shares] == [200, 400, 1400]


def test_dirichlet_honours_sizes_on_average():
    counts = np.mean(
        [
            [len(share) for share in split(LABELS, parties=3, scheme="dirichlet", seed=seed, sizes=[1, 2, 7])]
            for seed in range(40)
        ],
        axis=0,
    )
    assert counts == pytest.approx([200, 400, 1400], rel=0.1)


def _skew(alpha: float) -> float:
    """The mean share of a party's commonest class."""
    shares = split(LABELS, parties=10, scheme="dirichlet", seed=0, alpha=alpha)
    return float(np.mean([np.bincount(LABELS[share]).max() / len(share) for share in shares]))


def test_a_smaller_alpha_means_more_skew():
    assert _skew(0.05) > 0.5 > _skew(0.5) > 0.2 > _skew(100) > 0.1


def test_dirichlet_leaves_everybody_a_minimum_even_where_one_party_takes_all():
    for seed in range(20):
        shares = split(LABELS, parties=20, scheme="dirichlet", seed=seed, alpha=1e-3)
        assert min(len(share) for share in shares) >= 10


def test_shards_give_each_party_few_labels_and_equal_shares():
    shares = split(LABELS, parties=10, scheme="shards", seed=0, shards_per_party=2)
    assert {len(share) for share in shares} == {200}
    assert all(len(np.unique(LABELS[share])) <= 2 for share in shares)
    assert np.mean([len(np.unique(LABELS[share])) for share in shares]) > 1.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parties": 0}, "parties must be 1 or more"),
        ({"parties": 2001}, "2001 parties need as many labels"),
        ({"sizes": [1, 2]}, "sizes must be 3 positive numbers"),
        ({"sizes": [1, 2, 0]}, "sizes must be 3 positive numbers"),
        ({"sizes": [1, 2, float("nan")]}, "sizes must be 3 positive numbers"),
        ({"scheme": "dirichlet", "alpha": 0.0}, "alpha must be a positive number"),
        ({"scheme": "shards", "shards_per_party": 0}, "shards_per_party must be from 1 to 666"),
        ({"scheme": "shards", "shards_per_party": 667}, "shards_per_party must be from 1 to 666"),
        ({"scheme": "shards", "sizes": [1, 1, 2]}, "sizes cannot be had with shards"),
        ({"scheme": "dirichelet"}, "did you mean 'dirichlet'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        split(LABELS, **({"parties": 3, "scheme": "iid", "seed": 0} | settings))
