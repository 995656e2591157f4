"""From settings to the cells of a sweep, everything checked that needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dyndepth.cells.cell import DENSE, Cell, CellSpec
from dyndepth.cells.recipe import NONE, parse_recovery, refuse_drafts
from dyndepth.cells.times import Shape, Wanted, mode_of
from dyndepth.common.errors import UserError
from dyndepth.common.modes import EAGER, GRAPHS
from dyndepth.common.paths import EMBEDDED
from dyndepth.data.capacity import check_length
from dyndepth.sweep.settings import DEFAULT_LIMIT, OTHERS, Settings


@dataclass(frozen=True)
class Grid:
    """What a sweep is about to compute, looked up once and handed to all who need it.

    Attributes:
        cells: in the order in which they are computed; of a shard, its own.
        documents: how many are scored, by task in their order; None: all.
    """

    cells: tuple[CellSpec, ...]
    documents: dict[str, int | None]


def grid(settings: Settings) -> Grid:
    """The grid of a sweep, everything checked that needs no weights.

    Raises:
        UserError: a model, method, speedup or task that cannot be had, or windows of text that are
            longer than the model takes.
    """
    from dyndepth.models.loading import (
        checked_config,
        layer_count,
        longest_window,
        resolve_device,
    )
    from dyndepth.tasks import resolve
    from dyndepth.timing.levels import check_shapes

    model = (settings.model, settings.revision, settings.trust_remote_code)
    layers, longest = layer_count(*model), longest_window(*model)
    if settings.model != EMBEDDED:
        checked_config(*model)
    which, count = settings.shard
    cells = plans(settings, layers, longest)[which - 1 :: count]
    if settings.timing != "off":
        # What the machines of a cluster have is seen there.
        device = "cpu" if settings.executor == "ray" else resolve_device(settings.device)
        device = planned(settings) or device
        check_shapes(longest, asked_level(settings, device), device.partition(":")[0])
        if settings.executor != "ray":
            modes(settings, device)
    tasks = resolve(settings.tasks, settings.include_path)
    return Grid(tuple(cells), limits(settings, tasks))


def planned(settings: Settings) -> str | None:
    """The kind of device that a dry run plans for; None where it is the one here."""
    if settings.assume is None and settings.tflops is None:
        return None
    return "cpu" if settings.assume == "cpu" or settings.device == "cpu" else "cuda"


def modes(settings: Settings, device: str) -> tuple[str, ...]:
    """The modes that cells are timed in on ``device``; see ``levels.modes_of``. A model that is
    spread over several GPUs is timed in eager mode unless asked otherwise.

    Raises:
        UserError: graphs without a GPU, or of shapes without steps.
    """
    from dyndepth.models.loading import SPREAD
    from dyndepth.timing.levels import modes_of

    asked = settings.mode or (EAGER if settings.device == SPREAD else None)
    found = modes_of(asked, settings.timing, device.partition(":")[0])
    shapes = settings.timing_shapes
    if found == (GRAPHS,) and shapes and not any(shape.new_tokens for shape in shapes):
        raise UserError("graphs hold decode steps, and no shape has any; take --mode eager")
    return found


def asked_level(settings: Settings, device: str, shapes: Sequence[Shape] = ()) -> Any:
    """How thoroughly and on which shapes is timed: the named level, or a ``levels.Level`` with the
    ``shapes``, or else those that were asked for, in place of its own."""
    from dyndepth.timing.levels import level_of

    chosen = tuple(shapes or settings.timing_shapes)
    if not chosen:
        return settings.timing
    return replace(level_of(settings.timing, device.partition(":")[0]), shapes=chosen)


def wanted(settings: Settings, cell: Cell) -> Wanted:
    """The times that ``cell`` is to have. What is added to times that it has, shapes or compiled
    dense, is so in their modes, unless one was asked for by name; see also ``timeable``."""
    possible = modes(settings, str(cell.identity["device"]))
    added = settings.timing_shapes or settings.compiled_dense
    if settings.mode is None and added and cell.timing:
        known = set(map(mode_of, cell.timing))
        possible = tuple(mode for mode in possible if mode in known) or possible
    shapes = settings.timing_shapes
    possible_shapes = timeable(shapes, cell.identity.get("method")) or shapes
    return Wanted(settings.timing, possible, possible_shapes, settings.compiled_dense)


def timeable(shapes: Sequence[Shape], method: str | None) -> tuple[Shape, ...]:
    """Those of the ``shapes`` that the method of that name can be timed on: of one sequence, if it
    speculates."""
    from dyndepth.common.registry import method_class, methods

    several = any(shape.batch > 1 for shape in shapes)
    alone = several and method in methods() and method_class(str(method)).speculates
    return tuple(shape for shape in shapes if shape.batch == 1 or not alone)


def plans(settings: Settings, layers: int, longest: int | None = None) -> list[CellSpec]:
    """The cells of a sweep on a model of ``layers`` blocks: dense first, each cell once.

    The model takes at most ``longest`` tokens in a row (None: any number). A method that executes
    everything whatever it is asked (``max_speedup`` is 1) has one cell, and one a seed for each
    recovery, which is trained. One that is not ``budgeted`` has one cell a seed, at the least
    speedup above 1. Dense, the control of recovery, has none for ``joint``: it has no routers.

    Raises:
        UserError: an unknown method or parameter, a speedup beyond what a method can reach, windows
            of text that are longer than the model takes, ``joint`` for a method that trains
            nothing, or a recovery for one that speculates.
    """
    from dyndepth.common.registry import parse_methods, phases_given

    chosen = parse_methods(settings.methods) if settings.methods else []
    found: dict[str, CellSpec] = {}
    for name, parameters in [(DENSE, {}), *chosen]:
        with_phases = parameters | phases_given(name, parameters, settings.phases)
        base = CellSpec(name, parameters=with_phases)
        _refuse_own(name, parameters)
        method = base.build()
        reach = method.max_speedup(layers)
        speedups = settings.speedups if method.budgeted else _above_one(settings.speedups)
        if reach != 1.0:
            _check_reach(base, reach, speedups, layers)
            check_length(longest, method.window_length, name)
        for recovery in settings.recovery:
            if not _recoverable(base, recovery, longest):
                continue
            cells = [
                replace(base, target_speedup=speedup, seed=seed, recovery=recovery)
                for speedup in (speedups if reach != 1.0 else (1.0,))
                for seed in (settings.seed if reach != 1.0 or recovery != NONE else (base.seed,))
            ]
            for cell in cells:
                found.setdefault(f"{cell.build()!r} {recovery}", cell)
    return list(found.values())


def _above_one(speedups: Sequence[float]) -> Sequence[float]:
    """The least speedup above 1, or whatever there is."""
    above = sorted(speedup for speedup in speedups if speedup > 1.0)
    return above[:1] or speedups[:1]


def _recoverable(plan: CellSpec, recovery: str, longest: int | None) -> bool:
    """False for dense with ``joint``. Raises UserError for another method that trains nothing, for
    one that speculates, and for windows that do not fit."""
    recipe = parse_recovery(recovery)
    if recipe is not None:
        refuse_drafts(plan.build(), recipe)
    if recipe is not None and recipe.kind == "lora":
        check_length(longest, recipe.length, f"recovery {recipe.kind!r}")
    if recipe is None or recipe.kind != "joint" or plan.build().needs_training:
        return True
    if plan.method == DENSE:
        return False
    raise UserError(
        f"recovery 'joint' trains routers and adapters at once, and {plan.method} trains nothing; "
        "use lora"
    )


def _refuse_own(name: str, parameters: dict[str, Any]) -> None:
    for key, flag in (("target_speedup", "--speedups"), ("seed", "--seed")):
        if key in parameters:
            raise UserError(f"{name}: give {key} by {flag}, so that every method gets the same")


def _check_reach(plan: CellSpec, reach: float, speedups: Sequence[float], layers: int) -> None:
    beyond = [speedup for speedup in speedups if speedup > reach]
    if beyond:
        raise UserError(
            f"{plan.method} reaches at most {reach:.3g}x on a model of {layers} blocks, "
            f"so {max(beyond):g}x of --speedups is out of its reach"
        )


def limits(settings: Settings, tasks: Sequence[str]) -> dict[str, int | None]:
    """Documents to score by task; None: all.

    Raises:
        UserError: ``--limit`` names a task that is not scored.
    """
    for named in settings.limit:
        own = settings.limit is not DEFAULT_LIMIT.get(settings.model)
        if own and named != OTHERS and named not in tasks:
            raise UserError(
                f"--limit names the task {named!r}, which is not scored; "
                f"the tasks are {', '.join(tasks)}"
            )
    return {task: settings.limit.get(task, settings.limit[OTHERS]) for task in tasks}
