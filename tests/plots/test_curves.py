"""Figures of a run's tables: what is drawn, what is refused, and the command that writes them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cells import identity, rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_plots import make_routes, texts

from dyndepth import plots
from dyndepth.cells.cell import Cell
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.method import SUBLAYERS
from dyndepth.plots.__main__ import figures, main
from dyndepth.plots.scores import TOGETHER
from dyndepth.plots.style import (
    BOUND_DASH,
    CHANCE,
    FRONT,
    LOADED,
    MARKERS,
    PAGE,
    SUSPECT,
    TITLES,
    style,
    wrapped,
)
from dyndepth.results.tables import write_tables

TARGETS = (1.25, 2.0)
DOCUMENTS = 20


def make_cell(right: int, speedup: float, bound: bool = False, **changes) -> Cell:
    """A cell with ``right`` of ``DOCUMENTS`` right on two tasks, at that achieved speedup."""
    found: dict[str, list] = {"accuracy": [], "compute": [], "samples": []}
    for task in ("one", "two"):
        own = rows([1] * right + [0] * (DOCUMENTS - right), task)
        for name in found:
            found[name] += own[name]
    spent = {"block_flops_per_token": 1e6 / speedup, "total_flops_per_token": 2e6 / speedup}
    found["compute"] = [
        row | spent | {"block_speedup": speedup, "total_speedup": 0.9 * speedup}
        for row in found["compute"]
    ]
    routing = [
        {"task": "all", "phase": "all", "layer": layer, "sublayer": kind, "executed": 1 / speedup}
        for layer in range(4)
        for kind in SUBLAYERS
    ]
    timing = [
        {"phase": phase, "batch": batch, "length": 64, "wall_speedup": 0.8 * speedup}
        | {"wall_speedup_low": 0.7 * speedup, "wall_speedup_high": speedup, "suspect": False}
        | {"total_speedup": 0.9 * speedup, "wall_efficiency": 0.8 / 0.9}
        for phase in ("prefill", "decode")
        for batch in (1, 8)
    ]
    method = {"target_speedup": speedup} | changes
    provenance = {"uses_labels": bound}
    return Cell(
        identity(phases="both", **method), **found, routing=routing, timing=timing,
        provenance=provenance,
    )  # fmt: skip


def make_cells(methods: int = 2, bounds: int = 1) -> list[Cell]:
    """Dense, methods of two targets (every second one with two seeds), and bounds."""
    found = [make_cell(15, 1.0)]
    for number in range(methods):
        seeds = range(1 + number % 2)
        found += [
            make_cell(14 - number % 5 - step - seed, target, method=f"m{number}", seed=seed)
            for step, target in enumerate(TARGETS)
            for seed in seeds
        ]
    for number in range(bounds):
        found += [make_cell(18, t, bound=True, method=f"ceiling{number}") for t in (1.25, 2.0)]
    return found


def make_run(folder: Path, **options) -> Path:
    """A run folder with the tables of ``make_cells``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(make_cells(**options), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def board(run) -> pd.DataFrame:
    return plots.read_tables(run)["leaderboard"]


def lines(axis) -> dict[str, object]:
    return {line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"}


def legend_of(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


class TestLabels:
    def test_are_the_same_in_all_tables_of_a_run(self, run):
        tables = plots.read_tables(run)
        assert set(tables) == {"accuracy", "compute", "timing", "routing", "leaderboard"}
        for table in tables.values():
            assert list(table["label"].cat.categories) == ["dense", "m0", "m1", "ceiling0"]

    def test_no_run_is_told(self, tmp_path):
        with pytest.raises(UserError, match="holds no leaderboard.csv"):
            plots.read_tables(tmp_path)


def with_choices(cell: Cell, choices: int, task: str = "one") -> Cell:
    """The cell, with that many answers offered by each document of a task."""
    for row in cell.samples:
        if row["task"] == task:
            row["loglikelihoods"] = str([-1.0] * choices)
    return cell


class TestChance:
    def test_stands_in_the_tables_by_task_and_over_tasks(self, tmp_path):
        first = make_cell(15, 1.0)
        for number, row in enumerate(first.samples):
            # The first task offers 2 or 4 choices, the second asks for a word.
            choices = 1 if row["task"] == "two" else 2 + 2 * (number % 2)
            row["loglikelihoods"] = str([-1.0] * choices)
        write_tables([first, make_cell(14, 1.25, method="m")], tmp_path)
        tables = plots.read_tables(tmp_path)
        accuracy = tables["accuracy"].set_index(["method", "task"])["chance"]
        assert accuracy["dense", "one"] == pytest.approx((1 / 2 + 1 / 4) / 2)
        assert accuracy.drop(("dense", "one")).isna().all()
        board = tables["leaderboard"].set_index("method")
        assert board.loc["dense", "chance"] == pytest.approx((1 / 2 + 1 / 4) / 2 / 2)
        assert np.isnan(board.loc["m", "chance"])
        assert board.loc["dense", "accuracy_tasks"] == "one, two"

    def test_is_a_line_and_takes_the_front_where_dense_is_no_better(self, tmp_path):
        cells = [make_cell(15, 1.0), make_cell(14, 1.25, method="m")]
        write_tables([with_choices(cell, 4) for cell in cells], tmp_path)
        tables = plots.read_tables(tmp_path)
        of_task = plots.task_table(tables["accuracy"], tables["compute"], "one")
        figure = plots.accuracy_vs_flops(of_task, metric="acc", title="one")
        drawn = lines(figure.axes[0])
        assert drawn[CHANCE].get_ydata()[0] == 0.25
        assert FRONT in drawn
        assert "tiny: one" in texts(figure)
        guessing = of_task.assign(chance=0.7)
        figure = plots.accuracy_vs_flops(guessing, metric="acc")
        assert FRONT not in lines(figure.axes[0])
        assert "No Pareto front: dense's own interval holds chance" in " ".join(
            texts(figure).split()
        )
        kept = plots.accuracy_vs_flops(tables["leaderboard"], metric="retained")
        board = tables["leaderboard"]
        wanted = 0.125 / board.loc[plots.reference(board), "mean_acc"].item()
        assert lines(kept.axes[0])[CHANCE].get_ydata()[0] == pytest.approx(wanted)
        assert "mean over one, two" in texts(kept)

    def test_is_unknown_without_samples_or_choices(self, run, board):
        assert board["chance"].isna().all()
        assert CHANCE not in lines(plots.accuracy_vs_flops(board).axes[0])

    def test_tables_without_it_are_read_too(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "older")
        for name in ("accuracy.csv", "leaderboard.csv"):
            path = tmp_path / "older" / name
            pd.read_csv(path, dtype=str).drop(columns="chance").to_csv(path, index=False)
        board = plots.read_tables(tmp_path / "older")["leaderboard"]
        assert CHANCE not in lines(plots.accuracy_vs_flops(board).axes[0])


class TestPoints:
    def test_seeds_are_one_point_whose_interval_holds_them(self, board):
        found = plots.points(board, "mean_acc", "block_speedup")
        assert list(found["label"]) == ["m0"] * 2 + ["m1"] * 2 + ["ceiling0"] * 2
        point = found[(found["label"] == "m1") & (found["target_speedup"] == 1.25)].iloc[0]
        seeds = board[(board["method"] == "m1") & (board["target_speedup"] == 1.25)]
        assert point["seeds"] == 2
        assert point["value"] == pytest.approx(seeds["mean_acc"].mean())
        assert point["low"] <= seeds["mean_acc_low"].mean() < point["value"]
        assert point["low"] <= seeds["mean_acc"].min()
        assert point["high"] >= seeds["mean_acc"].max()

    def test_what_cannot_stand_together_is_refused(self, board):
        mixed = board.assign(data_fingerprint=["x", *["y"] * (len(board) - 1)])
        with pytest.raises(UserError, match="several values of data_fingerprint"):
            plots.points(mixed, "mean_acc", "block_speedup")
        twice = pd.concat([board, board.tail(1).assign(cell="other")], ignore_index=True)
        twice["label"] = pd.Categorical(twice["label"].astype(str))
        with pytest.raises(UserError, match="with the same seed"):
            plots.points(twice, "mean_acc", "block_speedup")
        with pytest.raises(UserError, match="no values of rouge_l"):
            plots.points(board, "rouge_l", "block_speedup")

    def test_digests_of_before_are_no_other_setting(self, tmp_path):
        from dyndepth.cells.identity import FORMER

        run = make_run(tmp_path)
        file = run / "leaderboard.csv"
        board = pd.read_csv(file, dtype=str, keep_default_na=False)
        names = [name for name, _ in figures(run)]
        former, today = next(iter(FORMER.items()))
        board["model_fingerprint"] = [former, *[today] * (len(board) - 1)]
        board.to_csv(file, index=False)
        assert [name for name, _ in figures(run)] == names
        found = plots.read_tables(run)["leaderboard"]
        assert set(found["model_fingerprint"]) == {today}
        assert not found["label"].astype(str).str.contains("weights").any()

    def test_front_is_of_competitors_that_none_beats(self):
        found = pd.DataFrame(
            {
                "x": [1.0, 1.5, 2.0, 1.5, 2.0],
                "value": [0.5, 0.4, 0.3, 0.3, 0.9],
                "bound": [False, False, False, False, True],
                "recovery": "none",
            }
        )
        front = plots.on_front(found, lower_is_better=False, less_is_better=False)
        assert front.tolist() == [True, True, True, False, False]
        lower = plots.on_front(found, lower_is_better=True, less_is_better=False)
        assert lower.tolist() == [False, False, True, False, False]
        share = plots.on_front(found.assign(x=1 / found["x"]), False, less_is_better=True)
        assert share.tolist() == front.tolist()

    def test_each_recovery_has_its_own_front_and_close_budgets_are_one(self):
        found = pd.DataFrame(
            {
                "x": [1.5, 1.509, 1.53, 1.5],
                "value": [0.40, 0.35, 0.35, 0.30],
                "bound": False,
                "recovery": ["none", "none", "none", "lora"],
            }
        )
        assert plots.on_front(found, False, False).tolist() == [True, False, True, True]
        assert plots.on_front(found.assign(x=1 / found["x"]), False, True).tolist() == [
            True,
            False,
            True,
            True,
        ]

    def test_a_point_whose_interval_holds_chance_is_on_no_front(self):
        found = pd.DataFrame(
            {
                "x": [1.5, 2.0], "value": [0.4, 0.3], "low": [0.36, 0.24], "high": [0.44, 0.36],
                "bound": False, "recovery": "none",
            }
        )  # fmt: skip
        assert plots.on_front(found, False, False).tolist() == [True, True]
        assert plots.on_front(found, False, False, chance=0.25).tolist() == [True, False]

    def test_task_table_has_the_tasks_own_scores_and_speedups(self, run):
        tables = plots.read_tables(run)
        table = plots.task_table(tables["accuracy"], tables["compute"], "one")
        row = table[table["method"] == "m0"].iloc[0]
        assert row["acc"] == 0.7
        assert row["acc_high"] - row["acc"] == pytest.approx(1.96 * row["stderr"])
        assert row["block_speedup"] == 1.25
        with pytest.raises(UserError, match="no task three"):
            plots.task_table(tables["accuracy"], tables["compute"], "three")
        versions = tables["accuracy"].copy()
        versions.loc[0, "task_version"] = 2.0
        with pytest.raises(UserError, match="several versions"):
            plots.task_table(versions, tables["compute"], "one")


class TestAccuracy:
    def test_few_share_a_panel_with_dense_bounds_and_front(self, board, tmp_path):
        figure = plots.accuracy_vs_flops(board, tmp_path / "a.png")
        (axis,) = figure.axes
        drawn = lines(axis)
        assert set(drawn) == {"m0", "m1", "ceiling0 (bound)", "dense", FRONT}
        assert list(drawn["m0"].get_xdata()) == list(TARGETS)
        assert drawn["m0"].get_ydata() == pytest.approx([0.7, 0.65])
        assert drawn["dense"].get_ydata()[0] == pytest.approx(0.75)
        assert drawn["ceiling0 (bound)"].get_linestyle() == BOUND_DASH
        assert drawn["ceiling0 (bound)"].get_markerfacecolor() == "white"
        assert drawn[FRONT].get_ydata() == pytest.approx([0.7, 0.65])
        assert drawn["m0"].get_marker() != drawn["m1"].get_marker()
        assert len(axis.collections) >= 3, "a band each"
        assert "speedup" in axis.get_xlabel()
        assert "×" in axis.get_xlabel()
        assert axis.get_ylabel() == "mean accuracy"
        assert set(legend_of(figure)) == set(drawn)

    @pytest.mark.parametrize("methods", [1, 5, 20])
    def test_no_text_overlaps_and_no_legend_hides_data(self, tmp_path, methods):
        tables = plots.read_tables(make_run(tmp_path / "run", methods=methods))
        for figure in (
            plots.accuracy_vs_wallclock(tables["leaderboard"], phase="prefill"),
            plots.flops_vs_wallclock(tables["timing"]),
        ):
            plots.written(figure, tmp_path / "figure.png")  # lays it out
            renderer = FigureCanvasAgg(figure).get_renderer()
            box = figure.bbox
            shown = [axis.get_tightbbox(renderer) for axis in figure.axes]
            shown += [legend.get_window_extent(renderer) for legend in figure.legends]
            shown += [figure._suptitle.get_window_extent(renderer)] if figure._suptitle else []
            for index, one in enumerate(shown):
                assert one.x0 >= -1
                assert one.y0 >= -1
                assert one.x1 <= box.x1 + 1
                assert one.y1 <= box.y1 + 1
                for other in shown[index + 1 :]:
                    width = min(one.x1, other.x1) - max(one.x0, other.x0)
                    height = min(one.y1, other.y1) - max(one.y0, other.y0)
                    # The last tick label of a panel may reach a little towards the next.
                    assert min(width, height) < 6, (methods, one, other)

    def test_axes_hold_every_interval(self, board):
        wide = board.copy()
        wide.loc[wide.index[-1], "mean_acc_low"] = -3.0
        figure = plots.accuracy_vs_flops(wide)
        assert figure.axes[0].get_ylim()[0] < -3.0

    def test_dense_has_the_band_of_its_interval(self, board):
        figure = plots.accuracy_vs_flops(board)
        dense = board[plots.reference(board)].iloc[0]
        (band,) = figure.axes[0].patches
        box = band.get_extents().transformed(figure.axes[0].transData.inverted())
        assert [box.y0, box.y1] == pytest.approx([dense["mean_acc_low"], dense["mean_acc_high"]])

    @pytest.mark.parametrize("methods", [1, 9, 20])
    def test_fits_a_page_in_letters_that_can_be_read(self, tmp_path, methods):
        import matplotlib.text

        tables = plots.read_tables(make_run(tmp_path, methods=methods, bounds=1))
        figure = plots.accuracy_vs_flops(tables["leaderboard"])
        assert figure.get_size_inches()[0] <= PAGE
        for text in figure.findobj(matplotlib.text.Text):
            assert not text.get_text() or text.get_fontsize() >= 7
        labelled = {
            axis.get_subplotspec().rowspan.start
            for axis in figure.axes
            if axis.xaxis.get_tick_params()["labelbottom"]
        }
        assert labelled == {figure.axes[0].get_subplotspec().get_gridspec().nrows - 1}

    def test_a_front_a_recovery(self, tmp_path):
        recovery = "lora(rank=4)"
        cells = [make_cell(15, 1.0), make_cell(12, 1.25, method="m")]
        cells += [make_cell(14, 1.25, method="m", recovery=recovery)]
        write_tables(cells, tmp_path)
        figure = plots.accuracy_vs_flops(plots.read_tables(tmp_path)["leaderboard"])
        drawn = lines(figure.axes[0])
        fronts = {name: line for name, line in drawn.items() if name.startswith(FRONT)}
        assert len(fronts) == 2
        assert sorted(line.get_ydata().item() for line in fronts.values()) == [0.6, 0.7]
        assert len({line.get_marker() for line in fronts.values()}) == 2

    def test_a_lone_point_has_no_line(self, board):
        one = board[(board["target_speedup"] == 1.25) | plots.reference(board)]
        assert lines(plots.accuracy_vs_flops(one).axes[0])["m0"].get_linestyle() == "None"
        assert lines(plots.accuracy_vs_flops(board).axes[0])["m0"].get_linestyle() != "None"

    def test_many_have_a_panel_each(self, tmp_path):
        board = plots.read_tables(make_run(tmp_path, methods=TOGETHER))["leaderboard"]
        figure = plots.accuracy_vs_flops(board)
        assert len(figure.axes) == TOGETHER + 1
        assert [axis.get_title() for axis in figure.axes][-2:] == ["m7", "ceiling0"]
        assert set(legend_of(figure)) == {"bound", "competitor", FRONT, "dense", "the others"}

    def test_fraction_and_lower_is_better(self, board):
        table = board.assign(bits_per_byte=1 / board["mean_acc"] ** 4)
        figure = plots.accuracy_vs_flops(table, metric="bits_per_byte", across="block_fraction")
        (axis,) = figure.axes
        assert lines(axis)["m0"].get_xdata() == pytest.approx([0.8, 0.5])
        assert "lower is better" in axis.get_ylabel()
        assert axis.get_yscale() == "log"

    def test_time_has_intervals_both_ways(self, board):
        figure = plots.accuracy_vs_wallclock(board, phase="decode")
        (axis,) = figure.axes
        assert lines(axis)["m0"].get_xdata() == pytest.approx([1.0, 1.6])
        assert "decode" in axis.get_xlabel()
        whole = [bar for bar in axis.containers if bar.has_xerr and bar.has_yerr]
        assert len(whole) == 3
        with pytest.raises(UserError, match="no values of wall_decode_speedup"):
            plots.accuracy_vs_wallclock(board.assign(wall_decode_speedup=np.nan))

    @pytest.mark.parametrize("methods", [2, 10])
    def test_doubtful_times_are_marked(self, tmp_path, methods):
        board = plots.read_tables(make_run(tmp_path, methods=methods))["leaderboard"]
        plain = plots.accuracy_vs_wallclock(board, phase="decode")
        assert not {SUSPECT, LOADED} & set(legend_of(plain))
        own = (board["method"] == "m0") & (board["target_speedup"] == 2.0)
        board = board.assign(wall_suspect=None, wall_loaded=None)
        board.loc[own, "wall_suspect"] = "prefill, decode"
        board.loc[board["method"] == "m1", "wall_loaded"] = "decode"
        figure = plots.accuracy_vs_wallclock(board, phase="decode")
        assert {SUSPECT, LOADED} <= set(legend_of(figure))
        marked = {
            label: [line for axis in figure.axes if (line := lines(axis).get(label))]
            for label in (SUSPECT, LOADED)
        }
        assert [line.get_xdata() for line in marked[SUSPECT]] == [pytest.approx([1.6])]
        assert [line.get_xdata() for line in marked[LOADED]] == [pytest.approx([1.0, 1.6])]
        prefill = plots.accuracy_vs_wallclock(board, phase="prefill")
        assert SUSPECT in legend_of(prefill)
        assert LOADED not in legend_of(prefill)
        # No doubt about a time is one about FLOPs.
        assert SUSPECT not in legend_of(plots.accuracy_vs_flops(board))

    def test_dense_alone_is_nothing_to_compare(self, board):
        with pytest.raises(UserError, match="nothing to compare"):
            plots.accuracy_vs_flops(board[board["method"] == "dense"])


class TestTimes:
    def test_panels_by_phase_with_the_ideal_and_suspects(self, run):
        timing = plots.read_tables(run)["timing"]
        timing.loc[(timing["method"] == "m0") & (timing["phase"] == "decode"), "suspect"] = True
        figure = plots.flops_vs_wallclock(timing)
        assert [axis.get_title() for axis in figure.axes] == ["prefill", "decode"]
        prefill, decode = map(lines, figure.axes)
        assert prefill["m0"].get_xdata() == pytest.approx([1.125, 1.8])
        assert prefill["m0"].get_ydata() == pytest.approx([1.0, 1.6])
        assert SUSPECT in decode
        assert SUSPECT not in prefill
        assert "batch 1, 64 tokens" in texts(figure)
        assert "batch 8" in texts(plots.flops_vs_wallclock(timing, batch=8))
        with pytest.raises(UserError, match="timed at batch 3"):
            plots.flops_vs_wallclock(timing, batch=3)

    def test_of_several_times_of_a_shape_one_is_drawn(self, run):
        timing = plots.read_tables(run)["timing"].assign(level="full", shapes="level")
        asked = timing.assign(level="quick", shapes="asked", wall_speedup=9.0)
        for both in ([timing, asked], [asked, timing]):
            figure = plots.flops_vs_wallclock(pd.concat(both))
            assert lines(figure.axes[1])["m0"].get_ydata() == pytest.approx([1.0, 1.6])

    def test_times_of_a_loaded_machine_are_marked(self, run):
        timing = plots.read_tables(run)["timing"].assign(cores=2, load_average=1.0)
        assert LOADED not in legend_of(plots.flops_vs_wallclock(timing))
        timing.loc[timing["phase"] == "decode", "load_average"] = 3.0
        prefill, decode = map(lines, plots.flops_vs_wallclock(timing).axes)
        assert LOADED in decode
        assert LOADED not in prefill

    def test_modes_have_a_figure_each(self, run):
        timing = plots.read_tables(run)["timing"]
        graphs = timing.assign(mode="graphs", wall_speedup=timing["wall_speedup"] * 1.1)
        both = pd.concat([timing, graphs], ignore_index=True)
        eager = lines(plots.flops_vs_wallclock(both).axes[1])["m0"].get_ydata()
        figure = plots.flops_vs_wallclock(both, mode="graphs")
        assert eager == pytest.approx([1.0, 1.6])
        assert lines(figure.axes[1])["m0"].get_ydata() == pytest.approx([1.1, 1.76])
        assert "in graphs mode" in texts(figure)
        with pytest.raises(UserError, match="no values of|timed at"):
            plots.flops_vs_wallclock(timing, mode="graphs")

    @pytest.mark.parametrize("count", [2, 10, 20])
    def test_targets_stand_beside_the_marks_and_cover_nothing(self, count):
        from dyndepth.plots.labels import label_targets
        from dyndepth.plots.style import figure_of

        generator = np.random.default_rng(0)
        x, value = generator.uniform(1.2, 1.9, (2, count))
        curve = pd.DataFrame({"x": x, "value": value, "target_speedup": 1.25})
        curve = curve.assign(x_low=x, x_high=x, low=value - 0.01, high=value + 0.01)
        figure = figure_of(5, 5)
        axis = figure.subplots()
        axis.set(xlim=(1, 2), ylim=(1, 2))
        figure.draw_without_rendering()
        label_targets(axis, [curve.iloc[[row]] for row in range(count)])
        figure.draw_without_rendering()
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axis.texts]
        assert [text.get_text() for text in axis.texts] == ["1.25×"] * count
        marks = axis.transData.transform(curve[["x", "value"]].to_numpy())
        for index, box in enumerate(boxes):
            assert axis.get_window_extent().padded(2).count_overlaps([box]) == 1
            assert not any(box.contains(*mark) for mark in marks)
            for other in boxes[index + 1 :]:
                width = min(box.x1, other.x1) - max(box.x0, other.x0)
                height = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert min(width, height) < 4


class TestGap:
    def test_is_how_much_better_the_bound_is_at_the_same_flops(self, board):
        found = plots.gaps(board)
        own = found[found["label"] == "m0"]
        assert own["gap"].tolist() == pytest.approx([0.9 - 0.7, 0.9 - 0.65])
        assert (own["gap_low"] < own["gap"]).all()
        assert (own["gap"] < own["gap_high"]).all()
        figure = plots.bound_gap(board)
        (axis,) = figure.axes
        assert axis.get_title() == "ceiling0"
        assert lines(axis)["m0"].get_ydata() == pytest.approx([0.2, 0.25])

    def test_between_points_it_is_linear_in_executed_flops_and_never_falls(self):
        def row(method, speedup, value, bound=False):
            return {
                "cell": f"{method}{speedup}", "method": method, "parameters": "", "seed": 0,
                "phases": "both", "recovery": "none", "target_speedup": speedup, "bound": bound,
                "block_speedup": speedup, "bits_per_byte": value,
            }  # fmt: skip

        table = pd.DataFrame(
            [row("dense", 1.0, 1.0), row("m", 4 / 3, 2.0), row("m", 5.0, 9.0)]
            + [row("b", 2.0, 2.0, True)]
        )
        found = plots.gaps(table, "bits_per_byte")
        assert found["bound_value"].tolist() == pytest.approx([1.5])
        assert found["gap"].tolist() == pytest.approx([0.5])
        better = table.copy()
        better.loc[3, "bits_per_byte"] = 0.5
        assert plots.gaps(better, "bits_per_byte")["bound_value"].tolist() == pytest.approx([0.5])

    def test_without_a_bound_or_a_shared_budget_says_so(self, board):
        with pytest.raises(UserError, match="no bound"):
            plots.bound_gap(board[~board["bound"]])
        far = board[~((board["method"] != "dense") & ~board["bound"])]
        lone = board[(board["method"] == "m0") & (board["target_speedup"] == 2.0)]
        far = pd.concat([far, lone.assign(block_speedup=9.0)], ignore_index=True)
        with pytest.raises(UserError, match="no competitor achieved a budget"):
            plots.gaps(far)


class TestHeatmaps:
    def test_retained_by_task(self, run, tmp_path):
        tables = plots.read_tables(run)
        table = plots.retained(tables["accuracy"], tables["compute"])
        own = table[(table["label"] == "m0") & (table["task"] == "two")]
        assert own["retained"].tolist() == pytest.approx([14 / 15, 13 / 15])
        path = tmp_path / "retained.png"
        figure = plots.retained_by_task(tables["accuracy"], tables["compute"], path)
        assert path.is_file()
        shown = texts(figure).splitlines()
        for part in ("93", "m0", "m1", "1.25×", "2×", "one", "two"):
            assert part in shown
        assert "accuracy, method / dense, %" in shown
        assert "1×" not in shown
        assert "–" not in shown
        assert figure.get_size_inches()[0] <= PAGE

    def test_what_was_not_measured_has_a_dash_and_lower_is_better_is_inverted(self, tmp_path):
        def bits(value: float, speedup: float, **changes) -> Cell:
            found = make_cell(15, speedup, **changes)
            (row, *_) = found.accuracy
            return Cell(
                found.identity, compute=found.compute,
                accuracy=[row | {"metric": "bits_per_byte", "value": value,
                                 "higher_is_better": False}],
            )  # fmt: skip

        cells = [bits(1.0, 1.0), bits(2.0, 1.25, method="m"), bits(1.25, 2.0, method="n")]
        write_tables(cells, tmp_path)
        tables = plots.read_tables(tmp_path)
        figure = plots.retained_by_task(tables["accuracy"], tables["compute"])
        shown = texts(figure).splitlines()
        assert [text for text in shown if text in ("50", "80", "–")] == ["50", "–", "–", "80"]
        assert "bits per byte, dense / method, %" in shown
        assert "Dash: not measured." in shown
        colours = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
        assert colours["80"] == "black"

    def test_a_share_of_few_documents_stays_empty(self, run):
        tables = plots.read_tables(run)
        accuracy = tables["accuracy"]
        few = (accuracy["task"] == "one") & (accuracy["method"] == "m0")
        assert "Empty" not in texts(plots.retained_by_task(accuracy, tables["compute"]))
        part = accuracy.assign(n=accuracy["n"].mask(few, 9))
        table = plots.retained(part, tables["compute"])
        empty = table[table["retained"].isna()]
        assert set(zip(empty["task"], empty["label"], strict=True)) == {("one", "m0")}
        figure = plots.retained_by_task(part, tables["compute"])
        assert "Empty: fewer than 10 documents." in texts(figure)
        assert "–" not in texts(figure)
        # Of few documents of dense nothing is a share.
        few = accuracy["method"] == "dense"
        table = plots.retained(accuracy.assign(n=accuracy["n"].mask(few, 9)), tables["compute"])
        assert table["retained"].isna().all()

    def test_executed_in_run(self, run):
        routing = plots.read_tables(run)["routing"]
        figure = plots.executed_in_run(routing, target_speedup=1.25)
        for axis in figure.axes[:2]:
            values = axis.collections[0].get_array()
            assert values.shape == (3, 4)
            assert np.allclose(values, 80)
        assert [axis.get_title().split()[0] for axis in figure.axes[:2]] == list(TITLES.values())
        with pytest.raises(UserError, match="no method at the target speedup 7"):
            plots.executed_in_run(routing, target_speedup=7)
        # What is lossless runs every block where nothing is drafted: no row beside the others.
        apart = routing.assign(lossless=routing["method"] == "m0")
        figure = plots.executed_in_run(apart, target_speedup=1.25)
        assert figure.axes[0].collections[0].get_array().shape == (2, 4)
        apart = routing[routing["method"] == "m0"].assign(lossless=True)
        with pytest.raises(UserError, match=r"lossless methods alone .* 1.25 \(m0\)"):
            plots.executed_in_run(apart, target_speedup=1.25)


class TestParts:
    def test_twenty_styles_differ_in_print(self):
        seen = {
            (look["color"], look["marker"], str(look["linestyle"]))
            for look in map(style, range(20))
        }
        assert len(seen) == 20
        assert len({style(number)["marker"] for number in range(TOGETHER)}) == len(MARKERS)

    def test_titles_are_of_the_sublayers(self):
        assert tuple(TITLES) == SUBLAYERS

    def test_wrapped(self):
        assert wrapped("short") == "short"
        long = "a_method(criterion=of_some_kind, search=full)"
        assert wrapped(long).replace("\n", "").replace(" ", "") == long.replace(" ", "")
        assert all(len(part) <= 30 for part in wrapped(long).splitlines())


class TestCommand:
    def test_writes_what_it_can_and_tells_what_it_cannot(self, run, tmp_path, capsys):
        assert main([str(run), "--output_path", str(tmp_path), "--format", "svg"]) == 0
        out = capsys.readouterr().out
        for name in (
            "accuracy_vs_flops", "accuracy_vs_total_flops", "accuracy_vs_decode_time",
            "acc_vs_flops_one", "bound_gap_one", "bound_gap_two", "retained_by_task",
            "flops_vs_wallclock_batch8_length64", "executed_by_layer_2x",
        ):  # fmt: skip
            path = tmp_path / f"{name}.svg"
            assert path.is_file()
            assert f"written: {path}" in out
        assert "not drawn: executed_by_position: no traces in" in out

    def test_equal_tables_give_equal_svg(self, run, tmp_path):
        board = plots.read_tables(run)["leaderboard"]
        for name in ("one", "two"):
            plots.accuracy_vs_flops(board, tmp_path / f"{name}.svg")
        one, two = ((tmp_path / f"{name}.svg").read_bytes() for name in ("one", "two"))
        assert one == two
        assert b"<dc:date>" not in one

    def test_traces_and_settings_have_their_own(self, tmp_path, capsys):
        mixed = [make_cell(15, 1.0), make_cell(14, 1.25, method="m")]
        mixed += [
            make_cell(12, 1.0, dtype="bfloat16"),
            make_cell(9, 2.0, method="m", dtype="bfloat16"),
        ]
        write_tables(mixed, tmp_path)
        make_routes().save(tmp_path / "routes" / "abc.safetensors")
        assert main([str(tmp_path), "--format", "png"]) == 0
        written = {
            str(path.relative_to(tmp_path / "figures"))
            for path in (tmp_path / "figures").rglob("*.png")
        }
        wanted = {f"setting_{n}/accuracy_vs_flops.png" for n in (1, 2)}
        assert wanted | {"executed_by_position_1.5x.png", "routing/abc.png"} <= written

    def test_no_run_is_wrong_input(self, tmp_path, capsys):
        assert main([str(tmp_path)]) == 2
        assert "dyndepth.plots: " in capsys.readouterr().err


def test_intervals_that_are_missing_draw_as_points(board):
    bare = board.drop(columns=["mean_acc_low", "mean_acc_high"])
    found = plots.points(bare, "mean_acc", "block_speedup")
    assert (found["low"] == found["value"]).all()
    assert not any(map(math.isnan, found["high"]))
    assert "95%" not in texts(plots.accuracy_vs_flops(bare))


def test_several_runs_stand_in_one_figure_with_letters(tmp_path):
    for name, changes in (("a", {}), ("b", {"harness_code": "1a2b3c4d5e6f", "dtype": "bfloat16"})):
        for right, speedup, method in ((15, 1.0, "dense"), (12, 1.25, "m0"), (10, 2.0, "m0")):
            Store(tmp_path / name).write(make_cell(right, speedup, method=method, **changes))
    tables = plots.read_runs([tmp_path / "a", tmp_path / "b"])
    board = tables["leaderboard"]
    named = ["dense (A)", "m0 (A)", "dense (B)", "m0 (B)"]
    assert list(board["label"].cat.categories) == named
    found = dict(figures(tables=tables))
    figure = found["accuracy_vs_flops"]()
    shown = texts(figure)
    assert "A: " in shown
    assert "bfloat16, code=1a2b3c" in shown.replace("\n", " ").replace("  ", " ")
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["m0 (A)", "m0 (B)", "dense (A)", "dense (B)"]
    retained = plots.retained(tables["accuracy"], tables["compute"])
    value = retained.set_index(["task", "label", "target_speedup"])["retained"]
    assert value["one", "m0 (B)", 1.25] == pytest.approx(12 / 15)


def test_runs_of_one_setting_have_no_letters(tmp_path):
    Store(tmp_path / "a").write(make_cell(15, 1.0))
    Store(tmp_path / "b").write(make_cell(12, 1.25, method="m0"))
    tables = plots.read_runs([tmp_path / "a", tmp_path / "b"])
    assert list(tables["leaderboard"]["label"]) == ["dense", "m0"]
    assert "run" not in tables["leaderboard"]
