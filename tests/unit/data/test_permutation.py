"""Keyed permutations: bijective at every size, different for every key, without visible pattern."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalemur.data.permutation import Permutation, draw


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers())
def test_every_index_is_hit_once(n, key):
    assert sorted(Permutation(n, key).many(np.arange(n)).tolist()) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 1 << 62), data=st.data())
def test_one_index_and_many_indices_agree_at_any_size(n, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    permutation = Permutation(n, "key")
    moved = permutation.many(np.array(indices))
    assert moved.tolist() == [permutation(i) for i in indices]
    assert moved.min() >= 0 and moved.max() < n and len(set(moved.tolist())) == len(set(indices))


def test_the_permutation_never_changes_between_releases():
    """A run that is resumed with a newer megalemur must see the same samples."""
    assert [Permutation(10, 1234, "digest", 0)(i) for i in range(10)] == [2, 3, 0, 1, 8, 7, 9, 6, 4, 5]
    assert draw("offset", 1234, "digest", 0) == 135594030790758727905502068702625362554


def test_keys_give_different_permutations():
    orders = [tuple(Permutation(100, *key).many(np.arange(100))) for key in [(1,), (2,), (1, 1), ("1", "d", 0)]]
    assert len(set(orders)) == 4


def test_places_are_uniform_over_keys():
    """Chi squared of where index 0 and index 1 of 64 go, over 6,400 keys: 63 degrees of freedom, 6 sd allowed."""
    places = np.array([[p(0), p(1)] for p in (Permutation(64, key) for key in range(6400))])
    for column in places.T:
        counts = np.bincount(column, minlength=64)
        assert ((counts - 100) ** 2 / 100).sum() < 63 + 6 * 126**0.5
    apart = np.bincount((places[:, 0] - places[:, 1]) % 64, minlength=64)[1:]
    assert ((apart - 6400 / 63) ** 2 / (6400 / 63)).sum() < 62 + 6 * 124**0.5


@pytest.mark.parametrize("i", [-1, 10])
def test_an_index_outside_is_an_error(i):
    with pytest.raises(IndexError):
        Permutation(10, "key")(i)


def test_an_empty_range_is_an_error():
    with pytest.raises(ValueError, match="permutation of 0"):
        Permutation(0, "key")
