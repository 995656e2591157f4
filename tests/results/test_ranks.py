"""How far two rankings go together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from dyndepth.results.statistics.ranks import LEAST, agreement_of


def test_rho_is_the_correlation_of_ranks():
    first, second = [0.1, 5.0, 2.0, 40.0, 3.0, 0.2], [1.0, 2.0, 3.0, 9.0, 2.5, 8.0]
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    found = agreement_of(first, second)
    assert found.rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    ties = agreement_of([1.0, 1.0, 2.0, 3.0], [4.0, 5.0, 5.0, 6.0])
    assert ties.rho == pytest.approx(spearmanr([1, 1, 2, 3], [4, 5, 5, 6]).statistic)
    assert (found.low < found.rho < found.high, found.n) == (True, 6)
    assert agreement_of(first, [-value for value in second]).rho == pytest.approx(-found.rho)


def test_the_interval_covers_as_often_as_it_says():
    """Of a known correlation of normal pairs, over 30 units."""
    generator = np.random.default_rng(1)
    true = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of a normal pair correlated by 0.6
    held = 0
    for _ in range(100):
        pair = generator.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=30)
        found = agreement_of(pair[:, 0].tolist(), pair[:, 1].tolist())
        held += found.low <= true <= found.high
    assert 88 <= held <= 99


def test_few_units_or_equal_ones_have_no_interval():
    few = agreement_of([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0])
    assert (few.rho, LEAST) == (pytest.approx(1.0), 5)
    assert math.isnan(few.low)
    same = agreement_of([1.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert same.shown() == {"rho": None, "low": None, "high": None, "n": 6}
    assert agreement_of([1.0], [2.0]).shown()["rho"] is None
    with pytest.raises(ValueError, match="3 and 2 scores"):
        agreement_of([1.0, 2.0, 3.0], [1.0, 2.0])
