import hashlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.participation import is_selected


def _selected(party: str, *, version: int = 0, number: int = 1, fraction: float = 0.5) -> bool:
    return is_selected(federation="hospitals", party=party, version=version, number=number, fraction=fraction)


def test_the_draw_is_the_documented_hash():
    drawn = int(hashlib.sha256(b"hospitals/a/7/3").hexdigest()[:16], 16) / 2**64
    assert _selected("a", version=7, number=3, fraction=drawn + 1e-9)
    assert not _selected("a", version=7, number=3, fraction=drawn - 1e-9)


def test_the_draw_never_changes():
    assert [party for party in "abcdefghij" if _selected(party, fraction=0.4)] == list("adj")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(party=st.text(max_size=10), version=st.integers(0, 2**53), number=st.integers(1, 2**53))
def test_everyone_is_selected_where_the_fraction_is_one(party, version, number):
    assert _selected(party, version=version, number=number, fraction=1.0)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(version=st.integers(0, 1000), low=st.floats(0, 1), high=st.floats(0, 1))
def test_who_is_selected_by_a_fraction_is_selected_by_a_larger_one(version, low, high):
    low, high = sorted((low, high))
    assert not _selected("a", version=version, fraction=low) or _selected("a", version=version, fraction=high)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_about_the_share_of_the_parties_is_selected(fraction):
    selected = sum(_selected(f"party-{index}", version=index % 7, fraction=fraction) for index in range(20_000))
    assert abs(selected / 20_000 - fraction) < 5 * (fraction * (1 - fraction) / 20_000) ** 0.5


def test_a_version_that_is_broadcast_again_draws_again():
    draws = {tuple(_selected(f"party-{index}", number=number) for index in range(30)) for number in range(1, 20)}
    assert len(draws) == 19


def test_parties_take_turns():
    for party in ("a", "b"):
        assert {_selected(party, version=version, fraction=0.3) for version in range(50)} == {True, False}


def test_federations_draw_apart():
    draws = [
        [is_selected(federation=name, party="a", version=version, number=1, fraction=0.5) for version in range(64)]
        for name in ("hospitals", "banks")
    ]
    assert draws[0] != draws[1]
