"""Latency, throughput and memory of cells: in leaderboard.csv, on its pages and in the terminal."""

from __future__ import annotations

import io

import pytest
from cells import cell
from rich.console import Console

from dyndepth.common import commands
from dyndepth.results.columns import LEADERBOARD
from dyndepth.results.console import show_leaderboard
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import board, html, markdown
from dyndepth.results.schema import validate
from dyndepth.results.serving import serving


def _ends(name: str, value: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - 1, f"{name}_high": value + 1}


def _rows(batch: int, more: float = 0.0):
    found = []
    for phase, name, value in (("prefill", "ttft_ms", 40.0), ("decode", "tpot_ms", 8.0)):
        row = {"phase": phase, "batch": batch, "length": 8, "mode": "eager", "suspect": False}
        row |= _ends("wall_speedup", 3.5)
        for side, scale in (("dense", 2.0), ("method", 1.0)):
            row |= _ends(f"{side}_{name}", scale * value + more)
            row |= _ends(f"{side}_tokens_per_s", 1000.0 / value / scale)
            row |= {f"{side}_peak_above_bytes": int(scale * value * 1e6)}
            row |= {f"{side}_cache_bytes": int(scale * (1e6 if phase == "prefill" else 2e6))}
        found.append(row)
    return found


@pytest.fixture
def cells():
    timed = cell(method="m", target_speedup=1.5, phases="both")
    timed.timing = _rows(1) + _rows(8, more=100.0)
    dense = cell(phases="both")
    dense.timing = _rows(1)
    return [dense, timed, cell(method="old", phases="both")]


def test_a_row_has_the_numbers_of_the_shape_of_its_speedups(cells):
    _, row, old = leaderboard(cells)
    assert (row["wall_batch"], row["method_ttft_ms"], row["dense_ttft_ms_high"]) == (1, 40.0, 81.0)
    assert (row["method_tpot_ms"], row["method_tpot_ms_low"]) == (8.0, 7.0)
    assert row["method_tokens_per_s"] == 125.0  # of decode
    assert row["method_peak_above_bytes"] == 40_000_000  # the prompt's, which is larger
    assert row["dense_cache_bytes"] == 4_000_000  # after the last step
    assert row["method_peak_bytes"] is None
    assert not any(key.endswith("_ms") for key in old)
    for each in (row, old):
        validate("leaderboard.csv", [each])
    assert set(row) <= set(LEADERBOARD.columns)


def test_the_table_has_a_line_a_side_and_no_column_that_none_has(cells):
    found = serving(leaderboard(cells), [""] * 3)
    assert found.headings[:6] == ["method", "side", "shape", "TTFT ms", "TPOT ms", "tokens/s"]
    assert found.headings[6:] == ["peak above weights MB", "cache MB"]
    assert [row[:3] for row in found.rows] == [
        ["dense 1x", "dense", "1x8"],
        ["m 1.5x", "dense", "1x8"],
        ["m 1.5x", "method", "1x8"],
    ]
    # Dense's own row is dense as it is, not dense with a method that skips nothing.
    assert found.rows[0][3] == found.rows[1][3] == "80.0 [79.0, 81.0]"
    assert found.rows[2][3:5] == ["40.0 [39.0, 41.0]", "8.0 [7.0, 9.0]"]
    assert found.rows[2][6:] == ["40.0", "2.00"]
    assert serving(leaderboard(cells[2:]), [""]) == ([], [])


def test_no_two_rows_have_one_name_in_the_terminal_or_on_a_page(cells, monkeypatch):
    def another(**changes):
        found = cell(method="m", target_speedup=1.5, phases="both", **changes)
        found.timing = _rows(1)
        return found

    more = [*cells, another(seed=1), another(harness_code="other"), another(recovery="lora")]
    recovered = another(recovery="lora")
    recovered.identity |= {"method": "dense", "target_speedup": 1.0}
    rows = leaderboard([*more, recovered])
    page = board([*more, recovered], rows)["serving"]
    names = [name for name, side, *_ in page["rows"] if side == "method"]
    assert names == [
        *("m, A 1.5x, seed 0", "m, A 1.5x, seed 1", "m, B 1.5x", "m + lora, A 1.5x"),
        "dense + lora, A 1x",
    ]
    shown = io.StringIO()
    terminal = Console(width=200, file=shown, force_terminal=True, color_system=None)
    monkeypatch.setattr(commands, "console", lambda: terminal)
    show_leaderboard(rows)
    printed = " ".join(shown.getvalue().split())
    assert all(name in printed for name in names)


def test_a_time_without_ends_says_so(cells):
    (row,) = leaderboard(cells[1:2])
    row["method_ttft_ms_low"] = row["method_ttft_ms_high"] = None
    assert serving([row], [""]).rows[1][3] == "40.0 no interval"


def test_the_pages_have_it_where_something_was_measured(cells):
    found = board(cells, leaderboard(cells))
    text = markdown(found)
    assert "## Latency, throughput and memory" in text
    assert "| m 1.5x | method | 1x8 | 40.0 [39.0, 41.0] |" in text.replace("\\", "")
    assert "40.0 [39.0, 41.0]" in html(found)
    assert "Latency" not in markdown(board(cells[2:], leaderboard(cells[2:])))


@pytest.mark.parametrize(("width", "there"), [(80, False), (159, False), (160, True)])
def test_a_wide_terminal_shows_it_and_a_narrow_one_does_not(cells, monkeypatch, width, there):
    shown = io.StringIO()
    terminal = Console(width=width, file=shown, force_terminal=True, color_system=None)
    monkeypatch.setattr(commands, "console", lambda: terminal)
    show_leaderboard(leaderboard(cells))
    printed = shown.getvalue()
    assert ("TTFT" in printed) == there
    assert max(map(len, printed.splitlines())) <= width
    if there:
        assert "40.0 [39.0, 41.0]" in printed
