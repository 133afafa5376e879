"""One size for all ranks, against trying every combination."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.algebra import budget
from loratool.errors import InputError

SPECTRUM = st.lists(st.floats(0, 10), min_size=1, max_size=4).map(
    lambda v: torch.tensor(sorted(v, reverse=True)).double()
)
MODULES = st.lists(st.tuples(SPECTRUM, st.integers(1, 9), st.floats(0.1, 10)), min_size=1, max_size=4)


def lost(spectra, ranks, weights):
    return sum(w * float(s[k:].square().sum()) for s, k, w in zip(spectra, ranks, weights, strict=True))


def best(spectra, costs, weights, size):
    """The least error of every combination of ranks that fits."""
    every = itertools.product(*(range(1, len(s) + 1) for s in spectra))
    fits = (r for r in every if sum(k * c for k, c in zip(r, costs, strict=True)) <= size)
    return min(lost(spectra, ranks, weights) for ranks in fits)


@given(MODULES, st.integers(0, 60))
def test_ranks_fit_and_are_the_best_but_for_the_last_that_does_not_fit(modules, spare):
    spectra, costs, weights = map(list, zip(*modules, strict=True))
    size = sum(costs) + spare
    ranks = budget.allocate(spectra, costs, size, weights=weights)
    assert all(1 <= k <= len(s) for k, s in zip(ranks, spectra, strict=True))
    assert sum(k * c for k, c in zip(ranks, costs, strict=True)) <= size
    error, optimum = lost(spectra, ranks, weights), best(spectra, costs, weights, size)
    gains = [w * float(x) ** 2 for s, w in zip(spectra, weights, strict=True) for x in s[1:]]
    assert optimum - 1e-9 <= error <= optimum + max(gains, default=0.0) + 1e-9


@given(st.lists(st.tuples(SPECTRUM, st.floats(0.1, 10)), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 40))
def test_modules_of_one_cost_get_the_optimum_at_every_size(modules, cost, spare):
    spectra, weights = map(list, zip(*modules, strict=True))
    costs = [cost] * len(spectra)
    size = sum(costs) + spare
    ranks = budget.allocate(spectra, costs, size, weights=weights)
    assert lost(spectra, ranks, weights) == pytest.approx(best(spectra, costs, weights, size), abs=1e-9)


@given(MODULES)
def test_every_point_of_the_curve_is_the_best_of_its_size(modules):
    spectra, costs, weights = map(list, zip(*modules, strict=True))
    found = budget.curve(spectra, costs, weights=weights, overhead=100)
    total = lost(spectra, [0] * len(spectra), weights)
    ranks = [1] * len(spectra)
    for nbytes, error, module in zip(*(column.tolist() for column in found), strict=True):
        if module >= 0:
            ranks[module] += 1
        size = nbytes - 100
        assert size == sum(k * c for k, c in zip(ranks, costs, strict=True))
        assert error**2 * total == pytest.approx(lost(spectra, ranks, weights), abs=1e-9)
        if prod(len(s) for s in spectra) <= 64:
            assert error**2 * total == pytest.approx(best(spectra, costs, weights, size), abs=1e-9)
            assert budget.allocate(spectra, costs, nbytes, weights=weights, overhead=100) == ranks
    assert bool((found.nbytes.diff() > 0).all())
    assert bool((found.error.diff() <= 0).all())


def test_a_curve_of_leading_parts_counts_what_is_beyond():
    sigma = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    found = budget.curve([sigma[:2]], [10], beyond=[1.0])
    assert found.nbytes.tolist() == [10, 20]
    assert found.error.square().tolist() == pytest.approx([5 / 21, 1 / 21])


def test_ranks_that_hold_nothing_are_not_bought():
    assert budget.allocate([torch.tensor([1.0, 0.0]), torch.zeros(3)], [5, 5], 10**9) == [1, 1]


def test_weights_compare_each_update_with_what_it_changes():
    one, two = torch.tensor([9.0, 3.0]), torch.tensor([9.0, 2.0])
    assert budget.allocate([one, two], [4, 4], 12) == [2, 1]
    assert budget.allocate([one, two], [4, 4], 12, weights=[0.01, 1.0]) == [1, 2]


def test_a_rank_that_does_not_fit_leaves_room_for_a_cheaper_one():
    big, small = torch.tensor([9.0, 8.0]), torch.tensor([1.0, 0.5])
    assert budget.allocate([big, small], [100, 10], 125) == [1, 2]


def test_a_budget_below_one_rank_a_module_says_the_least_that_is_possible():
    with pytest.raises(InputError) as caught:
        budget.allocate([torch.ones(4), torch.ones(4)], [1000, 500], 1699, overhead=200)
    assert "2 modules" in caught.value.what
    assert "1,700 bytes" in caught.value.hint
    assert budget.allocate([torch.ones(4), torch.ones(4)], [1000, 500], 1700, overhead=200) == [1, 1]
