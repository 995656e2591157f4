"""Several seeds as one row: the same for terminal, CSV, the page and the documents' tables."""

from __future__ import annotations

import csv
import io
from itertools import permutations

import pytest
from cells import cell

from dyndepth.pages.blocks import averaged
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.leaderboard_pages import board
from dyndepth.results.seeds import together
from dyndepth.results.shown import board_rows
from dyndepth.results.shown_formats import written
from dyndepth.results.tables import csv_text

WALLS = {0: None, 1: (0.95, 0.9, 1.0), 2: (1.15, 1.0, 1.3)}
"""By seed its wall speedup and the ends of its interval; the first was not timed."""
EXPECTED = (1.05, 0.9, 1.3)


def _cells(order=(0, 1, 2)):
    found = []
    for seed in order:
        one = cell([1] * (10 + seed) + [0] * 10, method="m", phases="both", seed=seed)
        if WALLS[seed]:
            ends = ("wall_speedup", "wall_speedup_low", "wall_speedup_high")
            row = {"phase": "prefill", "batch": 1, "length": 8, "cores": 2, "threads": 1}
            row |= {"repeats": 10 * seed, "load_average": 1.9 + seed}
            one.timing = [row | dict(zip(ends, WALLS[seed], strict=True))]
        found.append(one)
    return found


def _told(row, name="wall_prefill"):
    return tuple(float(row[f"{name}_{what}"]) for what in ("speedup", "low", "high"))


def test_a_mean_is_of_the_seeds_that_have_it_whoever_shows_it():
    cells = _cells()
    rows = leaderboard(cells)
    ((row,), _) = board_rows(rows)
    (entry,) = board(cells, rows)["entries"]
    (shown,) = csv.DictReader(io.StringIO(written("csv", rows)))
    texts = list(csv.DictReader(io.StringIO(csv_text(rows, list(rows[0] | rows[1])))))
    block = averaged(texts)
    for found in (_told(row), tuple(entry["prefill"]), _told(shown), _told(block)):
        assert found == pytest.approx(EXPECTED)
    assert (row["wall_repeats"], row["wall_load"], row["wall_loaded"]) == (10, 3.9, "prefill")
    assert (entry["pairs"], entry["load"]) == (10, 3.9)
    assert (block["wall_repeats"], block["wall_load"]) == ("10", "3.9")
    assert shown["seeds"] == "3"
    for form in ("latex", "markdown"):
        assert "1.05x [0.90, 1.30] noisy, undecided, loaded" in written(form, rows)


def test_the_order_of_the_seeds_changes_nothing():
    expected = [_all(_cells(order)) for order in permutations((0, 1, 2))]
    assert all(found == expected[0] for found in expected)


def _all(cells):
    rows = leaderboard(cells)
    return board_rows(rows), board(cells, rows)["entries"], together(rows), written("csv", rows)


def test_an_interval_reaches_from_the_lowest_end_to_the_highest_or_is_none():
    def seed(number, *ends):
        keys = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high")
        return {"seed": number} | dict(zip(keys, ends, strict=True))

    rows = [seed(0, 2.0, 1.0, 2.5), seed(1, 3.0, 2.5, 4.0)]
    found = together(rows)
    assert found == seed(0, 2.5, 1.0, 4.0)
    assert together([*rows, seed(2, 4.0, None, None)]) == seed(0, 3.0, None, None)
    assert together([*rows, seed(2, 4.0, 3.0, None)]) == seed(0, 3.0, None, None)
    assert together([*rows, seed(2, None, None, None)]) == found
    assert together([rows[1]]) == rows[1]
    # A whole number is a number, too.
    assert together([seed(0, 1, 1, 1), seed(1, 0, 0, 0)]) == seed(0, 0.5, 0, 1)
