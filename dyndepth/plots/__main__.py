"""The command line ``python -m dyndepth.plots RUN...``: every figure that runs' tables allow.

Several runs stand in the same figures; where their settings differ, labels have their letters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.commands import Parser, run
from dyndepth.common.errors import UserError
from dyndepth.common.modes import EAGER
from dyndepth.common.paths import check_folder, file_part, path_of
from dyndepth.plots.retention import bound_gap, retained_by_task
from dyndepth.plots.routes import executed_by_position, executed_in_run, routing_heatmap
from dyndepth.plots.runs import read_runs
from dyndepth.plots.scores import accuracy_vs_flops, accuracy_vs_wallclock, flops_vs_wallclock
from dyndepth.plots.style import written
from dyndepth.plots.tables import SETTING, main_metric, task_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from dyndepth.routes.trace import Routes


FORMATS = ("png", "svg")
Drawing = Callable[[], "Figure"]


def figures(
    *folders: str | Path, tables: dict[str, pd.DataFrame] | None = None
) -> Iterator[tuple[str, Drawing]]:
    """Name and drawing of every figure of a run, or of several together; a drawing raises
    UserError, saying why, if the tables do not allow it. ``tables`` are the runs', if they were
    read already.

    Where one run holds several models or settings of data, each has its own figures, in a folder
    ``setting_1`` and so on. Records of routes are drawn for each run, of several in a folder of its
    name. Raises UserError if a folder is no run.
    """
    tables = read_runs(folders) if tables is None else tables
    yield from _of_tables(tables)
    for folder in map(Path, folders):
        place = f"{file_part(folder.name)}/" if len(folders) > 1 else ""
        for name, draw in _of_records(folder):
            yield place + name, draw


def _of_tables(tables: dict[str, pd.DataFrame]) -> Iterator[tuple[str, Drawing]]:
    board = tables["leaderboard"]
    keys = [key for key in SETTING if key in board]
    if "run" in board:
        yield from _of_setting(tables)
        return
    settings = board.groupby(keys, sort=False, dropna=False)["cell"].apply(set).tolist()
    for number, cells in enumerate(settings, start=1):
        own = {
            name: table[table["cell"].isin(cells)]
            for name, table in tables.items()
            if "cell" in table
        }
        place = f"setting_{number}/" if len(settings) > 1 else ""
        for name, draw in _of_setting(own):
            yield place + name, draw


def _of_setting(tables: dict[str, pd.DataFrame]) -> Iterator[tuple[str, Drawing]]:
    def of(function: Callable[..., Figure], *names: str, **options: Any) -> Drawing:
        return partial(_from_tables, tables, names, function, options)

    board = "leaderboard"
    yield "accuracy_vs_flops", of(accuracy_vs_flops, board)
    yield "accuracy_vs_total_flops", of(accuracy_vs_flops, board, across="total_speedup")
    for phase in ("prefill", "decode"):
        yield f"accuracy_vs_{phase}_time", of(accuracy_vs_wallclock, board, phase=phase)
        likelihood = of(accuracy_vs_wallclock, board, phase=phase, metric="bits_per_byte")
        yield f"bits_per_byte_vs_{phase}_time", likelihood
    accuracy = tables.get("accuracy")
    for task in () if accuracy is None else accuracy["task"].dropna().unique():
        metric = main_metric(tables["accuracy"], task)
        scores = ("accuracy", "compute")
        for name, figure in ((f"{metric}_vs_flops", accuracy_vs_flops), ("bound_gap", bound_gap)):
            yield (
                f"{file_part(name)}_{file_part(task)}",
                of(partial(_of_task, figure, task, metric), *scores),
            )
    yield "retained_by_task", of(retained_by_task, "accuracy", "compute")
    timing = tables.get("timing")
    if timing is None or timing.empty:
        yield "flops_vs_wallclock", of(flops_vs_wallclock, "timing")
    else:
        shapes = timing[["batch", "length", "mode"]].drop_duplicates()
        for batch, length, mode in shapes.itertuples(index=False):
            conditions = {"batch": int(batch), "length": int(length), "mode": str(mode)}
            name = f"flops_vs_wallclock_batch{batch}_length{length}"
            name += "" if mode == EAGER else f"_{mode}"
            yield name, of(flops_vs_wallclock, "timing", **conditions)
    for target in sorted(set(tables[board]["target_speedup"]) - {1.0}):
        name = f"executed_by_layer_{target:g}x"
        yield name, of(executed_in_run, "routing", target_speedup=target)


def _from_tables(
    tables: dict[str, pd.DataFrame],
    names: Sequence[str],
    function: Callable[..., Figure],
    options: dict[str, Any],
) -> Figure:
    for name in names:
        if name not in tables or tables[name].empty:
            raise UserError(f"{name}.csv is missing or has no rows")
    return function(*(tables[name] for name in names), **options)


def _of_task(
    function: Callable[..., Figure],
    task: str,
    metric: str,
    accuracy: pd.DataFrame,
    compute: pd.DataFrame,
) -> Figure:
    return function(task_table(accuracy, compute, task, metric), metric=metric, title=task)


def _of_records(run: Path) -> Iterator[tuple[str, Drawing]]:
    """Figures of the traces that lie beside the tables."""
    files = sorted((run / "routes").glob("*.safetensors"))
    if not files:
        reason = f"no traces in {run / 'routes'}; record them by python -m dyndepth.routes"
        yield "executed_by_position", partial(_refused, reason)
        return
    # Records are read with a module that loads torch.
    from dyndepth.routes.trace import Routes

    records: dict[str, Routes] = {}
    for file in files:
        try:
            records[file.stem] = Routes.load(file)
        except UserError as fault:
            yield f"routing/{file.stem}", partial(_refused, str(fault))
    by_target: dict[float, list[Routes]] = {}
    for record in records.values():
        by_target.setdefault(float(record.identity.get("target_speedup", 1.0)), []).append(record)
    for target, own in sorted(by_target.items()):
        yield f"executed_by_position_{target:g}x", partial(executed_by_position, own)
    for name, record in records.items():
        yield f"routing/{name}", partial(routing_heatmap, record, record.documents[0])


def _refused(reason: str) -> Figure:
    raise UserError(reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, or 2 for wrong input."""
    return run("plots", _plots, arguments)


def _plots(given: list[str]) -> None:
    parser = Parser(
        "plots",
        "Write every figure that a run's tables allow, and say which they do not; of several runs "
        "together, with a letter for each where their settings differ.",
    )
    parser.runs()
    parser.add_argument(
        "--output_path",
        type=path_of,
        metavar="FOLDER",
        help="folder to write to (default: figures in the first RUN)",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=(*FORMATS, "pdf"),
        default=FORMATS,
        help=f"kinds of files (default: {' '.join(FORMATS)})",
    )
    options, count = parser.parse_args(given), 0
    tables = read_runs(options.runs)
    output = check_folder("output_path", options.output_path or options.runs[0] / "figures")
    for name, draw in figures(*options.runs, tables=tables):
        try:
            figure = draw()
        except UserError as reason:
            print(f"not drawn: {name}: {reason}")
            continue
        paths = [output / f"{name}.{ending}" for ending in options.formats]
        for path in paths:
            written(figure, path)
        print(f"written: {', '.join(map(str, paths))}")
        count += 1
    print(f"{count} figures in {output}")


if __name__ == "__main__":
    sys.exit(main())
