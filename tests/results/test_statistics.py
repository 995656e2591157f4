"""Curves, interpolation by document, paired differences, Holm, and the verdict's direction."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from cells import cell
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndepth.common.errors import UserError
from dyndepth.results.statistics.curves import Point, curve, interpolate, measured, of_modules
from dyndepth.results.statistics.differences import Difference, difference, paired, reach
from dyndepth.results.statistics.verdicts import direction, holm

few = settings(max_examples=30, deadline=None)


def point(fraction, outcomes, weights=None, **more):
    outcomes = np.asarray(outcomes, dtype=float)
    weights = np.ones(len(outcomes)) if weights is None else np.asarray(weights, dtype=float)
    dense = np.full(len(outcomes), 2.0)
    documents = tuple(f"{i:03}" for i in range(len(outcomes)))
    return Point(fraction, documents, outcomes, weights, fraction * dense, dense, **more)


def scored(outcomes, speedup=1.5, weights=None, metric="bits_per_byte", **identity):
    """A cell whose one task is scored by ``metric``, weighted by bytes."""
    one = cell(**identity)
    weights = weights or [1.0] * len(outcomes)
    value = float(np.average(outcomes, weights=weights))
    one.accuracy = [one.accuracy[0] | {"metric": metric, "value": value}]
    one.compute[0] |= {"block_speedup": speedup, "total_speedup": 2 / (1 + 1 / speedup)}
    one.samples = [
        {"task": "one", "doc_id": index, "doc_hash": f"h{index}", "metric": f"{metric},none"}
        | {"outcomes": json.dumps({f"{metric},none": outcome}), "weight": weight}
        | {"block_flops": 1.0 / speedup, "dense_block_flops": 1.0}
        # What blocks do not save: as much again as dense blocks do.
        | {"total_flops": 1.0 + 1.0 / speedup, "dense_total_flops": 2.0}
        for index, (outcome, weight) in enumerate(zip(outcomes, weights, strict=True))
    ]
    return one


fractions = st.lists(st.floats(0.1, 1.0), min_size=2, max_size=6, unique_by=lambda f: round(f, 6))


@few
@given(fractions, st.integers(0, 99))
def test_interpolation_is_exact_where_it_was_measured(given_fractions, seed):
    outcomes = np.random.default_rng(seed).random((len(given_fractions), 5))
    points = [point(f, row) for f, row in zip(given_fractions, outcomes, strict=True)]
    for measured_point in points:
        found = interpolate(points, measured_point.fraction)
        assert np.array_equal(found.outcomes, measured_point.outcomes)


@few
@given(fractions, st.floats(0.0, 1.2), st.integers(0, 99))
def test_interpolation_is_linear_between_neighbours_and_silent_beyond(given_fractions, at, seed):
    outcomes = np.random.default_rng(seed).random((len(given_fractions), 5))
    points = [point(f, row) for f, row in zip(given_fractions, outcomes, strict=True)]
    found = interpolate(points, at)
    low, high = min(given_fractions), max(given_fractions)
    if at < low - 1e-9 or at > high + 1e-9:
        assert found is None
        return
    order = np.argsort(given_fractions)
    for document in range(5):
        expected = np.interp(at, np.array(given_fractions)[order], outcomes[order, document])
        assert found.outcomes[document] == pytest.approx(expected, abs=1e-6)


def test_slack_takes_the_end_point_as_it_is():
    points = [point(0.5, [1.0, 0.0]), point(1.0, [1.0, 1.0])]
    assert interpolate(points, 0.498) is None
    found = interpolate(points, 0.498, slack=0.005)
    assert (found.fraction, found.value) == (0.5, 0.5)
    assert interpolate(points, 0.49, slack=0.005) is None
    assert interpolate([], 0.5, slack=0.005) is None


def test_points_at_one_budget_count_once():
    found = curve([point(0.5, [1.0]), point(1.0, [1.0]), point(0.5, [0.0]), point(0.5, [0.2])])
    assert [each.fraction for each in found] == [0.5, 1.0]
    assert found[0].value == pytest.approx(0.4)


def test_value_is_weighted_as_the_task_weighs_it():
    found = measured([scored([1.0, 4.0], weights=[300, 100])], "one", "bits_per_byte")
    assert found.value == pytest.approx(1.75)
    assert found.fraction == pytest.approx(1 / 1.5)


def test_seeds_are_averaged_by_document():
    cells = [scored([1.0, 0.0], 1.6, seed=0), scored([0.0, 0.0], 1.25, seed=1)]
    found = measured(cells, "one", "bits_per_byte")
    assert found.outcomes.tolist() == [0.5, 0.0]
    assert found.fraction == pytest.approx((1 / 1.6 + 0.8) / 2)
    assert (found.seeds, len(set(found.cells))) == (2, 2)


def test_metrics_are_never_mixed():
    one = scored([1.0, 0.0], metric="acc")
    for row in one.samples:
        row["outcomes"] = json.dumps(json.loads(row["outcomes"]) | {"acc_norm,none": 1.0})
    one.accuracy.append(one.accuracy[0] | {"metric": "acc_norm", "value": 1.0})
    assert measured([one], "one", "acc").value == 0.5
    assert measured([one], "one", "acc_norm").value == 1.0
    with pytest.raises(UserError, match="has no f1"):
        measured([one], "one", "f1")


def test_metric_that_is_no_mean_over_documents_is_refused():
    one = scored([1.0, 4.0])
    one.accuracy[0]["value"] = 2.0
    with pytest.raises(UserError, match="as a mean over documents"):
        measured([one], "one", "bits_per_byte")


def test_other_documents_cannot_be_paired():
    one, other = point(0.5, [1.0, 0.0]), point(0.5, [1.0, 0.0])
    other = replace(other, documents=("000", "other"))
    with pytest.raises(UserError, match="different documents"):
        difference(one, other)
    with pytest.raises(UserError, match="different documents"):
        difference(one, point(0.5, [1.0, 0.0], weights=[1, 2]))


@few
@given(st.integers(0, 999), st.integers(2, 60))
def test_difference_is_symmetric_and_zero_with_itself(seed, documents):
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 500, documents)
    a, b = (point(0.5, generator.random(documents), weights) for _ in "ab")
    one, other = difference(a, b), difference(b, a)
    assert one.value == pytest.approx(a.value - b.value)
    assert one.value == pytest.approx(-other.value)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.p == other.p
    same = difference(a, a)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_sharpens_what_correlates():
    generator = np.random.default_rng(3)
    hard = generator.normal(size=200)
    a, b = hard + 0.1 * generator.normal(size=200), hard + 0.1 * generator.normal(size=200)
    sharp = paired(a, b)
    blunt = paired(a, generator.permutation(b))
    assert sharp.high - sharp.low < 0.3 * (blunt.high - blunt.low)


def test_interval_covers_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(150):
        a, b = generator.normal(0.3, 1, 60), generator.normal(0.0, 1, 60)
        found = paired(a, b)
        hits += found.low <= 0.3 <= found.high
    assert 0.88 <= hits / 150 <= 0.99


def test_interval_is_that_of_a_ratio_of_sums():
    generator = np.random.default_rng(5)
    weights = generator.integers(50, 2000, 300).astype(float)
    a, b = generator.normal(1.5, 0.3, 300), generator.normal(1.2, 0.3, 300)
    found = paired(a, b, weights)
    apart = a - b
    mean = np.average(apart, weights=weights)
    residuals = weights * (apart - mean)
    half = 1.96 * residuals.std(ddof=1) * 300**0.5 / weights.sum()
    assert found.value == pytest.approx(mean)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_one_document_says_nothing():
    found = paired(np.array([1.0]), np.array([0.0]))
    assert (found.value, found.p, direction(found, 1.0)) == (1.0, 1.0, 0)


def test_holm_is_the_published_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_direction_needs_interval_and_adjusted_p():
    shown = Difference(1.0, 0.5, 0.5, 0.1, 0.9, 0.01, 50)
    assert direction(shown, 0.02) == 1
    assert direction(shown, 0.2) == 0
    assert direction(replace(shown, value=-0.5, low=-0.9, high=-0.1), 0.02) == -1
    assert direction(replace(shown, low=-0.1), 0.02) == 0


class TestReach:
    """The least share of dense's FLOPs at which a curve is as good as dense."""

    def test_lies_where_the_straight_line_crosses_dense(self):
        rng = np.random.default_rng(0)
        base = rng.random(40)
        points = [point(0.2, base - 0.3), point(0.6, base + 0.1)]
        found = reach(points, point(1.0, base), higher_is_better=True)
        # Every document has the same differences, so resampling changes nothing.
        assert found.value == pytest.approx(0.5)
        assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))
        assert (found.n, found.open) == (40, False)

    def test_lower_may_be_better(self):
        base = np.linspace(1, 2, 12)
        points = [point(0.2, base + 0.3), point(0.6, base - 0.1)]
        found = reach(points, point(1.0, base), higher_is_better=False)
        assert found.value == pytest.approx(0.5)

    def test_dense_itself_is_the_last_resort(self):
        base = np.ones(12)
        found = reach([point(0.5, base * 0.5)], point(1.0, base), higher_is_better=True)
        assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)

    def test_nothing_is_said_below_the_least_budget(self):
        base = np.ones(12)
        found = reach([point(0.3, base), point(0.6, base)], point(1.0, base), True)
        assert (found.value, found.open) == (pytest.approx(0.3), True)

    def test_interval_covers_the_noise_of_the_documents(self):
        rng = np.random.default_rng(1)
        dense = rng.integers(0, 2, 60).astype(float)
        points = [point(0.3, rng.integers(0, 2, 60) * 0.5), point(0.7, np.maximum(dense, 0.2))]
        found = reach(points, point(1.0, dense), True)
        assert 0.3 < found.low < found.value < found.high <= 0.7

    def test_other_documents_are_refused(self):
        with pytest.raises(UserError, match="different documents"):
            reach([point(0.3, np.ones(3))], point(1.0, np.ones(4)), True)


def test_a_point_may_be_placed_by_its_sublayers():
    moved = of_modules(point(0.5, [1.0, 0.0]), 0.75)
    assert (moved.fraction, moved.value) == (0.75, 0.5)
