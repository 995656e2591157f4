"""Tables of comparisons: against dense, whole curves, equal FLOPs; what is refused or left out."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from cells import cell, identity
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from test_statistics import point, scored

from dyndepth.cells.cell import Cell
from dyndepth.cells.store import Store
from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.compare import main
from dyndepth.results import console, standing
from dyndepth.results.comparison import against_dense, compared, left_out, texts
from dyndepth.results.comparison_columns import COMPARISON, CURVES, EQUAL_FLOPS
from dyndepth.results.curve_tables import curves, equal_flops
from dyndepth.results.standing import VERDICTS
from dyndepth.results.statistics.curves import area, degradation, overlap, pareto
from dyndepth.results.statistics.resampling import RESAMPLES, contests, means, ratios
from dyndepth.results.statistics.verdicts import holm, is_binary, mcnemar

few = settings(max_examples=25, deadline=None)
DOCUMENTS = 40


def made(outcomes, speedup=1.0, bound=False, metric="acc", **identity):
    """A finished cell; the target speedup is the achieved one."""
    identity = {"method": "dense", "target_speedup": speedup, "phases": "both"} | identity
    one = scored(list(map(float, outcomes)), speedup, metric=metric, **identity)
    one.accuracy[0]["higher_is_better"] = metric != "bits_per_byte"
    one.provenance["uses_labels"] = bound
    return one


def row_of(rows, **wanted):
    if any("flops" in row for row in rows):
        wanted = {"flops": "block"} | wanted
    (found,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return found


def bits(seed=0):
    """Dense, two curves of bits per byte over the same documents, and a bound."""
    dense = np.random.default_rng(seed).normal(1.0, 0.2, DOCUMENTS)
    add = {"metric": "bits_per_byte"}
    noise = np.random.default_rng(seed + 1).normal(0, 0.01, DOCUMENTS)
    return [
        made(dense, **add),
        made(dense + 0.2 + noise, 1.25, method="good", **add),
        made(dense + 0.5 + noise, 2.0, method="good", **add),
        made(dense + 0.4 - noise, 1.25, method="poor", **add),
        made(dense + 1.0 - noise, 1.6, method="poor", **add),
        made(dense - 0.3 + noise, 2.0, method="seer", bound=True, **add),
    ]


# --- the tests themselves -------------------------------------------------------------------------


@few
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_the_binomial_test_of_what_differs(pairs):
    a, b = np.array(pairs, dtype=float).T
    gained, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    expected = min(1.0, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5))
    assert mcnemar(a, b) == pytest.approx(expected)


def test_mcnemar_by_hand():
    # Nine documents differ, eight of them to one side: 2 (1 + 9) / 2 ** 9.
    a = np.array([1.0] * 8 + [0.0] + [1.0] * 5)
    b = np.array([0.0] * 8 + [1.0] + [1.0] * 5)
    assert mcnemar(a, b) == pytest.approx(20 / 512)
    assert mcnemar(a, a) == 1.0


def test_mcnemar_refuses_what_is_no_accuracy():
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar(np.array([0.5, 1.0]), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="as many"):
        mcnemar(np.array([1.0]), np.array([0.0, 1.0]))
    assert is_binary(np.array([0.0, 1.0]))
    assert not is_binary(np.array([0.0, 1 / 3]))


class TestResampling:
    """Means and ratios of many rows at once."""

    def test_intervals_cover_as_often_as_they_say(self):
        generator = np.random.default_rng(0)
        rows = generator.normal(0.3, 1.0, (300, 80))
        found = means(rows, np.ones(80))
        covered = (found.low <= 0.3) & (found.high >= 0.3)
        assert 0.90 <= covered.mean() <= 0.98

    def test_p_of_no_difference_is_small_as_often_as_it_says(self):
        rows = np.random.default_rng(1).normal(0.0, 1.0, (300, 80))
        p = means(rows, np.ones(80)).p
        assert 0.02 <= (p < 0.05).mean() <= 0.10
        assert 0.35 <= (p < 0.5).mean() <= 0.65

    def test_agrees_with_scipys_bootstrap(self):
        from dyndepth.results.statistics.differences import paired

        generator = np.random.default_rng(2)
        a, b, weights = generator.normal(0.2, 1, 50), generator.normal(0, 1, 50), np.arange(1, 51.0)
        one, found = paired(a, b, weights), means((a - b)[None], weights)
        assert found.value[0] == pytest.approx(one.value)
        assert [found.low[0], found.high[0]] == pytest.approx([one.low, one.high], abs=0.02)
        assert found.p[0] == pytest.approx(one.p, abs=0.02)

    def test_rows_do_not_depend_on_their_company(self):
        rows = np.random.default_rng(3).normal(size=(70, 30))
        weights = np.arange(1, 31.0)
        whole, alone = means(rows, weights), means(rows[50:51], weights)
        assert whole.low[50] == pytest.approx(alone.low[0], abs=1e-12)
        assert whole.p[50] == alone.p[0]

    def test_a_difference_that_never_is_has_p_1(self):
        found = means(np.zeros((1, 20)), np.ones(20))
        assert (found.value[0], found.low[0], found.high[0], found.p[0]) == (0, 0, 0, 1)
        third = np.full(20, 1 / 3 + 1 / 3 + 1 / 3 - 1.0)
        assert means(third[None], np.ones(20)).p[0] == 1

    def test_p_is_never_0(self):
        found = means(np.ones((1, 20)), np.ones(20))
        assert found.p[0] == pytest.approx(2 / (1 + RESAMPLES))

    def test_ratio_of_what_is_proportional_is_exact(self):
        base = np.random.default_rng(4).random(30) + 0.1
        found = ratios(np.stack([0.8 * base, base]), base, np.ones(30))
        assert found.value == pytest.approx([0.8, 1.0])
        assert found.low == pytest.approx([0.8, 1.0])
        assert found.high == pytest.approx([0.8, 1.0])

    def test_ratio_to_nothing_does_not_exist(self):
        found = ratios(np.ones((1, 12)), np.zeros(12), np.ones(12))
        assert np.isnan([found.value[0], found.low[0], found.high[0]]).all()

    def test_nothing_gives_nothing(self):
        assert len(means(np.empty((0, 5)), np.ones(5)).value) == 0


# --- curves ---------------------------------------------------------------------------------------


@few
@given(
    st.lists(st.floats(0.1, 0.9), min_size=1, max_size=5, unique_by=lambda f: round(f, 3)),
    st.floats(-3, 3),
    st.floats(-2, 2),
)
def test_area_of_a_straight_line_is_its_middle(fractions, slope, at_full):
    base = np.linspace(-1, 1, 12)
    at = [*fractions, 1.0]
    points = [point(f, base + at_full + slope * (1 - f)) for f in at]
    found, weights = area(points)
    middle = at_full + slope * (1 - min(at)) / 2
    assert found == pytest.approx(base + middle, abs=1e-9)
    assert weights.tolist() == [1.0] * 12
    low = min(at)
    part, _ = area(points, (low, (low + 1) / 2))
    assert part == pytest.approx(base + at_full + slope * (1 - low) * 0.75, abs=1e-9)


def test_area_by_hand():
    points = [point(0.5, [0.0]), point(0.6, [1.0]), point(1.0, [2.0])]
    assert area(points)[0] == pytest.approx([(0.1 * 0.5 + 0.4 * 1.5) / 0.5])
    assert area(points, (0.55, 0.8))[0] == pytest.approx([(0.05 * 0.75 + 0.2 * 1.25) / 0.25])


def test_area_never_leaves_the_measured_range():
    points = [point(0.5, [0.0]), point(0.8, [1.0])]
    with pytest.raises(ValueError, match="not measured"):
        area(points, (0.4, 0.8))
    with pytest.raises(ValueError, match="not measured"):
        area(points, (0.5, 1.0))
    assert area(points[:1]) is None


def test_overlap_of_two_curves():
    one = [point(0.5, [0.0]), point(1.0, [0.0])]
    assert overlap(one, [point(0.4, [0.0]), point(0.7, [0.0])]) == (0.5, 0.7)
    assert overlap(one, [point(0.3, [0.0]), point(0.5, [0.0])]) is None


def test_degradation_is_points_lost_a_percent_of_speedup():
    dense = point(1.0, [1.0] * 10)
    # 6 points of accuracy for 25 percent, then 20 points for 100 percent.
    points = [point(0.8, [0.94] * 10), point(0.5, [0.8] * 10), dense]
    assert degradation(points[:1], dense, True) == pytest.approx(np.full(10, 6 / 25))
    assert degradation(points, dense, True) == pytest.approx(np.full(10, 26 / 125))
    assert degradation(points[:1], dense, False) == pytest.approx(np.full(10, -6 / 25))
    assert degradation([dense], dense, True) is None


def test_pareto_members_are_beaten_by_nobody():
    fractions, values = [1.0, 0.8, 0.8, 0.5, 0.6], [0.9, 0.7, 0.8, 0.6, 0.5]
    assert pareto(fractions, values, True) == [True, False, True, True, False]
    assert pareto(fractions, values, False) == [False, False, False, True, True]
    assert pareto([0.5, 0.5], [1.0, 1.0], True) == [True, True]
    assert pareto([], [], True) == []


# --- against dense --------------------------------------------------------------------------------


def test_each_cell_stands_against_dense_on_its_documents():
    rows = against_dense(bits())
    good = row_of(rows, method="good", target_speedup=1.25)
    assert good["difference"] == pytest.approx(good["value"] - good["dense_value"])
    assert good["low"] < 0.2 < good["high"]
    assert good["retained"] == pytest.approx(good["value"] / good["dense_value"])
    assert good["retained_low"] < good["retained"] < good["retained_high"]
    assert good["block_fraction"] == pytest.approx(0.8)
    assert (good["n"], good["test"], good["verdict"]) == (DOCUMENTS, "bootstrap", "worse")
    assert row_of(rows, method="seer")["verdict"] == "better"
    dense = row_of(rows, method="dense")
    assert (dense["verdict"], dense["difference"], dense["retained"]) == ("reference", 0.0, 1.0)
    assert "p" not in dense


def test_accuracies_are_tested_by_mcnemar_and_all_of_a_metric_by_holm():
    right = [1] * 30 + [0] * 10
    worse, same = [0] * 9 + right[9:], right
    rows = against_dense(
        [made(right), made(worse, 1.5, method="one"), made(same, 1.5, method="two")]
    )
    one, two = row_of(rows, method="one"), row_of(rows, method="two")
    assert one["test"] == two["test"] == "mcnemar"
    assert one["p"] == pytest.approx(2 / 2**9)
    assert one["p_holm"] == pytest.approx(4 / 2**9)
    assert (two["p"], two["p_holm"], two["verdict"]) == (1.0, 1.0, "no difference shown")
    assert one["verdict"] == "worse"


def test_what_does_not_outlive_holm_is_not_shown():
    right = [1] * 30 + [0] * 10
    worse = [0] * 7 + right[7:]
    alone = against_dense([made(right), made(worse, 1.5, method="one")])
    assert row_of(alone, method="one")["verdict"] == "worse"
    others = [made(right, 1.5, method=f"other{i}") for i in range(9)]
    among = row_of(
        against_dense([made(right), made(worse, 1.5, method="one"), *others]), method="one"
    )
    assert among["high"] < 0
    assert among["p"] == pytest.approx(2 / 2**7)
    assert among["p_holm"] == pytest.approx(20 / 2**7)
    assert among["verdict"] == "no difference shown"


def test_metrics_stand_in_rows_and_families_of_their_own():
    cells = [made([1, 0] * 10), made([0, 0] * 10, 1.5, method="one")]
    for each in cells:
        each.accuracy.append(each.accuracy[0] | {"metric": "acc_norm", "value": 1.0})
        for row in each.samples:
            row["outcomes"] = json.dumps(json.loads(row["outcomes"]) | {"acc_norm,none": 1.0})
    rows = [row for row in against_dense(cells) if row["method"] == "one"]
    assert [(row["metric"], row["value"]) for row in rows] == [("acc", 0.0), ("acc_norm", 1.0)]
    assert [row["p_holm"] for row in rows] == [row["p"] for row in rows]
    for table in (curves(cells), equal_flops(cells, budgets=[1.25])):
        found = [(row["metric"], row["flops"]) for row in table]
        assert found == [(x, y) for x in ("acc", "acc_norm") for y in ("block", "total")]
        assert [row.get("p_holm") for row in table] == [row.get("p") for row in table]


def test_a_bound_dominates_nobody_and_is_no_member():
    rows = against_dense(bits())
    assert row_of(rows, method="good", target_speedup=2.0)["pareto"] is True
    assert row_of(rows, method="seer").get("pareto") is None
    assert row_of(rows, method="poor", target_speedup=1.25)["pareto"] is False
    # The same cell as a competitor would have dominated them all.
    rival = [replace(c, provenance={}) for c in bits()]
    rows = against_dense(rival)
    assert row_of(rows, method="good", target_speedup=2.0)["pareto"] is False
    assert row_of(rows, method="dense")["pareto"] is False


def test_pareto_goes_by_seeds_averaged_and_within_one_recovery():
    dense = made([1] * 20)
    lucky = [made([1] * 20, 1.5, method="one", seed=0), made([0] * 20, 1.5, method="one", seed=1)]
    steady = made([1] * 15 + [0] * 5, 1.5, method="two")
    tuned = made([1] * 20, 2.0, method="one", recovery="lora(rank=4)")
    rows = against_dense([dense, *lucky, steady, tuned])
    assert row_of(rows, method="one", seed=0, recovery="none")["pareto"] is False
    assert row_of(rows, method="two")["pareto"] is True
    assert row_of(rows, recovery="lora(rank=4)")["pareto"] is True


def test_few_documents_give_values_without_intervals():
    rows = against_dense([made([1, 0, 1]), made([1, 0, 0], 1.5, method="one")])
    one = row_of(rows, method="one")
    assert one["value"] == pytest.approx(1 / 3)
    assert one["difference"] == pytest.approx(-1 / 3)
    assert one.get("low") is None
    assert one.get("p") is None
    assert one["verdict"] == "not comparable"
    assert "3 documents are too few" in one["reason"]


def test_failed_cells_are_named():
    broken = cell(method="broken", target_speedup=1.5)
    broken.accuracy, broken.samples, broken.compute = [], [], []
    broken.status, broken.error = "error", "no such layer"
    tables = compared([*bits(), broken])
    row = row_of(tables["comparison"], method="broken")
    assert (row["verdict"], row["reason"]) == ("not comparable", "no such layer")
    row = row_of(tables["curves"], method="broken")
    assert row["failed"] == broken.key
    assert "no such layer" in row["reason"]
    assert row_of(tables["equal_flops"], method="broken", reference_speedup=1.25)["failed"]


def test_without_dense_nothing_is_compared():
    rows = compared(bits()[1:])
    assert {row["verdict"] for row in rows["comparison"]} == {"not comparable"}
    assert "no finished dense cell" in rows["comparison"][0]["reason"]
    assert all(row.get("difference") is None for row in rows["equal_flops"])


def test_settings_stand_apart():
    other = [replace(c, identity=c.identity | {"dtype": "bfloat16"}) for c in bits(seed=7)]
    alone, both = against_dense(bits()), against_dense([*bits(), *other])
    own = [row for row in both if row["dtype"] != "bfloat16"]
    drop = {"p_holm"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in own] == [
        {k: v for k, v in row.items() if k not in drop} for row in alone
    ]
    assert len({row["setting"] for row in curves([*bits(), *other])}) == 2


def test_other_versions_and_data_are_refused():
    cells = bits()
    cells[2].accuracy[0]["task_version"] = 2.0
    for table in (against_dense, curves, equal_flops):
        with pytest.raises(UserError, match="task one has version"):
            table(cells)
    cells = bits()
    cells[2].identity["data_fingerprint"] = "other"
    for table in (against_dense, curves, equal_flops):
        with pytest.raises(UserError, match="different data"):
            table(cells)


def test_other_documents_of_one_setting_are_not_paired():
    cells = bits()
    for row in cells[1].samples:
        row["doc_hash"] = "other"
    row = row_of(against_dense(cells), method="good", target_speedup=1.25)
    assert row["verdict"] == "not comparable"
    assert "different documents" in row["reason"]
    assert "different documents" in row_of(curves(cells), method="good")["reason"]


def test_a_metric_that_is_no_mean_over_documents_is_left_out_by_name():
    cells = bits()
    for each in cells:
        each.accuracy.append(each.accuracy[0] | {"metric": "perplexity", "value": 9.0})
    assert left_out(cells) == ["one perplexity"]
    assert {row["metric"] for row in against_dense(cells)} == {"bits_per_byte"}


# --- whole curves ---------------------------------------------------------------------------------


def test_a_curve_is_judged_over_the_overlap_alone():
    rows = curves(bits())
    good, poor = row_of(rows, method="good"), row_of(rows, method="poor")
    assert (good["points"], good["fraction_low"], good["fraction_high"]) == (2, 0.5, 1.0)
    assert poor["fraction_low"] == pytest.approx(0.625)
    assert (good["overlap_low"], good["overlap_high"]) == (poor["fraction_low"], 1.0)
    assert good["competitor"].startswith("poor")
    assert (good["verdict"], poor["verdict"]) == ("better", "worse")
    assert good["area_difference"] == pytest.approx(-poor["area_difference"])
    assert good["area_low"] < good["area"] < good["area_high"]
    # 20 and 50 hundredths lost for 25 and 100 percent, but for the noise.
    assert good["sdr"] == pytest.approx(70 / 125, abs=0.01)
    assert good["sdr_low"] < good["sdr"] < good["sdr_high"]
    bound = row_of(rows, method="seer")
    assert bound["bound"] is True
    assert bound["competitor"].startswith("good")
    assert bound["verdict"] == "better"


def test_a_curve_with_recovery_ends_at_dense_with_the_same_recovery():
    dense, tuned = [1] * 10 + [0] * 10, [1] * 14 + [0] * 6
    lora = {"recovery": "lora(rank=4)"}
    cells = [made(dense), made(tuned, **lora), made(dense, 2.0, method="one", **lora)]
    row = row_of(curves(cells), method="one")
    assert row["area"] == pytest.approx((0.7 + 0.5) / 2)
    assert row["sdr"] == pytest.approx(0.0)
    # Without it there is one point, no curve.
    row = row_of(curves([cells[0], cells[2]]), method="one")
    assert row.get("area") is None
    assert "one measured point" in row["reason"]


# --- equal FLOPs ----------------------------------------------------------------------------------


@few
@given(st.floats(1.0, 4.0), st.integers(0, 20))
def test_nothing_is_said_beyond_the_measured_points(budget, seed):
    for row in equal_flops(bits(seed), budgets=[budget]):
        inside = row["fraction_low"] - 1e-9 <= 1 / budget <= row["fraction_high"] + 1e-9
        assert (row.get("value") is not None) == inside
        if not inside:
            assert "measured from" in row["reason"]
            assert row["verdict"] == "not comparable"
            assert all(row.get(key) is None for key in ("low", "difference", "rank", "p", "p_holm"))


def test_values_at_a_budget_are_interpolated_and_ranked():
    dense = made([1.0] * 20, metric="rougeL")
    cells = [dense]
    for method, at_2 in (("a", 0.5), ("b", 0.3), ("c", 0.3)):
        cells.append(made([at_2] * 20, 2.0, method=method, metric="rougeL"))
    cells.append(made([0.9] * 20, 2.0, method="seer", bound=True, metric="rougeL"))
    rows = equal_flops(cells, budgets=[4 / 3])
    a, b, c, seer = (row_of(rows, method=name) for name in ("a", "b", "c", "seer"))
    assert a["value"] == pytest.approx(0.75)
    assert (a["low"], a["high"]) == (pytest.approx(0.75), pytest.approx(0.75))
    assert a["difference"] == pytest.approx(-0.25)
    assert [row.get("rank") for row in (a, b, c, seer)] == [1, 2, 2, None]
    assert [row["competitors"] for row in (a, seer)] == [3, 3]
    assert a["competitor"].startswith("b")
    assert b["competitor"].startswith("a")
    assert a["competitor_difference"] == pytest.approx(0.1)
    assert (a["verdict"], b["verdict"], seer["verdict"]) == ("better", "worse", "better")


def test_all_flops_are_a_budget_of_their_own():
    # Blocks twice as fast are 2 / (1 + 1 / 2) times as fast with what they do not save.
    rows = equal_flops(bits(), budgets=[4 / 3, 1.9])
    good = row_of(rows, method="good", flops="total", reference_speedup=4 / 3)
    measured = row_of(against_dense(bits()), method="good", target_speedup=2.0)
    assert measured["total_fraction"] == pytest.approx(3 / 4)
    assert good["value"] == pytest.approx(measured["value"])
    assert good["fraction_low"] == pytest.approx(3 / 4)
    beyond = row_of(rows, method="good", flops="total", reference_speedup=1.9)
    assert "of dense's total FLOPs" in beyond["reason"]
    assert row_of(rows, method="good", flops="block", reference_speedup=1.9)["value"] is not None


def test_many_equal_rivals_make_no_better_one():
    # Twelve methods are alike; the best of eleven others looks better than each, by chance.
    worse = apart = 0
    for seed in range(25):
        drawn = np.random.default_rng(seed).normal(1.0, 0.3, (12, 60))
        vectors = [own - np.delete(drawn, i, axis=0) for i, own in enumerate(drawn)]
        adjusted = contests(vectors, np.ones(60), [1.0] * 12)
        hardest = [each[each.mean(axis=1).argmin()] for each in vectors]
        alone = means(np.stack(hardest), np.ones(60)).p
        behind = np.array([each.mean() < 0 for each in hardest])
        worse += bool((np.array(holm(adjusted))[behind] <= 0.05).any())
        apart += bool((np.array(holm(list(alone)))[behind] <= 0.05).any())
    assert worse <= 4 < apart


def test_one_that_is_behind_many_is_shown_to_be():
    generator = np.random.default_rng(3)
    rivals = generator.normal(1.0, 0.1, (8, 60))
    own = generator.normal(0.5, 0.1, 60)
    first, second = contests([own - rivals, rivals - own], np.ones(60), [1.0, 1.0])
    assert first == second == pytest.approx(2 / (1 + RESAMPLES))
    # Less is better: the same numbers the other way round.
    assert contests([own - rivals], np.ones(60), [-1.0]) == [pytest.approx(2 / (1 + RESAMPLES))]
    assert contests([np.zeros((2, 60))], np.ones(60), [1.0]) == [1.0]


def test_shared_areas_are_over_one_range():
    rows = curves(bits())
    good, poor, seer = (row_of(rows, method=name) for name in ("good", "poor", "seer"))
    assert (good["shared_low"], good["shared_high"]) == (1 / 1.6, 1.0)
    assert (good["shared_low"], good["shared_high"]) == (poor["shared_low"], poor["shared_high"])
    assert poor["shared_area"] == pytest.approx(poor["area"])
    assert good["shared_area"] < good["area"]
    assert seer["shared_area"] is not None


def test_dense_ends_a_curve_with_recovery_only_of_the_same_text():
    add = {"recovery": "lora(rank=4)", "metric": "bits_per_byte"}
    cells = bits()
    cells += [made([1.2] * DOCUMENTS, 2.0, method="good", corpus_fingerprint="aa", **add)]
    for text, value in (("aa", 0.9), ("bb", 0.1)):
        cells.append(made([value] * DOCUMENTS, corpus_fingerprint=text, **add))
    row = row_of(curves(cells), method="good", recovery="lora(rank=4)")
    assert row["area"] == pytest.approx((1.2 + 0.9) / 2)


def test_the_band_of_a_value_covers_the_truth():
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(40):
        cells = [made(generator.normal(1.0, 0.3, 50), metric="rougeL")]
        cells.append(made(generator.normal(0.6, 0.3, 50), 2.0, method="one", metric="rougeL"))
        row = row_of(equal_flops(cells, budgets=[4 / 3]), method="one")
        hits += row["low"] <= 0.8 <= row["high"]
    assert hits >= 34


def test_a_budget_below_dense_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        equal_flops(bits(), budgets=[0.5])
    with pytest.raises(UserError, match="at least 1"):
        equal_flops(bits(), budgets=[float("nan")])


# --- files and command line -----------------------------------------------------------------------


def test_equal_cells_give_equal_bytes_whatever_their_order():
    cells = bits()
    written = texts(compared(cells))
    random.Random(1).shuffle(cells)
    assert texts(compared(cells)) == written
    assert texts(compared(bits())) == written


def test_columns_are_those_that_are_described():
    written = texts(compared(bits()))
    for name, columns in (
        ("comparison.csv", COMPARISON),
        ("curves.csv", CURVES),
        ("equal_flops.csv", EQUAL_FLOPS),
    ):
        header, *rows = csv.reader(io.StringIO(written[name]))
        assert header == list(columns)
        assert rows
        assert all(columns.values())
    rows = list(csv.DictReader(io.StringIO(written["equal_flops.csv"])))
    assert {row["bound"] for row in rows} == {"TRUE", "FALSE"}
    assert {row["rank"] for row in rows} <= {"1", "2", ""}


def test_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dyndepth.common.commands.PIPE_WIDTH", 100)
    store = Store(tmp_path / "run")
    for each in bits():
        store.write(each)
    out = tmp_path / "out"
    words = [str(tmp_path / "run"), "--at", "1.25", "--output_path", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "seer (bound)" not in printed
    assert main([*words, "--all"]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 or line.startswith("written") for line in printed.splitlines())
    assert "seer (bound)" in printed
    assert sorted(path.name for path in out.iterdir()) == sorted(texts(compared(bits())))
    assert (out / "equal_flops.csv").read_text() == texts(compared(bits(), budgets=[1.25]))[
        "equal_flops.csv"
    ]


def test_the_first_page_says_how_a_method_stands(tmp_path, capsys):
    store = Store(tmp_path / "run")
    for each in bits():
        store.write(each)
    rows = compared(bits(), budgets=[1.25])["equal_flops"]
    row = next(r for r in rows if r["method"] == "good" and r["flops"] == "block")
    assert main([str(tmp_path / "run"), "--at", "1.25", "--methods", "good"]) == 0
    printed = capsys.readouterr().out
    first, *rest = printed.splitlines()
    assert first == "good against the best other at equal block FLOPs"
    assert len(rest) <= 40
    line = next(line for line in rest if line.split()[:1] == ["1.25x"])
    low, high = row["competitor_difference_low"], row["competitor_difference_high"]
    assert f"{row['value']:.3f}" in line
    assert f"{row['competitor_value']:.3f}" in line
    assert f"{row['competitor_difference']:+.3f} [{low:+.3f}, {high:+.3f}]" in line
    assert line.rstrip().endswith(VERDICTS[row["verdict"]])
    assert row["competitor"].partition("(")[0] in line
    assert "--all" in rest[-1]
    assert main([str(tmp_path / "run"), "--methods", "nobody"]) == 2
    assert "there is no curve of 'nobody'; --methods takes " in capsys.readouterr().err


def _written(folder, *cells):
    for each in cells:
        Store(folder).write(each)
    return str(folder)


def _printed(capsys, *words):
    assert main([*words]) == 0
    return capsys.readouterr().out


def _titles(printed):
    lines = [line for line in printed.splitlines() if not line.startswith("the rest")]
    return [line.partition(" against ")[0] for line in lines if " against " in line]


def _many(own="mine", **changes):
    """Dense, five methods of the suite, and a user's own, the worst."""
    dense = np.random.default_rng(0).normal(1.0, 0.2, DOCUMENTS)
    add = {"metric": "bits_per_byte"}
    names = [name for name in registry.methods() if name != "dense"][:5]
    cells = [made(dense, **add, **changes)]
    for place, name in enumerate([*names, own]):
        noise = np.random.default_rng(place + 1).normal(0, 0.01, DOCUMENTS)
        cells.append(made(dense + 0.1 * (place + 1) + noise, 1.5, method=name, **add, **changes))
    return cells, names


def test_one_s_own_method_comes_first_and_then_the_best_three(tmp_path, capsys):
    cells, names = _many()
    printed = _printed(capsys, _written(tmp_path / "run", *cells))
    assert _titles(printed) == ["mine", *names[:3]]
    assert f"2 more methods: {names[3]}, {names[4]}" in printed.splitlines()
    cells.pop(5)
    printed = _printed(capsys, _written(tmp_path / "less", *cells))
    assert f"1 more method: {names[3]}" in printed.splitlines()


@pytest.mark.parametrize("words", [[], ["--methods", "mine"]])
def test_one_s_own_method_of_another_setting_says_what_differs(tmp_path, capsys, words):
    cells, names = _many()
    suite = _written(tmp_path / "suite", *cells[:-1])
    own, _ = _many(limit={"one": 7, "two": 7})
    mine = _written(tmp_path / "mine", own[0], own[-1])
    printed = _printed(capsys, mine, suite, *words)
    assert _titles(printed)[0] == "mine, A"
    assert "mine, A against dense" in printed
    assert "no competitor" not in printed
    (said,) = [line for line in printed.splitlines() if " stands alone: " in line]
    assert "it was scored with limit=7, the others with limit=" in said
    assert f"({names[0]}, B)" in said
    assert f"`dyndepth sweep --methods 'mine,{names[0]}'`" in said
    alone = _printed(capsys, mine, *words)
    assert "mine stands alone: no other method was run in its setting; `dyndepth sweep" in alone


def test_what_failed_is_one_line_and_a_short_curve_says_how_far_it_goes(tmp_path, capsys):
    cells, names = _many()
    failed = [
        Cell(identity(method=name, target_speedup=1.5, phases="both"), status="error", error="no")
        for name in ("broken", names[1])
    ]
    run = _written(tmp_path / "run", cells[0], cells[1], *failed)
    printed = _printed(capsys, run, "--at", "1.25", "1.6", "1.9")
    assert _titles(printed) == [names[0]]
    assert printed.count("broken") == 1
    assert printed.count("measured") - printed.count("not measured") == 1
    assert "; measured up to 1.50x" in printed
    assert "of dense's block FLOPs" not in printed


def test_files_are_written_before_anything_is_printed(tmp_path, monkeypatch):
    store = Store(tmp_path / "run")
    for each in bits():
        store.write(each)
    out = tmp_path / "out"

    def shown(*_):
        assert sorted(path.name for path in out.iterdir()) == [
            *("comparison.csv", "curves.csv", "equal_flops.csv")
        ]
        raise BrokenPipeError

    monkeypatch.setattr(standing, "show_standing", shown)
    with pytest.raises(BrokenPipeError):
        main([str(tmp_path / "run"), "--output_path", str(out)])


def test_command_refuses_in_one_sentence(tmp_path, capsys):
    store = Store(tmp_path / "run")
    for each in bits():
        store.write(each)
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path / "run"), "--tasks", "three"]) == 2
    assert main([str(tmp_path / "run"), "--at", "0.5"]) == 2
    assert main([str(tmp_path / "run"), "--at", "1.5,0.5", "--tasks", "one,three"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "no cell has the task three" in lines[1]
    assert "no cell has the task three" in lines[3]


def test_every_verdict_has_a_mark():
    assert set(console.MARKS) >= {"better", "worse", "reference"}
