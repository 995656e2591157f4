"""Solving a knob for a measured speedup."""

from __future__ import annotations

import math

import pytest
import torch
from gating import GivenPlan

from dyndepth.fitting.calibration import block_speedup, solve_threshold


@pytest.mark.parametrize(
    "curve",
    [lambda x: 1 + x, lambda x: math.exp(x), lambda x: 1 + x**5, lambda x: 1 + math.sqrt(x)],
)
@pytest.mark.parametrize("target", [1.1, 1.5, 2.4])
@pytest.mark.parametrize("first", [0.01, 0.5, 3.0])
def test_finds_the_target(curve, target, first):
    asked = []

    def measure(x):
        asked.append(x)
        return curve(x)

    x, value = solve_threshold(measure, target, first, 0.1, low=0.0, high=3.0, rounds=20)
    assert value == curve(x) == pytest.approx(target, rel=0.01)
    assert len(asked) <= 14
    assert all(0 <= x <= 3 for x in asked)


@pytest.mark.parametrize("curve", [lambda x: 1 + 1.06 * (x - 1), lambda x: 1 + 0.94 * (x - 1)])
def test_known_ends_are_not_asked_for(curve):
    """A knob that nearly is the speedup: the first correction meets the target."""
    asked = []

    def measure(x):
        asked.append(x)
        return curve(x)

    found = solve_threshold(measure, 1.5, 1.5, low=1.0, high=3.0, ends=(1.0, 3.0))
    assert found[1] == curve(found[0]) == pytest.approx(1.5, rel=0.01)
    assert len(asked) == 2


def test_gives_the_nearest_where_the_target_is_jumped_over_or_out_of_reach():
    assert solve_threshold(lambda x: 1.0 if x < 2 else 1.4, 1.3, 0, 0.5, low=0, high=9)[1] == 1.4
    assert solve_threshold(lambda x: 1 + x, 5.0, 0, 0.5, low=0, high=2) == (2, 3)
    assert solve_threshold(lambda x: 2 + x, 1.0, 1, 0.5, low=0, high=2) == (0, 2)


def test_block_speedup_counts_the_phases_in_which_the_method_skips(tiny):
    windows = torch.randint(3, 90, (6, 20), generator=torch.Generator().manual_seed(0))
    half = ((True, True), (False, False)) * 2
    for phases in ("both", "generation"):
        method = GivenPlan(plan=half, phases=phases)
        assert block_speedup(tiny(), method, windows) == pytest.approx(2.0)
