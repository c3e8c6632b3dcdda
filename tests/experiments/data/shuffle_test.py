"""Orders computed lazily: permutations, as random as they should be, and the same streams of batches as any."""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments import data
from experiments.data import pipeline, shuffle

seeds = st.integers(0, 2**31 - 1)


@pytest.fixture
def lazily(monkeypatch):
    """As if every source were large."""
    monkeypatch.setattr(pipeline, "permutation", functools.partial(shuffle.permutation, at_once=0))


def numbers(n):
    return data.Arrays({"x": np.arange(n)})


def seen(iterator, steps):
    return np.concatenate([next(iterator)["x"] for _ in range(steps)])


@hypothesis.given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 30), size=st.integers(1, 700))
def test_every_number_once_whatever_the_slices(n, seed, epoch, size):
    order = shuffle.LazyPermutation(n, (seed, epoch))
    whole = order[:]
    assert whole.dtype == np.int64
    assert len(order) == n
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))
    parts = [order[start : start + size] for start in range(0, n, size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_far_numbers_of_very_many():
    order = shuffle.LazyPermutation(10**12, 0)
    far = order[10**12 - 1000 : 10**12]
    assert len(set(far.tolist())) == 1000
    assert 0 <= far.min() < 10**11 < 9 * 10**11 < far.max() < 10**12


def test_orders_of_seeds_and_epochs_differ():
    orders = [shuffle.LazyPermutation(5000, seed)[:] for seed in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.sum(a == b) < 10  # 1 expected


def test_every_number_is_everywhere_as_often():
    """Chi squared of number against position, and of a number's successor, over many seeds."""
    n, draws = 60, 6000
    orders = np.array([shuffle.LazyPermutation(n, seed)[:] for seed in range(draws)])
    places = np.array([np.bincount(orders[:, i], minlength=n) for i in range(n)])
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).ravel(), minlength=n)[1:]
    for counts, degrees in ((places, (n - 1) ** 2), (steps, n - 2)):
        expected = counts.mean()
        chi_squared = np.sum((counts - expected) ** 2) / expected
        assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


def test_neighbours_are_no_neighbours_any_more():
    order = shuffle.LazyPermutation(1_000_003, 7)[:].astype(float)
    for lag in (1, 2, 1000, 1001, 1002):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5e-3
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 5e-3


def test_only_large_orders_are_lazy():
    np.testing.assert_array_equal(shuffle.permutation(50, 3), np.random.default_rng(3).permutation(50))
    assert isinstance(shuffle.permutation(33_000_000, 3), shuffle.LazyPermutation)


@pytest.mark.usefixtures("lazily")
def test_epochs_of_a_stream():
    n, epochs = 120, 4
    order = seen(data.train_iterator(numbers(n), 50, 0), 12)[: epochs * n].reshape(epochs, n)
    for epoch in range(epochs):
        assert set(order[epoch]) == set(range(n))
        np.testing.assert_array_equal(order[epoch], shuffle.LazyPermutation(n, (0, epoch))[:])
    assert len({tuple(row) for row in order}) == epochs


@pytest.mark.usefixtures("lazily")
def test_hosts_share_and_states_resume():
    alone = seen(data.train_iterator(numbers(100), 24, 5), 20).reshape(20, 24)
    hosts = [data.train_iterator(numbers(100), 24, 5, host, 3) for host in range(3)]
    together = np.stack([seen(host, 20).reshape(20, 8) for host in hosts], axis=1).reshape(20, 24)
    np.testing.assert_array_equal(together, alone)
    original = data.train_iterator(numbers(100), 24, 5)
    seen(original, 7)
    resumed = data.train_iterator(numbers(100), 24, 5, 1, 2)
    resumed.set_state(json.loads(json.dumps(original.get_state())))
    np.testing.assert_array_equal(seen(resumed, 13).reshape(13, 12), alone[7:, 12:])
