"""From settings to the cells of a sweep, everything checked that needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dyndepth.capacity import check_length
from dyndepth.errors import UserError
from dyndepth.options import DEFAULT_LIMIT, OTHERS, Settings
from dyndepth.recipe import NONE, parse_recovery, shortened
from dyndepth.records import Row

DENSE = "dense"
"""Name of the entry point that executes everything: the yardstick of every comparison."""

HIDDEN = ("target_speedup", "seed", "phases")
"""Fields of a method that have columns of their own."""


@dataclass(frozen=True)
class Plan:
    """One cell before anything was loaded: which method, with which parameters, at what speedup.

    ``recovery`` is the canonical text of a recipe, or ``none``.
    """

    method: str
    target_speedup: float = 1.0
    seed: int = 0
    parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    recovery: str = NONE

    def build(self) -> Any:
        """The method, not fitted yet.

        Raises:
            UserError: a parameter has a value that the method refuses.
        """
        from dyndepth.registry import load_method

        speedup, seed = self.target_speedup, self.seed
        return load_method(self.method, **self.parameters, target_speedup=speedup, seed=seed)

    def describe(self) -> str:
        """The cell in a few words."""
        inner = ", ".join(f"{key}={value}" for key, value in self.parameters.items())
        return (
            f"{self.method}{f'({inner})' if inner else ''} "
            f"at {self.target_speedup:g}x, seed {self.seed}"
            f"{'' if self.recovery == NONE else f', {shortened(self.recovery)}'}"
        )


def plans(settings: Settings, layers: int, longest: int | None = None) -> list[Plan]:
    """The cells of a sweep on a model of ``layers`` blocks: dense first, each cell once.

    The model takes at most ``longest`` tokens in a row (None: any number). A method that executes
    everything whatever it is asked (``max_speedup`` is 1) has one cell, and one a seed for each
    recovery, which is trained. One that is not ``budgeted`` has one cell a seed, at the least
    speedup above 1. Dense, the control of recovery, has none for ``joint``: it has no routers.

    Raises:
        UserError: an unknown method or parameter, a speedup beyond what a method can reach, windows
            of text that are longer than the model takes, or ``joint`` for a method that trains
            nothing.
    """
    from dyndepth.registry import method_class, parse_methods

    chosen = parse_methods(settings.methods) if settings.methods else []
    found: dict[str, Plan] = {}
    for name, parameters in [(DENSE, {}), *chosen]:
        with_phases = parameters | _phases(method_class(name), parameters, settings.phases)
        base = Plan(name, parameters=with_phases)
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


def _recoverable(plan: Plan, recovery: str, longest: int | None) -> bool:
    """False for dense with ``joint``. Raises UserError for another method that trains nothing, and
    for windows that do not fit."""
    recipe = parse_recovery(recovery)
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


def _phases(cls: type, parameters: dict[str, Any], phases: str) -> dict[str, str]:
    """What ``--phases`` adds to a method: nothing where it has no choice or the user made one."""
    choosable = any(f.name == "phases" for f in fields(cls))
    if phases == "published" or "phases" in parameters or not choosable:
        return {}
    return {"phases": phases}


def _refuse_own(name: str, parameters: dict[str, Any]) -> None:
    for key, flag in (("target_speedup", "--speedups"), ("seed", "--seed")):
        if key in parameters:
            raise UserError(f"{name}: give {key} by {flag}, so that every method gets the same")


def _check_reach(plan: Plan, reach: float, speedups: Sequence[float], layers: int) -> None:
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


def parameters_text(method: Any) -> str:
    """The method's hyper-parameters as its repr gives them, without those with own columns.

    One that is None by default and in fact says nothing, and is left out.
    """
    return ", ".join(
        f"{f.name}={getattr(method, f.name)!r}"
        for f in fields(method)
        if f.repr
        and f.name not in HIDDEN
        and not (f.default is None and getattr(method, f.name) is None)
    )


def method_identity(method: Any) -> Row:
    """The part of a cell's identity that the method itself gives."""
    from dyndepth.provenance import method_code

    return {
        "method": method.name,
        "parameters": parameters_text(method),
        "phases": method.phases,
        "target_speedup": float(method.target_speedup),
        "seed": method.seed,
        "fit_version": method.fit_version,
        "method_code": method_code(type(method)),
    }


def cell_identity(plan: Plan, shared: Row) -> Row:
    """The full identity of the plan's cell; ``shared`` is what all cells of a workbench have."""
    return method_identity(plan.build()) | {"recovery": plan.recovery} | shared
