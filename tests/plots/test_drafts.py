"""Pictures of drafts: each token is there once, in the look of what became of it; shares are those
of the tables."""

from __future__ import annotations

import warnings

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from dyndepth import plots
from dyndepth.common.errors import UserError
from dyndepth.plots.shares import by_kind, by_position
from dyndepth.plots.style import BLUE, ORANGE, PAGE, VERMILION
from dyndepth.runtime.acceptance import Round, Speculation
from dyndepth.writing.result import Generated, Proposal

PROPOSALS = (
    Proposal((" a", "$b$", "\n", "語"), 2, " own"),
    Proposal((), 0, "1"),
    Proposal(tuple(f" word{n}" for n in range(30)), 30, "."),
    Proposal((" end", " after"), 2, None, unwritten=1),
)


def make_text(proposals=PROPOSALS, prompt: str = "of\nFrance is", method: str = "one") -> Generated:
    """A text of these rounds; token ids and FLOPs do not matter."""
    rounds = [
        Round((0,) * len(each.drafted), each.accepted, (0,) * (each.written + bool(each.own)))
        for each in proposals
    ]
    totals = {"dense_block_flops": 1, "block_flops": 1, "by_cause": {}}
    return Generated(
        "text", (0,), (" first",), "end", prompt, 3, method, 1.0, totals, Speculation(rounds),
        tuple(proposals),
    )  # fmt: skip


def texts(figure) -> list[str]:
    import matplotlib.text

    return [each.get_text() for each in figure.findobj(matplotlib.text.Text)]


def boxes(figure) -> list[Rectangle]:
    return [each for each in figure.axes[0].patches if isinstance(each, Rectangle)]


class TestTokens:
    def test_each_token_has_a_box_that_says_what_became_of_it(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = plots.drafts(make_text(), tmp_path / "deep" / "a.png")
        assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")
        labels = [t.get_text() for t in figure.axes[0].texts if t.get_family() == ["monospace"]]
        looks = [(to_hex(b.get_facecolor()), to_hex(b.get_edgecolor())) for b in boxes(figure)]
        stands, own = (BLUE.lower(),) * 2, (ORANGE.lower(),) * 2
        taken_back, after = ("#ffffff", VERMILION.lower()), ("#ffffff", "#7a7a7a")
        found = dict(zip(labels, looks, strict=True))
        assert labels[:7] == ["·first", "·a", "$b$", "⏎", "語", "·own", "1"]
        assert looks[:7] == [own, stands, stands, taken_back, after, own, own]
        assert labels[7:] == [*(f"·word{n}" for n in range(30)), ".", "·end", "·after"]
        assert {found[f"·word{n}"] for n in range(30)} == {stands}
        assert (found["·end"], found["·after"]) == (stands, after)
        assert len(figure.axes[0].lines) == 1 + len(PROPOSALS)  # what is crossed out, and rows

    @pytest.mark.filterwarnings("ignore:Glyph .* missing from")
    def test_nothing_is_cut_off_or_covers_something_else(self):
        figure = plots.drafts(make_text())
        figure.draw_without_rendering()
        areas = [box.get_window_extent() for box in boxes(figure)]
        whole = figure.bbox
        for number, area in enumerate(areas):
            assert whole.x0 < area.x0
            assert area.x1 < whole.x1
            assert not any(area.overlaps(other) for other in areas[number + 1 :])
        letters = [t for t in figure.axes[0].texts if t.get_family() == ["monospace"]]
        for text, area in zip(letters, areas, strict=True):
            if text.get_text() != "語":  # drawn by another font
                drawn = text.get_window_extent()
                assert area.x0 <= drawn.x0
                assert drawn.x1 <= area.x1
        assert figure.get_figwidth() == PAGE
        heading = next(t for t in figure.texts if "After" in t.get_text())
        first = max(area.y1 for area in areas)
        assert heading.get_window_extent().y0 > first
        assert figure.legends[0].get_window_extent().y1 < min(area.y0 for area in areas)

    def test_the_heading_counts(self):
        shown = "\n".join(texts(plots.drafts(make_text(), title="a draft")))
        assert "a draft\nAfter “of France is”\n36 tokens drafted, 34 accepted (94%)" in shown
        assert "tokens a verification" in shown
        for part in ("drafted, stands", "drafted, taken back", "the whole model's own"):
            assert part in shown

    def test_shows_some_of_many_rounds(self):
        text = make_text(PROPOSALS[:1] * 50, prompt="x" * 200)
        figure = plots.drafts(text, first=10, count=5)
        shown = "\n".join(texts(figure))
        assert "rounds 10 to 14 of 50" in shown
        assert f"After “…{'x' * 89}”" in shown
        assert len(boxes(figure)) == 25
        for first in (51, -1):
            with pytest.raises(UserError, match="the text has rounds 0 to 50"):
                plots.drafts(text, first=first)

    def test_a_text_without_drafts_is_refused(self):
        with pytest.raises(UserError, match="one drafted nothing of this text"):
            plots.drafts(make_text(()))


class TestShares:
    def test_are_those_of_the_tables_with_what_is_needed(self, tmp_path):
        one, other = make_text(), make_text(PROPOSALS[:1], method="other")
        drafts = {"a": [one, other], "b": other}
        figure = plots.acceptance(drafts, tmp_path / "a.svg", needed={"a": 0.75})
        assert "<svg" in (tmp_path / "a.svg").read_text()
        left, right = figure.axes
        for axis, table in ((left, by_position([one, other])), (right, by_kind([one, other]))):
            line = axis.containers[0].lines[0]
            assert line.get_ydata() == pytest.approx(table["value"])
            (bars,) = axis.containers[0].lines[2]
            ends = [segment[:, 1] for segment in bars.get_segments()]
            assert [end[0] for end in ends] == pytest.approx(table["low"])
            assert [end[1] for end in ends] == pytest.approx(table["high"])
            (wanted,) = [each for each in axis.lines if each.get_label().startswith("a: pays")]
            assert set(wanted.get_ydata()) == {0.75}
        labels = [label.get_text() for label in right.get_xticklabels()]
        assert "word\nstart\n35 judged" in labels
        entries = [each.get_text() for each in figure.legends[0].get_texts()]
        assert entries == ["a", "b", "a: pays from here on"]
        figure = plots.acceptance(drafts, needed={"a": 0.75, "b": 0.7500001})
        entries = [each.get_text() for each in figure.legends[0].get_texts()]
        assert entries == ["a", "b", "a, b: pays from here on"]

    def test_one_text_has_its_methods_name(self):
        figure = plots.acceptance(make_text())
        assert [each.get_text() for each in figure.legends[0].get_texts()] == ["one"]

    @pytest.mark.parametrize("drafted", [[], {}, make_text(()), {"a": make_text(PROPOSALS[1:2])}])
    def test_nothing_drafted_is_refused(self, drafted):
        with pytest.raises(UserError, match="nothing was drafted"):
            plots.acceptance(drafted)
