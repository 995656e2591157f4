"""Which cells may stand against each other.

Cells of one setting (model, data, documents, versions, precision) were scored alike. Among them, a
curve is all cells that differ only in target speedup and seed. Competitors are the cells of one
setting and one recovery that are no bounds: what was trained is measured against what was trained.
What drafts and verifies (``cell.is_lossless``) saves no FLOPs and has no curve over them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dyndepth.cells.cell import DENSE, Cell, is_dense, is_lossless, order
from dyndepth.cells.identity import METHOD_KEYS, Row, flat, plain, setting
from dyndepth.cells.merging import check_comparable
from dyndepth.cells.recipe import NONE
from dyndepth.common.errors import UserError
from dyndepth.results.statistics.curves import FLOPS, Point, averaged, curve, measured
from dyndepth.results.statistics.intervals import LEAST

NO_DENSE = "there is no finished dense cell of the same setting"


def jobs(
    groups: Sequence[Peers],
    tasks: Sequence[str] | None,
    what: str,
    flops: Sequence[str] = FLOPS[:1],
) -> Iterable[tuple[Peers, Score]]:
    """What can be compared, setting by setting, with a progress bar where it takes long."""
    from tqdm import tqdm

    found = [
        (each, replace(score, flops=kind))
        for each in groups
        for score in each.comparable(tasks)
        for kind in flops
    ]
    return tqdm(found, desc=what, unit="metric", delay=3, leave=False, disable=None)


def few(documents: int) -> str:
    """Why there is no interval."""
    return f"{documents} documents are too few for an interval: at least {LEAST}"


VARIED = ("target_speedup", "seed")
"""Keys of the identity by which the cells of one curve differ."""


@dataclass(frozen=True)
class Score:
    """One metric of one task, and which FLOPs its budgets count (``curves.FLOPS``)."""

    task: str
    metric: str
    higher_is_better: bool
    task_version: str
    flops: str = "block"


@dataclass(frozen=True, eq=False)
class Series:
    """The cells of one curve, in the order of the tables; ``failed`` have no results."""

    cells: tuple[Cell, ...]
    failed: tuple[Cell, ...]

    @property
    def identity(self) -> Row:
        """The identity of the first cell: all but ``VARIED`` is the curve's own."""
        return (*self.cells, *self.failed)[0].identity

    @property
    def bound(self) -> bool:
        """True if the method sees labels."""
        return is_bound((*self.cells, *self.failed)[0])

    @property
    def recovery(self) -> str:
        return str(self.identity["recovery"])

    def by_target(self) -> dict[float, list[Cell]]:
        """Its finished cells by target speedup."""
        found: dict[float, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(float(cell.identity["target_speedup"]), []).append(cell)
        return found


@dataclass(eq=False)
class Peers:
    """All cells of one setting, in the order of the tables."""

    cells: list[Cell]
    _points: dict[tuple[str, Score], Point] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """12 hex digits that name the setting."""
        return hashlib.sha256(setting(self.cells[0].identity).encode()).hexdigest()[:12]

    @property
    def dense(self) -> Cell | None:
        """The cell that all others are compared to: dense without recovery."""
        return next(filter(is_dense, self.cells), None)

    def scores(self, tasks: Sequence[str] | None = None) -> list[Score]:
        """What was scored, by dense or else by any cell, in the order of the tasks."""
        found: dict[Score, None] = {}
        for cell in [self.dense] if self.dense else self.cells:
            for row in cell.accuracy:
                known = row["higher_is_better"] is not None
                if known and (tasks is None or row["task"] in tasks):
                    own = row["task"], row["metric"], row["higher_is_better"]
                    found[Score(*own, str(row.get("task_version")))] = None
        return list(found)

    def comparable(self, tasks: Sequence[str] | None = None) -> list[Score]:
        """The scores that dense has on single documents, so that they can be paired."""
        dense = self.dense
        return [
            score
            for score in self.scores(tasks)
            if dense is None or not isinstance(self.attempt([dense], score), str)
        ]

    def point(self, cells: Sequence[Cell], score: Score) -> Point:
        """The point of ``cells``, which differ in their seed alone. Raises as ``measured``."""
        found = []
        for cell in cells:
            key = (cell.key, score)
            if key not in self._points:
                self._points[key] = measured([cell], score.task, score.metric, score.flops)
            found.append(self._points[key])
        return averaged(found)

    def attempt(self, cells: Sequence[Cell], score: Score) -> Point | str:
        """``point``, or the sentence that says why there is none."""
        try:
            return self.point(cells, score)
        except UserError as fault:
            return str(fault)

    def series(self) -> list[Series]:
        """The curves of the setting; dense is a point of all of them and no curve of its own, and
        a lossless method has none."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.identity["method"] != DENSE and not is_lossless(cell):
                groups.setdefault(curve_key(cell), []).append(cell)
        return [
            Series(
                tuple(cell for cell in group if cell.evaluated),
                tuple(cell for cell in group if not cell.evaluated),
            )
            for group in groups.values()
        ]

    def full(self, series: Series) -> list[Cell]:
        """Dense with a curve's own recovery, trained on the same text: where that curve ends at
        full depth."""
        return [
            cell
            for cell in self.cells
            if (cell.identity["method"], cell.identity["recovery"]) == (DENSE, series.recovery)
            and (series.recovery == NONE or _text(cell.identity) == _text(series.identity))
            and cell.evaluated
        ]

    def own_points(self, series: Series, score: Score) -> list[Point]:
        """The measured points of a curve, seeds averaged. Raises as ``measured``."""
        return [self.point(cells, score) for cells in series.by_target().values()]

    def curve(self, series: Series, score: Score) -> list[Point]:
        """A curve by ascending fraction, full depth included. Raises as ``measured``."""
        full = self.full(series)
        end = [self.point(full, score)] if full else []
        return curve([*self.own_points(series, score), *end])


def peers(cells: Iterable[Cell]) -> list[Peers]:
    """``cells`` by setting, whatever their order.

    Raises:
        UserError: their scores are of different task versions or data.
    """
    ordered = sorted(cells, key=order)
    check_comparable(ordered)
    groups: dict[str, list[Cell]] = {}
    for cell in ordered:
        groups.setdefault(setting(cell.identity), []).append(cell)
    return [Peers(group) for group in groups.values()]


def _text(identity: Row) -> str | None:
    """The text that the cell's method and its recovery were trained on."""
    return identity["corpus_fingerprint"] or None


def curve_key(cell: Cell) -> str:
    """What the cells of one curve have in common within their setting."""
    keys = sorted(METHOD_KEYS - set(VARIED))
    return repr([plain(cell.identity[key]) for key in keys])


def is_bound(cell: Cell) -> bool:
    """True if the cell's method sees labels: a bound, no competitor."""
    return bool(cell.provenance.get("uses_labels", False))


def full_name(identity: Row) -> str:
    """A curve's name within its setting and recovery, with every parameter, for tables."""
    parameters = flat(identity["parameters"])
    return f"{identity['method']}({parameters}), {identity['phases']}"
