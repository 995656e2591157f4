"""Several runs as the tables of one: their settings have letters, in the labels and beneath."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dyndepth.cells.cell import identity_columns
from dyndepth.cells.merging import merged, origins
from dyndepth.cells.naming import lettered
from dyndepth.plots.tables import read_tables

if TYPE_CHECKING:
    import pandas as pd


def read_runs(runs: Sequence[str | Path]) -> dict[str, pd.DataFrame]:
    """The tables of several runs together, as ``tables.read_tables`` gives those of one.

    Where their settings differ, each row's ``label`` ends in the letter of its own, which is also
    in its column ``run``; ``run_told`` says what that letter stands for: where it was read, and
    what it has apart. Raises UserError as ``cells.merging.merged`` does.
    """
    import pandas as pd

    from dyndepth.results.tables import write_tables

    paths = [Path(run) for run in runs]
    if len(paths) == 1:
        return read_tables(paths[0])
    cells = merged(paths)
    with TemporaryDirectory() as folder:
        write_tables(cells, Path(folder))
        tables = read_tables(folder)
    letters, stand_for = lettered([identity_columns(cell) for cell in cells], origins(paths))
    if not stand_for:
        return tables
    told = {text.partition(":")[0]: text for text in stand_for}
    own = {cell.key: letter for cell, letter in zip(cells, letters, strict=True)}
    names = [
        f"{label} ({own[cell]})"
        for label, cell in zip(tables["leaderboard"]["label"], own, strict=True)
    ]
    named = dict(zip(own, names, strict=True))
    # A's before B's, as the runs were given.
    order = sorted(
        dict.fromkeys(names), key=dict(zip(names, _places(own), strict=True)).__getitem__
    )
    for table in tables.values():
        if "cell" in table:
            table["run"] = table["cell"].map(own)
            table["run_told"] = table["run"].map(told)
            table["label"] = pd.Categorical(table["cell"].map(named), order)
    return tables


def _places(own: dict[str, str]) -> list[tuple[int, str]]:
    """Of each cell what puts its letter in order: A to Z, then AA."""
    return [(len(letter), letter) for letter in own.values()]


def by_run(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Letter and rows of every setting of a table; one without letter where it has one alone."""
    if "run" not in table:
        return [("", table)]
    return [(str(letter), own) for letter, own in table.groupby("run", sort=True)]
