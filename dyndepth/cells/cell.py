"""A cell: what is to be run, what came out, or why it failed.

A cell is (model, method, its parameters, target speedup, seed, recovery) under the run's settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dyndepth.cells.identity import IDENTITY, Row, cell_hash, flat, setting
from dyndepth.cells.recipe import NONE, shortened
from dyndepth.cells.times import TIMING_LEVELS, Shape, Wanted, missing, reached, renewed
from dyndepth.common.paths import file_part
from dyndepth.common.provenance import VERSIONS

ROWS = ("accuracy", "compute", "routing", "timing", "samples")


@dataclass
class Cell:
    """The record of one cell.

    Attributes:
        identity: the keys of ``IDENTITY``.
        status: ``done`` or ``error``.
        accuracy, compute, routing, timing, samples: rows of the table of that name, without the
            identity.
        timing_level: how thoroughly it was timed on a level's own shapes, in every mode that it has
            times of: the least of their levels, of ``TIMING_LEVELS``.
        provenance: conditions that are no part of the identity (hardware, threads, duration).
        error: one line; empty when done.
        traceback: where the error came from; empty when done.
    """

    identity: Row
    status: str = "done"
    accuracy: list[Row] = field(default_factory=list)
    compute: list[Row] = field(default_factory=list)
    routing: list[Row] = field(default_factory=list)
    timing: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    timing_level: str = "off"
    provenance: Row = field(default_factory=dict)
    error: str = ""
    traceback: str = ""

    @property
    def key(self) -> str:
        """The cell's hash."""
        return cell_hash(self.identity)

    @property
    def evaluated(self) -> bool:
        """True if its evaluation came to an end (its timing may still be missing)."""
        return bool(self.accuracy)

    def lacks(self, timing: str) -> str:
        """What remains to be done: ``everything``, ``timing`` at that level, or ``nothing``."""
        if not self.evaluated:
            return "everything"
        if TIMING_LEVELS.index(self.timing_level) < TIMING_LEVELS.index(timing):
            return "timing"
        return "timing" if self.status == "error" else "nothing"

    def untimed(self, wanted: Wanted) -> dict[str, tuple[Shape, ...]]:
        """What it lacks of the times that are wanted; see ``times.missing``."""
        return missing(self.timing, self.timing_level, wanted)

    def take_times(self, mode: str, rows: Sequence[Row], timing: str) -> None:
        """Keep times of one mode, taken at that level, in place of those that ``times.renewed``
        says; the others stay. A method that cannot be timed has none, whatever the level."""
        named = [{**row, "mode": mode, "level": timing} for row in rows]
        self.timing = renewed(self.timing, mode, named, self.timing_level)
        self.timing_level = reached(self.timing, timing) or ("off" if self.timing else timing)


def order(cell: Cell) -> tuple[Any, ...]:
    """Sort key of the tables: by setting, method, parameters, recovery, target speedup and seed."""
    identity = cell.identity
    return (
        str(identity["model"]),
        setting(identity),
        str(identity["method"]),
        str(identity["phases"]),
        str(identity["parameters"]),
        # What was not recovered stands first.
        identity["recovery"] != NONE,
        str(identity["recovery"]),
        float(identity["target_speedup"]),
        int(identity["seed"]),
        cell.key,
    )


def identity_columns(cell: Cell) -> Row:
    """The columns that lead every row of the cell, ``LEADING``."""
    bound = bool(cell.provenance.get("uses_labels", False))
    own = {key: flat(cell.identity[key]) for key in IDENTITY}
    # As pip takes it; and a bare 5.24.0 is a date to a spreadsheet.
    own |= {key: f"{key}=={own[key]}" for key in VERSIONS}
    return {
        "cell": cell.key,
        **own,
        "bound": bound,
        "lossless": is_lossless(cell),
        "remote_code": cell.provenance.get("remote_code"),
    }


def is_lossless(cell: Cell) -> bool:
    """True if the cell's method speculates: it drafts what the whole model verifies, so it writes
    what dense writes, saves no FLOPs and competes with nobody on them."""
    return bool(cell.provenance.get("speculates", False))


def readable_name(identity: Row) -> str:
    """A file name that a person can find a cell by; the hash after it makes it unique."""
    text = "-".join(
        str(part)
        for part in (
            identity["method"],
            identity["parameters"],
            identity["phases"],
            f"x{identity['target_speedup']:g}",
            f"seed{identity['seed']}",
            "" if identity["recovery"] == NONE else shortened(identity["recovery"]),
        )
        if part != ""
    )
    return file_part(text)


DENSE = "dense"
"""Name of the entry point that executes everything: the yardstick of every comparison."""

HIDDEN = ("target_speedup", "seed", "phases")
"""Fields of a method that have columns of their own."""


@dataclass(frozen=True)
class CellSpec:
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
        from dyndepth.common.registry import load_method

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


def method_identity(method: Any, recovery: str = NONE) -> Row:
    """The part of a cell's identity that the method and its recovery give."""
    from dyndepth.common.digests import method_code

    return {
        "method": method.name,
        "parameters": parameters_text(method),
        "phases": method.phases,
        "target_speedup": float(method.target_speedup),
        "seed": method.seed,
        "fit_version": method.fit_version,
        "method_code": method_code(type(method), recovered=recovery != NONE),
        "recovery": recovery,
    }


def cell_identity(plan: CellSpec, shared: Row) -> Row:
    """The full identity of the plan's cell; ``shared`` is what all cells of a workbench have."""
    return method_identity(plan.build(), plan.recovery) | shared


def is_dense(cell: Cell) -> bool:
    """True for the cell that others of its setting are compared to, if it was evaluated: dense
    without recovery."""
    own = cell.identity
    return own["method"] == DENSE and own["recovery"] == NONE and cell.evaluated
