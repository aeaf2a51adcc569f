import numpy as np
import pytest

from broker_fl.codecs.reader import Reader
from broker_fl.codecs.splitmix import draw_seed, read_seed, seed_bytes, splitmix64
from broker_fl.errors import ConfigurationError


def _by_the_book(seed: int, count: int) -> list[int]:
    """Vigna's splitmix64.c."""
    mask, numbers = 2**64 - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers


@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**63, 2**64 - 1])
def test_the_numbers_are_those_of_splitmix64(seed):
    assert splitmix64(seed, start=0, count=50).tolist() == _by_the_book(seed, 50)
    assert splitmix64(seed, start=20, count=30).tolist() == _by_the_book(seed, 50)[20:]


def test_the_first_number_of_a_known_seed():
    assert splitmix64(1234567, start=0, count=2).tolist() == [6457827717110365317, 3203168211198807973]


def test_a_seed_comes_back_from_its_eight_bytes():
    seed = draw_seed(np.random.default_rng(3), used_for="a test")
    assert read_seed(Reader(seed_bytes(seed))) == seed
    assert seed_bytes(1) == b"\x01" + bytes(7)


def test_without_a_generator_there_is_no_seed():
    with pytest.raises(ConfigurationError, match="randomk draws a seed"):
        draw_seed(None, used_for="randomk")
