"""The multiple-choice knapsack: equal to trying everything, never beyond the budget, fast."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from dyndepth.common.errors import UserError
from dyndepth.methods.oracle.knapsack import solve

WHOLE = st.integers(0, 12).map(float)
REAL = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 6))


def problems(values, costs):
    """(values, costs, share of the way from the cheapest to the dearest) of small problems."""

    def of(shape):
        rows = st.lists(st.lists(costs, min_size=shape[1], max_size=shape[1]), min_size=shape[0],
                        max_size=shape[0])  # fmt: skip
        more = st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0],
                        max_size=shape[0])  # fmt: skip
        return st.tuples(more.map(np.array), rows.map(np.array), st.floats(0, 1.1))

    return st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(of)


def worth(table, choice):
    return math.fsum(table[np.arange(len(table)), choice])


def by_hand(values, costs, budget):
    """The best (value, minus cost) of all choices within the budget."""
    every = itertools.product(range(values.shape[1]), repeat=len(values))
    fitting = ((worth(values, c), -worth(costs, c)) for c in map(list, every))
    return max(pair for pair in fitting if -pair[1] <= budget)


def budget_of(costs, share):
    cheapest, dearest = costs.min(1).sum(), costs.max(1).sum()
    return cheapest + share * (dearest - cheapest)


@settings(deadline=None, max_examples=200)
@given(problems(WHOLE, WHOLE))
def test_whole_numbers_equal_trying_everything_ties_included(problem):
    values, costs, share = problem
    budget = math.floor(budget_of(costs, share))
    choice = solve(values, costs, budget)
    assert choice.dtype == np.int64
    assert (worth(values, choice), -worth(costs, choice)) == by_hand(values, costs, budget)


@settings(deadline=None, max_examples=200)
@given(problems(REAL, REAL))
def test_real_numbers_equal_trying_everything(problem):
    values, costs, share = problem
    # A hair above: sums within rounding of the budget may go either way.
    budget = budget_of(costs, share) + 1e-8
    choice = solve(values, costs, budget)
    assert worth(costs, choice) <= budget
    assert worth(values, choice) == pytest.approx(by_hand(values, costs, budget)[0], abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(problems(REAL, REAL), st.floats(0, 1))
def test_a_larger_budget_is_never_worse(problem, other):
    values, costs, share = problem
    small, large = sorted([share, other])
    found = [
        worth(values, solve(values, costs, budget_of(costs, part) + 1e-8))
        for part in (small, large)
    ]
    assert found[0] <= found[1] + 1e-9


def test_the_order_of_classes_and_equal_options_does_not_matter():
    random = np.random.default_rng(3)
    values, costs = random.integers(0, 4, (2, 30, 6)).astype(float)
    choice, turned = solve(values, costs, 50), solve(values[::-1], costs[::-1], 50)
    assert worth(values, choice) == worth(values[::-1], turned)
    assert worth(costs, choice) == worth(costs[::-1], turned)
    assert np.array_equal(choice, solve(values, costs, 50))
    doubled = solve(np.repeat(values, 2, 1), np.repeat(costs, 2, 1), 50)
    assert not (doubled % 2).any(), "of equal options the first is taken"


def large(kind, random):
    """Values ``[200, 120]`` and costs of routes of 30 depths, four each, of unequal documents."""
    depth = np.repeat(np.arange(1, 31), 4)
    costs = random.integers(40, 400, (200, 1)) * 3_538_944.0 * depth
    if kind == "rarely right":
        return (random.random((200, 120)) < depth / 900).astype(float), costs
    if kind == "often right":
        return (random.random((200, 120)) < 0.5) / 200, costs
    bits = 1 + 6 * np.exp(-depth / 5) * random.lognormal(size=(200, 1))
    return -(bits + 0.2 * random.normal(size=(200, 120))), costs


@pytest.mark.parametrize("kind", ["rarely right", "often right", "bits"])
@pytest.mark.parametrize("speedup", [1.1, 2.0, 5.0])
def test_two_hundred_documents_take_no_time(kind, speedup):
    values, costs = large(kind, np.random.default_rng(0))
    budget = costs.max(1).sum() / speedup
    began = time.process_time()  # not the clock: the machine may do other work
    choice = solve(values, costs, budget)
    assert time.process_time() - began < 3
    assert worth(costs, choice) <= budget
    # Lagrange: at any price of cost, no choice can be worth more than the best option of each
    # document less its price, and the price of the budget (Geoffrion 1974).
    lagrange = minimize_scalar(
        lambda price: (values - price * costs).max(1).sum() + price * budget,
        bounds=(0, np.ptp(values) / costs.min()),
        method="bounded",
        options={"xatol": 1e-20},
    ).fun
    assert lagrange - np.ptp(values) <= worth(values, choice) <= lagrange + 1e-9


def test_wrong_problems_are_refused():
    with pytest.raises(UserError, match="cheapest options cost 3 together, which exceeds"):
        solve(np.zeros((2, 2)), np.array([[1.0, 5.0], [2.0, 2.0]]), 2.9)
    with pytest.raises(ValueError, match="must be numbers"):
        solve(np.array([[np.nan]]), np.zeros((1, 1)), 1.0)
    with pytest.raises(ValueError, match=r"\[n, options\]"):
        solve(np.zeros((2, 2)), np.zeros((2, 3)), 1.0)
    assert solve(np.zeros((0, 3)), np.zeros((0, 3)), 0.0).tolist() == []
