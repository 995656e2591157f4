"""The pictures of the pages: drawn from the committed tables, for a block that asks for one.

``<!-- generated: figure`` takes ``file`` (an SVG, relative to the repository, as is the page),
``kind`` (``scores``: a task's scores against achieved FLOPs; ``routes``: which blocks ran at one
target), ``text`` (what the picture shows, for people who do not see it), ``labels`` (the methods,
in the names of the tables) and what its kind needs: ``task``, ``metric`` and maybe ``title``, or
``target``.

A picture holds the digest of its numbers and options. It is drawn anew where that differs: the
bytes of a drawing are another thing with each version of matplotlib.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.naming import titled
from dyndepth.common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from dyndepth.pages.blocks import Source

_WHO = ["cell", "model", "method", "parameters", "phases", "recovery", "target_speedup", "seed"]
_WHAT = {
    "scores": ["bound", "block_speedup"],
    "routes": ["task", "phase", "layer", "sublayer", "executed"],
}
"""Columns that a picture is drawn from, beside the metric and its ends, by its kind."""
_READ = {"scores": ["accuracy", "compute"], "routes": ["routing"]}
"""Tables that it is drawn from, beside the leaderboard."""
_TABLES = ("leaderboard.csv", "accuracy.csv", "compute.csv", "routing.parquet")
_KEPT = re.compile(r"numbers ([0-9a-f]+)")


def figure(source: Source, options: dict[str, Any]) -> str:
    """The line of Markdown that shows the picture."""
    if not drawable(source):
        return source.missing()
    return f"![{' '.join(options['text'].split())}]({options['file']})"


def drawable(source: Source) -> bool:
    """Whether the main run has the tables that pictures are drawn from."""
    run = source.root / source.results
    return all((run / name).is_file() for name in _TABLES)


class Picture:
    """One picture, as a page's ``options`` ask for it of the main run. See the module's docstring.

    Raises UserError where the run has no such numbers.
    """

    def __init__(self, source: Source, options: dict[str, Any]) -> None:
        self.path = Path(options["file"])
        self._options = options
        self._table = _numbers(source.root / source.results, options)
        text = json.dumps(options | {"text": ""}, sort_keys=True) + self._table.to_csv(index=False)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def current(self, root: Path) -> bool:
        """Whether the file in ``root`` was drawn from these numbers."""
        file = root / self.path
        found = _KEPT.search(file.read_text(encoding="utf-8")) if file.is_file() else None
        return found is not None and found[1] == self.digest

    def svg(self) -> str:
        """The picture's file."""
        from dyndepth.plots.style import save

        buffer, about = io.BytesIO(), f"numbers {self.digest}"
        save(_drawn(self._table, self._options), buffer, "svg", Description=about)
        return buffer.getvalue().decode("utf-8")


def _numbers(run: Path, options: dict[str, Any]) -> pd.DataFrame:
    from dyndepth.plots.tables import labelled, read_tables, reference, task_table

    tables = read_tables(run, _READ[options["kind"]])
    metric, columns = [], _WHO + _WHAT[options["kind"]]
    if options["kind"] == "scores":
        name = options["metric"]
        metric = [name, f"{name}_low", f"{name}_high"]
        table = task_table(tables["accuracy"], tables["compute"], options["task"], name)
    else:
        table = labelled(tables["routing"])
        table = table[table["target_speedup"] == options["target"]]
        table = table[(table["phase"] == "all") & (table["task"] == "all")]
    wanted = options["labels"]
    missing = set(wanted) - set(table["label"])
    if missing:
        raise UserError(
            f"{run} has no numbers of {', '.join(sorted(missing))} for {options['file']}"
        )
    table = table[table["label"].isin(wanted) | reference(table)]
    titles = {
        row["label"]: titled({str(key): value for key, value in row.items()})
        for row in table.drop_duplicates("label").to_dict("records")
    }
    table = table.assign(label=table["label"].cat.rename_categories(titles))
    return table[[*columns, *metric, "label"]]


def _drawn(table: pd.DataFrame, options: dict[str, Any]) -> Figure:
    from dyndepth.plots.routes import executed_in_run
    from dyndepth.plots.scores import accuracy_vs_flops

    if options["kind"] == "scores":
        title = options.get("title", options["task"])
        return accuracy_vs_flops(table, metric=options["metric"], title=title)
    return executed_in_run(table, target_speedup=options["target"])
