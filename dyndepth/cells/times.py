"""Which times a cell has, what is missing of those that are wanted, and what new ones replace.

A row of timing.csv says at what ``level`` it was taken, in which ``mode``, and whether the level
chose its shape or somebody ``asked`` for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dyndepth.cells.identity import Row
from dyndepth.common.modes import EAGER, GRAPHS, MODES

TIMING_LEVELS = ("off", "quick", "full")

ASKED = "asked"
"""What stands in ``shapes`` of a row whose batch and length somebody asked for."""


class Shape(NamedTuple):
    """A batch of prompts of ``length`` tokens, each continued by ``new_tokens`` steps; without any
    the prefill alone is timed."""

    batch: int
    length: int
    new_tokens: int

    def __str__(self) -> str:
        more = f" + {self.new_tokens}" if self.new_tokens else ""
        return f"{self.batch} x {self.length}{more}"


class Wanted(NamedTuple):
    """Times that a cell is to have: at that level or a higher one, in each of the modes.

    ``shapes``: those that were asked for; none: the level's own. ``compiled``: compiled dense
    beside them, or why there is none.
    """

    level: str
    modes: Sequence[str]
    shapes: Sequence[Shape] = ()
    compiled: bool = False


def missing(rows: Sequence[Row], level: str, wanted: Wanted) -> dict[str, tuple[Shape, ...]]:
    """By mode the shapes that are to be timed in it; an entry without any: all of the level's own.

    ``rows`` are a cell's times; those that do not say theirs are of ``level``.
    """
    found: dict[str, tuple[Shape, ...]] = {}
    for mode in wanted.modes:
        own = [row for row in rows if mode_of(row) == mode and _stands(row, level, wanted)]
        if wanted.shapes:
            # Graphs hold decode steps alone.
            possible = [shape for shape in wanted.shapes if shape.new_tokens or mode != GRAPHS]
            lacking = tuple(shape for shape in possible if not _has(own, shape, mode))
            found |= {mode: lacking} if lacking else {}
        else:
            chosen = [row for row in rows if mode_of(row) == mode and not _asked(row)]
            if not chosen or not all(row in own for row in chosen):
                found[mode] = ()
    return found


def renewed(rows: Sequence[Row], mode: str, new: Sequence[Row], level: str) -> list[Row]:
    """``rows`` with ``new`` ones of one mode, in the order of the modes. Of that mode those of the
    same shapes go, and, where the new ones are the level's own, all that are a level's. ``level``
    is what rows are of that do not say so."""
    asked = any(map(_asked, new))
    known = {(row["batch"], row["length"]) for row in new}
    kept = [
        {**row, "level": row.get("level") or level}
        for row in rows
        if mode_of(row) != mode
        or ((row["batch"], row["length"]) not in known and (asked or _asked(row)))
    ]
    return sorted([*kept, *new], key=lambda row: MODES.index(mode_of(row)))


def reached(rows: Sequence[Row], level: str) -> str | None:
    """The least level of ``rows`` whose shapes a level chose; None if there is none."""
    found = [_place(row, level) for row in rows if not _asked(row)]
    return TIMING_LEVELS[min(found)] if found else None


def mode_of(row: Row) -> str:
    """The mode of a row; those of before there was a choice are eager."""
    return str(row.get("mode", EAGER))


def _asked(row: Row) -> bool:
    return row.get("shapes") == ASKED


def _place(row: Row, level: str) -> int:
    return TIMING_LEVELS.index(row.get("level") or level)


def _stands(row: Row, level: str, wanted: Wanted) -> bool:
    """Whether a row is as thorough as is wanted, and has compiled dense if that is."""
    known = row.get("speedup_over_compiled") is not None or bool(row.get("compiled_error"))
    enough = _place(row, level) >= TIMING_LEVELS.index(wanted.level)
    return enough and (known or not wanted.compiled)


def _has(rows: Sequence[Row], shape: Shape, mode: str) -> bool:
    """Whether ``rows`` of one mode hold every phase of that shape, over as many steps or more."""
    phases = [] if mode == GRAPHS else ["prefill"]
    phases += ["decode"] if shape.new_tokens else []
    steps = {
        row["phase"]: row.get("new_tokens") or 0
        for row in rows
        if (row["batch"], row["length"]) == shape[:2]
    }
    return all(
        phase in steps and (phase == "prefill" or steps[phase] >= shape.new_tokens)
        for phase in phases
    )
