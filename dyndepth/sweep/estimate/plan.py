"""The whole of an estimate: each cell with its parts, and what has to fit into the memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import Cell
from dyndepth.cells.recipe import RANKED, parse_recovery
from dyndepth.common.paths import EMBEDDED
from dyndepth.models.shapes import is_shape
from dyndepth.sweep.estimate import costs
from dyndepth.sweep.estimate.costs import Depth, Work
from dyndepth.sweep.estimate.machines import Machine, assumed, check_here
from dyndepth.sweep.estimate.memory import Need, need
from dyndepth.sweep.estimate.models import Shape, loaded, measured_by, skeleton
from dyndepth.sweep.estimate.recorded import has_cells, recorded
from dyndepth.sweep.estimate.texts import Text, texts_of
from dyndepth.sweep.estimate.workers import Workers, workers_of
from dyndepth.sweep.grid import asked_level, wanted

if TYPE_CHECKING:
    from dyndepth.cells.cell import CellSpec
    from dyndepth.cells.recipe import Recipe
    from dyndepth.method import Reading
    from dyndepth.sweep.grid import Grid
    from dyndepth.sweep.settings import Settings


@dataclass(frozen=True)
class Planned:
    """One cell: what scoring, fitting (calibration, training, trying plans) and timing it take.

    ``fit`` says how it is fitted: ``none``, ``calibrates``, ``trains``, ``cached`` or ``shipped``;
    ``there`` where nothing remains to be done. ``todo`` is what does, of ``driver.needed``.
    """

    cell: CellSpec
    fit: str
    scoring: Work
    fitting: Work
    timing: Work
    todo: str = "everything"

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.scoring.seconds + self.fitting.seconds + self.timing.seconds

    @property
    def flops(self) -> float:
        """All of it."""
        return self.scoring.flops + self.fitting.flops + self.timing.flops


@dataclass
class Estimate:
    """What a sweep will cost; ``start`` is the seconds that loading took here, or None."""

    machine: Machine
    shape: Shape
    texts: list[Text]
    cells: list[Planned]
    need: Need
    start: float | None = None
    tried: bool = False
    workers: Workers = Workers()

    @property
    def seconds(self) -> float:
        """Of all cells: scored and fitted by as many workers as there are, timed one by one."""
        own = [each.scoring.seconds + each.fitting.seconds for each in self.cells]
        timing = sum(each.timing.seconds for each in self.cells)
        return max(sum(own) / self.workers.speed, max(own, default=0.0)) + timing

    @property
    def left(self) -> list[Planned]:
        """The cells of which something remains to be done."""
        return [each for each in self.cells if each.todo != "nothing"]


class Fits:
    """What fitting each cell takes, what is kept for several of them counted once."""

    def __init__(
        self,
        machine: Machine,
        shape: Shape,
        passes: Sequence[Any],
        model: Any,
        corpus: Any,
        here: bool,
    ) -> None:
        self.machine, self.shape, self.passes = machine, shape, passes
        # Whether it is on this machine, whose cache is looked into.
        self.model, self.corpus, self.here = model, corpus, here
        self.charged: dict[str, float] = {}
        self.readings: list[Reading] = []
        self.tried = False
        self.trained = 0.0

    def of(self, cell: CellSpec, method: Any, expenses: Any) -> tuple[str, Work]:
        """How the cell is fitted, and what that takes."""
        recipe = parse_recovery(cell.recovery)
        total, word = Work(), "none"
        if recipe is not None and self._recovered(method, recipe):
            return "cached", total
        joint = recipe is not None and recipe.kind == "joint"
        if expenses.shipped and not joint:
            word = "shipped"
        elif expenses.fit and not joint and self._kept(method):
            word = "cached"
        elif expenses.fit:
            read = (*expenses.fit, *(expenses.along if joint else ()))
            word = "trains" if any(one.backwards for one in read) else "calibrates"
            for number, one in enumerate(read):
                work = costs.reading(self.machine, self.shape, one)
                key = _kept_by(cell, number)
                if one.kept:
                    before = self.charged.get(key, 0.0)
                    self.charged[key] = max(before, work.seconds)
                    left = max(0.0, work.seconds - before)
                    work = work * (left / work.seconds if work.seconds else 0.0)
                total += work
                self.readings.append(one)
        if recipe is not None and not joint:
            # Of trainings that rank modules, all but the last serve every share that is kept.
            ranking = f"{replace(cell, recovery='')} {replace(recipe, keep=None)}"
            readings = costs.recovery_readings(recipe, 1 / method.target_speedup)
            for number, one in enumerate(readings):
                self.readings.append(one)
                if recipe.modules == RANKED and number < 2:
                    if f"{ranking} {number}" in self.charged:
                        continue
                    self.charged[f"{ranking} {number}"] = 1.0
                total += costs.reading(self.machine, self.shape, one)
            word = "trains"
        if recipe is not None:
            self.trained = max(self.trained, self._numbers(recipe))
        if expenses.candidates:
            self.tried = True
            key = costs.untargeted(cell)
            if key not in self.charged:
                self.charged[key] = 1.0
                one = costs.run(self.machine, self.shape, self.passes)
                total += one * (expenses.candidates * costs.TRIED)
        return word, total

    def done(self, cell: CellSpec, expenses: Any) -> None:
        """Take it that what serves all targets of this cell, which was computed, is kept."""
        for number, one in enumerate(expenses.fit):
            if one.kept:
                work = costs.reading(self.machine, self.shape, one)
                self.charged[_kept_by(cell, number)] = work.seconds

    def _kept(self, method: Any) -> bool:
        """Whether the fit lies in the cache already."""
        if self.model is None or not self.here:
            return False
        from dyndepth.common.files import cache_root
        from dyndepth.common.paths import file_part
        from dyndepth.fitting.fits import fit_key

        key = fit_key(method, self.model, self.corpus)
        return (cache_root() / "fits" / file_part(method.name) / key).is_dir()

    def _recovered(self, method: Any, recipe: Recipe) -> bool:
        """Whether the recovered method is shipped, or lies in the cache."""
        if self.model is None:
            return False
        from dyndepth.common.files import cache_root
        from dyndepth.common.paths import file_part
        from dyndepth.fitting.recovery.kept import find_shipped, recovery_key

        asked = (method, self.model, self.corpus, recipe, method.seed)
        if find_shipped(*asked) is not None:
            return True
        folder = cache_root() / "recovery" / file_part(method.name) / recovery_key(*asked)
        return self.here and folder.is_dir()

    def _numbers(self, recipe: Recipe) -> float:
        """Of a recipe's adapters, as if all roles were as wide as the MLP's gate."""
        shape = self.shape
        return float(recipe.rank * len(recipe.roles) * (shape.hidden + shape.inner) * shape.layers)


def estimate(settings: Settings, found: Grid, longest: int | None) -> Estimate:
    """What the sweep of ``found`` will cost.

    Raises:
        UserError: a device that is not here, or whatever is missing of model, text and tasks.
    """
    from dyndepth.models.loading import resolve_device

    machine = assumed(settings)
    device = "cpu" if machine is not None else resolve_device(settings.device)
    if machine is None:
        check_here(device)
    bare = skeleton(settings.model, settings.revision, settings.trust_remote_code)
    shape = Shape.of(bare, settings.dtype)
    named = settings.corpus != EMBEDDED
    corpus = _corpus(settings) if named or has_cells(settings) else None
    texts = texts_of(settings, found.documents, longest)
    started = time.perf_counter()
    model = loaded(settings, shape, device)
    if model is not None and corpus is None:
        corpus = _corpus(settings)
    start = None if model is None else time.perf_counter() - started
    here = machine is None
    if machine is None:
        machine = measured_by(model or bare, shape, device, settings.dtype)
    rows, budget = settings.batch_size, costs.budget_of(machine.kind)
    passes = [one for text in texts for one in text.passes(rows, budget, True, False)]
    fits = Fits(machine, shape, passes, model, corpus, here)
    cells = []
    there = recorded(settings, found, model, corpus, machine.kind)
    for cell, (todo, record) in zip(found.cells, there, strict=True):
        method = cell.build()
        expenses = method.expenses(shape.layers, model, None if model is None else corpus)
        if todo == "nothing":
            fits.done(cell, expenses)
            cells.append(Planned(cell, "there", Work(), Work(), Work(), todo))
            continue
        depth = Depth.of(method, expenses.readouts)
        word, fitting = fits.of(cell, method, expenses)
        scoring = Work()
        if todo == "everything":
            scoring = costs.scoring(machine, shape, texts, method, depth, rows) + Work(costs.CELL)
        levels = levels_of(settings, machine.kind, record if todo == "timing" else None)
        timing = costs.timing(machine, shape, longest, levels, depth, settings.compiled_dense)
        cells.append(Planned(cell, word, scoring, fitting, timing, todo))
    needs = need(shape, passes, fits.readings, fits.trained)
    left = sum(each.todo == "everything" for each in cells)
    workers = workers_of(settings, machine, left, here)
    begun = start if here else None
    return Estimate(machine, shape, texts, cells, needs, begun, fits.tried, workers)


def _kept_by(cell: CellSpec, number: int) -> str:
    """By what a cell's reading is known that serves all targets. In ``joint`` recovery it is read
    off a model with adapters, which are the recipe's and the seed's own."""
    recipe = parse_recovery(cell.recovery)
    joint = cell.recovery if recipe is not None and recipe.kind == "joint" else ""
    return f"{costs.untargeted(cell)} {joint} {number}"


def levels_of(settings: Settings, kind: str, record: Cell | None) -> dict[str, Any]:
    """What the run would time of a cell on a device of that kind, by mode, as ``asked_level`` has
    it; of one that has a ``record``, what that lacks."""
    if settings.timing == "off":
        return {}
    cell = record or Cell({"device": kind})
    lacking = cell.untimed(wanted(settings, cell))
    return {mode: asked_level(settings, kind, shapes) for mode, shapes in lacking.items()}


def _corpus(settings: Settings) -> Any:
    from dyndepth.data.corpus import load_corpus
    from dyndepth.models.loading import load_tokenizer

    named = (settings.model, settings.revision, settings.trust_remote_code)
    named = (EMBEDDED, None, False) if is_shape(settings.model) else named
    return load_corpus(settings.corpus, load_tokenizer(*named))
