"""Figures: what is on them, that they are written, and what can't be drawn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from dyndepth import plots
from dyndepth.common.errors import UserError
from dyndepth.routes.trace import Routes

WORDS = {0: " the", 1: "\n", 2: "$x$", 3: "naïve", 4: "語", 5: " incomprehensibilities"}


def make_routes(method: str = "one", seed: int = 0, lengths: tuple[int, ...] = (30, 20)) -> Routes:
    generator = np.random.default_rng(seed)
    tokens = sum(lengths)
    return Routes(
        gates=generator.random((tokens, 6, 2)) < 0.6,
        token_ids=np.arange(tokens) % len(WORDS),
        documents=tuple(f"document {n}" for n in range(len(lengths))),
        lengths=lengths,
        prompt_lengths=tuple(5 for _ in lengths),
        vocabulary=WORDS,
        identity={"method": method, "target_speedup": 1.5},
    )


def texts(figure) -> str:
    """Every text on a figure."""
    import matplotlib.text

    return "\n".join(each.get_text() for each in figure.findobj(matplotlib.text.Text))


class TestHeatmap:
    def test_shows_the_gates_with_the_tokens_as_labels(self, tmp_path):
        routes = make_routes()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = plots.routing_heatmap(routes, "document 1", tmp_path / "deep" / "map.png")
        assert (tmp_path / "deep" / "map.png").read_bytes().startswith(b"\x89PNG")
        rows = routes.document("document 1")
        for index, axis in enumerate(figure.axes):
            (image,) = axis.images
            assert (image.get_array() == routes.gates[rows, :, index].T).all()
            assert axis.get_ylabel() == "block"
        labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
        assert labels == [plots.readable(text) for text in routes.strings(rows)]
        shown = texts(figure)
        for part in ("one at 1.5×, document 1", "executed", "skipped", "prompt ends", "$x$"):
            assert part in shown
        share = routes.gates[rows, :, 1].mean()
        assert f"MLP: {share:.0%} executed" in shown

    def test_shows_a_part_of_a_long_document(self):
        routes = make_routes(lengths=(200,))
        figure = plots.routing_heatmap(routes, "document 0", first=150, count=40)
        assert (figure.axes[0].images[0].get_array() == routes.gates[150:190, :, 0].T).all()
        assert "tokens 150 to 189 of 200" in texts(figure)
        assert "prompt ends" not in texts(figure)
        figure = plots.routing_heatmap(routes, "document 0", first=190)
        assert figure.axes[0].images[0].get_array().shape == (6, 10)

    def test_what_is_not_there_is_told(self):
        with pytest.raises(UserError, match="no document 'x'; they hold document 0, document 1"):
            plots.routing_heatmap(make_routes(), "x")
        with pytest.raises(UserError, match="has 20 tokens, so none from 20 on"):
            plots.routing_heatmap(make_routes(), "document 1", first=20)


@pytest.mark.parametrize("draw", [plots.executed_by_layer, plots.executed_by_position])
class TestLines:
    def test_a_line_a_record(self, draw, tmp_path):
        several = [make_routes("one", 0), make_routes("two", 1), make_routes("two", 2)]
        figure = draw(several, tmp_path / "lines.svg")
        assert "<svg" in (tmp_path / "lines.svg").read_text()
        for axis in figure.axes:
            labels = [line.get_label() for line in axis.lines]
            assert labels == ["one at 1.5×", "two at 1.5×", "two at 1.5× (2)"]
            styles = {(line.get_color(), line.get_marker(), str(line.get_linestyle()))
                      for line in axis.lines}  # fmt: skip
            assert len(styles) == 3
            assert axis.get_xlabel()
        assert [axis.get_title() for axis in figure.axes] == ["Attention", "MLP"]
        assert figure.axes[0].get_ylabel() == "executed fraction of tokens"

    def test_takes_one_record_or_names_for_several(self, draw):
        one = make_routes()
        assert len(draw(one).axes[0].lines) == 1
        named = draw({"before": one, "after": make_routes(seed=1)})
        assert [line.get_label() for line in named.axes[0].lines] == ["before", "after"]
        with pytest.raises(UserError, match="no routes to draw"):
            draw([])

    def test_twelve_records_can_be_told_apart(self, draw):
        figure = draw([make_routes(str(n), n) for n in range(12)])
        styles = {(line.get_color(), str(line.get_linestyle())) for line in figure.axes[0].lines}
        assert len(styles) == 12


def test_lines_have_the_tables_values():
    routes = make_routes()
    figure = plots.executed_by_layer(routes, phase="generation")
    table = routes.by_sublayer("generation")
    for axis, sublayer in zip(figure.axes, ("attention", "mlp"), strict=True):
        wanted = table[table["sublayer"] == sublayer]["executed"]
        assert axis.lines[0].get_ydata().tolist() == wanted.tolist()
    figure = plots.executed_by_position(routes, bins=3)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [4.5, 14.5, 24.5]


class TestTrainingCurve:
    CURVE = [
        {"loss": 4.0 - n / 100, "executed": 1 - n / 200, "wanted": 0.8, "tokens": 512.0 * (n + 1)}
        for n in range(60)
    ]

    def test_shows_loss_and_executed_beside_wanted_over_tokens(self, tmp_path):
        figure = plots.training_curve(self.CURVE, tmp_path / "curve.png", title="one at 1.25×")
        assert (tmp_path / "curve.png").stat().st_size > 1000
        loss, executed = figure.axes
        assert loss.lines[0].get_ydata().tolist() == [row["loss"] for row in self.CURVE]
        assert loss.lines[0].get_xdata().tolist() == [row["tokens"] for row in self.CURVE]
        labels = [line.get_label() for line in executed.lines]
        assert [label for label in labels if label[0] != "_"] == [
            "executed, running mean",
            "wanted",
        ]
        assert executed.get_xlabel() == "tokens read"
        assert "one at 1.25×" in texts(figure)

    def test_columns_may_be_absent(self):
        only_loss = [{"loss": row["loss"]} for row in self.CURVE[:5]]
        figure = plots.training_curve(only_loss)
        (axis,) = figure.axes
        assert axis.get_xlabel() == "step"
        assert axis.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
        partly = [{"loss": 1.0, "tokens": 1}, {"tokens": 2, "loss": float("nan")}, {"tokens": 3}]
        assert len(plots.training_curve(partly).axes[0].lines[0].get_xdata()) == 1
        no_loss = [{"executed": 0.5, "tokens": 4}]
        assert len(plots.training_curve(no_loss).axes) == 1

    @pytest.mark.parametrize("curve", [[], [{}], [{"tokens": 3}]])
    def test_nothing_to_draw_is_told(self, curve):
        with pytest.raises(UserError, match="nothing to draw"):
            plots.training_curve(curve)


class TestImportance:
    BLOCKS = [
        {"layer": n, "sublayer": "block", "score": 1.0 + n % 5, "rank": (3 * n) % 8 + 1}
        for n in range(8)
    ]
    SUBLAYERS = [
        {"layer": n, "sublayer": kind, "score": 10.0 ** -(n + 4 * k), "rank": 8 - n - 4 * k}
        for n in range(4)
        for k, kind in enumerate(("attention", "mlp"))
    ]

    def test_a_panel_a_criterion_with_the_first_to_go_ringed(self, tmp_path):
        tables = {"one": self.BLOCKS, "two": self.SUBLAYERS, "none": []}
        labels = {"one": "loss, nats", "two": "1 − cosine"}
        figure = plots.importance(tables, labels, tmp_path / "importance.png", title="a model")
        assert (tmp_path / "importance.png").read_bytes().startswith(b"\x89PNG")
        one, two = figure.axes
        assert [axis.get_ylabel() for axis in (one, two)] == ["loss, nats", "1 − cosine"]
        assert one.lines[0].get_ydata().tolist() == [row["score"] for row in self.BLOCKS]
        assert [line.get_label() for line in two.lines[:2]] == ["Attention", "MLP"]
        rings = {axis: sorted(axis.lines[-1].get_xdata()) for axis in (one, two)}
        assert rings == {
            one: sorted(row["layer"] for row in self.BLOCKS if row["rank"] <= 2),
            two: sorted(row["layer"] for row in self.SUBLAYERS if row["rank"] <= 2),
        }
        assert [axis.get_yscale() for axis in (one, two)] == ["linear", "log"]
        shown = texts(figure)
        for part in ("one", "two", "a model", "Block", "Attention", "MLP", "first quarter"):
            assert part in shown
        styles = {(line.get_color(), line.get_marker(), line.get_linestyle())
                  for line in (one.lines[0], *two.lines[:2])}  # fmt: skip
        assert len(styles) == 3

    def test_nothing_to_draw_is_told(self):
        with pytest.raises(UserError, match="nothing to draw"):
            plots.importance({"one": []}, {})


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" the", "·the"), ("\n\t", "⏎⇥"), ("", ""), ("\x00", "□"), ("a" * 20, "a" * 13 + "…")],
)
def test_readable(token, shown):
    assert plots.readable(token) == shown
