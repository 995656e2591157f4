"""One row a cell: what it scores, what it retains of dense, what it saves.

``python -m dyndepth.leaderboard RUN...`` merges runs and prints the table; with --output_path it
writes leaderboard.csv and, for people, leaderboard.md and leaderboard.html. Accuracy here is
``acc`` alone, never mixed with ``acc_norm``: the mean over tasks, its interval by bootstrap over
documents within tasks, and the fraction of dense retained on the same documents. A leaderboard may
hold cells of several settings; each is compared with dense of its own, and says what it has apart
from the others (``naming.apart``).
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import Cell, identity_columns, is_dense
from dyndepth.cells.identity import Row, setting
from dyndepth.cells.merging import merged
from dyndepth.cells.naming import apart
from dyndepth.cells.recipe import NONE, shortened
from dyndepth.chance import METRIC, chance
from dyndepth.common.commands import Parser, print_table, underscored
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.common.paths import check_folder, path_of
from dyndepth.schema import TABLES, validate
from dyndepth.tables import as_csv

CONTROL = "control"
"""What a control has for its paper (``DynamicDepthMethod.paper``)."""
Z95 = 1.96
"""Standard errors on each side of a 95% interval."""
APART = {"bits_per_byte": "bits_per_byte", "rouge_l": "rougeL"}
"""Columns of scores that are no accuracies, and the metric whose mean over tasks they hold."""
SHARES = ("rouge_l",)
"""Those of them that lie between 0 and 1."""

NAMES = ("leaderboard.csv", "leaderboard.md", "leaderboard.html")
"""What the command writes."""


def leaderboard(cells: Iterable[Cell]) -> list[Row]:
    """Rows of leaderboard.csv, in the order of ``cells``, identity included."""
    cells = list(cells)
    dense = {setting(cell.identity): outcomes(cell) for cell in cells if is_dense(cell)}
    return [
        {**identity_columns(cell), **_row(cell, dense.get(setting(cell.identity)))}
        for cell in cells
    ]


def is_control(row: Row) -> bool:
    """True for the row of a control: something to compare methods with, no method of a paper."""
    return row.get("paper") == CONTROL


def _row(cell: Cell, dense: dict[str, dict[str, float]] | None) -> Row:
    # numpy comes late: --help must be instant.
    from dyndepth.intervals import mean_score, retained

    own = outcomes(cell)
    row: Row = {
        "status": cell.status,
        "documents": sum(map(len, own.values())),
        **{
            key: value
            for column, metric in APART.items()
            for key, value in _mean_value(cell, column, metric).items()
        },
        **speedups(cell),
        **wall_speedups(cell),
        **_timed_shape(cell),
        "paper": cell.provenance.get("paper"),
        "needs_training": cell.provenance.get("needs_training"),
        "device_name": cell.provenance.get("device_name"),
        "threads": cell.provenance.get("threads"),
        "error": cell.error,
    }
    if own:
        mean = mean_score(own)
        row |= {"mean_acc": mean.value, "mean_acc_low": mean.low, "mean_acc_high": mean.high}
        row["chance"] = chance(cell)
    kept = retained(own, dense) if own and dense else None
    if kept:
        row |= {"retained": kept.value, "retained_low": kept.low, "retained_high": kept.high}
    return row


def outcomes(cell: Cell) -> dict[str, dict[str, float]]:
    """Task -> document -> right (1.0) or wrong (0.0), for the tasks that have an accuracy."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in cell.samples:
        for metric, outcome in json.loads(row["outcomes"]).items():
            # The first filter stands for the task, as it does in its own results.
            if metric.partition(",")[0] == METRIC and outcome is not None:
                found[row["task"]].setdefault(str(row["doc_id"]), float(outcome))
    return dict(found)


def _mean_value(cell: Cell, column: str, metric: str) -> Row:
    """Mean of a metric over the tasks that have it, and its 95% interval by their standard errors
    (the tasks' documents are independent); no interval where one of them is unknown."""
    rows = [row for row in cell.accuracy if row["metric"] == metric and row["value"] is not None]
    if not rows:
        return {column: None}
    value = sum(row["value"] for row in rows) / len(rows)
    errors = [float(row["stderr"]) for row in rows if row.get("stderr") is not None]
    margin = Z95 * math.sqrt(sum(error**2 for error in errors)) / len(rows)
    if len(errors) < len(rows) or math.isnan(margin):
        return {column: value}
    # Neither metric can be negative, nor one of them above 1, and the normal law does not know it.
    low, high = max(0.0, value - margin), value + margin
    high = min(1.0, high) if column in SHARES else high
    return {column: value, f"{column}_low": low, f"{column}_high": high}


def speedups(cell: Cell) -> Row:
    """Achieved block and total FLOPs speedup over the tokens of all tasks."""
    found: Row = {}
    for kind in ("block", "total"):
        executed = dense = 0.0
        for row in cell.compute:
            spent, ratio = row[f"{kind}_flops_per_token"], row[f"{kind}_speedup"]
            if row["phase"] == "all" and spent is not None and ratio is not None:
                executed += row["tokens"] * spent
                dense += row["tokens"] * spent * ratio
        found[f"{kind}_speedup"] = dense / executed if executed else None
    return found


def wall_speedups(cell: Cell) -> Row:
    """Wall speedups at batch 1 (the smallest batch timed) on its longest length, by phase."""
    found: Row = {}
    for phase in ("prefill", "decode"):
        row = _timed(cell, phase)
        if row is None:
            continue
        found[f"wall_{phase}_speedup"] = row["wall_speedup"]
        for end in ("low", "high"):
            found[f"wall_{phase}_{end}"] = row.get(f"wall_speedup_{end}")
    return found


def _timed(cell: Cell, phase: str) -> Row | None:
    rows = [
        row
        for row in cell.timing
        if row.get("phase") == phase and row.get("wall_speedup") is not None
    ]
    return min(rows, key=lambda row: (row["batch"], -row["length"])) if rows else None


def _timed_shape(cell: Cell) -> Row:
    row = _timed(cell, "prefill") or _timed(cell, "decode")
    return {f"wall_{key}": row[key] for key in ("batch", "length")} if row else {}


def texts(cells: Sequence[Cell], rows: Sequence[Row]) -> dict[str, str]:
    """The table for programs, a page for people and one for browsers, by file name, of ``NAMES``.

    Raises UserError if a value cannot be in the table.
    """
    from dyndepth.leaderboard_markdown import markdown
    from dyndepth.leaderboard_page import board, html

    validate(NAMES[0], rows)
    found = board(cells, rows)
    return dict(
        zip(NAMES, (as_csv(rows, TABLES[NAMES[0]].own), markdown(found), html(found)), strict=True)
    )


def write(cells: Sequence[Cell], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write all of ``texts`` and return where. Raises as it does, before anything is written."""
    for name, text in texts(cells, rows).items():
        write_atomically(folder / name, text)
    return [folder / name for name in NAMES]


def show(rows: Sequence[Row], title: str = "Leaderboard") -> None:
    """Print leaderboard rows as a table. A row of a bound, a control or a failure says so by its
    name; rows of several settings say what theirs has apart."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, caption="[..] are 95% intervals", caption_justify="left")
    several = len({row["model"] for row in rows}) > 1
    settings = [
        ", ".join(word for word in words if word != row["model"])
        for row, words in zip(rows, apart(rows), strict=True)
    ]
    headings = ["model"] if several else []
    headings += ["setting"] if any(settings) else []
    recovered = any(row["recovery"] != NONE for row in rows)
    headings += ["method", "parameters", "phases", "target", "seed"]
    headings += ["recovery"] if recovered else []
    headings += ["mean acc", "% of dense"]
    headings += ["bits/byte", "ROUGE-L", "block", "total", "prefill", "decode"]
    numeric = set(headings) - {"model", "setting", "method", "parameters", "phases", "recovery"}
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numeric else "left")
    for row, words in zip(rows, settings, strict=True):
        name = str(row["method"])
        name += " (bound)" if row["bound"] else " (control)" if is_control(row) else ""
        name += " FAILED" if row["status"] == "error" else ""
        texts = [str(row["model"])] if several else []
        texts += [words] if any(settings) else []
        texts += [name, str(row["parameters"]), str(row["phases"])]
        texts += [f"{row['target_speedup']:g}x", str(row["seed"])]
        texts += [shortened(str(row["recovery"]))] if recovered else []
        texts.append(_spread(row, "mean_acc", 1, 3))
        texts.append(_spread(row, "retained", 100, 0))
        texts += [_number(row.get(key), "{:.3f}") for key in APART]
        texts += [_number(row.get(f"{kind}_speedup"), "{:.2f}x") for kind in ("block", "total")]
        texts += [
            _number(row.get(f"wall_{phase}_speedup"), "{:.2f}x") for phase in ("prefill", "decode")
        ]
        table.add_row(*map(escape, texts))
    print_table(table)


def _spread(row: Row, key: str, scale: float, digits: int) -> str:
    if row.get(key) is None:
        return ""
    value, low, high = (row[name] * scale for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: merge runs into one leaderboard."""
    parser = Parser(
        prog="python -m dyndepth.leaderboard",
        description="Merge runs into one leaderboard. Rows of several settings say what theirs has "
        "apart; other evaluation data or task versions are refused.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=path_of, metavar="RUN", help="a sweep's output path"
    )
    parser.add_argument(
        "--output_path",
        type=path_of,
        metavar="FOLDER",
        help=f"folder to write {', '.join(NAMES)} to",
    )
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser.parse_args([underscored(word) for word in given])
        if options.output_path:
            options.output_path = check_folder("output_path", options.output_path)
        cells = merged(options.runs)
        rows = leaderboard(cells)
        written = write(cells, rows, options.output_path) if options.output_path else []
    except UserError as fault:
        print(f"dyndepth.leaderboard: {fault}", file=sys.stderr)
        return 2
    show(rows)
    if written:
        print(f"written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
